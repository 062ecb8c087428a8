"""DurableSaga: a saga whose body can be run again, so that any process can finish what another one began.

Promises: the body's finished steps come from the journal and are not run again; a step that had begun is run again
with the same `saga.step_key`; a second call with an id gets the first one's result. Does not: make the code between the
steps durable: it must do the same each time, from its arguments and the values of the steps. n steps cost n + 1 commits
and a look. Safe from any thread and loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Raw, Struct, UnsetType

from resilient._ambient import nearest
from resilient._book import Book
from resilient._drive import Cut, Outcome, Program, Wait, adrive, drive
from resilient._guard import kind_of
from resilient._journal import CallForm, revived, write
from resilient._journal import result_form as form_of_result
from resilient._run import Run, raw, task_keeper, thread_keeper
from resilient._settle import apply_async, apply_sync, never, rollback, settle
from resilient._undo import UNKNOWN, Undo
from resilient.errors import Incompatible, InFlight, SagaAborted, SagaError, SagaStuck, StoreError
from resilient.policy import SYSTEM, Env, whole
from resilient.saga import AsyncSagaRun, Saga, SagaRun
from resilient.stores._ops import Acquired, Claim, History

if TYPE_CHECKING:
    from resilient.retry import Retry

__all__ = ["DurableBody", "DurableSaga", "known"]

_bodies: dict[str, DurableBody] = {}


def known() -> dict[str, DurableBody]:
    """The durable sagas that this process can run, by name."""
    return dict(_bodies)


class DurableSaga:
    """Make a function the body of a durable saga: `@DurableSaga("order", store="sqlite:///sagas.db")`.

    The body's first parameter is the saga; `place(order, id="o-42")` runs it. Arguments and results are kept as JSON,
    by their annotations. `version` says which bodies can read each other's journals: change it when the steps change.
    `in_doubt` is for a step that had begun when its process died: `"rerun"` it with the same key, or `"stuck"`, for a
    person. After `attempts` processes have died over it a saga is stuck too. The other options are those of `Saga`.

    `engine` runs it elsewhere: a `resilient.engines.TemporalEngine` or `DBOSEngine` in place of a store. The body stays
    as it is.
    """

    __slots__ = ("_options", "attempts", "engine", "env", "in_doubt", "lease", "name", "store", "version")

    def __init__(
        self,
        name: str,
        *,
        store: Any = None,
        engine: Any = None,
        version: int = 1,
        lease: float = 30.0,
        timeout: float | None = None,
        compensate_on: Any = Exception,
        on_stuck: Literal["raise", "continue"] = "raise",
        retries: Retry | None = None,
        grace: float = 30.0,
        in_doubt: Literal["rerun", "stuck"] = "rerun",
        attempts: int = 10,
        env: Env = SYSTEM,
    ) -> None:
        self._options: dict[str, Any] = {
            "timeout": timeout,
            "compensate_on": compensate_on,
            "on_stuck": on_stuck,
            "retries": retries,
            "grace": grace,
            "lease": lease,
            "version": version,
            "env": env,
        }
        if (store is None) == (engine is None):
            raise TypeError("a durable saga needs a store, or an engine, and not both")
        if engine is not None and not callable(getattr(engine, "bind", None)):
            raise TypeError(f"engine must be an engine (see resilient.engines), not {engine!r}")
        probe = Saga(name, store=getattr(engine, "store", store), **self._options)
        self.engine = engine
        if in_doubt not in ("rerun", "stuck"):
            raise ValueError(f"in_doubt must be 'rerun' or 'stuck', not {in_doubt!r}")
        self.name, self.store, self.version, self.lease, self.env = name, probe.store, version, lease, env
        self.in_doubt = in_doubt
        self.attempts = whole("attempts", attempts)

    def __call__(self, body: Callable[..., Any], /) -> DurableBody:
        """Make `body` the body of this saga. `ValueError` if another one has its name."""
        if self.engine is not None:
            bound: DurableBody = self.engine.bind(self, body)
            return bound
        return self.local(body)

    def local(self, body: Callable[..., Any], /) -> DurableBody:
        """Make `body` the body of this saga, run by this library itself, on the store."""
        kind = kind_of(body)
        if kind not in ("sync", "coro"):
            raise TypeError(f"the body of a saga must be a function or a coroutine function, not {body!r}")
        way = "execute" if kind == "sync" else "aexecute"
        if not callable(getattr(self.store, way, None)):
            raise TypeError(f"{self.store!r} cannot be used by {body!r}: it has no {way}")
        made = DurableBody(self, body, kind == "coro")
        other = _bodies.get(self.name)
        if other is not None and _place(other.__wrapped__) != _place(body):
            raise ValueError(
                f"there are two durable sagas named {self.name!r}: {_place(other.__wrapped__)}, {_place(body)}"
            )
        _bodies[self.name] = made
        return made


def _place(function: Any) -> str:
    return f"{function.__module__}:{function.__qualname__}"


class Ended(Struct):
    """The result that the record of a saga holds."""

    v: int
    saga: str
    at: float = 0.0
    done: dict[str, Raw] = {}
    ok: Raw | UnsetType = msgspec.UNSET
    error: str = ""


def ended(data: bytes) -> Ended:
    """Read the end of a saga; `StoreError` for what is none."""
    try:
        made = msgspec.json.decode(data, type=Ended)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"the end of the saga cannot be read: {error}") from None
    if made.v != 1:
        raise StoreError(f"the end of the saga was written by another version ({made.v})")
    return made


class DurableBody:
    """A durable saga's body: call it with an id. `recover()` finishes what other processes began."""

    __wrapped__: Callable[..., Any]

    def __init__(self, durable: DurableSaga, body: Callable[..., Any], is_async: bool) -> None:
        functools.update_wrapper(self, body)
        self.durable, self.is_async = durable, is_async
        self._input = CallForm(body, _place(body), skip=1)
        self._result = form_of_result(body, _place(body))

    @property
    def name(self) -> str:
        """The name of the saga."""
        return self.durable.name

    def __call__(self, *args: Any, id: str, **kwargs: Any) -> Any:
        """Run the saga with this id, or go on with it, or get the result that it had. A coroutine, if the body is one.

        `SagaAborted` and `SagaStuck` as for a `Saga`, also to later calls; `InFlight` if it runs elsewhere and the
        ambient deadline ends before it does; `Incompatible` if its journal is of another version.
        """
        given = self._input.write(args, kwargs)
        # What comes back from the journal later is what the body gets now.
        again = self._input.read(*given)
        saga = self._saga(id)
        body = raw(write([given[0], given[1]]))
        return self._arun(saga, body, *again) if self.is_async else self._run(saga, body, *again)

    def recover(self) -> Any:
        """Finish the sagas of this name whose processes have died. See `resilient.sagas.recover`."""
        from resilient.sagas import recover

        return recover(self.durable.store, name=self.name)

    async def arecover(self) -> Any:
        """Finish the sagas of this name whose processes have died. See `resilient.sagas.arecover`."""
        from resilient.sagas import arecover

        return await arecover(self.durable.store, name=self.name)

    def resume(self, id: str, body: Raw) -> Any:
        """Go on with a saga by its recorded arguments; a coroutine, if the body is one."""
        args, kwargs = msgspec.json.decode(body, type=tuple[Raw, Raw])
        again = self._input.read(args, kwargs)
        return self._arun(self._saga(id), body, *again) if self.is_async else self._run(self._saga(id), body, *again)

    # -- running -----------------------------------------------------------------------------------------------------

    def _saga(self, id: str) -> Saga:
        return Saga(self.name, id=id, store=self.durable.store, **self.durable._options)

    def _book(self, saga: Saga, body: Raw, keeper: Any) -> Book:
        assert saga.id is not None
        return Book(saga.store, saga.env, saga.name, saga.id, saga.version, saga.lease, keeper, body)

    def _run(self, saga: Saga, body: Raw, args: list[Any], kwargs: dict[str, Any]) -> Any:
        store, env = saga.store, saga.env
        run = SagaRun(saga)
        book = self._book(saga, body, thread_keeper(store, saga.lease, env))
        entered = drive(self._enter(book), store, env, never, (), {}).result()
        if isinstance(entered, Ended):
            return self._ended(entered, saga)
        run._book = book
        guarded = saga._retry().sync(apply_sync, env)
        if book.failed is not None:
            return drive(_undone(saga, run, book, guarded), store, env, never, (), {}).result()
        limit = saga._limited(run)
        try:
            try:
                value = self.__wrapped__(run, *args, **kwargs)
            finally:
                limit()
            ok = self._result.keep(value)
        except BaseException as error:
            drive(settle(saga, run, error, guarded), store, env, never, (), {}).reraise(error)
            raise
        drive(settle(saga, run, None, guarded, ok), store, env, never, (), {}).result()
        return value

    async def _arun(self, saga: Saga, body: Raw, args: list[Any], kwargs: dict[str, Any]) -> Any:
        from resilient._aio import sheltered

        store, env = saga.store, saga.env
        run = AsyncSagaRun(saga)
        book = self._book(saga, body, task_keeper(store, saga.lease, env))
        entered = (await adrive(self._enter(book), store, env, never, (), {})).result()
        if isinstance(entered, Ended):
            return self._ended(entered, saga)
        run._book = book
        guarded = saga._retry().coro(apply_async, env)
        if book.failed is not None:
            return (await adrive(_undone(saga, run, book, guarded), store, env, never, (), {})).result()
        limit = saga._limited(run)
        try:
            try:
                value = await self.__wrapped__(run, *args, **kwargs)
            finally:
                limit()
            ok = self._result.keep(value)
        except GeneratorExit:
            raise
        except BaseException as error:
            program = settle(saga, run, error, guarded)
            gone = not isinstance(error, Exception)
            outcome, came = await sheltered(gone, saga.grace, adrive, program, store, env, never, (), {})
            if came:
                from asyncio import CancelledError

                raise CancelledError from error
            outcome.reraise(error)
            raise
        (await adrive(settle(saga, run, None, guarded, ok), store, env, never, (), {})).result()
        return value

    def _ended(self, end: Ended, saga: Saga) -> Any:
        if end.saga == "done" and end.ok is not msgspec.UNSET:
            value, error = self._result.outcome(bytes(end.ok))
            if error is None:
                return value
        raise SagaAborted(f"a step failed, and all that was done is undone: {end.error}", saga.name, str(saga.id))

    def _enter(self, book: Book) -> Program:
        """Find out what there is of a saga: nothing (None), its end (`Ended`), or a journal to go on with (`Book`)."""
        began = False
        while True:
            got = yield History(book.beat.stored)
            if isinstance(got, (StoreError, Cut)):
                return Outcome(None, got if isinstance(got, StoreError) else got.error)
            if got is None:
                return Outcome(None, None)
            record, entries = got
            if record.state == "done":
                return Outcome(ended(record.result), None)
            if record.state == "running":
                left = nearest(book.env.clock) - book.env.clock.now()
                if left <= 0:
                    return Outcome(None, InFlight(book.saga, book.id, max(0.0, record.mark - book.env.clock.at())))
                cut = yield Wait(book.beat.stored, min(left, 1.0 if began else 0.0))
                began = True
                if isinstance(cut, Cut):
                    return Outcome(None, cut.error)
                continue
            head = book.load(entries)
            if book.stuck:
                errors: list[Exception] = [SagaError(text, book.saga, book.id) for text in book.stuck]
                return Outcome(None, SagaStuck("it is stuck", errors, book.saga, book.id))
            if head.version != book.version:
                text = f"its journal is of version {head.version}, and this is version {book.version}"
                return Outcome(None, Incompatible(text, book.saga, book.id))
            reply = yield Claim(book.beat.stored, book.beat.owner, book.lease, "", record.label, True)
            if isinstance(reply, Cut):
                return Outcome(None, reply.error)
            if isinstance(reply, StoreError):
                return Outcome(None, reply)
            if type(reply) is not Acquired:
                continue
            book.beat.fence, book.beat.attempt = reply.fence, reply.attempt
            # Once more: the last owner may have written between the look and the claim.
            got = yield History(book.beat.stored)
            if not isinstance(got, tuple):
                return Outcome(None, got if isinstance(got, StoreError) else None)
            book.load(got[1])
            book.keeper.begin(book.beat)
            trouble = self._trouble(book)
            if trouble:
                yield from book.relabel("stuck", stuck=[trouble])
                yield from book.leave()
                error = SagaError(trouble, book.saga, book.id)
                return Outcome(None, SagaStuck("it is stuck", [error], book.saga, book.id))
            return Outcome(book, None)

    def _trouble(self, book: Book) -> str:
        """Why a saga that was left unfinished is not gone on with, if so."""
        if book.beat.attempt > self.durable.attempts:
            return f"{book.beat.attempt - 1} processes have not finished it"
        if self.durable.in_doubt == "stuck" and book.failed is None:
            for number, step in book.steps.items():
                if number not in book.results:
                    return f"step {number} ({step.name}) had begun, and nobody knows how it ended"
        return ""


def _undone(saga: Saga, run: Run, book: Book, guarded: Callable[..., Any]) -> Program:
    """Go on undoing, by the journal alone."""
    error = SagaError(f"a step failed: {book.failed}", saga.name, run.id)
    run._over = True
    outcome = yield from rollback(saga, run, error, journalled(book), guarded)
    if outcome.error is not None and outcome.error.__cause__ is None:
        outcome.error.__cause__ = error
    return outcome


def journalled(book: Book) -> list[Undo]:
    """What the journal says is to be undone yet, the last first. `LookupError` for a function that is not here."""
    undos: list[Undo] = []
    for number in sorted(book.steps, reverse=True):
        step = book.steps[number]
        if step.undo is None or number in book.undone:
            continue
        data = book.results.get(number)
        if data is None and step.late:
            continue
        value = UNKNOWN if data is None else _value(bytes(data), step.name)
        undos.append(revived(step, value))
    return undos


def _value(data: bytes, name: str) -> Any:
    from resilient._journal import found

    value, error = form_of_result(found(name), name).outcome(data)
    if error is not None:
        raise StoreError("the journal has an error where a value should be")
    return value
