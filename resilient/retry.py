"""`Retry`: try again when a call fails in a way that may pass.

Promises that the caller sees the function's own error, that nothing is retried but `Exception`, that no wait is longer
than the time that is left, and that calls share no state. It does not make a call safe to repeat: only its author can.
Success costs one `try`; a retry without a wait costs about two microseconds. Safe from any thread, loop and trio run.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from resilient._ambient import ambient, deadline, restore
from resilient._attempts import Attempt, Block, PlainAttempts
from resilient._stream import Opened, opened_gen, opened_stream
from resilient._verdict import Errors, quick
from resilient.errors import Rejected
from resilient.policy import SYSTEM, Policy, seconds, whole

if TYPE_CHECKING:
    from resilient._ambient import Ambient
    from resilient._tenacity import Engine
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["Attempt", "Retry"]

BASE = 0.1
"""Seconds: the longest first wait of the default backoff."""
LIMIT = 10.0
"""Seconds: the longest wait of the default backoff."""

_INF = float("inf")
_Wanted: TypeAlias = (
    "tuple[tuple[type[BaseException], ...], tuple[type[BaseException], ...], tuple[Callable[[Any], Any], ...]]"
)
_ANY: _Wanted = ((Exception,), (), ())
# Without a limit the ambient deadline stays as it is.
_UNLIMITED = nullcontext()
_NOWHERE: ContextVar[float] = ContextVar("resilient.retry.nowhere", default=_INF)


class _Three(int):
    """The default of `attempts`, told apart from a 3 that somebody wrote."""


_THREE = _Three(3)


class Run(Protocol):
    """One call that may take several attempts, as the shells drive it. Coroutine shells use the methods with an `a`.

    While `again`: `pause`, make the attempt, and say how it ended. `failed` is False if the error goes to the caller;
    when `again` is no more, `result` is what the caller gets, be it an answer or another error.
    """

    again: bool
    number: int
    asynchronous: str | None

    def pause(self) -> None: ...
    def failed(self, error: Exception) -> bool: ...
    def returned(self, value: Any) -> None: ...
    def result(self) -> Any: ...
    async def apause(self) -> None: ...
    async def afailed(self, error: Exception) -> bool: ...
    async def areturned(self, value: Any) -> None: ...


def _choose(on: Any) -> _Wanted:
    """What `on` stands for: classes, those of them that name refusals, and predicates."""
    errors = Errors("on", on, failures=True)
    if not errors.listed():
        raise ValueError("on must name at least one error")
    named = tuple(one for one in errors.classes if not issubclass(Rejected, one) or one is Rejected)
    return errors.classes, named, errors.predicates


class Retry(Policy):
    """Call again after an error of `on`, until it works, `attempts` were made, or the time is up.

    `on`: exception classes, a predicate (error → bool), or a tenacity retry strategy. Refusals by policies inside
    (`Rejected`) are retried only if a class in `on` names them, which `Exception` does not: an open breaker fails fast.
    `wait`: seconds, a tenacity wait strategy, or None: exponential backoff with full jitter, `random() * min(10, 0.1 *
    2**(n-1))` seconds after attempt n (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    `stop`: a tenacity stop strategy; it replaces `attempts`.
    `until` judges results: while it is false the call is made again, and in the end the last result is returned. Of a
    generator it judges the first item; generators that were refused are closed.
    `total`: seconds for everything, waits included; policies inside see it as the ambient deadline. A wait that would
    not end before it, or before the ambient deadline, is not begun: the error comes out at once.
    `retry_after`: an error's `retry_after`, or the `Retry-After` header of its `response`, in seconds or as a date,
    makes a wait longer, up to this many seconds (0 or None: it is not looked at). Within that cap a server is never
    asked before it said. A response that `until` refused has its say too.

    The error that comes out is the function's own, with a note such as "resilient: attempt 3 of 3, 1.2 s" (the time
    since the first attempt ended, or since the call with `total`). Raises `TypeError` or `ValueError` for settings
    that make no sense.

    >>> from resilient import Retry
    >>> outcomes = iter([ConnectionError(), "fine"])
    >>> @Retry(ConnectionError, wait=0)
    ... def fetch() -> str:
    ...     outcome = next(outcomes)
    ...     if isinstance(outcome, Exception):
    ...         raise outcome
    ...     return outcome
    >>> fetch()
    'fine'
    """

    __slots__ = (
        "_engine",
        "_wanted",
        "attempts",
        "name",
        "on",
        "retry_after",
        "stop",
        "total",
        "until",
        "wait",
    )

    role = "retry"

    def __init__(
        self,
        on: Any,
        *,
        attempts: int = _THREE,
        wait: Any = None,
        stop: Any = None,
        until: Callable[[Any], bool] | None = None,
        total: float | None = None,
        retry_after: float | None = 60.0,
        name: str | None = None,
    ) -> None:
        self.attempts = 3 if attempts is _THREE else whole("attempts", attempts)
        self.total = None if total is None else seconds("total", total)
        self.retry_after = seconds("retry_after", retry_after, zero=True) if retry_after is not None else 0.0
        if until is not None and not callable(until):
            raise TypeError(f"until must be a function of the result, not {until!r}")
        self.until = None if until is None else quick("until", until)
        self.name = name
        self._engine: Engine | None = None
        self.on, self.wait, self.stop = on, wait, stop
        foreign = _strategies(on, wait, stop)
        self._wanted = _ANY if on is Exception or (foreign and foreign.retry) else _choose(on)
        if wait is not None and not (foreign and foreign.wait):
            if not isinstance(wait, (int, float)):
                raise TypeError(f"wait must be seconds or a tenacity wait strategy, not {wait!r}")
            self.wait = seconds("wait", wait, zero=True)
        if stop is not None and not (foreign and foreign.stop):
            raise TypeError(f"stop must be a tenacity stop strategy, not {stop!r}")
        if stop is not None and attempts is not _THREE:
            raise TypeError(f"stop replaces attempts: leave attempts={attempts!r} out, or say stop_after_attempt(...)")
        if foreign:
            from resilient._tenacity import Engine

            self._engine = Engine.of(self, foreign.retry, foreign.wait, foreign.stop)

    @staticmethod
    def adopt(existing: Any) -> Any:
        """Take over from tenacity: a `Retrying` or `AsyncRetrying` becomes a policy with the same decisions and hooks.

        A function that tenacity has decorated becomes the same function under such a policy, at the cost of ours; of a
        bound method, too. The settings are read now: what is changed in `existing` later has no effect. Raises
        `TypeError` for anything else.
        """
        from resilient._tenacity import adopt

        return adopt(existing)

    def describe(self) -> dict[str, Any]:
        """The settings, as plain data."""
        return {
            "on": self.on,
            "attempts": self.attempts if self.stop is None else None,
            "wait": self.wait,
            "stop": self.stop,
            "until": self.until,
            "total": self.total,
            "name": self.name,
        }

    # -- shells --------------------------------------------------------------------------------------------------

    def sync(self, call: Call, env: Env) -> Call:
        """Call again after a failure that may pass."""
        engine = self._engine
        if engine is not None and engine.asynchronous:
            raise TypeError(f"{self.name}: {engine.asynchronous} is async, and the function is not")
        if self._upfront:

            def retry(*args: Any, **kwargs: Any) -> Any:
                with self._scope(env):
                    return self._resume(self._start(env, call, args, kwargs, 0), call, args, kwargs)

        elif self.until is not None:

            def retry(*args: Any, **kwargs: Any) -> Any:
                try:
                    value = call(*args, **kwargs)
                except Exception as error:
                    run = self._start(env, call, args, kwargs, 1)
                    if not run.failed(error):
                        raise
                else:
                    if self._approves(value):
                        return value
                    run = self._start(env, call, args, kwargs, 1)
                    run.refused(value)
                    if run.again and type(value) is Opened:
                        value.source.close()
                return self._resume(run, call, args, kwargs)

        elif self.total is not None or (engine is not None and engine.timed):
            now, total, limit = env.clock.now, self.total or _INF, self._deadline(env)

            def retry(*args: Any, **kwargs: Any) -> Any:
                outer, began = limit.get(), now()
                until = min(outer, began + total)
                limit.set(until)
                try:
                    try:
                        return call(*args, **kwargs)
                    except Exception as error:
                        run = self._start(env, call, args, kwargs, 1, began)
                        if not run.failed(error):
                            raise
                    return self._resume(run, call, args, kwargs)
                finally:
                    restore(limit, until, outer)

        else:

            def retry(*args: Any, **kwargs: Any) -> Any:
                try:
                    return call(*args, **kwargs)
                except Exception as error:
                    run = self._start(env, call, args, kwargs, 1)
                    if not run.failed(error):
                        raise
                return self._resume(run, call, args, kwargs)

        return retry

    def coro(self, call: Call, env: Env) -> Call:
        """Call again after a failure that may pass."""
        engine = self._engine
        if self._upfront:

            async def retry(*args: Any, **kwargs: Any) -> Any:
                with self._scope(env):
                    return await self._aresume(self._start(env, call, args, kwargs, 0), call, args, kwargs)

        elif self.until is not None:

            async def retry(*args: Any, **kwargs: Any) -> Any:
                try:
                    value = await call(*args, **kwargs)
                except Exception as error:
                    run = self._start(env, call, args, kwargs, 1)
                    if not await run.afailed(error):
                        raise
                else:
                    if self._approves(value):
                        return value
                    run = self._start(env, call, args, kwargs, 1)
                    run.refused(value)
                    if run.again and type(value) is Opened:
                        await value.source.aclose()
                return await self._aresume(run, call, args, kwargs)

        elif self.total is not None or (engine is not None and engine.timed):
            now, total, limit = env.clock.now, self.total or _INF, self._deadline(env)

            async def retry(*args: Any, **kwargs: Any) -> Any:
                outer, began = limit.get(), now()
                until = min(outer, began + total)
                limit.set(until)
                try:
                    try:
                        return await call(*args, **kwargs)
                    except Exception as error:
                        run = self._start(env, call, args, kwargs, 1, began)
                        if not await run.afailed(error):
                            raise
                    return await self._aresume(run, call, args, kwargs)
                finally:
                    restore(limit, until, outer)

        else:

            async def retry(*args: Any, **kwargs: Any) -> Any:
                try:
                    return await call(*args, **kwargs)
                except Exception as error:
                    run = self._start(env, call, args, kwargs, 1)
                    if not await run.afailed(error):
                        raise
                return await self._aresume(run, call, args, kwargs)

        return retry

    def gen(self, call: Call, env: Env) -> Call:
        """Open the generator again if it fails before its first item, or `until` refuses that."""
        self._refuse_callback("a generator")
        return opened_gen(call, lambda opening: self.sync(opening, env))

    def stream(self, call: Call, env: Env) -> Call:
        """Open the async generator again if it fails before its first item, or `until` refuses that."""
        self._refuse_callback("an async generator")
        return opened_stream(call, lambda opening: self.coro(opening, env))

    def _resume(self, run: Run, call: Call, args: Any, kwargs: Any) -> Any:
        while run.again:
            run.pause()
            try:
                value = call(*args, **kwargs)
            except Exception as error:
                if not run.failed(error):
                    raise
            else:
                run.returned(value)
                if run.again and type(value) is Opened:
                    value.source.close()
        return run.result()

    async def _aresume(self, run: Run, call: Call, args: Any, kwargs: Any) -> Any:
        while run.again:
            await run.apause()
            try:
                value = await call(*args, **kwargs)
            except Exception as error:
                if not await run.afailed(error):
                    raise
            else:
                await run.areturned(value)
                if run.again and type(value) is Opened:
                    await value.source.aclose()
        return run.result()

    # -- the block form ------------------------------------------------------------------------------------------

    def block(self, env: Env = SYSTEM) -> Block:
        """`for attempt in retry.block(env)`: the block form in another environment than the system's."""
        return Block(self, env)

    def __iter__(self) -> Iterator[Attempt]:
        """`for attempt in Retry(...): with attempt: ...` makes the block again until it works."""
        return iter(self.block())

    def __aiter__(self) -> AsyncIterator[Attempt]:
        """`async for attempt in Retry(...): with attempt: ...` makes the block again until it works."""
        return aiter(self.block())

    # -- decisions -----------------------------------------------------------------------------------------------

    @property
    def _upfront(self) -> bool:
        # Whether something is called before the first attempt, or every result must be judged by an engine or a clock.
        engine, judged = self._engine, self.until is not None
        return (judged and (self.total is not None or engine is not None)) or (engine is not None and engine.upfront)

    def _deadline(self, env: Env) -> Ambient:
        return _NOWHERE if self.total is None else ambient(env.clock)

    def _scope(self, env: Env) -> AbstractContextManager[None]:
        return _UNLIMITED if self.total is None else deadline(self.total, clock=env.clock)

    def _start(
        self, env: Env, call: Call | None, args: Any, kwargs: Any, number: int, began: float | None = None
    ) -> Any:
        if self._engine is not None:
            return self._engine.start(self, env, call, args, kwargs, number, began)
        return PlainAttempts(self, env, number, began)

    def _refuse_callback(self, what: str) -> None:
        if self._engine is not None and self._engine.callback is not None:
            raise TypeError(f"{self.name}: retry_error_callback answers in place of a function, and not of {what}")

    def _wants(self, error: Exception) -> bool:
        # `on=Exception` does not mean to knock at a closed door; a predicate that says so does.
        classes, named, predicates = self._wanted
        if isinstance(error, classes) and (not isinstance(error, Rejected) or isinstance(error, named)):
            return True
        return any(_told("on", predicate(error)) for predicate in predicates)

    def _approves(self, value: Any) -> bool:
        if self.until is None:
            return True
        if type(value) is Opened:
            return value.over or _told("until", self.until(value.item))
        return _told("until", self.until(value))

    def _backoff(self, number: int, env: Env) -> float:
        if self.wait is not None:
            return float(self.wait)
        return env.rng.random() * min(LIMIT, BASE * 2.0 ** min(number - 1, 32))


def _told(parameter: str, verdict: Any) -> bool:
    """A verdict as a bool. A coroutine is none: it would be true whatever it holds."""
    if type(verdict) is CoroutineType:
        verdict.close()
        raise TypeError(f"{parameter} must answer at once, and it returned a coroutine")
    return bool(verdict)


def _strategies(on: Any, wait: Any, stop: Any) -> Any:
    """Which of the three come from tenacity, if any; tenacity is not imported to find out."""
    if "tenacity" not in sys.modules:
        return None
    from resilient._strategies import recognise

    return recognise(on, wait, stop)
