"""Every policy on every kind of callable, and all of them at once: what the function does is what the caller sees."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, ClassVar

import pytest
import trio

import resilient
from resilient import (
    Bulkhead,
    CircuitBreaker,
    Consecutive,
    Env,
    Fallback,
    Hedge,
    Pipeline,
    RateLimiter,
    Retry,
    SlowRate,
    Timeout,
)
from resilient.testing import FakeClock, Recorder

MAKE: dict[str, Callable[[], Any]] = {
    "Retry": lambda: Retry(ConnectionError),
    "Retry(total)": lambda: Retry(ConnectionError, total=30.0),
    "CircuitBreaker": lambda: CircuitBreaker("b"),
    "CircuitBreaker(Consecutive)": lambda: CircuitBreaker("c", Consecutive(50)),
    "CircuitBreaker(SlowRate)": lambda: CircuitBreaker("s", SlowRate(0.5, slower_than=2.0)),
    "Bulkhead": lambda: Bulkhead(4),
    "Bulkhead(queue)": lambda: Bulkhead(4, queue=4, max_wait=1.0),
    "RateLimiter": lambda: RateLimiter(1000),
    "Timeout(deadline)": lambda: Timeout(30.0, sync="deadline"),
    "Fallback": lambda: Fallback((), on=ConnectionError),
    "Hedge": lambda: Hedge(30.0, idempotent=True, sync="thread"),
    "all": lambda: Pipeline(
        Fallback((), on=ConnectionError),
        Hedge(30.0, idempotent=True, sync="thread"),
        Retry(ConnectionError),
        CircuitBreaker("all"),
        RateLimiter(1000),
        Bulkhead(4),
        Timeout(30.0, sync="deadline"),
    ),
}

every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def plain(a: int, b: int = 2, *, c: int = 3) -> tuple[int, int, int]:
    """Plain."""
    return a, b, c


async def coroutine(a: int, b: int = 2, *, c: int = 3) -> tuple[int, int, int]:
    """Coroutine."""
    return a, b, c


def generator(n: int) -> Generator[int, Any, str]:
    """Generator."""
    yield from range(n)
    return "end"


async def stream(n: int) -> AsyncGenerator[int, Any]:
    """Stream."""
    for i in range(n):
        yield i


async def collect(items: AsyncGenerator[Any, Any]) -> list[Any]:
    return [item async for item in items]


def both(main: Callable[[], Awaitable[None]]) -> None:
    """Run under asyncio, then under trio."""

    async def run() -> None:
        await main()

    asyncio.run(run())
    trio.run(run)


@every
def test_functions_of_all_four_kinds(make: Callable[[], Any]) -> None:
    policy = make()
    assert policy(plain)(1, c=4) == (1, 2, 4)
    assert list(policy(generator)(3)) == [0, 1, 2]

    async def main() -> None:
        assert await policy(coroutine)(1, c=4) == (1, 2, 4)
        assert await collect(policy(stream)(3)) == [0, 1, 2]

    both(main)


@every
@pytest.mark.parametrize("target", [plain, coroutine, generator, stream])
def test_what_a_function_is_stays(make: Callable[[], Any], target: Callable[..., Any]) -> None:
    wrapper = make()(target)
    assert (wrapper.__name__, wrapper.__doc__) == (target.__name__, target.__doc__)
    assert inspect.signature(wrapper) == inspect.signature(target)
    for question in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        assert question(wrapper) == question(target)
    assert resilient.inspect(wrapper)


@every
def test_methods_and_odd_callables(make: Callable[[], Any]) -> None:
    guard: Callable[[Any], Any] = make()

    class Holder:
        calls: ClassVar[int] = 0

        @guard
        def method(self, x: int) -> int:
            return x

        @guard
        @classmethod
        def cls_outside(cls, x: int) -> tuple[type, int]:
            return cls, x

        @classmethod
        @guard
        def cls_inside(cls, x: int) -> tuple[type, int]:
            return cls, x

        @guard
        @staticmethod
        def static_outside(x: int) -> int:
            return x

        @staticmethod
        @guard
        def static_inside(x: int) -> int:
            return x

        def __call__(self, x: int) -> int:
            return x

    class AsyncHolder:
        async def __call__(self, x: int) -> int:
            return x

    it = Holder()
    assert (it.method(1), Holder.cls_outside(2), it.cls_inside(3)) == (1, (Holder, 2), (Holder, 3))
    assert (it.static_outside(4), Holder.static_inside(5)) == (4, 5)
    assert guard(it)(6) == 6
    assert guard(it.__call__)(7) == 7
    assert guard(len)("abc") == 3
    assert guard(functools.partial(plain, 1))(c=5) == (1, 2, 5)
    assert guard(lambda x: x)(8) == 8

    async def main() -> None:
        assert await guard(AsyncHolder())(9) == 9
        assert await guard(functools.partial(coroutine, 1))(c=5) == (1, 2, 5)
        assert await guard(lambda x: coroutine(x))(1) == (1, 2, 3)

    both(main)


@every
def test_errors_come_out_as_they_went_in(make: Callable[[], Any]) -> None:
    error = KeyError("mine")

    def fails() -> int:
        raise error

    async def afails() -> int:
        raise error

    def gen_fails() -> Generator[int, None, None]:
        yield 1
        raise error

    async def stream_fails() -> AsyncGenerator[int, None]:
        yield 1
        raise error

    guard = make()
    with pytest.raises(KeyError) as caught:
        guard(fails)()
    assert caught.value is error
    with pytest.raises(KeyError) as caught:
        list(guard(gen_fails)())
    assert caught.value is error

    async def main() -> None:
        with pytest.raises(KeyError) as caught:
            await guard(afails)()
        assert caught.value is error
        with pytest.raises(KeyError) as caught:
            await collect(guard(stream_fails)())
        assert caught.value is error

    both(main)


@every
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_interrupts_are_forgotten(make: Callable[[], Any], interrupt: type[BaseException]) -> None:
    """They pass at once, are never retried, count as nothing, and give every permit back."""
    guard = make()
    ran = 0

    def stops() -> int:
        nonlocal ran
        ran += 1
        raise interrupt

    wrapped = guard(stops)
    for _ in range(20):
        with pytest.raises(interrupt):
            wrapped()
    assert ran == 20
    for policy in resilient.inspect(wrapped):
        if isinstance(policy, CircuitBreaker):
            assert policy.state == "closed"
            assert policy.failures == 0
        if isinstance(policy, Bulkhead):
            assert policy.active == 0
    assert guard(plain)(1) == (1, 2, 3)


@every
def test_a_generator_that_is_left_early_gives_everything_back(make: Callable[[], Any]) -> None:
    guard = make()
    wrapped, awrapped = guard(generator), guard(stream)
    for _ in range(10):
        held = wrapped(5)
        next(held)
        held.close()

    async def main() -> None:
        for _ in range(10):
            held = awrapped(5)
            await anext(held)
            await held.aclose()

    both(main)
    for policy in resilient.inspect(wrapped):
        if isinstance(policy, Bulkhead):
            assert policy.active == 0
        if isinstance(policy, CircuitBreaker):
            assert (policy.state, policy.failures) == ("closed", 0)
    assert list(wrapped(2)) == [0, 1]


@every
def test_one_object_serves_threads_two_loops_and_trio_at_once(make: Callable[[], Any]) -> None:
    guard = make()
    wrapped, awrapped = guard(plain), guard(coroutine)
    gate = threading.Barrier(4)
    results: list[Any] = []

    def threaded() -> None:
        gate.wait()
        results.extend(wrapped(i) for i in range(20))

    def looped(run: Callable[..., Any]) -> None:
        async def main() -> None:
            for i in range(20):
                results.append(await awrapped(i))  # noqa: PERF401

        gate.wait()
        run(main)

    async def nothing() -> None: ...

    def run_asyncio(main: Callable[[], Any]) -> None:
        asyncio.run(main())

    threads = [
        threading.Thread(target=threaded, daemon=True),
        threading.Thread(target=looped, args=(run_asyncio,), daemon=True),
        threading.Thread(target=looped, args=(run_asyncio,), daemon=True),
        threading.Thread(target=looped, args=(trio.run,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80


# -- together --------------------------------------------------------------------------------------------------------


def test_a_failing_dependency_is_retried_cut_off_and_answered_for() -> None:
    """Retry goes on until the breaker opens; then calls fail fast, without a wait; the fallback answers."""
    clock, recorder = FakeClock(), Recorder()
    breaker = CircuitBreaker("dependency", Consecutive(4), cooldown=30.0)
    calls = 0

    def down(x: int) -> int:
        nonlocal calls
        calls += 1
        raise ConnectionError

    guarded = Pipeline(
        Fallback(-1), Retry(Exception, attempts=3, wait=1.0), breaker, Bulkhead(2), env=Env(clock, sinks=[recorder])
    )(down)
    assert [guarded(1), guarded(1)] == [-1, -1]
    assert (calls, breaker.state) == (4, "open")
    slept = list(clock.slept)
    assert guarded(1) == -1
    assert (calls, clock.slept) == (4, slept)
    clock.advance(30.0)
    assert guarded(1) == -1
    assert (calls, breaker.state) == (5, "open")
    names = [type(event).__name__ for event in recorder.events]
    assert names.count("FellBack") == 4
    assert names.count("BreakerChanged") == 3


def test_recovery_closes_the_breaker() -> None:
    clock = FakeClock()
    breaker = CircuitBreaker("dependency", Consecutive(1), cooldown=10.0)
    healthy = False

    def service() -> str:
        if not healthy:
            raise ConnectionError
        return "ok"

    guarded = Pipeline(breaker, env=Env(clock))(service)
    with pytest.raises(ConnectionError):
        guarded()
    with pytest.raises(resilient.BreakerOpen) as refused:
        guarded()
    assert refused.value.retry_after == pytest.approx(10.0)
    assert refused.value.policy == "dependency"
    healthy = True
    clock.advance(10.0)
    assert guarded() == "ok"
    assert breaker.state == "closed"


def test_the_attempt_timeout_is_retried_and_the_slot_is_free_between_attempts() -> None:
    """A hung attempt is cut off, its slot comes back before the backoff, and the next attempt succeeds."""
    clock = FakeClock()
    slots = Bulkhead(1)
    free: list[int] = []
    attempts = 0

    async def main() -> None:
        async def hangs_once() -> str:
            nonlocal attempts
            attempts += 1
            free.append(slots.active)
            if attempts == 1:
                await clock.asleep(100.0)
            return "ok"

        guarded = Pipeline(Retry(TimeoutError, wait=0.5), slots, Timeout(2.0), env=Env(clock))(hangs_once)
        assert await guarded() == "ok"

    asyncio.run(main())
    assert (attempts, free, slots.active) == (2, [1, 1], 0)
    assert clock.now() == pytest.approx(2.5)


def test_a_deadline_reaches_through_the_whole_stack() -> None:
    """No policy sleeps or waits past it: the caller has an answer in time."""
    clock = FakeClock()

    async def main() -> None:
        async def slow() -> None:
            await clock.asleep(1.0)
            raise ConnectionError

        guarded = Pipeline(Timeout(5.0), Retry(ConnectionError, attempts=100, wait=1.5), Timeout(2.0), env=Env(clock))(
            slow
        )
        with pytest.raises((ConnectionError, TimeoutError)):
            await guarded()

    asyncio.run(main())
    assert clock.now() <= 5.0


def test_cancelling_a_full_stack_at_every_await_loses_nothing() -> None:
    """Cancelled at its first, second, … suspension, the stack gives back its slot and its probe."""

    async def main() -> None:
        for steps in range(12):
            breaker, slots = CircuitBreaker("b", Consecutive(1)), Bulkhead(1, queue=1)

            async def work() -> None:
                for _ in range(5):
                    await asyncio.tasks.sleep(0)

            guarded = Pipeline(Retry(ConnectionError), breaker, RateLimiter(1000), slots, Timeout(5.0))(work)
            tasks = [asyncio.create_task(guarded()) for _ in range(2)]
            for _ in range(steps):
                await asyncio.tasks.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (slots.active, slots.waiting, breaker.state) == (0, 0, "closed")
            await guarded()

    asyncio.run(main())
