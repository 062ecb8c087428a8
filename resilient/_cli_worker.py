"""How the worker waits, and hears that it is to end: by SIGTERM or SIGINT, after the saga in hand.

The first signal only rings; the second does what it would do otherwise. Only the main thread hears signals.
"""

from __future__ import annotations

import select
import signal
import socket
import threading
from typing import Any

__all__ = ["Bell"]


class Bell:
    """Rings at a signal, also in the middle of a wait."""

    def __init__(self) -> None:
        self.signal = ""
        self._ears: tuple[socket.socket, socket.socket] = socket.socketpair()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Bell:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ring)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        for ear in self._ears:
            ear.close()

    def rung(self) -> bool:
        """Whether it has rung."""
        return bool(self.signal)

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until it rings. Whether it has rung."""
        # A wait longer than a day is as good as one of a day: there is a look in between.
        select.select([self._ears[0]], [], [], min(seconds, 86_400.0))
        return self.rung()

    def _ring(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number).name
        self._ears[1].send(b"!")
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
