"""Sagas from outside: finish what dead processes began, look at them, and decide where nobody else can.

`recover` finds sagas whose lease is over and finishes them: durable bodies forward, from their journal; blocks, and
whatever was being undone already, backwards. One saga that cannot be finished keeps no other from it. Several
recoverers at once are no trouble: the lease and its fence let one of them have each saga. What a person decides is
refused where it would break a promise. Each function has an async twin, with an `a` before its name. Safe from any
thread and loop.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw

from resilient._book import TTL, in_flight, stored_key
from resilient._drive import Outcome, Program, adrive, drive
from resilient._journal import read, vouch_for, write
from resilient._keeper import Beat
from resilient._recovery import HANDS, Job, Recoverer, Report, SagaRecord, aone, one, pages, record_of
from resilient._saga_views import Story, describe, mermaid, timeline
from resilient._settle import never
from resilient._takeover import Again, asked, ended
from resilient.errors import SagaError
from resilient.policy import SYSTEM
from resilient.stores._open import shared
from resilient.stores._ops import Acquired, Busy, Claim, Finish, History, Record, Release

if TYPE_CHECKING:
    from collections.abc import Iterable

    from resilient.policy import Env
    from resilient.retry import Retry

__all__ = [
    "Report",
    "SagaRecord",
    "Story",
    "aabandon",
    "abandon",
    "acompensate",
    "alist_sagas",
    "arecover",
    "aresume",
    "ashow",
    "compensate",
    "describe",
    "list_sagas",
    "mermaid",
    "recover",
    "resume",
    "show",
    "timeline",
    "vouch",
]

STATES = {"running": "running", "compensating": "running", "orphaned": "in doubt", "stuck": "in doubt"}
"""The state of the record, by that of the saga; for the others it is "done"."""

ALL_STATES = (*STATES, "done", "aborted", "abandoned", "damaged")


def vouch(*modules: str) -> None:
    """Import these modules, and let journals name functions of theirs, and of what is inside them.

    A journal is data: what it names is called only if it is in a package that has a durable body, if this process has
    recorded it itself, or if somebody vouches for its module. Nothing is imported because a journal names it.
    """
    for module in modules:
        importlib.import_module(module)
        vouch_for(module)


# -- recovery --------------------------------------------------------------------------------------------------------


def recover(
    store: Any,
    *,
    name: str = "",
    modules: Iterable[str] = (),
    retries: Retry | None = None,
    lease: float = 30.0,
    concurrency: int = HANDS,
    env: Env = SYSTEM,
) -> Report:
    """Finish the sagas in `store` whose processes have died, those of `name` if given; say what came of each.

    Durable sagas go on forward if this process has imported their bodies. Functions that only a journal names must be
    in `modules` (see `vouch`). `retries` and `lease` are for what is undone without a body (see `Saga`). Async bodies
    and compensations are run in event loops of their own.

    `concurrency`: how many sagas are gone on with beside each other, in threads; with 1, in this one. They share the
    commits of the store. An interrupt lets those in hand come to their end, and begins no other; a second one leaves
    them as they are.
    """
    recoverer = Recoverer(_store(store), name=name, retries=retries, lease=lease, concurrency=concurrency, env=env)
    vouch(*modules)
    return recoverer.round()


async def arecover(
    store: Any,
    *,
    name: str = "",
    modules: Iterable[str] = (),
    retries: Retry | None = None,
    lease: float = 30.0,
    concurrency: int = HANDS,
    env: Env = SYSTEM,
) -> Report:
    """Finish the sagas in `store` whose processes have died. See `recover`.

    `concurrency`: how many sagas are gone on with beside each other, in tasks; with 1, in this one. A cancel goes to
    all of them. Plain bodies and compensations run in these tasks, between awaits.
    """
    recoverer = Recoverer(_store(store), name=name, retries=retries, lease=lease, concurrency=concurrency, env=env)
    vouch(*modules)
    return await recoverer.around()


# -- looking ---------------------------------------------------------------------------------------------------------


def list_sagas(store: Any, *, state: str = "", name: str = "") -> list[SagaRecord]:
    """The sagas in a store, of one `state` and `name` if given. `state="stuck"`: those that need a person.

    The others are running, compensating, orphaned (to be recovered), done, aborted, abandoned and damaged (no journal
    of ours); any other word is a `ValueError`.
    """
    store = _store(store)
    found: list[SagaRecord] = drive(_listing(state, name), store, SYSTEM, never, (), {}).result()
    return found


async def alist_sagas(store: Any, *, state: str = "", name: str = "") -> list[SagaRecord]:
    """The sagas in a store. See `list_sagas`."""
    store = _store(store)
    found: list[SagaRecord] = (await adrive(_listing(state, name), store, SYSTEM, never, (), {})).result()
    return found


def show(store: Any, id: str, *, name: str = "") -> Story:
    """A saga, its journal, and its end if it has one. `LookupError` if there is none, or (without a name) several."""
    made: Story = drive(_showing(id, name), _store(store), SYSTEM, never, (), {}).result()
    return made


async def ashow(store: Any, id: str, *, name: str = "") -> Story:
    """A saga, its journal, and its end if it has one. See `show`."""
    made: Story = (await adrive(_showing(id, name), _store(store), SYSTEM, never, (), {})).result()
    return made


def _listing(state: str, name: str) -> Program:
    if state not in ("", *ALL_STATES):
        raise ValueError(f"state must be one of {', '.join(ALL_STATES)}, not {state!r}")
    found = yield from pages("" if not state else STATES.get(state, "done"))
    each = (one for page in found for one in page)
    return Outcome([one for one in each if state in ("", one.state) and name in ("", one.name)], None)


def _found(id: str, name: str) -> Generator[Any, Any, tuple[SagaRecord, tuple[bytes, ...], Record]]:
    keys: list[str] = [stored_key(name, id)]
    if not name:
        found = yield from pages("", f'"id":{msgspec.json.encode(id).decode()},')
        keys = sorted({one.key for page in found for one in page if one.id == id})
    if len(keys) > 1:
        raise LookupError(f"several sagas have the id {id!r}: say which by its name")
    got = asked((yield History(keys[0]))) if keys else None
    record = None if got is None else record_of(got[0])
    if got is None or record is None:
        raise LookupError(f"there is no saga with the id {id!r}")
    return record, got[1], got[0]


def _showing(id: str, name: str) -> Program:
    record, entries, raw = yield from _found(id, name)
    end = None if raw.result is None else ended(raw.result)
    return Outcome(Story(record, tuple([read(entry) for entry in entries]), end), None)


# -- what people decide ----------------------------------------------------------------------------------------------


def resume(store: Any, id: str, *, name: str = "", retries: Retry | None = None) -> SagaRecord:
    """Go on with a saga that is stuck or orphaned, as it was going: forward, or undoing. What it is after that.

    Refused (`SagaError`) for a block that was not being undone, and for what has ended; `InFlight` while it runs.
    `SagaStuck` if it is stuck again.
    """
    return _decided(store, id, name, "resume", retries)


async def aresume(store: Any, id: str, *, name: str = "", retries: Retry | None = None) -> SagaRecord:
    """Go on with a saga that is stuck or orphaned, as it was going. See `resume`."""
    return await _adecided(store, id, name, "resume", retries)


def compensate(store: Any, id: str, *, name: str = "", retries: Retry | None = None) -> SagaRecord:
    """Undo a saga that is stuck or orphaned, by its journal, or go on with that. What it is after that.

    Refused (`SagaError`) past its pivot, and for what has ended; `InFlight` while it runs. `SagaStuck` if a
    compensation fails for good.
    """
    return _decided(store, id, name, "compensate", retries)


async def acompensate(store: Any, id: str, *, name: str = "", retries: Retry | None = None) -> SagaRecord:
    """Undo a saga that is stuck or orphaned. See `compensate`."""
    return await _adecided(store, id, name, "compensate", retries)


def abandon(store: Any, id: str, why: str, *, name: str = "") -> SagaRecord:
    """End a saga that is stuck or orphaned as it is, because a person says so, and keep `why`. What it is after that.

    Nothing is run or undone; its journal need not be readable. `InFlight` while it runs, `SagaError` if it has ended.
    """
    made: SagaRecord = drive(_abandoning(id, name, _why(why)), _store(store), SYSTEM, never, (), {}).result()
    return made


async def aabandon(store: Any, id: str, why: str, *, name: str = "") -> SagaRecord:
    """End a saga that is stuck or orphaned as it is. See `abandon`."""
    made: SagaRecord = (await adrive(_abandoning(id, name, _why(why)), _store(store), SYSTEM, never, (), {})).result()
    return made


def _decided(store: Any, id: str, name: str, again: Again, retries: Retry | None) -> SagaRecord:
    store = _store(store)
    record: SagaRecord = drive(_finding(id, name), store, SYSTEM, never, (), {}).result()
    one(Job(store, record.name, record.id, again, retries))
    after: SagaRecord = drive(_finding(id, record.name), store, SYSTEM, never, (), {}).result()
    return after


async def _adecided(store: Any, id: str, name: str, again: Again, retries: Retry | None) -> SagaRecord:
    store = _store(store)
    record: SagaRecord = (await adrive(_finding(id, name), store, SYSTEM, never, (), {})).result()
    await aone(Job(store, record.name, record.id, again, retries))
    after: SagaRecord = (await adrive(_finding(id, record.name), store, SYSTEM, never, (), {})).result()
    return after


def _finding(id: str, name: str) -> Program:
    record, _, _ = yield from _found(id, name)
    return Outcome(record, None)


def _abandoning(id: str, name: str, why: str) -> Program:
    record, _, raw = yield from _found(id, name)
    if raw.state == "done":
        raise SagaError(f"it has ended already: {record.state}", record.name, id)
    beat = Beat(id, raw.key)
    reply = asked((yield Claim(raw.key, beat.owner, 30.0, "", raw.label, True)))
    if type(reply) is Busy:
        raise in_flight(record.name, id, reply.lease_left)
    if type(reply) is not Acquired:
        raise SagaError("it has just ended", record.name, id)
    if reply.attempt == 1:
        asked((yield Release(raw.key, beat.owner, reply.fence)))
        raise LookupError(f"there is no saga with the id {id!r} any more")
    end = write({"v": 1, "saga": "abandoned", "at": SYSTEM.clock.at(), "done": dict[str, Raw](), "error": why})
    if not asked((yield Finish(raw.key, beat.owner, reply.fence, end, TTL))):
        raise SagaError("another process has just taken it over", record.name, id)
    return (yield from _finding(id, record.name))


def _why(why: str) -> str:
    if not isinstance(why, str) or not why.strip():
        raise ValueError(f"why must say something, not {why!r}")
    return why


def _store(store: Any) -> Any:
    return shared(store) if isinstance(store, str) else store
