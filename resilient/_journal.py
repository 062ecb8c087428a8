"""What the journal of a saga says, as JSON, and how it is read back: names, arguments, results; nothing is guessed.

An entry is written before what it announces: entry 0 has the head of the saga and its first step, each further one the
result of the step before and the next step. So a saga of n steps costs n + 1 commits, the last of which is its end.
Functions are recorded by module and qualified name. Data never chooses code: a name in a journal is looked up only in
modules that this process has imported by itself and vouches for, and nothing is imported, or called, to look. Pure.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any, cast

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from resilient._codec import Form, Json, form_of, real_module, returns
from resilient._undo import RESULT, UNKNOWN, Compensation, Undo
from resilient.errors import StoreError

__all__ = [
    "CallForm",
    "Entry",
    "Head",
    "Step",
    "Undoing",
    "call_form",
    "called_by",
    "found",
    "module_of",
    "name_of",
    "read",
    "result_form",
    "revived",
    "undoing",
    "value_of",
    "vouch_for",
    "write",
]

VERSION = 1
LIMIT = 100_000_000
"""Bytes of one value."""


class Undoing(Struct, omit_defaults=True):
    """How a step is undone: a function's name and its arguments, encoded by its own annotations."""

    function: str
    args: Raw = Raw(b"[]")
    kwargs: Raw = Raw(b"{}")
    # Which arguments stand for the step's value (indexes and names), and the function that says of what type it is.
    results: list[int | str] = []
    of: str = ""


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
    # Somebody said that it is to go on although it was stuck; the number of the attempt from which to count anew.
    again: int = 0
    at: float = 0.0


_decode = msgspec.json.Decoder(Entry).decode
write: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def read(data: bytes) -> Entry:
    """An entry; `StoreError` for anything that is none of ours."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"an entry of the journal cannot be read: {error}") from None


_vouched: set[str] = set()
_recorded: dict[str, Any] = {}
_names: dict[Any, str] = {}


def vouch_for(module: str) -> None:
    """Allow journals to name functions of this module, and of those inside it if it is a package."""
    _vouched.add(module)


def module_of(function: Any) -> str:
    """The module under which other processes find a function: that of `python -m shop`, or of `python shop.py`, is
    `shop` and not `__main__`.
    """
    return real_module(str(getattr(function, "__module__", None)))


def name_of(function: Any, what: str) -> str:
    """The name under which `function` is found again; `TypeError` if it is not, since then it cannot be called."""
    known = _names.get(function)
    if known is not None and _recorded.get(known) is function:
        return known
    name = f"{module_of(function)}:{getattr(function, '__qualname__', None)}"
    if _look(f"{getattr(function, '__module__', None)}:{name.partition(':')[2]}") is not function:
        raise TypeError(
            f"{what} {function!r} cannot be recorded: only functions at the top of a module, or static methods of its "
            "classes, are found again by name in another process"
        )
    _recorded[name] = function
    _names[function] = name
    return name


def found(name: str) -> Any:
    """The function that a journal names. `LookupError` where there is none here, or nobody vouches for it."""
    function = _recorded.get(name)
    if function is not None:
        return function
    module = name.partition(":")[0]
    if not any(module == one or module.startswith(f"{one}.") for one in _vouched):
        raise LookupError(
            f"the journal names {name}, and this process does not vouch for its module: "
            f"resilient.sagas.vouch({module.partition('.')[0]!r}), or --module, if it is yours"
        )
    function = _look(name)
    if not callable(function) or isinstance(function, type):
        raise LookupError(f"there is no function {name} here: its module is not imported, or has it no more")
    if f"{module_of(function)}:{getattr(function, '__qualname__', None)}" != name:
        raise LookupError(f"{name} is a function of another module, which the journal must name")
    return function


def _look(name: str) -> Any:
    """What stands at `module:qualname`, in modules that are imported. No code runs: neither imports nor properties."""
    module, _, qualname = name.partition(":")
    place: Any = sys.modules.get(module)
    if place is None and module == real_module("__main__"):
        place = sys.modules["__main__"]
    for part in qualname.split("."):
        try:
            place = vars(place)[part]
        except (TypeError, KeyError):
            return None
    return getattr(cast(Any, place), "__func__", None) if type(place) is staticmethod else place


class CallForm:
    """How the arguments of one function are written and come back, by the annotations of its parameters."""

    __slots__ = ("_decoders", "_fitting", "_many", "_names", "_rest", "_same", "_signature", "name", "takes_result")

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
            hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
        except (NameError, TypeError, AttributeError):
            hints = {}
        json = Json(limit=LIMIT)
        # Looked up for every step, so found out once.
        self.takes_result = "result" in self._signature.parameters
        self._names: list[str] = []
        self._many: str | None = None
        self._decoders: dict[str, Any] = {}
        self._rest = json.form(Any)
        # Ways to call it that fit: how many by position, and the names of the others.
        self._fitting: set[tuple[int | str, ...]] = set()
        # What comes back from JSON as it went, by parameter.
        self._same: dict[str, tuple[type, ...]] = {}
        for parameter in self._signature.parameters.values():
            try:
                form = json.form(hints.get(parameter.name, Any))
            except TypeError:
                raise TypeError(
                    f"{name} takes {parameter.name}: {hints[parameter.name]!r}, which cannot be recorded: use a "
                    "dataclass, a msgspec struct, a pydantic model, or plain data"
                ) from None
            if parameter.kind is parameter.VAR_KEYWORD:
                self._rest = form
            else:
                self._decoders[parameter.name] = form
                hint = hints.get(parameter.name, Any)
                self._same[parameter.name] = (str, bool) if hint is Any else (hint,) if hint in (str, bool) else ()
            if parameter.kind is parameter.VAR_POSITIONAL:
                self._many = parameter.name
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                self._names.append(parameter.name)

    def write(self, args: tuple[Any, ...], kwargs: dict[str, Any], **more: Any) -> tuple[Raw, Raw]:
        """Arguments as JSON. `TypeError` for what would not come back as it went, or does not fit with `more`."""
        self._fits((len(args), *kwargs, *more), args, {**kwargs, **more})
        parts = [self._one(self._positional(index), value) for index, value in enumerate(args)]
        named = b"{}"
        if kwargs:
            named = write({key: Raw(self._one(key, value)) for key, value in kwargs.items()})
        return Raw(b"[" + b",".join(parts) + b"]"), Raw(named)

    def again(self, args: tuple[Any, ...], kwargs: dict[str, Any], written: tuple[Raw, Raw]) -> Any:
        """What `read` makes of what `write` made of these arguments; without a look where there is no doubt."""
        same = self._same
        for index, value in enumerate(args):
            if type(value) not in same.get(self._positional(index), ()):
                return self.read(*written)
        for name, value in kwargs.items():
            if type(value) not in same.get(name, ()):
                return self.read(*written)
        return args, kwargs

    def _fits(self, shape: tuple[int | str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if shape in self._fitting:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        if len(self._fitting) < 64:
            self._fitting.add(shape)

    def alike(self, one: Raw, other: Raw) -> bool:
        """Whether two texts of arguments say the same call: the way they are passed, and defaults, do not count."""
        first, second = msgspec.json.decode(one), msgspec.json.decode(other)
        if first == second:
            return True
        try:
            return self._bound(one) == self._bound(other)
        except (StoreError, msgspec.MsgspecError):
            return False

    def _bound(self, data: Raw) -> dict[str, Any]:
        args, kwargs = self.read(*msgspec.json.decode(data, type=tuple[Raw, Raw]))
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def read(
        self, args: Raw, kwargs: Raw, results: list[int | str] | tuple[()] = (), value: Any = None
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments again, with `value` at the places of `results`. `StoreError` for what does not fit."""
        try:
            positional = msgspec.json.decode(args, type=list[Raw])
            named = msgspec.json.decode(kwargs, type=dict[str, Raw])
            made = [
                value if index in results else self._form(self._positional(index))[1](data)
                for index, data in enumerate(positional)
            ]
            made_named = {key: self._form(key)[1](data) for key, data in named.items() if key not in results}
            made_named |= {place: value for place in results if isinstance(place, str)}
            self._signature.bind(*made, **made_named)
        except Exception as error:
            raise StoreError(f"the journal has arguments that do not fit {self.name}: {error}") from None
        return made, made_named

    def _positional(self, index: int) -> str:
        """The name of the parameter that takes the argument at `index`."""
        if index < len(self._names):
            return self._names[index]
        if self._many is None:
            raise TypeError(f"{self.name} takes fewer arguments")
        return self._many

    def _form(self, parameter: str) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
        form: tuple[Callable[[Any], bytes], Callable[[bytes], Any]] = self._decoders.get(parameter, self._rest)
        return form

    def _one(self, parameter: str, value: Any) -> bytes:
        if value is RESULT or value is UNKNOWN:
            return b"null"
        try:
            return self._form(parameter)[0](value)
        except Exception as error:
            raise TypeError(
                f"{self.name}: the argument {parameter} ({type(value).__qualname__}) cannot be recorded: {error}"
            ) from None


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
            made = form_of(Json(limit=LIMIT), function, ())
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        form = _results[function] = made if made is not None else Form(Json(), Any, ())
    return form


def called_by(undo: Undo) -> Any:
    """The function that undoes a step."""
    given = undo.compensate
    return given.function if type(given) is Compensation else given


def undoing(undo: Undo, of: Any = None) -> Undoing:
    """What to write of a compensation. `TypeError` for what cannot be recorded. `of` is the step's function."""
    given = undo.compensate
    function = called_by(undo)
    if isinstance(function, type):
        raise TypeError(f"the compensation {function!r} cannot be recorded: only functions can, and it is a class")
    name = name_of(function, "the compensation")
    form = call_form(function, name)
    if type(given) is Compensation:
        args, kwargs = given.args, given.kwargs
        results: list[int | str] = [index for index, one in enumerate(args) if one is RESULT]
        results += [key for key, one in kwargs.items() if one is RESULT]
    else:
        args, kwargs = undo.args, undo.kwargs
        results = ["result"] if form.takes_result else []
        if results:
            written = form.write(args, kwargs, result=UNKNOWN)
            return _written(name, written, results, of)
    return _written(name, form.write(args, kwargs), results, of)


def _written(name: str, written: tuple[Raw, Raw], results: list[int | str], of: Any) -> Undoing:
    if not results or of is None or returns(of) in _PLAIN:
        return Undoing(name, *written, results)
    return Undoing(name, *written, results, name_of(of, "the step"))


def value_of(step: Step, data: Raw | None) -> Any:
    """A step's value for its compensation, from what was written of it; `UNKNOWN` where nothing was."""
    if data is None or step.undo is None or not step.undo.results:
        return UNKNOWN
    form = result_form(found(step.undo.of), step.undo.of) if step.undo.of else _plain
    return form.outcome(bytes(data))[0]


def revived(step: Step, value: Any) -> Undo:
    """The compensation of a journalled step, to be called; `value` is the step's, or `UNKNOWN`."""
    undo = step.undo
    assert undo is not None
    function = found(undo.function)
    args, kwargs = call_form(function, undo.function).read(undo.args, undo.kwargs, undo.results, value)
    return Undo(step.number, step.name, Compensation(function, tuple(args), kwargs), (), {}, value)


_plain = Form(Json(), Any, ())
_PLAIN = (Any, object, None, type(None), str, int, float, bool, list, dict)
