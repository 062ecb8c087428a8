"""The command: what it takes, what it passes on, and what it says when something is missing."""

from __future__ import annotations

import builtins
import importlib
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import resilient
from resilient.cli import main
from resilient.demo import run
from resilient.demo.orders import BUNDLED


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"resilient-kit {resilient.__version__}\n"


def test_it_is_there_by_the_name_of_the_package(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """`python -m resilient`."""
    importlib.import_module("resilient.__main__")  # An import alone runs nothing.
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", ["resilient", "--version"])
    monkeypatch.delitem(sys.modules, "resilient.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("resilient", run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"resilient-kit {resilient.__version__}\n"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["demo", "--seed", "x"], ["demo", "--what"], ["nothing"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: resilient" in capsys.readouterr().err


def test_the_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[dict[str, Any]] = []

    def fake(**settings: Any) -> int:
        got.append(settings)
        return 7

    monkeypatch.setattr(run, "main", fake)
    assert main(["demo"]) == 7
    assert main(["demo", "--quick", "--seed", "5", "--plain", "--orders", "o.csv", "--json", "n.json"]) == 7
    assert got == [
        {"quick": False, "seed": 8, "plain": False, "path": BUNDLED, "json_path": None},
        {"quick": True, "seed": 5, "plain": True, "path": Path("o.csv"), "json_path": Path("n.json")},
    ]


def test_ctrl_c_before_the_demo_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(**settings: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "main", fake)
    assert main(["demo"]) == 130


@pytest.mark.parametrize("missing", ["httpx", "rich", "starlette", "uvicorn"])
def test_without_the_extra_the_demo_names_it(missing: str) -> None:
    # In a process of its own: here everything is imported already.
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from resilient.cli import main\n"
        "sys.exit(main(['demo', '--quick']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"resilient demo: it needs {missing}, which is not installed. Get it with the extra `demo`:\n"
        "    pip install 'resilient-kit[demo]'\n"
    )


@pytest.mark.parametrize("missing", ["rich.console", "resilient.demo.report", None])
def test_only_what_the_extra_brings_is_said_to_be_the_extra(
    missing: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def fake(name: str, *rest: Any) -> Any:
        if name == "resilient.demo.run":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fake)
    if missing == "rich.console":
        assert main(["demo"]) == 2
        assert "it needs rich, which" in capsys.readouterr().err
    else:
        with pytest.raises(ModuleNotFoundError, match=str(missing)):
            main(["demo"])
