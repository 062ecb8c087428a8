"""A module with a workflow in Temporal's sandbox, which imports it anew, and with it the library; and with a saga."""

from __future__ import annotations

from typing import Any

from temporalio import workflow

from resilient import DurableSaga, Retry
from resilient.engines import TemporalEngine


async def greet(name: str) -> str:
    return f"hello {name}"


class Place:
    engine = TemporalEngine(lambda: None, task_queue="sandbox")


@DurableSaga("greeting", engine=Place.engine)
async def greeting(saga: Any, name: str) -> str:
    said: str = await saga.step(greet, name, compensate=None, retry=Retry(OSError))
    return said


@workflow.defn
class Sandboxed:
    @workflow.run
    async def run(self) -> str:
        return f"sandboxed: {Retry(KeyError, attempts=2).attempts}"
