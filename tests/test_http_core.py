"""HTTP for idempotency keys: the header, the fingerprint, what is kept of a response, problems, and the options."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient import integrations
from resilient._drive import RUN, Outcome, Program, drive
from resilient.errors import InDoubt, InFlight, KeyReused, StoreError
from resilient.integrations import asgi, wsgi
from resilient.integrations._halves import NO_CALL, STARTED, Keyed, KeyedTasks, first_half, second_half
from resilient.integrations._http import (
    Answer,
    AnswerForm,
    Problems,
    Recorder,
    Request,
    fingerprint_of,
    joined,
    read_key,
    remembered,
)
from resilient.policy import SYSTEM
from resilient.stores import MemoryStore, Threaded
from tests._http import problem

FORM = AnswerForm()
UUID = "8e03978e-40d5-43dd-bc93-6894a57f9324"


# -- the header ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("value", "key"),
    [
        (f'"{UUID}"', UUID),
        (f'  "{UUID}"\t', UUID),
        ('"with space; and, more"', "with space; and, more"),
        (r'"a \"quoted\" \\ key"', r'a "quoted" \ key'),
        ('"k";version=1', "k"),
        ('"k"; a;b=?1; *c="x;y\\"";d=:aGk=:;e=-1.5', "k"),
        (f'"{"x" * 255}"', "x" * 255),
    ],
)
def test_a_string_of_structured_fields_is_the_key(value: str, key: str, strict: bool) -> None:
    assert read_key(value, strict=strict) == key


@pytest.mark.parametrize("value", [UUID, "order-1", "a/b+c=", "user:1.2", "*"])
def test_a_bare_key_is_read_unless_one_is_strict(value: str) -> None:
    assert read_key(value, strict=False) == value
    with pytest.raises(ValueError, match="a string in double quotes"):
        read_key(value, strict=True)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        '""',
        '"',
        '"open',
        'open"',
        '"a" "b"',
        '"a", "b"',
        "a, b",
        "a b",
        "a;b=1",
        '"a"b',
        '"a";B=1',
        '"a";=1',
        r'"bad \escape"',
        r"back\slash",
        '"tab\there"',
        '"caf\xe9"',
        "caf\xe9",
        "nul\x00",
        '"nul\x00"',
        f'"{"x" * 256}"',
        "x" * 256,
    ],
)
def test_what_is_no_key_is_refused(value: str, strict: bool) -> None:
    with pytest.raises(ValueError, match=r"^it must"):
        read_key(value, strict=strict)


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=255))
def test_every_printable_key_can_be_sent(key: str) -> None:
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert read_key(quoted, strict=True) == key


@given(st.text(st.characters(max_codepoint=0xFF)))
def test_a_header_is_a_key_or_an_error(value: str) -> None:
    try:
        key = read_key(value, strict=False)
    except ValueError:
        return
    assert 1 <= len(key) <= 255
    assert key.isascii()
    assert key.isprintable()


# -- the request -----------------------------------------------------------------------------------------------------


def request(
    method: str = "POST", path: str = "/orders", query: str = "a=1", kind: str = "text/plain", body: bytes = b"hi"
) -> Request:
    made = Request(method, path, query, {"content-type": kind}, {})
    made.body = body
    return made


def test_the_fingerprint_tells_requests_apart_in_everything_that_counts() -> None:
    different = [
        request(),
        request(method="PATCH"),
        request(path="/orders/"),
        request(query="a=2"),
        request(kind="text/html"),
        request(body=b"ho"),
        request(path="/ordersa", query="=1"),  # the same text in a row
    ]
    assert len({fingerprint_of(one) for one in different}) == len(different)
    assert fingerprint_of(request()) == fingerprint_of(request())
    assert fingerprint_of(Request("POST", "/\udcff", "", {}, {}))


def test_a_request_shows_its_method_and_path_and_no_secret() -> None:
    shown = repr(Request("POST", "/orders", "token=1", {"authorization": "secret"}, {}))
    assert shown == "<request POST /orders>"


def test_headers_that_come_twice_are_joined() -> None:
    assert joined([(b"A", b"1"), (b"b", b"\xe9"), (b"a", b"2")]) == {"a": "1, 2", "b": "\xe9"}


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_a_response_comes_back_as_it_was() -> None:
    headers = [("Content-Type", "text/plain"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X-Name", "caf\xe9")]
    back, error = FORM.outcome(FORM.keep(Answer(201, headers, b"\x00\xff made")))
    assert error is None
    assert (back.status, back.headers, back.body, back.lost) == (201, headers, b"\x00\xff made", "")


def test_headers_of_the_connection_are_not_kept() -> None:
    headers = [
        ("Connection", "close, X-Hop"),
        ("x-hop", "1"),
        ("Transfer-Encoding", "chunked"),
        ("Keep-Alive", "timeout=5"),
        ("X-Stays", "1"),
    ]
    assert FORM.outcome(FORM.keep(Answer(200, headers, b"")))[0].headers == [("X-Stays", "1")]


@pytest.mark.parametrize("lost", ["too large", "interrupted"])
def test_a_response_without_its_body_comes_back_as_a_mark(lost: str) -> None:
    back = FORM.outcome(FORM.keep(Answer(201, [("A", "b")], b"", lost)))[0]
    assert (back.status, back.headers, back.body, back.lost) == (201, [], b"", lost)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"v":1,"status":200,"headers":{}}', "cannot be read"),
        (b'{"v":1,"status":200,"headers":[["a"]]}', "cannot be read"),
        (b'{"v":1,"status":"200"}', "cannot be read"),
        (b'{"v":1}', "cannot be read"),
        (b'{"v":2,"status":200}', "another version"),
        (b'{"v":1,"status":200,"lost":"on the way"}', "why it has no body"),
        (b'{"v":1,"status":200,"body":"%%%"}', "its body"),
        (b'{"v":1,"status":200,"body":"abc"}', "its body"),
        ('{"v":1,"status":200,"body":"é"}'.encode(), "its body"),
        (b'{"v":1,"status":100}', "its status is 100"),
        (b'{"v":1,"status":1000}', "its status is 1000"),
        (b'{"v":1,"status":200,"headers":[["a b","c"]]}', "its header 'a b'"),
        (b'{"v":1,"status":200,"headers":[["a","b\\r\\nset-cookie: c"]]}', "its header 'a'"),
        (b'{"v":1,"status":200,"headers":[["a\\n","b"]]}', "its header"),
        ('{"v":1,"status":200,"headers":[["a","€"]]}'.encode(), "its header 'a'"),
    ],
)
def test_what_is_no_response_of_ours_is_an_error_of_the_store(data: bytes, fault: str) -> None:
    with pytest.raises(StoreError, match=fault):
        FORM.outcome(data)


@given(st.binary() | st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner)
       | st.dictionaries(st.sampled_from(["v", "status", "headers", "body", "lost"]), inner)).map(
           lambda data: json.dumps(data).encode()))  # fmt: skip
def test_no_data_of_a_store_makes_another_error(data: bytes) -> None:
    try:
        FORM.outcome(data)
    except StoreError:
        pass


# -- a response on its way out ---------------------------------------------------------------------------------------


def recorder(headers: list[tuple[str, str]], limit: int = 10) -> Recorder:
    made = Recorder(limit)
    made.start(200, headers)
    return made


def test_a_stream_without_a_length_goes_out_as_it_comes() -> None:
    out = recorder([("Content-Type", "text/plain"), ("Content-Length", "many")])
    assert [out.add(b"ab"), out.add(b""), out.last(b"cd")] == [b"ab", b"", b"cd"]
    assert out.answer(whole=True).body == b"abcd"


def test_what_completes_the_declared_length_waits_for_the_end() -> None:
    out = recorder([("content-length", "4")])
    assert [out.add(b"ab"), out.add(b"cd"), out.add(b"e"), out.last(b"f")] == [b"ab", None, None, b"cdef"]
    assert out.answer(whole=True).body == b"abcdef"


def test_a_response_shorter_than_it_says_is_passed_on() -> None:
    out = recorder([("content-length", "4")])
    assert [out.add(b"a"), out.last(b"b")] == [b"a", b"b"]


def test_a_response_over_the_limit_is_no_longer_recorded() -> None:
    out = recorder([], limit=3)
    assert [out.add(b"abc"), out.too_large, out.add(b"d"), out.too_large, out.last(b"e")] == [
        b"abc", False, b"d", True, b"e"]  # fmt: skip
    kept = out.answer(whole=True)
    assert (kept.status, kept.lost, kept.body) == (200, "too large", b"")
    assert out.answer(whole=False).lost == "interrupted"


def test_a_response_can_begin_anew() -> None:
    out = recorder([("content-length", "1")], limit=3)
    out.add(b"abcd")
    out.start(500, [])
    assert (out.too_large, out.last(b"x"), out.answer(whole=True).status) == (False, b"x", 500)


# -- problems --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "ran", "status", "name", "retry"),
    [
        (InFlight("http", "k", 2.01), False, 409, "in-progress", "3"),
        (InFlight("http", "k", 0.0), False, 409, "in-progress", "1"),
        (KeyReused("http", "k", "a", "b"), False, 422, "key-reused", None),
        (InDoubt("http", "k", 1), False, 409, "in-doubt", None),
        (InDoubt("http", "k", 1), True, 409, "in-doubt", None),
        (StoreError("x"), False, 503, "store-unavailable", "1"),
        (StoreError("x"), True, 500, "response-not-stored", None),
    ],
)
def test_each_error_has_a_problem(error: Any, ran: bool, status: int, name: str, retry: str | None) -> None:
    answer = Problems("urn:x:", "Idempotency-Key").failed(error, ran)
    headers = {name.lower(): value for name, value in answer.headers}
    assert answer.status == status
    assert problem(status, headers, answer.body) == name
    assert headers.get("retry-after") == retry


def test_problems_are_named_under_the_base_that_you_give() -> None:
    told = json.loads(Problems("https://api.example.com/problems#", "X-Key").missing().body)
    assert told["type"] == "https://api.example.com/problems#missing-key"
    assert told["title"] == "X-Key is missing"


def test_a_first_response_that_is_lost_is_told_with_its_status() -> None:
    problems = Problems("urn:x:", "Idempotency-Key")
    told = json.loads(problems.lost(Answer(201, [], b"", "too large")).body)
    assert (told["first_status"], "too large to keep" in told["detail"]) == (201, True)
    told = json.loads(problems.lost(Answer(0, [], b"", "interrupted")).body)
    assert ("first_status" in told, "broke off" in told["detail"]) == (False, True)


def test_status_lines_for_wsgi() -> None:
    assert Answer(404, [], b"").line == "404 Not Found"
    assert Answer(299, [], b"").line == "299 Unknown"


def test_failures_and_refusals_of_the_moment_are_not_remembered() -> None:
    free = [401, 403, 407, 408, 409, 421, 422, 423, 425, 429, *range(500, 600)]
    assert [status for status in range(200, 600) if not remembered(status)] == free


# -- a program in two halves ----------------------------------------------------------------------------------------


class Ends:
    """A program of two steps around its call, that ends as `how` says, and notes that it is closed."""

    def __init__(self, how: str) -> None:
        self.how, self.steps, self.closed = how, list[Any](), False

    def program(self, runs: bool = True) -> Program:
        try:
            self.steps.append((yield "before"))
            if runs:
                self.steps.append((yield RUN))
            self.steps.append((yield "after"))
            if self.how == "raises":
                raise KeyError("no")
            if self.how == "yields":
                yield Outcome("end", None)
            return Outcome("end", None)
        finally:
            self.closed = True


class Steps:
    """A store that answers each step with its name."""

    def execute(self, op: Any) -> Any:
        return f"{op}!"


def driven(half: Program) -> Any:
    return drive(half, Steps(), SYSTEM, NO_CALL, (), {}).value


@pytest.mark.parametrize("how", ["returns", "yields", "raises"])
def test_a_program_goes_on_after_the_call_however_it_ends(how: str) -> None:
    ends = Ends(how)
    program = ends.program()
    assert drive(first_half(program), Steps(), SYSTEM, NO_CALL, (), {}) is STARTED
    assert (ends.steps, ends.closed) == (["before!"], False)
    called = Outcome("called", None)
    if how == "raises":
        with pytest.raises(KeyError):
            driven(second_half(program, called))
    else:
        assert driven(second_half(program, called)) == "end"
    assert ends.steps == ["before!", called, "after!"]
    assert ends.closed


@pytest.mark.parametrize("how", ["returns", "yields", "raises"])
def test_a_program_that_never_comes_to_the_call_is_over(how: str) -> None:
    ends = Ends(how)
    if how == "raises":
        with pytest.raises(KeyError):
            driven(first_half(ends.program(runs=False)))
    else:
        assert driven(first_half(ends.program(runs=False))) == "end"
    assert ends.closed


# -- options ---------------------------------------------------------------------------------------------------------


def app(*args: Any) -> None:
    """An application that nobody calls."""


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"methods": ()}, r"methods must name HTTP methods, such as \('POST', 'PATCH'\), not \(\)"),
        ({"methods": "POST"}, "methods must name HTTP methods.* not 'POST'"),
        ({"methods": ["PO ST"]}, "methods must name"),
        ({"methods": [1]}, "methods must name"),
        ({"paths": "/orders"}, "paths must be a function of the request, not '/orders'"),
        ({"scope": 1}, "scope must be a string or a function of the request, not 1"),
        ({"fingerprint": "body"}, "fingerprint must be True, False or a function"),
        ({"ttl": 0}, "ttl must be"),
        ({"lease": "30"}, "lease must be"),
        ({"max_wait": -1}, "max_wait must be"),
        ({"duplicates": "refuse"}, "duplicates must be 'raise' or 'wait', not 'refuse'"),
        ({"in_doubt": lambda: None}, "in_doubt must be 'raise' or 'rerun'"),
        ({"on_store_error": "ignore"}, "on_store_error must be 'refuse' or 'run'"),
        ({"remember": [99]}, r"remember must be statuses from 200 to 599 or a function of a status, not \[99\]"),
        ({"remember": ["200"]}, "remember must be"),
        ({"remember": 201}, "remember must be a collection of statuses or a function of one, not 201"),
        ({"remember": [[200]]}, r"remember must be a collection of statuses or a function of one, not \[\[200\]\]"),
        ({"max_request": 0}, "max_request must be"),
        ({"max_response": 1.5}, "max_response must be"),
        ({"header": "Idempotency Key"}, "header must be the name of a header"),
        ({"replay_header": None}, "replay_header must be the name of a header"),
        ({"problems": None}, "problems must be the beginning of a URI"),
    ],
)
def test_what_is_wrong_with_an_option_is_said_at_once(options: dict[str, Any], fault: str) -> None:
    with pytest.raises((TypeError, ValueError), match=fault):
        Keyed(app, MemoryStore(), **options)


def test_a_store_must_serve_the_world_of_the_application() -> None:
    class Plain:
        def execute(self, op: Any) -> Any:
            """Nothing."""

    assert Keyed(app, Plain())
    with pytest.raises(TypeError, match=r"one for coroutines \(resilient.stores.Threaded makes one"):
        KeyedTasks(app, Plain())
    assert KeyedTasks(app, Threaded(Plain()))
    with pytest.raises(TypeError, match="one for plain functions, or the URL of one, not 7"):
        Keyed(app, 7)
    with pytest.raises(TypeError, match="one for plain functions"):
        Keyed(app, Threaded(Plain()))


def test_the_package_has_what_it_says() -> None:
    assert integrations.IdempotencyMiddleware is asgi.IdempotencyMiddleware
    assert integrations.IdempotencyWSGIMiddleware is wsgi.IdempotencyWSGIMiddleware
    assert integrations.Request is Request
    with pytest.raises(AttributeError, match=r"resilient\.integrations.* has no attribute 'flask'"):
        integrations.flask  # type: ignore[attr-defined]  # noqa: B018  # pyright: ignore


def test_a_url_names_a_store_that_is_shared() -> None:
    one, two = Keyed(app, "memory://"), KeyedTasks(app, "memory://")
    assert one.store is two.store
    assert repr(one).startswith("Keyed(<function app")


def test_remember_is_a_function_or_statuses() -> None:
    listed = Keyed(app, MemoryStore(), remember=(200, 503))
    assert [listed._keeps(Answer(status, [], b"")) for status in (200, 201, 503)] == [True, False, True]
    asked = Keyed(app, MemoryStore(), remember=lambda status: status == 418)
    assert [asked._keeps(Answer(status, [], b"")) for status in (418, 200)] == [True, False]
    # No response and no error: something was done.
    assert asked._keeps(Answer(0, [], b"", "interrupted"))
