"""Replies of PostgreSQL, read as its binary format, so that row factories and adapters of the user change nothing.

Rows that are damaged make `StoreError`, never anything else. Nothing here connects, waits, or imports a driver: a pure
function for each kind of reply, from the result, the operation and the encoding of text to a value.
"""

from __future__ import annotations

from math import isnan
from struct import Struct
from typing import Any, Protocol, cast

from resilient.errors import StoreError
from resilient.stores._ops import (
    Acquired,
    AnyOp,
    Append,
    Begin,
    Busy,
    Claim,
    Claimed,
    Completed,
    Doubtful,
    History,
    Page,
    Purge,
    Read,
    Record,
    Scan,
    State,
)

__all__ = ["AGAIN", "Result", "any_row", "appended", "claimed", "history", "number_of", "one_record", "page"]

AGAIN: Any = object()
"""Another session was quicker, so that the statement saw two different moments: ask again."""


class Result(Protocol):
    """What is used of psycopg's `PGresult`."""

    @property
    def ntuples(self) -> int: ...

    def get_value(self, row_number: int, column_number: int) -> bytes | None: ...


_INT = Struct("!q").unpack
_FLOAT = Struct("!d").unpack
_HEAD = Struct("!5i")  # dimensions, whether there are NULLs, the type, the length, the first index
_SIZE = Struct("!i")


def claimed(result: Result, op: Claim | Begin, coding: str) -> Claimed:
    if not result.ntuples:
        return cast(Claimed, AGAIN)  # Somebody took it in the same moment.
    get, key = result.get_value, op.key
    fence = _whole(get(0, 1), key, "fence")
    if get(0, 0) == b"\1":
        waited = op.lease + _number(get(0, 9), key, "time") - _number(get(0, 5), key, "mark")
        if waited > 0.01 and waited > 0.1 * op.lease:
            return cast(Claimed, AGAIN)  # It waited for somebody's transaction to end: the lease must start anew.
        attempt = get(0, 2)
        return Acquired(fence, 1 if attempt is None else _whole(attempt, key, "attempt"))
    attempts, fingerprint = _whole(get(0, 2), key, "attempt"), _text(get(0, 3), key, "fingerprint", coding)
    now, expires = _number(get(0, 9), key, "time"), get(0, 6)
    if expires is not None:
        if _number(expires, key, "expires") <= now:
            return cast(Claimed, AGAIN)
        return Completed(fence, attempts, fingerprint, _bytes(get(0, 7), key))
    ahead = _number(get(0, 5), key, "mark") - now
    if _text(get(0, 4), key, "owner", coding) == op.owner:
        return cast(Claimed, AGAIN)
    if ahead > 0:
        if type(op) is Claim and op.awaited and get(0, 8) != b"\1":
            return cast(Claimed, AGAIN)  # Whoever holds it must learn that somebody waits, or has just ended.
        return Busy(fence, attempts, fingerprint, ahead)
    return cast(Claimed, AGAIN) if op.take_over else Doubtful(fence, attempts, fingerprint, -ahead)


def appended(result: Result, op: Append, coding: str) -> bool:
    if not result.ntuples:
        return False
    entries = _entries(result.get_value(0, 0), op.key)
    if entries <= op.at:
        raise StoreError(f"the journal of {op.key} has {entries} entries: number {op.at} would leave a gap")
    return True


def any_row(result: Result, op: AnyOp, coding: str) -> bool:
    return result.ntuples > 0


def number_of(result: Result, op: Purge, coding: str) -> int:
    number: int = _INT(result.get_value(0, 0) or b"")[0]
    return number


def one_record(result: Result, op: Read, coding: str) -> Record | None:
    return _record(result, 0, coding) if result.ntuples else None


def history(result: Result, op: History, coding: str) -> tuple[Record, tuple[bytes, ...]] | None:
    if not result.ntuples:
        return None
    record = _record(result, 0, coding)
    entries = _array(result.get_value(0, 12))
    if _entries(result.get_value(0, 11), record.key) != len(entries) or None in entries:
        raise _damaged(record.key, "a journal of which entries are missing")
    return record, cast("tuple[bytes, ...]", entries)


def _array(value: bytes | None) -> tuple[bytes | None, ...]:
    """The elements of an array of one dimension, in PostgreSQL's binary format; NULL is one without any."""
    if value is None:
        return ()
    found: list[bytes | None] = []
    place = _HEAD.size
    for _ in range(_HEAD.unpack_from(value)[3]):
        (size,) = _SIZE.unpack_from(value, place)
        place += 4
        found.append(None if size < 0 else value[place : place + size])
        place += max(size, 0)
    return tuple(found)


def page(result: Result, op: Scan, coding: str) -> Page:
    records = tuple(
        _record(result, row, coding) for row in range(result.ntuples) if result.get_value(row, 0) is not None
    )
    if len(records) >= op.limit:
        return Page(records, records[-1].key)
    after = result.get_value(0, 11)
    return Page(records, "" if after is None else after.decode(coding))


def _record(result: Result, row: int, coding: str) -> Record:
    def get(column: int) -> bytes | None:
        return result.get_value(row, column)

    key = _text(get(0), "?", "key", coding)
    expires = get(8)
    mark, now = _number(get(7), key, "mark"), _number(get(10), key, "now")
    state: State = "done" if expires is not None else "running" if mark > now else "in doubt"
    return Record(
        key=key,
        state=state,
        owner=_text(get(1), key, "owner", coding),
        fence=_whole(get(2), key, "fence"),
        attempt=_whole(get(3), key, "attempt"),
        fingerprint=_text(get(4), key, "fingerprint", coding),
        label=_text(get(5), key, "label", coding),
        began_at=_number(get(6), key, "began"),
        mark=mark,
        expires_at=None if expires is None else _number(expires, key, "expires"),
        result=None if expires is None else _bytes(get(9), key),
    )


def _whole(value: bytes | None, key: str, column: str) -> int:
    number: int = 0 if value is None else _INT(value)[0]
    if number < 1:
        raise _damaged(key, f"{column} {None if value is None else number}")
    return number


def _entries(value: bytes | None, key: str) -> int:
    if value is None:
        raise _damaged(key, "entries None")
    number: int = _INT(value)[0]
    return number


def _number(value: bytes | None, key: str, column: str) -> float:
    number: float = float("nan") if value is None else _FLOAT(value)[0]
    if isnan(number):
        raise _damaged(key, f"{column} {None if value is None else number}")
    return number


def _text(value: bytes | None, key: str, column: str, coding: str) -> str:
    if value is None:
        raise _damaged(key, f"{column} None")
    try:
        return value.decode(coding)
    except UnicodeDecodeError:
        raise _damaged(key, f"a {column} that is not {coding}") from None


def _bytes(value: bytes | None, key: str) -> bytes:
    if value is None:
        raise _damaged(key, "no result, though it is finished")
    return value


def _damaged(key: str, what: str) -> StoreError:
    return StoreError(f"the record {key!r} is damaged: it has {what}")
