"""`Retry` under tenacity's strategies: the same decisions as tenacity itself, and none of its faults."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import pickle  # noqa: TID251
import random  # noqa: TID251
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import tenacity
import tenacity.asyncio
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import resilient
from resilient import Env, Pipeline, Retry
from resilient.testing import FakeClock

SETTINGS = settings(max_examples=250, deadline=None, database=None)


class Fault(Exception):
    """A failure of the script."""


class Other(Exception):
    """Another failure of the script."""


@dataclass
class World:
    """What one run of a script did."""

    log: list[Any] = field(default_factory=list[Any])
    now: float = 0.0

    def sleep(self, seconds: float) -> None:
        if seconds > 0:  # a wait of zero does not sleep with us
            self.log.append(("sleep", round(seconds, 9)))
            self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)

    def note(self, name: str) -> Callable[[Any], None]:
        def hook(state: Any) -> None:
            outcome = state.outcome
            ended = outcome and (type(outcome.exception()).__name__ if outcome.failed else outcome.result())
            upcoming = state.next_action.sleep if state.next_action else None
            since = state.seconds_since_start
            self.log.append((name, state.attempt_number, ended, upcoming, round(state.idle_for, 9), since))

        return hook


def script(outcomes: list[Any], world: World) -> Callable[[], Any]:
    left: Iterator[Any] = iter(outcomes)

    def call() -> Any:
        world.now += 0.5
        outcome = next(left, "end")
        world.log.append(("call", outcome if isinstance(outcome, str) else repr(outcome)))
        if outcome is tenacity.TryAgain:
            raise tenacity.TryAgain
        if outcome == "cause":
            try:
                raise Other("cause")
            except Other as error:
                raise tenacity.TryAgain from error
        if isinstance(outcome, type):
            raise outcome("x")
        return outcome

    return call


outcomes = st.lists(st.sampled_from([Fault, Other, tenacity.TryAgain, "cause", "bad", "good", None]), max_size=8)
leaf_retry = st.sampled_from(
    [
        tenacity.retry_if_exception_type(Fault),
        tenacity.retry_if_not_exception_type(Fault),
        tenacity.retry_unless_exception_type(Other),
        tenacity.retry_if_exception(lambda error: isinstance(error, Other)),
        tenacity.retry_if_exception_message(message="x"),
        tenacity.retry_if_not_exception_message(message="y"),
        tenacity.retry_if_exception_cause_type(Other),
        tenacity.retry_if_result(lambda value: value == "bad"),
        tenacity.retry_if_not_result(lambda value: value == "good"),
        tenacity.retry_never,
    ]
)
retries = st.recursive(
    leaf_retry, lambda inner: st.builds(lambda a, b, both: a & b if both else a | b, inner, inner, st.booleans())
)
leaf_stop = st.one_of(
    st.builds(tenacity.stop_after_attempt, st.integers(1, 5)),
    st.builds(tenacity.stop_after_delay, st.sampled_from([0.4, 1.0, 3.0])),
    st.builds(tenacity.stop_before_delay, st.sampled_from([0.4, 1.0, 3.0])),
)
stops = st.recursive(
    leaf_stop, lambda inner: st.builds(lambda a, b, both: a & b if both else a | b, inner, inner, st.booleans())
)
leaf_wait = st.one_of(
    st.builds(tenacity.wait_fixed, st.sampled_from([0.0, 0.25, 2.0])),
    st.builds(tenacity.wait_exponential, multiplier=st.sampled_from([0.1, 1.0]), max=st.just(3.0)),
    st.builds(tenacity.wait_random, min=st.just(0.1), max=st.just(0.7)),
    st.builds(tenacity.wait_random_exponential, multiplier=st.just(0.1), max=st.just(2.0)),
    st.builds(tenacity.wait_incrementing, start=st.just(0.1), increment=st.just(0.2)),
    st.just(tenacity.wait_chain(tenacity.wait_fixed(0.1), tenacity.wait_fixed(0.3))),
)
waits = st.recursive(leaf_wait, lambda inner: st.builds(lambda a, b: a + b, inner, inner), max_leaves=3)


def ended(world: World, run: Callable[[], Any]) -> Any:
    """How a run ended: its value or its error, and for a `RetryError` what that is about."""
    random.seed(5)
    with mock.patch("time.monotonic", side_effect=lambda: world.now):
        try:
            return ("value", run())
        except tenacity.RetryError as error:
            last = error.last_attempt
            inner = type(last.exception()).__name__ if last.failed else last.result()
            return (type(error).__name__, last.attempt_number, inner, type(error.__cause__).__name__)
        except Exception as error:
            return (type(error).__name__, str(error))


class OwnError(tenacity.RetryError):
    """A `retry_error_cls`."""


def configured(kind: Any, world: World, retry: Any, stop: Any, wait: Any, options: dict[str, Any]) -> Any:
    hooks: dict[str, Any] = {name: world.note(name) for name in ("before", "after", "before_sleep") if options["hooks"]}
    if options["callback"]:
        hooks["retry_error_callback"] = lambda state: ("callback", state.attempt_number)
    sleep: Any = world.asleep if kind is tenacity.AsyncRetrying else world.sleep
    return kind(
        retry=retry,
        stop=stop,
        wait=wait,
        sleep=sleep,
        reraise=options["reraise"],
        retry_error_cls=OwnError if options["own"] else tenacity.RetryError,
        **hooks,
    )


option = st.fixed_dictionaries({name: st.booleans() for name in ("hooks", "callback", "reraise", "own")})


class Ticking(FakeClock):
    """The clock of a `World`."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def now(self) -> float:
        return self.world.now

    def sleep(self, seconds: float) -> None:
        self.world.sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        self.world.sleep(seconds)


@SETTINGS
@given(outcomes, retries, stops, waits, option)
def test_an_adopted_retrying_decides_as_tenacity_does(
    plan: list[Any], retry: Any, stop: Any, wait: Any, options: dict[str, Any]
) -> None:
    """Results, errors, causes, sleeps and hooks are the same, in the same order."""
    theirs, ours = World(), World()
    retrying = configured(tenacity.Retrying, theirs, retry, stop, wait, options)
    expected = ended(theirs, lambda: retrying(script(plan, theirs)))
    policy = Retry.adopt(configured(tenacity.Retrying, ours, retry, stop, wait, options))
    call = script(plan, ours)
    guarded = Pipeline(policy, env=Env(Ticking(ours)))(lambda: call())
    assert ended(ours, guarded) == expected
    assert ours.log == theirs.log


@SETTINGS
@given(outcomes, retries, stops, waits, option)
def test_an_adopted_async_retrying_decides_as_tenacity_does(
    plan: list[Any], retry: Any, stop: Any, wait: Any, options: dict[str, Any]
) -> None:
    theirs, ours = World(), World()
    inner, outer = script(plan, theirs), script(plan, ours)

    async def their_call() -> Any:
        return inner()

    async def our_call() -> Any:
        return outer()

    def drive(coroutine: Any) -> Any:
        """Run a coroutine that never suspends."""
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("it suspended")

    retrying = configured(tenacity.AsyncRetrying, theirs, retry, stop, wait, options)
    expected = ended(theirs, lambda: drive(retrying(their_call)))
    policy = Retry.adopt(configured(tenacity.AsyncRetrying, ours, retry, stop, wait, options))
    guarded = Pipeline(policy, env=Env(Ticking(ours)))(our_call)
    assert ended(ours, lambda: drive(guarded())) == expected
    assert ours.log == theirs.log


@SETTINGS
@given(outcomes, retries, stops, waits)
def test_strategies_as_settings_decide_as_tenacity_does(plan: list[Any], retry: Any, stop: Any, wait: Any) -> None:
    """`Retry(on=…, stop=…, wait=…)` is tenacity with `reraise=True`; a last result is returned, as for `until`."""
    theirs, ours = World(), World()
    retrying = tenacity.Retrying(retry=retry, stop=stop, wait=wait, sleep=theirs.sleep, reraise=True)
    expected = ended(theirs, lambda: retrying(script(plan, theirs)))
    call = script(plan, ours)

    def function() -> Any:
        return call()

    if expected[0] == "RetryError":
        expected = ("value", expected[2])
    policy = Retry(retry, stop=stop, wait=wait)
    assert ended(ours, Pipeline(policy, env=Env(Ticking(ours)))(function)) == expected
    assert ours.log == theirs.log


# -- mixtures --------------------------------------------------------------------------------------------------------


def failing(times: int) -> Callable[[], str]:
    left = [times]

    def function() -> str:
        if left[0]:
            left[0] -= 1
            raise Fault("x")
        return "ok"

    return function


def test_one_foreign_setting_goes_with_our_own() -> None:
    for policy, slept in (
        (Retry(Fault, wait=tenacity.wait_fixed(2.0)), [2.0, 2.0]),
        (Retry(Fault, wait=2.0, stop=tenacity.stop_after_attempt(3)), [2.0, 2.0]),
        (Retry(tenacity.retry_if_exception_type(Fault), wait=2.0), [2.0, 2.0]),
    ):
        clock = FakeClock()
        assert Pipeline(policy, env=Env(clock))(failing(2))() == "ok"
        assert clock.slept == slept
        with pytest.raises(Fault):
            Pipeline(policy, env=Env(FakeClock()))(failing(3))()
    clock = FakeClock()
    Pipeline(Retry(tenacity.retry_if_exception_type(Fault)), env=Env(clock, random.Random(1)))(failing(2))()
    assert len(clock.slept) == 2


def test_until_total_and_retry_after_hold_beside_strategies() -> None:
    clock, answers = FakeClock(), iter([0, 0, 1])
    policy = Retry(Fault, wait=tenacity.wait_fixed(1.0), until=bool, attempts=5)
    assert Pipeline(policy, env=Env(clock))(lambda: next(answers))() == 1
    assert clock.slept == [1.0, 1.0]
    never = Retry(Fault, wait=tenacity.wait_fixed(1.0), until=bool)
    assert Pipeline(never, env=Env(FakeClock()))(lambda: 0)() == 0
    clock = FakeClock()
    with pytest.raises(Fault):
        Pipeline(Retry(Fault, wait=tenacity.wait_fixed(2.0), total=3.0, attempts=9), env=Env(clock))(failing(9))()
    assert clock.slept == [2.0]

    def busy() -> None:
        error = Fault("x")
        error.retry_after = 7.0  # type: ignore[attr-defined] # pyright: ignore
        raise error

    clock = FakeClock()
    with pytest.raises(Fault):
        Pipeline(Retry(Fault, wait=tenacity.wait_fixed(1.0), attempts=2), env=Env(clock))(busy)()
    assert clock.slept == [7.0]


def test_the_note_knows_no_number_of_attempts_where_a_strategy_stops() -> None:
    with pytest.raises(Fault) as caught:
        Pipeline(Retry(Fault, wait=0, stop=tenacity.stop_after_attempt(2)), env=Env(FakeClock()))(failing(9))()
    assert caught.value.__notes__ == ["resilient: attempt 2, 0.0 s"]


def test_blocks_go_by_strategies_too() -> None:
    numbers: list[int] = []
    policy = Retry(tenacity.retry_if_exception_type(Fault), wait=tenacity.wait_none())
    for attempt in policy:
        with attempt:
            numbers.append(attempt.number)
            if attempt.number < 3:
                raise Fault
    assert numbers == [1, 2, 3]


def test_user_strategies_may_read_everything() -> None:
    """fn, args, kwargs, retry_object, start_time: all that a `RetryCallState` has."""
    seen: list[tuple[Any, ...]] = []

    class Nosy(tenacity.wait.wait_base):
        def __call__(self, retry_state: tenacity.RetryCallState) -> float:
            state = retry_state
            seen.append((state.get_fn_name(), state.args, state.kwargs, state.retry_object, state.start_time))
            assert "attempt #1" in repr(state)
            assert state.outcome is not None
            assert state.outcome.done()
            with pytest.raises(Fault):
                state.outcome.result()
            return 0.0

    class Stop(tenacity.stop.stop_base):
        def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
            return False

    calls = 0

    def function(a: int, b: int = 0) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Fault

    policy = Retry(Fault, wait=Nosy(), stop=Stop())
    Pipeline(policy, env=Env(FakeClock(3.0)))(function)(1, b=2)
    assert seen == [(function.__qualname__, (1,), {"b": 2}, policy, 3.0)]


# -- adopting --------------------------------------------------------------------------------------------------------


def test_a_decorated_function_is_adopted_with_its_strategies() -> None:
    calls = 0

    @tenacity.retry(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none(), reraise=True)
    def function(x: int) -> int:
        """Documented."""
        nonlocal calls
        calls += 1
        if calls < 3:
            raise Fault
        return x

    adopted = Retry.adopt(function)
    assert adopted(7) == 7
    assert (calls, adopted.__doc__) == (3, "Documented.")
    assert isinstance(resilient.inspect(adopted)[0], Retry)


def test_a_decorated_coroutine_function_is_adopted() -> None:
    calls = 0

    @tenacity.retry(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none())
    async def function(x: int) -> int:
        nonlocal calls
        calls += 1
        raise Fault

    adopted = Retry.adopt(function)
    assert inspect.iscoroutinefunction(adopted)
    with pytest.raises(tenacity.RetryError) as caught:
        asyncio.run(adopted(7))
    assert (calls, caught.value.last_attempt.attempt_number) == (3, 3)


def test_methods_are_adopted_in_every_form() -> None:
    class Service:
        calls = 0

        @tenacity.retry(stop=tenacity.stop_after_attempt(3), reraise=True)
        def method(self, x: int) -> int:
            self.calls += 1
            if self.calls < 3:
                raise Fault
            return x

        @classmethod
        @tenacity.retry(stop=tenacity.stop_after_attempt(3), reraise=True)
        def of_class(cls, x: int) -> tuple[type, int]:
            return cls, x

        @staticmethod
        @tenacity.retry(stop=tenacity.stop_after_attempt(3), reraise=True)
        def static(x: int) -> int:
            return x

    service = Service()
    bound: Any = service.method
    assert (Retry.adopt(bound)(4), service.calls) == (4, 3)
    assert Retry.adopt(Service.of_class)(4) == (Service, 4)

    class Adopted(Service):
        of_class: Any = Retry.adopt(vars(Service)["of_class"])
        static: Any = Retry.adopt(vars(Service)["static"])

    assert (Adopted.of_class(1), Adopted.static(2), Adopted().static(3)) == ((Adopted, 1), 2, 3)


def test_a_decorator_around_tenacity_is_not_lost() -> None:
    """`functools.wraps` copies `retry` outwards: adopting by that would drop the outer decorator."""

    @tenacity.retry(stop=tenacity.stop_after_attempt(2))
    def function() -> int:
        return 1

    @functools.wraps(function)
    def outer() -> int:
        return function() + 1

    with pytest.raises(TypeError, match="another decorator is around tenacity's; adopt what is inside it"):
        Retry.adopt(outer)


def test_a_retry_error_crosses_process_boundaries() -> None:
    """tenacity: its Future holds a lock, so a RetryError cannot be pickled."""
    for function in (failing(9), lambda: 0):
        policy = Retry.adopt(
            tenacity.Retrying(stop=tenacity.stop_after_attempt(2), retry=tenacity.retry_unless_exception_type(KeyError))
        )
        with pytest.raises(tenacity.RetryError) as caught:
            policy(function)()
        copy = pickle.loads(pickle.dumps(caught.value)).last_attempt
        assert (copy.attempt_number, copy.failed) == (2, caught.value.last_attempt.failed)
        assert copy.failed or copy.result() == 0


def test_a_callback_gets_the_real_thing() -> None:
    """It may keep the state, and read its outcome later."""
    policy = Retry.adopt(
        tenacity.Retrying(stop=tenacity.stop_after_attempt(2), retry_error_callback=lambda state: state)
    )
    state = policy(failing(9))()
    assert isinstance(state.outcome, tenacity.Future)
    assert isinstance(state.outcome.exception(), Fault)


def test_blocks_of_what_was_adopted() -> None:
    """Its own sleep, its error, and no more than one attempt if it is not enabled."""
    slept: list[float] = []
    plan: dict[str, Any] = {
        "stop": tenacity.stop_after_attempt(2),
        "wait": tenacity.wait_fixed(5),
        "sleep": slept.append,
    }
    turns = 0
    with pytest.raises(tenacity.RetryError) as caught:
        for attempt in Retry.adopt(tenacity.Retrying(**plan)):
            with attempt:
                turns += 1
                raise Fault
    assert isinstance(caught.value.__cause__, Fault)
    assert (turns, slept) == (2, [5.0])

    async def main(policy: Retry) -> None:
        nonlocal turns
        async for attempt in policy:
            async with attempt:
                turns += 1
                raise Fault

    with pytest.raises(tenacity.RetryError):
        asyncio.run(main(Retry.adopt(tenacity.AsyncRetrying(**plan))))
    assert (turns, slept) == (4, [5.0, 5.0])
    with pytest.raises(Fault):
        asyncio.run(main(Retry.adopt(tenacity.AsyncRetrying(enabled=False))))
    with pytest.raises(Fault):
        for attempt in Retry.adopt(tenacity.Retrying(enabled=False)):
            with attempt:
                turns += 1
                raise Fault
    assert turns == 6


def test_a_disabled_retrying_leaves_the_function_alone() -> None:
    def function() -> int:
        return 1

    async def afunction() -> int:
        return 2

    policy = Retry.adopt(tenacity.Retrying(enabled=False))
    assert (policy(function)(), asyncio.run(policy(afunction)())) == (1, 2)
    assert not hasattr(function, "__resilient__")
    assert not hasattr(afunction, "__resilient__")
    for attempt in policy:
        with attempt:
            attempt.result(1)

    async def main() -> None:
        async for attempt in policy:
            async with attempt:
                attempt.result(1)

    asyncio.run(main())


def test_what_is_not_tenacitys_is_not_adopted() -> None:
    for other in (3, len, Retry(Fault)):
        with pytest.raises(TypeError, match=r"it is neither a tenacity.Retrying nor decorated by tenacity"):
            Retry.adopt(other)


def test_a_disabled_retrying_is_no_retry() -> None:
    policy = Retry.adopt(tenacity.Retrying(enabled=False))
    calls: list[int] = []

    def function() -> None:
        calls.append(1)
        raise Fault

    async def afunction() -> None:
        function()

    with pytest.raises(Fault):
        policy(function)()
    with pytest.raises(Fault):
        asyncio.run(policy(afunction)())
    assert len(calls) == 2


def test_the_log_hooks_of_tenacity_work(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("hooks")
    policy = Retry.adopt(
        tenacity.Retrying(
            stop=tenacity.stop_after_attempt(2),
            wait=tenacity.wait_fixed(1.5),
            before=tenacity.before_log(logger, logging.INFO),
            after=tenacity.after_log(logger, logging.INFO),
            before_sleep=tenacity.before_sleep_log(logger, logging.INFO),
        )
    )
    with caplog.at_level(logging.INFO, "hooks"), pytest.raises(tenacity.RetryError):
        Pipeline(policy, env=Env(FakeClock()))(failing(9))()
    assert len(caplog.records) == 5
    assert "1.5 seconds" in caplog.text


def test_a_custom_sleep_is_used_for_all_kinds() -> None:
    slept: list[Any] = []

    async def asleep(seconds: float) -> None:
        slept.append(("async", seconds))

    plan: dict[str, Any] = {"wait": tenacity.wait_fixed(2.0), "stop": tenacity.stop_after_attempt(2), "reraise": True}

    async def afails() -> None:
        raise Fault

    def fails() -> None:
        raise Fault

    plain = Retry.adopt(tenacity.Retrying(sleep=slept.append, **plan))
    with pytest.raises(Fault):
        plain(fails)()
    with pytest.raises(Fault):
        asyncio.run(plain(afails)())
    with pytest.raises(Fault):
        asyncio.run(Retry.adopt(tenacity.AsyncRetrying(sleep=asleep, **plan))(afails)())
    lazy = tenacity.AsyncRetrying(sleep=lambda seconds: asleep(seconds), **plan)
    with pytest.raises(Fault):
        asyncio.run(Retry.adopt(lazy)(afails)())
    assert slept == [2.0, 2.0, ("async", 2.0), ("async", 2.0)]


# -- async strategies ------------------------------------------------------------------------------------------------


async def is_fault(error: BaseException) -> bool:
    return isinstance(error, Fault)


async def is_zero(value: Any) -> bool:
    return bool(value == 0)


def test_async_strategies_serve_coroutines_and_are_refused_elsewhere() -> None:
    """tenacity: an async predicate on a sync function retries for ever, with only a warning."""
    strategy = tenacity.asyncio.retry_if_exception(is_fault) | tenacity.asyncio.retry_if_result(is_zero)
    policy = Retry(strategy, wait=tenacity.wait_fixed(1.0), attempts=4)
    answers: Iterator[Any] = iter([Fault, 0, 5])

    async def function() -> Any:
        answer = next(answers)
        if answer is Fault:
            raise Fault
        return answer

    clock = FakeClock()
    assert trio.run(Pipeline(policy, env=Env(clock))(function)) == 5
    assert clock.slept == [1.0, 1.0]
    with pytest.raises(TypeError, match="is async, and the function is not"):
        policy(lambda: 1)
    with pytest.raises(TypeError, match="is async: say `async for` and `async with attempt`"):
        iter(policy)

    async def fails() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(policy(fails)())


def test_a_plain_strategy_of_async_ones_is_refused() -> None:
    """tenacity: a coroutine is always true, and nobody awaits it."""
    strategy = tenacity.asyncio.retry_if_exception(is_fault)
    for wrong in (
        tenacity.retry_any(strategy, tenacity.retry_never),
        tenacity.retry_if_exception(is_fault),  # type: ignore[arg-type] # pyright: ignore
        tenacity.retry_all(tenacity.retry_if_exception(is_fault)),  # type: ignore[arg-type] # pyright: ignore
    ):
        with pytest.raises(TypeError, match=r"answers at once, and .* use the strategies of tenacity.asyncio"):
            Retry(wrong)
    hidden = Retry(tenacity.retry_if_exception(lambda error: is_fault(error)), wait=0)  # type: ignore[arg-type, return-value] # pyright: ignore
    with pytest.raises(TypeError, match="must answer at once, and it returned a coroutine"):
        hidden(failing(1))()


def test_async_hooks_are_awaited() -> None:
    seen: list[str] = []

    async def hook(state: Any) -> None:
        seen.append("hook")

    async def callback(state: Any) -> str:
        return "called back"

    async def fails() -> None:
        raise Fault

    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(2),
        wait=tenacity.wait_none(),
        before=hook,
        after=hook,
        before_sleep=hook,
        retry_error_callback=callback,
    )
    assert asyncio.run(Retry.adopt(retrying)(fails)()) == "called back"
    assert seen == ["hook"] * 5


def test_async_strategies_serve_async_blocks() -> None:
    policy = Retry(tenacity.asyncio.retry_if_exception(is_fault) | tenacity.asyncio.retry_if_result(is_zero), wait=0)

    async def wrong() -> None:
        async for attempt in policy:
            with attempt:
                raise Fault

    with pytest.raises(TypeError, match=r"it returned a coroutine.*`async with attempt`"):
        asyncio.run(wrong())
    numbers: list[int] = []

    async def good() -> None:
        async for attempt in policy:
            async with attempt:
                numbers.append(attempt.number)
                if attempt.number == 1:
                    raise Fault
                attempt.result(attempt.number - 2)

    trio.run(good)
    assert numbers == [1, 2, 3]


def test_result_strategies_judge_first_items() -> None:
    closed: list[int] = []
    firsts = iter([0, 0, 5])

    def items() -> Iterator[int]:
        first = next(firsts)
        try:
            yield first
        finally:
            closed.append(first)

    policy = Retry(tenacity.retry_if_result(lambda item: item == 0), wait=0)
    assert list(policy(items)()) == [5]
    assert closed == [0, 0, 5]

    def empty() -> Iterator[int]:
        yield from ()

    assert list(policy(empty)()) == []
    assert list(Retry(tenacity.retry_if_exception_type(Fault))(empty)()) == []


def test_a_callback_cannot_answer_for_a_generator() -> None:
    policy = Retry.adopt(tenacity.Retrying(retry_error_callback=lambda state: "x"))

    def items() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="retry_error_callback answers in place of a function, and not of a generator"):
        policy(items)


def test_a_plain_retry_does_not_import_tenacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """tenacity costs 28 ms to import."""
    monkeypatch.delitem(sys.modules, "tenacity")
    assert Retry(Fault, wait=0)(failing(1))() == "ok"
    assert "tenacity" not in sys.modules
