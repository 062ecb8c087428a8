"""`Retry`: try again when a call fails in a way that may pass.

Promises that the caller sees the function's own error, that nothing is retried but `Exception`, that no wait is longer
than the time that is left, and that calls share no state. It does not make a call safe to repeat: only its author can.
Success costs one `try`; a retry without a wait costs about two microseconds. Safe from any thread, loop and trio run.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from resilient._ambient import remaining
from resilient._retry_after import hint
from resilient._stream import opened_gen, opened_stream
from resilient._verdict import Errors, quick
from resilient.errors import Rejected
from resilient.policy import SYSTEM, Policy, seconds, whole

if TYPE_CHECKING:
    from resilient._tenacity import Engine
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["Attempt", "Retry"]

T = TypeVar("T")

BASE = 0.1
"""Seconds: the longest first wait of the default backoff."""
LIMIT = 10.0
"""Seconds: the longest wait of the default backoff."""


class Run(Protocol):
    """One call that may take several attempts, as the shells drive it.

    While `again`: wait `delay` seconds, `begin`, make the attempt, and say how it ended. `failed` is False if the error
    goes to the caller; when `again` is no more, `answer` is what the caller gets.
    """

    again: bool
    delay: float
    answer: Any
    number: int

    def begin(self) -> None: ...
    def failed(self, error: Exception) -> bool: ...
    def returned(self, value: Any) -> None: ...


class Retry(Policy):
    """Call again after an error of `on`, until it works, `attempts` were made, or the time is up.

    `on`: exception classes, a predicate (error → bool), or a tenacity retry strategy. Refusals by policies inside
    (`Rejected`) are retried only if a class in `on` names them: an open breaker fails fast.
    `wait`: seconds, a tenacity wait strategy, or None: exponential backoff with full jitter, `random() * min(10, 0.1 *
    2**(n-1))` seconds after attempt n (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    `stop`: a tenacity stop strategy; it replaces `attempts`.
    `until` judges results: while it is false the call is made again, and in the end the last result is returned.
    `total`: seconds for everything, waits included; policies inside see it as the ambient deadline. A wait that would
    not end before it, or before the ambient deadline, is not begun: the error comes out at once.
    `retry_after`: an error's `retry_after`, or the `Retry-After` header of its `response`, in seconds or as a date,
    makes a wait longer, up to this many seconds (0 or None: it is not looked at). A response that `until` refused has
    its say too.

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
        "_on",
        "_refusals",
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
        attempts: int = 3,
        wait: Any = None,
        stop: Any = None,
        until: Callable[[Any], bool] | None = None,
        total: float | None = None,
        retry_after: float | None = 60.0,
        name: str | None = None,
    ) -> None:
        self.attempts = whole("attempts", attempts)
        self.total = None if total is None else seconds("total", total)
        self.retry_after = seconds("retry_after", retry_after, zero=True) if retry_after is not None else 0.0
        if until is not None and not callable(until):
            raise TypeError(f"until must be a function of the result, not {until!r}")
        self.until = None if until is None else quick("until", until)
        self.name = name
        self._engine: Engine | None = None
        self.on, self.wait, self.stop = on, wait, stop
        foreign = _strategies(on, wait, stop)
        self._on = None if foreign and foreign.retry else Errors("on", on, failures=True)
        if self._on is not None and not self._on.listed():
            raise ValueError("on must name at least one error")
        self._refusals = tuple(one for one in self._on.classes if issubclass(one, Rejected)) if self._on else ()
        if wait is not None and not (foreign and foreign.wait):
            if not isinstance(wait, (int, float)):
                raise TypeError(f"wait must be seconds or a tenacity wait strategy, not {wait!r}")
            self.wait = seconds("wait", wait, zero=True)
        if stop is not None and not (foreign and foreign.stop):
            raise TypeError(f"stop must be a tenacity stop strategy, not {stop!r}")
        if foreign:
            from resilient._tenacity import Engine

            self._engine = Engine.of(self, foreign.retry, foreign.wait, foreign.stop)

    @staticmethod
    def adopt(existing: Any) -> Any:
        """Take over from tenacity: a `Retrying` or `AsyncRetrying` becomes a policy with the same decisions and hooks.

        A function that tenacity has decorated becomes the same function under such a policy, at the cost of ours.
        Raises `TypeError` for anything else.
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
        if engine is not None and not engine.enabled:
            return call
        if engine is not None and engine.asynchronous:
            raise TypeError(f"{self.name}: {engine.asynchronous} is async, and the function is not")
        start, resume = self._start, self._resume
        if self._upfront:
            scope = self._scope(env)

            def retry(*args: Any, **kwargs: Any) -> Any:
                with scope():
                    return resume(start(env, call, args, kwargs, 0), env, call, args, kwargs)

        else:

            def retry(*args: Any, **kwargs: Any) -> Any:
                try:
                    return call(*args, **kwargs)
                except Exception as error:
                    run = start(env, call, args, kwargs, 1)
                    if not run.failed(error):
                        raise
                return resume(run, env, call, args, kwargs)

        return retry

    def coro(self, call: Call, env: Env) -> Call:
        """Call again after a failure that may pass."""
        engine = self._engine
        if engine is not None and not engine.enabled:
            return call
        if engine is not None and engine.asynchronous:
            return engine.coro(self, call, env)
        start, aresume = self._start, self._aresume
        if self._upfront:
            scope = self._scope(env)

            async def retry(*args: Any, **kwargs: Any) -> Any:
                with scope():
                    return await aresume(start(env, call, args, kwargs, 0), env, call, args, kwargs)

        else:

            async def retry(*args: Any, **kwargs: Any) -> Any:
                try:
                    return await call(*args, **kwargs)
                except Exception as error:
                    run = start(env, call, args, kwargs, 1)
                    if not run.failed(error):
                        raise
                return await aresume(run, env, call, args, kwargs)

        return retry

    def gen(self, call: Call, env: Env) -> Call:
        """Open the generator again if it fails before its first item."""
        self._refuse_results("a generator")
        return opened_gen(call, lambda opening: self.sync(opening, env))

    def stream(self, call: Call, env: Env) -> Call:
        """Open the async generator again if it fails before its first item."""
        self._refuse_results("an async generator")
        return opened_stream(call, lambda opening: self.coro(opening, env))

    def _resume(self, run: Run, env: Env, call: Call, args: Any, kwargs: Any) -> Any:
        sleep = self._engine.sleep if self._engine is not None and self._engine.sleep else env.clock.sleep
        while run.again:
            if run.delay > 0:
                sleep(run.delay)
            run.begin()
            try:
                value = call(*args, **kwargs)
            except Exception as error:
                if not run.failed(error):
                    raise
            else:
                run.returned(value)
        return run.answer

    async def _aresume(self, run: Run, env: Env, call: Call, args: Any, kwargs: Any) -> Any:
        asleep = self._engine.asleep if self._engine is not None and self._engine.asleep else env.clock.asleep
        while run.again:
            if run.delay > 0:
                await asleep(run.delay)
            run.begin()
            try:
                value = await call(*args, **kwargs)
            except Exception as error:
                if not run.failed(error):
                    raise
            else:
                run.returned(value)
        return run.answer

    # -- the block form ------------------------------------------------------------------------------------------

    def block(self, env: Env = SYSTEM) -> Block:
        """`for attempt in retry.block(env)`: the block form in another environment than the system's."""
        if self._engine is not None and self._engine.asynchronous:
            raise TypeError(f"{self._engine.asynchronous} is async: it can guard coroutine functions, not blocks")
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
        # Whether something must be known before the first attempt, or asked after its success.
        engine = self._engine
        return self.until is not None or self.total is not None or (engine is not None and engine.upfront)

    def _scope(self, env: Env) -> Callable[[], Any]:
        if self.total is None:
            return nullcontext
        from resilient.timeout import deadline

        total = self.total
        return lambda: deadline(total, clock=env.clock)

    def _start(self, env: Env, call: Call | None, args: Any, kwargs: Any, number: int) -> Run:
        if self._engine is not None:
            return self._engine.start(self, env, call, args, kwargs, number)
        return _Run(self, env, number)

    def _refuse_results(self, what: str) -> None:
        if self.until is not None or (self._engine is not None and self._engine.judges):
            raise TypeError(f"{self.name}: until judges results, and {what} has items: judge them where they are used")

    def _wants(self, error: Exception) -> bool:
        on = self._on
        assert on is not None
        if isinstance(error, Rejected) and not isinstance(error, self._refusals):
            # `on=Exception` does not mean to knock at a closed door; a predicate that says so does.
            return any(predicate(error) for predicate in on.predicates)
        return error in on

    def _backoff(self, number: int, env: Env) -> float:
        if self.wait is not None:
            return float(self.wait)
        return env.rng.random() * min(LIMIT, BASE * 2.0 ** min(number - 1, 32))

    def _hinted(self, delay: float, outcome: Any, env: Env) -> float:
        return max(delay, min(hint(outcome, env), self.retry_after)) if self.retry_after else delay


class Ending:
    """What every run of attempts shares: is there time, and what is said at the end."""

    __slots__ = ("_began", "_env", "_policy", "_until", "again", "answer", "delay", "number")

    number: int
    again: bool
    delay: float

    def __init__(self, policy: Retry, env: Env, number: int) -> None:
        self._policy, self._env, self.number = policy, env, number
        self._began = env.clock.now()
        self._until = None if policy.total is None else self._began + policy.total
        self.again = True
        self.delay = 0.0
        self.answer: Any = None

    def fits(self, delay: float) -> bool:
        """Whether a wait of `delay` seconds leaves time for an attempt."""
        if self._until is not None and self._env.clock.now() + delay >= self._until:
            return False
        left = remaining()
        return left is None or delay < left

    def retrying(self, delay: float, error: Exception | None) -> None:
        """Go on after `delay` seconds."""
        self.delay = delay
        if self._env.sinks:
            from resilient.events import Retrying

            self._env.emit(Retrying(self._policy.name or "Retry", self.number, delay, error))

    def gave_up(self, error: Exception | None) -> None:
        """Go on no more; the error says how much was tried."""
        self.again = False
        elapsed = self._env.clock.now() - self._began
        if error is not None:
            of = f" of {self._policy.attempts}" if self._policy.stop is None else ""
            error.add_note(f"resilient: attempt {self.number}{of}, {elapsed:.1f} s")
        if self._env.sinks:
            from resilient.events import GaveUp

            self._env.emit(GaveUp(self._policy.name or "Retry", self.number, elapsed, error))


class _Run(Ending):
    """The attempts of one call."""

    __slots__ = ()

    def begin(self) -> None:
        self.number += 1

    def failed(self, error: Exception) -> bool:
        if not self._policy._wants(error):
            self.again = False
            return False
        return self._next(error, error)

    def returned(self, value: Any) -> None:
        until = self._policy.until
        if until is None or until(value) or not self._next(None, value):
            self.again = False
            self.answer = value

    def _next(self, error: Exception | None, outcome: Any) -> bool:
        policy, env = self._policy, self._env
        if self.number < policy.attempts:
            delay = policy._hinted(policy._backoff(self.number, env), outcome, env)
            if self.fits(delay):
                self.retrying(delay, error)
                return True
        self.gave_up(error)
        return False


class Attempt:
    """One turn of a block: `with attempt:` around what may fail. `number` counts from 1."""

    __slots__ = ("_run", "_value", "number", "used")

    def __init__(self, run: Run) -> None:
        self._run, self.number, self.used = run, run.number, False
        self._value: tuple[Any, ...] = ()

    def result(self, value: T) -> T:
        """Have `until` judge `value` when the block ends; returns it."""
        self._value = (value,)
        return value

    def __enter__(self) -> Attempt:
        self.used = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            self.end()
            return False
        if not isinstance(error, Exception):
            self._run.again = False
            return False
        return self._run.failed(error)

    async def __aenter__(self) -> Attempt:
        return self.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return self.__exit__(kind, error, trace)

    def end(self) -> None:
        """The block ended well."""
        if self._value:
            self._run.returned(self._value[0])
        else:
            self._run.again = False


class Block:
    """A loop over attempts. Each loop has its own: several tasks may share one `Retry`."""

    __slots__ = ("_env", "_policy")

    def __init__(self, policy: Retry, env: Env) -> None:
        self._policy, self._env = policy, env

    def __iter__(self) -> Iterator[Attempt]:
        run = self._policy._start(self._env, None, (), {}, 0)
        while run.again:
            if run.delay > 0:
                self._env.clock.sleep(run.delay)
            run.begin()
            attempt = Attempt(run)
            yield attempt
            if not attempt.used:
                attempt.end()

    async def __aiter__(self) -> AsyncIterator[Attempt]:
        run = self._policy._start(self._env, None, (), {}, 0)
        while run.again:
            if run.delay > 0:
                await self._env.clock.asleep(run.delay)
            run.begin()
            attempt = Attempt(run)
            yield attempt
            if not attempt.used:
                attempt.end()


def _strategies(on: Any, wait: Any, stop: Any) -> Any:
    """Which of the three come from tenacity, if any; tenacity is not imported to find out."""
    if "tenacity" not in sys.modules:
        return None
    from resilient._tenacity import recognise

    return recognise(on, wait, stop)
