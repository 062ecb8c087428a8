"""Hand-over: slots are conserved and given in the order of asking, whoever comes, leaves or dies in between."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resilient._park import LoopWaiter, Park, ThreadWaiter, TrioWaiter, task_waiter
from resilient.clock import SystemClock
from resilient.testing import FakeClock
from tests.worlds import turn

CLOCK = SystemClock()


class Stub:
    """A waiter that only notes what happens to it."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.granted, self.alive, self.rung = number, False, True, 0

    def notify(self) -> bool:
        self.rung += 1
        return self.alive


class Slots(RuleBasedStateMachine):
    """A park against a naive model: a count of free slots, and a list of those who wait."""

    LIMIT, QUEUE = 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.park = Park(self.LIMIT)
        self.free = self.LIMIT
        self.held: list[Stub | None] = []
        self.line: list[Stub] = []
        self.number = 0

    def deal(self) -> None:
        while self.free and self.line:
            first = self.line.pop(0)
            if first.alive:
                self.free -= 1
                self.held.append(first)

    @rule(alive=st.booleans())
    def arrive(self, alive: bool) -> None:
        self.number += 1
        waiter = Stub(self.number)
        joined = self.park._join(waiter, self.QUEUE)
        assert joined is (len(self.line) < self.QUEUE)
        if joined:
            self.park._wake()
            waiter.alive = alive or waiter.granted
            self.line.append(waiter)
            self.deal()

    @precondition(lambda self: not self.line and self.free)
    @rule()
    def take(self) -> None:
        assert not self.park._waiters
        del self.park._tokens[-1]
        self.free -= 1
        self.held.append(None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.held.remove(data.draw(st.sampled_from(self.held)))
        self.free += 1
        self.park._tokens.append(None)
        self.park._wake()
        self.deal()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.line))
        self.line.remove(waiter)
        self.park._leave(waiter)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def cancelled_with_a_slot_in_hand(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from([one for one in self.held if one]))
        self.held.remove(waiter)
        self.park._leave(waiter)
        self.free += 1
        self.deal()

    @invariant()
    def nothing_is_lost(self) -> None:
        assert len(self.park._tokens) == self.free
        assert self.free + len(self.held) == self.LIMIT
        assert [*self.park._waiters] == self.line
        assert self.park.waiting == len(self.line)
        assert all(one.granted for one in self.held if one)
        assert not any(one.granted for one in self.line)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_wake_that_was_cut_short_is_made_good_by_the_next() -> None:
    """Granted but not woken: the waiter stays in front, and is woken, not given a second slot."""
    park = Park(1)
    waiter, next_one = Stub(1), Stub(2)
    park._join(waiter, 9)
    park._join(next_one, 9)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    waiter.notify = interrupted  # type: ignore[method-assign]
    try:
        park._wake()
    except KeyboardInterrupt:
        pass
    assert (waiter.granted, park.waiting, len(park._tokens)) == (True, 1, 0)
    del waiter.notify
    park._wake()
    assert (waiter.rung, next_one.granted, [*park._waiters]) == (1, False, [next_one])


def test_a_thread_is_woken_twice_without_harm() -> None:
    waiter = ThreadWaiter()
    assert waiter.notify()
    assert waiter.notify()
    waiter.park(CLOCK, None)


def test_a_thread_may_wait_for_longer_than_a_lock_can() -> None:
    waiter = ThreadWaiter()
    waiter.notify()
    waiter.park(CLOCK, 1e300)


def test_a_thread_wakes_a_task_of_asyncio() -> None:
    async def main() -> None:
        waiter = task_waiter()
        assert isinstance(waiter, LoopWaiter)
        thread = threading.Thread(target=waiter.notify, daemon=True)
        thread.start()
        await waiter.apark(CLOCK, None)
        thread.join()

    asyncio.run(main())


def test_a_thread_wakes_a_task_of_trio() -> None:
    async def main() -> None:
        waiter = task_waiter()
        assert isinstance(waiter, TrioWaiter)
        thread = threading.Thread(target=waiter.notify, daemon=True)
        thread.start()
        await waiter.apark(CLOCK, None)
        thread.join()

    trio.run(main)


def test_a_task_that_was_rung_is_rung_again_without_harm() -> None:
    async def on_asyncio() -> None:
        waiter = LoopWaiter()
        assert waiter.notify()
        assert waiter.notify()
        await waiter.apark(CLOCK, None)

    async def on_trio() -> None:
        waiter = TrioWaiter()
        assert waiter.notify()
        assert waiter.notify()
        await waiter.apark(CLOCK, None)

    asyncio.run(on_asyncio())
    trio.run(on_trio)


def test_a_wait_ends_by_the_clock() -> None:
    clock = FakeClock()

    async def on_asyncio() -> None:
        await LoopWaiter().apark(clock, 2.0)

    async def on_trio() -> None:
        await TrioWaiter().apark(clock, 3.0)

    asyncio.run(on_asyncio())
    trio.run(on_trio)
    ThreadWaiter().park(clock, 4.0)
    assert clock.now() == 9.0


def abandoned(park: Park, kept: list[Any]) -> None:
    """Leave a waiting task behind in a loop that is closed."""
    loop = asyncio.new_event_loop()

    async def wait() -> None:
        await park._aacquire(9, CLOCK, None)

    async def main() -> None:
        kept.append(asyncio.ensure_future(wait()))
        await turn()

    loop.run_until_complete(main())
    loop.close()
    kept[-1]._log_destroy_pending = False


def test_a_waiter_whose_loop_is_closed_is_skipped() -> None:
    """Nobody will ever resume it; the slot goes to the next, from the same thread and from another."""
    park, kept = Park(1), list[Any]()
    for elsewhere in (False, True):
        del park._tokens[-1]
        abandoned(park, kept)
        assert park.waiting == 1
        park._tokens.append(None)
        if elsewhere:
            thread = threading.Thread(target=park._wake, daemon=True)
            thread.start()
            thread.join()
        else:
            park._wake()
        assert (park.waiting, len(park._tokens)) == (0, 1)
    kept.clear()
    assert len(park._tokens) == 1


def test_a_waiter_whose_trio_run_is_over_is_skipped() -> None:
    kept: list[TrioWaiter] = []

    async def main() -> None:
        kept.append(TrioWaiter())

    trio.run(main)
    park = Park(1)
    park._join(kept[0], 9)
    park._wake()
    assert (park.waiting, len(park._tokens), kept[0].granted) == (0, 1, False)


def test_many_dead_waiters_are_no_recursion() -> None:
    park = Park(1)
    dead = [Stub(number) for number in range(5000)]
    for waiter in dead:
        waiter.alive = False
        park._join(waiter, 9999)
    park._wake()
    assert (park.waiting, len(park._tokens)) == (0, 1)


def test_those_being_woken_are_not_counted_as_waiting() -> None:
    """A queue of one takes the next as soon as the one before has his slot."""
    park, waiter = Park(1), Stub()
    park._join(waiter, 1)
    seen: list[tuple[int, bool]] = []

    def notify() -> bool:
        seen.append((park.waiting, park._join(Stub(2), 1)))
        return True

    waiter.notify = notify  # type: ignore[method-assign]
    park._wake()
    assert seen == [(0, True)]


def test_a_waiter_that_another_woke_first_gives_its_slot_back_once() -> None:
    """Two wake one waiter. It has run to its end, and its loop is closed, before the second rings: no slot is born."""
    park = Park(1)

    class Gone(Stub):
        def notify(self) -> bool:
            park._part(self)
            park._tokens.append(None)
            return False

    assert park._join(Gone(), 1)
    park._wake()
    assert len(park._tokens) == 1
    assert park.waiting == 0
