"""Threads for calls that somebody waits for only so long: daemons, made when none is idle, used again afterwards.

Nothing queues: a job starts at once, so that waiting for a thread never counts as running. The number of threads is
bounded by those who wait plus the strays (jobs that nobody waits for any more), which each policy caps. A stray never
holds up the end of the process. Idle threads end after a minute. Safe from any thread, and after `os.fork`.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any

__all__ = ["Job", "run"]

_KEEP = 60.0

_idle: list[_Worker] = []
_numbers = itertools.count(1)


class Job:
    """One call in another thread: `over` once it has ended, then `value` or `error`; `ended(job)` is told."""

    __slots__ = ("_args", "_call", "_context", "_ended", "_kwargs", "error", "over", "stray", "value")

    def __init__(
        self, call: Callable[..., Any], args: Any, kwargs: Any, context: Context, ended: Callable[[Job], object]
    ) -> None:
        self._call, self._args, self._kwargs = call, args, kwargs
        self._context, self._ended = context, ended
        self.value: Any = None
        self.error: BaseException | None = None
        self.over = False
        self.stray = False

    def result(self) -> Any:
        """Its value, or its error raised. Once only: a job that kept its error would be a reference cycle."""
        error, self.error = self.error, None
        if error is None:
            return self.value
        try:
            raise error
        finally:
            del error

    def _run(self) -> None:
        try:
            self.value = self._context.run(self._call, *self._args, **self._kwargs)
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: they belong to the caller, not to this thread.
            self.error = error
        del self._call, self._args, self._kwargs, self._context

    def _tell(self) -> None:
        self.over = True
        ended = self._ended
        del self._ended
        ended(self)


class _Worker(threading.Thread):
    def __init__(self, job: Job) -> None:
        super().__init__(name=f"resilient-{next(_numbers)}", daemon=True)
        self.job: Job | None = job
        self.wake = threading.Lock()
        self.wake.acquire()

    def run(self) -> None:
        while True:
            job, self.job = self.job, None
            assert job is not None
            job._run()
            # Idle before anybody hears of the result, or its receiver's next call would start another thread.
            _idle.append(self)
            job._tell()
            del job
            if not self.wake.acquire(timeout=_KEEP):
                try:
                    _idle.remove(self)
                except ValueError:
                    # Taken in the same moment: its job is on the way.
                    self.wake.acquire()
                else:
                    return


def run(job: Job) -> None:
    """Start `job` in an idle thread, or in a new one."""
    try:
        worker = _idle.pop()
    except IndexError:
        _Worker(job).start()
    else:
        worker.job = job
        worker.wake.release()


# Threads do not live on in a forked child. (Where there is no fork, there is nothing to do.)
getattr(os, "register_at_fork", dict)(after_in_child=_idle.clear)
