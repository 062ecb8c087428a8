"""The suites. Each runs in a process of its own and yields rows of raw figures, which `report.py` makes sense of.

A row is a dictionary: `suite`, `mode`, `group`, `library`, `name`, and either `series` (lists of figures by name) or
`error` (why there are none). Every candidate is checked before it is timed.
"""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import durable, harness, sagas
from benchmarks.cases import GROUPS, OURS, Case, Options, every_case
from benchmarks.checks import check
from benchmarks.harness import interleave, plain

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One process's worth of work."""

    suite: str
    mode: str = ""
    group: str = ""
    only: str = ""
    rounds: int = 16
    milliseconds: float = 5.0
    quick: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells this job from others."""
        return self.suite, self.mode, self.group


def run(job: Job) -> list[Row]:
    """Do the job, in this process."""
    return _SUITES[job.suite](job)


# -- candidates ------------------------------------------------------------------------------------------------------


def _row(job: Job, case: Case) -> Row:
    return {"suite": job.suite, "mode": case.mode, "group": case.group, "library": case.library, "name": case.name}


def _wanted(job: Job, groups: Iterable[str]) -> list[Case]:
    groups = tuple(groups)
    pattern = re.compile(job.only) if job.only else None

    def fits(case: Case) -> bool:
        if case.mode != job.mode or case.group not in groups:
            return False
        path = f"{job.suite}/{case.mode}/{case.group}/{case.name}"
        return pattern is None or pattern.search(path) is not None

    return [case for case in every_case() if fits(case)]


def matches(job: Job) -> bool:
    """Whether the job has anything to measure beside its references."""
    if not job.only:
        return True
    pattern = re.compile(job.only)
    if job.suite == "durable":
        return durable.wanted(job)
    if job.suite == "sagas":
        return sagas.wanted(job)
    if job.suite == "imports":
        return any(pattern.search(f"imports///{name}") for name in _STATEMENTS)
    modes = (job.mode,) if job.mode else ("sync", "async")
    groups = (job.group,) if job.group else GROUPS
    return any(_wanted(replace(job, mode=mode), groups) for mode in modes)


def _sound(job: Job, cases: Iterable[Case], rows: list[Row]) -> list[Case]:
    """The cases that work. Of the others, `rows` tells why not."""
    good: list[Case] = []
    slow = False
    for case in cases:
        try:
            # A quick run proves each candidate once, where its calls are timed; elsewhere being there is enough.
            wrong = _there(case) if job.quick and job.suite != "calls" else check(case)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong is None:
            good.append(case)
        else:
            rows.append({**_row(job, case), "error": wrong[:300]})
        slow = slow or case.group in ("timeout", "hedge", "stack of five")
    if slow and job.mode == "sync" and not (job.quick and job.suite != "calls"):
        time.sleep(0.6)  # calls that were left behind in threads
    return good


def _there(case: Case) -> str | None:
    """Nothing wrong, unless its making raises."""

    async def make() -> None:  # some want a running loop
        case.build(Options())(_body(case.mode))

    _drive(case.mode, make())
    return None


def _work() -> Callable[..., Any]:
    def work(x: int = 1) -> int:
        return x

    return work


def _work_async() -> Callable[..., Any]:
    async def work(x: int = 1) -> int:
        return x

    return work


def _body(mode: str) -> Callable[..., Any]:
    return _work() if mode == "sync" else _work_async()


def _drive(mode: str, work: Any) -> Any:
    return plain(work) if mode == "sync" else asyncio.run(work)


# -- the path of success ---------------------------------------------------------------------------------------------


def _calls(job: Job) -> list[Row]:
    rows: list[Row] = []
    references = [case for case in every_case() if case.mode == job.mode and case.group == "reference"]
    cases = [*references, *_sound(job, _wanted(job, [job.group]), rows)]

    async def measure() -> None:
        sampler = harness.call if job.mode == "sync" else harness.call_async
        samplers: dict[str, harness.Sampler] = {}
        for case in cases:
            try:
                guarded = case.build(Options())(_body(job.mode))
                value = guarded(7) if job.mode == "sync" else await guarded(7)
                assert value == 7, f"returned {value!r} for 7"
            except Exception as error:
                rows.append({**_row(job, case), "error": f"{type(error).__name__}: {error}"})
                continue
            samplers[f"{case.group}/{case.name}"] = sampler(guarded)
        times = await interleave(samplers, job.rounds, job.milliseconds)
        for case in cases:
            series = times.get(f"{case.group}/{case.name}")
            if series is not None:
                # The references of each group are its own: they were measured beside it.
                row = {**_row(job, case), "group": job.group, "reference": case.group == "reference"}
                rows.append({**row, "series": {"ns": series}})

    _drive(job.mode, measure())
    return rows


def _forms(job: Job) -> list[Row]:
    """Other ways to call: no arguments, by keyword, as a method."""
    rows: list[Row] = []
    cases = _wanted(replace(job, mode="sync"), ["stack of three"])
    references = [case for case in every_case() if case.mode == "sync" and case.group == "reference"]
    cases = [*references, *_sound(replace(job, mode="sync"), cases, rows)]
    forms = {
        "no argument": harness.call_without_arguments,
        "positional": harness.call,
        "keyword": harness.call_by_keyword,
        "method": harness.call_method,
    }
    samplers: dict[str, harness.Sampler] = {}
    for case in cases:
        guarded = case.build(Options())(_work())

        def work(self: object, x: int = 1) -> int:
            return x

        class Holder:
            method = case.build(Options())(harness.fresh(work))

        for form, sampler in forms.items():
            samplers[f"{form}/{case.name}"] = sampler(Holder() if form == "method" else guarded)
    times = plain(interleave(samplers, job.rounds, job.milliseconds))
    for case in cases:
        for form in forms:
            row = {**_row(job, case), "group": form, "reference": case.group == "reference"}
            rows.append({**row, "series": {"ns": times[f"{form}/{case.name}"]}})
    return rows


# -- the path of failure ---------------------------------------------------------------------------------------------


class Flaky(Exception):
    """What the function under test raises."""


def _flaky() -> Callable[..., Any]:
    """Fails at every other call."""
    fine = True

    def work(x: int = 1) -> int:
        nonlocal fine
        fine = not fine
        if fine:
            return x
        raise Flaky

    return work


def _flaky_async() -> Callable[..., Any]:
    fine = True

    async def work(x: int = 1) -> int:
        nonlocal fine
        fine = not fine
        if fine:
            return x
        raise Flaky

    return work


def _twice(call: Any) -> Any:
    def guarded(x: int) -> Any:
        try:
            return call(x)
        except Flaky:
            return call(x)

    return guarded


def _twice_async(call: Any) -> Any:
    async def guarded(x: int) -> Any:
        try:
            return await call(x)
        except Flaky:
            return await call(x)

    return guarded


def _failure(job: Job) -> list[Row]:
    """One failure, one retry, no wait between them. `time.sleep` is stubbed out: 0 s take the kernel 50 us or more."""
    _hush()
    rows: list[Row] = []
    options = Options(wait=0, failures=10**9, rate=0.95)
    cases = _sound(job, _wanted(job, ["retry", "stack of three"]), rows)
    sleep = time.sleep
    time.sleep = lambda seconds: None
    sync = job.mode == "sync"

    async def measure() -> None:
        sampler = harness.call if sync else harness.call_async
        twice = _twice(_flaky()) if sync else _twice_async(_flaky_async())
        samplers = {"try again": sampler(twice)}
        for case in cases:
            guarded = case.build(options)(_flaky() if sync else _flaky_async())
            value = guarded(7) if sync else await guarded(7)
            assert value == 7, f"{case.name} returned {value!r} for 7"
            samplers[f"{case.group}/{case.name}"] = sampler(guarded)
        times = await interleave(samplers, job.rounds, job.milliseconds)
        reference = {"library": "try again", "name": "try again", "group": "reference", "reference": True}
        rows.append({"suite": job.suite, "mode": job.mode, **reference, "series": {"ns": times["try again"]}})
        rows.extend({**_row(job, case), "series": {"ns": times[f"{case.group}/{case.name}"]}} for case in cases)

    try:
        _drive(job.mode, measure())
    finally:
        time.sleep = sleep
    return rows


def _hush() -> None:
    """Let libraries log, as they do, but to nobody."""
    import logging

    logging.getLogger().addHandler(logging.NullHandler())


def _rejection(job: Job) -> list[Row]:
    """A call that an open breaker refuses, and the caller's `except` around it."""
    _hush()
    rows: list[Row] = []
    sync = job.mode == "sync"
    cases = _sound(job, _wanted(job, ["breaker"]), rows)
    calls = 0

    def broken(x: int = 1) -> int:
        nonlocal calls
        calls += 1
        raise Flaky

    async def broken_async(x: int = 1) -> int:
        return broken(x)

    async def measure() -> None:
        sampler = harness.call_refused if sync else harness.call_refused_async
        samplers = {"raise": sampler(harness.fresh(_raise) if sync else harness.fresh(_raise_async))}
        for case in cases:
            guarded = case.build(Options(cooldown=3600.0))(broken if sync else broken_async)
            await sampler(guarded)(40)
            before = calls
            await sampler(guarded)(5)
            if calls > before:
                rows.append({**_row(job, case), "error": "is not open"})
                continue
            samplers[case.name] = sampler(guarded)
        times = await interleave(samplers, job.rounds, job.milliseconds)
        reference = {"library": "raise", "name": "raise", "group": "reference", "reference": True}
        rows.append({"suite": job.suite, "mode": job.mode, **reference, "series": {"ns": times["raise"]}})
        rows.extend({**_row(job, case), "series": {"ns": times[case.name]}} for case in cases if case.name in times)

    _drive(job.mode, measure())
    return rows


def _raise(x: int) -> int:
    raise ValueError


async def _raise_async(x: int) -> int:
    raise ValueError


# -- import ----------------------------------------------------------------------------------------------------------

_STATEMENTS = {
    "bare python": "pass",
    OURS: "import resilient",
    f"{OURS} (three policies)": "from resilient import Retry, CircuitBreaker, Bulkhead",
    f"{OURS} (all policies)": (
        "from resilient import Retry, CircuitBreaker, Bulkhead, RateLimiter, Timeout, Fallback, Hedge, Pipeline"
    ),
    "asyncio": "import asyncio",
    "tenacity": "import tenacity",
    "stamina": "import stamina",
    "backoff": "import backoff",
    "pybreaker": "import pybreaker",
    "circuitbreaker": "import circuitbreaker",
    "aiobreaker": "import aiobreaker",
    "purgatory": "import purgatory",
    "aiolimiter": "import aiolimiter",
    "hyx": "import hyx.retry, hyx.circuitbreaker, hyx.bulkhead",
    "nopanic": "import nopanic",
    "pyresilience": "import pyresilience",
    "resilix": "import resilix",
    "grit": "import grit",
    "crashbytes": "import crashbytes_resilience",
}


def _imports(job: Job) -> list[Row]:
    """The wall time of fresh processes, one after another."""
    rows: list[Row] = []
    series: dict[str, list[float]] = {}
    modules: dict[str, int] = {}
    pattern = re.compile(job.only) if job.only else None
    for name, statement in _STATEMENTS.items():
        if name != "bare python" and pattern is not None and not pattern.search(f"imports///{name}"):
            continue
        tell = f"{statement}\nimport sys\nprint(len(sys.modules))"
        done = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=False)
        if done.returncode:
            rows.append({**_import_row(job, name), "error": done.stderr.strip().splitlines()[-1][:300]})
        else:
            series[name], modules[name] = [], int(done.stdout)
    for _ in range(job.rounds):
        for name, times in series.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", _STATEMENTS[name]], stdin=subprocess.DEVNULL, check=True)
            times.append((time.perf_counter() - began) * 1e3)
    for name, times in series.items():
        row = {**_import_row(job, name), "modules": modules[name], "reference": name == "bare python"}
        rows.append({**row, "series": {"ms": times}})
    return rows


def _import_row(job: Job, name: str) -> Row:
    return {"suite": job.suite, "mode": "", "group": "", "library": name.partition(" (")[0], "name": name}


# -- memory ----------------------------------------------------------------------------------------------------------

_WEIGHED = ("retry", "breaker", "bulkhead", "rate limit", "deadline", "timeout", "fallback", "stack of three")


def _memory(job: Job) -> list[Row]:
    """The bytes that each guarded function holds after its first call; the function inside is not counted."""
    rows: list[Row] = []
    number = 200 if job.quick else 2000
    sync = job.mode == "sync"
    wanted = [case for case in _wanted(job, (*_WEIGHED, "stack of five")) if not _threaded(case)]
    cases = _sound(job, wanted, rows)
    cases = [case for case in every_case() if case.mode == job.mode and case.name == "closure"] + cases

    async def weigh(case: Case) -> float:
        functions = [_body(job.mode) for _ in range(number)]
        for function in functions:
            # These come into being when somebody looks; they belong to the function, not to its guard.
            assert not function.__dict__
            assert function.__annotations__

        async def guard(number: int) -> list[Any]:
            made: list[Any] = [None] * number
            for at in range(number):
                made[at] = case.build(Options())(functions[at])
                if sync:
                    made[at](7)
                else:
                    await made[at](7)
            return made

        warm = await guard(20)  # late imports and caches
        await harness.Pause()
        tracemalloc.start()
        try:
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            kept = await guard(number)
            await harness.Pause()
            gc.collect()
            return (tracemalloc.get_traced_memory()[0] - before - sys.getsizeof(kept)) / len(kept)
        finally:
            tracemalloc.stop()
            del warm

    async def measure() -> None:
        for case in cases:
            row = {**_row(job, case), "reference": case.group == "reference"}
            rows.append({**row, "series": {"bytes": [round(await weigh(case))]}})

    _drive(job.mode, measure())
    return rows


def _threaded(case: Case) -> bool:
    """Whether a guard keeps threads, which cannot be weighed so, nor made by the thousand."""
    return case.mode == "sync" and (
        case.group == "timeout"
        or (case.group == "stack of five" and "deadline" not in case.variant and case.library != "grit")
    )


# -- threads and tasks -----------------------------------------------------------------------------------------------

_THREADS = (1, 2, 4, 8)


def _threads(job: Job) -> list[Row]:
    """Calls a second through one guard around a sleep of 1 ms."""
    rows: list[Row] = []
    job = replace(job, mode="sync")
    groups = ("retry", "breaker", "bulkhead", "rate limit", "deadline", "stack of three", "stack of five")
    cases = [
        case for case in _wanted(job, groups) if case.library in (OURS, "pybreaker") or case.group == "stack of three"
    ]
    cases = [case for case in every_case() if case.mode == "sync" and case.name == "bare call"] + _sound(
        job, cases, rows
    )
    calls = 20 if job.quick else 80
    guards: dict[int, Any] = {}
    for at, case in enumerate(cases):

        def work(x: int = 1) -> int:
            time.sleep(0.001)
            return x

        guards[at] = case.build(Options())(work)
    rates: dict[int, dict[str, list[float]]] = {at: {str(n): [] for n in _THREADS} for at in guards}
    for _ in range(job.rounds):
        for number in _THREADS:
            for at, guarded in guards.items():
                rates[at][str(number)].append(_throughput(guarded, number, calls))
    for at, case in enumerate(cases):
        rows.append({**_row(job, case), "reference": case.group == "reference", "series": rates[at]})
    return rows


def _throughput(guarded: Any, number: int, calls: int) -> float:
    ready, go, faults = threading.Semaphore(0), threading.Event(), []

    def worker() -> None:
        ready.release()
        go.wait()
        try:
            for _ in range(calls):
                guarded(7)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=worker) for _ in range(number)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    began = time.perf_counter()
    go.set()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if faults:
        raise faults[0]
    return number * calls / took


def _tasks(job: Job) -> list[Row]:
    """The milliseconds for 10,000 tasks at once through one guard; the slots of a bulkhead are a hundred."""
    rows: list[Row] = []
    job = replace(job, mode="async")
    number = 2000 if job.quick else 10_000
    cases = _sound(job, _wanted(job, ("breaker", "bulkhead", "stack of three", "stack of five")), rows)
    cases = [case for case in every_case() if case.mode == "async" and case.name == "bare call"] + cases
    options = Options(limit=100, queue=number, wait=0, attempts=1 + 1)
    times: list[list[float]] = [[] for _ in cases]
    refused = [0 for _ in cases]

    async def go(case: Case) -> tuple[float, int]:
        async def work(x: int = 1) -> int:
            await asyncio.sleep(0)
            return x

        guarded = case.build(options)(work)
        await guarded(7)
        began = time.perf_counter()
        values = await asyncio.gather(*(guarded(at) for at in range(number)), return_exceptions=True)
        took = time.perf_counter() - began
        return took * 1e3, sum(isinstance(value, BaseException) for value in values)

    for _ in range(max(2, job.rounds // 3)):
        for at, case in enumerate(cases):
            gc.collect()
            took, errors = asyncio.run(go(case))
            times[at].append(took)
            refused[at] = errors
    for at, case in enumerate(cases):
        row = {**_row(job, case), "reference": case.group == "reference", "number": number, "refused": refused[at]}
        rows.append({**row, "series": {"ms": times[at]}})
    return rows


_SUITES: dict[str, Callable[[Job], list[Row]]] = {
    "calls": _calls,
    "forms": _forms,
    "failure": _failure,
    "rejection": _rejection,
    "imports": _imports,
    "memory": _memory,
    "threads": _threads,
    "tasks": _tasks,
    "durable": durable.measure,
    "sagas": sagas.measure,
}
