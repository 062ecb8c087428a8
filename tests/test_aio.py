"""What is asked of an async library: limits, shared timers, races; at the moments that are hard to hit."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
import trio

from resilient import Env, Hedge, Pipeline, Timeout, _threads, deadline, remaining
from resilient._aio import Timers, shielded, within
from resilient.clock import SystemClock
from resilient.testing import FakeClock
from tests.test_hedge import Bench
from tests.test_timeout import both, run_asyncio, settle, turn

# -- timers ------------------------------------------------------------------------------------------------------------


def test_queues_of_closed_loops_go() -> None:
    timers = Timers(FakeClock(), lambda _: None)
    loops = [asyncio.new_event_loop() for _ in range(3)]
    timers.queue(loops[0])
    timers.queue(loops[1])
    loops[0].close()
    timers.queue(loops[2])
    assert set(timers.queues) == {id(loops[1]), id(loops[2])}
    loops[1].close()
    loops[2].close()


def test_the_shared_timer_of_the_system_is_not_taken_back() -> None:
    """By the machine's clock the timer outlives its calls: taking it back would cost more than letting it ring."""
    timers = Timers(SystemClock(), lambda struck: struck.append(1))

    async def main() -> None:
        queue = timers.queue(asyncio.get_running_loop())
        now = timers.clock.now()
        struck: list[int] = []
        queue.pending["due"] = (now - 1.0, struck)
        queue.pending["later"] = (now + 60.0, struck)
        queue.arm()
        await turn()
        await turn()
        assert (struck, list(queue.pending), queue.armed) == ([1], ["later"], True)
        assert queue.left("due")
        assert not queue.left("later")
        assert queue.armed

    asyncio.run(main())


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_limit_needs_a_task() -> None:
    async def nothing() -> None: ...

    async def main() -> None:
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def callback() -> None:
            coroutine = within(FakeClock(), 1.0, ValueError, nothing)
            with pytest.raises(RuntimeError, match=r"^a time limit needs a task") as caught:
                coroutine.send(None)
            told.set_result(str(caught.value))

        asyncio.get_running_loop().call_soon(callback)
        await told

    asyncio.run(main())


@pytest.mark.parametrize("near", [9.0, 1.0], ids=["shared timer", "own timer"])
def test_a_time_that_ends_in_the_last_step_of_a_call_cancels_nothing_later(near: float) -> None:
    """The timer rings while the call returns: its value comes, and the task goes on uncancelled."""
    clock = FakeClock()

    @Pipeline(Timeout(2.0), env=Env(clock))
    async def work() -> str:
        clock.advance(3.0)
        return "done"

    async def main() -> None:
        with deadline(near, clock=clock):
            assert await work() == "done"
        await turn()

    run_asyncio(main)


def test_the_deadline_of_another_context_is_left_alone() -> None:
    """A stream that is closed in the middle of an item, by somebody with a deadline of his own."""
    clock = FakeClock()

    @Pipeline(Timeout(9.0), env=Env(clock))
    async def items() -> AsyncGenerator[int, None]:
        await clock.asleep(1.0)
        yield 1

    async def main() -> None:
        step: Any = anext(aiter(items())).__await__()
        contextvars.copy_context().run(next, step)
        with deadline(50.0, clock=clock):
            step.close()
            assert remaining() == 50.0

    asyncio.run(main())


# -- races -------------------------------------------------------------------------------------------------------------


@both
def test_two_answers_in_one_tick(run: Any) -> None:
    """One wins, the stream of the other one is closed."""
    bench = Bench()
    log: list[int] = []
    numbers = iter((1, 2))

    @bench.guard
    async def items() -> AsyncGenerator[int, None]:
        number = next(numbers)
        try:
            await bench.clock.asleep(2.0 if number == 1 else 1.0)
            yield number
        finally:
            log.append(number)

    async def main() -> None:
        assert len([item async for item in items()]) == 1
        await bench.clock.asleep(0.1)
        assert sorted(log) == [1, 2]

    run(main)


@pytest.mark.parametrize("then", ["win", "stop"])
def test_an_extra_attempt_that_fails_while_others_run(then: str) -> None:
    """Three attempts: the second fails, the first too; the third decides."""
    bench = Bench(-3.5, -0.5, 9.0 if then == "stop" else 2.0, extra=2)

    async def main() -> None:
        task = asyncio.ensure_future(bench.call())
        if then == "win":
            assert await task == 2.0
            assert bench.policy.won == 1
            return
        await bench.clock.asleep(5.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.log[-1] == "9.0 cancelled"

    run_asyncio(main)


def test_one_of_two_extras_fails_while_the_caller_waits() -> None:
    bench = Bench(-2.5, -1.0, 2.0, extra=2)
    assert run_asyncio(bench.call) == 2.0

    class Slow(Bench):
        pass

    late = Slow(-2.25, -2.0, 2.0, extra=2)
    assert run_asyncio(late.call) == 2.0
    assert late.clock.now() == 4.0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cancel_in_the_tick_in_which_the_awaited_one_wins(when: str) -> None:
    """The first attempt has failed, the second answers, and the caller is cancelled before it hears of it."""
    bench = Bench()
    numbers, log = iter((1, 2)), list[str]()
    answer: list[asyncio.Future[None]] = []

    @bench.guard
    async def items() -> AsyncGenerator[int, None]:
        if next(numbers) == 1:
            await bench.clock.asleep(1.5)
            raise ValueError
        answer.append(asyncio.get_running_loop().create_future())
        try:
            await answer[0]
            if when == "before":
                caller[0].cancel()
            else:
                task = asyncio.current_task()
                assert task is not None
                task.add_done_callback(lambda _: caller[0].cancel())
            yield 2
        finally:
            log.append("closed")

    caller: list[asyncio.Task[Any]] = []

    async def read() -> None:
        async for _ in items():
            raise AssertionError

    async def main() -> None:
        caller.append(asyncio.ensure_future(read()))
        await bench.clock.asleep(2.0)
        answer[0].set_result(None)
        with pytest.raises(asyncio.CancelledError):
            await caller[0]
        assert log == ["closed"]

    run_asyncio(main)


def test_an_extra_attempt_that_cancels_itself_is_no_answer() -> None:
    """It has neither won nor failed; the first attempt decides."""
    for first in (3.0, -3.0):
        bench = Bench()
        numbers = iter((1, 2))

        @bench.guard
        async def call(bench: Bench = bench, numbers: Iterator[int] = numbers, first: float = first) -> float:
            if next(numbers) == 2:
                raise asyncio.CancelledError
            await bench.clock.asleep(abs(first))
            if first < 0:
                raise ValueError
            return first

        if first > 0:
            assert run_asyncio(call) == first
        else:
            with pytest.raises(ValueError):
                run_asyncio(call)


def test_a_loser_of_trio_that_answers_all_the_same() -> None:
    """Shielded from the cancel it ends with an item: nobody reads it, and its stream is closed."""
    bench = Bench()
    numbers, log = iter((1, 2)), list[int]()

    @bench.guard
    async def items() -> AsyncGenerator[int, None]:
        number = next(numbers)
        try:
            with trio.CancelScope(shield=True):
                await bench.clock.asleep(3.0 if number == 1 else 1.0)
            yield number
        finally:
            log.append(number)

    async def main() -> None:
        assert [item async for item in items()] == [2]

    trio.run(main)
    assert sorted(log) == [1, 2]


@both
def test_failures_after_the_decision_say_nothing(run: Any) -> None:
    bench = Bench()
    numbers = iter((1, 2))

    @bench.guard
    async def call() -> int:
        number = next(numbers)
        try:
            await bench.clock.asleep(3.0 if number == 1 else 1.0)
        finally:
            if number == 1:
                raise ValueError
        return number

    assert run(call) == 2


@pytest.mark.parametrize("steps", range(12))
@both
def test_cancelled_at_every_step(run: Any, steps: int) -> None:
    """Wherever the caller is cancelled, all attempts end, the counters agree, and no deadline stays behind."""
    clock = FakeClock(autojump=False)
    running = [0]

    @Pipeline(Hedge(1.0, extra=2, idempotent=True), Timeout(5.0), env=Env(clock))
    async def call() -> None:
        running[0] += 1
        try:
            await clock.asleep(4.5)
        finally:
            running[0] -= 1

    async def drive(step: Any, cancel: Any) -> None:
        for n in range(12):
            if n == steps:
                cancel()
            clock.advance(0.5)
            for _ in range(8):
                await step()

    async def main() -> None:
        if run is trio.run:
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def guarded() -> None:
                    with scope:
                        await call()

                nursery.start_soon(guarded)
                await trio.lowlevel.checkpoint()
                await drive(trio.lowlevel.checkpoint, scope.cancel)
        else:
            task = asyncio.ensure_future(call())
            await turn()
            await drive(turn, task.cancel)
            await asyncio.wait([task])
            assert task.cancelled() == (steps < 9)
        assert running == [0]
        assert remaining() is None

    run(main)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_KEEP", 0.0)
    seen: list[threading.Thread] = []
    Timeout(30.0, sync="thread")(lambda_free(seen))()
    settle(lambda: not any(t.is_alive() for t in seen if t not in _threads._idle))


def lambda_free(seen: list[threading.Thread]) -> Any:
    def note() -> None:
        seen.append(threading.current_thread())

    return note


def test_a_thread_that_is_taken_while_it_would_end_stays() -> None:
    """Its minute is over in the moment in which it gets a job: the job is done."""
    ended = threading.Event()
    job = _threads.Job(lambda: None, (), {}, contextvars.copy_context(), lambda _: None)
    worker = _threads._Worker(job)

    class Wake:
        """A lock that gives up once, when the thread has been taken from the idle ones already."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.lock.acquire()
            self.times = 0

        def acquire(self, timeout: float = -1) -> bool:
            self.times += 1
            if self.times == 1:
                _threads._idle.remove(worker)
                worker.job = _threads.Job(lambda: None, (), {}, contextvars.copy_context(), lambda _: ended.set())
                return False
            if self.times == 2:
                return True
            return timeout < 0

    worker.wake = Wake()  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    worker.start()
    assert ended.wait(60)
    worker.join(60)
    assert not worker.is_alive()


def test_what_is_shielded_goes_on_however_often_its_caller_is_cancelled() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def work() -> str:
            await gate.wait()
            return "done"

        task = asyncio.create_task(shielded(work))
        for _ in range(3):
            await turn()
            await turn()
            task.cancel()
        await turn()
        gate.set()
        assert await task == "done"

    asyncio.run(main())
