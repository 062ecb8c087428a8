"""The circuit breaker: stop calling what keeps failing, and find out with few calls when it works again.

Promises: a call is judged only by the epoch that let it in; half-open lets in `probes` calls at once and no more; a
hung probe, a cancelled one, or an observer that raises cannot wedge it. Does not promise that threads see the same
window at the same instant, nor failure counts shared between processes (with a storage, the state is shared).
Cost: a success is one increment, without lock or clock (docs/decisions/0002); a refusal builds one exception.
Safe from any thread, asyncio loop and trio run at once. No lock is held while your code, a listener or a storage runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pybreaker import CircuitBreakerError

from resilient._circuit import DEFAULT_COOLDOWN, NAMELESS, Circuit, Cooldown, Isolation
from resilient._trip import Consecutive, FailureRate, SlowRate, Trip
from resilient._types import Call
from resilient._verdict import Errors, quick, text
from resilient._window import PASS, Permit
from resilient.errors import Rejected
from resilient.policy import Env, Policy

if TYPE_CHECKING:
    import pybreaker

__all__ = ["BreakerOpen", "CircuitBreaker", "Consecutive", "FailureRate", "Isolation", "SlowRate", "Verdict"]

Verdict: TypeAlias = Literal["failure", "success", "ignored"]
"""What a call says about the circuit."""

Judge: TypeAlias = "Callable[[Any, Exception | None], Verdict | None]"

# `permit.n += 1` is atomic only under the GIL, which CPython gives up at calls, backward jumps and function entry.
GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
# `BreakerOpen(...)` without the cost of its `__init__`.
_new: Callable[..., BreakerOpen] = Exception.__new__
_DEFAULT_TRIP = FailureRate(0.5, over=100, minimum=10)
_ON, _IGNORE = Errors("on", Exception), Errors("ignore", ())  # shared: most breakers keep the defaults


class BreakerOpen(Rejected, CircuitBreakerError):
    """The circuit is open (or every probe's place is taken): the function did not run.

    `policy` is the breaker's name, `retry_after` the seconds until a call has a chance (None while isolated), `cause`
    what opened the circuit, as text. The error itself is not kept: its traceback would keep frames alive.
    """

    __slots__ = ()

    reason = "the circuit is open"

    def __init__(self, policy: str, retry_after: float | None = None, cause: str | None = None) -> None:
        Exception.__init__(self, policy, retry_after, cause)

    @property
    def cause(self) -> str | None:
        """What opened the circuit, as text."""
        text: str | None = self.args[2]
        return text

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.cause is None else f"{text} (cause: {self.cause})"


class CircuitBreaker(Circuit, Policy):
    """Refuse calls to what keeps failing with `BreakerOpen`, and let single probes find out when it works again.

    `trip` says when to open: `Consecutive`, `FailureRate`, `SlowRate`, joined by `|`. Failures are errors of `on` that
    are not of `ignore`: exception classes or predicates, or a tuple of both. Results are successes. Everything else
    (`ignore`, errors outside `on`, cancellation, interrupts) counts as neither. `classify(result, error)` may say
    otherwise: "failure", "success", "ignored", or None for the rule above. Blocks and generators have the result None.

    `cooldown` seconds after it opened the circuit is half-open: `probes` calls may pass at once; as many successes
    close it, one failure opens it again. It may be a function of the number of openings in a row (from 1). A probe
    that takes `probe_lease` seconds loses its place to another. With `shadow` everything is decided and reported, and
    nothing refused. `listeners` and `storage` are pybreaker's. `TypeError` or `ValueError` for what makes no sense.

    >>> breaker = CircuitBreaker("payments", Consecutive(3), cooldown=10.0)
    >>> breaker.state, breaker.calls
    ('closed', 0)
    """

    __slots__ = (
        "__weakref__",
        "_classify",
        "_ignore",
        "_on",
        "shadow",
    )

    role: ClassVar[str] = "breaker"  # type: ignore[misc]

    def __init__(
        self,
        name: str | None = None,
        trip: Trip = _DEFAULT_TRIP,
        *,
        on: Any = Exception,
        ignore: Any = (),
        classify: Judge | None = None,
        cooldown: Cooldown = DEFAULT_COOLDOWN,
        probes: int = 1,
        probe_lease: float = 60.0,
        shadow: bool = False,
        listeners: Iterable[Any] = (),
        storage: pybreaker.CircuitBreakerStorage | None = None,
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        if not isinstance(trip, Trip):
            raise TypeError(f"trip must be Consecutive, FailureRate or SlowRate, joined by |, not {trip!r}")
        super().__init__(name, trip, cooldown, probes, probe_lease, GIL and not shadow)
        if classify is not None and not callable(classify):
            raise TypeError(f"classify must be a function of (result, error), not {classify!r}")
        self.shadow = bool(shadow)
        self._on = _ON if on is Exception else Errors("on", on, failures=True)
        self._ignore = _IGNORE if ignore == () else Errors("ignore", ignore)
        self._classify = None if classify is None else quick("classify", classify)
        listeners = tuple(listeners)
        if listeners or storage is not None:
            from resilient._pybreaker import attach

            attach(self, listeners, storage)

    @classmethod
    def adopt(cls, existing: pybreaker.CircuitBreaker) -> CircuitBreaker:
        """A breaker of ours with the settings, listeners, storage and state of a `pybreaker.CircuitBreaker`."""
        from resilient._pybreaker import adopted

        made: CircuitBreaker = adopted(cls, existing)
        return made

    # -- shells --------------------------------------------------------------------------------------------------

    @property
    def _lean(self) -> bool:
        # Whether a success needs nothing but to be counted.
        return GIL and self._classify is None and not self._listeners and not self.trip.timed

    def sync(self, call: Call, env: Env) -> Call:
        """Guard each call."""
        self._env = env
        if self._lean:

            def breaker(*args: Any, **kwargs: Any) -> Any:
                permit = self._permit
                if permit is None:
                    now = env.clock.now()
                    if now < self._shut and not env.sinks:
                        self._rejected += 1
                        raise _new(BreakerOpen, self.name or NAMELESS, self._until - now, self._cause)
                    permit = self._enter(now, env)
                try:
                    value = call(*args, **kwargs)
                except BaseException as error:
                    self._failed(permit, error, 0.0, env)
                    raise
                permit.n += 1
                if permit.cold:
                    self._settle(permit, env)
                return value

        else:

            def breaker(*args: Any, **kwargs: Any) -> Any:
                permit = self._permit or self._enter(env.clock.now(), env)
                if self._listeners:
                    self._notify("before_call", call, *args, **kwargs)
                began = env.clock.now()
                try:
                    value = call(*args, **kwargs)
                except BaseException as error:
                    self._failed(permit, error, began, env)
                    raise
                self._succeeded(permit, value, began, env)
                return value

        return breaker

    def coro(self, call: Call, env: Env) -> Call:
        """Guard each call, until it has been awaited."""
        self._env = env
        if self._lean:

            async def breaker(*args: Any, **kwargs: Any) -> Any:
                permit = self._permit
                if permit is None:
                    now = env.clock.now()
                    if now < self._shut and not env.sinks:
                        self._rejected += 1
                        raise _new(BreakerOpen, self.name or NAMELESS, self._until - now, self._cause)
                    permit = self._enter(now, env)
                try:
                    value = await call(*args, **kwargs)
                except BaseException as error:
                    self._failed(permit, error, 0.0, env)
                    raise
                permit.n += 1
                if permit.cold:
                    self._settle(permit, env)
                return value

        else:

            async def breaker(*args: Any, **kwargs: Any) -> Any:
                permit = self._permit or self._enter(env.clock.now(), env)
                if self._listeners:
                    self._notify("before_call", call, *args, **kwargs)
                began = env.clock.now()
                try:
                    value = await call(*args, **kwargs)
                except BaseException as error:
                    self._failed(permit, error, began, env)
                    raise
                self._succeeded(permit, value, began, env)
                return value

        return breaker

    def gen(self, call: Call, env: Env) -> Call:
        """Guard each generator, from its first item to its end; closing it early says nothing."""
        from resilient._stream import held_gen

        self._env = env
        return held_gen(call, lambda: _Block(self, env, call))

    def stream(self, call: Call, env: Env) -> Call:
        """Guard each async generator, from its first item to its end; closing it early says nothing."""
        from resilient._stream import held_stream

        self._env = env
        return held_stream(call, lambda: _Block(self, env, call))

    # -- blocks --------------------------------------------------------------------------------------------------

    def __enter__(self) -> CircuitBreaker:
        """Let the block in, or raise `BreakerOpen`."""
        block = _Block(self, self._env, self)
        block.__enter__()
        _entered.set((*_entered.get(), block))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Learn from how the block ended."""
        blocks = _entered.get()
        for place in reversed(range(len(blocks))):
            if blocks[place].breaker is self:
                _entered.set(blocks[:place] + blocks[place + 1 :])
                blocks[place].__exit__(kind, error, trace)
                break

    async def __aenter__(self) -> CircuitBreaker:
        """Let the block in, or raise `BreakerOpen`."""
        return self.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Learn from how the block ended."""
        self.__exit__(kind, error, trace)

    # -- off the hot path ----------------------------------------------------------------------------------------

    def _enter(self, now: float, env: Env) -> Permit:
        """Let a call in that found no permit, or raise `BreakerOpen`."""
        permit = self._admit(now)
        if self._news:
            self._tell(env)
        if permit is not None:
            return permit
        if not self.shadow:
            raise self._refusal(now, env)
        self._refusal(now, env)
        return PASS

    def _refusal(self, now: float, env: Env) -> BreakerOpen:
        # No variable may keep it where it is raised: it would know the frame, and the frame would know it.
        if self._isolated:
            refusal = BreakerOpen(self.name or NAMELESS, None, "isolate()")
        else:
            refusal = BreakerOpen(self.name or NAMELESS, self._wait(now), self._cause)
        if env.sinks:
            from resilient.events import Refused

            env.emit(Refused(refusal.policy, refusal, self.shadow))
        return refusal

    def _settle(self, permit: Permit, env: Env) -> None:
        self._cause = self._ended(permit, False, 0.0, env.clock.now(), counted=True) or self._cause
        if self._news:
            self._tell(env)

    def _succeeded(self, permit: Permit, value: Any, began: float, env: Env) -> None:
        if self._classify is not None or self._listeners or not GIL:
            self._learn(permit, None, value, began, env)
            return
        now = env.clock.now()
        if not permit.cold and now - began <= permit.slower_than:
            permit.n += 1
            return
        self._cause = self._ended(permit, False, now - began, now) or self._cause
        if self._news:
            self._tell(env)

    def _failed(self, permit: Permit, error: BaseException, began: float, env: Env) -> None:
        if isinstance(error, Exception):
            self._learn(permit, error, None, began, env)
        else:
            self._forget(permit)

    def _learn(self, permit: Permit, error: Exception | None, value: Any, began: float, env: Env) -> None:
        try:
            verdict = self._verdict(value, error)
        except BaseException:
            self._forget(permit)
            raise
        if verdict == "ignored":
            self._forget(permit)
            return
        now = env.clock.now()
        reason = self._ended(permit, verdict == "failure", now - began, now)
        if reason is not None:
            self._cause = reason if error is None else text(error)
        listeners = self._listeners
        if listeners and verdict == "failure":
            # In pybreaker's order: the failure before the change that it makes, the success after.
            self._notify("failure", error)
        if self._news:
            self._tell(env)
        if listeners and verdict == "success":
            self._notify("success")

    def _verdict(self, value: Any, error: Exception | None) -> Verdict:
        if self._classify is not None:
            verdict = self._classify(value, error)
            if verdict in ("failure", "success", "ignored"):
                return verdict
            if verdict is not None:
                raise ValueError(f"classify must return 'failure', 'success', 'ignored' or None, not {verdict!r}")
        if error is None:
            return "success"
        if (self._on is _ON or error in self._on) and (self._ignore is _IGNORE or error not in self._ignore):
            return "failure"
        return "ignored"

    def describe(self) -> dict[str, Any]:
        """The settings that matter."""
        return {
            "name": self.name,
            "trip": self.trip,
            "on": self._on.listed(),
            "ignore": self._ignore.listed() or None,
            "cooldown": self._schedule or self._cooldown,
            "probes": self._probes,
            "probe_lease": self._lease,
            "shadow": self.shadow or None,
        }


class _Block:
    """One `with` block, generator or stream in the breaker."""

    __slots__ = ("_began", "_call", "_env", "_permit", "breaker")

    _permit: Permit
    _began: float

    def __init__(self, breaker: CircuitBreaker, env: Env, call: Call) -> None:
        self.breaker, self._env, self._call = breaker, env, call

    def __enter__(self) -> None:
        self._permit = self.breaker._permit or self.breaker._enter(self._env.clock.now(), self._env)
        if self.breaker._listeners:
            self.breaker._notify("before_call", self._call)
        self._began = self._env.clock.now()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.breaker._succeeded(self._permit, None, self._began, self._env)
        else:
            self.breaker._failed(self._permit, error, self._began, self._env)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.__exit__(kind, error, trace)


# The blocks that this thread or task is in: a breaker is shared, so it cannot keep them itself.
_entered: ContextVar[tuple[_Block, ...]] = ContextVar("resilient.breaker.entered", default=())
