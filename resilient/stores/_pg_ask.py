"""One statement on one connection of the store's own, without a cursor: prepared once, then only values travel.

Does what psycopg's cursors would do with it, by the same wire library, for two thirds of the cost: values are written
by the names of their parameters, as binary, and nothing is looked up. Used by whoever has the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Generator
from functools import lru_cache
from re import sub
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import generators
from psycopg.errors import error_from_result

if TYPE_CHECKING:
    from re import Match

__all__ = ["AsyncAsked", "SyncAsked"]

_FINE = (psycopg.pq.ExecStatus.COMMAND_OK, psycopg.pq.ExecStatus.TUPLES_OK)

# How a value travels: the number of its type, and what writes it as PostgreSQL's binary format.
_TEXT: tuple[int, Callable[[Any], bytes]] = (25, str.encode)
_BYTES: tuple[int, Callable[[Any], bytes]] = (17, bytes)
_BOOL: tuple[int, Callable[[Any], bytes]] = (16, struct.Struct("!?").pack)
_WHOLE: tuple[int, Callable[[Any], bytes]] = (20, struct.Struct("!q").pack)
_NUMBER: tuple[int, Callable[[Any], bytes]] = (701, struct.Struct("!d").pack)
_KINDS = {
    "lease": _NUMBER,
    "ttl": _NUMBER,
    "older_than": _NUMBER,
    "fence": _WHOLE,
    "at": _WHOLE,
    "batch": _WHOLE,
    "limit": _WHOLE,
    "look": _WHOLE,
    "entry": _BYTES,
    "result": _BYTES,
    "awaited": _BOOL,
    "take_over": _BOOL,
}
"""What is not text."""


@lru_cache(maxsize=512)
def _numbered(sql: bytes) -> tuple[bytes, list[tuple[str, Callable[[Any], bytes]]], list[int]]:
    """The statement with `$1` in place of `%(name)s`; the names in order, with what writes each; and their types."""
    names: list[str] = []

    def number(found: Match[str]) -> str:
        if found[1] not in names:
            names.append(found[1])
        return f"${names.index(found[1]) + 1}"

    text = sub(r"%\((\w+)\)s", number, sql.decode()).encode()
    kinds = [_KINDS.get(name, _TEXT) for name in names]
    return text, [(name, kind[1]) for name, kind in zip(names, kinds, strict=True)], [kind[0] for kind in kinds]


class _Asked:
    """A statement, and its last result."""

    __slots__ = ("_formats", "_name", "_pgconn", "_prepared", "_types", "_values", "_wait", "pgresult")

    def __init__(self, pgconn: Any, sql: bytes, number: int, wait: Callable[[Any], Any]) -> None:
        self._pgconn, self._name, self._wait = pgconn, b"resilient_%d" % number, wait
        self._values, self._types = _numbered(sql)[1:]
        self._formats = [1] * len(self._types)
        self._prepared = False
        self.pgresult: Any = None

    def _steps(self, sql: bytes, values: dict[str, Any]) -> Generator[Any, Any, None]:
        try:
            written = [write(values[name]) for name, write in self._values]
        except struct.error as exc:
            raise psycopg.DataError(f"a number is out of range: {exc}") from None
        if not self._prepared:
            self._pgconn.send_prepare(self._name, _numbered(sql)[0], self._types)
            yield from self._answer()
            self._prepared = True
        self._pgconn.send_query_prepared(self._name, written, self._formats, 1)
        yield from self._answer()

    def _answer(self) -> Generator[Any, Any, None]:
        results: list[Any] = yield from generators.execute(self._pgconn)
        self.pgresult = result = results[-1]
        if result.status not in _FINE:
            raise error_from_result(result, encoding="utf-8")


class SyncAsked(_Asked):
    """For threads; asked as a cursor is."""

    __slots__ = ()

    def execute(self, sql: bytes, values: dict[str, Any], *, prepare: bool | None, binary: bool) -> None:
        """Send the values, and wait for `pgresult`, or raise psycopg's error."""
        self._wait(self._steps(sql, values))


class AsyncAsked(_Asked):
    """For tasks; asked as a cursor is."""

    __slots__ = ()

    async def execute(self, sql: bytes, values: dict[str, Any], *, prepare: bool | None, binary: bool) -> None:
        """Send the values, and wait for `pgresult`, or raise psycopg's error."""
        waiting: Awaitable[None] = self._wait(self._steps(sql, values))
        await waiting
