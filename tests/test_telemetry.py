"""Metrics of sagas, by the real SDK: what is counted when, with which attributes, and that who asks not pays nothing.

The SDK keeps them in memory. Sagas run on a clock that stands still but for the steps that move it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import Raw
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Histogram, HistogramDataPoint, InMemoryMetricReader, NumberDataPoint, Sum

from resilient import (
    Compensated,
    Env,
    Event,
    LeaseLost,
    Retry,
    Retrying,
    Saga,
    SagaAborted,
    SagaEnded,
    SagaError,
    SagaLost,
    SagaStuck,
    StepDone,
    StoreError,
    branch,
    sagas,
)
from resilient.engines._perform import perform_sync
from resilient.engines._wire import Order
from resilient.telemetry import SagaMetrics
from resilient.testing import FakeClock, Recorder
from tests._saga_worlds import Spy, alone, orphaned
from tests.test_durable import astep, athree, aundo, boom, died, hooks, log, made, step, undo

ONCE = Retry(Exception, attempts=1, name="compensation")
Numbers = dict[tuple[str, ...], float]


class World:
    """An environment that is measured: what has been counted, by the values of the attributes in alphabetical order."""

    def __init__(self, names: int = 200) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self.clock, self.seen = FakeClock(), Recorder()
        self.metrics = SagaMetrics(self.provider.get_meter("test"), names=names)
        self.env = Env(self.clock, sinks=[self.metrics, self.seen])

    def _points(self, name: str) -> Iterator[tuple[Any, tuple[str, ...], Any]]:
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if metric.name == f"resilient.saga.{name}":
                        for point in metric.data.data_points:
                            given = dict(point.attributes or {})
                            yield metric, tuple(str(given[key]) for key in sorted(given)), point

    def count(self, name: str) -> Numbers:
        found: Numbers = {}
        for metric, key, point in self._points(name):
            assert isinstance(metric.data, Sum)
            assert metric.data.is_monotonic
            assert isinstance(point, NumberDataPoint)
            found[key] = point.value
        return found

    def took(self) -> dict[tuple[str, ...], tuple[int, float]]:
        found: dict[tuple[str, ...], tuple[int, float]] = {}
        for metric, key, point in self._points("duration"):
            assert isinstance(metric.data, Histogram)
            assert metric.unit == "s"
            assert isinstance(point, HistogramDataPoint)
            found[key] = point.count, point.sum
        return found

    def everything(self) -> dict[str, Any]:
        names = ("steps", "compensations", "recovered", "stuck", "lease_lost")
        found: dict[str, Any] = {name: self.count(name) for name in names}
        return {name: numbers for name, numbers in (found | {"duration": self.took()}).items() if numbers}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    log.clear()
    hooks.clear()
    with alone():
        yield


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def spy() -> Spy:
    return Spy()


# -- how sagas end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", [False, True])
def test_a_saga_that_is_done(world: World, journal: bool) -> None:
    hooks["b"] = lambda: world.clock.advance(2.0)
    with Saga("order", env=world.env, store=Spy() if journal else None) as saga:
        for name in ("a", "b"):
            saga.step(step, name, compensate=undo, name=f"step {name}")
    assert world.everything() == {
        "steps": {("ok", "order", "step a"): 1, ("ok", "order", "step b"): 1},
        "duration": {("done", "order"): (1, 2.0)},
    }


@pytest.mark.parametrize("journal", [False, True])
def test_a_saga_that_is_undone(world: World, journal: bool) -> None:
    hooks["b"], hooks["undo a"] = boom, lambda: world.clock.advance(3.0)
    for _ in range(2):
        with pytest.raises(SagaAborted), Saga("order", env=world.env, store=Spy() if journal else None) as saga:
            for name in ("a", "b"):
                saga.step(step, name, compensate=undo, name=name)
    assert world.everything() == {
        "steps": {("ok", "order", "a"): 2, ("error", "order", "b"): 2},
        "compensations": {("ok", "order", "a"): 2, ("ok", "order", "b"): 2},
        "duration": {("aborted", "order"): (2, 6.0)},
    }


@pytest.mark.parametrize("journal", [False, True])
def test_a_saga_that_is_stuck(world: World, journal: bool) -> None:
    hooks["undo a"] = boom
    with (
        pytest.raises(SagaStuck),
        Saga("order", env=world.env, retries=ONCE, store=Spy() if journal else None) as saga,
    ):
        saga.step(step, "a", compensate=undo, name="a")
        raise OSError
    assert world.everything() == {
        "steps": {("ok", "order", "a"): 1},
        "compensations": {("error", "order", "a"): 1},
        "stuck": {("order",): 1},
        "duration": {("stuck", "order"): (1, 0.0)},
    }


@pytest.mark.parametrize("journal", [False, True])
def test_a_saga_that_fails_after_its_pivot(world: World, journal: bool) -> None:
    with pytest.raises(SagaStuck), Saga("order", env=world.env, store=Spy() if journal else None) as saga:
        saga.pivot()
        saga.step(step, "a")
        raise OSError
    assert world.count("stuck") == {("order",): 1}
    assert world.took() == {("stuck", "order"): (1, 0.0)}


@pytest.mark.parametrize("journal", [False, True])
def test_a_saga_that_fails_before_its_first_step(world: World, journal: bool) -> None:
    with pytest.raises(SagaAborted), Saga("order", env=world.env, store=Spy() if journal else None):
        raise OSError
    assert world.everything() == {"duration": {("aborted", "order"): (1, 0.0)}}


def test_an_error_that_is_not_undone_is_stuck_where_the_journal_says_so(world: World, spy: Spy) -> None:
    for store in (spy, None):
        with pytest.raises(OSError), Saga("order", env=world.env, store=store, compensate_on=ValueError) as saga:
            saga.step(step, "a", compensate=undo)
            raise OSError
    assert sagas.list_sagas(spy)[0].state == "stuck"
    assert world.count("stuck") == {("order",): 1}
    assert len(world.seen.of(SagaEnded)) == 1


async def twice(world: World, store: Any) -> None:
    hooks["b"] = boom
    async with Saga("order", env=world.env, store=store) as saga:
        await saga.step(astep, "a", compensate=aundo, name="a")
    with pytest.raises(SagaAborted):
        async with Saga("order", env=world.env, store=store) as saga:
            await saga.step(astep, "a", compensate=aundo, name="a")
            await saga.parallel(
                branch(astep, "b", compensate=None, name="b"), branch(astep, "c", compensate=aundo, name="c")
            )


@pytest.mark.parametrize("journal", [False, True])
def test_async_and_parallel(world: World, journal: bool) -> None:
    hooks["c"] = lambda: world.clock.advance(1.0)
    asyncio.run(twice(world, Spy() if journal else None))
    assert world.count("compensations") == {("ok", "order", "a"): 1, ("ok", "order", "c"): 1}
    steps = world.count("steps")
    assert steps.pop(("ok", "order", "a")) == 2
    # Whether the other branch had begun when this one failed is the loop's business.
    assert steps.pop(("error", "order", "b")) == 1
    assert sum(steps.values()) == 1
    assert {key: count for key, (count, _) in world.took().items()} == {("done", "order"): 1, ("aborted", "order"): 1}


def test_branches_in_threads(world: World) -> None:
    with Saga("order", env=world.env) as saga:
        saga.parallel(branch(step, "a", compensate=None, name="a"), branch(step, "b", compensate=None, name="b"))
    assert world.count("steps") == {("ok", "order", "a"): 1, ("ok", "order", "b"): 1}


def test_a_nested_saga_counts_as_steps_of_the_outer_one(world: World) -> None:
    hooks["b"] = boom
    with Saga("order", env=world.env) as saga:
        with pytest.raises(SagaAborted), saga.nested("shipping") as child:
            child.step(step, "a", compensate=undo, name="a")
            child.step(step, "b", compensate=None, name="b")
        saga.step(step, "c", compensate=undo, name="c")
    assert world.everything() == {
        "steps": {("ok", "order", "a"): 1, ("error", "order", "b"): 1, ("ok", "order", "c"): 1},
        "compensations": {("ok", "order", "a"): 1},
        "duration": {("done", "order"): (1, 0.0)},
    }


# -- recovery --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_a_durable_saga_that_another_run_finishes(world: World, spy: Spy, is_async: bool) -> None:
    place = made(spy, athree, env=world.env) if is_async else made(spy, env=world.env)
    died(spy, place, "b")
    world.clock.advance(100.0)
    hooks["c"] = lambda: world.clock.advance(5.0)
    assert sagas.recover(spy).finished == ["order/o-1"]
    assert world.count("recovered") == {("done", "order"): 1}
    assert world.took() == {("done", "order"): (1, 5.0)}  # of the run that finished it, from when it had the lease
    assert sum(world.count("steps").values()) == 4
    assert place("o", id="o-1") if not is_async else asyncio.run(place("o", id="o-1"))
    assert [(event.state, event.recovered) for event in world.seen.of(SagaEnded)] == [("done", True)]


def test_a_durable_saga_that_another_run_undoes(world: World, spy: Spy) -> None:
    place = made(spy, env=world.env)
    hooks["c"] = boom
    died(spy, place, "undo b")
    sagas.recover(spy)
    assert world.count("recovered") == {("aborted", "order"): 1}
    assert world.took() == {("aborted", "order"): (1, 0.0)}


def left(world: World, spy: Spy, *, pivot: bool = False) -> None:
    """A block whose process died."""
    running = Saga("block", id="b-1", store=spy, env=world.env)
    saga = running.__enter__()
    saga.step(step, "a", compensate=undo)
    if pivot:
        saga.pivot()
        saga.step(step, "b")
    running._run._book.stop()
    orphaned(spy)


def test_a_block_that_another_run_undoes(world: World, spy: Spy) -> None:
    left(world, spy)
    assert sagas.recover(spy, env=world.env).compensated == ["block/b-1"]
    assert world.count("recovered") == {("aborted", "block"): 1}


def test_a_block_that_recovery_finds_past_its_pivot(world: World, spy: Spy) -> None:
    left(world, spy, pivot=True)
    assert sagas.recover(spy, env=world.env).stuck == ["block/b-1"]
    assert world.count("recovered") == {("stuck", "block"): 1}
    assert world.count("stuck") == {("block",): 1}
    # It is so already.
    with pytest.raises(SagaError):
        sagas.resume(spy, "b-1")
    assert world.count("stuck") == {("block",): 1}


def test_a_saga_over_which_too_many_processes_died(world: World, spy: Spy) -> None:
    place = made(spy, env=world.env, attempts=1)
    died(spy, place, "b")
    assert sagas.recover(spy).stuck == ["order/o-1"]
    assert world.count("stuck") == {("order",): 1}
    assert world.took() == {("stuck", "order"): (1, 0.0)}
    with pytest.raises(SagaStuck):
        place("o", id="o-1")
    assert world.count("stuck") == {("order",): 1}


# -- the lease -------------------------------------------------------------------------------------------------------


def test_a_lost_lease_is_told_once(world: World, spy: Spy) -> None:
    def body(saga: Any, order: str) -> str:
        for name in ("a", "b", "c"):
            try:
                saga.step(step, name, compensate=undo)
            except SagaError:
                log.append("swallowed")
        return order

    place = made(spy, body, env=world.env)

    def stolen() -> None:
        del hooks["a"]
        orphaned(spy)
        place("o", id="o-1")

    hooks["a"] = stolen
    with pytest.raises(SagaLost):
        place("o", id="o-1")
    assert log.count("swallowed") == 2
    assert world.count("lease_lost") == {("order",): 1}
    assert world.seen.of(LeaseLost) == [LeaseLost("order", "o-1", 1, True)]
    # The other one ended it, and it alone.
    assert world.count("recovered") == {("done", "order"): 1}
    assert world.took() == {("done", "order"): (1, 0.0)}


def test_a_lease_that_is_lost_at_the_end(spy: Spy, world: World) -> None:
    with pytest.raises(SagaLost), Saga("order", id="o-1", store=spy, env=world.env) as saga:
        saga.step(step, "a", compensate=undo)
        orphaned(spy)
        sagas.recover(spy)
    assert world.count("lease_lost") == {("order",): 1}
    assert world.took() == {}


def test_a_lost_lease_costs_nothing_where_nobody_listens(spy: Spy) -> None:
    with pytest.raises(SagaLost), Saga("order", id="o-1", store=spy) as saga:
        saga.step(step, "a", compensate=undo)
        orphaned(spy)
        sagas.recover(spy)


def test_a_store_that_is_away_is_no_lost_lease(world: World, spy: Spy) -> None:
    with pytest.raises(StoreError), Saga("order", id="o-1", store=spy, env=world.env, lease=0.01) as saga:
        saga.step(step, "a", compensate=undo)
        spy.fail("Append", 100)
        saga.step(step, "b", compensate=undo)
    assert world.everything() == {"steps": {("ok", "order", "tests.test_durable:step"): 1}}


def test_a_lease_of_something_else_is_not_counted(world: World) -> None:
    world.env.emit(LeaseLost("pay", "k", 1))
    world.env.emit(Retrying("pay", 1, 0.0, None))
    assert world.everything() == {}


# -- what it costs ---------------------------------------------------------------------------------------------------


class Watched(FakeClock):
    """A clock that says how often it was asked."""

    asked = 0

    def now(self) -> float:
        self.asked += 1
        return super().now()


def test_without_a_sink_nobody_looks_at_the_clock() -> None:
    clock = Watched()
    env = Env(clock)
    before = clock.asked
    with Saga("order", env=env) as saga:
        saga.step(step, "a", compensate=undo)
    with pytest.raises(SagaAborted), Saga("order", env=env) as saga:
        raise OSError
    assert clock.asked == before
    env.subscribe(Recorder())
    with Saga("order", env=env):
        pass
    assert clock.asked == before + 2


@pytest.mark.parametrize("journal", [False, True])
def test_who_listens_from_the_middle_gets_no_duration(world: World, journal: bool) -> None:
    env = Env(world.clock)
    with Saga("order", env=env, store=Spy() if journal else None):
        env.subscribe(world.metrics)
        env.subscribe(world.seen)
    assert world.seen.of(SagaEnded)[0].seconds is None
    assert world.took() == {}


def test_names_made_from_data_do_not_make_series() -> None:
    world = World(names=2)
    for number in range(4):
        with Saga(f"order {number}", env=world.env) as saga:
            for which in range(4):
                saga.step(step, "a", compensate=None, name=f"step {which}")
    steps = world.count("steps")
    assert steps == {
        ("ok", "order 0", "step 0"): 1,
        ("ok", "order 0", "step 1"): 1,
        ("ok", "order 0", "_OTHER"): 2,
        ("ok", "order 1", "step 0"): 1,
        ("ok", "order 1", "step 1"): 1,
        ("ok", "order 1", "_OTHER"): 2,
        ("ok", "_OTHER", "step 0"): 2,
        ("ok", "_OTHER", "step 1"): 2,
        ("ok", "_OTHER", "_OTHER"): 4,
    }
    assert {key: count for key, (count, _) in world.took().items()} == {
        ("done", "order 0"): 1,
        ("done", "order 1"): 1,
        ("done", "_OTHER"): 2,
    }


def test_no_id_is_an_attribute(world: World, spy: Spy) -> None:
    with Saga("order", id="o-4711", store=spy, env=world.env) as saga:
        saga.step(step, "a", compensate=undo)
    assert world.everything()
    assert "4711" not in repr(world.reader.get_metrics_data()) + repr(world.everything())


def test_seconds_are_told_apart_by_the_buckets(world: World) -> None:
    with Saga("order", env=world.env) as saga:
        hooks["a"] = lambda: world.clock.advance(0.3)
        saga.step(step, "a", compensate=undo)
    [(_, _, point)] = world._points("duration")
    assert 0.25 in point.explicit_bounds
    assert point.bucket_counts[list(point.explicit_bounds).index(0.25) + 1] == 1


# -- the parts -------------------------------------------------------------------------------------------------------


def test_events_that_say_the_same_are_equal() -> None:
    assert SagaEnded("order", "1", "done") == SagaEnded("order", "1", "done", 3.0)
    assert SagaEnded("order", "1", "done") != SagaEnded("order", "1", "done", 3.0, True)
    assert SagaEnded("order", "1", "done").seconds is None
    assert not LeaseLost("order", "1", 1).saga


def test_steps_that_an_engine_runs(world: World) -> None:
    order = Order("order", "o-1", 1, "a", "tests.test_durable:step", Raw(b'["a"]'))
    perform_sync(order, world.env)
    assert world.everything() == {"steps": {("ok", "order", "a"): 1}}


@pytest.mark.parametrize("meter", ["resilient", 1, object()])
def test_a_meter_that_is_none(meter: Any) -> None:
    with pytest.raises(TypeError, match="meter must be"):
        SagaMetrics(meter)


@pytest.mark.parametrize("names", [0, -1, 1.5, True])
def test_names_that_are_no_number(names: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="names"):
        SagaMetrics(names=names)


def test_every_kind_of_event_is_taken(world: World) -> None:
    for event in (Event("x"), StepDone("x", "1", "a", None), Compensated("x", "1", "a", OSError())):
        world.metrics(event)
    assert world.everything() == {"steps": {("ok", "x", "a"): 1}, "compensations": {("error", "x", "a"): 1}}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_global_provider_may_be_set_later() -> None:
    code = (
        "from opentelemetry import metrics\n"
        "from opentelemetry.sdk.metrics import MeterProvider\n"
        "from opentelemetry.sdk.metrics.export import InMemoryMetricReader\n"
        "from resilient import SYSTEM, Saga, __version__\n"
        "from resilient.telemetry import SagaMetrics\n"
        "SYSTEM.subscribe(SagaMetrics())\n"
        "with Saga('order') as saga: saga.step(len, 'abc', compensate=None)\n"
        "reader = InMemoryMetricReader()\n"
        "metrics.set_meter_provider(MeterProvider([reader]))\n"
        "with Saga('order') as saga: saga.step(len, 'abc', compensate=None)\n"
        "[resource] = reader.get_metrics_data().resource_metrics\n"
        "[scope] = resource.scope_metrics\n"
        "assert (scope.scope.name, scope.scope.version) == ('resilient', __version__)\n"
        "print(sorted(metric.name for metric in scope.metrics))\n"
    )
    assert run(code).strip() == "['resilient.saga.duration', 'resilient.saga.steps']"


def test_the_missing_package_is_named_by_its_extra_and_only_when_it_is_needed() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import resilient\n"
        "try: import resilient.telemetry\n"
        "except ImportError as error: print(error)\n"
    )
    assert run(code).strip() == "SagaMetrics needs opentelemetry-api: pip install 'resilient-kit[otel]'"
