"""Fixtures of more than one file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests._servers import redis_server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real server, started when the first test asks for it."""
    with redis_server() as url:
        yield url
