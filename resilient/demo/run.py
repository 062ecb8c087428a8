"""The demo from end to end: the same orders over the same schedule, first without guards, then with them.

Each run has services and a client of its own, started afresh. What the view shows is what the client's journal tells.
Interrupting it at any point ends every child and removes every file.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from resilient import sagas, stores
from resilient.clock import SystemClock
from resilient.demo.audit import Audit, books
from resilient.demo.journal import Tail
from resilient.demo.notes import kept
from resilient.demo.numbers import Progress, Result
from resilient.demo.orders import Order, OrdersError, read
from resilient.demo.report import announce, as_data, draw
from resilient.demo.saga import NAME
from resilient.demo.schedule import Schedule
from resilient.demo.supervisor import CLIENT, ServiceFailed, Services
from resilient.demo.view import Scene, View, view_for

__all__ = ["FULL", "QUICK", "compare", "main", "run"]

FULL = (24.0, 400)  # seconds of the schedule, and the most orders that it takes
QUICK = (3.2, 50)


async def run(orders: Sequence[Order], schedule: Schedule, guarded: bool, view: View) -> Result:
    """Push `orders` through services of their own, and read the ledgers when all is over."""
    clock = SystemClock()
    progress = Progress("with guards" if guarded else "without guards", len(orders), clock.now)
    progress.failed = "undone" if guarded else "failed"
    async with Services(schedule, orders, guarded) as services:
        services.begin()
        progress.began = services.began
        tail = Tail(services.journal)
        view.begin(_scene(progress, services))
        watcher = asyncio.create_task(_watch(view, clock, progress, services, tail))
        try:
            await services.served()
            wall = progress.elapsed
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            _read(tail, progress)
            view.end()
        await services.all_up()
        shown = await _ledgers(services.urls)
        stuck = await _stuck(services.books) if guarded else {}
    said = {outcome.order: outcome.failed_at is None for outcome in progress.outcomes}
    return Result(
        title=progress.title,
        outcomes=progress.outcomes,
        tallies=progress.tallies,
        audit=Audit(orders, books(shown), said, stuck),
        wall=wall,
        outbox=len(progress.outbox),
        kills=services.downs[CLIENT],
        crashes=services.downs["payment"],
        left=progress.left,
        recovered=progress.recovered,
    )


def _scene(progress: Progress, services: Services) -> Scene:
    def trouble(service: str) -> str:
        if not services.up[service]:
            return "down"
        episode = services.schedule.of(service, progress.elapsed)
        return "" if episode is None else episode.kind

    return Scene(progress, trouble, lambda service: progress.breakers.get(service, ""))


def _read(tail: Tail, progress: Progress) -> None:
    for entry in tail:
        progress.take(entry)


async def _watch(view: View, clock: SystemClock, progress: Progress, services: Services, tail: Tail) -> None:
    up = dict(services.up)
    while True:
        for name, now in services.up.items():
            if now != up[name]:
                end = "was killed" if name == CLIENT else "crashed"
                progress.tell(f"{name} process {'is back' if now else f'is gone: it {end}'}")
        up = dict(services.up)
        _read(tail, progress)
        view.tick()
        await clock.asleep(view.every)


async def _ledgers(urls: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Ask the services themselves what they received and did."""
    shown: dict[str, dict[str, Any]] = {}
    async with httpx.AsyncClient(timeout=30.0, trust_env=False) as http:
        for service, url in urls.items():
            shown[service] = (await http.get(f"{url}/ledger")).raise_for_status().json()
    return shown


async def _stuck(url: str) -> dict[str, str]:
    """The sagas that have not come to their end, and how they are."""
    store = stores.open(url)
    try:
        found = await sagas.alist_sagas(store, name=NAME)
    finally:
        store.close()
    return {one.id: one.state for one in found if one.state not in ("done", "aborted")}


async def compare(orders: Sequence[Order], schedule: Schedule, view: View) -> tuple[Result, Result]:
    """The run without guards and the run with them, one after the other. SIGTERM ends it like Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for name in ("SIGTERM", "SIGHUP"):
        # Not in a thread, where signals never arrive.
        with suppress(ValueError, RuntimeError):
            loop.add_signal_handler(getattr(signal, name), task.cancel)
    return await run(orders, schedule, False, view), await run(orders, schedule, True, view)


def main(*, quick: bool, seed: int, plain: bool, path: Path, json_path: Path | None, out: Console | None = None) -> int:
    """Run the demo and print its report: 0 if the guards kept their promise, 1 if not, 2 if it could not run."""
    console = out or Console(highlight=False, no_color=True if plain else None)
    complain: Callable[[str], object] = lambda text: print(f"resilient demo: {text}", file=sys.stderr)  # noqa: E731
    seconds, most = QUICK if quick else FULL
    try:
        orders = read(path)[:most]
        if json_path is not None:
            json_path.touch()  # better to learn now than in a minute that it cannot be written
        schedule = Schedule(seed, seconds)
        announce(console, schedule, len(orders))
        before, after = asyncio.run(compare(orders, schedule, view_for(console, plain)))
        draw(console, schedule, before, after)
        if json_path is not None:
            json_path.write_text(json.dumps(as_data(schedule, before, after), indent=2) + "\n", encoding="utf-8")
    except (OrdersError, ServiceFailed, OSError, httpx.HTTPError) as error:
        complain(str(error))
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        complain("interrupted; the services are stopped")
        return 130
    return 0 if kept(before, after) else 1
