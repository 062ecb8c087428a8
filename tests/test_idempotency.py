"""Idempotent: the effect happens once for each key, and everyone gets its result, or an honest `InDoubt`."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect as std_inspect
import pickle  # noqa: TID251 - of errors only, which travel between processes
import threading
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trio

import resilient
from resilient import (
    RERUN,
    Bulkhead,
    BulkheadFull,
    CallTimeout,
    CircuitBreaker,
    Consecutive,
    Env,
    Fallback,
    Hedge,
    Idempotent,
    InDoubt,
    InFlight,
    Json,
    KeyReused,
    LeaseLost,
    Pipeline,
    RateLimiter,
    Replayed,
    Retry,
    StoreError,
    Timeout,
    Unprotected,
    claim,
    deadline,
    fence,
    idempotency,
    replayed,
)
from resilient._drive import RUN, Outcome, drive
from resilient.clock import SystemClock
from resilient.stores import Abandon, Claim, Finish, MemoryStore, Release, Scan, Threaded
from resilient.testing import FakeClock, Recorder
from tests._once_store import TroubledStore
from tests.worlds import World, worlds

WAYS = ["plain", "asyncio", "trio"]
everywhere = pytest.mark.parametrize("way", WAYS)
both = pytest.mark.parametrize("way", ["asyncio", "trio"])

Fn = Callable[..., Any]


def run(way: str, make: Callable[[], Awaitable[Any]]) -> Any:
    """The result of a coroutine, in a loop of its own."""

    async def main() -> Any:
        return await make()

    return asyncio.run(main()) if way == "asyncio" else trio.run(main)


def guard(way: str, policy: Callable[[Any], Any], fn: Fn) -> Fn:
    """`fn`, guarded: as it is, or as a coroutine function, each of whose calls has a loop of its own."""
    if way == "plain":
        guarded: Fn = policy(fn)
        return guarded

    @functools.wraps(fn)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    call = policy(coroutine)
    return lambda *args, **kwargs: run(way, lambda: call(*args, **kwargs))


class Boom(Exception):
    pass


class Declined(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Stolen(Declined):
    pass


class Ran:
    """A function of one key that notes its calls, and does what it is told, one thing a call, the last for ever."""

    def __init__(self, *does: Any) -> None:
        self.does = list(does)
        self.calls: list[str] = []

    def __call__(self, key: str) -> Any:
        self.calls.append(key)
        does = self.does.pop(0) if len(self.does) > 1 else self.does[0] if self.does else len(self.calls)
        if isinstance(does, BaseException):
            raise does
        return does() if callable(does) else does

    @property
    def fn(self) -> Fn:
        def body(key: str) -> Any:
            return self(key)

        return body


def die(
    store: TroubledStore | MemoryStore, clock: FakeClock, key: str = "k", fingerprint: str = "", name: str = "f"
) -> None:
    """Another process claims the key, and is never heard of again."""
    from resilient.idempotency import Hasher

    stored, label = Hasher(name)("", key)
    store.execute(Claim(stored, f"dead {clock.now()}", 30.0, fingerprint, label, take_over=True))
    clock.advance(31.0)


# -- once, and replays -------------------------------------------------------------------------------------------------


@everywhere
def test_the_effect_happens_once_and_everyone_gets_its_result(way: str) -> None:
    store, ran, seen = TroubledStore(), Ran({"n": 1}), Recorder()
    policy = Idempotent(store, key="key")
    call = guard(way, Pipeline(policy, env=Env(sinks=[seen])), ran.fn)
    assert [call("a"), call("a"), call(key="a")] == [{"n": 1}] * 3
    assert call("b") == {"n": 1}
    assert ran.calls == ["a", "b"]
    assert store.names == ["Claim", "Finish", "Claim", "Claim", "Claim", "Finish"]
    assert policy.replays == 2
    assert [(event.key, event.attempt) for event in seen.of(Replayed)] == [("a", 1), ("a", 1)]
    assert seen.events[0].policy.endswith("body")


@everywhere
def test_a_replay_is_visible_to_its_caller_and_to_nobody_else(way: str) -> None:
    ran = Ran()
    policy = Idempotent(MemoryStore(), key="key")
    seen: list[bool] = []

    def body(key: str) -> int:
        return ran(key)  # type: ignore[no-any-return]

    if way == "plain":
        plain = policy(body)
        for key in ("a", "a", "b", "a"):
            plain(key)
            seen.append(replayed())
        with pytest.raises(ValueError, match="empty"):
            plain("")
    else:

        @policy
        async def coroutine(key: str) -> int:
            return body(key)

        async def main() -> None:
            for key in ("a", "a", "b", "a"):
                await coroutine(key)
                seen.append(replayed())

        run(way, main)
    assert seen == [False, True, False, True]
    assert contextvars.Context().run(replayed) is False


def test_after_a_refusal_or_a_failure_nothing_was_replayed() -> None:
    store = TroubledStore(FakeClock())
    policy = Idempotent(store, key="key", duplicates="raise", name="f")
    ran = Ran(1, Boom(), lambda: call("c"))
    call: Fn = policy(lambda key, x=0: ran(key))
    call("a")
    attempts: list[Fn] = [lambda: call("a", 1), lambda: call("b"), lambda: call("c")]
    for attempt in attempts:
        call("a")
        assert replayed()
        with pytest.raises((KeyReused, Boom, InFlight)):
            attempt()
        assert not replayed()
    call("a")
    store.meet(Claim, "down")
    with pytest.raises(StoreError):
        call("z")
    assert not replayed()


@everywhere
def test_a_result_is_forgotten_after_its_time(way: str) -> None:
    clock, ran = FakeClock(), Ran()
    call = guard(way, Idempotent(MemoryStore(clock), key="key", ttl=100.0), ran.fn)
    assert call("a") == 1
    clock.advance(99.0)
    assert call("a") == 1
    clock.advance(1.0)
    assert call("a") == 2


@everywhere
def test_a_failure_is_not_remembered_and_the_next_call_runs(way: str) -> None:
    store, ran = TroubledStore(), Ran(Boom("first"), "second")
    call = guard(way, Idempotent(store, key="key"), ran.fn)
    with pytest.raises(Boom) as caught:
        call("a")
    assert store.states == []
    assert not hasattr(caught.value, "__notes__")
    assert call("a") == call("a") == "second"
    assert len(ran.calls) == 2
    assert store.names == ["Claim", "Release", "Claim", "Finish", "Claim"]


@everywhere
@pytest.mark.parametrize("remember", [Declined, (Declined,), (KeyError, Declined)])
def test_errors_that_are_results_are_replayed_with_a_note(way: str, remember: Any) -> None:
    ran, seen = Ran(Stolen("lost card")), Recorder()
    policy = Idempotent(MemoryStore(), key="key", remember=remember)
    call = guard(way, Pipeline(policy, env=Env(sinks=[seen])), ran.fn)
    caught: list[Any] = []
    for _ in range(2):
        with pytest.raises(Declined) as error:
            call("k")
        caught.append(error.value)
    first, second = caught
    assert len(ran.calls) == 1
    assert not hasattr(first, "__notes__")
    assert (type(second), second.args, second.reason) == (Stolen, ("lost card",), "lost card")
    assert second.__notes__ == ["resilient: replayed: attempt 1 with the key 'k' ended so"]
    assert second.__cause__ is None
    assert (policy.replays, len(seen.of(Replayed))) == (1, 1)


def test_what_remember_takes() -> None:
    for bad in (5, "Exception", (ValueError, 5), BaseException, KeyboardInterrupt, [ValueError]):
        with pytest.raises(TypeError, match="remember must be subclasses of Exception"):
            Idempotent("memory://", key="k", remember=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="remember must not name StoreError"):
        Idempotent("memory://", key="k", remember=StoreError)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"ttl": 0}, ValueError),
        ({"ttl": float("inf")}, ValueError),
        ({"ttl": "1"}, TypeError),
        ({"lease": 0}, ValueError),
        ({"lease": -1}, ValueError),
        ({"lease": None}, TypeError),
        ({"max_wait": -1}, ValueError),
        ({"max_wait": True}, TypeError),
        ({"duplicates": "queue"}, ValueError),
        ({"in_doubt": "guess"}, ValueError),
        ({"in_doubt": None}, ValueError),
        ({"on_store_error": "ignore"}, ValueError),
        ({"name": ""}, TypeError),
        ({"name": 5}, TypeError),
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, Any], error: type[Exception]) -> None:
    (parameter,) = setting
    with pytest.raises(error, match=parameter):
        Idempotent("memory://", key="key", **setting)


@pytest.mark.parametrize("store", [None, 5, object(), {}, "nowhere"])
def test_what_is_no_store_is_refused(store: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"store|url|scheme"):
        Idempotent(store, key="key")


def test_policies_with_one_url_share_one_store() -> None:
    one, two = Idempotent("memory://", key="a"), Idempotent("memory://", key="b")
    assert one.store is two.store
    assert Idempotent(MemoryStore(), key="a").store is not one.store


def test_settings_and_live_numbers_can_be_read() -> None:
    policy = Idempotent("memory://", key=("a", "b"), remember=Declined, max_wait=0, name="pay")
    assert policy.describe() == {
        "name": "pay",
        "store": "MemoryStore()",
        "key": ("a", "b"),
        "scope": None,
        "ttl": 86_400.0,
        "lease": 30.0,
        "duplicates": "wait",
        "max_wait": 0.0,
        "in_doubt": "raise",
        "remember": (Declined,),
        "fingerprint": True,
        "on_store_error": "refuse",
    }
    assert repr(policy).startswith("Idempotent(name='pay', store='MemoryStore()', key=('a', 'b'), ttl=86400.0")
    assert (policy.ttl, policy.lease, policy.role) == (86_400.0, 30.0, "idempotent")
    assert (policy.replays, policy.waits, policy.in_doubts, policy.lost, policy.unprotected) == (0, 0, 0, 0, 0)
    assert isinstance(policy.codec, Json)


def test_inspect_and_a_printed_pipeline_show_it() -> None:
    policy = Idempotent("memory://", key="order_id")
    pipeline = Pipeline(Fallback(None), policy, Retry(ConnectionError))

    @pipeline
    def charge(order_id: str, cents: int = 5) -> str:
        """Charge."""
        return order_id

    assert resilient.inspect(charge)[1] is policy
    assert policy.name == "test_inspect_and_a_printed_pipeline_show_it.<locals>.charge"
    assert "\n  Idempotent(name='test_inspect" in str(pipeline)
    assert pipeline.describe()[1]["policy"] == "Idempotent"
    assert std_inspect.signature(charge) == std_inspect.Signature(
        [
            std_inspect.Parameter("order_id", std_inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="str"),
            std_inspect.Parameter("cents", std_inspect.Parameter.POSITIONAL_OR_KEYWORD, default=5, annotation="int"),
        ],
        return_annotation="str",
    )
    assert charge.__doc__ == "Charge."
    assert Idempotent("memory://", key="a").name is None


def test_streams_are_no_results() -> None:
    def numbers(n: int) -> Iterator[int]:
        yield n

    async def stream(n: int) -> AsyncIterator[int]:
        yield n

    for fn, word in ((numbers, "a generator function"), (stream, "an async generator function")):
        with pytest.raises(TypeError, match=f"Idempotent cannot guard .*: it does not serve {word}"):
            Idempotent("memory://", key="n")(fn)


class SyncOnly:
    def execute(self, op: Any, /) -> Any:
        return shared.execute(op)


class AsyncOnly:
    async def aexecute(self, op: Any, /) -> Any:
        return shared.execute(op)


shared = MemoryStore()


@both
def test_a_store_serves_plain_functions_or_coroutines_or_both(way: str) -> None:
    def plain(key: str) -> str:
        return key

    async def coroutine(key: str) -> str:
        return key

    with pytest.raises(TypeError, match=r"serves coroutines only, and .*plain is a plain function"):
        Idempotent(AsyncOnly(), key="key")(plain)
    with pytest.raises(TypeError, match=r"serves plain functions only, and .*wrap it in resilient.stores.Threaded"):
        Idempotent(SyncOnly(), key="key")(coroutine)
    assert Idempotent(SyncOnly(), key="key")(plain)("1") == "1"
    policy = Idempotent(AsyncOnly(), key="key")
    call = policy(coroutine)
    assert run(way, lambda: call("2" + way)) == run(way, lambda: call("2" + way)) == "2" + way
    policy = Idempotent(Threaded(SyncOnly()), key="key")
    call = policy(coroutine)
    assert run(way, lambda: call("3" + way)) == run(way, lambda: call("3" + way)) == "3" + way
    assert policy.replays == 1


def test_a_plain_function_cannot_await_how_the_earlier_attempt_ended() -> None:
    async def ask(key: str) -> Any:
        return RERUN

    with pytest.raises(TypeError, match="is async, which a plain function cannot await"):
        Idempotent("memory://", key="key", in_doubt=ask)(Ran().fn)


# -- what kinds of callables -------------------------------------------------------------------------------------------


@both
def test_a_lambda_that_turns_out_to_make_coroutines(way: str) -> None:
    store, ran = TroubledStore(), Ran()
    policy = Idempotent(store, key="key")

    async def coroutine(key: str) -> int:
        return ran(key)  # type: ignore[no-any-return]

    call: Fn = policy(lambda key: coroutine(key))

    async def main() -> list[int]:
        return [await call("a"), await call("a"), await call("b")]

    assert run(way, main) == [1, 1, 2]
    assert store.names[:2] == ["Claim", "Release"]  # of the moment in which it looked plain
    assert store.states == ["done", "done"]
    assert policy.in_doubts == 0


def test_a_lambda_may_stay_plain() -> None:
    ran = Ran()
    call: Fn = Idempotent(MemoryStore(), key="key")(lambda key: ran(key))
    assert call("a") == call("a") == 1


def test_a_plain_function_that_returns_a_coroutine_is_refused_and_its_key_is_free() -> None:
    store = TroubledStore()

    async def coroutine() -> int:
        return 1

    def body(key: str):  # type: ignore[no-untyped-def]
        return coroutine()

    call: Fn = Idempotent(store, key="key")(body)
    for _ in range(2):
        with pytest.raises(TypeError, match="plain function that returns a coroutine"):
            call("a")
    assert store.states == []


@both
def test_a_plain_function_that_promises_an_awaitable_is_awaited(way: str) -> None:
    ran = Ran()

    async def coroutine(key: str) -> int:
        return ran(key)  # type: ignore[no-any-return]

    @Idempotent(MemoryStore(), key="key")
    def body(key: str) -> Awaitable[int]:
        return coroutine(key)

    async def main() -> list[int]:
        return [await body("a"), await body("a")]

    assert run(way, main) == [1, 1]


# -- what the function sees --------------------------------------------------------------------------------------------


@everywhere
def test_the_function_sees_its_claim(way: str) -> None:
    seen: list[Any] = []

    def body(key: str) -> None:
        hold = claim()
        seen.append((hold.key, hold.attempt, hold.lost, fence() == hold.fence, hold.derive("stripe")))
        assert repr(hold) == f"<claim of {key!r}, attempt 1, fence {hold.fence}>"
        for bad in ("", None, 5):
            with pytest.raises(ValueError, match="purpose must be some text"):
                hold.derive(bad)  # type: ignore[arg-type]
        seen.append((hold.derive("stripe"), hold.derive("mail"), hold.fence))
        if key == "a":
            raise Boom

    call = guard(way, Idempotent(MemoryStore(), key="key"), body)
    for _ in range(2):
        with pytest.raises(Boom):
            call("a")
    call("b")
    first, again, other = seen[1], seen[3], seen[5]
    assert seen[0][:4] == ("a", 1, False, True)
    assert first[0] == seen[0][4] == again[0] != other[0]  # the same in every attempt, another for another key
    assert first[1] not in (first[0], other[1])
    assert len(first[0]) == 32
    assert first[2] < again[2]
    for function in (claim, fence):
        with pytest.raises(LookupError, match="no idempotent call runs here"):
            function()


@everywhere
def test_calls_inside_calls_each_see_their_own_claim(way: str) -> None:
    policy, log = Idempotent(MemoryStore(), key="key"), []

    if way == "plain":

        @policy
        def inner(key: str) -> str:
            log.append(claim().key)
            return key

        @policy
        def outer(key: str) -> str:
            log.append(claim().key)
            inner("in")
            log.append(claim().key)
            inner("in")
            log.append(claim().key)
            return key

        outer("out")
    else:

        @policy
        async def ainner(key: str) -> str:
            log.append(claim().key)
            return key

        @policy
        async def aouter(key: str) -> str:
            log.append(claim().key)
            await ainner("in")
            log.append(claim().key)
            await ainner("in")
            log.append(claim().key)
            return key

        run(way, lambda: aouter("out"))
    assert log == ["out", "in", "out", "out"]


def test_a_thread_with_a_copy_of_the_context_sees_the_claim_and_another_does_not() -> None:
    seen: list[Any] = []

    @Idempotent(MemoryStore(), key="key")
    def body(key: str) -> None:
        context = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(context.run, claim).result().key)
            seen.append(type(pool.submit(claim).exception()))

    body("a")
    assert seen == ["a", LookupError]


@everywhere
def test_the_same_key_inside_itself_is_refused_and_does_not_wait_for_itself(way: str) -> None:
    policy = Idempotent(MemoryStore(), key="key", lease=30.0)
    caught: list[InFlight] = []
    if way == "plain":

        @policy
        def body(key: str) -> str:
            with pytest.raises(InFlight) as error:
                body(key)
            caught.append(error.value)
            return key

        assert body("a") == "a"
    else:

        @policy
        async def abody(key: str) -> str:
            @Idempotent(MemoryStore(), key="key")
            async def between(key: str) -> None:
                with pytest.raises(InFlight) as error:
                    await abody("a")
                caught.append(error.value)

            await between(key)
            return key

        assert run(way, lambda: abody("a")) == "a"
    assert 29.0 < caught[0].retry_after <= 30.0


# -- duplicates --------------------------------------------------------------------------------------------------------


def parked(store: TroubledStore, count: int = 1) -> None:
    """Until `count` callers wait for a key."""
    clock = SystemClock()
    while sum(len(watches) for watches in store.inner._bells._watches.values()) < count:
        clock.sleep(0.001)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_threads_wait_for_the_first_and_one_follows_if_it_fails(ends: str) -> None:
    store, go, started = TroubledStore(), threading.Event(), threading.Event()
    policy = Idempotent(store, key="key")
    running: list[int] = []
    most: list[int] = []
    ran = Ran(Boom() if ends == "badly" else "done", "done")

    @policy
    def body(key: str) -> str:
        running.append(1)
        most.append(len(running))
        started.set()
        assert go.wait(60)
        running.pop()
        return ran(key)  # type: ignore[no-any-return]

    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(body, "a")
        assert started.wait(60)
        others = [pool.submit(body, "a") for _ in range(8)]
        parked(store, 8)
        go.set()
        if ends == "badly":
            assert type(first.exception()) is Boom
        else:
            assert first.result() == "done"
        assert [other.result() for other in others] == ["done"] * 8
    assert max(most) == 1
    assert len(ran.calls) == (2 if ends == "badly" else 1)
    assert policy.waits == 8
    assert policy.replays == (7 if ends == "badly" else 8)


@worlds
@pytest.mark.parametrize("ends", ["well", "badly"])
@pytest.mark.parametrize("watch", [True, False], ids=["rung", "polling"])
def test_tasks_wait_for_the_first_and_one_follows_if_it_fails(world: World, ends: str, watch: bool) -> None:
    async def main() -> None:
        clock = FakeClock()
        store, ran = TroubledStore(clock, watch=watch), Ran(Boom() if ends == "badly" else "done", "done")
        policy = Idempotent(store, key="key")
        running = 0

        @Pipeline(policy, env=Env(clock))
        async def body(key: str) -> str:
            nonlocal running
            running += 1
            assert running == 1
            await clock.asleep(1.0)
            running -= 1
            return ran(key)  # type: ignore[no-any-return]

        async with world() as tasks:
            handles = [tasks.spawn(lambda: body("a")) for _ in range(5)]
        assert [handle.value for handle in handles].count("done") == (4 if ends == "badly" else 5)
        assert len(ran.calls) == (2 if ends == "badly" else 1)
        assert policy.waits == 4
        assert store.inner._bells._watches == {}

    world.run(main)


@everywhere
def test_duplicates_may_be_refused_at_once(way: str) -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    policy = Idempotent(store, key="key", duplicates="raise", name="f")
    call = guard(way, Pipeline(policy, env=Env(clock)), Ran().fn)
    from resilient.idempotency import Hasher

    store.execute(Claim(Hasher("f")("", "k")[0], "them", 30.0))
    clock.advance(10.0)
    with pytest.raises(InFlight) as caught:
        call("k")
    assert (caught.value.retry_after, caught.value.key, caught.value.policy) == (20.0, "k", "f")
    assert clock.slept == []
    assert store.states == ["running"]


@everywhere
@pytest.mark.parametrize("watch", [True, False], ids=["rung", "polling"])
@pytest.mark.parametrize(
    ("max_wait", "ambient", "waited"),
    [(5.0, None, 5.0), (None, 3.0, 3.0), (5.0, 3.0, 3.0), (3.0, 5.0, 3.0), (0, None, 0.0)],
)
def test_the_wait_is_limited_by_max_wait_and_by_the_deadline(
    way: str, watch: bool, max_wait: Any, ambient: Any, waited: float
) -> None:
    clock = FakeClock()
    store = TroubledStore(clock, watch=watch)
    policy = Idempotent(store, key="key", max_wait=max_wait, name="f")
    call = guard(way, Pipeline(policy, env=Env(clock)), Ran().fn)
    from resilient.idempotency import Hasher

    store.execute(Claim(Hasher("f")("", "k")[0], "them", 30.0))
    limit = deadline(1e6 if ambient is None else ambient, clock=clock)
    with limit, pytest.raises(InFlight) as caught:
        call("k")
    assert clock.now() == pytest.approx(waited, abs=0.01)
    assert caught.value.retry_after == pytest.approx(30.0 - waited, abs=0.01)
    assert policy.waits == 1


@everywhere
@pytest.mark.parametrize("watch", [True, False], ids=["rung", "polling"])
def test_who_waits_for_an_owner_that_dies_is_told_that_it_is_in_doubt(way: str, watch: bool) -> None:
    clock = FakeClock()
    store = TroubledStore(clock, watch=watch)
    policy = Idempotent(store, key="key", name="f")
    call = guard(way, Pipeline(policy, env=Env(clock)), Ran().fn)
    from resilient.idempotency import Hasher

    store.execute(Claim(Hasher("f")("", "k")[0], "them", 30.0))
    with pytest.raises(InDoubt) as caught:
        call("k")
    assert clock.now() == pytest.approx(30.0, abs=0.2)
    assert caught.value.attempt == 1
    assert policy.in_doubts == 1


def test_a_store_says_how_often_it_wants_to_be_asked() -> None:
    clock = FakeClock()
    store = TroubledStore(clock, watch=False)
    store.poll = 2.0  # type: ignore[attr-defined]
    call: Fn = Pipeline(Idempotent(store, key="key", name="f", max_wait=5.0), env=Env(clock))(Ran().fn)
    from resilient.idempotency import Hasher

    store.execute(Claim(Hasher("f")("", "k")[0], "them", 30.0))
    with pytest.raises(InFlight):
        call("k")
    assert clock.slept == [2.0, 2.0, 1.0]


@everywhere
@pytest.mark.parametrize("state", ["done", "running", "in doubt"])
@pytest.mark.parametrize("in_doubt", ["raise", "rerun", lambda key, cents: RERUN], ids=["raise", "rerun", "ask"])
def test_other_arguments_are_refused_whatever_became_of_the_first_call(way: str, state: str, in_doubt: Any) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(clock), Ran()
    policy = Idempotent(store, key="key", in_doubt=in_doubt, name="f")

    def body(key: str, cents: int) -> int:
        return ran(key)  # type: ignore[no-any-return]

    call = guard(way, Pipeline(policy, env=Env(clock)), body)
    from resilient._binding import fingerprint_of
    from resilient.idempotency import Hasher

    stored = Hasher("f")("", "k")[0]
    got = store.execute(Claim(stored, "them", 30.0, fingerprint_of((5,))))
    if state == "done":
        store.execute(Finish(stored, "them", got.fence, b'{"v":1,"ok":7}', 100.0))
    elif state == "in doubt":
        clock.advance(31.0)
    with pytest.raises(KeyReused) as caught:
        call("k", 6)
    assert (caught.value.stored, caught.value.given) == (fingerprint_of((5,)), fingerprint_of((6,)))
    assert ran.calls == []
    assert store.states == [state]
    assert store.records[0].owner == "them"
    assert policy.replays == policy.waits == policy.in_doubts == 0


# -- in doubt ----------------------------------------------------------------------------------------------------------


@everywhere
def test_what_never_said_how_it_ended_is_in_doubt_and_nothing_runs(way: str) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(clock), Ran()
    policy = Idempotent(store, key="key", fingerprint=False, name="f")
    die(store, clock)
    call = guard(way, policy, ran.fn)
    with pytest.raises(InDoubt):
        call("k")
    with pytest.raises(InDoubt) as caught:
        call("k")
    assert (caught.value.attempt, caught.value.result, caught.value.key) == (1, ..., "k")
    assert str(caught.value) == "f: an earlier attempt began and never said how it ended (key 'k', attempt 1)"
    assert ran.calls == []
    assert (policy.in_doubts, policy.lost) == (2, 0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.attempt) == (str(caught.value), 1)


@everywhere
def test_what_is_safe_to_repeat_is_run_again_with_the_next_number(way: str) -> None:
    clock = FakeClock()
    store, fences = TroubledStore(clock), []
    policy = Idempotent(store, key="key", in_doubt="rerun", name="f")
    die(store, clock)
    die(store, clock)

    def body(key: str) -> int:
        fences.append(fence())
        return claim().attempt

    call = guard(way, policy, body)
    before = store.records[0].fence
    assert call("k") == call("k") == 3
    assert fences[0] > before
    assert policy.in_doubts == 0
    assert store.records[0].attempt == 3


@everywhere
@pytest.mark.parametrize("asks", ["plain", "async"])
def test_whoever_can_be_asked_is_asked_with_the_arguments_and_answers_for_the_call(way: str, asks: str) -> None:
    if way == "plain" and asks == "async":
        asks = "plain"
    clock, asked = FakeClock(), []
    store, ran = TroubledStore(clock), Ran()

    def ask(key: str, cents: int = 0) -> Any:
        asked.append((key, cents, claim().attempt))
        return "it was done"

    async def aask(key: str, cents: int = 0) -> Any:
        return ask(key, cents)

    policy = Idempotent(store, key="key", in_doubt=aask if asks == "async" else ask, name="f", fingerprint=False)

    def body(key: str, cents: int = 0) -> Any:
        return ran(key)

    die(store, clock)
    call = guard(way, policy, body)
    assert call("k", cents=5) == "it was done"
    assert asked == [("k", 5, 2)]
    assert call("k") == "it was done"
    assert call("other") == 1  # nobody asks about a first attempt
    assert len(asked) == 1
    assert ran.calls == ["other"]
    assert store.states == ["done", "done"]


@everywhere
def test_there_was_no_effect_so_it_runs_again(way: str) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(clock), Ran("done")
    die(store, clock)
    call = guard(way, Idempotent(store, key="key", in_doubt=lambda key: RERUN, name="f"), ran.fn)
    assert repr(RERUN) == "RERUN"
    assert call("k") == call("k") == "done"
    assert ran.calls == ["k"]


@everywhere
@pytest.mark.parametrize("error", [Boom("no answer"), KeyboardInterrupt(), InDoubt("other", "x", 1)])
def test_if_asking_fails_it_stays_in_doubt(way: str, error: BaseException) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(clock), Ran("done")

    def ask(key: str) -> Any:
        raise error

    policy = Idempotent(store, key="key", in_doubt=ask, name="f")
    die(store, clock)
    call = guard(way, policy, ran.fn)
    if isinstance(error, Exception):
        with pytest.raises(InDoubt, match="asking how the earlier attempt ended failed") as caught:
            call("k")
        assert caught.value.__cause__ is error
        assert caught.value.attempt == 2
        assert policy.in_doubts == 1
    else:
        with pytest.raises(KeyboardInterrupt):
            call("k")
    assert ran.calls == []
    assert store.states == ["in doubt"]
    assert not replayed()


@everywhere
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_inside_the_function_leaves_its_key_in_doubt(way: str, error: BaseException) -> None:
    store, ran = TroubledStore(), Ran(error)
    call = guard(way, Idempotent(store, key="key"), ran.fn)
    with pytest.raises(type(error)):
        call("k")
    assert store.states == ["in doubt"]
    with pytest.raises(InDoubt):
        call("k")
    assert ran.calls == ["k"]


# -- leases ------------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("ends", ["well", "badly", "declined"])
@pytest.mark.parametrize("taken", ["running", "done", "gone"])
def test_an_owner_that_lost_its_lease_disturbs_nobody(way: str, ends: str, taken: str) -> None:
    """powertools 3.37: a late owner overwrites another's record, or its failure deletes it and a third one runs."""
    clock, seen = FakeClock(), Recorder()
    store = TroubledStore(clock)
    policy = Idempotent(store, key="key", name="f", fingerprint=False, remember=Declined)
    from resilient.idempotency import Hasher

    stored = Hasher("f")("", "k")[0]

    def body(key: str) -> str:
        # (A clock of the store alone: no heartbeat is due.)
        clock.advance(31.0)
        got = store.execute(Claim(stored, "them", 30.0, take_over=True))
        if taken == "done":
            store.execute(Finish(stored, "them", got.fence, b'{"v":1,"ok":"theirs"}', 100.0))
        elif taken == "gone":
            store.execute(Release(stored, "them", got.fence))
        if ends == "badly":
            raise Boom
        if ends == "declined":
            raise Declined("no")
        return "mine"

    call = guard(way, Pipeline(policy, env=Env(sinks=[seen])), body)
    if ends == "badly":
        with pytest.raises(Boom):
            call("k")
    else:
        with pytest.raises(InDoubt, match="its lease was over while it ran") as caught:
            call("k")
        assert caught.value.attempt == 1
        assert caught.value.result == ("mine" if ends == "well" else ...)
        assert type(caught.value.__cause__) is (Declined if ends == "declined" else type(None))
    assert (policy.lost, policy.in_doubts) == (1, 0)
    assert [(event.key, event.attempt) for event in seen.of(LeaseLost)] == [("k", 1)]
    assert store.states == ([] if taken == "gone" else [taken])
    if taken == "done":
        assert call("k") == "theirs"


def test_a_lease_that_is_over_does_not_matter_while_nobody_took_it() -> None:
    clock = FakeClock()
    store = MemoryStore(clock)
    call: Fn = Idempotent(store, key="key")(lambda key: clock.advance(100.0))
    assert call("k") is None
    assert store.execute(Scan()).records[0].state == "done"


# -- cancellation ------------------------------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize("when", ["before it runs", "while it runs"])
def test_a_cancelled_call_frees_its_key_unless_it_had_started(world: World, when: str) -> None:
    async def main() -> None:
        store, ran = TroubledStore(), Ran()
        clock = FakeClock(autojump=False)

        @Idempotent(store, key="key")
        async def body(key: str) -> None:
            ran(key)
            if when == "while it runs":
                await clock.asleep(10.0)

        async with world() as tasks:
            if when == "before it runs":
                store.meet(Claim, lambda: clock.asleep(10.0))
            handle = tasks.spawn(lambda: body("k"))
            await tasks.settle()
            handle.cancel()
            await tasks.settle()
            assert handle.done
        assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))
        assert store.states == (["in doubt"] if when == "while it runs" else [])
        assert len(ran.calls) == (when == "while it runs")

    world.run(main)


@worlds
def test_cancelled_while_it_waits_for_another_it_leaves_that_one_alone(world: World) -> None:
    async def main() -> None:
        store, clock = TroubledStore(), FakeClock(autojump=False)

        @Idempotent(store, key="key")
        async def body(key: str) -> str:
            await clock.asleep(10.0)
            return "first"

        async with world() as tasks:
            first = tasks.spawn(lambda: body("k"))
            await tasks.settle()
            second = tasks.spawn(lambda: body("k"))
            await tasks.settle()
            second.cancel()
            await tasks.settle()
            assert second.done
            assert isinstance(second.error, (asyncio.CancelledError, trio.Cancelled))
            assert store.states == ["running"]
            assert store.inner._bells._watches == {}
            clock.advance(10.0)
        assert first.value == "first"

    world.run(main)


@worlds
@pytest.mark.parametrize("op", [Claim, Finish, Release, Abandon])
@pytest.mark.parametrize("written", ["before", "after"])
def test_cancelled_while_the_store_works_the_last_word_is_still_said(world: World, op: Any, written: str) -> None:
    """A result is not lost to a cancel, a key not left claimed; and who is cancelled stays cancelled."""

    async def main() -> None:
        clock = FakeClock(autojump=False)
        store = TroubledStore()
        inner = store._carry_out
        policy = Idempotent(store, key="key")

        @policy
        async def body(key: str) -> Any:
            if op is Release:
                raise Boom
            return object() if op is Abandon else "done"

        async def late() -> None:
            if written == "after":
                inner(store.ops[-1], None)
            await clock.asleep(10.0)

        store.meet(op, late)
        async with world() as tasks:
            handle = tasks.spawn(lambda: body("k"))
            await tasks.settle()
            assert not handle.done
            handle.cancel()
            await tasks.settle()
            assert handle.done
        assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))
        assert store.states == {Claim: [], Finish: ["done"], Release: [], Abandon: ["in doubt"]}[op]

    world.run(main)


@worlds
@pytest.mark.parametrize("last", ["down", "lost"])
def test_cancelled_and_the_store_fails_it_stays_cancelled_and_says_what_is_in_doubt(world: World, last: str) -> None:
    async def main() -> None:
        clock = FakeClock(autojump=False)
        store = TroubledStore()
        policy = Idempotent(store, key="key", name="f")
        call = policy(_coroutine("done"))
        store.meet(Finish, lambda: clock.asleep(10.0), *["down"] * 9)
        async with world() as tasks:
            handle = tasks.spawn(lambda: call("k"))
            await tasks.settle()
            handle.cancel()
        assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))
        assert handle.error.__notes__ == [
            "resilient: f ran; how it ended could not be stored, and its key 'k' is in doubt"
        ]
        assert store.states == ["running"]

    world.run(main)


def _coroutine(value: Any) -> Callable[[str], Awaitable[Any]]:
    async def coroutine(key: str) -> Any:
        return value

    return coroutine


@worlds
@pytest.mark.parametrize("on_store_error", ["refuse", "run"])
def test_cancelled_while_a_claim_that_failed_is_taken_back(world: World, on_store_error: Any) -> None:
    async def main() -> None:
        clock = FakeClock(autojump=False)
        store = TroubledStore()
        ran = Ran()

        @Idempotent(store, key="key", on_store_error=on_store_error)
        async def body(key: str) -> None:
            ran(key)

        store.meet(Claim, "lost", "lost", "lost")
        store.meet(Release, lambda: clock.asleep(10.0))
        async with world() as tasks:
            handle = tasks.spawn(lambda: body("k"))
            await tasks.settle()
            handle.cancel()
        assert isinstance(handle.error, (asyncio.CancelledError, trio.Cancelled))
        assert store.states == []
        assert ran.calls == []

    world.run(main)


@worlds
def test_cancelled_while_it_takes_over_what_was_in_doubt_stays_in_doubt(world: World) -> None:
    """Nobody has asked yet: were the key free, the next caller would not ask either."""

    async def main() -> None:
        clock, never = FakeClock(), FakeClock(autojump=False)
        store = TroubledStore(clock)
        asked, ran = Ran(RERUN), Ran("done")
        call = Idempotent(store, key="key", name="f", in_doubt=asked.fn)(_acall(ran))
        die(store, clock)

        async def late() -> None:
            store.inner.execute(store.ops[-1])
            await never.asleep(10.0)

        store.meet(Claim, None, late)
        async with world() as tasks:
            handle = tasks.spawn(lambda: call("k"))
            await tasks.settle()
            handle.cancel()
        assert handle.error is not None
        assert store.states == ["in doubt"]
        assert await call("k") == "done"
        assert (asked.calls, ran.calls) == (["k"], ["k"])

    world.run(main)


def _acall(ran: Ran) -> Callable[[str], Awaitable[Any]]:
    async def coroutine(key: str) -> Any:
        return ran(key)

    return coroutine


def test_a_store_that_fails_while_a_key_in_doubt_is_taken_over_leaves_it_in_doubt() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    asked, ran = Ran(RERUN), Ran("done")
    call = Idempotent(store, key="key", name="f", in_doubt=asked.fn)(ran.fn)
    die(store, clock)
    store.meet(Claim, None, "lost", "lost", "lost")
    with pytest.raises(StoreError):
        call("k")
    assert store.states == ["in doubt"]
    assert call("k") == "done"
    assert asked.calls == ["k"]


@pytest.mark.parametrize("op", [Claim, Finish, None])
def test_the_balance_of_cancels_is_kept_under_asyncio(op: Any) -> None:
    async def main() -> None:
        clock = FakeClock(autojump=False)
        store = TroubledStore()

        @Idempotent(store, key="key")
        async def body(key: str) -> str:
            if op is None:
                await clock.asleep(10.0)
            return "done"

        if op is not None:
            store.meet(op, lambda: clock.asleep(10.0))
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await body("k")
        assert task.cancelling() == 0
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(body("g"))
                group.create_task(_fail())
        assert [type(error) for error in caught.value.exceptions] == [Boom]
        assert await asyncio.wait_for(asyncio.shield(asyncio.create_task(_done())), 60) == "done"

    asyncio.run(main())


async def _fail() -> None:
    raise Boom


async def _done() -> str:
    return "done"


def test_scopes_of_trio_end_as_they_should() -> None:
    async def main() -> None:
        store = TroubledStore()

        @Idempotent(store, key="key")
        async def body(key: str) -> str:
            await trio.sleep_forever()
            return "done"

        with trio.move_on_after(0) as scope:
            await body("k")
        assert scope.cancelled_caught
        assert store.states == ["in doubt"]

    trio.run(main)


@pytest.mark.parametrize("op", [Claim, Finish, Release, Abandon])
def test_an_interrupt_while_the_store_works_counts_like_a_cancel(op: Any) -> None:
    store = TroubledStore()
    ran = Ran(Boom() if op is Release else object() if op is Abandon else "done")
    call = Idempotent(store, key="key")(ran.fn)
    store.meet(op, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        call("k")
    assert store.states == {Claim: [], Finish: ["done"], Release: [], Abandon: ["in doubt"]}[op]
    assert len(ran.calls) == (op is not Claim)


def test_an_interrupt_while_it_waits() -> None:
    store, clock = TroubledStore(watch=False), FakeClock()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    clock.sleep = interrupted  # type: ignore[method-assign]
    ran = Ran()
    call: Fn = Pipeline(Idempotent(store, key="key", name="f"), env=Env(clock))(ran.fn)
    from resilient.idempotency import Hasher

    store.execute(Claim(Hasher("f")("", "k")[0], "them", 30.0))
    with pytest.raises(KeyboardInterrupt):
        call("k")
    # And between two tries of the last word.
    store.meet(Finish, "down")
    with pytest.raises(KeyboardInterrupt):
        call("other")
    assert store.states == ["running", "done"] or store.states == ["done", "running"]


@both
def test_a_coroutine_that_is_closed_leaves_its_key_to_its_lease(way: str) -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    gate = FakeClock(autojump=False)

    @Idempotent(store, key="key")
    async def body(key: str) -> None:
        await gate.asleep(10.0)

    async def main() -> None:
        made: Any = body("k")
        made.send(None)
        made.close()
        with pytest.raises(LookupError):
            claim()

    run(way, main)
    assert store.states == ["running"]
    clock.advance(31.0)
    assert store.states == ["in doubt"]


# -- with other policies -----------------------------------------------------------------------------------------------


@everywhere
def test_a_retry_inside_keeps_the_key_and_one_outside_claims_again(way: str) -> None:
    for inside in (True, False):
        store, ran = TroubledStore(), Ran(Boom(), Boom(), "done")
        retry, once = Retry(Boom, attempts=3, wait=0.0), Idempotent(store, key="key")
        call = guard(way, Pipeline(once, retry) if inside else Pipeline(retry, once), ran.fn)
        assert call("k") == call("k") == "done"
        assert len(ran.calls) == 3
        assert store.names.count("Release") == (0 if inside else 2)
        assert store.states == ["done"]


@everywhere
def test_if_all_attempts_inside_failed_the_key_is_free(way: str) -> None:
    store, ran = TroubledStore(), Ran(Boom())
    call = guard(way, Pipeline(Idempotent(store, key="key"), Retry(Boom, attempts=3, wait=0.0)), ran.fn)
    with pytest.raises(Boom):
        call("k")
    assert len(ran.calls) == 3
    assert store.states == []


@both
def test_a_timeout_inside_leaves_what_had_started_in_doubt(way: str) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(), Ran()

    @Pipeline(Idempotent(store, key="key"), Timeout(1.0), env=Env(clock))
    async def body(key: str) -> None:
        ran(key)
        await clock.asleep(5.0)

    for error in (CallTimeout, InDoubt):
        with pytest.raises(error):
            run(way, lambda: body("k"))
    assert store.states == ["in doubt"]
    assert ran.calls == ["k"]


@pytest.mark.parametrize("ended", [False, True], ids=["it runs", "it has ended"])
def test_a_stray_of_a_timeout_inside_leaves_the_key_in_doubt(ended: bool) -> None:
    store, go, ran = TroubledStore(), threading.Event(), Ran()
    strays = Timeout(0.01, sync="thread")

    def failed(error: BaseException) -> bool:
        if ended:
            go.set()
            while strays.stray:
                SystemClock().sleep(0.001)
        return False

    @Pipeline(Idempotent(store, key="key"), Retry(failed, attempts=2), strays)
    def body(key: str) -> str:
        ran(key)
        assert go.wait(60)
        return "done"

    with pytest.raises(CallTimeout):
        body("k")
    assert store.states == ["in doubt"]
    while not ran.calls:  # the thread was slow
        SystemClock().sleep(0.001)
    assert ran.calls == ["k"]
    go.set()


@worlds
@pytest.mark.parametrize("how", ["timeout", "cancel", "refusal"])
def test_what_ends_in_the_queue_of_a_bulkhead_inside_frees_the_key(world: World, how: str) -> None:
    async def main() -> None:
        clock = FakeClock(autojump=False)
        store, ran = TroubledStore(), Ran()
        slots = Bulkhead(1, queue=0 if how == "refusal" else 1)

        @slots
        async def busy() -> None:
            await clock.asleep(5.0)

        call = Pipeline(Idempotent(store, key="key"), Timeout(1.0), slots, env=Env(clock))(_acall(ran))
        async with world() as tasks:
            tasks.spawn(busy)
            await tasks.settle()
            handle = tasks.spawn(lambda: call("k"))
            await tasks.settle()
            if how == "cancel":
                handle.cancel()
            elif how == "timeout":
                assert store.states == ["running"]
                clock.advance(1.0)
            await tasks.settle()
            assert handle.done
            expected: Any = {"timeout": CallTimeout, "refusal": BulkheadFull}.get(how, BaseException)
            assert isinstance(handle.error, expected)
            assert store.states == []
            clock.advance(5.0)
        assert ran.calls == []

    world.run(main)


@worlds
def test_what_an_attempt_returned_and_nobody_got_leaves_the_key_in_doubt(world: World) -> None:
    async def main() -> None:
        store, ran = TroubledStore(), Ran()
        call = Pipeline(Idempotent(store, key="key"), _LosesResults())(_acall(ran))
        async with world() as tasks:
            handle = tasks.spawn(lambda: call("k"))
        assert isinstance(handle.error, Boom)
        assert ran.calls == ["k"]
        assert store.states == ["in doubt"]

    world.run(main)


class _LosesResults(resilient.Policy):
    """Calls, and fails afterwards."""

    name = "loser"

    def coro(self, call: Any, env: Env) -> Any:
        async def loser(*args: Any, **kwargs: Any) -> Any:
            await call(*args, **kwargs)
            raise Boom

        return loser

    def sync(self, call: Any, env: Env) -> Any:
        def loser(*args: Any, **kwargs: Any) -> Any:
            call(*args, **kwargs)
            raise Boom

        return loser


def test_what_a_plain_function_returned_and_nobody_got_leaves_the_key_in_doubt() -> None:
    store = TroubledStore()
    call = Pipeline(Idempotent(store, key="key"), _LosesResults())(Ran().fn)
    with pytest.raises(Boom):
        call("k")
    assert store.states == ["in doubt"]


@worlds
def test_both_attempts_of_a_hedge_outside_have_one_key_and_one_effect(world: World) -> None:
    async def main() -> None:
        clock = FakeClock()
        store, ran = TroubledStore(), Ran("done")
        once = Idempotent(store, key="key")

        @Pipeline(Hedge(1.0), once, env=Env(clock))  # no OrderWarning: Idempotent inside makes it safe
        async def body(key: str) -> str:
            await clock.asleep(3.0)
            return ran(key)  # type: ignore[no-any-return]

        assert await body("k") == "done"
        assert ran.calls == ["k"]
        assert once.waits == 1
        assert store.states == ["done"]

    world.run(main)


@both
def test_a_hedge_inside_is_one_call(way: str) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(), Ran()

    @Pipeline(Idempotent(store, key="key"), Hedge(1.0, idempotent=True), env=Env(clock))
    async def body(key: str) -> int:
        n = ran(key)
        await clock.asleep(9.0 if n == 1 else 1.0)
        return n  # type: ignore[no-any-return]

    assert run(way, lambda: body("k")) == run(way, lambda: body("k")) == 2
    assert store.states == ["done"]


@everywhere
def test_every_policy_in_the_recommended_order(way: str) -> None:
    store, ran = TroubledStore(), Ran(Boom(), "done")
    pipeline = Pipeline(
        Fallback(None, on=ZeroDivisionError),
        Idempotent(store, key="key"),
        Retry(Boom, attempts=3, wait=0.0),
        CircuitBreaker("api", Consecutive(9)),
        RateLimiter(1000),
        Bulkhead(4),
        Timeout(10.0, sync="deadline"),
    )
    call = guard(way, pipeline, ran.fn)
    assert call("k") == call("k") == "done"
    assert len(ran.calls) == 2
    assert store.states == ["done"]


@everywhere
def test_stacked_decorators_are_one_pipeline(way: str) -> None:
    store, ran = TroubledStore(), Ran(Boom(), "done")
    once, retry = Idempotent(store, key="key"), Retry(Boom, wait=0.0)
    call = guard(way, lambda fn: once(retry(fn)), ran.fn)
    assert call("k") == call("k") == "done"
    assert store.names == ["Claim", "Finish", "Claim"]


@everywhere
def test_an_error_of_a_policy_inside_may_be_remembered(way: str) -> None:
    store, ran = TroubledStore(), Ran(Declined("no"))
    pipeline = Pipeline(Idempotent(store, key="key", remember=Declined), Retry(Boom, wait=0.0))
    call = guard(way, pipeline, ran.fn)
    for _ in range(2):
        with pytest.raises(Declined):
            call("k")
    assert len(ran.calls) == 1


@everywhere
def test_an_idempotent_call_without_protection_is_not_counted_to_the_one_around_it(way: str) -> None:
    outer_store, inner_store = TroubledStore(), TroubledStore()
    retry = Retry(ZeroDivisionError, wait=0.0)
    inner_ran = Ran(KeyboardInterrupt())
    inner: Fn = Pipeline(Idempotent(inner_store, key="key", on_store_error="run"), retry)(inner_ran.fn)

    def body(key: str) -> None:
        inner_store.meet(Claim, "down")
        try:
            inner(key)
        except KeyboardInterrupt:
            raise Boom from None

    call = guard(way, Pipeline(Idempotent(outer_store, key="key"), Retry(ZeroDivisionError, wait=0.0)), body)
    with pytest.raises(Boom):
        call("k")
    assert outer_store.states == []


# -- stores that fail --------------------------------------------------------------------------------------------------


@everywhere
def test_a_claim_that_may_have_been_written_is_repeated(way: str) -> None:
    for faults in (["lost"], ["never"], ["lost", "never"]):
        store, ran = TroubledStore(), Ran("done")
        call = guard(way, Idempotent(store, key="key"), ran.fn)
        store.meet(Claim, *faults)
        assert call("k") == call("k") == "done"
        assert len(ran.calls) == 1
        assert store.ops[0].owner == store.ops[len(faults)].owner
        assert store.records[0].attempt == 1


@everywhere
def test_a_store_that_is_down_refuses_and_nothing_runs(way: str) -> None:
    store, ran = TroubledStore(), Ran("done")
    policy = Idempotent(store, key="key")
    call = guard(way, policy, ran.fn)
    store.meet(Claim, "down")
    with pytest.raises(StoreError, match="is down") as caught:
        call("k")
    assert store.names == ["Claim"]
    assert caught.value.result is ...
    store.meet(Claim, "lost", "lost", "lost")
    with pytest.raises(StoreError, match="answer was lost"):
        call("k")
    assert store.names == ["Claim"] * 4 + ["Release"]
    assert store.states == []
    store.meet(Claim, "lost", "down")
    with pytest.raises(StoreError, match="is down"):
        call("k")
    assert store.states == []
    assert ran.calls == []
    assert policy.unprotected == 0


@everywhere
def test_a_store_that_is_down_is_run_past_only_if_asked_for(way: str) -> None:
    derived: set[str] = set()

    def unclaimed() -> str:
        assert (claim().key, claim().fence, claim().attempt) == ("k", 0, 0)
        derived.add(claim().derive("bank"))
        return "done"

    store, ran, seen = TroubledStore(), Ran(unclaimed), Recorder()
    policy = Idempotent(store, key="key", name="f", on_store_error="run")
    call = guard(way, Pipeline(policy, env=Env(sinks=[seen])), ran.fn)
    store.meet(Claim, "down", "down")
    assert call("k") == call("k") == "done"
    assert len(ran.calls) == 2
    assert (policy.unprotected, policy.replays) == (2, 0)
    # What it asks others to do once, they do once all the same.
    assert derived == {idempotency.Hold("", idempotency.Hasher("f")("", "k")[0]).derive("bank")}
    assert [(event.key, str(event.error)) for event in seen.of(Unprotected)] == [("k", "the store is down")] * 2
    ran.does = [Boom()]
    store.meet(Claim, "down")
    with pytest.raises(Boom):
        call("k")


def test_an_unprotected_call_that_is_closed_in_another_context_leaves_the_claim_there_alone() -> None:
    from resilient._once import Tally, _unprotected, current

    env, hold = Env(sinks=[]), idempotency.Hold("k", "s")
    how = Tally()
    how.name = "f"
    program: Any = _unprotected(how, env, hold, StoreError("down"))
    inside = contextvars.copy_context()
    inside.run(next, program)
    assert inside[current] is hold
    program.close()
    assert current.get() is None
    program = _unprotected(how, env, hold, StoreError("down"))
    contextvars.copy_context().run(next, program)
    with pytest.raises(StopIteration):
        program.send(Outcome("done", None))
    assert current.get() is None


@everywhere
def test_a_result_is_insisted_on_while_the_store_fails(way: str) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(clock), Ran("done")
    call = guard(way, Pipeline(Idempotent(store, key="key"), env=Env(clock)), ran.fn)
    store.meet(Finish, "down", "lost", "never", "down", "down")
    assert call("k") == call("k") == "done"
    assert store.names.count("Finish") == 6
    assert len(clock.slept) == 5
    assert 0.0 < clock.now() < 30.0


@everywhere
@pytest.mark.parametrize("ends", ["done", Declined("no")], ids=["well", "declined"])
def test_a_result_that_cannot_be_stored_is_on_the_error(way: str, ends: Any) -> None:
    clock = FakeClock()
    store, ran = TroubledStore(clock), Ran(ends)
    policy = Idempotent(store, key="key", remember=Declined, name="f")
    call = guard(way, Pipeline(policy, env=Env(clock)), ran.fn)
    store.meet(Finish, *["down"] * 20)
    with pytest.raises(StoreError, match="is down") as caught:
        call("k")
    assert caught.value.result == ("done" if ends == "done" else ...)
    assert caught.value.__cause__ is (None if ends == "done" else ends)
    assert caught.value.__notes__ == ["resilient: f ran; how it ended could not be stored, and its key 'k' is in doubt"]
    assert clock.now() < 30.0
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.result) == ("the store is down", caught.value.result)
    clock.advance(31.0)
    with pytest.raises(InDoubt):
        call("k")


@everywhere
@pytest.mark.parametrize("ends", ["done", Declined("no")], ids=["well", "declined"])
def test_a_result_that_cannot_be_stored_is_returned_if_asked_for(way: str, ends: Any) -> None:
    clock, seen = FakeClock(), Recorder()
    store, ran = TroubledStore(clock), Ran(ends)
    policy = Idempotent(store, key="key", remember=Declined, on_store_error="run")
    call = guard(way, Pipeline(policy, env=Env(clock, sinks=[seen])), ran.fn)
    store.meet(Finish, *["down"] * 20)
    if ends == "done":
        assert call("k") == "done"
    else:
        with pytest.raises(Declined):
            call("k")
    assert policy.unprotected == len(seen.of(Unprotected)) == 1


@everywhere
@pytest.mark.parametrize("faults", [["lost"], ["never"], ["down", "down"]])
def test_a_key_is_freed_though_the_store_fails_for_a_moment(way: str, faults: list[str]) -> None:
    store, ran = TroubledStore(), Ran(Boom())
    policy = Idempotent(store, key="key")
    call = guard(way, policy, ran.fn)
    store.meet(Release, *faults)
    with pytest.raises(Boom) as caught:
        call("k")
    assert not hasattr(caught.value, "__notes__")
    assert store.states == []
    assert policy.lost == 0


@everywhere
def test_a_key_that_cannot_be_freed_is_noted_on_the_error(way: str) -> None:
    store, ran = TroubledStore(), Ran(Boom(), KeyboardInterrupt())
    call = guard(way, Idempotent(store, key="key", name="f"), ran.fn)
    for op, error in ((Release, Boom), (Abandon, KeyboardInterrupt)):
        store.meet(op, "down", "down", "down")
        with pytest.raises(error) as caught:
            call(op.__name__)
        assert caught.value.__notes__ == [
            f"resilient: f: the store was not told (the store is down): the key {op.__name__!r} will be in doubt"
        ]
    assert store.states == ["running", "running"]


@everywhere
def test_a_result_that_cannot_be_kept_while_the_store_is_down(way: str) -> None:
    store = TroubledStore()
    call = guard(way, Idempotent(store, key="key"), Ran(object()).fn)
    store.meet(Abandon, *["down"] * 3)
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        call("k")
    assert store.states == ["running"]


@everywhere
@pytest.mark.parametrize("op", [Claim, Finish])
def test_a_store_that_raises_something_else_is_not_hushed_up(way: str, op: Any) -> None:
    store = TroubledStore()
    call = guard(way, Idempotent(store, key="key", on_store_error="run"), Ran("done").fn)
    store.meet(op, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        call("k")


# -- purge -------------------------------------------------------------------------------------------------------------


def test_purge_removes_what_has_ended_in_batches_and_nothing_that_runs() -> None:
    clock = FakeClock()
    for way in ("purge", "apurge"):
        store = TroubledStore(clock)
        policy = Idempotent(store, key="key", name="f")
        call: Fn = policy(Ran("done").fn)
        for n in range(7):
            call(str(n))
        die(store, clock, "dead")
        clock.advance(100.0)
        call("young")
        store.execute(Claim("live", "them", 1000.0))
        store.ops.clear()
        if way == "purge":
            assert policy.purge(50.0, batch=4) == 8
            assert policy.purge(50.0) == 0
        else:
            assert asyncio.run(policy.apurge(50.0, batch=4)) == 8
            assert trio.run(policy.apurge, 50.0) == 0
        assert store.names == ["Purge"] * 4
        assert sorted(store.states) == ["done", "running"]
    for bad, error in ((-1, ValueError), ("7d", TypeError)):
        with pytest.raises(error, match="older_than"):
            policy.purge(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch"):
        policy.purge(1, batch=0)


# -- nothing lingers ---------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("how", ["boom", "reused", "in flight", "in doubt", "store", "unkept", "lost", "unstored"])
def test_no_frame_lingers_in_a_cycle(way: str, how: str) -> None:
    class Marker:
        pass

    clock = FakeClock()
    store = TroubledStore(clock)
    policy = Idempotent(store, key="key", fingerprint=lambda key, marker: how == "reused", name="f", duplicates="raise")
    errors: dict[str, type[Exception]] = {
        "boom": Boom,
        "reused": KeyReused,
        "in flight": InFlight,
        "in doubt": InDoubt,
        "store": StoreError,
        "unkept": TypeError,
        "lost": InDoubt,
        "unstored": StoreError,
    }

    def body(key: str, marker: Any) -> Any:
        if how == "boom":
            raise Boom
        if how == "lost":
            clock.advance(31.0)
            store.inner.execute(Claim(stored, "them", 30.0, take_over=True))
        return object() if how == "unkept" else 1

    from resilient.idempotency import Hasher

    stored = Hasher("f")("", "k")[0]
    if way == "plain":
        call: Fn = Pipeline(policy, env=Env(clock))(body)
    else:

        async def coroutine(key: str, marker: Any) -> Any:
            return body(key, marker)

        call = Pipeline(policy, env=Env(clock))(coroutine)
    if how in ("reused", "in flight", "in doubt"):
        store.execute(Claim(stored, "them", 30.0, "00" if how == "reused" else ""))
        clock.advance(31.0 if how == "in doubt" else 0.0)
    store.meet(Claim, *["down"] * (how == "store"))
    store.meet(Finish, *["down"] * (20 * (how == "unstored")))

    def once() -> weakref.ref[Any]:
        marker = Marker()
        try:
            call("k", marker)
        except errors[how]:
            pass
        else:
            pytest.fail("no error")
        return weakref.ref(marker)

    async def aonce() -> weakref.ref[Any]:
        marker = Marker()
        try:
            await call("k", marker)
        except errors[how]:
            pass
        else:
            pytest.fail("no error")
        return weakref.ref(marker)

    gc.collect()
    gc.disable()
    try:
        if way == "plain":
            assert once()() is None
        else:

            async def main() -> None:
                held = await aonce()
                # (trio itself remembers the frames from which its timers are cancelled.)
                assert held() is None or (way, how) == ("trio", "lost")

            run(way, main)
    finally:
        gc.enable()


# -- the program by itself ---------------------------------------------------------------------------------------------


def _program(keeps: Any, store: TroubledStore) -> Any:
    from resilient._codec import Form
    from resilient._keeper import ThreadKeeper
    from resilient._once import Hold, once

    policy = Idempotent(store, key="key", name="f")
    keeper = ThreadKeeper(store, 30.0, lambda beat: None)
    form = Form(Json(), Any, ())
    return once(policy._how, form, (), keeps, store, keeper, Env(), Hold("k", "stored"), "", "")


def test_a_program_that_is_driven_beyond_its_outcome_returns_it() -> None:
    store = TroubledStore()
    for again in (False, True):
        program = _program(None, store)
        step, got = next(program), None
        while not isinstance(step, Outcome):
            got = Outcome("done", None) if step is RUN else store.execute(step)
            step = program.send(got)
        assert step.value == "done"
        with pytest.raises(StopIteration) as stop:
            next(program)
        assert stop.value.value is step
        assert store.names.count("Finish") == 1
        assert store.names.count("Claim") == 1 + again


@pytest.mark.parametrize("cut", [False, True])
def test_a_result_that_is_not_to_be_kept_frees_the_key(cut: bool) -> None:
    store, cancel = TroubledStore(), KeyboardInterrupt()
    if cut:
        store.meet(Release, cancel)
    outcome = drive(_program(lambda value: value != "bad", store), store, Env(), lambda: "bad", (), {})
    assert (outcome.value, outcome.error) == ((None, cancel) if cut else ("bad", None))
    assert store.states == []
    kept = drive(_program(lambda value: value != "bad", store), store, Env(), lambda: "good", (), {})
    assert kept.value == "good"
    assert store.states == ["done"]


def test_its_shells_may_be_used_by_themselves() -> None:
    ran = Ran()
    policy = Idempotent(MemoryStore(), key="key")
    plain = policy.sync(ran.fn, Env())
    assert plain("a") == plain("a") == 1
    call = policy.coro(_acall(ran), Env())
    assert asyncio.run(call("b")) == trio.run(call, "b") == 2


@both
def test_a_coroutine_that_is_closed_in_another_context_leaves_what_is_there_alone(way: str) -> None:
    gate = FakeClock(autojump=False)
    policy = Idempotent(TroubledStore(), key="key")

    @policy
    async def body(key: str) -> None:
        await gate.asleep(10.0)

    async def main() -> None:
        context = contextvars.Context()
        made: Any = body("k")
        made.send(None)
        context.run(made.close)
        assert context.run(resilient.replayed) is False
        assert claim().key == "k"  # it never came back here

    run(way, main)


@both
def test_a_function_that_says_it_does_not_know_leaves_its_key_in_doubt(way: str) -> None:
    asked: list[str] = []

    def ask(key: str) -> str:
        asked.append(key)
        return "charged"

    policy = Idempotent(MemoryStore(), key="key", in_doubt=ask, name="charge")

    @Pipeline(policy, Retry(ConnectionError))
    async def charge(key: str) -> str:
        raise claim().doubt("no answer within 2 s")

    async def main() -> None:
        with pytest.raises(InDoubt, match=r"^charge: no answer within 2 s \(key 'k', attempt 1\)$"):
            await charge("k")
        assert await charge("k") == "charged"

    run(way, main)
    assert asked == ["k"]


def test_a_retry_inside_that_ends_otherwise_does_not_wipe_the_doubt_away() -> None:
    errors: list[Exception] = []

    @Pipeline(policy := Idempotent(MemoryStore(), key="key"), Retry((InDoubt, ConnectionError), attempts=2, wait=0))
    def charge(key: str) -> str:
        errors.append(claim().doubt("no answer") if not errors else ConnectionError())
        raise errors[-1]

    with pytest.raises(ConnectionError):
        charge("k")
    with pytest.raises(InDoubt):
        charge("k")
    assert len(errors) == 2
    assert policy.in_doubts == 1


@both
def test_a_coroutine_that_is_driven_on_in_another_context_ends_all_the_same(way: str) -> None:
    store = TroubledStore()

    @types.coroutine
    def pause() -> Any:
        yield

    @Idempotent(store, key="key")
    async def body(key: str) -> str:
        await pause()
        return "done"

    async def main() -> None:
        made: Any = body("k")
        contextvars.Context().run(made.send, None)
        with pytest.raises(StopIteration) as stop:
            contextvars.Context().run(made.send, None)
        assert stop.value.value == "done"

    run(way, main)
    assert store.states == ["done"]


def test_a_refusal_is_no_result_even_for_who_remembers_every_exception() -> None:
    policy = Idempotent(MemoryStore(), key="key", remember=Exception)
    full = Bulkhead(1)

    @Pipeline(policy, full)
    def charge(key: str) -> str:
        return "charged"

    with full, pytest.raises(BulkheadFull):
        charge("k")
    assert charge("k") == "charged"


def test_two_of_them_around_one_function_both_know_which_starts_did_not_end() -> None:
    outer, inner = (Idempotent(MemoryStore(), key="key", name=name) for name in ("outer", "inner"))

    @Pipeline(outer, inner, Timeout(0.01))
    async def charge(key: str) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        with pytest.raises(CallTimeout):
            await charge("k")
        with pytest.raises(InDoubt, match=r"^outer"):
            await charge("k")

    asyncio.run(main())
    (record,) = inner.store.execute(Scan()).records
    assert record.state == "in doubt"


def test_a_lambda_that_turns_out_to_be_async_over_a_store_that_is_not_leaves_nothing_open() -> None:
    class Plain:
        def execute(self, op: Any) -> Any:
            return MemoryStore().execute(op)

    async def charge(key: str) -> str:
        return key

    turning: Fn = lambda key: charge(key)  # noqa: E731
    call = Idempotent(Plain(), key="key")(turning)
    with pytest.raises(TypeError, match="serves plain functions only"):
        call("k")


def test_a_lambda_that_turns_out_to_be_a_generator_is_refused() -> None:
    turning: Fn = lambda key: (letter for letter in key)  # noqa: E731
    call = Idempotent(MemoryStore(), key="key")(turning)
    with pytest.raises(TypeError, match="does not serve a generator function"):
        call("k")
