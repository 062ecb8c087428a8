"""Waiting for a key: whoever watches is rung when the key's record changes hands or ends.

`Bells` is the switchboard that every store of ours uses: threads, asyncio tasks and trio tasks watch, and `ring(key)`
wakes them from any thread. A ring may be lost (a connection was), so nobody relies on one alone: each wait has an end,
and each wake is only a reason to ask again. Safe from any thread and loop.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

from resilient._park import LoopWaiter, ThreadWaiter, TrioWaiter, task_waiter

if TYPE_CHECKING:
    from resilient.clock import Clock

__all__ = ["Bells", "Watch"]


class Watch(Protocol):
    """One who watches a key. Rung or not, each wait ends; then it is armed again at once."""

    def park(self, clock: Clock, seconds: float) -> None:
        """Block this thread until the key rings, at most `seconds`."""
        ...

    async def apark(self, clock: Clock, seconds: float) -> None:
        """Suspend this task until the key rings, at most `seconds`."""
        ...

    def close(self) -> None:
        """Watch no longer."""
        ...


class Bells:
    """Who watches which key."""

    __slots__ = ("__weakref__", "_lock", "_watches")

    def __init__(self) -> None:
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, set[_Armed]] = {}

    def watch(self, key: str, *, task: bool) -> Watch:
        """Watch `key`, from now on, as a thread or as a task. Ask for the state of the key after this, not before."""
        return _Armed(self, key, task)

    def ring(self, key: str) -> None:
        """Wake all who watch `key`."""
        if key in self._watches:  # without the lock: who arms later asks later
            with self._lock:
                rung = list(self._watches.get(key, ()))
            for watch in rung:
                watch.waiter.notify()

    def ring_all(self) -> None:
        """Wake everybody: rings may have been lost."""
        for key in list(self._watches):
            self.ring(key)

    def __bool__(self) -> bool:
        return bool(self._watches)


_all: weakref.WeakSet[Bells] = weakref.WeakSet()


def _forked() -> None:
    # Another thread may have held a lock, and those who wait are the parent's.
    for bells in list(_all):
        bells._begin()


# (Where there is no fork, there is nothing to do.)
getattr(os, "register_at_fork", dict)(after_in_child=_forked)


class _Armed:
    """A `Watch`, with a waiter that is good for one ring."""

    __slots__ = ("_bells", "_key", "_task", "waiter")

    waiter: ThreadWaiter | LoopWaiter | TrioWaiter

    def __init__(self, bells: Bells, key: str, task: bool) -> None:
        self._bells, self._key, self._task = bells, key, task
        self._arm()
        with bells._lock:
            bells._watches.setdefault(key, set()).add(self)

    def _arm(self) -> None:
        self.waiter = task_waiter() if self._task else ThreadWaiter()

    def park(self, clock: Clock, seconds: float) -> None:
        waiter = self.waiter
        assert isinstance(waiter, ThreadWaiter)
        waiter.park(clock, seconds)
        self._arm()

    async def apark(self, clock: Clock, seconds: float) -> None:
        waiter = self.waiter
        assert not isinstance(waiter, ThreadWaiter)
        await waiter.apark(clock, seconds)
        self._arm()

    def close(self) -> None:
        with self._bells._lock:
            watches = self._bells._watches.get(self._key)
            if watches is not None:
                watches.discard(self)
                if not watches:
                    del self._bells._watches[self._key]
