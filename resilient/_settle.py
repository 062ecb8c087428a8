"""How a saga ends: kept, undone, stuck, or left for another process; one program for all of them.

A driver carries it out (see `_drive`), so that it is the same for plain functions and coroutines, with a journal and
without. Whatever goes wrong in here is said to the caller, and nothing is undone by somebody who has lost the lease.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from resilient._drive import Outcome, Program
from resilient._undo import Undo, Undoing, backwards, unwind
from resilient.errors import InFlight, SagaAborted, SagaError, SagaLost, SagaStuck, StoreError

if TYPE_CHECKING:
    from resilient._book import Book
    from resilient._run import Run
    from resilient.retry import Retry
    from resilient.saga import Saga

__all__ = [
    "NOTHING",
    "apply_async",
    "apply_sync",
    "default_retry",
    "ended",
    "never",
    "rollback",
    "settle",
]


def default_retry() -> Retry:
    global _retry
    if _retry is None:
        from resilient.retry import Retry

        _retry = Retry(Exception, attempts=4, name="compensation")
    return _retry


_retry: Retry | None = None


def apply_sync(function: Any, args: Any, kwargs: Any) -> Any:
    value = function(*args, **kwargs)
    if hasattr(value, "__await__"):
        value.close()
        raise TypeError(f"the compensation {function!r} is async, and this saga is not: use `async with`")
    return value


async def apply_async(function: Any, args: Any, kwargs: Any) -> Any:
    value = function(*args, **kwargs)
    return await value if hasattr(value, "__await__") else value


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("unreachable")


class _Nothing:
    """The store of a saga that has none."""

    execute = aexecute = staticmethod(never)


NOTHING = _Nothing()


def settle(
    saga: Saga, run: Run, error: BaseException | None, guarded: Callable[..., Any], ok: bytes | None = None
) -> Program:
    """The end of a saga: keep, undo, or leave as it is. The outcome's error is what the block raises."""
    run._over = True
    book = run._book
    if book is None:
        return (yield from _settle(saga, run, None, error, guarded, None))
    try:
        return (yield from _settle(saga, run, book, error, guarded, ok))
    except (StoreError, SagaError, InFlight, LookupError) as fault:
        yield from book.close()
        if not book.taken:  # Else it is another saga that has this id, and of this one there is nothing.
            fault.add_note(f"resilient: saga {saga.name} ({run.id}) is not at its end: recovery will go on")
        return Outcome(None, fault if error is None or isinstance(error, Exception) else error)
    finally:
        book.stop()


def _settle(
    saga: Saga, run: Run, book: Book | None, error: BaseException | None, guarded: Callable[..., Any], ok: bytes | None
) -> Program:
    if book is not None:
        if book.lost or isinstance(error, SagaLost):
            # Somebody else has it, or the store is gone: whatever there is to do, the journal says it to whoever comes.
            yield from book.close()
            return Outcome(None, book.fault if error is None else error)
        if error is None and run._number < max(book.steps, default=0):
            book.depart(f"it ended after step {run._number}, and there were {max(book.steps)}")
        if book.departed is not None:
            yield from book.leave()
            return Outcome(None, book.departed)
        if error is None:
            yield from book.finish("done", ok, None)
            return Outcome(None, book.cut)
    assert error is not None
    failure = isinstance(error, Exception)
    if run._forward or (book is not None and book.forward):
        return (yield from _pivoted(saga, run, book, error))
    if failure and saga.compensate_on is not None and error not in saga.compensate_on:
        text = f"resilient: saga {saga.name} ({run.id}) is not undone: compensate_on does not name this error"
        error.add_note(text)
        if book is not None:
            if book.body is None and book.begun:
                yield from book.relabel("stuck", stuck=[f"{error!r}, which compensate_on does not name"])
            elif book.pending:
                yield from book.note()
            yield from book.leave()
        return Outcome(None, error)
    undos = backwards(run._stack)
    if book is not None and run._number < max(book.steps, default=0):
        # It failed before it came to where another process was: that is undone as well, and first.
        undos = [*book.left(run._number), *undos]
    return (yield from rollback(saga, run, error, undos, guarded))


def _pivoted(saga: Saga, run: Run, book: Book | None, error: BaseException) -> Program:
    """It failed where there is no way back."""
    if book is not None and book.body is not None:
        if book.begun and (book.pending or not book.forward):
            yield from book.note(pivot=True)
        yield from book.leave()
        error.add_note(f"resilient: saga {saga.name} ({run.id}) failed after its pivot: recovery will go forward")
        return Outcome(None, error)
    if book is not None:
        yield from book.relabel("stuck", stuck=[f"failed after its pivot: {error!r}"], pivot=True)
        yield from book.leave()
    else:
        ended(saga, run, "stuck")
    if not isinstance(error, Exception):
        error.add_note(f"resilient: saga {saga.name} ({run.id}) is stuck: it was interrupted after its pivot")
        return Outcome(None, error)
    stuck = SagaStuck("it failed after its pivot, from where it cannot go back", [error], saga.name, run.id)
    return Outcome(None, stuck)


def rollback(saga: Saga, run: Run, error: BaseException, undos: list[Undo], guarded: Callable[..., Any]) -> Program:
    """Undo, note it, and say how it ended. With a journal, raises what keeps it from being written."""
    book = run._book
    text = f"{type(error).__qualname__}: {error}"
    if book is not None and book.begun and book.failed is None:
        yield from book.relabel("compensating", failed=text)
    note = None if book is None else _noting(book)
    errors, cut = yield from unwind(saga.name, run.id, undos, guarded, saga.env, note)
    if book is not None:
        if errors:
            yield from book.relabel("stuck", stuck=_said(guarded, errors))
            yield from book.leave()
        elif book.begun:
            yield from book.finish("aborted", None, book.failed or text)
        cut = cut if book.cut is None else book.cut
    if book is None or not book.begun:
        ended(saga, run, "stuck" if errors else "aborted")
    if cut is not None or not isinstance(error, Exception):
        last = cut if cut is not None else error
        for one in errors:
            last.add_note(f"resilient: saga {saga.name} ({run.id}) is stuck: {one!r}")
        return Outcome(None, last)
    if errors and saga.on_stuck == "raise":
        return Outcome(None, SagaStuck("compensations failed for good", errors, saga.name, run.id))
    aborted = SagaAborted("a step failed, and all that was done is undone", saga.name, run.id)
    if errors:
        aborted = SagaAborted("a step failed, and not all that was done could be undone", saga.name, run.id)
        for one in errors:
            aborted.add_note(f"resilient: a compensation failed for good: {one!r}")
    return Outcome(None, aborted)


def _said(guarded: Callable[..., Any], errors: list[Exception]) -> list[str]:
    """What could not be undone, for people who read it later."""
    names = [undo.name for undo in guarded.failed] if isinstance(guarded, Undoing) else []
    return [f"the compensation of {name} failed: {error!r}" for name, error in zip(names, errors, strict=True)]


def _noting(book: Book) -> Callable[[Undo, BaseException | None], Generator[Any, Any, None]]:
    def note(undo: Undo, error: BaseException | None) -> Generator[Any, Any, None]:
        if error is None:
            yield from book.note(undone=[undo.number])

    return note


def ended(saga: Saga, run: Run, state: str) -> None:
    """Tell how a saga ended of which there is no journal. Where there is one, whoever writes it tells."""
    env = saga.env
    if env.sinks:
        from resilient.events import SagaEnded

        env.emit(SagaEnded(saga.name, run.id, state, None if run._since is None else env.clock.now() - run._since))
