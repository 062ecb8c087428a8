"""A policy for the tests of what stands under policies: it writes down what passes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

from resilient._stream import held_gen, held_stream
from resilient._types import Call
from resilient.policy import Env, Policy


class Tracer(Policy):
    """Notes `+label` at the entry and `-label` at the exit of each call."""

    __slots__ = ("label", "log", "name")

    def __init__(self, label: str = "t", log: list[str] | None = None, name: str | None = None) -> None:
        self.label = label
        self.log: list[str] = [] if log is None else log
        self.name = name

    def describe(self) -> dict[str, Any]:
        return {"label": self.label}

    def sync(self, call: Call, env: Env) -> Call:
        def tracer(*args: Any, **kwargs: Any) -> Any:
            self.log.append(f"+{self.label}")
            try:
                return call(*args, **kwargs)
            finally:
                self.log.append(f"-{self.label}")

        return tracer

    def coro(self, call: Call, env: Env) -> Call:
        async def tracer(*args: Any, **kwargs: Any) -> Any:
            self.log.append(f"+{self.label}")
            try:
                return await call(*args, **kwargs)
            finally:
                self.log.append(f"-{self.label}")

        return tracer

    def gen(self, call: Call, env: Env) -> Call:
        return held_gen(call, lambda: _Hold(self))

    def stream(self, call: Call, env: Env) -> Call:
        return held_stream(call, lambda: _Hold(self))


class _Hold:
    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer

    def __enter__(self) -> None:
        self.tracer.log.append(f"+{self.tracer.label}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.tracer.log.append(f"-{self.tracer.label}" + (f" {kind.__name__}" if kind else ""))

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.__exit__(kind, error, trace)


def plain(a: int, b: int = 2, *, c: int = 3) -> tuple[int, int, int]:
    """Return the three."""
    return a, b, c


async def coroutine(a: int, b: int = 2, *, c: int = 3) -> tuple[int, int, int]:
    """Return the three."""
    return a, b, c


def generator(n: int) -> Generator[int, str, str]:
    """Count to n; the value is what was sent last."""
    sent = "nothing"
    for i in range(n):
        sent = yield i
    return sent


async def stream(n: int) -> AsyncGenerator[int, str]:
    """Count to n."""
    for i in range(n):
        yield i
