"""Orphans, several beside each other: what becomes of a saga whose process has died, here and now.

Promises: durable bodies go on forward, by their code; blocks, and whatever was being undone already, go backwards, by
the journal; what cannot be gone on with here is left as it was, and keeps nothing from the others. Sagas that keep
failing are looked at more and more rarely. Flat cost for each: some reads and a commit more than what is to be done.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, Raw, Struct

from resilient import _threads
from resilient._book import Book, in_flight
from resilient._drive import Outcome, Program, adrive, drive
from resilient._guard import kind_of
from resilient._journal import called_by
from resilient._run import Run, task_keeper, thread_keeper
from resilient._settle import never
from resilient._takeover import Again, Elsewhere, Ended, Rules, asked, ended, enter, look
from resilient.durable import DurableBody, known, undone
from resilient.errors import InFlight, SagaAborted, SagaError, SagaStuck, StoreError
from resilient.policy import SYSTEM, Env, whole
from resilient.saga import Saga
from resilient.stores._ops import Busy, History, Page, Record, Scan

if TYPE_CHECKING:
    from resilient.retry import Retry

__all__ = ["HANDS", "Job", "Recoverer", "Report", "SagaRecord", "aone", "one", "pages", "record_of"]

HANDS = 8
"""How many sagas are gone on with beside each other, unless the caller says otherwise: they share commits."""


class _Label(Struct):
    saga: str
    id: str
    version: int = 1
    state: str = "running"


class SagaRecord(Struct, frozen=True):
    """One saga as its record says: `state` is running, compensating, orphaned, stuck, done, aborted or abandoned.

    Orphaned: its process has died, and nobody has it yet. `attempt` counts the processes that had it. `mark` is when
    its lease ends or ended, or when it did. Instants are wall time, in seconds since the epoch.
    """

    name: str
    id: str
    version: int
    state: str
    attempt: int
    began_at: float
    mark: float
    key: str

    def __str__(self) -> str:
        return f"{self.name}/{self.id}"


class Report(Struct):
    """What a recovery did, by `name/id` of the sagas."""

    finished: list[str] = []
    compensated: list[str] = []
    stuck: list[str] = []
    """Those that need a person, as of now: `resume`, `compensate` or `abandon` them."""
    left: dict[str, str] = {}
    """Those that could not be gone on with here, and why: another version, a name that this process does not know."""

    def __str__(self) -> str:
        text = f"{len(self.finished)} finished, {len(self.compensated)} undone, {len(self.stuck)} stuck"
        return text if not self.left else f"{text}, {len(self.left)} left"


def record_of(record: Record) -> SagaRecord | None:
    """A record as that of a saga; None for anything else."""
    try:
        label = msgspec.json.decode(record.label, type=_Label)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
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


def pages(state: str, text: str = '"saga":') -> Generator[Any, Any, Iterable[list[SagaRecord]]]:
    """A program: all pages of sagas in a state of their records."""
    found: list[list[SagaRecord]] = []
    after = ""
    while True:
        page: Page = asked((yield Scan(after, 200, text, state)))
        found.append([one for one in map(record_of, page.records) if one is not None])
        after = page.after
        if not after:
            return found


class Job(Struct, frozen=True):
    """One saga to go on with. `again` is what a person said of it."""

    store: Any
    name: str
    id: str
    again: Again = ""
    retries: Retry | None = None
    lease: float = 30.0
    env: Env = SYSTEM

    def book(self, keeper: Any) -> tuple[Saga, Run, Book]:
        """What is needed to undo it."""
        saga = Saga(self.name, id=self.id, store=self.store, retries=self.retries, lease=self.lease, env=self.env)
        book = Book(self.store, self.env, self.name, self.id, 1, self.lease, keeper, None)
        return saga, Run(saga), book


class _Plan(Struct):
    body: DurableBody | None
    input: Raw
    is_async: bool


def _plan(job: Job) -> Program:
    """How to go on with a saga; None for one that is no orphan any more."""
    _, _, book = job.book(None)
    got = asked((yield History(book.beat.stored)))
    if not job.again and (got is None or got[0].state != "in doubt"):
        return Outcome(None, None)
    if got is None:
        raise LookupError(f"there is no saga {job.name} with the id {job.id!r}")
    if got[0].state == "running":
        reply = yield from look(book.beat, job.lease)
        raise in_flight(job.name, job.id, reply.lease_left if type(reply) is Busy else 0.0)
    if got[0].state == "done":
        raise SagaError(f"it has ended already: {ended(got[0].result).saga}", job.name, job.id)
    head = book.load(got[1])
    body = known().get(job.name)
    if head.input is not UNSET and body is not None:
        return Outcome(_Plan(body, head.input, body.is_async), None)
    if head.input is not UNSET and book.failed is None and job.again != "compensate":
        raise LookupError(f"no durable saga named {job.name!r} is known here: import its module")
    if job.again == "resume" and book.failed is None:
        text = "it was a block, which cannot be run again: compensate it, or abandon it"
        if book.forward:
            text = "it was a block, which cannot be run again, and is past its pivot: abandon it"
        raise SagaError(text, job.name, job.id)
    undos = [] if book.forward else book.left()
    return Outcome(_Plan(None, Raw(), any(kind_of(called_by(undo)) != "sync" for undo in undos)), None)


def _back(job: Job, saga: Saga, run: Run, book: Book, guarded: Any) -> Program:
    """Take the saga over, and undo it by its journal."""
    try:
        outcome = yield from enter(book, Rules(again=job.again, backwards=True))
        if outcome.error is not None:
            return outcome
        if outcome.value is None or isinstance(outcome.value, Ended):
            return Outcome(None, Elsewhere("it has just ended, or been removed, elsewhere", job.name, job.id))
        if book.failed is None:
            try:
                if book.forward:
                    text = "its process died after its pivot, and a block cannot be run again"
                    yield from book.relabel("stuck", stuck=[text])
                    yield from book.leave()
                    error = SagaError(text, job.name, job.id)
                    return Outcome(None, SagaStuck("it is stuck", [error], job.name, job.id))
                book.failed = "its process died"
                yield from book.relabel("compensating", failed=book.failed)
            except (StoreError, SagaError) as fault:
                yield from book.leave()
                return Outcome(None, fault)
        return (yield from undone(saga, run, book, guarded))
    finally:
        book.stop()


def one(job: Job) -> str:
    """Go on with one saga: "finished" or "compensated", or "" if somebody else has it. Raises what keeps it from that.

    `SagaStuck` if it needs a person (now).
    """
    try:
        plan: _Plan | None = drive(_plan(job), job.store, job.env, never, (), {}).result()
        if plan is None:
            return ""
        if plan.is_async:
            return _in_loop(job, plan)
        if plan.body is not None:
            plan.body.resume(job.store, job.id, plan.input, job.again)
            return "finished"
        saga, run, book = job.book(thread_keeper(job.store, job.lease, job.env))
        program = _back(job, saga, run, book, saga._undoer())
        drive(program, job.store, job.env, never, (), {}).result()
    except Exception as error:
        return _said(error, job)
    raise AssertionError("unreachable")


async def aone(job: Job) -> str:
    """Go on with one saga. See `one`."""
    try:
        plan: _Plan | None = (await adrive(_plan(job), job.store, job.env, never, (), {})).result()
        return "" if plan is None else await _go(job, plan)
    except Exception as error:
        return _said(error, job)


async def _go(job: Job, plan: _Plan) -> str:
    if plan.body is not None:
        going = plan.body.resume(job.store, job.id, plan.input, job.again)
        if plan.is_async:
            await going
        return "finished"
    saga, run, book = job.book(task_keeper(job.store, job.lease, job.env))
    program = _back(job, saga, run, book, saga._aundoer())
    (await adrive(program, job.store, job.env, never, (), {})).result()
    raise AssertionError("unreachable")


def _in_loop(job: Job, plan: _Plan) -> str:
    """Run what is async in an event loop of its own."""
    import asyncio

    if not _loop_runs():
        return asyncio.run(_alone(job, plan))
    raise RuntimeError("its functions are async, and an event loop runs here: use the async twin of this function")


async def _alone(job: Job, plan: _Plan) -> str:
    try:
        return await _go(job, plan)
    finally:
        aclose = getattr(job.store, "aclose", None)
        if aclose is not None:
            # The connections of this loop, which ends now.
            await aclose()


def _said(error: Exception, job: Job) -> str:
    if isinstance(error, SagaAborted):
        return "compensated"
    if isinstance(error, (InFlight, Elsewhere)) and not job.again:
        return ""
    raise error


class Recoverer:
    """Goes through the orphans of a store, again and again; those that keep failing, more and more rarely."""

    def __init__(
        self,
        store: Any,
        *,
        name: str = "",
        retries: Retry | None = None,
        lease: float = 30.0,
        concurrency: int = HANDS,
        env: Env = SYSTEM,
        stop: Callable[[], bool] = bool,
        say: Callable[[SagaRecord, str, Exception | None], object] | None = None,
    ) -> None:
        self.store, self.name, self.stop, self.say = store, name, stop, say
        self.concurrency = whole("concurrency", concurrency)
        self._retries, self._lease, self._env = retries, lease, env
        self.rounds = 0
        # Keys of those that failed: how often, and the round in which they are looked at again.
        self.failing: dict[str, tuple[int, int]] = {}

    def round(self) -> Report:
        """Go through all of them once."""
        found = drive(self._scan(), self.store, self._env, never, (), {}).result()
        hands = self._hands(found)
        shift = _Shift(self, self._orphans(found))
        if hands == 1:
            shift.hand()
        else:
            _beside(shift, hands)
        return shift.report()

    async def around(self) -> Report:
        """Go through all of them once."""
        found = (await adrive(self._scan(), self.store, self._env, never, (), {})).result()
        hands = self._hands(found)
        shift = _Shift(self, self._orphans(found))
        if hands == 1:
            await shift.ahand()
        else:
            await _abeside(shift, hands)
        return shift.report()

    def _hands(self, found: Iterable[list[SagaRecord]]) -> int:
        return max(1, min(self.concurrency, sum(map(len, found))))

    def _scan(self) -> Program:
        return Outcome((yield from pages("in doubt")), None)

    def _orphans(self, found: Iterable[list[SagaRecord]]) -> Iterator[SagaRecord]:
        self.rounds += 1
        seen: set[str] = set()
        for page in found:
            for record in page:
                if record.state != "orphaned" or self.name not in ("", record.name) or record.key in seen:
                    continue
                seen.add(record.key)
                if self.failing.get(record.key, (0, 0))[1] <= self.rounds:
                    if self.stop():
                        return
                    yield record
        self.failing = {key: value for key, value in self.failing.items() if key in seen}

    def job(self, record: SagaRecord) -> Job:
        """What there is to do for a saga."""
        return Job(self.store, record.name, record.id, "", self._retries, self._lease, self._env)

    def note(self, report: Report, record: SagaRecord, how: str, error: Exception | None) -> None:
        """Write down what came of a saga, and say it."""
        if error is None:
            self.failing.pop(record.key, None)
            if how:
                (report.finished if how == "finished" else report.compensated).append(str(record))
        elif isinstance(error, SagaStuck):
            report.stuck.append(str(record))
            how = "stuck"
        else:
            times = self.failing.get(record.key, (0, 0))[0] + 1
            self.failing[record.key] = times, self.rounds + min(2 ** (times - 1), 64)
            report.left[str(record)] = f"{type(error).__name__}: {error}"
            how = "left"
        if how and self.say is not None:
            self.say(record, how, error)


class _Shift:
    """One round by several hands: each takes the next saga, in the order of the scan, until there is none.

    Whatever is no failure of a saga ends the shift: no other one is begun, those in hand are brought to their end.
    """

    def __init__(self, recoverer: Recoverer, todo: Iterator[SagaRecord]) -> None:
        self._recoverer, self._todo = recoverer, todo
        self._made = Report()
        self._lock = threading.Lock()
        self._over = False
        self._cut: BaseException | None = None

    def hand(self) -> None:
        """Work as one of the hands, in this thread."""
        try:
            while (record := self._next()) is not None:
                how, error = "", None
                try:
                    how = one(self._recoverer.job(record))
                except Exception as failure:
                    error = failure
                self._note(record, how, error)
                del error
        except BaseException as cut:
            self.end(cut)

    async def ahand(self) -> None:
        """Work as one of the hands, in this task."""
        try:
            while (record := self._next()) is not None:
                how, error = "", None
                try:
                    how = await aone(self._recoverer.job(record))
                except Exception as failure:
                    error = failure
                self._note(record, how, error)
                del error
        except BaseException as cut:
            self.end(cut)

    def end(self, cut: BaseException) -> None:
        """Begin no other saga."""
        self._over = True
        self._cut = self._cut or cut

    def report(self) -> Report:
        """What came of it; or what ended it, raised. Once only, or it would be a reference cycle."""
        cut, self._cut = self._cut, None
        if cut is None:
            return self._made
        try:
            raise cut
        finally:
            del cut

    def _next(self) -> SagaRecord | None:
        with self._lock:
            return None if self._over else next(self._todo, None)

    def _note(self, record: SagaRecord, how: str, error: Exception | None) -> None:
        with self._lock:
            self._recoverer.note(self._made, record, how, error)


def _beside(shift: _Shift, hands: int) -> None:
    """Let so many threads work, and wait for them. A second interrupt waits for nobody any more."""
    if _loop_runs():
        # It stands still meanwhile, and what is async is refused under it: one at a time, as for a single saga.
        shift.hand()
        return
    ended = threading.Semaphore(0)
    jobs: list[_threads.Job] = []
    try:
        for _ in range(hands):
            job = _threads.Job(shift.hand, (), {}, copy_context(), lambda _: ended.release())
            try:
                _threads.run(job)
            except RuntimeError:
                # There are no more threads: those that there are do it, or this one.
                break
            jobs.append(job)
        if not jobs:
            shift.hand()
        _awaited(jobs, ended)
    except BaseException as cut:
        shift.end(cut)
        _awaited(jobs, ended)


def _awaited(jobs: list[_threads.Job], ended: threading.Semaphore) -> None:
    # By what the jobs say: an interrupt may come when a count is taken, and not yet seen here.
    while not all(job.over for job in jobs):
        # Not for ever: a signal that comes just before the wait does not end it, and is heard after it.
        ended.acquire(timeout=0.2)


async def _abeside(shift: _Shift, hands: int) -> None:
    """Let so many tasks work, and wait for them. A cancel goes to all of them."""
    from resilient._aio import together

    try:
        await together([shift.ahand] * hands)
    except BaseException as cut:
        shift.end(cut)


def _loop_runs() -> bool:
    """Whether an event loop of asyncio runs in this thread."""
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None
