"""PostgreSQL as a pure codec: from an operation to one statement; how its reply is read is in `_pg_rows`.

Each statement is one atomic decision by the server's clock. A replay (a result, or a lease that runs) only reads: no
transaction number, no lock of a row, nothing to flush. Nothing here connects, waits, or imports a driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from resilient.stores._ops import (
    Abandon,
    AnyOp,
    Append,
    Begin,
    Claim,
    Finish,
    Forget,
    History,
    Purge,
    Read,
    Release,
    Renew,
    Scan,
)
from resilient.stores._pg_rows import (
    Result,
    any_row,
    appended,
    claimed,
    history,
    number_of,
    one_record,
    page,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MIGRATIONS", "PAYLOAD", "Statement", "statements"]

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
    # Entries belong to one life of a key, which `began` names: where another life begins, none of them is its own,
    # though some may be there still. `entries` says how many there are, so that whoever has none costs no look.
    """
    ALTER TABLE {prefix}records ADD COLUMN entries int4 NOT NULL DEFAULT 0;
    CREATE INDEX {prefix}records_open ON {prefix}records (key) WHERE expires IS NULL;
    CREATE TABLE {prefix}entries (
        key text COLLATE "C" NOT NULL,
        began float8 NOT NULL,
        at int4 NOT NULL,
        entry bytea NOT NULL,
        PRIMARY KEY (key, began, at)
    );
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
    INSERT INTO {prefix}records AS r (key, owner, fence, attempt, fingerprint, label, began, mark, entries)
    SELECT %(key)s, %(owner)s, (now * 1e6)::int8, 1, %(fingerprint)s, %(label)s, now, now + %(lease)s::float8, {BEGUN}
    FROM (SELECT {NOW} AS now OFFSET 0) AS clock WHERE NOT EXISTS (SELECT FROM seen)
    ON CONFLICT (key) DO NOTHING RETURNING true AS new, key, fence, mark, began, entries){FIRST}
SELECT * FROM seen
UNION ALL SELECT new, fence, NULL, NULL, NULL, mark, NULL, NULL, NULL, {NOW} FROM new
"""

_TAKE = """
WITH seen AS MATERIALIZED (
    SELECT fence, attempt, fingerprint, owner, mark, expires, result, awaited, began, entries, {NOW} AS now,
        expires <= {NOW} OR expires IS NULL AND (owner = %(owner)s OR %(take_over)s AND mark <= {NOW}) AS free
    FROM {prefix}records WHERE key = %(key)s),
new AS (
    INSERT INTO {prefix}records AS r (key, owner, fence, attempt, fingerprint, label, began, mark, entries)
    SELECT %(key)s, %(owner)s, (now * 1e6)::int8, 1, %(fingerprint)s, %(label)s, now, now + %(lease)s::float8, {BEGUN}
    FROM (SELECT {NOW} AS now OFFSET 0) AS clock WHERE NOT EXISTS (SELECT FROM seen WHERE free IS NOT TRUE)
    ON CONFLICT (key) DO UPDATE SET
        owner = EXCLUDED.owner,
        fence = CASE WHEN {SAME} THEN r.fence ELSE greatest(r.fence + 1, EXCLUDED.fence) END,
        attempt = CASE WHEN r.expires IS NOT NULL THEN 1 WHEN {SAME} THEN r.attempt ELSE r.attempt + 1 END,
        fingerprint = CASE WHEN {SAME} THEN r.fingerprint ELSE EXCLUDED.fingerprint END,
        label = CASE WHEN {SAME} OR r.expires IS NULL AND EXCLUDED.label = '' THEN r.label ELSE EXCLUDED.label END,
        began = CASE WHEN r.expires IS NULL THEN r.began ELSE {NOW} END,
        entries = CASE WHEN r.expires IS NULL THEN greatest(r.entries, {BEGUN}) ELSE {BEGUN} END,
        mark = {NOW} + %(lease)s::float8,
        awaited = r.awaited AND {SAME},
        expires = NULL,
        result = NULL
    WHERE r.expires <= {NOW} OR r.expires IS NULL AND (r.owner = %(owner)s OR %(take_over)s AND r.mark <= {NOW})
    RETURNING r.key, r.fence, r.attempt, r.mark, r.began, r.entries){FIRST},
old AS (
    DELETE FROM {prefix}entries AS e USING seen
    WHERE seen.entries > 0 AND seen.expires <= seen.now AND e.key = %(key)s AND e.began = seen.began),
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

# Where a claim begins a journal: the number of entries, and the first one, unless there is one.
_FIRST = """,
first AS (
    INSERT INTO {prefix}entries (key, began, at, entry)
    SELECT key, began, 0, %(entry)s::bytea FROM new WHERE entries = 1 ON CONFLICT DO NOTHING)
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

# The row is locked first, and judged as it is then: whoever takes the key over comes before that, or after. Where it
# is locked for long, an entry of the same moment may stay behind a delete; no other life of the key sees it.
_APPEND = """
WITH mine AS (
    UPDATE {prefix}records AS r SET
        mark = CASE WHEN r.entries < %(at)s::int4 THEN r.mark ELSE {NOW} + %(lease)s::float8 END,
        label = CASE WHEN r.entries < %(at)s::int4 OR %(label)s = '' THEN r.label ELSE %(label)s END,
        entries = CASE WHEN r.entries = %(at)s::int4 THEN r.entries + 1 ELSE r.entries END
    WHERE {MINE} AND r.expires IS NULL
    RETURNING r.key, r.began, r.entries),
added AS (
    INSERT INTO {prefix}entries (key, began, at, entry)
    SELECT key, began, %(at)s::int4, %(entry)s::bytea FROM mine WHERE entries = %(at)s::int4 + 1
    ON CONFLICT DO NOTHING)
SELECT entries::int8 FROM mine
"""

_WITH_ENTRIES = """,
entries AS (DELETE FROM {prefix}entries AS e WHERE e.key = ANY (ARRAY(SELECT key FROM gone WHERE entries > 0)))
"""

_RELEASE = """
WITH gone AS (DELETE FROM {prefix}records AS r WHERE {MINE} AND r.expires IS NULL
    RETURNING r.key, r.entries, {BELL} AS bell){WITH_ENTRIES}
SELECT bell FROM gone
"""

_ABANDON = """
UPDATE {prefix}records AS r SET mark = least(r.mark, {NOW}) WHERE {MINE} AND r.expires IS NULL RETURNING {BELL}
"""

_ROW = """r.key::text, r.owner::text, r.fence::int8, r.attempt::int8, r.fingerprint::text, r.label::text,
    r.began::float8, r.mark::float8, r.expires::float8, r.result::bytea, clock.now"""

_READ = """
WITH clock AS MATERIALIZED (SELECT {NOW} AS now)
SELECT {ROW} FROM {prefix}records AS r, clock WHERE r.key = %(key)s AND (r.expires IS NULL OR r.expires > now)
"""

_HISTORY = """
WITH clock AS MATERIALIZED (SELECT {NOW} AS now)
SELECT {ROW}, r.entries::int8, (
    SELECT array_agg(e.entry::bytea ORDER BY e.at) FROM {prefix}entries AS e WHERE e.key = r.key AND e.began = r.began)
FROM {prefix}records AS r, clock WHERE r.key = %(key)s AND (r.expires IS NULL OR r.expires > now)
"""

# Looks at some records only, so that a rare text does not make one statement read the whole table; and at those that
# are finished only where these are wanted, since there may be millions.
_SCAN = """
WITH clock AS MATERIALIZED (SELECT {NOW} AS now),
part AS MATERIALIZED (
    (SELECT key, label, expires, mark FROM {prefix}records
        WHERE %(state)s::text IN ('', 'done') AND key > %(after)s ORDER BY key LIMIT %(look)s::int8)
    UNION ALL (SELECT key, label, expires, mark FROM {prefix}records
        WHERE %(state)s::text NOT IN ('', 'done') AND expires IS NULL AND key > %(after)s
        ORDER BY key LIMIT %(look)s::int8)),
hits AS MATERIALIZED (
    SELECT key FROM part, clock WHERE strpos(label, %(text)s) > 0 AND (expires IS NULL OR expires > now)
        AND %(state)s::text IN (
            '', CASE WHEN expires IS NOT NULL THEN 'done' WHEN mark > now THEN 'running' ELSE 'in doubt' END)
    ORDER BY key LIMIT %(limit)s::int8)
SELECT {ROW}, CASE WHEN (SELECT count(*) FROM part) = %(look)s::int8 THEN (SELECT max(key) FROM part) END::text
FROM clock LEFT JOIN hits ON true LEFT JOIN {prefix}records AS r ON r.key = hits.key ORDER BY hits.key
"""

_PURGE = """
WITH old AS MATERIALIZED (
    SELECT key FROM {prefix}records
    WHERE mark <= (SELECT {NOW} - greatest(%(older_than)s::float8, 0))
    ORDER BY mark LIMIT %(batch)s::int8 FOR UPDATE SKIP LOCKED),
gone AS (DELETE FROM {prefix}records AS r USING old WHERE r.key = old.key RETURNING r.key, r.entries){WITH_ENTRIES}
SELECT count(*)::int8 FROM gone
"""

_FORGET = """
WITH gone AS (
    DELETE FROM {prefix}records AS r WHERE r.key = %(key)s AND (r.expires IS NOT NULL OR r.mark <= {NOW})
    RETURNING r.key, r.entries){WITH_ENTRIES}
SELECT true FROM gone
"""


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
        "{WITH_ENTRIES}": _WITH_ENTRIES,
        "{SAME}": "(r.expires IS NULL AND r.owner = EXCLUDED.owner)",
        "{MINE}": _MINE,
        "{BELL}": _BELL,
        "{ROW}": _ROW,
        "{NOW}": NOW,
        "{PAYLOAD}": str(PAYLOAD),
        "{prefix}": prefix,
    }

    def sql(text: str, begun: str = "0", first: str = "") -> str:
        for name, value in ({"{FIRST}": first, "{BEGUN}": begun} | parts).items():
            text = text.replace(name, value)
        return " ".join(text.split())

    take = Statement(sql(_TAKE, "1", _FIRST), claimed, values=_begin)
    return {
        Claim: Statement(sql(_CLAIM), claimed, then=Statement(sql(_TAKE), claimed)),
        Begin: Statement(sql(_CLAIM, "1", _FIRST), claimed, values=_begin, then=take),
        Append: Statement(sql(_APPEND), appended),
        Renew: Statement(sql(_RENEW), any_row),
        Finish: Statement(sql(_FINISH), any_row),
        Release: Statement(sql(_RELEASE), any_row, blind=True),
        Abandon: Statement(sql(_ABANDON), any_row),
        Read: Statement(sql(_READ), one_record, writes=False),
        History: Statement(sql(_HISTORY), history, writes=False),
        Scan: Statement(sql(_SCAN), page, values=_scan, writes=False),
        Purge: Statement(sql(_PURGE), number_of, blind=True),
        Forget: Statement(sql(_FORGET), any_row, blind=True),
    }


def _scan(op: Scan) -> dict[str, Any]:
    return asdict(op) | {"look": max(op.limit, LOOK)}


def _begin(op: Begin) -> dict[str, Any]:
    return asdict(op) | {"fingerprint": "", "awaited": False}
