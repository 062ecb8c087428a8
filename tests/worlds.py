"""Tasks of asyncio and of trio with one face, so that a test says once what must hold in both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
import trio.testing

__all__ = ["AsyncioWorld", "Handle", "TrioWorld", "World", "turn", "worlds"]


class Handle:
    """A task: how it ended, and a way to cancel it."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.cancel: Callable[[], object] = lambda: None

    async def run(self, fn: Callable[[], Awaitable[Any]]) -> None:
        try:
            self.value = await fn()
        except Exception as error:
            self.error = error
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.done = True


async def turn() -> None:
    """Let the other tasks of this loop take one step."""
    loop = asyncio.get_running_loop()
    step: asyncio.Future[None] = loop.create_future()
    loop.call_soon(step.set_result, None)
    await step


class AsyncioWorld:
    """Tasks in an asyncio loop."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    @staticmethod
    def run(main: Callable[[], Awaitable[Any]]) -> None:
        async def body() -> None:
            await main()

        asyncio.run(body())

    async def __aenter__(self) -> AsyncioWorld:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, fn: Callable[[], Awaitable[Any]]) -> Handle:
        handle = Handle()
        task = asyncio.create_task(handle.run(fn))
        handle.cancel = task.cancel
        task.add_done_callback(lambda _: setattr(handle, "done", True))  # Cancelled before its start, it never runs.
        self._tasks.append(task)
        return handle

    async def step(self) -> None:
        await turn()

    async def settle(self) -> None:
        for _ in range(20):
            await turn()


class TrioWorld:
    """Tasks in a trio run."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()

    @staticmethod
    def run(main: Callable[[], Awaitable[Any]]) -> None:
        trio.run(main)

    async def __aenter__(self) -> TrioWorld:
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def spawn(self, fn: Callable[[], Awaitable[Any]]) -> Handle:
        handle = Handle()
        scope = trio.CancelScope()
        handle.cancel = scope.cancel

        async def body() -> None:
            with scope:
                await handle.run(fn)

        self._nursery.start_soon(body)
        return handle

    async def step(self) -> None:
        await trio.lowlevel.checkpoint()

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()


World = type[AsyncioWorld] | type[TrioWorld]
worlds = pytest.mark.parametrize("world", [AsyncioWorld, TrioWorld])
