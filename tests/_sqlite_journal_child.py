"""Programs that the tests of SQLite journals run as processes of their own: `python -m tests._sqlite_journal_child`."""

from __future__ import annotations

import sys
import threading

from resilient.stores._ops import Append, Begin
from resilient.stores.sqlite import SQLiteStore


def append(path: str, fence: str, name: str) -> None:
    """Append entries 1 to 200 to the journal of key k; print how many were answered with True."""
    store = SQLiteStore(path, durability="normal")
    added = sum(
        store.execute(Append("k", "a", int(fence), at, f"{name} {at}".encode(), 1000.0)) for at in range(1, 201)
    )
    print(added)
    store.close()


def busy(path: str) -> None:
    """Write journals from four threads until killed; print each entry only when it is answered."""
    store = SQLiteStore(path)
    out = threading.Lock()

    def say(key: str, at: int) -> None:
        with out:
            print(key, at, flush=True)

    def work(thread: int) -> None:
        number = 0
        while True:
            number += 1
            key = f"{thread}.{number}"
            fence = store.execute(Begin(key, "a", 1000.0, b"0", "label 0")).fence
            say(key, 0)
            for at in range(1, 4):
                assert store.execute(Append(key, "a", fence, at, b"%d" % at, 1000.0, f"label {at}"))
                say(key, at)

    for thread in range(4):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
