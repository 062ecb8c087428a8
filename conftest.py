"""The examples of README.md and docs/ are tests: Sybil runs every Python block, one namespace a page.

Sleeps of the system's clock end at once, so that a page with a retry takes no time. Each page runs in an empty folder
of its own, and the stores that it opened by URL are closed behind it. What an example promises, it shows as `>>>` with
the answer, or asserts.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key, get_timeout_config_value
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# A shell starts background jobs with Ctrl-C ignored, and Python leaves it so; tests of Ctrl-C need the usual handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is collected stays to the end: no `gc.collect()` of a test, and none that comes by itself, looks through it.

    With thousands of tests in memory each look takes a third of a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """When a test fails pytest stops the watch over it; here it begins anew, since what cleans up may hang too."""
    timeout = get_timeout_config_value(node.config)
    if isinstance(node, pytest.Item) and timeout:
        faulthandler.dump_traceback_later(timeout, file=node.config.stash[fault_handler_stderr_fd_key], exit=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """And when all is over: a thread that a test left behind may hang the interpreter's end."""
    timeout = get_timeout_config_value(config)
    if timeout:
        faulthandler.dump_traceback_later(timeout, file=sys.__stderr__ or 2, exit=True)


class Page:
    """A page as a module, so that its functions are found by name, as those of a program are."""

    __slots__ = ("_namespace",)

    def __init__(self, namespace: dict[str, Any]) -> None:
        namespace["__name__"] = "page"
        self._namespace = namespace

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return self._namespace


def setup(namespace: dict[str, Any]) -> None:
    from resilient.stores._open import forget_shared
    from resilient.testing import instant

    stack = namespace["_stack"] = ExitStack()
    stack.enter_context(instant())
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    stack.callback(os.chdir, os.getcwd())
    os.chdir(folder)
    stack.callback(forget_shared)
    stack.callback(sys.modules.pop, "page", None)
    sys.modules["page"] = Page(namespace)  # type: ignore[assignment]


def teardown(namespace: dict[str, Any]) -> None:
    namespace["_stack"].close()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    setup=setup,
    teardown=teardown,
).pytest()
