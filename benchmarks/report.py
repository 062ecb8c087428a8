"""The figures as people read them: in the terminal, in README.md, in the documentation, and as JSON."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.budgets import Budget
from benchmarks.cases import GROUPS, OURS
from benchmarks.figures import Figures, Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

_PACKAGES = (
    "resilient-kit",
    "tenacity",
    "stamina",
    "backoff",
    "pybreaker",
    "circuitbreaker",
    "aiobreaker",
    "purgatory",
    "aiolimiter",
    "hyx",
    "nopanic",
    "pyresilience",
    "resilix",
    "grit-toolkit",
    "crashbytes-resilience",
    "dbos",
    "temporalio",
)


def machine() -> dict[str, Any]:
    """What the figures were measured on; nothing that tells whose machine it is."""
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "gil": gil,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
    }


def packages() -> dict[str, str]:
    """The versions that were compared."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def baseline(rows: list[Row]) -> dict[str, Any]:
    """All figures as plain data."""
    return {"machine": machine(), "packages": packages(), "unit": _UNIT, "figures": rows}


_UNIT = (
    "closures = (guarded - bare) / (one call through `def w(*a, **k): return f(*a, **k)`, or its async twin); "
    "minima over all rounds; timeouts = the same with `async with asyncio.timeout(30)` less the bare call below"
)


# -- tables ----------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], *, markdown: bool) -> str:
    lines = [list(line) for line in lines]
    if markdown:
        rule = ["---", *("---:" for _ in head[1:])]
        return "\n".join("| " + " | ".join(line) + " |" for line in [list(head), rule, *lines])
    widths = [max(len(line[at]) for line in [list(head), *lines]) for at in range(len(head))]

    def laid(line: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([line[0].ljust(widths[0]), *rest])

    return "\n".join(laid(line) for line in [list(head), *lines])


Column = tuple[str, Callable[[Row], Any]]


def _get(field: str, form: str = "{:,.0f}") -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row.get(field)
        return "" if value is None else form.format(value)

    return text


_COLUMNS: dict[str, list[Column]] = {
    "calls sync": [
        ("min ns", _get("ns")),
        ("median ns", _get("median_ns")),
        ("added ns", _get("added_ns")),
        ("added closures", _get("closures", "{:,.2f}")),
        ("by medians", _get("closures_median", "{:,.2f}")),
    ],
    "calls async": [
        ("min ns", _get("ns")),
        ("median ns", _get("median_ns")),
        ("added ns", _get("added_ns")),
        ("added async closures", _get("closures", "{:,.2f}")),
        ("added asyncio.timeouts", _get("timeouts", "{:,.2f}")),
    ],
    "forms": [
        ("min ns", _get("ns")),
        ("added ns", _get("added_ns")),
        ("added closures", _get("closures", "{:,.2f}")),
    ],
    "failure": [("min ns", _get("ns")), ("median ns", _get("median_ns"))],
    "rejection": [("min ns", _get("ns")), ("median ns", _get("median_ns"))],
    "imports": [
        ("added ms", _get("added_ms", "{:,.1f}")),
        ("min ms", _get("ms", "{:,.1f}")),
        ("median ms", _get("median_ms", "{:,.1f}")),
        ("modules", _get("modules")),
    ],
    "memory": [("bytes", _get("bytes"))],
    "threads": [
        *(
            (f"{n} threads" if n > 1 else "1 thread", lambda row, n=n: f"{row['per_second'][str(n)]:,}")
            for n in (1, 2, 4, 8)
        ),
        ("8 over 1", _get("speedup", "{:.1f}")),
    ],
    "durable": [
        ("µs", _get("us", "{:,.1f}")),
        ("raw µs", _get("raw_us", "{:,.1f}")),
        ("ours / raw", _get("ratio", "{:.2f}")),
        ("alone µs", _get("one_us", "{:,.1f}")),
        ("times", _get("times", "{:.1f}")),
    ],
    "sagas": [
        ("µs", _get("us", "{:,.1f}")),
        ("bare µs", _get("bare_us", "{:,.2f}")),
        ("added µs", _get("added_us", "{:,.2f}")),
        ("raw µs", _get("raw_us", "{:,.1f}")),
        ("% of raw rate", _get("share", "{:.0f}")),
        ("theirs µs", _get("peer_us", "{:,.0f}")),
        ("alone µs", _get("one_us", "{:,.1f}")),
        ("times", _get("times", "{:.1f}")),
        ("seconds", _get("seconds", "{:,.1f}")),
        ("first tenth µs", _get("first_us", "{:,.0f}")),
        ("last tenth µs", _get("last_us", "{:,.0f}")),
    ],
    "tasks": [
        ("min ms", _get("ms", "{:,.1f}")),
        ("median ms", _get("median_ms", "{:,.1f}")),
        ("added us per task", _get("added_us_per_task", "{:,.2f}")),
        ("refused", _get("refused")),
    ],
}

_TITLES = {
    "calls": "Success",
    "forms": "Other ways to call a stack of three",
    "failure": "One failure, one retry, no wait",
    "rejection": "Refusal by an open breaker, and the caller's `except`",
    "imports": "Import, in a fresh process",
    "memory": "Bytes that each guarded function holds",
    "threads": "Calls a second through one guard around a sleep of 1 ms",
    "tasks": "Many tasks at once through one guard",
    "durable": "Idempotent calls beside the bare driver",
    "sagas": "Sagas of three steps",
}


def _sections(rows: list[Row], *, markdown: bool) -> Iterable[str]:
    for suite, title in _TITLES.items():
        of_suite = [row for row in rows if row["suite"] == suite]
        for mode in ("sync", "async", ""):
            of_mode = [row for row in of_suite if row["mode"] == mode]
            if not of_mode:
                continue
            words = {"sync": ", plain functions", "async": ", coroutines", "": ""}[mode if suite != "forms" else ""]
            groups = sorted({row["group"] for row in of_mode}, key=_place)
            for group in groups:
                of_group = [row for row in of_mode if row["group"] == group]
                columns = _COLUMNS.get(f"{suite} {mode}") or _COLUMNS[suite]
                if suite == "sagas":
                    columns = [column for column in columns if any(column[1](row) for row in of_group)]
                lines = _lines(of_group, columns)
                if not lines:
                    continue
                name = f"{title}{words}" + (f": {group}" if group not in ("", "reference") else "")
                name += " (reference)" if group == "reference" else ""
                table = _table(["", *(head for head, _ in columns)], lines, markdown=markdown)
                yield f"### {name}\n\n{table}" if markdown else f"{name}\n{table}"
    broken = [_excuse(row) for row in rows if "error" in row]
    if broken:
        yield ("### Not measured\n\n" if markdown else "Not measured\n") + "\n".join(broken)


def _excuse(row: Row) -> str:
    place = (row["suite"], row["mode"], row["group"], row["name"])
    return f"- {' '.join(part for part in place if part)}: {row['error']}"


def _place(group: str) -> tuple[int, str]:
    return (GROUPS.index(group), "") if group in GROUPS else (len(GROUPS), group)


def _lines(rows: list[Row], columns: list[Column]) -> list[list[str]]:
    good = [row for row in rows if "error" not in row]
    field = next((field for field in ("ns", "added_ms", "ms", "bytes") if any(field in row for row in good)), None)
    if field is not None:
        # Whoever turns callers away is soon done: such come last.
        good.sort(key=lambda row: (not row.get("reference", False), bool(row.get("refused")), row.get(field, 0.0)))
    return [[_mark(row), *(column(row) for _, column in columns)] for row in good]


def _mark(row: Row) -> str:
    name: str = row["name"]
    return f"**{name}**" if row["library"] == OURS else name


def terminal(rows: list[Row]) -> str:
    """Every table, for the terminal."""
    return "\n\n".join(_sections(rows, markdown=False)).replace("**", "") + "\n"


def page(rows: list[Row], budgets: Sequence[Budget], figures: Figures) -> str:
    """Every table, for the documentation."""
    lines: list[list[str]] = []
    for budget in budgets:
        value = budget.value(figures)
        lines.append([budget.says, budget.limit(figures), "not measured" if value is None else f"{value:g}"])
    facts = machine()
    intro = (
        f"{facts['implementation']} {facts['python']}, {facts['cpus']} CPUs, {facts['system']} {facts['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in packages().items() if name != "resilient-kit")
        + "."
    )
    budget_table = _table(["what", "budget", "measured"], lines, markdown=True)
    return "\n\n".join([intro, "### Budgets", budget_table, *_sections(rows, markdown=True)])


# -- README ----------------------------------------------------------------------------------------------------------


def readme(rows: list[Row]) -> str:
    """One line for each library, one column for each thing that people ask about."""
    cells = {(row["suite"], row["mode"], row["group"], row["name"]): row for row in rows if "error" not in row}
    by_library: list[tuple[str, dict[str, str]]] = []
    for label, names in _README_ROWS:
        found: dict[str, str] = {}
        for head, suite, mode, group, field, form in _README_COLUMNS:
            for name in names:
                row = cells.get((suite, mode, group, name))
                if row is not None and field in row and not row.get("reference"):
                    cut_off = head == "five" and name in _CUT_OFF
                    found[head] = form(row[field]) + (" †" if cut_off else "")
                    break
        if found:
            by_library.append((label, found))
    heads = [column[0] for column in _README_COLUMNS]
    lines = [[label, *(found.get(head, "–") for head in heads)] for label, found in by_library]
    calls = [_table(["", *heads], lines, markdown=True), " ".join(_caption(rows, cells))]
    return "\n\n".join([*calls, *_durable(cells)])


def _caption(rows: list[Row], cells: dict[tuple[str, str, str, str], Row]) -> Iterable[str]:
    """What the columns of the README's table mean."""
    facts = machine()
    closure = [
        row["ns"] for row in rows if row["suite"] == "calls" and row["mode"] == "sync" and row["name"] == "closure"
    ]
    timeout = [row["added_ns"] for row in rows if row["name"] == "asyncio.timeout" and "added_ns" in row]
    thread = cells.get(("calls", "sync", "stack of five", f"{OURS} (thread)"), {}).get("closures")
    every = cells.get(("imports", "", "", f"{OURS} (all policies)"), {}).get("added_ms")
    yield "The first six columns are what guarding adds to a call of a plain function that succeeds, in units of one"
    yield "call through `def w(*a, **k): return f(*a, **k)`" + (f" (here {min(closure):.0f} ns);" if closure else ";")
    yield "*three* is retry, breaker and bulkhead, *five* adds a rate limit and a deadline († a timeout by thread or"
    yield f"signal instead; ours by thread adds {thread:.0f})." if thread else "signal instead)."
    yield "*async* is what is added to a coroutine; its *five* has a real timeout"
    yield f"(one bare `asyncio.timeout()` alone adds {min(timeout) / 1e3:.1f} µs)." if timeout else "."
    yield "*one retry* is a whole call that fails once and is made again without a wait, *refusal* a call that meets an"
    yield "open breaker, *bytes* what a stack of three holds, *import* what it takes over bare Python"
    yield f"(with every policy, and so pybreaker and aiolimiter, ours takes {every:.0f} ms)." if every else "."
    yield f"{facts['implementation']} {facts['python']}, {facts['cpus']} shared cores, minima of interleaved rounds;"
    yield "– is what a library does not have. [How it is measured, and all figures](docs/reference/benchmarks.md)."


_STORES = ("sqlite full", "sqlite normal", "postgres", "redis")

_DURABLE_ROWS = (
    ("idempotent call, first time / its two round trips", "durable", "first call, 1 in flight", "ratio", "{:.2f}"),
    ("… 16 in flight", "durable", "first call, 16 in flight", "ratio", "{:.2f}"),
    ("saga of three steps, % of the rate of its four commits", "sagas", "block", "share", "{:.0f}"),
    ("… a durable saga", "sagas", "durable", "share", "{:.0f}"),
)


def _durable(cells: dict[tuple[str, str, str, str], Row]) -> Iterable[str]:
    """What is stored, beside the bare driver of the same store."""

    def found(suite: str, group: str, name: str, field: str, form: str) -> str:
        values = [cells.get((suite, mode, group, name), {}).get(field) for mode in ("sync", "async")]
        return " / ".join("–" if value is None else form.format(value) for value in values)

    lines = [
        [label, *(found(suite, store, name, field, form) for store in _STORES)]
        for label, suite, name, field, form in _DURABLE_ROWS
    ]
    if all(cell == "– / –" for line in lines for cell in line[1:]):
        return
    yield "What is stored costs what the store costs. Beside the bare driver, in turns (plain functions / coroutines):"
    yield _table(["", "SQLite, full", "SQLite, normal", "PostgreSQL", "Redis"], lines, markdown=True)
    calls = found("durable", "group commit", "16 callers over one", "times", "{:.1f}")
    sagas = found("sagas", "many at once", "durable, 16 over one", "times", "{:.1f}")
    lite, post = (
        found("sagas", f"dbos, {place}", "one at a time", "times", "{:.1f}") for place in ("sqlite", "postgres")
    )
    yield (
        f"Sixteen callers at once on SQLite (full) share commits, for {calls} times the rate of one; sixteen durable "
        f"sagas for {sagas} times. The same three steps take DBOS {lite} times as long on SQLite, and "
        f"{post} times on PostgreSQL."
    )


def _closures(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _micro(value: float) -> str:
    return f"{value / 1e3:.2f} µs" if value < 9_995 else f"{value / 1e3:.0f} µs"


def _milli(value: float) -> str:
    return f"{value:.0f} ms"


def _kilo(value: float) -> str:
    return f"{value:,.0f}"


_README_COLUMNS: list[tuple[str, str, str, str, str, Callable[[float], str]]] = [
    ("retry", "calls", "sync", "retry", "closures", _closures),
    ("breaker", "calls", "sync", "breaker", "closures", _closures),
    ("bulkhead", "calls", "sync", "bulkhead", "closures", _closures),
    ("rate limit", "calls", "sync", "rate limit", "closures", _closures),
    ("three", "calls", "sync", "stack of three", "closures", _closures),
    ("five", "calls", "sync", "stack of five", "closures", _closures),
    ("async three", "calls", "async", "stack of three", "added_ns", _micro),
    ("async five", "calls", "async", "stack of five", "added_ns", _micro),
    ("one retry", "failure", "sync", "retry", "ns", _micro),
    ("refusal", "rejection", "sync", "breaker", "ns", _micro),
    ("bytes", "memory", "sync", "stack of three", "bytes", _kilo),
    ("import", "imports", "", "", "added_ms", _milli),
]

_CUT_OFF = ("pyresilience", "grit", "crashbytes")
"""Whose stack of five for plain functions has no deadline, but a timeout."""

_README_ROWS: list[tuple[str, tuple[str, ...]]] = [
    ("**resilient**", (OURS, f"{OURS} (deadline)")),
    (
        "by hand",
        (
            "by hand",
            "by hand (tokens)",
            "by hand (lock)",
            "by hand (one frame, tokens)",
            "by hand (one frame, tokens, deadline)",
            "by hand (one frame)",
            "by hand (one frame, asyncio.timeout)",
        ),
    ),
    (
        "tenacity + pybreaker (async: aiobreaker) + semaphore (+ aiolimiter)",
        (
            "tenacity + pybreaker + BoundedSemaphore",
            "tenacity + aiobreaker + Semaphore",
            "tenacity + aiobreaker + aiolimiter + Semaphore + asyncio.timeout",
        ),
    ),
    ("tenacity", ("tenacity",)),
    ("stamina", ("stamina",)),
    ("backoff", ("backoff",)),
    ("pybreaker", ("pybreaker",)),
    ("circuitbreaker", ("circuitbreaker",)),
    ("aiobreaker", ("aiobreaker",)),
    ("purgatory", ("purgatory",)),
    ("nopanic", ("nopanic", "nopanic (rate in time)", "nopanic (deadline)")),
    ("pyresilience", ("pyresilience",)),
    ("resilix", ("resilix",)),
    ("grit", ("grit",)),
    ("crashbytes", ("crashbytes",)),
    ("hyx", ("hyx",)),
]


def fill(path: Path, text: str) -> None:
    """Put `text` between the markers of a file; at its end if there are none yet."""
    old = path.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n"
    head, _, rest = old.partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")
