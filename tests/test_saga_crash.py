"""Random sagas whose process is stopped dead before any of its operations, and recovered: what the ledgers say then."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilient import DurableSaga, Retry, Saga, SagaAborted, SagaStuck, durable, sagas, stores
from resilient._book import stored_key
from resilient._journal import read
from resilient.stores._ops import History
from resilient.testing import FakeClock
from tests._proofs import Dead, Fatal
from tests._saga_shop import Boom, Ledger, aplay, ledgers, play

LEASE = 0.6
ATTEMPTS = 4
ENDS = ("done", "aborted", "stuck")
_numbers = itertools.count()

undos = st.sampled_from(["plain", "call", "call", "flaky", "broken", None])
hows = st.sampled_from(["good", "good", "good", "late", "bad"])
branches = st.lists(st.tuples(st.sampled_from(["good", "good", "bad"]), undos).map(list), min_size=1, max_size=3)
steps = st.tuples(st.just("step"), hows, undos).map(list)
leaves = st.one_of(steps, steps, st.tuples(st.just("parallel"), branches).map(list), st.just(["pivot"]))
nested = st.tuples(st.just("nested"), st.lists(leaves, max_size=2)).map(list)
parts = st.lists(st.one_of(leaves, leaves, leaves, nested, st.just(["cancel"])), min_size=1, max_size=4)
pivoted = st.tuples(st.lists(steps, min_size=1, max_size=2), parts).map(lambda two: [*two[0], ["pivot"], *two[1]])
programs = st.one_of(parts, parts, pivoted)
"""What `tests._saga_shop` plays."""


class World:
    """One saga on a store whose clock is ours, run by one process after the other."""

    def __init__(self, kind: str, program: list[Any], twice: bool) -> None:
        self.kind, self.program = kind, program
        self.clock = FakeClock()
        self.store = stores.MemoryStore(self.clock)
        self.fatal = Fatal(self.store, 0)
        self.id = f"s-{next(_numbers)}"
        self.ledger = ledgers[self.id] = Ledger(self.fatal.step, twice)

    def first(self, at: int) -> None:
        """The process that begins, and dies before its step number `at`."""
        self._armed(at)
        self._spared(self._begin)

    def next(self, at: int) -> None:
        """Another process, which recovers, and dies before its step number `at`."""
        self.clock.advance(LEASE * 2)
        self._armed(at)
        self._spared(self._recover)

    def settle(self) -> None:
        """Recover until there is nothing left to do."""
        record: Any = None
        for _ in range(ATTEMPTS + 3):
            self.next(1_000_000)
            record = self.record()
            if record is None or record.state in ENDS:
                return
        raise AssertionError(f"it never came to an end: {record}")

    def _armed(self, at: int) -> None:
        self.fatal.at, self.fatal.steps = at, 0
        self.fatal.done.clear()

    def _spared(self, does: Any) -> None:
        self.died = False
        try:
            does()
        except Dead:
            self.died = True
        except (Boom, KeyboardInterrupt, asyncio.CancelledError, SagaAborted, SagaStuck):
            pass

    def _begin(self) -> None:
        if self.kind == "block":
            with Saga("crash", id=self.id, store=self.fatal, lease=LEASE, retries=RETRIES) as saga:
                play(saga, self.id, self.program)
        elif self.kind == "durable":
            body(self.fatal)(self.id, self.program, id=self.id)
        else:
            asyncio.run(body(self.fatal, True)(self.id, self.program, id=self.id))

    def _recover(self) -> None:
        if self.kind == "async durable":
            body(self.fatal, True)
            asyncio.run(sagas.arecover(self.fatal, retries=RETRIES, lease=LEASE))
        else:
            body(self.fatal)
            sagas.recover(self.fatal, retries=RETRIES, lease=LEASE)

    def record(self) -> Any:
        try:
            return sagas.show(self.store, self.id, name="crash").record
        except LookupError:
            return None

    # -- what must be ------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        ledger, record = self.ledger, self.record()
        got = self.store.execute(History(stored_key("crash", self.id)))
        if got is None:
            assert ledger.events == [], "something was done of which the journal says nothing"
            return
        begun = {step.number: step for entry in map(read, got[1]) for step in entry.steps}
        acted, undone = ledger.of("act"), ledger.of("unact")
        tried = [number for event, number in ledger.events if event in ("unact", "tried")]
        # Nothing runs, and nothing is undone, that was not announced.
        assert set(acted) <= set(begun)
        assert set(tried) <= {number for number, step in begun.items() if step.undo is not None}
        # Never forward again after the first compensation.
        if tried:
            first = min(place for place, (event, _) in enumerate(ledger.events) if event in ("unact", "tried"))
            assert "act" not in [event for event, _ in ledger.events[first:]]
        # The last first.
        assert undone == sorted(undone, reverse=True)
        # Each process runs a step with the same key.
        assert all(len(keys) == 1 for keys in ledger.keys.values())
        if any(step.forward for step in begun.values()):
            assert tried == [], "something was undone after the pivot"
        if record.state == "done":
            assert tried == []
            assert set(acted) == set(begun), "a step is missing"
            assert ledger.there == set(begun)
        elif record.state == "aborted":
            owed = {number for number, step in begun.items() if step.undo is not None and not step.late}
            assert owed <= set(undone), "something was not undone"
            assert not ledger.there & {
                number for number, step in begun.items() if step.undo is not None and number in undone
            }
            late = {number for number, step in begun.items() if step.undo is not None and step.late}
            known = {number for entry in map(read, got[1]) for number in entry.done}
            assert late & known <= set(undone)
        else:
            assert record.state == "stuck", record
            assert [one.id for one in sagas.list_sagas(self.store, state="stuck")] == [self.id]
            assert sagas.describe(sagas.show(self.store, self.id))["stuck"], "it does not say why"


RETRIES = Retry(Boom, attempts=2, wait=0, name="compensation")


def _body(saga: Any, run: str, program: list[Any]) -> str:
    play(saga, run, program)
    return run


async def _abody(saga: Any, run: str, program: list[Any]) -> str:
    await aplay(saga, run, program)
    return run


OPTIONS: dict[str, Any] = {"lease": LEASE, "retries": RETRIES, "attempts": ATTEMPTS}
_made: dict[bool, Any] = {}


def body(store: Any, is_async: bool = False) -> Any:
    """The body, as a process knows it whose store is `store`."""
    made = _made.get(is_async)
    if made is None:
        durable._bodies.pop("crash", None)
        made = _made[is_async] = DurableSaga("crash", store=store, **OPTIONS)(_abody if is_async else _body)
    durable._bodies["crash"] = made
    made.durable.store = store
    return made


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    durable._bodies.pop("crash", None)
    ledgers.clear()


def crashed(kind: str, program: list[Any], more: list[int], twice: bool) -> int:
    """Each operation of the first process in turn; `more` are those of the recoverers. How often the first one died."""
    for at in itertools.count():
        world = World(kind, program, twice)
        world.first(at)
        died = world.died
        for later in more:
            world.next(later)
        world.settle()
        world.judge()
        del ledgers[world.id]
        if not died:
            return at
    raise AssertionError


@pytest.mark.parametrize("kind", ["block", "durable", "async durable"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=programs, more=st.lists(st.integers(0, 25), max_size=3), twice=st.booleans())
def test_dead_before_every_operation_every_saga_is_complete_or_undone_or_reported(
    kind: str, program: list[Any], more: list[int], twice: bool
) -> None:
    crashed(kind, program, more, twice)
