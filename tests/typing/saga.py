"""What type checkers see of sagas. Never run: mypy and pyright read it, like `api.py` beside it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, assert_type

from temporalio.client import Client

from resilient import RESULT, UNKNOWN, DurableSaga, Retry, Saga, branch, call
from resilient._barrier import abarrier, barrier
from resilient.durable import DurableBody
from resilient.engines import DBOSEngine, LocalEngine, TemporalEngine
from resilient.engines._dbos import DBOSBody
from resilient.engines._temporal import TemporalBody
from resilient.saga import AsyncSagaRun, Branch, SagaRun


def reserve(sku: str, quantity: int) -> int:
    return quantity


def release(sku: str, quantity: int, result: int) -> None: ...


async def charge(order: str) -> str:
    return order


async def refund(order: str) -> None: ...


def later(order: str) -> Awaitable[bytes]:
    raise NotImplementedError


class Shop:
    def pack(self, order: str) -> list[str]:
        return [order]

    async def ship(self, order: str) -> tuple[str, int]:
        return order, 1

    @classmethod
    def label(cls, order: str) -> bytes:
        return order.encode()

    def __call__(self, order: str) -> float:
        return 1.0


def plain(shop: Shop) -> None:
    with Saga("order", timeout=5, compensate_on=(OSError, ValueError), retries=Retry(OSError)) as saga:
        assert_type(saga, SagaRun)
        assert_type(saga.step(reserve, "a", 1, compensate=release), int)
        assert_type(saga.step(reserve, "a", quantity=1, compensate=None, retry=Retry(OSError), timeout=1), int)
        assert_type(saga.step(shop.pack, "o", compensate=call(release, RESULT, reason="failed")), list[str])
        assert_type(saga.step(Shop.label, "o", compensate=None, register="after", name="label"), bytes)
        assert_type(saga.step(shop, "o", compensate=None), float)
        assert_type(saga.step(lambda: 1, compensate=None), int)
        assert_type(saga.step_key, str)
        with saga.nested("inner") as inner:
            assert_type(inner, SagaRun)
        saga.pivot()
        assert_type(saga.step(reserve, "a", 1), int)
        saga.step(reserve, "a", 1, compensate="release")  # type: ignore[arg-type]
        saga.step(reserve, compensate=None, register="later")  # type: ignore[arg-type]
        saga.step("reserve", compensate=None)  # type: ignore[arg-type]


async def coroutines(shop: Shop) -> None:
    async with Saga("order") as saga:
        assert_type(saga, AsyncSagaRun)
        assert_type(await saga.step(charge, "o", compensate=refund), str)
        assert_type(await saga.step(reserve, "a", 1, compensate=release), int)
        assert_type(await saga.step(later, "o", compensate=None), bytes)
        assert_type(await saga.step(shop.ship, "o", compensate=None), tuple[str, int])
        assert_type(await saga.step(shop, "o", compensate=None), float)
        async with saga.nested("inner") as inner:
            assert_type(inner, AsyncSagaRun)
            assert_type(await inner.step(charge, "o", compensate=refund), str)
        await saga.step(charge, "o", compensate=5)  # type: ignore[call-overload]


def branches() -> None:
    assert_type(branch(reserve, "a", 1, compensate=release), Branch[int])
    branch(reserve, "a", 1)  # type: ignore[call-arg]
    if UNKNOWN:
        raise AssertionError


async def barriers(connection: object) -> None:
    assert_type(barrier(connection, "order/o-1", 1, "action"), bool)
    assert_type(barrier(connection, key="order/o-1/1", op="compensation"), bool)
    assert_type(await abarrier(connection, key="order/o-1/1", op="compensation"), bool)
    barrier(connection, "order/o-1", 1, "undo")  # type: ignore[call-overload]
    barrier(connection, key="order/o-1/1")  # type: ignore[call-overload]


def placed(saga: SagaRun, order: str) -> str:
    return order


async def aplaced(saga: AsyncSagaRun, order: str) -> str:
    return order


class OwnEngine:
    """An engine of somebody's own."""

    def bind(self, durable: DurableSaga[Any], body: Callable[..., Any], /) -> Callable[[str], int]:
        raise NotImplementedError


def engines(client: Client) -> None:
    local = DurableSaga("order", store="memory://", version=2)(placed)
    assert_type(local, DurableBody)
    assert_type(DurableSaga("order", engine=LocalEngine("memory://"))(aplaced), DurableBody)
    temporal = DurableSaga("order", engine=TemporalEngine(client, task_queue="orders"), attempts=3)(aplaced)
    assert_type(temporal, TemporalBody)
    on_dbos = DurableSaga("order", engine=DBOSEngine())(placed)
    assert_type(on_dbos, DBOSBody)
    on_dbos("o-1", id="o-1")
    assert_type(DurableSaga("order", engine=OwnEngine())(placed), Callable[[str], int])
    local.recover()
    # Where an engine runs them, nobody recovers them from here, and there is no journal to go on from.
    print(temporal.resume)  # type: ignore[attr-defined]
    print(on_dbos.arecover)  # type: ignore[attr-defined]
    DurableSaga("order", engine="temporal")  # type: ignore[call-overload]
    DurableSaga("order")  # type: ignore[call-overload]
