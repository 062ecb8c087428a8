"""Engines: where the body of a durable saga runs. On a store of ours, on Temporal, or on DBOS; the body stays the same.

    place = DurableSaga("order", engine=TemporalEngine(connect, task_queue="orders"))(body)

Promises: the same steps and compensations, in the same order, with the same ends. Does not: hide what an engine cannot
do; that is refused where the saga is decorated or the step begins. Importing this imports no engine: each name brings
its module, and its package, when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient.engines.dbos import DBOSEngine as DBOSEngine
    from resilient.engines.local import LocalEngine as LocalEngine
    from resilient.engines.temporal import TemporalEngine as TemporalEngine

__all__ = ["DBOSEngine", "LocalEngine", "TemporalEngine"]

_HOMES = {"DBOSEngine": "dbos", "LocalEngine": "local", "TemporalEngine": "temporal"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{home}"), name)
