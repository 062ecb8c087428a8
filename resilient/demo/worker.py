"""The client as it runs in a process of its own: it places the orders, and can be killed at any moment.

Orders arrive at an even pace and at most `CROWD` are in work at a time. What it does is in its journal; its sagas, and
what became of each payment, are in a SQLite file beside it. A client that starts where another one was killed recovers
the sagas that were left; without guards it places what is not over in the journal, from the first step on. It ends at
once when its input does: its parent is gone. For asyncio.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from resilient import stores
from resilient.clock import SystemClock
from resilient.demo.client import Calls, guards, open_http, place
from resilient.demo.journal import Journal
from resilient.demo.numbers import Outcome
from resilient.demo.orders import Order
from resilient.demo.saga import Desk, shop
from resilient.demo.schedule import SERVICES

__all__ = ["CROWD", "JOB", "JOURNAL", "Job", "books_of", "main", "push", "work"]

CROWD = 64
JOB, JOURNAL = "client.json", "client.journal"


def books_of(folder: Path) -> str:
    """The URL of the store in which the client keeps its sagas and payments."""
    return f"sqlite:///{quote(str(folder / 'orders.db'))}"


@dataclass(frozen=True, slots=True)
class Job:
    """What a client is told when it starts: where the services are, and the orders that come within `seconds`."""

    urls: dict[str, str]
    seconds: float
    patience: float
    guarded: bool
    orders: list[Order]


async def work(job: Job, folder: Path, began: float) -> None:
    """Bring all orders to their end that are not over yet. Second 0 was at `began`."""
    clock = SystemClock()
    journal = Journal(folder / JOURNAL, clock.now)
    try:
        async with open_http(job.patience, job.urls.values()) as http:
            calls = Calls(http, job.urls, journal)
            gap = job.seconds / len(job.orders)
            if job.guarded:
                await _guarded(job, folder, calls, clock, journal, began, gap)
            else:
                journal.start([])
                await push(job.orders, lambda order, due: place(order, calls, clock, due), clock, journal, began, gap)
    finally:
        journal.close()


async def _guarded(
    job: Job, folder: Path, calls: Calls, clock: SystemClock, journal: Journal, began: float, gap: float
) -> None:
    store = stores.open(books_of(folder))
    try:
        desk = Desk(store, journal, clock)
        shop.set(guards(calls, desk.env, job.patience, store, journal.post))
        journal.start(list(SERVICES))
        await desk.look()
        async with asyncio.TaskGroup() as group:
            group.create_task(desk.recover())
            await push(job.orders, desk.place, clock, journal, began, gap)
    finally:
        store.close()


async def push(
    orders: Sequence[Order],
    place: Callable[[Order, float], Awaitable[Outcome]],
    clock: SystemClock,
    journal: Journal,
    began: float,
    gap: float,
) -> None:
    """Place the orders, each when it is due, or as soon after that as there is room."""
    crowd = asyncio.Semaphore(CROWD)

    async def one(order: Order, due: float) -> None:
        async with crowd:
            journal.place(order.id)
            journal.end(await place(order, due))

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
