"""The ambient deadline: how much time everything that runs here and now has left.

Coroutines, generators and `with deadline()` carry it in a context variable, so that tasks and copied contexts inherit
it. A plain function's limit is carried by its thread, because setting a variable twice a call would double the price;
threads that the function starts itself do not see it. `remaining()` knows all of them. Safe from any thread and loop.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Protocol

from resilient.clock import Clock, SystemClock
from resilient.policy import SYSTEM
from resilient.policy import seconds as checked

__all__ = ["Ambient", "ambient", "deadline", "nearest", "of_system", "remaining", "thread"]

_INF = float("inf")
_monotonic = SystemClock.now

# A plain float is the cheapest thing to carry: an instant of the system's clock, or infinity. Policies put back what
# was there with `set`: `reset(token)` costs more and fails where a generator is closed in another context.
_until: ContextVar[float] = ContextVar("resilient.deadline", default=_INF)
# Instants of other clocks (of tests, mostly) mean nothing to the system's, so they travel apart, each with its clock.
_foreign: ContextVar[tuple[tuple[Clock, float], ...]] = ContextVar("resilient.deadline.foreign", default=())


class _Cell:
    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = _INF


class _Thread(threading.local):
    def __init__(self) -> None:
        self.cell = _Cell()


thread = _Thread()
"""`thread.cell.until`: the limit of the plain functions under way in this thread, by the system's clock."""


class Ambient(Protocol):
    """What carries the deadline by one clock: an instant, infinity for none."""

    def get(self) -> float: ...

    def set(self, until: float, /) -> object: ...


class _Foreign:
    """The deadline by a clock that is not the system's, with the face of a `ContextVar`."""

    __slots__ = ("clock",)

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def get(self) -> float:
        return next((until for clock, until in _foreign.get() if clock is self.clock), _INF)

    def set(self, until: float, /) -> None:
        others = tuple(pair for pair in _foreign.get() if pair[0] is not self.clock)
        _foreign.set(others if until == _INF else (*others, (self.clock, until)))


def of_system(clock: Clock) -> bool:
    """Whether `clock` tells the system's time."""
    return clock.now is _monotonic


def ambient(clock: Clock) -> Ambient:
    """What carries the deadline by `clock`."""
    return _until if of_system(clock) else _Foreign(clock)


def nearest(clock: Clock) -> float:
    """The instant of `clock` at which the ambient deadline is over, infinity for none."""
    return min(_until.get(), thread.cell.until) if of_system(clock) else _Foreign(clock).get()


def remaining() -> float | None:
    """The seconds left until the nearest ambient deadline, never below 0.0; None where there is none."""
    until = min(_until.get(), thread.cell.until)
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

    __slots__ = ("_clock", "_outer", "_seconds", "_variable")

    def __init__(self, seconds: float, *, clock: Clock | None = None) -> None:
        self._seconds = checked("seconds", seconds, zero=True)
        self._clock = SYSTEM.clock if clock is None else clock
        self._variable = ambient(self._clock)

    def __enter__(self) -> None:
        self._outer = self._variable.get()
        self._variable.set(min(self._outer, self._clock.now() + self._seconds))

    def __exit__(self, *exc: object) -> None:
        self._variable.set(self._outer)
