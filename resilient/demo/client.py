"""The client: the four calls of an order, bare and guarded, and the order that they make.

`Calls` is what a careful person writes with httpx alone: one attempt, a time limit, errors by status. `guards` puts a
pipeline around each of its methods, and changes nothing else: the comparison is of these, with everything else equal.
For asyncio. Requests go to the addresses given and nowhere else: proxies of the environment are not asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import tenacity

from resilient import (
    Bulkhead,
    CallTimeout,
    CircuitBreaker,
    Consecutive,
    Env,
    FailureRate,
    Fallback,
    Hedge,
    Pipeline,
    RateLimiter,
    Rejected,
    Retry,
    SlowRate,
    Timeout,
)
from resilient.clock import Clock
from resilient.demo.numbers import Outcome, Tally
from resilient.demo.orders import Order

if TYPE_CHECKING:
    from resilient._trip import Trip

__all__ = ["Calls", "Shop", "bare", "broken", "guards", "open_http", "place", "transient"]

Step: TypeAlias = Callable[[Order], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Shop:
    """The steps of an order, by the service that each asks, in their order."""

    inventory: Step
    payment: Step
    shipping: Step
    notification: Step


def open_http(patience: float) -> httpx.AsyncClient:
    """A client that waits `patience` seconds for an answer, and for each other part of a call."""
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
    return httpx.AsyncClient(timeout=patience, limits=limits, trust_env=False)


class Calls:
    """The calls as they are without guards. Each that leaves is counted in the tally of its service."""

    def __init__(self, http: httpx.AsyncClient, urls: dict[str, str], tallies: dict[str, Tally]) -> None:
        self._http, self._urls, self._tallies = http, urls, tallies

    async def inventory(self, order: Order) -> None:
        """Look whether the product is in stock. Changes nothing, so it may run twice at a time."""
        await self._send("inventory", "GET", order, params={"sku": order.sku, "quantity": order.quantity})

    async def payment(self, order: Order) -> None:
        """Charge the customer. The key tells the gateway that a second request is the same charge."""
        json = {"amount": str(order.total), "currency": "EUR"}
        await self._send("payment", "POST", order, json=json, headers={"idempotency-key": f"charge-{order.id}"})

    async def shipping(self, order: Order) -> None:
        """Put the parcel of this order on the list; it is the same parcel however often this runs."""
        json = {"name": order.customer, "address": order.address, "country": order.country, "product": order.product}
        await self._send("shipping", "PUT", order, json=json)

    async def notification(self, order: Order) -> None:
        """Tell the customer. A second message is no harm worth losing the first for."""
        json = {"to": order.email, "text": f"{order.product} ({order.quantity}) is on its way."}
        await self._send("notification", "POST", order, json=json)

    async def _send(self, service: str, method: str, order: Order, **request: Any) -> None:
        tally = self._tallies[service]
        tally.sent += 1
        try:
            answer = await self._http.request(method, f"{self._urls[service]}/orders/{order.id}", **request)
            answer.raise_for_status()
        except httpx.HTTPError:
            tally.failed += 1
            raise
        tally.answered += 1


def bare(calls: Calls) -> Shop:
    """The steps with no guards."""
    return Shop(calls.inventory, calls.payment, calls.shipping, calls.notification)


def transient(error: BaseException) -> bool:
    """Whether trying again may help, and does no harm: each of the four calls may be repeated (see `Calls`)."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (429, 500, 502, 503, 504)
    return isinstance(error, (httpx.TransportError, CallTimeout, Rejected))


def broken(error: BaseException) -> bool:
    """Whether an error says that the service is ill: 429 is an answer of a healthy one, a refusal of ours is none."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return not isinstance(error, Rejected)


def guards(calls: Calls, env: Env, patience: float, outbox: list[Order]) -> Shop:
    """The steps with guards, in the recommended order. `patience` is what the bare calls wait for an answer."""
    attempt = max(0.4, patience / 8)
    rest = max(0.2, patience / 16)
    # Retries cope with a service that fails every other call; a circuit is for one that fails nearly all of them.
    ill = FailureRate(0.8, over=40, minimum=20)
    wait = tenacity.wait_random_exponential(multiplier=0.1, max=1.0)

    def retry(name: str, attempts: int, total: float) -> Retry:
        return Retry(transient, attempts=attempts, wait=wait, total=total, name=name)

    def circuit(name: str, trip: Trip) -> CircuitBreaker:
        # A probe that gets no answer is cut off like any other attempt: its place is free again as soon.
        return CircuitBreaker(name, trip, on=broken, cooldown=rest, probe_lease=attempt)

    inventory = Pipeline(
        Hedge(attempt / 3, idempotent=True, name="inventory"),
        retry("inventory", 12, max(6.0, 3 * patience)),
        circuit("inventory", ill | Consecutive(10)),
        Bulkhead(32, queue=64, max_wait=attempt, name="inventory"),
        Timeout(attempt, name="inventory"),
        env=env,
    )
    payment = Pipeline(
        retry("payment", 12, max(6.0, 3 * patience)),
        circuit("payment", ill),
        Bulkhead(32, queue=64, max_wait=attempt, name="payment"),
        Timeout(attempt, name="payment"),
        env=env,
    )
    shipping = Pipeline(
        retry("shipping", 12, max(6.0, 3 * patience)),
        circuit("shipping", ill | SlowRate(0.9, slower_than=attempt, over=40, minimum=20)),
        RateLimiter(50, burst=10, max_wait=attempt, name="shipping"),
        Bulkhead(32, queue=64, max_wait=attempt, name="shipping"),
        Timeout(attempt, name="shipping"),
        env=env,
    )
    notification = Pipeline(
        Fallback(outbox.append, name="notification"),
        retry("notification", 3, max(1.5, patience / 2)),
        circuit("notification", ill),
        RateLimiter(60, burst=20, max_wait=attempt / 2, name="notification"),
        Bulkhead(16, queue=32, max_wait=attempt / 2, name="notification"),
        Timeout(attempt / 2, name="notification"),
        env=env,
    )
    return Shop(
        inventory(calls.inventory), payment(calls.payment), shipping(calls.shipping), notification(calls.notification)
    )


async def place(order: Order, shop: Shop, clock: Clock, due: float) -> Outcome:
    """Take an order through its steps. It is done when it is paid and shipped; the message is a courtesy.

    Latency counts from the instant `due`, at which the customer pressed the button, so that a client that is too busy
    to begin does not look quick.
    """
    reached = ""
    try:
        for reached in ("inventory", "payment", "shipping"):
            await getattr(shop, reached)(order)
    except Exception as error:
        return Outcome(order.id, clock.now() - due, reached, _reason(error))
    latency = clock.now() - due
    try:
        await shop.notification(order)
    except Exception as error:
        return Outcome(order.id, latency, None, _reason(error), told=False)
    return Outcome(order.id, latency)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return type(error).__name__
