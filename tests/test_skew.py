"""Clients whose clocks differ by an hour: who owns what is judged by one clock, that of the store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from resilient import Env, Idempotent, InDoubt, InFlight, Pipeline
from resilient.clock import Clock, SystemClock
from resilient.testing import FakeClock
from tests._proofs import close, opened, record, url_of

HOUR = 3600.0
# SQLite's processes are on one machine, and share its clock; memory has one process.
SERVERS = ("redis", "postgres")


class Skewed(SystemClock):
    """A clock whose wall time is wrong by `skew` seconds, and whose monotonic time began at another instant."""

    def __init__(self, skew: float) -> None:
        super().__init__()
        self.at = lambda: SystemClock.at() + skew
        self.now = lambda: SystemClock.now() - skew


@pytest.fixture(params=SERVERS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url_of(request.param, tmp_path, request.getfixturevalue)


CLOCKS: list[Clock] = [
    Skewed(HOUR),
    Skewed(-HOUR),
    FakeClock(epoch=SystemClock.at() + HOUR),
    FakeClock(epoch=SystemClock.at() - HOUR),
    FakeClock(epoch=0.0),
]


def guard(store: Any, clock: Clock, function: Any, **settings: Any) -> Any:
    policy = Idempotent(store, key="order", name="charge", **settings)
    return Pipeline(policy, env=Env(clock=clock))(function)


@pytest.mark.parametrize("mine", CLOCKS, ids=["ahead", "behind", "fake, ahead", "fake, behind", "fake, 1970"])
def test_a_running_call_is_nobody_elses(url: str, mine: Clock) -> None:
    """A client an hour ahead must not take a lease for over, nor give one that lasts an hour longer."""
    ours, theirs = opened(url), opened(url)
    ran: list[str] = []

    def inner(order: str) -> str:
        ran.append("second")
        return "second"

    other = guard(theirs, SystemClock(), inner, in_doubt="rerun", duplicates="raise")

    def outer(order: str) -> str:
        with pytest.raises(InFlight) as caught:
            other(order)
        assert 0 < caught.value.retry_after <= 30.0
        ran.append("first")
        return "first"

    assert guard(ours, mine, outer, in_doubt="rerun")("o-1") == "first"
    assert other("o-1") == "first"
    assert ran == ["first"]
    # And the other way round.
    ran.clear()

    def true(order: str) -> str:
        with pytest.raises(InFlight) as caught:
            guard(ours, mine, inner, in_doubt="rerun", duplicates="raise")(order)
        assert 0 < caught.value.retry_after <= 30.0
        return "by the true clock"

    assert guard(theirs, SystemClock(), true)("o-2") == "by the true clock"
    assert guard(ours, mine, inner)("o-2") == "by the true clock"
    assert not ran
    ours.close()
    theirs.close()


@pytest.mark.parametrize("mine", CLOCKS, ids=["ahead", "behind", "fake, ahead", "fake, behind", "fake, 1970"])
def test_a_lease_ends_for_everybody_at_once(url: str, mine: Clock) -> None:
    ours, theirs = opened(url), opened(url)

    class Killed(GeneratorExit):
        """Stopped dead."""

    def dies(order: str) -> str:
        raise Killed

    def runs(order: str) -> str:
        return "again"

    for key, first, second in (("o-1", mine, SystemClock()), ("o-2", SystemClock(), mine)):
        with pytest.raises(Killed):
            guard(ours, first, dies, lease=0.05)(key)
        found = record(theirs, key, running=False)
        assert abs(found.began_at - found.mark) < 60
        with pytest.raises(InDoubt):
            guard(theirs, second, runs)(key)
        assert guard(theirs, second, runs, in_doubt="rerun")(key) == "again"
        assert record(theirs, key).fence > found.fence
    ours.close()
    theirs.close()


def test_tasks_with_clocks_an_hour_apart(url: str) -> None:
    async def main() -> None:
        store = opened(url)
        ran: list[float] = []

        def caller(skew: float) -> Any:
            async def charge(order: str) -> str:
                ran.append(skew)
                return f"by {skew}"

            return guard(store, Skewed(skew), charge, in_doubt="rerun")

        callers = [caller(skew) for skew in (0.0, HOUR, -HOUR, 24 * HOUR)]
        for number in range(5):
            got = await asyncio.gather(*(each(f"o-{number}") for each in callers for _ in range(3)))
            assert len(set(got)) == 1
        assert len(ran) == 5
        store.close()
        await close(store)

    asyncio.run(main())
