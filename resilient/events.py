"""What policies report: frozen records of decisions, one class a decision.

An event is built only when an `Env` has a sink, and only off the success path (`CallEnded` alone is on it, and is
compiled in only for sinks that ask for calls). Instants are monotonic seconds, durations are seconds.
Everything here is immutable and may be shared between threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = [
    "BreakerChanged",
    "CallEnded",
    "Compensated",
    "Event",
    "FellBack",
    "GaveUp",
    "Hedged",
    "LeaseLost",
    "Refused",
    "Replayed",
    "Retrying",
    "SagaEnded",
    "Sink",
    "StepDone",
    "TimedOut",
    "Unprotected",
]


@dataclass(frozen=True, slots=True)
class Event:
    """A decision of the policy named `policy`."""

    policy: str


@dataclass(frozen=True, slots=True)
class Retrying(Event):
    """Attempt number `attempt` failed with `error` (None: with its result); the next begins in `delay` seconds."""

    attempt: int
    delay: float
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class GaveUp(Event):
    """`attempt` attempts in `elapsed` seconds were not enough; the caller gets `error` (None: the last result)."""

    attempt: int
    elapsed: float
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class BreakerChanged(Event):
    """The breaker went from state `old` to state `new` (pybreaker's names); `reason` says why."""

    old: str
    new: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """A call was refused with `error`. With `shadow` it went through all the same."""

    error: BaseException
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class TimedOut(Event):
    """A call was cut off after `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hedged(Event):
    """No answer yet: attempt number `attempt` was started beside the others, `after` seconds after the first."""

    attempt: int
    after: float


@dataclass(frozen=True, slots=True)
class FellBack(Event):
    """The call failed with `error`, and the fallback answers in its place."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Replayed(Event):
    """The call with this `key` did not run: its caller got what attempt number `attempt` left in the store."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True)
class LeaseLost(Event):
    """The call with this `key` runs or ended when the key was another's already; what it returns is not stored.

    With `saga` it is a saga with this id, which another process has: it stopped where it was, and undid nothing.
    """

    key: str
    attempt: int
    saga: bool = False


@dataclass(frozen=True, slots=True)
class Unprotected(Event):
    """The store failed with `error`, and the call with this `key` ran all the same, as was asked for."""

    key: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """Step `step` of the saga with this `id` ended, with `error` or (None) well. `policy` is the saga's name."""

    id: str
    step: str
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class Compensated(Event):
    """What step `step` of the saga with this `id` did is undone; with an `error` it is not, and a person is needed."""

    id: str
    step: str
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class SagaEnded(Event):
    """The saga with this `id` is "done", "aborted" or "stuck".

    `seconds`: how long this run of it took; None if nobody listened when it began. `recovered`: another run began it.
    """

    id: str
    state: str
    # Equal are events that say the same of a saga, however long it took.
    seconds: float | None = field(default=None, compare=False)
    recovered: bool = False


@dataclass(frozen=True, slots=True)
class CallEnded(Event):
    """A guarded call ended after `seconds`, with `error` or (None) with a result. Only for sinks with `wants_calls`."""

    seconds: float
    error: BaseException | None


Sink = Callable[[Event], None]
"""What takes events: any callable. It is called outside every lock and must be quick. With a true attribute
`wants_calls` it also gets a `CallEnded` for each call of functions decorated after it was subscribed."""
