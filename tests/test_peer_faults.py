"""The faults of other systems, each as a test that ours has not got it. Named after where it was seen."""

from __future__ import annotations

import ast
import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import resilient
from resilient import Idempotent, InDoubt, InFlight, StoreError, claim, replayed
from resilient.stores._ops import Claim, Finish, Forget
from tests._proofs import BACKENDS, close, opened, patience, record, url_of


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url_of(request.param, tmp_path, request.getfixturevalue)


class Boom(Exception):
    """A failure that is not remembered."""


class Silent:
    """A store as seen by an owner who is paused: its heartbeats do not get through."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def execute(self, op: Any) -> Any:
        if type(op).__name__ == "Renew":
            raise StoreError("paused")
        return self.store.execute(op)


def late(store: Any, end: Callable[[], str]) -> tuple[Callable[[str], str], list[int]]:
    """A function whose first call is still at it when the second one has come, taken over, and stored its result."""
    ran: list[int] = []

    def body(order: str) -> str:
        attempt = claim().attempt
        ran.append(attempt)
        if attempt > 1:
            return f"by attempt {attempt}"
        record(store, order, running=False)
        assert second(order) == "by attempt 2"
        return end()

    first = Idempotent(Silent(store), key="order", lease=0.05, in_doubt="rerun", name="charge")(body)
    second = Idempotent(store, key="order", in_doubt="rerun", name="charge")(body)
    return first, ran


def test_powertools_a_late_owner_does_not_overwrite_the_result_of_another(url: str) -> None:
    store = opened(url)
    call, ran = late(store, lambda: "by the late one")
    with pytest.raises(InDoubt) as caught:
        call("o-1")
    assert (caught.value.attempt, caught.value.result) == (1, "by the late one")
    assert call("o-1") == "by attempt 2"
    assert ran == [1, 2]
    store.close()


def test_powertools_the_failure_of_a_late_owner_does_not_delete_the_record_and_nothing_runs_a_third_time(
    url: str,
) -> None:
    def fail() -> str:
        raise Boom

    store = opened(url)
    call, ran = late(store, fail)
    with pytest.raises(Boom):
        call("o-1")
    assert record(store, "o-1").state == "done"
    assert call("o-1") == "by attempt 2"
    assert ran == [1, 2]
    store.close()


def test_powertools_8386_a_live_record_is_not_reclaimed(url: str) -> None:
    """Not by one who would take over what is in doubt, and not when it has been renewed."""
    store = opened(url)

    @Idempotent(store, key="order", lease=3.0, in_doubt="rerun", duplicates="raise", name="charge")
    def charge(order: str) -> str:
        first = record(store, order)
        check = patience()
        refused = 0
        while not refused or record(store, order).mark == first.mark:
            check()
            with pytest.raises(InFlight):
                charge("o-1")
            refused += 1
        return "charged"

    assert charge("o-1") == "charged"
    store.close()


def test_powertools_async_def_does_not_leave_the_key_stuck(url: str) -> None:
    async def main() -> None:
        store = opened(url)
        ran: list[str] = []
        fails = True

        @Idempotent(store, key="order")
        async def charge(order: str) -> str:
            ran.append(order)
            if fails:
                raise Boom
            return "charged"

        with pytest.raises(Boom):
            await charge("o-1")
        assert record(store, "o-1") is None
        fails = False
        assert await charge("o-1") == "charged"
        assert await charge("o-1") == "charged"
        assert replayed()
        assert ran == ["o-1", "o-1"]
        assert record(store, "o-1").state == "done"
        store.close()
        await close(store)

    asyncio.run(main())


def test_powertools_2490_duplicates_can_wait_for_the_first(url: str) -> None:
    store = opened(url)
    began, go_on = threading.Event(), threading.Event()
    ran: list[str] = []
    policy = Idempotent(store, key="order")

    @policy
    def charge(order: str) -> str:
        ran.append(order)
        began.set()
        assert go_on.wait(60)
        return "charged"

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(charge, "o-1")
        assert began.wait(60)
        others = [pool.submit(charge, "o-1") for _ in range(4)]
        check = patience()
        while policy.waits < 4:
            check()
        go_on.set()
        assert [each.result() for each in (first, *others)] == ["charged"] * 5
    assert ran == ["o-1"]
    assert policy.replays == 4
    store.close()


def test_latch_and_benzene_of_many_who_claim_at_once_one_gets_it(url: str) -> None:
    """GET and then SET lets two run. Here threads and other clients come at the same instant, again and again."""
    clients = [opened(url)] * 4 if url == "memory://" else [opened(url) for _ in range(4)]
    ran: list[str] = []
    gate = threading.Barrier(8)

    def body(order: str) -> str:
        ran.append(order)
        return f"{order}, run {len(ran)}"

    calls = [Idempotent(clients[n % 4], key="order", name="charge")(body) for n in range(8)]

    def come(n: int) -> list[str]:
        got = []
        for number in range(10):
            gate.wait(60)
            got.append(calls[n](f"o-{number}"))
        return got

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(come, range(8)))
    assert all(each == answers[0] for each in answers)
    assert sorted(ran) == sorted(f"o-{number}" for number in range(10))
    for client in clients:
        client.close()


def test_dbos_nothing_of_ours_unpickles_imports_or_evaluates_what_a_store_holds() -> None:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle", "yaml"}
    home = Path(resilient.__file__).parent
    files = list(home.rglob("*.py"))
    assert len(files) > 40
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not banned & {name.split(".")[0] for name in names}, path


harmed: list[str] = []


def harm() -> str:
    harmed.append("harm")
    return "harm"


def hostile() -> list[bytes]:
    """Pickles, by hand, that call `harm` when they are read; as they are, and where a result would be."""
    protocol_0 = b"ctests.test_peer_faults\nharm\n(tR."
    protocol_4 = b"\x80\x04\x8c\x16tests.test_peer_faults\x8c\x04harm\x93)R."
    return [protocol_0, protocol_4, b'{"v":1,"ok":' + protocol_0 + b"}", b'{"v":1,"raw":"' + protocol_0 + b'"}']


def test_the_hostile_pickle_is_one() -> None:
    loads = __import__("pickle").loads
    for data in hostile()[:2]:
        assert loads(data) == "harm"
        assert harmed.pop() == "harm"


def test_dbos_a_hostile_pickle_in_a_record_is_only_bytes(url: str) -> None:
    store = opened(url)
    ran: list[str] = []

    @Idempotent(store, key="order")
    def charge(order: str) -> str:
        ran.append(order)
        return "charged"

    for number, data in enumerate(hostile()):
        key = f"o-{number}"
        charge(key)
        good = record(store, key)
        assert store.execute(Forget(good.key))
        taken = store.execute(Claim(good.key, "somebody", 30.0, good.fingerprint))
        assert store.execute(Finish(good.key, "somebody", taken.fence, data, 3600.0))
        with pytest.raises(StoreError, match="cannot be read"):
            charge(key)
    assert not harmed
    assert len(ran) == len(hostile())
    store.close()


def test_dbos_769_a_key_that_is_used_again_while_others_purge_never_gets_half_a_result(url: str) -> None:
    """Records are purged as fast as they come: every call runs, or gets the whole result of one that ran."""
    store = opened(url)
    policy = Idempotent(store, key="order", ttl=3600.0)
    lock, ran, stop = threading.Lock(), set[str](), threading.Event()

    @policy
    def charge(order: str) -> dict[str, str]:
        with lock:
            made = f"{order}, run {len(ran)}"
            ran.add(made)
        return {"head": made, "body": made * 50, "tail": made}

    def purge() -> int:
        gone = 0
        while not stop.is_set():
            gone += policy.purge(0.0, batch=2)
        return gone + policy.purge(0.0)

    def come(n: int) -> int:
        replays = 0
        for number in range(60):
            got = charge(f"o-{number % 3}")
            assert got["head"] in ran
            assert got["head"].startswith(f"o-{number % 3},")
            assert got == {"head": got["head"], "body": got["head"] * 50, "tail": got["head"]}
            replays += replayed()
        return replays

    with ThreadPoolExecutor(4) as pool:
        purging = pool.submit(purge)
        try:
            replays = sum(pool.map(come, range(3)))
        finally:
            stop.set()
        assert len(ran) + replays == 180
        assert purging.result() == len(ran)
    assert record(store, "o-0") is None
    store.close()
