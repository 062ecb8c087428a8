"""Saga: steps that are undone, the last first, if a later one fails; in memory, or with a journal that outlives it.

Promises: a step's compensation is registered before the step runs, and is called with what is known of it; every
compensation gets its chance; a cancelled saga is undone and stays cancelled. With a store, the death of the process is
one more failure: any other process finishes what was begun. Does not: isolate sagas from each other. In memory a step
costs a microsecond, with a store n steps cost n + 1 commits. A saga belongs to one thread or task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from msgspec import Raw

from resilient._ambient import deadline, nearest
from resilient._book import Book
from resilient._drive import Cut, Outcome, adrive, drive
from resilient._journal import name_of, result_form
from resilient._parallel import Nested, announcing, had, in_tasks, in_threads, values
from resilient._run import (
    MISSING,
    Branch,
    Run,
    branch,
    guarded,
    one,
    task_keeper,
    thread_keeper,
    title,
    unawaited,
)
from resilient._settle import NOTHING, apply_async, apply_sync, default_retry, ended, never, settle
from resilient._undo import RESULT, UNKNOWN, AsyncUndoing, Compensation, Undo, Undoing, call, check
from resilient._verdict import Errors
from resilient.errors import SagaStuck, StoreError
from resilient.policy import SYSTEM, Env, seconds, whole
from resilient.stores._open import shared

if TYPE_CHECKING:
    from resilient._drive import Program
    from resilient._journal import Step
    from resilient.retry import Retry

__all__ = ["RESULT", "UNKNOWN", "AsyncSagaRun", "Branch", "Saga", "SagaRun", "branch", "call"]

R = TypeVar("R")

_INF = float("inf")
_USED: Any = "used"


class Saga:
    """A saga as a block: `with Saga("order") as saga:`, or `async with`. Each object is for one block.

    - `id` names this saga among those of its name; by default it is random.
    - `store`, a store or its URL, journals it. If this process dies, another undoes what was done
      (`resilient.sagas.recover`, or `resilient saga recover URL`). Steps and compensations must then be functions at
      the top of a module, and their arguments and results plain data, or typed by annotations.
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
        if error is None and run._book is None:
            run._over = True
            if self.env.sinks:
                ended(self, run, "done")
            return
        undoing = self._undoer()
        program = settle(self, run, error, undoing)
        outcome = drive(program, self.store or NOTHING, self.env, never, (), {})
        self._tell(undoing, outcome, error, run.id)
        outcome.reraise(error)

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
        if isinstance(error, GeneratorExit):
            self._closed(run, error)
            return
        if error is None and run._book is None:
            run._over = True
            if self.env.sinks:
                ended(self, run, "done")
            return
        undoing = self._aundoer()
        if error is None:
            # A cancel meanwhile does not keep its end from being written, and is raised then.
            outcome = await adrive(settle(self, run, None, undoing), self.store, self.env, never, (), {})
            outcome.reraise(None)
            return
        await self._carried(settle(self, run, error, undoing), self.store or NOTHING, undoing, error, run.id)

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


class SagaRun(Run):
    """A saga that runs, for plain functions."""

    def step(
        self,
        function: Callable[..., R],
        /,
        *args: Any,
        compensate: Callable[..., object] | Compensation | None = MISSING,
        register: Literal["before", "after"] = "before",
        retry: Retry | None = None,
        timeout: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> R:
        """Run `function(*args, **kwargs)` and return its value; `compensate` undoes it if the saga fails later.

        The compensation is called with the step's arguments, and with its value as `result=` if it has a parameter of
        that name; or exactly as `call(…)` says. It is registered before the step runs, since a step may fail and have
        had its effect: then `result` is `UNKNOWN`. `register="after"` is for steps that fail without a trace.
        `compensate=None` says that there is nothing to undo. `retry` and `timeout` guard this step.

        What the function raises comes out as it is; what is wrong with the step itself (`TypeError`, `ValueError`,
        `RuntimeError` while another step runs, `DeadlineExceeded`) before it runs.
        """
        if compensate is MISSING or self._active or self._over or register != "before" or self._failed is not None:
            self._check(function, compensate, register)
            if compensate is MISSING:
                compensate = None
        if self._until is not None:
            self._late()
        try:
            named = function.__qualname__ if name is None else title(function, name)
        except AttributeError:
            named = title(function, None)
        run = function if retry is None and timeout is None else guarded(function, retry, timeout, self._env, False)
        undo: Undo | None = None
        if compensate is not None:
            if type(compensate) is not Compensation:
                check(compensate)
            undo = Undo(0, named, compensate, args, kwargs)
        if self._book is not None or self._env.sinks:
            # A name that was not given is another one in a journal.
            undo = undo or Undo(0, named, None, args, kwargs)
            undo.name = named if name is not None or self._book is None else ""
            noted: R = self._noted(undo, function, run, register)
            return noted
        self._number = self._active = number = self._number + 1
        if undo is not None:
            undo.number = number
            if register == "before":
                self._stack.append(undo)
        try:
            value: R = run(*args, **kwargs)
            if hasattr(value, "__await__"):
                raise unawaited(function, value)
        finally:
            self._active = 0
        if undo is not None:
            undo.value = value
            if register == "after":
                self._stack.append(undo)
        return value

    def _noted(self, undo: Undo, function: Any, run: Any, register: str) -> Any:
        book, form = self._book, None
        undo.number = number = self._number + 1
        if book is not None:
            place = name_of(function, "the step")
            undo.name = undo.name or place
            form = result_form(function, place)
            if book.recorded(number, undo.name, undo, self._forward) is not None and number in book.results:
                self._number = number
                undo.value = book.value(number, function, undo.name)
                if undo.compensate is not None:
                    self._stack.append(undo)
                return undo.value
            if number not in book.steps:
                undoing = None if undo.compensate is None else undo
                step = book.step(number, undo.name, undoing, 0, register == "after", self._forward, function)
                self._announce(book, step)
        self._number = self._active = number
        if undo.compensate is not None and register == "before":
            self._stack.append(undo)
        try:
            value = run(*undo.args, **undo.kwargs)
            if hasattr(value, "__await__"):
                raise unawaited(function, value)
            undo.value = value
            if book is not None and form is not None:
                book.pending[number] = Raw(form.keep(value))
        except BaseException as error:
            if book is not None:
                self._failed = error
            self._told(undo.name, error)
            raise
        finally:
            self._active = 0
        if undo.compensate is not None and register == "after":
            self._stack.append(undo)
        self._told(undo.name, None)
        return value

    def _announce(self, book: Book, step: Step) -> None:
        op = book.at_once(step, self._forward)
        if op is not None:
            reply: Any
            try:
                reply = book.store.execute(op)
            except StoreError as error:
                reply = error
            except (Exception, GeneratorExit):
                raise
            except BaseException as error:
                reply = Cut(error)
            if book.announced(step, reply):
                return
        drive(one(book.announce([step], self._forward)), book.store, book.env, never, (), {})

    def parallel(self, *branches: Any) -> list[Any]:
        """Run several steps beside each other, each in a thread with a copy of the context; their values, in order.

        A branch is `branch(function, *args, compensate=…)`, or (after the pivot) a tuple of a function and its
        arguments. If one fails, the others are waited for, since threads cannot be cancelled, and then its error is
        raised. Each branch has its own `step_key`; a branch cannot have steps of this saga.
        """
        self._late()
        made = self._branches(branches)
        steps = announcing(self, made)
        if self._book is not None and steps:
            drive(one(self._book.announce(steps, self._forward)), self._book.store, self._book.env, never, (), {})
        self._grouped(made)
        todo = [(undo, function) for undo, function in made if not had(self._book, undo, function)]
        self._active = made[0][0].number
        try:
            outcomes = in_threads(self, todo)
        finally:
            self._active = 0
        values(self, made)
        self._first(outcomes)
        return [undo.value for undo, _ in made]

    def nested(self, name: str) -> Nested:
        """A saga inside this one: `with saga.nested("shipping") as child:`. To the outer one it is one step.

        In memory, a failure inside is undone at once and comes out as `SagaAborted`, which the outer one may catch;
        what could not be undone (`SagaStuck`) stays with the outer one, which tries again. With a journal it is a
        failure of the whole; so it is after the pivot, and when cancelled.
        """
        return Nested(self, name)


class AsyncSagaRun(Run):
    """A saga that runs, for coroutines; plain functions may be steps and compensations too."""

    _is_async = True

    @overload
    async def step(
        self,
        function: Callable[..., Awaitable[R]],
        /,
        *args: Any,
        compensate: Callable[..., object] | Compensation | None = MISSING,
        register: Literal["before", "after"] = "before",
        retry: Retry | None = None,
        timeout: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> R: ...

    @overload
    async def step(
        self,
        function: Callable[..., R],
        /,
        *args: Any,
        compensate: Callable[..., object] | Compensation | None = MISSING,
        register: Literal["before", "after"] = "before",
        retry: Retry | None = None,
        timeout: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> R: ...

    async def step(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        compensate: Callable[..., object] | Compensation | None = MISSING,
        register: Literal["before", "after"] = "before",
        retry: Retry | None = None,
        timeout: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run `function(*args, **kwargs)`, awaited if it is async, and return its value. See `SagaRun.step`."""
        if compensate is MISSING or self._active or self._over or register != "before" or self._failed is not None:
            self._check(function, compensate, register)
            if compensate is MISSING:
                compensate = None
        if self._until is not None:
            self._late()
        try:
            named = function.__qualname__ if name is None else title(function, name)
        except AttributeError:
            named = title(function, None)
        run = function if retry is None and timeout is None else guarded(function, retry, timeout, self._env, True)
        undo: Undo | None = None
        if compensate is not None:
            if type(compensate) is not Compensation:
                check(compensate)
            undo = Undo(0, named, compensate, args, kwargs)
        if self._book is not None or self._env.sinks:
            # A name that was not given is another one in a journal.
            undo = undo or Undo(0, named, None, args, kwargs)
            undo.name = named if name is not None or self._book is None else ""
            return await self._anoted(undo, function, run, register)
        self._number = self._active = number = self._number + 1
        if undo is not None:
            undo.number = number
            if register == "before":
                self._stack.append(undo)
        try:
            value = await self._awaited(run, args, kwargs)
        finally:
            self._active = 0
        if undo is not None:
            undo.value = value
            if register == "after":
                self._stack.append(undo)
        return value

    async def _anoted(self, undo: Undo, function: Any, run: Any, register: str) -> Any:
        book, form = self._book, None
        undo.number = number = self._number + 1
        if book is not None:
            place = name_of(function, "the step")
            undo.name = undo.name or place
            form = result_form(function, place)
            if book.recorded(number, undo.name, undo, self._forward) is not None and number in book.results:
                self._number = number
                undo.value = book.value(number, function, undo.name)
                if undo.compensate is not None:
                    self._stack.append(undo)
                return undo.value
            if number not in book.steps:
                undoing = None if undo.compensate is None else undo
                step = book.step(number, undo.name, undoing, 0, register == "after", self._forward, function)
                await self._announce(book, step)
        self._number = self._active = number
        if undo.compensate is not None and register == "before":
            self._stack.append(undo)
        try:
            undo.value = value = await self._awaited(run, undo.args, undo.kwargs)
            if book is not None and form is not None:
                book.pending[number] = Raw(form.keep(value))
        except BaseException as error:
            if book is not None:
                self._failed = error
            self._told(undo.name, error)
            raise
        finally:
            self._active = 0
        if undo.compensate is not None and register == "after":
            self._stack.append(undo)
        self._told(undo.name, None)
        return value

    async def _announce(self, book: Book, step: Step) -> None:
        op = book.at_once(step, self._forward)
        if op is not None:
            reply: Any
            try:
                reply = await book.store.aexecute(op)
            except StoreError as error:
                reply = error
            except (Exception, GeneratorExit):
                raise
            except BaseException as error:
                reply = Cut(error)
            if book.announced(step, reply):
                return
        await adrive(one(book.announce([step], self._forward)), book.store, book.env, never, (), {})

    async def _awaited(self, run: Any, args: Any, kwargs: Any) -> Any:
        if self._until is None:
            value = run(*args, **kwargs)
            return await value if hasattr(value, "__await__") else value
        from resilient._aio import within

        return await within(self._env.clock, self._until, self._cut, apply_async, run, args, kwargs)

    async def parallel(self, *branches: Any) -> list[Any]:
        """Run several steps beside each other, as tasks, each with a copy of the context; their values, in order.

        If one fails, the others are cancelled and waited for, and then its error is raised. See `SagaRun.parallel`.
        """
        self._late()
        made = self._branches(branches)
        steps = announcing(self, made)
        if self._book is not None and steps:
            await adrive(
                one(self._book.announce(steps, self._forward)), self._book.store, self._book.env, never, (), {}
            )
        self._grouped(made)
        todo = [(undo, function) for undo, function in made if not had(self._book, undo, function)]
        self._active = made[0][0].number
        try:
            outcomes = await in_tasks(self, todo)
        finally:
            self._active = 0
        values(self, made)
        self._first(outcomes)
        return [undo.value for undo, _ in made]

    def nested(self, name: str) -> Nested:
        """A saga inside this one: `async with saga.nested("shipping") as child:`. See `SagaRun.nested`."""
        return Nested(self, name)
