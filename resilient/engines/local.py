"""LocalEngine: durable sagas run by this library itself, on a store. It is what `DurableSaga(store=…)` means.

Promises and costs: see `resilient.durable`. It is here so that a program can take its engine from its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from resilient.stores._open import shared

if TYPE_CHECKING:
    from resilient.durable import DurableBody, DurableSaga

__all__ = ["LocalEngine"]


class LocalEngine:
    """Run durable sagas here, with their journals in `store` (a store, or its URL).

    >>> from textwrap import dedent
    >>> from resilient import DurableSaga
    >>> @DurableSaga("tidying", engine=LocalEngine("memory://"))
    ... def tidy(saga, text: str) -> str:
    ...     return saga.step(dedent, text, compensate=None)
    >>> tidy("  hello", id="t-1")
    'hello'
    """

    __slots__ = ("store",)

    def __init__(self, store: Any) -> None:
        if store is None:
            raise TypeError("LocalEngine needs a store, or its URL")
        self.store = shared(store) if isinstance(store, str) else store

    def bind(self, durable: DurableSaga[Any], body: Callable[..., Any], /) -> DurableBody:
        """What `DurableSaga` makes of `body`."""
        return durable.local(body)

    def __repr__(self) -> str:
        return f"LocalEngine({self.store!r})"
