"""A signal that raises, at any moment at which Python would handle one, leaves no heartbeat behind."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

import resilient
from resilient import Idempotent, InDoubt
from resilient._keeper import Beat, TaskKeeper, ThreadKeeper
from resilient.stores.memory import MemoryStore

OURS = {str(Path(resilient.__file__).parent / f"{name}.py") for name in ("idempotency", "_once", "_keeper", "_drive")}
EVENTS = ("call", "c_call", "c_return")


class Strike:
    """KeyboardInterrupt at the `at`-th call of, or in, our code: where the interpreter looks for signals."""

    def __init__(self, at: int) -> None:
        self.left, self.struck = at, False

    def __call__(self, frame: Any, event: str, arg: object) -> None:
        if not self.struck and event in EVENTS and frame.f_code.co_filename in OURS:
            self.left -= 1
            if self.left < 0:
                self.struck = True
                raise KeyboardInterrupt

    def __enter__(self) -> Strike:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def beating(store: MemoryStore) -> list[Any]:
    """The claims that would be renewed."""
    keepers = [one for one in gc.get_objects() if type(one) in (ThreadKeeper, TaskKeeper) and one._store is store]
    pending: list[Any] = []
    for keeper in keepers:
        pending += keeper.pending if type(keeper) is ThreadKeeper else ()
        for queue in keeper._queues.values() if type(keeper) is TaskKeeper else ():
            pending += queue.pending
    return [beat for beat in pending if not beat.over]


def moments(first: str) -> Iterator[int]:
    yield from range(400)
    raise AssertionError(f"{first}: it never got to its end")


@pytest.mark.parametrize("first", ["new", "taken over"])
def test_a_signal_at_any_moment_leaves_no_heartbeat(first: str) -> None:
    store, runs = MemoryStore(), 0

    @Idempotent(store, key="order", lease=1000.0, in_doubt="rerun")
    def charge(order: str) -> str:
        nonlocal runs
        runs += 1
        if order in doubtful:
            doubtful.remove(order)
            raise KeyboardInterrupt
        return order

    doubtful: set[str] = set()
    for at in moments(first):
        if first == "taken over":
            doubtful.add(f"o-{at}")
            with pytest.raises(KeyboardInterrupt):
                charge(f"o-{at}")
        strike = Strike(at)
        # In a context of its own: what is struck while it puts back the claim around it may not get to that.
        context = copy_context()
        try:
            with strike:
                context.run(charge, f"o-{at}")
        except KeyboardInterrupt:
            pass
        assert not beating(store), f"struck at {at}"
        if not strike.struck:
            break
    assert runs


def test_a_signal_at_any_moment_leaves_no_heartbeat_of_a_coroutine() -> None:
    store = MemoryStore()

    @Idempotent(store, key="order", lease=1000.0)
    async def charge(order: str) -> str:
        return order

    async def main(at: int) -> bool:
        strike = Strike(at)
        try:
            with strike:
                await charge(f"o-{at}")
        except KeyboardInterrupt:
            pass
        assert not beating(store), f"struck at {at}"
        return strike.struck

    for at in moments("new"):
        if not asyncio.run(main(at)):
            break


def test_who_is_interrupted_before_the_function_starts_leaves_the_key_free(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()

    @Idempotent(store, key="order")
    def charge(order: str) -> str:
        return order

    def struck(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ThreadKeeper, "begin", struck)
        charge("o-1")
    assert charge("o-1") == "o-1"

    @Idempotent(store, key="order", name="doubtful")
    def fail(order: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail("o-1")
    with pytest.raises(InDoubt):
        fail("o-1")


def test_a_heartbeat_whose_end_was_interrupted_is_not_renewed() -> None:
    store = MemoryStore()
    store.execute = pytest.fail  # type: ignore[method-assign, assignment]
    keeper = ThreadKeeper(store, 3.0, lambda _: None)
    beat = Beat("k", "s")
    keeper.pending[beat] = 0.0
    beat.over = True
    keeper._renew(beat)
    assert not keeper.pending
    tasks = TaskKeeper(store, 3.0, lambda _: None, None)  # type: ignore[arg-type]
    tasks._strike(beat)
    assert not tasks._tasks
