"""Sagas on Temporal: the faults of others that ours does not have, policies, cancellation, and what is refused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from msgspec import Raw
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowExecutionStatus
from temporalio.exceptions import ActivityError, ApplicationError, RetryState, TerminatedError, TimeoutType
from temporalio.exceptions import CancelledError as TemporalCancelled
from temporalio.exceptions import TimeoutError as TemporalTimeout

from resilient import CallTimeout, DurableSaga, Incompatible, Retry, SagaAborted, SagaStuck
from resilient.engines import TemporalEngine, _temporal
from resilient.engines._wire import Order, Told, kept_error, plain
from resilient.policy import SYSTEM
from resilient.saga import RESULT, branch, call
from tests._engines import LEDGERS, TEMPORAL, Declined, act, serve, undo, undo_fails

TRIES: list[str] = []


async def reserve(run: str, sku: str, quantity: int, *, gift: bool = False) -> dict[str, int]:
    LEDGERS[run].append(("did", sku))
    return {"hold": quantity}


async def release(run: str, hold: dict[str, int], why: str) -> None:
    LEDGERS[run].append(("released", hold or "UNKNOWN", why))


async def forever(run: str) -> None:
    LEDGERS[run].append(("did", "forever"))
    try:
        await asyncio.Event().wait()
    finally:
        LEDGERS[run].append(("stopped", "forever"))


async def undo_forever(run: str) -> None:
    LEDGERS[run].append(("undid", "forever"))


async def refuses(run: str) -> None:
    TRIES.append(run)
    raise ConnectionError("refused")


async def key_of(run: str) -> str:
    from resilient._run import step_key

    key = step_key.get()
    assert key is not None
    return key


def remaining_of(run: str) -> bool:
    from resilient import remaining

    left = remaining()
    return left is not None and left <= 60


UNDO = Retry(Exception, attempts=3, wait=0)


@DurableSaga("many", engine=TEMPORAL, retries=UNDO)
async def many(saga: Any, run: str) -> None:
    await saga.step(reserve, run, "s-1", 2, gift=True, compensate=call(release, run, RESULT, why="many"))
    await saga.step(act, run, "second", "ok", compensate=undo)
    await saga.step(act, run, "third", "fail", compensate=undo)


@DurableSaga("sleeper", engine=TEMPORAL)
async def sleeper(saga: Any, run: str, pivot: bool = False) -> None:
    await saga.step(act, run, "first", "ok", compensate=undo)
    if pivot:
        saga.pivot()
    LEDGERS[run].append(("asleep",))
    await asyncio.sleep(30 * 86_400)  # noqa: TID251 - a timer of Temporal's, as its own sample has it


@DurableSaga("limits", engine=TEMPORAL, timeout=60)
async def limits(saga: Any, run: str, what: str) -> Any:
    if what == "step":
        return await saga.step(forever, run, compensate=undo_forever, timeout=0.05)
    if what == "key":
        return [saga.step_key, await saga.step(key_of, run, compensate=None), saga.id, saga.name]
    return await saga.step(remaining_of, run, compensate=None)


@DurableSaga("late", engine=TEMPORAL, timeout=60)
async def late(saga: Any, run: str) -> None:
    saga._until -= 60  # A minute goes by.
    await saga.step(act, run, "late", "ok", compensate=None)


@DurableSaga("retries", engine=TEMPORAL, compensate_on=(KeyError,))
async def retries(saga: Any, run: str) -> None:
    await saga.step(
        refuses, run, compensate=None, retry=Retry(ConnectionError, attempts=3, wait=0.001), name="call somebody"
    )


@DurableSaga("goes on", engine=TEMPORAL)
async def goes_on(saga: Any, run: str) -> None:
    try:
        await saga.step(act, run, "first", "fail", compensate=None)
    except Declined:
        await saga.step(act, run, "second", "ok", compensate=None)


@DurableSaga("siblings", engine=TEMPORAL)
async def siblings(saga: Any, run: str) -> None:
    await saga.parallel(
        branch(forever, run, compensate=undo_forever), branch(fails_beside, run, "f", "fail", compensate=undo_fails)
    )


async def fails_beside(run: str, name: str, how: str) -> None:
    while ("did", "forever") not in LEDGERS[run]:
        await SYSTEM.clock.asleep(0.005)
    raise Declined(name)


SAGAS = (many, sleeper, limits, late, retries, goes_on, siblings)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def server(runner: asyncio.Runner) -> Iterator[Any]:
    # Not the server that skips time: here sagas sleep, to be cancelled.
    yield from serve(runner, *SAGAS, dev=True)


async def events(server: Any, id: str, kind: int) -> list[Any]:  # noqa: A002
    history = await server.client.get_workflow_handle(id).fetch_history()
    return [event for event in history.events if event.event_type == kind]


def scheduled(event: Any) -> Any:
    return event.activity_task_scheduled_event_attributes


async def _until(run: str, entry: Any) -> None:
    while entry not in LEDGERS[run]:
        await SYSTEM.clock.asleep(0.005)


# -- faults of others ------------------------------------------------------------------------------------------------


def test_an_activity_gets_one_argument_though_a_step_has_several(runner: asyncio.Runner, server: Any) -> None:
    """The article's saga: `execute_activity(f, a, b)` is a TypeError, and nothing had run."""

    async def run() -> None:
        with pytest.raises(SagaAborted) as caught:
            await many("many-1", id="1")
        assert repr(caught.value.__cause__) == "Declined('third')"
        orders = await events(server, "many/1", EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
        assert len(orders) == 6
        assert all(len(scheduled(order).input.payloads) == 1 for order in orders)

    runner.run(run())


def test_compensations_run_the_last_first(runner: asyncio.Runner, server: Any) -> None:
    """The article's saga undoes in the order of the steps."""

    async def run() -> None:
        with pytest.raises(SagaAborted):
            await many("many-2", id="2")
        assert LEDGERS["many-2"] == [
            ("did", "s-1"),
            ("did", "second"),
            ("did", "third"),
            ("undid", "third", "UNKNOWN"),
            ("undid", "second", "<second>"),
            ("released", {"hold": 2}, "many"),
        ]

    runner.run(run())


def test_compensations_have_timeouts_and_retries_of_their_own(runner: asyncio.Runner, server: Any) -> None:
    """The article's compensations have no timeout, which Temporal refuses: nothing is undone."""

    async def run() -> None:
        with pytest.raises(SagaAborted):
            await many("many-3", id="3")
        orders = await events(server, "many/3", EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
        kinds = [scheduled(order).activity_type.name for order in orders]
        assert kinds == ["resilient.step"] * 3 + ["resilient.compensation"] * 3
        for order in orders:
            assert scheduled(order).start_to_close_timeout.ToTimedelta() == timedelta(seconds=30)
            assert scheduled(order).heartbeat_timeout.ToTimedelta() == timedelta(seconds=1.0)
        assert [scheduled(order).retry_policy.maximum_attempts for order in orders] == [1, 1, 1, 3, 3, 3]

    runner.run(run())


def test_a_saga_cancelled_in_a_sleep_is_undone_and_stays_cancelled(runner: asyncio.Runner, server: Any) -> None:
    """Temporal's documentation sample catches Exception only: nothing was undone."""

    async def run() -> None:
        waiting = asyncio.ensure_future(sleeper("asleep-1", id="1"))
        await _until("asleep-1", ("asleep",))
        handle = server.client.get_workflow_handle("sleeper/1")
        await handle.cancel()
        with pytest.raises(SagaAborted, match="cancelled"):
            await waiting
        assert LEDGERS["asleep-1"][-1] == ("undid", "first", "<first>")
        assert (await handle.describe()).status == WorkflowExecutionStatus.CANCELED

    runner.run(run())


def test_a_saga_cancelled_after_its_pivot_is_for_a_person(runner: asyncio.Runner, server: Any) -> None:
    async def run() -> None:
        waiting = asyncio.ensure_future(sleeper("asleep-2", True, id="2"))
        await _until("asleep-2", ("asleep",))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await waiting
        assert "after its pivot" in str(caught.value.__notes__)
        with pytest.raises(SagaStuck, match="after its pivot"):
            await sleeper("asleep-2", True, id="2")
        assert ("undid", "first", "<first>") not in LEDGERS["asleep-2"]

    runner.run(run())


def test_who_only_waits_for_a_saga_does_not_cancel_it(runner: asyncio.Runner, server: Any) -> None:
    async def run() -> None:
        first = asyncio.ensure_future(sleeper("asleep-3", id="3"))
        await _until("asleep-3", ("asleep",))
        second = asyncio.ensure_future(sleeper("asleep-3", id="3"))
        await asyncio.wait([second], timeout=0.05)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        handle = server.client.get_workflow_handle("sleeper/3")
        assert (await handle.describe()).status == WorkflowExecutionStatus.RUNNING
        await handle.terminate()
        with pytest.raises(SagaStuck, match="from outside"):
            await first

    runner.run(run())


def test_a_caller_cancelled_while_the_saga_begins_cancels_it(
    runner: asyncio.Runner, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        begin = _temporal.TemporalBody._start

        async def slow(self: Any, given: Any) -> Any:
            started = await begin(self, given)
            task.cancel()
            return started

        monkeypatch.setattr(_temporal.TemporalBody, "_start", slow)
        task = asyncio.ensure_future(sleeper("asleep-4", id="4"))
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.undo()
        with pytest.raises(SagaAborted):
            await sleeper("asleep-4", id="4")

    runner.run(run())


def test_a_failing_branch_cancels_its_siblings_and_waits_for_them(runner: asyncio.Runner, server: Any) -> None:
    async def run() -> None:
        with pytest.raises(SagaStuck) as caught:
            await siblings("siblings-1", id="1")
        assert repr(caught.value.__cause__) == "Declined('f')"
        assert [repr(error) for error in caught.value.exceptions] == ["Declined('undo f')"]
        assert LEDGERS["siblings-1"] == [
            ("did", "forever"),
            ("stopped", "forever"),
            *[("cannot undo", "f")] * 4,
            ("undid", "forever"),
        ]

    runner.run(run())


# -- policies --------------------------------------------------------------------------------------------------------


def test_a_retry_of_a_step_is_temporals(runner: asyncio.Runner, server: Any) -> None:
    async def run() -> None:
        with pytest.raises(ConnectionError, match="refused") as caught:
            await retries("retries-1", id="1")
        assert "compensate_on does not name" in str(caught.value.__notes__)
        assert TRIES == ["retries-1"] * 3
        (order,) = await events(server, "retries/1", EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
        assert scheduled(order).retry_policy.maximum_attempts == 3
        assert scheduled(order).retry_policy.backoff_coefficient == 1.0

    runner.run(run())


def test_a_step_has_its_time_and_the_sagas(runner: asyncio.Runner, server: Any) -> None:
    async def run() -> None:
        with pytest.raises(SagaAborted) as caught:
            await limits("limits-1", "step", id="1")
        assert isinstance(caught.value.__cause__, CallTimeout)
        assert LEDGERS["limits-1"] == [("did", "forever"), ("stopped", "forever"), ("undid", "forever")]
        with pytest.raises(SagaAborted) as caught:
            await late("limits-2", id="2")
        assert "DeadlineExceeded" in repr(caught.value.__cause__)
        assert await limits("limits-3", "ok", id="3") is True

    runner.run(run())


def test_a_step_has_the_key_that_the_body_can_tell(runner: asyncio.Runner, server: Any) -> None:
    async def run() -> None:
        assert await limits("limits-4", "key", id="4") == ["limits/4/1", "limits/4/1", "4", "limits"]

    runner.run(run())


def test_a_saga_does_not_go_on_after_a_step_that_failed(runner: asyncio.Runner, server: Any) -> None:
    async def run() -> None:
        with pytest.raises(SagaAborted) as caught:
            await goes_on("goes-1", id="1")
        assert "cannot go on" in str(caught.value.__cause__)
        assert LEDGERS["goes-1"] == [("did", "first")]

    runner.run(run())


def test_an_activity_is_told_when_to_try_again() -> None:
    told = Told(5, 0.1, 2.0, 10.0, ["builtins:ConnectionError"])
    order = Order("s", "i", 1, "n", "tests.test_engines_temporal:refuses", Raw(b'["told"]'), retry=told)

    async def run(attempt: int) -> ApplicationError:
        with pytest.raises(ApplicationError) as caught:
            await _temporal.carry_out(order, attempt)
        return caught.value

    error = asyncio.run(run(3))
    assert not error.non_retryable
    assert error.next_retry_delay == timedelta(seconds=0.4)
    order.retry = None
    assert asyncio.run(run(1)).non_retryable


def test_orders_become_options() -> None:
    order = Order("s", "i", 1, "n", "f", left=20.0, timeout=2.0, retry=Told(4, 0.0, 1.0, 0.0, [], total=9.0))
    options = _temporal.options_of(order, TEMPORAL)
    assert options["start_to_close_timeout"] == timedelta(seconds=7)
    assert options["schedule_to_close_timeout"] == timedelta(seconds=14)
    assert options["retry_policy"].initial_interval == timedelta(milliseconds=1)


def activity_error(cause: BaseException) -> ActivityError:
    error = ActivityError(
        "failed",
        scheduled_event_id=1,
        started_event_id=2,
        identity="",
        activity_type="",
        activity_id="",
        retry_state=RetryState.MAXIMUM_ATTEMPTS_REACHED,
    )
    error.__cause__ = cause
    return error


def test_what_activities_end_with_is_what_the_body_gets() -> None:
    order = Order("s", "i", 1, "n", "f")

    def answer(cause: BaseException) -> Any:
        return _temporal.answer_of(order, activity_error(cause), TEMPORAL)

    lost = TemporalTimeout("lost", type=TimeoutType.HEARTBEAT, last_heartbeat_details=[])
    assert isinstance(answer(lost).error, CallTimeout)
    assert answer(lost).error.seconds == 30.0
    assert isinstance(answer(TemporalCancelled("cancelled")).gone, asyncio.CancelledError)
    assert repr(answer(ApplicationError("x", plain(kept_error(KeyError("x"))))).error) == "KeyError('x')"
    assert repr(answer(ApplicationError("not registered")).error) == "RuntimeError('not registered')"
    interrupt = KeyboardInterrupt()
    assert _temporal.answer_of(order, interrupt, TEMPORAL).gone is interrupt


def test_a_workflow_that_was_ended_from_outside_is_for_a_person() -> None:
    error = _temporal.ended(TerminatedError("by hand"), "s", "i")
    assert isinstance(error, SagaStuck)
    assert isinstance(_temporal.ended(None, "s", "i"), SagaStuck)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_worker_of_another_version_leaves_the_saga_alone() -> None:
    given = {"v": 1, "id": "i", "version": 2, "args": [], "kwargs": {}}
    with pytest.raises(Incompatible, match="version 2"):
        place: Any = many
        asyncio.run(place.inside(given))


def test_a_plain_body_is_refused_at_decoration() -> None:
    with pytest.raises(TypeError, match="make it async def"):

        @DurableSaga("plain", engine=TEMPORAL)
        def plain_body(saga: Any) -> None: ...


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(TypeError, match="task_queue"):
        TemporalEngine(lambda: None, task_queue="")
    with pytest.raises(TypeError, match="client"):
        TemporalEngine("localhost:7233", task_queue="q")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_timeout"):
        TemporalEngine(lambda: None, task_queue="q", step_timeout=0)
    engine = TemporalEngine(lambda: None, task_queue="q")
    with pytest.raises(TypeError, match="at least one"):
        engine.worker(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sagas of this engine"):
        engine.worker(None, many)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="in_doubt"):
        DurableSaga("doubts", engine=TEMPORAL, in_doubt="stuck")(many.__wrapped__)
    with pytest.raises(TypeError, match="recovered by its engine"):
        many.recover()


def test_a_client_may_be_given_or_connected() -> None:
    class Client:
        async def start_workflow(self) -> None: ...

    given: Any = Client()

    async def connect() -> Any:
        return given

    async def run() -> None:
        for client in (given, lambda: given, connect):
            engine = TemporalEngine(client, task_queue="q")
            assert await engine.client() is given
            assert await engine.client() is given

    asyncio.run(run())


def test_an_id_that_is_none_is_refused_before_anything_begins() -> None:
    with pytest.raises(ValueError, match="id must be"):
        asyncio.run(many("x", id=""))
    with pytest.raises(TypeError, match="run"):
        asyncio.run(many(object(), id="1"))


def test_the_missing_package_is_named_by_its_extra_and_only_when_it_is_needed() -> None:
    code = (
        "import sys; sys.modules['{0}'] = None\n"
        "import resilient, resilient.engines\n"
        "resilient.engines.LocalEngine\n"
        "try: resilient.engines.{1}\n"
        "except ImportError as error: print(error)\n"
    )
    for package, engine in (("temporalio", "TemporalEngine"), ("dbos", "DBOSEngine")):
        answer = subprocess.run(
            [sys.executable, "-c", code.format(package, engine)], capture_output=True, text=True, check=True
        )
        assert f"resilient-kit[{package.removesuffix('io')}]" in answer.stdout


# -- others' workflows beside ours -----------------------------------------------------------------------------------


def test_the_library_can_be_imported_in_temporals_sandbox(runner: asyncio.Runner, server: Any) -> None:
    """A workflow of one's own in the module of a saga: the sandbox imports both anew."""
    from tests._engines_sandbox import Place, Sandboxed, greeting

    async def run() -> None:
        engine = Place.engine
        engine._client = server.client
        async with engine.worker(server.client, greeting, workflows=[Sandboxed]):
            said = await server.client.execute_workflow("Sandboxed", id="sandboxed", task_queue="sandbox")
            assert said == "sandboxed: 2"
            assert await greeting("Ada", id="1") == "hello Ada"

    runner.run(run())
