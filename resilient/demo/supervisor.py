"""Starts the services and their client as processes, kills what is to be killed, and leaves nothing behind.

    async with Services(schedule, orders, guarded=True) as services:
        services.begin()
        await services.served()

Each service has a free port for the whole run. However this process ends, its children see their input end and exit;
leaving the block kills and awaits them and removes their files. For asyncio; one task uses it at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from resilient.clock import SystemClock
from resilient.demo.orders import Order
from resilient.demo.schedule import SERVICES, Schedule
from resilient.demo.services import LOOPBACK, bound
from resilient.demo.trades import opening
from resilient.demo.worker import JOB, JOURNAL, Job, books_of

__all__ = ["CLIENT", "ServiceFailed", "Services"]

START_WITHIN = 30.0
CLIENT = "client"
PAUSE = 0.3
"""Seconds from the end of a client to the begin of the next."""
_SERVICE = "import sys; from resilient.demo.services import main; main(sys.argv[1:])"
_CLIENT = "import os, sys; from resilient.demo.worker import main; main(sys.argv[1], 0, os._exit)"


class ServiceFailed(RuntimeError):
    """A service or the client could not be started, or the client failed; the text is what it said last."""


class Services:
    """The four services of one run, and the client that places `orders` with them.

    `urls` tells where the services are; `downs` counts crashes, by service, and how often the client was killed. Those
    who come after it are started with it, and wait: a start takes its time, and the machine has work to do then.
    """

    def __init__(self, schedule: Schedule, orders: Sequence[Order] = (), guarded: bool = False) -> None:
        self.schedule, self.orders, self.guarded = schedule, orders, guarded
        self.began = 0.0
        self.urls: dict[str, str] = {}
        self.downs = dict.fromkeys((*SERVICES, CLIENT), 0)
        self.up = dict.fromkeys((*SERVICES, CLIENT), False)
        self.clients = [f"{CLIENT}-{number + 1}" for number in range(len(schedule.kills) + 1)]
        self._clock = SystemClock()
        self._ports: dict[str, socket.socket] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Services:
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="resilient-demo-")))
            self._stack.push_async_callback(self._stop)
            for name in SERVICES:
                port = self._ports[name] = self._stack.enter_context(bound(0))
                self.urls[name] = f"http://{LOOPBACK}:{port.getsockname()[1]}"
            job = Job(self.urls, self.schedule.seconds, self.schedule.patience, self.guarded, list(self.orders))
            (self._folder / JOB).write_bytes(msgspec.json.encode(job))
            self._open()
            async with asyncio.TaskGroup() as group:
                for name in (*SERVICES, *self.clients):
                    group.create_task(self._start(name))
        except BaseExceptionGroup as group:
            await self._stack.aclose()
            raise group.exceptions[0] from None
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def books(self) -> str:
        """The URL of the store of the client's sagas."""
        return books_of(self._folder)

    @property
    def journal(self) -> Path:
        """The file in which the client notes what it does."""
        return self._folder / JOURNAL

    def begin(self) -> None:
        """Second 0 of the schedule is now, for all of them."""
        self.began = self._clock.now()
        for name in SERVICES:
            self._tell(name)
        self._client = asyncio.create_task(self._keep_client())
        self._keepers = [self._client, *(asyncio.create_task(self._keep(name)) for name in SERVICES)]

    async def served(self) -> None:
        """Wait until the client has placed every order. Raises `ServiceFailed` if it came to another end."""
        await asyncio.shield(self._client)

    async def all_up(self) -> None:
        """Wait until no service is down, crashes to come included."""
        for keeper in self._keepers:
            await asyncio.shield(keeper)

    def _open(self) -> None:
        """Begin the ledgers: what is in stock, and whom the services will refuse."""
        flaws = self.schedule.flaws([order.id for order in self.orders])
        for name, lines in opening(self.orders, flaws).items():
            text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
            (self._folder / f"{name}.ledger").write_bytes(text)

    def _command(self, name: str) -> list[object]:
        if name in self.clients:
            return [_CLIENT, self._folder]
        port: int = self._ports[name].getsockname()[1]
        return [_SERVICE, name, port, self.schedule.seed, self.schedule.seconds, self._folder / f"{name}.ledger"]

    async def _start(self, name: str) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            # Not asyncio's: a start that is cancelled half-way must leave a child that can be killed, or none.
            child = self._children[name] = subprocess.Popen(
                [sys.executable, "-c", *map(str, self._command(name))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children in good order
            )
        assert child.stdout is not None
        try:
            line = await asyncio.wait_for(asyncio.to_thread(child.stdout.readline), START_WITHIN)
        except TimeoutError:
            line = b""
        if line != b"ready\n":
            who = self._who(name)
            raise ServiceFailed(f"the {who}{'' if who == CLIENT else ' service'} did not start: {self._said(name)}")

    def _who(self, name: str) -> str:
        return CLIENT if name in self.clients else name

    def _said(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace").strip() or "it said nothing"

    def _tell(self, name: str) -> None:
        pipe = self._children[name].stdin
        assert pipe is not None
        pipe.write(f"begin {self.began!r}\n".encode())
        pipe.flush()
        self.up[self._who(name)] = True

    async def _keep(self, name: str) -> None:
        """Bring `name` up again after its crash, when the schedule says so."""
        crash = self.schedule.crash(name)
        if crash is None:
            return
        await asyncio.to_thread(self._children[name].wait)
        self._gone(name)
        await self._clock.asleep(self.began + crash.end - self._clock.now())
        await self._start(name)
        self._tell(name)

    async def _keep_client(self) -> None:
        """Kill the client when the schedule says so, let another one go on each time, and see the last one through."""
        loop = asyncio.get_running_loop()
        name, code = "", 0
        for name, moment in zip(self.clients, (*self.schedule.kills, math.inf), strict=True):
            self._tell(name)
            child = self._children[name]
            killer = loop.call_later(self.began + moment - self._clock.now(), child.kill)
            try:
                code = await asyncio.to_thread(child.wait)
            finally:
                killer.cancel()
            if code == 0:
                return
            if code != -signal.SIGKILL:
                break
            self._gone(name)
            await self._clock.asleep(PAUSE)
        raise ServiceFailed(f"the client ended with {code}: {self._said(name)}")

    def _gone(self, name: str) -> None:
        _bury(self._children[name])
        self.up[self._who(name)] = False
        self.downs[self._who(name)] += 1

    async def _stop(self) -> None:
        # Nothing is awaited before the last child is gone: whoever interrupts twice cancels this, too.
        for keeper in self._keepers:
            keeper.cancel()
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            _bury(child)
        await asyncio.gather(*self._keepers, return_exceptions=True)


def _bury(child: subprocess.Popen[bytes]) -> None:
    """Take leave of a child that has ended, or is about to."""
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()
