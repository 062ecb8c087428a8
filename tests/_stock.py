"""A process with a stock pybreaker, told line by line what to do: `python -m tests._stock URL NAMESPACE`."""

from __future__ import annotations

import sys

import pybreaker
import redis


def fail() -> None:
    raise ConnectionError("stock")


def act(breaker: pybreaker.CircuitBreaker, command: str) -> str:
    try:
        if command == "fail":
            breaker.call(fail)
        elif command == "ok":
            breaker.call(str)
        elif command in ("open", "close", "half_open"):
            getattr(breaker, command)()
    except Exception as error:
        return f"{breaker.current_state} {type(error).__name__}"
    return f"{breaker.current_state} ok"


def main() -> None:
    client = redis.Redis.from_url(sys.argv[1])
    storage = pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, client, namespace=sys.argv[2])
    breaker = pybreaker.CircuitBreaker(fail_max=2, reset_timeout=1000, state_storage=storage)
    for line in sys.stdin:
        print(act(breaker, line.strip()), flush=True)


if __name__ == "__main__":
    main()
