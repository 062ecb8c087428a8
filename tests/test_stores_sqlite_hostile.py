"""Whatever stands in the table: a clear error or a right answer, never a crash, and nothing is executed."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Op,
    Page,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
)
from resilient.stores._ops import Append, Begin, History
from resilient.stores.sqlite import SQLiteStore
from resilient.testing import FakeClock

COLUMNS = ("owner", "fence", "attempt", "fingerprint", "label", "began", "mark", "expires", "result", "entries")
CLAIMED = (Acquired, Completed, Busy, Doubtful)
FINE: dict[str, Any] = {
    "owner": "a",
    "fence": 7,
    "attempt": 1,
    "fingerprint": "f",
    "label": "label",
    "began": 1e9,
    "mark": 2e9,
    "expires": None,
    "result": None,
    "entries": 0,
}

values: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.sampled_from(
        ["a", "k", "1", "nan", "x'00'", "'; DROP TABLE effects; --", b"a", b"\xff", 0, 1, 7, 1e9, 2e9, b"r"]
    ),
    st.just(b"x" * 100_000),
)
operations: st.SearchStrategy[Op[Any]] = st.sampled_from(
    [
        *(Claim("k", owner, 10.0, "f", "l", take_over) for owner in "ab" for take_over in (False, True)),
        Renew("k", "a", 7, 10.0),
        Finish("k", "a", 7, b"r", 10.0),
        *(Release("k", "a", fence) for fence in (0, 7)),
        *(Abandon("k", "a", fence) for fence in (0, 7)),
        Begin("k", "a", 10.0, b"entry", "l"),
        Begin("k", "b", 10.0, b"entry", "l", True),
        *(Append("k", "a", 7, at, b"entry", 10.0, label) for at in (0, 1) for label in ("", "l")),
        History("k"),
        *(Scan(state=state) for state in ("running", "in doubt", "done")),
        Read("k"),
        Scan(),
        Scan("", 100, "l"),
        Purge(0.0),
        Purge(-1e12, 1),
        Forget("k"),
    ]
)


class Table:
    """A store whose table takes anything."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.store = SQLiteStore(path, clock=FakeClock(epoch=1_700_000_000.0), durability="normal")
        self.connection.execute("CREATE TABLE effects (a)")
        self.connection.execute("CREATE TABLE resilient_schema (version)")
        self.connection.execute("INSERT INTO resilient_schema VALUES (2)")
        self.connection.execute("CREATE TABLE resilient_entries (key, number, data)")
        self.connection.execute("CREATE UNIQUE INDEX resilient_entries_key ON resilient_entries (key, number)")
        self.connection.execute(f"CREATE TABLE resilient_records (key, {', '.join(COLUMNS)})")
        self.connection.execute("CREATE UNIQUE INDEX resilient_records_key ON resilient_records (key)")

    def put(self, row: dict[str, Any], key: Any = "k") -> None:
        self.connection.execute("DELETE FROM resilient_records")
        marks = ", ".join("?" * (len(COLUMNS) + 1))
        self.connection.execute(
            f"INSERT INTO resilient_records VALUES ({marks})", (key, *(row[name] for name in COLUMNS))
        )

    def ask(self, op: Op[Any]) -> Any:
        try:
            return self.store.execute(op)
        except StoreError as error:
            return error


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    made = Table(tmp_path_factory.mktemp("hostile") / "x.db")
    yield made
    made.store.close()
    made.connection.close()


def right(op: Op[Any], answer: Any) -> bool:
    if isinstance(answer, StoreError):
        return not answer.maybe_written and len(str(answer)) < 500
    if isinstance(op, (Claim, Begin)):
        return (
            isinstance(answer, CLAIMED)
            and type(answer.fence) is int
            and type(answer.attempt) is int
            and (not isinstance(answer, Completed) or type(answer.result) is bytes)
        )
    if isinstance(op, Read):
        return answer is None or sound(answer)
    if isinstance(op, History):
        return answer is None or (sound(answer[0]) and all(type(entry) is bytes for entry in answer[1]))
    if isinstance(op, Scan):
        return isinstance(answer, Page) and all(map(sound, answer.records))
    return type(answer) is (int if isinstance(op, Purge) else bool)


def sound(record: Record) -> bool:
    return (
        {type(text) for text in (record.key, record.owner, record.label, record.fingerprint)} == {str}
        and type(record.fence) is type(record.attempt) is int
        and not math.isnan(record.mark + record.began_at)
        and (record.state == "done") == (type(record.result) is bytes) == (type(record.expires_at) is float)
    )


@given(row=st.fixed_dictionaries(dict.fromkeys(COLUMNS, values)), key=st.one_of(st.just("k"), values), op=operations)
def test_any_row_at_all(table: Table, row: dict[str, Any], key: Any, op: Op[Any]) -> None:
    table.put(row, key)
    assert right(op, table.ask(op))
    assert table.connection.execute("SELECT count(*) FROM effects").fetchone() == (0,)


@given(
    changes=st.dictionaries(st.sampled_from(COLUMNS), values, min_size=1, max_size=2),
    done=st.booleans(),
    ops=st.lists(operations, min_size=1, max_size=3),
)
def test_a_row_with_one_or_two_wrong_values(
    table: Table, changes: dict[str, Any], done: bool, ops: list[Op[Any]]
) -> None:
    table.put(FINE | ({"expires": 3e9, "result": b"r"} if done else {}) | changes)
    for op in ops:
        assert right(op, table.ask(op))
    user = table.connection
    for op in ops:
        try:
            answer = table.store.on(user, op)
        except StoreError:
            continue
        assert right(op, answer)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"owner": None}, "owner is NULL"),
        ({"owner": b"a"}, "owner is of type bytes"),
        ({"fence": "7"}, "fence is of type str"),
        ({"fence": 7.5}, "fence is of type float"),
        ({"attempt": None}, "attempt is NULL"),
        ({"fingerprint": 5}, "fingerprint is of type int"),
        ({"label": b"x" * 1_000_000}, "label is of type bytes"),
        ({"began": 5}, "began is of type int"),
        ({"mark": "now"}, "mark is of type str"),
        ({"result": "text", "expires": 3e9}, "its result is of type str, and expires is of type float"),
        ({"result": b"r"}, "its result is of type bytes, and expires is NULL"),
        ({"expires": 3e9}, "its result is NULL, and expires is of type float"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_of_the_value(table: Table, changes: dict[str, Any], text: str) -> None:
    table.put(FINE | changes)
    for op in (Claim("k", "b", 10.0), Read("k"), Scan()):
        with pytest.raises(StoreError, match=f"the record of key 'k' is damaged: {text}$"):
            table.store.execute(op)
    assert table.store.execute(Forget("k")) is (changes.get("result") is not None), "a person can remove what ended"


def test_a_number_of_entries_that_is_none(table: Table) -> None:
    table.put(FINE | {"entries": "many"})
    with pytest.raises(StoreError, match="the record of key 'k' is damaged: entries is of type str"):
        table.store.execute(Append("k", "a", 7, 1, b"entry", 10.0))


def test_a_key_that_is_no_text(table: Table) -> None:
    table.put(FINE, b"k")
    with pytest.raises(StoreError, match="the table resilient_records is damaged: a key is of type bytes"):
        table.store.execute(Scan())


def test_text_that_is_none(table: Table) -> None:
    table.put(FINE)
    table.connection.execute("UPDATE resilient_records SET label = CAST(x'ff' AS TEXT)")
    with pytest.raises(StoreError, match="Could not decode to UTF-8"):
        table.store.execute(Read("k"))
    with pytest.raises(StoreError, match="codec can't decode"):
        table.store.on(table.connection, Read("k"))
    assert table.store.execute(Release("k", "a", 7)) is True


def test_a_number_that_cannot_grow(table: Table) -> None:
    table.put(FINE | {"fence": 2**63 - 1, "mark": 1.0})
    with pytest.raises(StoreError, match="too large"):
        table.store.execute(Claim("k", "b", 10.0, take_over=True))


def test_a_table_that_swallows_what_is_written(table: Table, tmp_path: Path) -> None:
    other = Table(tmp_path / "x.db")
    other.connection.execute("CREATE TRIGGER t BEFORE INSERT ON resilient_records BEGIN SELECT RAISE(IGNORE); END")
    with pytest.raises(StoreError, match="key 'k' is neither there nor can be added"):
        other.store.execute(Claim("k", "a", 10.0))
    other.store.close()
    other.connection.close()


def test_a_schema_with_functions_in_it_cannot_call_them(tmp_path: Path) -> None:
    other = Table(tmp_path / "x.db")
    other.connection.execute(
        "CREATE TRIGGER t BEFORE INSERT ON resilient_records BEGIN SELECT load_extension('evil'); END"
    )
    with pytest.raises(StoreError, match=r"unsafe use of load_extension|no such function"):
        other.store.execute(Claim("k", "a", 10.0))
    other.store.close()
    other.connection.close()


def test_tasks_see_the_same_errors(table: Table) -> None:
    table.put(FINE | {"label": 5})

    async def main() -> None:
        for op in (Claim("k", "b", 10.0), Read("k"), Claim("k", "b", 10.0, take_over=True)):
            with pytest.raises(StoreError, match="label is of type int"):
                await table.store.aexecute(op)

    asyncio.run(main())


def test_a_file_that_is_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    store = SQLiteStore(path)
    for number in range(200):
        store.execute(Claim(str(number), "a", 10.0, "f" * 100))
    store.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    for op in (Claim("1", "b", 10.0), Read("1"), Scan(), Finish("1", "a", 0, b"", 1.0)):
        with pytest.raises(StoreError, match="malformed"):
            store.execute(op)
    store.close()
