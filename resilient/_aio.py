"""All that is asked of an async library: a limit around an await, timers for many equal delays, a race.

Works under asyncio and trio, decided at each call. Cancellation keeps the semantics of `asyncio.timeout`: a cancel
from outside stays one, our own never leaks out, `task.cancelling()` ends as it began. Objects here belong to one
loop at a time except `Timers`, which keeps the loops of different threads apart.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from resilient._ambient import of_system
from resilient._stream import Opened
from resilient.clock import Clock, Timer, in_trio

if TYPE_CHECKING:
    import asyncio

__all__ = ["Queue", "Race", "Timers", "calm", "race_trio", "sheltered", "shielded", "together", "within"]

GRACE = 5.0
"""How many seconds a cancelled caller still waits for what must be said before it goes."""


class Queue:
    """Calls that all wait equally long, in one loop: their ends come in the order of their beginnings.

    `pending[key] = (until, target)` enters and `del pending[key]` leaves, in any order; one timer serves all. A key
    that is gone has had its end: `strike(target)`. With `tidy` the timer does not outlive the last of
    them: that costs a little, and keeps clocks of tests from jumping to an alarm that nobody needs.
    """

    __slots__ = ("_clock", "_strike", "_timer", "armed", "home", "pending", "tidy")

    def __init__(self, clock: Clock, strike: Callable[[Any], object], home: weakref.ref[Any]) -> None:
        self._clock, self._strike = clock, strike
        self._timer: Timer | None = None
        self.home = home
        self.tidy = not of_system(clock)
        self.armed = False
        self.pending: dict[Any, tuple[float, Any]] = {}

    def arm(self) -> None:
        """Set the timer for the first in line."""
        until, _ = next(iter(self.pending.values()))
        self.armed = True
        timer = self._clock.call_at(until, self._fire)
        # Kept only where it is needed: the handle holds the loop, and nothing here may keep a loop alive.
        if self.tidy:
            self._timer = timer

    def left(self, key: object) -> bool:
        """Leave, and tell whether `key` has been called back already."""
        fired = self.pending.pop(key, None) is None
        self.rest()
        return fired

    def rest(self) -> None:
        """Take the timer back if it is to be tidy and nobody waits."""
        if self._timer is not None and not self.pending:
            self._timer.cancel()
            self._timer, self.armed = None, False

    def _fire(self) -> None:
        now = self._clock.now()
        due: list[Any] = []
        for key, (until, _) in self.pending.items():
            if until > now:
                break
            due.append(key)
        for key in due:
            self._strike(self.pending.pop(key)[1])
        self.armed, self._timer = False, None
        if self.pending:
            self.arm()


class Timers:
    """One `Queue` for each running asyncio loop, for delays of one length by one clock."""

    __slots__ = ("_strike", "clock", "queues")

    def __init__(self, clock: Clock, strike: Callable[[Any], object]) -> None:
        self.clock, self._strike = clock, strike
        # By `id`, so that a look-up is one of the fastest there are; an entry goes when its loop goes.
        self.queues: dict[int, Queue] = {}

    def queue(self, loop: asyncio.AbstractEventLoop) -> Queue:
        """The queue of `loop`, made if there is none."""
        for key, queue in list(self.queues.items()):
            home = queue.home()
            if home is None or home.is_closed():
                self.queues.pop(key, None)
        key, queues = id(loop), self.queues
        queue = queues[key] = Queue(self.clock, self._strike, weakref.ref(loop, lambda _: queues.pop(key, None)))
        return queue


async def within(
    clock: Clock,
    until: float,
    late: Callable[[], BaseException],
    call: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Await `call(*args, **kwargs)` until the instant `until`; then cancel it, wait for its end, and raise `late()`.

    A call that swallows the cancellation and returns is heard: its value comes back.
    """
    if in_trio():
        return await _within_trio(clock, until, late, call, args, kwargs)
    return await _within_asyncio(clock, until, late, call, args, kwargs)


async def _within_asyncio(
    clock: Clock, until: float, late: Callable[[], BaseException], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    import asyncio

    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a time limit needs a task, and this coroutine runs outside of every task")
    before = task.cancelling()
    fired = False

    def fire() -> None:
        nonlocal fired
        fired = True
        task.cancel()

    timer = clock.call_at(until, fire)
    try:
        value = await call(*args, **kwargs)
    except BaseException as error:
        if fired:
            if not isinstance(error, Exception):
                if task.uncancel() <= before and isinstance(error, asyncio.CancelledError):
                    raise late() from error
            else:
                await calm(task)
        raise
    finally:
        timer.cancel()
    if fired:
        await calm(task)
    return value


async def shielded(call: Callable[..., Any], /, *args: Any) -> Any:
    """Await `call(*args)` to its end although the caller is cancelled, and however often; `GRACE` seconds at most.

    `TimeoutError` when those are over. Cancels that arrive meanwhile are not delivered: the caller is on its way out.
    """
    if in_trio():
        import trio

        with trio.CancelScope(shield=True, deadline=trio.current_time() + GRACE):
            return await call(*args)
        raise TimeoutError
    import asyncio

    loop = asyncio.get_running_loop()
    until = loop.time() + GRACE
    task = loop.create_task(call(*args))
    while not task.done() and loop.time() < until:
        try:
            await asyncio.wait([task], timeout=until - loop.time())
        except asyncio.CancelledError:
            pass
    if task.done():
        return task.result()
    task.cancel()
    raise TimeoutError


async def sheltered(
    cancelled: bool,
    grace: float,
    call: Callable[..., Any],
    /,
    *args: Any,
    late: Callable[[], object] | None = None,
) -> tuple[Any, bool]:
    """Await `call(*args)` to its end, cancelled or not; from the first cancel on (`cancelled`: from now on) for `grace`
    seconds more. What it returned, and whether a cancel came that is still to be raised (under trio, the scope does).

    When the grace is over, it is cancelled: `TimeoutError`. With `late`, that is called too, and what it still returns
    is heard, if it does not take longer than `GRACE`. It runs in a task of its own under asyncio.
    """
    if in_trio():
        return await _sheltered_trio(cancelled, grace, late, call, args), False
    import asyncio

    loop = asyncio.get_running_loop()
    until = loop.time() + grace if cancelled else math.inf
    came = over = False
    task = loop.create_task(call(*args))
    while not task.done():
        left = until - loop.time()
        if left <= 0:
            if over:
                break
            over = True
            task.cancel()
            if late is None:
                break
            late()
            until = loop.time() + GRACE
            continue
        try:
            await asyncio.wait([task], timeout=None if left == math.inf else left)
        except asyncio.CancelledError:
            came = True
            until = min(until, loop.time() + grace)
    if not task.done() or (over and task.cancelled()):
        raise TimeoutError
    return task.result(), came


async def _sheltered_trio(
    cancelled: bool, grace: float, late: Callable[[], object] | None, call: Callable[..., Any], args: Any
) -> Any:
    import trio

    value: Any = None
    failure: BaseException | None = None
    ended = trio.CancelScope(shield=True)

    async def watch() -> None:
        if not cancelled:
            with suppress(trio.Cancelled):
                await trio.sleep_forever()
        with ended:
            await trio.sleep(grace)
            if late is not None:
                late()
            scope.cancel()

    async with trio.open_nursery() as nursery:
        with trio.CancelScope(shield=True) as scope:
            nursery.start_soon(watch)
            try:
                value = await call(*args)
            except trio.Cancelled:
                raise
            except BaseException as error:
                failure = error
        # The watcher goes; and what cancels from outside is for the caller's next await.
        ended.cancel()
        nursery.cancel_scope.shield = True
        nursery.cancel_scope.cancel()
    if scope.cancelled_caught:
        raise TimeoutError
    if failure is not None:
        try:
            raise failure
        finally:
            del failure
    return value


async def together(calls: list[Callable[[], Awaitable[Any]]]) -> None:
    """Await all `calls` beside each other; as soon as one fails, cancel the others and wait for their ends.

    They say themselves how they ended; what they raise is not raised here. Cancelled itself, it cancels them all,
    waits, and is cancelled.
    """
    if in_trio():
        import trio

        try:
            async with trio.open_nursery() as nursery:

                async def run(call: Callable[[], Awaitable[Any]]) -> None:
                    try:
                        await call()
                    except trio.Cancelled:
                        raise
                    except BaseException:
                        nursery.cancel_scope.cancel()

                for call in calls:
                    nursery.start_soon(run, call)
        except BaseExceptionGroup:
            # Cancels, and nothing else: one is enough.
            await trio.lowlevel.checkpoint_if_cancelled()
        return
    import asyncio

    async def one(call: Callable[[], Awaitable[Any]]) -> None:
        await call()

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    cancelled = False
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError:
        cancelled = True
    for task in tasks:
        task.cancel()
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen
    if cancelled:
        raise asyncio.CancelledError


async def calm(task: asyncio.Task[Any]) -> None:
    """Take back a cancel of ours that the call has answered otherwise, so that nothing after it is cancelled."""
    import asyncio

    # Asked for in the very step in which the call returned, it is still to come (until Python 3.13).
    if task.uncancel() == 0 and getattr(task, "_must_cancel", False):
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            pass


async def _within_trio(
    clock: Clock, until: float, late: Callable[[], BaseException], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    import trio

    left = until - clock.now()
    with trio.CancelScope() as scope:
        if of_system(clock):
            scope.deadline = trio.current_time() + left
            return await call(*args, **kwargs)
        timer = clock.call_at(until, scope.cancel)
        try:
            return await call(*args, **kwargs)
        finally:
            timer.cancel()
    raise late()


class Race:
    """The attempts of one call under asyncio: the first in the caller's own task, further ones in tasks of their own.

    The caller awaits the first attempt and then hands over: `won(value)` or `lost(error)`. Whoever answers first wins;
    the others are cancelled and awaited before the caller goes on. An attempt that wins while the first one runs
    cancels the caller's await, with the same balance of `cancelling()` as a timeout.
    """

    def __init__(self, task: asyncio.Task[Any], call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.task, self.call, self.args, self.kwargs = task, call, args, kwargs
        self.context = copy_context()
        self.before = task.cancelling()
        self.begun = 0

    # Set when it comes to a race at all.
    over = interrupted = extra_won = False
    value: Any = None
    error: BaseException | None = None
    waiter: asyncio.Future[None] | None = None
    queue: Queue | None = None
    timer: Timer | None = None
    extras: set[asyncio.Task[Any]]
    spare: list[Any]

    def start(self) -> None:
        """Start another attempt."""
        if not self.begun:
            self.extras, self.spare = set(), []
        self.begun += 1
        extra = self.task.get_loop().create_task(self._attempt(), context=self.context.copy())
        self.extras.add(extra)
        extra.add_done_callback(self._ended)

    async def _attempt(self) -> Any:
        return await self.call(*self.args, **self.kwargs)

    def _ended(self, extra: asyncio.Task[Any]) -> None:
        self.extras.discard(extra)
        error = None if extra.cancelled() else extra.exception()
        if self.over:
            if error is None and not extra.cancelled():
                self.spare.append(extra.result())
            return
        if error is not None:
            if not isinstance(error, Exception):
                # Whatever is no failure of the call concerns the caller, at once.
                self.over, self.error = True, error
            elif self.error is None:
                self.error = error
        elif not extra.cancelled():
            self.over = self.extra_won = True
            self.value, self.error = extra.result(), None
        if self.waiter is not None:
            if (self.over or not self.extras) and not self.waiter.done():
                self.waiter.set_result(None)
        elif self.over:
            self.interrupted = True
            self.task.cancel()

    async def won(self, value: Any) -> Any:
        """The first attempt answered: settle, and return what the caller gets."""
        if self.interrupted:
            await calm(self.task)
        if self.over:
            self.spare.append(value)
        else:
            self.over, self.value = True, value
            self.error = None
        await self._reap()
        return self.result()

    async def lost(self, error: BaseException) -> bool:
        """The first attempt raised: settle. True if the caller raises `error`; else it returns `result()`."""
        import asyncio

        if isinstance(error, GeneratorExit):
            # The coroutine is being closed: nothing may be awaited any more.
            self.over = True
            for extra in self.extras:
                extra.cancel()
            return True
        outside = self.interrupted and self.task.uncancel() > self.before
        if self.interrupted:
            mine = outside or not isinstance(error, (asyncio.CancelledError, Exception))
        elif not isinstance(error, Exception):
            mine = True
        else:
            if self.error is None:
                self.error = error
            await self._others()
            mine = not self.over and self.error is error
            if mine:
                self.error = None
        if mine and self.extra_won:
            self.spare.append(self.value)
        await self._reap()
        return mine

    def result(self) -> Any:
        """The value that won, or the error that came first, raised. Once only, or it would be a reference cycle."""
        error, self.error = self.error, None
        if error is None:
            return self.value
        try:
            raise error
        finally:
            del error

    async def _others(self) -> None:
        """Wait until an attempt wins, or none is left."""
        if self.over or not self.extras:
            return
        self.waiter = self.task.get_loop().create_future()
        try:
            await self.waiter
        except BaseException:
            self.error = None
            if self.extra_won:
                self.spare.append(self.value)
            await self._reap()
            raise

    async def _reap(self) -> None:
        """Cancel whoever still runs, and wait for their ends, however often the caller is cancelled meanwhile."""
        import asyncio

        self.over = True
        cancelled = False
        for extra in self.extras:
            extra.cancel()
        while self.extras:
            try:
                await asyncio.wait(list(self.extras))
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            self.spare.append(self.value)
        for value in self.spare:
            await _discard(value)
        if cancelled:
            self.error = None
            raise asyncio.CancelledError


async def _discard(value: Any) -> None:
    """Close what nobody will read: the stream of an attempt that answered too late."""
    if type(value) is Opened:
        try:
            await value.source.aclose()
        except Exception:
            pass  # the errors of losers are nobody's


async def race_trio(
    call: Callable[..., Any], args: Any, kwargs: Any, more: Callable[[int], Awaitable[bool]]
) -> tuple[Any, bool]:
    """Race attempts under trio: the first at once, and number `n` when `await more(n)` says so, until it says no.

    Returns the first answer, and whether it is not the first attempt's. If all fail, the first error is raised.
    """
    import trio

    race = _TrioRace()
    try:
        async with trio.open_nursery() as nursery:
            race.nursery = nursery
            nursery.start_soon(race.attempt, 1, call, args, kwargs)
            number = 2
            while await more(number):
                race.running += 1
                nursery.start_soon(race.attempt, number, call, args, kwargs)
                number += 1
        for value in race.spare:
            await _discard(value)
        if race.error is not None:
            raise race.error
        return race.value, race.number > 1
    finally:
        del race.error


class _TrioRace:
    over = False
    value: Any = None
    number = 0
    running = 1
    error: BaseException | None
    nursery: Any

    def __init__(self) -> None:
        self.spare: list[Any] = []
        self.error = None

    async def attempt(self, number: int, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        import trio

        try:
            value = await call(*args, **kwargs)
        except trio.Cancelled:
            raise
        except BaseException as error:
            if not self.over:
                # Whatever is no failure of the call concerns the caller, at once.
                self.over = not isinstance(error, Exception)
                if self.over or self.error is None:
                    self.error = error
        else:
            if self.over:
                self.spare.append(value)
            else:
                self.over, self.error = True, None
                self.value, self.number = value, number
        self.running -= 1
        if self.over or not self.running:
            self.nursery.cancel_scope.cancel()
