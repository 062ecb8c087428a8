"""PostgreSQL as a pure codec: from an operation to one statement, and from its reply to a value.

Each statement is one atomic decision by the server's clock. A replay (a result, or a lease that runs) only reads: no
transaction number, no lock of a row, nothing to flush. Rows that are damaged make `StoreError`, never anything else.
Replies are read as PostgreSQL's binary format, so that row factories and adapters of the user change nothing. Nothing
here connects, waits, or imports a driver.
"""

from __future__ import annotations

from math import isnan
from struct import Struct
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

NOW = "date_part('epoch', clock_timestamp())"

# Nearly every claim finds nothing, or something that is not to be had. So the first statement takes a key that is new,
# else it only reads; the second one takes over what may be taken. Each decides by itself, and alone.
_CLAIM = """
WITH seen AS MATERIALIZED (
    SELECT false AS new, fence::int8, attempt::int8, fingerprint::text, owner::text, mark::float8, expires::float8,
        result::bytea, awaited::bool, {NOW} AS now
    FROM {prefix}records WHERE key = %(key)s),
new AS (
    INSERT INTO {prefix}records AS r (key, owner, fence, attempt, fingerprint, label, began, mark)
    SELECT %(key)s, %(owner)s, (now * 1e6)::int8, 1, %(fingerprint)s, %(label)s, now, now + %(lease)s::float8
    FROM (SELECT {NOW} AS now OFFSET 0) AS clock WHERE NOT EXISTS (SELECT FROM seen)
    ON CONFLICT (key) DO NOTHING RETURNING true AS new, fence, mark)
SELECT * FROM seen
UNION ALL SELECT new, fence, NULL, NULL, NULL, mark, NULL, NULL, NULL, {NOW} FROM new
"""

_TAKE = """
WITH seen AS MATERIALIZED (
    SELECT fence, attempt, fingerprint, owner, mark, expires, result, awaited, {NOW} AS now,
        expires <= {NOW} OR expires IS NULL AND (owner = %(owner)s OR %(take_over)s AND mark <= {NOW}) AS free
    FROM {prefix}records WHERE key = %(key)s),
new AS (
    INSERT INTO {prefix}records AS r (key, owner, fence, attempt, fingerprint, label, began, mark)
    SELECT %(key)s, %(owner)s, (now * 1e6)::int8, 1, %(fingerprint)s, %(label)s, now, now + %(lease)s::float8
    FROM (SELECT {NOW} AS now OFFSET 0) AS clock WHERE NOT EXISTS (SELECT FROM seen WHERE free IS NOT TRUE)
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
    WHERE r.expires <= {NOW} OR r.expires IS NULL AND (r.owner = %(owner)s OR %(take_over)s AND r.mark <= {NOW})
    RETURNING r.fence, r.attempt, r.mark),
heard AS (
    UPDATE {prefix}records AS r SET awaited = true FROM seen
    WHERE %(awaited)s AND r.key = %(key)s AND seen.free IS NOT TRUE AND seen.awaited IS NOT TRUE
        AND r.fence = seen.fence AND r.expires IS NULL AND r.mark > seen.now
    RETURNING true)
SELECT true AS new, fence::int8, attempt::int8, NULL::text, NULL::text, mark::float8, NULL::float8, NULL::bytea,
    NULL::bool, {NOW} FROM new
UNION ALL SELECT false, fence::int8, attempt::int8, fingerprint::text, owner::text, mark::float8, expires::float8,
    result::bytea, awaited OR EXISTS (SELECT FROM heard), now
FROM seen WHERE NOT EXISTS (SELECT FROM new)
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
    take it for somebody else's, so that its answer is not the operation's. `then`: what to ask if that gave no answer.
    """

    __slots__ = ("blind", "decode", "sql", "then", "values", "writes")

    def __init__(
        self,
        sql: str,
        decode: Callable[[Result, Any, str], Any],
        *,
        values: Callable[[Any], dict[str, Any]] = asdict,
        writes: bool = True,
        blind: bool = False,
        then: Statement | None = None,
    ) -> None:
        self.sql, self.decode, self.values = sql.encode(), decode, values
        self.writes, self.blind, self.then = writes, blind, then or self


def statements(prefix: str) -> dict[type[AnyOp], Statement]:
    """One statement for each kind of operation, on the tables with that prefix."""
    parts = {
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
        Claim: Statement(sql(_CLAIM), _claimed, then=Statement(sql(_TAKE), _claimed)),
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


def _claimed(result: Result, op: Claim, coding: str) -> Claimed:
    if not result.ntuples:
        return cast(Claimed, AGAIN)  # Somebody took it in the same moment.
    get, key = result.get_value, op.key
    fence = _whole(get(0, 1), key, "fence")
    if get(0, 0) == b"\1":
        waited = op.lease + _number(get(0, 9), key, "time") - _number(get(0, 5), key, "mark")
        if waited > 0.01 and waited > 0.1 * op.lease:
            return cast(Claimed, AGAIN)  # It waited for somebody's transaction to end: the lease must start anew.
        attempt = get(0, 2)
        return Acquired(fence, 1 if attempt is None else _whole(attempt, key, "attempt"))
    attempts, fingerprint = _whole(get(0, 2), key, "attempt"), _text(get(0, 3), key, "fingerprint", coding)
    now, expires = _number(get(0, 9), key, "time"), get(0, 6)
    if expires is not None:
        if _number(expires, key, "expires") <= now:
            return cast(Claimed, AGAIN)
        return Completed(fence, attempts, fingerprint, _bytes(get(0, 7), key))
    ahead = _number(get(0, 5), key, "mark") - now
    if _text(get(0, 4), key, "owner", coding) == op.owner:
        return cast(Claimed, AGAIN)
    if ahead > 0:
        if op.awaited and get(0, 8) != b"\1":
            return cast(Claimed, AGAIN)  # Whoever holds it must learn that somebody waits, or has just ended.
        return Busy(fence, attempts, fingerprint, ahead)
    return cast(Claimed, AGAIN) if op.take_over else Doubtful(fence, attempts, fingerprint, -ahead)


def _any(result: Result, op: AnyOp, coding: str) -> bool:
    return result.ntuples > 0


def _count(result: Result, op: Purge, coding: str) -> int:
    number: int = _INT(result.get_value(0, 0) or b"")[0]
    return number


def _read(result: Result, op: Read, coding: str) -> Record | None:
    return _record(result, 0, coding) if result.ntuples else None


def _page(result: Result, op: Scan, coding: str) -> Page:
    records = tuple(
        _record(result, row, coding) for row in range(result.ntuples) if result.get_value(row, 0) is not None
    )
    if len(records) >= op.limit:
        return Page(records, records[-1].key)
    after = result.get_value(0, 11)
    return Page(records, "" if after is None else after.decode(coding))


def _record(result: Result, row: int, coding: str) -> Record:
    def get(column: int) -> bytes | None:
        return result.get_value(row, column)

    key = _text(get(0), "?", "key", coding)
    expires = get(8)
    mark, now = _number(get(7), key, "mark"), _number(get(10), key, "now")
    state: State = "done" if expires is not None else "running" if mark > now else "in doubt"
    return Record(
        key=key,
        state=state,
        owner=_text(get(1), key, "owner", coding),
        fence=_whole(get(2), key, "fence"),
        attempt=_whole(get(3), key, "attempt"),
        fingerprint=_text(get(4), key, "fingerprint", coding),
        label=_text(get(5), key, "label", coding),
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


def _text(value: bytes | None, key: str, column: str, coding: str) -> str:
    if value is None:
        raise _damaged(key, f"{column} None")
    try:
        return value.decode(coding)
    except UnicodeDecodeError:
        raise _damaged(key, f"a {column} that is not {coding}") from None


def _bytes(value: bytes | None, key: str) -> bytes:
    if value is None:
        raise _damaged(key, "no result, though it is finished")
    return value


def _damaged(key: str, what: str) -> StoreError:
    return StoreError(f"the record {key!r} is damaged: it has {what}")
