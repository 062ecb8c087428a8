"""TemporalEngine: durable sagas as Temporal workflows; each step and each compensation is an activity.

Promises: the body stays as it is, an id stands for one workflow, a call with it gets that workflow's result; policies
become Temporal's retries and timeouts; compensations have timeouts and retries of their own, run the last first, also
when the workflow is cancelled, which then stays cancelled. Does not: run plain functions as bodies. Needs a worker
(`engine.worker`). Costs what Temporal costs. Safe from any task.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

try:
    from temporalio import common as _probe
except ImportError as error:
    raise ImportError("TemporalEngine needs temporalio: pip install 'resilient-kit[temporal]'") from error

from resilient._guard import kind_of
from resilient.policy import seconds

if TYPE_CHECKING:
    from temporalio.client import Client
    from temporalio.worker import Worker

    from resilient.durable import DurableSaga
    from resilient.engines._temporal import TemporalBody

__all__ = ["TemporalEngine"]

del _probe


class TemporalEngine:
    """Run durable sagas on Temporal.

    - `client`: a `temporalio.client.Client`, or a function that connects one (async, or not), called at the first use.
    - `task_queue`: where workers wait for work.
    - `step_timeout`: seconds for one attempt at a step or a compensation that has no `timeout` of its own.
    - `heartbeat`: seconds after which a silent worker is taken for dead. Cancellation reaches a step within it.

    A step without `retry` runs once. After its `retry` (and for compensations `retries`) Temporal tries again.

        engine = TemporalEngine(lambda: Client.connect("localhost:7233"), task_queue="orders")

        @DurableSaga("order", engine=engine)
        async def place(saga, order: Order) -> Receipt: ...

        async with engine.worker(await engine.client(), place): ...
    """

    __slots__ = ("_client", "_connect", "heartbeat", "step_timeout", "task_queue")

    def __init__(
        self,
        client: Client | Callable[[], Any],
        *,
        task_queue: str,
        step_timeout: float = 600.0,
        heartbeat: float = 10.0,
    ) -> None:
        if type(task_queue) is not str or not task_queue:
            raise TypeError(f"task_queue must be some text, not {task_queue!r}")
        self.task_queue = task_queue
        self.step_timeout = seconds("step_timeout", step_timeout)
        self.heartbeat = seconds("heartbeat", heartbeat)
        is_factory = callable(client) and not hasattr(client, "start_workflow")
        self._client: Any = None if is_factory else client
        self._connect: Any = client if is_factory else None
        if not is_factory and not hasattr(client, "start_workflow"):
            raise TypeError(f"client must be a temporalio Client or a function that connects one, not {client!r}")

    async def client(self) -> Client:
        """The client, connected."""
        if self._client is None:
            made = self._connect()
            self._client = await made if inspect.isawaitable(made) else made
        client: Client = self._client
        return client

    def bind(self, durable: DurableSaga[Any], body: Callable[..., Any], /) -> TemporalBody:
        """What `DurableSaga` makes of `body`. `TypeError` for a plain function."""
        if kind_of(body) != "coro":
            raise TypeError(f"Temporal runs coroutines only, and {body!r} is none: make it async def")
        from resilient.engines._temporal import TemporalBody

        return TemporalBody(self, durable, body)

    def worker(self, client: Client, *sagas: Any, **options: Any) -> Worker:
        """A worker for these sagas, to be run: `await worker.run()`, or `async with worker:`.

        `options` are those of `temporalio.worker.Worker`; workflows and activities of your own are added to ours.
        """
        from temporalio.worker import Worker

        from resilient.engines._temporal import ACTIVITIES, TemporalBody

        for saga in sagas:
            if not isinstance(saga, TemporalBody) or saga.engine is not self:
                raise TypeError(f"worker needs sagas of this engine, not {saga!r}")
        if not sagas:
            raise TypeError("worker needs at least one saga")
        workflows = [*[saga.workflow for saga in sagas], *options.pop("workflows", ())]
        activities = [*ACTIVITIES, *options.pop("activities", ())]
        return Worker(client, task_queue=self.task_queue, workflows=workflows, activities=activities, **options)
