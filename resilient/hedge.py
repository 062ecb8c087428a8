"""Hedge: when an answer is late, ask once more, and take whichever comes first.

Promises: an extra attempt starts only while the others have not answered; the first success wins; losers are cancelled
and awaited, also when the caller is cancelled. Does not: repeat failures (that is Retry's work), or make a call safe to
run twice. Costs about half an `asyncio.timeout()` when the first answer is quick; a thread hand-over for plain
functions. Safe from any thread, asyncio loop and trio run at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from resilient._ambient import ambient, nearest
from resilient._latency import Latencies, Quantile
from resilient._stream import Opened, opened_gen, opened_stream
from resilient.policy import Policy, whole
from resilient.policy import seconds as checked

if TYPE_CHECKING:
    from queue import SimpleQueue

    from resilient._aio import Race, Timers
    from resilient._threads import Job
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["Hedge", "Quantile"]


class Hedge(Policy):
    """Start another attempt when there is no answer `after` seconds, and up to `extra` of them, `after` apart.

    `after` is a number of seconds, or a `Quantile` of the latencies seen. The first success wins. An attempt that fails
    leaves the others going; if all have failed, the error that came first comes out. A failure before `after` is raised
    at once: no extra attempt starts for it. No attempt starts when the ambient deadline is over.

    The function runs twice at a time: say `idempotent=True` if it may. Under asyncio the first attempt runs in the
    caller's task, further ones in tasks of their own, each with a copy of the context; under trio all have their own.

    Plain functions cannot be cancelled: with `sync="thread"` they run in threads, and losers go on as *strays* until
    they end. While there are `max_stray` of them, calls are not hedged. Generators and streams race until their first
    item; the losers' ones are closed.

    Live numbers: `started` (extra attempts), `won` (by an extra attempt), `stray`, `delay`.
    """

    __slots__ = (
        "_fixed",
        "_latencies",
        "_lock",
        "_timers",
        "after",
        "extra",
        "idempotent",
        "max_stray",
        "name",
        "started",
        "stray",
        "sync_mode",
        "won",
    )

    role = "hedge"

    def __init__(
        self,
        after: float | Quantile,
        *,
        extra: int = 1,
        idempotent: bool = False,
        sync: Literal["thread"] | None = None,
        max_stray: int = 64,
        name: str | None = None,
    ) -> None:
        self._fixed: float | None = None if isinstance(after, Quantile) else checked("after", after)
        self.after = after if isinstance(after, Quantile) else self._fixed
        self.extra = whole("extra", extra)
        if not isinstance(idempotent, bool):
            raise TypeError(f"idempotent must be a bool, not {idempotent!r}")
        if sync not in (None, "thread"):
            raise ValueError(f"sync must be 'thread', not {sync!r}")
        self.idempotent = idempotent
        self.sync_mode = sync
        self.max_stray = whole("max_stray", max_stray)
        self.name = name
        self.started = self.won = self.stray = 0
        self._latencies = Latencies(after) if isinstance(after, Quantile) else None
        self._lock = threading.Lock()
        self._timers: Timers | None = None

    @property
    def delay(self) -> float | None:
        """The present delay in seconds; None while it is to be learned yet."""
        return self._fixed if self._latencies is None else self._latencies.delay

    def describe(self) -> dict[str, Any]:
        """The settings that matter, as plain data."""
        return {
            "name": self.name,
            "after": self.after,
            "extra": self.extra,
            "idempotent": self.idempotent,
            "sync": self.sync_mode,
        }

    # -- coroutines --------------------------------------------------------------------------------------------------

    def coro(self, call: Call, env: Env) -> Call:
        """Guard a coroutine function."""
        from asyncio import current_task, get_running_loop

        from resilient._aio import Race

        if self._latencies is not None:
            call = self._atimed(call, env, self._latencies)
        timers = self._timers_of(env)

        async def hedge(*args: Any, **kwargs: Any) -> Any:
            try:
                task = current_task(get_running_loop())
            except RuntimeError:
                task = None
            if task is None:
                return await self._in_trio(env, call, args, kwargs)
            delay = self.delay
            if delay is None:
                return await call(*args, **kwargs)
            race = Race(task, call, args, kwargs)
            self._plan(env, timers, race, delay)
            try:
                value = await call(*args, **kwargs)
            except BaseException as error:
                self._unplan(race)
                if not race.begun or await race.lost(error):
                    raise
                self._count(race.extra_won)
                return race.result()
            self._unplan(race)
            if not race.begun:
                return value
            value = await race.won(value)
            self._count(race.extra_won)
            return value

        return hedge

    def _plan(self, env: Env, timers: Timers, race: Race, delay: float) -> None:
        """Have `_more` called in `delay` seconds."""
        until = env.clock.now() + delay
        again = partial(self._more, env, timers, race, delay)
        if self._latencies is not None:
            race.timer = env.clock.call_at(until, again)
            return
        loop = race.task.get_loop()
        race.queue = queue = timers.queues.get(id(loop)) or timers.queue(loop)
        queue.pending[race] = (until, again)
        if not queue.armed:
            queue.arm()

    def _unplan(self, race: Race) -> None:
        if race.timer is not None:
            race.timer.cancel()
        else:
            assert race.queue is not None
            race.queue.left(race)

    def _more(self, env: Env, timers: Timers, race: Race, delay: float) -> None:
        """No answer yet: start another attempt, and plan the next one."""
        # Once an attempt has failed or won, the caller is awake and has called this off, or is about to.
        if race.over or race.context.run(nearest, env.clock) <= env.clock.now():
            return
        race.start()
        self._tell(env, race.begun + 1, delay * race.begun)
        if race.begun < self.extra:
            self._plan(env, timers, race, delay)

    async def _in_trio(self, env: Env, call: Call, args: Any, kwargs: Any) -> Any:
        from resilient._aio import race_trio
        from resilient.clock import in_trio

        if not in_trio():
            raise RuntimeError("Hedge needs a task of asyncio or trio, and this coroutine runs outside of every task")
        delay, until = self.delay, nearest(env.clock)
        if delay is None:
            return await call(*args, **kwargs)

        async def more(number: int) -> bool:
            if number > self.extra + 1:
                return False
            await env.clock.asleep(delay)
            if env.clock.now() >= until:
                return False
            self._tell(env, number, delay * (number - 1))
            return True

        value, by_extra = await race_trio(call, args, kwargs, more)
        self._count(by_extra)
        return value

    def _timers_of(self, env: Env) -> Timers:
        from resilient._aio import Timers

        with self._lock:
            if self._timers is None:
                self._timers = Timers(env.clock, _call)
            return self._timers if self._timers.clock is env.clock else Timers(env.clock, _call)

    def stream(self, call: Call, env: Env) -> Call:
        """Guard an async generator function until its first item."""
        return opened_stream(call, lambda opening: self.coro(opening, env))

    # -- plain functions ---------------------------------------------------------------------------------------------

    def sync(self, call: Call, env: Env) -> Call:
        """Guard a plain function, in threads."""
        if self.sync_mode != "thread":
            raise TypeError(
                "Hedge runs a plain function or generator in threads, and cannot cancel the loser: "
                "say Hedge(..., sync='thread') if that is right, or make the function async"
            )
        if self._latencies is not None:
            call = self._timed(call, env, self._latencies)

        def hedge(*args: Any, **kwargs: Any) -> Any:
            delay = self.delay
            if delay is None or self.stray >= self.max_stray:
                return call(*args, **kwargs)
            race = _ThreadRace(self, env, call, args, kwargs)
            try:
                return race.run(delay)
            finally:
                race.leave()

        return hedge

    def gen(self, call: Call, env: Env) -> Call:
        """Guard a generator function until its first item, in threads."""
        return opened_gen(call, lambda opening: self.sync(opening, env))

    # -- what both share ---------------------------------------------------------------------------------------------

    def _timed(self, call: Call, env: Env, latencies: Latencies) -> Call:
        now = env.clock.now

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                value = call(*args, **kwargs)
            except BaseException as error:
                latencies.failed(start, now(), error)
                raise
            latencies.add(start, now())
            return value

        return timed

    def _atimed(self, call: Call, env: Env, latencies: Latencies) -> Call:
        now = env.clock.now

        async def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                value = await call(*args, **kwargs)
            except BaseException as error:
                latencies.failed(start, now(), error)
                raise
            latencies.add(start, now())
            return value

        return timed

    def _tell(self, env: Env, attempt: int, after: float) -> None:
        with self._lock:
            self.started += 1
        if env.sinks:
            from resilient.events import Hedged

            env.emit(Hedged(self.name or "hedge", attempt, after))

    def _count(self, by_extra: bool) -> None:
        if by_extra:
            with self._lock:
                self.won += 1


def _call(again: Callable[[], object]) -> None:
    again()


class _ThreadRace:
    """The attempts of one call in threads."""

    def __init__(self, hedge: Hedge, env: Env, call: Call, args: Any, kwargs: Any) -> None:
        from queue import SimpleQueue

        self.hedge, self.env, self.call, self.args, self.kwargs = hedge, env, call, args, kwargs
        self.until = nearest(env.clock)
        self.finished: SimpleQueue[Job] = SimpleQueue()
        self.running: set[Job] = set()

    def run(self, delay: float) -> Any:
        """The first answer, or the first error if there is none."""
        hedge, clock = self.hedge, self.env.clock
        first = self._start()
        failed: Job | None = None
        began = clock.now()
        begun = 0
        while True:
            due = began + delay * (begun + 1)
            more = begun < hedge.extra and due < self.until
            arrived: list[Job] = []
            if not clock.wait(partial(self._arrived, arrived), due - clock.now() if more else None):
                begun += 1
                hedge._tell(self.env, begun + 1, due - began)
                self._start()
                continue
            job = arrived.pop()
            if not isinstance(job.error, Exception):
                if failed is not None:
                    failed.error = None
                hedge._count(job.error is None and job is not first)
                return job.result()
            if failed is None:
                failed = job
            else:
                job.error = None
            if not self.running:
                return failed.result()

    def leave(self) -> None:
        """Let go of the attempts that still run: strays from now on."""
        with self.hedge._lock:
            late: list[Job] = []
            while not self.finished.empty():
                late.append(self.finished.get())
            self.running.difference_update(late)
            for job in self.running:
                job.stray = True
            self.hedge.stray += len(self.running)
            self.running.clear()
        for job in late:
            _discard(job)

    def _start(self) -> Job:
        from resilient._threads import Job, run

        context = copy_context()
        context.run(ambient(self.env.clock).set, self.until)
        job = Job(self.call, self.args, self.kwargs, context, partial(_ended, self.hedge, self.finished))
        run(job)
        self.running.add(job)
        return job

    def _arrived(self, arrived: list[Job], limit: float) -> bool:
        """Wait `limit` seconds (-1: without end) for an attempt to end."""
        from queue import Empty

        try:
            job = self.finished.get(timeout=None if limit < 0 else limit)
        except Empty:
            return False
        self.running.discard(job)
        arrived.append(job)
        return True


def _ended(hedge: Hedge, finished: SimpleQueue[Job], job: Job) -> None:
    """In the thread of `job`: report, or clean up if nobody waits any more."""
    with hedge._lock:
        stray = job.stray
        if stray:
            hedge.stray -= 1
        else:
            finished.put(job)
    if stray:
        _discard(job)


def _discard(job: Job) -> None:
    job.error = None
    if type(job.value) is Opened:
        try:
            job.value.source.close()
        except Exception:
            pass  # the errors of losers are nobody's
