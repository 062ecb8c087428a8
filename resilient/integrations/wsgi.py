"""The `Idempotency-Key` header for WSGI applications (Flask, Django, Bottle, …).

Promises: of requests with one key the application sees one, and everyone gets its response. The last part of a response
leaves only after the response is stored, so that no client has seen the end of one that the store does not know. Does
not make what is outside the application happen once (`claim().derive` helps). Costs two round trips to the store for a
first request, one for a replay; bodies are held in memory up to the limits. Safe from any thread.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from typing import Any

from resilient._drive import Outcome, Program, drive
from resilient.errors import InDoubt, ResilientError, StoreError
from resilient.integrations._halves import NO_CALL, STARTED, Keyed, first_half, second_half
from resilient.integrations._http import Answer, Recorder, Request

__all__ = ["IdempotencyWSGIMiddleware", "Request"]

StartResponse = Callable[..., Callable[[bytes], object]]

_END: Any = object()


class IdempotencyWSGIMiddleware(Keyed):
    """Let requests that repeat an `Idempotency-Key` get the response of the first, and the application see that alone.

    `store` is a store for plain functions, or the URL of one. See `docs/how-to/http.md` for the options, what clients
    get to see, and what is stored. `scope`, `paths` and `fingerprint` may be functions of a `Request`. Other methods
    and paths pass untouched. Live numbers: `replays`, `waits`, `in_doubts`, `lost`, `unprotected`.
    """

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        request = _request(environ)
        key = self._key(request)
        if key is None:
            passed: Iterable[bytes] = self.app(environ, start_response)
            return passed
        if isinstance(key, Answer):
            return _reply(start_response, key)
        body = self._body(environ)
        if isinstance(body, Answer):
            return _reply(start_response, body)
        request.body = body
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        return self._guarded(environ, start_response, self._program(request, key))

    def _body(self, environ: dict[str, Any]) -> bytes | Answer:
        """The body, or why the request is refused."""
        declared = environ.get("CONTENT_LENGTH") or ""
        # PEP 3333 has a length for each body; servers that decode chunks say that theirs ends by itself.
        wanted = int(declared) if declared.isdecimal() else None
        if wanted is None and not environ.get("wsgi.input_terminated"):
            return b""
        most = self.max_request + 1 if wanted is None else wanted
        if wanted is not None and wanted > self.max_request:
            return self._problems.too_large(self.max_request)
        body, read = bytearray(), environ["wsgi.input"].read
        while len(body) < most:
            chunk = read(most - len(body))
            if not chunk:
                break
            body += chunk
        if len(body) > self.max_request:
            return self._problems.too_large(self.max_request)
        return bytes(body) if wanted is None or len(body) == wanted else self._problems.cut_off()

    def _guarded(self, environ: dict[str, Any], start_response: StartResponse, program: Program) -> Iterable[bytes]:
        # In a context of its own: the server may go on with the response in another thread, or serve others meanwhile.
        context = copy_context()
        try:
            outcome = context.run(drive, first_half(program), self.store, self.env, NO_CALL, (), {})
            answer = None if outcome is STARTED else self._replay(outcome)
        except ResilientError as error:
            answer = self._refusal(error)
        if answer is not None:
            return _reply(start_response, answer)
        exchange = _Exchange(self, program, start_response, context.run)
        exchange.begin(environ)
        return exchange


class _Exchange:
    """One request that is the application's to answer: the iterable that the server gets."""

    def __init__(
        self,
        middleware: IdempotencyWSGIMiddleware,
        program: Program,
        start_response: StartResponse,
        within: Callable[..., Any],
    ) -> None:
        self._middleware, self._program, self._within = middleware, program, within
        self._start_response = start_response
        self._recorder = Recorder(middleware.max_response)
        self._line = ""
        self._write: Callable[[bytes], object] | None = None
        self._ended = False
        self._result: Any = ()
        self._source: Iterator[bytes] = iter(())
        self._first: bytes | None = None

    def begin(self, environ: dict[str, Any]) -> None:
        """Call the application, up to the first part of its response that may go out, or to the end."""
        try:
            self._result = self._call(self._middleware.app, environ, self._started)
            if isinstance(self._result, (list, tuple)):
                self._recorder.hold()
            self._source = self._call(iter, self._result)
            self._first = self._next()
        except BaseException:
            self.close()  # The server never gets what it would have to close.
            raise

    def __iter__(self) -> _Exchange:
        return self

    def __next__(self) -> bytes:
        chunk, self._first = self._first, None
        if chunk is None:
            chunk = self._next()
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """The server is done. If that is before the end, then the client has left."""
        try:
            if not self._ended:
                self._end(Outcome(self._recorder.answer(whole=False), None))
        finally:
            close = getattr(self._result, "close", None)
            if close is not None:
                self._within(close)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """A step of the application. If that fails, its request has."""
        try:
            return self._within(function, *args)
        except BaseException as error:
            self._end(self._middleware._broken(error, self._recorder, self._write is not None))
            raise

    def _next(self) -> bytes | None:
        """The next part of the response for the server; None after the last."""
        while not self._ended:
            chunk = self._call(next, self._source, _END)
            if chunk is _END:
                return self._last()
            out = self._recorder.add(chunk) if self._recorder.started else None
            if out:
                self._go()
                return out
        return None

    def _last(self) -> bytes:
        recorder = self._recorder
        if not recorder.started:
            self._end(Outcome(recorder.answer(whole=False), None))
            raise RuntimeError("the application ended its response without a start")
        tail = recorder.last(b"")
        try:
            self._end(Outcome(recorder.answer(whole=True), None))
        except (StoreError, InDoubt) as error:
            if self._write is not None:
                raise  # The server breaks the response off.
            answer = self._middleware._problems.failed(error, ran=True)
            self._start_response(answer.line, answer.headers)
            return answer.body
        self._go()
        return tail

    def _started(self, line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """What the application has for `start_response`."""
        if exc_info is not None:
            try:
                if self._write is not None:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None
        elif self._recorder.started:
            raise AssertionError("the application started its response twice")
        self._line = line
        self._recorder.start(int(line[:3]), list(headers))
        return self._written

    def _written(self, data: bytes) -> None:
        """What `start_response` returned, for applications that write in place of returning."""
        out = self._recorder.add(data)
        if out:
            self._go()(out)

    def _go(self) -> Callable[[bytes], object]:
        """The response may begin."""
        if self._write is None:
            self._write = self._start_response(self._line, self._recorder.headers)
        return self._write

    def _end(self, outcome: Outcome) -> None:
        """Store how it ended. Raises what prevents that."""
        self._ended = True
        middleware = self._middleware
        second = second_half(self._program, outcome)
        outcome = self._within(drive, second, middleware.store, middleware.env, NO_CALL, (), {})
        if outcome.error is not None:
            outcome.result()


def _request(environ: dict[str, Any]) -> Request:
    headers = {name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name[:5] == "HTTP_"}
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            headers[name.replace("_", "-").lower()] = environ[name]
    # WSGI has paths as bytes in disguise (PEP 3333). What is no UTF-8 stays apart from everything else.
    path = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1")
    text = path.decode("utf-8", "backslashreplace")
    return Request(environ["REQUEST_METHOD"], text, environ.get("QUERY_STRING", ""), headers, environ)


def _reply(start_response: StartResponse, answer: Answer) -> list[bytes]:
    start_response(answer.line, answer.headers)
    return [answer.body]
