"""Steps of a saga beside each other: in threads or as tasks, and what the journal has of them.

A group is announced in one commit before any of it runs. Whoever fails first ends the group: tasks are cancelled,
threads cannot be; all are waited for, so that nothing is undone while it still runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from resilient._drive import Outcome
from resilient._journal import name_of, result_form
from resilient._run import raw, step_key
from resilient._undo import UNKNOWN, Undo

if TYPE_CHECKING:
    from resilient._book import Book
    from resilient._run import Run
    from resilient.saga import AsyncSagaRun

__all__ = ["announcing", "had", "in_tasks", "in_threads", "values"]


def announcing(run: Run, made: list[tuple[Undo, Any]]) -> list[Any]:
    """What is to be written of a group before it runs; nothing of what the journal has already."""
    book = run._book
    if book is None:
        return []
    todo: list[Any] = []
    group = made[0][0].number
    for undo, function in made:
        undo.name = name_of(function, "the step")
        result_form(function, undo.name)
        undoing = None if undo.compensate is None else undo
        if book.recorded(undo.number, undo.name, undo, run._forward) is None:
            todo.append(book.step(undo.number, undo.name, undoing, group, False, run._forward, function))
    return todo


def had(book: Book | None, undo: Undo, function: Any) -> bool:
    """Whether the journal has the value of a branch; then it is there."""
    if book is None or undo.number not in book.results:
        return False
    undo.value = book.value(undo.number, function, undo.name)
    return True


def values(run: Run, made: list[tuple[Undo, Any]]) -> None:
    """Note the values that came, for the journal."""
    if run._book is not None:
        for undo, function in made:
            if undo.value is not UNKNOWN and undo.number not in run._book.results:
                run._book.pending[undo.number] = raw(result_form(function, undo.name).keep(undo.value))


def in_threads(run: Run, made: list[tuple[Undo, Any]]) -> list[Outcome]:
    import threading

    from resilient import _threads

    left = threading.Semaphore(0)
    jobs: list[Any] = []
    for undo, function in made:
        context = copy_context()
        context.run(step_key.set, f"{run.name}/{run.id}/{undo.number}")
        job = _threads.Job(function, undo.args, undo.kwargs, context, lambda _: left.release())
        jobs.append(job)
        _threads.run(job)
    outcomes: list[Outcome] = []
    cut: BaseException | None = None
    for _ in jobs:
        while True:
            try:
                left.acquire()
                break
            except BaseException as error:
                cut = error
    for (undo, _), job in zip(made, jobs, strict=True):
        outcome = Outcome(job.value, job.error)
        if outcome.error is None:
            undo.value = outcome.value
        run._told(undo.name, outcome.error)
        outcomes.append(outcome)
    if cut is not None:
        run._failed = cut
        raise cut
    return outcomes


async def in_tasks(run: AsyncSagaRun, made: list[tuple[Undo, Any]]) -> list[Outcome]:
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

    try:
        await together(
            [begin(undo, function, outcome) for (undo, function), outcome in zip(made, outcomes, strict=True)]
        )
    except BaseException as error:
        run._failed = error
        values(run, made)
        raise
    return outcomes
