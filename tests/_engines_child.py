"""A process that runs a saga on DBOS and kills itself where it is told: `python -m tests._engines_child FOLDER HOW`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from resilient import DurableSaga, Retry, SagaAborted
from resilient.engines import DBOSEngine

FOLDER, HOW = Path(sys.argv[1]), sys.argv[2]


def note(word: str) -> None:
    with (FOLDER / "ledger").open("a") as file:
        file.write(f"{word}\n")


def die_if(where: str) -> None:
    if where == HOW:
        os.kill(os.getpid(), signal.SIGKILL)


async def reserve() -> None:
    note("reserve")


async def release() -> None:
    note("release")


async def charge() -> None:
    note("charge")
    die_if("step")


async def refund() -> None:
    note("refund")
    die_if("undo")


async def ship() -> None:
    note("ship")
    raise ValueError("no address")


@DurableSaga("order", engine=DBOSEngine(), retries=Retry(Exception, attempts=1))
async def place(saga: Any) -> None:
    await saga.step(reserve, compensate=release)
    await saga.step(charge, compensate=refund)
    await saga.step(ship, compensate=None)


async def main() -> None:
    from dbos import DBOS

    DBOS(
        config={
            "name": "tests",
            "system_database_url": f"sqlite:///{FOLDER}/dbos.sqlite",
            "log_level": "CRITICAL",
            "application_version": "1",
            "serializer": DBOSEngine.serializer(),
        }
    )
    DBOS.launch()
    try:
        await place(id="1")
    except SagaAborted:
        note("aborted")
    DBOS.destroy()


if __name__ == "__main__":
    asyncio.run(main())
