"""The public API is what `tests/api.txt` says: a change of it is a change that somebody reviewed.

`python -m tests.test_public --write` writes the file anew.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import resilient

FILE = Path(__file__).with_name("api.txt")
ROOT = Path(resilient.__file__).parent
# What stands behind `()`, `with`, `async with`, `for`, `async for` and `|`.
SPOKEN = {"__call__", "__enter__", "__aenter__", "__iter__", "__aiter__", "__or__"}
# Programs, not libraries: nobody imports them.
PROGRAMS = {"cli", "demo"}


def modules() -> list[ModuleType]:
    names = sorted(
        path.stem if path.is_file() else path.name
        for path in ROOT.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and not path.name.startswith("_")
    )
    return [importlib.import_module(f"resilient.{name}") for name in names if name not in PROGRAMS]


def signature(value: Any) -> str:
    """The parameters of a callable, the same in all versions of Python."""
    try:
        found = inspect.signature(value)
    except ValueError:
        return "(...)"
    parameters = list(found.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        found = found.replace(parameters=parameters[1:])
    return re.sub(r" at 0x[0-9a-f]+", "", str(found)).replace("'", "")


def made(cls: type) -> str:
    """How an object of a class is made, unless somebody else's class decides that."""
    home = next(base for base in cls.__mro__ if "__init__" in vars(base))
    if home.__module__.partition(".")[0] != "resilient" or getattr(cls, "_is_protocol", False):
        return ""
    return signature(vars(home)["__init__"]).removesuffix(" -> None")


def members(cls: type) -> Iterator[str]:
    """The public members of a class that we wrote, with their signatures."""
    seen: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] == "resilient":
            for name in getattr(base, "__annotations__", {}):
                seen.setdefault(name, None)
            seen.update(vars(base))
    for name, value in sorted(seen.items()):
        if name.startswith("_") and name not in SPOKEN:
            continue
        if isinstance(value, staticmethod) and inspect.isbuiltin(value.__func__):
            # Whether a builtin tells its parameters depends on the version of Python.
            yield f"    staticmethod {name}"
        elif isinstance(value, (classmethod, staticmethod)):
            yield f"    {type(value).__name__} {name}{signature(value.__func__)}"
        elif inspect.isfunction(value):
            word = "async def" if inspect.iscoroutinefunction(value) else "def"
            yield f"    {word} {name}{signature(value)}"
        else:
            yield f"    {name}"


def lines() -> Iterator[str]:
    yield "resilient: " + " ".join(resilient.__all__)
    for module in modules():
        yield f"\n{module.__name__}"
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if isinstance(value, type):
                bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
                yield f"  class {name}({bases}){made(value)}"
                yield from (f"  {line[2:]}" for line in members(value))
            elif inspect.isfunction(value):
                yield f"  def {name}{signature(value)}"
            else:
                yield f"  {name}"


def snapshot() -> str:
    return "\n".join(lines()) + "\n"


def test_the_public_api_is_the_reviewed_one() -> None:
    """If the change is meant: `python -m tests.test_public --write`, and say so in CHANGELOG.md."""
    assert FILE.read_text().splitlines() == snapshot().splitlines()


def test_every_module_says_what_is_public_and_explains_it() -> None:
    for module in modules():
        assert module.__doc__, module.__name__
        assert len(set(module.__all__)) == len(module.__all__), module.__name__
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) or inspect.isfunction(value):
                assert value.__doc__, f"{module.__name__}.{name} has no docstring"


def test_public_methods_are_documented() -> None:
    bare = [
        f"{value.__qualname__}.{name}"
        for module in modules()
        for value in (getattr(module, name) for name in module.__all__)
        if isinstance(value, type) and not issubclass(value, BaseException)
        for name, member in vars(value).items()
        if inspect.isfunction(member) and not name.startswith("_") and not inspect.getdoc(getattr(value, name))
    ]
    assert bare == []


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(snapshot())
    else:
        print(snapshot(), end="")
