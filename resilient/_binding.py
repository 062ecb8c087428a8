"""From the arguments of a call to its key and its fingerprint, by a function that is compiled once for each signature.

Parameters are found by name, however they were passed, and defaults count like arguments. Everything that can be wrong
with names is an error at decoration; what is wrong with a call is one before anything runs. Pure, but for the functions
of the user. About a microsecond a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias, cast
from uuid import UUID

from msgspec import json

from resilient._codec import fingerprint_encoder

__all__ = [
    "Fingerprint",
    "Hasher",
    "Key",
    "Scope",
    "addresser",
    "binder",
    "check_settings",
    "digest",
    "fingerprint_of",
    "key_text",
]

Key: TypeAlias = "str | tuple[str, ...] | list[str] | Callable[..., Any]"
Fingerprint: TypeAlias = "bool | str | tuple[str, ...] | list[str] | Callable[..., Any]"
Scope: TypeAlias = "str | Callable[..., str] | None"

LONGEST = 255
_EMPTY = inspect.Parameter.empty
_POSITIONAL = inspect.Parameter.POSITIONAL_ONLY
_LIST = inspect.Parameter.VAR_POSITIONAL
_NAMED = inspect.Parameter.KEYWORD_ONLY
_DICT = inspect.Parameter.VAR_KEYWORD


def check_settings(key: Any, fingerprint: Any, scope: Any) -> None:
    """What can be said of these settings without a function."""
    for parameter, value in (("key", key), ("fingerprint", fingerprint)):
        names = (value,) if isinstance(value, str) else value
        if parameter == "fingerprint" and isinstance(value, bool):
            continue
        if callable(names):
            continue
        if not isinstance(names, (tuple, list)):
            raise TypeError(f"{parameter} must be a parameter's name, several names, or a function, not {value!r}")
        listed: list[Any] = list(cast("Iterable[Any]", names))
        if not listed or not all(isinstance(name, str) and name.isidentifier() for name in listed):
            raise ValueError(f"{parameter} must name parameters, not {value!r}")
        if len(set(listed)) < len(listed):
            raise ValueError(f"{parameter} names a parameter twice: {value!r}")
    if scope is not None and not isinstance(scope, str) and not callable(scope):
        raise TypeError(f"scope must be a string or a function of the call's arguments, not {scope!r}")


def key_text(given: Any) -> str:
    """The key as text: from 1 to 255 printable characters. `ValueError` or `TypeError` that says what is wrong."""
    if type(given) is not str:
        given = _text(given)
    if not given:
        raise ValueError("the idempotency key is empty")
    if len(given) > LONGEST:
        raise ValueError(
            f"the idempotency key must have at most {LONGEST} characters, not {len(given)}: {given[:40]!r}…"
        )
    if not given.isprintable():
        raise ValueError(f"the idempotency key must be printable, not {given!r}")
    return cast(str, given)


def _text(given: Any) -> str:
    match given:
        case None:
            raise ValueError("there is no idempotency key: it is None")
        case bool():
            raise TypeError(f"an idempotency key must be text or a number that identifies something, not {given!r}")
        case Enum():
            return _text(given.value)
        case str():
            return str(given)
        case int() | UUID() | Decimal():
            return str(given)
        case datetime() | date():
            return given.isoformat()
        case tuple() | list():
            parts = [key_text(part) for part in cast("list[Any]", given)]
            if not parts:
                raise ValueError("there is no idempotency key: it has no parts")
            # Written so that ("a", "bc") and ("ab", "c") differ.
            return parts[0] if len(parts) == 1 else json.encode(parts).decode()
        case _:
            raise TypeError(
                "an idempotency key must be a str, int, UUID, Decimal, date, Enum or several of them, not "
                f"{type(given).__qualname__}"
            )


def digest(*parts: bytes) -> Any:
    """A hash of `parts` that goes on with more; 160 bits, so that nobody finds two keys with one."""
    made = blake2b(digest_size=20)
    for part in parts:
        made.update(len(part).to_bytes(4, "big"))
        made.update(part)
    return made


def Hasher(function: str) -> Callable[[str, str], tuple[str, str]]:  # noqa: N802
    """From scope and key to the stored key, and to the label that tells people what it stands for."""
    heads: dict[str, tuple[Any, str]] = {}

    def hasher(scope: str, key: str) -> tuple[str, str]:
        head = heads.get(scope)
        if head is None:
            head = _head(function, scope)
            if len(heads) < 1000:
                heads[scope] = head
        made = head[0]()
        made.update(key.encode())
        return made.hexdigest(), f"{head[1]}{json.encode(key).decode()}}}"

    return hasher


def _head(function: str, scope: str) -> tuple[Callable[[], Any], str]:
    """What keys of `function` in `scope` have in common: copies of a hash that goes on, and how the label begins."""
    text = f'{{"function":{json.encode(function).decode()},"scope":{json.encode(scope).decode()},"key":'
    return digest(scope.encode(), function.encode()).copy, text


Bound: TypeAlias = Callable[[Any, Any], "tuple[str, str, str]"]
"""From the arguments of a call, positional and by name: scope, key and fingerprint, all as text."""
Address: TypeAlias = Callable[[Any, Any], "tuple[str, str, str, str]"]
"""From the arguments of a call to the key, the stored key, its label and the fingerprint."""


class _Parts(NamedTuple):
    """What the parameters of a function are to its key and its fingerprint."""

    by_name: list[str]
    rest: list[str]
    # Takes the arguments of a call, and gives those for the key and those for the fingerprint.
    both: Callable[..., Any]


def _parts(target: Callable[..., Any], name: str, key: Key, fingerprint: Fingerprint) -> _Parts:
    # What a partial brings along are arguments like others: they tell calls apart, and may be the key.
    brought: list[Any] = []
    while isinstance(target, partial):
        brought.append(target)
        target = brought[-1].func
    signature = _signature(target)
    by_name: list[str] = [] if callable(key) else [key] if isinstance(key, str) else list(key)
    chosen: list[str] | None = None
    if not callable(fingerprint) and not isinstance(fingerprint, bool):
        chosen = [fingerprint] if isinstance(fingerprint, str) else list(fingerprint)
    if signature is None:
        if by_name or chosen is not None:
            raise TypeError(
                f"{name} does not show its parameters: give key and fingerprint as functions of the arguments"
            )
        both: Callable[..., Any] = lambda *args, **kwargs: ((), (args, kwargs))  # noqa: E731
        rest: list[str] = ["args", "kwargs"]
    else:
        for parameter, names in (("key", by_name), ("fingerprint", chosen or [])):
            for one in names:
                if one not in signature.parameters:
                    there = ", ".join(signature.parameters) or "none"
                    raise TypeError(f"{parameter}={one!r}: {name} has no parameter of that name (it has {there})")
                if parameter == "key" and signature.parameters[one].kind in (_LIST, _DICT):
                    raise TypeError(f"key={one!r}: this parameter of {name} takes any number of arguments")
        rest = _rest(signature, by_name) if chosen is None else chosen
        both = _compiled(signature, name, by_name, rest)
    for one in reversed(brought):
        both = partial(both, *one.args, **one.keywords)
    return _Parts(by_name, rest, both)


def binder(target: Callable[..., Any], name: str, key: Key, fingerprint: Fingerprint, scope: Scope) -> Bound:
    """Compile the way from a call of `target` (called `name` in errors) to its scope, key and fingerprint."""
    return _bound(_parts(target, name, key, fingerprint), name, key, fingerprint, scope)


def addresser(
    target: Callable[..., Any], name: str, key: Key, fingerprint: Fingerprint, scope: Scope, function: str
) -> Address:
    """`binder` and `Hasher` (of `function`) in one."""
    parts = _parts(target, name, key, fingerprint)
    if len(parts.by_name) > 1 or any(map(callable, (key, fingerprint, scope))) or fingerprint is False:
        bound, hasher = _bound(parts, name, key, fingerprint, scope), Hasher(function)

        def address(args: Any, kwargs: Any) -> tuple[str, str, str, str]:
            within, text, print_ = bound(args, kwargs)
            return text, *hasher(within, text), print_

        return address
    # What most functions have: the same, with fewer questions.
    both, encode = parts.both, fingerprint_encoder()
    new_print = blake2b(digest_size=16).copy
    new_key, head = _head(function, "" if scope is None else cast(str, scope))

    def quick(args: Any, kwargs: Any) -> tuple[str, str, str, str]:
        text, values = both(*args, **kwargs) if kwargs else both(*args)
        if type(text) is not str or not 0 < len(text) <= LONGEST or not text.isprintable():
            text = key_text(text)
        hashed = new_print()
        try:
            hashed.update(encode(values))
        except Exception as error:
            raise _unprintable(name, parts.rest, values, encode, error) from None
        made = new_key()
        made.update(text.encode())
        # (Printable text has nothing else that JSON would escape.)
        quoted = json.encode(text).decode() if '"' in text or "\\" in text else f'"{text}"'
        return text, made.hexdigest(), f"{head}{quoted}}}", hashed.hexdigest()

    return quick


def _bound(parts: _Parts, name: str, key: Key, fingerprint: Fingerprint, scope: Scope) -> Bound:
    encode = fingerprint_encoder()
    find_key = key if callable(key) else None
    find_print = fingerprint if callable(fingerprint) else None
    find_scope = scope if callable(scope) else None
    fixed = "" if scope is None or callable(scope) else scope

    def bound(args: Any, kwargs: Any) -> tuple[str, str, str]:
        # The signature is checked first: a call that cannot be made is the caller's TypeError, as without a guard.
        keys, values = parts.both(*args, **kwargs)
        if find_key is not None:
            keys = find_key(*args, **kwargs)
        text = key_text(keys)
        if find_print is not None:
            values = find_print(*args, **kwargs)
        elif fingerprint is False:
            return fixed if find_scope is None else _scope(find_scope(*args, **kwargs)), text, ""
        try:
            data = encode(values)
        except Exception as error:
            raise _unprintable(name, parts.rest, values, encode, error) from None
        print_ = blake2b(data, digest_size=16).hexdigest()
        return fixed if find_scope is None else _scope(find_scope(*args, **kwargs)), text, print_

    return bound


def fingerprint_of(payload: Any) -> str:
    """The fingerprint of a payload that is no call's."""
    try:
        return blake2b(fingerprint_encoder()(payload), digest_size=16).hexdigest()
    except Exception as error:
        raise TypeError(f"payload cannot be part of a fingerprint: {error}") from None


def _scope(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"scope must return a string, not {given!r}")
    return given


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _rest(signature: inspect.Signature, keys: list[str]) -> list[str]:
    """The parameters that tell two calls apart: all but those of the key, and the object that a method is called on."""
    names = list(signature.parameters)
    if names and names[0] in ("self", "cls"):
        del names[0]
    return [name for name in names if name not in keys]


def _compiled(signature: inspect.Signature, name: str, keys: list[str], rest: list[str]) -> Callable[..., Any]:
    """A function with this signature that returns the arguments for `keys` and those for `rest`, each as a tuple.

    But where there is one key, it is that by itself.
    """
    parts: list[str] = []
    defaults: list[Any] = []
    by_name: dict[str, Any] = {}
    before: Any = None
    for parameter in signature.parameters.values():
        if before is _POSITIONAL and parameter.kind is not _POSITIONAL:
            parts.append("/")
        if parameter.kind is _NAMED and before not in (_NAMED, _LIST):
            parts.append("*")
        star = "*" if parameter.kind is _LIST else "**" if parameter.kind is _DICT else ""
        parts.append(f"{star}{parameter.name}" + ("" if parameter.default is _EMPTY else "=None"))
        if parameter.default is not _EMPTY:
            if parameter.kind is _NAMED:
                by_name[parameter.name] = parameter.default
            else:
                defaults.append(parameter.default)
        before = parameter.kind
    if before is _POSITIONAL:
        parts.append("/")
    tuples = ["(" + "".join(f"{one}, " for one in names) + ")" for names in (keys, rest)]
    if len(keys) == 1:
        tuples[0] = keys[0]
    # Names are identifiers (`inspect.Parameter` sees to that), and nothing else goes in: defaults are put in after.
    made = eval(f"lambda {', '.join(parts)}: ({tuples[0]}, {tuples[1]})", {"__builtins__": {}})
    made.__defaults__ = tuple(defaults) or None
    made.__kwdefaults__ = by_name or None
    made.__name__ = made.__qualname__ = name
    return cast("Callable[..., Any]", made)


def _unprintable(
    name: str, rest: list[str], values: Any, encode: Callable[[Any], bytes], error: Exception
) -> TypeError:
    """Say which argument it is that cannot be part of a fingerprint, and what to do."""
    culprit = "the fingerprint"
    if isinstance(values, tuple):
        for label, value in zip(rest, cast("Iterable[Any]", values), strict=False):
            try:
                encode(value)
            except Exception:
                culprit = f"the argument {label} ({type(value).__qualname__})"
                break
    return TypeError(
        f"{name}: {culprit} cannot be part of a fingerprint: {error}. Name the parameters that tell two payloads apart "
        '(fingerprint=("amount",)), give a function of the arguments, or fingerprint=False'
    )
