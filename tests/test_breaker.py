"""The circuit breaker as its users meet it: decorated functions of every kind, blocks, hands, numbers, events."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import importlib.util
import json
import logging
import pickle  # noqa: TID251 - errors travel between processes of others
import sys
import threading
import tracemalloc
import weakref
from abc import ABCMeta
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pybreaker
import pytest
import trio

from resilient import (
    BreakerChanged,
    BreakerOpen,
    CircuitBreaker,
    Consecutive,
    Env,
    FailureRate,
    Pipeline,
    Refused,
    Rejected,
    SlowRate,
)
from resilient import breaker as module
from resilient._window import PASS
from resilient.testing import FakeClock, Recorder
from tests.worlds import World, worlds


class Boom(Exception):
    """What the tested functions fail with."""


class Bench:
    """A breaker around a function that does as it is told, with a clock and a recorder of its own."""

    def __init__(self, trip: Any = Consecutive(3), *, sinks: bool = True, **options: Any) -> None:  # noqa: B008
        self.clock, self.events = FakeClock(), Recorder()
        self.env = Env(clock=self.clock, sinks=[self.events] if sinks else [])
        self.breaker = CircuitBreaker("b", trip, **options)
        self.calls = 0
        self.run = Pipeline(self.breaker, env=self.env)(self.work)

    def work(self, outcome: Any = None) -> Any:
        self.calls += 1
        if callable(outcome):
            outcome = outcome()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def fail(self, times: int = 1, error: BaseException | None = None) -> None:
        for _ in range(times):
            kind = Boom("boom") if error is None else error
            with pytest.raises(type(kind)):
                self.run(kind)

    def refused(self) -> BreakerOpen:
        before = self.calls
        with pytest.raises(BreakerOpen) as caught:
            self.run()
        assert self.calls == before
        return caught.value

    def changes(self) -> list[tuple[str, str]]:
        return [(event.old, event.new) for event in self.events.of(BreakerChanged)]


# -- the circle of states --------------------------------------------------------------------------------------------


def test_it_opens_refuses_probes_and_closes() -> None:
    bench = Bench(cooldown=10.0)
    bench.fail(2)
    assert bench.breaker.state == "closed"
    bench.fail()
    assert bench.breaker.state == "open"
    refusal = bench.refused()
    assert (refusal.policy, refusal.retry_after, refusal.cause) == ("b", 10.0, "Boom: boom")
    bench.clock.advance(9.9)
    assert bench.refused().retry_after == pytest.approx(0.1)
    bench.clock.advance(0.1)
    assert bench.breaker.retry_after == 0.0
    assert bench.run("well") == "well"
    assert bench.breaker.state == "closed"
    assert bench.breaker.retry_after is None
    assert [(event.old, event.new, event.reason) for event in bench.events.of(BreakerChanged)] == [
        ("closed", "open", "3 failures in a row"),
        ("open", "half-open", "the cooldown is over"),
        ("half-open", "closed", "1 of 1 probes succeeded"),
    ]
    assert [(event.policy, event.shadow) for event in bench.events.of(Refused)] == [("b", False)] * 2


def test_a_failed_probe_opens_again_and_openings_are_counted() -> None:
    bench = Bench(Consecutive(1), cooldown=10.0)
    bench.fail()
    for openings in (2, 3):
        bench.clock.advance(10)
        bench.fail()
        assert bench.breaker.opened == openings
        assert bench.breaker.retry_after == 10.0
    bench.clock.advance(10)
    bench.run()
    assert bench.breaker.opened == 0


def test_the_default_trips_on_half_of_a_hundred_after_ten() -> None:
    bench = Bench(FailureRate(0.5, over=100, minimum=10))
    assert CircuitBreaker().trip == bench.breaker.trip
    for _ in range(5):
        bench.run()
    bench.fail(4)
    assert bench.breaker.state == "closed"
    assert bench.breaker.failure_rate == pytest.approx(4 / 9)
    bench.fail()
    assert bench.breaker.state == "open"
    assert bench.breaker.failure_rate == 0.0


def test_a_success_that_reaches_the_minimum_opens() -> None:
    bench = Bench(FailureRate(0.5, minimum=4))
    bench.fail(2)
    bench.run()
    assert bench.run("fine") == "fine"
    assert bench.breaker.state == "open"
    assert bench.refused().cause == "2 of 4 calls failed"


def test_after_the_warm_up_a_success_is_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(FailureRate(0.5, minimum=2))
    bench.run()
    bench.run()
    monkeypatch.setattr(CircuitBreaker, "_settle", None)
    bench.run()
    assert bench.breaker.calls == 3


def test_a_slow_rate_opens_on_answers_that_come_late() -> None:
    bench = Bench(SlowRate(0.5, slower_than=2.0, minimum=2), cooldown=10.0)

    def slow() -> str:
        bench.clock.advance(3)
        return "at last"

    assert bench.run("quick") == "quick"
    assert bench.run("quick") == "quick"
    assert bench.run("quick") == "quick"
    assert [bench.run(slow) for _ in range(3)] == ["at last"] * 3
    assert bench.breaker.state == "open"
    assert bench.refused().cause == "3 of 6 calls took more than 2 s"
    assert (bench.breaker.slow_calls, bench.breaker.failures) == (3, 0)
    bench.clock.advance(10)
    bench.run(slow)
    assert bench.breaker.state == "open", "a slow probe proves nothing good"


def test_a_window_in_seconds_forgets() -> None:
    bench = Bench(FailureRate(0.5, seconds=20, minimum=2))
    bench.fail()
    bench.clock.advance(30)
    bench.run()
    bench.run()
    bench.fail()
    assert bench.breaker.state == "closed"
    bench.fail()
    assert bench.breaker.state == "open"


def test_probes_close_together() -> None:
    bench = Bench(Consecutive(1), probes=2, cooldown=1.0)
    bench.fail()
    bench.clock.advance(1)
    bench.run()
    assert bench.breaker.state == "half-open"
    assert bench.breaker.retry_after == 0.0
    bench.run()
    assert bench.breaker.state == "closed"


# -- what a call says ------------------------------------------------------------------------------------------------


def test_a_result_is_a_success_and_other_errors_say_nothing() -> None:
    bench = Bench(Consecutive(2), on=(ConnectionError, TimeoutError), ignore=ConnectionResetError)
    bench.fail(5, ValueError("mine"))
    bench.fail(5, ConnectionResetError())
    assert (bench.breaker.calls, bench.breaker.failures) == (0, 0)
    bench.fail(1, ConnectionError())
    bench.fail(1, ValueError())
    bench.fail(1, TimeoutError())
    assert bench.breaker.state == "open", "what is ignored does not interrupt a row of failures"


def test_predicates_and_classes_may_be_mixed() -> None:
    bench = Bench(
        Consecutive(2),
        on=(lambda error: "bad" in str(error), TimeoutError),
        ignore=(KeyError, lambda error: "but" in str(error)),
    )
    bench.fail(3, ValueError("good"))
    bench.fail(3, ValueError("bad but fine"))
    bench.fail(3, KeyError("bad"))
    assert bench.breaker.calls == 0
    bench.fail(1, TimeoutError())
    bench.fail(1, ValueError("bad"))
    assert bench.breaker.state == "open"


def test_classify_judges_results_and_errors() -> None:
    seen: list[tuple[Any, Any]] = []

    def judge(result: Any, error: Exception | None) -> Any:
        seen.append((result, error))
        return {503: "failure", 404: "success", 429: "ignored"}.get(getattr(error, "args", [result])[0])

    bench = Bench(Consecutive(2), classify=judge)
    assert bench.run(503) == 503
    assert bench.run(429) == 429
    bench.fail(1, Boom(404))
    assert (bench.breaker.calls, bench.breaker.failures) == (2, 1)
    bench.fail(1, Boom("other"))
    bench.run(503)
    assert bench.breaker.state == "open"
    assert bench.refused().cause == "2 failures in a row"
    assert seen[0] == (503, None)
    bench.breaker.reset()
    assert bench.run(200) == 200
    assert bench.breaker.calls == 5


def test_classify_is_not_asked_about_cancellation() -> None:
    bench = Bench(Consecutive(1), classify=lambda result, error: "failure")
    bench.fail(1, asyncio.CancelledError())
    assert bench.breaker.state == "closed"


def test_a_verdict_that_is_none_gives_the_place_back_and_says_so() -> None:
    bench = Bench(Consecutive(1), cooldown=1.0, classify=lambda result, error: "failure" if error else "great")
    bench.fail()
    bench.clock.advance(1)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^classify must return 'failure', 'success', 'ignored' or None, not 'great'$"
        ):
            bench.run()
    assert bench.breaker.state == "half-open"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit(), asyncio.CancelledError()])
def test_pybreaker_keyboard_interrupt_is_not_a_failure(error: BaseException) -> None:
    """pybreaker counts every BaseException: two Ctrl-C open a breaker. Only `Exception` can be a failure."""
    bench = Bench(Consecutive(1))
    bench.fail(3, error)
    assert (bench.breaker.state, bench.breaker.calls) == ("closed", 0)


def test_pybreaker_masks_error_on_trip() -> None:
    """pybreaker raises its own error on the call that trips. The caller must get what the function raised."""
    bench = Bench(Consecutive(1))
    error = Boom("mine")
    with pytest.raises(Boom) as caught:
        bench.run(error)
    assert caught.value is error
    assert caught.value.__context__ is None
    assert bench.breaker.state == "open"


def test_pybreaker_metaclassed_exclusion() -> None:
    """pybreaker takes a class with a metaclass for a predicate that is always true, and never opens again."""

    class Meta(ABCMeta):
        pass

    class Business(Exception, metaclass=Meta):
        pass

    bench = Bench(Consecutive(2), ignore=Business)
    bench.fail(3, Business())
    assert bench.breaker.state == "closed"
    bench.fail(2)
    assert bench.breaker.state == "open"
    only = Bench(Consecutive(1), on=Business)
    only.fail(2)
    assert only.breaker.state == "closed"
    only.fail(1, Business())
    assert only.breaker.state == "open"


def test_pybreaker_excluded_counts_as_success() -> None:
    """In pybreaker an excluded error closes a half-open breaker and zeroes the count. Ignored means ignored."""
    bench = Bench(Consecutive(3), ignore=KeyError, cooldown=1.0)
    bench.fail(2)
    bench.fail(1, KeyError())
    bench.fail(1)
    assert bench.breaker.state == "open"
    bench.clock.advance(1)
    bench.fail(2, KeyError())
    assert bench.breaker.state == "half-open"


def test_pybreaker_lock_held_during_the_call() -> None:
    """pybreaker serialises all callers. Ours run together: the barrier breaks unless all are inside at once."""
    barrier = threading.Barrier(8, timeout=60)
    guarded = CircuitBreaker("b")(barrier.wait)
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: guarded(), range(8))) == list(range(8))


def test_pybreaker_async_def_is_guarded() -> None:
    """pybreaker's decorator on `async def` sees only the making of the coroutine, and never opens."""
    breaker = CircuitBreaker("b", Consecutive(3))

    @breaker
    async def call() -> None:
        raise Boom

    async def main() -> None:
        for _ in range(3):
            with pytest.raises(Boom):
                await call()
        with pytest.raises(BreakerOpen):
            await call()

    asyncio.run(main())
    assert breaker.state == "open"


# -- the matrix of peers: half-open, late results, cancellation, leases ------------------------------------------------


class Room:
    """Tasks that wait inside one guarded function until told how to end."""

    def __init__(self, trip: Any = Consecutive(3), **options: Any) -> None:  # noqa: B008
        self.clock = FakeClock(autojump=False)
        self.breaker = CircuitBreaker("b", trip, **options)
        self.inside: list[Any] = []
        self.over = False
        self.call = Pipeline(self.breaker, env=Env(clock=self.clock))(self.work)

    async def work(self, outcome: Exception | None = None) -> str:
        gate = trio.Event() if self.trio else asyncio.Event()
        self.inside.append(gate)
        if not self.over:
            await gate.wait()
        if outcome is not None:
            raise outcome
        return "well"

    @property
    def trio(self) -> bool:
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            return False
        return True

    async def failing(self) -> None:
        await self.call(Boom())

    def play(self, world: World, scene: Callable[[Any], Awaitable[None]]) -> None:
        """Run the scene; whatever happens, nobody is left waiting."""

        async def main() -> None:
            async with world() as tasks:
                try:
                    await scene(tasks)
                finally:
                    self.over = True
                    for gate in self.inside:
                        gate.set()

        world.run(main)

    async def trip(self, world: Any) -> None:
        """Open the circuit, and let the cooldown pass."""
        tasks = [world.spawn(self.failing) for _ in range(3)]
        await world.settle()
        for gate in self.inside[-3:]:
            gate.set()
        await world.settle()
        assert self.breaker.state == "open"
        assert all(isinstance(task.error, Boom) for task in tasks)


@worlds
def test_half_open_stampede_lets_in_one_of_twenty(world: World) -> None:
    """circuitbreaker, aiobreaker, purgatory, hyx, pyresilience, crashbytes let in all twenty."""
    room = Room(cooldown=5.0)

    async def scene(tasks: Any) -> None:
        await room.trip(tasks)
        room.clock.advance(5)
        before = len(room.inside)
        callers = [tasks.spawn(room.call) for _ in range(20)]
        await tasks.settle()
        assert len(room.inside) - before == 1
        refusals = [task.error for task in callers if task.done]
        assert len(refusals) == 19
        assert {error.retry_after for error in refusals if isinstance(error, BreakerOpen)} == {60.0}
        room.inside[-1].set()
        await tasks.settle()
        assert room.breaker.state == "closed"

    room.play(world, scene)


@worlds
def test_late_success_while_open_does_not_close(world: World) -> None:
    """circuitbreaker, crashbytes, latch and benzene close an open circuit by a call admitted before the trip."""
    room = Room(cooldown=5.0)

    async def scene(tasks: Any) -> None:
        late = tasks.spawn(room.call)
        await tasks.settle()
        await room.trip(tasks)
        room.inside[0].set()
        await tasks.settle()
        assert late.value == "well"
        assert room.breaker.state == "open"
        assert room.breaker.retry_after == 5.0

    room.play(world, scene)


@worlds
def test_late_success_with_a_probe_in_flight_lets_nobody_in(world: World) -> None:
    """Fifteen of sixteen breakers closed, and let five of five callers in beside the probe."""
    room = Room(cooldown=5.0)

    async def scene(tasks: Any) -> None:
        tasks.spawn(room.call)
        await tasks.settle()
        await room.trip(tasks)
        room.clock.advance(5)
        probe = tasks.spawn(room.failing)
        await tasks.settle()
        room.inside[0].set()
        await tasks.settle()
        assert room.breaker.state == "half-open"
        callers = [tasks.spawn(room.call) for _ in range(5)]
        await tasks.settle()
        assert all(isinstance(task.error, BreakerOpen) for task in callers)
        room.inside[-1].set()
        await tasks.settle()
        assert isinstance(probe.error, Boom)
        assert room.breaker.state == "open"

    room.play(world, scene)


@worlds
def test_cancellations_are_neutral_while_closed(world: World) -> None:
    """purgatory opens on six cancellations; circuitbreaker forgets the failures before them."""
    room = Room(Consecutive(3))

    async def scene(tasks: Any) -> None:
        for outcome in (room.failing, room.failing, None, None, None, None, None, None, room.failing):
            task = tasks.spawn(outcome or room.call)
            await tasks.settle()
            if outcome is None:
                task.cancel()
            else:
                room.inside[-1].set()
            await tasks.settle()
            assert task.done
        assert room.breaker.state == "open"
        assert room.breaker.calls == 3

    room.play(world, scene)


@worlds
def test_a_cancelled_probe_gives_its_place_to_one_of_five(world: World) -> None:
    """grit, capio and benzene are stuck for ever, purgatory re-opens, seven libraries let in all five."""
    room = Room(cooldown=5.0)

    async def scene(tasks: Any) -> None:
        await room.trip(tasks)
        room.clock.advance(5)
        probe = tasks.spawn(room.call)
        await tasks.settle()
        probe.cancel()
        await tasks.settle()
        assert probe.done
        assert room.breaker.state == "half-open"
        before = len(room.inside)
        callers = [tasks.spawn(room.call) for _ in range(5)]
        await tasks.settle()
        assert len(room.inside) - before == 1
        assert sum(task.done for task in callers) == 4
        room.inside[-1].set()
        await tasks.settle()
        assert room.breaker.state == "closed"

    room.play(world, scene)


@worlds
def test_a_hung_probe_gives_its_place_away(world: World) -> None:
    """nopanic, interlock, Polly v8, failsafe-go: a probe that never answers wedges the breaker for good."""
    room = Room(cooldown=5.0, probe_lease=60.0)

    async def scene(tasks: Any) -> None:
        await room.trip(tasks)
        room.clock.advance(5)
        hung = tasks.spawn(room.failing)
        await tasks.settle()
        gate = room.inside[-1]
        room.clock.advance(59)
        early = tasks.spawn(room.call)
        await tasks.settle()
        assert isinstance(early.error, BreakerOpen)
        assert early.error.retry_after == 1.0
        room.clock.advance(1)
        tasks.spawn(room.call)
        await tasks.settle()
        gate.set()  # the hung one fails at last: that says nothing any more
        await tasks.settle()
        assert isinstance(hung.error, Boom)
        assert room.breaker.state == "half-open"
        room.inside[-1].set()
        await tasks.settle()
        assert room.breaker.state == "closed"

    room.play(world, scene)


@worlds
def test_a_stale_probe_of_an_earlier_half_open_does_not_count(world: World) -> None:
    """nopanic with two probes: one of an earlier half-open counts in the next, and the gauge goes below zero."""
    room = Room(probes=2, cooldown=5.0)

    async def scene(tasks: Any) -> None:
        await room.trip(tasks)
        room.clock.advance(5)
        tasks.spawn(room.call)
        await tasks.settle()
        tasks.spawn(room.failing)
        await tasks.settle()
        stale, failing = room.inside[-2:]
        failing.set()
        await tasks.settle()
        assert room.breaker.state == "open"
        room.clock.advance(5)
        tasks.spawn(room.call)
        await tasks.settle()
        stale.set()
        await tasks.settle()
        assert room.breaker.state == "half-open"
        assert room.breaker._won == 0
        tasks.spawn(room.call)
        await tasks.settle()
        refused = tasks.spawn(room.call)
        await tasks.settle()
        assert isinstance(refused.error, BreakerOpen)
        for gate in room.inside[-2:]:
            gate.set()
        await tasks.settle()
        assert room.breaker.state == "closed"

    room.play(world, scene)


@worlds
@pytest.mark.parametrize("trip", [Consecutive(1), SlowRate(1.0, slower_than=9.0, over=1)], ids=["lean", "timed"])
@pytest.mark.parametrize("state", ["closed", "half-open"])
def test_cancelled_at_every_await_no_place_is_lost(world: World, trip: Any, state: str) -> None:
    """Cancel a call at its first, second, third ... await: the breaker stays as it was, and its places are free."""
    awaits = 4
    for cut in range(awaits):
        room = Room(trip)
        work = room.work

        async def several(work: Any = work) -> None:
            for _ in range(awaits):
                await work()

        guarded = Pipeline(room.breaker, env=Env(clock=room.clock))(several)
        if state == "half-open":
            room.breaker.restore({"version": 1, "state": "half-open"})

        async def scene(tasks: Any, cut: int = cut, room: Room = room, guarded: Any = guarded) -> None:
            task = tasks.spawn(guarded)
            await tasks.settle()
            for _ in range(cut):
                room.inside[-1].set()
                await tasks.settle()
            task.cancel()
            await tasks.settle()
            assert task.done

        room.play(world, scene)
        assert len(room.inside) == cut + 1
        assert room.breaker.state == state
        assert room.breaker._flying == ()
        assert room.breaker.calls == 0


# -- every kind of function, and everybody at once ---------------------------------------------------------------------


def test_threads_and_asyncio_and_trio_share_one_breaker() -> None:
    breaker = CircuitBreaker("b", FailureRate(1.0, over=100, minimum=100))
    barrier = threading.Barrier(4, timeout=60)

    @breaker
    def plain(n: int) -> int:
        return n

    @breaker
    async def coroutine(n: int) -> int:
        return n

    def thread() -> None:
        barrier.wait()
        for n in range(200):
            plain(n)

    def loop(run: Callable[[Any], Any]) -> Callable[[], None]:
        async def main() -> None:
            for n in range(200):
                await coroutine(n)

        def body() -> None:
            barrier.wait()
            run(main)

        return body

    def in_asyncio(main: Any) -> None:
        asyncio.run(main())

    bodies = [thread, thread, loop(in_asyncio), loop(trio.run)]
    threads = [threading.Thread(target=body, daemon=True) for body in bodies]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert breaker.calls == 800


def test_successes_of_many_threads_are_all_counted() -> None:
    """The increment is not under the lock: with the switch interval at a millionth none of it may be lost."""
    breaker = CircuitBreaker("b", FailureRate(1.0, over=50, minimum=20))
    interval = sys.getswitchinterval()
    barrier = threading.Barrier(4, timeout=60)

    @breaker
    def call(n: int) -> None:
        if n % 10 == 0:
            raise Boom

    def caller() -> None:
        barrier.wait()
        for n in range(1_500):
            try:
                call(n)
            except Boom:
                pass

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=caller, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (breaker.calls, breaker.failures, breaker.state) == (6_000, 600, "closed")


def test_many_threads_agree_on_who_probes() -> None:
    clock = FakeClock()
    breaker = CircuitBreaker("b", Consecutive(1), cooldown=1.0)
    inside = 0
    most = 0
    lock = threading.Lock()

    def work(fail: bool) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        with lock:
            inside -= 1
        if fail:
            raise Boom

    guarded = Pipeline(breaker, env=Env(clock=clock))(work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            breaker.reset()
            with pytest.raises(Boom):
                guarded(True)
            clock.advance(1)
            most = 0
            barrier = threading.Barrier(6, timeout=60)

            def caller(barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                try:
                    guarded(True)
                except (Boom, BreakerOpen):
                    pass

            threads = [threading.Thread(target=caller, daemon=True) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert most == 1
            assert breaker.opened == 2
    finally:
        sys.setswitchinterval(interval)


def numbers(n: int) -> Generator[int, None, str]:
    yield from range(n)
    if n > 3:
        raise Boom
    return "end"


async def anumbers(n: int) -> AsyncGenerator[int, None]:
    for i in range(n):
        yield i
    if n > 3:
        raise Boom


def test_a_generator_is_judged_by_its_end() -> None:
    bench = Bench(Consecutive(1), cooldown=1.0)
    guarded = Pipeline(bench.breaker, env=bench.env)(numbers)
    assert list(guarded(3)) == [0, 1, 2]
    assert bench.breaker.calls == 1
    early = guarded(9)
    assert next(early) == 0
    early.close()
    assert (bench.breaker.calls, bench.breaker.state) == (1, "closed")
    with pytest.raises(Boom):
        list(guarded(4))
    assert bench.breaker.state == "open"
    with pytest.raises(BreakerOpen):
        next(guarded(1))
    bench.clock.advance(1)
    probe = guarded(9)
    assert next(probe) == 0
    with pytest.raises(BreakerOpen):
        next(guarded(1))
    probe.close()
    assert list(guarded(1)) == [0]
    assert bench.breaker.state == "closed"


@pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), trio.run], ids=["asyncio", "trio"])
def test_a_stream_is_judged_by_its_end(run: Callable[[Any], None]) -> None:
    bench = Bench(Consecutive(1), cooldown=1.0)
    guarded = Pipeline(bench.breaker, env=bench.env)(anumbers)

    async def main() -> None:
        assert [item async for item in guarded(3)] == [0, 1, 2]
        early = guarded(9)
        assert await anext(early) == 0
        await early.aclose()
        assert (bench.breaker.calls, bench.breaker.state) == (1, "closed")
        with pytest.raises(Boom):
            _ = [item async for item in guarded(4)]
        assert bench.breaker.state == "open"
        with pytest.raises(BreakerOpen):
            await anext(guarded(1))

    run(main)


def test_blocks() -> None:
    bench = Bench(Consecutive(2), cooldown=1.0)
    breaker = bench.breaker
    for _ in range(2):
        with pytest.raises(Boom), breaker as entered:
            assert entered is breaker
            raise Boom
    with pytest.raises(BreakerOpen), breaker:
        raise AssertionError("unreachable")
    bench.clock.advance(1)
    with breaker:
        with pytest.raises(BreakerOpen), breaker:
            raise AssertionError("unreachable")
    assert breaker.state == "closed"
    other = CircuitBreaker("other", Consecutive(1))
    with pytest.raises(Boom), breaker, other:
        raise Boom
    assert (breaker.state, other.state) == ("closed", "open")


def test_blocks_may_end_in_any_order() -> None:
    """As `ExitStack.pop_all` and generators make it happen."""
    one, two = CircuitBreaker("one", Consecutive(1)), CircuitBreaker("two", Consecutive(1))
    one.__enter__()
    two.__enter__()
    one.__exit__(Boom, Boom(), None)
    two.__exit__(None, None, None)
    assert (one.state, two.state, two.calls) == ("open", "closed", 1)


def test_a_block_that_ends_elsewhere_says_nothing() -> None:
    """Entered in one context and left in another (as some test fixtures do): nothing breaks, nothing is counted."""
    breaker = CircuitBreaker("b")
    thread = threading.Thread(target=breaker.__enter__, daemon=True)
    thread.start()
    thread.join()
    breaker.__exit__(None, None, None)
    assert breaker.calls == 0


@pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), trio.run], ids=["asyncio", "trio"])
def test_blocks_in_coroutines(run: Callable[[Any], None]) -> None:
    breaker = CircuitBreaker("b", Consecutive(1))

    async def main() -> None:
        async with breaker as entered:
            assert entered is breaker
        with pytest.raises(Boom):
            async with breaker:
                raise Boom
        with pytest.raises(BreakerOpen):
            async with breaker:
                raise AssertionError("unreachable")

    run(main)
    assert (breaker.calls, breaker.state) == (2, "open")


def test_blocks_of_concurrent_tasks_are_told_apart() -> None:
    clock = FakeClock()
    breaker = CircuitBreaker("b", SlowRate(1.0, slower_than=5.0, over=2, minimum=2))
    Pipeline(breaker, env=Env(clock=clock))(lambda: None)

    async def main() -> None:
        inside, out = asyncio.Event(), asyncio.Event()

        async def slow() -> None:
            async with breaker:
                inside.set()
                await out.wait()

        task = asyncio.create_task(slow())
        await inside.wait()
        clock.advance(10)
        async with breaker:
            pass
        assert breaker.slow_calls == 0
        out.set()
        await task
        assert breaker.slow_calls == 1

    asyncio.run(main())


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_isolation_lasts_while_any_handle_is_held() -> None:
    bench = Bench()
    one, two = bench.breaker.isolate(), bench.breaker.isolate()
    assert bench.breaker.isolated
    assert bench.breaker.state == "open"
    refusal = bench.refused()
    assert (refusal.retry_after, refusal.cause) == (None, "isolate()")
    assert str(refusal) == "b: the circuit is open (cause: isolate())"
    assert bench.breaker.retry_after is None
    one.release()
    one.release()
    bench.refused()
    with two:
        bench.refused()
    assert not bench.breaker.isolated
    assert bench.run(1) == 1
    assert bench.changes() == [("closed", "open"), ("open", "closed")]


def test_isolation_does_not_disturb_what_is_below() -> None:
    bench = Bench(Consecutive(1), sinks=False, cooldown=10.0)
    bench.fail()
    with bench.breaker.isolate():
        assert bench.refused().retry_after is None
        bench.clock.advance(30)
        assert bench.refused().retry_after is None
    assert bench.breaker.state == "open"
    assert bench.run(1) == 1
    assert bench.breaker.rejected == 2


def test_disabled_everything_passes_and_nothing_is_learned() -> None:
    bench = Bench(Consecutive(1), cooldown=10.0)
    bench.fail()
    bench.breaker.disable()
    assert bench.breaker.disabled
    assert bench.breaker.state == "closed"
    bench.fail(5)
    assert bench.run(1) == 1
    assert (bench.breaker.calls, bench.breaker.failures) == (1, 1)
    with bench.breaker.isolate():
        bench.refused()
    bench.breaker.enable()
    assert bench.breaker.state == "open"
    assert bench.refused().retry_after == 10.0


def test_reset_closes_with_an_empty_window() -> None:
    bench = Bench(Consecutive(2), cooldown=10.0)
    bench.fail()
    bench.breaker.reset()
    bench.fail()
    assert bench.breaker.state == "closed"
    bench.fail()
    bench.breaker.reset()
    assert (bench.breaker.state, bench.breaker.opened, bench.breaker.failures) == ("closed", 0, 3)
    assert bench.run(1) == 1


def test_a_cooldown_may_grow_with_the_openings() -> None:
    asked: list[int] = []

    def cooldown(opened: int) -> float:
        assert not cast(Any, bench.breaker._lock)._is_owned(), "your code is never called under the lock"
        asked.append(opened)
        return float(10 * 2**opened)

    bench = Bench(Consecutive(1), cooldown=cooldown)
    for wait in (20.0, 40.0, 80.0):
        bench.fail()
        assert bench.breaker.retry_after == wait
        bench.clock.advance(wait)
    bench.run()
    bench.fail()
    assert bench.breaker.retry_after == 20.0
    assert asked == [1, 2, 3, 1]


@pytest.mark.parametrize("useless", [lambda opened: -1.0, lambda opened: "x", lambda opened: 1 / 0])
def test_a_cooldown_of_no_use_does_not_reach_the_caller(
    useless: Callable[[int], Any], caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(Consecutive(1), cooldown=useless)
    with caplog.at_level(logging.ERROR, "resilient"):
        bench.fail()
    assert "b: cooldown(1) is of no use; 30 s instead" in caplog.text
    assert bench.breaker.retry_after == 30.0


def test_a_cooldown_of_zero_probes_at_once() -> None:
    bench = Bench(Consecutive(1), cooldown=0)
    bench.fail()
    assert bench.run(1) == 1
    assert bench.breaker.state == "closed"


@pytest.mark.parametrize("sinks", [True, False])
def test_a_shadow_reports_and_never_refuses(sinks: bool) -> None:
    bench = Bench(Consecutive(2), shadow=True, cooldown=10.0, sinks=sinks)
    bench.fail(5)
    assert (bench.breaker.state, bench.breaker.failures, bench.breaker.rejected) == ("open", 2, 3)
    assert bench.run(1) == 1
    with bench.breaker.isolate():
        assert bench.run(2) == 2
    with bench.breaker:
        pass
    assert bench.breaker.rejected == 6
    bench.clock.advance(10)
    bench.run()
    assert bench.breaker.state == "closed"
    if sinks:
        refused = bench.events.of(Refused)
        assert len(refused) == 6
        assert all(event.shadow for event in refused)
        assert isinstance(refused[0].error, BreakerOpen)


# -- snapshots -------------------------------------------------------------------------------------------------------


def test_a_snapshot_survives_the_process() -> None:
    bench = Bench(Consecutive(1), cooldown=10.0)
    bench.run()
    bench.fail()
    bench.refused()
    bench.clock.advance(4)
    text = json.dumps(bench.breaker.snapshot())
    other = Bench(Consecutive(1), cooldown=10.0)
    other.clock.advance(12345)
    other.breaker.restore(json.loads(text))
    assert other.breaker.snapshot() == bench.breaker.snapshot()
    refusal = other.refused()
    assert (refusal.retry_after, refusal.cause) == (6.0, "Boom: boom")
    assert (other.breaker.opened, other.breaker.calls, other.breaker.failures) == (1, 2, 1)
    assert other.breaker.rejected == 2
    other.clock.advance(6)
    other.fail()
    assert other.breaker.opened == 2


@pytest.mark.parametrize("state", ["closed", "half-open"])
def test_a_snapshot_of_any_state_comes_back(state: str) -> None:
    bench = Bench()
    bench.breaker.restore({"version": 1, "state": state, "disabled": True})
    assert bench.breaker.disabled
    bench.breaker.enable()
    assert bench.breaker.state == state
    assert bench.breaker.snapshot()["state"] == state
    assert bench.breaker.snapshot()["remaining"] == 0.0


def test_a_restored_state_is_a_new_epoch() -> None:
    bench = Bench(Consecutive(1))

    def restore() -> BaseException:
        bench.breaker.restore({"version": 1, "state": "closed"})
        return Boom()

    with pytest.raises(Boom):
        bench.run(restore)
    assert (bench.breaker.state, bench.breaker.calls) == ("closed", 0)


@pytest.mark.parametrize(
    ("snapshot", "error", "text"),
    [
        (5, TypeError, "snapshot must be a mapping, not 5"),
        ({}, ValueError, "snapshot: version must be 1, not None"),
        ({"version": 1}, ValueError, "snapshot: state must be 'closed', 'open' or 'half-open', not None"),
        ({"remaining": -1}, ValueError, "snapshot: remaining must be a finite number of at least 0, not -1"),
        ({"remaining": "1"}, TypeError, "snapshot: remaining must be a number, not '1'"),
        ({"opened": -1}, ValueError, "snapshot: opened must be at least 0, not -1"),
        ({"calls": 1.5}, TypeError, "snapshot: calls must be an integer, not 1.5"),
        ({"disabled": 1}, TypeError, "snapshot: disabled must be true or false, not 1"),
        ({"cause": 1}, TypeError, "snapshot: cause must be a string or None, not 1"),
    ],
)
def test_a_snapshot_that_is_none_changes_nothing(snapshot: Any, error: type[Exception], text: str) -> None:
    bench = Bench(Consecutive(1))
    bench.fail()
    before = bench.breaker.snapshot()
    if isinstance(snapshot, dict) and snapshot and "version" not in snapshot:
        snapshot = {"version": 1, "state": "closed", **snapshot}
    with pytest.raises(error) as caught:
        bench.breaker.restore(snapshot)
    assert str(caught.value) == text
    assert bench.breaker.snapshot() == before


# -- errors, events, memory ------------------------------------------------------------------------------------------


def test_the_refusal_speaks_and_travels() -> None:
    bench = Bench(Consecutive(1), cooldown=10.0)
    bench.fail()
    refusal = bench.refused()
    assert isinstance(refusal, Rejected)
    assert isinstance(refusal, pybreaker.CircuitBreakerError)
    assert str(refusal) == "b: the circuit is open; retry after 10 s (cause: Boom: boom)"
    for again in (pickle.loads(pickle.dumps(refusal)), copy.copy(refusal)):
        assert isinstance(again, BreakerOpen)
        assert (again.policy, again.retry_after, again.cause) == ("b", 10.0, "Boom: boom")
    assert str(BreakerOpen("x")) == "x: the circuit is open"


def test_the_cause_is_text_even_of_errors_that_cannot_say_it() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    for error, text in ((Mute(), "Mute"), (Boom(), "Boom"), (Boom("x" * 999), "Boom: " + "x" * 200)):
        bench = Bench(Consecutive(1))
        bench.fail(1, error)
        assert bench.refused().cause == text


def test_without_a_name_it_is_called_by_its_class() -> None:
    breaker = CircuitBreaker(trip=Consecutive(1))
    with pytest.raises(Boom), breaker:
        raise Boom
    with pytest.raises(BreakerOpen, match=r"^CircuitBreaker: the circuit is open"), breaker:
        raise AssertionError("unreachable")


def test_the_name_is_that_of_the_first_function() -> None:
    breaker = CircuitBreaker(trip=Consecutive(1))

    @breaker
    def charge() -> None:
        raise Boom

    with pytest.raises(Boom):
        charge()
    with pytest.raises(BreakerOpen) as caught:
        charge()
    assert caught.value.policy == breaker.name == charge.__qualname__


def test_sinks_are_called_outside_the_lock_and_may_use_the_breaker() -> None:
    bench = Bench(Consecutive(1), cooldown=10.0)
    seen: list[tuple[str, bool]] = []

    def sink(event: Any) -> None:
        seen.append((bench.breaker.state, cast(Any, bench.breaker._lock)._is_owned()))
        if isinstance(event, BreakerChanged) and event.new == "open":
            bench.breaker.reset()

    bench.env.subscribe(sink)
    bench.fail()
    assert seen == [("open", False), ("closed", False)]
    assert bench.changes() == [("closed", "open"), ("open", "closed")]


def test_half_open_is_told_before_the_probe_runs() -> None:
    bench = Bench(Consecutive(1), cooldown=10.0)
    bench.fail()
    bench.clock.advance(10)
    assert bench.run(lambda: bench.changes()[-1]) == ("open", "half-open")


def test_a_sink_that_is_interrupted_does_not_silence_the_breaker() -> None:
    bench = Bench(Consecutive(1), cooldown=10.0)

    def sink(event: Any) -> None:
        raise KeyboardInterrupt

    leave = bench.env.subscribe(sink)
    with pytest.raises(KeyboardInterrupt):
        bench.run(Boom())
    leave()
    bench.clock.advance(10)
    bench.run()
    assert bench.changes() == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]


@pytest.mark.parametrize("trip", [Consecutive(1), SlowRate(0.5, slower_than=1)], ids=["lean", "timed"])
def test_no_frame_lingers(trip: Any) -> None:
    """Neither a failure nor a refusal may hold frames in a cycle until the garbage collector comes."""

    class Marker:
        pass

    breaker = CircuitBreaker("b", Consecutive(1) | trip)

    @breaker
    def call(marker: Any) -> None:
        raise Boom

    gc.collect()
    gc.disable()
    try:
        references: list[weakref.ref[Any]] = []
        for expected in (Boom, BreakerOpen, BreakerOpen):
            marker = Marker()
            references.append(weakref.ref(marker))
            try:
                call(marker)
            except expected:
                pass
            handle = breaker.isolate() if expected is BreakerOpen else None
            del marker, handle
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


def test_a_breaker_is_small() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [CircuitBreaker("x") for _ in range(200)]
        each = (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    finally:
        tracemalloc.stop()
    assert each < 700


def test_a_breaker_describes_itself() -> None:
    def grow(opened: int) -> float:
        return float(opened)

    breaker = CircuitBreaker("x", Consecutive(3), ignore=KeyError, cooldown=grow, probes=2, shadow=True)
    assert breaker.describe() == {
        "name": "x",
        "trip": Consecutive(3),
        "on": (Exception,),
        "ignore": (KeyError,),
        "cooldown": grow,
        "probes": 2,
        "probe_lease": 60.0,
        "shadow": True,
    }
    assert repr(CircuitBreaker("x", Consecutive(3))) == (
        "CircuitBreaker(name='x', trip=Consecutive(3), on=(Exception), cooldown=30.0, probes=1, probe_lease=60.0)"
    )
    assert breaker.role == "breaker"


def test_a_build_without_gil_takes_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the GIL an increment may be lost: every success and every refusal is then counted under the lock."""
    monkeypatch.setattr(module, "GIL", False)
    bench = Bench(Consecutive(2), sinks=False, cooldown=10.0)
    monkeypatch.setattr(CircuitBreaker, "_settle", None)
    assert bench.run(1) == 1
    bench.fail(2)
    bench.refused()
    assert bench.breaker._shut == float("-inf")
    assert (bench.breaker.calls, bench.breaker.failures, bench.breaker.rejected) == (3, 2, 1)
    bench.clock.advance(10)
    bench.run()
    assert bench.breaker.state == "closed"


def test_the_module_knows_whether_there_is_a_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    spec = importlib.util.spec_from_file_location("resilient_breaker_again", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.GIL is False


def test_passing_permits_are_read_by_nobody() -> None:
    bench = Bench()
    bench.breaker.disable()
    assert bench.breaker._permit is PASS


nan, inf = float("nan"), float("inf")
anything: Any = "x"


async def coroutine_function(*args: object) -> float:
    return 1.0


class AsyncCallable:
    async def __call__(self, *args: object) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"name": 5}, TypeError, "name must be a string, not 5"),
        ({"trip": 5}, TypeError, "trip must be Consecutive, FailureRate or SlowRate, joined by |, not 5"),
        ({"on": 5}, TypeError, "on must be exception classes or predicates, not 5"),
        ({"on": int}, TypeError, "on must be exception classes or predicates, not <class 'int'>"),
        (
            {"on": (ValueError, KeyboardInterrupt)},
            ValueError,
            "on must be subclasses of Exception, not KeyboardInterrupt: cancellation and interrupts are never failures",
        ),
        (
            {"on": coroutine_function},
            TypeError,
            "on must answer at once, and coroutine_function is a coroutine function",
        ),
        ({"ignore": "x"}, TypeError, "ignore must be exception classes or predicates, not 'x'"),
        ({"classify": 5}, TypeError, "classify must be a function of (result, error), not 5"),
        (
            {"classify": coroutine_function},
            TypeError,
            "classify must answer at once, and coroutine_function is a coroutine function",
        ),
        ({"cooldown": -1}, ValueError, "cooldown must be a finite number of at least 0, not -1"),
        ({"cooldown": nan}, ValueError, "cooldown must be a finite number of at least 0, not nan"),
        ({"cooldown": "x"}, TypeError, "cooldown must be a number, not 'x'"),
        (
            {"cooldown": coroutine_function},
            TypeError,
            "cooldown must answer at once, and coroutine_function is a coroutine function",
        ),
        (
            {"cooldown": functools.partial(coroutine_function, 1)},
            TypeError,
            "cooldown must answer at once, and coroutine_function is a coroutine function",
        ),
        (
            {"classify": AsyncCallable()},
            TypeError,
            "classify must answer at once, and AsyncCallable.__call__ is a coroutine function",
        ),
        ({"probes": 0}, ValueError, "probes must be at least 1, not 0"),
        ({"probes": True}, TypeError, "probes must be an integer, not True"),
        ({"probe_lease": 0}, ValueError, "probe_lease must be a finite number above 0, not 0"),
        ({"probe_lease": inf}, ValueError, "probe_lease must be a finite number above 0, not inf"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        CircuitBreaker(**options)
    assert str(caught.value) == text


def test_cancellation_may_be_named_as_ignored() -> None:
    """It is ignored in any case; whoever says so is not wrong."""
    CircuitBreaker(ignore=(asyncio.CancelledError, KeyError))
