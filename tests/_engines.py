"""One saga body that runs programs, on every engine; the servers of the engines; and the ledger that they all keep.

A program is data: steps that succeed, fail, flake or hang, with and without compensations, in groups, nested, before
and after a pivot. Steps and compensations write in the ledger of their saga; engines that run it the same leave
the same.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from resilient import DurableSaga, Retry, SagaAborted, SagaError, SagaStuck
from resilient.engines import DBOSEngine, LocalEngine, TemporalEngine
from resilient.policy import SYSTEM
from resilient.saga import RESULT, branch, call
from resilient.stores.memory import MemoryStore

LEDGERS: defaultdict[str, list[Any]] = defaultdict(list)
BLOCKED: defaultdict[str, Future[None]] = defaultdict(Future)


class Declined(Exception):
    """What failing steps raise."""


class Flaky(Exception):
    """What comes once, and not again."""


# -- steps -----------------------------------------------------------------------------------------------------------


async def act(run: str, name: str, how: str) -> str:
    """A step of the saga `run`."""
    ledger = LEDGERS[run]
    again = ("did", name) in ledger
    ledger.append(("did", name))
    if how == "fail":
        raise Declined(name)
    if how == "flaky" and not again:
        raise Flaky(name)
    if how == "hang":
        BLOCKED[run].set_result(None)
        await asyncio.Event().wait()
    return f"<{name}>"


def act_plain(run: str, name: str, how: str) -> str:
    """The same, in a plain function."""
    ledger = LEDGERS[run]
    again = ("did", name) in ledger
    ledger.append(("did", name))
    if how == "fail":
        raise Declined(name)
    if how == "flaky" and not again:
        raise Flaky(name)
    return f"<{name}>"


async def act_beside(run: str, name: str, how: str, others: int) -> str:
    """A branch of a group. One that fails does so when all others have begun, so that it is the same everywhere."""
    ledger = LEDGERS[run]
    group = name.partition(".")[0]
    ledger.append(("did", name))
    if how == "fail":
        while sum(1 for what, one in ledger if what == "did" and one.startswith(f"{group}.")) <= others:
            await SYSTEM.clock.asleep(0.005)
        raise Declined(name)
    return f"<{name}>"


async def undo(run: str, name: str, how: str, result: str) -> None:
    """The compensation of a step that takes the step's arguments, and its value."""
    LEDGERS[run].append(("undid", name, result or "UNKNOWN"))


def undo_plain(run: str, name: str, how: str, result: str) -> None:
    LEDGERS[run].append(("undid", name, result or "UNKNOWN"))


async def undo_beside(run: str, name: str, how: str, others: int) -> None:
    LEDGERS[run].append(("undid", name))


async def undo_by_call(run: str, value: str, name: str) -> None:
    LEDGERS[run].append(("undid", name, value or "UNKNOWN"))


async def undo_fails(run: str, name: str, how: str) -> None:
    """A compensation that fails for good."""
    LEDGERS[run].append(("cannot undo", name))
    raise Declined(f"undo {name}")


def undo_fails_plain(run: str, name: str, how: str) -> None:
    LEDGERS[run].append(("cannot undo", name))
    raise Declined(f"undo {name}")


# -- the body --------------------------------------------------------------------------------------------------------

AGAIN = Retry(Flaky, attempts=2, wait=0)


def _undoing(run: str, node: dict[str, Any], plain: bool) -> Any:
    kind = node["undo"]
    if kind == "call" and not plain:
        return call(undo_by_call, run, RESULT, name=node["name"])
    if kind == "fails":
        return undo_fails_plain if plain else undo_fails
    if kind == "none":
        return None
    return undo_plain if plain else undo


async def body(saga: Any, run: str, program: list[dict[str, Any]]) -> list[str]:
    """Run a program."""
    values: list[str] = []
    for node in program:
        kind = node["kind"]
        if kind == "pivot":
            saga.pivot()
        elif kind == "nest":
            async with saga.nested(node["name"]) as child:
                values += await body(child, run, node["body"])
        elif kind == "group":
            others = len(node["branches"]) - 1
            values += await saga.parallel(
                *[
                    branch(
                        act_beside,
                        run,
                        one["name"],
                        one["how"],
                        others,
                        compensate=undo_beside if one["undo"] else None,
                    )
                    for one in node["branches"]
                ]
            )
        else:
            values.append(
                await saga.step(
                    act_plain if node["plain"] else act,
                    run,
                    node["name"],
                    node["how"],
                    compensate=_undoing(run, node, node["plain"]),
                    register=node["register"],
                    retry=AGAIN if node["how"] == "flaky" else None,
                )
            )
    return values


def body_plain(saga: Any, run: str, program: list[dict[str, Any]]) -> list[str]:
    """The same for plain functions, without groups."""
    values: list[str] = []
    for node in program:
        kind = node["kind"]
        if kind == "pivot":
            saga.pivot()
        elif kind == "nest":
            with saga.nested(node["name"]) as child:
                values += body_plain(child, run, node["body"])
        else:
            values.append(
                saga.step(
                    act_plain,
                    run,
                    node["name"],
                    node["how"],
                    compensate=_undoing(run, node, True),
                    register=node["register"],
                    retry=AGAIN if node["how"] == "flaky" else None,
                )
            )
    return values


UNDOING = Retry(Exception, attempts=2, wait=0)

# -- engines ---------------------------------------------------------------------------------------------------------


class Place:
    """Where the Temporal client is: tests come and go, the sagas that are decorated stay."""

    client: Any = None


TEMPORAL = TemporalEngine(lambda: Place.client, task_queue="sagas", step_timeout=30.0, heartbeat=1.0)
DBOS_ENGINE = DBOSEngine(patience=0.2)

MEMORY = MemoryStore()

on_temporal: Any = DurableSaga("program", engine=TEMPORAL, retries=UNDOING)(body)
on_dbos: Any = DurableSaga("program", engine=DBOS_ENGINE, retries=UNDOING)(body)
on_dbos_plain: Any = DurableSaga("program.plain", engine=DBOS_ENGINE, retries=UNDOING)(body_plain)
on_memory: Any = DurableSaga("program", engine=LocalEngine(MEMORY), retries=UNDOING)(body)
on_memory_plain: Any = DurableSaga("program.plain", engine=LocalEngine(MEMORY), retries=UNDOING)(body_plain)


def temporal_binary(name: str) -> str:
    """A Temporal server that came as a package."""
    return str(Path(sys.executable).parent / name)


@asynccontextmanager
async def temporal(dev: bool = False) -> AsyncIterator[Any]:
    """A Temporal server on loopback: the one for tests, which skips time, or the one for development."""
    from temporalio.testing import WorkflowEnvironment

    logging.getLogger("temporalio").setLevel(logging.CRITICAL)
    if dev:
        started = WorkflowEnvironment.start_local(dev_server_existing_path=temporal_binary("temporal"), ui=False)
    else:
        started = WorkflowEnvironment.start_time_skipping(
            test_server_existing_path=temporal_binary("temporal-test-server")
        )
    async with await started as environment:
        Place.client = environment.client
        TEMPORAL._client = None
        try:
            yield environment
        finally:
            Place.client = TEMPORAL._client = None


def let_go() -> None:
    """Let Temporal's threads drop what they hold of Python: at the interpreter's end, that can abort it (PyO3)."""
    gc.collect()
    threading.Event().wait(0.3)


def serve(runner: asyncio.Runner, *sagas: Any, dev: bool = False, **options: Any) -> Iterator[Any]:
    """A Temporal server, and a worker for these sagas. To be yielded from by a fixture."""
    server = temporal(dev)
    environment = runner.run(server.__aenter__())
    worker = TEMPORAL.worker(environment.client, *sagas, **options)
    runner.run(worker.__aenter__())
    try:
        yield environment
    finally:
        runner.run(worker.__aexit__(None, None, None))
        runner.run(server.__aexit__(None, None, None))
        del worker, environment, server
        let_go()


@contextmanager
def dbos(url: str) -> Iterator[Any]:
    """DBOS on a database; it lives in this process."""
    from dbos import DBOS

    DBOS.destroy()
    made = DBOS(
        config={
            "name": "tests",
            "system_database_url": url,
            "log_level": "CRITICAL",
            "serializer": DBOSEngine.serializer(),
        }
    )
    DBOS.launch()
    try:
        yield made
    finally:
        DBOS.destroy()


# -- running and comparing -------------------------------------------------------------------------------------------


async def end_of(awaitable: Awaitable[Any]) -> tuple[Any, ...]:
    """How a saga ended, in words that are the same for every engine."""
    try:
        return "done", await awaitable
    except BaseException as error:
        return how(error)


def how(error: BaseException) -> tuple[Any, ...]:
    """The end that an error means."""
    if isinstance(error, SagaStuck):
        if "after its pivot" in error.message:
            return "not back", repr(error.exceptions[0])
        return "stuck", sorted(repr(one) for one in error.exceptions), repr(error.__cause__)
    if isinstance(error, SagaAborted):
        return "aborted", repr(error.__cause__)
    if isinstance(error, asyncio.CancelledError):
        return ("cancelled",)
    if isinstance(error, SagaError):
        raise error
    if any("after its pivot" in note for note in getattr(error, "__notes__", [])):
        return "not back", repr(error)
    raise error


async def conduct(place: Callable[..., Awaitable[Any]], run: str, program: list[dict[str, Any]]) -> Any:
    """Run a program, cancelling it where it hangs, and ask for its end again: both ends, and the ledger."""
    task = asyncio.ensure_future(place(run, program, id=run))
    if hangs(program):
        blocked = asyncio.ensure_future(asyncio.wrap_future(BLOCKED[run]))
        await asyncio.wait([task, blocked], return_when=asyncio.FIRST_COMPLETED)
        if blocked.done():
            task.cancel()
        blocked.cancel()
    end = await end_of(task)
    ledger = list(LEDGERS[run])
    if end[0] == "not back":
        return end, "", folded(ledger)
    again = await end_of(place(run, program, id=run))
    assert LEDGERS[run] == ledger, "a second call ran something"
    return end, again[0], folded(ledger)


def hangs(program: list[dict[str, Any]]) -> bool:
    """Whether a program has a step that never ends by itself."""
    return any(node.get("how") == "hang" or hangs(node.get("body", [])) for node in program)


def folded(ledger: list[Any]) -> list[Any]:
    """A ledger in which the order inside of groups does not count."""
    made: list[Any] = []
    for entry in ledger:
        group, dot, _ = entry[1].partition(".")
        if dot and entry[0] == "did":
            if made and made[-1][0] == group:
                made[-1][1].append(entry)
                made[-1][1].sort()
            else:
                made.append((group, [entry]))
        else:
            made.append(entry)
    return made


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{os.fspath(folder)}/dbos.sqlite"


def postgres_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)
