"""Durable sagas: what is written when, who goes on with it, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest
from msgspec import Raw

from resilient import (
    RESULT,
    DurableSaga,
    Incompatible,
    InFlight,
    Retry,
    Saga,
    SagaAborted,
    SagaError,
    SagaLost,
    SagaStuck,
    StoreError,
    call,
    durable,
    sagas,
)
from resilient._ambient import deadline
from resilient._book import stored_key
from resilient._drive import Outcome
from resilient._journal import Head
from resilient._keeper import Beat, ThreadKeeper
from resilient._run import Run
from resilient.saga import AsyncSagaRun, SagaRun, branch
from resilient.stores import MemoryStore
from resilient.stores._ops import Append, Begin, Claim, Finish, Forget, Renew
from tests._proofs import Dead
from tests._saga_worlds import Interrupting, Spy, alone, entries, once_waited_for, orphaned
from tests.worlds import turn

RETRIES = Retry(Exception, attempts=2, wait=0, name="compensation")
log: list[Any] = []
hooks: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    log.clear()
    hooks.clear()
    with alone():
        yield


@pytest.fixture
def spy() -> Spy:
    return Spy()


@dataclass
class Hold:
    """What a step returns."""

    sku: str
    qty: int


def step(name: str) -> str:
    log.append(name)
    hook = hooks.get(name)
    if hook is not None:
        hook()
    return name.upper()


def undo(name: str, result: str = "?") -> None:
    log.append(f"undo {name} {result}")
    hook = hooks.get(f"undo {name}")
    if hook is not None:
        hook()


def hold(sku: str, qty: int) -> Hold:
    return Hold(sku, qty)


def release(held: Hold, *notes: str, **more: int) -> None:
    log.append(("release", held, notes, more))


async def astep(name: str) -> str:
    return step(name)


async def aundo(name: str, result: str = "?") -> None:
    undo(name, result)


def three(saga: Any, order: str) -> str:
    parts = [saga.step(step, name, compensate=undo) for name in ("a", "b")]
    parts.append(saga.step(step, "c", compensate=None))
    return order + "".join(parts)


async def athree(saga: Any, order: str) -> str:
    parts = [await saga.step(astep, name, compensate=aundo) for name in ("a", "b")]
    parts.append(await saga.step(step, "c", compensate=None))
    return order + "".join(parts)


def made(spy: Any, body: Any = three, **options: Any) -> Any:
    durable._bodies.pop("order", None)
    return DurableSaga("order", store=spy, retries=RETRIES, **options)(body)


def died(spy: Spy, place: Any, at: str, name: str = "o-1") -> None:
    """The process dies within step `at`, and its lease runs out."""

    before, after = spy.before, spy.after

    def dead() -> None:
        spy.before = dead_already
        raise Dead

    def dead_already(op: Any) -> None:
        raise Dead

    hooks[at] = dead
    with pytest.raises(Dead):
        place("o", id=name) if not place.is_async else asyncio.run(place("o", id=name))
    del hooks[at]
    spy.before, spy.after = before, after
    orphaned(spy)
    log.clear()
    spy.ops.clear()


def boom() -> None:
    raise ValueError("boom")


def test_n_steps_cost_n_plus_one_commits_and_a_look(spy: Spy) -> None:
    assert made(spy)("o", id="o-1") == "oABC"
    assert spy.ops == ["History", "Begin", "Append", "Append", "Finish"]
    first, second, third = entries(spy, "order", "o-1")
    assert [one.number for one in first.steps] == [1]
    assert (list(second.done), [one.number for one in second.steps]) == ([1], [2])
    assert (list(third.done), [one.number for one in third.steps]) == ([2], [3])
    assert list(sagas.show(spy, "o-1").end.done) == [3]  # type: ignore[union-attr]


def test_a_group_is_one_commit(spy: Spy) -> None:
    def body(saga: Any) -> None:
        saga.parallel(branch(step, "a", compensate=undo), branch(step, "b", compensate=None))

    made(spy, body)(id="o-1")
    assert spy.ops == ["History", "Begin", "Finish"]


def test_a_failure_costs_one_commit_each_for_that_and_for_what_is_undone(spy: Spy) -> None:
    hooks["c"] = boom
    with pytest.raises(SagaAborted) as caught:
        made(spy)("o", id="o-1")
    assert isinstance(caught.value.__cause__, ValueError)
    assert log == ["a", "b", "c", "undo b B", "undo a A"]
    assert spy.ops == ["History", "Begin", "Append", "Append", "Append", "Append", "Append", "Finish"]


def test_a_second_call_gets_the_result_and_runs_nothing(spy: Spy) -> None:
    place = made(spy)
    assert place("o", id="o-1") == place("o", id="o-1") == "oABC"
    assert log == ["a", "b", "c"]
    hooks["c"] = boom
    for _ in range(2):
        with pytest.raises(SagaAborted):
            place("o", id="o-2")
    with pytest.raises(SagaAborted, match="boom"):
        place("o", id="o-2")
    del hooks["c"]
    assert log == ["a", "b", "c", "a", "b", "c", "undo b B", "undo a A"]
    died(spy, place, "b", name="o-3")
    sagas.abandon(spy, "o-3", "enough")
    with pytest.raises(SagaError, match=r"abandoned \(enough\)"):
        place("o", id="o-3")


def test_dbos_ignores_them_other_arguments_with_an_id_are_refused(spy: Spy) -> None:
    place = made(spy)
    died(spy, place, "b")
    with pytest.raises(SagaError, match="with other arguments"):
        place("another", id="o-1")
    assert log == []
    assert place("o", id="o-1") == "oABC"


def test_dbos_strands_what_a_dead_executor_had_here_any_process_follows_with_the_same_keys(spy: Spy) -> None:
    """DBOS without Conductor: an executor's work is stranded until that same executor returns."""
    keys: list[str] = []

    def body(saga: Any, order: str) -> str:
        for name in ("a", "b", "c"):
            keys.append(saga.step_key)
            saga.step(step, name, compensate=undo)
        return order

    place = made(spy, body)
    died(spy, place, "b")
    assert place("o", id="o-1") == "o"
    assert log == ["b", "c"]
    assert keys == ["order/o-1/1", "order/o-1/2", "order/o-1/1", "order/o-1/2", "order/o-1/3"]
    assert spy.ops == ["History", "Begin", "History", "Append", "Finish"]


def test_an_async_body_is_recovered_too(spy: Spy) -> None:
    place = made(spy, athree)
    died(spy, place, "b")
    assert asyncio.run(place("o", id="o-1")) == "oABC"
    assert log == ["b", "c"]
    assert asyncio.run(place("o", id="o-1")) == "oABC"


@pytest.mark.parametrize("id", ["o-1", "1/2", "o" * 255, "ö-1", "{o}-1"])
def test_any_id_is_a_key_of_its_own(spy: Spy, id: str) -> None:  # noqa: A002
    place = made(spy)
    assert place("o", id=id) == place("o", id=id) == "oABC"
    assert log == ["a", "b", "c"]
    assert [one.id for one in sagas.list_sagas(spy)] == [id]
    key = stored_key("order", id)
    assert key.isascii()
    assert len(key) <= 120
    assert not set(key) & set("{}")


def test_arguments_reach_the_body_as_they_come_back(spy: Spy) -> None:
    place = made(spy, typed)
    assert place(order="o", when=date(2026, 1, 2), id="o-1") == "o date []"
    assert place("o", None, id="o-2") == "o NoneType []"
    with pytest.raises(TypeError, match=r"the argument other \(date\) cannot be recorded"):
        place("o", other=date(2026, 1, 2), id="o-3")
    for number in range(70):
        assert place("o", id=f"n-{number}", **{f"name{number}": "x"}) == f"o NoneType ['name{number}']"


def typed(saga: Any, order: str, when: date | None = None, **others: Any) -> str:
    return f"{order} {type(when).__name__} {[*others]}"


def test_results_come_back_as_what_they_were(spy: Spy) -> None:
    def body(saga: Any, order: str) -> str:
        held = saga.step(hold, "A", 2, compensate=call(release, RESULT, "x", "y", n=3))
        assert held == Hold("A", 2)
        saga.step(step, "b", compensate=None)
        return order

    place = made(spy, body)
    died(spy, place, "b")
    hooks["b"] = boom
    with pytest.raises(SagaAborted):
        place("o", id="o-1")
    died(spy, place, "b", name="o-2")
    sagas.compensate(spy, "o-2")
    assert log == [("release", Hold("A", 2), ("x", "y"), {"n": 3})]


# -- several at once -------------------------------------------------------------------------------------------------


def test_a_duplicate_waits_for_the_first_and_gets_its_result(spy: Spy) -> None:
    place, got = made(spy), list[str]()
    waiting = threading.Event()

    def second() -> None:
        got.append(place("o", id="o-1"))

    def within() -> None:
        def seen(op: Any) -> None:
            if isinstance(op, Claim):
                waiting.set()

        spy.after = seen
        thread.start()
        assert waiting.wait(60)

    thread = threading.Thread(target=second, daemon=True)
    hooks["b"] = within
    assert place("o", id="o-1") == "oABC"
    thread.join()
    assert got == ["oABC"]
    assert log == ["a", "b", "c"]


def test_a_duplicate_waits_no_longer_than_its_deadline(spy: Spy) -> None:
    place, got = made(spy), list[BaseException]()

    def within() -> None:
        with deadline(0.3), pytest.raises(InFlight) as caught:
            place("o", id="o-1")
        got.append(caught.value)

    hooks["b"] = within
    place("o", id="o-1")
    assert isinstance(got[0], InFlight)
    assert 0 < got[0].retry_after <= 30
    assert log == ["a", "b", "c"]


@pytest.mark.parametrize("ends", ["done", "aborted", "dead"])
@pytest.mark.parametrize("swallows", [False, True])
def test_who_comes_second_between_the_look_and_the_first_step_has_run_nothing(
    spy: Spy, ends: str, swallows: bool
) -> None:
    def body(saga: Any, order: str) -> str:
        try:
            return three(saga, order)
        except Exception:
            if swallows:
                return "swallowed"
            raise

    place = made(spy, body)

    def first(op: Any) -> None:
        if isinstance(op, Begin):
            spy.before = lambda op: None
            if ends == "dead":
                died(spy, place, "b")
            else:
                if ends == "aborted":
                    hooks["c"] = boom
                try:
                    place("o", id="o-1")
                except SagaAborted:
                    assert ends == "aborted"

    spy.before = first
    if ends == "aborted" and not swallows:
        with pytest.raises(SagaAborted):
            place("o", id="o-1")
    elif ends == "aborted":
        assert place("o", id="o-1") == "swallowed"
    else:
        assert place("o", id="o-1") == "oABC"
    assert log == {"done": ["a", "b", "c"], "dead": ["b", "c"]}.get(
        ends, ["a", "b", "c", *([] if swallows else ["undo b B", "undo a A"])]
    )


@pytest.mark.parametrize("swallows", [False, True])
def test_a_task_that_comes_second_has_run_nothing(spy: Spy, swallows: bool) -> None:
    async def body(saga: Any, order: str) -> str:
        try:
            return await athree(saga, order)
        except Exception:
            if swallows:
                return "swallowed"
            raise

    place = made(spy, body)

    async def main() -> None:
        for one in await asyncio.gather(place("o", id="o-1"), place("o", id="o-1"), place("o", id="o-1")):
            assert one == "oABC"

    entered: list[str] = []

    def yields(op: Any) -> None:
        if isinstance(op, Begin) and not entered:
            entered.append("x")
            twin = Spy()
            twin.store = spy.store
            made(twin, three)("o", id="o-1")

    spy.before = yields
    asyncio.run(main())
    assert log == ["a", "b", "c"]


def test_what_was_forgotten_between_the_look_and_the_claim_begins_anew(spy: Spy) -> None:
    place = made(spy)
    died(spy, place, "b")

    def forget(op: Any) -> None:
        if isinstance(op, Begin):
            spy.before = lambda op: None
            spy.store.execute(Forget(stored_key("order", "o-1")))

    spy.before = forget
    assert place("o", id="o-1") == "oABC"
    assert log == ["a", "b", "c"]


def test_what_is_forgotten_while_somebody_waits_is_begun_by_him(spy: Spy) -> None:
    place = made(spy)
    key = stored_key("order", "o-1")
    spy.store.execute(Begin(key, "somebody", 30.0, b"{}", '{"saga":"order","id":"o-1"}'))

    def forget(op: Any) -> None:
        if isinstance(op, Claim):
            spy.before = lambda op: None
            spy.clock.advance(31.0)
            spy.store.execute(Forget(key))

    spy.before = forget
    assert place("o", id="o-1") == "oABC"
    assert log == ["a", "b", "c"]


# -- the lease -------------------------------------------------------------------------------------------------------


def test_a_lost_lease_stops_the_old_owner_who_undoes_nothing(spy: Spy) -> None:
    place = made(spy)

    def stolen() -> None:
        del hooks["b"]
        orphaned(spy)
        assert place("o", id="o-1") == "oABC"

    hooks["b"] = stolen
    with pytest.raises(SagaLost):
        place("o", id="o-1")
    assert log == ["a", "b", "b", "c"]
    assert place("o", id="o-1") == "oABC"


def test_a_body_that_swallows_the_loss_has_lost_all_the_same(spy: Spy) -> None:
    def body(saga: Any, order: str) -> str:
        saga.step(step, "a", compensate=undo)
        for name in ("b", "c"):
            try:
                saga.step(step, name, compensate=undo)
            except SagaError:
                log.append("swallowed")
        return order

    place = made(spy, body)

    def stolen() -> None:
        del hooks["a"]
        orphaned(spy)
        place("o", id="o-1")

    hooks["a"] = stolen
    with pytest.raises(SagaLost):
        place("o", id="o-1")
    assert log == ["a", "a", "b", "c", "swallowed", "swallowed"]


def test_an_old_owner_that_undoes_is_stopped_by_the_fence(spy: Spy) -> None:
    hooks["c"] = boom
    place = made(spy)

    def stolen() -> None:
        del hooks["undo b"]
        orphaned(spy)
        sagas.recover(spy, retries=RETRIES)

    hooks["undo b"] = stolen
    with pytest.raises(SagaLost) as caught:
        place("o", id="o-1")
    assert "recovery will go on" in caught.value.__notes__[0]
    # The one that was in hand came to its end; no other one was begun.
    assert log == ["a", "b", "c", "undo b B", "undo b B", "undo a A"]


@pytest.mark.parametrize("is_async", [False, True])
def test_heartbeats_renew_the_lease_of_a_long_step(is_async: bool) -> None:
    renewed = threading.Event()

    class Watched(MemoryStore):
        def execute(self, op: Any) -> Any:
            answer = super().execute(op)
            if isinstance(op, Renew):
                renewed.set()
            return answer

        async def aexecute(self, op: Any) -> Any:
            return self.execute(op)

    store = Watched()

    async def wait(saga: Any, order: str) -> str:
        await saga.step(apatient, compensate=None)
        return order

    def wait_here(saga: Any, order: str) -> str:
        saga.step(patient, compensate=None)
        return order

    async def until() -> None:
        while not renewed.is_set():
            await asyncio.get_running_loop().run_in_executor(None, renewed.wait, 0.01)

    hooks["patient"] = until if is_async else lambda: renewed.wait(60)
    place = made(store, wait if is_async else wait_here, lease=0.15)
    assert (asyncio.run(place("o", id="o-1")) if is_async else place("o", id="o-1")) == "o"
    assert renewed.is_set()


def patient() -> None:
    hooks["patient"]()


async def apatient() -> None:
    await hooks["patient"]()


# -- a store that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Begin", "Append", "Finish"])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_writes_are_insisted_on(spy: Spy, name: str, written: bool, is_async: bool) -> None:
    spy.fail(name, 3, written=written)
    place = made(spy, athree if is_async else three, lease=0.02)
    assert (asyncio.run(place("o", id="o-1")) if is_async else place("o", id="o-1")) == "oABC"
    assert spy.ops.count(name) == {"Begin": 4, "Append": 5, "Finish": 4}[name]
    assert len(entries(spy, "order", "o-1")) == 3


def test_a_store_that_stays_away_stops_the_saga_which_undoes_nothing(spy: Spy) -> None:
    place = made(spy, lease=0.02)
    spy.fail("Append", 6)
    with pytest.raises(StoreError, match="away"):
        place("o", id="o-1")
    assert log == ["a"]
    orphaned(spy)
    assert str(sagas.recover(spy)) == "1 finished, 0 undone, 0 stuck"
    # The value of the first step was not written any more.
    assert log == ["a", "a", "b", "c"]


def test_a_store_that_goes_away_while_it_is_undone_leaves_the_rest_to_recovery(spy: Spy) -> None:
    hooks["c"] = boom
    place = made(spy, lease=0.02)
    hooks["undo b"] = lambda: spy.fail("Append", 6)
    with pytest.raises(StoreError):
        place("o", id="o-1")
    assert log == ["a", "b", "c", "undo b B"]
    del hooks["undo b"], hooks["c"]
    orphaned(spy)
    report = sagas.recover(spy)
    assert report.compensated == ["order/o-1"]
    # larzstate resumes forward here.
    assert log == ["a", "b", "c", "undo b B", "undo b B", "undo a A"]


@pytest.mark.parametrize("op", ["History", "Begin"])
def test_an_error_of_the_store_at_the_beginning_is_said(spy: Spy, op: str) -> None:
    place = made(spy)
    died(spy, place, "b")
    spy.fail(op, 1)
    with pytest.raises(StoreError):
        place("o", id="o-1")
    spy.before = lambda op: None
    assert place("o", id="o-1") == "oABC"


@pytest.mark.parametrize("written", [False, True])
def test_an_error_under_the_lease_gives_it_back(spy: Spy, written: bool) -> None:
    place = made(spy)
    died(spy, place, "b")
    seen: list[str] = []

    def second(op: Any) -> None:
        seen.append(type(op).__name__)
        if seen == ["History", "Begin", "History"]:
            raise StoreError("the store is away")

    spy.before = second
    with pytest.raises(StoreError):
        place("o", id="o-1")
    assert seen[3:] == ["Abandon"]
    assert place("o", id="o-1") == "oABC"


# -- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Begin", "Append"])
@pytest.mark.parametrize("written", [False, True])
def test_an_interrupt_while_a_step_is_announced_loses_no_entry(spy: Spy, name: str, written: bool) -> None:
    place = made(spy)
    spy.fail(name, 1, written=written, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        place("o", id="o-1")
    assert log == ([] if name == "Begin" else ["a", "undo a A"])
    journal = entries(spy, "order", "o-1")
    assert [one.failed for one in journal if one.failed is not None] == ["KeyboardInterrupt: "]
    assert [one.undone for one in journal if one.undone] == ([] if name == "Begin" else [[1]])
    assert sagas.show(spy, "o-1").record.state == "aborted"


@pytest.mark.parametrize("name", ["Begin", "Append"])
@pytest.mark.parametrize("written", [False, True])
def test_a_cancel_while_a_step_is_announced_loses_no_entry(spy: Spy, name: str, written: bool) -> None:
    place = made(spy, athree)
    spy.fail(name, 1, written=written, error=asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(place("o", id="o-1"))
    assert log == ([] if name == "Begin" else ["a", "undo a A"])
    journal = entries(spy, "order", "o-1")
    assert [one.failed for one in journal if one.failed is not None] == ["CancelledError: "]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_fault_of_the_store_itself_is_shown_as_it_is(spy: Spy, is_async: bool) -> None:
    place = made(spy, athree if is_async else three)
    spy.fail("Append", 1, error=ZeroDivisionError())
    with pytest.raises((ZeroDivisionError, SagaAborted)):
        asyncio.run(place("o", id="o-1")) if is_async else place("o", id="o-1")
    assert log == ["a", "undo a A"]


@pytest.mark.parametrize("is_async", [False, True])
def test_who_hears_by_a_heartbeat_that_the_lease_is_lost_asks_no_more(spy: Spy, is_async: bool) -> None:
    place = made(spy, alosing if is_async else losing)
    with pytest.raises(SagaLost):
        asyncio.run(place("o", id="o-1")) if is_async else place("o", id="o-1")
    assert log == ["a"]
    assert spy.ops == ["History", "Begin"]


def losing(saga: Any, order: str) -> None:
    saga.step(step, "a", compensate=undo)
    saga._book.beat.lost = True
    saga.step(step, "b", compensate=undo)


async def alosing(saga: Any, order: str) -> None:
    await saga.step(astep, "a", compensate=aundo)
    saga._book.beat.lost = True
    await saga.step(astep, "b", compensate=aundo)


# -- steps that were begun beside each other -------------------------------------------------------------------------


async def pausing(name: str) -> str:
    log.append(f"begin {name}")
    for _ in range(5):
        await turn()
    return step(name)


async def two_at_once(saga: Any, order: str) -> None:
    await saga.step(astep, "a", compensate=aundo)
    await asyncio.gather(*(saga.step(pausing, name, compensate=aundo) for name in ("b", "c")))


async def left_running(saga: Any, order: str) -> str:
    await saga.step(astep, "a", compensate=aundo)
    saga.task = asyncio.ensure_future(saga.step(pausing, "b", compensate=aundo))
    saga.task.add_done_callback(lambda task: task.exception())
    while "begin b" not in log:
        await turn()
    return order


class Slow(Spy):
    """A store whose answers take a turn of the loop."""

    async def aexecute(self, op: Any) -> Any:
        await turn()
        answer = self.execute(op)
        await turn()
        return answer


@pytest.mark.parametrize("body", [two_at_once, left_running])
@pytest.mark.parametrize("block", [False, True])
def test_a_saga_does_one_thing_at_a_time_and_waits_for_it_before_it_undoes(body: Any, block: bool) -> None:
    spy = Slow()

    async def main() -> None:
        if not block:
            await made(spy, body)("o", id="o-1")
            return
        async with Saga("order", id="o-1", store=spy, retries=RETRIES) as saga:
            await body(saga, "o")

    with pytest.raises(SagaAborted) as caught:
        asyncio.run(main())
    assert isinstance(caught.value.__cause__, RuntimeError)
    # Of two at once the first was only announced when the other was refused, which ended the saga.
    ran = ["begin b", "b", "undo b B"] if body is left_running else ["undo b UNKNOWN"]
    assert log == ["a", *ran, "undo a A"]
    assert [step.number for one in entries(spy, "order", "o-1") for step in one.steps] == [1, 2]


@pytest.mark.parametrize("name", ["step", "parallel"])
def test_a_step_that_is_just_announced_when_the_saga_ends_does_not_run(name: str) -> None:
    spy = Slow()

    async def body(saga: Any, order: str) -> None:
        await saga.step(astep, "a", compensate=aundo)
        if name == "step":
            saga.task = asyncio.ensure_future(saga.step(astep, "b", compensate=aundo))
        else:
            saga.task = asyncio.ensure_future(saga.parallel(branch(astep, "b", compensate=aundo)))
        saga.task.add_done_callback(lambda task: task.exception())
        await turn()

    with pytest.raises(SagaAborted) as caught:
        asyncio.run(made(spy, body)("o", id="o-1"))
    assert "ended while its step 2 still ran" in str(caught.value.__cause__)
    # A step is in the journal, so it is undone, by a compensation that knows nothing of its value; a group never began.
    assert log == ["a", *(["undo b UNKNOWN"] if name == "step" else []), "undo a A"]


def test_cancelled_while_a_step_is_waited_for_it_stays_so(spy: Spy) -> None:
    go: list[asyncio.Event] = []

    async def stuck(name: str) -> str:
        log.append(f"begin {name}")
        await go[0].wait()
        return step(name)

    async def body(saga: Any, order: str) -> str:
        saga.task = asyncio.ensure_future(saga.step(stuck, "b", compensate=None))
        while not log:
            await turn()
        return order

    async def main() -> None:
        go.append(asyncio.Event())
        block = Saga("order")

        async def run() -> None:
            async with block as saga:
                await saga.step(astep, "a", compensate=aundo)
                log.clear()
                await body(saga, "o")

        task = asyncio.create_task(run())
        while "begin b" not in log:
            await turn()
        for _ in range(3):
            await turn()
        task.cancel()
        for _ in range(3):
            await turn()
        go[0].set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert log == ["begin b", "b", "undo a A"]


@pytest.mark.parametrize("at", ["announced", "running", "group"])
def test_what_a_thread_still_does_at_the_end_of_a_body_is_waited_for(spy: Spy, at: str) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(op: Any = None) -> None:
        if op is None or isinstance(op, Append):
            begun.set()
            go.wait()

    def beside(saga: Any) -> None:
        with contextlib.suppress(RuntimeError):
            if at == "group":
                saga.parallel(branch(step, "b", compensate=undo))
            else:
                saga.step(step, "b", compensate=undo)

    def body(saga: Any, order: str) -> None:
        saga.step(step, "a", compensate=undo)
        if at == "running":
            hooks["b"] = hold
        else:
            spy.before = hold
        threading.Thread(target=beside, args=(saga,), daemon=True).start()
        begun.wait()
        threading.Thread(target=once_waited_for, args=(saga, go.set), daemon=True).start()

    with pytest.raises(SagaAborted) as caught:
        made(spy, body)("o", id="o-1")
    assert "still ran" in str(caught.value.__cause__)
    ended = {"announced": ["undo b UNKNOWN"], "running": ["b", "undo b B"], "group": []}
    assert log == ["a", *ended[at], "undo a A"]


@pytest.mark.parametrize("inside", [False, True])
def test_an_interrupt_while_a_step_is_waited_for_is_the_end_of_the_body(spy: Spy, inside: bool) -> None:
    def body(saga: Any, order: str) -> None:
        with saga.nested("part") if inside else contextlib.nullcontext(saga) as part:
            part.step(step, "a", compensate=undo)
            part._active = 2  # as if another thread ran one
            part._saga.grace = Interrupting()

    with pytest.raises(KeyboardInterrupt):
        made(spy, body)("o", id="o-1")
    assert log == ["a", "undo a A"]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("ends", ["at once", "later", "never"])
def test_a_body_that_is_cancelled_while_a_step_is_waited_for_stays_so(
    spy: Spy, inside: bool, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ends == "never":
        monkeypatch.setattr("resilient._aio.GRACE", 0.01)
    runs: list[Any] = []

    async def body(saga: Any, order: str) -> None:
        async with saga.nested("part") if inside else contextlib.nullcontext(saga) as part:
            await part.step(astep, "a", compensate=aundo)
            part._active = 2  # as if another task ran one
            runs.append(part)

    async def main() -> None:
        task = asyncio.create_task(made(spy, body)("o", id="o-1"))
        while not runs or runs[0]._resting is None:
            await turn()
        await turn()
        task.cancel()
        if ends == "at once":
            runs[0]._active = 0
        await turn()
        await turn()
        if ends == "later":
            runs[0]._idle()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert log == ["a", "undo a A"]


def test_a_step_that_has_just_ended_is_not_waited_for() -> None:
    saga = Saga("order")
    assert isinstance(SagaRun(saga)._rest(None), RuntimeError)
    assert isinstance(asyncio.run(AsyncSagaRun(saga)._arest(None)), RuntimeError)


def test_a_coroutine_that_is_closed_while_it_waits_for_a_step_is_closed() -> None:
    async def main() -> None:
        async with Saga("order") as saga:
            saga._active = 1
            raise ArithmeticError

    async def run() -> None:
        coroutine = main()
        coroutine.send(None)
        coroutine.close()

    asyncio.run(run())


def test_a_plain_compensation_that_gives_a_coroutine_is_told_when_it_is_called(spy: Spy) -> None:
    with pytest.raises(SagaStuck) as caught, Saga("order", retries=RETRIES) as saga:
        saga.step(step, "a", compensate=lambda name: aundo(name))
        raise ArithmeticError
    assert "is async, and this saga is not" in str(caught.value.exceptions[0])


# -- what is written where the body fails without undo ---------------------------------------------------------------


def test_a_result_is_kept_where_the_body_fails_with_what_is_not_undone(spy: Spy) -> None:
    def body(saga: Any, order: str) -> str:
        got: str = saga.step(step, "a", compensate=undo)
        if "mended" not in hooks:
            raise ArithmeticError
        return got

    place = made(spy, body, compensate_on=ConnectionError, in_doubt="stuck")
    with pytest.raises(ArithmeticError):
        place("o", id="o-1")
    hooks["mended"] = None
    assert place("o", id="o-1") == "A"
    assert log == ["a"]


@pytest.mark.parametrize("first", [False, True])
def test_a_pivot_is_kept_where_the_body_fails_after_it(spy: Spy, first: bool) -> None:
    def body(saga: Any, order: str) -> str:
        if not first:
            saga.step(step, "a", compensate=undo)
        saga.pivot()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        made(spy, body)("o", id="o-1")
    if first:
        # Nothing was done, so there is nothing to go on with.
        assert sagas.list_sagas(spy) == []
        return
    orphaned(spy)
    with pytest.raises(SagaError, match="past its pivot"):
        sagas.compensate(spy, "o-1")
    assert log == ["a"]


def test_a_block_that_fails_after_its_pivot_is_not_undone_by_anybody(spy: Spy) -> None:
    with pytest.raises(SagaStuck), Saga("block", id="o-1", store=spy) as saga:
        saga.step(step, "a", compensate=undo)
        saga.pivot()
        raise ArithmeticError
    with pytest.raises(SagaError, match="past its pivot"):
        sagas.compensate(spy, "o-1")
    assert log == ["a"]


def test_a_value_that_cannot_be_kept_is_an_error_of_its_branch_alone(spy: Spy) -> None:
    def body(saga: Any, order: str) -> None:
        with contextlib.suppress(TypeError):
            saga.parallel(branch(anything, object(), compensate=None), branch(step, "b", compensate=undo))
        # A saga with a journal does not go on after that.
        saga.step(step, "c", compensate=None)

    with pytest.raises(SagaAborted) as caught:
        made(spy, body)("o", id="o-1")
    assert isinstance(caught.value.__cause__, SagaError)
    assert log == ["b", "undo b B"]


def anything(value: Any) -> Any:
    return value


# -- the same saga? --------------------------------------------------------------------------------------------------


def test_a_step_that_is_run_again_with_other_arguments_is_a_departure(spy: Spy) -> None:
    amounts = ["100", "999"]

    def body(saga: Any, order: str) -> None:
        saga.step(step, amounts[0], compensate=undo)

    place = made(spy, body)
    died(spy, place, "100")
    amounts.pop(0)
    with pytest.raises(Incompatible, match="had other arguments when it began"):
        place("o", id="o-1")
    assert log == []
    amounts[0] = "100"
    place("o", id="o-1")
    assert log == ["100"]


def test_equal_arguments_in_another_order_are_no_departure(spy: Spy) -> None:
    tags = [["a", "b"], ["b", "a"]]

    def body(saga: Any, order: str) -> None:
        saga.step(tagged, dict.fromkeys(tags.pop(0), 1), compensate=tagged)

    place = made(spy, body)
    died(spy, place, "tagged")
    place("o", id="o-1")
    assert log == ["tagged"]


def tagged(tags: dict[str, int]) -> None:
    step("tagged")


def test_an_id_stands_for_its_arguments_however_they_are_passed(spy: Spy) -> None:
    def body(saga: Any, order: str, size: int = 1) -> int:
        saga.step(step, order, compensate=None)
        return size

    place = made(spy, body)
    died(spy, place, "o")
    with pytest.raises(SagaError, match="with other arguments"):
        place("o", 2, id="o-1")
    assert place(order="o", size=1, id="o-1") == 1
    assert place("o", 1, id="o-1") == place("o", id="o-1") == 1
    with pytest.raises(SagaError, match="with other arguments"):
        place("o", 2, id="o-1")
    (entry, *_) = entries(spy, "order", "o-1")
    assert isinstance(entry.head, Head)
    assert not place._input.alike(entry.head.input, Raw(b"[[],{}]"))


def test_an_interrupt_at_the_end_is_raised_and_the_saga_is_done(spy: Spy) -> None:
    spy.fail("Finish", 1, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        made(spy)("o", id="o-1")
    assert sagas.show(spy, "o-1").record.state == "done"


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("block", [False, True])
def test_a_task_whose_end_is_hard_to_write_is_done_all_the_same(
    spy: Spy, cut: bool, written: bool, block: bool
) -> None:
    async def main() -> None:
        spy.fail("Finish", 1, written=written, error=asyncio.CancelledError() if cut else None)
        if not block:
            assert await made(spy, athree)("o", id="o-1") == "oABC"
            return
        async with Saga("order", id="o-1", store=spy) as saga:
            await athree(saga, "o")

    with pytest.raises(asyncio.CancelledError) if cut else contextlib.nullcontext():
        asyncio.run(main())
    assert sagas.show(spy, "o-1").record.state == "done"
    assert log == ["a", "b", "c"]


def test_a_task_of_a_group_that_fails_ends_a_saga_with_a_journal(spy: Spy) -> None:
    hooks["b"] = boom

    async def body(saga: Any, order: str) -> None:
        with contextlib.suppress(ValueError):
            await saga.parallel(branch(astep, "a", compensate=aundo), branch(astep, "b", compensate=aundo))
        await saga.step(astep, "c", compensate=None)

    with pytest.raises(SagaAborted):
        asyncio.run(made(spy, body)("o", id="o-1"))
    assert "c" not in log


def test_one_interrupt_after_the_other_cannot_lose_the_journal(spy: Spy) -> None:
    hooks["b"] = boom
    place = made(spy)

    def again(op: Any) -> None:
        if type(op).__name__ == "Append":
            raise KeyboardInterrupt

    def strike() -> None:
        spy.before = again
        boom()

    hooks["b"] = strike
    with pytest.raises(StoreError, match="again and again"):
        place("o", id="o-1")
    spy.before = lambda op: None
    assert log == ["a", "b"]
    orphaned(spy)
    hooks["b"] = boom
    assert sagas.recover(spy).compensated == ["order/o-1"]


@pytest.mark.parametrize("at", ["History", "Begin", "Wait"])
def test_an_interrupt_while_a_saga_is_taken_over_leaves_it(spy: Spy, at: str) -> None:
    place = made(spy)
    died(spy, place, "b")
    spy.fail("Claim" if at == "Wait" else at, 1, written=True, error=KeyboardInterrupt())
    if at == "Wait":
        spy.store.execute(Claim(stored_key("order", "o-1"), "x", 30.0, take_over=True, label='{"saga":"order"}'))
    with pytest.raises(KeyboardInterrupt):
        place("o", id="o-1")
    spy.after = lambda op: None
    assert log == []
    if at != "Wait":
        assert place("o", id="o-1") == "oABC"


def test_an_interrupt_between_two_tries_of_a_write_is_kept(spy: Spy) -> None:
    tries: list[str] = []

    def trouble(op: Any) -> None:
        if type(op).__name__ == "Append" and len(tries) < 2:
            tries.append("x")
            raise StoreError("the store is away")

    class Hasty:
        def sleep(self, seconds: float) -> None:
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(spy.clock, name)

    from resilient import Env

    spy.before = trouble
    clock: Any = Hasty()
    with pytest.raises(KeyboardInterrupt):
        made(spy, env=Env(clock=clock))("o", id="o-1")
    assert log == ["a", "undo a A"]


def test_a_cancelled_task_undoes_and_stays_cancelled(spy: Spy) -> None:
    """Temporal's documentation sample does not compensate when it is cancelled in a sleep."""

    async def body(saga: Any, order: str) -> str:
        await saga.step(astep, "a", compensate=aundo)
        started.set()
        await asyncio.Event().wait()
        return order

    started = asyncio.Event()
    place = made(spy, body)

    async def main() -> None:
        task = asyncio.create_task(place("o", id="o-1"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert log == ["a", "undo a A"]
    assert sagas.show(spy, "o-1").record.state == "aborted"


async def stalled(name: str) -> None:
    log.append(f"stalled {name}")
    hooks["stalled"].set()
    if hooks.get("gate") is not None:
        await hooks["gate"].wait()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_cancel_while_it_is_undone_is_raised_after_that_or_its_grace(spy: Spy, fails: bool, late: bool) -> None:
    async def body(saga: Any, order: str) -> str:
        await saga.step(astep, "a", compensate=call(stalled, "a"))
        if fails:
            boom()
        raise asyncio.CancelledError

    place = made(spy, body, grace=0.01 if late else 30.0)

    async def main() -> None:
        hooks["stalled"], hooks["gate"] = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(place("o", id="o-1"))
        await hooks["stalled"].wait()
        task.cancel()
        if not late:
            await asyncio.wait([task], timeout=0)
            hooks["gate"].set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert sagas.show(spy, "o-1").record.state == ("compensating" if late else "aborted")
    if late:
        # What its time was too short for is undone by recovery.
        hooks["gate"] = None
        orphaned(spy)
        assert sagas.recover(spy).compensated == ["order/o-1"]


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_task_goes_on_undoing_and_a_cancel_is_raised_after_it(spy: Spy, cancelled: bool) -> None:
    async def body(saga: Any, order: str) -> str:
        await saga.step(astep, "a", compensate=call(stalled, "a"))
        hooks["b"] = boom
        await saga.step(step, "b", compensate=None)
        return order

    place = made(spy, body)

    async def undone() -> None:
        hooks["stalled"], hooks["gate"] = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(place("o", id="o-1"))
        await hooks["stalled"].wait()
        if cancelled:
            task.cancel()
            await asyncio.wait([task], timeout=0)
        hooks["gate"].set()
        with pytest.raises(asyncio.CancelledError if cancelled else SagaAborted):
            await task

    def stop(op: Any) -> None:
        if type(op).__name__ == "Append" and b'"undone"' in op.entry:
            raise Dead

    async def killed() -> None:
        hooks["stalled"], hooks["gate"] = asyncio.Event(), None
        spy.before = stop
        with pytest.raises(Dead):
            await place("o", id="o-1")
        spy.before = lambda op: None

    asyncio.run(killed())
    orphaned(spy)
    asyncio.run(undone())
    assert log == ["a", "b", "stalled a", "stalled a"]


def test_a_coroutine_that_is_thrown_away_gives_up_its_lease_in_time(spy: Spy) -> None:
    async def body(saga: Any, order: str) -> str:
        await saga.step(astep, "a", compensate=aundo)
        await asyncio.Event().wait()
        return order

    place = made(spy, body, lease=0.3)

    async def main() -> None:
        running = place("o", id="o-1")
        running.send(None)
        running.close()
        from resilient._run import task_keeper

        assert all(not queue.pending for queue in task_keeper(spy, 0.3, place.durable.env)._queues.values())

    asyncio.run(main())
    assert log == ["a"]


# -- bodies that are not the same any more ---------------------------------------------------------------------------


def other_name(saga: Any, order: str) -> str:
    saga.step(astep if False else undo, "a", compensate=undo)
    return order


def other_undo(saga: Any, order: str) -> str:
    saga.step(step, "a", compensate=None)
    return order


def other_pivot(saga: Any, order: str) -> str:
    saga.pivot()
    saga.step(step, "a", compensate=undo)
    return order


def fewer(saga: Any, order: str) -> str:
    saga.step(step, "a", compensate=undo)
    return order


def swallowing(saga: Any, order: str) -> str:
    for function in (undo, step, step):
        try:
            saga.step(function, "a", compensate=undo)
        except SagaError:
            pass
    return order


def other_group(saga: Any, order: str) -> str:
    saga.parallel(branch(undo, "a", compensate=None), branch(step, "b", compensate=undo))
    return order


@pytest.mark.parametrize("body", [other_name, other_undo, other_pivot, fewer, swallowing, other_group])
def test_a_body_that_departs_from_its_journal_runs_and_undoes_nothing(spy: Spy, body: Any) -> None:
    died(spy, made(spy), "c")
    place = made(spy, body)
    for _ in range(2):
        with pytest.raises(Incompatible, match="departs from its journal"):
            place("o", id="o-1")
    report = sagas.recover(spy)
    assert "departs" in report.left["order/o-1"]
    assert log == []
    assert sagas.show(spy, "o-1").record.state == "orphaned"
    assert made(spy)("o", id="o-1") == "oABC"
    assert log == ["c"]


def test_another_version_is_left_alone(spy: Spy) -> None:
    died(spy, made(spy), "c")
    place = made(spy, version=2)
    with pytest.raises(Incompatible, match="version 1, and this is version 2"):
        place("o", id="o-1")
    assert list(sagas.recover(spy).left) == ["order/o-1"]
    assert log == []
    assert "Abandon" not in spy.ops
    assert made(spy)("o", id="o-1") == "oABC"


def test_a_block_is_no_durable_saga(spy: Spy) -> None:
    with Saga("order", id="o-1", store=spy) as saga:
        saga.step(step, "a", compensate=undo)
    with pytest.raises(SagaError, match="ended already: done"):
        made(spy)("o", id="o-1")
    running = Saga("order", id="o-2", store=spy)
    running.__enter__().step(step, "a", compensate=undo)
    orphaned(spy)
    with pytest.raises(Incompatible, match="of a block"):
        made(spy)("o", id="o-2")
    running.__exit__(None, None, None)


def test_one_that_fails_before_it_is_where_another_was_undoes_that_as_well(spy: Spy) -> None:
    def body(saga: Any, order: str) -> str:
        for name in ("a", "b", "c"):
            if name == "b" and "early" in hooks:
                raise KeyboardInterrupt
            saga.step(step, name, compensate=undo)
        return order

    place = made(spy, body)
    died(spy, place, "c")
    hooks["early"] = True
    with pytest.raises(KeyboardInterrupt):
        place("o", id="o-1")
    assert log == ["undo c UNKNOWN", "undo b B", "undo a A"]


# -- what is for a person --------------------------------------------------------------------------------------------


def test_a_step_in_doubt_may_be_for_a_person(spy: Spy) -> None:
    place = made(spy, in_doubt="stuck")
    died(spy, place, "b")
    for _ in range(2):
        with pytest.raises(SagaStuck) as caught:
            place("o", id="o-1")
        assert "step 2 (tests.test_durable:step) had begun" in str(caught.value.exceptions[0])
    assert log == []
    assert sagas.recover(spy) == sagas.Report()
    assert [one.id for one in sagas.list_sagas(spy, state="stuck")] == ["o-1"]
    assert sagas.resume(spy, "o-1").state == "done"
    assert log == ["b", "c"]


def test_where_no_step_is_in_doubt_it_goes_on(spy: Spy) -> None:
    place = made(spy, in_doubt="stuck", lease=0.02)
    hooks["b"] = lambda: spy.fail("Append", 6)
    with pytest.raises(StoreError):
        place("o", id="o-1")
    orphaned(spy)
    with pytest.raises(SagaStuck):
        place("o", id="o-1")


def test_what_kills_one_process_after_the_other_is_for_a_person(spy: Spy) -> None:
    place = made(spy, attempts=2)
    died(spy, place, "b")
    died(spy, place, "b")
    with pytest.raises(SagaStuck) as caught:
        place("o", id="o-1")
    assert "2 processes have not finished it" in str(caught.value.exceptions[0])
    assert log == []
    # Somebody says so: then it counts anew.
    hooks["b"] = boom
    assert sagas.resume(spy, "o-1").state == "aborted"


def test_after_its_pivot_a_saga_goes_forward_on_recovery(spy: Spy) -> None:
    def body(saga: Any, order: str) -> str:
        saga.step(step, "a", compensate=undo)
        saga.pivot()
        saga.step(step, "b")
        saga.step(step, "c")
        return order

    place = made(spy, body, attempts=3)
    hooks["b"] = boom
    with pytest.raises(ValueError, match="boom") as caught:
        place("o", id="o-1")
    assert "recovery will go forward" in caught.value.__notes__[-1]
    assert list(sagas.recover(spy).left) == ["order/o-1"]
    del hooks["b"]
    assert sagas.recover(spy).finished == ["order/o-1"]
    assert log == ["a", "b", "b", "b", "c"]
    assert sagas.describe(sagas.show(spy, "o-1"))["pivot"] == 2


def test_a_journal_that_is_past_its_pivot_is_never_undone(spy: Spy) -> None:
    def body(saga: Any, order: str) -> str:
        if "early" in hooks:
            boom()
        saga.pivot()
        saga.step(step, "a", compensate=undo)
        saga.step(step, "b")
        return order

    place = made(spy, body)
    died(spy, place, "b")
    hooks["early"] = True
    with pytest.raises(ValueError, match="boom"):
        place("o", id="o-1")
    with pytest.raises(SagaError, match="past its pivot"):
        sagas.compensate(spy, "o-1")
    assert log == []


def test_an_error_that_is_not_to_be_undone_leaves_it_for_recovery(spy: Spy) -> None:
    place = made(spy, compensate_on=OSError)
    hooks["b"] = boom
    with pytest.raises(ValueError, match="boom"):
        place("o", id="o-1")
    assert log == ["a", "b"]
    del hooks["b"]
    assert sagas.recover(spy).finished == ["order/o-1"]


def test_a_retry_counter_never_leaks_from_a_step_to_its_compensation(spy: Spy) -> None:
    """MassTransit#4676."""
    tries = {"b": 0, "undo a": 0}

    def body(saga: Any, order: str) -> None:
        saga.step(step, "a", compensate=undo)
        saga.step(step, "b", compensate=undo, retry=Retry(ValueError, attempts=5, wait=0))

    def again(name: str, most: int) -> Any:
        def fail() -> None:
            tries[name] = tries.get(name, 0) + 1
            if tries[name] < most:
                boom()

        return fail

    hooks["b"] = again("b", 99)
    hooks["undo b"], hooks["undo a"] = again("undo b", 2), again("undo a", 2)
    with pytest.raises(SagaAborted):
        made(spy, body)("o", id="o-1")
    assert tries == {"b": 5, "undo b": 2, "undo a": 2}


def test_the_time_of_the_steps_can_be_limited(spy: Spy) -> None:
    from resilient import DeadlineExceeded, Env

    place = made(spy, env=Env(clock=spy.clock), timeout=5.0)
    hooks["b"] = lambda: spy.clock.advance(6.0)
    with pytest.raises(SagaAborted) as caught:
        place("o", id="o-1")
    assert isinstance(caught.value.__cause__, DeadlineExceeded)
    assert log == ["a", "b", "undo b B", "undo a A"]


def test_a_result_that_cannot_be_kept_fails_the_saga(spy: Spy) -> None:
    def body(saga: Any, order: str) -> object:
        saga.step(step, "a", compensate=undo)
        return object()

    with pytest.raises(SagaAborted) as caught:
        made(spy, body)("o", id="o-1")
    assert isinstance(caught.value.__cause__, TypeError)


# -- how it is made --------------------------------------------------------------------------------------------------


def test_what_cannot_be_a_body_is_refused(spy: Spy) -> None:
    with pytest.raises(TypeError, match="needs a store, or an engine"):
        DurableSaga("order")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="engine must be an engine"):
        DurableSaga("order", engine=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="in_doubt must be"):
        DurableSaga("order", store=spy, in_doubt="perhaps")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="attempts"):
        DurableSaga("order", store=spy, attempts=0)

    async def stream(saga: Any) -> Any:
        yield 1

    with pytest.raises(TypeError, match="must be a function or a coroutine function"):
        DurableSaga("order", store=spy)(stream)
    with pytest.raises(TypeError, match="has no aexecute"):
        DurableSaga("order", store=type("Plain", (), {"execute": None})())(athree)
    made(spy)
    with pytest.raises(ValueError, match="two durable sagas named 'order'"):
        DurableSaga("order", store=spy)(athree)
    assert DurableSaga("order", store=spy)(three).name == "order"
    assert durable.known()["order"].__wrapped__ is three


def test_an_engine_is_asked_to_bind_the_body(spy: Spy) -> None:
    class Engine:
        def bind(self, durable: Any, body: Any) -> Any:
            return durable.name, body

    bound: Any = DurableSaga("order", engine=Engine())(three)
    assert bound == ("order", three)


def test_a_body_has_its_own_recovery(spy: Spy) -> None:
    place = made(spy)
    died(spy, place, "b")
    assert place.recover().finished == ["order/o-1"]
    place = made(spy, athree)
    died(spy, place, "b", name="o-2")
    assert asyncio.run(place.arecover()).finished == ["order/o-2"]


def test_hostile_input_is_a_clear_error(spy: Spy) -> None:
    place = made(spy)
    for bad in (b"{}", b"[[1]", b'[["o", 1], {}]', b'[[], {"nobody": 1}]', b'[["o"], {}, 1]', b"[[3], {}]"):
        with pytest.raises(StoreError):
            place.resume(spy, "o-1", Raw(bad))
    assert spy.ops == []


def test_an_end_that_somebody_else_wrote_is_a_clear_error(spy: Spy) -> None:
    place = made(spy)
    for number, end in enumerate((b"{}", b'{"v":2,"saga":"done"}', b"\xff", b'{"v":1,"saga":"done"}')):
        key = stored_key("order", f"o-{number}")
        reply = spy.store.execute(Claim(key, "x", 30.0, label="x"))
        spy.store.execute(Finish(key, "x", reply.fence, end, 60.0))
        with pytest.raises((StoreError, SagaError)):
            place("o", id=f"o-{number}")
    assert log == []


@pytest.mark.parametrize("wait", [False, True])
def test_who_looks_at_a_saga_that_ends_just_then_sees_its_end(spy: Spy, wait: bool) -> None:
    place = made(spy)
    key = stored_key("order", "o-1")
    reply: Any = spy.store.execute(
        Begin(key, "somebody", 30.0, b"{}", '{"saga":"order","id":"o-1","version":1,"state":"running"}')
    )

    def ends(op: Any) -> None:
        if isinstance(op, Claim):
            spy.store.execute(Finish(key, "somebody", reply.fence, b'{"v":1,"saga":"aborted"}', 1e6))

    spy.before = ends
    with deadline(60.0 if wait else 0.0), pytest.raises(SagaAborted):
        place("o", id="o-1")


def test_a_saga_that_vanishes_under_the_lease_is_said(spy: Spy) -> None:
    place = made(spy)
    died(spy, place, "b")
    count = [0]

    def vanish(op: Any) -> None:
        count[0] += type(op).__name__ == "History"
        if count[0] == 2:
            spy.store._rows.clear()

    spy.before = vanish
    with pytest.raises(LookupError, match="just been removed"):
        place("o", id="o-1")


def test_a_step_that_said_how_it_ended_is_not_in_doubt(spy: Spy) -> None:
    place = made(spy, in_doubt="stuck")
    died(spy, place, "b")
    key = stored_key("order", "o-1")
    reply: Any = spy.store.execute(Claim(key, "x", 1.0, take_over=True, label="x"))
    spy.store.execute(Append(key, "x", reply.fence, 2, b'{"done":{"2":{"v":1,"ok":"B"}}}', 1.0))
    orphaned(spy)
    assert place("o", id="o-1") == "oABC"
    assert log == ["c"]


def test_compensations_are_under_no_deadline(spy: Spy) -> None:
    """Neither that of the saga nor that around it."""
    from resilient import remaining

    left: list[Any] = []
    hooks["undo a"] = lambda: left.append(remaining())
    hooks["c"] = boom
    with deadline(60.0), pytest.raises(SagaAborted):
        made(spy, timeout=30.0)("o", id="o-1")
    assert left == [None]


@pytest.mark.parametrize("under_way", [False, True])
def test_a_heartbeat_that_is_under_way_at_the_end_is_waited_for(
    spy: Spy, under_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[str] = []
    end = ThreadKeeper.end

    def ended(self: Any, beat: Any) -> bool:
        end(self, beat)
        return under_way

    monkeypatch.setattr(ThreadKeeper, "end", ended)
    monkeypatch.setattr(Beat, "settle", lambda self: settled.append("settled"))  # pyright: ignore[reportUnknownLambdaType]
    assert made(spy)("o", id="o-1") == "oABC"
    assert settled == (["settled"] if under_way else [])
    assert spy.ops[-1] == "Finish"


def test_a_saga_of_the_library_s_own_vouches_for_its_own_package_only(monkeypatch: pytest.MonkeyPatch) -> None:
    vouched: list[str] = []
    monkeypatch.setattr(durable, "vouch_for", vouched.append)
    store = MemoryStore()

    def body(saga: Any) -> None: ...

    for module in ("resilient.demo.saga", "resilient", "shop.orders.place"):
        body.__module__ = module
        with contextlib.suppress(TypeError, ValueError):
            DurableSaga(f"of {module}", store=store)(body)
    assert vouched == ["resilient.demo", "resilient", "shop"]


def test_who_cannot_undo_a_saga_says_why_and_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Book:
        failed = "ValueError: 3"

        def left(self) -> Any:
            raise LookupError("there is no function shop:release here")

        def leave(self) -> Any:
            yield "left"

    saga = Saga("order", id="o-1")
    book: Any = Book()
    program = durable.undone(saga, Run(saga), book, lambda: None)
    assert next(program) == "left"
    with pytest.raises(StopIteration) as ended:
        next(program)
    assert isinstance(ended.value.value.error, LookupError)

    def nothing(*args: Any) -> Any:
        return Outcome(None, None)
        yield

    book.left = list
    monkeypatch.setattr(durable, "rollback", nothing)
    with pytest.raises(StopIteration) as well:
        next(durable.undone(saga, Run(saga), book, lambda: None))
    assert well.value.value.error is None
