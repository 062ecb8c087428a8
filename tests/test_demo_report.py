"""The demo's numbers: what is counted, what the ledgers prove, what the report says and the view shows."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from resilient.demo import report
from resilient.demo import run as run_module
from resilient.demo.audit import Audit, Books, books
from resilient.demo.journal import Journal, Tail
from resilient.demo.notes import kept, notes, proof
from resilient.demo.numbers import Outcome, Progress, Result, Tally, quantile
from resilient.demo.orders import BUNDLED, FIELDS, Order
from resilient.demo.run import main
from resilient.demo.schedule import SERVICES, Episode, Schedule
from resilient.demo.supervisor import ServiceFailed
from resilient.demo.view import Board, Lines, Scene, view_for
from resilient.events import (
    BreakerChanged,
    CallEnded,
    Compensated,
    FellBack,
    GaveUp,
    Hedged,
    Refused,
    Replayed,
    Retrying,
    TimedOut,
)

HEAD = ",".join(FIELDS)
ROW = "R-1,Ada,a@example.org,1 Oak Row,8000,Ghent,BE,BOK-1,A novel,2,14.99"


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_events_are_counted_by_service(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", lambda: 10.0)
    error = ValueError()
    for event in (
        Retrying("payment", 1, 0.1, error),
        Refused("payment", error),
        TimedOut("payment", 1.0),
        Hedged("payment", 2, 0.1),
        FellBack("payment", error),
        GaveUp("payment", 3, 1.0, error),
        BreakerChanged("payment", "closed", "open", "5 failures in a row"),
        BreakerChanged("payment", "open", "half-open", "its time is up"),
        Replayed("payment", "R-1", 1),
        CallEnded("payment", 1.0, None),
        Compensated("order", "R-1", "shop.saga:charge", None),
        Compensated("order", "R-1", "shop.saga:charge", error),  # for a person
        Retrying("compensation", 1, 0.1, error),
    ):
        journal(event)
    journal.close()
    progress = Progress("with guards", 3, lambda: 10.0, began=8.0)
    for entry in Tail(tmp_path / "journal"):
        progress.take(entry)
    assert progress.tallies["payment"] == Tally(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    assert progress.tallies["shipping"] == Tally()
    assert progress.news[0] == (2.0, "payment breaker closed -> open: 5 failures in a row")
    assert progress.breakers == {"payment": "half-open"}
    progress.outcomes += [Outcome("a", 1.0), Outcome("b", 1.0, "payment", "HTTP 500")]
    assert progress.done == 1


@pytest.mark.parametrize(
    ("values", "q", "value"),
    [([], 0.5, None), ([3.0], 0.99, 3.0), ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0), (list(range(1, 201)), 0.99, 198)],
)
def test_a_quantile_is_one_of_the_values(values: list[float], q: float, value: float | None) -> None:
    assert quantile(values, q) == value


# -- the audit -------------------------------------------------------------------------------------------------------


def order(number: str, sku: str = "A", quantity: int = 1, price: str = "10.00") -> Order:
    return Order(number, "Ada", "a@example.org", "1 Oak Row", "BE", sku, "A novel", quantity, Decimal(price))


ORDERS = [order("a"), order("b", quantity=2), order("c", "B", price="0.30")]


def booked(**changed: Any) -> Books:
    """The books of a good day: a and b are complete, c was charged and all of it undone."""
    fine: dict[str, Any] = {
        "received": dict.fromkeys(SERVICES, 2),
        "opening": {"A": 5, "B": 1},
        "stock": {"A": 2, "B": 1},
        "held": {"a": ("A", 1), "b": ("A", 2)},
        "charged": {"a": [Decimal(10)], "b": [Decimal(20)], "c": [Decimal("0.30")]},
        "refunded": {"c": [Decimal("0.30")]},
        "packed": [],
        "shipped": {"a": [("A", 1)], "b": [("A", 2)]},
        "told": {"a": 1},
    }
    return Books(**(fine | changed))


def test_the_books_are_read_from_what_services_show() -> None:
    read = books(
        {
            "inventory": {
                "received": {"a": 2, "b": 1},
                "opening": {"A": 5},
                "stock": {"A": 4},
                "held": {"a": ["A", 1]},
            },
            "payment": {"received": {}, "charged": {"a": ["10.00", "0.10"]}, "refunded": {}},
            "shipping": {"received": {"a": 1}, "packed": ["a"], "shipped": {"b": [["A", 2], ["A", 2]]}},
            "notification": {"received": {}, "told": {"a": 1}},
        }
    )
    assert read == Books(
        received={"inventory": 3, "payment": 0, "shipping": 1, "notification": 0},
        opening={"A": 5},
        stock={"A": 4},
        held={"a": ("A", 1)},
        charged={"a": [Decimal("10.00"), Decimal("0.10")]},
        refunded={},
        packed=["a"],
        shipped={"b": [("A", 2), ("A", 2)]},
        told={"a": 1},
    )


def test_an_audit_of_a_good_day_finds_nothing() -> None:
    audit = Audit(ORDERS, booked(), {"a": True, "b": True, "c": False})
    assert audit.states == {"a": "reserved, charged, shipped", "b": "reserved, charged, shipped", "c": ""}
    assert (audit.complete, audit.undone, audit.half, audit.faults) == (2, 1, {}, [])
    assert audit.units == (6, 3, 0, 3)
    assert (audit.charged, audit.refunded, audit.owed) == (Decimal("30.30"), Decimal("0.30"), Decimal(30))


@pytest.mark.parametrize(
    ("changed", "state", "faults"),
    [
        # What was taken and not given back.
        (
            {"refunded": {}},
            "charged",
            ["half done: 1", "half done and not reported: 1", "EUR too much kept: 0.30"],
        ),
        # Reserved for ever.
        (
            {"held": {"a": ("A", 1), "b": ("A", 2), "c": ("B", 1)}, "stock": {"A": 2, "B": 0}},
            "reserved",
            ["half done: 1", "half done and not reported: 1"],
        ),
        # Goods that nobody has.
        ({"stock": {"A": 2, "B": 0}}, "", ["products that do not add up: 1"]),
        ({"stock": {"A": 1, "B": 2}}, "", ["products that do not add up: 2"]),
        # A parcel that waits for ever.
        ({"packed": ["c"]}, "packed", ["half done: 1", "half done and not reported: 1"]),
        # Twice, and given back once.
        (
            {"charged": {"a": [Decimal(10)], "b": [Decimal(20)], "c": [Decimal("0.30")] * 2}},
            "charged",
            ["half done: 1", "half done and not reported: 1", "EUR too much kept: 0.30", "charged twice: 1"],
        ),
        # Twice, and given back: the money is right.
        (
            {
                "charged": {"a": [Decimal(10)], "b": [Decimal(20)], "c": [Decimal("0.30")] * 2},
                "refunded": {"c": [Decimal("0.30")] * 2},
            },
            "",
            ["charged twice: 1"],
        ),
        # Given back more than was taken.
        (
            {"refunded": {"c": [Decimal("0.30")] * 2}},
            "charged -1 times",
            ["half done: 1", "half done and not reported: 1", "EUR too much kept: -0.30"],
        ),
        ({"told": {"a": 2}}, "", ["told twice: 1"]),
        # Shipped, and the reservation given back, so that it is sold to somebody else as well.
        (
            {
                "shipped": {"a": [("A", 1)], "b": [("A", 2)], "c": [("B", 1)] * 3},
                "charged": {"a": [Decimal(10)], "b": [Decimal(20)], "c": [Decimal("0.30")] * 3},
                "refunded": {"c": [Decimal("0.30")]},
            },
            "charged twice, shipped 3 times",
            [
                "half done: 1",
                "half done and not reported: 1",
                "products that do not add up: 1",
                "EUR too much kept: 0.30",
                "charged twice: 1",
                "shipped twice: 1",
            ],
        ),
    ],
)
def test_an_audit_finds_what_is_wrong(changed: dict[str, Any], state: str, faults: list[str]) -> None:
    audit = Audit(ORDERS, booked(**changed), {"a": True, "b": True, "c": False})
    assert audit.states["c"] == state
    assert audit.faults == faults


def test_an_audit_compares_what_the_client_says_and_what_is_reported_as_stuck() -> None:
    charged = booked(refunded={})
    audit = Audit(ORDERS, charged, {"a": True, "b": False, "c": False}, {"c": "stuck"})
    assert audit.wrong == ["b"]
    assert audit.unreported == []
    assert audit.faults == [
        "half done: 1",
        "EUR too much kept: 0.30",
        "of which the client says otherwise: 1",
        "sagas stuck: 1",
    ]
    assert Audit(ORDERS, charged, {"c": True}).wrong == ["c"]
    twice = booked(shipped={"a": [("A", 1)], "b": [("A", 2)] * 2})
    assert Audit(ORDERS, twice).half == {"b": "reserved, charged, shipped twice"}


# -- the report ------------------------------------------------------------------------------------------------------


def made(title: str, *outcomes: Outcome, sent: int = 4, said: bool = True, **changed: Any) -> Result:
    tallies = {service: Tally() for service in SERVICES}
    tallies["payment"].sent = sent
    stuck = changed.pop("stuck", {})
    word = {outcome.order: outcome.failed_at is None for outcome in outcomes} if said else {}
    return Result(title, outcomes, tallies, Audit(ORDERS, booked(**changed), word, stuck), 1.5, 1, kills=2, crashes=1)


BEFORE = made(
    "without guards",
    Outcome("a", 0.5),
    Outcome("b", 0.2, "payment", "HTTP 500"),
    Outcome("c", 0.3, "shipping", "ReadTimeout"),
    held={"a": ("A", 1), "b": ("A", 2), "c": ("B", 1)},
    stock={"A": 2, "B": 0},
    charged={"a": [Decimal(10)] * 2, "c": [Decimal("0.30")]},
    refunded={},
    shipped={"a": [("A", 1)] * 2},
)
AFTER = made(
    "with guards",
    Outcome("a", 1.0),
    Outcome("b", 3.0),
    Outcome("c", 0.3, "shipping", "no such address"),
    sent=6,
)
TWICE = made(
    "with guards",
    *AFTER.outcomes,
    sent=6,
    charged={"a": [Decimal(10)] * 2, "b": [Decimal(20)], "c": [Decimal("0.30")]},
)
STUCK = made("with guards", *AFTER.outcomes, refunded={}, stuck={"c": "stuck"})


def test_the_report_has_a_row_for_each_number() -> None:
    assert dict(report.rows(BEFORE)) == {
        "the client says": "",
        "orders done": "1 of 3 (33.3 %)",
        "orders failed, or undone": "2",
        "p50, of orders done": "0.50 s",
        "p99, of orders done": "0.50 s",
        "calls sent": "4 (1.33 an order)",
        "wall time": "1.5 s",
        "customers not told": "0",
        "messages in the outbox": "1",
        "client killed": "twice",
        "orders left in the middle": "0",
        "payments replayed": "0",
        "doubts settled by asking": "0",
        "the services' ledgers say": "",
        "requests received": "8",
        "orders complete": "0",
        "orders without a trace": "0",
        "orders half done": "3",
        "charged twice": "1",
        "shipped twice": "1",
        "told twice": "0",
        "products that do not add up": "1",
        "charged and not refunded": "20.30 EUR",
        "price of what was shipped": "10.00 EUR",
        "the client says otherwise": "1",
        "sagas stuck": "0",
    }
    assert dict(report.rows(made("x", Outcome("a", 1.0, "payment", "HTTP 500"))))["p50, of orders done"] == "-"
    assert dict(report.rows(made("x", Outcome("a", 1.0, told=False))))["customers not told"] == "1"


def test_the_proof_is_of_the_ledgers() -> None:
    assert list(proof(AFTER)) == [
        "Run with guards: 2 orders are complete: reserved, charged and shipped.",
        "Of 1 order there is no trace left.",
        "None is half done.",
        "Of 6 units, 3 are in stock, 0 reserved and 3 shipped: each of 2 products adds up.",
        "30.30 EUR charged, less 0.30 EUR refunded, is 30.00 EUR: the price of what was shipped, to the cent.",
        "Nobody was charged twice, nothing was shipped twice, no message was sent twice.",
        "All this though the client was killed twice, and payment crashed once and forgot its idempotency keys.",
    ]
    assert list(proof(replace(AFTER, crashes=0, kills=3)))[-1] == "All this though the client was killed 3 times."


def test_the_proof_says_what_is_wrong() -> None:
    assert list(proof(BEFORE)) == [
        "Run without guards: 0 orders are complete: reserved, charged and shipped.",
        "Of 0 orders there is no trace left.",
        "3 orders are half done: reserved, charged twice, shipped twice (1); reserved (1); reserved, charged (1).",
        "Of 6 units, 2 are in stock, 3 reserved and 2 shipped: that does not add up for 1 of 2 products.",
        "20.30 EUR charged, less 0.00 EUR refunded, is 20.30 EUR, and what was shipped is worth 10.00 EUR.",
        "Twice: 1 order charged, 1 order shipped.",
        "Of 1 order the client says otherwise.",
    ]
    assert list(proof(STUCK))[-1] == "1 saga not at the end: c (stuck)."


def test_the_notes_are_honest() -> None:
    said = list(notes(BEFORE, AFTER))
    assert said == [
        "The guards completed 2 orders more (from none).",
        "They sent 2 calls more (+50 %). Some are retries and hedges; others are the later steps of orders that would "
        "have failed before.",
        "Half of their orders took more than 1.00 s, against 0.50 s without: they wait for sick services to come back, "
        "and others queue behind them. Without guards only the lucky ones count.",
        "Why orders failed without guards: payment: HTTP 500 (1), shipping: ReadTimeout (1).",
        "Why orders were undone with guards: shipping: no such address (1).",
    ]
    worse = list(notes(AFTER, BEFORE))
    assert worse[0].startswith(
        "The guards did not keep their promise: half done: 3; half done and not "
        "reported: 3; products that do not add up: 1; EUR too much kept: 10.30; charged twice: 1;"
    )
    assert worse[1] == "The guards completed 2 orders fewer. That must not be."
    assert worse[2].startswith("They sent 2 calls fewer (-33 %).")
    assert list(notes(AFTER, AFTER))[:2] == [
        "Both runs completed 2 orders.",
        "They sent 0 calls more (+0 %). Some are retries and hedges; others are the later steps of orders that would "
        "have failed before.",
    ]
    none = made("without guards", Outcome("a", 1.0, "payment", "HTTP 500"), sent=0, said=False)
    assert list(notes(none, none))[1].startswith("They sent 0 calls more (from none).")


def test_the_notes_say_how_payments_and_sagas_were_gone_on_with() -> None:
    settled = replace(made("with guards", Outcome("a", 1.0)), left=1, recovered=Counter(aborted=1))
    payment = settled.tallies["payment"]
    payment.replayed, payment.found, payment.absent = 1, 2, 5
    assert list(notes(settled, settled))[2:] == [
        "When it was killed, the client left 1 order in the middle. Recovery brought 0 of them forward to their end, "
        "and undid 1.",
        "The store of results answered 1 payment in place of the service.",
        "Doubts about payments settled by asking: 7. For 2 of them the ledger had the charge, and it was not sent "
        "again. A retry that does not ask trusts the service's memory of keys.",
    ]


def test_orders_that_were_left_twice_are_explained() -> None:
    twice = replace(AFTER, left=9, recovered=Counter(done=5, aborted=1))
    assert list(notes(AFTER, twice))[2] == (
        "When it was killed, the client left 9 orders in the middle. Recovery brought 5 of them forward to their end, "
        "and undid 1; the next kill found the others in the middle again."
    )


def test_the_promise_is_no_fault_in_the_ledgers_and_no_fewer_orders() -> None:
    fewer = made(
        "",
        Outcome("a", 1.0),
        Outcome("b", 1.0, "payment", "HTTP 500"),
        held={"a": ("A", 1)},
        charged={"a": [Decimal(10)]},
        refunded={},
        shipped={"a": [("A", 1)]},
        stock={"A": 4, "B": 1},
    )
    assert fewer.audit.faults == []
    assert [kept(*pair) for pair in ((BEFORE, AFTER), (AFTER, AFTER), (fewer, AFTER), (AFTER, fewer))] == [
        *(True, True, True, False)
    ]
    assert not kept(BEFORE, TWICE)
    assert not kept(BEFORE, STUCK)


def test_the_report_fits_eighty_columns_and_is_plain_data_too() -> None:
    console = Console(file=io.StringIO(), width=80)
    schedule = Schedule(3, 24.0)
    report.announce(console, schedule, 600)
    report.draw(console, schedule, BEFORE, AFTER)
    text = text_of(console)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "seed 3, on 127.0.0.1 only" in text
    assert "notification" in text
    assert "…" not in text
    assert "2 of 3 (66.7 %)" in text
    assert "None is half done." in text.replace("\n", " ")
    data = json.loads(json.dumps(report.as_data(schedule, BEFORE, AFTER)))
    assert (data["seed"], data["promise_kept"], len(data["kills"])) == (3, True, 3)
    assert len(data["episodes"]) in (17, 18)
    with_guards = data["with_guards"]
    assert (with_guards["complete"], with_guards["undone"], with_guards["half_done"]) == (2, 1, {})
    assert (with_guards["charged"], with_guards["refunded"], with_guards["owed"]) == ("30.30", "0.30", "30.00")
    assert with_guards["units"] == {"opening": 6, "stock": 3, "reserved": 0, "shipped": 3}
    assert (with_guards["client_killed"], with_guards["payment_crashed"]) == (2, 1)
    assert (with_guards["stuck"], with_guards["faults"]) == ({}, [])
    assert data["without_guards"]["failed"] == {"payment: HTTP 500": 1, "shipping: ReadTimeout": 1}
    assert data["without_guards"]["half_done"]["c"] == "reserved, charged"


def test_the_strip_of_time_shows_each_trouble() -> None:
    schedule = Schedule(1, 60.0)
    schedule.episodes = (Episode("payment", "hang", 2.0, 4.0, 1.0), Episode("payment", "crash", 58.0, 60.0, 1.0))
    assert report.strip(schedule, "payment") == "..HH" + "." * 54 + "XX"
    assert report.strip(schedule, "shipping") == "." * 60
    schedule.kills = (0.5, 30.0)
    console = Console(file=io.StringIO(), width=80)
    report.announce(console, schedule, 1)
    assert "  client        K" + "." * 29 + "K" + "." * 29 + "\n" in text_of(console)


# -- the view --------------------------------------------------------------------------------------------------------


def scene(now: list[float]) -> Scene:
    progress = Progress("with guards", 4, lambda: now[0])
    return Scene(progress, lambda service: "hang" if service == "payment" else "", lambda service: "open")


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_lines_where_nobody_looks_at_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    now = [1.0]
    shown = scene(now)
    view = view_for(console, plain=False)
    assert isinstance(view, Lines)
    view.begin(shown)
    shown.progress.tell("payment [x] is gone")
    view.tick()
    now[0] = 2.5
    shown.progress.outcomes.append(Outcome("a", 1.0))
    shown.progress.tallies["payment"].retries = 3
    view.tick()
    view.tick()
    view.end()
    assert text_of(console).splitlines() == [
        "-- with guards: 4 orders",
        "   1.0 s  payment [x] is gone",
        "   2.5 s  1/4 orders: 1 done, 0 failed, 0 in flight; 0 calls, 3 retries, 0 refused",
        "   2.5 s  1/4 orders: 1 done, 0 failed, 0 in flight; 0 calls, 3 retries, 0 refused",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_board_on_a_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    view = view_for(console, plain=False)
    assert isinstance(view, Board)
    shown = scene([1.0])
    shown.progress.tallies["payment"].sent = 17
    view.begin(shown)
    for number in range(9):
        shown.progress.tell(f"news {number} " + "x" * 100)
    shown.progress.outcomes.append(Outcome("a", 1.0, "payment", "HTTP 500"))
    view.tick()
    view.end()
    still = Console(file=io.StringIO(), width=width)
    still.print(view.draw())
    text = text_of(still)
    assert all(len(line) <= width for line in text.splitlines())
    assert "1/4 orders" in text
    assert "hang" in text
    assert "17" in text
    assert "news 8" in text
    assert "news 2" not in text
    if width >= 80:
        assert "timeouts" in text
    assert "\x1b[?25h" in text_of(console), "the cursor is back"


def test_plain_is_plain_on_a_terminal_too() -> None:
    assert isinstance(view_for(Console(force_terminal=True), plain=True), Lines)


# -- what the command runs -------------------------------------------------------------------------------------------


def ran(monkeypatch: pytest.MonkeyPatch, result: object, **changed: Any) -> tuple[int, str]:
    """The exit code and output of the demo's `main`, where `compare` gives, or raises, `result`."""

    async def fake(orders: object, schedule: Schedule, view: object) -> object:
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(run_module, "compare", fake)
    console = Console(file=io.StringIO(), width=80)
    settings: dict[str, Any] = {
        "quick": True,
        "seed": 3,
        "plain": True,
        "path": BUNDLED,
        "json_path": None,
        "out": console,
    }
    return main(**(settings | changed)), text_of(console)


def test_the_exit_code_says_whether_the_promise_was_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, text = ran(monkeypatch, (BEFORE, AFTER), json_path=tmp_path / "numbers.json")
    assert code == 0
    assert text.startswith("resilient demo: 50 orders over 3.2 s, seed 3, on 127.0.0.1 only")
    assert json.loads((tmp_path / "numbers.json").read_text())["promise_kept"] is True
    assert ran(monkeypatch, (BEFORE, TWICE))[0] == 1
    code, text = ran(monkeypatch, (AFTER, BEFORE), quick=False)
    assert code == 1
    assert text.startswith("resilient demo: 400 orders over 24 s, seed 3, on 127.0.0.1 only")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "resilient demo: interrupted; the services are stopped\n"),
        (asyncio.CancelledError(), 130, "resilient demo: interrupted; the services are stopped\n"),
        (ServiceFailed("the payment service did not start"), 2, "resilient demo: the payment service did not start\n"),
    ],
)
def test_what_ends_the_demo_early_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert ran(monkeypatch, error)[0] == code
    assert capsys.readouterr().err == said


def test_bad_files_are_found_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text(f"{HEAD}\n{ROW}\n{ROW.replace('14.99', 'x').replace('R-1', 'R-2')}\n")
    code, text = ran(monkeypatch, AssertionError("unreachable"), path=bad)
    assert (code, text) == (2, "")
    assert f"{bad}, line 3: price must be" in capsys.readouterr().err
    code, text = ran(monkeypatch, AssertionError("unreachable"), json_path=tmp_path / "no" / "such")
    assert (code, text) == (2, "")
    assert "No such file or directory" in capsys.readouterr().err
