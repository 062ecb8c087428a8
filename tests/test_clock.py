"""The system's clock, and how it finds out who runs the task."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio

from resilient.clock import Clock, SystemClock, in_trio, system_rng
from resilient.testing import FakeClock


def test_both_clocks_are_clocks() -> None:
    assert isinstance(SystemClock(), Clock)
    assert isinstance(FakeClock(), Clock)


def test_time_goes_forward() -> None:
    clock = SystemClock()
    before, wall = clock.now(), clock.at()
    clock.sleep(0.0001)
    assert clock.now() > before
    assert clock.at() >= wall


def test_zero_is_no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """time.sleep(0) costs 70 us: it is not called. Nor does a task yield."""
    clock = SystemClock()
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("slept"))
    clock.sleep(0)
    clock.sleep(-1)
    coroutine = clock.asleep(0)
    with pytest.raises(StopIteration):
        coroutine.send(None)


def both(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await main()

    asyncio.run(run())
    trio.run(run)


def test_tasks_sleep_under_asyncio_and_trio() -> None:
    clock = SystemClock()

    async def main() -> None:
        before = clock.now()
        await clock.asleep(0.0001)
        assert clock.now() > before

    both(main)


def test_an_instant_clock_does_not_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SystemClock()
    clock.instant = True
    clock.sleep(1000)

    async def main() -> None:
        await clock.asleep(1000)

    both(main)


def test_in_trio_knows_who_runs_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> bool:
        return in_trio()

    assert not in_trio()
    assert trio.run(main)
    assert not asyncio.run(main())
    monkeypatch.delitem(sys.modules, "trio")
    assert not in_trio()


def test_waiting_for_a_lock_ends_with_it_or_with_the_time() -> None:
    clock = SystemClock()
    asked: list[float] = []

    def acquire(timeout: float) -> bool:
        asked.append(timeout)
        return timeout < 0

    assert clock.wait(acquire, None)
    assert not clock.wait(acquire, 2.0)
    assert not clock.wait(acquire, -2.0)
    assert not clock.wait(acquire, 1e300), "no lock can wait that long"
    assert asked == [-1, 2.0, 0.0, threading.TIMEOUT_MAX]


def test_callbacks_run_in_the_loop_at_their_time() -> None:
    clock = SystemClock()

    async def on_asyncio() -> None:
        done = asyncio.Event()
        clock.call_at(clock.now(), lambda: pytest.fail("cancelled")).cancel()
        clock.call_at(clock.now() + 0.0001, done.set)
        await done.wait()

    async def on_trio() -> None:
        done = trio.Event()
        clock.call_at(clock.now() + 0.0002, lambda: pytest.fail("cancelled")).cancel()
        clock.call_at(clock.now() + 0.0001, done.set)
        await done.wait()

    asyncio.run(on_asyncio())
    trio.run(on_trio)


def test_chance_is_seeded_apart() -> None:
    assert system_rng().random() != system_rng().random()


def test_the_fake_clock_waits_in_threads() -> None:
    """A waiting thread wakes by its lock, by `advance`, or by the jump when nothing happens."""
    clock, lock = FakeClock(autojump=False), threading.Lock()
    lock.acquire()

    def acquire(timeout: float) -> bool:
        return lock.acquire(timeout=timeout)

    assert not clock.wait(acquire, 0)
    outcome: list[bool] = []
    waiting = threading.Event()

    def announced(timeout: float) -> bool:
        waiting.set()
        return acquire(timeout)

    thread = threading.Thread(target=lambda: outcome.append(clock.wait(announced, 5.0)), daemon=True)
    thread.start()
    waiting.wait()
    clock.advance(5.0)
    thread.join()
    assert outcome == [False]
    lock.release()
    assert clock.wait(acquire, 5.0)
    lock.release()
    assert clock.wait(acquire, None)
    jumping = FakeClock()
    assert not jumping.wait(acquire, 7.0)
    assert jumping.now() == 7.0
