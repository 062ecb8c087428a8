"""What tenacity's strategies look at, found out when a policy is made: their own parts, results, the time, coroutines.

Pure. Only tenacity's public API (9.2 and later) is used. Imported only when an object of tenacity is met.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import tenacity
import tenacity.asyncio
from tenacity.retry import retry_base
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from resilient._guard import faces

__all__ = ["Found", "called", "check", "is_async", "judges", "own", "recognise", "timed"]

# Strategies whose answer to a result is always no: a success needs not ask them. Exact types: subclasses may differ.
_ERRORS_ONLY = {
    tenacity.retry_if_exception,
    tenacity.retry_if_exception_type,
    tenacity.retry_if_not_exception_type,
    tenacity.retry_if_exception_message,
    tenacity.retry_if_exception_cause_type,
    tenacity.asyncio.retry_if_exception,
    type(tenacity.retry_never),
}
# Those that do not look at the time, so that no clock is read before the first attempt.
_TIMELESS = {
    tenacity.stop_after_attempt,
    tenacity.stop_when_event_set,
    type(tenacity.stop_never),
}
_JOINS = {
    tenacity.retry_any,
    tenacity.retry_all,
    tenacity.asyncio.retry_any,
    tenacity.asyncio.retry_all,
    tenacity.stop_any,
    tenacity.stop_all,
}


def called(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


class Found(NamedTuple):
    retry: bool
    wait: bool
    stop: bool


def recognise(on: Any, wait: Any, stop: Any) -> Found | None:
    """Which of the three are tenacity's; None if none is."""
    found = Found(isinstance(on, retry_base), isinstance(wait, wait_base), isinstance(stop, stop_base))
    return found if any(found) else None


def _parts(strategy: Any) -> Iterator[Any]:
    """What a strategy asks in turn."""
    for name in ("retries", "stops", "wait_funcs", "strategies"):
        yield from getattr(strategy, name, ())
    if callable(predicate := getattr(strategy, "predicate", None)):
        yield predicate


def _leaves(strategy: Any) -> Iterator[Any]:
    """The strategies that a joined one is made of."""
    if type(strategy) in _JOINS:
        for part in _parts(strategy):
            yield from _leaves(part)
    else:
        yield strategy


def judges(strategy: Any) -> bool:
    return any(type(leaf) not in _ERRORS_ONLY for leaf in _leaves(strategy))


def timed(strategy: Any) -> bool:
    return any(type(leaf) not in _TIMELESS for leaf in _leaves(strategy))


def own(strategy: Any) -> bool:
    """Whether somebody else than tenacity wrote it, or a part of it: it may look at anything."""
    return not type(strategy).__module__.startswith("tenacity.") or any(
        isinstance(part, wait_base) and own(part) for part in _parts(strategy)
    )


def is_async(function: Any) -> bool:
    return any(map(inspect.iscoroutinefunction, faces(function)))


def check(strategy: Any) -> None:
    """Raise `TypeError` if a strategy that answers at once asks one that does not: a coroutine is always true."""
    for part in _parts(strategy):
        if is_async(part) and not is_async(strategy):
            raise TypeError(
                f"{type(strategy).__name__} answers at once, and {called(part)} is a coroutine function: "
                f"use the strategies of tenacity.asyncio"
            )
        check(part)
