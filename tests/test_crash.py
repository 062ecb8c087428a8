"""A caller that is stopped dead before any of its steps, on every backend: who comes next gets what is promised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilient import RERUN, Idempotent, InDoubt, claim
from tests._proofs import BACKENDS, Dead, Fatal, close, opened, record, url_of

LEASE = 0.02
IN_DOUBT = ("raise", "rerun", "reconcile")


class Boom(Exception):
    """A failure that is not remembered."""


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url_of(request.param, tmp_path, request.getfixturevalue)


class Shop:
    """An effect, and the idempotent function that has it: the same for a caller that dies and for the next one."""

    def __init__(self, in_doubt: str, fails: bool) -> None:
        self.effects: list[int] = []
        self.asked = 0
        self.fails = fails
        self.in_doubt: Any = self.reconcile if in_doubt == "reconcile" else in_doubt

    def reconcile(self, order: str) -> str:
        self.asked += 1
        return "charged" if self.effects else RERUN

    def guard(self, store: Any, step: Callable[[str], None], lease: float) -> Callable[[str], str]:
        @Idempotent(store, key="order", lease=lease, in_doubt=self.in_doubt, name="charge")
        def charge(order: str) -> str:
            self.charge(step)
            return "charged"

        return charge

    def aguard(self, store: Any, step: Callable[[str], None], lease: float) -> Callable[[str], Any]:
        @Idempotent(store, key="order", lease=lease, in_doubt=self.in_doubt, name="charge")
        async def charge(order: str) -> str:
            self.charge(step)
            return "charged"

        return charge

    def charge(self, step: Callable[[str], None]) -> None:
        step("before the effect")
        if self.fails:
            raise Boom
        self.effects.append(claim().attempt)
        step("after the effect")


def _nothing(name: str) -> None:
    pass


def expected(step: str, in_doubt: str, fails: bool) -> tuple[Any, list[int]]:
    """What the next caller gets, and the attempts that had their effect in the end, if the first died before `step`."""
    if step in ("before Claim", "end") or step == "after Release":
        return ("charged" if step != "end" or fails else "replayed"), [1]
    if step == "after Finish":
        return "replayed", [1]
    happened = [1] if step in ("after the effect", "before Finish") and not fails else []
    if in_doubt == "raise":
        return InDoubt, happened
    if in_doubt == "rerun":
        return "charged", [*happened, 2]
    return "charged", happened or [2]


STEPS = ["before Claim", "after Claim", "before the effect", "after the effect", "before Finish", "after Finish", "end"]
FAILING = ["before Claim", "after Claim", "before the effect", "before Release", "after Release", "end"]


@pytest.mark.parametrize("in_doubt", IN_DOUBT)
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_dead_before_every_step(url: str, in_doubt: str, fails: bool) -> None:
    store = opened(url)
    for at, step in enumerate(FAILING if fails else STEPS):
        shop, fatal = Shop(in_doubt, fails), Fatal(store, at)
        key = f"o-{at}"
        first = shop.guard(fatal, fatal.step, LEASE)
        with pytest.raises(Boom if step == "end" and fails else Dead if step != "end" else Finished):
            first(key)
            raise Finished
        assert fatal.done == (FAILING if fails else STEPS)[:at]
        record(store, key, running=False)
        shop.fails = False
        policy_call = shop.guard(store, _nothing, 30.0)
        answer, effects = expected(step, in_doubt, fails)
        if answer is InDoubt:
            for _ in range(2):
                with pytest.raises(InDoubt) as caught:
                    policy_call(key)
                assert (caught.value.attempt, caught.value.key) == (1, key)
        else:
            assert policy_call(key) == "charged"
            assert policy_call(key) == "charged"
            assert record(store, key).state == "done"
        assert shop.effects == effects
        assert shop.asked == (in_doubt == "reconcile" and step not in ("before Claim", "after Release", *STEPS[5:]))
    store.close()


class Finished(Exception):
    """The call came to its end."""


@pytest.mark.parametrize("in_doubt", IN_DOUBT)
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_a_task_dead_before_every_step(url: str, in_doubt: str, fails: bool) -> None:
    async def main() -> None:
        store = opened(url)
        for at, step in enumerate(FAILING if fails else STEPS):
            shop, fatal = Shop(in_doubt, fails), Fatal(store, at)
            key = f"o-{at}"
            first = shop.aguard(fatal, fatal.step, LEASE)
            with pytest.raises(Boom if step == "end" and fails else Dead if step != "end" else Finished):
                await first(key)
                raise Finished
            assert fatal.done == (FAILING if fails else STEPS)[:at]
            record(store, key, running=False)
            shop.fails = False
            second = shop.aguard(store, _nothing, 30.0)
            answer, effects = expected(step, in_doubt, fails)
            if answer is InDoubt:
                with pytest.raises(InDoubt) as caught:
                    await second(key)
                assert (caught.value.attempt, caught.value.key) == (1, key)
            else:
                assert await second(key) == "charged"
                assert await second(key) == "charged"
            assert shop.effects == effects
        store.close()
        await close(store)

    asyncio.run(main())
