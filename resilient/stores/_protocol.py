"""What a store is, to those who use one and to those who write one.

A store answers operations (`execute`, for threads; `aexecute`, for tasks), and may let callers watch a key instead of
asking again and again. One object may serve both worlds: ours do. `resilient.testing.store_contract` is the suite that
says whether a store of yours is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from resilient.stores._ops import Op
    from resilient.stores._watch import Watch

__all__ = ["AsyncStore", "Store", "Threaded", "Watching"]

R = TypeVar("R")


@runtime_checkable
class Store(Protocol):
    """A store for plain functions. Safe from any thread."""

    def execute(self, op: Op[R], /) -> R:
        """Carry out `op` and answer. `StoreError` where that cannot be; it says whether it may have happened."""
        ...


@runtime_checkable
class AsyncStore(Protocol):
    """A store for coroutines. Safe from any task, of the event loops that it says it serves."""

    async def aexecute(self, op: Op[R], /) -> R:
        """Carry out `op` and answer, or raise `StoreError`."""
        ...


@runtime_checkable
class Watching(Protocol):
    """A store that wakes those who wait for a key. For others, callers ask again after a while."""

    def watch(self, key: str, *, task: bool) -> Watch:
        """Watch `key` from now on, in this thread or (`task`) in this task. Returns at once."""
        ...


class Threaded:
    """A store for coroutines out of one for plain functions: each operation runs in a thread.

    Say so where you want it: a thread costs some 50 µs an operation, under asyncio and trio alike. A store that serves
    both worlds by itself needs none.
    """

    def __init__(self, store: Store) -> None:
        if not callable(getattr(store, "execute", None)):
            raise TypeError(f"store must have a method execute, which {store!r} has not")
        self.store = store
        if isinstance(store, Watching):
            self.watch = store.watch
        poll = getattr(store, "poll", None)
        if poll is not None:
            self.poll: float = poll

    async def aexecute(self, op: Op[R], /) -> R:
        """Carry out `op` in a thread."""
        from resilient.clock import in_trio

        if in_trio():
            import trio

            answer: R = await trio.to_thread.run_sync(self.store.execute, op)
            return answer
        import asyncio

        return await asyncio.to_thread(self.store.execute, op)

    def close(self) -> Any:
        """Close the store, if it can be closed."""
        close = getattr(self.store, "close", None)
        return None if close is None else close()

    def __repr__(self) -> str:
        return f"Threaded({self.store!r})"
