"""Every kind of callable can be guarded, and stays what it was."""

from __future__ import annotations

import abc
import asyncio
import copy
import functools
import inspect
import pickle  # noqa: TID251
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from typing import Any, ClassVar
from unittest import mock

import pytest
import wrapt

import resilient
from resilient import Env, OrderWarning, Pipeline
from resilient._guard import guarded
from resilient.policy import SYSTEM, Policy
from resilient.testing import Recorder
from tests.tracer import Tracer, coroutine, generator, plain, stream

guarded_plain = Tracer()(plain)
named = Tracer()


@named
def by_name(x: int) -> int:
    """Pickled by its name."""
    return x + 1


@Tracer()
@functools.cache
def cached(x: int) -> int:
    """No plain function: proxied, and pickled by its name."""
    return x


class Sample:
    """Methods of every sort, the decorator inside and outside."""

    log: ClassVar[list[str]] = []
    trace = Tracer("m", log)

    @trace
    def method(self, x: int) -> tuple[Sample, int]:
        return self, x

    @trace
    @classmethod
    def cls_outside(cls, x: int) -> tuple[type, int]:
        return cls, x

    @classmethod
    @trace
    def cls_inside(cls, x: int) -> tuple[type, int]:
        return cls, x

    @trace
    @staticmethod
    def static_outside(x: int) -> int:
        return x

    @staticmethod
    @trace
    def static_inside(x: int) -> int:
        return x

    @trace
    async def coro(self, x: int) -> int:
        return x

    @classmethod
    @trace
    async def cls_coro(cls, x: int) -> tuple[type, int]:
        return cls, x

    @trace
    def gen(self, n: int) -> Generator[int, None, None]:
        yield from range(n)

    @trace
    async def stream(self, n: int) -> AsyncGenerator[int, None]:
        for i in range(n):
            yield i

    cached = trace(functools.lru_cache(lambda self: id(self)))
    size: Any = trace(len)


class Child(Sample):
    """Inherits guarded methods."""


async def collect(items: AsyncGenerator[Any, Any]) -> list[Any]:
    return [item async for item in items]


@pytest.mark.parametrize("kind", [Sample, Child])
def test_methods_of_every_sort_bind_and_are_guarded(kind: type[Sample]) -> None:
    """Instance, class and static methods, in both decorator orders, also when inherited."""
    Sample.log.clear()
    it = kind()
    assert it.method(1) == (it, 1)
    assert kind.cls_outside(2) == it.cls_outside(2) == (kind, 2)
    assert kind.cls_inside(3) == it.cls_inside(3) == (kind, 3)
    assert kind.static_outside(4) == it.static_outside(4) == 4
    assert kind.static_inside(5) == it.static_inside(5) == 5
    assert asyncio.run(it.coro(6)) == 6
    assert asyncio.run(kind.cls_coro(7)) == (kind, 7)
    assert list(it.gen(2)) == [0, 1]
    assert asyncio.run(collect(it.stream(2))) == [0, 1]
    assert it.cached() == id(it)
    assert it.size("abc") == kind.size("abc") == 3
    assert Sample.log == ["+m", "-m"] * 16


def test_methods_can_be_inspected_bound_and_unbound() -> None:
    """`resilient.inspect` finds the live policies however the method is reached."""
    assert resilient.inspect(Sample.method) == resilient.inspect(Sample().method) == (Sample.trace,)
    assert resilient.inspect(Sample.cls_outside) == resilient.inspect(Sample.static_inside) == (Sample.trace,)
    assert resilient.inspect(Sample.cached) == (Sample.trace,)
    assert resilient.inspect(len) == resilient.inspect(plain) == resilient.inspect(3) == ()


@pytest.mark.parametrize("target", [plain, coroutine, generator, stream])
def test_metadata_and_kind_survive(target: Callable[..., Any]) -> None:
    """Name, documentation, signature, annotations and what `inspect` calls the function stay."""
    wrapper = Tracer()(target)
    assert wrapper is not target
    assert wrapper.__name__ == target.__name__
    assert wrapper.__qualname__ == target.__qualname__
    assert wrapper.__doc__ == target.__doc__
    assert wrapper.__module__ == target.__module__
    assert inspect.signature(wrapper) == inspect.signature(target)
    assert wrapper.__annotations__ == target.__annotations__
    assert inspect.unwrap(wrapper) is target
    for question in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        assert question(wrapper) == question(target)
    assert inspect.isfunction(wrapper)


def test_a_guarded_function_is_pickled_and_copied_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(by_name)) is by_name
    assert copy.deepcopy(by_name) is by_name


def test_defaults_and_keywords_pass_through() -> None:
    assert guarded_plain(1) == (1, 2, 3)
    assert guarded_plain(1, c=9, b=8) == (1, 8, 9)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        guarded_plain()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


# -- callables that are no functions ---------------------------------------------------------------------------------


class Instance:
    """A callable object."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: int) -> int:
        return x * self.factor


class AsyncInstance:
    async def __call__(self, x: int) -> int:
        return x


class GenInstance:
    def __call__(self, n: int) -> Generator[int, None, None]:
        yield from range(n)


class StreamInstance:
    async def __call__(self, n: int) -> AsyncGenerator[int, None]:
        for i in range(n):
            yield i


def test_builtins_partials_and_instances_stay_transparent() -> None:
    """They are proxied: attributes, isinstance and repr are those of the original."""
    trace = Tracer()
    size, half, triple = trace(len), trace(functools.partial(plain, 5)), trace(Instance(3))
    assert (size("abc"), half(c=1), triple(4)) == (3, (5, 2, 1), 12)
    assert trace.log == ["+t", "-t"] * 3
    assert size.__name__ == "len"
    assert half.func is plain
    assert isinstance(triple, Instance)
    assert triple.factor == 3
    triple.factor = 10
    assert triple(1) == 10
    assert resilient.inspect(triple) == (trace,)


def test_odd_callables_pickle_by_name_and_instances_say_that_they_cannot() -> None:
    assert pickle.loads(pickle.dumps(cached)) is cached
    assert pickle.loads(pickle.dumps(cached, protocol=0)) is cached
    with pytest.raises(TypeError, match="has no name to import it by"):
        pickle.dumps(Tracer()(Instance(3)))


def test_instances_with_async_and_generator_calls_are_guarded_as_what_they_are() -> None:
    """nopanic: an object with async `__call__` made one attempt of three, silently unguarded."""
    trace = Tracer()
    assert asyncio.run(trace(AsyncInstance())(7)) == 7
    assert list(trace(GenInstance())(2)) == [0, 1]
    assert asyncio.run(collect(trace(StreamInstance())(2))) == [0, 1]
    assert trace.log == ["+t", "-t"] * 3


def test_partials_of_partials_of_async_functions() -> None:
    trace = Tracer()
    call: Any = trace(functools.partial(functools.partial(coroutine, 1), 2))
    assert asyncio.run(call(c=4)) == (1, 2, 4)
    assert trace.name == "coroutine"
    numbers: Any = trace(functools.partial(stream, 2))
    assert asyncio.run(collect(numbers())) == [0, 1]


def test_bound_methods_and_unbound_ones_of_builtin_types() -> None:
    trace = Tracer()
    words: list[str] = []
    trace(words.append)("a")
    assert words == ["a"]
    held = Instance(2)
    bound: Any = trace(held.__call__)
    assert bound(4) == 8

    class Holder:
        call = bound
        upper = trace(str.upper)

    assert Holder().call(4) == 8
    assert Holder.upper("x") == "X"


def test_a_bound_method_of_a_guarded_method_gets_a_second_guard() -> None:
    """The class keeps its own policies; the new policy guards this bound method only."""
    outer = Tracer("o")
    it = Sample()
    again = outer(it.method)
    Sample.log.clear()
    assert again(1) == (it, 1)
    assert (outer.log, Sample.log) == (["+o", "-o"], ["+m", "-m"])


def test_a_guarded_bound_method_shows_its_policies_and_takes_more() -> None:
    """Its proxy shows the `__func__` of the method that it guards, which must not hide the marker of the proxy."""
    inner, outer = Tracer("i"), Tracer("o")
    guard = inner(Instance(2).__call__)
    assert resilient.inspect(guard) == (inner,)
    both = outer(guard)
    assert resilient.inspect(both) == (outer, inner)
    assert both(4) == 8
    assert (outer.log, inner.log) == (["+o", "-o"], ["+i", "-i"])


def test_wrapt_and_functools_decorated_functions_are_seen_through() -> None:
    """Functions that others decorated keep their kind; a sync wrapper around a coroutine function does too."""

    @wrapt.decorator
    def passing(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    def logged(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

        return inner

    for dress in (passing, logged):
        trace = Tracer()
        assert asyncio.run(trace(dress(coroutine))(1)) == (1, 2, 3)
        assert trace(dress(plain))(1) == (1, 2, 3)
        assert asyncio.run(collect(trace(dress(stream))(2))) == [0, 1]
        assert list(trace(dress(generator))(2)) == [0, 1]
    assert trace.log[-8:] == ["+t", "-t"] * 4 or trace.log.count("+t") >= 4


def test_lambdas_are_guarded_as_what_their_first_result_says() -> None:
    """nopanic: a lambda that returns a coroutine made one attempt of three, silently unguarded."""
    trace = Tracer()
    made: Any = trace(lambda x: coroutine(x))
    assert asyncio.run(made(1)) == asyncio.run(made(1)) == (1, 2, 3)
    assert trace(lambda: 5)() == 5
    assert list(trace(lambda n: generator(n))(2)) == [0, 1]
    assert asyncio.run(collect(trace(lambda n: stream(n))(2))) == [0, 1]


def test_a_lambda_that_returns_a_coroutine_is_retried() -> None:
    """Each attempt calls the lambda again; the coroutine that the first look made is the first attempt."""
    made = 0

    async def flaky() -> int:
        if made < 3:
            raise ConnectionError
        return made

    class Twice(Policy):
        """The smallest retry."""

        __slots__ = ("name",)

        def __init__(self) -> None:
            self.name = None

        def sync(self, call: Callable[..., Any], env: Env) -> Callable[..., Any]:
            return call

        def coro(self, call: Callable[..., Any], env: Env) -> Callable[..., Any]:
            async def twice(*args: Any, **kwargs: Any) -> Any:
                while True:
                    try:
                        return await call(*args, **kwargs)
                    except ConnectionError:
                        continue

            return twice

    def make() -> Coroutine[Any, Any, int]:
        nonlocal made
        made += 1
        return flaky()

    assert asyncio.run(Twice()(lambda: make())()) == 3


def test_a_plain_function_that_returns_a_coroutine_is_an_error_that_says_what_to_do() -> None:
    """tenacity: such a function is not retried, in silence."""

    def hidden(x: int) -> Any:
        return coroutine(x)

    with pytest.raises(TypeError, match=r"hidden is a plain function that returns a coroutine.*make it `async def`"):
        Tracer()(hidden)(1)


def test_a_plain_function_that_promises_an_awaitable_is_awaited() -> None:
    def promised(x: int) -> Awaitable[tuple[int, int, int]]:
        return coroutine(x)

    trace = Tracer()
    guarded_promise: Any = trace(promised)
    assert asyncio.run(guarded_promise(1)) == (1, 2, 3)
    assert inspect.iscoroutinefunction(guarded_promise)

    def quoted(x: int) -> Coroutine[Any, Any, tuple[int, int, int]]:
        return coroutine(x)

    quoted.__annotations__["return"] = Coroutine[Any, Any, int]
    quoted.marked = True  # type: ignore[attr-defined] # pyright: ignore[reportFunctionMemberAccess]
    assert inspect.iscoroutinefunction(trace(quoted))


def test_old_style_coroutine_marks_are_honoured() -> None:
    def marked(x: int) -> Any:
        return coroutine(x)

    # As `asyncio.iscoroutinefunction` knows it; Cython and others set it.
    marked._is_coroutine = vars(asyncio.coroutines)["_is_coroutine"]  # type: ignore[attr-defined] # pyright: ignore
    assert asyncio.run(Tracer()(marked)(1)) == (1, 2, 3)


def test_the_check_of_the_first_result_takes_itself_out() -> None:
    """After one result the innermost shell calls the user's function and nothing else."""
    call = Tracer()(plain)
    cells = [cell for cell in call.__closure__ or () if callable(cell.cell_contents)]  # pyright: ignore
    assert all(cell.cell_contents is not plain for cell in cells)
    call(1)
    assert any(cell.cell_contents is plain for cell in cells)


def test_a_policy_whose_shell_is_no_closure_is_served_too() -> None:
    class CallsIt:
        def __init__(self, call: Callable[..., Any]) -> None:
            self.call = call

        def __call__(self, *args: Any) -> Any:
            return self.call(*args)

    class Odd:
        name = "odd"

        def sync(self, call: Callable[..., Any], env: Env) -> Callable[..., Any]:
            inner = CallsIt(call)

            def odd(*args: Any) -> Any:
                return inner(*args)

            return odd

    assert Pipeline(Odd())(plain)(1) == Pipeline(Odd())(plain)(1) == (1, 2, 3)


@pytest.mark.parametrize("what", [3, None, "name", Sample, property(lambda self: 1)])
def test_what_cannot_be_guarded_is_refused_at_decoration(what: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot guard .*: decorate functions, methods or callable objects"):
        Tracer()(what)


def test_a_kind_that_a_policy_does_not_serve_is_refused_at_decoration() -> None:
    class SyncOnly(Policy):
        __slots__ = ("name",)

        def __init__(self) -> None:
            self.name = "s"

        def sync(self, call: Callable[..., Any], env: Env) -> Callable[..., Any]:
            return call

    for target, word in (
        (coroutine, "a coroutine function"),
        (generator, "a generator function"),
        (stream, "an async generator function"),
    ):
        with pytest.raises(TypeError, match=f"SyncOnly cannot guard {target.__name__}: it does not serve {word}"):
            SyncOnly()(target)


# -- stacks ----------------------------------------------------------------------------------------------------------


def test_stacked_decorators_collapse_into_one_chain() -> None:
    log: list[str] = []
    a, b, c = Tracer("a", log), Tracer("b", log), Tracer("c", log)
    stacked = a(Pipeline(b, c)(plain))
    assert resilient.inspect(stacked) == (a, b, c)
    assert inspect.unwrap(stacked) is plain
    assert stacked.__wrapped__ is plain  # type: ignore[attr-defined] # pyright: ignore[reportFunctionMemberAccess]
    stacked(1)
    assert log == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_a_marker_that_others_copied_is_not_believed() -> None:
    """`functools.wraps` copies `__dict__`: the marker leaks outwards, and must not swallow the foreign layer."""
    inner, outer = Tracer("i"), Tracer("o")
    seen: list[int] = []
    guarded_inner = inner(plain)

    @functools.wraps(guarded_inner)
    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return guarded_inner(*args, **kwargs)

    assert guarded(counting) is None
    outermost = outer(counting)
    assert resilient.inspect(outermost) == (outer,)
    assert outermost(1) == (1, 2, 3)
    assert (seen, inner.log, outer.log) == ([1], ["+i", "-i"], ["+o", "-o"])


def test_the_environment_of_the_inside_stays_unless_the_outside_names_another() -> None:
    mine, other = Env(), Env()
    inside = Pipeline(Tracer(), env=mine)(plain)
    kept, changed = guarded(Tracer()(inside)), guarded(Pipeline(Tracer(), env=other)(inside))
    assert kept is not None
    assert kept.env is mine
    assert changed is not None
    assert changed.env is other
    default = guarded(Tracer()(plain))
    assert default is not None
    assert default.env is SYSTEM


def test_one_policy_on_many_functions_takes_the_name_of_the_first() -> None:
    trace = Tracer()
    trace(plain)
    trace(coroutine)
    assert trace.name == "plain"
    assert Tracer(name="mine")(plain) is not None


def test_abstract_methods_stay_abstract() -> None:
    class Base(abc.ABC):
        @Tracer()
        @abc.abstractmethod
        def must(self) -> int: ...

    with pytest.raises(TypeError, match="abstract"):
        Base()  # type: ignore[abstract] # pyright: ignore[reportAbstractUsage]


# -- orders that contradict themselves -------------------------------------------------------------------------------


class Role(Tracer):
    """A tracer that plays a part."""

    __slots__ = ("idempotent", "role", "total")

    def __init__(self, role: str, total: float | None = None, *, idempotent: bool = False) -> None:
        super().__init__()
        self.role, self.total, self.idempotent = role, total, idempotent


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ([Role("breaker"), Role("retry")], "CircuitBreaker is outside Retry"),
        ([Role("retry"), Role("fallback")], "Role is outside Fallback: the fallback answers first"),
        ([Role("breaker"), Role("fallback")], "Role is outside Fallback"),
        ([Role("hedge", idempotent=True), Role("fallback")], "Role is outside Fallback"),
        ([Role("hedge")], "not declared safe"),
        ([Role("timeout", 1.0), Role("retry"), Role("timeout", 2.0)], "Role allows 2 s inside Role, which allows 1 s"),
        ([Role("retry", 1.0), Role("timeout", 2.0)], "the inner limit can never be reached"),
    ],
)
def test_contradictory_orders_warn_at_decoration_with_the_reason(roles: list[Role], reason: str) -> None:
    """Stacked or as a pipeline: the warning names the function and points at the line that decorates."""
    with pytest.warns(OrderWarning, match=f"plain: .*{reason}") as caught:
        Pipeline(*roles)(plain)
    assert caught[0].filename == __file__
    with pytest.warns(OrderWarning, match=reason):
        functools.reduce(lambda fn, policy: policy(fn), reversed(roles), plain)


def test_the_recommended_order_is_silent_and_a_stack_warns_once() -> None:
    order = [
        Role("fallback"),
        Role("idempotent"),
        Role("hedge", idempotent=True),
        Role("retry", 3.0),
        Role("breaker"),
        Role("limiter"),
        Role("bulkhead"),
        Role("timeout", 2.0),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline(*order)(plain)
        Pipeline(Role("hedge"), Role("idempotent"))(plain)
    with pytest.warns(OrderWarning) as caught:
        Tracer()(Role("breaker")(Role("retry")(plain)))
    assert len(caught) == 1


# -- a shell for those who ask for every call ------------------------------------------------------------------------


def test_calls_are_watched_only_where_a_sink_asked_before_decoration() -> None:
    recorder = Recorder(calls=True)
    env = Env(sinks=[recorder])
    silent = Pipeline(Tracer(), env=Env())(plain)
    silent(1)
    assert recorder.events == []
    watched = Pipeline(Tracer(), env=env)
    watched(plain)(1)
    asyncio.run(watched(coroutine)(1))
    list(watched(generator)(2))
    asyncio.run(collect(watched(stream)(2)))
    ended = recorder.of(resilient.CallEnded)
    assert [event.policy for event in ended] == ["plain", "coroutine", "generator", "stream"]
    assert all(event.error is None and event.seconds >= 0 for event in ended)


def test_a_watched_call_that_fails_reports_its_error() -> None:
    recorder = Recorder(calls=True)
    watched = Pipeline(Tracer(), env=Env(sinks=[recorder]))

    def fails() -> None:
        raise KeyError("x")

    async def afails() -> None:
        raise KeyError("y")

    with pytest.raises(KeyError):
        watched(fails)()
    with pytest.raises(KeyError):
        asyncio.run(watched(afails)())
    assert [repr(event.error) for event in recorder.of(resilient.CallEnded)] == ["KeyError('x')", "KeyError('y')"]


class Obliging:
    """Has every attribute, as a `Mock` has, or the methods of an `xmlrpc.client.ServerProxy`."""

    def __getattr__(self, name: str) -> Obliging:
        return Obliging()

    def __call__(self, x: int) -> str:
        return f"called with {x}"


@pytest.mark.parametrize(
    "target",
    [
        mock.Mock(return_value="called with 1"),
        mock.MagicMock(return_value="called with 1"),
        mock.Mock(spec=plain, return_value="called with 1"),
        mock.MagicMock(spec=plain, return_value="called with 1"),
        mock.create_autospec(plain, return_value="called with 1"),
        Obliging(),
    ],
    ids=["Mock", "MagicMock", "Mock(spec)", "MagicMock(spec)", "autospec", "every attribute"],
)
def test_what_has_every_attribute_is_no_coroutine_function_for_that(target: Any) -> None:
    tracer = Tracer()
    assert tracer(target)(1) == "called with 1"
    assert isinstance(tracer.name, str)


def test_async_mocks_are_awaited() -> None:
    for target in (mock.AsyncMock(return_value=2), mock.create_autospec(coroutine, return_value=2)):
        guarded = Tracer()(target)
        assert inspect.iscoroutinefunction(guarded)
        assert asyncio.run(guarded(1)) == 2


def test_an_inherited_async_call_is_found() -> None:
    class Client:
        async def __call__(self, x: int) -> int:
            return x

    class Mine(Client):
        pass

    assert asyncio.run(Tracer()(Mine())(1)) == 1


def test_what_is_shown_to_listeners_bears_the_name_of_the_function() -> None:
    """The breaker hands on what it calls: the next shell inwards, or the check of the first result."""
    shown: list[tuple[str, str]] = []

    class Shows(Policy):
        name = "shows"

        def sync(self, call: Any, env: Env) -> Any:
            def show(*args: Any, **kwargs: Any) -> Any:
                shown.append((call.__name__, call.__qualname__))
                return call(*args, **kwargs)

            return show

    Pipeline(Shows(), Shows())(plain)(1)
    Shows()(functools.partial(plain, 1))()
    assert shown == [("plain", "plain")] * 3


def test_a_sink_that_has_every_attribute_does_not_ask_for_calls() -> None:
    sink = mock.Mock()
    Pipeline(Tracer(), env=Env(sinks=[sink]))(plain)(1)
    sink.assert_not_called()
