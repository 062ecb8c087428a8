"""The client as it runs in a process of its own: it places the orders, and can be killed at any moment.

Orders arrive at an even pace and at most `CROWD` are in work at a time. What it does is in its journal; what became of
each payment is in a SQLite file beside it. A client that starts where another one was killed places what is not over in
the journal, from the first step on. It ends at once when its input does: its parent is gone. For asyncio.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from resilient import Env, stores
from resilient.clock import SystemClock
from resilient.demo.client import Calls, Shop, bare, guards, open_http, place
from resilient.demo.journal import Journal
from resilient.demo.numbers import Outcome
from resilient.demo.orders import Order
from resilient.demo.schedule import SERVICES

__all__ = ["CROWD", "JOB", "JOURNAL", "Job", "main", "push", "work"]

CROWD = 64
JOB, JOURNAL, PAYMENTS = "client.json", "client.journal", "payments.db"


@dataclass(frozen=True, slots=True)
class Job:
    """What a client is told when it starts: where the services are, and the orders that come within `seconds`."""

    urls: dict[str, str]
    seconds: float
    patience: float
    guarded: bool
    orders: list[Order]


async def work(job: Job, folder: Path, began: float) -> None:
    """Place all orders that are not over yet. Second 0 was at `began`."""
    clock = SystemClock()
    store = stores.open(f"sqlite:///{quote(str(folder / PAYMENTS))}")
    journal = Journal(folder / JOURNAL, clock.now)
    try:
        async with open_http(job.patience, job.urls.values()) as http:
            calls = Calls(http, job.urls, journal)
            if job.guarded:
                shop = guards(calls, Env(sinks=[journal]), job.patience, store, journal.post)
            else:
                shop = bare(calls)
            journal.start(list(SERVICES) if job.guarded else [])
            await push(job.orders, shop, clock, journal, began, job.seconds / len(job.orders))
    finally:
        journal.close()
        store.close()


async def push(
    orders: Sequence[Order], shop: Shop, clock: SystemClock, journal: Journal, began: float, gap: float
) -> None:
    """Place the orders, each when it is due, or as soon after that as there is room."""
    crowd = asyncio.Semaphore(CROWD)

    async def one(order: Order, due: float) -> None:
        async with crowd:
            journal.place(order.id)
            journal.end(await place(order, shop, clock, due))

    async with asyncio.TaskGroup() as group:
        for number, order in enumerate(orders):
            if order.id not in journal.over:
                due = began + number * gap
                await clock.asleep(due - clock.now())
                group.create_task(one(order, due))
    # A task that ends as cancelled though nobody cancelled it is a fault of ours. It must show in the report.
    for order in orders:
        if order.id not in journal.over:
            journal.end(Outcome(order.id, clock.now() - began, "client", "lost"))


def main(path: str, pipe: int, leave: Callable[[int], object]) -> None:
    """What the process runs, in the folder at `path`. `pipe` brings a line `begin NOW`; when it ends, `leave`."""
    folder = Path(path)
    job = msgspec.json.decode((folder / JOB).read_bytes(), type=Job)
    print("ready", flush=True)
    # A pipe brings a line of this length whole. Nothing buffered: a thread may still wait here when Python shuts down.
    line = os.read(pipe, 200).decode()
    if not line:
        return

    def obey() -> None:
        os.read(pipe, 1)
        leave(0)

    threading.Thread(target=obey, daemon=True).start()
    asyncio.run(work(job, folder, float(line.split()[1])))
