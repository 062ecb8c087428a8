"""What a server said about when to come back: `Retry-After` (RFC 9110, section 10.2.3), or an error's own attribute.

Nothing here raises, whatever it is given: what makes no sense, is negative or lies in the past says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient.policy import Env

__all__ = ["hint"]


def hint(outcome: Any, env: Env) -> float:
    """The seconds that an error or a response asks to wait; 0.0 if it says nothing that makes sense.

    Asked in this order: its `retry_after`, its `headers`, the headers of its `response`.
    """
    try:
        own = getattr(outcome, "retry_after", None)
        headers = getattr(outcome, "headers", None)
        response = getattr(outcome, "response", None)
        if own is None and headers is None and response is None:
            return 0.0
        asked = 0.0 if own is None else _seconds(own, env)
        for one in (headers, getattr(response, "headers", None)):
            get = getattr(one, "get", None)
            if not asked and callable(get):
                asked = _seconds(get("Retry-After") or get("retry-after"), env)
        return asked
    except Exception:
        # Properties and mappings of others may raise what they like: the error that matters is the user's.
        return 0.0


def _seconds(value: Any, env: Env) -> float:
    from datetime import timedelta

    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        text = value.strip()
        value = float(text) if text.isascii() and text.replace(".", "", 1).isdigit() else _until(text, env.clock.at())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    return float(value) if 0 < value < float("inf") else 0.0


def _until(text: str, at: float) -> float:
    from datetime import UTC
    from email.utils import parsedate_to_datetime

    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if date.tzinfo is None:  # the zone of an HTTP date is always GMT, and one of its three forms does not say so
        date = date.replace(tzinfo=UTC)
    return date.timestamp() - at
