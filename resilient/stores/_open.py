"""From a URL to a store: built-in schemes, and those that other packages add.

Another package adds a scheme by an entry point of the group `resilient.stores`, named like the scheme, that is a
function of the URL: `nats = "my_package:open"`.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["forget_shared", "open", "shared"]

GROUP = "resilient.stores"
_BUILT_IN = {
    "memory": ("resilient.stores.memory", "MemoryStore"),
    "postgres": ("resilient.stores.postgres", "PostgresStore"),
    "postgresql": ("resilient.stores.postgres", "PostgresStore"),
    "redis": ("resilient.stores.redis", "RedisStore"),
    "rediss": ("resilient.stores.redis", "RedisStore"),
    "sqlite": ("resilient.stores.sqlite", "SQLiteStore"),
    "unix": ("resilient.stores.redis", "RedisStore"),
    "valkey": ("resilient.stores.redis", "RedisStore"),
    "valkeys": ("resilient.stores.redis", "RedisStore"),
}

_lock = threading.Lock()
_shared: dict[str, Any] = {}


def open(url: str) -> Any:
    """A store of its own for `url`; nothing connects before the first operation.

    `memory://`, `sqlite:///relative.db`, `sqlite:////absolute.db`, `redis://host:6379/0`, `rediss://…`, `unix://…`,
    `valkey://…`, `valkeys://…`, `postgresql://user@host/database`, or a scheme that an installed package adds. Options
    of a store go into the query: `sqlite:///f.db?durability=normal`, `postgresql:///shop?prefix=pay_`.

    Raises `ValueError` for a URL that names no store, or an option that it has not; `ImportError` naming the extra to
    install where its driver is missing.
    """
    if not isinstance(url, str):
        raise TypeError(f"url must be a string, not {url!r}")
    scheme, colon, _ = url.partition(":")
    if not colon:
        raise ValueError(f"url must begin with a scheme, such as sqlite:///file.db, not {url!r}")
    return _factory(scheme.lower())(url)


def shared(url: str) -> Any:
    """The store that everything in this process shares that names it by this very URL; opened on first use."""
    with _lock:
        store = _shared.get(url)
        if store is None:
            store = _shared[url] = open(url)
        return store


def forget_shared() -> None:
    """Close the stores that were opened by `shared`, for tests; who names their URLs after this gets new ones."""
    with _lock:
        stores = list(_shared.values())
        _shared.clear()
    for store in stores:
        close = getattr(store, "close", None)
        if close is not None:
            close()


def _factory(scheme: str) -> Callable[[str], Any]:
    if scheme in _BUILT_IN:
        module, name = _BUILT_IN[scheme]
        made: Callable[[str], Any] = getattr(importlib.import_module(module), name).from_url
        return made
    from importlib.metadata import entry_points

    found = entry_points(group=GROUP, name=scheme)
    for point in found:
        added: Callable[[str], Any] = point.load()
        return added
    known = sorted({*_BUILT_IN, *(point.name for point in entry_points(group=GROUP))})
    raise ValueError(f"url names no store that is known: {scheme!r} (there are {', '.join(known)})")
