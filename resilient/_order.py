"""Orders of policies that contradict themselves, each with the reason. Nothing here runs after decoration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["contradictions"]


def contradictions(outer: Sequence[Any], inner: Sequence[Any]) -> Iterator[str]:
    """What is wrong with `outer`, a stack of policies (outermost first) around the stack `inner`."""
    for place, policy in enumerate(outer):
        inside = (*outer[place + 1 :], *inner)
        yield from _inside(policy, inside)


def _inside(policy: Any, inside: Sequence[Any]) -> Iterator[str]:
    roles = {other.role for other in inside if hasattr(other, "role")}
    match getattr(policy, "role", None):
        case "breaker" if "retry" in roles:
            yield (
                "CircuitBreaker is outside Retry: it sees one outcome for all attempts together, and the attempts "
                "after the first go to a dependency that it may have cut off. Put Retry outside CircuitBreaker."
            )
        case "retry" | "breaker" | "hedge" if "fallback" in roles:
            yield (
                f"{type(policy).__name__} is outside Fallback: the fallback answers first, so "
                f"{type(policy).__name__} never sees a failure. Put Fallback outermost."
            )
        case "hedge" if not policy.idempotent and "idempotent" not in roles:
            yield (
                "Hedge runs a call more than once at a time, and this one is not declared safe for that. "
                "Say Hedge(..., idempotent=True) if it is, or put Idempotent inside it."
            )
        case _:
            pass
    yield from _too_long(policy, inside)


def _too_long(policy: Any, inside: Sequence[Any]) -> Iterator[str]:
    total: float | None = getattr(policy, "total", None)
    if total is None:
        return
    for other in inside:
        attempt: float | None = getattr(other, "total", None)
        if attempt is not None and attempt > total:
            yield (
                f"{type(other).__name__} allows {attempt:g} s inside {type(policy).__name__}, which allows {total:g} s "
                "for everything: the inner limit can never be reached. Make the inner one shorter."
            )
