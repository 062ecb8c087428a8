"""The saga of three steps as a workflow of Temporal's own, with a worker beside it: what `benchmarks.sagas` times.

A module of its own, since Temporal wants its workflows at the top of one and not every machine has it. The worker runs
workflows without its sandbox, which is the faster way.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio import activity, workflow
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

LIMIT = timedelta(seconds=30)


@activity.defn
async def reserve(order: str, sku: str) -> str:
    """A step."""
    return "hold"


@activity.defn
async def charge(order: str, cents: int) -> str:
    """A step."""
    return "receipt"


@activity.defn
async def ship(order: str) -> str:
    """The last step."""
    return "parcel"


@workflow.defn
class Order:
    """The three steps."""

    @workflow.run
    async def run(self, order: str) -> str:
        """Place an order."""
        await workflow.execute_activity(reserve, args=[order, "sku-1"], start_to_close_timeout=LIMIT)
        await workflow.execute_activity(charge, args=[order, 990], start_to_close_timeout=LIMIT)
        return await workflow.execute_activity(ship, order, start_to_close_timeout=LIMIT)


@asynccontextmanager
async def served(*, dev: bool) -> AsyncIterator[Any]:
    """What places an order on a Temporal server on loopback: the one for development, or the one that skips time."""
    logging.getLogger("temporalio").setLevel(logging.CRITICAL)
    scripts = Path(sys.executable).parent
    if dev:
        starting = WorkflowEnvironment.start_local(dev_server_existing_path=str(scripts / "temporal"), ui=False)
    else:
        starting = WorkflowEnvironment.start_time_skipping(
            test_server_existing_path=str(scripts / "temporal-test-server")
        )
    async with await starting as environment:
        client = environment.client

        async def place(key: str) -> str:
            return await client.execute_workflow(Order.run, key, id=key, task_queue="orders")

        worker = Worker(
            client,
            task_queue="orders",
            workflows=[Order],
            activities=[reserve, charge, ship],
            workflow_runner=UnsandboxedWorkflowRunner(),
        )
        # Time that is skipped while something is under way ends its timeouts, and then it is tried again.
        async with worker, asyncio.timeout(600):
            with environment.auto_time_skipping_disabled():
                yield place
