"""Stores: where durable state lives. `open(url)` gives one; the rest is for those who write one.

Operations are data (`Claim`, `Renew`, `Finish`, …), answered in one atomic step by the store's own clock. There are
`MemoryStore`, `SQLiteStore`, `RedisStore` (Redis and Valkey) and `PostgresStore`; each serves threads and tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilient.errors import StoreError
from resilient.stores._open import open
from resilient.stores._ops import (
    Abandon,
    Acquired,
    Append,
    Begin,
    Busy,
    Claim,
    Claimed,
    Completed,
    Doubtful,
    Finish,
    Forget,
    History,
    Op,
    Page,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
)
from resilient.stores._protocol import AsyncStore, Store, Threaded, Watching
from resilient.stores._watch import Bells, Watch

if TYPE_CHECKING:
    from resilient.stores.memory import MemoryStore as MemoryStore
    from resilient.stores.postgres import PostgresStore as PostgresStore
    from resilient.stores.redis import RedisStore as RedisStore
    from resilient.stores.sqlite import SQLiteStore as SQLiteStore

__all__ = [
    "Abandon",
    "Acquired",
    "Append",
    "AsyncStore",
    "Begin",
    "Bells",
    "Busy",
    "Claim",
    "Claimed",
    "Completed",
    "Doubtful",
    "Finish",
    "Forget",
    "History",
    "MemoryStore",
    "Op",
    "Page",
    "PostgresStore",
    "Purge",
    "Read",
    "Record",
    "RedisStore",
    "Release",
    "Renew",
    "SQLiteStore",
    "Scan",
    "Store",
    "StoreError",
    "Threaded",
    "Watch",
    "Watching",
    "open",
]

_HOME = {"MemoryStore": "memory", "PostgresStore": "postgres", "RedisStore": "redis", "SQLiteStore": "sqlite"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        import importlib

        if name not in _HOME:
            raise AttributeError(f"module 'resilient.stores' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"resilient.stores.{_HOME[name]}"), name)
        globals()[name] = value
        return value
