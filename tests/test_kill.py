"""kill -9 of real processes at random moments: never two effects, never a lost result, and every key ends.

`python -m tests.soak` does the same for a thousand kills.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from resilient import Idempotent, InDoubt, claim
from tests._proofs import opened, record, url_of

KILLS = 18
SEED = 20_251


@pytest.mark.parametrize("backend", ["sqlite full", "redis", "postgres"])
def test_kill_9(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = url_of(backend, tmp_path, request.getfixturevalue)
    command = [sys.executable, "-m", "tests._kill_child", url, "--kills", str(KILLS), "--seed", str(SEED)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(ran.stdout)
    assert not report["faults"], "\n".join([f"seed {SEED}", *report["faults"]])
    assert report["kills"] == KILLS
    assert report["effects"] == report["keys"] > 0
    assert report["answers"] >= report["keys"]


# -- SIGSTOP -----------------------------------------------------------------------------------------------------------


@contextmanager
def stopped(url: str, in_doubt: str, how: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """A process that is stopped in the middle of its call, until what this gives is called: how that call ended."""
    command = [sys.executable, "-m", "tests._stop_child", url, in_doubt, how]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "began\n"
            os.waitpid(child.pid, os.WUNTRACED)  # it has stopped itself

            def go_on() -> dict[str, Any]:
                assert child.stdin is not None
                assert child.stdout is not None
                child.send_signal(signal.SIGCONT)
                child.stdin.write("go on\n")
                child.stdin.flush()
                ended: dict[str, Any] = json.loads(child.stdout.readline())
                return ended

            yield go_on
        finally:
            child.kill()


@pytest.mark.parametrize("how", ["thread", "task"])
@pytest.mark.parametrize("backend", ["sqlite full", "redis", "postgres"])
class TestALeaseThatEndsWhileItsOwnerIsStopped:
    def test_is_in_doubt_and_the_late_owner_settles_it(
        self, backend: str, how: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        url = url_of(backend, tmp_path, request.getfixturevalue)
        store = opened(url)
        ran: list[str] = []

        @Idempotent(store, key="order", name="charge")
        def charge(order: str) -> str:
            ran.append(order)
            return "by the second"

        with stopped(url, "raise", how) as go_on:
            assert record(store, "o-1", running=False).state == "in doubt"
            with pytest.raises(InDoubt):
                charge("o-1")
            assert go_on() == {"value": "by the first", "lost": 0, "events": 0}
        assert charge("o-1") == "by the first"
        assert not ran
        store.close()

    def test_is_taken_over_and_the_late_owner_is_refused(
        self, backend: str, how: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        url = url_of(backend, tmp_path, request.getfixturevalue)
        store = opened(url)
        ran: list[int] = []

        @Idempotent(store, key="order", in_doubt="rerun", name="charge")
        def charge(order: str) -> str:
            ran.append(claim().attempt)
            return "by the second"

        with stopped(url, "rerun", how) as go_on:
            fence = record(store, "o-1", running=False).fence
            assert charge("o-1") == "by the second"
            late = {"error": "InDoubt", "attempt": 1, "result": "by the first", "lost": 1, "events": 1}
            assert go_on() == late
        assert charge("o-1") == "by the second"
        assert ran == [2]
        assert record(store, "o-1").fence > fence
        store.close()
