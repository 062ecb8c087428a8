"""DBOSEngine: durable sagas as DBOS workflows, on its SQLite or PostgreSQL; each step and compensation is a step.

Promises: the body stays as it is, an id stands for one workflow, a call with it gets that workflow's result; DBOS goes
on with what a dead process left. A workflow that DBOS cancels is undone, by a workflow of its own, and stays cancelled.
Does not: unpickle anything; DBOS must be given a JSON serializer. Costs what DBOS costs. Safe from any thread and task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

try:
    import dbos as _probe
except ImportError as error:
    raise ImportError("DBOSEngine needs dbos: pip install 'resilient-kit[dbos]'") from error

from resilient._guard import kind_of
from resilient.policy import seconds

if TYPE_CHECKING:
    from resilient.durable import DurableSaga
    from resilient.engines._dbos import DBOSBody

__all__ = ["DBOSEngine"]

del _probe


class DBOSEngine:
    """Run durable sagas on DBOS. Decorate before `DBOS.launch()`, as DBOS wants it for workflows.

    `patience`: how many seconds a caller who finds a saga cancelled waits for its process to undo it, before it sees to
    that itself.

        engine = DBOSEngine()

        @DurableSaga("order", engine=engine)
        async def place(saga, order: Order) -> Receipt: ...

        DBOS(config={"name": "shop", "system_database_url": "sqlite:///shop.db", "serializer": DBOSEngine.serializer()})
        DBOS.launch()
    """

    __slots__ = ("patience",)

    def __init__(self, *, patience: float = 5.0) -> None:
        self.patience = seconds("patience", patience, zero=True)

    @staticmethod
    def serializer() -> Any:
        """A serializer for DBOS's configuration that writes JSON."""
        from dbos._serialization import DBOSPortableJSONSerializer

        return DBOSPortableJSONSerializer()

    def bind(self, durable: DurableSaga[Any], body: Callable[..., Any], /) -> DBOSBody:
        """What `DurableSaga` makes of `body`, a function or a coroutine function."""
        kind = kind_of(body)
        if kind not in ("sync", "coro"):
            raise TypeError(f"the body of a saga must be a function or a coroutine function, not {body!r}")
        from resilient.engines._dbos import AsyncBody, SyncBody

        return AsyncBody(self, durable, body, True) if kind == "coro" else SyncBody(self, durable, body, False)
