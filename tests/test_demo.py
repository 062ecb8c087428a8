"""The demo: what it reads, what it deals, its processes, its payments, and all of it from end to end."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient import (
    Bulkhead,
    CallTimeout,
    CircuitBreaker,
    Consecutive,
    Env,
    InDoubt,
    InFlight,
    RateLimited,
    Retry,
    sagas,
    stores,
)
from resilient.clock import SystemClock
from resilient.demo import run as run_module
from resilient.demo import services, supervisor, worker
from resilient.demo.client import Calls, broken, open_http, place
from resilient.demo.journal import Journal, Tail
from resilient.demo.numbers import Outcome, Progress, Tally
from resilient.demo.orders import BUNDLED, FIELDS, Order, OrdersError, parse, read
from resilient.demo.payment import payments, transient, undone
from resilient.demo.run import compare
from resilient.demo.saga import NAME
from resilient.demo.schedule import SERVICES, Episode, Fate, Schedule
from resilient.demo.services import CRASHED, Ledger, Service, bound, serve
from resilient.demo.supervisor import ServiceFailed, Services
from resilient.demo.view import Scene
from resilient.demo.worker import JOB, JOURNAL, Job
from resilient.events import (
    BreakerChanged,
)
from resilient.stores._ops import Abandon, Scan
from resilient.stores.memory import MemoryStore
from resilient.testing import FakeClock
from tests import make_orders

ORDER = Order("R-1", "Ada", "a@example.org", "1 Oak Row, 8000 Ghent", "BE", "BOK-1", "A novel", 2, Decimal("14.99"))
HEAD = ",".join(FIELDS)
ROW = "R-1,Ada,a@example.org,1 Oak Row,8000,Ghent,BE,BOK-1,A novel,2,14.99"


# -- orders ----------------------------------------------------------------------------------------------------------


def test_the_orders_that_come_along_are_many_and_varied() -> None:
    orders = read(BUNDLED)
    assert len(orders) >= 500
    assert len({order.sku for order in orders}) > 50
    assert len({order.address for order in orders}) > 500
    assert len({order.total for order in orders}) > 100
    assert {order.email.partition("@")[2] for order in orders} == {"example.org"}
    assert BUNDLED.read_text(encoding="utf-8") == make_orders.orders()


def test_an_order_is_read_with_exact_prices() -> None:
    assert parse([HEAD, ROW, ""], "f") == [ORDER]
    assert ORDER.total == Decimal("29.98")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (ROW + ",x", "12 fields in place of 11"),
        (ROW.replace("Ada", " "), "customer is empty"),
        (ROW.replace("R-1", "R/1"), "order_id must be of letters, digits and hyphens, not 'R/1'"),
        (ROW.replace(",2,", ",two,"), "quantity must be a whole number above 0, not 'two'"),
        (ROW.replace(",2,", ",0,"), "quantity must be a whole number above 0, not '0'"),
        (ROW.replace("14.99", "-1"), "price must be a number above 0 with at most two decimals, not '-1'"),
        (ROW.replace("14.99", "1.001"), "price must be a number above 0 with at most two decimals, not '1.001'"),
        (ROW.replace("14.99", "NaN"), "price must be a number above 0 with at most two decimals, not 'NaN'"),
        (ROW.replace("14.99", "Infinity"), "price must be a number above 0 with at most two decimals, not 'Infinity'"),
        (ROW.replace("14.99", "free"), "price must be a number above 0 with at most two decimals, not 'free'"),
        (ROW.replace("Ada", '"Ada'), "unexpected end of data"),
        ("R-0" + ROW[3:], "order_id 'R-0' is there twice"),
    ],
)
def test_a_bad_row_is_named_by_its_line(row: str, fault: str) -> None:
    with pytest.raises(OrdersError) as caught:
        parse([HEAD, "R-0" + ROW[3:], row], "orders.csv")
    assert str(caught.value) == f"orders.csv, line 3: {fault}"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", f", line 1: the first line must be {HEAD}"),
        (b"a,b\n", f", line 1: the first line must be {HEAD}"),
        (HEAD.encode(), ": there is no order in it"),
        (b"\xff\xff", ": not UTF-8 (invalid start byte at byte 0)"),
        (None, ": No such file or directory"),
    ],
)
def test_a_file_that_holds_no_orders_says_so(tmp_path: Path, content: bytes | None, fault: str) -> None:
    path = tmp_path / "orders.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OrdersError) as caught:
        read(path)
    assert str(caught.value) == f"{path}{fault}"


def test_a_byte_order_mark_and_foreign_line_ends_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(f"\ufeff{HEAD}\r\n{ROW}\r\n".encode())
    assert read(path) == [ORDER]


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_equal_seeds_make_equal_schedules_and_others_do_not() -> None:
    assert Schedule(7, 24).episodes == Schedule(7, 24).episodes
    assert Schedule(7, 24).episodes != Schedule(8, 24).episodes
    fates = [Schedule(7, 24).fate("payment", 9.0, f"R-{order}", 0) for order in range(50)]
    assert fates == [Schedule(7, 24).fate("payment", 9.0, f"R-{order}", 0) for order in range(50)]
    assert len(set(fates)) > 40


def test_the_schedule_does_not_change_between_processes_and_versions() -> None:
    assert Schedule(1, 24).episodes[0] == Episode("payment", "errors", 2.902, 4.962, 0.605)
    assert Schedule(1, 24).kills == (5.379, 10.303, 15.586)
    fate = Schedule(1, 24).fate("payment", 0.0, "R-2601", 0)
    assert fate == Fate(200, fate.delay)
    assert fate.delay == pytest.approx(0.088383, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_trouble_comes_and_payment_crashes(seed: int) -> None:
    schedule = Schedule(seed, 24.0)
    kinds = Counter((episode.service, episode.kind) for episode in schedule.episodes)
    assert set(kinds.values()) == {1}
    assert all(kinds[service, kind] for service in SERVICES for kind in ("errors", "slow", "hang", "refuse"))
    assert schedule.crash("payment")
    assert sum(schedule.crash(service) is not None for service in SERVICES) <= 2
    for service in SERVICES:
        mine = [episode for episode in schedule.episodes if episode.service == service]
        assert mine[0].start >= 2.4
        assert mine[-1].end <= 22.0
        assert all(earlier.end <= later.start for earlier, later in itertools.pairwise(mine))
        assert schedule.of(service, 0.0) is None
        assert schedule.of(service, mine[0].start) == mine[0]
        assert schedule.of(service, mine[0].end) != mine[0]


@pytest.mark.parametrize("seed", range(20))
def test_the_client_is_killed_in_the_midst_of_its_work(seed: int) -> None:
    for seconds, times in ((3.2, 1), (24.0, 3)):
        kills = Schedule(seed, seconds).kills
        assert len(kills) == times
        assert all(0.2 * seconds < moment < 0.8 * seconds for moment in kills)
        assert all(later - earlier > 2.0 for earlier, later in itertools.pairwise(kills))
    assert kills != Schedule(seed + 1, 24.0).kills


def fates_of(kind: str) -> list[Fate]:
    schedule = Schedule(1, 24.0)
    episode = next(episode for episode in schedule.episodes if episode.kind == kind)
    middle = (episode.start + episode.end) / 2
    return [schedule.fate(episode.service, middle, f"R-{order}", 0) for order in range(200)]


def test_each_kind_of_trouble_shows_in_the_fates() -> None:
    assert sum(fate.status == 500 for fate in fates_of("errors")) > 50
    assert {fate.works for fate in fates_of("errors") if fate.status == 500} == {True, False}
    assert sum(fate.delay > 0.5 for fate in fates_of("slow")) > 50
    assert sum(fate.hangs for fate in fates_of("hang")) > 50
    assert {(fate.status, fate.as_date, fate.works) for fate in fates_of("refuse")} == {
        (status, as_date, False) for status in (429, 503) for as_date in (True, False)
    }
    assert all(fate.retry_after in (1, 2) for fate in fates_of("refuse"))
    quiet = [Schedule(1, 24.0).fate("payment", 0.0, f"R-{order}", 0) for order in range(1000)]
    assert {fate.status for fate in quiet} == {200, 500}
    assert 0 < sum(fate.status == 500 for fate in quiet) < 30
    assert 0 < sum(fate.delay > 0.25 for fate in quiet) < 50


def test_patience_is_five_seconds_and_less_in_short_runs() -> None:
    assert [Schedule(1, seconds).patience for seconds in (0.1, 3.2, 24.0)] == [0.2, 0.8, 5.0]


@pytest.mark.parametrize(("orders", "each"), [(0, 0), (9, 0), (10, 1), (50, 1), (600, 12)])
def test_a_few_orders_of_each_kind_fail_for_good(orders: int, each: int) -> None:
    ids = [f"R-{number}" for number in range(orders)]
    flaws = Schedule(7, 24).flaws(ids)
    assert Counter(flaws.values()) == ({"short": each, "declined": each, "refused": each} if each else {})
    assert flaws == Schedule(7, 3.2).flaws(ids)
    assert set(flaws) <= set(ids)
    assert each == 0 or flaws != Schedule(8, 24).flaws(ids)


# -- the services ----------------------------------------------------------------------------------------------------


class Dealt(Schedule):
    """A schedule that deals the fates it is given."""

    def __init__(self, *fates: Fate) -> None:
        super().__init__(1, 24.0)
        self.fates = list(fates)
        self.asked: list[tuple[str, float, str, int]] = []

    def fate(self, service: str, elapsed: float, order: str, before: int) -> Fate:
        self.asked.append((service, elapsed, order, before))
        return self.fates.pop(0)


FINE = Fate(200, 0.05)
ASKED = {"sku": "BOK-1", "quantity": 2, "amount": "29.98"}


class Desk:
    """A service in this process, asked without a network, by a clock that jumps."""

    def __init__(self, path: Path, name: str, *fates: Fate) -> None:
        self.clock = FakeClock()
        self.schedule = Dealt(*fates)
        self.ledger = Ledger(path, name)
        self.service = Service(name, self.schedule, self.ledger, self.clock)

    def ask(self, *requests: tuple[str, str, dict[str, str]]) -> list[httpx.Response]:
        async def asking() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.service.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
                return [
                    await http.request(method, path, headers=headers, json=ASKED if method in ("PUT", "POST") else None)
                    for method, path, headers in requests
                ]

        try:
            return asyncio.run(asking())
        finally:
            self.ledger.close()


def test_a_service_answers_and_writes_down_what_it_did(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "l", "payment", FINE, Fate(500, 0.1), Fate(500, 0.1, works=False))
    desk.service.began = -3.0
    answers = desk.ask(*[("POST", "/orders/R-1", {})] * 3, ("GET", "/ledger", {}))
    assert [answer.status_code for answer in answers] == [200, 500, 500, 200]
    assert answers[0].json() == {"order": "R-1", "charge": "ch-R-1-1"}
    assert answers[3].json() == {"received": {"R-1": 3}, "charged": {"R-1": ["29.98"] * 2}, "refunded": {}}
    assert desk.clock.slept == [0.05, 0.1, 0.1]
    assert [(order, before) for _, _, order, before in desk.schedule.asked] == [("R-1", 0), ("R-1", 1), ("R-1", 2)]
    assert desk.schedule.asked[0][1] == 3.0


def test_a_refusal_for_good_is_said_in_words(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "l", "inventory", FINE, Fate(500, 0.1))
    short, broke = desk.ask(*[("PUT", "/orders/R-1", {})] * 2)
    assert (short.status_code, short.text, broke.status_code) == (409, "out of stock\n", 500)


def test_what_was_cut_off_before_all_of_it_was_there_is_no_request(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "l", "inventory")
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "PUT", "path": "/orders/R-1", "headers": [], "query_string": b""}
    asyncio.run(desk.service.app(scope, receive, send))
    desk.ledger.close()
    assert sent[0]["status"] == 400
    assert not desk.ledger.received


def test_before_the_run_begins_all_is_calm(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "l", "inventory")
    assert desk.service.elapsed() == -1.0
    desk.ledger.close()


def test_refusals_say_when_to_come_again_in_seconds_and_as_a_date(tmp_path: Path) -> None:
    refusals = (
        Fate(429, 0.0, works=False, retry_after=2),
        Fate(503, 0.0, works=False, retry_after=2, as_date=True),
    )
    desk = Desk(tmp_path / "l", "payment", *refusals)
    seconds, date = desk.ask(*[("POST", "/orders/R-1", {})] * 2)
    assert (seconds.status_code, seconds.headers["retry-after"]) == (429, "2")
    assert date.status_code == 503
    assert parsedate_to_datetime(date.headers["retry-after"]).timestamp() == 1_700_000_003
    assert not desk.ledger.trade.shown()["charged"]


def test_a_hang_may_have_done_the_work(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "l", "payment", Fate(200, 0.05, hangs=True))
    desk.ask(("POST", "/orders/R-1", {}))
    assert desk.clock.slept == [services.HANG]
    assert desk.ledger.trade.shown()["charged"] == {"R-1": ["29.98"]}


def test_payment_forgets_its_keys_in_a_crash_and_nothing_else(tmp_path: Path) -> None:
    key = {"idempotency-key": "charge-R-1"}
    pay = Desk(tmp_path / "payment", "payment", FINE, FINE)
    pay.ask(*[("POST", "/orders/R-1", key)] * 2)
    assert (pay.ledger.received, pay.ledger.trade.shown()["charged"]) == ({"R-1": 2}, {"R-1": ["29.98"]})
    again = Desk(tmp_path / "payment", "payment", FINE)
    again.ask(("POST", "/orders/R-1", key))
    assert (again.ledger.received, again.ledger.trade.shown()["charged"]) == ({"R-1": 3}, {"R-1": ["29.98"] * 2})
    assert again.schedule.asked[0][3] == 2


def test_payment_can_be_asked_what_its_ledger_has(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "l", "payment", FINE, FINE, FINE, Fate(500, 0.1))
    answers = desk.ask(*[(method, "/orders/R-1", {}) for method in ("GET", "POST", "GET", "GET")])
    assert [answer.status_code for answer in answers] == [404, 200, 200, 500]
    assert answers[1].json() == answers[2].json() == {"order": "R-1", "charge": "ch-R-1-1"}
    assert (desk.ledger.received, desk.ledger.trade.shown()["charged"]) == ({"R-1": 4}, {"R-1": ["29.98"]})


class Process:
    """`serve` in a thread, with an input that the test writes and an exit that the test sees."""

    def __init__(self, service: Service, port: int) -> None:
        self.codes: list[int] = []
        self.left, self.ended, self.running = threading.Event(), threading.Event(), threading.Event()
        self.service, self.port = service, port
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def serve(self) -> None:
        serve(self.service, self.port, self.lines(), self.ready, self.leave)

    def lines(self) -> Iterator[str]:
        yield f"begin {self.service.clock.now()!r}\n"
        assert self.ended.wait(60)

    def ready(self, server: uvicorn.Server) -> None:
        self.server = server
        self.running.set()

    def leave(self, code: int) -> None:
        self.codes.append(code)
        self.left.set()


@pytest.mark.parametrize("crash", [None, Episode("payment", "crash", 1.0, 2.0, 1.0)])
def test_a_service_serves_real_http_until_its_input_ends(
    tmp_path: Path, crash: Episode | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "l", "payment")
    schedule = Dealt(Fate(200, 0.0))
    schedule.episodes = () if crash is None else (crash,)
    clock = FakeClock()
    with bound(0) as keeper:
        port = keeper.getsockname()[1]
        process = Process(Service("payment", schedule, ledger, clock), port)
        process.thread.start()
        try:
            assert process.running.wait(60)
            with httpx.Client(trust_env=False) as http:
                assert http.post(f"http://127.0.0.1:{port}/orders/R-1", json=ASKED).status_code == 200
            if crash is not None:
                assert process.left.wait(60)
                assert (process.codes, clock.slept) == ([CRASHED], [1.0])
                process.left.clear()
            process.ended.set()
            assert process.left.wait(60)
            assert process.codes[-1] == 0
        finally:
            process.ended.set()
            process.server.should_exit = True
            process.thread.join(60)
    ledger.close()


def test_a_restarted_service_does_not_crash_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l", "payment")
    schedule = Dealt()
    schedule.episodes = (Episode("payment", "crash", 1.0, 2.0, 1.0),)
    clock = FakeClock(start=100.0)
    process = Process(Service("payment", schedule, ledger, clock), 0)
    process.lines = lambda: iter(["begin 98.0\n"])  # type: ignore[method-assign]
    process.thread.start()
    try:
        assert process.running.wait(60)
        assert process.left.wait(60)
        assert process.codes == [0]
    finally:
        process.server.should_exit = True
        process.thread.join(60)
    ledger.close()


def test_the_child_reads_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(service: Service, port: int, orders: object, ready: Callable[[object], object], leave: object) -> None:
        assert (service.name, port, orders, leave) == ("shipping", 8080, sys.stdin, os._exit)
        assert service.schedule.episodes == Schedule(4, 2.5).episodes
        ready(None)
        service.ledger.close()

    monkeypatch.setattr(services, "serve", fake)
    services.main(["shipping", "8080", "4", "2.5", str(tmp_path / "l")])
    assert capsys.readouterr().out == "ready\n"


def test_a_port_in_use_is_refused_and_the_socket_closed() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="Address already in use"):
            bound(taken.getsockname()[1])


# -- the processes ---------------------------------------------------------------------------------------------------


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("exit 1", "the {} did not start: it said nothing"),
        ("echo no such module >&2; exit 1", "the {} did not start: no such module"),
        ("exec cat", "the {} did not start: it said nothing"),
    ],
)
def test_a_service_that_does_not_start_is_named_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, fault: str
) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", text))
    monkeypatch.setattr(supervisor, "START_WITHIN", 0.05 if "cat" in text else 30.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def start() -> None:
        async with Services(Schedule(1, 1.0)):
            raise AssertionError("unreachable")

    with pytest.raises(ServiceFailed) as caught:
        asyncio.run(start())
    assert str(caught.value) in {fault.format(name) for name in ("client", *(f"{name} service" for name in SERVICES))}
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_nothing_stays_where_there_is_no_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(port: int) -> socket.socket:
        raise OSError("no port is free")

    monkeypatch.setattr(supervisor, "bound", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="no port is free"):
        asyncio.run(Services(Schedule(1, 1.0)).__aenter__())
    assert list(tmp_path.iterdir()) == []


PARENT = """
import asyncio, sys
from resilient.demo.schedule import Schedule
from resilient.demo.supervisor import Services

async def main():
    async with Services(Schedule(1, 9.0)) as services:
        print(*(child.pid for child in services._children.values()), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # Its folder is all that a parent leaves that was killed.
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], env=os.environ | {"TMPDIR": str(tmp_path)}, **pipes
    ) as parent:
        assert parent.stdout is not None
        ends = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    assert len(ends) == 6
    for end in ends:
        assert select.select([end], [], [], 30)[0], "an orphan is left"
        os.close(end)


# -- the client ------------------------------------------------------------------------------------------------------


def read_journal(path: Path) -> Progress:
    """What a journal tells."""
    progress = Progress("x", 1, SystemClock.now)
    for entry in Tail(path):
        progress.take(entry)
    return progress


RECEIPT = {"order": "R-1", "charge": "ch-R-1-1"}


def sold(
    path: Path, handler: Callable[[httpx.Request], httpx.Response]
) -> tuple[Outcome, dict[str, Tally], list[httpx.Request]]:
    """How one order went, bare, with a server that answers by `handler`."""
    journal = Journal(path / "journal", SystemClock.now)
    requests: list[httpx.Request] = []

    def seen(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return handler(request)

    async def main() -> Outcome:
        async with httpx.AsyncClient(transport=httpx.MockTransport(seen)) as http:
            calls = Calls(http, {service: f"http://{service}" for service in SERVICES}, journal)
            return await place(ORDER, calls, FakeClock(start=5.0), due=3.0)

    outcome = asyncio.run(main())
    journal.close()
    return outcome, read_journal(path / "journal").tallies, requests


def test_an_order_asks_all_four_services(tmp_path: Path) -> None:
    outcome, tallies, requests = sold(tmp_path, lambda request: httpx.Response(200, json=RECEIPT))
    assert outcome == Outcome("R-1", 2.0)
    assert [(r.method, r.url.host, r.url.path) for r in requests] == [
        ("PUT", "inventory", "/orders/R-1"),
        ("POST", "payment", "/orders/R-1"),
        ("PUT", "shipping", "/orders/R-1"),
        ("POST", "shipping", "/orders/R-1"),
        ("POST", "notification", "/orders/R-1"),
    ]
    assert not any("idempotency-key" in request.headers for request in requests)
    assert json.loads(requests[0].content) == {"sku": "BOK-1", "quantity": 2}
    assert json.loads(requests[1].content) == {"amount": "29.98", "currency": "EUR"}
    assert [(tally.sent, tally.answered, tally.failed) for tally in tallies.values()] == [
        *((1, 1, 0), (1, 1, 0), (2, 2, 0), (1, 1, 0))
    ]


@pytest.mark.parametrize(
    ("at", "answer", "reason"),
    [
        ("shipping", httpx.Response(500, text="something broke\n"), "HTTP 500"),
        ("shipping", httpx.Response(422, text="no such address\n"), "no such address"),
        ("payment", httpx.Response(402, text="card declined\n"), "card declined"),
        ("inventory", httpx.Response(409, text="out of stock\n"), "out of stock"),
    ],
)
def test_an_order_ends_at_the_first_step_that_fails(
    tmp_path: Path, at: str, answer: httpx.Response, reason: str
) -> None:
    outcome, tallies, requests = sold(
        tmp_path, lambda request: answer if request.url.host == at else httpx.Response(200, json=RECEIPT)
    )
    assert outcome == Outcome("R-1", 2.0, at, reason)
    assert [request.url.host for request in requests] == list(SERVICES[: SERVICES.index(at) + 1])
    assert tallies[at].failed == 1


def test_an_order_whose_customer_was_not_told_is_done(tmp_path: Path) -> None:
    def deaf(request: httpx.Request) -> httpx.Response:
        if request.url.host == "notification":
            raise httpx.ReadTimeout("", request=request)
        return httpx.Response(200, json=RECEIPT)

    outcome, _, _ = sold(tmp_path, deaf)
    assert outcome == Outcome("R-1", 2.0, None, "ReadTimeout", told=False)


def failure(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://x")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))


def test_what_is_tried_again_and_what_breaks_a_circuit() -> None:
    assert [transient(failure(status)) for status in (429, 500, 503, 400, 402)] == [True, True, True, False, False]
    assert [broken(failure(status)) for status in (429, 500, 503, 400)] == [False, True, True, False]
    for error in (httpx.ConnectError(""), CallTimeout("x", 1.0)):
        assert transient(error)
        assert broken(error)
    assert transient(RateLimited("x"))
    assert not broken(RateLimited("x"))
    assert transient(InDoubt("x", "k", 1))
    assert transient(InFlight("x", "k", 1.0))
    assert not transient(KeyError())


def test_what_says_that_nobody_was_charged() -> None:
    assert [undone(failure(status)) for status in (402, 429, 503, 500, 502, 504)] == [True] * 3 + [False] * 3
    assert all(map(undone, (httpx.ConnectError(""), httpx.ConnectTimeout(""), httpx.PoolTimeout(""))))
    assert not any(map(undone, (httpx.ReadTimeout(""), httpx.ReadError(""), httpx.WriteError(""), ValueError())))


def test_proxies_of_the_environment_are_not_asked_and_services_share_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.1:3128")
    http = open_http(5.0, ["http://127.0.0.1:1", "http://127.0.0.1:2"])
    one, two, other = (http._transport_for_url(httpx.URL(f"http://127.0.0.1:{port}/orders")) for port in (1, 2, 3))
    assert len({one, two, other}) == 3
    assert other is http._transport
    assert http.timeout == httpx.Timeout(5.0)
    asyncio.run(http.aclose())


# -- payment ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a client in the midst of a call."""


class Gateway:
    """A payment service that does to each request what its plan says, and then what is asked of it.

    `fine` | `refused` (503) | `error` and `done` (500, and in the second case the work was done) | `lost` (done, and
    the connection breaks) | `hang` and `slow` (no answer, undone and done) | `torn` (done, and the answer is no JSON) |
    `crash` (done, the connection breaks, and the keys are forgotten) | `killed` and `paid` (the client is, before and
    after the work).
    """

    def __init__(self, clock: FakeClock, plan: list[str]) -> None:
        self.clock, self.plan = clock, plan
        self.charges: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.log: list[tuple[str, str]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        what = self.plan.pop(0) if self.plan else "fine"
        self.log.append((request.method, what))
        order = request.url.path.rpartition("/")[2]
        if request.method == "POST" and what in ("fine", "done", "lost", "slow", "torn", "crash", "paid"):
            key = request.headers["idempotency-key"]
            self.charges[order] += key not in self.keys
            self.keys.add(key)
        match what:
            case "refused":
                return httpx.Response(503, headers={"retry-after": "1"})
            case "error" | "done":
                return httpx.Response(500)
            case "hang" | "slow":
                await self.clock.asleep(3600.0)
            case "torn":
                return httpx.Response(200, text="{")
            case "killed" | "paid":
                raise Killed
            case "lost" | "crash":
                self.keys -= self.keys if what == "crash" else set()
                raise httpx.ReadError("", request=request)
            case _:
                pass
        found = bool(self.charges[order])
        return httpx.Response(200 if found else 404, json={"order": order, "charge": f"ch-{order}-1"})


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Till:
    """The guarded payment step over a `Gateway`, by a clock that jumps. `pay` is called by one client after another."""

    def __init__(self, path: Path, *plan: str) -> None:
        self.clock = FakeClock()
        self.gateway = Gateway(self.clock, list(plan))
        self.store = MemoryStore(self.clock)
        self.path = path

    def pay(self, clients: int = 1) -> list[str]:
        """How it ended for each client: the charge, or the name of the error."""
        journal = Journal(self.path / "journal", self.clock.now)
        try:
            return asyncio.run(self._clients(clients, journal))
        finally:
            journal.close()

    async def _clients(self, clients: int, journal: Journal) -> list[str]:
        ends: list[str] = []
        async with httpx.AsyncClient(transport=httpx.MockTransport(self.gateway), verify=NO_TLS) as http:
            calls = Calls(http, {"payment": "http://payment"}, journal)
            for _ in range(clients):
                pay = payments(
                    calls,
                    self.store,
                    Retry(transient, attempts=4, wait=0.1, name="payment"),
                    CircuitBreaker("payment", Consecutive(50), on=broken),
                    Bulkhead(4, name="payment"),
                    0.4,
                    Env(clock=self.clock, sinks=[journal]),
                )
                try:
                    ends.append((await pay("R-1", Decimal("29.98"))).charge)
                except (Exception, Killed) as error:
                    ends.append(type(error).__name__)
        return ends


def test_a_payment_is_one_request_and_the_second_call_is_none(tmp_path: Path) -> None:
    till = Till(tmp_path)
    assert till.pay(2) == ["ch-R-1-1"] * 2
    assert till.gateway.log == [("POST", "fine")]
    (key,) = till.gateway.keys
    assert len(key) == 32
    tally = read_journal(tmp_path / "journal").tallies["payment"]
    assert (tally.sent, tally.replayed, tally.found, tally.absent) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("plan", "log"),
    [
        # The answer is lost, and the service is asked before anything is sent again.
        (["lost", "fine"], ["POST", "GET"]),
        (["torn", "fine"], ["POST", "GET"]),
        (["crash", "error", "fine"], ["POST", "GET", "GET"]),
        (["done", "refused", "fine"], ["POST", "GET", "GET"]),
        # It had done nothing: the attempt has failed, and the next one charges.
        (["error", "fine", "fine"], ["POST", "GET", "POST"]),
        # Nobody answers in time: in doubt, and the next attempt asks first.
        (["slow", "fine"], ["POST", "GET"]),
        (["hang", "fine", "fine"], ["POST", "GET", "POST"]),
        (["crash", "hang", "hang", "fine"], ["POST", "GET", "GET", "GET"]),
        # It was refused at the door: nothing to ask.
        (["refused", "fine"], ["POST", "POST"]),
    ],
)
def test_a_charge_is_sent_again_only_after_the_ledger_had_none(tmp_path: Path, plan: list[str], log: list[str]) -> None:
    till = Till(tmp_path, *plan)
    assert till.pay() == ["ch-R-1-1"]
    assert [method for method, _ in till.gateway.log] == log
    assert till.gateway.charges == {"R-1": 1}
    tally = read_journal(tmp_path / "journal").tallies["payment"]
    assert tally.found + tally.absent == ("GET" in log)
    assert tally.absent == (log[-2:] == ["GET", "POST"])


def test_the_next_client_asks_what_became_of_the_payment_of_one_that_was_killed(tmp_path: Path) -> None:
    till = Till(tmp_path, "paid")
    assert till.pay() == ["Killed"]
    till.gateway.keys.clear()
    assert till.pay() == ["ch-R-1-1"]
    assert till.gateway.log == [("POST", "paid"), ("GET", "fine")]
    assert till.gateway.charges == {"R-1": 1}


def test_a_claim_of_a_dead_client_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    # What a client leaves that is killed by the system: a claim whose lease runs.
    till = Till(tmp_path, "paid")
    till.store.execute = lambda op: True if isinstance(op, Abandon) else MemoryStore.execute(till.store, op)  # type: ignore[method-assign, assignment, return-value]
    assert till.pay() == ["Killed"]
    (record,) = MemoryStore.execute(till.store, Scan()).records
    assert record.state == "running"
    assert till.pay() == ["ch-R-1-1"]
    assert till.clock.now() >= 1.0
    assert till.gateway.log == [("POST", "paid"), ("GET", "fine")]


def test_where_the_ledger_cannot_be_asked_the_payment_stays_in_doubt(tmp_path: Path) -> None:
    till = Till(tmp_path, "slow", *["hang"] * 3)
    assert till.pay() == ["InDoubt"]
    assert [method for method, _ in till.gateway.log] == ["POST", "GET", "GET", "GET"]
    till.gateway.keys.clear()
    assert till.pay() == ["ch-R-1-1"]
    assert till.gateway.charges == {"R-1": 1}


WHAT = ("fine", "refused", "error", "done", "lost", "hang", "slow", "torn", "crash", "killed", "paid")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(WHAT), max_size=12))
def test_no_plan_of_trouble_charges_twice(plan: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        till = Till(Path(folder), *plan)
        ends = till.pay(len(plan) + 1)
        assert till.gateway.charges == {"R-1": 1}
        assert ends[-1] == "ch-R-1-1"


# -- the journal and the client's process ----------------------------------------------------------------------------


def test_a_journal_goes_on_where_another_client_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert list(Tail(path)) == []
    journal = Journal(path, lambda: 9.0)
    tail = Tail(path)
    journal.start(["payment"])
    journal.place("a")
    journal.place("b")
    journal.end(Outcome("a", 1.5, "payment", "HTTP 500"))
    journal.close()
    progress = Progress("x", 3, lambda: 12.0, began=2.0)
    with path.open("ab") as file:
        file.write(b'["over","b"')  # torn
    for entry in tail:
        progress.take(entry)
    assert (progress.placed, progress.breakers) == ({"b"}, {"payment": "closed"})
    assert progress.outcomes == [Outcome("a", 1.5, "payment", "HTTP 500")]
    second = Journal(path, lambda: 10.0)
    assert second.over == {"a"}
    second(BreakerChanged("payment", "closed", "open", "5 failures in a row"))
    second.start(["payment"])
    second.left(0)
    second.left(5)
    second.left(1)
    for state in ("done", "aborted", "done"):
        second.recovered(state)
    second.post("b")
    second.post("b")
    second.end(Outcome("b", 2.0))
    second.close()
    for entry in tail:
        progress.take(entry)
    assert second.over == {"a", "b"}
    assert progress.outcomes[1:] == [Outcome("b", 2.0)]
    assert (progress.in_flight, progress.outbox, progress.breakers) == (0, {"b"}, {"payment": "closed"})
    assert (progress.left, progress.recovered) == (6, {"done": 2, "aborted": 1})
    assert [text for _, text in progress.news] == [
        "payment breaker closed -> open: 5 failures in a row",
        "client finds 5 orders that the one before it left in the middle",
        "client finds 1 order that the one before it left in the middle",
    ]
    assert progress.news[0][0] == 8.0
    with pytest.raises(ValueError, match="no such line"):
        progress.take(["what"])


def job(folder: Path, url: str, guarded: bool, orders: list[Order]) -> Job:
    made = Job(dict.fromkeys(SERVICES, url), 0.0, 5.0, guarded, orders)
    (folder / JOB).write_bytes(msgspec.json.encode(made))
    return made


@pytest.fixture
def shop_front(monkeypatch: pytest.MonkeyPatch) -> list[httpx.Request]:
    """What arrives where every address leads to a service that is always fine."""
    arrived: list[httpx.Request] = []

    def fine(request: httpx.Request) -> httpx.Response:
        arrived.append(request)
        return httpx.Response(200, json={"order": request.url.path[8:], "charge": "ch-1"})

    monkeypatch.setattr(
        worker, "open_http", lambda patience, urls: httpx.AsyncClient(transport=httpx.MockTransport(fine))
    )
    return arrived


@pytest.mark.parametrize("guarded", [False, True])
def test_a_client_places_what_is_not_over_yet(
    tmp_path: Path, shop_front: list[httpx.Request], guarded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = read(BUNDLED)[:3]
    job(tmp_path, "http://shop", guarded, orders)
    earlier = Journal(tmp_path / JOURNAL, SystemClock.now)
    earlier.end(Outcome(orders[1].id, 1.0))
    earlier.close()
    mine, theirs = os.pipe()
    os.write(theirs, f"begin {SystemClock.now()!r}\n".encode())
    left: list[int] = []
    gone = threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        gone.set()

    worker.main(str(tmp_path), mine, leave)
    assert capsys.readouterr().out == "ready\n"
    assert not left
    os.close(theirs)
    assert gone.wait(60)
    assert left == [0]
    os.close(mine)
    assert {request.url.path[8:] for request in shop_front} == {orders[0].id, orders[2].id}
    assert len(shop_front) == 10
    assert sum("idempotency-key" in request.headers for request in shop_front) == (6 if guarded else 0)
    progress = read_journal(tmp_path / JOURNAL)
    assert progress.done == 3
    assert progress.breakers == (dict.fromkeys(SERVICES, "closed") if guarded else {})
    if guarded:
        store = stores.open(worker.books_of(tmp_path))
        found = sagas.list_sagas(store, name=NAME)
        store.close()
        assert {one.id: one.state for one in found} == {orders[0].id: "done", orders[2].id: "done"}


def test_a_client_whose_parent_is_gone_before_the_begin_does_nothing(
    tmp_path: Path, shop_front: list[httpx.Request]
) -> None:
    job(tmp_path, "http://shop", True, read(BUNDLED)[:1])
    mine, theirs = os.pipe()
    os.close(theirs)
    worker.main(str(tmp_path), mine, lambda code: None)
    os.close(mine)
    assert not shop_front


# -- from end to end -------------------------------------------------------------------------------------------------


class Silent:
    """A view that remembers what it was told."""

    every = 0.02

    def __init__(self) -> None:
        self.log: list[str] = []
        self.states: set[tuple[str, str]] = set()

    def begin(self, scene: Scene) -> None:
        self.scene = scene
        self.log.append(scene.progress.title)

    def tick(self) -> None:
        self.states |= {(self.scene.trouble(service), self.scene.breaker(service)) for service in SERVICES}

    def end(self) -> None:
        self.log.append("end")


def free(ports: list[int]) -> bool:
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            probe.listen()
    return True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Services]:
    """All `Services` that the code under test makes."""
    made: list[Services] = []

    class Seen(Services):
        def __init__(self, schedule: Schedule, orders: Sequence[Order], guarded: bool) -> None:
            super().__init__(schedule, orders, guarded)
            made.append(self)

    monkeypatch.setattr(run_module, "Services", Seen)
    return made


def assert_gone(started: list[Services]) -> None:
    for each in started:
        assert all(child.returncode is not None for child in each._children.values())
        assert free([int(url.rpartition(":")[2]) for url in each.urls.values()])
        assert not each._folder.exists()


def test_the_whole_demo_with_a_handful_of_orders(started: list[Services]) -> None:
    orders = read(BUNDLED)[:16]
    view = Silent()
    before, after = asyncio.run(compare(orders, Schedule(1, 1.2), view))
    assert view.log == ["without guards", "end", "with guards", "end"]
    assert [each.downs["payment"] for each in started] == [1, 1]
    assert [each.downs["client"] for each in started] == [1, 1]
    for result in (before, after):
        assert {outcome.order for outcome in result.outcomes} == {order.id for order in orders}
        assert result.sent == sum(tally.sent for tally in result.tallies.values()) > 0
        assert result.audit.books.charged.keys() <= {order.id for order in orders}
        assert result.done <= len(result.audit.books.shipped)
        assert result.wall > 0
    assert before.outbox == sum(tally.retries + tally.hedges + tally.refused for tally in before.tallies.values()) == 0
    assert sum(tally.retries for tally in after.tallies.values()) > 0
    assert (before.kills, after.kills, before.crashes, after.crashes) == (1, 1, 1, 1)
    assert after.audit.faults == []
    assert (after.audit.complete, after.audit.undone) == (13, 3)
    assert after.audit.complete >= before.audit.complete
    assert set(after.reasons) == {"inventory: out of stock", "payment: card declined", "shipping: no such address"}
    assert sum(tally.undone for tally in after.tallies.values()) >= 3
    assert after.outbox <= after.tallies["notification"].fallbacks
    assert after.untold == 0
    assert ("down", "") in view.states
    assert any(state == "closed" for _, state in view.states)
    assert_gone(started)


def test_an_order_that_is_lost_on_the_way_counts_as_failed(tmp_path: Path) -> None:
    async def fine(order: Order, due: float) -> Outcome:
        if order.id == "R-2602":
            raise asyncio.CancelledError
        return Outcome(order.id, 1.0)

    clock = SystemClock()
    journal = Journal(tmp_path / "journal", clock.now)
    asyncio.run(worker.push(read(BUNDLED)[:3], fine, clock, journal, clock.now(), 0.0))
    journal.close()
    outcomes = read_journal(tmp_path / "journal").outcomes
    assert {(outcome.order, outcome.failed_at, outcome.reason) for outcome in outcomes} == {
        ("R-2601", None, None),
        ("R-2602", "client", "lost"),
        ("R-2603", None, None),
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("echo ready; read line; echo what a day >&2; exit 3", "the client ended with 3: what a day"),
        ("echo ready; read line; kill -9 $$", "the client ended with -9: it said nothing"),
    ],
)
def test_a_client_that_comes_to_another_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, fault: str
) -> None:
    python = script(tmp_path / "python", text)
    monkeypatch.setattr(sys, "executable", python)
    schedule = Schedule(1, 1.0)
    schedule.kills, schedule.episodes = (), ()

    async def main() -> None:
        async with Services(schedule) as services:
            services.begin()
            await services.served()

    with pytest.raises(ServiceFailed) as caught:
        asyncio.run(main())
    assert str(caught.value) == fault


def interrupted(sent: signal.Signals, times: int) -> BaseException | None:
    """What comes of a run that gets a signal in the midst of it, `times` times."""

    class Impatient(Silent):
        left = times

        def tick(self) -> None:
            while self.scene.progress.outcomes and self.left:
                self.left -= 1
                os.kill(os.getpid(), sent)

    schedule = Schedule(1, 9.0)
    schedule.kills = ()
    try:
        asyncio.run(compare(read(BUNDLED)[:50], schedule, Impatient()))
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_everything(started: list[Services], times: int) -> None:
    """The second one is not polite: it cancels what the first one has begun to clean up."""
    assert isinstance(interrupted(signal.SIGINT, times), KeyboardInterrupt)
    assert_gone(started)


def test_sigterm_ends_everything(started: list[Services]) -> None:
    assert isinstance(interrupted(signal.SIGTERM, 1), asyncio.CancelledError)
    assert_gone(started)


def test_the_system_clock_is_what_runs_share() -> None:
    # The parent tells its children an instant: it must mean the same to each process of this machine.
    told = subprocess.run(
        [sys.executable, "-c", "from resilient.clock import SystemClock; print(SystemClock.now())"],
        capture_output=True,
        check=True,
    )
    assert abs(float(told.stdout) - SystemClock.now()) < 60.0
