"""The life of a circuit against a naive model: lists of outcomes, and a number for each epoch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from resilient import Consecutive, FailureRate, SlowRate
from resilient._lifecycle import CLOSED, HALF_OPEN, OPEN, Change, Lifecycle, _free_lock
from resilient._trip import Trip
from resilient._window import PASS, Permit, Probe, Tally

COOLDOWN, LEASE = 10.0, 4.0


def life(trip: Trip = Consecutive(1), *, probes: int = 1, brisk: bool = False) -> Lifecycle:  # noqa: B008
    return Lifecycle(trip, COOLDOWN, probes, LEASE, brisk=brisk)


def let_in(circuit: Lifecycle, now: float) -> Permit:
    permit = circuit._permit or circuit._admit(now)
    assert permit is not None
    return permit


def fail(circuit: Lifecycle, now: float = 0.0) -> bool:
    return bool(circuit._ended(let_in(circuit, now), True, 0.0, now))


def told(circuit: Lifecycle) -> list[Change]:
    changes: list[Change] = []
    while (change := circuit._next_news()) is not None:
        changes.append(change)
        circuit._told()
    return changes


class Ticket:
    """A permit, and what the naive model knows of it."""

    def __init__(self, permit: Permit, epoch: int, until: float | None) -> None:
        self.permit, self.epoch, self.until = permit, epoch, until


RULES: list[tuple[Trip, Callable[[list[bool]], bool]]] = [
    (Consecutive(3), lambda log: log[-3:] == [True] * 3),
    (
        FailureRate(0.5, over=6, minimum=4),
        lambda log: len(log) >= 4 and sum(log[-6:]) / len(log[-6:]) >= 0.5,
    ),
    (
        Consecutive(2) | FailureRate(0.4, over=10, minimum=8),
        lambda log: log[-2:] == [True] * 2 or (len(log) >= 8 and sum(log[-10:]) / len(log[-10:]) >= 0.4),
    ),
]


class Lives(RuleBasedStateMachine):
    """Any order of admissions, results (late ones too), pauses, and hands on the switches."""

    tickets: Bundle[Ticket] = Bundle("tickets")

    @initialize(rules=st.sampled_from(RULES), probes=st.integers(1, 3), brisk=st.booleans())
    def begin(self, rules: tuple[Trip, Callable[[list[bool]], bool]], probes: int, brisk: bool) -> None:
        trip, self.trips = rules
        self.real = life(trip, probes=probes, brisk=brisk)
        self.probes = probes
        self.now = 0.0
        self.state, self.epoch, self.opened, self.until = CLOSED, 0, 0, 0.0
        self.log: list[bool] = []
        self.flying: list[Ticket] = []
        self.won = self.handles = self.rejected = 0
        self.off = False
        self.ended: list[bool] = []

    # -- the model's own few rules

    def enter(self, state: str) -> None:
        self.state, self.log, self.flying, self.won = state, [], [], 0
        self.epoch += 1

    def open(self) -> None:
        self.opened += 1
        self.until = self.now + COOLDOWN
        self.enter(OPEN)

    # -- what happens

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 4.0, 10.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=tickets)
    def call(self) -> Any:
        permit = self.real._permit
        if permit is None and self.now >= self.real._shut:
            permit = self.real._admit(self.now)
        elif permit is None:
            self.real._rejected += 1
        if self.handles:
            expected = None
        elif self.off or self.state == CLOSED:
            expected = Ticket(PASS, -1 if self.off else self.epoch, None)
        else:
            if self.state == OPEN and self.now >= self.until:
                self.enter(HALF_OPEN)
            self.flying = [ticket for ticket in self.flying if ticket.until is not None and self.now < ticket.until]
            free = self.state == HALF_OPEN and len(self.flying) + self.won < self.probes
            expected = Ticket(PASS, self.epoch, self.now + LEASE) if free else None
            if expected is not None:
                self.flying.append(expected)
        assert (permit is None) == (expected is None)
        if permit is None or expected is None:
            self.rejected += 1
            return Ticket(PASS, -1, None)
        expected.permit = permit
        return expected

    @rule(ticket=tickets, failed=st.booleans())
    def end(self, ticket: Ticket, failed: bool) -> None:
        permit = ticket.permit
        if isinstance(permit, Tally) and not failed:
            # As the shell does it: count, and settle only while cold.
            permit.n += 1
            if permit.cold:
                self.real._ended(permit, False, 0.0, self.now, counted=True)
            opened = False
        else:
            opened = self.real._ended(permit, failed, 0.0, self.now) is not None
        if ticket.until is None:
            if ticket.epoch == self.epoch and self.off and not failed:
                self.log.append(False)  # the increment of the shell, in the epoch that goes on after `enable`
            elif ticket.epoch == self.epoch and not self.off:
                before = self.opened
                self.log.append(failed)
                self.ended.append(failed)
                if self.trips(self.log):
                    self.open()
                assert opened is (self.opened > before and failed)
        elif ticket in self.flying and not self.off:
            self.flying.remove(ticket)
            if self.now < ticket.until:
                self.ended.append(failed)
                if failed:
                    self.open()
                else:
                    self.won += 1
                    if self.won == self.probes:
                        self.opened = 0
                        self.enter(CLOSED)
        # A call ends once; what it says a second time is late by definition.
        ticket.epoch, ticket.permit = -1, PASS
        ticket.until = ticket.until if ticket in self.flying else None

    @rule(ticket=tickets)
    def cancel(self, ticket: Ticket) -> None:
        self.real._forget(ticket.permit)
        if ticket in self.flying:
            self.flying.remove(ticket)
        ticket.epoch, ticket.permit, ticket.until = -1, PASS, None

    @rule(what=st.sampled_from([CLOSED, OPEN, HALF_OPEN, HALF_OPEN, "hold", "release", "off", "on"]))
    def by_hand(self, what: str) -> None:
        # One rule for all hands: they are to be rarer than calls.
        if what == "hold" or (what == "release" and self.handles):
            step = 1 if what == "hold" else -1
            self.handles += step
            self.real._hold(step, "by hand", self.now)
        elif what in ("off", "on"):
            self.off = what == "off"
            self.real._switch(self.off, "by hand", self.now)
        elif what != "release":
            self.real._force(what, "by hand", self.now, remaining=5.0, opened=1)
            self.opened, self.until = 1, self.now + 5.0
            self.enter(what)

    # -- what must hold

    @invariant()
    def agree(self) -> None:
        real = self.real
        assert real._state == self.state
        assert real._opened == self.opened
        assert real._rejected == self.rejected
        assert real._won == self.won
        assert len([probe for probe in real._flying if self.now < probe.until]) == len(
            [ticket for ticket in self.flying if ticket.until is not None and self.now < ticket.until]
        )
        assert len(real._flying) + real._won <= self.probes
        assert real._seen == (OPEN if self.handles else CLOSED if self.off else self.state)
        if self.state == CLOSED:
            assert real._share(self.now) == pytest.approx(real._tally.share(self.now) if real._tally else -1)
        wait = real._wait(self.now)
        if self.handles or self.off or self.state == CLOSED:
            assert wait is None
        elif self.state == OPEN:
            assert wait == max(0.0, self.until - self.now)
        else:
            live = [ticket.until for ticket in self.flying if ticket.until is not None]
            full = len(live) + self.won >= self.probes
            assert wait == (max(0.0, min(live) - self.now) if full else 0.0)

    @invariant()
    def news_is_a_chain(self) -> None:
        changes = told(self.real)
        for one, other in itertools.pairwise(changes):
            assert one.new == other.old
        if changes:
            assert changes[-1].new == self.real._seen


Lives.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase


# -- each direction of lateness, by name -----------------------------------------------------------------------------


def test_a_late_failure_says_nothing_while_open() -> None:
    circuit = life(Consecutive(2))
    late, one, two = (let_in(circuit, 0.0) for _ in range(3))
    circuit._ended(one, True, 0.0, 0.0)
    assert circuit._ended(two, True, 0.0, 0.0)
    assert not circuit._ended(late, True, 0.0, 5.0)
    assert (circuit._state, circuit._opened, circuit._wait(5.0)) == (OPEN, 1, 5.0)


def test_a_late_failure_says_nothing_in_half_open() -> None:
    circuit = life(Consecutive(1))
    late = let_in(circuit, 0.0)
    fail(circuit)
    let_in(circuit, 10.0)
    assert not circuit._ended(late, True, 0.0, 10.0)
    assert circuit._state == HALF_OPEN


def test_a_result_of_an_older_closed_epoch_says_nothing_in_a_newer() -> None:
    circuit = life(Consecutive(1))
    late = let_in(circuit, 0.0)
    fail(circuit)
    circuit._ended(let_in(circuit, 10.0), False, 0.0, 10.0)
    assert circuit._state == CLOSED
    assert not circuit._ended(late, True, 0.0, 11.0)
    assert (circuit._state, circuit._totals()) == (CLOSED, (2, 1, 0))


def test_a_slow_probe_opens_again() -> None:
    """What opened for slowness must not close because a slow answer came at last."""
    circuit = life(SlowRate(1.0, slower_than=1.0, over=1))
    assert circuit._ended(let_in(circuit, 0.0), False, 2.0, 0.0)
    assert circuit._ended(let_in(circuit, 10.0), False, 2.0, 12.0)
    assert [change.reason for change in told(circuit)] == [
        "1 of 1 calls took more than 1 s",
        "the cooldown is over",
        "a probe was slow",
    ]
    assert circuit._totals() == (2, 0 + 1, 2)


def test_half_open_needs_as_many_successes_as_probes_and_admits_no_more() -> None:
    circuit = life(Consecutive(1), probes=2)
    fail(circuit)
    circuit._ended(let_in(circuit, 10.0), False, 0.0, 10.0)
    last = let_in(circuit, 10.0)
    assert circuit._admit(10.0) is None, "one has succeeded and one is on its way: that is all it takes"
    circuit._ended(last, False, 0.0, 10.0)
    assert circuit._state == CLOSED


def test_a_lease_is_over_at_its_instant() -> None:
    for ended, state in ((13.9, CLOSED), (14.0, HALF_OPEN)):
        circuit = life(Consecutive(1))
        fail(circuit)
        circuit._ended(let_in(circuit, 10.0), False, 0.0, ended)
        assert circuit._state == state
        assert circuit._flying == ()


def test_the_wait_in_half_open_is_the_end_of_the_first_lease() -> None:
    circuit = life(Consecutive(1), probes=2)
    fail(circuit)
    let_in(circuit, 10.0)
    assert circuit._wait(11.0) == 0.0
    let_in(circuit, 12.0)
    assert circuit._wait(12.5) == 1.5
    assert circuit._wait(99.0) == 0.0


def test_extending_needs_the_epoch_that_was_looked_at() -> None:
    circuit = life(Consecutive(1), brisk=True)
    fail(circuit)
    circuit._extend(circuit._epoch - 1, 99.0)
    assert (circuit._until, circuit._shut) == (10.0, 10.0)
    circuit._extend(circuit._epoch, 50.0)
    assert (circuit._until, circuit._shut) == (50.0, 50.0)


def test_extending_while_isolated_does_not_refuse_by_the_clock() -> None:
    circuit = life(Consecutive(1), brisk=True)
    fail(circuit)
    circuit._hold(1, "isolated", 0.0)
    circuit._extend(circuit._epoch, 50.0)
    assert circuit._shut == float("-inf")


def test_news_is_told_by_one_at_a_time() -> None:
    circuit = life(Consecutive(1))
    fail(circuit)
    assert circuit._next_news() is not None
    let_in(circuit, 10.0)
    assert circuit._next_news() is None, "somebody else is telling"
    circuit._told()
    change = circuit._next_news()
    assert change is not None
    assert (change.old, change.new) == (OPEN, HALF_OPEN)


def test_a_permit_of_nobody_says_nothing() -> None:
    circuit = life(Consecutive(1))
    assert not circuit._ended(PASS, True, 0.0, 0.0)
    assert not circuit._ended(Probe(5.0), True, 0.0, 0.0)
    circuit._forget(PASS)
    assert circuit._totals() == (0, 0, 0)


def test_a_call_that_found_no_permit_may_find_it_closed_again() -> None:
    circuit = life(Consecutive(1))
    assert circuit._admit(0.0) is circuit._tally


def test_after_a_fork_the_lock_is_free() -> None:
    circuit = life(Consecutive(1))
    held = threading.Thread(target=circuit._lock.acquire, daemon=True)
    held.start()
    held.join()
    circuit._telling = True
    _free_lock()
    circuit._forked()
    fail(circuit)
    assert len(told(circuit)) == 1


def test_totals_while_not_closed() -> None:
    circuit = life(Consecutive(1))
    fail(circuit)
    assert circuit._totals() == (1, 1, 0)
    assert circuit._share(0.0) == 0.0


def test_probes_from_many_threads_never_exceed_their_places() -> None:
    circuit = life(Consecutive(1), probes=3)
    fail(circuit)
    barrier = threading.Barrier(16)
    got: list[Permit | None] = []

    def caller() -> None:
        barrier.wait()
        got.append(circuit._admit(10.0))

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(permit is not None for permit in got) == 3
    assert circuit._rejected == 13


def test_every_change_says_what_why_when_and_whether_others_should_know() -> None:
    """By results: to be shared. By hand: not. Epochs count one by one."""
    circuit = life(Consecutive(1))
    fail(circuit, 1.0)
    probe = circuit._admit(11.0)
    assert isinstance(probe, Probe)
    circuit._ended(probe, True, 0.0, 12.0)
    again = circuit._admit(22.0)
    assert again is not None
    circuit._ended(again, False, 0.0, 23.0)
    circuit._force(OPEN, "by hand", 30.0, remaining=5.0, opened=7)
    circuit._force(CLOSED, "by hand too", 31.0)
    circuit._hold(1, "held", 40.0)
    circuit._hold(-1, "let go", 41.0)
    fail(circuit, 50.0)
    circuit._switch(True, "off", 51.0)
    circuit._switch(False, "on", 52.0)
    assert told(circuit) == [
        Change(CLOSED, OPEN, "1 failures in a row", 1, 1, 1.0, True),
        Change(OPEN, HALF_OPEN, "the cooldown is over", 2, 1, 11.0, True),
        Change(HALF_OPEN, OPEN, "a probe failed", 3, 2, 12.0, True),
        Change(OPEN, HALF_OPEN, "the cooldown is over", 4, 2, 22.0, True),
        Change(HALF_OPEN, CLOSED, "1 of 1 probes succeeded", 5, 0, 23.0, True),
        Change(CLOSED, OPEN, "by hand", 6, 7, 30.0, False),
        Change(OPEN, CLOSED, "by hand too", 7, 0, 31.0, False),
        Change(CLOSED, OPEN, "held", 7, 0, 40.0, False),
        Change(OPEN, CLOSED, "let go", 7, 0, 41.0, False),
        Change(CLOSED, OPEN, "1 failures in a row", 8, 1, 50.0, True),
        Change(OPEN, CLOSED, "off", 8, 1, 51.0, False),
        Change(CLOSED, OPEN, "on", 8, 1, 52.0, False),
    ]


def test_totals_add_up_over_epochs() -> None:
    circuit = life(Consecutive(2) | SlowRate(1.0, slower_than=1.0, over=50, minimum=50))
    for epoch in range(3):
        for elapsed in (2.0, 2.0, 0.5):
            permit = let_in(circuit, 0.0)
            permit.n += 1
            circuit._ended(permit, False, elapsed, 0.0, counted=True)
        fail(circuit)
        fail(circuit)
        assert circuit._last == 2
        assert circuit._totals() == (5 * (epoch + 1), 2 * (epoch + 1), 2 * (epoch + 1))
        circuit._force(CLOSED, "again", 0.0)


def test_a_probe_as_slow_as_allowed_is_not_slow() -> None:
    for elapsed, state in ((1.0, CLOSED), (1.1, OPEN)):
        circuit = life(Consecutive(1) | SlowRate(1.0, slower_than=1.0, over=5, minimum=5))
        fail(circuit)
        probe = circuit._admit(10.0)
        assert probe is not None
        reason = circuit._ended(probe, False, elapsed, 11.0)
        assert (circuit._state, reason) == (state, None if state == CLOSED else "a probe was slow")
