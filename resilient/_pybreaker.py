"""pybreaker's contracts: its listeners and storages plug in unchanged, and its breakers can be adopted.

A storage is written when the state changes and read once a second, both by one daemon thread for all breakers: never on
the path of a call, never on an event loop. Storages share the state, not the counts of failures. Storages that fail
are logged once per outage, and decisions go on locally. Wall-clock time is used only to talk to storages.
Listeners run in the thread of the call. One that raises is logged once and removed; the caller never notices.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from datetime import UTC, datetime
from typing import Any, TypeVar

import pybreaker

from resilient._circuit import Circuit
from resilient._lifecycle import CLOSED, HALF_OPEN, OPEN
from resilient._trip import AnyOf, Consecutive
from resilient._window import Streak

__all__ = ["INTERVAL", "Link", "StateFace", "View", "adopted", "attach", "notify"]

INTERVAL = 1.0
"""Seconds between two looks at the storages."""

_METHODS = ("before_call", "failure", "success", "state_change")
_log = logging.getLogger("resilient")

C = TypeVar("C", bound=Circuit)


def attach(circuit: Circuit, listeners: tuple[Any, ...], storage: Any) -> None:
    """Give `circuit` its listeners and storage, once they are known to be such."""
    for listener in listeners:
        if isinstance(listener, type) or not all(callable(getattr(listener, name, None)) for name in _METHODS):
            raise TypeError(f"listeners must be pybreaker.CircuitBreakerListener objects, not {listener!r}")
    circuit._listeners = listeners
    if storage is not None:
        if not isinstance(storage, pybreaker.CircuitBreakerStorage):
            raise TypeError(f"storage must be a pybreaker.CircuitBreakerStorage, not {storage!r}")
        circuit._link = Link(storage)
        REFRESHER.watch(circuit)


def adopted(kind: type[Any], existing: Any) -> Any:
    """See `CircuitBreaker.adopt`."""
    if not isinstance(existing, pybreaker.CircuitBreaker):
        raise TypeError(f"adopt takes a pybreaker.CircuitBreaker, not {existing!r}")
    excluded: Any = existing.excluded_exceptions
    made = kind(
        existing.name,
        Consecutive(max(1, existing.fail_max)),
        # A type is a class for us, whatever its metaclass: pybreaker takes it for a predicate that is always true.
        ignore=tuple(excluded),
        cooldown=existing.reset_timeout,
        probes=max(1, existing.success_threshold),
        listeners=existing.listeners,
        storage=existing._state_storage,  # there is no public way to it
    )
    made.refresh()
    return made


# -- listeners -------------------------------------------------------------------------------------------------------


class StateFace:
    """A state as listeners know it: an object with a name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class View:
    """A breaker as listeners know it: the attributes of a `pybreaker.CircuitBreaker`, to read."""

    __slots__ = ("_circuit",)

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and other._circuit is self._circuit

    def __hash__(self) -> int:
        return hash(self._circuit)

    @property
    def name(self) -> str | None:
        """The name of the breaker."""
        return self._circuit.name

    @property
    def current_state(self) -> str:
        """ "closed", "open" or "half-open"."""
        return self._circuit.state

    @property
    def state(self) -> StateFace:
        """An object with the state as its `name`."""
        return StateFace(self._circuit.state)

    @property
    def fail_counter(self) -> int:
        """The failures in a row (without `Consecutive`: in this closed state); while open, those that opened it."""
        circuit, tally = self._circuit, self._circuit._tally
        if tally is None:
            return self.fail_max or circuit._last
        for window in tally.windows:
            if isinstance(window, Streak):
                return window.streak if window.mark == tally.n else 0
        return tally.failures

    @property
    def success_counter(self) -> int:
        """The probes that succeeded in this half-open state."""
        return self._circuit._won

    @property
    def fail_max(self) -> int | None:
        """The limit of `Consecutive`, or None with other rules."""
        trip: Any = self._circuit.trip
        rules = trip.rules if isinstance(trip, AnyOf) else (trip,)
        return next((rule.failures for rule in rules if isinstance(rule, Consecutive)), None)

    @property
    def reset_timeout(self) -> float:
        """The cooldown in seconds (with a function: of the next opening)."""
        schedule = self._circuit._schedule
        return self._circuit._cooldown if schedule is None else schedule(self._circuit.opened + 1)

    @property
    def success_threshold(self) -> int:
        """The successful probes that close the circuit."""
        return self._circuit._probes

    @property
    def excluded_exceptions(self) -> tuple[Any, ...]:
        """What `ignore` was made of."""
        circuit: Any = self._circuit
        listed: tuple[Any, ...] = circuit._ignore.listed()
        return listed

    @property
    def listeners(self) -> tuple[Any, ...]:
        """The listeners that have not raised."""
        return self._circuit._listeners


def notify(circuit: Circuit, what: str, /, *args: Any, **kwargs: Any) -> None:
    """Tell each listener. Called outside every lock."""
    if what == "state_change":
        args = tuple(map(StateFace, args))
    view = View(circuit)
    for listener in circuit._listeners:
        try:
            getattr(listener, what)(view, *args, **kwargs)
        except Exception:
            circuit._listeners = tuple(kept for kept in circuit._listeners if kept is not listener)
            _log.exception("%s: the listener %r raised and was removed", circuit._called, listener)


# -- storages --------------------------------------------------------------------------------------------------------


class Link:
    """A circuit and a storage, kept alike: our changes are written, changes that others made are taken over.

    Only *changes* of what the storage says count. A storage that has lost its memory, or cannot be reached and says
    what it falls back to, changes nothing here.
    """

    __slots__ = ("_failing", "_known", "_lock", "_pending", "_turn", "storage")

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.forked()
        self._pending: tuple[str, float] | None = None
        self._known: tuple[str, int | None] | None = None
        self._failing = False

    def forked(self) -> None:
        """Make new locks: in the child of a fork nobody gives the old ones back."""
        self._lock = threading.Lock()  # around single assignments
        self._turn = threading.Lock()  # one refresh at a time; no call ever waits for it

    def post(self, state: str, at: float) -> None:
        """Have the state written soon. Half-open is not: who probes is each process's own affair."""
        if state != HALF_OPEN:
            with self._lock:
                self._pending = (state, at)
            REFRESHER.wake()

    def refresh(self, circuit: Circuit) -> None:
        """Write what is to be written, then take over what others changed."""
        with self._turn:
            if self._write():
                self._read(circuit)

    def _write(self) -> bool:
        """Whether nothing is left to be written, or it could be."""
        pending = self._pending
        if pending is None:
            return True
        state, at = pending
        with _Attempt(self) as attempt:
            if state == OPEN:
                self.storage.opened_at = datetime.fromtimestamp(at, UTC)
            else:
                self.storage.reset_counter()
            # A server that is down may take seconds to say so: ask it no more once it has.
            if not attempt.failed:
                self.storage.reset_success_counter()
            if not attempt.failed:
                self.storage.state = state
        if attempt.failed:
            return False
        with self._lock:
            if self._pending is pending:
                self._pending = None
        opened = None if self._known is None else self._known[1]
        self._known = (state, int(at) if state == OPEN else opened)
        return True

    def _read(self, circuit: Circuit) -> None:
        epoch = circuit._epoch
        state: object = None
        opened_at: datetime | None = None
        with _Attempt(self) as attempt:
            state = self.storage.state
            if not attempt.failed:
                opened_at = self.storage.opened_at
        if attempt.failed or self._pending is not None or state not in (CLOSED, OPEN, HALF_OPEN):
            return
        opened = None if opened_at is None else int(_utc(opened_at).timestamp())
        seen = (str(state), opened)
        first, known = self._known is None, self._known or (CLOSED, None)
        if seen == known or (opened is None and known[1] is not None):
            self._known = known
            return
        remaining = 0.0
        if opened_at is not None and state == OPEN:
            remaining = self._remaining(circuit, _utc(opened_at))
        if (first and state == CLOSED) or circuit._obey(seen[0], remaining, epoch):
            self._known = seen

    @staticmethod
    def _remaining(circuit: Circuit, opened_at: datetime) -> float:
        cooldown = circuit._cooldown
        if circuit._schedule is not None:
            cooldown = circuit._scheduled(circuit._schedule, circuit.opened + 1)
        # Redis storages cut off the fraction of a second, which would end the cooldown early.
        cut = 0.0 if opened_at.microsecond else 1.0
        left = opened_at.timestamp() + cut + cooldown - circuit._env.clock.at()
        return min(cooldown, max(0.0, left))


def _utc(instant: datetime) -> datetime:
    return instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)


class _Attempt(logging.Filter):
    """One conversation with a storage: whether it failed, by raising or (as `CircuitRedisStorage` does) by logging.

    The first failure of an outage is logged by us; the rest of it is silent.
    """

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link
        self._thread = threading.get_ident()
        logger: object = getattr(link.storage, "logger", None)
        self._logger = logger if isinstance(logger, logging.Logger) else None
        self.failed = False
        self._why: Any = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread or record.levelno < logging.ERROR:
            return True
        self.failed, self._why = True, self._why or record.exc_info
        return False

    def __enter__(self) -> _Attempt:
        if self._logger is not None:
            self._logger.addFilter(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if self._logger is not None:
            self._logger.removeFilter(self)
        if error is not None:
            self.failed, self._why = True, error
        if self.failed and not self._link._failing:
            _log.error("the storage %r fails; the state is decided locally", self._link.storage, exc_info=self._why)
        self._link._failing = self.failed
        return isinstance(error, Exception)


class Refresher:
    """The one daemon thread that refreshes every breaker with a storage. Ends by itself when there are none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._circuits: weakref.WeakSet[Any] = weakref.WeakSet()
        self.thread: threading.Thread | None = None

    def watch(self, circuit: Any) -> None:
        """Refresh `circuit` from now on, until nobody else has it any more."""
        with self._lock:
            self._circuits.add(circuit)
        self.wake()

    def wake(self) -> None:
        """Refresh soon."""
        self._news.set()
        with self._lock:
            if self.thread is None and self._circuits:
                self.thread = threading.Thread(target=self._run, name="resilient-refresher", daemon=True)
                self.thread.start()

    def after_fork(self) -> None:
        """Threads do not survive a fork: start over in the child."""
        circuits = list(self._circuits)
        self.__init__()  # type: ignore[misc]
        for circuit in circuits:
            circuit._forked()
            circuit._link.forked()
            self.watch(circuit)

    def _run(self) -> None:
        while self._round():
            self._news.wait(INTERVAL)

    def _round(self) -> bool:
        # In a function of its own, so that no local name keeps a breaker alive while the thread waits.
        self._news.clear()
        with self._lock:
            circuits = list(self._circuits)
            if not circuits:
                self.thread = None
                return False
        for circuit in circuits:
            circuit.refresh()
        return True


REFRESHER = Refresher()
os.register_at_fork(after_in_child=REFRESHER.after_fork)
