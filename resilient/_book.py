"""The journal of one saga while it runs: what has been written, what is read back, and the programs that write.

Each program yields operations and decides by their answers (see `_drive`). One rule holds it together: nothing runs
that is not announced first, and whoever has lost the lease announces nothing more. A failed write is repeated for some
seconds, which is harmless; then the saga stops where it is, for another process to find.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from msgspec import Raw

from resilient._binding import digest
from resilient._drive import Cut, Last, Settle, Sleep
from resilient._journal import (
    VERSION,
    Entry,
    Head,
    Step,
    Undoing,
    call_form,
    called_by,
    found,
    name_of,
    read,
    result_form,
    revived,
    undoing,
    value_of,
    write,
)
from resilient._keeper import Beat
from resilient.errors import Incompatible, InFlight, SagaError, SagaLost, StoreError
from resilient.stores._ops import Abandon, Acquired, Append, Begin, Busy, Completed, Finish

if TYPE_CHECKING:
    from resilient._undo import Undo
    from resilient.policy import Env

__all__ = ["Book", "in_flight", "label_of", "stored_key"]

TTL = 30 * 86_400.0
"""How long the record of a saga that has ended is kept, in seconds."""


def stored_key(saga: str, id: str) -> str:
    """The key of a saga's record: its name and id, so that sagas whose ids count up lie side by side in an index.

    Long or unusual ones are hashed. A name has no "/" in it, and a hash neither.
    """
    plain = f"{saga}/{id}"
    if len(plain) <= 120 and plain.isascii() and "{" not in plain and "}" not in plain:
        return plain
    return str(digest(b"saga", saga.encode(), id.encode()).hexdigest())


def label_of(saga: str, id: str, version: int, state: str) -> str:
    """What people and scans find a saga by."""
    return write({"saga": saga, "id": id, "version": version, "state": state}).decode()


def in_flight(saga: str, id: str, retry_after: float) -> InFlight:
    """What is raised where somebody else has the saga."""
    return InFlight(saga, id, retry_after, "a saga with this id is running")


class Book:
    """The journal of one run."""

    alike: Callable[[Raw, Raw], bool]
    """Whether two texts of a body's arguments say the same call. Only where there is a body."""

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
        self.fresh()

    def fresh(self) -> None:
        """As if nothing had been read or written yet."""
        self.at = 0
        self.pending: dict[int, Raw] = {}
        self.steps: dict[int, Step] = {}
        self.results: dict[int, Raw] = {}
        self.undone: set[int] = set()
        self.failed: str | None = None
        self.forward = False
        self.stuck: list[str] = []
        self.again = 0
        self.begun = self.lost = False
        # When this run of it began, if somebody listens.
        self.since = self.env.clock.now() if self.env.sinks else None
        # Why nothing more is written; a cancel or interrupt that came while something was.
        self.fault: Exception | None = None
        self.departed: Incompatible | None = None
        self.taken = False
        # What the store has said already to the next write.
        self.heard: Any = None
        self.cut: BaseException | None = None

    # -- reading back ------------------------------------------------------------------------------------------------

    def load(self, entries: tuple[bytes, ...]) -> Head:
        """Take in what was written before. `StoreError` for what cannot be read, or is another saga's."""
        self.fresh()
        head: Head | None = None
        for at, data in enumerate(entries):
            entry = read(data)
            if at == 0 and isinstance(entry.head, Head):
                head = entry.head
            elif at == 0 or isinstance(entry.head, Head):
                break
            for number, result in entry.done.items():
                self.results[number] = Raw(bytes(result))
            for step in entry.steps:
                self.steps[step.number] = step
            self.undone.update(entry.undone)
            self.failed = entry.failed if entry.failed is not None else self.failed
            self.forward = self.forward or entry.pivot
            self.stuck = entry.stuck if entry.stuck or entry.again else self.stuck
            self.again = entry.again or self.again
        else:
            if head is not None and head.v == VERSION and (head.saga, head.id) == (self.saga, self.id):
                self.at, self.begun = len(entries), True
                return head
        raise StoreError(f"the journal of saga {self.saga} ({self.id}) does not begin as this version of it would")

    def recorded(self, number: int, name: str, undo: Undo | None, forward: bool, function: Any = None) -> Step | None:
        """The step that stands at this place of the journal, if one does. An error if it is another one."""
        step = self.steps.get(number)
        if step is None and self.departed is None:
            return None
        now = "" if undo is None or undo.compensate is None else name_of(called_by(undo), "the compensation")
        was = "" if step is None or step.undo is None else step.undo.function
        if step is not None and (step.name, was, step.forward) != (name, now, forward):
            self.depart(f"step {number} was {_said(step.name, was, step.forward)}, and is {_said(name, now, forward)}")
        if step is not None and number not in self.results and self.departed is None:
            # It is run once more: by arguments that are not what its compensation will get, it would be another step.
            told = None if undo is None or undo.compensate is None else undoing(undo, function)
            if told is not None and not self._same(step, told):
                self.depart(f"step {number} ({name}) had other arguments when it began")
        if self.departed is not None:
            raise self.departed
        return step

    @staticmethod
    def _same(step: Step, told: Undoing) -> bool:
        was = step.undo
        if was is None or (was.args, was.kwargs) == (told.args, told.kwargs):
            return True
        form = call_form(found(was.function), was.function)
        return form.read(was.args, was.kwargs) == form.read(told.args, told.kwargs)

    def depart(self, how: str) -> Incompatible:
        """The body is not the one that wrote this journal: nothing more is run, nothing undone."""
        if self.departed is None:
            self.departed = Incompatible(
                f"the body departs from its journal: {how}; it is left as it is", self.saga, self.id
            )
        return self.departed

    def left(self, above: int = 0) -> list[Undo]:
        """What the journal says is to be undone yet, the last first, of steps with numbers above `above`.

        `LookupError` for a function that is not here, or not to be called because a journal names it.
        """
        undos: list[Undo] = []
        for number in sorted(self.steps, reverse=True):
            step = self.steps[number]
            data = self.pending.get(number, self.results.get(number))
            if number <= above or step.undo is None or number in self.undone or (data is None and step.late):
                continue
            undos.append(revived(step, value_of(step, data)))
        return undos

    def value(self, number: int, function: Any, name: str) -> Any:
        """The recorded value of a step."""
        return result_form(function, name).outcome(bytes(self.results[number]))[0]

    # -- writing -----------------------------------------------------------------------------------------------------

    def key(self, number: int) -> str:
        """The idempotency key of a step: the same in every process that runs it."""
        return f"{self.saga}/{self.id}/{number}"

    def step(
        self, number: int, name: str, undo: Undo | None, group: int, late: bool, forward: bool, function: Any = None
    ) -> Step:
        """A step as it is written. `TypeError` for what cannot be recorded."""
        how = None if undo is None else undoing(undo, function)
        return Step(number, name, self.key(number), how, group, late, forward)

    def announce(self, steps: list[Step], pivot: bool = False) -> Generator[Any, Any, None]:
        """Write that these steps are about to run, with the results since the last entry, in one commit."""
        entry = Entry(done=self.pending, steps=steps, pivot=pivot, at=self.env.clock.at())
        yield from self._write(entry)
        cut, self.cut = self.cut, None
        if cut is not None:
            # They are announced, and never begin: nobody here has to undo them.
            raise cut
        for step in steps:
            self.steps[step.number] = step

    def at_once(self, step: Step, pivot: bool) -> Any:
        """The operation that announces one step, for who carries it out without a program; None if it needs one."""
        if self.lost or self.beat.lost or self.cut is not None:
            return None
        return self._operation(Entry(done=self.pending, steps=[step], pivot=pivot, at=self.env.clock.at()))

    def announced(self, step: Step, reply: Any) -> bool:
        """Whether `reply`, to what `at_once` gave, says that the step may run. If not, `announce` goes on from it."""
        if not self._written(reply):
            self.heard = reply
            return False
        self.steps[step.number] = step
        return True

    def note(self, **fields: Any) -> Generator[Any, Any, None]:
        """Write something else about the saga. A cancel or interrupt does not keep it from that: it is in `cut`."""
        yield from self._write(Entry(done=self.pending, at=self.env.clock.at(), **fields))

    def relabel(self, state: str, **fields: Any) -> Generator[Any, Any, None]:
        """Write, and change the state that scans see."""
        label = label_of(self.saga, self.id, self.version, state)
        yield from self._write(Entry(done=self.pending, at=self.env.clock.at(), **fields), label)
        if state == "stuck":
            self._ended(state)

    def finish(self, state: str, ok: bytes | None, error: str | None) -> Generator[Any, Any, None]:
        """Write the end."""
        if not self.begun:
            # A saga without a step: its head and its end.
            yield from self._write(Entry(at=self.env.clock.at()))
        yield from self.close()
        yield from self._insist(self._end(state, ok, error))
        self._ended(state)

    def done_at_once(self, number: int, ok: bytes | None) -> Any:
        """The operation that ends a saga whose last step was `number`, like `at_once`; None if it needs a program."""
        if not self.begun or self.lost or self.beat.lost or self.cut is not None or self.departed is not None:
            return None
        if number < max(self.steps) or self.stop():
            return None
        return self._end("done", ok, None)

    def done(self, reply: Any) -> bool:
        """Whether `reply`, to what `done_at_once` gave, says that it is done. If not, `finish` goes on from there."""
        if reply is not True:
            self.heard = reply
            return False
        self._ended("done")
        return True

    def _end(self, state: str, ok: bytes | None, error: str | None) -> Finish:
        last = {str(number): result for number, result in self.pending.items()}
        result: dict[str, Any] = {"v": 1, "saga": state, "at": self.env.clock.at(), "done": last}
        if ok is not None:
            result["ok"] = Raw(ok)
        if error is not None:
            result["error"] = error
        return Finish(self.beat.stored, self.beat.owner, self.beat.fence, write(result), TTL)

    def leave(self) -> Generator[Any, Any, None]:
        """Give the lease back, and leave the saga as it is: anybody may go on."""
        yield from self.close()
        if self.begun and not self.lost:
            yield Last(Abandon(self.beat.stored, self.beat.owner, self.beat.fence))

    def close(self) -> Generator[Any, Any, None]:
        """End the heartbeat, and wait for the one that is under way."""
        if self.stop():
            yield Settle(self.beat)

    def stop(self) -> bool:
        """End the heartbeat. Whether one is just under way."""
        under_way: bool = self.keeper.end(self.beat)
        return under_way

    def _write(self, entry: Entry, label: str = "") -> Generator[Any, Any, None]:
        if self.lost or self.beat.lost:
            raise self._gone()
        reply = yield from self._insist(self._operation(entry, label))
        if not self._written(reply):
            self.lost = self.taken = True
            self.fault = self._taken(reply)
            raise self.fault

    def _operation(self, entry: Entry, label: str = "") -> Append | Begin:
        beat = self.beat
        if self.begun:
            return Append(beat.stored, beat.owner, beat.fence, self.at, write(entry), self.lease, label)
        head = entry.head = Head(VERSION, self.saga, self.version, self.id)
        if self.body is not None:
            head.input = self.body
        first = label or label_of(self.saga, self.id, self.version, "running")
        return Begin(beat.stored, beat.owner, self.lease, write(entry), first)

    def _written(self, reply: Any) -> bool:
        """Take in that the entry is written, if it is."""
        if not self.begun:
            if type(reply) is not Acquired:
                return False
            self.beat.fence, self.beat.attempt, self.begun = reply.fence, reply.attempt, True
            self.keeper.begin(self.beat)
        elif reply is not True:
            return False
        self.at += 1
        self.results.update(self.pending)
        self.pending = {}
        return True

    def _insist(self, op: Any) -> Generator[Any, Any, Any]:
        """Carry out a write, however often it takes; raise where it cannot be. A cancel meanwhile is kept in `cut`."""
        reply: Any = None
        for tries in range(6):
            reply, self.heard = self.heard, None
            if reply is None:
                reply = yield (op if self.cut is None else Last(op))
            if type(reply) is Cut:
                # It may have been written, or not: once more, which is harmless.
                self.cut = reply.error
                reply = yield Last(op)
            if type(reply) not in (StoreError, Cut):
                break
            if self.cut is None:
                paused = yield Sleep(min(0.05 * 2**tries, self.lease / 12) * (0.5 + self.env.rng.random() / 2))
                if type(paused) is Cut:
                    self.cut = paused.error
        if type(reply) is Cut:
            reply = StoreError("the caller was interrupted again and again", maybe_written=True)
        if type(reply) is StoreError:
            self.lost, self.fault = True, reply
            raise reply
        if reply is False:
            raise self._gone()
        return reply

    def _gone(self) -> Exception:
        self.lost = True
        if self.fault is None:
            self.fault = SagaLost("its lease was over, and another process has it: this one stops", self.saga, self.id)
            if self.env.sinks:
                from resilient.events import LeaseLost

                self.env.emit(LeaseLost(self.saga, self.id, self.beat.attempt, True))
        return self.fault

    def _ended(self, state: str) -> None:
        """Tell how it ended, which is written now."""
        env = self.env
        if env.sinks:
            from resilient.events import SagaEnded

            seconds = None if self.since is None else env.clock.now() - self.since
            env.emit(SagaEnded(self.saga, self.id, state, seconds, self.beat.attempt > 1))

    def _taken(self, reply: Any) -> Exception:
        if type(reply) is Busy:
            return in_flight(self.saga, self.id, reply.lease_left)
        if type(reply) is Completed:
            return SagaError("it has ended already: an id is for one saga", self.saga, self.id)
        text = "it was left unfinished by another process: recover it; if it is stuck, resume, compensate or abandon it"
        return SagaError(text, self.saga, self.id)


def _said(name: str, undo: str, forward: bool) -> str:
    return f"{name}{f', undone by {undo}' if undo else ''}{', after the pivot' if forward else ''}"
