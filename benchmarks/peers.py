"""The guards of other libraries, each with the settings that its documentation shows.

Where a library serves only plain functions or only coroutines, or has no such policy, there is no case. What each of
them does wrong is none of this module's business: here they run on the path where they are right.
"""

# Half of the libraries here are not typed.
# mypy: disable-error-code="import-untyped, no-any-return"

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

from benchmarks import limits
from benchmarks.cases import Build, Case, Decorator, Function, Options, both, chain

_serial = itertools.count()


# -- retry -----------------------------------------------------------------------------------------------------------


def _tenacity(o: Options) -> Decorator:
    import tenacity

    wait: Any = tenacity.wait_random_exponential(o.wait, 10) if o.wait else tenacity.wait_none()
    decorator: Decorator = tenacity.retry(stop=tenacity.stop_after_attempt(o.attempts), wait=wait, reraise=True)
    return decorator


def _stamina(o: Options) -> Decorator:
    import stamina

    jitter = 1.0 if o.wait else 0.0
    wait_max = 5.0 if o.wait else 0.0
    decorator: Decorator = stamina.retry(
        on=Exception, attempts=o.attempts, wait_initial=o.wait, wait_max=wait_max, wait_jitter=jitter
    )
    return decorator


def _backoff(o: Options) -> Decorator:
    import backoff

    if o.wait == 0:
        return backoff.on_exception(backoff.constant, Exception, max_tries=o.attempts, interval=0, jitter=None)
    return backoff.on_exception(backoff.expo, Exception, max_tries=o.attempts, factor=o.wait)


# -- breakers --------------------------------------------------------------------------------------------------------


def _pybreaker(o: Options) -> Decorator:
    import pybreaker

    return pybreaker.CircuitBreaker(fail_max=o.failures, reset_timeout=o.cooldown)


def _circuitbreaker(o: Options) -> Decorator:
    import circuitbreaker

    decorator: Decorator = circuitbreaker.circuit(
        failure_threshold=o.failures, recovery_timeout=int(o.cooldown), name=f"circuit-{next(_serial)}"
    )
    return decorator


def _aiobreaker(o: Options) -> Decorator:
    import aiobreaker

    decorator: Decorator = aiobreaker.CircuitBreaker(
        fail_max=o.failures, timeout_duration=timedelta(seconds=o.cooldown)
    )
    return decorator


def _purgatory(o: Options) -> Decorator:
    import purgatory

    factory = purgatory.SyncCircuitBreakerFactory(default_threshold=o.failures, default_ttl=o.cooldown)
    decorator: Decorator = factory(f"circuit-{next(_serial)}")
    return decorator


def _purgatory_async(o: Options) -> Decorator:
    import purgatory

    factory = purgatory.AsyncCircuitBreakerFactory(default_threshold=o.failures, default_ttl=o.cooldown)
    decorator: Decorator = factory(f"circuit-{next(_serial)}")
    return decorator


# -- a limit of rates ------------------------------------------------------------------------------------------------


def _aiolimiter(o: Options) -> Decorator:
    import aiolimiter

    limiter = aiolimiter.AsyncLimiter(o.calls, o.per)

    def decorate(call: Function) -> Function:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            async with limiter:
                return await call(*args, **kwargs)

        return guarded

    return decorate


# -- hyx: coroutines only; some of its guards want a running loop when they are made -----------------------------------


def _hyx_retry(o: Options) -> Decorator:
    from hyx.retry import retry
    from hyx.retry.backoffs import expo

    # It counts retries where the others count attempts.
    return retry(on=Exception, attempts=o.attempts - 1, backoff=expo(min_delay_secs=o.wait, base=2) if o.wait else 0)


def _hyx_breaker(o: Options) -> Decorator:
    from hyx.circuitbreaker import consecutive_breaker

    return consecutive_breaker(failure_threshold=o.failures, recovery_time_secs=o.cooldown, recovery_threshold=1)


def _hyx_bulkhead(o: Options) -> Decorator:
    from hyx.bulkhead import bulkhead

    return bulkhead(o.limit, o.limit + o.queue)


def _hyx_rate_limit(o: Options) -> Decorator:
    from hyx.ratelimit import tokenbucket

    return tokenbucket(o.calls, o.per, o.calls)


def _hyx_timeout(o: Options) -> Decorator:
    from hyx.timeout import timeout

    return timeout(o.seconds)


def _hyx_fallback(o: Options) -> Decorator:
    from hyx.fallback import fallback

    async def handler(*args: Any, **kwargs: Any) -> Any:
        return o.default

    decorator: Decorator = fallback(handler)
    return decorator


# -- nopanic ---------------------------------------------------------------------------------------------------------


def _nopanic_retry(o: Options) -> Decorator:
    import nopanic

    wait = nopanic.backoff.full_jitter(o.wait) if o.wait else 0.0
    # Honouring it would make a call on an open circuit sleep for the whole cooldown.
    return nopanic.retry(o.attempts, on=Exception, backoff=wait, honor_retry_after=o.wait > 0)


def _nopanic_breaker(o: Options) -> Decorator:
    import nopanic

    return nopanic.circuit_breaker(failure_threshold=o.rate, reset_timeout=o.cooldown)


def _nopanic_bulkhead(o: Options) -> Decorator:
    import nopanic

    return nopanic.bulkhead(o.limit, max_wait=60.0 if o.queue else 0.0)


def _nopanic_rate_limit(o: Options) -> Decorator:
    import nopanic

    return nopanic.rate_limit(o.calls, o.per, max_wait=0.0)


def _nopanic_timeout(o: Options) -> Decorator:
    import nopanic

    return nopanic.timeout(o.seconds)


def _nopanic_deadline(o: Options) -> Decorator:
    import nopanic

    return nopanic.deadline(o.seconds)


def _nopanic_fallback(o: Options) -> Decorator:
    import nopanic

    return nopanic.fallback(o.default)


def _nopanic_hedge(o: Options) -> Decorator:
    import nopanic

    return nopanic.hedge(delay=o.after)


def _nopanic_compose(*builds: Build) -> Build:
    def build(o: Options) -> Decorator:
        import nopanic

        return nopanic.compose(*(make(o) for make in builds))

    return build


# -- pyresilience: one decorator, whose order is fixed -----------------------------------------------------------------


def _pyresilience(*parts: str) -> Build:
    def build(o: Options) -> Decorator:
        import pyresilience as p

        made: dict[str, Any] = {
            "retry": lambda: p.RetryConfig(max_attempts=o.attempts, delay=o.wait),
            "circuit_breaker": lambda: p.CircuitBreakerConfig(
                failure_threshold=o.failures, recovery_timeout=o.cooldown, success_threshold=1
            ),
            "bulkhead": lambda: p.BulkheadConfig(max_concurrent=o.limit, max_wait=60.0 if o.queue else 0.0),
            "rate_limiter": lambda: p.RateLimiterConfig(max_calls=int(o.calls), period=o.per),
            "timeout": lambda: p.TimeoutConfig(seconds=o.seconds),
            "fallback": lambda: p.FallbackConfig(handler=o.default),
        }
        decorator: Decorator = p.resilient(**{part: made[part]() for part in parts})
        return decorator

    return build


def _pyresilience_window(o: Options) -> Decorator:
    import pyresilience as p

    config = p.CircuitBreakerConfig(
        recovery_timeout=o.cooldown, sliding_window_size=100, failure_rate_threshold=o.rate, minimum_calls=10
    )
    decorator: Decorator = p.resilient(circuit_breaker=config)
    return decorator


# -- resilix ---------------------------------------------------------------------------------------------------------


def _resilix_retry(o: Options) -> Decorator:
    from resilix import protect

    if o.wait == 0:
        return protect.when(Exception, retry=o.attempts)
    return protect.when(Exception, retry=o.attempts, delay=o.wait, backoff="exponential", jitter=True)


def _resilix_breaker(o: Options) -> Decorator:
    from resilix import protect

    return protect.circuit(failures=o.failures, reset_timeout=o.cooldown)


def _resilix_bulkhead(o: Options) -> Decorator:
    from resilix import protect

    return protect.bulkhead(o.limit, wait=o.queue > 0)


def _resilix_timeout(o: Options) -> Decorator:
    from resilix import protect

    return protect.limits(timeout=o.seconds, allow_sync=True)


def _resilix_fallback(o: Options) -> Decorator:
    from resilix import protect

    return protect.when(Exception, return_=o.default)


# -- grit ------------------------------------------------------------------------------------------------------------


def _grit_retry(o: Options) -> Decorator:
    import grit

    wait = grit.jitter(grit.expo(o.wait, cap=10.0), spread=o.wait) if o.wait else grit.constant(0)
    return grit.retry(o.attempts, wait=wait)


def _grit_breaker(o: Options) -> Decorator:
    import grit

    return grit.breaker(o.failures, reset_after=o.cooldown)


def _grit_bulkhead(o: Options) -> Decorator:
    import grit

    return grit.bulkhead(o.limit, timeout=60.0 if o.queue else None)


def _grit_rate_limit(o: Options) -> Decorator:
    import grit

    return grit.limiter(o.calls, o.per)


def _grit_timeout(o: Options) -> Decorator:
    import grit

    return grit.timeout(o.seconds)


def _grit_fallback(o: Options) -> Decorator:
    import grit

    return grit.fallback(o.default)


def _grit_hedge(o: Options) -> Decorator:
    import grit

    return grit.hedge(o.after)


def _grit_policy(*builds: Build) -> Build:
    def build(o: Options) -> Decorator:
        import grit

        return grit.policy(*(make(o) for make in builds))

    return build


# -- crashbytes ------------------------------------------------------------------------------------------------------


def _crashbytes_retry(o: Options) -> Decorator:
    import crashbytes_resilience as c

    decorator: Decorator = c.retry(max_attempts=o.attempts, delay=o.wait)
    return decorator


def _crashbytes_breaker(o: Options) -> Decorator:
    import crashbytes_resilience as c

    return c.circuit_breaker(failure_threshold=o.failures, recovery_timeout=o.cooldown)


def _crashbytes_bulkhead(o: Options) -> Decorator:
    import crashbytes_resilience as c

    decorator: Decorator = c.bulkhead(o.limit)
    return decorator


def _crashbytes_rate_limit(o: Options) -> Decorator:
    import crashbytes_resilience as c

    return c.rate_limiter(int(o.calls), o.per)


def _crashbytes_timeout(o: Options) -> Decorator:
    import crashbytes_resilience as c

    decorator: Decorator = c.timeout(o.seconds)
    return decorator


def _crashbytes_fallback(o: Options) -> Decorator:
    import crashbytes_resilience as c

    decorator: Decorator = c.fallback(lambda *args, **kwargs: o.default)
    return decorator


def _crashbytes_pipeline(*builds: Build) -> Build:
    def build(o: Options) -> Decorator:
        import crashbytes_resilience as c

        decorator: Decorator = c.pipeline(*(make(o) for make in reversed(builds)))
        return decorator

    return build


# -- all -------------------------------------------------------------------------------------------------------------

_THREADED = "timeout by thread"

CASES = [
    *both("tenacity", "retry", _tenacity),
    *both("stamina", "retry", _stamina),
    *both("backoff", "retry", _backoff),
    *both("nopanic", "retry", _nopanic_retry),
    *both("pyresilience", "retry", _pyresilience("retry")),
    *both("resilix", "retry", _resilix_retry),
    *both("grit", "retry", _grit_retry),
    *both("crashbytes", "retry", _crashbytes_retry),
    Case("hyx", "retry", "async", _hyx_retry),
    Case("pybreaker", "breaker", "sync", _pybreaker),
    *both("circuitbreaker", "breaker", _circuitbreaker),
    *both("aiobreaker", "breaker", _aiobreaker),
    Case("purgatory", "breaker", "sync", _purgatory),
    Case("purgatory", "breaker", "async", _purgatory_async),
    *both("nopanic", "breaker", _nopanic_breaker, "rate in time"),
    *both("pyresilience", "breaker", _pyresilience("circuit_breaker")),
    *both("pyresilience", "breaker", _pyresilience_window, "rate over 100"),
    *both("resilix", "breaker", _resilix_breaker),
    *both("grit", "breaker", _grit_breaker),
    *both("crashbytes", "breaker", _crashbytes_breaker),
    Case("hyx", "breaker", "async", _hyx_breaker),
    *both("nopanic", "bulkhead", _nopanic_bulkhead),
    *both("pyresilience", "bulkhead", _pyresilience("bulkhead")),
    *both("resilix", "bulkhead", _resilix_bulkhead),
    *both("grit", "bulkhead", _grit_bulkhead),
    *both("crashbytes", "bulkhead", _crashbytes_bulkhead),
    Case("hyx", "bulkhead", "async", _hyx_bulkhead),
    Case("aiolimiter", "rate limit", "async", _aiolimiter),
    *both("nopanic", "rate limit", _nopanic_rate_limit),
    *both("pyresilience", "rate limit", _pyresilience("rate_limiter")),
    *both("grit", "rate limit", _grit_rate_limit),
    *both("crashbytes", "rate limit", _crashbytes_rate_limit),
    Case("hyx", "rate limit", "async", _hyx_rate_limit),
    Case("nopanic", "deadline", "sync", _nopanic_deadline),
    *both("nopanic", "timeout", _nopanic_timeout),
    *both("pyresilience", "timeout", _pyresilience("timeout")),
    *both("resilix", "timeout", _resilix_timeout),
    Case("grit", "timeout", "sync", _grit_timeout, "SIGALRM"),
    Case("grit", "timeout", "async", _grit_timeout),
    *both("crashbytes", "timeout", _crashbytes_timeout),
    Case("hyx", "timeout", "async", _hyx_timeout),
    *both("nopanic", "fallback", _nopanic_fallback),
    *both("pyresilience", "fallback", _pyresilience("fallback")),
    *both("resilix", "fallback", _resilix_fallback),
    *both("grit", "fallback", _grit_fallback),
    *both("crashbytes", "fallback", _crashbytes_fallback),
    Case("hyx", "fallback", "async", _hyx_fallback),
    Case("nopanic", "hedge", "async", _nopanic_hedge),
    *both("grit", "hedge", _grit_hedge),
    Case(
        "tenacity + pybreaker + BoundedSemaphore",
        "stack of three",
        "sync",
        chain(_tenacity, _pybreaker, limits.bulkhead_semaphore),
    ),
    Case(
        "backoff + circuitbreaker + BoundedSemaphore",
        "stack of three",
        "sync",
        chain(_backoff, _circuitbreaker, limits.bulkhead_semaphore),
    ),
    Case(
        "tenacity + aiobreaker + Semaphore",
        "stack of three",
        "async",
        chain(_tenacity, _aiobreaker, limits.bulkhead_asyncio),
    ),
    *both("nopanic", "stack of three", _nopanic_compose(_nopanic_retry, _nopanic_breaker, _nopanic_bulkhead)),
    *both("pyresilience", "stack of three", _pyresilience("retry", "circuit_breaker", "bulkhead")),
    # Its breaker stands outside a policy, as its documentation has it; the other order costs more.
    *both("resilix", "stack of three", chain(_resilix_breaker, _resilix_retry, _resilix_bulkhead)),
    *both("grit", "stack of three", _grit_policy(_grit_retry, _grit_breaker, _grit_bulkhead)),
    *both(
        "crashbytes",
        "stack of three",
        _crashbytes_pipeline(_crashbytes_retry, _crashbytes_breaker, _crashbytes_bulkhead),
    ),
    Case("hyx", "stack of three", "async", chain(_hyx_retry, _hyx_breaker, _hyx_bulkhead)),
    Case(
        "nopanic",
        "stack of five",
        "sync",
        _nopanic_compose(_nopanic_deadline, _nopanic_retry, _nopanic_breaker, _nopanic_rate_limit, _nopanic_bulkhead),
        "deadline",
    ),
    Case(
        "nopanic",
        "stack of five",
        "sync",
        _nopanic_compose(_nopanic_retry, _nopanic_breaker, _nopanic_rate_limit, _nopanic_bulkhead, _nopanic_timeout),
        _THREADED,
    ),
    Case(
        "nopanic",
        "stack of five",
        "async",
        _nopanic_compose(_nopanic_retry, _nopanic_breaker, _nopanic_rate_limit, _nopanic_bulkhead, _nopanic_timeout),
    ),
    *both(
        "pyresilience",
        "stack of five",
        _pyresilience("retry", "circuit_breaker", "rate_limiter", "bulkhead", "timeout"),
    ),
    *both(
        "grit",
        "stack of five",
        _grit_policy(_grit_retry, _grit_breaker, _grit_rate_limit, _grit_bulkhead, _grit_timeout),
    ),
    *both(
        "crashbytes",
        "stack of five",
        _crashbytes_pipeline(
            _crashbytes_retry, _crashbytes_breaker, _crashbytes_rate_limit, _crashbytes_bulkhead, _crashbytes_timeout
        ),
    ),
    *both(
        "resilix",
        "stack of five",
        chain(_resilix_breaker, _resilix_retry, _resilix_bulkhead, _resilix_timeout),
        "four: no rate limit",
    ),
    Case(
        "hyx",
        "stack of five",
        "async",
        chain(_hyx_retry, _hyx_breaker, _hyx_rate_limit, _hyx_bulkhead, _hyx_timeout),
    ),
    Case(
        "tenacity + aiobreaker + aiolimiter + Semaphore + asyncio.timeout",
        "stack of five",
        "async",
        chain(_tenacity, _aiobreaker, _aiolimiter, limits.bulkhead_asyncio, limits.timeout_asyncio),
    ),
]
