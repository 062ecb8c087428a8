"""Sagas of plain functions, in memory: every promise of `Saga`, and the faults of others that it does not have."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient import (
    RESULT,
    UNKNOWN,
    DeadlineExceeded,
    Env,
    Retry,
    Saga,
    SagaAborted,
    SagaStuck,
    Timeout,
    branch,
    call,
    deadline,
    remaining,
)
from resilient import _run as runs
from resilient._run import guarded
from resilient.events import Compensated, Retrying, SagaEnded, StepDone
from resilient.saga import SagaRun
from resilient.testing import FakeClock, Recorder
from tests._saga_worlds import Interrupting, once_waited_for

Log = list[Any]


class Failure(Exception):
    pass


@pytest.fixture
def log() -> Log:
    return []


class World:
    """Steps that leave a trace, and what undoes them."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def do(self, name: str) -> str:
        self.log.append(name)
        return f"value of {name}"

    def fail(self, name: str) -> str:
        self.log.append(name)
        raise Failure(name)

    def undo(self, name: str, result: Any) -> None:
        self.log.append((name, result))

    def broken(self, name: str) -> None:
        self.log.append(f"broken {name}")
        raise OSError(name)


@pytest.fixture
def world(log: Log) -> World:
    return World(log)


ONCE = Retry(Exception, attempts=1, name="once")


# -- undoing ---------------------------------------------------------------------------------------------------------


def test_a_saga_that_ends_well_undoes_nothing(world: World, log: Log) -> None:
    with Saga("order") as saga:
        assert saga.step(world.do, "a", compensate=world.undo) == "value of a"
        assert saga.step(world.do, "b", compensate=None) == "value of b"
    assert log == ["a", "b"]


def test_a_failed_saga_is_undone_the_last_first(world: World, log: Log) -> None:
    with pytest.raises(SagaAborted, match=r"saga order \(o-1\): a step failed, and all that was done is") as caught:
        with Saga("order", id="o-1") as saga:
            saga.step(world.do, "a", compensate=world.undo)
            saga.step(world.do, "b", compensate=call(log.append, RESULT))
            saga.step(world.do, "c", compensate=None)
            saga.step(world.fail, "d", compensate=None)
    assert log == ["a", "b", "c", "d", "value of b", ("a", "value of a")]
    assert isinstance(caught.value.__cause__, Failure)
    assert (caught.value.saga, caught.value.id) == ("order", "o-1")


def test_steno_the_failing_step_is_undone_as_well(world: World, log: Log) -> None:
    """Steno and others register after the step: what it did before it failed was never undone."""
    with pytest.raises(SagaAborted), Saga("order") as saga:
        saga.step(world.fail, "a", compensate=world.undo)
    assert log == ["a", ("a", UNKNOWN)]


def test_a_step_that_fails_without_a_trace_says_so(world: World, log: Log) -> None:
    with pytest.raises(SagaAborted), Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo, register="after")
        saga.step(world.fail, "b", compensate=world.undo, register="after")
    assert log == ["a", "b", ("a", "value of a")]


def test_a_failure_between_the_steps_undoes_too(world: World, log: Log) -> None:
    with pytest.raises(SagaAborted), Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        raise Failure
    assert log == ["a", ("a", "value of a")]


def test_a_body_may_catch_the_error_of_a_step_and_go_on(world: World, log: Log) -> None:
    with Saga("order") as saga:
        with pytest.raises(Failure):
            saga.step(world.fail, "a", compensate=world.undo)
        saga.step(world.do, "b", compensate=world.undo)
    assert log == ["a", "b"]


def test_what_failed_and_was_caught_is_undone_if_the_saga_fails_later(world: World, log: Log) -> None:
    with pytest.raises(SagaAborted), Saga("order") as saga:
        with pytest.raises(Failure):
            saga.step(world.fail, "a", compensate=world.undo)
        raise Failure
    assert log == ["a", ("a", UNKNOWN)]


def test_keywords_of_steps_reach_both(log: Log) -> None:
    def do(*, sku: str) -> None:
        log.append(sku)

    def undo(*, sku: str) -> None:
        log.append(f"undo {sku}")

    with pytest.raises(SagaAborted), Saga("order") as saga:
        saga.step(do, sku="x", compensate=undo)
        raise Failure
    assert log == ["x", "undo x"]


# -- what is refused before it runs ----------------------------------------------------------------------------------


def test_saying_nothing_of_compensation_is_refused_before_the_step_runs(world: World, log: Log) -> None:
    with Saga("order") as saga:
        with pytest.raises(TypeError, match=r"World\.do says nothing of its compensation: compensate=function, or"):
            saga.step(world.do, "a")
        assert not log
        saga.pivot()
        saga.step(world.do, "b")
    assert log == ["b"]


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"compensate": 1}, TypeError, "compensate must be a function"),
        ({"register": "later", "compensate": None}, ValueError, "register must be 'before' or 'after', not 'later'"),
        ({"register": "before", "compensate": len, "timeout": float("nan")}, ValueError, "timeout must be a finite"),
        ({"compensate": len, "timeout": True}, TypeError, "timeout must be a number"),
        ({"compensate": len, "timeout": 0}, ValueError, "timeout must be a finite"),
        ({"compensate": len, "retry": 3}, TypeError, "retry must be a Retry, not 3"),
        ({"compensate": len, "name": ""}, TypeError, "name must be some text"),
        ({"compensate": len, "name": 5}, TypeError, "name must be some text"),
    ],
)
def test_wrong_settings_of_a_step_are_refused_before_it_runs(
    world: World, log: Log, wrong: dict[str, Any], error: type[Exception], text: str
) -> None:
    with Saga("order") as saga:
        with pytest.raises(error, match=text):
            saga.step(world.do, "a", **wrong)
        assert saga.step_key.endswith("/1")
        assert saga._stack == []
    assert log == []


@pytest.mark.parametrize("compensate", [None, len])
@pytest.mark.parametrize("name", [None, "step"])
def test_a_step_needs_a_function(compensate: Any, name: str | None) -> None:
    with Saga("order") as saga:
        with pytest.raises(TypeError, match="a step needs a function, not 'reserve'"):
            saga.step("reserve", compensate=compensate, name=name)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a step needs a function"):
            saga.step("reserve")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"name": ""}, ValueError, "name must be text"),
        ({"name": 5}, TypeError, "name must be some text, not 5"),
        ({"name": "a/b"}, ValueError, "no '/', not 'a/b'"),
        ({"name": "a\n"}, ValueError, "printable"),
        ({"name": "n" * 256}, ValueError, "255"),
        ({"id": ""}, ValueError, "id must be text"),
        ({"id": 5}, ValueError, "id must be text"),
        ({"id": "a\n"}, ValueError, "id must be text"),
        ({"id": "i" * 256}, ValueError, "id must be text"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"timeout": True}, TypeError, "timeout"),
        ({"grace": float("inf")}, ValueError, "grace"),
        ({"grace": "30"}, TypeError, "grace"),
        ({"lease": -1}, ValueError, "lease"),
        ({"version": True}, TypeError, "version must be an integer, not True"),
        ({"version": -1}, ValueError, "version"),
        ({"version": 1.5}, TypeError, "version"),
        ({"on_stuck": "stop"}, ValueError, "on_stuck must be 'raise' or 'continue', not 'stop'"),
        ({"compensate_on": 5}, TypeError, "compensate_on must be exception classes or predicates"),
        ({"compensate_on": (Failure, 5)}, TypeError, "compensate_on"),
        ({"retries": 3}, TypeError, "retries must be a Retry, not 3"),
    ],
)
def test_wrong_settings_of_a_saga_are_refused(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"name": "order", **wrong}
    with pytest.raises(error, match=text):
        Saga(**given)


def test_settings_that_make_sense() -> None:
    saga = Saga("order", id="o-1", timeout=5, grace=1, lease=2, version=0, retries=ONCE)
    assert (saga.timeout, saga.grace, saga.lease, saga.version) == (5.0, 1.0, 2.0, 0)


def test_an_async_step_is_refused_before_anything_is_lost(world: World, log: Log) -> None:
    async def later(name: str) -> None:
        log.append(name)

    with pytest.raises(SagaAborted) as caught, Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        _ = saga.step(later, "b", compensate=None)
    assert "later is async, and its saga is not: use `async with`" in str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, TypeError)
    assert log == ["a", ("a", "value of a")]


@pytest.mark.parametrize("options", [{"retry": ONCE}, {"timeout": 5}])
def test_an_async_step_is_refused_under_guards_too(log: Log, options: dict[str, Any]) -> None:
    async def later() -> None:
        log.append(1)

    def hidden() -> Any:
        return later()

    with Saga("order") as saga:
        for step in (later, hidden):
            with pytest.raises(TypeError, match="is async, and its saga is not"):
                _ = saga.step(step, compensate=None, **options)
    assert not log


def test_what_can_be_awaited_and_not_closed_is_refused_too() -> None:
    class Later:
        def __await__(self) -> Iterator[None]:
            yield

    with Saga("order") as saga, pytest.raises(TypeError, match="is async, and its saga is not"):
        saga.step(Later, compensate=None)


@pytest.mark.parametrize("way", ["function", "call", "partial", "branch"])
def test_an_async_compensation_of_a_plain_saga_is_refused_before_the_step_runs(world: World, way: str) -> None:
    async def undo(name: str) -> None: ...

    given: Any = {"call": call(undo, "a"), "partial": functools.partial(undo, "a")}.get(way, undo)
    with pytest.raises(SagaAborted) as caught, Saga("order", retries=ONCE) as saga:
        if way == "branch":
            saga.parallel(branch(world.do, "a", compensate=given))
        saga.step(world.do, "a", compensate=given)
    assert "is async, and its saga is not: use `async with`" in str(caught.value.__cause__)
    assert world.log == []


# -- ended while a step still runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_step_that_still_runs_at_the_end_is_waited_for_and_then_undone(
    world: World, fails: bool, inside: bool
) -> None:
    """A step that another thread runs: agent-saga and latch undo beside it."""
    begun, go = threading.Event(), threading.Event()

    def slow(name: str) -> str:
        begun.set()
        go.wait()
        return world.do(name)

    with pytest.raises(SagaAborted) as caught, Saga("order") as saga:
        with saga.nested("part") if inside else contextlib.nullcontext(saga) as part:
            thread = threading.Thread(
                target=part.step, args=(slow, "a"), kwargs={"compensate": world.undo}, daemon=True
            )
            thread.start()
            begun.wait()
            with pytest.raises(RuntimeError, match="while another step of saga order runs"):
                part.step(world.do, "b", compensate=world.undo)
            threading.Thread(target=once_waited_for, args=(saga, go.set), daemon=True).start()
            if fails:
                raise Failure
    causes = [caught.value.__cause__, getattr(caught.value.__cause__, "__cause__", None)]
    assert any(isinstance(cause, Failure if fails else RuntimeError) for cause in causes)
    assert world.log == ["a", ("a", "value of a")]


def test_an_interrupt_while_a_step_is_waited_for_is_the_end_of_the_saga(world: World) -> None:
    saga = Saga("order")
    with pytest.raises(KeyboardInterrupt), saga as run:
        run.step(world.do, "a", compensate=world.undo)
        run._active = 2  # as if another thread ran one
        run._saga.grace = Interrupting()
    assert world.log == ["a", ("a", "value of a")]


# -- one object, one block, one step at a time -----------------------------------------------------------------------


def test_each_object_is_for_one_block(world: World) -> None:
    saga = Saga("order")
    with saga, pytest.raises(RuntimeError, match="order has been used already"), saga:
        raise AssertionError
    with pytest.raises(RuntimeError, match="order has been used already"), saga:
        raise AssertionError


def test_a_saga_that_has_ended_has_no_other_steps(world: World, log: Log) -> None:
    with Saga("order") as saga:
        pass
    for begin in (
        lambda: saga.step(world.do, "a", compensate=None),
        lambda: saga.parallel(branch(world.do, "a", compensate=None)),
        lambda: saga.nested("inner").__enter__(),
    ):
        with pytest.raises(RuntimeError, match="saga order has ended: no"):
            begin()
    assert not log


def test_a_compensation_has_no_steps_of_its_saga(world: World, log: Log) -> None:
    with pytest.raises(SagaStuck) as caught, Saga("order", retries=ONCE) as saga:
        saga.step(world.do, "a", compensate=lambda _: saga.step(world.do, "b", compensate=None))
        raise Failure
    assert "has ended" in str(caught.value.exceptions[0])
    assert log == ["a"]


def test_a_step_inside_a_step_is_refused(world: World, log: Log) -> None:
    def outer() -> None:
        for begin in (
            lambda: saga.step(world.do, "inner", compensate=None),
            lambda: saga.parallel(branch(world.do, "inner", compensate=None)),
            lambda: saga.nested("inner").__enter__(),
        ):
            with pytest.raises(RuntimeError, match="while another step of saga order runs: steps beside each other"):
                begin()

    with Saga("order") as saga:
        saga.step(outer, compensate=None)
        saga.step(world.do, "next", compensate=None)
        saga.parallel(branch(outer, compensate=None))
    assert log == ["next"]


def test_a_step_may_have_a_saga_of_its_own(world: World, log: Log) -> None:
    def inner() -> None:
        with Saga("inner", id="i") as saga:
            saga.step(lambda: log.append(saga.step_key), compensate=None)

    with Saga("outer") as saga:
        saga.step(inner, compensate=None)
        saga.parallel(branch(inner, compensate=None))
    assert log == ["inner/i/1", "inner/i/1"]


# -- compensations that fail -----------------------------------------------------------------------------------------


def test_larz_errors_of_compensations_come_out_and_the_rest_still_run(world: World, log: Log) -> None:
    """larzstate swallowed the errors of compensations."""
    with pytest.raises(SagaStuck) as caught, Saga("order", id="o-1", retries=ONCE) as saga:
        saga.step(world.do, "a", compensate=world.undo)
        saga.step(world.do, "b", compensate=world.broken)
        saga.step(world.do, "c", compensate=world.broken)
        saga.step(world.fail, "d", compensate=world.undo)
    stuck = caught.value
    assert log == ["a", "b", "c", "d", ("d", UNKNOWN), "broken c", "broken b", ("a", "value of a")]
    assert isinstance(stuck, ExceptionGroup)
    assert [str(error) for error in stuck.exceptions] == ["c", "b"]
    assert isinstance(stuck.__cause__, Failure)
    assert (stuck.saga, stuck.id) == ("order", "o-1")
    assert stuck.exceptions[0].__notes__[-1] == "resilient: compensation of step World.do of saga order (o-1)"


def test_on_stuck_continue_goes_on_to_saga_aborted(world: World, log: Log) -> None:
    with pytest.raises(SagaAborted, match="not all that was done could be undone") as caught:
        with Saga("order", retries=ONCE, on_stuck="continue") as saga:
            saga.step(world.do, "a", compensate=world.broken)
            raise Failure
    assert caught.value.__notes__ == ["resilient: a compensation failed for good: OSError('a')"]
    assert isinstance(caught.value.__cause__, Failure)


def test_compensations_are_tried_four_times(world: World, log: Log) -> None:
    clock = FakeClock()
    with pytest.raises(SagaStuck), Saga("order", env=Env(clock=clock)) as saga:
        saga.step(world.do, "a", compensate=world.broken)
        raise Failure
    assert log == ["a", *["broken a"] * 4]
    assert len(clock.slept) == 3


def test_masstransit_4676_each_compensation_counts_its_own_retries(log: Log) -> None:
    """MassTransit#4676: the retries of a step were counted against its compensation."""
    tries: dict[str, int] = {}

    def flaky(name: str) -> None:
        tries[name] = tries.get(name, 0) + 1
        if tries[name] % 3:
            raise Failure(name)

    retry = Retry(Failure, attempts=3, wait=0)
    with pytest.raises(SagaAborted), Saga("order", retries=retry) as saga:
        saga.step(flaky, "a", compensate=flaky, retry=retry)
        saga.step(flaky, "b", compensate=flaky, retry=retry)
        raise Failure
    assert tries == {"a": 6, "b": 6}


def test_retries_of_compensations_are_told_by_a_name(world: World) -> None:
    recorder = Recorder()
    retries = Retry(Exception, attempts=2, wait=0)
    with pytest.raises(SagaStuck), Saga("order", retries=retries, env=Env(sinks=[recorder])) as saga:
        saga.step(world.do, "a", compensate=world.broken)
        raise Failure
    assert [event.policy for event in recorder.of(Retrying)] == ["compensation"]
    named = Retry(Exception, attempts=1, name="mine")
    with pytest.raises(SagaStuck), Saga("order", retries=named) as saga:
        saga.step(world.do, "a", compensate=world.broken)
        raise Failure
    assert named.name == "mine"


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_undo_and_come_out(world: World, log: Log, kind: type[BaseException]) -> None:
    stop = kind()
    with pytest.raises(kind) as caught, Saga("order", compensate_on=OSError) as saga:
        saga.step(world.do, "a", compensate=world.undo)
        raise stop
    assert caught.value is stop
    assert log == ["a", ("a", "value of a")]


def test_an_interrupt_in_a_compensation_keeps_none_from_running(world: World, log: Log) -> None:
    stops = [KeyboardInterrupt()]

    def undo(name: str) -> None:
        log.append(f"undo {name}")
        if stops:
            raise stops.pop()

    with pytest.raises(KeyboardInterrupt) as caught, Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        saga.step(world.do, "b", compensate=undo)
        raise Failure
    assert log == ["a", "b", "undo b", "undo b", ("a", "value of a")]
    assert isinstance(caught.value.__cause__, Failure)


def test_an_interrupted_saga_that_is_stuck_says_so(world: World, log: Log, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, Saga("order", id="o", retries=ONCE) as saga:
        saga.step(world.do, "a", compensate=world.undo)
        saga.step(world.do, "b", compensate=world.broken)
        raise KeyboardInterrupt
    assert log[-2:] == ["broken b", ("a", "value of a")]
    assert caught.value.__notes__ == ["resilient: saga order (o) is stuck: OSError('b')"]
    assert [record.getMessage() for record in caplog.records] == ["saga order (o) is stuck: OSError('b')"]


def test_a_generator_that_is_closed_is_undone(world: World, log: Log) -> None:
    def work() -> Iterator[int]:
        with Saga("order") as saga:
            saga.step(world.do, "a", compensate=world.undo)
            yield 1

    generator = work()
    next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert log == ["a", ("a", "value of a")]


# -- which errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [Failure, (OSError, Failure), lambda error: isinstance(error, Failure), (OSError, lambda error: True)]
)
def test_errors_that_are_named_undo(world: World, log: Log, wanted: Any) -> None:
    with pytest.raises(SagaAborted), Saga("order", compensate_on=wanted) as saga:
        saga.step(world.do, "a", compensate=world.undo)
        raise Failure
    assert log == ["a", ("a", "value of a")]


@pytest.mark.parametrize("wanted", [OSError, (OSError, KeyError), lambda error: False])
def test_others_leave_everything_as_it_is(world: World, log: Log, wanted: Any) -> None:
    error = Failure()
    with pytest.raises(Failure) as caught, Saga("order", id="o", compensate_on=wanted) as saga:
        saga.step(world.do, "a", compensate=world.undo)
        with saga.nested("inner") as inner:
            inner.step(world.do, "b", compensate=world.undo)
            raise error
    assert caught.value is error
    assert log == ["a", "b"]
    assert error.__notes__ == ["resilient: saga order (o) is not undone: compensate_on does not name this error"]


def test_an_error_that_the_predicate_cannot_judge_is_undone(world: World, log: Log) -> None:
    def judge(error: Any) -> bool:
        return bool(error.code)

    with pytest.raises(SagaAborted) as caught, Saga("order", compensate_on=judge) as saga:
        saga.step(world.do, "a", compensate=world.undo)
        raise Failure
    assert log == ["a", ("a", "value of a")]
    assert caught.value.__cause__ is not None
    assert "compensate_on could not judge this, so it is undone" in caught.value.__cause__.__notes__[0]


# -- the pivot -------------------------------------------------------------------------------------------------------


def test_after_the_pivot_nothing_is_undone(world: World, log: Log) -> None:
    with pytest.raises(SagaStuck) as caught, Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        saga.pivot()
        with saga.nested("inner") as inner:
            inner.step(world.do, "b", compensate=world.undo)
            inner.step(world.fail, "c")
    assert log == ["a", "b", "c"]
    assert "failed after its pivot" in str(caught.value)
    assert isinstance(caught.value.__cause__, Failure)
    assert caught.value.exceptions == (caught.value.__cause__,)


def test_interrupts_after_the_pivot_come_out(world: World, log: Log) -> None:
    with pytest.raises(KeyboardInterrupt), Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        saga.pivot()
        raise KeyboardInterrupt
    assert log == ["a"]


# -- inside each other -----------------------------------------------------------------------------------------------


def test_a_saga_inside_is_one_step_of_its_parent(world: World, log: Log) -> None:
    with pytest.raises(SagaAborted), Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        with saga.nested("inner") as inner:
            inner.step(world.do, "b", compensate=world.undo)
            with inner.nested("innermost") as innermost:
                innermost.step(world.do, "c", compensate=world.undo)
            inner.step(world.do, "d", compensate=world.undo)
        saga.step(world.fail, "e", compensate=None)
    assert [one[0] for one in log[5:]] == ["d", "c", "b", "a"]


def test_a_saga_inside_that_fails_is_undone_at_once_and_alone(world: World, log: Log) -> None:
    with Saga("order", id="o") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        with pytest.raises(SagaAborted, match=r"saga inner \(o\): a step failed") as caught:
            with saga.nested("inner") as inner:
                inner.step(world.do, "b", compensate=world.undo)
                inner.step(world.fail, "c", compensate=world.undo)
        saga.step(world.do, "d", compensate=world.undo)
    assert log == ["a", "b", "c", ("c", UNKNOWN), ("b", "value of b"), "d"]
    assert isinstance(caught.value.__cause__, Failure)


def test_what_was_undone_inside_is_not_undone_again(world: World, log: Log) -> None:
    with pytest.raises(SagaAborted, match="saga order") as caught, Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        with saga.nested("inner") as inner:
            inner.step(world.do, "b", compensate=world.undo)
            raise Failure
    assert log == ["a", "b", ("b", "value of b"), ("a", "value of a")]
    assert isinstance(caught.value.__cause__, SagaAborted)
    assert caught.value.__cause__.saga == "inner"


def test_an_interrupt_inside_undoes_the_whole(world: World, log: Log) -> None:
    with pytest.raises(KeyboardInterrupt), Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        with saga.nested("inner") as inner:
            inner.step(world.do, "b", compensate=world.undo)
            raise KeyboardInterrupt
    assert log == ["a", "b", ("b", "value of b"), ("a", "value of a")]


def test_what_could_not_be_undone_inside_is_tried_again_by_the_whole(world: World, log: Log) -> None:
    with pytest.raises(SagaStuck) as caught, Saga("order", retries=ONCE) as saga:
        saga.step(world.do, "a", compensate=world.undo)
        with saga.nested("inner") as inner:
            inner.step(world.do, "b", compensate=world.broken)
            inner.step(world.do, "c", compensate=world.undo)
            inner.step(world.do, "d", compensate=world.broken)
            raise Failure
    inside = caught.value.__cause__
    assert caught.value.saga == "order"
    assert isinstance(inside, SagaStuck)
    assert inside.saga == "inner"
    assert [str(error) for error in inside.exceptions] == ["d", "b"]
    undone = ["broken d", ("c", "value of c"), "broken b", "broken d", "broken b", ("a", "value of a")]
    assert log[4:] == undone
    assert [str(error) for error in caught.value.exceptions] == ["d", "b"]


def test_on_stuck_continue_holds_inside_too(world: World) -> None:
    with Saga("order", retries=ONCE, on_stuck="continue") as saga:
        with pytest.raises(SagaAborted, match=r"saga inner .* not all that was done") as caught:
            with saga.nested("inner") as inner:
                inner.step(world.do, "b", compensate=world.broken)
                raise Failure
    assert caught.value.__notes__ == ["resilient: a compensation failed for good: OSError('b')"]


def test_an_interrupt_while_a_saga_inside_is_undone_undoes_the_whole(world: World, log: Log) -> None:
    stops = [KeyboardInterrupt()]

    def undo(name: str) -> None:
        log.append(f"undo {name}")
        if stops:
            raise stops.pop()

    with pytest.raises(KeyboardInterrupt), Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        with saga.nested("inner") as inner:
            inner.step(world.do, "b", compensate=undo)
            raise Failure
    assert log == ["a", "b", "undo b", "undo b", ("a", "value of a")]


def test_an_object_inside_is_for_one_block_of_its_own_kind() -> None:
    with Saga("order") as saga:
        for wrong in ("", 5):
            with pytest.raises(TypeError, match="name must be some text"):
                saga.nested(wrong)  # type: ignore[arg-type]
        nested = saga.nested("inner")
        with nested, pytest.raises(RuntimeError, match="inner has been used already"), nested:
            raise AssertionError
        with pytest.raises(RuntimeError, match="inner has been used already"), nested:
            raise AssertionError
        with pytest.raises(TypeError, match="saga inner is inside another one: use `with`"):
            saga.nested("inner").__aenter__().send(None)


# -- beside each other -----------------------------------------------------------------------------------------------


def test_branches_give_their_values_in_order(world: World) -> None:
    with Saga("order") as saga:
        values = saga.parallel(*(branch(world.do, name, compensate=None) for name in "abc"))
    assert values == ["value of a", "value of b", "value of c"]


def test_branches_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=60)
    with Saga("order") as saga:
        saga.parallel(*(branch(meeting.wait, compensate=None) for _ in range(3)))


def test_a_group_is_undone_after_all_in_flight_have_ended(world: World, log: Log) -> None:
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise Failure("fast")

    def slow() -> str:
        assert failed.wait(60)
        log.append("slow has ended")
        return "slow"

    def undo(result: Any) -> None:
        log.append(("undo", result))

    with pytest.raises(SagaAborted) as caught, Saga("order") as saga:
        saga.step(world.do, "a", compensate=world.undo)
        saga.parallel(branch(slow, compensate=undo), branch(fail, compensate=undo))
    assert log == ["a", "slow has ended", ("undo", UNKNOWN), ("undo", "slow"), ("a", "value of a")]
    assert str(caught.value.__cause__) == "fast"


def test_errors_of_other_branches_are_notes(world: World) -> None:
    with pytest.raises(SagaAborted) as caught, Saga("order") as saga:
        saga.parallel(branch(world.fail, "a", compensate=None), branch(world.fail, "b", compensate=None))
    assert caught.value.__cause__ is not None
    assert str(caught.value.__cause__) == "a"
    assert caught.value.__cause__.__notes__ == ["resilient: another branch failed as well: Failure('b')"]


def test_an_interrupt_of_a_branch_comes_before_its_errors(world: World, log: Log) -> None:
    def stop() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit), Saga("order") as saga:
        saga.parallel(branch(world.fail, "a", compensate=world.undo), branch(stop, compensate=None))
    assert log == ["a", ("a", UNKNOWN)]


def test_an_interrupt_of_the_waiting_thread_waits_for_the_branches(
    world: World, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = threading.Event()
    real = threading.Semaphore

    class Interrupted(real):  # type: ignore[misc,valid-type]
        def acquire(self, *args: Any, **kwargs: Any) -> bool:
            if not interrupted.is_set():
                interrupted.set()
                raise KeyboardInterrupt
            return bool(super().acquire(*args, **kwargs))

    def slow() -> str:
        assert interrupted.wait(60)
        log.append("slow")
        return "done"

    with pytest.raises(KeyboardInterrupt), Saga("order") as saga:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Semaphore", Interrupted)
            saga.parallel(branch(slow, compensate=call(log.append, RESULT)))
    assert log == ["slow", "done"]


def test_a_thread_that_cannot_start_fails_the_group_after_the_others(
    world: World, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resilient import _threads

    begun: Log = []
    real = _threads.run

    def run(job: Any) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(job)
        real(job)

    monkeypatch.setattr(_threads, "run", run)
    with pytest.raises(SagaAborted) as caught, Saga("order") as saga:
        saga.parallel(*(branch(world.do, name, compensate=world.undo) for name in "abc"))
    assert str(caught.value.__cause__) == "can't start new thread"
    assert log == ["a", ("c", UNKNOWN), ("b", UNKNOWN), ("a", "value of a")]


def test_an_async_branch_of_a_plain_saga_is_refused(world: World, log: Log) -> None:
    async def later() -> None:
        log.append(1)

    with pytest.raises(SagaAborted) as caught, Saga("order") as saga:
        saga.parallel(branch(later, compensate=None), branch(world.do, "a", compensate=world.undo))
    assert "later is async" in str(caught.value.__cause__)
    assert log == ["a", ("a", "value of a")]


def test_context_variables_reach_the_branches_and_stay_there() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("outside")

    def look() -> tuple[str, float | None]:
        seen = variable.get()
        variable.set("inside")
        return seen, remaining()

    with deadline(60), Saga("order") as saga:
        (seen, left), *_ = saga.parallel(branch(look, compensate=None), branch(look, compensate=None))
    assert seen == "outside"
    assert left is not None
    assert variable.get() == "outside"


def test_what_a_group_is_made_of_is_checked_before_any_of_it_runs(world: World, log: Log) -> None:
    with Saga("order") as saga:
        for wrong, text in (
            ((), "at least one branch"),
            ((branch(world.do, "a", compensate=None), (world.do, "b")), "says nothing of its compensation"),
            ((world.do,), "says nothing of its compensation"),
            (("pack",), "a step needs a function, not 'pack'"),
            (((),), "a step needs a function, not None"),
        ):
            with pytest.raises((TypeError, ValueError), match=text):
                saga.parallel(*wrong)
        with pytest.raises(TypeError, match="compensate must be"):
            branch(world.do, "a", compensate=5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a step needs a function, not 5"):
            branch(5, compensate=None)  # type: ignore[arg-type]
        assert not log
        assert saga.step_key.endswith("/1")
        saga.pivot()
        assert saga.parallel((world.do, "c"), functools.partial(world.do, "d")) == ["value of c", "value of d"]


def test_a_group_without_compensations_leaves_nothing_to_undo(world: World) -> None:
    with Saga("order") as saga:
        saga.parallel(branch(world.do, "a", compensate=None))
        assert saga._stack == []


# -- time ------------------------------------------------------------------------------------------------------------


def test_the_steps_have_the_time_of_the_saga_and_compensations_have_more() -> None:
    clock = FakeClock()
    seen: Log = []

    def step() -> None:
        seen.append(remaining())
        clock.advance(3)

    with pytest.raises(SagaAborted) as caught, Saga("order", timeout=5, env=Env(clock=clock)) as saga:
        saga.step(step, compensate=lambda: seen.append(remaining()))
        saga.step(step, compensate=lambda: seen.append(remaining()))
        saga.step(step, compensate=lambda: seen.append("this step never began"))
    assert seen == [5.0, 2.0, None, None]
    assert isinstance(caught.value.__cause__, DeadlineExceeded)
    assert remaining() is None


def test_no_group_begins_after_the_time_is_over(world: World, log: Log) -> None:
    clock = FakeClock()
    with Saga("order", timeout=5, env=Env(clock=clock)) as saga:
        clock.advance(5)
        with pytest.raises(DeadlineExceeded):
            saga.parallel(branch(world.do, "a", compensate=None))
    assert not log


def test_a_deadline_around_the_saga_ends_its_steps_and_starves_no_compensation(world: World, log: Log) -> None:
    clock = FakeClock()
    left: Log = []
    tries = iter([OSError(), OSError(), None])

    def undo(name: str) -> None:
        left.append(remaining())
        error = next(tries)
        if error is not None:
            raise error

    with deadline(5, clock=clock):
        with pytest.raises(SagaAborted) as caught, Saga("order", env=Env(clock=clock)) as saga:
            saga.step(world.do, "a", compensate=Timeout(9, sync="deadline")(undo))
            clock.advance(6)
            saga.step(world.do, "b", compensate=None)
        assert remaining() == 0.0
    assert log == ["a"]
    assert isinstance(caught.value.__cause__, DeadlineExceeded)
    # Had it been under that deadline, it would have been refused, and not tried again.
    assert len(left) == 3


def test_the_nearer_of_both_times_counts() -> None:
    clock = FakeClock()
    env = Env(clock=clock)
    with deadline(2, clock=clock), Saga("order", timeout=5, env=env) as saga:
        assert saga._until == 2
        assert remaining() == 2
    with deadline(8, clock=clock), Saga("order", timeout=5, env=env) as saga:
        assert saga._until == 5
        assert remaining() == 5


# -- guards ----------------------------------------------------------------------------------------------------------


def test_retry_and_timeout_guard_one_step() -> None:
    clock = FakeClock()
    recorder = Recorder()
    seen: Log = []
    failures = [Failure("1"), Failure("2")]

    def step() -> str:
        seen.append(remaining())
        if failures:
            raise failures.pop()
        return "fine"

    retry = Retry(Failure, attempts=3, wait=1)
    with Saga("order", env=Env(clock=clock, sinks=[recorder])) as saga:
        assert saga.step(step, compensate=None, retry=retry, timeout=5) == "fine"
        assert remaining() is None
    assert seen == [5.0, 5.0, 5.0]
    assert clock.slept == [1, 1]
    assert retry.name is not None
    assert retry.name.endswith("step")
    assert [event.policy for event in recorder.of(Retrying)] == [retry.name] * 2


def test_guarded_functions_are_steps() -> None:
    failures = [Failure()]

    @Retry(Failure, wait=0)
    def step(name: str) -> str:
        if failures:
            raise failures.pop()
        return name

    with Saga("order") as saga:
        assert saga.step(step, "a", compensate=None) == "a"
        assert saga.step(step, "b", compensate=None, retry=Retry(OSError, name="outer"), timeout=5) == "b"


def test_guards_are_made_once_and_keep_no_function_alive() -> None:
    retry = Retry(Failure, attempts=2, wait=0)

    def step() -> int:
        return 1

    made: Any = guarded(step, retry, 5.0, Saga("order").env, False)
    again: Any = guarded(step, retry, 5.0, Saga("order").env, False)
    assert made.func is again.func
    # 1.0 and True are equal, and not the same setting.
    with pytest.raises(TypeError):
        guarded(step, None, True, Saga("order").env, False)
    ref = weakref.ref(step)
    with Saga("order") as saga:
        saga.step(step, compensate=None, retry=retry, timeout=5.0)
    del step, made, again
    assert ref() is None


def test_the_kind_of_the_function_decides_where_the_saga_is_not_known() -> None:
    async def later() -> int:
        return 1

    env = Saga("order").env
    assert guarded(lambda: 2, None, 5.0, env)() == 2
    coroutine = guarded(later, None, 5.0, env)()
    assert hasattr(coroutine, "__await__")
    coroutine.close()


@pytest.mark.parametrize("function", [len, "".join, functools.partial(sorted), str.upper, SimpleNamespace])
def test_anything_callable_can_be_guarded(function: Any) -> None:
    with Saga("order") as saga:
        given = () if function is SimpleNamespace else ("abc",)
        value = saga.step(function, *given, compensate=None, retry=ONCE, timeout=5)
        assert value == function(*given)


# -- names, keys, events ---------------------------------------------------------------------------------------------


def test_names_of_functions() -> None:
    class Step:
        def __call__(self) -> None: ...

    assert runs.called(functools.partial(functools.partial(sorted), key=len)) == "sorted"
    assert runs.called(Step()).endswith("Step")
    assert runs.called(SimpleNamespace(__qualname__=5)) == "SimpleNamespace"


def test_steps_have_names_in_notes_and_events(world: World) -> None:
    recorder = Recorder()

    class Step:
        def __call__(self) -> None: ...

    for sinks in ([], [recorder]):
        with pytest.raises(SagaStuck) as caught, Saga("o", retries=ONCE, env=Env(sinks=sinks)) as saga:
            saga.step(world.do, "a", compensate=world.broken)
            saga.step(world.do, "b", compensate=world.broken, name="charge")
            saga.step(Step(), compensate=world.broken)
            saga.parallel(branch(world.do, "c", compensate=world.broken, name="pack"))
            raise Failure
        notes = [
            error.__notes__[-1].split(" of saga")[0].removeprefix("resilient: ") for error in caught.value.exceptions
        ]
        own = runs.called(Step())
        assert notes == [f"compensation of step {name}" for name in ("pack", own, "charge", "World.do")]
    assert [event.step for event in recorder.of(StepDone)] == ["World.do", "charge", own, "pack"]


def test_keys_are_the_same_for_the_same_step_and_differ_for_others(world: World) -> None:
    seen: Log = []

    def key(*_: Any) -> None:
        seen.append(saga.step_key)

    for _ in range(2):
        with pytest.raises(SagaAborted), Saga("order", id="o-1") as saga:
            key()
            saga.step(key, compensate=key)
            key()
            with saga.nested("inner") as inner:
                inner.step(key, compensate=key)
            saga.parallel(branch(key, compensate=key), branch(key, compensate=key))
            key()
            raise Failure
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    numbers = [1, 1, 2, 2, 3, 4, 5, 4, 3, 2, 1]
    assert sorted(first[4:6]) == ["order/o-1/3", "order/o-1/4"]
    assert first[:4] + first[6:] == [f"order/o-1/{n}" for n in numbers[:4] + numbers[6:]]
    assert sorted(first) == sorted(second)


def test_a_step_that_is_counted_counts_once(world: World) -> None:
    with Saga("order", id="o-1") as saga:
        with pytest.raises(Failure):
            saga.step(world.fail, "a", compensate=None)
        assert saga.step_key == "order/o-1/2"


def test_ids_are_random_unless_given() -> None:
    with Saga("order") as one, Saga("order") as other:
        assert one.id == one.id != other.id
        assert len(one.id) == 32
        assert one.name == "order"
    with Saga("order", id="o-1") as saga:
        assert saga.id == "o-1"


def test_events_tell_what_happened(world: World) -> None:
    recorder = Recorder()
    env = Env(sinks=[recorder])
    with Saga("order", id="1", env=env) as saga:
        saga.step(world.do, "a", compensate=world.undo)
        saga.parallel(branch(world.do, "b", compensate=None))
    with pytest.raises(SagaAborted), Saga("order", id="2", env=env) as saga:
        saga.step(world.do, "a", compensate=world.undo, name="first", register="after")
        saga.step(world.do, "x", compensate=None)
        saga.step(world.fail, "b", compensate=world.undo, name="second")
    with pytest.raises(SagaStuck), Saga("order", id="3", env=env, retries=ONCE) as saga:
        saga.step(world.do, "a", compensate=world.broken, name="first")
        raise Failure
    failed = recorder.of(StepDone)[4].error
    broken = recorder.of(Compensated)[2].error
    assert isinstance(failed, Failure)
    assert isinstance(broken, OSError)
    events = [event for event in recorder.events if isinstance(event, (StepDone, Compensated, SagaEnded))]
    assert events == [
        StepDone("order", "1", "World.do", None),
        StepDone("order", "1", "World.do", None),
        SagaEnded("order", "1", "done"),
        StepDone("order", "2", "first", None),
        StepDone("order", "2", "World.do", None),
        StepDone("order", "2", "second", failed),
        Compensated("order", "2", "second", None),
        Compensated("order", "2", "first", None),
        SagaEnded("order", "2", "aborted"),
        StepDone("order", "3", "first", None),
        Compensated("order", "3", "first", broken),
        SagaEnded("order", "3", "stuck"),
    ]


def test_an_async_step_is_refused_where_somebody_listens_too() -> None:
    async def later() -> None: ...

    recorder = Recorder()
    with Saga("order", env=Env(sinks=[recorder])) as saga, pytest.raises(TypeError, match="is async"):
        _ = saga.step(later, compensate=None)
    assert isinstance(recorder.of(StepDone)[0].error, TypeError)


# -- nothing is kept alive -------------------------------------------------------------------------------------------


class Thing:
    pass


def refs_after(run: Any) -> weakref.ref[Any]:
    """Whether what a saga had in its hands is gone without the help of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        thing = Thing()
        ref = weakref.ref(thing)
        run(thing)
        del thing
        return ref
    finally:
        gc.enable()


def test_a_saga_leaves_no_reference_cycle() -> None:
    def run(thing: Thing) -> None:
        with Saga("order", timeout=5) as saga:
            saga.step(lambda it: None, thing, compensate=lambda it: None)
            with saga.nested("inner") as inner:
                inner.step(lambda it: None, thing, compensate=lambda it: None)

    assert refs_after(run)() is None


@pytest.mark.parametrize("sinks", [(), (lambda event: None,)])
@pytest.mark.parametrize("how", ["step", "inner", "parallel", "stuck"])
def test_a_failed_saga_leaves_no_reference_cycle(how: str, sinks: Any) -> None:
    def do(thing: Thing) -> None: ...

    def fail(thing: Thing) -> None:
        raise Failure

    def run(thing: Thing) -> None:
        undo = fail if how == "stuck" else do
        try:
            with Saga("order", retries=ONCE, env=Env(sinks=sinks)) as saga:
                saga.step(do, thing, compensate=undo)
                if how == "parallel":
                    saga.parallel(branch(do, thing, compensate=do), branch(fail, thing, compensate=do))
                if how == "inner":
                    with saga.nested("inner") as inner:
                        inner.step(do, thing, compensate=do)
                        inner.step(fail, thing, compensate=do)
                saga.step(fail, thing, compensate=do)
        except (SagaAborted, SagaStuck):
            pass

    assert refs_after(run)() is None


# -- random programs against a naive model ---------------------------------------------------------------------------

STEPS = st.deferred(lambda: st.lists(STEP, max_size=4))
STEP: Any = st.one_of(
    st.tuples(
        st.just("step"),
        st.sampled_from(["ok", "ok", "ok", "fail", "caught"]),
        st.sampled_from(["undo", "broken", "none"]),
        st.sampled_from(["before", "after"]),
    ),
    st.tuples(
        st.just("parallel"),
        st.lists(st.tuples(st.sampled_from(["ok", "ok", "fail"]), st.booleans()), min_size=1, max_size=3),
    ),
    st.tuples(st.just("nested"), STEPS, st.booleans()),
    st.tuples(st.just("pivot")),
)


class Model:
    """What a saga should do, said as plainly as it can be."""

    def __init__(self) -> None:
        self.log: Log = []
        self.number = 0
        self.forward = False

    def undo(self, stack: Log) -> Log:
        """Undo, the last first; what could not be."""
        left: Log = []
        for number, how, value in reversed(stack):
            self.log.append(f"{how} {number} {value}")
            if how == "broken":
                left.insert(0, (number, how, value))
        return left

    def run(self, program: Any, stack: Log) -> None:
        for kind, *rest in program:
            if kind == "pivot":
                self.forward = True
            elif kind == "step":
                self.step(stack, *rest)
            elif kind == "parallel":
                numbers = range(self.number + 1, self.number + 1 + len(rest[0]))
                self.number = numbers[-1]
                self.log.append({f"do {number}" for number in numbers})
                for number, (how, undo) in zip(numbers, rest[0], strict=True):
                    if undo:
                        stack.append((number, "undo", UNKNOWN if how == "fail" else number))
                if any(how == "fail" for how, _ in rest[0]):
                    raise Failure
            else:
                inner: Log = []
                try:
                    self.run(rest[0], inner)
                except Failure:
                    if self.forward:
                        stack += inner
                    else:
                        stack += self.undo(inner)
                    if not rest[1]:
                        raise
                else:
                    stack += inner

    def step(self, stack: Log, how: str, undo: str, register: str) -> None:
        self.number += 1
        self.log.append(f"do {self.number}")
        failed = how != "ok"
        if undo != "none" and not (failed and register == "after"):
            stack.append((self.number, undo, UNKNOWN if failed else self.number))
        if how == "fail":
            raise Failure

    def saga(self, program: Any) -> str:
        stack: Log = []
        try:
            self.run(program, stack)
        except Failure:
            if self.forward:
                return "SagaStuck"
            return "SagaStuck" if self.undo(stack) else "SagaAborted"
        return "done"


class Subject:
    """The same by a real saga."""

    def __init__(self) -> None:
        self.log: Log = []

    def do(self, number: int, how: str) -> int:
        self.log.append(f"do {number}")
        if how != "ok":
            raise Failure
        return number

    def undo(self, number: int, how: str, result: Any) -> None:
        self.log.append(f"undo {number} {result}")

    def broken(self, number: int, how: str, result: Any) -> None:
        self.log.append(f"broken {number} {result}")
        raise OSError

    def compensation(self, name: str) -> Any:
        return None if name == "none" else getattr(self, name)

    def run(self, saga: SagaRun, program: Any) -> None:
        for kind, *rest in program:
            if kind == "pivot":
                saga.pivot()
            elif kind == "step":
                how, undo, register = rest
                number = int(saga.step_key.rpartition("/")[2])
                try:
                    value = saga.step(self.do, number, how, compensate=self.compensation(undo), register=register)
                    assert value == number
                except Failure:
                    if how != "caught":
                        raise
            elif kind == "parallel":
                number = int(saga.step_key.rpartition("/")[2])
                undos = ["undo" if undo else "none" for _, undo in rest[0]]
                branches = [
                    branch(self.do, number + at, how, compensate=self.compensation(undo))
                    for at, ((how, _), undo) in enumerate(zip(rest[0], undos, strict=True))
                ]
                before = len(self.log)
                try:
                    saga.parallel(*branches)
                finally:
                    self.log[before:] = [set(self.log[before:])]
            else:
                try:
                    with saga.nested("inner") as inner:
                        self.run(inner, rest[0])
                except (Failure, SagaAborted, SagaStuck):
                    if not rest[1]:
                        raise

    def saga(self, program: Any) -> str:
        try:
            with Saga("order", id="o", retries=ONCE) as saga:
                self.run(saga, program)
        except (SagaAborted, SagaStuck) as error:
            return type(error).__name__
        return "done"


@settings(deadline=None, max_examples=300)
@given(STEPS)
def test_random_programs_do_what_the_model_says(program: Any) -> None:
    model, subject = Model(), Subject()
    assert subject.saga(program) == model.saga(program)
    assert subject.log == model.log


def test_the_model_reaches_every_end() -> None:
    step: Any = ("step", "ok", "broken", "before")
    fail: Any = ("step", "fail", "undo", "before")
    assert [Model().saga(one) for one in ([], [fail], [step, fail], [("pivot",), fail])] == [
        "done",
        "SagaAborted",
        "SagaStuck",
        "SagaStuck",
    ]
