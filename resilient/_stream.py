"""Generators and async generators: the two ways in which a policy guards them, written once.

*Held*: a gate (breaker, bulkhead, limiter) enters at the first item and leaves when the generator ends or is closed.
*Opened*: retry, hedge and fallback act until the first item; from there on the items only pass through.
`send`, `throw`, `close` and their async twins reach the generator that the user wrote.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient._types import Call

__all__ = ["Opened", "held_gen", "held_stream", "opened_gen", "opened_stream"]


class Opened:
    """A generator and what came first: `item`, or (with `over`) its end, and `item` is what it returned."""

    __slots__ = ("item", "over", "source")

    def __init__(self, source: Any, item: Any, over: bool) -> None:
        self.source, self.item, self.over = source, item, over


def held_gen(call: Call, hold: Callable[[], AbstractContextManager[Any]]) -> Call:
    """A generator function that runs inside `hold()`, from its first item until it is closed."""

    def held(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with hold():
            source: Generator[Any, Any, Any] = call(*args, **kwargs)
            return (yield from source)

    return held


def held_stream(call: Call, hold: Callable[[], AbstractAsyncContextManager[Any]]) -> Call:
    """An async generator function that runs inside `hold()`, from its first item until it is closed."""

    async def held(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        async with hold():
            opened = await _open_stream(call(*args, **kwargs))
            while not opened.over:
                try:
                    sent = yield opened.item
                except GeneratorExit:
                    await opened.source.aclose()
                    raise
                except BaseException as error:
                    await _advance(opened, opened.source.athrow(error))
                else:
                    await _advance(opened, opened.source.asend(sent))

    return held


def opened_gen(call: Call, shell: Callable[[Call], Call]) -> Call:
    """A generator function whose opening, up to the first item, is guarded by the sync `shell`.

    What the shell's call returns is an `Opened`; a shell that answers with something else answers with an `Opened` too.
    """

    def opening(*args: Any, **kwargs: Any) -> Opened:
        source = call(*args, **kwargs)
        try:
            return Opened(source, next(source), False)
        except StopIteration as stop:
            return Opened(source, stop.value, True)

    guarded = shell(opening)

    def gen(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        opened: Opened = guarded(*args, **kwargs)
        while not opened.over:
            step: Any
            value: Any
            try:
                sent = yield opened.item
            except GeneratorExit:
                opened.source.close()
                raise
            except BaseException as error:
                step, value = opened.source.throw, error
            else:
                step, value = opened.source.send, sent
            try:
                opened.item = step(value)
            except StopIteration as stop:
                return stop.value
            finally:
                # An error that comes back out would hold this frame, and the frame the error.
                step = value = None
        return opened.item

    return gen


def opened_stream(call: Call, shell: Callable[[Call], Call]) -> Call:
    """An async generator function whose opening, up to the first item, is guarded by the coroutine `shell`."""

    async def opening(*args: Any, **kwargs: Any) -> Opened:
        return await _open_stream(call(*args, **kwargs))

    guarded = shell(opening)

    async def stream(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        opened: Opened = await guarded(*args, **kwargs)
        while not opened.over:
            try:
                sent = yield opened.item
            except GeneratorExit:
                await opened.source.aclose()
                raise
            except BaseException as error:
                await _advance(opened, opened.source.athrow(error))
            else:
                await _advance(opened, opened.source.asend(sent))

    return stream


async def _open_stream(source: Any) -> Opened:
    try:
        return Opened(source, await anext(source), False)
    except StopAsyncIteration:
        return Opened(source, None, True)


async def _advance(opened: Opened, step: Any) -> None:
    try:
        opened.item = await step
    except StopAsyncIteration:
        opened.over = True
    finally:
        # It holds the error that it throws in, whose traceback holds this frame.
        del step
