"""Every error that resilient raises of its own accord, and nothing else.

    ResilientError
    ├─ Rejected                     the call did not run; safe to try elsewhere
    │  ├─ BreakerOpen               (also pybreaker.CircuitBreakerError; defined in breaker.py)
    │  ├─ BudgetSpent
    │  ├─ BulkheadFull
    │  ├─ DeadlineExceeded          no time was left to start it
    │  └─ RateLimited
    ├─ CallTimeout                  also TimeoutError; the call may have run
    ├─ IdempotencyError
    │  ├─ InDoubt                   a former attempt began and never said how it ended
    │  ├─ InFlight                  another owner holds the key
    │  └─ KeyReused                 same key, other arguments
    ├─ SagaError
    │  ├─ Incompatible              its journal is of another version, or its body departs from it
    │  ├─ SagaAborted               failed, and every compensation is done; `__cause__` is the step's error
    │  ├─ SagaLost                  another process has taken it over; here nothing more was run or undone
    │  └─ SagaStuck                 an ExceptionGroup: a compensation failed for good; a person is needed
    └─ StoreError                   the store could not answer (and whether the write may have happened)

    UserWarning
    └─ OrderWarning                 the policies are stacked in an order that contradicts itself

Your own exceptions are never wrapped: what the function raised is what the caller sees.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

__all__ = [
    "BudgetSpent",
    "BulkheadFull",
    "CallTimeout",
    "DeadlineExceeded",
    "IdempotencyError",
    "InDoubt",
    "InFlight",
    "Incompatible",
    "KeyReused",
    "OrderWarning",
    "RateLimited",
    "Rejected",
    "ResilientError",
    "SagaAborted",
    "SagaError",
    "SagaLost",
    "SagaStuck",
    "StoreError",
]


class ResilientError(Exception):
    """The root of the errors that resilient raises itself."""


class Rejected(ResilientError):
    """A policy refused the call: the function did not run, and trying elsewhere is safe.

    `policy` is the name of the policy that refused. `retry_after` is the number of seconds after which a new
    call has a chance, or None where nobody can know.
    """

    # A rejection is a hot path of its own: all that it knows is in `args`, so that `Exception.__new__` alone can make
    # one, and its text is made when somebody reads it.
    __slots__ = ()

    reason = "refused the call"

    def __init__(self, policy: str, retry_after: float | None = None) -> None:
        super().__init__(policy, retry_after)

    @property
    def policy(self) -> str:
        """The name of the policy that refused."""
        name: str = self.args[0]
        return name

    @property
    def retry_after(self) -> float | None:
        """The seconds after which a new call has a chance, or None where nobody can know."""
        seconds: float | None = self.args[1]
        return seconds

    def __str__(self) -> str:
        text = f"{self.policy}: {self.reason}"
        return text if self.retry_after is None else f"{text}; retry after {self.retry_after:.3g} s"


class BulkheadFull(Rejected):
    """Every slot is taken, and the queue is full or the wait was too long."""

    reason = "every slot is taken"


class RateLimited(Rejected):
    """The rate is used up, and the permitted wait is too short for the next permit."""

    reason = "the rate is used up"


class BudgetSpent(Rejected):
    """A budget shared by several calls (of retries, of hedges) has nothing left."""

    reason = "the budget is spent"


class DeadlineExceeded(Rejected):
    """No time was left to start the call: the ambient deadline has passed, or would before it could begin."""

    reason = "no time is left to start the call"


class CallTimeout(ResilientError, TimeoutError):
    """The call took longer than its time limit. It may have run, in part or whole.

    `policy` is the name of the policy that cut it off; `seconds` is the limit that it had.
    """

    def __init__(self, policy: str, seconds: float) -> None:
        self.policy = policy
        self.seconds = seconds

    def __str__(self) -> str:
        return f"{self.policy}: no answer within {self.seconds:.3g} s"

    def __reduce__(self) -> tuple[type[CallTimeout], tuple[str, float]]:
        return type(self), (self.policy, self.seconds)


class IdempotencyError(ResilientError):
    """The call was not made, or its result is not the key's. `policy` is the policy's name, `key` the user's key."""

    reason = "the key cannot be used"

    def __init__(self, policy: str, key: str) -> None:
        self.policy = policy
        self.key = key

    def __str__(self) -> str:
        return f"{self.policy}: {self.reason} (key {self.key!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).__new__, (type(self),), self.__dict__


class InFlight(IdempotencyError):
    """Another call with this key runs, or a saga with this id, and waiting was not wanted, or took too long.

    `retry_after` is what is left of its lease in seconds: by then it has ended, been renewed, or is in doubt.
    """

    reason = "another call with this key is running"

    def __init__(self, policy: str, key: str, retry_after: float, reason: str | None = None) -> None:
        super().__init__(policy, key)
        self.retry_after = retry_after
        if reason is not None:
            self.reason = reason


class InDoubt(IdempotencyError):
    """Attempt number `attempt` began and never said how it ended: whether its effect happened, nobody here knows.

    Raised to a later caller; and to the owner itself if it lost its lease while it ran: then `result` is what the
    function returned here, which is not stored (`...` where there is none).
    """

    reason = "an earlier attempt began and never said how it ended"

    def __init__(self, policy: str, key: str, attempt: int, result: object = ..., reason: str | None = None) -> None:
        super().__init__(policy, key)
        self.attempt = attempt
        self.result = result
        if reason is not None:
            self.reason = reason

    def __str__(self) -> str:
        return f"{self.policy}: {self.reason} (key {self.key!r}, attempt {self.attempt})"


class KeyReused(IdempotencyError):
    """The key belongs to a call with other arguments. `stored` and `given` are the two fingerprints."""

    reason = "the key was used before, with other arguments"

    def __init__(self, policy: str, key: str, stored: str, given: str) -> None:
        super().__init__(policy, key)
        self.stored = stored
        self.given = given


class SagaError(ResilientError):
    """A saga did not end well, or cannot go on. `saga` is its name, `id` its id."""

    def __init__(self, text: str, saga: str, id: str) -> None:
        super().__init__(text, saga, id)

    @property
    def saga(self) -> str:
        """The name of the saga."""
        return str(self.args[-2])

    @property
    def id(self) -> str:
        """The id of the saga."""
        return str(self.args[-1])

    def __str__(self) -> str:
        # (A barrier's key need not be that of a saga.)
        return f"saga {self.saga} ({self.id}): {self.args[0]}" if self.saga and self.id else str(self.args[0])


class Incompatible(SagaError):
    """The saga's journal is of another version of it, or its body departs from it: nothing was run, nothing undone."""


class SagaAborted(SagaError):
    """A step failed, and everything that was done is undone. `__cause__` is the error of the step."""


class SagaLost(SagaError):
    """Another process has taken the saga over, since the lease of this one was over: it may have stood still so long.

    This one stopped where it was: it ran nothing more and undid nothing. How the saga ends, the other one decides; a
    call of a durable saga with the same id waits for that end. What a step did meanwhile may be done twice, with one
    `step_key`.
    """


class SagaStuck(SagaError, ExceptionGroup[Exception]):
    """Compensations failed for good: what they should have undone is not undone, and a person is needed.

    `exceptions` are their errors, `__cause__` is what made the saga fail. The other compensations have run.
    """

    def __new__(cls, text: str, exceptions: Sequence[Exception], saga: str = "", id: str = "") -> Self:
        made = super().__new__(cls, text, exceptions)
        made._names = saga, id
        return made

    _names: tuple[str, str]

    def __init__(self, text: str, exceptions: Sequence[Exception], saga: str = "", id: str = "") -> None:
        Exception.__init__(self, text, exceptions)

    @property
    def saga(self) -> str:
        """The name of the saga."""
        return self._names[0]

    @property
    def id(self) -> str:
        """The id of the saga."""
        return self._names[1]

    def derive(self, excs: Sequence[Exception]) -> Self:  # type: ignore[override]
        """The same, of some of the errors."""
        return type(self)(self.message, excs, *self._names)

    def __str__(self) -> str:
        return f"saga {self.saga} ({self.id}): {self.message} ({len(self.exceptions)} of them)"


class StoreError(ResilientError):
    """The store could not answer.

    `maybe_written`: whether the operation may have been carried out all the same (the connection was lost after it was
    sent). False: it was not. `result` is what the guarded function returned, if it had run and its result could not be
    stored (`...` where there is none).
    """

    def __init__(self, text: str, *, maybe_written: bool = False) -> None:
        super().__init__(text)
        self.maybe_written = maybe_written
        self.result: object = ...

    def __reduce__(self) -> tuple[object, ...]:
        return type(self).__new__, (type(self), *self.args), {"args": self.args, **self.__dict__}


class OrderWarning(UserWarning):
    """The policies around a function contradict each other; the text says which and why."""
