"""The two drivers carry out programs alike: each step, each answer, and the end of both by an interrupt or a close."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import pytest
import trio

from resilient import Env, StoreError
from resilient import _aio as aio
from resilient._drive import RUN, Ask, Cut, Last, Outcome, Settle, Sleep, Wait, adrive, drive
from resilient._keeper import Beat
from resilient.stores import Read, Renew
from resilient.testing import FakeClock
from tests._once_store import TroubledStore

everywhere = pytest.mark.parametrize("way", ["plain", "asyncio", "trio"])
READ = Read("k")


class Drive:
    """Runs the steps of a list as a program, and notes the answers."""

    def __init__(
        self, way: str, store: TroubledStore, call: Callable[..., Any], *steps: Any, returns: bool = False
    ) -> None:
        self.way, self.store, self.call, self.returns = way, store, call, returns
        self.steps, self.answers = steps, list[Any]()
        self.closed = False
        self.env = Env(FakeClock())

    def program(self) -> Generator[Any, Any, Outcome]:
        try:
            for step in self.steps:
                self.answers.append((yield step))
            end = Outcome("end", None)
            if not self.returns:
                yield end
            return end
        finally:
            self.closed = True

    def __call__(self, *args: Any) -> Any:
        if self.way == "plain":
            return drive(self.program(), self.store, self.env, self.call, args, {}).result()

        async def call(*args: Any) -> Any:
            return self.call(*args)

        async def main() -> Any:
            return (await adrive(self.program(), self.store, self.env, call, args, {})).result()

        return asyncio.run(main()) if self.way == "asyncio" else trio.run(main)


@everywhere
@pytest.mark.parametrize("returns", [False, True])
def test_each_step_gets_its_answer_and_the_program_is_closed(way: str, returns: bool) -> None:
    store = TroubledStore()
    run = Drive(way, store, lambda n: n + 1, RUN, Ask(lambda n: n + 2), READ, Last(READ), Sleep(5.0), returns=returns)
    assert run(1) == "end"
    ran, asked, read, last, slept = run.answers
    assert (ran.result(), asked.result(), read, last, slept) == (2, 3, None, None, None)
    assert run.env.clock.now() == 5.0
    assert run.closed


@everywhere
def test_errors_of_functions_are_outcomes_and_those_of_stores_answers(way: str) -> None:
    store, error = TroubledStore(), KeyError("x")

    def fail(n: int) -> None:
        raise error

    store.meet(Read, "down", "lost")
    run = Drive(way, store, fail, RUN, Ask(fail), READ, Last(READ))
    assert run(1) == "end"
    assert run.answers[0].error is run.answers[1].error is error
    assert [type(answer) for answer in run.answers[2:]] == [StoreError, StoreError]
    assert [answer.maybe_written for answer in run.answers[2:]] == [False, True]


@pytest.mark.parametrize(("way", "step"), [("plain", READ), ("plain", Last(READ)), ("asyncio", READ), ("trio", READ)])
def test_an_interrupt_in_the_store_is_an_answer(way: str, step: Any) -> None:
    store, interrupt = TroubledStore(), KeyboardInterrupt()
    store.meet(Read, interrupt)
    run = Drive(way, store, print, step)
    assert run(1) == "end"
    assert isinstance(run.answers[0], Cut)
    assert run.answers[0].error is interrupt


@everywhere
def test_what_else_a_store_raises_goes_to_the_caller(way: str) -> None:
    store = TroubledStore()
    store.meet(Read, ZeroDivisionError())
    run = Drive(way, store, print, READ)
    with pytest.raises(ZeroDivisionError):
        run(1)
    assert run.closed


@everywhere
@pytest.mark.parametrize("where", ["call", "ask", "store"])
def test_a_close_is_nobodys_answer(way: str, where: str) -> None:
    store = TroubledStore()

    def close(n: int) -> None:
        raise GeneratorExit

    if where == "store":
        store.meet(Read, GeneratorExit())
    run = Drive(way, store, close, {"call": RUN, "ask": Ask(close), "store": READ}[where])
    with pytest.raises(GeneratorExit):
        run(1)
    assert run.closed
    assert run.answers == []


@everywhere
def test_the_first_wait_only_begins_to_watch_and_the_watch_ends_with_the_program(way: str) -> None:
    store = TroubledStore(FakeClock())
    run = Drive(way, store, print, Wait("k", 5.0), READ, Wait("k", 5.0), Wait("k", 2.0))
    assert run(1) == "end"
    assert run.env.clock.now() == 7.0
    assert store.inner._bells._watches == {}


@everywhere
def test_without_a_watch_each_wait_is_a_sleep(way: str) -> None:
    run = Drive(way, TroubledStore(watch=False), print, Wait("k", 5.0), Wait("k", 2.0))
    assert run(1) == "end"
    assert run.env.clock.now() == 7.0


@everywhere
def test_a_heartbeat_is_waited_for_where_one_is_under_way(way: str) -> None:
    run = Drive(way, TroubledStore(), print, Settle(Beat("k", "k", "o")))
    assert run(1) == "end"
    assert run.answers == [None]


@pytest.mark.parametrize("way", ["asyncio", "trio"])
def test_the_last_word_of_one_who_is_cancelled_has_an_end(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "GRACE", 0.01)
    never = FakeClock(autojump=False)
    store = TroubledStore()
    store.meet(Renew, lambda: never.asleep(1.0))
    run = Drive(way, store, print, Last(Renew("k", "o", 1, 30.0)))
    assert run(1) == "end"
    assert isinstance(run.answers[0], StoreError)
    assert run.answers[0].maybe_written
    assert "did not answer in time" in str(run.answers[0])


@pytest.mark.parametrize("way", ["asyncio", "trio"])
def test_a_coroutine_may_be_asked(way: str) -> None:
    async def ask(n: int) -> int:
        return n + 5

    run = Drive(way, TroubledStore(), print, Ask(ask))
    run(1)
    assert run.answers[0].result() == 6


def test_an_outcome_is_given_out_once() -> None:
    assert Outcome(5, None).result() == 5
    outcome = Outcome(None, KeyError("x"))
    with pytest.raises(KeyError):
        outcome.result()
    assert outcome.error is None
    assert outcome.result() is None
