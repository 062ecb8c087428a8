"""Fallback: another answer in place of an error.

Promises: when the call fails with one of the chosen errors, the caller gets a value, or what a function returns that is
called with the same arguments. Does not: retry, or hide `CancelledError`, `KeyboardInterrupt` and their kind. Costs one
closure call while all is well. No state, safe from any thread and loop.
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
)
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast, overload

from resilient._guard import decorate, kind_of
from resilient._stream import Opened, opened_gen, opened_stream
from resilient._verdict import Errors
from resilient.policy import Policy

if TYPE_CHECKING:
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["Fallback"]

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D")
T = TypeVar("T")
A = TypeVar("A", bound=Callable[..., Any])

On = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], object]


class Fallback(Policy, Generic[D]):
    """Answer with a value, or with what a function returns, when the call fails with `on`.

    A function is called with the arguments of the call (without them if it has no parameters for any), and with the
    error as `error=` if it has a parameter of that name. It may be `async def` where the guarded function is. Anything
    callable counts as a function: give `lambda: thing` for a value that happens to be callable.

    `on` is an exception class, a tuple of them, or a predicate of the error; by default every `Exception`, those by
    which policies refuse or cut off a call included. If the fallback fails, its error comes out, with the first one as
    its context.

    Generators and streams fall back until their first item, to an iterable (for streams an async one will do).

    >>> from resilient import Fallback
    >>> @Fallback(lambda path, error: f"{path}: {type(error).__name__}", on=OSError)
    ... def first_line(path: str) -> str:
    ...     with open(path) as file:
    ...         return file.readline()
    >>> first_line("/nowhere")
    '/nowhere: FileNotFoundError'
    """

    __slots__ = ("_asynchronous", "_bare", "_caught", "_fits", "_function", "_wants_error", "name", "on", "value")

    role = "fallback"

    @overload
    def __init__(
        self, value: Callable[..., Coroutine[Any, Any, D]], *, on: On = Exception, name: str | None = None
    ) -> None: ...

    @overload
    def __init__(self, value: Callable[..., D], *, on: On = Exception, name: str | None = None) -> None: ...

    @overload
    def __init__(self, value: D, *, on: On = Exception, name: str | None = None) -> None: ...

    def __init__(self, value: Any, *, on: On = Exception, name: str | None = None) -> None:
        self.value = value
        self.on = on
        self.name = name
        self._function: Callable[..., Any] | None = value if callable(value) else None
        self._asynchronous = False
        self._wants_error = self._bare = False
        if self._function is not None:
            self._asynchronous = kind_of(value) == "coro"
            self._wants_error, self._bare = _takes(value)
        chosen = Errors("on", on, failures=True)
        # The interpreter's own matching is free on the success path; predicates are asked afterwards.
        self._caught: tuple[type[BaseException], ...] = (Exception,) if chosen.predicates else chosen.classes
        self._fits = chosen.__contains__ if chosen.predicates else None

    @overload  # type: ignore[override]
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Callable[P, Coroutine[Any, Any, R | D]]: ...

    @overload
    def __call__(self, fn: Callable[P, R], /) -> Callable[P, R | D]: ...

    @overload
    def __call__(self, fn: classmethod[T, P, R], /) -> classmethod[T, P, R | D]: ...

    def __call__(self, fn: Any, /) -> Any:
        """Guard `fn`: what it returns, or the fallback."""
        return decorate((self,), fn)

    def describe(self) -> dict[str, Any]:
        """The settings that matter, as plain data."""
        return {"name": self.name, "value": self.value, "on": self.on}

    def sync(self, call: Call, env: Env) -> Call:
        """Guard a plain function."""
        caught, fits, answer = self._how(self._answer)

        def fallback(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except caught as error:
                if fits is not None and not fits(error):
                    raise
                return answer(env, error, args, kwargs)

        return fallback

    def coro(self, call: Call, env: Env) -> Call:
        """Guard a coroutine function."""
        caught, fits, answer = self._how(self._aanswer)

        async def fallback(*args: Any, **kwargs: Any) -> Any:
            try:
                return await call(*args, **kwargs)
            except caught as error:
                if fits is not None and not fits(error):
                    raise
                return await answer(env, error, args, kwargs)

        return fallback

    def gen(self, call: Call, env: Env) -> Call:
        """Guard a generator function until its first item."""
        self._check_items(Iterable, "a generator")
        guard = self.sync

        def shell(opening: Call) -> Call:
            guarded = guard(opening, env)

            def fallback(*args: Any, **kwargs: Any) -> Opened:
                value = guarded(*args, **kwargs)
                return value if type(value) is Opened else _opened(value)

            return fallback

        return opened_gen(call, shell)

    def stream(self, call: Call, env: Env) -> Call:
        """Guard an async generator function until its first item."""
        self._check_items((Iterable, AsyncIterable), "a stream")
        guard = self.coro

        def shell(opening: Call) -> Call:
            guarded = guard(opening, env)

            async def fallback(*args: Any, **kwargs: Any) -> Opened:
                value = await guarded(*args, **kwargs)
                return value if type(value) is Opened else await _aopened(value)

            return fallback

        return opened_stream(call, shell)

    def _answer(self, env: Env, error: BaseException, args: Any, kwargs: Any) -> Any:
        try:
            self._tell(env, error)
            args, kwargs = ((), {}) if self._bare else (args, kwargs)
            return self._make(args, {**kwargs, "error": error} if self._wants_error else kwargs)
        finally:
            del error

    async def _aanswer(self, env: Env, error: BaseException, args: Any, kwargs: Any) -> Any:
        try:
            self._tell(env, error)
            args, kwargs = ((), {}) if self._bare else (args, kwargs)
            return await self._amake(args, {**kwargs, "error": error} if self._wants_error else kwargs)
        finally:
            del error

    def _make(self, args: Any, kwargs: Any) -> Any:
        try:
            return self.value if self._function is None else self._function(*args, **kwargs)
        finally:
            del kwargs

    async def _amake(self, args: Any, kwargs: Any) -> Any:
        try:
            value = self._make(args, kwargs)
            return await value if self._asynchronous else value
        finally:
            del kwargs

    def _how(self, answer: A) -> tuple[tuple[type[BaseException], ...], Callable[[BaseException], bool] | None, A]:
        """What to catch, what to ask then, and who answers."""
        if self._asynchronous and answer == self._answer:
            raise TypeError(
                f"the fallback {self.value!r} is async, which a plain function cannot await: give a plain one"
            )
        return self._caught, self._fits, answer

    def _tell(self, env: Env, error: BaseException) -> None:
        if env.sinks:
            from resilient.events import FellBack

            env.emit(FellBack(self.name or "fallback", error))

    def _check_items(self, kinds: Any, what: str) -> None:
        if self._function is not None:
            return
        if not isinstance(self.value, kinds):
            raise TypeError(f"the fallback of {what} must be something to iterate over, not {self.value!r}")
        if isinstance(self.value, (Iterator, AsyncIterator)):
            raise TypeError(
                f"the fallback of {what} is {self.value!r}, which can be used only once: give a function that makes one"
            )


def _takes(function: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether it has a parameter named `error` (and does not only take any), and whether it has no others."""
    import inspect

    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False, False
    error = parameters.get("error")
    named = error is not None and error.kind in (error.KEYWORD_ONLY, error.POSITIONAL_OR_KEYWORD)
    return named, len(parameters) == named


def _opened(items: Iterable[Any]) -> Opened:
    """A generator over `items`, at its first one."""

    def each() -> Generator[Any, Any, None]:
        yield from items

    source = each()
    try:
        return Opened(source, next(source), False)
    except StopIteration as stop:
        return Opened(source, stop.value, True)


async def _aopened(items: Any) -> Opened:
    """A stream over `items`, sync or async, at its first one."""

    async def each() -> AsyncGenerator[Any, Any]:
        if isinstance(items, AsyncIterable):
            async for item in cast(Any, items):
                yield item
        else:
            for item in items:
                yield item

    source = each()
    try:
        return Opened(source, await anext(source), False)
    except StopAsyncIteration:
        return Opened(source, None, True)
