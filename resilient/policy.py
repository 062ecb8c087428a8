"""What a policy is, and the environment that it runs in.

A policy has a name, describes itself, is a decorator, and has one *shell* for each kind of function that it serves:
`sync`, `coro`, `gen`, `stream`. A shell takes the next call inwards and the `Env`, and returns a function that guards
the call. Shells are made once, at decoration. A policy of your own needs no more than a name and one shell.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from resilient._guard import decorate
from resilient._types import Call, F
from resilient.clock import SystemClock, system_rng

if TYPE_CHECKING:
    from resilient.clock import Clock, Rng
    from resilient.events import Event, Sink

__all__ = ["SYSTEM", "Env", "Policy", "seconds", "whole"]


class Env:
    """Clock, chance and sinks, bound to a function when it is decorated.

    `clock` tells time and sleeps, `rng` makes jitter, `sinks` take events in order. The default of each is the
    system's. Safe from any thread.
    """

    __slots__ = ("__weakref__", "_lock", "_rng", "clock", "sinks")

    def __init__(self, clock: Clock | None = None, rng: Rng | None = None, sinks: Iterable[Sink] = ()) -> None:
        self.clock: Clock = SystemClock() if clock is None else clock
        self.sinks: tuple[Sink, ...] = tuple(sinks)
        self._rng = rng
        self._lock = threading.Lock()
        for sink in self.sinks:
            if not callable(sink):
                raise TypeError(f"sinks: {sink!r} is not callable")

    @property
    def rng(self) -> Rng:
        """The source of chance; made on first use."""
        if self._rng is None:
            self._rng = system_rng()
        return self._rng

    def subscribe(self, sink: Sink) -> Callable[[], None]:
        """Send every later event to `sink`; the returned function ends that."""
        if not callable(sink):
            raise TypeError(f"sink: {sink!r} is not callable")
        with self._lock:
            self.sinks = (*self.sinks, sink)
        return lambda: self._drop(sink)

    def emit(self, event: Event) -> None:
        """Hand `event` to each sink. One that raises is logged once and removed; the caller never notices.

        Call it outside every lock, behind `if env.sinks:`.
        """
        for sink in self.sinks:
            try:
                sink(event)
            except Exception:
                self._drop(sink)
                import logging

                logging.getLogger("resilient").exception("the sink %r raised and was removed", sink)

    def _drop(self, sink: Sink) -> None:
        with self._lock:
            self.sinks = tuple(kept for kept in self.sinks if kept is not sink)


SYSTEM = Env()
"""The environment of every function that was decorated without another one."""


class Policy:
    """The base of our policies: a decorator that knows its name. Subclass it to write your own.

    Define some of `sync(call, env)`, `coro(call, env)`, `gen(call, env)`, `stream(call, env)`. A kind that is missing
    is a `TypeError` when a function of that kind is decorated. `role` says where the policy stands in a pipeline.
    """

    __slots__ = ()

    role = "other"
    name: str | None

    def __call__(self, fn: F, /) -> F:
        """Guard `fn`. Its signature, kind, name and documentation stay."""
        return decorate((self,), fn)

    def describe(self) -> dict[str, Any]:
        """The settings that matter, as plain data."""
        return {"name": self.name}

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={_short(value)}" for key, value in self.describe().items() if value is not None)
        return f"{type(self).__name__}({settings})"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_short, cast("tuple[object, ...]", value))) + ")"
    return getattr(value, "__qualname__", None) or repr(value)


def seconds(parameter: str, value: float, *, zero: bool = False) -> float:
    """`value` as a float, if it is a finite number of seconds above zero (or zero, with `zero`); else an error."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{parameter} must be a number, not {value!r}")
    # An integer may be beyond all floats.
    if not (value >= 0 if zero else value > 0) or value > sys.float_info.max:
        raise ValueError(f"{parameter} must be a finite number {'of at least' if zero else 'above'} 0, not {value!r}")
    return float(value)


def whole(parameter: str, value: int, *, least: int = 1) -> int:
    """`value`, if it is an integer of at least `least`; else an error."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{parameter} must be an integer, not {value!r}")
    if value < least:
        raise ValueError(f"{parameter} must be at least {least}, not {value!r}")
    return value


class Watch:
    """The outermost shell of a function when a sink wants every call: reports how long each took and how it ended."""

    __slots__ = ("name",)

    role = "watch"

    def __init__(self, name: str) -> None:
        self.name = name

    def sync(self, call: Call, env: Env) -> Call:
        """Report each call as a `CallEnded`."""
        now, ended = env.clock.now, self._ended

        def watch(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                value = call(*args, **kwargs)
            except BaseException as error:
                ended(env, now() - began, error)
                raise
            ended(env, now() - began, None)
            return value

        return watch

    def coro(self, call: Call, env: Env) -> Call:
        """Report each call as a `CallEnded`."""
        now, ended = env.clock.now, self._ended

        async def watch(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                value = await call(*args, **kwargs)
            except BaseException as error:
                ended(env, now() - began, error)
                raise
            ended(env, now() - began, None)
            return value

        return watch

    def gen(self, call: Call, env: Env) -> Call:
        """Report each generator, from its first item to its end, as a `CallEnded`."""
        from resilient._stream import held_gen

        return held_gen(call, lambda: _Watched(self, env))

    def stream(self, call: Call, env: Env) -> Call:
        """Report each stream, from its first item to its end, as a `CallEnded`."""
        from resilient._stream import held_stream

        return held_stream(call, lambda: _Watched(self, env))

    def _ended(self, env: Env, seconds: float, error: BaseException | None) -> None:
        from resilient.events import CallEnded

        env.emit(CallEnded(self.name, seconds, error))


class _Watched:
    """One generator or stream under watch."""

    def __init__(self, watch: Watch, env: Env) -> None:
        self._watch, self._env, self._began = watch, env, env.clock.now()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._watch._ended(self._env, self._env.clock.now() - self._began, error)

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.__exit__(kind, error, trace)
