"""The same saga body on three engines: random programs leave the same ledger, and end in the same way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilient import DurableSaga
from resilient.engines import LocalEngine
from tests import _engines as engines
from tests._engines import conduct, dbos, on_dbos, on_dbos_plain, on_memory, on_memory_plain, on_temporal, serve

_numbers = itertools.count()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for the servers, the workers and the tests of this module."""
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def skipping(runner: asyncio.Runner) -> Iterator[Any]:
    """Temporal's server for tests, and a worker of ours."""
    yield from serve(runner, on_temporal)


@pytest.fixture(scope="module")
def developing(runner: asyncio.Runner) -> Iterator[Any]:
    """Temporal's server for development, and a worker that keeps no workflow in memory: it replays every one."""
    yield from serve(runner, on_temporal, dev=True, max_cached_workflows=0)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: Any) -> Iterator[str]:
    """DBOS on each of its databases."""
    if request.param == "sqlite":
        with dbos(engines.sqlite_url(tmp_path_factory.mktemp("dbos"))):
            yield "sqlite"
        return
    from tests._servers import postgres_database

    with postgres_database(request.getfixturevalue("postgres_url")) as url, dbos(engines.postgres_url(url)):
        yield "postgres"


# -- programs --------------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn, plain: bool = False, hang: bool = True) -> list[dict[str, Any]]:
    """A program of a few steps, one of which may go wrong."""
    names = (f"s{number}" for number in itertools.count(1))
    state = {"trouble": draw(st.sampled_from(["none", "fail", "fail", *(["hang"] if hang else [])])), "pivot": False}

    def step(bad: str | None = None) -> dict[str, Any]:
        how = bad or draw(st.sampled_from(["ok", "ok", "ok", "flaky"]))
        return {
            "kind": "step",
            "name": next(names),
            "how": how,
            "plain": plain or (how != "hang" and draw(st.booleans())),
            "undo": draw(st.sampled_from(["undo", "undo", "undo", "call", "none", "fails"])),
            "register": draw(st.sampled_from(["before", "before", "after"])),
        }

    def group(bad: bool) -> dict[str, Any]:
        name, size = next(names), draw(st.integers(2, 3))
        worst = draw(st.integers(0, size - 1)) if bad else -1
        return {
            "kind": "group",
            "branches": [
                {"name": f"{name}.{place}", "how": "fail" if place == worst else "ok", "undo": draw(st.booleans())}
                for place in range(size)
            ],
        }

    def nodes(depth: int) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for _ in range(draw(st.integers(1, 3))):
            kind = draw(st.sampled_from(["step", "step", "step", *([] if plain else ["group"]), "nest"]))
            if kind == "nest" and depth < 2:
                made.append({"kind": "nest", "name": next(names), "body": nodes(depth + 1)})
            elif kind == "group":
                made.append(group(False))
            else:
                made.append(step())
        return made

    program = nodes(0)
    if state["trouble"] == "hang":
        program.append(step("hang"))
    elif state["trouble"] == "fail":
        if draw(st.integers(0, 3)) == 0:
            program.append({"kind": "pivot"})
        program.append(group(True) if not plain and draw(st.booleans()) else step("fail"))
    return program


def examples(strategy: Any, count: int) -> list[Any]:
    """Examples of a strategy, drawn before DBOS runs: its threads use `random` while Hypothesis looks."""
    found: list[Any] = []

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


PROGRAMS = examples(programs(), 50)
PLAIN_PROGRAMS = examples(programs(plain=True, hang=False), 15)


def run_id() -> str:
    return f"r{next(_numbers)}"


def same_as_here(runner: asyncio.Runner, place: Any, some: list[Any], beside: int = 5) -> None:
    """Run programs here and there, `beside` at a time, and compare."""

    async def one(program: Any) -> None:
        here = await conduct(on_memory, run_id(), program)
        there = await conduct(place, run_id(), program)
        assert there == here, program

    async def run() -> None:
        for first in range(0, len(some), beside):
            async with asyncio.TaskGroup() as group:
                for program in some[first : first + beside]:
                    group.create_task(one(program))

    runner.run(run())


# -- the differential test -------------------------------------------------------------------------------------------


def test_the_programs_are_of_all_kinds() -> None:
    text = repr(PROGRAMS)
    for word in ("hang", "fail", "flaky", "group", "nest", "pivot", "after", "fails", "call", "none"):
        assert f"'{word}'" in text


def test_random_programs_run_the_same_on_temporal(runner: asyncio.Runner, skipping: Any) -> None:
    # One at a time: while one waits for time to pass, this server skips it for all.
    same_as_here(runner, on_temporal, PROGRAMS[:40], beside=1)


def test_random_programs_run_the_same_on_the_development_server_of_temporal(
    runner: asyncio.Runner, developing: Any
) -> None:
    same_as_here(runner, on_temporal, PROGRAMS[40:50])


def test_random_programs_run_the_same_on_dbos(runner: asyncio.Runner, database: str) -> None:
    same_as_here(runner, on_dbos, PROGRAMS[:25] if database == "sqlite" else PROGRAMS[25:])


def test_random_programs_of_plain_functions_run_the_same_on_dbos(runner: asyncio.Runner, database: str) -> None:
    async def here(run: str, program: Any, *, id: str) -> Any:  # noqa: A002
        return on_memory_plain(run, program, id=id)

    async def there(run: str, program: Any, *, id: str) -> Any:  # noqa: A002
        return await asyncio.to_thread(on_dbos_plain, run, program, id=id)

    async def run() -> None:
        for program in PLAIN_PROGRAMS:
            assert await conduct(there, run_id(), program) == await conduct(here, run_id(), program), program

    runner.run(run())


def test_random_programs_run_the_same_on_sqlite(runner: asyncio.Runner, tmp_path: Path) -> None:
    from resilient.stores.sqlite import SQLiteStore

    store = SQLiteStore(tmp_path / "sagas.sqlite")
    durable = DurableSaga("program.sqlite", engine=LocalEngine(store), retries=engines.UNDOING)
    same_as_here(runner, durable(engines.body), PROGRAMS[:20])
    store.close()
