"""The ASGI middleware in process: every branch, under asyncio and trio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import resilient
from resilient.errors import InDoubt, StoreError
from resilient.integrations.asgi import IdempotencyMiddleware, Request
from resilient.policy import Env
from resilient.stores import Abandon, Claim, Finish, MemoryStore, Release, Renew
from resilient.testing import FakeClock
from tests._http import BrokenStore, problem
from tests.worlds import World, turn, worlds

Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]


class Reply:
    """What a client has seen of a response: the messages, one by one."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def parts(self) -> list[bytes]:
        return [message.get("body", b"") for message in self.messages[1:]]

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def whole(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", False)

    @property
    def problem(self) -> str:
        return problem(self.status, self.headers, self.body)

    @property
    def replayed(self) -> bool:
        return self.headers.get("idempotency-replayed") == "true"


def scope_of(method: str = "POST", path: str = "/orders", key: str | None = '"k"', **more: Any) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), *more.pop("headers", ())]
    if key is not None:
        headers.append((b"idempotency-key", key.encode()))
    return {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers, **more}


def incoming(*parts: bytes) -> Receive:
    """The parts of a body, then the news that the client has left."""
    messages: list[Any] = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1} for index, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return receive


async def ask(app: Any, *, parts: tuple[bytes, ...] = (b"{}",), reply: Reply | None = None, **scope: Any) -> Reply:
    reply = reply or Reply()
    await app(scope_of(**scope), incoming(*parts), reply.send)
    return reply


class App:
    """An application that answers 201 with the number of the call; or does what `acts` says."""

    def __init__(self, act: Callable[[App, Any, Receive, Send], Awaitable[None]] | None = None) -> None:
        self.calls = 0
        self.act = act
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.calls += 1
        if self.act is not None:
            await self.act(self, scope, receive, send)
            return
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        await answer(send, f"order {self.calls}".encode())


async def answer(send: Send, body: bytes = b"done", status: int = 201, **headers: str) -> None:
    pairs = [(b"X-Kind", b"order"), *((name.encode(), value.encode()) for name, value in headers.items())]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def guarded(app: Any, store: Any = None, **options: Any) -> IdempotencyMiddleware:
    return IdempotencyMiddleware(app, store or MemoryStore(), **options)


def patient() -> Env:
    """An environment in which pauses take no time."""
    return Env(clock=FakeClock())


# -- the plain cases -------------------------------------------------------------------------------------------------


@worlds
def test_the_second_request_gets_the_response_of_the_first(world: World) -> None:
    app = App()
    guard = guarded(app)

    async def main() -> None:
        first = await ask(guard)
        second = await ask(guard)
        assert app.calls == 1
        assert (first.status, first.body, first.replayed, first.whole) == (201, b"order 1", False, True)
        assert (second.status, second.body, second.replayed, second.whole) == (201, b"order 1", True, True)
        assert second.headers == {"x-kind": "order", "idempotency-replayed": "true"}
        assert (guard.replays, guard.waits, guard.in_doubts, guard.lost, guard.unprotected) == (1, 0, 0, 0, 0)
        bare = await ask(guard, key="k")
        assert bare.replayed, "quotes are no part of the key"

    world.run(main)


@worlds
def test_what_is_not_guarded_passes_untouched(world: World) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    guard = guarded(app, paths=lambda request: request.path != "/free", required=False)

    async def main() -> None:
        for scope in (
            {"type": "lifespan"},
            {"type": "websocket", "path": "/orders"},
            scope_of(method="GET"),
            scope_of(path="/free"),
            scope_of(key=None),
        ):
            receive, send = incoming(), Reply().send
            await guard(scope, receive, send)
            got = seen.pop()
            assert got[0] is scope
            assert got[1] is receive
            assert got[2] == send

    world.run(main)


@worlds
@pytest.mark.parametrize(
    ("options", "request_", "status", "name"),
    [
        ({}, {"key": None}, 400, "missing-key"),
        ({}, {"key": ""}, 400, "malformed-key"),
        ({}, {"key": '"a", "b"'}, 400, "malformed-key"),
        ({}, {"headers": [(b"idempotency-key", b'"first"')]}, 400, "malformed-key"),
        ({"strict": True}, {"key": "bare"}, 400, "malformed-key"),
        ({"header": "X-Key"}, {}, 400, "missing-key"),
        ({"max_request": 3}, {"parts": (b"1234",)}, 413, "request-too-large"),
        ({"max_request": 3}, {"parts": (b"12", b"34", b"56")}, 413, "request-too-large"),
        ({"max_request": 3}, {"headers": [(b"content-length", b"4")]}, 413, "request-too-large"),
    ],
)
def test_what_is_refused_is_not_run(
    world: World, options: dict[str, Any], request_: dict[str, Any], status: int, name: str
) -> None:
    app = App()
    guard = guarded(app, **options)

    async def main() -> None:
        reply = await ask(guard, **request_)
        assert (reply.status, reply.problem, app.calls) == (status, name, 0)

    world.run(main)


@worlds
def test_a_client_that_leaves_before_its_request_is_there_has_done_nothing(world: World) -> None:
    app = App()
    store = BrokenStore()

    async def main() -> None:
        reply = Reply()
        messages = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0)

        await guarded(app, store)(scope_of(), receive, reply.send)
        assert (reply.messages, app.calls, store.done) == ([], 0, [])

    world.run(main)


@worlds
def test_the_application_reads_the_body_and_hears_that_the_client_left(world: World) -> None:
    heard: list[Any] = []

    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        heard.append(await receive())
        heard.append(await receive())
        await answer(send)

    async def main() -> None:
        await ask(guarded(App(act), max_request=6), parts=(b"abc", b"", b"def"), headers=[(b"content-length", b"6")])
        assert heard == [
            {"type": "http.request", "body": b"abcdef", "more_body": False},
            {"type": "http.disconnect"},
        ]

    world.run(main)


@worlds
def test_a_key_belongs_to_one_request(world: World) -> None:
    """Others replay a response to a request that never got it (devlink#1200)."""
    app = App()
    guard = guarded(app)

    async def main() -> None:
        await ask(guard)
        other = await ask(guard, parts=(b"{1}",))
        assert (other.status, other.problem) == (422, "key-reused")
        assert "retry-after" not in other.headers
        assert (await ask(guard, query_string=b"a=1")).status == 422
        assert app.calls == 1
        # Another operation, another record.
        assert (await ask(guard, path="/refunds")).body == b"order 2"
        assert (await ask(guard, method="PATCH")).body == b"order 3"

    world.run(main)


def test_the_fingerprint_can_be_chosen() -> None:
    async def main() -> None:
        guard = guarded(App(), fingerprint=False)
        await ask(guard, parts=(b"a",))
        assert (await ask(guard, parts=(b"b",))).replayed

        for chosen in (lambda request: request.body[:1], lambda request: request.body[:1].decode()):
            guard = guarded(App(), fingerprint=chosen)
            await ask(guard, parts=(b"a1",))
            assert (await ask(guard, parts=(b"a2",), query_string=b"x")).replayed
            assert (await ask(guard, parts=(b"b1",))).status == 422

        guard = guarded(App(), fingerprint=lambda request: 1)
        with pytest.raises(TypeError, match="fingerprint must return a string or bytes, not 1"):
            await ask(guard)

    asyncio.run(main())


def test_tenants_do_not_see_each_others_responses() -> None:
    app = App()

    def tenant(request: Request) -> str:
        return request.headers["authorization"]

    async def main() -> None:
        guard = guarded(app, scope=tenant)
        ada: dict[str, Any] = {"headers": [(b"authorization", b"Bearer ada")]}
        bob: dict[str, Any] = {"headers": [(b"authorization", b"Bearer bob")]}
        assert [(await ask(guard, **who)).body for who in (ada, bob, ada)] == [b"order 1", b"order 2", b"order 1"]

        assert not any("ada" in row.label for row in guard.store._rows.values()), "a token is nobody's to read"

        store = MemoryStore()
        one, two = guarded(app, store, scope="one"), guarded(app, store, scope="two")
        assert [(await ask(guard)).body for guard in (one, two, one)] == [b"order 3", b"order 4", b"order 3"]

        with pytest.raises(TypeError, match="scope must return a string, not None"):
            await ask(guarded(app, scope=lambda request: request.headers.get("x-tenant")))

    asyncio.run(main())


@worlds
def test_the_claim_is_there_while_the_application_runs(world: World) -> None:
    seen: list[Any] = []

    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        claim = resilient.claim()
        seen.append((claim.key, claim.attempt, resilient.fence(), claim.derive("card")))
        await answer(send)
        with pytest.raises(LookupError):
            resilient.claim()  # What it still does is not part of the call.

    async def main() -> None:
        await ask(guarded(App(act)))
        assert seen[0][:3] == ("k", 1, seen[0][2])
        assert len(seen[0][3]) == 32
        with pytest.raises(LookupError):
            resilient.claim()

    world.run(main)


# -- while the first one runs ----------------------------------------------------------------------------------------


class Held:
    """An application that begins, and waits until it may answer."""

    def __init__(self, world: Any) -> None:
        self.store = MemoryStore()
        self.may = False
        self.world = world
        self.app = App(self.act)

    async def act(self, app: App, scope: Any, receive: Receive, send: Send) -> None:
        while not self.may:
            await self.world.step()
        await answer(send)


@worlds
def test_duplicates_are_refused_while_the_first_runs(world: World) -> None:
    async def main() -> None:
        async with world() as tasks:
            held = Held(tasks)
            guard = guarded(held.app, held.store, lease=20.5)
            first = tasks.spawn(lambda: ask(guard))
            while not held.app.calls:
                await tasks.step()
            second = await ask(guard)
            assert (second.status, second.problem) == (409, "in-progress")
            assert second.headers["retry-after"] == "21"
            assert (await ask(guard, parts=(b"other",))).status == 422, "before it is said that one is to wait"
            held.may = True
            while not first.done:
                await tasks.step()
            assert first.value.body == b"done"
            assert (await ask(guard)).replayed
            assert held.app.calls == 1

    world.run(main)


@worlds
def test_duplicates_wait_for_the_first(world: World) -> None:
    async def main() -> None:
        async with world() as tasks:
            held = Held(tasks)
            guard = guarded(held.app, held.store, duplicates="wait")
            replies = [tasks.spawn(lambda: ask(guard)) for _ in range(5)]
            while guard.waits < 4:
                await tasks.step()
            held.may = True
            while not all(reply.done for reply in replies):
                await tasks.step()
            assert {reply.value.body for reply in replies} == {b"done"}
            assert sorted(reply.value.replayed for reply in replies) == [False, True, True, True, True]
            assert held.app.calls == 1
            hurried = guarded(held.app, held.store, duplicates="wait", max_wait=0)
            assert (await ask(hurried)).replayed

    world.run(main)


@worlds
def test_a_waiter_that_is_cancelled_has_changed_nothing(world: World) -> None:
    async def main() -> None:
        async with world() as tasks:
            held = Held(tasks)
            guard = guarded(held.app, held.store, duplicates="wait")
            first = tasks.spawn(lambda: ask(guard))
            while not held.app.calls:
                await tasks.step()
            second = tasks.spawn(lambda: ask(guard))
            while not guard.waits:
                await tasks.step()
            second.cancel()
            while not second.done:
                await tasks.step()
            assert second.value is None
            held.may = True
            while not first.done:
                await tasks.step()
            assert first.value.status == 201

    world.run(main)


# -- streams ---------------------------------------------------------------------------------------------------------


@worlds
def test_a_stream_reaches_the_client_while_it_is_made(world: World) -> None:
    reply = Reply()
    seen: list[Any] = []

    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        seen.append(len(reply.messages))
        for part in (b"", b"one ", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            seen.append(reply.parts[-1])
        await send({"type": "http.response.body"})

    async def main() -> None:
        app = App(act)
        guard = guarded(app)
        await ask(guard, reply=reply)
        assert seen == [0, b"", b"one ", b"two"]
        assert reply.whole
        again = await ask(guard, reply=Reply())
        assert (again.status, again.parts, again.replayed, app.calls) == (200, [b"one two"], True, 1)

    world.run(main)


@worlds
@pytest.mark.parametrize("length", [None, "6"])
def test_the_end_of_a_response_leaves_after_it_is_stored(world: World, length: str | None) -> None:
    reply = Reply()
    sent: list[bytes] = []

    class Watching(MemoryStore):
        async def aexecute(self, op: Any) -> Any:
            if type(op) is Finish:
                sent.append(reply.body)
                assert reply.messages[-1].get("more_body") is True
            return await super().aexecute(op)

    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", length.encode())] if length else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in (b"ab", b"cd", b"ef"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def main() -> None:
        await ask(guarded(App(act), Watching()), reply=reply)
        # With a length, the client would know that these are all.
        assert sent == [b"abcd" if length else b"abcdef"]
        assert reply.body == b"abcdef"

    world.run(main)


@worlds
def test_a_response_too_large_to_keep_is_sent_once_and_never_made_again(world: World) -> None:
    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        await answer(send, b"12345", 200)

    async def main() -> None:
        app = App(act)
        guard = guarded(app, max_response=4)
        assert (await ask(guard)).body == b"12345"
        for _ in range(2):
            again = await ask(guard)
            assert (again.status, again.problem) == (409, "response-not-kept")
            assert not again.replayed
        assert app.calls == 1

    world.run(main)


@worlds
def test_what_bypasses_the_body_is_not_offered_and_the_rest_passes(world: World) -> None:
    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        assert scope["extensions"] == {"http.response.debug": {}}
        await send({"type": "http.response.debug", "info": {}})
        await answer(send)
        await send({"type": "http.response.body", "body": b"late"})

    async def main() -> None:
        extensions: dict[str, Any] = {
            "http.response.pathsend": {},
            "http.response.trailers": {},
            "http.response.debug": {},
        }
        reply = await ask(guarded(App(act)), extensions=extensions)
        assert [message["type"].rpartition(".")[2] for message in reply.messages] == ["debug", "start", "body", "body"]
        assert len(extensions) == 3, "the scope of others is theirs"

    world.run(main)


# -- failures --------------------------------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize("started", [False, True])
def test_an_application_that_fails_before_anything_left_frees_the_key(world: World, started: bool) -> None:
    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        if app.calls > 1:
            await answer(send)
            return
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        raise KeyError("no")

    async def main() -> None:
        guard = guarded(App(act))
        reply = Reply()
        with pytest.raises(KeyError):
            await ask(guard, reply=reply)
        assert reply.messages == []
        assert (await ask(guard)).status == 201

    world.run(main)


@worlds
@pytest.mark.parametrize(("status", "runs"), [(200, 1), (500, 2)])
def test_a_response_that_breaks_off_is_not_begun_again_unless_it_was_a_failure(
    world: World, status: int, runs: int
) -> None:
    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        raise KeyError("no")

    async def main() -> None:
        app = App(act)
        guard = guarded(app)
        reply = Reply()
        with pytest.raises(KeyError):
            await ask(guard, reply=reply)
        assert (reply.body, reply.whole) == (b"ab", False)
        if status == 200:
            again = await ask(guard)
            assert (again.status, again.problem) == (409, "response-not-kept")
        else:
            with pytest.raises(KeyError):
                await ask(guard)
        assert app.calls == runs

    world.run(main)


@worlds
def test_an_application_that_fails_after_its_response_has_answered(world: World) -> None:
    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        await answer(send)
        raise KeyError("in the background")

    async def main() -> None:
        guard = guarded(App(act))
        reply = Reply()
        with pytest.raises(KeyError):
            await ask(guard, reply=reply)
        assert reply.body == b"done"
        assert (await ask(guard)).replayed

    world.run(main)


@worlds
@pytest.mark.parametrize("started", [False, True])
def test_an_application_that_returns_without_a_response_is_not_run_again(world: World, started: bool) -> None:
    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})

    async def main() -> None:
        app = App(act)
        guard = guarded(app)
        reply = await ask(guard)
        assert reply.messages == []
        assert (await ask(guard)).problem == "response-not-kept"
        assert app.calls == 1

    world.run(main)


@worlds
@pytest.mark.parametrize(("in_doubt", "status", "runs"), [("raise", 409, 1), ("rerun", 201, 2)])
def test_a_request_that_is_cancelled_leaves_its_key_in_doubt(
    world: World, in_doubt: Any, status: int, runs: int
) -> None:
    async def main() -> None:
        async with world() as tasks:
            held = Held(tasks)
            guard = guarded(held.app, held.store, in_doubt=in_doubt)
            first = tasks.spawn(lambda: ask(guard))
            while not held.app.calls:
                await tasks.step()
            first.cancel()
            while not first.done:
                await tasks.step()
            held.may = True
            second = await ask(guard)
            assert (second.status, held.app.calls) == (status, runs)
            if status == 409:
                assert second.problem == "in-doubt"
                assert "retry-after" not in second.headers
                assert guard.in_doubts == 1

    world.run(main)


@worlds
def test_a_cancel_while_the_response_is_being_stored_loses_nothing(world: World) -> None:
    class Slow(MemoryStore):
        asked = 0

        async def aexecute(self, op: Any) -> Any:
            if type(op) is Finish:
                Slow.asked += 1
                while Slow.asked == 1:
                    await tasks.step()
            return await super().aexecute(op)

    tasks: Any

    async def main() -> None:
        nonlocal tasks
        Slow.asked = 0
        async with world() as tasks:
            app = App()
            guard = guarded(app, Slow())
            reply = Reply()
            first = tasks.spawn(lambda: ask(guard, reply=reply))
            while not Slow.asked:
                await tasks.step()
            first.cancel()
            while not first.done:
                await tasks.step()
            assert reply.messages == []
            assert (await ask(guard)).body == b"order 1"
            assert app.calls == 1

    world.run(main)


def test_a_request_that_is_dropped_with_its_loop_ends_quietly() -> None:
    store = MemoryStore()
    app: list[Any] = []

    async def forever(scope: Any, receive: Any, send: Any) -> None:
        app.append(resilient.claim())
        await turn()

    async def main() -> None:
        coroutine: Any = guarded(forever, store)(scope_of(), incoming(b""), Reply().send)
        coroutine.send(None)
        coroutine.close()
        with pytest.raises(LookupError):
            resilient.claim()
        # Nobody knows how far it came: its lease runs, and then it is in doubt.
        assert (await ask(guarded(App(), store), parts=(b"",))).problem == "in-progress"

    asyncio.run(main())


@worlds
def test_responses_that_are_not_remembered_free_the_key(world: World) -> None:
    """Failures that are pinned for a day (IdempotentAPI#37, trigger.dev#2376)."""
    statuses = [500, 503, 401, 403, 408, 429, 409, 422, 425, 404]

    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        await answer(send, status=statuses[app.calls - 1])

    async def main() -> None:
        app = App(act)
        guard = guarded(app)
        assert [(await ask(guard)).status for _ in range(12)] == [*statuses, 404, 404]
        assert app.calls == 10
        pinned = guarded(App(act), remember=range(200, 600))
        assert [(await ask(pinned)).status for _ in range(3)] == [500, 500, 500]

    world.run(main)


def test_a_fault_of_your_own_function_is_the_applications_to_report() -> None:
    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await answer(send)
        except ZeroDivisionError:
            await answer(send, b"sorry", 500)

    async def main() -> None:
        def broken(status: int) -> bool:
            raise ZeroDivisionError

        guard = guarded(App(act), remember=broken)
        reply = await ask(guard)
        assert (reply.status, reply.body, reply.whole) == (500, b"sorry", True)
        # The response was made: what it says may have happened, and the key does not stay taken for the lease.
        assert (await ask(guard)).problem == "in-doubt"

    asyncio.run(main())


# -- the store -------------------------------------------------------------------------------------------------------


@worlds
def test_without_the_store_nothing_runs_unless_one_says_so(world: World) -> None:
    async def main() -> None:
        app = App()
        reply = await ask(guarded(app, BrokenStore(Claim)))
        assert (reply.status, reply.problem, app.calls) == (503, "store-unavailable", 0)
        assert reply.headers["retry-after"] == "1"
        open_ = guarded(app, BrokenStore(Claim), on_store_error="run")
        assert [(await ask(open_)).body for _ in range(2)] == [b"order 1", b"order 2"]
        assert open_.unprotected == 2

    world.run(main)


@worlds
def test_a_response_that_cannot_be_stored_is_not_shown(world: World) -> None:
    after: list[str] = []

    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        await answer(send)
        after.append("went on")

    async def main() -> None:
        app = App(act)
        store = BrokenStore(Finish)
        guard = guarded(app, store, env=patient())
        reply = await ask(guard)
        assert (reply.status, reply.problem, after) == (500, "response-not-stored", ["went on"])
        assert "retry-after" not in reply.headers
        assert (await ask(guard)).problem == "in-progress", "until its lease is over, then it is in doubt"
        assert app.calls == 1
        guard = guarded(app, BrokenStore(Finish), env=patient(), on_store_error="run")
        assert (await ask(guard)).status == 201

    world.run(main)


@worlds
def test_a_stream_that_cannot_be_stored_is_broken_off(world: World) -> None:
    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        await send({"type": "http.response.body", "body": b"cd"})

    async def main() -> None:
        reply = Reply()
        with pytest.raises(StoreError):
            await ask(guarded(App(act), BrokenStore(Finish), env=patient()), reply=reply)
        assert (reply.body, reply.whole) == (b"ab", False)

    world.run(main)


@worlds
def test_an_owner_that_lost_its_lease_does_not_claim_success(world: World) -> None:
    store = MemoryStore()

    async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
        claim = resilient.claim()
        store.execute(Abandon(claim.stored, claim.owner, claim.fence))
        assert store.execute(Claim(claim.stored, "another", 30.0, take_over=True))
        if app.calls > 1:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ab", "more_body": True})
            await send({"type": "http.response.body", "body": b"cd"})
            return
        await answer(send)

    async def main() -> None:
        guard = guarded(App(act), store)
        reply = await ask(guard)
        assert (reply.status, reply.problem, guard.lost) == (409, "in-doubt", 1)
        reply = Reply()
        with pytest.raises(InDoubt):
            await ask(guard, key="other", reply=reply)
        assert reply.body == b"ab"

    world.run(main)


@worlds
def test_a_heartbeat_that_is_refused_is_counted(world: World) -> None:
    clock = FakeClock()
    store = BrokenStore(clock=clock)

    async def main() -> None:
        async with world() as tasks:

            async def act(app: App, scope: Any, receive: Receive, send: Send) -> None:
                claim = resilient.claim()
                store.execute(Release(claim.stored, claim.owner, claim.fence))
                await clock.asleep(60)
                await answer(send)

            guard = guarded(App(act), store, env=Env(clock=clock))
            assert (await ask(guard)).problem == "in-doubt"
            assert guard.lost == 1
            assert Renew.__name__ in store.done
            await tasks.settle()

    world.run(main)


@worlds
def test_a_record_that_is_no_response_runs_nothing(world: World) -> None:
    store = MemoryStore()
    app = App()

    async def main() -> None:
        guard = guarded(app, store, fingerprint=False)
        await ask(guard)
        (key,) = store._rows
        store._rows[key].result = b'{"v":1,"ok":"order 1"}'
        reply = await ask(guard)
        assert (reply.status, reply.problem, app.calls) == (503, "store-unavailable", 1)

    world.run(main)


@worlds
def test_a_client_that_is_gone_at_the_end_gets_its_response_later(world: World) -> None:
    async def main() -> None:
        app = App()
        guard = guarded(app)

        async def gone(message: Any) -> None:
            raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            await guard(scope_of(), incoming(b"{}"), gone)
        assert (await ask(guard)).body == b"order 1"
        assert app.calls == 1

    world.run(main)
