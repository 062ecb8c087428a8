"""Ten million keys in one SQLite file: do claims and purges stay as cheap? `python -m benchmarks.many_keys`.

Long, and on request only. Keys are claimed and finished by the statements of the store, a tenth in one transaction;
then the cost of a first call (a claim and its finish), of a replay and of a purged key is measured through the store
(medians), and the size of the file. The last lines say how the last tenth compares with the first.
"""

from __future__ import annotations

import argparse
import itertools
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from time import perf_counter
from typing import Any

from resilient.stores import Claim, Finish, Purge, SQLiteStore
from resilient.stores._sqlite_sql import Sql

RESULT = b'{"v":1,"ok":"receipt"}'
_numbers = itertools.count()


def _key(number: int) -> str:
    return blake2b(number.to_bytes(8, "big"), digest_size=20).hexdigest()


Execute = Callable[[Any], Any]


@contextmanager
def filling(path: Path) -> Iterator[Execute]:
    """What carries out operations on the file of a store, by the store's statements, all in one transaction."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -4000000")
    write, sql = connection.cursor().execute, Sql("resilient_")
    write("BEGIN IMMEDIATE")
    yield lambda op: sql.answer(write, op, time.time())
    write("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def _claim(execute: Execute, number: int) -> None:
    owner = f"owner.{number}"
    label = f'{{"function":"shop:charge","scope":"","key":"o-{number}"}}'
    reply = execute(Claim(_key(number), owner, 30.0, "f" * 32, label))
    execute(Finish(_key(number), owner, reply.fence, RESULT, 86_400.0))


def _first(store: SQLiteStore) -> None:
    _claim(store.execute, next(_numbers))


def median_us(call: Callable[[], object], times: int) -> float:
    took: list[float] = []
    for _ in range(times):
        began = perf_counter()
        call()
        took.append(perf_counter() - began)
    return statistics.median(took) * 1e6


def main() -> int:
    """Fill, measure, say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_keys", description=__doc__)
    parser.add_argument("--keys", type=int, default=10_000_000, metavar="N")
    parser.add_argument("--durability", choices=("normal", "full"), default="normal")
    o = parser.parse_args()
    part = max(1, o.keys // 10)
    rows: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.db"
        store = SQLiteStore(path, durability=o.durability)
        store.prepare()
        print(f"{'keys':>12} {'first call µs':>14} {'replay µs':>10} {'purge µs/key':>13} {'file MB':>9}", flush=True)
        for _ in range(10):
            with filling(path) as execute:
                for _ in range(part):
                    _claim(execute, next(_numbers))
            number = next(_numbers)
            _claim(store.execute, number)
            again = Claim(_key(number), "somebody else", 30.0)
            first = median_us(partial(_first, store), 5_000)
            replay = median_us(partial(store.execute, again), 5_000)
            # The oldest go: a hundredth of a tenth each time, so that the file keeps growing.
            purge = median_us(partial(store.execute, Purge(0.0, 1000)), max(1, part // 100_000)) / 1000
            rows.append((first, replay, purge))
            size = path.stat().st_size / 1e6
            print(f"{next(_numbers):>12,} {first:>14.1f} {replay:>10.1f} {purge:>13.2f} {size:>9,.0f}", flush=True)
        store.close()
    for name, column in zip(("first call", "replay", "purge"), zip(*rows, strict=True), strict=True):
        print(f"{name}: {min(column):.1f} to {max(column):.1f} µs; last tenth over first: {column[-1] / column[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
