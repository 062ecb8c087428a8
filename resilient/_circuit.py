"""A circuit with an environment: it tells its changes, obeys hands and storages, and shows its numbers.

Between the pure lifecycle and the policy. Everything here is off the hot path. Changes are told outside every lock,
one at a time and in their order, by whichever thread made one first. Safe from any thread, asyncio loop and trio run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from resilient._lifecycle import CLOSED, HALF_OPEN, OPEN, Change, Lifecycle
from resilient._verdict import quick
from resilient.policy import SYSTEM, Env, seconds, whole

if TYPE_CHECKING:
    from resilient._pybreaker import Link
    from resilient._trip import Trip

__all__ = ["DEFAULT_COOLDOWN", "NAMELESS", "Circuit", "Cooldown", "Isolation"]

DEFAULT_COOLDOWN = 30.0
NAMELESS = "CircuitBreaker"  # what a breaker is called that has no name

Cooldown = float | Callable[[int], float]


class Circuit(Lifecycle):
    """The part of a breaker that is not about calls."""

    __slots__ = ("_cause", "_env", "_link", "_listeners", "_schedule", "name")

    def __init__(
        self, name: str | None, trip: Trip, cooldown: Cooldown, probes: int, lease: float, brisk: bool
    ) -> None:
        self._schedule = quick("cooldown", cooldown) if callable(cooldown) else None
        super().__init__(
            trip,
            DEFAULT_COOLDOWN if callable(cooldown) else seconds("cooldown", cooldown, zero=True),
            whole("probes", probes),
            seconds("probe_lease", lease),
            brisk=brisk,
        )
        self.name = name
        self._cause: str | None = None
        self._env = SYSTEM
        self._listeners: tuple[Any, ...] = ()
        self._link: Link | None = None

    @property
    def _called(self) -> str:
        return self.name or NAMELESS

    # -- telling others: never under the lock, one change at a time, in order ------------------------------------------

    def _notify(self, what: str, /, *args: Any, **kwargs: Any) -> None:
        from resilient._pybreaker import notify

        notify(self, what, *args, **kwargs)

    def _tell(self, env: Env) -> None:
        while (change := self._next_news()) is not None:
            try:
                self._tell_one(change, env)
            finally:
                self._told()

    def _tell_one(self, change: Change, env: Env) -> None:
        if change.shared and change.new == OPEN and self._schedule is not None:
            self._extend(change.epoch, change.now + self._scheduled(self._schedule, change.opened))
        if change.shared and self._link is not None:
            self._link.post(change.new, env.clock.at())
        if env.sinks:
            from resilient.events import BreakerChanged

            env.emit(BreakerChanged(self._called, change.old, change.new, change.reason))
        if self._listeners:
            self._notify("state_change", change.old, change.new)

    def _scheduled(self, schedule: Callable[[int], float], opened: int) -> float:
        try:
            return seconds("cooldown", schedule(opened), zero=True)
        except Exception:
            # It is asked while somebody's call fails, and that caller must see its own error, not this one.
            import logging

            logging.getLogger("resilient").exception(
                "%s: cooldown(%d) is of no use; %g s instead", self._called, opened, DEFAULT_COOLDOWN
            )
            return DEFAULT_COOLDOWN

    # -- by hand -------------------------------------------------------------------------------------------------

    def isolate(self) -> Isolation:
        """Refuse every call until the returned handle, and every other one, is released."""
        return Isolation(self)

    def disable(self) -> None:
        """Let every call pass and learn nothing, until `enable`. An isolated breaker still refuses."""
        self._by_hand(lambda now: self._switch(True, "disabled", now))

    def enable(self) -> None:
        """Go on from where `disable` found it."""
        self._by_hand(lambda now: self._switch(False, "enabled", now))

    def reset(self) -> None:
        """Close the circuit and forget what was learned. The totals stay, and so do `isolate` and `disable`."""
        self._by_hand(lambda now: self._force(CLOSED, "reset", now))

    def refresh(self) -> None:
        """Bring storage and breaker up to date with each other, now. Blocks; a background thread does it every second.

        Errors of the storage are logged once per outage and go no further. Does nothing without a storage.
        """
        if self._link is not None:
            self._link.refresh(self)

    def _obey(self, state: str, remaining: float, epoch: int) -> bool:
        """Take over what a storage says, unless the circuit has changed since `epoch`; whether it was looked at."""
        now = self._env.clock.now()
        with self._lock:
            if epoch != self._epoch:
                return False
            mine = self._state
            if mine == OPEN and state == OPEN:
                # It failed elsewhere after it failed here.
                self._until = max(self._until, now + remaining)
                self._show_locked("so says the storage", now, False)
            elif state == OPEN or (state == CLOSED and mine != CLOSED) or (state == HALF_OPEN and mine == CLOSED):
                self._opened, self._until = 0 if state == CLOSED else self._opened + 1, now + remaining
                self._enter_locked(state, "so says the storage", now, shared=False)
        if self._news:
            self._tell(self._env)
        return True

    def snapshot(self) -> dict[str, Any]:
        """The state as plain JSON-able data. The remaining time is in seconds, so that another process can go on."""
        wait = self._until - self._env.clock.now() if self._state == OPEN else 0.0
        calls, failures, slow = self._totals()
        return {
            "version": 1,
            "state": self._state,
            "remaining": max(0.0, wait),
            "opened": self._opened,
            "disabled": self._disabled,
            "cause": self._cause,
            "calls": calls,
            "failures": failures,
            "slow_calls": slow,
            "rejected": self._rejected,
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a `snapshot`: same state, remaining time, openings and totals. Windows start empty.

        Calls in flight say nothing about the restored state. `ValueError` or `TypeError` names what is wrong, and then
        nothing has changed.
        """
        data = _checked(snapshot)

        def go_on(now: float) -> None:
            self._force(data["state"], "restored", now, remaining=data["remaining"], opened=data["opened"])
            self._switch(data["disabled"], "restored", now)
            with self._lock:
                self._calls, self._failures = data["calls"], data["failures"]
                self._slow, self._rejected = data["slow_calls"], data["rejected"]
            self._cause = data["cause"]

        self._by_hand(go_on)

    def _by_hand(self, act: Callable[[float], object]) -> None:
        act(self._env.clock.now())
        if self._news:
            self._tell(self._env)

    # -- live numbers --------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """What calls meet: "closed", "open" (also while isolated) or "half-open". Open lasts until a call probes."""
        return self._seen

    @property
    def isolated(self) -> bool:
        """Whether a handle of `isolate` is not released yet."""
        return self._isolated > 0

    @property
    def disabled(self) -> bool:
        """Whether `disable` is in force."""
        return self._disabled

    @property
    def retry_after(self) -> float | None:
        """The seconds until a call has a chance; None while calls pass, and while isolated."""
        return self._wait(self._env.clock.now())

    @property
    def failure_rate(self) -> float:
        """The share of failures that the trip rules judge by (by default: last 100 calls); 0.0 while not closed."""
        return self._share(self._env.clock.now())

    @property
    def calls(self) -> int:
        """The calls that ended as failure or success and were not too late, since the breaker was made."""
        return self._totals()[0]

    @property
    def failures(self) -> int:
        """Those of `calls` that failed."""
        return self._totals()[1]

    @property
    def slow_calls(self) -> int:
        """Those of `calls` that were slow (0 without a `SlowRate`)."""
        return self._totals()[2]

    @property
    def rejected(self) -> int:
        """The calls that were refused, or (with `shadow`) would have been."""
        return self._rejected

    @property
    def opened(self) -> int:
        """How many times in a row the circuit has opened; 0 once it has closed."""
        return self._opened


class Isolation:
    """Keeps every call out of a breaker until it is released. A context manager; releasing it twice does no harm."""

    __slots__ = ("_breaker",)

    def __init__(self, breaker: Circuit) -> None:
        self._breaker: Circuit | None = breaker
        breaker._by_hand(lambda now: breaker._hold(1, "isolated", now))

    def release(self) -> None:
        """Let calls in again, unless another handle is still held."""
        # One swap, free of calls: of two threads that release the same handle one gets the breaker.
        breaker, self._breaker = self._breaker, None
        if breaker is not None:
            breaker._by_hand(lambda now: breaker._hold(-1, "released", now))

    def __enter__(self) -> Isolation:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.release()


def _checked(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """What `restore` takes over, or an error that says what is wrong with it."""
    if not isinstance(snapshot, Mapping):
        raise TypeError(f"snapshot must be a mapping, not {snapshot!r}")
    data = dict(snapshot)
    if data.get("version") != 1:
        raise ValueError(f"snapshot: version must be 1, not {data.get('version')!r}")
    if data.get("state") not in (CLOSED, OPEN, HALF_OPEN):
        raise ValueError(f"snapshot: state must be 'closed', 'open' or 'half-open', not {data.get('state')!r}")
    data["remaining"] = seconds("snapshot: remaining", data.get("remaining", 0.0), zero=True)
    data["disabled"] = data.get("disabled", False)
    if not isinstance(data["disabled"], bool):
        raise TypeError(f"snapshot: disabled must be true or false, not {data['disabled']!r}")
    data["cause"] = data.get("cause")
    if not isinstance(data["cause"], str | None):
        raise TypeError(f"snapshot: cause must be a string or None, not {data['cause']!r}")
    for count in ("opened", "calls", "failures", "slow_calls", "rejected"):
        data[count] = whole(f"snapshot: {count}", data.get(count, 0), least=0)
    return data
