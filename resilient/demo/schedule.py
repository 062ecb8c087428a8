"""When each service misbehaves, and how, and when the client is killed: a pure function of the seed.

`Schedule(seed, seconds)` deals each service episodes of trouble over the run, and a crash to payment and to one by lot
(which may be payment again, and then stays the only one). `kills` are the moments of the client. `fate` says what
happens to one request: it depends on seed, service, order, how often that order came before, and the second of the run
in which it comes. It draws from generators of its own, so that requests in another order meet the same fates.
"""

from __future__ import annotations

import random  # noqa: TID251 - seeded: it draws the same lots each time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["SERVICES", "Episode", "Fate", "Kind", "Schedule"]

SERVICES: tuple[str, ...] = ("inventory", "payment", "shipping", "notification")
Kind: TypeAlias = Literal["errors", "slow", "hang", "refuse", "crash"]
TROUBLES: tuple[Kind, ...] = ("errors", "slow", "hang", "refuse")

# Shares of requests that an episode strikes: some get through, as in real trouble. Refusals strike all.
_SHARES: dict[Kind, tuple[float, float]] = {
    "errors": (0.4, 0.8),
    "slow": (0.5, 0.9),
    "hang": (0.3, 0.7),
    "refuse": (1.0, 1.0),
    "crash": (1.0, 1.0),
}
_NOISE = 0.01  # the share of errors in quiet times
_TAIL = 0.02  # the share of requests that take several times as long, in quiet times


@dataclass(frozen=True, slots=True)
class Episode:
    """Trouble of one kind at one service, from second `start` to second `end`, for a `share` of its requests."""

    service: str
    kind: Kind
    start: float
    end: float
    share: float


@dataclass(frozen=True, slots=True)
class Fate:
    """What happens to one request: answered with `status` after `delay` seconds; `works` if its work is done.

    `hangs`: the work may be done, but no answer comes in a time that anybody waits. `retry_after` is the whole seconds
    that a refusal asks for; `as_date` says whether it is written as an HTTP date.
    """

    status: int
    delay: float
    works: bool = True
    hangs: bool = False
    retry_after: int | None = None
    as_date: bool = False


class Schedule:
    """All trouble of a run of `seconds`. Equal arguments make equal schedules, in every process and Python version."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.seed, self.seconds = seed, seconds
        self.episodes = tuple(self._deal())
        self.kills = tuple(self._moments())

    def _deal(self) -> list[Episode]:
        rng = random.Random(f"schedule {self.seed}")
        victims = ("payment", rng.choice(SERVICES))
        episodes: list[Episode] = []
        for service in SERVICES:
            kinds: list[Kind] = [*TROUBLES, "crash"] if service in victims else [*TROUBLES]
            rng.shuffle(kinds)
            # The first tenth of the run is calm, and the last, so that the recovery can be seen.
            slot = 0.8 * self.seconds / len(kinds)
            for place, kind in enumerate(kinds):
                length = slot * rng.uniform(0.4, 0.55)
                start = 0.1 * self.seconds + slot * (place + rng.uniform(0.0, 0.4))
                share = rng.uniform(*_SHARES[kind])
                episodes.append(Episode(service, kind, round(start, 3), round(start + length, 3), round(share, 3)))
        return sorted(episodes, key=lambda episode: (episode.start, episode.service))

    def _moments(self) -> list[float]:
        """The seconds at which the client is killed, in the midst of its work and some time apart."""
        rng = random.Random(f"kills {self.seed}")
        times = 3 if self.seconds >= 10 else 1
        slot = 0.6 * self.seconds / times
        return [round(0.2 * self.seconds + slot * (place + rng.uniform(0.1, 0.6)), 3) for place in range(times)]

    def of(self, service: str, elapsed: float) -> Episode | None:
        """The trouble that `service` is in at that second of the run, if any. A service is in one at a time."""
        for episode in self.episodes:
            if episode.service == service and episode.start <= elapsed < episode.end:
                return episode
        return None

    def crash(self, service: str) -> Episode | None:
        """The crash of `service`, from its exit to its restart, if it has one."""
        for episode in self.episodes:
            if episode.service == service and episode.kind == "crash":
                return episode
        return None

    def fate(self, service: str, elapsed: float, order: str, before: int) -> Fate:
        """What happens to a request for `order` that comes at second `elapsed`, `before` others having come for it."""
        rng = random.Random(f"fate {self.seed} {service} {order} {before}")
        struck, coin, noise, date = rng.random(), rng.random() < 0.5, rng.random(), rng.random() < 0.5
        delay = min(0.25, rng.lognormvariate(-2.8, 0.35))  # a median of 61 ms
        episode = self.of(service, elapsed)
        if episode is None or episode.kind == "crash" or struck >= episode.share:
            if noise < _NOISE:
                return Fate(500, delay, works=coin)
            return Fate(200, delay * 6 if noise < _NOISE + _TAIL else delay)
        match episode.kind:
            case "errors":
                return Fate(500, delay, works=coin)
            case "slow":
                return Fate(200, delay + rng.uniform(0.1, 0.3) * self.patience)
            case "hang":
                return Fate(200, delay, works=coin, hangs=True)
            case _:
                seconds = max(1, round(episode.end - elapsed))
                return Fate(429 if date else 503, 0.005, works=False, retry_after=seconds, as_date=coin)

    def flaws(self, orders: Sequence[str]) -> dict[str, str]:
        """The orders that fail for good, and why: "short" of stock, "declined" or "refused". Two in a hundred of each.

        At least one of each, but none where there are fewer than ten orders.
        """
        each = max(1, round(0.02 * len(orders))) if len(orders) >= 10 else 0
        picked = random.Random(f"flaws {self.seed}").sample(orders, 3 * each)
        return dict(zip(picked, ("short", "declined", "refused") * each, strict=True))

    @property
    def patience(self) -> float:
        """How long a careful client without guards waits for an answer: 5 s, less in short runs."""
        return max(0.2, min(5.0, self.seconds / 4))
