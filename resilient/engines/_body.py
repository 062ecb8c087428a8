"""What the bodies of sagas get from an engine in place of a `SagaRun`, and how they end there. Alike for all engines.

A run numbers steps, keeps the stack of compensations and makes orders; an engine's carrier carries them out, and says
of each how it ended. Everything is checked before anything runs. Deterministic: it reads no clock, chance or store by
itself, so that an engine may run a body again from its history. A run belongs to one task.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from msgspec import UNSET, Raw, Struct

from resilient._drive import adrive, drive
from resilient._journal import CallForm, call_form, name_of, undoing
from resilient._journal import result_form as form_of_result
from resilient._parallel import Nested, in_tasks
from resilient._run import MISSING, Branch, Run
from resilient._settle import NOTHING, apply_async, apply_sync, default_retry, never, settle
from resilient._undo import Compensation, Undo, backwards
from resilient.engines._wire import Order, Told, tell
from resilient.errors import SagaError, SagaStuck
from resilient.policy import Env
from resilient.saga import AsyncSagaRun, Saga, SagaRun

if TYPE_CHECKING:
    from resilient.durable import DurableSaga
    from resilient.retry import Retry

__all__ = ["Answer", "AsyncRun", "EngineBody", "SyncRun", "asettled", "settled"]


class Answer(Struct, eq=False):
    """How an order ended: `data` (a value in an envelope), or `error`; `gone` if the saga was cancelled meanwhile."""

    data: bytes | None = None
    error: Exception | None = None
    gone: BaseException | None = None


class _Whole(Nested):
    """A nested saga where a failure inside is a failure of the whole, as it is with a journal."""

    def _alone(self, error: BaseException) -> bool:
        return False


class _Orders(Run):
    """What runs of both kinds share."""

    _undo: Callable[[Undo], Any]

    def __init__(self, saga: Saga, carry: Callable[[Order], Any], undoing: Told, now: Callable[[], float]) -> None:
        super().__init__(saga)
        self._carry, self._undoing, self._now = carry, undoing, now
        self._steps: dict[int, tuple[str, Any]] = {}
        self._results: dict[int, Raw] = {}
        self._stuck: list[Exception] = []
        self._back: set[int] = set()
        self.gone: BaseException | None = None
        if saga.timeout is not None:
            self._until = now() + saga.timeout

    def _check(self, function: Any, compensate: Any, register: str) -> None:
        super()._check(function, compensate, register)
        if self._failed is not None:
            raise SagaError(
                "a step has failed, and a durable saga cannot go on then: let the error pass, or handle it inside of "
                "the step's function",
                self.name,
                self.id,
            ) from self._failed

    def _order(self, undo: Undo, function: Any, retry: Any, timeout: float | None) -> Order:
        """The order of a step. `TypeError` for what no other process could carry out."""
        place = name_of(function, "the step")
        undo.name = undo.name or place
        form_of_result(function, place)
        args, kwargs = call_form(function, place).write(undo.args, undo.kwargs)
        if undo.compensate is not None:
            self._steps[undo.number] = place, undoing(undo)
            # Undoing is an order as well.
            undo.compensate = Compensation(self._undo, (undo,), {})
        told = None if retry is None else tell(retry, f"the retry of step {undo.name}")
        order = Order(self.name, self.id, undo.number, undo.name, place, args, kwargs, timeout, retry=told)
        self._limit(order)
        return order

    def _limit(self, order: Order) -> None:
        if self._until is not None:
            order.left, order.limit = self._until - self._now(), self._saga.timeout

    def undo_order(self, undo: Undo) -> Order:
        """The order that undoes a step."""
        place, how = self._steps[undo.number]
        result = self._results.get(undo.number, UNSET)
        return Order(self.name, self.id, undo.number, undo.name, place, retry=self._undoing, undo=how, result=result)

    def undo_orders(self) -> list[Order]:
        """The orders that undo what is not undone yet, the last step first."""
        return [self.undo_order(undo) for undo in backwards(self._stack) if undo.number not in self._back]

    def _value(self, undo: Undo, function: Any, answer: Answer) -> Any:
        """The value of a step, or its error raised."""
        if answer.data is not None:
            self._results[undo.number] = Raw(answer.data)
        self.gone = answer.gone or self.gone
        problem = answer.gone or answer.error
        if problem is not None:
            try:
                raise problem
            finally:
                del problem, answer
        assert answer.data is not None
        undo.value = value = form_of_result(function, undo.name).outcome(answer.data)[0]
        return value

    def _undone(self, undo: Undo, answer: Answer) -> None:
        self.gone = answer.gone or self.gone
        problem = answer.gone or answer.error
        if problem is None:
            self._back.add(undo.number)
            return
        if isinstance(problem, Exception):
            self._stuck.append(problem)
        try:
            raise problem
        finally:
            del problem, answer

    def _happened(self, undo: Undo, register: str) -> None:
        """A step that was cancelled has ended well all the same: it is undone, though registered after it only."""
        if register == "after" and undo.compensate is not None and undo.number in self._results:
            self._stack.append(undo)

    def _made(self, args: Any, kwargs: Any, compensate: Any, name: str | None) -> Undo:
        self._number = number = self._number + 1
        return Undo(number, name or "", None if compensate is MISSING else compensate, args, kwargs)

    def nested(self, name: str) -> Any:
        """A saga inside this one, to the outer one a step: a failure inside is a failure of the whole."""
        return _Whole(self, name)


class AsyncRun(_Orders, AsyncSagaRun):
    """A saga that runs on an engine, for coroutines."""

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
        """Have `function(*args, **kwargs)` called and return its value. See `AsyncSagaRun.step`."""
        self._check(function, compensate, register)
        undo = self._made(args, kwargs, compensate, name)
        order = self._order(undo, function, retry, timeout)
        if undo.compensate is not None and register == "before":
            self._stack.append(undo)
        self._active = undo.number
        try:
            value = self._value(undo, function, await self._carry(order))
        except BaseException as error:
            self._failed = error
            self._happened(undo, register)
            raise
        finally:
            self._active = 0
        if undo.compensate is not None and register == "after":
            self._stack.append(undo)
        return value

    async def parallel(self, *branches: Any) -> list[Any]:
        """Run several steps beside each other; their values, in order. See `AsyncSagaRun.parallel`."""
        made = self._branches(branches)
        sent: list[tuple[Undo, Any]] = []
        for (undo, function), one in zip(made, branches, strict=True):
            # Without a name of its own, it has its function's place, as every step here.
            undo.name = (one.name or "") if isinstance(one, Branch) else ""
            sent.append(
                (undo, functools.partial(self._branch, undo, function, self._order(undo, function, None, None)))
            )
        self._grouped(made)
        self._active = made[0][0].number
        try:
            self._first(await in_tasks(self, sent))
        except BaseException as error:
            self._failed = error
            raise
        finally:
            self._active = 0
        return [undo.value for undo, _ in made]

    async def _branch(self, undo: Undo, function: Any, order: Order, /, *_: Any, **__: Any) -> Any:
        return self._value(undo, function, await self._carry(order))

    async def _awaited(self, run: Any, args: Any, kwargs: Any) -> Any:
        return await run(*args, **kwargs)

    async def _undo(self, undo: Undo) -> None:
        self._undone(undo, await self._carry(self.undo_order(undo)))


class SyncRun(_Orders, SagaRun):
    """A saga that runs on an engine, for plain functions."""

    def step(
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
        """Have `function(*args, **kwargs)` called and return its value. See `SagaRun.step`."""
        self._check(function, compensate, register)
        undo = self._made(args, kwargs, compensate, name)
        order = self._order(undo, function, retry, timeout)
        if undo.compensate is not None and register == "before":
            self._stack.append(undo)
        self._active = undo.number
        try:
            value = self._value(undo, function, self._carry(order))
        except BaseException as error:
            self._failed = error
            self._happened(undo, register)
            raise
        finally:
            self._active = 0
        if undo.compensate is not None and register == "after":
            self._stack.append(undo)
        return value

    def parallel(self, *branches: Any) -> NoReturn:
        """Refused: in threads, an engine could not tell which step is which when it runs the body again."""
        raise TypeError("an engine cannot run steps in parallel for a plain function: make the saga's body async def")

    def _undo(self, undo: Undo) -> None:
        self._undone(undo, self._carry(self.undo_order(undo)))


def past_pivot(name: str, id: str) -> SagaStuck:
    """What a saga is that was cancelled where it could not go back."""
    text = "it was cancelled after its pivot, from where it cannot go back"
    return SagaStuck(text, [SagaError("cancelled", name, id)], name, id)


def _final(run: Any, failure: BaseException, outcome: Any) -> BaseException:
    error: BaseException = failure if outcome.error is None else outcome.error
    if not isinstance(error, Exception):
        # It was cancelled, and that may not be the worst of it.
        if run._forward:
            error = past_pivot(run.name, run.id)
        elif run._stuck:
            error = SagaStuck("compensations failed for good", run._stuck, run.name, run.id)
    if error is not failure and error.__cause__ is None:
        error.__cause__ = failure
    return error


async def asettled(run: AsyncRun, failure: BaseException) -> BaseException:
    """Undo what `run` did, cancelled or not, to the end; what to raise then."""
    from resilient._aio import sheltered

    program = settle(run._saga, run, failure, apply_async)
    outcome, _ = await sheltered(False, math.inf, adrive, program, NOTHING, run._saga.env, never, (), {})
    return _final(run, failure, outcome)


def settled(run: SyncRun, failure: BaseException) -> BaseException:
    """Undo what `run` did; what to raise then."""
    outcome = drive(settle(run._saga, run, failure, apply_sync), NOTHING, run._saga.env, never, (), {})
    return _final(run, failure, outcome)


class EngineBody:
    """A durable saga's body on an engine: call it with an id."""

    __wrapped__: Callable[..., Any]

    def __init__(self, durable: DurableSaga[Any], body: Callable[..., Any], is_async: bool) -> None:
        functools.update_wrapper(self, body)  # type: ignore[arg-type]
        place = f"{body.__module__}:{body.__qualname__}"
        self.durable, self.is_async = durable, is_async
        self.input = CallForm(body, place, skip=1)
        self.form = form_of_result(body, place)
        if durable.in_doubt != "rerun":
            raise TypeError(
                "in_doubt='stuck' is for sagas on a store: what an engine does with a step that its worker "
                "died in is told by retry= and timeout="
            )
        retries: Any = durable._options["retries"]
        self.undoing = tell(default_retry() if retries is None else retries, "retries")
        # Events come from where the steps run: a body may run many times over.
        self._quiet = Env()

    @property
    def name(self) -> str:
        """The name of the saga."""
        return self.durable.name

    def recover(self) -> NoReturn:
        """Refused: an engine recovers its sagas by itself, as soon as a worker runs."""
        raise TypeError(f"saga {self.name} is recovered by its engine: start a worker")

    def saga(self, id: str) -> Saga:
        """The settings of one saga. `ValueError` for an id that is none."""
        options: dict[str, Any] = {**self.durable._options, "env": self._quiet}
        return Saga(self.name, id=id, **options)

    def written(self, id: str, args: Any, kwargs: Any) -> dict[str, Any]:
        """The input of the saga, for the engine. What cannot be written is a `TypeError`, and nothing has begun."""
        self.saga(id)
        given = self.input.write(args, kwargs)
        # What cannot be read back must not begin either.
        self.input.read(*given)
        return {"v": 1, "id": id, "version": self.durable.version, "args": given[0], "kwargs": given[1]}
