"""`Env`, the base of policies, and the checks of numbers."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from resilient import Env, Event, Policy
from resilient.clock import SystemClock
from resilient.policy import seconds, whole
from resilient.testing import Recorder
from tests.tracer import Tracer


def test_the_default_environment_is_the_systems() -> None:
    env = Env()
    assert isinstance(env.clock, SystemClock)
    assert env.sinks == ()
    assert 0 <= env.rng.random() < 1
    assert env.rng is env.rng


def test_sinks_take_events_in_order_until_they_unsubscribe() -> None:
    first, second = Recorder(), Recorder()
    env = Env(sinks=[first])
    leave = env.subscribe(second)
    env.emit(Event("a"))
    leave()
    leave()
    env.emit(Event("b"))
    assert [event.policy for event in first.events] == ["a", "b"]
    assert [event.policy for event in second.events] == ["a"]


def test_a_sink_that_raises_is_logged_once_and_removed(caplog: pytest.LogCaptureFixture) -> None:
    """A broken observer must not break the call that it watches, nor the observers after it."""
    after = Recorder()

    def broken(event: Event) -> None:
        raise RuntimeError("sink")

    env = Env(sinks=[broken, after])
    with caplog.at_level(logging.ERROR, "resilient"):
        env.emit(Event("a"))
        env.emit(Event("b"))
    assert len(caplog.records) == 1
    assert "raised and was removed" in caplog.text
    assert len(after.events) == 2
    assert env.sinks == (after,)


@pytest.mark.parametrize("sink", [3, "print", None])
def test_a_sink_that_cannot_be_called_is_refused(sink: Any) -> None:
    with pytest.raises(TypeError, match=r"sinks: .* is not callable"):
        Env(sinks=[sink])
    with pytest.raises(TypeError, match=r"sink: .* is not callable"):
        Env().subscribe(sink)


def test_a_policy_describes_itself() -> None:
    assert repr(Tracer("x")) == "Tracer(label='x')"

    class Mine(Policy):
        __slots__ = ("name",)

        def __init__(self) -> None:
            self.name = "mine"

    class Rich(Mine):
        __slots__ = ()

        def describe(self) -> dict[str, Any]:
            return {"on": (KeyError, ValueError), "name": self.name, "nothing": None}

    assert repr(Mine()) == "Mine(name='mine')"
    assert repr(Rich()) == "Rich(on=(KeyError, ValueError), name='mine')"


@pytest.mark.parametrize("value", [True, "1", None, 1j])
def test_seconds_must_be_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="wait must be a number, not "):
        seconds("wait", value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), float("-inf"), 10**400])
def test_seconds_must_be_finite_and_above_zero(value: float) -> None:
    with pytest.raises(ValueError, match=f"wait must be a finite number above 0, not {value!r}"):
        seconds("wait", value)


def test_zero_seconds_where_they_make_sense() -> None:
    assert seconds("wait", 0, zero=True) == 0.0
    assert isinstance(seconds("wait", 3), float)
    with pytest.raises(ValueError, match="wait must be a finite number of at least 0, not -1"):
        seconds("wait", -1, zero=True)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_whole_numbers_must_be_integers(value: Any) -> None:
    with pytest.raises(TypeError, match="attempts must be an integer, not "):
        whole("attempts", value)


def test_whole_numbers_have_a_least_value() -> None:
    assert whole("attempts", 1) == 1
    assert whole("queue", 0, least=0) == 0
    with pytest.raises(ValueError, match="attempts must be at least 1, not 0"):
        whole("attempts", 0)
