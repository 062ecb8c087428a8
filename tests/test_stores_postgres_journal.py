"""Journals in the PostgreSQL store: the upgrade of older tables, lost connections, races, and what is looked at."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilient.clock import SystemClock
from resilient.stores import (
    Abandon,
    Acquired,
    Claim,
    Finish,
    Forget,
    MemoryStore,
    PostgresStore,
    Purge,
    Read,
    Record,
    Release,
    Scan,
    Store,
    StoreError,
)
from resilient.stores._ops import Append, Begin, History, Op
from resilient.stores._pg_rows import AGAIN, claimed
from resilient.stores._pg_sql import MIGRATIONS, statements
from tests._faulty import FaultProxy
from tests._servers import Postgres, postgres_database

CLOCK = SystemClock()
FIRST = MIGRATIONS[0]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres(fsync=False) as made:
        yield made


@pytest.fixture(scope="module")
def database(server: Postgres) -> Iterator[str]:
    with postgres_database(server.url) as made:
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


@pytest.fixture
def store(url: str) -> Iterator[PostgresStore]:
    made = PostgresStore(url)
    made.prepare()
    yield made
    made.close()


@pytest.fixture
def user(url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def acquired(answer: object) -> Acquired:
    assert type(answer) is Acquired
    return answer


def one(user: psycopg.Connection[Any], query: str) -> Any:
    row = user.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def entries(user: psycopg.Connection[Any]) -> int:
    return int(one(user, "SELECT count(*) FROM resilient_entries"))


def journal(store: PostgresStore, key: str = "k") -> tuple[bytes, ...]:
    told = store.execute(History(key))
    assert told is not None
    return told[1]


# -- the upgrade -----------------------------------------------------------------------------------------------------


def older(url: str) -> None:
    """Tables of version 1, as the first release made them, with records in every state."""
    with psycopg.connect(url, autocommit=True) as user:
        user.execute(FIRST.replace("{prefix}", "resilient_").encode())
        user.execute("CREATE TABLE resilient_version (version int4 NOT NULL)")
        user.execute("INSERT INTO resilient_version VALUES (1)")
        user.execute(
            "INSERT INTO resilient_records VALUES "
            "('run', 'a', 7, 1, 'print', 'one', 1e9, 4e9, NULL, true, NULL),"
            "('doubt', 'a', 8, 2, '', 'two', 1e9, 1.1e9, NULL, false, NULL),"
            "('done', 'a', 9, 1, '', 'three', 1e9, 1.1e9, 4e9, false, 'result')"
        )


OLD = [
    Record(
        key=key,
        state=state,  # type: ignore[arg-type]  # pyright: ignore
        owner="a",
        fence=fence,
        attempt=attempt,
        fingerprint=fingerprint,
        label=label,
        began_at=1e9,
        mark=mark,
        expires_at=expires,
        result=result,
    )
    for key, state, fence, attempt, fingerprint, label, mark, expires, result in (
        ("done", "done", 9, 1, "", "three", 1.1e9, 4e9, b"result"),
        ("doubt", "in doubt", 8, 2, "", "two", 1.1e9, None, None),
        ("run", "running", 7, 1, "print", "one", 4e9, None, None),
    )
]


def test_an_older_schema_is_upgraded_and_nothing_in_it_is_lost(url: str, user: psycopg.Connection[Any]) -> None:
    older(url)
    store = PostgresStore(url)
    assert list(store.execute(Scan()).records) == OLD
    assert one(user, "SELECT version FROM resilient_version") == len(MIGRATIONS)
    for record in OLD:
        assert store.execute(History(record.key)) == (record, ())
        assert [found.key for found in store.execute(Scan(state=record.state)).records] == [record.key]
    assert store.execute(Append("run", "a", 7, 0, b"first", 30.0)) is True
    assert journal(store, "run") == (b"first",)
    store.close()


def columns(url: str) -> list[Any]:
    with psycopg.connect(url) as user:
        found = user.execute(
            "SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name "
            "FROM information_schema.columns WHERE table_schema = 'public'"
        ).fetchall()
        return sorted(
            map(str, found + user.execute("SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'").fetchall())
        )


def test_an_upgraded_schema_is_the_one_that_a_new_one_gets(server: Postgres, url: str) -> None:
    older(url)
    with postgres_database(server.url) as other:
        for each in (url, other):
            store = PostgresStore(each)
            store.prepare()
            store.close()
        assert columns(url) == columns(other)


def test_many_who_upgrade_at_once_do_it_once(url: str, user: psycopg.Connection[Any]) -> None:
    older(url)
    count = 6
    barrier = threading.Barrier(count)

    def begin(number: int) -> Acquired:
        store = PostgresStore(url)
        barrier.wait()
        try:
            return acquired(store.execute(Begin(f"new-{number}", "b", 30.0, b"first")))
        finally:
            store.close()

    with ThreadPoolExecutor(count) as threads:
        assert {got.attempt for got in threads.map(begin, range(count))} == {1}
    assert one(user, "SELECT array_agg(version) FROM resilient_version") == [len(MIGRATIONS)]
    assert (one(user, "SELECT count(*) FROM resilient_records"), entries(user)) == (3 + count, count)


def test_an_upgrade_by_a_task(url: str) -> None:
    older(url)

    async def main() -> None:
        store = PostgresStore(url)
        assert await store.aexecute(Append("run", "a", 7, 0, b"first", 30.0)) is True
        told = await store.aexecute(History("run"))
        assert told is not None
        assert told[1] == (b"first",)
        store.close()

    asyncio.run(main())


def test_an_upgrade_that_fails_in_the_middle_leaves_the_older_schema(url: str, user: psycopg.Connection[Any]) -> None:
    older(url)
    user.execute("CREATE TABLE resilient_entries (mine int4)")
    store = PostgresStore(url)
    with pytest.raises(StoreError, match="already exists") as caught:
        store.execute(Read("run"))
    assert not caught.value.maybe_written
    assert one(user, "SELECT version FROM resilient_version") == 1
    user.execute("DROP TABLE resilient_entries")
    assert store.execute(Read("run")) == OLD[2]
    store.close()


def test_a_users_connection_that_meets_an_older_schema_is_told(url: str, user: psycopg.Connection[Any]) -> None:
    older(url)
    store = PostgresStore(url)
    with pytest.raises(StoreError, match="older than this release") as caught:
        store.on(user, Claim("k", "a", 30.0))
    assert not caught.value.maybe_written
    store.prepare()
    assert type(store.on(user, Claim("k", "a", 30.0))) is Acquired
    store.close()


# -- connections that are lost ---------------------------------------------------------------------------------------


class World:
    """A store behind the proxy, asked by this thread or by tasks of one loop."""

    def __init__(self, store: PostgresStore, task: bool) -> None:
        self.store, self.task = store, task
        self.loop = asyncio.new_event_loop()

    def __call__(self, op: Op[Any]) -> Any:
        return self.loop.run_until_complete(self.store.aexecute(op)) if self.task else self.store.execute(op)


@pytest.fixture
def proxy(server: Postgres) -> Iterator[FaultProxy]:
    with FaultProxy(("127.0.0.1", server.port)) as made:
        yield made


@pytest.fixture(params=["threads", "tasks"])
def ask(request: pytest.FixtureRequest, proxy: FaultProxy, url: str) -> Iterator[World]:
    through = f"postgresql://postgres@127.0.0.1:{proxy.port}{urlsplit(url).path}?sslmode=disable&gssencmode=disable"
    world = World(PostgresStore(through), request.param == "tasks")
    mine = acquired(world(Begin("warm", "a", 30.0, b"first")))
    for op in (Append("warm", "a", mine.fence, 1, b"", 30.0), History("warm"), Release("warm", "a", mine.fence)):
        assert world(op)  # each statement is known to the server
    yield world
    world.store.close()
    world.loop.close()


@pytest.mark.parametrize("fault", ["cut request", "cut reply", "cut after"])
def test_a_connection_that_is_lost_under_way_adds_each_entry_once(fault: Any, ask: World, proxy: FaultProxy) -> None:
    def lose(op: Op[Any]) -> Any:
        met = proxy.arm(fault, lambda chunk: b"owner-1" in chunk or b"journal-k" in chunk)
        answer = ask(op)
        assert met.is_set()
        return answer

    mine = acquired(lose(Begin("journal-k", "owner-1", 30.0, b"0", "label")))
    assert mine.attempt == 1
    for at in range(1, 4):
        assert lose(Append("journal-k", "owner-1", mine.fence, at, b"%d" % at, 30.0)) is True
    _, found = lose(History("journal-k"))
    assert found == (b"0", b"1", b"2", b"3")
    assert lose(Finish("journal-k", "owner-1", mine.fence, b"x", 60.0)) is True


def test_lost_twice_may_have_been_written_and_a_repetition_adds_nothing(ask: World, proxy: FaultProxy) -> None:
    mine = acquired(ask(Begin("k", "owner-1", 30.0, b"0")))
    op = Append("k", "owner-1", mine.fence, 1, b"1", 30.0)
    proxy.arm("cut reply", lambda chunk: b"owner-1" in chunk, 2)
    with pytest.raises(StoreError, match="connection was lost") as caught:
        ask(op)
    assert caught.value.maybe_written
    assert ask(op) is True
    assert ask(History("k"))[1] == (b"0", b"1")


def ended(admin: psycopg.Connection[Any], by: psycopg.Connection[Any]) -> None:
    """End the backend that waits for `by`, as soon as one does."""
    for _ in range(1_000_000):
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
        if admin.execute(query, (by.info.backend_pid,)).fetchone():
            return
    by.rollback()  # else whoever waits would wait for ever
    raise AssertionError("nobody ever waited")


def test_a_backend_that_is_ended_under_an_append_does_not_fail_it(
    store: PostgresStore, user: psycopg.Connection[Any], url: str
) -> None:
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0")))
    with psycopg.connect(url) as holder, ThreadPoolExecutor(1) as thread:
        holder.execute("SELECT FROM resilient_records FOR UPDATE")
        waiting = thread.submit(store.execute, Append("k", "a", mine.fence, 1, b"1", 300.0))
        ended(user, holder)
        holder.rollback()
        assert waiting.result() is True
    assert journal(store) == (b"0", b"1")


def test_backends_that_are_ended_all_the_while_lose_no_entry_and_double_none(
    store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    count, most = 3, 24
    progress = threading.Semaphore(0)

    def work(number: int) -> set[str]:
        key, errors = f"k{number}", set[str]()
        ops: list[Op[Any]] = [Begin(key, "a", 300.0, b"0")]
        ops += [Append(key, "a", 0, at, b"%d" % at, 300.0) for at in range(1, most)]
        for op in ops:
            answer = None
            while not answer:
                answer = outcome(store, op)
                if isinstance(answer, StoreError):
                    errors.add(str(answer).split(":")[0])
                    answer = None
            progress.release()
        return errors

    with ThreadPoolExecutor(count) as threads:
        workers = [threads.submit(work, number) for number in range(count)]
        for _ in range(count * most // 3):
            for _ in range(3):
                assert progress.acquire(timeout=60)
            user.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() ORDER BY state = 'active' DESC, random() LIMIT 2"
            )
        for worker in workers:
            assert worker.result() <= {"PostgreSQL", "PostgreSQL cannot be reached"}
    for number in range(count):
        assert journal(store, f"k{number}") == tuple(b"%d" % at for at in range(most))


def outcome(store: PostgresStore, op: Op[Any]) -> Any:
    try:
        return store.execute(op)
    except StoreError as error:
        return error


# -- races -----------------------------------------------------------------------------------------------------------


def blocked(user: psycopg.Connection[Any], holder: psycopg.Connection[Any], count: int) -> None:
    """Return once so many backends wait for a lock, as `user` sees it: `holder` has it, or has others before them."""
    for _ in range(1_000_000):
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        if user.execute(query).fetchone() == (count,):
            return
    holder.rollback()  # else whoever waits would wait for ever
    raise AssertionError("they never waited")


@pytest.mark.parametrize("first", ["append", "takeover"])
def test_a_takeover_and_the_late_owners_append_that_wait_for_one_row_do_not_both_succeed(
    first: str, store: PostgresStore, user: psycopg.Connection[Any], url: str
) -> None:
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0", "label")))
    store.execute(Abandon("k", "a", mine.fence))
    late = Append("k", "a", mine.fence, 1, b"late", 300.0, "late")
    take = Begin("k", "b", 300.0, b"other", "", True)
    with psycopg.connect(url) as holder, ThreadPoolExecutor(2) as threads:
        holder.execute("SELECT FROM resilient_records FOR UPDATE")
        waiting: dict[str, Any] = {}
        for number, name in enumerate(("append", "takeover") if first == "append" else ("takeover", "append"), 1):
            waiting[name] = threads.submit(store.execute, late if name == "append" else take)
            blocked(user, holder, number)
        holder.rollback()
        appended, taken = waiting["append"].result(), waiting["takeover"].result()
    told = store.execute(History("k"))
    assert told is not None
    record, found = told
    assert (appended, type(taken) is Acquired) in ((True, False), (False, True))
    if appended:
        assert (record.owner, record.fence, record.label, found) == ("a", mine.fence, "late", (b"0", b"late"))
    else:
        assert (record.owner, record.fence, record.label, found) == ("b", taken.fence, "label", (b"0",))
        assert taken.fence > mine.fence


def test_an_append_that_waits_for_a_takeover_in_a_transaction_is_refused(
    store: PostgresStore, user: psycopg.Connection[Any], url: str
) -> None:
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0")))
    store.execute(Abandon("k", "a", mine.fence))
    for commit in (False, True):
        with psycopg.connect(url) as holder, ThreadPoolExecutor(1) as thread:
            assert acquired(store.on(holder, Begin("k", "b", 300.0, b"", "", True))).attempt == 2
            late = thread.submit(store.execute, Append("k", "a", mine.fence, 1, b"late", 0.0))
            blocked(user, holder, 1)
            holder.commit() if commit else holder.rollback()
            assert late.result() is not commit
        assert journal(store) == (b"0", b"late"), "added when the takeover was undone, and not again"


@pytest.mark.parametrize(
    "end", [Finish("k", "a", 0, b"x", 60.0), Release("k", "a", 0)], ids=lambda op: type(op).__name__
)
def test_an_append_that_waits_for_the_end_of_the_record_is_refused(
    end: Op[bool], store: PostgresStore, user: psycopg.Connection[Any], url: str
) -> None:
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0")))
    with psycopg.connect(url) as holder, ThreadPoolExecutor(1) as thread:
        assert store.on(holder, end) is True
        late = thread.submit(store.execute, Append("k", "a", mine.fence, 1, b"late", 30.0))
        blocked(user, holder, 1)
        holder.commit()
        assert late.result() is False
    assert entries(user) == (1 if type(end) is Finish else 0)


def test_an_entry_that_a_delete_did_not_see_is_no_part_of_the_next_life(
    store: PostgresStore, user: psycopg.Connection[Any], url: str
) -> None:
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0")))
    with psycopg.connect(url) as holder, ThreadPoolExecutor(1) as thread:
        assert store.on(holder, Append("k", "a", mine.fence, 1, b"1", 300.0)) is True
        released = thread.submit(store.execute, Release("k", "a", mine.fence))
        blocked(user, holder, 1)
        holder.commit()
        assert released.result() is True
    assert entries(user) == 1, "the delete looked before the entry was there"
    again = acquired(store.execute(Begin("k", "a", 300.0, b"new")))
    assert journal(store) == (b"new",)
    assert store.execute(Append("k", "a", again.fence, 1, b"next", 300.0)) is True
    assert journal(store) == (b"new", b"next")
    assert store.execute(Release("k", "a", again.fence)) is True
    assert entries(user) == 0, "and the next delete takes it along"


# -- deletes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["release", "forget", "purge", "begin", "claim"])
def test_whatever_ends_a_record_takes_its_entries_along_and_no_others(
    how: str, store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    acquired(store.execute(Begin("other", "a", 300.0, b"0")))
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0")))
    for at in range(1, 4):
        assert store.execute(Append("k", "a", mine.fence, at, b"", 300.0)) is True
    assert entries(user) == 5
    if how == "release":
        assert store.execute(Release("k", "a", mine.fence)) is True
    else:
        assert store.execute(Finish("k", "a", mine.fence, b"x", 0.0 if how in ("begin", "claim") else 60.0)) is True
    if how == "forget":
        assert store.execute(Forget("k")) is True
    elif how == "purge":
        assert store.execute(Purge(0.0)) == 1
    elif how == "claim":
        again = acquired(store.execute(Claim("k", "b", 300.0)))
        assert again.fence > mine.fence
        assert journal(store) == ()
    elif how == "begin":
        assert acquired(store.execute(Begin("k", "b", 300.0, b"new"))).attempt == 1
        assert journal(store) == (b"new",)
    assert entries(user) == (2 if how == "begin" else 1)
    assert journal(store, "other") == (b"0",)


def test_in_the_users_transaction_record_and_entries_live_and_die_together(store: PostgresStore, url: str) -> None:
    with psycopg.connect(url) as user:
        for undo in (True, False):
            with user.transaction(force_rollback=undo):
                mine = acquired(store.on(user, Begin("k", "a", 300.0, b"0", "label")))
                assert store.on(user, Append("k", "a", mine.fence, 1, b"1", 300.0)) is True
                told = store.on(user, History("k"))
                assert told is not None
                assert told[1] == (b"0", b"1")
                assert store.execute(History("k")) is None
            assert (store.execute(History("k")) is None) == undo
            user.commit()


def test_a_gap_is_said_and_changes_nothing_in_the_users_transaction_either(store: PostgresStore, url: str) -> None:
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0")))
    before = store.execute(History("k"))
    gap = Append("k", "a", mine.fence, 2, b"2", 900.0, "other")
    with pytest.raises(StoreError, match="the journal of k has 1 entries: number 2 would leave a gap") as caught:
        store.execute(gap)
    assert not caught.value.maybe_written
    with psycopg.connect(url) as user:
        with pytest.raises(StoreError, match="would leave a gap"):
            store.on(user, gap)
        assert store.on(user, Append("k", "a", mine.fence, 1, b"1", 300.0)) is True
        user.rollback()
    assert store.execute(History("k")) == before


# -- what is looked at -----------------------------------------------------------------------------------------------


def plan(store: PostgresStore, user: psycopg.Connection[Any], op: Op[Any], table: str) -> list[Any]:
    """The nodes that look at `table`, each with how many rows it found, and left aside, as the server tells."""
    statement = statements("resilient_")[type(op)]
    cursor = psycopg.Cursor(user)
    cursor.execute(
        b"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) " + statement.sql, statement.values(op), prepare=True, binary=False
    )
    row = cursor.fetchone()
    assert row is not None
    tree = row[0] if isinstance(row[0], list) else json.loads(row[0])
    nodes, found = [tree[0]["Plan"]], []
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", ())
        index = node.get("Index Name", "")
        if "Scan" in node["Node Type"] and node["Actual Loops"] and (index or node.get("Relation Name") == table):
            rows = node["Actual Rows"] * node["Actual Loops"] + node.get("Rows Removed by Filter", 0)
            found.append((node["Node Type"], index, rows))
    return found


@pytest.mark.parametrize("analyzed", [False, True])
def test_a_scan_of_those_in_doubt_looks_at_no_finished_record(
    analyzed: bool, store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    user.execute(
        "INSERT INTO resilient_records (key, owner, fence, attempt, fingerprint, label, began, mark, expires, result) "
        "SELECT 'done-' || n, 'a', 1, 1, '', '{\"saga\":1}', 1e9, 1e9, 4e9, '' FROM generate_series(1, 30000) AS n"
    )
    for number in range(3):
        mine = acquired(store.execute(Begin(f"k{number}", "a", 300.0, b"0")))
        store.execute(Abandon(f"k{number}", "a", mine.fence))
    acquired(store.execute(Begin("live", "a", 300.0, b"0")))
    if analyzed:
        user.execute("ANALYZE")
    user.execute("SET plan_cache_mode = force_generic_plan")
    assert [record.key for record in store.execute(Scan(state="in doubt")).records] == ["k0", "k1", "k2"]
    looked = plan(store, user, Scan(state="in doubt"), "resilient_records")
    assert sum(rows for _, _, rows in looked) <= 4 + 4 + 3, looked
    assert "resilient_records_open" in {index for _, index, _ in looked}


def test_a_purge_looks_only_at_entries_of_records_that_it_removes(
    store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    user.execute(
        "INSERT INTO resilient_records (key, owner, fence, attempt, fingerprint, label, began, mark, expires, result, "
        "entries) SELECT 'done-' || n, 'a', 1, 1, '', '', 1e9, 1e9 + n, 4e9, '', n % 2 * 4 "
        "FROM generate_series(1, 4000) AS n"
    )
    user.execute(
        "INSERT INTO resilient_entries SELECT 'done-' || n, 1e9, at, '' FROM generate_series(1, 4000, 2) AS n, "
        "generate_series(0, 3) AS at"
    )
    user.execute("ANALYZE")
    user.execute("SET plan_cache_mode = force_generic_plan")
    user.autocommit = False
    looked = plan(store, user, Purge(0.0, 10), "resilient_entries")
    assert max(rows for _, _, rows in looked) == 5 * 4, looked
    user.rollback()
    user.autocommit = True
    assert store.execute(Purge(0.0, 10)) == 10
    assert entries(user) == 2000 * 4 - 5 * 4


# -- damaged tables --------------------------------------------------------------------------------------------------


def test_a_record_that_does_not_say_how_many_entries_it_has_is_an_error(
    store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    user.execute("ALTER TABLE resilient_records ALTER entries DROP NOT NULL")
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0")))
    user.execute("UPDATE resilient_records SET entries = NULL")
    for op in (History("k"), Append("k", "a", mine.fence, 1, b"1", 300.0)):
        with pytest.raises(StoreError, match="the record 'k' is damaged: it has entries None"):
            store.execute(op)
    assert entries(user) == 1


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM resilient_entries WHERE at = 1",
        "DELETE FROM resilient_entries",
        "UPDATE resilient_records SET entries = 1",
        "UPDATE resilient_entries SET entry = NULL WHERE at = 1",
        "UPDATE resilient_entries SET began = 1",
    ],
)
def test_a_journal_that_is_damaged_is_an_error(
    damage: str, store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    user.execute("ALTER TABLE resilient_entries ALTER entry DROP NOT NULL")
    mine = acquired(store.execute(Begin("k", "a", 300.0, b"0")))
    for at in (1, 2):
        assert store.execute(Append("k", "a", mine.fence, at, b"", 300.0)) is True
    user.execute(damage.encode())
    with pytest.raises(StoreError, match="a journal of which entries are missing"):
        store.execute(History("k"))


def test_a_claim_that_saw_two_moments_is_asked_again() -> None:
    class Nothing:
        ntuples = 0

        def get_value(self, row_number: int, column_number: int) -> bytes | None:
            raise AssertionError

    assert claimed(Nothing(), Begin("k", "a", 30.0, b""), "utf-8") is AGAIN


rows = st.fixed_dictionaries(
    {},
    optional={
        "owner": st.sampled_from(["a", "b"]),
        "fence": st.integers(-5, 9),
        "label": st.sampled_from(["", "l"]),
        "began": st.none() | st.floats(),
        "mark": st.none() | st.sampled_from([0.0, 1e9, 4e9, float("nan")]),
        "expires": st.none() | st.sampled_from([0.0, 4e9, float("nan")]),
        "result": st.none() | st.binary(max_size=3),
        "entries": st.none() | st.integers(-3, 5) | st.just(2**31 - 1),
    },
)
journals = st.lists(
    st.tuples(st.sampled_from([1e9, 2e9]), st.integers(-2, 4), st.none() | st.binary(max_size=5)), max_size=4
)
operations = st.one_of(
    st.builds(
        Begin, st.just("k"), st.sampled_from(["a", "b"]), st.just(9.0), st.binary(max_size=5), take_over=st.booleans()
    ),
    st.builds(
        Append,
        st.just("k"),
        st.sampled_from(["a", "b"]),
        st.sampled_from([0, 7]),
        st.integers(0, 6),
        st.just(b"x"),
        st.just(9.0),
    ),
    st.builds(History, st.just("k")),
    st.builds(Scan, state=st.sampled_from(["", "running", "in doubt", "done"])),
    st.builds(Release, st.just("k"), st.just("a"), st.just(0)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=rows, kept=journals, ops=st.lists(operations, min_size=1, max_size=4))
def test_no_row_makes_anything_but_an_answer_or_a_store_error(
    row: dict[str, Any], kept: list[Any], ops: list[Op[Any]], store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    user.execute("ALTER TABLE resilient_entries DROP CONSTRAINT IF EXISTS resilient_entries_entry_not_null")
    user.execute("ALTER TABLE resilient_entries ALTER entry DROP NOT NULL")
    for column in ("began", "mark", "entries"):
        user.execute(f"ALTER TABLE resilient_records ALTER {column} DROP NOT NULL".encode())
    values = {"owner": "a", "fence": 7, "label": "", "began": 1e9, "mark": 4e9, "entries": 2} | row
    user.execute("TRUNCATE resilient_records, resilient_entries")
    names, marks = ", ".join(values), ", ".join(["%s"] * len(values))
    user.execute(
        f"INSERT INTO resilient_records (key, attempt, fingerprint, {names}) VALUES ('k', 1, '', {marks})".encode(),
        [*values.values()],
    )
    for began, at, entry in kept:
        user.execute(
            "INSERT INTO resilient_entries VALUES ('k', %s, %s, %s) ON CONFLICT DO NOTHING", (began, at, entry)
        )
    for op in ops:
        answer = outcome(store, op)
        if isinstance(answer, StoreError):
            assert not answer.maybe_written
        elif type(op) is History and answer is not None:
            assert all(type(entry) is bytes for entry in answer[1])


def test_the_same_operations_give_the_same_as_in_memory(store: PostgresStore) -> None:
    both: tuple[Store, Store] = (MemoryStore(), store)
    fences: dict[int, list[int]] = {0: [], 1: []}
    for step in range(60):
        for number, each in enumerate(both):
            got = each.execute(
                Begin(f"k{step % 7}", f"o{step % 3}", 300.0, b"%d" % step, f"l{step % 2}" * (step % 2), True)
            )
            if type(got) is Acquired:
                fences[number].append(step)
                each.execute(Append(f"k{step % 7}", f"o{step % 3}", got.fence, 1, b"%d+" % step, 300.0))
                if step % 4 == 0:
                    each.execute(Abandon(f"k{step % 7}", f"o{step % 3}", got.fence))
    assert fences[0] == fences[1]
    for key in (f"k{number}" for number in range(7)):
        told = [each.execute(History(key)) for each in both]
        first, second = told
        assert first is not None
        assert second is not None
        assert first[1] == second[1]
        assert (first[0].label, first[0].owner, first[0].attempt) == (
            second[0].label,
            second[0].owner,
            second[0].attempt,
        )
