"""Sagas from outside: finish what dead processes began, look at them, and decide where nobody else can.

`recover` finds sagas whose lease is over and finishes them: durable bodies forward, from their journal; blocks, and
whatever was being undone already, backwards. One saga that cannot be finished keeps no other from it. Several recoverers at once
are no trouble: the lease and its fence let one of them have each saga. Safe from any thread and loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct, UnsetType

from resilient._book import Book, stored_key
from resilient._drive import Cut, Outcome, Program, adrive, drive
from resilient._guard import kind_of
from resilient._journal import Entry, read
from resilient._run import Run, task_keeper, thread_keeper
from resilient._settle import never, rollback
from resilient._undo import Compensation, Undo
from resilient.durable import Ended, ended, journalled, known
from resilient.errors import SagaAborted, SagaError, SagaStuck, StoreError
from resilient.policy import SYSTEM
from resilient.saga import Saga
from resilient.stores._open import shared
from resilient.stores._ops import Acquired, Claim, History, Page, Record, Scan

__all__ = [
    "Report",
    "SagaRecord",
    "abandon",
    "arecover",
    "compensate",
    "describe",
    "list_sagas",
    "mermaid",
    "recover",
    "resume",
    "show",
    "timeline",
]


class _Label(Struct):
    saga: str
    id: str
    version: int = 1
    state: str = "running"


class SagaRecord(Struct, frozen=True):
    """One saga as its record says: `state` is running, orphaned, compensating, stuck, done, aborted or abandoned.

    Orphaned: its process has died, and nobody has it yet. Instants are wall time, in seconds since the epoch.
    """

    name: str
    id: str
    version: int
    state: str
    attempt: int
    began_at: float
    mark: float
    key: str


class Report(Struct):
    """What a recovery did, by ids: `name/id`."""

    finished: list[str] = []
    compensated: list[str] = []
    stuck: list[str] = []
    left: dict[str, str] = {}
    """Sagas that could not be gone on with here, and why: another version, a name that this process does not know."""

    def __str__(self) -> str:
        text = f"{len(self.finished)} finished, {len(self.compensated)} undone, {len(self.stuck)} stuck"
        return text if not self.left else f"{text}, {len(self.left)} left"


def _record(record: Record) -> SagaRecord | None:
    try:
        label = msgspec.json.decode(record.label, type=_Label)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    state = label.state
    if record.state == "done":
        try:
            state = ended(record.result or b"").saga
        except StoreError:
            state = "damaged"
    elif record.state == "in doubt" and state != "stuck":
        state = "orphaned"
    return SagaRecord(
        label.saga, label.id, label.version, state, record.attempt, record.began_at, record.mark, record.key
    )


def _store(store: Any) -> Any:
    return shared(store) if isinstance(store, str) else store


def _pages(store: Any, state: str) -> Iterator[Page]:
    after = ""
    while True:
        page = store.execute(Scan(after, 200, '"saga":', state))
        yield page
        after = page.after
        if not after:
            return


def list_sagas(store: Any, *, state: str = "", name: str = "") -> list[SagaRecord]:
    """The sagas in a store, of one `state` and `name` if given."""
    store = _store(store)
    wanted = {"": "", "running": "running", "compensating": "", "orphaned": "in doubt", "stuck": "in doubt"}
    found = (_record(record) for page in _pages(store, wanted.get(state, "done")) for record in page.records)
    return [one for one in found if one is not None and state in ("", one.state) and name in ("", one.name)]


def _find(store: Any, id: str, name: str) -> tuple[SagaRecord, tuple[bytes, ...], Record]:
    """The saga with this id, and its journal. `LookupError` if there is none, or (without a name) several."""
    if name:
        keys = [stored_key(name, id)]
    else:
        keys = [one.key for one in list_sagas(store) if one.id == id]
    if len(keys) > 1:
        raise LookupError(f"several sagas have the id {id!r}: say which name")
    got = store.execute(History(keys[0])) if keys else None
    record = None if got is None else _record(got[0])
    if got is None or record is None:
        raise LookupError(f"there is no saga with the id {id!r}")
    return record, got[1], got[0]


def show(store: Any, id: str, *, name: str = "") -> tuple[SagaRecord, list[Entry], Ended | None]:
    """A saga, its journal, and its end if it has one."""
    record, entries, raw = _find(_store(store), id, name)
    return record, [read(entry) for entry in entries], ended(raw.result) if raw.result is not None else None


# -- recovery --------------------------------------------------------------------------------------------------------


def recover(store: Any, *, name: str = "") -> Report:
    """Finish the sagas in `store` whose processes have died, those of `name` if given; say what came of each.

    Durable sagas go on forward if this process has imported their bodies. Async bodies and compensations are run in an
    event loop of their own.
    """
    store, report = _store(store), Report()
    for page in _pages(store, "in doubt"):
        for record in page.records:
            one = _record(record)
            if one is not None and one.state == "orphaned" and name in ("", one.name):
                _recover(store, one, report)
    return report


async def arecover(store: Any, *, name: str = "") -> Report:
    """Finish the sagas in `store` whose processes have died. See `recover`.

    Plain bodies and compensations run in this task, between awaits.
    """
    store, report, after = _store(store), Report(), ""
    while True:
        page = await store.aexecute(Scan(after, 200, '"saga":', "in doubt"))
        for record in page.records:
            one = _record(record)
            if one is not None and one.state == "orphaned" and name in ("", one.name):
                await _arecover(store, one, report)
        after = page.after
        if not after:
            return report


def _recover(store: Any, record: SagaRecord, report: Report) -> None:
    try:
        book, run = _prepared(store, record, thread_keeper)
        reply = drive(_look(book), store, SYSTEM, never, (), {}).result()
        if reply is None:
            return
        head, undos = reply
        body = known().get(record.name)
        if body is not None and book.failed is None and not isinstance(head.input, UnsetType):
            if body.is_async:
                import asyncio

                asyncio.run(body.resume(record.id, head.input))
            else:
                body.resume(record.id, head.input)
            report.finished.append(_name(record))
            return
        _backwards(book, head, record)
        saga = Saga(record.name, id=record.id)
        run = Run(saga)
        if any(kind_of(_function(undo)) != "sync" for undo in undos):
            import asyncio

            outcome = asyncio.run(_aback(store, record, report))
        else:
            outcome = drive(_back(store, record, book, saga, run, saga._undoer()), store, SYSTEM, never, (), {})
        _say(report, record, outcome)
    except Exception as error:
        _tell(report, record, error)


async def _arecover(store: Any, record: SagaRecord, report: Report) -> None:
    try:
        book, run = _prepared(store, record, task_keeper)
        reply = (await adrive(_look(book), store, SYSTEM, never, (), {})).result()
        if reply is None:
            return
        head, _ = reply
        body = known().get(record.name)
        if body is not None and book.failed is None and not isinstance(head.input, UnsetType):
            going = body.resume(record.id, head.input)
            if body.is_async:
                await going
            report.finished.append(_name(record))
            return
        _backwards(book, head, record)
        _say(report, record, await _aback(store, record, report))
    except Exception as error:
        _tell(report, record, error)


async def _aback(store: Any, record: SagaRecord, report: Report) -> Outcome:
    saga = Saga(record.name, id=record.id)
    book, run = _prepared(store, record, task_keeper)
    return await adrive(_back(store, record, book, saga, run, saga._aundoer()), store, SYSTEM, never, (), {})


def _prepared(store: Any, record: SagaRecord, keeper: Any) -> tuple[Book, Run]:
    lease = 30.0
    book = Book(store, SYSTEM, record.name, record.id, record.version, lease, keeper(store, lease, SYSTEM), None)
    return book, Run(Saga(record.name, id=record.id))


def _look(book: Book) -> Program:
    """The head of an orphan and what is to be undone of it; None where it is none any more."""
    got = yield History(book.beat.stored)
    if isinstance(got, (StoreError, Cut)):
        return Outcome(None, got if isinstance(got, StoreError) else got.error)
    if got is None or got[0].state != "in doubt":
        return Outcome(None, None)
    head = book.load(got[1])
    return Outcome(
        (head, [] if not isinstance(head.input, UnsetType) and book.failed is None else journalled(book)), None
    )


def _backwards(book: Book, head: Any, record: SagaRecord) -> None:
    """Whether this saga may be undone by its journal alone; `LookupError` if it is to go forward, and cannot here."""
    if not isinstance(head.input, UnsetType) and book.failed is None:
        raise LookupError(f"no durable saga named {record.name!r} is known here: import its module")


def _back(store: Any, record: SagaRecord, book: Book, saga: Saga, run: Run, guarded: Any) -> Program:
    """Take the saga over, and undo it."""
    label = f'{{"saga":{msgspec.json.encode(record.name).decode()}'
    reply = yield Claim(book.beat.stored, book.beat.owner, book.lease, "", "", True)
    if isinstance(reply, (StoreError, Cut)):
        return Outcome(None, reply if isinstance(reply, StoreError) else reply.error)
    if type(reply) is not Acquired:
        return Outcome(None, None)
    book.beat.fence, book.beat.attempt = reply.fence, reply.attempt
    got = yield History(book.beat.stored)
    if not isinstance(got, tuple):
        return Outcome(None, got if isinstance(got, StoreError) else None)
    book.load(got[1])
    book.keeper.begin(book.beat)
    run._book, run._over = book, True
    del label
    failed = book.failed or "its process died"
    if book.failed is None:
        yield from book.relabel("compensating", failed=failed)
        book.failed = failed
    if book.beat.attempt > 10:
        yield from book.relabel("stuck", stuck=[f"{book.beat.attempt - 1} processes have not finished it"])
        yield from book.leave()
        return Outcome(
            None, SagaStuck("it is stuck", [SagaError("too many attempts", saga.name, run.id)], saga.name, run.id)
        )
    error = SagaError(failed, saga.name, run.id)
    return (yield from rollback(saga, run, error, journalled(book), guarded))


def _function(undo: Undo) -> Any:
    given = undo.compensate
    return given.function if type(given) is Compensation else given


def _name(record: SagaRecord) -> str:
    return f"{record.name}/{record.id}"


def _say(report: Report, record: SagaRecord, outcome: Outcome) -> None:
    if outcome.error is not None:
        _tell(report, record, outcome.error)


def _tell(report: Report, record: SagaRecord, error: BaseException) -> None:
    name = _name(record)
    if isinstance(error, SagaAborted):
        report.compensated.append(name)
    elif isinstance(error, SagaStuck):
        report.stuck.append(name)
    elif isinstance(error, Exception):
        report.left[name] = f"{type(error).__name__}: {error}"
    else:
        raise error
