"""The compensation stack: what has to be called to undo what was done, and the program that does it.

A step's compensation is on the stack before the step runs, since a step may have had its effect and failed all the
same. Undoing goes backwards, each compensation with its own retries; one that fails for good does not keep the others
from running. Pure but for the user's functions, which a driver calls. A stack belongs to one saga, and to one task at
a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from resilient._drive import Do, Outcome

if TYPE_CHECKING:
    from resilient.policy import Env

__all__ = ["RESULT", "UNKNOWN", "Compensation", "Undo", "backwards", "call", "unwind"]


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
    """One step on the stack, or a group of them."""

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
        return "result" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def check(compensate: Any) -> None:
    """A compensation is a function, `call(…)`, or None."""
    if compensate is not None and type(compensate) is not Compensation and not callable(compensate):
        raise TypeError(f"compensate must be a function, call(...) or None, not {compensate!r}")


def backwards(stack: list[Any]) -> list[Undo]:
    """The steps of a stack, the last first; those of a group too."""
    flat: list[Undo] = []
    for one in reversed(stack):
        flat += [one] if type(one) is Undo else backwards(one)
    return flat


def unwind(
    saga: str,
    id: str,
    undos: list[Undo],
    guarded: Callable[..., Any],
    env: Env,
    done: Callable[..., Any] | None = None,
) -> Generator[Any, Any, tuple[list[Exception], BaseException | None]]:
    """Undo, in the order of `undos`. The errors of those that failed for good, and an interrupt that came meanwhile.

    `guarded(function, args, kwargs)` calls a compensation with its retries. `done(undo, error)` is a program that notes
    each end in the journal.
    """
    errors: list[Exception] = []
    cut: BaseException | None = None
    for undo in undos:
        outcome: Outcome = yield Do(guarded, undo.bound(), {})
        error = outcome.error
        if error is not None and not isinstance(error, Exception):
            # An interrupt says nothing about the compensation: it runs once more, to its end.
            cut = error
            outcome = yield Do(guarded, undo.bound(), {})
            error = outcome.error
        if error is not None:
            if not isinstance(error, Exception):
                error = RuntimeError(f"interrupted by {error!r}")
            error.add_note(f"resilient: compensation of step {undo.name} of saga {saga} ({id})")
            errors.append(error)
        if env.sinks:
            from resilient.events import Compensated

            env.emit(Compensated(saga, id, undo.name, error))
        if done is not None:
            yield from done(undo, error)
    return errors, cut
