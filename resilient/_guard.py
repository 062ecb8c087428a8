"""Decoration: find out what a function is, compile the policies around it, and hand back something just like it.

Plain functions become native closures, which bind as methods by themselves. Everything else callable (builtins,
partials, bound methods, instances) is proxied by a `wrapt.FunctionWrapper` type of its own, whose `__call__` is the
compiled chain: a stock one adds about 490 ns to each call, this one about 28 (measured in docs/decisions).
All cost is paid at decoration, and so are all errors that can be seen there.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from types import AsyncGeneratorType, CoroutineType, FunctionType, GeneratorType, MethodType
from typing import TYPE_CHECKING, Any, cast

from resilient._order import contradictions
from resilient._types import Call, F, Kind
from resilient.errors import OrderWarning

if TYPE_CHECKING:
    from resilient.policy import Env

__all__ = ["Guarded", "decorate", "faces", "flags", "guarded", "kind_of"]

_KIND_OF_RESULT: dict[type, Kind] = {CoroutineType: "coro", GeneratorType: "gen", AsyncGeneratorType: "stream"}
_WORDS: dict[Kind, str] = {
    "sync": "a plain function",
    "coro": "a coroutine function",
    "gen": "a generator function",
    "stream": "an async generator function",
}


class Guarded:
    """What `decorate` leaves on its result as `__resilient__`: enough to look inside, and to compile anew."""

    __slots__ = ("env", "policies", "target", "wrapper")

    def __init__(self, policies: tuple[Any, ...], target: Call, env: Env) -> None:
        self.policies, self.target, self.env = policies, target, env
        self.wrapper: Any = None


def guarded(fn: object) -> Guarded | None:
    """The marker of `fn`, if `fn` itself is ours: `functools.wraps` of others copies markers outwards."""
    # Itself first: the proxy of a bound method shows that method's `__func__` as its own.
    for face in (fn, getattr(fn, "__func__", None)):
        marker = getattr(face, "__resilient__", None)
        if isinstance(marker, Guarded) and marker.wrapper is face:
            return marker
    return None


def decorate(policies: Sequence[Any], fn: F, env: Env | None = None, *, stacklevel: int = 3) -> F:
    """Guard `fn` with `policies`, outermost first. What guards it already becomes the inside of one chain."""
    if isinstance(fn, (classmethod, staticmethod)):
        again: Any = classmethod if isinstance(fn, classmethod) else staticmethod
        method = cast(Any, fn).__func__
        return cast(F, again(decorate(policies, method, env, stacklevel=stacklevel + 1)))
    if not callable(fn) or isinstance(fn, type):
        raise TypeError(
            f"cannot guard {fn!r}: decorate functions, methods or callable objects (of a class: its methods)"
        )
    # By its type: a proxy of a bound method claims to be one, and is ours to look into.
    marker = None if type(fn) is MethodType else guarded(fn)
    inside: tuple[Any, ...] = ()
    target: Call = fn
    if marker is not None:
        inside, target, env = marker.policies, marker.target, env or marker.env
    if env is None:
        from resilient.policy import SYSTEM

        env = SYSTEM
    for reason in contradictions(policies, inside):
        warnings.warn(f"{_name(target)}: {reason}", OrderWarning, stacklevel=stacklevel)
    made = Guarded((*policies, *inside), target, env)
    for policy in policies:
        if policy.name is None:
            policy.name = _name(target)
    run = _run(made)
    made.wrapper = _finish(target, run, made)
    return cast(F, made.wrapper)


def _name(target: Call) -> str:
    """The qualified name of a callable, as a person would call it."""
    while isinstance(target, functools.partial):
        target = target.func
    name = getattr(target, "__qualname__", None)
    # There are objects that have every attribute.
    return name if name and isinstance(name, str) else type(target).__qualname__


# -- what it is ------------------------------------------------------------------------------------------------------


def kind_of(target: Call) -> Kind:
    """What comes of calling it, as far as its code, its marks and its annotation tell."""
    while isinstance(target, functools.partial):
        target = target.func
    if isinstance(target, MethodType):
        target = target.__func__
    # Not `target.__dict__`, which would come into being by the question.
    if type(target) is not FunctionType or hasattr(target, "_is_coroutine") or hasattr(target, "_is_coroutine_mark"):
        return _kind_by_inspection(target)
    return _kind_by_flags(target.__code__.co_flags) or _kind_by_annotation(target)


def _kind_by_flags(bits: int) -> Kind | None:
    return "coro" if bits & 0x180 else "stream" if bits & 0x200 else "gen" if bits & 0x20 else None


def _kind_by_annotation(target: FunctionType) -> Kind:
    # A plain function that promises an awaitable is awaited: its result, not its making, is what can fail.
    promised = target.__annotations__.get("return")
    text = promised if isinstance(promised, str) else str(promised)
    return "coro" if text.partition("[")[0].rpartition(".")[2] in ("Awaitable", "Coroutine") else "sync"


def _kind_by_inspection(target: Any) -> Kind:
    # Marks are known by identity and flags by type: a mock has every attribute that it is asked for.
    for face in faces(target):
        kind = _kind_by_flags(flags(face))
        if kind is not None:
            return kind
        for module, mark in (("asyncio.coroutines", "_is_coroutine"), ("inspect", "_is_coroutine_mark")):
            known = getattr(sys.modules.get(module), mark, None)
            if known is not None and getattr(face, mark, None) is known:
                return "coro"
    return _kind_by_annotation(target) if type(target) is FunctionType else "sync"


def faces(function: Any) -> tuple[Any, Any]:
    """What runs when `function` is called, whatever it is: itself without partials, and the `__call__` of its class."""
    while functools.partial in type(function).__mro__:
        function = function.func
    called = (vars(base)["__call__"] for base in type(function).__mro__ if "__call__" in vars(base))
    return getattr(function, "__func__", function), next(called, None)


def flags(function: Any) -> int:
    """What the code of a function says that it is; 0 for what has no code (or, like a mock, anything for code)."""
    bits = getattr(getattr(function, "__code__", None), "co_flags", 0)
    return bits if type(bits) is int else 0


def _doubtful(target: Any) -> bool:
    """Whether a callable that looks plain may hand out coroutines or generators of somebody else's making."""
    if getattr(target, "__name__", None) == "<lambda>":
        return True
    inner = getattr(target, "__wrapped__", None)
    return callable(inner) and kind_of(inner) != "sync"


# -- what guards it --------------------------------------------------------------------------------------------------


def _run(made: Guarded) -> Call:
    kind = kind_of(made.target)
    if kind != "sync":
        return _compile(made, kind, made.target)[-1]
    if _doubtful(made.target):
        return _adaptive(made)
    return _checked(made)


def _compile(made: Guarded, kind: Kind, call: Call) -> list[Call]:
    """The shells around `call`, innermost first."""
    chain: tuple[Any, ...] = made.policies
    if any(getattr(sink, "wants_calls", False) is True for sink in made.env.sinks):
        from resilient.policy import Watch

        chain = (Watch(_name(made.target)), *chain)
    shells: list[Call] = []
    # A policy that must know the function itself, and not only the call inwards, gives the shells for it.
    fitted: list[Any] = [policy.fit(made.target) if hasattr(policy, "fit") else policy for policy in chain]
    for one in fitted[:-1]:
        if hasattr(one, "mark") and hasattr(one, kind):
            call = one.mark(call, kind)
            shells.append(call)
    for policy, maker in zip(reversed(chain), reversed(fitted), strict=True):
        shell: Callable[[Call, Env], Call] | None = getattr(maker, kind, None)
        if shell is None:
            raise TypeError(
                f"{type(policy).__name__} cannot guard {_name(made.target)}: it does not serve {_WORDS[kind]}"
            )
        call = shell(_named(call, made.target), made.env)
        shells.append(call)
    return shells


def _named(call: Call, target: Call) -> Call:
    """`call` under the name of `target`: listeners and hooks of others are shown what they believe to be that."""
    if type(call) is FunctionType and call is not target:
        call.__qualname__ = name = _name(target)
        # The string that is there already, if there is one: a new one for each shell would be most of its weight.
        own = getattr(target, "__name__", None)
        call.__name__ = own if isinstance(own, str) else name
    return call


def _checked(made: Guarded) -> Call:
    """The chain of a plain function, which proves by its first result that it is one.

    A plain function that returns a coroutine would be guarded only while it makes it, which guards nothing. Once the
    first result has been seen, the check takes itself out of the innermost shell and costs no more.
    """
    target = made.target

    def first(*args: Any, **kwargs: Any) -> Any:
        value = target(*args, **kwargs)
        if type(value) is CoroutineType:
            value.close()
            raise TypeError(
                f"{_name(target)} is a plain function that returns a coroutine, so its policies cannot see how it "
                "ends: make it `async def`, or annotate its return type as Awaitable"
            )
        for cell in cells:
            cell.cell_contents = target
        return value

    shells = _compile(made, "sync", first)
    # A shell may be the call itself, where a policy has nothing to do.
    closure: tuple[Any, ...] = () if shells[0] is first else getattr(shells[0], "__closure__", None) or ()
    cells = [cell for cell in closure if cell.cell_contents is first]
    return shells[-1]


class _Turned(BaseException):
    """A callable that looked plain returned a coroutine or a generator. Policies forget it, like all of its kind."""

    def __init__(self, kind: Kind, value: Any) -> None:
        self.kind: Kind = kind
        self.value = value


def _adaptive(made: Guarded) -> Call:
    """The chain of a callable that may be anything: what it first returns decides for ever."""
    target = made.target
    settled: Call | None = None

    def watched(*args: Any, **kwargs: Any) -> Any:
        value = target(*args, **kwargs)
        kind = _KIND_OF_RESULT.get(cast(Any, type(value)))
        if kind is not None:
            raise _Turned(kind, value)
        return value

    plain = _compile(made, "sync", watched)[-1]

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal settled
        if settled is not None:
            return settled(*args, **kwargs)
        try:
            return plain(*args, **kwargs)
        except _Turned as turned:
            kind = turned.kind
            made_already = [turned.value]
        try:
            settled = _compile(made, kind, target)[-1]
        except BaseException:
            if kind == "coro":
                made_already.pop().close()
            raise

        def again(*args: Any, **kwargs: Any) -> Any:
            return made_already.pop() if made_already else target(*args, **kwargs)

        return _compile(made, kind, again)[-1](*args, **kwargs)

    return run


# -- what comes back -------------------------------------------------------------------------------------------------


def _finish(target: Any, run: Call, made: Guarded) -> Any:
    if type(target) is FunctionType:
        functools.update_wrapper(run, target)
        run.__resilient__ = made  # type: ignore[attr-defined]
        return run
    return _proxy(target, run, made)


def _proxy(target: Any, run: Call, made: Guarded) -> Any:
    import wrapt

    binds = not isinstance(target, MethodType) and any("__get__" in vars(base) for base in type(target).__mro__)

    def bind(self: Any, instance: Any, owner: type | None = None) -> Any:
        return MethodType(run, instance) if binds and instance is not None else self

    def reduce(self: Any, protocol: int = 2) -> str:
        # By name, as functions are: whoever unpickles it imports the guarded callable.
        name = getattr(target, "__qualname__", None)
        if not isinstance(name, str):
            raise TypeError(f"cannot pickle {target!r}: it has no name to import it by")
        return name

    face = {
        "__call__": staticmethod(run),
        "__get__": bind,
        "__reduce__": reduce,
        "__reduce_ex__": reduce,
        "__resilient__": made,
    }
    return type("Guarded", (wrapt.FunctionWrapper,), face)(target, run)
