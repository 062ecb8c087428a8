"""DurableSaga: a saga whose body can be run again, so that any process can finish what another one began.

Promises: the body's finished steps come from the journal and are not run again; a step that had begun is run again
with the same `saga.step_key`; a second call with an id gets the first one's result. Does not: make the code between the
steps durable: it must do the same each time, from its arguments and the values of the steps. n steps cost n + 1 commits
and a look. Safe from any thread and loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, TypeVar, overload

import msgspec
from msgspec import Raw, UnsetType

from resilient._book import Book
from resilient._drive import Outcome, Program, adrive, drive
from resilient._guard import kind_of
from resilient._journal import CallForm, module_of, result_form, vouch_for
from resilient._run import Run, task_keeper, thread_keeper
from resilient._settle import never, rollback, settle
from resilient._takeover import Again, Elsewhere, Ended, Rules, enter
from resilient.errors import SagaAborted, SagaError, StoreError
from resilient.policy import SYSTEM, Env, whole
from resilient.saga import AsyncSagaRun, Saga, SagaRun
from resilient.stores._ops import History

if TYPE_CHECKING:
    from resilient.retry import Retry

__all__ = ["DurableBody", "DurableSaga", "known"]

Given: TypeAlias = tuple[list[Any], dict[str, Any]]
B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)

_bodies: dict[str, DurableBody] = {}


def known() -> dict[str, DurableBody]:
    """The durable sagas that this process can run, by name."""
    return dict(_bodies)


class Engine(Protocol[B_co]):
    """What runs bodies elsewhere: it makes of each what its callers get."""

    def bind(self, durable: DurableSaga[Any], body: Callable[..., Any], /) -> B_co:
        """What `DurableSaga` makes of `body`."""
        ...


class DurableSaga(Generic[B]):
    """Make a function the body of a durable saga: `@DurableSaga("order", store="sqlite:///sagas.db")`.

    The body's first parameter is the saga; `place(order, id="o-42")` runs it. Arguments and results are kept as JSON,
    by their annotations. `version` says which bodies can read each other's journals: change it when the steps change.
    `in_doubt` is for a step that had begun when its process died: `"rerun"` it with the same key, or `"stuck"`, for a
    person. After `attempts` processes have died over it a saga is stuck too. The other options are those of `Saga`.

    `engine` runs it elsewhere: a `resilient.engines.TemporalEngine` or `DBOSEngine` in place of a store. The body stays
    as it is.
    """

    __slots__ = ("_options", "attempts", "engine", "env", "in_doubt", "lease", "name", "store", "version")

    @overload
    def __init__(
        self: DurableSaga[DurableBody],
        name: str,
        *,
        store: Any,
        engine: None = None,
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
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        *,
        store: None = None,
        engine: Engine[B],
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
    ) -> None: ...
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
        self.in_doubt: Literal["rerun", "stuck"] = in_doubt
        self.attempts = whole("attempts", attempts)

    def __call__(self, body: Callable[..., Any], /) -> B:
        """Make `body` the body of this saga. `ValueError` if another one has its name."""
        # What the body's own package has may be named by its journals.
        module = module_of(body)
        top, _, inner = module.partition(".")
        # A saga of this library's own, such as the demo's, says nothing for the rest of it.
        vouch_for(module.rpartition(".")[0] if top == "resilient" and inner else top)
        made: Any = self.local(body) if self.engine is None else self.engine.bind(self, body)
        bound: B = made
        return bound

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
    return f"{module_of(function)}:{function.__qualname__}"


class DurableBody:
    """A durable saga's body: call it with an id. `recover()` finishes what other processes began."""

    __wrapped__: Callable[..., Any]

    def __init__(self, durable: DurableSaga[Any], body: Callable[..., Any], is_async: bool) -> None:
        functools.update_wrapper(self, body)
        self.durable, self.is_async = durable, is_async
        self._input = CallForm(body, _place(body), skip=1)
        self._result = result_form(body, _place(body))

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
        again = self._input.again(args, kwargs, given)
        body = Raw(b"[%b,%b]" % given)
        going = self._arun if self.is_async else self._run
        return going(self.durable.store, id, body, again, self._rules(wait=True))

    def resume(self, store: Any, id: str, body: Raw, again: Again = "") -> Any:
        """Go on with what the journal in `store` says, by the arguments in it; a coroutine, if the body is one."""
        try:
            given = self._input.read(*msgspec.json.decode(body, type=tuple[Raw, Raw]))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StoreError(f"the journal has arguments that cannot be read: {error}") from None
        going = self._arun if self.is_async else self._run
        return going(store, id, body, given, self._rules(again=again))

    def recover(self) -> Any:
        """Finish the sagas of this name whose processes have died. See `resilient.sagas.recover`."""
        from resilient.sagas import recover

        return recover(self.durable.store, name=self.name)

    async def arecover(self) -> Any:
        """Finish the sagas of this name whose processes have died. See `resilient.sagas.arecover`."""
        from resilient.sagas import arecover

        return await arecover(self.durable.store, name=self.name)

    # -- running -----------------------------------------------------------------------------------------------------

    def _rules(self, *, wait: bool = False, again: Again = "") -> Rules:
        durable = self.durable
        return Rules(wait, durable.version, durable.attempts, durable.in_doubt, again)

    def _prepared(self, run: Any, body: Raw, keeper: Any) -> Book:
        saga: Saga = run._saga
        book = Book(saga.store, saga.env, saga.name, run.id, saga.version, saga.lease, keeper, body)
        book.alike = self._input.alike
        return book

    def _run(self, store: Any, id: str, body: Raw, given: Given, rules: Rules) -> Any:
        while True:
            saga = Saga(self.name, id=id, store=store, **self.durable._options)
            env, run = saga.env, SagaRun(saga)
            undoing = saga._undoer()
            book = self._prepared(run, body, thread_keeper(store, saga.lease, env))
            try:
                seen = store.execute(History(book.beat.stored))
                end = seen and drive(enter(book, rules, seen), store, env, never, (), {}).result()
                self._there(end, rules, id)
                if isinstance(end, Ended):
                    return self._ended(end, id)
                run._book = book
                if book.failed is not None:
                    return drive(undone(saga, run, book, undoing), store, env, never, (), {}).result()
                limit = saga._limited(run)
                try:
                    try:
                        value = self.__wrapped__(run, *given[0], **given[1])
                        if run._active:
                            raise run._went_on()
                    finally:
                        run._over = True
                        limit()
                    ok = self._result.keep(value)
                except BaseException as caught:
                    error = run._rest(caught) if run._active else caught
                    if again_after(book, rules):
                        continue
                    outcome = drive(settle(saga, run, error, undoing), store, env, never, (), {})
                    saga._tell(undoing, outcome, error, id)
                    outcome.reraise(error)
                    if error is not caught:
                        raise error from caught
                    raise
                if run._done(book, ok):
                    return value
                outcome = drive(settle(saga, run, None, undoing, ok), store, env, never, (), {})
                if again_after(book, rules):
                    continue
                outcome.result()
                return value
            finally:
                book.beat.over = True
                book.stop()

    async def _arun(self, store: Any, id: str, body: Raw, given: Given, rules: Rules) -> Any:
        while True:
            saga = Saga(self.name, id=id, store=store, **self.durable._options)
            env, run = saga.env, AsyncSagaRun(saga)
            undoing = saga._aundoer()
            book = self._prepared(run, body, task_keeper(store, saga.lease, env))
            try:
                seen = await store.aexecute(History(book.beat.stored))
                end = seen and (await adrive(enter(book, rules, seen), store, env, never, (), {})).result()
                self._there(end, rules, id)
                if isinstance(end, Ended):
                    return self._ended(end, id)
                run._book = book
                if book.failed is not None:
                    return await saga._carried(undone(saga, run, book, undoing), store, undoing, None, id)
                limit = saga._limited(run)
                try:
                    try:
                        value = await self.__wrapped__(run, *given[0], **given[1])
                        if run._active:
                            raise run._went_on()
                    finally:
                        run._over = True
                        limit()
                    ok = self._result.keep(value)
                except GeneratorExit:
                    raise
                except BaseException as caught:
                    error = await run._arest(caught) if run._active else caught
                    if again_after(book, rules):
                        continue
                    await saga._carried(settle(saga, run, error, undoing), store, undoing, error, id)
                    if error is not caught:
                        raise error from caught
                    raise
                if await run._done(book, ok):
                    return value
                outcome = await adrive(settle(saga, run, None, undoing, ok), store, env, never, (), {})
                if again_after(book, rules):
                    continue
                outcome.result()
                return value
            finally:
                book.beat.over = True
                book.stop()

    def _there(self, end: Any, rules: Rules, id: str) -> None:
        if not rules.wait and (end is None or isinstance(end, Ended)):
            raise Elsewhere("it has just ended, or been removed, elsewhere", self.name, id)

    def _ended(self, end: Ended, id: str) -> Any:
        if end.saga == "done" and not isinstance(end.ok, UnsetType):
            value, _ = self._result.outcome(bytes(end.ok))
            return value
        if end.saga == "aborted":
            text = f"a step failed, and all that was done is undone: {end.error}"
            raise SagaAborted(text, self.name, id)
        raise SagaError(f"it has ended already: {end.saga}{f' ({end.error})' if end.error else ''}", self.name, id)


def again_after(book: Book, rules: Rules) -> bool:
    """Whether nothing has been run, since another call with this id was first: then it is to be waited for."""
    return book.taken and rules.wait


def undone(saga: Saga, run: Run, book: Book, guarded: Callable[..., Any]) -> Program:
    """Go on undoing, by the journal alone; the outcome's error says how it ended."""
    error = SagaError(f"a step failed: {book.failed}", saga.name, run.id)
    run._over, run._book = True, book
    try:
        outcome = yield from rollback(saga, run, error, book.left(), guarded)
    except (StoreError, SagaError, LookupError) as fault:
        yield from book.leave()
        return Outcome(None, fault)
    if outcome.error is not None and outcome.error.__cause__ is None:
        outcome.error.__cause__ = error
    return outcome
