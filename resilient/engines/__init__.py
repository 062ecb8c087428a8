"""Where durable sagas run: here on a store, or on Temporal, or on DBOS; with the same bodies.

    DurableSaga("order", engine=LocalEngine("sqlite:///sagas.db"))
    DurableSaga("order", engine=TemporalEngine(client, task_queue="orders"))     # extra: temporal
    DurableSaga("order", engine=DBOSEngine())                                    # extra: dbos

An engine has `bind(durable, body)`, which makes of a body what is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilient.engines.local import LocalEngine

if TYPE_CHECKING:
    from resilient.engines.dbos import DBOSEngine as DBOSEngine
    from resilient.engines.temporal import TemporalEngine as TemporalEngine

__all__ = ["DBOSEngine", "LocalEngine", "TemporalEngine"]

_HOME = {"DBOSEngine": "dbos", "TemporalEngine": "temporal"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        import importlib

        if name not in _HOME:
            raise AttributeError(f"module 'resilient.engines' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"resilient.engines.{_HOME[name]}"), name)
        globals()[name] = value
        return value
