"""Recovery of several sagas beside each other: in threads and in tasks, cut off, and where there are no threads."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import trio

from resilient import Retry, _threads, durable, sagas
from resilient._cli_saga import HANDS as CLI_HANDS
from resilient._recovery import HANDS, Recoverer, _Shift
from tests._saga_worlds import Spy, alone
from tests.test_durable import athree, aundo, died, hooks, log, made, step
from tests.test_sagas import block

RETRIES = Retry(Exception, attempts=2, wait=0, name="compensation")
LONG = 30.0
"""Seconds after which a test that hangs fails."""


number: ContextVar[int] = ContextVar("number", default=0)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    log.clear()
    hooks.clear()
    with alone():
        yield
    hooks.clear()


@pytest.fixture
def spy() -> Spy:
    return Spy()


def blocks(spy: Spy, number: int) -> set[str]:
    names = [f"o-{n}" for n in range(number)]
    for name in names:
        block(spy, name)
    return {f"block/{name}" for name in names}


def left(spy: Spy) -> int:
    return sum(one.state == "orphaned" for one in sagas.list_sagas(spy))


def recover(spy: Spy, **more: Any) -> sagas.Report:
    return sagas.recover(spy, retries=RETRIES, **more)


class Crowd:
    """Counts who is inside at the same time; each stays until `most` are, or have been."""

    def __init__(self, most: int) -> None:
        self.now = self.peak = 0
        self.met = threading.Barrier(most)
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.now += 1
            self.peak = max(self.peak, self.now)
        self.met.wait(LONG)
        with self._lock:
            self.now -= 1


# -- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError)])
def test_a_number_that_is_none_is_refused_before_anything_is_imported(spy: Spy, wrong: Any, error: Any) -> None:
    with pytest.raises(error, match="concurrency must be"):
        recover(spy, concurrency=wrong, modules=["no.such.module"])
    with pytest.raises(error, match="concurrency must be"):
        asyncio.run(sagas.arecover(spy, concurrency=wrong, modules=["no.such.module"]))
    assert spy.ops == []


def test_the_command_has_the_same_number_by_default() -> None:
    assert CLI_HANDS == HANDS


@pytest.mark.parametrize("number", [2, 3])
def test_so_many_are_undone_beside_each_other_and_no_more(spy: Spy, number: int) -> None:
    names = blocks(spy, 6)
    crowd = hooks["undo b"] = Crowd(number)
    assert set(recover(spy, concurrency=number).compensated) == names
    assert crowd.peak == number


def test_threads_have_the_context_of_the_caller_each_a_copy(spy: Spy) -> None:
    blocks(spy, 4)
    crowd, seen = Crowd(2), list[int]()

    def look() -> None:
        crowd()
        seen.append(number.get())
        number.set(7)

    hooks["undo b"] = look
    number.set(3)
    recover(spy, concurrency=2)
    assert seen.count(3) >= 2
    assert number.get() == 3


def test_one_at_a_time_is_in_the_thread_of_the_caller(spy: Spy) -> None:
    blocks(spy, 3)
    seen: set[int] = set()
    hooks["undo a"] = lambda: seen.add(threading.get_ident())
    assert len(recover(spy, concurrency=1).compensated) == 3
    assert seen == {threading.get_ident()}


def test_under_a_loop_it_is_one_at_a_time(spy: Spy) -> None:
    blocks(spy, 3)
    seen: set[int] = set()
    hooks["undo a"] = lambda: seen.add(threading.get_ident())

    async def main() -> None:
        assert len(recover(spy, concurrency=3).compensated) == 3

    asyncio.run(main())
    assert seen == {threading.get_ident()}


def test_async_functions_run_in_loops_of_their_own_beside_each_other(spy: Spy) -> None:
    place = made(spy, athree)
    for n in range(4):
        died(spy, place, "b", name=f"o-{n}")
    crowd = hooks["c"] = Crowd(2)
    assert set(recover(spy, concurrency=2).finished) == {f"order/o-{n}" for n in range(4)}
    assert crowd.peak == 2


def test_one_bad_saga_ends_no_hand(spy: Spy) -> None:
    good = blocks(spy, 5)
    for name in ("x-1", "x-2", "x-3"):
        died(spy, made(spy), "b", name=name)
    durable._bodies.clear()
    recoverer = Recoverer(spy, retries=RETRIES, concurrency=4)
    report = recoverer.round()
    assert set(report.compensated) == good
    assert sorted(report.left) == ["order/x-1", "order/x-2", "order/x-3"]
    assert sorted(recoverer.failing.values()) == [(1, 2)] * 3
    assert len(recoverer.round().left) == 3
    assert recoverer.round() == sagas.Report()


# -- threads: cut off ------------------------------------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released each time a shift is told to end."""
    told = threading.Semaphore(0)
    end = _Shift.end

    def telling(self: _Shift, cut: BaseException) -> None:
        end(self, cut)
        told.release()

    monkeypatch.setattr(_Shift, "end", telling)
    return told


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_an_interrupt_lets_those_in_hand_come_to_their_end(spy: Spy, ended: threading.Semaphore) -> None:
    blocks(spy, 4)
    crowd = Crowd(2)

    def cut() -> None:
        if crowd.met.wait(LONG) == 0:
            interrupt()
            assert ended.acquire(timeout=LONG)
            ended.release()
        else:
            assert ended.acquire(timeout=LONG)
            ended.release()

    hooks["undo b"] = cut
    with pytest.raises(KeyboardInterrupt):
        recover(spy, concurrency=2)
    assert left(spy) == 2
    assert log.count("undo a A") == 2


def test_a_second_interrupt_waits_for_nobody(spy: Spy, ended: threading.Semaphore) -> None:
    blocks(spy, 4)
    crowd, go, over = Crowd(2), threading.Event(), threading.Semaphore(0)

    def cut() -> None:
        if crowd.met.wait(LONG) == 0:
            interrupt()
            assert ended.acquire(timeout=LONG)
            interrupt()
        assert go.wait(LONG)

    hooks["undo b"] = cut
    spy.after = lambda op: over.release() if type(op).__name__ == "Finish" else None
    with pytest.raises(KeyboardInterrupt):
        recover(spy, concurrency=2)
    assert left(spy) == 2
    assert "undo a A" not in log
    # What is in hand is in the hands of threads that nobody waits for.
    go.set()
    for _ in range(2):
        assert over.acquire(timeout=LONG)
    assert left(spy) == 2


def test_what_is_no_failure_of_a_saga_ends_the_round_and_is_raised(spy: Spy) -> None:
    blocks(spy, 4)
    hooks["undo b"] = Crowd(2)

    def say(*_: object) -> None:
        raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError, match="nobody listens"):
        Recoverer(spy, retries=RETRIES, concurrency=2, say=say).round()
    assert left(spy) == 2


def test_a_bell_between_two_sagas_is_heard_by_all_hands(spy: Spy) -> None:
    blocks(spy, 5)
    hooks["undo b"] = Crowd(2)
    done: list[str] = []
    recoverer = Recoverer(
        spy,
        retries=RETRIES,
        concurrency=2,
        stop=lambda: bool(done),
        say=lambda record, how, error: done.append(how),
    )
    assert len(recoverer.round().compensated) == 2
    assert left(spy) == 3


@pytest.mark.parametrize("number", [0, 1])
def test_where_there_are_no_threads_fewer_hands_do_it(spy: Spy, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    names = blocks(spy, 4)
    run: Callable[[Any], None] = _threads.run
    had: list[Any] = []

    def none(job: Any) -> None:
        if len(had) == number:
            raise RuntimeError("can't start new thread")
        had.append(job)
        run(job)

    monkeypatch.setattr(_threads, "run", none)
    assert set(recover(spy, concurrency=4).compensated) == names
    assert len(had) == number


# -- tasks -----------------------------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["asyncio", "trio"])


def in_kind(kind: str, main: Callable[[], Any]) -> Any:
    return asyncio.run(main()) if kind == "asyncio" else trio.run(main)


class Meeting:
    """Like `Crowd`, for tasks; `go` lets them go on."""

    def __init__(self, kind: str, most: int) -> None:
        self.now = self.peak = 0
        self.most = most
        self.met: Any = asyncio.Event() if kind == "asyncio" else trio.Event()
        self.go: Any = asyncio.Event() if kind == "asyncio" else trio.Event()

    async def inside(self) -> None:
        self.now += 1
        self.peak = max(self.peak, self.now)
        if self.now == self.most:
            self.met.set()
        await self.go.wait()
        self.now -= 1


async def meet(name: str) -> None:
    log.append(name)
    await hooks["meeting"].inside()


async def meeting(saga: Any, order: str) -> str:
    await saga.step(step, "a", compensate=aundo)
    await saga.step(step, "b", compensate=None)
    await saga.step(meet, "c", compensate=None)
    return order


def orders(spy: Spy, number: int) -> set[str]:
    names = [f"o-{n}" for n in range(number)]
    place = made(spy, meeting)
    for name in names:
        died(spy, place, "b", name=name)
    return {f"order/{name}" for name in names}


@KINDS
def test_tasks_go_on_with_so_many_beside_each_other(spy: Spy, kind: str) -> None:
    names = orders(spy, 5)

    async def main() -> sagas.Report:
        there = hooks["meeting"] = Meeting(kind, 3)

        async def release() -> None:
            await there.met.wait()
            there.go.set()

        if kind == "trio":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(release)
                return await sagas.arecover(spy, concurrency=3)
        releasing = asyncio.create_task(release())
        report = await sagas.arecover(spy, concurrency=3)
        await releasing
        return report

    assert set(in_kind(kind, main).finished) == names
    assert hooks["meeting"].peak == 3


@KINDS
def test_one_bad_saga_ends_no_task(spy: Spy, kind: str) -> None:
    good = blocks(spy, 3)
    died(spy, made(spy), "b", name="x-1")
    durable._bodies.clear()

    async def main() -> sagas.Report:
        return await sagas.arecover(spy, retries=RETRIES, concurrency=2)

    report = in_kind(kind, main)
    assert set(report.compensated) == good
    assert list(report.left) == ["order/x-1"]


@KINDS
@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_cancel_goes_to_all_that_is_in_hand_and_nothing_is_begun(spy: Spy, kind: str, concurrency: int) -> None:
    orders(spy, 4)

    async def cancelled() -> None:
        there = hooks["meeting"] = Meeting(kind, concurrency)
        if kind == "trio":
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def going() -> None:
                    with scope:
                        await sagas.arecover(spy, concurrency=concurrency)
                    log.append("caught")

                nursery.start_soon(going)
                await there.met.wait()
                scope.cancel()
            assert scope.cancelled_caught
            return
        task = asyncio.create_task(sagas.arecover(spy, concurrency=concurrency))
        await there.met.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        log.append("caught")

    in_kind(kind, cancelled)
    assert log[-1] == "caught"
    # A cancelled saga is undone, as when it ran first.
    assert log.count("undo a A") == concurrency
    assert left(spy) == 4 - concurrency


@KINDS
@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_is_no_failure_of_a_saga_ends_the_round_of_tasks(spy: Spy, kind: str, concurrency: int) -> None:
    blocks(spy, 4)

    def say(*_: object) -> None:
        raise BrokenPipeError("nobody listens")

    async def main() -> None:
        with pytest.raises(BrokenPipeError, match="nobody listens"):
            await Recoverer(spy, retries=RETRIES, concurrency=concurrency, say=say).around()

    in_kind(kind, main)
    assert left(spy) in range(4 - concurrency, 4)
