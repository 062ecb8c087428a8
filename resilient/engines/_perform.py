"""Carrying out an order, in whatever process an engine chose: the step's function is found, called and guarded here.

Promises: the function has its step's key (`step_key`), its time limit and the saga's as an ambient deadline; a plain
function runs in a thread and is waited for, since it cannot be stopped; a coroutine is cancelled and awaited. Does not:
retry (the engine does). Safe from any thread and loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

from resilient._ambient import deadline
from resilient._guard import kind_of
from resilient._run import guarded, step_key
from resilient._settle import apply_async
from resilient.engines._wire import Order, bound, unfit
from resilient.errors import CallTimeout, DeadlineExceeded
from resilient.policy import Env

__all__ = ["perform", "perform_sync"]


def _tell(env: Env, order: Order, error: BaseException | None) -> None:
    if env.sinks:
        from resilient.events import Compensated, StepDone

        event = StepDone if order.undo is None else Compensated
        env.emit(event(order.saga, order.id, order.name, error))


async def perform(order: Order, env: Env) -> bytes:
    """Call what `order` names, and return its value in an envelope; or raise what it raised."""
    try:
        function, args, kwargs, keep = bound(order)
        if order.left is not None and order.left <= 0:
            raise DeadlineExceeded(order.saga)
        run = guarded(function, None, order.timeout, env) if order.timeout is not None else function
        token = step_key.set(order.key)
        try:
            data = keep(await _limited(order, env, kind_of(function) == "coro", run, args, kwargs))
        finally:
            step_key.reset(token)
    except BaseException as error:
        _tell(env, order, error)
        raise
    _tell(env, order, None)
    return data


async def _limited(order: Order, env: Env, is_async: bool, run: Any, args: Any, kwargs: Any) -> Any:
    call = (apply_async, run, args, kwargs) if is_async else (_in_thread, run, args, kwargs)
    if order.left is None:
        return await call[0](*call[1:])
    from resilient._aio import within

    def late() -> CallTimeout:
        return CallTimeout(order.saga, order.limit or 0.0)

    with deadline(order.left, clock=env.clock):
        if not is_async:
            return await call[0](*call[1:])
        return await within(env.clock, env.clock.now() + order.left, late, *call)


async def _in_thread(run: Any, args: Any, kwargs: Any) -> Any:
    """Call a plain function in a thread, to its end, cancelled or not: what it did is done."""
    task = asyncio.ensure_future(asyncio.to_thread(run, *args, **kwargs))
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            continue
    value = task.result()
    # A plain function may return an awaitable, as a lambda around a coroutine function does.
    return await value if hasattr(value, "__await__") else value


def perform_sync(order: Order, env: Env) -> bytes:
    """The same, in this thread."""
    try:
        function, args, kwargs, keep = bound(order)
        if kind_of(function) == "coro":
            raise unfit(function)
        if order.left is not None and order.left <= 0:
            raise DeadlineExceeded(order.saga)
        run = guarded(function, None, order.timeout, env) if order.timeout is not None else function
        token = step_key.set(order.key)
        try:
            if order.left is None:
                value = run(*args, **kwargs)
            else:
                with deadline(order.left, clock=env.clock):
                    value = run(*args, **kwargs)
        finally:
            step_key.reset(token)
        data = keep(value)
    except BaseException as error:
        _tell(env, order, error)
        raise
    _tell(env, order, None)
    return data
