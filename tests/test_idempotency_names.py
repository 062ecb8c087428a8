"""Which function a record belongs to: the same in every process, and one of them only."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import resilient
from resilient import Idempotent
from resilient._codec import real_module
from resilient.idempotency import identity
from resilient.stores.memory import MemoryStore

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


def test_two_lambdas_do_not_share_their_records() -> None:
    policy = Idempotent(MemoryStore(), key=lambda order: order)
    one: Any = policy(lambda order: "one")
    with pytest.raises(TypeError, match=r"<lambda> \(.*test_idempotency_names.py:\d+\) and .* would share"):
        policy(lambda order: "two")
    assert one("o-1") == "one"
    policy = Idempotent(MemoryStore(), key=lambda order: order)
    with pytest.raises(TypeError, match="would share the records"):
        [policy(lambda order: "one"), policy(lambda order: "two")].clear()  # on one line, too
    named: list[Any] = [Idempotent(policy.store, key="order", name=str(n))(lambda order, n=n: n) for n in range(2)]
    assert [call("o-1") for call in named] == [0, 1]


def test_one_policy_with_a_name_is_for_one_function() -> None:
    policy = Idempotent(MemoryStore(), key="obj", name="size")
    policy(len)
    policy(len)
    with pytest.raises(TypeError, match="builtins:hash and builtins:len would share the records of 'size'"):
        policy(hash)


def local(body: str) -> Any:
    """A function made inside of another, as by a module at this place."""
    space: dict[str, Any] = {"__name__": "shop_of_names"}
    exec(
        compile(f"def make():\n def charge(order):\n  return {body}\n return charge", "shop_of_names.py", "exec"), space
    )
    return space["make"]()


def test_a_function_that_takes_the_place_of_another_keeps_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Idempotent(MemoryStore(), key="order")
    assert policy(local("'one'"))("o-1") == policy(local("'two'"))("o-1") == "one"

    def other(order: str) -> str:
        return "three"

    other.__module__, other.__qualname__ = "shop_of_names", "make.<locals>.charge"
    with pytest.raises(TypeError, match="would share"):
        policy(other)
    # At a prompt everything is typed again, in another place.
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert policy(other)("o-1") == "one"
    monkeypatch.undo()

    def top(order: str) -> str:
        return "old"

    def reloaded(order: str) -> str:
        return "new"

    top.__qualname__ = reloaded.__qualname__ = "top"
    assert policy(top)("o-1") == policy(reloaded)("o-1") == "old"


def test_a_store_that_cannot_be_known_again_is_taken_as_it_is() -> None:
    class Slotted:
        __slots__ = ("execute",)

        def __init__(self) -> None:
            self.execute = MemoryStore().execute

    policy: Any = Idempotent(Slotted(), key="order")
    assert policy(lambda order: "one")("o-1") == policy(lambda order: "two")("o-1") == "one"
