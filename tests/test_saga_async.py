"""Sagas of coroutines, in memory, under asyncio and trio: what differs from plain ones, mostly cancellation."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings

from resilient import (
    RESULT,
    UNKNOWN,
    CallTimeout,
    DeadlineExceeded,
    DurableSaga,
    Env,
    Retry,
    Saga,
    SagaAborted,
    SagaError,
    SagaStuck,
    branch,
    call,
    deadline,
    remaining,
)
from resilient import _aio as aio
from resilient.clock import in_trio
from resilient.events import SagaEnded, StepDone
from resilient.saga import AsyncSagaRun
from resilient.stores import MemoryStore
from resilient.testing import FakeClock, Recorder
from tests._saga_worlds import alone
from tests.test_saga import ONCE, STEPS, Failure, Model
from tests.worlds import AsyncioWorld, TrioWorld, World, turn, worlds

Log = list[Any]


@pytest.fixture
def log() -> Log:
    return []


async def forever() -> None:
    """Wait until somebody cancels."""
    if in_trio():
        await trio.sleep_forever()
    else:
        await asyncio.get_running_loop().create_future()


async def pause() -> None:
    """Let others go on; here a cancel arrives."""
    if in_trio():
        await trio.lowlevel.checkpoint()
    else:
        await turn()


class Steps:
    """Steps that leave a trace, and what undoes them, all with awaits inside."""

    def __init__(self, log: Log) -> None:
        self.log = log

    async def do(self, name: str) -> str:
        await pause()
        self.log.append(name)
        return f"value of {name}"

    async def fail(self, name: str) -> str:
        await pause()
        self.log.append(name)
        raise Failure(name)

    async def hang(self, name: str) -> str:
        self.log.append(name)
        await forever()
        return name

    async def undo(self, name: str, result: Any) -> None:
        await pause()
        self.log.append((name, result))

    async def broken(self, name: str) -> None:
        await pause()
        self.log.append(f"broken {name}")
        raise OSError(name)


@pytest.fixture
def steps(log: Log) -> Steps:
    return Steps(log)


# -- as plain ones ---------------------------------------------------------------------------------------------------


@worlds
def test_steps_of_both_kinds_are_done_and_undone(world: World, steps: Steps, log: Log) -> None:
    def plain(name: str) -> str:
        log.append(name)
        return name

    async def main() -> None:
        with pytest.raises(SagaAborted) as caught:
            async with Saga("order") as saga:
                assert await saga.step(steps.do, "a", compensate=steps.undo) == "value of a"
                assert await saga.step(plain, "b", compensate=call(log.append, RESULT)) == "b"
                assert await saga.step(steps.do, "c", compensate=steps.undo, register="after", name="c") == "value of c"
                await saga.step(steps.fail, "d", compensate=steps.undo)
        assert isinstance(caught.value.__cause__, Failure)

    world.run(main)
    assert log == ["a", "b", "c", "d", ("d", UNKNOWN), ("c", "value of c"), "b", ("a", "value of a")]


@worlds
def test_a_saga_that_ends_well(world: World, steps: Steps, log: Log) -> None:
    recorder = Recorder()

    async def main() -> None:
        for env in (Env(), Env(sinks=[recorder])):
            async with Saga("order", id="o", env=env) as saga:
                await saga.step(steps.do, "a", compensate=steps.undo)
                await saga.step(steps.do, "b", compensate=steps.undo, register="after", name="second")
                saga.pivot()
                await saga.step(steps.do, "c")
                assert await saga.parallel((steps.do, "d"), (steps.do, "e")) == ["value of d", "value of e"]
        with pytest.raises(RuntimeError, match="order has ended"):
            await saga.step(steps.do, "f")

    world.run(main)
    assert len(log) == 10
    assert [event.step for event in recorder.of(StepDone)][:3] == ["Steps.do", "second", "Steps.do"]
    assert recorder.events[-1] == SagaEnded("order", "o", "done")


@worlds
def test_a_failing_step_is_told(world: World, steps: Steps) -> None:
    recorder = Recorder()

    async def main() -> None:
        with pytest.raises(SagaStuck):
            async with Saga("order", env=Env(sinks=[recorder]), retries=ONCE) as saga:
                await saga.step(steps.fail, "a", compensate=steps.broken)

    world.run(main)
    assert isinstance(recorder.of(StepDone)[0].error, Failure)


@worlds
def test_each_object_is_for_one_block(world: World) -> None:
    async def main() -> None:
        saga = Saga("order")
        async with saga:
            with pytest.raises(RuntimeError, match="has been used already"):
                async with saga:
                    raise AssertionError

    world.run(main)


@worlds
def test_what_is_wrong_with_a_step_is_said_before_it_runs(world: World, steps: Steps, log: Log) -> None:
    async def main() -> None:
        async with Saga("order") as saga:
            with pytest.raises(TypeError, match="says nothing of its compensation"):
                await saga.step(steps.do, "a")
            with pytest.raises(TypeError, match="a step needs a function"):
                await saga.step("reserve", compensate=None)  # type: ignore[call-overload]
            with pytest.raises(TypeError, match="compensate must be"):
                await saga.step(steps.do, "a", compensate=5)  # type: ignore[call-overload]
            with pytest.raises(ValueError, match="timeout"):
                await saga.step(steps.do, "a", compensate=steps.undo, timeout=-1)
            with pytest.raises(TypeError, match="says nothing of its compensation"):
                await saga.parallel((steps.do, "a"))
            with pytest.raises(TypeError, match="inside another one: use `async with`"):
                saga.nested("inner").__enter__()

    world.run(main)
    assert log == []


@worlds
def test_steps_at_the_same_time_are_branches_and_nothing_else(world: World, steps: Steps, log: Log) -> None:
    refused: Log = []

    async def main() -> None:
        async with Saga("order") as saga:

            async def another() -> None:
                for begin in (
                    lambda: saga.step(steps.do, "inner", compensate=None),
                    lambda: saga.parallel(branch(steps.do, "inner", compensate=None)),
                    lambda: saga.nested("inner").__aenter__(),
                ):
                    with pytest.raises(RuntimeError, match="steps beside each other are branches of"):
                        await begin()
                    refused.append(1)

            await saga.step(another, compensate=None)
            await saga.parallel(branch(another, compensate=None))
            await saga.step(steps.do, "next", compensate=None)

    world.run(main)
    assert len(refused) == 6
    assert log == ["next"]


@worlds
def test_retry_and_timeout_guard_one_step(world: World) -> None:
    clock = FakeClock()
    failures = [Failure(), Failure()]

    async def flaky() -> str:
        if failures:
            raise failures.pop()
        return "fine"

    def plain() -> str:
        return "plain"

    async def main() -> None:
        async with Saga("order", env=Env(clock=clock)) as saga:
            assert await saga.step(flaky, compensate=None, retry=Retry(Failure, wait=1)) == "fine"
            assert await saga.step(plain, compensate=None, retry=ONCE, timeout=5) == "plain"
            with pytest.raises(CallTimeout, match="forever"):
                await saga.step(forever, compensate=None, timeout=5)

    world.run(main)
    assert clock.slept == [1, 1]


# -- inside each other -----------------------------------------------------------------------------------------------


@worlds
def test_a_saga_inside(world: World, steps: Steps, log: Log) -> None:
    async def main() -> None:
        with pytest.raises(SagaAborted):
            async with Saga("order") as saga:
                await saga.step(steps.do, "a", compensate=steps.undo)
                async with saga.nested("good") as good:
                    await good.step(steps.do, "b", compensate=steps.undo)
                with pytest.raises(SagaAborted, match="saga bad"):
                    async with saga.nested("bad") as bad:
                        await bad.step(steps.do, "c", compensate=steps.undo)
                        raise Failure
                raise Failure

    world.run(main)
    assert [one if isinstance(one, str) else one[0] for one in log] == ["a", "b", "c", "c", "b", "a"]


@worlds
def test_cancelled_while_a_saga_inside_is_undone_it_is_undone_whole_and_stays_cancelled(
    world: World, steps: Steps, log: Log
) -> None:
    cancelled: Log = []

    async def undo() -> None:
        handles[0].cancel()
        await pause()
        log.append("undo b")

    async def body() -> None:
        try:
            async with Saga("order") as saga:
                await saga.step(steps.do, "a", compensate=steps.undo)
                async with saga.nested("inner") as inner:
                    await inner.step(steps.do, "b", compensate=call(undo))
                    raise Failure
        except SagaAborted:
            # Under trio the scope is cancelled, and the next await says so.
            await pause()
            raise
        except BaseException as error:
            cancelled.append(type(error).__name__)
            raise

    handles: Log = []

    async def main() -> None:
        async with world() as tasks:
            handles.append(tasks.spawn(body))

    world.run(main)
    assert log == ["a", "b", "undo b", ("a", "value of a")]
    assert isinstance(handles[0].error, (asyncio.CancelledError, trio.Cancelled))


# -- cancelled -------------------------------------------------------------------------------------------------------


async def _hang_in_a_step(saga: AsyncSagaRun, steps: Steps) -> None:
    await saga.step(steps.hang, "b", compensate=steps.undo)


async def _hang_between_steps(saga: AsyncSagaRun, steps: Steps) -> None:
    steps.log.append("b")
    await forever()


async def _hang_in_a_group(saga: AsyncSagaRun, steps: Steps) -> None:
    await saga.parallel(branch(steps.hang, "b", compensate=steps.undo), branch(steps.do, "c", compensate=steps.undo))


async def _hang_inside(saga: AsyncSagaRun, steps: Steps) -> None:
    async with saga.nested("inner") as inner:
        await inner.step(steps.hang, "b", compensate=steps.undo)


HANGS = {
    _hang_in_a_step: ["a", "b", ("b", UNKNOWN), ("a", "value of a")],
    _hang_between_steps: ["a", "b", ("a", "value of a")],
    _hang_in_a_group: ["a", "b", "c", ("c", "value of c"), ("b", UNKNOWN), ("a", "value of a")],
    _hang_inside: ["a", "b", ("b", UNKNOWN), ("a", "value of a")],
}


@worlds
@pytest.mark.parametrize("hang", HANGS)
def test_a_cancelled_saga_is_undone_and_stays_cancelled(
    world: World, steps: Steps, log: Log, hang: Callable[..., Any]
) -> None:
    """Temporal's sample undid nothing when cancelled in a sleep; benzene and latch nothing when cancelled in step 2;
    agent-saga raised its own error, and was not cancelled any more.
    """

    async def body() -> None:
        async with Saga("order", compensate_on=OSError) as saga:
            await saga.step(steps.do, "a", compensate=steps.undo)
            await hang(saga, steps)

    handle: Any = None

    async def main() -> None:
        nonlocal handle
        async with world() as tasks:
            handle = tasks.spawn(body)
            await tasks.settle()
            handle.cancel()

    world.run(main)
    assert log == HANGS[hang]
    assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))


@pytest.mark.parametrize("hang", HANGS)
def test_asyncio_counts_of_cancels_are_balanced(steps: Steps, log: Log, hang: Callable[..., Any]) -> None:
    async def body() -> str:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with Saga("order") as saga:
                await saga.step(steps.do, "a", compensate=steps.undo)
                await hang(saga, steps)
        except asyncio.CancelledError:
            assert task.cancelling() == 1
            raise
        raise AssertionError

    async def main() -> None:
        task = asyncio.create_task(body())
        while "b" not in log:
            await turn()
        await turn()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(main())
    assert log == HANGS[hang]


@pytest.mark.parametrize("hang", HANGS)
def test_asyncio_a_timeout_around_it_is_a_timeout(steps: Steps, log: Log, hang: Callable[..., Any]) -> None:
    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                async with Saga("order") as saga:
                    await saga.step(steps.do, "a", compensate=steps.undo)
                    limit.reschedule(asyncio.get_running_loop().time())
                    await hang(saga, steps)
        assert task.cancelling() == 0

    asyncio.run(main())
    assert log[-1] == ("a", "value of a")


def test_asyncio_a_task_group_around_it_raises_what_failed(steps: Steps, log: Log) -> None:
    async def body() -> None:
        async with Saga("order") as saga:
            await saga.step(steps.hang, "a", compensate=steps.undo)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(body())
            await pause()
            await pause()
            raise Failure

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    assert [type(error) for error in caught.value.exceptions] == [Failure]
    assert log == ["a", ("a", UNKNOWN)]


def test_asyncio_a_task_group_inside_it_is_one_failure(steps: Steps, log: Log) -> None:
    async def main() -> None:
        async with Saga("order") as saga:
            await saga.step(steps.do, "a", compensate=steps.undo)
            async with asyncio.TaskGroup() as group:
                group.create_task(steps.fail("b"))

    with pytest.raises(SagaAborted) as caught:
        asyncio.run(main())
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert log == ["a", "b", ("a", "value of a")]


def test_trio_a_scope_around_it_catches_its_own_cancel(steps: Steps, log: Log) -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            async with Saga("order") as saga:
                await saga.step(steps.do, "a", compensate=steps.undo)
                scope.cancel()
                await saga.step(steps.hang, "b", compensate=steps.undo)
        assert scope.cancelled_caught
        await trio.lowlevel.checkpoint()

    trio.run(main)
    assert log == ["a", "b", ("b", UNKNOWN), ("a", "value of a")]


@worlds
def test_cancelled_while_it_is_undone_it_goes_on_and_is_cancelled_then(world: World, steps: Steps, log: Log) -> None:
    async def undo(name: str) -> None:
        for _ in range(3):
            handle.cancel()
            await pause()
        log.append(f"undo {name}")

    async def body() -> None:
        try:
            async with Saga("order") as saga:
                await saga.step(steps.do, "a", compensate=steps.undo)
                await saga.step(steps.do, "b", compensate=undo)
                raise Failure
        finally:
            if world is TrioWorld:
                await trio.lowlevel.checkpoint()

    handle: Any = None

    async def main() -> None:
        nonlocal handle
        async with world() as tasks:
            handle = tasks.spawn(body)

    world.run(main)
    assert log == ["a", "b", "undo b", ("a", "value of a")]
    assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))


def test_asyncio_what_came_of_it_is_the_cause_of_that_cancel(steps: Steps, log: Log) -> None:
    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None

        async def undo(name: str) -> None:
            assert task is not None
            task.cancel()
            await pause()
            raise OSError(name)

        with pytest.raises(asyncio.CancelledError) as caught:
            async with Saga("order", id="o", retries=ONCE) as saga:
                await saga.step(steps.do, "a", compensate=undo)
                raise Failure
        assert isinstance(caught.value.__cause__, SagaStuck)
        assert caught.value.__notes__ == ["resilient: saga order (o) is stuck: OSError('a')"]
        task.uncancel()

    asyncio.run(main())


def test_asyncio_a_second_cancel_changes_nothing(steps: Steps, log: Log) -> None:
    async def undo(name: str) -> None:
        task.cancel()
        await pause()
        log.append("undone")

    async def body() -> None:
        async with Saga("order") as saga:
            await saga.step(steps.hang, "a", compensate=undo)

    task: Any = None

    async def main() -> None:
        nonlocal task
        task = asyncio.create_task(body())
        await turn()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert log == ["a", "undone"]


@worlds
def test_a_cancelled_saga_that_is_stuck_says_so(
    world: World, steps: Steps, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()

    async def body() -> None:
        async with Saga("order", id="o", retries=ONCE, env=Env(sinks=[recorder])) as saga:
            await saga.step(steps.do, "a", compensate=steps.broken)
            await saga.step(steps.hang, "b", compensate=None)

    async def main() -> None:
        async with world() as tasks:
            handle = tasks.spawn(body)
            await tasks.settle()
            handle.cancel()

    world.run(main)
    assert log == ["a", "b", "broken a"]
    assert recorder.events[-1] == SagaEnded("order", "o", "stuck")
    assert [record.getMessage() for record in caplog.records] == ["saga order (o) is stuck: OSError('a')"]


# -- grace -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second is lost with a compensation that will not end."""
    monkeypatch.setattr(aio, "GRACE", 0.001)


@worlds
@pytest.mark.parametrize("gone", [True, False])
def test_a_cancelled_saga_has_its_grace_and_no_more(
    world: World, steps: Steps, log: Log, caplog: pytest.LogCaptureFixture, gone: bool
) -> None:
    recorder = Recorder()

    async def undo(name: str) -> None:
        log.append(f"undo {name}")
        handle.cancel()
        await forever()

    async def body() -> None:
        try:
            async with Saga("order", id="o", grace=0.001, retries=ONCE, env=Env(sinks=[recorder])) as saga:
                await saga.step(steps.do, "a", compensate=steps.undo)
                await saga.step(steps.do, "b", compensate=undo)
                if gone:
                    await forever()
                raise Failure
        finally:
            if world is TrioWorld:
                await trio.lowlevel.checkpoint()

    handle: Any = None

    async def main() -> None:
        nonlocal handle
        async with world() as tasks:
            handle = tasks.spawn(body)
            await tasks.settle()
            handle.cancel()

    world.run(main)
    # Neither is it begun again, nor the next.
    assert log == ["a", "b", "undo b"]
    assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))
    assert recorder.events[-1] == SagaEnded("order", "o", "stuck")
    if gone or world is AsyncioWorld:
        assert len(caplog.records) == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("gone", [True, False])
def test_asyncio_a_compensation_that_will_not_end_is_left(
    steps: Steps, log: Log, caplog: pytest.LogCaptureFixture, gone: bool
) -> None:
    release: Any = None

    async def undo(name: str) -> None:
        task.cancel()
        while not release.done():
            try:
                await asyncio.shield(release)
            except asyncio.CancelledError:
                log.append("will not")

    async def body() -> None:
        async with Saga("order", id="o", grace=0.001, retries=ONCE) as saga:
            await saga.step(steps.do, "a", compensate=undo)
            if gone:
                await forever()
            raise Failure

    task: Any = None

    async def main() -> None:
        nonlocal task, release
        release = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(body())
        await turn()
        await turn()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        release.set_result(None)
        await turn()
        await turn()

    asyncio.run(main())
    assert log == ["a", "will not"]
    assert [record.getMessage() for record in caplog.records] == ["saga order (o) is stuck: TimeoutError()"]


def test_trio_what_is_sheltered_may_be_left_by_its_end() -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            with pytest.raises(TimeoutError):
                await aio.sheltered(True, 0.001, trio.sleep_forever)

            async def fail() -> None:
                raise Failure

            with pytest.raises(Failure):
                await aio.sheltered(True, 60, fail)
            assert await aio.sheltered(True, 60, pause) == (None, False)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_asyncio_what_is_sheltered_may_be_cancelled_at_its_end() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            await aio.sheltered(True, 0.001, forever)
        with pytest.raises(TimeoutError):
            await aio.sheltered(True, 0.001, forever, late=lambda: None)

    asyncio.run(main())


@worlds
def test_a_cancel_that_nobody_sent_is_a_failed_compensation(world: World, steps: Steps) -> None:
    async def undo(name: str) -> None:
        raise asyncio.CancelledError

    async def main() -> None:
        with pytest.raises(SagaStuck) as caught:
            async with Saga("order", retries=ONCE) as saga:
                await saga.step(steps.do, "a", compensate=undo)
                raise Failure
        assert isinstance(caught.value.exceptions[0].__cause__, asyncio.CancelledError)

    world.run(main)


# -- closed ----------------------------------------------------------------------------------------------------------


class Suspended:
    """What a coroutine awaits when it is closed."""

    def __await__(self) -> Generator[None, None, None]:
        yield


def test_a_coroutine_that_is_closed_undoes_what_is_plain(log: Log) -> None:
    async def body() -> None:
        async with Saga("order") as saga:
            await saga.step(log.append, "a", compensate=call(log.append, "undo a"))
            await Suspended()

    coroutine = body()
    coroutine.send(None)
    coroutine.close()
    assert log == ["a", "undo a"]


def test_what_had_to_be_awaited_is_told(steps: Steps, log: Log) -> None:
    async def body() -> None:
        async with Saga("order") as saga:
            await saga.step(log.append, "a", compensate=call(log.append, "undo a"))
            await saga.step(log.append, "b", compensate=steps.undo)
            await saga.step(log.append, "c", compensate=call(Suspended))
            await Suspended()

    coroutine = body()
    coroutine.send(None)
    with pytest.raises(SagaStuck, match="its coroutine was closed") as caught:
        coroutine.close()
    assert len(caught.value.exceptions) == 2
    assert "has to be awaited" in str(caught.value.exceptions[0])
    assert log == ["a", "b", "c", "undo a"]


def test_an_async_generator_may_have_a_saga(steps: Steps, log: Log) -> None:
    async def items() -> AsyncIterator[int]:
        async with Saga("order") as saga:
            await saga.step(steps.do, "a", compensate=steps.undo)
            yield 1
            raise Failure

    async def main() -> None:
        with pytest.raises(SagaAborted):
            async for _ in items():
                pass

    asyncio.run(main())
    assert log == ["a", ("a", "value of a")]


# -- beside each other -----------------------------------------------------------------------------------------------


@worlds
def test_a_failing_branch_cancels_its_siblings_and_waits_for_their_ends(world: World, steps: Steps, log: Log) -> None:
    async def slow() -> None:
        try:
            await forever()
        finally:
            log.append("slow has ended")

    async def undo(result: Any) -> None:
        log.append(("undo", result))

    async def main() -> None:
        with pytest.raises(SagaAborted) as caught:
            async with Saga("order") as saga:
                await saga.step(steps.do, "a", compensate=steps.undo)
                await saga.parallel(
                    branch(slow, compensate=undo),
                    branch(lambda: "at once", compensate=undo),
                    branch(steps.fail, "b", compensate=None),
                )
        assert str(caught.value.__cause__) == "b"

    world.run(main)
    assert log == ["a", "b", "slow has ended", ("undo", "at once"), ("undo", UNKNOWN), ("a", "value of a")]


@worlds
def test_errors_on_the_way_out_are_notes(world: World, steps: Steps) -> None:
    async def stubborn() -> None:
        try:
            await forever()
        finally:
            raise OSError("on the way out")

    async def main() -> None:
        with pytest.raises(SagaAborted) as caught:
            async with Saga("order") as saga:
                await saga.parallel(branch(steps.fail, "b", compensate=None), branch(stubborn, compensate=None))
        assert caught.value.__cause__ is not None
        assert caught.value.__cause__.__notes__ == [
            "resilient: another branch failed as well: OSError('on the way out')"
        ]

    world.run(main)


def test_asyncio_cancelled_again_while_it_waits_for_branches(log: Log) -> None:
    async def stubborn() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            task.cancel()
            for _ in range(3):
                await pause()
            log.append("ended")

    async def body() -> None:
        async with Saga("order") as saga:
            await saga.parallel(branch(stubborn, compensate=call(log.append, "undone")))

    task: Any = None

    async def main() -> None:
        nonlocal task
        task = asyncio.create_task(body())
        await turn()
        await turn()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert log == ["ended", "undone"]


@worlds
def test_branches_have_keys_and_contexts_of_their_own(world: World, log: Log) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="outside")

    saga: Any = None

    async def look() -> tuple[str, str]:
        seen = variable.get()
        variable.set("inside")
        await pause()
        return saga.step_key, seen

    async def main() -> None:
        nonlocal saga
        async with Saga("order", id="o") as saga:
            found = await saga.parallel(branch(look, compensate=None), branch(look, compensate=None))
            assert found == [("order/o/1", "outside"), ("order/o/2", "outside")]
            assert saga.step_key == "order/o/3"
            assert variable.get() == "outside"

    world.run(main)


@worlds
def test_compensations_know_their_step(world: World) -> None:
    seen: Log = []
    saga: Any = None

    async def key() -> None:
        await pause()
        seen.append(saga.step_key)

    async def main() -> None:
        nonlocal saga
        with pytest.raises(SagaAborted):
            async with Saga("order", id="o") as saga:
                for _ in range(3):
                    await saga.step(key, compensate=key)
                raise Failure

    world.run(main)
    assert seen == [f"order/o/{number}" for number in (1, 2, 3, 3, 2, 1)]


# -- time ------------------------------------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize("around", [False, True])
def test_steps_are_cut_off_when_the_time_is_over_and_compensations_are_not(
    world: World, steps: Steps, log: Log, around: bool
) -> None:
    clock = FakeClock()
    left: Log = []

    async def undo(name: str) -> None:
        left.append(remaining())
        await clock.asleep(60)
        log.append(f"undo {name}")

    async def main() -> None:
        with pytest.raises(SagaAborted) as caught, deadline(5 if around else 99, clock=clock):
            async with Saga("order", timeout=None if around else 5, env=Env(clock=clock)) as saga:
                await saga.step(steps.do, "a", compensate=undo)
                assert remaining() == 5
                await clock.asleep(1)
                await saga.step(steps.hang, "b", compensate=undo)
        assert isinstance(caught.value.__cause__, CallTimeout)
        assert caught.value.__cause__.seconds == 5
        assert clock.now() == 125

    world.run(main)
    assert log == ["a", "b", "undo b", "undo a"]
    assert left == [None, None]


@worlds
def test_no_step_begins_after_that(world: World, steps: Steps, log: Log) -> None:
    clock = FakeClock()

    async def main() -> None:
        async with Saga("order", timeout=5, env=Env(clock=clock)) as saga:
            await clock.asleep(6)
            with pytest.raises(DeadlineExceeded):
                await saga.step(steps.do, "a", compensate=steps.undo)
            with pytest.raises(DeadlineExceeded):
                await saga.parallel(branch(steps.do, "a", compensate=steps.undo))

    world.run(main)
    assert log == []


# -- nothing is kept alive -------------------------------------------------------------------------------------------


class Thing:
    pass


@worlds
@pytest.mark.parametrize("how", ["done", "step", "inner", "parallel"])
def test_a_saga_leaves_no_reference_cycle(world: World, how: str) -> None:
    async def do(thing: Thing) -> None:
        await pause()

    async def fail(thing: Thing) -> None:
        raise Failure

    async def body(thing: Thing) -> None:
        try:
            async with Saga("order") as saga:
                await saga.step(do, thing, compensate=do)
                if how == "parallel":
                    await saga.parallel(branch(do, thing, compensate=do), branch(fail, thing, compensate=do))
                if how == "inner":
                    async with saga.nested("inner") as inner:
                        await inner.step(fail, thing, compensate=do)
                if how == "step":
                    await saga.step(fail, thing, compensate=do)
        except SagaAborted:
            pass

    async def main() -> None:
        gc.collect()
        gc.disable()
        try:
            thing = Thing()
            ref = weakref.ref(thing)
            await body(thing)
            del thing
            await pause()
            assert ref() is None
        finally:
            gc.enable()

    world.run(main)


# -- random programs against the model -------------------------------------------------------------------------------


class Subject:
    """The program by a real saga."""

    def __init__(self) -> None:
        self.log: Log = []

    async def do(self, number: int, how: str) -> int:
        self.log.append(f"do {number}")
        # The branches of a group begin all before the first fails.
        await pause()
        if how != "ok":
            await pause()
            raise Failure
        return number

    async def undo(self, number: int, how: str, result: Any) -> None:
        await pause()
        self.log.append(f"undo {number} {result}")

    async def broken(self, number: int, how: str, result: Any) -> None:
        self.log.append(f"broken {number} {result}")
        raise OSError

    def compensation(self, name: str) -> Any:
        return None if name == "none" else getattr(self, name)

    async def run(self, saga: AsyncSagaRun, program: Any) -> None:
        for kind, *rest in program:
            number = int(saga.step_key.rpartition("/")[2])
            if kind == "pivot":
                saga.pivot()
            elif kind == "step":
                how, undo, register = rest
                try:
                    await saga.step(self.do, number, how, compensate=self.compensation(undo), register=register)
                except Failure:
                    if how != "caught":
                        raise
            elif kind == "parallel":
                branches = [
                    branch(self.do, number + at, how, compensate=self.undo if undo else None)
                    for at, (how, undo) in enumerate(rest[0])
                ]
                before = len(self.log)
                try:
                    await saga.parallel(*branches)
                finally:
                    self.log[before:] = [set(self.log[before:])]
            else:
                try:
                    async with saga.nested("inner") as inner:
                        await self.run(inner, rest[0])
                except (Failure, SagaAborted, SagaStuck):
                    if not rest[1]:
                        raise

    async def saga(self, program: Any) -> str:
        try:
            async with Saga("order", id="o", retries=ONCE) as saga:
                await self.run(saga, program)
        except (SagaAborted, SagaStuck) as error:
            return type(error).__name__
        return "done"


@worlds
@settings(deadline=None, max_examples=100)
@given(program=STEPS)
def test_random_programs_do_what_the_model_says(world: World, program: Any) -> None:
    model, subject = Model(), Subject()
    ends: Log = []

    async def main() -> None:
        ends.append(await subject.saga(program))

    world.run(main)
    assert ends == [model.saga(program)]
    assert subject.log == model.log


# -- with a journal --------------------------------------------------------------------------------------------------


async def astep(name: str) -> str:
    if name == "fail":
        raise Failure(name)
    return f"value of {name}"


def step(name: str) -> str:
    if name == "fail":
        raise Failure(name)
    return f"value of {name}"


def test_the_same_block_with_a_journal() -> None:
    async def main() -> None:
        store = MemoryStore()
        async with Saga("order", id="o-1", store=store) as saga:
            assert await saga.step(astep, "a", compensate=None) == "value of a"
            assert await saga.step(step, "b", compensate=step) == "value of b"
        with pytest.raises(SagaAborted) as caught:
            async with Saga("order", id="o-2", store=store) as saga:
                with pytest.raises(Failure):
                    await saga.step(astep, "fail", compensate=None)
                await saga.step(astep, "b", compensate=None)
        refused = caught.value.__cause__
        assert isinstance(refused, SagaError)
        assert "a saga with a journal cannot go on then" in str(refused)
        assert isinstance(refused.__cause__, Failure)

    asyncio.run(main())


def test_a_store_that_cannot_serve_this_kind_is_refused() -> None:
    class Nothing:
        pass

    async def main() -> None:
        with pytest.raises(TypeError, match="cannot be used by this kind of saga: it has no aexecute"):
            async with Saga("order", store=Nothing()):
                raise AssertionError

    asyncio.run(main())
    with pytest.raises(TypeError, match="it has no execute"), Saga("order", store=Nothing()):
        raise AssertionError


def test_a_coroutine_that_is_closed_stops_its_heartbeat_and_leaves_the_rest_to_recovery() -> None:
    async def main() -> None:
        store = MemoryStore()

        async def body() -> None:
            async with Saga("order", id="o-1", store=store) as saga:
                await saga.step(astep, "a", compensate=astep)
                books.append(saga._book)
                await Suspended()

        books: Log = []
        coroutine = body()
        coroutine.send(None)
        stopped: Log = []
        books[0].stop = lambda: stopped.append(True)
        coroutine.close()
        assert stopped == [True]

    asyncio.run(main())


RAN: Log = []
FAIL: Log = []


def once(name: str) -> str:
    RAN.append(name)
    return name


def last() -> None:
    if FAIL:
        raise FAIL.pop()


def test_steps_without_compensation_are_not_run_again_either() -> None:
    RAN.clear()

    def plain(saga: Any) -> str:
        saga.pivot()
        value: str = saga.step(once, "plain")
        saga.step(last)
        return value

    async def coroutine(saga: Any) -> str:
        saga.pivot()
        value: str = await saga.step(once, "coroutine")
        await saga.step(last)
        return value

    with alone():
        store = MemoryStore()
        again, later = DurableSaga("plain", store=store)(plain), DurableSaga("coroutine", store=store)(coroutine)
        FAIL.append(Failure())
        with pytest.raises(Failure):
            again(id="o-1")
        assert again(id="o-1") == "plain"

        async def main() -> None:
            FAIL.append(Failure())
            with pytest.raises(Failure):
                await later(id="o-1")
            assert await later(id="o-1") == "coroutine"

        asyncio.run(main())
        assert RAN == ["plain", "coroutine"]
