"""The ambient deadline: how much time everything that runs here and now has left.

It is a context variable: tasks inherit it, and threads that run in a copy of the context do. Safe from any thread
and loop.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from resilient.clock import Clock, SystemClock
from resilient.policy import SYSTEM
from resilient.policy import seconds as checked

__all__ = ["Ambient", "ambient", "deadline", "nearest", "of_system", "remaining", "restore", "system", "unlimited"]

_INF = float("inf")
_monotonic = SystemClock.now

# A plain float is the cheapest thing to carry: an instant of the system's clock, or infinity. Policies that may end in
# another context than they began in (generators, coroutines) put back what was there with `set`, not `reset(token)`.
_until: ContextVar[float] = ContextVar("resilient.deadline", default=_INF)
# Instants of other clocks (of tests, mostly) mean nothing to the system's, so they travel apart, each with its clock.
_foreign: ContextVar[tuple[tuple[Clock, float], ...]] = ContextVar("resilient.deadline.foreign", default=())


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


system = _until
"""What carries the deadline by the system's clock."""


def restore(variable: Ambient, until: float, outer: float) -> None:
    """Put `outer` back in place of `until`, unless something else is there.

    A suspended call may be closed in another context, by the garbage collector too: the deadline there is not its own.
    (Setting it there could even crash CPython 3.11, where the collector may run inside `ContextVar.set`.)
    """
    if variable.get() == until:
        variable.set(outer)


def of_system(clock: Clock) -> bool:
    """Whether `clock` tells the system's time."""
    return clock.now is _monotonic


def ambient(clock: Clock) -> Ambient:
    """What carries the deadline by `clock`."""
    return _until if of_system(clock) else _Foreign(clock)


def nearest(clock: Clock) -> float:
    """The instant of `clock` at which the ambient deadline is over, infinity for none."""
    return ambient(clock).get()


def remaining() -> float | None:
    """The seconds left until the nearest ambient deadline, never below 0.0; None where there is none."""
    until = _until.get()
    left = until if until == _INF else until - _monotonic()
    for clock, other in _foreign.get():
        left = min(left, other - clock.now())
    return None if left == _INF else max(0.0, left)


@contextmanager
def unlimited() -> Generator[None, None, None]:
    """No deadline inside of the block: for what has to be done however late it is."""
    outer, others = _until.get(), _foreign.get()
    _until.set(_INF)
    _foreign.set(())
    try:
        yield
    finally:
        _until.set(outer)
        _foreign.set(others)


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

    __slots__ = ("_clock", "_outer", "_seconds", "_until", "_variable")

    def __init__(self, seconds: float, *, clock: Clock | None = None) -> None:
        self._seconds = checked("seconds", seconds, zero=True)
        self._clock = SYSTEM.clock if clock is None else clock
        self._variable = ambient(self._clock)

    def __enter__(self) -> None:
        self._outer = self._variable.get()
        self._until = min(self._outer, self._clock.now() + self._seconds)
        self._variable.set(self._until)

    def __exit__(self, *exc: object) -> None:
        restore(self._variable, self._until, self._outer)
