"""Timeout and the ambient deadline: asyncio, trio, threads, cooperating functions, generators and streams."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest
import trio

import resilient
from resilient import (
    BulkheadFull,
    CallTimeout,
    DeadlineExceeded,
    Env,
    Pipeline,
    Timeout,
    deadline,
    remaining,
)
from resilient.events import Refused, TimedOut
from resilient.testing import FakeClock, Recorder


def run_asyncio(main: Callable[[], Awaitable[Any]]) -> Any:
    async def body() -> Any:
        task = asyncio.current_task()
        assert task is not None
        try:
            return await main()
        finally:
            assert task.cancelling() == 0, "a cancellation of ours leaked out"

    return asyncio.run(body())


both = pytest.mark.parametrize("run", [run_asyncio, trio.run], ids=["asyncio", "trio"])


class Bench:
    """A clock, a recorder, and functions bound to them."""

    def __init__(self, **settings: Any) -> None:
        self.clock = FakeClock()
        self.events = Recorder()
        self.env = Env(self.clock, sinks=[self.events])
        self.policy = Timeout(**settings)
        self.guard = Pipeline(self.policy, env=self.env)

    def sleeper(self) -> Callable[[float], Awaitable[str]]:
        @self.guard
        async def sleeper(seconds: float) -> str:
            await self.clock.asleep(seconds)
            return "done"

        return sleeper


# -- the ambient deadline ----------------------------------------------------------------------------------------------


def test_without_a_deadline_there_is_no_remaining() -> None:
    assert remaining() is None


def test_a_deadline_counts_down_to_zero_and_no_further() -> None:
    clock = FakeClock()
    with deadline(3.0, clock=clock):
        assert remaining() == 3.0
        clock.advance(2.0)
        assert remaining() == 1.0
        clock.advance(2.0)
        assert remaining() == 0.0
    assert remaining() is None


def test_a_deadline_inside_another_only_shortens() -> None:
    clock, other = FakeClock(), FakeClock()
    with deadline(3.0, clock=clock):
        with deadline(5.0, clock=clock):
            assert remaining() == 3.0
        with deadline(1.0, clock=clock), deadline(0.5, clock=other):
            assert remaining() == 0.5
        assert remaining() == 3.0
        with deadline(1.0):
            left = remaining()
            assert left is not None
            assert 0.0 < left <= 1.0
    assert remaining() is None


def test_a_deadline_is_inherited_by_tasks_but_not_by_their_parent() -> None:
    async def main() -> None:
        async def child() -> None:
            with deadline(1.0):
                await asyncio.wait([asyncio.ensure_future(asyncio.Event().wait())], timeout=0)

        with deadline(100.0):
            await asyncio.create_task(child())
            left = remaining()
            assert left is not None
            assert left > 50.0
            inherited = await asyncio.create_task(read())
            assert inherited is not None

    async def read() -> float | None:
        return remaining()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("seconds", "error", "message"),
    [
        (-1, ValueError, "seconds must be a finite number of at least 0, not -1"),
        (float("nan"), ValueError, "seconds must be a finite number of at least 0, not nan"),
        (True, TypeError, "seconds must be a number, not True"),
    ],
)
def test_what_a_deadline_refuses(seconds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        deadline(seconds)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "Timeout needs seconds (for streams, first or between will do)"),
        ({"seconds": 0}, ValueError, "seconds must be a finite number above 0, not 0"),
        ({"seconds": float("inf")}, ValueError, "seconds must be a finite number above 0, not inf"),
        ({"seconds": "2"}, TypeError, "seconds must be a number, not '2'"),
        ({"first": -1}, ValueError, "first must be a finite number above 0, not -1"),
        ({"between": True}, TypeError, "between must be a number, not True"),
        ({"seconds": 1, "first": 2}, ValueError, "first must be at most seconds (1), not 2"),
        ({"seconds": 1, "between": 2}, ValueError, "between must be at most seconds (1), not 2"),
        ({"seconds": 1, "sync": "signal"}, ValueError, "sync must be 'deadline' or 'thread', not 'signal'"),
        ({"seconds": 1, "max_stray": 0}, ValueError, "max_stray must be at least 1, not 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Timeout(**settings)
    assert str(caught.value) == message


def test_it_describes_itself() -> None:
    policy = Timeout(2, name="t", sync="thread")
    assert policy.total == 2.0
    assert policy.describe() == {"name": "t", "seconds": 2.0, "sync": "thread", "first": None, "between": None}
    assert repr(policy) == "Timeout(name='t', seconds=2.0, sync='thread')"


def plain() -> None: ...


async def coroutine() -> None: ...


def generator() -> Iterator[int]:
    yield 1


def test_a_plain_function_must_choose() -> None:
    with pytest.raises(
        TypeError, match=r"^Timeout cannot cut off a plain function: say Timeout\(\.\.\., sync='deadline'\)"
    ):
        Timeout(2.0)(plain)


@pytest.mark.parametrize("sync", [None, "thread"])
def test_a_generator_can_only_cooperate(sync: Any) -> None:
    with pytest.raises(TypeError, match=r"^Timeout cannot cut off a generator function"):
        Timeout(2.0, sync=sync)(generator)


@pytest.mark.parametrize("function", [plain, coroutine])
@pytest.mark.parametrize(
    "settings", [{"first": 1}, {"between": 1}, {"seconds": 2, "first": 1}, {"seconds": 2, "between": 1}]
)
def test_limits_of_items_need_items(function: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^first and between are limits for the items of a stream or generator"):
        Timeout(**settings, sync="deadline")(function)


def test_hyx_decorating_at_import_time_needs_no_loop() -> None:
    """A timeout is made and decorates with no loop running (hyx: "no running event loop"), and serves two loops."""
    guarded = Timeout(5.0)(coroutine)
    asyncio.run(guarded())
    asyncio.run(guarded())


# -- coroutines --------------------------------------------------------------------------------------------------------


@both
def test_in_time_the_value_comes(run: Any) -> None:
    bench = Bench(seconds=2.0)
    sleeper = bench.sleeper()
    assert run(lambda: sleeper(1.9)) == "done"
    assert bench.policy.timed_out == 0
    assert bench.events.events == []


@both
def test_late_calls_are_cut_off(run: Any) -> None:
    bench = Bench(seconds=2.0, name="slow")
    sleeper = bench.sleeper()

    async def main() -> None:
        with pytest.raises(CallTimeout, match=r"^slow: no answer within 2 s$") as caught:
            await sleeper(3.0)
        assert isinstance(caught.value, TimeoutError)
        assert bench.clock.now() == 2.0
        assert remaining() is None

    run(main)
    assert bench.policy.timed_out == 1
    assert bench.events.events == [TimedOut("slow", 2.0)]


@both
def test_the_limit_is_ambient(run: Any) -> None:
    """Inside a timeout `remaining()` tells what is left of it, and outside it is gone, however the call ended."""
    bench = Bench(seconds=2.0)

    @bench.guard
    async def ask(fail: bool) -> float | None:
        await bench.clock.asleep(0.5)
        if fail:
            raise KeyError(fail)
        return remaining()

    async def main() -> None:
        assert await ask(False) == 1.5
        assert remaining() is None
        with pytest.raises(KeyError):
            await ask(True)
        assert remaining() is None

    run(main)


@both
def test_the_nearer_limit_counts(run: Any) -> None:
    bench = Bench(seconds=2.0, name="inner")
    sleeper = bench.sleeper()

    async def main() -> None:
        with deadline(1.0, clock=bench.clock):
            assert await sleeper(0.5) == "done"
            with pytest.raises(CallTimeout, match=r"^inner: no answer within 0.5 s$"):
                await sleeper(1.0)
            assert bench.clock.now() == 1.0
            with pytest.raises(DeadlineExceeded, match=r"^inner: no time is left to start the call$"):
                await sleeper(1.0)

    run(main)
    refused = bench.events.of(Refused)
    assert [type(event.error) for event in refused] == [DeadlineExceeded]


@both
@pytest.mark.parametrize(("outer", "inner"), [(2.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
def test_polly_nested_limits_end_at_the_nearer_one(run: Any, outer: float, inner: float) -> None:
    """A limit inside another: the call ends at the nearer one, as a timeout, and both are gone afterwards."""
    clock = FakeClock()

    async def body() -> None:
        await clock.asleep(9.0)

    inside = Pipeline(Timeout(inner, name="inner"), env=Env(clock))(body)

    async def middle() -> None:
        await inside()

    guarded = Pipeline(Timeout(outer, name="outer"), env=Env(clock))(middle)

    async def main() -> None:
        with pytest.raises(CallTimeout):
            await guarded()
        assert clock.now() == min(outer, inner)
        assert remaining() is None

    run(main)


@both
def test_a_coroutine_that_swallows_the_cancel_is_heard(run: Any) -> None:
    bench = Bench(seconds=1.0)
    loud = bench.guard

    @loud
    async def stubborn() -> str:
        try:
            await bench.clock.asleep(5.0)
        except asyncio.CancelledError:
            pass
        return "still here"

    async def main() -> None:
        assert await stubborn() == "still here"
        with deadline(0.5, clock=bench.clock):
            assert await stubborn() == "still here"

    run_asyncio(main)
    with pytest.raises(CallTimeout):  # trio knows no swallowing: its Cancelled comes back at the scope
        trio.run(bench.sleeper(), 5.0)


@both
def test_its_own_error_after_the_cancel_comes_out(run: Any) -> None:
    bench = Bench(seconds=1.0)

    @bench.guard
    async def cleanup_fails() -> None:
        try:
            await bench.clock.asleep(5.0)
        finally:
            raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await cleanup_fails()
        with deadline(0.5, clock=bench.clock), pytest.raises(ZeroDivisionError):
            await cleanup_fails()

    run(main)


@pytest.mark.parametrize("ambient", [None, 1.0], ids=["own timer", "shared timer"])
def test_a_cancel_from_outside_stays_one(ambient: float | None) -> None:
    bench = Bench(seconds=2.0)
    sleeper = bench.sleeper()

    async def main() -> None:
        async def child() -> None:
            with deadline(ambient or 99.0, clock=bench.clock):
                await sleeper(50.0)

        task = asyncio.create_task(child())
        await bench.clock.asleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(main())
    assert bench.policy.timed_out == 0


@pytest.mark.parametrize("ambient", [9.0, 1.0], ids=["shared timer", "own timer"])
@pytest.mark.parametrize("order", ["timer first", "cancel first"])
def test_both_cancels_at_once_stay_a_cancel(ambient: float, order: str) -> None:
    """The caller is told of the cancel from outside, whichever came first in the same tick."""
    bench = Bench(seconds=1.0)
    sleeper = bench.sleeper()

    async def main() -> None:
        async def child() -> None:
            with deadline(ambient, clock=bench.clock):
                await sleeper(50.0)

        task = asyncio.create_task(child())
        await asyncio.wait([asyncio.ensure_future(turn())])
        if order == "cancel first":
            task.cancel()
        bench.clock.advance(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


async def turn() -> None:
    loop = asyncio.get_running_loop()
    step = loop.create_future()
    loop.call_soon(step.set_result, None)
    await step


@pytest.mark.parametrize("ambient", [9.0, 1.0], ids=["shared timer", "own timer"])
def test_a_timeout_in_a_task_that_was_cancelled_before(ambient: float) -> None:
    """In the clean-up of a cancelled task a timeout is still a timeout, and the count of cancels stays."""
    bench = Bench(seconds=2.0)
    sleeper = bench.sleeper()

    async def main() -> None:
        async def child() -> str:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                with deadline(ambient, clock=bench.clock), pytest.raises(CallTimeout):
                    await sleeper(50.0)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 1
            return "cleaned"

        task = asyncio.create_task(child())
        await turn()
        task.cancel()
        assert await task == "cleaned"

    asyncio.run(main())


def test_a_task_group_inside_is_ended() -> None:
    bench = Bench(seconds=2.0)
    ended: list[str] = []

    async def child() -> None:
        try:
            await bench.clock.asleep(50.0)
        finally:
            ended.append("child")

    @bench.guard
    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(child())
            tasks.create_task(child())

    async def main() -> None:
        with pytest.raises(CallTimeout):
            await group()
        assert ended == ["child", "child"]

    run_asyncio(main)


def test_many_calls_share_one_timer() -> None:
    """A thousand calls under way have one timer; each ends at its own instant, and none is left over."""
    bench = Bench(seconds=2.0)
    alarms: list[float] = []
    plain_call_at = bench.clock.call_at

    def call_at(until: float, callback: Any) -> Any:
        if "_fire" in repr(callback):
            alarms.append(until)
        return plain_call_at(until, callback)

    bench.clock.call_at = call_at  # type: ignore[method-assign]
    sleeper = bench.sleeper()

    async def call(start: float) -> float:
        await bench.clock.asleep(start)
        try:
            await sleeper(1.0 if start == 0.5 else 9.0)
        except CallTimeout:
            pass
        return bench.clock.now()

    async def main() -> None:
        starts = [0.25, 0.5, 0.75] * 300
        assert await asyncio.gather(*map(call, starts)) == [{0.25: 2.25, 0.5: 1.5, 0.75: 2.75}[s] for s in starts]

    asyncio.run(main())
    assert alarms == [2.25, 2.75]
    assert bench.policy.timed_out == 600
    timers = bench.policy._timers
    assert timers is not None
    assert [queue.pending for queue in timers.queues.values()] in ([], [{}])


def test_a_function_that_calls_itself_has_a_limit_for_each_call() -> None:
    bench = Bench(seconds=2.0)

    @bench.guard
    async def deep(n: int) -> int:
        if n:
            return await deep(n - 1)
        await bench.clock.asleep(1.0)
        return 7

    assert run_asyncio(lambda: deep(5)) == 7


def test_two_loops_in_two_threads() -> None:
    """Loops do not disturb each other, and a policy keeps none of them alive."""
    policy = Timeout(60.0)
    meet = threading.Barrier(2)
    loops: list[weakref.ref[Any]] = []

    @policy
    async def work() -> int:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        meet.wait(60)
        await turn()
        assert policy._timers is not None
        found = len(policy._timers.queues)
        meet.wait(60)
        return found

    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(asyncio.run(work())), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [2, 2]
    asyncio.run(coroutine_of(policy))
    gc.collect()
    assert [loop() for loop in loops] == [None, None]
    assert policy._timers is not None
    assert len(policy._timers.queues) <= 1


async def coroutine_of(policy: Timeout) -> None:
    await policy(coroutine)()


def test_one_policy_under_two_clocks() -> None:
    one, two = FakeClock(), FakeClock()
    policy = Timeout(2.0)

    async def first() -> None:
        await one.asleep(3.0)

    async def second() -> None:
        await two.asleep(3.0)

    for function, clock in ((first, one), (second, two)):
        with pytest.raises(CallTimeout):
            run_asyncio(Pipeline(policy, env=Env(clock))(function))
    assert (one.now(), two.now()) == (2.0, 2.0)


def test_the_clock_of_the_system_is_bound_to_real_loops() -> None:
    """The shared timer and the scope of trio, by the clock of the machine; nothing waits."""
    guarded = Timeout(60.0)(turn)
    asyncio.run(guarded())

    async def nothing() -> float | None:
        return remaining()

    left = trio.run(Timeout(60.0)(nothing))
    assert left is not None
    assert 50 < left <= 60


def test_trio_deadline_by_trios_own_clock() -> None:
    """By the system's clock the limit is a deadline of trio, whose clock a test may replace."""

    async def sleepy() -> None:
        await trio.sleep(90.0)

    async def main() -> None:
        with pytest.raises(CallTimeout):
            await Timeout(60.0)(sleepy)()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_coroutine_outside_of_every_loop_is_told_so() -> None:
    coroutine_object = Timeout(2.0)(coroutine)()
    with pytest.raises(RuntimeError, match=r"^no running event loop$"):
        coroutine_object.send(None)


def test_a_coroutine_that_is_closed_leaves_nothing() -> None:
    """Closed by the garbage collector or by hand, in another context: no deadline and no entry is left behind."""
    bench = Bench(seconds=2.0)
    sleeper = bench.sleeper()

    async def main() -> None:
        made: Any = sleeper(1.0)
        contextvars.copy_context().run(made.send, None)
        with deadline(50.0, clock=bench.clock):
            made.close()
            assert remaining() == 50.0

    asyncio.run(main())
    timers = bench.policy._timers
    assert timers is not None
    assert all(not queue.pending and not queue.armed for queue in timers.queues.values())


# -- plain functions that cooperate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["system", "fake"])
def test_a_cooperating_function_knows_its_time(kind: str) -> None:
    clock = FakeClock()
    guard = Pipeline(Timeout(2.0, sync="deadline"), env=None if kind == "system" else Env(clock))

    @guard
    def ask() -> float | None:
        return remaining()

    @guard
    def fails() -> None:
        raise KeyError

    left = ask()
    assert left is not None
    assert 1.0 < left <= 2.0
    with pytest.raises(KeyError):
        fails()
    assert remaining() is None


def test_capio_a_late_result_is_a_result() -> None:
    """A function that has returned is not declared late: the caller gets its value (capio raises)."""
    clock = FakeClock()

    @Pipeline(Timeout(1.0, sync="deadline"), env=Env(clock))
    def late() -> str:
        clock.sleep(5.0)
        assert remaining() == 0.0
        return "late"

    assert late() == "late"


def test_cooperating_functions_nest() -> None:
    def ask() -> float | None:
        return remaining()

    short = Timeout(1.0, sync="deadline")(ask)

    def outer() -> float | None:
        inner = short()
        assert inner is not None
        assert inner <= 1.0
        left = remaining()
        assert left is not None
        assert left > 50.0
        return long()

    long = Timeout(100.0, sync="deadline")(ask)
    left = Timeout(60.0, sync="deadline")(outer)()
    assert left is not None
    assert 50.0 < left <= 60.0
    with deadline(30.0):
        left = long()
        assert left is not None
        assert left <= 30.0
    with deadline(0.0), pytest.raises(DeadlineExceeded):
        long()
    assert remaining() is None


def test_a_foreign_deadline_that_is_over_refuses() -> None:
    bench = Bench(seconds=2.0, sync="deadline")
    calls: list[int] = []

    @bench.guard
    def work() -> None:
        calls.append(1)

    with deadline(0.0, clock=bench.clock), pytest.raises(DeadlineExceeded):
        work()
    with deadline(1.0, clock=bench.clock):
        work()
    work()
    assert calls == [1, 1]


def test_whoever_runs_in_a_copy_of_the_context_inherits_the_limit() -> None:
    """`asyncio.run`, `asyncio.to_thread` and executors that copy the context are inside the function."""

    async def ask() -> list[float | None]:
        return [remaining(), await asyncio.to_thread(remaining)]

    @Timeout(60.0, sync="deadline")
    def work() -> list[float | None]:
        return asyncio.run(ask())

    assert all(left is not None and 50.0 < left <= 60.0 for left in work())


def test_threads_have_their_own_limits() -> None:
    policy = Timeout(60.0, sync="deadline")
    inside, seen = threading.Barrier(2), []

    @policy
    def work() -> None:
        inside.wait(60)
        inside.wait(60)

    def look() -> None:
        inside.wait(60)
        seen.append(remaining())
        inside.wait(60)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    work()
    watcher.join()
    assert seen == [None]


# -- plain functions in threads ----------------------------------------------------------------------------------------


def test_in_a_thread_the_value_comes_with_context_and_deadline() -> None:
    """pyresilience loses context variables in its pool."""
    bench = Bench(seconds=2.0, sync="thread")
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("mine")

    @bench.guard
    def work(a: int, *, b: int) -> tuple[int, int, str, float | None, bool]:
        return a, b, variable.get(), remaining(), threading.current_thread().daemon

    assert work(1, b=2) == (1, 2, "mine", 2.0, True)
    with deadline(1.0, clock=bench.clock):
        assert work(1, b=2)[3] == 1.0
    assert (bench.policy.stray, remaining()) == (0, None)


def test_in_a_thread_late_calls_become_strays_and_strays_are_capped() -> None:
    bench = Bench(seconds=2.0, sync="thread", max_stray=1, name="t")
    release, gone = threading.Event(), threading.Event()

    @bench.guard
    def hang() -> None:
        release.wait()
        gone.set()

    with pytest.raises(CallTimeout, match=r"^t: no answer within 2 s$"):
        hang()
    assert (bench.policy.stray, bench.clock.now()) == (1, 2.0)
    with pytest.raises(BulkheadFull):
        hang()
    assert [type(event) for event in bench.events.events] == [TimedOut, Refused]
    release.set()
    assert gone.wait(60)
    settle(lambda: bench.policy.stray == 0)
    hang()
    with deadline(0.0, clock=bench.clock), pytest.raises(DeadlineExceeded):
        hang()


def settle(ready: Callable[[], bool]) -> None:
    """Until another thread has done what it is about to do."""
    patience = threading.Event()
    for _ in range(10_000):
        if ready():
            return
        patience.wait(0.001)
    raise AssertionError("it never came about")


def test_pyresilience_a_queue_does_not_eat_the_time() -> None:
    """Twelve callers of one function run at once: no pool of four in which waiting counts as running."""
    bench = Bench(seconds=5.0, sync="thread")
    meet = threading.Barrier(12)

    @bench.guard
    def together() -> int:
        return meet.wait(60)

    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(together()), daemon=True) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(12))


def test_nopanic_no_thread_per_call() -> None:
    bench = Bench(seconds=5.0, sync="thread")

    @bench.guard
    def who() -> int:
        return threading.get_ident()

    assert len({who() for _ in range(50)}) < 10


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, ValueError, StopIteration])
def test_crashbytes_what_the_thread_raises_is_what_the_caller_gets(kind: type[BaseException]) -> None:
    """SystemExit in a timed function is SystemExit (crashbytes: IndexError)."""
    bench = Bench(seconds=5.0, sync="thread")
    error = kind(3)

    @bench.guard
    def work() -> None:
        raise error

    with pytest.raises(kind) as caught:
        work()
    assert caught.value is error


def test_crashbytes_a_stray_does_not_hold_up_the_exit() -> None:
    """The process ends although a timed-out thread hangs for ever."""
    program = (
        "import threading\n"
        "from resilient import Timeout, CallTimeout\n"
        "@Timeout(0.001, sync='thread')\n"
        "def hang(): threading.Event().wait()\n"
        "try: hang()\n"
        "except CallTimeout: print('cut off')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "cut off\n"


def test_a_caller_that_is_interrupted_leaves_a_stray() -> None:
    bench = Bench(seconds=5.0, sync="thread")
    release = threading.Event()

    @bench.guard
    def hang() -> None:
        release.wait()

    def interrupted(acquire: Any, seconds: Any) -> bool:
        raise KeyboardInterrupt

    bench.clock.wait = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        hang()
    assert bench.policy.stray == 1
    release.set()
    settle(lambda: bench.policy.stray == 0)


def test_a_result_in_the_last_moment_counts() -> None:
    """The call ends just as its time does: the caller gets its value, and there is no stray."""
    bench = Bench(seconds=5.0, sync="thread")

    @bench.guard
    def work() -> str:
        return "just"

    def just_late(acquire: Any, seconds: Any) -> bool:
        assert acquire(10)
        return False

    bench.clock.wait = just_late  # type: ignore[method-assign]
    assert work() == "just"
    assert (bench.policy.stray, bench.policy.timed_out) == (0, 0)


# -- generators --------------------------------------------------------------------------------------------------------


def test_a_generator_is_stopped_between_two_items() -> None:
    bench = Bench(seconds=3.0, first=2.0, between=1.0, sync="deadline", name="g")
    seen: list[Any] = []

    @bench.guard
    def count() -> Generator[float | None, str, str]:
        try:
            for _ in range(9):
                bench.clock.sleep(1.0)
                seen.append((yield remaining()))
        finally:
            seen.append("closed")
        return "end"

    items = count()
    assert next(items) == 1.0
    assert items.send("hello") == 0.0
    assert remaining() is None
    assert next(items) == 0.0
    with pytest.raises(CallTimeout, match=r"^g: no answer within 3 s$"):
        next(items)
    assert seen == ["hello", None, "closed"]
    with deadline(0.0, clock=bench.clock), pytest.raises(DeadlineExceeded):
        next(count())


def test_send_throw_close_and_return_reach_the_generator() -> None:
    guard = Timeout(9.0, sync="deadline")
    log: list[str] = []

    @guard
    def talk() -> Generator[int, str, str]:
        try:
            try:
                log.append((yield 1))
            except KeyError:
                log.append("thrown")
            yield 2
        finally:
            log.append("closed")
        return "end"

    first = talk()
    next(first)
    assert first.throw(KeyError()) == 2
    with pytest.raises(StopIteration) as stop:
        next(first)
    assert stop.value.value == "end"
    second = talk()
    next(second)
    second.close()
    assert log == ["thrown", "closed", "closed"]


# -- streams -----------------------------------------------------------------------------------------------------------


def streamer(bench: Bench) -> Callable[..., AsyncGenerator[float | None, str]]:
    @bench.guard
    async def items(*pauses: float) -> AsyncGenerator[float | None, str]:
        for pause in pauses:
            await bench.clock.asleep(pause)
            yield remaining()

    return items


@both
@pytest.mark.parametrize(
    ("settings", "pauses", "got", "message"),
    [
        ({"first": 1.0}, (0.5, 9.0), [0.5, None], None),
        ({"first": 1.0}, (1.5,), [], "no answer within 1 s"),
        ({"between": 1.0}, (9.0, 0.5), [None, 0.5], None),
        ({"between": 1.0}, (9.0, 0.5, 1.5), [None, 0.5], "no answer within 1 s"),
        ({"seconds": 3.0}, (1.0, 1.0, 1.5), [2.0, 1.0], "no answer within 3 s"),
        ({"seconds": 3.0, "first": 1.0, "between": 2.0}, (0.5, 1.5, 2.0), [0.5, 0.5], "no answer within 3 s"),
    ],
)
def test_streams_have_three_limits(run: Any, settings: Any, pauses: Any, got: Any, message: str | None) -> None:
    bench = Bench(**settings)
    items = streamer(bench)
    seen: list[float | None] = []

    async def main() -> None:
        async for item in items(*pauses):
            assert remaining() is None, "no scope is held across a yield"
            seen.append(item)

    if message is None:
        run(main)
    else:
        with pytest.raises(CallTimeout, match=message):
            run(main)
    assert seen == got


@both
def test_the_consumers_time_counts_for_the_whole_only(run: Any) -> None:
    bench = Bench(seconds=5.0, between=1.0)
    closed: list[str] = []

    @bench.guard
    async def items() -> AsyncIterator[int]:
        try:
            for i in range(9):
                yield i
        finally:
            closed.append("closed")

    async def main() -> None:
        seen: list[int] = []
        with pytest.raises(CallTimeout, match="no answer within 5 s"):
            async for item in items():
                seen.append(item)
                await bench.clock.asleep(2.0)
        assert seen == [0, 1, 2]
        assert closed == ["closed"]
        with deadline(0.0, clock=bench.clock), pytest.raises(DeadlineExceeded):
            await anext(aiter(items()))

    run(main)


@both
def test_asend_athrow_and_aclose_reach_the_stream(run: Any) -> None:
    log: list[str] = []

    @Timeout(9.0)
    async def talk() -> AsyncGenerator[int, str]:
        try:
            try:
                log.append((yield 1))
                log.append((yield 2))
            except KeyError:
                log.append("thrown")
            yield 3
        finally:
            log.append("closed")

    async def main() -> None:
        one = talk()
        assert await anext(one) == 1
        assert await one.asend("sent") == 2
        assert await one.athrow(KeyError()) == 3
        await one.aclose()
        assert log == ["sent", "thrown", "closed"]

    run(main)


def test_a_cancel_from_outside_ends_a_stream_as_a_cancel() -> None:
    bench = Bench(seconds=5.0)
    items = streamer(bench)

    async def main() -> None:
        async def read() -> None:
            async for _ in items(9.0):
                raise AssertionError

        task = asyncio.create_task(read())
        await bench.clock.asleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


# -- nothing stays behind ----------------------------------------------------------------------------------------------


class Payload:
    pass


@pytest.mark.parametrize("kind", ["coro", "thread", "deadline", "stream", "gen"])
def test_frames_do_not_linger(kind: str) -> None:
    """An error does not keep frames alive until the collector comes: there is no cycle through its traceback."""
    bench = Bench(seconds=2.0)
    held: list[weakref.ref[Payload]] = []

    def hold() -> Payload:
        payload = Payload()
        held.append(weakref.ref(payload))
        return payload

    async def fails() -> None:
        payload = hold()
        await bench.clock.asleep(0.5)
        raise ValueError(payload)

    def fails_plainly() -> None:
        payload = hold()
        raise ValueError(payload)

    async def streams() -> AsyncGenerator[int, None]:
        payload = hold()
        yield 1
        raise ValueError(payload)

    def generates() -> Generator[int, None, None]:
        payload = hold()
        yield 1
        raise ValueError(payload)

    def go() -> None:
        guard: Any
        if kind == "coro":
            asyncio.run(quietly(bench.guard(fails), held))
        elif (
            kind == "late"
        ):  # under asyncio 3.11 a cancelled future remembers its CancelledError until the collector comes
            trio.run(quietly, bench.guard(fails), held)
        elif kind == "stream":
            guard = bench.guard(streams)
            asyncio.run(quietly(lambda: drain(guard()), held))
        elif kind == "gen":
            list(Pipeline(Timeout(2.0, sync="deadline"), env=bench.env)(generates)())
        else:
            mode: Any = kind
            Pipeline(Timeout(2.0, sync=mode), env=bench.env)(fails_plainly)()

    gc.collect()
    gc.disable()
    try:
        try:
            go()
        except (ValueError, CallTimeout):
            pass
        if kind == "thread":
            settle(lambda: held[0]() is None)
        assert [ref() for ref in held] == [None]
    finally:
        gc.enable()


async def quietly(call: Callable[[], Awaitable[Any]], held: list[weakref.ref[Payload]]) -> None:
    # `asyncio.run` makes a cycle of its own with what comes out of it.
    try:
        await call()
    except (ValueError, CallTimeout):
        pass
    assert [ref() for ref in held] == [None]


async def drain(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def test_a_thrown_error_that_comes_back_is_no_cycle() -> None:
    bench = Bench(seconds=2.0, sync="deadline")

    @bench.guard
    def gen() -> Generator[int, None, None]:
        yield 1

    @bench.guard
    async def stream() -> AsyncGenerator[int, None]:
        yield 1

    async def athrow(box: list[Special]) -> None:
        items = stream()
        await anext(items)
        try:
            await items.athrow(box.pop())
        except Special:
            pass

    def throw(box: list[Special]) -> None:
        items = gen()
        next(items)
        try:
            items.throw(box.pop())
        except Special:
            pass

    for go in (throw, lambda box: asyncio.run(athrow(box))):
        gc.collect()
        gc.disable()
        try:
            box = [Special()]
            ref = weakref.ref(box[0])
            go(box)
            assert ref() is None
        finally:
            gc.enable()


class Special(Exception):
    pass


@pytest.mark.parametrize("settings", [{"seconds": 5.0}, {"seconds": 5.0, "sync": "thread"}])
def test_the_name_is_that_of_the_function(settings: Any) -> None:
    policy = Timeout(**settings)
    assert policy._label == "timeout"
    policy(coroutine)
    assert policy.name == "coroutine"
    assert resilient.inspect(policy(coroutine))[0] is policy


def test_under_trio_the_search_for_a_loop_is_no_context_of_errors() -> None:
    @Timeout(60.0)
    async def fails() -> None:
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError) as caught:
        trio.run(fails)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("nearer", [False, True], ids=["its own limit", "a nearer deadline"])
def test_an_error_in_the_step_in_which_the_time_is_over_leaves_no_cancel_behind(nearer: bool) -> None:
    """A clock of a test may strike while the call runs; the cancel would come at somebody else's await."""
    clock = FakeClock()

    @Pipeline(Timeout(1.0), env=Env(clock))
    async def fails() -> None:
        clock.advance(5.0)
        raise ConnectionError("refused")

    async def main() -> None:
        with deadline(0.5 if nearer else 60.0, clock=clock), pytest.raises(ConnectionError):
            await fails()
        await clock.asleep(1.0)

    run_asyncio(main)


@both
def test_arguments_may_have_any_name(run: Callable[..., Any]) -> None:
    @Timeout(60.0)
    async def call(**named: int) -> dict[str, int]:
        return named

    named = dict.fromkeys(("self", "clock", "until", "late", "call", "args", "kwargs", "env", "seconds"), 1)

    async def main() -> dict[str, int]:
        with deadline(30.0):
            return await call(**named)

    assert run(main) == named


def test_a_call_that_is_closed_elsewhere_leaves_the_deadline_there_alone() -> None:
    """A suspended call may be collected anywhere, and must not overwrite the deadline of whoever runs just then."""

    @resilient.Retry(KeyError, total=5.0)
    async def by_retry() -> None:
        await asyncio.get_running_loop().create_future()

    async def by_block() -> None:
        with deadline(5.0):
            await asyncio.get_running_loop().create_future()

    async def main() -> None:
        for call in (by_retry, by_block):
            suspended = call()
            contextvars.copy_context().run(suspended.send, None)
            with deadline(3.0):
                suspended.close()
                left = remaining()
                assert left is not None
                assert left <= 3.0
            assert remaining() is None

    asyncio.run(main())
