"""The errors: their tree, their text, and that they travel between processes."""

from __future__ import annotations

import pickle  # noqa: TID251
from typing import Any

import pytest

import resilient
from resilient import errors


@pytest.mark.parametrize("kind", [errors.BudgetSpent, errors.BulkheadFull, errors.DeadlineExceeded, errors.RateLimited])
def test_rejections_name_the_policy_and_say_when_to_try_again(kind: type[errors.Rejected]) -> None:
    error = kind("payments", 1.5)
    assert (error.policy, error.retry_after) == ("payments", 1.5)
    assert str(error) == f"payments: {kind.reason}; retry after 1.5 s"
    assert str(kind("payments")) == f"payments: {kind.reason}"
    assert issubclass(kind, errors.ResilientError)


def test_a_timeout_is_the_builtin_one_too() -> None:
    error = errors.CallTimeout("payments", 2.0)
    assert isinstance(error, TimeoutError)
    assert str(error) == "payments: no answer within 2 s"


def test_errors_are_pickled() -> None:
    rejected = pickle.loads(pickle.dumps(errors.BulkheadFull("b", 2.0)))
    timeout = pickle.loads(pickle.dumps(errors.CallTimeout("t", 3.0)))
    assert (type(rejected), rejected.policy, rejected.retry_after) == (errors.BulkheadFull, "b", 2.0)
    assert (type(timeout), timeout.policy, timeout.seconds) == (errors.CallTimeout, "t", 3.0)


def test_the_lists_of_names_are_sorted_and_public() -> None:
    assert errors.__all__ == sorted(errors.__all__)
    assert set(errors.__all__) <= set(resilient.__all__)


def test_a_part_of_what_is_stuck_says_of_which_saga() -> None:
    stuck = errors.SagaStuck("compensations failed for good", [ValueError(1), OSError(2)], "order", "o-1")
    part: Any = stuck.subgroup(ValueError)
    assert (part.saga, part.id, str(part)) == (
        "order",
        "o-1",
        "saga order (o-1): compensations failed for good (1 of them)",
    )
