"""Sagas of three steps: over the bare calls, beside the bare driver, beside DBOS and Temporal, many at once, recovered.

Each comparison is by rounds in turn, ours and the other's, and a ratio is the median over all rounds of that round's
ratio, so that a slow second of the machine hits both. A job is one group in one world, in a process of its own that
brings its servers along. `us`, `raw_us` (the same bytes committed by the bare driver) and `peer_us` are medians for one
saga; what has nobody beside it, and what is added to bare calls, is told by minima.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from benchmarks import harness
from benchmarks.cases import OURS
from benchmarks.durable import RANDOM, acrowd, crowd, stage
from benchmarks.raw import Written

if TYPE_CHECKING:
    from benchmarks.measures import Job

Row = dict[str, Any]
Series = dict[str, list[float]]
Call = Callable[[str], Any]
ACall = Callable[[str], Awaitable[Any]]

IN_PROCESS = "in process"
JOURNALS = ("sqlite full", "sqlite normal", "redis", "postgres")
ON_DBOS = ("dbos, sqlite", "dbos, postgres")
ON_TEMPORAL = ("temporal, test server", "temporal, dev server")
MANY = "many at once"
RECOVERY = "recovery"

GROUPS = {
    "sync": (IN_PROCESS, *JOURNALS, *ON_DBOS, MANY, RECOVERY),
    "async": (IN_PROCESS, *JOURNALS, *ON_DBOS, *ON_TEMPORAL, MANY),
}
SPARED = (("sync", "dbos, sqlite"), ("async", "dbos, postgres"))
"""What a quick run leaves out: each database and each world of DBOS is in the others."""

ORPHANS = 10_000
RECOVERIES = ("full", "normal")

_numbers = itertools.count(1)


def keys(n: int) -> list[str]:
    """So many ids that no saga had before."""
    return [f"order-{next(_numbers):07}" for _ in range(n)]


# -- the saga --------------------------------------------------------------------------------------------------------


def reserve(order: str, sku: str) -> str:
    """A step."""
    return "hold"


def release(order: str, sku: str) -> None:
    """Undoes `reserve`."""


def charge(order: str, cents: int) -> str:
    """A step."""
    return "receipt"


def refund(order: str, cents: int) -> None:
    """Undoes `charge`."""


def ship(order: str) -> str:
    """The last step."""
    return "parcel"


async def areserve(order: str, sku: str) -> str:
    """A step."""
    return "hold"


async def arelease(order: str, sku: str) -> None:
    """Undoes `areserve`."""


async def acharge(order: str, cents: int) -> str:
    """A step."""
    return "receipt"


async def arefund(order: str, cents: int) -> None:
    """Undoes `acharge`."""


async def aship(order: str) -> str:
    """The last step."""
    return "parcel"


def body(saga: Any, order: str) -> str:
    """The three steps."""
    saga.step(reserve, order, "sku-1", compensate=release)
    saga.step(charge, order, 990, compensate=refund)
    parcel: str = saga.step(ship, order, compensate=None)
    return parcel


async def abody(saga: Any, order: str) -> str:
    """The three steps, in a coroutine."""
    await saga.step(areserve, order, "sku-1", compensate=arelease)
    await saga.step(acharge, order, 990, compensate=arefund)
    parcel: str = await saga.step(aship, order, compensate=None)
    return parcel


def block(store: Any) -> Call:
    """What runs the steps in a block with an id."""
    from resilient import Saga

    def place(key: str) -> str:
        with Saga("order", id=key, store=store) as saga:
            return body(saga, key)

    return place


def ablock(store: Any) -> ACall:
    """The same in a coroutine."""
    from resilient import Saga

    async def place(key: str) -> str:
        async with Saga("order", id=key, store=store) as saga:
            return await abody(saga, key)

    return place


def _durable(store: Any) -> Call:
    from resilient import DurableSaga

    run = DurableSaga("durable order", store=store)(body)
    return lambda key: run(key, id=key)


def _adurable(store: Any) -> ACall:
    from resilient import DurableSaga

    run = DurableSaga("durable order, async", store=store)(abody)
    return lambda key: run(key, id=key)


KINDS = {"block": (block, ablock), "durable": (_durable, _adurable)}


class _Listener:
    """A store that remembers what it was asked."""

    def __init__(self, store: Any) -> None:
        self.store, self.asked = store, list[Any]()

    def execute(self, op: Any) -> Any:
        self.asked.append(op)
        return self.store.execute(op)

    async def aexecute(self, op: Any) -> Any:
        return self.execute(op)


def written(kind: str, mode: str) -> Written:
    """The very bytes that such a saga writes. An error if it takes more commits than steps and one."""
    from resilient import stores
    from resilient.stores import Append, Begin, Finish

    listener = _Listener(stores.open("memory://"))
    place = KINDS[kind][mode == "async"](listener)
    if mode == "async":
        asyncio.run(_once(place))
    else:
        place(keys(1)[0])
    writes = [op for op in listener.asked if type(op).__name__ not in ("History", "Read")]
    if [type(op) for op in writes] != [Begin, Append, Append, Finish]:
        raise AssertionError(f"a saga of three steps wrote {[type(op).__name__ for op in writes]}")
    return Written(writes[0].label, tuple(op.entry for op in writes[:-1]), writes[-1].result)


async def _once(place: Any) -> None:
    await place(keys(1)[0])


# -- running ---------------------------------------------------------------------------------------------------------


def measure(job: Job) -> list[Row]:
    """All figures of one group in one world."""
    if job.group == IN_PROCESS:
        return _in_process(job)
    if job.group == RECOVERY:
        return _recovery(job)
    if job.group in ON_DBOS:
        return _dbos(job)
    if job.group in ON_TEMPORAL:
        return asyncio.run(_temporal(job))
    with stage("sqlite full" if job.group == MANY else job.group, pool=2) as (store, raw):
        if job.group == MANY:
            return asyncio.run(_amany(job, store, raw)) if job.mode == "async" else _many(job, store)
        if job.mode == "async":
            scripts = {kind: written(kind, "async") for kind in KINDS}
            return asyncio.run(_ajournal(job, store, raw, scripts))
        return _journal(job, store, raw)


def wanted(job: Job) -> bool:
    """Whether `job.only` names this job."""
    return not job.only or re.search(job.only, f"{job.suite}/{job.mode}/{job.group}/") is not None


def _seconds(job: Job) -> float:
    return 0.004 if job.quick else 0.04


def _batches(n: int, crowded: int) -> list[list[str]]:
    """Ids for each of those who place orders at once, in the order in which orders come."""
    ids = keys(max(1, n // crowded) * crowded)
    return [ids[at::crowded] for at in range(crowded)]


def _row(job: Job, name: str, series: Series) -> Row:
    return {"suite": job.suite, "mode": job.mode, "group": job.group, "library": OURS, "name": name, "series": series}


Sides = dict[str, tuple[Any, int, float]]
"""By the name of the series: what places an order, how many do so at once, and seconds for a sample."""


def _beside(job: Job, name: str, sides: Sides) -> Row:
    """Rounds in turn."""
    counts: dict[str, int] = {}
    for field, (call, crowded, seconds) in sides.items():
        crowd(call, _batches(2, 1))
        took = crowd(call, _batches(4 if job.quick else 16, 1)) / (4 if job.quick else 16)
        counts[field] = max(crowded, round(seconds / took))
    series: Series = {field: [] for field in sides}
    for _ in range(job.rounds):
        for field, (call, crowded, _) in sides.items():
            batches = _batches(counts[field], crowded)
            gc.collect()
            series[field].append(crowd(call, batches) / sum(map(len, batches)) * 1e6)
    return _row(job, name, series)


async def _abeside(job: Job, name: str, sides: Sides) -> Row:
    counts: dict[str, int] = {}
    for field, (call, crowded, seconds) in sides.items():
        await acrowd(call, _batches(crowded, crowded))
        took = await acrowd(call, _batches(4 if job.quick else 16, 1)) / (4 if job.quick else 16)
        counts[field] = max(crowded, round(seconds / took))
    series: Series = {field: [] for field in sides}
    for _ in range(job.rounds):
        for field, (call, crowded, _) in sides.items():
            batches = _batches(counts[field], crowded)
            gc.collect()
            series[field].append(await acrowd(call, batches) / sum(map(len, batches)) * 1e6)
    return _row(job, name, series)


async def _end(*open_ones: Any) -> None:
    for one in open_ones:
        aclose = getattr(one, "aclose", None)
        if aclose is not None:
            await aclose()


# -- in process ------------------------------------------------------------------------------------------------------


def _in_process(job: Job) -> list[Row]:
    """Three steps in a block, the same three calls without one, and an operation of the machine to judge it by."""
    from resilient import Saga

    def bare(x: int) -> str:
        reserve("o-42", "sku-1")
        charge("o-42", 990)
        return ship("o-42")

    async def abare(x: int) -> str:
        await areserve("o-42", "sku-1")
        await acharge("o-42", 990)
        return await aship("o-42")

    def guarded(x: int) -> str:
        with Saga("order") as saga:
            saga.step(reserve, "o-42", "sku-1", compensate=release)
            saga.step(charge, "o-42", 990, compensate=refund)
            parcel: str = saga.step(ship, "o-42", compensate=None)
        return parcel

    async def aguarded(x: int) -> str:
        async with Saga("order") as saga:
            await saga.step(areserve, "o-42", "sku-1", compensate=arelease)
            await saga.step(acharge, "o-42", 990, compensate=arefund)
            parcel: str = await saga.step(aship, "o-42", compensate=None)
        return parcel

    def random(x: int) -> str:
        return os.urandom(16).hex()

    sync = job.mode == "sync"
    sampler: Any = harness.call if sync else harness.call_async
    samplers = {
        "bare": sampler(bare if sync else abare),
        "saga": sampler(guarded if sync else aguarded),
        RANDOM: harness.call(random),
    }
    work = harness.interleave(samplers, job.rounds, job.milliseconds)
    times = harness.plain(work) if sync else asyncio.run(work)
    us = {name: [ns / 1e3 for ns in series] for name, series in times.items()}
    reference = {**_row(job, RANDOM, {"us": us[RANDOM]}), "library": RANDOM, "reference": True}
    return [reference, _row(job, "three steps", {"us": us["saga"], "bare_us": us["bare"]})]


# -- beside the bare driver ------------------------------------------------------------------------------------------


def _journal(job: Job, store: Any, raw: Any) -> list[Row]:
    rows: list[Row] = []
    for kind, (make, _) in KINDS.items():
        script = written(kind, "sync")
        sides: Sides = {
            "us": (make(store), 1, _seconds(job)),
            "raw_us": (lambda key, script=script: raw.saga(key, script), 1, _seconds(job)),
        }
        rows.append(_beside(job, kind, sides))
    return rows


async def _ajournal(job: Job, store: Any, raw: Any, scripts: dict[str, Written]) -> list[Row]:
    rows: list[Row] = []
    try:
        for kind, (_, make) in KINDS.items():
            script = scripts[kind]
            sides: Sides = {
                "us": (make(store), 1, _seconds(job)),
                "raw_us": (lambda key, script=script: raw.asaga(key, script), 1, _seconds(job)),
            }
            rows.append(await _abeside(job, kind, sides))
    finally:
        await _end(raw, store)
    return rows


# -- many at once ----------------------------------------------------------------------------------------------------


def _many(job: Job, store: Any) -> list[Row]:
    """Sagas a second of sixteen threads over those of one, each saga's four commits on the disk when it ends."""
    rows: list[Row] = []
    for kind, (make, _) in KINDS.items():
        place = make(store)
        sides: Sides = {"one_us": (place, 1, _seconds(job) * 4), "us": (place, 16, _seconds(job) * 12)}
        rows.append(_beside(job, f"{kind}, 16 over one", sides))
    return rows


async def _amany(job: Job, store: Any, raw: Any) -> list[Row]:
    rows: list[Row] = []
    try:
        for kind, (_, make) in KINDS.items():
            place = make(store)
            sides: Sides = {"one_us": (place, 1, _seconds(job) * 4), "us": (place, 16, _seconds(job) * 12)}
            rows.append(await _abeside(job, f"{kind}, 16 over one", sides))
    finally:
        await _end(raw, store)
    return rows


# -- beside DBOS -----------------------------------------------------------------------------------------------------


@contextmanager
def dbos_workflow(url: str, mode: str) -> Iterator[Any]:
    """A workflow of the same three steps on DBOS, which writes JSON and lives in this process."""
    from dbos import DBOS, SetWorkflowID
    from dbos._serialization import DBOSPortableJSONSerializer

    config: Any = {
        "name": "benchmarks",
        "system_database_url": url,
        "run_admin_server": False,
        "log_level": "CRITICAL",
        "serializer": DBOSPortableJSONSerializer(),
    }
    DBOS(config=config)
    first, second, third = [
        cast("Any", DBOS.step()(step))
        for step in ((areserve, acharge, aship) if mode == "async" else (reserve, charge, ship))
    ]

    @DBOS.workflow()
    def order(key: str) -> str:
        first(key, "sku-1")
        second(key, 990)
        parcel: str = third(key)
        return parcel

    @DBOS.workflow()
    async def aorder(key: str) -> str:
        await first(key, "sku-1")
        await second(key, 990)
        parcel: str = await third(key)
        return parcel

    def place(key: str) -> str:
        with SetWorkflowID(key):
            return order(key)

    async def aplace(key: str) -> str:
        with SetWorkflowID(key):
            return await aorder(key)

    DBOS.launch()
    try:
        yield aplace if mode == "async" else place
    finally:
        DBOS.destroy()


def _dbos(job: Job) -> list[Row]:
    """The same steps as a saga of ours and as a workflow of DBOS, on the same database, each at its default."""
    from resilient import stores

    if job.group == "dbos, sqlite":
        with tempfile.TemporaryDirectory() as folder:
            store: Any = stores.SQLiteStore(Path(folder) / "ours.db")
            return _beside_dbos(job, store, f"sqlite:///{folder}/theirs.db")
    from tests._servers import postgres_database, postgres_server

    with postgres_server() as server, postgres_database(server) as url:
        store = stores.open(url)
        return _beside_dbos(job, store, url.replace("postgresql://", "postgresql+psycopg://", 1))


def _beside_dbos(job: Job, store: Any, url: str) -> list[Row]:
    seconds = 0.02 if job.quick else 0.2
    try:
        with dbos_workflow(url, job.mode) as theirs:
            if job.mode == "async":
                return asyncio.run(_abeside_dbos(job, store, theirs, seconds))
            return [
                _beside(job, _at_once(crowded), {"us": (ours, crowded, seconds), "peer_us": (theirs, crowded, seconds)})
                for ours in (_durable(store),)
                for crowded in (AT_ONCE[:1] if job.quick else AT_ONCE)
            ]
    finally:
        store.close()


AT_ONCE = (1, 16)


def _at_once(crowded: int) -> str:
    return "one at a time" if crowded == 1 else f"{crowded} at once"


async def _abeside_dbos(job: Job, store: Any, theirs: Any, seconds: float) -> list[Row]:
    ours = _adurable(store)
    try:
        return [
            await _abeside(
                job, _at_once(crowded), {"us": (ours, crowded, seconds), "peer_us": (theirs, crowded, seconds)}
            )
            for crowded in (AT_ONCE[:1] if job.quick else AT_ONCE)
        ]
    finally:
        await _end(store)


# -- beside Temporal -------------------------------------------------------------------------------------------------


async def _temporal(job: Job) -> list[Row]:
    """The same steps as a saga of ours on SQLite, full, and as a workflow of Temporal's own, on one of its servers."""
    from benchmarks.temporal_order import served

    seconds = 0.02 if job.quick else 0.2
    with stage("sqlite full") as (store, _):
        ours = _adurable(store)
        try:
            dev = job.group == "temporal, dev server"
            async with served(dev=dev) as theirs:
                return [
                    await _abeside(
                        job, _at_once(crowded), {"us": (ours, crowded, seconds), "peer_us": (theirs, crowded, seconds)}
                    )
                    # The server for tests is for one test at a time.
                    for crowded in (AT_ONCE if dev and not job.quick else AT_ONCE[:1])
                ]
        finally:
            await _end(store)


# -- recovery --------------------------------------------------------------------------------------------------------

_ended: list[float] = []


def note(order: str) -> str:
    """The last step of a saga that is gone on with."""
    _ended.append(perf_counter())
    return "parcel"


def unnote(order: str, sku: str) -> None:
    """The last compensation of a saga that is undone."""
    _ended.append(perf_counter())


def orphaned_body(saga: Any, order: str) -> str:
    """The body of those that go on forward."""
    saga.step(reserve, order, "sku-1", compensate=release)
    saga.step(charge, order, 990, compensate=refund)
    parcel: str = saga.step(note, order, compensate=None)
    return parcel


def _dying(name: str, store: Any) -> tuple[Call, Call]:
    """What leaves an orphan of each kind: a durable one, and a block. Their store cuts them off at the last step."""
    from resilient import DurableSaga, Saga

    run = DurableSaga(name, store=store)(orphaned_body)

    def dying_block(key: str) -> None:
        with Saga("orphaned block", id=key, store=store) as saga:
            saga.step(reserve, key, "sku-1", compensate=unnote)
            saga.step(charge, key, 990, compensate=refund)
            saga.step(ship, key, compensate=None)

    return (lambda key: run(key, id=key)), dying_block


def orphans(store: Any, number: int) -> None:
    """Leave so many sagas that had begun their second step when their process died, of both kinds in turn."""
    from resilient import stores
    from resilient.stores import Abandon, Append, Begin

    listener = _Listener(stores.open("memory://"))
    scripts: list[tuple[str, list[Any]]] = []
    for place in _dying("orphaned order", listener):
        listener.asked.clear()
        key = keys(1)[0]
        place(key)
        scripts.append((key, [op for op in listener.asked if type(op) in (Begin, Append)][:2]))
    from resilient._book import stored_key

    for at in range(number):
        old, (begin, append) = scripts[at % 2]
        (key,) = keys(1)
        saga = "orphaned block" if at % 2 else "orphaned order"
        stored = stored_key(saga, key)
        owner = f"{at:032x}.1"
        label = begin.label.replace(old, key)
        first = begin.entry.replace(old.encode(), key.encode())
        reply = store.execute(Begin(stored, owner, begin.lease, first, label))
        second = append.entry.replace(old.encode(), key.encode())
        store.execute(Append(stored, owner, reply.fence, 1, second, append.lease))
        store.execute(Abandon(stored, owner, reply.fence))


def _recovery(job: Job) -> list[Row]:
    """Seconds until all are finished, and what the first and the last tenth of them took each, by durability."""
    return [_recovered(job, durability) for durability in RECOVERIES]


def _recovered(job: Job, durability: Any) -> Row:
    from resilient import DurableSaga, stores
    from resilient.sagas import recover

    number = 100 if job.quick else ORPHANS
    series: Series = {"seconds": [], "first_us": [], "last_us": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sagas.db"
        # How fast the dead wrote what they left does not matter.
        before = stores.SQLiteStore(path, durability="normal")
        orphans(before, number)
        before.close()
        store: Any = stores.SQLiteStore(path, durability=durability)
        DurableSaga("orphaned order", store=store)(orphaned_body)
        _ended.clear()
        gc.collect()
        began = perf_counter()
        report = recover(store)
        series["seconds"].append(perf_counter() - began)
        store.close()
    if (len(report.finished), len(report.compensated)) != (number // 2, number // 2) or len(_ended) != number:
        raise AssertionError(f"of {number}: {report}")
    tenth = number // 10
    _ended.sort()
    series["first_us"].append((_ended[tenth - 1] - _ended[0]) / (tenth - 1) * 1e6)
    series["last_us"].append((_ended[-1] - _ended[-tenth]) / (tenth - 1) * 1e6)
    return _row(job, f"{ORPHANS:,} orphans, {durability}" if not job.quick else f"some orphans, {durability}", series)
