"""What is counted while the demo runs, and what is made of it afterwards. Plain data; for one thread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from resilient.demo.schedule import SERVICES
from resilient.events import BreakerChanged, Event, FellBack, GaveUp, Hedged, Refused, Retrying, TimedOut

__all__ = ["Books", "Outcome", "Progress", "Result", "Tally", "quantile"]


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
    opened: int = 0


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
    """One run while it goes on. As a sink of an `Env` it counts what the policies decide."""

    title: str
    total: int
    now: Callable[[], float]
    began: float = 0.0
    in_flight: int = 0
    tallies: dict[str, Tally] = field(default_factory=lambda: {service: Tally() for service in SERVICES})
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    news: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])

    def __call__(self, event: Event) -> None:
        tally = self.tallies[event.policy]
        match event:
            case Retrying():
                tally.retries += 1
            case Refused():
                tally.refused += 1
            case TimedOut():
                tally.timeouts += 1
            case Hedged():
                tally.hedges += 1
            case FellBack():
                tally.fallbacks += 1
            case GaveUp():
                tally.gave_up += 1
            case BreakerChanged():
                tally.opened += event.new == "open"
                self.tell(f"{event.policy} breaker {event.old} -> {event.new}: {event.reason}")
            case _:
                pass

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
class Books:
    """What the services wrote into their ledgers, which is what really happened."""

    received: dict[str, int]
    charged: Counter[str]
    shipped: Counter[str]

    @property
    def charged_twice(self) -> int:
        """Orders whose customer was charged more than once."""
        return sum(times > 1 for times in self.charged.values())

    @property
    def charged_not_shipped(self) -> int:
        """Orders whose customer was charged and gets nothing."""
        return len(self.charged.keys() - self.shipped.keys())

    def unnoticed(self, outcomes: Iterable[Outcome]) -> int:
        """Orders that were charged and shipped, and that the client believes to have failed."""
        both = self.charged.keys() & self.shipped.keys()
        return sum(outcome.failed_at is not None and outcome.order in both for outcome in outcomes)


@dataclass(frozen=True, slots=True)
class Result:
    """One run, when it is over."""

    title: str
    outcomes: Sequence[Outcome]
    tallies: dict[str, Tally]
    books: Books
    wall: float
    outbox: int

    @property
    def done(self) -> int:
        """Orders that were paid and shipped, as the client knows."""
        return sum(outcome.failed_at is None for outcome in self.outcomes)

    @property
    def sent(self) -> int:
        """Calls that left the client."""
        return sum(tally.sent for tally in self.tallies.values())

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
