"""Never faster than agreed, in the order of asking, by any clock, from any thread, loop or trio run."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import trio
from aiolimiter import AsyncLimiter
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from resilient import DeadlineExceeded, Env, Pipeline, RateLimited, RateLimiter, deadline, ratelimit
from resilient.events import Refused
from resilient.testing import FakeClock, Recorder
from tests.worlds import World, turn, worlds


class Still(FakeClock):
    """A clock that stands still: it notes for how long it was to sleep, and goes on at once."""

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def asleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture(params=[True, False], ids=["with a GIL", "free-threaded"], autouse=True)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything must hold on the path without a lock and on the one with it."""
    monkeypatch.setattr(ratelimit, "_ATOMIC", request.param)


def on(clock: FakeClock, limiter: RateLimiter, *sinks: Any) -> RateLimiter:
    """The limiter, bound to the clock."""

    def nothing() -> None: ...

    Pipeline(limiter, env=Env(clock=clock, sinks=sinks))(nothing)
    return limiter


# -- construction ----------------------------------------------------------------------------------------------------

ABOVE = " must be a finite number above 0, not "
BEYOND = " is beyond what a clock can tell: at most 1e9 calls a second, in bursts of at most 1e15"


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"rate": 0}, ValueError, "rate" + ABOVE + "0"),
        ({"rate": -1.0}, ValueError, "rate" + ABOVE + "-1.0"),
        ({"rate": float("nan")}, ValueError, "rate" + ABOVE + "nan"),
        ({"rate": float("inf")}, ValueError, "rate" + ABOVE + "inf"),
        ({"rate": True}, TypeError, "rate must be a number, not True"),
        ({"rate": "5"}, TypeError, "rate must be a number, not '5'"),
        ({"rate": 1, "per": 0}, ValueError, "per" + ABOVE + "0"),
        ({"rate": 1, "per": None}, TypeError, "per must be a number, not None"),
        ({"rate": 1, "burst": 0}, ValueError, "burst must be at least 1, not 0"),
        ({"rate": 1, "burst": 1.5}, TypeError, "burst must be an integer, not 1.5"),
        ({"rate": 1, "max_wait": -1}, ValueError, "max_wait must be a finite number of at least 0, not -1"),
        ({"rate": 2e9}, ValueError, "rate=2000000000.0, per=1.0, burst=2000000000" + BEYOND),
        ({"rate": 1, "per": 1e-10}, ValueError, "rate=1, per=1e-10, burst=1" + BEYOND),
        ({"rate": 1e-200, "per": 1e200}, ValueError, "rate=1e-200, per=1e+200, burst=1" + BEYOND),
        ({"rate": 1, "burst": 10**16}, ValueError, "rate=1, per=1.0, burst=10000000000000000" + BEYOND),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        RateLimiter(**arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize(("rate", "burst"), [(10, 10), (2.5, 2), (0.2, 1), (1, 1)])
def test_the_burst_defaults_to_the_rate_rounded_down_and_at_least_one(rate: float, burst: int) -> None:
    assert RateLimiter(rate).burst == burst


def test_it_describes_itself() -> None:
    limiter = RateLimiter(10, per=60, burst=3, max_wait=None, name="api")
    assert limiter.describe() == {"name": "api", "rate": 10.0, "per": 60.0, "burst": 3, "max_wait": None}
    assert repr(limiter) == "RateLimiter(name='api', rate=10.0, per=60.0, burst=3)"
    assert limiter.role == "limiter"


# -- every kind of function ------------------------------------------------------------------------------------------


def test_a_function_is_refused_when_it_is_early() -> None:
    clock, recorder = FakeClock(1000.0), Recorder()
    limiter = RateLimiter(2, per=4.0)

    @Pipeline(limiter, env=Env(clock=clock, sinks=[recorder]))
    def work(a: int, *, b: int) -> int:
        return a + b

    assert (work(1, b=2), work(2, b=2)) == (3, 4)
    assert recorder.events == []
    with pytest.raises(RateLimited) as caught:
        work(1, b=2)
    assert (caught.value.policy, caught.value.retry_after) == (limiter.name, 2.0)
    assert recorder.events == [Refused(str(limiter.name), caught.value)]
    assert (limiter.rejected, limiter.level, limiter.available) == (1, 2.0, 0.0)
    clock.advance(1.999)
    with pytest.raises(RateLimited):
        work(1, b=2)
    clock.advance(0.001)
    assert work(1, b=2) == 3
    assert clock.slept == []


@worlds
def test_a_coroutine_is_refused_when_it_is_early(world: World) -> None:
    clock = FakeClock(1000.0)
    limiter = RateLimiter(1, per=4.0)

    @Pipeline(limiter, env=Env(clock=clock))
    async def work(a: int, *, b: int) -> int:
        return a + b

    async def main() -> None:
        assert await work(1, b=2) == 3
        with pytest.raises(RateLimited) as caught:
            await work(1, b=2)
        assert caught.value.retry_after == 4.0
        clock.advance(4.0)
        assert await work(1, b=2) == 3

    world.run(main)
    assert limiter.rejected == 1


def test_a_generator_takes_its_permit_at_the_first_item() -> None:
    clock = FakeClock()
    limiter = RateLimiter(1)

    @Pipeline(limiter, env=Env(clock=clock))
    def numbers() -> Generator[int, None, None]:
        yield 1
        yield 2

    assert limiter.level == 0.0
    assert list(numbers()) == [1, 2]
    assert limiter.level == 1.0
    with pytest.raises(RateLimited):
        next(numbers())


@worlds
def test_a_stream_takes_its_permit_at_the_first_item(world: World) -> None:
    clock = FakeClock()
    limiter = RateLimiter(1)

    @Pipeline(limiter, env=Env(clock=clock))
    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    async def main() -> None:
        assert [i async for i in numbers()] == [1, 2]
        with pytest.raises(RateLimited):
            async with aclosing(numbers()) as refused:
                await anext(refused)

    world.run(main)


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_everybody_sleeps_once_and_exactly_as_long_as_it_takes() -> None:
    """The order is the order of asking: each delay is longer by one interval. What is due at once does not sleep."""
    clock = Still()
    limiter = RateLimiter(4, burst=2, max_wait=None)

    @Pipeline(limiter, env=Env(clock=clock))
    def work() -> None: ...

    for _ in range(6):
        work()
    assert clock.slept == [0.25, 0.5, 0.75, 1.0]
    assert (limiter.level, limiter.available) == (6.0, 0.0)


@worlds
def test_tasks_run_when_their_permits_fall_due(world: World) -> None:
    clock = FakeClock()
    limiter = RateLimiter(1, max_wait=None)
    ran: list[tuple[int, float]] = []

    @Pipeline(limiter, env=Env(clock=clock))
    async def work(number: int) -> None:
        ran.append((number, clock.now()))

    async def main() -> None:
        async with world() as here:
            for number in range(4):
                here.spawn(partial(work, number))
                await here.step()

    world.run(main)
    assert [at for _, at in ran] == [0.0, 1.0, 2.0, 3.0]


def test_a_wait_beyond_max_wait_is_refused_and_reserves_nothing() -> None:
    clock = Still()
    limiter = RateLimiter(1, max_wait=2.0)

    @Pipeline(limiter, env=Env(clock=clock))
    def work() -> None: ...

    for _ in range(3):
        work()
    assert clock.slept == [1.0, 2.0]
    for _ in range(3):
        with pytest.raises(RateLimited) as caught:
            work()
        assert caught.value.retry_after == 1.0
    assert limiter.level == 3.0
    clock.advance(1.0)
    work()
    assert clock.slept == [1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("max_wait", "ambient", "error"),
    [
        (None, 0.5, DeadlineExceeded),
        (2.0, 0.5, DeadlineExceeded),
        (0.25, 0.5, RateLimited),
        (None, 0.0, DeadlineExceeded),
        (0.0, 0.0, RateLimited),
        (2.0, 1.0, None),
    ],
)
@worlds
def test_nobody_waits_past_the_ambient_deadline(
    world: World, max_wait: float | None, ambient: float, error: type[Exception] | None
) -> None:
    """It is refused at once, with nothing reserved, not put to sleep for a turn that it will not live to see."""
    clock, recorder = FakeClock(), Recorder()
    limiter = RateLimiter(1, max_wait=max_wait)
    pipeline = Pipeline(limiter, env=Env(clock=clock, sinks=[recorder]))

    @pipeline
    def work() -> None: ...

    @pipeline
    async def awork() -> None: ...

    async def main() -> None:
        with deadline(ambient, clock=clock):
            await awork()
            if error is None:
                await awork()
                return
            for _ in range(2):
                with pytest.raises(error):
                    await awork()
                with pytest.raises(error):
                    work()

    world.run(main)
    assert (clock.now(), limiter.level) == ((0.0, 1.0) if error else (1.0, 1.0))
    assert [type(event.error) for event in recorder.of(Refused)] == ([error] * 4 if error else [])


@worlds
@pytest.mark.parametrize("others", [0, 1])
def test_who_is_cancelled_gives_back_unless_others_are_behind(world: World, others: int) -> None:
    clock = FakeClock(autojump=False)
    limiter = RateLimiter(1, max_wait=None)

    @Pipeline(limiter, env=Env(clock=clock))
    async def work() -> None: ...

    async def main() -> None:
        await work()
        async with world() as here:
            first = here.spawn(work)
            await here.settle()
            behind = [here.spawn(work) for _ in range(others)]
            await here.settle()
            assert limiter.level == 2.0 + others
            first.cancel()
            await here.settle()
            assert first.done
            assert limiter.level == 1.0 + 2 * others
            clock.advance(2.0)
            await here.settle()
            assert all(handle.done for handle in behind)

    world.run(main)
    assert limiter.available == 1.0 - others


def test_an_interrupt_in_a_sleep_gives_back() -> None:
    class Interrupted(FakeClock):
        def sleep(self, seconds: float) -> None:
            raise KeyboardInterrupt

    limiter = on(Interrupted(), RateLimiter(1))
    limiter.acquire_sync()
    with pytest.raises(KeyboardInterrupt):
        limiter.acquire_sync()
    assert limiter.level == 1.0


# -- an AsyncLimiter -------------------------------------------------------------------------------------------------


def test_it_is_an_async_limiter() -> None:
    limiter = RateLimiter(10, 60)
    assert isinstance(limiter, AsyncLimiter)
    assert (limiter.max_rate, limiter.time_period) == (10, 60)


def stock() -> AsyncLimiter:
    return AsyncLimiter(3, 0.001)


def ours() -> AsyncLimiter:
    return on(FakeClock(), RateLimiter(3, 0.001))


@pytest.mark.parametrize("make", [stock, ours])
def test_code_written_for_an_async_limiter_works_unchanged(make: Callable[[], AsyncLimiter]) -> None:
    async def main() -> None:
        limiter = make()
        assert limiter.has_capacity()
        assert limiter.has_capacity(limiter.max_rate)
        assert not limiter.has_capacity(4)
        for _ in range(5):
            await limiter.acquire()
        for _ in range(5):
            async with limiter:
                pass
        await limiter.acquire(3)
        await limiter.acquire(0.5)
        for amount in (4, -1, float("nan")):
            with pytest.raises(ValueError):
                await limiter.acquire(amount)

    asyncio.run(main())


def test_an_amount_is_from_zero_to_the_burst() -> None:
    limiter = on(FakeClock(), RateLimiter(9, burst=3))
    with pytest.raises(ValueError) as caught:
        limiter.try_acquire(3.5)
    assert str(caught.value) == "amount must be a number from 0 to 3 (the burst), not 3.5"
    with pytest.raises(ValueError):
        limiter.acquire_sync(-1)
    assert limiter.try_acquire(3)
    assert limiter.try_acquire(0)
    assert not limiter.try_acquire(0.1)


@worlds
def test_acquire_waits_unless_told_otherwise(world: World) -> None:
    """A decorator refuses by default; a word that says wait waits. Each can be told how long."""
    clock = FakeClock()
    limiter = on(clock, RateLimiter(2, burst=1))

    async def main() -> None:
        await limiter.acquire()
        await limiter.acquire()
        assert clock.now() == 0.5
        async with limiter:
            assert clock.now() == 1.0
        with pytest.raises(RateLimited) as caught:
            await limiter.acquire(max_wait=0.25)
        assert caught.value.retry_after == 0.25
        with pytest.raises(RateLimited):
            await limiter.acquire(max_wait=0)
        await limiter.acquire(max_wait=0.5)
        assert clock.now() == 1.5

    world.run(main)
    limiter.acquire_sync()
    with limiter:
        assert clock.now() == 2.5
    with pytest.raises(RateLimited):
        limiter.acquire_sync(max_wait=0.25)
    with pytest.raises(ValueError, match="max_wait must be a finite number of at least 0, not -1"):
        limiter.acquire_sync(max_wait=-1)


def test_a_max_wait_of_its_own_holds_for_acquire_too() -> None:
    limiter = on(FakeClock(), RateLimiter(1, max_wait=0.5))
    with limiter, pytest.raises(RateLimited) as caught:
        limiter.acquire_sync()
    assert caught.value.retry_after == 0.5
    waiting = on(FakeClock(), RateLimiter(1, max_wait=None))
    for _ in range(3):
        waiting.acquire_sync()


def test_without_a_decorated_function_it_goes_by_the_clock_of_the_system() -> None:
    limiter = RateLimiter(1, per=3600.0)
    assert limiter.try_acquire()
    assert not limiter.try_acquire()
    assert not limiter.has_capacity()
    assert limiter.has_capacity(0)
    with pytest.raises(RateLimited) as caught:
        limiter.acquire_sync(max_wait=1)
    assert caught.value.policy == "RateLimiter"


# -- somebody else's limiter -----------------------------------------------------------------------------------------


def test_a_stock_limiter_is_adopted_for_coroutines() -> None:
    foreign = AsyncLimiter(2, 3600)
    policy = RateLimiter.adopt(foreign)

    @policy
    async def work() -> str:
        return "done"

    @policy
    async def items() -> AsyncGenerator[str, None]:
        yield "item"

    async def main() -> None:
        assert await work() == "done"
        assert [item async for item in items()] == ["item"]
        assert not foreign.has_capacity()

    asyncio.run(main())
    assert policy.role == "limiter"
    assert policy.describe() == {"name": policy.name, "rate": 2, "per": 3600}


def test_a_stock_limiter_waits_no_longer_than_the_ambient_deadline() -> None:
    recorder = Recorder()
    policy: Any = RateLimiter.adopt(AsyncLimiter(1, 3600))

    @Pipeline(policy, env=Env(sinks=[recorder]))
    async def work() -> None: ...

    async def main() -> None:
        await work()
        with deadline(0.001), pytest.raises(DeadlineExceeded):
            await work()
        with deadline(60.0), pytest.raises(DeadlineExceeded), deadline(0.0):
            await work()

    asyncio.run(main())
    assert (len(recorder.of(Refused)), policy.rejected) == (2, 2)


@pytest.mark.parametrize("kind", ["sync", "gen"])
def test_a_stock_limiter_cannot_guard_plain_functions(kind: str) -> None:
    def plain() -> None: ...

    def items() -> Generator[int, None, None]:
        yield 1

    with pytest.raises(TypeError) as caught:
        RateLimiter.adopt(AsyncLimiter(5, 2.0))({"sync": plain, "gen": items}[kind])
    assert str(caught.value) == "an aiolimiter.AsyncLimiter guards coroutines only: use RateLimiter(5, 2.0)"


def test_adopting_is_for_limiters() -> None:
    limiter = RateLimiter(1)
    assert RateLimiter.adopt(limiter) is limiter
    nothing: Any = None
    with pytest.raises(TypeError, match=r"limiter must be an aiolimiter.AsyncLimiter, not None"):
        RateLimiter.adopt(nothing)


# -- many at once ----------------------------------------------------------------------------------------------------


def test_the_path_without_a_lock_and_the_one_with_it_see_each_other() -> None:
    """Some threads come by the decorator, others by `try_acquire`: together they get the burst, no more, no less."""
    limiter = RateLimiter(40000)
    done: list[None] = []
    asked: list[int] = []

    @Pipeline(limiter, env=Env(clock=FakeClock(1e6)))
    def work() -> None:
        done.append(None)

    def decorated() -> None:
        barrier.wait()
        for _ in range(12000):
            try:
                work()
            except RateLimited:
                pass

    def asking() -> None:
        barrier.wait()
        asked.append(sum(limiter.try_acquire() for _ in range(12000)))

    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=body, daemon=True) for body in (decorated, decorated, asking, asking)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (len(done) + sum(asked), limiter.level) == (40000, 40000.0)


def test_threads_get_exactly_the_burst_while_the_clock_stands_still() -> None:
    limiter = RateLimiter(1000, burst=1000)
    done: list[None] = []

    @Pipeline(limiter, env=Env(clock=FakeClock(1e6)))
    def work() -> None:
        done.append(None)

    def many() -> None:
        barrier.wait()
        for _ in range(600):
            try:
                work()
            except RateLimited:
                pass

    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=many, daemon=True) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (len(done), limiter.rejected, limiter.level) == (1000, 1400, 1000.0)


def test_threads_loops_and_trio_share_one_limiter() -> None:
    """Every reservation is another: nobody gets a turn that somebody else has, whatever world he lives in."""
    clock = Still(5e5)
    limiter = RateLimiter(1, burst=1, max_wait=None)
    pipeline = Pipeline(limiter, env=Env(clock=clock))
    barrier = threading.Barrier(6)
    rounds = 40

    @pipeline
    def work() -> None: ...

    @pipeline
    async def awork() -> None: ...

    def in_thread() -> None:
        barrier.wait()
        for _ in range(rounds):
            work()

    def in_asyncio() -> None:
        async def main() -> None:
            for _ in range(rounds):
                await awork()
                await turn()

        barrier.wait()
        asyncio.run(main())

    def in_trio() -> None:
        async def main() -> None:
            for _ in range(rounds):
                await awork()
                await trio.lowlevel.checkpoint()

        barrier.wait()
        trio.run(main)

    threads = [
        threading.Thread(target=body, daemon=True)
        for body in (in_thread, in_thread, in_thread, in_asyncio, in_asyncio, in_trio)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(clock.slept) == [float(number) for number in range(1, 6 * rounds)]


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 1.0 / 3.0, 1e5 + 0.1, 1e9 + 0.7])
@pytest.mark.parametrize(("rate", "per"), [(10, 1.0), (3, 1.0), (7, 0.001), (10, 86400.0), (1000, 1e-3)])
def test_a_burst_is_a_burst_at_any_hour(start: float, rate: int, per: float) -> None:
    """No clock is so old, and no period so odd, that rounding makes ten of nine, or nine of ten."""
    clock = FakeClock(start)
    limiter = on(clock, RateLimiter(rate, per))
    for _ in range(3):
        assert sum(limiter.try_acquire() for _ in range(2 * rate)) == rate
        clock.advance(per * 1.001)


def test_a_call_at_exactly_retry_after_goes_through() -> None:
    clock = FakeClock(12345.678)
    limiter = on(clock, RateLimiter(7, 0.3))
    for _ in range(7):
        limiter.acquire_sync()
    for _ in range(500):
        with pytest.raises(RateLimited) as caught:
            limiter.acquire_sync(max_wait=0)
        clock.advance(caught.value.retry_after or 0.0)
        assert limiter.try_acquire()


def test_a_limiter_that_was_idle_for_long_gives_one_burst_and_no_more() -> None:
    clock = FakeClock()
    limiter = on(clock, RateLimiter(100))
    assert limiter.try_acquire(100)
    clock.advance(1e12)
    assert (limiter.level, limiter.available) == (0.0, 100.0)
    assert sum(limiter.try_acquire() for _ in range(300)) == 100


def test_a_clock_that_was_read_too_early_refuses_nobody() -> None:
    """What it read is earlier than the last admission. Time goes forward, so it counts as that moment."""
    readings = iter([10.0, 9.5, 10.0, 10.5])
    clock = FakeClock()
    clock.now = lambda: next(readings)  # type: ignore[method-assign]
    limiter = on(clock, RateLimiter(1, burst=2))
    assert [limiter.try_acquire() for _ in range(3)] == [True, True, False]
    assert limiter.level == 1.5


class Gcra(RuleBasedStateMachine):
    """The limiter against a token bucket in exact fractions, on a grid where floats are exact too."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Still(float(2**20))
        self.limiter = on(self.clock, RateLimiter(8, burst=4))
        self.tokens = Fraction(4)

    @rule(sixteenths=st.integers(0, 40))
    def advance(self, sixteenths: int) -> None:
        self.clock.advance(sixteenths / 16)
        self.tokens = min(Fraction(4), self.tokens + Fraction(sixteenths * 8, 16))

    @rule(halves=st.integers(0, 8))
    def try_some(self, halves: int) -> None:
        amount = Fraction(halves, 2)
        granted = self.limiter.try_acquire(float(amount))
        assert granted is (self.tokens >= amount)
        if granted:
            self.tokens -= amount

    @rule(halves=st.integers(0, 8), patience=st.integers(0, 8))
    def wait_some(self, halves: int, patience: int) -> None:
        amount, delay = Fraction(halves, 2), Fraction(0)
        if self.tokens < amount:
            delay = (amount - self.tokens) / 8
        self.clock.slept.clear()
        if delay <= Fraction(patience, 8):
            self.limiter.acquire_sync(float(amount), max_wait=patience / 8)
            assert self.clock.slept == ([float(delay)] if delay else [])
            self.tokens -= amount
        else:
            with pytest.raises(RateLimited) as caught:
                self.limiter.acquire_sync(float(amount), max_wait=patience / 8)
            assert caught.value.retry_after == float(delay - Fraction(patience, 8))

    @rule(halves=st.integers(1, 8))
    def reserve_and_give_back(self, halves: int) -> None:
        amount = float(Fraction(halves, 2))
        delay, mark = self.limiter._bucket.reserve(self.clock.now(), amount, float("inf"))
        assert delay >= 0.0
        self.limiter._bucket.refund(mark, amount)

    @invariant()
    def the_same_level(self) -> None:
        assert Fraction(self.limiter.level) == 4 - self.tokens
        assert Fraction(self.limiter.available) == max(Fraction(0), self.tokens)
        assert self.limiter.has_capacity() is (self.tokens >= 1)


def test_against_a_naive_bucket() -> None:
    run_state_machine_as_test(Gcra, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))


@settings(max_examples=100, deadline=None)
@given(
    rate=st.floats(0.01, 1e4),
    per=st.floats(0.01, 1e4),
    burst=st.integers(1, 50),
    steps=st.lists(st.floats(0.0, 3.0), max_size=80),
)
def test_never_more_than_the_envelope(rate: float, per: float, burst: int, steps: list[float]) -> None:
    """Between any two admissions: at most rate * t + burst, by exact arithmetic and whatever the floats are."""
    clock = FakeClock(1e5)
    limiter = on(clock, RateLimiter(rate, per, burst=burst))
    admitted: list[Fraction] = []
    for step in steps:
        clock.advance(step * per / rate)
        while limiter.try_acquire():
            admitted.append(Fraction(clock.now()))
    grain = Fraction(1, 1000) if rate / per > 1e3 else Fraction(1, 10**5)
    for first in range(0, len(admitted), 7):
        for last in range(first, len(admitted)):
            count = last - first + 1
            assert count <= (admitted[last] - admitted[first]) * Fraction(rate) / Fraction(per) + burst + grain


# -- memory, observers -----------------------------------------------------------------------------------------------


def test_a_refusal_leaves_no_cycle() -> None:
    limiter = RateLimiter(1)

    class Thing:
        pass

    @Pipeline(limiter, env=Env(clock=FakeClock()))
    def work(thing: object) -> None: ...

    gc.disable()
    try:
        for _ in range(3):
            thing = Thing()
            gone = weakref.ref(thing)
            try:
                work(thing)
            except RateLimited:
                pass
            del thing
            assert gone() is None
    finally:
        gc.enable()
    assert limiter.rejected == 2


def test_an_observer_may_use_the_limiter() -> None:
    """Sinks are called outside the lock: from another thread, too, they find it free."""
    limiter = RateLimiter(1)
    seen: list[float] = []

    def sink(event: object) -> None:
        thread = threading.Thread(target=lambda: seen.append(limiter.level), daemon=True)
        thread.start()
        thread.join()

    on(FakeClock(), limiter, sink)
    limiter.acquire_sync()
    with pytest.raises(RateLimited):
        limiter.acquire_sync(max_wait=0)
    assert seen == [1.0]


# -- the faults of others --------------------------------------------------------------------------------------------


def test_aiolimiter_big_request_is_not_starved_by_small_ones() -> None:
    """aiolimiter queues by amount: acquire(10), first to ask, was served after 107 later acquire(1)."""
    clock = FakeClock()
    limiter = on(clock, RateLimiter(10))
    order: list[float] = []

    async def ask(amount: float) -> None:
        await limiter.acquire(amount)
        order.append(amount)

    async def main() -> None:
        await limiter.acquire(10)
        big = asyncio.create_task(ask(10))
        await turn()
        small = [asyncio.create_task(ask(1)) for _ in range(30)]
        await asyncio.gather(big, *small)

    asyncio.run(main())
    assert order == [10] + [1] * 30
    assert clock.now() == pytest.approx(4.0)


def test_aiolimiter_newcomers_do_not_barge() -> None:
    """In aiolimiter, whoever comes when capacity is free, and before the timer has run, overtakes those who wait."""
    clock = FakeClock(autojump=False)
    limiter = on(clock, RateLimiter(1))

    async def main() -> None:
        await limiter.acquire()
        waiting = asyncio.create_task(limiter.acquire())
        await turn()
        clock._now += 1.0  # The permit is due, but nobody has been woken.
        assert not limiter.has_capacity()
        assert not limiter.try_acquire()
        clock.advance(0.0)
        await waiting

    asyncio.run(main())


def test_aiolimiter_serves_two_loops_at_once() -> None:
    """aiolimiter belongs to its first loop: a second one gets a warning, or "attached to a different loop"."""
    clock = FakeClock()
    limiter = on(clock, RateLimiter(1))
    both = threading.Barrier(2)

    def loop() -> None:
        async def main() -> None:
            both.wait()
            for _ in range(3):
                async with limiter:
                    both.wait()

        asyncio.run(main())

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(limiter.acquire())
    trio.run(limiter.acquire)
    assert limiter.level > 0.0


def test_hyx_limiter_is_made_at_import_time() -> None:
    """hyx raises "no running event loop" where a token bucket is declared at import."""
    limiter = on(FakeClock(), RateLimiter(2))
    limiter.acquire_sync()
    asyncio.run(limiter.acquire())


def test_pyrate_limiter_polling_is_one_sleep_here() -> None:
    """Others poll, every 10 ms, until the bucket has room."""
    clock = FakeClock()
    limiter = on(clock, RateLimiter(1, per=1000.0))
    limiter.acquire_sync()
    limiter.acquire_sync()
    assert clock.slept == [1000.0]


def test_a_coroutine_leaks_and_fills_the_bucket_as_a_plain_function_does() -> None:
    """The same calls at the same instants: the two shells agree on every one."""
    instants = [0.0, 0.0, 0.0, 0.1, 0.5, 0.5, 0.75, 2.0, 2.0, 2.0, 2.0, 9.0, 9.25, 9.5, 9.5, 9.5, 9.75]
    outcomes: list[list[bool]] = []
    for kind in ("sync", "coro"):
        clock = FakeClock()
        guard = Pipeline(RateLimiter(4.0, burst=3), env=Env(clock=clock))

        @guard
        def plain() -> bool:
            return True

        @guard
        async def coro() -> bool:
            return True

        admitted: list[bool] = []
        for instant in instants:
            clock.advance(instant - clock.now())
            try:
                admitted.append(plain() if kind == "sync" else asyncio.run(coro()))
            except RateLimited:
                admitted.append(False)
        outcomes.append(admitted)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] == [True] * 3 + [False] + [True] * 2 + [True] * 4 + [False] + [True] * 6
