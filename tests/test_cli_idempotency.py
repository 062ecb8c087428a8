"""`resilient idempotency`: what it finds, shows and removes, and what hostile records cannot do to a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from resilient import Idempotent, StoreError, _cli_idempotency, stores
from resilient.cli import main
from resilient.stores import Abandon, Claim, Finish, MemoryStore, Read, Record
from resilient.stores._ops import AnyOp
from resilient.testing import FakeClock

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
STORED = "0123456789abcdef0123456789abcdef01234567"


def label(key: str, function: str = "shop:charge", scope: str = "") -> str:
    return json.dumps({"function": function, "scope": scope, "key": key}, separators=(",", ":"), ensure_ascii=False)


class Shop:
    """A store with records, at an instant that is told."""

    def __init__(self) -> None:
        self.clock = FakeClock(epoch=NOW)
        self.store = MemoryStore(self.clock)
        self.count = 0
        self.ttl = 86_400.0

    def running(self, key: str, function: str = "shop:charge", scope: str = "", stored: str = "", raw: str = "") -> str:
        self.count += 1
        stored = stored or f"{self.count:040x}"
        text = raw or label(key, function, scope)
        self.store.execute(Claim(stored, f"owner-{self.count}", 30.0, "print", text))
        return stored

    def doubtful(self, key: str, function: str = "shop:charge", scope: str = "") -> str:
        stored = self.running(key, function, scope)
        self.store.execute(Abandon(stored, f"owner-{self.count}", 0))
        return stored

    def done(self, key: str, result: bytes = b'{"v":1,"ok":{"id":"ch_1"}}', scope: str = "", raw: str = "") -> str:
        stored = self.running(key, scope=scope, raw=raw)
        record = self.store.execute(Read(stored))
        assert record is not None
        assert self.store.execute(Finish(stored, record.owner, record.fence, result, self.ttl))
        return stored

    def answer(self, op: type[AnyOp], how: Callable[[Any, float], Any]) -> None:
        """Answer operations of a kind in another way."""
        self.store._how[op] = how


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop()
    monkeypatch.setattr(stores, "open", lambda url: shop.store)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(_cli_idempotency, "SystemClock", shop.clock)
    monkeypatch.setenv("RESILIENT_STORE", "memory://")
    return shop


Out = pytest.CaptureFixture[str]


def ask(*arguments: str) -> int:
    return main(["idempotency", *arguments])


# -- show -----------------------------------------------------------------------------------------------------------


def test_show_tells_all_of_a_result(shop: Shop, capsys: Out) -> None:
    shop.done("o-1", scope="eu")
    shop.done("o-2")
    shop.clock.advance(90.0)
    assert ask("show", "o-1") == 0
    assert capsys.readouterr().out.splitlines() == [
        "key:          o-1",
        "function:     shop:charge",
        "scope:        eu",
        "state:        done",
        "attempt:      1",
        "began:        2027-01-15T08:00:00Z (90 s ago)",
        "finished:     2027-01-15T08:00:00Z (90 s ago)",
        "forgotten:    2027-01-16T08:00:00Z (in 24 h)",
        "owner:        owner-1",
        "fence:        1800000000000000",
        "fingerprint:  print",
        f"stored key:   {1:040x}",
        'result:       {"id": "ch_1"}',
    ]


def test_show_tells_of_a_lease_that_runs(shop: Shop, capsys: Out) -> None:
    shop.running("o-1")
    assert ask("show", "o-1") == 0
    out = capsys.readouterr().out
    assert "state:        running\n" in out
    assert "lease ends:   2027-01-15T08:00:30Z (in 30 s)\n" in out
    assert "result" not in out
    assert "forgotten" not in out


def test_show_tells_of_a_doubt(shop: Shop, capsys: Out) -> None:
    shop.doubtful("o-1")
    shop.clock.advance(3 * 3600.0)
    assert ask("show", "o-1") == 0
    assert "state:        in doubt since 2027-01-15T08:00:00Z (3 h ago)\n" in capsys.readouterr().out


def test_show_tells_of_an_error_that_is_remembered(shop: Shop, capsys: Out) -> None:
    shop.done("o-1", b'{"v":1,"error":{"type":"shop:CardDeclined","base":"shop:CardDeclined","message":"no money"}}')
    assert ask("show", "o-1") == 0
    assert "error:        shop:CardDeclined: no money\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "result",
    [b"", b"\xff\xfe", b"17", b'{"v":2,"ok":1}', b'{"v":1}', b'{"v":1,"error":"text"}', b"[" * 5000, b'{"ok":1e999}'],
    ids=lambda result: repr(result[:20]),
)
def test_a_result_that_is_not_ours_is_shown_as_bytes(result: bytes, shop: Shop, capsys: Out) -> None:
    shop.done("o-1", result)
    assert ask("show", "o-1") == 0
    assert f"result:       {len(result)} bytes, not JSON of ours: b'" in capsys.readouterr().out
    assert ask("show", "o-1", "--json") == 0
    assert "base64" in json.loads(capsys.readouterr().out)[0]


def test_show_finds_by_the_stored_key(shop: Shop, capsys: Out) -> None:
    shop.running("o-1", stored=STORED)
    assert ask("show", STORED) == 0
    assert "key:          o-1\n" in capsys.readouterr().out
    assert ask("show", STORED.replace("0", "1")) == 1


def test_a_key_may_look_like_a_stored_one(shop: Shop, capsys: Out) -> None:
    shop.running(STORED)
    assert ask("show", STORED) == 0
    assert f"key:          {STORED}\n" in capsys.readouterr().out


def test_show_shows_all_that_have_the_key_and_no_other(shop: Shop, capsys: Out) -> None:
    shop.running("o-1", "shop:refund")
    shop.running("o-1", "shop:charge", "eu")
    shop.running("o-1", "shop:charge", "us")
    shop.running("o-11")
    shop.running("x", "o-1")
    assert ask("show", "o-1") == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.splitlines()[1:3] for block in blocks] == [
        ["function:     shop:charge", "scope:        eu"],
        ["function:     shop:charge", "scope:        us"],
        ["function:     shop:refund", "scope:"],
    ]
    assert ask("show", "o-1", "--function", "shop:charge", "--scope", "us", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["key"], found["function"], found["scope"]) == ("o-1", "shop:charge", "us")
    assert ask("show", "o-1", "--function", "shop") == 1


@pytest.mark.parametrize("key", ['a "quoted" key', "back\\slash", "é ☃", "100%_*?", "line\nbreak", "tab\t"])
def test_keys_of_any_text_are_found(key: str, shop: Shop, capsys: Out) -> None:
    shop.running(key)
    assert ask("show", key, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["key"] == key


def test_show_as_json_is_whole(shop: Shop, capsys: Out) -> None:
    shop.done("o-1", json.dumps({"v": 1, "ok": "x" * 5000}).encode())
    assert ask("show", "o-1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "key": "o-1",
            "function": "shop:charge",
            "scope": "",
            "stored_key": f"{1:040x}",
            "state": "done",
            "attempt": 1,
            "fence": 1_800_000_000_000_000,
            "owner": "owner-1",
            "fingerprint": "print",
            "began_at": "2027-01-15T08:00:00Z",
            "mark": "2027-01-15T08:00:00Z",
            "expires_at": "2027-01-16T08:00:00Z",
            "result": "x" * 5000,
        }
    ]


def test_what_another_codec_kept_is_shown_as_it_is(shop: Shop, capsys: Out) -> None:
    shop.done("o-1", b'{"v":1,"raw":"AAEC"}')
    assert ask("show", "o-1") == 0
    assert 'result:       "AAEC"\n' in capsys.readouterr().out


def test_nothing_found_is_said_and_is_1(shop: Shop, capsys: Out) -> None:
    assert ask("show", "o-1") == 1
    assert ask("list") == 1
    assert ask("forget", "o-1", "--why", "x") == 1
    got = capsys.readouterr()
    assert (got.out, got.err) == ("", "resilient idempotency: nothing found\n" * 3)


# -- list -----------------------------------------------------------------------------------------------------------


def test_list_is_a_table(shop: Shop, capsys: Out) -> None:
    shop.done("o-1", scope="eu")
    shop.clock.advance(60.0)
    shop.doubtful("order-2")
    shop.clock.advance(7200.0)
    shop.running("o-3", "shop:refund")
    assert ask("list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "STATE     KEY      FUNCTION     SCOPE  ATTEMPT  SINCE                 AGE",
        "done      o-1      shop:charge  eu     1        2027-01-15T08:00:00Z  2 h ago",
        "in doubt  order-2  shop:charge         1        2027-01-15T08:01:00Z  2 h ago",
        "running   o-3      shop:refund         1        2027-01-15T10:01:00Z  0 s ago",
    ]


@pytest.mark.parametrize(("state", "keys"), [("running", ["c"]), ("in-doubt", ["b"]), ("done", ["a"])])
def test_list_by_state(state: str, keys: list[str], shop: Shop, capsys: Out) -> None:
    shop.done("a")
    shop.doubtful("b")
    shop.running("c")
    assert ask("list", "--state", state, "--json") == 0
    assert [found["key"] for found in json.loads(capsys.readouterr().out)] == keys


@pytest.mark.parametrize(
    ("text", "keys"),
    [("o-1", ["o-1", "o-12"]), ("refund", ["x"]), ("eu", ["y"]), ('"', ['q"']), ("%", []), ("scope", [])],
)
def test_list_by_text_in_key_scope_or_function(text: str, keys: list[str], shop: Shop, capsys: Out) -> None:
    shop.running("o-1")
    shop.running("o-12")
    shop.running("x", "shop:refund")
    shop.running("y", scope="eu")
    shop.running('q"')
    assert ask("list", "--match", text, "--json") == (0 if keys else 1)
    assert [found["key"] for found in json.loads(capsys.readouterr().out or "[]")] == keys


def test_list_ends_at_its_limit_and_says_so(shop: Shop, capsys: Out) -> None:
    for number in range(450):
        shop.running(f"o-{number}")
    assert ask("list", "--limit", "3") == 0
    got = capsys.readouterr()
    assert len(got.out.splitlines()) == 4
    assert got.err == "resilient idempotency: there are more; --limit is 3\n"
    assert ask("list", "--limit", "450") == 0
    got = capsys.readouterr()
    assert (len(got.out.splitlines()), got.err) == (451, "")


def test_a_record_that_a_scan_repeats_is_listed_once(shop: Shop, capsys: Out) -> None:
    shop.running("o-1")
    real = shop.store._scan

    def twice(op: Any, now: float) -> Any:
        page = real(op, now)
        return replace(page, records=page.records * 2)

    shop.answer(stores.Scan, twice)
    assert ask("list") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("raw", ["not JSON", '{"key":5}', '{"key":""}', "[1]", '{"key":"a","scope":null}', "[" * 5000])
def test_a_label_that_is_not_ours_stands_for_the_key(raw: str, shop: Shop, capsys: Out) -> None:
    shop.done("", raw=raw)
    assert ask("list", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["key"] == raw


def test_a_record_without_a_label_is_listed_by_its_stored_key(shop: Shop, capsys: Out) -> None:
    shop.store.execute(Claim(STORED, "a", 30.0))
    assert ask("list") == 0
    assert STORED in capsys.readouterr().out


# -- purge and forget -----------------------------------------------------------------------------------------------


def test_purge_goes_on_until_none_is_left(shop: Shop, capsys: Out) -> None:
    shop.ttl = 1e9
    for number in range(7):
        shop.done(f"o-{number}")
    shop.doubtful("doubt")
    stays = STORED
    shop.store.execute(Claim(stays, "a", 1e9))
    assert ask("purge", "--older-than", "7d") == 0
    shop.clock.advance(7 * 86_400.0)
    late = shop.done("late")
    assert ask("purge", "--older-than", "7d", "--batch", "3") == 0
    assert capsys.readouterr().out == "purged 0 records\npurged 8 records\n"
    assert set(shop.store._rows) == {stays, late}
    assert ask("purge", "--older-than", "0") == 0
    assert capsys.readouterr().out == "purged 1 record\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("15m", 900), ("12h", 43_200), ("7d", 604_800), ("90", 90), ("1.5h", 5400), ("0", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert _cli_idempotency._duration(text) == seconds


@pytest.mark.parametrize("text", ["", "7w", "-1d", "d", "1e3", "7 d", "inf", "nan", "1d2h", "٣d", "9" * 400])
def test_what_is_no_duration_is_named(text: str, capsys: Out) -> None:
    with pytest.raises(SystemExit) as caught:
        ask("purge", f"--older-than={text}")
    assert caught.value.code == 2
    assert f"must be like 30s, 15m, 12h, 7d, or seconds, not {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "9" * 30])
def test_what_is_no_count_is_named(text: str, capsys: Out) -> None:
    with pytest.raises(SystemExit):
        ask("list", f"--limit={text}")
    assert f"must be a number from 1 on, not {text!r}" in capsys.readouterr().err


def test_forget_removes_what_is_in_doubt(shop: Shop, capsys: Out) -> None:
    stored = shop.doubtful("o-1")
    assert ask("forget", "o-1", "--why", "the bank says no charge") == 0
    assert capsys.readouterr().out == (
        "forgot o-1 of shop:charge, which was in doubt since 2027-01-15T08:00:00Z (0 s ago): the bank says no charge\n"
    )
    assert shop.store.execute(Read(stored)) is None


def test_forget_removes_a_result(shop: Shop, capsys: Out) -> None:
    stored = shop.done("o-1")
    assert ask("forget", stored, "--why", "test data") == 0
    assert "which was done: test data" in capsys.readouterr().out
    assert shop.store.execute(Read(stored)) is None


def test_forget_refuses_a_call_that_runs(shop: Shop, capsys: Out) -> None:
    stored = shop.running("o-1")
    assert ask("forget", "o-1", "--why", "impatience") == 1
    assert capsys.readouterr().err == "resilient idempotency: refused: a call with this key is running\n"
    assert shop.store.execute(Read(stored)) is not None


def test_forget_refuses_a_call_that_began_in_between(shop: Shop, capsys: Out) -> None:
    shop.doubtful("o-1")
    shop.answer(stores.Forget, lambda op, now: False)
    assert ask("forget", "o-1", "--why", "impatience") == 1
    assert "refused" in capsys.readouterr().err


def test_forget_wants_to_know_which(shop: Shop, capsys: Out) -> None:
    shop.doubtful("o-1")
    shop.doubtful("o-1", "shop:refund", "eu")
    assert ask("forget", "o-1", "--why", "x") == 2
    assert capsys.readouterr().err == (
        "resilient idempotency: 2 records have this key: shop:charge (scope ''), shop:refund (scope 'eu'). "
        "Say which, by --function and --scope\n"
    )
    assert len(shop.store._rows) == 2
    assert ask("forget", "o-1", "--why", "x", "--function", "shop:refund") == 0
    assert len(shop.store._rows) == 1


@pytest.mark.parametrize("why", [[], ["--why", " "]])
def test_forget_asks_for_a_reason(why: list[str], capsys: Out) -> None:
    with pytest.raises(SystemExit) as caught:
        ask("forget", "o-1", *why)
    assert caught.value.code == 2
    assert "--why" in capsys.readouterr().err


# -- hostile records ------------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]0;owned\x07 \r\n\x00\x9b31m \u202ereversed \u200b\ud7ff \U000e0001"


def harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["show", STORED], ["show", STORED, "--json"]])
def test_no_record_reaches_the_terminal_raw(arguments: list[str], shop: Shop, capsys: Out) -> None:
    hostile = label(f"k {HOSTILE}", HOSTILE, HOSTILE)
    fence = shop.store.execute(Claim(STORED, HOSTILE, 30.0, HOSTILE, hostile)).fence
    shop.store.execute(Finish(STORED, HOSTILE, fence, json.dumps({"v": 1, "ok": HOSTILE}).encode(), 60.0))
    other = shop.done("error", json.dumps({"v": 1, "error": {"type": HOSTILE, "message": HOSTILE}}).encode())
    shop.done("", HOSTILE.encode(), raw=HOSTILE)
    assert ask(*arguments) == 0
    assert ask("show", other) == 0
    got = capsys.readouterr()
    assert harmless(got.out + got.err)
    assert "owned" in got.out


def test_neither_forget_nor_a_refusal_writes_raw(shop: Shop, capsys: Out) -> None:
    shop.doubtful(HOSTILE.replace("\x00", ""), HOSTILE, HOSTILE)
    shop.doubtful(HOSTILE.replace("\x00", ""), HOSTILE + "2", HOSTILE)
    assert ask("forget", HOSTILE.replace("\x00", ""), "--why", HOSTILE) == 2
    assert ask("forget", HOSTILE.replace("\x00", ""), "--why", HOSTILE, "--function", HOSTILE) == 0
    got = capsys.readouterr()
    assert harmless(got.out)
    assert harmless(got.err)


def test_huge_texts_are_cut(shop: Shop, capsys: Out) -> None:
    shop.done("k" * 100_000, json.dumps({"v": 1, "ok": "r" * 1_000_000}).encode())
    assert ask("list") == 0
    assert ask("show", "k" * 100_000) == 0
    out = capsys.readouterr().out
    assert len(out) < 5000
    assert f"{'k' * 60}… (100000 characters)" in out
    assert f"{'k' * 300}… (100000 characters)" in out
    assert "… (1000002 characters)" in out


@pytest.mark.parametrize("at", [1e300, -1e300, float("nan"), float("inf"), 1e17])
def test_impossible_instants_are_shown(at: float, shop: Shop, capsys: Out) -> None:
    stored = shop.done("o-1")
    record = shop.store.execute(Read(stored))
    assert isinstance(record, Record)
    odd = replace(record, mark=at, began_at=at, expires_at=at)
    shop.answer(stores.Scan, lambda op, now: stores.Page((odd,), ""))
    assert ask("show", "o-1") == 0
    assert ask("show", "o-1", "--json") == 0
    assert ask("list") == 0
    assert f"the instant {at!r}" in capsys.readouterr().out


def test_a_terminal_that_knows_only_ascii_gets_ascii(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.done("é ☃ 𝄞")
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    assert ask("list") == 0
    assert b"\\xe9 \\u2603 \\U0001d11e" in out.getvalue()


def test_a_stream_without_an_encoding_gets_ascii(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.done("é")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert ask("list") == 0
    assert "\\xe9" in out.getvalue()


# -- stores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["list"], ["show", "k"], ["purge", "--older-than", "1"], ["forget", "k", "--why", "x"]]
)
def test_a_file_that_is_not_there_is_not_made(arguments: list[str], tmp_path: Path, capsys: Out) -> None:
    """A wrong path was an empty store, in which nothing was found."""
    assert ask(*arguments, "--store", f"SQLite:///{tmp_path}/no%20such.db?durability=normal") == 2
    err = capsys.readouterr().err
    assert err.startswith(
        f"resilient idempotency: there is no file {tmp_path}/no such.db: is it the store's path, seen"
    )
    assert list(tmp_path.iterdir()) == []


class Unread(io.TextIOWrapper):
    """A stdout whose reader has left, as that of `| head -1`."""

    def __init__(self) -> None:
        reads, writes = os.pipe()
        os.close(reads)
        super().__init__(os.fdopen(writes, "wb"), encoding="utf-8")


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["show", "o-1"]])
def test_a_reader_that_leaves_is_no_error(
    arguments: list[str], shop: Shop, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resilient idempotency list | head -1` said that the store cannot be asked: Broken pipe."""
    shop.done("o-1")
    with Unread() as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert ask(*arguments) == 141
    assert capsys.readouterr().err == ""


def test_without_a_store_the_command_says_how_to_name_one(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESILIENT_STORE", raising=False)
    assert ask("list") == 2
    assert capsys.readouterr().err == (
        "resilient idempotency: which store? Give --store URL, or set the environment variable RESILIENT_STORE\n"
    )


def test_the_option_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def opened(url: str) -> MemoryStore:
        asked.append(url)
        return MemoryStore()

    monkeypatch.setattr(stores, "open", opened)
    monkeypatch.setenv("RESILIENT_STORE", "memory://")
    assert ask("list") == 1
    assert ask("list", "--store", "memory:") == 1
    assert asked == ["memory://", "memory:"]


def test_an_unknown_scheme_is_one_line_without_the_password(capsys: Out) -> None:
    assert ask("list", "--store", "mongo://user:secret@host/db") == 2
    assert ask("list", "--store", "memory://user:secret@host/db") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("resilient idempotency: url names no store that is known: 'mongo'")
    assert second.endswith("not 'memory://***@host/db'")
    assert "secret" not in first + second


@pytest.mark.parametrize(
    "error",
    [
        StoreError("no answer from host\nwithin 5 s"),
        ConnectionRefusedError("no answer from host\nwithin 5 s"),
        ImportError("no answer from host\nwithin 5 s"),
    ],
)
def test_a_store_that_cannot_be_asked_is_one_line(
    error: Exception, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Sick:
        def execute(self, op: Any, /) -> Any:
            raise error

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(stores, "open", lambda url: Sick())  # pyright: ignore[reportUnknownLambdaType]
    for arguments in (["list"], ["show", "k"], ["purge", "--older-than", "1"], ["forget", "k", "--why", "x"]):
        assert ask(*arguments, "--store", "sick://") == 2
        line = "resilient idempotency: the store cannot be asked: no answer from host\\nwithin 5 s\n"
        assert capsys.readouterr().err == line
    assert closed == [True] * 4


def test_a_store_without_close_for_coroutines_only_is_refused(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tasks:
        async def aexecute(self, op: Any, /) -> Any: ...

        def __repr__(self) -> str:
            return "Tasks()"

    monkeypatch.setattr(stores, "open", lambda url: Tasks())  # pyright: ignore[reportUnknownLambdaType]
    assert ask("list", "--store", "tasks://") == 2
    assert capsys.readouterr().err == "resilient idempotency: Tasks() serves coroutines only\n"


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [("redis://127.0.0.1:1/0", "redis", "redis"), ("postgresql://127.0.0.1:1/x", "psycopg", "postgres")],
)
def test_a_missing_driver_names_the_extra(url: str, module: str, extra: str) -> None:
    # In a process of its own: here everything may be imported already.
    code = (
        "import sys\n"
        f"sys.modules[{module!r}] = None\n"
        "from resilient.cli import main\n"
        f"sys.exit(main(['idempotency', 'list', '--store', {url!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"pip install 'resilient-kit[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bytes_that_are_no_text_are_refused(capsys: Out) -> None:
    with pytest.raises(SystemExit) as caught:
        ask("show", "\udcff")
    assert caught.value.code == 2
    assert "must be text, not bytes like '\\udcff'" in capsys.readouterr().err


def test_no_verb_shows_the_help(capsys: Out) -> None:
    assert ask() == 2
    assert "forget" in capsys.readouterr().out


def test_a_file_is_looked_into_from_the_shell(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/keys.db"
    store = stores.open(url)
    fence = store.execute(Claim(STORED, "a", 30.0, "print", label("o-1"))).fence
    store.execute(Finish(STORED, "a", fence, b'{"v":1,"ok":42}', 60.0))
    store.close()

    def shell(*arguments: str) -> tuple[int, str]:
        code = "import sys; from resilient.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "idempotency", *arguments, "--store", url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.stderr
        return done.returncode, done.stdout

    code, text = shell("show", "o-1")
    assert code == 0
    assert "result:       42\n" in text
    assert shell("forget", "o-1", "--why", "test")[0] == 0
    assert shell("purge", "--older-than", "0") == (0, "purged 0 records\n")


class Declined(Exception):
    """What the bank says."""


def test_what_idempotent_keeps_is_found_and_shown(tmp_path: Path, capsys: Out) -> None:
    url = f"sqlite:///{tmp_path}/keys.db"
    store = stores.open(url)

    @Idempotent(store, key="order", scope="eü", remember=(Declined,))
    def charge(order: str, cents: int) -> dict[str, int]:
        if cents < 0:
            raise KeyboardInterrupt
        if cents > 1000:
            raise Declined("no money")
        return {"cents": cents}

    key = 'o-"1" ☃\\'
    charge(key, 500)
    with pytest.raises(Declined):
        charge("o-2", 5000)
    with pytest.raises(KeyboardInterrupt):
        charge("o-3", -1)
    for order, line in (
        (key, 'result:       {"cents": 500}'),
        ("o-2", "Declined: no money"),
        ("o-3", "in doubt since"),
    ):
        assert (
            ask("show", order, "--store", url, "--function", f"{__name__}:{charge.__qualname__}", "--scope", "eü") == 0
        )
        assert line in capsys.readouterr().out
    assert ask("forget", "o-3", "--why", "never sent", "--store", url) == 0
    assert charge("o-3", 300) == {"cents": 300}
    store.close()
