"""PostgreSQL as a pure codec: from an operation to one statement, and from its reply to a value.

Each statement is one atomic decision by the server's clock. A replay (a result, or a lease that runs) only reads: no
transaction number, no lock of a row, nothing to flush. Rows that are damaged make `StoreError`, never anything else.
Replies are read as PostgreSQL's binary format, so that row factories and adapters of the user change nothing. Nothing
here connects, waits, or imports a driver.
"""

from __future__ import annotations

from math import isnan
from struct import Struct, error
from typing import TYPE_CHECKING, Any, Protocol, cast

from msgspec.structs import asdict

from resilient.errors import StoreError
from resilient.stores._ops import (
    Abandon,
    Acquired,
    AnyOp,
    Busy,
    Claim,
    Claimed,
    Completed,
    Doubtful,
    Finish,
    Forget,
    Page,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
    State,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AGAIN", "MIGRATIONS", "PAYLOAD", "Statement", "statements"]

AGAIN: Any = object()
"""Another session was quicker, so that the statement saw two different moments: ask again."""

PAYLOAD = 2000
"""Keys up to this many characters travel in a notification; a longer one wakes everybody."""

LOOK = 5000
"""How many records a page of a scan looks at, at least."""

# One entry a version. Entries are never changed, only added.
MIGRATIONS = (
    """
    CREATE TABLE {prefix}records (
        key text COLLATE "C" PRIMARY KEY,
        owner text NOT NULL,
        fence int8 NOT NULL,
        attempt int4 NOT NULL,
        fingerprint text NOT NULL,
        label text NOT NULL,
        began float8 NOT NULL,
        mark float8 NOT NULL,
        expires float8,
        awaited bool NOT NULL DEFAULT false,
        result bytea
    );
    CREATE INDEX {prefix}records_mark ON {prefix}records (mark);
    """,
)

NOW = "extract(epoch FROM clock_timestamp())::float8"

# What a claim finds: done, taken by others (busy), of unknown end (quarrel), or there to be taken.
_KIND = """CASE
    WHEN r.expires IS NOT NULL THEN CASE WHEN r.expires > {now} THEN 'd' ELSE 't' END
    WHEN r.owner = %(owner)s THEN 't'
    WHEN r.mark > {now} THEN 'b'
    WHEN %(take_over)s THEN 't' ELSE 'q' END"""

_CLAIM = """
WITH clock AS MATERIALIZED (SELECT {NOW} AS now),
seen AS MATERIALIZED (
    SELECT {KIND_SEEN} AS kind, r.fence, r.attempt, r.fingerprint, r.mark - now AS ahead, r.awaited, r.result
    FROM {prefix}records AS r, clock WHERE r.key = %(key)s),
new AS (
    INSERT INTO {prefix}records AS r (key, owner, fence, attempt, fingerprint, label, began, mark)
    SELECT %(key)s, %(owner)s, (now * 1e6)::int8, 1, %(fingerprint)s, %(label)s, now, now + %(lease)s::float8
    FROM clock WHERE NOT EXISTS (SELECT FROM seen WHERE kind <> 't')
    ON CONFLICT (key) DO UPDATE SET
        owner = EXCLUDED.owner,
        fence = CASE WHEN {SAME} THEN r.fence ELSE greatest(r.fence + 1, EXCLUDED.fence) END,
        attempt = CASE WHEN r.expires IS NOT NULL THEN 1 WHEN {SAME} THEN r.attempt ELSE r.attempt + 1 END,
        fingerprint = CASE WHEN {SAME} THEN r.fingerprint ELSE EXCLUDED.fingerprint END,
        label = CASE WHEN {SAME} THEN r.label ELSE EXCLUDED.label END,
        began = CASE WHEN {SAME} THEN r.began ELSE {NOW} END,
        mark = {NOW} + %(lease)s::float8,
        awaited = r.awaited AND {SAME},
        expires = NULL,
        result = NULL
    WHERE {KIND_NEW} = 't'
    RETURNING r.fence, r.attempt, r.mark - {NOW} < 0.9 * %(lease)s::float8 AS late),
heard AS (
    UPDATE {prefix}records AS r SET awaited = true FROM seen
    WHERE %(awaited)s AND r.key = %(key)s AND seen.kind = 'b' AND NOT seen.awaited
        AND r.fence = seen.fence AND r.expires IS NULL
    RETURNING true)
SELECT new.fence::int8, new.attempt::int8, new.late::bool, seen.kind::text, seen.fence::int8, seen.attempt::int8,
    seen.fingerprint::text, seen.ahead::float8, seen.result::bytea,
    (seen.awaited OR NOT %(awaited)s OR EXISTS (SELECT FROM heard))::bool
FROM clock LEFT JOIN seen ON true LEFT JOIN new ON true
"""

_MINE = "r.key = %(key)s AND r.owner = %(owner)s AND (r.fence = %(fence)s::int8 OR %(fence)s::int8 = 0)"
_BELL = "CASE WHEN r.awaited THEN pg_notify('{prefix}wake', left(r.key, {PAYLOAD}))::text END"

_RENEW = """
UPDATE {prefix}records AS r SET mark = {NOW} + %(lease)s::float8
WHERE r.key = %(key)s AND r.owner = %(owner)s AND r.fence = %(fence)s::int8 AND r.expires IS NULL
RETURNING true
"""

# Once more by the same owner: the first result stays.
_FINISH = """
UPDATE {prefix}records AS r SET
    result = CASE WHEN r.expires IS NULL THEN %(result)s::bytea ELSE r.result END,
    mark = CASE WHEN r.expires IS NULL THEN {NOW} ELSE r.mark END,
    expires = coalesce(r.expires, {NOW} + %(ttl)s::float8)
WHERE {MINE} RETURNING {BELL}
"""

_RELEASE = "DELETE FROM {prefix}records AS r WHERE {MINE} AND r.expires IS NULL RETURNING {BELL}"

_ABANDON = """
UPDATE {prefix}records AS r SET mark = least(r.mark, {NOW}) WHERE {MINE} AND r.expires IS NULL RETURNING {BELL}
"""

_ROW = """r.key::text, r.owner::text, r.fence::int8, r.attempt::int8, r.fingerprint::text, r.label::text,
    r.began::float8, r.mark::float8, r.expires::float8, r.result::bytea, clock.now"""

_READ = """
WITH clock AS MATERIALIZED (SELECT {NOW} AS now)
SELECT {ROW} FROM {prefix}records AS r, clock WHERE r.key = %(key)s AND (r.expires IS NULL OR r.expires > now)
"""

# Looks at some records only, so that a rare text does not make one statement read the whole table.
_SCAN = """
WITH clock AS MATERIALIZED (SELECT {NOW} AS now),
part AS MATERIALIZED (
    SELECT key, label, expires FROM {prefix}records WHERE key > %(after)s ORDER BY key LIMIT %(look)s::int8),
hits AS MATERIALIZED (
    SELECT key FROM part, clock WHERE strpos(label, %(text)s) > 0 AND (expires IS NULL OR expires > now)
    ORDER BY key LIMIT %(limit)s::int8)
SELECT {ROW}, CASE WHEN (SELECT count(*) FROM part) = %(look)s::int8 THEN (SELECT max(key) FROM part) END::text
FROM clock LEFT JOIN hits ON true LEFT JOIN {prefix}records AS r ON r.key = hits.key ORDER BY hits.key
"""

_PURGE = """
WITH old AS MATERIALIZED (
    SELECT key FROM {prefix}records
    WHERE mark <= (SELECT {NOW} - greatest(%(older_than)s::float8, 0))
    ORDER BY mark LIMIT %(batch)s::int8 FOR UPDATE SKIP LOCKED),
gone AS (DELETE FROM {prefix}records AS r USING old WHERE r.key = old.key RETURNING true)
SELECT count(*)::int8 FROM gone
"""

_FORGET = """
DELETE FROM {prefix}records AS r WHERE r.key = %(key)s AND (r.expires IS NOT NULL OR r.mark <= {NOW}) RETURNING true
"""


class Result(Protocol):
    """What is used of psycopg's `PGresult`."""

    @property
    def ntuples(self) -> int: ...

    def get_value(self, row_number: int, column_number: int) -> bytes | None: ...


class Statement:
    """How one kind of operation is asked and answered.

    `writes`: whether it may change something. `blind`: whether a second sending may find the work of the first and
    take it for somebody else's, so that its answer is not the operation's.
    """

    __slots__ = ("blind", "decode", "sql", "values", "writes")

    def __init__(
        self,
        sql: str,
        decode: Callable[[Result, Any], Any],
        *,
        values: Callable[[Any], dict[str, Any]] = asdict,
        writes: bool = True,
        blind: bool = False,
    ) -> None:
        self.sql, self.decode, self.values = sql.encode(), decode, values
        self.writes, self.blind = writes, blind


def statements(prefix: str) -> dict[type[AnyOp], Statement]:
    """One statement for each kind of operation, on the tables with that prefix."""
    parts = {
        "{KIND_SEEN}": _KIND.replace("{now}", "now"),
        "{KIND_NEW}": _KIND.replace("{now}", "{NOW}"),
        "{SAME}": "(r.expires IS NULL AND r.owner = EXCLUDED.owner)",
        "{MINE}": _MINE,
        "{BELL}": _BELL,
        "{ROW}": _ROW,
        "{NOW}": NOW,
        "{PAYLOAD}": str(PAYLOAD),
        "{prefix}": prefix,
    }

    def sql(text: str) -> str:
        for name, value in parts.items():
            text = text.replace(name, value)
        return " ".join(text.split())

    return {
        Claim: Statement(sql(_CLAIM), _claimed),
        Renew: Statement(sql(_RENEW), _any),
        Finish: Statement(sql(_FINISH), _any),
        Release: Statement(sql(_RELEASE), _any, blind=True),
        Abandon: Statement(sql(_ABANDON), _any),
        Read: Statement(sql(_READ), _read, writes=False),
        Scan: Statement(sql(_SCAN), _page, values=_scan, writes=False),
        Purge: Statement(sql(_PURGE), _count, blind=True),
        Forget: Statement(sql(_FORGET), _any, blind=True),
    }


def _scan(op: Scan) -> dict[str, Any]:
    return {"after": op.after, "limit": op.limit, "text": op.text, "look": max(op.limit, LOOK)}


# -- replies ---------------------------------------------------------------------------------------------------------

_INT = Struct("!q").unpack
_FLOAT = Struct("!d").unpack


def _claimed(result: Result, op: Claim) -> Claimed:
    get = result.get_value
    fence = get(0, 0)
    try:
        if fence is not None:
            if get(0, 2) != b"\0":
                return cast(Claimed, AGAIN)  # It waited for somebody's transaction, and the lease is half over.
            return Acquired(_INT(fence)[0], _whole(get(0, 1), op.key, "attempt"))
        kind = get(0, 3)
        if kind is None or kind == b"t":
            return cast(Claimed, AGAIN)  # Another took it in the same moment.
        number, attempt = _whole(get(0, 4), op.key, "fence"), _whole(get(0, 5), op.key, "attempt")
        fingerprint = _text(get(0, 6), op.key, "fingerprint")
        if kind == b"d":
            return Completed(number, attempt, fingerprint, _bytes(get(0, 8), op.key))
        ahead = _number(get(0, 7), op.key, "mark")
        if kind == b"q":
            return Doubtful(number, attempt, fingerprint, -ahead)
        if get(0, 9) != b"\1":
            return cast(Claimed, AGAIN)  # It ended before it could learn that somebody waits.
        return Busy(number, attempt, fingerprint, ahead)
    except error as exc:
        raise _damaged(op.key, f"a number that is none ({exc})") from None


def _any(result: Result, op: AnyOp) -> bool:
    return result.ntuples > 0


def _count(result: Result, op: Purge) -> int:
    number: int = _INT(result.get_value(0, 0) or b"")[0]
    return number


def _read(result: Result, op: Read) -> Record | None:
    return _record(result, 0) if result.ntuples else None


def _page(result: Result, op: Scan) -> Page:
    records = tuple(_record(result, row) for row in range(result.ntuples) if result.get_value(row, 0) is not None)
    if len(records) >= op.limit:
        return Page(records, records[-1].key)
    after = result.get_value(0, 11)
    return Page(records, "" if after is None else after.decode())


def _record(result: Result, row: int) -> Record:
    def get(column: int) -> bytes | None:
        return result.get_value(row, column)

    key = _text(get(0), "?", "key")
    expires = get(8)
    mark, now = _number(get(7), key, "mark"), _number(get(10), key, "now")
    state: State = "done" if expires is not None else "running" if mark > now else "in doubt"
    return Record(
        key=key,
        state=state,
        owner=_text(get(1), key, "owner"),
        fence=_whole(get(2), key, "fence"),
        attempt=_whole(get(3), key, "attempt"),
        fingerprint=_text(get(4), key, "fingerprint"),
        label=_text(get(5), key, "label"),
        began_at=_number(get(6), key, "began"),
        mark=mark,
        expires_at=None if expires is None else _number(expires, key, "expires"),
        result=None if expires is None else _bytes(get(9), key),
    )


def _whole(value: bytes | None, key: str, column: str) -> int:
    number: int = 0 if value is None else _INT(value)[0]
    if number < 1:
        raise _damaged(key, f"{column} {None if value is None else number}")
    return number


def _number(value: bytes | None, key: str, column: str) -> float:
    number: float = float("nan") if value is None else _FLOAT(value)[0]
    if isnan(number):
        raise _damaged(key, f"{column} {None if value is None else number}")
    return number


def _text(value: bytes | None, key: str, column: str) -> str:
    if value is None:
        raise _damaged(key, f"{column} None")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _damaged(key, f"a {column} that is not UTF-8") from None


def _bytes(value: bytes | None, key: str) -> bytes:
    if value is None:
        raise _damaged(key, "no result, though it is finished")
    return value


def _damaged(key: str, what: str) -> StoreError:
    return StoreError(f"the record {key!r} is damaged: it has {what}")
