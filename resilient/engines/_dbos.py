"""What runs inside of DBOS: the workflows that run sagas' bodies, the steps that carry out orders, the calls.

Everything that DBOS keeps is text in JSON. A step never raises to DBOS but to be tried again, so that no exception has
to be stored by DBOS's means. A cancelled workflow can run no step any more: it is undone by a workflow of its own, with
the id of the saga and "/undo", which DBOS finishes like any other. Whoever finds a cancelled saga that nobody undoes
reads DBOS's record of its steps, and begins that workflow.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from dbos import DBOS, SetWorkflowID
from dbos._dbos import _get_dbos_instance
from dbos._error import (
    DBOSAwaitedWorkflowCancelledError,
    DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded,
    DBOSWorkflowCancelledError,
)
from dbos._serialization import (
    DefaultSerializer,
    PortableWorkflowError,
    WorkflowSerializationFormat,
)
from msgspec import UNSET, Raw, Struct, UnsetType

from resilient.engines._body import Answer, AsyncRun, EngineBody, SyncRun, asettled, settled
from resilient.engines._perform import perform, perform_sync
from resilient.engines._wire import Ending, Order, error_of, kept_error, plain, wants, write
from resilient.errors import Incompatible, SagaAborted, SagaStuck
from resilient.policy import SYSTEM

if TYPE_CHECKING:
    from resilient.durable import DurableSaga
    from resilient.engines.dbos import DBOSEngine

__all__ = ["AsyncBody", "DBOSBody", "SyncBody"]


class Given(Struct):
    """The input of a saga's workflow."""

    v: int
    id: str
    version: int
    args: Raw
    kwargs: Raw


class Undoings(Struct):
    """The input of a workflow that undoes."""

    saga: str
    id: str
    orders: list[Order]


class Kept(Struct, omit_defaults=True):
    """What a step leaves in DBOS: a value in an envelope, or an error."""

    ok: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET

    def answer(self) -> Answer:
        if self.ok is not UNSET:
            return Answer(bytes(self.ok))
        assert self.error is not UNSET
        return Answer(error=error_of(bytes(self.error)))


def _read(data: str, kind: Any) -> Any:
    return msgspec.json.decode(data.encode(), type=kind)


def _text(value: Any) -> str:
    return write(value).decode()


# -- steps -----------------------------------------------------------------------------------------------------------


class Attempts:
    """What to do about the errors of one order: raise them, to be tried again, or leave them."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.made = 0
        self.began = SYSTEM.clock.now()

    def failed(self, error: Exception) -> str:
        """The text to leave; raises `error` if DBOS is to try again."""
        told = self.order.retry
        self.made += 1
        if told is not None and self.made < told.attempts and wants(told, error):
            # (DBOS begins to count at 0, so that its first wait is `first`.)
            wait = told.first * told.factor ** (self.made - 1)
            spent = SYSTEM.clock.now() - self.began
            if told.total is None or spent + wait < told.total:
                raise error
        return _text(Kept(error=Raw(kept_error(error))))


async def _step(order: Order, attempts: Attempts) -> str:
    try:
        return _text(Kept(ok=Raw(await perform(order, SYSTEM))))
    except Exception as error:
        return attempts.failed(error)


def _plain_step(order: Order, attempts: Attempts) -> str:
    try:
        return _text(Kept(ok=Raw(perform_sync(order, SYSTEM))))
    except Exception as error:
        return attempts.failed(error)


def options_of(order: Order, is_async: bool) -> Any:
    """The options of the step that carries out an order."""
    # By its name DBOS knows a body that departs from its record.
    options: dict[str, Any] = {"name": f"{'undo ' if order.undo is not None else ''}{order.number} {order.name}"}
    told = order.retry
    if told is not None and told.attempts > 1:
        options |= {
            "retries_allowed": True,
            "max_attempts": told.attempts,
            "interval_seconds": told.first,
            "backoff_rate": told.factor,
        }
    if is_async:
        options["preemptible"] = order.undo is None
    return options


async def _carry(order: Order) -> Answer:
    """Have a step carry out an order."""
    step = functools.partial(_step, order, Attempts(order))
    try:
        kept = await DBOS.run_step_async(options_of(order, True), _marked(step))
    except DBOSWorkflowCancelledError as gone:
        return Answer(gone=gone)
    answer: Answer = _read(kept, Kept).answer()
    return answer


def _marked(step: Callable[[], Any]) -> Callable[[], Any]:
    # DBOS asks for a coroutine function, which a partial is not everywhere.
    async def marked() -> str:
        text: str = await step()
        return text

    return marked


def _carry_plain(order: Order) -> Answer:
    try:
        kept = DBOS.run_step(options_of(order, False), functools.partial(_plain_step, order, Attempts(order)))
    except DBOSWorkflowCancelledError as gone:
        return Answer(gone=gone)
    answer: Answer = _read(kept, Kept).answer()
    return answer


# -- workflows -------------------------------------------------------------------------------------------------------


def _failure(error: Exception) -> PortableWorkflowError:
    """The error that DBOS keeps of a saga."""
    return PortableWorkflowError(str(error), type(error).__qualname__, None, plain(Ending.of(error)))


async def _undo(given: str) -> str:
    """Undo a cancelled saga."""
    undoings: Undoings = _read(given, Undoings)
    errors: list[Exception] = []
    for order in undoings.orders:
        answer = await _carry(order)
        if answer.gone is not None:
            raise answer.gone
        if answer.error is not None:
            answer.error.add_note(f"resilient: compensation of step {order.name} of saga {order.saga} ({order.id})")
            errors.append(answer.error)
    if errors:
        raise _failure(SagaStuck("compensations failed for good", errors, undoings.saga, undoings.id))
    return "null"


_decorate: Any = functools.partial(DBOS.workflow, serialization_type=WorkflowSerializationFormat.PORTABLE)
_undo_workflow: Any = _decorate(name="resilient.undo", max_recovery_attempts=100)(_undo)


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call outside of the workflow that runs here: as if anybody had."""
    return contextvars.Context().run(function, *args)


async def _begin_undo(undoings: Undoings) -> None:
    """Undo a saga, and wait until it is undone."""

    async def begin() -> None:
        with SetWorkflowID(f"{undoings.saga}/{undoings.id}/undo"):
            handle = await DBOS.start_workflow_async(_undo_workflow, _text(undoings))
        await handle.get_result()

    await asyncio.get_running_loop().create_task(begin(), context=contextvars.Context())


def _begin_undo_plain(undoings: Undoings) -> None:
    def begin() -> None:
        with SetWorkflowID(f"{undoings.saga}/{undoings.id}/undo"):
            handle: Any = DBOS.start_workflow(_undo_workflow, _text(undoings))
        handle.get_result()

    _apart(begin)


class DBOSBody(EngineBody):
    """A durable saga's body on DBOS. `workflow` is the DBOS workflow."""

    workflow: Any

    def __init__(self, engine: DBOSEngine, durable: DurableSaga, body: Callable[..., Any], is_async: bool) -> None:
        super().__init__(durable, body, is_async)
        self.engine = engine
        decorate = _decorate(name=self.name, max_recovery_attempts=durable.attempts)
        self.workflow = decorate(self._workflow())

    def _workflow(self) -> Callable[[str], Any]:
        raise NotImplementedError

    def _begun(self, given: str) -> tuple[Given, list[Any], dict[str, Any]]:
        got: Given = _read(given, Given)
        if got.version != self.durable.version or got.v != 1:
            text = f"it was begun by version {got.version}, and this process has version {self.durable.version}"
            raise _failure(Incompatible(text, self.name, got.id))
        return got, *self.input.read(got.args, got.kwargs)

    def _given(self, id: str, args: Any, kwargs: Any) -> str:
        given = _text(self.written(id, args, kwargs))
        if isinstance(_get_dbos_instance()._serializer, DefaultSerializer):
            raise TypeError("DBOS is set to pickle, and data must never run code: give its configuration a serializer, "
                            '{"serializer": DBOSEngine.serializer()}')
        return given

    def _told(self, error: BaseException, id: str) -> Exception:
        """What the error of a workflow means to those who wait for the saga."""
        if isinstance(error, PortableWorkflowError) and isinstance(error.data, dict):
            ending: Ending = msgspec.json.decode(write(error.data), type=Ending)
            if error.name == "Incompatible":
                return Incompatible(ending.text, self.name, id)
            return ending.error(self.name, id)
        if isinstance(error, DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded):
            return SagaStuck("it was not finished, however often it was recovered", [error], self.name, id)
        assert isinstance(error, Exception)
        return error

    def _undone(self, id: str) -> Exception:
        return SagaAborted("it was cancelled, and all that was done is undone", self.name, id)


class AsyncBody(DBOSBody):
    """For coroutines: `await place(…, id="o-42")`."""

    def _workflow(self) -> Callable[[str], Any]:
        async def run(given: str) -> str:
            return await self.inside(given)

        run.__qualname__ = f"resilient.{self.name}"
        return run

    async def inside(self, text: str) -> str:
        """What the workflow does."""
        given, args, kwargs = self._begun(text)
        run = AsyncRun(self.saga(given.id), _carry, self.undoing, SYSTEM.clock.now)
        try:
            return self.form.keep(await self.__wrapped__(run, *args, **kwargs)).decode()
        except GeneratorExit:
            raise
        except BaseException as error:
            failure = error
        if isinstance(failure, DBOSWorkflowCancelledError) and not run._forward:
            from resilient._aio import sheltered

            run._over = True
            undoings = Undoings(self.name, given.id, run.undo_orders())
            await sheltered(False, math.inf, _quietly, undoings)
            raise failure
        final = await asettled(run, failure)
        if isinstance(final, Exception):
            raise _failure(final) from final.__cause__
        raise final

    async def __call__(self, *args: Any, id: str, **kwargs: Any) -> Any:
        """Run the saga with this id and return its result, or get the result that it had.

        `SagaAborted` and `SagaStuck` as for a `Saga`. If the task that began the saga is cancelled here, the saga is
        cancelled and undone (and waited for, for `grace` seconds).
        """
        from resilient._aio import sheltered

        given = self._given(id, args, kwargs)
        (handle, mine), came = await sheltered(False, math.inf, self._start, id, given)
        try:
            if came:
                raise asyncio.CancelledError
            return await self._outcome(handle, id)
        except asyncio.CancelledError as error:
            if mine:
                await self._cancelled(handle, id, error)
            raise

    async def _start(self, id: str, given: str) -> tuple[Any, bool]:
        mine = await DBOS.get_workflow_status_async(f"{self.name}/{id}") is None
        with SetWorkflowID(f"{self.name}/{id}"):
            return await DBOS.start_workflow_async(self.workflow, given), mine

    async def _outcome(self, handle: Any, id: str) -> Any:
        # (Not the handle that began it: one that is cancelled with its waiter would take the workflow along.)
        try:
            data = await asyncio.shield(asyncio.ensure_future(handle.get_result()))
            return self.form.outcome(data.encode())[0]
        except DBOSAwaitedWorkflowCancelledError:
            pass
        except Exception as error:
            problem = self._told(error, id)
            raise problem from problem.__cause__
        await self._see_to_it(id)
        raise self._undone(id)

    async def _see_to_it(self, id: str) -> None:
        """Wait until a cancelled saga is undone; if nobody does it, do."""
        await _begin_undo(Undoings(self.name, id, []))

    async def _cancelled(self, handle: Any, id: str, error: BaseException) -> None:
        """Cancel the saga, and wait until it is undone; what went wrong in that is noted on `error`."""
        from resilient._aio import sheltered

        async def until_undone() -> None:
            await DBOS.cancel_workflow_async(f"{self.name}/{id}")
            await self._outcome(handle, id)

        try:
            await sheltered(True, self.durable._options["grace"], until_undone)
        except SagaAborted:
            pass
        except Exception as problem:
            error.add_note(f"resilient: saga {self.name} ({id}) was cancelled, but: {problem!r}")


async def _quietly(undoings: Undoings) -> None:
    """Undo; whoever waits for the saga hears how it went."""
    try:
        await _begin_undo(undoings)
    except PortableWorkflowError:
        pass


class SyncBody(DBOSBody):
    """For plain functions: `place(…, id="o-42")`."""

    def _workflow(self) -> Callable[[str], Any]:
        def run(given: str) -> str:
            return self.inside(given)

        run.__qualname__ = f"resilient.{self.name}"
        return run

    def inside(self, text: str) -> str:
        """What the workflow does."""
        given, args, kwargs = self._begun(text)
        run = SyncRun(self.saga(given.id), _carry_plain, self.undoing, SYSTEM.clock.now)
        try:
            return self.form.keep(self.__wrapped__(run, *args, **kwargs)).decode()
        except BaseException as error:
            failure = error
        if isinstance(failure, DBOSWorkflowCancelledError) and not run._forward:
            run._over = True
            try:
                _begin_undo_plain(Undoings(self.name, given.id, run.undo_orders()))
            except PortableWorkflowError:
                pass
            raise failure
        final = settled(run, failure)
        if isinstance(final, Exception):
            raise _failure(final) from final.__cause__
        raise final

    def __call__(self, *args: Any, id: str, **kwargs: Any) -> Any:
        """Run the saga with this id and return its result, or get the result that it had."""
        given = self._given(id, args, kwargs)
        with SetWorkflowID(f"{self.name}/{id}"):
            handle = DBOS.start_workflow(self.workflow, given)
        try:
            return self.form.outcome(handle.get_result().encode())[0]
        except DBOSAwaitedWorkflowCancelledError:
            pass
        except Exception as error:
            problem = self._told(error, id)
            raise problem from problem.__cause__
        raise self._undone(id)
