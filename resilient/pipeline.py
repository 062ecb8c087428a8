"""Several policies as one decorator, and a look inside what is guarded.

`Pipeline(a, b, c)` guards like the stacked decorators `@a @b @c`: outermost first. It is compiled into nested closures
when a function is decorated, and costs nothing of its own at a call. Immutable; safe from any thread.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from resilient._guard import decorate, guarded
from resilient._types import F
from resilient.policy import Env, Policy

__all__ = ["Pipeline", "inspect"]

_SHELLS = ("sync", "coro", "gen", "stream")


class Pipeline:
    """Guard a function with several policies, outermost first.

    A pipeline inside a pipeline stands for its policies, and an `aiolimiter.AsyncLimiter` for `RateLimiter.adopt` of
    it. `env` binds the decorated functions to another environment than the system's. Raises `TypeError` for what is
    no policy, `ValueError` for none or for one that is there twice.

    >>> from resilient import Fallback, Pipeline, Retry
    >>> pipeline = Pipeline(Fallback(None), Retry(ConnectionError, attempts=2))
    >>> [type(policy).__name__ for policy in pipeline]
    ['Fallback', 'Retry']
    """

    __slots__ = ("env", "policies")

    def __init__(self, *policies: Any, env: Env | None = None) -> None:
        flat: list[Any] = []
        for policy in policies:
            flat.extend(policy.policies if isinstance(policy, Pipeline) else (policy,))
        if not flat:
            raise ValueError("a Pipeline needs at least one policy")
        for place, policy in enumerate(flat):
            if isinstance(policy, type) or not any(hasattr(policy, kind) for kind in _SHELLS):
                flat[place] = _adopted(policy)
        if env is not None and not isinstance(env, Env):
            raise TypeError(f"env must be an Env, not {env!r}")
        if len({id(policy) for policy in flat}) < len(flat):
            raise ValueError("the same policy object is in the Pipeline twice: it would wait for itself")
        self.policies: tuple[Any, ...] = tuple(flat)
        self.env = env

    def __call__(self, fn: F, /) -> F:
        """Guard `fn`. Its signature, kind, name and documentation stay."""
        return decorate(self.policies, fn, self.env)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.policies)

    def __len__(self) -> int:
        return len(self.policies)

    def describe(self) -> list[dict[str, Any]]:
        """The settings of each policy, outermost first, as plain data."""
        return [{"policy": type(policy).__name__, **_described(policy)} for policy in self.policies]

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(repr, self.policies))})"

    def __str__(self) -> str:
        lines = (f"{'  ' * depth}{policy!r}" for depth, policy in enumerate(self.policies))
        return "\n".join(lines)


def _adopted(given: Any) -> Any:
    """The policy that stands for somebody else's object."""
    aiolimiter = sys.modules.get("aiolimiter")
    if aiolimiter is None or not isinstance(given, aiolimiter.AsyncLimiter):
        raise TypeError(f"{given!r} is not a policy (did you forget to call it?)")
    from resilient.ratelimit import RateLimiter

    return RateLimiter.adopt(given)


def _described(policy: Any) -> dict[str, Any]:
    return policy.describe() if isinstance(policy, Policy) else {"name": getattr(policy, "name", None)}


def inspect(fn: object) -> tuple[Any, ...]:
    """The live policies around `fn`, outermost first; empty if it is not guarded. Methods may be bound."""
    marker = guarded(fn)
    return () if marker is None else marker.policies
