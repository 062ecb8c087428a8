"""HTTP for idempotency keys: a request as a key, a response as bytes, and what a client is told that gets no response.

Promises: the same for ASGI and WSGI. The header is read as draft-ietf-httpapi-idempotency-key-header-07 has it, as a
string of structured fields (RFC 9651), and problems are written as RFC 9457 has them. Data from a store is read as
data: what is no response of ours is a `StoreError`, never half a response. Pure: no I/O, no clock. Safe anywhere.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, TypeAlias

import msgspec

from resilient._binding import digest
from resilient.errors import InFlight, KeyReused, ResilientError, StoreError

__all__ = ["Answer", "AnswerForm", "Headers", "Problems", "Recorder", "Request", "fingerprint_of", "read_key"]

Headers: TypeAlias = "list[tuple[str, str]]"

VERSION = 1
LONGEST = 255
TOO_LARGE = "too large"
INTERRUPTED = "interrupted"

# Of one connection, not of the response (RFC 9110, section 7.6.1; `keep-alive` and `proxy-connection` are older).
HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)


class Request:
    """A request, as your functions see it: the same under ASGI and WSGI.

    `headers` has the names in small letters; values that came several times are joined by commas. `query` is as it was
    sent. `raw` is the scope (ASGI) or the environ (WSGI), with what other middleware has put there. `body` is there for
    `scope` and `fingerprint`; for `paths` it is empty, since it has not been read.
    """

    __slots__ = ("body", "headers", "method", "path", "query", "raw")

    def __init__(self, method: str, path: str, query: str, headers: Mapping[str, str], raw: Mapping[str, Any]) -> None:
        self.method, self.path, self.query, self.headers, self.raw = method, path, query, headers, raw
        self.body = b""

    def __repr__(self) -> str:
        return f"<request {self.method} {self.path}>"


def joined(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers of an ASGI scope by name."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


# -- the key ---------------------------------------------------------------------------------------------------------

# RFC 9651, sections 4.2.5 and 4.2.3.2. Parameters mean nothing here, and are to be ignored.
_TEXT = r'(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*'
_PARAMETER = rf'; *[a-z*][a-z0-9_.*-]*(?:="{_TEXT}"|=[-A-Za-z0-9*:/?@%.!#$&+^_`|~=\x27]+)?'
_ITEM = re.compile(f'"({_TEXT})"(?:{_PARAMETER})*')
# What clients send that take the header for plain text: UUIDs, tokens, base64.
_BARE = re.compile(r'[^\s",;\\]+', re.ASCII)
_ESCAPED = re.compile(r'\\(["\\])')


def read_key(value: str, *, strict: bool) -> str:
    """The key in a header. `ValueError` that says what is wrong with it, in words for the client."""
    text = value.strip(" \t")
    item = _ITEM.fullmatch(text)
    if item is not None:
        key = _ESCAPED.sub(r"\1", item[1])
    elif strict:
        raise ValueError('it must be a string in double quotes, such as "8e03978e-40d5-43dd-bc93-6894a57f9324"')
    elif _BARE.fullmatch(text) and text.isascii() and text.isprintable():
        key = text
    else:
        raise ValueError(
            "it must be one key: a string in double quotes, or visible ASCII characters without quotes, commas, "
            "semicolons and backslashes"
        )
    if not 1 <= len(key) <= LONGEST:
        raise ValueError(f"it must have from 1 to {LONGEST} characters, and it has {len(key)}")
    return key


def fingerprint_of(request: Request) -> str:
    """What must be equal for requests with one key: method, path, query, content type and body."""
    parts = (request.method, request.path, request.query, request.headers.get("content-type", ""))
    return str(digest(*(part.encode("utf-8", "surrogatepass") for part in parts), request.body).hexdigest())


# -- the response ----------------------------------------------------------------------------------------------------


class Answer:
    """A response. `lost` says why there is no body where there was one: "too large", or "interrupted".

    `fault`: what keeps it from being kept.
    """

    __slots__ = ("body", "fault", "headers", "lost", "status")

    def __init__(self, status: int, headers: Headers, body: bytes, lost: str = "") -> None:
        self.status, self.headers, self.body, self.lost = status, headers, body, lost
        self.fault: Exception | None = None

    @property
    def line(self) -> str:
        """The status as WSGI wants it."""
        try:
            return f"{self.status} {HTTPStatus(self.status).phrase}"
        except ValueError:
            return f"{self.status} Unknown"

    def wire_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers as ASGI wants them."""
        return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers]


class _Kept(msgspec.Struct, omit_defaults=True):
    v: int
    status: int
    headers: list[tuple[str, str]] = []
    body: str = ""
    lost: str = ""


_decode = msgspec.json.Decoder(_Kept).decode
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUES = re.compile(r"[^\x00\r\n]*")


class AnswerForm:
    """How a response is kept and comes back: JSON with a version, the body in base64."""

    def keep(self, answer: Answer) -> bytes:
        """`answer` as bytes, without the headers that belong to its connection alone. Raises its `fault`."""
        if answer.fault is not None:
            raise answer.fault
        if answer.lost:
            return msgspec.json.encode(_Kept(VERSION, answer.status, lost=answer.lost))
        named = {part.strip().lower() for name, value in answer.headers if name.lower() == "connection"
                 for part in value.split(",")}  # fmt: skip
        headers = [pair for pair in answer.headers if pair[0].lower() not in HOP_BY_HOP | named]
        body = base64.b64encode(answer.body).decode()
        return msgspec.json.encode(_Kept(VERSION, answer.status, headers, body))

    def outcome(self, data: bytes) -> tuple[Answer, None]:
        """The response that is in `data`. `StoreError` for anything that `keep` did not make."""
        try:
            kept = _decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StoreError(f"the stored response cannot be read: {error}") from None
        if kept.v != VERSION:
            raise StoreError(f"the stored response was written by another version ({kept.v}, this is {VERSION})")
        if kept.lost:
            if kept.lost not in (TOO_LARGE, INTERRUPTED):
                raise StoreError("the stored response cannot be read: nobody knows why it has no body")
            return Answer(kept.status, [], b"", kept.lost), None
        try:
            body = base64.b64decode(kept.body, validate=True)
        except ValueError as error:
            raise StoreError(f"the stored response cannot be read: its body: {error}") from None
        if not 200 <= kept.status <= 599:
            raise StoreError(f"the stored response cannot be read: its status is {kept.status}")
        for name, value in kept.headers:
            # Whoever can write to the store shall not write a second response after this one.
            if not (_NAME.fullmatch(name) and _VALUES.fullmatch(value) and _latin(value)):
                raise StoreError(f"the stored response cannot be read: its header {name[:40]!r}")
        return Answer(kept.status, kept.headers, body), None


def _latin(text: str) -> bool:
    return all(character <= "\xff" for character in text)


class Recorder:
    """A response on its way out: recorded up to a limit, and the last of it held back.

    What is held back is what would complete the length that the response declares; without a declared length the
    protocol's own end does that, which the servers send when the application's part is over.
    """

    __slots__ = ("_body", "_held", "_left", "_limit", "headers", "started", "status", "too_large")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.started = self.too_large = False
        self.status = 0
        self.headers: Headers = []

    def start(self, status: int, headers: Headers) -> None:
        """The response begins, or (WSGI, after an error) begins anew."""
        self.started, self.too_large = True, False
        self.status, self.headers = status, headers
        self._body, self._held = bytearray(), bytearray()
        self._left: int | None = None
        for name, value in headers:
            if name.lower() == "content-length" and value.isdecimal():
                self._left = int(value)

    def hold(self) -> None:
        """Hold back all of the body: it is there already, so that nobody waits for it."""
        self._left = 0

    def add(self, chunk: bytes) -> bytes | None:
        """One more part of the body: what of it may go out now, or None if it must wait for the end."""
        if not self.too_large:
            self._body += chunk
            if len(self._body) > self._limit:
                self.too_large = True
                self._body.clear()
        if self._left is None:
            return chunk
        self._left -= len(chunk)
        if self._left > 0:
            return chunk
        self._held += chunk
        return None

    def last(self, chunk: bytes) -> bytes:
        """The last part of the body, perhaps empty: what is still to go out, once the response is stored."""
        out = self.add(chunk)
        return bytes(self._held) if out is None else out

    def answer(self, *, whole: bool) -> Answer:
        """What is to be kept; not `whole` if the response was broken off."""
        if whole and not self.too_large:
            return Answer(self.status, self.headers, bytes(self._body))
        return Answer(self.status, [], b"", TOO_LARGE if whole else INTERRUPTED)


# -- problems --------------------------------------------------------------------------------------------------------


class Problems:
    """What the client is told, as problem+json. `base` goes before the name of each problem and makes its type."""

    def __init__(self, base: str, header: str) -> None:
        self._base, self._header = base, header

    def missing(self) -> Answer:
        """400: the header is required."""
        return self._problem(400, "missing-key", f"{self._header} is missing", "This operation requires the header.")

    def malformed(self, fault: str) -> Answer:
        """400: the header, or the body, cannot be read."""
        return self._problem(400, "malformed-key", f"{self._header} cannot be read", f"The header: {fault}.")

    def cut_off(self) -> Answer:
        """400: the body ended before its time."""
        return self._problem(400, "incomplete-request", "The request is incomplete", "Its body ended early.")

    def too_large(self, limit: int) -> Answer:
        """413: the body is larger than what is compared."""
        detail = f"With the header {self._header}, a request may have at most {limit} bytes. Nothing was done."
        return self._problem(413, "request-too-large", "The request is too large", detail)

    def lost(self, first: Answer) -> Answer:
        """409: the request was carried out, and there is no response to show."""
        why = "was too large to keep" if first.lost == TOO_LARGE else "broke off before its end"
        detail = f"A request with this key was carried out; its response {why}. It is not carried out again."
        return self._problem(409, "response-not-kept", "The first response is not available", detail, first.status)

    def failed(self, error: ResilientError, ran: bool) -> Answer:
        """What the engine says; `ran`: the application was called, and this is about how that ended."""
        match error:
            case InFlight():
                detail = "A request with this key is being carried out. Come back for its response."
                answer = self._problem(409, "in-progress", f"A request with this {self._header} is running", detail)
                answer.headers.append(("Retry-After", str(max(1, math.ceil(error.retry_after)))))
            case KeyReused():
                detail = "A key belongs to one request. Send another key with another request."
                answer = self._problem(422, "key-reused", f"{self._header} was used for another request", detail)
            case StoreError() if not ran:
                detail = "The keys are out of reach. Nothing was done; send the request again, with the same key."
                answer = self._problem(503, "store-unavailable", "The keys are not available", detail)
                answer.headers.append(("Retry-After", "1"))
            case StoreError():
                detail = "The request was carried out, and its response could not be stored. Do not send it anew."
                answer = self._problem(500, "response-not-stored", "The response could not be stored", detail)
            case _:
                detail = "A request with this key began, and nobody knows how it ended. It is not carried out again."
                answer = self._problem(409, "in-doubt", "The outcome of the first request is unknown", detail)
        return answer

    def _problem(self, status: int, name: str, title: str, detail: str, first: int = 0) -> Answer:
        told: dict[str, object] = {"type": self._base + name, "title": title, "status": status, "detail": detail}
        if first:
            told["first_status"] = first
        body = json.dumps(told).encode()
        headers = [("Content-Type", "application/problem+json"), ("Content-Length", str(len(body)))]
        return Answer(status, headers, body)


Remember: TypeAlias = "Callable[[int], bool] | Iterable[int]"


_OF_THE_MOMENT = frozenset(
    (
        401,  # Unauthorized: the token has expired; the same request comes again with a good one.
        403,  # Forbidden: the right may be granted, and this was said to him who asked then.
        407,  # Proxy Authentication Required: as 401.
        408,  # Request Timeout: the request did not arrive in time, and shall come again (RFC 9110, 15.5.9).
        409,  # Conflict: with what the resource is just now.
        421,  # Misdirected Request: for another connection (15.5.20).
        422,  # Unprocessable Content: what the draft answers for a key that was used for something else.
        423,  # Locked: for as long as somebody else has it (RFC 4918).
        425,  # Too Early (RFC 8470).
        429,  # Too Many Requests (RFC 6585).
    )
)


def remembered(status: int) -> bool:
    """What is remembered by default: all but refusals of the moment, and the server's failures.

    They say that nothing was done, for a reason that passes: whoever comes again with the same key, as a client should,
    must not get them for as long as keys are kept.
    """
    return status < 500 and status not in _OF_THE_MOMENT
