"""What the library tells others about itself: metrics of sagas, for OpenTelemetry.

    SYSTEM.subscribe(SagaMetrics())

Promises: no more attributes than names in the code, never an id; nothing is computed where no sink is subscribed. Does
not: export; that is what the OpenTelemetry SDK and its exporters are for, without which nothing is counted. An event
costs about as much as a counter of the SDK, some microseconds. Needs the extra `otel`; safe from any thread and task.
"""

from __future__ import annotations

from resilient.telemetry._sagas import SagaMetrics

__all__ = ["SagaMetrics"]
