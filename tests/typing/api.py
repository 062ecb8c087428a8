"""What type checkers see. Never run: mypy (in test_typing.py) and pyright (in `make types`) read it.

A decorated function keeps its type. `assert_type` says so where it holds, `# type: ignore[...]` marks the lines that
must be errors: both checkers report an ignore that nothing needs.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, assert_type

from resilient import (
    Bulkhead,
    CircuitBreaker,
    Consecutive,
    Env,
    Event,
    FailureRate,
    Fallback,
    Hedge,
    Patch,
    Pipeline,
    Policy,
    Quantile,
    RateLimiter,
    Retry,
    SlowRate,
    Timeout,
    deadline,
    inspect,
    patch,
    remaining,
)
from resilient.testing import FakeClock, Recorder, instant

retry = Retry(ConnectionError)
stack = Pipeline(retry, CircuitBreaker("api"), RateLimiter(10), Bulkhead(4), Timeout(2.0, sync="deadline"))


# -- functions ---------------------------------------------------------------------------------------------------------


@retry
def plain(a: int, *, b: str = "") -> float:
    return a + len(b)


assert_type(plain(1, b="x"), float)
plain("1")  # type: ignore[arg-type]
plain(1, c="x")  # type: ignore[call-arg]
plain()  # type: ignore[call-arg]
as_callable: Callable[[int], float] = plain


@Retry(ConnectionError, attempts=5, wait=0.1)
@CircuitBreaker("api", FailureRate(0.5, over=100) | Consecutive(5) | SlowRate(0.5, slower_than=2.0))
@Bulkhead(16, queue=10, max_wait=1.0)
def stacked(a: int) -> list[int]:
    return [a]


assert_type(stacked(1), list[int])


@stack
def piped(a: int) -> bytes:
    return bytes(a)


assert_type(piped(1), bytes)
piped("1")  # type: ignore[arg-type]


# -- coroutines, generators, async generators --------------------------------------------------------------------------


@stack
async def coroutine(a: int) -> str:
    return str(a)


@RateLimiter(5, per=1.0, burst=2, max_wait=3.0)
async def limited(a: int) -> str:
    return str(a)


@Hedge(0.05, extra=1, idempotent=True)
async def hedged(a: int) -> str:
    return str(a)


@Hedge(Quantile(0.95), idempotent=True)
async def learned(a: int) -> str:
    return str(a)


@retry
def generator(n: int) -> Iterator[int]:
    yield from range(n)


@stack
async def stream(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


async def awaiting() -> None:
    assert_type(await coroutine(1), str)
    assert_type(await limited(1), str)
    assert_type(await hedged(1), str)
    assert_type(await learned(1), str)
    await coroutine("1")  # type: ignore[arg-type]
    async for item in stream(3):
        assert_type(item, int)
    for item in generator(3):
        assert_type(item, int)
    as_awaitable: Callable[[int], Awaitable[str]] = coroutine
    await as_awaitable(1)


# -- methods -----------------------------------------------------------------------------------------------------------


class Service:
    @retry
    def method(self, a: int) -> str:
        return str(a)

    @stack
    async def amethod(self, a: int) -> str:
        return str(a)

    @retry
    @classmethod
    def outside_class(cls, a: int) -> Service:
        return cls()

    @classmethod
    @retry
    def inside_class(cls, a: int) -> Service:
        return cls()

    @retry
    @staticmethod
    def outside_static(a: int) -> str:
        return str(a)

    @staticmethod
    @retry
    def inside_static(a: int) -> str:
        return str(a)


service = Service()
assert_type(service.method(1), str)
assert_type(Service.method(service, 1), str)
assert_type(Service.outside_class(1), Service)
assert_type(Service.inside_class(1), Service)
assert_type(service.outside_static(1), str)
assert_type(service.inside_static(1), str)
service.method("1")  # type: ignore[arg-type]
Service.inside_class("1")  # type: ignore[arg-type]


async def awaiting_methods() -> None:
    assert_type(await service.amethod(1), str)


# -- fallback: the type widens -----------------------------------------------------------------------------------------


@Fallback(None)
def maybe(a: int) -> str:
    return str(a)


assert_type(maybe(1), str | None)
maybe("1")  # type: ignore[arg-type]


@Fallback(0, on=ConnectionError)
async def maybe_later(a: int) -> str:
    return str(a)


async def awaiting_fallback() -> None:
    assert_type(await maybe_later(1), str | int)


# -- a look inside, patching, environment ------------------------------------------------------------------------------

assert_type(inspect(plain), tuple[Any, ...])
assert_type(patch("json:loads", retry), Patch)
assert_type(remaining(), float | None)
with deadline(2.0), instant():
    pass

recorder = Recorder()
env = Env(clock=FakeClock(), sinks=[recorder])
assert_type(recorder.events, list[Event])


@Pipeline(retry, env=env)
def bound(a: int) -> str:
    return str(a)


assert_type(bound(1), str)


class Mine(Policy):
    """A policy of somebody's own is typed like ours."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name


@Mine()
def own(a: int) -> str:
    return str(a)


assert_type(own(1), str)

# -- settings that are wrong -------------------------------------------------------------------------------------------

Retry()  # type: ignore[call-arg]
Bulkhead("16")  # type: ignore[arg-type]
Timeout(2.0, sync="sometimes")  # type: ignore[arg-type]
