"""A process that forks workers, kills them at random moments, starts others, and says what became of their calls.

    python -m tests._kill_child URL --kills 20 --seed 7

Workers call one idempotent function, several at a time with the same keys, as threads and as tasks; its effect is a
line in a file. They announce each step on a pipe, and are killed (SIGKILL) after a random number of steps and a little
spin. Then keys in doubt are settled, one worker at a time and killed as well, by asking the file. Nothing sleeps, and
the process that forks has no threads and no store: so a new worker costs some milliseconds. Prints a report as JSON.
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

from resilient import RERUN, Idempotent, InDoubt, claim, stores
from resilient.clock import Rng, SystemClock, system_rng
from resilient.stores._ops import Scan
from tests._proofs import Fatal

__all__ = ["supervise"]

KEYS = 2
WORKERS = 3
STEPS = 9
LEASE = 0.1
SILENCE = 60.0
_CLOCK = SystemClock()


class Ledger:
    """What happened outside: a file to which every process appends whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)

    def add(self, *words: str) -> None:
        os.write(self._file, (" ".join(words) + "\n").encode())

    def lines(self, kind: str) -> list[list[str]]:
        return [line.split()[1:] for line in self.path.read_text().splitlines() if line.split()[0] == kind]

    def close(self) -> None:
        os.close(self._file)


class Telling(Fatal):
    """A store whose steps are announced on a pipe: one letter for each."""

    def __init__(self, store: Any, pipe: int) -> None:
        super().__init__(store, -1)
        self._pipe = pipe

    def step(self, name: str) -> None:
        os.write(self._pipe, _LETTERS[name].encode())


_LETTERS = {
    "before Claim": "c",
    "after Claim": "C",
    "before the effect": "e",
    "after the effect": "E",
    "before Finish": "f",
    "after Finish": "F",
    "before Release": "r",
    "after Release": "R",
    "before Abandon": "a",
    "after Abandon": "A",
    "before the answer": "g",
    "asked": "q",
}
_NAMES = {letter: name for name, letter in _LETTERS.items()}


class Worker:
    """What a forked process does: call the function with each key, and write down what it got."""

    def __init__(self, url: str, ledger: Ledger, pipe: int, settle: bool) -> None:
        self.ledger, self.settle = ledger, settle
        self.store = Telling(stores.open(url), pipe)
        self._numbers = 0

    def charge(self, order: str) -> str:
        """The effect. What it returns is another each time."""
        self._numbers += 1
        token = f"{order}:{os.getpid()}:{self._numbers}"
        self.ledger.add("began", order, token, str(claim().attempt))
        self.store.step("before the effect")
        self.ledger.add("effect", order, token)
        self.store.step("after the effect")
        return token

    def reconcile(self, order: str) -> Any:
        found = [token for key, token in self.ledger.lines("effect") if key == order]
        self.store.step("asked")
        return found[0] if found else RERUN

    @property
    def policy(self) -> Idempotent:
        in_doubt: Any = self.reconcile if self.settle else "raise"
        # A lease this short may well end while its owner lives, on a machine that is busy: nothing must hang on that.
        return Idempotent(self.store, key="order", lease=LEASE, in_doubt=in_doubt, name="charge")

    def work(self, keys: list[str]) -> None:
        charge = self.policy(self.charge)
        for key in keys:
            try:
                token = charge(key)
            except InDoubt:
                self.ledger.add("doubt", key)
            else:
                self.ledger.add("got", key, token)
            self.store.step("before the answer")

    async def awork(self, keys: list[str]) -> None:
        @self.policy
        async def charge(order: str) -> str:
            return self.charge(order)

        for key in keys:
            try:
                token = await charge(key)
            except InDoubt:
                self.ledger.add("doubt", key)
            else:
                self.ledger.add("got", key, token)
            self.store.step("before the answer")

    def check(self, keys: list[str]) -> None:
        """Without anybody being killed: each key has its result, for good."""
        before = len(self.ledger.lines("began"))
        charge = self.policy(self.charge)
        for key in keys:
            self.ledger.add("final", key, charge(key))
            page = self.store.store.execute(Scan(text=f'"key":"{key}"'))
            assert [record.state for record in page.records] == ["done"], page
        assert len(self.ledger.lines("began")) == before, "the function ran again"
        self.store.store.close()


class Child:
    """A worker, as seen from outside."""

    def __init__(self, pid: int, pipe: int, number: int, countdown: int) -> None:
        self.pid, self.pipe, self.number, self.countdown = pid, pipe, number, countdown
        self.last = "its start"


class Supervisor:
    """Forks, kills, and counts."""

    def __init__(self, url: str, kills: int, seed: int) -> None:
        self.url, self.quota = url, kills
        seeded: Any = system_rng()
        seeded.seed(seed)
        self.rng: Rng = seeded
        self.kills = self.keys = self.doubts = self.effects = self.answers = self.batches = 0
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
            "keys": self.keys,
            "in doubt": self.doubts,
            "effects": self.effects,
            "answers": self.answers,
            "seconds": round(_CLOCK.now() - began, 1),
            "points": dict(self.points.most_common()),
            "faults": self.faults,
        }

    def _batch(self, ledger: Ledger) -> None:
        keys = [f"{self.batches}-{number}" for number in range(KEYS)]
        self._phase(ledger, keys, WORKERS, "work")
        doubtful = {key for (key,) in ledger.lines("doubt")}
        self._phase(ledger, keys, 1, "settle")
        self._phase(ledger, keys, 1, "check")
        self.keys += len(keys)
        self.doubts += len(doubtful)
        self._judge(ledger, keys)
        ledger.close()
        ledger.path.unlink()

    def _judge(self, ledger: Ledger, keys: list[str]) -> None:
        effects = Counter(key for key, _ in ledger.lines("effect"))
        final = dict(ledger.lines("final"))
        self.effects += effects.total()
        for key in keys:
            if effects[key] != 1:
                self.faults.append(f"{key}: {effects[key]} effects")
            if key not in final:
                self.faults.append(f"{key}: never ended")
        for key, token in ledger.lines("got"):
            self.answers += 1
            if final.get(key) != token:
                self.faults.append(f"{key}: somebody got {token}, and later {final.get(key)}")
        for key, token in final.items():
            if [key, token] not in ledger.lines("effect"):
                self.faults.append(f"{key}: {token} was never the effect")
        if self.faults:
            self.faults.append(ledger.path.read_text())

    def _phase(self, ledger: Ledger, keys: list[str], workers: int, what: str) -> None:
        children = {child.pipe: child for child in (self._fork(ledger, keys, n, what) for n in range(workers))}
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
                    child.last = _NAMES[chr(told[-1])]
                    child.countdown -= len(told)
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
                    fresh = self._fork(ledger, keys, child.number, what)
                    children[fresh.pipe] = fresh
                elif status:
                    self.faults.append(f"{what}: a worker ended with {status}")

    def _fork(self, ledger: Ledger, keys: list[str], number: int, what: str) -> Child:
        # Now and then in another order; mostly the same keys at the same time.
        order = sorted(keys, key=lambda _: self.rng.random()) if self.rng.random() < 0.3 else keys
        as_task = self.rng.random() < 0.4
        countdown = 1 + int(self.rng.random() * STEPS)
        ours, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            _in_child(self.url, ledger, theirs, order, what, as_task)
        os.close(theirs)
        return Child(pid, ours, number, countdown)


def _in_child(url: str, ledger: Ledger, pipe: int, keys: list[str], what: str, as_task: bool) -> NoReturn:
    status = 1
    try:
        worker = Worker(url, ledger, pipe, what == "settle")
        if what == "check":
            worker.check(keys)
        elif as_task:
            asyncio.run(worker.awork(keys))
        else:
            worker.work(keys)
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

    @Idempotent("memory://", key="order")
    async def charge(order: str) -> str:
        return order

    asyncio.run(charge("warm"))
    store.close()
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
