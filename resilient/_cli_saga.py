"""The command `resilient saga`: look at the sagas of a store, decide about them, and finish what processes left.

What sagas contain is shown escaped and cut: it comes from data, and a terminal obeys. Functions that a journal names
are called only if they are in the modules that the command is given. Exit codes: 0 found or done, 1 nothing found,
refused, or a person is needed, 2 wrong use or the store cannot be asked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from resilient import _cli_text as tty
from resilient._cli_text import VARIABLE, Refusal
from resilient.clock import SystemClock

if TYPE_CHECKING:
    from resilient.sagas import Report, SagaRecord

__all__ = ["add", "run"]

STATES = ("running", "compensating", "orphaned", "stuck", "done", "aborted", "abandoned", "damaged")
PATIENCE = 3
HANDS = 8
"""As many as `recover` has; importing that would bring in the stores before a command needs one."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the parser."""
    parent = commands.add_parser(
        "saga",
        help="what a store knows of sagas, and what is to become of them",
        description="Looks into the store of sagas, and finishes them. Exit code 0: found, or done; 1: nothing found, "
        "refused, or a person is needed; 2: the store cannot be asked.",
    )
    parent.set_defaults(saga_help=parent.print_help)
    verbs = parent.add_subparsers(dest="verb", metavar="command")

    def verb(name: str, does: Callable[[Any, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        parser.set_defaults(does=does, url="", modules=[])
        if name != "worker":
            parser.add_argument(
                "--store",
                metavar="URL",
                help=f"such as sqlite:///sagas.db (default: the environment variable {VARIABLE})",
            )
        return parser

    listing = verb("list", _list, "list the sagas of a store")
    listing.add_argument("--state", choices=STATES, help="only those in this state")
    listing.add_argument("--limit", type=_count, default=100, metavar="N", help="at most so many (default: 100)")
    show = verb("show", _show, "show what happened in one saga")
    show.add_argument("--mermaid", action="store_true", help="as a diagram for Mermaid")
    resume = verb("resume", _resume, "go on with a saga that is stuck or orphaned, as it was going")
    compensate = verb("compensate", _compensate, "undo a saga that is stuck or orphaned")
    abandon = verb("abandon", _abandon, "end a saga that is stuck or orphaned as it is")
    abandon.add_argument("--why", type=tty.reason, required=True, metavar="TEXT", help="the reason; it is kept")
    recover = verb("recover", _recover, "finish the sagas whose processes have died")
    worker = verb("worker", _worker, "recover orphans again and again, until SIGTERM or SIGINT")
    worker.add_argument("url", metavar="URL", help="the store, such as sqlite:///sagas.db")
    worker.add_argument("modules", nargs="+", metavar="MODULE", help="modules with durable bodies and compensations")
    worker.add_argument("--every", type=_seconds, default=5.0, metavar="SECONDS", help="a look each (default: 5)")
    worker.add_argument("--once", action="store_true", help="one look, and the exit code of `recover`")
    for parser in (recover, worker):
        parser.add_argument(
            "--concurrency",
            type=_count,
            default=HANDS,
            metavar="N",
            help=f"sagas to go on with beside each other, in threads (default: {HANDS})",
        )
    for parser in (show, resume, compensate, abandon):
        parser.add_argument("id", type=tty.text, metavar="ID", help="the id of the saga")
    for parser in (listing, show, resume, compensate, abandon, recover, worker):
        parser.add_argument("--name", type=tty.text, default="", metavar="NAME", help="only sagas of this name")
    for parser in (resume, compensate, recover):
        parser.add_argument(
            "--module",
            action="append",
            default=[],
            dest="modules",
            metavar="M",
            help="a module with durable bodies and compensations; may be given several times",
        )
    for parser in (listing, show):
        parser.add_argument("--json", action="store_true", help="all that is known, as JSON")


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return value


def run(chosen: argparse.Namespace) -> int:
    """Do what was chosen and return the exit code."""
    if chosen.verb is None:
        chosen.saga_help()
        return 2
    url: str = chosen.url or getattr(chosen, "store", None) or os.environ.get(VARIABLE, "")
    try:
        if not url:
            raise Refusal(f"which store? Give --store URL, or set the environment variable {VARIABLE}", 2)
        return _with_store(url, chosen)
    except Refusal as refusal:
        line = str(refusal).replace(url, tty.hidden(url)) if url else str(refusal)
        print(tty.encodable(f"resilient saga: {tty.safe(line, 1000)}", sys.stderr), file=sys.stderr)
        return refusal.code


def _with_store(url: str, chosen: argparse.Namespace) -> int:
    from resilient.errors import IdempotencyError, SagaError, StoreError
    from resilient.sagas import vouch
    from resilient.stores import Store
    from resilient.stores._open import forget_shared, shared

    if chosen.modules and os.getcwd() not in sys.path:
        # As `python -m` would: the modules are the application's.
        sys.path.insert(0, os.getcwd())
    try:
        for module in chosen.modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                raise Refusal(f"module {module} cannot be imported: {type(error).__name__}: {error}", 2) from None
        vouch(*chosen.modules)
        try:
            # The very store that the modules have, if they name it by the same URL.
            store = shared(url)
        except (ValueError, ImportError, OSError, StoreError) as error:
            raise Refusal(str(error), 2) from None
        if not isinstance(store, Store):
            raise Refusal(f"{store!r} serves coroutines only", 2)
        path = tty.absent(url, store)
        if path and chosen.does not in (_recover, _worker):
            raise tty.missing(path)
        if path:
            # These may begin before the application that they are for.
            text = f"resilient saga: there is no file {tty.safe(path, 1000)} yet: it is made"
            print(tty.encodable(text, sys.stderr), file=sys.stderr, flush=True)
        try:
            code: int = chosen.does(store, chosen)
        except (ImportError, OSError, StoreError) as error:
            raise Refusal(f"the store cannot be asked: {error}", 2) from None
        except (SagaError, IdempotencyError, LookupError) as error:
            raise Refusal(_told(error), 1) from None
        return code
    finally:
        forget_shared()


def _told(error: BaseException) -> str:
    """An error as one line, with those in it."""
    from resilient.errors import SagaStuck

    parts: list[str] = []
    if isinstance(error, SagaStuck):
        parts = [f"{type(one).__name__}: {one}" for one in error.exceptions]
    said = str(error.args[0]) if type(error) is LookupError and error.args else str(error)
    return "; ".join([said, *parts])


# -- what it does ----------------------------------------------------------------------------------------------------


def _list(store: Any, chosen: argparse.Namespace) -> int:
    from resilient.sagas import list_sagas

    found = list_sagas(store, state=chosen.state or "", name=chosen.name)
    if not found:
        raise Refusal("nothing found", 1)
    found.sort(key=lambda one: (one.began_at, one.name, one.id))
    shown = found[-chosen.limit :]
    if chosen.json:
        tty.say(json.dumps([_object(one) for one in shown], indent=2))
    else:
        now = SystemClock.at()
        rows: list[tuple[str, ...]] = [("STATE", "SAGA", "ID", "VERSION", "ATTEMPT", "BEGAN", "AGE")]
        for one in shown:
            cells = (one.state, one.name, one.id, one.version, one.attempt)
            shape = tuple(tty.safe(str(cell), 60) for cell in cells)
            rows.append((*shape, tty.instant(one.began_at), tty.age(now - one.began_at)))
        tty.say(tty.aligned(rows))
    if len(found) > len(shown):
        print(
            f"resilient saga: there are {len(found)}, and these are the last; --limit is {chosen.limit}",
            file=sys.stderr,
        )
    return 0


def _object(record: SagaRecord) -> dict[str, Any]:
    return {
        "saga": record.name,
        "id": record.id,
        "version": record.version,
        "state": record.state,
        "attempt": record.attempt,
        "began_at": tty.instant(record.began_at),
        "mark": tty.instant(record.mark),
        "stored_key": record.key,
    }


def _show(store: Any, chosen: argparse.Namespace) -> int:
    import msgspec

    from resilient.sagas import describe, mermaid, show, timeline

    story = show(store, chosen.id, name=chosen.name)
    if chosen.json:
        entries = [json.loads(msgspec.json.encode(entry)) for entry in story.entries]
        tty.say(json.dumps({**describe(story), **_object(story.record), "entries": entries}, indent=2))
    else:
        tty.say(mermaid(story) if chosen.mermaid else timeline(story))
    return 0


def _resume(store: Any, chosen: argparse.Namespace) -> int:
    from resilient.sagas import resume

    return _decided(resume, store, chosen)


def _compensate(store: Any, chosen: argparse.Namespace) -> int:
    from resilient.sagas import compensate

    return _decided(compensate, store, chosen)


def _decided(decide: Any, store: Any, chosen: argparse.Namespace) -> int:
    from resilient.errors import ResilientError

    try:
        record: SagaRecord = decide(store, chosen.id, name=chosen.name)
    except (ResilientError, LookupError):
        raise
    except Exception as error:
        # A step's own, after the pivot.
        raise Refusal(f"it failed: {type(error).__name__}: {error}", 1) from None
    tty.say(f"{tty.safe(str(record), 200)} is {record.state}")
    return 0


def _abandon(store: Any, chosen: argparse.Namespace) -> int:
    from resilient.sagas import abandon

    record = abandon(store, chosen.id, chosen.why, name=chosen.name)
    tty.say(f"{tty.safe(str(record), 200)} is {record.state}: {tty.safe(chosen.why, 1000)}")
    return 0


def _recover(store: Any, chosen: argparse.Namespace) -> int:
    from resilient._recovery import Recoverer

    report = Recoverer(store, name=chosen.name, concurrency=chosen.concurrency, say=_line).round()
    tty.say(str(report))
    return _code(report)


def _code(report: Report) -> int:
    return 1 if report.stuck or report.left else 0


def _line(record: SagaRecord, how: str, error: Exception | None) -> None:
    """One line for one saga."""
    words = {"finished": "finished", "compensated": "undone", "stuck": "STUCK", "left": "left"}
    why = "" if error is None else f": {tty.safe(f'{type(error).__name__}: {_told(error)}', 500)}"
    with suppress(tty.Gone):  # The work is what counts: it goes on if nobody reads of it.
        tty.say(f"{tty.instant(SystemClock.at())}  {words[how]}  {tty.safe(str(record), 200)}{why}")


def _worker(store: Any, chosen: argparse.Namespace) -> int:
    from resilient._cli_worker import Bell
    from resilient._recovery import Recoverer
    from resilient.errors import StoreError

    with Bell() as bell:

        def say(record: SagaRecord, how: str, error: Exception | None) -> None:
            _line(record, how, error)
            times, again = recoverer.failing.get(record.key, (0, 0))
            if how == "left" and times >= PATIENCE:
                later = again - recoverer.rounds
                tty.say(f"    failed {times} times: it is looked at again in {later} rounds")

        recoverer = Recoverer(store, name=chosen.name, concurrency=chosen.concurrency, stop=bell.rung, say=say)
        while True:
            try:
                report = recoverer.round()
            except StoreError as error:
                if chosen.once:
                    raise
                report = None
                line = f"{tty.instant(SystemClock.at())}  the store cannot be asked: {error}"
                print(tty.encodable(tty.safe(line, 500), sys.stderr), file=sys.stderr, flush=True)
            if chosen.once and report is not None:
                return _code(report)
            if bell.wait(chosen.every):
                tty.say(f"{tty.instant(SystemClock.at())}  ended by signal {bell.signal}")
                return 0
