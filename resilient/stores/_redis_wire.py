"""How requests reach Redis over connections of our own, for threads and for tasks; and what becomes of failures.

Promises: one request and its answer at a time per connection, a connection that failed or was left in the middle is
never used again, and every failure is a `StoreError` that says whether the server may have done it. Does not: repeat
anything itself, or connect before the first request. Connections of our own cost about half of what a client's call
does. Safe from any thread, task and loop; a forked child begins without connections.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from resilient.errors import StoreError

if TYPE_CHECKING:
    import asyncio

    from resilient.stores._lua import Request

__all__ = ["Loops", "Pool", "TaskPort", "ThreadPort", "failure", "no_script", "unknowns"]

# What the server answers before it carries anything out, though clients take some of it for a broken connection.
_ANSWERS = frozenset({"ResponseError", "AuthenticationError", "AuthorizationError", "BusyLoadingError", "DataError"})
_OURS = frozenset({"RedisError", "ValkeyError", "OSError"})


class ThreadPort(Protocol):
    """A way to a server, for threads."""

    def run(self, request: Request) -> Any: ...

    def run_all(self, requests: Sequence[Request]) -> list[Any]: ...

    def scan(self, node: str, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]: ...

    def nodes(self) -> list[str]: ...

    def close(self) -> None: ...


class TaskPort(Protocol):
    """A way to a server, for tasks."""

    async def run(self, request: Request) -> Any: ...

    async def run_all(self, requests: Sequence[Request]) -> list[Any]: ...

    async def scan(self, node: str, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]: ...

    async def nodes(self) -> list[str]: ...

    async def aclose(self) -> None: ...


def failure(error: Exception, maybe_written: bool) -> Exception:
    """What to raise for what a driver raised: a `StoreError`, or `error` itself if it is a fault of another kind."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names.isdisjoint(_OURS):
        return error
    text = str(error) or type(error).__name__
    if names.isdisjoint(_ANSWERS):
        return StoreError(f"no answer from Redis: {text}", maybe_written=maybe_written)
    if text.startswith("DAMAGED"):
        return StoreError(f"the record is damaged: its {', '.join(text.split()[1:])}")
    if text.startswith("FOREIGN"):
        return StoreError("the record is damaged: it is not one of ours, or of another version")
    if "WRONGTYPE" in text:
        return StoreError("the key holds something that is not a record")
    return StoreError(f"Redis refused: {text}")


def no_script(error: Exception) -> bool:
    """Whether the server does not know the script by its name (any more)."""
    return type(error).__name__ == "NoScriptError" or str(error).startswith("NOSCRIPT")


def unknowns(answers: Sequence[Any]) -> list[int]:
    """Where the server did not know the script."""
    return [at for at, one in enumerate(answers) if isinstance(one, Exception) and no_script(one)]


def _packed(args: Iterable[bytes]) -> bytes:
    parts = [b"$%d\r\n%b\r\n" % (len(each), each) for each in args]
    return b"*%d\r\n%b" % (len(parts), b"".join(parts))


def _scan_args(cursor: int, match: bytes, count: int) -> tuple[bytes, ...]:
    return (b"SCAN", b"%d" % cursor, b"MATCH", match, b"COUNT", b"%d" % count)


def _eval_args(request: Request) -> tuple[bytes, ...]:
    return (b"EVAL", request.script.text, b"1", request.key, *request.args)


# -- connections of our own ------------------------------------------------------------------------------------------


class Pool:
    """Connections for threads: each is one thread's while it asks, and the most recent one goes out first."""

    def __init__(self, kind: Any, options: dict[str, Any], most: int, timeout: float) -> None:
        self._kind, self._options, self._most, self._timeout = kind, options, most, timeout
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        self._free: list[Any] = []
        self._slots = threading.Semaphore(self._most)
        self._closed = 0

    def run(self, request: Request) -> Any:
        """The server's answer to a request."""
        writes = request.script.writes
        try:
            return self._ask(request.packed(), writes)
        except StoreError as error:
            if error.__cause__ is None or not no_script(error.__cause__):  # type: ignore[arg-type]
                raise
        return self._ask(_packed(_eval_args(request)), writes)

    def run_all(self, requests: Sequence[Request]) -> list[Any]:
        """The server's answers to requests that are sent together; for one that fails alone, its error."""
        answers = self._together(requests)
        while unknown := unknowns(answers):
            # One alone brings the script along, for the others.
            first, *rest = unknown
            try:
                answers[first] = self.run(requests[first])
            except StoreError as error:
                answers[first] = error
            if rest:
                for at, answer in zip(rest, self._together([requests[at] for at in rest]), strict=True):
                    answers[at] = answer
        return [failure(one, False) if isinstance(one, Exception) else one for one in answers]

    def _together(self, requests: Sequence[Request]) -> list[Any]:
        packed = b"".join([request.packed() for request in requests])
        answers: list[Any] = self._ask(packed, any(request.script.writes for request in requests), len(requests))
        return answers

    def scan(self, node: str, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        """A piece of the server's keys, and where the next begins."""
        after, keys = self._ask(_packed(_scan_args(cursor, match, count)), False)
        return int(after), keys

    def nodes(self) -> list[str]:
        """One server, without a name."""
        return [""]

    def _ask(self, packed: bytes, writes: bool, number: int = 0) -> Any:
        if not self._slots.acquire(timeout=self._timeout):
            raise StoreError(f"no connection to Redis became free within {self._timeout:.3g} s")
        try:
            return self._ask_one(packed, writes, number)
        finally:
            self._slots.release()

    def _ask_one(self, packed: bytes, writes: bool, number: int) -> Any:
        free, closed = self._free, self._closed
        sent = False
        conn: Any = None
        try:
            conn = self._take()
            sent = True
            conn.send_packed_command([packed], check_health=False)
            answer = [_read(conn) for _ in range(number)] if number else conn.read_response()
        except BaseException as error:
            if not isinstance(error, Exception):
                if conn is not None:
                    conn.disconnect()
                raise
            made = failure(error, sent and writes)
            if sent and _answered(error):
                free.append(conn)  # it said no, and goes on
            else:
                if conn is not None:
                    conn.disconnect()
                self._drop()  # the others lead to where this one led
            if made is error:
                raise
            raise made from error
        free.append(conn)
        if closed != self._closed:
            self._drop()
        return answer

    def _take(self) -> Any:
        """A connection that is alive as far as this end knows."""
        try:
            conn = self._free.pop()
        except IndexError:
            conn = self._kind(**self._options)
        else:
            try:
                stale = conn.can_read(0)  # nothing was asked: this is the end of it, or rubbish
            except Exception:
                stale = True
            if stale:
                conn.disconnect()
        try:
            conn.connect()
        except BaseException:
            conn.disconnect()
            raise
        return conn

    def _drop(self) -> None:
        while True:
            try:
                conn = self._free.pop()
            except IndexError:  # perhaps another thread was faster
                return
            conn.disconnect()

    def close(self) -> None:
        """Close what is free now; what is in use, when it is done."""
        self._closed += 1
        self._drop()


def _answered(error: Exception) -> bool:
    return any(kind.__name__ == "ResponseError" for kind in type(error).__mro__)


def _read(conn: Any) -> Any:
    """One of several answers, or the error that the server answered."""
    try:
        return conn.read_response()
    except Exception as error:
        if not _answered(error):
            raise
        return error


async def _aread(conn: Any) -> Any:
    """One of several answers, or the error that the server answered."""
    try:
        return await conn.read_response()
    except Exception as error:
        if not _answered(error):
            raise
        return error


def _running_loop() -> asyncio.AbstractEventLoop:
    import asyncio

    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError("tasks of asyncio only: elsewhere, such as in trio, use Threaded(store)") from None


class Loops:
    """Connections for tasks, of each event loop its own; they are closed when the loop is shut down."""

    def __init__(self, kind: Any, options: dict[str, Any], most: int, timeout: float) -> None:
        self._kind, self._options, self._most, self._timeout = kind, options, most, timeout
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        self._pools: weakref.WeakKeyDictionary[Any, _LoopPool] = weakref.WeakKeyDictionary()

    async def run(self, request: Request) -> Any:
        """The server's answer to a request."""
        writes = request.script.writes
        pool = await self._pool()
        try:
            return await pool.ask(request.packed(), writes, self._timeout)
        except StoreError as error:
            if error.__cause__ is None or not no_script(error.__cause__):  # type: ignore[arg-type]
                raise
        return await pool.ask(_packed(_eval_args(request)), writes, self._timeout)

    async def run_all(self, requests: Sequence[Request]) -> list[Any]:
        """The server's answers to requests that are sent together; for one that fails alone, its error."""
        answers = await self._together(requests)
        while unknown := unknowns(answers):
            # One alone brings the script along, for the others.
            first, *rest = unknown
            try:
                answers[first] = await self.run(requests[first])
            except StoreError as error:
                answers[first] = error
            if rest:
                for at, answer in zip(rest, await self._together([requests[at] for at in rest]), strict=True):
                    answers[at] = answer
        return [failure(one, False) if isinstance(one, Exception) else one for one in answers]

    async def _together(self, requests: Sequence[Request]) -> list[Any]:
        pool = await self._pool()
        packed = b"".join([request.packed() for request in requests])
        writes = any(request.script.writes for request in requests)
        answers: list[Any] = await pool.ask(packed, writes, self._timeout, len(requests))
        return answers

    async def scan(self, node: str, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        """A piece of the server's keys, and where the next begins."""
        pool = await self._pool()
        after, keys = await pool.ask(_packed(_scan_args(cursor, match, count)), False, self._timeout)
        return int(after), keys

    async def nodes(self) -> list[str]:
        """One server, without a name."""
        return [""]

    async def _pool(self) -> _LoopPool:
        loop = _running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            pool = self._pools[loop] = _LoopPool(self._kind, self._options, self._most)
            await pool.until_shutdown(self._pools)
        return pool

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        pool = self._pools.pop(_running_loop(), None)
        if pool is not None:
            await pool.close()


class _LoopPool:
    """The connections of one loop."""

    _end: AsyncGenerator[None, None]

    def __init__(self, kind: Any, options: dict[str, Any], most: int) -> None:
        import asyncio

        self._kind, self._options = kind, options
        self._free: list[Any] = []
        self._slots: asyncio.Semaphore = asyncio.Semaphore(most)
        self._timeout = asyncio.timeout
        self._closed = False

    async def until_shutdown(self, pools: weakref.WeakKeyDictionary[Any, _LoopPool]) -> None:
        """Have the loop close this pool: it ends async generators that still run, which nothing else of it allows."""
        import asyncio

        loop = weakref.ref(asyncio.get_running_loop())

        async def end() -> AsyncGenerator[None, None]:
            try:
                yield
            finally:
                pools.pop(loop(), None)
                await self._close()

        self._end = end()
        await anext(self._end)

    async def ask(self, packed: bytes, writes: bool, seconds: float, number: int = 0) -> Any:
        """Send, and wait for the answer, or for a `number` of them; together at most `seconds`."""
        conn: Any = None
        sent = False
        try:
            async with self._timeout(seconds):
                async with self._slots:
                    conn = await self._take()
                    sent = True
                    await conn.send_packed_command(packed, check_health=False)
                    answer = [await _aread(conn) for _ in range(number)] if number else await conn.read_response()
        except BaseException as error:
            if not isinstance(error, Exception):
                if conn is not None:
                    await conn.disconnect(nowait=True)
                raise
            made = failure(error, sent and writes)
            if sent and _answered(error):
                self._free.append(conn)
            else:
                if conn is not None:
                    await conn.disconnect(nowait=True)
                await self._drop()
            if made is error:
                raise
            raise made from error
        self._free.append(conn)
        if self._closed:
            await self._drop()
        return answer

    async def _take(self) -> Any:
        if self._free:
            conn = self._free.pop()
            reader = getattr(conn, "_reader", None)
            if reader is not None and not reader.at_eof():
                return conn
            await conn.disconnect(nowait=True)
        else:
            conn = self._kind(**self._options)
        try:
            await conn.connect()
        except BaseException:
            await conn.disconnect(nowait=True)
            raise
        return conn

    async def _drop(self) -> None:
        while self._free:
            await self._free.pop().disconnect(nowait=True)

    async def _close(self) -> None:
        self._closed = True
        await self._drop()

    async def close(self) -> None:
        await self._end.aclose()


_pools: weakref.WeakSet[Pool | Loops] = weakref.WeakSet()
_parents: list[Any] = []


def _forked() -> None:
    # What the parent has is the parent's: neither used nor closed here.
    for pool in list(_pools):
        _parents.append(pool.__dict__.copy())
        pool._begin()


os.register_at_fork(after_in_child=_forked)
