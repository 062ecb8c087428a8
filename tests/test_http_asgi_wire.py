"""The ASGI middleware over real sockets: FastAPI behind uvicorn, and a client that sends everything many times."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import BackgroundTasks, FastAPI, Response
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware

import resilient
from resilient.integrations.asgi import IdempotencyMiddleware
from resilient.stores import MemoryStore
from tests._http import Gate, store_of


@contextmanager
def served(app: Any) -> Iterator[str]:
    """`app` behind uvicorn, on a port of loopback."""
    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready.set()

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    server = Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        assert ready.wait(60)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
    assert not thread.is_alive()


KEY = {"Idempotency-Key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("duplicates", ["wait", "raise"])
@pytest.mark.parametrize("blocking", [False, True])
def test_of_many_requests_at_once_the_application_sees_one(
    kind: str, duplicates: Any, blocking: bool, tmp_path: Path
) -> None:
    effects: list[int] = []

    with store_of(kind, tmp_path) as store:
        gate = Gate(store, 31)
        api = FastAPI()

        if blocking:

            @api.post("/orders", status_code=201)
            def place_in_thread(order: dict[str, int]) -> dict[str, Any]:
                assert gate.full.wait(60)
                effects.append(resilient.fence())  # in a thread of the pool
                return {"order": len(effects), **order}
        else:

            @api.post("/orders", status_code=201)
            async def place(order: dict[str, int]) -> dict[str, Any]:
                assert await asyncio.to_thread(gate.full.wait, 60)
                effects.append(resilient.fence())
                return {"order": len(effects), **order}

        api.add_middleware(IdempotencyMiddleware, store=gate, duplicates=duplicates)

        async def main(url: str) -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                calls = [client.post("/orders", json={"sku": 7}, headers=KEY) for _ in range(32)]
                replies = await asyncio.gather(*calls)
                last = await client.post("/orders", json={"sku": 7}, headers=KEY)
                assert (last.status_code, last.json()) == (201, {"order": 1, "sku": 7})
                assert last.headers["idempotency-replayed"] == "true"
                other = await client.post("/orders", json={"sku": 8}, headers=KEY)
                assert other.status_code == 422
                missing = await client.post("/orders", json={"sku": 7})
                assert missing.status_code == 400
                return replies

        with served(api) as url:
            replies = asyncio.run(main(url))
    assert len(effects) == 1
    if duplicates == "wait":
        assert {(reply.status_code, reply.content) for reply in replies} == {(201, b'{"order":1,"sku":7}')}
        assert sum("idempotency-replayed" in reply.headers for reply in replies) == 31
    else:
        assert sorted(reply.status_code for reply in replies) == [201] + [409] * 31
        assert all(1 <= int(reply.headers["retry-after"]) <= 30 for reply in replies if reply.status_code == 409)


def test_streams_background_tasks_and_other_middleware() -> None:
    done = threading.Event()
    released = threading.Event()
    first_part = threading.Event()
    effects: list[str] = []
    api = FastAPI()

    @api.post("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            effects.append(resilient.claim().key)
            yield b"one "
            assert await asyncio.to_thread(first_part.wait, 60)
            yield b"two"

        return StreamingResponse(parts(), media_type="text/plain")

    @api.post("/background")
    async def background(tasks: BackgroundTasks) -> Response:
        def later() -> None:
            assert released.wait(60)
            done.set()

        tasks.add_task(later)
        return Response(b"begun", 202, {"Set-Cookie": "a=1"})

    async def same(request: Any, call_next: Any) -> Any:
        return await call_next(request)  # It runs what is inside in a task of its own.

    api.add_middleware(BaseHTTPMiddleware, dispatch=same)
    app = IdempotencyMiddleware(api, MemoryStore())

    with served(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/stream", headers=KEY) as reply:
            arriving = reply.iter_bytes()
            assert next(arriving) == b"one "
            first_part.set()
            assert b"".join(arriving) == b"two"
        again = client.post("/stream", headers=KEY)
        assert (again.text, again.headers["idempotency-replayed"]) == ("one two", "true")
        assert effects == [KEY["Idempotency-Key"].strip('"')]

        # The client need not wait for what the application does afterwards.
        reply = client.post("/background", headers=KEY)
        assert (reply.status_code, reply.text) == (202, "begun")
        again = client.post("/background", headers=KEY)
        assert (again.status_code, again.text, again.headers["set-cookie"]) == (202, "begun", "a=1")
        released.set()
        assert done.wait(60)


def test_responses_that_break_off() -> None:
    first_part = threading.Event()
    effects: list[str] = []
    api = FastAPI()

    @api.post("/broken")
    async def broken() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            effects.append("broken")
            yield b"one "
            assert await asyncio.to_thread(first_part.wait, 60)
            raise KeyError("no")

        return StreamingResponse(parts(), media_type="text/plain")

    @api.post("/crash")
    async def crash() -> None:
        effects.append("crash")
        raise KeyError("no")

    api.add_middleware(IdempotencyMiddleware, store=MemoryStore())
    with served(api) as url, httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/broken", headers=KEY) as reply:
            arriving = reply.iter_bytes()
            assert next(arriving) == b"one "
            first_part.set()
            with pytest.raises(httpx.RemoteProtocolError):
                b"".join(arriving)
        again = client.post("/broken", headers=KEY)
        assert (again.status_code, again.json()["first_status"]) == (409, 200)
        assert effects.count("broken") == 1

        assert [client.post("/crash", headers=KEY).status_code for _ in range(2)] == [500, 500]
        assert effects.count("crash") == 2
