"""The payment step with guards: however often it runs, through crashes of client and service, one charge an order.

Promises that a charge is repeated only after the payment service has said that there is none; what nobody knows is in
doubt, and the next attempt asks. Rests on a service that can be asked about an order, and that handles requests in the
order in which they come. Costs two commits of the store for an attempt, and a question for an answer that is lost. For
asyncio.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx

from resilient import RERUN, CallTimeout, Idempotent, InDoubt, InFlight, Pipeline, Rejected, Timeout, claim
from resilient.demo.numbers import Receipt

if TYPE_CHECKING:
    from decimal import Decimal

    from resilient import Bulkhead, CircuitBreaker, Env, Retry
    from resilient.demo.client import Calls

__all__ = ["Pay", "payments", "transient", "undone"]

Pay: TypeAlias = "Callable[[str, Decimal], Awaitable[Receipt]]"
PAUSE = 0.05  # seconds between two questions, where the first got no answer


def undone(error: Exception) -> bool:
    """Whether an error says that nothing was done: the request never left, or was refused at the door."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 503 or error.response.status_code < 500
    return isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))


def transient(error: BaseException) -> bool:
    """Whether trying again may help. That it does no harm is for the call to see to (`payments`, `Calls`)."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (429, 500, 502, 503, 504)
    return isinstance(error, (httpx.TransportError, CallTimeout, Rejected, InDoubt, InFlight))


def payments(
    calls: Calls, store: Any, retry: Retry, breaker: CircuitBreaker, bulkhead: Bulkhead, attempt: float, env: Env
) -> Pay:
    """The guarded step. `attempt` is the seconds for one attempt at a charge, and for one at settling a doubt."""

    async def ask(order_id: str) -> Receipt | None:
        """What the service's ledger has for this order. It gives up only when it is cut off."""
        while True:
            try:
                return await calls.receipt(order_id)
            except Exception:
                await env.clock.asleep(PAUSE)

    @Pipeline(Timeout(attempt, name="payment"), env=env)
    async def settle(order_id: str, amount: Decimal) -> Any:
        """How an earlier attempt ended that never said so: its receipt, or `RERUN` if there was no charge."""
        receipt = await ask(order_id)
        return RERUN if receipt is None else receipt

    # A key that is taken was a dead client's: nobody else pays this order. So no waiting in line: `InFlight` tells when
    # the lease is over, and the retry comes back then.
    @Pipeline(
        retry,
        Idempotent(
            store, key="order_id", in_doubt=settle, duplicates="raise", lease=max(1.0, 2 * attempt), name="payment"
        ),
        breaker,
        bulkhead,
        Timeout(attempt, name="payment"),
        env=env,
    )
    async def charge(order_id: str, amount: Decimal) -> Receipt:
        """One attempt. It raises only what it knows to mean that nobody was charged."""
        try:
            return await calls.charge(order_id, amount, key=claim().derive("charge"))
        except Exception as error:
            if undone(error):
                raise
            # Perhaps the money has moved. So ask; and if there is no answer in time, the Timeout leaves it in doubt.
            receipt = await ask(order_id)
            if receipt is None:
                raise
            return receipt

    return charge
