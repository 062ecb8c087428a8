"""The Redis store keeps the contract, on real servers, through every kind of client; and what is its own."""

from __future__ import annotations

import asyncio
import builtins
import itertools
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
import valkey
import valkey.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilient import stores
from resilient._contract import Case
from resilient.errors import StoreError
from resilient.stores._ops import (
    Abandon,
    Acquired,
    AnyOp,
    Busy,
    Claim,
    Completed,
    Doubtful,
    Finish,
    Forget,
    Purge,
    Read,
    Release,
    Renew,
    Scan,
)
from resilient.stores._protocol import AsyncStore, Store, Threaded, Watching
from resilient.stores.redis import RedisStore
from resilient.testing import store_contract

_names = itertools.count()


def prefix() -> str:
    """One that nobody has used."""
    return f"t{next(_names)}:"


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def store(redis_url: str) -> Iterator[RedisStore]:
    made = RedisStore(redis_url, prefix=prefix())
    yield made
    made.close()


# -- the contract ------------------------------------------------------------------------------------------------------


def _closing(store: RedisStore, client: Any) -> RedisStore:
    """A store that closes the client that was made for it."""
    if hasattr(client, "aclose"):

        async def aclose() -> None:
            await client.aclose()

        store.aclose = aclose  # type: ignore[method-assign]
    else:
        close = store.close

        def both() -> None:
            close()
            client.close()

        store.close = both  # type: ignore[method-assign]
    return store


@pytest.mark.parametrize("case", store_contract(), ids=str)
def test_contract_by_url(case: Case, redis_url: str) -> None:
    case(lambda: RedisStore(redis_url, prefix=prefix()))


@pytest.mark.parametrize("case", store_contract(sync=False, asyncio=False, trio=True), ids=str)
def test_contract_in_trio_by_threads(case: Case, redis_url: str) -> None:
    case(lambda: Threaded(RedisStore(redis_url, prefix=prefix())))


@pytest.mark.parametrize("case", store_contract(asyncio=False), ids=str)
@pytest.mark.parametrize("package", [redis, valkey])
def test_contract_by_a_client_for_threads(case: Case, package: Any, redis_url: str) -> None:
    def make() -> RedisStore:
        client = package.from_url(redis_url)
        return _closing(RedisStore(client, prefix=prefix()), client)

    case(make)


@pytest.mark.parametrize("case", store_contract(sync=False), ids=str)
@pytest.mark.parametrize("package", [redis.asyncio, valkey.asyncio])
def test_contract_by_a_client_for_tasks(case: Case, package: Any, redis_url: str) -> None:
    def make() -> RedisStore:
        client = package.from_url(redis_url)
        return _closing(RedisStore(client, prefix=prefix()), client)

    case(make)


# -- how one is made ---------------------------------------------------------------------------------------------------


def test_by_url_it_serves_threads_and_tasks(store: RedisStore) -> None:
    assert isinstance(store, Store)
    assert isinstance(store, AsyncStore)
    assert isinstance(store, Watching)
    assert store.poll == 2.0


def test_by_a_client_it_serves_what_the_client_does(redis_url: str) -> None:
    plain, tasks = redis.Redis.from_url(redis_url), redis.asyncio.Redis.from_url(redis_url)
    with plain:
        store = RedisStore(plain)
        assert isinstance(store, RedisStore)
        assert hasattr(store, "execute")
        assert hasattr(store, "watch")
        assert not hasattr(store, "aexecute")
        assert repr(store) == "RedisStore(<redis.client.Redis>, prefix='resilient:')"
        asyncio.run(store.aclose())
        assert plain.ping()  # the client is its owner's
    store = RedisStore(tasks)
    assert isinstance(store, RedisStore)
    assert hasattr(store, "aexecute")
    assert not hasattr(store, "execute")
    assert not hasattr(store, "watch")
    assert store.poll == 0.1
    assert repr(store) == "RedisStore(<redis.asyncio.client.Redis>, prefix='resilient:')"


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_a_url_may_have_options(scheme: str, redis_url: str, raw: Any) -> None:
    name = prefix()
    store = stores.open(redis_url.replace("redis", scheme) + f"?prefix={name}&timeout=2.5&db=0&decode_responses=yes")
    assert isinstance(store, RedisStore)
    assert store.prefix == name
    store.execute(Claim("k", "o", 30.0))
    assert raw.exists(f"{name}k")
    store.close()


def test_the_limit_of_a_socket_in_the_url_is_the_limit_of_an_operation() -> None:
    for url, seconds in (("redis://h?socket_timeout=3", 3.0), ("redis://h?timeout=2", 2.0), ("redis://h", 5.0)):
        made: Any = RedisStore(url)
        assert (made._port._timeout, made._tasks._timeout) == (seconds, seconds)
        assert made._port._options["socket_timeout"] == seconds
        assert made._tasks._options["socket_timeout"] is None


def test_a_unix_socket_will_do(raw: Any) -> None:
    path = raw.config_get("unixsocket")["unixsocket"]
    store = RedisStore.from_url(f"unix://{path}?prefix={prefix()}")
    assert isinstance(store.execute(Claim("k", "o", 30.0)), Acquired)
    store.close()


@pytest.mark.parametrize("url", ["rediss://localhost:6379", "valkeys://localhost/3"])
def test_tls_has_its_own_schemes(url: str) -> None:
    assert repr(RedisStore(url)) == f"RedisStore({url!r}, prefix='resilient:')"


def test_a_password_is_not_shown() -> None:
    shown = repr(RedisStore("redis://me:secret@db:7/1?password=secret"))
    assert shown == "RedisStore('redis://db:7/1', prefix='resilient:')"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://h?prefix=", "prefix must be printable"),
        ("redis://h?prefix=a%00", "prefix must be printable"),
        ("redis://h?timeout=soon", "timeout must be a number, not 'soon'"),
        ("redis://h?timeout=0", "timeout must be a positive"),
        ("redis://h?timeout=nan", "timeout must be a positive"),
        ("redis://h?timeout=inf", "timeout must be a positive"),
        ("redis://h?max_connections=0", "max_connections must be"),
        ("redis://h?colour=red", "option that redis-py does not take"),
        ("http://h", "the URL must begin with one of redis, rediss"),
    ],
)
def test_what_a_url_cannot_mean_is_an_error(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RedisStore.from_url(url)


def test_what_is_no_client_is_an_error() -> None:
    for thing in (None, 6379, object()):
        with pytest.raises(TypeError, match="where must be a URL, or a client"):
            RedisStore(thing)
    with pytest.raises(TypeError, match="prefix must be a string"):
        RedisStore("redis://h", prefix=b"x")  # type: ignore[arg-type]


def test_it_is_not_for_deriving_from() -> None:
    class Mine(RedisStore):
        pass

    with pytest.raises(TypeError, match="wrap it instead"):
        Mine("redis://h")


@pytest.mark.parametrize("module", [redis, redis.asyncio])
def test_a_client_that_decodes_cannot_hold_results(module: Any) -> None:
    with pytest.raises(ValueError, match="without decode_responses"):
        RedisStore(module.Redis(decode_responses=True))


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "redis":
            raise ImportError("no redis")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'resilient-kit\[redis\]'"):
        RedisStore("redis://h")


# -- records -----------------------------------------------------------------------------------------------------------


def acquire(store: Any, key: str, owner: str = "o", **more: Any) -> Acquired:
    answer = store.execute(Claim(key, owner, 30.0, **more))
    assert isinstance(answer, Acquired)
    return answer


def finished(store: Any, key: str, result: bytes = b"r", ttl: float = 60.0) -> Acquired:
    claim = acquire(store, key)
    assert store.execute(Finish(key, "o", claim.fence, result, ttl))
    return claim


def test_only_results_are_forgotten_by_the_server(store: RedisStore, raw: Any) -> None:
    name = f"{store.prefix}k"
    claim = acquire(store, "k")
    assert raw.pttl(name) == -1
    store.execute(Finish("k", "o", claim.fence, b"r", 60.0))
    assert 59_000 < raw.pttl(name) <= 60_000


def test_a_result_of_no_time_is_forgotten(store: RedisStore) -> None:
    finished(store, "k", ttl=0.0)
    assert isinstance(store.execute(Claim("k", "p", 30.0)), Acquired)


def test_a_claim_over_a_result_whose_time_is_over_begins_anew(store: RedisStore, raw: Any) -> None:
    # As it is on a server that has not looked at the key yet.
    first = finished(store, "k")
    raw.hset(f"{store.prefix}k", mapping={"x": "1", "f": str(first.fence + 10**13)})
    assert store.execute(Read("k")) is None
    assert store.execute(Scan()).records == ()
    second = store.execute(Claim("k", "p", 30.0))
    assert second == Acquired(first.fence + 10**13 + 1, 1)
    assert raw.pttl(f"{store.prefix}k") == -1
    record = store.execute(Read("k"))
    assert record is not None
    assert (record.state, record.result, record.expires_at) == ("running", None, None)


@pytest.mark.parametrize("seconds", [1e300, float("inf")])
def test_times_without_end_are_long(store: RedisStore, seconds: float) -> None:
    claim = store.execute(Claim("k", "o", seconds))
    assert isinstance(claim, Acquired)
    assert store.execute(Renew("k", "o", claim.fence, seconds))
    assert store.execute(Finish("k", "o", claim.fence, b"r", seconds))
    assert store.execute(Purge(seconds)) == 0
    record = store.execute(Read("k"))
    assert record is not None
    assert record.expires_at is not None
    assert record.expires_at > record.began_at + 3e9


def test_texts_and_results_come_back_as_they_are(store: RedisStore) -> None:
    texts = ["", "\0", "\r\n$5\r\n", "ä€𝄞", "\ud800", "*?[a]\\"]
    for text in texts:
        key = f"k{text}"
        claim = acquire(store, key, f"o{text}", fingerprint=text, label=f"label {text}")
        record = store.execute(Read(key))
        assert record is not None
        assert (record.key, record.owner, record.fingerprint, record.label) == (key, f"o{text}", text, f"label {text}")
        result = bytes(range(256)) * 3
        assert store.execute(Finish(key, f"o{text}", claim.fence, result, 60.0))
        assert store.execute(Claim(key, "p", 30.0)) == Completed(claim.fence, 1, text, result)
    assert {record.key for record in store.execute(Scan(limit=1000)).records} == {f"k{text}" for text in texts}


def test_the_clock_of_the_client_does_not_matter(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (RedisStore(redis_url, prefix="skew:") for _ in range(2))
    first = acquire(one, "k")
    monkeypatch.setattr("time.time", lambda: 9e9)
    busy = two.execute(Claim("k", "p", 30.0, take_over=True))
    assert isinstance(busy, Busy)
    assert busy.lease_left > 20
    assert two.execute(Abandon("k", "o", first.fence))
    monkeypatch.setattr("time.time", lambda: 0.0)
    second = one.execute(Claim("k", "p", 30.0, take_over=True))
    assert isinstance(second, Acquired)
    assert second.fence > first.fence
    one.execute(Release("k", "p", 0))
    one.close()
    two.close()


# -- keys that are many ------------------------------------------------------------------------------------------------


def test_a_scan_of_many_pages_sees_everything_once(store: RedisStore) -> None:
    keys = {f"k{n}" for n in range(300)}
    for key in keys:
        acquire(store, key, label="odd" if int(key[1:]) % 2 else "even")
    seen: list[str] = []
    after = ""
    pages = 0
    while True:
        page = store.execute(Scan(after, 10, "odd"))
        seen += [record.key for record in page.records]
        pages += 1
        after = page.after
        if not after:
            break
    assert set(seen) == {key for key in keys if int(key[1:]) % 2}
    assert pages > 3


@pytest.mark.parametrize("after", ["x", "node/1", "/-1", "/", "1"])
def test_a_place_that_no_page_named_is_an_error(store: RedisStore, after: str) -> None:
    with pytest.raises(ValueError, match="after must come from a page of this store"):
        store.execute(Scan(after))


def test_a_prefix_is_no_pattern(redis_url: str, raw: Any) -> None:
    mine, other = RedisStore(redis_url, prefix="g*?[a-c]\\^:"), RedisStore(redis_url, prefix="gxxa\\^:")
    acquire(mine, "k", "o")
    acquire(other, "k2", "o")
    assert [record.key for record in mine.execute(Scan()).records] == ["k"]
    assert [record.key for record in other.execute(Scan()).records] == ["k2"]
    for store, key in ((mine, "k"), (other, "k2")):
        assert store.execute(Release(key, "o", 0))
        store.close()


def test_purge_goes_by_batches_and_spares_leases(store: RedisStore) -> None:
    for n in range(25):
        finished(store, f"done{n}")
        acquire(store, f"running{n}")
    assert store.execute(Purge(3600.0)) == 0
    removed: list[int] = []
    while not removed or removed[-1] == 10:
        removed.append(store.execute(Purge(0.0, 10)))
    assert removed == [10, 10, 5]
    assert {record.state for record in store.execute(Scan(limit=1000)).records} == {"running"}


def test_what_is_not_ours_is_left_alone(store: RedisStore, raw: Any) -> None:
    raw.set(f"{store.prefix}text", "x")
    raw.hset(f"{store.prefix}hash", "some", "thing")
    raw.hset(f"{store.prefix}newer", mapping={"v": "2", "f": "1"})
    finished(store, "done")
    assert [record.key for record in store.execute(Scan()).records] == ["done"]
    assert store.execute(Purge(0.0)) == 1
    for key, text in (("text", "not a record"), ("hash", "not one of ours"), ("newer", "another version")):
        for op in every_op(key):
            with pytest.raises(StoreError, match=text) as caught:
                store.execute(op)
            assert not caught.value.maybe_written
    assert raw.exists(f"{store.prefix}text", f"{store.prefix}hash", f"{store.prefix}newer") == 3
    assert raw.hgetall(f"{store.prefix}hash") == {b"some": b"thing"}


def every_op(key: str) -> list[AnyOp]:
    return [
        Claim(key, "o", 30.0),
        Claim(key, "p", 30.0, take_over=True, awaited=True),
        Renew(key, "o", 7, 30.0),
        Finish(key, "o", 7, b"r", 60.0),
        Release(key, "o", 0),
        Abandon(key, "o", 0),
        Read(key),
        Forget(key),
    ]


GOOD = {
    b"v": b"1",
    b"f": b"7",
    b"a": b"1",
    b"m": b"1000",
    b"o": b"o",
    b"p": b"fp",
    b"l": b"label",
    b"b": b"1000",
}
DONE = {**GOOD, b"r": b"result", b"x": b"9000000000000000"}
NUMBERS = st.sampled_from(
    [
        b"",
        b"nan",
        b"-nan",
        b"inf",
        b"-inf",
        b"1e400",
        b"-1",
        b"1.5",
        b"9007199254740993",
        b"x",
        b"0x",
        b"1" * 400,
        b"\xff",
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.sampled_from([GOOD, DONE]),
    st.dictionaries(st.sampled_from([b"f", b"a", b"m"]), st.none() | NUMBERS, min_size=1),
    st.dictionaries(st.sampled_from([b"o", b"p"]), st.none()),
)
def test_a_damaged_record_is_named_and_nothing_is_done(
    store: RedisStore,
    raw: Any,
    good: dict[bytes, bytes],
    numbers: dict[bytes, bytes | None],
    texts: dict[bytes, bytes | None],
) -> None:
    fields = {name: value for name, value in {**good, **numbers, **texts}.items() if value is not None}
    name = f"{store.prefix}k"
    raw.delete(name)
    raw.hset(name, mapping=fields)
    words = {b"f": "fence", b"a": "attempt", b"m": "mark", b"o": "owner", b"p": "fingerprint"}
    for op in every_op("k"):
        with pytest.raises(StoreError, match="record is damaged") as caught:
            store.execute(op)
        assert all(words[field] in str(caught.value) for field in {**numbers, **texts})
        assert not caught.value.maybe_written
    assert store.execute(Scan()).records == ()
    assert store.execute(Purge(0.0)) == 0
    assert raw.hgetall(name) == fields


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(DONE)), st.binary(max_size=30) | NUMBERS))
def test_whatever_a_record_holds_answers_are_sane_or_store_errors(
    store: RedisStore, raw: Any, hostile: dict[bytes, bytes]
) -> None:
    name = f"{store.prefix}k"
    for op in [*every_op("k"), Scan(), Scan(text="a"), Purge(0.0)]:
        raw.delete(name)
        raw.hset(name, mapping={**DONE, **hostile})
        written: list[bool] = []
        try:
            store.execute(op)
        except StoreError as error:
            written.append(error.maybe_written)
        assert not any(written)


@pytest.mark.parametrize(
    ("fields", "word"), [({"l": None}, "label"), ({"b": "nan"}, "began"), ({"x": None, "r": "r"}, "expires")]
)
def test_a_damaged_record_cannot_be_read(store: RedisStore, raw: Any, fields: dict[str, Any], word: str) -> None:
    name = f"{store.prefix}k"
    raw.hset(name, mapping=GOOD)
    for field, value in fields.items():
        raw.hdel(name, field) if value is None else raw.hset(name, field, value)
    with pytest.raises(StoreError, match=f"damaged: its {word}"):
        store.execute(Read("k"))


def test_text_that_is_no_text_is_a_damage(store: RedisStore, raw: Any) -> None:
    raw.hset(f"{store.prefix}k", mapping={**GOOD, b"p": b"\xff"})
    with pytest.raises(StoreError, match="damaged: a text in it is not UTF-8"):
        store.execute(Claim("k", "x", 30.0))
    with pytest.raises(StoreError, match="damaged: a text in it is not UTF-8"):
        store.execute(Read("k"))
    raw.hset(f"{store.prefix}\xff".encode("latin-1"), mapping=GOOD)
    assert store.execute(Scan()).records == ()


def test_a_fence_that_cannot_grow_is_a_damage(store: RedisStore, raw: Any) -> None:
    fields = {**GOOD, b"f": b"9007199254740991"}
    raw.hset(f"{store.prefix}k", mapping=fields)
    assert isinstance(store.execute(Claim("k", "p", 30.0)), Doubtful)
    with pytest.raises(StoreError, match="damaged: its fence"):
        store.execute(Claim("k", "p", 30.0, take_over=True))
    assert raw.hgetall(f"{store.prefix}k") == fields


def test_an_answer_that_makes_no_sense_is_a_store_error() -> None:
    class Client:
        scan_iter = None

        def execute_command(self, *args: Any) -> Any:
            return [1]

    with pytest.raises(StoreError, match=r"makes no sense: \[1\]"):
        RedisStore(Client()).execute(Claim("k", "o", 1.0))


# -- scripts -----------------------------------------------------------------------------------------------------------


def test_scripts_that_the_server_has_forgotten_are_sent_again(store: RedisStore, raw: Any) -> None:
    for n in range(2):
        raw.script_flush()
        claim = acquire(store, f"k{n}")
        raw.script_flush()
        assert store.execute(Finish(f"k{n}", "o", claim.fence, b"r", 60.0))
        raw.script_flush()
        assert store.execute(Purge(3600.0)) == 0

    async def main() -> None:
        raw.script_flush()
        assert isinstance(await store.aexecute(Claim("a", "o", 30.0)), Acquired)
        await store.aclose()

    asyncio.run(main())


def test_scripts_that_the_server_has_forgotten_are_sent_again_by_clients(redis_url: str, raw: Any) -> None:
    plain = RedisStore(raw, prefix=prefix())
    raw.script_flush()
    acquire(plain, "k")

    async def main() -> None:
        async with redis.asyncio.Redis.from_url(redis_url) as client:
            raw.script_flush()
            store = RedisStore(client, prefix=prefix())
            assert isinstance(await store.aexecute(Claim("k", "o", 30.0)), Acquired)

    asyncio.run(main())


# -- races -------------------------------------------------------------------------------------------------------------


def test_of_threads_that_race_for_a_key_one_gets_it(redis_url: str) -> None:
    store = RedisStore(redis_url, prefix=prefix())
    go = threading.Barrier(8)
    got: dict[str, list[str]] = {f"k{n}": [] for n in range(50)}

    def run(owner: str) -> None:
        go.wait()
        for key in got:
            if isinstance(store.execute(Claim(key, owner, 30.0)), Acquired):
                got[key].append(owner)

    threads = [threading.Thread(target=run, args=(f"o{n}",), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(owners) for owners in got.values()] == [1] * 50
    store.close()


def test_of_processes_that_race_for_a_key_one_gets_it(redis_url: str) -> None:
    name = prefix()
    program = textwrap.dedent("""
        import sys
        from resilient.stores._ops import Acquired, Claim
        from resilient.stores.redis import RedisStore
        store = RedisStore(sys.argv[1], prefix=sys.argv[2])
        print("ready", flush=True)
        sys.stdin.readline()
        got = [n for n in range(200) if isinstance(store.execute(Claim(f"k{n}", sys.argv[3], 30.0)), Acquired)]
        print(*got)
        store.close()
    """)
    command = [sys.executable, "-W", "error", "-c", program, redis_url, name]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen([*command, f"o{n}"], stdin=pipe, stdout=pipe, text=True) for n in range(3)]
    got: list[str] = []
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        got += racer.communicate()[0].split()
        assert racer.returncode == 0
    assert sorted(map(int, got)) == list(range(200))


def test_a_forked_child_has_connections_of_its_own(redis_url: str) -> None:
    program = textwrap.dedent("""
        import asyncio, os, sys
        from resilient.clock import SystemClock
        from resilient.stores._ops import Acquired, Claim, Release
        from resilient.stores.redis import RedisStore
        store = RedisStore(sys.argv[1], prefix=sys.argv[2])
        watch = store.watch("w", task=False)   # the thread of the parent is not there in the child
        async def claim(key):
            return await store.aexecute(Claim(key, "o", 30.0))
        store.execute(Claim("w", "o", 30.0))
        loop = asyncio.new_event_loop()        # open still when the child begins
        loop.run_until_complete(claim("a"))
        child = os.fork()
        if not child:
            good = all(isinstance(store.execute(Claim(f"c{n}", "o", 30.0)), Acquired) for n in range(50))
            good = good and isinstance(asyncio.run(claim("ca")), Acquired)
            mine = store.watch("w", task=False)
            mine.park(SystemClock(), 20.0)     # rung by being subscribed
            store.execute(Claim("w", "p", 30.0, awaited=True))
            store.execute(Release("w", "o", 0))
            start = SystemClock.now()
            mine.park(SystemClock(), 20.0)
            good = good and SystemClock.now() - start < 10
            store.close()
            os._exit(0 if good else 1)
        good = all(isinstance(store.execute(Claim(f"p{n}", "o", 30.0)), Acquired) for n in range(50))
        _, status = os.waitpid(child, 0)
        assert good and os.waitstatus_to_exitcode(status) == 0, status
        assert isinstance(loop.run_until_complete(claim("b")), Acquired)
        loop.run_until_complete(store.aclose())
        loop.close()
        watch.close()
        store.close()
    """)
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program, redis_url, prefix()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
