"""A store in this process's memory: the reference of what every other store does, and the one for tests.

Promises all that a store promises, to threads, asyncio and trio together, as long as the process lives. Does not: share
anything with other processes, or outlive this one. About a microsecond an operation. Safe from any thread and loop.
"""

from __future__ import annotations

import threading
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from msgspec import Struct

from resilient.clock import SystemClock
from resilient.errors import StoreError
from resilient.stores._ops import (
    Abandon,
    Acquired,
    AnyOp,
    Append,
    Begin,
    Busy,
    Claim,
    Claimed,
    Completed,
    Doubtful,
    Finish,
    Forget,
    History,
    Op,
    Page,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
)
from resilient.stores._watch import Bells, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient.clock import Clock

__all__ = ["MemoryStore"]

R = TypeVar("R")


class _Row(Struct, gc=False):
    """One record. `expires` is None until there is a result. No work for the garbage collector: it holds plain data."""

    owner: str
    fingerprint: str
    label: str
    began: float
    mark: float
    attempt: int
    fence: int
    awaited: bool = False
    expires: float | None = None
    result: bytes | None = None
    journal: tuple[bytes, ...] = ()


class MemoryStore:
    """Records in a dictionary. `clock` is the clock that judges leases; by default the system's."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = SystemClock() if clock is None else clock
        self._at = self.clock.at
        self._lock = threading.Lock()
        self._rows: dict[str, _Row] = {}
        self._ends: list[tuple[float, str]] = []
        self._fence = 0
        self._bells = Bells()
        self._how: dict[type[AnyOp], Callable[..., Any]] = {
            Claim: self._claim,
            Begin: self._begin,
            Append: self._append,
            History: self._history,
            Renew: self._renew,
            Finish: self._finish,
            Release: self._release,
            Abandon: self._abandon,
            Read: self._read,
            Scan: self._scan,
            Purge: self._purge,
            Forget: self._forget,
        }

    @classmethod
    def from_url(cls, url: str) -> MemoryStore:
        """`memory://`, a store of its own."""
        parts = urlsplit(url)
        if parts.netloc or parts.path or parts.query:
            raise ValueError(f"memory:// takes nothing behind it, not {url!r}")
        return cls()

    def execute(self, op: Op[R], /) -> R:
        """Carry out `op`."""
        with self._lock:
            answer: R = self._how[type(op)](op, self._at())
            return answer

    async def aexecute(self, op: Op[R], /) -> R:
        """Carry out `op`; nothing is awaited."""
        return self.execute(op)

    def watch(self, key: str, *, task: bool) -> Watch:
        """Watch `key` from now on."""
        return self._bells.watch(key, task=task)

    def close(self) -> None:
        """Nothing to close; the records stay as long as the object."""

    def __repr__(self) -> str:
        return "MemoryStore()"

    # -- each operation, under the lock ------------------------------------------------------------------------------

    def _claim(self, op: Claim, now: float) -> Claimed:
        ends = self._ends
        if ends and ends[0][0] <= now:
            self._expire_locked(now)
        row = self._rows.get(op.key)
        if row is None or (row.expires is not None and row.expires <= now):
            return self._take_locked(op, now, 1)
        if row.result is not None:
            return Completed(row.fence, row.attempt, row.fingerprint, row.result)
        if row.owner == op.owner:
            row.mark = now + op.lease
            return Acquired(row.fence, row.attempt)
        if row.mark > now:
            row.awaited = row.awaited or op.awaited
            return Busy(row.fence, row.attempt, row.fingerprint, row.mark - now)
        if op.take_over:
            reply = self._take_locked(op, now, row.attempt + 1)
            taken = self._rows[op.key]
            taken.began, taken.label, taken.journal = row.began, op.label or row.label, row.journal
            return reply
        return Doubtful(row.fence, row.attempt, row.fingerprint, now - row.mark)

    def _take_locked(self, op: Claim, now: float, attempt: int) -> Acquired:
        # Microseconds since the epoch, or one more than the last: a clock may stand still, or be put back.
        fence = int(now * 1e6)
        if fence <= self._fence:
            fence = self._fence + 1
        self._fence = fence
        self._rows[op.key] = _Row(op.owner, op.fingerprint, op.label, now, now + op.lease, attempt, fence)
        return Acquired(fence, attempt)

    def _begin(self, op: Begin, now: float) -> Claimed:
        reply = self._claim(Claim(op.key, op.owner, op.lease, "", op.label, op.take_over), now)
        row = self._rows[op.key]
        if type(reply) is Acquired and not row.journal:
            row.journal = (op.entry,)
        return reply

    def _append(self, op: Append, now: float) -> bool:
        row = self._mine(op)
        if row is None or row.result is not None:
            return False
        if op.at > len(row.journal):
            raise StoreError(
                f"the journal of {op.key} has {len(row.journal)} entries: number {op.at} would leave a gap"
            )
        if op.at == len(row.journal):
            row.journal += (op.entry,)
        row.mark = now + op.lease
        row.label = op.label or row.label
        return True

    def _history(self, op: History, now: float) -> tuple[Record, tuple[bytes, ...]] | None:
        record = self._read(Read(op.key), now)
        return None if record is None else (record, self._rows[op.key].journal)

    def _mine(self, op: Renew | Finish | Release | Abandon | Append) -> _Row | None:
        row = self._rows.get(op.key)
        if row is None or row.owner != op.owner or (row.fence != op.fence and op.fence):
            return None
        return row

    def _renew(self, op: Renew, now: float) -> bool:
        row = self._mine(op)
        if row is None or row.result is not None:
            return False
        row.mark = now + op.lease
        return True

    def _finish(self, op: Finish, now: float) -> bool:
        key = op.key
        row = self._rows.get(key)
        # (`_mine`, without the call: no operation but `Claim` is asked for as often.)
        if row is None or row.owner != op.owner or (row.fence != op.fence and op.fence):
            return False
        if row.result is None:
            row.result, row.mark = op.result, now
            row.expires = expires = now + op.ttl
            heappush(self._ends, (expires, key))
            if row.awaited:
                self._end(key, row)
        return True

    def _release(self, op: Release, now: float) -> bool:
        row = self._mine(op)
        if row is None or row.result is not None:
            return False
        del self._rows[op.key]
        self._end(op.key, row)
        return True

    def _abandon(self, op: Abandon, now: float) -> bool:
        row = self._mine(op)
        if row is None or row.result is not None:
            return False
        row.mark = min(row.mark, now)
        self._end(op.key, row)
        return True

    def _end(self, key: str, row: _Row) -> None:
        if row.awaited:
            row.awaited = False
            self._bells.ring(key)

    def _read(self, op: Read, now: float) -> Record | None:
        row = self._rows.get(op.key)
        if row is None or (row.expires is not None and row.expires <= now):
            return None
        return _record(op.key, row, now)

    def _scan(self, op: Scan, now: float) -> Page:
        found: list[Record] = []
        for key in sorted(key for key, row in self._rows.items() if key > op.after and op.text in row.label):
            if len(found) == op.limit:
                return Page(tuple(found), found[-1].key)
            record = self._read(Read(key), now)
            if record is not None and op.state in ("", record.state):
                found.append(record)
        return Page(tuple(found), "")

    def _purge(self, op: Purge, now: float) -> int:
        # A lease that runs has a mark in the future.
        old = [key for key, row in self._rows.items() if row.mark <= now - op.older_than][: op.batch]
        for key in old:
            del self._rows[key]
        return len(old)

    def _forget(self, op: Forget, now: float) -> bool:
        row = self._rows.get(op.key)
        if row is None or (row.result is None and row.mark > now):
            return False
        del self._rows[op.key]
        return True

    def _expire_locked(self, now: float) -> None:
        """Drop some results whose time is over, so that memory is not full of them; a few at a time."""
        for _ in range(8):
            if not self._ends or self._ends[0][0] > now:
                return
            _, key = heappop(self._ends)
            row = self._rows.get(key)
            if row is not None and row.expires is not None and row.expires <= now:
                del self._rows[key]


def _record(key: str, row: _Row, now: float) -> Record:
    return Record(
        key=key,
        state="done" if row.result is not None else "running" if row.mark > now else "in doubt",
        owner=row.owner,
        fence=row.fence,
        attempt=row.attempt,
        fingerprint=row.fingerprint,
        label=row.label,
        began_at=row.began,
        mark=row.mark,
        expires_at=row.expires,
        result=row.result,
    )
