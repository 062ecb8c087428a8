"""The `Idempotency-Key` header for ASGI applications (FastAPI, Starlette, Litestar, Django, …), under asyncio and trio.

Promises: of requests with one key the application sees one, and everyone gets its response. The last part of a response
leaves only after the response is stored, so that no client has seen the end of one that the store does not know. Does
not make what is outside the application happen once (`claim().derive` helps). Costs two round trips to the store for a
first request, one for a replay; bodies are held in memory up to the limits. Safe from any loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from resilient._drive import Outcome, Program, adrive
from resilient._once import current
from resilient.errors import InDoubt, ResilientError, StoreError
from resilient.integrations._halves import NO_CALL, STARTED, KeyedTasks, first_half, second_half
from resilient.integrations._http import Answer, Recorder, Request, joined

__all__ = ["IdempotencyMiddleware", "Request"]

Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"

# By these the body would go past us.
PAST = frozenset({"http.response.pathsend", "http.response.zerocopysend", "http.response.trailers"})


class IdempotencyMiddleware(KeyedTasks):
    """Let requests that repeat an `Idempotency-Key` get the response of the first, and the application see that alone.

    `store` is a store for coroutines, or the URL of one. See `docs/how-to/http.md` for the options, what clients get to
    see, and what is stored. `scope`, `paths` and `fingerprint` may be functions of a `Request`. Other methods, other
    paths, WebSockets and lifespan messages pass untouched. Live numbers: `replays`, `waits`, `in_doubts`, `lost`,
    `unprotected`.
    """

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in self.methods:
            await self.app(scope, receive, send)
            return
        query = scope.get("query_string", b"").decode("latin-1")
        request = Request(scope["method"], scope["path"], query, joined(scope["headers"]), scope)
        key = self._key(request)
        if key is None:
            await self.app(scope, receive, send)
            return
        if isinstance(key, Answer):
            await _reply(send, key)
            return
        body = await self._body(request, receive)
        if isinstance(body, Answer):
            await _reply(send, body)
            return
        if body is None:
            return
        request.body = body
        await self._guarded(scope, receive, send, request, self._program(request, key))

    async def _body(self, request: Request, receive: Receive) -> bytes | Answer | None:
        """The body, or why the request is refused; None if the client left."""
        declared = request.headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared) > self.max_request
        body, more = bytearray(), True
        while more and not too_large:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self.max_request
        return self._problems.too_large(self.max_request) if too_large else bytes(body)

    async def _guarded(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send, request: Request, program: Program
    ) -> None:
        outer = current.get()
        try:
            try:
                outcome = await adrive(first_half(program), self.store, self.env, NO_CALL, (), {})
                answer = None if outcome is STARTED else self._replay(outcome)
            except ResilientError as error:
                answer = self._refusal(error)
            if answer is not None:
                await _reply(send, answer)
                return
            exchange = _Exchange(self, program, request.body, receive, send)
            inner = dict(scope)
            if inner.get("extensions"):
                inner["extensions"] = {name: of for name, of in inner["extensions"].items() if name not in PAST}
            await exchange.run(inner)
        finally:
            # The second half may have run in a task of the application: what is set here is still set.
            current.set(outer)
            program.close()


class _Exchange:
    """One request that is the application's to answer."""

    def __init__(
        self, middleware: IdempotencyMiddleware, program: Program, body: bytes, receive: Receive, send: Send
    ) -> None:
        self._middleware, self._program = middleware, program
        self._receive, self._send = receive, send
        self._body: bytes | None = body
        self._recorder = Recorder(middleware.max_response)
        self._start: Message = {}
        self._begun = self._ended = False
        self._failure: ResilientError | None = None

    async def run(self, scope: MutableMapping[str, Any]) -> None:
        try:
            await self._middleware.app(scope, self.receive, self.send)
        except GeneratorExit:
            raise  # Nothing can be awaited any more: the key is in doubt when its lease ends.
        except BaseException as error:
            if not self._ended:
                await self._end(self._middleware._broken(error, self._recorder, self._begun))
            raise
        if not self._ended:
            # It came back without the end of a response: something was done, and nobody will see what.
            await self._end(Outcome(self._recorder.answer(whole=False), None))
        if self._failure is not None:
            raise self._failure  # The server breaks the response off.

    async def receive(self) -> Message:
        """The body that was read, then what comes from the server: the news that the client left."""
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Pass the response on, but for its end, which waits until it is stored."""
        if message["type"] == "http.response.start" and not self._ended:
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.get("headers", ())]
            self._recorder.start(message["status"], headers)
            self._start = message
            return
        if message["type"] != "http.response.body" or not self._recorder.started or self._ended:
            await self._send(message)
            return
        if message.get("more_body", False):
            chunk = self._recorder.add(message.get("body", b""))
            if chunk is not None:
                await self._pass(chunk, True)
            return
        tail = self._recorder.last(message.get("body", b""))
        try:
            await self._end(Outcome(self._recorder.answer(whole=True), None))
        except (StoreError, InDoubt) as error:
            # The application did its part, and is not to blame: it goes on in peace.
            if self._begun:
                self._failure = error
            else:
                await _reply(self._send, self._middleware._problems.failed(error, ran=True))
            return
        await self._pass(tail, False)

    async def _pass(self, body: bytes, more: bool) -> None:
        if not self._begun:
            self._begun = True
            await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _end(self, outcome: Outcome) -> None:
        """Store how it ended. Raises what prevents that, or the cancel that came meanwhile."""
        self._ended = True
        store, env = self._middleware.store, self._middleware.env
        outcome = await adrive(second_half(self._program, outcome), store, env, NO_CALL, (), {})
        if outcome.error is not None:
            outcome.result()


async def _reply(send: Send, answer: Answer) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.wire_headers()})
    await send({"type": "http.response.body", "body": answer.body})
