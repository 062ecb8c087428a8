"""The client's calls, bare and guarded, and the order that the bare ones make.

`Calls` is what a careful person writes with httpx alone: one attempt, a time limit, errors by status; `place` takes an
order through them. `guards` puts a pipeline around each of the calls (payment has a module of its own); the order that
those make is a saga (`saga`). For asyncio. Requests go to the addresses given and nowhere else: proxies of the
environment are not asked.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

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
    Quantile,
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

__all__ = ["Calls", "Shop", "broken", "guards", "open_http", "place", "reason"]

PERSISTENCE = 60.0
"""Seconds for which a step is tried: longer than any trouble. What is given up in the middle has to be undone."""
REFUSALS = (402, 409, 410, 422)


@dataclass(frozen=True, slots=True)
class Shop:
    """The steps of an order with guards, and what undoes them."""

    reserve: Callable[[Order], Awaitable[None]]
    release: Callable[[Order], Awaitable[None]]
    charge: Callable[[Order], Awaitable[Receipt]]
    refund: Callable[[Order], Awaitable[None]]
    pack: Callable[[Order], Awaitable[None]]
    unpack: Callable[[Order], Awaitable[None]]
    ship: Callable[[Order, str], Awaitable[None]]
    notify: Callable[[Order, str], Awaitable[None]]


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

    async def reserve(self, order: Order) -> None:
        """Put aside what was ordered; the same reservation however often this runs, and two at a time do no harm."""
        await self._send("inventory", "PUT", order.id, json={"sku": order.sku, "quantity": order.quantity})

    async def release(self, order: Order) -> None:
        """Give back what was put aside, if anything was; nothing can be put aside for this order any more."""
        await self._send("inventory", "DELETE", order.id)

    async def charge(self, order_id: str, amount: Decimal, key: str | None = None) -> Receipt:
        """Charge the customer. A key tells the gateway that a second request is the same charge, while it remembers."""
        json = {"amount": str(amount), "currency": "EUR"}
        answer = await self._send("payment", "POST", order_id, key, json=json)
        return msgspec.json.decode(answer.content, type=Receipt)

    async def receipt(self, order_id: str) -> Receipt | None:
        """Ask the gateway's ledger what it has for an order."""
        answer = await self._send("payment", "GET", order_id, fine=404)
        found = answer.status_code != 404
        receipt = msgspec.json.decode(answer.content, type=Receipt) if found else None
        self._journal.count("payment", "found" if found else "absent")
        return receipt

    async def refund(self, order: Order) -> None:
        """Give the money back, if any was taken; none can be taken for this order any more."""
        await self._send("payment", "DELETE", order.id)

    async def pack(self, order: Order) -> None:
        """Make the parcel; it is the same parcel however often this runs."""
        to = {"name": order.customer, "address": order.address, "country": order.country}
        await self._send("shipping", "PUT", order.id, json={"sku": order.sku, "quantity": order.quantity, **to})

    async def unpack(self, order: Order) -> None:
        """Take the parcel apart, if there is one and it has not left; none can be made for this order any more."""
        await self._send("shipping", "DELETE", order.id)

    async def ship(self, order: Order, key: str | None = None) -> None:
        """Hand the parcel to the carrier, who gives nothing back."""
        await self._send("shipping", "POST", order.id, key)

    async def notify(self, order: Order, key: str | None = None) -> None:
        """Tell the customer."""
        json = {"to": order.email, "text": f"{order.product} ({order.quantity}) is on its way."}
        await self._send("notification", "POST", order.id, key, json=json)

    async def _send(
        self, service: str, method: str, order_id: str, key: str | None = None, fine: int | None = None, **request: Any
    ) -> httpx.Response:
        self._journal.count(service, "sent")
        if key is not None:
            request["headers"] = {"idempotency-key": key}
        try:
            answer = await self._http.request(method, f"{self._urls[service]}/orders/{order_id}", **request)
            if answer.status_code != fine:
                answer.raise_for_status()
        except httpx.HTTPError:
            self._journal.count(service, "failed")
            raise
        self._journal.count(service, "answered")
        return answer


def broken(error: BaseException) -> bool:
    """Whether an error says that the service is ill: 429 is an answer of a healthy one, a refusal of ours is none."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return not isinstance(error, Rejected)


def guards(calls: Calls, env: Env, patience: float, store: Any, post: Callable[[str], object]) -> Shop:
    """The steps with guards. `patience` is what the bare calls wait for an answer.

    `store` keeps what became of each payment; `post` puts the message about an order into the outbox.
    """
    attempt = max(0.6, patience / 5)
    rest = max(0.2, patience / 16)
    # Retries cope with a service that fails every other call; a circuit is for one that fails nearly all of them.
    ill = FailureRate(0.8, over=40, minimum=20)
    wait = tenacity.wait_random_exponential(multiplier=0.1, max=1.0)

    def retry(name: str, total: float = PERSISTENCE) -> Retry:
        return Retry(transient, attempts=10_000, wait=wait, total=total, name=name)

    def circuit(name: str, trip: Trip) -> CircuitBreaker:
        # A probe that gets no answer is cut off like any other attempt, and must be in time to say so.
        return CircuitBreaker(name, trip, on=broken, cooldown=rest, probe_lease=2 * attempt)

    def outbox(order: Order, key: str) -> None:
        post(order.id)

    async def charge(order: Order) -> Receipt:
        return await pay(order.id, order.total)

    inventory = Pipeline(
        retry("inventory"),
        Hedge(Quantile(0.95, default=attempt / 3), idempotent=True, name="inventory"),
        circuit("inventory", ill | Consecutive(10)),
        Bulkhead(16, queue=64, max_wait=attempt, name="inventory"),
        Timeout(attempt, name="inventory"),
        env=env,
    )
    payment = (
        retry("payment"),
        circuit("payment", ill),
        Bulkhead(16, queue=64, max_wait=attempt, name="payment"),
    )
    pay = payments(calls, store, *payment, attempt, env)
    refund = Pipeline(*payment, Timeout(attempt, name="payment"), env=env)
    shipping = Pipeline(
        retry("shipping"),
        circuit("shipping", ill | SlowRate(0.9, slower_than=attempt, over=40, minimum=20)),
        RateLimiter(100, burst=20, max_wait=attempt, name="shipping"),
        Bulkhead(16, queue=64, max_wait=attempt, name="shipping"),
        Timeout(attempt, name="shipping"),
        env=env,
    )
    notification = Pipeline(
        Fallback(outbox, name="notification"),
        retry("notification", max(1.5, patience / 2)),
        circuit("notification", ill),
        RateLimiter(60, burst=20, max_wait=attempt / 2, name="notification"),
        Bulkhead(8, queue=32, max_wait=attempt / 2, name="notification"),
        Timeout(attempt / 2, name="notification"),
        env=env,
    )

    return Shop(
        reserve=inventory(calls.reserve),
        release=inventory(calls.release),
        charge=charge,
        refund=refund(calls.refund),
        pack=shipping(calls.pack),
        unpack=shipping(calls.unpack),
        ship=shipping(calls.ship),
        notify=notification(calls.notify),
    )


async def place(order: Order, calls: Calls, clock: Clock, due: float) -> Outcome:
    """Take an order through its steps with no guards. The message is a courtesy: it may fail.

    Latency counts from the instant `due`, at which the customer pressed the button, so that a client that is too busy
    to begin does not look quick.
    """
    reached = ""
    try:
        reached = "inventory"
        await calls.reserve(order)
        reached = "payment"
        await calls.charge(order.id, order.total)
        reached = "shipping"
        await calls.pack(order)
        await calls.ship(order)
    except Exception as error:
        return Outcome(order.id, clock.now() - due, reached, reason(error))
    try:
        await calls.notify(order)
    except Exception as error:
        return Outcome(order.id, clock.now() - due, None, reason(error), told=False)
    return Outcome(order.id, clock.now() - due)


def reason(error: BaseException) -> str:
    """Why a call failed, in a few words: what the service says, if it refuses for good."""
    if isinstance(error, httpx.HTTPStatusError):
        said = error.response.status_code in REFUSALS
        return error.response.text.strip() if said else f"HTTP {error.response.status_code}"
    return type(error).__name__
