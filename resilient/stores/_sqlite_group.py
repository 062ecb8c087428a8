"""Group commit: callers that come at the same time share one transaction, and with it one wait for the disk.

Each caller puts its job into a queue. The first leads: it runs all that is queued in one transaction, commits, hands
out the answers, and passes the lead to the first who has come in the meantime. Threads lead in turn; for tasks one
daemon thread does, so that no event loop ever waits for the disk. A job that fails fails alone. A caller alone pays two
uncontended locks. Safe from any thread and loop, and against interrupts.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from resilient.stores._sqlite_file import copy, wrapped

if TYPE_CHECKING:
    import sqlite3

    from resilient.stores._ops import AnyOp
    from resilient.stores._sqlite_file import File

__all__ = ["Group", "Job", "TaskJob"]

# Why an interrupt (a signal handler that raises, an asynchronous exception) loses nothing: what a leader has done is
# written down by statements without a call (`_stage`, `done`), between which none can come; `_leave` reads it.
_IDLE, _BEGUN, _COMMITTING, _FAILED = range(4)


class Job:
    """An operation of a thread. It is rung when it is done, or to lead."""

    __slots__ = ("answer", "bell", "done", "error", "op")

    def __init__(self, op: AnyOp | None) -> None:
        self.op: Any = op  # None: close
        self.answer: Any = ...
        self.error: Exception | None = None
        self.done = False
        self.bell = threading.Lock()
        self.bell.acquire()

    def outcome(self) -> Any:
        """The answer, or the error raised."""
        if self.error is not None:
            raise self.error
        return self.answer


class TaskJob(Job):
    """An operation of a task. `send` runs a function in the task's loop, from any thread; `wake` resumes the task."""

    __slots__ = ("send", "wake")

    def __init__(self, op: AnyOp, send: Callable[..., object], wake: Callable[[], object]) -> None:
        self.op = op
        self.answer = ...
        self.error = None
        self.done = False
        self.send = send
        self.wake = wake


_TASKS: Final = Job.__new__(Job)  # leads: the thread that works for tasks


class Group:
    """The queue of one file, and who leads."""

    def __init__(self, file: File, ended: Callable[[Sequence[Job]], None]) -> None:
        self._file = file
        self._ended = ended  # told of committed jobs, before they are handed out
        self._mutex = threading.Lock()
        self._queue: deque[Job] = deque()
        self._leader: Job | None = None
        self._batch: Sequence[Job] = ()
        self._current: Sequence[Job] = ()
        self._stage = _IDLE
        self._server: _Server | None = None

    def run(self, job: Job) -> Any:
        """Run a job of this thread, alone or with those of others, and answer."""
        try:
            with self._mutex:
                self._queue.append(job)
                if self._leader is None:
                    self._leader = job
            if self._leader is not job:
                job.bell.acquire()
            if self._leader is job:
                self._lead()
        except BaseException:
            self._leave(job)
            raise
        return job.outcome()

    def post(self, job: TaskJob) -> None:
        """Queue a job of a task, and return at once. Cancelled or not, it runs to its end."""
        try:
            with self._mutex:
                self._queue.append(job)
                if self._leader is None:
                    self._leader = _TASKS
        finally:
            if self._leader is _TASKS:
                self._rouse()

    def close(self) -> None:
        """End the thread, and close the file when the batch that runs has ended. The next job opens all anew."""
        self.run(Job(None))

    # -- leading -----------------------------------------------------------------------------------------------------

    def _lead(self) -> None:
        with self._mutex:
            self._batch = list(self._queue)
            self._queue.clear()
        self._work(self._batch)
        self._pass_on()

    def _pass_on(self) -> None:
        with self._mutex:
            self._batch = ()
            head = self._queue[0] if self._queue else None
            self._leader = _TASKS if isinstance(head, TaskJob) else head
        if head is not None:
            self._call(head)

    def _call(self, head: Job) -> None:
        if isinstance(head, TaskJob):
            self._rouse()
        else:
            _ring(head.bell)

    def _work(self, batch: Sequence[Job]) -> None:
        closing = [job for job in batch if job.op is None]
        if closing:
            batch = [job for job in batch if job.op is not None]
        if batch:
            try:
                writer = self._file.ready()
            except Exception as error:
                for job in batch:
                    job.error = copy(error)
                self._hand_out(batch)
            else:
                if len(batch) > 1 or isinstance(batch[0], TaskJob):
                    batch = self._peek(writer, batch)
                if batch:
                    self._commit(writer, batch)
        if closing:
            self._file.close()
            server, self._server = self._server, None
            if server is not None:
                server.end()
            self._hand_out(closing)

    def _peek(self, writer: sqlite3.Connection, batch: Sequence[Job]) -> Sequence[Job]:
        """Answer what need not be written, without the write lock: threads have looked already, tasks have not."""
        execute, peek = writer.execute, self._file.sql.peek
        rest: list[Job] = []
        seen: list[Job] = []
        for job in batch:
            if isinstance(job, TaskJob):
                try:
                    job.answer = peek(execute, job.op, self._file.at())
                except Exception as error:
                    job.error = wrapped(error, self._file.path)
                if job.error is not None or job.answer is not ...:
                    seen.append(job)
                    continue
            rest.append(job)
        self._hand_out(seen)
        return rest

    def _commit(self, writer: sqlite3.Connection, jobs: Sequence[Job]) -> None:
        execute, answer, path = writer.execute, self._file.sql.answer, self._file.path
        failure: Exception
        now = None
        self._current = jobs
        try:
            self._stage = _BEGUN
            execute("BEGIN IMMEDIATE")
            now = self._file.at()
            for job in jobs:
                try:
                    job.answer = answer(execute, job.op, now)
                except Exception as error:
                    # It has written nothing: the statement that writes is the last of a job.
                    if not writer.in_transaction:
                        raise
                    job.error = wrapped(error, path)
            self._stage = _COMMITTING
            execute("COMMIT")
        except Exception as error:
            committing, self._stage = self._stage == _COMMITTING, _FAILED
            failure = error
        else:
            self._ended(jobs)
            self._hand_out(jobs)
            return
        maybe = False
        if writer.in_transaction:
            self._file.roll_back()
        elif committing:
            # SQLite has rolled back; but after an error of the disk, nobody knows what is on it.
            maybe = getattr(failure, "sqlite_errorname", "") != "SQLITE_FULL"
        if len(jobs) > 1 and now is not None and not maybe:
            for job in jobs:  # one of them may be at fault: each for itself
                job.answer, job.error = ..., None
                self._commit(self._file.ready(), [job])
            return
        for job in jobs:
            job.answer, job.error = ..., wrapped(failure, path, maybe_written=maybe)
        self._hand_out(jobs)

    def _hand_out(self, jobs: Sequence[Job]) -> None:
        loops: dict[Any, list[TaskJob]] = {}
        for job in jobs:
            job.done = True
            if isinstance(job, TaskJob):
                loops.setdefault(job.send, []).append(job)
            else:
                _ring(job.bell)
        for send, tasks in loops.items():
            try:
                send(_wake, tasks)
            except RuntimeError:
                pass  # The loop is closed: nobody waits any more.
        self._stage = _IDLE
        self._current = ()

    # -- interrupts --------------------------------------------------------------------------------------------------

    def _leave(self, job: Job) -> None:
        """A leader, or one who waits, was interrupted. What it wanted is dropped unless begun; the rest goes on."""
        with self._mutex:
            if self._leader is not job:
                if job in self._queue:
                    self._queue.remove(job)
                return
        writer = self._file.writer
        if writer is not None and writer.in_transaction:
            self._file.roll_back()
        elif self._stage == _COMMITTING:
            self._hand_out(self._current)
        self._stage, self._current = _IDLE, ()
        with self._mutex:
            for other in reversed(self._batch):
                if not other.done and other is not job:
                    other.answer, other.error = ..., None
                    self._queue.appendleft(other)
            self._batch = ()
            if job in self._queue:
                self._queue.remove(job)
        self._pass_on()

    # -- the thread that works for tasks -----------------------------------------------------------------------------

    def _rouse(self) -> None:
        server = self._server
        if server is None:
            with self._mutex:
                server = self._server
                if server is None:
                    server = self._server = _Server(self)
        server.rouse()


class _Server:
    """The thread that leads for tasks."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._ended = False
        self._bell = threading.Lock()
        self._bell.acquire()
        self._thread = threading.Thread(target=self._serve, name="resilient-sqlite", daemon=True)
        self._thread.start()

    def rouse(self) -> None:
        """Have the thread look whether it leads."""
        _ring(self._bell)

    def end(self) -> None:
        """End the thread; called by whoever leads."""
        self._ended = True
        _ring(self._bell)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        group = self._group
        while not self._ended:
            self._bell.acquire()
            while group._leader is _TASKS:
                try:
                    group._lead()
                except BaseException:  # a fault in here: whoever waits must not wait for ever
                    group._leave(_TASKS)
                    raise


def _ring(bell: threading.Lock) -> None:
    try:
        bell.release()
    except RuntimeError:
        pass  # It has been rung.


def _wake(jobs: Sequence[TaskJob]) -> None:
    for job in jobs:
        job.wake()
