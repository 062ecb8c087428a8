"""Programs that the tests of the SQLite store run as processes of their own: `python -m tests._sqlite_child NAME …`."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
import warnings
from typing import Any

from resilient.stores import Acquired, Claim, Finish, Read, StoreError, _sqlite_file, _sqlite_group
from resilient.stores._sqlite_sql import MIGRATIONS
from resilient.stores.sqlite import SQLiteStore


def gate() -> None:
    """Say that this process is ready, and wait until all are."""
    print("ready", flush=True)
    sys.stdin.readline()


def race(path: str, name: str, keys: str) -> None:
    """Claim each key; print how many were had."""
    store = SQLiteStore(path, durability="normal")
    gate()
    won = sum(isinstance(store.execute(Claim(str(key), name, 1000.0)), Acquired) for key in range(int(keys)))
    print(won)
    store.close()


def upgrade(path: str) -> None:
    """Open with a second migration that must run once."""
    second = (
        "ALTER TABLE {p}records ADD COLUMN more TEXT",
        "CREATE TABLE {p}more (a)",
        "INSERT INTO {p}more VALUES (1)",
    )
    setattr(_sqlite_file, "MIGRATIONS", (*MIGRATIONS, second))  # noqa: B010
    store = SQLiteStore(path)
    gate()
    print(type(store.execute(Claim("new", str(os.getpid()), 1000.0))).__name__)
    store.close()


def busy(path: str, name: str) -> None:
    """Claim and finish from eight threads until killed; print each key only when its result is answered."""
    store = SQLiteStore(path)
    out = threading.Lock()

    def work(thread: int) -> None:
        number = 0
        while True:
            key = f"{name} {thread} {number}"
            fence = store.execute(Claim(key, name, 1000.0)).fence
            assert store.execute(Finish(key, name, fence, key.encode(), 1000.0))
            with out:
                print(key, flush=True)
            number += 1

    for thread in range(8):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    threading.Event().wait()


def _forked(body: Any) -> None:
    """Run `body` in a fork, and say how that went."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads is what is tested here
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def fork(path: str) -> None:
    """Fork with a store that is in use by threads and tasks, and use it on both sides, again and again."""
    store = SQLiteStore(path, durability="normal")
    unused = SQLiteStore(path, prefix="unused_")
    stop = threading.Event()
    numbers = itertools.count(1)

    async def task() -> None:
        await store.aexecute(Claim(f"task {os.getpid()}", "a", 1000.0))

    def work() -> None:
        while not stop.is_set():
            number = next(numbers)
            store.execute(Claim(f"parent {number}", "p", 1000.0))
            store.execute(Read(f"parent {number}"))

    def child() -> None:
        assert store._file.writer is None
        assert not store._file._readers
        assert isinstance(store.execute(Claim(f"child {os.getpid()}", "c", 1000.0)), Acquired)
        asyncio.run(task())
        store.close()

    asyncio.run(task())
    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        _forked(child)
    stop.set()
    for thread in threads:
        thread.join()
    store.execute(Claim("last", "p", 1000.0))
    print(sum(1 for number in range(1, next(numbers)) if store.execute(Read(f"parent {number}")) is None))
    store.close()
    unused.close()


def fork_stuck(path: str) -> None:
    """Fork while another thread is in the middle of a transaction and does not end it: the child is on its own."""
    _sqlite_group._PATIENCE = 0.01
    store = SQLiteStore(path, busy_timeout=5.0)
    store.prepare()
    inside, go = threading.Event(), threading.Event()
    write = store._file.ready()

    def slow(sql: str, parameters: Any = ()) -> Any:
        if sql == "COMMIT":
            inside.set()
            go.wait()
        return write(sql, parameters)

    store._file.write = slow
    thread = threading.Thread(target=store.execute, args=(Claim("slow", "p", 1000.0),), daemon=True)
    thread.start()
    inside.wait()

    def child() -> None:
        assert store._file.writer is None
        assert store._group._inherited

    _forked(child)
    go.set()
    thread.join()
    assert store.execute(Read("slow")) is not None
    store.close()


def dropped(path: str) -> None:
    """Drop stores without closing them, and end with one that is open."""
    for _ in range(3):
        store = SQLiteStore(path)
        store.execute(Claim("k", "a", 10.0))
        asyncio.run(_claim(store))
        del store
    assert threading.active_count() == 1, threading.enumerate()
    left = SQLiteStore(path)
    asyncio.run(_claim(left))
    try:
        left.execute(Finish("\ud800", "a", 1, b"", 1.0))
    except StoreError:
        print("fine")


async def _claim(store: SQLiteStore) -> None:
    await store.aexecute(Claim("k", "a", 10.0))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
