"""The steps of a saga that runs: announced if there is a journal, run, and remembered with what undoes them.

Promises that a compensation is registered before its step runs, and that nothing runs which the journal does not know
of. Does not: end a saga (see `saga` and `_settle`). In memory a step costs a microsecond, with a journal one commit. A
run belongs to one thread or task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from msgspec import Raw

from resilient._drive import Cut, adrive, drive
from resilient._journal import name_of, result_form
from resilient._parallel import Nested, announcing, had, in_tasks, in_threads, unkept, values
from resilient._run import MISSING, Run, guarded, one, title, unawaited
from resilient._settle import apply_async, never
from resilient._undo import UNKNOWN, Compensation, Undo, check, plain
from resilient.errors import StoreError

if TYPE_CHECKING:
    from resilient._book import Book
    from resilient._journal import Step
    from resilient.retry import Retry

__all__ = ["AsyncSagaRun", "SagaRun"]

R = TypeVar("R")


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
            plain(compensate)
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
            if self._resting is not None:
                self._resting.notify()
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
            if book.recorded(number, undo.name, undo, self._forward, function) is not None and number in book.results:
                self._number = number
                undo.value = book.value(number, function, undo.name)
                if undo.compensate is not None:
                    self._stack.append(undo)
                return undo.value
            if number not in book.steps:
                undoing = None if undo.compensate is None else undo
                step = book.step(number, undo.name, undoing, 0, register == "after", self._forward, function)
                # From here on: another step, begun while this one is written, would be taken for it.
                self._active = number
                try:
                    self._announce(book, step)
                    if self._over:
                        raise self._went_on()
                except BaseException:
                    self._idle()
                    raise
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
                if undo.value is not UNKNOWN:
                    unkept(error, undo.name)
            self._told(undo.name, error)
            raise
        finally:
            self._idle()
        if undo.compensate is not None and register == "after":
            self._stack.append(undo)
        self._told(undo.name, None)
        return value

    def _announce(self, book: Book, step: Step) -> None:
        op = book.at_once(step, self._forward)
        if op is not None and book.announced(step, self._ask(book, op)):
            return
        drive(one(book.announce([step], self._forward)), book.store, book.env, never, (), {})

    def _done(self, book: Book, ok: bytes | None) -> bool:
        """Write that the saga is done. False if that is not so simple: then `settle` goes on from there."""
        op = book.done_at_once(self._number, ok)
        return op is not None and book.done(self._ask(book, op))

    def _ask(self, book: Book, op: Any) -> Any:
        """What the store says to `op`, or the error or interrupt by which it is not known: as a driver answers."""
        try:
            return book.store.execute(op)
        except StoreError as error:
            return error
        except (Exception, GeneratorExit):
            raise
        except BaseException as error:
            return Cut(error)

    def parallel(self, *branches: Any) -> list[Any]:
        """Run several steps beside each other, each in a thread with a copy of the context; their values, in order.

        A branch is `branch(function, *args, compensate=…)`, or (after the pivot) a tuple of a function and its
        arguments. If one fails, the others are waited for, since threads cannot be cancelled, and then its error is
        raised. Each branch has its own `step_key`; a branch cannot have steps of this saga.
        """
        self._late()
        made = self._branches(branches)
        steps = announcing(self, made)
        self._active = made[0][0].number
        try:
            if self._book is not None and steps:
                drive(one(self._book.announce(steps, self._forward)), self._book.store, self._book.env, never, (), {})
                if self._over:
                    raise self._went_on()
            self._grouped(made)
            todo = [(undo, function) for undo, function in made if not had(self._book, undo, function)]
            outcomes = in_threads(self, todo)
        finally:
            self._idle()
        values(self, todo, outcomes)
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
            if self._resting is not None:
                self._resting.notify()
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
            if book.recorded(number, undo.name, undo, self._forward, function) is not None and number in book.results:
                self._number = number
                undo.value = book.value(number, function, undo.name)
                if undo.compensate is not None:
                    self._stack.append(undo)
                return undo.value
            if number not in book.steps:
                undoing = None if undo.compensate is None else undo
                step = book.step(number, undo.name, undoing, 0, register == "after", self._forward, function)
                # From here on: another step, begun while this one is written, would be taken for it.
                self._active = number
                try:
                    await self._announce(book, step)
                    if self._over:
                        raise self._went_on()
                except BaseException:
                    self._idle()
                    raise
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
                if undo.value is not UNKNOWN:
                    unkept(error, undo.name)
            self._told(undo.name, error)
            raise
        finally:
            self._idle()
        if undo.compensate is not None and register == "after":
            self._stack.append(undo)
        self._told(undo.name, None)
        return value

    async def _announce(self, book: Book, step: Step) -> None:
        op = book.at_once(step, self._forward)
        if op is not None and book.announced(step, await self._ask(book, op)):
            return
        await adrive(one(book.announce([step], self._forward)), book.store, book.env, never, (), {})

    async def _awaited(self, run: Any, args: Any, kwargs: Any) -> Any:
        if self._until is None:
            value = run(*args, **kwargs)
            return await value if hasattr(value, "__await__") else value
        from resilient._aio import within

        return await within(self._env.clock, self._until, self._cut, apply_async, run, args, kwargs)

    async def _done(self, book: Book, ok: bytes | None) -> bool:
        """Write that the saga is done. False if that is not so simple: then `settle` goes on from there."""
        op = book.done_at_once(self._number, ok)
        return op is not None and book.done(await self._ask(book, op))

    async def _ask(self, book: Book, op: Any) -> Any:
        """What the store says to `op`, or the error or interrupt by which it is not known: as a driver answers."""
        try:
            return await book.store.aexecute(op)
        except StoreError as error:
            return error
        except (Exception, GeneratorExit):
            raise
        except BaseException as error:
            return Cut(error)

    async def parallel(self, *branches: Any) -> list[Any]:
        """Run several steps beside each other, as tasks, each with a copy of the context; their values, in order.

        If one fails, the others are cancelled and waited for, and then its error is raised. See `SagaRun.parallel`.
        """
        self._late()
        made = self._branches(branches)
        steps = announcing(self, made)
        self._active = made[0][0].number
        try:
            if self._book is not None and steps:
                await adrive(
                    one(self._book.announce(steps, self._forward)), self._book.store, self._book.env, never, (), {}
                )
                if self._over:
                    raise self._went_on()
            self._grouped(made)
            todo = [(undo, function) for undo, function in made if not had(self._book, undo, function)]
            outcomes = await in_tasks(self, todo)
        finally:
            self._idle()
        values(self, todo, outcomes)
        self._first(outcomes)
        return [undo.value for undo, _ in made]

    def nested(self, name: str) -> Nested:
        """A saga inside this one: `async with saga.nested("shipping") as child:`. See `SagaRun.nested`."""
        return Nested(self, name)
