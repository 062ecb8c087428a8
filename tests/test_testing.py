"""The tools that users test with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio

from resilient.clock import in_trio
from resilient.events import Event, FellBack, Hedged
from resilient.policy import SYSTEM
from resilient.testing import FakeClock, Recorder, instant


def both(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await main()

    asyncio.run(run())
    trio.run(run)


def test_sleep_jumps_and_is_written_down() -> None:
    clock = FakeClock(10.0, epoch=1000.0)
    clock.sleep(2.5)
    clock.sleep(0)
    assert (clock.now(), clock.at(), clock.slept) == (12.5, 1002.5, [2.5])
    with pytest.raises(ValueError, match="seconds must be at least 0, not -1"):
        clock.advance(-1)


def test_tasks_wake_in_the_order_of_their_instants() -> None:
    """With autojump nobody needs to advance: the clock goes on when every task waits."""

    async def main() -> None:
        clock = FakeClock()
        woken: list[float] = []

        async def sleeper(seconds: float) -> None:
            await clock.asleep(seconds)
            assert clock.now() == seconds
            woken.append(seconds)
            await clock.asleep(0)

        if in_trio():
            async with trio.open_nursery() as nursery:
                for seconds in (3.0, 1.0, 2.0):
                    nursery.start_soon(sleeper, seconds)
        else:
            await asyncio.gather(*(sleeper(seconds) for seconds in (3.0, 1.0, 2.0)))
        assert woken == [1.0, 2.0, 3.0]
        await clock.asleep(10.0)
        assert clock.now() == 13.0

    both(main)


def test_without_autojump_tasks_wait_for_advance() -> None:
    async def on_asyncio() -> None:
        clock = FakeClock(autojump=False)
        task = asyncio.create_task(clock.asleep(5.0))
        await asyncio.tasks.sleep(0)
        clock.advance(4.0)
        await asyncio.tasks.sleep(0)
        assert not task.done()
        clock.advance(1.0)
        await task

    async def on_trio() -> None:
        clock = FakeClock(autojump=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clock.asleep, 5.0)
            await trio.testing.wait_all_tasks_blocked()
            clock.advance(5.0)

    asyncio.run(on_asyncio())
    trio.run(on_trio)


def test_a_cancelled_sleeper_leaves_nothing_behind() -> None:
    async def on_asyncio() -> None:
        clock = FakeClock(autojump=False)
        task = asyncio.create_task(clock.asleep(5.0))
        await asyncio.tasks.sleep(0)
        clock.advance(5.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        other = asyncio.create_task(clock.asleep(1.0))
        await asyncio.tasks.sleep(0)
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        clock.advance(10.0)
        assert clock.now() == 15.0

    asyncio.run(on_asyncio())


def test_another_thread_may_advance_the_clock_of_a_loop() -> None:
    async def main() -> None:
        clock = FakeClock(autojump=False)

        def advance() -> None:
            while not clock.slept:
                pass
            clock.advance(5.0)

        thread = threading.Thread(target=advance, daemon=True)
        thread.start()
        await clock.asleep(5.0)
        thread.join()

    both(main)


def test_loops_that_do_not_show_their_queue_are_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loops, one after the other, one clock."""
    clock = FakeClock()
    asyncio.run(clock.asleep(1.0))
    asyncio.run(clock.asleep(1.0))
    trio.run(clock.asleep, 1.0)
    trio.run(clock.asleep, 1.0)
    assert clock.now() == 4.0


def test_the_recorder_keeps_events() -> None:
    recorder = Recorder()
    assert not recorder.wants_calls
    error = KeyError()
    for event in (Event("a"), FellBack("b", error), Hedged("c", 2, 0.1)):
        recorder(event)
    assert recorder.of(FellBack) == [FellBack("b", error)]
    recorder.clear()
    assert recorder.events == []


def test_instant_ends_the_waits_of_the_system_clock_and_nests() -> None:
    with instant():
        with instant():
            SYSTEM.clock.sleep(1000)
        SYSTEM.clock.sleep(1000)
    assert not SYSTEM.clock.instant  # type: ignore[attr-defined] # pyright: ignore


def test_two_clocks_in_one_loop_both_jump() -> None:
    async def main() -> None:
        one, two = FakeClock(), FakeClock()
        if in_trio():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.asleep, 5.0)
                nursery.start_soon(two.asleep, 7.0)
        else:
            await asyncio.gather(one.asleep(5.0), two.asleep(7.0))
        assert (one.now(), two.now()) == (5.0, 7.0)

    both(main)


def test_timers_of_a_loop_that_is_gone_are_dropped() -> None:
    clock = FakeClock(autojump=False)

    async def leave_one() -> None:
        clock.call_at(1.0, lambda: pytest.fail("the loop is gone"))

    asyncio.run(leave_one())
    trio.run(leave_one)
    thread = threading.Thread(target=clock.advance, args=(2.0,), daemon=True)
    thread.start()
    thread.join()
    assert clock.now() == 2.0


def test_the_clock_stops_looking_when_there_is_nothing_to_jump_to() -> None:
    clock = FakeClock()

    async def main() -> None:
        await clock.asleep(1.0)
        await trio.testing.wait_all_tasks_blocked(0.001)
        assert not clock._watched
        await clock.asleep(1.0)

    trio.run(main)
    assert clock.now() == 2.0
