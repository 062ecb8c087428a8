"""The WSGI middleware: in process for every branch; and Flask behind waitress, over real sockets."""

from __future__ import annotations

import contextvars
import importlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import httpx
import pytest
from flask import Flask, request
from flask import Response as FlaskResponse

import resilient
from resilient.errors import InDoubt, StoreError
from resilient.integrations.wsgi import IdempotencyWSGIMiddleware
from resilient.policy import Env
from resilient.stores import Abandon, Claim, Finish, MemoryStore
from resilient.testing import FakeClock
from tests._http import BrokenStore, Gate, problem, store_of


class Reply:
    """What a server has seen of a response, as servers go about it."""

    def __init__(self) -> None:
        self.line = ""
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.error: BaseException | None = None

    def start(self, line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        assert exc_info is None
        assert not self.line, "a response starts once"
        self.line, self.headers = line, {name.lower(): value for name, value in headers}
        return self.parts.append

    @property
    def status(self) -> int:
        return int(self.line[:3])

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def problem(self) -> str:
        return problem(self.status, self.headers, self.body)

    @property
    def replayed(self) -> bool:
        return self.headers.get("idempotency-replayed") == "true"


def environ_of(
    body: bytes = b"{}", key: str | None = '"k"', method: str = "POST", path: str = "/orders", **more: Any
) -> dict[str, Any]:
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
    }
    if key is not None:
        environ["HTTP_IDEMPOTENCY_KEY"] = key
    return {**environ, **more}


def ask(app: Any, body: bytes = b"{}", reply: Reply | None = None, **more: Any) -> Reply:
    """Send a request, and do what a server does with the response; errors are raised after `close`."""
    reply = reply or Reply()
    result = app(environ_of(body, **more), reply.start)
    try:
        for part in result:
            assert reply.line, "a body comes after the start"
            reply.parts.append(part)
    finally:
        if hasattr(result, "close"):
            result.close()
    return reply


class App:
    """An application that answers 201 with the number of the call; or does what `act` says."""

    def __init__(self, act: Callable[[App, Any, Any], Iterable[bytes]] | None = None) -> None:
        self.calls = 0
        self.act = act
        self.bodies: list[bytes] = []

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        self.calls += 1
        if self.act is not None:
            return self.act(self, environ, start_response)
        self.bodies.append(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        start_response("201 Created", [("X-Kind", "order")])
        return [f"order {self.calls}".encode()]


def guarded(app: Any, store: Any = None, **options: Any) -> IdempotencyWSGIMiddleware:
    return IdempotencyWSGIMiddleware(app, store or MemoryStore(), **options)


def patient() -> Env:
    """An environment in which pauses take no time."""
    return Env(clock=FakeClock())


# -- the plain cases -------------------------------------------------------------------------------------------------


def test_the_second_request_gets_the_response_of_the_first() -> None:
    app = App()
    guard = guarded(app)
    first, second = ask(guard), ask(guard)
    assert (first.line, first.body, first.replayed) == ("201 Created", b"order 1", False)
    assert (second.line, second.body, second.replayed) == ("201 Created", b"order 1", True)
    assert second.headers == {"x-kind": "order", "idempotency-replayed": "true"}
    assert (app.calls, app.bodies, guard.replays) == (1, [b"{}"], 1)


def test_what_is_not_guarded_passes_untouched() -> None:
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append((environ, start_response))
        return seen

    guard = guarded(app, paths=lambda request: request.path != "/free", required=False)
    for environ in (environ_of(method="GET"), environ_of(path="/free"), environ_of(key=None)):
        before = dict(environ)
        start = Reply().start
        assert guard(environ, start) is seen
        got = seen.pop()
        assert got[0] is environ
        assert environ == before
        assert got[1] == start


@pytest.mark.parametrize(
    ("options", "request_", "status", "name"),
    [
        ({}, {"key": None}, 400, "missing-key"),
        ({}, {"key": '"a", "b"'}, 400, "malformed-key"),
        ({"strict": True}, {"key": "bare"}, 400, "malformed-key"),
        ({"max_request": 3}, {"body": b"1234"}, 413, "request-too-large"),
        (
            {"max_request": 3},
            {"body": b"1234", "CONTENT_LENGTH": "", "wsgi.input_terminated": True},
            413,
            "request-too-large",
        ),
        ({}, {"body": b"12", "CONTENT_LENGTH": "3"}, 400, "incomplete-request"),
    ],
)
def test_what_is_refused_is_not_run(options: dict[str, Any], request_: dict[str, Any], status: int, name: str) -> None:
    app = App()
    reply = ask(guarded(app, **options), **request_)
    assert (reply.status, reply.problem, app.calls) == (status, name, 0)


class Dribble:
    """A body that comes in small parts."""

    def __init__(self, body: bytes) -> None:
        self.body = io.BytesIO(body)

    def read(self, size: int) -> bytes:
        return self.body.read(min(size, 2))


@pytest.mark.parametrize(
    ("more", "body"),
    [
        ({"CONTENT_LENGTH": "5"}, b"12345"),
        ({"CONTENT_LENGTH": "4"}, b"1234"),
        ({"CONTENT_LENGTH": "0"}, b""),
        ({"CONTENT_LENGTH": "", "wsgi.input_terminated": True}, b"12345"),
        ({"CONTENT_LENGTH": ""}, b""),
    ],
)
def test_the_application_reads_the_body(more: dict[str, Any], body: bytes) -> None:
    app = App()
    given: dict[str, Any] = {"wsgi.input": Dribble(b"12345"), **more}
    ask(guarded(app, max_request=5), **given)
    assert app.bodies == [body]


def test_a_key_belongs_to_one_request() -> None:
    app = App()
    guard = guarded(app)
    ask(guard)
    other = ask(guard, b"{1}")
    assert (other.status, other.problem) == (422, "key-reused")
    assert ask(guard, QUERY_STRING="a=1").status == 422
    assert ask(guard, CONTENT_TYPE="").status == 422
    assert app.calls == 1
    assert ask(guard, path="/refunds").body == b"order 2"
    assert ask(guard, method="PATCH").body == b"order 3"
    # What is no UTF-8 is a path like any other.
    assert [ask(guard, path=path).body for path in ("/\xff", "/\xfe", "/\xff")] == [b"order 4", b"order 5", b"order 4"]


def test_your_functions_see_the_request() -> None:
    seen: list[Any] = []

    def tenant(asked: Any) -> str:
        seen.append((asked.method, asked.path, asked.query, asked.headers, asked.body))
        return str(asked.raw["tenant"])

    app = App()
    guard = guarded(app, scope=tenant)
    more: dict[str, Any] = {"SCRIPT_NAME": "/shop", "QUERY_STRING": "a=1", "path": "/caf\xc3\xa9"}
    assert [ask(guard, tenant=who, **more).body for who in ("ada", "bob", "ada")] == [
        b"order 1",
        b"order 2",
        b"order 1",
    ]
    headers = {"idempotency-key": '"k"', "content-type": "application/json", "content-length": "2"}
    assert seen[0] == ("POST", "/shop/caf\xe9", "a=1", headers, b"{}")


def test_the_claim_is_there_while_the_application_runs_and_nowhere_else() -> None:
    seen: list[Any] = []

    def act(app: App, environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        for part in (b"a", b"b"):
            seen.append(resilient.claim().key)
            yield part

    guard = guarded(App(act))
    result = iter(guard(environ_of(), Reply().start))
    assert next(result) == b"a"
    with pytest.raises(LookupError):
        resilient.claim()
    # Some servers go on with a response in another thread.
    assert contextvars.Context().run(list, result) == [b"b", b""]
    assert seen == ["k", "k"]


def test_duplicates_are_refused_or_wait_while_the_first_runs() -> None:
    store = MemoryStore()
    begun, may = threading.Event(), threading.Event()

    def act(app: App, environ: Any, start_response: Any) -> Iterable[bytes]:
        begun.set()
        assert may.wait(60)
        start_response("200 OK", [])
        return [b"done"]

    app = App(act)
    gate = Gate(store, 2)
    guard, waiting = guarded(app, store, lease=20.5), guarded(app, gate, duplicates="wait")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, guard)
        assert begun.wait(60)
        second = ask(guard)
        assert (second.status, second.problem, second.headers["retry-after"]) == (409, "in-progress", "21")
        assert ask(guarded(app, store, duplicates="wait", max_wait=0)).status == 409
        others = [pool.submit(ask, waiting) for _ in range(2)]
        assert gate.full.wait(60)
        may.set()
        assert first.result().body == b"done"
        assert [other.result().body for other in others] == [b"done", b"done"]
    assert (app.calls, waiting.replays) == (1, 2)


# -- streams ---------------------------------------------------------------------------------------------------------


class Parts:
    """A response in parts, that says when it is closed."""

    def __init__(self, parts: Iterable[bytes], closing: Exception | None = None) -> None:
        self.parts = iter(parts)
        self.closed = 0
        self.closing = closing

    def __iter__(self) -> Iterator[bytes]:
        return self.parts

    def close(self) -> None:
        self.closed += 1
        if self.closing is not None:
            raise self.closing


def streaming(result: Any, *headers: tuple[str, str], status: str = "200 OK") -> App:
    def act(app: App, environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response(status, list(headers))
        made: Iterable[bytes] = result
        return made

    return App(act)


def test_a_stream_reaches_the_client_while_it_is_made() -> None:
    made: list[str] = []

    def parts() -> Iterator[bytes]:
        for part in ("", "one ", "two"):
            made.append(part)
            yield part.encode()

    result = Parts(parts())
    app = streaming(result)
    guard = guarded(app)
    reply = Reply()
    response = guard(environ_of(), reply.start)
    going = iter(response)
    assert going is response
    assert next(going) == b"one "
    assert (reply.status, made) == (200, ["", "one "])
    assert list(going) == [b"two", b""]
    assert list(going) == []
    assert result.closed == 0
    response.close()  # type: ignore[attr-defined]  # pyright: ignore
    assert result.closed == 1
    again = ask(guard)
    assert (again.parts, again.replayed, app.calls) == ([b"one two"], True, 1)


@pytest.mark.parametrize("length", [None, "6"])
def test_the_end_of_a_response_leaves_after_it_is_stored(length: str | None) -> None:
    reply = Reply()
    sent: list[bytes] = []

    class Watching(MemoryStore):
        def execute(self, op: Any) -> Any:
            if type(op) is Finish:
                sent.append(reply.body)
            return super().execute(op)

    app = streaming(Parts([b"ab", b"cd", b"ef"]), *([("Content-Length", length)] if length else []))
    ask(guarded(app, Watching()), reply=reply)
    # With a length, the client would know that these are all.
    assert sent == [b"abcd" if length else b"abcdef"]
    assert reply.body == b"abcdef"


def test_a_response_too_large_to_keep_is_sent_once_and_never_made_again() -> None:
    app = streaming([b"123", b"45"])
    guard = guarded(app, max_response=4)
    assert ask(guard).body == b"12345"
    for _ in range(2):
        again = ask(guard)
        assert (again.status, again.problem, again.replayed) == (409, "response-not-kept", False)
    assert app.calls == 1


def test_applications_may_write() -> None:
    reply = Reply()
    seen: list[bytes] = []

    def act(app: App, environ: Any, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", [("Content-Length", "6")])
        for part in (b"ab", b"cd", b"ef"):
            write(part)
            seen.append(reply.body)
        return []

    app = App(act)
    guard = guarded(app)
    ask(guard, reply=reply)
    assert seen == [b"ab", b"abcd", b"abcd"]
    assert reply.body == b"abcdef"
    assert (ask(guard).body, app.calls) == (b"abcdef", 1)


def test_an_application_may_begin_anew_after_an_error() -> None:
    def act(app: App, environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", "4")])
        try:
            raise KeyError("no")
        except KeyError as error:
            start_response("404 Not Found", [], (KeyError, error, error.__traceback__))
        return [b"gone"]

    guard = guarded(App(act))
    assert [(reply.status, reply.body) for reply in (ask(guard), ask(guard))] == [(404, b"gone")] * 2


def test_it_is_too_late_to_begin_anew_once_something_has_left() -> None:
    def act(app: App, environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"ab"
        try:
            raise KeyError("no")
        except KeyError as error:
            start_response("500 No", [], (KeyError, error, error.__traceback__))
        raise AssertionError("unreachable")

    guard = guarded(App(act))
    reply = Reply()
    with pytest.raises(KeyError):
        ask(guard, reply=reply)
    assert reply.body == b"ab"
    assert ask(guard).problem == "response-not-kept"


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["call", "second start", "iteration"])
def test_an_application_that_fails_before_anything_left_frees_the_key(where: str) -> None:
    results: list[Parts] = []

    def broken() -> Iterator[bytes]:
        yield b"ab"
        raise KeyError("no")

    def act(app: App, environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        if app.calls > 1:
            return [b"ok"]
        if where == "call":
            raise KeyError("no")
        if where == "second start":
            start_response("200 OK", [])
        results.append(Parts(broken()))
        return results[-1]

    guard = guarded(App(act))
    reply = Reply()
    with pytest.raises((KeyError, AssertionError)):
        ask(guard, reply=reply)
    assert (reply.line, reply.body) == ("", b"")
    assert [result.closed for result in results] == ([1] if where == "iteration" else [])
    assert ask(guard).body == b"ok"


@pytest.mark.parametrize(("status", "runs"), [("200 OK", 1), ("500 No", 2)])
def test_a_response_that_breaks_off_is_not_begun_again_unless_it_was_a_failure(status: str, runs: int) -> None:
    def act(app: App, environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response(status, [])
        yield b"ab"
        raise KeyError("no")

    app = App(act)
    guard = guarded(app)
    reply = Reply()
    with pytest.raises(KeyError):
        ask(guard, reply=reply)
    assert reply.body == b"ab"
    if runs == 1:
        assert ask(guard).problem == "response-not-kept"
    else:
        with pytest.raises(KeyError):
            ask(guard)
    assert app.calls == runs


@pytest.mark.parametrize("closing", [None, KeyError("closing")])
def test_a_client_that_leaves_in_the_middle_leaves_a_mark(closing: Exception | None) -> None:
    result = Parts([b"one", b"two"], closing)
    guard = guarded(streaming(result))
    response: Any = guard(environ_of(), Reply().start)
    assert next(response) == b"one"
    if closing is None:
        response.close()
    else:
        with pytest.raises(KeyError):
            response.close()
    assert result.closed == 1
    assert ask(guard).problem == "response-not-kept"


def test_an_application_that_ends_without_a_response_is_not_run_again() -> None:
    app = App(lambda app, environ, start_response: [b"", b"what"])
    guard = guarded(app)
    with pytest.raises(RuntimeError, match="ended its response without a start"):
        ask(guard)
    assert ask(guard).problem == "response-not-kept"
    assert app.calls == 1


def test_a_server_that_refuses_the_response_leaves_a_mark() -> None:
    result = Parts([b"one"])

    def refuse(line: str, headers: Any) -> Any:
        raise ValueError("bad header")

    guard = guarded(streaming(result))
    with pytest.raises(ValueError, match="bad header"):
        guard(environ_of(), refuse)
    assert result.closed == 1
    assert ask(guard).problem == "response-not-kept"


@pytest.mark.parametrize(("in_doubt", "status", "runs"), [("raise", 409, 1), ("rerun", 201, 2)])
def test_a_request_that_is_interrupted_leaves_its_key_in_doubt(in_doubt: Any, status: int, runs: int) -> None:
    def act(app: App, environ: Any, start_response: Any) -> Iterable[bytes]:
        if app.calls == 1:
            raise KeyboardInterrupt
        start_response("201 Created", [])
        return [b"done"]

    app = App(act)
    guard = guarded(app, in_doubt=in_doubt)
    with pytest.raises(KeyboardInterrupt):
        ask(guard)
    second = ask(guard)
    assert (second.status, app.calls) == (status, runs)
    if status == 409:
        assert second.problem == "in-doubt"
        assert "retry-after" not in second.headers


def test_responses_that_are_not_remembered_free_the_key() -> None:
    statuses = ["500 No", "401 Who", "429 Slow", "404 No"]

    def act(app: App, environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response(statuses[app.calls - 1], [])
        return []

    guard = guarded(App(act))
    assert [ask(guard).status for _ in range(6)] == [500, 401, 429, 404, 404, 404]


def test_a_remember_that_raises_leaves_the_key_in_doubt_at_once() -> None:
    def broken(status: int) -> bool:
        raise ZeroDivisionError

    app = App()
    guard = guarded(app, remember=broken)
    with pytest.raises(ZeroDivisionError) as caught:
        ask(guard)
    assert "its key 'k' is in doubt" in caught.value.__notes__[0]
    assert (ask(guard).problem, app.calls) == ("in-doubt", 1)


# -- the store -------------------------------------------------------------------------------------------------------


def test_without_the_store_nothing_runs_unless_one_says_so() -> None:
    app = App()
    reply = ask(guarded(app, BrokenStore(Claim)))
    assert (reply.line, reply.problem, app.calls) == ("503 Service Unavailable", "store-unavailable", 0)
    assert reply.headers["retry-after"] == "1"
    guard = guarded(app, BrokenStore(Claim), on_store_error="run")
    assert [ask(guard).body for _ in range(2)] == [b"order 1", b"order 2"]


def test_a_response_that_is_there_as_a_whole_leaves_as_a_whole() -> None:
    reply = ask(guarded(streaming([b"one ", b"two"])))
    assert reply.parts == [b"one two"]


def test_a_response_that_cannot_be_stored_is_not_shown() -> None:
    app = App()
    reply = ask(guarded(app, BrokenStore(Finish), env=patient()))
    assert (reply.status, reply.problem, app.calls) == (500, "response-not-stored", 1)
    assert "retry-after" not in reply.headers
    assert ask(guarded(app, BrokenStore(Finish), env=patient(), on_store_error="run")).status == 201


def test_a_stream_that_cannot_be_stored_is_broken_off() -> None:
    result = Parts([b"ab", b"cd"])
    reply = Reply()
    with pytest.raises(StoreError):
        ask(guarded(streaming(result), BrokenStore(Finish), env=patient()), reply=reply)
    assert reply.body == b"abcd"  # without a length, the server's own end is what is missing
    assert result.closed == 1


def test_an_owner_that_lost_its_lease_does_not_claim_success() -> None:
    store = MemoryStore()

    def act(app: App, environ: Any, start_response: Any) -> Iterator[bytes]:
        claim = resilient.claim()
        store.execute(Abandon(claim.stored, claim.owner, claim.fence))
        assert store.execute(Claim(claim.stored, "another", 30.0, take_over=True))
        start_response("200 OK", [("Content-Length", "4")])
        if app.calls > 1:
            yield b"ab"
        yield b"done"

    guard = guarded(App(act), store)
    reply = ask(guard)
    assert (reply.status, reply.problem, guard.lost) == (409, "in-doubt", 1)
    reply = Reply()
    with pytest.raises(InDoubt):
        ask(guard, key="other", reply=reply)
    assert reply.body == b"ab"


def test_a_record_that_is_no_response_runs_nothing() -> None:
    store = MemoryStore()
    app = App()
    guard = guarded(app, store)
    ask(guard)
    (key,) = store._rows
    store._rows[key].result = b"\x80"
    reply = ask(guard)
    assert (reply.status, reply.problem, app.calls) == (503, "store-unavailable", 1)


# -- the protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["list", "parts", "write"])
@pytest.mark.parametrize("length", [(), (("Content-Length", "4"),)])
def test_both_sides_keep_to_the_protocol(way: str, length: tuple[tuple[str, str], ...]) -> None:
    results: list[Parts] = []

    def act(app: App, environ: Any, start_response: Any) -> Iterable[bytes]:
        assert environ["wsgi.input"].read(2) == b"{}"
        write = start_response("200 OK", [("Content-Type", "text/plain"), *length])
        if way == "list":
            return [b"ab", b"cd"]
        if way == "write":
            write(b"ab")
        results.append(Parts([b"cd"] if way == "write" else [b"ab", b"cd"]))
        return results[-1]

    guard = validator(guarded(validator(App(act))))
    replies = [Reply(), Reply()]
    for reply in replies:
        environ = environ_of()
        setup_testing_defaults(environ)
        result: Any = guard(environ, lambda line, headers, exc_info=None, reply=reply: reply.start(line, headers))
        for part in result:
            reply.parts.append(part)
        result.close()
        assert (reply.line, reply.body) == ("200 OK", b"abcd")
    assert [reply.replayed for reply in replies] == [False, True]
    assert [result.closed for result in results] == ([] if way == "list" else [1])


# -- over the wire ---------------------------------------------------------------------------------------------------


@contextmanager
def served(app: Any, threads: int = 4) -> Iterator[str]:
    """`app` behind waitress, on a port of loopback."""
    waitress: Any = importlib.import_module("waitress")
    wasyncore: Any = importlib.import_module("waitress.wasyncore")
    sockets: dict[int, Any] = {}
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=threads, map=sockets)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        # In the loop's own thread: it ends when it has nothing left to serve.
        server.trigger.pull_trigger(lambda: wasyncore.close_all(sockets))
        thread.join(60)
        server.task_dispatcher.shutdown()
    assert not thread.is_alive()


KEY = {"Idempotency-Key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("duplicates", ["wait", "raise"])
def test_of_many_requests_at_once_the_application_sees_one(kind: str, duplicates: Any, tmp_path: Path) -> None:
    effects: list[int] = []
    web = Flask("shop")
    with store_of(kind, tmp_path) as store:
        gate = Gate(store, 31)

        @web.post("/orders")
        def place() -> tuple[dict[str, Any], int]:
            assert gate.full.wait(60)
            effects.append(resilient.fence())
            order: Any = request.get_json()
            return {"order": len(effects), **order}, 201

        app: Any = IdempotencyWSGIMiddleware(web.wsgi_app, gate, duplicates=duplicates)
        with served(app, threads=33) as url, httpx.Client(base_url=url, timeout=60) as client:

            def send(sku: int = 7, headers: Any = KEY) -> httpx.Response:
                return client.post("/orders", json={"sku": sku}, headers=headers)

            with ThreadPoolExecutor(32) as pool:
                replies = [call.result() for call in [pool.submit(send) for _ in range(32)]]
            last = send()
            assert (last.status_code, last.json()) == (201, {"order": 1, "sku": 7})
            assert last.headers["idempotency-replayed"] == "true"
            assert send(8).status_code == 422
            assert send(7, {}).status_code == 400
    assert len(effects) == 1
    if duplicates == "wait":
        assert {(reply.status_code, reply.content) for reply in replies} == {(201, last.content)}
        assert sum("idempotency-replayed" in reply.headers for reply in replies) == 31
    else:
        assert sorted(reply.status_code for reply in replies) == [201] + [409] * 31
        assert all(1 <= int(reply.headers["retry-after"]) <= 30 for reply in replies if reply.status_code == 409)


def test_streams_over_the_wire() -> None:
    first_part = threading.Event()
    effects: list[str] = []
    web = Flask("shop")

    @web.post("/stream")
    def stream() -> FlaskResponse:
        def parts() -> Iterator[str]:
            effects.append("stream")
            yield "one "
            assert first_part.wait(60)
            yield "two"

        return FlaskResponse(parts(), mimetype="text/plain")

    @web.post("/broken")
    def broken() -> FlaskResponse:
        def parts() -> Iterator[str]:
            effects.append("broken")
            yield "one "
            raise KeyError("no")

        return FlaskResponse(parts(), mimetype="text/plain")

    @web.post("/chunks")
    def chunks() -> bytes:
        return request.get_data()

    def body() -> Iterator[bytes]:
        yield b"one "
        yield b"two"

    app = IdempotencyWSGIMiddleware(web.wsgi_app, MemoryStore())
    with served(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/stream", headers=KEY) as reply:
            arriving = reply.iter_bytes()
            assert next(arriving) == b"one "
            first_part.set()
            assert b"".join(arriving) == b"two"
        again = client.post("/stream", headers=KEY)
        assert (again.text, again.headers["idempotency-replayed"]) == ("one two", "true")

        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/broken", headers=KEY)
        assert client.post("/broken", headers=KEY).json()["first_status"] == 200
        assert effects == ["stream", "broken"]

        assert client.post("/chunks", content=body(), headers=KEY).text == "one two"
        assert client.post("/chunks", content=b"one two", headers=KEY).headers["idempotency-replayed"] == "true"
