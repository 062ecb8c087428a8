"""The life of a circuit: closed, open, half-open. Decides who gets in and what a result means; does nothing else.

Pure: it is given `now`, never sleeps, never calls the user, and keeps what changed as news for others to tell.
Every permit belongs to the epoch that issued it; a result of an older epoch says nothing, in every direction.
Safe from any thread, loop and trio run: each decision is one short turn under the lock. The attribute `_permit` is
the hot path: what lets calls in while the circuit is closed, None while each call must ask `_admit`. With `brisk` it
need not even ask until the instant `_shut`: whoever refuses a call by that counts it in `_rejected`.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple, Protocol

from resilient._window import PASS, Permit, Probe, Tally

__all__ = ["CLOSED", "HALF_OPEN", "OPEN", "Change", "Lifecycle"]

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"  # pybreaker's names
NEVER = float("-inf")


class Change(NamedTuple):
    """A change of the state that callers see, at the instant `now`."""

    old: str
    new: str
    reason: str
    epoch: int
    opened: int
    now: float
    shared: bool
    """Whether others should take it over: it was decided here, by results."""


class Rules(Protocol):
    """What a lifecycle asks of its trip rules."""

    @property
    def timed(self) -> bool: ...

    @property
    def slower_than(self) -> float: ...

    def tally(self) -> Tally: ...


class Lifecycle:
    """Admit calls, learn from how they end, and change state. Half-open needs `probes` successes to close.

    Half-open has `probes` places. A probe holds its place for `lease` seconds; after that another may have it, and its
    late result says nothing. One failed probe opens the circuit again; `probes` successes close it.
    """

    __slots__ = (
        "_brisk",
        "_calls",
        "_cooldown",
        "_disabled",
        "_epoch",
        "_failures",
        "_flying",
        "_isolated",
        "_last",
        "_lease",
        "_news",
        "_opened",
        "_permit",
        "_probes",
        "_rejected",
        "_seen",
        "_shut",
        "_slow",
        "_state",
        "_tally",
        "_telling",
        "_until",
        "_won",
        "trip",
    )

    # One lock for all breakers: it is held for a few steps, never on the way of a success, and an own one weighs 88
    # bytes. Re-entrant, since a finaliser that closes a generator gives its permit back wherever it happens to run.
    _lock = threading.RLock()
    _permit: Permit | None

    def __init__(self, trip: Rules, cooldown: float, probes: int, lease: float, *, brisk: bool = False) -> None:
        self.trip, self._cooldown, self._probes, self._lease = trip, cooldown, probes, lease
        self._state = self._seen = CLOSED
        self._epoch = self._opened = self._won = self._isolated = 0
        self._calls = self._failures = self._slow = self._rejected = self._last = 0
        self._disabled = self._telling = False
        self._until, self._shut = 0.0, NEVER
        self._brisk = brisk
        self._flying: tuple[Probe, ...] = ()
        self._news: tuple[Change, ...] = ()
        self._tally: Tally | None = trip.tally()
        self._permit = self._tally

    # -- one call ------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> Permit | None:
        """Let one call in, or refuse it (None); `_wait` tells for how long."""
        with self._lock:
            if self._permit is not None:
                return self._permit
            if not self._isolated:
                if self._state == OPEN and now >= self._until:
                    self._enter_locked(HALF_OPEN, "the cooldown is over", now)
                if self._state == HALF_OPEN:
                    flying = self._flying = tuple(probe for probe in self._flying if now < probe.until)
                    if len(flying) + self._won < self._probes:
                        probe = Probe(now + self._lease)
                        self._flying = (*flying, probe)
                        return probe
            self._rejected += 1
            return None

    def _ended(self, permit: Permit, failed: bool, elapsed: float, now: float, *, counted: bool = False) -> str | None:
        """Take in how a call ended; the reason if that opened the circuit. With `counted` its success is in `n`."""
        with self._lock:
            if self._disabled:
                return None
            tally = self._tally
            if tally is not None and permit is tally:
                if not (failed or counted):
                    tally.n += 1
                reason = tally.note(failed, elapsed, now)
                if reason is not None:
                    self._open_locked(reason, now)
                return reason
            return self._probed_locked(permit, failed, elapsed, now) if isinstance(permit, Probe) else None

    def _forget(self, permit: Permit) -> None:
        """The call ended in a way that says nothing: a probe gives its place back, and nothing else changes."""
        if isinstance(permit, Probe):
            with self._lock:
                self._flying = tuple(probe for probe in self._flying if probe is not permit)

    def _probed_locked(self, probe: Probe, failed: bool, elapsed: float, now: float) -> str | None:
        others = tuple(other for other in self._flying if other is not probe)
        if len(others) == len(self._flying):
            return None
        self._flying = others
        if now >= probe.until:
            return None
        slow = elapsed > self.trip.slower_than
        failed = failed or slow
        self._slow += slow
        self._calls += 1
        self._failures += failed
        if failed:
            reason = "a probe was slow" if slow else "a probe failed"
            self._open_locked(reason, now)
            return reason
        self._won += 1
        if self._won == self._probes:
            self._opened = 0
            self._enter_locked(CLOSED, f"{self._won} of {self._probes} probes succeeded", now)
        return None

    # -- changes -------------------------------------------------------------------------------------------------

    def _open_locked(self, reason: str, now: float) -> None:
        self._opened += 1
        self._until = now + self._cooldown
        self._enter_locked(OPEN, reason, now)

    def _enter_locked(self, state: str, reason: str, now: float, *, shared: bool = True) -> None:
        """Begin a new epoch. Permits of the old one are recognised no more."""
        if self._tally is not None:
            self._last = self._tally.failures
            self._calls += self._tally.total
            self._failures += self._tally.failures
            self._slow += self._tally.slow
        self._epoch += 1
        self._state = state
        self._flying = ()
        self._won = 0
        self._tally = self.trip.tally() if state == CLOSED else None
        self._show_locked(reason, now, shared)

    def _show_locked(self, reason: str, now: float, shared: bool) -> None:
        """Let callers see what is, and note it as news if they see a change."""
        if self._isolated:
            self._permit, seen = None, OPEN
        elif self._disabled:
            self._permit, seen = PASS, CLOSED
        else:
            self._permit, seen = self._tally, self._state
        # While it is plainly open, the clock alone refuses; a shadow (and a build without GIL) goes the long way.
        plainly = self._brisk and self._state == OPEN and not (self._isolated or self._disabled)
        self._shut = self._until if plainly else NEVER
        if seen != self._seen:
            change = Change(self._seen, seen, reason, self._epoch, self._opened, now, shared)
            self._news = (*self._news, change)
            self._seen = seen

    def _force(self, state: str, reason: str, now: float, *, remaining: float = 0.0, opened: int = 0) -> None:
        """Begin a new epoch in `state`, whatever was; open for `remaining` seconds more."""
        with self._lock:
            self._opened, self._until = opened, now + remaining
            self._enter_locked(state, reason, now, shared=False)

    def _extend(self, epoch: int, until: float) -> None:
        """Stay open until `until`, if the epoch is still the one that was looked at."""
        with self._lock:
            if epoch == self._epoch:
                self._until = until
                self._shut = until if self._shut > NEVER else NEVER

    def _hold(self, step: int, reason: str, now: float) -> None:
        """Count one handle more (1) or less (-1) that keeps every call out."""
        with self._lock:
            self._isolated += step
            self._show_locked(reason, now, False)

    def _switch(self, off: bool, reason: str, now: float) -> None:
        """Let everything pass and learn nothing (or learn again)."""
        with self._lock:
            self._disabled = off
            self._show_locked(reason, now, False)

    # -- news ----------------------------------------------------------------------------------------------------

    def _next_news(self) -> Change | None:
        """The next change to tell, if nobody else is telling one: so they are told one by one and in order.

        Whoever gets one calls `_told` afterwards, whatever happens.
        """
        with self._lock:
            if self._telling or not self._news:
                return None
            self._telling = True
            first, *rest = self._news
            self._news = tuple(rest)
            return first

    def _forked(self) -> None:
        """In the child of a fork no other thread lives, so nobody will end a telling."""
        self._telling = False

    def _told(self) -> None:
        """The change has been told."""
        self._telling = False

    # -- numbers -------------------------------------------------------------------------------------------------

    def _wait(self, now: float) -> float | None:
        """The seconds until a refused call has a chance; None if calls pass, or if nobody can know (isolated)."""
        if self._isolated or self._permit is not None:
            return None
        if self._state == OPEN:
            left = self._until - now
            return left if left > 0.0 else 0.0
        flying = self._flying
        # Probes mostly answer sooner. The end of the first lease is what is certain.
        full = len(flying) + self._won >= self._probes
        return max(0.0, min(probe.until for probe in flying) - now) if full and flying else 0.0

    def _totals(self) -> tuple[int, int, int]:
        """The calls, failures and slow calls that said something, since the breaker was made."""
        with self._lock:
            tally = self._tally
            if tally is None:
                return self._calls, self._failures, self._slow
            return self._calls + tally.total, self._failures + tally.failures, self._slow + tally.slow

    def _share(self, now: float) -> float:
        """The share of failures that the rules judge by; 0.0 while not closed."""
        with self._lock:
            return 0.0 if self._tally is None else self._tally.share(now)


def _free_lock() -> None:
    # In the child of a fork no other thread lives to give it back.
    Lifecycle._lock = threading.RLock()


getattr(os, "register_at_fork", dict)(after_in_child=_free_lock)
