"""The SQLite store keeps the contract, in one file and from several connections."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from resilient import stores
from resilient._contract import Case
from resilient.clock import SystemClock
from resilient.errors import StoreError
from resilient.stores import Acquired, Busy, Claim, Completed, Finish, Op, Purge, Read, Release, Scan, _sqlite_file
from resilient.stores._sqlite_sql import MIGRATIONS
from resilient.stores.sqlite import SQLiteStore
from resilient.testing import FakeClock, store_contract


class Ticking(FakeClock):
    """A clock that is told, and on which two questions never come at the same instant."""

    def at(self) -> float:
        self.advance(2e-6)
        return super().at()


_names = itertools.count()
_place: Path


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path) -> None:
    global _place
    _place = tmp_path


def make(durability: str, clock: FakeClock | None = None) -> SQLiteStore:
    return SQLiteStore(_place / f"{next(_names)}.db", durability=durability, clock=clock)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", store_contract(lambda: make("full"), trio=True), ids=str)
def test_contract(case: Case) -> None:
    case()


clock = Ticking()


@pytest.mark.parametrize(
    "case", store_contract(lambda: make("normal", clock), trio=True, advance=clock.advance), ids=str
)
def test_contract_by_a_clock_that_is_told(case: Case) -> None:
    case()


# -- how one is made -------------------------------------------------------------------------------------------------


def test_a_url_says_where_and_how() -> None:
    store = SQLiteStore.from_url("sqlite:///a%20b/rel.db?durability=normal&prefix=x_&busy_timeout=2.5")
    assert (store.path, store.durability) == ("a b/rel.db", "normal")
    assert repr(store) == "SQLiteStore('a b/rel.db', durability='normal')"
    assert (store._file._prefix, store._file._busy_timeout) == ("x_", 2.5)
    other = SQLiteStore.from_url("sqlite:////abs/olute.db")
    assert (other.path, other.durability) == ("/abs/olute.db", "full")
    assert isinstance(stores.open("sqlite:///x.db"), SQLiteStore)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("sqlite://", "url must be like"),
        ("sqlite:x.db", "url must be like"),
        ("sqlite://host/x.db", "url must be like"),
        ("sqlite:///", "memory://"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite:///x.db?speed=high", "speed='high'"),
        ("sqlite:///x.db?prefix=a&prefix=b", "prefix='b'"),
        ("sqlite:///x.db?prefix=a-b", "prefix must be .* not 'a-b'"),
        ("sqlite:///x.db?prefix=", "prefix must be .* not ''"),
        ("sqlite:///x.db?durability=some", "durability must be .* not 'some'"),
        ("sqlite:///x.db?busy_timeout=soon", "busy_timeout must be seconds, not 'soon'"),
        ("sqlite:///x.db?busy_timeout=-1", "busy_timeout must be between .* not -1.0"),
        ("sqlite:///x.db?busy_timeout=nan", "busy_timeout must be between .* not nan"),
        ("sqlite:///x%00.db", "null character"),
    ],
)
def test_a_url_that_cannot_be_is_refused(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SQLiteStore.from_url(url)


def test_arguments_that_cannot_be_are_refused() -> None:
    with pytest.raises(TypeError, match="path must be a string or a path, not b'x'"):
        SQLiteStore(b"x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefix must be 1 to 31 letters"):
        SQLiteStore("x", prefix="a" * 32)
    with pytest.raises(ValueError, match="prefix must be"):
        SQLiteStore("x", prefix="a\n")
    with pytest.raises(ValueError, match="prefix must be"):
        SQLiteStore("x", prefix=5)  # type: ignore[arg-type]


# -- opening ---------------------------------------------------------------------------------------------------------


def test_nothing_is_opened_before_the_first_operation_and_close_is_idempotent(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    store = SQLiteStore(path)
    store.close()
    assert not path.exists()
    assert store.execute(Read("k")) is None
    assert path.exists()
    store.close()
    store.close()
    assert isinstance(store.execute(Claim("k", "a", 10.0)), Acquired)
    store.close()


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "no" / "x.db")
    for op in (Read("k"), Claim("k", "a", 10.0), Purge(1.0)):
        with pytest.raises(StoreError, match=f"there is no directory {tmp_path / 'no'}") as caught:
            store.execute(op)
        assert not caught.value.maybe_written


def test_a_path_that_is_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open database file"):
        SQLiteStore(tmp_path).execute(Read("k"))


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"#!/bin/sh\nrm -rf everything\n" * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        SQLiteStore(path).execute(Claim("k", "a", 10.0))
    assert path.read_bytes().startswith(b"#!/bin/sh")


def test_a_database_without_write_ahead_logging_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SQLiteStore(tmp_path / "x.db")
    monkeypatch.setattr(store._file, "_connect", lambda: sqlite3.connect(":memory:"))
    with pytest.raises(StoreError, match=r"write-ahead logging is not possible here \(memory\)"):
        store.prepare()


def sql(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statements", "text"),
    [
        (["CREATE TABLE resilient_records (a)"], "table resilient_records already exists"),
        (["CREATE VIEW resilient_records AS SELECT 1"], "resilient_records already exists"),
        (["CREATE TABLE resilient_schema (version)"], "resilient_schema is damaged"),
        (["CREATE TABLE Resilient_Schema (other)", "INSERT INTO resilient_schema VALUES (1)"], "no such column"),
        (["CREATE TABLE resilient_schema (version)", "INSERT INTO resilient_schema VALUES (1), (1)"], "damaged"),
        (["CREATE TABLE resilient_schema (version)", "INSERT INTO resilient_schema VALUES ('one')"], "damaged"),
        (["CREATE TABLE resilient_schema (version)", "INSERT INTO resilient_schema VALUES (0)"], "damaged"),
        (
            ["CREATE TABLE resilient_schema (version)", "INSERT INTO resilient_schema VALUES (99)"],
            "of version 99, made by a newer resilient than this one, which knows 2",
        ),
    ],
)
def test_tables_that_are_not_ours_are_an_error_and_stay_as_they_are(
    tmp_path: Path, statements: list[str], text: str
) -> None:
    path = tmp_path / "x.db"
    sql(path, *statements)
    store = SQLiteStore(path)
    before = dump(path)
    for _ in range(2):
        with pytest.raises(StoreError, match=text):
            store.execute(Claim("k", "a", 10.0))
    assert dump(path) == before


def dump(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    lines = list(connection.iterdump())
    connection.close()
    return lines


@pytest.mark.parametrize("op", [Claim("k", "a", 1.0), Read("k"), Finish("k", "a", 1, b"", 1.0), Scan(), Purge(1.0)])
def test_a_table_of_another_shape_is_an_error(tmp_path: Path, op: Op[Any]) -> None:
    path = tmp_path / "x.db"
    sql(
        path,
        "CREATE TABLE resilient_schema (version)",
        "INSERT INTO resilient_schema VALUES (2)",
        "CREATE TABLE resilient_records (key)",
        "CREATE TABLE resilient_entries (key)",
    )
    store = SQLiteStore(path)
    with pytest.raises(StoreError, match=r"no column|no such column"):
        store.execute(op)
    store.close()


def test_two_prefixes_in_one_file_know_nothing_of_each_other(tmp_path: Path) -> None:
    one, two = (SQLiteStore(tmp_path / "x.db", prefix=prefix) for prefix in ("one_", "two_"))
    assert isinstance(one.execute(Claim("k", "a", 10.0)), Acquired)
    assert isinstance(two.execute(Claim("k", "b", 10.0)), Acquired)
    assert isinstance(one.execute(Claim("k", "b", 10.0)), Busy)
    one.close()
    two.close()


def test_a_file_that_others_hold_is_an_error_after_the_busy_timeout(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    store = SQLiteStore(path, busy_timeout=0.0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE mine (a)")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="locked"):
        store.prepare()
    other.execute("ROLLBACK")
    assert isinstance(store.execute(Claim("k", "a", 10.0)), Acquired)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked") as caught:
        store.execute(Claim("new", "a", 10.0))
    assert not caught.value.maybe_written
    assert isinstance(store.execute(Claim("k", "b", 10.0)), Busy), "who reads waits for nobody"
    with pytest.raises(StoreError, match="locked") as caught:
        store.execute(Finish("k", "a", 0, b"", 10.0))
    assert not caught.value.maybe_written
    other.execute("ROLLBACK")
    other.close()
    store.close()


def test_opening_waits_for_others_that_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE mine (a)")
    other.execute("BEGIN EXCLUSIVE")
    slept: list[float] = []

    class Clock(SystemClock):
        def sleep(self, seconds: float) -> None:
            slept.append(seconds)
            other.execute("ROLLBACK")

    monkeypatch.setattr(_sqlite_file, "_clock", Clock())
    store = SQLiteStore(path)
    connect = store._file._connect

    def impatient() -> sqlite3.Connection:
        connection = connect()
        connection.execute("PRAGMA busy_timeout = 0")
        return connection

    monkeypatch.setattr(store._file, "_connect", impatient)
    store.prepare()
    assert slept == [0.005]
    other.close()
    store.close()


def test_an_upgrade_that_fails_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.db"
    store = SQLiteStore(path)
    store.execute(Claim("k", "a", 1000.0, "f", "label"))
    store.close()
    before = dump(path)
    migrations = (*MIGRATIONS, ("ALTER TABLE {p}records ADD COLUMN more TEXT", "SELECT nonsense"))
    monkeypatch.setattr(_sqlite_file, "MIGRATIONS", migrations)
    with pytest.raises(StoreError, match="no such column: nonsense"):
        store.execute(Read("k"))
    assert dump(path) == before
    monkeypatch.setattr(_sqlite_file, "MIGRATIONS", (*MIGRATIONS, migrations[-1][:1]))
    assert isinstance(store.execute(Claim("k", "b", 10.0)), Busy)
    store.close()
    assert any("more TEXT" in line for line in dump(path))


def test_a_value_that_no_column_takes_is_an_error_and_nothing_else_suffers() -> None:
    store = make("normal")
    for op in (
        Claim("\ud800", "a", 10.0),
        Claim("k", "a", float("nan")),
        Finish("k", "a", 2**70, b"", 1.0),
        Purge(1.0, 2**70),
        Scan("", 2**70),
    ):
        with pytest.raises(StoreError, match="SQLite store"):
            store.execute(op)
    with pytest.raises(KeyError):
        store.execute("no operation")  # type: ignore[arg-type]
    claimed = store.execute(Claim("k", "a", 10.0))
    with pytest.raises(StoreError, match="CHECK constraint"):
        store.execute(Finish("k", "a", claimed.fence, b"", float("nan")))
    assert store.execute(Finish("k", "a", claimed.fence, b"", float("inf"))) is True
    store.close()


def test_text_of_any_kind_is_kept_and_found() -> None:
    store = make("normal")
    keys = ["a\0b", "a", "é", "\U0001f600", "%", "_", "'; DROP TABLE resilient_records; --"]
    for key in keys:
        store.execute(Claim(key, "o\0wner", 100.0, "f\0", f"label {key}\0 end"))
    assert [record.key for record in store.execute(Scan()).records] == sorted(keys)
    assert [record.key for record in store.execute(Scan(text="label %\0")).records] == ["%"]
    assert {record.key for record in store.execute(Scan(text="_")).records} == {"_", keys[-1]}
    record = store.execute(Read("a\0b"))
    assert record is not None
    assert (record.owner, record.label) == ("o\0wner", "label a\0b\0 end")
    store.close()


def test_many_readers_at_once_are_not_all_kept() -> None:
    store = make("normal")
    store.prepare()
    readers = [store._file._open_reader() for _ in range(12)]
    store._file._free.extend(readers)
    for _ in range(8):
        assert store._file.peek(Read("k")) is None
    assert len(store._file._free) == 8
    store.close()


def test_a_claim_reads_the_clock_while_it_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    seen: list[bool] = []

    class Clock(SystemClock):
        def at(self) -> float:
            other = sqlite3.connect(path, timeout=0, isolation_level=None)
            try:
                other.execute("BEGIN IMMEDIATE")
                seen.append(False)
            except sqlite3.OperationalError:
                seen.append(True)
            other.close()
            return super().at()

    store = SQLiteStore(path, clock=Clock())

    def asked(op: Op[Any]) -> list[bool]:
        seen.clear()
        store.execute(op)
        return seen

    store.prepare()
    assert asked(Claim("k", "a", 100.0)) == [False, True], "looking takes no lock, taking does"
    assert asked(Claim("other", "a", 100.0)) == [True], "after a new key, the next is probably new"
    assert asked(Claim("k", "b", 1.0)) == [True]
    assert asked(Claim("k", "b", 1.0)) == [False], "and so the other way round"
    assert asked(Finish("k", "a", 0, b"", 1.0)) == [False], "the owner decides, not the clock"
    assert asked(Finish("k", "b", 0, b"", 1.0)) == [False, True]
    store.close()


def test_a_purge_and_a_claim_go_by_an_index() -> None:
    store = make("normal")
    store.prepare()
    writer, table = store._file.writer, store._file.sql
    assert writer is not None
    for statement, values in (
        (table._purge, (1.0, 10, 1.0, 1.0, 10, 10)),
        (table._select, ("k",)),
        (table._finish, (b"", 1.0, 1.0, "k", "a", 1, 1)),
        (table._scans[""], ("", 1.0, "", 1)),
        (table._scans["done"], ("", 1.0, "", 1)),
    ):
        plan = " ".join(row[3] for row in writer.execute(f"EXPLAIN QUERY PLAN {statement}", values))
        assert "USING" in plan
        assert "TEMP B-TREE" not in plan
    store.close()


# -- on connections of others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [None, sqlite3.Row, lambda cursor, row: {"row": row}])
@pytest.mark.parametrize("text", [str, bytes, lambda data: 1 / 0])
@pytest.mark.parametrize("level", [None, "DEFERRED", "EXCLUSIVE"])
def test_on_a_connection_of_the_user(tmp_path: Path, factory: Any, text: Any, level: Any) -> None:
    path = tmp_path / "x.db"
    store = SQLiteStore(path)
    store.prepare()
    sqlite3.register_converter("TEXT", lambda data: 1 / 0)
    user = sqlite3.connect(path, isolation_level=level, detect_types=sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES)
    user.row_factory, user.text_factory = factory, text
    user.execute("CREATE TABLE effects (a INTEGER)")
    user.execute("BEGIN IMMEDIATE")
    user.execute("INSERT INTO effects VALUES (1), (2)")
    cursor = user.execute("SELECT a FROM effects ORDER BY a")
    cursor.fetchone()
    first = store.on(user, Claim("k", "a", 10.0, "f", "label"))
    assert first == Acquired(first.fence, 1)
    assert type(store.on(user, Claim("k", "b", 10.0))) is Busy
    assert store.on(user, Claim("k", "a", 10.0)) == first
    record = store.on(user, Read("k"))
    assert record is not None
    assert (record.owner, record.label, record.state) == ("a", "label", "running")
    assert store.on(user, Finish("k", "a", first.fence, b"result", 10.0)) is True
    assert store.on(user, Finish("k", "a", first.fence, b"other", 10.0)) is True
    assert store.on(user, Claim("k", "b", 10.0)) == Completed(first.fence, 1, "f", b"result")
    assert [record.key for record in store.on(user, Scan()).records] == ["k"]
    assert store.on(user, Release("k", "a", 0)) is False
    assert store.on(user, Claim("other", "a", 10.0)) != first
    assert store.on(user, Release("other", "a", 0)) is True
    assert cursor.fetchone() is not None, "the user's cursor goes on"
    assert user.in_transaction
    assert store.execute(Read("k")) is None, "nothing is committed"
    user.commit()
    assert store.execute(Claim("k", "b", 10.0)) == Completed(first.fence, 1, "f", b"result")
    user.close()
    del sqlite3.converters["TEXT"]
    store.close()


def test_what_was_claimed_in_a_transaction_that_is_rolled_back_never_was(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "x.db")
    store.prepare()
    user = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    user.execute("BEGIN")
    assert isinstance(store.on(user, Claim("k", "a", 10.0)), Acquired)
    user.execute("ROLLBACK")
    assert isinstance(store.execute(Claim("k", "b", 10.0)), Acquired)
    user.close()
    store.close()


def test_a_connection_to_another_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "x.db")
    user = sqlite3.connect(tmp_path / "y.db")
    with pytest.raises(StoreError, match=r"has no table resilient_records: it must be to the file .*x\.db"):
        store.on(user, Claim("k", "a", 10.0))
    user.close()
    with pytest.raises(StoreError, match="closed database"):
        store.on(user, Claim("k", "a", 10.0))


def test_on_an_aiosqlite_connection(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "x.db")

    async def main() -> None:
        await store.aprepare()
        await store.aprepare()
        async with aiosqlite.connect(tmp_path / "x.db") as user:
            user.row_factory = aiosqlite.Row
            await user.execute("BEGIN IMMEDIATE")
            first = await store.aon(user, Claim("k", "a", 10.0))
            assert await store.aon(user, Finish("k", "a", first.fence, b"r", 10.0)) is True
            await user.commit()
        assert isinstance(await store.aexecute(Claim("k", "b", 10.0)), Completed)
        async with aiosqlite.connect(tmp_path / "y.db") as user:
            with pytest.raises(StoreError, match="has no table"):
                await store.aon(user, Claim("k", "a", 10.0))

    asyncio.run(main())
    store.close()
