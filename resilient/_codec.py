"""What is kept of a call: its result, or an error that is worth remembering, as JSON in an envelope with a version.

Results are encoded and decoded by the return annotation (msgspec: dataclasses, structs, enums, datetimes, Decimals,
UUIDs, bytes; pydantic models where pydantic is). A result that would come back as something else is refused when it is
made, not when it is replayed. Data from a store is read as data: nothing in it is imported, called or unpickled.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import sys
import typing
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from types import GetSetDescriptorType, MemberDescriptorType, SimpleNamespace
from typing import Any, Protocol, cast

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from resilient._guard import faces
from resilient.errors import StoreError
from resilient.policy import whole

__all__ = ["Codec", "Form", "Json", "fingerprint_encoder", "form_of", "noted", "real_module", "returns"]

VERSION = 1


class Codec(Protocol):
    """How results become bytes and come back. The default is `Json`; write one to encrypt or to shrink."""

    def encode(self, value: Any, annotation: Any, /) -> bytes:
        """`value` as bytes, or an error that says why not. `annotation` is what the function says that it returns."""
        ...

    def decode(self, data: bytes, annotation: Any, /) -> Any:
        """What `encode` was given."""
        ...


class Json:
    """Results as JSON, of at most `limit` bytes (a megabyte).

    The return annotation says what comes back: an `-> Receipt` is a `Receipt` again. Where it leaves that open (none,
    `Any`, `dict`) only what JSON knows by itself will do: a tuple that would come back as a list is an error.
    """

    def __init__(self, *, limit: int = 1_000_000) -> None:
        self.limit = whole("limit", limit)

    def form(self, annotation: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
        """Encoder and decoder for what a function returns. `TypeError` where the annotation names what cannot be."""
        exact = _closed(annotation)
        encode = msgspec.json.Encoder(enc_hook=_enc_hook).encode
        decode = msgspec.json.Decoder(annotation, dec_hook=_dec_hook).decode
        limit = self.limit
        plain = _plain(annotation)

        def encoded(value: Any) -> bytes:
            data = encode(value)
            if len(data) > limit:
                raise ValueError(f"it takes {len(data):,} bytes, and the limit is {limit:,} (codec=Json(limit=…))")
            if type(value) is plain:
                return data
            again = decode(data)
            if again != value and not (exact and _alike(again, value)):
                raise TypeError(f"a {type(value).__qualname__} would come back as something else: annotate its type")
            return data

        return encoded, decode

    def encode(self, value: Any, annotation: Any = Any, /) -> bytes:
        """`value` as JSON."""
        return self.form(annotation)[0](value)

    def decode(self, data: bytes, annotation: Any = Any, /) -> Any:
        """What the JSON text `data` says."""
        return self.form(annotation)[1](data)

    def __repr__(self) -> str:
        return f"Json(limit={self.limit})"


def _plain(annotation: Any) -> type | None:
    """The type of which every value comes back as it went, beyond doubt, where `annotation` is that type."""
    return cast("type", annotation) if annotation in (str, int, bool) else None


def _closed(annotation: Any) -> bool:
    """Whether `annotation` says all about the type, so that what is decoded by it is what was encoded."""
    try:
        info = msgspec.inspect.type_info(annotation)
    except Exception as error:
        raise TypeError(f"it returns {annotation!r}, which cannot be kept: {error}") from None
    seen: set[Any] = set()

    def closed(node: Any) -> bool:
        if isinstance(node, msgspec.inspect.CustomType):
            if node.cls is object:
                return False
            if not _is_model(node.cls):
                raise TypeError(
                    f"it returns {node.cls.__qualname__}, which cannot be kept: use a dataclass, a msgspec struct, a "
                    "pydantic model, plain data, or a codec of your own"
                )
            return True
        if isinstance(node, msgspec.inspect.AnyType):
            return False
        cls = getattr(node, "cls", None)
        if cls is not None:
            if cls in seen:
                return True
            seen.add(cls)
        parts: list[Any] = []
        for field in ("item_type", "item_types", "types", "key_type", "value_type", "fields"):
            part = getattr(node, field, ())
            parts += part if isinstance(part, tuple) else (part,)
        return all([closed(getattr(part, "type", part)) for part in parts])  # noqa: C419 - each one is to be looked at

    return closed(info)


def _alike(one: Any, other: Any) -> bool:
    """Whether two values say the same, as far as their classes can tell: those without equality are compared by fields.

    What has neither is taken to be the same.
    """
    cls: Any = one.__class__
    if one == other or (one != one and other != other):
        return True
    if cls is not other.__class__:
        return False
    if issubclass(cls, dict):
        return len(one) == len(other) and all(key in other and _alike(one[key], other[key]) for key in one)
    if issubclass(cls, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if issubclass(cls, (set, frozenset)):
        return len(one) == len(other) and all(_by_identity(type(item)) for item in one ^ other)
    if _is_model(cls):
        # Private attributes are not what is kept.
        return _alike(_shown(one), _shown(other))
    names: Any = getattr(cls, "__struct_fields__", None)
    if names is None:
        fields: Any = getattr(cls, "__dataclass_fields__", {}).values() or getattr(cls, "__attrs_attrs__", ())
        names = [field.name for field in fields if getattr(field, "compare", True)]
    if names:
        return all(_alike(getattr(one, name, None), getattr(other, name, None)) for name in names)
    return _by_identity(cls)


def _by_identity(cls: Any) -> bool:
    return cls.__eq__ is object.__eq__


def _shown(model: Any) -> Any:
    names = list(cast("dict[str, Any]", getattr(model.__class__, "model_fields", None) or vars(model)))
    return [getattr(model, name, None) for name in names], getattr(model, "model_extra", None)


def _is_model(cls: Any) -> bool:
    """Whether it is a class of pydantic models: known by its face, so that pydantic is not imported."""
    return callable(getattr(cls, "model_validate", None)) and callable(getattr(cls, "model_dump", None))


def _enc_hook(value: Any) -> Any:
    if _is_model(type(value)):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__qualname__} cannot be written as JSON")


def _dec_hook(cls: Any, value: Any) -> Any:
    return value if cls is object else cls.model_validate(value)


def fingerprint_encoder() -> Callable[[Any], bytes]:
    """One text for equal arguments, whatever the order of dictionaries and sets."""

    def hook(value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(cast("os.PathLike[str]", value))
        return _enc_hook(value)

    return msgspec.json.Encoder(order="deterministic", enc_hook=hook).encode


def _annotations(function: Any) -> dict[str, Any]:
    found = getattr(function, "__annotations__", None)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def returns(target: Any) -> Any:
    """What `target` says that it returns, awaited if it is awaitable; `Any` if it does not say."""
    function = next((face for face in faces(target) if "return" in _annotations(face)), None)
    if function is None:
        return Any
    # This one alone: the names of others may be there for type checkers only.
    alone = SimpleNamespace(
        __annotations__={"return": _annotations(function)["return"]},
        __type_params__=getattr(function, "__type_params__", ()),
    )
    known = getattr(unwrap(function), "__globals__", {})
    try:
        annotation = typing.get_type_hints(alone, known, include_extras=True)["return"]
    except (NameError, AttributeError):
        return None  # a name that is not there yet: asked again at the first call
    if getattr(typing.get_origin(annotation), "__name__", "") in ("Awaitable", "Coroutine"):
        annotation = typing.get_args(annotation)[-1]
    return annotation


# -- the envelope ----------------------------------------------------------------------------------------------------


class _Error(Struct, omit_defaults=True):
    """An error that is remembered: the names of its class and of the class that said so, and what it was made of."""

    type: str
    base: str
    message: str
    args: list[Any] | None = None
    state: dict[str, Any] = {}
    # Its text is all that can be made again.
    spoken: bool = False


class _Envelope(Struct):
    v: int
    ok: Raw | UnsetType = UNSET
    raw: str | UnsetType = UNSET
    error: _Error | UnsetType = UNSET


_open = msgspec.json.Decoder(_Envelope).decode
_write = msgspec.json.encode


class Form:
    """How the results of one function are kept and come back."""

    __slots__ = ("_decode", "_json", "_remember", "keep")

    keep: Callable[[Any], bytes]
    """A value in an envelope, as bytes; or whatever its encoding raises."""

    def __init__(self, codec: Any, annotation: Any, remember: tuple[type[Exception], ...]) -> None:
        self._remember = remember
        self._json = isinstance(codec, Json)
        self._decode: Callable[[bytes], Any]
        if isinstance(codec, Json):
            encode, self._decode = codec.form(annotation)
            plain = _plain(annotation) if type(codec) is Json else None
            write, limit = msgspec.json.encode, codec.limit

            def keep(value: Any) -> bytes:
                # What comes back as it went needs no second look, and is most of what is kept.
                if type(value) is plain:
                    data = write(value)
                    if len(data) <= limit:
                        return b'{"v":1,"ok":' + data + b"}"
                return b'{"v":1,"ok":%b}' % encode(value)

            self.keep = keep
        else:
            self._decode = lambda data: codec.decode(data, annotation)
            self.keep = lambda value: b'{"v":1,"raw":"%b"}' % base64.b64encode(codec.encode(value, annotation))

    def keep_error(self, error: Exception) -> bytes:
        """`error`, of a class that is remembered, in an envelope. What JSON cannot write of it becomes text.

        It is revived once, to see whether it comes back: else its text is kept, which does.
        """
        base = next(cls for cls in self._remember if isinstance(error, cls))
        try:
            # (A lone surrogate, as of a file's name, cannot be written.)
            text = str(error).encode(errors="backslashreplace").decode()
        except Exception:
            text = type(error).__qualname__
        args: list[Any] | None = list(error.args)
        if not _comes_back(args):
            args = None
        state = {name: value for name, value in _state(error).items() if _comes_back(value)}
        kept = _Error(_named(type(error)), _named(base), text, args, state)
        again = self._revived(kept)
        if type(again) is not type(error) or not _says(again, text) or (args is not None and again.args != error.args):
            kept = _Error(kept.type, kept.base, text, spoken=True)
        return _write({"v": VERSION, "error": kept})

    def outcome(self, data: bytes) -> tuple[Any, Exception | None]:
        """The value, or the error, that is in an envelope. `StoreError` for anything that is no envelope of ours."""
        try:
            envelope = _open(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StoreError(f"the stored result cannot be read: {error}") from None
        if envelope.v != VERSION:
            raise StoreError(f"the stored result was written by another version ({envelope.v}, this is {VERSION})")
        try:
            if envelope.error is not UNSET:
                return None, self._revived(envelope.error)
            if envelope.ok is not UNSET and self._json:
                return self._decode(envelope.ok), None
            if envelope.raw is not UNSET and not self._json:
                return self._decode(base64.b64decode(envelope.raw, validate=True)), None
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"the stored result does not fit what the function returns: {error}") from error
        raise StoreError("the stored result was written with another codec, or there is none")

    def _revived(self, kept: _Error) -> Exception:
        # Classes are looked for among those that the function remembers, and those derived from them: never imported.
        cls = _find(self._remember, kept.type) or _find(self._remember, kept.base)
        if cls is None:
            raise StoreError(
                f"the stored result is an error that is not remembered any more: {kept.type}: {kept.message}"
            )
        if kept.spoken:
            return _spoken(cls, kept)
        args = tuple(kept.args) if kept.args is not None else (kept.message,)
        try:
            error = _made(cls, args)
        except Exception:
            return _spoken(cls, kept)
        for name, value in kept.state.items():
            try:
                if not name.startswith("__"):
                    object.__setattr__(error, name, value)
            except (AttributeError, TypeError):
                continue
        return error


def _made(cls: type[Exception], args: tuple[Any, ...]) -> Exception:
    """An error with these arguments; its `__init__` may want others, and is not called."""
    try:
        error = cls.__new__(cls, *args)
    except TypeError:
        error = cls.__new__(cls)
    # (Not in its own way, which a frozen dataclass refuses.)
    object.__setattr__(error, "args", args)
    return error


def _spoken(cls: type[Exception], kept: _Error) -> Exception:
    """An error that says what `kept` said: of `cls`, or of the nearest class above that can be made out of a text."""
    made = (_saying(one, kept.message) for one in cls.__mro__ if issubclass(one, Exception))
    error = next(one for one in made if one is not None)
    if not isinstance(error, cls):
        noted(error, f"resilient: it was a {kept.type}, which cannot be made again")
    return error


def _saying(cls: Any, text: str) -> Exception | None:
    try:
        error = _made(cls, (text,))
        return error if _says(error, text) else _made(_speaker(cls), (text,))
    except Exception:
        return None


def _says(error: Exception, text: str) -> bool:
    try:
        return str(error) == text
    except Exception:
        return False


@functools.lru_cache(maxsize=256)
def _speaker(cls: Any) -> type[Exception]:
    """`cls`, but that its text is what it was made of."""

    def text(self: Exception) -> str:
        return str(self.args[0])

    return type(cls.__name__, (cls,), {"__str__": text, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def noted(error: BaseException, note: str) -> None:
    """Add `note` to `error`, also where it is frozen; not at all where nothing can be added."""
    with contextlib.suppress(Exception):
        object.__setattr__(error, "__notes__", [*getattr(error, "__notes__", ()), note])


def _comes_back(value: Any) -> bool:
    try:
        return bool(msgspec.json.decode(_write(value)) == value)
    except Exception:
        return False


def _state(error: Exception) -> dict[str, Any]:
    """What an error has beside its arguments: its attributes, and those of classes written in C or with slots."""
    state = {name: value for name, value in vars(error).items() if not name.startswith("__")}
    for cls in type(error).__mro__:
        if cls is not BaseException and cls is not object:
            for name, member in vars(cls).items():
                if isinstance(member, (MemberDescriptorType, GetSetDescriptorType)) and not name.startswith("__"):
                    value = getattr(error, name, None)
                    if value is not None:
                        state.setdefault(name, value)
    return state


def real_module(module: str) -> str:
    """The name under which every process finds `module`: that of `python -m shop`, or of `python shop.py`, is `shop`,
    and so it is in the processes that multiprocessing spawns. It stays as it is where nobody else can find it.
    """
    if module not in ("__main__", "__mp_main__"):
        return module
    main = sys.modules.get(module)
    spec = getattr(main, "__spec__", None)
    # A script has no module's name, but other processes may import its file.
    name = Path(getattr(main, "__file__", None) or "").stem if spec is None else str(spec.name)
    return name or "__main__"


def _named(cls: type) -> str:
    return f"{real_module(cls.__module__)}:{cls.__qualname__}"


def _find(classes: typing.Iterable[type[Exception]], name: str) -> type[Exception] | None:
    for cls in classes:
        if _named(cls) == name:
            return cls
        found = _find(cls.__subclasses__(), name)
        if found is not None:
            return found
    return None


def form_of(codec: Any, target: Any, remember: tuple[type[Exception], ...]) -> Form | None:
    """The form of what `target` returns; None where its annotation cannot be resolved yet."""
    annotation = returns(target)
    if annotation is None:
        return None
    return Form(codec, annotation, remember)
