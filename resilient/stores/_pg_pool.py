"""Connections to PostgreSQL that are kept open, a lane for threads and one for each event loop.

Promises that no wait is longer than asked for, that a connection is never used by two, and that one which the server
closed while it was idle is found out before anything is sent. Connects when a connection is needed, and never in the
background. A connection costs the server some megabytes; taking one costs two microseconds.
A lane is safe from any thread or, that of a loop, from any of its tasks; nothing is carried over a fork.
"""

from __future__ import annotations

import select
from collections.abc import Generator
from math import ceil
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psycopg
import psycopg.conninfo
from psycopg.rows import tuple_row

from resilient._park import Park
from resilient.clock import SystemClock
from resilient.stores._pg_ask import AsyncAsked, SyncAsked

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg_pool import AsyncConnectionPool, ConnectionPool

__all__ = ["AsyncBorrowedLane", "AsyncLane", "BorrowedLane", "SyncLane", "TooBusy", "listener"]

C = TypeVar("C", bound="_Ours")
R = TypeVar("R")

_CLOCK = SystemClock()
_now = _CLOCK.now
_IDLE = psycopg.pq.TransactionStatus.IDLE
_CROWD = 1_000_000  # who may wait for a connection: all


class TooBusy(Exception):
    """All connections are in use, and were for as long as the caller would wait."""


def _bounded(steps: Generator[Any, Any, R], until: float) -> Generator[Any, Any, R]:
    """The same steps, until it is too late: a server that says nothing at all must not hold anybody for ever."""
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if not ready and _now() >= until:
                raise psycopg.OperationalError("no answer in time")
            wanted = steps.send(ready)
    except StopIteration as end:
        value: R = end.value
        return value


class _Ours:
    """What our connections have beside psycopg's: an end of waiting, and what is kept for each statement."""

    pgconn: Any
    until: float = float("inf")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: dict[bytes, Any] = {}
        self._farewell = select.poll()
        self._farewell.register(self.pgconn.socket, select.POLLIN)

    def __del__(self, *_: Any) -> None:
        """Nothing: psycopg would warn of those whose loop, or whose process before a fork, has ended."""

    def end(self) -> None:
        """Close it now, in whatever state it is; works outside of the loop too."""
        self.pgconn.finish()
        self.asked.clear()

    def usable(self) -> bool:
        """Whether the server is silent: all that it says to an idle session of ours is farewell."""
        return not self._farewell.poll(0)


class SyncConnection(_Ours, psycopg.Connection[Any]):
    """A connection whose waits end."""

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's, until `until`."""
        return super().wait(_bounded(gen, self.until), *args, **kwargs)


class AsyncConnection(_Ours, psycopg.AsyncConnection[Any]):
    """A connection whose waits end."""

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's, until `until`."""
        return await super().wait(_bounded(gen, self.until), *args, **kwargs)


class _Lane(Park, Generic[C]):
    """At most `limit` connections, of which those in `idle` wait for work. The last used is used first."""

    prepare = True

    __slots__ = ("__weakref__", "_closed", "_conninfo", "_options", "_setup", "idle")

    def __init__(self, conninfo: str, limit: int, timeout: float) -> None:
        super().__init__(limit)
        self.idle: list[C] = []
        self._closed = False
        self._conninfo = conninfo
        self._options: dict[str, Any] = {"autocommit": True, "row_factory": tuple_row, **_defaults(conninfo, timeout)}
        # A statement that its caller has given up must not go on for ever; and the plan of ours is the same each time.
        self._setup = (
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED;"
            f"SET plan_cache_mode = force_generic_plan; SET statement_timeout = {int(timeout * 1000)};"
            f"SET lock_timeout = {int(timeout * 800)}"
        ).encode()

    def coding(self, connection: C) -> str:
        """How text comes from the server: our connections ask for UTF-8."""
        return "utf-8"

    def _grab(self) -> bool:
        """Take a slot that is free, if nobody waits."""
        if self._waiters or not self._tokens:
            return False
        try:
            del self._tokens[-1]
        except IndexError:
            return False
        return True

    def _free(self) -> None:
        self._tokens.append(None)
        self._wake()

    def _reuse(self) -> C | None:
        while True:
            try:
                connection = self.idle.pop()
            except IndexError:
                return None
            if connection.usable():
                return connection
            connection.end()

    def _give(self, connection: C) -> None:
        try:
            if connection.pgconn.transaction_status == _IDLE and not self._closed:
                self.idle.append(connection)
            else:
                connection.end()
        finally:
            self._free()

    def _close_idle(self) -> None:
        while True:
            try:
                connection = self.idle.pop()
            except IndexError:
                return
            connection.end()

    def close(self) -> None:
        """Close those that are idle, and the others when they are given back."""
        self._closed = True
        self._close_idle()


class SyncLane(_Lane[SyncConnection]):
    """Connections for threads."""

    def take(self, until: float) -> SyncConnection:
        """Wait for a connection of the caller's own, or raise `TooBusy`, or psycopg's error if there is no server."""
        if not self._grab() and not self._acquire(_CROWD, _CLOCK, max(0.0, until - _now())):
            raise TooBusy
        connection = None
        try:
            connection = self._reuse()
            if connection is None:
                connection = SyncConnection.connect(self._conninfo, **self._options)
                connection.until = until
                connection.execute(self._setup)
            connection.until = until
        except BaseException:
            if connection is not None:
                connection.end()
            self._free()
            raise
        return connection

    def cursor(self, connection: SyncConnection, sql: bytes) -> SyncAsked:
        """What this connection keeps for this statement."""
        asked: SyncAsked | None = connection.asked.get(sql)
        if asked is None:
            asked = connection.asked[sql] = SyncAsked(connection.pgconn, sql, len(connection.asked), connection.wait)
        return asked

    def settle(self, connection: SyncConnection) -> None:
        """Nothing: the statement was a transaction of its own."""

    def give(self, connection: SyncConnection) -> None:
        """Give a connection back, in whatever state it is."""
        self._give(connection)

    def drop(self) -> None:
        """Close those that are idle: one was found dead."""
        self._close_idle()


class AsyncLane(_Lane[AsyncConnection]):
    """Connections for the tasks of one event loop."""

    async def take(self, until: float) -> AsyncConnection:
        """Wait for a connection of the caller's own, or raise `TooBusy`, or psycopg's error if there is no server."""
        if not self._grab() and not await self._aacquire(_CROWD, _CLOCK, max(0.0, until - _now())):
            raise TooBusy
        connection = None
        try:
            connection = self._reuse()
            if connection is None:
                connection = await AsyncConnection.connect(self._conninfo, **self._options)
                connection.until = until
                await connection.execute(self._setup)
            connection.until = until
        except BaseException:
            if connection is not None:
                connection.end()
            self._free()
            raise
        return connection

    def cursor(self, connection: AsyncConnection, sql: bytes) -> AsyncAsked:
        """What this connection keeps for this statement."""
        asked: AsyncAsked | None = connection.asked.get(sql)
        if asked is None:
            asked = connection.asked[sql] = AsyncAsked(connection.pgconn, sql, len(connection.asked), connection.wait)
        return asked

    async def settle(self, connection: AsyncConnection) -> None:
        """Nothing: the statement was a transaction of its own."""

    async def give(self, connection: AsyncConnection) -> None:
        """Give a connection back, in whatever state it is."""
        self._give(connection)

    async def drop(self) -> None:
        """Close those that are idle: one was found dead."""
        self._close_idle()


def _defaults(conninfo: str, timeout: float) -> dict[str, Any]:
    """What libpq should do where the user says nothing: notice a peer that is gone."""
    said = psycopg.conninfo.conninfo_to_dict(conninfo)
    ours = {
        "application_name": "resilient",
        "connect_timeout": max(1, ceil(timeout)),
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
    }
    return {name: value for name, value in ours.items() if name not in said} | {"client_encoding": "UTF8"}


class BorrowedLane:
    """The user's `ConnectionPool`, with connections of any kind."""

    prepare = None

    def __init__(self, pool: ConnectionPool[Any]) -> None:
        self._pool = pool

    def take(self, until: float) -> psycopg.Connection[Any]:
        """A connection of the pool, or psycopg's error."""
        connection: psycopg.Connection[Any] = self._pool.getconn(timeout=max(0.001, until - _now()))
        return connection

    def cursor(self, connection: psycopg.Connection[Any], sql: bytes) -> psycopg.Cursor[Any]:
        """A plain cursor, whatever the connection would make."""
        return psycopg.Cursor(connection, row_factory=tuple_row)

    def coding(self, connection: psycopg.Connection[Any]) -> str:
        """How text comes from the server, as the user has set it."""
        return connection.info.encoding

    def settle(self, connection: psycopg.Connection[Any]) -> None:
        """Commit, where the connection does not do that by itself."""
        connection.commit()

    def give(self, connection: psycopg.Connection[Any]) -> None:
        """Give it back; the pool looks at its state, and rolls back what was not committed."""
        self._pool.putconn(connection)

    def drop(self) -> None:
        """Let the pool find out which connections are lost."""
        self._pool.check()


class AsyncBorrowedLane:
    """The user's `AsyncConnectionPool`, with connections of any kind."""

    prepare = None

    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        self._pool = pool

    async def take(self, until: float) -> psycopg.AsyncConnection[Any]:
        """A connection of the pool, or psycopg's error."""
        connection: psycopg.AsyncConnection[Any] = await self._pool.getconn(timeout=max(0.001, until - _now()))
        return connection

    def cursor(self, connection: psycopg.AsyncConnection[Any], sql: bytes) -> psycopg.AsyncCursor[Any]:
        """A plain cursor, whatever the connection would make."""
        return psycopg.AsyncCursor(connection, row_factory=tuple_row)

    def coding(self, connection: psycopg.AsyncConnection[Any]) -> str:
        """How text comes from the server, as the user has set it."""
        return connection.info.encoding

    async def settle(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Commit, where the connection does not do that by itself."""
        await connection.commit()

    async def give(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Give it back; the pool looks at its state, and rolls back what was not committed."""
        await self._pool.putconn(connection)

    async def drop(self) -> None:
        """Let the pool find out which connections are lost."""
        await self._pool.check()


def listener(database: Any, timeout: float) -> Callable[[], psycopg.Connection[Any]] | None:
    """What makes a connection for listening; None where the user's pool does not say how."""
    conninfo: Any = database if isinstance(database, str) else database.conninfo
    kwargs: Any = {} if isinstance(database, str) else database.kwargs or {}
    if callable(conninfo) or callable(kwargs):
        return None
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    said: dict[str, Any] = {name: kwargs[name] for name in known.intersection(kwargs)}
    conninfo = psycopg.conninfo.make_conninfo(conninfo, **said)
    settings = _defaults(conninfo, timeout)

    def connect() -> psycopg.Connection[Any]:
        return psycopg.Connection.connect(conninfo, autocommit=True, **settings)

    return connect
