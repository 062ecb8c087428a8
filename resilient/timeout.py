"""Limits of time: `Timeout` for a call, `deadline` for a block, and `remaining()` for whoever wants to know.

Promises: a coroutine is cancelled when its time is over and `CallTimeout` is raised once it has ended; a cancel from
outside stays one. A plain function cannot be stopped, so it must say whether it cooperates or runs in a thread. Does
not: kill threads. Costs under three closure calls for a cooperating function, a quarter of `asyncio.timeout()` for a
coroutine, a thread hand-over for `sync="thread"`. Safe from any thread, asyncio loop and trio run at once.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from resilient._ambient import ambient, deadline, nearest, of_system, remaining, system
from resilient._pace import Bound, Over, Pace
from resilient.errors import BulkheadFull, CallTimeout, DeadlineExceeded, Rejected
from resilient.policy import Policy, whole
from resilient.policy import seconds as checked

if TYPE_CHECKING:
    import asyncio

    from resilient._aio import Timers
    from resilient._threads import Job
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["Timeout", "deadline", "remaining"]


class Timeout(Policy):
    """Give each call `seconds`; then cut it off and raise `CallTimeout`.

    Coroutines are cancelled, and awaited until they have ended. Plain functions cannot be: choose

    - `sync="deadline"`: nothing is cut off, but `remaining()` and every policy inside obey. A result that comes late
      comes. A generator is stopped between two items.
    - `sync="thread"`: it runs in another thread with a copy of the context. The caller gets the result, or
      `CallTimeout` after `seconds`; the call then goes on as a *stray*. While `max_stray` of them run, calls are
      refused with `BulkheadFull`.

    Streams (async generators) may have `first`, the seconds until the first item, and `between`, the seconds until
    each further one. What the consumer does between two items counts for `seconds` only, which is for the whole.

    An ambient deadline that is nearer takes the place of `seconds`; if it is over, `DeadlineExceeded` is raised and
    the function is not called. Live numbers: `stray`, `timed_out`.
    """

    __slots__ = (
        "_lock",
        "_timers",
        "between",
        "first",
        "max_stray",
        "name",
        "seconds",
        "stray",
        "sync_mode",
        "timed_out",
    )

    role = "timeout"

    def __init__(
        self,
        seconds: float | None = None,
        *,
        sync: Literal["deadline", "thread"] | None = None,
        first: float | None = None,
        between: float | None = None,
        max_stray: int = 64,
        name: str | None = None,
    ) -> None:
        self.seconds = None if seconds is None else checked("seconds", seconds)
        self.first = None if first is None else checked("first", first)
        self.between = None if between is None else checked("between", between)
        if seconds is None and first is None and between is None:
            raise ValueError("Timeout needs seconds (for streams, first or between will do)")
        for parameter, value in (("first", first), ("between", between)):
            if seconds is not None and value is not None and value > seconds:
                raise ValueError(f"{parameter} must be at most seconds ({seconds!r}), not {value!r}")
        if sync not in (None, "deadline", "thread"):
            raise ValueError(f"sync must be 'deadline' or 'thread', not {sync!r}")
        self.sync_mode = sync
        self.max_stray = whole("max_stray", max_stray)
        self.name = name
        self.stray = 0
        self.timed_out = 0
        self._lock = threading.Lock()
        self._timers: Timers | None = None

    @property
    def total(self) -> float | None:
        """The limit of one call in seconds, for those who look at the order of policies."""
        return self.seconds

    def describe(self) -> dict[str, Any]:
        """The settings that matter, as plain data."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "sync": self.sync_mode,
            "first": self.first,
            "between": self.between,
        }

    # -- plain functions ---------------------------------------------------------------------------------------------

    def sync(self, call: Call, env: Env) -> Call:
        """Guard a plain function in the way that was chosen."""
        seconds = self._whole_seconds()
        if self.sync_mode is None:
            raise TypeError(
                "Timeout cannot cut off a plain function: say Timeout(..., sync='deadline') if it cooperates "
                "(remaining() and the policies inside obey), or sync='thread' to run it in another thread"
            )
        if self.sync_mode == "thread":
            return self._threaded(call, env, seconds)
        return self._cooperating(call, env, seconds)

    def _cooperating(self, call: Call, env: Env, seconds: float) -> Call:
        clock = env.clock
        now, obey = clock.now, self._obey
        if not of_system(clock):

            def foreign(*args: Any, **kwargs: Any) -> Any:
                return obey(env, seconds, call, args, kwargs)

            return foreign

        get, set_, reset = system.get, system.set, system.reset

        def timeout(*args: Any, **kwargs: Any) -> Any:
            until = now() + seconds
            if get() < until:
                return obey(env, seconds, call, args, kwargs)
            token = set_(until)
            try:
                return call(*args, **kwargs)
            finally:
                # Cheaper than to set the old value anew; and a plain function ends in the context that it began in.
                reset(token)

        return timeout

    def _obey(self, env: Env, seconds: float, call: Call, args: Any, kwargs: Any) -> Any:
        """Call under the nearer of `seconds` and the ambient deadline."""
        start = env.clock.now()
        outer = nearest(env.clock)
        if outer <= start:
            raise self._refused(env, DeadlineExceeded(self._label))
        if outer <= start + seconds:
            return call(*args, **kwargs)
        variable = ambient(env.clock)
        before = variable.get()
        variable.set(start + seconds)
        try:
            return call(*args, **kwargs)
        finally:
            variable.set(before)

    def _threaded(self, call: Call, env: Env, seconds: float) -> Call:
        from resilient._threads import Job, run

        clock = env.clock
        variable = ambient(clock)

        def timeout(*args: Any, **kwargs: Any) -> Any:
            start = clock.now()
            until = min(start + seconds, nearest(clock))
            if until <= start:
                raise self._refused(env, DeadlineExceeded(self._label))
            if self.stray >= self.max_stray:
                raise self._refused(env, BulkheadFull(self._label))
            context = copy_context()
            context.run(variable.set, until)
            ended = threading.Lock()
            ended.acquire()
            job = Job(call, args, kwargs, context, lambda job: self._ended(job, ended))
            run(job)
            try:
                in_time = clock.wait(lambda limit: ended.acquire(timeout=limit), until - start)
            except BaseException:
                self._abandon(job)
                raise
            if not in_time and self._abandon(job):
                raise self._late(env, until - start)
            return job.result()

        return timeout

    def _abandon(self, job: Job) -> bool:
        """Leave `job` to itself, unless it has just ended."""
        with self._lock:
            if job.over:
                return False
            job.stray = True
            self.stray += 1
            return True

    def _ended(self, job: Job, ended: threading.Lock) -> None:
        with self._lock:
            if job.stray:
                self.stray -= 1
        ended.release()

    # -- coroutines --------------------------------------------------------------------------------------------------

    def coro(self, call: Call, env: Env) -> Call:
        """Guard a coroutine function: cancelled when its time is over."""
        from asyncio import CancelledError, current_task, get_running_loop

        from resilient._aio import calm

        seconds = self._whole_seconds()
        timers = self._timers_of(env)
        queues, variable = timers.queues, ambient(env.clock)
        now, get, put = env.clock.now, variable.get, variable.set

        async def timeout(*args: Any, **kwargs: Any) -> Any:
            try:
                loop = get_running_loop()
            except RuntimeError:
                loop = None  # to go on from here would make that error the context of all that the call raises
            task = None if loop is None else current_task(loop)
            until = now() + seconds
            outer = get()
            if loop is None or task is None or outer < until:
                return await self._nearer(env, seconds, call, args, kwargs)
            queue = queues.get(id(loop)) or timers.queue(loop)
            key = object()
            before = task.cancelling()
            pending = queue.pending
            pending[key] = (until, task)
            if not queue.armed:
                queue.arm()
            put(until)
            try:
                value = await call(*args, **kwargs)
            except BaseException as error:
                if get() == until:  # else it is closed by the garbage collector, in somebody else's context
                    put(outer)
                if queue.left(key):
                    if not isinstance(error, Exception):
                        if task.uncancel() <= before and isinstance(error, CancelledError):
                            raise self._late(env, seconds) from error
                    else:
                        await calm(task)
                raise
            put(outer)
            try:
                del pending[key]
            except KeyError:
                await calm(task)  # cancelled by us, and it answered all the same
            if queue.tidy:
                queue.rest()
            return value

        return timeout

    async def _nearer(self, env: Env, seconds: float, call: Call, args: Any, kwargs: Any) -> Any:
        """Await under a timer of its own: in trio, or because the ambient deadline is nearer than `seconds`."""
        from resilient._aio import within

        start = env.clock.now()
        until = min(start + seconds, nearest(env.clock))
        if until <= start:
            raise self._refused(env, DeadlineExceeded(self._label))
        with Bound(ambient(env.clock), until):
            return await within(env.clock, until, partial(self._late, env, until - start), call, *args, **kwargs)

    def _timers_of(self, env: Env) -> Timers:
        from resilient._aio import Timers

        # One set for all functions by one clock; another clock (of a test) has its own.
        with self._lock:
            if self._timers is None:
                self._timers = Timers(env.clock, _cancel)
            return self._timers if self._timers.clock is env.clock else Timers(env.clock, _cancel)

    # -- generators and streams --------------------------------------------------------------------------------------

    def gen(self, call: Call, env: Env) -> Call:
        """Guard a generator function: it is stopped between two items."""
        if self.sync_mode != "deadline":
            raise TypeError(
                "Timeout cannot cut off a generator function: say Timeout(..., sync='deadline'), which stops it "
                "between two items, and lets remaining() and the policies inside obey"
            )

        def timeout(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            pace = Pace(self, env)
            source: Generator[Any, Any, Any] = call(*args, **kwargs)
            try:
                item = pace.pull(source, source.send, [None])
                while True:
                    try:
                        sent = yield item
                    except GeneratorExit:
                        source.close()
                        raise
                    except BaseException as error:
                        item = pace.pull(source, source.throw, [error])
                    else:
                        item = pace.pull(source, source.send, [sent])
            except Over as over:
                return over.value

        return timeout

    def stream(self, call: Call, env: Env) -> Call:
        """Guard an async generator function: each item has its limit, and all of them together."""

        async def timeout(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            pace = Pace(self, env)
            source: AsyncGenerator[Any, Any] = call(*args, **kwargs)
            try:
                item = await pace.fetch(source, source.asend, [None])
                while True:
                    try:
                        sent = yield item
                    except GeneratorExit:
                        await source.aclose()
                        raise
                    except BaseException as error:
                        item = await pace.fetch(source, source.athrow, [error])
                    else:
                        item = await pace.fetch(source, source.asend, [sent])
            except Over:
                return

        return timeout

    # -- what all of them share --------------------------------------------------------------------------------------

    @property
    def _label(self) -> str:
        return self.name or "timeout"

    def _whole_seconds(self) -> float:
        if self.seconds is None or self.first is not None or self.between is not None:
            raise TypeError(
                "first and between are limits for the items of a stream or generator: "
                "give a function that returns once Timeout(seconds)"
            )
        return self.seconds

    def _late(self, env: Env, seconds: float) -> CallTimeout:
        with self._lock:
            self.timed_out += 1
        if env.sinks:
            from resilient.events import TimedOut

            env.emit(TimedOut(self._label, seconds))
        return CallTimeout(self._label, seconds)

    def _refused(self, env: Env, error: Rejected) -> Rejected:
        if env.sinks:
            from resilient.events import Refused

            env.emit(Refused(self._label, error))
        return error


def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
