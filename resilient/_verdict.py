"""What the end of a call says about a circuit: failure, success or nothing. Checked when the breaker is made.

Pure but for the predicates of the user, which are called outside every lock. Immutable; safe from any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from resilient._guard import faces, flags

__all__ = ["Errors", "quick", "text"]

C = TypeVar("C", bound=Callable[..., Any])


class Errors:
    """A set of errors: exception classes, predicates, or a tuple of both. `error in errors` tells.

    A class is a class whatever its metaclass is. Raises `TypeError` for anything else, and (with `failures`)
    `ValueError` for classes outside `Exception`: cancellation and interrupts are never failures.
    """

    __slots__ = ("classes", "predicates")

    def __init__(self, parameter: str, given: Any, *, failures: bool = False) -> None:
        classes: list[type[BaseException]] = []
        predicates: list[Callable[[Any], Any]] = []
        several: Any = given
        if not isinstance(given, tuple):
            several = (given,)
        for one in several:
            if isinstance(one, type):
                if not issubclass(one, BaseException):
                    raise TypeError(f"{parameter} must be exception classes or predicates, not {one!r}")
                if failures and not issubclass(one, Exception):
                    raise ValueError(
                        f"{parameter} must be subclasses of Exception, not {one.__name__}: "
                        "cancellation and interrupts are never failures"
                    )
                classes.append(one)
            elif callable(one):
                predicates.append(quick(parameter, one))
            else:
                raise TypeError(f"{parameter} must be exception classes or predicates, not {one!r}")
        self.classes, self.predicates = tuple(classes), tuple(predicates)

    def __contains__(self, error: BaseException) -> bool:
        if isinstance(error, self.classes):
            return True
        for predicate in self.predicates:  # noqa: SIM110 - a generator would cost more than the answer
            if predicate(error):
                return True
        return False

    def listed(self) -> tuple[Any, ...]:
        """What it was made of."""
        return (*self.classes, *self.predicates)


def quick(parameter: str, function: C) -> C:
    """`function`, if it answers at once: the coroutine of an `async def` would always be true."""
    for face in faces(function):
        if flags(face) & 0x280:
            raise TypeError(f"{parameter} must answer at once, and {face.__qualname__} is a coroutine function")
    return function


def text(error: BaseException) -> str:
    """What to remember of an error: its type and the beginning of what it says. Keeps no frame alive."""
    try:
        said = str(error)
    except Exception:
        said = ""
    name = type(error).__name__
    return f"{name}: {said[:200]}" if said else name
