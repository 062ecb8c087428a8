"""RateLimiter: at most `rate` calls in `per` seconds, after a burst of `burst`; early callers are refused or wait.

The Generic Cell Rate Algorithm (ITU-T I.371 and the ATM Forum, in its form as a continuous leaky bucket; Brandur
Leach's `throttled` made it known for calls). Waiting is a reservation: each caller sleeps its own exact delay, so the
order is that of asking, with no queue and no herd. Never admits more than rate * t + burst in any t seconds. Costs some
two closure calls; no lock under a GIL. It does not limit how many run at a time (see `Bulkhead`).
Safe from any thread, asyncio loop and trio run.
"""

from __future__ import annotations

import sys
from threading import RLock
from typing import TYPE_CHECKING, Any

from aiolimiter import AsyncLimiter

from resilient._stream import opened_gen, opened_stream
from resilient.errors import DeadlineExceeded, RateLimited, Rejected
from resilient.policy import SYSTEM, Policy, seconds, whole

if TYPE_CHECKING:
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["RateLimiter"]

_INF = float("inf")

# The bucket is deeper than asked by a millionth of a permit, once, lest rounding refuse a call at its exact instant.
_GRAIN = 1e-6

# With a GIL, statements without a call are one step: CPython switches threads only at calls, backward jumps and
# function entry. Without one, the path that relies on that is closed, and every call takes the lock.
_ATOMIC: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


class _Bucket:
    """A bucket that each permit fills by one and that leaks `rate` a second.

    It held `level` at the instant `last`. A level above `burst` is made of reservations by those who wait.
    """

    # Not the single "theoretical arrival time" that I.371 proves to be the same: an instant loses digits as the clock
    # grows, and then a burst of ten becomes nine. A level does not.
    __slots__ = ("burst", "last", "level", "lock", "rate", "room")

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self.burst = float(burst)
        self.room = self.burst - 1.0 + _GRAIN if _ATOMIC else -1.0
        self.level: float = 0.0
        self.last: float = 0.0
        self.lock = RLock()

    def at(self, now: float) -> float:
        """The level at `now`."""
        with self.lock:
            level, last = self.level, self.last
        return max(0.0, level - max(0.0, now - last) * self.rate)

    def reserve(self, now: float, amount: float, patience: float) -> tuple[float, float]:
        """Reserve `amount`, unless that means to wait for more than `patience` seconds.

        The seconds to wait (more than `patience`: nothing is reserved), and the mark to give it back by.
        """
        with self.lock:
            # No call from the first look to the last store: see _ATOMIC. Another thread may have been here since this
            # one read the clock.
            if now < self.last:
                now = self.last
            level = self.level - (now - self.last) * self.rate
            if level < 0.0:
                level = 0.0
            level += amount
            delay = (level - self.burst) / self.rate if level > self.burst + _GRAIN else 0.0
            if delay <= patience:
                self.level = level
                self.last = now
        return delay, level

    def refund(self, mark: float, amount: float) -> None:
        """Give `amount` back, if nobody has reserved since; those behind have their delays already, and keep them."""
        with self.lock:
            # Each reservation stores a new float object, so that identity tells it from all others.
            if self.level is mark:
                self.level = mark - amount


class RateLimiter(Policy, AsyncLimiter):
    """Let `rate` calls through in `per` seconds; refuse a call that comes early with `RateLimited`, or let it wait.

    `burst` calls may come at once after a pause; it defaults to `rate`, rounded down, and at least 1, as an
    `aiolimiter.AsyncLimiter` has it. (So up to twice the rate can fall into one period: burst=1 spaces calls evenly.)
    `rate` may be a fraction; at most a thousand million calls a second make sense to a clock.

    A guarded function waits at most `max_wait` seconds for its turn: 0.0 refuses at once, None waits as long as it
    takes. A refusal reserves nothing and carries the exact `retry_after`: the first moment at which a new call would be
    accepted. Nobody waits past the ambient deadline: that raises `DeadlineExceeded`, at once, and reserves nothing.

    It is an `AsyncLimiter`, for code written for one: `await acquire(amount)`, `has_capacity(amount)`, `async with`,
    `max_rate`, `time_period`; `acquire_sync(amount)` and `with` are the same for threads. These wait as an
    `AsyncLimiter` does, as long as it takes, if `max_wait` is 0.0, the default; any other `max_wait` holds for them
    too. `try_acquire(amount)` never waits.

    Whoever is cancelled while it waits gives its reservation back, unless others have reserved behind it: then its
    turn passes unused, and the rate is kept rather than reached.

    >>> from resilient import RateLimiter
    >>> limiter = RateLimiter(2, per=60.0)
    >>> [limiter.try_acquire() for _ in range(3)]
    [True, True, False]
    """

    __slots__ = ("_bucket", "_env", "burst", "max_wait", "name", "rejected")

    role = "limiter"

    def __init__(
        self,
        rate: float,
        per: float = 1.0,
        *,
        burst: int | None = None,
        max_wait: float | None = 0.0,
        name: str | None = None,
    ) -> None:
        # Not AsyncLimiter.__init__: what that sets up belongs to one event loop.
        self.max_rate = seconds("rate", rate)
        self.time_period = seconds("per", per)
        self.burst = max(1, int(rate)) if burst is None else whole("burst", burst)
        self.max_wait = None if max_wait is None else seconds("max_wait", max_wait, zero=True)
        a_second = self.max_rate / self.time_period
        if not (a_second <= 1e9 and self.burst <= 1e15 and self.burst * self.time_period / self.max_rate < _INF):
            raise ValueError(
                f"rate={rate!r}, per={per!r}, burst={self.burst!r} is beyond what a clock can tell: "
                "at most 1e9 calls a second, in bursts of at most 1e15"
            )
        self.name = name
        self.rejected = 0
        self._env: Env | None = None
        self._bucket = _Bucket(a_second, self.burst)

    @staticmethod
    def adopt(limiter: AsyncLimiter) -> Policy:
        """A policy for coroutines that awaits `limiter`, an `aiolimiter.AsyncLimiter` that you share with other code.

        All the limits of an `AsyncLimiter` stay: one event loop, no threads, no trio. A `RateLimiter` is returned as it
        is.
        """
        if not isinstance(limiter, AsyncLimiter):
            raise TypeError(f"limiter must be an aiolimiter.AsyncLimiter, not {limiter!r}")
        return limiter if isinstance(limiter, RateLimiter) else _Adopted(limiter)

    @property
    def level(self) -> float:
        """Permits in use: 0.0 after a pause, `burst` when the next call is early, more when others wait already."""
        return self._bucket.at(self._here.clock.now())

    @property
    def available(self) -> float:
        """Permits that can be had at once."""
        return max(0.0, self.burst - self.level)

    def describe(self) -> dict[str, Any]:
        """The settings."""
        return {
            "name": self.name,
            "rate": self.max_rate,
            "per": self.time_period,
            "burst": self.burst,
            "max_wait": self.max_wait,
        }

    def sync(self, call: Call, env: Env) -> Call:
        """Take a permit before each call."""
        bucket, now = self._bound(env), env.clock.now

        def limiter(*args: Any, **kwargs: Any) -> Any:
            instant = now()
            level = bucket.level - (instant - bucket.last) * bucket.rate
            if level < 0.0:
                level = 0.0
            if level <= bucket.room:
                bucket.level = level + 1.0
                bucket.last = instant
            else:
                self._pass(env, 1, self.max_wait)
            return call(*args, **kwargs)

        return limiter

    def coro(self, call: Call, env: Env) -> Call:
        """Take a permit before each call."""
        bucket, now = self._bound(env), env.clock.now

        async def limiter(*args: Any, **kwargs: Any) -> Any:
            instant = now()
            level = bucket.level - (instant - bucket.last) * bucket.rate
            if level < 0.0:
                level = 0.0
            if level <= bucket.room:
                bucket.level = level + 1.0
                bucket.last = instant
            else:
                await self._apass(env, 1, self.max_wait)
            return await call(*args, **kwargs)

        return limiter

    def gen(self, call: Call, env: Env) -> Call:
        """Take a permit before the first item."""
        return opened_gen(call, lambda opening: self.sync(opening, env))

    def stream(self, call: Call, env: Env) -> Call:
        """Take a permit before the first item."""
        return opened_stream(call, lambda opening: self.coro(opening, env))

    # -- as an AsyncLimiter, and its like for threads ------------------------------------------------------------------

    def has_capacity(self, amount: float = 1) -> bool:
        """Whether `amount` could be had at once."""
        return self.level + amount <= self.burst + _GRAIN

    def try_acquire(self, amount: float = 1) -> bool:
        """Take `amount` permits if they can be had at once, and tell whether."""
        return self._bucket.reserve(self._here.clock.now(), self._checked(amount), 0.0)[0] <= 0.0

    async def acquire(self, amount: float = 1, *, max_wait: float | None = None) -> None:
        """Wait until `amount` permits are due.

        At most `max_wait` seconds (None: the limiter's own `max_wait`, or as long as it takes if that is 0.0); else
        `RateLimited`, at once. `ValueError` if `amount` is not from 0 to `burst`.
        """
        await self._apass(self._here, self._checked(amount), self._patience(max_wait))

    def acquire_sync(self, amount: float = 1, *, max_wait: float | None = None) -> None:
        """Block this thread until `amount` permits are due; else like `acquire`."""
        self._pass(self._here, self._checked(amount), self._patience(max_wait))

    async def __aenter__(self) -> None:
        await self._apass(self._here, 1, self._patience(None))

    async def __aexit__(self, *exc: object) -> None:
        pass

    def __enter__(self) -> None:
        self._pass(self._here, 1, self._patience(None))

    def __exit__(self, *exc: object) -> None:
        pass

    # -- the slow path -------------------------------------------------------------------------------------------------

    def _bound(self, env: Env) -> _Bucket:
        # Direct use goes by the clock of the first function that was decorated: a bucket knows one clock.
        self._env = self._env or env
        return self._bucket

    @property
    def _here(self) -> Env:
        return self._env or SYSTEM

    def _checked(self, amount: float) -> float:
        if not 0 <= amount <= self.burst:
            raise ValueError(f"amount must be a number from 0 to {self.burst} (the burst), not {amount!r}")
        return amount

    def _patience(self, max_wait: float | None) -> float | None:
        return (self.max_wait or None) if max_wait is None else seconds("max_wait", max_wait, zero=True)

    def _pass(self, env: Env, amount: float, max_wait: float | None) -> None:
        delay, mark = self._reserve(env, amount, max_wait)
        if delay:
            try:
                env.clock.sleep(delay)
            except BaseException:
                self._bucket.refund(mark, amount)
                raise

    async def _apass(self, env: Env, amount: float, max_wait: float | None) -> None:
        delay, mark = self._reserve(env, amount, max_wait)
        if delay:
            try:
                await env.clock.asleep(delay)
            except BaseException:
                self._bucket.refund(mark, amount)
                raise

    def _reserve(self, env: Env, amount: float, max_wait: float | None) -> tuple[float, float]:
        """A reservation and the seconds until it is due; or raise, with nothing reserved."""
        patience = longest = _INF if max_wait is None else max_wait
        if patience:
            from resilient.timeout import remaining

            left = remaining()
            if left is not None and left < patience:
                patience = left
        delay, mark = self._bucket.reserve(env.clock.now(), amount, patience)
        if delay > longest:
            raise self._refused(env, RateLimited, delay - longest)
        if delay > patience:
            raise self._refused(env, DeadlineExceeded, None)
        return delay, mark

    def _refused(self, env: Env, kind: type[Rejected], retry_after: float | None) -> Rejected:
        with self._bucket.lock:
            self.rejected += 1
        return _told(env, kind(self.name or "RateLimiter", retry_after))


class _Adopted(Policy):
    """Somebody else's `AsyncLimiter`, as a policy. The ambient deadline bounds its waits."""

    __slots__ = ("limiter", "name", "rejected")

    role = "limiter"

    def __init__(self, limiter: AsyncLimiter) -> None:
        self.limiter = limiter
        self.name: str | None = None
        self.rejected = 0

    def describe(self) -> dict[str, Any]:
        """The settings."""
        return {"name": self.name, "rate": self.limiter.max_rate, "per": self.limiter.time_period}

    def _advise(self, call: Call, env: Env) -> Call:
        rate, per = self.limiter.max_rate, self.limiter.time_period
        raise TypeError(f"an aiolimiter.AsyncLimiter guards coroutines only: use RateLimiter({rate!r}, {per!r})")

    sync = gen = _advise

    def coro(self, call: Call, env: Env) -> Call:
        """Await the limiter before each call."""

        async def limiter(*args: Any, **kwargs: Any) -> Any:
            await self._await(env)
            return await call(*args, **kwargs)

        return limiter

    def stream(self, call: Call, env: Env) -> Call:
        """Await the limiter before the first item."""
        return opened_stream(call, lambda opening: self.coro(opening, env))

    async def _await(self, env: Env) -> None:
        from resilient.timeout import remaining

        left = remaining()
        if left is None:
            await self.limiter.acquire()
            return
        from asyncio import timeout

        try:
            async with timeout(left):
                await self.limiter.acquire()
        except TimeoutError:
            self.rejected += 1
            raise _told(env, DeadlineExceeded(self.name or "AsyncLimiter")) from None


def _told(env: Env, error: Rejected) -> Rejected:
    if env.sinks:
        from resilient.events import Refused

        env.emit(Refused(error.policy, error))
    return error
