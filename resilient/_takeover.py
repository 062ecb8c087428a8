"""Taking over a saga that is there already: its end, its lease, what its journal allows; one program for everybody.

Promises: what is refused is refused before anything is run or undone; whoever takes a saga over reads its journal again
under the lease. Does not: decide which sagas, or run their bodies. A look costs one read, a takeover two and a commit.
Pure: a driver carries it out.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from resilient._ambient import nearest
from resilient._book import in_flight
from resilient._drive import Cut, Last, Outcome, Program, Wait
from resilient._journal import read
from resilient.errors import Incompatible, SagaError, SagaStuck, StoreError
from resilient.stores._ops import Abandon, Acquired, Begin, Busy, Claim, History, Release

if TYPE_CHECKING:
    from resilient._book import Book
    from resilient._journal import Head
    from resilient._keeper import Beat

__all__ = ["Again", "Elsewhere", "Ended", "Rules", "asked", "ended", "enter", "look"]

Again = Literal["", "resume", "compensate"]
"""What a person says of a saga that was left: go on as it was going, or undo it."""


class Rules(Struct, frozen=True):
    """How a saga may be taken over.

    `wait` for whoever has it; the `version` of the body, if there is one here; after so many `attempts`, or `in_doubt`
    of a step, it is for a person. `backwards`: by the journal alone.
    """

    wait: bool = False
    version: int | None = None
    attempts: int = 10
    in_doubt: Literal["rerun", "stuck"] = "rerun"
    again: Again = ""
    backwards: bool = False


class Ended(Struct):
    """The result that the record of a saga holds."""

    v: int
    saga: str
    at: float = 0.0
    done: dict[int, Raw] = {}
    ok: Raw | UnsetType = UNSET
    error: str = ""


class Elsewhere(SagaError):
    """Another process was faster: there is nothing to do here."""


def ended(data: bytes) -> Ended:
    """Read the end of a saga; `StoreError` for what is none."""
    try:
        made = msgspec.json.decode(data, type=Ended)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"the end of the saga cannot be read: {error}") from None
    if made.v != 1:
        raise StoreError(f"the end of the saga was written by another version ({made.v})")
    return made


def asked(reply: Any) -> Any:
    """A store's answer, or its error raised."""
    if isinstance(reply, StoreError):
        raise reply
    if isinstance(reply, Cut):
        raise reply.error
    return reply


def enter(book: Book, rules: Rules, seen: Any = None) -> Program:
    """Take a saga over. The outcome: None if there is none, its end (`Ended`), or its `Head`, and `book` has the lease.

    `InFlight` if somebody else has it, and goes on having it. `seen`: what a look at it has just shown.
    """
    beat, clock = book.beat, book.env.clock
    watching = False
    while True:
        got, seen = seen, None
        if got is None:
            got = asked((yield History(beat.stored)))
        if got is None:
            book.fresh()
            return Outcome(None, None)
        record, entries = got
        if record.state == "done":
            end = ended(record.result)
            _alike(book, read(entries[0]).head if entries else UNSET)
            return Outcome(end, None)
        if record.state == "running":
            left = nearest(clock) - clock.now() if rules.wait else 0.0
            if left <= 0:
                other = yield from look(book.beat, book.lease)
                if type(other) is Busy:
                    return Outcome(None, in_flight(book.saga, book.id, other.lease_left))
                continue
            if not watching:
                # The first wait only begins to watch, and so does the claim that asks to be woken.
                asked((yield Wait(beat.stored, 0.0)))
                watching = type((yield from look(beat, book.lease, awaited=True))) is Busy
            else:
                asked((yield Wait(beat.stored, min(left, 0.25))))
            continue
        head = book.load(entries)
        _allowed(book, head, rules)
        if (rules.backwards or rules.again == "compensate") and not book.forward:
            # What is not here, or not to be called, is found out before the saga is taken.
            book.left()
        reply = yield Begin(beat.stored, beat.owner, book.lease, b"{}", "", True)
        if isinstance(reply, Cut):
            yield Last(Abandon(beat.stored, beat.owner, 0))
        reply = asked(reply)
        if type(reply) is not Acquired:
            continue
        beat.fence, beat.attempt = reply.fence, reply.attempt
        if reply.attempt == 1:
            # It has just been forgotten.
            yield Last(Release(beat.stored, beat.owner, reply.fence))
            continue
        try:
            return (yield from _taken(book, rules))
        except (StoreError, SagaError, LookupError) as error:
            yield from book.leave()
            return Outcome(None, error)


def look(beat: Beat, lease: float, *, awaited: bool = False) -> Generator[Any, Any, Any]:
    """Who has the saga, as the store sees it; `awaited`: ask to be woken when he is done."""
    reply = asked((yield Claim(beat.stored, beat.owner, lease, "", "", False, awaited)))
    if type(reply) is Acquired:
        # It has just been forgotten: what was begun now is nothing.
        yield Last(Release(beat.stored, beat.owner, reply.fence))
    return reply


def _allowed(book: Book, head: Head, rules: Rules) -> None:
    """Raise what stands against taking the saga over."""
    if rules.version is not None and head.version != rules.version:
        text = f"its journal is of version {head.version}, and this is version {rules.version}"
        raise Incompatible(text, book.saga, book.id)
    book.version = head.version
    _alike(book, head)
    if book.body is not None and head.input is UNSET:
        raise Incompatible("its journal is that of a block, not of a durable saga", book.saga, book.id)
    if rules.again == "compensate" and book.forward:
        raise SagaError("it is past its pivot: from there it can only go forward", book.saga, book.id)
    if book.stuck and not rules.again:
        raise _stuck(book, book.stuck)


def _alike(book: Book, head: Head | UnsetType) -> None:
    """An id stands for one saga with its arguments."""
    if book.body is None or head is UNSET or head.input is UNSET:
        return
    if not book.alike(head.input, book.body):
        raise SagaError("this id was used before, with other arguments", book.saga, book.id)


def _taken(book: Book, rules: Rules) -> Program:
    """Under the lease: once more, since its last owner may have written between the look and the claim."""
    got = asked((yield History(book.beat.stored)))
    if got is None:
        raise LookupError(f"saga {book.saga} ({book.id}) has just been removed")
    head = book.load(got[1])
    _allowed(book, head, rules)
    book.keeper.begin(book.beat)
    if not rules.again:
        trouble = _trouble(book, rules)
        if trouble:
            yield from book.relabel("stuck", stuck=[trouble])
            raise _stuck(book, [trouble])
        return Outcome(head, None)
    if rules.again == "compensate" and book.failed is None:
        book.failed = "somebody had it undone"
        yield from book.relabel("compensating", again=book.beat.attempt, failed=book.failed)
    else:
        yield from book.relabel("running" if book.failed is None else "compensating", again=book.beat.attempt)
    return Outcome(head, None)


def _trouble(book: Book, rules: Rules) -> str:
    """Why a saga that was left unfinished is not gone on with, if so."""
    attempts = book.beat.attempt - book.again - 1
    if attempts >= rules.attempts:
        return f"{attempts} processes have not finished it"
    if rules.in_doubt == "stuck" and book.failed is None:
        for number, step in sorted(book.steps.items()):
            if number not in book.results:
                return f"step {number} ({step.name}) had begun, and nobody knows how it ended"
    return ""


def _stuck(book: Book, texts: list[str]) -> SagaStuck:
    errors: list[Exception] = [SagaError(text, book.saga, book.id) for text in texts]
    return SagaStuck("it is stuck", errors, book.saga, book.id)
