"""Idempotent: however often it is called with a key, the effect happens once, and every caller gets its result.

Promises: one atomic claim decides who runs; everyone else gets the stored result, or an honest `InDoubt` where a former
attempt began and never said how it ended. Through threads, processes and machines, crashes and retries, as far as the
store reaches. Does not: undo effects, or look inside them (`claim().derive` makes keys for what the function calls).
Costs two round trips to the store for a first call and one for a replay. Safe from any thread and loop.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary

from resilient._binding import Fingerprint, Key, Scope, addresser, check_settings
from resilient._binding import Hasher as Hasher
from resilient._codec import Codec, Form, Json, form_of, real_module
from resilient._drive import Cut, Outcome, adrive, drive
from resilient._guard import faces, kind_of
from resilient._keeper import TaskKeeper, ThreadKeeper, new_owner
from resilient._once import (
    RERUN,
    Hold,
    Tally,
    current,
    ended,
    lost,
    once,
    unbegun,
    unfinished,
    unkept,
    unlocked,
    was_replayed,
)
from resilient.errors import InDoubt, StoreError
from resilient.policy import Policy, seconds, whole
from resilient.stores._open import shared
from resilient.stores._ops import Acquired, Claim, Finish, Purge

if TYPE_CHECKING:
    from resilient._drive import Program
    from resilient._transaction import Transaction
    from resilient._types import Call
    from resilient.policy import Env

__all__ = ["RERUN", "Codec", "Hold", "Idempotent", "Json", "claim", "fence", "replayed"]


def claim() -> Hold:
    """The claim of the innermost idempotent call that runs here. `LookupError` outside of every one."""
    hold = current.get()
    if hold is None:
        raise LookupError("no idempotent call runs here")
    return hold


def fence() -> int:
    """The fence of the innermost idempotent call that runs here: larger than that of every earlier claim of its key.

    Hand it to the resource: one that remembers the largest number it has seen, and refuses smaller ones, is safe from
    an owner that lost its lease and does not know yet. `LookupError` outside of every such call.
    """
    return claim().fence


def replayed() -> bool:
    """Whether the latest idempotent call in this thread or task got a stored result, in place of running."""
    return was_replayed.get()


class Idempotent(Policy):
    """Run the function once for each key, and give everyone who calls with that key its result.

    `store` is a store or its URL (`resilient.stores.open`). `key` names a parameter, or several, or is a function of
    the call's arguments; it is text of 1 to 255 printable characters, a number, a UUID, a date, an enum, or several of
    those. What is stored is a hash of `scope` (a string, or a function of the arguments: a tenant), function and key.
    The function is known by module and qualified name, or by `name` where you give one (so that it may move).

    A claim holds for `lease` seconds and is renewed while the call runs; a result is kept for `ttl` seconds.

    - `duplicates`: those who come while the first call runs `"wait"` for it, at most `max_wait` seconds and within the
      ambient deadline, or `"raise"`. Then `InFlight`.
    - `in_doubt`: what to do if an earlier attempt's lease is over and nobody knows how far it came: `"raise"`
      `InDoubt`, `"rerun"` (the effect may be repeated), or ask a function of the call's arguments, which returns the
      result, or `RERUN` if there was no effect. It may be `async` where the guarded function is.
    - `remember`: exception classes that are results too, and are replayed. Other errors free the key.
    - `fingerprint`: what must be equal for calls with one key: all other arguments (True), those named, what a function
      of the arguments returns, or nothing (False). Otherwise `KeyReused`.
    - `codec`: `Json`, or one of your own.
    - `on_store_error`: `"refuse"` raises `StoreError`; `"run"` calls the function without protection.

    Calls raise `ValueError` or `TypeError` for a key that is none before anything runs. Generators are refused at
    decoration: a stream is no result. Live numbers: `replays`, `waits`, `in_doubts`, `lost`, `unprotected`.

    >>> from resilient import Idempotent
    >>> @Idempotent("memory://", key="order_id")
    ... def charge(order_id: str, cents: int) -> str:
    ...     return f"charged {cents} for {order_id}"
    >>> charge("o-1", 500), charge(order_id="o-1", cents=500)
    ('charged 500 for o-1', 'charged 500 for o-1')
    """

    __slots__ = (
        "_fitted",
        "_given_name",
        "_how",
        "_named",
        "_store",
        "codec",
        "fingerprint",
        "key",
        "remember",
        "scope",
    )

    role = "idempotent"

    def __init__(
        self,
        store: Any,
        *,
        key: Key,
        scope: Scope = None,
        ttl: float = 86_400.0,
        lease: float = 30.0,
        duplicates: Literal["wait", "raise"] = "wait",
        max_wait: float | None = None,
        in_doubt: Literal["raise", "rerun"] | Callable[..., Any] = "raise",
        remember: type[Exception] | tuple[type[Exception], ...] = (),
        fingerprint: Fingerprint = True,
        codec: Codec | type[Json] = Json,
        on_store_error: Literal["refuse", "run"] = "refuse",
        name: str | None = None,
    ) -> None:
        check_settings(key, fingerprint, scope)
        self.key, self.fingerprint, self.scope = key, fingerprint, scope
        how = self._how = Tally()
        how.ttl, how.lease = seconds("ttl", ttl), seconds("lease", lease)
        how.max_wait = None if max_wait is None else seconds("max_wait", max_wait, zero=True)
        how.duplicates = _one_of("duplicates", duplicates, ("wait", "raise"))
        how.on_store_error = _one_of("on_store_error", on_store_error, ("refuse", "run"))
        how.in_doubt = in_doubt if callable(in_doubt) else _one_of("in_doubt", in_doubt, ("raise", "rerun"))
        self.remember = _classes(remember)
        if isinstance(codec, type):
            if codec is not Json:
                raise TypeError(f"codec must be an object with encode and decode, not {codec!r}")
            codec = Json()
        if not (callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None))):
            raise TypeError(f"codec must be an object with encode and decode, not {codec!r}")
        self.codec = codec
        if name is not None and not (isinstance(name, str) and name):
            raise TypeError(f"name must be some text, not {name!r}")
        self._given_name = name
        # The functions that it guards, as the store knows them.
        self._fitted: set[str] = set()
        self._named: dict[str, tuple[str, CodeType | None]] = {}
        how.name = name or "idempotent"
        self._store = shared(store) if isinstance(store, str) else store
        if not any(callable(getattr(self._store, way, None)) for way in ("execute", "aexecute")):
            raise TypeError(f"store must be a store or the URL of one, not {store!r}")

    @property
    def store(self) -> Any:
        """Where the records are."""
        return self._store

    @property
    def name(self) -> str | None:
        """The name in events and messages: that given, or the function's."""
        return None if self._how.name == "idempotent" else self._how.name

    @name.setter
    def name(self, name: str | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._how.name = name or "idempotent"

    ttl = property(lambda self: self._how.ttl, doc="Seconds for which a result is kept.")
    lease = property(lambda self: self._how.lease, doc="Seconds for which a claim holds without a heartbeat.")
    replays = property(lambda self: self._how.replays, doc="Calls that got a stored result.")
    waits = property(lambda self: self._how.waits, doc="Calls that found another one running.")
    in_doubts = property(lambda self: self._how.in_doubts, doc="Calls that ended in `InDoubt` for an earlier attempt.")
    lost = property(lambda self: self._how.lost, doc="Calls that lost their lease while they ran.")
    unprotected = property(lambda self: self._how.unprotected, doc="Calls that ran although the store failed.")

    def describe(self) -> dict[str, Any]:
        """The settings that matter, as plain data."""
        how = self._how
        return {
            "name": self.name,
            "store": repr(self._store),
            "key": self.key,
            "scope": self.scope,
            "ttl": how.ttl,
            "lease": how.lease,
            "duplicates": how.duplicates,
            "max_wait": how.max_wait,
            "in_doubt": how.in_doubt,
            "remember": self.remember or None,
            "fingerprint": self.fingerprint,
            "on_store_error": how.on_store_error,
        }

    def fit(self, target: Call) -> Fitted:
        """This policy for one function, checked against its parameters and what it returns."""
        return Fitted(self, target)

    def sync(self, call: Call, env: Env) -> Call:
        """Guard a plain function that shows its own parameters."""
        return self.fit(call).sync(call, env)

    def coro(self, call: Call, env: Env) -> Call:
        """Guard a coroutine function that shows its own parameters."""
        return self.fit(call).coro(call, env)

    def transaction(
        self, connection: Any, key: Any, *, payload: Any = ..., scope: str | None = None, returns: Any = Any
    ) -> Transaction:
        """Claim `key` inside the caller's own transaction: effect and record are committed together, or neither.

        `with` for a `sqlite3` or `psycopg` connection, `async with` for an `aiosqlite` or async `psycopg` one. The
        block gets a claim: if it is `replayed`, its `result` is there and there is nothing to do; else do the work on
        the same connection and set `claim.result`. `returns` is the type that comes back, `payload` is what must be
        equal for one key. See `docs/how-to/idempotency.md`. Keys are those of the policy's `name`; without one, of the
        only function that it guards; else `TypeError`, since other policies of the store must not share them.
        """
        from resilient._transaction import Transaction

        whose = self._given_name
        if whose is None:
            if len(self._fitted) != 1:
                raise TypeError(
                    "the keys of transaction() belong to the policy's name, and it has none (nor just one function "
                    'that it guards): give it one, Idempotent(…, name="orders"), that no other effect in this store has'
                )
            # Not those of the function itself, which may use this inside of a call with the same key.
            whose = f"{next(iter(self._fitted))} in a transaction"
        return Transaction(self, whose, connection, key, payload, scope, returns)

    def purge(self, older_than: float, batch: int = 1000) -> int:
        """Remove the records of this store that ended at least `older_than` seconds ago, and say how many those were.

        Those of other functions too, and those in doubt; never one whose lease runs. `batch` at a time.
        """
        op, total = self._purging(older_than, batch), 0
        while True:
            gone: int = self._store.execute(op)
            total += gone
            if gone < batch:
                return total

    async def apurge(self, older_than: float, batch: int = 1000) -> int:
        """`purge`, for tasks."""
        op, total = self._purging(older_than, batch), 0
        while True:
            gone: int = await self._store.aexecute(op)
            total += gone
            if gone < batch:
                return total

    def _purging(self, older_than: float, batch: int) -> Purge:
        return Purge(seconds("older_than", older_than, zero=True), whole("batch", batch))


class Fitted:
    """`Idempotent` around one function."""

    __slots__ = ("_address", "_form", "_label", "_marked", "_policy", "_target")

    def __init__(self, policy: Idempotent, target: Call) -> None:
        self._policy, self._target = policy, target
        shown = policy.name or "idempotent"
        self._label = policy._given_name or identity(target)
        _alone(policy, self._label, target)
        policy._fitted.add(self._label)
        self._marked = False
        if kind_of(target) in ("sync", "coro"):
            try:
                self._form = form_of(policy.codec, target, policy.remember)
            except TypeError as error:
                raise TypeError(f"{shown}: {error}") from error.__cause__
            self._address = addresser(target, shown, policy.key, policy.fingerprint, policy.scope, self._label)
            reconcile = policy._how.in_doubt
            if kind_of(target) == "sync" and callable(reconcile) and kind_of(reconcile) != "sync":
                raise TypeError(f"in_doubt={reconcile!r} is async, which a plain function cannot await")

    def sync(self, call: Call, env: Env) -> Call:
        """Guard a plain function."""
        store = self._policy.store
        if not callable(getattr(store, "execute", None)):
            raise TypeError(f"{store!r} serves coroutines only, and {self._label} is a plain function")
        policy, how, remember = self._policy, self._policy._how, self._policy.remember
        address, marked, form, execute = self._address, self._marked, self._form, store.execute
        keeper = ThreadKeeper(store, how.lease, self._on_lost(env))

        # The way of a new key whose call succeeds is the program `once`, written out: that takes a microsecond less.
        # Whatever else comes is left to the rest of the program from there on. That both do the same, whatever they
        # are answered, is what `tests/test_idempotency_straight.py` shows.
        def idempotent(*args: Any, **kwargs: Any) -> Any:
            nonlocal form
            key, stored, label, print_ = address(args, kwargs)
            if form is None:
                form = _late(policy, self._target)
            hold = Hold(key, stored, new_owner())
            outer = current.get()
            if outer is not None:
                unlocked(outer, store, stored)
            if marked:
                hold.open, hold.home = set(), self
            rest: Program | None = None
            reply: Any = None
            try:
                reply = execute(Claim(stored, hold.owner, how.lease, print_, label))
                if type(reply) is not Acquired or reply.attempt > 1:
                    rest = once(how, form, remember, None, store, keeper, env, hold, print_, label, reply)
            except StoreError as error:
                rest = once(how, form, remember, None, store, keeper, env, hold, print_, label, error)
            except (Exception, GeneratorExit):
                raise
            except BaseException as error:
                rest = once(how, form, remember, None, store, keeper, env, hold, print_, label, Cut(error))
            if rest is None:
                hold.fence, hold.attempt, hold.policy = reply.fence, reply.attempt, how.name
                value: Any = None
                failed: Outcome | None = None
                begun = False
                try:
                    keeper.begin(hold)
                    hold.outer = outer
                    current.set(hold)
                    begun = True
                    value = call(*args, **kwargs)
                except GeneratorExit:
                    raise
                except BaseException as error:
                    failed = Outcome(None, error)
                finally:
                    # By this alone there is no other heartbeat: a signal may interrupt whatever is called here.
                    hold.over = True
                    beating = keeper.end(hold)
                    if current.get() is hold:
                        current.set(outer)
                if not begun and failed is not None:
                    rest = unbegun(how, env, hold, failed, beating)
                    failed = None
                elif failed is None and not beating:
                    if was_replayed.get():
                        was_replayed.set(False)
                    try:
                        data = form.keep(value)
                    except Exception as fault:
                        rest = unkept(how, env, hold, fault)
                    else:
                        try:
                            reply = execute(Finish(stored, hold.owner, hold.fence, data, how.ttl))
                            if reply is True:
                                return value
                            rest = unfinished(how, env, hold, data, Outcome(value, None), reply)
                        except StoreError as error:
                            rest = unfinished(how, env, hold, data, Outcome(value, None), error)
                        except (Exception, GeneratorExit):
                            raise
                        except BaseException as error:
                            rest = unfinished(how, env, hold, data, Outcome(value, None), Cut(error))
                else:
                    rest = ended(how, form, remember, None, env, hold, failed or Outcome(value, None), beating)
                    # What is raised must not be reached from here: it would be a reference cycle.
                    failed = None
            outcome = drive(rest, store, env, call, args, kwargs)
            return outcome.value if outcome.error is None else outcome.result()

        return idempotent

    def coro(self, call: Call, env: Env) -> Call:
        """Guard a coroutine function."""
        store = self._policy.store
        if not callable(getattr(store, "aexecute", None)):
            raise TypeError(
                f"{store!r} serves plain functions only, and {self._label} is a coroutine function: "
                "wrap it in resilient.stores.Threaded, if a thread for each operation will do"
            )
        policy, how, remember = self._policy, self._policy._how, self._policy.remember
        address, marked, form, execute = self._address, self._marked, self._form, store.aexecute
        keeper = TaskKeeper(store, how.lease, self._on_lost(env), env.clock)

        async def idempotent(*args: Any, **kwargs: Any) -> Any:
            nonlocal form
            key, stored, label, print_ = address(args, kwargs)
            if form is None:
                form = _late(policy, self._target)
            hold = Hold(key, stored, new_owner())
            outer = current.get()
            if outer is not None:
                unlocked(outer, store, stored)
            if marked:
                hold.open, hold.home = set(), self
            rest: Program | None = None
            reply: Any = None
            try:
                reply = await execute(Claim(stored, hold.owner, how.lease, print_, label))
                if type(reply) is not Acquired or reply.attempt > 1:
                    rest = once(how, form, remember, None, store, keeper, env, hold, print_, label, reply)
            except StoreError as error:
                rest = once(how, form, remember, None, store, keeper, env, hold, print_, label, error)
            except (Exception, GeneratorExit):
                raise
            except BaseException as error:
                rest = once(how, form, remember, None, store, keeper, env, hold, print_, label, Cut(error))
            if rest is None:
                hold.fence, hold.attempt, hold.policy = reply.fence, reply.attempt, how.name
                value: Any = None
                failed: Outcome | None = None
                begun = False
                try:
                    keeper.begin(hold)
                    hold.outer = outer
                    current.set(hold)
                    begun = True
                    value = await call(*args, **kwargs)
                except GeneratorExit:
                    raise
                except BaseException as error:
                    failed = Outcome(None, error)
                finally:
                    # By this alone there is no other heartbeat: a signal may interrupt whatever is called here.
                    hold.over = True
                    beating = keeper.end(hold)
                    if current.get() is hold:
                        current.set(outer)
                if not begun and failed is not None:
                    rest = unbegun(how, env, hold, failed, beating)
                    failed = None
                elif failed is None and not beating:
                    if was_replayed.get():
                        was_replayed.set(False)
                    try:
                        data = form.keep(value)
                    except Exception as fault:
                        rest = unkept(how, env, hold, fault)
                    else:
                        try:
                            reply = await execute(Finish(stored, hold.owner, hold.fence, data, how.ttl))
                            if reply is True:
                                return value
                            rest = unfinished(how, env, hold, data, Outcome(value, None), reply)
                        except StoreError as error:
                            rest = unfinished(how, env, hold, data, Outcome(value, None), error)
                        except (Exception, GeneratorExit):
                            raise
                        except BaseException as error:
                            rest = unfinished(how, env, hold, data, Outcome(value, None), Cut(error))
                else:
                    rest = ended(how, form, remember, None, env, hold, failed or Outcome(value, None), beating)
                    # What is raised must not be reached from here: it would be a reference cycle.
                    failed = None
            outcome = await adrive(rest, store, env, call, args, kwargs)
            return outcome.value if outcome.error is None else outcome.result()

        return idempotent

    def mark(self, call: Call, kind: str) -> Call:
        """The innermost shell where other policies stand in between: notes which starts did not raise."""
        self._marked = True
        if kind == "sync":

            def started(*args: Any, **kwargs: Any) -> Any:
                start = object()
                starts = self._starts()
                starts.add(start)
                try:
                    return call(*args, **kwargs)
                except Exception as error:
                    if not isinstance(error, InDoubt):
                        starts.discard(start)
                    raise

            return started

        async def astarted(*args: Any, **kwargs: Any) -> Any:
            start = object()
            starts = self._starts()
            starts.add(start)
            try:
                return await call(*args, **kwargs)
            except Exception as error:
                if not isinstance(error, InDoubt):
                    starts.discard(start)
                raise

        return astarted

    def _starts(self) -> set[object]:
        """Where the starts of the call that runs here are noted."""
        hold = current.get()
        # Not those of a call around it, should this one run without protection.
        while hold is not None and hold.home is not self:
            hold = hold.outer
        return set() if hold is None or hold.open is None else hold.open

    def _on_lost(self, env: Env) -> Callable[[Any], object]:
        how = self._policy._how
        return lambda hold: lost(how, env, hold)


def identity(target: Any) -> str:
    """The name by which the store knows a function: module and qualified name."""
    named = faces(target)[0]
    if not isinstance(getattr(named, "__qualname__", None), str):
        named = named.__class__
    return f"{real_module(named.__module__)}:{named.__qualname__}"


# The functions that have records in a store, by the name under which it knows them: what and where they are.
_known: WeakKeyDictionary[Any, dict[str, tuple[str, Any]]] = WeakKeyDictionary()


def _alone(policy: Idempotent, label: str, target: Any) -> None:
    """`TypeError` if another function has its records in the store under that name: one would get the other's results.

    The same function again is fine, and so is one that takes its place: after a reload, or at a prompt. A name that
    two policies were given is meant to be shared, by a function and its async twin, say; one policy has one function.
    """
    store = policy.store
    code = getattr(faces(target)[0], "__code__", None) or getattr(faces(target)[1], "__code__", None)
    code = code if isinstance(code, CodeType) else None
    name = identity(target)
    try:
        known = _known.setdefault(store, {}) if policy._given_name is None else policy._named
    except TypeError:
        return  # A store that cannot be known again.
    before = known.setdefault(label, (name, code))
    if before[0] == name and ("<" not in name or _replaces(code, before[1])):
        return
    raise TypeError(
        f"{_said(name, code)} and {_said(*before)} would share the records of {label!r} in {store!r}: give each a name "
        "of its own, Idempotent(…, name=…)"
    )


def _replaces(code: CodeType | None, before: CodeType | None) -> bool:
    """Whether the code of one function without a name of its own stands where that of the other does, or did."""
    if code is None or before is None or hasattr(sys, "ps1"):
        return True
    if (code.co_filename, code.co_firstlineno) != (before.co_filename, before.co_firstlineno):
        return False
    # One line can have several lambdas.
    return code.co_name != "<lambda>" or code == before


def _said(name: str, code: CodeType | None) -> str:
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _late(policy: Idempotent, target: Call) -> Form:
    form = form_of(policy.codec, target, policy.remember)
    if form is None:
        annotation = inspect.signature(target).return_annotation
        raise TypeError(f"{identity(target)}: its return annotation {annotation!r} cannot be resolved")
    return form


def _one_of(parameter: str, value: Any, words: tuple[str, ...]) -> str:
    if value not in words:
        raise ValueError(f"{parameter} must be {' or '.join(map(repr, words))}, not {value!r}")
    return str(value)


def _classes(given: Any) -> tuple[type[Exception], ...]:
    classes: Any = given
    if not isinstance(given, tuple):
        classes = (given,)
    for one in classes:
        if not (isinstance(one, type) and issubclass(one, Exception)):
            raise TypeError(f"remember must be subclasses of Exception, not {one!r}")
        if issubclass(one, StoreError):
            raise ValueError("remember must not name StoreError: it says nothing about the call")
    return cast("tuple[type[Exception], ...]", classes)
