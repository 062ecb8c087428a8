"""Journals in the SQLite store: the upgrade of older files, two writes or none, and no look at what has ended."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient.errors import StoreError
from resilient.stores import (
    Abandon,
    Acquired,
    Busy,
    Claim,
    Completed,
    Doubtful,
    Finish,
    Forget,
    Purge,
    Read,
    Release,
    Renew,
    Scan,
    _sqlite_file,
)
from resilient.stores._ops import Append, Begin, History
from resilient.stores._sqlite_sql import MIGRATIONS
from resilient.stores.sqlite import SQLiteStore
from resilient.testing import FakeClock

LONG = 1000.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(epoch=1_700_000_000.0)


@pytest.fixture
def store(tmp_path: Path, clock: FakeClock) -> Iterator[SQLiteStore]:
    made = SQLiteStore(tmp_path / "x.db", durability="normal", clock=clock)
    made.prepare()
    yield made
    made.close()


def begun(store: SQLiteStore, key: str = "k", owner: str = "a", entries: int = 3) -> int:
    answer = store.execute(Begin(key, owner, LONG, b"0", "label"))
    assert isinstance(answer, Acquired)
    for at in range(1, entries):
        assert store.execute(Append(key, owner, answer.fence, at, b"%d" % at, LONG)) is True
    return answer.fence


def entries(store: SQLiteStore, key: str = "k") -> tuple[bytes, ...] | None:
    answer = store.execute(History(key))
    return None if answer is None else answer[1]


def stored(store: SQLiteStore, what: str = "count(*)") -> Any:
    """What the table of entries holds, whatever the records say."""
    connection = sqlite3.connect(store.path)
    try:
        return connection.execute(f"SELECT {what} FROM resilient_entries").fetchone()[0]
    finally:
        connection.close()


class Gate:
    """Notes the statements that the store writes by, and lets some fail."""

    def __init__(self, store: SQLiteStore) -> None:
        self.write: Any = store._file.ready()
        self.seen: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.inside: threading.Event | None = None
        self.go = threading.Event()
        store._file.write = self

    def __call__(self, sql: str, parameters: Any = ()) -> Any:
        word = sql.split()[0]
        self.seen.append(word)
        if word == "COMMIT" and self.inside is not None:
            inside, self.inside = self.inside, None
            inside.set()
            self.go.wait()
        if word in self.fail:
            raise self.fail.pop(word)
        return self.write(sql, parameters)


# -- no journal outlives its record, and none is shorter than what was answered ---------------------------------------


def test_an_entry_and_its_lease_are_one_commit(store: SQLiteStore) -> None:
    fence = begun(store)
    gate = Gate(store)
    assert store.execute(Append("k", "a", fence, 3, b"3", LONG, "other")) is True
    assert gate.seen == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]
    gate.seen.clear()
    begun(store, "new", entries=1)
    assert gate.seen == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    record, journal = store.execute(History("k")) or (None, ())
    assert record is not None
    assert (record.label, journal) == ("other", (b"0", b"1", b"2", b"3"))


@pytest.mark.parametrize("how", ["release", "forget", "purge", "purge a result", "begin anew", "claim anew"])
def test_entries_go_with_their_record(store: SQLiteStore, clock: FakeClock, how: str) -> None:
    begun(store, "other")
    fence = begun(store)
    assert stored(store) == 6
    if how == "release":
        assert store.execute(Release("k", "a", fence)) is True
    else:
        if how in ("purge", "forget"):
            assert store.execute(Abandon("k", "a", fence)) is True
        else:
            assert store.execute(Finish("k", "a", fence, b"r", 10.0)) is True
        clock.advance(11.0)
        if how == "forget":
            assert store.execute(Forget("k")) is True
        elif how.startswith("purge"):
            assert store.execute(Purge(5.0)) == 1
        elif how == "claim anew":
            assert isinstance(store.execute(Claim("k", "b", LONG)), Acquired)
            assert entries(store) == ()
        else:
            assert isinstance(store.execute(Begin("k", "b", LONG, b"anew")), Acquired)
            assert entries(store) == (b"anew",)
    assert stored(store) == 3 + (how == "begin anew")
    assert entries(store, "other") == (b"0", b"1", b"2")


@pytest.mark.parametrize("taken", [False, True])
def test_a_record_that_was_only_claimed_gets_its_journal_later(
    store: SQLiteStore, clock: FakeClock, taken: bool
) -> None:
    first = store.execute(Claim("k", "a", 10.0))
    assert entries(store) == ()
    if taken:
        clock.advance(10.0)
    answer = store.execute(Begin("k", "b" if taken else "a", LONG, b"0", "", True))
    assert isinstance(answer, Acquired)
    assert (answer == first) is not taken
    assert store.execute(Append("k", "b" if taken else "a", answer.fence, 1, b"1", LONG)) is True
    assert entries(store) == (b"0", b"1")
    assert store.execute(Release("k", "b" if taken else "a", answer.fence)) is True
    assert stored(store) == 0


def test_a_result_whose_time_is_over_hides_its_journal(store: SQLiteStore, clock: FakeClock) -> None:
    fence = begun(store)
    store.execute(Finish("k", "a", fence, b"r", 10.0))
    assert entries(store) == (b"0", b"1", b"2")
    clock.advance(10.0)
    assert entries(store) is None


def test_a_vacuum_mixes_no_journals(store: SQLiteStore) -> None:
    for number in range(20):
        begun(store, f"k{number}", entries=number + 1)
    for number in range(0, 20, 2):
        store.execute(Release(f"k{number}", "a", 0))
    connection = sqlite3.connect(store.path, isolation_level=None)
    connection.execute("VACUUM")
    connection.close()
    for number in range(1, 20, 2):
        assert entries(store, f"k{number}") == tuple(b"%d" % at for at in range(number + 1))


# -- failures in the middle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [Begin("new", "a", LONG, "text"), Append("k", "a", 0, 3, b"3", float("nan"), "x")])  # type: ignore[arg-type]
def test_if_the_second_write_cannot_be_the_first_is_not(store: SQLiteStore, op: Any) -> None:
    fence = begun(store)
    gate = Gate(store)
    if isinstance(op, Begin):
        gate.fail["INSERT"] = sqlite3.IntegrityError("datatype mismatch")
        with pytest.raises(StoreError, match="mismatch"):
            store.execute(op)
        first = gate.write

        def second(sql: str, parameters: Any = ()) -> Any:
            if "entries" in sql:
                raise sqlite3.IntegrityError("datatype mismatch")
            return first(sql, parameters)

        store._file.write = second
        with pytest.raises(StoreError, match="mismatch") as caught:
            store.execute(op)
        store._file.write = gate
        assert store.execute(Read("new")) is None
    else:
        with pytest.raises(StoreError, match="NOT NULL") as caught:
            store.execute(op)
    assert not caught.value.maybe_written
    assert entries(store) == (b"0", b"1", b"2")
    assert store.execute(Append("k", "a", fence, 3, b"3", LONG)) is True


def test_a_job_that_fails_between_its_two_writes_fails_alone(store: SQLiteStore) -> None:
    fence = begun(store)
    gate = Gate(store)
    gate.inside = inside = threading.Event()
    answers: dict[int, Any] = {}

    def call(number: int, op: Any) -> None:
        try:
            answers[number] = store.execute(op)
        except StoreError as error:
            answers[number] = error

    threads: list[threading.Thread] = []
    for number, op in enumerate(
        [
            Claim("first", "a", LONG),
            Append("k", "a", fence, 3, b"3", float("nan")),
            Append("k", "a", fence, 3, b"other", LONG),
            Append("k", "a", fence, 9, b"9", LONG),
            Begin("new", "a", LONG, b"0"),
        ]
    ):
        threads.append(threading.Thread(target=call, args=(number, op), daemon=True))
        threads[-1].start()
        if number == 0:
            inside.wait(60)
        while len(store._group._queue) < number:
            pass
    gate.go.set()
    for thread in threads:
        thread.join(60)
    assert isinstance(answers[0], Acquired)
    assert [type(answers[number]) for number in (1, 3)] == [StoreError, StoreError]
    assert "NOT NULL" in str(answers[1])
    assert "has 4 entries: number 9 would leave a gap" in str(answers[3])
    assert answers[2] is True
    assert isinstance(answers[4], Acquired)
    assert entries(store) == (b"0", b"1", b"2", b"other")


@pytest.mark.parametrize("label", ["", "another"])
def test_an_entry_that_is_written_again_still_renews_and_labels(
    store: SQLiteStore, clock: FakeClock, label: str
) -> None:
    fence = begun(store)
    clock.advance(5.0)
    assert store.execute(Append("k", "a", fence, 2, b"again", 30.0, label))
    assert entries(store) == (b"0", b"1", b"2")
    record = store.execute(Read("k"))
    assert record is not None
    assert (record.label, record.mark) == (label or "label", clock.at() + 30.0)


def test_a_gap_is_an_error_and_renews_nothing(store: SQLiteStore, clock: FakeClock) -> None:
    fence = begun(store)
    before = store.execute(History("k"))
    clock.advance(1.0)
    for at in (4, 2**62):
        with pytest.raises(StoreError, match=f"the journal of key 'k' has 3 entries: number {at} would leave a gap"):
            store.execute(Append("k", "a", fence, at, b"x", LONG, "x"))
    assert store.execute(History("k")) == before


# -- on connections of others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [None, "DEFERRED", "IMMEDIATE", ""])
@pytest.mark.parametrize("inside", [False, True])
def test_on_a_connection_of_the_user_both_are_written_or_neither(store: SQLiteStore, level: Any, inside: bool) -> None:
    user = sqlite3.connect(store.path, isolation_level=level)
    user.text_factory = lambda data: 1 / 0
    if inside:
        user.execute("BEGIN IMMEDIATE")
    first = store.on(user, Begin("k", "a", LONG, b"0", "label"))
    assert isinstance(first, Acquired)
    assert store.on(user, Append("k", "a", first.fence, 1, b"1", LONG, "other")) is True
    with pytest.raises(StoreError, match="NOT NULL"):
        store.on(user, Append("k", "a", first.fence, 2, b"2", float("nan")))
    with pytest.raises(StoreError, match="NOT NULL"):
        store.on(user, Begin("other", "a", LONG, None))  # type: ignore[arg-type]
    record, journal = store.on(user, History("k")) or (None, ())
    assert record is not None
    assert (record.owner, record.label, journal) == ("a", "other", (b"0", b"1"))
    assert store.on(user, Read("other")) is None
    alone = level is None and not inside
    assert user.in_transaction is not alone
    assert (store.execute(Read("k")) is not None) is alone, "it commits with the user's transaction"
    user.commit()
    assert entries(store) == (b"0", b"1")
    user.close()


def test_on_a_connection_that_commits_by_itself_nothing_is_left_open(store: SQLiteStore) -> None:
    class Modern(sqlite3.Connection):
        autocommit = True  # as connections have it from Python 3.12 on

    user = sqlite3.connect(store.path, factory=Modern)
    assert isinstance(store.on(user, Begin("k", "a", LONG, b"0")), Acquired)
    assert not user.in_transaction
    assert entries(store) == (b"0",)
    user.close()


def test_a_transaction_of_the_user_that_is_gone_is_no_second_error(store: SQLiteStore) -> None:
    user = sqlite3.connect(store.path, isolation_level=None)
    user.execute("CREATE TRIGGER t BEFORE INSERT ON resilient_entries BEGIN SELECT RAISE(ROLLBACK, 'gone'); END")
    with pytest.raises(StoreError, match="gone"):
        store.on(user, Begin("k", "a", LONG, b"0"))
    assert not user.in_transaction
    assert store.execute(Read("k")) is None
    user.close()


# -- what is found, and how --------------------------------------------------------------------------------------------


def scanned(store: SQLiteStore, state: str, limit: int = 3) -> list[str]:
    found: list[str] = []
    after = ""
    while True:
        page = store.execute(Scan(after, limit, "", state))
        assert all(record.state == state for record in page.records)
        found += [record.key for record in page.records]
        after = page.after
        if not after:
            return found


def test_each_state_is_found_page_by_page(store: SQLiteStore, clock: FakeClock) -> None:
    for number in range(30):
        key = f"key {29 - number}"  # with spaces, and against the order of time
        fence = begun(store, key, entries=1)
        if number % 3 == 0:
            store.execute(Abandon(key, "a", fence))
        elif number % 3 == 1:
            store.execute(Finish(key, "a", fence, b"r", LONG))
        if number % 6 == 5:
            clock.advance(0.5)  # several of each began at one instant
    for remainder, state in enumerate(("in doubt", "done", "running")):
        wanted = {f"key {29 - number}" for number in range(remainder, 30, 3)}
        for limit in (1, 2, 7, 100):
            found = scanned(store, state, limit)
            assert len(found) == 10
            assert set(found) == wanted
    assert store.execute(Scan(state="no such state")).records == ()
    with pytest.raises(ValueError, match="could not convert"):
        store.execute(Scan("of another scan", state="in doubt"))


def test_those_in_doubt_are_found_without_a_look_at_those_that_have_ended(store: SQLiteStore) -> None:
    writer, table = store._file.writer, store._file.sql
    assert writer is not None

    def plan(statement: str, values: tuple[Any, ...]) -> str:
        return " ".join(row[3] for row in writer.execute(f"EXPLAIN QUERY PLAN {statement}", values))

    for state in ("running", "in doubt"):
        way = plan(table._scans[state], ("", 1.0, 0.0, "", 10))
        assert "resilient_records_open (began>?)" in way
        assert "SCAN" not in way
    way = plan(table._purge, (1.0, 10, 1.0, 1.0, 10, 10))
    assert "resilient_records_ended (mark<?)" in way
    assert "resilient_records_open (began<?)" in way
    assert "SCAN resilient_records" not in way
    assert "TEMP B-TREE" not in way
    for statement, values in (
        (table._next, (1.0, "k", "a", 1, 1, 1)),
        (table._next_label, (1.0, "label", "k", "a", 1, 1, 1)),
        (table._history, ("k", "k")),
        (table._renew, (1.0, "k", "a", 1, 1)),
    ):
        assert "SEARCH" in plan(statement, values)
        assert "SCAN resilient" not in plan(statement, values)


def test_an_entry_and_a_heartbeat_change_no_index(store: SQLiteStore, clock: FakeClock) -> None:
    fence = begun(store)
    log = Path(f"{store.path}-wal")
    for pages, op in (
        (1, Renew("k", "a", fence, LONG)),
        (2, Append("k", "a", fence, 3, b"3", LONG)),
        (2, Append("k", "a", fence, 4, b"4", LONG, "other")),
    ):
        connection = sqlite3.connect(store.path)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        assert log.stat().st_size == 0
        clock.advance(1.0)
        assert store.execute(op) is True
        assert log.stat().st_size == 32 + pages * (24 + 4096)


def test_a_journal_that_is_damaged_says_so(store: SQLiteStore) -> None:
    begun(store)
    connection = sqlite3.connect(store.path, isolation_level=None)
    for damage in ("number = 7 WHERE number = 1", "data = 'text'", "number = -1 WHERE number = 0"):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"UPDATE resilient_entries SET {damage}")
        with pytest.raises(StoreError, match="of key 'k' is damaged"):
            store.on(connection, History("k"))
        connection.execute("ROLLBACK")
    connection.close()
    assert entries(store) == (b"0", b"1", b"2")


# -- files of the first version ----------------------------------------------------------------------------------------


def test_a_file_of_version_1_is_upgraded_with_all_that_is_in_it(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE resilient_schema (version INTEGER NOT NULL)")
    connection.execute("INSERT INTO resilient_schema VALUES (1)")
    for statement in MIGRATIONS[0]:
        connection.execute(statement.format(p="resilient_"))
    now = clock.at()
    connection.executemany(
        "INSERT INTO resilient_records VALUES (?, 'a', 7, 1, 'f', 'label', ?, ?, ?, ?)",
        [
            ("running", now - 5, now + 5, None, None),
            ("in doubt", now - 50, now - 40, None, None),
            ("done", now - 50, now - 45, now + 50, b"r"),
            ("over", now - 500, now - 450, now - 50, b"r"),
        ],
    )
    connection.close()
    store = SQLiteStore(path, clock=clock)
    assert isinstance(store.execute(Claim("running", "b", 1.0)), Busy)
    assert isinstance(store.execute(Claim("in doubt", "b", 1.0)), Doubtful)
    assert store.execute(Claim("done", "b", 1.0)) == Completed(7, 1, "f", b"r")
    assert [scanned(store, state) for state in ("running", "in doubt", "done")] == [["running"], ["in doubt"], ["done"]]
    assert store.execute(History("running")) == (store.execute(Read("running")), ())
    assert store.execute(Append("running", "a", 7, 0, b"0", 5.0)) is True
    assert store.execute(Renew("running", "a", 7, 5.0)) is True
    assert store.execute(Purge(42.0)) == 2
    assert isinstance(store.execute(Claim("in doubt", "b", 1.0)), Doubtful)
    assert store.execute(Purge(0.0)) == 1
    assert entries(store, "running") == (b"0",)
    store.close()
    monkeypatch.setattr(_sqlite_file, "MIGRATIONS", MIGRATIONS[:1])
    with pytest.raises(StoreError, match="of version 2, made by a newer resilient"):
        store.execute(Read("running"))


# -- processes ---------------------------------------------------------------------------------------------------------


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests._sqlite_journal_child", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_append_by_one_fence_make_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    store = SQLiteStore(path, durability="normal")
    fence = begun(store, entries=1)
    children = [child("append", str(path), str(fence), name) for name in ("p", "q")]
    added = [process.communicate(timeout=60)[0].split() for process in children]
    journal = entries(store)
    assert journal is not None
    assert len(journal) == 201
    owners = [entry.decode().split()[0] for entry in journal[1:]]
    assert set(owners) <= {"p", "q"}
    assert added == [["200"], ["200"]], "each is told that its number is there, whoever was first"
    store.close()


@pytest.mark.parametrize("number", range(3))
def test_a_process_killed_in_the_middle_of_a_saga_loses_no_entry_that_was_answered(tmp_path: Path, number: int) -> None:
    path = tmp_path / "x.db"
    process = child("busy", str(path))
    assert process.stdout is not None
    said = [process.stdout.readline().split() for _ in range(30 + number * 11)]
    process.kill()
    said += [line.split() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    process.wait()
    process.stdout.close()
    answered: dict[str, int] = {}
    for key, at in said:
        answered[key] = max(int(at), answered.get(key, 0))
    store = SQLiteStore(path)
    for key, last in answered.items():
        record, journal = store.execute(History(key)) or (None, ())
        assert record is not None
        assert len(journal) in (last + 1, last + 2), "at most the one that was under way is there as well"
        assert journal == tuple(b"%d" % at for at in range(len(journal)))
        assert record.label == f"label {len(journal) - 1}", "the entry and the label came in one commit"
    store.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    lost = "SELECT count(*) FROM resilient_entries WHERE key NOT IN (SELECT key FROM resilient_records)"
    assert connection.execute(lost).fetchone() == (0,)
    connection.close()
