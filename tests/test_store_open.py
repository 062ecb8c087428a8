"""From URLs to stores, schemes of other packages among them; and what a store may be wrapped in."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from resilient import stores
from resilient.stores import AsyncStore, Claim, MemoryStore, Read, Store, Threaded, Watching, _open


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that adds the scheme `shelf`."""
    (tmp_path / "shelf_of_another.py").write_text(
        "from resilient.stores import MemoryStore\n\n\n"
        "class Shelf(MemoryStore):\n    url = ''\n\n\n"
        "def open(url):\n    store = Shelf()\n    store.url = url\n    return store\n"
    )
    folder = tmp_path / "shelf_of_another-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf-of-another\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[resilient.stores]\nshelf = shelf_of_another:open\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_memory_has_a_scheme() -> None:
    one, other = stores.open("memory://"), stores.open("MEMORY://")
    assert isinstance(one, MemoryStore)
    assert isinstance(other, MemoryStore)
    assert one is not other


@pytest.mark.usefixtures("package")
def test_another_package_adds_a_scheme() -> None:
    store = stores.open("Shelf://here?deep=1")
    assert type(store).__name__ == "Shelf"
    assert store.url == "Shelf://here?deep=1"


@pytest.mark.usefixtures("package")
def test_an_unknown_scheme_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"names no store that is known: 'mongo' \(there are memory, .*, shelf, .*valkey"
    ):
        stores.open("mongo://host")


@pytest.mark.parametrize("url", ["", "file.db", "/absolute/file.db"])
def test_a_url_without_a_scheme_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"url must begin with a scheme, such as sqlite:///file\.db, not "):
        stores.open(url)


@pytest.mark.parametrize("url", [None, 5, b"memory://", Path("memory:")])
def test_a_url_is_a_string(url: Any) -> None:
    with pytest.raises(TypeError, match="url must be a string, not"):
        stores.open(url)


def test_the_same_url_shares_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_open, "_shared", {})
    assert _open.shared("memory://") is _open.shared("memory://")
    assert _open.shared("memory:") is not _open.shared("memory://")


def test_shared_stores_are_closed_and_forgotten_together(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Closed(MemoryStore):
        def close(self) -> None:
            closed.append("closed")

    monkeypatch.setattr(_open, "_shared", {})
    monkeypatch.setattr(MemoryStore, "from_url", lambda url: Closed())
    first = _open.shared("memory://")
    _open.shared("memory:")
    _open.forget_shared()
    assert closed == ["closed", "closed"]
    assert _open.shared("memory://") is not first


def test_every_scheme_leads_to_a_store_that_is_exported() -> None:
    for module, name in _open._BUILT_IN.values():
        assert stores._HOME[name] == module.removeprefix("resilient.stores.")


def test_what_the_package_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'MongoStore'"):
        _ = cast(Any, stores).MongoStore


def test_a_store_may_be_asked_what_it_serves() -> None:
    store = MemoryStore()
    assert isinstance(store, Store)
    assert isinstance(store, AsyncStore)
    assert isinstance(store, Watching)
    assert not isinstance(Threaded(store), Store)


class Plain:
    """A store for plain functions, and no more than that."""

    def __init__(self) -> None:
        self.execute = MemoryStore().execute

    def __repr__(self) -> str:
        return "Plain()"


@pytest.mark.parametrize("run", [asyncio.run, lambda main: trio.run(lambda: main)])
def test_threaded_serves_tasks(run: Any) -> None:
    store = Threaded(Plain())

    async def main() -> None:
        got = await store.aexecute(Claim("k", "a", 10.0))
        record = await store.aexecute(Read("k"))
        assert record is not None
        assert record.fence == got.fence

    run(main())


def test_threaded_watches_and_closes_as_its_store_does() -> None:
    closed: list[str] = []

    class Closed(MemoryStore):
        poll = 0.25

        def close(self) -> None:
            closed.append("closed")

    store = Threaded(Closed())
    assert isinstance(store, Watching)
    assert store.poll == 0.25
    store.close()
    assert closed == ["closed"]
    assert repr(store) == "Threaded(MemoryStore())"

    plain = Threaded(Plain())
    assert not isinstance(plain, Watching)
    assert not hasattr(plain, "poll")
    assert plain.close() is None
    assert repr(plain) == "Threaded(Plain())"


def test_threaded_refuses_what_is_no_store() -> None:
    with pytest.raises(TypeError, match="store must have a method execute, which 5 has not"):
        Threaded(cast(Any, 5))


def test_shared_stores_are_forgotten_closed_or_not() -> None:
    _open._shared["odd://"] = object()
    _open.forget_shared()
    assert "odd://" not in _open._shared
