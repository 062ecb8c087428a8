"""The closing report: both runs side by side, from the client's numbers and from the services' ledgers.

`notes` says in words what the table shows, what guards cost included. `as_data` is the same as plain data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resilient.demo.numbers import Result
from resilient.demo.schedule import SERVICES, Schedule
from resilient.demo.services import LOOPBACK

__all__ = ["announce", "as_data", "draw", "kept", "notes", "rows", "strip"]

STRIP = 60


def kept(before: Result, after: Result) -> bool:
    """Whether the guards did what they are for: nobody charged twice, and more orders done than without them.

    Or all of them, where both did all.
    """
    return not after.books.charged_twice and _helped(before, after)


def _helped(before: Result, after: Result) -> bool:
    return after.done > before.done or after.done == before.done == len(after.outcomes)


def rows(result: Result) -> list[tuple[str, str]]:
    """One run's column of the table, with the headings. An empty value makes a heading of its own."""
    orders = len(result.outcomes)
    books = result.books
    return [
        ("the client says", ""),
        ("orders done", f"{result.done} of {orders} ({_share(result.done, orders)})"),
        ("orders failed", str(orders - result.done)),
        ("p50, of orders done", _seconds(result.latency(0.5))),
        ("p99, of orders done", _seconds(result.latency(0.99))),
        ("calls sent", f"{result.sent} ({result.sent / orders:.2f} an order)"),
        ("wall time", f"{result.wall:.1f} s"),
        ("customers not told", str(result.untold)),
        ("messages in the outbox", str(result.outbox)),
        ("client killed", _times(result.kills)),
        ("payments replayed", str(result.tallies["payment"].replayed)),
        ("doubts settled by asking", str(result.settled)),
        ("the services' ledgers say", ""),
        ("requests received", str(sum(books.received.values()))),
        ("orders charged", str(len(books.charged))),
        ("charged twice", str(books.charged_twice)),
        ("charged, never shipped", str(books.charged_not_shipped)),
        ("done, client says failed", str(books.unnoticed(result.outcomes))),
    ]


def notes(before: Result, after: Result) -> Iterator[str]:
    """What the numbers mean, sentence by sentence."""
    gained = after.done - before.done
    if gained > 0:
        yield f"The guards completed {_orders(gained)} more ({_percent(gained, before.done)})."
    elif _helped(before, after):
        yield "Both runs completed every order: the guards had nothing to save."
    else:
        yield f"The guards did not keep their promise: {_orders(after.done)} done, {before.done} without them."
    extra = after.sent - before.sent
    yield (
        f"They sent {abs(extra)} calls {'more' if extra >= 0 else 'fewer'} ({_percent(extra, before.sent)}). Some "
        "are retries and hedges; others are the later steps of orders that would have failed before."
    )
    medians = (before.latency(0.5), after.latency(0.5))
    if medians[0] is not None and medians[1] is not None and medians[1] > medians[0]:
        yield (
            f"Half of their orders took more than {medians[1]:.2f} s, against {medians[0]:.2f} s without: they wait "
            "for sick services to come back, and others queue behind them. Without guards only the lucky ones count."
        )
    yield from _money(before, after)
    if after.books.charged_not_shipped:
        yield (
            f"{_were(after.books.charged_not_shipped)} charged with guards and never shipped. Somebody must refund "
            "them: no guard does."
        )
    for result in (before, after):
        if result.reasons:
            most = ", ".join(f"{reason} ({times})" for reason, times in result.reasons.most_common(6))
            yield f"Why orders failed {result.title}: {most}."


def _money(before: Result, after: Result) -> Iterator[str]:
    """Who was charged how often, from the payment service's own ledger, and how that came about."""
    twice, paid = after.books.charged_twice, after.tallies["payment"]
    ledger = f"The payment service's ledger has {_charges(after)} for {_orders(len(after.books.charged))}"
    ordeal = f"though its client was killed {_times(after.kills)}"
    if after.crashes:
        ordeal += f" and it crashed {_times(after.crashes)} itself and forgot its idempotency keys"
    if twice:
        yield f"{ledger}: {_were(twice)} charged twice with guards. That must not be."
    else:
        yield f"{ledger}: none was charged twice with guards, {ordeal}."
    if paid.replayed or after.settled:
        yield (
            f"The store of results answered {_payments(paid.replayed)} in place of the service. Doubts settled by "
            f"asking: {after.settled}. For {paid.found} of them the ledger had the charge, and it was not sent again. "
            "A retry that does not ask trusts the service's memory of keys."
        )
    if before.books.charged_twice:
        yield (
            f"{_were(before.books.charged_twice)} charged twice without guards: a client that is started after a kill "
            "places again what it does not know to be done."
        )


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
    for note in notes(before, after):
        console.print(f"- {note}", markup=False)
    console.print(
        f"- Without guards means: one attempt for each call, with a time limit of {schedule.patience:g} s, and no "
        "idempotency key. Latency counts from the instant at which an order arrived.",
        markup=False,
    )


def _by_service(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("service", no_wrap=True)
    columns = ("sent", "retries", "refused", "timeouts", "hedges", "opened", "fallbacks", "gave_up")
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
    return {
        "orders": len(result.outcomes),
        "done": result.done,
        "failed": Counter(result.reasons),
        "p50": result.latency(0.5),
        "p99": result.latency(0.99),
        "sent": result.sent,
        "received": result.books.received,
        "wall": result.wall,
        "untold": result.untold,
        "outbox": result.outbox,
        "client_killed": result.kills,
        "payment_crashed": result.crashes,
        "replayed": result.tallies["payment"].replayed,
        "settled": result.settled,
        "charges": sum(result.books.charged.values()),
        "charged": len(result.books.charged),
        "charged_twice": result.books.charged_twice,
        "charged_not_shipped": result.books.charged_not_shipped,
        "unnoticed": result.books.unnoticed(result.outcomes),
        "services": {service: asdict(tally) for service, tally in result.tallies.items()},
    }


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _percent(change: int, base: int) -> str:
    return f"{100 * change / base:+.0f} %" if base else "from none"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _charges(result: Result) -> str:
    count = sum(result.books.charged.values())
    return "1 charge" if count == 1 else f"{count} charges"


def _payments(count: int) -> str:
    return "1 payment" if count == 1 else f"{count} payments"


def _orders(count: int) -> str:
    return "1 order" if count == 1 else f"{count} orders"


def _were(count: int) -> str:
    return f"{_orders(count)} {'was' if count == 1 else 'were'}"
