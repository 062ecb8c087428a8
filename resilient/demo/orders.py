"""The orders: read from CSV, checked whole before the first is sent.

`read` promises valid orders or an `OrdersError` that names file, line and fault. Prices are `Decimal`, never `float`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

__all__ = ["BUNDLED", "FIELDS", "Order", "OrdersError", "parse", "read"]

BUNDLED = Path(__file__).parent / "orders.csv"
FIELDS = (
    *("order_id", "customer", "email"),
    *("street", "postcode", "city", "country"),
    *("sku", "product", "quantity", "price"),
)


class OrdersError(ValueError):
    """The file of orders cannot be used; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Order:
    """One line of the file: one product for one customer."""

    id: str
    customer: str
    email: str
    address: str
    country: str
    sku: str
    product: str
    quantity: int
    price: Decimal

    @property
    def total(self) -> Decimal:
        """What the customer pays."""
        return self.price * self.quantity


def read(path: Path) -> list[Order]:
    """The orders in the file at `path`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OrdersError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OrdersError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    return parse(io.StringIO(text, newline=""), str(path))


def parse(lines: Iterable[str], name: str) -> list[Order]:
    """The orders in the lines of a CSV file called `name`."""
    rows = csv.reader(lines, strict=True)
    orders: dict[str, Order] = {}
    try:
        head = next(rows, None)
        if head is None or tuple(head) != FIELDS:
            raise ValueError(f"the first line must be {','.join(FIELDS)}")
        for row in rows:
            if row:
                order = _order(row)
                if order.id in orders:
                    raise ValueError(f"order_id {order.id!r} is there twice")
                orders[order.id] = order
    except (ValueError, csv.Error) as error:
        raise OrdersError(f"{name}, line {max(1, rows.line_num)}: {error}") from error
    if not orders:
        raise OrdersError(f"{name}: there is no order in it")
    return list(orders.values())


def _order(row: list[str]) -> Order:
    if len(row) != len(FIELDS):
        raise ValueError(f"{len(row)} fields in place of {len(FIELDS)}")
    fields = {name: text.strip() for name, text in zip(FIELDS, row, strict=True)}
    for name, text in fields.items():
        if not text:
            raise ValueError(f"{name} is empty")
    if not fields["order_id"].isascii() or not fields["order_id"].replace("-", "").isalnum():
        raise ValueError(f"order_id must be of letters, digits and hyphens, not {fields['order_id']!r}")
    return Order(
        id=fields["order_id"],
        customer=fields["customer"],
        email=fields["email"],
        address=f"{fields['street']}, {fields['postcode']} {fields['city']}",
        country=fields["country"],
        sku=fields["sku"],
        product=fields["product"],
        quantity=_quantity(fields["quantity"]),
        price=_price(fields["price"]),
    )


def _quantity(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"quantity must be a whole number above 0, not {text!r}")
    return int(text)


def _price(text: str) -> Decimal:
    try:
        price = Decimal(text)
        if price > 0 and price == price.quantize(Decimal("0.01")):
            return price
    except InvalidOperation:
        pass
    raise ValueError(f"price must be a number above 0 with at most two decimals, not {text!r}")
