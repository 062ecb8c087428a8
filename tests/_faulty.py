"""A peer that misbehaves on command: a TCP proxy on loopback, between a client under test and a real server.

Data is looked at as it arrives, in chunks: one request or reply of a client that waits for each answer, if it is small.
A fault is armed for the next chunks that it is meant for, and everything else passes. One thread, no timing: what a
fault does is done before the client can notice anything. Safe from any thread.

    with FaultProxy(("127.0.0.1", 6379)) as proxy:
        client = redis.Redis(port=proxy.port)
        proxy.arm("cut reply", lambda chunk: b"EVALSHA" in chunk)

Which fault does what, to a request that `when` is true of (faults of replies go by the request too):

- `cut request`: the server never sees it; both connections are closed.
- `cut reply`: the server carries it out, and answers; the answer is thrown away, both connections are closed.
- `cut after`: it is answered as ever; then both connections are closed.
- `hold request`: it waits in the proxy until `release()`, which lets it go to the server.
- `hold reply`: the server carries it out; the answer waits in the proxy until `release()`.
- `swallow`: the server never sees it, nothing ever comes back, and the connection stays open.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from typing import Literal, TypeAlias

__all__ = ["Fault", "FaultProxy"]

Fault: TypeAlias = Literal["cut request", "cut reply", "cut after", "hold request", "hold reply", "swallow"]


def _always(chunk: bytes) -> bool:
    return True


class _Armed:
    def __init__(self, fault: Fault, when: Callable[[bytes], bool], times: int) -> None:
        self.fault, self.when, self.times = fault, when, times
        self.met = threading.Event()


class _Pair:
    """A client's connection and ours to the server; `reply` is the fault that the next reply meets."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.reply: _Armed | None = None
        self.held: list[tuple[socket.socket, bytes]] = []
        self.deaf = False


class FaultProxy:
    """Forward from `port` of 127.0.0.1 to `target`: a (host, port), or the path of a unix socket."""

    def __init__(self, target: tuple[str, int] | str) -> None:
        self.target = target
        self.seen: list[bytes] = []
        """Each chunk that a client sent, in order."""
        self._lock = threading.RLock()
        self._armed: list[_Armed] = []
        self._pairs: dict[socket.socket, _Pair] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._wake_read, self._wake_write = socket.socketpair()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what tests call ---------------------------------------------------------------------------------------------

    def arm(self, fault: Fault, when: Callable[[bytes], bool] = _always, times: int = 1) -> threading.Event:
        """Let the next `times` requests that `when` is true of meet `fault`. The event is set when the first has."""
        armed = _Armed(fault, when, times)
        with self._lock:
            self._armed.append(armed)
        return armed.met

    def disarm(self) -> None:
        """Forget every fault that nothing has met yet."""
        with self._lock:
            self._armed.clear()

    def release(self) -> None:
        """Let everything go that is held."""
        with self._lock:
            for pair in set(self._pairs.values()):
                held, pair.held = pair.held, []
                for to, chunk in held:
                    self._send(pair, to, chunk)

    def drop(self) -> None:
        """Close every connection there is; new ones are accepted."""
        with self._lock:
            for pair in set(self._pairs.values()):
                self._cut(pair)

    def refuse(self) -> None:
        """Close every connection, and refuse new ones, until `accept()`."""
        with self._lock:
            self._selector.unregister(self._listener)
            self._listener.close()
            self.drop()
        self._nudge()

    def accept(self) -> None:
        """After `refuse`: listen again, on the same port."""
        with self._lock:
            self._listener = self._listen(self.port)
        self._nudge()

    @property
    def connections(self) -> int:
        """How many connections there are now."""
        with self._lock:
            return len(self._pairs) // 2

    def close(self) -> None:
        """Close everything, and end the thread."""
        self._closing = True
        self._nudge()
        self._thread.join()
        self.drop()
        for sock in (self._listener, self._wake_read, self._wake_write):
            sock.close()
        self._selector.close()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port))
        self._selector.register(listener, selectors.EVENT_READ)
        return listener

    def _nudge(self) -> None:
        self._wake_write.send(b"!")

    def _run(self) -> None:
        while not self._closing:
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._wake_read:
                        sock.recv(4096)
                    elif sock is self._listener:
                        self._connect()
                    elif sock in self._pairs:
                        self._data(self._pairs[sock], sock)

    def _connect(self) -> None:
        client, _ = self._listener.accept()
        try:
            if isinstance(self.target, str):
                server = socket.socket(socket.AF_UNIX)
                server.connect(self.target)
            else:
                server = socket.create_connection(self.target)
        except OSError:
            client.close()
            return
        pair = _Pair(client, server)
        for sock in (client, server):
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs[sock] = pair
            self._selector.register(sock, selectors.EVENT_READ)

    def _data(self, pair: _Pair, sock: socket.socket) -> None:
        try:
            chunk = sock.recv(1 << 20)
        except OSError:
            chunk = b""
        if not chunk:
            self._cut(pair)
        elif sock is pair.client:
            self._request(pair, chunk)
        else:
            self._reply(pair, chunk)

    def _request(self, pair: _Pair, chunk: bytes) -> None:
        self.seen.append(chunk)
        if pair.deaf:
            return
        armed = next((each for each in self._armed if each.when(chunk)), None)
        if armed is None:
            self._send(pair, pair.server, chunk)
            return
        armed.times -= 1
        if not armed.times:
            self._armed.remove(armed)
        if armed.fault in ("cut request", "swallow", "hold request"):
            armed.met.set()
        if armed.fault == "cut request":
            self._cut(pair)
        elif armed.fault == "swallow":
            pair.deaf = True
        elif armed.fault == "hold request":
            pair.held.append((pair.server, chunk))
        else:
            pair.reply = armed  # met when the reply is there
            self._send(pair, pair.server, chunk)

    def _reply(self, pair: _Pair, chunk: bytes) -> None:
        armed, pair.reply = pair.reply, None
        if armed is None:
            self._send(pair, pair.client, chunk)
            return
        armed.met.set()
        if armed.fault == "hold reply":
            pair.held.append((pair.client, chunk))
        else:
            if armed.fault == "cut after":
                self._send(pair, pair.client, chunk)
            self._cut(pair)

    def _send(self, pair: _Pair, to: socket.socket, chunk: bytes) -> None:
        try:
            to.sendall(chunk)
        except OSError:
            self._cut(pair)

    def _cut(self, pair: _Pair) -> None:
        for sock in (pair.client, pair.server):
            if self._pairs.pop(sock, None) is not None:
                self._selector.unregister(sock)
                sock.close()
