"""What really happened, from the services' own ledgers: each order complete, undone, or half done; goods and money.

`Audit` holds the books of all services against the orders. It believes nothing that the client says, but compares it.
Plain data; for one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

import msgspec

from resilient.demo.orders import Order

__all__ = ["Audit", "Books", "books"]

COMPLETE = "reserved, charged, shipped"


@dataclass(frozen=True, slots=True)
class Books:
    """What the services wrote into their ledgers. Most is by order, with each time that it was done."""

    received: dict[str, int] = field(default_factory=dict[str, int])
    opening: dict[str, int] = field(default_factory=dict[str, int])
    stock: dict[str, int] = field(default_factory=dict[str, int])
    held: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    charged: dict[str, list[Decimal]] = field(default_factory=dict[str, list[Decimal]])
    refunded: dict[str, list[Decimal]] = field(default_factory=dict[str, list[Decimal]])
    packed: list[str] = field(default_factory=list[str])
    shipped: dict[str, list[tuple[str, int]]] = field(default_factory=dict[str, list[tuple[str, int]]])
    told: dict[str, int] = field(default_factory=dict[str, int])


def books(ledgers: Mapping[str, dict[str, Any]]) -> Books:
    """The books, from what each service shows of its ledger."""
    merged: dict[str, Any] = {}
    for shown in ledgers.values():
        merged |= shown
    received = {service: sum(shown["received"].values()) for service, shown in ledgers.items()}
    return msgspec.convert({**merged, "received": received}, Books)


@dataclass(frozen=True)
class Audit:
    """The books against the orders. `stuck`: the sagas that have not ended, and what their state is.

    `said` is the client's word: whether an order is done.
    """

    orders: Sequence[Order]
    books: Books
    said: Mapping[str, bool] = field(default_factory=dict[str, bool])
    stuck: Mapping[str, str] = field(default_factory=dict[str, str])

    def left(self, order: str) -> str:
        """What there is of an order in the ledgers, in words; nothing if it was never begun, or has been undone."""
        return ", ".join(self._left(order))

    def _left(self, order: str) -> Iterator[str]:
        books = self.books
        if order in books.held:
            yield "reserved"
        charges = len(books.charged.get(order, ())) - len(books.refunded.get(order, ()))
        if charges:
            yield {1: "charged", 2: "charged twice"}.get(charges, f"charged {charges} times")
        if order in books.packed:
            yield "packed"
        times = len(books.shipped.get(order, ()))
        if times:
            yield {1: "shipped", 2: "shipped twice"}.get(times, f"shipped {times} times")

    @cached_property
    def states(self) -> dict[str, str]:
        """What there is of each order."""
        return {order.id: self.left(order.id) for order in self.orders}

    @property
    def complete(self) -> int:
        """Orders that are reserved, charged and shipped, each once."""
        return sum(left == COMPLETE for left in self.states.values())

    @property
    def undone(self) -> int:
        """Orders of which nothing is left."""
        return sum(not left for left in self.states.values())

    @property
    def half(self) -> dict[str, str]:
        """Orders that are neither, and what there is of them."""
        return {order: left for order, left in self.states.items() if left not in ("", COMPLETE)}

    @property
    def ways(self) -> Counter[str]:
        """What there is of orders that are half done, and of how many."""
        return Counter(self.half.values())

    @property
    def wrong(self) -> list[str]:
        """Orders of which the client says that they are done, and they are not complete; or the other way round."""
        return [order for order, done in self.said.items() if done != (self.states[order] == COMPLETE)]

    # -- goods -------------------------------------------------------------------------------------------------------

    @property
    def units(self) -> tuple[int, int, int, int]:
        """Units that there were, and that are in stock, reserved for what has not been shipped, and shipped."""
        sums = [self._sum(sku) for sku in self._skus]
        return (sum(s[0] for s in sums), sum(s[1] for s in sums), sum(s[2] for s in sums), sum(s[3] for s in sums))

    @property
    def off(self) -> list[str]:
        """Products of which stock, reserved and shipped do not make up what there was."""
        return [sku for sku in self._skus if self._sum(sku)[0] != sum(self._sum(sku)[1:])]

    @property
    def _skus(self) -> list[str]:
        return sorted(self.books.opening)

    def _sum(self, sku: str) -> tuple[int, int, int, int]:
        return self.books.opening[sku], self.books.stock[sku], self._reserved[sku], self._shipped[sku]

    @cached_property
    def _reserved(self) -> Counter[str]:
        return _counted(held for order, held in self.books.held.items() if order not in self.books.shipped)

    @cached_property
    def _shipped(self) -> Counter[str]:
        return _counted(each for times in self.books.shipped.values() for each in times)

    # -- money -------------------------------------------------------------------------------------------------------

    @property
    def charged(self) -> Decimal:
        """All that was charged."""
        return _total(self.books.charged)

    @property
    def refunded(self) -> Decimal:
        """All that was given back."""
        return _total(self.books.refunded)

    @property
    def owed(self) -> Decimal:
        """The price of what was shipped."""
        return sum((order.total for order in self.orders if order.id in self.books.shipped), Decimal(0))

    # -- twice -------------------------------------------------------------------------------------------------------

    @property
    def charged_twice(self) -> int:
        """Orders that were charged more than once, refunded later or not."""
        return sum(len(amounts) > 1 for amounts in self.books.charged.values())

    @property
    def shipped_twice(self) -> int:
        """Orders that were shipped more than once."""
        return sum(len(times) > 1 for times in self.books.shipped.values())

    @property
    def told_twice(self) -> int:
        """Customers who got their message more than once."""
        return sum(times > 1 for times in self.books.told.values())

    # -- all of it ---------------------------------------------------------------------------------------------------

    @property
    def unreported(self) -> list[str]:
        """Orders that are half done and not on the list of stuck sagas: nobody would ever look for them."""
        return [order for order in self.half if order not in self.stuck]

    @property
    def faults(self) -> list[str]:
        """What must not be, in words; nothing if all is as it should be."""
        checks: dict[str, Any] = {
            "half done": len(self.half),
            "half done and not reported": len(self.unreported),
            "products that do not add up": len(self.off),
            "EUR too much kept": self.charged - self.refunded - self.owed,
            "charged twice": self.charged_twice,
            "shipped twice": self.shipped_twice,
            "told twice": self.told_twice,
            "of which the client says otherwise": len(self.wrong),
            "sagas stuck": len(self.stuck),
        }
        return [f"{text}: {number}" for text, number in checks.items() if number]


def _counted(each: Iterable[tuple[str, int]]) -> Counter[str]:
    made: Counter[str] = Counter()
    for sku, count in each:
        made[sku] += count
    return made


def _total(amounts: Mapping[str, Sequence[Decimal]]) -> Decimal:
    return sum((amount for times in amounts.values() for amount in times), Decimal(0))
