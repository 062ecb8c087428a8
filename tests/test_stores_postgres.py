"""The PostgreSQL store keeps the contract, on connections of its own and on those of the user's pools."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from resilient._contract import Case
from resilient.stores import PostgresStore, Threaded
from resilient.testing import store_contract
from tests._servers import postgres_database

_names = itertools.count()


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[str]:
    """One database for this file; each store gets tables of its own."""
    with postgres_database(postgres_url) as url:
        yield url


def prefix() -> str:
    return f"t{next(_names)}_"


@pytest.mark.parametrize("case", store_contract(), ids=str)
def test_contract(case: Case, database: str) -> None:
    case(lambda: PostgresStore(database, prefix=prefix(), pool_size=4))


@pytest.mark.parametrize("case", store_contract(sync=False, asyncio=False, trio=True), ids=str)
def test_contract_under_trio_by_threads(case: Case, database: str) -> None:
    case(lambda: Threaded(PostgresStore(database, prefix=prefix(), pool_size=4)))
