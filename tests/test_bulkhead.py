"""At most so many at a time: threads, asyncio and trio on one pool, in order, with no slot ever lost."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, ClassVar

import pytest
import trio

from resilient import Bulkhead, BulkheadFull, DeadlineExceeded, Env, Pipeline, Policy, deadline
from resilient._types import Call
from resilient.events import Refused
from resilient.testing import FakeClock, Recorder
from tests.worlds import World, turn, worlds


def whole(bulkhead: Bulkhead) -> bool:
    """Every slot is back and nobody waits."""
    return (bulkhead.free, bulkhead.active, bulkhead.waiting) == (bulkhead.limit, 0, 0)


FINITE = "max_wait must be a finite number of at least 0, not "


# -- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"limit": 0}, ValueError, "limit must be at least 1, not 0"),
        ({"limit": -1}, ValueError, "limit must be at least 1, not -1"),
        ({"limit": True}, TypeError, "limit must be an integer, not True"),
        ({"limit": 2.0}, TypeError, "limit must be an integer, not 2.0"),
        ({"limit": 1, "queue": -1}, ValueError, "queue must be at least 0, not -1"),
        ({"limit": 1, "queue": None}, TypeError, "queue must be an integer, not None"),
        ({"limit": 1, "queue": 1, "max_wait": -0.5}, ValueError, FINITE + "-0.5"),
        ({"limit": 1, "queue": 1, "max_wait": float("nan")}, ValueError, FINITE + "nan"),
        ({"limit": 1, "queue": 1, "max_wait": float("inf")}, ValueError, FINITE + "inf"),
        ({"limit": 1, "queue": 1, "max_wait": "1"}, TypeError, "max_wait must be a number, not '1'"),
        (
            {"limit": 3, "max_wait": 1.0},
            ValueError,
            "max_wait=1.0 needs a queue: say how many calls may wait, as in queue=3",
        ),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        Bulkhead(**arguments)
    assert str(caught.value) == text


def test_it_describes_itself() -> None:
    bulkhead = Bulkhead(3, queue=2, max_wait=1, name="db")
    assert bulkhead.describe() == {"name": "db", "limit": 3, "queue": 2, "max_wait": 1.0}
    assert repr(bulkhead) == "Bulkhead(name='db', limit=3, queue=2, max_wait=1.0)"
    assert bulkhead.role == "bulkhead"
    assert Bulkhead(1, max_wait=0).max_wait == 0.0


# -- every kind of function ------------------------------------------------------------------------------------------


def test_a_function_holds_a_slot_while_it_runs() -> None:
    bulkhead = Bulkhead(2)

    @bulkhead
    def work(a: int, *, b: int) -> tuple[int, int, int]:
        return a, b, bulkhead.active

    assert work(1, b=2) == (1, 2, 1)
    assert whole(bulkhead)
    assert bulkhead.name is not None
    assert bulkhead.name.endswith("work")


@worlds
def test_a_coroutine_holds_a_slot_while_it_runs(world: World) -> None:
    bulkhead = Bulkhead(2)

    @bulkhead
    async def work(a: int, *, b: int) -> tuple[int, int, int]:
        return a, b, bulkhead.active

    async def main() -> None:
        assert await work(1, b=2) == (1, 2, 1)

    world.run(main)
    assert whole(bulkhead)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_gives_the_slot_back(error: type[BaseException]) -> None:
    bulkhead = Bulkhead(1)

    @bulkhead
    def work() -> None:
        raise error

    @bulkhead
    async def awork() -> None:
        raise error

    for _ in range(3):
        with pytest.raises(error):
            work()
        with pytest.raises(error):
            awork().send(None)
    assert whole(bulkhead)


def test_a_full_bulkhead_refuses_at_once() -> None:
    recorder = Recorder()
    bulkhead = Bulkhead(1)

    @Pipeline(bulkhead, env=Env(sinks=[recorder]))
    def work(depth: int) -> None:
        if depth:
            work(depth - 1)

    work(0)
    assert recorder.events == []
    with pytest.raises(BulkheadFull) as caught:
        work(1)
    assert caught.value.policy == bulkhead.name
    assert caught.value.retry_after is None
    assert caught.value.__context__ is None
    assert recorder.events == [Refused(str(bulkhead.name), caught.value)]
    assert bulkhead.rejected == 1
    assert whole(bulkhead)


def test_a_full_bulkhead_without_a_sink_refuses_in_silence() -> None:
    bulkhead = Bulkhead(1)
    with bulkhead, pytest.raises(BulkheadFull, match=r"^Bulkhead: every slot is taken$"):
        with bulkhead:
            raise AssertionError("unreachable")
    assert bulkhead.rejected == 1


@worlds
def test_a_coroutine_is_refused_at_once(world: World) -> None:
    bulkhead = Bulkhead(1, queue=5, max_wait=0)

    @bulkhead
    async def work(depth: int) -> None:
        if depth:
            await work(depth - 1)

    async def main() -> None:
        with pytest.raises(BulkheadFull):
            await work(1)
        async with bulkhead:
            with pytest.raises(BulkheadFull):
                async with bulkhead:
                    raise AssertionError("unreachable")

    world.run(main)
    assert bulkhead.rejected == 2
    assert whole(bulkhead)


def test_a_generator_holds_its_slot_until_it_is_closed() -> None:
    bulkhead = Bulkhead(1)

    @bulkhead
    def numbers(n: int) -> Generator[int, None, str]:
        yield from range(n)
        return "end"

    started = numbers(3)
    assert bulkhead.active == 0
    assert next(started) == 0
    assert bulkhead.active == 1
    with pytest.raises(BulkheadFull):
        next(numbers(1))
    started.close()
    assert whole(bulkhead)
    assert list(numbers(2)) == [0, 1]
    assert whole(bulkhead)
    dropped = numbers(3)
    next(dropped)
    del dropped
    assert whole(bulkhead)


@worlds
def test_a_stream_holds_its_slot_until_it_is_closed(world: World) -> None:
    bulkhead = Bulkhead(1)

    @bulkhead
    async def numbers(n: int) -> AsyncGenerator[int, None]:
        for i in range(n):
            yield i

    async def main() -> None:
        async with aclosing(numbers(3)) as started:
            assert bulkhead.active == 0
            assert await anext(started) == 0
            assert bulkhead.active == 1
            with pytest.raises(BulkheadFull):
                async with aclosing(numbers(1)) as other:
                    await anext(other)
        assert whole(bulkhead)
        assert [i async for i in numbers(2)] == [0, 1]

    world.run(main)
    assert whole(bulkhead)


def test_slots_that_nobody_needed_yet_weigh_nothing_and_are_there() -> None:
    """A bulkhead of a million is as small as a bulkhead of one, until so many run at once."""
    bulkhead = Bulkhead(1_000_000)
    assert (len(bulkhead._tokens), bulkhead.free, bulkhead.active) == (1, 1_000_000, 0)
    with bulkhead, bulkhead, bulkhead:
        assert (bulkhead.free, bulkhead.active) == (999_997, 3)
    assert (len(bulkhead._tokens), bulkhead.free, bulkhead.active) == (3, 1_000_000, 0)


def test_a_new_slot_that_somebody_else_takes_first_is_followed_by_the_next() -> None:
    """Between making the slot and taking it there is room for another thread."""

    class Snatched(list[None]):
        snatched = 0

        def append(self, token: None) -> None:
            if self.snatched < 2:
                self.snatched += 1
            else:
                super().append(token)

    async def block() -> None:
        async with crowded:
            assert crowded._spare == 0

    bulkhead, crowded = Bulkhead(4), Bulkhead(4)
    bulkhead._tokens, crowded._tokens = Snatched(), Snatched()
    with bulkhead:
        assert bulkhead._spare == 0
    asyncio.run(block())
    assert Bulkhead(1)._grown()


def test_somebody_is_quicker() -> None:
    """Without a GIL two threads may see the same last token: the slower one goes the long way round."""

    class Racing(list[None]):
        def __bool__(self) -> bool:
            return True

    bulkhead = Bulkhead(1)
    bulkhead._tokens = Racing()

    @bulkhead
    def work() -> None: ...

    @bulkhead
    async def awork() -> None: ...

    async def block() -> None:
        async with bulkhead:
            raise AssertionError("unreachable")

    with pytest.raises(BulkheadFull):
        work()
    with pytest.raises(BulkheadFull):
        asyncio.run(awork())
    with pytest.raises(BulkheadFull), bulkhead:
        raise AssertionError("unreachable")
    with pytest.raises(BulkheadFull):
        asyncio.run(block())


# -- waiting ---------------------------------------------------------------------------------------------------------


@worlds
def test_the_queue_is_served_in_the_order_of_asking(world: World) -> None:
    bulkhead = Bulkhead(2, queue=10)
    order: list[int] = []

    @bulkhead
    async def work(number: int, here: Any) -> None:
        order.append(number)
        assert bulkhead.active <= 2
        await here.step()

    async def main() -> None:
        async with world() as here:
            for number in range(12):
                here.spawn(partial(work, number, here))
                await here.step()
            await here.settle()

    world.run(main)
    assert order == list(range(12))
    assert whole(bulkhead)


@worlds
def test_newcomers_never_overtake(world: World) -> None:
    """A slot that is free for a moment, while somebody is on his way to it, is not free for others."""
    bulkhead = Bulkhead(1, queue=10)
    order: list[str] = []

    @bulkhead
    async def work(name: str) -> None:
        order.append(name)

    async def main() -> None:
        async with world() as here:
            async with bulkhead:
                here.spawn(lambda: work("first"))
                await here.settle()
                assert bulkhead.waiting == 1
            here.spawn(lambda: work("later"))
            await work("newcomer")

    world.run(main)
    assert order[0] == "first"
    assert sorted(order) == ["first", "later", "newcomer"]
    assert whole(bulkhead)


@worlds
def test_beyond_the_queue_is_refused_at_once(world: World) -> None:
    bulkhead = Bulkhead(1, queue=2)

    @bulkhead
    async def work() -> None: ...

    async def main() -> None:
        async with world() as here:
            async with bulkhead:
                waiting = [here.spawn(work) for _ in range(2)]
                await here.settle()
                assert bulkhead.waiting == 2
                with pytest.raises(BulkheadFull):
                    await work()
            await here.settle()
            assert [handle.error for handle in waiting] == [None, None]

    world.run(main)
    assert (bulkhead.rejected, whole(bulkhead)) == (1, True)


@worlds
def test_a_task_waits_no_longer_than_max_wait(world: World) -> None:
    clock = FakeClock()
    bulkhead = Bulkhead(1, queue=1, max_wait=2.0)

    @Pipeline(bulkhead, env=Env(clock=clock))
    async def work() -> None: ...

    async def main() -> None:
        async with bulkhead:
            with pytest.raises(BulkheadFull):
                await work()
            with pytest.raises(BulkheadFull):
                async with bulkhead:
                    raise AssertionError("unreachable")

    world.run(main)
    assert clock.now() == 4.0
    assert (bulkhead.rejected, whole(bulkhead)) == (2, True)


def test_a_thread_waits_no_longer_than_max_wait() -> None:
    clock = FakeClock()
    bulkhead = Bulkhead(1, queue=1, max_wait=2.0)

    @Pipeline(bulkhead, env=Env(clock=clock))
    def work() -> None: ...

    with bulkhead, pytest.raises(BulkheadFull):
        work()
    assert clock.now() == 2.0
    assert (bulkhead.rejected, whole(bulkhead)) == (1, True)


@worlds
@pytest.mark.parametrize(
    ("max_wait", "ambient", "error", "waited"),
    [
        (None, 3.0, DeadlineExceeded, 3.0),
        (5.0, 3.0, DeadlineExceeded, 3.0),
        (2.0, 3.0, BulkheadFull, 2.0),
        (None, 0.0, DeadlineExceeded, 0.0),
    ],
)
def test_nobody_waits_past_the_ambient_deadline(
    world: World, max_wait: float | None, ambient: float, error: type[Exception], waited: float
) -> None:
    clock, recorder = FakeClock(), Recorder()
    bulkhead = Bulkhead(1, queue=1, max_wait=max_wait)
    pipeline = Pipeline(bulkhead, env=Env(clock=clock, sinks=[recorder]))

    @pipeline
    def work() -> None: ...

    @pipeline
    async def awork() -> None: ...

    async def main() -> None:
        async with bulkhead:
            with deadline(ambient, clock=clock), pytest.raises(error):
                await awork()

    world.run(main)
    assert clock.now() == waited
    with bulkhead, deadline(ambient, clock=clock), pytest.raises(error):
        work()
    assert clock.now() == waited * 2
    assert [type(event.error) for event in recorder.of(Refused)] == [error, error]
    assert whole(bulkhead)


def test_a_full_queue_is_full_whatever_the_deadline() -> None:
    bulkhead = Bulkhead(1, queue=1)
    inside, leave = threading.Event(), threading.Event()

    def occupy() -> None:
        with bulkhead:
            inside.set()
            leave.wait()

    def wait() -> None:
        with bulkhead:
            pass

    threads = [threading.Thread(target=occupy, daemon=True), threading.Thread(target=wait, daemon=True)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    while not bulkhead.waiting:
        pass
    with deadline(60.0), pytest.raises(BulkheadFull), bulkhead:
        raise AssertionError("unreachable")
    leave.set()
    for thread in threads:
        thread.join()
    assert whole(bulkhead)


# -- cancellation ----------------------------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize("moment", range(14))
@pytest.mark.parametrize("give_back", range(0, 10, 3))
@pytest.mark.parametrize("form", ["decorated", "block", "stream"])
def test_cancelled_at_any_moment_no_slot_is_lost(world: World, moment: int, give_back: int, form: str) -> None:
    """Waiting, being woken, with the slot in hand, inside: wherever it strikes, the next in line gets in."""
    bulkhead = Bulkhead(1, queue=9)
    done: list[int] = []

    async def main() -> None:
        async with world() as here:
            step: Callable[[], Any] = here.step

            @bulkhead
            async def decorated(number: int) -> None:
                await step()
                await step()
                done.append(number)

            async def block(number: int) -> None:
                async with bulkhead:
                    await step()
                    await step()
                    done.append(number)

            @bulkhead
            async def items() -> AsyncGenerator[None, None]:
                await step()
                yield
                await step()

            async def stream(number: int) -> None:
                async with aclosing(items()) as source:
                    async for _ in source:
                        await step()
                done.append(number)

            work = {"decorated": decorated, "block": block, "stream": stream}[form]
            await bulkhead.__aenter__()
            tasks = [here.spawn(partial(work, number)) for number in range(3)]
            for now in range(max(moment, give_back) + 1):
                if now == moment:
                    tasks[1].cancel()
                if now == give_back:
                    await bulkhead.__aexit__(None, None, None)
                await step()
            await here.settle()
            assert all(task.done for task in tasks)
            await work(9)

    world.run(main)
    assert {0, 2, 9} <= set(done)
    assert whole(bulkhead)


@worlds
def test_a_slot_handed_over_at_the_moment_of_cancellation_goes_on(world: World) -> None:
    bulkhead = Bulkhead(1, queue=9)

    @bulkhead
    async def work() -> str:
        return "done"

    async def main() -> None:
        async with world() as here:
            async with bulkhead:
                first = here.spawn(work)
                await here.settle()
                second = here.spawn(work)
                await here.settle()
                assert bulkhead.waiting == 2
            # The slot is already its own, but it has not taken a step with it. (trio lets a task that is on its way
            # reach its next checkpoint, asyncio does not.)
            first.cancel()
            await here.settle()
            assert first.done
            assert second.value == "done"

    world.run(main)
    assert whole(bulkhead)


class Poke(BaseException):
    """Raised by a signal handler, wherever the main thread is."""


class Poker:
    """Interrupts the main thread once, after a while."""

    caught = True

    def __enter__(self) -> Poker:
        # Nothing else may be struck: a tracer that is, coverage's, keeps its own lock for ever, and what is raised in a
        # callback of the collector, hypothesis's, goes nowhere.
        gc.disable()
        self.tracer = sys.gettrace()
        sys.settrace(None)
        self.before = signal.signal(signal.SIGALRM, self.poke)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
        sys.settrace(self.tracer)
        gc.enable()

    def poke(self, *_: object) -> None:
        if not self.caught:
            raise Poke

    def until_poked(self, microseconds: float, fn: Callable[[], object]) -> None:
        with suppress(Poke), suppress(Poke):  # Of a machine that stands still it may come twice.
            self.caught = False
            # Again after a while: a finalizer, of a coroutine that was struck, may have swallowed the first.
            signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6, 0.5)
            while True:
                fn()
        self.caught = True


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # Struck before its first step.
def test_interrupted_at_any_moment_no_slot_is_lost() -> None:
    """An exception out of a signal handler, thousands of times, anywhere between two steps of the interpreter."""
    bulkhead = Bulkhead(2)

    @bulkhead
    def work() -> None: ...

    @bulkhead
    async def awork() -> None: ...

    def drive() -> None:
        with suppress(StopIteration):
            awork().send(None)

    with Poker() as poker:
        for number in range(3000):
            poker.until_poked(5 + number * 7919 % 97, drive if number % 3 == 0 else work)
            assert whole(bulkhead), number


def test_interrupted_under_contention_nobody_sleeps_on() -> None:
    """Interrupted while it waits, is woken, wakes others: no slot is lost, and the others come to their end."""
    bulkhead = Bulkhead(1, queue=9)
    finished: list[int] = []
    stop = threading.Event()

    @bulkhead
    def work() -> None: ...

    def other() -> None:
        while not stop.is_set():
            work()
        finished.append(1)

    threads = [threading.Thread(target=other, daemon=True) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        with Poker() as poker:
            for number in range(400):
                poker.until_poked(50 + number * 7919 % 997, work)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
    for thread in threads:
        thread.join(60)
    assert finished == [1, 1]
    assert whole(bulkhead)


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_queue() -> None:
    class Interrupted(FakeClock):
        def wait(self, acquire: Callable[[float], bool], seconds: float | None) -> bool:
            assert bulkhead.waiting == 1
            raise KeyboardInterrupt

    bulkhead = Bulkhead(1, queue=1)

    @Pipeline(bulkhead, env=Env(clock=Interrupted()))
    def work() -> None: ...

    with bulkhead:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert bulkhead.waiting == 0
    assert whole(bulkhead)


def test_a_wake_that_is_interrupted_is_done_again() -> None:
    """The shell gave its slot back, and the interrupt came before it could wake the one who waits for it."""
    woken: list[int] = []

    class Interrupting:
        """The queue: the first look at it, from the way out, is struck by an interrupt."""

        armed = False

        def __bool__(self) -> bool:
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt
            return False

    class Core(Bulkhead):
        __slots__ = ()

        def _wake(self) -> None:
            woken.append(len(self._tokens))

    bulkhead = Core(1, queue=1)
    waiters: Any = Interrupting()
    bulkhead._waiters = waiters

    @bulkhead
    def work() -> None:
        waiters.armed = True

    @bulkhead
    async def awork() -> None:
        waiters.armed = True

    with pytest.raises(KeyboardInterrupt):
        work()
    with pytest.raises(KeyboardInterrupt):
        awork().send(None)
    assert woken == [1, 1]


# -- one pool for all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3])
def test_threads_loops_and_trio_share_one_pool(limit: int) -> None:
    """Three threads, two asyncio loops and a trio run at once: never above the limit, and everybody gets through."""
    bulkhead = Bulkhead(limit, queue=1000)
    inside: list[None] = []
    peaks: list[int] = []
    done: list[str] = []
    barrier = threading.Barrier(6)
    rounds = 60

    @bulkhead
    def work() -> None:
        inside.append(None)
        peaks.append(len(inside))
        threading.Event().wait(0)
        inside.pop()

    @bulkhead
    async def awork(step: Callable[[], Any]) -> None:
        inside.append(None)
        peaks.append(len(inside))
        await step()
        inside.pop()

    def in_thread() -> None:
        barrier.wait()
        for _ in range(rounds):
            work()
        done.append("thread")

    def in_asyncio() -> None:
        async def several() -> None:
            for _ in range(rounds // 3):
                await awork(turn)

        async def main() -> None:
            await asyncio.gather(several(), several(), several())

        barrier.wait()
        asyncio.run(main())
        done.append("asyncio")

    def in_trio() -> None:
        async def several() -> None:
            for _ in range(rounds // 3):
                await awork(trio.lowlevel.checkpoint)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(several)

        barrier.wait()
        trio.run(main)
        done.append("trio")

    bodies = [in_thread, in_thread, in_thread, in_asyncio, in_asyncio, in_trio]
    threads = [threading.Thread(target=body, daemon=True) for body in bodies]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert sorted(done) == ["asyncio", "asyncio", "thread", "thread", "thread", "trio"]
    assert max(peaks) <= limit
    assert len(peaks) == 6 * rounds
    assert whole(bulkhead)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_refusal_leaves_no_cycle() -> None:
    """What the caller held lives no longer than the error does."""
    bulkhead = Bulkhead(1)

    class Thing:
        pass

    @bulkhead
    def work(thing: object) -> None: ...

    gc.disable()
    try:
        for refused in (False, True):
            thing = Thing()
            gone = weakref.ref(thing)
            if refused:
                with bulkhead:
                    try:
                        work(thing)
                    except BulkheadFull:
                        pass
            else:
                work(thing)
            del thing
            assert gone() is None
    finally:
        gc.enable()


# -- the faults of others --------------------------------------------------------------------------------------------


@worlds
def test_hyx_bulkhead_keeps_its_capacity_when_waiters_are_cancelled(world: World) -> None:
    """hyx takes two semaphores in turn, and loses a permit for each waiter that is cancelled between them."""
    bulkhead = Bulkhead(2, queue=50)

    @bulkhead
    async def work() -> None: ...

    async def main() -> None:
        async with world() as here:
            async with bulkhead, bulkhead:
                waiters = [here.spawn(work) for _ in range(20)]
                await here.settle()
                for waiter in waiters:
                    waiter.cancel()
                await here.settle()
                assert bulkhead.waiting == 0

    world.run(main)
    assert whole(bulkhead)


def test_hyx_bulkhead_is_made_at_import_time() -> None:
    """hyx wants a running event loop where policies are declared: at import, where there is none."""

    class Service:
        policy: ClassVar[Bulkhead] = Bulkhead(1, queue=1)

        @policy
        async def call(self) -> str:
            return "done"

    assert asyncio.run(Service().call()) == "done"
    assert asyncio.run(Service().call()) == "done"
    assert trio.run(Service().call) == "done"


def test_nopanic_bulkhead_counts_threads_and_loops_together() -> None:
    """nopanic's bulkhead(2) admitted six at once: its threads and each of its loops had a count of their own."""
    bulkhead = Bulkhead(1)

    @bulkhead
    def work() -> str:
        return "in"

    @bulkhead
    async def awork() -> str:
        return "in"

    async def elsewhere() -> None:
        with pytest.raises(BulkheadFull):
            await awork()
        with pytest.raises(BulkheadFull):
            work()

    with bulkhead:
        asyncio.run(elsewhere())
        asyncio.run(elsewhere())
        trio.run(elsewhere)
    assert bulkhead.rejected == 6
    assert whole(bulkhead)


def test_nopanic_bulkhead_has_a_bounded_queue() -> None:
    """nopanic's waiters pile up without end."""
    assert Bulkhead(1).queue == 0


def test_pyresilience_retrying_caller_keeps_its_own_error() -> None:
    """pyresilience gives the slot up during the backoff, and reports BulkheadFull in place of what went wrong.

    Outside Retry, the bulkhead holds its slot over all attempts; inside, each attempt asks anew.
    """
    clock = FakeClock()
    bulkhead = Bulkhead(1)
    held: list[int] = []

    class Thrice(Policy):
        name = "thrice"

        def sync(self, call: Call, env: Env) -> Call:
            def thrice(*args: Any, **kwargs: Any) -> Any:
                for _ in range(2):
                    with suppress(ConnectionError):
                        call(*args, **kwargs)
                    env.clock.sleep(1.0)
                return call(*args, **kwargs)

            return thrice

    @Pipeline(bulkhead, Thrice(), env=Env(clock=clock))
    def work() -> None:
        held.append(bulkhead.active)
        raise ConnectionError("the real error")

    with pytest.raises(ConnectionError, match="the real error"):
        work()
    assert held == [1, 1, 1]
    assert whole(bulkhead)


def test_failsafe_listener_that_raises_leaks_nothing() -> None:
    """In failsafe-go a panic skips the release. Here a sink that raises is outside the lock and loses no slot."""

    def sink(event: object) -> None:
        raise RuntimeError("observer")

    bulkhead = Bulkhead(1)

    @Pipeline(bulkhead, env=Env(sinks=[sink]))
    def work() -> None: ...

    with bulkhead, pytest.raises(BulkheadFull):
        work()
    assert whole(bulkhead)
