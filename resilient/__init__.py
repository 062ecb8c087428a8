"""resilient: guard any Python function against a world that fails.

    payments = Pipeline(
        Retry(on=ConnectionError, attempts=4),
        CircuitBreaker("payments"),
        Bulkhead(16),
        Timeout(2.0),
    )

    @payments
    async def charge(order_id: str, amount: Decimal) -> Receipt: ...

Importing this package imports next to nothing: each name brings its module when it is first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # Type checkers take it for true; importing `typing` would cost more than all the rest.

if TYPE_CHECKING:
    from resilient import sagas as sagas
    from resilient import stores as stores
    from resilient import testing as testing
    from resilient._barrier import abarrier as abarrier
    from resilient._barrier import abarrier_schema as abarrier_schema
    from resilient._barrier import barrier as barrier
    from resilient._barrier import barrier_schema as barrier_schema
    from resilient.breaker import BreakerOpen as BreakerOpen
    from resilient.breaker import CircuitBreaker as CircuitBreaker
    from resilient.breaker import Consecutive as Consecutive
    from resilient.breaker import FailureRate as FailureRate
    from resilient.breaker import SlowRate as SlowRate
    from resilient.bulkhead import Bulkhead as Bulkhead
    from resilient.clock import Clock as Clock
    from resilient.durable import DurableSaga as DurableSaga
    from resilient.errors import BudgetSpent as BudgetSpent
    from resilient.errors import BulkheadFull as BulkheadFull
    from resilient.errors import CallTimeout as CallTimeout
    from resilient.errors import DeadlineExceeded as DeadlineExceeded
    from resilient.errors import IdempotencyError as IdempotencyError
    from resilient.errors import Incompatible as Incompatible
    from resilient.errors import InDoubt as InDoubt
    from resilient.errors import InFlight as InFlight
    from resilient.errors import KeyReused as KeyReused
    from resilient.errors import OrderWarning as OrderWarning
    from resilient.errors import RateLimited as RateLimited
    from resilient.errors import Rejected as Rejected
    from resilient.errors import ResilientError as ResilientError
    from resilient.errors import SagaAborted as SagaAborted
    from resilient.errors import SagaError as SagaError
    from resilient.errors import SagaLost as SagaLost
    from resilient.errors import SagaStuck as SagaStuck
    from resilient.errors import StoreError as StoreError
    from resilient.events import BreakerChanged as BreakerChanged
    from resilient.events import CallEnded as CallEnded
    from resilient.events import Compensated as Compensated
    from resilient.events import Event as Event
    from resilient.events import FellBack as FellBack
    from resilient.events import GaveUp as GaveUp
    from resilient.events import Hedged as Hedged
    from resilient.events import LeaseLost as LeaseLost
    from resilient.events import Refused as Refused
    from resilient.events import Replayed as Replayed
    from resilient.events import Retrying as Retrying
    from resilient.events import SagaEnded as SagaEnded
    from resilient.events import Sink as Sink
    from resilient.events import StepDone as StepDone
    from resilient.events import TimedOut as TimedOut
    from resilient.events import Unprotected as Unprotected
    from resilient.fallback import Fallback as Fallback
    from resilient.hedge import Hedge as Hedge
    from resilient.hedge import Quantile as Quantile
    from resilient.idempotency import RERUN as RERUN
    from resilient.idempotency import Idempotent as Idempotent
    from resilient.idempotency import Json as Json
    from resilient.idempotency import claim as claim
    from resilient.idempotency import fence as fence
    from resilient.idempotency import replayed as replayed
    from resilient.patching import Patch as Patch
    from resilient.patching import patch as patch
    from resilient.pipeline import Pipeline as Pipeline
    from resilient.pipeline import inspect as inspect
    from resilient.policy import SYSTEM as SYSTEM
    from resilient.policy import Env as Env
    from resilient.policy import Policy as Policy
    from resilient.ratelimit import RateLimiter as RateLimiter
    from resilient.retry import Retry as Retry
    from resilient.saga import RESULT as RESULT
    from resilient.saga import UNKNOWN as UNKNOWN
    from resilient.saga import AsyncSagaRun as AsyncSagaRun
    from resilient.saga import Saga as Saga
    from resilient.saga import SagaRun as SagaRun
    from resilient.saga import branch as branch
    from resilient.saga import call as call
    from resilient.timeout import Timeout as Timeout
    from resilient.timeout import deadline as deadline
    from resilient.timeout import remaining as remaining

_HOMES = {
    "_barrier": ("abarrier", "abarrier_schema", "barrier", "barrier_schema"),
    "breaker": ("BreakerOpen", "CircuitBreaker", "Consecutive", "FailureRate", "SlowRate"),
    "bulkhead": ("Bulkhead",),
    "clock": ("Clock",),
    "durable": ("DurableSaga",),
    "errors": (
        "BudgetSpent",
        "BulkheadFull",
        "CallTimeout",
        "DeadlineExceeded",
        "IdempotencyError",
        "Incompatible",
        "InDoubt",
        "InFlight",
        "KeyReused",
        "OrderWarning",
        "RateLimited",
        "Rejected",
        "ResilientError",
        "SagaAborted",
        "SagaError",
        "SagaLost",
        "SagaStuck",
        "StoreError",
    ),
    "events": (
        "BreakerChanged",
        "CallEnded",
        "Compensated",
        "Event",
        "FellBack",
        "GaveUp",
        "Hedged",
        "LeaseLost",
        "Refused",
        "Replayed",
        "Retrying",
        "SagaEnded",
        "Sink",
        "StepDone",
        "TimedOut",
        "Unprotected",
    ),
    "fallback": ("Fallback",),
    "hedge": ("Hedge", "Quantile"),
    "idempotency": ("RERUN", "Idempotent", "Json", "claim", "fence", "replayed"),
    "patching": ("Patch", "patch"),
    "pipeline": ("Pipeline", "inspect"),
    "policy": ("SYSTEM", "Env", "Policy"),
    "ratelimit": ("RateLimiter",),
    "retry": ("Retry",),
    "saga": ("RESULT", "UNKNOWN", "AsyncSagaRun", "Saga", "SagaRun", "branch", "call"),
    "timeout": ("Timeout", "deadline", "remaining"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "__version__",
    "sagas",
    "stores",
    "testing",
]
__all__ += _HOME  # pyright: ignore[reportUnsupportedDunderAll]
__all__.sort()  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:
    # Type checkers would take every name for an object of ours; to them the block above says what there is.
    def __getattr__(name: str) -> object:
        import importlib

        if name in ("sagas", "stores", "testing"):
            return importlib.import_module(f"resilient.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'resilient' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"resilient.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
