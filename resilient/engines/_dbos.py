"""The bodies of sagas on DBOS: the workflows that run them, and the calls that begin them and wait.

Whoever finds a cancelled saga that nobody undoes reads DBOS's record of its steps, and begins the workflow that does.
"""

from __future__ import annotations

import asyncio
import contextvars
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
)

from resilient.engines._body import AsyncRun, EngineBody, SyncRun, asettled, settled
from resilient.engines._dbos_steps import (
    ENDS,
    Carrier,
    Given,
    Record,
    Undoings,
    decorate_with,
    failure_of,
    read,
    text_of,
    undo_apart,
    undo_apart_plain,
    undoings_of,
)
from resilient.engines._wire import Ending, write
from resilient.errors import Incompatible, SagaAborted, SagaStuck
from resilient.policy import SYSTEM

if TYPE_CHECKING:
    from resilient.durable import DurableSaga
    from resilient.engines.dbos import DBOSEngine

__all__ = ["AsyncBody", "DBOSBody", "SyncBody"]


class DBOSBody(EngineBody):
    """A durable saga's body on DBOS. `workflow` is the DBOS workflow."""

    workflow: Any
    _workflow: Callable[[], Callable[[str], Any]]

    if TYPE_CHECKING:

        def __call__(self, *args: Any, id: str, **kwargs: Any) -> Any:
            """Run the saga with this id, or get the result that it had; a coroutine, if the body is one."""

    def __init__(self, engine: DBOSEngine, durable: DurableSaga[Any], body: Callable[..., Any], is_async: bool) -> None:
        super().__init__(durable, body, is_async)
        self.engine = engine
        decorate = decorate_with(name=self.name, max_recovery_attempts=durable.attempts)
        self.workflow = decorate(self._workflow())

    def _begun(self, given: str) -> tuple[Given, list[Any], dict[str, Any]]:
        got: Given = read(given, Given)
        if got.version != self.durable.version or got.v != 1:
            text = f"it was begun by version {got.version}, and this process has version {self.durable.version}"
            raise failure_of(Incompatible(text, self.name, got.id))
        return got, *self.input.read(got.args, got.kwargs)

    def _given(self, id: str, args: Any, kwargs: Any) -> str:
        given = text_of(self.written(id, args, kwargs))
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
        raise failure_of(final) from final.__cause__

    async def inside(self, text: str) -> str:
        """What the workflow does."""
        from resilient._aio import sheltered

        given, args, kwargs = self._begun(text)
        run = AsyncRun(self.saga(given.id), Carrier().carry, self.undoing, SYSTEM.clock.now)
        try:
            return await self._ran(run, args, kwargs)
        except DBOSWorkflowCancelledError:
            await sheltered(False, math.inf, _quietly, undoings_of(run))
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
        except ENDS as error:
            return self._told(error, id)
        return self._aborted(id)

    async def _see_to_it(self, id: str) -> None:
        clock = SYSTEM.clock
        place, until = Undoings(self.name, id).place, clock.now() + self.engine.patience
        while await DBOS.get_workflow_status_async(place) is None:
            if clock.now() >= until:
                await undo_apart(await self._read_back(id))
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
        return undoings_of(run)

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
        await undo_apart(undoings)
    except ENDS:
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
        raise failure_of(final) from final.__cause__

    def inside(self, text: str) -> str:
        """What the workflow does."""
        given, args, kwargs = self._begun(text)
        run = SyncRun(self.saga(given.id), Carrier().plain, self.undoing, SYSTEM.clock.now)
        try:
            return self._ran(run, args, kwargs)
        except DBOSWorkflowCancelledError:
            try:
                undo_apart_plain(undoings_of(run))
            except ENDS:
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
        except ENDS as error:
            return self._told(error, id)
        return self._aborted(id)

    def _see_to_it(self, id: str) -> None:
        clock = SYSTEM.clock
        place, until = Undoings(self.name, id).place, clock.now() + self.engine.patience
        while DBOS.get_workflow_status(place) is None:
            if clock.now() >= until:
                undo_apart_plain(self._read_back(id))
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
        return undoings_of(run)
