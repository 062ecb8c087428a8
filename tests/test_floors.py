"""Imports go down the floors of the design, and only `clock.py` and `_aio.py` touch time and chance."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import resilient

ROOT = Path(resilient.__file__).parent

# What stands on what. A module may import its own floor and those below, in functions too.
FLOORS: dict[int, str] = {
    0: "errors events clock _types",
    1: "_lifecycle _retry_after _window _park _match _guard _stream _order",
    2: "policy _aio _ambient _latency _pace _threads _circuit _trip _verdict _tenacity _pybreaker "
    "_strategies _attempts retry breaker bulkhead ratelimit timeout fallback hedge",
    3: "pipeline patching __init__",
    4: "_binding _codec _drive _keeper _once _transaction idempotency stores _undo _journal _book _run "
    "_parallel _settle _steps saga durable sagas engines _barrier _takeover _recovery _saga_views",
    5: "testing cli demo integrations telemetry _contract _contract_cases _contract_journal _cli_idempotency _cli_saga "
    "_cli_text _cli_worker __main__",
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}

# `Policy.__call__` and the environment of an undecorated function: see docs/decisions/0001.
UPWARDS = {("_guard", "policy")}

BANNED = {"time", "random", "datetime.datetime.now", "asyncio.sleep"}
LAST = {name.rpartition(".")[2] for name in BANNED}
MAY_TELL_TIME = {"clock.py", "_aio.py"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def top(path: Path) -> str:
    """The name by which the floors know a file: its own, or that of its subpackage."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


class Imports(ast.NodeVisitor):
    """Every name that is imported when the module or a function of it runs."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.extend((node.lineno, name.name) for name in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute"
        self.found.extend((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def imports(source: str) -> list[tuple[int, str]]:
    visitor = Imports()
    visitor.visit(ast.parse(source))
    return visitor.found


def ours(name: str) -> str | None:
    """The module of ours that `import name` brings, as the floors know it."""
    package, _, rest = name.partition(".")
    if package != "resilient":
        return None
    first = rest.partition(".")[0]
    return first if first in FLOOR else "__init__"


def climbs(module: str, source: str) -> Iterator[str]:
    for line, name in imports(source):
        target = ours(name)
        if target is None or (module, target) in UPWARDS:
            continue
        if FLOOR[target] > FLOOR[module]:
            yield f"{module}:{line} (floor {FLOOR[module]}) imports {name} (floor {FLOOR[target]})"


def clocks(source: str) -> Iterator[str]:
    """Uses of time and chance: imported, or spelled out as attributes."""
    for line, name in imports(source):
        if name in BANNED or name.partition(".")[0] in BANNED:
            yield f"line {line}: import of {name}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in LAST:
            spelled = ast.unparse(node)
            if spelled in BANNED or f"datetime.{spelled}" in BANNED:
                yield f"line {node.lineno}: {spelled}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_floor_and_imports_downwards(path: Path) -> None:
    assert top(path) in FLOOR, f"{path.name} stands on no floor: add it to FLOORS"
    assert not list(climbs(top(path), path.read_text()))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_clock_tells_the_time(path: Path) -> None:
    if path.name not in MAY_TELL_TIME and top(path) != "demo":
        assert not list(clocks(path.read_text()))


def test_a_climb_would_be_seen() -> None:
    late = "def f():\n    from resilient.pipeline import Pipeline\n"
    assert list(climbs("retry", late)) == [
        "retry:2 (floor 2) imports resilient.pipeline.Pipeline (floor 3)",
    ]
    assert list(climbs("retry", "from resilient import Retry")) == [
        "retry:1 (floor 2) imports resilient.Retry (floor 3)",
    ]
    assert list(climbs("errors", "import resilient.policy"))
    assert not list(climbs("pipeline", late))
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from resilient.pipeline import Pipeline\n"
    assert not list(climbs("retry", typed))
    assert list(climbs("retry", typed + "else:\n    import resilient.pipeline\n"))


def test_a_clock_would_be_seen() -> None:
    assert list(clocks("import time"))
    assert list(clocks("from random import Random"))
    assert list(clocks("import asyncio\nasync def f():\n    await asyncio.sleep(1)"))
    assert list(clocks("from asyncio import sleep"))
    assert list(clocks("from datetime import datetime\ndatetime.now()"))
    assert not list(clocks("import asyncio\nasyncio.run(f())"))
