"""What sagas in tests do: importable steps and compensations over a ledger, and programs of steps as plain data.

A program is a list of nodes: `["step", how, undo]`, `["parallel", [[how, undo], …]]`, `["nested", [nodes]]`,
`["pivot"]`, `["cancel"]`. `how`: a step is "good", "bad" (its effect happens, and it fails), or "late" (registered
after it). `undo`: "plain", "call", "flaky" (fails once), "broken" (always fails) or None.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from resilient import RESULT, call
from resilient._run import step_key
from resilient.saga import branch

__all__ = ["Boom", "Ledger", "act", "aplay", "ledgers", "play", "unact"]


class Boom(Exception):
    """What fails."""


class Ledger:
    """What happened in one saga."""

    def __init__(self, hook: Callable[[str], None] | None = None, twice: bool = False) -> None:
        self.events: list[tuple[str, int]] = []
        self.keys: dict[int, set[str]] = {}
        self.values: list[object] = []
        self.hook = hook
        self.twice = twice
        self.flaky: set[int] = set()
        self.mended = False
        # The state of the world, which can bear that everything happens twice: what is there now.
        self.there: set[int] = set()
        self._lock = threading.Lock()

    def did(self, what: str, number: int) -> None:
        for _ in range(1 + self.twice):
            with self._lock:
                self.events.append((what, number))
                (self.there.add if what == "act" else self.there.discard)(number)

    def of(self, what: str) -> list[int]:
        return [number for event, number in self.events if event == what]


ledgers: dict[str, Ledger] = {}


def act(run: str, number: int, how: str) -> str:
    """A step."""
    ledger = ledgers[run]
    if ledger.hook is not None:
        ledger.hook(f"before act {number}")
    key = step_key.get()
    if key is not None:
        ledger.keys.setdefault(number, set()).add(key)
    ledger.did("act", number)
    if ledger.hook is not None:
        ledger.hook(f"after act {number}")
    if how == "bad":
        raise Boom(f"step {number}")
    return f"value {number}"


def unact(run: str, number: int, undo: str, result: Any = None) -> None:
    """A compensation."""
    ledger = ledgers[run]
    if ledger.hook is not None:
        ledger.hook(f"before unact {number}")
    ledger.values.append(result)
    if undo == "flaky" and number not in ledger.flaky:
        ledger.flaky.add(number)
        raise Boom(f"compensation {number}, once")
    if undo == "broken" and not ledger.mended:
        ledger.did("tried", number)
        raise Boom(f"compensation {number}")
    ledger.did("unact", number)
    if ledger.hook is not None:
        ledger.hook(f"after unact {number}")


async def aact(run: str, number: int, how: str) -> str:
    """A step."""
    return act(run, number, how)


async def aunact(run: str, number: int, undo: str, result: Any = None) -> None:
    """A compensation."""
    unact(run, number, undo, result)


def undoing(function: Any, run: str, number: int, undo: str | None) -> Any:
    if undo is None:
        return None
    if undo == "plain":
        # Called with the step's own arguments, of which "good" is as good as any.
        return function
    return call(function, run, number, undo, RESULT)


def play(saga: Any, run: str, program: list[Any], first: int = 1) -> int:
    """Run a program; the number of the step after it."""
    number = first
    for node in program:
        if node[0] == "step":
            _, how, undo = node
            saga.step(
                act,
                run,
                number,
                how,
                compensate=undoing(unact, run, number, undo),
                register="after" if how == "late" else "before",
            )
            number += 1
        elif node[0] == "parallel":
            branches: list[Any] = []
            for how, undo in node[1]:
                branches.append(branch(act, run, number, how, compensate=undoing(unact, run, number, undo)))
                number += 1
            saga.parallel(*branches)
        elif node[0] == "nested":
            with saga.nested("child") as child:
                number = play(child, run, node[1], number)
        elif node[0] == "pivot":
            saga.pivot()
        else:
            raise KeyboardInterrupt
    return number


async def aplay(saga: Any, run: str, program: list[Any], first: int = 1) -> int:
    """Run a program with coroutines; every other step is a plain function."""
    import asyncio

    number = first
    for node in program:
        if node[0] == "step":
            _, how, undo = node
            await saga.step(
                aact if number % 2 else act,
                run,
                number,
                how,
                compensate=undoing(aunact if number % 3 else unact, run, number, undo),
                register="after" if how == "late" else "before",
            )
            number += 1
        elif node[0] == "parallel":
            branches: list[Any] = []
            for how, undo in node[1]:
                branches.append(branch(aact, run, number, how, compensate=undoing(aunact, run, number, undo)))
                number += 1
            await saga.parallel(*branches)
        elif node[0] == "nested":
            async with saga.nested("child") as child:
                number = await aplay(child, run, node[1], number)
        elif node[0] == "pivot":
            saga.pivot()
        else:
            raise asyncio.CancelledError
    return number
