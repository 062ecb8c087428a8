"""Fallback: values and functions, plain and async, for every kind of function."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest
import trio

from resilient import Bulkhead, BulkheadFull, CallTimeout, Env, Fallback, Pipeline, Timeout
from resilient.events import FellBack
from resilient.testing import FakeClock, Recorder

both = pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), trio.run], ids=["asyncio", "trio"])
any_fallback: Any = Fallback


def fails(n: int = 0, *, m: int = 0) -> str:
    raise KeyError(n)


async def fails_later(n: int = 0, *, m: int = 0) -> str:
    raise KeyError(n)


def ask(guarded: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a guarded function answers, plain or not."""

    async def main() -> Any:
        return await guarded(*args, **kwargs)

    return guarded(*args, **kwargs) if guarded.__name__ == "fails" else asyncio.run(main())


twins = pytest.mark.parametrize("function", [fails, fails_later])


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "error", "message"),
    [
        (None, TypeError, "on must be exception classes or predicates, not None"),
        (int, TypeError, "on must be exception classes or predicates, not <class 'int'>"),
        (
            (KeyError, KeyboardInterrupt),
            ValueError,
            "on must be subclasses of Exception, not KeyboardInterrupt: cancellation and interrupts are never failures",
        ),
    ],
)
def test_settings_are_checked(on: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Fallback(None, on=on)
    assert str(caught.value) == message


def test_it_describes_itself() -> None:
    policy = Fallback(7, on=KeyError, name="f")
    assert policy.describe() == {"name": "f", "value": 7, "on": KeyError}
    assert repr(policy) == "Fallback(name='f', value=7, on=KeyError)"


# -- what is answered --------------------------------------------------------------------------------------------------


@twins
def test_a_value_takes_the_place_of_an_error(function: Any) -> None:
    value = object()
    assert ask(Fallback(value)(function)) is value
    assert ask(Fallback(None, on=(ValueError, LookupError))(function)) is None
    with pytest.raises(KeyError):
        ask(Fallback(None, on=ValueError)(function))


@twins
def test_a_function_gets_the_arguments_of_the_call(function: Any) -> None:
    def answer(n: int, m: int) -> tuple[int, int]:
        return n, m

    assert ask(Fallback(answer)(function), 1, m=2) == (1, 2)


@twins
def test_a_function_gets_the_error_if_it_has_a_place_for_it(function: Any) -> None:
    def answer(n: int, *, error: Exception) -> str:
        return f"{n} {error!r}"

    def swallows(n: int, **rest: Any) -> list[str]:
        return sorted(rest)

    def by_place(error: int, /) -> int:
        return error

    assert ask(Fallback(answer)(function), 3) == "3 KeyError(3)"
    assert ask(Fallback(swallows)(function), 3) == []
    assert ask(Fallback(by_place)(function), 3) == 3


@twins
def test_what_has_no_signature_gets_the_arguments(function: Any) -> None:
    assert ask(Fallback(int)(function), 3) == 3
    assert ask(Fallback(lambda: "thing")(function)) == "thing"


@twins
def test_a_predicate_decides(function: Any) -> None:
    guarded = Fallback("other", on=lambda error: error.args == (1,))(function)
    assert ask(guarded, 1) == "other"
    with pytest.raises(KeyError):
        ask(guarded, 2)


@both
def test_an_async_fallback_of_a_coroutine(run: Any) -> None:
    async def answer(n: int, error: Exception) -> str:
        await FakeClock().asleep(0)
        return f"{n} {error!r}"

    class Answer:
        async def __call__(self, n: int) -> str:
            return f"called {n}"

    async def main() -> None:
        assert await Fallback(answer)(fails_later)(1) == "1 KeyError(1)"
        assert await Fallback(Answer())(fails_later)(2) == "called 2"

    run(main)


def test_an_async_fallback_of_a_plain_function_is_refused() -> None:
    async def answer() -> None: ...

    def gen() -> Iterator[int]:
        yield 1

    for function in (fails, gen):
        with pytest.raises(TypeError, match=r"is async, which a plain function cannot await: give a plain one$"):
            any_fallback(answer)(function)


@twins
def test_an_error_of_the_fallback_comes_out_with_the_first_as_its_context(function: Any) -> None:
    def answer() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        ask(Fallback(answer)(function))
    assert isinstance(caught.value.__context__, KeyError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_what_is_no_failure_passes(error: type[BaseException]) -> None:
    @Fallback(None)
    def plain() -> None:
        raise error

    @Fallback(None)
    async def later() -> None:
        raise error

    with pytest.raises(error):
        plain()
    with pytest.raises(error):
        later().send(None)


def test_refusals_and_timeouts_are_failures() -> None:
    clock = FakeClock()
    slots = Bulkhead(1)
    errors: list[Exception] = []

    def note(error: Exception) -> str:
        errors.append(error)
        return "fell back"

    @Pipeline(Fallback(note), slots, Timeout(1.0), env=Env(clock))
    async def slow() -> None:
        await clock.asleep(5.0)

    async def main() -> None:
        answers: Any = await asyncio.gather(slow(), slow())
        assert answers == ["fell back"] * 2

    asyncio.run(main())
    assert sorted(type(error).__name__ for error in errors) == [BulkheadFull.__name__, CallTimeout.__name__]


@twins
def test_it_reports(function: Any) -> None:
    events = Recorder()
    ask(Pipeline(Fallback(1), env=Env(sinks=[events]))(function), 5)
    (event,) = events.of(FellBack)
    assert event.policy == function.__name__
    assert repr(event.error) == "KeyError(5)"


# -- generators and streams --------------------------------------------------------------------------------------------


def generator(fail_at: int) -> Generator[int, None, str]:
    for n in range(3):
        if n == fail_at:
            raise KeyError(n)
        yield n
    return "end"


async def stream(fail_at: int) -> AsyncGenerator[int, None]:
    for n in range(3):
        if n == fail_at:
            raise KeyError(n)
        yield n


async def numbers(*given: int) -> AsyncGenerator[int, None]:
    for n in (7, 8, *given):
        yield n


async def empty(*given: int) -> AsyncGenerator[int, None]:
    for n in given[1:]:
        yield n


async def listed(*given: int) -> list[int]:
    return [7, 8, *given]


def made(*given: int) -> list[int]:
    return [7, 8, *given]


@pytest.mark.parametrize(("value", "answer"), [([7, 8], [7, 8]), ((), []), (made, [7, 8, 0]), (range(2), [0, 1])])
def test_generators_fall_back_until_the_first_item(value: Any, answer: list[int]) -> None:
    guarded: Any = Fallback(value)(generator)
    assert list(guarded(9)) == [0, 1, 2]
    assert list(guarded(0)) == answer
    late = guarded(1)
    assert next(late) == 0
    with pytest.raises(KeyError):
        next(late)


@both
@pytest.mark.parametrize(
    ("value", "answer"),
    [([7, 8], [7, 8]), ((), []), (made, [7, 8, 0]), (listed, [7, 8, 0]), (numbers, [7, 8, 0]), (empty, [])],
)
def test_streams_fall_back_until_the_first_item(run: Any, value: Any, answer: list[int]) -> None:
    guarded: Any = Fallback(value)(stream)

    async def main() -> None:
        assert [n async for n in guarded(9)] == [0, 1, 2]
        assert [n async for n in guarded(0)] == answer
        late = guarded(1)
        assert await anext(late) == 0
        with pytest.raises(KeyError):
            await anext(late)

    run(main)


def test_the_fallback_of_a_generator_must_have_items() -> None:
    with pytest.raises(TypeError, match=r"^the fallback of a generator must be something to iterate over, not None$"):
        Fallback(None)(generator)
    with pytest.raises(TypeError, match=r"^the fallback of a stream must be something to iterate over, not None$"):
        Fallback(None)(stream)
    with pytest.raises(TypeError, match=r"which can be used only once: give a function that makes one$"):
        Fallback(iter([1]))(generator)


# -- nothing stays behind ----------------------------------------------------------------------------------------------


@twins
@pytest.mark.parametrize("again", [False, True])
def test_frames_do_not_linger(function: Any, again: bool) -> None:
    class Payload:
        pass

    held: list[weakref.ref[Payload]] = []

    def answer(error: Exception) -> int:
        if again:
            try:
                raise error
            finally:
                del error
        return 1

    def breaks() -> int:
        payload = Payload()
        held.append(weakref.ref(payload))
        raise ValueError(payload)

    async def breaks_later() -> int:
        return breaks()

    async def main(call: Callable[[], Awaitable[int]]) -> None:
        try:
            await call()
        except ValueError:
            pass

    gc.collect()
    gc.disable()
    try:
        if function is fails:
            try:
                Fallback(answer)(breaks)()
            except ValueError:
                pass
        else:
            asyncio.run(main(Fallback(answer)(breaks_later)))
        assert [ref() for ref in held] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("function", "answer"),
    [(lambda: "plain", "plain"), (lambda error: type(error).__name__, "KeyError"), (lambda x: x + 1, 8)],
)
def test_a_function_gets_what_it_has_parameters_for(function: Any, answer: Any) -> None:
    """Without parameters it gets nothing, with `error` alone only the error, else the arguments of the call."""

    @Fallback(function)
    def fails(x: int) -> Any:
        raise KeyError(x)

    @Fallback(function)
    async def afails(x: int) -> Any:
        raise KeyError(x)

    plain: Any = fails
    coroutine: Any = afails
    assert plain(7) == answer
    assert asyncio.run(coroutine(7)) == answer
