"""A process in the middle of a saga, for tests that stop it: `python -m tests._saga_stop_child URL how LEDGER`.

It says "began" from within its second step, or from within a compensation, and stops itself; woken, it waits there for
a line, goes on, and says how the saga ended for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from resilient import DurableSaga, Retry, SagaAborted, stores
from resilient.errors import ResilientError

__all__ = ["bodies", "body", "note"]

LEASE = 0.3
RETRIES = Retry(OSError, attempts=2, wait=0, name="compensation")
where: dict[str, Any] = {"ledger": None, "stops": ""}


def note(what: str) -> None:
    with Path(where["ledger"]).open("a") as ledger:
        print(where["who"], what, file=ledger)
    if where["stops"] == what:
        print("began", flush=True)
        # By itself, at once: later it might be in the middle of a heartbeat, with the lock of a file in its hands.
        os.kill(os.getpid(), signal.SIGSTOP)
        sys.stdin.readline()


def act(number: int, fails: bool) -> int:
    """A step; the third fails if it is to."""
    note(f"act-{number}")
    if fails and number == 3:
        raise ValueError("boom")
    return number


def unact(number: int, fails: bool) -> None:
    """A compensation."""
    note(f"unact-{number}")


async def aact(number: int, fails: bool) -> int:
    """A step."""
    return act(number, fails)


def body(saga: Any, fails: bool) -> str:
    """Three steps."""
    for number in (1, 2, 3):
        saga.step(act, number, fails, compensate=unact)
    return "done"


async def abody(saga: Any, fails: bool) -> str:
    """Three steps."""
    for number in (1, 2, 3):
        await saga.step(aact, number, fails, compensate=unact)
    return "done"


def bodies(store: Any) -> tuple[Any, Any]:
    """What a process can run."""
    options: Any = {"store": store, "lease": LEASE, "retries": RETRIES}
    return DurableSaga("stopped", **options)(body), DurableSaga("astopped", **options)(abody)


def main() -> None:
    url, how, fails, stops, ledger = sys.argv[1:]
    where.update(ledger=ledger, stops=stops, who="first")
    store = stores.open(url)
    plain, task = bodies(store)

    async def run() -> str:
        try:
            got: str = await task(fails == "fails", id="o-1")
            return got
        finally:
            aclose = getattr(store, "aclose", None)
            if aclose is not None:
                await aclose()

    try:
        said = {"value": asyncio.run(run()) if how == "task" else plain(fails == "fails", id="o-1")}
    except (ResilientError, SagaAborted) as error:
        said = {"error": type(error).__name__}
    store.close()
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
