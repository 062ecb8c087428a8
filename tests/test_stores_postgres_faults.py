"""The PostgreSQL store when things fail: lost connections, restarts, silence, forks, loops that end, and bad rows."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from resilient.clock import SystemClock
from resilient.stores import (
    Abandon,
    Acquired,
    Busy,
    Claim,
    Claimed,
    Completed,
    Finish,
    Forget,
    Op,
    PostgresStore,
    Purge,
    Read,
    Release,
    Renew,
    StoreError,
    Threaded,
)
from resilient.stores._pg_pool import SyncLane, TooBusy
from resilient.stores._pg_rows import AGAIN
from resilient.stores._pg_sql import Statement
from resilient.stores.postgres import _forked
from tests._faulty import FaultProxy
from tests._servers import Postgres, postgres_database

CLOCK = SystemClock()


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A server of this file's own, which it may stop."""
    with Postgres(fsync=False) as made:
        yield made


@pytest.fixture(scope="module")
def database(server: Postgres) -> Iterator[str]:
    with postgres_database(server.url) as made:
        yield made


@pytest.fixture
def proxy(server: Postgres) -> Iterator[FaultProxy]:
    with FaultProxy(("127.0.0.1", server.port)) as made:
        yield made


@pytest.fixture
def url(database: str) -> str:
    """A database that is empty, and to which nobody is connected any more."""
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        admin.execute("DROP SCHEMA public CASCADE")
        admin.execute("CREATE SCHEMA public")
    return database


def through(proxy: FaultProxy, url: str) -> str:
    return f"postgresql://postgres@127.0.0.1:{proxy.port}{urlsplit(url).path}?sslmode=disable&gssencmode=disable"


class World:
    """One store, asked by this thread or by tasks of one loop."""

    def __init__(self, store: PostgresStore, task: bool) -> None:
        self.store, self.task = store, task
        self.loop = asyncio.new_event_loop()

    def __call__(self, op: Op[Any]) -> Any:
        return self.loop.run_until_complete(self.store.aexecute(op)) if self.task else self.store.execute(op)

    def close(self) -> None:
        self.store.close()
        self.loop.close()


@pytest.fixture(params=["threads", "tasks"])
def ask(request: pytest.FixtureRequest, proxy: FaultProxy, url: str) -> Iterator[World]:
    """A store behind the proxy, which has claimed the key `warm`."""
    world = World(PostgresStore(through(proxy, url), timeout=5.0), request.param == "tasks")
    world(Claim("warm", "a", 30.0))
    for op in (Renew("k", "a", 1, 1.0), Finish("k", "a", 1, b"", 1.0), Read("k"), Forget("k"), Purge(1e6)):
        world(op)  # each statement is known to the server
    world(Release("k", "a", 1))
    yield world
    world.close()


def acquired(answer: Claimed) -> Acquired:
    assert type(answer) is Acquired
    return answer


# -- connections that are lost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut request", "cut reply"])
def test_a_connection_that_is_lost_under_way_does_not_fail_the_operation(
    fault: Any, ask: World, proxy: FaultProxy
) -> None:
    for op, right in (
        (Claim("k", "owner-1", 30.0), lambda answer: type(answer) is Acquired and answer.attempt == 1),
        (Claim("k", "owner-2", 30.0, awaited=True), lambda answer: type(answer) is Busy),
        (Finish("k", "owner-1", 0, b"one", 60.0), lambda answer: answer is True),
        (Claim("k", "owner-2", 30.0), lambda answer: type(answer) is Completed and answer.result == b"one"),
        (Read("k"), lambda answer: answer.result == b"one"),
    ):
        met = proxy.arm(fault, lambda chunk: b"k" in chunk)
        assert right(ask(op)), op
        assert met.is_set()


@pytest.mark.parametrize("op", [Release("warm", "a", 0), Forget("warm"), Purge(0.0)], ids=lambda op: type(op).__name__)
def test_where_a_second_sending_cannot_tell_its_own_work_the_error_says_so(
    op: Op[Any], ask: World, proxy: FaultProxy
) -> None:
    if type(op) is not Release:
        ask(Abandon("warm", "a", 0))
    met = proxy.arm("cut reply", lambda chunk: b"warm" in chunk or type(op) is Purge)
    with pytest.raises(StoreError, match="found nothing to do, or its own work") as caught:
        ask(op)
    assert met.is_set()
    assert caught.value.maybe_written
    assert ask(Read("warm")) is None


def test_a_release_that_was_lost_before_it_came_to_the_server_is_sent_again(ask: World, proxy: FaultProxy) -> None:
    met = proxy.arm("cut request", lambda chunk: b"warm" in chunk)
    assert ask(Release("warm", "a", 0)) is True
    assert met.is_set()


@pytest.mark.parametrize("op", [Claim("k", "owner-1", 30.0), Read("owner-1")], ids=lambda op: type(op).__name__)
def test_lost_twice_is_an_error_that_says_whether_it_may_have_been_written(
    op: Op[Any], ask: World, proxy: FaultProxy
) -> None:
    proxy.arm("cut reply", lambda chunk: b"owner-1" in chunk, 2)
    with pytest.raises(StoreError, match="connection was lost") as caught:
        ask(op)
    assert caught.value.maybe_written == (type(op) is Claim)


def test_lost_once_and_then_no_server_may_have_been_written(ask: World, proxy: FaultProxy) -> None:
    hit = proxy.arm("hold request", lambda chunk: b"owner-1" in chunk)

    def fail() -> None:
        assert hit.wait(60)
        proxy.refuse()

    with ThreadPoolExecutor(1) as thread:
        failing = thread.submit(fail)
        with pytest.raises(StoreError, match="cannot be reached") as caught:
            ask(Claim("k", "owner-1", 30.0))
        failing.result()
    assert caught.value.maybe_written
    with pytest.raises(StoreError, match="cannot be reached") as again:
        ask(Claim("k", "owner-2", 30.0))
    assert not again.value.maybe_written
    proxy.accept()
    assert type(ask(Claim("k", "owner-2", 30.0))) is Acquired


@pytest.mark.parametrize("task", [False, True], ids=["threads", "tasks"])
def test_a_server_that_says_nothing_holds_nobody_for_ever(task: bool, proxy: FaultProxy, url: str) -> None:
    ask = World(PostgresStore(through(proxy, url), timeout=1.0), task)
    try:
        ask(Claim("k", "a", 30.0))
        proxy.arm("swallow", lambda chunk: b"owner-1" in chunk, 2)
        with pytest.raises(StoreError, match="lost: no answer in time") as caught:
            ask(Claim("k2", "owner-1", 30.0))
        assert caught.value.maybe_written
        assert type(ask(Claim("k3", "b", 30.0))) is Acquired
    finally:
        ask.close()


def test_connections_that_died_while_idle_are_found_out_before_anything_is_sent(server: Postgres, url: str) -> None:
    for task in (False, True):
        ask = World(PostgresStore(url), task)
        mine = acquired(ask(Claim("k", "a", 300.0)))
        server.stop("fast")
        with pytest.raises(StoreError, match="cannot be reached") as caught:
            ask(Finish("k", "a", mine.fence, b"x", 60.0))
        assert not caught.value.maybe_written
        server.start()
        assert ask(Claim("k", "a", 300.0)) == mine
        server.stop()
        server.start()
        assert ask(Release("k", "a", mine.fence)) is True
        ask.close()


def test_a_backend_that_is_ended_under_an_operation_does_not_fail_it(server: Postgres, url: str) -> None:
    store = PostgresStore(url)
    store.prepare()
    with psycopg.connect(url) as user, psycopg.connect(url, autocommit=True) as admin, ThreadPoolExecutor(1) as thread:
        store.on(user, Claim("k", "u", 30.0))
        waiting = thread.submit(store.execute, Claim("k", "a", 30.0))
        assert ended(admin, user)
        user.rollback()
        assert type(waiting.result()) is Acquired
    store.close()


def ended(admin: psycopg.Connection[Any], user: psycopg.Connection[Any]) -> bool:
    """End the backend that waits for `user`, as soon as one does."""
    for _ in range(1_000_000):
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
        if admin.execute(query, (user.info.backend_pid,)).fetchone():
            return True
    return False


def test_a_key_that_a_transaction_holds_too_long_is_an_error_and_nothing_is_written(url: str) -> None:
    store = PostgresStore(url, timeout=1.0)
    store.prepare()
    with psycopg.connect(url) as user:
        store.on(user, Claim("k", "u", 30.0))
        with pytest.raises(StoreError, match="lock timeout") as caught:
            store.execute(Claim("k", "a", 30.0))
        assert not caught.value.maybe_written
    store.close()


@pytest.mark.parametrize("task", [False, True], ids=["threads", "tasks"])
def test_when_every_connection_is_busy_for_too_long_the_error_says_so(task: bool, url: str) -> None:
    ask = World(PostgresStore(url, pool_size=1, timeout=1.0), task)
    ask(Read("k"))
    lane: Any = ask.loop.run_until_complete(alane(ask.store)) if task else ask.store._lane()
    taken = lane.take(CLOCK.now() + 5)
    held = ask.loop.run_until_complete(taken) if task else taken
    with pytest.raises(StoreError, match="all connections are in use") as caught:
        ask(Claim("k", "a", 30.0))
    assert not caught.value.maybe_written
    given = lane.give(held)
    if task:
        ask.loop.run_until_complete(given)
    assert type(ask(Claim("k", "a", 30.0))) is Acquired
    ask.close()


async def alane(store: PostgresStore) -> Any:
    return store._alane()


def test_pools_of_the_user_are_told_of_dead_connections(server: Postgres, url: str) -> None:
    with ConnectionPool(url, min_size=2, max_size=2, open=True) as pool:
        pool.wait()
        store = PostgresStore(pool, timeout=20.0)
        mine = acquired(store.execute(Claim("k", "a", 300.0)))
        server.stop("fast")
        server.start()
        assert store.execute(Claim("k", "a", 300.0)) == mine

    async def main() -> None:
        async with AsyncConnectionPool(url, min_size=2, max_size=2, open=False) as pool:
            await pool.wait()
            store = PostgresStore(pool, timeout=20.0)
            assert type(await store.aexecute(Claim("k", "b", 300.0))) is Busy
            server.stop("fast")
            server.start()
            assert await store.aexecute(Claim("k", "a", 300.0)) == mine

    asyncio.run(main())


def test_restarts_under_load_give_no_wrong_answer_and_errors_say_what_may_have_been_written(
    server: Postgres, url: str
) -> None:
    store = PostgresStore(url, pool_size=4, timeout=10.0)
    store.prepare()
    stop = threading.Event()
    wrong: list[str] = []
    done: dict[str, bool] = {}

    def work(worker: int) -> int:
        turns = 0
        while not stop.is_set():
            key, owner, turns = f"{worker}-{turns}", f"owner-{worker}", turns + 1
            try:
                claimed = store.execute(Claim(key, owner, 300.0))
            except StoreError as error:
                done[key] = error.maybe_written
                continue
            if type(claimed) is not Acquired or claimed.attempt != 1:
                wrong.append(f"{key}: {claimed}")
                continue
            try:
                if store.execute(Finish(key, owner, claimed.fence, key.encode(), 900.0)) is not True:
                    wrong.append(f"{key}: not finished")
            except StoreError as error:
                done[key + "!"] = error.maybe_written
            else:
                done[key + "="] = True
        return turns

    with ThreadPoolExecutor(4) as threads:
        workers = [threads.submit(work, n) for n in range(4)]
        try:
            for how in ("immediate", "fast", None):
                count = len(done)
                while len(done) < count + 100:
                    assert not any(worker.done() for worker in workers)
                if how is not None:
                    server.stop(how)
                    server.start()
        finally:
            stop.set()
        assert all(worker.result() for worker in workers)
    assert not wrong
    for name, maybe in done.items():
        record = store.execute(Read(name.rstrip("!=")))
        if name.endswith("="):
            assert record is not None
            assert record.result == name[:-1].encode()
        elif name.endswith("!"):
            assert record is not None
            assert record.state == "running" or maybe
        else:
            assert record is None or maybe
    store.close()


# -- who owns connections --------------------------------------------------------------------------------------------


def test_each_loop_has_connections_of_its_own_and_they_end_with_it(url: str) -> None:
    store = PostgresStore(url)

    async def main(owner: str) -> Claimed:
        return await store.aexecute(Claim("k", owner, 30.0))

    kept = asyncio.new_event_loop()
    assert type(kept.run_until_complete(main("a"))) is Acquired
    assert type(asyncio.run(main("b"))) is Busy
    gc.collect()
    assert len(store._loops) == 1, "the loop is gone, and what it had"
    lane = next(iter(store._loops.values()))
    (connection,) = lane.idle
    assert not connection.closed
    kept.close()
    assert type(asyncio.run(main("c"))) is Busy
    assert connection.closed, "a loop that was closed and is still known loses its connections with the next new loop"
    store.close()


def test_a_store_that_is_simply_dropped_leaves_no_connection_and_no_warning(url: str) -> None:
    store = PostgresStore(url)
    store.execute(Claim("k", "a", 30.0))
    asyncio.run(store.aexecute(Read("k")))
    store.watch("k", task=False).close()
    ear = store._ear._thread
    assert ear is not None
    del store
    gc.collect()
    ear.join(60)
    assert not ear.is_alive()
    gone(url)


def gone(url: str) -> None:
    """Return once nobody else is connected to that database."""
    with psycopg.connect(url, autocommit=True) as admin:
        for _ in range(1_000_000):
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND client_port <> 0"
            if admin.execute(query).fetchone() == (1,):
                return
    raise AssertionError("somebody is still connected")


def test_after_a_close_the_store_begins_anew(url: str) -> None:
    store = PostgresStore(url)
    store.close()
    mine = store.execute(Claim("k", "a", 30.0))
    lane = store._lane()
    connection: Any = lane.take(CLOCK.now() + 5)
    store.close()
    lane.give(connection)
    assert connection.closed, "one that was in use is closed when it comes back"
    assert store.execute(Claim("k", "a", 30.0)) == mine
    store.close()
    gone(url)


def test_a_forked_child_opens_connections_of_its_own_and_leaves_its_parents_alone(url: str) -> None:
    store = PostgresStore(url)
    mine = store.execute(Claim("k", "a", 30.0))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(store.aexecute(Read("k")))
    before = next(iter(store._lane().idle))  # type: ignore[union-attr]  # pyright: ignore
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if store.execute(Claim("k", "a", 30.0)) == mine and store._lane().idle[0] is not before:  # type: ignore[union-attr]  # pyright: ignore
                asyncio.run(store.aexecute(Read("k")))
                store.close()
                del before
                gc.collect()
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store._lane().idle[0] is before  # type: ignore[union-attr]  # pyright: ignore
    assert before.usable(), "the server has heard no farewell"
    assert store.execute(Claim("k", "a", 30.0)) == mine
    loop.run_until_complete(store.aexecute(Read("k")))
    store.close()
    loop.close()


def test_a_task_that_is_cancelled_leaves_its_connection_usable_and_knows_of_no_half_claim(url: str) -> None:
    store = PostgresStore(url, pool_size=1)

    async def main() -> None:
        await store.aprepare()
        async with await psycopg.AsyncConnection.connect(url) as user:
            await store.aon(user, Claim("k", "u", 30.0))
            task = asyncio.ensure_future(store.aexecute(Claim("k", "a", 30.0)))
            await blocked(user)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await user.rollback()
        assert await store.aexecute(Read("k")) is None
        assert type(await store.aexecute(Claim("k", "b", 30.0))) is Acquired
        store.close()

    asyncio.run(main())


async def blocked(user: psycopg.AsyncConnection[Any]) -> None:
    query = "SELECT count(*) FROM pg_stat_activity WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid))"
    for _ in range(1_000_000):
        if await (await user.execute(query)).fetchone() == (1,):
            return
    raise AssertionError("nobody ever waited")


def test_under_trio_the_error_says_to_use_threads(url: str) -> None:
    import trio

    store = PostgresStore(url)
    with pytest.raises(TypeError, match=r"use resilient\.stores\.Threaded\(store\)"):
        trio.run(store.aexecute, Read("k"))
    assert trio.run(Threaded(store).aexecute, Read("k")) is None
    store.close()


# -- waiting ---------------------------------------------------------------------------------------------------------


def listening(url: str) -> int:
    """The backend that listens, once one does."""
    with psycopg.connect(url, autocommit=True) as admin:
        for _ in range(1_000_000):
            query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %'"
            row = admin.execute(query).fetchone()
            if row is not None:
                return int(row[0])
    raise AssertionError("nobody listens")


class Rung:
    """A watch of this thread, and whether it was rung."""

    def __init__(self, store: PostgresStore, key: str) -> None:
        self.watch = store.watch(key, task=False)

    def __call__(self) -> bool:
        """Wait for the ring: the loop ends with the test at worst."""
        start = CLOCK.now()
        self.watch.park(CLOCK, 60.0)
        return CLOCK.now() - start < 60.0


def test_whoever_waits_is_woken_by_the_end_in_another_process_store(url: str) -> None:
    mine, other = PostgresStore(url), PostgresStore(url)
    rung = Rung(mine, "k")
    assert rung(), "woken when the listening has begun, since a ring may have been lost before"
    listening(url)
    for key in ("k", "k" * 3000):
        rung = Rung(mine, key)
        other.execute(Claim(key, "a", 30.0))
        assert type(mine.execute(Claim(key, "b", 30.0, awaited=True))) is Busy
        other.execute(Finish(key, "a", 0, b"x", 60.0))
        assert rung()
        rung.watch.close()
    mine.close()
    other.close()


def test_the_listener_comes_back_after_its_connection_is_lost_and_wakes_everybody(server: Postgres, url: str) -> None:
    store = PostgresStore(url)
    rung = Rung(store, "k")
    assert rung()
    first = listening(url)
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s)", (first,))
    assert rung()
    second = listening(url)
    assert second != first
    server.stop("fast")
    server.start()
    assert rung()
    store.watch("k", task=False).close()
    thread = store._ear._thread
    assert thread is not None
    store.close()
    assert not thread.is_alive()
    store.close()


def test_a_listener_that_finds_no_server_ends_when_told(server: Postgres) -> None:
    store = PostgresStore("postgresql://postgres@127.0.0.1:1/none")
    store.watch("k", task=False).close()
    thread = store._ear._thread
    assert thread is not None
    store.close()
    assert not thread.is_alive()


# -- moments that are hard to meet -----------------------------------------------------------------------------------


def test_a_connection_that_fails_while_it_is_set_up_is_no_writing(ask: World, proxy: FaultProxy) -> None:
    proxy.drop()
    met = proxy.arm("cut request", lambda chunk: b"SET SESSION" in chunk)
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        ask(Claim("k", "a", 30.0))
    assert met.is_set()
    assert not caught.value.maybe_written
    assert type(ask(Claim("k", "a", 30.0))) is Acquired


@pytest.mark.parametrize("op", [Claim("k", "a", 30.0), Read("k")], ids=lambda op: type(op).__name__)
def test_an_answer_that_never_stands_is_an_error_in_the_end(op: Op[Any], ask: World, url: str) -> None:
    statement = Statement("SELECT 1", lambda *_: AGAIN, values=lambda _: {}, writes=type(op) is Claim)
    ask.store._statements[type(op)] = statement
    with pytest.raises(StoreError, match="gave no answer") as caught:
        ask(op)
    assert caught.value.maybe_written == (type(op) is Claim)
    with psycopg.connect(url) as user, pytest.raises(StoreError, match="gave no answer"):
        ask.store.on(user, op)

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(url) as user:
            await ask.store.aon(user, op)

    with pytest.raises(StoreError, match="gave no answer"):
        asyncio.run(main())


def test_a_statement_that_was_rolled_back_for_others_is_repeated(ask: World) -> None:
    errors: list[Exception] = [psycopg.errors.SerializationFailure(), psycopg.errors.DeadlockDetected()]

    def decode(*_: object) -> bool:
        if errors:
            raise errors.pop()
        return True

    ask.store._statements[Read] = Statement("SELECT 1", decode, values=lambda _: {}, writes=False)
    assert ask(Read("k")) is True


class Meanwhile:
    """A lock that somebody else had, who did `work` in the meantime."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __enter__(self) -> None:
        self.work()

    def __exit__(self, *_: object) -> None:
        pass


def test_two_threads_that_begin_at_once_share_one_lane_and_one_listener(url: str) -> None:
    store = PostgresStore(url)
    lane: Any = object()
    store._lock = Meanwhile(lambda: setattr(store, "_threads", lane))  # type: ignore[assignment]  # pyright: ignore
    assert store._lane() is lane
    ear, thread = store._ear, threading.current_thread()
    ear._lock = Meanwhile(lambda: setattr(ear, "_thread", thread))  # type: ignore[assignment]  # pyright: ignore
    ear.start()
    assert (ear._thread, ear._stop) == (thread, None)


class Snatched(list[None]):
    """A stack whose last token another thread takes at the last moment."""

    def __delitem__(self, index: object) -> None:
        raise IndexError


def test_a_connection_that_another_thread_takes_at_the_last_moment_is_not_used_by_two(url: str) -> None:
    lane = SyncLane(url, 1, 5.0)
    lane._tokens = Snatched([None])
    with pytest.raises(TooBusy):
        lane.take(CLOCK.now())


def test_after_a_fork_nothing_of_the_parent_is_touched(url: str) -> None:
    store = PostgresStore(url)
    mine = store.execute(Claim("k", "a", 30.0))
    parents: Any = store._lane()
    _forked()
    assert store._lane() is not parents
    assert store.execute(Claim("k", "a", 30.0)) == mine
    assert not parents.idle[0].closed
    parents.close()
    store.close()
