"""What a saga has beside steps: steps beside each other, in threads or as tasks, and sagas inside it.

A group is announced in one commit before any of it runs. Whoever fails first ends the group: tasks are cancelled,
threads cannot be; all are waited for, so that nothing is undone while it still runs. A nested saga that fails is undone
at once; what cannot be undone of it stays with the whole, which will try again. Belongs to one task, as its saga does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from msgspec import Raw

from resilient._drive import Outcome, Program, drive
from resilient._journal import name_of, result_form
from resilient._run import step_key, unawaited
from resilient._settle import NOTHING, never
from resilient._undo import UNKNOWN, Undo, Undoing, backwards, unwind
from resilient.errors import SagaAborted, SagaStuck

if TYPE_CHECKING:
    from resilient._book import Book
    from resilient._run import Run
    from resilient._steps import AsyncSagaRun, SagaRun

__all__ = ["Nested", "announcing", "had", "in_tasks", "in_threads", "unkept", "values"]


def announcing(run: Run, made: list[tuple[Undo, Any]]) -> list[Any]:
    """What is to be written of a group before it runs; nothing of what the journal has already."""
    book = run._book
    if book is None:
        return []
    todo: list[Any] = []
    group = made[0][0].number
    for undo, function in made:
        undo.name = undo.name or name_of(function, "the step")
        result_form(function, undo.name)
        undoing = None if undo.compensate is None else undo
        if book.recorded(undo.number, undo.name, undo, run._forward, function) is None:
            todo.append(book.step(undo.number, undo.name, undoing, group, False, run._forward, function))
    return todo


def had(book: Book | None, undo: Undo, function: Any) -> bool:
    """Whether the journal has the value of a branch; then it is there."""
    if book is None or undo.number not in book.results:
        return False
    undo.value = book.value(undo.number, function, undo.name)
    return True


def values(run: Run, made: list[tuple[Undo, Any]], outcomes: list[Outcome]) -> None:
    """Note the values that came, for the journal. One that cannot be kept is an error of its branch."""
    if run._book is None:
        return
    for (undo, function), outcome in zip(made, outcomes, strict=False):
        if undo.value is not UNKNOWN:
            try:
                run._book.pending[undo.number] = Raw(result_form(function, undo.name).keep(undo.value))
            except Exception as error:
                unkept(error, undo.name)
                outcome.error = error


def unkept(error: BaseException, name: str) -> None:
    """Say whose result it is that cannot be written."""
    error.add_note(f"resilient: step {name} ran, and its result is not kept")


def in_threads(run: Run, made: list[tuple[Undo, Any]]) -> list[Outcome]:
    """Run the branches in threads, and wait for all of them, whatever comes."""
    import threading

    from resilient import _threads

    ended = threading.Semaphore(0)
    jobs: list[Any] = []
    outcomes = [Outcome(None, None) for _ in made]
    for (undo, function), outcome in zip(made, outcomes, strict=True):
        context = copy_context()
        context.run(step_key.set, f"{run.name}/{run.id}/{undo.number}")
        job = _threads.Job(function, undo.args, undo.kwargs, context, lambda _: ended.release())
        try:
            _threads.run(job)
        except RuntimeError as error:
            # There is no thread for it; those that run already are waited for all the same.
            outcome.error = error
            break
        jobs.append(job)
    cut: BaseException | None = None
    # By what the jobs say: an interrupt may come when a count is taken, and not yet seen here.
    while not all(job.over for job in jobs):
        try:
            ended.acquire()
        except BaseException as error:
            cut = error
    for (undo, function), job, outcome in zip(made, jobs, outcomes, strict=False):
        outcome.value, outcome.error, job.error = job.value, job.error, None
        if outcome.error is None and hasattr(job.value, "__await__"):
            outcome.error = unawaited(function, job.value)
        if outcome.error is None:
            undo.value = outcome.value
    for (undo, _), outcome in zip(made, outcomes, strict=True):
        run._told(undo.name, outcome.error)
    if cut is not None:
        outcomes.append(Outcome(None, cut))
        cut = None
    return outcomes


async def in_tasks(run: AsyncSagaRun, made: list[tuple[Undo, Any]]) -> list[Outcome]:
    """Run the branches as tasks, and wait for all of them. Cancelled, it raises that, after all have ended."""
    from resilient._aio import together

    outcomes = [Outcome(None, None) for _ in made]

    def begin(undo: Undo, function: Any, outcome: Outcome) -> Callable[[], Awaitable[Any]]:
        async def one() -> None:
            step_key.set(f"{run.name}/{run.id}/{undo.number}")
            try:
                undo.value = outcome.value = await run._awaited(function, undo.args, undo.kwargs)
            except BaseException as error:
                outcome.error = error
                raise
            finally:
                run._told(undo.name, outcome.error)

        return one

    calls = [begin(undo, function, outcome) for (undo, function), outcome in zip(made, outcomes, strict=True)]
    try:
        await together(calls)
    except BaseException as error:
        values(run, made, outcomes)
        for outcome in outcomes:
            outcome.error = None  # or it would be a reference cycle
        if run._book is not None:
            run._failed = error
        raise
    return outcomes


class Nested:
    """A part of a saga that is undone by itself if it fails, and with the whole if that fails later."""

    __slots__ = ("_name", "_outer", "_run")

    def __init__(self, run: Any, name: str) -> None:
        if type(name) is not str or not name:
            raise TypeError(f"name must be some text, not {name!r}")
        self._run, self._name = run, name
        self._outer: list[Any] | None = None

    def __enter__(self) -> SagaRun:
        run: SagaRun = self._enter(False)
        return run

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run, given = self._run, error
        if run._active:
            error = run._rest(error)
        mine = self._leave()
        if error is None or not self._alone(error):
            run._stack.append(mine)
        else:
            undoing = run._saga._undoer()
            drive(self._undone(mine, error, undoing), NOTHING, run._env, never, (), {}).reraise(error)
        if error is not None and error is not given:
            raise error

    async def __aenter__(self) -> AsyncSagaRun:
        run: AsyncSagaRun = self._enter(True)
        return run

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run, given = self._run, error
        if run._active and not isinstance(error, GeneratorExit):
            error = await run._arest(error)
        mine = self._leave()
        if error is None or not self._alone(error):
            run._stack.append(mine)
        else:
            undoing = run._saga._aundoer()
            await run._saga._carried(self._undone(mine, error, undoing), NOTHING, undoing, error, run.id)
        if error is not None and error is not given:
            raise error

    def _enter(self, is_async: bool) -> Any:
        run = self._run
        if run._is_async is not is_async:
            raise TypeError(
                f"saga {self._name} is inside another one: use `{'async ' * run._is_async}with`, as for that"
            )
        run._ready("saga inside it")
        if self._outer is not None:
            raise RuntimeError(f"saga {self._name} has been used already: each object is for one block")
        self._outer, run._stack = run._stack, []
        return run

    def _leave(self) -> list[Any]:
        """Back to the outer saga. What is to be undone of this one."""
        run = self._run
        mine: list[Any] = run._stack
        run._stack, self._outer = self._outer, []
        return mine

    def _alone(self, error: BaseException) -> bool:
        """Whether this part is undone by itself: not where the whole is in a journal, or forward, or cancelled."""
        run = self._run
        if run._book is not None or run._forward or not isinstance(error, Exception):
            return False
        wanted = run._saga.compensate_on
        return wanted is None or error in wanted

    def _undone(self, mine: list[Any], error: BaseException, undoing: Undoing) -> Program:
        run, name = self._run, self._name
        errors, cut = yield from unwind(run.name, run.id, backwards(mine), undoing, run._env)
        if undoing.failed:
            # They are still to be undone: the whole tries again, in their place.
            run._stack.append(undoing.failed[::-1])
        undoing.errors = []
        if cut is not None:
            return Outcome(None, cut)
        if errors and run._saga.on_stuck == "raise":
            return Outcome(None, SagaStuck("compensations failed for good", errors, name, run.id))
        if not errors:
            return Outcome(None, SagaAborted("a step failed, and all that was done is undone", name, run.id))
        aborted = SagaAborted("a step failed, and not all that was done could be undone", name, run.id)
        for one in errors:
            aborted.add_note(f"resilient: a compensation failed for good: {one!r}")
        return Outcome(None, aborted)
