"""The contract suite finds stores whose journals are broken: one fault each, and the cases that must say so.

Every case about journals is shown to fail for some store. The machinery is tested in `test_store_contract`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from resilient._contract_cases import BODIES
from resilient._contract_journal import JOURNAL_BODIES
from resilient.errors import StoreError
from resilient.stores._ops import (
    Abandon,
    Acquired,
    Append,
    Begin,
    Claim,
    Claimed,
    Finish,
    Forget,
    History,
    Page,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
)
from resilient.stores.memory import MemoryStore
from resilient.testing import store_contract
from tests.test_store_contract import found

S = TypeVar("S", bound="type[MemoryStore]")

MUTANTS: list[tuple[type[MemoryStore], str]] = []

Story = tuple[Record, tuple[bytes, ...]] | None


def fails(*cases: str) -> Callable[[S], S]:
    """Say which cases must fail for a store."""

    def register(store: S) -> S:
        MUTANTS.extend((store, case) for case in cases)
        return store

    return register


# -- begin ------------------------------------------------------------------------------------------------------------


@fails("begin_stores_the_first_entry", "one_of_many_begins_wins")
class BeginForgetsTheEntry(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        return self._claim(Claim(op.key, op.owner, op.lease, "", op.label, op.take_over), now)


@fails("begin_stores_the_first_entry", "begin_on_a_key_that_is_taken_answers_like_claim")
class BeginMakesAFingerprint(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        answer = super()._begin(op, now)
        self._rows[op.key].fingerprint = self._rows[op.key].fingerprint or "print"
        return answer


@fails("begin_stores_the_first_entry")
class BeginForgetsTheLease(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        return super()._begin(replace(op, lease=30.0), now)


@fails(
    "begin_repeated_by_the_owner_adds_nothing",
    "begin_repeated_by_the_owner_after_its_lease_adds_nothing",
    "begin_with_take_over_keeps_the_journal",
    "one_of_many_begins_that_take_over_wins",
)
class EachBeginAdds(MemoryStore):
    """A begin that is sent again, as its answer was lost, adds its entry again."""

    def _begin(self, op: Begin, now: float) -> Claimed:
        before = self._rows.get(op.key)
        journal = () if before is None or before.result is not None else before.journal
        answer = super()._begin(op, now)
        if isinstance(answer, Acquired):
            self._rows[op.key].journal = (*journal, op.entry)
        return answer


@fails("begin_repeated_by_the_owner_adds_nothing", "begin_with_take_over_keeps_the_journal")
class EachBeginIsTheFirst(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        answer = super()._begin(op, now)
        if isinstance(answer, Acquired):
            self._rows[op.key].journal = (op.entry,)
        return answer


@fails("begin_repeated_by_the_owner_adds_nothing")
class BeginRepeatedTakesTheLabel(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        answer = super()._begin(op, now)
        if isinstance(answer, Acquired):
            self._rows[op.key].label = op.label or self._rows[op.key].label
        return answer


@fails("begin_repeated_by_the_owner_after_its_lease_adds_nothing")
class ALateOwnerBeginsAnew(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        row = self._rows.get(op.key)
        if row is not None and row.owner == op.owner and row.result is None and row.mark <= now:
            row.journal = ()
        return super()._begin(op, now)


@fails("begin_on_a_key_that_is_taken_answers_like_claim")
class BeginAddsFirst(MemoryStore):
    """Adds its entry, and then looks whether the key is free."""

    def _begin(self, op: Begin, now: float) -> Claimed:
        row = self._rows.get(op.key)
        if row is not None:
            row.journal += (op.entry,)
        return super()._begin(op, now)


@fails("begin_on_a_key_that_is_taken_answers_like_claim")
class BeginTakesDoubtOver(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        return super()._begin(replace(op, take_over=True), now)


@fails("begin_on_a_key_that_is_taken_answers_like_claim")
class BeginRunsAgainWhatIsDone(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        row = self._rows.get(op.key)
        if row is not None and row.result is not None:
            del self._rows[op.key]
        return super()._begin(op, now)


@fails("begin_on_a_key_that_was_only_claimed_is_busy")
class BeginFillsTheEmptyJournalOfAnother(MemoryStore):
    def _begin(self, op: Begin, now: float) -> Claimed:
        answer = super()._begin(op, now)
        row = self._rows[op.key]
        row.journal = row.journal or (op.entry,)
        return answer


@fails("begin_after_a_result_that_is_over_begins_anew")
class JournalsOutliveTheResult(MemoryStore):
    def _take_locked(self, op: Claim, now: float, attempt: int) -> Acquired:
        row = self._rows.get(op.key)
        answer = super()._take_locked(op, now, attempt)
        if row is not None:
            self._rows[op.key].journal = row.journal
        return answer

    def _expire_locked(self, now: float) -> None:
        pass


@fails(
    "begin_with_take_over_keeps_the_journal",
    "claim_with_take_over_keeps_the_journal",
    "one_of_many_begins_that_take_over_wins",
)
class TakeOverForgetsTheJournal(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        if isinstance(answer, Acquired) and answer.attempt > 1:
            self._rows[op.key].journal = ()
        return answer


@fails("begin_with_take_over_keeps_the_journal", "claim_with_take_over_keeps_the_journal")
class TakeOverForgetsTheLabel(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        if isinstance(answer, Acquired) and op.take_over:
            self._rows[op.key].label = op.label
        return answer


@fails("begin_with_take_over_keeps_the_journal", "claim_with_take_over_keeps_the_journal")
class TakeOverKeepsTheOldLabel(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        return super()._claim(replace(op, label="") if op.take_over else op, now)


@fails("begin_with_take_over_keeps_the_journal", "claim_with_take_over_keeps_the_journal")
class TakeOverIsTheBeginning(MemoryStore):
    def _claim(self, op: Claim, now: float) -> Claimed:
        answer = super()._claim(op, now)
        if isinstance(answer, Acquired) and op.take_over:
            self._rows[op.key].began = now
        return answer


# -- append -----------------------------------------------------------------------------------------------------------


@fails("append_adds_at_the_next_number", "append_begins_at_0_where_there_is_no_journal", "journals_are_apart")
class AppendReplacesTheLast(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        before = None if row is None else row.journal
        answer = super()._append(op, now)
        if row is not None and before is not None and row.journal != before:
            row.journal = (op.entry,) * len(row.journal)
        return answer


@fails("append_adds_at_the_next_number", "append_revives_a_lease_that_nobody_took")
class AppendDoesNotRenew(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        mark = None if row is None else row.mark
        answer = super()._append(op, now)
        if row is not None and mark is not None:
            row.mark = mark
        return answer


@fails("append_adds_at_the_next_number")
class AppendAddsToTheLease(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._mine(op)
        return super()._append(op if row is None else replace(op, lease=op.lease + row.mark - now), now)


@fails("append_adds_at_the_next_number")
class AppendIsAnAttempt(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        answer = super()._append(op, now)
        if answer:
            self._rows[op.key].attempt += 1
        return answer


@fails("append_begins_at_0_where_there_is_no_journal")
class AppendWantsABegin(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and bool(row.journal) and super()._append(op, now)


@fails("append_revives_a_lease_that_nobody_took", "an_append_that_races_takeovers_is_kept_or_refused")
class AppendOnlyInTime(MemoryStore):
    """Refused, though nobody has taken the key over: in a race with takeovers that is False, and nobody has won."""

    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and row.mark > now and super()._append(op, now)

    def _begin(self, op: Begin, now: float) -> Claimed:
        return super()._begin(replace(op, take_over=False), now)


@fails("append_repeated_keeps_the_first", "one_of_many_appends_of_a_number_stays")
class AppendRepeatedIsRefused(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and op.at >= len(row.journal) and super()._append(op, now)


@fails("append_repeated_keeps_the_first", "a_thousand_entries_stay_in_order")
class TheLastEntryStays(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        answer = super()._append(op, now)
        if answer:
            row = self._rows[op.key]
            row.journal = (*row.journal[: op.at], op.entry, *row.journal[op.at + 1 :])
        return answer


@fails("append_repeated_keeps_the_first", "one_of_many_appends_of_a_number_stays", "a_thousand_entries_stay_in_order")
class EachAppendAdds(MemoryStore):
    """The fault of a list: whatever is sent again is there twice."""

    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        known = row is not None and op.at < len(row.journal)
        answer = super()._append(op, now)
        if answer and known:
            self._rows[op.key].journal += (op.entry,)
        return answer


@fails("append_repeated_keeps_the_first")
class AppendRepeatedDoesNotRenew(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        mark = row.mark if row is not None and op.at < len(row.journal) else None
        answer = super()._append(op, now)
        if row is not None and mark is not None:
            row.mark = mark
        return answer


@fails("append_leaves_no_gap")
class AppendFillsGaps(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._mine(op)
        if row is not None and row.result is None:
            row.journal += (b"",) * (op.at - len(row.journal))
        return super()._append(op, now)


@fails("append_leaves_no_gap")
class AGapIsFalse(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        try:
            return super()._append(op, now)
        except StoreError:
            return False


@fails("append_leaves_no_gap")
class AGapLeavesDoubt(MemoryStore):
    """Says that the entry may have been written."""

    def _append(self, op: Append, now: float) -> bool:
        try:
            return super()._append(op, now)
        except StoreError as error:
            raise StoreError(str(error), maybe_written=True) from error


@fails("append_leaves_no_gap")
class AGapRenews(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._mine(op)
        if row is not None and row.result is None:
            row.mark = now + op.lease
        return super()._append(op, now)


@fails("append_replaces_the_label_if_it_has_one", "history_is_of_one_instant")
class AppendForgetsTheLabel(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        return super()._append(replace(op, label=""), now)


@fails("append_replaces_the_label_if_it_has_one", "append_adds_at_the_next_number")
class AppendWithoutLabelClearsIt(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        answer = super()._append(op, now)
        if answer:
            self._rows[op.key].label = op.label
        return answer


@fails("append_replaces_the_label_if_it_has_one")
class ScanFindsTheFirstLabel(MemoryStore):
    """An index of labels that an append does not keep up with."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def _scan(self, op: Scan, now: float) -> Page:
        page = super()._scan(replace(op, text=""), now)
        for key, row in self._rows.items():
            self.first.setdefault(key, row.label)
        return Page(tuple(record for record in page.records if op.text in self.first[record.key]), page.after)


@fails("others_cannot_append", "a_late_owner_cannot_append_after_a_takeover")
class AppendWithoutOwner(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        return row is not None and super()._append(replace(op, owner=row.owner), now)


@fails("others_cannot_append", "a_late_owner_cannot_append_after_a_takeover")
class AppendWithoutFence(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        return super()._append(replace(op, fence=0), now)


@fails("others_cannot_append", "nothing_is_appended_to_what_is_done_or_gone")
class AGapIsSeenFirst(MemoryStore):
    """Tells of a gap in a journal that is somebody else's: a late owner would take that for a fault of its own."""

    def _append(self, op: Append, now: float) -> bool:
        row = self._rows.get(op.key)
        if op.at > (0 if row is None else len(row.journal)):
            raise StoreError("a gap")
        return super()._append(op, now)


@fails("others_cannot_append")
class AppendRefusedRenews(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        answer = super()._append(op, now)
        row = self._rows.get(op.key)
        if row is not None and not answer:
            row.mark = now + op.lease
        return answer


@fails("nothing_is_appended_to_what_is_done_or_gone")
class AppendAfterTheResult(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        row = self._mine(op)
        if row is None or op.at > len(row.journal):
            return False
        row.journal = (*row.journal, op.entry)[: max(op.at + 1, len(row.journal))]
        row.mark, row.label = now + op.lease, op.label or row.label
        return True


@fails("nothing_is_appended_to_what_is_done_or_gone")
class AppendMakesTheRecord(MemoryStore):
    def _append(self, op: Append, now: float) -> bool:
        if op.key not in self._rows:
            self._claim(Claim(op.key, op.owner, op.lease), now)
            self._rows[op.key].fence = op.fence
        return super()._append(op, now)


# -- what is kept, and how long ---------------------------------------------------------------------------------------


class Keeps(MemoryStore):
    """Entries are kept as `kept` says."""

    def kept(self, entry: bytes) -> bytes:
        raise NotImplementedError

    def _begin(self, op: Begin, now: float) -> Claimed:
        return super()._begin(replace(op, entry=self.kept(op.entry)), now)

    def _append(self, op: Append, now: float) -> bool:
        return super()._append(replace(op, entry=self.kept(op.entry)), now)


@fails("entries_are_bytes_of_any_kind")
class EntriesAreText(Keeps):
    def kept(self, entry: bytes) -> bytes:
        return entry.decode("utf-8", "replace").encode()


@fails("entries_are_bytes_of_any_kind")
class EntriesAreShort(Keeps):
    def kept(self, entry: bytes) -> bytes:
        return entry[:65_535]


@fails("entries_are_bytes_of_any_kind", "begin_stores_the_first_entry")
class EntriesAreBuffers(Keeps):
    def kept(self, entry: bytes) -> bytes:
        return bytearray(entry)  # type: ignore[return-value]  # what it is about


@fails("entries_are_bytes_of_any_kind")
class AnEmptyEntryIsNone(MemoryStore):
    def _history(self, op: History, now: float) -> Story:
        story = super()._history(op, now)
        return None if story is None else (story[0], tuple(entry for entry in story[1] if entry))


@fails("a_thousand_entries_stay_in_order", "append_adds_at_the_next_number")
class EntriesAreInOrderOfText(MemoryStore):
    """10 comes before 9."""

    def _history(self, op: History, now: float) -> Story:
        story = super()._history(op, now)
        if story is None:
            return None
        return story[0], tuple(entry for _, entry in sorted((str(at), entry) for at, entry in enumerate(story[1])))


@fails("a_thousand_entries_stay_in_order")
class HistoryIsOnePage(MemoryStore):
    def _history(self, op: History, now: float) -> Story:
        story = super()._history(op, now)
        return None if story is None else (story[0], story[1][:100])


@fails("history_of_nothing_is_none")
class HistoryOfNothingIsEmpty(MemoryStore):
    def _history(self, op: History, now: float) -> Story:
        return super()._history(op, now) or ()  # type: ignore[return-value]  # what it is about


@fails("history_of_nothing_is_none", "begin_after_a_result_that_is_over_begins_anew")
class HistoryShowsWhatIsOver(MemoryStore):
    def _history(self, op: History, now: float) -> Story:
        return super()._history(op, 0.0)


@fails("the_journal_stays_while_the_record_does")
class FinishForgetsTheJournal(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        answer = super()._finish(op, now)
        if answer:
            self._rows[op.key].journal = ()
        return answer


@fails("the_journal_stays_while_the_record_does", "begin_on_a_key_that_is_taken_answers_like_claim")
class FinishForgetsTheAttempt(MemoryStore):
    def _finish(self, op: Finish, now: float) -> bool:
        answer = super()._finish(op, now)
        if answer:
            self._rows[op.key].journal = self._rows[op.key].journal[:-1]
            self._rows[op.key].attempt += 1
        return answer


@fails("the_journal_stays_while_the_record_does", "claim_with_take_over_keeps_the_journal")
class AbandonForgetsTheJournal(MemoryStore):
    def _abandon(self, op: Abandon, now: float) -> bool:
        answer = super()._abandon(op, now)
        if answer:
            self._rows[op.key].journal = ()
        return answer


@fails("the_journal_stays_while_the_record_does")
class RenewForgetsTheJournal(MemoryStore):
    def _renew(self, op: Renew, now: float) -> bool:
        answer = super()._renew(op, now)
        if answer:
            self._rows[op.key].journal = ()
        return answer


class Apart(MemoryStore):
    """Journals that are kept apart from the records, and whoever removes a record must think of its journal."""

    forgetful: tuple[type, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.apart: dict[str, tuple[bytes, ...]] = {}

    def execute(self, op: Any, /) -> Any:
        keys = set(self._rows)
        before = {key: row.journal for key, row in self._rows.items()}
        answer = super().execute(op)
        for key in keys - set(self._rows):
            if type(op) in self.forgetful:
                self.apart[key] = before[key]
        for key in set(self._rows) - keys:
            self._rows[key].journal = self.apart.pop(key, self._rows[key].journal)
        return answer


@fails("the_journal_goes_with_the_record")
class ReleaseLeavesTheJournal(Apart):
    forgetful = (Release,)


@fails("the_journal_goes_with_the_record")
class ForgetLeavesTheJournal(Apart):
    forgetful = (Forget,)


@fails("the_journal_goes_with_the_record")
class PurgeLeavesTheJournal(Apart):
    forgetful = (Purge,)


@fails("the_journal_goes_with_the_record")
class ForgetTakesAllJournals(MemoryStore):
    def _forget(self, op: Forget, now: float) -> bool:
        answer = super()._forget(op, now)
        for row in self._rows.values():
            row.journal = ()
        return answer


@fails("purge_counts_records_and_not_entries", "the_journal_goes_with_the_record")
class PurgeCountsEntries(MemoryStore):
    """The count of rows, where each entry is one."""

    def _purge(self, op: Purge, now: float) -> int:
        before = sum(1 + len(row.journal) for row in self._rows.values())
        super()._purge(op, now)
        return before - sum(1 + len(row.journal) for row in self._rows.values())


@fails("journals_are_apart")
class JournalsOfOnePrefix(MemoryStore):
    def _history(self, op: History, now: float) -> Story:
        story = super()._history(op, now)
        if story is None:
            return None
        near = [row.journal for key, row in sorted(self._rows.items()) if key.startswith(op.key[:39])]
        return story[0], tuple(entry for journal in near for entry in journal)


# -- scans by state ---------------------------------------------------------------------------------------------------


@fails("scan_shows_the_state_that_is_wanted", "scan_by_state_and_text_wants_both")
class ScanKnowsNoState(MemoryStore):
    def _scan(self, op: Scan, now: float) -> Page:
        return super()._scan(replace(op, state=""), now)


@fails("scan_shows_the_state_that_is_wanted")
class ScanEndsAtAPageWithoutAny(MemoryStore):
    """The state is looked at after the limit, and a page with nothing on it counts as the end."""

    def _scan(self, op: Scan, now: float) -> Page:
        page = super()._scan(replace(op, state=""), now)
        records = tuple(record for record in page.records if op.state in ("", record.state))
        return Page(records, page.after if records else "")


@fails("scan_shows_the_state_that_is_wanted")
class OnlyWhoAbandonsIsInDoubt(MemoryStore):
    """A state that is stored, which no lease that ends by itself changes."""

    def __init__(self) -> None:
        super().__init__()
        self.abandoned: set[str] = set()

    def _abandon(self, op: Abandon, now: float) -> bool:
        self.abandoned.add(op.key)
        return super()._abandon(op, now)

    def _scan(self, op: Scan, now: float) -> Page:
        page = super()._scan(op, now)
        if op.state != "in doubt":
            return page
        return Page(tuple(record for record in page.records if record.key in self.abandoned), page.after)


@fails("scan_by_state_and_text_wants_both")
class ScanByStateForgetsTheText(MemoryStore):
    def _scan(self, op: Scan, now: float) -> Page:
        return super()._scan(replace(op, text="") if op.state else op, now)


@fails("scan_does_not_show_a_result_that_is_over")
class ScanByStateShowsWhatIsOver(MemoryStore):
    def _scan(self, op: Scan, now: float) -> Page:
        return super()._scan(op, 0.0 if op.state == "done" else now)


# -- races ------------------------------------------------------------------------------------------------------------


@fails("one_of_many_begins_wins")
class ReadThenBegin(MemoryStore):
    """All have read before the first one writes."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(8)

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, Begin):
            seen = super().execute(Read(op.key))
            self.barrier.wait()
            if seen is None:
                with self._lock:
                    self._rows.pop(op.key, None)
                    return self._begin(op, self.clock.at())
        return super().execute(op)


@fails("one_of_many_begins_wins")
class ClaimThenBegin(MemoryStore):
    """Claim and first entry in two steps: who has lost the race writes the entry, too."""

    def _begin(self, op: Begin, now: float) -> Claimed:
        answer = self._claim(Claim(op.key, op.owner, op.lease, "", op.label, op.take_over), now)
        self._rows[op.key].journal = (op.entry,)
        return answer


@fails("one_of_many_begins_that_take_over_wins")
class ReadThenTakeOver(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(8)

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, Begin) and op.take_over:
            self.barrier.wait()
            with self._lock:
                row = self._rows[op.key]
                row.attempt, row.mark = 1, 0.0
                return self._begin(op, self.clock.at())
        return super().execute(op)


@fails("one_of_many_appends_of_a_number_stays")
class CountThenAppend(MemoryStore):
    """All have counted before the first one writes."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(8)

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, Append):
            there = len(self._rows[op.key].journal)
            self.barrier.wait()
            with self._lock:
                if op.at >= there:
                    self._rows[op.key].journal += (op.entry,)
            self.barrier.wait()
            return True
        return super().execute(op)


@fails("an_append_that_races_takeovers_is_kept_or_refused")
class CheckThenAppend(MemoryStore):
    """Between the check and the write of an append, another takes the key over."""

    def __init__(self) -> None:
        super().__init__()
        self.checked, self.taken = threading.Event(), threading.Event()

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, Append):
            record = super().execute(Read(op.key))
            mine = record is not None and record.owner == op.owner
            self.checked.set()
            self.taken.wait()
            self._rows[op.key].journal += (op.entry,)
            return mine
        if isinstance(op, Begin) and op.take_over:
            self.checked.wait()
            answer = super().execute(op)
            self.taken.set()
            return answer
        return super().execute(op)


@fails("history_is_of_one_instant")
class RecordThenEntries(MemoryStore):
    """Record and entries in two reads, and an entry is added between them."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.added = threading.Barrier(8), threading.Barrier(8)

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, Append):
            self.read.wait()
            answer = super().execute(op)
            self.added.wait()
            return answer
        if isinstance(op, History):
            record = super().execute(Read(op.key))
            self.read.wait()
            self.added.wait()
            return record, self._rows[op.key].journal
        return super().execute(op)


@fails("history_is_of_one_instant")
class HistoryIsOld(MemoryStore):
    """What was asked once is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Story] = {}

    def _history(self, op: History, now: float) -> Story:
        return self.known.setdefault(op.key, super()._history(op, now))


# Faults of threads: tasks of one loop would wait for ever.
TIMED = {ReadThenBegin, ReadThenTakeOver, CountThenAppend, CheckThenAppend, RecordThenEntries}


@pytest.mark.parametrize(
    ("store", "name"), MUTANTS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_store_with_a_broken_journal_is_found(store: type[MemoryStore], name: str) -> None:
    for world in ("sync",) if store in TIMED else ("sync", "asyncio", "trio"):
        with pytest.raises(AssertionError) as caught:
            found(store, name, world, patience=0.01)()
        notes = "".join(caught.value.__notes__)
        assert notes.startswith("asked before, latest last:")


def test_every_case_about_journals_can_fail() -> None:
    names = [body.__name__ for body in JOURNAL_BODIES]
    assert {name for _, name in MUTANTS} == set(names)
    assert len({*names, *(body.__name__ for body in BODIES)}) == len(names) + len(BODIES)


def test_what_an_entry_of_another_kind_is_called() -> None:
    with pytest.raises(AssertionError, match="History: the entries are bytes"):
        found(EntriesAreBuffers, "begin_stores_the_first_entry")()


class WithoutJournal:
    """A store for idempotency keys alone: it has never heard of journals."""

    def __init__(self) -> None:
        self._store = MemoryStore()

    def execute(self, op: Any, /) -> Any:
        if isinstance(op, (Begin, Append, History)) or (isinstance(op, Scan) and op.state):
            raise NotImplementedError(op)
        return self._store.execute(op)


@pytest.mark.parametrize("case", store_contract(WithoutJournal, asyncio=False, journal=False), ids=str)
def test_a_store_without_journals_leaves_the_cases_about_them_out(case: Any) -> None:
    case()


def test_journals_are_asked_for_unless_they_are_left_out() -> None:
    every = store_contract(WithoutJournal, asyncio=False)
    fewer = store_contract(WithoutJournal, asyncio=False, journal=False)
    assert [case.name for case in fewer] == [body.__name__ for body in BODIES]
    assert [case.name for case in every] == [body.__name__ for body in (*BODIES, *JOURNAL_BODIES)]
    for case in every[len(fewer) :]:
        with pytest.raises(NotImplementedError):
            case()
