"""kill -9 and SIGSTOP of real processes in the middle of sagas: complete or undone, backwards, and never forward again.

`python -m tests.soak` does the same for a thousand kills.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from resilient import sagas
from tests import _saga_stop_child as stop_child
from tests._proofs import opened, patience, url_of
from tests._saga_worlds import alone

KILLS = 17
SEED = 20_261
BACKENDS = ("sqlite full", "redis", "postgres")


@pytest.mark.parametrize("backend", BACKENDS)
def test_kill_9(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = url_of(backend, tmp_path, request.getfixturevalue)
    command = [sys.executable, "-m", "tests._saga_child", url, "--kills", str(KILLS), "--seed", str(SEED)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(ran.stdout)
    assert not report["faults"], "\n".join([f"seed {SEED}", *report["faults"]])
    assert report["kills"] == KILLS
    assert report["done"] + report["undone"] > 0


@contextmanager
def stopped(url: str, how: str, fails: bool, stops: str, ledger: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """A process that is stopped in the middle of its saga, until what this gives is called: how that ended for it."""
    words = [url, how, "fails" if fails else "succeeds", stops, str(ledger)]
    command = [sys.executable, "-m", "tests._saga_stop_child", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
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


def orphan(store: Any, name: str) -> None:
    """Wait until the saga's lease is over."""
    check = patience()
    while sagas.show(store, "o-1", name=name).record.state != "orphaned":
        check()


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Path]:
    """The ledger, and this process as the second one."""
    before = dict(stop_child.where)
    stop_child.where.update(ledger=tmp_path / "ledger", stops="", who="second")
    with alone():
        yield tmp_path / "ledger"
    stop_child.where.clear()
    stop_child.where.update(before)


@pytest.mark.parametrize("how", ["thread", "task"])
@pytest.mark.parametrize("backend", BACKENDS)
class TestAnOwnerThatIsStoppedAndWakesLate:
    def test_is_refused_where_the_saga_went_forward_without_it(
        self, backend: str, how: str, tmp_path: Path, second: Path, request: pytest.FixtureRequest
    ) -> None:
        url = url_of(backend, tmp_path, request.getfixturevalue)
        store = opened(url)
        name = "astopped" if how == "task" else "stopped"
        with stopped(url, how, False, "act-2", second) as go_on:
            orphan(store, name)
            stop_child.bodies(store)
            assert sagas.recover(store).finished == [f"{name}/o-1"]
            assert go_on() == {"error": "SagaLost"}
        assert sagas.show(store, "o-1", name=name).record.state == "done"
        # The late one has run nothing more, and undone nothing.
        assert second.read_text().splitlines() == [
            *("first act-1", "first act-2", "second act-2", "second act-3"),
        ]
        store.close()

    def test_is_refused_where_the_saga_was_undone_without_it(
        self, backend: str, how: str, tmp_path: Path, second: Path, request: pytest.FixtureRequest
    ) -> None:
        url = url_of(backend, tmp_path, request.getfixturevalue)
        store = opened(url)
        name = "astopped" if how == "task" else "stopped"
        with stopped(url, how, True, "unact-3", second) as go_on:
            orphan(store, name)
            stop_child.bodies(store)
            assert sagas.recover(store).compensated == [f"{name}/o-1"]
            assert go_on() == {"error": "SagaLost"}
        assert sagas.show(store, "o-1", name=name).record.state == "aborted"
        assert second.read_text().splitlines() == [
            *("first act-1", "first act-2", "first act-3", "first unact-3"),
            *("second unact-3", "second unact-2", "second unact-1"),
        ]
        store.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_recoverers_at_once_undo_once(
    backend: str, tmp_path: Path, second: Path, request: pytest.FixtureRequest
) -> None:
    url = url_of(backend, tmp_path, request.getfixturevalue)
    both = [opened(url), opened(url)]
    with stopped(url, "thread", True, "unact-3", second) as go_on:
        orphan(both[0], "stopped")
        stop_child.bodies(both[0])
        reports: list[sagas.Report] = []
        gate = threading.Barrier(2)

        def recover(store: Any) -> None:
            gate.wait()
            reports.append(sagas.recover(store, retries=stop_child.RETRIES))

        threads = [threading.Thread(target=recover, args=(store,), daemon=True) for store in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(len(report.compensated) for report in reports) == [0, 1]
        assert [(report.stuck, report.left) for report in reports] == [([], {}), ([], {})]
        assert go_on() == {"error": "SagaLost"}
    lines = [line.split()[1] for line in second.read_text().splitlines() if line.startswith("second")]
    assert lines == ["unact-3", "unact-2", "unact-1"]
    for store in both:
        store.close()
