"""Group commit in the SQLite store: threads, tasks, processes, interrupts, forks and disks that fail."""

from __future__ import annotations

import asyncio
import gc
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from resilient.clock import SystemClock
from resilient.errors import StoreError
from resilient.stores import (
    Abandon,
    Acquired,
    Busy,
    Claim,
    Completed,
    Finish,
    Purge,
    Read,
    Release,
    Scan,
    _sqlite_file,
    _sqlite_group,
)
from resilient.stores._watch import Bells
from resilient.stores.sqlite import SQLiteStore
from tests.worlds import World, worlds

CLOCK = SystemClock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    made = SQLiteStore(tmp_path / "x.db", durability="normal")
    made.prepare()
    yield made
    made.close()


class Gate:
    """Stands between the store and SQLite: notes statements, holds some up, and lets some fail."""

    def __init__(self, store: SQLiteStore) -> None:
        self.write: Any = store._file.ready()
        self.seen: list[str] = []
        self.held: dict[str, tuple[threading.Event, threading.Event]] = {}
        self.fail: dict[str, Callable[[], object]] = {}
        store._file.write = self

    def __call__(self, sql: str, parameters: Any = ()) -> Any:
        word = sql.split()[0]
        self.seen.append(word)
        if word in self.held:
            inside, go = self.held.pop(word)
            inside.set()
            go.wait()
        if word in self.fail:
            self.fail.pop(word)()
        return self.write(sql, parameters)

    def hold(self, word: str) -> tuple[threading.Event, threading.Event]:
        """Hold up the next such statement: when it is there the first event is set; the second lets it go on."""
        self.held[word] = threading.Event(), threading.Event()
        return self.held[word]


class Callers:
    """Threads, and what came of them."""

    def __init__(self, store: SQLiteStore) -> None:
        self.store = store
        self.threads: list[threading.Thread] = []
        self.answers: dict[int, Any] = {}

    def call(self, op: Any) -> int:
        number = len(self.threads)

        def work() -> None:
            try:
                self.answers[number] = self.store.execute(op)
            except BaseException as error:
                self.answers[number] = error

        self.threads.append(threading.Thread(target=work, daemon=True))
        self.threads[-1].start()
        return number

    def queued(self, number: int) -> None:
        """Wait until so many stand in the queue."""
        while len(self.store._group._queue) < number:
            CLOCK.sleep(0.0005)

    def end(self) -> dict[int, Any]:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.answers


def failing(name: str, before: Callable[[], object] | None = None) -> Callable[[], object]:
    def fail() -> None:
        if before is not None:
            before()
        error = sqlite3.OperationalError(f"{name} happened")
        error.sqlite_errorname = f"SQLITE_{name}"
        raise error

    return fail


# -- threads ---------------------------------------------------------------------------------------------------------


def test_those_who_come_during_a_commit_share_the_next(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    for number in range(20):
        callers.call(Claim(str(number % 10), f"owner {number}", 10.0))
        callers.queued(number + 1)
    go.set()
    answers = callers.end()
    assert gate.seen.count("COMMIT") == 2
    assert [type(answers[number]) for number in range(21)] == [Acquired] * 11 + [Busy] * 10


def test_threads_that_were_answered_together_are_waited_for(store: SQLiteStore) -> None:
    gate, callers, group = Gate(store), Callers(store), store._group
    group._crowd, group._patience = 3, 1000.0
    callers.call(Claim("first", "a", 10.0))
    while not group._expected:
        CLOCK.sleep(0.0005)
    assert gate.seen == []
    for number in range(2):
        callers.call(Claim(str(number), "a", 10.0))
    assert all(isinstance(answer, Acquired) for answer in callers.end().values())
    assert gate.seen.count("COMMIT") == 1
    assert (group._crowd, group._expected) == (3, 0)
    assert group._patience < 1


def test_threads_that_do_not_come_are_waited_for_once(store: SQLiteStore) -> None:
    group = store._group
    group._crowd, group._patience = 3, 0.001
    assert isinstance(store.execute(Claim("k", "a", 10.0)), Acquired)
    assert (group._crowd, group._expected) == (0, 0)
    group._crowd, group._patience = 1, 1000.0  # whoever was expected has come already
    assert store.execute(Finish("k", "a", 0, b"", 10.0)) is True
    assert group._crowd == 0


def test_one_who_waits_for_others_can_be_interrupted(store: SQLiteStore) -> None:
    group = store._group
    group._crowd, group._patience = 3, 1000.0
    with poked(lambda: group._expected):
        store.execute(Claim("mine", "me", 10.0))
    assert group._leader is None
    assert group._expected == 0
    group._crowd = 0
    assert store.execute(Read("mine")) is None


def test_nobody_is_told_before_the_commit(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("k", "a", 10.0))
    inside.wait()
    assert callers.answers == {}
    assert store.execute(Read("k")) is None, "and who reads waits for nobody"
    go.set()
    assert isinstance(callers.end()[0], Acquired)


def test_a_job_that_fails_fails_alone(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    for number, op in enumerate(
        [
            Claim("one", "a", 10.0),
            Finish("\ud800", "a", 1, b"", 1.0),
            Finish("k", "a", 2**70, b"", 1.0),
            Claim("two", "a", 1.0),
        ]
    ):
        callers.call(op)
        callers.queued(number + 1)
    go.set()
    answers = callers.end()
    assert gate.seen.count("COMMIT") == 2
    assert [type(answers[number]) for number in range(5)] == [Acquired, Acquired, StoreError, StoreError, Acquired]
    assert answers[2] is not answers[3]


def test_if_the_whole_batch_is_rolled_back_each_runs_for_itself(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    gate.fail["DELETE"] = failing("FULL", lambda: gate.write("ROLLBACK"))
    for number, op in enumerate([Claim("one", "a", 10.0), Purge(1e9), Claim("two", "a", 10.0)]):
        callers.call(op)
        callers.queued(number + 1)
    go.set()
    answers = callers.end()
    assert gate.seen.count("COMMIT") == 1 + 3
    assert [type(answers[number]) for number in range(4)] == [Acquired, Acquired, int, Acquired]
    assert [record.key for record in store.execute(Scan()).records] == ["first", "one", "two"]


@pytest.mark.parametrize(
    ("name", "rolled_back", "maybe"), [("FULL", True, False), ("IOERR_FSYNC", True, True), ("BUSY", False, False)]
)
def test_a_commit_that_fails_says_whether_it_may_be_there(
    store: SQLiteStore, name: str, rolled_back: bool, maybe: bool
) -> None:
    gate = Gate(store)
    gate.fail["COMMIT"] = failing(name, (lambda: gate.write("ROLLBACK")) if rolled_back else None)
    with pytest.raises(StoreError, match=f"{name} happened") as caught:
        store.execute(Claim("k", "a", 10.0))
    assert caught.value.maybe_written is maybe
    assert isinstance(store.execute(Claim("k", "b", 10.0)), Acquired)


@pytest.mark.parametrize(
    ("name", "maybe"), [("FULL", False), ("IOERR_FSYNC", True), ("CONSTRAINT_CHECK", False), ("CORRUPT", False)]
)
def test_a_statement_alone_that_fails_says_whether_it_may_be_there(store: SQLiteStore, name: str, maybe: bool) -> None:
    store.execute(Claim("k", "a", 10.0))
    gate = Gate(store)
    gate.fail["UPDATE"] = failing(name)
    with pytest.raises(StoreError, match=f"{name} happened") as caught:
        store.execute(Finish("k", "a", 0, b"", 10.0))
    assert caught.value.maybe_written is maybe
    assert store.execute(Finish("k", "a", 0, b"", 10.0)) is True
    assert gate.seen == ["UPDATE", "UPDATE"], "no transaction around it"


def test_a_statement_alone_in_the_middle_of_which_memory_runs_out_may_be_there(store: SQLiteStore) -> None:
    def fail() -> None:
        raise MemoryError

    Gate(store).fail["UPDATE"] = fail
    with pytest.raises(StoreError, match="MemoryError") as caught:
        store.execute(Abandon("k", "a", 0))
    assert caught.value.maybe_written


def test_who_is_alone_waits_for_the_lock_of_another_process_in_a_transaction(store: SQLiteStore) -> None:
    store.execute(Claim("k", "a", 10.0))
    gate = Gate(store)
    gate.fail["UPDATE"] = gate.fail["BEGIN"] = failing("BUSY")
    assert store.execute(Finish("k", "a", 0, b"", 10.0)) is True
    assert gate.seen == ["UPDATE", "BEGIN", "PRAGMA", "BEGIN", "PRAGMA", "UPDATE", "COMMIT"]


def test_while_another_process_has_the_lock_who_need_not_write_does_not_wait(store: SQLiteStore) -> None:
    store.execute(Claim("k", "a", 10.0))
    assert store._group._fresh
    gate = Gate(store)
    gate.fail["BEGIN"] = failing("BUSY")
    assert isinstance(store.execute(Claim("k", "b", 10.0)), Busy)
    assert gate.seen == ["BEGIN", "SELECT"]
    store.execute(Claim("new", "a", 10.0))

    gate.seen.clear()
    gate.fail["BEGIN"] = failing("BUSY")
    assert isinstance(asyncio.run(store.aexecute(Claim("k", "b", 10.0))), Busy)
    assert gate.seen == ["BEGIN", "SELECT"]


def test_who_only_looks_waits_while_another_process_mends_the_file(store: SQLiteStore) -> None:
    gate = Gate(store)
    gate.fail["SELECT"] = failing("BUSY_RECOVERY")
    assert store.execute(Read("k")) is None
    assert gate.seen == ["SELECT", "PRAGMA", "SELECT", "PRAGMA"]


def test_a_transaction_that_cannot_begin_is_an_error(store: SQLiteStore) -> None:
    Gate(store).fail["BEGIN"] = failing("READONLY")

    async def main() -> None:
        with pytest.raises(StoreError, match="READONLY happened") as caught:
            await store.aexecute(Claim("k", "a", 10.0))
        assert not caught.value.maybe_written

    asyncio.run(main())


def test_who_only_looks_and_fails_says_why(store: SQLiteStore) -> None:
    gate = Gate(store)
    gate.fail["SELECT"] = failing("IOERR")
    with pytest.raises(StoreError, match="IOERR happened") as caught:
        store.execute(Read("k"))
    assert not caught.value.maybe_written


def test_a_claim_of_what_seemed_new_fails_like_any_other(store: SQLiteStore) -> None:
    store.execute(Claim("k", "a", 10.0))
    gate = Gate(store)
    gate.fail["INSERT"] = failing("FULL", lambda: gate.write("ROLLBACK"))
    with pytest.raises(StoreError, match="FULL happened") as caught:
        store.execute(Claim("new", "a", 10.0))
    assert not caught.value.maybe_written
    with pytest.raises(StoreError, match="SQLite store"):
        store.execute(Claim("\ud800", "a", 10.0))
    assert isinstance(store.execute(Claim("new", "a", 10.0)), Acquired)


def test_a_commit_of_which_nobody_knows_is_not_tried_again(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    for number in range(2):
        callers.call(Claim(str(number), "a", 10.0))
        callers.queued(number + 1)
    gate.hold("BEGIN")
    second_inside, second_go = gate.held["BEGIN"]
    go.set()
    second_inside.wait()
    gate.fail["COMMIT"] = failing("IOERR", lambda: gate.write("ROLLBACK"))
    second_go.set()
    answers = callers.end()
    assert [answers[number].maybe_written for number in (1, 2)] == [True, True]
    assert gate.seen.count("COMMIT") == 2


def test_a_lock_that_cannot_be_had_is_an_error_for_all_who_wait(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    gate.fail["BEGIN"] = failing("BUSY", lambda: gate.fail.__setitem__("BEGIN", failing("BUSY")))
    for number in range(3):
        callers.call(Claim(str(number), "a", 10.0))
        callers.queued(number + 1)
    go.set()
    answers = callers.end()
    assert [answers[number].maybe_written for number in (1, 2, 3)] == [False] * 3
    assert gate.seen.count("BEGIN") == 3


def test_a_connection_that_cannot_even_roll_back_is_made_anew(store: SQLiteStore) -> None:
    writer: Any = store._file.writer

    class Sick:
        in_transaction = True
        close = writer.close

        def execute(self, statement: str) -> None:
            raise sqlite3.OperationalError("no")

    gate = Gate(store)
    gate.fail["COMMIT"] = failing("BUSY", lambda: setattr(store._file, "writer", Sick()))
    with pytest.raises(StoreError, match="BUSY happened"):
        store.execute(Claim("k", "a", 10.0))
    assert store._file.writer is None
    assert isinstance(store.execute(Claim("k", "b", 10.0)), Acquired)


def test_a_file_that_cannot_be_opened_is_an_error_for_each(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "no" / "x.db")
    callers = Callers(store)
    for _ in range(4):
        callers.call(Finish("k", "a", 1, b"", 1.0))
    errors = list(callers.end().values())
    assert all(isinstance(error, StoreError) for error in errors)
    assert len({id(error) for error in errors}) == 4
    (tmp_path / "no").mkdir()
    assert store.execute(Finish("k", "a", 1, b"", 1.0)) is False
    store.close()


def test_a_fault_while_opening_comes_out_as_it_is(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.close()

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(store._file, "_open_writer", broken)
    with pytest.raises(ZeroDivisionError):
        store.execute(Finish("k", "a", 1, b"", 1.0))


def test_closing_waits_its_turn_and_those_behind_it_open_anew(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    callers.call(Claim("second", "a", 10.0))
    callers.queued(1)
    closing = threading.Thread(target=store.close, daemon=True)
    closing.start()
    callers.queued(2)
    callers.call(Claim("third", "a", 10.0))
    callers.queued(3)
    go.set()
    assert [type(answer) for answer in callers.end().values()] == [Acquired] * 3
    closing.join()
    assert store._file.write is not gate


# -- interrupts ------------------------------------------------------------------------------------------------------


class Poke(BaseException):
    """Raised by a signal handler, wherever the main thread is."""


@contextmanager
def poked(when: Callable[[], object]) -> Iterator[None]:
    """A block that is interrupted by a `Poke`, once `when` says so."""
    main = threading.get_ident()

    def strike() -> None:
        while not when():
            CLOCK.sleep(0.0005)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(Poke()))
    helper = threading.Thread(target=strike, daemon=True)
    try:
        with pytest.raises(Poke):
            helper.start()
            yield
        helper.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_interrupted_at_any_moment_nobody_waits_for_ever(tmp_path: Path) -> None:
    """An exception out of a signal handler while this thread waits, leads, commits, passes on: others go on."""
    store = SQLiteStore(tmp_path / "x.db", durability="normal")
    store.prepare()
    stop = threading.Event()
    finished: list[int] = []
    armed = False

    def other(name: str) -> None:
        number = 0
        while not stop.is_set():
            key = f"{name} {number}"
            fence = store.execute(Claim(key, name, 1000.0)).fence
            assert store.execute(Finish(key, name, fence, b"", 1000.0)) is True
            number += 1
        finished.append(number)

    def poke(*_: object) -> None:
        if armed:
            raise Poke

    threads = [threading.Thread(target=other, args=(f"thread {name}",), daemon=True) for name in range(3)]
    for thread in threads:
        thread.start()
    tracer, before, interval = sys.gettrace(), signal.signal(signal.SIGALRM, poke), sys.getswitchinterval()
    sys.settrace(None)
    gc.disable()
    sys.setswitchinterval(1e-4)
    done: list[int] = []
    try:
        for number in range(300):
            fence = 0
            with suppress(Poke), suppress(Poke):  # Of a machine that stands still it may come twice.
                armed = True
                signal.setitimer(signal.ITIMER_REAL, (20 + number * 7919 % 1997) / 1e6, 0.5)
                while True:
                    fence = store.execute(Claim(f"main {number} {fence}", "main", 1000.0)).fence
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert isinstance(store.execute(Claim(f"after {number}", "main", 1000.0)), Acquired)
            done.append(number)
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        stop.set()
        sys.setswitchinterval(interval)
        gc.enable()
        sys.settrace(tracer)
    for thread in threads:
        thread.join(60)
    assert len(finished) == 3
    assert all(finished)
    assert len(done) == 300
    assert store._group._leader is None
    assert not store._group._queue
    store.close()


def interrupted_at(word: str, after: bool, store: SQLiteStore) -> tuple[BaseException, dict[int, Any], Gate]:
    """Lead a batch of three and be interrupted before, or right after, a statement."""
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    first = callers.call(Claim("first", "a", 10.0))
    inside.wait()
    caught: list[BaseException] = []

    def struck() -> None:
        try:
            store.execute(Claim("mine", "me", 10.0))
        except KeyboardInterrupt as error:
            caught.append(error)

    def strike() -> None:
        if after:
            gate.write(word)
        raise KeyboardInterrupt

    leader = threading.Thread(target=struck, daemon=True)
    leader.start()
    callers.queued(1)
    callers.call(Finish("first", "a", 0, b"", 10.0))
    callers.queued(2)
    callers.call(Claim("third", "a", 10.0))
    callers.queued(3)
    begin_inside, begin_go = gate.hold("BEGIN")
    go.set()
    begin_inside.wait()
    gate.fail[word] = strike
    begin_go.set()
    leader.join(60)
    answers = callers.end()
    assert isinstance(answers[first], Acquired)
    return caught[0], answers, gate


@pytest.mark.parametrize(("word", "after"), [("BEGIN", False), ("INSERT", False), ("COMMIT", False)])
def test_a_leader_interrupted_before_the_commit_drops_only_what_it_wanted(
    store: SQLiteStore, word: str, after: bool
) -> None:
    _, answers, _ = interrupted_at(word, after, store)
    assert answers[1] is True
    assert isinstance(answers[2], Acquired)
    assert store.execute(Read("mine")) is None


def test_a_leader_interrupted_after_the_commit_still_hands_out(store: SQLiteStore) -> None:
    _, answers, gate = interrupted_at("COMMIT", True, store)
    assert answers[1] is True
    assert isinstance(answers[2], Acquired)
    assert store.execute(Read("mine")) is not None
    assert gate.seen.count("COMMIT") == 2


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("op", [Finish("k", "a", 0, b"", 10.0), Claim("new", "a", 10.0)])
def test_one_alone_who_is_interrupted_leaves_all_or_nothing(store: SQLiteStore, op: Any, after: bool) -> None:
    store.execute(Claim("k", "a", 100.0))
    gate = Gate(store)
    watch = store.watch("k", task=False)
    word = "UPDATE" if isinstance(op, Finish) else "COMMIT"

    def strike() -> None:
        raise KeyboardInterrupt

    def struck(sql: str, parameters: Any = ()) -> Any:
        answer = gate(sql, parameters)
        if sql.split()[0] == word:
            raise KeyboardInterrupt
        return answer

    if after:
        store._file.write = struck
    else:
        gate.fail[word] = strike
    with pytest.raises(KeyboardInterrupt):
        store.execute(op)
    store._file.write = gate
    assert store._group._leader is None
    record = store.execute(Read(op.key))
    if word == "COMMIT":
        assert (record is not None) is after
    else:
        assert record is not None
        assert record.state == ("done" if after else "running")
        watch.park(CLOCK, 30.0)  # rung, since it may have ended
    watch.close()
    assert isinstance(store.execute(Claim("other", "a", 10.0)), Acquired)


def test_one_who_waits_and_is_interrupted_is_taken_from_the_queue(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    with poked(lambda: store._group._queue):
        store.execute(Claim("mine", "me", 10.0))
    assert not store._group._queue
    go.set()
    callers.end()
    assert store.execute(Read("mine")) is None


# -- tasks -----------------------------------------------------------------------------------------------------------


@worlds
def test_tasks_share_commits_and_the_loop_waits_for_none(store: SQLiteStore, world: World) -> None:
    gate = Gate(store)
    answers: list[Any] = []

    async def claim(key: str) -> None:
        answers.append(await store.aexecute(Claim(key, "a", 10.0)))

    async def main() -> None:
        async with world() as here:
            inside, go = gate.hold("COMMIT")
            here.spawn(lambda: claim("first"))
            await here.settle()
            await settled(inside.is_set)
            for number in range(20):
                here.spawn(lambda number=number: claim(str(number)))  # type: ignore[misc]
            await here.settle()
            assert answers == [], "the loop runs while the commit is held up"
            # Who only looks does not wait for it.
            assert await store.aexecute(Read("first")) is None
            await settled(lambda: len(store._group._queue) == 20)
            go.set()
            await settled(lambda: len(answers) == 21)

    world.run(main)
    assert all(isinstance(answer, Acquired) for answer in answers)
    assert gate.seen.count("COMMIT") == 2


async def settled(holds: Callable[[], bool]) -> None:
    """Wait, in turns of the loop, until it holds."""
    while not holds():
        await CLOCK.asleep(0.0005)


@worlds
def test_a_task_cancelled_while_its_job_is_queued_or_runs_breaks_nothing(store: SQLiteStore, world: World) -> None:
    gate = Gate(store)

    async def main() -> None:
        async with world() as here:
            inside, go = gate.hold("COMMIT")
            runs = here.spawn(lambda: store.aexecute(Claim("runs", "a", 1000.0)))
            await settled(inside.is_set)
            queued = here.spawn(lambda: store.aexecute(Finish("queued", "a", 0, b"", 10.0)))
            claims = here.spawn(lambda: store.aexecute(Claim("claims", "a", 1000.0)))
            await settled(lambda: len(store._group._queue) == 2)
            for handle in (runs, queued, claims):
                handle.cancel()
            await settled(lambda: runs.done and queued.done and claims.done)
            go.set()
            # In order: what was asked first has been done by now.
            assert await store.aexecute(Release("claims", "a", 0)) is True
            assert await store.aexecute(Release("runs", "a", 0)) is True

    world.run(main)


def test_a_loop_that_is_closed_is_no_problem(store: SQLiteStore) -> None:
    gate = Gate(store)
    inside, go = gate.hold("COMMIT")
    loop = asyncio.new_event_loop()
    coro = store.aexecute(Claim("k", "a", 1000.0))

    async def start() -> None:
        task = asyncio.ensure_future(coro)
        await settled(inside.is_set)
        task.cancel()

    loop.run_until_complete(start())
    loop.close()

    async def again() -> None:
        task = asyncio.ensure_future(store.aexecute(Claim("other", "a", 1000.0)))
        await settled(lambda: len(store._group._queue) == 1)
        go.set()
        assert isinstance(await task, Acquired)

    asyncio.run(again())
    assert store.execute(Read("k")) is not None


def test_a_trio_run_that_is_over_is_no_problem(store: SQLiteStore) -> None:
    gate = Gate(store)
    inside, go = gate.hold("COMMIT")

    async def start() -> None:
        with trio.move_on_after(60) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.aexecute, Claim("k", "a", 1000.0))
                await settled(inside.is_set)
                scope.cancel()

    trio.run(start)
    go.set()
    assert isinstance(store.execute(Claim("other", "a", 1000.0)), Acquired)
    assert store.execute(Read("k")) is not None


def test_threads_and_loops_of_both_kinds_together(store: SQLiteStore) -> None:
    won: list[int] = []

    async def claims(name: str) -> None:
        for number in range(50):
            answer = await store.aexecute(Claim(str(number), name, 1000.0))
            if isinstance(answer, Acquired):
                won.append(number)
                assert await store.aexecute(Finish(str(number), name, answer.fence, b"r", 1000.0)) is True

    def plain(name: str) -> None:
        for number in range(50):
            answer = store.execute(Claim(str(number), name, 1000.0))
            if isinstance(answer, Acquired):
                won.append(number)
                assert store.execute(Finish(str(number), name, answer.fence, b"r", 1000.0)) is True

    async def four(name: str) -> None:
        await asyncio.gather(*(claims(f"{name} {number}") for number in range(4)))

    async def trios() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(claims, f"trio {number}")

    threads = [
        *(threading.Thread(target=plain, args=(f"thread {number}",), daemon=True) for number in range(4)),
        *(threading.Thread(target=asyncio.run, args=(four(f"loop {number}"),), daemon=True) for number in range(2)),
        threading.Thread(target=trio.run, args=(trios,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(won) == list(range(50))
    assert all(isinstance(store.execute(Claim(str(number), "late", 1.0)), Completed) for number in range(50))


@worlds
def test_errors_of_tasks_are_their_own(store: SQLiteStore, world: World, tmp_path: Path) -> None:
    nowhere = SQLiteStore(tmp_path / "no" / "x.db")

    async def main() -> None:
        with pytest.raises(StoreError, match="SQLite store"):
            await store.aexecute(Claim("\ud800", "a", 1.0))
        with pytest.raises(StoreError, match="SQLite store"):
            await store.aexecute(Finish("k", "a", 2**70, b"", 1.0))
        for op in (Claim("k", "a", 1.0), Finish("k", "a", 1, b"", 1.0)):
            with pytest.raises(StoreError, match="there is no directory"):
                await nowhere.aexecute(op)
        with pytest.raises(StoreError, match="there is no directory"):
            await nowhere.aprepare()

    world.run(main)
    nowhere.close()


def test_a_fault_in_the_thread_for_tasks_reaches_those_who_wait(store: SQLiteStore) -> None:
    class Broken(Bells):
        def __bool__(self) -> bool:
            raise ZeroDivisionError

    async def main() -> None:
        store._group._bells = Broken()
        with pytest.raises(ZeroDivisionError):
            await store.aexecute(Claim("k", "a", 10.0))
        store._group._bells = Bells()
        assert isinstance(await store.aexecute(Claim("k", "b", 10.0)), Busy)

    asyncio.run(main())


def test_an_end_wakes_those_who_watch(store: SQLiteStore) -> None:
    for key, op in (
        ("a", Finish("a", "o", 0, b"", 10.0)),
        ("b", Release("b", "o", 0)),
        ("c", Abandon("c", "o", 0)),
    ):
        store.execute(Claim(key, "o", 1000.0))
        watch = store.watch(key, task=False)
        other = store.watch("other", task=False)
        assert store.execute(Release(key, "somebody else", 0)) is False
        assert not watch.waiter.notify.__self__._bell.acquire(False)  # type: ignore[attr-defined]
        assert store.execute(op) is True
        watch.park(CLOCK, 30.0)
        watch.close()
        other.close()
    assert store.poll < 1


# -- processes -------------------------------------------------------------------------------------------------------


def child(*arguments: str, errors: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests._sqlite_child", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


def together(children: list[subprocess.Popen[str]]) -> list[str]:
    """Let all go at once; what they print."""
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in children:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate()[0].strip() for process in children]
    assert [process.returncode for process in children] == [0] * len(children)
    return printed


def test_of_several_processes_exactly_one_has_each_key(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    won = together([child("race", str(path), f"process {number}", "200") for number in range(3)])
    assert sum(map(int, won)) == 200


def test_two_processes_upgrade_at_once_and_it_happens_once(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    store = SQLiteStore(path)
    store.execute(Claim("old", "a", 1000.0))
    store.close()
    assert sorted(together([child("upgrade", str(path)) for _ in range(2)])) == ["Acquired", "Busy"]
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT version FROM resilient_schema").fetchall() == [(3,)]
    assert connection.execute("SELECT a FROM resilient_more").fetchall() == [(1,)]
    assert connection.execute("SELECT count(*) FROM resilient_records").fetchone() == (2,)
    connection.close()
    with pytest.raises(StoreError, match="of version 3, made by a newer resilient"):
        store.execute(Read("old"))


@pytest.mark.parametrize("number", range(3))
def test_a_process_killed_in_the_middle_of_a_batch_loses_nothing_that_was_answered(tmp_path: Path, number: int) -> None:
    path = tmp_path / "x.db"
    processes = [child("busy", str(path), f"process {name}") for name in range(2)]
    said: list[str] = []
    for process in processes:
        assert process.stdout is not None
        said += [process.stdout.readline().rstrip("\n") for _ in range(20 + number * 7)]
    for process in processes:
        process.kill()
        assert process.stdin is not None
        process.stdin.close()
        rest = (process.stdout or process.stdin).read()
        said += [line.rstrip("\n") for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    store = SQLiteStore(path)
    for key in said:
        answer = store.execute(Claim(key, "late", 1.0))
        assert isinstance(answer, Completed)
        assert answer.result == key.encode()
    store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def ran(*arguments: str) -> str:
    process = child(*arguments, errors=subprocess.PIPE)
    printed, errors = process.communicate()
    assert errors == ""
    assert process.returncode == 0
    return printed


def test_a_fork_opens_connections_of_its_own(tmp_path: Path) -> None:
    assert ran("fork", str(tmp_path / "x.db")) == "child 0\n" * 10 + "0\n"
    connection = sqlite3.connect(tmp_path / "x.db")
    counts = "SELECT count(*) FROM resilient_records WHERE key LIKE ?"
    assert connection.execute(counts, ("child %",)).fetchone() == (10,)
    assert connection.execute(counts, ("task %",)).fetchone() == (11,)
    connection.close()


def test_a_fork_in_the_middle_of_a_transaction_does_not_wait_for_ever(tmp_path: Path) -> None:
    assert ran("fork_stuck", str(tmp_path / "x.db")) == "child 0\n"


def test_a_store_that_nobody_closed_closes_itself(tmp_path: Path) -> None:
    assert ran("dropped", str(tmp_path / "x.db")) == "fine\n"
    assert not (tmp_path / "x.db-wal").exists()


def test_before_a_fork_everything_is_closed_between_two_batches(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sqlite_group, "_groups", {store._group})
    gate, callers = Gate(store), Callers(store)
    store._file.peek(Read("k"))
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    thawed = threading.Event()

    def freeze() -> None:
        _sqlite_group._freeze()
        thawed.wait()
        _sqlite_group._thaw()

    frozen = threading.Thread(target=freeze, daemon=True)
    frozen.start()
    callers.queued(1)
    callers.call(Claim("second", "a", 10.0))
    callers.queued(2)
    go.set()
    callers.threads[0].join()
    try:
        while store._group._frozen is None or store._file.writer is not None or store._file._readers:
            CLOCK.sleep(0.0005)
        assert list(callers.answers) == [0]
    finally:
        thawed.set()
        frozen.join()
    assert [type(answer) for answer in callers.end().values()] == [Acquired, Acquired]


def test_a_fork_waits_for_who_reads_but_not_for_ever(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sqlite_group, "_groups", {store._group})
    reader = store._file._open_reader()

    class Clock(SystemClock):
        def sleep(self, seconds: float) -> None:
            store._file._free.append(reader)

    monkeypatch.setattr(_sqlite_file, "_clock", Clock())
    _sqlite_group._freeze()
    assert not store._file._readers
    _sqlite_group._thaw()
    reader = store._file._open_reader()
    monkeypatch.setattr(_sqlite_group, "_PATIENCE", 0.0)
    _sqlite_group._freeze()
    assert store._file._readers
    _sqlite_group._renew()
    assert not store._file._readers
    assert isinstance(store.execute(Claim("k", "a", 10.0)), Acquired)
    reader.connection.close()


def test_a_fork_that_is_interrupted_before_it_begins_leaves_no_trace(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(until: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store._file, "freeze", struck)
    with pytest.raises(KeyboardInterrupt):
        store._group.freeze()
    assert isinstance(store.execute(Claim("k", "a", 10.0)), Acquired)


def test_a_store_whose_last_reference_is_in_its_own_thread_closes_itself(store: SQLiteStore) -> None:
    group = store._group

    class Dropping(Bells):
        def __bool__(self) -> bool:
            group.drop()
            return False

    async def main() -> None:
        group._bells = Dropping()
        await store.aexecute(Claim("k", "a", 10.0))
        group._bells = Bells()
        await settled(lambda: store._file.writer is None and group._writer is None)

    asyncio.run(main())


def test_one_who_waits_while_his_job_runs_can_be_interrupted(store: SQLiteStore) -> None:
    gate, callers = Gate(store), Callers(store)
    inside, go = gate.hold("COMMIT")
    callers.call(Claim("first", "a", 10.0))
    inside.wait()
    callers.call(Claim("second", "a", 10.0))
    callers.queued(1)
    second_inside, second_go = gate.hold("BEGIN")

    def under_way() -> bool:
        callers.queued(2)
        go.set()
        return second_inside.wait()

    with poked(under_way):
        store.execute(Claim("mine", "me", 10.0))
    second_go.set()
    assert isinstance(callers.end()[1], Acquired)
    assert store.execute(Read("mine")) is not None, "it had begun"


def test_a_reader_that_cannot_be_opened_is_an_error(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = sqlite3.connect(":memory:")
    closed.close()
    monkeypatch.setattr(store._file, "_connect", lambda: closed)
    with pytest.raises(StoreError, match="closed database"):
        store._file.peek(Read("k"))
    store._file._close_reader()  # there is none


def test_who_only_looks_may_be_the_first_to_come(store: SQLiteStore) -> None:
    store.close()
    assert store._file.peek(Read("k")) is None
    store._group._call()  # nobody leads, so nobody is rung
    assert store._group._leader is None


def test_who_comes_second_to_open_finds_it_open(store: SQLiteStore) -> None:
    write = store._file.write

    class Second:
        def __enter__(self) -> None:
            store._file.write = write

        def __exit__(self, *_: object) -> None: ...

    opening, store._file._opening = store._file._opening, Second()  # type: ignore[assignment]
    store._file.write = None
    assert store._file.ready() is write
    store._file.write = None
    store._file._opening = opening
    assert store._file.ready() is not write, "interrupted between the two, the connection is used all the same"


def test_two_tasks_that_come_at_once_begin_one_thread(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.db")
    group: Any = store._group
    mutex, roused = group._mutex, []

    class Helper:
        def rouse(self) -> None:
            roused.append(self)

    class Other:
        def __enter__(self) -> None:
            group._writer = Helper()

        def __exit__(self, *exc: object) -> None:
            pass

    group._mutex = Other()
    group._help()
    assert roused == [group._writer]
    group._mutex, group._writer = mutex, None
    store.close()
