"""What the report says in words: what the ledgers prove, and what the numbers mean. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from resilient.demo.numbers import Result

__all__ = ["euros", "kept", "notes", "proof", "times"]


def kept(before: Result, after: Result) -> bool:
    """Whether the guards did what they are for: no fault in the ledgers, and no fewer orders complete than without."""
    return not after.audit.faults and after.audit.complete >= before.audit.complete


def proof(result: Result) -> Iterator[str]:
    """What the services' own ledgers say of a run, sentence by sentence."""
    audit = result.audit
    half = len(audit.half)
    yield f"Run {result.title}: {_are(audit.complete)} complete: reserved, charged and shipped."
    yield f"Of {_orders(audit.undone)} there is no trace left."
    if half:
        ways = "; ".join(f"{way} ({count})" for way, count in audit.ways.most_common())
        yield f"{_are(half)} half done: {ways}."
    else:
        yield "None is half done."
    opening, stock, reserved, shipped = audit.units
    sums = f"Of {opening} units, {stock} are in stock, {reserved} reserved and {shipped} shipped"
    if audit.off:
        yield f"{sums}: that does not add up for {len(audit.off)} of {_some(len(audit.books.opening), 'product')}."
    else:
        yield f"{sums}: each of {_some(len(audit.books.opening), 'product')} adds up."
    kept, owed = audit.charged - audit.refunded, audit.owed
    money = f"{euros(audit.charged)} charged, less {euros(audit.refunded)} refunded, is {euros(kept)}"
    if kept == owed:
        yield f"{money}: the price of what was shipped, to the cent."
    else:
        yield f"{money}, and what was shipped is worth {euros(owed)}."
    twice = {"charged": audit.charged_twice, "shipped": audit.shipped_twice, "told": audit.told_twice}
    if any(twice.values()):
        yield f"Twice: {', '.join(f'{_orders(count)} {what}' for what, count in twice.items() if count)}."
    else:
        yield "Nobody was charged twice, nothing was shipped twice, no message was sent twice."
    if audit.wrong:
        yield f"Of {_orders(len(audit.wrong))} the client says otherwise."
    if audit.stuck:
        listed = ", ".join(f"{order} ({state})" for order, state in audit.stuck.items())
        yield f"{_some(len(audit.stuck), 'saga')} not at the end: {listed}."
    if audit.faults:
        return
    ordeal = f"All this though the client was killed {times(result.kills)}"
    if result.crashes:
        ordeal += f", and payment crashed {times(result.crashes)} and forgot its idempotency keys"
    yield f"{ordeal}."


def notes(before: Result, after: Result) -> Iterator[str]:
    """What the numbers mean, sentence by sentence."""
    gained = after.audit.complete - before.audit.complete
    if after.audit.faults:
        yield f"The guards did not keep their promise: {'; '.join(after.audit.faults)}."
    if gained > 0:
        yield f"The guards completed {_orders(gained)} more ({_percent(gained, before.audit.complete)})."
    elif gained == 0:
        yield f"Both runs completed {_orders(after.audit.complete)}."
    else:
        yield f"The guards completed {_orders(-gained)} fewer. That must not be."
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
    if after.left:
        ends = after.recovered
        again = "; the next kill found the others in the middle again" if after.left > ends.total() else ""
        yield (
            f"When it was killed, the client left {_orders(after.left)} in the middle. Recovery brought {ends['done']} "
            f"of them forward to their end, and undid {ends['aborted']}{again}."
        )
    paid = after.tallies["payment"]
    if paid.replayed:
        yield f"The store of results answered {_some(paid.replayed, 'payment')} in place of the service."
    if after.settled:
        yield (
            f"Doubts about payments settled by asking: {after.settled}. For {paid.found} of them the ledger had the "
            "charge, and it was not sent again. A retry that does not ask trusts the service's memory of keys."
        )
    for result, ended in ((before, "failed without guards"), (after, "were undone with guards")):
        if result.reasons:
            most = ", ".join(f"{reason} ({count})" for reason, count in result.reasons.most_common(6))
            yield f"Why orders {ended}: {most}."


def euros(amount: Decimal) -> str:
    """An amount of money."""
    return f"{amount:,.2f} EUR"


def times(count: int) -> str:
    """How often."""
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _percent(change: int, base: int) -> str:
    return f"{100 * change / base:+.0f} %" if base else "from none"


def _some(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _orders(count: int) -> str:
    return _some(count, "order")


def _are(count: int) -> str:
    return f"{_orders(count)} {'is' if count == 1 else 'are'}"
