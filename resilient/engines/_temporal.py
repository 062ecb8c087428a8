"""What runs inside of Temporal: the workflow that runs a saga's body, the activities that carry out orders, the client.

The workflow is not sandboxed: the body lives beside its steps, whose modules a sandbox would import anew; it must be
deterministic by the rule of all durable sagas. Activities take one argument, an order, and send heartbeats while a step
runs, so that a cancelled one is told, and a dead worker is noticed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from datetime import timedelta
from types import FunctionType
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw
from temporalio import activity, workflow
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.common import RetryPolicy, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    WorkflowAlreadyStartedError,
)
from temporalio.exceptions import CancelledError as TemporalCancelled
from temporalio.exceptions import TimeoutError as TemporalTimeout

from resilient.engines._body import Answer, AsyncRun, EngineBody, asettled
from resilient.engines._perform import perform
from resilient.engines._wire import Ending, Order, error_of, kept_error, order_of, plain, wants, write
from resilient.errors import CallTimeout, DeadlineExceeded, Incompatible, SagaAborted, SagaStuck
from resilient.policy import SYSTEM

if TYPE_CHECKING:
    from resilient.durable import DurableSaga
    from resilient.engines.temporal import TemporalEngine

__all__ = ["ACTIVITIES", "TemporalBody"]

LATE = 5.0
"""Seconds that a step has to end by itself after its time, before the server takes it for lost."""


# -- activities ------------------------------------------------------------------------------------------------------


async def _beating(every: float) -> None:
    while True:
        activity.heartbeat()
        await SYSTEM.clock.asleep(every)


async def carry_out(order: Order, attempt: int) -> Any:
    """Carry out an order; raise its error as Temporal wants to have it, which says whether and when to try again."""
    try:
        return plain(await perform(order, SYSTEM))
    except Exception as error:
        again = wants(order.retry, error)
        delay = order.retry.delay(attempt, error, SYSTEM) if again and order.retry is not None else 0.0
        raise ApplicationError(
            str(error),
            plain(kept_error(error)),
            type=type(error).__qualname__,
            non_retryable=not again,
            next_retry_delay=timedelta(seconds=delay) if delay > 0 else None,
        ) from error


async def _activity(given: Any) -> Any:
    info = activity.info()
    beats = asyncio.ensure_future(_beating((info.heartbeat_timeout or timedelta(seconds=30)).total_seconds() / 3))
    try:
        return await carry_out(order_of(given), info.attempt)
    finally:
        beats.cancel()


@activity.defn(name="resilient.step")
async def _step(given: Any) -> Any:
    return await _activity(given)


@activity.defn(name="resilient.compensation")
async def _compensation(given: Any) -> Any:
    return await _activity(given)


ACTIVITIES: list[Callable[..., Any]] = [_step, _compensation]


# -- orders ----------------------------------------------------------------------------------------------------------


def options_of(order: Order, engine: TemporalEngine) -> dict[str, Any]:
    """The options of the activity that carries out an order."""
    told = order.retry
    policy = RetryPolicy(maximum_attempts=1)
    if told is not None:
        # The activity says when to try again; this is for those that say nothing: timeouts, and dead workers.
        policy = RetryPolicy(
            maximum_attempts=told.attempts,
            initial_interval=timedelta(seconds=max(told.first, 0.001)),
            backoff_coefficient=told.factor,
            maximum_interval=timedelta(seconds=max(told.cap, 0.001)),
        )
    whole = [one for one in (order.left, None if told is None else told.total) if one is not None]
    return {
        "task_queue": engine.task_queue,
        "retry_policy": policy,
        "start_to_close_timeout": timedelta(
            seconds=engine.step_timeout if order.timeout is None else order.timeout + LATE
        ),
        "schedule_to_close_timeout": timedelta(seconds=min(whole) + LATE) if whole else None,
        "heartbeat_timeout": timedelta(seconds=engine.heartbeat),
        "cancellation_type": workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        "summary": order.name,
    }


def answer_of(order: Order, error: BaseException, engine: TemporalEngine) -> Answer:
    """What an activity's error says."""
    cause = error.__cause__ if isinstance(error, ActivityError) else error
    if isinstance(cause, (TemporalCancelled, asyncio.CancelledError)):
        return Answer(gone=asyncio.CancelledError())
    if isinstance(cause, TemporalTimeout):
        limit = order.timeout or order.limit or engine.step_timeout
        return Answer(error=CallTimeout(order.name, limit))
    if isinstance(cause, ApplicationError) and cause.details:
        return Answer(error=error_of(write(cause.details[0])))
    if not isinstance(error, Exception):
        return Answer(gone=error)
    return Answer(error=RuntimeError(str(cause)))


async def _carry(engine: TemporalEngine, order: Order) -> Answer:
    """Have an activity carry out an order, and wait for its end, cancelled or not."""
    if order.left is not None and order.left <= 0:
        return Answer(error=DeadlineExceeded(order.saga))
    kind = "resilient.step" if order.undo is None else "resilient.compensation"
    handle: Any = workflow.start_activity(kind, plain(order), **options_of(order, engine))
    gone: BaseException | None = None
    while not handle.done():
        try:
            await asyncio.wait([handle])
        except asyncio.CancelledError as error:
            gone = error
            # A compensation goes on all the same: that is decided further out.
            handle.cancel()
    try:
        answer = Answer(write(handle.result()))
    except BaseException as error:
        answer = answer_of(order, error, engine)
    # An error that came before the cancel did is one no less.
    answer.gone = answer.gone if gone is None else gone
    return answer


# -- the workflow ----------------------------------------------------------------------------------------------------


class _Workflow:
    """The base of the workflows: one class for each saga, by whose name Temporal knows it."""

    body: TemporalBody


async def run(self: _Workflow, given: Any) -> Any:
    """Run a saga."""
    return await self.body.inside(given)


def _workflow_of(body: TemporalBody) -> Any:
    # A function of its own: Temporal marks it.
    own = FunctionType(run.__code__, run.__globals__, "run", run.__defaults__, run.__closure__)
    own.__qualname__, own.__annotations__ = "_Saga.run", {"given": Any, "return": Any}
    made = type("_Saga", (_Workflow,), {"run": workflow.run(own), "body": body, "__module__": __name__})
    return workflow.defn(name=body.name, sandboxed=False)(made)


class TemporalBody(EngineBody):
    """A durable saga's body on Temporal: `await place(…, id="o-42")`. `workflow` is its class, for workers of yours."""

    def __init__(self, engine: TemporalEngine, durable: DurableSaga[Any], body: Callable[..., Any]) -> None:
        super().__init__(durable, body, True)
        self.engine = engine
        self.workflow = _workflow_of(self)

    async def inside(self, given: Any) -> Any:
        """What the workflow does."""
        if given["version"] != self.durable.version or given["v"] != 1:
            # This fails the task and not the workflow: it waits for a worker of its version.
            text = f"it was begun by version {given['version']}, and this worker has version {self.durable.version}"
            raise Incompatible(text, self.name, given["id"])
        args, kwargs = self.input.read(Raw(write(given["args"])), Raw(write(given["kwargs"])))

        async def carry(order: Order) -> Answer:
            return await _carry(self.engine, order)

        saga = self.saga(given["id"])
        run = AsyncRun(saga, carry, self.undoing, asyncio.get_running_loop().time)
        try:
            return plain(self.form.keep(await self.__wrapped__(run, *args, **kwargs)))
        except GeneratorExit:
            raise
        except BaseException as error:
            failure = error
        final = await asettled(run, failure)
        if isinstance(final, Exception):
            raise ApplicationError(
                str(final), plain(Ending.of(final)), type=type(final).__qualname__, non_retryable=True
            ) from final.__cause__
        raise final

    # -- the client --------------------------------------------------------------------------------------------------

    async def __call__(self, *args: Any, id: str, **kwargs: Any) -> Any:
        """Run the saga with this id and return its result, or get the result that it had.

        `SagaAborted` and `SagaStuck` as for a `Saga`. If the task that began the saga is cancelled here, the saga is
        cancelled and undone (and waited for, for `grace` seconds).
        """
        from resilient._aio import sheltered

        given = plain(self.written(id, args, kwargs))
        (handle, mine), came = await sheltered(False, math.inf, self._start, given)
        return await self._waited(handle, mine, came, id)

    async def _waited(self, handle: WorkflowHandle[Any, Any], mine: bool, came: bool, id: str) -> Any:
        """Wait for the saga; `came`: the caller is cancelled, which goes for a saga that is `mine`."""
        try:
            if came:
                raise asyncio.CancelledError
            return await self._outcome(handle, id)
        except asyncio.CancelledError as error:
            if mine:
                await self._cancelled(handle, id, error)
            raise

    async def _start(self, given: Any) -> tuple[WorkflowHandle[Any, Any], bool]:
        client = await self.engine.client()
        place = f"{self.name}/{given['id']}"
        try:
            handle = await client.start_workflow(
                self.name,
                given,
                id=place,
                task_queue=self.engine.task_queue,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
            )
        except WorkflowAlreadyStartedError:
            return client.get_workflow_handle(place), False
        return handle, True

    async def _outcome(self, handle: WorkflowHandle[Any, Any], id: str) -> Any:
        try:
            data = await handle.result()
        except WorkflowFailureError as error:
            problem = ended(error.cause, self.name, id)
        else:
            return self.form.outcome(write(data))[0]
        try:
            raise problem from problem.__cause__
        finally:
            del problem

    async def _cancelled(self, handle: WorkflowHandle[Any, Any], id: str, error: BaseException) -> None:
        """Cancel the saga, and wait until it is undone; what went wrong in that is noted on `error`."""
        from resilient._aio import sheltered

        async def until_undone() -> None:
            await handle.cancel()
            await self._outcome(handle, id)

        try:
            await sheltered(True, self.durable._options["grace"], until_undone)
        except SagaAborted:
            pass
        except Exception as problem:
            error.add_note(f"resilient: saga {self.name} ({id}) was cancelled, but: {problem!r}")


def ended(cause: BaseException | None, name: str, id: str) -> Exception:
    """What the failure of a workflow means to those who wait for the saga."""
    if isinstance(cause, ApplicationError) and cause.details:
        return msgspec.json.decode(write(cause.details[0]), type=Ending).error(name, id)
    if isinstance(cause, TemporalCancelled):
        return SagaAborted("it was cancelled, and all that was done is undone", name, id)
    error = cause if isinstance(cause, Exception) else RuntimeError(repr(cause))
    return SagaStuck("it was ended from outside, and nothing was undone", [error], name, id)
