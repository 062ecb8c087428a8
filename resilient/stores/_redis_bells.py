"""Wakes those who watch keys in Redis: one thread listens to one channel.

Promises: who watches is rung when a record that somebody waits for ends; and everybody is, whenever the connection was
made anew, since rings may have been lost meanwhile. Does not: raise into anybody, or run while nobody watches. One
connection and one daemon thread while needed. Safe from any thread and loop; a forked child starts its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from resilient.stores._watch import Bells, Watch

__all__ = ["Listener"]

_LOOK = 0.2
"""Seconds between two looks at whether anybody watches still."""
_IDLE = 50
"""How often nobody may have watched before the thread ends."""


class Listener:
    """`Bells` that the server rings. `client` gives a client for threads, whose `pubsub` is used."""

    def __init__(self, client: Callable[[], Any], channel: bytes, prefix: bytes) -> None:
        self._client, self._channel, self._prefix = client, channel, prefix
        self._begin()
        _listeners.add(self)

    def _begin(self) -> None:
        self._bells = Bells()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def watch(self, key: str, *, task: bool) -> Watch:
        """Watch `key` from now on."""
        with self._lock:
            watch = self._bells.watch(key, task=task)
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._stop,), name="resilient-redis-wake", daemon=True
                )
                self._thread.start()
        return watch

    def close(self) -> None:
        """End the thread, and wake everybody once more."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._bells.ring_all()

    def _run(self, stop: threading.Event) -> None:
        idle = failures = 0
        while not stop.is_set():
            try:
                with self._client().pubsub() as channel:
                    channel.subscribe(self._channel)
                    while not stop.is_set():
                        message = channel.get_message(timeout=_LOOK)
                        if message is not None:
                            failures = 0
                            self._ring(message)
                        idle = 0 if self._bells else idle + 1
                        if idle > _IDLE and self._may_end(stop):
                            return
            except Exception:
                failures += 1
                idle = 0 if self._bells else idle + 1
                if idle > _IDLE and self._may_end(stop):
                    return
                stop.wait(min(0.02 * 2 ** min(failures, 10), 1.0))

    def _may_end(self, stop: threading.Event) -> bool:
        with self._lock:
            if self._bells or stop is not self._stop:
                return False
            self._thread = None
            return True

    def _ring(self, message: Any) -> None:
        if message["type"] == "message":
            key = message["data"][len(self._prefix) :]
            with suppress(UnicodeDecodeError):  # anybody may publish anything
                self._bells.ring(key.decode("utf-8", "surrogatepass"))
        else:
            self._bells.ring_all()  # subscribed, perhaps not for the first time


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def _forked() -> None:
    for listener in list(_listeners):
        listener._begin()


os.register_at_fork(after_in_child=_forked)
