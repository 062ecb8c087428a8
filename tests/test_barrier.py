"""Barriers on real databases: each step once, its compensation only if the step was done, nothing too late."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite
import psycopg
import pytest
from psycopg.rows import dict_row

from resilient import SagaError
from resilient._barrier import abarrier, abarrier_schema, barrier, barrier_schema

Connect = Callable[[], Any]


@pytest.fixture(params=["sqlite3", "psycopg"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    """Connections to one fresh database that has the table, as often as wanted."""
    made: list[Any] = []
    if request.param == "sqlite3":
        path = tmp_path / "barrier.db"

        def new() -> Any:
            made.append(sqlite3.connect(path, timeout=60, check_same_thread=False))
            return made[-1]
    else:
        url = request.getfixturevalue("postgres_database")

        def new() -> Any:
            made.append(psycopg.connect(url))
            return made[-1]

    connection = new()
    barrier_schema(connection)
    connection.rollback()
    connection.execute("CREATE TABLE effects (what TEXT)")
    connection.commit()
    yield new
    for one in made:
        one.close()


def effect(connection: Any, what: str) -> None:
    connection.execute(f"INSERT INTO effects VALUES ('{what}')")


def effects(connection: Any) -> list[str]:
    found = [row[0] for row in connection.execute("SELECT what FROM effects ORDER BY what").fetchall()]
    connection.rollback()
    return found


def test_an_action_and_its_compensation_are_each_done_once(connect: Connect) -> None:
    connection = connect()
    answers = []
    ops: list[Any] = ["action", "action", "compensation", "compensation"]
    for op in ops:
        answers.append(barrier(connection, "order/o-1", 1, op))
        connection.commit()
    assert answers == [True, False, True, False]


def test_what_was_rolled_back_was_not_done(connect: Connect) -> None:
    connection = connect()
    assert barrier(connection, "order/o-1", 1, "action")
    effect(connection, "charge")
    connection.rollback()
    assert effects(connection) == []
    assert barrier(connection, "order/o-1", 1, "action")
    connection.rollback()
    assert not barrier(connection, "order/o-1", 1, "compensation")


def test_barrier_and_effect_are_committed_together(connect: Connect) -> None:
    connection, other = connect(), connect()
    assert barrier(connection, "order/o-1", 1, "action")
    effect(connection, "charge")
    assert effects(other) == []
    connection.commit()
    assert effects(other) == ["charge"]
    assert not barrier(other, "order/o-1", 1, "action")
    other.rollback()


def test_a_compensation_whose_action_never_ran_is_not_done(connect: Connect) -> None:
    """dtm's null compensation."""
    connection = connect()
    for _ in range(2):
        assert not barrier(connection, "order/o-1", 1, "compensation")
        connection.commit()


def test_an_action_after_its_compensation_is_refused(connect: Connect) -> None:
    """dtm's hanging action; Seata users ask for just this (apache/incubator-seata#7840)."""
    connection = connect()
    assert not barrier(connection, "order/o-1", 1, "compensation")
    connection.commit()
    for _ in range(2):
        with pytest.raises(SagaError, match="action order/o-1/1 comes after its compensation") as caught:
            barrier(connection, "order/o-1", 1, "action")
        assert (caught.value.saga, caught.value.id) == ("order", "o-1")
        connection.commit()
    for key in ("mine", "mine/1"):  # No saga's step.
        assert not barrier(connection, key=key, op="compensation")
        with pytest.raises(SagaError) as caught:
            barrier(connection, key=key, op="action")
        assert str(caught.value) == f"action {key} comes after its compensation: it must not be done any more"
    connection.commit()


def test_an_action_that_is_repeated_after_it_was_undone_is_refused_too(connect: Connect) -> None:
    connection = connect()
    assert barrier(connection, "order/o-1", 1, "action")
    assert barrier(connection, "order/o-1", 1, "compensation")
    connection.commit()
    with pytest.raises(SagaError, match="comes after its compensation"):
        barrier(connection, "order/o-1", 1, "action")
    connection.rollback()


def test_steps_and_sagas_do_not_meet(connect: Connect) -> None:
    connection = connect()
    for saga, step in (("order/o-1", 1), ("order/o-1", 2), ("order/o-2", 1), ("order/o-1", "charge"), ("stock", 1)):
        assert barrier(connection, saga, step, "action")
    connection.commit()


def test_the_key_of_a_step_is_the_same_thing(connect: Connect) -> None:
    connection = connect()
    assert barrier(connection, key="order/o-1/3", op="action")
    assert not barrier(connection, "order/o-1", 3, "action")
    connection.rollback()


@pytest.mark.parametrize("ends", ["commit", "rollback"])
@pytest.mark.parametrize("op", ["action", "compensation"])
def test_duplicates_wait_for_the_end_of_the_first(connect: Connect, op: Any, ends: str) -> None:
    first, second = connect(), connect()
    if op == "compensation":
        assert barrier(first, "order/o-1", 1, "action")
        first.commit()
    assert barrier(first, "order/o-1", 1, op)
    answers: list[Any] = []

    def duplicate() -> None:
        answers.append(barrier(second, "order/o-1", 1, op))
        second.commit()

    thread = threading.Thread(target=duplicate, daemon=True)
    thread.start()
    # It cannot answer before the first has ended, whenever that is.
    assert answers == []
    getattr(first, ends)()
    thread.join(60)
    assert answers == [ends == "rollback"]


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_a_compensation_waits_for_an_action_that_is_under_way(connect: Connect, ends: str) -> None:
    first, second = connect(), connect()
    assert barrier(first, "order/o-1", 1, "action")
    answers: list[Any] = []

    def compensate() -> None:
        answers.append(barrier(second, "order/o-1", 1, "compensation"))
        second.commit()

    thread = threading.Thread(target=compensate, daemon=True)
    thread.start()
    getattr(first, ends)()
    thread.join(60)
    assert answers == [ends == "commit"]


def test_many_at_once_do_it_once(connect: Connect) -> None:
    connections = [connect() for _ in range(6)]
    start = threading.Barrier(len(connections), timeout=60)
    failures: list[BaseException] = []

    def work(connection: Any) -> None:
        try:
            start.wait()
            for step in range(5):
                if barrier(connection, "order/o-1", step, "action"):
                    effect(connection, str(step))
                connection.commit()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(connection,), daemon=True) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert effects(connections[0]) == [str(step) for step in range(5)]


def test_any_row_factory_will_do(connect: Connect) -> None:
    connection = connect()
    if isinstance(connection, sqlite3.Connection):
        connection.row_factory, connection.text_factory = sqlite3.Row, bytes
    else:
        connection.row_factory = dict_row
    assert barrier(connection, "order/o-1", 1, "action")
    assert not barrier(connection, "order/o-1", 1, "action")
    connection.rollback()


def test_outside_of_a_transaction_it_is_refused(connect: Connect) -> None:
    connection = connect()
    is_sqlite = isinstance(connection, sqlite3.Connection)
    if is_sqlite:
        connection.isolation_level = None
    else:
        connection.autocommit = True
    with pytest.raises(RuntimeError, match="this connection is in none: begin one first"):
        barrier(connection, "order/o-1", 1, "action")
    connection.execute("BEGIN")
    assert barrier(connection, "order/o-1", 1, "action")
    connection.execute("ROLLBACK")
    assert effects(connection) == []


def test_it_never_ends_the_users_transaction(connect: Connect) -> None:
    connection, other = connect(), connect()
    effect(connection, "mine")
    barrier_schema(connection)
    assert barrier(connection, "order/o-1", 1, "action")
    assert not barrier(connection, "order/o-1", 1, "action")
    assert barrier(connection, "order/o-1", 1, "compensation")
    with pytest.raises(SagaError):
        barrier(connection, "order/o-1", 1, "action")
    assert effects(other) == []
    connection.commit()
    assert effects(other) == ["mine"]


def test_a_table_that_is_missing_is_explained(tmp_path: Path, postgres_database: str) -> None:
    with closing(sqlite3.connect(tmp_path / "empty.db")) as plain, psycopg.connect(postgres_database) as postgres:
        for connection in (plain, postgres):
            with pytest.raises((sqlite3.OperationalError, psycopg.errors.UndefinedTable)) as caught:
                barrier(connection, "order/o-1", 1, "action")
            assert "call barrier_schema(connection) first" in caught.value.__notes__[0]
            connection.rollback()
        # Other errors have no such note.
        plain.close()
        with pytest.raises(sqlite3.ProgrammingError) as other:
            barrier(plain, "order/o-1", 1, "action")
        assert not hasattr(other.value, "__notes__")


def test_the_table_is_made_once_however_many_try(postgres_database: str) -> None:
    connections = [psycopg.connect(postgres_database) for _ in range(4)]
    start = threading.Barrier(len(connections), timeout=60)
    failures: list[BaseException] = []

    def work(connection: Any) -> None:
        try:
            start.wait()
            barrier_schema(connection)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(connection,), daemon=True) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert barrier(connections[0], "order/o-1", 1, "action")
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        (("o", 1), {}, ValueError, "op must be 'action' or 'compensation', not None"),
        (("o", 1, "undo"), {}, ValueError, "not 'undo'"),
        ((None, 1, "action"), {}, TypeError, "saga_id must be some text"),
        (("", 1, "action"), {}, TypeError, "saga_id must be some text"),
        (("o", None, "action"), {}, TypeError, "step must be a number"),
        (("o", True, "action"), {}, TypeError, "step must be a number"),
        (("o", "", "action"), {}, TypeError, "step must be a number"),
        (("o", "a/b", "action"), {}, TypeError, "a name without '/', not 'a/b'"),
        (("o",), {"key": "k", "op": "action"}, TypeError, "key stands for saga_id and step"),
        ((None, 1), {"key": "k", "op": "action"}, TypeError, "key stands for saga_id and step"),
        ((), {"key": "", "op": "action"}, TypeError, "key must be some text"),
        ((), {"key": 5, "op": "action"}, TypeError, "key must be some text, not 5"),
    ],
)
def test_what_makes_no_sense_is_refused(args: Any, kwargs: Any, error: type[Exception], text: str) -> None:
    with closing(sqlite3.connect(":memory:")) as connection, pytest.raises(error, match=text):
        barrier(connection, *args, **kwargs)


def test_connections_of_other_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="needs a connection of sqlite3, aiosqlite or psycopg, not 'sqlite:///x'"):
        barrier("sqlite:///x", "order/o-1", 1, "action")

    async def main() -> None:
        with closing(sqlite3.connect(":memory:")) as plain, pytest.raises(TypeError, match="takes barrier, and its"):
            await abarrier(plain, "order/o-1", 1, "action")
        async with aiosqlite.connect(":memory:") as connection:
            # A coroutine that nobody awaits would be true: it is refused at once.
            with pytest.raises(TypeError, match="takes abarrier, and its schema"):
                barrier(connection, "order/o-1", 1, "action")
            with pytest.raises(TypeError, match="takes abarrier, and its schema"):
                barrier_schema(connection)

    asyncio.run(main())


async def _through_the_rule(one: Any, other: Any) -> None:
    await abarrier_schema(one)
    await one.commit()
    for connection in (one, other):
        # Whoever comes second meets what the first has left.
        first = connection is one
        assert await abarrier(connection, "order/o-1", 1, "action") is first
        await connection.commit()
    assert await abarrier(one, key="order/o-1/1", op="compensation") is True
    waiting = asyncio.create_task(abarrier(other, key="order/o-1/1", op="compensation"))
    await one.commit()
    assert await waiting is False
    await other.commit()
    assert await abarrier(one, "order/o-1", 2, "compensation") is False
    with pytest.raises(SagaError, match="comes after its compensation"):
        await abarrier(one, "order/o-1", 2, "action")
    await one.rollback()


def test_aiosqlite(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "barrier.db"
        async with aiosqlite.connect(path, timeout=60) as one, aiosqlite.connect(path, timeout=60) as other:
            with pytest.raises(sqlite3.OperationalError) as caught:
                await abarrier(one, "order/o-1", 1, "action")
            assert "barrier_schema" in caught.value.__notes__[0]
            await _through_the_rule(one, other)

    asyncio.run(main())


def test_psycopg_async(postgres_database: str) -> None:
    async def main() -> None:
        connect = psycopg.AsyncConnection.connect
        async with await connect(postgres_database) as one, await connect(postgres_database) as other:
            await _through_the_rule(one, other)
            await one.set_autocommit(True)
            with pytest.raises(RuntimeError, match="begin one first"):
                await abarrier(one, "order/o-1", 1, "action")

    asyncio.run(main())
