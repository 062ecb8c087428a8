"""The SQLite store keeps the contract, in one file and from several connections."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from resilient._contract import Case
from resilient.stores.sqlite import SQLiteStore
from resilient.testing import FakeClock, store_contract


class Ticking(FakeClock):
    """A clock that is told, and on which two questions never come at the same instant."""

    def at(self) -> float:
        self.advance(2e-6)
        return super().at()


_names = itertools.count()
_place: Path


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path) -> None:
    global _place
    _place = tmp_path


def make(durability: str, clock: FakeClock | None = None) -> SQLiteStore:
    return SQLiteStore(_place / f"{next(_names)}.db", durability=durability, clock=clock)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", store_contract(lambda: make("full"), trio=True), ids=str)
def test_contract(case: Case) -> None:
    case()


clock = Ticking()


@pytest.mark.parametrize(
    "case", store_contract(lambda: make("normal", clock), trio=True, advance=clock.advance), ids=str
)
def test_contract_by_a_clock_that_is_told(case: Case) -> None:
    case()
