"""A store in Redis or Valkey: each key a hash, each operation one script that the server runs in one step.

Promises all that a store promises, to every process that reaches the server, judged by the server's clock; a waiter is
woken over one channel. Does not: outlive what the server forgets (a restart without persistence, a failover that lost
writes, eviction: use `noeviction`). One round trip an operation, cheaper than two calls of the client. Safe from any
thread, loop and forked child.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from resilient.errors import StoreError
from resilient.stores._lua import decoded, purge_one, read_one, record, request
from resilient.stores._ops import Op, Page, Purge, Record, Scan
from resilient.stores._redis_client import Client, TaskClient
from resilient.stores._redis_wire import Loops, Pool

if TYPE_CHECKING:
    from resilient.stores._redis_bells import Listener
    from resilient.stores._redis_wire import TaskPort, ThreadPort
    from resilient.stores._watch import Watch

__all__ = ["RedisStore"]

R = TypeVar("R")

_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
_Step = tuple[str, Any]
_TOGETHER = 250
"""How many keys are looked at in one round trip. None holds up the server: between two of them it serves others."""


class RedisStore:
    """Records in Redis or Valkey, at a URL or through a client of yours.

    `where` is a URL, or a client: `redis.Redis`, `redis.asyncio.Redis`, their clusters, or the like of the `valkey`
    package; one with `decode_responses` cannot hold results. By URL, threads and tasks are served alike; by a client,
    those that it serves: `execute` or `aexecute` is there accordingly (`Threaded(store)` makes an `AsyncStore` of one
    for threads).

    `prefix` begins every key, and names the channel that wakes waiters (`prefix` + `wake`).
    On a cluster, a prefix with `{braces}` keeps all keys on one node. `timeout` is the number of seconds for a
    connection, and for an answer, after which an operation fails; by a client, the client's own count.

    Results are forgotten by the server when their time is over. Everything else stays until it is purged. There is no
    index, which no cluster could keep in step with the keys: `Scan` and `Purge` look at every key, many a round trip.
    """

    prefix: str
    poll: float
    """The seconds after which a waiter should ask again, rung or not."""

    def __new__(cls, where: Any, *, prefix: str = "resilient:", timeout: float = 5.0) -> RedisStore:
        if cls is not RedisStore:
            raise TypeError("RedisStore is made for what it is given: wrap it instead of deriving from it")
        kind: Any = _UrlStore if isinstance(where, str) else _TaskStore if _is_async(where) else _ThreadStore
        made: RedisStore = object.__new__(kind)
        return made

    def __init__(self, where: Any, *, prefix: str = "resilient:", timeout: float = 5.0) -> None:
        if isinstance(where, str):
            where, options = _split(where)
            prefix, timeout = options.get("prefix", prefix), _number("timeout", options.get("timeout", timeout))
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string, not {prefix!r}")
        if not prefix or not prefix.isprintable():
            raise ValueError(f"prefix must be printable, and not empty, not {prefix!r}")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        self.prefix = prefix
        self._prefix = prefix.encode()
        self._match = b"".join(b"\\%c" % each if each in b"*?[]^\\-" else b"%c" % each for each in self._prefix) + b"*"
        self._channel = self._prefix + b"wake"
        self._timeout = timeout
        self._open(where)

    @classmethod
    def from_url(cls, url: str) -> RedisStore:
        """A store at `redis://`, `rediss://`, `unix://`, `valkey://` or `valkeys://`; nothing connects yet.

        Options in the query: `prefix`, `timeout`, `max_connections` (100: of a process's threads together, and of each
        event loop), and all that redis-py takes there, such as `db`, `socket_keepalive` or `ssl_ca_certs`.
        """
        return cls(url)

    if TYPE_CHECKING:

        def execute(self, op: Op[R], /) -> R: ...

        async def aexecute(self, op: Op[R], /) -> R: ...

        def watch(self, key: str, *, task: bool) -> Watch: ...

    def _open(self, where: Any) -> None:
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the connections that threads used, and stop waking waiters. Operations after this open new ones."""

    async def aclose(self) -> None:
        """`close`, and the connections of the running event loop. (Loops close theirs when they are shut down.)"""
        self.close()

    # -- Scan and Purge: programs of many requests -------------------------------------------------------------------

    def _program(self, op: Scan | Purge) -> Generator[_Step, Any, Any]:
        return self._scan(op) if isinstance(op, Scan) else self._purge(op)

    def _scan(self, op: Scan) -> Generator[_Step, Any, Page]:
        nodes: list[str] = yield "nodes", ()
        node, slash, cursor_text = op.after.rpartition("/") if op.after else (nodes[0], "/", "0")
        if not slash or node not in nodes or not (cursor_text.isascii() and cursor_text.isdecimal()):
            raise ValueError(f"after must come from a page of this store, not {op.after!r}")
        cursor = int(cursor_text)
        found: dict[str, Record] = {}
        count = max(10, min(op.limit, 1000))
        while True:
            cursor, keys = yield "scan", (node, cursor, self._match, count)
            count = min(2 * count, 1000)  # the fewer there are among others' keys, the faster it goes through those
            replies: list[Any] = []
            for at in range(0, len(keys), _TOGETHER):
                replies += yield "all", [read_one(data, op.text, op.state) for data in keys[at : at + _TOGETHER]]
            for data, reply in zip(keys, replies, strict=True):
                try:
                    key = data[len(self._prefix) :].decode("utf-8", "surrogatepass")
                    entry = record(key, reply)
                except (UnicodeDecodeError, StoreError):
                    continue  # of somebody else, or damaged: `Read` says so
                if entry is not None:
                    found[key] = entry
            if not cursor:
                index = nodes.index(node) + 1
                if index == len(nodes):
                    return Page(tuple(found.values()), "")
                node = nodes[index]
            if len(found) >= op.limit:
                return Page(tuple(found.values()), f"{node}/{cursor}")

    def _purge(self, op: Purge) -> Generator[_Step, Any, int]:
        nodes: list[str] = yield "nodes", ()
        removed = 0
        for node in nodes:
            cursor = -1
            while cursor:
                cursor, keys = yield "scan", (node, max(cursor, 0), self._match, 1000)
                while keys:
                    if removed >= op.batch:
                        return removed
                    most = min(_TOGETHER, op.batch - removed)
                    replies: list[Any] = yield "all", [purge_one(data, op.older_than) for data in keys[:most]]
                    removed += sum(reply or 0 for reply in replies)
                    keys = keys[most:]
        return removed


class _Threads(RedisStore):
    """What serves threads."""

    poll = 2.0
    _port: ThreadPort

    def execute(self, op: Op[R], /) -> R:
        """Carry out `op`."""
        if isinstance(op, (Scan, Purge)):
            return cast(R, self._follow(self._program(op)))
        made = request(op, self._prefix, self._channel)
        return cast(R, _answer(op, self._port.run(made)))

    def _follow(self, program: Generator[_Step, Any, Any]) -> Any:
        answer: Any = None
        try:
            while True:
                what, args = program.send(answer)
                if what == "nodes":
                    answer = self._port.nodes()
                elif what == "scan":
                    answer = self._port.scan(*args)
                else:
                    answer = [_passed_over(one) for one in self._port.run_all(args)]
        except StopIteration as end:
            return end.value

    def watch(self, key: str, *, task: bool) -> Watch:
        """Watch `key` from now on."""
        return self._listener.watch(key, task=task)

    _listener: Listener

    def close(self) -> None:
        """Close the connections that threads used, and stop waking waiters. Operations after this open new ones."""
        self._listener.close()
        self._port.close()


class _Tasks(RedisStore):
    """What serves tasks."""

    poll = 0.1
    _tasks: TaskPort

    async def aexecute(self, op: Op[R], /) -> R:
        """Carry out `op`, in an asyncio task."""
        if isinstance(op, (Scan, Purge)):
            return cast(R, await self._afollow(self._program(op)))
        made = request(op, self._prefix, self._channel)
        return cast(R, _answer(op, await self._tasks.run(made)))

    async def _afollow(self, program: Generator[_Step, Any, Any]) -> Any:
        answer: Any = None
        try:
            while True:
                what, args = program.send(answer)
                if what == "nodes":
                    answer = await self._tasks.nodes()
                elif what == "scan":
                    answer = await self._tasks.scan(*args)
                else:
                    answer = [_passed_over(one) for one in await self._tasks.run_all(args)]
        except StopIteration as end:
            return end.value

    async def aclose(self) -> None:
        """`close`, and the connections of the running event loop. (Loops close theirs when they are shut down.)"""
        self.close()
        await self._tasks.aclose()


class _UrlStore(_Threads, _Tasks):
    """By URL: threads and tasks, over connections of its own."""

    poll = 2.0

    def _open(self, where: str) -> None:
        from resilient.stores._redis_bells import Listener

        parts = urlsplit(where)
        if parts.scheme not in _SCHEMES:
            # No more of it than this: there may be a password in it.
            raise ValueError(f"the URL must begin with one of {', '.join(_SCHEMES)}, not {parts.scheme!r}")
        url = _SCHEMES[parts.scheme] + where[len(parts.scheme) :]
        try:
            import redis
            import redis.asyncio
        except ImportError as error:
            raise ImportError("stores in Redis or Valkey need a driver: pip install 'resilient-kit[redis]'") from error
        options = {"socket_timeout": self._timeout, "socket_connect_timeout": self._timeout}
        made: list[Any] = []
        try:
            for module in (redis, redis.asyncio):
                pool = module.ConnectionPool.from_url(url, **options)
                # Raw answers; and one attempt, so that we know what became of it.
                pool.connection_kwargs.update(decode_responses=False, retry_on_timeout=False, retry=None)
                pool.connection_class(**pool.connection_kwargs)  # connects to nothing; but knows its options
                made.append(pool)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the URL has an option that redis-py does not take: {error}") from error
        threads, tasks = made
        # The pool's own default is another one in each version of the driver.
        most = int(dict(parse_qsl(parts.query)).get("max_connections", 100))
        if most < 1:
            raise ValueError(f"max_connections must be at least 1, not {most}")
        # One limit for the whole of an operation instead of one for each of its parts: that is cheaper.
        seconds = tasks.connection_kwargs["socket_timeout"] or self._timeout
        kwargs = {**tasks.connection_kwargs, "socket_timeout": None}
        self._port = Pool(threads.connection_class, threads.connection_kwargs, most, seconds)
        self._tasks = Loops(tasks.connection_class, kwargs, most, seconds)
        self._listener = Listener(lambda: redis.Redis(connection_pool=threads), self._channel, self._prefix)
        host = parts.hostname or ""
        self._at = f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def __repr__(self) -> str:
        return f"RedisStore({self._at!r}, prefix={self.prefix!r})"


class _ThreadStore(_Threads):
    """Through a client for threads."""

    def _open(self, where: Any) -> None:
        from resilient.stores._redis_bells import Listener

        self._client = where
        self._port = Client(_checked(where))
        self._listener = Listener(lambda: where, self._channel, self._prefix)

    def __repr__(self) -> str:
        return f"RedisStore(<{type(self._client).__module__}.{type(self._client).__name__}>, prefix={self.prefix!r})"


class _TaskStore(_Tasks):
    """Through a client for tasks."""

    def _open(self, where: Any) -> None:
        self._client = where
        self._tasks = TaskClient(_checked(where))

    def __repr__(self) -> str:
        return f"RedisStore(<{type(self._client).__module__}.{type(self._client).__name__}>, prefix={self.prefix!r})"


def _answer(op: Op[Any], reply: Any) -> Any:
    try:
        return decoded(op, reply)
    except StoreError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise StoreError(f"the server's answer makes no sense: {reply!r:.100}") from error


def _passed_over(answer: Any) -> Any:
    """Where many keys are looked at, one that holds no record of ours is no reason to stop; other errors are."""
    if not isinstance(answer, Exception):
        return answer
    if not str(answer).startswith(("the record is damaged", "the key holds")):
        raise answer
    return None


def _split(url: str) -> tuple[str, dict[str, str]]:
    """A URL without the options that are the store's own, and these."""
    base, _, query = url.partition("?")
    ours: dict[str, str] = {}
    rest: list[tuple[str, str]] = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in ("prefix", "timeout"):
            ours[name] = value
        else:
            rest.append((name, value))
    return f"{base}?{urlencode(rest)}" if rest else base, ours


def _number(name: str, value: str | float) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name} must be a number, not {value!r}") from None


def _is_async(client: Any) -> bool:
    run = getattr(client, "execute_command", None)
    if not callable(run) or not hasattr(client, "scan_iter"):
        raise TypeError(f"where must be a URL, or a client of redis-py or valkey-py, not {client!r}")
    return inspect.iscoroutinefunction(run) or ".asyncio." in f"{type(client).__module__}."


def _checked(client: Any) -> Any:
    get = getattr(client, "get_encoder", None)
    encoder = get() if get is not None else getattr(client, "encoder", None)
    if getattr(encoder, "decode_responses", False):
        raise ValueError("where must be a client without decode_responses: results are bytes")
    return client
