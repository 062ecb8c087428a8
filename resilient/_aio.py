"""All that is asked of an async library: a limit around an await, timers for many equal delays, a race.

Works under asyncio and trio, decided at each call. Cancellation keeps the semantics of `asyncio.timeout`: a cancel
from outside stays one, our own never leaks out, `task.cancelling()` ends as it began. Objects here belong to one
loop at a time except `Timers`, which keeps the loops of different threads apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from resilient._ambient import of_system
from resilient.clock import Clock, Timer, in_trio

if TYPE_CHECKING:
    import asyncio

__all__ = ["Queue", "Timers", "within"]


class Queue:
    """Calls that all wait equally long, in one loop: their ends come in the order of their beginnings.

    `pending[key] = (until, callback)` enters and `del pending[key]` leaves, in any order; one timer serves all. A key
    that is gone has been called back. With `tidy` the timer does not outlive the last of them: that costs a little,
    and keeps clocks of tests from jumping to an alarm that nobody needs.
    """

    __slots__ = ("_clock", "_timer", "armed", "home", "pending", "tidy")

    def __init__(self, clock: Clock, home: weakref.ref[Any]) -> None:
        self._clock = clock
        self._timer: Timer | None = None
        self.home = home
        self.tidy = not of_system(clock)
        self.armed = False
        self.pending: dict[Any, tuple[float, Callable[[], object]]] = {}

    def arm(self) -> None:
        """Set the timer for the first in line."""
        until, _ = next(iter(self.pending.values()))
        self.armed = True
        timer = self._clock.call_at(until, self._fire)
        # Kept only where it is needed: the handle holds the loop, and nothing here may keep a loop alive.
        if self.tidy:
            self._timer = timer

    def left(self, key: object) -> bool:
        """Leave, and tell whether `key` has been called back already."""
        fired = self.pending.pop(key, None) is None
        self.rest()
        return fired

    def rest(self) -> None:
        """Take the timer back if it is to be tidy and nobody waits."""
        if self._timer is not None and not self.pending:
            self._timer.cancel()
            self._timer, self.armed = None, False

    def _fire(self) -> None:
        now = self._clock.now()
        due: list[Any] = []
        for key, (until, _) in self.pending.items():
            if until > now:
                break
            due.append(key)
        for key in due:
            self.pending.pop(key)[1]()
        self.armed, self._timer = False, None
        if self.pending:
            self.arm()


class Timers:
    """One `Queue` for each running asyncio loop, for delays of one length by one clock."""

    __slots__ = ("clock", "queues")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        # By `id`, so that a look-up is one of the fastest there are; an entry goes when its loop goes.
        self.queues: dict[int, Queue] = {}

    def queue(self, loop: asyncio.AbstractEventLoop) -> Queue:
        """The queue of `loop`, made if there is none."""
        for key, queue in list(self.queues.items()):
            home = queue.home()
            if home is None or home.is_closed():
                self.queues.pop(key, None)
        key, queues = id(loop), self.queues
        queue = queues[key] = Queue(self.clock, weakref.ref(loop, lambda _: queues.pop(key, None)))
        return queue


async def within(
    clock: Clock, until: float, late: Callable[[], BaseException], call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Await `call(*args, **kwargs)` until the instant `until`; then cancel it, wait for its end, and raise `late()`.

    A call that swallows the cancellation and returns is heard: its value comes back.
    """
    if in_trio():
        return await _within_trio(clock, until, late, call, args, kwargs)
    return await _within_asyncio(clock, until, late, call, args, kwargs)


async def _within_asyncio(
    clock: Clock, until: float, late: Callable[[], BaseException], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    import asyncio

    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a time limit on a coroutine needs an asyncio task or trio")
    before = task.cancelling()
    fired = False

    def fire() -> None:
        nonlocal fired
        fired = True
        task.cancel()

    timer = clock.call_at(until, fire)
    try:
        value = await call(*args, **kwargs)
    except BaseException as error:
        if fired and task.uncancel() <= before and isinstance(error, asyncio.CancelledError):
            raise late() from error
        raise
    finally:
        timer.cancel()
    if fired:
        task.uncancel()
    return value


async def _within_trio(
    clock: Clock, until: float, late: Callable[[], BaseException], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    import trio

    left = until - clock.now()
    with trio.CancelScope() as scope:
        if of_system(clock):
            scope.deadline = trio.current_time() + left
            return await call(*args, **kwargs)
        timer = clock.call_at(until, scope.cancel)
        try:
            return await call(*args, **kwargs)
        finally:
            timer.cancel()
    raise late()
