"""The attempts of one call: what goes on in between, what is said at the end, and the block form.

One object belongs to one call, so nothing is shared and nothing is locked. It never holds an error from one attempt to
the next: the traceback of an error leads to frames that hold the object, and such a cycle would outlive the call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from resilient._ambient import remaining
from resilient._retry_after import hint
from resilient._stream import Opened

if TYPE_CHECKING:
    from resilient.policy import Env
    from resilient.retry import Retry

__all__ = ["Attempt", "Attempts", "Block", "PlainAttempts"]

T = TypeVar("T")

_NOTE = "resilient: attempt "


class Attempts:
    """What every run of attempts shares: is there time, the wait, and what is said at the end."""

    __slots__ = ("_answer", "_began", "_due", "_env", "_policy", "_reason", "_until", "again", "delay", "number")

    asynchronous: str | None = None
    """The name of something that must be awaited between the attempts, if there is any."""

    def __init__(self, policy: Retry, env: Env, number: int, began: float | None = None) -> None:
        self._policy, self._env, self.number = policy, env, number
        self._began = env.clock.now() if began is None else began
        self._until = None if policy.total is None else self._began + policy.total
        self._due: float | None = None
        self._reason = ""
        self._answer: Any = None
        self.again = True
        self.delay = 0.0

    def pause(self) -> None:
        """Wait until the next attempt may begin, and count it."""
        if self.delay > 0:
            self._env.clock.sleep(self.delay)
            if self._early() > 0:
                self._env.clock.sleep(self._early())
        self.number += 1

    async def apause(self) -> None:
        """Wait until the next attempt may begin, and count it."""
        if self.delay > 0:
            await self._env.clock.asleep(self.delay)
            if self._early() > 0:
                await self._env.clock.asleep(self._early())
        self.number += 1

    def _early(self) -> float:
        # A coarse timer may fire early (16 ms on Windows), and a server that said when is not asked before
        # (dotnet/extensions#7001).
        return 0.0 if self._due is None else self._due - self._env.clock.now()

    def result(self) -> Any:
        """What the caller gets."""
        return self._answer

    def fit(self, delay: float, outcome: Any) -> float | None:
        """How long to wait after `outcome`, at least `delay` seconds; None if that leaves no time for an attempt."""
        policy, self._due = self._policy, None
        if policy.retry_after:
            asked = min(hint(outcome, self._env), policy.retry_after)
            if asked and asked >= delay:
                delay = asked
                self._due = self._env.clock.now() + delay
        left = remaining()
        if self._until is not None:
            own = self._until - self._env.clock.now()
            left = own if left is None or own < left else left
        if left is not None and delay >= left:
            self._reason = f"; a wait of {delay:.3g} s does not fit into the {max(0.0, left):.3g} s that are left"
            return None
        return delay

    def go_on(self, delay: float, error: Exception | None) -> None:
        """Make another attempt after `delay` seconds."""
        self.delay = delay
        if self._env.sinks:
            from resilient.events import Retrying

            self._env.emit(Retrying(self._policy.name or "Retry", self.number, delay, error))

    def pass_on(self, error: Exception) -> bool:
        """The error is not one to retry: it is the caller's."""
        self.again = False
        if self.number > 1:
            self._reason = "; not retried"
            self.give_up(error)
        return False

    def give_up(self, error: Exception | None) -> None:
        """Go on no more; the error says how much was tried."""
        self.again = False
        elapsed = self._env.clock.now() - self._began
        if error is not None:
            of = f" of {self._policy.attempts}" if self._policy.stop is None else ""
            _note(error, f"{_NOTE}{self.number}{of}, {elapsed:.1f} s{self._reason}")
        if self._env.sinks:
            from resilient.events import GaveUp

            self._env.emit(GaveUp(self._policy.name or "Retry", self.number, elapsed, error))


def _note(error: Exception, text: str) -> None:
    """Add a note in place of an earlier one: an error may be raised again and again, by this call or another."""
    try:
        notes: list[Any] = getattr(error, "__notes__", [])
        if notes:
            error.__notes__ = [one for one in notes if not str(one).startswith(_NOTE)]
        error.add_note(text)
    except Exception:
        pass  # an error that takes no notes (a frozen dataclass) is still the one that the caller gets


class PlainAttempts(Attempts):
    """The attempts of one call, by the settings of the policy alone."""

    __slots__ = ()

    def failed(self, error: Exception) -> bool:
        """An attempt raised: False if the error goes to the caller."""
        return self._next(error, error) if self._policy._wants(error) else self.pass_on(error)

    def returned(self, value: Any) -> None:
        """An attempt returned: it may be made again all the same."""
        if self._policy._approves(value):
            self.again, self._answer = False, value
        else:
            self.refused(value)

    def refused(self, value: Any) -> None:
        """An attempt returned what `until` refused."""
        if not self._next(None, value.item if type(value) is Opened else value):
            self._answer = value

    async def afailed(self, error: Exception) -> bool:
        return self.failed(error)

    async def areturned(self, value: Any) -> None:
        self.returned(value)

    def _next(self, error: Exception | None, outcome: Any) -> bool:
        policy = self._policy
        if self.number < policy.attempts:
            delay = self.fit(policy._backoff(self.number, self._env), outcome)
            if delay is not None:
                self.go_on(delay, error)
                return True
        self.give_up(error)
        return False


class Attempt:
    """One turn of a block: `with attempt:` around what may fail. `number` counts from 1."""

    __slots__ = ("_run", "_value", "number", "used")

    def __init__(self, run: Any) -> None:
        self._run, self.number, self.used = run, run.number, False
        self._value: tuple[Any, ...] = ()

    def result(self, value: T) -> T:
        """Have `until` judge `value` when the block ends; returns it. What is not shown here is not judged."""
        self._value = (value,)
        return value

    def __enter__(self) -> Attempt:
        self.used = True
        return self

    async def __aenter__(self) -> Attempt:
        self.used = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            value, self._value = self._value, ()
            if value:
                self._run.returned(value[0])
            else:
                self._run.again = False
            return False
        if not isinstance(error, Exception):
            self._run.again = False
            return False
        handled: bool = self._run.failed(error)
        return handled

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            value, self._value = self._value, ()
            if value:
                await self._run.areturned(value[0])
            else:
                self._run.again = False
            return False
        if not isinstance(error, Exception):
            self._run.again = False
            return False
        handled: bool = await self._run.afailed(error)
        return handled


class Block:
    """A loop over attempts, in an environment. Each loop has its own: several tasks may share one `Retry`."""

    __slots__ = ("_env", "_policy")

    def __init__(self, policy: Retry, env: Env) -> None:
        self._policy, self._env = policy, env

    def __iter__(self) -> Iterator[Attempt]:
        run = self._policy._start(self._env, None, (), {}, 0)
        if run.asynchronous:
            raise TypeError(f"{run.asynchronous} is async: say `async for` and `async with attempt`")
        return _Loop(run)

    def __aiter__(self) -> AsyncIterator[Attempt]:
        return _Loop(self._policy._start(self._env, None, (), {}, 0))


class _Loop:
    """One loop. No async generator: one that is left early waits for the garbage collector, and trio warns of it."""

    __slots__ = ("_last", "_run")

    def __init__(self, run: Any) -> None:
        self._run = run
        self._last: Attempt | None = None

    def __iter__(self) -> _Loop:
        return self

    def __aiter__(self) -> _Loop:
        return self

    def __next__(self) -> Attempt:
        run, last = self._run, self._last
        if last is not None and not last.used:
            run.again = False
        if not run.again:
            run.result()
            raise StopIteration
        run.pause()
        self._last = Attempt(run)
        return self._last

    async def __anext__(self) -> Attempt:
        run, last = self._run, self._last
        if last is not None and not last.used:
            run.again = False
        if not run.again:
            run.result()
            raise StopAsyncIteration
        await run.apause()
        self._last = Attempt(run)
        return self._last
