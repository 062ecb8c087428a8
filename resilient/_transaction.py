"""A claim inside the caller's own database transaction: effect and result are committed together, or neither is.

Promises exactly once for what the block does on that connection, without a lease: whoever comes with the same key waits
for the first transaction to end (the database sees to that), and gets its result. If a transaction is open already the
block is a part of it, and the caller commits; else the block is one of its own. Does not: cover effects elsewhere.
Costs two statements. As safe as the connection is: one thread or task at a time.
"""

from __future__ import annotations

from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from typing import TYPE_CHECKING, Any

from resilient._binding import fingerprint_of, key_text
from resilient._codec import Form, noted
from resilient._once import Hold, current, was_replayed
from resilient.errors import InDoubt, InFlight, KeyReused, StoreError
from resilient.stores._ops import Acquired, Busy, Claim, Completed, Doubtful, Finish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from resilient.idempotency import Idempotent

__all__ = ["Transaction", "TransactionClaim"]

_SAVEPOINT = "resilient_claim"
_ENDED = "was the transaction ended inside the block?"
_DRIVERS = {"resilient.stores.sqlite": "sqlite3", "resilient.stores.postgres": "psycopg"}
# How a store carries out an operation on a connection of the caller's.
_ON, _AON = "on", "aon"


class TransactionClaim(Hold, eq=False):
    """The claim of a block. If it is `replayed`, `result` is what the first transaction with this key set it to."""

    replayed: bool = False
    result: Any = None


class Transaction:
    """What `Idempotent.transaction` returns: a context manager, sync or async as the connection is; for one block."""

    __slots__ = ("_connection", "_form", "_hold", "_inner", "_label", "_outer", "_policy", "_print")

    _outer: Any
    _inner: Any

    def __init__(
        self,
        policy: Idempotent,
        whose: str,
        connection: Any,
        key: Any,
        payload: Any,
        scope: str | None,
        returns: Any,
    ) -> None:
        from resilient.idempotency import Hasher

        if scope is None and callable(policy.scope):
            raise TypeError("scope must be given: that of the policy is a function of a call's arguments")
        fixed = scope if scope is not None else policy.scope or ""
        self._policy, self._connection = policy, connection
        self._print = "" if payload is ... else fingerprint_of(payload)
        text = key_text(key)
        stored, self._label = Hasher(whose)(str(fixed), text)
        self._hold = TransactionClaim(text, stored)
        self._form = Form(policy.codec, returns, policy.remember)

    # -- for plain connections ---------------------------------------------------------------------------------------

    def __enter__(self) -> TransactionClaim:
        store = self._store(_ON)
        try:
            store.prepare()
        except StoreError as error:
            self._unprepared(error)
            raise
        self._outer = _block(self._connection)
        self._outer.__enter__()
        try:
            reply = store.on(self._connection, self._claim())
            if self._takes_over(reply):
                reply = store.on(self._connection, self._claim(take_over=True))
            self._claimed(reply)
            self._inner = _block(self._connection) if self._splits() else None
            if self._inner is not None:
                self._inner.__enter__()
        except BaseException as error:
            self._outer.__exit__(type(error), error, error.__traceback__)
            raise
        return self._enter()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._exit()
        try:
            if error is None:
                self._still_open()
            if self._inner is not None:
                self._inner.__exit__(kind, error, trace)
            op = self._ending(error)
            if op is not None:
                self._finished(self._store(_ON).on(self._connection, op))
                kind = error = trace = None
        except BaseException as fault:
            self._outer.__exit__(type(fault), fault, fault.__traceback__)
            raise
        self._outer.__exit__(kind, error, trace)

    # -- for async connections ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> TransactionClaim:
        store = self._store(_AON)
        try:
            await store.aprepare()
        except StoreError as error:
            self._unprepared(error)
            raise
        self._outer = _ablock(self._connection)
        await self._outer.__aenter__()
        try:
            reply = await store.aon(self._connection, self._claim())
            if self._takes_over(reply):
                reply = await store.aon(self._connection, self._claim(take_over=True))
            self._claimed(reply)
            self._inner = _ablock(self._connection) if self._splits() else None
            if self._inner is not None:
                await self._inner.__aenter__()
        except BaseException as error:
            await self._outer.__aexit__(type(error), error, error.__traceback__)
            raise
        return self._enter()

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._exit()
        try:
            if error is None:
                self._still_open()
            if self._inner is not None:
                await self._inner.__aexit__(kind, error, trace)
            op = self._ending(error)
            if op is not None:
                self._finished(await self._store(_AON).aon(self._connection, op))
                kind = error = trace = None
        except BaseException as fault:
            await self._outer.__aexit__(type(fault), fault, fault.__traceback__)
            raise
        await self._outer.__aexit__(kind, error, trace)

    # -- what both decide --------------------------------------------------------------------------------------------

    def _store(self, way: str) -> Any:
        store = self._policy.store
        if not callable(getattr(store, way, None)):
            raise TypeError(f"{store!r} cannot take part in a transaction: SQLite and PostgreSQL stores can")
        world = _world(self._connection)
        if world is None or world[1] != (way == _AON):
            word = "with" if way == _ON else "async with"
            raise TypeError(
                f"`{word}` cannot use a {type(self._connection).__qualname__} here: sqlite3 and psycopg connections "
                "take `with`, aiosqlite and psycopg's async ones `async with`"
            )
        drivers = [_DRIVERS[cls.__module__] for cls in type(store).__mro__ if cls.__module__ in _DRIVERS]
        if drivers and world[0] not in drivers:
            raise TypeError(
                f"{store!r} cannot use a {type(self._connection).__qualname__}: its own are of {drivers[0]}"
            )
        return store

    def _unprepared(self, error: StoreError) -> None:
        if getattr(self._connection, "in_transaction", False):
            error.add_note(
                "resilient: this connection is in a transaction, and the store has still to make its tables, on a "
                "connection of its own: let it do so first (store.prepare(), or await store.aprepare())"
            )

    def _claim(self, *, take_over: bool = False) -> Claim:
        hold = self._hold
        return Claim(hold.stored, hold.owner, self._policy.lease, self._print, self._label, take_over)

    def _takes_over(self, reply: Any) -> bool:
        """Whether what is in doubt is to be done again; if it is the same, which is found out first."""
        how, hold = self._policy._how, self._hold
        if type(reply) is not Acquired and self._print and reply.fingerprint not in ("", self._print):
            raise KeyReused(how.name, hold.key, reply.fingerprint, self._print)
        return type(reply) is Doubtful and how.in_doubt == "rerun"

    def _claimed(self, reply: Any) -> None:
        how, hold = self._policy._how, self._hold
        was_replayed.set(type(reply) is Completed)
        hold.fence, hold.attempt = reply.fence, reply.attempt
        if type(reply) is Acquired:
            return
        if type(reply) is Completed:
            hold.replayed = True
            how.replays += 1
            hold.result, error = self._form.outcome(reply.result)
            if error is None:
                return
            noted(error, f"resilient: replayed: attempt {reply.attempt} with the key {hold.key!r} ended so")
            try:
                raise error
            finally:
                del error  # or it would be a reference cycle
        if type(reply) is Busy:
            raise InFlight(how.name, hold.key, reply.lease_left)
        how.in_doubts += 1
        raise InDoubt(how.name, hold.key, reply.attempt)

    def _splits(self) -> bool:
        """Whether the work is a part of its own: so that it can be undone and an error kept all the same, and so that
        SQLite, which lets everybody commit everything, tells if the transaction was ended inside.
        """
        return not self._hold.replayed and (bool(self._policy.remember) or _of_sqlite(self._connection))

    def _enter(self) -> TransactionClaim:
        hold = self._hold
        hold.outer = current.get()
        hold.locks, hold.locks_all = self._policy.store, _of_sqlite(self._connection)
        current.set(hold)
        return hold

    def _exit(self) -> None:
        self._hold.locks = None  # (Tasks that began inside may go on.)
        if current.get() is self._hold:
            current.set(self._hold.outer)

    def _ending(self, error: BaseException | None) -> Finish | None:
        """What is to be written at the end, if anything."""
        hold = self._hold
        if hold.replayed:
            return None
        was_replayed.set(False)  # whatever calls of its own the block has made
        if error is None:
            data = self._form.keep(hold.result)
        elif isinstance(error, self._policy.remember):
            data = self._form.keep_error(error)
        else:
            return None
        return Finish(hold.stored, hold.owner, hold.fence, data, self._policy.ttl)

    def _finished(self, answer: object) -> None:
        if answer is not True:
            raise StoreError(f"the claim of {self._hold.key!r} is gone: {_ENDED}", maybe_written=True)

    def _still_open(self) -> None:
        """`StoreError` if the block has ended its transaction: psycopg would begin another without a word."""
        # (0: no transaction is open. SQLite tells by its savepoint.)
        if not _of_sqlite(self._connection) and self._connection.info.transaction_status == 0:
            raise StoreError(f"it cannot be committed: {_ENDED}", maybe_written=True)


# -- transactions of the drivers -------------------------------------------------------------------------------------


def _world(connection: Any) -> tuple[str, bool] | None:
    """The driver of a connection, and whether it is async; None for anything else. Nothing is imported for it."""
    for cls in type(connection).__mro__:
        package = cls.__module__.partition(".")[0]
        if package == "sqlite3" and cls.__name__ == "Connection":
            return "sqlite3", False
        if package == "aiosqlite" and cls.__name__ == "Connection":
            return "sqlite3", True
        if package == "psycopg" and cls.__name__ in ("Connection", "AsyncConnection"):
            return "psycopg", cls.__name__ == "AsyncConnection"
    return None


def _of_sqlite(connection: Any) -> bool:
    how = _world(connection)
    return how is not None and how[0] == "sqlite3"


def _block(connection: Any) -> AbstractContextManager[Any]:
    """A transaction, or a part of the one that is open: undone if the block raises, else done, or left to the whole."""
    world = _world(connection)
    assert world is not None
    return connection.transaction() if world[0] == "psycopg" else _sqlite(connection)


def _ablock(connection: Any) -> AbstractAsyncContextManager[Any]:
    world = _world(connection)
    assert world is not None
    return connection.transaction() if world[0] == "psycopg" else _asqlite(connection)


@contextmanager
def _sqlite(connection: Any) -> Generator[None, None, None]:
    begin, commit, undo = _words(connection.in_transaction)
    try:
        connection.execute(begin).close()
    except _errors() as error:
        raise StoreError(f"no transaction could be begun: {error}") from error
    try:
        yield
        try:
            connection.execute(commit).close()
        except _errors() as error:
            if "constraint" in str(error):
                raise  # One that is checked at the end: the user's own error.
            gone = not connection.in_transaction or "no such savepoint" in str(error)
            raise StoreError(f"it cannot be committed: {_ENDED} ({error})", maybe_written=gone) from error
    except BaseException:
        for statement in undo:
            with suppress(_errors()):  # It is over already.
                connection.execute(statement).close()
        raise


@asynccontextmanager
async def _asqlite(connection: Any) -> AsyncGenerator[None, None]:
    begin, commit, undo = _words(connection.in_transaction)
    try:
        await (await connection.execute(begin)).close()
    except _errors() as error:
        raise StoreError(f"no transaction could be begun: {error}") from error
    try:
        yield
        try:
            await (await connection.execute(commit)).close()
        except _errors() as error:
            if "constraint" in str(error):
                raise  # One that is checked at the end: the user's own error.
            gone = not connection.in_transaction or "no such savepoint" in str(error)
            raise StoreError(f"it cannot be committed: {_ENDED} ({error})", maybe_written=gone) from error
    except BaseException:
        for statement in undo:
            with suppress(_errors()):  # It is over already.
                await (await connection.execute(statement)).close()
        raise


def _words(inside: bool) -> tuple[str, str, tuple[str, ...]]:
    """How to begin, to end well, and to undo, inside a transaction and outside of all."""
    if inside:
        release = f"RELEASE {_SAVEPOINT}"
        return f"SAVEPOINT {_SAVEPOINT}", release, (f"ROLLBACK TO {_SAVEPOINT}", release)
    # At once, so that a lock that is taken is waited for, and not met half-way.
    return "BEGIN IMMEDIATE", "COMMIT", ("ROLLBACK",)


def _errors() -> type[Exception]:
    import sqlite3

    return sqlite3.Error
