"""Idempotent calls beside the bare driver: the same server, the same run, round by round in turn.

Each figure is a ratio: the median over all rounds of (ours / raw) of that round, so that a slow second of the machine
hits both. A job is one backend in one world, in a process of its own that brings its server along. `us` and `raw_us`
are medians for one call.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.cases import OURS
from benchmarks.raw import RawPostgres, RawRedis, RawSQLite

if TYPE_CHECKING:
    from benchmarks.measures import Job

Row = dict[str, Any]
BACKENDS = ("memory", "sqlite full", "sqlite normal", "redis", "postgres")
IN_FLIGHT = (1, 16, 64)
POOL = 20

Call = Callable[[str], Any]
ACall = Callable[[str], Awaitable[Any]]

_numbers = itertools.count(1)


def keys(n: int) -> list[str]:
    """So many keys that nobody had before."""
    return [f"order-{next(_numbers):07}" for _ in range(n)]


@contextmanager
def stage(backend: str, pool: int = POOL) -> Iterator[tuple[Any, Any]]:
    """A store of ours and the raw driver, on one server; `pool` connections each, where there are pools."""
    from resilient import stores

    with ExitStack() as stack:
        if backend == "memory":
            yield stores.open("memory://"), None
            return
        store, raw = _pair(backend, stack, pool)
        stack.callback(raw.close)
        stack.callback(store.close)
        yield store, raw


def _pair(backend: str, stack: ExitStack, pool: int) -> tuple[Any, Any]:
    from resilient import stores
    from tests._servers import postgres_database, postgres_server, redis_server

    kind, _, durability = backend.partition(" ")
    if kind == "sqlite":
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        store = stores.SQLiteStore(Path(folder) / "ours.db", durability=durability)
        return store, RawSQLite(str(Path(folder) / "raw.db"), durability)
    if kind == "redis":
        url = stack.enter_context(redis_server())
        return stores.open(url), RawRedis(url)
    url = stack.enter_context(postgres_database(stack.enter_context(postgres_server())))
    return stores.PostgresStore(url, pool_size=pool), RawPostgres(url, pool)


def measure(job: Job) -> list[Row]:
    """All figures of one backend in one world; the world apart from the backend is `job.mode`."""
    if job.group == "library":
        return _library(job)
    if job.group == "group commit":
        return _group_commit(job)
    if job.group == "powertools":
        return _powertools(job)
    with stage(job.group) as (store, raw):
        return asyncio.run(_async(job, store, raw)) if job.mode == "async" else _sync(job, store, raw)


# -- plain functions -------------------------------------------------------------------------------------------------


def _guarded(store: Any) -> Call:
    from resilient import Idempotent

    @Idempotent(store, key="order_id")
    def charge(order_id: str, cents: int = 990) -> str:
        return "receipt"

    return charge


def _aguarded(store: Any) -> ACall:
    from resilient import Idempotent

    @Idempotent(store, key="order_id")
    async def charge(order_id: str, cents: int = 990) -> str:
        return "receipt"

    return charge


def crowd(call: Call, batches: list[list[str]]) -> float:
    """Seconds until as many threads as there are batches have called for all their keys."""
    if len(batches) == 1:
        began = perf_counter()
        for key in batches[0]:
            call(key)
        return perf_counter() - began
    gate = threading.Barrier(len(batches) + 1)

    def work(batch: list[str]) -> None:
        gate.wait()
        for key in batch:
            call(key)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    gate.wait()
    began = perf_counter()
    for thread in threads:
        thread.join()
    return perf_counter() - began


async def acrowd(call: ACall, batches: list[list[str]]) -> float:
    """The same with tasks."""

    async def work(batch: list[str]) -> None:
        for key in batch:
            await call(key)

    began = perf_counter()
    await asyncio.gather(*(work(batch) for batch in batches))
    return perf_counter() - began


def _batches(n: int, crowded: int, ready: str | None = None) -> list[list[str]]:
    each = max(1, n // crowded)
    return [[ready] * each if ready else keys(each) for _ in range(crowded)]


_Series = dict[str, list[float]]


def _seconds(job: Job) -> float:
    return 0.004 if job.quick else 0.04


def _sync(job: Job, store: Any, raw: Any) -> list[Row]:
    ours = _guarded(store)
    if raw is None:
        return _alone(job, ours)
    rows: list[Row] = []
    for call in (ours, raw.first):
        call(READY)
    for name, theirs, mine, other, crowded in _plan(raw.first, raw.replay, raw.claim):
        n = _count(_seconds(job), crowd(theirs, _batches(64, 1, other)) / 64, crowded)
        series: _Series = {"us": [], "raw_us": []}
        for _ in range(job.rounds):
            for field, call, ready in (("us", ours, mine), ("raw_us", theirs, other)):
                batches = _batches(n, crowded, ready)
                gc.collect()
                took = crowd(call, batches)
                series[field].append(took / sum(map(len, batches)) * 1e6)
        rows.append(_row(job, f"{name}, {crowded} in flight", series))
    return rows


async def _async(job: Job, store: Any, raw: Any) -> list[Row]:
    ours = _aguarded(store)
    if raw is None:
        return await _aalone(job, ours)
    rows: list[Row] = []
    try:
        for call in (ours, raw.afirst):
            await call(READY)
        for name, theirs, mine, other, crowded in _plan(raw.afirst, raw.areplay, raw.aclaim):
            await acrowd(ours, _batches(crowded, crowded))
            n = _count(_seconds(job), await acrowd(theirs, _batches(64, 1, other)) / 64, crowded)
            series: _Series = {"us": [], "raw_us": []}
            for _ in range(job.rounds):
                for field, call, ready in (("us", ours, mine), ("raw_us", theirs, other)):
                    batches = _batches(n, crowded, ready)
                    gc.collect()
                    took = await acrowd(call, batches)
                    series[field].append(took / sum(map(len, batches)) * 1e6)
            rows.append(_row(job, f"{name}, {crowded} in flight", series))
    finally:
        await raw.aclose()
        aclose = getattr(store, "aclose", None)
        if aclose is not None:
            await aclose()
    return rows


READY = "order-ready"


def _plan(first: Any, replay: Any, claim: Any) -> Iterator[tuple[str, Any, str | None, str | None, int]]:
    """What is measured: its name, the raw call beside it, the key for ours and theirs (None: new ones), how many."""
    for crowded in IN_FLIGHT:
        yield "first call", first, None, None, crowded
    for crowded in IN_FLIGHT:
        yield "replay", replay, READY, READY, crowded
    # The other thing that one round trip may mean: the claim that a replay takes the place of.
    yield "replay over a claim", claim, READY, None, 1


def _count(seconds: float, each: float, crowded: int) -> int:
    return max(crowded, round(seconds / each))


def _row(job: Job, name: str, series: _Series) -> Row:
    return {"suite": job.suite, "mode": job.mode, "group": job.group, "library": OURS, "name": name, "series": series}


# -- without a server ------------------------------------------------------------------------------------------------


RANDOM = "os.urandom(16).hex()"


def _random(key: str) -> str:
    return os.urandom(16).hex()


def _alone(job: Job, call: Call) -> list[Row]:
    """First calls and replays, and between them the plain operation that their bounds are scaled by."""
    call(READY)
    took: _Series = {"first call": [], "replay": [], RANDOM: []}
    for _ in range(job.rounds * 8):
        for name, batch in (("first call", keys(200)), ("replay", [READY] * 200)):
            gc.collect(0)
            took[name].append(crowd(call, [batch]) / 200 * 1e6)
            took[RANDOM].append(crowd(_random, [batch]) / 200 * 1e6)
    return _alone_rows(job, took)


async def _aalone(job: Job, call: ACall) -> list[Row]:
    await call(READY)
    took: _Series = {"first call": [], "replay": [], RANDOM: []}
    for _ in range(job.rounds * 8):
        for name, batch in (("first call", keys(200)), ("replay", [READY] * 200)):
            gc.collect(0)
            began = perf_counter()
            for key in batch:
                await call(key)
            took[name].append((perf_counter() - began) / 200 * 1e6)
            took[RANDOM].append(crowd(_random, [batch]) / 200 * 1e6)
    return _alone_rows(job, took)


def _alone_rows(job: Job, took: _Series) -> list[Row]:
    rows = [_row(job, name, {"us": took[name]}) for name in ("first call", "replay")]
    return [*rows, {**_row(job, RANDOM, {"us": took[RANDOM]}), "library": RANDOM, "reference": True}]


class Nothing:
    """A store that takes no time: what is left is the library's share."""

    def __init__(self) -> None:
        from resilient.stores import Acquired, Claim, Completed

        self._claim, self._new = Claim, Acquired(1, 1)
        self._old = Completed(1, 1, "", b'{"v":1,"ok":"receipt"}')

    def execute(self, op: Any) -> Any:
        if type(op) is not self._claim:
            return True
        return self._old if op.label.endswith('ready"}') else self._new

    async def aexecute(self, op: Any) -> Any:
        return self.execute(op)


def _library(job: Job) -> list[Row]:
    if job.mode == "async":
        return asyncio.run(_aalone(job, _aguarded(Nothing())))
    return _alone(job, _guarded(Nothing()))


# -- callers that share commits --------------------------------------------------------------------------------------


def _group_commit(job: Job) -> list[Row]:
    """Calls a second of sixteen callers over those of one, each call's two commits on the disk when it returns."""
    with stage("sqlite full") as (store, _):
        if job.mode == "async":
            return asyncio.run(_agroup_commit(job, store))
        ours = _guarded(store)
        n = _count(_seconds(job) * 4, crowd(ours, _batches(64, 1)) / 64, 16)
        series: _Series = {"one_us": [], "us": []}
        for _ in range(job.rounds):
            series["one_us"].append(crowd(ours, _batches(n, 1)) / n * 1e6)
            batches = _batches(n * 3, 16)
            series["us"].append(crowd(ours, batches) / sum(map(len, batches)) * 1e6)
    return [_row(job, "16 callers over one", series)]


async def _agroup_commit(job: Job, store: Any) -> list[Row]:
    ours = _aguarded(store)
    n = _count(_seconds(job) * 4, await acrowd(ours, _batches(64, 1)) / 64, 16)
    series: _Series = {"one_us": [], "us": []}
    for _ in range(job.rounds):
        series["one_us"].append(await acrowd(ours, _batches(n, 1)) / n * 1e6)
        batches = _batches(n * 3, 16)
        series["us"].append(await acrowd(ours, batches) / sum(map(len, batches)) * 1e6)
    return [_row(job, "16 callers over one", series)]


# -- aws-lambda-powertools -------------------------------------------------------------------------------------------


def _powertools(job: Job) -> list[Row]:
    """The same function under ours and theirs, on the same Redis."""
    import redis
    from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
    from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer

    from resilient import stores
    from tests._servers import redis_server

    with redis_server() as url:
        client = redis.Redis.from_url(url, decode_responses=True)
        layer = RedisCachePersistenceLayer(client=client)

        @idempotent_function(
            data_keyword_argument="order_id", persistence_store=layer, config=IdempotencyConfig(use_local_cache=False)
        )
        def charge(order_id: str) -> str:
            return "receipt"

        def theirs(key: str) -> None:
            charge(order_id=key)

        store = stores.open(url)
        ours = _guarded(store)
        rows: list[Row] = []
        for name, ready in (("first call", None), ("replay", READY)):
            for call in (ours, theirs):
                call(READY)
            n = _count(_seconds(job), crowd(theirs, _batches(64, 1, ready)) / 64, 1)
            series: _Series = {"us": [], "raw_us": []}
            for _ in range(job.rounds):
                for field, call in (("us", ours), ("raw_us", theirs)):
                    batches = _batches(n, 1, ready)
                    gc.collect()
                    series[field].append(crowd(call, batches) / n * 1e6)
            rows.append(_row(job, name, series))
        store.close()
        client.close()
    return rows


def wanted(job: Job) -> bool:
    """Whether `job.only` names this job."""
    return not job.only or re.search(job.only, f"durable/{job.mode}/{job.group}/") is not None
