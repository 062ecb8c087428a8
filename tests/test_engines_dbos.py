"""Sagas on DBOS: cancellation, recovery after a crash, policies, and what is refused."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient import CallTimeout, DurableSaga, Incompatible, Retry, SagaAborted, SagaStuck
from resilient.engines import DBOSEngine, _dbos, _dbos_steps
from resilient.engines._wire import Order, Told
from resilient.policy import SYSTEM
from resilient.saga import branch
from tests._engines import (
    DBOS_ENGINE,
    LEDGERS,
    Declined,
    act,
    act_plain,
    dbos,
    sqlite_url,
    undo,
    undo_fails,
    undo_plain,
)

TRIES: list[str] = []
GO: dict[str, asyncio.Event] = {}


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


async def undo_cancels(run: str, name: str, how: str) -> None:
    """A compensation in which somebody cancels the saga, once."""
    from dbos import DBOS

    LEDGERS[run].append(("undid", name))
    if len(LEDGERS[run]) < 5:
        await DBOS.cancel_workflow_async(how)


def undo_cancels_plain(run: str, name: str, how: str) -> None:
    from dbos import DBOS

    LEDGERS[run].append(("undid", name))
    DBOS.cancel_workflow(how)


def cancels(run: str, id: str) -> None:  # noqa: A002
    from dbos import DBOS

    LEDGERS[run].append(("did", "cancels"))
    DBOS.cancel_workflow(id)


def undo_cancelled(run: str, id: str) -> None:  # noqa: A002
    LEDGERS[run].append(("undid", "cancels"))


def key_of(run: str) -> str:
    from resilient._run import step_key

    key = step_key.get()
    assert key is not None
    return key


async def fails_beside(run: str, name: str, how: str) -> None:
    while ("did", "forever") not in LEDGERS[run]:
        await SYSTEM.clock.asleep(0.005)
    raise Declined(name)


@DurableSaga("hanging", engine=DBOS_ENGINE)
async def hanging(saga: Any, run: str, pivot: bool = False) -> None:
    await saga.step(act, run, "first", "ok", compensate=undo)
    if pivot:
        saga.pivot()
    await saga.step(forever, run, compensate=undo_forever)


@DurableSaga("stuck", engine=DBOS_ENGINE, retries=Retry(Exception, attempts=1))
async def stuck(saga: Any, run: str) -> None:
    await saga.step(act, run, "first", "ok", compensate=undo_fails)
    await saga.step(forever, run, compensate=undo_forever)


@DurableSaga("twice", engine=DBOS_ENGINE)
async def twice(saga: Any, run: str) -> None:
    await saga.step(act, run, "first", "ok", compensate=undo)
    await saga.step(act, run, "second", f"twice/{saga.id}", compensate=undo_cancels)
    await saga.step(act, run, "third", "fail", compensate=None)


@DurableSaga("twice.plain", engine=DBOS_ENGINE)
def twice_plain(saga: Any, run: str) -> None:
    saga.step(act_plain, run, "first", "ok", compensate=undo_plain)
    saga.step(act_plain, run, "second", f"twice.plain/{saga.id}", compensate=undo_cancels_plain)
    saga.step(act_plain, run, "third", "fail", compensate=None)


@DurableSaga("undoing", engine=DBOS_ENGINE)
async def undoing(saga: Any, run: str) -> None:
    await saga.step(act_plain, run, "first", "ok", compensate=undo_plain)
    await saga.step(act_plain, run, "second", f"undoing/{saga.id}/undo", compensate=undo_cancels_plain)
    await saga.step(forever, run, compensate=undo_forever)


@DurableSaga("limits", engine=DBOS_ENGINE, timeout=60)
async def limits(saga: Any, run: str, what: str) -> Any:
    if what == "step":
        return await saga.step(forever, run, compensate=undo_forever, timeout=0.05)
    if what == "late":
        saga._until -= 59  # almost a minute goes by
        await saga.step(forever, run, compensate=undo_forever)
    if what == "over":
        saga._until -= 60
        await saga.step(act, run, "late", "ok", compensate=None)
    return await saga.step(key_of, run, compensate=None)


@DurableSaga("retries", engine=DBOS_ENGINE, compensate_on=(KeyError,))
async def retries(saga: Any, run: str) -> None:
    await saga.step(refuses, run, compensate=None, retry=Retry(ConnectionError, attempts=3, wait=0))


@DurableSaga("siblings", engine=DBOS_ENGINE)
async def siblings(saga: Any, run: str) -> None:
    await saga.parallel(
        branch(forever, run, compensate=undo_forever, name="never ends"),
        branch(fails_beside, run, "f", "fail", compensate=undo, name="fails"),
    )


@DurableSaga("plain", engine=DBOS_ENGINE, timeout=60)
def plain(saga: Any, run: str, what: str) -> Any:
    saga.step(act_plain, run, "first", "ok", compensate=undo_plain, timeout=30)
    if what == "cancel":
        saga.step(cancels, run, f"plain/{saga.id}", compensate=undo_cancelled, register="after")
        saga.step(act_plain, run, "next", "ok", compensate=None)
    if what == "parallel":
        saga.parallel(branch(act_plain, run, "p", "ok", compensate=None))
    if what == "async":
        saga.step(act, run, "p", "ok", compensate=None)
    if what == "pivot":
        saga.pivot()
        saga.step(cancels, run, f"plain/{saga.id}")
        saga.step(act_plain, run, "next", "ok")
    return saga.step(key_of, run, compensate=None)


@DurableSaga("between", engine=DBOS_ENGINE)
def between(saga: Any, run: str) -> None:
    from dbos import DBOS

    saga.step(act_plain, run, "first", "ok", compensate=undo_plain)
    contextvars.Context().run(DBOS.cancel_workflow, f"between/{saga.id}")
    saga.step(act_plain, run, "second", "ok", compensate=undo_plain)


DEPARTED: list[str] = []


@DurableSaga("departs", engine=DBOS_ENGINE)
async def departs(saga: Any, run: str) -> None:
    if run in DEPARTED:
        await saga.step(forever, run, compensate=undo_forever)
    await saga.step(act, run, "first", "ok", compensate=undo)
    await saga.step(act, run, "second", "fail", compensate=None)


@DurableSaga("plain.stuck", engine=DBOS_ENGINE, retries=Retry(Exception, attempts=1))
def plain_stuck(saga: Any, run: str) -> None:
    saga.step(act_plain, run, "first", "ok", compensate=undo_fails)
    saga.step(cancels, run, f"plain.stuck/{saga.id}", compensate=None)
    saga.step(act_plain, run, "next", "ok", compensate=None)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def launched(tmp_path_factory: Any, runner: asyncio.Runner) -> Iterator[Any]:
    with dbos(sqlite_url(tmp_path_factory.mktemp("dbos"))) as made:
        yield made


def inner(place: Any) -> Any:
    """What is not for users."""
    return place


async def _until(run: str, entry: Any) -> None:
    while entry not in LEDGERS[run]:
        await SYSTEM.clock.asleep(0.005)


UNDONE = [
    ("did", "first"),
    ("did", "forever"),
    ("stopped", "forever"),
    ("undid", "forever"),
    ("undid", "first", "<first>"),
]

# -- cancellation ----------------------------------------------------------------------------------------------------


def test_a_saga_that_dbos_cancels_is_undone_and_stays_cancelled(runner: asyncio.Runner) -> None:
    async def run() -> None:
        from dbos import DBOS

        waiting = asyncio.ensure_future(hanging("d1", id="1"))
        await _until("d1", ("did", "forever"))
        await DBOS.cancel_workflow_async("hanging/1")
        with pytest.raises(SagaAborted, match="cancelled"):
            await waiting
        assert LEDGERS["d1"] == UNDONE
        status = await DBOS.get_workflow_status_async("hanging/1")
        assert status is not None
        assert status.status == "CANCELLED"

    runner.run(run())


def test_a_saga_cancelled_after_its_pivot_is_for_a_person(runner: asyncio.Runner) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(hanging("d2", True, id="2"))
        await _until("d2", ("did", "forever"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert "after its pivot" in str(caught.value.__notes__)
        with pytest.raises(SagaStuck, match="after its pivot"):
            await hanging("d2", True, id="2")

    runner.run(run())


def test_a_cancelled_saga_whose_compensation_fails_is_stuck(runner: asyncio.Runner) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(stuck("d3", id="3"))
        await _until("d3", ("did", "forever"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert "compensations failed" in str(caught.value.__notes__)
        with pytest.raises(SagaStuck) as again:
            await stuck("d3", id="3")
        assert [repr(error) for error in again.value.exceptions] == ["Declined('undo first')"]
        assert LEDGERS["d3"].count(("cannot undo", "first")) == 1

    runner.run(run())


def test_a_saga_cancelled_while_it_is_undone_is_undone_once(runner: asyncio.Runner) -> None:
    async def run() -> None:
        with pytest.raises(SagaAborted, match="cancelled"):
            await twice("d4", id="4")
        assert LEDGERS["d4"].count(("undid", "first", "<first>")) == 1

    runner.run(run())


def test_a_plain_saga_cancelled_while_it_is_undone_is_undone_once() -> None:
    with pytest.raises(SagaAborted, match="cancelled"):
        twice_plain("p10", id="10")
    assert LEDGERS["p10"].count(("undid", "first", "<first>")) == 1
    # What was undone when the cancel came is not on record: it is undone again.
    assert LEDGERS["p10"].count(("undid", "second")) == 2


def test_a_saga_whose_undoing_is_cancelled_is_stuck(runner: asyncio.Runner) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(undoing("u1", id="1"))
        await _until("u1", ("did", "forever"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert "so was the workflow that undid it" in str(caught.value.__notes__)
        with pytest.raises(SagaStuck, match="cancelled"):
            await undoing("u1", id="1")

    runner.run(run())


def test_who_only_waits_for_a_saga_does_not_cancel_it(runner: asyncio.Runner) -> None:
    async def run() -> None:
        first = asyncio.ensure_future(hanging("d5", id="5"))
        await _until("d5", ("did", "forever"))
        second = asyncio.ensure_future(hanging("d5", id="5"))
        await asyncio.wait([second], timeout=0.1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert not first.done()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert LEDGERS["d5"] == UNDONE

    runner.run(run())


def test_a_caller_cancelled_while_the_saga_begins_cancels_it(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        begin = _dbos.AsyncBody._start

        async def slow(self: Any, id: str, given: str) -> Any:  # noqa: A002
            started = await begin(self, id, given)
            task.cancel()
            return started

        monkeypatch.setattr(_dbos.AsyncBody, "_start", slow)
        task = asyncio.ensure_future(hanging("d6", id="6"))
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.undo()
        with pytest.raises(SagaAborted):
            await hanging("d6", id="6")

    runner.run(run())


def test_a_cancelled_saga_that_nobody_undoes_is_undone_by_who_asks_for_it(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process died before it could: DBOS never runs a cancelled workflow again."""

    async def dies(undoings: Any) -> None: ...

    async def run() -> None:
        from dbos import DBOS

        monkeypatch.setattr(_dbos, "_quietly", dies)
        waiting = asyncio.ensure_future(hanging("d7", id="7"))
        await _until("d7", ("did", "forever"))
        await DBOS.cancel_workflow_async("hanging/7")
        with pytest.raises(SagaAborted, match="cancelled"):
            await waiting
        assert LEDGERS["d7"] == UNDONE

    runner.run(run())


def test_a_plain_saga_that_is_cancelled_is_undone(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SagaAborted, match="cancelled"):
        plain("p1", "cancel", id="1")
    assert LEDGERS["p1"] == [("did", "first"), ("did", "cancels"), ("undid", "cancels"), ("undid", "first", "<first>")]
    with pytest.raises(SagaStuck, match="after its pivot"):
        plain("p2", "pivot", id="2")
    with pytest.raises(SagaStuck):
        plain_stuck("p3", id="3")
    monkeypatch.setattr(_dbos, "undo_apart_plain", lambda undoings: None)
    read_back = _dbos.SyncBody._read_back
    found: list[Any] = []
    monkeypatch.setattr(_dbos.SyncBody, "_read_back", lambda *given: found.append(read_back(*given)))
    with pytest.raises(SagaAborted):
        plain("p4", "cancel", id="4")
    assert [order.name.rpartition(":")[2] for order in found[0].orders][-1] == "act_plain"


def test_a_cancel_between_two_steps_is_seen_by_the_next(runner: asyncio.Runner) -> None:
    with pytest.raises(SagaAborted, match="cancelled"):
        between("p9", id="9")
    assert LEDGERS["p9"] == [("did", "first"), ("undid", "second", "UNKNOWN"), ("undid", "first", "<first>")]


def test_a_body_that_departs_from_its_record_runs_nothing(runner: asyncio.Runner) -> None:
    async def run() -> None:
        from dbos import DBOS

        with pytest.raises(SagaAborted):
            await departs("e1", id="1")
        DEPARTED.append("e1")
        await DBOS.fork_workflow_async("departs/1", 2)
        with pytest.raises(Incompatible, match="departs"):
            raise await _told_of_fork("departs/1", departs)
        assert LEDGERS["e1"] == [("did", "first"), ("did", "second"), ("undid", "first", "<first>")]

    runner.run(run())


async def _told_of_fork(id: str, place: Any) -> Exception:  # noqa: A002
    from dbos import DBOS

    (fork,) = [one for one in await DBOS.list_workflows_async() if one.forked_from == id]
    handle: Any = await DBOS.retrieve_workflow_async(fork.workflow_id)
    try:
        await handle.get_result()
    except Exception as error:
        told: Exception = place._told(error, id)
        return told
    raise AssertionError("unreachable")


# -- recovery --------------------------------------------------------------------------------------------------------


def test_dbos_goes_on_with_a_saga_whose_process_was_killed(tmp_path: Path) -> None:
    """In both directions: the first process dies in a step, the second in a compensation, the third ends it."""
    ledger = tmp_path / "ledger"
    ledger.touch()
    for how, code in (("step", -signal.SIGKILL), ("undo", -signal.SIGKILL), ("end", 0)):
        ended = subprocess.run(
            [sys.executable, "-m", "tests._engines_child", str(tmp_path), how],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "DBOS__VMID": "one"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == code, ended.stderr
    assert ledger.read_text().split() == [
        "reserve",
        "charge",
        "charge",
        "ship",
        "refund",
        "refund",
        "release",
        "aborted",
    ]


# -- policies --------------------------------------------------------------------------------------------------------


def test_a_retry_of_a_step_is_that_of_dbos(runner: asyncio.Runner) -> None:
    async def run() -> None:
        with pytest.raises(ConnectionError, match="refused") as caught:
            await retries("r1", id="1")
        assert "compensate_on does not name" in str(caught.value.__notes__)
        assert TRIES == ["r1"] * 3

    runner.run(run())


def test_retries_end_when_their_time_is_over() -> None:
    told = Told(5, 0.0, 1.0, 0.0, ["builtins:KeyError"], total=60.0)
    attempts = _dbos_steps.Attempts(Order("s", "i", 1, "n", "f", retry=told))
    with pytest.raises(KeyError):
        attempts.failed(KeyError("x"))
    assert "OSError" in attempts.failed(OSError("x"))
    attempts.began -= 60
    assert "KeyError" in attempts.failed(KeyError("x"))


def test_a_step_has_its_time_and_the_sagas(runner: asyncio.Runner) -> None:
    async def run() -> None:
        for number, (what, error) in enumerate((("step", CallTimeout), ("late", CallTimeout))):
            with pytest.raises(SagaAborted) as caught:
                await limits(f"l{number}", what, id=str(number))
            assert isinstance(caught.value.__cause__, error)
            assert LEDGERS[f"l{number}"] == [("did", "forever"), ("stopped", "forever"), ("undid", "forever")]
        with pytest.raises(SagaAborted) as caught:
            await limits("l9", "over", id="9")
        assert "DeadlineExceeded" in repr(caught.value.__cause__)
        assert await limits("l3", "key", id="3") == "limits/3/1"

    runner.run(run())


def test_a_failing_branch_cancels_its_siblings_and_waits_for_them(runner: asyncio.Runner) -> None:
    async def run() -> None:
        with pytest.raises(SagaAborted):
            await siblings("s1", id="1")
        assert LEDGERS["s1"] == [
            ("did", "forever"),
            ("stopped", "forever"),
            ("undid", "f", "UNKNOWN"),
            ("undid", "forever"),
        ]
        from dbos import DBOS

        steps = await DBOS.list_workflow_steps_async("siblings/1")
        assert {"2 fails", "undo 1 never ends", "undo 2 fails"} <= {step["function_name"] for step in steps}

    runner.run(run())


# -- what is refused -------------------------------------------------------------------------------------------------


def test_plain_bodies_cannot_do_everything() -> None:
    assert plain("p5", "key", id="5") == "plain/5/2"
    with pytest.raises(SagaAborted) as caught:
        plain("p6", "parallel", id="6")
    assert "make the saga's body async def" in str(caught.value.__cause__)
    with pytest.raises(SagaAborted) as caught:
        plain("p7", "async", id="7")
    assert "is async, and this saga is not" in str(caught.value.__cause__)


def test_a_saga_of_another_version_is_left_alone() -> None:
    from dbos._serialization import PortableWorkflowError

    given = _dbos_steps.text_of({"v": 1, "id": "i", "version": 2, "args": [], "kwargs": {}})
    with pytest.raises(PortableWorkflowError) as caught:
        inner(plain).inside(given)
    assert isinstance(inner(plain)._told(caught.value, "i"), Incompatible)


def test_other_errors_of_dbos_are_told(launched: Any) -> None:
    from dbos._error import DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded

    assert isinstance(inner(plain)._told(DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded("plain/1"), "1"), SagaStuck)
    other = RuntimeError("database")
    assert inner(plain)._told(other, "1") is other


def test_pickle_is_refused(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DBOS pickles by default: whoever can write in its database can run code."""
    from dbos._serialization import DefaultSerializer

    monkeypatch.setattr(launched, "_serializer", DefaultSerializer())
    with pytest.raises(TypeError, match="serializer"):
        plain("p8", "key", id="8")


def test_what_is_no_body_is_refused() -> None:
    def generator(saga: Any) -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="must be a function"):
        DurableSaga("generator", engine=DBOS_ENGINE)(generator)
    with pytest.raises(ValueError, match="patience"):
        DBOSEngine(patience=-1)
