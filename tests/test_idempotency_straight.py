"""The straight way of an idempotent call is its program: whatever store, heartbeat and function do, both do the same.

The explorer proves what is promised of the program `once`, and a call of a new key goes another way: written out, up to
the first answer that is not the common one. Here both are given the same answers, all of them at each place, and must
ask the same of the store in the same order, show the function the same, and end alike. A mutant of each step is caught.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextvars import Context
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, cast

import pytest
from msgspec.structs import astuple, replace

from resilient import Env, Idempotent, InDoubt, StoreError, idempotency
from resilient._codec import Json, form_of
from resilient._drive import adrive, drive
from resilient._once import Hold, current, once, was_replayed
from resilient.stores._ops import Abandon, Acquired, Busy, Claim, Completed, Doubtful, Finish, Release
from resilient.testing import FakeClock

WAYS = ("plain", "asyncio")
NAME = "resilient"
OUTER = Hold("around", "around", "another")


class Refused(Exception):
    """A failure that is remembered."""


def _lost(maybe_written: bool) -> Callable[[], StoreError]:
    return lambda: StoreError("the store failed", maybe_written=maybe_written)


# What each may do: an error is made anew for each way, since notes and causes are written on it.
CLAIMS: tuple[Any, ...] = (
    Acquired(7, 1),
    Acquired(7, 2),
    Completed(7, 1, "", b'{"v":1,"ok":"before"}'),
    Completed(7, 1, "other", b'{"v":1,"ok":"before"}'),
    Busy(7, 1, "", 0.5),
    Doubtful(7, 1, "", 0.5),
    None,
    _lost(False),
    _lost(True),
    KeyboardInterrupt,
    asyncio.CancelledError,
    ZeroDivisionError,
    GeneratorExit,
)
BEGINNINGS: tuple[Any, ...] = (None, OSError, KeyboardInterrupt)
CALLS: tuple[Any, ...] = (
    "receipt",
    # As if it ended in another context: what is there is left alone.
    lambda: current.set(OUTER) and "receipt",
    object(),
    Refused,
    KeyError,
    lambda: InDoubt("f", "k", 1, reason="who knows"),
    KeyboardInterrupt,
    asyncio.CancelledError,
    GeneratorExit,
)
FINISHES: tuple[Any, ...] = (
    True,
    False,
    None,
    _lost(False),
    _lost(True),
    KeyboardInterrupt,
    asyncio.CancelledError,
    ZeroDivisionError,
    GeneratorExit,
)


class Fate(NamedTuple):
    """What a call meets."""

    claim: Any
    beginning: Any
    call: Any
    beating: bool
    finish: Any
    in_doubt: str
    # Whether it is made inside of another, after a replay, and with starts that are noted.
    inside: bool


def fates(claim: Any) -> Iterator[Fate]:
    takes = isinstance(claim, (Acquired, Doubtful)) or callable(claim)
    for inside in (False, True):
        if not takes:
            yield Fate(claim, None, "receipt", False, True, "raise", inside)
            continue
        for in_doubt in ("raise", "ask") if isinstance(claim, (Acquired, Doubtful)) else ("raise",):
            for beginning in BEGINNINGS[1:]:
                yield Fate(claim, beginning, "receipt", False, True, in_doubt, inside)
            for call, beating in itertools.product(CALLS, (False, True)):
                finishes = FINISHES if isinstance(call, str) or call is Refused else FINISHES[:1]
                for finish in finishes:
                    yield Fate(claim, None, call, beating, finish, in_doubt, inside)


class Run:
    """One call under `fate`: a store, a keeper, a function and a clock that do as it says, and write down the rest."""

    def __init__(self, fate: Fate) -> None:
        self.fate, self.log = fate, list[Any]()
        self.claims, self.finishes = [fate.claim], [fate.finish]
        self.holds: list[Hold] = []
        self.names: dict[str, str] = {}

    def _made(self, what: Any) -> Any:
        made = what() if callable(what) else what
        if isinstance(made, BaseException):
            raise made
        return made

    # -- the store ---------------------------------------------------------------------------------------------------

    def execute(self, op: Any) -> Any:
        self.log.append(replace(op, owner=self.names.setdefault(op.owner, f"owner {len(self.names)}")))
        self.log.append(self._scene())
        if type(op) is Claim:
            return self._made(self.claims.pop() if self.claims else Acquired(8, 1))
        if type(op) is Finish:
            return self._made(self.finishes.pop() if self.finishes else True)
        assert type(op) in (Release, Abandon)
        return True

    async def aexecute(self, op: Any) -> Any:
        return self.execute(op)

    # -- the keeper --------------------------------------------------------------------------------------------------

    def begin(self, hold: Hold) -> None:
        self.log.append(("begin", self._seen(hold), self._scene()))
        self.holds.append(hold)
        self._made(self.fate.beginning)

    def end(self, hold: Hold) -> bool:
        self.log.append(("end", self._seen(hold), self._scene()))
        return self.fate.beating

    # -- the function ------------------------------------------------------------------------------------------------

    def call(self, key: str, cents: int = 1) -> Any:
        self.log.append(("call", key, cents, self._scene()))
        return self._made(self.fate.call)

    async def acall(self, key: str, cents: int = 1) -> Any:
        return self.call(key, cents)

    def ask(self, key: str, cents: int = 1) -> str:
        self.log.append(("ask", key, cents, self._scene()))
        return "as it was"

    # -- what was seen -----------------------------------------------------------------------------------------------

    def _seen(self, hold: Hold | None) -> Any:
        if hold is None or hold is OUTER:
            return hold
        return [self._plain(part) for part in astuple(hold)]

    def _plain(self, part: Any) -> Any:
        if isinstance(part, Hold):
            return self._seen(part)
        if isinstance(part, str):
            return self.names.get(part, part)
        # (A set has the starts of the function.)
        return len(part) if isinstance(part, set) else part if isinstance(part, int) else type(part).__name__

    def _scene(self) -> Any:
        return self._seen(current.get()), was_replayed.get()

    def told(self, value: Any, error: BaseException | None) -> None:
        while error is not None:
            notes = getattr(error, "__notes__", [])
            self.log.append((type(error), str(error), notes, getattr(error, "result", ...), type(error.__context__)))
            error = error.__cause__
        self.log += [value, self._scene(), [self._seen(hold) for hold in self.holds]]


def policy_of(run: Run, made: type[Idempotent] = Idempotent) -> Idempotent:
    in_doubt: Any = run.ask if run.fate.in_doubt == "ask" else "raise"
    return made(run, key="key", name=NAME, remember=Refused, in_doubt=in_doubt, duplicates="raise")


def straight(run: Run, way: str, module: ModuleType = idempotency) -> tuple[Idempotent, Callable[..., Any]]:
    """The guarded function."""
    policy, env = policy_of(run, module.Idempotent), Env(FakeClock())
    call: Any = run.call if way == "plain" else run.acall
    fitted = policy.fit(_annotated(call))
    kind = "sync" if way == "plain" else "coro"
    if run.fate.inside:
        call = fitted.mark(call, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ThreadKeeper", lambda *settings: run)
        patch.setattr(module, "TaskKeeper", lambda *settings: run)
        return policy, getattr(fitted, kind)(call, env)


def program(run: Run, way: str) -> tuple[Idempotent, Callable[..., Any]]:
    """The same, by the program."""
    policy, env = policy_of(run), Env(FakeClock())
    how, form = policy._how, form_of(Json(), _annotated(run.call), (Refused,))
    assert form is not None
    call: Any = run.call if way == "plain" else run.acall
    fitted = policy.fit(_annotated(call))
    if run.fate.inside:
        call = fitted.mark(call, "sync" if way == "plain" else "coro")

    def begun(args: Any, kwargs: Any) -> Any:
        key, stored, label, print_ = fitted._address(args, kwargs)
        hold = Hold(key, stored)
        if run.fate.inside:
            hold.open, hold.home = set(), fitted
        return once(how, form, (Refused,), None, run, cast(Any, run), env, hold, print_, label)

    def plain(*args: Any, **kwargs: Any) -> Any:
        return drive(begun(args, kwargs), run, env, call, args, kwargs).result()

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        return (await adrive(begun(args, kwargs), run, env, call, args, kwargs)).result()

    return policy, plain if way == "plain" else coroutine


def _annotated(call: Any) -> Any:
    """A function like `call` that says what it returns, so that what it keeps is plain."""
    if asyncio.iscoroutinefunction(call):

        async def acharge(key: str, cents: int = 1) -> str:
            raise NotImplementedError

        return acharge

    def charge(key: str, cents: int = 1) -> str:
        raise NotImplementedError

    return charge


def logs(make: Any, fates: list[Fate], way: str) -> list[list[Any]]:
    """What came of each fate."""

    async def one(run: Run) -> None:
        policy, call = make(run, way)
        if run.fate.inside:
            current.set(OUTER)
            was_replayed.set(True)
        value, raised = None, None
        try:
            made = call("k", cents=2)
            value = made if way == "plain" else await made
        except BaseException as error:
            raised = error
        run.told(value, raised)
        how = policy._how
        run.log.append((how.replays, how.waits, how.lost, how.in_doubts, how.unprotected))

    async def main() -> list[list[Any]]:
        runs = [Run(fate) for fate in fates]
        for run in runs:
            await asyncio.create_task(one(run), context=Context())
        return [run.log for run in runs]

    return asyncio.run(main())


@cache
def expected(claim: Any, way: str) -> list[list[Any]]:
    """What the program makes of all fates that begin with `claim`."""
    return logs(program, list(fates(claim)), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: getattr(claim, "__name__", type(claim).__name__))
def test_the_straight_way_is_the_program(claim: Any, way: str) -> None:
    all_of_them = list(fates(claim))
    for fate, one, other in zip(all_of_them, logs(straight, all_of_them, way), expected(claim, way), strict=True):
        assert one == other, fate


MUTANTS = (
    ("hold.open, hold.home = set(), self", "pass"),
    (" or reply.attempt > 1", ""),
    ("print_, label, error)", "print_, label)"),
    ("except (Exception, GeneratorExit):", "except Exception:"),
    ("except (Exception, GeneratorExit):", "except GeneratorExit:"),
    ("print_, label, Cut(error))", "print_, label, StoreError(str(error)))"),
    ("= reply.fence, reply.attempt, how.name", "= reply.fence, 2, how.name"),
    ("= reply.fence, reply.attempt, how.name", "= 0, reply.attempt, how.name"),
    ("= reply.fence, reply.attempt, how.name", "= reply.fence, reply.attempt, hold.policy"),
    ("keeper.begin(hold)", "pass"),
    ("rest = unbegun(how, env, hold, failed, beating)", "raise failed.error"),
    ("if not begun and failed is not None:", "if False:"),
    ("hold.outer = outer", "pass"),
    ("current.set(hold)", "pass"),
    ("current.set(outer)", "pass"),
    ("except GeneratorExit:", "except ZeroDivisionError:"),
    ("beating = keeper.end(hold)", "beating = False"),
    ("if failed is None and not beating:", "if failed is None:"),
    ("if was_replayed.get():", "if False:"),
    ("rest = unkept(how, env, hold, fault)", "raise"),
    ("hold.fence, data, how.ttl", "0, data, how.ttl"),
    ("if reply is True:", "if True:"),
    ("Outcome(value, None), reply)", "Outcome(value, None), True)"),
    ("Outcome(value, None), error)", "Outcome(value, None), False)"),
    ("Outcome(value, None), Cut(error))", "Outcome(value, None), False)"),
    ("failed or Outcome(value, None), beating)", "failed or Outcome(value, None), False)"),
    ("failed or Outcome(value, None), beating)", "Outcome(value, None), beating)"),
)


def _caught(text: str, other: str) -> bool:
    """Whether the straight way with `other` in place of `text` does anything that the program does not."""
    source = inspect.getsource(idempotency)
    assert source.count(text) in (2, 4), "once or twice in each twin"
    mutant = ModuleType(idempotency.__name__)
    exec(compile(source.replace(text, other), "mutant", "exec"), vars(mutant))
    # (That the twins are the same is shown in `test_parity.py`.)
    return any(
        logs(lambda run, way: straight(run, way, mutant), list(fates(claim)), "plain") != expected(claim, "plain")
        for claim in (CLAIMS[0], CLAIMS[1], CLAIMS[7], KeyboardInterrupt, ZeroDivisionError, GeneratorExit)
    )


@pytest.mark.parametrize(("text", "other"), MUTANTS)
def test_mutants_of_the_straight_way_are_caught(text: str, other: str) -> None:
    """A proof that cannot fail proves nothing."""
    assert _caught(text, other)


def test_what_is_not_changed_is_no_mutant() -> None:
    assert not _caught("current.set(hold)", "current.set(hold)")
