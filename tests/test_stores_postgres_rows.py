"""Whatever stands in the table, the PostgreSQL store answers, or says what is wrong; it never does anything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilient.stores import (
    Abandon,
    Acquired,
    Busy,
    Claim,
    Completed,
    Doubtful,
    Finish,
    Forget,
    Page,
    PostgresStore,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
    StoreError,
)
from tests._servers import postgres_database

COLUMNS = ("owner", "fence", "attempt", "fingerprint", "label", "began", "mark", "expires", "awaited", "result")


@pytest.fixture(scope="module")
def table(postgres_url: str) -> Iterator[tuple[PostgresStore, psycopg.Connection[Any]]]:
    """A store whose table takes anything, and a connection that puts it there."""
    with postgres_database(postgres_url) as url, psycopg.connect(url, autocommit=True) as user:
        store = PostgresStore(url)
        store.prepare()
        for column in COLUMNS:
            user.execute(f"ALTER TABLE resilient_records ALTER {column} DROP NOT NULL".encode())
        yield store, user
        store.close()


def put(user: psycopg.Connection[Any], **row: Any) -> None:
    usual = {
        "owner": "a",
        "fence": 7,
        "attempt": 1,
        "fingerprint": "print",
        "label": "label",
        "began": 1e9,
        "mark": 4e9,
        "expires": None,
        "awaited": False,
        "result": None,
    }
    values = usual | row
    user.execute("DELETE FROM resilient_records")
    names, marks = ", ".join(values), ", ".join(["%s"] * len(values))
    user.execute(f"INSERT INTO resilient_records (key, {names}) VALUES ('k', {marks})".encode(), [*values.values()])


@pytest.mark.parametrize(
    ("row", "op", "says"),
    [
        ({"fence": None}, Claim("k", "b", 9.0), "fence None"),
        ({"fence": -3}, Read("k"), "fence -3"),
        ({"attempt": 0}, Claim("k", "b", 9.0), "attempt 0"),
        ({"fingerprint": None}, Claim("k", "b", 9.0), "fingerprint None"),
        ({"owner": None}, Claim("k", "b", 9.0), "owner None"),
        ({"owner": None}, Read("k"), "owner None"),
        ({"label": None}, Read("k"), "label None"),
        ({"mark": None}, Claim("k", "b", 9.0), "mark None"),
        ({"mark": float("nan")}, Claim("k", "b", 9.0), "mark nan"),
        ({"began": None}, Read("k"), "began None"),
        ({"expires": 4e9}, Claim("k", "b", 9.0), "no result, though it is finished"),
        ({"expires": 4e9}, Read("k"), "no result, though it is finished"),
        ({"expires": float("nan"), "result": b"x"}, Claim("k", "b", 9.0), "expires nan"),
        ({"fence": 2**63 - 1, "mark": 1.0}, Claim("k", "b", 9.0, take_over=True), "bigint out of range"),
        ({"attempt": 2**31 - 1, "mark": 1.0}, Claim("k", "b", 9.0, take_over=True), "integer out of range"),
    ],
)
def test_a_damaged_record_is_an_error_that_says_what_is_wrong(
    row: dict[str, Any], op: Any, says: str, table: tuple[PostgresStore, psycopg.Connection[Any]]
) -> None:
    store, user = table
    put(user, **row)
    with pytest.raises(StoreError, match=says) as caught:
        store.execute(op)
    assert not caught.value.maybe_written


def test_a_record_that_says_nothing_of_waiters_has_none(table: tuple[PostgresStore, psycopg.Connection[Any]]) -> None:
    store, user = table
    put(user, awaited=None)
    assert type(store.execute(Claim("k", "b", 9.0, awaited=True))) is Busy
    assert user.execute("SELECT awaited FROM resilient_records").fetchone() == (True,)


def test_text_that_is_not_what_it_should_be_is_an_error(postgres_url: str) -> None:
    name = "resilient_ascii"
    url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0".encode())
        try:
            store = PostgresStore(url)
            assert store.execute(Claim("k", "ä", 60.0, "ö")) == store.execute(Claim("k", "ä", 60.0))
            with psycopg.connect(url, client_encoding="SQL_ASCII") as user:
                with pytest.raises(StoreError, match="a owner that is not ascii"):
                    store.on(user, Read("k"))
                user.execute("UPDATE resilient_records SET fingerprint = E'\\xff'")
            with pytest.raises(StoreError, match="invalid byte sequence"):
                store.execute(Read("k"))
            store.close()
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_columns_of_other_types_are_read_as_what_they_say_or_are_an_error(postgres_url: str) -> None:
    with postgres_database(postgres_url) as url, psycopg.connect(url, autocommit=True) as user:
        store = PostgresStore(url)
        store.prepare()
        user.execute("ALTER TABLE resilient_records ALTER fence TYPE text, ALTER attempt TYPE text")
        put(user, fence="12", attempt="2")
        record = store.execute(Read("k"))
        assert record is not None
        assert (record.fence, record.attempt) == (12, 2)
        put(user, fence="twelve")
        with pytest.raises(StoreError, match="invalid input syntax") as caught:
            store.execute(Read("k"))
        assert not caught.value.maybe_written
        store.close()


numbers = st.none() | st.floats(allow_nan=True) | st.sampled_from([0.0, 1e9, 4e9])
texts = st.none() | st.sampled_from(["", "a", "b"]) | st.text(st.characters(codec="utf-8", exclude_characters="\0"))
rows = st.fixed_dictionaries(
    {},
    optional={
        "owner": texts,
        "fence": st.none() | st.integers(-(2**63), 2**63 - 1),
        "attempt": st.none() | st.integers(-(2**31), 2**31 - 1),
        "fingerprint": texts,
        "label": texts,
        "began": numbers,
        "mark": numbers,
        "expires": numbers,
        "awaited": st.none() | st.booleans(),
        "result": st.none() | st.binary() | st.just(bytes(300_000)),
    },
)
owners = st.sampled_from(["a", "b"])
fences = st.sampled_from([0, 7])
operations = st.one_of(
    st.builds(
        Claim, st.just("k"), owners, st.just(9.0), take_over=st.booleans(), awaited=st.booleans(), label=st.just("l")
    ),
    st.builds(Renew, st.just("k"), owners, fences, st.just(9.0)),
    st.builds(Finish, st.just("k"), owners, fences, st.binary(max_size=9), st.just(9.0)),
    st.builds(Release, st.just("k"), owners, fences),
    st.builds(Abandon, st.just("k"), owners, fences),
    st.builds(Read, st.just("k")),
    st.builds(Scan, text=st.sampled_from(["", "l"])),
    st.builds(Purge, st.floats(-1e9, 1e9)),
    st.builds(Forget, st.just("k")),
)
ANSWERS: dict[type[Any], tuple[type[Any], ...]] = {
    Claim: (Acquired, Completed, Busy, Doubtful),
    Read: (Record, type(None)),
    Scan: (Page,),
    Purge: (int,),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=rows, ops=st.lists(operations, min_size=1, max_size=4))
def test_no_row_makes_anything_but_an_answer_or_a_store_error(
    row: dict[str, Any], ops: list[Any], table: tuple[PostgresStore, psycopg.Connection[Any]]
) -> None:
    store, user = table
    put(user, **row)
    for op in ops:
        answer = outcome(store, op)
        if isinstance(answer, StoreError):
            assert not answer.maybe_written
        else:
            assert type(answer) in ANSWERS.get(type(op), (bool,))


def outcome(store: PostgresStore, op: Any) -> Any:
    try:
        return store.execute(op)
    except StoreError as error:
        return error
