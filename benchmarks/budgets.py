"""What guarding may cost. A budget that is missed fails the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.cases import OURS
from benchmarks.durable import RANDOM
from benchmarks.figures import Figures
from benchmarks.sagas import IN_PROCESS, KINDS, MANY, ON_DBOS, ORPHANS, RECOVERIES, RECOVERY


@dataclass(frozen=True, slots=True)
class Budget:
    """A bound on one figure of one candidate."""

    says: str
    suite: str
    mode: str
    group: str
    name: str
    field: str
    bound: float
    unit: str
    side: Literal["at most", "below", "at least"] = "at most"
    reference: tuple[str, str, float] | None = None
    """For bounds in absolute time: group and name of a plain operation of the same kind in the same run, and what it
    took on the machine for which the bound was set. Where it takes longer, the bound grows in proportion, to its
    double at most: what a machine slower than that measures says nothing about nanoseconds."""

    @property
    def job(self) -> tuple[str, str, str]:
        """The job that measures it."""
        if self.suite in ("calls", "durable", "sagas"):
            return self.suite, self.mode, self.group
        return self.suite, self.mode if self.suite in ("failure", "rejection", "memory") else "", ""

    def value(self, figures: Figures) -> float | None:
        """What was measured, or None where nothing was."""
        row = figures.find(self.suite, self.mode, self.group, self.name)
        value = None if row is None else row.get(self.field)
        return None if value is None else float(value)

    def why_not(self, figures: Figures) -> str:
        """Why nothing was measured."""
        row = figures.find(self.suite, self.mode, self.group, self.name)
        return "was not run" if row is None else str(row.get("error", "gave no figure"))

    def slowness(self, figures: Figures) -> float:
        """How much slower than the bound supposes this machine does the operation of reference; from 1 to 2."""
        if self.reference is None:
            return 1.0
        group, name, took = self.reference
        row = figures.find(self.suite, self.mode, group, name)
        now = None if row is None else next((row[field] for field in ("ns", "ms", "us") if field in row), None)
        return 1.0 if now is None else min(2.0, max(1.0, float(now) / took))

    def kept(self, figures: Figures, *, strict: bool = False) -> bool:
        """Whether the figure is there and within the bound."""
        value = self.value(figures)
        if value is None:
            return False
        if self.side == "at least":
            return value >= self.bound
        bound = self.bound if strict else self.bound * self.slowness(figures)
        return value <= bound if self.side == "at most" else value < bound

    def limit(self, figures: Figures, *, strict: bool = False) -> str:
        """The bound, in words."""
        words = f"{self.side} {self.bound:g} {self.unit}"
        slowness = 1.0 if strict else self.slowness(figures)
        return words if slowness == 1.0 else f"{words} (here {self.bound * slowness:,.4g})"


def _calls(says: str, group: str, bound: float, name: str = OURS) -> Budget:
    return Budget(says, "calls", "sync", group, name, "closures", bound, "closure calls")


def _durable() -> Iterator[Budget]:
    for mode in ("sync", "async"):
        words = "plain" if mode == "sync" else "coroutine"
        for backend in ("redis", "postgres", "sqlite full", "sqlite normal"):
            bound = 1.5 if backend == "sqlite normal" else 1.25
            for crowded in (1, 16, 64):
                name = f"first call, {crowded} in flight"
                yield Budget(f"{backend}, {words}: {name}", "durable", mode, backend, name, "ratio", bound, "x raw")
            name = "replay over a claim, 1 in flight" if backend.startswith("sqlite") else "replay, 1 in flight"
            yield Budget(f"{backend}, {words}: {name}", "durable", mode, backend, name, "ratio", 1.25, "x raw")
        says = f"idempotent, {words}: library's share of a first call"
        reference = ("library", RANDOM, 0.41)
        yield Budget(says, "durable", mode, "library", "first call", "us", 15.0, "µs", reference=reference)
        says = f"16 callers over one, SQLite full, {words}"
        yield Budget(says, "durable", mode, "group commit", "16 callers over one", "times", 3.0, "times", "at least")
    says = "idempotent, memory store, plain"
    reference = ("memory", RANDOM, 0.41)
    yield Budget(says, "durable", "sync", "memory", "first call", "us", 6.0, "µs", reference=reference)


def _sagas() -> Iterator[Budget]:
    for mode in ("sync", "async"):
        words = "plain" if mode == "sync" else "coroutine"
        says = f"saga in process, {words}: over the bare calls"
        reference = (IN_PROCESS, RANDOM, 0.41)
        yield Budget(says, "sagas", mode, IN_PROCESS, "three steps", "added_us", 5.0, "µs", reference=reference)
        for kind in KINDS:
            for backend in ("sqlite full", "sqlite normal", "postgres"):
                says = f"saga ({kind}), {backend}, {words}"
                # A durable saga looks whether there is one with its id, which the floor of bare commits does not.
                least = 60.0 if (kind, backend) == ("durable", "sqlite normal") else 70.0
                yield Budget(says, "sagas", mode, backend, kind, "share", least, "% of the raw rate", "at least")
            says, name = f"sagas ({kind}), 16 over one, SQLite full, {words}", f"{kind}, 16 over one"
            yield Budget(says, "sagas", mode, MANY, name, "times", 3.0, "times", "at least")
        for group in ON_DBOS:
            says = f"saga beside {group.replace('dbos', 'DBOS')}, {words}"
            yield Budget(says, "sagas", mode, group, "one at a time", "times", 8.0, "x DBOS", "at least")
    for durability in RECOVERIES:
        name = f"{ORPHANS:,} orphans, {durability}"
        yield Budget(f"{name}: recovered", "sagas", "sync", RECOVERY, name, "seconds", 60.0, "s")
        yield Budget(f"{name}: last tenth over first", "sagas", "sync", RECOVERY, name, "slower", 1.25, "times")


BUDGETS = (
    *_durable(),
    *_sagas(),
    _calls("retry", "retry", 1.5),
    _calls("breaker, by rate", "breaker", 2.0),
    _calls("breaker, consecutive", "breaker", 2.0, f"{OURS} (consecutive)"),
    _calls("bulkhead", "bulkhead", 2.0),
    _calls("rate limiter", "rate limit", 4.0),
    _calls("fallback", "fallback", 1.5),
    _calls("deadline of a plain function", "deadline", 3.0),
    _calls("stack of three, plain", "stack of three", 5.0),
    _calls("stack of five, plain", "stack of five", 10.0, f"{OURS} (deadline)"),
    Budget(
        "stack of five, coroutine, with a real timeout",
        "calls",
        "async",
        "stack of five",
        OURS,
        "timeouts",
        1.0,
        "bare asyncio.timeout()",
        "below",
    ),
    Budget(
        "retry after one failure",
        "failure",
        "sync",
        "retry",
        OURS,
        "ns",
        3000.0,
        "ns",
        reference=("reference", "try again", 451.0),
    ),
    Budget(
        "refusal by an open breaker",
        "rejection",
        "sync",
        "breaker",
        OURS,
        "ns",
        600.0,
        "ns",
        reference=("reference", "raise", 189.0),
    ),
    Budget("memory of a stack of three", "memory", "sync", "stack of three", OURS, "bytes", 2048.0, "bytes"),
    # Eight, less what a shared machine takes away from the sleeps themselves.
    Budget(
        "8 threads in a sleep of 1 ms, stack of three",
        "threads",
        "sync",
        "stack of three",
        OURS,
        "speedup",
        7.5,
        "times one thread",
        "at least",
    ),
    Budget(
        "import resilient",
        "imports",
        "",
        "",
        OURS,
        "added_ms",
        10.0,
        "ms over bare Python",
        reference=("", "bare python", 9.7),
    ),
)
