"""Stores that do things to sagas in the middle, for tests: count, fail, lose the lease, interrupt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from resilient import StoreError, durable
from resilient._book import stored_key
from resilient._journal import Entry, read
from resilient.clock import SystemClock
from resilient.stores import MemoryStore
from resilient.stores._ops import History, Renew
from resilient.testing import FakeClock

__all__ = ["Interrupting", "Spy", "alone", "entries", "once_waited_for", "orphaned"]


class Spy:
    """A store in memory with a clock of its own, that names each operation, and calls `before` and `after` it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.ops: list[str] = []
        self.before: Callable[[Any], object] = lambda op: None
        self.after: Callable[[Any], object] = lambda op: None

    def execute(self, op: Any) -> Any:
        if isinstance(op, Renew):
            return self.store.execute(op)
        self.ops.append(type(op).__name__)
        self.before(op)
        answer = self.store.execute(op)
        self.after(op)
        return answer

    async def aexecute(self, op: Any) -> Any:
        return self.execute(op)

    def fail(self, name: str, times: int = 1, *, written: bool = False, error: Any = None) -> None:
        """The next `times` operations of this name fail; `written`: after they were carried out."""
        left = [times]

        def strike(op: Any) -> None:
            if type(op).__name__ == name and left[0]:
                left[0] -= 1
                raise StoreError("the store is away", maybe_written=written) if error is None else error

        if written:
            self.after = strike
        else:
            self.before = strike


def entries(store: Any, name: str, id: str) -> list[Entry]:
    """The journal of a saga."""
    got = store.execute(History(stored_key(name, id)))
    assert got is not None
    return [read(entry) for entry in got[1]]


@contextmanager
def alone() -> Iterator[None]:
    """Bodies that are made in here are forgotten after."""
    before = dict(durable._bodies)
    try:
        yield
    finally:
        durable._bodies.clear()
        durable._bodies.update(before)


def orphaned(spy: Spy) -> None:
    """All leases are over."""
    spy.clock.advance(1000.0)


def once_waited_for(saga: Any, act: Any) -> None:
    """Act when somebody waits for a step of this saga to end."""
    while saga._resting is None:
        SystemClock().sleep(0.0005)
    act()


class Interrupting(float):
    """A time that nobody waits for in peace."""

    def __gt__(self, other: float) -> bool:
        raise KeyboardInterrupt

    __lt__ = __gt__
