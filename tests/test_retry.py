"""`Retry`: what is tried again, when, and what the caller gets in the end."""

from __future__ import annotations

import asyncio
import gc
import random  # noqa: TID251
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity
import trio
import trio.testing

import resilient
from resilient import BulkheadFull, Env, Pipeline, Rejected, Retry, deadline
from resilient.testing import FakeClock, Recorder, instant
from tests.worlds import World, worlds


class Script:
    """A function that ends each call as its script says: errors are raised, all else is returned."""

    def __init__(self, *outcomes: Any, clock: FakeClock | None = None, takes: float = 0.0) -> None:
        self.outcomes, self.calls, self.clock, self.takes = list(outcomes), 0, clock, takes

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.clock is not None:
            self.clock.advance(self.takes)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


Driver = Callable[[Retry, Script, Env], Any]


def by_call(policy: Retry, script: Script, env: Env) -> Any:
    def function() -> Any:
        return script()

    return Pipeline(policy, env=env)(function)()


def by_await(policy: Retry, script: Script, env: Env) -> Any:
    async def function() -> Any:
        return script()

    return asyncio.run(Pipeline(policy, env=env)(function)())


def by_trio(policy: Retry, script: Script, env: Env) -> Any:
    async def function() -> Any:
        return script()

    return trio.run(Pipeline(policy, env=env)(function))


def by_generator(policy: Retry, script: Script, env: Env) -> Any:
    def function() -> Generator[Any, None, None]:
        yield script()

    return next(Pipeline(policy, env=env)(function)())


def by_stream(policy: Retry, script: Script, env: Env) -> Any:
    async def function() -> AsyncGenerator[Any, None]:
        yield script()

    async def main() -> Any:
        async for item in Pipeline(policy, env=env)(function)():
            return item
        return None

    return asyncio.run(main())


def by_block(policy: Retry, script: Script, env: Env) -> Any:
    value: Any = None
    for attempt in policy.block(env):
        with attempt:
            value = attempt.result(script())
    return value


def by_async_block(policy: Retry, script: Script, env: Env) -> Any:
    async def main() -> Any:
        value: Any = None
        async for attempt in policy.block(env):
            async with attempt:
                value = attempt.result(script())
        return value

    return asyncio.run(main())


FUNCTIONS = [by_call, by_await, by_trio]
DRIVERS = [*FUNCTIONS, by_generator, by_stream, by_block, by_async_block]
everywhere = pytest.mark.parametrize("drive", DRIVERS)
where_results_are = pytest.mark.parametrize("drive", [*FUNCTIONS, by_block, by_async_block])


@everywhere
def test_it_tries_again_until_it_works(drive: Driver) -> None:
    clock, script = FakeClock(), Script(ConnectionError(), ConnectionError(), "fine")
    assert drive(Retry(ConnectionError, wait=2.0), script, Env(clock)) == "fine"
    assert (script.calls, clock.slept) == (3, [2.0, 2.0])


@everywhere
def test_the_last_error_comes_out_itself_with_a_note(drive: Driver) -> None:
    """The user's own exception, never a wrapper (hyx: one that hides the cause, after 4 calls for attempts=3)."""
    clock, last = FakeClock(), ConnectionError("last")
    script = Script(ConnectionError("1"), ConnectionError("2"), last)
    with pytest.raises(ConnectionError) as caught:
        drive(Retry(ConnectionError, wait=0.6), script, Env(clock))
    assert caught.value is last
    assert last.__notes__ == ["resilient: attempt 3 of 3, 1.2 s"]
    assert last.__context__ is None
    assert script.calls == 3


@everywhere
def test_other_errors_come_out_at_once_without_a_note(drive: Driver) -> None:
    error = KeyError("other")
    script, clock = Script(error), FakeClock()
    with pytest.raises(KeyError) as caught:
        drive(Retry(ConnectionError), script, Env(clock))
    assert (caught.value, script.calls, clock.slept) == (error, 1, [])
    assert not hasattr(error, "__notes__")


@everywhere
def test_another_error_ends_the_retries(drive: Driver) -> None:
    script = Script(ConnectionError(), KeyError("other"))
    with pytest.raises(KeyError):
        drive(Retry(ConnectionError, wait=0), script, Env(FakeClock()))
    assert script.calls == 2


@pytest.mark.parametrize("drive", [by_call, by_await, by_block, by_async_block])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_tenacity_529_cancellation_is_never_retried(drive: Driver, interrupt: type[BaseException]) -> None:
    """tenacity#529: `retry_if_not_exception_type` retries CancelledError and KeyboardInterrupt."""
    script = Script(interrupt())
    with pytest.raises(interrupt):
        drive(Retry(lambda error: True, wait=0), script, Env(FakeClock()))
    assert script.calls == 1


def test_several_classes_and_predicates() -> None:
    env = Env(FakeClock())
    several = Retry((ConnectionError, TimeoutError), wait=0)
    assert by_call(several, Script(ConnectionError(), TimeoutError(), 1), env) == 1
    chosen = Retry(lambda error: "again" in str(error), wait=0)
    assert by_call(chosen, Script(ValueError("again"), 1), env) == 1
    with pytest.raises(ValueError, match="never"):
        by_call(chosen, Script(ValueError("never")), env)


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_the_default_wait_is_exponential_with_full_jitter() -> None:
    """random() * min(10, 0.1 * 2**(n-1)): each call draws its own, from the generator of its environment."""
    clock, dice = FakeClock(), random.Random(7)
    with pytest.raises(ConnectionError):
        by_call(Retry(ConnectionError, attempts=12), Script(ConnectionError()), Env(clock, dice))
    again = random.Random(7)
    assert clock.slept == [again.random() * min(10.0, 0.1 * 2.0**n) for n in range(11)]


def test_an_unlimited_number_of_attempts_does_not_overflow() -> None:
    """Polly#2163: infinite retries produced negative delays."""
    clock = FakeClock()
    with pytest.raises(ConnectionError):
        by_call(Retry(ConnectionError, attempts=3000), Script(ConnectionError()), Env(clock))
    assert all(0 <= delay <= 10.0 for delay in clock.slept)


@everywhere
def test_a_wait_of_zero_is_no_sleep(drive: Driver) -> None:
    """time.sleep(0) costs 70 us."""

    class NoSleep(FakeClock):
        def sleep(self, seconds: float) -> None:
            pytest.fail("slept")

        async def asleep(self, seconds: float) -> None:
            pytest.fail("slept")

    assert drive(Retry(ConnectionError, wait=0), Script(ConnectionError(), 1), Env(NoSleep())) == 1


def test_hyx_concurrent_calls_share_no_backoff_state() -> None:
    """hyx: one backoff iterator for all calls; three concurrent calls drew 1, 2, 4, 8 … 256 s."""
    clock = FakeClock()
    calls: dict[int, list[float]] = {}

    async def main() -> None:
        @Pipeline(Retry(ConnectionError, attempts=4, wait=1.0), env=Env(clock))
        async def fails(key: int) -> None:
            calls.setdefault(key, []).append(clock.now())
            raise ConnectionError

        await asyncio.gather(*(fails(key) for key in range(3)), return_exceptions=True)

    asyncio.run(main())
    assert calls == {key: [0.0, 1.0, 2.0, 3.0] for key in range(3)}


# -- time limits -----------------------------------------------------------------------------------------------------


@everywhere
def test_total_bounds_the_whole(drive: Driver) -> None:
    """tenacity#423: stop_after_delay overshoots, 7 s for a limit of 5 s. A wait that does not fit is not begun."""
    clock = FakeClock()
    script = Script(ConnectionError(), clock=clock, takes=1.0)
    with pytest.raises(ConnectionError):
        drive(Retry(ConnectionError, attempts=100, wait=1.0, total=5.0), script, Env(clock))
    assert (script.calls, clock.now()) == (3, 5.0)


@everywhere
def test_no_wait_is_longer_than_the_ambient_deadline(drive: Driver) -> None:
    clock = FakeClock()
    script = Script(ConnectionError(), clock=clock, takes=1.0)
    with deadline(4.0, clock=clock), pytest.raises(ConnectionError):
        drive(Retry(ConnectionError, attempts=100, wait=1.0), script, Env(clock))
    assert (script.calls, clock.now()) == (2, 3.0)


def test_total_is_ambient_for_everything_inside() -> None:
    clock = FakeClock()
    seen: list[float | None] = []

    @Pipeline(Retry(ConnectionError, total=5.0, wait=1.0), env=Env(clock))
    def inside() -> None:
        seen.append(resilient.remaining())
        if len(seen) < 2:
            raise ConnectionError

    inside()
    assert seen == [5.0, 4.0]
    assert resilient.remaining() is None


# -- results ---------------------------------------------------------------------------------------------------------


@where_results_are
def test_until_judges_results(drive: Driver) -> None:
    script = Script(None, None, "ready")
    assert drive(Retry(ConnectionError, until=bool, wait=0, attempts=5), script, Env(FakeClock())) == "ready"
    assert script.calls == 3


@where_results_are
def test_errors_are_judged_beside_results(drive: Driver) -> None:
    clock, script = FakeClock(), Script(ConnectionError(), None, ConnectionError(), "ready")
    policy = Retry(ConnectionError, until=bool, wait=1.0, attempts=5)
    assert drive(policy, script, Env(clock)) == "ready"
    assert clock.slept == [1.0, 1.0, 1.0]
    assert drive(policy, Script("at once"), Env(clock)) == "at once"
    with pytest.raises(KeyError):
        drive(policy, Script(KeyError()), Env(clock))


@where_results_are
def test_the_last_result_is_returned_when_until_is_never_true(drive: Driver) -> None:
    script, recorder = Script(0), Recorder()
    policy = Retry(ConnectionError, until=bool, wait=0, name="r")
    assert drive(policy, script, Env(FakeClock(), sinks=[recorder])) == 0
    assert script.calls == 3
    assert recorder.of(resilient.GaveUp) == [resilient.GaveUp("r", 3, 0.0, None)]


def test_until_judges_the_first_item_and_what_it_refuses_is_closed() -> None:
    closed: list[int] = []
    items = iter([0, 0, 5, 0, 0, 0])

    def generator() -> Generator[int, None, None]:
        item = next(items)
        try:
            yield item
            yield 9
        finally:
            closed.append(item)

    policy = Retry(ConnectionError, until=bool, wait=1.0)
    guarded = Pipeline(policy, env=Env(FakeClock()))(generator)
    assert list(guarded()) == [5, 9]
    assert closed == [0, 0, 5]
    last = guarded()
    assert (next(last), closed) == (0, [0, 0, 5, 0, 0])
    assert list(last) == [9]


def test_until_judges_the_first_item_of_streams() -> None:
    closed: list[int] = []

    async def main(*firsts: int, **settings: Any) -> list[int]:
        items = iter(firsts)

        async def stream() -> AsyncGenerator[int, None]:
            item = next(items)
            try:
                yield item
            finally:
                closed.append(item)

        policy = Retry(ConnectionError, until=bool, wait=1.0, **settings)
        return [item async for item in Pipeline(policy, env=Env(FakeClock()))(stream)()]

    assert asyncio.run(main(0, 0, 5)) == [5]
    assert asyncio.run(main(0, 0, 5, total=9.0)) == [5]
    assert asyncio.run(main(0, 0, 0)) == [0]
    assert closed == [0, 0, 5, 0, 0, 5, 0, 0, 0]


def test_a_generator_without_items_is_not_refused() -> None:
    def generator() -> Generator[int, None, str]:
        return "end"
        yield

    assert list(Retry(ConnectionError, until=bool)(generator)()) == []


def test_blocks_without_a_result_are_good_as_they_end() -> None:
    turns = 0
    for attempt in Retry(ConnectionError, until=bool):
        with attempt:
            turns += 1
    assert turns == 1


# -- Retry-After -----------------------------------------------------------------------------------------------------


def response(value: Any, name: str = "Retry-After") -> Any:
    return SimpleNamespace(headers={name: value})


def failed_with(**attributes: Any) -> ConnectionError:
    error = ConnectionError()
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
DATE = format_datetime(EPOCH + timedelta(seconds=7), usegmt=True)


@pytest.mark.parametrize(
    ("error", "slept"),
    [
        (failed_with(retry_after=7), 7.0),
        (failed_with(retry_after=2.5), 2.5),
        (failed_with(retry_after=timedelta(seconds=7)), 7.0),
        (failed_with(retry_after="7"), 7.0),
        (failed_with(response=response("7")), 7.0),
        (failed_with(response=response(b"7")), 7.0),
        (failed_with(response=response("7", "retry-after")), 7.0),
        (failed_with(response=response(DATE)), 7.0),
        (failed_with(response=response(DATE.replace("GMT", "-0000"))), 7.0),
        (failed_with(headers={"Retry-After": "7"}), 7.0),
        (failed_with(retry_after=60), 60.0),
        (failed_with(retry_after=0.1), 1.0),
        (failed_with(retry_after=-7), 1.0),
        (failed_with(retry_after=float("nan")), 1.0),
        (failed_with(retry_after=float("inf")), 1.0),
        (failed_with(retry_after=True), 1.0),
        (failed_with(retry_after=[7]), 1.0),
        (failed_with(response=response("soon")), 1.0),
        (failed_with(response=response(None)), 1.0),
        (failed_with(response=response(format_datetime(EPOCH - timedelta(seconds=7), usegmt=True))), 1.0),
        (failed_with(response=None), 1.0),
    ],
)
@pytest.mark.parametrize("drive", [by_call, by_await])
def test_nopanic_retry_after_is_honoured_in_every_form(drive: Driver, error: Exception, slept: float) -> None:
    """nopanic honours a numeric attribute only: not strings, dates or headers. Never earlier, up to the cap."""
    clock = FakeClock(epoch=EPOCH.timestamp())
    assert drive(Retry(ConnectionError, wait=1.0), Script(error, "ok"), Env(clock)) == "ok"
    assert clock.slept == [pytest.approx(slept)]


def test_retry_after_can_be_turned_off_and_its_cap_moved() -> None:
    for cap, slept in ((None, 1.0), (0, 1.0), (100.0, 90.0)):
        clock = FakeClock()
        policy = Retry(ConnectionError, wait=1.0, retry_after=cap)
        assert by_call(policy, Script(failed_with(retry_after=90), 1), Env(clock)) == 1
        assert clock.slept == [slept]


@everywhere
def test_who_asks_for_more_than_the_cap_is_asked_again_after_the_cap(drive: Driver) -> None:
    """An hour is too long to hold a caller: the cap bounds what a server can make it wait."""
    clock = FakeClock()
    script = Script(failed_with(retry_after=3600), 1)
    assert drive(Retry(ConnectionError, wait=1.0), script, Env(clock)) == 1
    assert clock.slept == [60.0]


class Coarse(FakeClock):
    """A clock whose first timer fires 15 ms early."""

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds - 0.015 if len(self.slept) == 1 else seconds)

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.mark.parametrize("drive", [by_call, by_await])
def test_dotnet_extensions_7001_no_retry_before_retry_after(drive: Driver) -> None:
    """dotnet/extensions#7001: a coarse timer made retries up to 11 ms before Retry-After."""
    clock = Coarse()
    assert drive(Retry(ConnectionError, wait=0), Script(failed_with(retry_after=5), 1), Env(clock)) == 1
    assert clock.now() >= 5.0
    assert clock.slept == [5.0, pytest.approx(0.015)]
    plain = Coarse()
    assert drive(Retry(ConnectionError, wait=5.0), Script(ConnectionError(), 1), Env(plain)) == 1
    assert plain.slept == [5.0]


class Hostile(ConnectionError):
    """Looking at it raises."""

    @property
    def response(self) -> Any:
        raise RuntimeError("no response was set")


@pytest.mark.parametrize(
    "error",
    [
        Hostile(),
        failed_with(retry_after=10**400),
        failed_with(retry_after=lambda: 7),
        failed_with(headers={"Retry-After": "1e1"}),
        failed_with(headers={"Retry-After": "1_0"}),
        failed_with(headers={"Retry-After": "\u0663"}),
        failed_with(headers={"Retry-After": "Fri, 32 Foo 2026 99:99:99 GMT"}),
        failed_with(headers=["Retry-After", "7"]),
        failed_with(headers=SimpleNamespace(get=7)),
        failed_with(response=SimpleNamespace(headers=SimpleNamespace(get=lambda name: 1 / 0))),
    ],
)
def test_what_makes_no_sense_as_retry_after_says_nothing(error: Exception) -> None:
    clock = FakeClock()
    assert by_call(Retry(ConnectionError, wait=1.0), Script(error, "ok"), Env(clock)) == "ok"
    assert clock.slept == [1.0]


def test_the_first_place_that_makes_sense_is_believed() -> None:
    clock = FakeClock(epoch=EPOCH.timestamp())
    asctime = (EPOCH + timedelta(seconds=9)).strftime("%a %b %d %H:%M:%S %Y")
    error = failed_with(retry_after=lambda: 5, headers={"Retry-After": "no"}, response=response(asctime))
    assert by_call(Retry(ConnectionError, wait=1.0), Script(error, "ok"), Env(clock)) == "ok"
    assert clock.slept == [9.0]


def test_a_refused_response_may_say_when_to_come_back() -> None:
    clock, busy = FakeClock(), response("5")
    policy = Retry(ConnectionError, wait=1.0, until=lambda answer: answer == "ok")
    assert by_call(policy, Script(busy, "ok"), Env(clock)) == "ok"
    assert clock.slept == [5.0]


def test_a_retry_after_that_does_not_fit_ends_the_retries() -> None:
    clock = FakeClock()
    with pytest.raises(ConnectionError):
        by_call(Retry(ConnectionError, wait=0, total=5.0), Script(failed_with(retry_after=7)), Env(clock))
    assert clock.slept == []


# -- refusals --------------------------------------------------------------------------------------------------------


def test_nopanic_an_open_breaker_fails_fast_under_retry() -> None:
    """nopanic: with the default `on=Exception` a call on an open circuit sleeps until the circuit's retry_after."""
    clock, refusal = FakeClock(), BulkheadFull("b", 5.0)
    with pytest.raises(BulkheadFull):
        by_call(Retry(Exception), Script(refusal), Env(clock))
    assert clock.slept == []


@pytest.mark.parametrize("on", [BulkheadFull, (Exception, Rejected), lambda error: isinstance(error, BulkheadFull)])
def test_refusals_that_are_named_are_retried_when_they_say(on: Any) -> None:
    clock = FakeClock()
    assert by_call(Retry(on, wait=0), Script(BulkheadFull("b", 5.0), 1), Env(clock)) == 1
    assert clock.slept == [5.0]


def test_a_foreign_class_names_refusals_too() -> None:
    """`BreakerOpen` is a `pybreaker.CircuitBreakerError`: who writes that class means it."""
    import pybreaker

    refusal = resilient.BreakerOpen("b", 2.0)
    clock = FakeClock()
    assert by_call(Retry(pybreaker.CircuitBreakerError, wait=0), Script(refusal, 1), Env(clock)) == 1
    assert clock.slept == [2.0]
    with pytest.raises(resilient.BreakerOpen):
        by_call(Retry(resilient.ResilientError, wait=0), Script(refusal, 1), Env(FakeClock()))


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_count_their_attempts() -> None:
    numbers: list[int] = []
    for attempt in Retry(ConnectionError, wait=0):
        with attempt as same:
            assert same is attempt
            numbers.append(attempt.number)
            if attempt.number < 3:
                raise ConnectionError
    assert numbers == [1, 2, 3]


def test_what_is_begun_can_be_iterated_on() -> None:
    begun = iter(Retry(ConnectionError, wait=0))
    assert iter(begun) is begun
    abegun = aiter(Retry(ConnectionError, wait=0))
    assert aiter(abegun) is abegun


def test_a_block_that_forgets_its_with_runs_once() -> None:
    assert [attempt.number for attempt in Retry(ConnectionError)] == [1]

    async def main() -> list[int]:
        return [attempt.number async for attempt in Retry(ConnectionError)]

    assert asyncio.run(main()) == [1]


def test_tenacity_93_several_tasks_iterate_one_retry() -> None:
    """tenacity#93: `__aiter__` returns self; four tasks of three attempts came out as 2, 2, 2, 1."""
    policy = Retry(ConnectionError, wait=1.0)

    async def one() -> int:
        turns = 0
        async for attempt in policy.block(env):
            with attempt:
                turns += 1
                await clock.asleep(0.1)
                if turns < 3:
                    raise ConnectionError
        return turns

    async def main() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(4)))

    clock = FakeClock()
    env = Env(clock)
    assert asyncio.run(main()) == [3, 3, 3, 3]


def test_tenacity_701_threads_share_no_attempt_numbers() -> None:
    """tenacity#701: concurrent calls share and clear one statistics dict."""
    policy, gate = Retry(ConnectionError, attempts=5, wait=0), threading.Barrier(4)
    seen: list[list[int]] = []

    def work() -> None:
        numbers: list[int] = []
        gate.wait()
        for attempt in policy:
            with attempt:
                numbers.append(attempt.number)
                if attempt.number < 5:
                    raise ConnectionError
        seen.append(numbers)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[1, 2, 3, 4, 5]] * 4


@pytest.mark.parametrize("run", [asyncio.run, trio.run])
def test_an_async_block_may_be_left_in_any_way(run: Callable[..., Any]) -> None:
    """An async generator would wait for the garbage collector: trio warns, asyncio makes a task to close it."""

    async def nothing() -> None:
        async for attempt in Retry(ConnectionError, wait=0):
            async with attempt:
                break

    async def main() -> None:
        await nothing()
        with pytest.raises(KeyError):
            async for attempt in Retry(ConnectionError, wait=0):
                with attempt:
                    raise KeyError
        with pytest.raises(ConnectionError):
            async for attempt in Retry(ConnectionError, wait=0):
                async with attempt:
                    raise ConnectionError
        if run is asyncio.run:
            assert len(asyncio.all_tasks()) == 1

    run(main) if run is trio.run else run(main())
    gc.collect()


@pytest.mark.parametrize("judged", [False, True])
def test_interrupts_leave_a_block_at_once(judged: bool) -> None:
    async def main() -> None:
        async for attempt in Retry(ConnectionError, wait=0):
            async with attempt:
                attempt.result(judged)
                raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    turns = 0
    with pytest.raises(KeyboardInterrupt):
        for attempt in Retry(ConnectionError, wait=0):
            with attempt:
                turns += 1
                raise KeyboardInterrupt
    assert turns == 1


# -- cancellation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(6))
def test_cancelled_at_every_await_it_stays_cancelled(steps: int) -> None:
    """In an attempt or in a wait: no further attempt is made."""

    async def main() -> None:
        clock = FakeClock(autojump=False)
        calls = 0

        @Pipeline(Retry(ConnectionError, attempts=5, wait=1.0), env=Env(clock))
        async def fails() -> None:
            nonlocal calls
            calls += 1
            await clock.asleep(1.0)
            raise ConnectionError

        task = asyncio.create_task(fails())
        for _ in range(3):
            await asyncio.tasks.sleep(0)
        for _ in range(steps):
            clock.advance(1.0)
            for _ in range(3):
                await asyncio.tasks.sleep(0)
        before = calls
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert calls == before

    asyncio.run(main())


@worlds
@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("form", ["function", "block"])
def test_cancelled_at_every_step_no_attempt_is_made_any_more(world: World, steps: int, form: str) -> None:
    """tenacity#529, in both libraries: in an attempt or in a wait, a cancelled call is over."""
    clock, calls = FakeClock(autojump=False), 0
    policy = Retry(lambda error: True, attempts=5, wait=1.0)

    async def fails() -> None:
        nonlocal calls
        calls += 1
        await clock.asleep(1.0)
        raise ConnectionError

    async def blocks() -> None:
        async for attempt in policy.block(Env(clock)):
            async with attempt:
                await fails()

    async def main() -> None:
        async with world() as tasks:
            guarded = Pipeline(policy, env=Env(clock))(fails)
            task = tasks.spawn(guarded if form == "function" else blocks)
            await tasks.settle()
            for _ in range(steps):
                clock.advance(1.0)
                await tasks.settle()
            before = calls
            task.cancel()
            await tasks.settle()
            clock.advance(100.0)
            await tasks.settle()
            assert task.done
            assert not isinstance(task.error, Exception)
            assert calls == before == 1 + steps // 2

    world.run(main)


def test_a_trio_cancel_scope_ends_the_wait() -> None:
    async def main() -> None:
        clock = FakeClock(autojump=False)

        @Pipeline(Retry(ConnectionError, wait=100.0), env=Env(clock))
        async def fails() -> None:
            raise ConnectionError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert clock.slept == [100.0]

    trio.run(main)


# -- events and frames -----------------------------------------------------------------------------------------------


def test_events_say_what_was_tried() -> None:
    recorder, error = Recorder(), ConnectionError()
    env = Env(FakeClock(), sinks=[recorder])
    with pytest.raises(ConnectionError):
        by_call(Retry(ConnectionError, attempts=2, wait=1.5, name="r"), Script(error), env)
    assert recorder.events == [resilient.Retrying("r", 1, 1.5, error), resilient.GaveUp("r", 2, 1.5, error)]


def by_hand(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it suspended")


LEAN: dict[str, Callable[[], Retry]] = {
    "plain": lambda: Retry(ConnectionError, wait=0),
    "total": lambda: Retry(ConnectionError, wait=0, total=9.0),
    "until": lambda: Retry(ConnectionError, wait=0, until=lambda value: True),
    "both": lambda: Retry(ConnectionError, wait=0, until=lambda value: True, total=9.0),
    "strategy": lambda: Retry(tenacity.retry_if_exception_type(ConnectionError), wait=0),
    "adopted": lambda: Retry.adopt(tenacity.Retrying(stop=tenacity.stop_after_attempt(3))),
    "reraise": lambda: Retry.adopt(tenacity.Retrying(stop=tenacity.stop_after_attempt(3), reraise=True)),
    "callback": lambda: Retry.adopt(
        tenacity.Retrying(stop=tenacity.stop_after_attempt(3), retry_error_callback=lambda state: None)
    ),
}


@pytest.mark.parametrize("drive", [by_call, by_await, by_generator, by_stream, by_block, by_async_block])
@pytest.mark.parametrize("make", LEAN.values(), ids=LEAN.keys())
@pytest.mark.parametrize("last", [None, KeyError, ConnectionError], ids=["recovers", "another", "exhausted"])
def test_no_frame_lingers_until_gc(
    monkeypatch: pytest.MonkeyPatch, drive: Driver, make: Callable[[], Retry], last: type[Exception] | None
) -> None:
    """A cycle of exception, traceback and frame would keep the arguments of failed calls alive."""
    # asyncio's own frames do linger.
    monkeypatch.setattr(asyncio, "run", by_hand)
    policy = make()
    if drive in (by_generator, by_stream) and make is LEAN["callback"]:
        return  # it does not guard generators

    class Big:
        pass

    alive: list[weakref.ref[Big]] = []

    class Failing(Script):
        def __call__(self, *args: Any) -> Any:
            big = Big()
            alive.append(weakref.ref(big))
            self.calls += 1
            if self.calls % 3:
                raise ConnectionError
            if last is not None:
                raise last

    gc.disable()
    try:
        for _ in range(2):
            try:
                drive(policy, Failing(), Env(FakeClock()))
            except (KeyError, ConnectionError, tenacity.RetryError):
                pass
        assert [ref() for ref in alive] == [None] * 6
    finally:
        gc.enable()


def test_instant_needs_no_second_nap() -> None:
    """Under `instant()` the clock stands still, so waiting for Retry-After must not go on for ever."""
    with instant():
        assert Retry(ConnectionError)(Script(failed_with(retry_after=30), 1))() == 1


def test_methods_in_both_decorator_orders() -> None:
    class Service:
        calls = 0

        @Retry(ConnectionError, wait=0)
        @classmethod
        def outside(cls) -> int:
            cls.calls += 1
            if cls.calls < 3:
                raise ConnectionError
            return cls.calls

        @Retry(ConnectionError, wait=0)
        def method(self, x: int) -> tuple[int, int]:
            self.calls += 1
            if self.calls % 3:
                raise ConnectionError
            return self.calls, x

        @Retry(ConnectionError, wait=0)
        @staticmethod
        def static_outside(x: Script) -> Any:
            return x()

        @staticmethod
        @Retry(ConnectionError, wait=0)
        def static_inside(x: Script) -> Any:
            return x()

        @classmethod
        @Retry(ConnectionError, wait=0)
        def inside(cls) -> int:
            cls.calls -= 1
            if cls.calls > 1:
                raise ConnectionError
            return cls.calls

    assert (Service.outside(), Service.inside()) == (3, 1)
    service = Service()
    service.calls = 0
    assert service.method(7) == (3, 7)
    assert Service.static_outside(Script(ConnectionError(), 1)) == 1
    assert service.static_inside(Script(ConnectionError(), 2)) == 2


def failing_with(error: Exception, times: int, policy: Retry) -> None:
    def function() -> None:
        raise error

    guarded = Pipeline(policy, env=Env(FakeClock()))(function)
    for _ in range(times):
        with pytest.raises(type(error)):
            guarded()


def test_an_error_that_is_raised_again_and_again_has_one_note_of_ours() -> None:
    error = ConnectionError()
    error.add_note("mine")
    failing_with(error, 3, Retry(ConnectionError, wait=0.5))
    assert error.__notes__ == ["mine", "resilient: attempt 3 of 3, 1.0 s"]


def test_an_error_that_takes_no_note_is_still_the_one_that_comes_out() -> None:
    """A frozen dataclass refuses the attribute: its own error must not be replaced by that."""

    @dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    failing_with(Frozen(3), 1, Retry(Frozen, wait=0))


@everywhere
def test_an_error_that_ends_the_retries_says_that_there_were_some(drive: Driver) -> None:
    error, recorder = KeyError("other"), Recorder()
    env = Env(FakeClock(), sinks=[recorder])
    with pytest.raises(KeyError):
        drive(Retry(ConnectionError, wait=0.5, name="r"), Script(ConnectionError(), error), env)
    assert error.__notes__ == ["resilient: attempt 2 of 3, 0.5 s; not retried"]
    assert recorder.of(resilient.GaveUp) == [resilient.GaveUp("r", 2, 0.5, error)]


def test_the_note_says_when_there_was_no_time() -> None:
    error = ConnectionError()
    failing_with(error, 1, Retry(ConnectionError, wait=7.0, total=5.0))
    assert error.__notes__ == [
        "resilient: attempt 1 of 3, 0.0 s; a wait of 7 s does not fit into the 5 s that are left"
    ]


# -- settings that make no sense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"on": 3}, TypeError, "on must be exception classes or predicates, not 3"),
        ({"on": "Exception"}, TypeError, "on must be exception classes or predicates, not 'Exception'"),
        ({"on": int}, TypeError, "on must be exception classes or predicates, not <class 'int'>"),
        ({"on": ()}, ValueError, "on must name at least one error"),
        ({"on": BaseException}, ValueError, "on must be subclasses of Exception, not BaseException"),
        ({"on": (ValueError, KeyboardInterrupt)}, ValueError, "not KeyboardInterrupt: cancellation and interrupts"),
        ({"attempts": 0}, ValueError, "attempts must be at least 1, not 0"),
        ({"attempts": 2.0}, TypeError, "attempts must be an integer, not 2.0"),
        ({"attempts": True}, TypeError, "attempts must be an integer, not True"),
        ({"wait": -1}, ValueError, "wait must be a finite number of at least 0, not -1"),
        ({"wait": float("nan")}, ValueError, "wait must be a finite number of at least 0, not nan"),
        ({"wait": "1"}, TypeError, "wait must be seconds or a tenacity wait strategy, not '1'"),
        ({"wait": True}, TypeError, "wait must be a number, not True"),
        ({"stop": tenacity.stop_never, "attempts": 3}, TypeError, "stop replaces attempts: leave attempts=3 out"),
        ({"stop": 3}, TypeError, "stop must be a tenacity stop strategy, not 3"),
        ({"total": 0}, ValueError, "total must be a finite number above 0, not 0"),
        ({"retry_after": -1}, ValueError, "retry_after must be a finite number of at least 0, not -1"),
        ({"until": 3}, TypeError, "until must be a function of the result, not 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        made: dict[str, Any] = {"on": ConnectionError, **settings}
        Retry(**made)
    assert text in str(caught.value)


def test_async_predicates_are_refused() -> None:
    """tenacity: an async predicate on a sync function is always true."""

    async def predicate(value: Any) -> bool:
        return False

    with pytest.raises(TypeError, match=r"on must answer at once, and .*predicate is a coroutine function"):
        Retry(predicate)
    with pytest.raises(TypeError, match=r"until must answer at once, and .*predicate is a coroutine function"):
        Retry(ConnectionError, until=predicate)  # type: ignore[arg-type] # pyright: ignore


def test_what_turns_out_to_be_async_is_refused_when_it_answers() -> None:
    """A coroutine is always true: it would be retried for ever."""

    async def predicate(value: Any) -> bool:
        return False

    for policy in (Retry(lambda error: predicate(error)), Retry(ConnectionError, until=lambda value: predicate(value))):  # type: ignore[arg-type, return-value] # pyright: ignore
        with pytest.raises(TypeError, match=r"must answer at once, and it returned a coroutine"):
            by_call(policy, Script(KeyError()) if policy.until is None else Script(1), Env(FakeClock()))

    class Predicate:
        async def __call__(self, value: Any) -> bool:
            return False

    for one, name in ((partial(predicate), "predicate"), (Predicate(), "__call__")):
        with pytest.raises(TypeError, match=f"on must answer at once, and .*{name} is a coroutine function"):
            Retry(one)


def test_it_describes_itself() -> None:
    policy = Retry(ConnectionError, wait=1)
    assert repr(policy) == "Retry(on=ConnectionError, attempts=3, wait=1.0)"
    assert policy.describe()["name"] is None
