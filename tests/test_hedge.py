"""Hedge: asyncio, trio, threads; who wins, who is cancelled, what is learned."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest
import trio

from resilient import Env, Hedge, Pipeline, Quantile, deadline
from resilient._latency import Latencies
from resilient.events import Hedged
from resilient.testing import FakeClock, Recorder
from tests.test_timeout import both, run_asyncio, settle, turn


class Bench:
    """A hedged function whose attempts do what they are told: sleep so long, then return or (negative) fail."""

    def __init__(self, *plans: float, after: float | Quantile = 1.0, **settings: Any) -> None:
        self.clock = FakeClock()
        self.events = Recorder()
        self.policy = Hedge(after, idempotent=True, **settings)
        self.guard = Pipeline(self.policy, env=Env(self.clock, sinks=[self.events]))
        self.plans = iter(plans)
        self.log: list[Any] = []
        self.call = self.guard(self.attempt)

    async def attempt(self) -> float:
        plan = next(self.plans)
        self.log.append(plan)
        try:
            await self.clock.asleep(abs(plan))
        except BaseException:
            self.log.append(f"{plan} cancelled")
            raise
        if plan < 0:
            raise ValueError(plan)
        return plan


any_hedge: Any = Hedge
any_quantile: Any = Quantile

# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hedge(0), ValueError, "after must be a finite number above 0, not 0"),
        (lambda: any_hedge("1"), TypeError, "after must be a number, not '1'"),
        (lambda: Hedge(1, extra=0), ValueError, "extra must be at least 1, not 0"),
        (lambda: any_hedge(1, idempotent=1), TypeError, "idempotent must be a bool, not 1"),
        (lambda: any_hedge(1, sync="deadline"), ValueError, "sync must be 'thread', not 'deadline'"),
        (lambda: Hedge(1, max_stray=0), ValueError, "max_stray must be at least 1, not 0"),
        (lambda: any_quantile("x"), TypeError, "q must be a number, not 'x'"),
        (lambda: Quantile(1.0), ValueError, "q must be above 0 and below 1, not 1.0"),
        (lambda: Quantile(0.5, minimum=0), ValueError, "minimum must be at least 1, not 0"),
        (lambda: Quantile(0.5, minimum=129), ValueError, "minimum must be at most 128, not 129"),
        (lambda: Quantile(0.5, default=0), ValueError, "default must be a finite number above 0, not 0"),
        (lambda: Quantile(0.5, age=-1), ValueError, "age must be a finite number above 0, not -1"),
    ],
)
def test_settings_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message


def test_it_describes_itself() -> None:
    policy = Hedge(1, name="h", idempotent=True)
    assert policy.describe() == {"name": "h", "after": 1.0, "extra": 1, "idempotent": True, "sync": None}
    assert policy.delay == 1.0


def test_plain_functions_and_generators_must_choose() -> None:
    def plain() -> None: ...

    def gen() -> Iterator[int]:
        yield 1

    for function in (plain, gen):
        with pytest.raises(TypeError, match=r"cannot cancel the loser: say Hedge\(\.\.\., sync='thread'\)"):
            Hedge(1.0, idempotent=True)(function)


# -- who wins ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("plans", "extra", "result", "took", "log"),
    [
        ((0.5,), 1, 0.5, 0.5, [0.5]),
        ((5.0, 0.5), 1, 0.5, 1.5, [5.0, 0.5, "5.0 cancelled"]),
        ((1.25, 5.0), 1, 1.25, 1.25, [1.25, 5.0, "5.0 cancelled"]),
        ((5.0, 5.5, 0.5), 2, 0.5, 2.5, [5.0, 5.5, 0.5, "5.0 cancelled", "5.5 cancelled"]),
        ((-0.5,), 1, ValueError, 0.5, [-0.5]),
        ((-2.0, 3.0), 1, 3.0, 4.0, [-2.0, 3.0]),
        ((5.0, -1.0), 1, 5.0, 5.0, [5.0, -1.0]),
        ((-3.0, -1.0), 1, ValueError, 3.0, [-3.0, -1.0]),
        ((-2.0, -3.0), 1, ValueError, 4.0, [-2.0, -3.0]),
        ((5.0, -1.5, 0.5), 2, 0.5, 2.5, [5.0, -1.5, 0.5, "5.0 cancelled"]),
    ],
)
def test_the_first_success_wins(run: Any, plans: Any, extra: int, result: Any, took: float, log: list[Any]) -> None:
    bench = Bench(*plans, extra=extra)
    if result is ValueError:
        with pytest.raises(ValueError) as caught:
            run(bench.call)
        assert caught.value.args == ({(-0.5,): -0.5, (-3.0, -1.0): -1.0, (-2.0, -3.0): -2.0}[plans],)
    else:
        assert run(bench.call) == result
    assert bench.clock.now() == took
    assert bench.log[: len(plans)] == log[: len(plans)]
    assert sorted(map(str, bench.log)) == sorted(map(str, log))
    assert bench.policy.started == len(plans) - 1
    assert bench.policy.won == (result in plans[1:])
    assert [(e.attempt, e.after) for e in bench.events.of(Hedged)] == [(n + 1, float(n)) for n in range(1, len(plans))]


@both
def test_no_extra_attempt_past_the_deadline(run: Any) -> None:
    bench = Bench(3.0)

    async def main() -> None:
        with deadline(1.0, clock=bench.clock):
            assert await bench.call() == 3.0

    run(main)
    assert bench.policy.started == 0


@both
def test_grit_a_cancelled_caller_leaves_no_orphan(run: Any) -> None:
    """Cancelling a hedged call cancels all its attempts, and ends only when they have ended (grit: both run on)."""
    for first in (5.0, -1.5):
        bench = Bench(first, 5.0)

        async def main(bench: Bench = bench) -> None:
            if run is trio.run:
                with trio.CancelScope() as scope:
                    bench.clock.call_at(2.0, scope.cancel)
                    await bench.call()
                assert scope.cancelled_caught
            else:
                task = asyncio.ensure_future(bench.call())
                await bench.clock.asleep(2.0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        run(main)
        assert "5.0 cancelled" in bench.log
        assert bench.log.count("5.0 cancelled") == (2 if first > 0 else 1)
        assert bench.policy.won == 0


@both
def test_context_variables_are_copied(run: Any) -> None:
    bench = Bench()
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    seen: list[int] = []

    @bench.guard
    async def call() -> None:
        seen.append(variable.get())
        variable.set(variable.get() + 1)
        await bench.clock.asleep(1.5)

    async def main() -> None:
        variable.set(7)
        await call()

    run(main)
    assert seen == [7, 7]


def test_losers_are_awaited_however_long_they_take() -> None:
    """The caller goes on only when the loser's clean-up is done, and a cancel meanwhile is not lost."""
    for cancel in (False, True):
        bench = Bench()
        log: list[str] = []
        numbers = iter((1, 2))

        @bench.guard
        async def call(log: list[str] = log, bench: Bench = bench, numbers: Iterator[int] = numbers) -> int:
            number = next(numbers)
            try:
                await bench.clock.asleep(1.5 if number == 1 else 9.0)
            finally:
                if number == 2:
                    await bench.clock.asleep(3.0)
                    log.append("cleaned")
            return number

        async def main(call: Any = call, log: list[str] = log, bench: Bench = bench, cancel: bool = cancel) -> None:
            task = asyncio.ensure_future(call())
            await bench.clock.asleep(2.0)
            if cancel:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                assert await task == 1
            assert log == ["cleaned"]
            assert bench.clock.now() == 4.5

        run_asyncio(main)


def test_a_first_attempt_that_swallows_the_cancel_loses_all_the_same() -> None:
    bench = Bench()
    numbers = iter((1, 2))

    @bench.guard
    async def call() -> int:
        number = next(numbers)
        try:
            await bench.clock.asleep(9.0 if number == 1 else 0.5)
        except asyncio.CancelledError:
            pass
        return number

    assert run_asyncio(call) == 2
    assert bench.policy.won == 1


@pytest.mark.parametrize("order", ["first", "late"])
def test_a_cancel_beside_our_own_stays_one(order: str) -> None:
    """The caller is cancelled in the same tick in which an extra attempt wins."""
    bench = Bench()
    numbers = iter((1, 2))
    caller: list[asyncio.Task[int]] = []

    @bench.guard
    async def call() -> int:
        if next(numbers) == 1:
            try:
                await bench.clock.asleep(9.0)
            finally:
                if order == "late":
                    caller[0].cancel()
        elif order == "first":
            caller[0].cancel()
        return 2

    async def main() -> None:
        caller.append(asyncio.ensure_future(call()))
        with pytest.raises(asyncio.CancelledError):
            await caller[0]

    run_asyncio(main)


@both
@pytest.mark.parametrize("who", [1, 2])
def test_what_is_no_failure_comes_out_at_once(run: Any, who: int) -> None:
    """A BaseException of an attempt concerns the caller: it is neither outvoted nor wrapped."""
    bench = Bench()
    numbers = iter((1, 2))

    class Stop(BaseException):
        pass

    @bench.guard
    async def call() -> int:
        number = next(numbers)
        await bench.clock.asleep(9.0 if number != who else 1.5 if who == 1 else 0.5)
        raise Stop

    with pytest.raises(Stop):
        run(call)
    assert bench.clock.now() == 1.5


def test_a_closed_coroutine_cancels_the_others() -> None:
    bench = Bench(9.0, 9.0)

    async def main() -> None:
        made: Any = bench.call()
        made.send(None)
        bench.clock.advance(1.0)
        await turn()
        made.close()
        await turn()
        await turn()
        assert bench.log == [9.0, 9.0, "9.0 cancelled", "9.0 cancelled"]

    asyncio.run(main())


@both
def test_a_stream_races_until_its_first_item(run: Any) -> None:
    """The losers' streams are closed, those that answered too late included."""
    bench = Bench()
    numbers = iter((1, 2))
    log: list[str] = []

    @bench.guard
    async def items() -> AsyncGenerator[int, None]:
        number = next(numbers)
        try:
            try:
                await bench.clock.asleep(5.0 if number == 1 else 0.5)
            except asyncio.CancelledError:
                log.append("swallowed")
            yield number
            yield number * 10
        finally:
            log.append(f"closed {number}")

    async def main() -> None:
        assert [item async for item in items()] == [2, 20]

    run(main)
    assert sorted(log) == ["closed 1", "closed 2", *(["swallowed"] if run is run_asyncio else [])]


def test_errors_of_losers_are_nobodys() -> None:
    bench = Bench()
    numbers = iter((1, 2))

    @bench.guard
    async def items() -> AsyncGenerator[int, None]:
        number = next(numbers)
        try:
            try:
                await bench.clock.asleep(5.0 if number == 1 else 0.5)
            except asyncio.CancelledError:
                pass
            yield number
        finally:
            if number == 1:
                raise ZeroDivisionError

    async def main() -> None:
        assert [item async for item in items()] == [2]

    run_asyncio(main)


@both
def test_frames_do_not_linger(run: Any) -> None:
    class Payload:
        pass

    held: list[weakref.ref[Payload]] = []
    bench = Bench()
    numbers = iter((1, 2, 1, 2))

    @bench.guard
    async def call(second: str) -> int:
        payload = Payload()
        held.append(weakref.ref(payload))
        number = next(numbers)
        await bench.clock.asleep(2.0)
        if number == 1 or second == "fails":
            raise ValueError(payload)
        return number

    async def main() -> None:
        try:
            await call("fails")
        except ValueError:
            pass
        assert await call("wins") == 2
        await bench.clock.asleep(0.1)
        assert [ref() for ref in held] == [None] * 4

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


# -- learning ----------------------------------------------------------------------------------------------------------


def test_a_quantile_is_exact_over_what_is_recent() -> None:
    latencies = Latencies(Quantile(0.9, minimum=10, default=5.0, age=60.0))
    for n in range(9):
        latencies.add(0.0, float(n + 1))
        assert latencies.delay == 5.0
    latencies.add(0.0, 10.0)
    assert latencies.delay == 9.0
    for n in range(300):
        latencies.add(20.0 + n / 100, 22.0 + n / 100)
    assert latencies.delay == 2.0
    latencies.add(1000.0, 1001.0)
    assert latencies.delay == 5.0  # too few are left that are not too old


def test_cancelled_losers_do_not_bias() -> None:
    """What was cut off above the delay counts as above it; what was cut off below it says nothing."""
    latencies = Latencies(Quantile(0.5, minimum=1))
    latencies.failed(0.0, 9.0, asyncio.CancelledError())
    assert latencies.delay is None
    latencies.add(0.0, 1.0)
    latencies.failed(0.0, 9.0, ValueError())
    latencies.failed(0.0, 0.5, asyncio.CancelledError())
    assert len(latencies._recent) == 1
    latencies.failed(0.0, 1.5, asyncio.CancelledError())
    assert latencies._recent == [1.0, 1.5]


@both
def test_a_learned_delay_hedges_what_is_late(run: Any) -> None:
    bench = Bench(*[0.5] * 5, 9.0, 0.25, after=Quantile(0.95, minimum=5))

    async def main() -> None:
        for _ in range(5):
            assert bench.policy.delay is None
            assert await bench.call() == 0.5
        assert bench.policy.delay == 0.5
        assert await bench.call() == 0.25

    run(main)
    assert bench.clock.now() == 2.5 + 0.75
    assert (bench.policy.started, bench.policy.won) == (1, 1)


def test_a_learned_delay_for_plain_functions() -> None:
    bench = Bench(after=Quantile(0.5, minimum=2), sync="thread")

    @bench.guard
    def call(fail: bool) -> int:
        bench.clock.sleep(0.5)
        if fail:
            raise ValueError
        return 1

    call(False)
    with pytest.raises(ValueError):
        call(True)
    assert bench.policy.delay is None
    call(False)
    assert bench.policy.delay == 0.5


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_race_and_losers_are_strays() -> None:
    bench = Bench(sync="thread", max_stray=1)
    numbers, release, made = iter((1, 2, 3)), threading.Event(), threading.Event()

    @bench.guard
    def call() -> int:
        number = next(numbers)
        if number == 1:
            release.wait()
            made.set()
        return number

    assert call() == 2
    assert (bench.policy.started, bench.policy.won, bench.policy.stray) == (1, 1, 1)
    assert call() == 3  # no more hedging while a stray is under way, but no refusal either
    release.set()
    assert made.wait(60)
    settle(lambda: bench.policy.stray == 0)


def test_threads_fail_together_or_not_at_all() -> None:
    for plans, result in ((("wait", "fail"), "first"), (("wait fail", "fail"), KeyError)):
        bench = Bench(sync="thread")
        turns, go = iter(plans), threading.Event()

        @bench.guard
        def call(turns: Iterator[str] = turns, go: threading.Event = go) -> str:
            what = next(turns)
            if "wait" in what:
                go.wait()
            if what == "fail":
                go.set()
                raise KeyError
            if "fail" in what:
                raise IndexError
            return "first"

        if isinstance(result, str):
            assert call() == result
        else:
            with pytest.raises((KeyError, IndexError)):
                call()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_an_interrupt_in_a_thread_is_the_callers(kind: type[BaseException]) -> None:
    bench = Bench(sync="thread")

    @bench.guard
    def call() -> None:
        raise kind

    with pytest.raises(kind):
        call()


def test_generators_race_in_threads_until_the_first_item() -> None:
    bench = Bench(sync="thread")
    numbers, release, closed = iter((1, 2)), threading.Event(), threading.Event()

    @bench.guard
    def items() -> Generator[int, None, None]:
        number = next(numbers)
        try:
            if number == 1:
                release.wait()
            yield number
            yield number * 10
        finally:
            if number == 1:
                closed.set()
                raise ZeroDivisionError  # the errors of losers are nobody's

    assert list(items()) == [2, 20]
    release.set()
    assert closed.wait(60)
    settle(lambda: bench.policy.stray == 0)


def test_an_answer_that_nobody_read_is_cleaned_up() -> None:
    """Both answer before the caller looks: one is returned, the other one's generator is closed."""
    bench = Bench(sync="thread")
    both_in, closed = threading.Barrier(2), []
    plain_wait: Callable[..., bool] = bench.clock.wait
    calls: list[int] = []

    def wait(acquire: Any, seconds: Any) -> bool:
        calls.append(1)
        if len(calls) == 1:
            return False
        settle(lambda: finished() == 2)
        return plain_wait(acquire, seconds)

    def finished() -> int:
        return len(done)

    done: list[int] = []
    bench.clock.wait = wait  # type: ignore[method-assign]

    @bench.guard
    def items() -> Generator[int, None, None]:
        try:
            both_in.wait(60)
            done.append(1)
            yield 1
        finally:
            closed.append(1)

    assert list(items()) == [1]
    settle(lambda: len(closed) == 2 and bench.policy.stray == 0)


def test_a_failure_in_a_thread_comes_out_at_once() -> None:
    bench = Bench(sync="thread")

    @bench.guard
    def call() -> None:
        raise ValueError(1)

    with pytest.raises(ValueError, match=r"^1$"):
        call()
    assert bench.policy.started == 0


def test_the_ambient_deadline_reaches_the_threads() -> None:
    from resilient import remaining

    bench = Bench(sync="thread")

    @bench.guard
    def ask() -> float | None:
        return remaining()

    assert ask() is None
    with deadline(0.5, clock=bench.clock):
        assert ask() == 0.5


def test_one_policy_under_two_clocks_and_no_clock_but_the_systems() -> None:
    policy = Hedge(60.0, idempotent=True)

    async def call() -> int:
        return 1

    first: Callable[[], Awaitable[int]] = policy(call)
    assert asyncio.run(first()) == 1  # type: ignore[arg-type]
    assert run_asyncio(Pipeline(policy, env=Env(FakeClock()))(call)) == 1


def test_a_coroutine_that_nobody_runs_in_a_task_is_refused() -> None:
    @Hedge(1.0, idempotent=True)
    async def call() -> None: ...

    coroutine = call()
    with pytest.raises(RuntimeError, match="Hedge needs a task of asyncio or trio"):
        coroutine.send(None)
