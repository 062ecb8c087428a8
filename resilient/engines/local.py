"""LocalEngine: durable sagas run by this library, on a store, with any number of processes to finish them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from resilient.stores._open import shared

if TYPE_CHECKING:
    from resilient.durable import DurableBody, DurableSaga

__all__ = ["LocalEngine"]


class LocalEngine:
    """Run sagas here. `store` is a store or its URL; `DurableSaga(..., store=store)` means the same."""

    __slots__ = ("store",)

    def __init__(self, store: Any) -> None:
        self.store = shared(store) if isinstance(store, str) else store

    def bind(self, durable: DurableSaga, body: Callable[..., Any]) -> DurableBody:
        """What is called: the body, run here."""
        return durable.local(body)

    def __repr__(self) -> str:
        return f"LocalEngine({self.store!r})"
