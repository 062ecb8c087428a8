"""Trip rules: their settings, and their windows against naive lists."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient import Consecutive, FailureRate, SlowRate
from resilient._trip import AnyOf, Trip
from resilient._window import SLICES, Tally

OUTCOMES = st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 1.0, 1.5, 3.0])), max_size=120)


def feed(tally: Tally, failed: bool, elapsed: float = 0.0, now: float = 0.0) -> str | None:
    """One call as the lifecycle takes it in."""
    tally.n += not failed
    return tally.note(failed, elapsed, now)


# -- windows against naive models ------------------------------------------------------------------------------------


@given(OUTCOMES, st.integers(1, 6))
def test_a_streak_is_the_failures_since_the_last_success(outcomes: list[tuple[bool, float]], limit: int) -> None:
    tally, streak = Consecutive(limit).tally(), 0
    for failed, _ in outcomes:
        streak = streak + 1 if failed else 0
        assert feed(tally, failed) == (f"{streak} failures in a row" if streak >= limit else None)
        assert tally.cold is False


@settings(max_examples=200)
@given(OUTCOMES, st.sampled_from([0.1, 0.3, 0.5, 1.0]), st.integers(1, 30), st.integers(1, 30))
def test_a_rate_over_calls_is_the_share_in_a_list_of_the_last(
    outcomes: list[tuple[bool, float]], rate: float, over: int, minimum: int
) -> None:
    minimum = min(minimum, over)
    tally = FailureRate(rate, over=over, minimum=minimum).tally()
    seen: list[bool] = []
    tripped = False
    for failed, _ in outcomes:
        seen.append(failed)
        last = seen[-over:]
        share = sum(last) / len(last)
        tripping = len(seen) >= minimum and share >= rate and sum(last) > 0
        reason = feed(tally, failed)
        # A success in a warm window is never told in practice, and may not trip where a failure had not before.
        assert (reason is not None) == tripping
        if reason is not None:
            assert reason == f"{sum(last)} of {len(last)} calls failed"
        assert not (tripping and not failed and len(seen) > minimum and not tripped), "a success raised the share"
        tripped = tripping
        assert tally.share(0.0) == share
        assert tally.cold is (len(seen) < minimum)


@given(OUTCOMES, st.sampled_from([0.2, 0.5, 1.0]), st.integers(1, 20))
def test_a_slow_rate_counts_calls_that_took_longer(outcomes: list[tuple[bool, float]], rate: float, over: int) -> None:
    tally = SlowRate(rate, slower_than=1.0, over=over, minimum=1).tally()
    seen: list[bool] = []
    for failed, elapsed in outcomes:
        seen.append(elapsed > 1.0)
        last = seen[-over:]
        reason = feed(tally, failed, elapsed)
        expected = any(last) and sum(last) / len(last) >= rate
        assert reason == (f"{sum(last)} of {len(last)} calls took more than 1 s" if expected else None)
        assert tally.slow == sum(seen)


STEPS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 7.0, 30.0, 100.0]), st.booleans()), max_size=100)


@settings(max_examples=200)
@given(STEPS, st.sampled_from([0.25, 0.5, 1.0]), st.integers(1, 8))
def test_a_rate_over_seconds_is_the_share_in_the_slices_of_time(
    steps: list[tuple[float, bool]], rate: float, minimum: int
) -> None:
    tally = FailureRate(rate, seconds=20.0, minimum=minimum).tally()
    seen: list[tuple[int, bool]] = []
    now = 0.0
    for pause, failed in steps:
        now += pause
        number = int(now)  # a slice is a second here
        seen.append((number, failed))
        last = [bad for when, bad in seen if when > number - SLICES]
        judged = failed or len(last) == minimum
        tripping = judged and len(last) >= minimum and sum(last) / len(last) >= rate
        reason = feed(tally, failed, 0.0, now)
        assert reason == (f"{sum(last)} of {len(last)} calls failed" if tripping else None)
        assert tally.share(now) == sum(last) / len(last)
        assert tally.cold is True


def test_a_window_in_seconds_forgets_and_does_not_grow() -> None:
    tally = FailureRate(1.0, seconds=10.0, minimum=10_000).tally()
    for step in range(2_000):
        feed(tally, step % 2 == 0, 0.0, step / 10)
    window: Any = tally.windows[0]
    assert len(window.slices) <= SLICES
    assert tally.share(199.9) == 0.5
    assert tally.share(1_000.0) == 0.0
    assert window.slices == []


def test_instants_out_of_order_go_into_the_newest_slice() -> None:
    """Two threads may bring their instants in the other order: nothing is lost, and no slice is out of place."""
    tally = FailureRate(1.0, seconds=20.0, minimum=10).tally()
    for now in (5.0, 4.0, 3.0):
        feed(tally, True, 0.0, now)
    window: Any = tally.windows[0]
    assert window.slices == [[5, 3, 3]]


def test_memory_of_a_window_over_calls_is_its_failures() -> None:
    tally = FailureRate(1.0, over=1_000, minimum=1_000).tally()
    window: Any = tally.windows[0]
    for _ in range(5_000):
        feed(tally, False)
    assert not window.marks
    most = 0
    for step in range(20_000):
        feed(tally, step % 10 == 0)
        most = max(most, len(window.marks))
    assert len(window.marks) - window.gone == 100
    assert most <= 2 * 100 + 17


def test_any_of_several_rules_trips() -> None:
    tally = (Consecutive(2) | SlowRate(1.0, slower_than=1.0, over=3, minimum=3)).tally()
    assert feed(tally, True) is None
    assert feed(tally, True) == "2 failures in a row"
    tally = (Consecutive(2) | SlowRate(1.0, slower_than=1.0, over=3, minimum=3)).tally()
    assert [feed(tally, False, 2.0) for _ in range(3)][-1] == "3 of 3 calls took more than 1 s"
    assert tally.cold is False


def test_the_share_without_a_failure_rate_is_that_of_the_epoch() -> None:
    tally = (Consecutive(9) | SlowRate(0.5, slower_than=1.0)).tally()
    assert tally.share(0.0) == 0.0
    for failed in (True, False, False, True):
        feed(tally, failed)
    assert tally.share(0.0) == 0.5


def test_a_success_that_reaches_the_minimum_trips() -> None:
    tally = FailureRate(0.5, over=10, minimum=4).tally()
    assert [feed(tally, failed) for failed in (True, True, False)] == [None, None, None]
    assert feed(tally, False) == "2 of 4 calls failed"


def test_two_threads_that_pass_the_minimum_together_are_seen() -> None:
    """Both have counted before either settles: no equality with `minimum` ever holds, and still it trips."""
    tally = FailureRate(0.5, over=10, minimum=4).tally()
    for _ in range(3):
        feed(tally, True)
    tally.n += 2
    assert tally.note(False, 0.0, 0.0) == "3 of 5 calls failed"
    assert tally.cold is False


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Consecutive(), "Consecutive(5)"),
        (FailureRate(), "FailureRate(0.5, over=100, minimum=10)"),
        (FailureRate(0.25, seconds=30), "FailureRate(0.25, seconds=30, minimum=10)"),
        (FailureRate(0.25, over=5), "FailureRate(0.25, over=5, minimum=5)"),
        (SlowRate(1, slower_than=2), "SlowRate(1, slower_than=2, over=100, minimum=10)"),
        (
            SlowRate(0.5, slower_than=0.5, seconds=60.0, minimum=3),
            "SlowRate(0.5, slower_than=0.5, seconds=60, minimum=3)",
        ),
        (
            Consecutive(2) | FailureRate() | Consecutive(3),
            "Consecutive(2) | FailureRate(0.5, over=100, minimum=10) | Consecutive(3)",
        ),
    ],
)
def test_rules_show_and_compare_by_their_settings(rule: Trip, text: str) -> None:
    assert repr(rule) == text
    again: object = eval(text, {"Consecutive": Consecutive, "FailureRate": FailureRate, "SlowRate": SlowRate})
    assert again == rule
    assert hash(again) == hash(rule)
    assert copy.deepcopy(rule) == rule
    assert rule != 5
    assert rule != Consecutive(77)


def test_rules_are_immutable() -> None:
    rule: Any = Consecutive(5)
    with pytest.raises(AttributeError, match=r"^Consecutive is immutable: make another$"):
        rule.failures = 6
    with pytest.raises(AttributeError, match="immutable"):
        del rule.failures
    assert rule.failures == 5


def test_rules_join_with_rules_only() -> None:
    nonsense: Any = 5
    with pytest.raises(TypeError):
        _ = Consecutive(5) | nonsense
    joined = Consecutive(1) | (Consecutive(2) | Consecutive(3))
    assert isinstance(joined, AnyOf)
    assert len(joined.rules) == 3


def test_rules_know_whether_they_need_the_clock() -> None:
    assert not Consecutive(5).timed
    assert not FailureRate().timed
    assert FailureRate(seconds=5).timed
    assert SlowRate(slower_than=1).timed
    assert not (Consecutive(5) | FailureRate()).timed
    assert (Consecutive(5) | SlowRate(slower_than=2.0) | SlowRate(slower_than=1.0)).slower_than == 1.0
    assert (Consecutive(5) | SlowRate(slower_than=2.0)).timed
    assert Consecutive(5).slower_than == float("inf")


def test_a_rule_of_no_kind_has_no_windows() -> None:
    with pytest.raises(NotImplementedError):
        Trip().windows()


nan, inf = float("nan"), float("inf")
anything: Any = "x"
true: Any = True


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Consecutive(0), ValueError, "failures must be at least 1, not 0"),
        (lambda: Consecutive(anything), TypeError, "failures must be an integer, not 'x'"),
        (lambda: FailureRate(0), ValueError, "rate must be above 0 and at most 1, not 0"),
        (lambda: FailureRate(1.5), ValueError, "rate must be above 0 and at most 1, not 1.5"),
        (lambda: FailureRate(nan), ValueError, "rate must be above 0 and at most 1, not nan"),
        (lambda: FailureRate(true), TypeError, "rate must be a number, not True"),
        (lambda: FailureRate(anything), TypeError, "rate must be a number, not 'x'"),
        (lambda: FailureRate(over=5, seconds=5), ValueError, "give over or seconds, not both: over=5, seconds=5"),
        (lambda: FailureRate(over=0), ValueError, "over must be at least 1, not 0"),
        (lambda: FailureRate(seconds=0), ValueError, "seconds must be a finite number above 0, not 0"),
        (lambda: FailureRate(seconds=inf), ValueError, "seconds must be a finite number above 0, not inf"),
        (lambda: FailureRate(minimum=0), ValueError, "minimum must be at least 1, not 0"),
        (
            lambda: FailureRate(over=5, minimum=6),
            ValueError,
            "minimum must be at most over (5), not 6: the rule could never trip",
        ),
        (lambda: SlowRate(slower_than=0), ValueError, "slower_than must be a finite number above 0, not 0"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == text


def test_equal_rules_are_one_object_within_reason() -> None:
    """A thousand breakers with the same rule share it; a million different rules are not kept for ever."""
    assert Consecutive(5) is Consecutive(5)
    assert FailureRate(0.5, over=7, minimum=3) is FailureRate(0.5, minimum=3, over=7)
    for number in range(1, 1200):
        assert Consecutive(number).failures == number
    with pytest.raises(TypeError, match="failures must be an integer"):
        Consecutive([5])  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="failures must be an integer"):
        Consecutive(True)


def test_the_share_of_failures_is_none_where_only_slow_calls_were_seen() -> None:
    tally = (FailureRate(0.5, over=10, minimum=4) | SlowRate(0.9, slower_than=1.0)).tally()
    tally.n += 1
    assert tally.note(False, 2.0, 0.0) is None
    assert tally.share(0.0) == 0.0
