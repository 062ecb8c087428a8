"""What the journal of a saga says, as JSON, and how it is read back: names, arguments, results; nothing is guessed.

An entry is written before what it announces: entry 0 has the head of the saga and its first step, each further one the
result of the step before and the next step. So a saga of n steps costs n + 1 commits, the last of which is its end.
Functions are recorded by module and qualified name, and must be found under it again. Pure; data is never executed:
what a journal names is looked up among importable functions, and called only if the saga's own rules say so.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from resilient._codec import Form, Json, form_of
from resilient._undo import RESULT, UNKNOWN, Compensation, Undo, takes_result
from resilient.errors import SagaError, StoreError

__all__ = ["CallForm", "Entry", "Head", "Step", "call_form", "found", "name_of", "read", "result_form", "write"]

VERSION = 1


class Undoing(Struct, omit_defaults=True):
    """How a step is undone: a function's name and its arguments, encoded by its own annotations."""

    function: str
    args: Raw = Raw(b"[]")
    kwargs: Raw = Raw(b"{}")
    # Which arguments stand for the step's value: indexes and names.
    results: list[int | str] = []


class Step(Struct, omit_defaults=True):
    """A step that is about to run. `group` joins those that run beside each other."""

    number: int
    name: str
    key: str
    undo: Undoing | None = None
    group: int = 0
    late: bool = False
    forward: bool = False


class Head(Struct, omit_defaults=True):
    """What saga it is. `input` is there for those whose body can be run again."""

    v: int
    saga: str
    version: int
    id: str
    input: Raw | UnsetType = UNSET


class Entry(Struct, omit_defaults=True):
    """One commit: results of steps by number, steps that begin, or what happens to the saga."""

    head: Head | UnsetType = UNSET
    done: dict[int, Raw] = {}
    steps: list[Step] = []
    failed: str | None = None
    pivot: bool = False
    undone: list[int] = []
    stuck: list[str] = []
    at: float = 0.0


_decode = msgspec.json.Decoder(Entry).decode
write: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def read(data: bytes) -> Entry:
    """An entry; `StoreError` for anything that is none of ours."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"an entry of the journal cannot be read: {error}") from None


def name_of(function: Any, what: str) -> str:
    """The name under which `function` is found again; `TypeError` if it is not, since then it cannot be called."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    name = f"{module}:{qualname}"
    if not isinstance(module, str) or not isinstance(qualname, str) or _look(name) is not function:
        raise TypeError(
            f"{what} {function!r} cannot be recorded: only functions at the top of a module, or static methods of its "
            "classes, are found again by name in another process"
        )
    return name


def found(name: str) -> Any:
    """The function that a journal names. `SagaError`'s cause where there is none here."""
    function = _look(name)
    if not callable(function):
        raise LookupError(f"there is no function {name} here")
    return function


def _look(name: str) -> Any:
    module, _, qualname = name.partition(":")
    try:
        place: Any = sys.modules[module] if module in sys.modules else importlib.import_module(module)
        for part in qualname.split("."):
            place = getattr(place, part)
    except (ImportError, AttributeError, ValueError):
        return None
    return place


class CallForm:
    """How the arguments of one function are written and come back, by the annotations of its parameters."""

    __slots__ = ("_decoders", "_rest", "_signature", "name")

    def __init__(self, function: Any, name: str, skip: int = 0) -> None:
        self.name = name
        try:
            self._signature = inspect.signature(function)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} does not show its parameters, so its arguments cannot be recorded") from error
        if skip:
            parameters = list(self._signature.parameters.values())[skip:]
            self._signature = self._signature.replace(parameters=parameters)
        try:
            hints = typing.get_type_hints(inspect.unwrap(function))
        except (NameError, TypeError, AttributeError):
            hints = {}
        json = Json(limit=100_000_000)
        self._decoders = {parameter: json.form(hints.get(parameter, Any)) for parameter in self._signature.parameters}

    def write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Raw, Raw]:
        """Arguments as JSON. `TypeError` for what would not come back as it went."""
        parts: list[bytes] = []
        for index, value in enumerate(args):
            parts.append(self._one(self._positional(index), value))
        named = {key: Raw(self._one(key, value)) for key, value in kwargs.items()}
        return Raw(b"[" + b",".join(parts) + b"]"), Raw(write(named))

    def read(self, args: Raw, kwargs: Raw) -> tuple[list[Any], dict[str, Any]]:
        """The arguments again."""
        positional = msgspec.json.decode(args, type=list[Raw])
        named = msgspec.json.decode(kwargs, type=dict[str, Raw])
        return (
            [self._back(self._positional(index), value) for index, value in enumerate(positional)],
            {key: self._back(key, value) for key, value in named.items()},
        )

    def _positional(self, index: int) -> str:
        """The name of the parameter that takes the argument at `index`."""
        for place, parameter in enumerate(self._signature.parameters.values()):
            if place == index or parameter.kind is parameter.VAR_POSITIONAL:
                return parameter.name
        raise TypeError(f"{self.name} takes fewer arguments")

    def _form(self, parameter: str) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
        form = self._decoders.get(parameter)
        return form if form is not None else Json().form(Any)

    def _one(self, parameter: str, value: Any) -> bytes:
        if value is RESULT or value is UNKNOWN:
            return b"null"
        try:
            return self._form(parameter)[0](value)
        except Exception as error:
            raise TypeError(
                f"{self.name}: the argument {parameter} ({type(value).__qualname__}) cannot be recorded: {error}"
            ) from None

    def _back(self, parameter: str, data: Raw) -> Any:
        return self._form(parameter)[1](data)


_calls: dict[Any, CallForm] = {}
_results: dict[Any, Form] = {}


def call_form(function: Any, name: str) -> CallForm:
    """The form of a function's arguments, made once."""
    form = _calls.get(function)
    if form is None:
        form = _calls[function] = CallForm(function, name)
    return form


def result_form(function: Any, name: str) -> Form:
    """The form of a function's result, made once."""
    form = _results.get(function)
    if form is None:
        try:
            made = form_of(Json(limit=100_000_000), function, ())
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        form = _results[function] = made if made is not None else Form(Json(), Any, ())
    return form


def undoing(undo: Undo) -> Undoing:
    """What to write of a compensation. `TypeError` for what cannot be recorded."""
    given = undo.compensate
    function = given.function if type(given) is Compensation else given
    name = name_of(function, "the compensation")
    form = call_form(function, name)
    if type(given) is Compensation:
        args, kwargs = given.args, given.kwargs
        results: list[int | str] = [index for index, one in enumerate(args) if one is RESULT]
        results += [key for key, one in kwargs.items() if one is RESULT]
    else:
        args, kwargs = undo.args, undo.kwargs
        results = ["result"] if takes_result(given) else []
    written = form.write(args, kwargs)
    return Undoing(name, *written, results)


def revived(step: Step, value: Any) -> Undo:
    """The compensation of a journalled step, to be called: `value` is the step's, or `UNKNOWN`."""
    assert step.undo is not None
    function = found(step.undo.function)
    args, kwargs = call_form(function, step.undo.function).read(step.undo.args, step.undo.kwargs)
    for place in step.undo.results:
        if isinstance(place, int):
            args[place] = value
        else:
            kwargs[place] = value
    return Undo(step.number, step.name, Compensation(function, tuple(args), kwargs), (), {}, value)


def incompatible(saga: str, id: str, text: str) -> SagaError:
    """A journal that this code must not touch."""
    return SagaError(text, saga, id)
