"""What a saga knows while it runs, apart from how its functions are called; and what its steps are guarded with.

Pure but for the weak tables of guards and heartbeats, which functions and stores share. A run belongs to one task.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from msgspec import Struct

from resilient._drive import Outcome, Program
from resilient._guard import kind_of
from resilient._keeper import TaskKeeper, ThreadKeeper
from resilient._park import ThreadWaiter, task_waiter
from resilient._undo import Compensation, Undo, check, plain, step_key
from resilient.clock import SystemClock
from resilient.errors import CallTimeout, DeadlineExceeded, SagaError
from resilient.policy import seconds

if TYPE_CHECKING:
    from resilient._book import Book
    from resilient.policy import Env
    from resilient.retry import Retry
    from resilient.saga import Saga

__all__ = [
    "MISSING",
    "Branch",
    "Run",
    "branch",
    "called",
    "guarded",
    "one",
    "step_key",
    "task_keeper",
    "thread_keeper",
    "title",
    "unawaited",
]

MISSING: Any = object()
"""No word about a compensation."""


R = TypeVar("R")


class Branch(Struct, Generic[R], frozen=True, eq=False):
    """One of several steps that run beside each other. Made by `branch`."""

    function: Callable[..., R]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    compensate: Any
    name: str | None


def branch(
    function: Callable[..., R],
    /,
    *args: Any,
    compensate: Callable[..., object] | Compensation | None,
    name: str | None = None,
    **kwargs: Any,
) -> Branch[R]:
    """A branch for `saga.parallel`, with its compensation (or None)."""
    check(compensate)
    title(function, name)
    return Branch(function, args, kwargs, compensate, name)


class Run:
    """What a saga knows while it runs; the base of `SagaRun` and `AsyncSagaRun`."""

    _is_async = False
    _book: Book | None = None
    # When the time of the steps is over, and how much of it there was.
    _until: float | None = None
    _span = 0.0
    _forward = _over = False
    # The number of the step that runs, and of the last one; who waits at the end for a step that still runs.
    _active = _number = 0
    _resting: Any = None
    # Only where there is a journal, which allows no step after it.
    _failed: BaseException | None = None
    # When it began, if somebody listens.
    _since: float | None = None

    def __init__(self, saga: Saga) -> None:
        self._saga = saga
        self._env = saga.env
        self._stack: list[Any] = []
        self._id = saga.id
        if self._env.sinks:
            self._since = self._env.clock.now()

    @property
    def id(self) -> str:
        """The id of the saga."""
        if self._id is None:
            self._id = os.urandom(16).hex()
        return self._id

    @property
    def name(self) -> str:
        """The name of the saga."""
        return self._saga.name

    @property
    def step_key(self) -> str:
        """An idempotency key: of the step that runs, or is undone; between steps, of the one that comes next.

        It is the same in every process that runs this step of this saga. Hand it to what the step calls.
        """
        mine = f"{self._saga.name}/{self.id}"
        key = step_key.get()
        if key is not None and key.rpartition("/")[0] == mine:
            return key
        return f"{mine}/{self._active or self._number + 1}"

    def pivot(self) -> None:
        """From here on there is no way back: later steps need no compensation, and a failure is for a person."""
        self._forward = True

    def _check(self, function: Any, compensate: Any, register: str) -> None:
        if not callable(function):
            raise TypeError(f"a step needs a function, not {function!r}")
        if compensate is MISSING:
            if not self._forward:
                raise TypeError(
                    f"step {called(function)} says nothing of its compensation: compensate=function, or None if there "
                    "is nothing to undo"
                )
        else:
            check(compensate)
        if register not in ("before", "after"):
            raise ValueError(f"register must be 'before' or 'after', not {register!r}")
        self._ready("step")
        if self._failed is not None and self._book is not None:
            raise SagaError(
                "a step has failed, and a saga with a journal cannot go on then: let the error pass, or handle it "
                "inside of the step's function",
                self._saga.name,
                self.id,
            ) from self._failed

    def _ready(self, what: str) -> None:
        """Whether something can begin now: a saga does one thing at a time."""
        if self._over:
            raise RuntimeError(f"saga {self._saga.name} has ended: no {what} can begin")
        if self._active:
            raise RuntimeError(
                f"no {what} can begin while another step of saga {self._saga.name} runs: steps beside each other are "
                "branches of saga.parallel, and what a step does inside is a part of it, or a saga of its own"
            )

    def _idle(self) -> None:
        """No step runs any more."""
        self._active = 0
        if self._resting is not None:
            self._resting.notify()

    def _went_on(self) -> RuntimeError:
        return RuntimeError(
            f"saga {self._saga.name} ended while its step {self._active} still ran: await, or join, whatever you begin"
        )

    def _rest(self, error: BaseException | None) -> BaseException:
        """Wait for a step that runs in another thread: nothing is undone while it runs. The error of the block."""
        error = self._went_on() if error is None else error
        self._resting = waiter = ThreadWaiter()
        try:
            if self._active:
                waiter.park(SystemClock(), self._saga.grace)
        except BaseException as cut:
            return cut
        return error

    async def _arest(self, error: BaseException | None) -> BaseException:
        """Wait for a step that runs in another task; when cancelled, some seconds, and it stays so. The error."""
        error = self._went_on() if error is None else error
        if isinstance(error, Exception):
            self._resting = waiter = task_waiter()
            try:
                if self._active:
                    await waiter.apark(SystemClock(), self._saga.grace)
                return error
            except GeneratorExit:
                raise
            except BaseException as cut:
                error = cut
        from resilient._aio import shielded

        self._resting = waiter = task_waiter()
        if self._active:
            try:
                await shielded(waiter.apark, SystemClock(), None)
            except TimeoutError:
                pass
        return error

    def _late(self) -> None:
        if self._until is not None and self._env.clock.now() >= self._until:
            raise DeadlineExceeded(self._saga.name)

    def _cut(self) -> CallTimeout:
        """The error of a step that is cut off."""
        return CallTimeout(self._saga.name, self._span)

    def _told(self, name: str, error: BaseException | None) -> None:
        if self._env.sinks:
            from resilient.events import StepDone

            self._env.emit(StepDone(self._saga.name, self.id, name, error))

    def _branches(self, given: tuple[Any, ...]) -> list[tuple[Undo, Any]]:
        """The branches of a group: what undoes each, and its function. All are checked before any has a number."""
        made: list[tuple[Undo, Any]] = []
        for one in given:
            function: Any
            if type(one) is Branch:
                beside = cast(Any, one)
                function = beside.function
                self._check(function, beside.compensate, "before")
                if beside.compensate is not None and not self._is_async:
                    plain(beside.compensate)
                undo = Undo(0, beside.name or "", beside.compensate, beside.args, beside.kwargs)
            else:
                parts: tuple[Any, ...] = tuple(cast(Any, one)) if isinstance(one, tuple) else (one,)
                function = parts[0] if parts else None
                self._check(function, MISSING, "before")
                undo = Undo(0, "", None, parts[1:], {})
            if self._book is None:
                undo.name = undo.name or called(function)
            made.append((undo, function))
        if not made:
            raise ValueError("parallel needs at least one branch")
        for undo, _ in made:
            self._number += 1
            undo.number = self._number
        return made

    def _grouped(self, branches: list[tuple[Undo, Any]]) -> None:
        group = [undo for undo, _ in branches if undo.compensate is not None]
        if group:
            self._stack.append(group)

    def _first(self, outcomes: list[Outcome]) -> None:
        """Raise the error of the branch that failed first by itself, with notes of the others."""
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        for outcome in outcomes:
            outcome.error = None  # or it would be a reference cycle
        if not errors:
            return
        first = min(errors, key=_rank)
        others = [repr(other) for other in errors if other is not first and isinstance(other, Exception)]
        for said in others:
            first.add_note(f"resilient: another branch failed as well: {said}")
        if self._book is not None:
            self._failed = first
        try:
            raise first
        finally:
            del first, errors


def _rank(error: BaseException) -> int:
    """Interrupts before errors, and errors before the cancels that they have caused."""
    return 0 if isinstance(error, (KeyboardInterrupt, SystemExit)) else 1 if isinstance(error, Exception) else 2


def called(function: Any) -> str:
    """The name of a function, as people know it."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def title(function: Any, name: str | None) -> str:
    """What a step is called, if it can be one."""
    if name is not None and (type(name) is not str or not name):
        raise TypeError(f"name must be some text, not {name!r}")
    if not callable(function):
        raise TypeError(f"a step needs a function, not {function!r}")
    return called(function) if name is None else name


def unawaited(function: Any, value: Any = None) -> TypeError:
    """The error of a plain saga with a step that is async; `value` will never be awaited."""
    close = getattr(value, "close", None)
    if close is not None:
        close()
    return TypeError(f"step {called(function)} is async, and its saga is not: use `async with`")


def one(program: Generator[Any, Any, None]) -> Program:
    yield from program
    return Outcome(None, None)


def guarded(function: Any, retry: Retry | None, timeout: float | None, env: Env, is_async: bool | None = None) -> Any:
    """`function` with the guards of a step. They are made once for each settings, and keep no function alive.

    `is_async`: the saga is, and awaits what can be awaited. By default, as the function is.
    """
    if retry is not None:
        from resilient.retry import Retry

        if not isinstance(retry, Retry):
            raise TypeError(f"retry must be a Retry, not {retry!r}")
    if timeout is not None:
        timeout = seconds("timeout", timeout)
    if is_async is None:
        is_async = kind_of(function) == "coro"
    elif not is_async and kind_of(function) == "coro":
        raise unawaited(function)
    return partial(_shell(called(function), retry, timeout, env, is_async), function)


@lru_cache(maxsize=256)
def _shell(name: str, retry: Retry | None, timeout: float | None, env: Env, is_async: bool) -> Any:
    from resilient.pipeline import Pipeline
    from resilient.timeout import Timeout

    policies: list[Any] = []
    if retry is not None:
        if retry.name is None:
            retry.name = name
        policies.append(retry)
    if timeout is not None:
        policies.append(Timeout(timeout, sync=None if is_async else "deadline", name=name))
    return Pipeline(*policies, env=env)(_athrough if is_async else _through)


def _through(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    value = function(*args, **kwargs)
    if hasattr(value, "__await__"):
        raise unawaited(function, value)
    return value


async def _athrough(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    value = function(*args, **kwargs)
    return await value if hasattr(value, "__await__") else value


_keepers: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _lost(beat: Any) -> None:
    """The next entry finds out."""


def thread_keeper(store: Any, lease: float, env: Env) -> ThreadKeeper:
    """The heartbeat thread of a store's sagas."""
    known = _keepers.setdefault(store, {})
    made: ThreadKeeper = known.get(lease) or known.setdefault(lease, ThreadKeeper(weakref.proxy(store), lease, _lost))
    return made


def task_keeper(store: Any, lease: float, env: Env) -> TaskKeeper:
    """The heartbeats of a store's sagas in event loops."""
    known = _keepers.setdefault(store, {})
    key = lease, id(env.clock)
    made: TaskKeeper = known.get(key) or known.setdefault(
        key, TaskKeeper(weakref.proxy(store), lease, _lost, env.clock)
    )
    return made
