"""Starts the four services as processes, begins their schedule, restarts what crashes, and leaves nothing behind.

    async with Services(schedule) as services:
        services.begin()

Each service has a free port for the whole run. However this process ends, its children see their input end and exit;
leaving the block kills and awaits them and removes their ledgers. For asyncio; one task uses it at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import tempfile
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

from resilient.clock import SystemClock
from resilient.demo.schedule import SERVICES, Schedule
from resilient.demo.services import LOOPBACK, bound

__all__ = ["ServiceFailed", "Services"]

START_WITHIN = 30.0


class ServiceFailed(RuntimeError):
    """A service could not be started; the text is what it said last."""


class Services:
    """The four services of one run. `urls` tells where they are; `downs` counts crashes, by service."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.began = 0.0
        self.urls: dict[str, str] = {}
        self.downs = dict.fromkeys(SERVICES, 0)
        self.up = dict.fromkeys(SERVICES, False)
        self._clock = SystemClock()
        self._ports: dict[str, socket.socket] = {}
        self._children: dict[str, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Services:
        try:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="resilient-demo-")))
            self._stack.push_async_callback(self._stop)
            for name in SERVICES:
                port = self._ports[name] = self._stack.enter_context(bound(0))
                self.urls[name] = f"http://{LOOPBACK}:{port.getsockname()[1]}"
            await asyncio.gather(*map(self._start, SERVICES))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def begin(self) -> None:
        """Second 0 of the schedule is now, for all of them."""
        self.began = self._clock.now()
        for name in SERVICES:
            self._tell(name)
            self._keepers.append(asyncio.create_task(self._keep(name)))

    async def all_up(self) -> None:
        """Wait until no service is down, crashes to come included."""
        for keeper in self._keepers:
            await asyncio.shield(keeper)

    async def _start(self, name: str) -> None:
        port: int = self._ports[name].getsockname()[1]
        schedule = self.schedule
        arguments = [name, port, schedule.seed, schedule.seconds, self._folder / f"{name}.ledger"]
        with (self._folder / f"{name}.log").open("ab") as log:
            child = self._children[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", "import sys; from resilient.demo.services import main; main(sys.argv[1:])"),
                *map(str, arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children in good order
            )
        assert child.stdout is not None
        try:
            line = await asyncio.wait_for(child.stdout.readline(), START_WITHIN)
        except TimeoutError:
            line = b""
        if line != b"ready\n":
            said = (self._folder / f"{name}.log").read_text(errors="replace").strip()
            raise ServiceFailed(f"the {name} service did not start: {said or 'it said nothing'}")
        self.up[name] = True

    def _tell(self, name: str) -> None:
        pipe: Any = self._children[name].stdin
        pipe.write(f"begin {self.began!r}\n".encode())

    async def _keep(self, name: str) -> None:
        """Bring `name` up again after its crash, when the schedule says so."""
        crash = self.schedule.crash(name)
        if crash is None:
            return
        await self._children[name].wait()
        self.up[name] = False
        self.downs[name] += 1
        await self._clock.asleep(self.began + crash.end - self._clock.now())
        await self._start(name)
        self._tell(name)

    async def _stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        for child in self._children.values():
            await child.communicate()
