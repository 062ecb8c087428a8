"""The types that modules share. Nothing here runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

__all__ = ["Call", "F", "Kind", "Seconds"]

Seconds: TypeAlias = float
"""A duration, or an instant of the monotonic clock."""

Kind: TypeAlias = Literal["sync", "coro", "gen", "stream"]
"""What a function is: plain, `async def`, generator, async generator. Policies have one shell for each they serve."""

Call: TypeAlias = Callable[..., Any]
"""A function as a shell sees it: whatever the user wrote, or the next shell inwards."""

F = TypeVar("F", bound="Callable[..., Any] | classmethod[Any, ..., Any] | staticmethod[..., Any]")
"""Anything that can be decorated; it comes back with the same type."""
