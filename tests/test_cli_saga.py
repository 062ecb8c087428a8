"""The command `resilient saga`: what it shows, what it does, what it refuses, and how its worker ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient import _cli_saga, _cli_worker, durable, stores
from resilient.cli import main
from resilient.stores import _open
from tests._saga_worlds import Spy, alone
from tests.test_cli_idempotency import Unread
from tests.test_durable import boom, died, hooks, log, made
from tests.test_sagas import block

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    log.clear()
    hooks.clear()
    monkeypatch.setenv("RESILIENT_STORE", "memory://")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with alone():
        yield
    hooks.clear()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    made = Spy()
    monkeypatch.setattr(_open, "shared", lambda url: made)  # pyright: ignore[reportUnknownLambdaType]
    return made


def run(*words: str) -> int:
    try:
        return main(["saga", *words])
    except SystemExit as ended:
        return int(str(ended.code))


def test_it_lists(spy: Spy, capsys: Out) -> None:
    made(spy)("o", id="o-1")
    spy.clock.advance(1.0)
    block(spy, "o-2")
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["STATE", "SAGA", "ID", "VERSION", "ATTEMPT", "BEGAN", "AGE"]
    assert [line.split()[:5] for line in lines[1:]] == [
        ["done", "order", "o-1", "1", "1"],
        ["orphaned", "block", "o-2", "1", "1"],
    ]
    assert run("list", "--state", "orphaned", "--json") == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["saga"], said["id"], said["state"], said["attempt"]) == ("block", "o-2", "orphaned", 1)
    assert run("list", "--name", "order", "--limit", "1") == 0
    assert capsys.readouterr().err == ""
    assert run("list", "--limit", "1") == 0
    got = capsys.readouterr()
    assert got.out.splitlines()[1].split()[2] == "o-2"
    assert got.err == "resilient saga: there are 2, and these are the last; --limit is 1\n"
    assert run("list", "--state", "stuck") == 1
    assert capsys.readouterr().err == "resilient saga: nothing found\n"


def test_it_shows(spy: Spy, capsys: Out) -> None:
    made(spy)("o", id="o-1")
    assert run("show", "o-1") == 0
    assert "begin   1. tests.test_durable:step" in capsys.readouterr().out
    assert run("show", "o-1", "--name", "order", "--mermaid") == 0
    assert capsys.readouterr().out.startswith("flowchart TD\n")
    assert run("show", "o-1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["state"], len(said["steps"]), len(said["entries"])) == ("done", 3, 3)
    assert run("show", "o-2") == 1
    assert capsys.readouterr().err == "resilient saga: there is no saga with the id 'o-2'\n"


def test_what_a_saga_contains_is_nothing_that_a_terminal_obeys(spy: Spy, capsys: Out) -> None:
    from resilient._book import label_of, stored_key
    from resilient.stores._ops import Begin

    evil = "\x1b[2Jx\n"
    spy.store.execute(Begin(stored_key(evil, evil), "x", 9.0, b"\x1b", label_of(evil, evil, 1, "running")))
    for words in (("list",), ("show", evil), ("resume", evil), ("abandon", evil, "--why", evil)):
        run(*words)
        got = capsys.readouterr()
        assert "\x1b" not in got.out + got.err
        assert (got.out + got.err).count("\n") <= 2


def test_people_decide(spy: Spy, capsys: Out) -> None:
    block(spy, "o-1")
    assert run("resume", "o-1") == 1
    assert "it was a block, which cannot be run again" in capsys.readouterr().err
    assert run("compensate", "o-1", "--name", "block") == 0
    assert capsys.readouterr().out == "block/o-1 is aborted\n"
    assert run("compensate", "o-1") == 1
    assert "it has ended already: aborted" in capsys.readouterr().err
    died(spy, made(spy), "b", name="o-2")
    durable._bodies.clear()
    assert run("resume", "o-2") == 1
    assert "no durable saga named 'order' is known here" in capsys.readouterr().err
    made(spy)
    assert run("resume", "o-2", "--module", "tests.test_durable") == 0
    assert capsys.readouterr().out == "order/o-2 is done\n"
    block(spy, "o-3")
    assert run("abandon", "o-3", "--why", " ") == 2
    assert run("abandon", "o-3", "--why", "sent by hand") == 0
    assert capsys.readouterr().out == "block/o-3 is abandoned: sent by hand\n"


def test_what_is_stuck_again_says_why(spy: Spy, capsys: Out) -> None:
    block(spy, "o-1")
    hooks["undo b"] = boom
    assert run("compensate", "o-1") == 1
    err = capsys.readouterr().err
    assert "compensations failed for good" in err
    assert "ValueError: boom" in err
    assert err.count("\n") == 1


def test_an_error_of_a_step_is_one_line(spy: Spy, capsys: Out) -> None:
    def body(saga: Any, order: str) -> str:
        saga.pivot()
        saga.step(boom)
        return order

    with pytest.raises(ValueError, match="boom"):
        made(spy, body)("o", id="o-1")
    assert run("resume", "o-1") == 1
    assert capsys.readouterr().err == "resilient saga: it failed: ValueError: boom\n"


def test_it_recovers(spy: Spy, capsys: Out) -> None:
    assert run("recover") == 0
    assert capsys.readouterr().out == "0 finished, 0 undone, 0 stuck\n"
    block(spy, "o-1")
    assert run("recover", "--module", "tests.test_sagas", "--name", "block") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("Z  undone  block/o-1")
    assert lines[1] == "0 finished, 1 undone, 0 stuck"
    block(spy, "o-2")
    hooks["undo b"] = boom
    died(spy, made(spy), "c", name="o-3")
    durable._bodies.clear()
    assert run("recover") == 1
    out = capsys.readouterr().out
    assert "STUCK  block/o-2: SagaStuck: " in out
    assert "left  order/o-3: LookupError: no durable saga named 'order'" in out
    assert out.endswith("0 finished, 0 undone, 1 stuck, 1 left\n")


def test_wrong_use_is_said_on_one_line(capsys: Out, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run() == 2
    assert "compensate" in capsys.readouterr().out
    monkeypatch.delenv("RESILIENT_STORE")
    assert run("list") == 2
    assert "which store? Give --store URL" in capsys.readouterr().err
    for words, text in (
        (("list", "--store", "nowhere"), "url must begin with a scheme"),
        (("list", "--store", "odd://me:secret@host"), "names no store that is known"),
        (("recover", "--store", "memory://", "--module", "no_such_module"), "module no_such_module cannot be imported"),
        (("worker", "memory://"), "required: MODULE"),
        (("worker", "memory://", "json", "--every", "0"), "must be a number of seconds above 0"),
        (("worker", "memory://", "json", "--every", "x"), "must be a number of seconds above 0"),
        (("list", "--limit", "0"), "must be a number from 1 on"),
        (("list", "--store", f"sqlite:///{tmp_path}"), "the store cannot be asked"),
    ):
        assert run(*words) == 2
        err = capsys.readouterr().err
        assert text in err
        assert "secret" not in err


@pytest.mark.parametrize(
    "words", [("list",), ("show", "o-1"), ("resume", "o-1"), ("compensate", "o-1"), ("abandon", "o-1", "--why", "x")]
)
def test_a_file_that_is_not_there_is_not_made(words: tuple[str, ...], tmp_path: Path, capsys: Out) -> None:
    assert run(*words, "--store", f"sqlite:///{tmp_path}/missing.db") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"resilient saga: there is no file {tmp_path}/missing.db: is it the store's path, seen from")
    assert list(tmp_path.iterdir()) == []


def test_recovery_may_begin_before_the_application(tmp_path: Path, capsys: Out) -> None:
    for verb, before, after in (("recover", ["--store"], []), ("worker", [], ["json", "--once"])):
        file = tmp_path / f"{verb}.db"
        assert run(verb, *before, f"sqlite:///{file}", *after) == 0
        assert capsys.readouterr().err == f"resilient saga: there is no file {file} yet: it is made\n"
        assert file.exists()


def test_a_reader_that_leaves_is_no_error(spy: Spy, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        block(spy, f"o-{number}")
    for words in (("list",), ("show", "o-1"), ("list", "--json")):
        with Unread() as out, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            assert run(*words) == 141
    # Recovery is not for the reader alone: it goes on.
    with Unread() as out, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        assert run("recover", "--module", "tests.test_sagas", "--concurrency", "1") == 0
    assert capsys.readouterr().err == ""
    assert run("list", "--state", "orphaned") == 1


def test_a_store_for_coroutines_only_is_refused(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_open, "shared", lambda url: object())  # pyright: ignore[reportUnknownLambdaType]
    assert run("list") == 2
    assert "serves coroutines only" in capsys.readouterr().err


def test_modules_are_found_where_the_command_is_run(
    spy: Spy, capsys: Out, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "shop_of_tests.py").write_text("raise RuntimeError('not today')")
    monkeypatch.chdir(tmp_path)
    assert run("recover", "--module", "shop_of_tests") == 2
    assert "shop_of_tests cannot be imported: RuntimeError: not today" in capsys.readouterr().err
    (tmp_path / "shop_of_tests.py").write_text("")
    assert run("recover", "--module", "shop_of_tests") == 0
    del sys.modules["shop_of_tests"]


# -- the worker ------------------------------------------------------------------------------------------------------


def test_a_worker_looks_once_if_it_is_told_so(spy: Spy, capsys: Out) -> None:
    block(spy, "o-1")
    assert run("worker", "memory://", "tests.test_sagas", "--once") == 0
    assert "undone  block/o-1" in capsys.readouterr().out
    spy.fail("Scan", 1)
    assert run("worker", "memory://", "tests.test_sagas", "--once") == 2
    died(spy, made(spy), "b")
    durable._bodies.clear()
    assert run("worker", "memory://", "json", "--once") == 1


def ringing(monkeypatch: pytest.MonkeyPatch, rounds: int, each: Any = None) -> None:
    """The worker's bell rings at the end of its round number `rounds`."""
    count = [0]
    wait = _cli_worker.Bell.wait

    def waiting(self: Any, seconds: float) -> bool:
        assert seconds == 2.5
        count[0] += 1
        if each is not None:
            each(count[0])
        if count[0] == rounds:
            signal.raise_signal(signal.SIGTERM)
            return wait(self, seconds)
        return wait(self, 0.0)

    monkeypatch.setattr(_cli_worker.Bell, "wait", waiting)


def test_a_worker_goes_on_until_it_is_told_to_end(spy: Spy, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ringing(monkeypatch, 3, lambda number: block(spy, f"o-{number}"))
    assert run("worker", "memory://", "tests.test_sagas", "--every", "2.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == [
        "undone  block/o-1",
        "undone  block/o-2",
        "ended by signal SIGTERM",
    ]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_quarantines_what_keeps_failing(spy: Spy, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    died(spy, made(spy), "b")
    durable._bodies.clear()

    def each(number: int) -> None:
        if number == 6:
            block(spy, "good")

    ringing(monkeypatch, 12, each)
    assert run("worker", "memory://", "json", "tests.test_sagas", "--every", "2.5") == 0
    out = capsys.readouterr().out
    assert out.count("left  order/o-1") == 4
    assert "    failed 3 times: it is looked at again in 4 rounds\n" in out
    assert "    failed 4 times: it is looked at again in 8 rounds\n" in out
    assert out.count("undone  block/good") == 1


def test_a_worker_outlives_a_store_that_is_away(spy: Spy, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    block(spy, "o-1")
    spy.fail("Scan", 2)
    ringing(monkeypatch, 4)
    assert run("worker", "memory://", "tests.test_sagas", "--every", "2.5") == 0
    got = capsys.readouterr()
    assert got.err.count("the store cannot be asked: the store is away\n") == 2
    assert "undone  block/o-1" in got.out


def test_a_worker_ends_after_the_saga_in_hand(spy: Spy, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("o-1", "o-2"):
        block(spy, name)
    hooks["undo b"] = lambda: signal.raise_signal(signal.SIGINT)
    assert run("worker", "memory://", "tests.test_sagas", "--concurrency", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1][:12] for line in lines] == ["undone  bloc", "ended by sig"]
    assert log == ["undo b UNKNOWN", "undo a A"]


def test_a_worker_ends_after_the_sagas_in_hand(spy: Spy, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("o-1", "o-2", "o-3", "o-4"):
        block(spy, name)
    both, heard, ring = threading.Barrier(2), threading.Event(), _cli_worker.Bell._ring

    def hear(self: Any, number: int, frame: object) -> None:
        ring(self, number, frame)
        heard.set()

    def undoing() -> None:
        if both.wait(30.0) == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        assert heard.wait(30.0)

    monkeypatch.setattr(_cli_worker.Bell, "_ring", hear)
    hooks["undo b"] = undoing
    assert run("worker", "memory://", "tests.test_sagas", "--concurrency", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1][:12] for line in lines] == ["undone  bloc", "undone  bloc", "ended by sig"]


def test_how_many_at_a_time_is_a_number_from_1_on(spy: Spy, capsys: Out) -> None:
    for name in ("o-1", "o-2", "o-3"):
        block(spy, name)
    for words in (("recover",), ("worker", "memory://", "json")):
        assert run(*words, "--concurrency", "0") == 2
        assert "must be a number from 1 on" in capsys.readouterr().err
    assert spy.ops == []
    assert run("recover", "--module", "tests.test_sagas", "--concurrency", "3") == 0
    assert "0 finished, 3 undone, 0 stuck" in capsys.readouterr().out


def test_a_second_signal_does_what_it_does_otherwise(spy: Spy) -> None:
    block(spy, "o-1")

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    hooks["undo b"] = twice
    assert run("worker", "memory://", "tests.test_sagas") == 130


def test_only_the_main_thread_hears_signals(spy: Spy) -> None:
    heard: list[Any] = []

    def elsewhere() -> None:
        with _cli_worker.Bell() as bell:
            heard.append(bell.wait(0.0))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard == [False]


SHOP = """
import os, sys
from resilient import DurableSaga

def step(name: str) -> str:
    with open("ledger", "a") as ledger:
        print(name, file=ledger)
    if name == os.environ.get("DIES_AT"):
        os.kill(os.getpid(), 9)
    return name

def undo(name: str) -> None:
    step("undo " + name)

@DurableSaga("order", store="sqlite:///sagas.db", lease=0.05)
def place(saga, order: str) -> str:
    for name in ("a", "b", "c"):
        saga.step(step, name, compensate=undo)
    return order
"""


def test_a_real_worker_finishes_what_a_killed_process_left_and_ends_at_sigterm(tmp_path: Path) -> None:
    (tmp_path / "shop_of_tests.py").write_text(SHOP)
    root = str(Path(stores.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    begin = [sys.executable, "-c", "import shop_of_tests; shop_of_tests.place('o', id='o-1')"]
    killed = subprocess.run(begin, cwd=tmp_path, env={**env, "DIES_AT": "b"})
    assert killed.returncode == -signal.SIGKILL
    words = ["saga", "worker", "sqlite:///sagas.db", "shop_of_tests", "--every", "0.02"]
    command = [sys.executable, "-c", "import sys; from resilient.cli import main; sys.exit(main())", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        try:
            assert worker.stdout.readline().endswith("Z  finished  order/o-1\n")
            worker.send_signal(signal.SIGTERM)
            assert worker.stdout.read().endswith("ended by signal SIGTERM\n")
        finally:
            worker.kill()
    assert (tmp_path / "ledger").read_text().split() == ["a", "b", "b", "c"]


def test_a_block_of_a_script_is_undone_by_a_fresh_process_that_vouches_for_it(tmp_path: Path) -> None:
    """As the docs have it: without `--module` it is left, whatever the store says."""
    page = Path(__file__).parents[1].joinpath("docs/how-to/sagas.md").read_text()
    script = page.partition('SHOP = """')[2].partition('"""')[0]
    (tmp_path / "shop.py").write_text(script.replace("lease=1.0", "lease=0.01"))
    root = str(Path(stores.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run([sys.executable, "shop.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "reserved A-1\n")

    def recover(*words: str) -> list[str]:
        command = [sys.executable, "-m", "resilient", "saga", "recover", "--store", "sqlite:///orders.db", *words]
        while True:  # Until its lease is over.
            said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout.splitlines()
            if said != ["0 finished, 0 undone, 0 stuck"]:
                return said

    left, count = recover()
    assert "left  order/o-1: LookupError: the journal names shop:release, and this process does not vouch" in left
    assert count == "0 finished, 0 undone, 0 stuck, 1 left"
    released, undone, count = recover("--module", "shop")
    assert released == "released A-1"
    assert undone.endswith("  undone  order/o-1")
    assert count == "0 finished, 1 undone, 0 stuck"


def test_errors_and_instants_are_told_plainly() -> None:
    assert _cli_saga._told(LookupError()) == ""
    assert _cli_saga._told(KeyError("x")) == "'x'"
