"""Proof that a candidate does its work, before anybody times how fast it does it.

Each check makes a guard of its own, with settings that bring its limit within reach, and returns what is wrong, or
None. The checks are lenient: they ask whether a guard guards, not whether it does so well.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from benchmarks.cases import Build, Case, Mode, Options
from benchmarks.harness import plain

Call = Callable[..., Any]
"""A guarded function, always as a coroutine function, so that one check serves both modes."""


class Trouble(Exception):
    """What the guarded functions raise."""


def check(case: Case) -> str | None:
    """What is wrong with the guard, or None."""
    checks = [_CHECKS[name] for name in _PARTS.get(case.group, (case.group,)) if name in _CHECKS]
    for work in checks:
        if "four" in case.variant and work is _rate_limit:
            continue
        if "deadline" in case.variant and work is _timeout:
            continue
        if case.mode == "sync" and work is not _bulkhead:
            wrong = plain(work(case.build, "sync"))
        elif case.mode == "sync":
            wrong = _bulkhead_sync(case.build)
        else:
            wrong = asyncio.run(work(case.build, "async"))
        if wrong is not None:
            return wrong
    return None


def _guard(build: Build, mode: Mode, options: Options, body: Callable[[], float]) -> Call:
    """Guard a function that calls `body`, then sleeps for as long as it says."""
    if mode == "async":

        async def work(x: int = 0) -> str:
            nap = body()
            if nap:
                await asyncio.sleep(nap)
            return "done"

        return build(options)(work)

    def work_sync(x: int = 0) -> str:
        nap = body()
        if nap:
            time.sleep(nap)
        return "done"

    guarded = build(options)(work_sync)

    async def call(*args: Any, **kwargs: Any) -> Any:
        return guarded(*args, **kwargs)

    return call


async def _retry(build: Build, mode: Mode) -> str | None:
    calls = 0

    def body() -> float:
        nonlocal calls
        calls += 1
        if calls < 2:
            raise Trouble
        return 0

    guarded = _guard(build, mode, Options(wait=0, failures=100, rate=0.99), body)
    value = await guarded(7)
    return None if value == "done" and calls == 2 else f"does not retry: {calls} calls, {value!r}"


async def _breaker(build: Build, mode: Mode) -> str | None:
    calls = 0

    def body() -> float:
        nonlocal calls
        calls += 1
        raise Trouble

    guarded = _guard(build, mode, Options(wait=0, cooldown=60.0), body)
    for _ in range(30):
        try:
            await guarded(7)
        except Exception:
            pass
    before = calls
    try:
        await guarded(7)
    except Exception:
        return None if calls == before else f"does not open: {calls} calls came through"
    return "returns normally from a call that failed"


async def _bulkhead(build: Build, mode: Mode) -> str | None:
    inside = peak = 0

    async def work(x: int = 0) -> str:
        nonlocal inside, peak
        inside += 1
        peak = max(peak, inside)
        try:
            await asyncio.sleep(0.001)
        finally:
            inside -= 1
        return "done"

    guarded = build(Options(limit=2, wait=0, attempts=2, failures=100, rate=0.99))(work)
    ends = await asyncio.gather(*(guarded(7) for _ in range(6)), return_exceptions=True)
    if "done" not in ends:
        return f"lets nobody in: {ends[0]!r}"
    return None if peak <= 2 else f"let {peak} in at once, where 2 may be"


def _bulkhead_sync(build: Build) -> str | None:
    go, entered = threading.Event(), threading.Semaphore(0)
    inside = peak = 0
    lock = threading.Lock()

    def work(x: int = 0) -> str:
        nonlocal inside, peak
        with lock:
            inside += 1
            peak = max(peak, inside)
        entered.release()
        go.wait(10)
        with lock:
            inside -= 1
        return "done"

    guarded = build(Options(limit=2, wait=0, attempts=2, failures=100, rate=0.99))(work)

    def attempt() -> None:
        try:
            guarded(7)
        except Exception:
            pass

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    came_in = entered.acquire(timeout=5)
    time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join(10)
    if not came_in:
        return "lets nobody in"
    return None if peak <= 2 else f"let {peak} in at once, where 2 may be"


async def _rate_limit(build: Build, mode: Mode) -> str | None:
    options = Options(calls=2, per=0.2, wait=0, attempts=1 if mode == "sync" else 2, failures=100, rate=0.99)
    guarded = _guard(build, mode, options, lambda: 0)
    began, refused = time.monotonic(), 0
    for _ in range(6):
        try:
            await guarded(7)
        except Exception:
            refused += 1
    took = time.monotonic() - began
    return None if refused or took > 0.15 else "does not limit the rate"


async def _timeout(build: Build, mode: Mode) -> str | None:
    guarded = _guard(build, mode, Options(seconds=0.03, wait=0, attempts=2), lambda: 0.5)
    began = time.monotonic()
    try:
        await guarded(7)
    except Exception:
        took = time.monotonic() - began
        return None if took < 0.4 else f"ended only after {took:.2f} s"
    return "does not cut a slow call off"


async def _deadline(build: Build, mode: Mode) -> str | None:
    left: list[float] = []

    def body() -> float:
        left.extend(each for each in (_remaining_ours(), _remaining_nopanic(), _remaining_by_hand()) if each < 1e9)
        return 0

    await _guard(build, mode, Options(seconds=20.0), body)(7)
    return None if left and 0 < min(left) <= 20 else "does not tell how much time is left"


def _remaining_ours() -> float:
    try:
        from resilient import remaining
    except ImportError:
        return float("inf")
    left = remaining()
    return float("inf") if left is None else left


def _remaining_nopanic() -> float:
    try:
        from nopanic import time_remaining
    except ImportError:
        return float("inf")
    left = time_remaining()
    return float("inf") if left is None else left


def _remaining_by_hand() -> float:
    from benchmarks.limits import remaining

    return remaining()


async def _fallback(build: Build, mode: Mode) -> str | None:
    def body() -> float:
        raise Trouble

    value = await _guard(build, mode, Options(default="instead"), body)(7)
    return None if value == "instead" else f"gives {value!r} where a default was due"


async def _hedge(build: Build, mode: Mode) -> str | None:
    calls = 0

    def body() -> float:
        nonlocal calls
        calls += 1
        return 0.5 if calls == 1 else 0

    guarded = _guard(build, mode, Options(after=0.02), body)
    began = time.monotonic()
    await guarded(7)
    took = time.monotonic() - began
    return None if calls == 2 and took < 0.45 else f"does not hedge: {calls} calls, {took:.2f} s"


_CHECKS: dict[str, Callable[[Build, Mode], Coroutine[Any, Any, str | None]]] = {
    "retry": _retry,
    "breaker": _breaker,
    "bulkhead": _bulkhead,
    "rate limit": _rate_limit,
    "timeout": _timeout,
    "deadline": _deadline,
    "fallback": _fallback,
    "hedge": _hedge,
}
_PARTS = {
    "stack of three": ("retry", "breaker", "bulkhead"),
    "stack of five": ("retry", "breaker", "bulkhead", "rate limit", "timeout"),
}
