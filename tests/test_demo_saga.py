"""The demo's order as a saga: what the services do, and that no plan of trouble leaves an order half done."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import json

from resilient import SagaAborted, StoreError, sagas
from resilient.demo import saga as saga_module
from resilient.demo.audit import Audit, books
from resilient.demo.client import Calls, guards
from resilient.demo.journal import Journal, Tail
from resilient.demo.numbers import Outcome, Progress
from resilient.demo.orders import Order
from resilient.demo.saga import Desk, StepFailed, shop, why
from resilient.demo.schedule import SERVICES
from resilient.demo.services import Ledger
from resilient.demo.trades import TRADES, Inventory, Notification, Payment, Shipping, Trade, opening
from resilient.errors import SagaError
from resilient.stores.memory import MemoryStore
from resilient.testing import FakeClock

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def order(number: str, sku: str = "A", quantity: int = 2) -> Order:
    return Order(number, "Ada", "a@example.org", "1 Oak Row", "BE", sku, "A novel", quantity, Decimal("14.99"))


# -- the trades ------------------------------------------------------------------------------------------------------


class Counter:
    """A trade without a file: its lines are in a list."""

    def __init__(self, kind: type[Trade], *lines: list[Any]) -> None:
        self.lines: list[tuple[Any, ...]] = []
        self.trade = kind(self.note)
        for line in lines:
            self.trade.take(*line)

    def note(self, *line: Any) -> None:
        self.lines.append(line)
        self.trade.take(*line)

    def asks(self, method: str, number: str = "a", key: str | None = None, quantity: int = 2) -> int:
        asked = {"sku": "A", "quantity": quantity, "amount": "29.98"}
        return self.trade.act(method, number, asked, key)[0]


def test_inventory_reserves_once_while_there_is_stock_and_takes_back_once() -> None:
    desk = Counter(Inventory, ["stock", "A", 5])
    assert [desk.asks("PUT", each) for each in ("a", "a", "b", "c")] == [200, 200, 200, 409]
    assert desk.trade.shown() == {"opening": {"A": 5}, "stock": {"A": 1}, "held": {"a": ("A", 2), "b": ("A", 2)}}
    assert [desk.asks("DELETE"), desk.asks("DELETE"), desk.asks("PUT", "c")] == [200] * 3
    assert desk.trade.shown()["stock"] == {"A": 1}
    assert desk.lines == [
        ("reserve", "a", "A", 2),
        ("reserve", "b", "A", 2),
        ("release", "a"),
        ("reserve", "c", "A", 2),
    ]


def test_a_reservation_that_comes_after_its_release_is_refused() -> None:
    desk = Counter(Inventory, ["stock", "A", 5])
    assert [desk.asks("DELETE"), desk.asks("PUT")] == [200, 410]
    assert desk.trade.shown()["stock"] == {"A": 5}


def test_payment_charges_once_for_a_key_and_each_time_without() -> None:
    desk = Counter(Payment, ["decline", "b"])
    assert [desk.asks("GET"), desk.asks("POST", key="k"), desk.asks("POST", key="k"), desk.asks("GET")] == [
        *(404, 200, 200, 200)
    ]
    assert [desk.asks("POST", "b"), desk.asks("POST"), desk.asks("POST", key="other")] == [402, 200, 200]
    assert desk.trade.shown() == {"charged": {"a": ["29.98"] * 3}, "refunded": {}}


def test_payment_gives_back_all_that_it_took_once_and_takes_no_more() -> None:
    desk = Counter(Payment)
    assert [desk.asks("POST"), desk.asks("POST"), desk.asks("DELETE"), desk.asks("DELETE")] == [200] * 4
    assert desk.trade.shown() == {"charged": {"a": ["29.98"] * 2}, "refunded": {"a": ["29.98"] * 2}}
    assert [desk.asks("POST"), desk.asks("POST", key="late"), desk.asks("DELETE", "b"), desk.asks("POST", "b")] == [
        *(410, 410, 200, 410)
    ]
    # A crash in the midst of it: the next request finishes it.
    crashed = Counter(Payment, ["charge", "a", "1.00"], ["charge", "a", "2.00"], ["refund", "a", "1.00"])
    assert crashed.asks("DELETE") == 200
    assert crashed.lines == [("refund", "a", "2.00"), ("close", "a")]


def test_shipping_unpacks_until_it_has_shipped_and_ships_once_for_a_key() -> None:
    desk = Counter(Shipping, ["refuse", "b"])
    assert [desk.asks("POST"), desk.asks("PUT"), desk.asks("PUT"), desk.asks("PUT", "b")] == [409, 200, 200, 422]
    assert desk.trade.shown() == {"packed": ["a"], "shipped": {}}
    assert [desk.asks("POST", key="k"), desk.asks("POST", key="k"), desk.asks("DELETE")] == [200, 200, 409]
    assert desk.trade.shown() == {"packed": [], "shipped": {"a": [("A", 2)]}}
    assert desk.asks("POST") == 200
    assert desk.trade.shown()["shipped"] == {"a": [("A", 2)] * 2}
    assert [desk.asks("PUT", "c"), desk.asks("DELETE", "c"), desk.asks("DELETE", "c")] == [200] * 3
    assert [desk.asks("PUT", "c"), desk.asks("POST", "c")] == [410, 409]
    assert desk.trade.shown()["packed"] == []


def test_a_message_is_sent_once_for_a_key() -> None:
    desk = Counter(Notification)
    assert [desk.asks("POST", key="k"), desk.asks("POST", key="k"), desk.asks("POST", "b"), desk.asks("POST", "b")] == [
        *(200,) * 4
    ]
    assert desk.trade.shown() == {"told": {"a": 1, "b": 2}}


REQUESTS = st.tuples(
    st.sampled_from(["PUT", "POST", "DELETE", "GET"]), st.sampled_from("ab"), st.sampled_from(["k", None])
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(TRADES)), st.lists(REQUESTS, max_size=12))
def test_who_is_started_again_knows_all_that_was_done(name: str, requests: list[tuple[str, str, str | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger"
        path.write_bytes(b'["stock","A",3]\n' if name == "inventory" else b"")
        ledger = Ledger(path, name)
        for method, number, key in requests:
            if method in ledger.trade.methods:
                ledger.receive(number)
                ledger.trade.act(method, number, {"sku": "A", "quantity": 2, "amount": "1.00"}, key)
        again = Ledger(path, name)
        # As it is sent: a tuple is a list there.
        assert json.decode(json.encode(again.trade.shown())) == json.decode(json.encode(ledger.trade.shown()))
        assert again.received == ledger.received
        ledger.close()
        again.close()


def test_the_ledgers_begin_with_stock_and_with_those_who_will_be_refused() -> None:
    orders = [order("a"), order("b"), order("c", "B"), order("d", "B", 1), order("e", "C")]
    lines = opening(orders, {"b": "declined", "c": "short", "e": "refused"})
    assert lines == {
        "inventory": [["stock", "A", 4], ["stock", "B", 1], ["stock", "C", 2]],
        "payment": [["decline", "b"]],
        "shipping": [["refuse", "e"]],
        "notification": [],
    }


# -- a world in one process ------------------------------------------------------------------------------------------


class Mortal:
    """A store as one client sees it: after its death nothing of it arrives any more."""

    def __init__(self, store: MemoryStore, dead: asyncio.Event) -> None:
        self._store, self._dead = store, dead

    async def aexecute(self, op: Any) -> Any:
        if self._dead.is_set():
            raise StoreError("nobody there")
        return await self._store.aexecute(op)


class World:
    """Services that do to each request what the plan says, and clients that are killed in the midst of one.

    `fine` | `refused` (503) | `error` and `done` (500, and in the second case the work was done) | `lost` (done, and
    the connection breaks) | `hang` and `slow` (no answer, undone and done) | `crash` (done, the connection breaks, and
    the service knows only its ledger from there) | `killed` and `kill` (the client is, before and after the work).
    """

    def __init__(self, path: Path, orders: Sequence[Order], plan: Sequence[str] = (), **flaws: str) -> None:
        self.orders, self.plan, self.path = orders, list(plan), path
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.lines = opening(orders, flaws)
        self.trades: dict[str, Trade] = {}
        self.always: dict[tuple[str, str], str] = {}
        self.log: list[tuple[str, str, str]] = []
        self.said: dict[str, Outcome] = {}
        self.places = True
        for name in SERVICES:
            self.start(name)

    def start(self, name: str) -> None:
        def note(*line: Any) -> None:
            self.lines[name].append(list(line))
            self.trades[name].take(*line)

        trade = self.trades[name] = TRADES[name](note)
        for line in self.lines[name]:
            trade.take(*line)

    async def serve(self, request: httpx.Request) -> httpx.Response:
        if self.dead.is_set():
            raise RuntimeError("the dead send nothing")
        name, number = request.url.host, request.url.path.rpartition("/")[2]
        what = self.always.get((name, request.method)) or (self.plan.pop(0) if self.plan else "fine")
        self.log.append((request.method, name, what))
        answer: tuple[int, Any] = 500, "something broke"
        if what in ("fine", "done", "lost", "slow", "crash", "kill"):
            asked = json.decode(request.content or b"{}")
            answer = self.trades[name].act(request.method, number, asked, request.headers.get("idempotency-key"))
        match what:
            case "killed" | "kill":
                self.dead.set()
                await asyncio.Event().wait()
            case "hang" | "slow":
                await self.clock.asleep(3600.0)
            case "lost" | "crash":
                if what == "crash":
                    self.start(name)
                raise httpx.ReadError("", request=request)
            case "refused":
                return httpx.Response(503, headers={"retry-after": "1"})
            case "done":
                return httpx.Response(500)
            case _:
                pass
        status, body = answer
        return httpx.Response(status, json=body) if status == 200 else httpx.Response(status, text=f"{body}\n")

    def live(self) -> bool:
        """A client from its start to its end. Whether it was killed."""
        return asyncio.run(self._live())

    async def _live(self) -> bool:
        self.dead = asyncio.Event()
        work, death = asyncio.create_task(self._work()), asyncio.create_task(self.dead.wait())
        await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, death):
            task.cancel()
        await asyncio.gather(work, death, return_exceptions=True)
        if not self.dead.is_set():
            work.result()
        return self.dead.is_set()

    async def _work(self) -> None:
        journal = Journal(self.path / "journal", self.clock.now)
        store = Mortal(self.store, self.dead)
        try:
            async with httpx.AsyncClient(transport=httpx.MockTransport(self.serve), verify=NO_TLS) as http:
                calls = Calls(http, {name: f"http://{name}" for name in SERVICES}, journal)
                desk = Desk(store, journal, self.clock)
                shop.set(guards(calls, desk.env, 4.8, store, journal.post))
                self.left = await desk.look()
                placing = [self._one(desk, each) for each in self.orders if self.places and each.id not in self.said]
                await asyncio.gather(desk.recover(), *placing)
        finally:
            journal.close()

    async def _one(self, desk: Desk, order: Order) -> None:
        self.said[order.id] = await desk.place(order, 0.0)

    def audit(self) -> Audit:
        shown = {name: {"received": {}, **trade.shown()} for name, trade in self.trades.items()}
        found = sagas.list_sagas(self.store, name=saga_module.NAME)
        stuck = {one.id: one.state for one in found if one.state not in ("done", "aborted")}
        said = {number: outcome.failed_at is None for number, outcome in self.said.items()}
        return Audit(self.orders, books(json.decode(json.encode(shown))), said, stuck)

    def progress(self) -> Progress:
        progress = Progress("with guards", len(self.orders), self.clock.now)
        for entry in Tail(self.path / "journal"):
            progress.take(entry)
        return progress


def asked(world: World) -> list[str]:
    return [f"{method} {name}" for method, name, _ in world.log]


FORWARD = ["PUT inventory", "POST payment", "PUT shipping", "POST shipping", "POST notification"]


def test_an_order_is_five_requests(tmp_path: Path) -> None:
    world = World(tmp_path, [order("a")])
    assert not world.live()
    assert asked(world) == FORWARD
    assert world.said == {"a": Outcome("a", 0.0)}
    assert (world.audit().complete, world.audit().faults) == (1, [])
    assert world.progress().left == 0


@pytest.mark.parametrize(
    ("flaw", "at", "reason", "requests"),
    [
        ("short", "inventory", "out of stock", ["PUT inventory", "DELETE inventory"]),
        (
            "declined",
            "payment",
            "card declined",
            ["PUT inventory", "POST payment", "DELETE payment", "DELETE inventory"],
        ),
        ("refused", "shipping", "no such address", [*FORWARD[:3], *(f"DELETE {name}" for name in SERVICES[2::-1])]),
    ],
)
def test_an_order_that_is_refused_for_good_is_undone_backwards(
    tmp_path: Path, flaw: str, at: str, reason: str, requests: list[str]
) -> None:
    world = World(tmp_path, [order("a")], a=flaw)
    assert not world.live()
    assert asked(world) == requests
    assert world.said == {"a": Outcome("a", 0.0, at, reason)}
    assert (world.audit().undone, world.audit().faults) == (1, [])
    undone = sum(tally.undone for tally in world.progress().tallies.values())
    assert undone == len([one for one in requests if one.startswith("DELETE")])


def test_an_order_whose_client_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    world = World(tmp_path, [order("a")], ["fine", "fine", "kill"])
    assert world.live()
    assert not world.live()
    assert world.left == ["a"]
    # The step that had begun comes again; those before it do not.
    assert asked(world) == [*FORWARD[:3], *FORWARD[2:]]
    assert world.audit().faults == []
    assert (world.progress().left, world.progress().recovered) == (1, {"done": 1})
    # The lease of the dead was waited for.
    assert world.said["a"].latency == pytest.approx(saga_module.LEASE + saga_module.SLACK)


def test_an_order_whose_client_was_killed_while_it_was_undone_is_undone(tmp_path: Path) -> None:
    world = World(tmp_path, [order("a")], ["fine", "fine", "fine", "kill"], a="refused")
    assert world.live()
    assert not world.live()
    assert asked(world)[3:] == ["DELETE shipping", "DELETE shipping", "DELETE payment", "DELETE inventory"]
    assert world.said["a"].failed_at == "shipping"
    assert world.said["a"].reason == "no such address"
    assert world.audit().faults == []
    assert (world.progress().left, world.progress().recovered) == (1, {"aborted": 1})


@pytest.mark.parametrize(("flaw", "requests"), [("", 5), ("short", 2), ("declined", 4), ("refused", 6)])
@pytest.mark.parametrize("end", ["kill", "killed"])
def test_wherever_a_client_is_killed_the_next_one_brings_the_order_to_its_end(
    tmp_path: Path, flaw: str, requests: int, end: str
) -> None:
    for request in range(requests):
        path = tmp_path / str(request)
        path.mkdir()
        world = World(path, [order("a")], [*("fine",) * request, end], **({"a": flaw} if flaw else {}))
        assert world.live()
        assert not world.live()
        assert (world.left, world.audit().faults, world.audit().complete) == (["a"], [], 0 if flaw else 1)
        # The one in the midst of which it was killed comes again, and before a charge does, the gateway is asked.
        assert requests + 1 <= len(world.log) <= requests + 2


@pytest.mark.parametrize(("flaw", "state"), [("", "done"), ("refused", "aborted")])
def test_recovery_needs_nobody_to_ask_for_the_order(tmp_path: Path, flaw: str, state: str) -> None:
    world = World(tmp_path, [order("a")], [*("fine",) * 3, "kill"], **({"a": flaw} if flaw else {}))
    assert world.live()
    world.places = False
    assert not world.live()
    assert world.progress().recovered == {state: 1}
    assert world.audit().faults == []
    assert {one.state for one in sagas.list_sagas(world.store)} == {state}


def test_a_client_that_was_killed_before_it_noted_the_end_learns_it_from_the_journal(tmp_path: Path) -> None:
    world = World(tmp_path, [order("a"), order("b", "B")], b="refused")
    assert not world.live()
    requests = asked(world)
    world.said.clear()
    assert not world.live()
    assert asked(world) == requests
    assert world.said["a"].failed_at is None
    assert (world.said["b"].failed_at, world.said["b"].reason) == ("shipping", "no such address")


def test_what_cannot_be_undone_is_stuck_and_said(tmp_path: Path) -> None:
    world = World(tmp_path, [order("a")], a="declined")
    world.always["inventory", "DELETE"] = "error"
    assert not world.live()
    assert (world.said["a"].failed_at, world.said["a"].reason) == (saga_module.NAME, "stuck")
    audit = world.audit()
    assert (audit.half, audit.stuck, audit.unreported) == ({"a": "reserved"}, {"a": "stuck"}, [])
    assert "DELETE payment" in asked(world)
    assert world.progress().tallies["inventory"].undone == 0
    assert world.progress().tallies["payment"].undone == 1
    # Nobody takes it up but a person.
    requests = len(world.log)
    assert not world.live()
    assert (world.left, len(world.log)) == ([], requests)


def test_what_fails_after_the_pivot_is_gone_on_with(tmp_path: Path) -> None:
    world = World(tmp_path, [order("a")], [*("fine",) * 3, *("hang",) * 120])
    assert not world.live()
    assert world.said["a"].latency > 60.0
    assert world.said["a"].failed_at is None
    assert asked(world).count("PUT inventory") == 1
    assert world.audit().faults == []


def test_a_message_that_cannot_be_sent_goes_to_the_outbox_and_the_order_is_done(tmp_path: Path) -> None:
    world = World(tmp_path, [order("a")])
    world.always["notification", "POST"] = "error"
    assert not world.live()
    assert world.said["a"].failed_at is None
    assert world.progress().outbox == {"a"}
    assert world.audit().faults == []


def test_an_order_is_left_after_many_tries_and_that_is_said(tmp_path: Path) -> None:
    class Gone:
        async def aexecute(self, op: Any) -> Any:
            raise StoreError("the disk is full")

    async def main(clock: FakeClock) -> Outcome:
        journal = Journal(tmp_path / "journal", clock.now)
        try:
            return await Desk(Gone(), journal, clock).place(order("a"), 0.0)
        finally:
            journal.close()

    outcome = asyncio.run(main(FakeClock()))
    assert (outcome.failed_at, outcome.reason) == (saga_module.NAME, "left unfinished")


WHAT = ("fine", "refused", "error", "done", "lost", "hang", "slow", "crash", "killed", "kill")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(WHAT), max_size=9), st.sampled_from(["", "short", "declined", "refused"]))
def test_no_plan_of_trouble_leaves_an_order_half_done(plan: list[str], flaw: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), [order("a"), order("b", "B")], plan, **({"a": flaw} if flaw else {}))
        lives = 1
        while world.live():
            lives += 1
        assert lives <= len(plan) + 1
        assert world.audit().faults == []
        assert world.audit().states == {
            "a": "" if flaw else "reserved, charged, shipped",
            "b": "reserved, charged, shipped",
        }
        assert (world.said["a"].failed_at is None) == (not flaw)


def test_why_a_saga_failed_is_known_from_its_error_and_from_its_journal() -> None:
    error = StepFailed("payment", "card declined")
    fresh, undone = SagaAborted("a step failed", "order", "a"), SagaAborted("a step failed", "order", "a")
    fresh.__cause__ = error
    undone.__cause__ = SagaError(f"a step failed: StepFailed: {error}", "order", "a")
    later = SagaAborted(f"a step failed, and all that was done is undone: StepFailed: {error}", "order", "a")
    assert {why(one) for one in (fresh, undone, later)} == {("payment", "card declined")}
