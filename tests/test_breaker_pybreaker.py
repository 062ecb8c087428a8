"""pybreaker's listeners, storages and breakers, and a stock pybreaker in another process on one real server."""

from __future__ import annotations

import gc
import itertools
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pybreaker
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from resilient import BreakerChanged, BreakerOpen, CircuitBreaker, Consecutive, Env, FailureRate, Pipeline
from resilient import _pybreaker as module
from resilient._pybreaker import REFRESHER, Refresher, View
from resilient.clock import SystemClock
from resilient.testing import FakeClock, Recorder

names = (f"resilient-{number}-{SystemClock().at()}" for number in itertools.count())


class Boom(Exception):
    pass


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No background thread: the tests refresh when they mean to."""
    monkeypatch.setattr(Refresher, "wake", lambda self: None)


class Bench:
    """One of our breakers in an environment of its own, whose wall clock is right."""

    def __init__(self, trip: Any = Consecutive(2), **options: Any) -> None:  # noqa: B008
        self.clock = FakeClock(epoch=SystemClock().at())
        self.events = Recorder()
        options.setdefault("cooldown", 10.0)
        self.guard(CircuitBreaker("ours", trip, **options))

    def guard(self, breaker: CircuitBreaker) -> None:
        self.breaker = breaker
        self.run = Pipeline(breaker, env=Env(clock=self.clock, sinks=[self.events]))(self.work)

    def work(self, error: BaseException | None = None, **more: object) -> str:
        if error is not None:
            raise error
        return "well"

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            with pytest.raises(Boom):
                self.run(Boom("boom"))

    def refused(self) -> BreakerOpen:
        with pytest.raises(BreakerOpen) as caught:
            self.run()
        return caught.value


# -- listeners -------------------------------------------------------------------------------------------------------


class Witness(pybreaker.CircuitBreakerListener):
    """Writes down what it is told, and what it reads of the breaker then."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.views: list[Any] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.append(("before", args, kwargs))
        self.views.append(cb)

    def failure(self, cb: Any, exc: BaseException) -> None:
        self.seen.append(("failure", type(exc).__name__, cb.fail_counter))

    def success(self, cb: Any) -> None:
        self.seen.append(("success", cb.current_state))

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.seen.append(("change", old_state.name, new_state.name, cb.name))


def test_listeners_hear_what_pybreaker_tells_in_its_order() -> None:
    witness = Witness()
    bench = Bench(listeners=[witness])
    assert bench.run(more=1) == "well"
    bench.fail(2)
    bench.refused()
    bench.clock.advance(10)
    bench.run()
    assert witness.seen == [
        ("before", (), {"more": 1}),
        ("success", "closed"),
        *[("before", (bench_error(witness, 2),), {}), ("failure", "Boom", 1)],
        *[("before", (bench_error(witness, 4),), {}), ("failure", "Boom", 2)],
        ("change", "closed", "open", "ours"),
        ("change", "open", "half-open", "ours"),
        ("before", (), {}),
        ("change", "half-open", "closed", "ours"),
        ("success", "closed"),
    ]


def bench_error(witness: Witness, place: int) -> Any:
    return witness.seen[place][1][0]


def test_stock_tells_a_listener_the_same() -> None:
    """The order above is not our invention: the same calls through pybreaker itself."""
    witness = Witness()
    stock = pybreaker.CircuitBreaker(2, 1000, listeners=[witness], name="ours", throw_new_error_on_trip=False)

    def fail() -> None:
        raise Boom

    stock.call(str)
    for _ in range(2):
        with pytest.raises(Boom):
            stock.call(fail)
    stock.half_open()
    stock.call(str)
    theirs = [entry[:3] if entry[0] != "before" else "before" for entry in witness.seen]
    assert theirs == [
        "before",
        ("success", "closed"),
        "before",
        ("failure", "Boom", 1),
        "before",
        ("failure", "Boom", 2),
        ("change", "closed", "open"),
        ("change", "open", "half-open"),
        "before",
        ("change", "half-open", "closed"),
        ("success", "closed"),
    ]


def test_listeners_of_coroutines_generators_and_blocks() -> None:
    import asyncio

    witness = Witness()
    breaker = CircuitBreaker("b", listeners=(witness,))

    @breaker
    async def coroutine(n: int) -> int:
        return n

    @breaker
    def generator(n: int) -> Iterator[int]:
        yield n

    assert asyncio.run(coroutine(5)) == 5
    assert list(generator(6)) == [6]
    with breaker:
        pass
    assert [entry[0] for entry in witness.seen] == ["before", "success"] * 3
    assert witness.seen[0] == ("before", (5,), {})


def test_what_a_listener_reads_of_the_breaker() -> None:
    witness = Witness()
    bench = Bench(Consecutive(2), listeners=[witness], ignore=KeyError, probes=3)
    bench.run()
    view = witness.views[0]
    assert (view.name, view.current_state, view.state.name) == ("ours", "closed", "closed")
    assert (view.fail_counter, view.fail_max, view.reset_timeout, view.success_threshold) == (0, 2, 10.0, 3)
    assert view.excluded_exceptions == (KeyError,)
    assert view.listeners == (witness,)
    bench.fail()
    assert view.fail_counter == 1
    bench.run()
    assert view.fail_counter == 0
    bench.fail(2)
    assert (view.current_state, view.fail_counter) == ("open", 2)
    bench.clock.advance(10)
    bench.run()
    assert (view.state.name, view.success_counter) == ("half-open", 1)
    assert view == View(bench.breaker)
    assert hash(view) == hash(View(bench.breaker))
    assert view != View(CircuitBreaker())
    assert view != 5


def test_what_a_listener_reads_with_other_rules() -> None:
    rate = View(CircuitBreaker("x", FailureRate(1.0, minimum=2), cooldown=lambda opened: 7.0 * opened))
    assert (rate.fail_max, rate.fail_counter, rate.reset_timeout) == (None, 0, 7.0)
    both = View(CircuitBreaker("x", FailureRate() | Consecutive(4)))
    assert both.fail_max == 4
    bench = Bench(FailureRate(1.0, minimum=2))
    view = View(bench.breaker)
    bench.fail()
    assert view.fail_counter == 1
    bench.fail()
    assert view.fail_counter == 2


@pytest.mark.parametrize("what", ["before_call", "failure", "success", "state_change"])
def test_pybreaker_listeners_raising_reach_the_caller(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """In pybreaker the exception of a listener replaces the result. Ours is logged once, and the listener removed."""

    class Broken(pybreaker.CircuitBreakerListener):
        pass

    def broken(*args: Any) -> None:
        calls.append(args)
        raise RuntimeError("listener")

    calls: list[Any] = []
    setattr(Broken, what, broken)
    witness = Witness()
    bench = Bench(listeners=[Broken(), witness])
    with caplog.at_level(logging.ERROR, "resilient"):
        for _ in range(2):
            assert bench.run() == "well"
            bench.fail()
        bench.fail()
    assert len(calls) == 1
    assert len(caplog.records) == 1
    assert "raised and was removed" in caplog.text
    assert [entry for entry in witness.seen if entry[0] == "change"] == [("change", "closed", "open", "ours")]


def test_listeners_are_called_outside_the_lock() -> None:
    locked: list[bool] = []

    class Nosy(pybreaker.CircuitBreakerListener):
        def failure(self, cb: Any, exc: BaseException) -> None:
            locked.append(cast(Any, bench.breaker._lock)._is_owned())

        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            locked.append(cast(Any, bench.breaker._lock)._is_owned())
            bench.breaker.reset()

    bench = Bench(listeners=[Nosy()])
    bench.fail(2)
    assert bench.breaker.state == "closed"
    assert locked == [False] * 4


@pytest.mark.parametrize("listener", [object(), Witness, 5])
def test_what_is_no_listener(listener: object) -> None:
    with pytest.raises(TypeError) as caught:
        CircuitBreaker(listeners=[listener])
    assert str(caught.value) == f"listeners must be pybreaker.CircuitBreakerListener objects, not {listener!r}"


def test_what_is_no_storage() -> None:
    nonsense: Any = 5
    with pytest.raises(TypeError, match=r"^storage must be a pybreaker.CircuitBreakerStorage, not 5$"):
        CircuitBreaker(storage=nonsense)


# -- storages --------------------------------------------------------------------------------------------------------


class Counting(pybreaker.CircuitMemoryStorage):
    """Memory, that knows how often it was asked, and whether under a lock of the breaker."""

    def __init__(self) -> None:
        self.asked = 0
        self.broken = False
        super().__init__(pybreaker.STATE_CLOSED)

    @property
    def state(self) -> str:
        self.asked += 1
        if self.broken:
            raise ConnectionError("storage")
        return super().state

    @state.setter
    def state(self, state: str) -> None:
        self.asked += 1
        if self.broken:
            raise ConnectionError("storage")
        self._state = state


def test_calls_make_no_storage_call() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    for _ in range(20):
        bench.run()
    bench.fail(2)
    bench.refused()
    assert storage.asked == 0
    bench.breaker.refresh()
    assert (storage.asked, storage.state) == (2, "open")


def test_changes_are_written_once_and_half_open_never() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    bench.fail(2)
    bench.breaker.refresh()
    assert storage.opened_at == datetime.fromtimestamp(bench.clock.at(), UTC)
    bench.clock.advance(10)
    with pytest.raises(Boom):
        bench.run(Boom())
    bench.clock.advance(10)
    storage.increment_counter()
    probe = bench.breaker
    with probe:
        bench.breaker.refresh()
        assert storage.state == "open"
    bench.breaker.refresh()
    assert (storage.state, storage.counter) == ("closed", 0)


def test_two_of_ours_share_a_state() -> None:
    storage = Counting()
    one, two = Bench(storage=storage), Bench(storage=storage)
    one.breaker.refresh()
    two.breaker.refresh()
    one.fail(2)
    one.breaker.refresh()
    two.breaker.refresh()
    assert two.breaker.state == "open"
    assert [event.reason for event in two.events.of(BreakerChanged)] == ["so says the storage"]
    one.clock.advance(10)
    one.run()
    one.breaker.refresh()
    two.breaker.refresh()
    assert two.breaker.state == "closed"
    assert two.run() == "well"


def test_the_fraction_that_redis_cuts_off_does_not_shorten_the_cooldown() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    bench.breaker.refresh()
    storage.state = "open"
    storage.opened_at = datetime.fromtimestamp(int(bench.clock.at()), UTC)
    bench.breaker.refresh()
    assert bench.breaker.retry_after == 10.0
    exact = Bench(storage=(storage := Counting()))
    exact.breaker.refresh()
    storage.state = "open"
    at = datetime.fromtimestamp(exact.clock.at(), UTC).replace(microsecond=1)
    storage.opened_at = at - timedelta(seconds=6)
    exact.breaker.refresh()
    assert exact.breaker.retry_after == pytest.approx(4.0, abs=1.0)
    assert exact.breaker.retry_after != 4.0


def test_our_own_cooldown_is_not_cut_by_the_storage() -> None:
    bench = Bench(storage=Counting())
    bench.clock.advance(0.9)
    bench.fail(2)
    bench.breaker.refresh()
    bench.breaker.refresh()
    assert bench.breaker.retry_after == 10.0


def test_clocks_that_are_wrong_cannot_close_or_hold() -> None:
    for skew, expected in ((timedelta(hours=1), 10.0), (timedelta(hours=-1), 0.0)):
        storage = Counting()
        bench = Bench(storage=storage)
        bench.breaker.refresh()
        storage.state = "open"
        storage.opened_at = datetime.fromtimestamp(bench.clock.at(), UTC) + skew
        bench.breaker.refresh()
        assert (bench.breaker.state, bench.breaker.retry_after) == ("open", expected)


def test_instants_without_a_zone_are_utc() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    storage.state = "open"
    storage.opened_at = datetime.fromtimestamp(bench.clock.at(), UTC).replace(tzinfo=None)
    bench.breaker.refresh()
    assert bench.breaker.retry_after == pytest.approx(10.0, abs=1.0)


def test_a_schedule_judges_openings_of_others() -> None:
    storage = Counting()
    bench = Bench(storage=storage, cooldown=lambda opened: 20.0 * opened)
    storage.state = "open"
    storage.opened_at = datetime.fromtimestamp(bench.clock.at() + 60, UTC)
    bench.breaker.refresh()
    assert bench.breaker.retry_after == 20.0


def test_a_later_opening_elsewhere_keeps_it_open_longer() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    bench.fail(2)
    bench.breaker.refresh()
    bench.clock.advance(8)
    storage.opened_at = datetime.fromtimestamp(bench.clock.at() + 5, UTC)
    bench.breaker.refresh()
    assert bench.breaker.retry_after == 10.0
    assert bench.breaker.opened == 1


def test_half_open_elsewhere_lets_us_probe_too() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    bench.breaker.refresh()
    storage.state = "half-open"
    bench.breaker.refresh()
    assert bench.breaker.state == "half-open"
    storage.state = "closed"
    bench.breaker.refresh()
    assert bench.breaker.state == "closed"


def test_half_open_elsewhere_does_not_end_our_cooldown() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    bench.fail(2)
    bench.breaker.refresh()
    storage.state = "half-open"
    bench.breaker.refresh()
    assert (bench.breaker.state, bench.breaker.retry_after) == ("open", 10.0)


def test_what_a_storage_says_of_nonsense_is_ignored() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    storage.state = "ajar"
    bench.breaker.refresh()
    assert bench.breaker.state == "closed"


def test_a_storage_that_lost_its_memory_closes_nothing() -> None:
    storage: Any = Counting()
    bench = Bench(storage=storage)
    bench.fail(2)
    bench.breaker.refresh()
    storage._opened_at, storage._state = None, "closed"
    bench.breaker.refresh()
    bench.breaker.refresh()
    assert bench.breaker.state == "open"


def test_a_closed_storage_at_the_start_does_not_close_what_was_restored() -> None:
    bench = Bench(storage=Counting())
    bench.breaker.restore({"version": 1, "state": "open", "remaining": 5.0})
    bench.breaker.refresh()
    assert bench.breaker.state == "open"


def test_what_happens_while_the_storage_answers_is_not_overruled() -> None:
    """It opens here after the storage was read and before the answer is taken over: the answer is old."""

    class Slow(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.meanwhile: Callable[[], object] = lambda: None

        @property
        def opened_at(self) -> datetime | None:
            self.meanwhile()
            return super().opened_at

        @opened_at.setter
        def opened_at(self, datetime: datetime) -> None:
            self._opened_at = datetime

    for shared in (True, False):
        storage = Slow()
        bench = Bench(storage=storage)
        bench.fail(2)
        bench.breaker.refresh()
        storage.state = "closed"

        def meanwhile(bench: Bench = bench, shared: bool = shared) -> None:
            if shared:
                bench.clock.advance(10)
                with pytest.raises(Boom):
                    bench.run(Boom())
            else:
                bench.breaker.restore({"version": 1, "state": "open", "remaining": 3.0})

        storage.meanwhile = meanwhile
        bench.breaker.refresh()
        assert bench.breaker.state == "open"
        storage.meanwhile = lambda: None
        bench.breaker.refresh()
        assert bench.breaker.state == ("open" if shared else "closed")


def test_a_change_during_the_write_is_written_next() -> None:
    class Busy(Counting):
        def reset_success_counter(self) -> None:
            super().reset_success_counter()
            if bench.breaker.state == "open":
                bench.clock.advance(10)
                bench.run()

    storage = Busy()
    bench = Bench(storage=storage)
    bench.fail(2)
    bench.breaker.refresh()
    assert storage.state == "open"
    bench.breaker.refresh()
    assert storage.state == "closed"
    assert bench.breaker.state == "closed"


def test_a_storage_that_raises_is_logged_once_per_outage(caplog: pytest.LogCaptureFixture) -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    storage.broken = True
    with caplog.at_level(logging.ERROR):
        bench.fail(2)
        for _ in range(3):
            bench.breaker.refresh()
        assert bench.refused().retry_after == 10.0
        assert len(caplog.records) == 1
        assert "fails; the state is decided locally" in caplog.text
        storage.broken = False
        bench.breaker.refresh()
        assert storage.state == "open", "what could not be written is written later"
        storage.broken = True
        bench.breaker.refresh()
        assert len(caplog.records) == 2


def test_an_interrupt_in_a_storage_is_not_swallowed() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    bench.fail(2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    storage.reset_success_counter = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        bench.breaker.refresh()
    del storage.reset_success_counter
    bench.breaker.refresh()
    assert storage.state == "open"


def test_isolation_and_disabling_are_affairs_of_one_process() -> None:
    storage = Counting()
    bench = Bench(storage=storage)
    with bench.breaker.isolate():
        bench.breaker.refresh()
        assert storage.state == "closed"
    bench.breaker.disable()
    bench.breaker.refresh()
    assert storage.state == "closed"


def test_refresh_without_a_storage_does_nothing() -> None:
    CircuitBreaker().refresh()


# -- a real server ---------------------------------------------------------------------------------------------------


class Stock:
    """A stock pybreaker in a process of its own."""

    def __init__(self, url: str, namespace: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests._stock", url, namespace],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, command: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Stock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def storage_of(client: Any, namespace: str) -> pybreaker.CircuitRedisStorage:
    return pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, client, namespace=namespace)


def test_a_stock_process_and_ours_see_each_other(redis_url: str, client: Any) -> None:
    namespace = next(names)
    bench = Bench(storage=storage_of(client, namespace))
    with Stock(redis_url, namespace) as stock:
        bench.breaker.refresh()
        assert stock("ok") == "closed ok"

        # It trips there: ours opens, for its own cooldown.
        assert stock("fail") == "closed ConnectionError"
        assert stock("fail") == "open CircuitBreakerError"
        bench.breaker.refresh()
        assert bench.breaker.state == "open"
        wait = bench.refused().retry_after
        assert wait is not None
        assert 8.0 < wait <= 10.0

        # Our probe closes it: the stock one is closed.
        bench.clock.advance(10)
        assert bench.run() == "well"
        bench.breaker.refresh()
        assert stock("ok") == "closed ok"

        # It trips here: the stock one refuses.
        bench.fail(2)
        bench.breaker.refresh()
        assert stock("ok") == "open CircuitBreakerError"

        # It recovers there: ours closes.
        assert stock("half_open") == "half-open ok"
        bench.breaker.refresh()
        assert bench.breaker.state == "open"
        assert stock("ok") == "closed ok"
        bench.breaker.refresh()
        assert bench.breaker.state == "closed"
        assert bench.run() == "well"


def test_a_server_that_is_down_is_logged_once_and_changes_nothing(
    client: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CircuitRedisStorage logs each error and then says "closed": that must not close an open circuit."""
    storage = storage_of(client, next(names))
    bench = Bench(storage=storage)
    bench.fail(2)
    bench.breaker.refresh()
    with redis.Redis(unix_socket_path="/nonexistent/resilient.sock", retry=Retry(NoBackoff(), 0)) as nowhere:
        with caplog.at_level(logging.DEBUG):
            monkeypatch.setattr(storage, "_redis", nowhere)
            for _ in range(3):
                bench.breaker.refresh()
            storage.logger.info("others may speak")
            assert bench.breaker.state == "open"
            bench.clock.advance(10)
            assert bench.run() == "well"
            bench.breaker.refresh()
            monkeypatch.setattr(storage, "_redis", client)
        assert [record.name for record in caplog.records if record.levelno >= logging.ERROR] == ["resilient"]
        assert "ConnectionError" in caplog.text
        bench.breaker.refresh()
        assert storage.state == "closed", "what happened meanwhile is written when the server is back"
        assert bench.breaker.state == "closed"


def test_other_threads_still_hear_what_their_storage_logs(caplog: pytest.LogCaptureFixture) -> None:
    """While one thread talks to its storage, the errors of other threads are not silenced."""
    logger = logging.getLogger("pybreaker")

    class Chatty(Counting):
        def look(self) -> datetime | None:
            thread = threading.Thread(target=lambda: logger.error("of another thread"), daemon=True)
            thread.start()
            thread.join()
            logger.info("not an error")
            return self._opened_at

        opened_at: Any = property(look)

    storage: Any = Chatty()
    storage.logger = logger
    bench = Bench(storage=storage)
    with caplog.at_level(logging.INFO):
        bench.breaker.refresh()
    assert [record.message for record in caplog.records] == ["of another thread", "not an error"]
    assert logger.filters == []


# -- adoption --------------------------------------------------------------------------------------------------------


def test_a_breaker_of_pybreaker_can_be_adopted() -> None:
    witness = Witness()

    class Meta(type):
        pass

    class Business(Exception, metaclass=Meta):
        pass

    exclude: Any = [KeyError, Business, lambda error: "not mine" in str(error), KeyboardInterrupt]
    existing = pybreaker.CircuitBreaker(
        fail_max=3,
        reset_timeout=20,
        success_threshold=2,
        exclude=exclude,
        listeners=[witness],
        name="theirs",
    )
    breaker = CircuitBreaker.adopt(existing)
    assert isinstance(breaker, CircuitBreaker)
    assert breaker.describe()["trip"] == Consecutive(3)
    assert (breaker.name, breaker.state, breaker.describe()["cooldown"], breaker.describe()["probes"]) == (
        "theirs",
        "closed",
        20.0,
        2,
    )
    bench = Bench()
    bench.guard(breaker)
    for error in (KeyError(), Business(), Boom("not mine"), KeyboardInterrupt()):
        for _ in range(4):
            with pytest.raises(type(error)):
                bench.run(error)
    assert breaker.state == "closed"
    bench.fail(3)
    assert breaker.state == "open"
    assert ("change", "closed", "open", "theirs") in witness.seen
    breaker.refresh()
    assert existing.current_state == "open", "both use the one storage"


def test_adoption_takes_over_the_state() -> None:
    existing = pybreaker.CircuitBreaker(fail_max=0, reset_timeout=30, success_threshold=0)
    existing.open()
    breaker = CircuitBreaker.adopt(existing)
    assert breaker.describe()["trip"] == Consecutive(1)
    assert breaker.describe()["probes"] == 1
    assert breaker.state == "open"
    wait = breaker.retry_after
    assert wait is not None
    assert 20 < wait <= 30


def test_what_cannot_be_adopted() -> None:
    nonsense: Any = 5
    with pytest.raises(TypeError, match=r"^adopt takes a pybreaker.CircuitBreaker, not 5$"):
        CircuitBreaker.adopt(nonsense)


# -- the refresher ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refresher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Refresher]:
    """A refresher of its own, awake, for one test."""
    monkeypatch.undo()
    mine = Refresher()
    monkeypatch.setattr(module, "REFRESHER", mine)
    yield mine
    if mine.thread is not None:
        gc.collect()
        mine.wake()


class Announcing(Counting):
    """Says when it was read or written."""

    def __init__(self) -> None:
        self.read, self.written = threading.Event(), threading.Event()
        self.reader: threading.Thread | None = None
        super().__init__()

    @property
    def state(self) -> str:
        self.reader = threading.current_thread()
        self.read.set()
        return super().state

    @state.setter
    def state(self, state: str) -> None:
        self._state = state
        self.written.set()


def test_a_daemon_thread_refreshes_all_breakers_and_ends_with_the_last(refresher: Refresher) -> None:
    one, two = Announcing(), Announcing()
    bench, other = Bench(storage=one), CircuitBreaker(storage=two)
    assert one.read.wait(60)
    assert two.read.wait(60)
    thread = refresher.thread
    assert thread is not None
    assert thread.daemon
    assert one.reader is two.reader is thread
    bench.fail(2)
    assert one.written.wait(60), "a change is written without anybody's help"
    reference = weakref.ref(other)
    del other
    gc.collect()
    assert reference() is None, "the thread keeps no breaker alive"
    del bench
    gc.collect()
    refresher.wake()
    thread.join(60)
    assert not thread.is_alive()
    assert refresher.thread is None
    refresher.wake()
    assert refresher.thread is None
    again = CircuitBreaker(storage=(storage := Announcing()))
    assert storage.read.wait(60)
    del again


def test_in_the_child_of_a_fork_the_thread_starts_anew(refresher: Refresher) -> None:
    storage = Announcing()
    breaker: Any = CircuitBreaker(storage=storage)
    assert storage.read.wait(60)
    old = refresher.thread
    parents = refresher._circuits
    assert breaker._link is not None
    storage.read.clear()
    refresher.after_fork()
    assert refresher.thread is not None
    assert refresher.thread is not old
    assert storage.read.wait(60)
    assert breaker in refresher._circuits
    parents.discard(breaker)


def test_the_process_has_one_refresher() -> None:
    assert module.REFRESHER is REFRESHER


def test_arguments_may_have_any_name() -> None:
    witness = Witness()
    bench = Bench(listeners=[witness])
    named = dict.fromkeys(("self", "what", "circuit", "args", "kwargs", "env", "permit"), 1)

    @bench.breaker
    def call(**named: int) -> dict[str, int]:
        return named

    assert call(**named) == named
    assert bench.breaker.state == "closed"
