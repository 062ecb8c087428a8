"""The suite that says whether a store is one: machinery. What is asked: `_contract_cases`, `_contract_journal`.

A case is one `async def` over a session, run three ways: by threads (nothing in it suspends, so it runs to its end at
once), by asyncio and by trio. It needs no test framework. Nothing sleeps: what must be over is made short, and the
store is asked again until its clock has moved, for at most `patience` real seconds. A case makes and closes a store.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from resilient.clock import SystemClock
from resilient.stores._ops import AnyOp, Op, Read, Record

if TYPE_CHECKING:
    from resilient.stores._watch import Watch

__all__ = ["Case", "Session", "cases", "check", "expect"]

R = TypeVar("R")
T = TypeVar("T")

CLOCK = SystemClock()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 500 else f"{text[:400]} … ({len(text)} characters)"


def check(holds: bool, sentence: str, answer: object) -> None:
    """Go on if the contract holds, or raise `AssertionError` with its sentence and what the store answered."""
    if not holds:
        raise AssertionError(f"{sentence} The store answered {_short(answer)}.")


def expect(answer: object, kind: type[T], sentence: str) -> T:
    """Return `answer` if it is of this very kind, or raise `AssertionError`."""
    if not isinstance(answer, kind):
        raise AssertionError(f"{sentence} The store answered {_short(answer)}.")
    return answer


class Session(ABC):
    """A store as one world sees it, and the means to let time pass."""

    task = True

    def __init__(self, store: Any, advance: Callable[[float], object] | None, patience: float) -> None:
        self.store, self.advance, self.patience = store, advance, patience
        self.asked: deque[str] = deque(maxlen=8)
        # What shall be over soon: by telling the store's clock, or by being so short that asking takes longer.
        self.soon = 0.001 if advance is None else 60.0

    @abstractmethod
    async def execute(self, op: Op[R]) -> R:
        """Carry out `op` the way of this world."""

    @abstractmethod
    async def race(self, rows: Sequence[Sequence[AnyOp]]) -> list[list[Any]]:
        """Each row in a thread or task of its own, all of them side by side at each step. The answers, row by row."""

    @abstractmethod
    async def wakes(self, watch: Watch, op: AnyOp, seconds: float) -> bool:
        """Whether whoever waits is woken while `op` is carried out by another thread or task."""

    async def close(self) -> None:
        """Close the store, if it can be closed."""
        aclose = getattr(self.store, "aclose", None)
        if aclose is not None:
            await aclose()
        else:
            self.close_plainly()

    def close_plainly(self) -> None:
        close = getattr(self.store, "close", None)
        if close is not None:
            close()

    async def ask(self, op: Op[R]) -> R:
        """Carry out `op`, and remember it for the message of a failure."""
        self.asked.append(_short(op))
        answer = await self.execute(op)
        self.asked[-1] += f" -> {_short(answer)}"
        return answer

    async def until(self, op: Op[R], holds: Callable[[R], bool], sentence: str) -> R:
        """Ask until it `holds`, or raise `AssertionError` when patience ends."""
        end = CLOCK.now() + self.patience
        while True:
            answer = await self.ask(op)
            if holds(answer):
                return answer
            check(CLOCK.now() < end, sentence, answer)
            self.tick()

    def tick(self) -> None:
        """Let what is short be over, if the store's clock can be told; else it goes by itself."""
        if self.advance is not None:
            self.advance(self.soon + 1)

    async def record(self, key: str, sentence: str = "Read: the record of a key.") -> Record:
        """The record of a key that has one."""
        return expect(await self.ask(Read(key)), Record, sentence)

    async def refuses(self, ops: Iterable[AnyOp], key: str, sentence: str) -> None:
        """Each of `ops` is answered by False and leaves the record of `key`, or its absence, as it is."""
        before = await self.ask(Read(key))
        for op in ops:
            answer = await self.ask(op)
            check(answer is False, f"{sentence} {type(op).__name__}: False.", answer)
            after = await self.ask(Read(key))
            check(after == before, f"{sentence} {type(op).__name__}: nothing has changed, from {before!r}.", after)


class Threads(Session):
    """`execute`, from threads."""

    task = False

    async def execute(self, op: Op[R]) -> R:
        answer: R = self.store.execute(op)
        return answer

    async def race(self, rows: Sequence[Sequence[AnyOp]]) -> list[list[Any]]:
        barrier = threading.Barrier(len(rows))
        answers: list[list[Any]] = [[] for _ in rows]
        errors: list[BaseException] = []

        def run(row: Sequence[AnyOp], answers: list[Any]) -> None:
            try:
                for op in row:
                    barrier.wait()
                    answers.append(self.store.execute(op))
            except threading.BrokenBarrierError:
                pass  # Another has failed, and says why.
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=run, args=both) for both in zip(rows, answers, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            raise error
        return answers

    async def wakes(self, watch: Watch, op: AnyOp, seconds: float) -> bool:
        thread = threading.Thread(target=self.store.execute, args=(op,))
        start = CLOCK.now()
        thread.start()
        watch.park(CLOCK, seconds)
        woken = CLOCK.now() - start < seconds
        thread.join()
        return woken

    async def close(self) -> None:
        self.close_plainly()


class Asyncio(Session):
    """`aexecute`, from asyncio tasks."""

    async def execute(self, op: Op[R]) -> R:
        answer: R = await self.store.aexecute(op)
        return answer

    async def race(self, rows: Sequence[Sequence[AnyOp]]) -> list[list[Any]]:
        import asyncio

        steps = [await asyncio.gather(*map(self.execute, ops)) for ops in zip(*rows, strict=True)]
        return [list(row) for row in zip(*steps, strict=True)]

    async def wakes(self, watch: Watch, op: AnyOp, seconds: float) -> bool:
        import asyncio

        start = CLOCK.now()
        task = asyncio.ensure_future(self.execute(op))
        await watch.apark(CLOCK, seconds)
        woken = CLOCK.now() - start < seconds
        await task
        return woken


class Trio(Session):
    """`aexecute`, from trio tasks."""

    async def execute(self, op: Op[R]) -> R:
        answer: R = await self.store.aexecute(op)
        return answer

    async def race(self, rows: Sequence[Sequence[AnyOp]]) -> list[list[Any]]:
        import trio

        answers: list[list[Any]] = [[] for _ in rows]

        async def run(op: AnyOp, answers: list[Any]) -> None:
            answers.append(await self.execute(op))

        for ops in zip(*rows, strict=True):
            async with trio.open_nursery() as nursery:
                for op, row in zip(ops, answers, strict=True):
                    nursery.start_soon(run, op, row)
        return answers

    async def wakes(self, watch: Watch, op: AnyOp, seconds: float) -> bool:
        import trio

        start = CLOCK.now()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.execute, op)
            await watch.apark(CLOCK, seconds)
            return CLOCK.now() - start < seconds
        raise AssertionError("unreachable")


def _in_threads(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        main().send(None)
    except StopIteration:
        return
    raise AssertionError("unreachable")


def _in_asyncio(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    import asyncio

    asyncio.run(main())


def _in_trio(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    import trio

    trio.run(main)


_WORLDS: dict[str, tuple[type[Session], str, Callable[[Callable[[], Coroutine[Any, Any, None]]], None]]] = {
    "sync": (Threads, "execute", _in_threads),
    "asyncio": (Asyncio, "aexecute", _in_asyncio),
    "trio": (Trio, "aexecute", _in_trio),
}

MakeStore: TypeAlias = Callable[[], Any]
Body: TypeAlias = Callable[[Session], Coroutine[Any, Any, None]]


class Case:
    """One case of the suite, in one world. Calling it runs it, on a store of its own; `str` is its name."""

    def __init__(
        self,
        world: str,
        body: Body,
        make_store: MakeStore | None,
        advance: Callable[[float], object] | None,
        patience: float,
    ) -> None:
        self.world = world
        self.name = body.__name__
        self._body, self._make, self._advance, self._patience = body, make_store, advance, patience

    def __str__(self) -> str:
        return f"{self.world}-{self.name}"

    def __repr__(self) -> str:
        return f"<case {self}>"

    def __call__(self, make_store: MakeStore | None = None) -> None:
        """Return if the store keeps this part of the contract, or raise `AssertionError` that says what it broke."""
        make = make_store or self._make
        if make is None:
            raise TypeError("make_store is missing: give it to store_contract, or to each case")
        session, method, run = _WORLDS[self.world]

        async def main() -> None:
            here = session(make(), self._advance, self._patience)
            try:
                if not callable(getattr(here.store, method, None)):
                    raise AssertionError(
                        f"{here.store!r} has no {method}. If it shall have none, say {self.world}=False to "
                        "store_contract; resilient.stores.Threaded makes one for tasks out of one for threads."
                    )
                await self._body(here)
            except BaseException as error:
                error.add_note("\n".join(["asked before, latest last:", *here.asked]))
                raise
            finally:
                await here.close()

        run(main)


def cases(
    make_store: MakeStore | None,
    *,
    sync: bool,
    asyncio: bool,
    trio: bool,
    journal: bool,
    advance: Callable[[float], object] | None,
    patience: float,
) -> list[Case]:
    """See `resilient.testing.store_contract`."""
    from resilient._contract_cases import BODIES
    from resilient._contract_journal import JOURNAL_BODIES

    for name, value in (("make_store", make_store), ("advance", advance)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be callable, not {value!r}")
    worlds = [world for world, wanted in (("sync", sync), ("asyncio", asyncio), ("trio", trio)) if wanted]
    bodies = (*BODIES, *JOURNAL_BODIES) if journal else BODIES
    return [Case(world, body, make_store, advance, patience) for world in worlds for body in bodies]
