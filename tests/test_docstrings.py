"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import resilient
from resilient.testing import instant

PROGRAMS = ("resilient.cli", "resilient.demo")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(resilient.__path__, "resilient.")
    if not module.name.startswith(PROGRAMS)
]


@pytest.mark.parametrize("name", ["resilient", *MODULES])
def test_examples(name: str) -> None:
    with instant():
        done = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert done.failed == 0


def test_there_are_examples_at_all() -> None:
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert found
