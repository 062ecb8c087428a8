"""What the four services do, and what they write down of it: no network in here, and no trouble.

A trade knows what the lines of its ledger say, and nothing else (but payment: see there), so one that is started again
after a crash knows all that it did before. `act` carries out one request. Each line is in the ledger before anything
else happens. What is over stays over: who comes late with what was undone already gets 410. For one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, TypeAlias

from resilient.demo.orders import Order

__all__ = ["TRADES", "Answer", "Inventory", "Note", "Notification", "Payment", "Shipping", "Trade", "opening"]

Note: TypeAlias = Callable[..., None]
Answer: TypeAlias = tuple[int, Any]
"""A status, and what goes with it: data if it is 200, else a few words."""


class Trade(Protocol):
    """One service without its network. `note` writes a line to the ledger, and has it taken in."""

    methods: ClassVar[tuple[str, ...]]

    def __init__(self, note: Note) -> None: ...
    def take(self, word: str, *rest: Any) -> None: ...
    def act(self, method: str, order: str, asked: dict[str, Any], key: str | None) -> Answer: ...
    def shown(self) -> dict[str, Any]: ...


class Inventory:
    """Keeps stock. A PUT reserves for an order, a DELETE gives back; both are the same however often they come."""

    methods: ClassVar[tuple[str, ...]] = ("PUT", "DELETE")

    def __init__(self, note: Note) -> None:
        self._note = note
        self.opening: Counter[str] = Counter()
        self.stock: Counter[str] = Counter()
        self.held: dict[str, tuple[str, int]] = {}
        self._released: set[str] = set()

    def take(self, word: str, *rest: Any) -> None:
        """Learn from a line of the ledger."""
        match word, *rest:
            case "stock", sku, count:
                self.opening[sku] += count
                self.stock[sku] += count
            case "reserve", order, sku, count:
                self.held[order] = sku, count
                self.stock[sku] -= count
            case _:
                (order,) = rest
                self._released.add(order)
                sku, count = self.held.pop(order, ("", 0))
                self.stock[sku] += count

    def act(self, method: str, order: str, asked: dict[str, Any], key: str | None) -> Answer:
        """Carry out a request."""
        if method == "DELETE":
            if order not in self._released:
                self._note("release", order)
            return 200, {"order": order}
        if order in self._released:
            return 410, "released already"
        if order not in self.held:
            if self.stock[asked["sku"]] < asked["quantity"]:
                return 409, "out of stock"
            self._note("reserve", order, asked["sku"], asked["quantity"])
        return 200, {"order": order}

    def shown(self) -> dict[str, Any]:
        """What the ledger says."""
        return {"opening": self.opening, "stock": {sku: self.stock[sku] for sku in self.opening}, "held": self.held}


class Payment:
    """A gateway. A POST charges, a GET asks for the receipt, a DELETE gives back what was charged and closes the order.

    It keeps the idempotency keys of charges in memory, where a crash loses them: a fault on purpose, and one that real
    gateways have had. Its ledger it never forgets.
    """

    methods: ClassVar[tuple[str, ...]] = ("POST", "GET", "DELETE")

    def __init__(self, note: Note) -> None:
        self._note = note
        self.charges: dict[str, list[str]] = {}
        self.refunds: dict[str, list[str]] = {}
        self._declined: set[str] = set()
        self._closed: set[str] = set()
        self._keys: set[str] = set()

    def take(self, word: str, *rest: Any) -> None:
        """Learn from a line of the ledger."""
        match word, *rest:
            case "decline", order:
                self._declined.add(order)
            case "close", order:
                self._closed.add(order)
            case _:
                order, amount = rest
                (self.charges if word == "charge" else self.refunds).setdefault(order, []).append(amount)

    def act(self, method: str, order: str, asked: dict[str, Any], key: str | None) -> Answer:
        """Carry out a request."""
        if method == "DELETE":
            for amount in self.charges.get(order, [])[len(self.refunds.get(order, [])) :]:
                self._note("refund", order, amount)
            if order not in self._closed:
                self._note("close", order)
            return 200, {"order": order}
        if method == "POST" and (key is None or key not in self._keys):
            if order in self._closed:
                return 410, "closed already"
            if order in self._declined:
                return 402, "card declined"
            self._note("charge", order, asked["amount"])
            if key is not None:
                self._keys.add(key)
        # The first charge of an order is the one that its receipt is for.
        return (200, {"order": order, "charge": f"ch-{order}-1"}) if order in self.charges else (404, "no charge")

    def shown(self) -> dict[str, Any]:
        """What the ledger says."""
        return {"charged": self.charges, "refunded": self.refunds}


class Shipping:
    """A warehouse. A PUT packs a parcel, a DELETE unpacks it, until a POST ships it: from there nothing comes back.

    Told twice to ship, it ships twice; but not for the same key.
    """

    methods: ClassVar[tuple[str, ...]] = ("PUT", "DELETE", "POST")

    def __init__(self, note: Note) -> None:
        self._note = note
        self.packed: dict[str, tuple[str, int]] = {}
        self.shipped: dict[str, list[tuple[str, int]]] = {}
        self._refused: set[str] = set()
        self._unpacked: set[str] = set()
        self._keys: set[str] = set()

    def take(self, word: str, *rest: Any) -> None:
        """Learn from a line of the ledger."""
        match word, *rest:
            case "refuse", order:
                self._refused.add(order)
            case "pack", order, sku, count:
                self.packed[order] = sku, count
            case "unpack", order:
                self._unpacked.add(order)
                self.packed.pop(order, None)
            case _:
                order, key = rest
                self.shipped.setdefault(order, []).append(self.packed[order])
                self._keys.add(key)

    def act(self, method: str, order: str, asked: dict[str, Any], key: str | None) -> Answer:
        """Carry out a request."""
        match method:
            case "PUT":
                if order in self._unpacked:
                    return 410, "unpacked already"
                if order in self._refused:
                    return 422, "no such address"
                if order not in self.packed:
                    self._note("pack", order, asked["sku"], asked["quantity"])
            case "DELETE":
                if order in self.shipped:
                    return 409, "it has left"
                if order not in self._unpacked:
                    self._note("unpack", order)
            case _:
                if order not in self.packed:
                    return 409, "no parcel"
                if key is None or key not in self._keys:
                    self._note("ship", order, key)
        return 200, {"order": order}

    def shown(self) -> dict[str, Any]:
        """What the ledger says."""
        waiting = [order for order in self.packed if order not in self.shipped]
        return {"packed": waiting, "shipped": self.shipped}


class Notification:
    """Sends messages: once for each key, and each time where there is none."""

    methods: ClassVar[tuple[str, ...]] = ("POST",)

    def __init__(self, note: Note) -> None:
        self._note = note
        self.told: Counter[str] = Counter()
        self._keys: set[str] = set()

    def take(self, word: str, *rest: Any) -> None:
        """Learn from a line of the ledger."""
        order, key = rest
        self.told[order] += 1
        self._keys.add(key)

    def act(self, method: str, order: str, asked: dict[str, Any], key: str | None) -> Answer:
        """Carry out a request."""
        if key is None or key not in self._keys:
            self._note("tell", order, key)
        return 200, {"order": order}

    def shown(self) -> dict[str, Any]:
        """What the ledger says."""
        return {"told": self.told}


TRADES: dict[str, type[Trade]] = {
    "inventory": Inventory,
    "payment": Payment,
    "shipping": Shipping,
    "notification": Notification,
}


def opening(orders: Iterable[Order], flaws: dict[str, str]) -> dict[str, list[list[Any]]]:
    """The first lines of each ledger: the stock, and the orders that will be refused for good.

    `flaws` says of an order that it will be "short" of stock, "declined" by payment, or "refused" by shipping. There is
    as much in stock as all orders need, but for those that are short: so whoever comes last gets nothing.
    """
    stock: Counter[str] = Counter()
    lines: dict[str, list[list[Any]]] = {service: [] for service in TRADES}
    for order in orders:
        flaw = flaws.get(order.id)
        stock[order.sku] += 0 if flaw == "short" else order.quantity
        if flaw == "declined":
            lines["payment"].append(["decline", order.id])
        if flaw == "refused":
            lines["shipping"].append(["refuse", order.id])
    lines["inventory"] = [["stock", sku, count] for sku, count in stock.items()]
    return lines
