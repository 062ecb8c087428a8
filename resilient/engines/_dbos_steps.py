"""What runs inside of DBOS: steps that carry out orders, and the workflow that undoes a cancelled saga.

Everything that DBOS keeps is text in JSON. A step never raises to DBOS but to be tried again, so that no exception has
to be stored by DBOS's means. A cancelled workflow can run no step any more: it is undone by a workflow of its own, with
the id of the saga and "/undo", which DBOS finishes like any other.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from typing import Any

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
    PortableWorkflowError,
    WorkflowSerializationFormat,
)
from msgspec import UNSET, Raw, Struct, UnsetType

from resilient.engines._body import Answer, past_pivot
from resilient.engines._perform import perform, perform_sync
from resilient.engines._wire import Ending, Order, error_of, kept_error, plain, wants, write
from resilient.errors import Incompatible, SagaStuck
from resilient.policy import SYSTEM

__all__ = [
    "ENDS",
    "Attempts",
    "Carrier",
    "Given",
    "Record",
    "Undoings",
    "decorate_with",
    "failure_of",
    "read",
    "text_of",
    "undo_apart",
    "undo_apart_plain",
    "undoings_of",
]


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
ENDS = (
    PortableWorkflowError,
    DBOSAwaitedWorkflowCancelledError,
    DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded,
)


def read(data: str, kind: Any) -> Any:
    return msgspec.json.decode(data.encode(), type=kind)


def text_of(value: Any) -> str:
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
        return text_of(Kept(error=Raw(kept_error(error))))


async def _step(order: Order, attempts: Attempts) -> str:
    try:
        attempts.text = text_of(Kept(ok=Raw(await perform(order, SYSTEM))))
    except Exception as error:
        return attempts.failed(error)
    return attempts.text


def _plain_step(order: Order, attempts: Attempts) -> str:
    try:
        attempts.text = text_of(Kept(ok=Raw(perform_sync(order, SYSTEM))))
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
            error = failure_of(Incompatible(text, order.saga, order.id))
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
    answer: Answer = read(text, Kept).answer()
    return answer


def _marked(step: Callable[[], Any]) -> Callable[[], Any]:
    # DBOS asks for a coroutine function, which a partial is not everywhere.
    async def marked() -> str:
        text: str = await step()
        return text

    return marked


# -- workflows -------------------------------------------------------------------------------------------------------


def failure_of(error: Exception) -> PortableWorkflowError:
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
    undoings: Undoings = read(given, Undoings)
    errors: list[Exception] = []
    carrier = Carrier()
    for order in undoings.orders:
        errors += _failed(order, await carrier.carry(order))
    if undoings.forward:
        raise failure_of(past_pivot(undoings.saga, undoings.id))
    if errors:
        raise failure_of(SagaStuck("compensations failed for good", errors, undoings.saga, undoings.id))
    return "null"


decorate_with: Any = functools.partial(DBOS.workflow, serialization_type=WorkflowSerializationFormat.PORTABLE)
_undo_workflow: Any = decorate_with(name="resilient.undo", max_recovery_attempts=100)(_undo)


async def undo_apart(undoings: Undoings) -> None:
    """Undo a saga, and wait until it is undone: outside of the workflow that runs here, as if anybody had asked."""

    async def begin() -> None:
        with SetWorkflowID(undoings.place):
            handle = await DBOS.start_workflow_async(_undo_workflow, text_of(undoings))
        await handle.get_result()

    await asyncio.get_running_loop().create_task(begin(), context=contextvars.Context())


def undo_apart_plain(undoings: Undoings) -> None:
    def begin() -> None:
        with SetWorkflowID(undoings.place):
            handle: Any = DBOS.start_workflow(_undo_workflow, text_of(undoings))
        handle.get_result()

    contextvars.Context().run(begin)


def undoings_of(run: Any) -> Undoings:
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
