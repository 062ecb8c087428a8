"""The suite that says whether a store is one: the cases, but for journals. Their machinery is in `_contract`.

Each case is a part of what `resilient.stores._ops` promises, and each of its checks quotes the sentence. A case runs
unchanged in threads, asyncio and trio. Leases of `LONG` never end while it runs; those of `s.soon` do. The cases keep
to what the contract says: pages of a `Scan` may repeat records, a watch may ring for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from hashlib import sha256
from itertools import count
from typing import Any

from resilient._contract import Body, Session, check, expect
from resilient.clock import SystemClock
from resilient.stores._ops import (
    Abandon,
    Acquired,
    AnyOp,
    Busy,
    Claim,
    Completed,
    Doubtful,
    Finish,
    Forget,
    Page,
    Purge,
    Read,
    Record,
    Release,
    Renew,
    Scan,
)

__all__ = ["BODIES"]

LONG = 600.0
CLOSE = 0.05
"""Seconds by which an instant may be rounded."""
RACES = 50
RACERS = 8

NEW = "No record, or a result whose time is over: Acquired, attempt 1."
OWN = "The owner itself, again: Acquired with the fence and attempt that it has."
BUSY = "Another owner with a lease that runs: Busy."
DOUBT = "Another owner whose lease is over: Doubtful."
TAKEN = "With take_over: Acquired with the next attempt's number and a larger fence."
RESULT = "A result: Completed."
GROWS = "`fence` is larger than each number that this key had before."
ONLY_OWNER = "Only the owner that holds the fence may renew, finish, release or abandon."


def key(number: int) -> str:
    """A key as `Idempotent` makes them: 40 hexadecimal digits."""
    return sha256(str(number).encode()).hexdigest()[:40]


KEY = key(0)


def writes(owner: str, fence: int, key: str = KEY) -> list[AnyOp]:
    """All that only the owner with the fence may do."""
    ending: list[AnyOp] = [Finish(key, owner, fence, b"not mine", LONG), Release(key, owner, fence)]
    return [Renew(key, owner, fence, LONG), *ending, Abandon(key, owner, fence)]


def below(fence: int) -> int:
    """A number that the fence is not; nor 0, which stands for whichever."""
    return fence - 1 or fence + 2


async def take(s: Session, owner: str = "a", key: str = KEY, lease: float = LONG, label: str = "") -> Acquired:
    answer = expect(await s.ask(Claim(key, owner, lease, "print of " + owner, label)), Acquired, NEW)
    check(answer.attempt == 1, NEW, answer)
    return answer


async def take_over(s: Session, owner: str, key: str = KEY) -> Acquired:
    return expect(await s.ask(Claim(key, owner, LONG, "print of " + owner, "", True)), Acquired, TAKEN)


async def lapse(s: Session, owner: str = "a", key: str = KEY) -> Acquired:
    """Claim, and let the lease end."""
    got = await take(s, owner, key, s.soon)
    sentence = "Read: in doubt, once the lease has ended."
    await s.until(Read(key), lambda record: record is not None and record.state == "in doubt", sentence)
    return got


async def done(s: Session, result: bytes = b"result", owner: str = "a", key: str = KEY, label: str = "") -> Acquired:
    got = await take(s, owner, key, label=label)
    answer = await s.ask(Finish(key, owner, got.fence, result, LONG))
    check(answer is True, "Finish by the owner: True.", answer)
    return got


async def yes(s: Session, op: AnyOp, sentence: str) -> None:
    answer = await s.ask(op)
    check(answer is True, sentence, answer)


# -- claims ---------------------------------------------------------------------------------------------------------


async def a_new_key_is_acquired(s: Session) -> None:
    check(await s.ask(Read(KEY)) is None, "Read: the record of a key, or None.", ...)
    got = await take(s, label="what it was")
    check(got.fence > 0, "A fence is a number above 0, which stands for whichever.", got)
    record = await s.record(KEY)
    expected = Record(
        key=KEY,
        state="running",
        owner="a",
        fence=got.fence,
        attempt=1,
        fingerprint="print of a",
        label="what it was",
        began_at=record.began_at,
        mark=record.mark,
        expires_at=None,
        result=None,
    )
    check(record == expected, f"Read: the record as it is now, {expected!r}.", record)
    lease = record.mark - record.began_at
    check(abs(lease - LONG) < CLOSE, f"`mark` is the end of the lease, {LONG} seconds after `began_at`.", record)


async def another_owner_is_told_that_it_is_busy(s: Session) -> None:
    got = await take(s)
    before = await s.record(KEY)
    for claim in (
        Claim(KEY, "b", 1.0, "other"),
        Claim(KEY, "b", 1.0, take_over=True),
        Claim(KEY, "b", 1, awaited=True),
    ):
        busy = expect(await s.ask(claim), Busy, BUSY)
        same = (busy.fence, busy.attempt, busy.fingerprint) == (got.fence, 1, "print of a")
        check(same, "Busy carries fence, attempt and fingerprint of the owner's claim.", busy)
        check(0 < busy.lease_left <= LONG + CLOSE, "lease_left: the seconds that the owner's lease still runs.", busy)
        after = await s.record(KEY)
        check(after == before, f"Busy: the record stays, {before!r}.", after)


async def the_owner_may_claim_again(s: Session) -> None:
    got = await take(s, lease=LONG)
    for lease in (10 * LONG, LONG / 10):
        for claim in (Claim(KEY, "a", lease, "print of a"), Claim(KEY, "a", lease, "print of a", take_over=True)):
            again = expect(await s.ask(claim), Acquired, OWN)
            check(again == got, f"{OWN} {got!r}.", again)
            await lease_is(s, lease, "The owner itself, again: its lease starts anew.")


async def lease_is(s: Session, lease: float, sentence: str) -> None:
    busy = expect(await s.ask(Claim(KEY, "z", 1.0)), Busy, BUSY)
    check(lease / 2 < busy.lease_left <= lease + CLOSE, f"{sentence} It is {lease} seconds.", busy)


async def the_owner_may_claim_again_after_its_lease(s: Session) -> None:
    got = await lapse(s)
    again = expect(await s.ask(Claim(KEY, "a", LONG)), Acquired, OWN)
    check(again == got, f"{OWN} {got!r}.", again)
    await lease_is(s, LONG, "The owner itself, again: its lease starts anew.")


async def a_key_with_a_result_is_completed_for_everybody(s: Session) -> None:
    got = await done(s)
    before = await s.record(KEY)
    for owner in ("a", "b"):
        for over in (False, True):
            answer = expect(await s.ask(Claim(KEY, owner, LONG, "other", "other", over)), Completed, RESULT)
            same = answer == Completed(got.fence, 1, "print of a", b"result")
            check(same, f"{RESULT} It carries fence, attempt, fingerprint and result of the record.", answer)
    after = await s.record(KEY)
    check(after == before, f"Completed: the record stays, {before!r}.", after)


async def a_lease_that_is_over_is_doubtful_and_stays_so(s: Session) -> None:
    got = await lapse(s)
    before = await s.record(KEY)
    for _ in range(2):
        answer = expect(await s.ask(Claim(KEY, "b", LONG, "other", "other")), Doubtful, DOUBT)
        same = (answer.fence, answer.attempt, answer.fingerprint) == (got.fence, 1, "print of a")
        check(same, "Doubtful carries fence, attempt and fingerprint of the attempt in doubt.", answer)
        check(answer.since >= 0, "since: how many seconds ago the lease ended.", answer)
        after = await s.record(KEY)
        check(after == before, f"A claim without take_over changes nothing, from {before!r}.", after)


async def since_counts_from_the_end_of_the_lease(s: Session) -> None:
    await lapse(s)
    first = expect(await s.ask(Claim(KEY, "b", LONG)), Doubtful, DOUBT)
    check(first.since < s.patience + 1.5, "since: seconds since the lease ended, by the store's own clock.", first)
    claim = Claim(KEY, "b", LONG)
    sentence = "since: how many seconds ago the lease ended, more as time goes by."
    await s.until(claim, lambda answer: isinstance(answer, Doubtful) and answer.since > first.since, sentence)


async def take_over_begins_the_next_attempt(s: Session) -> None:
    fence = (await lapse(s)).fence
    for attempt, owner in enumerate("bcd", 2):
        got = await take_over(s, owner)
        check(got.attempt == attempt, f"{TAKEN} Attempt {attempt}.", got)
        check(got.fence > fence, f"{GROWS} It was {fence}.", got)
        fence = got.fence
        record = await s.record(KEY)
        theirs = (record.state, record.owner, record.fence, record.attempt, record.fingerprint)
        check(theirs == ("running", owner, fence, attempt, "print of " + owner), "The key is the new owner's.", record)
        await yes(s, Abandon(KEY, owner, fence), "Abandon by the owner: True.")


async def take_over_repeated_is_harmless(s: Session) -> None:
    await lapse(s)
    got = await take_over(s, "b")
    again = await take_over(s, "b")
    check(again == got, f"Repeating an operation with the same owner is harmless: {got!r}.", again)
    for late in (Claim(KEY, "a", LONG), Claim(KEY, "a", LONG, take_over=True)):
        expect(await s.ask(late), Busy, BUSY)


async def a_result_of_a_later_attempt_says_so(s: Session) -> None:
    await lapse(s)
    got = await take_over(s, "b")
    await yes(s, Finish(KEY, "b", got.fence, b"second", LONG), "Finish by the owner: True.")
    answer = await s.ask(Claim(KEY, "c", LONG))
    check(answer == Completed(got.fence, 2, "print of b", b"second"), RESULT, answer)


async def texts_are_kept_as_they_are(s: Session) -> None:
    texts = ["", "é ☃ 𝄞 \u200b", "%_*?[]'\"\\;--", '{"key": "o-1\\u0000"}', " \t\r\n ", "x" * 10_000, "0", "null"]
    for number, text in enumerate(texts):
        here = key(number)
        expect(await s.ask(Claim(here, text or "a", LONG, text, text)), Acquired, NEW)
        record = await s.record(here)
        kept = (record.owner, record.fingerprint, record.label) == (text or "a", text, text)
        check(kept, f"fingerprint, label and owner are kept as they are, {text[:40]!r}.", record)
        busy = expect(await s.ask(Claim(here, "b", LONG)), Busy, BUSY)
        check(busy.fingerprint == text, f"Busy: the fingerprint of the owner's claim, {text[:40]!r}.", busy)


async def keys_are_apart(s: Session) -> None:
    await take(s, "a", "0" * 40)
    for other in ("0" * 39 + "1", "1" + "0" * 39, "0" * 39 + "a", "f" * 40):
        await take(s, "b", other)
        await s.refuses(writes("b", 0, "0" * 40)[2:], "0" * 40, "Keys have nothing to do with each other.")
    check((await s.record("0" * 40)).owner == "a", "Keys have nothing to do with each other.", ...)


# -- writes ---------------------------------------------------------------------------------------------------------


async def renew_starts_the_lease_anew(s: Session) -> None:
    got = await take(s)
    for lease in (10 * LONG, LONG / 10, LONG / 10):
        await yes(s, Renew(KEY, "a", got.fence, lease), "Renew by the owner: True.")
        await lease_is(s, lease, "Renew: start the lease anew.")
    record = await s.record(KEY)
    check((record.attempt, record.fence) == (1, got.fence), "Renew: fence and attempt stay.", record)


async def renew_revives_a_lease_that_nobody_took(s: Session) -> None:
    got = await lapse(s)
    await yes(s, Renew(KEY, "a", got.fence, LONG), "Renew: False if somebody else's, done or gone; else True.")
    await lease_is(s, LONG, "Renew: start the lease anew.")


async def finish_keeps_the_result(s: Session) -> None:
    got = await take(s, label="what it was")
    began = (await s.record(KEY)).began_at
    await yes(s, Finish(KEY, "a", got.fence, b"result", LONG), "Finish by the owner: True.")
    record = await s.record(KEY)
    kept = (record.state, record.result, record.fence, record.attempt, record.owner) == (
        *("done", b"result", got.fence, 1),
        "a",
    )
    check(kept, "Finish: keep the result; done, with fence, attempt and owner as they were.", record)
    check((record.label, record.began_at) == ("what it was", began), "Finish: label and began_at stay.", record)
    ttl = -1.0 if record.expires_at is None else record.expires_at - record.mark
    check(
        abs(ttl - LONG) < CLOSE, f"expires_at: {LONG} seconds after `mark`, the instant at which it was done.", record
    )
    check(record.mark < began + LONG / 2, "`mark`: once done, the instant of that, not the end of the lease.", record)


async def results_are_bytes_of_any_kind(s: Session) -> None:
    for number, result in enumerate((b"", b"\0", bytes(range(256)), b"'; --\xff\xfe", b"\x80" * 1_000_000)):
        await done(s, result, key=key(number))
        answer = expect(await s.ask(Claim(key(number), "b", LONG)), Completed, RESULT)
        check(answer.result == result, f"{RESULT} With these very bytes, {result[:40]!r}.", answer)
        record = await s.record(key(number))
        check((record.state, record.result) == ("done", result), f"Read: done, with {result[:40]!r}.", record)


async def finish_repeated_keeps_the_first_result(s: Session) -> None:
    got = await done(s, b"first")
    before = await s.record(KEY)
    sentence = "Finish: True as well where this owner has finished already: the first result stays."
    await yes(s, Finish(KEY, "a", got.fence, b"second", 10 * LONG), sentence)
    after = await s.record(KEY)
    check(after == before, f"{sentence} It is {before!r}.", after)


async def finish_after_the_lease_succeeds_if_nobody_took_over(s: Session) -> None:
    got = await lapse(s)
    sentence = "Finish: a lease that is over does not matter while nobody has taken the key over."
    await yes(s, Finish(KEY, "a", got.fence, b"late", LONG), sentence)
    answer = await s.ask(Claim(KEY, "b", LONG, "", "", True))
    check(answer == Completed(got.fence, 1, "print of a", b"late"), sentence, answer)


async def release_forgets_the_key(s: Session) -> None:
    got = await take(s)
    await yes(s, Release(KEY, "a", got.fence), "Release by the owner: True.")
    await s.refuses(writes("a", got.fence), KEY, "Release: the key is forgotten.")
    check(await s.ask(Read(KEY)) is None, "Release: forget the key.", ...)
    next_one = await take(s, "b")
    check(next_one.fence > got.fence, f"{GROWS} It was {got.fence}.", next_one)


async def release_after_the_lease_succeeds_if_nobody_took_over(s: Session) -> None:
    got = await lapse(s)
    await yes(s, Release(KEY, "a", got.fence), "Release: False only if it is not this owner's any more.")
    await take(s, "b")


async def abandon_puts_the_key_in_doubt(s: Session) -> None:
    got = await take(s)
    await yes(s, Abandon(KEY, "a", got.fence), "Abandon by the owner: True.")
    before = await s.record(KEY)
    kept = (before.state, before.owner, before.fence, before.attempt) == ("in doubt", "a", got.fence, 1)
    check(kept, "Abandon: end the lease now, and keep the record: in doubt from here on.", before)
    answer = expect(await s.ask(Claim(KEY, "b", LONG)), Doubtful, DOUBT)
    check(0 <= answer.since < LONG / 2, "Abandon: end the lease now; since counts from then.", answer)
    await yes(s, Abandon(KEY, "a", got.fence), "Abandon, repeated by the owner: True.")
    after = await s.record(KEY)
    check(after == before, f"Abandon, repeated, is harmless: {before!r}.", after)
    next_one = await take_over(s, "b")
    check(next_one.attempt == 2 and next_one.fence > got.fence, TAKEN, next_one)


async def abandon_does_not_prolong_a_lease_that_is_over(s: Session) -> None:
    got = await lapse(s)
    before = await s.record(KEY)
    await yes(s, Abandon(KEY, "a", got.fence), "Abandon: False only if it is not this owner's any more.")
    after = await s.record(KEY)
    check(after == before, f"Abandon of a lease that is over changes nothing, from {before!r}.", after)


async def fence_0_stands_for_whichever_the_owner_has(s: Session) -> None:
    await take(s)
    await s.refuses((Release(KEY, "b", 0), Abandon(KEY, "b", 0)), KEY, ONLY_OWNER)
    await yes(s, Abandon(KEY, "a", 0), "Abandon: fence 0 stands for whichever this owner has.")
    check((await s.record(KEY)).state == "in doubt", "Abandon: in doubt from here on.", ...)
    await yes(s, Release(KEY, "a", 0), "Release: fence 0 stands for whichever this owner has.")
    check(await s.ask(Read(KEY)) is None, "Release: forget the key.", ...)
    await s.refuses((Release(KEY, "a", 0), Abandon(KEY, "a", 0)), KEY, "There is no record.")


async def others_cannot_write(s: Session) -> None:
    got = await take(s)
    for owner, fence in (
        ("b", got.fence),
        ("A", got.fence),
        ("a", got.fence + 1),
        ("a", below(got.fence)),
        ("", got.fence),
    ):
        await s.refuses(writes(owner, fence), KEY, ONLY_OWNER)


async def others_cannot_write_after_the_lease(s: Session) -> None:
    got = await lapse(s)
    for owner, fence in (("b", got.fence), ("a", got.fence + 1), ("a", below(got.fence))):
        await s.refuses(writes(owner, fence), KEY, ONLY_OWNER)


async def an_old_fence_of_the_same_owner_is_refused(s: Session) -> None:
    old = await take(s)
    await yes(s, Release(KEY, "a", old.fence), "Release by the owner: True.")
    got = await take(s)
    check(got.fence > old.fence, f"{GROWS} It was {old.fence}.", got)
    await s.refuses(writes("a", old.fence), KEY, ONLY_OWNER)


async def a_late_owner_changes_nothing_after_a_takeover(s: Session) -> None:
    old = await lapse(s)
    got = await take_over(s, "b")
    whichever: list[AnyOp] = [Release(KEY, "a", 0), Abandon(KEY, "a", 0)]
    await s.refuses([*writes("a", old.fence), *writes("a", got.fence), *whichever], KEY, ONLY_OWNER)


async def a_late_owner_does_not_overwrite_the_result(s: Session) -> None:
    old = await lapse(s)
    got = await take_over(s, "b")
    await yes(s, Finish(KEY, "b", got.fence, b"of b", LONG), "Finish by the owner: True.")
    await s.refuses([Finish(KEY, "a", old.fence, b"of a", LONG)], KEY, "A late owner does not overwrite a result.")


async def a_late_failure_does_not_delete_the_result(s: Session) -> None:
    old = await lapse(s)
    got = await take_over(s, "b")
    await yes(s, Finish(KEY, "b", got.fence, b"of b", LONG), "Finish by the owner: True.")
    ops: list[AnyOp] = [Release(KEY, "a", old.fence), Release(KEY, "a", 0), Abandon(KEY, "a", 0)]
    await s.refuses([*ops, Renew(KEY, "a", old.fence, LONG)], KEY, "A late owner's failure does not delete a result.")


async def nobody_undoes_a_result(s: Session) -> None:
    got = await done(s)
    ops: list[AnyOp] = [Renew(KEY, "a", got.fence, LONG), Release(KEY, "a", got.fence), Release(KEY, "a", 0)]
    mine: list[AnyOp] = [*ops, Abandon(KEY, "a", got.fence), Abandon(KEY, "a", 0)]
    await s.refuses([*mine, *writes("b", got.fence), *writes("a", got.fence + 1)], KEY, "The key is done.")


async def nothing_can_be_written_where_nothing_is(s: Session) -> None:
    for fence in (1, 2**52):
        await s.refuses([*writes("a", fence), Forget(KEY)], KEY, "There is no record.")
    await s.refuses([Release(KEY, "a", 0), Abandon(KEY, "a", 0)], KEY, "There is no record.")


async def a_result_is_forgotten_when_its_time_is_over(s: Session) -> None:
    got = await take(s, label="short")
    await yes(s, Finish(KEY, "a", got.fence, b"brief", s.soon), "Finish by the owner: True.")
    gone = "A result whose time is over counts as none."
    await s.until(Read(KEY), lambda record: record is None, f"Read: {gone}")
    page = await s.ask(Scan())
    check(not page.records, f"Scan: {gone}", page)
    next_one = await take(s, "b")
    check(next_one.fence > got.fence, f"{GROWS} It was {got.fence}.", next_one)
    record = await s.record(KEY)
    check((record.state, record.result) == ("running", None), f"Claim: {gone}", record)


async def fences_grow_whatever_removed_the_record(s: Session) -> None:
    fence = 0
    for turn in range(20):
        got = await take(s)
        check(got.fence > fence, f"{GROWS} It was {fence}.", got)
        fence = got.fence
        if turn % 4 == 0:
            await yes(s, Release(KEY, "a", fence), "Release by the owner: True.")
            continue
        if turn % 4 == 1:
            await yes(s, Abandon(KEY, "a", fence), "Abandon by the owner: True.")
            fence = (await take_over(s, "b")).fence
            await yes(s, Abandon(KEY, "b", fence), "Abandon by the owner: True.")
        else:
            await yes(s, Finish(KEY, "a", fence, b"", LONG), "Finish by the owner: True.")
        if turn % 4 == 3:
            await s.until(Purge(0.0), lambda removed: removed == 1, "Purge: remove what ended; the number removed.")
        else:
            await yes(s, Forget(KEY), "Forget: remove one record, finished or in doubt.")


# -- reading and cleaning -------------------------------------------------------------------------------------------


async def pages(
    s: Session,
    limit: int,
    text: str = "",
    between: Callable[[], Coroutine[Any, Any, None]] | None = None,
    state: str = "",
) -> list[Record]:
    """Every record that a scan sees, each once. Something may happen `between` its pages."""
    seen: dict[str, Record] = {}
    after = ""
    for _ in range(10_000):
        page = expect(await s.ask(Scan(after, limit, text, state)), Page, "Scan: a page.")
        seen.update((record.key, record) for record in page.records)
        if not page.after:
            return list(seen.values())
        after = page.after
        if between is not None:
            await between()
    raise AssertionError("Scan: go on until `after` is empty. The store answered ten thousand pages without an end.")


async def scan_sees_every_record(s: Session) -> None:
    check(not await pages(s, 7), "Scan: nothing is there.", ...)
    for number in range(23):
        here = key(number)
        if number % 3 == 0:
            await take(s, key=here, label=str(number))
        elif number % 3 == 1:
            await done(s, key=here, label=str(number))
        else:
            fence = (await take(s, key=here)).fence
            await yes(s, Abandon(here, "a", fence), "Abandon by the owner: True.")
    expected = [await s.record(key(number)) for number in range(23)]
    for limit in (1, 7, 23, 100):
        found = await pages(s, limit)
        same = sorted(found, key=_by_key) == sorted(expected, key=_by_key)
        check(same, f"Scan, limit {limit}: every record is seen at least once, as Read shows it.", found)


def _by_key(record: Record) -> str:
    return record.key


async def scan_keeps_its_place_while_records_come_and_go(s: Session) -> None:
    stay = {key(number) for number in range(12)}
    for here in stay:
        await done(s, key=here)
    numbers = count(100)

    async def come_and_go() -> None:
        number = next(numbers)
        await done(s, key=key(number))
        if number > 100:
            await yes(s, Forget(key(number - 1)), "Forget: remove one record, finished or in doubt.")

    seen = {record.key for record in await pages(s, 3, between=come_and_go)}
    missed = stay - seen
    check(not missed, "Scan: every record that is there all the while is seen at least once.", f"none of {missed}")


async def scan_filters_by_the_text_itself(s: Session) -> None:
    texts = ["%", "_", "*", "?", "'", '"', "\\", "[a]", "a%b", "é", "☃", "ABC", "abc", "a b", "--", "\\%"]
    labels = [*(f"<{text}>" for text in texts), "", "plain", "xaxbx"]
    for number, label in enumerate(labels):
        await take(s, key=key(number), label=label)
    for limit in (1, 100):
        for text in [*texts, "not there", "<", ""]:
            found = sorted(record.label for record in await pages(s, limit, text))
            expected = sorted(label for label in labels if text in label)
            check(found == expected, f"Scan: those whose label contains {text!r}, itself: {expected}.", found)


async def purge_removes_what_ended_in_batches(s: Session) -> None:
    live = {key(number) for number in range(3)}
    for here in live:
        await take(s, key=here, label="live")
    for number in range(3, 13):
        fence = (await take(s, key=key(number))).fence
        done_or_not = Finish(key(number), "a", fence, b"", LONG) if number % 2 else Abandon(key(number), "a", fence)
        await yes(s, done_or_not, "Finish or Abandon by the owner: True.")
    removed = await s.ask(Purge(2 * LONG))
    check(removed == 0, "Purge: those that ended at least `older_than` seconds ago, and these did not.", removed)
    rest = 10
    while rest:
        most = min(3, rest)
        sentence = f"Purge: up to `batch` (3) records; {rest} are left, finished or in doubt."
        answer = await s.until(Purge(0.0, 3), lambda removed: removed != 0, sentence)
        check(answer == most, f"{sentence} Fewer than `batch` means that none is left.", answer)
        rest -= answer
    removed = await s.ask(Purge(0.0))
    check(removed == 0, "Purge: never one whose lease runs.", removed)
    found = {record.key for record in await pages(s, 100)}
    check(found == live, f"Purge: never one whose lease runs; these do: {live}.", found)


async def purge_spares_a_lease_that_runs(s: Session) -> None:
    got = await take(s)
    for op in (Purge(0.0), Purge(LONG), Purge(0.0, 1)):
        removed = await s.ask(op)
        check(removed == 0, "Purge: never one whose lease runs.", removed)
    await yes(s, Renew(KEY, "a", got.fence, LONG), "Purge: never one whose lease runs, so its owner may renew.")


async def purge_counts_from_the_end_of_the_record(s: Session) -> None:
    await lapse(s)
    await done(s, key=key(1))
    removed = await s.ask(Purge(2 * LONG))
    check(removed == 0, "Purge: those that ended at least `older_than` seconds ago, and these did not.", removed)
    old = s.soon * 4
    total = 0

    def add(removed: int) -> bool:
        nonlocal total
        total += removed
        return total == 2

    await s.until(Purge(old), add, f"Purge: those that ended at least {old} seconds ago, by result or by doubt.")


async def forget_removes_what_a_person_says(s: Session) -> None:
    got = await take(s)
    await s.refuses([Forget(KEY)], KEY, "Forget: False, its lease runs.")
    await yes(s, Abandon(KEY, "a", got.fence), "Abandon by the owner: True.")
    await yes(s, Forget(KEY), "Forget: remove one record, finished or in doubt.")
    check(await s.ask(Read(KEY)) is None, "Forget: remove one record.", ...)
    await s.refuses([Forget(KEY), *writes("a", got.fence)], KEY, "There is no record.")
    await done(s, key=KEY, owner="b")
    await yes(s, Forget(KEY), "Forget: remove one record, finished or in doubt.")
    check(await s.ask(Read(KEY)) is None, "Forget: remove one record.", ...)


# -- races ----------------------------------------------------------------------------------------------------------


async def one_of_many_claims_wins(s: Session) -> None:
    keys = [key(number) for number in range(RACES)]
    rows = await s.race([[Claim(here, f"owner {racer}", LONG) for here in keys] for racer in range(RACERS)])
    for here, answers in zip(keys, zip(*rows, strict=True), strict=True):
        await one_won(s, here, answers, 1, "Claim: one atomic step, so that one of those who race gets the key.")


async def one_of_many_takeovers_wins(s: Session) -> None:
    keys = [key(number) for number in range(RACES)]
    for here in keys:
        await yes(s, Abandon(here, "a", (await take(s, key=here)).fence), "Abandon by the owner: True.")
    claims = [[Claim(here, f"owner {racer}", LONG, "", "", True) for here in keys] for racer in range(RACERS)]
    rows = await s.race(claims)
    for here, answers in zip(keys, zip(*rows, strict=True), strict=True):
        await one_won(s, here, answers, 2, "Claim with take_over: one atomic step; one of those who race gets the key.")


async def one_won(s: Session, key: str, answers: Iterable[Any], attempt: int, sentence: str) -> None:
    answers = list(answers)
    winners = [number for number, answer in enumerate(answers) if isinstance(answer, Acquired)]
    busy = [answer for answer in answers if isinstance(answer, Busy)]
    check(len(winners) == 1 and len(busy) == len(answers) - 1, f"{sentence} The others: Busy.", answers)
    won: Acquired = answers[winners[0]]
    check(won.attempt == attempt, f"{sentence} It is attempt {attempt}.", answers)
    record = await s.record(key)
    kept = (record.owner, record.fence) == (f"owner {winners[0]}", won.fence)
    check(kept, f"{sentence} The record is the winner's, number {winners[0]}.", record)


async def a_finish_that_races_takeovers_wins_or_says_so(s: Session) -> None:
    keys = [key(number) for number in range(RACES)]
    fences: list[int] = []
    for here in keys:
        fences.append((await take(s, key=here)).fence)
        await yes(s, Abandon(here, "a", fences[-1]), "Abandon by the owner: True.")
    racers: list[list[AnyOp]] = [
        [
            Finish(here, "a", fence, b"of a", LONG),
            *(Claim(here, f"taker {taker}", LONG, "", "", True) for taker in range(3)),
        ]
        for here, fence in zip(keys, fences, strict=True)
    ]
    # Each in turn is first, where tasks begin in the order in which they are made.
    rows = await s.race([[ops[(row + turn) % 4] for turn, ops in enumerate(racers)] for row in range(4)])
    for number, here in enumerate(keys):
        finished, *answers = [rows[(racer - number) % 4][number] for racer in range(4)]
        takers = sum(isinstance(answer, Acquired) for answer in answers)
        record = await s.record(here)
        if finished:
            check(takers == 0, "Finish: True, so nobody has taken the key over.", answers)
            kept = all(isinstance(answer, Completed) and answer.result == b"of a" for answer in answers)
            check(kept, "Finish: True, so the claims that lost got its result, or came later than it.", answers)
            check(record.result == b"of a", "Finish: True, so the result is kept.", record)
        else:
            check(takers == 1, "Finish: False, so one of the others has taken the key over.", answers)
            theirs = record.owner != "a" and record.state == "running"
            check(theirs, "Finish: False, so nothing has changed.", record)


async def one_result_of_one_owner_stays(s: Session) -> None:
    keys = [key(number) for number in range(RACES)]
    fences = [(await take(s, key=here)).fence for here in keys]
    rows = await s.race(
        [
            [Finish(here, "a", fence, b"%d" % racer, LONG) for here, fence in zip(keys, fences, strict=True)]
            for racer in range(RACERS)
        ]
    )
    answers = [answer for row in rows for answer in row]
    check(all(answer is True for answer in answers), "Finish, repeated by the owner: True.", answers)
    for here in keys:
        first = expect(await s.ask(Claim(here, "b", LONG)), Completed, RESULT)
        again = await s.ask(Claim(here, "b", LONG))
        check(again == first, f"The first result stays, {first!r}.", again)


# -- the rest -------------------------------------------------------------------------------------------------------


async def _wakes(s: Session, end: Callable[[str, str, int], AnyOp]) -> None:
    watch = getattr(s.store, "watch", None)
    if watch is None:
        return  # Not a store that lets callers watch: they ask again after a while.
    sentence = "watch: whoever watches a record that is awaited is rung when the record ends."
    for number in range(3):  # A ring may be lost; not each time.
        got = await take(s, key=key(number))
        ear = watch(key(number), task=s.task)
        try:
            expect(await s.ask(Claim(key(number), "b", LONG, awaited=True)), Busy, BUSY)
            if await s.wakes(ear, end(key(number), "a", got.fence), s.patience / 3):
                return
        finally:
            ear.close()
    check(False, f"{sentence} Nobody was woken, three times.", end)


async def finish_wakes_who_watches(s: Session) -> None:
    await _wakes(s, partial(Finish, result=b"", ttl=LONG))


async def release_wakes_who_watches(s: Session) -> None:
    await _wakes(s, Release)


async def abandon_wakes_who_watches(s: Session) -> None:
    await _wakes(s, Abandon)


async def a_watch_ends_by_itself(s: Session) -> None:
    watch = getattr(s.store, "watch", None)
    if watch is None:
        return
    first, second = watch(KEY, task=s.task), watch(KEY, task=s.task)
    for ear in (first, second):
        for _ in range(2):
            if s.task:
                await ear.apark(SystemClock(), 0.001)
            else:
                ear.park(SystemClock(), 0.001)
        ear.close()
        ear.close()


async def closing_twice_is_harmless(s: Session) -> None:
    await done(s)
    await s.close()
    await s.close()


BODIES: tuple[Body, ...] = (
    a_new_key_is_acquired,
    another_owner_is_told_that_it_is_busy,
    the_owner_may_claim_again,
    the_owner_may_claim_again_after_its_lease,
    a_key_with_a_result_is_completed_for_everybody,
    a_lease_that_is_over_is_doubtful_and_stays_so,
    since_counts_from_the_end_of_the_lease,
    take_over_begins_the_next_attempt,
    take_over_repeated_is_harmless,
    a_result_of_a_later_attempt_says_so,
    texts_are_kept_as_they_are,
    keys_are_apart,
    renew_starts_the_lease_anew,
    renew_revives_a_lease_that_nobody_took,
    finish_keeps_the_result,
    results_are_bytes_of_any_kind,
    finish_repeated_keeps_the_first_result,
    finish_after_the_lease_succeeds_if_nobody_took_over,
    release_forgets_the_key,
    release_after_the_lease_succeeds_if_nobody_took_over,
    abandon_puts_the_key_in_doubt,
    abandon_does_not_prolong_a_lease_that_is_over,
    fence_0_stands_for_whichever_the_owner_has,
    others_cannot_write,
    others_cannot_write_after_the_lease,
    an_old_fence_of_the_same_owner_is_refused,
    a_late_owner_changes_nothing_after_a_takeover,
    a_late_owner_does_not_overwrite_the_result,
    a_late_failure_does_not_delete_the_result,
    nobody_undoes_a_result,
    nothing_can_be_written_where_nothing_is,
    a_result_is_forgotten_when_its_time_is_over,
    fences_grow_whatever_removed_the_record,
    scan_sees_every_record,
    scan_keeps_its_place_while_records_come_and_go,
    scan_filters_by_the_text_itself,
    purge_removes_what_ended_in_batches,
    purge_spares_a_lease_that_runs,
    purge_counts_from_the_end_of_the_record,
    forget_removes_what_a_person_says,
    one_of_many_claims_wins,
    one_of_many_takeovers_wins,
    a_finish_that_races_takeovers_wins_or_says_so,
    one_result_of_one_owner_stays,
    finish_wakes_who_watches,
    release_wakes_who_watches,
    abandon_wakes_who_watches,
    a_watch_ends_by_itself,
    closing_twice_is_harmless,
)
