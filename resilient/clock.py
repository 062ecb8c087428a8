"""Time and chance: the only module that imports `time` or `random`.

A `Clock` tells the time and waits. Policies read time only through the clock of their `Env`, so that a test can
replace it (`resilient.testing.FakeClock`). Monotonic seconds everywhere; `at` alone is wall time, for records that
people and other machines read. `SystemClock` is safe from any thread, asyncio loop and trio run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from threading import TIMEOUT_MAX
from typing import Protocol, runtime_checkable

__all__ = ["Clock", "Rng", "SystemClock", "Timer", "in_trio", "system_rng"]


class Timer(Protocol):
    """A callback that is yet to run; `cancel` forgets it."""

    def cancel(self) -> object:
        """Forget the callback; after it has run, nothing."""
        ...


class Rng(Protocol):
    """The part of `random.Random` that resilient uses."""

    def random(self) -> float:
        """A number from 0.0 up to, but not including, 1.0."""
        ...


@runtime_checkable
class Clock(Protocol):
    """Time as a policy sees it. Implement all five to replace it."""

    def now(self) -> float:
        """Monotonic seconds since an arbitrary instant."""
        ...

    def at(self) -> float:
        """Wall time: seconds since the epoch."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block this thread for `seconds`."""
        ...

    async def asleep(self, seconds: float) -> None:
        """Suspend this task for `seconds`, under asyncio or trio."""
        ...

    def wait(self, acquire: Callable[[float], bool], seconds: float | None) -> bool:
        """Block this thread in `acquire(timeout)` until it is true, or for `seconds` (None: without end)."""
        ...

    def call_at(self, until: float, callback: Callable[[], object]) -> Timer:
        """Run `callback` in the running asyncio loop or trio run at the monotonic instant `until`."""
        ...


def in_trio() -> bool:
    """Whether the caller runs inside trio. Costs a dictionary look-up for programs that never import trio."""
    trio = sys.modules.get("trio")
    if trio is None:
        return False
    in_task: bool = trio.lowlevel.in_trio_task()
    return in_task


class SystemClock:
    """The machine's own clock. `instant` (see `resilient.testing.instant`) makes sleeps return at once."""

    now = staticmethod(time.monotonic)
    at = staticmethod(time.time)

    def __init__(self) -> None:
        self.instant = False

    def sleep(self, seconds: float) -> None:
        """Block this thread for `seconds`; zero, or less, costs nothing."""
        if seconds > 0 and not self.instant:
            time.sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        """Suspend this task for `seconds`; zero, or less, does not even yield to others."""
        if seconds <= 0:
            return
        if self.instant:
            seconds = 0
        if in_trio():
            import trio

            await trio.sleep(seconds)
        else:
            import asyncio

            await asyncio.sleep(seconds)

    def wait(self, acquire: Callable[[float], bool], seconds: float | None) -> bool:
        """Block this thread in `acquire(timeout)`: -1 stands for no end, as in `threading.Lock.acquire`."""
        return acquire(-1 if seconds is None else min(max(0.0, seconds), TIMEOUT_MAX))

    def call_at(self, until: float, callback: Callable[[], object]) -> Timer:
        """Run `callback` in the running loop at the monotonic instant `until`."""
        if in_trio():
            return _TrioTimer(until - time.monotonic(), callback)
        import asyncio

        loop = asyncio.get_running_loop()
        return loop.call_at(loop.time() + (until - time.monotonic()), callback)


class _TrioTimer:
    """A timer as a system task: trio has no `call_at` of its own."""

    def __init__(self, delay: float, callback: Callable[[], object]) -> None:
        import trio

        self._scope = trio.CancelScope()

        async def tick() -> None:
            with self._scope:
                await trio.sleep(max(0.0, delay))
            if not self._scope.cancelled_caught:
                callback()

        trio.lowlevel.spawn_system_task(tick)

    def cancel(self) -> None:
        self._scope.cancel()


def system_rng() -> Rng:
    """A generator seeded by the operating system. Imported late: `random` costs milliseconds."""
    import random

    return random.Random()
