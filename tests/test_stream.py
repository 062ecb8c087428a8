"""Generators under policies: items, send, throw, close and return values reach the generator that the user wrote."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
import trio

from resilient._stream import opened_gen, opened_stream
from resilient._types import Call
from tests.tracer import Tracer


def passing(call: Call) -> Call:
    return call


def held_as_gen(fn: Callable[..., Any]) -> Callable[..., Any]:
    return Tracer()(fn)


def opened_as_gen(fn: Callable[..., Any]) -> Callable[..., Any]:
    return opened_gen(fn, passing)


def held_as_stream(fn: Callable[..., Any]) -> Callable[..., Any]:
    return Tracer()(fn)


def opened_as_stream(fn: Callable[..., Any]) -> Callable[..., Any]:
    return opened_stream(fn, passing)


gens = pytest.mark.parametrize("dress", [held_as_gen, opened_as_gen])
streams = pytest.mark.parametrize("dress", [held_as_stream, opened_as_stream])


def talk(log: list[Any]) -> Generator[str, Any, str]:
    """Answers what it is sent or thrown."""
    try:
        said = yield "hello"
        while said != "bye":
            try:
                said = yield f"you said {said}"
            except ValueError as error:
                said = yield f"you threw {error}"
        return "done"
    finally:
        log.append("closed")


async def atalk(log: list[Any]) -> AsyncGenerator[str, Any]:
    try:
        said = yield "hello"
        while said != "bye":
            try:
                said = yield f"you said {said}"
            except ValueError as error:
                said = yield f"you threw {error}"
    finally:
        log.append("closed")


@gens
def test_a_generator_converses_through_its_guard(dress: Callable[..., Any]) -> None:
    """send, throw and the return value arrive as they would without a guard."""
    log: list[Any] = []
    talking = dress(talk)(log)
    assert next(talking) == "hello"
    assert talking.send("a") == "you said a"
    assert talking.throw(ValueError("b")) == "you threw b"
    with pytest.raises(StopIteration) as stop:
        talking.send("bye")
    assert stop.value.value == "done"
    assert log == ["closed"]


@gens
def test_closing_a_guarded_generator_closes_it_inside(dress: Callable[..., Any]) -> None:
    log: list[Any] = []
    talking = dress(talk)(log)
    next(talking)
    talking.close()
    assert log == ["closed"]


@gens
def test_an_error_thrown_into_a_generator_that_does_not_catch_it_comes_out(dress: Callable[..., Any]) -> None:
    log: list[Any] = []
    talking = dress(talk)(log)
    next(talking)
    with pytest.raises(KeyError):
        talking.throw(KeyError("x"))
    assert log == ["closed"]


@gens
def test_empty_and_failing_generators(dress: Callable[..., Any]) -> None:
    def empty() -> Generator[int, None, str]:
        return "nothing"
        yield 1

    def failing() -> Generator[int, None, None]:
        yield 1
        raise KeyError("late")

    def around() -> Generator[int, None, Any]:
        return (yield from dress(empty)())

    assert list(dress(empty)()) == []
    with pytest.raises(StopIteration) as stop:
        next(around())
    assert stop.value.value == "nothing"
    items: list[int] = []
    with pytest.raises(KeyError):
        items.extend(dress(failing)())
    assert items == [] or items == [1]


@gens
def test_nothing_happens_before_the_first_item_is_asked_for(dress: Callable[..., Any]) -> None:
    log: list[Any] = []
    dress(talk)(log).close()
    assert log == []


@streams
def test_an_async_generator_converses_through_its_guard(dress: Callable[..., Any]) -> None:
    async def main() -> None:
        log: list[Any] = []
        talking = dress(atalk)(log)
        assert await anext(talking) == "hello"
        assert await talking.asend("a") == "you said a"
        assert await talking.athrow(ValueError("b")) == "you threw b"
        with pytest.raises(StopAsyncIteration):
            await talking.asend("bye")
        assert log == ["closed"]

    asyncio.run(main())
    trio.run(main)


@streams
def test_closing_a_guarded_async_generator_closes_it_inside(dress: Callable[..., Any]) -> None:
    async def main() -> None:
        log: list[Any] = []
        talking = dress(atalk)(log)
        await anext(talking)
        await talking.aclose()
        assert log == ["closed"]

    asyncio.run(main())
    trio.run(main)


@streams
def test_an_error_thrown_into_an_async_generator_that_does_not_catch_it_comes_out(dress: Callable[..., Any]) -> None:
    async def main() -> None:
        log: list[Any] = []
        talking = dress(atalk)(log)
        await anext(talking)
        with pytest.raises(KeyError):
            await talking.athrow(KeyError("x"))
        assert log == ["closed"]

    asyncio.run(main())


@streams
def test_empty_async_generators_end_at_once(dress: Callable[..., Any]) -> None:
    async def empty() -> AsyncGenerator[int, None]:
        return
        yield 1

    async def main() -> None:
        assert [item async for item in dress(empty)()] == []

    asyncio.run(main())


@streams
def test_a_cancelled_consumer_cancels_the_generator_inside(dress: Callable[..., Any]) -> None:
    """The cancellation arrives where the user's generator waits, and its cleanup runs before the task ends."""

    async def main() -> None:
        log: list[str] = []

        async def waits() -> AsyncGenerator[int, None]:
            try:
                yield 1
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                log.append("cancelled")
                raise

        async def consume() -> None:
            async for item in dress(waits)():
                log.append(str(item))  # noqa: PERF401

        task = asyncio.create_task(consume())
        while not log:
            await asyncio.tasks.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["1", "cancelled"]

    asyncio.run(main())


def test_context_managers_made_of_guarded_generators_roll_back() -> None:
    """`contextlib` throws the error of the block into the generator: a guard that swallowed it would commit."""
    log: list[str] = []

    @contextlib.contextmanager
    @Tracer()
    def transaction() -> Iterator[str]:
        try:
            yield "tx"
        except Exception:
            log.append("rollback")
            raise
        else:
            log.append("commit")

    @contextlib.asynccontextmanager
    @Tracer()
    async def atransaction() -> AsyncIterator[str]:
        try:
            yield "tx"
        except Exception:
            log.append("rollback")
            raise
        else:
            log.append("commit")

    async def main() -> None:
        async with atransaction():
            pass
        with pytest.raises(KeyError):
            async with atransaction():
                raise KeyError

    with transaction():
        pass
    with pytest.raises(KeyError), transaction():
        raise KeyError
    asyncio.run(main())
    assert log == ["commit", "rollback"] * 2


def test_a_gate_is_held_from_the_first_item_until_the_end_or_the_close() -> None:
    trace = Tracer()

    @trace
    def numbers() -> Iterator[int]:
        yield 1
        yield 2

    made = numbers()
    assert trace.log == []
    next(made)
    assert trace.log == ["+t"]
    assert list(made) == [2]
    assert trace.log == ["+t", "-t"]
    held = numbers()
    next(held)
    held.close()  # type: ignore[attr-defined] # pyright: ignore
    assert trace.log == ["+t", "-t", "+t", "-t GeneratorExit"]


@pytest.mark.parametrize("dress", [held_as_gen, opened_as_gen, held_as_stream, opened_as_stream])
def test_an_error_that_went_in_and_out_lingers_nowhere(dress: Callable[..., Any]) -> None:
    """No cycle of error, traceback and frame waits for the garbage collector."""

    class Marked(Exception):
        pass

    gone: list[weakref.ref[Marked]] = []

    def items() -> Generator[int, None, None]:
        yield 1

    async def aitems() -> AsyncGenerator[int, None]:
        yield 1

    def once() -> None:
        errors = [Marked()]  # not a name of this frame, which the traceback will hold
        gone.append(weakref.ref(errors[0]))
        held = dress(items)()
        next(held)
        try:
            held.throw(errors.pop())
        except Marked:
            pass

    async def aonce() -> None:
        errors = [Marked()]  # not a name of this frame, which the traceback will hold
        gone.append(weakref.ref(errors[0]))
        held = dress(aitems)()
        await anext(held)
        try:
            await held.athrow(errors.pop())
        except Marked:
            pass

    gc.collect()
    gc.disable()
    try:
        if dress in (held_as_gen, opened_as_gen):
            once()
        else:
            asyncio.run(aonce())
        assert gone[0]() is None
    finally:
        gc.enable()
