"""What a saga knows while it runs, apart from how its functions are called; and what its steps are guarded with.

Pure but for the weak tables of guards and heartbeats, which functions and stores share. A run belongs to one task.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from resilient._drive import Outcome, Program
from resilient._guard import kind_of
from resilient._keeper import TaskKeeper, ThreadKeeper
from resilient._undo import Undo, check
from resilient.errors import DeadlineExceeded, SagaError

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
    "raw",
    "step_key",
    "task_keeper",
    "thread_keeper",
]

MISSING: Any = object()
"""No word about a compensation."""


class Branch(Struct, frozen=True, eq=False):
    """One of several steps that run beside each other. Made by `branch`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    compensate: Any
    name: str | None


def branch(
    function: Callable[..., Any], /, *args: Any, compensate: Any, name: str | None = None, **kwargs: Any
) -> Branch:
    """A branch for `saga.parallel`, with its compensation (or None)."""
    check(compensate)
    return Branch(function, args, kwargs, compensate, name)


step_key: ContextVar[str | None] = ContextVar("resilient.saga.key", default=None)


class Run:
    """What a saga knows while it runs; the base of `SagaRun` and `AsyncSagaRun`."""

    _book: Book | None = None
    _until: float | None = None
    _forward = _over = False
    _active = _number = 0
    _failed: BaseException | None = None

    def __init__(self, saga: Saga) -> None:
        self._saga = saga
        self._stack: list[Any] = []
        self._top = self._stack
        self._id = saga.id

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
        """An idempotency key: of the step that runs, or between steps of the one that comes next.

        It is the same in every process that runs this step of this saga. Hand it to what the step calls.
        """
        key = step_key.get()
        if key is not None:
            return key
        return f"{self._saga.name}/{self.id}/{self._active or self._number + 1}"

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
        if self._over:
            raise RuntimeError(f"saga {self._saga.name} has ended: no step can begin")
        if self._failed is not None and self._book is not None:
            raise SagaError(
                "a step has failed, and a saga with a journal cannot go on then: let the error pass, or handle it "
                "inside of the step's function",
                self._saga.name,
                self.id,
            ) from self._failed

    def _late(self) -> None:
        if self._until is not None and self._saga.env.clock.now() >= self._until:
            raise DeadlineExceeded(self._saga.name)

    def _told(self, name: str, error: BaseException | None) -> None:
        if self._saga.env.sinks:
            from resilient.events import StepDone

            self._saga.env.emit(StepDone(self._saga.name, self.id, name, error))

    def _branches(self, given: tuple[Any, ...]) -> list[tuple[Undo, Any]]:
        """The branches of a group: what undoes each, and its function."""
        made: list[tuple[Undo, Any]] = []
        for one in given:
            if type(one) is Branch:
                made.append(
                    (Undo(0, one.name or called(one.function), one.compensate, one.args, one.kwargs), one.function)
                )
                continue
            function, *args = one if isinstance(one, tuple) else (one,)
            self._check(function, MISSING, "before")
            made.append((Undo(0, called(function), None, tuple(args), {}), function))
        if not made:
            raise ValueError("parallel needs at least one branch")
        for undo, function in made:
            self._check(function, undo.compensate, "before")
            self._number += 1
            undo.number = self._number
        return made

    def _grouped(self, branches: list[tuple[Undo, Any]]) -> None:
        group = [undo for undo, _ in branches if undo.compensate is not None]
        if group:
            self._stack.append(group)

    def _first(self, outcomes: list[Outcome]) -> None:
        """Raise the error of the first branch that failed by itself, with notes of the others."""
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if not errors:
            return
        first = next((error for error in errors if isinstance(error, Exception)), errors[0])
        for other in errors:
            if other is not first and isinstance(other, Exception):
                first.add_note(f"resilient: another branch failed as well: {other!r}")
        self._failed = first
        try:
            raise first
        finally:
            del first, errors, outcomes


def called(function: Any) -> str:
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def raw(data: bytes) -> Any:
    from msgspec import Raw

    return Raw(data)


def one(program: Generator[Any, Any, None]) -> Program:
    yield from program
    return Outcome(None, None)


_guards: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def guarded(function: Any, retry: Retry | None, timeout: float | None, env: Env) -> Any:
    """`function` with the guards of a step, made once for each function and settings."""
    known = _guards.setdefault(function, {})
    made = known.get((id(retry), timeout, id(env)))
    if made is None:
        from resilient.pipeline import Pipeline
        from resilient.timeout import Timeout

        policies: list[Any] = [] if retry is None else [retry]
        if timeout is not None:
            policies.append(Timeout(timeout, sync="deadline" if kind_of(function) == "sync" else None))
        # The policies are kept with it, so that their ids stay theirs.
        made = known[id(retry), timeout, id(env)] = Pipeline(*policies, env=env)(function)
    return made


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
