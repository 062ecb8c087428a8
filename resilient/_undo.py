"""The compensation stack: what has to be called to undo what was done, and the program that does it.

A step's compensation is on the stack before the step runs, since a step may have had its effect and failed all the
same. Undoing goes backwards, each compensation with its own retries and under no deadline; one that fails for good does
not keep the others from running. Pure but for the user's functions, which a driver calls. A stack belongs to one saga,
and to one task at a time.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from resilient._ambient import unlimited
from resilient._drive import Do, Outcome
from resilient._guard import kind_of
from resilient.errors import SagaError

if TYPE_CHECKING:
    from resilient.policy import Env

__all__ = [
    "RESULT",
    "UNKNOWN",
    "AsyncUndoing",
    "Compensation",
    "Undo",
    "Undoing",
    "backwards",
    "call",
    "plain",
    "unwind",
]

step_key: ContextVar[str | None] = ContextVar("resilient.saga.key", default=None)
"""The key of the step that runs here, or is undone, where the saga cannot know by itself."""


class _Word:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def __bool__(self) -> bool:
        return False


RESULT: Any = _Word("RESULT")
"""Stands for the value of the step among the arguments of `call`."""

UNKNOWN: Any = _Word("UNKNOWN")
"""What a compensation gets for the value of a step that never said how it ended. It is false."""


class Compensation(Struct, frozen=True, eq=False):
    """Exactly what to call to undo a step. Made by `call`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Compensation:
    """Say exactly what undoes a step: `compensate=call(refund, RESULT, reason="cancelled")`.

    `RESULT` stands for the step's value, or for `UNKNOWN` where the step never said how it ended.
    """
    if not callable(function):
        raise TypeError(f"call needs a function, not {function!r}")
    return Compensation(function, args, kwargs)


class Undo(Struct, eq=False):
    """One step on the stack. A list there is a group, or a nested saga."""

    number: int
    name: str
    compensate: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any = UNKNOWN

    def bound(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The function to call, and its arguments."""
        given = self.compensate
        if type(given) is not Compensation:
            if takes_result(given):
                return given, self.args, {**self.kwargs, "result": self.value}
            return given, self.args, self.kwargs
        return (
            given.function,
            tuple([self.value if one is RESULT else one for one in given.args]),
            {name: self.value if one is RESULT else one for name, one in given.kwargs.items()},
        )


def takes_result(function: Any) -> bool:
    """Whether a compensation has a parameter named `result`."""
    try:
        found = inspect.signature(function).parameters.get("result")
    except (TypeError, ValueError):
        return False
    return found is not None and found.kind in (found.KEYWORD_ONLY, found.POSITIONAL_OR_KEYWORD)


def check(compensate: Any) -> None:
    """A compensation is a function, `call(…)`, or None."""
    if compensate is not None and type(compensate) is not Compensation and not callable(compensate):
        raise TypeError(f"compensate must be a function, call(...) or None, not {compensate!r}")


def plain(compensate: Any) -> None:
    """A plain saga cannot await its compensations: that is said before there is anything to undo."""
    function = compensate.function if type(compensate) is Compensation else compensate
    try:
        is_async = function.__code__.co_flags & inspect.CO_COROUTINE
    except AttributeError:
        is_async = kind_of(function) == "coro"
    if is_async:
        raise TypeError(f"the compensation {function!r} is async, and its saga is not: use `async with`")


def backwards(stack: list[Any]) -> list[Undo]:
    """The steps of a stack, the last first; those of a group too."""
    flat: list[Undo] = []
    for one in reversed(stack):
        flat += [one] if type(one) is Undo else backwards(one)
    return flat


class Undoing:
    """Calls compensations for `unwind`: `run(function, args, kwargs)` with retries, and under no deadline.

    `stop()` says that the time is over: no other compensation is begun, and a cancel is the end of the one that runs.
    """

    over = False
    # Whether no cancel of the caller's reaches it: then one that a compensation raises is its own affair.
    alone = False

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self.errors: list[Exception] = []
        self.failed: list[Undo] = []

    def __call__(self, function: Any, args: Any, kwargs: Any) -> Any:
        with unlimited():
            return self._run(function, args, kwargs)

    def stop(self) -> None:
        """Let nothing else begin."""
        self.over = True


class AsyncUndoing(Undoing):
    """The same, awaited."""

    async def __call__(self, function: Any, args: Any, kwargs: Any) -> Any:
        with unlimited():
            return await self._run(function, args, kwargs)


def unwind(
    saga: str,
    id: str,
    undos: list[Undo],
    guarded: Callable[..., Any],
    env: Env,
    done: Callable[..., Any] | None = None,
) -> Generator[Any, Any, tuple[list[Exception], BaseException | None]]:
    """Undo, in the order of `undos`. The errors of those that failed for good, and an interrupt that came meanwhile.

    `guarded(function, args, kwargs)` calls a compensation with its retries; best an `Undoing`, which can be stopped:
    then the rest have failed, or with `done` (a program that notes each end in the journal) are left to recovery.
    """
    undoing = guarded if isinstance(guarded, Undoing) else Undoing(guarded)
    errors = undoing.errors
    cut: BaseException | None = None
    outer = step_key.get()
    for undo in undos:
        error: BaseException | None
        if undoing.over:
            error = TimeoutError("it was not begun: the time for compensations was over")
        else:
            step_key.set(f"{saga}/{id}/{undo.number}")
            try:
                outcome: Outcome = yield Do(guarded, undo.bound(), {})
                error = outcome.error
                if error is not None and not isinstance(error, Exception) and not undoing.over:
                    # An interrupt says nothing about the compensation: it runs once more, to its end.
                    if not (undoing.alone and _is_cancel(error)):
                        cut = error
                    outcome = yield Do(guarded, undo.bound(), {})
                    error = outcome.error
            finally:
                step_key.set(outer)
        if error is not None:
            if not isinstance(error, Exception):
                error = _failure(error, undoing.over)
            error.add_note(f"resilient: compensation of step {undo.name} of saga {saga} ({id})")
            errors.append(error)
            undoing.failed.append(undo)
            if undoing.over and done is not None:
                raise SagaError("the time for its compensations was over", saga, id) from error
        if env.sinks:
            from resilient.events import Compensated

            env.emit(Compensated(saga, id, undo.name, error))
        if done is not None:
            yield from done(undo, error)
    return errors, cut


def _failure(error: BaseException, over: bool) -> Exception:
    """What a compensation failed with that was cut off."""
    made = TimeoutError("the time for compensations was over") if over else RuntimeError(f"interrupted by {error!r}")
    made.__cause__ = error
    return made


def _is_cancel(error: BaseException) -> bool:
    """Whether `error` is how asyncio or trio cancel. Neither is imported to find out."""
    kinds = (("asyncio.exceptions", "CancelledError"), ("trio", "Cancelled"))
    return any(isinstance(error, getattr(sys.modules.get(module), name, ())) for module, name in kinds)
