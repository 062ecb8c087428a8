"""What the ASGI and the WSGI middleware share: their options, and the program of a call cut in two at the call.

Promises: a request is claimed before the application is called (`first_half`), and its response is stored when its last
part is there (`second_half`), whoever sends that and whatever the application does afterwards. Does no I/O. Costs some
tens of microseconds a request, most of them in the program itself. Safe from any thread and loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias, cast

from resilient._binding import digest
from resilient._drive import RUN, Outcome, Program
from resilient._keeper import TaskKeeper, ThreadKeeper
from resilient._once import Hold, Tally, lost, once
from resilient.errors import ResilientError
from resilient.idempotency import Hasher, _one_of
from resilient.integrations._http import (
    Answer,
    AnswerForm,
    Problems,
    Recorder,
    Remember,
    Request,
    fingerprint_of,
    read_key,
    remembered,
)
from resilient.policy import SYSTEM, Env, seconds, whole
from resilient.stores._open import shared

__all__ = ["NO_CALL", "STARTED", "Keyed", "first_half", "second_half"]

Scope: TypeAlias = "str | Callable[[Request], str] | None"
Fingerprint: TypeAlias = "bool | Callable[[Request], str | bytes]"

STARTED = Outcome(None, None)
"""The answer of a first half that came to the call: the key is the caller's, and it is his turn."""

NO_CALL: Any = None
"""What a driver is given to call: a half of a program calls nothing."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def first_half(program: Program) -> Program:
    """`program` up to the call: `STARTED`, or the outcome of a program that ends without one."""
    got: Any = None
    started = False
    try:
        while True:
            step = program.send(got)
            started = step is RUN
            if started:
                return STARTED
            got = yield step
    except StopIteration as stop:
        return cast(Outcome, stop.value)
    finally:
        if not started:
            program.close()


def second_half(program: Program, outcome: Outcome) -> Program:
    """The rest of `program`, for which the call ended with `outcome`."""
    got: Any = outcome
    try:
        while True:
            got = yield program.send(got)
    except StopIteration as stop:
        return cast(Outcome, stop.value)
    finally:
        program.close()


class Keyed:
    """The options of both, checked; and what they do that needs no waiting."""

    _way = "execute"
    _world = "plain functions"

    def __init__(
        self,
        app: Any,
        store: Any,
        *,
        methods: Iterable[str] = ("POST", "PATCH"),
        paths: Callable[[Request], bool] | None = None,
        required: bool = True,
        strict: bool = False,
        scope: Scope = None,
        fingerprint: Fingerprint = True,
        ttl: float = 86_400.0,
        lease: float = 30.0,
        duplicates: Literal["raise", "wait"] = "raise",
        max_wait: float | None = None,
        in_doubt: Literal["raise", "rerun"] = "raise",
        remember: Remember = remembered,
        max_request: int = 1_048_576,
        max_response: int = 1_048_576,
        header: str = "Idempotency-Key",
        replay_header: str = "Idempotency-Replayed",
        problems: str = "urn:resilient:idempotency:",
        on_store_error: Literal["refuse", "run"] = "refuse",
        env: Env | None = None,
    ) -> None:
        self.app = app
        self.store: Any = shared(store) if isinstance(store, str) else store
        if not callable(getattr(self.store, self._way, None)):
            raise TypeError(f"store must be one for {self._world}, or the URL of one, not {store!r}")
        self.methods = _methods(methods)
        if paths is not None and not callable(paths):
            raise TypeError(f"paths must be a function of the request, not {paths!r}")
        if scope is not None and not isinstance(scope, str) and not callable(scope):
            raise TypeError(f"scope must be a string or a function of the request, not {scope!r}")
        if not isinstance(fingerprint, bool) and not callable(fingerprint):
            raise TypeError(f"fingerprint must be True, False or a function of the request, not {fingerprint!r}")
        self.paths, self.scope, self.fingerprint = paths, scope, fingerprint
        self.required, self.strict = bool(required), bool(strict)
        how = self._how = Tally()
        how.name = "http"
        how.ttl, how.lease = seconds("ttl", ttl), seconds("lease", lease)
        how.max_wait = None if max_wait is None else seconds("max_wait", max_wait, zero=True)
        how.duplicates = _one_of("duplicates", duplicates, ("raise", "wait"))
        how.in_doubt = _one_of("in_doubt", in_doubt, ("raise", "rerun"))
        how.on_store_error = _one_of("on_store_error", on_store_error, ("refuse", "run"))
        self._remember = _remember(remember)
        self.max_request, self.max_response = whole("max_request", max_request), whole("max_response", max_response)
        self.header, self.replay_header = _token("header", header), _token("replay_header", replay_header)
        if not isinstance(problems, str):
            raise TypeError(f"problems must be the beginning of a URI, not {problems!r}")
        self._problems = Problems(problems, header)
        self._form = AnswerForm()
        self.env = SYSTEM if env is None else env
        self._keeper = self._new_keeper()

    replays = property(lambda self: self._how.replays, doc="Requests that got a stored response.")
    waits = property(lambda self: self._how.waits, doc="Requests that found another one running.")
    in_doubts = property(lambda self: self._how.in_doubts, doc="Requests refused because of an unknown outcome.")
    lost = property(lambda self: self._how.lost, doc="Requests that lost their lease while they ran.")
    unprotected = property(lambda self: self._how.unprotected, doc="Requests served although the store failed.")

    def _new_keeper(self) -> Any:
        return ThreadKeeper(self.store, self._how.lease, self._on_lost)

    def _on_lost(self, hold: Any) -> None:
        lost(self._how, self.env, hold)

    def _key(self, request: Request) -> str | Answer | None:
        """The key of a request; None if it shall pass as it is; or the refusal."""
        if request.method not in self.methods or not (self.paths is None or self.paths(request)):
            return None
        value = request.headers.get(self.header.lower())
        if value is None:
            return self._problems.missing() if self.required else None
        try:
            return read_key(value, strict=self.strict)
        except ValueError as error:
            return self._problems.malformed(str(error))

    def _program(self, request: Request, key: str) -> Program:
        """The program of a request whose body has been read."""
        scope = self.scope(request) if callable(self.scope) else self.scope or ""
        if not isinstance(scope, str):
            raise TypeError(f"scope must return a string, not {scope!r}")
        # The label of a record can be read by whoever reads the store, and a scope is often what the client proves
        # itself with.
        hidden = digest(scope.encode("utf-8", "surrogatepass")).hexdigest() if scope else ""
        stored, label = Hasher(f"{request.method} {request.path}")(hidden, key)
        form: Any = self._form
        hold = Hold(key, stored)
        how, env, print_ = self._how, self.env, self._print(request)
        return once(how, form, (), self._keeps, self.store, self._keeper, env, hold, print_, label)

    def _print(self, request: Request) -> str:
        if not callable(self.fingerprint):
            return fingerprint_of(request) if self.fingerprint else ""
        given = self.fingerprint(request)
        if not isinstance(given, (str, bytes)):
            raise TypeError(f"fingerprint must return a string or bytes, not {given!r}")
        copy = Request(request.method, request.path, "", {}, {})
        copy.body = given.encode() if isinstance(given, str) else given
        return fingerprint_of(copy)

    def _keeps(self, answer: Answer) -> bool:
        # Without a status there was no response and no error: what was done is not known, and not to be done again.
        if not answer.status:
            return True
        try:
            return self._remember(answer.status)
        except Exception as fault:
            # The response was made, and nobody says whether it counts: as one that cannot be kept, it leaves the key in
            # doubt, and the fault is the application's to report.
            answer.fault = fault
            return True

    def _replay(self, outcome: Outcome) -> Answer:
        """The answer to a duplicate. What was cancelled meanwhile is raised."""
        first: Answer = outcome.result()
        if first.lost:
            return self._problems.lost(first)
        first.headers = [*first.headers, (self.replay_header, "true")]
        return first

    def _refusal(self, error: ResilientError) -> Answer:
        return self._problems.failed(error, ran=False)

    def _broken(self, error: BaseException, recorder: Recorder, begun: bool) -> Outcome:
        """How the call ended if the application raised `error`.

        An exception before anything went out is a failure like any other, and frees the key. After that the client
        has seen a beginning, and it is not begun again.
        """
        if begun and isinstance(error, Exception):
            return Outcome(recorder.answer(whole=False), None)
        return Outcome(None, error)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.app!r}, {self.store!r})"


class KeyedTasks(Keyed):
    """`Keyed`, for coroutines."""

    _way = "aexecute"
    _world = "coroutines (resilient.stores.Threaded makes one out of one for plain functions)"

    def _new_keeper(self) -> Any:
        return TaskKeeper(self.store, self._how.lease, self._on_lost, self.env.clock)


def _methods(given: Any) -> frozenset[str]:
    methods: tuple[Any, ...] = () if isinstance(given, str) else tuple(given)
    if not methods or not all(isinstance(method, str) and _TOKEN.fullmatch(method) for method in methods):
        raise ValueError(f"methods must name HTTP methods, such as ('POST', 'PATCH'), not {given!r}")
    return frozenset(method.upper() for method in methods)


def _remember(given: Any) -> Callable[[int], bool]:
    if callable(given):
        return cast("Callable[[int], bool]", given)
    try:
        statuses = frozenset(given)
    except TypeError:
        raise TypeError(f"remember must be a collection of statuses or a function of one, not {given!r}") from None
    if not all(isinstance(status, int) and 200 <= status <= 599 for status in statuses):
        raise ValueError(f"remember must be statuses from 200 to 599 or a function of a status, not {given!r}")
    return statuses.__contains__


def _token(parameter: str, value: Any) -> str:
    if not isinstance(value, str) or not _TOKEN.fullmatch(value):
        raise ValueError(f"{parameter} must be the name of a header, not {value!r}")
    return value
