"""A store in PostgreSQL, for threads and asyncio, on psycopg 3.

Promises all that a store promises, between any number of processes and machines, by the server's clock; that every
operation is one round trip; and that a lost connection is mended where that can be done, else told. Keeps its own
tables, which it creates and upgrades under a lock. Does not: survive a failover to a standby that lacks the last
commits. Costs little over the bare statements. Safe from any thread and asyncio loop, and after a fork.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Callable, Generator
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import unquote
from zlib import crc32

from resilient.clock import SystemClock, in_trio
from resilient.errors import StoreError
from resilient.policy import seconds, whole
from resilient.stores._ops import AnyOp, Op, Read
from resilient.stores._pg_rows import AGAIN
from resilient.stores._pg_sql import MIGRATIONS, Statement, statements

try:
    import psycopg
except ImportError as exc:
    raise ImportError("PostgresStore needs psycopg 3: pip install 'resilient-kit[postgres]'") from exc

from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import UndefinedColumn, UndefinedTable
from psycopg.rows import tuple_row

from resilient.stores._pg_bell import Ear
from resilient.stores._pg_pool import AsyncBorrowedLane, AsyncLane, BorrowedLane, SyncLane, TooBusy, listener

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

    from resilient.stores._watch import Watch

__all__ = ["PostgresStore"]

R = TypeVar("R")

_now = SystemClock.now
_ROUNDS = 100

_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "prefix": ("prefix", str),
    "pool_size": ("pool_size", int),
    "pool_max": ("pool_size", int),
    "timeout": ("timeout", float),
}

_REPEAT = frozenset({"40001", "40P01"})
"""Serialization failure, deadlock: rolled back, through nobody's fault."""

_GONE = ("08", "57P")
"""Connection exceptions, shutdown and crash: what was sent may have been carried out, or not."""


class PostgresStore:
    """Records in the tables `<prefix>records`, `…entries` and `…version` of a PostgreSQL database (12 or newer).

    `database` is a conninfo string or URL, of which the store keeps up to `pool_size` connections for threads and as
    many for each event loop; or a pool of your own: a `psycopg_pool.ConnectionPool` serves threads only, an
    `AsyncConnectionPool` tasks only. `timeout` is for one operation, with the wait for a connection, in seconds.

    The tables are in the first schema of the connection's `search_path`. `close` ends all connections; whoever uses
    the store after it opens new ones.
    """

    poll = 2.0
    """How long one who waits for a key sleeps at most, in seconds, before asking again: a ring may get lost."""

    def __new__(
        cls,
        database: str | ConnectionPool[Any] | AsyncConnectionPool[Any],
        *,
        prefix: str = "resilient_",
        pool_size: int = 10,
        timeout: float = 5.0,
    ) -> PostgresStore:
        # A store on the user's pool has not the methods that the pool cannot serve.
        getconn = getattr(database, "getconn", None)
        if getconn is not None:
            cls = _TasksOnly if iscoroutinefunction(getconn) else _ThreadsOnly
        return object.__new__(cls)

    def __init__(
        self,
        database: str | ConnectionPool[Any] | AsyncConnectionPool[Any],
        *,
        prefix: str = "resilient_",
        pool_size: int = 10,
        timeout: float = 5.0,
    ) -> None:
        if not isinstance(prefix, str) or not re.fullmatch("[a-z_][a-z0-9_]{0,30}", prefix):
            raise ValueError(f"prefix must be up to 31 of a-z, 0-9 and _, and not begin with a digit, not {prefix!r}")
        self.prefix, self.timeout = prefix, seconds("timeout", timeout)
        self._size = whole("pool_size", pool_size)
        if isinstance(database, str):
            database = _checked("database must be a conninfo string or URL", database)
        elif not hasattr(database, "getconn"):
            raise TypeError(f"database must be a conninfo string or a pool of psycopg_pool, not {database!r}")
        self._database: Any = database
        self._statements = statements(prefix)
        self._forget_all()
        _STORES.add(self)

    @classmethod
    def from_url(cls, url: str) -> PostgresStore:
        """`postgresql://user@host/database?prefix=pay_&pool_size=20&timeout=3`; the rest of the query is libpq's."""
        base, _, query = url.partition("?")
        options: dict[str, Any] = {}
        rest: list[str] = []
        for part in query.split("&") if query else ():
            name, _, value = part.partition("=")
            if name not in _OPTIONS:
                rest.append(part)
                continue
            try:
                options[_OPTIONS[name][0]] = _OPTIONS[name][1](unquote(value))
            except ValueError:
                raise ValueError(f"url: {name} must be a number, not {value!r}") from None
        return cls(_checked("url", "?".join([base, "&".join(rest)]) if rest else base), **options)

    def _forget_all(self) -> None:
        """Begin without connections: at first, and in the child of a fork, which must not touch its parent's."""
        self._lock = threading.Lock()
        self._ready = False
        self._threads: SyncLane | None = None
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncLane] = weakref.WeakKeyDictionary()
        self._ear = Ear(listener(self._database, self.timeout), f"{self.prefix}wake")

    # -- operations --------------------------------------------------------------------------------------------------

    def execute(self, op: Op[R], /) -> R:
        """Carry out `op`, in this thread."""
        statement, lane = self._statements[type(op)], self._lane()
        until, lost = _now() + self.timeout, False
        for _ in range(_ROUNDS):
            try:
                connection: Any = lane.take(until)
            except (psycopg.Error, TooBusy) as exc:
                raise _unreachable(exc, lost and statement.writes) from exc
            try:
                try:
                    if not self._ready:
                        self._prepare(connection)
                    cursor = lane.cursor(connection, statement.sql)
                    cursor.execute(statement.sql, statement.values(op), prepare=lane.prepare, binary=True)
                    answer = statement.decode(cast(Any, cursor.pgresult), op, lane.coding(connection))
                    lane.settle(connection)
                finally:
                    lane.give(connection)
            except (psycopg.Error, UnicodeError) as exc:
                lost = self._judge(exc, statement, lost)
                if lost:
                    lane.drop()
            else:
                if answer is not AGAIN:
                    return cast(R, _after(answer, op) if lost and statement.blind else answer)
                statement = statement.then
        raise _undecided(op, statement.writes)

    async def aexecute(self, op: Op[R], /) -> R:
        """Carry out `op`, in this task of an asyncio loop."""
        statement, lane = self._statements[type(op)], self._alane()
        until, lost = _now() + self.timeout, False
        for _ in range(_ROUNDS):
            try:
                connection: Any = await lane.take(until)
            except (psycopg.Error, TooBusy) as exc:
                raise _unreachable(exc, lost and statement.writes) from exc
            try:
                try:
                    if not self._ready:
                        await self._aprepare(connection)
                    cursor = lane.cursor(connection, statement.sql)
                    await cursor.execute(statement.sql, statement.values(op), prepare=lane.prepare, binary=True)
                    answer = statement.decode(cast(Any, cursor.pgresult), op, lane.coding(connection))
                    await lane.settle(connection)
                finally:
                    await lane.give(connection)
            except (psycopg.Error, UnicodeError) as exc:
                lost = self._judge(exc, statement, lost)
                if lost:
                    await lane.drop()
            else:
                if answer is not AGAIN:
                    return cast(R, _after(answer, op) if lost and statement.blind else answer)
                statement = statement.then
        raise _undecided(op, statement.writes)

    def on(self, connection: psycopg.Connection[Any], op: Op[R], /) -> R:
        """Carry out `op` on this connection, in the transaction that is open there or begins by this.

        Nothing is committed or rolled back. psycopg's errors come out as they are, but for a missing table.
        `RuntimeError` in pipeline mode.
        """
        _piped(connection)
        statement, cursor = self._statements[type(op)], psycopg.Cursor(connection, row_factory=tuple_row)
        for _ in range(_ROUNDS):
            try:
                cursor.execute(statement.sql, statement.values(op), binary=True)
            except (UndefinedTable, UndefinedColumn) as exc:
                raise self._missing(exc) from exc
            answer = statement.decode(cast(Any, cursor.pgresult), op, connection.info.encoding)
            if answer is not AGAIN:
                return cast(R, answer)
            statement = statement.then
        raise _undecided(op, statement.writes)

    async def aon(self, connection: psycopg.AsyncConnection[Any], op: Op[R], /) -> R:
        """Carry out `op` on this connection, in the transaction that is open there or begins by this; see `on`."""
        _piped(connection)
        statement, cursor = self._statements[type(op)], psycopg.AsyncCursor(connection, row_factory=tuple_row)
        for _ in range(_ROUNDS):
            try:
                await cursor.execute(statement.sql, statement.values(op), binary=True)
            except (UndefinedTable, UndefinedColumn) as exc:
                raise self._missing(exc) from exc
            answer = statement.decode(cast(Any, cursor.pgresult), op, connection.info.encoding)
            if answer is not AGAIN:
                return cast(R, answer)
            statement = statement.then
        raise _undecided(op, statement.writes)

    def prepare(self) -> None:
        """Make sure that the tables exist, on a connection of the store's own. Once it is known, this costs nothing."""
        if not self._ready:
            self.execute(Read(""))

    async def aprepare(self) -> None:
        """Make sure that the tables exist, on a connection of the store's own. Once it is known, this costs nothing."""
        if not self._ready:
            await self.aexecute(Read(""))

    def watch(self, key: str, *, task: bool) -> Watch:
        """Watch `key` from now on. The first watch starts a thread that listens."""
        self._ear.start()
        return self._ear.bells.watch(key, task=task)

    def close(self) -> None:
        """End the connections, as soon as nobody uses them, and the listening thread. Pools of the user stay open."""
        with self._lock:
            lanes: list[SyncLane | AsyncLane] = list(self._loops.values())
            if self._threads is not None:
                lanes.append(self._threads)
            self._threads = None
            self._loops.clear()
        for lane in lanes:
            lane.close()
        self._ear.stop()

    def __repr__(self) -> str:
        if not isinstance(self._database, str):
            return f"PostgresStore({self._database!r}, prefix={self.prefix!r})"
        known = conninfo_to_dict(self._database)
        where = " ".join(f"{name}={known[name]}" for name in ("host", "port", "dbname") if known.get(name))
        return f"PostgresStore({where!r}, prefix={self.prefix!r})"

    # -- connections -------------------------------------------------------------------------------------------------

    def _lane(self) -> SyncLane | BorrowedLane:
        lane = self._threads
        if lane is None:
            with self._lock:
                lane = self._threads
                if lane is None:
                    lane = self._threads = SyncLane(self._database, self._size, self.timeout)
        return lane

    def _alane(self) -> AsyncLane | AsyncBorrowedLane:
        if in_trio():
            raise TypeError("PostgresStore has no coroutines for trio: use resilient.stores.Threaded(store) there")
        loop = asyncio.get_running_loop()
        lane = self._loops.get(loop)
        if lane is None:
            with self._lock:
                for other, old in list(self._loops.items()):
                    if other.is_closed():
                        del self._loops[other]
                        old.close()
                lane = self._loops[loop] = AsyncLane(self._database, self._size, self.timeout)
            weakref.finalize(loop, lane.close).atexit = False
        return lane

    # -- tables ------------------------------------------------------------------------------------------------------

    def _prepare(self, connection: psycopg.Connection[Any]) -> None:
        if self._run(connection, self._look()) < len(MIGRATIONS):
            self._run(connection, self._upgrade())
        self._ready = True

    def _run(self, connection: psycopg.Connection[Any], steps: Generator[bytes, Any, int]) -> int:
        cursor, row = psycopg.Cursor(connection, row_factory=tuple_row), None
        with connection.transaction():
            while True:
                try:
                    query = steps.send(row)
                except StopIteration as end:
                    return cast(int, end.value)
                cursor.execute(query)
                row = cursor.fetchone() if cursor.description else None

    async def _aprepare(self, connection: psycopg.AsyncConnection[Any]) -> None:
        if await self._arun(connection, self._look()) < len(MIGRATIONS):
            await self._arun(connection, self._upgrade())
        self._ready = True

    async def _arun(self, connection: psycopg.AsyncConnection[Any], steps: Generator[bytes, Any, int]) -> int:
        cursor, row = psycopg.AsyncCursor(connection, row_factory=tuple_row), None
        async with connection.transaction():
            while True:
                try:
                    query = steps.send(row)
                except StopIteration as end:
                    return cast(int, end.value)
                await cursor.execute(query)
                row = await cursor.fetchone() if cursor.description else None

    def _look(self) -> Generator[bytes, Any, int]:
        """The version of the tables, 0 if there are none; as queries, which whoever runs this sends."""
        table = f"{self.prefix}version"
        # From the catalogue itself: `to_regclass` may answer out of a cache that is older than the lock.
        (there,) = yield (
            f"SELECT EXISTS (SELECT FROM pg_class WHERE relname = '{table}' AND pg_table_is_visible(oid))".encode()
        )
        if not there:
            return 0
        (version,) = yield f"SELECT max(version) FROM {table}".encode()
        if not isinstance(version, int) or version < 1:
            raise StoreError(f"the table {table} is damaged: it says version {version!r}")
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the tables {self.prefix}… are of version {version}, made by a newer release; this one knows versions "
                f"up to {len(MIGRATIONS)}"
            )
        return version

    def _upgrade(self) -> Generator[bytes, Any, int]:
        table, number = (
            f"{self.prefix}version",
            0x7265736C << 32 | crc32(self.prefix.encode()),
        )  # "resl", and the prefix
        yield b"SET TRANSACTION ISOLATION LEVEL READ COMMITTED"  # so that what comes after the lock is seen
        yield b"SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0"
        yield f"SELECT pg_advisory_xact_lock({number})".encode()
        version = yield from self._look()
        for number, script in enumerate(MIGRATIONS, 1):
            if number > version:
                yield script.replace("{prefix}", self.prefix).encode()
        if not version:
            yield f"CREATE TABLE {table} (version int4 NOT NULL)".encode()
        yield f"DELETE FROM {table}; INSERT INTO {table} VALUES ({len(MIGRATIONS)})".encode()
        return len(MIGRATIONS)

    # -- what went wrong ---------------------------------------------------------------------------------------------

    def _missing(self, exc: psycopg.Error) -> StoreError:
        self._ready = False
        return StoreError(
            f"the tables {self.prefix}… are missing in the database of this connection, or not on its search_path, or "
            f"older than this release: "
            f"{_text(exc)}"
        )

    def _judge(self, exc: psycopg.Error | UnicodeError, statement: Statement, lost: bool) -> bool:
        """Whether the connection was lost, now or before, and the operation may be sent again; else `StoreError`."""
        maybe = lost and statement.writes
        if not isinstance(exc, psycopg.Error):
            raise StoreError(f"PostgreSQL cannot keep this text: {exc}", maybe_written=maybe) from exc
        state = exc.sqlstate
        if state in _REPEAT:
            return lost
        if isinstance(exc, UndefinedTable | UndefinedColumn):
            raise self._missing(exc) from exc
        if isinstance(exc, psycopg.OperationalError | psycopg.InterfaceError) and (
            state is None or state.startswith(_GONE)
        ):
            if lost:
                raise StoreError(f"PostgreSQL: the connection was lost: {_text(exc)}", maybe_written=maybe) from exc
            return True
        raise StoreError(f"PostgreSQL: {_text(exc)}", maybe_written=maybe) from exc


class _Absent:
    """A method that one has not."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __get__(self, instance: object, owner: object) -> Any:
        raise AttributeError(self.why)


class _ThreadsOnly(PostgresStore):
    aexecute: Any = _Absent("aexecute: a ConnectionPool serves threads only")
    aon: Any = _Absent("aon: a ConnectionPool serves threads only")
    aprepare: Any = _Absent("aprepare: a ConnectionPool serves threads only")

    def _lane(self) -> BorrowedLane:
        return BorrowedLane(self._database)


class _TasksOnly(PostgresStore):
    execute: Any = _Absent("execute: an AsyncConnectionPool serves tasks only")
    on: Any = _Absent("on: an AsyncConnectionPool serves tasks only")
    prepare: Any = _Absent("prepare: an AsyncConnectionPool serves tasks only")

    def _alane(self) -> AsyncBorrowedLane:
        return AsyncBorrowedLane(self._database)


def _checked(what: str, database: str) -> str:
    """A conninfo string or URL as libpq reads it, to which schemes in capital letters are none."""
    scheme, colon, rest = database.partition("://")
    if scheme.lower() in ("postgres", "postgresql"):
        database = f"{scheme.lower()}{colon}{rest}"
    try:
        conninfo_to_dict(database)
    except psycopg.ProgrammingError as exc:
        raise ValueError(f"{what}: {str(exc).strip()}") from None
    return database


def _piped(connection: Any) -> None:
    """Raise for a connection on which answers come later."""
    if connection.pgconn.pipeline_status:
        raise RuntimeError(
            "the connection is in pipeline mode, in which no answer comes before the next sync, and a claim is an "
            "answer: leave the `with connection.pipeline()` block first, or begin one inside of this block"
        )


def _text(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def _unreachable(exc: Exception, maybe: bool) -> StoreError:
    if isinstance(exc, TooBusy):
        return StoreError("PostgreSQL: all connections are in use, and were all the time", maybe_written=maybe)
    return StoreError(f"PostgreSQL cannot be reached: {_text(exc)}", maybe_written=maybe)


def _undecided(op: AnyOp, maybe: bool) -> StoreError:
    return StoreError(
        f"PostgreSQL gave no answer to {type(op).__name__} that stands, {_ROUNDS} times", maybe_written=maybe
    )


def _after(answer: object, op: AnyOp) -> object:
    """The answer to an operation that was sent twice: whether a missing record was missing before, nobody knows."""
    if answer is True or answer == getattr(op, "batch", None):
        return answer
    raise StoreError(
        "PostgreSQL: the connection was lost; sent again, the operation found nothing to do, or its own work",
        maybe_written=True,
    )


_STORES: weakref.WeakSet[PostgresStore] = weakref.WeakSet()


def _forked() -> None:
    for store in list(_STORES):
        store._forget_all()


os.register_at_fork(after_in_child=_forked)
