"""A store in a SQLite file: no server, shared by all threads, tasks and processes of one machine.

Promises all that a store promises. `durability="full"`: what was answered is on the disk, whatever happens to the
machine; `"normal"`: it outlives the process, but the last moments may be lost with the power. Callers at the same time
share a commit. Does not: work over a network file system, or tell other processes when a key ends (`poll`). About the
cost of the raw statements. Safe from any thread, asyncio loop and trio run, and after a fork.
"""

from __future__ import annotations

import os
import re
import sqlite3
import weakref
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from urllib.parse import parse_qsl, unquote

from resilient.clock import SystemClock, in_trio
from resilient.errors import StoreError
from resilient.stores._ops import Append, Begin, Claim, History, Op, Read, Scan
from resilient.stores._sqlite_file import TROUBLE, File, wrapped
from resilient.stores._sqlite_group import Group
from resilient.stores._sqlite_jobs import Job, TaskJob
from resilient.stores._sqlite_sql import Sql
from resilient.stores._watch import Bells, Watch

if TYPE_CHECKING:
    import aiosqlite

    from resilient.clock import Clock
    from resilient.stores._sqlite_sql import Execute

__all__ = ["SQLiteStore"]

R = TypeVar("R")

_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,30}\Z")
_PEEKED = frozenset((Claim, Begin, Read, History, Scan))


class SQLiteStore:
    """Records in the SQLite file at `path`, which is made if it is not there; its directory is not.

    `busy_timeout` is in seconds: how long to wait while other processes write. `prefix` begins the names of the tables.
    `clock` judges leases; all processes of a machine share the system's. Nothing is opened before the first operation.

    >>> store = SQLiteStore("orders.db", durability="normal")
    """

    poll = 0.05
    """Seconds after which one who waits asks again at the latest: ends in other processes ring no bell here."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Literal["full", "normal"] = "full",
        busy_timeout: float = 30.0,
        prefix: str = "resilient_",
        clock: Clock | None = None,
    ) -> None:
        path = os.fspath(path)
        if not isinstance(path, str):
            raise TypeError(f"path must be a string or a path, not {path!r}")
        if path in ("", ":memory:"):
            raise ValueError(f"path must name a file, not {path!r}; for a store in memory there is memory://")
        if "\0" in path:
            raise ValueError(f"path must not contain a null character, as {path!r} does")
        if durability not in ("full", "normal"):
            raise ValueError(f'durability must be "full" or "normal", not {durability!r}')
        if not 0 <= busy_timeout <= 2_000_000:
            raise ValueError(f"busy_timeout must be between 0 and 2 000 000 seconds, not {busy_timeout!r}")
        if not isinstance(prefix, str) or not _PREFIX.match(prefix):
            raise ValueError(
                f"prefix must be 1 to 31 letters, digits and _, and not begin with a digit, not {prefix!r}"
            )
        self.path = path
        self.durability = durability
        self.clock: Clock = SystemClock() if clock is None else clock
        self._bells = Bells()
        self._neutral = Sql(prefix, neutral=True)
        self._file = File(path, Sql(prefix), prefix, durability == "full", busy_timeout, self.clock)
        self._group = Group(self._file, self._bells)
        weakref.finalize(self, self._group.drop)

    @classmethod
    def from_url(cls, url: str) -> SQLiteStore:
        """`sqlite:///relative.db`, `sqlite:////absolute.db`, with `?durability=normal&prefix=x_&busy_timeout=5`."""
        place, _, query = url.partition("?")
        _, slashes, path = place.partition("://")
        if not slashes or not path.startswith("/"):
            raise ValueError(f"url must be like sqlite:///relative.db or sqlite:////absolute.db, not {url!r}")
        options: dict[str, Any] = {}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name not in ("durability", "prefix", "busy_timeout") or name in options:
                raise ValueError(f"url has an option that is unknown or given twice: {name}={value!r} in {url!r}")
            options[name] = value
        if "busy_timeout" in options:
            try:
                options["busy_timeout"] = float(options["busy_timeout"])
            except ValueError:
                raise ValueError(f"busy_timeout must be seconds, not {options['busy_timeout']!r}") from None
        return cls(unquote(path[1:]), **options)

    def execute(self, op: Op[R], /) -> R:
        """Carry out `op`."""
        group, look = self._group, type(op) in _PEEKED
        if look and group.stage:
            answer = self._file.peek(op)
            if answer is not ...:
                return answer  # type: ignore[no-any-return]
            look = False
        return group.run(Job(op, look))  # type: ignore[no-any-return]

    async def aexecute(self, op: Op[R], /) -> R:
        """Carry out `op`, in a thread that all tasks share. Cancelled, it is carried out all the same."""
        if in_trio():
            import trio

            event = trio.Event()
            send = trio.lowlevel.current_trio_token().run_sync_soon
            job = TaskJob(op, type(op) in _PEEKED, send=send, wake=event.set)
            self._group.post(job)
            await event.wait()
            return cast(R, job.outcome())
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        job = TaskJob(op, type(op) in _PEEKED, send=loop.call_soon_threadsafe, wake=wake)
        self._group.post(job)
        await future
        return cast(R, job.outcome())

    def watch(self, key: str, *, task: bool) -> Watch:
        """Watch `key` from now on, for ends in this process."""
        return self._bells.watch(key, task=task)

    def prepare(self) -> None:
        """Make sure that the file and its tables are there."""
        self._file.ready()

    async def aprepare(self) -> None:
        """Make sure that the file and its tables are there, without blocking the loop."""
        if self._file.writer is None:
            await self.aexecute(Read(""))

    def on(self, connection: sqlite3.Connection, op: Op[R], /) -> R:
        """Carry out `op` on `connection`, as a part of the transaction that it is in: it commits with it."""
        try:
            cursor = sqlite3.Cursor(connection)  # without the connection's row factory
            try:
                if isinstance(op, (Begin, Append)):
                    answer = self._whole(connection, cursor.execute, op)
                else:
                    answer = self._neutral.answer(cursor.execute, op, self.clock.at())
            finally:
                cursor.close()
        except TROUBLE as error:
            raise self._foreign(error) from error
        return cast(R, answer)

    async def aon(self, connection: aiosqlite.Connection, op: Op[R], /) -> R:
        """Carry out `op` on `connection`, as a part of the transaction that it is in."""
        answer = await connection._execute(self.on, connection._conn, op)  # type: ignore[no-untyped-call]
        return cast(R, answer)

    def close(self) -> None:
        """Close the file and end the thread, once what runs has ended. An operation after this opens all anew."""
        self._group.close()

    def __repr__(self) -> str:
        return f"SQLiteStore({self.path!r}, durability={self.durability!r})"

    def _whole(self, connection: sqlite3.Connection, execute: Execute, op: Op[Any]) -> object:
        """What writes twice, on a connection of the user: both or neither."""
        level = None if getattr(connection, "autocommit", None) is True else connection.isolation_level
        if level is not None and not connection.in_transaction:
            # What sqlite3 itself does before a first write; without it, the end of the savepoint would commit.
            execute(f"BEGIN {level}")
        execute("SAVEPOINT resilient")
        try:
            answer = self._neutral.answer(execute, op, self.clock.at())
        except BaseException:
            if connection.in_transaction:
                execute("ROLLBACK TO resilient")
                execute("RELEASE resilient")
            raise
        execute("RELEASE resilient")
        return answer

    def _foreign(self, error: Exception) -> Exception:
        if "no such table" in str(error):
            told = StoreError(
                f"the connection's database has no table {self._neutral.table}: it must be to the file of the store, "
                f"{self.path}"
            )
            told.__cause__ = error
            return told
        return wrapped(error, self.path)
