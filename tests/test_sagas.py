"""Sagas from outside: recovery that nothing blocks, what people decide, hostile journals, and how a saga looks."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient import (
    RESULT,
    InFlight,
    Retry,
    Saga,
    SagaAborted,
    SagaError,
    SagaStuck,
    StoreError,
    _cli_saga,
    call,
    durable,
    sagas,
)
from resilient import _journal as journal
from resilient._book import label_of, stored_key
from resilient._recovery import Recoverer
from resilient.saga import branch
from resilient.stores._open import forget_shared
from resilient.stores._ops import Append, Begin, Claim, Finish, Forget, Renew, Scan
from tests._proofs import Dead
from tests._saga_worlds import Spy, alone, entries, orphaned
from tests.test_durable import astep, aundo, boom, died, hooks, log, made, step, undo

RETRIES = Retry(Exception, attempts=2, wait=0, name="compensation")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    log.clear()
    hooks.clear()
    with alone():
        yield
    hooks.clear()


@pytest.fixture
def spy() -> Spy:
    return Spy()


def block(spy: Any, name: str = "o-1", *, pivot: bool = False, is_async: bool = False, undone: Any = undo) -> None:
    """A block whose process dies after its second step, and whose lease runs out."""
    running = Saga("block", id=name, store=spy)

    async def main() -> None:
        saga = await running.__aenter__()
        await saga.step(step, "a", compensate=undone)
        await saga.step(step, "b", compensate=aundo)
        running._run._book.stop()

    if is_async:
        asyncio.run(main())
    else:
        saga = running.__enter__()
        saga.step(step, "a", compensate=undone)
        if pivot:
            saga.pivot()
        saga.step(step, "b", compensate=undo)
        running._run._book.stop()
    orphaned(spy)
    log.clear()
    spy.ops.clear()


def recover(spy: Any, **more: Any) -> sagas.Report:
    return sagas.recover(spy, retries=RETRIES, **more)


def broken(name: str, result: str = "?") -> None:
    log.append(f"broken {name}")
    if "mended" not in hooks:
        raise OSError("broken")


# -- recovery --------------------------------------------------------------------------------------------------------


def test_a_block_is_undone_by_its_journal(spy: Spy) -> None:
    block(spy)
    report = recover(spy)
    assert report == sagas.Report(compensated=["block/o-1"])
    assert str(report) == "0 finished, 1 undone, 0 stuck"
    # How the last step ended, nobody has written.
    assert log == ["undo b UNKNOWN", "undo a A"]
    assert spy.ops == [
        *("Scan", "History", "History", "Begin", "History"),
        *("Append", "Append", "Append", "Finish"),
    ]
    assert recover(spy) == sagas.Report()
    assert sagas.show(spy, "o-1").end.error == "its process died"  # type: ignore[union-attr]


def test_async_compensations_are_run_in_a_loop(spy: Spy) -> None:
    block(spy, is_async=True)
    assert recover(spy).compensated == ["block/o-1"]
    assert log == ["undo b UNKNOWN", "undo a A"]


def test_under_a_loop_the_async_twin_is_named_and_works(spy: Spy) -> None:
    block(spy, is_async=True)

    async def main() -> None:
        assert "use the async twin" in recover(spy).left["block/o-1"]
        assert (await sagas.arecover(spy, retries=RETRIES, name="other")) == sagas.Report()
        report = await sagas.arecover(spy, retries=RETRIES)
        assert report.compensated == ["block/o-1"]

    asyncio.run(main())
    assert log == ["undo b UNKNOWN", "undo a A"]


def test_async_bodies_are_run_in_a_loop_that_closes_its_connections(spy: Spy) -> None:
    async def body(saga: Any, order: str) -> str:
        await saga.step(astep, "a", compensate=aundo)
        await saga.step(step, "b", compensate=None)
        return order

    closed: list[str] = []

    async def aclose() -> None:
        closed.append("closed")

    spy.aclose = aclose  # type: ignore[attr-defined]
    died(spy, made(spy, body), "b")
    assert recover(spy).finished == ["order/o-1"]
    assert log == ["b"]
    assert closed == ["closed"]
    died(spy, made(spy, body), "b", name="o-2")

    async def main() -> None:
        assert (await sagas.arecover(spy)).finished == ["order/o-2"]

    asyncio.run(main())
    died(spy, made(spy), "b", name="o-3")

    async def plain() -> None:
        assert (await sagas.arecover(spy)).finished == ["order/o-3"]

    asyncio.run(plain())


def test_a_block_past_its_pivot_is_for_a_person(spy: Spy) -> None:
    block(spy, pivot=True)
    assert recover(spy).stuck == ["block/o-1"]
    assert log == []
    assert [one.id for one in sagas.list_sagas(spy, state="stuck")] == ["o-1"]
    with pytest.raises(SagaError, match="past its pivot"):
        sagas.compensate(spy, "o-1")
    with pytest.raises(SagaError, match=r"was a block, .* past its pivot: abandon it"):
        sagas.resume(spy, "o-1")
    assert sagas.abandon(spy, "o-1", "sent by hand").state == "abandoned"
    assert log == []


def test_one_bad_saga_blocks_no_other(spy: Spy) -> None:
    """occurrent#818."""
    block(spy, "failing", undone=broken)
    died(spy, made(spy), "b", name="unknown")
    durable._bodies.clear()
    block(spy, "good")
    for name, entry in (("cut", b'{"head"'), ("huge", b'{"head":' + b"[" * 100_000), ("empty", b"")):
        key = stored_key("block", name)
        spy.store.execute(Begin(key, "x", 0.001, entry, label_of("block", name, 1, "running")))
    spy.clock.advance(1.0)
    report = recover(spy)
    assert report.compensated == ["block/good"]
    assert report.stuck == ["block/failing"]
    assert sorted(report.left) == ["block/cut", "block/empty", "block/huge", "order/unknown"]
    assert "no durable saga named 'order' is known here" in report.left["order/unknown"]
    assert str(report) == "0 finished, 1 undone, 1 stuck, 4 left"
    assert [one.state for one in sagas.list_sagas(spy) if one.id == "cut"] == ["orphaned"]


def test_those_of_another_name_are_left_out(spy: Spy) -> None:
    block(spy)
    assert recover(spy, name="other") == sagas.Report()
    assert recover(spy, name="block").compensated == ["block/o-1"]


def test_two_recoverers_at_once_one_has_it_and_the_other_goes_on(spy: Spy) -> None:
    block(spy)
    twin = Spy()
    twin.store, twin.clock = spy.store, spy.clock
    seen: list[sagas.Report] = []

    def other(op: Any) -> None:
        if isinstance(op, Begin):
            spy.before = lambda op: None
            seen.append(recover(twin))

    spy.before = other
    assert recover(spy) == sagas.Report()
    assert seen == [sagas.Report(compensated=["block/o-1"])]
    assert log == ["undo b UNKNOWN", "undo a A"]


@pytest.mark.parametrize("op", ["History", "Begin"])
@pytest.mark.parametrize("body", [False, True])
def test_one_that_another_recoverer_has_just_now_is_skipped(spy: Spy, op: str, body: bool) -> None:
    died(spy, made(spy), "b") if body else block(spy)
    name = "order" if body else "block"
    key = stored_key(name, "o-1")

    def taken(one: Any) -> None:
        if type(one).__name__ == op:
            spy.before = lambda op: None
            spy.store.execute(Claim(key, "somebody", 30.0, label=label_of(name, "o-1", 1, "running"), take_over=True))

    spy.before = taken
    assert recover(spy) == sagas.Report()
    assert log == []
    with pytest.raises(InFlight) as caught:
        sagas.compensate(spy, "o-1")
    assert caught.value.retry_after == 30.0
    with pytest.raises(InFlight):
        sagas.abandon(spy, "o-1", "x")
    # A look writes nothing.
    assert spy.store.execute(Renew(key, "somebody", 0, 30.0))


@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("how", ["finished", "forgotten"])
@pytest.mark.parametrize("op", ["Begin", "2nd History"])
def test_one_that_has_just_ended_or_gone_is_skipped(spy: Spy, body: bool, how: str, op: str) -> None:
    died(spy, made(spy), "b") if body else block(spy)
    name = "order" if body else "block"
    key = stored_key(name, "o-1")
    count = [0]

    def taken(one: Any) -> None:
        count[0] += type(one).__name__ == op.split()[-1]
        if count[0] != 1 + op.startswith("2"):
            return
        spy.before = lambda op: None
        if how == "forgotten":
            spy.store.execute(Forget(key))
        else:
            reply: Any = spy.store.execute(
                Claim(key, "somebody", 30.0, label=label_of(name, "o-1", 1, ""), take_over=True)
            )
            spy.store.execute(Finish(key, "somebody", reply.fence, b'{"v":1,"saga":"done"}', 60.0))

    spy.before = taken
    assert recover(spy) == sagas.Report()
    assert log == []


def test_a_saga_that_was_undone_goes_on_with_that_and_never_forward(spy: Spy) -> None:
    """larzstate resumes forward after it died while it rolled back."""
    place = made(spy)
    hooks["c"] = boom

    def dead() -> None:
        spy.before = lambda op: (_ for _ in ()).throw(Dead())
        raise Dead

    hooks["undo b"] = dead
    with pytest.raises(Dead):
        place("o", id="o-1")
    spy.before = lambda op: None
    hooks.clear()
    orphaned(spy)
    log.clear()
    assert recover(spy).compensated == ["order/o-1"]
    assert log == ["undo b B", "undo a A"]
    # Without its body as well.
    log.clear()


def test_without_its_body_what_was_being_undone_is_undone_by_the_journal(spy: Spy) -> None:
    place = made(spy, lease=0.02)
    hooks["c"] = boom
    hooks["undo b"] = lambda: spy.fail("Append", 6)
    with pytest.raises(StoreError):
        place("o", id="o-1")
    hooks.clear()
    orphaned(spy)
    durable._bodies.clear()
    assert recover(spy).compensated == ["order/o-1"]
    assert log == ["a", "b", "c", "undo b B", "undo b B", "undo a A"]


@pytest.mark.parametrize("at", ["compensating", "stuck"])
@pytest.mark.parametrize("pivot", [False, True])
def test_a_store_that_fails_under_recovery_leaves_the_saga(spy: Spy, at: str, pivot: bool) -> None:
    block(spy, pivot=pivot)
    spy.fail("Append", 6)
    assert "the store is away" in recover(spy, lease=0.02).left["block/o-1"]
    assert log == []
    spy.before = lambda op: None
    orphaned(spy)
    assert str(recover(spy)) == ("0 finished, 0 undone, 1 stuck" if pivot else "0 finished, 1 undone, 0 stuck")


def test_those_that_keep_failing_are_looked_at_more_and_more_rarely(spy: Spy) -> None:
    died(spy, made(spy), "b")
    durable._bodies.clear()
    said: list[tuple[str, str]] = []
    recoverer = Recoverer(spy, say=lambda record, how, error: said.append((str(record), how)))
    looks = [bool(recoverer.round().left) for _ in range(16)]
    assert [number for number, one in enumerate(looks, 1) if one] == [1, 2, 4, 8, 16]
    assert said == [("order/o-1", "left")] * 5
    made(spy)
    rounds = 0
    while not recoverer.round().finished:
        rounds += 1
    assert rounds == 15
    assert recoverer.failing == {}
    assert recoverer.round() == sagas.Report()


def test_a_recoverer_stops_between_two_sagas(spy: Spy) -> None:
    for name in ("o-1", "o-2"):
        block(spy, name)
    done: list[str] = []
    recoverer = Recoverer(
        spy, retries=RETRIES, concurrency=1, stop=lambda: bool(done), say=lambda record, how, error: done.append(how)
    )
    assert len(recoverer.round().compensated) == 1
    done.clear()
    assert len(asyncio.run(recoverer.around()).compensated) == 1


def test_failures_are_noted_by_tasks_too(spy: Spy) -> None:
    died(spy, made(spy), "b")
    durable._bodies.clear()
    block(spy, "failing", undone=broken)
    report = asyncio.run(sagas.arecover(spy, retries=RETRIES))
    assert list(report.left) == ["order/o-1"]
    assert report.stuck == ["block/failing"]


def test_the_store_of_the_recoverer_is_the_one_that_counts(spy: Spy) -> None:
    """A body has a store of its own, which need not be this one."""
    place = made(spy)
    died(spy, place, "b")
    place.durable.store = Spy()
    assert recover(spy).finished == ["order/o-1"]
    assert place.durable.store.ops == []


def test_a_url_names_a_store() -> None:
    forget_shared()
    try:
        assert sagas.list_sagas("memory://") == []
        assert sagas.recover("memory://") == sagas.Report()
    finally:
        forget_shared()


# -- what people decide ----------------------------------------------------------------------------------------------


def test_a_stuck_saga_can_be_resumed(spy: Spy) -> None:
    running = Saga("block", id="o-1", store=spy, retries=RETRIES)
    with pytest.raises(SagaStuck), running as saga:
        saga.step(step, "a", compensate=broken)
        saga.step(step, "b", compensate=undo)
        boom()
    assert log == ["a", "b", "undo b B", "broken a", "broken a"]
    assert [str(one) for one in sagas.list_sagas(spy, state="stuck")] == ["block/o-1"]
    assert recover(spy) == sagas.Report()
    with pytest.raises(SagaStuck):
        sagas.resume(spy, "o-1", retries=RETRIES)
    hooks["mended"] = True
    log.clear()
    record = sagas.resume(spy, "o-1", retries=RETRIES)
    assert (record.state, log) == ("aborted", ["broken a"])
    assert sagas.describe(sagas.show(spy, "o-1"))["steps"][1]["state"] == "undone"


def test_an_orphan_can_be_undone_though_it_could_go_forward(spy: Spy) -> None:
    died(spy, made(spy), "b")
    assert sagas.compensate(spy, "o-1", name="order").state == "aborted"
    assert log == ["undo b UNKNOWN", "undo a A"]
    assert sagas.show(spy, "o-1").end.error == "somebody had it undone"  # type: ignore[union-attr]
    died(spy, made(spy), "b", name="o-2")
    durable._bodies.clear()
    assert sagas.compensate(spy, "o-2").state == "aborted"


def test_what_somebody_began_to_undo_is_undone_to_the_end_by_recovery(spy: Spy) -> None:
    block(spy)
    hooks["undo a"] = lambda: spy.fail("Append", 6)

    def away() -> None:
        spy.before = lambda op: (_ for _ in ()).throw(Dead())

    hooks["undo a"] = away
    with pytest.raises(Dead):
        sagas.compensate(spy, "o-1", retries=RETRIES)
    spy.before = lambda op: None
    hooks.clear()
    orphaned(spy)
    log.clear()
    assert recover(spy).compensated == ["block/o-1"]
    assert log == ["undo a A"]


def test_a_resumed_saga_whose_process_dies_is_an_orphan_and_no_longer_stuck(spy: Spy) -> None:
    place = made(spy, in_doubt="stuck")
    died(spy, place, "b")
    with pytest.raises(SagaStuck):
        place("o", id="o-1")

    def dead() -> None:
        spy.before = lambda op: (_ for _ in ()).throw(Dead())
        raise Dead

    hooks["b"] = dead
    with pytest.raises(Dead):
        sagas.resume(spy, "o-1")
    spy.before = lambda op: None
    orphaned(spy)
    assert sagas.show(spy, "o-1").record.state == "orphaned"
    assert sagas.describe(sagas.show(spy, "o-1"))["stuck"] == []
    assert recover(spy).stuck == ["order/o-1"]


def abandoned(store: Any, which: str, **more: Any) -> sagas.SagaRecord:
    return sagas.abandon(store, which, "why", **more)


@pytest.mark.parametrize("decide", [sagas.resume, sagas.compensate, abandoned])
def test_illegal_transitions_are_refused(spy: Spy, decide: Any) -> None:
    with pytest.raises(LookupError, match="no saga with the id 'o-1'"):
        decide(spy, "o-1")
    with pytest.raises(LookupError):
        decide(spy, "o-1", name="order")
    place = made(spy)
    refused: list[Any] = []

    def alive() -> None:
        with pytest.raises(InFlight) as caught:
            decide(spy, "o-1")
        refused.append(caught.value.retry_after)

    hooks["b"] = alive
    place("o", id="o-1")
    assert refused == [30.0]
    with pytest.raises(SagaError, match="ended already: done"):
        decide(spy, "o-1")
    hooks["b"] = boom
    with pytest.raises(SagaAborted):
        place("o", id="o-2")
    with pytest.raises(SagaError, match="ended already: aborted"):
        decide(spy, "o-2")
    assert log == ["a", "b", "c", "a", "b", "undo a A"] or log[-2:] == ["undo b UNKNOWN", "undo a A"]


def test_what_ended_after_the_look_is_refused(spy: Spy) -> None:
    block(spy)
    key = stored_key("block", "o-1")

    def ends(op: Any) -> None:
        if isinstance(op, Claim):
            spy.before = lambda op: None
            reply: Any = spy.store.execute(Claim(key, "x", 30.0, label=label_of("block", "o-1", 1, ""), take_over=True))
            spy.store.execute(Finish(key, "x", reply.fence, b'{"v":1,"saga":"done"}', 1e6))

    spy.before = ends
    with pytest.raises(SagaError, match="it has just ended"):
        sagas.abandon(spy, "o-1", "why")
    block(spy, "o-2")
    spy.before = lambda op: isinstance(op, Claim) and spy.store.execute(Forget(stored_key("block", "o-2")))
    with pytest.raises(LookupError, match="any more"):
        sagas.abandon(spy, "o-2", "why")
    spy.before = lambda op: None
    assert [one.id for one in sagas.list_sagas(spy)] == ["o-1"]
    block(spy, "o-3")

    def stolen(op: Any) -> None:
        if isinstance(op, Finish):
            orphaned(spy)
            spy.store.execute(Claim(op.key, "x", 30.0, label=label_of("block", "o-3", 1, ""), take_over=True))

    spy.before = stolen
    with pytest.raises(SagaError, match="just taken it over"):
        sagas.abandon(spy, "o-3", "why")


@pytest.mark.parametrize("again", ["resume", "compensate"])
def test_what_goes_after_the_look_cannot_be_decided(spy: Spy, again: str) -> None:
    block(spy)
    count = [0]

    def gone(op: Any) -> None:
        count[0] += type(op).__name__ == "History"
        if count[0] == 2:
            spy.store.execute(Forget(stored_key("block", "o-1")))

    spy.before = gone
    with pytest.raises(LookupError, match="no saga"):
        getattr(sagas, again)(spy, "o-1")


def test_a_reason_must_be_given(spy: Spy) -> None:
    block(spy)
    for why in ("", "  ", 3):
        with pytest.raises(ValueError, match="why must say something"):
            sagas.abandon(spy, "o-1", why)  # type: ignore[arg-type]
    block(spy, "o-2")
    assert sagas.abandon(spy, "o-2", "damaged", name="block").state == "abandoned"
    assert sagas.show(spy, "o-2").end.error == "damaged"  # type: ignore[union-attr]


def test_a_damaged_journal_can_be_abandoned(spy: Spy) -> None:
    key = stored_key("block", "o-1")
    spy.store.execute(Begin(key, "x", 0.001, b"garbage", label_of("block", "o-1", 1, "running")))
    orphaned(spy)
    with pytest.raises(StoreError, match="cannot be read"):
        sagas.compensate(spy, "o-1")
    with pytest.raises(StoreError):
        sagas.show(spy, "o-1")
    assert sagas.abandon(spy, "o-1", "damaged").state == "abandoned"


def test_the_async_twins_do_the_same(spy: Spy) -> None:
    async def main() -> None:
        block(spy)
        assert [one.state for one in await sagas.alist_sagas(spy)] == ["orphaned"]
        assert (await sagas.ashow(spy, "o-1")).record.name == "block"
        assert (await sagas.acompensate(spy, "o-1", retries=RETRIES)).state == "aborted"
        died_here = made(spy)
        hooks["b"] = lambda: spy.fail("Append", 6)
        died_here.durable._options["lease"] = 0.02
        with pytest.raises(StoreError):
            died_here("o", id="o-2")
        hooks.clear()
        orphaned(spy)
        assert (await sagas.aresume(spy, "o-2")).state == "done"
        block(spy, "o-3")
        assert (await sagas.aabandon(spy, "o-3", "why")).state == "abandoned"
        with pytest.raises(SagaError):
            await sagas.aresume(spy, "o-3")

    asyncio.run(main())


def test_an_id_of_several_sagas_needs_a_name(spy: Spy) -> None:
    block(spy)
    made(spy)("o", id="o-1")
    with pytest.raises(LookupError, match="several sagas"):
        sagas.show(spy, "o-1")
    assert sagas.show(spy, "o-1", name="order").record.name == "order"


def test_lists_are_by_state_and_name(spy: Spy) -> None:
    block(spy)
    place = made(spy)
    inside: list[Any] = []

    def look() -> None:
        inside.append([str(one) for one in sagas.list_sagas(spy, state="running")])

    hooks["b"] = look
    place("o", id="o-2")
    assert inside == [["order/o-2"]]

    def shown() -> None:
        inside.append([str(one) for one in sagas.list_sagas(spy, state="compensating")])
        inside.append(sagas.list_sagas(spy, state="running"))

    hooks["b"], hooks["undo a"] = boom, shown
    with pytest.raises(SagaAborted):
        place("o", id="o-3")
    assert inside[1:] == [["order/o-3"], []]
    assert [str(one) for one in sagas.list_sagas(spy, state="orphaned")] == ["block/o-1"]
    assert [str(one) for one in sagas.list_sagas(spy, state="done")] == ["order/o-2"]
    assert [str(one) for one in sagas.list_sagas(spy, state="aborted", name="order")] == ["order/o-3"]
    assert sagas.list_sagas(spy, state="aborted", name="block") == []


def test_a_state_that_there_is_not_is_refused(spy: Spy) -> None:
    """`state="stucc"` was an empty list, as if nothing needed a person."""
    says = "state must be one of running, compensating, orphaned, stuck, done, aborted, abandoned, damaged, not 'stucc'"
    with pytest.raises(ValueError, match=says):
        sagas.list_sagas(spy, state="stucc")
    with pytest.raises(ValueError, match=says):
        asyncio.run(sagas.alist_sagas(spy, state="stucc"))
    assert spy.ops == []
    assert sagas.ALL_STATES == _cli_saga.STATES


def test_other_records_are_no_sagas(spy: Spy) -> None:
    for number, label in enumerate(('{"key":"\\"saga\\":"}', '"saga":', '{"saga":3,"id":"x"}', '{"saga":"x"}')):
        spy.store.execute(Claim(f"k-{number}", "x", 0.001, label=label))
    reply: Any = spy.store.execute(Claim("k-9", "x", 1.0, label=label_of("block", "odd", 1, "running")))
    spy.store.execute(Finish("k-9", "x", reply.fence, b"odd", 1e6))
    orphaned(spy)
    for number in range(450):
        reply = spy.store.execute(Claim(f"m-{number}", "x", 60.0, label=label_of("many", f"m-{number}", 1, "running")))
        spy.store.execute(Finish(f"m-{number}", "x", reply.fence, b'{"v":1,"saga":"done"}', 2000.0))
    assert len(sagas.list_sagas(spy, name="many")) == 450
    assert [one.id for one in sagas.list_sagas(spy, state="damaged")] == ["odd"]
    assert recover(spy) == sagas.Report()


# -- journals that want too much -------------------------------------------------------------------------------------

EVIL = types.ModuleType("evil_module_of_tests")
exec(
    "def strike(*a, **k): struck.append(a)\nstruck = []\nclass Thing:\n    def __init__(self, *a): struck.append(a)",
    vars(EVIL),
)


def forged(spy: Spy, function: str, args: bytes = b"[]", **fields: Any) -> None:
    """A journal that somebody else has written."""
    key = stored_key("block", "o-1")
    undoing = journal.Undoing(function, msgspec.Raw(args), **fields)
    entry = journal.Entry(
        head=journal.Head(1, "block", 1, "o-1"), steps=[journal.Step(1, "x:y", "block/o-1/1", undoing)]
    )
    spy.store.execute(Begin(key, "x", 0.001, journal.write(entry), label_of("block", "o-1", 1, "running")))
    orphaned(spy)


@pytest.mark.parametrize(
    "name",
    [
        *("os:system", "posix:system", "subprocess:call", "builtins:eval", "builtins:exec", "shutil:rmtree"),
        *("evil_module_of_tests:strike", "evil_module_of_tests:Thing", "evil_module_of_tests.inner:x"),
        *(
            "tests.test_sagas:os.system",
            "tests.test_sagas:EVIL.strike",
            "tests.test_sagas:log.clear",
            "tests.nowhere:x",
        ),
        *("tests.test_sagas:Spy", "tests.test_sagas:nobody", "tests.test_sagas:", ":", "", "tests.test_sagas"),
        *("tests.test_sagas:block.__globals__", "tests.test_sagas:RETRIES"),
        *("tests.test_sagas:journal.write", "tests.test_sagas:sys.exit", "\x1b[2J:x", "resilient.cli:main"),
    ],
)
def test_a_journal_cannot_choose_what_is_called(spy: Spy, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evil_module_of_tests", EVIL)
    before = set(sys.modules)
    made(spy)
    forged(spy, name, b'["true"]')
    report = recover(spy)
    assert report.left["block/o-1"].startswith("LookupError")
    with pytest.raises(LookupError):
        sagas.compensate(spy, "o-1")
    assert vars(EVIL)["struck"] == []
    # Nothing is imported because a journal says so, and nothing of the saga has changed.
    assert {one for one in set(sys.modules) - before if one.startswith(("tests", "evil"))} == set()
    assert sagas.show(spy, "o-1").record.attempt == 1
    assert "Begin" not in spy.ops


def test_a_module_that_is_vouched_for_may_be_named(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evil_module_of_tests", EVIL)
    monkeypatch.setattr(journal, "_vouched", set(journal._vouched))
    forged(spy, "evil_module_of_tests:strike", b'["ok"]')
    with pytest.raises(ImportError):
        sagas.vouch("no_such_module_of_tests")
    assert recover(spy, modules=["evil_module_of_tests"]).compensated == ["block/o-1"]
    assert vars(EVIL)["struck"] == [("ok",)]
    vars(EVIL)["struck"].clear()


def test_what_a_module_does_that_is_run_is_found_by_the_name_that_others_import(
    spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m shop`: its functions are of `__main__` there, and of `shop` elsewhere."""
    shop = types.ModuleType("__main__")
    exec("def strike(name): struck.append(name)\nstruck = []", vars(shop))
    shop.__spec__ = types.SimpleNamespace(name="shop_of_tests")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", shop)
    monkeypatch.setattr(journal, "_vouched", {"shop_of_tests"})
    strike = vars(shop)["strike"]
    assert journal.module_of(strike) == "shop_of_tests"
    assert journal.found("shop_of_tests:strike") is strike
    assert journal.name_of(strike, "the step") == "shop_of_tests:strike"
    shop.__spec__ = None
    assert journal.module_of(strike) == "__main__"
    # Imported under its own name as well, it is there twice.
    twin = types.ModuleType("shop_of_tests")
    exec("def strike(name): ...", vars(twin))
    monkeypatch.setitem(sys.modules, "shop_of_tests", twin)
    monkeypatch.setattr(journal, "_recorded", {})
    shop.__spec__ = types.SimpleNamespace(name="shop_of_tests")  # type: ignore[assignment]
    assert journal.name_of(strike, "the step") == "shop_of_tests:strike"
    monkeypatch.setattr(journal, "_recorded", {})
    assert journal.name_of(vars(twin)["strike"], "the step") == "shop_of_tests:strike"


class Tools:
    """Static methods are found by name."""

    @staticmethod
    def mend(name: str) -> None:
        log.append(f"mend {name}")


def test_a_static_method_may_undo(spy: Spy) -> None:
    with pytest.raises(SagaAborted), Saga("block", id="o-1", store=spy) as saga:
        saga.step(step, "a", compensate=call(Tools.mend, "a"))
        boom()
    assert log == ["a", "mend a"]
    assert journal._look("tests.test_sagas:Tools.mend") is Tools.mend


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        (b"[]", {}),
        (b"[1]", {}),
        (b'["a", "b", "c"]', {}),
        (b"{}", {}),
        (b'["a"]', {"results": [7]}),
        (b'["a"]', {"results": ["nobody"]}),
        (b'["a"]', {"kwargs": msgspec.Raw(b'{"nobody": 1}')}),
        (b'["a"]', {"kwargs": msgspec.Raw(b"[1]")}),
    ],
)
def test_arguments_that_do_not_fit_are_a_clear_error(spy: Spy, args: bytes, fields: Any) -> None:
    if fields.get("results") == [7]:
        with pytest.raises(StoreError):
            journal.call_form(undo, "undo").read(msgspec.Raw(b"[]"), msgspec.Raw(b"{}"))
    forged(spy, "tests.test_durable:undo", args, **fields)
    made(spy)
    report = recover(spy)
    if fields.get("results") == [7]:
        assert report.compensated == ["block/o-1"]
    else:
        assert "do not fit tests.test_durable:undo" in report.left["block/o-1"]
        assert log == []


HEAD = {"v": 1, "saga": "block", "version": 1, "id": "o-1"}
STEP = {"number": 1, "name": "x:y", "key": "k"}
odd = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=40),
        odd.map(lambda one: json.dumps(one).encode()),
        st.dictionaries(
            st.sampled_from(["head", "done", "steps", "failed", "pivot", "undone", "stuck", "again", "at"]), odd
        ).map(lambda one: json.dumps({"head": HEAD, "steps": [STEP]} | one).encode()),
        st.dictionaries(st.sampled_from([*HEAD, "input"]), odd).map(
            lambda one: json.dumps({"head": HEAD | one}).encode()
        ),
        st.dictionaries(st.sampled_from([*STEP, "undo", "group", "late", "forward"]), odd).map(
            lambda one: json.dumps({"head": HEAD, "steps": [STEP | one]}).encode()
        ),
        st.integers(0, 60).map(lambda cut: json.dumps({"head": HEAD, "steps": [STEP]}).encode()[:cut]),
    ),
    second=st.booleans(),
)
def test_a_hostile_journal_is_read_or_is_an_error_of_ours(data: bytes, second: bool) -> None:
    spy = Spy()
    key = stored_key("block", "o-1")
    first = json.dumps({"head": HEAD, "steps": [STEP]}).encode() if second else data
    reply: Any = spy.store.execute(Begin(key, "x", 1.0, first, label_of("block", "o-1", 1, "running")))
    if second:
        spy.store.execute(Append(key, "x", reply.fence, 1, data, 1.0))
    orphaned(spy)
    log.clear()
    report = recover(spy)
    assert len(report.compensated) + len(report.stuck) + len(report.left) <= 1
    for look in (sagas.describe, sagas.mermaid, sagas.timeline):
        try:
            look(sagas.show(spy, "o-1"))
        except StoreError:
            pass
    assert log == []


@pytest.mark.parametrize(
    "head",
    [
        HEAD | {"v": 2},
        HEAD | {"saga": "another"},
        HEAD | {"id": "another"},
    ],
)
def test_the_journal_of_something_else_is_refused(spy: Spy, head: Any) -> None:
    data = json.dumps({"head": head, "steps": [STEP]}).encode()
    key = stored_key("block", "o-1")
    spy.store.execute(Begin(key, "x", 0.001, data, label_of("block", "o-1", 1, "running")))
    orphaned(spy)
    assert "does not begin as" in recover(spy).left["block/o-1"]


# -- what can be recorded --------------------------------------------------------------------------------------------


def takes_socket(connection: types.ModuleType) -> None: ...


def undo_socket(connection: types.ModuleType) -> None: ...


def test_what_cannot_be_recorded_is_an_error_before_it_runs(spy: Spy) -> None:
    def inner(name: str) -> str:
        raise AssertionError("it ran")

    class Odd:
        def __call__(self, name: str) -> None: ...

    cases: list[tuple[Any, Any, str]] = [
        (inner, None, "cannot be recorded: only functions at the top"),
        (step, inner, "cannot be recorded: only functions at the top"),
        (step, Odd(), "cannot be recorded"),
        (step, undo_socket, "which cannot be recorded: use a dataclass"),
        (step, call(undo, object()), r"the argument name \(object\) cannot be recorded"),
        (step, call(undo), "missing a required argument"),
        (step, call(undo, "a", nobody=3), "unexpected keyword"),
        (step, call(undo, "a", "b", "c"), "too many positional"),
        (step, call(dict, a=1), "only functions can, and it is a class"),
        (step, call(min, 1), "does not show its parameters"),
    ]
    for number, (function, compensate, text) in enumerate(cases):
        with pytest.raises(SagaAborted) as caught, Saga("block", id=f"o-{number}", store=spy) as saga:
            saga.step(function, "a", compensate=compensate)
        assert isinstance(caught.value.__cause__, TypeError)
        with pytest.raises(TypeError, match=text):
            raise caught.value.__cause__
    assert log == []
    assert spy.store.execute(Scan()).records == ()


def later(value: Unknown) -> Unknown:  # type: ignore[name-defined]  # noqa: F821
    return value


def test_annotations_that_cannot_be_resolved_are_taken_as_anything(spy: Spy) -> None:
    with pytest.raises(SagaAborted), Saga("block", id="o-1", store=spy) as saga:
        saga.step(later, 3, compensate=call(later, RESULT))
        boom()


def odd_result() -> types.ModuleType:
    raise AssertionError("it ran")


def test_a_result_that_cannot_be_kept_is_an_error_before_the_step_runs(spy: Spy) -> None:
    with pytest.raises(SagaAborted) as caught, Saga("block", id="o-1", store=spy) as saga:
        saga.step(odd_result, compensate=None)
    assert "tests.test_sagas:odd_result: it returns" in str(caught.value.__cause__)


# -- blocks on a store -----------------------------------------------------------------------------------------------


class Odd:
    """What JSON cannot write."""


def unwritable(name: str) -> Any:
    return Odd()


async def aunwritable(name: str) -> Any:
    return Odd()


def test_a_result_that_cannot_be_kept_names_its_step(spy: Spy) -> None:
    note = "resilient: step tests.test_sagas:{} ran, and its result is not kept"

    def cause(aborted: pytest.ExceptionInfo[SagaAborted]) -> BaseException:
        error = aborted.value.__cause__
        assert error is not None
        return error

    with pytest.raises(SagaAborted) as one, Saga("block", store=spy) as saga:
        saga.step(unwritable, "a", compensate=undo)
    assert cause(one).__notes__ == [note.format("unwritable")]
    with pytest.raises(SagaAborted) as one, Saga("block", store=spy) as saga:
        saga.parallel(branch(unwritable, "b", compensate=undo), branch(step, "c", compensate=undo))
    assert cause(one).__notes__ == [note.format("unwritable")]

    async def main() -> None:
        async with Saga("block", store=spy) as saga:
            await saga.step(aunwritable, "d", compensate=undo)

    with pytest.raises(SagaAborted) as one:
        asyncio.run(main())
    assert cause(one).__notes__ == [note.format("aunwritable")]


def test_an_id_is_for_one_block(spy: Spy) -> None:
    with Saga("block", id="o-1", store=spy) as saga:
        saga.step(step, "a", compensate=undo)
    with pytest.raises(SagaError, match="ended already"), Saga("block", id="o-1", store=spy) as saga:
        saga.step(step, "b", compensate=undo)
    block(spy, "o-2")
    what = "recover it; if it is stuck, resume, compensate or abandon it"
    with pytest.raises(SagaError, match=what), Saga("block", id="o-2", store=spy) as saga:
        saga.step(step, "b", compensate=undo)
    with Saga("block", id="o-3", store=spy) as saga:
        saga.step(step, "c", compensate=undo)
        with pytest.raises(InFlight), Saga("block", id="o-3", store=spy) as other:
            other.step(step, "b", compensate=undo)
        with pytest.raises(InFlight, match=r"block: a saga with this id is running \(key 'o-3'\)") as flying:
            sagas.abandon(spy, "o-3", "no")
        assert str(copy.copy(flying.value)) == str(flying.value)
    with pytest.raises(SagaError, match="ended already") as empty, Saga("block", id="o-1", store=spy):
        pass
    # There is nothing to recover.
    assert not hasattr(empty.value, "__notes__")
    assert log == ["c"]


def test_a_block_without_a_step_is_kept_as_well(spy: Spy) -> None:
    with Saga("block", id="o-1", store=spy):
        pass
    assert sagas.show(spy, "o-1").record.state == "done"
    with pytest.raises(SagaAborted), Saga("block", id="o-2", store=spy):
        boom()
    assert sagas.list_sagas(spy, state="aborted") == []


def test_a_block_that_is_not_to_be_undone_is_for_a_person(spy: Spy) -> None:
    with pytest.raises(ValueError, match="boom"), Saga("block", id="o-1", store=spy, compensate_on=OSError) as saga:
        saga.step(step, "a", compensate=undo)
        boom()
    assert recover(spy) == sagas.Report()
    assert [str(one) for one in sagas.list_sagas(spy, state="stuck")] == ["block/o-1"]
    with pytest.raises(ValueError, match="boom"), Saga("block", id="o-2", store=spy, compensate_on=OSError):
        boom()
    assert len(sagas.list_sagas(spy)) == 1
    assert log == ["a"]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_a_block_that_fails_past_its_pivot_is_for_a_person(spy: Spy, error: BaseException) -> None:
    with pytest.raises((SagaStuck, KeyboardInterrupt)), Saga("block", id="o-1", store=spy) as saga:
        saga.step(step, "a", compensate=undo)
        saga.pivot()
        raise error
    assert [str(one) for one in sagas.list_sagas(spy, state="stuck")] == ["block/o-1"]
    assert log == ["a"]


def test_a_stuck_block_may_be_told_to_continue_and_an_interrupt_stays_one(spy: Spy) -> None:
    for on_stuck, error in (("continue", ValueError("boom")), ("raise", KeyboardInterrupt())):
        options: Any = {"on_stuck": on_stuck, "retries": RETRIES}
        with pytest.raises((SagaAborted, KeyboardInterrupt)) as caught, Saga("block", store=spy, **options) as saga:
            saga.step(step, "a", compensate=broken)
            raise error
        assert any("broken" in note for note in caught.value.__notes__)
    assert len(sagas.list_sagas(spy, state="stuck")) == 2


# -- how it looks ----------------------------------------------------------------------------------------------------


def idle() -> None: ...


def grouped(saga: Any, order: str) -> str:
    saga.step(step, "a", compensate=undo)
    saga.parallel(branch(step, "b", compensate=call(undo, "b")), branch(step, "c", compensate=None))
    saga.pivot()
    saga.parallel((step, "d"), (step, "e"), idle)
    saga.step(step, *order, name="f")
    return order


def test_a_saga_is_data(spy: Spy) -> None:
    place = made(spy, grouped)
    died(spy, place, "d")
    said = sagas.describe(sagas.show(spy, "o-1"))
    assert said["pivot"] == 4
    assert [(one["step"], one["compensation"], one["group"], one["state"]) for one in said["steps"][:3]] == [
        ("tests.test_durable:step", "tests.test_durable:undo", None, "done"),
        ("tests.test_durable:step", "tests.test_durable:undo", 2, "done"),
        ("tests.test_durable:step", None, 2, "done"),
    ]
    assert (said["durable"], said["state"], said["end"], said["failed"]) == (True, "orphaned", None, None)
    json.dumps(said)


def test_a_body_is_data_as_far_as_its_source_shows(spy: Spy) -> None:
    said = sagas.describe(made(spy, grouped))
    assert [(one["step"], one["compensation"], one["group"], one["after_pivot"]) for one in said["steps"]] == [
        ("step", "undo", None, False),
        ("step", "undo", 2, False),
        ("step", None, 2, False),
        ("step", None, 4, True),
        ("step", None, 4, True),
        ("idle", None, 4, True),
        ("step", None, None, True),
    ]
    assert said["pivot"] == 4
    scope: dict[str, Any] = {"__name__": "tests.hidden"}
    exec("def hidden(saga): saga.step(print)", scope)
    assert sagas.describe(made(spy, scope["hidden"]))["steps"] == []


def undone_story(spy: Spy) -> sagas.Story:
    hooks["c"] = boom
    with pytest.raises(SagaAborted):
        made(spy)("o", id="o-1")
    return sagas.show(spy, "o-1")


def test_a_diagram_shows_what_was_undone(spy: Spy) -> None:
    text = sagas.mermaid(undone_story(spy))
    assert text.startswith("flowchart TD\n")
    assert '    failed{{"ValueError: boom"}}:::failed' in text
    assert "    u2 -.-> s2" in text
    assert "    u2 --> u1" in text
    assert 'end_(["aborted: ValueError: boom"])' in text


def test_a_diagram_shows_the_pivot_and_groups(spy: Spy) -> None:
    place = made(spy, grouped)
    died(spy, place, "d")
    text = sagas.mermaid(sagas.show(spy, "o-1"))
    assert '    pivot{{"pivot"}}' in text
    assert "    s2 --> pivot\n    s3 --> pivot" in text
    assert 'end_(["orphaned"])' in text


def test_a_timeline_tells_what_happened_when(spy: Spy) -> None:
    lines = sagas.timeline(undone_story(spy)).splitlines()
    assert lines[0].startswith("order o-1  version 1  aborted  since ")
    assert [line.strip().split("   ")[-1] for line in lines[-3:]] == [
        "2. tests.test_durable:undo",
        "1. tests.test_durable:undo",
        "aborted: ValueError: boom",
    ]
    hooks.clear()
    place = made(spy, grouped, in_doubt="stuck")
    died(spy, place, "d", name="o-2")
    with pytest.raises(SagaStuck):
        place("o", id="o-2")
    sagas.resume(spy, "o-2")
    text = sagas.timeline(sagas.show(spy, "o-2"))
    for part in (" stuck   ", " again   somebody said so, after 2 attempts", " pivot   ", "(beside others, group 4)"):
        assert part in text
    block(spy, "o-3")
    assert "   now   orphaned, attempt 1" in sagas.timeline(sagas.show(spy, "o-3"))


def test_a_view_is_nothing_that_a_terminal_or_a_page_obeys(spy: Spy) -> None:
    evil = '"]; click s1 "javascript:alert(1)" \x1b[2J<script>'
    key = stored_key("block", "o-1")
    entry = journal.Entry(
        head=journal.Head(1, "block", 1, "o-1"), steps=[journal.Step(1, evil * 40, evil)], failed=evil, stuck=[evil]
    )
    spy.store.execute(Begin(key, "x", 0.001, journal.write(entry), label_of("block", "o-1", 1, "running")))
    orphaned(spy)
    story = sagas.show(spy, "o-1")
    assert "\x1b" not in sagas.timeline(story)
    diagram = sagas.mermaid(story)
    assert not any(
        sign in diagram.replace(":::", "") for sign in ("\x1b", '"]; click', "<script", 'javascript:alert(1)"')
    )
    assert all(line.count('"') in (0, 2) for line in diagram.splitlines())


def test_instants_that_are_none_are_said(spy: Spy) -> None:
    from resilient._saga_views import _after, _instant

    assert _instant(1e30) == "the instant 1e+30"
    assert [_after(one) for one in (-1.0, 0.0, 3.0, 300.0, 9000.0, 1e6)] == [
        *("+0.0 s", "+0 ms", "+3.0 s", "+5.0 min", "+2.5 h", "+11.6 d"),
    ]


def test_entries_are_what_was_written(spy: Spy) -> None:
    made(spy)("o", id="o-1")
    assert list(sagas.show(spy, "o-1").entries) == entries(spy, "order", "o-1")
