"""A memory store for the tests of idempotent calls: it notes what it is asked, and fails or waits as it is told."""

from __future__ import annotations

import threading
from typing import Any

from resilient import StoreError
from resilient.clock import Clock
from resilient.stores import MemoryStore, Record, Scan

__all__ = ["TroubledStore"]


class TroubledStore:
    """`trouble` lists what the next operations of a class meet, in order:

    - "down": nothing is written, and it says so. "lost": it is written, and nobody knows. "never": it is not, and
      nobody knows.
    - an exception: raised in place of the answer, after the operation; (exception,) before it.
    - a function: called before the operation, and awaited in tasks if it returns something to await.
    """

    def __init__(self, clock: Clock | None = None, *, watch: bool = True) -> None:
        self.inner = MemoryStore(clock)
        self.ops: list[Any] = []
        self.trouble: list[tuple[type[Any], Any]] = []
        self._lock = threading.Lock()
        if watch:
            self.watch = self.inner.watch

    def meet(self, op: type[Any], *faults: Any) -> None:
        self.trouble += [(op, fault) for fault in faults]

    @property
    def names(self) -> list[str]:
        """What was asked."""
        return [type(op).__name__ for op in self.ops]

    @property
    def records(self) -> tuple[Record, ...]:
        return self.inner.execute(Scan()).records

    @property
    def states(self) -> list[str]:
        return [record.state for record in self.records]

    def _fault(self, op: Any) -> Any:
        with self._lock:
            self.ops.append(op)
            for place, (kind, fault) in enumerate(self.trouble):
                if isinstance(op, kind):
                    del self.trouble[place]
                    return fault
        return None

    def _carry_out(self, op: Any, fault: Any) -> Any:
        if fault == "down":
            raise StoreError("the store is down")
        if fault == "never":
            raise StoreError("the connection was lost", maybe_written=True)
        if isinstance(fault, tuple):
            raise fault[0]
        answer = self.inner.execute(op)
        if fault == "lost":
            raise StoreError("the answer was lost", maybe_written=True)
        if isinstance(fault, BaseException):
            raise fault
        return answer

    def execute(self, op: Any, /) -> Any:
        fault = self._fault(op)
        if callable(fault):
            fault()
        return self._carry_out(op, fault)

    async def aexecute(self, op: Any, /) -> Any:
        fault = self._fault(op)
        if callable(fault):
            made: Any = fault()
            if made is not None:
                await made
        return self._carry_out(op, fault)
