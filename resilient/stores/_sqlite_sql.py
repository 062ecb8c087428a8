"""The SQL of the SQLite store: operations into statements, rows into answers.

Promises that each operation is decided and written by statements of one transaction, that at most the last of them
changes anything (of `Begin` and `Append`, the last two), and that a row of which no store of ours can be the author is
a `StoreError`. Does not: begin or commit, or know of threads. Per operation one to three statements. Immutable, so safe
from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Protocol, cast

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
    Page,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
)

__all__ = ["MIGRATIONS", "Execute", "Rows", "Sql"]

# A table with row numbers, and the key in an index: new records go to the end of the table, whatever their keys.
# `mark` is the end of the lease or, once done, the instant of that: what a purge looks for.
# Version n is the schema after the first n entries. Append, never change one. `{p}` is the prefix.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE {p}records (
            key TEXT NOT NULL,
            owner TEXT NOT NULL,
            fence INTEGER NOT NULL,
            attempt INTEGER NOT NULL,
            fingerprint TEXT NOT NULL,
            label TEXT NOT NULL,
            began REAL NOT NULL,
            mark REAL NOT NULL,
            expires REAL,
            result BLOB,
            CHECK ((expires IS NULL) = (result IS NULL))
        )""",
        "CREATE UNIQUE INDEX {p}records_key ON {p}records (key)",
        "CREATE INDEX {p}records_mark ON {p}records (mark)",
    ),
    # Journals. By key and not by row number, which a VACUUM may change. Triggers, so that no journal outlives its
    # record; `attempt` only changes when a record changes hands. `entries` counts them.
    # An entry or a heartbeat leaves `began` alone, and so touches no index. Records that are open are found without a
    # look at those that have ended, and each kind is purged by an index of its own.
    (
        """CREATE TABLE {p}entries (
            key TEXT NOT NULL,
            number INTEGER NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (key, number)
        ) WITHOUT ROWID""",
        "ALTER TABLE {p}records ADD COLUMN entries INTEGER NOT NULL DEFAULT 0",
        """CREATE TRIGGER {p}records_gone AFTER DELETE ON {p}records WHEN OLD.entries <> 0 BEGIN
            DELETE FROM {p}entries WHERE key = OLD.key;
        END""",
        """CREATE TRIGGER {p}records_anew AFTER UPDATE OF attempt ON {p}records
        WHEN OLD.result IS NOT NULL AND OLD.entries <> 0 BEGIN
            DELETE FROM {p}entries WHERE key = OLD.key;
        END""",
        "DROP INDEX {p}records_mark",
        "CREATE INDEX {p}records_open ON {p}records (began) WHERE result IS NULL",
        "CREATE INDEX {p}records_ended ON {p}records (mark) WHERE result IS NOT NULL",
    ),
)

_COLUMNS = "owner, fence, attempt, fingerprint, label, began, mark, expires, result"
# The same for connections of others: nothing here has a declared type or is text, so that neither converters nor a
# text factory of theirs touch it.
_NEUTRAL = (
    "CAST(owner AS BLOB), +fence, +attempt, CAST(fingerprint AS BLOB), CAST(label AS BLOB), "
    "+began, +mark, +expires, +result"
)


class Rows(Protocol):
    """What a statement gives back."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Execute(Protocol):
    """Executes a statement: a cursor's own method."""

    def __call__(self, sql: str, parameters: Sequence[Any] = ..., /) -> Rows: ...


# A record: owner, fence, attempt, fingerprint, label, began, mark, expires, result. The last two are None while there
# is no result.
_Row = tuple[str, int, int, str, str, float, float, float | None, bytes | None]


def _checked(key: str, values: Sequence[Any]) -> _Row:
    owner, fence, attempt, fingerprint, label, began, mark, expires, result = values
    fine = (
        type(owner) is type(fingerprint) is type(label) is str
        and type(fence) is type(attempt) is int
        and type(began) is type(mark) is float
        and ((expires is None and result is None) or (type(expires) is float and type(result) is bytes))
    )
    if not fine:
        _damaged(key, values)
    return values  # type: ignore[return-value]


def _damaged(key: str, values: Sequence[Any]) -> NoReturn:
    owner, fence, attempt, fingerprint, label, began, mark, expires, result = values
    for name, value, wanted in (
        ("owner", owner, str),
        ("fence", fence, int),
        ("attempt", attempt, int),
        ("fingerprint", fingerprint, str),
        ("label", label, str),
        ("began", began, float),
        ("mark", mark, float),
    ):
        if type(value) is not wanted:
            raise StoreError(f"the record of key {key[:255]!r} is damaged: {name} is {_kind(value)}")
    raise StoreError(
        f"the record of key {key[:255]!r} is damaged: its result is {_kind(result)}, and expires is {_kind(expires)}"
    )


def _kind(value: object) -> str:
    """What a value is, and nothing of what is in it: it may be huge, or secret."""
    return "NULL" if value is None else f"of type {type(value).__name__}"


def _text(value: object) -> object:
    """Text that was asked for as bytes."""
    return value.decode() if type(value) is bytes else value


class Sql:
    """The statements for one table prefix; `neutral` for connections that other people set up."""

    def __init__(self, prefix: str, *, neutral: bool = False) -> None:
        table = f"{prefix}records"
        self.table = table
        self._neutral = neutral
        columns = _NEUTRAL if neutral else _COLUMNS
        key = "CAST(key AS BLOB)" if neutral else "key"
        self._insert = (
            f"INSERT INTO {table} (key, owner, fence, attempt, fingerprint, label, began, mark, entries) "
            "VALUES (?, ?, ?, 1, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
        )
        self._select = f"SELECT {columns} FROM {table} WHERE key = ?"
        self._again = f"UPDATE {table} SET mark = ? WHERE key = ?"
        self._take = (
            f"UPDATE {table} SET owner = ?, fence = ?, attempt = ?, fingerprint = ?, label = ?, began = ?, mark = ?, "
            "entries = coalesce(?, entries), expires = NULL, result = NULL WHERE key = ?"
        )
        mine = "WHERE key = ? AND owner = ? AND (fence = ? OR ? = 0)"
        self._renew = f"UPDATE {table} SET mark = ? {mine} AND result IS NULL"
        self._finish = f"UPDATE {table} SET result = ?, mark = ?, expires = ? {mine} AND result IS NULL"
        self._release = f"DELETE FROM {table} {mine} AND result IS NULL"
        self._abandon = f"UPDATE {table} SET mark = min(mark, ?) {mine} AND result IS NULL"
        scan = f"SELECT {key}, {columns} FROM {table} WHERE instr(label, ?) > 0 AND"
        # By `began`, which stays as it is while a record is open, and by key for those of one instant.
        order = "AND (began, key) > (?, ?) ORDER BY began, key LIMIT ?"
        self._scans = {
            "": f"{scan} (expires IS NULL OR expires > ?) AND key > ? ORDER BY key LIMIT ?",
            "done": f"{scan} expires > ? AND key > ? ORDER BY key LIMIT ?",
            "running": f"{scan} mark > ? AND result IS NULL {order}",
            "in doubt": f"{scan} mark <= ? AND result IS NULL {order}",
        }
        # What is open began before its mark.
        self._purge = (
            f"DELETE FROM {table} WHERE rowid IN (SELECT * FROM (SELECT rowid FROM {table} WHERE result IS NOT NULL "
            "AND mark <= ? ORDER BY mark LIMIT ?) UNION ALL SELECT * FROM (SELECT rowid FROM "
            f"{table} WHERE result IS NULL AND began <= ? AND mark <= ? ORDER BY began LIMIT ?) LIMIT ?)"
        )
        entries = f"{prefix}entries"
        self._first = f"INSERT INTO {entries} (key, number, data) VALUES (?, 0, ?) ON CONFLICT (key, number) DO NOTHING"
        self._counted = f"UPDATE {table} SET entries = 1 WHERE key = ?"
        self._append = f"INSERT INTO {entries} (key, number, data) VALUES (?, ?, ?)"
        self._next = f"UPDATE {table} SET mark = ?, entries = entries + 1 {mine} AND result IS NULL AND entries = ?"
        self._next_label = (
            f"UPDATE {table} SET mark = ?, label = ?, entries = entries + 1 {mine} AND result IS NULL AND entries = ?"
        )
        self._relabel = f"UPDATE {table} SET mark = ?, label = ? {mine} AND result IS NULL"
        self._length = f"SELECT entries FROM {table} WHERE key = ?"
        # One statement, so that it is of one instant on any connection.
        self._history = (
            f"SELECT -1, {columns} FROM {table} WHERE key = ? UNION ALL "
            f"SELECT number, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, +data FROM {entries} WHERE key = ?"
        )
        self._forget = f"DELETE FROM {table} WHERE key = ? AND (result IS NOT NULL OR mark <= ?)"
        self._how: dict[type[AnyOp], Callable[[Execute, Any, float], object]] = {
            Claim: self._do_claim,
            Renew: self._do_renew,
            Finish: self._do_finish,
            Release: self._do_release,
            Abandon: self._do_abandon,
            Read: self._do_read,
            Begin: self._do_begin,
            Append: self._do_append,
            History: self._do_history,
            Scan: self._do_scan,
            Purge: self._do_purge,
            Forget: self._do_forget,
        }

        # What one statement decides, the clock apart: it needs no transaction around it.
        self.alone: dict[type[AnyOp], Callable[[Any, float], tuple[str, tuple[Any, ...]]]] = {
            Renew: self._to_renew,
            Finish: self._to_finish,
            Release: self._to_release,
            Abandon: self._to_abandon,
        }

    def answer(self, execute: Execute, op: AnyOp, now: float) -> object:
        """Carry out `op` at the instant `now`, inside a transaction that can write."""
        return self._how[type(op)](execute, op, now)

    def peek(self, execute: Execute, op: AnyOp, now: float) -> object:
        """The answer to what only reads, and to a `Claim` or a `Begin` that need not write; `...` if it must.

        `now` is taken before the row is read, so that a lease that looks over is over.
        """
        if isinstance(op, (Claim, Begin)):
            row = self._row(execute, op.key)
            answer = None if row is None else self._judge(op, row, now)
            return ... if answer is None else answer
        return self._how[type(op)](execute, op, now)

    # -- each operation ----------------------------------------------------------------------------------------------

    def _row(self, execute: Execute, key: str) -> _Row | None:
        values = execute(self._select, (key,)).fetchone()
        if values is None:
            return None
        return _checked(key, self._texts(values) if self._neutral else values)

    @staticmethod
    def _texts(values: Iterable[Any]) -> tuple[Any, ...]:
        owner, fence, attempt, fingerprint, label, began, mark, expires, result = values
        return (_text(owner), fence, attempt, _text(fingerprint), _text(label), began, mark, expires, result)

    @staticmethod
    def _judge(op: Claim | Begin, row: _Row, now: float) -> Completed | Busy | Doubtful | None:
        """What a claim answers where nothing has to be written; None where the record can be had."""
        owner, fence, attempt, fingerprint, _, _, mark, expires, result = row
        if result is not None and expires is not None:
            return Completed(fence, attempt, fingerprint, result) if expires > now else None
        if owner == op.owner:
            return None
        if mark > now:
            return Busy(fence, attempt, fingerprint, mark - now)
        return None if op.take_over else Doubtful(fence, attempt, fingerprint, now - mark)

    def _do_claim(self, execute: Execute, op: Claim, now: float) -> Claimed:
        # Microseconds since the epoch: larger than any number before, also where the record was purged in between.
        fence = int(now * 1e6)
        values = (op.key, op.owner, fence, op.fingerprint, op.label, now, now + op.lease, 0)
        if execute(self._insert, values).rowcount == 1:
            return Acquired(fence, 1)
        return self._held(execute, op, op.fingerprint, 0, now)

    def _held(self, execute: Execute, op: Claim | Begin, fingerprint: str, entries: int, now: float) -> Claimed:
        """Claim a key that is not new; with so many `entries` where its result's time is over."""
        row = self._row(execute, op.key)
        if row is None:
            raise StoreError(
                f"the table {self.table} is damaged: key {op.key[:255]!r} is neither there nor can be added"
            )
        answer = self._judge(op, row, now)
        if answer is not None:
            return answer
        owner, last, attempt, _, label, began, _, expires, _ = row
        if expires is None and owner == op.owner:
            execute(self._again, (now + op.lease, op.key))
            return Acquired(last, attempt)
        fence = max(int(now * 1e6), last + 1)
        if expires is not None:
            attempt, label, began, kept = 1, op.label, now, entries
        else:
            attempt, label, kept = attempt + 1, op.label or label, None
        execute(self._take, (op.owner, fence, attempt, fingerprint, label, began, now + op.lease, kept, op.key))
        return Acquired(fence, attempt)

    def _do_begin(self, execute: Execute, op: Begin, now: float) -> Claimed:
        fence = int(now * 1e6)
        values = (op.key, op.owner, fence, "", op.label, now, now + op.lease, 1)
        if execute(self._insert, values).rowcount == 1:
            execute(self._append, (op.key, 0, op.entry))
            return Acquired(fence, 1)
        reply = self._held(execute, op, "", 1, now)
        if type(reply) is Acquired and execute(self._first, (op.key, op.entry)).rowcount == 1:
            execute(self._counted, (op.key,))  # it was there without a journal
        return reply

    def _do_append(self, execute: Execute, op: Append, now: float) -> bool:
        key, owner, fence, until, label = op.key, op.owner, op.fence, now + op.lease, op.label
        if label:
            written = execute(self._next_label, (until, label, key, owner, fence, fence, op.at))
        else:
            written = execute(self._next, (until, key, owner, fence, fence, op.at))
        if written.rowcount == 1:
            execute(self._append, (key, op.at, op.entry))
            return True
        row = self._row(execute, key)
        if row is None or row[0] != owner or fence not in (0, row[1]) or row[8] is not None:
            return False
        length = execute(self._length, (key,)).fetchone()[0]
        if type(length) is not int:
            raise StoreError(f"the record of key {key[:255]!r} is damaged: entries is {_kind(length)}")
        if op.at > length:
            raise StoreError(f"the journal of key {key[:255]!r} has {length} entries: number {op.at} would leave a gap")
        if label:
            execute(self._relabel, (until, label, key, owner, fence, fence))
        else:
            execute(self._renew, (until, key, owner, fence, fence))
        return True

    def _do_history(self, execute: Execute, op: History, now: float) -> tuple[Record, tuple[bytes, ...]] | None:
        record: Record | None = None
        journal: dict[int, bytes] = {}
        for number, *values in execute(self._history, (op.key, op.key)).fetchall():
            if number == -1:
                row = _checked(op.key, self._texts(values) if self._neutral else values)
                record = _record(op.key, row, now)
            else:
                journal[number] = values[-1]
        if record is None or (record.expires_at is not None and record.expires_at <= now):
            return None
        entries = tuple(journal.get(number) for number in range(len(journal)))
        if not all(type(entry) is bytes for entry in entries):
            raise StoreError(
                f"the journal of key {op.key[:255]!r} is damaged: an entry is missing or not of type bytes"
            )
        return record, cast("tuple[bytes, ...]", entries)

    def _do_renew(self, execute: Execute, op: Renew, now: float) -> bool:
        return execute(*self._to_renew(op, now)).rowcount == 1

    def _do_finish(self, execute: Execute, op: Finish, now: float) -> bool:
        if execute(*self._to_finish(op, now)).rowcount == 1:
            return True
        row = self._row(execute, op.key)
        return row is not None and row[0] == op.owner and op.fence in (0, row[1])

    def _do_release(self, execute: Execute, op: Release, now: float) -> bool:
        return execute(*self._to_release(op, now)).rowcount == 1

    def _do_abandon(self, execute: Execute, op: Abandon, now: float) -> bool:
        return execute(*self._to_abandon(op, now)).rowcount == 1

    def _to_renew(self, op: Renew, now: float) -> tuple[str, tuple[Any, ...]]:
        return self._renew, (now + op.lease, op.key, op.owner, op.fence, op.fence)

    def _to_finish(self, op: Finish, now: float) -> tuple[str, tuple[Any, ...]]:
        return self._finish, (op.result, now, now + op.ttl, op.key, op.owner, op.fence, op.fence)

    def _to_release(self, op: Release, now: float) -> tuple[str, tuple[Any, ...]]:
        return self._release, (op.key, op.owner, op.fence, op.fence)

    def _to_abandon(self, op: Abandon, now: float) -> tuple[str, tuple[Any, ...]]:
        return self._abandon, (now, op.key, op.owner, op.fence, op.fence)

    def _do_read(self, execute: Execute, op: Read, now: float) -> Record | None:
        row = self._row(execute, op.key)
        record = None if row is None else _record(op.key, row, now)
        return None if record is None or (record.expires_at is not None and record.expires_at <= now) else record

    def _do_scan(self, execute: Execute, op: Scan, now: float) -> Page:
        statement = self._scans.get(op.state)
        if statement is None:
            return Page((), "")
        place: tuple[Any, ...] = (op.after,)
        opened = op.state in ("running", "in doubt")
        if opened:
            since, _, after = op.after.partition(" ")
            place = (float(since or "-inf"), after)
        found: list[Record] = []
        for values in execute(statement, (op.text, now, *place, op.limit + 1)).fetchall():
            if len(found) == op.limit:
                last = found[-1]
                return Page(tuple(found), f"{last.began_at!r} {last.key}" if opened else last.key)
            key, *rest = values
            if self._neutral:
                key, rest = _text(key), [*self._texts(rest)]
            if type(key) is not str:
                raise StoreError(f"the table {self.table} is damaged: a key is {_kind(key)}")
            found.append(_record(key, _checked(key, rest), now))
        return Page(tuple(found), "")

    def _do_purge(self, execute: Execute, op: Purge, now: float) -> int:
        # A lease that runs has a mark in the future.
        then, batch = now - op.older_than, op.batch
        return execute(self._purge, (then, batch, then, then, batch, batch)).rowcount

    def _do_forget(self, execute: Execute, op: Forget, now: float) -> bool:
        return execute(self._forget, (op.key, now)).rowcount == 1


def _record(key: str, row: _Row, now: float) -> Record:
    owner, fence, attempt, fingerprint, label, began, mark, expires, result = row
    return Record(
        key=key,
        state="done" if result is not None else "running" if mark > now else "in doubt",
        owner=owner,
        fence=fence,
        attempt=attempt,
        fingerprint=fingerprint,
        label=label,
        began_at=began,
        mark=mark,
        expires_at=expires,
        result=result,
    )
