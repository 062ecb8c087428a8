"""A process that forks workers, kills them at random moments, starts others, and says what became of their sagas.

    python -m tests._saga_child URL --kills 20 --seed 7

Workers run durable sagas (plain and async, with groups and failing steps) and blocks, several at a time with the same
ids, and recover what they find. Effects and compensations are lines in a file. They announce each step on a pipe, and
are killed (SIGKILL) after a random number of steps and a little spin. Then what is left is recovered, one worker at a
time and killed as well. Nothing sleeps, and the process that forks has no threads and no store. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from resilient import DurableSaga, Retry, Saga, SagaAborted, SagaError, sagas, stores
from resilient.clock import Rng, SystemClock, system_rng
from resilient.errors import IdempotencyError
from resilient.saga import branch
from resilient.stores._ops import Renew, Scan
from tests._kill_child import Child, Ledger

__all__ = ["supervise"]

WORKERS = 3
LAST = 4
STEPS = 16
LEASE = 0.4
SILENCE = 60.0
KINDS = ("plain", "async", "block")
RETRIES = Retry(OSError, attempts=2, wait=0, name="compensation")
_CLOCK = SystemClock()
_NAMES = [
    f"{when} {name}"
    for name in ("History", "Begin", "Append", "Finish", "Claim", "Release", "Abandon", "Scan", "step", "compensation")
    for when in ("before", "after")
] + ["its answer"]
_LOOKS = {65 + _NAMES.index(f"{when} {name}") for when in ("before", "after") for name in ("History", "Scan")}
_LETTERS = {name: bytes([65 + number]) for number, name in enumerate(_NAMES)}


class Boom(Exception):
    """What a step fails with."""


class Place:
    """Where a worker is: its ledger, and the pipe on which it announces its steps."""

    ledger: Any = None
    pipe = -1

    def step(self, name: str) -> None:
        os.write(self.pipe, _LETTERS[name])


here = Place()


class Telling:
    """A store whose steps are announced."""

    def __init__(self, store: Any) -> None:
        self.store = store
        if hasattr(store, "watch"):
            self.watch = store.watch

    def execute(self, op: Any) -> Any:
        if isinstance(op, Renew):
            return self.store.execute(op)
        here.step(f"before {type(op).__name__}")
        answer = self.store.execute(op)
        here.step(f"after {type(op).__name__}")
        return answer

    async def aexecute(self, op: Any) -> Any:
        if isinstance(op, Renew):
            return await self.store.aexecute(op)
        here.step(f"before {type(op).__name__}")
        answer = await self.store.aexecute(op)
        here.step(f"after {type(op).__name__}")
        return answer

    async def aclose(self) -> None:
        aclose = getattr(self.store, "aclose", None)
        if aclose is not None:
            await aclose()


def act(id: str, number: int, fails: int) -> str:  # noqa: A002 - the saga's
    """A step."""
    here.step("before step")
    here.ledger.add("act", id, str(number))
    here.step("after step")
    if number == fails:
        raise Boom
    return f"{id} {number}"


def unact(id: str, number: int, fails: int) -> None:  # noqa: A002
    """A compensation."""
    here.step("before compensation")
    here.ledger.add("unact", id, str(number))
    here.step("after compensation")


async def aact(id: str, number: int, fails: int) -> str:  # noqa: A002
    """A step."""
    return act(id, number, fails)


async def aunact(id: str, number: int, fails: int) -> None:  # noqa: A002
    """A compensation."""
    unact(id, number, fails)


def plain(saga: Any, id: str, fails: int) -> str:  # noqa: A002
    """The body."""
    saga.step(act, id, 1, fails, compensate=unact)
    saga.parallel(*[branch(act, id, number, fails, compensate=unact) for number in (2, 3)])
    got: str = saga.step(act, id, LAST, fails, compensate=unact)
    return got


async def aplain(saga: Any, id: str, fails: int) -> str:  # noqa: A002
    """The body, as a coroutine."""
    await saga.step(aact, id, 1, fails, compensate=aunact)
    await saga.parallel(*[branch(aact, id, number, fails, compensate=aunact) for number in (2, 3)])
    got: str = await saga.step(aact, id, LAST, fails, compensate=aunact)
    return got


class Worker:
    """What a forked process does."""

    def __init__(self, url: str, ledger: Ledger, pipe: int) -> None:
        here.ledger, here.pipe = ledger, pipe
        self.store = Telling(stores.open(url))
        options: Any = {"store": self.store, "lease": LEASE, "retries": RETRIES, "attempts": 10_000}
        self.plain = DurableSaga("plain", **options)(plain)
        self.aplain = DurableSaga("async", **options)(aplain)

    def work(self, jobs: list[tuple[str, str, int]]) -> None:
        for kind, name, fails in jobs:
            self._ended(kind, name, fails)
        self._recover()

    def settle(self, jobs: list[tuple[str, str, int]]) -> None:
        until = _CLOCK.now() + SILENCE
        while any(one.state in ("running", "compensating", "orphaned") for one in sagas.list_sagas(self.store)):
            assert _CLOCK.now() < until, "it never came to its end"
            self._recover()

    def check(self, jobs: list[tuple[str, str, int]]) -> None:
        """Without anybody being killed: each durable saga has its end, for good, and so has each block that began."""
        for kind, name, fails in jobs:
            if kind != "block":
                self._ended(kind, name, fails)
            try:
                state = sagas.show(self.store, name, name=kind).record.state
            except LookupError:
                state = "none"
            here.ledger.add("state", name, state)
        self.store.store.close()

    def _recover(self) -> None:
        report = sagas.recover(self.store, retries=RETRIES, lease=LEASE)
        for name, why in report.left.items():
            here.ledger.add("left", name, why.replace(" ", "_"))

    def _ended(self, kind: str, name: str, fails: int) -> None:
        try:
            if kind == "plain":
                got = self.plain(name, fails, id=name)
            elif kind == "async":
                got = asyncio.run(self._async(name, fails))
            else:
                with Saga("block", id=name, store=self.store, lease=LEASE, retries=RETRIES) as saga:
                    got = plain(saga, name, fails)
            here.ledger.add("got", name, got.replace(" ", "_"))
        except SagaAborted:
            here.ledger.add("aborted", name)
        except (SagaError, IdempotencyError) as error:
            # A block is for one process; or this one has lost its lease.
            here.ledger.add("lost" if type(error).__name__ == "SagaLost" else "refused", name)
        here.step("its answer")

    async def _async(self, name: str, fails: int) -> str:
        try:
            got: str = await self.aplain(name, fails, id=name)
            return got
        finally:
            await self.store.aclose()


class Supervisor:
    """Forks, kills, and counts."""

    def __init__(self, url: str, kills: int, seed: int) -> None:
        self.url, self.quota = url, kills
        seeded: Any = system_rng()
        seeded.seed(seed)
        self.rng: Rng = seeded
        self.kills = self.sagas = self.done = self.undone = self.effects = self.batches = self.lost = 0
        self.points: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self) -> dict[str, Any]:
        began = _CLOCK.now()
        with tempfile.TemporaryDirectory() as place:
            while self.kills < self.quota and not self.faults:
                self._batch(Ledger(Path(place) / f"{self.batches}.ledger"))
                self.batches += 1
        return {
            "kills": self.kills,
            "sagas": self.sagas,
            "done": self.done,
            "undone": self.undone,
            "effects": self.effects,
            "lost": self.lost,
            "seconds": round(_CLOCK.now() - began, 1),
            "points": dict(self.points.most_common()),
            "faults": self.faults,
        }

    def _batch(self, ledger: Ledger) -> None:
        jobs = [
            (kind, f"{self.batches}-{kind}", int(self.rng.random() * (LAST + 1)) if self.rng.random() < 0.6 else 0)
            for kind in KINDS
        ]
        self._phase(ledger, jobs, WORKERS, "work")
        self._phase(ledger, jobs, 1, "settle")
        self._phase(ledger, jobs, 1, "check")
        self.sagas += len(jobs)
        for _, name, fails in jobs:
            self._judge(ledger, name, fails)
        for name, why in ledger.lines("left"):
            self.faults.append(f"{name} was left: {why}")
        if self.faults:
            self.faults.append(ledger.path.read_text())
        ledger.close()
        ledger.path.unlink()

    def _judge(self, ledger: Ledger, name: str, fails: int) -> None:
        lines = [line.split() for line in ledger.path.read_text().splitlines()]
        events = [(line[0], int(line[2])) for line in lines if line[0] in ("act", "unact") and line[1] == name]
        acts = [number for what, number in events if what == "act"]
        unacts = [number for what, number in events if what == "unact"]
        (state,) = [line[2] for line in lines if line[0] == "state" and line[1] == name]
        got = {line[2] for line in lines if line[0] == "got" and line[1] == name}
        said = {line[0] for line in lines if line[0] in ("got", "aborted") and line[1] == name}
        self.effects += len(events)
        if ["lost", name] in lines:
            # It was slow and not dead: what it had in hand may have come late. It is refused, and nothing else.
            self.lost += 1
            return
        if state == "done":
            self.done += 1
            if set(acts) != set(range(1, LAST + 1)) or unacts or fails or "aborted" in said:
                self.faults.append(f"{name} is done, and {events}")
            if got - {f"{name}_{LAST}"}:
                self.faults.append(f"{name}: somebody got {got}")
        elif state == "aborted":
            self.undone += 1
            if "got" in said or not set(acts) <= set(unacts):
                self.faults.append(f"{name} is undone, and {events}")
            if unacts != sorted(unacts, reverse=True):
                self.faults.append(f"{name} was not undone backwards: {events}")
            if unacts and "act" in [what for what, _ in events[events.index(("unact", unacts[0])) :]]:
                self.faults.append(f"{name} went forward again: {events}")
        elif state != "none" or events:
            self.faults.append(f"{name} is {state}, and {events}")

    def _phase(self, ledger: Ledger, jobs: list[Any], workers: int, what: str) -> None:
        children = {child.pipe: child for child in (self._fork(ledger, jobs, n, what) for n in range(workers))}
        while children:
            ready, _, _ = select.select(list(children), [], [], SILENCE)
            if not ready:
                self.faults.append(f"{what}: nothing happened for {SILENCE} s")
                for child in children.values():
                    os.kill(child.pid, signal.SIGKILL)
            for pipe in ready or list(children):
                child = children[pipe]
                told = os.read(pipe, 4096)
                if told:
                    child.last = _NAMES[told[-1] - 65]
                    # Those who wait look again and again, which is no progress.
                    child.countdown -= sum(one not in _LOOKS for one in told)
                if told and (child.countdown > 0 or self.kills >= self.quota or what == "check"):
                    continue
                if told:
                    for _ in range(int(self.rng.random() ** 3 * 20_000)):
                        pass
                    os.kill(child.pid, signal.SIGKILL)
                del children[pipe]
                os.close(pipe)
                _, status = os.waitpid(child.pid, 0)
                if os.WIFSIGNALED(status) and told:
                    self.kills += 1
                    self.points[child.last] += 1
                    fresh = self._fork(ledger, jobs, child.number, what)
                    children[fresh.pipe] = fresh
                elif status:
                    self.faults.append(f"{what}: a worker ended with {status}")

    def _fork(self, ledger: Ledger, jobs: list[Any], number: int, what: str) -> Child:
        order = sorted(jobs, key=lambda _: self.rng.random())
        countdown = 1 + int(self.rng.random() * STEPS)
        ours, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            _in_child(self.url, ledger, theirs, order, what)
        os.close(theirs)
        return Child(pid, ours, number, countdown)


def _in_child(url: str, ledger: Ledger, pipe: int, jobs: list[Any], what: str) -> NoReturn:
    status = 1
    try:
        getattr(Worker(url, ledger, pipe), what)(jobs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _warm(url: str) -> None:
    """Import all that workers need, so that a forked one has it at once."""
    store = stores.open(url)
    store.execute(Scan())
    store.close()
    DurableSaga("warm", store="memory://")(plain)

    async def warm() -> None:
        async with Saga("warm") as saga:
            await saga.parallel(branch(str, compensate=None))

    asyncio.run(warm())
    assert threading.active_count() == 1, "a process with threads must not fork"


def supervise(url: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill workers `kills` times, and report. Only for a process without threads."""
    _warm(url)
    return Supervisor(url, kills, seed).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(supervise(options.url, options.kills, options.seed)))


if __name__ == "__main__":
    main()
