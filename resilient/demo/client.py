"""The client: the four calls of an order, bare and guarded, and the order that they make.

`Calls` is what a careful person writes with httpx alone: one attempt, a time limit, errors by status. `guards` puts a
pipeline around each of the steps (payment has a module of its own), and changes nothing else: the comparison is of
these, with everything else equal. For asyncio. Requests go to the addresses given and nowhere else: proxies of the
environment are not asked.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import msgspec
import tenacity

from resilient import (
    Bulkhead,
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
from resilient.demo.journal import Journal
from resilient.demo.numbers import Outcome, Receipt
from resilient.demo.orders import Order
from resilient.demo.payment import payments, transient

if TYPE_CHECKING:
    from resilient._trip import Trip

__all__ = ["Calls", "Shop", "bare", "broken", "guards", "open_http", "place"]

Step: TypeAlias = Callable[[Order], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Shop:
    """The steps of an order, by the service that each asks, in their order."""

    inventory: Step
    payment: Step
    shipping: Step
    notification: Step


def open_http(patience: float, urls: Iterable[str] = ()) -> httpx.AsyncClient:
    """A client that waits `patience` seconds for an answer, and for each other part of a call.

    Each of `urls` has a pool of its own: a sick service must not take the connections of the others, and the pool looks
    through all that it has at every call. How many there are is for bulkheads to say: a pool that is full waits for
    connections which calls that were cut off may have left behind.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # Nothing here is encrypted, and to read the certificates of the world takes a while.
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    pools = {url: httpx.AsyncHTTPTransport(limits=limits, trust_env=False, verify=nobody) for url in urls}
    return httpx.AsyncClient(timeout=patience, mounts=pools, trust_env=False, verify=nobody)


class Calls:
    """The calls as they are without guards. Each that leaves is counted in the journal."""

    def __init__(self, http: httpx.AsyncClient, urls: dict[str, str], journal: Journal) -> None:
        self._http, self._urls, self._journal = http, urls, journal

    async def inventory(self, order: Order) -> None:
        """Look whether the product is in stock. Changes nothing, so it may run twice at a time."""
        await self._send("inventory", "GET", order.id, params={"sku": order.sku, "quantity": order.quantity})

    async def charge(self, order_id: str, amount: Decimal, key: str | None = None) -> Receipt:
        """Charge the customer. A key tells the gateway that a second request is the same charge, while it remembers."""
        headers = {} if key is None else {"idempotency-key": key}
        json = {"amount": str(amount), "currency": "EUR"}
        answer = await self._send("payment", "POST", order_id, json=json, headers=headers)
        return msgspec.json.decode(answer.content, type=Receipt)

    async def receipt(self, order_id: str) -> Receipt | None:
        """Ask the gateway's ledger what it has for an order."""
        answer = await self._send("payment", "GET", order_id, fine=404)
        found = answer.status_code != 404
        receipt = msgspec.json.decode(answer.content, type=Receipt) if found else None
        self._journal.count("payment", "found" if found else "absent")
        return receipt

    async def shipping(self, order: Order) -> None:
        """Put the parcel of this order on the list; it is the same parcel however often this runs."""
        json = {"name": order.customer, "address": order.address, "country": order.country, "product": order.product}
        await self._send("shipping", "PUT", order.id, json=json)

    async def notification(self, order: Order) -> None:
        """Tell the customer. A second message is no harm worth losing the first for."""
        json = {"to": order.email, "text": f"{order.product} ({order.quantity}) is on its way."}
        await self._send("notification", "POST", order.id, json=json)

    async def _send(
        self, service: str, method: str, order_id: str, fine: int | None = None, **request: Any
    ) -> httpx.Response:
        self._journal.count(service, "sent")
        try:
            answer = await self._http.request(method, f"{self._urls[service]}/orders/{order_id}", **request)
            if answer.status_code != fine:
                answer.raise_for_status()
        except httpx.HTTPError:
            self._journal.count(service, "failed")
            raise
        self._journal.count(service, "answered")
        return answer


def bare(calls: Calls) -> Shop:
    """The steps with no guards."""

    async def payment(order: Order) -> None:
        await calls.charge(order.id, order.total)

    return Shop(calls.inventory, payment, calls.shipping, calls.notification)


def broken(error: BaseException) -> bool:
    """Whether an error says that the service is ill: 429 is an answer of a healthy one, a refusal of ours is none."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return not isinstance(error, Rejected)


def guards(calls: Calls, env: Env, patience: float, store: Any, post: Callable[[str], object]) -> Shop:
    """The steps with guards. `patience` is what the bare calls wait for an answer.

    `store` keeps what became of each payment; `post` puts the message about an order into the outbox.
    """
    attempt = max(0.4, patience / 8)
    rest = max(0.2, patience / 16)
    # Retries cope with a service that fails every other call; a circuit is for one that fails nearly all of them.
    ill = FailureRate(0.8, over=40, minimum=20)
    wait = tenacity.wait_random_exponential(multiplier=0.1, max=1.0)

    def retry(name: str, attempts: int, total: float) -> Retry:
        return Retry(transient, attempts=attempts, wait=wait, total=total, name=name)

    def circuit(name: str, trip: Trip) -> CircuitBreaker:
        # A probe that gets no answer is cut off like any other attempt, and must be in time to say so.
        return CircuitBreaker(name, trip, on=broken, cooldown=rest, probe_lease=2 * attempt)

    def outbox(order: Order) -> None:
        post(order.id)

    async def payment(order: Order) -> None:
        await charge(order.id, order.total)

    inventory = Pipeline(
        Hedge(attempt / 3, idempotent=True, name="inventory"),
        retry("inventory", 12, max(6.0, 3 * patience)),
        circuit("inventory", ill | Consecutive(10)),
        Bulkhead(32, queue=64, max_wait=attempt, name="inventory"),
        Timeout(attempt, name="inventory"),
        env=env,
    )
    charge = payments(
        calls,
        store,
        retry("payment", 20, max(6.0, 3 * patience)),
        circuit("payment", ill),
        Bulkhead(32, queue=64, max_wait=attempt, name="payment"),
        attempt,
        env,
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
        Fallback(outbox, name="notification"),
        retry("notification", 3, max(1.5, patience / 2)),
        circuit("notification", ill),
        RateLimiter(60, burst=20, max_wait=attempt / 2, name="notification"),
        Bulkhead(16, queue=32, max_wait=attempt / 2, name="notification"),
        Timeout(attempt / 2, name="notification"),
        env=env,
    )

    return Shop(inventory(calls.inventory), payment, shipping(calls.shipping), notification(calls.notification))


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
