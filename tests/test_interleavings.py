"""All interleavings of two and three callers of one key keep what is promised; and a mutant of each rule does not."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from resilient._codec import Json, form_of
from resilient._drive import Last, Outcome, Wait
from resilient._once import Hold, Tally, once
from resilient.errors import StoreError
from resilient.policy import Env
from resilient.stores import MemoryStore
from resilient.stores._ops import Abandon, Acquired, Busy, Claim, Claimed, Doubtful, Finish, Release, Renew
from tests.explorer import KEY, KINDS, LEASE, Broken, Explorer, Tamper, _Keeper

IN_DOUBT = ("raise", "rerun", "reconcile")
# Those that come in threes. The others differ from one of these in what is stored only, or in steps that pairs show.
THREES = ("succeeds", "fails", "crashes", "is paused", "is cancelled")


@pytest.mark.parametrize("in_doubt", IN_DOUBT)
@pytest.mark.parametrize("first", KINDS)
def test_pairs(first: str, in_doubt: str) -> None:
    kinds = list(KINDS)
    for second in kinds[kinds.index(first) :]:
        assert Explorer((first, second), in_doubt).run() > 30


@pytest.mark.parametrize("in_doubt", IN_DOUBT)
def test_pairs_that_do_not_wait(in_doubt: str) -> None:
    for pair in itertools.combinations_with_replacement(KINDS, 2):
        assert Explorer(pair, in_doubt, "raise", late=False).run() > 12


@pytest.mark.parametrize("in_doubt", IN_DOUBT)
def test_pairs_and_results_that_are_forgotten(in_doubt: str) -> None:
    for pair in itertools.combinations_with_replacement(THREES, 2):
        assert Explorer(pair, in_doubt, late=False, forget=True).run() > 40


@pytest.mark.parametrize("in_doubt", IN_DOUBT)
def test_a_store_that_fails_again_and_again(in_doubt: str) -> None:
    assert Explorer(("succeeds", "is unlucky"), in_doubt, luck=7).run() > 1000


@pytest.mark.parametrize("first", THREES)
def test_triples(first: str) -> None:
    for others in itertools.combinations_with_replacement(THREES[THREES.index(first) :], 2):
        assert Explorer((first, *others), "raise", late=False).run() > 200


@pytest.mark.parametrize("in_doubt", IN_DOUBT[1:])
@pytest.mark.parametrize("third", THREES)
def test_triples_that_take_over(third: str, in_doubt: str) -> None:
    """With one that is not well; `python -m tests.soak --ways` takes all triples, which is minutes."""
    for two in itertools.combinations_with_replacement(("succeeds", "fails"), 2):
        assert Explorer((*two, third), in_doubt, late=False).run() > 200


def test_a_claim_that_may_be_granted_is_given_back_though_the_last_word_of_the_store_was_no() -> None:
    how = Tally()
    how.name, how.lease, how.in_doubt, how.on_store_error = "pay", 30.0, "raise", "refuse"
    form = form_of(Json(), lambda: "", ())
    program = once(how, cast(Any, form), (), None, None, cast(Any, _Keeper()), Env(), Hold("k", "k", "me"), "", "")
    assert type(program.send(None)) is Claim
    assert type(program.send(StoreError("no answer", maybe_written=True))) is Claim
    refused = StoreError("no connection", maybe_written=False)
    assert program.send(refused) == Release("k", "me", 0)
    assert cast(Outcome, program.send(False)).error is refused


# -- mutants -----------------------------------------------------------------------------------------------------------


class UnconditionalFinish(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        row = self._rows.get(op.key)
        if row is not None:
            row.result, row.mark, row.expires = op.result, now, now + op.ttl
            self._end(op.key, row)
        return True


class FinishByOwnerAlone(MemoryStore):
    """It checks who owns the record, but a result that is there may be overwritten."""

    def _finish(self, op: Finish, now: float) -> bool:
        row = self._mine(op)
        if row is None:
            return False
        row.result = op.result if row.result is None else row.result + b" "
        row.mark, row.expires = now, now + op.ttl
        self._end(op.key, row)
        return True


class ReleaseByAnybody(MemoryStore):
    def _release(self, op: Release, now: float) -> bool:
        row = self._rows.pop(op.key, None)
        if row is not None:
            self._end(op.key, row)
        return True


class FenceThatStays(MemoryStore):
    def _take_locked(self, op: Claim, now: float, attempt: int) -> Acquired:
        row = self._rows.get(op.key)
        taken = super()._take_locked(op, now, attempt)
        fence = self._rows[op.key].fence = taken.fence if row is None else row.fence
        return Acquired(fence, attempt)


class LiveLeaseTakenOver(MemoryStore):
    """powertools#8386: a record whose owner lives is taken for one that is over."""

    def _claim(self, op: Claim, now: float) -> Claimed:
        row = self._rows.get(op.key)
        return super()._claim(op, now if row is None or row.owner == op.owner else max(now, row.mark))


class ClaimInTwoSteps(MemoryStore):
    """latch, benzene: GET, then SET."""

    two_steps = True


class NobodyRings(MemoryStore):
    def _end(self, key: str, row: Any) -> None:
        pass


class LostResult(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        return self._mine(op) is not None


class TakesOver(Tamper):
    """Claims take over whatever they find, under "raise"."""

    def step(self, step: Any) -> Any:
        return Claim(KEY, step.owner, step.lease, "", "", True, step.awaited) if type(step) is Claim else step


class LateResultForGood(Tamper):
    """An owner that lost its lease returns its result as if it had been stored."""

    def answer(self, step: Any, answer: Any) -> Any:
        return True if type(step) is Finish and answer is False else answer


class CancelledIsFailed(Tamper):
    """A cancelled call frees its key, whatever it did."""

    def step(self, step: Any) -> Any:
        if type(step) is Last and type(step.op) is Abandon:
            return Last(Release(KEY, step.op.owner, step.op.fence))
        return step


class NeverFrees(Tamper):
    """A failure leaves the key as it is."""

    def step(self, step: Any) -> Any:
        return Renew(KEY, step.owner, step.fence, LEASE) if type(step) is Release else step


@pytest.mark.parametrize(
    ("store", "kinds", "in_doubt", "promise"),
    [
        (UnconditionalFinish, ("is paused", "is paused"), "rerun", "changed by one who does not own it"),
        (FinishByOwnerAlone, ("succeeds", "is unlucky"), "raise", "a result that was stored is gone, or another"),
        (LiveLeaseTakenOver, ("succeeds", "succeeds"), "rerun", "changed by one who does not own it"),
        (ClaimInTwoSteps, ("succeeds", "succeeds"), "raise", "changed by one who does not own it"),
        (NobodyRings, ("succeeds", "succeeds"), "raise", "waits, and nobody rings"),
        (LostResult, ("succeeds", "succeeds"), "raise", "there is nothing to doubt"),
        (ReleaseByAnybody, ("is paused and fails", "succeeds"), "rerun", "changed by one who does not own it"),
        (FenceThatStays, ("is paused", "succeeds"), "rerun", "a fence did not grow"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mutants_of_the_store_are_caught(store: type[MemoryStore], kinds: Any, in_doubt: str, promise: str) -> None:
    with pytest.raises(Broken, match=promise) as caught:
        Explorer(kinds, in_doubt, store=store).run()
    assert caught.value.way


@pytest.mark.parametrize(
    ("tamper", "kinds", "in_doubt", "promise"),
    [
        (TakesOver, ("crashes", "succeeds"), "raise", "two completed effects"),
        (LateResultForGood, ("is paused", "succeeds"), "rerun", "which is not the result that is stored"),
        (CancelledIsFailed, ("is cancelled", "succeeds"), "raise", "two completed effects"),
        (NeverFrees, ("fails", "succeeds"), "raise", "there is nothing to doubt"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mutants_of_the_program_are_caught(tamper: type[Tamper], kinds: Any, in_doubt: str, promise: str) -> None:
    with pytest.raises(Broken, match=promise) as caught:
        Explorer(kinds, in_doubt, tamper=tamper()).run()
    assert caught.value.way


class Blind(Explorer):
    """Sees nothing but effects and what callers get."""

    def _judge(self, state: Any, op: Any, reply: Any, after: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("store", "kinds", "in_doubt", "promise"),
    [
        (UnconditionalFinish, ("is paused", "is paused"), "rerun", "which is not the result that is stored"),
        (
            ReleaseByAnybody,
            ("is paused and fails", "crashes", "succeeds"),
            "reconcile",
            "which is not the result that is stored",
        ),
        (ClaimInTwoSteps, ("is paused", "is paused"), "raise", "two completed effects"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mutants_are_caught_by_what_callers_get_alone(store: Any, kinds: Any, in_doubt: str, promise: str) -> None:
    with pytest.raises(Broken, match=promise):
        Blind(kinds, in_doubt, store=store).run()


def test_who_once_tried_to_take_over_never_frees_the_key_though_it_waited_since() -> None:
    """Its claim may arrive late, after another has come and gone: what is in doubt must not become free by that."""
    how = Tally()
    how.name, how.lease, how.in_doubt, how.on_store_error = "pay", 30.0, "rerun", "refuse"
    how.duplicates, how.max_wait = "wait", None
    form = form_of(Json(), lambda: "", ())
    store, keeper = MemoryStore(), cast(Any, _Keeper())
    program = once(how, cast(Any, form), (), None, store, keeper, Env(), Hold("k", "k", "me"), "", "")
    assert type(program.send(None)) is Claim
    assert program.send(Doubtful(1, 1, "", 5.0)) == Claim("k", "me", 30.0, take_over=True)
    assert program.send(StoreError("no answer", maybe_written=True)) == Claim("k", "me", 30.0, take_over=True)
    assert type(program.send(Busy(2, 2, "", 9.0))) is Wait
    again = Claim("k", "me", 30.0, awaited=True)
    assert program.send(None) == again
    step: Any = None
    for _ in range(2):
        step = program.send(StoreError("no answer", maybe_written=True))
    assert step == Abandon("k", "me", 0)
    program.close()
