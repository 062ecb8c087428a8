"""Heartbeats: leases of calls that take long are renewed, every third of their length.

A call that ends before its first heartbeat pays an entry in a dictionary and its removal: one thread of a process
serves all plain calls of a policy, one timer of an event loop all its coroutines. A heartbeat that is under way when
the call ends is waited for, so that nothing is written after the last word. Safe from any thread and loop.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from resilient._aio import Queue
from resilient._park import ThreadWaiter, task_waiter
from resilient.clock import SystemClock, in_trio
from resilient.errors import StoreError
from resilient.stores._ops import Renew

if TYPE_CHECKING:
    from resilient.clock import Clock

__all__ = ["Beat", "TaskKeeper", "ThreadKeeper", "new_owner"]

_SYSTEM = SystemClock()

# Random for each process, counted within it: no other claim's owner has the same.
_process = ""
_numbers = itertools.count(1)


def _new_process() -> None:
    global _process
    _process = os.urandom(16).hex()


_new_process()
getattr(os, "register_at_fork", dict)(after_in_child=_new_process)


def new_owner() -> str:
    """A name for the owner of one claim."""
    return f"{_process}.{next(_numbers)}"


class Beat(Struct, eq=False):
    """One claim under heartbeat, until it is `over`. `lost` once the store has said that it is somebody else's."""

    key: str
    stored: str
    owner: str = field(default_factory=new_owner)
    fence: int = 0
    attempt: int = 0
    lost: bool = False
    over: bool = False
    _renewing: bool = False
    _waiter: Any = None

    def _done(self) -> bool:
        """A heartbeat has ended. Whether there is to be another."""
        self._renewing = False
        if self._waiter is not None:
            self._waiter.notify()
        return not (self.over or self.lost)

    def settle(self) -> None:
        """Block until no heartbeat is under way."""
        self._waiter = waiter = ThreadWaiter()
        if self._renewing:
            waiter.park(_SYSTEM, None)

    async def asettle(self) -> None:
        """Suspend until no heartbeat is under way. A cancel is raised after that; what hangs is left behind."""
        from resilient._aio import GRACE, shielded

        self._waiter = waiter = task_waiter()
        if not self._renewing:
            return
        try:
            await waiter.apark(_SYSTEM, GRACE)
        except GeneratorExit:
            raise
        except BaseException:
            self._waiter = waiter = task_waiter()
            if self._renewing:
                try:
                    await shielded(waiter.apark, _SYSTEM, None)
                except TimeoutError:
                    pass  # It hangs; whatever it still writes is refused by the fence.
            raise


class ThreadKeeper:
    """The heartbeats of plain functions, in one thread that exists while there is something to renew."""

    # The thread wakes at least once a period, also when nothing is due: so an entry is never late, and making one need
    # not wake anybody. After a period without any entry it ends.

    __slots__ = ("__weakref__", "_lease", "_lock", "_lost", "_period", "_running", "_store", "_used", "pending")

    def __init__(self, store: Any, lease: float, lost: Callable[[Any], object]) -> None:
        self._store, self._lease, self._lost = store, lease, lost
        self._period = lease / 3
        self._lock = threading.Lock()
        self._running = self._used = False
        self.pending: dict[Any, float] = {}
        _keepers.add(self)

    def begin(self, beat: Beat) -> None:
        """Renew the lease of `beat` from now on."""
        self.pending[beat] = _SYSTEM.now() + self._period
        self._used = True
        if not self._running:
            self._start()

    def end(self, beat: Beat) -> bool:
        """Renew it no longer. True if a heartbeat is just under way, which is to be waited for."""
        beat.over = True
        return self.pending.pop(beat, None) is None and beat._renewing

    def _start(self) -> None:
        with self._lock:
            if not self._running:
                self._running = True
                try:
                    threading.Thread(target=self._run, name="resilient-heartbeat", daemon=True).start()
                except BaseException:
                    self._running = False  # The next call is to try again.
                    raise

    def _run(self) -> None:
        never = threading.Lock()
        never.acquire()
        while True:
            first = next(iter(list(self.pending.values())), None)
            now = _SYSTEM.now()
            self._used = first is not None
            _SYSTEM.wait(lambda limit: never.acquire(timeout=limit), self._period if first is None else first - now)
            for beat, until in list(self.pending.items()):
                if until > _SYSTEM.now():
                    break
                self._renew(beat)
            if not self.pending and not self._used:
                self._running = False
                # Who came in this very moment saw a thread that runs.
                if not self.pending:
                    return
                with self._lock:
                    if self._running:
                        return
                    self._running = True

    def _renew(self, beat: Beat) -> None:
        beat._renewing = True
        # (Over and still there: its end was interrupted by a signal.)
        if self.pending.pop(beat, None) is None or beat.over:
            beat._done()
            return
        try:
            if not self._store.execute(Renew(beat.stored, beat.owner, beat.fence, self._lease)):
                beat.lost = True
        except StoreError:
            pass  # The lease is three periods long: there is another chance.
        except Exception:
            _complain()
        if beat.lost:
            self._lost(beat)
        # In this order: who ends after this looks at `pending` first.
        if not beat.over and not beat.lost:
            self.pending[beat] = _SYSTEM.now() + self._period
            if beat.over:
                self.pending.pop(beat, None)
        beat._done()


class TaskKeeper:
    """The heartbeats of coroutines: one timer for each event loop, under asyncio and trio."""

    __slots__ = ("__weakref__", "_clock", "_lease", "_lost", "_period", "_queues", "_store", "_tasks")

    def __init__(self, store: Any, lease: float, lost: Callable[[Any], object], clock: Clock) -> None:
        self._store, self._lease, self._lost, self._clock = store, lease, lost, clock
        self._period = lease / 3
        self._queues: dict[int, Queue] = {}
        self._tasks: set[Any] = set()

    def begin(self, beat: Beat) -> None:
        """Renew the lease of `beat` from now on."""
        queue = self._queue()
        queue.pending[beat] = (self._clock.now() + self._period, beat)
        if not queue.armed:
            queue.arm()

    def end(self, beat: Beat) -> bool:
        """Renew it no longer. True if a heartbeat is just under way, which is to be waited for."""
        beat.over = True
        for queue in self._queues.values():
            if queue.pending.pop(beat, None) is not None:
                queue.rest()
                break
        return beat._renewing

    def _queue(self) -> Queue:
        home: Any
        if in_trio():
            import trio

            home = trio.lowlevel.current_trio_token()
        else:
            import asyncio

            home = asyncio.get_running_loop()
        queue = self._queues.get(id(home))
        if queue is None or queue.home() is not home:
            key, queues = id(home), self._queues
            queue = Queue(self._clock, self._strike, weakref.ref(home, lambda _: queues.pop(key, None)))
            queues[key] = queue
        return queue

    def _strike(self, beat: Beat) -> None:
        """In the loop of the call: a heartbeat is due."""
        if beat.over:
            return  # Its end was interrupted by a signal.
        beat._renewing = True
        if in_trio():
            import trio

            trio.lowlevel.spawn_system_task(self._renew, beat)
        else:
            import asyncio

            task = asyncio.get_running_loop().create_task(self._renew(beat))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _renew(self, beat: Beat) -> None:
        try:
            if not await self._store.aexecute(Renew(beat.stored, beat.owner, beat.fence, self._lease)):
                beat.lost = True
        except StoreError:
            pass  # The lease is three periods long: there is another chance.
        except Exception:
            _complain()
        finally:
            again = beat._done()
        if again:
            self.begin(beat)
        elif beat.lost:
            self._lost(beat)


def _complain() -> None:
    import logging

    logging.getLogger("resilient").exception("a store raised something other than StoreError at a heartbeat")


_keepers: weakref.WeakSet[ThreadKeeper] = weakref.WeakSet()


def _forked() -> None:
    # Threads do not live on in a forked child, nor do its parent's calls.
    for keeper in list(_keepers):
        keeper._lock = threading.Lock()
        keeper._running = False
        keeper.pending.clear()


# (Where there is no fork, there is nothing to do.)
getattr(os, "register_at_fork", dict)(after_in_child=_forked)
