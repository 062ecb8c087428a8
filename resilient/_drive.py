"""The two drivers of durable programs: a generator yields steps as data, a driver carries them out and answers.

A step is an operation for the store, or one of those below. Answers are sent, never thrown: an `Outcome` for a call, a
`StoreError` where the store failed, a `Cut` where the caller was cancelled or interrupted. So a program decides about
everything, and a test can stop it before each step. Costs some hundred nanoseconds a step. No state of their own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct

from resilient.errors import StoreError

if TYPE_CHECKING:
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["RUN", "Ask", "Cut", "Do", "Last", "Outcome", "Program", "Run", "Settle", "Sleep", "Wait", "adrive", "drive"]


class Outcome(Struct, eq=False):
    """How a call ended: with `value`, or with `error`."""

    value: Any
    error: BaseException | None

    def result(self) -> Any:
        """The value, or the error raised. Once only, or it would be a reference cycle."""
        error, self.error = self.error, None
        if error is None:
            return self.value
        try:
            raise error
        finally:
            del error

    def reraise(self, cause: BaseException | None) -> None:
        """Raise the error, unless it is `cause` itself; `cause` becomes its cause where it has none."""
        error, self.error = self.error, None
        if error is None or error is cause:
            return
        try:
            raise error from (cause if error.__cause__ is None else error.__cause__)
        finally:
            del error, cause


class Cut:
    """The caller was cancelled or interrupted by `error` while the store had the operation: it may have happened."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Run:
    """Call the guarded function; the answer is an `Outcome`."""


RUN = Run()


class Ask:
    """Call `function` with the arguments of the call; the answer is an `Outcome`."""

    __slots__ = ("function",)

    def __init__(self, function: Call) -> None:
        self.function = function


class Do:
    """Call `function` with arguments of its own; the answer is an `Outcome`."""

    __slots__ = ("args", "function", "kwargs")

    def __init__(self, function: Call, args: Any, kwargs: Any) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs


class Sleep:
    """Wait for `seconds`. The answer is None, or a `Cut`."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Wait:
    """Wait until the record of `key` changes, at most `seconds`. The answer is None, or a `Cut`.

    Where the store lets callers watch, the first `Wait` of a program only begins to: ask for the state after it.
    """

    __slots__ = ("key", "seconds")

    def __init__(self, key: str, seconds: float) -> None:
        self.key, self.seconds = key, seconds


class Settle:
    """Wait until the heartbeat that is just under way for `beat` has ended."""

    __slots__ = ("beat",)

    def __init__(self, beat: Any) -> None:
        self.beat = beat


class Last:
    """Carry out `op` although the caller is cancelled, within a few seconds. Answers like `op`, or a `StoreError`."""

    __slots__ = ("op",)

    def __init__(self, op: Any) -> None:
        self.op = op


_STEPS = frozenset((Run, Ask, Do, Sleep, Wait, Settle, Last))

Program: TypeAlias = Generator[Any, Any, Outcome]
"""A durable program. It ends by yielding its outcome, or by returning it, which takes a microsecond longer.

It must not yield in a `finally`: where nothing can be awaited any more, it is simply closed.
"""


def drive(program: Program, store: Any, env: Env, call: Call, args: Any, kwargs: Any) -> Outcome:
    """Carry out `program` in this thread."""
    execute = store.execute
    watch: Any = None
    got: Any = None
    try:
        while True:
            try:
                step = program.send(got)
            except StopIteration as stop:
                outcome: Outcome = stop.value
                return outcome
            kind: Any = step.__class__
            if kind is Outcome:
                ended: Outcome = step
                return ended
            try:
                if kind is Run:
                    try:
                        got = Outcome(call(*args, **kwargs), None)
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        got = Outcome(None, error)
                elif kind not in _STEPS:
                    got = execute(step)
                elif kind is Last:
                    got = _last(store, step.op)
                elif kind is Do:
                    got = _asked(step.function, step.args, step.kwargs)
                elif kind is Ask:
                    got = _asked(step.function, args, kwargs)
                else:
                    got = None
                    if kind is Settle:
                        step.beat.settle()
                    elif kind is Wait and watch is not None:
                        watch.park(env.clock, step.seconds)
                    elif kind is Wait and hasattr(store, "watch"):
                        watch = thread_watch(store, step.key)
                    else:
                        env.clock.sleep(step.seconds)
            except StoreError as error:
                got = error
            except Exception:
                raise
            except GeneratorExit:
                raise
            except BaseException as error:
                got = Cut(error)
    finally:
        if watch is not None:
            watch.close()
        # Not left to the garbage collector: the program stops its heartbeat.
        program.close()
        del got


async def adrive(program: Program, store: Any, env: Env, call: Call, args: Any, kwargs: Any) -> Outcome:
    """Carry out `program` in this task."""
    execute = store.aexecute
    watch: Any = None
    got: Any = None
    try:
        while True:
            try:
                step = program.send(got)
            except StopIteration as stop:
                outcome: Outcome = stop.value
                return outcome
            kind: Any = step.__class__
            if kind is Outcome:
                ended: Outcome = step
                return ended
            try:
                if kind is Run:
                    try:
                        got = Outcome(await call(*args, **kwargs), None)
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        got = Outcome(None, error)
                elif kind not in _STEPS:
                    got = await execute(step)
                elif kind is Last:
                    got = await _last_shielded(store, step.op)
                elif kind is Do:
                    got = await _aasked(step.function, step.args, step.kwargs)
                elif kind is Ask:
                    got = await _aasked(step.function, args, kwargs)
                else:
                    got = None
                    if kind is Settle:
                        await step.beat.asettle()
                    elif kind is Wait and watch is not None:
                        await watch.apark(env.clock, step.seconds)
                    elif kind is Wait and hasattr(store, "watch"):
                        watch = task_watch(store, step.key)
                    else:
                        await env.clock.asleep(step.seconds)
            except StoreError as error:
                got = error
            except Exception:
                raise
            except GeneratorExit:
                raise
            except BaseException as error:
                got = Cut(error)
    finally:
        if watch is not None:
            watch.close()
        # Not left to the garbage collector: the program stops its heartbeat.
        program.close()
        del got


def thread_watch(store: Any, key: str) -> Any:
    """Watch `key` as a thread."""
    return store.watch(key, task=False)


def task_watch(store: Any, key: str) -> Any:
    """Watch `key` as a task."""
    return store.watch(key, task=True)


def _asked(function: Call, args: Any, kwargs: Any) -> Outcome:
    try:
        return Outcome(_answered(function(*args, **kwargs)), None)
    except GeneratorExit:
        raise
    except BaseException as error:
        return Outcome(None, error)


async def _aasked(function: Call, args: Any, kwargs: Any) -> Outcome:
    try:
        return Outcome(await _awaited(function(*args, **kwargs)), None)
    except GeneratorExit:
        raise
    except BaseException as error:
        return Outcome(None, error)


def _answered(value: Any) -> Any:
    return value


async def _awaited(value: Any) -> Any:
    return await value if hasattr(value, "__await__") else value


def _last(store: Any, op: Any) -> Any:
    try:
        return store.execute(op)
    except StoreError as error:
        return error


async def _last_shielded(store: Any, op: Any) -> Any:
    from resilient._aio import shielded

    try:
        return await shielded(store.aexecute, op)
    except StoreError as error:
        return error
    except TimeoutError:
        return StoreError("the store did not answer in time, and the caller was cancelled", maybe_written=True)
