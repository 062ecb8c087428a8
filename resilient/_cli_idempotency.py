"""The command `resilient idempotency`: what a store knows of keys, for people, and what they may do about it.

Shows, lists, purges and forgets records by the operations of `resilient.stores`, of any store that has a URL. Whatever
records contain is shown escaped and cut: it comes from callers, and a terminal obeys. `--json` is whole, and plain
ASCII. Exit codes: 0 found or done, 1 nothing found or refused, 2 wrong use or the store cannot be asked.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from resilient import _cli_text as tty
from resilient._cli_text import VARIABLE, Refusal
from resilient.clock import SystemClock

if TYPE_CHECKING:
    from resilient.stores import Record, Store

__all__ = ["add", "run"]

STATES = {"running": "running", "in-doubt": "in doubt", "done": "done"}
UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
PAGE = 200


class Entry(NamedTuple):
    """A record, and what its label says. A label that is not ours stands in place of the key."""

    record: Record
    key: str
    function: str
    scope: str


# -- the command line -----------------------------------------------------------------------------------------------


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the parser."""
    parent = commands.add_parser(
        "idempotency",
        help="what a store knows of idempotency keys",
        description="Looks into the store of `Idempotent`. Exit code 0: found, or done; 1: nothing found, or refused; "
        "2: the store cannot be asked.",
    )
    parent.set_defaults(idempotency_help=parent.print_help)
    verbs = parent.add_subparsers(dest="verb", metavar="command")

    def verb(name: str, does: Callable[[Store, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        parser.set_defaults(does=does)
        parser.add_argument(
            "--store", metavar="URL", help=f"such as sqlite:///keys.db (default: the environment variable {VARIABLE})"
        )
        return parser

    show = verb("show", _show, "show all that is known of one key")
    listing = verb("list", _list, "list the keys of a store")
    listing.add_argument("--state", choices=list(STATES), help="only those in this state")
    listing.add_argument(
        "--match", type=tty.text, metavar="TEXT", default="", help="only those with TEXT in key, scope or function"
    )
    listing.add_argument("--limit", type=_count, default=100, metavar="N", help="at most so many (default: 100)")
    purge = verb("purge", _purge, "remove records that ended some time ago, by result or by doubt")
    purge.add_argument(
        "--older-than", type=_duration, required=True, metavar="TIME", help="30s, 15m, 12h, 7d, or seconds"
    )
    purge.add_argument("--batch", type=_count, default=1000, metavar="N", help="so many in one step (default: 1000)")
    forget = verb("forget", _forget, "remove one record, finished or in doubt, so that its call may run again")
    forget.add_argument("--why", type=tty.reason, required=True, metavar="TEXT", help="the reason; it is printed")
    for parser in (show, forget):
        parser.add_argument(
            "key", type=tty.text, metavar="KEY", help="the key as the caller gave it, or the stored one"
        )
        parser.add_argument("--function", metavar="NAME", help="only of this function, module:name")
        parser.add_argument("--scope", metavar="TEXT", help="only of this scope")
    for parser in (show, listing):
        parser.add_argument("--json", action="store_true", help="whole records, as JSON")


def _duration(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smhd]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be like 30s, 15m, 12h, 7d, or seconds, not {text!r}")
    return float(found[1]) * UNITS[found[2]]


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!r}")
    return int(text)


def run(chosen: argparse.Namespace) -> int:
    """Do what was chosen and return the exit code."""
    if chosen.verb is None:
        chosen.idempotency_help()
        return 2
    url: str = chosen.store or os.environ.get(VARIABLE, "")
    try:
        if not url:
            raise Refusal(f"which store? Give --store URL, or set the environment variable {VARIABLE}", 2)
        return _with_store(url, chosen)
    except Refusal as refusal:
        line = str(refusal).replace(url, tty.hidden(url)) if url else str(refusal)
        print(tty.encodable(f"resilient idempotency: {tty.safe(line, 1000)}", sys.stderr), file=sys.stderr)
        return refusal.code


def _with_store(url: str, chosen: argparse.Namespace) -> int:
    from resilient import stores
    from resilient.errors import StoreError

    try:
        store = stores.open(url)
    except (ValueError, ImportError, OSError, StoreError) as error:
        raise Refusal(str(error), 2) from None
    with closing(store) if hasattr(store, "close") else nullcontext():
        if not isinstance(store, stores.Store):
            raise Refusal(f"{store!r} serves coroutines only", 2)
        path = tty.absent(url, store)
        if path:
            raise tty.missing(path)
        try:
            code: int = chosen.does(store, chosen)
        except (ImportError, OSError, StoreError) as error:
            raise Refusal(f"the store cannot be asked: {error}", 2) from None
    return code


# -- what it does ---------------------------------------------------------------------------------------------------


def _show(store: Store, chosen: argparse.Namespace) -> int:
    found = _found(store, chosen)
    if chosen.json:
        tty.say(_whole(found))
    else:
        now = SystemClock.at()
        tty.say("\n\n".join(_block(entry, now) for entry in found))
    return 0


def _list(store: Store, chosen: argparse.Namespace) -> int:
    state = STATES.get(chosen.state)
    text = json.dumps(chosen.match, ensure_ascii=False)[1:-1]
    found: list[Entry] = []
    for entry in _scan(store, text):
        if state in (None, entry.record.state) and any(chosen.match in part for part in entry[1:]):
            found.append(entry)
            if len(found) > chosen.limit:
                break
    if not found:
        raise Refusal("nothing found", 1)
    shown = found[: chosen.limit]
    if chosen.json:
        tty.say(_whole(shown))
    else:
        now = SystemClock.at()
        rows: list[tuple[str, ...]] = [("STATE", "KEY", "FUNCTION", "SCOPE", "ATTEMPT", "SINCE", "AGE")]
        for record, key, function, scope in shown:
            since = record.began_at if record.state == "running" else record.mark
            cells = (key, function, scope, record.attempt)
            rows.append(
                (record.state, *(tty.safe(str(cell), 60) for cell in cells), tty.instant(since), tty.age(now - since))
            )
        tty.say(tty.aligned(rows))
    if len(found) > len(shown):
        print(f"resilient idempotency: there are more; --limit is {chosen.limit}", file=sys.stderr)
    return 0


def _purge(store: Store, chosen: argparse.Namespace) -> int:
    from resilient.stores import Purge

    total = 0
    while True:
        removed = store.execute(Purge(chosen.older_than, chosen.batch))
        total += removed
        if removed < chosen.batch:
            break
    tty.say(f"purged {total} {'record' if total == 1 else 'records'}")
    return 0


def _forget(store: Store, chosen: argparse.Namespace) -> int:
    from resilient.stores import Forget

    found = _found(store, chosen)
    if len(found) > 1:
        each = ", ".join(f"{entry.function} (scope {entry.scope!r})" for entry in found[:5])
        raise Refusal(f"{len(found)} records have this key: {each}. Say which, by --function and --scope", 2)
    (entry,) = found
    if entry.record.state == "running" or not store.execute(Forget(entry.record.key)):
        raise Refusal("refused: a call with this key is running", 1)
    was, _ = _state(entry.record, SystemClock.at())
    key, function, why = tty.safe(entry.key, 200), tty.safe(entry.function, 200), tty.safe(chosen.why, 1000)
    tty.say(f"forgot {key} of {function}, which was {was}: {why}")
    return 0


def _found(store: Store, chosen: argparse.Namespace) -> list[Entry]:
    """Those that KEY means: by the stored key, and by the caller's in a label."""
    from resilient.stores import Read

    found: dict[str, Entry] = {}
    if re.fullmatch("[0-9a-f]{40}", chosen.key):
        record = store.execute(Read(chosen.key))
        if record is not None:
            found[record.key] = _entry(record)
    for entry in _scan(store, json.dumps(chosen.key, ensure_ascii=False)):
        if entry.key == chosen.key:
            found[entry.record.key] = entry
    wanted = [
        entry
        for entry in found.values()
        if chosen.function in (None, entry.function) and chosen.scope in (None, entry.scope)
    ]
    if not wanted:
        raise Refusal("nothing found", 1)
    return sorted(wanted, key=lambda entry: (entry.function, entry.scope, entry.record.key))


def _scan(store: Store, text: str) -> Iterator[Entry]:
    """All records whose label contains `text`, each once."""
    from resilient.stores import Scan

    seen: set[str] = set()
    after = ""
    while True:
        page = store.execute(Scan(after, PAGE, text))
        for record in page.records:
            if record.key not in seen:
                seen.add(record.key)
                yield _entry(record)
        if not page.after:
            return
        after = page.after


def _entry(record: Record) -> Entry:
    label = _decoded(record.label.encode("utf-8", "replace"))
    if isinstance(label, dict):
        said = cast("dict[str, object]", label)
        key, function, scope = (said.get(name, "") for name in ("key", "function", "scope"))
        if key and isinstance(key, str) and isinstance(function, str) and isinstance(scope, str):
            return Entry(record, key, function, scope)
    return Entry(record, record.label or record.key, "", "")


# -- how it looks ---------------------------------------------------------------------------------------------------


def _block(entry: Entry, now: float) -> str:
    record = entry.record
    was, mark = _state(record, now)
    lines = [
        ("key", tty.safe(entry.key, 300)),
        ("function", tty.safe(entry.function, 300)),
        ("scope", tty.safe(entry.scope, 300)),
        ("state", was),
        ("attempt", str(record.attempt)),
        ("began", tty.when(record.began_at, now)),
        mark,
        *([] if record.expires_at is None else [("forgotten", tty.when(record.expires_at, now))]),
        ("owner", tty.safe(record.owner, 100)),
        ("fence", str(record.fence)),
        ("fingerprint", tty.safe(record.fingerprint, 100)),
        ("stored key", tty.safe(record.key, 100)),
        *([] if record.result is None else [_outcome(record.result)]),
    ]
    return tty.aligned([(f"{name}:", value) for name, value in lines])


def _state(record: Record, now: float) -> tuple[str, tuple[str, str]]:
    """The state in words, and what its mark means."""
    when = tty.when(record.mark, now)
    if record.state == "running":
        return "running", ("lease ends", when)
    if record.state == "done":
        return "done", ("finished", when)
    return f"in doubt since {when}", ("lease ended", when)


def _outcome(data: bytes) -> tuple[str, str]:
    kept = _envelope(data)
    if "error" in kept:
        error = kept["error"]
        return "error", tty.safe(f"{error.get('type')}: {error.get('message')}", 300)
    if "result" in kept:
        return "result", tty.safe(json.dumps(kept["result"], ensure_ascii=False), 300)
    return "result", f"{len(data)} bytes, not JSON of ours: {tty.safe(repr(data[:60]), 300)}"


def _envelope(data: bytes) -> dict[str, Any]:
    """What is in a stored result: `result`, or `error`, or `base64` of what is no envelope of ours."""
    envelope = _decoded(data)
    if isinstance(envelope, dict) and envelope.get("v") == 1:
        if isinstance(envelope.get("error"), dict):
            return {"error": envelope["error"]}
        for name in ("ok", "raw"):
            if name in envelope:
                return {"result": envelope[name]}
    return {"base64": base64.b64encode(data).decode()}


def _decoded(data: bytes) -> Any:
    """JSON, if it is; else None. Nothing deep: it must be written again."""
    import msgspec

    try:
        value = msgspec.json.decode(data)
        json.dumps(value)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError):
        return None
    return value


def _whole(entries: Sequence[Entry]) -> str:
    return json.dumps([_object(entry) for entry in entries], indent=2)


def _object(entry: Entry) -> dict[str, Any]:
    record = entry.record
    return {
        "key": entry.key,
        "function": entry.function,
        "scope": entry.scope,
        "stored_key": record.key,
        "state": record.state,
        "attempt": record.attempt,
        "fence": record.fence,
        "owner": record.owner,
        "fingerprint": record.fingerprint,
        "began_at": tty.instant(record.began_at),
        "mark": tty.instant(record.mark),
        "expires_at": None if record.expires_at is None else tty.instant(record.expires_at),
        **({} if record.result is None else _envelope(record.result)),
    }
