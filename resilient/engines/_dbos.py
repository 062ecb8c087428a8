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
    DBOSUnexpectedStepError,
    DBOSWorkflowCancelledError,
    DBOSWorkflowConflictIDError,
)
from dbos._serialization import (
    DefaultSerializer,
    PortableWorkflowError,
    WorkflowSerializationFormat,
)
from msgspec import UNSET, Raw, Struct, UnsetType

from resilient.engines._body import Answer, AsyncRun, EngineBody, SyncRun, asettled, past_pivot, settled
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


class Undoings(Struct, omit_defaults=True):
    """The input of a workflow that undoes; `forward`: the saga was past its pivot."""

    saga: str
    id: str
    orders: list[Order] = []
    forward: bool = False

    @property
    def place(self) -> str:
        """The id of that workflow."""
        return f"{self.saga}/{self.id}/undo"


class Kept(Struct, omit_defaults=True):
    """What a step leaves in DBOS: a value in an envelope, or an error."""

    ok: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET

    def answer(self) -> Answer:
        if self.ok is not UNSET:
            return Answer(bytes(self.ok))
        assert self.error is not UNSET
        return Answer(error=error_of(bytes(self.error)))


# How the workflow that undoes may end, other than well; whoever waits for the saga hears it.
_ENDS = (
    PortableWorkflowError,
    DBOSAwaitedWorkflowCancelledError,
    DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded,
)


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
        self.text: str | None = None
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
        attempts.text = _text(Kept(ok=Raw(await perform(order, SYSTEM))))
    except Exception as error:
        return attempts.failed(error)
    return attempts.text


def _plain_step(order: Order, attempts: Attempts) -> str:
    try:
        attempts.text = _text(Kept(ok=Raw(perform_sync(order, SYSTEM))))
    except Exception as error:
        return attempts.failed(error)
    return attempts.text


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


class Carrier:
    """Has steps carry out the orders of one run. Once the workflow is cancelled, or its process ends, it is done."""

    gone: BaseException | None = None

    async def carry(self, order: Order) -> Answer:
        """Carry out an order, in a coroutine."""
        if self.gone is not None:
            return Answer(gone=self.gone)
        attempts = Attempts(order)
        step = functools.partial(_step, order, attempts)
        try:
            return _answer(await DBOS.run_step_async(options_of(order, True), _marked(step)))
        except BaseException as error:
            return self._over(order, attempts, error)

    def plain(self, order: Order) -> Answer:
        """The same, in a thread."""
        if self.gone is not None:
            return Answer(gone=self.gone)
        attempts = Attempts(order)
        try:
            return _answer(DBOS.run_step(options_of(order, False), functools.partial(_plain_step, order, attempts)))
        except BaseException as error:
            return self._over(order, attempts, error)

    def _over(self, order: Order, attempts: Attempts, error: BaseException) -> Answer:
        """What an error of DBOS's own means. It is raised if it is for this order alone."""
        answer = Answer() if attempts.text is None else _answer(attempts.text)
        if isinstance(error, DBOSWorkflowConflictIDError) and _is_cancelled():
            # It was cancelled while the step ran, and so the step was not recorded.
            error = DBOSWorkflowCancelledError(f"{error}: it is cancelled")
        elif isinstance(error, DBOSUnexpectedStepError):
            text = f"the body departs from what DBOS recorded, and nothing was run: {error}"
            error = _failure(Incompatible(text, order.saga, order.id))
        elif not isinstance(error, DBOSWorkflowCancelledError) and order.undo is None:
            raise error
        # (A compensation that is cut off is for the process that goes on from here.)
        self.gone = answer.gone = error
        return answer


def _is_cancelled() -> bool:
    workflow = DBOS.workflow_id
    status = contextvars.Context().run(lambda: _get_dbos_instance()._sys_db.get_workflow_status(str(workflow)))
    return status is not None and status["status"] == "CANCELLED"


def _answer(text: str) -> Answer:
    answer: Answer = _read(text, Kept).answer()
    return answer


def _marked(step: Callable[[], Any]) -> Callable[[], Any]:
    # DBOS asks for a coroutine function, which a partial is not everywhere.
    async def marked() -> str:
        text: str = await step()
        return text

    return marked


# -- workflows -------------------------------------------------------------------------------------------------------


def _failure(error: Exception) -> PortableWorkflowError:
    """The error that DBOS keeps of a saga."""
    return PortableWorkflowError(str(error), type(error).__qualname__, None, plain(Ending.of(error)))


def _failed(order: Order, answer: Answer) -> list[Exception]:
    if answer.gone is not None:
        raise answer.gone
    if answer.error is None:
        return []
    answer.error.add_note(f"resilient: compensation of step {order.name} of saga {order.saga} ({order.id})")
    return [answer.error]


async def _undo(given: str) -> str:
    """Undo a cancelled saga."""
    undoings: Undoings = _read(given, Undoings)
    errors: list[Exception] = []
    carrier = Carrier()
    for order in undoings.orders:
        errors += _failed(order, await carrier.carry(order))
    if undoings.forward:
        raise _failure(past_pivot(undoings.saga, undoings.id))
    if errors:
        raise _failure(SagaStuck("compensations failed for good", errors, undoings.saga, undoings.id))
    return "null"


_decorate: Any = functools.partial(DBOS.workflow, serialization_type=WorkflowSerializationFormat.PORTABLE)
_undo_workflow: Any = _decorate(name="resilient.undo", max_recovery_attempts=100)(_undo)


async def _undo_apart(undoings: Undoings) -> None:
    """Undo a saga, and wait until it is undone: outside of the workflow that runs here, as if anybody had asked."""

    async def begin() -> None:
        with SetWorkflowID(undoings.place):
            handle = await DBOS.start_workflow_async(_undo_workflow, _text(undoings))
        await handle.get_result()

    await asyncio.get_running_loop().create_task(begin(), context=contextvars.Context())


def _undo_apart_plain(undoings: Undoings) -> None:
    def begin() -> None:
        with SetWorkflowID(undoings.place):
            handle: Any = DBOS.start_workflow(_undo_workflow, _text(undoings))
        handle.get_result()

    contextvars.Context().run(begin)


def _undoings(run: Any) -> Undoings:
    run._over = True
    return Undoings(run.name, run.id, [] if run._forward else run.undo_orders(), run._forward)


class Record:
    """What DBOS recorded of the steps of a workflow: a carrier that runs nothing."""

    def __init__(self, steps: list[Any]) -> None:
        self.texts: dict[str, Any] = {step["function_name"]: step["output"] for step in steps}

    def plain(self, order: Order) -> Answer:
        """The answer that a step had; where there is none, the saga was cancelled."""
        text = self.texts.get(options_of(order, False)["name"])
        if not isinstance(text, str):
            return Answer(gone=DBOSWorkflowCancelledError("cancelled"))
        return _answer(text)

    async def carry(self, order: Order) -> Answer:
        """The same, to be awaited."""
        return self.plain(order)


class DBOSBody(EngineBody):
    """A durable saga's body on DBOS. `workflow` is the DBOS workflow."""

    workflow: Any
    _workflow: Callable[[], Callable[[str], Any]]

    def __init__(self, engine: DBOSEngine, durable: DurableSaga, body: Callable[..., Any], is_async: bool) -> None:
        super().__init__(durable, body, is_async)
        self.engine = engine
        decorate = _decorate(name=self.name, max_recovery_attempts=durable.attempts)
        self.workflow = decorate(self._workflow())

    def _begun(self, given: str) -> tuple[Given, list[Any], dict[str, Any]]:
        got: Given = _read(given, Given)
        if got.version != self.durable.version or got.v != 1:
            text = f"it was begun by version {got.version}, and this process has version {self.durable.version}"
            raise _failure(Incompatible(text, self.name, got.id))
        return got, *self.input.read(got.args, got.kwargs)

    def _given(self, id: str, args: Any, kwargs: Any) -> str:
        given = _text(self.written(id, args, kwargs))
        if isinstance(_get_dbos_instance()._serializer, DefaultSerializer):
            raise TypeError(
                "DBOS is set to pickle, and data must never run code: give its configuration a serializer, "
                '{"serializer": DBOSEngine.serializer()}'
            )
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
        if isinstance(error, DBOSAwaitedWorkflowCancelledError):
            return SagaStuck("it was cancelled, and so was the workflow that undid it", [error], self.name, id)
        assert isinstance(error, Exception)
        return error

    def _aborted(self, id: str) -> Exception:
        return SagaAborted("it was cancelled, and all that was done is undone", self.name, id)


class AsyncBody(DBOSBody):
    """For coroutines: `await place(…, id="o-42")`."""

    def _workflow(self) -> Callable[[str], Any]:
        async def run(given: str) -> str:
            return await self.inside(given)

        run.__qualname__ = f"resilient.{self.name}"
        return run

    async def _ran(self, run: AsyncRun, args: list[Any], kwargs: dict[str, Any]) -> str:
        try:
            return self.form.keep(await self.__wrapped__(run, *args, **kwargs)).decode()
        except Exception as error:
            failure = error
        # (Anything else is the end of this process, or of the workflow: nothing is undone here.)
        final = failure if run.gone is not None else await asettled(run, failure)
        if run.gone is not None:
            raise run.gone
        assert isinstance(final, Exception)
        raise _failure(final) from final.__cause__

    async def inside(self, text: str) -> str:
        """What the workflow does."""
        from resilient._aio import sheltered

        given, args, kwargs = self._begun(text)
        run = AsyncRun(self.saga(given.id), Carrier().carry, self.undoing, SYSTEM.clock.now)
        try:
            return await self._ran(run, args, kwargs)
        except DBOSWorkflowCancelledError:
            await sheltered(False, math.inf, _quietly, _undoings(run))
            raise

    async def __call__(self, *args: Any, id: str, **kwargs: Any) -> Any:
        """Run the saga with this id and return its result, or get the result that it had.

        `SagaAborted` and `SagaStuck` as for a `Saga`. If the task that began the saga is cancelled here, the saga is
        cancelled and undone (and waited for, for `grace` seconds).
        """
        from resilient._aio import sheltered

        given = self._given(id, args, kwargs)
        (ending, mine), came = await sheltered(False, math.inf, self._start, id, given)
        return await self._waited(ending, mine, came, id)

    async def _waited(self, ending: asyncio.Task[Any], mine: bool, came: bool, id: str) -> Any:
        """Wait for the saga; `came`: the caller is cancelled, which goes for a saga that is `mine`."""
        try:
            if came:
                raise asyncio.CancelledError
            return await self._outcome(ending, id)
        except asyncio.CancelledError as error:
            if mine:
                await self._cancelled(ending, id, error)
            else:
                ending.cancel()
            raise

    async def _start(self, id: str, given: str) -> tuple[asyncio.Task[Any], bool]:
        mine = await DBOS.get_workflow_status_async(f"{self.name}/{id}") is None
        with SetWorkflowID(f"{self.name}/{id}"):
            handle = await DBOS.start_workflow_async(self.workflow, given)
        # A task of its own, since waiting for the workflow must not end with the first who waits.
        return asyncio.ensure_future(handle.get_result()), mine

    async def _outcome(self, ending: asyncio.Task[Any], id: str) -> Any:
        await asyncio.wait([ending])
        try:
            return self.form.outcome(ending.result().encode())[0]
        except DBOSAwaitedWorkflowCancelledError:
            problem = await self._until_undone(id)
        except Exception as error:
            problem = self._told(error, id)
        try:
            raise problem from problem.__cause__
        finally:
            del problem, ending

    async def _until_undone(self, id: str) -> Exception:
        """Wait until a cancelled saga is undone, or see to it; what its callers get."""
        try:
            await asyncio.get_running_loop().create_task(self._see_to_it(id), context=contextvars.Context())
        except _ENDS as error:
            return self._told(error, id)
        return self._aborted(id)

    async def _see_to_it(self, id: str) -> None:
        clock = SYSTEM.clock
        place, until = Undoings(self.name, id).place, clock.now() + self.engine.patience
        while await DBOS.get_workflow_status_async(place) is None:
            if clock.now() >= until:
                await _undo_apart(await self._read_back(id))
                return
            await clock.asleep(0.1)
        handle: Any = await DBOS.retrieve_workflow_async(place)
        await handle.get_result(polling_interval_sec=0.1)

    async def _read_back(self, id: str) -> Undoings:
        """What there is to undo, from what DBOS recorded."""
        status = await DBOS.get_workflow_status_async(f"{self.name}/{id}")
        record = Record(await DBOS.list_workflow_steps_async(f"{self.name}/{id}"))
        assert status is not None
        assert status.input is not None
        given, args, kwargs = self._begun(status.input["args"][0])
        run = AsyncRun(self.saga(given.id), record.carry, self.undoing, SYSTEM.clock.now)
        try:
            await self._ran(run, args, kwargs)
        except (Exception, DBOSWorkflowCancelledError):
            pass
        return _undoings(run)

    async def _cancelled(self, ending: asyncio.Task[Any], id: str, error: BaseException) -> None:
        """Cancel the saga, and wait until it is undone; what went wrong in that is noted on `error`."""
        from resilient._aio import sheltered

        async def until_undone() -> None:
            await DBOS.cancel_workflow_async(f"{self.name}/{id}")
            await self._outcome(ending, id)

        try:
            await sheltered(True, self.durable._options["grace"], until_undone)
        except SagaAborted:
            pass
        except Exception as problem:
            error.add_note(f"resilient: saga {self.name} ({id}) was cancelled, but: {problem!r}")


async def _quietly(undoings: Undoings) -> None:
    """Undo; whoever waits for the saga hears how it went."""
    try:
        await _undo_apart(undoings)
    except _ENDS:
        pass


class SyncBody(DBOSBody):
    """For plain functions: `place(…, id="o-42")`."""

    def _workflow(self) -> Callable[[str], Any]:
        def run(given: str) -> str:
            return self.inside(given)

        run.__qualname__ = f"resilient.{self.name}"
        return run

    def _ran(self, run: SyncRun, args: list[Any], kwargs: dict[str, Any]) -> str:
        try:
            return self.form.keep(self.__wrapped__(run, *args, **kwargs)).decode()
        except Exception as error:
            failure = error
        final = failure if run.gone is not None else settled(run, failure)
        if run.gone is not None:
            raise run.gone
        assert isinstance(final, Exception)
        raise _failure(final) from final.__cause__

    def inside(self, text: str) -> str:
        """What the workflow does."""
        given, args, kwargs = self._begun(text)
        run = SyncRun(self.saga(given.id), Carrier().plain, self.undoing, SYSTEM.clock.now)
        try:
            return self._ran(run, args, kwargs)
        except DBOSWorkflowCancelledError:
            try:
                _undo_apart_plain(_undoings(run))
            except _ENDS:
                pass
            raise

    def __call__(self, *args: Any, id: str, **kwargs: Any) -> Any:
        """Run the saga with this id and return its result, or get the result that it had."""
        given = self._given(id, args, kwargs)
        with SetWorkflowID(f"{self.name}/{id}"):
            handle: Any = DBOS.start_workflow(self.workflow, given)
        try:
            return self.form.outcome(handle.get_result().encode())[0]
        except DBOSAwaitedWorkflowCancelledError:
            problem = self._until_undone(id)
        except Exception as error:
            problem = self._told(error, id)
        try:
            raise problem from problem.__cause__
        finally:
            del problem

    def _until_undone(self, id: str) -> Exception:
        try:
            contextvars.Context().run(self._see_to_it, id)
        except _ENDS as error:
            return self._told(error, id)
        return self._aborted(id)

    def _see_to_it(self, id: str) -> None:
        clock = SYSTEM.clock
        place, until = Undoings(self.name, id).place, clock.now() + self.engine.patience
        while DBOS.get_workflow_status(place) is None:
            if clock.now() >= until:
                _undo_apart_plain(self._read_back(id))
                return
            clock.sleep(0.1)
        retrieve: Any = DBOS.retrieve_workflow
        retrieve(place).get_result(polling_interval_sec=0.1)

    def _read_back(self, id: str) -> Undoings:
        status = DBOS.get_workflow_status(f"{self.name}/{id}")
        record = Record(DBOS.list_workflow_steps(f"{self.name}/{id}"))
        assert status is not None
        assert status.input is not None
        given, args, kwargs = self._begun(status.input["args"][0])
        run = SyncRun(self.saga(given.id), record.plain, self.undoing, SYSTEM.clock.now)
        try:
            self._ran(run, args, kwargs)
        except (Exception, DBOSWorkflowCancelledError):
            pass
        return _undoings(run)
