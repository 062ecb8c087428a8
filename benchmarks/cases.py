"""What is measured: cases, and the options that all libraries are given alike.

A case is one library's guard for one purpose. `build(options)` makes a fresh guard and returns a decorator; it imports
its library late, so that a missing one is reported as such and stops nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["sync", "async"]
Function = Callable[..., Any]
Decorator = Callable[[Function], Function]
Build = Callable[["Options"], Decorator]

OURS = "resilient"
BY_HAND = "by hand"

GROUPS = (
    "reference",
    "retry",
    "breaker",
    "bulkhead",
    "rate limit",
    "deadline",
    "timeout",
    "fallback",
    "hedge",
    "stack of three",
    "stack of five",
)


@dataclass(frozen=True, slots=True)
class Options:
    """One set of settings for everybody: what a careful user would write, so that no library is given an easy day."""

    attempts: int = 3
    wait: float = 0.1
    """Seconds before the second attempt; growing and with jitter where a library can. 0: no wait at all."""
    failures: int = 5
    rate: float = 0.5
    """The share of failures that trips breakers that go by rates."""
    cooldown: float = 30.0
    limit: int = 16
    queue: int = 0
    """How many may wait for a slot. Above 0: they wait for a minute at most."""
    calls: float = 1e9
    per: float = 1.0
    seconds: float = 30.0
    after: float = 10.0
    """Seconds until a hedge starts another attempt."""
    default: object = None


@dataclass(frozen=True, slots=True)
class Case:
    """One guard of one library."""

    library: str
    group: str
    mode: Mode
    build: Build
    variant: str = ""

    @property
    def name(self) -> str:
        """The library and what is special about this guard of it."""
        return f"{self.library} ({self.variant})" if self.variant else self.library


def both(library: str, group: str, build: Build, variant: str = "") -> list[Case]:
    """The same guard for plain functions and for coroutines."""
    return [Case(library, group, "sync", build, variant), Case(library, group, "async", build, variant)]


def chain(*builds: Build) -> Build:
    """Several guards, outermost first."""

    def build(options: Options) -> Decorator:
        guards = [make(options) for make in reversed(builds)]

        def decorate(fn: Function) -> Function:
            for guard in guards:
                fn = guard(fn)
            return fn

        return decorate

    return build


def every_case() -> list[Case]:
    """All cases: references first, then ours, then the others."""
    from benchmarks import limits, ours, peers

    return [*limits.CASES, *ours.CASES, *peers.CASES]


def select(cases: Iterable[Case], mode: Mode, group: str) -> list[Case]:
    """The cases of one group."""
    return [case for case in cases if case.mode == mode and case.group == group]
