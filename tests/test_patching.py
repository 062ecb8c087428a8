"""`patch` guards code of others, and takes it back."""

from __future__ import annotations

import asyncio
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import resilient
from resilient import Pipeline, patch, patching
from tests.tracer import Tracer

SOURCE = """
class Base:
    def inherited(self):
        return "inherited"

class Session(Base):
    def request(self, url):
        return url
    async def fetch(self, url):
        return url
    @classmethod
    def make(cls):
        return cls
    @staticmethod
    def check(x):
        return x

def get(url):
    return Session().request(url)
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that nobody has imported yet."""
    name = "foreign_" + tmp_path.name.replace("-", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def load(name: str) -> Any:
    return importlib.import_module(name)


def test_methods_functions_and_descriptors_are_guarded_and_restored(foreign: str) -> None:
    module: types.ModuleType = load(foreign)
    before = {name: vars(module.Session)[name] for name in ("request", "fetch", "make", "check")}
    trace = Tracer()
    handles = [patch(f"{foreign}:Session.{name}", trace) for name in before]
    handles.append(patch(f"{foreign}:get", Pipeline(Tracer("f", trace.log))))
    session = module.Session()
    assert module.get("u") == "u"
    assert trace.log == ["+f", "+t", "-t", "-f"]
    assert asyncio.run(session.fetch("v")) == "v"
    assert module.Session.make() is module.Session
    assert session.check(3) == 3
    assert len(trace.log) == 10
    assert resilient.inspect(module.Session.request) == (trace,)
    assert all(handle.applied for handle in handles)
    for handle in handles:
        handle.undo()
    assert {name: vars(module.Session)[name] for name in before} == before
    module.get("u")
    assert len(trace.log) == 10
    assert not any(handle.applied for handle in handles)
    handles[0].undo()


def test_an_inherited_method_is_patched_on_the_named_class_only(foreign: str) -> None:
    module = load(foreign)
    trace = Tracer()
    with patch(f"{foreign}:Session.inherited", trace) as handle:
        assert handle.applied
        module.Session().inherited()
        module.Base().inherited()
        assert trace.log == ["+t", "-t"]
    assert "inherited" not in vars(module.Session)


def test_a_module_that_is_not_imported_yet_is_patched_when_it_is(foreign: str) -> None:
    trace = Tracer()
    handle = patch(f"{foreign}:Session.request", trace)
    assert not handle.applied
    assert repr(handle) == f"<patch of {foreign}:Session.request: waiting for the import>"
    module = load(foreign)
    assert handle.applied
    assert repr(handle).endswith(": applied>")
    module.get("u")
    assert trace.log == ["+t", "-t"]
    handle.undo()
    assert repr(handle).endswith(": undone>")


def test_a_patch_undone_before_the_import_never_happens(foreign: str) -> None:
    trace = Tracer()
    patch(f"{foreign}:Session.request", trace).undo()
    load(foreign).get("u")
    assert trace.log == []


@pytest.mark.parametrize("path", ["", "json", "json:", ":dumps", "json.dumps"])
def test_a_path_of_another_form_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"path must look like 'package.module:Class.attribute', not"):
        patch(path, Tracer())


def test_what_is_no_policy_or_not_there_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="policy must be a policy or a Pipeline, not 3"):
        patch("json:dumps", 3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(AttributeError):
        patch("json:no_such_thing", Tracer())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("attribute", ["get", "Session.request", "Session.make", "Inherits.request"])
def test_patches_of_one_attribute_are_undone_in_any_order(foreign: str, attribute: str, order: tuple[int, ...]) -> None:
    module: Any = load(foreign)
    module.Inherits = type("Inherits", (module.Session,), {})
    *owner, name = attribute.split(".")
    parent = getattr(module, owner[0]) if owner else module
    before = vars(parent).get(name)
    policies = [Tracer(), Tracer(), Tracer()]
    handles = [patch(f"{foreign}:{attribute}", policy) for policy in policies]
    left = policies[::-1]
    for place in order:
        assert resilient.inspect(getattr(parent, name)) == tuple(left)
        handles[place].undo()
        left.remove(policies[place])
    assert vars(parent).get(name) is before
    assert not patching._stacks


def test_a_path_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="path must be a string, not None"):
        patch(None, Tracer())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
