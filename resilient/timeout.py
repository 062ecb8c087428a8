"""Limits of time, and the ambient deadline that everything inside a limit obeys.

`deadline(seconds)` bounds a block, `remaining()` tells how much of it is left, here or in any function called from
here: policies inside never sleep or wait past it. It is carried by a context variable, so that threads and tasks have
their own. Reading costs one clock call. Safe from any thread, asyncio loop and trio run.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from resilient.clock import Clock, SystemClock
from resilient.policy import seconds as checked_seconds

__all__ = ["deadline", "remaining"]

_INF = float("inf")
_monotonic = SystemClock.now

# A plain float is the cheapest thing to carry: an instant of the system's clock, or infinity.
_until: ContextVar[float] = ContextVar("resilient.deadline", default=_INF)
# Instants of other clocks (of tests, mostly) mean nothing to the system's, so they travel apart, each with its clock.
_foreign: ContextVar[tuple[tuple[Clock, float], ...]] = ContextVar("resilient.deadline.foreign", default=())


class _Foreign:
    """The ambient deadline by a clock that is not the system's, with the face of a `ContextVar`."""

    __slots__ = ("clock",)

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def get(self) -> float:
        for clock, until in _foreign.get():
            if clock is self.clock:
                return until
        return _INF

    def set(self, until: float) -> None:
        others = tuple(pair for pair in _foreign.get() if pair[0] is not self.clock)
        _foreign.set(others if until == _INF else (*others, (self.clock, until)))


def ambient(clock: Clock) -> ContextVar[float] | _Foreign:
    """What carries the deadline by `clock`: `get()` and `set(until)`, infinity for none."""
    return _until if clock.now is _monotonic else _Foreign(clock)


def remaining() -> float | None:
    """The seconds left until the nearest ambient deadline, never below 0.0; None where there is none."""
    until = _until.get()
    left = until if until == _INF else until - _monotonic()
    for clock, other in _foreign.get():
        left = min(left, other - clock.now())
    return None if left == _INF else max(0.0, left)


class deadline:  # noqa: N801 - read as a statement: `with deadline(2.0):`
    """Give the block `seconds` (0 or more) from its entry: `remaining()` and every policy inside obey.

    It cuts nothing off by itself (`Timeout` does). A deadline inside another can only be earlier. One plain `with`
    serves threads, asyncio and trio; tasks and copies of the context made inside inherit it. `clock` is the clock of
    the `Env` where that is not the system's. Each object is for one block at a time.

    >>> from resilient import deadline, remaining
    >>> with deadline(5.0), deadline(60.0):
    ...     4.0 < remaining() <= 5.0
    True
    """

    __slots__ = ("_now", "_outer", "_seconds", "_variable")

    def __init__(self, seconds: float, *, clock: Clock | None = None) -> None:
        self._seconds = checked_seconds("seconds", seconds, zero=True)
        self._now = _monotonic if clock is None else clock.now
        self._variable: Any = _until if clock is None else ambient(clock)

    def __enter__(self) -> None:
        self._outer: float = self._variable.get()
        self._variable.set(min(self._outer, self._now() + self._seconds))

    def __exit__(self, *exc: object) -> None:
        self._variable.set(self._outer)
