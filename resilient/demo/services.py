"""The four services, as they run in processes of their own: small, real over HTTP, and unreliable by appointment.

A service binds loopback alone. It lives by its standard input: a line `begin NOW` tells the instant at which the run
began, and the end of the input (its parent is gone, however that happened) ends it at once. It appends what it receives
and does to a ledger file, which outlives its crashes. Its fates come from the schedule, so two runs meet the same; what
it does for a living is in `trades`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from msgspec import json
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from resilient.clock import SystemClock
from resilient.demo.schedule import Schedule
from resilient.demo.trades import TRADES

if TYPE_CHECKING:
    from starlette.requests import Request

    from resilient.clock import Clock

__all__ = ["CRASHED", "LOOPBACK", "Ledger", "Service", "bound", "main", "serve"]

CRASHED = 70  # the exit code of a crash by appointment
LOOPBACK = "127.0.0.1"
HANG = 3600.0


class Ledger:
    """What a service received and did, line by line, in a file; each line is in it before anything else happens.

    `trade` is the service that the ledger is of: it learns from every line, those of an earlier process included.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.received: Counter[str] = Counter()
        self.trade = TRADES[name](self.note)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        for line in self._file.read().splitlines():
            self._take(*json.decode(line))

    def receive(self, order: str) -> int:
        """Note a request for `order`, and say how many came before."""
        before = self.received[order]
        self.note("received", order)
        return before

    def note(self, *line: Any) -> None:
        """Write a line."""
        self._file.write(json.encode(line) + b"\n")
        self._take(*line)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _take(self, word: str, *rest: Any) -> None:
        if word == "received":
            self.received[rest[0]] += 1
        else:
            self.trade.take(word, *rest)


class Service:
    """One service: its routes, its ledger, and its bad days. What it does is in `trades`."""

    def __init__(self, name: str, schedule: Schedule, ledger: Ledger, clock: Clock) -> None:
        self.name, self.schedule, self.ledger, self.clock = name, schedule, ledger, clock
        self.began: float | None = None
        self.app = Starlette(
            routes=[
                Route("/ledger", self._show),
                Route("/orders/{order}", self._order, methods=list(ledger.trade.methods)),
            ]
        )

    def elapsed(self) -> float:
        """The second of the run; before it began, a calm one."""
        return -1.0 if self.began is None else self.clock.now() - self.began

    async def _show(self, request: Request) -> Response:
        return JSONResponse({"received": self.ledger.received, **self.ledger.trade.shown()})

    async def _order(self, request: Request) -> Response:
        order: str = request.path_params["order"]
        try:
            body = await request.body()
        except ClientDisconnect:
            # It was cut off before all of it was here: that is no request.
            return Response("come again\n", 400)
        before = self.ledger.receive(order)
        fate = self.schedule.fate(self.name, self.elapsed(), order, before)
        status, what = 500, None
        if fate.works:
            key = request.headers.get("idempotency-key")
            status, what = self.ledger.trade.act(request.method, order, json.decode(body or b"{}"), key)
        await self.clock.asleep(HANG if fate.hangs else fate.delay)
        if fate.retry_after is not None:
            return Response(
                "come again later\n", fate.status, {"retry-after": self._later(fate.retry_after, fate.as_date)}
            )
        if fate.status != 200:
            return Response("something broke\n", fate.status)
        return JSONResponse(what) if status == 200 else Response(f"{what}\n", status)

    def _later(self, seconds: int, as_date: bool) -> str:
        # A date is in whole seconds, rounded up: never earlier than was asked for.
        return formatdate(self.clock.at() + seconds + 1, usegmt=True) if as_date else str(seconds)


def bound(port: int) -> socket.socket:
    """A socket on a loopback port (0: a free one), not yet listening.

    The parent holds one for the whole run: it keeps the port from others while the service is down, and since it does
    not listen, the kernel refuses connections meanwhile, as with any dead service.
    """
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        made.bind((LOOPBACK, port))
    except OSError:
        made.close()
        raise
    return made


def serve(
    service: Service,
    port: int,
    orders: Iterable[str],
    ready: Callable[[uvicorn.Server], object],
    leave: Callable[[int], object],
) -> None:
    """Serve on `port` until `orders` (the lines of standard input) end; `leave` is how a process exits on the spot."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready(self)

    config = uvicorn.Config(service.app, log_level="error", lifespan="off", timeout_keep_alive=600)
    server = Server(config)

    def obey() -> None:
        for line in orders:
            service.began = float(line.split()[1])
            crash = service.schedule.crash(service.name)
            if crash is not None and service.elapsed() < crash.start:
                threading.Thread(target=fall, args=(crash.start,), daemon=True).start()
        leave(0)

    def fall(second: float) -> None:
        service.clock.sleep(second - service.elapsed())
        leave(CRASHED)

    threading.Thread(target=obey, daemon=True).start()
    server.run(sockets=[bound(port)])


def main(arguments: list[str]) -> None:
    """What a child process runs: `NAME PORT SEED SECONDS LEDGER`."""
    name, port, seed, seconds, path = arguments
    service = Service(name, Schedule(int(seed), float(seconds)), Ledger(Path(path), name), SystemClock())

    def ready(server: object) -> None:
        print("ready", flush=True)

    serve(service, int(port), sys.stdin, ready, os._exit)
