"""What the tests of both HTTP middlewares share: a store that fails on command, and what problems look like."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resilient.errors import StoreError
from resilient.stores import Busy, Claim, MemoryStore, Op, SQLiteStore

__all__ = ["BrokenStore", "Gate", "problem", "store_of"]


class BrokenStore(MemoryStore):
    """A memory store that fails at each operation whose class is in `broken`; `done` lists all that was asked."""

    def __init__(self, *broken: type[Op[Any]], maybe_written: bool = False, clock: Any = None) -> None:
        super().__init__(clock)
        self.broken = set(broken)
        self.maybe_written = maybe_written
        self.done: list[str] = []

    def execute(self, op: Any) -> Any:
        self.done.append(type(op).__name__)
        if type(op) in self.broken:
            raise StoreError("out of order", maybe_written=self.maybe_written)
        return super().execute(op)

    async def aexecute(self, op: Any) -> Any:
        return self.execute(op)


def problem(status: int, headers: dict[str, str], body: bytes) -> str:
    """The name of the problem in a response, which is checked to be one."""
    assert headers["content-type"] == "application/problem+json"
    assert headers["content-length"] == str(len(body))
    told = json.loads(body)
    assert told["status"] == status
    assert told["title"]
    assert told["detail"]
    return str(told["type"]).rpartition(":")[2]


class Gate:
    """A store that counts the first claims that found the key taken, and opens `full` at the one of that number."""

    def __init__(self, store: Any, number: int) -> None:
        self.store, self.full = store, threading.Event()
        self._number, self._lock = number, threading.Lock()
        self.watch = store.watch
        if hasattr(store, "poll"):
            self.poll = store.poll

    def execute(self, op: Any) -> Any:
        return self._seen(op, self.store.execute(op))

    async def aexecute(self, op: Any) -> Any:
        return self._seen(op, await self.store.aexecute(op))

    def _seen(self, op: Any, answer: Any) -> Any:
        if type(op) is Claim and not op.awaited and type(answer) is Busy:
            with self._lock:
                self._number -= 1
                if self._number == 0:
                    self.full.set()
        return answer


@contextmanager
def store_of(kind: str, folder: Path) -> Iterator[Any]:
    """A store of that kind, closed at the end."""
    if kind == "memory":
        yield MemoryStore()
        return
    store = SQLiteStore(folder / "keys.db")
    try:
        yield store
    finally:
        store.close()
