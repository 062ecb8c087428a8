"""Our own guards, with the settings that users get unless they choose others."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import OURS, Build, Case, Decorator, Options, both


def _retry(o: Options) -> Any:
    from resilient import Retry

    if o.wait == 0:
        return Retry(Exception, attempts=o.attempts, wait=0.0)
    return Retry(Exception, attempts=o.attempts)


def _breaker(o: Options) -> Any:
    from resilient import CircuitBreaker, FailureRate

    return CircuitBreaker(None, FailureRate(o.rate, over=100, minimum=10), cooldown=o.cooldown)


def _breaker_consecutive(o: Options) -> Any:
    from resilient import CircuitBreaker, Consecutive

    return CircuitBreaker(None, Consecutive(o.failures), cooldown=o.cooldown)


def _breaker_slow(o: Options) -> Any:
    from resilient import CircuitBreaker, FailureRate, SlowRate

    slow = SlowRate(0.5, slower_than=2.0, over=100, minimum=10)
    return CircuitBreaker(None, FailureRate(o.rate, over=100, minimum=10) | slow, cooldown=o.cooldown)


def _bulkhead(o: Options) -> Any:
    from resilient import Bulkhead

    return Bulkhead(o.limit, queue=o.queue, max_wait=60.0) if o.queue else Bulkhead(o.limit)


def _rate_limit(o: Options) -> Any:
    from resilient import RateLimiter

    return RateLimiter(o.calls, o.per)


def _deadline(o: Options) -> Any:
    from resilient import Timeout

    return Timeout(o.seconds, sync="deadline")


def _timeout(o: Options) -> Any:
    from resilient import Timeout

    return Timeout(o.seconds, sync="thread")


def _fallback(o: Options) -> Any:
    from resilient import Fallback

    return Fallback(o.default)


def _hedge(o: Options) -> Any:
    from resilient import Hedge

    return Hedge(o.after, idempotent=True)


def _hedge_thread(o: Options) -> Any:
    from resilient import Hedge

    return Hedge(o.after, idempotent=True, sync="thread")


def pipeline(*builds: Build) -> Build:
    """One `Pipeline` of several policies, outermost first."""

    def build(o: Options) -> Decorator:
        from resilient import Pipeline

        return Pipeline(*(make(o) for make in builds))

    return build


THREE = (_retry, _breaker, _bulkhead)
FIVE = (_retry, _breaker, _rate_limit, _bulkhead)

CASES = [
    *both(OURS, "retry", _retry),
    *both(OURS, "breaker", _breaker),
    *both(OURS, "breaker", _breaker_consecutive, "consecutive"),
    *both(OURS, "breaker", _breaker_slow, "failure or slow rate"),
    *both(OURS, "bulkhead", _bulkhead),
    *both(OURS, "rate limit", _rate_limit),
    Case(OURS, "deadline", "sync", _deadline),
    Case(OURS, "timeout", "sync", _timeout, "thread"),
    Case(OURS, "timeout", "async", _timeout),
    *both(OURS, "fallback", _fallback),
    Case(OURS, "hedge", "sync", _hedge_thread, "thread"),
    Case(OURS, "hedge", "async", _hedge),
    *both(OURS, "stack of three", pipeline(*THREE)),
    Case(OURS, "stack of five", "sync", pipeline(*FIVE, _deadline), "deadline"),
    Case(OURS, "stack of five", "sync", pipeline(*FIVE, _timeout), "thread"),
    Case(OURS, "stack of five", "async", pipeline(*FIVE, _timeout)),
]
