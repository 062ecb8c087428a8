"""The program behind an idempotent call: claim the key, run, keep the result; or get what another call left there.

A generator that yields operations and decides by their answers (see `_drive`). It holds to one rule: once the function
has started, the key is free again only if every start of it is known to have ended. Where that is not known, the key
stays in doubt; and what is known is never lost to a store that fails for a moment. Pure: it does no I/O of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

from resilient._ambient import nearest
from resilient._binding import digest
from resilient._codec import noted
from resilient._drive import RUN, Ask, Cut, Last, Outcome, Program, Settle, Sleep, Wait
from resilient._guard import _Turned
from resilient._keeper import Beat
from resilient.errors import IdempotencyError, InDoubt, InFlight, KeyReused, Rejected, StoreError
from resilient.stores._ops import Abandon, Acquired, Busy, Claim, Completed, Doubtful, Finish, Release

if TYPE_CHECKING:
    from resilient._codec import Form
    from resilient._keeper import TaskKeeper, ThreadKeeper
    from resilient.policy import Env

__all__ = [
    "RERUN",
    "Hold",
    "Tally",
    "current",
    "ended",
    "once",
    "unbegun",
    "unfinished",
    "unkept",
    "unlocked",
    "was_replayed",
]


class _Rerun:
    def __repr__(self) -> str:
        return "RERUN"


RERUN: Any = _Rerun()
"""What a reconcile function returns when the earlier attempt had no effect: the function is run again."""


class Hold(Beat, eq=False):
    """The claim of a running call, as its function sees it.

    `key` is the user's key, `attempt` is 1 for the first attempt, `fence` grows with every claim of the key, `lost`
    says that the lease went to somebody else meanwhile. `derive(purpose)` makes keys for what the function calls;
    `raise claim().doubt(reason)` says that nobody knows how it ended.
    """

    policy: str = "idempotent"
    outer: Any = None
    # The starts of the function that did not raise; None while it is called directly.
    open: set[object] | None = None
    # Whose call this is, where starts are noted.
    home: Any = None
    # The store whose rows a transaction of the caller's holds: this one, or all of them.
    locks: Any = None
    locks_all: bool = False

    def derive(self, purpose: str) -> str:
        """A key for a call that this one makes: 32 hexadecimal digits, the same in every attempt, others for others."""
        if not isinstance(purpose, str) or not purpose:
            raise ValueError(f"purpose must be some text, not {purpose!r}")
        return str(digest(self.stored.encode(), purpose.encode()).hexdigest()[:32])

    def doubt(self, reason: str) -> InDoubt:
        """An error for the function to raise where it cannot know whether its effect happened: a lost answer, say.

        Any other exception says that there was no effect, and frees the key; this one leaves it in doubt.
        """
        return InDoubt(self.policy, self.key, self.attempt, reason=reason)

    def __repr__(self) -> str:
        return f"<claim of {self.key!r}, attempt {self.attempt}, fence {self.fence}>"


current: ContextVar[Hold | None] = ContextVar("resilient.claim", default=None)
was_replayed: ContextVar[bool] = ContextVar("resilient.replayed", default=False)


def unlocked(hold: Hold | None, store: Any, stored: str) -> None:
    """`StoreError` if a transaction that is open around this, `hold`, keeps `store` from a claim of `stored`."""
    while hold is not None:
        if hold.locks is store and (hold.locks_all or hold.stored == stored):
            raise StoreError(
                f"the transaction of {hold.key!r} that is open here has {store!r} locked until it ends, and would be "
                "waited for by what is inside of it: make this call before or after it, or give it another store (file)"
            )
        hold = hold.outer


class Tally:
    """What a policy counts, and the settings of its calls that its program needs."""

    __slots__ = (
        "duplicates",
        "in_doubt",
        "in_doubts",
        "lease",
        "lost",
        "max_wait",
        "name",
        "on_store_error",
        "replays",
        "ttl",
        "unprotected",
        "waits",
    )

    name: str
    ttl: float
    lease: float
    duplicates: str
    max_wait: float | None
    in_doubt: Any
    on_store_error: str

    def __init__(self) -> None:
        self.replays = self.waits = self.lost = self.in_doubts = self.unprotected = 0


def once(
    how: Tally,
    form: Form,
    remember: tuple[type[Exception], ...],
    keeps: Any,
    store: Any,
    keeper: ThreadKeeper | TaskKeeper,
    env: Env,
    hold: Hold,
    fingerprint: str,
    label: str,
    reply: Any = ...,
) -> Program:
    """One call. The answer is its outcome, or that of the call that the store remembers.

    `reply`: what the store said to the first claim, where that has been asked already.
    """
    if reply is ...:
        reply = yield Claim(hold.stored, hold.owner, how.lease, fingerprint, label)
    if type(reply) is not Acquired:
        reply = yield from _contend(how, form, store, env, hold, fingerprint, label, reply)
        if isinstance(reply, Outcome):
            yield reply
            return reply
    hold.fence, hold.attempt, hold.policy = reply.fence, reply.attempt, how.name
    beating = begun = False
    settled: Outcome | None = None
    outcome: Outcome
    try:
        keeper.begin(hold)
        hold.outer = current.get()
        current.set(hold)
        begun = True
        if reply.attempt > 1 and callable(how.in_doubt):
            settled = yield Ask(how.in_doubt)
        if settled is None or (settled.error is None and settled.value is RERUN):
            settled = None
            outcome = yield RUN
        else:
            outcome = settled
    except BaseException as error:
        if begun:
            raise
        outcome = Outcome(None, error)
    finally:
        # By this alone there is no other heartbeat: a signal may interrupt whatever is called here.
        hold.over = True
        beating = keeper.end(hold)
        # Closed by the garbage collector, it may end in another context: what is there is not its own.
        if current.get() is hold:
            current.set(hold.outer)
    if not begun:
        return (yield from unbegun(how, env, hold, outcome, beating))
    return (yield from ended(how, form, remember, keeps, env, hold, outcome, beating, settled))


def ended(
    how: Tally,
    form: Form,
    remember: tuple[type[Exception], ...],
    keeps: Any,
    env: Env,
    hold: Hold,
    outcome: Outcome,
    beating: bool,
    settled: Outcome | None = None,
) -> Program:
    """The rest of a call once its function, or what was asked in its place (`settled`), has ended with `outcome`."""
    # A cancel that comes while a heartbeat is waited for counts as one that comes at the last word.
    late: Any = (yield Settle(hold)) if beating else None
    error = outcome.error
    if was_replayed.get() is not (settled is not None and error is None):
        was_replayed.set(settled is not None and error is None)
    if settled is not None and error is not None:
        cut = yield from _abandon(how, env, hold, error, late)
        if cut is not None or not isinstance(error, Exception):
            return Outcome(None, cut or error)
        how.in_doubts += 1
        raise InDoubt(how.name, hold.key, hold.attempt, reason="asking how the earlier attempt ended failed") from error
    if error is None:
        if keeps is not None and not keeps(outcome.value):
            cut = yield from _release(how, env, hold, None, late)
            return outcome if cut is None else Outcome(None, cut)
        try:
            data = form.keep(outcome.value)
        except Exception as fault:
            return (yield from unkept(how, env, hold, fault, late))
        reply = (yield Finish(hold.stored, hold.owner, hold.fence, data, how.ttl)) if late is None else late
        if reply is not True:
            yield from _finish(how, env, hold, data, outcome, reply)
        yield outcome
        return outcome
    # A start that did not raise may have had its effect: it runs on, was cut off, or returned what nobody got.
    # Or its function says itself that it does not know.
    unknown = isinstance(error, InDoubt) or (not isinstance(error, Exception) if hold.open is None else bool(hold.open))
    if type(error) is _Turned:
        unknown = False
    if not unknown and isinstance(error, remember) and not isinstance(error, _NO_RESULTS):
        yield from _finish(how, env, hold, form.keep_error(error), outcome, late)
        return outcome
    cut = yield from (_abandon if unknown else _release)(how, env, hold, error, late)
    return outcome if cut is None else Outcome(None, cut)


def unbegun(how: Tally, env: Env, hold: Hold, outcome: Outcome, beating: bool) -> Program:
    """The rest of a call whose heartbeat could not begin: no thread could be started, say, or a signal came first.

    Its function has not run.
    """
    late: Any = (yield Settle(hold)) if beating else None
    error = outcome.error
    cut = yield from (_abandon if hold.attempt > 1 else _release)(how, env, hold, error, late)
    return outcome if cut is None or not isinstance(error, Exception) else Outcome(None, cut)


def unkept(how: Tally, env: Env, hold: Hold, fault: Exception, late: Cut | None = None) -> Program:
    """The rest of a call whose result cannot be kept."""
    cut = yield from _abandon(how, env, hold, None, late)
    if cut is not None:
        return Outcome(None, cut)
    fault.add_note(f"resilient: {how.name} ran, and what it returned cannot be kept: its key {hold.key!r} is in doubt")
    try:
        raise fault
    finally:
        del fault


def unfinished(how: Tally, env: Env, hold: Hold, data: bytes, outcome: Outcome, reply: Any) -> Program:
    """The rest of a call that the store did not finish with `data`: it said `reply`."""
    yield from _finish(how, env, hold, data, outcome, reply)
    return outcome


# Whoever remembers every Exception does not mean these: they say that nothing was asked, or nothing is known.
_NO_RESULTS = (IdempotencyError, Rejected, StoreError)
_KNOWN = (Completed, Busy, Doubtful)


# -- before the call -------------------------------------------------------------------------------------------------


def _contend(
    how: Tally, form: Form, store: Any, env: Env, hold: Hold, fingerprint: str, label: str, reply: Any
) -> Generator[Any, Any, Any]:
    """Until the key is the caller's (`Acquired`), or it has what another call left (`Outcome`), or raise."""
    stored, who, key = hold.stored, hold.owner, hold.key
    began: float | None = None
    tries = rounds = 0
    maybe = take = taking = False
    was_replayed.set(False)
    while True:
        kind = cast(Any, type(reply))
        if kind is Acquired:
            return reply
        if kind in _KNOWN and fingerprint and reply.fingerprint not in ("", fingerprint):
            raise KeyReused(how.name, key, reply.fingerprint, fingerprint)
        if kind is Completed:
            return _replay(how, form, env, key, reply)
        if kind is Doubtful:
            if how.in_doubt == "raise":
                how.in_doubts += 1
                raise InDoubt(how.name, key, reply.attempt)
            # Not at the first claim: who comes with other arguments is to be told so, and must not take it over.
            take = taking = True
            reply = yield Claim(stored, who, how.lease, fingerprint, label, True, began is not None)
            continue
        # What may have been taken over stays in doubt; anything else can only be a claim under which nothing ran.
        leave = (Abandon if taking else Release)(stored, who, 0)
        if kind is Cut:
            # The claim may have been granted in that moment.
            yield Last(leave)
            return Outcome(None, reply.error)
        if kind is StoreError:
            # Claiming again is harmless, and tells whether the first claim got there.
            tries += 1
            maybe = maybe or reply.maybe_written
            if reply.maybe_written and tries < 3:
                awaited = began is not None
                reply = yield Claim(stored, who, how.lease, fingerprint, label, take, awaited)
                continue
            if maybe:
                cut = yield leave
                if type(cut) is Cut:
                    yield Last(leave)
                    return Outcome(None, cut.error)
            if how.on_store_error == "refuse":
                return Outcome(None, reply)
            return (yield from _unprotected(how, env, hold, reply))
        if began is None:
            began = env.clock.now()
            how.waits += 1
        pause = _patience(how, store, env, hold, reply.lease_left, began, rounds)
        rounds += 1
        if pause is None:
            raise InFlight(how.name, key, reply.lease_left)
        cut = yield Wait(stored, pause)
        if type(cut) is Cut:
            return Outcome(None, cut.error)
        take = False
        reply = yield Claim(stored, who, how.lease, fingerprint, label, take, True)


def _patience(
    how: Tally, store: Any, env: Env, hold: Hold, lease_left: float, began: float, rounds: int
) -> float | None:
    """How long to wait before asking again; None if no longer."""
    if how.duplicates == "raise":
        return None
    outer = current.get()
    while outer is not None:
        if outer.stored == hold.stored:
            return None  # It would wait for itself.
        outer = outer.outer
    now = env.clock.now()
    left = nearest(env.clock) - now
    if how.max_wait is not None:
        left = min(left, began + how.max_wait - now)
    if left <= 0:
        return None
    poll: float | None = getattr(store, "poll", None)
    if poll is None:
        # Memory rings whoever waits; a store that cannot ring is asked again and again, and more and more seldom.
        poll = lease_left if hasattr(store, "watch") else 0.1
    if poll <= 0.2:
        poll = min(poll, 0.005 * 2 ** min(rounds, 8))
        poll *= 0.5 + env.rng.random() / 2
    # No longer than the lease: nobody rings when that ends. A little more, so that it has ended then.
    return max(0.0, min(left, poll, lease_left + 0.001))


def _replay(how: Tally, form: Form, env: Env, key: str, reply: Completed) -> Outcome:
    value, error = form.outcome(reply.result)
    how.replays += 1
    was_replayed.set(True)
    if error is not None:
        noted(error, f"resilient: replayed: attempt {reply.attempt} with the key {key!r} ended so")
    if env.sinks:
        from resilient.events import Replayed

        env.emit(Replayed(how.name, key, reply.attempt))
    return Outcome(value, error)


def _unprotected(how: Tally, env: Env, hold: Hold, error: StoreError) -> Generator[Any, Any, Outcome]:
    """Run without a key, because the user said so for when the store fails.

    The function has a claim all the same, with fence 0, under which every resource that looks at fences refuses it.
    What it derives is what it would be under a true claim: that is all the protection that is left.
    """
    _bare(how, env, hold, error)
    hold.fence = hold.attempt = 0
    hold.policy = how.name
    hold.outer = current.get()
    try:
        current.set(hold)
        outcome: Outcome = yield RUN
    finally:
        if current.get() is hold:
            current.set(hold.outer)
    return outcome


def _bare(how: Tally, env: Env, hold: Hold, error: StoreError) -> None:
    """Count a call without protection, and tell."""
    how.unprotected += 1
    if env.sinks:
        from resilient.events import Unprotected

        env.emit(Unprotected(how.name, hold.key, error))


# -- after the call --------------------------------------------------------------------------------------------------


def _finish(how: Tally, env: Env, hold: Hold, data: bytes, outcome: Outcome, reply: Any) -> Generator[Any, Any, None]:
    """Keep `data`, however often it takes; else `outcome` becomes an error that says so. `reply`: what came already."""
    op = Finish(hold.stored, hold.owner, hold.fence, data, how.ttl)
    if reply is None:
        reply = yield op
    cut: BaseException | None = None
    # Within what is left of the lease at the worst, and a few seconds.
    tries = 6
    while type(reply) is Cut or (type(reply) is StoreError and tries):
        if type(reply) is Cut:
            cut, tries = reply.error, min(tries, 2)
        else:
            if cut is None:
                paused = yield Sleep(min(0.05 * 2 ** (6 - tries), how.lease / 12) * (0.5 + env.rng.random() / 2))
                cut = paused.error if type(paused) is Cut else None
            tries -= 1
        reply = yield (op if cut is None else Last(op))
    error, text = outcome.error, ""
    fault: Exception | None = None
    result: object = ... if error is not None else outcome.value
    if type(reply) is StoreError and how.on_store_error == "run":
        _bare(how, env, hold, reply)
    elif type(reply) is StoreError:
        text = f"resilient: {how.name} ran; how it ended could not be stored, and its key {hold.key!r} is in doubt"
        fault = reply
        reply.result = result
        reply.add_note(text)
    elif reply is not True:
        _lost(how, env, hold)
        text = "its lease was over while it ran, and the key is another's: what it returned is not stored"
        fault = InDoubt(how.name, hold.key, hold.attempt, result, text)
    if cut is not None:
        # Who is cancelled stays so, whatever became of the result.
        outcome.value, outcome.error = None, cut
        if fault is not None:
            cut.add_note(text)
    elif fault is not None:
        fault.__cause__ = error
        outcome.value, outcome.error = None, fault


def _lost(how: Tally, env: Env, hold: Hold) -> None:
    if not hold.lost:
        hold.lost = True
        lost(how, env, hold)


def lost(how: Tally, env: Env, hold: Hold) -> None:
    """Count a lease that was lost, and tell."""
    how.lost += 1
    if env.sinks:
        from resilient.events import LeaseLost

        env.emit(LeaseLost(how.name, hold.key, hold.attempt))


def _release(
    how: Tally, env: Env, hold: Hold, error: BaseException | None, late: Cut | None = None
) -> Generator[Any, Any, BaseException | None]:
    return _insist(how, env, hold, error, Release(hold.stored, hold.owner, hold.fence), late)


def _abandon(
    how: Tally, env: Env, hold: Hold, error: BaseException | None, late: Cut | None = None
) -> Generator[Any, Any, BaseException | None]:
    return _insist(how, env, hold, error, Abandon(hold.stored, hold.owner, hold.fence), late)


def _insist(
    how: Tally, env: Env, hold: Hold, error: BaseException | None, op: Release | Abandon, late: Cut | None
) -> Generator[Any, Any, BaseException | None]:
    """Say the last word on a key; the cancel that arrived meanwhile (or before: `late`), if any.

    `error` is what the caller gets. If the store does not take it, the key is in doubt when its lease ends.
    """
    cut = None if late is None else late.error
    last = cut is not None or (error is not None and not isinstance(error, Exception))
    reply: Any = None
    for tries in range(3):
        reply = yield (Last(op) if last else op)
        if type(reply) is Cut:
            cut, last = reply.error, True
        elif type(reply) is not StoreError:
            # (A repeated one may find that the first got there.)
            if reply is False and not tries:
                _lost(how, env, hold)
            return cut
    if error is not None and type(reply) is StoreError:
        error.add_note(
            f"resilient: {how.name}: the store was not told ({reply}): the key {hold.key!r} will be in doubt"
        )
    return cut
