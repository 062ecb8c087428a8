"""Saga: steps that are undone, the last first, if a later one fails; in memory, or with a journal that outlives it.

Promises: a step's compensation is registered before the step runs, and is called with what is known of it; every
compensation gets its chance; a cancelled saga is undone and stays cancelled. With a store, the death of the process is
one more failure: any other process finishes what was begun. Does not: isolate sagas from each other. In memory a step
costs a microsecond, with a store n steps cost n + 1 commits. A saga belongs to one thread or task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from resilient._ambient import deadline, nearest
from resilient._book import Book
from resilient._drive import Outcome, adrive, drive
from resilient._run import Branch, Run, branch, task_keeper, thread_keeper
from resilient._settle import NOTHING, apply_async, apply_sync, default_retry, ended, never, settle
from resilient._steps import AsyncSagaRun, SagaRun
from resilient._undo import RESULT, UNKNOWN, AsyncUndoing, Undoing, call
from resilient._verdict import Errors
from resilient.errors import SagaStuck
from resilient.policy import SYSTEM, Env, seconds, whole
from resilient.stores._open import shared

if TYPE_CHECKING:
    from resilient._drive import Program
    from resilient.retry import Retry

__all__ = ["RESULT", "UNKNOWN", "AsyncSagaRun", "Branch", "Saga", "SagaRun", "branch", "call"]

_INF = float("inf")
_USED: Any = "used"


class Saga:
    """A saga as a block: `with Saga("order") as saga:`, or `async with`. Each object is for one block.

    - `id` names this saga among those of its name; by default it is random.
    - `store`, a store or its URL, journals it. If this process dies, another undoes what was done, by
      `resilient.sagas.recover(URL, modules=["shop"])` or `resilient saga recover --store URL --module shop`: it calls
      functions of modules only that it vouches for. Steps and compensations must then be functions at the top of a
      module, and their arguments and results plain data, or typed by annotations.
    - `timeout` is for the steps together, in seconds. It is an ambient deadline inside of them; when it is over, what
      awaits is cut off with `CallTimeout`, and no other step begins (`DeadlineExceeded`). So it is with an ambient
      deadline around the saga. Compensations are under no deadline at all.
    - `compensate_on`: the errors that are undone (classes, or a predicate). Others leave everything as it is.
      Cancellation and interrupts are always undone.
    - `retries` is a `Retry` for compensations, each with counters of its own; by default four attempts at any error.
    - `on_stuck`: if a compensation fails for good, `"raise"` `SagaStuck`, or `"continue"` to `SagaAborted`.
    - `grace`: how many seconds a cancelled saga may take to undo; what is not begun by then is not undone. `lease`: see
      `Idempotent`.

    Ends in `SagaAborted` if it failed and all is undone; its cause is the step's error. A saga that was cancelled or
    interrupted stays so; if it is stuck as well, notes on that error and the log say it.

    >>> from resilient import Saga, SagaAborted
    >>> undone = []
    >>> try:
    ...     with Saga("order") as saga:
    ...         saga.step(len, "abc", compensate=call(undone.append, RESULT))
    ...         saga.step(int, "no number", compensate=None)
    ... except SagaAborted as aborted:
    ...     print(undone, type(aborted.__cause__).__name__)
    3
    [3] ValueError
    """

    __slots__ = (
        "_inside",
        "_run",
        "compensate_on",
        "env",
        "grace",
        "id",
        "lease",
        "name",
        "on_stuck",
        "retries",
        "store",
        "timeout",
        "version",
    )

    def __init__(
        self,
        name: str,
        *,
        id: str | None = None,
        store: Any = None,
        timeout: float | None = None,
        compensate_on: Any = Exception,
        on_stuck: Literal["raise", "continue"] = "raise",
        retries: Retry | None = None,
        grace: float = 30.0,
        lease: float = 30.0,
        version: int = 1,
        env: Env = SYSTEM,
    ) -> None:
        if type(name) is not str:
            raise TypeError(f"name must be some text, not {name!r}")
        if not 0 < len(name) <= 255 or not name.isprintable() or "/" in name:
            raise ValueError(f"name must be text of 1 to 255 printable characters and no '/', not {name!r}")
        if id is not None and (type(id) is not str or not 0 < len(id) <= 255 or not id.isprintable()):
            raise ValueError(f"id must be text of 1 to 255 printable characters, not {id!r}")
        if on_stuck != "raise" and on_stuck != "continue":
            raise ValueError(f"on_stuck must be 'raise' or 'continue', not {on_stuck!r}")
        if retries is not None:
            from resilient.retry import Retry

            if not isinstance(retries, Retry):
                raise TypeError(f"retries must be a Retry, not {retries!r}")
        self.name, self.on_stuck, self.env = name, on_stuck, env
        self.id = id
        self.timeout = None if timeout is None else seconds("timeout", timeout)
        self.compensate_on: Any = None if compensate_on is Exception else _Wanted("compensate_on", compensate_on)
        self.retries = retries
        self.grace = grace if grace == 30.0 else seconds("grace", grace)
        self.lease = lease if lease == 30.0 else seconds("lease", lease)
        self.version = version if type(version) is int and version >= 0 else whole("version", version, least=0)
        self.store = shared(store) if isinstance(store, str) else store
        self._run: Any = None
        self._inside: Any = None

    def __enter__(self) -> SagaRun:
        if self._run is not None:
            raise RuntimeError(f"saga {self.name} has been used already: each object is for one block")
        run = self._run = SagaRun(self)
        if self.store is not None:
            run._book = self._book(thread_keeper, "execute")
        self._limit(run)
        return run

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run: SagaRun = self._leave()
        try:
            given = error
            run._over = True
            if run._active:
                error = run._rest(error)
            if error is None and run._book is None:
                if self.env.sinks:
                    ended(self, run, "done")
                return
            if error is None and run._book is not None and run._done(run._book, None):
                return
            undoing = self._undoer()
            program = settle(self, run, error, undoing)
            outcome = drive(program, self.store or NOTHING, self.env, never, (), {})
            self._tell(undoing, outcome, error, run.id)
            outcome.reraise(error)
            if error is not None and error is not given:
                raise error
        finally:
            if run._book is not None:
                # Whatever came in between, nothing goes on saying that somebody has this saga in hand.
                run._book.beat.over = True

    async def __aenter__(self) -> AsyncSagaRun:
        if self._run is not None:
            raise RuntimeError(f"saga {self.name} has been used already: each object is for one block")
        run = self._run = AsyncSagaRun(self)
        if self.store is not None:
            run._book = self._book(task_keeper, "aexecute")
        self._limit(run)
        return run

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run: AsyncSagaRun = self._leave()
        try:
            if isinstance(error, GeneratorExit):
                self._closed(run, error)
                return
            given = error
            run._over = True
            if run._active:
                error = await run._arest(error)
            if error is None and run._book is None:
                if self.env.sinks:
                    ended(self, run, "done")
                return
            if error is None and run._book is not None and await run._done(run._book, None):
                return
            undoing = self._aundoer()
            if error is None:
                # A cancel meanwhile does not keep its end from being written, and is raised then.
                outcome = await adrive(settle(self, run, None, undoing), self.store, self.env, never, (), {})
                outcome.reraise(None)
                return
            await self._carried(settle(self, run, error, undoing), self.store or NOTHING, undoing, error, run.id)
            if error is not given:
                raise error
        finally:
            if run._book is not None:
                # Whatever came in between, nothing goes on saying that somebody has this saga in hand.
                run._book.beat.over = True

    # -- parts -------------------------------------------------------------------------------------------------------

    def _book(self, keeper: Callable[[Any, float, Env], Any], way: str) -> Book:
        if not callable(getattr(self.store, way, None)):
            raise TypeError(f"{self.store!r} cannot be used by this kind of saga: it has no {way}")
        return Book(
            self.store,
            self.env,
            self.name,
            self._run.id,
            self.version,
            self.lease,
            keeper(self.store, self.lease, self.env),
            None,
        )

    def _leave(self) -> Any:
        """The run, which ends now. Nothing of it stays with this object, or it would be a reference cycle."""
        run, self._run = self._run, _USED
        if self._inside is not None:
            self._unlimit()
        run._failed = None
        return run

    async def _carried(
        self, program: Program, store: Any, undoing: Undoing, error: BaseException | None, id: str
    ) -> None:
        """Undo, cancelled or not, and raise what comes of it; cancelled, it stays so."""
        from resilient._aio import sheltered

        undoing.alone = True
        gone = error is not None and not isinstance(error, Exception)
        came = False
        try:
            outcome, came = await sheltered(
                gone, self.grace, adrive, program, store, self.env, never, (), {}, late=undoing.stop
            )
        except TimeoutError as late:
            text = f"its compensations took longer than the {self.grace:g} s of grace that a cancelled saga has"
            outcome = Outcome(None, error if gone else SagaStuck(text, [late], self.name, id))
            undoing.errors.append(late)
            came = not gone
        final = outcome.error
        if came and (final is None or isinstance(final, Exception)):
            from asyncio import CancelledError

            outcome.error = CancelledError()
            for one in undoing.errors:
                outcome.error.add_note(f"resilient: saga {self.name} ({id}) is stuck: {one!r}")
            error = error if final is None else final
        del final
        self._tell(undoing, outcome, error, id)
        outcome.reraise(error)

    def _closed(self, run: AsyncSagaRun, error: GeneratorExit) -> None:
        """Undo where nothing may be awaited any more: what is plain; `SagaStuck` for the rest."""
        if run._book is not None:
            # Another process goes on from here.
            run._book.stop()
            return
        undoing = Undoing(_apply_closed)
        outcome = drive(settle(self, run, error, undoing), NOTHING, self.env, never, (), {})
        if undoing.errors:
            text = "its coroutine was closed, and compensations failed or could not be awaited"
            outcome.error, undoing.errors = SagaStuck(text, undoing.errors, self.name, run.id), []
        outcome.reraise(error)

    def _tell(self, undoing: Undoing, outcome: Outcome, error: BaseException | None, id: str) -> None:
        """Log what could not be undone where no `SagaStuck` says it."""
        errors, undoing.errors = undoing.errors, []
        if errors and not isinstance(outcome.error, Exception):
            import logging

            log = logging.getLogger("resilient")
            for one in errors:
                log.error("saga %s (%s) is stuck: %r", self.name, id, one)

    def _limit(self, run: Run) -> None:
        """Begin the time of the steps, if it is limited: by `timeout`, or by the deadline around the saga."""
        clock = self.env.clock
        until = nearest(clock)
        if self.timeout is None and until == _INF:
            return
        start = clock.now()
        run._until, run._span = until, max(0.0, until - start)
        if self.timeout is not None:
            if start + self.timeout < until:
                run._until, run._span = start + self.timeout, self.timeout
            self._inside = deadline(self.timeout, clock=clock)
            self._inside.__enter__()

    def _unlimit(self) -> None:
        if self._inside is not None:
            self._inside.__exit__(None, None, None)
            self._inside = None

    def _limited(self, run: Run) -> Callable[[], None]:
        """Begin the time of the steps, if it is limited; what is returned ends it."""
        self._limit(run)
        return self._unlimit

    def _retry(self) -> Retry:
        if self.retries is None:
            return default_retry()
        if self.retries.name is None:
            self.retries.name = "compensation"
        return self.retries

    def _undoer(self) -> Undoing:
        return Undoing(self._retry().sync(apply_sync, self.env))

    def _aundoer(self) -> Undoing:
        return AsyncUndoing(self._retry().coro(apply_async, self.env))


class _Wanted(Errors):
    """The errors that are undone. One that the predicate cannot judge is."""

    __slots__ = ()

    def __contains__(self, error: BaseException) -> bool:
        try:
            return super().__contains__(error)
        except Exception as fault:
            error.add_note(f"resilient: compensate_on could not judge this, so it is undone: {fault!r}")
            return True


def _apply_closed(function: Any, args: Any, kwargs: Any) -> Any:
    value = function(*args, **kwargs)
    if hasattr(value, "__await__"):
        close = getattr(value, "close", None)
        if close is not None:
            close()
        raise RuntimeError(f"the compensation {function!r} has to be awaited, and its coroutine was being closed")
    return value
