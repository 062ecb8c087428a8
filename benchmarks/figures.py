"""From raw series to figures: what guarding adds, and in which units.

*Added cost* is (guarded call - bare call) / (one pass-through call), where the pass-through call is the whole of
`def w(*args, **kwargs): return f(*args, **kwargs)`, measured beside the candidate; for coroutines, of its `async def`
twin. All three are minima over all rounds. `*_median` is the same from the medians.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
Key = tuple[str, str, str, str]


class Figures:
    """Rows of all jobs so far. Rows of the same candidate are pooled: more rounds, nearer to the truth."""

    def __init__(self) -> None:
        self._rows: dict[Key, Row] = {}

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows in as a worker gave them."""
        for row in rows:
            key = row["suite"], row["mode"], row["group"], row["name"]
            if "error" in row:
                # Where a file lies is nobody's business.
                row["error"] = re.sub(r"(/[\w.+~-]+){2,}/", "", str(row["error"]))
            known = self._rows.get(key)
            if known is None or "series" not in known:
                self._rows[key] = row
            elif "series" in row:
                for field, series in row["series"].items():
                    known["series"][field] = known["series"].get(field, []) + series

    def rows(self) -> list[Row]:
        """The figures, one row for each candidate, without the raw series."""
        return [self._row(row) for row in self._rows.values()]

    def find(self, suite: str, mode: str, group: str, name: str) -> Row | None:
        """The figures of one candidate."""
        row = self._rows.get((suite, mode, group, name))
        return None if row is None else self._row(row)

    def _row(self, row: Row) -> Row:
        made = {key: value for key, value in row.items() if key != "series"}
        series: dict[str, list[float]] | None = row.get("series")
        if series:
            made.update(_FIGURES[row["suite"]](self, row, series))
        return made

    def _reference(self, row: Row, name: str, field: str) -> list[float] | None:
        group = row["group"] if row["suite"] in ("calls", "forms") else "reference"
        found = self._rows.get((row["suite"], row["mode"], group, name))
        if found is None or not found.get("reference"):
            found = self._rows.get((row["suite"], row["mode"], "", name))
        series: dict[str, list[float]] = {} if found is None else found.get("series", {})
        return series.get(field)

    def added(self, row: Row, series: dict[str, list[float]]) -> Row:
        """Nanoseconds of a call, and what is added to the bare one."""
        ns = series["ns"]
        made = {"ns": round(min(ns), 1), "median_ns": round(statistics.median(ns), 1)}
        bare = self._reference(row, "bare call", "ns")
        closure = self._reference(row, "closure", "ns")
        if bare and closure:
            made["added_ns"] = round(min(ns) - min(bare), 1)
            made["closures"] = round((min(ns) - min(bare)) / min(closure), 2)
            middle = statistics.median
            made["closures_median"] = round((middle(ns) - middle(bare)) / middle(closure), 2)
        timeout = self._reference(row, "asyncio.timeout", "ns")
        if bare and timeout:
            made["timeouts"] = round((min(ns) - min(bare)) / (min(timeout) - min(bare)), 3)
        return made

    def milliseconds(self, row: Row, series: dict[str, list[float]]) -> Row:
        """Milliseconds over those of the reference."""
        ms = series["ms"]
        made = {"ms": round(min(ms), 2), "median_ms": round(statistics.median(ms), 2)}
        bare = self._reference(row, "bare python" if row["suite"] == "imports" else "bare call", "ms")
        if bare:
            made["added_ms"] = round(min(ms) - min(bare), 2)
            if "number" in row:
                made["added_us_per_task"] = round((min(ms) - min(bare)) * 1e3 / row["number"], 2)
        return made

    def rates(self, row: Row, series: dict[str, list[float]]) -> Row:
        """Calls a second by number of threads, and how far eight threads get."""
        made: Row = {"per_second": {threads: round(max(rates)) for threads, rates in series.items()}}
        made["speedup"] = round(max(series["8"]) / max(series["1"]), 2)
        return made

    def ratios(self, row: Row, series: dict[str, list[float]]) -> Row:
        """Microseconds of a call, by medians (alone: the minimum), and the median of the rounds' ratios to the raw."""
        us, raw, one = series["us"], series.get("raw_us"), series.get("one_us")
        made: Row = {"us": round(min(us) if raw is None and one is None else statistics.median(us), 2)}
        if raw is not None:
            made["raw_us"] = round(statistics.median(raw), 2)
            made["ratio"] = round(statistics.median(a / b for a, b in zip(us, raw, strict=True)), 3)
        if one is not None:
            made["one_us"] = round(statistics.median(one), 2)
            made["times"] = round(statistics.median(b / a for a, b in zip(us, one, strict=True)), 2)
        return made

    def sagas(self, row: Row, series: dict[str, list[float]]) -> Row:
        """Microseconds of a saga: over the bare calls (minima), or beside others (medians of the rounds' ratios)."""
        middle = statistics.median
        if "seconds" in series:
            made: Row = {field: round(min(each), 2) for field, each in series.items()}
            made["slower"] = round(_ratio(series["last_us"], series["first_us"]), 3)
            return made
        us, bare, raw, peer, one = (series.get(f"{name}us") for name in ("", "bare_", "raw_", "peer_", "one_"))
        assert us is not None
        made = {"us": round(middle(us) if raw or peer or one else min(us), 3)}
        if bare is not None:
            made["bare_us"] = round(min(bare), 3)
            made["added_us"] = round(min(us) - min(bare), 3)
        if raw is not None:
            made["raw_us"] = round(middle(raw), 1)
            made["share"] = round(_ratio(raw, us) * 100, 1)
        for name, other in (("peer_us", peer), ("one_us", one)):
            if other is not None:
                made[name] = round(middle(other), 1)
                made["times"] = round(_ratio(other, us), 2)
        return made


def _ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _bytes(figures: Figures, row: Row, series: dict[str, list[float]]) -> Row:
    return {"bytes": round(min(series["bytes"]))}


_FIGURES: dict[str, Any] = {
    "calls": Figures.added,
    "forms": Figures.added,
    "failure": Figures.added,
    "rejection": Figures.added,
    "imports": Figures.milliseconds,
    "tasks": Figures.milliseconds,
    "threads": Figures.rates,
    "memory": _bytes,
    "durable": Figures.ratios,
    "sagas": Figures.sagas,
}
