"""What goes to an engine and comes back: orders, errors, ends; and how orders are carried out."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from resilient import (
    BreakerOpen,
    CallTimeout,
    DeadlineExceeded,
    DurableSaga,
    Env,
    RateLimited,
    Retry,
    SagaAborted,
    SagaError,
    SagaStuck,
    StoreError,
    engines,
)
from resilient._undo import UNKNOWN
from resilient.engines import LocalEngine, TemporalEngine, _body, _wire
from resilient.engines._body import Answer, AsyncRun, SyncRun
from resilient.engines._perform import perform, perform_sync
from resilient.engines._wire import Ending, Order, bound, error_of, kept_error, order_of, plain, tell, wants
from resilient.saga import branch
from resilient.stores.memory import MemoryStore

CALLS: list[Any] = []


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.one = one


def numbers(one: int, two: int = 2) -> dict[str, int]:
    CALLS.append((one, two))
    return {"sum": one + two}


async def later(one: int) -> int:
    CALLS.append(one)
    return one


def undo_numbers(one: int, two: int, result: Any) -> None:
    CALLS.append(("undid", one, two, result))


def fails(one: int) -> None:
    raise Odd(one, 2)


async def waits(one: int) -> None:
    await asyncio.Event().wait()


def is_odd(error: BaseException) -> bool:
    return isinstance(error, Odd) and error.one % 2 == 1


promised = functools.partial(later, 1)

HERE = __name__


@pytest.fixture(autouse=True)
def decorated() -> None:
    """Only functions of packages that have sagas can be ordered."""
    body_of()


def order(function: str, args: bytes = b"[1]", **more: Any) -> Order:
    return Order("s", "i", 3, function, f"{HERE}:{function}", Raw(args), **more)


# -- errors and ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [KeyError("x"), Odd(1, 2), ValueError(1, [2], {"3": None}), RateLimited("limiter", retry_after=2.0)]
)
def test_an_error_comes_back_as_its_own_class(error: Exception) -> None:
    again = error_of(kept_error(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_an_error_of_an_unknown_class_comes_back_as_its_text() -> None:
    data = kept_error(Odd(1, 2)).replace(b"Odd", b"Gone")
    assert str(error_of(data)) == "1 and 2"
    assert type(error_of(data)) is Exception


def test_an_error_of_no_class_that_is_here_comes_back_as_its_text() -> None:
    again = error_of(b'{"v":1,"error":{"type":"shop:Gone","base":"shop:Gone","message":"out of stock"}}')
    assert type(again) is RuntimeError
    assert str(again) == "shop:Gone: out of stock"


def test_an_error_that_cannot_be_made_again_comes_back_as_its_text() -> None:
    again = error_of(kept_error(ExceptionGroup("both", [KeyError("x")])))
    assert type(again) is Exception
    assert str(again) == "both (1 sub-exception)"
    assert again.__notes__ == ["resilient: it was a builtins:ExceptionGroup, which cannot be made again"]


def test_ends_come_back_as_they_went() -> None:
    cause = KeyError("x")

    def through(error: Exception) -> Exception:
        return msgspec.json.decode(_wire.write(Ending.of(error)), type=Ending).error("s", "i")

    aborted = SagaAborted("undone", "s", "i")
    aborted.__cause__ = cause
    aborted.add_note("a note")
    again = through(aborted)
    assert type(again) is SagaAborted
    assert repr(again.__cause__) == "KeyError('x')"
    assert again.__notes__ == ["a note"]
    stuck = through(SagaStuck("stuck", [Odd(1, 2)], "s", "i"))
    assert isinstance(stuck, SagaStuck)
    assert (stuck.saga, stuck.id, repr(stuck.exceptions[0])) == ("s", "i", "Odd('1 and 2')")
    assert stuck.__cause__ is None
    assert type(through(Odd(1, 2))) is Odd


# -- policies --------------------------------------------------------------------------------------------------------


def test_a_retry_is_told_in_numbers_and_names() -> None:
    told = tell(Retry((Odd, is_odd), attempts=5, wait=2, total=9, retry_after=None), "retry")
    assert (told.attempts, told.first, told.factor, told.cap, told.total, told.after) == (5, 2.0, 1.0, 2.0, 9.0, 0.0)
    assert told.on == [f"{HERE}:Odd"]
    assert told.asks == [f"{HERE}:is_odd"]
    assert told.delay(7, Odd(1, 2), Env()) == 2.0
    assert order_of(plain(order("numbers", retry=told))).retry == told


def test_the_default_backoff_is_that_of_retry() -> None:
    class Middle:
        def random(self) -> float:
            return 0.5

    told, env = tell(Retry(Exception), "retry"), Env(rng=Middle())
    assert told.delay(1, Odd(1, 2), env) == 0.05
    assert told.delay(3, Odd(1, 2), env) == 0.2
    assert told.delay(40, Odd(1, 2), env) == 5.0
    assert told.delay(1, RateLimited("limiter", retry_after=7.0), env) == 7.0


def test_errors_are_retried_by_the_rules_of_retry() -> None:
    refusal = RateLimited("limiter", retry_after=2.0)
    assert not wants(None, Odd(1, 2))
    assert wants(tell(Retry(Exception), "retry"), Odd(1, 2))
    assert not wants(tell(Retry(Exception), "retry"), refusal)
    assert wants(tell(Retry((Odd, RateLimited)), "retry"), refusal)
    assert not wants(tell(Retry((Odd, BreakerOpen)), "retry"), refusal)
    assert wants(tell(Retry(is_odd), "retry"), Odd(1, 2))
    assert not wants(tell(Retry(is_odd), "retry"), Odd(2, 2))


def test_what_no_engine_can_be_told_is_refused() -> None:
    import tenacity

    with pytest.raises(TypeError, match="must be a Retry"):
        tell(object(), "retry")
    with pytest.raises(TypeError, match="until"):
        tell(Retry(Odd, until=bool), "retry")
    with pytest.raises(TypeError, match="tenacity"):
        tell(Retry(Odd, wait=tenacity.wait_fixed(1)), "retry")
    with pytest.raises(TypeError, match="predicate"):
        tell(Retry(lambda error: True), "retry")


# -- orders ----------------------------------------------------------------------------------------------------------


def test_orders_are_carried_out_in_both_worlds() -> None:
    ways: tuple[Any, ...] = (lambda one: asyncio.run(perform(one, Env())), lambda one: perform_sync(one, Env()))
    limits: tuple[Any, ...] = ({}, {"timeout": 60.0}, {"left": 60.0, "limit": 60.0})
    for carry in ways:
        for more in limits:
            assert carry(order("numbers", **more)) == b'{"v":1,"ok":{"sum":3}}'
        with pytest.raises(Odd):
            carry(order("fails"))
        with pytest.raises(DeadlineExceeded):
            carry(order("numbers", left=0.0))
        with pytest.raises(LookupError):
            carry(order("nobody"))


def test_coroutines_are_for_coroutines() -> None:
    limits: tuple[Any, ...] = ({}, {"timeout": 60.0}, {"left": 60.0, "limit": 60.0})
    for more in limits:
        assert asyncio.run(perform(order("later", **more), Env())) == b'{"v":1,"ok":1}'
    with pytest.raises(TypeError, match="is async"):
        perform_sync(order("later"), Env())
    with pytest.raises(CallTimeout):
        asyncio.run(perform(order("waits", left=0.01), Env()))


def test_events_say_what_was_done() -> None:
    events: list[Any] = []
    env = Env(sinks=[events.append])
    undo = _wire.plain(undoing())
    perform_sync(order("numbers"), env)
    perform_sync(order_of({**plain(order("numbers")), "undo": undo}), env)
    with pytest.raises(Odd):
        asyncio.run(perform(order("fails"), env))
    assert [(type(event).__name__, event.step, repr(event.error)) for event in events] == [
        ("StepDone", "numbers", "None"),
        ("Compensated", "numbers", "None"),
        ("StepDone", "fails", "Odd('1 and 2')"),
    ]


def undoing() -> Any:
    from resilient._journal import undoing
    from resilient._undo import Undo

    return undoing(Undo(3, "numbers", undo_numbers, (1, 2), {}))


def test_a_compensation_gets_the_value_of_its_step_or_unknown() -> None:
    told = order("numbers", undo=undoing())
    assert bound(told)[2]["result"] is UNKNOWN
    told.result = Raw(b'{"v":1,"ok":{"sum":3}}')
    function, args, kwargs, keep = bound(order_of(plain(told)))
    assert (function, list(args), kwargs) == (undo_numbers, [1, 2], {"result": {"sum": 3}})
    assert keep(object()) == b'{"v":1,"ok":null}'
    told.result = Raw(kept_error(Odd(1, 2)))
    with pytest.raises(StoreError):
        bound(told)


def test_a_plain_function_that_is_cancelled_is_waited_for() -> None:
    """It cannot be stopped, and nothing may be undone while it runs."""
    import threading

    go = threading.Event()

    async def run() -> None:
        from resilient.engines._perform import _in_thread

        began = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> str:
            loop.call_soon_threadsafe(began.set)
            go.wait()
            return "done"

        task = asyncio.ensure_future(_in_thread(work, (), {}))
        await began.wait()
        task.cancel()
        await asyncio.wait([task], timeout=0.01)
        assert not task.done()
        go.set()
        assert await task == "done"
        assert await _in_thread(promised, (), {}) == 1

    asyncio.run(run())


# -- runs ------------------------------------------------------------------------------------------------------------


def body_of(**options: Any) -> Any:
    engine = TemporalEngine(lambda: None, task_queue="q")
    return DurableSaga("s", engine=engine, **options)(body)


async def body(saga: Any) -> None: ...


def run_of(carry: Any, kind: Any = AsyncRun, **options: Any) -> Any:
    made = body_of(**options)
    return kind(made.saga("i"), carry, made.undoing, lambda: 0.0)


async def answered(given: Order) -> Answer:
    function, args, kwargs, keep = bound(given)
    value = function(*args, **kwargs)
    return Answer(keep(await value if hasattr(value, "__await__") else value))


def test_a_step_that_is_cancelled_and_ends_well_is_undone_with_its_value() -> None:
    """Registered after, and yet it has happened."""
    gone = asyncio.CancelledError()

    async def carry(given: Order) -> Answer:
        answer = await answered(given)
        answer.gone = gone if given.undo is None else None
        return answer

    async def run() -> None:
        saga = run_of(carry)
        with pytest.raises(asyncio.CancelledError):
            await saga.step(numbers, 1, 2, compensate=undo_numbers, register="after")
        assert await _body.asettled(saga, gone) is gone
        assert CALLS[-1] == ("undid", 1, 2, {"sum": 3})

    asyncio.run(run())


def test_a_cancelled_saga_with_a_compensation_that_fails_is_stuck() -> None:
    async def carry(given: Order) -> Answer:
        return Answer(error=Odd(1, 2)) if given.undo is not None else await answered(given)

    async def run() -> None:
        saga = run_of(carry)
        await saga.step(numbers, 1, 2, compensate=undo_numbers)
        gone = asyncio.CancelledError()
        final = await _body.asettled(saga, gone)
        assert isinstance(final, SagaStuck)
        assert final.__cause__ is gone
        assert saga.undo_orders() == [saga.undo_order(saga._stack[0])]

    asyncio.run(run())


def test_what_cannot_be_recorded_is_refused_before_anything_runs() -> None:
    async def never(given: Order) -> Answer:
        raise AssertionError("unreachable")

    async def run() -> None:
        for function, more in (
            (lambda: None, {"compensate": None}),
            (numbers, {"compensate": lambda: None}),
            (numbers, {"compensate": None, "retry": Retry(lambda error: True)}),
            (numbers, {}),
        ):
            with pytest.raises(TypeError):
                await run_of(never).step(function, 1, **more)
        with pytest.raises(TypeError):
            await run_of(never).parallel(branch(lambda: None, compensate=None))
        with pytest.raises(TypeError):
            run_of(never, SyncRun).step(numbers, object(), compensate=None)
        with pytest.raises(TypeError, match="async def"):
            run_of(never, SyncRun).parallel()

    asyncio.run(run())


def test_a_value_that_is_none_is_an_error() -> None:
    async def carry(given: Order) -> Answer:
        return Answer(kept_error(Odd(1, 2)))

    with pytest.raises(StoreError):
        asyncio.run(run_of(carry).step(numbers, 1, compensate=None))


def test_a_group_that_fails_ends_the_saga() -> None:
    async def run() -> None:
        saga = run_of(answered)
        assert await saga.parallel(branch(numbers, 1, compensate=None), branch(later, 1, compensate=None)) == [
            {"sum": 3},
            1,
        ]
        with pytest.raises(Odd):
            await saga.parallel(branch(fails, 1, compensate=None))
        with pytest.raises(SagaError, match="cannot go on"):
            await saga.step(numbers, 1, compensate=None)

    asyncio.run(run())


def test_a_branch_keeps_its_name_and_one_without_has_its_function_s_place() -> None:
    names: list[tuple[int, str, str]] = []

    async def carry(given: Order) -> Answer:
        names.append((given.number, given.name, given.function))
        return await answered(given)

    async def run() -> None:
        saga = run_of(carry)
        saga.pivot()
        await saga.parallel(
            branch(numbers, 1, compensate=None, name="add up"), branch(numbers, 1, compensate=None), (numbers, 1)
        )

    asyncio.run(run())
    place = f"{__name__}:numbers"
    assert sorted(names) == [(1, "add up", place), (2, place, place), (3, place, place)]


# -- the engines -----------------------------------------------------------------------------------------------------


def test_the_local_engine_is_what_a_store_means() -> None:
    store = MemoryStore()
    engine = LocalEngine(store)
    assert engine.store is store
    assert repr(engine) == f"LocalEngine({store!r})"
    assert LocalEngine("memory://").store is LocalEngine("memory://").store
    with pytest.raises(TypeError, match="needs a store"):
        LocalEngine(None)
    with pytest.raises(AttributeError, match="NoEngine"):
        engines.NoEngine  # noqa: B018
