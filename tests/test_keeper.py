"""Heartbeats: they renew what takes long, cost short calls nothing, and end before the last word."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio

from resilient import Env, Idempotent, InDoubt, LeaseLost, Pipeline, _keeper, claim
from resilient import _aio as aio
from resilient._keeper import Beat, ThreadKeeper, _forked, new_owner
from resilient._once import current
from resilient.clock import SystemClock
from resilient.stores import Claim, Finish, Renew
from resilient.testing import FakeClock, Recorder
from tests._once_store import TroubledStore
from tests.worlds import World, worlds

CLOCK = SystemClock()


def until(happened: Callable[[], Any]) -> None:
    """Let other threads work until something has happened."""
    while not happened():
        CLOCK.sleep(0.0005)


def beating() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "resilient-heartbeat"}


# -- plain functions ---------------------------------------------------------------------------------------------------


def test_a_thread_renews_what_takes_long() -> None:
    """powertools#8386: a record whose owner still works is claimed by the next one."""
    clock = FakeClock()
    store = TroubledStore(clock)
    policy = Idempotent(store, key="key", lease=0.06, duplicates="raise")

    @policy
    def body(key: str) -> str:
        for _ in range(3):
            clock.advance(0.05)  # the store's clock, in which a lease without heartbeats is over soon
            wanted = store.names.count("Renew") + 2  # one may have begun before
            until(lambda wanted=wanted: store.names.count("Renew") >= wanted)  # type: ignore[misc]
            assert store.states == ["running"]
        return "done"

    assert body("k") == body("k") == "done"
    assert (policy.lost, policy.replays) == (0, 1)


def test_one_thread_serves_many_calls_and_ends_when_there_are_none() -> None:
    store, before, seen = TroubledStore(), beating(), threading.Event()
    policy = Idempotent(store, key="key", lease=0.06)

    def renewed(key: str) -> int:
        owners = [op.owner for op in list(store.ops) if isinstance(op, Renew)]
        return owners.count(claim().owner)

    @policy
    def body(key: str) -> None:
        until(lambda: renewed(key) >= 2)
        assert seen.wait(60)  # until somebody has looked at the thread

    callers = [threading.Thread(target=body, args=(str(n),), daemon=True) for n in range(5)]
    for caller in callers:
        caller.start()
    until(lambda: len({op.owner for op in list(store.ops) if isinstance(op, Renew)}) == 5)
    (mine,) = beating() - before
    seen.set()
    for caller in callers:
        caller.join(60)
    mine.join(60)
    assert not mine.is_alive()
    assert store.states == ["done"] * 5
    body("again")  # and another begins
    assert store.states == ["done"] * 6


def test_a_short_call_sends_no_heartbeat_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(SystemClock):
        """However long the machine stands still, the calls are short."""

        now = staticmethod(lambda: 0.0)

    monkeypatch.setattr(_keeper, "_SYSTEM", Still())
    store, before = TroubledStore(), beating()
    policy = Idempotent(store, key="key", lease=0.06)
    call: Any = policy(lambda key: key)
    for n in range(20):
        call(str(n))
    for thread in beating() - before:
        thread.join(60)
    assert "Renew" not in store.names


def test_a_heartbeat_that_is_under_way_ends_before_the_last_word() -> None:
    store = TroubledStore()
    log: list[str] = []
    holds: list[Any] = []
    started = threading.Event()

    def slow() -> None:
        started.set()
        until(lambda: holds[0]._waiter is not None)
        log.append("heartbeat ends")

    store.meet(Renew, slow)
    store.meet(Finish, lambda: log.append("last word"))

    @Idempotent(store, key="key", lease=0.06)
    def body(key: str) -> None:
        holds.append(claim())
        assert started.wait(60)

    body("k")
    assert log == ["heartbeat ends", "last word"]
    assert store.names == ["Claim", "Renew", "Finish"]


def test_an_interrupt_while_a_heartbeat_is_waited_for_loses_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    store, started, go = TroubledStore(), threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        assert go.wait(60)

    store.meet(Renew, slow)

    def interrupted(self: Beat) -> None:
        go.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(Beat, "settle", interrupted)

    @Idempotent(store, key="key", lease=0.06)
    def body(key: str) -> str:
        assert started.wait(60)
        return "done"

    with pytest.raises(KeyboardInterrupt):
        body("k")
    assert store.states == ["done"]


@pytest.mark.parametrize("fault", ["down", "lost", ZeroDivisionError("a bug")], ids=str)
def test_a_heartbeat_that_fails_is_survived(fault: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = TroubledStore()
    store.meet(Renew, fault)

    @Idempotent(store, key="key", lease=0.15)
    def body(key: str) -> None:
        until(lambda: store.names.count("Renew") >= 2)

    with caplog.at_level(logging.ERROR, "resilient"):
        body("k")
    assert store.states == ["done"]
    assert len(caplog.records) == isinstance(fault, ZeroDivisionError)


def test_a_lease_that_is_lost_is_told_while_the_function_runs() -> None:
    clock, seen = FakeClock(), Recorder()
    store = TroubledStore(clock)
    policy = Idempotent(store, key="key", lease=0.06)

    @Pipeline(policy, env=Env(sinks=[seen]))
    def body(key: str) -> str:
        hold = claim()
        clock.advance(10.0)
        store.inner.execute(Claim(hold.stored, "them", 1000.0, take_over=True))
        until(lambda: hold.lost)
        sent = store.names.count("Renew")
        until(lambda: seen.of(LeaseLost))
        assert store.names.count("Renew") == sent
        return "mine"

    with pytest.raises(InDoubt) as caught:
        body("k")
    assert caught.value.result == "mine"
    assert policy.lost == len(seen.of(LeaseLost)) == 1
    assert store.records[0].owner == "them"


@pytest.mark.parametrize("state", ["fresh", "in doubt"])
def test_where_no_thread_can_be_started_nothing_runs_and_the_next_call_tries_again(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(clock), []
    policy = Idempotent(store, key="key", in_doubt="rerun", name="f", fingerprint=False)

    def body(key: str) -> str:
        ran.append(key)
        return key

    if state == "in doubt":
        from resilient.idempotency import Hasher

        store.inner.execute(Claim(Hasher("f")("", "k")[0], "them", 1.0))
        clock.advance(2.0)
    call = policy(body)
    with monkeypatch.context() as patched:

        def start(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patched.setattr(threading.Thread, "start", start)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                call("k")
            assert store.states == ([] if state == "fresh" else ["in doubt"])
    with pytest.raises(LookupError):
        claim()
    assert call("k") == "k"
    assert ran == ["k"]


def test_who_ends_while_the_heartbeat_is_entered_anew_leaves_nothing_behind() -> None:
    class Pending(dict[Any, float]):
        def __setitem__(self, beat: Any, due: float) -> None:
            super().__setitem__(beat, due)
            beat.over = True

    store = TroubledStore()
    keeper = ThreadKeeper(store, 30.0, lambda beat: None)
    beat = Beat("k", "k", new_owner())
    store.inner.execute(Claim("k", beat.owner, 30.0))
    keeper.pending = Pending({beat: 0.0})
    keeper._renew(beat)
    assert keeper.pending == {}
    # And who has ended before it began is not renewed at all.
    keeper._renew(beat)
    assert store.names == ["Renew"]
    assert not beat._renewing


@pytest.mark.parametrize("other", [False, True], ids=["alone", "another thread began"])
def test_a_call_that_begins_while_the_thread_ends_is_served(other: bool) -> None:
    store = TroubledStore()
    keeper = ThreadKeeper(store, 0.03, lambda beat: None)
    beat = Beat("k", "k", new_owner())
    store.inner.execute(Claim("k", beat.owner, 30.0))

    class Pending(dict[Any, float]):
        looks = 0

        def __bool__(self) -> bool:
            self.looks += 1
            if self.looks == 2:  # just after the thread has said that it ends
                self[beat] = 0.0
                keeper._running = other
            return len(self) > 0

    keeper.pending = Pending()
    keeper._running = True
    store.meet(Renew, lambda: setattr(beat, "over", True))
    keeper._run()
    assert store.names == ([] if other else ["Renew"])
    assert keeper._running is other


def test_only_what_is_due_is_renewed() -> None:
    store = TroubledStore()
    keeper = ThreadKeeper(store, 0.03, lambda beat: None)
    due, later = Beat("due", "due", new_owner()), Beat("later", "later", new_owner())
    keeper.pending = {due: 0.0, later: 1e12}
    keeper._running = True

    def ends() -> None:
        keeper.end(later)
        due.over = True

    store.meet(Renew, ends)
    keeper._run()
    assert [op.key for op in store.ops] == ["due"]
    assert not keeper._running


def test_after_a_fork_calls_of_the_parent_are_not_renewed_and_threads_begin_anew() -> None:
    code = """
import os, sys, threading
from resilient import Idempotent
from resilient.stores import MemoryStore, Renew
beats = threading.Semaphore(0)
class Store(MemoryStore):
    def execute(self, op):
        if isinstance(op, Renew):
            beats.release()
        return super().execute(op)
@Idempotent(Store(), key="key", lease=0.06)
def body(key):
    assert beats.acquire(timeout=60)
    if key == "parent":
        pid = os.fork()
        if not pid:
            while beats.acquire(blocking=False):
                pass
            body("child")
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(0 if body("parent") == 7 else 1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_what_has_just_happened_need_not_be_waited_for() -> None:
    Beat("k", "k", "o").settle()  # the heartbeat has ended meanwhile
    keeper, before = ThreadKeeper(TroubledStore(), 30.0, lambda beat: None), beating()
    keeper._running = True
    keeper._start()  # another call has started the thread meanwhile
    assert beating() == before


def test_a_forked_process_has_names_of_its_own() -> None:
    keeper = ThreadKeeper(TroubledStore(), 30.0, lambda beat: None)
    keeper._running = True
    keeper.pending[Beat("k", "k", "o")] = 0.0
    _forked()
    assert (keeper._running, keeper.pending) == (False, {})
    assert len({new_owner() for _ in range(100)}) == 100


# -- coroutines --------------------------------------------------------------------------------------------------------


@worlds
def test_a_timer_renews_what_takes_long(world: World) -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    policy = Idempotent(store, key="key", lease=30.0)

    @Pipeline(policy, env=Env(clock))
    async def body(key: str) -> str:
        await clock.asleep(95.0)
        return key

    async def main() -> None:
        async with world() as tasks:
            handles = [tasks.spawn(partial(body, key)) for key in ("a", "b", "a")]
        assert [handle.value for handle in handles] == ["a", "b", "a"]

    world.run(main)
    assert store.names.count("Renew") == 18
    assert store.states == ["done", "done"]
    assert policy.lost == 0


@worlds
def test_a_short_call_of_a_task_sends_no_heartbeat_and_leaves_no_timer(world: World) -> None:
    clock = FakeClock(autojump=False)
    store = TroubledStore(clock)

    @Pipeline(Idempotent(store, key="key"), env=Env(clock))
    async def body(key: str) -> str:
        return key

    async def main() -> None:
        async with world() as tasks:
            for key in "abc":
                await body(key)
            clock.advance(1000.0)
            await tasks.settle()
        assert [timer for _, _, timer in clock._timers if not timer.cancelled] == []

    world.run(main)
    assert "Renew" not in store.names


def test_loops_one_after_the_other_each_have_their_timers() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)

    @Pipeline(Idempotent(store, key="key", lease=30.0), env=Env(clock))
    async def body(key: str) -> None:
        await clock.asleep(25.0)

    async def main(key: str) -> None:
        await body(key)

    for n in range(5):
        asyncio.run(main(f"a{n}"))
        trio.run(main, f"t{n}")
    assert store.names.count("Renew") == 20


@worlds
@pytest.mark.parametrize("fault", ["down", "lost", ZeroDivisionError("a bug")], ids=str)
def test_a_heartbeat_of_a_task_that_fails_is_survived(
    world: World, fault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    store.meet(Renew, fault)

    @Pipeline(Idempotent(store, key="key", lease=30.0), env=Env(clock))
    async def body(key: str) -> None:
        await clock.asleep(35.0)

    async def main() -> None:
        await body("k")

    with caplog.at_level(logging.ERROR, "resilient"):
        world.run(main)
    assert store.names == ["Claim", "Renew", "Renew", "Renew", "Finish"]
    assert store.states == ["done"]
    assert len(caplog.records) == isinstance(fault, ZeroDivisionError)


@worlds
def test_a_lease_that_is_lost_is_told_while_the_task_runs(world: World) -> None:
    clock, seen = FakeClock(), Recorder()
    store = TroubledStore(clock)
    policy = Idempotent(store, key="key", lease=30.0)

    def steal() -> None:
        hold = store.ops[0]
        store.inner.execute(Claim(hold.key, hold.owner, 0.0))
        store.inner.execute(Claim(hold.key, "them", 1000.0, take_over=True))

    store.meet(Renew, steal)

    @Pipeline(policy, env=Env(clock, sinks=[seen]))
    async def body(key: str) -> str:
        await clock.asleep(35.0)
        assert claim().lost
        assert len(seen.of(LeaseLost)) == 1
        return "mine"

    async def main() -> None:
        with pytest.raises(InDoubt) as caught:
            await body("k")
        assert caught.value.result == "mine"

    world.run(main)
    assert policy.lost == len(seen.of(LeaseLost)) == 1
    assert store.names == ["Claim", "Renew", "Finish"]


async def _renewing(store: TroubledStore, gate: FakeClock, tasks: Any, ends: Any, lease: float = 30.0) -> Any:
    """A call that has ended while its heartbeat is under way, until `gate` has moved by a second."""
    clock = FakeClock(autojump=False)
    store.meet(Renew, lambda: gate.asleep(1.0))

    @Pipeline(Idempotent(store, key="key", lease=lease, name="f", remember=LookupError), env=Env(clock))
    async def body(key: str) -> Any:
        await clock.asleep(15.0)
        if isinstance(ends, Exception):
            raise ends
        return ends

    handle = tasks.spawn(lambda: body("k"))
    await tasks.settle()
    clock.advance(11.0)
    await tasks.settle()
    assert store.names == ["Claim", "Renew"]
    clock.advance(5.0)
    await tasks.settle()
    assert store.names == ["Claim", "Renew"]
    assert not handle.done
    return handle


ENDS: dict[str, tuple[Any, str, list[str]]] = {
    "well": ("done", "Finish", ["done"]),
    "badly": (ZeroDivisionError(), "Release", []),
    "remembered": (LookupError("no"), "Finish", ["done"]),
    "with what cannot be kept": (object(), "Abandon", ["in doubt"]),
}


@worlds
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_heartbeat_of_a_task_ends_before_the_last_word_and_a_cancel_stays_one(
    world: World, ends: str, cancelled: bool
) -> None:
    value, last, states = ENDS[ends]

    async def main() -> None:
        store, gate = TroubledStore(), FakeClock(autojump=False)
        async with world() as tasks:
            handle = await _renewing(store, gate, tasks, value)
            if cancelled:
                handle.cancel()
                await tasks.settle()
                assert store.names == ["Claim", "Renew"]
                assert not handle.done
            gate.advance(1.0)
        assert store.names == ["Claim", "Renew", last]
        assert store.states == states
        if cancelled:
            assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))
        elif ends == "well":
            assert handle.value == "done"
        else:
            assert isinstance(handle.error, (ZeroDivisionError, LookupError, TypeError))

    world.run(main)


@worlds
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_heartbeat_that_hangs_is_left_behind(world: World, cancelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "GRACE", 0.01)

    async def main() -> None:
        store, gate = TroubledStore(), FakeClock(autojump=False)
        async with world() as tasks:
            if cancelled:
                monkeypatch.setattr(aio, "GRACE", 600.0)
            handle = await _renewing(store, gate, tasks, "done") if cancelled else None
            if handle is not None:
                monkeypatch.setattr(aio, "GRACE", 0.01)
                handle.cancel()
            else:
                clock = FakeClock()
                store.meet(Renew, lambda: gate.asleep(1.0))

                @Pipeline(Idempotent(store, key="key", lease=30.0), env=Env(clock))
                async def body(key: str) -> str:
                    await clock.asleep(15.0)
                    return "done"

                handle = tasks.spawn(lambda: body("k"))
            while not handle.done:
                await CLOCK.asleep(0.001)
            assert store.names == ["Claim", "Renew", "Finish"]
            gate.advance(1.0)
        if cancelled:
            assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))
        else:
            assert handle.value == "done"

    world.run(main)


@worlds
def test_a_heartbeat_that_ends_in_the_moment_of_the_cancel(world: World) -> None:
    async def main() -> None:
        beat = Beat("k", "k", "o")
        beat._renewing = True
        async with world() as tasks:
            handle = tasks.spawn(beat.asettle)
            await tasks.settle()
            beat._renewing = False
            handle.cancel()
        assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))

    world.run(main)


def test_a_coroutine_that_is_closed_while_a_heartbeat_is_waited_for() -> None:
    async def main() -> None:
        beat = Beat("k", "k", "o")
        await beat.asettle()  # none is under way
        beat._renewing = True
        made: Any = beat.asettle()
        made.send(None)
        made.close()

    asyncio.run(main())
    trio.run(main)


def test_a_loop_that_ends_takes_its_heartbeats_along() -> None:
    store, gate = TroubledStore(), FakeClock(autojump=False)

    async def main() -> None:
        clock = FakeClock(autojump=False)
        store.meet(Renew, lambda: gate.asleep(1.0))

        @Pipeline(Idempotent(store, key="key", lease=30.0), env=Env(clock))
        async def body(key: str) -> None:
            await clock.asleep(100.0)

        task = asyncio.create_task(body("k"))
        await asyncio.wait([task], timeout=0)
        clock.advance(11.0)
        await asyncio.wait([task], timeout=0)
        await asyncio.wait([task], timeout=0)
        assert store.names == ["Claim", "Renew"]

    asyncio.run(main())
    assert store.states == ["in doubt"]
    assert current.get() is None
