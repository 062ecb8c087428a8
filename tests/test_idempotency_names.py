"""Which function a record belongs to: the same in every process, and one of them only."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

import resilient
from resilient._codec import real_module
from resilient.idempotency import identity

SCRIPT = """
import multiprocessing, sys
from resilient import Idempotent

class Declined(Exception):
    pass

@Idempotent("sqlite:///{file}", key="order_id", remember=Declined)
def charge(order_id):
    with open("{log}", "a") as log:
        print(__name__, order_id, file=log)
    if order_id == "o-2":
        raise Declined("no funds")
    return order_id

def tried(order_id):
    try:
        return charge(order_id)
    except Declined as error:
        return str(error)

if __name__ == "__main__":
    assert (tried("o-1"), tried("o-2")) == ("o-1", "no funds")
    child = multiprocessing.get_context("spawn").Process(target=charge, args=("o-1",))
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


def test_a_script_its_spawned_processes_and_who_imports_it_share_their_keys(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = tmp_path / "shop_of_names.py"
    script.write_text(SCRIPT.format(file=(tmp_path / "f.db").as_posix(), log=log.as_posix()))
    imported = "import shop_of_names as s; assert (s.tried('o-1'), s.tried('o-2')) == ('o-1', 'no funds')"
    for arguments in ([script.name], ["-m", script.stem], ["-c", imported]):
        subprocess.run([sys.executable, "-W", "ignore", *arguments], cwd=tmp_path, check=True, env=environment())
    assert log.read_text().splitlines() == ["__main__ o-1", "__main__ o-2"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(resilient.__file__).parents[1])}


def test_the_name_of_a_main_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert real_module("shop") == "shop"
    for name in ("__main__", "__mp_main__"):
        main = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, main)
        assert real_module(name) == "__main__"  # a prompt, or `-c`: nobody else can import that
        main.__file__ = str(tmp_path / "shop.py")
        assert real_module(name) == "shop"
        main.__spec__ = multiprocessing.__spec__
        assert real_module(name) == "multiprocessing"
    script = tmp_path / "ledger.py"
    script.write_text("from resilient.idempotency import identity\ndef f(): pass\nname = identity(f)\n")
    monkeypatch.delitem(sys.modules, "__mp_main__")
    # As multiprocessing does it in a process that it spawns.
    assert runpy.run_path(str(script), run_name="__mp_main__")["name"] == "ledger:f"
    assert identity(runpy.run_path) == "runpy:run_path"
