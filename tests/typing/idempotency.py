"""What type checkers see of idempotency. Never run: mypy and pyright read it, like `api.py` beside it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, assert_type

from resilient import RERUN, Idempotent, Json, Pipeline, Retry, claim, fence, replayed
from resilient.stores import MemoryStore


@dataclass
class Receipt:
    order_id: str


class Declined(Exception):
    pass


once = Idempotent("memory://", key="order_id")
asked = Idempotent(
    MemoryStore(),
    key=("tenant", "order_id"),
    scope=lambda tenant, order_id: tenant,
    ttl=60,
    lease=5.0,
    duplicates="raise",
    max_wait=None,
    in_doubt=lambda tenant, order_id: RERUN,
    remember=(Declined, ValueError),
    fingerprint=False,
    codec=Json(limit=10),
    on_store_error="run",
    name="charge",
)
Idempotent("memory://", key=lambda order_id: order_id, remember=Declined, fingerprint=["a"], codec=Json)
Idempotent("memory://", key="a", duplicates="queue")  # type: ignore[arg-type]
Idempotent("memory://", key="a", in_doubt="guess")  # type: ignore[arg-type]
Idempotent("memory://", key="a", on_store_error="ignore")  # type: ignore[arg-type]
Idempotent("memory://", key="a", remember=KeyboardInterrupt)  # type: ignore[arg-type]
Idempotent("memory://")  # type: ignore[call-arg]


@once
def plain(order_id: str, *, cents: int = 0) -> Receipt:
    return Receipt(order_id)


assert_type(plain("o-1", cents=5), Receipt)
plain(5)  # type: ignore[arg-type]
plain("o-1", euros=5)  # type: ignore[call-arg]


@asked
async def coroutine(tenant: str, order_id: str) -> Receipt:
    return Receipt(order_id)


@once
def promised(order_id: str) -> Awaitable[Receipt]:
    return coroutine("a", order_id)


assert_type(promised("o-1"), Awaitable[Receipt])


@Pipeline(once, Retry(ConnectionError))
def in_a_pipeline(order_id: str) -> list[int]:
    return [fence()]


assert_type(in_a_pipeline("o-1"), list[int])


class Shop:
    @once
    def method(self, order_id: str) -> Receipt:
        return Receipt(order_id)

    @once
    async def amethod(self, order_id: str) -> Receipt:
        return Receipt(order_id)

    @once
    @classmethod
    def outside(cls, order_id: str) -> Receipt:
        return Receipt(order_id)

    @classmethod
    @once
    def inside(cls, order_id: str) -> Receipt:
        return Receipt(order_id)

    @staticmethod
    @once
    def static(order_id: str) -> Receipt:
        return Receipt(order_id)


async def uses(shop: Shop, connection: Any) -> None:
    assert_type(shop.method("o-1"), Receipt)
    assert_type(await shop.amethod("o-1"), Receipt)
    assert_type(Shop.outside("o-1"), Receipt)
    assert_type(shop.inside("o-1"), Receipt)
    assert_type(shop.static("o-1"), Receipt)
    shop.method(5)  # type: ignore[arg-type]
    assert_type(await coroutine("a", "b"), Receipt)
    assert_type(await promised("o-1"), Receipt)
    assert_type(fence(), int)
    assert_type(replayed(), bool)
    assert_type(claim().key, str)
    assert_type(claim().attempt, int)
    assert_type(claim().fence, int)
    assert_type(claim().lost, bool)
    assert_type(claim().derive("stripe"), str)
    assert_type(once.purge(60.0), int)
    assert_type(await once.apurge(60.0, batch=5), int)
    with once.transaction(connection, "o-1", payload=5, scope="a", returns=Receipt) as hold:
        assert_type(hold.replayed, bool)
        assert_type(hold.fence, int)
        hold.result = Receipt("o-1")
    async with once.transaction(connection, ("a", 1)) as ahold:
        assert_type(ahold.derive("mail"), str)
