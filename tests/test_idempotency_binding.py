"""From the arguments of a call to its key and fingerprint: what is equal, what differs, and what is refused."""

from __future__ import annotations

import enum
import functools
import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient import Idempotent, InFlight, KeyReused
from resilient._binding import addresser, binder, digest, fingerprint_of, key_text
from resilient.idempotency import Hasher, identity
from resilient.stores import MemoryStore


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


class Word(str):
    __slots__ = ()


def once(**settings: Any) -> tuple[MemoryStore, Idempotent]:
    store = MemoryStore()
    return store, Idempotent(store, **settings)


def labels(store: MemoryStore) -> list[str]:
    from resilient.stores import Scan

    return [record.label for record in store.execute(Scan()).records]


# -- what a key is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ("o-1", "o-1"),
        ("x", "x"),
        ("ü €", "ü €"),
        ("k" * 255, "k" * 255),
        (Word("w"), "w"),
        (7, "7"),
        (0, "0"),
        (Decimal("1.50"), "1.50"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (date(2026, 1, 2), "2026-01-02"),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02T03:00:00+00:00"),
        (Colour.RED, "red"),
        (Colour.ONE, "1"),
        (("a", 1), '["a","1"]'),
        (["a", Colour.RED], '["a","red"]'),
        (("alone",), "alone"),
    ],
)
def test_keys_of_each_kind_become_text(given_: object, text: str) -> None:
    assert key_text(given_) == text
    assert type(key_text(given_)) is str


BAD_VALUES: list[Any] = [
    None,
    "",
    "k" * 256,
    "a\nb",
    "\x00",
    "\ud800",
    "tab\t",
    (),
    [],
    ("a", ""),
    ("a", None),
    ("k" * 250, "long"),
]
BAD_TYPES: list[Any] = [True, False, 1.5, b"bytes", {"a": 1}, {"a"}, object(), len, ("a", 1.5)]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: repr(bad)[:20])
@pytest.mark.parametrize("fingerprint", [True, False])
def test_a_key_that_is_none_is_a_value_error_before_anything_runs(bad: object, fingerprint: bool) -> None:
    store, policy = once(key="order_id", fingerprint=fingerprint)
    ran: list[object] = []

    @policy
    def charge(order_id: Any) -> None:
        ran.append(order_id)

    with pytest.raises(ValueError, match="key"):
        charge(bad)
    assert ran == []
    assert labels(store) == []


@pytest.mark.parametrize("bad", BAD_TYPES, ids=lambda bad: repr(bad)[:20])
@pytest.mark.parametrize("fingerprint", [True, False])
def test_a_key_of_another_type_is_a_type_error_before_anything_runs(bad: object, fingerprint: bool) -> None:
    store, policy = once(key=lambda order_id: order_id, fingerprint=fingerprint)
    ran: list[object] = []

    @policy
    def charge(order_id: Any) -> None:
        ran.append(order_id)

    # (What cannot be written at all may be told so of the fingerprint.)
    with pytest.raises(TypeError, match=r"key|fingerprint"):
        charge(bad)
    assert ran == []
    assert labels(store) == []


@given(st.lists(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=6), min_size=2, max_size=4))
def test_parts_of_a_key_cannot_run_together(parts: list[str]) -> None:
    """Concatenation makes one key of ("a", "bc") and ("ab", "c"): the second order is never charged."""
    joined = key_text(parts)
    assert msgspec.json.decode(joined) == parts
    assert key_text([parts[0] + parts[1], *parts[2:]]) != joined


def test_what_is_hashed_cannot_run_together() -> None:
    assert digest(b"a", b"bc").digest() != digest(b"ab", b"c").digest()
    one, two = Hasher("f"), Hasher("fx")
    assert len({one("", "xk")[0], two("", "k")[0], one("x", "k")[0], one("", "k")[0]}) == 4
    assert one("", "k") == one("", "k")
    for number in range(1002):  # more scopes than are remembered
        assert one(f"s{number}", "k") == Hasher("f")(f"s{number}", "k")
    assert one("s1001", "k")[1] == '{"function":"f","scope":"s1001","key":"k"}'


def test_the_label_says_which_function_scope_and_key() -> None:
    store, policy = once(key="order_id", scope="shop", name="charge")

    @policy
    def anything(order_id: str) -> None:
        pass

    anything('o"1')
    assert labels(store) == ['{"function":"charge","scope":"shop","key":"o\\"1"}']


# -- by which parameters -----------------------------------------------------------------------------------------------


def test_by_position_by_name_and_by_default_are_one_call() -> None:
    _, policy = once(key="order_id")
    ran: list[tuple[str, int]] = []

    @policy
    def charge(order_id: str = "o-1", cents: int = 5, *, note: str = "") -> int:
        ran.append((order_id, cents))
        return len(ran)

    assert [charge(), charge("o-1"), charge(order_id="o-1"), charge("o-1", 5), charge(cents=5, note="")] == [1] * 5
    assert policy.replays == 4


def test_positional_only_and_keyword_only_parameters() -> None:
    _, policy = once(key=("a", "c"))

    @policy
    def f(a: int, /, b: int = 2, *, c: int, d: int = 4) -> list[int]:
        return [a, b, c, d]

    assert f(1, c=3) == f(1, 2, d=4, c=3) == [1, 2, 3, 4]
    assert policy.replays == 1
    with pytest.raises(KeyReused):
        f(1, 9, c=3)
    with pytest.raises(TypeError, match="positional"):
        f(a=1, c=3)  # type: ignore[call-arg]
    assert f(1, c=4) == [1, 2, 4, 4]


def test_only_positional_parameters() -> None:
    _, policy = once(key="a")

    @policy
    def f(a: int, b: int = 2, /) -> int:
        return a + b

    assert f(1) == f(1, 2) == 3
    assert policy.replays == 1


def test_any_number_of_arguments_are_told_apart_by_all_of_them() -> None:
    _, policy = once(key="key")

    @policy
    def f(key: str, *args: int, **kwargs: int) -> int:
        return 0

    f("a", 1, 2, x=1, y=2)
    f("a", 1, 2, y=2, x=1)  # the order of keywords is no difference
    assert policy.replays == 1
    others: list[tuple[tuple[int, ...], dict[str, int]]] = [
        ((1,), {"x": 1, "y": 2}),
        ((1, 2), {"x": 1}),
        ((1, 2), {"x": 1, "y": 3}),
    ]
    for args, kwargs in others:
        with pytest.raises(KeyReused):
            f("a", *args, **kwargs)


def test_a_call_that_cannot_be_made_is_the_type_error_of_python() -> None:
    store, policy = once(key="order_id")

    @policy
    def charge(order_id: str, cents: int) -> None:
        pass

    with pytest.raises(TypeError, match=r"charge\(\) missing 1 required positional argument: 'cents'"):
        charge("o-1")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'x'"):
        charge("o-1", 1, x=1)  # type: ignore[call-arg]
    assert labels(store) == []


class Shop:
    ran: list[Any] = []  # noqa: RUF012

    def __init__(self, name: str = "") -> None:
        self.name = name

    @Idempotent("memory://", key="order_id")
    def method(self, order_id: str, cents: int = 0) -> str:
        self.ran.append(order_id)
        return self.name

    @Idempotent("memory://", key="order_id")
    @classmethod
    def outside(cls, order_id: str) -> str:
        cls.ran.append(order_id)
        return cls.__name__

    @classmethod
    @Idempotent("memory://", key="order_id")
    def inside(cls, order_id: str) -> str:
        cls.ran.append(order_id)
        return cls.__name__

    @Idempotent("memory://", key="order_id")
    @staticmethod
    def static_outside(order_id: str) -> str:
        Shop.ran.append(order_id)
        return order_id

    @staticmethod
    @Idempotent("memory://", key="order_id")
    def static_inside(order_id: str) -> str:
        Shop.ran.append(order_id)
        return order_id

    @Idempotent("memory://", key=lambda self, order_id: (self.name, order_id))
    def by_self(self, order_id: str) -> str:
        self.ran.append(order_id)
        return self.name


def test_methods_of_each_kind_take_their_key_from_the_arguments() -> None:
    Shop.ran.clear()
    shop = Shop("one")
    for call in (shop.method, shop.outside, Shop.inside, shop.static_outside, Shop.static_inside):
        assert call("o-1") == call(order_id="o-1")
    assert len(Shop.ran) == 5


def test_the_object_of_a_method_is_no_part_of_key_or_fingerprint_unless_asked_for() -> None:
    assert Shop("a").method("o-2") == Shop("b").method("o-2") == "a"
    assert Shop("a").by_self("o-2") == "a"
    with pytest.raises(TypeError, match=r"the argument self .*cannot be part of a fingerprint"):
        _, policy = once(key="order_id", fingerprint=("self",))

        class Other(Shop):
            @policy
            def pay(self, order_id: str) -> None:
                pass

        Other().pay("o-1")


def test_a_bound_method_and_a_partial_are_known_by_their_function() -> None:
    _, policy = once(key="order_id")
    shop = Shop("bound")

    def pay(currency: str, order_id: str, cents: int = 1) -> str:
        return currency + order_id

    assert policy(functools.partial(pay, "EUR"))("o-1") == "EURo-1"
    assert policy(functools.partial(pay, currency="EUR"))(order_id="o-2") == "EURo-2"
    with pytest.raises(KeyReused):  # what the partial brings along counts
        policy(functools.partial(pay, "USD"))("o-1")
    assert policy(functools.partial(pay, "EUR", "o-3"))() == "EURo-3"
    assert policy(functools.partial(pay, "EUR", "o-4"))(5) == "EURo-4"
    least = Idempotent(MemoryStore(), key=lambda *a: "k")(functools.partial(min, 3))
    assert least(4) == least(4) == 3
    with pytest.raises(KeyReused):
        least(2)
    assert identity(functools.partial(functools.partial(pay, "x"))) == identity(pay)
    assert identity(Shop.by_self) == identity(shop.by_self)


def test_callable_instances_are_known_by_their_class() -> None:
    store, policy = once(key="order_id")

    class Pay:
        def __call__(self, order_id: str) -> str:
            return f"paid {order_id}"

    pay = policy(Pay())
    assert pay("o-1") == pay(order_id="o-1") == "paid o-1"
    assert policy.replays == 1
    assert "test_callable_instances_are_known_by_their_class.<locals>.Pay" in labels(store)[0]


def test_builtins_with_a_signature_have_their_parameters() -> None:
    _, policy = once(key="obj")
    size = policy(len)
    assert size("four") == size("four") == 4
    assert policy.replays == 1


def test_what_shows_no_parameters_needs_functions_of_the_arguments() -> None:
    _, policy = once(key="x")
    with pytest.raises(TypeError, match="does not show its parameters"):
        policy(min)
    _, policy = once(key=lambda *a: a[0], fingerprint=("x",))
    with pytest.raises(TypeError, match="does not show its parameters"):
        policy(min)
    _, policy = once(key=lambda *a: "-".join(map(str, a)))
    least = policy(min)
    assert least(3, 2) == least(3, 2) == 2
    assert policy.replays == 1
    with pytest.raises(KeyReused):
        _, policy = once(key=lambda *a, **k: "same")
        least = policy(min)
        least(3, 2)
        least(3, 1)


def test_a_mock_has_every_attribute_and_no_end() -> None:
    """Whoever looks for `func` in a mock, and in what that is, looks for ever."""
    _, policy = once(key=lambda order_id: order_id)
    mock = Mock(return_value=5)
    assert policy(mock)("o-1") == policy.replays + 5
    assert policy(mock)("o-1") == 5
    mock.assert_called_once_with("o-1")
    assert identity(mock) == "unittest.mock:Mock"


def test_the_names_given_must_be_parameters() -> None:
    def charge(order_id: str, *args: int, cents: int = 0, **more: int) -> None:
        pass

    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"key": "order"},
            r"key='order': .*charge has no parameter of that name \(it has order_id, args, cents, more\)",
        ),
        ({"key": ("order_id", "order")}, "key='order'"),
        ({"key": "args"}, "any number of arguments"),
        ({"key": "more"}, "any number of arguments"),
        ({"key": "order_id", "fingerprint": "amount"}, "fingerprint='amount'"),
        ({"key": "order_id", "fingerprint": ["cents", "amount"]}, "fingerprint='amount'"),
    ]
    for settings, text in cases:
        with pytest.raises(TypeError, match=text):
            once(**settings)[1](charge)
    with pytest.raises(TypeError, match=r"\(it has none\)"):
        once(key="a")[1](lambda: None)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"key": None}, TypeError),
        ({"key": 5}, TypeError),
        ({"key": True}, TypeError),
        ({"key": ""}, ValueError),
        ({"key": ()}, ValueError),
        ({"key": ("a", 5)}, ValueError),
        ({"key": "not a name"}, ValueError),
        ({"key": ("a", "a")}, ValueError),
        ({"key": "a", "fingerprint": None}, TypeError),
        ({"key": "a", "fingerprint": 3}, TypeError),
        ({"key": "a", "fingerprint": ()}, ValueError),
        ({"key": "a", "fingerprint": ("b", "b")}, ValueError),
        ({"key": "a", "scope": 5}, TypeError),
    ],
)
def test_settings_that_name_nothing_are_refused_at_once(settings: Any, error: type[Exception]) -> None:
    parameter = list(settings)[-1]
    with pytest.raises(error, match=parameter):
        once(**settings)


def test_defaults_that_are_no_literals_are_used_as_they_are() -> None:
    @dataclass
    class Box:
        inside: int

    default = Box(7)

    def f(key: str, box: Box = default, *, other: Any = default) -> None:
        pass

    both = binder(f, "f", "key", True, None)
    assert both(("k",), {}) == both(("k", Box(7)), {"other": Box(7)})
    assert both(("k",), {}) != both(("k", Box(8)), {})


# -- the scope ---------------------------------------------------------------------------------------------------------


def test_scopes_keep_equal_keys_apart() -> None:
    store = MemoryStore()
    ran: list[str] = []

    def charge(order_id: str) -> None:
        ran.append(order_id)

    for scope in ("a", "b", None, lambda order_id: "a", lambda order_id: "c"):
        Idempotent(store, key="order_id", scope=scope)(charge)("o-1")
    assert len(ran) == 4  # "a" by a function is "a"


@pytest.mark.parametrize("fingerprint", [True, False])
def test_a_scope_out_of_the_arguments(fingerprint: bool) -> None:
    store, policy = once(key="order_id", scope=lambda tenant, order_id: tenant, fingerprint=fingerprint)

    @policy
    def charge(tenant: str, order_id: str) -> str:
        return tenant

    assert charge("a", "o-1") == "a"
    assert charge("b", "o-1") == "b"
    assert charge("a", "o-1") == "a"
    assert policy.replays == 1
    for bad in (None, 5, b"x"):
        with pytest.raises(TypeError, match="scope must return a string"):
            charge(bad, "o-2")  # type: ignore[arg-type]
    assert len(labels(store)) == 2


def test_functions_do_not_share_keys_nor_a_name() -> None:
    store = MemoryStore()

    def one(key: str) -> str:
        return "one"

    def two(key: str) -> str:
        return "two"

    policy = Idempotent(store, key="key")
    assert (policy(one)("k"), policy(two)("k")) == ("one", "two")
    assert Idempotent(store, key="key", name="moved")(one)("k") == "one"
    assert Idempotent(store, key="key", name="moved")(one)("k") == "one"
    # A name that is given twice is meant: for a function and its async twin, say.
    assert Idempotent(store, key="key", name="moved")(two)("k") == "one"
    assert Idempotent(MemoryStore(), key="key", name="moved")(two)("k") == "two"


# -- the fingerprint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fingerprint", "differs"),
    [
        (True, {"cents": True, "note": True}),
        (False, {"cents": False, "note": False}),
        ("cents", {"cents": True, "note": False}),
        (("cents", "note"), {"cents": True, "note": True}),
        (["note"], {"cents": False, "note": True}),
        (lambda order_id, cents, note: {"sum": cents}, {"cents": True, "note": False}),
    ],
    ids=["all", "none", "name", "names", "list", "function"],
)
def test_what_must_be_equal_for_one_key(fingerprint: Any, differs: dict[str, bool]) -> None:
    for name in differs:
        _, policy = once(key="order_id", fingerprint=fingerprint)

        @policy
        def charge(order_id: str, cents: int, note: int) -> str:
            return "done"

        charge("o-1", 1, 1)
        other: dict[str, Any] = {"cents": 1, "note": 1, name: 2}
        if differs[name]:
            with pytest.raises(KeyReused) as caught:
                charge("o-1", **other)
            assert caught.value.key == "o-1"
            assert caught.value.policy.endswith("charge")
            assert len(caught.value.stored) == len(caught.value.given) == 32
            assert caught.value.stored != caught.value.given
        else:
            assert charge("o-1", **other) == "done"


class Model(pydantic.BaseModel):
    a: int


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({3, 1, 2}, {2, 3, 1}),
        (Path("/a"), Path("/a")),
        (Model(a=1), Model(a=1)),
        (Colour.RED, Colour.RED),
        (SimpleNamespace, SimpleNamespace),
    ],
)
def test_equal_arguments_have_one_fingerprint(one: Any, two: Any) -> None:
    if isinstance(one, type):
        with pytest.raises(TypeError, match=r"payload cannot be part of a fingerprint: a type cannot be written"):
            fingerprint_of(one)
    else:
        assert fingerprint_of(one) == fingerprint_of(two)
        assert fingerprint_of([one]) != fingerprint_of([one, None])


@pytest.mark.parametrize("settings", [{}, {"fingerprint": ("cents", "what")}, {"scope": lambda *_: ""}])
def test_an_argument_that_cannot_be_compared_is_named_before_anything_runs(settings: Any) -> None:
    store, policy = once(key="order_id", **settings)

    @policy
    def charge(order_id: str, cents: int, what: object) -> None:
        pytest.fail("must not run")

    with pytest.raises(TypeError, match=r"the argument what \(object\) cannot be part of a fingerprint") as caught:
        charge("o-1", 5, object())
    assert 'fingerprint=("amount",)' in str(caught.value)
    assert labels(store) == []


@pytest.mark.parametrize("nonsense", [object(), ("fine", object())])
def test_a_fingerprint_function_that_returns_nonsense_is_named(nonsense: object) -> None:
    _, policy = once(key="order_id", fingerprint=lambda order_id: nonsense)
    with pytest.raises(TypeError, match="the fingerprint cannot be part of a fingerprint"):
        policy(lambda order_id: None)("o-1")


def test_endless_arguments_are_a_type_error() -> None:
    _, policy = once(key="order_id")
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match=r"the argument what \(list\)"):
        policy(lambda order_id, what: None)("o-1", loop)


def test_numbers_that_json_has_not_still_make_a_fingerprint() -> None:
    _, policy = once(key="order_id")
    f: Callable[..., Any] = policy(lambda order_id, what: 1)
    assert f("o-1", math.nan) == f("o-1", math.nan) == 1


# -- a function that calls itself --------------------------------------------------------------------------------------


def test_a_call_inside_itself_with_its_own_key_does_not_wait_for_itself() -> None:
    _, policy = once(key="n")

    @policy
    def f(n: int, deep: int) -> int:
        return f(n + 1, 0) if deep == 1 else f(n, 0) if deep == 2 else n

    assert f(1, 1) == 2
    with pytest.raises(InFlight):
        _, policy = once(key="n", fingerprint=False)
        again: Callable[..., Any] = policy(lambda n, deep: again(n, deep + 1))
        again(1, 1)


# -- the address: what the binder finds, hashed ---------------------------------------------------------------------


@pytest.mark.parametrize("scope", [None, 'tenant "a\\'])
@pytest.mark.parametrize(
    "key",
    [
        "k",
        "order 7",
        'with "quotes"',
        "back\\slash",
        "kürzel ✓",
        "/<&>'`",
        7,
        Decimal("1.50"),
        date(2026, 1, 2),
        ("a", "b"),
    ],
)
def test_the_quick_way_to_an_address_is_the_long_one(key: Any, scope: str | None) -> None:
    def charge(key: Any, cents: int = 1, *, note: str = "x") -> None: ...

    quick = addresser(charge, "charge", "key", True, scope, "m:charge")
    long, hasher = binder(charge, "charge", "key", True, scope), Hasher("m:charge")
    for args, kwargs in (((key,), {}), ((key, 5), {}), ((), {"key": key, "cents": 5, "note": "y"})):
        within, text, print_ = long(args, kwargs)
        assert quick(args, kwargs) == (text, *hasher(within, text), print_)
        assert json.loads(quick(args, kwargs)[2])["key"] == text


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("",), ValueError),
        (("x" * 256,), ValueError),
        (("a\nb",), ValueError),
        ((None,), ValueError),
        ((1.5,), TypeError),
        (("k", object()), TypeError),
        (("k", 1, 2), TypeError),
        ((), TypeError),
    ],
)
def test_both_ways_refuse_alike(args: Any, error: type[Exception]) -> None:
    def charge(key: Any, cents: Any = 1) -> None: ...

    quick, long = (
        make(charge, "charge", "key", True, None, *more) for make, more in ((addresser, ("f",)), (binder, ()))
    )
    said: list[str] = []
    for way in (quick, long):
        with pytest.raises(error) as caught:
            way(args, {})
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"key": ("key", "cents")},
        {"key": lambda key, cents: key},
        {"fingerprint": False},
        {"fingerprint": ("cents",)},
        {"fingerprint": lambda key, cents: cents},
        {"scope": lambda key, cents: f"of {key}"},
    ],
)
def test_an_address_under_every_setting_is_what_the_binder_finds(settings: Any) -> None:
    def charge(key: str, cents: int) -> None: ...

    chosen: Any = {"key": "key", "fingerprint": True, "scope": None, **settings}
    args = ("k", 5)
    within, text, print_ = binder(charge, "charge", **chosen)(args, {})
    address = addresser(charge, "charge", **chosen, function="f")
    assert address(args, {}) == (text, *Hasher("f")(within, text), print_)
