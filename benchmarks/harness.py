"""The stop-watch: all candidates in turn, A B C A B C, so that a slow second of the machine hits each of them alike.

Each sample takes some milliseconds; its calls are counted beforehand. Before a sample the garbage of the others is
collected, and what existed before the run is frozen, so that no candidate pays for another one's. The collector itself
stays on. Every candidate runs in a copy of the loop's code, since CPython specialises code by what it has seen.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from itertools import repeat
from time import perf_counter
from types import FunctionType
from typing import Any, TypeVar

T = TypeVar("T")
Sampler = Callable[[int], Awaitable[float]]
"""Run so many calls, and tell how many seconds that took."""

EMPTY = "empty loop"


def fresh(function: Callable[..., Any]) -> Any:
    """A copy with code of its own, which nothing has specialised yet."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


async def _empty(n: int) -> float:
    began = perf_counter()
    for _ in repeat(None, n):
        pass
    return perf_counter() - began


def call(fn: Any) -> Sampler:
    """Call `fn(7)`."""

    async def loop(fn: Any, n: int) -> float:
        began = perf_counter()
        for _ in repeat(None, n):
            fn(7)
        return perf_counter() - began

    own = fresh(loop)
    return lambda n: own(fn, n)


def call_async(fn: Any) -> Sampler:
    """Await `fn(7)`, all in one task."""

    async def loop(fn: Any, n: int) -> float:
        began = perf_counter()
        for _ in repeat(None, n):
            await fn(7)
        return perf_counter() - began

    own = fresh(loop)
    return lambda n: own(fn, n)


def call_refused(fn: Any) -> Sampler:
    """Call `fn(7)` and catch what it raises."""

    async def loop(fn: Any, n: int) -> float:
        began = perf_counter()
        for _ in repeat(None, n):
            try:
                fn(7)
            except Exception:
                pass
        return perf_counter() - began

    own = fresh(loop)
    return lambda n: own(fn, n)


def call_refused_async(fn: Any) -> Sampler:
    """Await `fn(7)` and catch what it raises."""

    async def loop(fn: Any, n: int) -> float:
        began = perf_counter()
        for _ in repeat(None, n):
            try:
                await fn(7)
            except Exception:
                pass
        return perf_counter() - began

    own = fresh(loop)
    return lambda n: own(fn, n)


def call_by_keyword(fn: Any) -> Sampler:
    """Call `fn(x=7)`."""

    async def loop(fn: Any, n: int) -> float:
        began = perf_counter()
        for _ in repeat(None, n):
            fn(x=7)
        return perf_counter() - began

    own = fresh(loop)
    return lambda n: own(fn, n)


def call_without_arguments(fn: Any) -> Sampler:
    """Call `fn()`."""

    async def loop(fn: Any, n: int) -> float:
        began = perf_counter()
        for _ in repeat(None, n):
            fn()
        return perf_counter() - began

    own = fresh(loop)
    return lambda n: own(fn, n)


def call_method(instance: Any) -> Sampler:
    """Call `instance.method(7)`."""

    async def loop(instance: Any, n: int) -> float:
        began = perf_counter()
        for _ in repeat(None, n):
            instance.method(7)
        return perf_counter() - began

    own = fresh(loop)
    return lambda n: own(instance, n)


class Pause:
    """Gives the running event loop a turn; does nothing where none runs."""

    def __await__(self) -> Generator[None, None, None]:
        yield


async def interleave(samplers: Mapping[str, Sampler], rounds: int, milliseconds: float) -> dict[str, list[float]]:
    """The nanoseconds of one call for each candidate and round, without the loop itself."""
    samplers = {EMPTY: _empty, **samplers}
    counts = {name: await _calibrate(sample, milliseconds / 1e3) for name, sample in samplers.items()}
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {name: [] for name in samplers}
    try:
        for _ in range(rounds):
            for name, sample in samplers.items():
                gc.collect()
                # Timers that were cancelled leave the loop's heap only when the loop has a turn.
                await Pause()
                n = counts[name]
                times[name].append(await sample(n) / n * 1e9)
    finally:
        gc.unfreeze()
    loop = min(times.pop(EMPTY))
    return {name: [each - loop for each in series] for name, series in times.items()}


async def _calibrate(sample: Sampler, seconds: float) -> int:
    n = 1
    while True:
        # One sample may be held up by anything, and then a count far too small would be taken for enough.
        took = min([await sample(n) for _ in range(3)])
        if took >= seconds / 4:
            return max(1, round(n * seconds / took))
        n *= 2 if took >= seconds / 64 else 8


def plain(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that awaits nothing but itself, without an event loop.

    Plain functions are measured where no loop runs, since libraries may behave differently inside one.
    """
    try:
        while True:
            work.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value


def summary(series: list[float]) -> dict[str, float]:
    """The minimum, which is what the code costs, and the median, which is what this machine made of it."""
    return {"ns": round(min(series), 1), "median_ns": round(statistics.median(series), 1)}
