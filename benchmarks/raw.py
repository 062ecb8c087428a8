"""What a careful person writes with the bare driver: claim a key by one statement, store its result by another.

Each class speaks to one backend and has `first(key)`, the two round trips, `replay(key)`, the one that finds the
result, `claim(key)`, the first of the two alone, and `saga(key, written)`, the commits of a journal: its beginning, an
entry for each further step, its end. Async twins begin with an `a`. Tables have the columns and indexes that ours have,
durability is the same, connections are pooled as their makers advise.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

RESULT = json.dumps({"v": 1, "ok": "receipt"}).encode()
LABEL = json.dumps({"function": "benchmarks.durable:charge", "scope": "", "key": "order-1234567"})
PRINT = "d41d8cd98f00b204e9800998ecf8427e"
OWNER = "0123456789abcdef0123456789abcdef.1"

_COLUMNS = "key, owner, fence, attempt, fingerprint, label, began, mark"
LEASE, MONTH = 30.0, 30 * 86_400.0


class Written(NamedTuple):
    """What one saga writes."""

    label: str
    entries: tuple[bytes, ...]
    result: bytes


class RawSQLite:
    """sqlite3 with a connection for each thread; aiosqlite with one."""

    def __init__(self, path: str, durability: str) -> None:
        self._path, self._durability = path, durability
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._async: Any = None
        self._thread = ThreadPoolExecutor(1)
        mine = self._connection()
        mine.execute(
            "CREATE TABLE records (key TEXT NOT NULL, owner TEXT NOT NULL, fence INTEGER NOT NULL, attempt INTEGER NOT"
            " NULL, fingerprint TEXT NOT NULL, label TEXT NOT NULL, began REAL NOT NULL, mark REAL NOT NULL, expires"
            " REAL, result BLOB, entries INTEGER NOT NULL DEFAULT 0)"
        )
        mine.execute("CREATE UNIQUE INDEX records_key ON records (key)")
        mine.execute("CREATE INDEX records_open ON records (began) WHERE result IS NULL")
        mine.execute("CREATE INDEX records_ended ON records (mark) WHERE result IS NOT NULL")
        mine.execute(
            "CREATE TABLE entries (key TEXT NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,"
            " PRIMARY KEY (key, number)) WITHOUT ROWID"
        )

    _CLAIM = f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, 1, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
    _FINISH = "UPDATE records SET result = ?, mark = ?, expires = ? WHERE key = ? AND owner = ?"
    _FIND = "SELECT result FROM records WHERE key = ?"
    _BEGIN = f"INSERT INTO records ({_COLUMNS}, entries) VALUES (?, ?, ?, 1, '', ?, ?, ?, 1) ON CONFLICT DO NOTHING"
    _NEXT = (
        "UPDATE records SET mark = ?, entries = entries + 1"
        " WHERE key = ? AND owner = ? AND fence = ? AND result IS NULL AND entries = ?"
    )
    _ENTRY = "INSERT INTO entries (key, number, data) VALUES (?, ?, ?)"

    def _settings(self) -> tuple[str, str]:
        return "PRAGMA journal_mode=WAL", f"PRAGMA synchronous={self._durability}"

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._path, isolation_level=None, timeout=60, check_same_thread=False)
            for setting in self._settings():
                connection.execute(setting)
            self._local.connection = connection
            self._all.append(connection)
        return connection

    def claim(self, key: str) -> None:
        now = time.time()
        self._connection().execute(self._CLAIM, (key, OWNER, int(now * 1e6), PRINT, LABEL, now, now + 30))

    def first(self, key: str) -> None:
        connection, now = self._connection(), time.time()
        connection.execute(self._CLAIM, (key, OWNER, int(now * 1e6), PRINT, LABEL, now, now + 30))
        now = time.time()
        connection.execute(self._FINISH, (RESULT, now, now + 86400, key, OWNER))

    def replay(self, key: str) -> None:
        self._connection().execute(self._FIND, (key,)).fetchone()

    def saga(self, key: str, written: Written) -> None:
        execute, now = self._connection().execute, time.time()
        fence = int(now * 1e6)
        execute("BEGIN IMMEDIATE")
        execute(self._BEGIN, (key, OWNER, fence, written.label, now, now + LEASE))
        execute(self._ENTRY, (key, 0, written.entries[0]))
        execute("COMMIT")
        for at in range(1, len(written.entries)):
            execute("BEGIN IMMEDIATE")
            execute(self._NEXT, (time.time() + LEASE, key, OWNER, fence, at))
            execute(self._ENTRY, (key, at, written.entries[at]))
            execute("COMMIT")
        now = time.time()
        execute(self._FINISH, (written.result, now, now + MONTH, key, OWNER))

    async def asaga(self, key: str, written: Written) -> None:
        # One trip to a thread for each commit: by aiosqlite it would be one for each statement.
        run, thread, now = asyncio.get_running_loop().run_in_executor, self._thread, time.time()
        fence = int(now * 1e6)

        def entry(at: int, statement: str, row: tuple[Any, ...]) -> None:
            execute = self._connection().execute
            execute("BEGIN IMMEDIATE")
            execute(statement, row)
            execute(self._ENTRY, (key, at, written.entries[at]))
            execute("COMMIT")

        def finish() -> None:
            now = time.time()
            self._connection().execute(self._FINISH, (written.result, now, now + MONTH, key, OWNER))

        await run(thread, entry, 0, self._BEGIN, (key, OWNER, fence, written.label, now, now + LEASE))
        for at in range(1, len(written.entries)):
            await run(thread, entry, at, self._NEXT, (time.time() + LEASE, key, OWNER, fence, at))
        await run(thread, finish)

    async def _aconnection(self) -> Any:
        if self._async is None:
            import aiosqlite

            self._async = await aiosqlite.connect(self._path, isolation_level=None, timeout=60)
            for setting in self._settings():
                await (await self._async.execute(setting)).close()
        return self._async

    async def aclaim(self, key: str) -> None:
        now = time.time()
        row = (key, OWNER, int(now * 1e6), PRINT, LABEL, now, now + 30)
        await (await self._aconnection()).execute(self._CLAIM, row)

    async def afirst(self, key: str) -> None:
        await self.aclaim(key)
        now = time.time()
        await self._async.execute(self._FINISH, (RESULT, now, now + 86400, key, OWNER))

    async def areplay(self, key: str) -> None:
        connection = await self._aconnection()
        await connection.execute_fetchall(self._FIND, (key,))

    def close(self) -> None:
        self._thread.shutdown()
        for connection in self._all:
            connection.close()

    async def aclose(self) -> None:
        if self._async is not None:
            await self._async.close()
            self._async = None


class RawRedis:
    """redis-py: SET NX PX, then SET PX; GET."""

    def __init__(self, url: str) -> None:
        import redis

        self._url = url
        self._client = redis.Redis.from_url(url)
        self._async: Any = None

    def claim(self, key: str) -> None:
        self._client.set(key, LABEL, nx=True, px=30_000)

    def first(self, key: str) -> None:
        self._client.set(key, LABEL, nx=True, px=30_000)
        self._client.set(key, RESULT, px=86_400_000)

    def replay(self, key: str) -> None:
        self._client.get(key)

    def saga(self, key: str, written: Written) -> None:
        client = self._client
        for at in range(len(written.entries)):
            client.hset(key, mapping=_fields(at, written))
        with client.pipeline() as both:
            both.hset(key, mapping={"r": written.result, "m": time.time()})
            both.pexpire(key, int(MONTH * 1000))
            both.execute()

    async def asaga(self, key: str, written: Written) -> None:
        client = self._aclient()
        for at in range(len(written.entries)):
            await client.hset(key, mapping=_fields(at, written))
        async with client.pipeline() as both:
            both.hset(key, mapping={"r": written.result, "m": time.time()})
            both.pexpire(key, int(MONTH * 1000))
            await both.execute()

    def _aclient(self) -> Any:
        if self._async is None:
            import redis.asyncio

            self._async = redis.asyncio.Redis.from_url(self._url)
        return self._async

    async def aclaim(self, key: str) -> None:
        await self._aclient().set(key, LABEL, nx=True, px=30_000)

    async def afirst(self, key: str) -> None:
        client = self._aclient()
        await client.set(key, LABEL, nx=True, px=30_000)
        await client.set(key, RESULT, px=86_400_000)

    async def areplay(self, key: str) -> None:
        await self._aclient().get(key)

    def close(self) -> None:
        self._client.close()

    async def aclose(self) -> None:
        if self._async is not None:
            await self._async.aclose()
            self._async = None


def _fields(at: int, written: Written) -> Any:
    now = time.time()
    made: dict[str, Any] = {f"e{at}": written.entries[at], "c": at + 1, "m": now + LEASE}
    if at == 0:
        made |= {"v": 1, "f": int(now * 1e6), "a": 1, "o": OWNER, "p": "", "l": written.label, "b": now}
    return made


class RawPostgres:
    """psycopg 3 over psycopg_pool, autocommit."""

    def __init__(self, url: str, size: int) -> None:
        from psycopg_pool import ConnectionPool

        self._url, self._size = url, size
        self._pool = ConnectionPool(url, min_size=size, max_size=size, kwargs={"autocommit": True}, open=True)
        self._async: Any = None
        with self._pool.connection() as connection:
            connection.execute(
                'CREATE TABLE raw (key text COLLATE "C" PRIMARY KEY, owner text NOT NULL, fence int8 NOT NULL, attempt'
                " int4 NOT NULL, fingerprint text NOT NULL, label text NOT NULL, began float8 NOT NULL, mark float8 NOT"
                " NULL, expires float8, awaited bool NOT NULL DEFAULT false, result bytea,"
                " entries int4 NOT NULL DEFAULT 0)"
            )
            connection.execute("CREATE INDEX raw_mark ON raw (mark)")
            connection.execute("CREATE INDEX raw_open ON raw (key) WHERE expires IS NULL")
            connection.execute(
                'CREATE TABLE raw_entries (key text COLLATE "C" NOT NULL, began float8 NOT NULL, at int4 NOT NULL,'
                " entry bytea NOT NULL, PRIMARY KEY (key, began, at))"
            )

    _CLAIM = (
        f"INSERT INTO raw ({_COLUMNS}) VALUES (%s, %s, %s, 1, %s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING fence"
    )
    _FINISH = "UPDATE raw SET result = %s, mark = %s, expires = %s WHERE key = %s AND owner = %s"
    _FIND = "SELECT result FROM raw WHERE key = %s"
    _BEGIN = (
        f"WITH new AS (INSERT INTO raw ({_COLUMNS}, entries) VALUES (%s, %s, %s, 1, '', %s, %s, %s, 1) ON CONFLICT DO"
        " NOTHING RETURNING key, began) INSERT INTO raw_entries SELECT key, began, 0, %s::bytea FROM new"
    )
    _NEXT = (
        "WITH mine AS (UPDATE raw SET mark = %s, entries = entries + 1 WHERE key = %s AND owner = %s AND fence = %s AND"
        " expires IS NULL AND entries = %s RETURNING key, began, entries)"
        " INSERT INTO raw_entries SELECT key, began, entries - 1, %s::bytea FROM mine"
    )

    @classmethod
    def _commits(cls, key: str, written: Written) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """The statements of a saga, each of which is a commit."""
        now = time.time()
        fence = int(now * 1e6)
        yield cls._BEGIN, (key, OWNER, fence, written.label, now, now + LEASE, written.entries[0])
        for at in range(1, len(written.entries)):
            yield cls._NEXT, (time.time() + LEASE, key, OWNER, fence, at, written.entries[at])
        now = time.time()
        yield cls._FINISH, (written.result, now, now + MONTH, key, OWNER)

    def claim(self, key: str) -> None:
        now = time.time()
        with self._pool.connection() as connection:
            row = (key, OWNER, int(now * 1e6), PRINT, LABEL, now, now + 30)
            connection.execute(self._CLAIM, row, prepare=True).fetchone()

    def first(self, key: str) -> None:
        self.claim(key)
        now = time.time()
        with self._pool.connection() as connection:
            connection.execute(self._FINISH, (RESULT, now, now + 86400, key, OWNER), prepare=True)

    def replay(self, key: str) -> None:
        with self._pool.connection() as connection:
            connection.execute(self._FIND, (key,), prepare=True).fetchone()

    def saga(self, key: str, written: Written) -> None:
        for statement, row in self._commits(key, written):
            with self._pool.connection() as connection:
                connection.execute(statement, row, prepare=True)

    async def asaga(self, key: str, written: Written) -> None:
        pool = await self._apool()
        for statement, row in self._commits(key, written):
            async with pool.connection() as connection:
                await connection.execute(statement, row, prepare=True)

    async def _apool(self) -> Any:
        if self._async is None:
            from psycopg_pool import AsyncConnectionPool

            size = self._size
            self._async = AsyncConnectionPool(
                self._url, min_size=size, max_size=size, kwargs={"autocommit": True}, open=False
            )
            await self._async.open(wait=True)
        return self._async

    async def aclaim(self, key: str) -> None:
        now = time.time()
        async with (await self._apool()).connection() as connection:
            row = (key, OWNER, int(now * 1e6), PRINT, LABEL, now, now + 30)
            await (await connection.execute(self._CLAIM, row, prepare=True)).fetchone()

    async def afirst(self, key: str) -> None:
        await self.aclaim(key)
        now = time.time()
        async with self._async.connection() as connection:
            await connection.execute(self._FINISH, (RESULT, now, now + 86400, key, OWNER), prepare=True)

    async def areplay(self, key: str) -> None:
        async with (await self._apool()).connection() as connection:
            await (await connection.execute(self._FIND, (key,), prepare=True)).fetchone()

    def close(self) -> None:
        self._pool.close()

    async def aclose(self) -> None:
        if self._async is not None:
            await self._async.close()
            self._async = None
