"""What is counted while the demo runs, and what is made of it afterwards. Plain data; for one thread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resilient.demo.schedule import SERVICES

if TYPE_CHECKING:
    from resilient.demo.audit import Audit

__all__ = ["Outcome", "Progress", "Receipt", "Result", "Tally", "quantile"]


@dataclass(slots=True)
class Tally:
    """The numbers of one service, as its client sees them."""

    sent: int = 0
    answered: int = 0
    failed: int = 0
    retries: int = 0
    refused: int = 0
    timeouts: int = 0
    hedges: int = 0
    fallbacks: int = 0
    gave_up: int = 0
    undone: int = 0  # steps that were compensated
    opened: int = 0
    replayed: int = 0  # calls that the store of idempotent results answered
    found: int = 0  # calls of unknown outcome that had had their effect, as the service's ledger said when asked
    absent: int = 0  # and those that had had none


@dataclass(frozen=True, slots=True)
class Receipt:
    """That an order was charged, as the payment service says."""

    order: str
    charge: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an order ended after `latency` seconds: done (`failed_at` is None), or failed at a service, and why."""

    order: str
    latency: float
    failed_at: str | None = None
    reason: str | None = None
    told: bool = True


@dataclass(slots=True)
class Progress:
    """One run while it goes on, as the client's journal tells it."""

    title: str
    total: int
    now: Callable[[], float]
    began: float = 0.0
    failed: str = "failed"  # the word for an order that is over and not done
    placed: set[str] = field(default_factory=set[str])
    tallies: dict[str, Tally] = field(default_factory=lambda: {service: Tally() for service in SERVICES})
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    news: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    breakers: dict[str, str] = field(default_factory=dict[str, str])
    outbox: set[str] = field(default_factory=set[str])
    left: int = 0
    recovered: Counter[str] = field(default_factory=Counter[str])

    def take(self, entry: Sequence[Any]) -> None:
        """Learn from a line of the journal."""
        match entry:
            case ["count", service, what]:
                tally = self.tallies[service]
                setattr(tally, what, getattr(tally, what) + 1)
            case ["place", order]:
                self.placed.add(order)
            case ["over", order, *rest]:
                self.placed.discard(order)
                self.outcomes.append(Outcome(order, *rest))
            case ["outbox", order]:
                self.outbox.add(order)
            case ["left", count]:
                self.left += count
                if count:
                    self.tell(f"client finds {_orders(count)} that the one before it left in the middle")
            case ["recovered", state]:
                self.recovered[state] += 1
            case ["start", breakers]:
                self.placed.clear()
                self.breakers = dict.fromkeys(breakers, "closed")
            case ["breaker", now, service, old, new, reason]:
                self.breakers[service] = new
                self.tallies[service].opened += new == "open"
                self.news.append((now - self.began, f"{service} breaker {old} -> {new}: {reason}"))
            case _:
                raise ValueError(f"a journal has no such line: {entry!r}")

    @property
    def in_flight(self) -> int:
        """Orders in work."""
        return len(self.placed)

    def tell(self, text: str) -> None:
        """Put a line among the news, at this second of the run."""
        self.news.append((self.elapsed, text))

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self.now() - self.began

    @property
    def done(self) -> int:
        """Orders that were paid and shipped."""
        return sum(outcome.failed_at is None for outcome in self.outcomes)


@dataclass(frozen=True, slots=True)
class Result:
    """One run, when it is over."""

    title: str
    outcomes: Sequence[Outcome]
    tallies: dict[str, Tally]
    audit: Audit
    wall: float
    outbox: int
    kills: int = 0  # of the client
    crashes: int = 0  # of the payment service
    left: int = 0  # orders in the middle, when their client was killed
    recovered: Counter[str] = field(default_factory=Counter[str])  # how those ended

    @property
    def done(self) -> int:
        """Orders that were paid and shipped, as the client knows."""
        return sum(outcome.failed_at is None for outcome in self.outcomes)

    @property
    def sent(self) -> int:
        """Calls that left the client."""
        return sum(tally.sent for tally in self.tallies.values())

    @property
    def settled(self) -> int:
        """Payments of unknown outcome that were settled by asking the service."""
        return self.tallies["payment"].found + self.tallies["payment"].absent

    @property
    def untold(self) -> int:
        """Orders done whose customer was not told, and no message waits in the outbox."""
        return sum(outcome.failed_at is None and not outcome.told for outcome in self.outcomes)

    @property
    def reasons(self) -> Counter[str]:
        """Why orders failed: service and error."""
        return Counter(f"{o.failed_at}: {o.reason}" for o in self.outcomes if o.failed_at is not None)

    def latency(self, q: float) -> float | None:
        """The `q` quantile of the latency of the orders done, in seconds; None if none was."""
        return quantile([outcome.latency for outcome in self.outcomes if outcome.failed_at is None], q)


def quantile(values: Sequence[float], q: float) -> float | None:
    """The least of `values` that a share `q` of them does not exceed (nearest rank); None where there are none."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)] if values else None


def _orders(count: int) -> str:
    return "1 order" if count == 1 else f"{count} orders"
