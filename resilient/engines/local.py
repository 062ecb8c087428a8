"""LocalEngine: durable sagas run by this library itself, on a store. It is what `DurableSaga(store=…)` means.

Promises and costs: see `resilient.durable`. It is here so that a program can take its engine from its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resilient.stores._open import shared

__all__ = ["LocalEngine"]


class LocalEngine:
    """Run durable sagas here, with their journals in `store` (a store, or its URL).

    >>> from resilient import DurableSaga
    >>> @DurableSaga("greeting", engine=LocalEngine("memory://"))
    ... def greet(saga, name: str) -> str:
    ...     return saga.step(str.upper, name, compensate=None)
    >>> greet("ada", id="g-1")
    'ADA'
    """

    __slots__ = ("store",)

    def __init__(self, store: Any) -> None:
        if store is None:
            raise TypeError("LocalEngine needs a store, or its URL")
        self.store = shared(store) if isinstance(store, str) else store

    def bind(self, durable: Any, body: Callable[..., Any], /) -> Any:
        """What `DurableSaga` makes of `body`."""
        return durable.local(body)

    def __repr__(self) -> str:
        return f"LocalEngine({self.store!r})"
