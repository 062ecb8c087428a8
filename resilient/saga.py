"""Saga: steps that are undone, the last first, if a later one fails; in memory, or with a journal that outlives it.

Promises: a step's compensation is registered before the step runs, and is called with what is known of it; every
compensation gets its chance; a cancelled saga is undone and stays cancelled. With a store, the death of the process is
one more failure: any other process finishes what was begun. Does not: isolate sagas from each other. In memory a step
costs a microsecond, with a store n steps cost n + 1 commits. A saga belongs to one thread or task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from resilient._ambient import deadline
from resilient._book import Book
from resilient._drive import adrive, drive
from resilient._journal import name_of, result_form
from resilient._parallel import announcing, had, in_tasks, in_threads, values
from resilient._run import MISSING, Branch, Run, branch, called, guarded, one, raw, task_keeper, thread_keeper
from resilient._settle import NOTHING, apply_async, apply_sync, child, default_retry, ended, never, raised, settle
from resilient._undo import RESULT, UNKNOWN, Compensation, Undo, call, check
from resilient._verdict import Errors
from resilient.errors import SagaStuck
from resilient.policy import SYSTEM, Env, seconds, whole
from resilient.stores._open import shared

if TYPE_CHECKING:
    from resilient.retry import Retry

__all__ = ["RESULT", "UNKNOWN", "AsyncSagaRun", "Branch", "Saga", "SagaRun", "branch", "call"]

R = TypeVar("R")


class Saga:
    """A saga as a block: `with Saga("order") as saga:`, or `async with`. Each object is for one block.

    - `id` names this saga among those of its name; by default it is random.
    - `store`, a store or its URL, journals it. If this process dies, another undoes what was done
      (`resilient.sagas.recover`, or `resilient saga recover URL`). Steps and compensations must then be functions at
      the top of a module, and their arguments and results plain data, or typed by annotations.
    - `timeout` is for the steps together, in seconds: an ambient deadline, and the end of what awaits; compensations
      are not under it.
    - `compensate_on`: the errors that are undone (classes, or a predicate). Others leave everything as it is.
      Cancellation and interrupts are always undone.
    - `retries` is a `Retry` for compensations, each with counters of its own; by default four attempts at any error.
    - `on_stuck`: if a compensation fails for good, `"raise"` `SagaStuck`, or `"continue"` to `SagaAborted`.
    - `grace`: how many seconds a cancelled saga may take to undo. `lease`: see `Idempotent`.

    Ends in `SagaAborted` if it failed and all is undone; its cause is the step's error.

    >>> from resilient import Saga
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
        if type(name) is not str or not name:
            raise TypeError(f"name must be some text, not {name!r}")
        if id is not None and (type(id) is not str or not 0 < len(id) <= 255 or not id.isprintable()):
            raise ValueError(f"id must be text of 1 to 255 printable characters, not {id!r}")
        if on_stuck not in ("raise", "continue"):
            raise ValueError(f"on_stuck must be 'raise' or 'continue', not {on_stuck!r}")
        self.name, self.on_stuck, self.env = name, on_stuck, env
        self.id = id
        self.timeout = None if timeout is None else seconds("timeout", timeout)
        self.compensate_on: Any = None if compensate_on is Exception else Errors("compensate_on", compensate_on)
        self.retries = retries
        self.grace = grace if grace == 30.0 else seconds("grace", grace)
        self.lease = lease if lease == 30.0 else seconds("lease", lease)
        self.version = version if version == 1 else whole("version", version, least=0)
        self.store = shared(store) if isinstance(store, str) else store
        self._run: Any = None
        self._inside: Any = None

    def __enter__(self) -> SagaRun:
        if self._run is not None:
            raise RuntimeError(f"saga {self.name} has been used already: each object is for one block")
        run = self._run = SagaRun(self)
        if self.store is not None:
            run._book = self._book(thread_keeper, "execute")
        if self.timeout is not None:
            self._limit(run)
        return run

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run: SagaRun = self._run
        if self._inside is not None:
            self._unlimit()
        if error is None and run._book is None:
            run._over = True
            if self.env.sinks:
                ended(self, run, "done")
            return
        outcome = drive(settle(self, run, error, self._undoer()), self.store or NOTHING, self.env, never, (), {})
        raised(outcome, error)

    async def __aenter__(self) -> AsyncSagaRun:
        if self._run is not None:
            raise RuntimeError(f"saga {self.name} has been used already: each object is for one block")
        run = self._run = AsyncSagaRun(self)
        if self.store is not None:
            run._book = self._book(task_keeper, "aexecute")
        if self.timeout is not None:
            self._limit(run)
        return run

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run: AsyncSagaRun = self._run
        if self._inside is not None:
            self._unlimit()
        if isinstance(error, GeneratorExit):
            # Nothing may be awaited any more. With a store, another process goes on from here.
            if run._book is not None:
                run._book.stop()
            return
        if error is None and run._book is None:
            run._over = True
            if self.env.sinks:
                ended(self, run, "done")
            return
        from resilient._aio import sheltered

        program = settle(self, run, error, self._aundoer())
        gone = error is not None and not isinstance(error, Exception)
        try:
            outcome, came = await sheltered(
                gone, self.grace, adrive, program, self.store or NOTHING, self.env, never, (), {}
            )
        except TimeoutError as late:
            text = f"its compensations took longer than the {self.grace:g} s of grace that a cancelled saga has"
            raise SagaStuck(text, [late], self.name, run.id) from error
        if came:
            from asyncio import CancelledError

            raise CancelledError from outcome.error
        raised(outcome, error)

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

    def _limit(self, run: Run) -> None:
        assert self.timeout is not None
        self._inside = deadline(self.timeout, clock=self.env.clock)
        self._inside.__enter__()
        run._until = self.env.clock.now() + self.timeout

    def _unlimit(self) -> None:
        if self._inside is not None:
            self._inside.__exit__(None, None, None)
            self._inside = None

    def _limited(self, run: Run) -> Callable[[], None]:
        """Begin the time of the steps, if it is limited; what is returned ends it."""
        if self.timeout is not None:
            self._limit(run)
        return self._unlimit

    def _retry(self) -> Retry:
        if self.retries is not None:
            return self.retries
        return default_retry()

    def _undoer(self) -> Callable[..., Any]:
        return self._retry().sync(apply_sync, self.env)

    def _aundoer(self) -> Callable[..., Any]:
        return self._retry().coro(apply_async, self.env)


class SagaRun(Run):
    """A saga that runs, for plain functions."""

    def step(
        self,
        function: Callable[..., R],
        /,
        *args: Any,
        compensate: Any = MISSING,
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
        """
        if compensate is MISSING or self._over or self._failed is not None or register != "before":
            self._check(function, compensate, register)
        if self._until is not None:
            self._late()
        self._number = number = self._number + 1
        undo = Undo(number, name or "", None if compensate is MISSING else compensate, args, kwargs)
        if self._book is not None or self._saga.env.sinks:
            noted: R = self._noted(undo, function, register, retry, timeout)
            return noted
        if undo.compensate is not None:
            if type(undo.compensate) is not Compensation:
                check(undo.compensate)
            if register == "before":
                self._stack.append(undo)
        run = function if retry is None and timeout is None else guarded(function, retry, timeout, self._saga.env)
        self._active = number
        try:
            value: R = run(*args, **kwargs)
        except BaseException as error:
            self._failed = error
            raise
        finally:
            self._active = 0
        undo.value = value
        if register == "after" and undo.compensate is not None:
            self._stack.append(undo)
        return value

    def _noted(self, undo: Undo, function: Any, register: str, retry: Any, timeout: float | None) -> Any:
        self._check(function, undo.compensate, register)
        book, number = self._book, undo.number
        undo.name = undo.name or (called(function) if book is None else name_of(function, "the step"))
        if book is not None:
            form = result_form(function, name_of(function, "the step"))
            if book.recorded(number, undo.name, undo, self._forward) is not None and number in book.results:
                undo.value = book.value(number, function, undo.name)
                if undo.compensate is not None:
                    self._stack.append(undo)
                return undo.value
            if number not in book.steps:
                undoing = None if undo.compensate is None else undo
                step = book.step(number, undo.name, undoing, 0, register == "after", self._forward, function)
                drive(one(book.announce([step], self._forward)), book.store, book.env, never, (), {})
        if undo.compensate is not None and register == "before":
            self._stack.append(undo)
        run = function if retry is None and timeout is None else guarded(function, retry, timeout, self._saga.env)
        self._active = number
        try:
            undo.value = value = run(*undo.args, **undo.kwargs)
            if book is not None:
                book.pending[number] = raw(form.keep(value))
        except BaseException as error:
            self._failed = error
            self._told(undo.name, error)
            raise
        finally:
            self._active = 0
        if undo.compensate is not None and register == "after":
            self._stack.append(undo)
        self._told(undo.name, None)
        return value

    def parallel(self, *branches: Any) -> list[Any]:
        """Run several steps beside each other, each in a thread with a copy of the context; their values, in order.

        A branch is `branch(function, *args, compensate=…)`, or (after the pivot) a tuple of a function and its
        arguments. If one fails, the others are waited for, and then its error is raised.
        """
        self._late()
        made = self._branches(branches)
        todo = announcing(self, made)
        if self._book is not None and todo:
            drive(one(self._book.announce(todo, self._forward)), self._book.store, self._book.env, never, (), {})
        self._grouped(made)
        outcomes = in_threads(
            self, [(undo, function) for undo, function in made if not had(self._book, undo, function)]
        )
        values(self, made)
        self._first(outcomes)
        return [undo.value for undo, _ in made]

    def nested(self, name: str) -> Nested:
        """A saga inside this one: `with saga.nested("shipping") as child:`. To the outer one it is one step.

        In memory, a failure inside is undone at once and comes out as `SagaAborted`; with a journal it is a failure of
        the whole.
        """
        return Nested(self, name)


class AsyncSagaRun(Run):
    """A saga that runs, for coroutines; plain functions may be steps and compensations too."""

    async def step(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        compensate: Any = MISSING,
        register: Literal["before", "after"] = "before",
        retry: Retry | None = None,
        timeout: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run `function(*args, **kwargs)`, awaited if it is async, and return its value. See `SagaRun.step`."""
        if compensate is MISSING or self._over or self._failed is not None or register != "before":
            self._check(function, compensate, register)
        if self._until is not None:
            self._late()
        self._number = number = self._number + 1
        undo = Undo(number, name or "", None if compensate is MISSING else compensate, args, kwargs)
        if self._book is not None or self._saga.env.sinks:
            noted: Any = await self._anoted(undo, function, register, retry, timeout)
            return noted
        if undo.compensate is not None:
            if type(undo.compensate) is not Compensation:
                check(undo.compensate)
            if register == "before":
                self._stack.append(undo)
        run = function if retry is None and timeout is None else guarded(function, retry, timeout, self._saga.env)
        self._active = number
        try:
            value: Any = await self._awaited(run, args, kwargs)
        except BaseException as error:
            self._failed = error
            raise
        finally:
            self._active = 0
        undo.value = value
        if register == "after" and undo.compensate is not None:
            self._stack.append(undo)
        return value

    async def _anoted(self, undo: Undo, function: Any, register: str, retry: Any, timeout: float | None) -> Any:
        self._check(function, undo.compensate, register)
        book, number = self._book, undo.number
        undo.name = undo.name or (called(function) if book is None else name_of(function, "the step"))
        if book is not None:
            form = result_form(function, name_of(function, "the step"))
            if book.recorded(number, undo.name, undo, self._forward) is not None and number in book.results:
                undo.value = book.value(number, function, undo.name)
                if undo.compensate is not None:
                    self._stack.append(undo)
                return undo.value
            if number not in book.steps:
                undoing = None if undo.compensate is None else undo
                step = book.step(number, undo.name, undoing, 0, register == "after", self._forward, function)
                await adrive(one(book.announce([step], self._forward)), book.store, book.env, never, (), {})
        if undo.compensate is not None and register == "before":
            self._stack.append(undo)
        run = function if retry is None and timeout is None else guarded(function, retry, timeout, self._saga.env)
        self._active = number
        try:
            undo.value = value = await self._awaited(run, undo.args, undo.kwargs)
            if book is not None:
                book.pending[number] = raw(form.keep(value))
        except BaseException as error:
            self._failed = error
            self._told(undo.name, error)
            raise
        finally:
            self._active = 0
        if undo.compensate is not None and register == "after":
            self._stack.append(undo)
        self._told(undo.name, None)
        return value

    async def _awaited(self, run: Any, args: Any, kwargs: Any) -> Any:
        if self._until is None:
            value = run(*args, **kwargs)
            return await value if hasattr(value, "__await__") else value
        from resilient._aio import within
        from resilient.errors import CallTimeout

        saga = self._saga
        assert saga.timeout is not None
        late = CallTimeout(saga.name, saga.timeout)
        return await within(saga.env.clock, self._until, lambda: late, apply_async, run, args, kwargs)

    async def parallel(self, *branches: Any) -> list[Any]:
        """Run several steps beside each other, as tasks; their values, in order.

        If one fails, the others are cancelled and waited for, and then its error is raised. See `SagaRun.parallel`.
        """
        self._late()
        made = self._branches(branches)
        todo = announcing(self, made)
        if self._book is not None and todo:
            await adrive(one(self._book.announce(todo, self._forward)), self._book.store, self._book.env, never, (), {})
        self._grouped(made)
        outcomes = await in_tasks(
            self, [(undo, function) for undo, function in made if not had(self._book, undo, function)]
        )
        values(self, made)
        self._first(outcomes)
        return [undo.value for undo, _ in made]

    def nested(self, name: str) -> Nested:
        """A saga inside this one: `async with saga.nested("shipping") as child:`. See `SagaRun.nested`."""
        return Nested(self, name)


class Nested:
    """A part of a saga that is undone by itself if it fails, and with the whole if that fails later."""

    __slots__ = ("_name", "_run", "_stack")

    def __init__(self, run: Any, name: str) -> None:
        self._run, self._name = run, name
        self._stack: list[Any] = []

    def __enter__(self) -> SagaRun:
        run: SagaRun = self._enter()
        return run

    async def __aenter__(self) -> AsyncSagaRun:
        run: AsyncSagaRun = self._enter()
        return run

    def _enter(self) -> Any:
        run = self._run
        self._stack, run._stack = run._stack, []
        return run

    def _leave(self) -> list[Any]:
        run = self._run
        mine, run._stack = run._stack, self._stack
        return mine

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run, mine = self._run, self._leave()
        if error is None or run._book is not None or not isinstance(error, Exception):
            run._stack.append(mine)
            return
        saga = run._saga
        program = child(saga, run, self._name, error, mine, saga._undoer())
        raised(drive(program, NOTHING, saga.env, never, (), {}), error)

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run, mine = self._run, self._leave()
        if error is None or run._book is not None or not isinstance(error, Exception):
            run._stack.append(mine)
            return
        saga = run._saga
        program = child(saga, run, self._name, error, mine, saga._aundoer())
        raised(await adrive(program, NOTHING, saga.env, never, (), {}), error)
