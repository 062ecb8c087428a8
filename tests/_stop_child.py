"""A process that makes one idempotent call, and lets another one say when the function goes on.

    python -m tests._stop_child URL rerun|raise thread|task

Prints "began" from inside the function, waits for a line, and prints how the call ended as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from resilient import Env, Idempotent, InDoubt, stores
from resilient.events import LeaseLost
from resilient.policy import Policy
from resilient.testing import Recorder
from tests._proofs import close

LEASE = 0.3


def _work() -> str:
    print("began", flush=True)
    # By itself, at once: later it might be in the middle of a heartbeat, with the lock of a file in its hands.
    os.kill(os.getpid(), signal.SIGSTOP)
    sys.stdin.readline()
    return "by the first"


def main() -> None:
    url, in_doubt, how = sys.argv[1:]
    store = stores.open(url)
    policy = Idempotent(store, key="order", lease=LEASE, in_doubt=in_doubt, name="charge")  # type: ignore[arg-type]
    seen = Recorder()
    told: dict[str, Any] = {}

    def charge(order: str) -> str:
        return _work()

    async def acharge(order: str) -> str:
        return _work()

    guarded = _guarded(policy, charge if how == "thread" else acharge, seen)

    async def task() -> None:
        try:
            told["value"] = await guarded("o-1")
        except InDoubt as error:
            told.update(error="InDoubt", attempt=error.attempt, result=error.result)
        await close(store)

    if how == "task":
        asyncio.run(task())
    else:
        try:
            told["value"] = guarded("o-1")
        except InDoubt as error:
            told.update(error="InDoubt", attempt=error.attempt, result=error.result)
    store.close()
    told.update(lost=policy.lost, events=len(seen.of(LeaseLost)))
    print(json.dumps(told), flush=True)


def _guarded(policy: Policy, function: Any, seen: Recorder) -> Any:
    from resilient import Pipeline

    return Pipeline(policy, env=Env(sinks=[seen]))(function)


if __name__ == "__main__":
    main()
