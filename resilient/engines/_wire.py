"""What goes to an engine and comes back, as JSON: orders to call a function, answers, errors, and how sagas ended.

An order names a step's function, or what undoes it, with arguments by their annotations: one value, however many
arguments there are. Data is never executed: what an order names is looked up among importable functions. An error comes
back as its own class if this process knows that class, and as an `Exception` with its text if not. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from resilient._codec import Form, Json
from resilient._journal import Step, Undoing, call_form, found, name_of, result_form, revived
from resilient._retry_after import hint
from resilient._run import called
from resilient._undo import UNKNOWN
from resilient.errors import Rejected, SagaAborted, SagaStuck, StoreError
from resilient.policy import Env
from resilient.retry import BASE, LIMIT, Retry

__all__ = ["Ending", "Order", "Told", "bound", "error_of", "kept_error", "order_of", "plain", "tell", "wants", "write"]


class Told(Struct, omit_defaults=True):
    """What an engine is told of a `Retry`: numbers, and the names of errors (and predicates) that are retried."""

    attempts: int
    first: float
    factor: float
    cap: float
    on: list[str]
    named: list[str] = []
    asks: list[str] = []
    after: float = 0.0
    total: float | None = None
    jitter: bool = False

    def delay(self, number: int, error: Exception, env: Env) -> float:
        """The seconds to wait after attempt `number`, which failed with `error`."""
        wait = min(self.cap, self.first * self.factor ** min(number - 1, 32))
        if self.jitter:
            wait *= env.rng.random()
        return max(wait, min(hint(error, env), self.after)) if self.after else wait


class Order(Struct, omit_defaults=True):
    """Call a function; with `undo`, what undoes it (`result` is the step's value, in an envelope, if it is known)."""

    saga: str
    id: str
    number: int
    name: str
    function: str
    args: Raw = Raw(b"[]")
    kwargs: Raw = Raw(b"{}")
    timeout: float | None = None
    left: float | None = None
    limit: float | None = None
    retry: Told | None = None
    undo: Undoing | None = None
    result: Raw | UnsetType = UNSET

    @property
    def key(self) -> str:
        """The idempotency key of the step."""
        return f"{self.saga}/{self.id}/{self.number}"


class Ending(Struct, omit_defaults=True):
    """How a saga failed: "aborted", "stuck" or "left" (as it is, with `cause` for the caller)."""

    state: str
    text: str
    errors: list[Raw] = []
    cause: Raw | UnsetType = UNSET
    notes: list[str] = []

    @classmethod
    def of(cls, error: Exception) -> Ending:
        """How the saga ended that raises `error`."""
        notes = [str(note) for note in getattr(error, "__notes__", [])]
        cause = error.__cause__
        if not isinstance(error, (SagaAborted, SagaStuck)):
            return cls("left", str(error), [], Raw(kept_error(error)), notes)
        why = Raw(kept_error(cause)) if isinstance(cause, Exception) else UNSET
        if isinstance(error, SagaStuck):
            return cls("stuck", error.message, [Raw(kept_error(one)) for one in error.exceptions], why, notes)
        return cls("aborted", str(error.args[0]), [], why, notes)

    def error(self, saga: str, id: str) -> Exception:
        """The error that the caller gets."""
        cause = error_of(bytes(self.cause)) if self.cause is not UNSET else None
        made: Exception
        if self.state == "left" and cause is not None:
            made, cause = cause, None
        elif self.state == "stuck":
            made = SagaStuck(self.text, [error_of(bytes(one)) for one in self.errors], saga, id)
        else:
            made = SagaAborted(self.text, saga, id)
        made.__cause__ = cause
        for note in self.notes:
            made.add_note(note)
        return made


write: Callable[[Any], bytes] = msgspec.json.Encoder().encode
_order = msgspec.json.Decoder(Order).decode
_errors = Form(Json(limit=100_000_000), Any, (Exception,))


def plain(value: Any) -> Any:
    """A struct, or its JSON text, as plain data: what engines that speak JSON by themselves are given."""
    return msgspec.json.decode(value if isinstance(value, bytes) else write(value))


def order_of(data: Any) -> Order:
    """An order again, from plain data."""
    return _order(write(data))


def kept_error(error: Exception) -> bytes:
    """An error as JSON, in an envelope."""
    return _errors.keep_error(error)


def error_of(data: bytes) -> Exception:
    """An error again. Only classes that are loaded here are used, none is imported."""
    try:
        error = _errors.outcome(data)[1]
    except StoreError:
        error = None
    if error is not None:
        return error
    # Neither its class nor the one above it is here.
    kept = msgspec.json.decode(data).get("error", {})
    return RuntimeError(f"{kept.get('type')}: {kept.get('message')}")


# -- policies --------------------------------------------------------------------------------------------------------


def _named(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def tell(retry: Any, what: str) -> Told:
    """What to tell an engine of `retry`. `TypeError` for what it cannot be told."""
    if not isinstance(retry, Retry):
        raise TypeError(f"{what} must be a Retry where an engine runs the saga, not {retry!r}: guard the function")
    for setting, given in (("until", retry.until), ("a tenacity strategy", retry._engine)):
        if given is not None:
            raise TypeError(
                f"{what}: no engine can be told of {setting}: guard the function itself, @Retry(…) over its def, and "
                "the engine sees it as one attempt"
            )
    classes, named, predicates = retry._wanted
    asks = [name_of(one, f"the predicate of {what}") for one in predicates]
    fixed = retry.wait is not None
    return Told(
        retry.attempts,
        float(retry.wait) if fixed else BASE,
        1.0 if fixed else 2.0,
        float(retry.wait) if fixed else LIMIT,
        [_named(one) for one in classes],
        [_named(one) for one in named],
        asks,
        retry.retry_after,
        retry.total,
        not fixed,
    )


def wants(told: Told | None, error: Exception) -> bool:
    """Whether `error` is retried, by the same rules as in `Retry`."""
    if told is None:
        return False
    names = {_named(cls) for cls in type(error).__mro__}
    if names.intersection(told.on) and (not isinstance(error, Rejected) or names.intersection(told.named)):
        return True
    return any(found(one)(error) for one in told.asks)


# -- calls -----------------------------------------------------------------------------------------------------------


def bound(order: Order) -> tuple[Any, Any, Any, Callable[[Any], bytes]]:
    """The function that an order names, its arguments, and how its result is kept."""
    function = found(order.function)
    if order.undo is None:
        args, kwargs = call_form(function, order.function).read(order.args, order.kwargs)
        return function, args, kwargs, result_form(function, order.function).keep
    value: Any = UNKNOWN
    if order.result is not UNSET:
        # (`StoreError` for anything but a value.)
        value = result_form(function, order.function).outcome(bytes(order.result))[0]
    undo = revived(Step(order.number, order.name, order.key, order.undo), value)
    return *undo.bound(), _nothing


def _nothing(_: Any) -> bytes:
    """What is kept of a compensation's value."""
    return b'{"v":1,"ok":null}'


def unfit(function: Any) -> TypeError:
    """A coroutine function where the saga is a plain function."""
    return TypeError(f"{called(function)} is async, and this saga is not: make its body async def")
