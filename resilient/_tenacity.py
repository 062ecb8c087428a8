"""tenacity's strategies, hooks and `Retrying` objects under `Retry`: the same decisions, without its call machinery.

Only tenacity's public API (9.2 and later) is used. The order of what is asked and called is tenacity's: retry, after,
wait, stop, then callback or error, else before_sleep, sleep, before. Imported only when an object of tenacity is met.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import tenacity
from tenacity import RetryCallState, TryAgain
from tenacity.asyncio.retry import async_retry_base
from tenacity.retry import retry_base
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from resilient._stream import Opened
from resilient.retry import Ending, Retry

if TYPE_CHECKING:
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["Engine", "adopt", "recognise"]

Ask = Callable[[Any], Any]
Steps = Generator[Any, Any, Any]

# Strategies whose answer to a result is always no: a success needs not ask them. Exact types: subclasses may differ.
_ERRORS_ONLY = {
    tenacity.retry_if_exception,
    tenacity.retry_if_exception_type,
    tenacity.retry_if_not_exception_type,
    tenacity.retry_if_exception_message,
    tenacity.retry_if_exception_cause_type,
}
# Those that do not look at the time, so that no clock is read before the first attempt.
_TIMELESS = {tenacity.stop_after_attempt, tenacity.stop_when_event_set}


def _named(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


class Found(NamedTuple):
    retry: bool
    wait: bool
    stop: bool


def recognise(on: Any, wait: Any, stop: Any) -> Found | None:
    """Which of the three are tenacity's; None if none is."""
    found = Found(isinstance(on, retry_base), isinstance(wait, wait_base), isinstance(stop, stop_base))
    return found if any(found) else None


def _judges(strategy: Any) -> bool:
    if type(strategy) in (tenacity.retry_any, tenacity.retry_all):
        return any(_judges(part) for part in strategy.retries)
    return type(strategy) not in _ERRORS_ONLY and strategy is not tenacity.retry_never


def _timed(strategy: Any) -> bool:
    if type(strategy) in (tenacity.stop_any, tenacity.stop_all):
        return any(_timed(part) for part in strategy.stops)
    return type(strategy) not in _TIMELESS and strategy is not tenacity.stop_never


def _is_async(function: Any) -> bool:
    if type(function) in (tenacity.retry_any, tenacity.retry_all):
        return any(_is_async(part) for part in function.retries)
    inner = getattr(function, "predicate", None)
    called = cast(Any, type(function)).__dict__.get("__call__")
    return isinstance(function, async_retry_base) or any(
        inspect.iscoroutinefunction(one) for one in (function, called, inner)
    )


class Engine:
    """tenacity's settings, made ready: what is asked after an attempt, and what is known before the first."""

    __slots__ = (
        "after",
        "asleep",
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
        self.asleep: Callable[[float], Awaitable[None]] | None = None
        self.error_class: type[tenacity.RetryError] = tenacity.RetryError
        self.reraise = True
        self.origin: Any = None
        self.enabled = True
        self.judges = False
        self.upfront = False
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
        made.judges = retry and _judges(policy.on)
        made._prepare(wait and not type(policy.wait).__module__.startswith("tenacity."), stop and _timed(policy.stop))
        return made

    def _prepare(self, *timed: bool) -> None:
        asked = (self.retry, self.wait, self.stop, self.before, self.after, self.before_sleep, self.callback)
        for one in asked:
            if one is not None and _is_async(one):
                self.asynchronous = _named(one)
        self.upfront = self.judges or any(timed) or self.before is not None

    def start(self, policy: Retry, env: Env, call: Call | None, args: Any, kwargs: Any, number: int) -> _Run:
        """The attempts of one call."""
        return _Run(self, policy, env, call, args, kwargs, number)

    def coro(self, policy: Retry, call: Call, env: Env) -> Call:
        """The coroutine shell where something that is asked is async."""
        scope = policy._scope(env)

        async def retry(*args: Any, **kwargs: Any) -> Any:
            run = _Run(self, policy, env, call, args, kwargs, 0)
            asleep = self.asleep or env.clock.asleep
            with scope():
                while run.again:
                    if run.delay > 0:
                        await asleep(run.delay)
                    await run.adrive(run.beginning())
                    try:
                        value = await call(*args, **kwargs)
                    except Exception as error:
                        if not await run.adrive(run.after_error(error)):
                            raise
                    else:
                        await run.adrive(run.after_result(value))
            return run.answer

        return retry


class _State(RetryCallState):
    """A `RetryCallState` that costs little to make and goes by our clock."""

    def __init__(self, run: _Run, engine: Engine, env: Env, call: Call | None, args: Any, kwargs: Any) -> None:
        self.start_time = run._began
        self.retry_object = engine.origin
        self.fn: Any = call
        self.args, self.kwargs = args, kwargs
        self.attempt_number = max(run.number, 1)
        self.outcome: Any = None
        self.outcome_timestamp = None
        self.idle_for = 0.0
        self.next_action = None
        self.upcoming_sleep = 0.0
        self.env = env
        self.name = run._policy.name

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


class _Run(Ending):
    """The attempts of one call under tenacity's strategies.

    Each step is a generator that yields what was answered and is sent it back: as it is, or awaited.
    """

    __slots__ = ("_engine", "state")

    def __init__(
        self, engine: Engine, policy: Retry, env: Env, call: Call | None, args: Any, kwargs: Any, number: int
    ) -> None:
        super().__init__(policy, env, number)
        self._engine = engine
        self.state = _State(self, engine, env, call, args, kwargs)

    def begin(self) -> None:
        self._drive(self.beginning())

    def failed(self, error: Exception) -> bool:
        return bool(self._drive(self.after_error(error)))

    def returned(self, value: Any) -> None:
        self._drive(self.after_result(value))

    def _drive(self, steps: Steps) -> Any:
        answer: Any = None
        while True:
            try:
                answer = steps.send(answer)
            except StopIteration as stop:
                return stop.value

    async def adrive(self, steps: Steps) -> Any:
        answer: Any = None
        while True:
            try:
                answer = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            if inspect.isawaitable(answer):
                answer = await answer

    def beginning(self) -> Steps:
        self.number += 1
        state = self.state
        state.attempt_number = self.number
        state.outcome = state.outcome_timestamp = state.next_action = None
        if self._engine.before is not None:
            yield self._engine.before(state)

    def after_error(self, error: Exception) -> Steps:
        explicit = isinstance(error, TryAgain)
        self._note(None, error)
        if not explicit and not (yield self._engine.retry(self.state)):
            self.again = False
            self.state.outcome = None
            return False
        return (yield from self._next(error, error))

    def after_result(self, value: Any) -> Steps:
        until = self._policy.until
        if self._engine.judges and type(value) is not Opened:
            self._note(value, None)
            again = yield self._engine.retry(self.state)
        else:
            again = False
        if again:
            yield from self._next(None, value)
        elif until is None or until(value):
            self.again, self.answer = False, value
        else:
            self._note(value, None)
            yield from self._next(None, value)

    def _note(self, value: Any, error: BaseException | None) -> None:
        self.state.outcome = _Outcome(self.number, value, error)
        self.state.outcome_timestamp = self._env.clock.now()

    def _next(self, error: Exception | None, outcome: Any) -> Steps:
        engine, state, policy = self._engine, self.state, self._policy
        if engine.after is not None:
            yield engine.after(state)
        state.upcoming_sleep = yield engine.wait(state)
        stop = yield engine.stop(state)
        delay = policy._hinted(state.upcoming_sleep, outcome, self._env)
        if stop or not self.fits(delay):
            self.gave_up(error)
            if engine.callback is not None:
                self.answer = yield engine.callback(state)
                state.outcome = None
                return True
            return self._end(error, outcome)
        state.upcoming_sleep = delay
        state.next_action = tenacity.RetryAction(delay)
        state.idle_for += delay
        if engine.before_sleep is not None:
            yield engine.before_sleep(state)
        self.retrying(delay, error)
        state.outcome = None
        return True

    def _end(self, error: Exception | None, outcome: Any) -> bool:
        """How it ends without success: False if the error goes to the caller, else raise, or keep the last result."""
        engine, state = self._engine, self.state
        state.outcome = None
        if error is None and not engine.judges:
            self.answer = outcome
            return False
        if error is not None and engine.reraise:
            cause = (error.__cause__ or error.__context__) if isinstance(error, TryAgain) else None
            if cause is not None:
                raise cause.with_traceback(cause.__traceback__) from None
            return False
        future = tenacity.Future.construct(self.number, outcome if error is None else error, error is not None)
        try:
            raise engine.error_class(future) from error
        finally:
            # The error holds the future, and this frame must not hold the error in turn.
            del future, error, outcome


def adopt(existing: Any) -> Any:
    """See `Retry.adopt`."""
    retrying = getattr(existing, "retry", None)
    target = getattr(existing, "__wrapped__", None)
    if isinstance(retrying, tenacity.BaseRetrying) and callable(target):
        return adopt(retrying)(target)
    if not isinstance(existing, tenacity.BaseRetrying):
        raise TypeError(f"cannot adopt {existing!r}: it is neither a tenacity.Retrying nor decorated by tenacity")
    return _adopted(existing)


def _adopted(existing: tenacity.BaseRetrying) -> Retry:
    policy = Retry(Exception, retry_after=None, name=None)
    policy.on, policy.wait, policy.stop = existing.retry, existing.wait, existing.stop
    engine = Engine(existing.retry, existing.wait, existing.stop)
    hooks = {
        "before": tenacity.before_nothing,
        "after": tenacity.after_nothing,
        "before_sleep": tenacity.before_sleep_nothing,
    }
    for hook, nothing in hooks.items():
        given = getattr(existing, hook)
        setattr(engine, hook, None if given is nothing else given)
    engine.callback = existing.retry_error_callback
    engine.error_class, engine.reraise = existing.retry_error_cls, existing.reraise
    engine.enabled, engine.origin = existing.enabled, existing
    engine.judges = _judges(existing.retry)
    default = inspect.signature(type(existing).__init__).parameters["sleep"].default
    if existing.sleep is not default:
        engine.sleep = engine.asleep = existing.sleep  # type: ignore[assignment]
        if not _is_async(existing.sleep):
            engine.asleep = _awaited(existing.sleep)
    engine._prepare(
        _timed(existing.stop),
        not type(existing.wait).__module__.startswith("tenacity."),
        not isinstance(existing.retry, retry_base),
        any(getattr(engine, hook) is not None for hook in ("after", "before_sleep", "callback")),
    )
    policy._engine = engine
    return policy


def _awaited(sleep: Callable[[float], Any]) -> Callable[[float], Awaitable[None]]:
    async def asleep(seconds: float) -> None:
        answer = sleep(seconds)
        if inspect.isawaitable(answer):
            await answer

    return asleep
