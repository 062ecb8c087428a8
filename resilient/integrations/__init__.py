"""Where the library meets frameworks: the middleware for the `Idempotency-Key` header, for ASGI and for WSGI.

No framework is imported here: a middleware speaks the protocol, and so serves all that do. What is here is imported
when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resilient.integrations._http import Request as Request
    from resilient.integrations.asgi import IdempotencyMiddleware as IdempotencyMiddleware
    from resilient.integrations.wsgi import IdempotencyWSGIMiddleware as IdempotencyWSGIMiddleware

__all__ = ["IdempotencyMiddleware", "IdempotencyWSGIMiddleware", "Request"]

_HOME = {"IdempotencyMiddleware": "asgi", "IdempotencyWSGIMiddleware": "wsgi", "Request": "_http"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        import importlib

        if name not in _HOME:
            raise AttributeError(f"module 'resilient.integrations' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"resilient.integrations.{_HOME[name]}"), name)
        globals()[name] = value
        return value
