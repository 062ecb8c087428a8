"""`import resilient` is cheap, and everything that it promises is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import resilient

HEAVY = (
    "aiolimiter",
    "asyncio",
    "dataclasses",
    "inspect",
    "logging",
    "msgspec",
    "opentelemetry",
    "pybreaker",
    "random",
    "redis",
    "tenacity",
    "trio",
    "typing_extensions",
    "wrapt",
)


LIBRARIES = {"aiolimiter", "asyncio", "opentelemetry", "pybreaker", "redis", "tenacity", "trio", "wrapt"}


def fresh(code: str) -> list[str]:
    """The lines that `code` prints in an interpreter of its own, in which nobody measures coverage."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    # -S: no site-packages of others, whose .pth files import what they like; the path is handed on by itself.
    path = f"import sys; sys.path[:] = {sys.path!r}; "
    done = subprocess.run(
        [sys.executable, "-S", "-c", path + code], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


def loaded(code: str) -> set[str]:
    lines = fresh(f"{code}; print(*sys.modules)")
    return {name for name in HEAVY if name in lines}


def test_import_loads_nothing_heavy() -> None:
    assert loaded("import resilient") == set()


def test_the_pure_policies_load_no_library_and_no_event_loop() -> None:
    names = "Bulkhead, Fallback, Pipeline, Retry"
    assert loaded(f"from resilient import {names}") & LIBRARIES == set()


def test_the_probe_would_see_a_heavy_module() -> None:
    assert loaded("import resilient, asyncio") >= {"asyncio"}


def test_every_public_name_resolves() -> None:
    for name in resilient.__all__:
        assert getattr(resilient, name) is getattr(resilient, name), name


def test_the_module_of_test_tools_comes_by_name() -> None:
    """Whoever says `resilient.testing` need not import it first."""
    assert vars(resilient)["__getattr__"]("testing") is resilient.testing
    assert fresh("import resilient; print(resilient.testing.__name__)") == ["resilient.testing"]


def test_a_star_import_brings_all_names_in_a_fresh_process() -> None:
    lines = fresh("from resilient import *; print(*sorted(set(globals()) - {'sys'}))")
    assert [name for name in lines if not name.startswith("__") or name == "__version__"] == resilient.__all__


def test_all_is_sorted_and_dir_shows_it() -> None:
    assert sorted(resilient.__all__) == resilient.__all__
    assert set(resilient.__all__) <= set(dir(resilient))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"^module 'resilient' has no attribute 'Retyr'$"):
        resilient.Retyr  # type: ignore[attr-defined] # noqa: B018 # pyright: ignore
    with pytest.raises(ImportError, match="cannot import name 'Retyr'"):
        exec("from resilient import Retyr")


def test_type_checkers_see_the_same_names() -> None:
    """The `TYPE_CHECKING` block and the table of the lazy imports must name the same things."""
    import ast
    from pathlib import Path

    assert resilient.__file__ is not None
    tree = ast.parse(Path(resilient.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (node.module, name.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if name.asname == name.name
    }
    table = {(f"resilient.{module}", name) for module, names in resilient._HOMES.items() for name in names}
    assert seen == table | {("resilient", "sagas"), ("resilient", "stores"), ("resilient", "testing")}
