"""The connections of a SQLite store: one that writes, and some that read beside it.

Promises a database in WAL mode whose tables are those of this version, made or upgraded under the write lock however
many processes come at once. Does not: decide who writes when (see `_sqlite_group.py`). Opening costs a millisecond.
Readers may be used from any thread at once; the writer by one at a time, and the caller sees to that.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from resilient.clock import SystemClock
from resilient.errors import StoreError
from resilient.stores._sqlite_sql import MIGRATIONS

if TYPE_CHECKING:
    from resilient.clock import Clock
    from resilient.stores._ops import AnyOp
    from resilient.stores._sqlite_sql import Execute, Sql

__all__ = ["TROUBLE", "File", "busy", "copy", "unsure", "wrapped"]

R = TypeVar("R")

_READERS = 8  # that are kept for the next operation; more are opened while more threads read at once
_clock = SystemClock()  # for waits, whatever clock judges leases

# Errors after which nobody knows what is on the disk.
_UNSURE = ("SQLITE_IOERR", "SQLITE_NOMEM", "SQLITE_INTERRUPT", "SQLITE_INTERNAL")

# What a store may meet in SQLite and in values that are not for it. All else is a fault in here, and shown as it is.
TROUBLE = (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError, MemoryError)


def wrapped(error: Exception, path: str, *, maybe_written: bool = False) -> Exception:
    """What the caller is told about `error`."""
    if isinstance(error, TROUBLE):
        told = StoreError(f"SQLite store {path}: {str(error) or type(error).__name__}", maybe_written=maybe_written)
        told.__cause__ = error
        return told
    return error


def copy(error: Exception) -> Exception:
    """`error`, for one more caller to raise."""
    if isinstance(error, StoreError):
        told = StoreError(*error.args, maybe_written=error.maybe_written)
        told.__cause__ = error.__cause__
        return told
    return error


def busy(error: Exception) -> bool:
    """Whether somebody else holds the lock."""
    return getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY")


def unsure(error: Exception) -> bool:
    """Whether a statement that ended with `error`, and commits by itself, may be on the disk all the same."""
    return isinstance(error, MemoryError) or getattr(error, "sqlite_errorname", "").startswith(_UNSURE)


class File:
    """A database file, opened when it is first needed."""

    def __init__(self, path: str, sql: Sql, prefix: str, full: bool, busy_timeout: float, clock: Clock) -> None:
        self.path = path
        self.sql = sql
        self.at = clock.at
        self._prefix = prefix
        self._synchronous = "FULL" if full else "NORMAL"
        self._busy_timeout = busy_timeout
        self.forget()

    def forget(self) -> object:
        """Begin anew. What was open is returned, for somebody to keep: it is neither used nor closed."""
        was = vars(self).copy()
        self.writer: sqlite3.Connection | None = None
        self.write: Execute | None = None
        # Cursors, which may be used again and again: making one costs as much as a look-up in an index.
        self._free: list[sqlite3.Cursor] = []
        self._readers: set[sqlite3.Connection] = set()
        self._opening = threading.RLock()
        return was

    def ready(self) -> Execute:
        """What executes a statement on the connection that writes."""
        write = self.write
        if write is None:
            with self._opening:
                write = self.write
                if write is None:
                    if self.writer is None:
                        self.writer = self._open_writer()
                    write = self.write = self.writer.cursor().execute
        return write

    def peek(self, op: AnyOp) -> Any:
        """The answer to an operation that need not write, else `...`. Any thread; waits for no writer."""
        if self.write is None:
            self.ready()
        free = self._free
        try:
            try:
                reader = free.pop()
            except IndexError:
                reader = self._open_reader()
            try:
                return self.sql.peek(reader.execute, op, self.at())
            finally:
                free.append(reader)
                if len(free) > _READERS:
                    self._close_reader()
        except TROUBLE as error:
            raise wrapped(error, self.path) from error

    def look(self, op: AnyOp) -> Any:
        """The same by the connection that writes, for who leads: what it reads is what a write needs next."""
        execute = self.ready()
        try:
            try:
                return self.sql.peek(execute, op, self.at())
            except sqlite3.OperationalError as error:
                if not busy(error):
                    raise
                return self._patiently(lambda: self.sql.peek(execute, op, self.at()))
        except TROUBLE as error:
            raise wrapped(error, self.path) from error

    def begin(self) -> None:
        """Begin a transaction that writes, however long others hold the lock, up to the busy timeout."""
        execute = self.ready()
        self._patiently(lambda: execute("BEGIN IMMEDIATE"))

    def _patiently(self, act: Callable[[], R]) -> R:
        execute = self.ready()
        execute(f"PRAGMA busy_timeout = {round(self._busy_timeout * 1000)}")
        try:
            return act()
        finally:
            execute("PRAGMA busy_timeout = 0")

    def roll_back(self) -> None:
        """Roll back what the writer has begun."""
        writer = self.writer
        if writer is not None and writer.in_transaction:
            try:
                writer.execute("ROLLBACK")
            except sqlite3.Error:
                self.writer = self.write = None
                writer.close()  # which rolls back

    def close(self) -> None:
        """Close what is open, except readers that are in use just now. Nobody may be writing."""
        with self._opening:
            writer, self.writer, self.write = self.writer, None, None
            while self._free:
                self._close_reader()
            if writer is not None:
                writer.close()

    def freeze(self, until: float) -> None:
        """Close everything, and let nobody open anything before `thaw`. Who still reads at `until` is left alone."""
        self._opening.acquire()
        self.close()
        while self._readers and _clock.now() < until:
            _clock.sleep(0.0005)
            self.close()

    def thaw(self) -> None:
        """Whoever wants to may open again."""
        self._opening.release()

    def _close_reader(self) -> None:
        try:
            connection = self._free.pop().connection
        except IndexError:
            return  # somebody was faster
        connection.close()
        self._readers.discard(connection)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self.path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False, cached_statements=64
        )

    def _open_reader(self) -> sqlite3.Cursor:
        with self._opening:
            reader = self._connect()
            try:
                # What the schema of a file says is not to be trusted with functions.
                reader.execute("PRAGMA trusted_schema = OFF")
                reader.execute("PRAGMA query_only = ON")
            except BaseException:
                reader.close()
                raise
            self._readers.add(reader)
            return reader.cursor()

    def _open_writer(self) -> sqlite3.Connection:
        try:
            writer = self._connect()
        except TROUBLE as error:
            directory = os.path.dirname(self.path) or "."
            if not os.path.isdir(directory):
                raise StoreError(f"SQLite store {self.path}: there is no directory {directory}") from error
            raise wrapped(error, self.path) from error
        try:
            writer.execute("PRAGMA trusted_schema = OFF")
            self._wal(writer)
            writer.execute(f"PRAGMA synchronous = {self._synchronous}")
            self._migrate(writer)
            writer.execute("PRAGMA busy_timeout = 0")
        except BaseException as error:
            writer.close()
            if isinstance(error, TROUBLE):
                raise wrapped(error, self.path) from error
            raise
        return writer

    def _wal(self, writer: sqlite3.Connection) -> None:
        until = _clock.now() + self._busy_timeout
        while True:
            try:
                mode = writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            except sqlite3.OperationalError as error:
                # Others of us do the same at this moment: SQLite does not always wait for its turn here.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or _clock.now() >= until:
                    raise
                _clock.sleep(0.005)
                continue
            if mode != "wal":
                raise StoreError(f"SQLite store {self.path}: write-ahead logging is not possible here ({mode})")
            return

    def _migrate(self, writer: sqlite3.Connection) -> None:
        if self._version(writer) == len(MIGRATIONS):
            return
        meta = f"{self._prefix}schema"
        writer.execute("BEGIN IMMEDIATE")
        try:
            found = self._version(writer)  # once more: another process may have been here first
            if found == 0:
                writer.execute(f"CREATE TABLE {meta} (version INTEGER NOT NULL)")
                writer.execute(f"INSERT INTO {meta} (version) VALUES (0)")
            for statements in MIGRATIONS[found:]:
                for statement in statements:
                    writer.execute(statement.format(p=self._prefix))
            writer.execute(f"UPDATE {meta} SET version = ?", (len(MIGRATIONS),))
            writer.execute("COMMIT")
        finally:
            if writer.in_transaction:
                writer.execute("ROLLBACK")

    def _version(self, writer: sqlite3.Connection) -> int:
        meta = f"{self._prefix}schema"
        # Compared without regard to case, as SQLite does with names.
        there = writer.execute("SELECT 1 FROM sqlite_master WHERE name = ? COLLATE NOCASE", (meta,)).fetchone()
        if there is None:
            return 0
        rows = writer.execute(f"SELECT version FROM {meta} LIMIT 2").fetchall()
        if len(rows) != 1 or type(rows[0][0]) is not int or rows[0][0] < 1:
            raise StoreError(f"SQLite store {self.path}: the table {meta} is damaged, or not one of resilient's")
        version: int = rows[0][0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"SQLite store {self.path}: its tables are of version {version}, made by a newer resilient than this "
                f"one, which knows {len(MIGRATIONS)}"
            )
        return version
