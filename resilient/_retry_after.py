"""What a server said about when to come back: `Retry-After` (RFC 9110, section 10.2.3), or an error's own attribute."""

from __future__ import annotations

from datetime import UTC, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient.policy import Env

__all__ = ["hint"]


def hint(outcome: Any, env: Env) -> float:
    """The seconds that an error or a response asks to wait; 0.0 if it says nothing that makes sense."""
    own = getattr(outcome, "retry_after", None)
    if own is not None:
        return _seconds(own, env)
    response = getattr(outcome, "response", None)
    for one in (outcome, response):
        headers = getattr(one, "headers", None)
        get = getattr(headers, "get", None)
        if callable(get):
            value = get("Retry-After") or get("retry-after")
            if value is not None:
                return _seconds(value, env)
    return 0.0


def _seconds(value: Any, env: Env) -> float:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        value = _parsed(value.strip(), env)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    return float(value) if 0 < value < float("inf") else 0.0


def _parsed(text: str, env: Env) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    from email.utils import parsedate_to_datetime

    try:
        # A date without a zone is read as UTC, as HTTP dates are.
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return date.timestamp() - env.clock.at()
