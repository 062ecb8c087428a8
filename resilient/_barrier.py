"""barrier: let a participant of sagas do each step once, and its compensation only if the step was done.

Promises, in the participant's own transaction: a repeated action or compensation is not done again; a compensation
whose action never ran is not done (null compensation), and an action that comes after its compensation is refused
(hanging). Concurrent duplicates wait for the first one's transaction (the primary key sees to that). Does not: commit,
roll back, or work outside a transaction. Costs one statement, two for what is no news. As safe as the connection is.

The rule is dtm's (client/dtmcli/barrier.go), with one row for each step: nothing else has to be inserted twice.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Literal, TypeAlias, overload

from resilient._transaction import _world
from resilient.errors import SagaError

__all__ = ["abarrier", "abarrier_schema", "barrier", "barrier_schema"]

Op: TypeAlias = Literal["action", "compensation"]

# The states of a step: undone, or never done and not to be done any more; done.
_CLOSED, _DONE = 0, 1
_INSERT = "INSERT INTO resilient_barrier (key, state) VALUES (?, ?) ON CONFLICT DO NOTHING"
_UNDO = "UPDATE resilient_barrier SET state = 0 WHERE key = ? AND state = 1"
# Not a SELECT: it waits for a compensation that is under way, and no row factory has a say.
_REPEATED = "UPDATE resilient_barrier SET state = 1 WHERE key = ? AND state = 1"

_TABLE = (
    "CREATE TABLE IF NOT EXISTS resilient_barrier ("
    "key TEXT PRIMARY KEY, state SMALLINT NOT NULL, at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP)"
)
# Two who create it at the same time would run into each other.
_LOCK = "SELECT pg_advisory_xact_lock(8244207311063741793)"

Program: TypeAlias = Generator[tuple[str, tuple[Any, ...]], int, bool]


@overload
def barrier(connection: Any, saga_id: str, step: str | int, op: Op) -> bool: ...


@overload
def barrier(connection: Any, *, key: str, op: Op) -> bool: ...


def barrier(
    connection: Any,
    saga_id: str | None = None,
    step: str | int | None = None,
    op: Op | None = None,
    *,
    key: str | None = None,
) -> bool:
    """Whether the work of this step is to be done now, in the transaction that is open on `connection`.

    `op` is `"action"` or `"compensation"`. True: do it, on the same connection, and commit both. False: a repeated
    action or compensation, or a compensation whose action never ran: there is nothing to do, and nothing wrong.
    `SagaError` for an action that comes after its compensation: it must not be done any more.

    `connection` is one of sqlite3 or psycopg (others take `abarrier`). sqlite3 begins transactions by itself unless
    `isolation_level=None` or `autocommit=True`; outside of a transaction it is a `RuntimeError`. The key of a step is
    `saga.step_key`, or made of a `saga_id` ("order/o-42", so that it is the same) and a `step`. `barrier_schema` makes
    the table.

    >>> import sqlite3
    >>> from resilient import barrier, barrier_schema
    >>> connection = sqlite3.connect(":memory:")
    >>> barrier_schema(connection)
    >>> with connection:
    ...     barrier(connection, "order/o-42", 1, "action")
    True
    >>> with connection:  # delivered twice
    ...     barrier(connection, "order/o-42", 1, "action")
    False
    >>> connection.close()
    """
    driver = _driver(connection, False)
    name, program = _begun(saga_id, step, op, key)
    _inside(connection, driver)
    rows: Any = None
    try:
        while True:
            sql, args = program.send(rows)
            rows = _run(connection, driver, sql, args)
    except StopIteration as stop:
        done: bool = stop.value
        return done
    except Exception as error:
        _explain(error, name)
        raise


@overload
async def abarrier(connection: Any, saga_id: str, step: str | int, op: Op) -> bool: ...


@overload
async def abarrier(connection: Any, *, key: str, op: Op) -> bool: ...


async def abarrier(
    connection: Any,
    saga_id: str | None = None,
    step: str | int | None = None,
    op: Op | None = None,
    *,
    key: str | None = None,
) -> bool:
    """Whether the work of this step is to be done now: `barrier` for connections of aiosqlite and psycopg's async ones.

    It is a function of its own, since a coroutine that nobody awaits would always be true.
    """
    driver = _driver(connection, True)
    name, program = _begun(saga_id, step, op, key)
    _inside(connection, driver)
    rows: Any = None
    try:
        while True:
            sql, args = program.send(rows)
            rows = await _arun(connection, driver, sql, args)
    except StopIteration as stop:
        done: bool = stop.value
        return done
    except Exception as error:
        _explain(error, name)
        raise


def barrier_schema(connection: Any) -> None:
    """Make the table `resilient_barrier` if there is none.

    It is a part of the transaction that is open, and committed if none is. Rows are small and have an instant `at`;
    delete those that are older than any message that may still come.
    """
    if _driver(connection, False) == "sqlite3":
        connection.execute(_TABLE).close()
        return
    with connection.transaction():
        _run(connection, "psycopg", _LOCK, ())
        _run(connection, "psycopg", _TABLE, ())


async def abarrier_schema(connection: Any) -> None:
    """Make the table `resilient_barrier` if there is none. See `barrier_schema`."""
    if _driver(connection, True) == "sqlite3":
        await (await connection.execute(_TABLE)).close()
        return
    async with connection.transaction():
        await _arun(connection, "psycopg", _LOCK, ())
        await _arun(connection, "psycopg", _TABLE, ())


# -- the rule --------------------------------------------------------------------------------------------------------


def _begun(saga_id: Any, step: Any, op: Any, key: Any) -> tuple[str, Program]:
    if op not in ("action", "compensation"):
        raise ValueError(f"op must be 'action' or 'compensation', not {op!r}")
    if key is None:
        if type(saga_id) is not str or not saga_id:
            raise TypeError(f"saga_id must be some text (or give key=saga.step_key), not {saga_id!r}")
        if type(step) is not int and (type(step) is not str or not step or "/" in step):
            raise TypeError(f"step must be a number, or a name without '/', not {step!r}")
        key = f"{saga_id}/{step}"
    elif saga_id is not None or step is not None:
        raise TypeError("key stands for saga_id and step: give one or the other")
    elif type(key) is not str or not key:
        raise TypeError(f"key must be some text, not {key!r}")
    return key, _decide(key, op)


def _decide(key: str, op: Op) -> Program:
    if op == "compensation":
        if (yield _INSERT, (key, _CLOSED)):
            return False  # Its action has not come, and must not come any more.
        return (yield _UNDO, (key,)) == 1
    if (yield _INSERT, (key, _DONE)):
        return True
    if (yield _REPEATED, (key,)):
        return False
    names = key.rpartition("/")[0].partition("/")
    raise SagaError(f"action {key} comes after its compensation: it must not be done any more", names[0], names[2])


# -- the drivers -----------------------------------------------------------------------------------------------------


def _driver(connection: Any, is_async: bool) -> str:
    world = _world(connection)
    if world is None:
        raise TypeError(f"a barrier needs a connection of sqlite3, aiosqlite or psycopg, not {connection!r}")
    if world[1] is not is_async:
        raise TypeError(f"a {type(connection).__qualname__} of this kind takes {'a' * world[1]}barrier, and its schema")
    return world[0]


def _inside(connection: Any, driver: str) -> None:
    """Refuse where a statement would be committed by itself."""
    if driver == "sqlite3":
        alone = connection.isolation_level is None or getattr(connection, "autocommit", None) is True
        outside = alone and not connection.in_transaction
    else:
        outside = connection.autocommit and connection.info.transaction_status.name == "IDLE"
    if outside:
        raise RuntimeError("a barrier needs a transaction, and this connection is in none: begin one first")


def _run(connection: Any, driver: str, sql: str, args: tuple[Any, ...]) -> int:
    if driver == "sqlite3":
        cursor = connection.execute(sql, args)
        try:
            return int(cursor.rowcount)
        finally:
            cursor.close()
    from psycopg.rows import tuple_row

    with connection.cursor(row_factory=tuple_row) as cursor:
        return int(cursor.execute(sql.replace("?", "%s"), args).rowcount)


async def _arun(connection: Any, driver: str, sql: str, args: tuple[Any, ...]) -> int:
    if driver == "sqlite3":
        cursor = await connection.execute(sql, args)
        try:
            return int(cursor.rowcount)
        finally:
            await cursor.close()
    from psycopg.rows import tuple_row

    async with connection.cursor(row_factory=tuple_row) as cursor:
        return int((await cursor.execute(sql.replace("?", "%s"), args)).rowcount)


def _explain(error: Exception, key: str) -> None:
    if getattr(error, "sqlstate", None) == "42P01" or "no such table: resilient_barrier" in str(error):
        error.add_note(
            f"resilient: no barrier for {key}: call barrier_schema(connection) first, once for each database"
        )
