"""The PostgreSQL store keeps the contract, on connections of its own and on those of the user's pools.

Besides: its tables, its URLs, what a replay costs the server, and operations inside the user's own transaction.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel
from psycopg.rows import dict_row, tuple_row
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from resilient import Idempotent, stores
from resilient._contract import Case
from resilient.clock import SystemClock
from resilient.stores import (
    Abandon,
    Acquired,
    Busy,
    Claim,
    Completed,
    Finish,
    Page,
    PostgresStore,
    Read,
    Record,
    Release,
    Scan,
    StoreError,
    Threaded,
)
from resilient.stores._pg_sql import MIGRATIONS
from resilient.testing import store_contract
from tests._postgres_child import claim_in_a_process, first_claim
from tests._servers import postgres_database

CLOCK = SystemClock()
_names = itertools.count()


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[str]:
    """One database for this file; each store gets tables of its own."""
    with postgres_database(postgres_url) as url:
        yield url


def prefix() -> str:
    return f"t{next(_names)}_"


@pytest.fixture
def store(database: str) -> Iterator[PostgresStore]:
    made = PostgresStore(database, prefix=prefix())
    yield made
    made.close()


@pytest.fixture
def user(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the user's."""
    with psycopg.connect(database) as connection:
        yield connection


# -- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", store_contract(), ids=str)
def test_contract(case: Case, database: str) -> None:
    case(lambda: PostgresStore(database, prefix=prefix(), pool_size=4))


@pytest.mark.parametrize("case", store_contract(sync=False, asyncio=False, trio=True), ids=str)
def test_contract_under_trio_by_threads(case: Case, database: str) -> None:
    case(lambda: Threaded(PostgresStore(database, prefix=prefix(), pool_size=4)))


def strictest(connection: psycopg.Connection[Any]) -> None:
    connection.isolation_level = IsolationLevel.SERIALIZABLE
    connection.adapters.register_loader("float8", TextLoader)


@pytest.mark.parametrize("case", store_contract(asyncio=False), ids=str)
def test_contract_on_a_pool_with_its_own_mind(case: Case, database: str) -> None:
    kwargs = {"row_factory": dict_row, "cursor_factory": psycopg.ClientCursor, "prepare_threshold": None}
    with ConnectionPool(database, min_size=1, max_size=4, kwargs=kwargs, configure=strictest, open=True) as pool:
        case(lambda: PostgresStore(pool, prefix=prefix()))


class OnAsyncPool:
    """A store on a pool that is opened in the loop of its first use, as pools must be."""

    def __init__(self, database: str, **kwargs: Any) -> None:
        self.pool = AsyncConnectionPool(database, min_size=1, max_size=4, kwargs=kwargs, open=False)
        self.store = PostgresStore(self.pool, prefix=prefix())
        self.watch = self.store.watch

    async def aexecute(self, op: Any) -> Any:
        await self.pool.open()
        return await self.store.aexecute(op)

    async def aclose(self) -> None:
        self.store.close()
        await self.pool.close()


@pytest.mark.parametrize("case", store_contract(sync=False), ids=str)
def test_contract_on_an_async_pool(case: Case, database: str) -> None:
    case(lambda: OnAsyncPool(database, row_factory=dict_row, autocommit=True))


def test_a_pool_gives_the_methods_that_it_can_serve_and_no_others(database: str) -> None:
    plain, tasks = ConnectionPool(database, open=False), AsyncConnectionPool(database, open=False)
    for pool, has, lacks in (
        (plain, ("execute", "on", "prepare"), ("aexecute", "aon", "aprepare")),
        (tasks, ("aexecute", "aon", "aprepare"), ("execute", "on", "prepare")),
    ):
        made = PostgresStore(pool)
        assert isinstance(made, PostgresStore)
        assert all(hasattr(made, name) for name in has)
        for name in lacks:
            with pytest.raises(AttributeError, match=name):
                getattr(made, name)
    with pytest.raises(StoreError, match="not open yet") as caught:
        PostgresStore(plain).execute(Read("k"))
    assert not caught.value.maybe_written


def test_a_pool_that_makes_its_connections_out_of_functions_leaves_waiters_to_ask_again(database: str) -> None:
    with ConnectionPool(lambda: database, min_size=1, open=True) as pool:
        made = PostgresStore(pool, prefix=prefix())
        before = threading.active_count()
        made.watch("k", task=False).close()
        assert threading.active_count() == before
        made.close()


# -- settings --------------------------------------------------------------------------------------------------------


def test_our_options_are_taken_out_of_the_url_and_the_rest_is_for_libpq(database: str) -> None:
    name = prefix()
    made = stores.open(f"{database}&prefix={name}&pool_max=3&timeout=2.5&application_name=shop%20one")
    assert (made.prefix, made._size, made.timeout) == (name, 3, 2.5)
    lane = made._lane()
    connection = lane.take(CLOCK.now() + 5)
    assert connection.execute("SHOW application_name").fetchone() == ("shop one",)
    assert connection.execute("SHOW default_transaction_isolation").fetchone() == ("read committed",)
    lane.give(connection)
    made.close()
    assert PostgresStore.from_url("postgresql://h/d?pool_size=7&prefix=a_")._database == "postgresql://h/d"
    assert stores.open("POSTGRES://H/D?prefix=a_")._database == "postgres://H/D"
    assert PostgresStore("PostgreSQL://H/D")._database == "postgresql://H/D"
    assert (
        repr(PostgresStore("postgresql://me:secret@h:5/d"))
        == "PostgresStore('host=h port=5 dbname=d', prefix='resilient_')"
    )
    assert "secret" not in repr(PostgresStore(ConnectionPool("postgresql://me:secret@h/d", open=False)))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: PostgresStore("host=h", prefix="Pay"), ValueError, "prefix must be"),
        (lambda: PostgresStore("host=h", prefix="a" * 32), ValueError, "prefix must be"),
        (lambda: PostgresStore("host=h", prefix='x"; DROP TABLE y; --'), ValueError, "prefix must be"),
        (lambda: PostgresStore("host=h", prefix="1a"), ValueError, "prefix must be"),
        (lambda: PostgresStore("host=h", pool_size=0), ValueError, "pool_size must be"),
        (lambda: PostgresStore("host=h", timeout=0), ValueError, "timeout must be"),
        (lambda: PostgresStore("nonsense"), ValueError, "database must be"),
        (lambda: PostgresStore(5), TypeError, "database must be"),  # type: ignore[arg-type]  # pyright: ignore
        (lambda: PostgresStore.from_url("postgresql://h/d?pool_size=many"), ValueError, "pool_size must be a number"),
        (lambda: PostgresStore.from_url("postgresql://h/d?colour=red"), ValueError, "^url: .*colour"),
    ],
)
def test_a_wrong_setting_is_named(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_without_the_driver_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    spec = importlib.util.spec_from_file_location("postgres_without", Path(stores.__file__).with_name("postgres.py"))
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'resilient-kit\[postgres\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_text_that_postgresql_cannot_keep_is_a_clear_error_and_nothing_is_written(store: PostgresStore) -> None:
    for key in ("a\0b", "\ud800"):
        with pytest.raises(StoreError) as caught:
            store.execute(Claim(key, "a", 30.0))
        assert not caught.value.maybe_written
    assert store.execute(Scan()) == Page((), "")


def test_a_number_that_postgresql_cannot_keep_is_a_clear_error_and_nothing_is_written(store: PostgresStore) -> None:
    mine = store.execute(Claim("k", "a", 30.0))
    before = store.execute(Read("k"))
    with pytest.raises(StoreError, match="a number is out of range") as caught:
        store.execute(Finish("k", "a", mine.fence + 2**63, b"x", 30.0))
    assert not caught.value.maybe_written
    assert store.execute(Read("k")) == before


def test_numbers_may_be_whole_and_bytes_of_any_kind(store: PostgresStore) -> None:
    result: Any = memoryview(b"result")
    mine = store.execute(Claim("k", "a", 30))
    assert store.execute(Finish("k", "a", mine.fence, result, 30)) is True
    assert result_of(store.execute(Read("k"))) == b"result"


# -- tables ----------------------------------------------------------------------------------------------------------


def test_ten_threads_and_three_processes_start_on_an_empty_database_and_one_gets_the_key(database: str) -> None:
    count, name = 10, prefix()
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(lambda _: first_claim(database, name, barrier), range(count)))
    assert sorted(found) == [False] * (count - 1) + [True]
    spawn = multiprocessing.get_context("spawn")
    gate, answers = spawn.Barrier(3), spawn.Queue()
    arguments = (database, prefix(), gate, answers)
    processes = [spawn.Process(target=claim_in_a_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(answers.get(timeout=60) for _ in processes) == [False] * 2 + [True]
    for process in processes:
        process.join()
        process.close()
    answers.close()
    answers.join_thread()


def test_ten_tasks_start_on_an_empty_database_and_one_gets_the_key(database: str) -> None:
    async def main() -> None:
        made = PostgresStore(database, prefix=prefix())
        answers = await asyncio.gather(*(made.aexecute(Claim("k", f"owner-{n}", 30.0)) for n in range(10)))
        assert sorted(type(answer) is Acquired for answer in answers) == [False] * 9 + [True]
        later = PostgresStore(database, prefix=made.prefix)
        assert type(await later.aexecute(Claim("k", "owner-10", 30.0))) is Busy
        made.close()
        later.close()

    asyncio.run(main())


def test_tables_of_an_older_version_are_upgraded(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = prefix()
    old = PostgresStore(database, prefix=name)
    fence = old.execute(Claim("k", "a", 30.0))
    monkeypatch.setattr(
        "resilient.stores.postgres.MIGRATIONS", (*MIGRATIONS, "ALTER TABLE {prefix}records ADD COLUMN extra int4")
    )
    new = PostgresStore(database, prefix=name)
    assert new.execute(Claim("k", "a", 30.0)) == fence
    with psycopg.connect(database) as connection:
        assert connection.execute(f"SELECT extra FROM {name}records".encode()).fetchone() == (None,)
        assert connection.execute(f"SELECT version FROM {name}version".encode()).fetchall() == [(3,)]
    monkeypatch.undo()
    with pytest.raises(StoreError, match=r"version 3, made by a newer release; this one knows versions up to 2"):
        PostgresStore(database, prefix=name).execute(Read("k"))
    old.close()
    new.close()


@pytest.mark.parametrize("change", ["DELETE FROM {}version", "UPDATE {}version SET version = -1"])
def test_a_damaged_version_is_said(change: str, store: PostgresStore, user: psycopg.Connection[Any]) -> None:
    store.prepare()
    user.execute(change.format(store.prefix).encode())
    user.commit()
    with pytest.raises(StoreError, match=r"is damaged: it says version (None|-1)"):
        PostgresStore(user.info.dsn, prefix=store.prefix).prepare()


def test_a_role_that_may_not_create_tables_can_use_those_that_exist(database: str) -> None:
    name = prefix()
    role = f"{name}guest"
    owner = PostgresStore(database, prefix=name)
    owner.prepare()
    owner.prepare()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        connection.execute(f"GRANT ALL ON {name}records, {name}entries, {name}version TO {role}".encode())
    guest = PostgresStore(f"{database}&user={role}", prefix=name)
    assert type(guest.execute(Claim("k", "a", 30.0))) is Acquired
    stranger = PostgresStore(f"{database}&user={role}", prefix=prefix())
    with pytest.raises(StoreError, match="permission denied") as caught:
        stranger.execute(Claim("k", "a", 30.0))
    assert not caught.value.maybe_written
    for made in (owner, guest, stranger):
        made.close()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"DROP OWNED BY {role}".encode())
        connection.execute(f"DROP ROLE {role}".encode())


def test_tables_that_were_dropped_are_said_to_be_missing_and_made_again(
    store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    store.prepare()
    user.execute(f"DROP TABLE {store.prefix}records, {store.prefix}entries, {store.prefix}version".encode())
    user.commit()
    with pytest.raises(StoreError, match=r"tables .* are missing") as caught:
        store.execute(Claim("k", "a", 30.0))
    assert not caught.value.maybe_written
    assert type(store.execute(Claim("k", "a", 30.0))) is Acquired


# -- what it costs the server ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["done", "busy", "awaited", "doubtful"])
def test_a_replay_only_reads(state: str, store: PostgresStore, user: psycopg.Connection[Any]) -> None:
    mine = store.execute(Claim("k", "a", 30.0))
    if state == "done":
        store.execute(Finish("k", "a", mine.fence, b"x", 60.0))
    elif state == "doubtful":
        store.execute(Abandon("k", "a", mine.fence))
    elif state == "awaited":
        store.execute(Claim("k", "b", 30.0, awaited=True))
    assert type(store.on(user, Claim("k", "b", 30.0, awaited=state == "awaited"))) is not Acquired
    cursor = user.execute(f"SELECT pg_current_xact_id_if_assigned(), xmax::text FROM {store.prefix}records".encode())
    ((xact, locker),) = cursor.fetchall()
    # No transaction number: nothing was written, and nothing is flushed at commit. No locker: nobody has to wait.
    assert xact is None
    assert locker == "0" or state == "awaited"


def test_nobody_is_notified_unless_somebody_waits(store: PostgresStore, user: psycopg.Connection[Any]) -> None:
    user.autocommit = True
    store.prepare()
    user.execute(f"LISTEN {store.prefix}wake".encode())
    long = "w" * 5000
    for awaited in (False, True):
        for end in (
            Finish("f", "a", 0, b"x", 9.0),
            Release("r", "a", 0),
            Abandon("a", "a", 0),
            Finish(long, "a", 0, b"", 9),
        ):
            store.execute(Claim(end.key, "a", 30.0))
            if awaited:
                assert type(store.execute(Claim(end.key, "b", 30.0, awaited=True))) is Busy
            assert store.execute(end) is True
        user.execute(f"DELETE FROM {store.prefix}records".encode())
    user.execute(f"NOTIFY {store.prefix}wake, 'end'".encode())
    heard: list[str] = []
    for notify in user.notifies(timeout=30):
        heard.append(notify.payload)
        if heard[-1] == "end":
            break
    assert heard == ["f", "r", "a", long[:2000], "end"]


def test_a_page_looks_at_some_records_only(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient.stores._pg_sql.LOOK", 3)
    for n in range(10):
        store.execute(Claim(f"k{n}", "a", 30.0, label="rare" if n == 8 else "usual"))
    after, pages = "", []
    while True:
        page = store.execute(Scan(after, limit=2, text="rare"))
        pages.append([record.key for record in page.records])
        after = page.after
        if not after:
            break
    assert pages == [[], [], ["k8"], []]


# -- inside the user's transaction -----------------------------------------------------------------------------------


def result_of(record: Record | None) -> bytes | None:
    assert record is not None
    return record.result


@pytest.mark.parametrize("autocommit", [False, True])
def test_on_the_users_connection_the_record_lives_and_dies_with_the_transaction(
    autocommit: bool, store: PostgresStore, database: str
) -> None:
    store.prepare()
    factory: Any = dict_row
    with psycopg.connect(database, autocommit=autocommit, row_factory=factory) as user:
        user.cursor_factory = psycopg.ClientCursor
        for undo in (True, False):
            with user.transaction(force_rollback=undo):
                claimed = store.on(user, Claim("k", "a", 30.0))
                assert type(claimed) is Acquired
                assert store.on(user, Claim("k", "a", 30.0)) == claimed
                assert store.on(user, Finish("k", "a", claimed.fence, b"x", 60.0)) is True
                assert result_of(store.on(user, Read("k"))) == b"x"
                assert store.execute(Read("k")) is None
            record = store.execute(Read("k"))
            assert (record is None) == undo


def test_a_claim_waits_for_the_transaction_that_has_the_key_and_sees_its_result(
    store: PostgresStore, user: psycopg.Connection[Any], database: str
) -> None:
    store.prepare()
    mine = store.on(user, Claim("k", "a", 30.0))
    with psycopg.connect(database) as other, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(store.on, other, Claim("k", "b", 30.0))
        blocked(user, other)
        store.on(user, Finish("k", "a", mine.fence, b"x", 60.0))
        user.commit()
        assert waiting.result() == Completed(mine.fence, 1, "", b"x")


def test_a_claim_that_waited_for_a_transaction_that_failed_has_the_whole_lease(
    store: PostgresStore, user: psycopg.Connection[Any], database: str
) -> None:
    store.prepare()
    store.on(user, Claim("k", "a", 30.0))
    with psycopg.connect(database, autocommit=True) as other, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(store.on, other, Claim("k", "b", 0.02))
        blocked(user, other)
        user.execute("SELECT pg_sleep(0.03)")
        before = user.execute("SELECT date_part('epoch', clock_timestamp())").fetchone()
        user.rollback()
        assert type(waiting.result()) is Acquired
        assert before is not None
        record = store.on(other, Read("k"))
        assert record is not None
        assert record.mark >= before[0] + 0.02


def blocked(user: psycopg.Connection[Any], other: psycopg.Connection[Any]) -> None:
    """Return once `other` waits for a lock that `user` holds."""
    for _ in range(1_000_000):
        row = user.execute("SELECT pg_blocking_pids(%s)", (other.info.backend_pid,)).fetchone()
        if row == ([user.info.backend_pid],):
            return
    user.rollback()  # else whoever waits would wait for ever
    raise AssertionError("it never waited")


def test_at_repeatable_read_the_conflict_is_psycopgs_own_error(
    store: PostgresStore, user: psycopg.Connection[Any]
) -> None:
    store.prepare()
    user.isolation_level = IsolationLevel.REPEATABLE_READ
    user.execute("SELECT 1")
    store.execute(Claim("k", "a", 30.0))
    with pytest.raises(psycopg.errors.SerializationFailure):
        store.on(user, Claim("k", "b", 30.0))
    assert user.info.transaction_status == psycopg.pq.TransactionStatus.INERROR


def test_tables_that_the_users_database_has_not_are_said_to_be_missing(
    store: PostgresStore, postgres_database: str
) -> None:
    store.prepare()
    with psycopg.connect(postgres_database) as user:
        with pytest.raises(StoreError, match=r"are missing in the database of this connection") as caught:
            store.on(user, Claim("k", "a", 30.0))
        assert not caught.value.maybe_written

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(postgres_database) as user:
            with pytest.raises(StoreError, match=r"are missing in the database of this connection"):
                await store.aon(user, Claim("k", "a", 30.0))

    asyncio.run(main())


def test_on_the_users_async_connection_too(store: PostgresStore, database: str) -> None:
    async def main() -> None:
        await store.aprepare()
        await store.aprepare()
        factory: Any = dict_row
        async with await psycopg.AsyncConnection.connect(database, row_factory=factory) as user:
            claimed = await store.aon(user, Claim("k", "a", 30.0))
            assert type(claimed) is Acquired
            assert await store.aon(user, Claim("k", "a", 30.0)) == claimed
            assert await store.aon(user, Release("k", "a", claimed.fence)) is True
            assert await store.aon(user, Read("k")) is None
            await user.rollback()
        assert await store.aexecute(Read("k")) is None
        store.close()

    asyncio.run(main())


def test_a_connection_in_pipeline_mode_is_refused_by_name(store: PostgresStore, database: str) -> None:
    """Its cursors have no result yet: `'NoneType' object has no attribute 'ntuples'`."""
    store.prepare()
    idempotent = Idempotent(store, key="key", name="pipeline")
    with psycopg.connect(database) as user:
        with user.pipeline(), pytest.raises(RuntimeError, match="the connection is in pipeline mode"):
            store.on(user, Read("k"))
        with user.pipeline(), pytest.raises(RuntimeError, match="the connection is in pipeline mode"):
            with idempotent.transaction(user, "k"):
                raise AssertionError("unreachable")
        with idempotent.transaction(user, "k") as claim, user.pipeline():
            user.execute("SELECT 1")
            claim.result = 1
        with idempotent.transaction(user, "k") as claim:
            assert (claim.replayed, claim.result) == (True, 1)

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(database) as user, user.pipeline():
            with pytest.raises(RuntimeError, match="the connection is in pipeline mode"):
                await store.aon(user, Read("k"))
            with pytest.raises(RuntimeError, match="the connection is in pipeline mode"):
                async with idempotent.transaction(user, "j"):
                    raise AssertionError("unreachable")

    asyncio.run(main())


def test_rows_are_read_the_same_whatever_the_row_factory_and_encoding(store: PostgresStore, database: str) -> None:
    store.execute(Claim("k", "a", 30.0, "print", "Bär"))
    record = store.execute(Read("k"))
    assert record is not None
    for encoding in ("UTF8", "LATIN1"):
        for factory in (dict_row, tuple_row):
            make: Any = factory
            with psycopg.connect(database, row_factory=make, client_encoding=encoding) as user:
                assert store.on(user, Read("k")) == record
                assert store.on(user, Scan(text="ä")).records == (record,)
