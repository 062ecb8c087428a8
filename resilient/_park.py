"""Slots that are handed over in the order of asking, whoever asks: threads, asyncio tasks and trio tasks together.

A `Park` is a stack of free slots and a queue of waiters. A slot that is freed while somebody waits goes to the one who
has waited longest; whoever leaves (cancelled, interrupted, out of time) hands on what was given to him at that moment.
Taking a free slot needs no lock (see `bulkhead.py`); the lock is held for a few steps and never while anybody waits, is
woken, or runs. Safe from any thread, asyncio loop and trio run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from threading import TIMEOUT_MAX, Lock, RLock, get_ident
from typing import TYPE_CHECKING, Protocol

from resilient.clock import in_trio

if TYPE_CHECKING:
    from resilient.clock import Clock

__all__ = ["LoopWaiter", "Park", "ThreadWaiter", "TrioWaiter", "task_waiter"]

# Why no slot and no wake-up is lost. One who leaves first puts his slot on the stack, then looks for waiters; one who
# arrives first joins the queue, then looks at the stack (`_wake` does both). If the leaver saw no waiter, the newcomer
# joined after the slot was there, and finds it himself; else the leaver wakes. This order is all that the path without
# a lock has to keep. Only `_wake` hands over, always to the front of the queue, and nobody takes a slot past a queue.
#
# Why an interrupt (a signal handler that raises, an asynchronous exception) loses nothing. CPython delivers one only
# at calls, backward jumps and function entry. So statements without a call stand or fall together, for instance
# `del tokens[-1]` and `granted = True`. A waiter stays in front, granted, until it is woken: a `_wake` that was cut
# short can simply be called again, and rings twice at worst.
#
# The lock is re-entrant because a finaliser that closes a generator, and with it gives back a slot, may run anywhere.


class Waiter(Protocol):
    """One who waits. `granted`: a slot is his."""

    granted: bool

    def notify(self) -> bool:
        """Wake it, from any thread, perhaps twice. False if it can never come back."""
        ...


class ThreadWaiter:
    """A waiting thread."""

    __slots__ = ("_bell", "granted")

    def __init__(self) -> None:
        self.granted = False
        self._bell = Lock()
        self._bell.acquire()

    def notify(self) -> bool:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # It has been rung.
        return True

    def park(self, clock: Clock, seconds: float | None) -> None:
        """Block this thread until notified, at most `seconds`."""
        clock.wait(partial(self._bell.acquire, True), None if seconds is None else min(seconds, TIMEOUT_MAX))


class LoopWaiter:
    """A waiting asyncio task."""

    __slots__ = ("_future", "_thread", "granted")

    def __init__(self) -> None:
        from asyncio import get_running_loop

        self.granted = False
        self._thread = get_ident()
        self._future = get_running_loop().create_future()

    def _ring(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def notify(self) -> bool:
        loop = self._future.get_loop()
        if get_ident() == self._thread and not loop.is_closed():
            self._ring()
            return True
        try:
            loop.call_soon_threadsafe(self._ring)
        except RuntimeError:
            return False  # The loop is closed.
        return True

    async def apark(self, clock: Clock, seconds: float | None) -> None:
        """Suspend this task until notified, at most `seconds`."""
        timer = None if seconds is None else clock.call_at(clock.now() + seconds, self._ring)
        try:
            await self._future
        finally:
            if timer is not None:
                timer.cancel()


class TrioWaiter:
    """A waiting trio task."""

    __slots__ = ("_event", "_thread", "_token", "granted")

    def __init__(self) -> None:
        import trio

        self.granted = False
        self._thread = get_ident()
        self._event = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def notify(self) -> bool:
        if get_ident() == self._thread and in_trio():
            self._event.set()
            return True
        try:
            self._token.run_sync_soon(self._event.set)
        except RuntimeError:
            return False  # The run is over.
        return True

    async def apark(self, clock: Clock, seconds: float | None) -> None:
        """Suspend this task until notified, at most `seconds`."""
        timer = None if seconds is None else clock.call_at(clock.now() + seconds, self._event.set)
        try:
            await self._event.wait()
        finally:
            if timer is not None:
                timer.cancel()


def task_waiter() -> LoopWaiter | TrioWaiter:
    """What stands for the running task."""
    return TrioWaiter() if in_trio() else LoopWaiter()


# Ordered, quick to leave from the middle, and it tells that it is empty without a call. This one stays empty: a park
# gets a queue of its own with its first waiter, since most never have one and an empty one weighs some 170 bytes.
_NOBODY: OrderedDict[Waiter, None] = OrderedDict()


class Park:
    """`limit` slots, and the queue for them. `_tokens` holds one entry for each free slot."""

    __slots__ = ("_tokens", "_waiters")

    # One lock for all: it is held for a few steps and only where somebody waits, and an own one weighs 96 bytes.
    _lock = RLock()

    def __init__(self, limit: int) -> None:
        self._tokens: list[None] = [None] * limit
        self._waiters: OrderedDict[Waiter, None] = _NOBODY

    def _acquire(self, queue: int, clock: Clock, seconds: float | None) -> bool | None:
        """Block this thread until a slot is its own: True. False after `seconds`, None if `queue` wait already."""
        return self._line_up(ThreadWaiter, queue, clock, seconds)

    async def _aacquire(self, queue: int, clock: Clock, seconds: float | None) -> bool | None:
        """Suspend this task until a slot is its own: True. False after `seconds`, None if `queue` wait already."""
        return await self._aline_up(task_waiter, queue, clock, seconds)

    def _line_up(
        self, make: Callable[[], ThreadWaiter], queue: int, clock: Clock, seconds: float | None
    ) -> bool | None:
        waiter = make()
        try:
            if not self._join(waiter, queue):
                return None
            self._wake()
            if not waiter.granted and seconds != 0:
                waiter.park(clock, seconds)
            self._part(waiter)
        except BaseException:
            self._leave(waiter)
            raise
        # No call from here until the caller is inside its own `try`: the slot cannot get lost on the way.
        return waiter.granted

    async def _aline_up(
        self, make: Callable[[], LoopWaiter | TrioWaiter], queue: int, clock: Clock, seconds: float | None
    ) -> bool | None:
        waiter = make()
        try:
            if not self._join(waiter, queue):
                return None
            self._wake()
            if not waiter.granted and seconds != 0:
                await waiter.apark(clock, seconds)
            self._part(waiter)
        except BaseException:
            self._leave(waiter)
            raise
        return waiter.granted

    def _wake(self) -> None:
        """Hand free slots to waiters, until either runs out. Call it after each slot that was given back."""
        while True:
            with self._lock:
                for waiter in self._waiters:
                    if not waiter.granted:
                        try:
                            del self._tokens[-1]
                        except IndexError:
                            return
                        waiter.granted = True
                    break
                else:
                    return
            if waiter.notify():
                self._part(waiter)
            else:
                # It can never come back; or another `_wake` rang it first, and it has come, worked, given its slot
                # back, and its loop has ended. Then it is no longer in the queue, and there is nothing to take back.
                with self._lock:
                    if waiter in self._waiters:
                        self._drop(waiter)

    @property
    def waiting(self) -> int:
        """How many wait, without those who have a slot and are being woken."""
        with self._lock:
            return sum(not waiter.granted for waiter in self._waiters)

    def _join(self, waiter: Waiter, queue: int) -> bool:
        with self._lock:
            if len(self._waiters) >= queue and self.waiting >= queue:
                return False
            if self._waiters is _NOBODY:
                self._waiters = OrderedDict()
            self._waiters[waiter] = None
            return True

    def _part(self, waiter: Waiter) -> None:
        with self._lock:
            self._waiters.pop(waiter, None)

    def _drop(self, waiter: Waiter) -> None:
        with self._lock:
            self._waiters.pop(waiter, None)
            if waiter.granted:
                waiter.granted = False
                self._tokens.append(None)

    def _leave(self, waiter: Waiter) -> None:
        self._drop(waiter)
        self._wake()
