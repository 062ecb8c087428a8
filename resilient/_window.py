"""What a trip rule remembers of the calls of one epoch: windows over the last calls, or over the last seconds.

Pure: numbers in, a reason to trip (or None) out. A window is given every failure, and of the successes only those
that matter to it: with windows over calls a success is one increment of `Tally.n`, made by the shell, and failures keep
their position number, so that memory is O(failures in the window) and time O(1) amortized.
Not thread-safe by itself: the lifecycle calls everything here under its lock, except that increment.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["PASS", "Calls", "Permit", "Probe", "Seconds", "Streak", "Tally", "Window"]

INF = float("inf")
# A window over seconds moves in steps of this part of it. Resilience4j and Failsafe use ten slices; a finer step
# makes the forgetting smoother, and 21 small lists are all that it costs.
SLICES = 20


class Permit:
    """What lets one call in. It belongs to the epoch that issued it: by identity, so that no number can be confused.

    `n` counts successes; `cold` asks the shell to settle every success instead of only counting it; a call that takes
    more than `slower_than` seconds is settled in any case.
    """

    __slots__ = ("cold", "n", "slower_than")

    def __init__(self, cold: bool, slower_than: float = INF) -> None:
        self.n = 0
        self.cold, self.slower_than = cold, slower_than


class Probe(Permit):
    """The permit of one call in half-open; worth nothing from the instant `until` on."""

    __slots__ = ("until",)

    def __init__(self, until: float) -> None:
        super().__init__(True)
        self.until = until


PASS = Permit(False)
"""The permit of calls that pass while nothing is recorded (disabled, or refused in shadow only). Nobody reads it."""


class Window(Protocol):
    """What one rule remembers of an epoch."""

    def note(self, total: int, successes: int, failed: bool, elapsed: float, now: float) -> str | None:
        """Take in one call that ended, the `total`th of the epoch; the reason to trip, or None."""
        ...

    def share(self, total: int, now: float) -> float | None:
        """The share of bad calls that the rule judges by; None for a rule without a share."""
        ...


class Rules(Protocol):
    """What an epoch asks of its trip rules."""

    @property
    def slower_than(self) -> float: ...

    @property
    def settled(self) -> float:
        """The number of calls up to which every success must be noted, not only counted."""
        ...

    def windows(self) -> tuple[Window, ...]: ...


class Streak:
    """Trips on `limit` failures with no success between them."""

    __slots__ = ("limit", "mark", "streak")

    def __init__(self, limit: int) -> None:
        self.limit, self.streak, self.mark = limit, 0, 0

    def note(self, total: int, successes: int, failed: bool, elapsed: float, now: float) -> str | None:
        if not failed:
            return None
        # The number of successes tells whether there was one since the last failure: successes need not report.
        self.streak = self.streak + 1 if successes == self.mark else 1
        self.mark = successes
        return f"{self.streak} failures in a row" if self.streak >= self.limit else None

    def share(self, total: int, now: float) -> float | None:
        return None


class Calls:
    """Trips when at least `rate` of the last `over` calls were bad: failed, or (`slower_than`) slow.

    A success can only lower the share: the call that leaves a full window was at best a success too. So it is judged
    at bad calls, and once when `minimum` is reached.
    """

    __slots__ = ("gone", "marks", "minimum", "over", "rate", "slower_than")

    def __init__(self, rate: float, over: int, minimum: int, slower_than: float | None) -> None:
        self.rate, self.over, self.minimum, self.slower_than = rate, over, minimum, slower_than
        # The positions of bad calls, of which the first `gone` have left the window. Most breakers never have one.
        self.marks: list[int] | None = None
        self.gone = 0

    def note(self, total: int, successes: int, failed: bool, elapsed: float, now: float) -> str | None:
        if failed if self.slower_than is None else elapsed > self.slower_than:
            if self.marks is None:
                self.marks = []
            self.marks.append(total)
        if self.marks is None or total < self.minimum or self.share(total, now) < self.rate:
            return None
        return _reason(len(self.marks) - self.gone, min(total, self.over), self.slower_than)

    def share(self, total: int, now: float) -> float:
        marks, gone = self.marks, self.gone
        if not marks:
            return 0.0
        oldest, end = total - self.over, len(marks)
        while gone < end and marks[gone] <= oldest:
            gone += 1
        if 2 * gone > end + 16:
            # What is moved is less than what goes, so a mark costs O(1) over its life.
            del marks[:gone]
            gone, end = 0, end - gone
        self.gone = gone
        return (end - gone) / (self.over if oldest > 0 else total)


class Seconds:
    """Trips when at least `rate` of the calls of the last `seconds` were bad: failed, or (`slower_than`) slow.

    Calls are counted in twenty slices of time, and forgotten a slice at a time: memory does not grow with the traffic.
    Judged at bad calls, and whenever the number of calls climbs to `minimum`.
    """

    __slots__ = ("bad", "calls", "minimum", "rate", "slices", "slower_than", "width")

    def __init__(self, rate: float, seconds: float, minimum: int, slower_than: float | None) -> None:
        self.rate, self.width, self.minimum, self.slower_than = rate, seconds / SLICES, minimum, slower_than
        self.calls = self.bad = 0
        self.slices: list[list[int]] = []  # [number of the slice, calls, bad calls]

    def note(self, total: int, successes: int, failed: bool, elapsed: float, now: float) -> str | None:
        bad = failed if self.slower_than is None else elapsed > self.slower_than
        number = int(now / self.width)
        # Threads may bring their instants out of order: a late one goes into the newest slice.
        if not self.slices or self.slices[-1][0] < number:
            self._forget(number)
            self.slices.append([number, 0, 0])
        newest = self.slices[-1]
        newest[1] += 1
        newest[2] += bad
        self.calls += 1
        self.bad += bad
        if not (bad or self.calls == self.minimum) or self.calls < self.minimum or self.bad / self.calls < self.rate:
            return None
        return _reason(self.bad, self.calls, self.slower_than)

    def share(self, total: int, now: float) -> float:
        self._forget(int(now / self.width))
        return self.bad / self.calls if self.calls else 0.0

    def _forget(self, number: int) -> None:
        while self.slices and self.slices[0][0] <= number - SLICES:
            _, calls, bad = self.slices.pop(0)
            self.calls -= calls
            self.bad -= bad


def _reason(bad: int, calls: int, slower_than: float | None) -> str:
    return f"{bad} of {calls} calls {'failed' if slower_than is None else f'took more than {slower_than:g} s'}"


class Tally(Permit):
    """One closed epoch: how its calls ended, and the windows of its rules. It is the permit of all of its calls."""

    __slots__ = ("_made", "_rules", "failures", "slow")

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules.settled > 0, rules.slower_than)
        self._rules = rules
        self._made: tuple[Window, ...] = ()
        self.failures = self.slow = 0

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows of the rules, made when first something is to be remembered: most breakers never see it."""
        if not self._made:
            self._made = self._rules.windows()
        return self._made

    @property
    def total(self) -> int:
        """The calls that ended."""
        return self.n + self.failures

    def note(self, failed: bool, elapsed: float, now: float) -> str | None:
        """Take in one call that ended (a success is in `n` already); the reason to trip, or None."""
        successes = self.n
        self.failures += failed
        self.slow += elapsed > self.slower_than
        total = successes + self.failures
        reason: str | None = None
        settled = self._rules.settled
        if self.failures or self.slow or settled == INF:
            for window in self.windows:
                reason = window.note(total, successes, failed, elapsed, now) or reason
        # A flag, not an equality: two threads may pass a minimum together, and one of them must still see it.
        self.cold = total < settled
        return reason

    def share(self, now: float) -> float:
        """The share of failures that the rules judge by (without such a rule: of the whole epoch)."""
        total = self.total
        for window in self._made:
            share = None if getattr(window, "slower_than", None) is not None else window.share(total, now)
            if share is not None:
                return share
        return self.failures / total if total else 0.0
