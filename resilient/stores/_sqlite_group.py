"""Group commit: callers that come at the same time share one transaction, and with it one wait for the disk.

Each caller puts its job into a queue. The first leads: it runs all that is queued in one transaction, commits, hands
out the answers, and passes the lead to the first who has come in the meantime. Threads lead in turn; for tasks a daemon
thread does, so that no event loop ever waits for the disk. A job that fails fails alone. A caller alone pays two
uncontended locks, and needs no transaction where one statement does. Safe from any thread and loop, and against
interrupts.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from resilient.clock import SystemClock
from resilient.errors import StoreError
from resilient.stores._ops import Abandon, Acquired, Append, Begin, Claim, Finish, Release
from resilient.stores._sqlite_file import busy, copy, unsure, wrapped
from resilient.stores._sqlite_jobs import Helper, Job, TaskJob, hand_out, ring

if TYPE_CHECKING:
    from resilient.stores._ops import AnyOp
    from resilient.stores._sqlite_file import File
    from resilient.stores._sqlite_sql import Execute
    from resilient.stores._watch import Bells

__all__ = ["Group"]

# Why an interrupt (a signal handler that raises, an asynchronous exception) loses nothing: what a leader has done is
# written down by statements without a call (`stage`, `done`), between which none can come; `_leave` reads it.
_IDLE, _BEGUN, _COMMITTING, _FAILED, _ALONE = range(5)

_ENDS = frozenset((Finish, Release, Abandon))
_CLAIMS = frozenset((Claim, Begin))
_TWICE = frozenset((Begin, Append))
"""Operations that write twice, and may fail in between. A `StoreError` comes before."""

_LINGER = 0.005  # seconds that a thread waits at most for those who are expected

_PATIENCE = 5.0  # seconds that a fork waits for what is running
_clock = SystemClock()


_TASKS: Final = Job(None)  # leads: the thread that works for tasks
_groups: WeakSet[Group] = WeakSet()


class Group:
    """The queue of one file, and who leads. `bells` ring for jobs that are committed, before they are handed out."""

    def __init__(self, file: File, bells: Bells) -> None:
        self._file = file
        self._bells = bells
        self._frozen: Job | None = None
        self._inherited: list[object] = []
        self._begin()
        _groups.add(self)

    def _begin(self) -> None:
        self._mutex = threading.Lock()
        self._queue: deque[Job] = deque()
        self._looks: deque[TaskJob] = deque()
        self._leader: Job | None = None
        self._batch: Sequence[Job] = ()
        self._current: Sequence[Job] = ()
        self._expected = 0  # so many in the queue, and who gathers need not wait any more
        self._patience = 0.0005
        self._crowd = 0  # threads that were answered together
        self._fresh = False  # the last claim found no record: the next is tried at once, without a look
        self.stage = _IDLE  # anything else while somebody commits: who only looks does so beside it
        self._writer: Helper | None = None
        self._looker: Helper | None = None

    def run(self, job: Job) -> Any:
        """Run a job of this thread, alone or with those of others, and answer."""
        bell = None
        try:
            with self._mutex:
                if self._leader is None:
                    self._leader = job
                else:
                    bell = job.waits()
                    self._queue.append(job)
                    if len(self._queue) == self._expected:
                        ring(self._leader.bell)
            if bell is None and job.op is not None:
                if self._crowd:
                    self._gather(job)
                else:
                    self._alone(job)
                with self._mutex:
                    if not self._queue:
                        self._batch = ()
                        self._leader = None
                if self._leader is job:
                    self._pass_on()
            else:
                if bell is not None and self._leader is not job:
                    bell.acquire()
                if self._leader is job:
                    if job.op is None:
                        self._shut(job)
                    else:
                        self._lead()
        except BaseException:
            self._leave(job)
            raise
        if job.error is not None:
            raise job.error
        return job.answer

    def post(self, job: TaskJob) -> None:
        """Queue a job of a task, and return at once. Cancelled or not, it runs to its end."""
        if job.look and self.stage:
            self._looks.append(job)
            self._help(look=True)
            return
        try:
            with self._mutex:
                self._queue.append(job)
                if self._leader is None:
                    self._leader = _TASKS
        finally:
            if self._leader is _TASKS:
                self._help()

    def close(self) -> None:
        """End the threads, and close the file when the batch that runs has ended. The next job opens all anew."""
        self.run(Job(None))

    def drop(self) -> None:
        """Close, when the store is no longer used: from wherever its last reference was, the own threads included."""
        here = threading.current_thread()
        if any(helper is not None and helper.thread is here for helper in (self._writer, self._looker)):
            threading.Thread(target=self.close, name="resilient-sqlite", daemon=True).start()
        else:
            self.close()

    # -- leading -----------------------------------------------------------------------------------------------------

    def _alone(self, job: Job) -> None:
        """The job of a caller who finds nobody leading: one statement that commits by itself, if it can be one.

        Its clock is read before SQLite has the lock, which it does not wait for here. The owner and the fence decide,
        not the clock: who is stopped dead in between has only a lease, or a result's time, that began so much earlier.
        """
        file = self._file
        op: AnyOp = job.op
        kind = type(op)
        execute, make = file.write, file.sql.alone.get(kind)
        if execute is None:
            self._work((job,))
        elif make is not None:
            try:
                self.stage = _ALONE
                job.answer = execute(*make(op, file.at())).rowcount == 1
            except Exception as error:
                self.stage = _IDLE
                if busy(error):
                    self._work((job,))
                else:
                    job.error = wrapped(error, file.path, maybe_written=unsure(error))
            else:
                if job.answer and self._bells:
                    self._ended((job,))
                self.stage = _IDLE
                if not job.answer and kind is Finish:  # it may have been finished before
                    self._work((job,))
        elif kind is Append or (self._fresh and kind in _CLAIMS):
            self._transact(job, execute)
        else:
            self._work((job,))

    def _transact(self, job: Job, execute: Execute) -> None:
        """The same for an entry, and for a claim of what is probably a new key. The clock is read under the lock.

        A fence from before would not be larger than that of another who came and went in the meantime.
        """
        now = None
        try:
            self.stage = _BEGUN
            execute("BEGIN IMMEDIATE")
            now = self._file.at()
            answer = job.answer = self._file.sql.answer(execute, job.op, now)
            self.stage = _COMMITTING
            execute("COMMIT")
            self.stage = _IDLE
        except Exception as error:
            if now is None and busy(error):
                self.stage = _IDLE
                self._fresh = False
                self._work((job,))
            else:
                self._failed((job,), error, now)
        else:
            if answer is not True:  # what an entry is answered, and no claim
                self._fresh = type(answer) is Acquired

    def _gather(self, job: Job) -> None:
        """Lead as the first of threads that were answered together, and are likely to come back together.

        Without them the first would commit alone each time, and the disk would be waited for twice as often. Whoever
        completes the crowd rings; if nobody does, it was in vain for half the time that a commit takes, once.
        """
        bell = job.waits()
        self._expected = crowd = self._crowd - 1
        if len(self._queue) < crowd:
            bell.acquire(True, self._patience)
        self._expected = 0
        began = _clock.now()
        batch = self._take(job)
        if len(batch) > 1:
            self._work(batch)
            self._patience = min((_clock.now() - began) / 2, _LINGER)
        else:
            self._alone(job)

    def _take(self, *first: Job) -> Sequence[Job]:
        """What is to be done now: who leads, if he is not in the queue, and all who are."""
        queue = self._queue
        with self._mutex:
            # Listed first, then removed: an interrupt in between finds a job here, there, or in both.
            queued = list(takewhile(_runs, queue))
            batch = self._batch = [*first, *queued]
            for _ in queued:
                queue.popleft()
        self._crowd = sum(type(job) is Job for job in batch) if len(batch) > 1 else 0
        return batch

    def _lead(self) -> None:
        self._work(self._take())
        self._pass_on()

    def _shut(self, job: Job) -> None:
        with self._mutex:
            if job in self._queue:
                self._queue.remove(job)
            helpers = self._writer, self._looker
            self._writer = self._looker = None
        for helper in helpers:
            if helper is not None:
                helper.end()
        self._file.close()
        self._pass_on()

    def _pass_on(self) -> None:
        with self._mutex:
            self._batch = ()
            if not self._queue:
                self._leader = None
                return
            head = self._queue[0]
            self._leader = _TASKS if isinstance(head, TaskJob) else head
        self._call()

    def _call(self) -> None:
        """Let the leader know that it is. Once too often does no harm."""
        leader = self._leader
        if leader is _TASKS:
            self._help()
        elif leader is not None:
            ring(leader.bell)

    def _work(self, batch: Sequence[Job]) -> None:
        try:
            self._file.ready()
        except Exception as error:
            for job in batch:
                job.error = copy(error)
            hand_out(batch)
            return
        batch = self._look(self._file.look, batch, trust=True)
        if batch:
            self._commit(batch)

    def _look(self, peek: Callable[[AnyOp], Any], batch: Sequence[Job], *, trust: bool = False) -> Sequence[Job]:
        """Answer what need not be written, without the write lock. `trust`: what is probably new is not looked at."""
        trust = trust and self._fresh
        rest: list[Job] = []
        seen: list[Job] = []
        for job in batch:
            if job.look and not (trust and type(job.op) in _CLAIMS):
                job.look = False
                try:
                    job.answer = peek(job.op)
                except Exception as error:
                    job.error = error
                if job.error is not None or job.answer is not ...:
                    seen.append(job)
                    continue
                self._fresh = True
            rest.append(job)
        hand_out(seen)
        return rest

    def _commit(self, jobs: Sequence[Job]) -> None:
        file = self._file
        execute, answer, writer = file.ready(), file.sql.answer, file.writer
        assert writer is not None
        now = None
        self._current = jobs
        try:
            self.stage = _BEGUN
            try:
                execute("BEGIN IMMEDIATE")
            except Exception as error:
                if not busy(error):
                    raise
                # While another process holds the lock, who need not write goes first.
                jobs = self._current = self._look(file.look, jobs)
                if jobs:
                    file.begin()
                else:
                    self.stage = _IDLE
                    return
            now = file.at()
            for job in jobs:
                try:
                    job.answer = answer(execute, job.op, now)
                    if type(job.op) in _CLAIMS:
                        self._fresh = type(job.answer) is Acquired
                except Exception as error:
                    # It has written nothing: the statement that writes is the last of a job, or else all begin anew.
                    halfway = type(job.op) in _TWICE and not isinstance(error, StoreError)
                    if halfway or not writer.in_transaction:
                        raise
                    job.error = wrapped(error, file.path)
            self.stage = _COMMITTING
            execute("COMMIT")
        except Exception as error:
            self._failed(jobs, error, now)
        else:
            self._committed()

    def _failed(self, jobs: Sequence[Job], failure: Exception, now: float | None) -> None:
        file, writer = self._file, self._file.writer
        assert writer is not None
        committing, self.stage = self.stage == _COMMITTING, _FAILED
        # SQLite has rolled back already, or does now; but after an error of the disk nobody knows what is on it.
        maybe = committing and not writer.in_transaction and getattr(failure, "sqlite_errorname", "") != "SQLITE_FULL"
        file.roll_back()
        if len(jobs) > 1 and now is not None and not maybe:
            for job in jobs:  # one of them may be at fault: each for itself
                job.answer, job.error = ..., None
                self._commit([job])
            return
        for job in jobs:
            job.answer, job.error = ..., wrapped(failure, file.path, maybe_written=maybe)
        self._settled(jobs)

    def _committed(self) -> None:
        jobs = self._current
        if self._bells:
            self._ended(jobs)
        self._settled(jobs)

    def _ended(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if type(job.op) in _ENDS and job.answer is True:
                self._bells.ring(job.op.key)

    def _settled(self, jobs: Sequence[Job]) -> None:
        hand_out(jobs)
        self.stage, self._current = _IDLE, ()

    def _leave(self, job: Job) -> None:
        """A leader, or one who waits, was interrupted. What it wanted is dropped unless begun; the rest goes on."""
        with self._mutex:
            if self._leader is not job:
                if job in self._queue:
                    self._queue.remove(job)
                job = _TASKS
        if job is _TASKS:
            self._call()  # it may have been about to
            return
        self._expected = 0
        writer = self._file.writer
        if self.stage == _ALONE:
            job.answer = True  # perhaps; a bell too often does no harm
            self._ended((job,))
        if self.stage == _COMMITTING and writer is not None and not writer.in_transaction:
            self._committed()
        else:
            self._file.roll_back()
        self.stage, self._current = _IDLE, ()
        hand_out([other for other in self._batch if other.done])  # some may not have been woken
        with self._mutex:
            for other in reversed(self._batch):
                if not other.done and other not in self._queue:
                    other.answer, other.error = ..., None
                    self._queue.appendleft(other)
            if job in self._queue:
                self._queue.remove(job)
        self._pass_on()

    # -- the threads that work for tasks -----------------------------------------------------------------------------

    def _help(self, *, look: bool = False) -> None:
        helper = self._looker if look else self._writer
        if helper is None:
            with self._mutex:
                helper = self._looker if look else self._writer
                if helper is None and look:
                    helper = self._looker = Helper(self._look_on)
                elif helper is None:
                    helper = self._writer = Helper(self._lead_on)
        helper.rouse()

    def _lead_on(self) -> None:
        while self._leader is _TASKS:
            try:
                self._lead()
            except Exception as error:  # a fault in here: whoever waits must not wait for ever
                failed = [job for job in self._batch if not job.done]
                for job in failed:
                    job.error = error
                hand_out(failed)
                self._file.roll_back()
                self._pass_on()

    def _look_on(self) -> None:
        looks = self._looks
        while looks:
            batch: list[TaskJob] = []
            try:
                while True:
                    batch.append(looks.popleft())
            except IndexError:
                pass
            rest = self._look(self._file.peek, batch)
            if rest:
                with self._mutex:
                    self._queue.extend(rest)
                    if self._leader is None:
                        self._leader = _TASKS
                self._call()

    # -- forks -------------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Before a fork: take the lead and close everything, since what SQLite knows of locks must not be inherited.

        Who does not end within some seconds is left alone; then the child must not even close what it inherits.
        """
        until = _clock.now() + _PATIENCE
        job = Job(None)
        bell = job.waits()
        with self._mutex:
            self._queue.append(job)
            if self._leader is None:
                self._leader = job
        try:
            if self._leader is not job:
                _clock.wait(lambda seconds: bell.acquire(True, seconds), _PATIENCE)
            with self._mutex:
                self._queue.remove(job)
            if self._leader is job:
                self._frozen = job
                self._file.freeze(until)
        except BaseException:
            self._leave(job)
            raise

    def thaw(self) -> None:
        """After the fork, in the parent."""
        if self._frozen is not None:
            self._frozen = None
            self._file.thaw()
            self._pass_on()

    def renew(self) -> None:
        """After the fork, in the child: what is open is the parent's, and nobody waits here."""
        self._inherited.append(self._file.forget())
        self._frozen = None
        self._begin()


def _runs(job: Job) -> bool:
    return job.op is not None


def _freeze() -> None:
    for group in list(_groups):
        group.freeze()


def _thaw() -> None:
    for group in list(_groups):
        group.thaw()


def _renew() -> None:
    for group in list(_groups):
        group.renew()


if hasattr(os, "register_at_fork"):  # pragma: no branch (not on Windows)
    os.register_at_fork(before=_freeze, after_in_parent=_thaw, after_in_child=_renew)
