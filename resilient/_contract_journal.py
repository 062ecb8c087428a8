"""The suite that says whether a store is one: the cases about journals, and scans by state, which sagas stand on.

Like those of `_contract_cases`: each is a part of what `resilient.stores._ops` promises, each check quotes a sentence,
and a case runs unchanged in threads, asyncio and trio. `store_contract(..., journal=False)` leaves all of them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from resilient._contract import Body, Session, check, expect
from resilient._contract_cases import (
    BUSY,
    CLOSE,
    DOUBT,
    GROWS,
    KEY,
    LONG,
    NEW,
    ONLY_OWNER,
    OWN,
    RACERS,
    RACES,
    RESULT,
    TAKEN,
    below,
    key,
    lease_is,
    one_won,
    pages,
    take,
    yes,
)
from resilient.errors import StoreError
from resilient.stores._ops import (
    Abandon,
    Acquired,
    AnyOp,
    Append,
    Begin,
    Busy,
    Claim,
    Completed,
    Doubtful,
    Finish,
    Forget,
    History,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
)

__all__ = ["JOURNAL_BODIES"]

FIRST = "Begin: `entry` is number 0 where the key is new."
LEAVES = "Begin: every other answer of Claim leaves the journal as it is."
ADDS = "Append: add the entry to the journal as number `at`."
ANEW = "Append: start the lease anew."
AGAIN = "Append: True as well where this owner has added that number already; the first one stays."
LABEL = "Append: a label that is not empty takes the place of the one that the record has."
GAP = "Append: StoreError where `at` is not the next number, and nothing has changed."
NOT_MINE = "Append: False if the key is somebody else's, or done, or gone; nothing has changed."
ALL = "History: the record of a key and all entries of its journal."
NONE = "History: None where there is no record."
STAYS = "A takeover keeps the journal, `began_at`, and the label unless it gives one."
GONE = "The journal goes with the record: the next one begins at number 0."

Entries = tuple[bytes, ...]


async def begin(s: Session, entry: bytes = b"0", owner: str = "a", key: str = KEY, lease: float = LONG) -> Acquired:
    answer = expect(await s.ask(Begin(key, owner, lease, entry, "label of " + owner)), Acquired, NEW)
    check(answer.attempt == 1, NEW, answer)
    return answer


async def begun(s: Session, entries: int, key: str = KEY, lease: float = LONG) -> Acquired:
    """A record with that many entries: b"0", b"1", …"""
    got = await begin(s, key=key, lease=lease if entries == 1 else LONG)
    for at in range(1, entries):
        op = Append(key, "a", got.fence, at, b"%d" % at, lease if at == entries - 1 else LONG)
        await yes(s, op, f"{ADDS} By the owner: True.")
    return got


async def in_doubt(s: Session, key: str = KEY) -> None:
    sentence = "Read: in doubt, once the lease has ended."
    await s.until(Read(key), lambda record: record is not None and record.state == "in doubt", sentence)


async def history(s: Session, key: str = KEY) -> tuple[Record, Entries]:
    answer = await s.ask(History(key))
    check(isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], tuple), ALL, answer)
    assert answer is not None
    record, entries = answer
    expect(record, Record, ALL)
    check(all(type(entry) is bytes for entry in entries), "History: the entries are bytes.", entries)
    return record, entries


async def journal_is(s: Session, entries: Iterable[bytes], sentence: str, key: str = KEY) -> Record:
    """Check the entries, and that the record is the one that `Read` shows. Return that."""
    expected = tuple(entries)
    record, found = await history(s, key)
    check(found == expected, f"{sentence} The journal is {expected!r:.300}.", found)
    read = await s.record(key)
    check(record == read, f"History: the record as Read shows it, {read!r:.300}.", record)
    return record


async def stays(s: Session, ops: Iterable[AnyOp], sentence: str, key: str = KEY) -> None:
    """Each of `ops` is answered by False and leaves the record and the journal, or their absence, as they are."""
    before = await s.ask(History(key))
    for op in ops:
        answer: object
        try:
            answer = await s.ask(op)
        except StoreError as error:  # for instance of a gap in what is not theirs
            answer = error
        check(answer is False, f"{sentence} {type(op).__name__}: False.", answer)
        after = await s.ask(History(key))
        check(after == before, f"{sentence} Nothing has changed, from {before!r:.300}.", after)


# -- begin ------------------------------------------------------------------------------------------------------------


async def begin_stores_the_first_entry(s: Session) -> None:
    got = await begin(s, b"plan")
    check(got.fence > 0, "A fence is a number above 0, which stands for whichever.", got)
    record = await journal_is(s, [b"plan"], FIRST)
    expected = Record(
        key=KEY,
        state="running",
        owner="a",
        fence=got.fence,
        attempt=1,
        fingerprint="",
        label="label of a",
        began_at=record.began_at,
        mark=record.mark,
        expires_at=None,
        result=None,
    )
    check(record == expected, f"Begin: a record as Claim makes it, {expected!r}.", record)
    lease = record.mark - record.began_at
    check(abs(lease - LONG) < CLOSE, f"`mark` is the end of the lease, {LONG} seconds after `began_at`.", record)


async def begin_repeated_by_the_owner_adds_nothing(s: Session) -> None:
    got = await begun(s, 1)
    before = await s.record(KEY)
    for entries in ([b"0"], [b"0", b"1"]):
        for lease in (LONG / 10, 10 * LONG):
            for over in (False, True):
                op = Begin(KEY, "a", lease, b"other", "other", over)
                again = expect(await s.ask(op), Acquired, OWN)
                check(again == got, f"{OWN} {got!r}.", again)
                record = await journal_is(s, entries, "Begin, repeated by the owner itself, adds nothing.")
                same = record == replace(before, mark=record.mark)
                check(
                    same,
                    f"Begin, repeated by the owner itself, changes the end of the lease alone: {before!r}.",
                    record,
                )
                await lease_is(s, lease, "The owner itself, again: its lease starts anew.")
        if len(entries) == 1:
            await yes(s, Append(KEY, "a", got.fence, 1, b"1", LONG), f"{ADDS} By the owner: True.")


async def begin_repeated_by_the_owner_after_its_lease_adds_nothing(s: Session) -> None:
    got = await begun(s, 1, lease=s.soon)
    await in_doubt(s)
    again = expect(await s.ask(Begin(KEY, "a", LONG, b"other")), Acquired, OWN)
    check(again == got, f"{OWN} {got!r}.", again)
    await journal_is(s, [b"0"], "Begin, repeated by the owner itself, adds nothing.")
    await lease_is(s, LONG, "The owner itself, again: its lease starts anew.")


async def begin_on_a_key_that_is_taken_answers_like_claim(s: Session) -> None:
    got = await begun(s, 2)
    before = await history(s)
    for over in (False, True):
        busy = expect(await s.ask(Begin(KEY, "b", 1.0, b"other", "other", over)), Busy, BUSY)
        same = (busy.fence, busy.attempt, busy.fingerprint) == (got.fence, 1, "")
        check(same and 0 < busy.lease_left <= LONG + CLOSE, "Busy carries what the owner's claim is.", busy)
        check(await history(s) == before, f"{LEAVES} It was {before!r}.", await history(s))
    await yes(s, Abandon(KEY, "a", got.fence), "Abandon by the owner: True.")
    before = await history(s)
    doubt = expect(await s.ask(Begin(KEY, "b", 1.0, b"other", "other")), Doubtful, DOUBT)
    check((doubt.fence, doubt.attempt, doubt.fingerprint) == (got.fence, 1, ""), "Doubtful carries the attempt.", doubt)
    check(await history(s) == before, f"{LEAVES} It was {before!r}.", await history(s))
    await yes(s, Finish(KEY, "a", got.fence, b"result", LONG), "Finish by the owner: True.")
    before = await history(s)
    for owner in ("a", "b"):
        for over in (False, True):
            done = await s.ask(Begin(KEY, owner, 1.0, b"other", "other", over))
            check(done == Completed(got.fence, 1, "", b"result"), RESULT, done)
            check(await history(s) == before, f"{LEAVES} It was {before!r}.", await history(s))


async def begin_on_a_key_that_was_only_claimed_is_busy(s: Session) -> None:
    await take(s)
    expect(await s.ask(Begin(KEY, "b", LONG, b"other")), Busy, BUSY)
    await journal_is(s, [], LEAVES)


async def begin_after_a_result_that_is_over_begins_anew(s: Session) -> None:
    got = await begun(s, 3)
    await yes(s, Finish(KEY, "a", got.fence, b"result", s.soon), "Finish by the owner: True.")
    gone = "A result whose time is over counts as none."
    await s.until(History(KEY), lambda answer: answer is None, f"History: {gone}")
    again = await begin(s, b"new", "b")
    check(again.fence > got.fence, f"{GROWS} It was {got.fence}.", again)
    await journal_is(s, [b"new"], GONE)


async def begin_with_take_over_keeps_the_journal(s: Session) -> None:
    fence = (await begun(s, 3, lease=s.soon)).fence
    await in_doubt(s)
    began = (await s.record(KEY)).began_at
    entries = [b"0", b"1", b"2"]
    label = "label of a"
    for attempt, (owner, given) in enumerate((("b", ""), ("c", "another"), ("d", "")), 2):
        got = expect(await s.ask(Begin(KEY, owner, LONG, b"other", given, True)), Acquired, TAKEN)
        check(got.attempt == attempt and got.fence > fence, f"{TAKEN} The fence was {fence}.", got)
        fence, label = got.fence, given or label
        record = await journal_is(s, entries, f"{STAYS} Begin.")
        theirs = (record.state, record.owner, record.fence, record.attempt) == ("running", owner, fence, attempt)
        check(theirs, "The key is the new owner's.", record)
        check((record.began_at, record.label) == (began, label), f"{STAYS} {began!r}, {label!r}.", record)
        await yes(s, Append(KEY, owner, fence, len(entries), owner.encode(), LONG), "The new owner goes on: True.")
        entries.append(owner.encode())
        await journal_is(s, entries, "The new owner goes on at the next number.")
        await yes(s, Abandon(KEY, owner, fence), "Abandon by the owner: True.")


async def claim_with_take_over_keeps_the_journal(s: Session) -> None:
    await begun(s, 2)
    began = (await s.record(KEY)).began_at
    for former, owner, given, label in (("a", "b", "", "label of a"), ("b", "c", "another", "another")):
        await yes(s, Abandon(KEY, former, 0), "Abandon by the owner: True.")
        expect(await s.ask(Claim(KEY, owner, LONG, "print", given, True)), Acquired, TAKEN)
        record = await journal_is(s, [b"0", b"1"], f"{STAYS} Claim.")
        kept = (record.began_at, record.label, record.fingerprint) == (began, label, "print")
        check(kept, f"{STAYS} {began!r}, {label!r}.", record)


# -- append -----------------------------------------------------------------------------------------------------------


async def append_adds_at_the_next_number(s: Session) -> None:
    got = await begin(s)
    before = await s.record(KEY)
    for at in range(1, 13):
        lease = LONG * (10 if at % 2 else 0.1)
        await yes(s, Append(KEY, "a", got.fence, at, b"%d" % at, lease), f"{ADDS} By the owner: True.")
        record = await journal_is(s, [b"%d" % number for number in range(at + 1)], ADDS)
        same = record == replace(before, mark=record.mark)
        check(same, f"Append: the rest of the record stays, {before!r}.", record)
        await lease_is(s, lease, ANEW)


async def append_begins_at_0_where_there_is_no_journal(s: Session) -> None:
    got = await take(s)
    await journal_is(s, [], "A record that was only claimed has a journal without entries.")
    for at in range(3):
        await yes(s, Append(KEY, "a", got.fence, at, b"%d" % at, LONG), f"{ADDS} By the owner: True.")
    record = await journal_is(s, [b"0", b"1", b"2"], ADDS)
    check(record.fingerprint == "print of a", "Append: the rest of the record stays.", record)


async def append_revives_a_lease_that_nobody_took(s: Session) -> None:
    got = await begun(s, 1, lease=s.soon)
    await in_doubt(s)
    await yes(s, Append(KEY, "a", got.fence, 1, b"1", LONG), f"{NOT_MINE} Else True.")
    await journal_is(s, [b"0", b"1"], ADDS)
    await lease_is(s, LONG, ANEW)


async def append_repeated_keeps_the_first(s: Session) -> None:
    got = await begun(s, 3)
    for at in (2, 1, 0):
        for lease in (LONG / 10, 10 * LONG):
            await yes(s, Append(KEY, "a", got.fence, at, b"other", lease), AGAIN)
            await journal_is(s, [b"0", b"1", b"2"], AGAIN)
            await lease_is(s, lease, f"{ANEW} Also where the entry is there already.")
    await yes(s, Append(KEY, "a", got.fence, 3, b"3", LONG), f"{ADDS} By the owner: True.")
    await journal_is(s, [b"0", b"1", b"2", b"3"], ADDS)


async def append_leaves_no_gap(s: Session) -> None:
    got = await begun(s, 2)
    other = await take(s, key=key(1))
    for here, fence, following in ((KEY, got.fence, 2), (key(1), other.fence, 0)):
        before = await history(s, here)
        for at in (following + 1, following + 2, following + 1000):
            op = Append(here, "a", fence, at, b"other", 10 * LONG, "other")
            try:
                answer = await s.ask(op)
            except StoreError as error:
                check(not error.maybe_written, f"{GAP} So `maybe_written` is not set.", error)
            else:
                check(False, GAP, answer)
            check(await history(s, here) == before, f"{GAP} It was {before!r}.", await history(s, here))
        await yes(s, Append(here, "a", fence, following, b"next", LONG), f"{ADDS} By the owner: True.")


async def append_replaces_the_label_if_it_has_one(s: Session) -> None:
    got = await begin(s)
    label = "label of a"
    for at, given in enumerate(("", "second", "", "é ☃ %_*?'\"\\", "0"), 1):
        await yes(s, Append(KEY, "a", got.fence, at, b"", LONG, given), f"{ADDS} By the owner: True.")
        label = given or label
        check((await s.record(KEY)).label == label, f"{LABEL} It is {label!r}.", await s.record(KEY))
        found = [record.label for record in await pages(s, 100, label)]
        check(found == [label], f"Scan: those whose label contains {label!r}.", found)
    found = [record.label for record in await pages(s, 100, "second")]
    check(not found, f"{LABEL} Scan does not find it by the old one.", found)


def late(owner: str, fence: int, following: int, key: str = KEY) -> list[AnyOp]:
    """Appends at numbers of every kind, with a label, and with a lease that would be seen."""
    numbers = {0, following - 1, following, following + 1} - {-1}
    return [Append(key, owner, fence, at, b"not mine", 10 * LONG, "not mine") for at in sorted(numbers)]


async def others_cannot_append(s: Session) -> None:
    fence = (await begun(s, 2)).fence
    wrong = (("b", fence), ("A", fence), ("", fence), ("a", fence + 1), ("a", below(fence)))
    for owner, number in wrong:
        await stays(s, late(owner, number, 2), f"{ONLY_OWNER} {NOT_MINE}")
    await yes(s, Abandon(KEY, "a", fence), "Abandon by the owner: True.")
    for owner, number in wrong:
        await stays(s, late(owner, number, 2), f"{ONLY_OWNER} {NOT_MINE}")


async def a_late_owner_cannot_append_after_a_takeover(s: Session) -> None:
    old = await begun(s, 2, lease=s.soon)
    await in_doubt(s)
    got = expect(await s.ask(Begin(KEY, "b", LONG, b"other", "", True)), Acquired, TAKEN)
    for owner, fence in (("a", old.fence), ("a", got.fence), ("b", old.fence)):
        await stays(s, late(owner, fence, 2), f"A late owner's entries are refused. {NOT_MINE}")
    await yes(s, Append(KEY, "b", got.fence, 2, b"of b", LONG), "The new owner goes on: True.")
    await stays(s, late("a", old.fence, 3), f"A late owner's entries are refused. {NOT_MINE}")
    await journal_is(s, [b"0", b"1", b"of b"], "The journal is the new owner's.")


async def nothing_is_appended_to_what_is_done_or_gone(s: Session) -> None:
    got = await begun(s, 2)
    await yes(s, Finish(KEY, "a", got.fence, b"result", LONG), "Finish by the owner: True.")
    await stays(s, late("a", got.fence, 2), f"The key is done. {NOT_MINE}")
    await yes(s, Forget(KEY), "Forget: remove one record, finished or in doubt.")
    await stays(s, late("a", got.fence, 2) + late("a", got.fence, 0), f"There is no record. {NOT_MINE}")
    await stays(s, late("a", 1, 0, key(1)), f"There is no record. {NOT_MINE}", key(1))


# -- what is kept, and how long ---------------------------------------------------------------------------------------


async def entries_are_bytes_of_any_kind(s: Session) -> None:
    kinds = [
        b"",
        b"\0",
        bytes(range(256)),
        b"'; --\xff\xfe",
        b"\\x41",
        b"null",
        b"\r\n$1\r\n",
        b"\x80" * 1_000_000,
        b"",
    ]
    for turn in range(len(kinds)):
        here, entries = key(turn), kinds[turn:] + kinds[:turn]
        got = await begin(s, entries[0], key=here)
        for at, entry in enumerate(entries[1:3], 1):
            await yes(s, Append(here, "a", got.fence, at, entry, LONG), f"{ADDS} By the owner: True.")
        await journal_is(s, entries[:3], "The entries are these very bytes.", here)


async def a_thousand_entries_stay_in_order(s: Session) -> None:
    got = await begun(s, 1000)
    entries = [b"%d" % at for at in range(1000)]
    await journal_is(s, entries, f"{ALL} In their order.")
    await yes(s, Append(KEY, "a", got.fence, 999, b"other", LONG), AGAIN)
    await yes(s, Append(KEY, "a", got.fence, 1000, b"last", LONG), f"{ADDS} By the owner: True.")
    await journal_is(s, [*entries, b"last"], f"{ALL} In their order.")


async def history_of_nothing_is_none(s: Session) -> None:
    check(await s.ask(History(KEY)) is None, NONE, await s.ask(History(KEY)))
    got = await begin(s)
    check(await s.ask(History(key(1))) is None, NONE, await s.ask(History(key(1))))
    await yes(s, Finish(KEY, "a", got.fence, b"", s.soon), "Finish by the owner: True.")
    await s.until(History(KEY), lambda answer: answer is None, "History: a result whose time is over counts as none.")


async def the_journal_stays_while_the_record_does(s: Session) -> None:
    got = await begun(s, 3)
    entries = [b"0", b"1", b"2"]
    await yes(s, Renew(KEY, "a", got.fence, LONG), "Renew by the owner: True.")
    await journal_is(s, entries, "Renew leaves the journal as it is.")
    expect(await s.ask(Claim(KEY, "a", LONG)), Acquired, OWN)
    await journal_is(s, entries, "Claim, again by the owner, leaves the journal as it is.")
    await yes(s, Abandon(KEY, "a", got.fence), "Abandon by the owner: True.")
    record = await journal_is(s, entries, "Abandon leaves the journal as it is.")
    check(record.state == "in doubt", "Abandon: in doubt from here on.", record)
    removed = await s.ask(Purge(LONG))
    check(removed == 0, "Purge: those that ended at least `older_than` seconds ago, and this did not.", removed)
    await yes(s, Finish(KEY, "a", got.fence, b"result", LONG), "Finish by the owner: True.")
    record = await journal_is(s, entries, "Finish keeps the journal.")
    check((record.state, record.result) == ("done", b"result"), "Finish: keep the result; done.", record)


async def the_journal_goes_with_the_record(s: Session) -> None:
    live = key(1)
    await begun(s, 3, live)
    for how in (
        "Release",
        "Forget what is done",
        "Forget what is in doubt",
        "Purge what is done",
        "Purge what is in doubt",
    ):
        fence = (await begun(s, 3)).fence
        if how == "Release":
            await yes(s, Release(KEY, "a", fence), "Release by the owner: True.")
        else:
            end = Finish(KEY, "a", fence, b"", LONG) if how.endswith("done") else Abandon(KEY, "a", fence)
            await yes(s, end, "Finish or Abandon by the owner: True.")
            if how.startswith("Forget"):
                await yes(s, Forget(KEY), "Forget: remove one record, finished or in doubt.")
            else:
                await s.until(Purge(0.0), lambda removed: removed == 1, "Purge: the number of records removed.")
        check(await s.ask(History(KEY)) is None, f"{how}. {NONE}", await s.ask(History(KEY)))
        fence = (await take(s)).fence
        await journal_is(s, [], f"{how}. {GONE}")
        await yes(s, Append(KEY, "a", fence, 0, b"new", LONG), f"{how}. {GONE}")
        await yes(s, Release(KEY, "a", fence), "Release by the owner: True.")
        await begin(s, b"newer")
        await journal_is(s, [b"newer"], f"{how}. {GONE}")
        await yes(s, Release(KEY, "a", 0), "Release by the owner: True.")
    await journal_is(s, [b"0", b"1", b"2"], "Journals of other keys have nothing to do with it.", live)


async def purge_counts_records_and_not_entries(s: Session) -> None:
    for number in range(5):
        fence = (await begun(s, 4, key(number))).fence
        await yes(s, Finish(key(number), "a", fence, b"", LONG), "Finish by the owner: True.")
    for most in (3, 2):
        sentence = "Purge: up to `batch` (3) records, however many entries they have."
        removed = await s.until(Purge(0.0, 3), lambda removed: removed != 0, sentence)
        check(removed == most, sentence, removed)
    removed = await s.ask(Purge(0.0, 3))
    check(removed == 0, "Purge: fewer than `batch` means that none is left.", removed)


async def journals_are_apart(s: Session) -> None:
    keys = ["0" * 40, "0" * 39 + "1", "1" + "0" * 39, "0" * 39 + "a"]
    entries = {here: [f"{here} {at}".encode() for at in range(4)] for here in keys}
    fences = [(await begin(s, entries[here][0], key=here)).fence for here in keys]
    for at in range(1, 4):
        for here, fence in zip(keys, fences, strict=True):
            await yes(s, Append(here, "a", fence, at, entries[here][at], LONG), f"{ADDS} By the owner: True.")
    for here in keys:
        await journal_is(s, entries[here], "Journals of other keys have nothing to do with it.", here)


# -- scans by state ---------------------------------------------------------------------------------------------------


async def scan_shows_the_state_that_is_wanted(s: Session) -> None:
    expected: dict[str, set[str]] = {"running": set(), "in doubt": set(), "done": set()}
    states = list(expected)
    for number in range(5):
        await begin(s, key=key(100 + number), lease=s.soon)
        expected["in doubt"].add(key(100 + number))
    for number in range(5):
        await in_doubt(s, key(100 + number))
    for number in range(36):
        here, state = key(number), states[number % 3]
        fence = (await begin(s, key=here)).fence
        expected[state].add(here)
        if state != "running":
            end = Finish(here, "a", fence, b"", LONG) if state == "done" else Abandon(here, "a", fence)
            await yes(s, end, "Finish or Abandon by the owner: True.")
    for limit in (1, 5, 100):
        for state, keys in expected.items():
            found = await pages(s, limit, state=state)
            same = sorted(record.key for record in found) == sorted(keys)
            check(same, f"Scan, limit {limit}: a state that is not empty is the only one wanted, {state!r}.", found)
            check(all(record.state == state for record in found), f"Scan: these are {state!r}.", found)
        everything = {record.key for record in await pages(s, limit)}
        check(everything == set().union(*expected.values()), "Scan, without a state: every record.", everything)


async def scan_by_state_and_text_wants_both(s: Session) -> None:
    for number in range(12):
        label = ("red", "blue")[number % 2]
        fence = (await take(s, key=key(number), label=label)).fence
        if number % 4 < 2:
            await yes(s, Abandon(key(number), "a", fence), "Abandon by the owner: True.")
    for limit in (1, 100):
        for state, first in (("in doubt", 0), ("running", 2)):
            for text in ("red", "blue"):
                start = first + (text == "blue")
                found = sorted(record.key for record in await pages(s, limit, text, state=state))
                wanted = sorted(key(number) for number in range(start, 12, 4))
                check(
                    found == wanted, f"Scan: those whose label contains {text!r}, and are {state!r}: {wanted}.", found
                )
    found = [record.key for record in await pages(s, 100, "red", state="done")]
    check(not found, "Scan: a state that is not empty is the only one wanted, and none is 'done'.", found)


async def scan_does_not_show_a_result_that_is_over(s: Session) -> None:
    got = await begin(s)
    await yes(s, Finish(KEY, "a", got.fence, b"", s.soon), "Finish by the owner: True.")
    await s.until(Read(KEY), lambda record: record is None, "Read: a result whose time is over counts as none.")
    for state in ("running", "in doubt", "done"):
        page = await s.ask(Scan(state=state))
        check(not page.records, f"Scan, {state!r}: a result whose time is over counts as none.", page)


# -- races ------------------------------------------------------------------------------------------------------------


async def one_of_many_begins_wins(s: Session) -> None:
    keys = [key(number) for number in range(RACES)]
    rows = await s.race([[Begin(here, f"owner {n}", LONG, b"%d" % n) for here in keys] for n in range(RACERS)])
    sentence = "Begin: one atomic step, so that one of those who race gets the key."
    await first_is_the_winners(s, keys, rows, 1, sentence)


async def first_is_the_winners(
    s: Session, keys: Sequence[str], rows: Sequence[Sequence[Any]], attempt: int, sentence: str
) -> None:
    for here, answers in zip(keys, zip(*rows, strict=True), strict=True):
        await one_won(s, here, answers, attempt, sentence)
        winner = [isinstance(answer, Acquired) for answer in answers].index(True)
        entries = [b"%d" % winner] if attempt == 1 else [b"0", b"1"]
        await journal_is(s, entries, f"{sentence} The winner is number {winner}.", here)


async def one_of_many_begins_that_take_over_wins(s: Session) -> None:
    keys = [key(number) for number in range(RACES)]
    for here in keys:
        await yes(s, Abandon(here, "a", (await begun(s, 2, here)).fence), "Abandon by the owner: True.")
    rows = await s.race([[Begin(here, f"owner {n}", LONG, b"", "", True) for here in keys] for n in range(RACERS)])
    sentence = "Begin with take_over: one atomic step; one of those who race gets the key."
    await first_is_the_winners(s, keys, rows, 2, sentence)


async def one_of_many_appends_of_a_number_stays(s: Session) -> None:
    got = await begin(s, b"")
    rows = await s.race(
        [[Append(KEY, "a", got.fence, at, b"%d" % n, LONG) for at in range(1, RACES)] for n in range(RACERS)]
    )
    answers = [answer for row in rows for answer in row]
    check(all(answer is True for answer in answers), AGAIN, answers)
    _, entries = await history(s)
    check(len(entries) == RACES, f"{AGAIN} There are {RACES}.", entries)
    known = {b"%d" % n for n in range(RACERS)}
    check(entries[0] == b"" and set(entries[1:]) <= known, "The entries are those that were given.", entries)


async def an_append_that_races_takeovers_is_kept_or_refused(s: Session) -> None:
    keys = [key(number) for number in range(RACES)]
    racers: list[list[AnyOp]] = []
    for here in keys:
        fence = (await begin(s, key=here)).fence
        await yes(s, Abandon(here, "a", fence), "Abandon by the owner: True.")
        takers = [Begin(here, f"taker {taker}", LONG, b"other", "", True) for taker in range(3)]
        racers.append([Append(here, "a", fence, 1, b"of a", LONG), *takers])
    # Each in turn is first, where tasks begin in the order in which they are made.
    rows = await s.race([[ops[(row + turn) % 4] for turn, ops in enumerate(racers)] for row in range(4)])
    for number, here in enumerate(keys):
        appended, *answers = [rows[(racer - number) % 4][number] for racer in range(4)]
        takers_won = sum(isinstance(answer, Acquired) for answer in answers)
        record, entries = await history(s, here)
        if appended:
            check(takers_won == 0, "Append: True, so its lease runs, and nobody has taken the key over.", answers)
            check(entries == (b"0", b"of a") and record.owner == "a", "Append: True, so the entry is kept.", entries)
        else:
            check(takers_won == 1, "Append: False, so one of the others has taken the key over.", answers)
            check(entries == (b"0",) and record.owner != "a", "Append: False, so nothing has changed.", entries)


async def history_is_of_one_instant(s: Session) -> None:
    got = await begin(s)
    writer: list[AnyOp] = [Append(KEY, "a", got.fence, at, b"%d" % at, LONG, str(at)) for at in range(1, RACES)]
    readers: list[list[AnyOp]] = [[History(KEY)] * len(writer) for _ in range(RACERS - 1)]
    _, *rows = await s.race([writer, *readers])
    for row in rows:
        before = 0
        for step, (record, entries) in enumerate(row, 1):
            sentence = "History: record and entries as they are at one instant, while entries are added."
            there = entries == tuple(b"%d" % at for at in range(len(entries))) and len(entries) >= max(before, step)
            label = str(len(entries) - 1) if len(entries) > 1 else "label of a"
            check(there and record.label == label, f"{sentence} The label is the last entry.", (record, entries))
            before = len(entries)


JOURNAL_BODIES: tuple[Body, ...] = (
    begin_stores_the_first_entry,
    begin_repeated_by_the_owner_adds_nothing,
    begin_repeated_by_the_owner_after_its_lease_adds_nothing,
    begin_on_a_key_that_is_taken_answers_like_claim,
    begin_on_a_key_that_was_only_claimed_is_busy,
    begin_after_a_result_that_is_over_begins_anew,
    begin_with_take_over_keeps_the_journal,
    claim_with_take_over_keeps_the_journal,
    append_adds_at_the_next_number,
    append_begins_at_0_where_there_is_no_journal,
    append_revives_a_lease_that_nobody_took,
    append_repeated_keeps_the_first,
    append_leaves_no_gap,
    append_replaces_the_label_if_it_has_one,
    others_cannot_append,
    a_late_owner_cannot_append_after_a_takeover,
    nothing_is_appended_to_what_is_done_or_gone,
    entries_are_bytes_of_any_kind,
    a_thousand_entries_stay_in_order,
    history_of_nothing_is_none,
    the_journal_stays_while_the_record_does,
    the_journal_goes_with_the_record,
    purge_counts_records_and_not_entries,
    journals_are_apart,
    scan_shows_the_state_that_is_wanted,
    scan_by_state_and_text_wants_both,
    scan_does_not_show_a_result_that_is_over,
    one_of_many_begins_wins,
    one_of_many_begins_that_take_over_wins,
    one_of_many_appends_of_a_number_stays,
    an_append_that_races_takeovers_is_kept_or_refused,
    history_is_of_one_instant,
)
