"""Bulkhead: at most `limit` calls at a time, whoever makes them.

One pool of slots serves threads, any number of asyncio loops and trio runs together, strictly in the order of asking.
A slot is never lost: not by an error, a cancellation, a timeout or an interrupt at any moment. The free path takes no
lock and costs about 1.5 closure calls; a slot costs 8 bytes. It does not limit rates (see `RateLimiter`), nor cut off
calls that hold a slot for ever (see `Timeout`). Safe from any thread, asyncio loop and trio run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resilient._park import Park
from resilient._stream import held_gen, held_stream
from resilient.errors import BulkheadFull, DeadlineExceeded, Rejected
from resilient.policy import SYSTEM, Policy, seconds, whole

if TYPE_CHECKING:
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["Bulkhead"]


class Bulkhead(Park, Policy):
    """Let `limit` calls run at a time; refuse the others with `BulkheadFull`, or let them queue.

    `queue` calls may wait, in strict order (0: none), each at most `max_wait` seconds (None: as long as it takes).
    Nobody waits past the ambient deadline: that raises `DeadlineExceeded`, since it is the caller's time that is over.
    A generator or a stream holds its slot from its first item until it is closed. `with bulkhead:` and
    `async with bulkhead:` guard a block; a block that enters again from inside needs a second slot.

    An interrupt at any moment (Ctrl-C, an asynchronous exception) leaves the pool of a decorated function whole.
    Blocks, generators and streams have the small gaps of every context manager written in Python: at entry and exit.

    >>> from resilient import Bulkhead
    >>> bulkhead = Bulkhead(2)
    >>> with bulkhead:
    ...     bulkhead.active, bulkhead.free
    (1, 1)
    """

    __slots__ = ("_env", "_spare", "limit", "max_wait", "name", "queue", "rejected")

    role = "bulkhead"

    def __init__(self, limit: int, *, queue: int = 0, max_wait: float | None = None, name: str | None = None) -> None:
        self.limit = whole("limit", limit)
        self.queue = whole("queue", queue, least=0)
        self.max_wait = None if max_wait is None else seconds("max_wait", max_wait, zero=True)
        if self.max_wait and not self.queue:
            raise ValueError(f"max_wait={max_wait!r} needs a queue: say how many calls may wait, as in queue={limit}")
        self.name = name
        self.rejected = 0
        self._env: Env | None = None
        # A slot that nobody has needed yet is a mere number: there are as many tokens as calls ever ran at once.
        super().__init__(1)
        self._spare = limit - 1

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._tokens) + self._spare

    @property
    def active(self) -> int:
        """Slots that are held."""
        return self.limit - self.free

    def describe(self) -> dict[str, Any]:
        """The settings."""
        return {"name": self.name, "limit": self.limit, "queue": self.queue, "max_wait": self.max_wait}

    # In both shells the free path is `del tokens[-1]`, not `tokens.pop()`: a call is where CPython may switch threads
    # or raise an interrupt, and one raised between the call and the `try` would lose the slot. From the look at the
    # queue to the first step inside `try` there is no call, so nobody overtakes and nothing is lost. On free-threaded
    # builds two threads may see the same last token, and one gets the IndexError. Giving back can be interrupted after
    # `append`; then `wake` runs once more, lest somebody sleeps on beside a free slot.

    def sync(self, call: Call, env: Env) -> Call:
        """Hold a slot during each call."""
        self._bind(env)

        def bulkhead(*args: Any, **kwargs: Any) -> Any:
            if self._waiters or not self._tokens:
                self._enter(env)
            else:
                try:
                    del self._tokens[-1]
                except IndexError:
                    self._enter(env)
            try:
                return call(*args, **kwargs)
            finally:
                try:
                    self._tokens.append(None)
                    if self._waiters:
                        self._wake()
                except BaseException:
                    self._wake()
                    raise

        return bulkhead

    def coro(self, call: Call, env: Env) -> Call:
        """Hold a slot during each call."""
        self._bind(env)

        async def bulkhead(*args: Any, **kwargs: Any) -> Any:
            if self._waiters or not self._tokens:
                await self._aenter(env)
            else:
                try:
                    del self._tokens[-1]
                except IndexError:
                    await self._aenter(env)
            try:
                return await call(*args, **kwargs)
            finally:
                try:
                    self._tokens.append(None)
                    if self._waiters:
                        self._wake()
                except BaseException:
                    self._wake()
                    raise

        return bulkhead

    def gen(self, call: Call, env: Env) -> Call:
        """Hold a slot from the first item until the generator is closed."""
        self._bind(env)
        held = _Held(self, env)
        return held_gen(call, lambda: held)

    def stream(self, call: Call, env: Env) -> Call:
        """Hold a slot from the first item until the stream is closed."""
        self._bind(env)
        held = _Held(self, env)
        return held_stream(call, lambda: held)

    def __enter__(self) -> Bulkhead:
        self._take(self._env or SYSTEM)
        return self

    def __exit__(self, *exc: object) -> None:
        self._give()

    async def __aenter__(self) -> Bulkhead:
        await self._atake(self._env or SYSTEM)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._give()

    def _bind(self, env: Env) -> None:
        # Blocks wait by the clock of the first function that was decorated, and tell its sinks.
        self._env = self._env or env

    def _take(self, env: Env) -> None:
        if self._waiters or not self._tokens:
            self._enter(env)
        else:
            try:
                del self._tokens[-1]
            except IndexError:
                self._enter(env)

    async def _atake(self, env: Env) -> None:
        if self._waiters or not self._tokens:
            await self._aenter(env)
        else:
            try:
                del self._tokens[-1]
            except IndexError:
                await self._aenter(env)

    def _give(self) -> None:
        self._tokens.append(None)
        self._wake()

    def _enter(self, env: Env) -> None:
        while self._spare:
            if self._grown():
                return
        left = self._left(env)
        wait = left if self.max_wait is None or (left is not None and left < self.max_wait) else self.max_wait
        entered = self._acquire(self.queue, env.clock, wait)
        if not entered:
            raise self._refused(env, DeadlineExceeded if entered is False and wait is left else BulkheadFull)

    async def _aenter(self, env: Env) -> None:
        while self._spare:
            if self._grown():
                return
        left = self._left(env)
        wait = left if self.max_wait is None or (left is not None and left < self.max_wait) else self.max_wait
        entered = await self._aacquire(self.queue, env.clock, wait)
        if not entered:
            raise self._refused(env, DeadlineExceeded if entered is False and wait is left else BulkheadFull)

    def _grown(self) -> bool:
        """Take a slot that nobody has needed yet, if there still is one."""
        with self._lock:
            if self._spare:
                self._spare -= 1
                self._tokens.append(None)
        # Not taken at once: an interrupt at the end of the lock would lose it. No call from here to the caller's `try`.
        try:
            del self._tokens[-1]
        except IndexError:
            return False
        return True

    def _left(self, env: Env) -> float | None:
        """The seconds until the ambient deadline, where waiting is allowed at all; else raise."""
        if not self.queue or self.max_wait == 0:
            raise self._refused(env, BulkheadFull)
        from resilient.timeout import remaining

        return remaining()

    def _refused(self, env: Env, kind: type[Rejected]) -> Rejected:
        with self._lock:
            self.rejected += 1
        name = self.name or "Bulkhead"
        error = kind(name)
        if env.sinks:
            from resilient.events import Refused

            env.emit(Refused(name, error))
        return error


class _Held:
    """A slot as a context manager, for generators and streams. It keeps nothing, so that one serves all."""

    __slots__ = ("_bulkhead", "_env")

    def __init__(self, bulkhead: Bulkhead, env: Env) -> None:
        self._bulkhead, self._env = bulkhead, env

    def __enter__(self) -> None:
        self._bulkhead._take(self._env)

    def __exit__(self, *exc: object) -> None:
        self._bulkhead._give()

    async def __aenter__(self) -> None:
        await self._bulkhead._atake(self._env)

    async def __aexit__(self, *exc: object) -> None:
        self._bulkhead._give()
