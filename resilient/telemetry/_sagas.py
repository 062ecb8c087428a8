"""A sink that counts what sagas do, on the instruments of an OpenTelemetry meter.

Promises: the instruments are made once, attributes are the names of sagas and steps and how they ended, and of each so
many at most. Does not: decide or keep anything else. Safe from any thread and task, as the meter is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from opentelemetry import metrics
except ImportError as error:
    raise ImportError("SagaMetrics needs opentelemetry-api: pip install 'resilient-kit[otel]'") from error

from resilient.events import Compensated, LeaseLost, SagaEnded, StepDone
from resilient.policy import whole

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

    from resilient.events import Event

__all__ = ["SagaMetrics"]

# By default all would be in the first of the SDK's buckets, which are for milliseconds.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)

_OTHER = "_OTHER"
"""What OpenTelemetry calls a name that is not told apart."""


class SagaMetrics:
    """Metrics of sagas: a sink for `Env.subscribe`, or `Env(sinks=[...])`.

    | metric | unit | attributes |
    |---|---|---|
    | `resilient.saga.steps` | `{step}` | `saga`, `step`, `outcome`: ok, error |
    | `resilient.saga.compensations` | `{compensation}` | `saga`, `step`, `outcome`: ok, error |
    | `resilient.saga.duration` | `s` | `saga`, `outcome`: done, aborted, stuck |
    | `resilient.saga.recovered` | `{saga}` | `saga`, `outcome`: done, aborted, stuck |
    | `resilient.saga.stuck` | `{saga}` | `saga` |
    | `resilient.saga.lease_lost` | `{lease}` | `saga` |

    `meter` is a meter of OpenTelemetry; by default the one named `resilient` of the global provider, which may be set
    later. Only the first `names` names of sagas, and as many of steps of each saga, are told apart: all others count as
    `_OTHER`, so that a name made from data does not make a time series each.
    """

    def __init__(self, meter: Meter | None = None, *, names: int = 200) -> None:
        self._most = whole("names", names)
        self._names: dict[str, set[str]] = {}
        if meter is None:
            from resilient import __version__

            meter = metrics.get_meter("resilient", __version__)
        elif not isinstance(meter, metrics.Meter):
            raise TypeError(f"meter must be a meter of OpenTelemetry, not {meter!r}")
        counter = meter.create_counter
        self._steps = counter("resilient.saga.steps", "{step}", "Steps of sagas that ended.")
        self._undone = counter(
            "resilient.saga.compensations", "{compensation}", "Steps of sagas that were undone, or could not be."
        )
        self._duration = meter.create_histogram(
            "resilient.saga.duration",
            "s",
            "How long sagas took, in the process that brought them to their end.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._recovered = counter(
            "resilient.saga.recovered", "{saga}", "Sagas that another run brought to their end than began them."
        )
        self._stuck = counter("resilient.saga.stuck", "{saga}", "Sagas that came to need a person.")
        self._lost = counter("resilient.saga.lease_lost", "{lease}", "Sagas that another process took over meanwhile.")

    def __call__(self, event: Event, /) -> None:
        """Count `event`, if it is one of a saga."""
        if isinstance(event, StepDone):
            self._steps.add(1, self._of(event))
        elif isinstance(event, Compensated):
            self._undone.add(1, self._of(event))
        elif isinstance(event, SagaEnded):
            saga = self._saga(event.policy)
            how = {"saga": saga, "outcome": event.state}
            if event.seconds is not None:
                self._duration.record(event.seconds, how)
            if event.recovered:
                self._recovered.add(1, how)
            if event.state == "stuck":
                self._stuck.add(1, {"saga": saga})
        elif isinstance(event, LeaseLost) and event.saga:
            self._lost.add(1, {"saga": self._saga(event.policy)})

    def _of(self, event: StepDone | Compensated) -> dict[str, str]:
        saga, step = self._saga(event.policy), event.step
        known = self._names[saga]
        if step not in known:
            if len(known) < self._most:
                known.add(step)
            else:
                step = _OTHER
        return {"saga": saga, "step": step, "outcome": "ok" if event.error is None else "error"}

    def _saga(self, name: str) -> str:
        if name not in self._names:
            if len(self._names) >= self._most:
                name = _OTHER
            self._names.setdefault(name, set())
        return name
