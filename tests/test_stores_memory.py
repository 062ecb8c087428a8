"""The memory store keeps the contract, by the system's clock and by a clock that is told."""

from __future__ import annotations

import os

import pytest

from resilient._contract import Case
from resilient.errors import StoreError
from resilient.stores import Abandon, Acquired, Bells, Claim, Finish, MemoryStore, Purge, Scan, _watch
from resilient.stores._ops import Append, Begin, History
from resilient.testing import FakeClock, store_contract


@pytest.mark.parametrize("case", store_contract(MemoryStore, trio=True), ids=str)
def test_contract(case: Case) -> None:
    case()


clock = FakeClock()


@pytest.mark.parametrize("case", store_contract(lambda: MemoryStore(clock), trio=True, advance=clock.advance), ids=str)
def test_contract_by_a_clock_that_is_told(case: Case) -> None:
    case()


def test_results_whose_time_is_over_leave_the_memory_a_few_at_a_time() -> None:
    clock = FakeClock()
    store = MemoryStore(clock)

    def done(key: str, ttl: float) -> None:
        store.execute(Finish(key, "a", store.execute(Claim(key, "a", 10.0)).fence, b"", ttl))

    for number in range(20):
        done(f"brief {number}", 1.0)
    done("lasting", 100.0)
    assert len(store._rows) == 21
    clock.advance(2.0)
    store.execute(Claim("next 1", "a", 10.0))
    assert len(store._rows) == 21 - 8 + 1
    store.execute(Claim("next 2", "a", 10.0))
    store.execute(Claim("next 3", "a", 10.0))
    assert set(store._rows) == {"lasting", "next 1", "next 2", "next 3"}


def test_a_key_that_was_claimed_again_outlives_its_former_result() -> None:
    clock = FakeClock()
    store = MemoryStore(clock)
    for ttl in (1.0, 100.0):
        store.execute(Finish("k", "a", store.execute(Claim("k", "a", 10.0)).fence, b"", ttl))
        clock.advance(2.0)
    store.execute(Claim("other", "a", 10.0))
    assert set(store._rows) == {"k", "other"}
    store.execute(Finish("gone", "a", store.execute(Claim("gone", "a", 10.0)).fence, b"", 1.0))
    clock.advance(2.0)
    assert store.execute(Purge(0.0)) == 2
    store.execute(Claim("third", "a", 10.0))
    assert set(store._rows) == {"other", "third"}


def test_a_full_page_without_a_further_record_ends() -> None:
    store = MemoryStore()
    for key in "abc":
        store.execute(Claim(key, "x", 10.0, label=f"label of {key}"))
    page = store.execute(Scan(limit=3))
    assert ([record.key for record in page.records], page.after) == (["a", "b", "c"], "")
    page = store.execute(Scan(limit=2))
    assert ([record.key for record in page.records], page.after) == (["a", "b"], "b")


def test_a_store_is_made_from_its_url() -> None:
    assert repr(MemoryStore.from_url("memory://")) == "MemoryStore()"
    assert MemoryStore.from_url("memory:").execute(Purge(0.0)) == 0


@pytest.mark.parametrize("url", ["memory://host", "memory:///path", "memory://?durability=full"])
def test_a_url_with_more_than_the_scheme_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="takes nothing behind it"):
        MemoryStore.from_url(url)


def test_a_takeover_gets_a_larger_fence_while_the_clock_stands_still() -> None:
    store = MemoryStore(FakeClock())
    first = store.execute(Claim("k", "a", 10.0))
    assert store.execute(Abandon("k", "a", 0))
    second = store.execute(Claim("k", "b", 10.0, take_over=True))
    assert (second.fence, second.attempt) == (first.fence + 1, 2)


def test_a_gap_names_the_key_and_both_numbers() -> None:
    store = MemoryStore()
    got = store.execute(Begin("k", "a", 10.0, b"first"))
    assert isinstance(got, Acquired)
    before = store.execute(History("k"))
    with pytest.raises(StoreError, match="the journal of k has 1 entries: number 3 would leave a gap") as caught:
        store.execute(Append("k", "a", got.fence, 3, b"fourth", 20.0))
    assert not caught.value.maybe_written
    assert store.execute(History("k")) == before


def test_a_history_that_was_given_out_stays_as_it_was() -> None:
    store = MemoryStore()
    got = store.execute(Begin("k", "a", 10.0, b"first", "one"))
    assert isinstance(got, Acquired)
    told = store.execute(History("k"))
    assert store.execute(Append("k", "a", got.fence, 1, b"second", 10.0, "two"))
    assert told is not None
    assert (told[0].label, told[1]) == ("one", (b"first",))


def test_results_whose_time_is_over_take_their_journals_along() -> None:
    clock = FakeClock()
    store = MemoryStore(clock)
    got = store.execute(Begin("k", "a", 10.0, b"first"))
    assert isinstance(got, Acquired)
    assert store.execute(Finish("k", "a", got.fence, b"", 1.0))
    clock.advance(2.0)
    assert store.execute(History("k")) is None
    store.execute(Begin("other", "a", 10.0, b""))
    assert set(store._rows) == {"other"}


def test_a_forked_child_watches_anew() -> None:
    """A lock that another thread held at the fork, and its waiters, are none of the child's business."""
    bells = Bells()
    bells._lock.acquire()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            watch = bells.watch("k", task=False)
            bells.ring("k")
            watch.close()
            os.write(writer, b"fine")
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:
        assert told.read() == b"fine"
    os.waitpid(child, 0)


def test_after_a_fork_nobody_watches() -> None:
    bells = Bells()
    bells.watch("k", task=False)
    assert bells
    _watch._forked()
    assert not bells
