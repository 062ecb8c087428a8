"""What a process of its own does to a PostgreSQL store; a module of its own too, so that it imports little."""

from __future__ import annotations

import os
from typing import Any

from resilient.stores import Acquired, Claim, PostgresStore

__all__ = ["claim_in_a_process", "first_claim"]


def first_claim(url: str, name: str, barrier: Any) -> bool:
    """Whether a new store, which begins when the others do, gets the key."""
    made = PostgresStore(url, prefix=name)
    barrier.wait()
    try:
        return type(made.execute(Claim("k", f"owner-{os.getpid()}-{id(made)}", 30.0))) is Acquired
    finally:
        made.close()


def claim_in_a_process(url: str, name: str, barrier: Any, answers: Any) -> None:
    """Tell `answers` whether this process got the key."""
    answers.put(first_claim(url, name, barrier))
