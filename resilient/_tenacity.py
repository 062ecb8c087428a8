"""tenacity's strategies, hooks and `Retrying` objects under `Retry`: the same decisions, without its call machinery.

Only tenacity's public API (9.2 and later) is used. The order of what is asked and called is tenacity's: retry, after,
wait, stop, then callback or error, else before_sleep, sleep, before. Imported only when an object of tenacity is met.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from types import CoroutineType, MethodType
from typing import TYPE_CHECKING, Any, cast

import tenacity
from tenacity import RetryCallState, TryAgain

from resilient._attempts import Attempts
from resilient._strategies import called, check, is_async, judges, own, timed
from resilient._stream import Opened
from resilient.retry import Retry

if TYPE_CHECKING:
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["Engine", "adopt"]

Ask = Callable[[Any], Any]
Steps = Generator[Any, Any, Any]


class Engine:
    """tenacity's settings, made ready: what is asked after an attempt, and what is known before the first."""

    __slots__ = (
        "after",
        "asynchronous",
        "before",
        "before_sleep",
        "callback",
        "enabled",
        "error_class",
        "judges",
        "origin",
        "reraise",
        "retry",
        "sleep",
        "stop",
        "timed",
        "upfront",
        "wait",
    )

    def __init__(self, retry: Ask, wait: Ask, stop: Ask) -> None:
        self.retry, self.wait, self.stop = retry, wait, stop
        self.before: Ask | None = None
        self.after: Ask | None = None
        self.before_sleep: Ask | None = None
        self.callback: Ask | None = None
        self.sleep: Callable[[float], Any] | None = None
        self.error_class: type[tenacity.RetryError] = tenacity.RetryError
        self.reraise = True
        self.origin: tenacity.BaseRetrying | None = None
        self.enabled = True
        self.judges = False
        self.upfront = self.timed = False
        self.asynchronous: str | None = None

    @classmethod
    def of(cls, policy: Retry, retry: bool, wait: bool, stop: bool) -> Engine:
        """The engine of a `Retry` some of whose settings are strategies."""

        def wants(state: Any) -> bool:
            return state.outcome.failed and policy._wants(state.outcome.exception())

        def backoff(state: Any) -> float:
            return policy._backoff(state.attempt_number, state.env)

        def enough(state: Any) -> bool:
            return bool(state.attempt_number >= policy.attempts)

        made = cls(
            policy.on if retry else wants,
            cast(Ask, policy.wait) if wait else backoff,
            policy.stop if stop else enough,
        )
        made.judges = retry and judges(policy.on)
        made._prepare(wait and own(policy.wait), stop and timed(policy.stop))
        return made

    @classmethod
    def adopted(cls, existing: tenacity.BaseRetrying) -> Engine:
        """The engine of a `Retrying`, with its hooks."""
        made = cls(existing.retry, existing.wait, existing.stop)
        nothing = (tenacity.before_nothing, tenacity.after_nothing, tenacity.before_sleep_nothing, None)
        for hook in ("before", "after", "before_sleep"):
            given = getattr(existing, hook)
            setattr(made, hook, None if given in nothing else given)
        made.callback = existing.retry_error_callback
        made.error_class, made.reraise = existing.retry_error_cls, existing.reraise
        made.enabled, made.origin = existing.enabled, existing
        made.judges = judges(existing.retry)
        default = inspect.signature(type(existing).__init__).parameters["sleep"].default
        made.sleep = None if existing.sleep is default else existing.sleep
        hooks = (made.after, made.before_sleep, made.callback)
        made._prepare(timed(existing.stop), own(existing.wait), any(hook is not None for hook in hooks))
        return made

    def _prepare(self, *informed: bool) -> None:
        asked = (self.retry, self.wait, self.stop, self.before, self.after, self.before_sleep, self.callback)
        for one in (*asked, self.sleep):
            if one is not None:
                check(one)
                if is_async(one):
                    self.asynchronous = called(one)
        self.upfront = self.judges or self.before is not None
        self.timed = any(informed)

    def start(
        self, policy: Retry, env: Env, call: Call | None, args: Any, kwargs: Any, number: int, began: float | None
    ) -> Any:
        """The attempts of one call."""
        if not self.enabled:
            return _Once(policy, env, number)
        made = _Attempts(policy, env, number, began)
        made.adorn(self, call, args, kwargs)
        return made


class _State(RetryCallState):
    """A `RetryCallState` that costs little to make and goes by our clock."""

    def __init__(
        self, run: Attempts, origin: Any, policy: Retry, env: Env, call: Call | None, args: Any, kwargs: Any
    ) -> None:
        self.start_time = run._began
        self.retry_object: Any = origin or policy
        self.fn: Any = call
        self.args, self.kwargs = args, kwargs
        self.attempt_number = max(run.number, 1)
        self.outcome: Any = None
        self.outcome_timestamp = None
        self.idle_for = 0.0
        self.next_action = None
        self.upcoming_sleep = 0.0
        self.env = env
        self.name = policy.name

    def get_fn_name(self) -> str:
        # Not of `fn`, which may be the next policy inwards.
        return self.name or str(self.retry_object)


class _Outcome:
    """What strategies read of a `tenacity.Future`, without its locks."""

    __slots__ = ("_error", "_value", "attempt_number")

    def __init__(self, number: int, value: Any, error: BaseException | None) -> None:
        self.attempt_number, self._value, self._error = number, value, error

    @property
    def failed(self) -> bool:
        return self._error is not None

    def done(self) -> bool:
        return True

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._error

    def result(self, timeout: float | None = None) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


class _Future(tenacity.Future):
    """The last attempt, for those who get it in the end. Unlike tenacity's own it can cross a process boundary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Future.construct, (self.attempt_number, self.exception() or self.result(), self.failed)


class _Steps(Attempts):
    """The attempts of one call under tenacity's strategies.

    Each step is a generator that yields what was answered and is sent it back: as it is, or awaited.
    """

    __slots__ = ("_engine", "_raised", "_state")

    def adorn(self, engine: Engine, call: Call | None, args: Any, kwargs: Any) -> None:
        """Add what tenacity's strategies may look at."""
        self._engine = engine
        self._raised: tuple[BaseException, BaseException | None] | None = None
        self._state: Any = _State(self, engine.origin, self._policy, self._env, call, args, kwargs)

    @property
    def asynchronous(self) -> str | None:  # type: ignore[override]
        return self._engine.asynchronous

    def result(self) -> Any:
        """Return the answer, or raise the error that tenacity raises in place of the function's own."""
        raised, self._raised = self._raised, None
        if raised is None:
            return self._answer
        error, cause = raised
        try:
            raise error from cause
        finally:
            # The error leads to this frame, which must not lead back.
            del raised, error, cause

    def _beginning(self) -> Steps:
        self._state.attempt_number = self.number
        if self._engine.before is not None:
            yield self._engine.before(self._state)

    def _after_error(self, error: Exception) -> Steps:
        self._note(None, error)
        if not isinstance(error, TryAgain) and not (yield self._engine.retry(self._state)):
            self._state = None
            return self.pass_on(error)
        return (yield from self._next(error, error))

    def _after_result(self, value: Any) -> Steps:
        seen = value.item if type(value) is Opened else value
        over = type(value) is Opened and value.over
        if self._engine.judges and not over:
            self._note(seen, None)
            if (yield self._engine.retry(self._state)):
                yield from self._next(None, seen)
                self._keep(value)
                return
        if self._policy._approves(value):
            self.again, self._answer, self._state = False, value, None
        else:
            self._note(seen, None)
            yield from self._next(None, seen)
            self._keep(value)

    def _keep(self, value: Any) -> None:
        """The last result is the answer, unless somebody else has answered or an error is raised in its place."""
        if not self.again and self._engine.callback is None:
            self._answer = value

    def _note(self, value: Any, error: BaseException | None) -> None:
        self._state.outcome = _Outcome(self.number, value, error)
        self._state.outcome_timestamp = self._env.clock.now()

    def _next(self, error: Exception | None, outcome: Any) -> Steps:
        engine, state = self._engine, self._state
        if engine.after is not None:
            yield engine.after(state)
        wait = state.upcoming_sleep = yield engine.wait(state)
        stop = yield engine.stop(state)
        delay = None if stop else self.fit(wait, outcome)
        if delay is None:
            self.give_up(error)
            self._state = None
            state.outcome = _Future.construct(self.number, outcome if error is None else error, error is not None)
            if engine.callback is not None:
                self._answer = yield engine.callback(state)
                return True
            return self._end(error, state.outcome)
        state.upcoming_sleep = delay
        state.next_action = tenacity.RetryAction(delay)
        state.idle_for += delay
        if engine.before_sleep is not None:
            yield engine.before_sleep(state)
        self.go_on(delay, error)
        state.prepare_for_next_attempt()
        return True

    def _end(self, error: Exception | None, future: Any) -> bool:
        """How it ends without success: False if the error goes to the caller, else `result` knows."""
        engine = self._engine
        if error is None and engine.origin is None:
            return False
        if error is not None and engine.reraise:
            cause = (error.__cause__ or error.__context__) if isinstance(error, TryAgain) else None
            if cause is None:
                return False
            self._raised = (cause, None)
        else:
            self._raised = (engine.error_class(future), error)
        return True


class _Answered(_Steps):
    """Steps of a plain function: what was answered is sent back as it is."""

    __slots__ = ()

    def pause(self) -> None:
        if self._engine.sleep is None:
            super().pause()
        else:
            if self.number:
                self._engine.sleep(self.delay)
            self.number += 1
        self._drive(self._beginning())

    def failed(self, error: Exception) -> bool:
        return bool(self._drive(self._after_error(error)))

    def returned(self, value: Any) -> None:
        self._drive(self._after_result(value))

    def _drive(self, steps: Steps) -> Any:
        answer: Any = None
        while True:
            try:
                answer = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            if type(answer) is CoroutineType:
                cast(Any, answer).close()
                raise TypeError(
                    "here a strategy must answer at once, and it returned a coroutine: "
                    "in a coroutine function it may (in a block: `async for` and `async with attempt`)"
                )


class _Attempts(_Answered):
    """And of a coroutine function: what was answered is awaited if it is a coroutine."""

    __slots__ = ()

    async def apause(self) -> None:
        if self._engine.sleep is None:
            await super().apause()
        else:
            if self.number:
                slept = self._engine.sleep(self.delay)
                if inspect.isawaitable(slept):
                    await slept
            self.number += 1
        await self._adrive(self._beginning())

    async def afailed(self, error: Exception) -> bool:
        return bool(await self._adrive(self._after_error(error)))

    async def areturned(self, value: Any) -> None:
        await self._adrive(self._after_result(value))

    async def _adrive(self, steps: Steps) -> Any:
        answer: Any = None
        while True:
            try:
                answer = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            if type(answer) is CoroutineType:
                answer = await cast(Any, answer)


class _Once(Attempts):
    """The only attempt of a call whose `Retrying` is not enabled."""

    __slots__ = ()

    def failed(self, error: Exception) -> bool:
        self.again = False
        return False

    def returned(self, value: Any) -> None:
        self.again, self._answer = False, value

    async def afailed(self, error: Exception) -> bool:
        return self.failed(error)

    async def areturned(self, value: Any) -> None:
        self.returned(value)


def adopt(existing: Any) -> Any:
    """See `Retry.adopt`."""
    if isinstance(existing, tenacity.BaseRetrying):
        policy = Retry(Exception, retry_after=None)
        policy.on, policy.wait, policy.stop = existing.retry, existing.wait, existing.stop
        policy._engine = Engine.adopted(existing)
        return policy
    if isinstance(existing, MethodType):
        return MethodType(adopt(existing.__func__), existing.__self__)
    if isinstance(existing, (classmethod, staticmethod)):
        again: Any = classmethod if isinstance(existing, classmethod) else staticmethod
        return again(adopt(cast(Any, existing).__func__))
    retrying, target = getattr(existing, "retry", None), getattr(existing, "__wrapped__", None)
    if not isinstance(retrying, tenacity.BaseRetrying) or not callable(target):
        raise TypeError(f"cannot adopt {existing!r}: it is neither a tenacity.Retrying nor decorated by tenacity")
    if getattr(target, "retry", None) is retrying:
        # `functools.wraps` copies attributes outwards: without this, that decorator would be lost.
        raise TypeError(f"cannot adopt {existing!r}: another decorator is around tenacity's; adopt what is inside it")
    return adopt(retrying)(target)
