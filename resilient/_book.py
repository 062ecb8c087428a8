"""The journal of one saga while it runs: what has been written, what is read back, and the programs that write.

Each program yields operations and decides by their answers (see `_drive`). One rule holds it together: nothing runs
that is not announced first, and whoever has lost the lease announces nothing more. A failed write is repeated for some
seconds, which is harmless; then the saga stops where it is, for another process to find.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from msgspec import Raw

from resilient._binding import digest
from resilient._drive import Cut, Last, Sleep
from resilient._journal import Entry, Head, Step, read, result_form, undoing, write
from resilient._keeper import Beat
from resilient.errors import Incompatible, InFlight, SagaError, StoreError
from resilient.stores._ops import Abandon, Acquired, Append, Begin, Busy, Completed, Finish

if TYPE_CHECKING:
    from resilient._undo import Undo
    from resilient.policy import Env

__all__ = ["Book", "Lost", "label_of", "stored_key"]

TTL = 30 * 86_400.0
"""How long the record of a saga that has ended is kept, in seconds."""


class Lost(SagaError):
    """Another process has taken the saga over: this one must not go on, nor undo anything."""


def stored_key(saga: str, id: str) -> str:
    """The key of a saga's record."""
    return str(digest(b"saga", saga.encode(), id.encode()).hexdigest())


def label_of(saga: str, id: str, version: int, state: str) -> str:
    """What people and scans find a saga by."""
    return write({"saga": saga, "id": id, "version": version, "state": state}).decode()


class Book:
    """The journal of one run."""

    def __init__(
        self,
        store: Any,
        env: Env,
        saga: str,
        id: str,
        version: int,
        lease: float,
        keeper: Any,
        body: Raw | None,
    ) -> None:
        self.store, self.env, self.saga, self.id, self.version = store, env, saga, id, version
        self.lease, self.keeper, self.body = lease, keeper, body
        self.beat = Beat(id, stored_key(saga, id))
        self.at = 0
        self.pending: dict[int, Raw] = {}
        self.steps: dict[int, Step] = {}
        self.results: dict[int, Raw] = {}
        self.undone: set[int] = set()
        self.failed: str | None = None
        self.forward = False
        self.stuck: list[str] = []
        self.begun = self.lost = False

    # -- reading back ------------------------------------------------------------------------------------------------

    def load(self, entries: tuple[bytes, ...]) -> Head:
        """Take in what was written before. `StoreError` for what cannot be read, or has no head."""
        head: Head | None = None
        for data in entries:
            entry = read(data)
            if isinstance(entry.head, Head):
                head = entry.head
            for number, result in entry.done.items():
                self.results[number] = Raw(bytes(result))
            for step in entry.steps:
                self.steps[step.number] = step
            self.undone.update(entry.undone)
            self.failed = entry.failed if entry.failed is not None else self.failed
            self.forward = self.forward or entry.pivot
            self.stuck = entry.stuck or ([] if entry.steps or entry.undone or entry.failed else self.stuck)
        if head is None or head.v != 1:
            raise StoreError(f"the journal of saga {self.saga} ({self.id}) has no head that this version can read")
        self.at, self.begun = len(entries), True
        return head

    def recorded(self, number: int, name: str) -> Step | None:
        """The step that stands at this place of the journal, if one does. An error if it is another one."""
        step = self.steps.get(number)
        if step is not None and step.name != name:
            raise Incompatible(
                f"the body departs from its journal: step {number} was {step.name}, and now is {name}; nothing was run",
                self.saga,
                self.id,
            )
        return step

    def value(self, number: int, function: Any, name: str) -> Any:
        """The recorded value of a step."""
        value, error = result_form(function, name).outcome(bytes(self.results[number]))
        if error is not None:
            raise StoreError(f"the journal of saga {self.saga} ({self.id}) has an error where a value should be")
        return value

    # -- writing -----------------------------------------------------------------------------------------------------

    def key(self, number: int) -> str:
        """The idempotency key of a step: the same in every process that runs it."""
        return f"{self.saga}/{self.id}/{number}"

    def step(self, number: int, name: str, undo: Undo | None, group: int, late: bool, forward: bool) -> Step:
        """A step as it is written. `TypeError` for what cannot be recorded."""
        return Step(number, name, self.key(number), None if undo is None else undoing(undo), group, late, forward)

    def announce(self, steps: list[Step], pivot: bool = False) -> Generator[Any, Any, None]:
        """Write that these steps are about to run, with the results since the last entry, in one commit."""
        entry = Entry(done=self.pending, steps=steps, pivot=pivot, at=self.env.clock.at())
        yield from self._write(entry)
        for step in steps:
            self.steps[step.number] = step

    def note(self, **fields: Any) -> Generator[Any, Any, None]:
        """Write something else about the saga."""
        yield from self._write(Entry(done=self.pending, at=self.env.clock.at(), **fields))

    def relabel(self, state: str, **fields: Any) -> Generator[Any, Any, None]:
        """Write, and change the state that scans see."""
        label = label_of(self.saga, self.id, self.version, state)
        yield from self._write(Entry(done=self.pending, at=self.env.clock.at(), **fields), label)

    def finish(self, state: str, ok: bytes | None, error: str | None) -> Generator[Any, Any, None]:
        """Write the end."""
        last = {str(number): result for number, result in self.pending.items()}
        result = {"v": 1, "saga": state, "at": self.env.clock.at(), "done": last}
        if ok is not None:
            result["ok"] = Raw(ok)
        if error is not None:
            result["error"] = error
        if not self.begun:
            # A saga without a step: its head and its end.
            yield from self._write(Entry(at=self.env.clock.at()))
        yield from self._close()
        beat = self.beat
        yield from self._insist(Finish(beat.stored, beat.owner, beat.fence, write(result), TTL))

    def leave(self) -> Generator[Any, Any, None]:
        """Give the lease back, and leave the saga as it is: anybody may go on."""
        yield from self._close()
        if self.begun and not self.lost:
            yield Last(Abandon(self.beat.stored, self.beat.owner, self.beat.fence))

    def _close(self) -> Generator[Any, Any, None]:
        from resilient._drive import Settle

        if self.keeper is not None and self.keeper.end(self.beat):
            yield Settle(self.beat)

    def _write(self, entry: Entry, label: str = "") -> Generator[Any, Any, None]:
        beat = self.beat
        if self.lost or beat.lost:
            self.lost = True
            raise self._gone()
        if not self.begun:
            head = Head(1, self.saga, self.version, self.id)
            if self.body is not None:
                head.input = self.body
            entry.head = head
            first = label or label_of(self.saga, self.id, self.version, "running")
            reply = yield from self._insist(Begin(beat.stored, beat.owner, self.lease, write(entry), first))
            if type(reply) is not Acquired or reply.attempt > 1:
                self.lost = True
                raise self._taken(reply)
            beat.fence, beat.attempt, self.begun = reply.fence, reply.attempt, True
            if self.keeper is not None:
                self.keeper.begin(beat)
        else:
            op = Append(beat.stored, beat.owner, beat.fence, self.at, write(entry), self.lease, label)
            yield from self._insist(op)
        self.at += 1
        self.results.update(self.pending)
        self.pending = {}

    def _insist(self, op: Any) -> Generator[Any, Any, Any]:
        """Carry out a write, however often it takes; raise where it cannot be."""
        reply: Any = None
        cut: BaseException | None = None
        for tries in range(6):
            reply = yield (op if cut is None else Last(op))
            if type(reply) is Cut:
                cut = reply.error
                reply = yield Last(op)
            if type(reply) is not StoreError:
                break
            if cut is None:
                paused = yield Sleep(min(0.05 * 2**tries, self.lease / 12) * (0.5 + self.env.rng.random() / 2))
                if type(paused) is Cut:
                    cut = paused.error
        if type(reply) is StoreError:
            self.lost = True
            raise reply
        if reply is False:
            self.lost = True
            raise self._gone()
        if cut is not None:
            raise cut
        return reply

    def _gone(self) -> Lost:
        return Lost("its lease was over, and another process has it: this one stops", self.saga, self.id)

    def _taken(self, reply: Any) -> Exception:
        if type(reply) is Busy:
            return InFlight(self.saga, self.id, reply.lease_left)
        if type(reply) is Completed:
            return SagaError("it has ended already: an id is for one saga", self.saga, self.id)
        return SagaError("it was left unfinished by another process: recover it", self.saga, self.id)
