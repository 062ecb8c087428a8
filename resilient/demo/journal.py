"""The client's journal: what it does, line by line, in a file that outlives it.

`Journal` is the client's end: each line is in the file before anything else happens, so a client that is killed has
lost none. The next one learns from it which orders are over. `Tail` is the end of whoever watches. Lines are JSON
arrays, of which the first element says what they are; `Progress.take` knows them all. For one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msgspec import json

from resilient.demo.numbers import Outcome
from resilient.demo.schedule import SERVICES
from resilient.events import (
    BreakerChanged,
    Compensated,
    Event,
    FellBack,
    GaveUp,
    Hedged,
    Refused,
    Replayed,
    Retrying,
    TimedOut,
)

__all__ = ["Journal", "Tail"]

_COUNTED: dict[type[Event], str] = {
    Retrying: "retries",
    Refused: "refused",
    TimedOut: "timeouts",
    Hedged: "hedges",
    FellBack: "fallbacks",
    GaveUp: "gave_up",
    Replayed: "replayed",
}
# The steps that can be undone, and their services.
_STEPS = {"reserve": "inventory", "charge": "payment", "pack": "shipping"}


class Journal:
    """A journal to write in. As a sink of an `Env` it notes what the policies decide. `over`: the orders that ended."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._now = now
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        self._file.truncate(whole)  # what is behind it is a line that was torn
        entries: list[list[Any]] = [json.decode(line) for line in text[:whole].splitlines()]
        self.over: set[str] = {entry[1] for entry in entries if entry[0] == "over"}

    def __call__(self, event: Event) -> None:
        if isinstance(event, BreakerChanged):
            self._note("breaker", self._now(), event.policy, event.old, event.new, event.reason)
        elif isinstance(event, Compensated):
            if event.error is None:
                self.count(_STEPS[event.step.rpartition(":")[2]], "undone")
        elif type(event) in _COUNTED and event.policy in SERVICES:
            self.count(event.policy, _COUNTED[type(event)])

    def count(self, service: str, what: str) -> None:
        """One more of a field of `Tally`."""
        self._note("count", service, what)

    def start(self, breakers: list[str]) -> None:
        """A client begins, so nothing of an earlier one is in flight. These services have breakers, all closed."""
        self._note("start", breakers)

    def place(self, order: str) -> None:
        """An order is in work from now on."""
        self._note("place", order)

    def end(self, outcome: Outcome) -> None:
        """An order is over, and will not be placed again."""
        o = outcome
        self._note("over", o.order, o.latency, o.failed_at, o.reason, o.told)
        self.over.add(o.order)

    def left(self, count: int) -> None:
        """So many orders were left in the middle by the client before this one."""
        self._note("left", count)

    def recovered(self, state: str) -> None:
        """One of them has come to its end."""
        self._note("recovered", state)

    def post(self, order: str) -> None:
        """The message about an order goes to the outbox."""
        self._note("outbox", order)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _note(self, *entry: object) -> None:
        self._file.write(json.encode(entry) + b"\n")


class Tail:
    """The lines of a journal that came since the last look; none while there is no file."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def __iter__(self) -> Iterator[list[Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text.rfind(b"\n") + 1
        self._read += whole
        for line in text[:whole].splitlines():
            yield json.decode(line)
