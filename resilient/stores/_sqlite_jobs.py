"""What waits in the queue of a SQLite store, and how it is woken.

A job is one operation of a thread or a task. A thread waits for a lock of its own, so that it alone wakes; the tasks of
a loop are woken all at once, by one call into that loop. Waking somebody twice does no harm, nor does it if his loop
is closed. Safe from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

__all__ = ["Helper", "Job", "TaskJob", "hand_out", "ring"]


class Job(Struct, eq=False):
    """An operation of a thread. It is rung when it is done, or to lead. `op` None: close the file.

    `look`: it may need no write, and nobody has looked yet.
    """

    op: Any
    look: bool = False
    answer: Any = ...
    error: Exception | None = None
    done: bool = False
    bell: Any = None
    """A lock; none while it waits for nothing."""

    def waits(self) -> threading.Lock:
        """What the thread is going to wait for. Called before anybody else knows of the job."""
        bell = self.bell = threading.Lock()
        bell.acquire()
        return bell

    def outcome(self) -> Any:
        """The answer, or the error raised."""
        if self.error is not None:
            raise self.error
        return self.answer


class TaskJob(Job, kw_only=True, eq=False):
    """An operation of a task. `send` runs a function in the task's loop, from any thread; `wake` resumes the task."""

    send: Callable[..., object]
    wake: Callable[[], object]


class Helper:
    """A daemon thread that does `work` whenever it is roused."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._ended = False
        self._bell = threading.Lock()
        self._bell.acquire()
        self.thread = threading.Thread(target=self._serve, name="resilient-sqlite", daemon=True)
        self.thread.start()

    def rouse(self) -> None:
        """Have the thread look for work."""
        ring(self._bell)

    def end(self) -> None:
        """End the thread when it has no more work."""
        self._ended = True
        ring(self._bell)
        self.thread.join()

    def _serve(self) -> None:
        while not self._ended:
            self._bell.acquire()
            self._work()


def ring(bell: threading.Lock | None) -> None:
    """Wake whoever waits for `bell`. Once too often does no harm."""
    try:
        if bell is not None:
            bell.release()
    except RuntimeError:
        pass  # It has been rung.


def hand_out(jobs: Sequence[Job]) -> None:
    """Wake those who wait for `jobs`: each thread, and each loop once."""
    loops: dict[Any, list[TaskJob]] = {}
    for job in jobs:
        job.done = True
        if job.bell is not None:
            ring(job.bell)
        elif isinstance(job, TaskJob):
            loops.setdefault(job.send, []).append(job)
    for send, tasks in loops.items():
        try:
            send(_wake, tasks)
        except RuntimeError:
            pass  # The loop is closed: nobody waits any more.


def _wake(jobs: Sequence[TaskJob]) -> None:
    for job in jobs:
        job.wake()
