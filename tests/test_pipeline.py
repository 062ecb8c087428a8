"""`Pipeline`: order, checks, description."""

from __future__ import annotations

import asyncio

import aiolimiter
import pytest

import resilient
from resilient import Pipeline
from resilient.testing import FakeClock
from tests.tracer import Tracer, plain


class Bare:
    """A policy that derives from nothing."""

    name = "bare"

    def sync(self, call: object, env: object) -> object:
        return call


def test_the_first_policy_is_the_outermost() -> None:
    log: list[str] = []
    Pipeline(Tracer("a", log), Tracer("b", log))(plain)(1)
    assert log == ["+a", "+b", "-b", "-a"]


def test_a_pipeline_in_a_pipeline_stands_for_its_policies() -> None:
    a, b, c = Tracer("a"), Tracer("b"), Tracer("c")
    pipeline = Pipeline(a, Pipeline(b, c))
    assert tuple(pipeline) == pipeline.policies == (a, b, c)
    assert len(pipeline) == 3
    assert resilient.inspect(pipeline(plain)) == (a, b, c)


def test_an_empty_pipeline_is_refused() -> None:
    with pytest.raises(ValueError, match="a Pipeline needs at least one policy"):
        Pipeline()


@pytest.mark.parametrize("what", [3, "retry", None, Tracer, plain])
def test_what_is_no_policy_is_refused(what: object) -> None:
    """A class instead of an instance is the usual slip: the text asks about it."""
    with pytest.raises(TypeError, match=r"is not a policy \(did you forget to call it\?\)"):
        Pipeline(what)


def test_the_same_object_twice_is_refused() -> None:
    trace = Tracer()
    with pytest.raises(ValueError, match="is in the Pipeline twice"):
        Pipeline(trace, Tracer(), trace)


def test_it_shows_itself() -> None:
    pipeline = Pipeline(Tracer("a"), Tracer("b"), Bare())
    assert str(pipeline).splitlines()[:2] == ["Tracer(label='a')", "  Tracer(label='b')"]
    assert repr(pipeline).startswith("Pipeline(Tracer(label='a'), Tracer(label='b'), <")
    assert pipeline.describe() == [
        {"policy": "Tracer", "label": "a"},
        {"policy": "Tracer", "label": "b"},
        {"policy": "Bare", "name": "bare"},
    ]


def test_one_pipeline_guards_many_functions_with_the_same_policies() -> None:
    trace = Tracer()
    pipeline = Pipeline(trace)
    pipeline(plain)(1)
    pipeline(len)("abc")
    assert trace.log == ["+t", "-t"] * 2


def test_an_async_limiter_is_a_policy_for_coroutines() -> None:
    limiter = aiolimiter.AsyncLimiter(1, 60.0)
    pipeline = Pipeline(Tracer(), limiter)

    @pipeline
    async def call() -> bool:
        return limiter.has_capacity()

    assert asyncio.run(call()) is False
    with pytest.raises(TypeError, match="guards coroutines only"):
        pipeline(plain)


def test_an_env_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="env must be an Env, not <resilient"):
        Pipeline(Tracer(), env=FakeClock())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
