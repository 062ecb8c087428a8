"""Results come back as what they were, or are refused when they are made; what a store holds is data, never code."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import enum
import functools
import json
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

import msgspec
import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resilient import Idempotent, InDoubt, Json, StoreError
from resilient._codec import Form, form_of, noted, returns
from resilient.stores import Claim, Finish, MemoryStore, Scan

if TYPE_CHECKING:
    from resilient.testing import FakeClock as OnlyForCheckers

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Receipt:
    order: str
    cents: int
    lines: list[Receipt] = dataclasses.field(default_factory=lambda: [])  # noqa: PIE807


@dataclasses.dataclass
class LongReceipt(Receipt):
    note: str = ""


@dataclasses.dataclass(eq=False)
class Bare:
    a: int


class Point(msgspec.Struct):
    x: int
    y: int = 0


class Cat(msgspec.Struct, tag=True):
    name: str


class Dog(msgspec.Struct, tag=True):
    name: str


class Pair(NamedTuple):
    a: int
    b: str


class Fields(TypedDict):
    a: int


class Model(pydantic.BaseModel):
    at: datetime
    price: Decimal


class LongModel(Model):
    note: str


class Box(msgspec.Struct, Generic[T]):
    item: T


class Loose(msgspec.Struct):
    anything: Any


class Plain:
    """What nobody can write."""


def fn(annotation: Any, value: Any) -> Callable[[str], Any]:
    def f(key: str) -> Any:
        return value

    f.__annotations__["return"] = annotation
    return f


def keep(annotation: Any, value: Any, **settings: Any) -> Any:
    """What the second of two calls gets."""
    call = Idempotent(MemoryStore(), key="key", **settings)(fn(annotation, value))
    assert call("k") is value
    return call("k")


AT = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (None, None),
        (str, "ü\u2028\x00"),
        (int, -(2**63)),
        (int, 10**30),
        (bool, False),
        (float, 0.1),
        (bytes, b"\x00\xff"),
        (bytearray, bytearray(b"x")),
        (Decimal, Decimal("10.50")),
        (uuid.UUID, uuid.UUID(int=7)),
        (datetime, AT),
        (datetime, datetime(2026, 1, 2)),
        (date, date(2026, 1, 2)),
        (time, time(1, 2)),
        (timedelta, timedelta(days=1, microseconds=5)),
        (Colour, Colour.RED),
        (Level, Level.HIGH),
        (Receipt, Receipt("a", 1, [Receipt("b", 2)])),
        (Bare, Bare(1)),
        (Point, Point(1)),
        (Pair, Pair(1, "b")),
        (Fields, Fields(a=1)),
        (Model, Model(at=AT, price=Decimal("1.10"))),
        (list[Model], [Model(at=AT, price=Decimal("1"))]),
        (Box[Receipt], Box(Receipt("a", 1))),
        (Receipt | None, Receipt("a", 1)),
        (Receipt | None, None),
        (Cat | Dog | None, Dog("rex")),
        (int | str, "5"),
        (Literal["a", "b"], "b"),
        (Annotated[int, "cents"], 5),
        (tuple[int, str], (1, "a")),
        (tuple[int, ...], (1, 2)),
        (set[int], {1, 2}),
        (frozenset[str], frozenset({"a"})),
        (dict[int, list[tuple[date, Decimal]]], {5: [(date(2026, 1, 1), Decimal("1"))]}),
        (dict[uuid.UUID, Colour], {uuid.UUID(int=1): Colour.RED}),
        (Sequence[int], [1, 2]),
        (list[Any], [1, None, "a", {"b": 2.5}]),
        (Loose, Loose({"a": [1]})),
        (Any, {"a": [1, 2.5, None, True, "x"]}),
        (dict, {"a": 1}),
        (object, {"a": [1, None]}),
        (list[object], [5, "a"]),
    ],
    ids=str,
)
def test_what_an_annotation_names_comes_back_as_it_was(annotation: Any, value: Any) -> None:
    again = keep(annotation, value)
    assert type(again) is type(value)
    if isinstance(value, Bare):
        assert dataclasses.asdict(again) == dataclasses.asdict(value)
    else:
        assert again == value
    assert again is not value or value is None or isinstance(value, (bool, enum.Enum, int, str, bytes))


def test_an_unannotated_function_keeps_plain_data() -> None:
    f: Callable[..., Any] = Idempotent(MemoryStore(), key="key")(lambda key, value: value)
    plain: dict[str, Any] = {"a": [1, 2.5, None, True, "x", {"y": []}]}
    assert f("k", plain) is plain
    again = f("k", plain)
    assert again == plain
    assert again is not plain


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        [(1,)],
        Receipt("a", 1),
        Point(1),
        Decimal("1"),
        AT,
        uuid.UUID(int=1),
        b"x",
        {1},
        {1: "a"},
        float("nan"),
        float("inf"),
        Model(at=AT, price=Decimal("1")),
        Plain(),
        Colour.RED,
        "\ud800",
        lambda: 1,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("annotation", [Any, "none"])
def test_what_would_come_back_as_something_else_is_refused_and_in_doubt(annotation: Any, value: Any) -> None:
    store = MemoryStore()
    f = fn(annotation, value)
    if annotation == "none":
        del f.__annotations__["return"]
    call = Idempotent(store, key="key", name="charge")(f)
    with pytest.raises((TypeError, UnicodeEncodeError)) as caught:
        call("k")
    assert caught.value.__notes__ == [
        "resilient: charge ran, and what it returned cannot be kept: its key 'k' is in doubt"
    ]
    (record,) = store.execute(Scan()).records
    assert (record.state, record.result) == ("in doubt", None)
    with pytest.raises(InDoubt):
        call("k")


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "5"),
        (float, float("nan")),
        (Receipt, Point(1)),
        (Receipt, LongReceipt("a", 1, note="lost")),
        (Model, LongModel(at=AT, price=Decimal("1"), note="x")),
        (Sequence[int], (1, 2)),
        (None, 5),
        (Loose, Loose((1,))),
        (Receipt | None, 5),
    ],
    ids=str,
)
def test_what_does_not_fit_its_annotation_is_refused_and_in_doubt(annotation: Any, value: Any) -> None:
    store = MemoryStore()
    with pytest.raises((TypeError, ValueError, OverflowError)) as caught:
        Idempotent(store, key="key")(fn(annotation, value))("k")
    assert "cannot be kept" in caught.value.__notes__[0]
    assert store.execute(Scan()).records[0].state == "in doubt"


@pytest.mark.parametrize(
    "annotation",
    [
        Plain,
        list[Plain],
        dict[str, Plain],
        Plain | None,
        Plain | int,
        tuple[int, Plain],
        Callable[[], int],
        complex,
        Iterable[int],
    ],
)
def test_an_annotation_that_cannot_be_kept_is_an_error_at_decoration(annotation: Any) -> None:
    with pytest.raises(TypeError, match=r"^charge: it returns .*, which cannot be kept") as caught:
        Idempotent(MemoryStore(), key="key", name="charge")(fn(annotation, None))
    if annotation is Plain:
        assert "use a dataclass, a msgspec struct, a pydantic model, plain data, or a codec of your own" in str(
            caught.value
        )


def test_a_class_that_cannot_be_kept_is_found_inside_of_others() -> None:
    @dataclasses.dataclass
    class Outer:
        inner: list[Plain]

    Outer.__annotations__["inner"] = list[Plain]
    with pytest.raises(TypeError, match="it returns Plain, which cannot be kept"):
        Idempotent(MemoryStore(), key="key")(fn(Outer, None))


# -- what a function says that it returns ------------------------------------------------------------------------------


class Later:
    @Idempotent("memory://", key="key")
    def early(self, key: str) -> Defined:
        return Defined(5)

    @Idempotent("memory://", key="key")
    async def aearly(self, key: str) -> Defined:
        return Defined(6)

    def __call__(self, key: str) -> Receipt:
        return Receipt(key, 1)


@dataclasses.dataclass
class Defined:
    a: int


def test_a_name_that_is_defined_later_is_resolved_at_the_first_call() -> None:
    assert Later().early("k") == Later().early("k") == Defined(5)
    assert asyncio.run(Later().aearly("k")) == asyncio.run(Later().aearly("k")) == Defined(6)


def test_a_codec_may_be_used_by_itself() -> None:
    assert Json().encode("x", str) == Json().encode("x") == b'"x"'
    assert Json().decode(b'"x"', str) == "x"


def test_a_plain_result_has_a_limit_too() -> None:
    @Idempotent(MemoryStore(), key="key", codec=Json(limit=10))
    def f(key: str) -> str:
        return key

    assert f("12345678") == "12345678"
    with pytest.raises(ValueError, match="it takes 11 bytes, and the limit is 10"):
        f("123456789")


def test_a_name_that_is_never_defined_is_an_error_at_the_first_call_before_anything_runs() -> None:
    store = MemoryStore()

    @Idempotent(store, key="key")
    def f(key: str) -> OnlyForCheckers:
        pytest.fail("must not run")

    for _ in range(2):
        with pytest.raises(TypeError, match=r"f: its return annotation 'OnlyForCheckers' cannot be resolved"):
            f("k")
    assert store.execute(Scan()).records == ()


def test_names_of_parameters_need_not_exist() -> None:
    """Most are imported under TYPE_CHECKING: they must not spoil the return type."""

    @Idempotent(MemoryStore(), key="key")
    def f(key: str, client: OnlyForCheckers | None = None) -> Receipt:
        return Receipt("a", 1)

    assert f("k") == f("k") == Receipt("a", 1)


def promised(key: str) -> Awaitable[Receipt]:
    raise NotImplementedError


def undertaken(key: str) -> Coroutine[Any, Any, Receipt]:
    raise NotImplementedError


def annotated(key: str) -> Annotated[int, "cents"]:
    raise NotImplementedError


@functools.wraps(promised)
def wrapped(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("target", "annotation"),
    [
        (promised, Receipt),
        (undertaken, Receipt),
        (annotated, Annotated[int, "cents"]),
        (wrapped, Receipt),
        (functools.partial(promised, "k"), Receipt),
        (Later(), Receipt),
        (Later().__call__, Receipt),
        (functools.partial(Later()), Receipt),
        (len, Any),
        (lambda: 1, Any),
        (fn(None, 1), type(None)),
        (fn("Receipt", 1), Receipt),
        (fn("Nowhere", 1), None),
        (fn("dataclasses.Nowhere", 1), None),
    ],
)
def test_the_return_annotation_of_each_kind_of_callable(target: Any, annotation: Any) -> None:
    assert returns(target) == annotation


def test_an_annotation_that_is_no_python_is_an_error_at_decoration() -> None:
    with pytest.raises(SyntaxError):
        Idempotent(MemoryStore(), key="key")(fn("no python", 1))


# -- the size limit and own codecs -------------------------------------------------------------------------------------


def test_a_result_over_the_limit_is_refused_and_in_doubt() -> None:
    store = MemoryStore()
    codec = Json(limit=10)
    assert repr(codec) == "Json(limit=10)"
    assert keep(str, "x" * 8, codec=codec) == "x" * 8
    with pytest.raises(ValueError, match=r"it takes 11 bytes, and the limit is 10 \(codec=Json\(limit=…\)\)"):
        Idempotent(store, key="key", codec=codec)(fn(str, "x" * 9))("k")
    assert store.execute(Scan()).records[0].state == "in doubt"
    for bad in (0, -1):
        with pytest.raises(ValueError, match="limit"):
            Json(limit=bad)
    with pytest.raises(TypeError, match="limit"):
        Json(limit=True)


def test_json_works_by_itself_too() -> None:
    codec = Json()
    assert codec.decode(codec.encode(Receipt("a", 1), Receipt), Receipt) == Receipt("a", 1)
    assert codec.decode(codec.encode([1])) == [1]


class Rot:
    """A codec for anything at all, with bytes that are no text."""

    def encode(self, value: Any, annotation: Any) -> bytes:
        return b"\xff\x00" + bytes(255 - b for b in f"{annotation.__name__} {value}".encode())

    def decode(self, data: bytes, annotation: Any) -> Any:
        assert data[:2] == b"\xff\x00"
        return annotation, bytes(255 - b for b in data[2:]).decode()


def test_a_codec_of_ones_own_gets_value_and_annotation_and_any_bytes() -> None:
    assert keep(complex, 1j, codec=Rot()) == (complex, "complex 1j")


def test_a_codec_that_returns_no_bytes_leaves_the_key_in_doubt() -> None:
    class Bad:
        def encode(self, value: Any, annotation: Any) -> Any:
            return "text"

        def decode(self, data: bytes, annotation: Any) -> Any: ...

    store = MemoryStore()
    with pytest.raises(TypeError, match="bytes-like"):
        Idempotent(store, key="key", codec=Bad())(fn(Any, 1))("k")
    assert store.execute(Scan()).records[0].state == "in doubt"


@pytest.mark.parametrize("codec", [None, 5, "json", Rot, dict])
def test_what_is_no_codec_is_refused(codec: Any) -> None:
    with pytest.raises(TypeError, match="codec must be an object with encode and decode"):
        Idempotent(MemoryStore(), key="key", codec=codec)


# -- errors that are remembered ----------------------------------------------------------------------------------------


class Declined(Exception):
    def __init__(self, reason: str, code: int = 5) -> None:
        super().__init__(reason, code)
        self.reason, self.code = reason, code
        self.handle = object()
        self.pair = (1, 2)

    def __str__(self) -> str:
        return f"declined: {self.reason}"


class Stolen(Declined):
    pass


class Strict(Exception):
    """Made of exactly one argument, and no more."""

    def __new__(cls, one: int, /) -> Strict:  # pyright: ignore[reportInconsistentConstructor]
        return super().__new__(cls, one)

    def __init__(self, one: int) -> None:  # pyright: ignore[reportInconsistentConstructor]
        self.one = one


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Guarded(Exception):
    @property
    def fixed(self) -> int:
        return 1


def remembered(error: Exception, *classes: type[Exception]) -> Exception:
    form = Form(Json(), Any, classes or (type(error),))
    value, again = form.outcome(form.keep_error(error))
    assert value is None
    assert again is not None
    return again


def test_an_error_comes_back_with_class_arguments_and_plain_attributes() -> None:
    again = remembered(Stolen("lost card", code=9), Declined)
    assert type(again) is Stolen
    assert again.args == ("lost card", 9)
    assert (again.reason, again.code) == ("lost card", 9)
    assert str(again) == "declined: lost card"
    assert not hasattr(again, "handle")
    assert not hasattr(again, "pair")  # it would be a list


def test_arguments_that_json_has_not_become_the_message() -> None:
    assert remembered(Exception((1, 2))).args == ("(1, 2)",)
    assert remembered(ValueError(object)).args == ("<class 'object'>",)
    assert remembered(ValueError("a\udc80b")).args == ("a\\udc80b",)


def test_notes_of_the_first_are_not_kept() -> None:
    error = ValueError("x")
    error.add_note("private")
    assert not hasattr(remembered(error), "__notes__")


def test_classes_with_their_own_ways_come_back_too() -> None:
    strict = remembered(Strict(5))
    assert (type(strict), strict.args, vars(strict)) == (Strict, (5,), {"one": 5})
    assert remembered(Slotted(3)).args == (3,)
    guarded = Guarded("x")
    guarded.__dict__["fixed"] = 7
    assert remembered(guarded).fixed == 1  # type: ignore[attr-defined]
    os_error = remembered(FileNotFoundError(2, "No such file", "/a"))
    assert (type(os_error), os_error.args) == (FileNotFoundError, (2, "No such file"))


def test_an_error_that_cannot_be_made_is_its_text() -> None:
    class Picky(Exception):
        def __new__(cls, one: int, two: int) -> Picky:  # pyright: ignore[reportInconsistentConstructor]
            return super().__new__(cls)

    form = Form(Json(), Any, (Picky,))
    data = msgspec.json.encode({"v": 1, "error": {"type": "x", "base": named(Picky), "message": "m", "args": [1]}})
    _, error = form.outcome(data)
    assert type(error) is Exception
    assert str(error) == "m"
    assert error.__notes__ == ["resilient: it was a x, which cannot be made again"]


def test_a_class_that_is_gone_comes_back_as_the_one_that_is_remembered() -> None:
    form = Form(Json(), Any, (Declined,))
    data = msgspec.json.encode(
        {"v": 1, "error": {"type": "gone:Class", "base": named(Declined), "message": "m", "args": ["r", 1]}}
    )
    error = form.outcome(data)[1]
    assert type(error) is Declined
    assert error.args == ("r", 1)


def named(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


# -- hostile records ---------------------------------------------------------------------------------------------------


def record(data: bytes, annotation: Any = Receipt, **settings: Any) -> Callable[[], Any]:
    """A call whose key has `data` for a result."""
    store = MemoryStore()

    def f(key: str) -> Any:
        pytest.fail("must not run")

    f.__annotations__["return"] = annotation
    call = Idempotent(store, key="key", name="f", **settings)(f)
    from resilient.idempotency import Hasher

    stored, _ = Hasher("f")("", "hostile")
    got = store.execute(Claim(stored, "them", 30.0))
    store.execute(Finish(stored, "them", got.fence, data, 1000.0))
    return lambda: call("hostile")


ENVELOPES: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b"5",
    b'"text"',
    b"{}",
    b'{"ok":1}',
    b'{"v":1}',
    b'{"v":"1","ok":1}',
    b'{"v":true,"ok":1}',
    b'{"v":2,"ok":{"order":"a","cents":1}}',
    b'{"v":0,"ok":{"order":"a","cents":1}}',
    b'{"v":1,"ok":{"order":"a"}}',
    b'{"v":1,"ok":{"order":5,"cents":1}}',
    b'{"v":1,"ok":null}',
    b'{"v":1,"ok":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"v":1,"ok":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    b'{"v":1,"ok":' + b"9" * 100_000 + b"}",
    b'{"v":1,"raw":"AA=="}',
    b'{"v":1,"raw":5}',
    b'{"v":1,"error":{}}',
    b'{"v":1,"error":{"type":"os:system","base":"os:system","message":"rm","args":["rm"]}}',
    b'{"v":1,"error":{"type":"builtins:Exception","base":"builtins:BaseException","message":"x"}}',
    b'{"v":1,"error":{"type":"a","base":"b","message":"x","args":5}}',
    b'\xff\xfe{"v":1}',
    b'{"v":1,"ok":"\xff"}',
    b'{"v":1,"ok":{"order":"a","cents":1}} trailing',
    b'{"v":1,"ok":{"order":"a","cents":1}',
]


@pytest.mark.parametrize("data", ENVELOPES, ids=lambda data: repr(data[:40]))
def test_a_hostile_record_is_a_store_error_and_nothing_runs(data: bytes) -> None:
    for settings in ({}, {"remember": Declined}, {"on_store_error": "run"}):
        with pytest.raises(StoreError, match="the stored result") as caught:
            record(data, **settings)()
        assert caught.value.maybe_written is False


def test_a_record_of_another_version_says_so() -> None:
    with pytest.raises(StoreError, match=r"written by another version \(2, this is 1\)"):
        record(b'{"v":2,"ok":1}')()


def test_a_record_of_another_codec_says_so() -> None:
    with pytest.raises(StoreError, match="written with another codec"):
        record(b'{"v":1,"ok":1}', codec=Rot())()
    with pytest.raises(StoreError, match="written with another codec"):
        record(b'{"v":1,"raw":"AA=="}')()
    with pytest.raises(StoreError, match="does not fit"):
        record(b'{"v":1,"raw":"!!"}', codec=Rot())()
    with pytest.raises(StoreError, match="does not fit"):
        record(b'{"v":1,"raw":"' + base64.b64encode(b"zz") + b'"}', codec=Rot())()


def test_an_error_that_is_not_remembered_any_more_says_so() -> None:
    data = Form(Json(), Any, (Declined,)).keep_error(Declined("r"))
    with pytest.raises(StoreError, match=r"an error that is not remembered any more: .*:Declined: declined: r"):
        record(data)()
    assert type(Form(Json(), Any, (Declined,)).outcome(data)[1]) is Declined


def test_no_class_is_imported_because_a_record_names_it() -> None:
    code = """
import sys
from resilient._codec import Form, Json
from resilient import StoreError
form = Form(Json(), int, (Exception,))
for name in ("smtplib:SMTPException", "tarfile:TarError"):
    data = b'{"v":1,"error":{"type":"%s","base":"builtins:Exception","message":"m","args":[]}}' % name.encode()
    assert type(form.outcome(data)[1]) is Exception
    data = b'{"v":1,"error":{"type":"%s","base":"%s","message":"m","args":[]}}' % (name.encode(), name.encode())
    try:
        form.outcome(data)
    except StoreError:
        pass
    else:
        raise SystemExit("made one")
assert "smtplib" not in sys.modules and "tarfile" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_attributes_in_a_record_cannot_change_what_an_error_is() -> None:
    state = {"__notes__": 5, "__class__": 5, "__dict__": {}, "__cause__": 5, "__traceback__": 5, "reason": "r"}
    error = {"type": named(Declined), "base": named(Declined), "message": "m", "args": ["a", 1], "state": state}
    call = record(msgspec.json.encode({"v": 1, "error": error}), remember=Declined)
    with pytest.raises(Declined) as caught:
        call()
    assert caught.value.reason == "r"
    assert caught.value.__cause__ is None
    assert caught.value.__notes__ == ["resilient: replayed: attempt 1 with the key 'hostile' ended so"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PARTS = {
    "v": st.just(1) | JSON,
    "ok": st.fixed_dictionaries({"order": JSON, "cents": JSON}) | JSON,
    "raw": JSON,
    "error": st.fixed_dictionaries(
        {"type": st.just(named(Declined)) | JSON, "base": st.just(named(Declined)) | JSON, "message": JSON},
        optional={"args": JSON, "state": JSON},
    )
    | JSON,
}


@given(
    st.binary(max_size=60)
    | st.fixed_dictionaries({}, optional=PARTS).map(lambda data: json.dumps(data).encode(errors="replace"))
)
@example(b'{"v": 1, "error": {"type": "a", "base": "b", "message": ""}}')
def test_whatever_a_record_holds_is_a_result_of_the_right_type_or_a_store_error(data: bytes) -> None:
    form = Form(Json(), Receipt, (Declined,))
    try:
        value, error = form.outcome(data)
    except StoreError:
        pass
    else:
        assert (type(value), error) == (Receipt, None) or (value is None and isinstance(error, Declined))


@given(JSON)
def test_plain_data_comes_back_or_is_refused(value: Any) -> None:
    form = form_of(Json(), lambda: 1, ())
    assert form is not None
    try:
        data = form.keep(value)
    except Exception:
        return
    assert form.outcome(data) == (value, None)


# -- what must not change on the way -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Spot:
    x: Any = None


@dataclasses.dataclass
class Place(Spot):
    y: int = 0


@dataclasses.dataclass
class Maybe:
    share: float | None


class Named(TypedDict):
    name: str


class Secret(pydantic.BaseModel):
    word: pydantic.SecretStr


@dataclasses.dataclass(eq=False)
class Leaf:
    x: int
    inner: list[Leaf] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Around:
    bare: Leaf
    seen: int = dataclasses.field(default=0, compare=False)


class BareStruct(msgspec.Struct, eq=False):
    x: int


class Mould(pydantic.BaseModel):
    x: int
    _seen: int = pydantic.PrivateAttr(default=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    pass


def kept_as(annotation: Any, value: Any) -> Any:
    form = Form(Json(), annotation, ())
    return form.outcome(form.keep(value))[0]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list[Spot], [Place(1, 2)]),
        (Maybe, Maybe(float("nan"))),
        (list[float | None], [float("inf")]),
        (Named, {"name": "a", "more": 1}),
        (list[Named], [{"name": "a", "more": 1}]),
        (Secret, Secret(word=pydantic.SecretStr("abc"))),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_result_that_would_come_back_as_another_is_refused(annotation: Any, value: Any) -> None:
    with pytest.raises(TypeError, match="would come back as something else"):
        kept_as(annotation, value)


def test_what_has_no_equality_of_its_own_is_compared_by_its_fields() -> None:
    again = kept_as(list[Around], [Around(Leaf(1, [Leaf(2)]), seen=5)])
    assert (again[0].bare.x, again[0].bare.inner[0].x) == (1, 2)
    assert kept_as(dict[str, BareStruct], {"a": BareStruct(1)})["a"].x == 1
    assert kept_as(tuple[BareStruct, int], (BareStruct(1), 2))[1] == 2
    assert len(kept_as(set[Mark], {Mark(), Mark()})) == 2
    seen = Mould(x=1)
    seen._seen = 5
    assert kept_as(Mould, seen).x == 1
    with pytest.raises(TypeError, match="would come back"):
        kept_as(list[Leaf], [_LeafBelow(1)])
    assert str(kept_as(Decimal, Decimal("NaN"))) == "NaN"


class _LeafBelow(Leaf):
    pass


# -- errors that cannot be made again as they were ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Coded(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class Both(Silent, Coded):
    pass


def revived(error: Exception, *remember: type[Exception]) -> Exception:
    form = Form(Json(), Any, remember or (type(error),))
    _, again = form.outcome(form.keep_error(error))
    assert again is not None
    return again


def test_remembered_errors_come_back_as_they_were() -> None:
    frozen = revived(Frozen(3))
    assert isinstance(frozen, Frozen)
    assert (frozen.code, frozen.args) == (3, Frozen(3).args)
    noted(frozen, "one")
    noted(frozen, "two")
    assert frozen.__notes__ == ["one", "two"]
    lost = revived(FileNotFoundError(2, "No such file", "a.txt"), OSError)
    assert isinstance(lost, FileNotFoundError)
    assert (lost.errno, lost.filename, str(lost)) == (2, "a.txt", "[Errno 2] No such file: 'a.txt'")
    slotted = revived(Coded(4))
    assert isinstance(slotted, Coded)
    assert (slotted.code, str(slotted)) == (4, "code 4")


def test_remembered_errors_that_cannot_be_made_again_keep_their_text() -> None:
    text = "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    again = revived(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))
    assert isinstance(again, UnicodeDecodeError)
    assert (str(again), type(again).__qualname__) == (text, "UnicodeDecodeError")
    group = revived(ExceptionGroup("several", [ValueError(1)]), ExceptionGroup)
    assert (type(group), str(group)) == (Exception, "several (1 sub-exception)")
    assert group.__notes__ == ["resilient: it was a builtins:ExceptionGroup, which cannot be made again"]
    with pytest.raises(pydantic.ValidationError) as caught:
        Mould(x="no")  # type: ignore[arg-type]
    assert isinstance(revived(caught.value), ValueError)
    assert str(revived(caught.value)) == str(caught.value)
    assert "Silent" in str(revived(Silent("x")))
    assert isinstance(revived(Silent("x")), Silent)
