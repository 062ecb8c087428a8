"""The closing report: both runs side by side, from the client's numbers and from the services' ledgers.

What it says in words is in `notes`. `as_data` is the same as plain data.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resilient.demo.notes import euros, kept, notes, proof, times
from resilient.demo.numbers import Result
from resilient.demo.schedule import SERVICES, Schedule
from resilient.demo.services import LOOPBACK

__all__ = ["announce", "as_data", "draw", "rows", "strip"]

STRIP = 60


def rows(result: Result) -> list[tuple[str, str]]:
    """One run's column of the table, with the headings. An empty value makes a heading of its own."""
    orders = len(result.outcomes)
    audit = result.audit
    return [
        ("the client says", ""),
        ("orders done", f"{result.done} of {orders} ({_share(result.done, orders)})"),
        ("orders failed, or undone", str(orders - result.done)),
        ("p50, of orders done", _seconds(result.latency(0.5))),
        ("p99, of orders done", _seconds(result.latency(0.99))),
        ("calls sent", f"{result.sent} ({result.sent / orders:.2f} an order)"),
        ("wall time", f"{result.wall:.1f} s"),
        ("customers not told", str(result.untold)),
        ("messages in the outbox", str(result.outbox)),
        ("client killed", times(result.kills)),
        ("orders left in the middle", str(result.left)),
        ("payments replayed", str(result.tallies["payment"].replayed)),
        ("doubts settled by asking", str(result.settled)),
        ("the services' ledgers say", ""),
        ("requests received", str(sum(audit.books.received.values()))),
        ("orders complete", str(audit.complete)),
        ("orders without a trace", str(audit.undone)),
        ("orders half done", str(len(audit.half))),
        ("charged twice", str(audit.charged_twice)),
        ("shipped twice", str(audit.shipped_twice)),
        ("told twice", str(audit.told_twice)),
        ("products that do not add up", str(len(audit.off))),
        ("charged and not refunded", euros(audit.charged - audit.refunded)),
        ("price of what was shipped", euros(audit.owed)),
        ("the client says otherwise", str(len(audit.wrong))),
        ("sagas stuck", str(len(audit.stuck))),
    ]


def announce(console: Console, schedule: Schedule, orders: int) -> None:
    """Say what is about to happen: the seed, and the trouble that it makes, as a strip of time for each service."""
    text = f"resilient demo: {orders} orders over {schedule.seconds:g} s, seed {schedule.seed}, on {LOOPBACK} only"
    console.print(text, soft_wrap=True)
    for service in SERVICES:
        console.print(f"  {service:<12}  {strip(schedule, service)}", markup=False, soft_wrap=True)
    console.print(f"  {'client':<12}  {_kills(schedule)}", soft_wrap=True)
    console.print(f"  {'':<12}  E errors  S slow  H hang  R refuse  X crash  K kill -9", soft_wrap=True)


def strip(schedule: Schedule, service: str) -> str:
    """The run of one service as `STRIP` letters, one for what happens in the middle of each part of it."""
    letters = {"errors": "E", "slow": "S", "hang": "H", "refuse": "R", "crash": "X"}
    middles = ((place + 0.5) * schedule.seconds / STRIP for place in range(STRIP))
    episodes = (schedule.of(service, middle) for middle in middles)
    return "".join(letters[episode.kind] if episode else "." for episode in episodes)


def _kills(schedule: Schedule) -> str:
    """The run of the client as letters, one of them for each time that it is killed."""
    places = {int(moment / schedule.seconds * STRIP) for moment in schedule.kills}
    return "".join("K" if place in places else "." for place in range(STRIP))


def draw(console: Console, schedule: Schedule, before: Result, after: Result) -> None:
    """Print the whole report."""
    console.print()
    console.print(Text(f"The same {len(after.outcomes)} orders, the same trouble (seed {schedule.seed})", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column(before.title, justify="right")
    table.add_column(after.title, justify="right", style="bold")
    for (heading, left), (_, right) in zip(rows(before), rows(after), strict=True):
        table.add_row(Text(heading if not left else f"  {heading}", style="" if left else "italic"), left, right)
    console.print(table)
    console.print(Text("What the guards did", style="bold"))
    console.print()
    console.print(_by_service(after))
    console.print()
    console.print(Text("What the ledgers prove", style="bold"))
    console.print()
    for result in (after, before):
        console.print(" ".join(proof(result)), markup=False)
        console.print()
    for note in notes(before, after):
        console.print(f"- {note}", markup=False)
    console.print(
        f"- Without guards means: one attempt for each call, with a time limit of {schedule.patience:g} s, no "
        "idempotency key, and nobody who undoes anything. Latency counts from the instant at which an order arrived.",
        markup=False,
    )


def _by_service(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("service", no_wrap=True)
    columns = ("sent", "retries", "refused", "timeouts", "hedges", "opened", "fallbacks", "undone")
    for heading in columns:
        table.add_column(heading.replace("_", " "), justify="right")
    for service in SERVICES:
        tally = result.tallies[service]
        table.add_row(service, *(str(getattr(tally, column)) for column in columns))
    return table


def as_data(schedule: Schedule, before: Result, after: Result) -> dict[str, Any]:
    """Everything that the report says, for `json`."""
    return {
        "seed": schedule.seed,
        "seconds": schedule.seconds,
        "episodes": [asdict(episode) for episode in schedule.episodes],
        "kills": list(schedule.kills),
        "without_guards": _result(before),
        "with_guards": _result(after),
        "promise_kept": kept(before, after),
    }


def _result(result: Result) -> dict[str, Any]:
    audit = result.audit
    return {
        "orders": len(result.outcomes),
        "done": result.done,
        "failed": result.reasons,
        "p50": result.latency(0.5),
        "p99": result.latency(0.99),
        "sent": result.sent,
        "wall": result.wall,
        "untold": result.untold,
        "outbox": result.outbox,
        "client_killed": result.kills,
        "payment_crashed": result.crashes,
        "left": result.left,
        "recovered": result.recovered,
        "replayed": result.tallies["payment"].replayed,
        "settled": result.settled,
        "received": audit.books.received,
        "complete": audit.complete,
        "undone": audit.undone,
        "half_done": audit.half,
        "charged_twice": audit.charged_twice,
        "shipped_twice": audit.shipped_twice,
        "told_twice": audit.told_twice,
        "products_off": audit.off,
        "units": dict(zip(("opening", "stock", "reserved", "shipped"), audit.units, strict=True)),
        "charged": str(audit.charged),
        "refunded": str(audit.refunded),
        "owed": str(audit.owed),
        "wrong": audit.wrong,
        "stuck": dict(audit.stuck),
        "faults": audit.faults,
        "services": {service: asdict(tally) for service, tally in result.tallies.items()},
    }


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
