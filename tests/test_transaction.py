"""A claim in the caller's own transaction: effect and record are committed together, or neither is."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sqlite3
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiosqlite
import psycopg
import pytest

import resilient
from resilient import Idempotent, InDoubt, InFlight, KeyReused, StoreError, claim, fence, replayed
from resilient.stores import Claim, MemoryStore, Scan, SQLiteStore, Threaded

WAYS = ["sqlite3", "aiosqlite", "psycopg", "async psycopg"]


class Declined(Exception):
    pass


class Boom(Exception):
    pass


@dataclass
class Receipt:
    order: str
    cents: int


class Bench:
    """A database with a table of effects, a store in it, and one way to reach it; each block as the user writes it."""

    def __init__(self, way: str, url: str, target: str) -> None:
        self.way, self.target = way, target
        self.policy_settings: dict[str, Any] = {}
        self.store: Any = resilient.stores.open(url)
        self.sql("CREATE TABLE effects (word TEXT)")

    @contextmanager
    def other(self) -> Any:
        """A connection that commits by itself."""
        if "psycopg" in self.way:
            with psycopg.connect(self.target, autocommit=True) as connection:
                yield connection
        else:
            with closing(sqlite3.connect(self.target, isolation_level=None)) as connection:
                yield connection

    def sql(self, statement: str) -> list[Any]:
        with self.other() as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    @property
    def effects(self) -> list[str]:
        return [row[0] for row in self.sql("SELECT word FROM effects ORDER BY word")]

    @property
    def states(self) -> list[str]:
        return [record.state for record in self.store.execute(Scan()).records]

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """A connection of the user, in the driver's default mode."""
        if self.way == "sqlite3":
            with closing(sqlite3.connect(self.target)) as plain:
                yield plain
        elif self.way == "psycopg":
            with closing(psycopg.connect(self.target)) as postgres:
                yield postgres
        elif self.way == "aiosqlite":
            async with aiosqlite.connect(self.target) as connection:
                yield connection
        else:
            postgres_a = await psycopg.AsyncConnection.connect(self.target)
            try:
                yield postgres_a
            finally:
                await postgres_a.close()

    @asynccontextmanager
    async def block(self, policy: Idempotent, connection: Any, key: Any, **settings: Any) -> AsyncIterator[Any]:
        made = policy.transaction(connection, key, **settings)
        if "a" in self.way.split("sqlite")[0] or self.way == "async psycopg":
            async with made as hold:
                yield hold
        else:
            with made as hold:
                yield hold

    async def do(self, connection: Any, word: str) -> None:
        made = connection.execute(f"INSERT INTO effects VALUES ('{word}')")
        if hasattr(made, "__await__"):
            made = await made
        closed = made.close()
        if hasattr(closed, "__await__"):
            await closed

    async def call(self, connection: Any, verb: str) -> None:
        made = getattr(connection, verb)()
        if hasattr(made, "__await__"):
            await made

    def run(self, main: Callable[[], Awaitable[None]]) -> None:
        async def body() -> None:
            try:
                await main()
            finally:
                closed = self.store.aclose() if hasattr(self.store, "aclose") else None
                if closed is not None:
                    await closed

        asyncio.run(body())
        self.store.close()


@pytest.fixture(params=WAYS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    way = request.param
    if "psycopg" in way:
        url = request.getfixturevalue("postgres_database")
        return Bench(way, url, url)
    return Bench(way, f"sqlite:///{tmp_path / 'shop.db'}", str(tmp_path / "shop.db"))


@pytest.fixture
def lite(tmp_path: Path) -> Bench:
    return Bench("sqlite3", f"sqlite:///{tmp_path / 'shop.db'}", str(tmp_path / "shop.db"))


def test_effect_and_record_are_committed_once_and_replayed(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        for turn in range(3):
            async with (
                bench.connection() as connection,
                bench.block(policy, connection, "o-1", returns=Receipt, payload={"cents": 5}) as hold,
            ):
                assert hold.replayed is (turn > 0)
                if not hold.replayed:
                    assert hold.result is None
                    await bench.do(connection, "charged")
                    hold.result = Receipt("o-1", 5)
                else:
                    assert hold.result == Receipt("o-1", 5)
            assert replayed() is (turn > 0)
            assert bench.effects == ["charged"]
        assert policy.replays == 2
        assert bench.states == ["done"]

    bench.run(main)


def test_the_block_sees_its_claim(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            keys: list[str] = []
            for error in (Boom, None):
                try:
                    async with bench.block(policy, connection, ("o", 1)) as hold:
                        assert claim() is hold
                        assert (hold.key, hold.attempt, fence()) == ('["o","1"]', 1, hold.fence)
                        assert hold.fence > 0
                        keys.append(hold.derive("stripe"))
                        if error is not None:
                            raise error
                except Boom:
                    pass
                with pytest.raises(LookupError):
                    claim()
            assert keys[0] == keys[1]

    bench.run(main)


def test_an_error_undoes_effect_and_record(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            with pytest.raises(Boom):
                async with bench.block(policy, connection, "o-1"):
                    await bench.do(connection, "charged")
                    raise Boom
            assert (bench.effects, bench.states) == ([], [])
            async with bench.block(policy, connection, "o-1") as hold:
                assert not hold.replayed
                await bench.do(connection, "again")
        assert (bench.effects, bench.states) == (["again"], ["done"])

    bench.run(main)


@pytest.mark.parametrize("verb", ["commit", "rollback"])
def test_inside_an_open_transaction_it_lives_and_dies_with_that(bench: Bench, verb: str) -> None:
    async def main() -> None:
        bench.store.execute(Claim("unrelated", "x", 30.0))  # the tables are there
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            await bench.do(connection, "before")
            async with bench.block(policy, connection, "o-1"):
                await bench.do(connection, "inside")
            with pytest.raises(Boom):
                async with bench.block(policy, connection, "o-2"):
                    await bench.do(connection, "undone")
                    raise Boom
            await bench.do(connection, "after")
            assert bench.effects == []
            await bench.call(connection, verb)
        assert bench.effects == (["after", "before", "inside"] if verb == "commit" else [])
        assert sorted(bench.states) == (["done", "running"] if verb == "commit" else ["running"])

    bench.run(main)


@pytest.mark.parametrize("inside", [False, True])
def test_an_error_that_is_remembered_is_kept_and_its_work_undone(bench: Bench, inside: bool) -> None:
    async def main() -> None:
        bench.store.execute(Claim("unrelated", "x", 30.0))
        policy = Idempotent(bench.store, key="unused", name="effects", remember=Declined)
        for turn in range(2):
            async with bench.connection() as connection:
                if inside:
                    await bench.do(connection, "before")
                with pytest.raises(Declined, match="no money") as caught:
                    async with bench.block(policy, connection, "o-1"):
                        assert turn == 0
                        await bench.do(connection, "charged")
                        raise Declined("no money")
                if inside:
                    await bench.call(connection, "commit")
            assert hasattr(caught.value, "__notes__") is (turn == 1)
            assert replayed() is (turn == 1)
        assert bench.effects == ["before"] * (2 * inside)
        assert sorted(bench.states) == ["done", "running"]
        assert policy.replays == 1

    bench.run(main)


def test_with_errors_that_are_remembered_a_success_is_one_too(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects", remember=Declined)
        for turn in range(2):
            async with bench.connection() as connection, bench.block(policy, connection, "o-1") as hold:
                if turn == 0:
                    await bench.do(connection, "charged")
                    hold.result = ["fine"]
                assert hold.result == ["fine"]
        assert bench.effects == ["charged"]

    bench.run(main)


def test_other_payloads_are_refused(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects", in_doubt="rerun")
        async with bench.connection() as connection:
            async with bench.block(policy, connection, "o-1", payload=[5]):
                pass
            with pytest.raises(KeyReused) as caught:
                async with bench.block(policy, connection, "o-1", payload=[6]):
                    pytest.fail("must not run")
            assert caught.value.stored != caught.value.given
            async with bench.block(policy, connection, "o-1") as hold:  # no payload: nothing to compare
                assert hold.replayed
            async with bench.block(policy, connection, "o-1", payload=[6], scope="other") as hold:
                assert not hold.replayed
            with pytest.raises(TypeError, match="payload cannot be part of a fingerprint"):
                policy.transaction(connection, "o-2", payload=object())
            with pytest.raises(ValueError, match="empty"):
                policy.transaction(connection, "")

    bench.run(main)


def test_a_result_that_cannot_be_kept_undoes_the_effect(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            with pytest.raises(TypeError, match="cannot be written as JSON"):
                async with bench.block(policy, connection, "o-1") as hold:
                    await bench.do(connection, "charged")
                    hold.result = object()
        assert (bench.effects, bench.states) == ([], [])

    bench.run(main)


@pytest.mark.parametrize("state", ["running", "in doubt"])
@pytest.mark.parametrize("in_doubt", ["raise", "rerun"])
def test_what_a_call_elsewhere_has_left(bench: Bench, state: str, in_doubt: Any) -> None:
    """With one name, blocks and functions share their keys."""

    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="pay", in_doubt=in_doubt)
        from resilient.idempotency import Hasher

        got = bench.store.execute(Claim(Hasher("pay")("", "o-1")[0], "them", 30.0, label="x"))
        if state == "in doubt":
            from resilient.stores import Abandon

            assert bench.store.execute(Abandon(Hasher("pay")("", "o-1")[0], "them", got.fence))
        async with bench.connection() as connection:
            if state == "in doubt" and in_doubt == "rerun":
                async with bench.block(policy, connection, "o-1") as hold:
                    assert hold.attempt == 2
                assert bench.states == ["done"]
                return
            with pytest.raises((InFlight, InDoubt)) as caught:
                async with bench.block(policy, connection, "o-1"):
                    pytest.fail("must not run")
            if state == "running":
                assert isinstance(caught.value, InFlight)
                assert 0 < caught.value.retry_after <= 30.0
            else:
                assert isinstance(caught.value, InDoubt)
                assert caught.value.attempt == 1
                assert policy.in_doubts == 1
            assert bench.states == [state]

    bench.run(main)


def test_whoever_comes_with_the_same_key_waits_and_gets_the_result(bench: Bench) -> None:
    policy = Idempotent(bench.store, key="unused", name="effects")
    ran: list[int] = []
    ready = threading.Barrier(4)

    def caller(number: int) -> Any:
        async def main() -> Any:
            async with bench.connection() as connection:
                ready.wait(60)
                async with bench.block(policy, connection, "o-1") as hold:
                    if not hold.replayed:
                        ran.append(number)
                        await bench.do(connection, f"by {number}")
                        hold.result = number
                    return hold.result

        return asyncio.run(main())

    bench.store.prepare()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(caller, range(4)))
    assert len(ran) == 1
    assert results == ran * 4
    assert bench.effects == [f"by {ran[0]}"]
    bench.store.close()


@pytest.mark.parametrize("verb", ["commit", "rollback"])
def test_a_transaction_that_is_ended_inside_the_block_is_an_error(bench: Bench, verb: str) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            with pytest.raises((StoreError, psycopg.ProgrammingError)) as caught:
                async with bench.block(policy, connection, "o-1"):
                    await bench.do(connection, "charged")
                    await bench.call(connection, verb)
            if isinstance(caught.value, StoreError):
                assert "was the transaction ended inside the block?" in str(caught.value)
                assert caught.value.maybe_written
            else:
                assert "forbidden within a Transaction context" in str(caught.value)
        assert "done" not in bench.states

    bench.run(main)


def test_a_transaction_that_is_ended_and_begun_again_inside_is_an_error_too(lite: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(lite.store, key="unused", name="effects")
        for open_before in (False, True):
            async with lite.connection() as connection:
                if open_before:
                    connection.execute("BEGIN")
                with pytest.raises(StoreError, match="was the transaction ended inside the block"):
                    async with lite.block(policy, connection, f"o-{open_before}"):
                        connection.commit()
                        await lite.do(connection, "outside")
                with pytest.raises(Boom):
                    async with lite.block(policy, connection, f"p-{open_before}"):
                        connection.rollback()
                        raise Boom

    lite.run(main)


def test_constraints_that_are_checked_at_the_end_are_the_users_own_errors(lite: Bench) -> None:
    lite.sql("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    lite.sql("CREATE TABLE child (id REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")

    async def main() -> None:
        policy = Idempotent(lite.store, key="unused", name="effects")
        for way in ("sqlite3", "aiosqlite"):
            lite.way = way
            async with lite.connection() as connection:
                pragma = connection.execute("PRAGMA foreign_keys=ON")
                if way == "aiosqlite":
                    await pragma
                with pytest.raises(sqlite3.IntegrityError):
                    async with lite.block(policy, connection, "o-1"):
                        made = connection.execute("INSERT INTO child VALUES (5)")
                        if way == "aiosqlite":
                            await made
                assert not connection.in_transaction
        assert lite.states == []

    lite.run(main)


@pytest.mark.parametrize("way", ["sqlite3", "aiosqlite"])
def test_a_database_that_is_locked_is_a_store_error(lite: Bench, way: str) -> None:
    lite.way = way
    lite.store.prepare()

    async def main() -> None:
        policy = Idempotent(lite.store, key="unused", name="effects")
        with lite.other() as other:
            other.execute("BEGIN IMMEDIATE")
            async with lite.connection() as connection:
                made = connection.execute("PRAGMA busy_timeout=0")
                if way == "aiosqlite":
                    await made
                with pytest.raises(StoreError, match="no transaction could be begun: database is locked"):
                    async with lite.block(policy, connection, "o-1"):
                        pytest.fail("must not run")
            other.execute("ROLLBACK")

    lite.run(main)


@pytest.mark.parametrize("level", [None, "DEFERRED", "EXCLUSIVE"])
def test_each_mode_of_a_sqlite3_connection(lite: Bench, level: Any) -> None:
    policy = Idempotent(lite.store, key="unused", name="effects")
    with closing(sqlite3.connect(lite.target, isolation_level=level)) as connection:
        connection.row_factory = lambda cursor, row: pytest.fail("rows of the store are not the user's")
        with policy.transaction(connection, "o-1") as hold:
            connection.execute("INSERT INTO effects VALUES ('x')")
            hold.result = 1
        assert not connection.in_transaction
    assert (lite.effects, lite.states) == (["x"], ["done"])
    lite.store.close()


def test_a_block_inside_a_block_has_its_own_claim(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            async with bench.block(policy, connection, "out") as outer:
                async with bench.block(policy, connection, "in") as inner:
                    assert claim() is inner
                    await bench.do(connection, "inner")
                assert claim() is outer
                with pytest.raises(Boom):
                    async with bench.block(policy, connection, "lost"):
                        await bench.do(connection, "lost")
                        raise Boom
                await bench.do(connection, "outer")
            assert (bench.effects, bench.states) == (["inner", "outer"], ["done", "done"])

    bench.run(main)


@pytest.mark.parametrize("bad", ["memory", "threaded", "redis"])
def test_stores_that_have_no_transactions_are_refused(bad: str, tmp_path: Path) -> None:
    stores: dict[str, Callable[[], Any]] = {
        "memory": MemoryStore,
        "threaded": lambda: Threaded(MemoryStore()),
        "redis": lambda: resilient.stores.open("redis://127.0.0.1:1/0"),
    }
    store = stores[bad]()
    with closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        with pytest.raises(TypeError, match="cannot take part in a transaction: SQLite and PostgreSQL stores can"):
            with Idempotent(store, key="unused", name="effects").transaction(connection, "o-1"):
                pytest.fail("must not run")
        assert not connection.in_transaction


class Faceless:
    """Like a connection, and none."""

    def execute(self, *_: Any) -> None: ...


@pytest.mark.parametrize("connection", [None, Faceless(), "sqlite:///x.db"])
def test_what_is_no_connection_is_refused(lite: Bench, connection: Any) -> None:
    async def main() -> None:
        policy = Idempotent(lite.store, key="unused", name="effects")
        with pytest.raises(TypeError, match="`with` cannot use a "):
            with policy.transaction(connection, "o-1"):
                pytest.fail("must not run")
        with pytest.raises(
            TypeError, match=r"`async with` cannot use a .*: sqlite3 and psycopg connections take `with`"
        ):
            async with policy.transaction(connection, "o-1"):
                pytest.fail("must not run")

    lite.run(main)


def test_the_wrong_kind_of_with_is_refused(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            if bench.way in ("sqlite3", "psycopg"):
                with pytest.raises(TypeError, match="`async with` cannot use a Connection here"):
                    async with policy.transaction(connection, "o-1"):
                        pytest.fail("must not run")
            else:
                with pytest.raises(TypeError, match=r"`with` cannot use a (Async)?Connection here"):
                    with policy.transaction(connection, "o-1"):
                        pytest.fail("must not run")

    bench.run(main)


def test_a_connection_to_another_kind_of_database_is_refused(lite: Bench, postgres_database: str) -> None:
    postgres = resilient.stores.open(postgres_database)
    with closing(sqlite3.connect(lite.target)) as connection, psycopg.connect(postgres_database) as other:
        for store, wrong, driver in ((postgres, connection, "psycopg"), (lite.store, other, "sqlite3")):
            with pytest.raises(TypeError, match=f"cannot use a Connection: its own are of {driver}"):
                with Idempotent(store, key="unused", name="effects").transaction(wrong, "o-1"):
                    pytest.fail("must not run")
    postgres.close()
    lite.store.close()


def test_a_store_of_somebody_else_may_take_part(lite: Bench) -> None:
    class Mine:
        def __init__(self, inner: SQLiteStore) -> None:
            self.execute, self.on, self.prepare = inner.execute, inner.on, inner.prepare

    with closing(sqlite3.connect(lite.target)) as connection:
        with Idempotent(Mine(lite.store), key="unused", name="effects").transaction(connection, "o-1") as hold:
            hold.result = 1
    assert lite.states == ["done"]
    lite.store.close()


def test_a_scope_out_of_arguments_must_be_given(lite: Bench) -> None:
    policy = Idempotent(lite.store, key="unused", name="effects", scope=lambda order: order)
    with closing(sqlite3.connect(lite.target)) as connection:
        with pytest.raises(TypeError, match="scope must be given"):
            policy.transaction(connection, "o-1")
        with policy.transaction(connection, "o-1", scope="a") as one:
            one.result = 1
        with Idempotent(lite.store, key="unused", name="effects", scope="a").transaction(connection, "o-1") as two:
            assert two.result == 1
    lite.store.close()


def test_a_result_that_is_not_what_was_asked_for_is_a_store_error(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            async with bench.block(policy, connection, "o-1") as hold:
                hold.result = "text"
            with pytest.raises(StoreError, match="does not fit"):
                async with bench.block(policy, connection, "o-1", returns=Receipt):
                    pytest.fail("must not run")
            with pytest.raises(TypeError, match="cannot be kept"):
                policy.transaction(connection, "o-2", returns=Faceless)

    bench.run(main)


def test_a_claim_that_vanishes_inside_the_block_is_an_error(bench: Bench) -> None:
    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            with pytest.raises(StoreError, match="the claim of 'o-1' is gone"):
                async with bench.block(policy, connection, "o-1") as hold:
                    from resilient.stores import Release

                    release = Release(hold.stored, hold.owner, hold.fence)
                    if bench.way in ("aiosqlite", "async psycopg"):
                        await bench.store.aon(connection, release)
                    else:
                        bench.store.on(connection, release)
                    await bench.do(connection, "charged")
        assert bench.effects == []

    bench.run(main)


def test_the_first_block_of_all_may_be_inside_an_open_transaction(bench: Bench) -> None:
    """The tables of the store are made by another connection: PostgreSQL lets it, SQLite has to be prepared."""

    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            await bench.do(connection, "before")
            if "sqlite" in bench.way:
                bench.store.close()
                bench.store = policy._store = SQLiteStore(bench.target, busy_timeout=0.0)
                with pytest.raises(StoreError, match="locked") as caught:
                    async with bench.block(policy, connection, "o-1"):
                        pytest.fail("must not run")
                assert "let it do so first (store.prepare()" in caught.value.__notes__[0]
                await bench.call(connection, "rollback")
                bench.store.prepare()
                await bench.do(connection, "before")
            async with bench.block(policy, connection, "o-1"):
                await bench.do(connection, "inside")
            await bench.call(connection, "commit")
        assert bench.effects == ["before", "inside"]
        assert bench.states == ["done"]

    bench.run(main)


def test_a_store_that_cannot_be_opened_is_a_store_error(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path)  # a directory
    with closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        with pytest.raises(StoreError) as caught:
            with Idempotent(store, key="unused", name="effects").transaction(connection, "o-1"):
                pytest.fail("must not run")
        assert not hasattr(caught.value, "__notes__")
        assert not connection.in_transaction
    store.close()


def test_a_block_that_ends_in_another_context_leaves_the_claim_there_alone(lite: Bench) -> None:
    with closing(sqlite3.connect(lite.target)) as connection:
        block = Idempotent(lite.store, key="unused", name="effects").transaction(connection, "o-1")
        contextvars.Context().run(block.__enter__)
        contextvars.Context().run(block.__exit__, None, None, None)
    assert lite.states == ["done"]
    lite.store.close()


def test_no_frame_lingers_in_a_cycle_after_a_replayed_error(lite: Bench) -> None:
    class Marker:
        pass

    policy = Idempotent(lite.store, key="unused", name="effects", remember=Declined)
    connection = sqlite3.connect(lite.target)

    def once() -> weakref.ref[Any]:
        marker = Marker()
        try:
            with policy.transaction(connection, "o-1"):
                raise Declined
        except Declined:
            pass
        return weakref.ref(marker)

    once()
    gc.collect()
    gc.disable()
    try:
        assert once()() is None
    finally:
        gc.enable()
    connection.close()
    lite.store.close()


def test_the_keys_of_a_block_belong_to_the_name_of_its_policy(lite: Bench) -> None:
    """Two policies with equal settings are two effects: the second must not get the first one's result."""
    orders, refunds = (Idempotent(lite.store, key="order_id") for _ in range(2))
    with closing(sqlite3.connect(lite.target)) as connection:
        for policy in (orders, refunds):
            with pytest.raises(TypeError, match=r'give it one, Idempotent\(…, name="orders"\)'):
                policy.transaction(connection, "o-1")

        @orders
        def order(order_id: str) -> str:
            return "ordered"

        @refunds
        def refund(order_id: str) -> str:
            return "refunded"

        with refunds.transaction(connection, "o-1") as hold:
            assert not hold.replayed
            hold.result = "refunded in one"
        assert (order("o-1"), refund("o-1")) == ("ordered", "refunded")
        for policy, replayed in ((orders, False), (refunds, True), (orders, True)):
            with policy.transaction(connection, "o-1") as hold:
                assert hold.replayed is replayed

        @refunds
        def undo(order_id: str) -> str:
            return "undone"

        with pytest.raises(TypeError, match="nor just one function"):
            refunds.transaction(connection, "o-1")


def test_a_statement_that_commits_inside_the_block_is_noticed(bench: Bench) -> None:
    """psycopg forbids the method only, and begins another transaction without a word."""

    async def main() -> None:
        policy = Idempotent(bench.store, key="unused", name="effects")
        async with bench.connection() as connection:
            with pytest.raises(StoreError, match="was the transaction ended inside the block") as caught:
                async with bench.block(policy, connection, "o-1"):
                    await bench.do(connection, "charged")
                    done = connection.execute("COMMIT")
                    if hasattr(done, "__await__"):
                        await done
            assert caught.value.maybe_written

    bench.run(main)


def test_a_call_that_would_wait_for_the_transaction_around_it_is_refused_at_once(lite: Bench) -> None:
    orders = Idempotent(lite.store, key="unused", name="effects")

    @Idempotent(lite.store, key="order")
    def charge(order: str) -> str:
        return order

    @Idempotent(MemoryStore(), key="order")
    def elsewhere(order: str) -> str:
        return order

    with closing(sqlite3.connect(lite.target)) as connection:
        with orders.transaction(connection, "o-1"):
            assert elsewhere("o-1") == "o-1"
            with pytest.raises(StoreError, match=r"the transaction of 'o-1' .* has SQLiteStore.* locked"):
                charge("o-2")
            later = contextvars.copy_context()
        assert later.run(charge, "o-2") == charge("o-2") == "o-2"
