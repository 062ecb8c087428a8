"""Ten million keys in one SQLite file: do claims and purges stay as cheap? `python -m benchmarks.many_keys`.

Long, and on request only. Keys are claimed and finished through the store, as `Idempotent` does; after each tenth of
them the cost of a claim, a replay and a purged batch is measured (medians), and the size of the file. The last lines
say how the dearest tenth compares with the cheapest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path
from time import perf_counter

from resilient.stores import Claim, Finish, Purge, SQLiteStore

RESULT = b'{"v":1,"ok":"receipt"}'
_numbers = itertools.count()


def _key(number: int) -> str:
    return blake2b(number.to_bytes(8, "big"), digest_size=20).hexdigest()


def _claim(store: SQLiteStore, number: int) -> None:
    owner = f"owner.{number}"
    label = f'{{"function":"shop:charge","scope":"","key":"o-{number}"}}'
    reply = store.execute(Claim(_key(number), owner, 30.0, "f" * 32, label))
    store.execute(Finish(_key(number), owner, reply.fence, RESULT, 86_400.0))


def _first(store: SQLiteStore) -> None:
    _claim(store, next(_numbers))


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
        print(f"{'keys':>12} {'first call µs':>14} {'replay µs':>10} {'purge µs/key':>13} {'file MB':>9}", flush=True)
        for _ in range(10):
            for _ in range(part):
                _claim(store, next(_numbers))
            number = next(_numbers)
            _claim(store, number)
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
