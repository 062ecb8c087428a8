"""What a careful person writes with the bare driver: claim a key by one statement, store its result by another.

Each class speaks to one backend and has `first(key)`, the two round trips, `replay(key)`, the one that finds the
result, and `claim(key)`, the first of the two alone. Async twins begin with an `a`. Tables have the columns and indexes
that ours have, durability is the same, connections are pooled as their makers advise.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from typing import Any

RESULT = json.dumps({"v": 1, "ok": "receipt"}).encode()
LABEL = json.dumps({"function": "benchmarks.durable:charge", "scope": "", "key": "order-1234567"})
PRINT = "d41d8cd98f00b204e9800998ecf8427e"
OWNER = "0123456789abcdef0123456789abcdef.1"

_COLUMNS = "key, owner, fence, attempt, fingerprint, label, began, mark"


class RawSQLite:
    """sqlite3 with a connection for each thread; aiosqlite with one."""

    def __init__(self, path: str, durability: str) -> None:
        self._path, self._durability = path, durability
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._async: Any = None
        mine = self._connection()
        mine.execute(
            "CREATE TABLE records (key TEXT NOT NULL, owner TEXT NOT NULL, fence INTEGER NOT NULL, attempt INTEGER NOT"
            " NULL, fingerprint TEXT NOT NULL, label TEXT NOT NULL, began REAL NOT NULL, mark REAL NOT NULL, expires"
            " REAL, result BLOB)"
        )
        mine.execute("CREATE UNIQUE INDEX records_key ON records (key)")
        mine.execute("CREATE INDEX records_mark ON records (mark)")

    _CLAIM = f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, 1, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
    _FINISH = "UPDATE records SET result = ?, mark = ?, expires = ? WHERE key = ? AND owner = ?"
    _FIND = "SELECT result FROM records WHERE key = ?"

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
                " NULL, expires float8, awaited bool NOT NULL DEFAULT false, result bytea)"
            )
            connection.execute("CREATE INDEX raw_mark ON raw (mark)")

    _CLAIM = (
        f"INSERT INTO raw ({_COLUMNS}) VALUES (%s, %s, %s, 1, %s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING fence"
    )
    _FINISH = "UPDATE raw SET result = %s, mark = %s, expires = %s WHERE key = %s AND owner = %s"
    _FIND = "SELECT result FROM raw WHERE key = %s"

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
