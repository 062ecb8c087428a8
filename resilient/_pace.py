"""The limits of one generator or stream: each item by its instant, and no scope that is held while the consumer works.

`pull` and `fetch` get the next item under the nearest limit, and raise `Over` at the end. An object belongs to one
generator.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from resilient._ambient import Ambient, ambient, nearest, restore
from resilient.errors import CallTimeout, DeadlineExceeded

if TYPE_CHECKING:
    from resilient.policy import Env
    from resilient.timeout import Timeout

__all__ = ["Bound", "Over", "Pace"]

_INF = float("inf")


class Bound:
    """The ambient deadline is `until` for one block that may await, but not yield."""

    __slots__ = ("before", "until", "variable")

    def __init__(self, variable: Ambient, until: float) -> None:
        self.variable, self.until = variable, until

    def __enter__(self) -> None:
        self.before = self.variable.get()
        self.variable.set(self.until)

    def __exit__(self, *exc: object) -> None:
        restore(self.variable, self.until, self.before)


class Over(Exception):
    """A generator has ended, and returned `value`."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


async def _take(step: Callable[[Any], Any], box: list[Any]) -> Any:
    # An error in a box: a frame that kept one it was left by would be a reference cycle.
    return await step(box.pop())


class Pace:
    """The limits of one generator or stream."""

    __slots__ = ("end", "env", "limit", "policy")

    def __init__(self, policy: Timeout, env: Env) -> None:
        self.policy, self.env, self.limit = policy, env, policy.first
        start = env.clock.now()
        if nearest(env.clock) <= start:
            raise policy._refused(env, DeadlineExceeded(policy._label))
        self.end = _INF if policy.seconds is None else start + policy.seconds

    def pull(self, source: Generator[Any, Any, Any], step: Callable[[Any], Any], box: list[Any]) -> Any:
        """The next item of a generator, or `Over`."""
        until, seconds = self._next()
        if seconds <= 0:
            source.close()
            raise self._late(seconds)
        try:
            with Bound(ambient(self.env.clock), until):
                return step(box.pop())
        except StopIteration as stop:
            raise Over(stop.value) from None

    async def fetch(self, source: AsyncGenerator[Any, Any], step: Callable[[Any], Any], box: list[Any]) -> Any:
        """The next item of a stream, or `Over`."""
        from resilient._aio import within

        until, seconds = self._next()
        if seconds <= 0:
            await source.aclose()
            raise self._late(seconds)
        try:
            with Bound(ambient(self.env.clock), until):
                if until == _INF:
                    return await step(box.pop())
                return await within(self.env.clock, until, partial(self._late, seconds), _take, step, box)
        except StopAsyncIteration:
            raise Over from None

    def _next(self) -> tuple[float, float]:
        """The instant by which the next item must be there, and the seconds until then."""
        clock, limit = self.env.clock, self.limit
        self.limit = self.policy.between
        start = clock.now()
        until = min(self.end, nearest(clock), _INF if limit is None else start + limit)
        return until, until - start

    def _late(self, seconds: float) -> CallTimeout:
        """What to raise: the limit that was set, not what was left of it."""
        if self.policy.seconds is not None and self.env.clock.now() >= self.end:
            seconds = self.policy.seconds
        return self.policy._late(self.env, max(0.0, seconds))
