"""Where the library meets frameworks: `asgi` and `wsgi` have the middleware for the `Idempotency-Key` header.

No framework is imported here: a middleware speaks the protocol, and so serves all that do.
"""
