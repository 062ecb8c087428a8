"""The order as a durable saga: its steps, what undoes them, its body, and who finishes what a dead client has left.

`place` is all of it. Its steps stand at the top of this module, where another process finds them by name; the guarded
calls that they make are those of the `shop` of their context. `Desk` promises that every order that was begun comes to
an end, whoever has to bring it there, or is said to be stuck. For asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextvars import ContextVar
from typing import Any, TypeVar

from resilient import DurableSaga, Env, SagaAborted, SagaStuck, sagas
from resilient.clock import Clock
from resilient.demo.client import Shop, reason
from resilient.demo.journal import Journal
from resilient.demo.numbers import Outcome, Receipt
from resilient.demo.orders import Order
from resilient.events import Event, SagaEnded
from resilient.saga import AsyncSagaRun

__all__ = ["NAME", "Desk", "StepFailed", "place", "shop"]

NAME = "demo.order"
LEASE, SLACK = 1.5, 0.05
"""Seconds without a sign of life after which a client counts as dead; and some more, for clocks."""
HANDS = 16
"""How many of those that were left are finished at a time."""
TRIES, PAUSE = 20, 0.5

T = TypeVar("T")

shop: ContextVar[Shop] = ContextVar("resilient.demo.shop")


class StepFailed(Exception):
    """A step failed for good: the service, and why."""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


async def reserve(order: Order) -> None:
    await _by("inventory", shop.get().reserve(order))


async def release(order: Order) -> None:
    await _by("inventory", shop.get().release(order))


async def charge(order: Order) -> Receipt:
    return await _by("payment", shop.get().charge(order))


async def refund(order: Order) -> None:
    await _by("payment", shop.get().refund(order))


async def pack(order: Order) -> None:
    await _by("shipping", shop.get().pack(order))


async def unpack(order: Order) -> None:
    await _by("shipping", shop.get().unpack(order))


async def ship(order: Order, key: str) -> None:
    await _by("shipping", shop.get().ship(order, key))


async def notify(order: Order, key: str) -> None:
    await _by("notification", shop.get().notify(order, key))


async def place(saga: AsyncSagaRun, order: Order) -> Receipt:
    """An order, from the reservation to the message."""
    await saga.step(reserve, order, compensate=release)
    receipt: Receipt = await saga.step(charge, order, compensate=refund)
    await saga.step(pack, order, compensate=unpack)  # whoever lives nowhere is refused here
    saga.pivot()  # the carrier gives nothing back
    await saga.step(ship, order, saga.step_key)
    await saga.step(notify, order, saga.step_key)
    return receipt


async def _by(service: str, call: Awaitable[T]) -> T:
    try:
        return await call
    except Exception as error:
        raise StepFailed(service, reason(error)) from error


class Desk:
    """Places orders as sagas in `store`. `env` is what their guards run in, too; what they decide is in the journal."""

    def __init__(self, store: Any, journal: Journal, clock: Clock) -> None:
        self.env = Env(clock=clock, sinks=[journal, self._hear])
        self._store, self._journal, self._clock = store, journal, clock
        self._place = DurableSaga(NAME, store=store, lease=LEASE, env=self.env)(place)
        self._left: dict[str, asyncio.Event] = {}
        self._ended: dict[str, float] = {}
        self._until = 0.0

    async def look(self) -> list[str]:
        """The orders that a client before this one has left in the middle. Until `recover` has them, they wait."""
        found = await sagas.alist_sagas(self._store, name=NAME)
        left = [one for one in found if one.state in ("running", "compensating", "orphaned")]
        self._until = max((one.mark for one in left), default=0.0)
        self._left = {one.id: asyncio.Event() for one in left}
        self._journal.left(len(left))
        return list(self._left)

    async def recover(self) -> None:
        """Finish what was left, as soon as the leases of the dead are over."""
        if not self._left:
            return
        try:
            await self._clock.asleep(max(0.0, self._until + SLACK - self._clock.at()))
            await sagas.arecover(self._store, name=NAME, concurrency=HANDS)
        finally:
            for left in self._left.values():
                left.set()

    async def place(self, order: Order, due: float) -> Outcome:
        """Bring an order to its end: done, undone, or stuck."""
        if order.id in self._left:
            await self._left[order.id].wait()
        for _ in range(TRIES):
            try:
                await self._place(order, id=order.id)
            except SagaAborted as aborted:
                return self._outcome(order, due, *why(aborted))
            except SagaStuck:
                return self._outcome(order, due, NAME, "stuck")
            except Exception:
                # The lease was lost, or it failed where it can only go forward: how far it came, its journal knows.
                await self._clock.asleep(PAUSE)
            else:
                return self._outcome(order, due)
        return self._outcome(order, due, NAME, "left unfinished")

    def _outcome(self, order: Order, due: float, at: str | None = None, why: str | None = None) -> Outcome:
        return Outcome(order.id, self._ended.get(order.id, self._clock.now()) - due, at, why)

    def _hear(self, event: Event) -> None:
        if isinstance(event, SagaEnded):
            self._ended.setdefault(event.id, self._clock.now())
            if event.id in self._left:
                self._journal.recovered(event.state)
                self._left[event.id].set()


def why(aborted: SagaAborted) -> tuple[str, str]:
    """The service at which a saga failed, and why: from the step's error, or from what the journal says of it."""
    cause = aborted.__cause__
    text = str(aborted if cause is None else cause).rpartition(f"{StepFailed.__name__}: ")[2]
    service, _, what = text.partition(": ")
    return service, what
