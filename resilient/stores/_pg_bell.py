"""The ear of a PostgreSQL store: one thread that listens for the ends of records and rings those who wait for them.

Promises to come back after every loss of its connection, and to wake everybody then, since rings may have been lost;
never to raise into anybody; to end within moments of `stop`. Started by the first who watches. One connection and one
daemon thread a store and process. Safe from any thread.
"""

from __future__ import annotations

import select
import socket
import threading
import weakref
from typing import TYPE_CHECKING, Any

import psycopg

from resilient.stores._pg_sql import PAYLOAD
from resilient.stores._watch import Bells

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Ear"]

_FIRST, _LONGEST = 0.1, 5.0


class Ear:
    """`connect` makes a connection in autocommit (None: there is no way to); `channel` is where to listen."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]] | None, channel: str) -> None:
        self.bells = Bells()
        self._connect, self._channel = connect, channel
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop: socket.socket | None = None

    def start(self) -> None:
        """Listen from now on, if nobody does."""
        if self._thread is None and self._connect is not None:
            with self._lock:
                if self._thread is None:
                    self._stop, stopped = socket.socketpair()
                    # One that is forgotten ends as well, in the child of a fork without ending that of the parent.
                    weakref.finalize(self, self._stop.close)
                    self._thread = threading.Thread(
                        target=_listen,
                        args=(self.bells, self._connect, self._channel, stopped),
                        name=f"resilient-{self._channel}",
                        daemon=True,
                    )
                    self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for it."""
        with self._lock:
            thread, stop, self._thread, self._stop = self._thread, self._stop, None, None
        if thread is not None and stop is not None:
            stop.shutdown(socket.SHUT_RDWR)
            stop.close()
            thread.join(_LONGEST)


def _listen(bells: Bells, connect: Callable[[], psycopg.Connection[Any]], channel: str, stopped: socket.socket) -> None:
    delay = _FIRST
    with stopped:
        while True:
            try:
                with connect() as connection:
                    connection.execute(f"LISTEN {channel}".encode())
                    bells.ring_all()
                    delay = _FIRST
                    if _hear(bells, connection, stopped):
                        return
            except Exception:
                # No server, or no longer. Waiters ask by themselves meanwhile.
                pass
            if _ready([stopped.fileno()], delay):
                return
            delay = min(_LONGEST, 2 * delay)


def _hear(bells: Bells, connection: psycopg.Connection[Any], stopped: socket.socket) -> bool:
    """Ring, until told to stop (True), or until the connection fails."""
    pgconn, stop = connection.pgconn, stopped.fileno()
    while True:
        ready = _ready([pgconn.socket, stop], None)
        if stop in ready:
            return True
        pgconn.consume_input()
        while notify := pgconn.notifies():
            key = notify.extra.decode()
            if len(key) < PAYLOAD:
                bells.ring(key)
            else:
                bells.ring_all()


def _ready(files: list[int], seconds: float | None) -> set[int]:
    """Which of the files can be read, after at most `seconds`."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return {file for file, _ in poll.poll(None if seconds is None else seconds * 1000)}
