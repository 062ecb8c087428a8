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
import subprocess
import sys
import tempfile
from pathlib import Path

from resilient.clock import SystemClock
from resilient.demo.schedule import SERVICES, Schedule
from resilient.demo.services import LOOPBACK, bound

__all__ = ["ServiceFailed", "Services"]

START_WITHIN = 30.0
_CHILD = "import sys; from resilient.demo.services import main; main(sys.argv[1:])"


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
            async with asyncio.TaskGroup() as group:
                for name in SERVICES:
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
            # Not asyncio's: a start that is cancelled half-way must leave a child that can be killed, or none.
            child = self._children[name] = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *map(str, arguments)],
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
            said = (self._folder / f"{name}.log").read_text(errors="replace").strip()
            raise ServiceFailed(f"the {name} service did not start: {said or 'it said nothing'}")
        self.up[name] = True

    def _tell(self, name: str) -> None:
        pipe = self._children[name].stdin
        assert pipe is not None
        pipe.write(f"begin {self.began!r}\n".encode())
        pipe.flush()

    async def _keep(self, name: str) -> None:
        """Bring `name` up again after its crash, when the schedule says so."""
        crash = self.schedule.crash(name)
        if crash is None:
            return
        await asyncio.to_thread(self._children[name].wait)
        _bury(self._children[name])
        self.up[name] = False
        self.downs[name] += 1
        await self._clock.asleep(self.began + crash.end - self._clock.now())
        await self._start(name)
        self._tell(name)

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
