"""What the proofs of idempotency share: every backend by its name, and a store that stops its caller dead."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resilient import stores
from resilient.clock import SystemClock
from resilient.stores._ops import Scan

__all__ = ["BACKENDS", "Dead", "Fatal", "close", "opened", "patience", "record", "url_of"]

BACKENDS = ("memory", "sqlite full", "sqlite normal", "redis", "postgres")
_names = itertools.count()
_CLOCK = SystemClock()


def url_of(backend: str, place: Path, server: Callable[[str], str]) -> str:
    """The URL of an empty store. `server` gives the URL of the server that a fixture of this name starts."""
    number = next(_names)
    if backend == "memory":
        return "memory://"
    if backend.startswith("sqlite"):
        return f"sqlite:///{place}/{number}.db?durability={backend.split()[1]}"
    url = server(f"{backend}_url")
    return f"{url}{'&' if '?' in url else '?'}prefix=proof{number}_"


def opened(url: str) -> Any:
    """A store of its own."""
    return stores.open(url)


async def close(store: Any) -> None:
    """Close a store, in the loop that used it."""
    aclose = getattr(store, "aclose", None)
    if aclose is not None:
        await aclose()
    else:
        store.close()


def patience(seconds: float = 60.0) -> Callable[[], None]:
    """Call it in each round of a loop that asks for something which must come: `AssertionError` if it does not."""
    until = _CLOCK.now() + seconds

    def check() -> None:
        assert _CLOCK.now() < until, "it did not come"

    return check


def record(store: Any, key: str, *, running: bool = True) -> Any:
    """The record of the call with `key`, or None. Not `running`: asked for until its lease is over."""
    check = patience()
    while True:
        check()
        page = store.execute(Scan(text=f'"key":"{key}"'))
        found = next(iter(page.records), None)
        if running or found is None or found.state != "running":
            return found


class Dead(GeneratorExit):
    """A caller stopped dead: drivers carry it out at once, and take no further step."""


class Fatal:
    """A store that stops its caller before its step number `at`, or has it go on for ever if there are fewer.

    Steps are counted through everything that the caller does: each operation has one before and one after it, and
    `step` counts those of the function.
    """

    def __init__(self, store: Any, at: int) -> None:
        self.store, self.at, self.steps = store, at, 0
        self.done: list[str] = []
        if hasattr(store, "watch"):
            self.watch = store.watch

    def step(self, name: str) -> None:
        if self.steps == self.at:
            raise Dead
        self.steps += 1
        self.done.append(name)

    def execute(self, op: Any) -> Any:
        name = type(op).__name__
        if name == "Renew":
            return self.store.execute(op)
        self.step(f"before {name}")
        answer = self.store.execute(op)
        self.step(f"after {name}")
        return answer

    async def aexecute(self, op: Any) -> Any:
        name = type(op).__name__
        if name == "Renew":
            return await self.store.aexecute(op)
        self.step(f"before {name}")
        answer = await self.store.aexecute(op)
        self.step(f"after {name}")
        return answer
