"""Tools for the tests of those who use resilient: a clock that does as it is told, a sink that remembers, no waiting.

    clock = FakeClock()
    pipeline = Pipeline(Retry(ConnectionError), env=Env(clock=clock))

`FakeClock` serves threads, asyncio and trio. `Recorder` keeps events. `instant()` makes every wait of functions that
use the system's clock end at once, for the tests of a whole application. `store_contract` is the suite for those who
write a store.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from resilient.clock import SystemClock, in_trio
from resilient.events import Event
from resilient.policy import SYSTEM

if TYPE_CHECKING:
    from resilient._contract import Case

__all__ = ["FakeClock", "Recorder", "instant", "store_contract"]

E = TypeVar("E", bound=Event)


class _FakeTimer:
    """One callback of a `FakeClock`, and the loop that it must run in."""

    def __init__(self, callback: Callable[[], object], post: Callable[[Callable[[], object]], object]) -> None:
        self.callback, self.post, self.cancelled = callback, post, False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    """A clock that moves only when told, or when all there is left to do is to wait for it.

    `sleep` (in threads) jumps: it moves the clock and returns. `asleep` (in tasks) parks until `advance` reaches it;
    with `autojump` (the default) the clock jumps to the next timer as soon as every task of the loop waits. `slept`
    lists what was asked of both, in order. Safe from any thread; serves asyncio and trio.
    """

    def __init__(self, start: float = 0.0, *, epoch: float = 1_700_000_000.0, autojump: bool = True) -> None:
        self.slept: list[float] = []
        self.autojump = autojump
        self._now = float(start)
        self._epoch = epoch - start
        self._lock = threading.RLock()
        self._count = itertools.count()
        self._timers: list[tuple[float, int, _FakeTimer]] = []
        self._watched: set[object] = set()

    def now(self) -> float:
        """Monotonic seconds: `start` and what was advanced since."""
        return self._now

    def at(self) -> float:
        """Wall time: `epoch` and what was advanced since."""
        return self._epoch + self._now

    def advance(self, seconds: float) -> None:
        """Move the clock, and run what falls due on the way, each at its own instant."""
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, not {seconds!r}")
        self._advance_to(self._now + seconds)

    def sleep(self, seconds: float) -> None:
        """Jump `seconds` ahead."""
        if seconds > 0:
            self.slept.append(seconds)
            self.advance(seconds)

    async def asleep(self, seconds: float) -> None:
        """Wait until the clock has moved by `seconds`."""
        if seconds <= 0:
            return
        self.slept.append(seconds)
        if in_trio():
            import trio

            done = trio.Event()
            timer = self.call_at(self._now + seconds, done.set)
            try:
                await done.wait()
            finally:
                timer.cancel()
        else:
            import asyncio

            woken = asyncio.get_running_loop().create_future()
            timer = self.call_at(self._now + seconds, lambda: None if woken.done() else woken.set_result(None))
            try:
                await woken
            finally:
                timer.cancel()

    def wait(self, acquire: Callable[[float], bool], seconds: float | None) -> bool:
        """Block in `acquire` until it is true or the clock has moved by `seconds`.

        With `autojump` the clock jumps there when nothing has happened for a twentieth of a real second.
        """
        if seconds is None or seconds <= 0:
            return acquire(-1 if seconds is None else 0)
        until = self._now + seconds
        for patience in itertools.count():
            if acquire(0.001):
                return True
            if self.autojump and patience == 50:
                self._advance_to(until)
            if self._now >= until:
                return acquire(0)
        raise AssertionError("unreachable")

    def call_at(self, until: float, callback: Callable[[], object]) -> _FakeTimer:
        """Run `callback` in the running loop once the clock reaches `until`."""
        timer = self._trio_timer(callback) if in_trio() else self._asyncio_timer(callback)
        with self._lock:
            heapq.heappush(self._timers, (until, next(self._count), timer))
        return timer

    def _advance_to(self, instant: float) -> None:
        while True:
            with self._lock:
                while self._timers and self._timers[0][2].cancelled:
                    heapq.heappop(self._timers)
                if not self._timers or self._timers[0][0] > instant:
                    self._now = max(self._now, instant)
                    return
                due, _, timer = heapq.heappop(self._timers)
                self._now = max(self._now, due)
            timer.post(timer.callback)

    def _jump(self) -> bool:
        """Go to the next timer, if there is one."""
        with self._lock:
            live = [due for due, _, timer in self._timers if not timer.cancelled]
        if live:
            self._advance_to(min(live))
        return bool(live)

    def _asyncio_timer(self, callback: Callable[[], object]) -> _FakeTimer:
        import asyncio

        loop = asyncio.get_running_loop()
        home = threading.get_ident()

        def post(callback: Callable[[], object]) -> None:
            if loop.is_closed():
                return
            if threading.get_ident() == home:
                callback()
            else:
                loop.call_soon_threadsafe(callback)

        idle = 0

        def look() -> None:
            # Three rounds with nothing ready but the looks of other clocks: the loop has polled for I/O in between, so
            # every task waits.
            nonlocal idle
            idle = 0 if len(getattr(loop, "_ready", ())) >= _looks[loop] else idle + 1
            if idle >= 3:
                idle = 0
                if not self._jump():
                    self._watched.discard(loop)
                    _looks[loop] -= 1
                    return
            loop.call_soon(look)

        if self.autojump and loop not in self._watched:
            self._watched.add(loop)
            _looks[loop] = _looks.get(loop, 0) + 1
            loop.call_soon(look)
        return _FakeTimer(callback, post)

    def _trio_timer(self, callback: Callable[[], object]) -> _FakeTimer:
        import trio

        token = trio.lowlevel.current_trio_token()
        home = threading.get_ident()

        def post(callback: Callable[[], object]) -> None:
            if threading.get_ident() == home:
                callback()
            else:
                try:
                    token.run_sync_soon(callback)
                except trio.RunFinishedError:
                    pass

        async def look() -> None:
            try:
                await trio.testing.wait_all_tasks_blocked()
                while self._jump():
                    await trio.testing.wait_all_tasks_blocked()
            finally:
                self._watched.discard(token)

        if self.autojump and token not in self._watched:
            import trio.testing

            self._watched.add(token)
            trio.lowlevel.spawn_system_task(look)
        return _FakeTimer(callback, post)


_looks: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
"""How many clocks look for idleness in each asyncio loop."""


class Recorder:
    """A sink that keeps every event, in order.

    With `calls=True` it also asks for a `CallEnded` for each call of the functions decorated from then on.
    """

    def __init__(self, *, calls: bool = False) -> None:
        self.events: list[Event] = []
        self.wants_calls = calls

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[E]) -> list[E]:
        """The events of one class."""
        return [event for event in self.events if isinstance(event, kind)]

    def clear(self) -> None:
        """Forget them all."""
        self.events.clear()


_instant = threading.Lock()
_users = 0


@contextmanager
def instant() -> Generator[None, None, None]:
    """End every sleep of functions bound to the system's environment at once, in all threads, until the block ends.

    Waits for a slot of a bulkhead are not sleeps: they end when a slot is free. May be nested.
    """
    global _users
    clock = SYSTEM.clock
    assert isinstance(clock, SystemClock)
    with _instant:
        _users += 1
        clock.instant = True
    try:
        yield
    finally:
        with _instant:
            _users -= 1
            clock.instant = _users > 0


def store_contract(
    make_store: Callable[[], Any] | None = None,
    *,
    sync: bool = True,
    asyncio: bool = True,
    trio: bool = False,
    journal: bool = True,
    advance: Callable[[float], object] | None = None,
    patience: float = 10.0,
) -> list[Case]:
    """The cases that every store must pass: all that `resilient.stores` promises, each in a world that it serves.

        @pytest.mark.parametrize("case", store_contract(MyStore), ids=str)
        def test_my_store_keeps_the_contract(case):
            case()

    A case is called, and raises `AssertionError` that says which sentence is broken and what the store answered. It
    works without pytest as well.

    Args:
        make_store: Returns a fresh, empty store; called once a case, and closed by `aclose` (from tasks) or `close`,
            where it has them. Without it, give one to each case: `case(make_store)`, for instance out of a fixture.
        sync: Run the cases through `execute`, by threads. False for a store that has none.
        asyncio: Run them through `aexecute`, by asyncio tasks.
        trio: Run them through `aexecute`, by trio tasks.
        journal: Ask for what sagas need besides: `Begin`, `Append`, `History`, and `Scan` by state. False for a store
            that is for idempotency keys alone.
        advance: For a store whose clock is told: moves it by so many seconds. Otherwise leases are made short, and the
            store is asked again until they are over.
        patience: Real seconds to wait for what must happen soon, before it counts as broken.
    """
    from resilient._contract import cases

    return cases(make_store, sync=sync, asyncio=asyncio, trio=trio, journal=journal, advance=advance, patience=patience)
