"""Trip rules: when a closed circuit opens. Small immutable settings, joined by `|`, apart from the lifecycle.

    Consecutive(5) | FailureRate(0.5, over=100) | SlowRate(0.8, slower_than=2.0, seconds=60)

Equal settings are equal objects; one object may serve any number of breakers, each of which makes its own windows from
it, afresh for every epoch. Rules over calls cost one increment for a success; `SlowRate` and `seconds=` read the clock.
"""

from __future__ import annotations

from typing import Any, Self, cast

from resilient._window import INF, Calls, Seconds, Streak, Tally, Window
from resilient.policy import seconds as checked_seconds
from resilient.policy import whole

__all__ = ["AnyOf", "Consecutive", "FailureRate", "SlowRate", "Trip"]


_known: dict[Any, Any] = {}


class Trip:
    """The base of trip rules: immutable, comparable, joined by `|` (any of them trips)."""

    __slots__: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        # Equal settings are one object: a rule weighs nothing where a thousand breakers have the same.
        try:
            return cast(Self, _known.setdefault((cls, args, *sorted(settings.items())), super().__new__(cls)))
        except TypeError:  # what cannot be hashed cannot be a setting either: `__init__` will say so
            return super().__new__(cls)
        finally:
            if len(_known) > 1000:
                _known.clear()

    timed = False
    """Whether the rule must know the time of every call, successes included."""

    slower_than = INF
    """The seconds beyond which the rule calls a call slow."""

    @property
    def settled(self) -> float:
        """The number of calls up to which a success may trip; infinity where the window wants to hear of all."""
        return 0

    def windows(self) -> tuple[Window, ...]:
        """Fresh windows, for a new epoch."""
        raise NotImplementedError

    def tally(self) -> Tally:
        """A new epoch."""
        return Tally(self)

    def __or__(self, other: Trip) -> AnyOf:
        return AnyOf(self, other) if isinstance(other, Trip) else NotImplemented

    def _settings(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash((type(self), self._settings()))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: make another")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without it, `copy` and `pickle` would set attributes.
        return _again, (type(self), tuple(zip(self.__slots__, self._settings(), strict=True)))


def _again(kind: type[Trip], settings: tuple[tuple[str, Any], ...]) -> Trip:
    made = object.__new__(kind)
    _set(made, **dict(settings))
    return made


def _set(trip: Trip, **settings: object) -> None:
    for name, value in settings.items():
        object.__setattr__(trip, name, value)


class Consecutive(Trip):
    """Trip on `failures` failures in a row: the rule for little traffic, where a rate has too few calls.

    >>> Consecutive(5) == Consecutive(5)
    True
    """

    __slots__ = ("failures",)

    failures: int

    def __init__(self, failures: int = 5) -> None:
        _set(self, failures=whole("failures", failures))

    def windows(self) -> tuple[Window, ...]:
        return (Streak(self.failures),)

    def __repr__(self) -> str:
        return f"Consecutive({self.failures})"


class _Rate(Trip):
    """A share of bad calls over the last `over` calls or the last `seconds`."""

    __slots__ = ()

    rate: float
    over: int | None
    seconds: float | None
    minimum: int

    def _check(self, rate: float, over: int | None, seconds: float | None, minimum: int | None) -> None:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"rate must be a number, not {rate!r}")
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, not {rate!r}")
        if over is not None and seconds is not None:
            raise ValueError(f"give over or seconds, not both: over={over!r}, seconds={seconds!r}")
        if seconds is not None:
            seconds = checked_seconds("seconds", seconds)
        else:
            over = whole("over", 100 if over is None else over)
        minimum = min(10, over or 10) if minimum is None else whole("minimum", minimum)
        if over is not None and minimum > over:
            raise ValueError(f"minimum must be at most over ({over}), not {minimum!r}: the rule could never trip")
        _set(self, rate=float(rate), over=over, seconds=seconds, minimum=minimum)

    @property
    def settled(self) -> float:
        return INF if self.seconds is not None else self.minimum

    def _window(self, slower_than: float | None) -> tuple[Window, ...]:
        if self.over is not None:
            return (Calls(self.rate, self.over, self.minimum, slower_than),)
        assert self.seconds is not None
        return (Seconds(self.rate, self.seconds, self.minimum, slower_than),)

    def _span(self) -> str:
        return f"over={self.over}" if self.over is not None else f"seconds={self.seconds:g}"


class FailureRate(_Rate):
    """Trip when at least `rate` of the last `over` calls failed, or of the calls of the last `seconds`.

    `rate` is above 0 and at most 1. Exactly one of `over` (default 100) and `seconds` counts; a window in seconds moves
    in steps of a twentieth. Fewer than `minimum` calls (default 10, or `over` if that is less) never trip. Calls that
    are ignored are not in the window.
    """

    __slots__ = ("minimum", "over", "rate", "seconds")

    def __init__(
        self, rate: float = 0.5, *, over: int | None = None, seconds: float | None = None, minimum: int | None = None
    ) -> None:
        self._check(rate, over, seconds, minimum)

    @property
    def timed(self) -> bool:  # type: ignore[override]
        return self.seconds is not None

    def windows(self) -> tuple[Window, ...]:
        return self._window(None)

    def __repr__(self) -> str:
        return f"FailureRate({self.rate:g}, {self._span()}, minimum={self.minimum})"


class SlowRate(_Rate):
    """Trip when at least `rate` of the last calls took more than `slower_than` seconds, whether they failed or not.

    The other settings are those of `FailureRate`. A slow probe re-opens the circuit as a failed one does.
    """

    __slots__ = ("minimum", "over", "rate", "seconds", "slower_than")

    timed = True

    def __init__(
        self,
        rate: float = 0.5,
        *,
        slower_than: float,
        over: int | None = None,
        seconds: float | None = None,
        minimum: int | None = None,
    ) -> None:
        self._check(rate, over, seconds, minimum)
        _set(self, slower_than=checked_seconds("slower_than", slower_than))

    def windows(self) -> tuple[Window, ...]:
        return self._window(self.slower_than)

    def __repr__(self) -> str:
        return f"SlowRate({self.rate:g}, slower_than={self.slower_than:g}, {self._span()}, minimum={self.minimum})"


class AnyOf(Trip):
    """Several rules, any of which trips. Made by `|`."""

    __slots__ = ("rules",)

    rules: tuple[Trip, ...]

    def __init__(self, *rules: Trip) -> None:
        flat: list[Trip] = []
        for rule in rules:
            flat.extend(rule.rules if isinstance(rule, AnyOf) else (rule,))
        _set(self, rules=tuple(flat))

    @property
    def timed(self) -> bool:  # type: ignore[override]
        return any(rule.timed for rule in self.rules)

    @property
    def slower_than(self) -> float:  # type: ignore[override]
        return min(rule.slower_than for rule in self.rules)

    @property
    def settled(self) -> float:
        return max(rule.settled for rule in self.rules)

    def windows(self) -> tuple[Window, ...]:
        return tuple(window for rule in self.rules for window in rule.windows())

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.rules))
