"""The contract suite finds what is broken: stores with one fault each, and the cases that must say so.

Every case of the suite is shown to fail for some store (those about journals: in `test_store_contract_journal`).
Besides: what the suite says, and how it is called.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from resilient._contract import Case, check, expect
from resilient._contract_cases import BODIES
from resilient._contract_journal import JOURNAL_BODIES
from resilient.clock import SystemClock
from resilient.stores import (
    Abandon,
    Acquired,
    Bells,
    Busy,
    Claim,
    Claimed,
    Completed,
    Doubtful,
    Finish,
    Forget,
    MemoryStore,
    Page,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
    Threaded,
    Watch,
)
from resilient.stores._ops import Append
from resilient.stores.memory import _Row
from resilient.testing import FakeClock, store_contract

S = TypeVar("S", bound="type[MemoryStore]")

MUTANTS: list[tuple[type[MemoryStore], str]] = []


def fails(*cases: str) -> Callable[[S], S]:
    """Say which cases must fail for a store."""

    def register(store: S) -> S:
        MUTANTS.extend((store, case) for case in cases)
        return store

    return register


def found(store: type[MemoryStore], name: str, world: str = "sync", **options: Any) -> Case:
    flags: dict[str, Any] = {"sync": False, "asyncio": False, world: True}
    made = store_contract(store, **flags, **options)
    return next(case for case in made if case.name == name)


# -- who may write --------------------------------------------------------------------------------------------------


@fails(
    "others_cannot_write",
    "others_cannot_write_after_the_lease",
    "an_old_fence_of_the_same_owner_is_refused",
    "a_late_owner_changes_nothing_after_a_takeover",
    "a_late_owner_does_not_overwrite_the_result",
)
class UnconditionalFinish(MemoryStore):
    """The fault of powertools 3.37: a late owner overwrites another's record."""

    def _finish(self, op: Finish, now: float) -> bool:
        row = self._rows.get(op.key)
        if row is None:
            return False
        row.result, row.mark, row.expires = op.result, now, now + op.ttl
        return True


@fails("others_cannot_write", "a_late_failure_does_not_delete_the_result", "nobody_undoes_a_result")
class ReleaseWithoutOwner(MemoryStore):
    """The other half of that fault: a late owner's failure deletes another's record."""

    def _release(self, op: Release, now: float) -> bool:
        return self._rows.pop(op.key, None) is not None


@fails("others_cannot_write", "a_late_owner_changes_nothing_after_a_takeover")
class RenewWithoutOwner(MemoryStore):
    def _renew(self, op: Renew, now: float) -> bool:
        row = self._rows.get(op.key)
        if row is None or row.result is not None:
            return False
        row.mark = now + op.lease
        return True


@fails("others_cannot_write", "others_cannot_write_after_the_lease")
class FenceUnchecked(MemoryStore):
    def _mine(self, op: Renew | Finish | Release | Abandon | Append) -> _Row | None:
        row = self._rows.get(op.key)
        return row if row is not None and row.owner == op.owner else None


@fails("fence_0_stands_for_whichever_the_owner_has")
class FenceZeroUnknown(MemoryStore):
    def _mine(self, op: Renew | Finish | Release | Abandon | Append) -> _Row | None:
        return super()._mine(op) if op.fence else None


@fails("nobody_undoes_a_result")
class OwnerUndoes(MemoryStore):
    def _release(self, op: Release, now: float) -> bool:
        row = self._mine(op)
        if row is None:
            return False
        del self._rows[op.key]
        return True


@fails("nobody_undoes_a_result")
class RenewsWhatIsDone(MemoryStore):
    def _renew(self, op: Renew, now: float) -> bool:
        return self._mine(op) is not None


@fails("nothing_can_be_written_where_nothing_is", "release_forgets_the_key")
class Upsert(MemoryStore):
    """A write makes the record that it does not find."""

    def _finish(self, op: Finish, now: float) -> bool:
        if op.key not in self._rows:
            self._claim(Claim(op.key, op.owner, 1.0), now)
            self._rows[op.key].fence = op.fence
        return super()._finish(op, now)


# -- claims ---------------------------------------------------------------------------------------------------------


@fails("one_of_many_claims_wins")
class GetThenSet(MemoryStore):
    """The fault of latch and benzene: all have read before the first one writes."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(8)

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, Claim):
            seen = super().execute(Read(op.key))
            self.barrier.wait()
            if seen is None:
                with self._lock:
                    self._rows.pop(op.key, None)
                    return self._claim(op, self.clock.at())
        return super().execute(op)


@fails("one_of_many_takeovers_wins")
class GetThenTakeOver(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(8)

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, Claim) and op.take_over:
            seen = super().execute(Read(op.key))
            assert seen is not None
            self.barrier.wait()
            with self._lock:
                self._rows[op.key].attempt, self._rows[op.key].mark = seen.attempt, 0.0
                return self._claim(op, self.clock.at())
        return super().execute(op)


@fails("a_finish_that_races_takeovers_wins_or_says_so")
class CheckThenFinish(MemoryStore):
    """Between the check and the write of a finish, another takes the key over."""

    def __init__(self) -> None:
        super().__init__()
        self.checked, self.taken = threading.Event(), threading.Event()

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, Finish):
            record = super().execute(Read(op.key))
            mine = record is not None and record.owner == op.owner
            self.checked.set()
            self.taken.wait()
            row = self._rows[op.key]
            row.result, row.expires = op.result, row.mark
            return mine
        if isinstance(op, Claim) and op.take_over:
            self.checked.wait()
            answer = super().execute(op)
            self.taken.set()
            return answer
        return super().execute(op)


@fails("a_finish_that_races_takeovers_wins_or_says_so")
class FinishSaysFalse(MemoryStore):
    """A finish that wins and denies it."""

    def _finish(self, op: Finish, now: float) -> bool:
        super()._finish(op, now)
        return False


@fails("a_lease_that_is_over_is_doubtful_and_stays_so", "since_counts_from_the_end_of_the_lease")
class DoubtTakesOver(MemoryStore):
    """The fault of powertools #8386: an expired lease is as good as none."""

    def _claim(self, op: Claim, now: float) -> Claimed:
        return super()._claim(replace(op, take_over=True), now)


@fails("a_lease_that_is_over_is_doubtful_and_stays_so", "abandon_puts_the_key_in_doubt")
class DoubtForgets(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        row = self._rows.get(op.key)
        if row is not None and row.result is None and row.mark <= now:
            del self._rows[op.key]
        return super()._claim(op, now)


@fails("take_over_begins_the_next_attempt", "a_result_of_a_later_attempt_says_so", "abandon_puts_the_key_in_doubt")
class AttemptStays(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        if not isinstance(answer, Acquired):
            return answer
        self._rows[op.key].attempt = 1
        return Acquired(answer.fence, 1)


@fails("take_over_begins_the_next_attempt", "a_late_owner_changes_nothing_after_a_takeover")
class TakeOverKeepsTheRecord(MemoryStore):
    """The new owner is told that it has the key, and the record says nothing of it."""

    def _claim(self, op: Claim, now: float) -> Claimed:
        row = self._rows.get(op.key)
        if row is None or row.result is not None or row.mark > now or not op.take_over:
            return super()._claim(op, now)
        row.attempt, row.fence, row.mark = row.attempt + 1, row.fence + 1, now + op.lease
        return Acquired(row.fence, row.attempt)


@fails(
    "release_forgets_the_key", "fences_grow_whatever_removed_the_record", "a_result_is_forgotten_when_its_time_is_over"
)
class FenceRestarts(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        before = self._rows.get(op.key)
        answer = super()._claim(op, now)
        row = self._rows[op.key]
        if not isinstance(answer, Acquired) or row is before:
            return answer
        row.fence = row.attempt
        return Acquired(row.fence, row.attempt)


@fails("take_over_repeated_is_harmless", "the_owner_may_claim_again")
class EachClaimIsNew(MemoryStore):
    """Whose answer was lost gets another fence."""

    def _claim(self, op: Claim, now: float) -> Claimed:
        row = self._rows.get(op.key)
        if row is not None and row.owner == op.owner and row.result is None:
            row.fence += 1
        return super()._claim(op, now)


@fails("the_owner_may_claim_again", "the_owner_may_claim_again_after_its_lease")
class ClaimDoesNotRenew(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        row = self._rows.get(op.key)
        mark = None if row is None else row.mark
        answer = super()._claim(op, now)
        if row is not None and mark is not None and self._rows.get(op.key) is row:
            row.mark = mark
        return answer


@fails("the_owner_may_claim_again_after_its_lease")
class OwnersAreForgottenWithTheirLease(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        row = self._rows.get(op.key)
        if row is not None and row.result is None and row.mark <= now and not op.take_over:
            return Doubtful(row.fence, row.attempt, row.fingerprint, now - row.mark)
        return super()._claim(op, now)


@fails("another_owner_is_told_that_it_is_busy")
class WaitingProlongs(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        if isinstance(answer, Busy):
            self._rows[op.key].mark += 1.0
        return answer


@fails("another_owner_is_told_that_it_is_busy", "texts_are_kept_as_they_are")
class BusyWithoutFingerprint(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        return replace(answer, fingerprint="") if isinstance(answer, Busy) else answer


@fails("another_owner_is_told_that_it_is_busy", "the_owner_may_claim_again", "renew_starts_the_lease_anew")
class LeaseLeftInMilliseconds(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        return replace(answer, lease_left=answer.lease_left * 1000) if isinstance(answer, Busy) else answer


@fails("since_counts_from_the_end_of_the_lease")
class SinceNever(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        return replace(answer, since=0.0) if isinstance(answer, Doubtful) else answer


@fails("since_counts_from_the_end_of_the_lease", "abandon_puts_the_key_in_doubt")
class SinceTheEpoch(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        return replace(answer, since=now) if isinstance(answer, Doubtful) else answer


@fails("a_key_with_a_result_is_completed_for_everybody")
class CompletedTakesTheNewFingerprint(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        return replace(answer, fingerprint=op.fingerprint) if isinstance(answer, Completed) else answer


@fails("a_key_with_a_result_is_completed_for_everybody")
class OwnersRunAgain(MemoryStore):
    """An owner that has finished gets its key again."""

    def _claim(self, op: Claim, now: float) -> Claimed:
        row = self._rows.get(op.key)
        if row is not None and row.owner == op.owner:
            return Acquired(row.fence, row.attempt)
        return super()._claim(op, now)


@fails("keys_are_apart")
class KeysAreCut(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        return super()._claim(replace(op, key=op.key[:8]), now)


@fails("a_new_key_is_acquired", "scan_filters_by_the_text_itself", "texts_are_kept_as_they_are")
class NoLabels(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        return super()._claim(replace(op, label=""), now)


@fails("texts_are_kept_as_they_are")
class TextsAreStripped(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        return super()._claim(replace(op, label=op.label.strip()), now)


@fails("texts_are_kept_as_they_are", "scan_filters_by_the_text_itself")
class TextsAreAscii(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        return super()._claim(replace(op, label=op.label.encode("ascii", "replace").decode()), now)


@fails("a_new_key_is_acquired", "finish_keeps_the_result")
class InstantsInMilliseconds(MemoryStore):
    def _read(self, op: Read, now: float) -> Record | None:
        record = super()._read(op, now)
        return None if record is None else replace(record, began_at=record.began_at * 1000, mark=record.mark * 1000)


# -- writes ---------------------------------------------------------------------------------------------------------


@fails("renew_starts_the_lease_anew", "renew_revives_a_lease_that_nobody_took")
class RenewDoesNothing(MemoryStore):
    def _renew(self, op: Renew, now: float) -> bool:
        return self._mine(op) is not None


@fails("renew_starts_the_lease_anew")
class RenewAdds(MemoryStore):
    def _renew(self, op: Renew, now: float) -> bool:
        row = self._mine(op)
        if row is None or row.result is not None:
            return False
        row.mark += op.lease
        return True


@fails("renew_revives_a_lease_that_nobody_took")
class RenewOnlyInTime(MemoryStore):
    def _renew(self, op: Renew, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and row.mark > now and super()._renew(op, now)


@fails("finish_after_the_lease_succeeds_if_nobody_took_over")
class FinishOnlyInTime(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and (row.mark > now or row.result is not None) and super()._finish(op, now)


@fails("release_after_the_lease_succeeds_if_nobody_took_over")
class ReleaseOnlyInTime(MemoryStore):
    def _release(self, op: Release, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and row.mark > now and super()._release(op, now)


@fails("finish_repeated_keeps_the_first_result")
class TheLastResultStays(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        row = self._mine(op)
        if row is None:
            return False
        row.result, row.mark, row.expires = op.result, now, now + op.ttl
        return True


@fails("finish_repeated_keeps_the_first_result", "one_result_of_one_owner_stays")
class FinishOnce(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and row.result is None and super()._finish(op, now)


@fails("finish_keeps_the_result")
class MarkStaysTheLease(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        row = self._rows.get(op.key)
        mark = None if row is None else row.mark
        answer = super()._finish(op, now)
        if row is not None and mark is not None:
            row.mark = mark
        return answer


@fails("finish_keeps_the_result", "a_result_is_forgotten_when_its_time_is_over")
class ResultsForEver(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        return super()._finish(replace(op, ttl=1e9), now)


@fails("results_are_bytes_of_any_kind", "fences_grow_whatever_removed_the_record")
class AnEmptyResultIsNone(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        return bool(op.result) and super()._finish(op, now)


@fails("results_are_bytes_of_any_kind")
class ResultsAreText(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        return super()._finish(replace(op, result=op.result.decode("utf-8", "replace").encode()), now)


@fails("results_are_bytes_of_any_kind")
class ResultsAreShort(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        return super()._finish(replace(op, result=op.result[:65_535]), now)


@fails("release_forgets_the_key")
class ReleaseKeeps(MemoryStore):
    def _release(self, op: Release, now: float) -> bool:
        return self._abandon(Abandon(op.key, op.owner, op.fence), now)


@fails("abandon_puts_the_key_in_doubt")
class AbandonForgets(MemoryStore):
    def _abandon(self, op: Abandon, now: float) -> bool:
        return self._release(Release(op.key, op.owner, op.fence), now)


@fails("abandon_puts_the_key_in_doubt", "abandon_does_not_prolong_a_lease_that_is_over")
class AbandonCountsAnew(MemoryStore):
    def _abandon(self, op: Abandon, now: float) -> bool:
        answer = super()._abandon(op, now)
        if answer:
            self._rows[op.key].mark = now
        return answer


# -- reading and cleaning -------------------------------------------------------------------------------------------


@fails("scan_sees_every_record")
class ScanForgetsTheLast(MemoryStore):
    def _scan(self, op: Scan, now: float) -> Page:
        page = super()._scan(op, now)
        return Page(page.records if page.after else page.records[:-1], page.after)


@fails("scan_sees_every_record")
class ScanSkipsOne(MemoryStore):
    """The next page begins one too late."""

    def _scan(self, op: Scan, now: float) -> Page:
        page = super()._scan(op, now)
        return Page(
            page.records, min((key for key in self._rows if key > page.after), default="") if page.after else ""
        )


@fails("scan_sees_every_record")
class ScanForEver(MemoryStore):
    def _scan(self, op: Scan, now: float) -> Page:
        page = super()._scan(op, now)
        return Page(page.records, page.after or "0")


@fails("scan_keeps_its_place_while_records_come_and_go")
class ScanCounts(MemoryStore):
    """OFFSET: whatever is removed moves all behind it."""

    def _scan(self, op: Scan, now: float) -> Page:
        start = int(op.after or 0)
        keys = [key for key, row in self._rows.items() if op.text in row.label]
        records = [self._read(Read(key), now) for key in reversed(keys[start : start + op.limit])]
        after = str(start + op.limit) if start + op.limit < len(keys) else ""
        return Page(tuple(record for record in records if record is not None), after)

    def _forget(self, op: Forget, now: float) -> bool:
        # And what is removed is, as it happens, in front.
        gone = super()._forget(op, now)
        del self._rows[next(iter(self._rows))]
        return gone


@fails("scan_filters_by_the_text_itself")
class ScanIgnoresCase(MemoryStore):
    def _scan(self, op: Scan, now: float) -> Page:
        page = super()._scan(Scan(op.after, 1000), now)
        return Page(tuple(record for record in page.records if op.text.lower() in record.label.lower()), "")


@fails("scan_filters_by_the_text_itself")
class ScanKnowsWildcards(MemoryStore):
    def _scan(self, op: Scan, now: float) -> Page:
        import re

        page = super()._scan(Scan(op.after, 1000), now)
        like = re.compile(".*".join(map(re.escape, op.text.split("%"))))
        return Page(tuple(record for record in page.records if like.search(record.label)), "")


@fails("a_result_is_forgotten_when_its_time_is_over")
class ScanShowsWhatIsOver(MemoryStore):
    def _scan(self, op: Scan, now: float) -> Page:
        return super()._scan(op, 0.0)


@fails("purge_spares_a_lease_that_runs", "purge_removes_what_ended_in_batches")
class PurgeTakesAll(MemoryStore):
    def _purge(self, op: Purge, now: float) -> int:
        return super()._purge(op, now + 1e9)


@fails("purge_removes_what_ended_in_batches", "purge_counts_from_the_end_of_the_record")
class PurgeSparesDoubt(MemoryStore):
    def _purge(self, op: Purge, now: float) -> int:
        old = [key for key, row in self._rows.items() if row.result is not None and row.mark <= now - op.older_than]
        for key in old[: op.batch]:
            del self._rows[key]
        return len(old[: op.batch])


@fails("purge_removes_what_ended_in_batches", "purge_counts_from_the_end_of_the_record")
class PurgeKnowsNoAge(MemoryStore):
    def _purge(self, op: Purge, now: float) -> int:
        return super()._purge(replace(op, older_than=0.0), now)


@fails("purge_removes_what_ended_in_batches")
class PurgeKnowsNoBatch(MemoryStore):
    def _purge(self, op: Purge, now: float) -> int:
        return super()._purge(replace(op, batch=1000), now)


@fails("forget_removes_what_a_person_says")
class ForgetTakesAll(MemoryStore):
    def _forget(self, op: Forget, now: float) -> bool:
        return self._rows.pop(op.key, None) is not None


@fails("forget_removes_what_a_person_says")
class ForgetSparesDoubt(MemoryStore):
    def _forget(self, op: Forget, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and row.result is not None and super()._forget(op, now)


# -- the rest -------------------------------------------------------------------------------------------------------


@fails("finish_wakes_who_watches", "release_wakes_who_watches", "abandon_wakes_who_watches")
class Silent(MemoryStore):
    def _end(self, key: str, row: _Row) -> None:
        pass


@fails("a_watch_ends_by_itself")
class WatchesOnce(MemoryStore):
    def watch(self, key: str, *, task: bool) -> Watch:
        assert not self._bells, "one at a time"
        return super().watch(key, task=task)


@fails("closing_twice_is_harmless")
class ClosesOnce(MemoryStore):
    closed = 0

    def close(self) -> None:
        self.closed += 1
        assert self.closed != 2, "closed already"


TIMED = {GetThenSet, GetThenTakeOver, CheckThenFinish}  # Faults of threads: tasks of one loop would wait for ever.


@pytest.mark.parametrize(
    ("store", "name"), MUTANTS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_broken_store_is_found(store: type[MemoryStore], name: str) -> None:
    for world in ("sync",) if store in TIMED else ("sync", "asyncio", "trio"):
        with pytest.raises(AssertionError) as caught:
            found(store, name, world, patience=0.01)()
        notes = "".join(caught.value.__notes__)
        assert notes.startswith("asked before, latest last:")


@pytest.mark.parametrize("world", ["sync", "asyncio", "trio"])
def test_the_clock_of_the_client_is_found(world: str) -> None:
    clock = FakeClock()

    class ClientClock(MemoryStore):
        """Judges by the clock at hand, whatever the store's says."""

        def __init__(self) -> None:
            super().__init__(clock)
            self._at = SystemClock.at

    for name in ("a_lease_that_is_over_is_doubtful_and_stays_so", "a_result_is_forgotten_when_its_time_is_over"):
        with pytest.raises(AssertionError, match="Read: "):
            found(ClientClock, name, world, advance=clock.advance, patience=0.01)()


def test_every_case_can_fail() -> None:
    assert {name for _, name in MUTANTS} == {body.__name__ for body in BODIES}
    assert len({body.__name__ for body in BODIES}) == len(BODIES)


# -- what it says, and how it is called -----------------------------------------------------------------------------


def test_a_failure_quotes_the_contract_and_the_answer() -> None:
    with pytest.raises(AssertionError) as caught:
        found(TheLastResultStays, "finish_repeated_keeps_the_first_result")()
    text = str(caught.value)
    assert text.startswith("Finish: True as well where this owner has finished already: the first result stays. ")
    assert "The store answered Record(" in text
    assert "result=b'second'" in text
    assert "b'second', ttl=6000.0) -> True" in "".join(caught.value.__notes__)


def test_long_answers_are_cut() -> None:
    with pytest.raises(AssertionError, match=r"^No\. The store answered b'0+ … \(1003 characters\)\.$"):
        check(False, "No.", b"0" * 1000)
    with pytest.raises(AssertionError, match=r"^No\. The store answered 1\.$"):
        expect(1, str, "No.")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_page_of_nothing_is_refused_before_a_store_is_asked(limit: int) -> None:
    """Most stores raised an `IndexError`, each in its own place."""
    with pytest.raises(ValueError, match=f"limit must be 1 or more, not {limit}"):
        Scan(limit=limit)


def test_cases_have_names_and_worlds() -> None:
    cases = store_contract(MemoryStore, trio=True)
    assert len(cases) == 3 * (len(BODIES) + len(JOURNAL_BODIES))
    assert {case.world for case in cases} == {"sync", "asyncio", "trio"}
    first = store_contract(MemoryStore)[0]
    assert (str(first), repr(first)) == ("sync-a_new_key_is_acquired", "<case sync-a_new_key_is_acquired>")
    assert {case.world for case in store_contract(MemoryStore)} == {"sync", "asyncio"}


def test_each_case_makes_its_store_and_closes_it() -> None:
    made: list[Any] = []

    class Counted(MemoryStore):
        closed = 0

        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        def close(self) -> None:
            self.closed += 1

    cases = store_contract(Counted)
    assert not made
    cases[0]()
    cases[-2]()
    assert [store.closed for store in made] == [1, 1]


def test_a_store_is_closed_after_a_failure_too() -> None:
    closed: list[bool] = []

    class Closed(OwnersRunAgain):
        def close(self) -> None:
            closed.append(True)

    with pytest.raises(AssertionError):
        found(Closed, "a_key_with_a_result_is_completed_for_everybody", "asyncio")()
    assert closed == [True]


def test_tasks_close_a_store_by_aclose() -> None:
    closed: list[str] = []

    class Both(MemoryStore):
        def close(self) -> None:
            closed.append("close")

        async def aclose(self) -> None:
            closed.append("aclose")

    for world in ("sync", "asyncio", "trio"):
        found(Both, "a_new_key_is_acquired", world)()
    assert closed == ["close", "aclose", "aclose"]


def test_the_store_may_come_with_the_call() -> None:
    cases = store_contract(sync=True, asyncio=False)
    for case in cases[:3]:
        case(MemoryStore)
    with pytest.raises(TypeError, match="make_store is missing"):
        cases[0]()


class Plain:
    """A store for plain functions, with nothing that a store need not have."""

    def __init__(self) -> None:
        self.execute = MemoryStore().execute


class Tasks:
    """A store for tasks."""

    def __init__(self) -> None:
        self.aexecute = MemoryStore().aexecute


@pytest.mark.parametrize("case", store_contract(Plain, asyncio=False), ids=str)
def test_a_store_of_one_world_without_watch_and_close(case: Case) -> None:
    case()


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in store_contract(lambda: Threaded(MemoryStore()), sync=False, trio=True)
        if case.name in ("a_new_key_is_acquired", "one_of_many_claims_wins", "finish_wakes_who_watches")
    ],
    ids=str,
)
def test_a_store_for_threads_serves_tasks_in_threads(case: Case) -> None:
    case()


def test_a_world_that_the_store_does_not_serve_is_named() -> None:
    with pytest.raises(AssertionError, match=r"has no aexecute. If it shall have none, say asyncio=False"):
        store_contract(Plain, sync=False)[0]()
    with pytest.raises(AssertionError, match=r"has no execute. If it shall have none, say sync=False"):
        store_contract(Tasks)[0]()


@pytest.mark.parametrize("world", ["sync", "asyncio", "trio"])
def test_an_error_of_the_store_comes_out_with_what_was_asked(world: str) -> None:
    class Sick(MemoryStore):
        def _finish(self, op: Finish, now: float) -> bool:
            raise OSError("no disk")

    with pytest.raises(OSError, match="no disk") as caught:
        found(Sick, "finish_keeps_the_result", world)()
    assert caught.value.__notes__[0].splitlines()[-1].startswith("Finish(")


def test_an_error_in_a_race_ends_the_race() -> None:
    class Sick(MemoryStore):
        def _claim(self, op: Claim, now: float) -> Claimed:
            if op.owner == "owner 3":
                raise OSError("no disk")
            return super()._claim(op, now)

    with pytest.raises(OSError, match="no disk"):
        found(Sick, "one_of_many_claims_wins")()


@pytest.mark.parametrize("argument", [{"make_store": 5}, {"advance": 1.0}])
def test_what_cannot_be_called_is_refused(argument: dict[str, Any]) -> None:
    name = next(iter(argument))
    with pytest.raises(TypeError, match=f"{name} must be callable, not"):
        store_contract(**argument)


def test_the_suite_is_loaded_only_when_asked_for() -> None:
    code = (
        "import sys, resilient.testing as t; "
        "print([n for n in sys.modules if n.startswith('resilient._contract') or n == 'resilient.stores'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- the switchboard ------------------------------------------------------------------------------------------------


def test_ring_all_wakes_everybody_who_watches() -> None:
    bells = Bells()
    assert not bells
    watches = [bells.watch(key, task=False) for key in ("a", "a", "b")]
    assert bells
    bells.ring("nobody")
    bells.ring_all()
    clock = FakeClock(autojump=False)
    for watch in watches:
        watch.park(clock, 1.0)  # Returns, though this clock stands still.
        watch.close()
        watch.close()
    assert not bells
