"""The compensation stack by itself: what is called, in which order, and what its program says."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from resilient._ambient import deadline, remaining
from resilient._drive import Do, Outcome
from resilient._undo import RESULT, UNKNOWN, Undo, Undoing, backwards, call, check, step_key, takes_result, unwind
from resilient.errors import SagaError
from resilient.events import Compensated
from resilient.policy import Env
from resilient.testing import Recorder

Log = list[Any]


def undo_of(number: int, compensate: Any, *args: Any, value: Any = UNKNOWN, **kwargs: Any) -> Undo:
    return Undo(number, f"step {number}", compensate, args, kwargs, value)


def finish(program: Any, answer: Callable[[Do], Outcome] | None = None) -> Any:
    """Carry a program out; what it returns."""
    got: Any = None
    while True:
        try:
            step = program.send(got)
        except StopIteration as stop:
            return stop.value
        got = carry(step) if answer is None else answer(step)


def carry(step: Do) -> Outcome:
    try:
        return Outcome(step.function(*step.args, **step.kwargs), None)
    except BaseException as error:
        return Outcome(None, error)


def plainly(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


# -- what is called --------------------------------------------------------------------------------------------------


def test_a_compensation_gets_the_arguments_of_its_step() -> None:
    def undo(sku: str, *, quantity: int) -> None: ...

    assert undo_of(1, undo, "a", quantity=2, value=9).bound() == (undo, ("a",), {"quantity": 2})


def test_one_with_a_parameter_result_gets_the_value() -> None:
    def undo(sku: str, result: object = None) -> None: ...

    assert undo_of(1, undo, "a", value=9).bound() == (undo, ("a",), {"result": 9})
    assert undo_of(1, undo, "a").bound() == (undo, ("a",), {"result": UNKNOWN})


def test_call_says_exactly_what() -> None:
    def undo(*args: Any, **kwargs: Any) -> None: ...

    given = call(undo, RESULT, 1, receipt=RESULT, why="late")
    assert undo_of(1, given, "not this", value=9).bound() == (undo, (9, 1), {"receipt": 9, "why": "late"})
    assert undo_of(1, given).bound() == (undo, (UNKNOWN, 1), {"receipt": UNKNOWN, "why": "late"})


def test_what_takes_a_result() -> None:
    class Undo:
        def __call__(self, *, result: int) -> None: ...

        def method(self, result: int) -> None: ...

    def only_by_place(result: int, /) -> None: ...

    def anything(**result: int) -> None: ...

    assert takes_result(Undo())
    assert takes_result(Undo().method)
    assert takes_result(functools.partial(Undo().method))
    # It could not be given under that name.
    assert not takes_result(only_by_place)
    assert not takes_result(anything)
    # There is no signature to look at.
    assert not takes_result(type)


def test_what_a_compensation_can_be() -> None:
    for good in (None, print, call(print)):
        check(good)
    for bad in (1, "print", RESULT, ()):
        with pytest.raises(TypeError, match="compensate must be"):
            check(bad)
    with pytest.raises(TypeError, match="call needs a function, not 'refund'"):
        call("refund")  # type: ignore[arg-type]


def test_the_words_say_what_they_are() -> None:
    assert (repr(RESULT), repr(UNKNOWN), bool(RESULT), bool(UNKNOWN)) == ("RESULT", "UNKNOWN", False, False)


# -- the order -------------------------------------------------------------------------------------------------------


def test_backwards_through_groups_and_sagas_inside() -> None:
    one, two, three, four, five = (undo_of(number, print) for number in range(1, 6))
    assert [undo.number for undo in backwards([one, [two, [three]], [], four, [[five]]])] == [5, 4, 3, 2, 1]


# -- the program -----------------------------------------------------------------------------------------------------


def test_every_compensation_gets_its_chance() -> None:
    """larzstate: an error of one compensation was swallowed, and nobody heard of it."""
    log: Log = []
    first, second = ValueError("1"), OSError("3")

    def fail(error: Exception) -> None:
        log.append(repr(error))
        raise error

    undos = [undo_of(3, fail, second), undo_of(2, log.append, "2"), undo_of(1, fail, first)]
    errors, cut = finish(unwind("order", "o-1", undos, plainly, Env()))
    assert log == ["OSError('3')", "2", "ValueError('1')"]
    assert errors == [second, first]
    assert cut is None
    assert first.__notes__ == ["resilient: compensation of step step 1 of saga order (o-1)"]


def test_each_is_reported_and_noted() -> None:
    recorder, noted = Recorder(), []

    def note(undo: Undo, error: BaseException | None) -> Any:
        noted.append((undo.number, error))
        yield Do(len, ("",), {})

    fault = ValueError("2")

    def fail() -> None:
        raise fault

    undos = [undo_of(2, fail), undo_of(1, len, "")]
    finish(unwind("order", "o-1", undos, plainly, Env(sinks=[recorder]), note))
    assert recorder.events == [
        Compensated("order", "o-1", "step 2", fault),
        Compensated("order", "o-1", "step 1", None),
    ]
    assert noted == [(2, fault), (1, None)]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_an_interrupted_compensation_runs_to_its_end(kind: type[BaseException]) -> None:
    log: Log = []
    interrupts = [kind("now")]

    def undo(number: int) -> None:
        log.append(number)
        if number == 2 and interrupts:
            raise interrupts.pop()

    errors, cut = finish(unwind("order", "o-1", [undo_of(n, undo, n) for n in (3, 2, 1)], plainly, Env()))
    assert log == [3, 2, 2, 1]
    assert not errors
    assert type(cut) is kind


def test_one_that_is_interrupted_again_has_failed() -> None:
    def undo() -> None:
        raise KeyboardInterrupt

    errors, cut = finish(unwind("order", "o-1", [undo_of(1, undo)], plainly, Env()))
    assert [type(error) for error in errors] == [RuntimeError]
    assert isinstance(cut, KeyboardInterrupt)
    assert isinstance(errors[0].__cause__, KeyboardInterrupt)


def test_a_cancel_that_nobody_sent_is_a_failure() -> None:
    def undo() -> None:
        raise asyncio.CancelledError

    undoing = Undoing(plainly)
    undoing.alone = True
    errors, cut = finish(unwind("order", "o-1", [undo_of(1, undo)], undoing, Env()))
    assert [type(error) for error in errors] == [RuntimeError]
    assert cut is None


def test_when_the_time_is_over_nothing_else_begins() -> None:
    log: Log = []

    def undo(number: int) -> None:
        log.append(number)
        if number == 2:
            undoing.stop()
            raise asyncio.CancelledError

    undoing = Undoing(plainly)
    errors, cut = finish(unwind("order", "o-1", [undo_of(n, undo, n) for n in (3, 2, 1)], undoing, Env()))
    assert log == [3, 2]
    assert cut is None
    assert [type(error) for error in errors] == [TimeoutError, TimeoutError]
    assert [undo.number for undo in undoing.failed] == [2, 1]
    assert "the time for compensations was over" in str(errors[0])
    assert "not begun" in str(errors[1])


def test_with_a_journal_the_rest_is_left_to_recovery() -> None:
    noted: Log = []

    def undo(number: int) -> None:
        if number == 2:
            undoing.stop()
            raise asyncio.CancelledError

    def note(undo: Undo, error: BaseException | None) -> Any:
        noted.append(undo.number)
        yield Do(len, ("",), {})

    undoing = Undoing(plainly)
    with pytest.raises(SagaError, match="time for its compensations was over"):
        finish(unwind("order", "o-1", [undo_of(n, undo, n) for n in (3, 2, 1)], undoing, Env(), note))
    assert noted == [3]


def test_compensations_know_their_step_and_no_deadline() -> None:
    seen: Log = []

    def undo() -> None:
        seen.append((step_key.get(), remaining()))

    with deadline(0):
        finish(unwind("order", "o-1", [undo_of(7, undo)], Undoing(plainly), Env()))
        assert remaining() == 0.0
    assert seen == [("order/o-1/7", None)]
    assert step_key.get() is None
