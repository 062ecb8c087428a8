"""Guards written by hand: what the same protection costs with no library at all.

"In one frame" means that all of it is written out in one function, as nobody would by hand. It is what an ideal
compiler of policies could reach. "lock" counts slots under a lock; "tokens" takes them from a list, which is atomic
under the GIL.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextvars import ContextVar
from typing import Any

from benchmarks.cases import BY_HAND, Build, Case, Decorator, Function, Options


class Refused(Exception):
    """The guard did not let the call in."""


class Broken(Refused):
    """The circuit is open."""


class _State:
    """What a breaker, a limiter and a bulkhead remember."""

    __slots__ = ("failures", "lock", "open_until", "tat", "tokens", "used")

    def __init__(self, options: Options) -> None:
        self.failures = 0
        self.open_until = 0.0
        self.used = 0
        self.tat = 0.0
        self.lock = threading.Lock()
        self.tokens = [None] * options.limit


def bare(options: Options) -> Decorator:
    """Nothing: the floor."""
    return lambda fn: fn


def closure(options: Options) -> Decorator:
    """One call that passes everything through: the unit in which all else is told."""

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        return guarded

    return decorate


def closure_async(options: Options) -> Decorator:
    """One coroutine that passes everything through."""

    def decorate(call: Function) -> Function:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            return await call(*args, **kwargs)

        return guarded

    return decorate


# -- plain functions -------------------------------------------------------------------------------------------------


def retry(options: Options) -> Decorator:
    """Try again after an error."""
    attempts, wait = options.attempts, options.wait

    def decorate(call: Function) -> Function:
        def again(args: Any, kwargs: Any) -> Any:
            for attempt in range(2, attempts + 1):
                if wait:
                    time.sleep(wait)
                try:
                    return call(*args, **kwargs)
                except Exception:
                    if attempt == attempts:
                        raise
            raise AssertionError("unreachable")

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception:
                if attempts == 1:
                    raise
            return again(args, kwargs)

        return guarded

    return decorate


def breaker(options: Options) -> Decorator:
    """Open after failures in a row; let calls in again after the cooldown."""
    state = _State(options)
    failures, cooldown = options.failures, options.cooldown

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if state.open_until and time.monotonic() < state.open_until:
                raise Broken
            try:
                value = call(*args, **kwargs)
            except Exception:
                with state.lock:
                    state.failures += 1
                    if state.failures >= failures:
                        state.open_until = time.monotonic() + cooldown
                raise
            if state.failures:
                with state.lock:
                    state.failures = 0
                    state.open_until = 0.0
            return value

        return guarded

    return decorate


def bulkhead_semaphore(options: Options) -> Decorator:
    """A `threading.BoundedSemaphore` that refuses."""
    semaphore = threading.BoundedSemaphore(options.limit)

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if not semaphore.acquire(blocking=False):
                raise Refused
            try:
                return call(*args, **kwargs)
            finally:
                semaphore.release()

        return guarded

    return decorate


def bulkhead_lock(options: Options) -> Decorator:
    """A counter under a lock."""
    state, limit = _State(options), options.limit
    lock = state.lock

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with lock:
                if state.used >= limit:
                    raise Refused
                state.used += 1
            try:
                return call(*args, **kwargs)
            finally:
                with lock:
                    state.used -= 1

        return guarded

    return decorate


def bulkhead_tokens(options: Options) -> Decorator:
    """A list of tokens, without a lock."""
    tokens = _State(options).tokens
    pop, append = tokens.pop, tokens.append

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                pop()
            except IndexError:
                raise Refused from None
            try:
                return call(*args, **kwargs)
            finally:
                append(None)

        return guarded

    return decorate


def rate_limit(options: Options) -> Decorator:
    """GCRA under a lock."""
    state, now = _State(options), time.monotonic
    lock, interval = state.lock, options.per / options.calls
    slack = options.per - interval

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            at = now()
            with lock:
                tat = state.tat if state.tat > at else at
                if tat - at > slack:
                    raise Refused
                state.tat = tat + interval
            return call(*args, **kwargs)

        return guarded

    return decorate


_until: ContextVar[float] = ContextVar("until", default=float("inf"))


def remaining() -> float:
    """The seconds left by the deadline of `deadline`."""
    return _until.get() - time.monotonic()


def deadline(options: Options) -> Decorator:
    """A deadline in a context variable."""
    seconds, now = options.seconds, time.monotonic
    get, put, reset = _until.get, _until.set, _until.reset

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            until = now() + seconds
            outer = get()
            token = put(until if until < outer else outer)
            try:
                return call(*args, **kwargs)
            finally:
                reset(token)

        return guarded

    return decorate


def timeout_pool(options: Options) -> Decorator:
    """`ThreadPoolExecutor.submit(...).result(timeout)`."""
    from concurrent.futures import ThreadPoolExecutor

    pool, seconds = ThreadPoolExecutor(8), options.seconds

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return pool.submit(call, *args, **kwargs).result(seconds)

        return guarded

    return decorate


def fallback(options: Options) -> Decorator:
    """A default in place of an error."""
    default = options.default

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception:
                return default

        return guarded

    return decorate


def stack_of_three_lock(options: Options) -> Decorator:
    """Retry, breaker and bulkhead in one frame; slots counted under a lock."""
    state = _State(options)
    lock, limit, attempts, wait = state.lock, options.limit, options.attempts, options.wait
    failures, cooldown = options.failures, options.cooldown

    def decorate(call: Function) -> Function:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            attempt = 1
            while True:
                try:
                    if state.open_until and time.monotonic() < state.open_until:
                        raise Broken
                    with lock:
                        if state.used >= limit:
                            raise Refused
                        state.used += 1
                    try:
                        value = call(*args, **kwargs)
                    except Exception:
                        with lock:
                            state.failures += 1
                            if state.failures >= failures:
                                state.open_until = time.monotonic() + cooldown
                        raise
                    finally:
                        with lock:
                            state.used -= 1
                    if state.failures:
                        with lock:
                            state.failures = 0
                            state.open_until = 0.0
                    return value
                except Exception:
                    if attempt == attempts:
                        raise
                attempt += 1
                if wait:
                    time.sleep(wait)

        return guarded

    return decorate


def _one_frame(options: Options, *, five: bool) -> Decorator:
    """Retry, breaker, bulkhead (with five: rate limit and deadline too) in one frame, slots from a list of tokens."""
    state, now = _State(options), time.monotonic
    tokens, attempts, wait = state.tokens, options.attempts, options.wait
    failures, cooldown = options.failures, options.cooldown
    pop, append = tokens.pop, tokens.append
    seconds, get, put, reset = options.seconds, _until.get, _until.set, _until.reset
    interval = options.per / options.calls
    slack = options.per - interval

    def failed() -> None:
        with state.lock:
            state.failures += 1
            if state.failures >= failures:
                state.open_until = now() + cooldown

    def worked() -> None:
        with state.lock:
            state.failures = 0
            state.open_until = 0.0

    def decorate(call: Function) -> Function:
        def three(*args: Any, **kwargs: Any) -> Any:
            attempt = 1
            while True:
                try:
                    if state.open_until and now() < state.open_until:
                        raise Broken
                    try:
                        pop()
                    except IndexError:
                        raise Refused from None
                    try:
                        value = call(*args, **kwargs)
                    except Exception:
                        failed()
                        raise
                    finally:
                        append(None)
                    if state.failures:
                        worked()
                    return value
                except Exception:
                    if attempt == attempts:
                        raise
                attempt += 1
                if wait:
                    time.sleep(wait)

        def all_five(*args: Any, **kwargs: Any) -> Any:
            attempt = 1
            while True:
                try:
                    if state.open_until and now() < state.open_until:
                        raise Broken
                    at = now()
                    tat = state.tat
                    if tat < at:
                        tat = at
                    if tat - at > slack:
                        raise Refused
                    state.tat = tat + interval
                    try:
                        pop()
                    except IndexError:
                        raise Refused from None
                    until = at + seconds
                    outer = get()
                    token = put(until if until < outer else outer)
                    try:
                        value = call(*args, **kwargs)
                    except Exception:
                        failed()
                        raise
                    finally:
                        reset(token)
                        append(None)
                    if state.failures:
                        worked()
                    return value
                except Exception:
                    if attempt == attempts:
                        raise
                attempt += 1
                if wait:
                    time.sleep(wait)

        return all_five if five else three

    return decorate


def stack_of_three(options: Options) -> Decorator:
    """Retry, breaker and bulkhead in one frame."""
    return _one_frame(options, five=False)


def stack_of_five(options: Options) -> Decorator:
    """Retry, breaker, rate limit, bulkhead and deadline in one frame."""
    return _one_frame(options, five=True)


# -- coroutines ------------------------------------------------------------------------------------------------------


def bulkhead_asyncio(options: Options) -> Decorator:
    """An `asyncio.Semaphore`, which waits."""
    semaphore = asyncio.Semaphore(options.limit)

    def decorate(call: Function) -> Function:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            async with semaphore:
                return await call(*args, **kwargs)

        return guarded

    return decorate


def timeout_asyncio(options: Options) -> Decorator:
    """`async with asyncio.timeout(...)`: the unit in which async stacks with a timeout are told."""
    seconds = options.seconds

    def decorate(call: Function) -> Function:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            async with asyncio.timeout(seconds):
                return await call(*args, **kwargs)

        return guarded

    return decorate


def timeout_wait_for(options: Options) -> Decorator:
    """`asyncio.wait_for`."""
    seconds = options.seconds

    def decorate(call: Function) -> Function:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.wait_for(call(*args, **kwargs), seconds)

        return guarded

    return decorate


def _one_frame_async(options: Options, *, five: bool) -> Decorator:
    """The same with plain integers, which one loop needs no lock for."""
    state, now = _State(options), time.monotonic
    attempts, wait, limit = options.attempts, options.wait, options.limit
    failures, cooldown, seconds = options.failures, options.cooldown, options.seconds
    interval = options.per / options.calls
    slack = options.per - interval

    def failed() -> None:
        state.failures += 1
        if state.failures >= failures:
            state.open_until = now() + cooldown

    def decorate(call: Function) -> Function:
        async def three(*args: Any, **kwargs: Any) -> Any:
            attempt = 1
            while True:
                try:
                    if state.open_until and now() < state.open_until:
                        raise Broken
                    if state.used >= limit:
                        raise Refused
                    state.used += 1
                    try:
                        value = await call(*args, **kwargs)
                    except Exception:
                        failed()
                        raise
                    finally:
                        state.used -= 1
                    if state.failures:
                        state.failures = 0
                        state.open_until = 0.0
                    return value
                except Exception:
                    if attempt == attempts:
                        raise
                attempt += 1
                if wait:
                    await asyncio.sleep(wait)

        async def all_five(*args: Any, **kwargs: Any) -> Any:
            attempt = 1
            while True:
                try:
                    if state.open_until and now() < state.open_until:
                        raise Broken
                    at = now()
                    tat = state.tat
                    if tat < at:
                        tat = at
                    if tat - at > slack:
                        raise Refused
                    state.tat = tat + interval
                    if state.used >= limit:
                        raise Refused
                    state.used += 1
                    try:
                        async with asyncio.timeout(seconds):
                            value = await call(*args, **kwargs)
                    except Exception:
                        failed()
                        raise
                    finally:
                        state.used -= 1
                    if state.failures:
                        state.failures = 0
                        state.open_until = 0.0
                    return value
                except Exception:
                    if attempt == attempts:
                        raise
                attempt += 1
                if wait:
                    await asyncio.sleep(wait)

        return all_five if five else three

    return decorate


def stack_of_three_async(options: Options) -> Decorator:
    """Retry, breaker and bulkhead in one frame."""
    return _one_frame_async(options, five=False)


def stack_of_five_async(options: Options) -> Decorator:
    """Retry, breaker, rate limit, bulkhead and `asyncio.timeout` in one frame."""
    return _one_frame_async(options, five=True)


def _sync(group: str, build: Build, variant: str = "") -> Case:
    return Case(BY_HAND, group, "sync", build, variant)


def _async(group: str, build: Build, variant: str = "") -> Case:
    return Case(BY_HAND, group, "async", build, variant)


CASES = [
    Case("bare call", "reference", "sync", bare),
    Case("closure", "reference", "sync", closure),
    Case("bare call", "reference", "async", bare),
    Case("closure", "reference", "async", closure_async),
    Case("asyncio.timeout", "reference", "async", timeout_asyncio),
    _sync("retry", retry),
    _sync("breaker", breaker),
    _sync("bulkhead", bulkhead_semaphore, "BoundedSemaphore"),
    _sync("bulkhead", bulkhead_lock, "lock"),
    _sync("bulkhead", bulkhead_tokens, "tokens"),
    _sync("rate limit", rate_limit, "lock"),
    _sync("deadline", deadline),
    _sync("timeout", timeout_pool, "ThreadPoolExecutor"),
    _sync("fallback", fallback),
    _sync("stack of three", stack_of_three_lock, "one frame, lock"),
    _sync("stack of three", stack_of_three, "one frame, tokens"),
    _sync("stack of five", stack_of_five, "one frame, tokens, deadline"),
    _async("bulkhead", bulkhead_asyncio, "asyncio.Semaphore"),
    _async("timeout", timeout_asyncio, "asyncio.timeout"),
    _async("timeout", timeout_wait_for, "asyncio.wait_for"),
    _async("stack of three", stack_of_three_async, "one frame"),
    _async("stack of five", stack_of_five_async, "one frame, asyncio.timeout"),
]
