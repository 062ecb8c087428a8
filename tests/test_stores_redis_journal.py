"""Journals in Redis: on the record's own key, whatever is found there, whatever breaks, on clusters too."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilient.errors import StoreError
from resilient.stores._ops import (
    Abandon,
    Acquired,
    AnyOp,
    Append,
    Begin,
    Busy,
    Claim,
    Completed,
    Finish,
    Forget,
    History,
    Purge,
    Record,
    Release,
    Renew,
    Scan,
)
from resilient.stores.memory import MemoryStore
from resilient.stores.redis import RedisStore
from resilient.testing import FakeClock
from tests._faulty import Fault, FaultProxy
from tests.test_stores_redis_faults import cluster as two_nodes

nodes = two_nodes  # the fixture, for the tests of this file

_names = itertools.count()


def prefix() -> str:
    return f"j{next(_names)}:"


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


def begun(store: Any, key: str = "k", entries: int = 1, **more: Any) -> Acquired:
    """A record with that many entries: b"0", b"1", …"""
    got = store.execute(Begin(key, "o", 30.0, b"0", **more))
    assert isinstance(got, Acquired)
    for at in range(1, entries):
        assert store.execute(Append(key, "o", got.fence, at, b"%d" % at, 30.0)) is True
    return got


def story(store: Any, key: str = "k") -> tuple[Record, tuple[bytes, ...]]:
    answer: tuple[Record, tuple[bytes, ...]] | None = store.execute(History(key))
    assert answer is not None
    return answer


# -- where it is kept --------------------------------------------------------------------------------------------------


def test_the_journal_is_on_the_key_of_the_record(store: RedisStore, raw: Any) -> None:
    name = f"{store.prefix}k"
    got = begun(store, entries=3, label="saga")
    assert raw.keys(f"{store.prefix}*") == [name.encode()]
    assert raw.hmget(name, "e0", "e1", "e2", "e3", "c") == [b"0", b"1", b"2", None, b"3"]
    assert raw.pttl(name) == -1
    assert store.execute(Finish("k", "o", got.fence, b"r", 60.0))
    assert 59_000 < raw.pttl(name) <= 60_000  # and with it the journal
    assert story(store)[1] == (b"0", b"1", b"2")


def test_an_idempotency_key_has_no_fields_of_a_journal(store: RedisStore, raw: Any) -> None:
    assert isinstance(store.execute(Claim("k", "o", 30.0)), Acquired)
    assert set(raw.hkeys(f"{store.prefix}k")) == {b"v", b"f", b"a", b"m", b"o", b"p", b"l", b"b"}
    assert story(store)[1] == ()


@pytest.mark.parametrize("ended", ["release", "forget", "purge"])
def test_nothing_of_a_removed_record_is_left(store: RedisStore, raw: Any, ended: str) -> None:
    got = begun(store, entries=5)
    if ended == "release":
        assert store.execute(Release("k", "o", got.fence))
    else:
        assert store.execute(Abandon("k", "o", got.fence))
        assert store.execute(Forget("k") if ended == "forget" else Purge(0.0)) == 1
    assert raw.keys(f"{store.prefix}*") == []


def test_a_begin_over_a_result_whose_time_is_over_leaves_no_old_entry(store: RedisStore, raw: Any) -> None:
    # As it is on a server that has not looked at the key yet.
    first = begun(store, entries=4)
    assert store.execute(Finish("k", "o", first.fence, b"r", 60.0))
    raw.hset(f"{store.prefix}k", "x", "1")
    assert store.execute(History("k")) is None
    second = store.execute(Begin("k", "p", 30.0, b"new"))
    assert isinstance(second, Acquired)
    assert second.attempt == 1
    assert raw.hmget(f"{store.prefix}k", "e0", "e1", "c", "r", "x") == [b"new", None, b"1", None, None]
    assert raw.pttl(f"{store.prefix}k") == -1


@pytest.mark.parametrize(
    "how", [Begin("k", "p", 30.0, b"other", take_over=True), Claim("k", "p", 30.0, take_over=True)]
)
def test_a_takeover_forgets_who_waited_and_nothing_else(store: RedisStore, raw: Any, how: Any) -> None:
    got = begun(store, entries=2, label="saga")
    assert isinstance(store.execute(Claim("k", "p", 30.0, awaited=True)), Busy)
    assert raw.hget(f"{store.prefix}k", "w") == b"1"
    raw.hset(f"{store.prefix}k", "m", "1")  # the lease ends by itself
    before = raw.hgetall(f"{store.prefix}k")
    second = store.execute(how)
    assert isinstance(second, Acquired)
    assert (second.attempt, second.fence > got.fence) == (2, True)
    after = raw.hgetall(f"{store.prefix}k")
    assert set(before) - set(after) == {b"w"}
    assert {field for field in after if after[field] != before[field]} == {b"f", b"a", b"m", b"o"}


@pytest.mark.parametrize("entries", [999, 1000, 1001, 2500])
def test_a_long_journal_is_read_in_pieces(store: RedisStore, raw: Any, entries: int) -> None:
    begun(store)
    expected = [b"%d" % at for at in range(entries)]
    raw.hset(f"{store.prefix}k", mapping={f"e{at}": entry for at, entry in enumerate(expected)} | {"c": str(entries)})
    assert story(store)[1] == tuple(expected)


def test_times_without_end_are_long(store: RedisStore) -> None:
    got = store.execute(Begin("k", "o", float("inf"), b""))
    assert isinstance(got, Acquired)
    assert store.execute(Append("k", "o", got.fence, 1, b"", 1e300))
    record, _ = story(store)
    assert record.mark > record.began_at + 3e9


def test_texts_come_back_as_they_are(store: RedisStore) -> None:
    for text in ("\0", "\r\n$5\r\n", "ä€𝄞", "\ud800", "*?[a]\\"):
        key = f"k{text}"
        got = store.execute(Begin(key, f"o{text}", 30.0, b"", text))
        assert isinstance(got, Acquired)
        assert story(store, key)[0].label == text
        assert store.execute(Append(key, f"o{text}", got.fence, 1, b"", 30.0, f"label {text}"))
        record, entries = story(store, key)
        assert (record.key, record.owner, record.label, entries) == (key, f"o{text}", f"label {text}", (b"", b""))


def test_a_gap_names_the_key_and_both_numbers(store: RedisStore) -> None:
    got = begun(store, entries=2)
    before = story(store)
    text = "the journal of k has 2 entries: number 7 would leave a gap"
    with pytest.raises(StoreError, match=text) as caught:
        store.execute(Append("k", "o", got.fence, 7, b"", 60.0, "other"))
    assert not caught.value.maybe_written
    assert story(store) == before

    async def main() -> None:
        with pytest.raises(StoreError, match=text):
            await store.aexecute(Append("k", "o", got.fence, 7, b"", 60.0))
        await store.aclose()

    asyncio.run(main())


# -- as in memory ------------------------------------------------------------------------------------------------------


OWNERS = st.sampled_from(["a", "b"])
NUMBERS_OF_ENTRIES = st.integers(0, 4)
LABELS = st.sampled_from(["", "x", "y"])
STEPS = st.one_of(
    st.builds(Begin, st.just("k"), OWNERS, st.just(600.0), st.binary(max_size=3), LABELS, st.booleans()),
    st.builds(Claim, st.just("k"), OWNERS, st.just(600.0), LABELS, LABELS, st.booleans()),
    st.builds(
        Append, st.just("k"), OWNERS, st.just(0), NUMBERS_OF_ENTRIES, st.binary(max_size=3), st.just(600.0), LABELS
    ),
    st.builds(Renew, st.just("k"), OWNERS, st.just(0), st.just(600.0)),
    st.builds(Finish, st.just("k"), OWNERS, st.just(0), st.binary(max_size=3), st.just(600.0)),
    st.builds(Release, st.just("k"), OWNERS, st.just(0)),
    st.builds(Abandon, st.just("k"), OWNERS, st.just(0)),
    st.just(Forget("k")),
    st.sampled_from([Scan(state=state) for state in ("", "running", "in doubt", "done", "none such")]),
)


def plain(answer: Any) -> Any:
    """An answer without the numbers and instants that are each store's own."""
    if isinstance(answer, Record):
        return (answer.state, answer.owner, answer.attempt, answer.fingerprint, answer.label, answer.result)
    if isinstance(answer, tuple):
        return tuple(plain(each) for each in answer)
    if hasattr(answer, "records"):
        return plain(answer.records)
    if hasattr(answer, "attempt"):
        return (type(answer), answer.attempt, getattr(answer, "fingerprint", None), getattr(answer, "result", None))
    return answer


def outcome(store: Any, op: AnyOp) -> Any:
    try:
        return plain(store.execute(op))
    except StoreError as error:
        return str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.lists(STEPS, max_size=25))
def test_it_answers_as_the_store_in_memory_does(store: RedisStore, raw: Any, steps: list[AnyOp]) -> None:
    raw.delete(f"{store.prefix}k")
    clock = FakeClock()
    memory = MemoryStore(clock)
    for step in steps:
        clock.advance(0.001)
        assert outcome(store, step) == outcome(memory, step), step
        assert outcome(store, History("k")) == outcome(memory, History("k")), step


# -- what is found there -----------------------------------------------------------------------------------------------


def journal_ops(key: str) -> list[AnyOp]:
    return [
        Begin(key, "o", 30.0, b"entry"),
        Begin(key, "p", 30.0, b"entry", "label", True),
        Append(key, "o", 7, 0, b"entry", 30.0, "label"),
        Append(key, "o", 7, 2, b"entry", 30.0),
        History(key),
    ]


GOOD = {b"v": b"1", b"f": b"7", b"a": b"1", b"m": b"1000", b"o": b"o", b"p": b"fp", b"l": b"label", b"b": b"1000"}
LONG = {**GOOD, b"c": b"2", b"e0": b"zero", b"e1": b"one"}
DONE = {**LONG, b"r": b"result", b"x": b"9000000000000000"}
HOSTILE = st.sampled_from(
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


def test_what_is_not_ours_is_left_alone(store: RedisStore, raw: Any) -> None:
    raw.set(f"{store.prefix}text", "x")
    raw.hset(f"{store.prefix}hash", "some", "thing")
    raw.hset(f"{store.prefix}newer", mapping={"v": "2", "f": "1"})
    for key, text in (("text", "not a record"), ("hash", "not one of ours"), ("newer", "another version")):
        for op in journal_ops(key):
            with pytest.raises(StoreError, match=text) as caught:
                store.execute(op)
            assert not caught.value.maybe_written
    begun(store)
    for state, found in (("running", ["k"]), ("in doubt", []), ("done", [])):
        assert [record.key for record in store.execute(Scan(state=state)).records] == found
    assert raw.hgetall(f"{store.prefix}hash") == {b"some": b"thing"}
    assert raw.hgetall(f"{store.prefix}newer") == {b"v": b"2", b"f": b"1"}


@pytest.mark.parametrize("field", [b"f", b"a", b"m", b"o", b"p"])
def test_a_damaged_record_is_named_and_nothing_is_done(store: RedisStore, raw: Any, field: bytes) -> None:
    word = {b"f": "fence", b"a": "attempt", b"m": "mark", b"o": "owner", b"p": "fingerprint"}[field]
    fields = {name: value for name, value in LONG.items() if name != field}
    raw.hset(f"{store.prefix}k", mapping=fields)
    for op in journal_ops("k"):
        with pytest.raises(StoreError, match=f"the record is damaged: its {word}") as caught:
            store.execute(op)
        assert not caught.value.maybe_written
    assert raw.hgetall(f"{store.prefix}k") == fields


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(HOSTILE)
def test_a_count_that_is_none_is_a_damage(store: RedisStore, raw: Any, count: bytes) -> None:
    fields = {**LONG, b"c": count}
    raw.delete(f"{store.prefix}k")
    raw.hset(f"{store.prefix}k", mapping=fields)
    for op in (History("k"), Append("k", "o", 7, 2, b"entry", 30.0, "other"), Append("k", "o", 7, 0, b"entry", 30.0)):
        with pytest.raises(StoreError, match="the record is damaged: its journal") as caught:
            store.execute(op)
        assert not caught.value.maybe_written
    assert raw.hgetall(f"{store.prefix}k") == fields


@pytest.mark.parametrize("count", [3, 5000, 9007199254740991])
def test_a_count_beyond_the_entries_ends_the_reading_at_once(store: RedisStore, raw: Any, count: int) -> None:
    raw.hset(f"{store.prefix}k", mapping={**LONG, b"c": str(count).encode()})
    with pytest.raises(StoreError, match="the record is damaged: its journal"):
        store.execute(History("k"))


def test_an_entry_that_is_missing_is_a_damage(store: RedisStore, raw: Any) -> None:
    raw.hset(f"{store.prefix}k", mapping=LONG)
    assert story(store)[1] == (b"zero", b"one")
    raw.hdel(f"{store.prefix}k", "e0")
    with pytest.raises(StoreError, match="the record is damaged: its journal"):
        store.execute(History("k"))


@pytest.mark.parametrize(("field", "word"), [("l", "label"), ("b", "began")])
def test_a_record_that_cannot_be_read_has_no_history(store: RedisStore, raw: Any, field: str, word: str) -> None:
    raw.hset(f"{store.prefix}k", mapping=LONG)
    raw.hdel(f"{store.prefix}k", field)
    with pytest.raises(StoreError, match=f"damaged: its {word}"):
        store.execute(History("k"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(DONE)), st.binary(max_size=30) | HOSTILE))
def test_whatever_a_record_holds_answers_are_sane_or_store_errors(
    store: RedisStore, raw: Any, hostile: dict[bytes, bytes]
) -> None:
    name = f"{store.prefix}k"
    scans: list[AnyOp] = [Scan(state=state) for state in ("running", "in doubt", "done")]
    for op in [*journal_ops("k"), *scans]:
        for good in (LONG, DONE):
            raw.delete(name)
            raw.hset(name, mapping={**good, **hostile})
            written: list[bool] = []
            try:
                store.execute(op)
            except StoreError as error:
                written.append(error.maybe_written)
            assert not any(written)


def test_a_fence_that_cannot_grow_is_a_damage(store: RedisStore, raw: Any) -> None:
    fields = {**LONG, b"f": b"9007199254740991"}
    raw.hset(f"{store.prefix}k", mapping=fields)
    with pytest.raises(StoreError, match="damaged: its fence"):
        store.execute(Begin("k", "p", 30.0, b"", take_over=True))
    assert raw.hgetall(f"{store.prefix}k") == fields


@pytest.mark.parametrize("op", [History("k"), Append("k", "o", 7, 2, b"entry", 30.0), Begin("k", "o", 30.0, b"")])
def test_an_answer_that_makes_no_sense_is_a_store_error(op: AnyOp) -> None:
    class Client:
        scan_iter = None

        def execute_command(self, *args: Any) -> Any:
            return [1, 2]

    with pytest.raises(StoreError, match=r"makes no sense: \[1, 2\]"):
        RedisStore(Client()).execute(op)


# -- scans by state ----------------------------------------------------------------------------------------------------


def test_a_scan_by_state_of_many_pages_sees_everything(store: RedisStore) -> None:
    expected: dict[str, set[str]] = {"running": set(), "in doubt": set(), "done": set()}
    for n in range(300):
        key, state = f"k{n}", list(expected)[n % 3]
        got = begun(store, key, label="odd" if n % 2 else "even")
        expected[state].add(key)
        if state == "in doubt":
            assert store.execute(Abandon(key, "o", got.fence))
        elif state == "done":
            assert store.execute(Finish(key, "o", got.fence, b"", 60.0))
    for text in ("", "odd"):
        for state, keys in expected.items():
            seen: set[str] = set()
            pages, after = 0, ""
            while pages == 0 or after:
                page = store.execute(Scan(after, 10, text, state))
                assert {record.state for record in page.records} <= {state}
                seen |= {record.key for record in page.records}
                pages, after = pages + 1, page.after
            assert seen == {key for key in keys if not text or int(key[1:]) % 2}
            assert pages > 2


# -- what breaks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    parts = urlsplit(redis_url)
    with FaultProxy((parts.hostname or "127.0.0.1", parts.port or 6379)) as made:
        yield made


@pytest.fixture(params=["threads", "tasks"])
def ask(request: pytest.FixtureRequest, proxy: FaultProxy) -> Iterator[Callable[[AnyOp], Any]]:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix(), timeout=5.0)
    if request.param == "threads":
        yield store.execute
        store.close()
    else:
        with asyncio.Runner() as runner:
            yield lambda op: runner.run(store.aexecute(op))
            runner.run(store.aclose())


def evalsha(chunk: bytes) -> bool:
    return b"EVALSHA" in chunk


@pytest.mark.parametrize("fault", ["cut request", "cut reply"])
def test_a_begin_whose_answer_is_lost_can_be_sent_again(
    ask: Callable[[AnyOp], Any], proxy: FaultProxy, fault: Fault
) -> None:
    begin = Begin("k", "o", 30.0, b"first", "saga")
    proxy.arm(fault, evalsha)
    with pytest.raises(StoreError, match="no answer from Redis") as caught:
        ask(begin)
    assert caught.value.maybe_written
    assert isinstance(ask(begin), Acquired)
    record, entries = ask(History("k"))
    assert (record.attempt, entries) == (1, (b"first",))


@pytest.mark.parametrize("fault", ["cut request", "cut reply"])
def test_an_append_whose_answer_is_lost_can_be_sent_again(
    ask: Callable[[AnyOp], Any], proxy: FaultProxy, fault: Fault
) -> None:
    got = ask(Begin("k", "o", 30.0, b"first"))
    append = Append("k", "o", got.fence, 1, b"second", 30.0, "label")
    proxy.arm(fault, evalsha)
    with pytest.raises(StoreError, match="no answer from Redis") as caught:
        ask(append)
    assert caught.value.maybe_written
    assert ask(append) is True
    record, entries = ask(History("k"))
    assert (record.label, entries) == ("label", (b"first", b"second"))


def test_a_history_whose_answer_is_lost_has_written_nothing(ask: Callable[[AnyOp], Any], proxy: FaultProxy) -> None:
    ask(Begin("k", "o", 30.0, b"first"))
    proxy.arm("cut reply", evalsha)
    with pytest.raises(StoreError) as caught:
        ask(History("k"))
    assert not caught.value.maybe_written
    assert ask(History("k"))[1] == (b"first",)


def test_scripts_that_the_server_has_forgotten_are_sent_again(store: RedisStore, raw: Any) -> None:
    raw.script_flush()
    got = begun(store)
    raw.script_flush()
    assert store.execute(Append("k", "o", got.fence, 1, b"second", 30.0))
    raw.script_flush()
    assert story(store)[1] == (b"0", b"second")


# -- processes and clusters --------------------------------------------------------------------------------------------


def test_of_processes_that_race_one_begins_and_one_goes_on(redis_url: str) -> None:
    name = prefix()
    program = textwrap.dedent("""
        import sys
        from resilient.stores._ops import Acquired, Append, Begin
        from resilient.stores.redis import RedisStore
        store, me = RedisStore(sys.argv[1], prefix=sys.argv[2]), sys.argv[3]
        print("ready", flush=True)
        sys.stdin.readline()
        for n in range(100):
            got = store.execute(Begin(f"k{n}", me, 30.0, me.encode()))
            fence = got.fence  # the winner's, as Busy tells it: the owner's name is what refuses
            if store.execute(Append(f"k{n}", me, fence, 1, me.encode(), 30.0)):
                assert isinstance(got, Acquired)
        store.close()
    """)
    command = [sys.executable, "-W", "error", "-c", program, redis_url, name]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen([*command, f"o{n}"], stdin=pipe, stdout=pipe, text=True) for n in range(3)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate()
        assert racer.returncode == 0
    store = RedisStore(redis_url, prefix=name)
    for n in range(100):
        record, entries = story(store, f"k{n}")
        assert entries == (record.owner.encode(),) * 2
    store.close()


def test_on_a_cluster_each_journal_is_where_its_record_is(nodes: list[tuple[str, int]]) -> None:
    from redis.cluster import RedisCluster

    host, port = nodes[0]
    with RedisCluster(host=host, port=port) as client:
        store = RedisStore(client, prefix=prefix())
        for n in range(40):
            got = begun(store, f"k{n}", entries=3)
            if n % 2:
                assert store.execute(Finish(f"k{n}", "o", got.fence, b"r", 60.0))
                assert store.execute(Begin(f"k{n}", "p", 30.0, b"")) == Completed(got.fence, 1, "", b"r")
            else:
                assert store.execute(Abandon(f"k{n}", "o", got.fence))
                second = store.execute(Begin(f"k{n}", "p", 30.0, b"", take_over=True))
                assert isinstance(second, Acquired)
                assert store.execute(Append(f"k{n}", "o", got.fence, 3, b"late", 30.0)) is False
        # On both nodes: the first has the lower half of the slots.
        assert {client.keyslot(f"{store.prefix}k{n}") < 8192 for n in range(40)} == {True, False}
        for n in range(40):
            assert story(store, f"k{n}")[1] == (b"0", b"1", b"2")
        for state, odd in (("done", 1), ("running", 0), ("in doubt", 2)):
            found: set[str] = set()
            page = store.execute(Scan(limit=7, state=state))
            while page.after:
                found |= {record.key for record in page.records}
                page = store.execute(Scan(page.after, 7, state=state))
            found |= {record.key for record in page.records}
            assert found == {f"k{n}" for n in range(40) if n % 2 == odd}
        store.close()
