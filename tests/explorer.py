"""Every way in which two or three callers of one key can meet: all interleavings, over the memory store.

The program of an idempotent call is a generator that yields what it wants done, so it can be driven one step at a time,
by hand, and stopped anywhere. `Explorer` takes every step that could come next, in every state that it finds: a step of
each caller, a fault of one, a heartbeat, a lease or a result whose time is over, a late write. States that differ in
nothing that matters are one. In each, what the library promises is checked; a `Broken` shows the way there.

Generators cannot be copied. A caller is therefore known by what it was answered so far, and made anew from that; it is
a `Node` of an automaton, found once for each local state.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import Context
from functools import partial
from typing import Any, NamedTuple, cast

from msgspec.structs import astuple

from resilient._codec import Json, form_of
from resilient._drive import RUN, Ask, Cut, Last, Outcome, Settle, Sleep, Wait
from resilient._once import RERUN, Hold, Tally, once
from resilient.errors import InDoubt, StoreError
from resilient.policy import Env
from resilient.stores import MemoryStore
from resilient.stores._ops import Abandon, Acquired, AnyOp, Busy, Claim, Completed, Doubtful, Finish, Release, Renew
from resilient.stores.memory import _Row

__all__ = ["KINDS", "Broken", "Explorer", "Tamper"]

KEY = "k"
LEASE, TTL = 1000.0, 1e9

KINDS: dict[str, frozenset[str]] = {
    "succeeds": frozenset(),
    "fails": frozenset({"fail"}),
    "declines": frozenset({"decline"}),
    "crashes": frozenset({"crash"}),
    "is paused": frozenset({"pause"}),
    "is paused and fails": frozenset({"pause", "fail"}),
    "is cancelled": frozenset({"cut"}),
    "is unlucky": frozenset({"store"}),
}
"""What a caller may do: fail, be stopped dead, outlive its lease, be cancelled, or meet a store that fails."""


class Boom(Exception):
    """A failure that is not remembered."""


class Declined(Exception):
    """One that is."""


class Cancel(BaseException):
    """A cancellation."""


class Broken(AssertionError):
    """A promise is broken: which, and on which way."""

    def __init__(self, promise: str, way: list[str]) -> None:
        super().__init__("\n  ".join([promise, *way]))
        self.promise, self.way = promise, way


class State(NamedTuple):
    """Everything, at one moment. Tuples have an entry for each caller."""

    row: tuple[Any, ...] | None
    now: float
    nodes: tuple[Node, ...]
    alive: tuple[bool, ...]
    begun: tuple[bool, ...]
    beating: tuple[bool, ...]
    watch: tuple[int, ...]  # 0: does not; 1: watches; 2: was rung
    luck: tuple[int, ...]  # faults that are left
    pending: tuple[Any, ...]  # of a mutant: a claim that was read and not written
    late: tuple[AnyOp, ...]  # writes under way, whose callers wait no longer
    effects: tuple[int, ...]  # whose function came to its end, since the last result was forgotten
    kept: bytes | None  # the result that was stored first
    top: int  # the largest fence so far
    forgotten: bool  # a result's time was over


class Node:
    """The local state of one caller: what it wants done next, or how it ended."""

    __slots__ = ("end", "fences", "history", "holds", "lost", "next", "number", "shape", "step")

    def __init__(self, history: tuple[Any, ...], step: Any, end: tuple[Any, ...] | None) -> None:
        self.history, self.step, self.end = history, step, end
        self.next: dict[Any, Node] = {}
        self.shape: Any = None
        self.fences: tuple[int, ...] = ()
        self.holds: tuple[str, int] = ("", 0)
        self.lost = 0
        self.number = -1  # the same for all that differ in their fences only


class _Keeper:
    """A keeper of heartbeats that does as it is told."""

    beating = False

    def begin(self, hold: Hold) -> None:
        pass

    def end(self, hold: Hold) -> bool:
        return self.beating


class _Clock:
    def __init__(self) -> None:
        self.time = 1.0

    def now(self) -> float:
        return self.time

    at = now


class _Bells:
    rung = False

    def ring(self, key: str) -> None:
        self.rung = True

    def watch(self, key: str, *, task: bool) -> None:
        raise AssertionError("nobody watches for real")


_OWNER, _MARK, _ATTEMPT, _FENCE, _AWAITED, _EXPIRES, _RESULT = map(
    _Row.__struct_fields__.index, ("owner", "mark", "attempt", "fence", "awaited", "expires", "result")
)
# What is the same in every state, or does not matter for what comes.
_DULL = frozenset(
    ("how", "form", "remember", "keeps", "store", "keeper", "env", "hold", "fingerprint", "label", "stored", "who")
) | frozenset(("key", "rounds", "pause", "nap", "outer", "leave"))
_TIMES = frozenset({"lease_left", "since", "lease", "ttl", "key", "label", "fingerprint"})


class Tamper:
    """What stands between a program and its driver: nothing, but in a mutant."""

    def step(self, step: Any) -> Any:
        """What is done in place of `step`."""
        return step

    def answer(self, step: Any, answer: Any) -> Any:
        """What is told in place of `answer`."""
        return answer


class Explorer:
    """All ways of `kinds` of callers under these settings. `store` and `tamper` are where mutants go in.

    `forget`: results are forgotten, too. `luck`: how many faults the store may have for each unlucky caller. `late`:
    writes may arrive when their caller has long given up on them.
    """

    def __init__(
        self,
        kinds: tuple[str, ...],
        in_doubt: str,
        duplicates: str = "wait",
        *,
        store: type[MemoryStore] = MemoryStore,
        tamper: Tamper | None = None,
        forget: bool = False,
        luck: int = 1,
        late: bool = True,
    ) -> None:
        self.kinds, self.in_doubt, self.forget = [KINDS[kind] for kind in kinds], in_doubt, forget
        self._luck, self._late = luck, late
        self.duplicates, self._tamper = duplicates, tamper or Tamper()
        self._clock, self._bells = _Clock(), _Bells()
        self.store = store(cast(Any, self._clock))
        self.store._bells = cast(Any, self._bells)
        self._two_steps = getattr(store, "two_steps", False)
        form = form_of(Json(), lambda: "", (Declined,))
        assert form is not None
        self._form = form
        self._env = Env(clock=cast(Any, self._clock))
        self._interned: dict[Any, Node] = {}
        self._numbers: dict[Any, int] = {}
        self._way: list[tuple[int | None, tuple[Any, ...]]] = []
        self.values = [self._form.keep(f"value of {caller}") for caller in range(len(kinds))]
        self.declined = self._form.keep_error(Declined("no"))

    # -- callers -----------------------------------------------------------------------------------------------------

    def _node(self, caller: int, history: tuple[Any, ...]) -> Node:
        """The caller that was answered all of `history`."""
        how = Tally()
        how.name, how.ttl, how.lease, how.max_wait, how.on_store_error = "pay", TTL, LEASE, None, "refuse"
        how.duplicates = self.duplicates
        how.in_doubt = _reconcile if self.in_doubt == "reconcile" else self.in_doubt
        hold = Hold(KEY, KEY, f"owner {caller}")
        keeper = _Keeper()
        program = once(how, self._form, (Declined,), None, self.store, cast(Any, keeper), self._env, hold, "", "")
        tamper = self._tamper
        context = Context()
        step: Any = None
        end: tuple[Any, ...] | None = None
        try:
            step = tamper.step(context.run(program.send, None))
            for event in history:
                if event == "lost":
                    hold.lost, how.lost = True, how.lost + 1
                    continue
                answer, keeper.beating = _answer(event)
                step = tamper.step(context.run(program.send, tamper.answer(step, answer)))
        except StopIteration as stop:
            step = stop.value
        except Exception as error:
            step = Outcome(None, error)
        if type(step) is Outcome:
            ended = step.error
            end = ("value", step.value) if ended is None else ("error", type(ended).__name__)
            if isinstance(ended, InDoubt):
                end = (*end, ended.attempt, ended.result)
        node = Node(history, step, end)
        if end is None:
            fences: list[int] = [hold.fence]
            shape: list[Any] = [hold.attempt, hold.lost]
            inner: Any = program
            while inner is not None and hasattr(inner, "gi_frame"):
                frame = inner.gi_frame
                shape += (frame.f_code.co_name, frame.f_lasti)
                for name, value in sorted(frame.f_locals.items()):
                    if name not in _DULL:
                        shape += (name, _shape(value, fences))
                inner = inner.gi_yieldfrom
            node.shape, node.fences = tuple(shape), tuple(fences)
            node.holds = (hold.owner, hold.fence)
        else:
            node.shape = end
        node.lost = how.lost
        context.run(program.close)
        node.number = self._numbers.setdefault((caller, node.shape, node.lost), len(self._numbers))
        return self._interned.setdefault((node.number, node.fences), node)

    def _advance(self, caller: int, node: Node, event: Any) -> Node:
        known = node.next.get(event)
        if known is None:
            known = node.next[event] = self._node(caller, (*node.history, event))
        return known

    # -- the store ---------------------------------------------------------------------------------------------------

    def _load(self, state: State) -> None:
        store = self.store
        self._clock.time = state.now
        self._bells.rung = False
        store._fence = state.top
        store._rows.clear()
        store._ends.clear()
        if state.row is not None:
            store._rows[KEY] = row = _Row(*state.row)
            if row.expires is not None:
                store._ends.append((row.expires, KEY))

    def _apply(self, state: State, op: AnyOp) -> tuple[State, Any]:
        """`state` after the store has carried out `op`, and the store's reply."""
        self._load(state)
        reply = self.store.execute(op)
        row = self.store._rows.get(KEY)
        after = None if row is None else astuple(row)
        return self._written(state, op, reply, after), reply

    def _written(self, state: State, op: Any, reply: Any, after: tuple[Any, ...] | None) -> State:
        self._judge(state, op, reply, after)
        top, kept, watch = state.top, state.kept, state.watch
        if type(reply) is Acquired:
            top = max(top, reply.fence)
        if type(op) is Finish and reply is True and kept is None:
            kept = op.result
        if self._bells.rung:
            watch = tuple(2 if one else 0 for one in watch)
        return state._replace(row=after, top=top, kept=kept, watch=watch)

    def _judge(self, state: State, op: Any, reply: Any, after: tuple[Any, ...] | None) -> None:
        """What must hold of each operation by itself."""
        was = state.row
        if was is not None and was[_EXPIRES] is not None and was[_EXPIRES] <= state.now:
            was = None
        if was is not None:
            mine = was[_OWNER] == op.owner
            taken = type(op) is Claim and op.take_over and was[_RESULT] is None and was[_MARK] <= state.now
            if not mine and not taken and (after is None or _steady(after) != _steady(was)):
                raise _Fault("a record was changed by one who does not own it")
            if was[_RESULT] is not None and (after is None or after[_RESULT] != was[_RESULT]):
                raise _Fault("a result that was stored is gone, or another")
        again = type(reply) is Acquired and was is not None and was[_OWNER] == op.owner and was[_FENCE] == reply.fence
        if type(reply) is Acquired and not again and reply.fence <= state.top:
            raise _Fault("a fence did not grow")

    # -- what can come next ------------------------------------------------------------------------------------------

    def _next(self, state: State) -> Iterator[tuple[tuple[Any, ...], Callable[[], State]]]:
        row = state.row
        for caller, node in enumerate(state.nodes):
            if state.alive[caller] and node.end is None:
                for label, make in self._moves(state, caller, node):
                    yield (caller, *label), make
        for number, op in enumerate(state.late):
            rest = state.late[:number] + state.late[number + 1 :]
            yield ("late", op), partial(self._arrived, state._replace(late=rest), op)
        if row is not None and row[_RESULT] is None and row[_MARK] > state.now and self._may_end(state, row):

            def over() -> State:
                # By now whoever waited for that lease asks again, rung or not.
                parked = [
                    type(node.step) is Wait and watch for node, watch in zip(state.nodes, state.watch, strict=True)
                ]
                watch = tuple(2 if one else was for one, was in zip(parked, state.watch, strict=True))
                return state._replace(now=row[_MARK], watch=watch)

            yield ("the lease is over",), over
        if self.forget and row is not None and row[_RESULT] is not None and not state.forgotten:
            yield (
                ("the result is forgotten",),
                lambda: state._replace(now=row[_EXPIRES], kept=None, effects=(), forgotten=True),
            )

    def _arrived(self, state: State, op: AnyOp) -> State:
        return self._apply(state, op)[0]

    def _may_end(self, state: State, row: tuple[Any, ...]) -> bool:
        """A lease ends while its owner lives only if the owner is paused: others renew it."""
        caller = int(row[_OWNER].split()[1])
        node = state.nodes[caller]
        holding = state.alive[caller] and node.end is None and node.holds == (row[_OWNER], row[_FENCE])
        return not holding or "pause" in self.kinds[caller]

    def _moves(self, state: State, caller: int, node: Node) -> Iterator[tuple[tuple[Any, ...], Callable[[], State]]]:
        step, can, luck = node.step, self.kinds[caller], state.luck[caller]

        def told(event: Any, after: State = state, **changes: Any) -> State:
            nodes = _put(after.nodes, caller, self._advance(caller, node, event))
            return after._replace(nodes=nodes, **changes)

        def unlucky() -> tuple[int, ...]:
            return _put(state.luck, caller, luck - 1)

        def dead(after: State = state) -> State:
            late = after.late
            if after.beating[caller] and self._late:
                late = (*late, Renew(KEY, *node.holds, LEASE))
            return after._replace(
                alive=_put(after.alive, caller, False), beating=_put(after.beating, caller, False), late=late
            )

        if "crash" in can:
            yield ("dies",), dead
        if state.beating[caller]:

            def arrives() -> State:
                after, renewed = self._apply(state, Renew(KEY, *node.holds, LEASE))
                after = after._replace(beating=_put(after.beating, caller, False))
                return after if renewed else told("lost", after)

            yield ("heartbeat arrives",), arrives
        if step is RUN:
            if not state.begun[caller]:
                yield ("begins",), lambda: state._replace(begun=_put(state.begun, caller, True))
                return
            beating = state.beating[caller]
            if "pause" in can and not beating and not node.shape[1]:
                yield ("sends a heartbeat",), lambda: state._replace(beating=_put(state.beating, caller, True))
            over = _put(state.begun, caller, False)
            if "fail" in can or "decline" in can:
                how = "fails" if "fail" in can else "declines"
                yield (how,), lambda: told((how, beating), begun=over)
                return
            done = state._replace(effects=(*state.effects, caller), begun=over)
            yield ("has its effect",), lambda: told(("value", caller, beating), done)
            if "crash" in can:
                yield ("has its effect and dies",), lambda: dead(done)
            if "cut" in can and luck:
                yield ("is cancelled in the middle",), lambda: told(("cancelled", beating), begun=over, luck=unlucky())
                yield (
                    ("has its effect and is cancelled",),
                    lambda: told(("cancelled", beating), done, luck=unlucky()),
                )
        elif type(step) is Ask:
            answer = ("value", state.effects[0], False) if state.effects else ("rerun", False)
            yield ("asks", answer[0]), lambda: told(answer)
            if "store" in can and luck:
                yield ("asks: fails",), lambda: told(("fails", False), luck=unlucky())
            if "cut" in can and luck:
                yield ("asks: is cancelled",), lambda: told(("cancelled", False), luck=unlucky())
        elif type(step) is Settle:
            if not state.beating[caller]:
                yield ("settled",), lambda: told(None)
        elif type(step) in (Sleep, Wait):
            watch = state.watch[caller]
            if type(step) is Sleep:
                yield ("slept",), lambda: told(None)
            elif not watch:
                yield ("begins to watch",), lambda: told(None, watch=_put(state.watch, caller, 1))
            elif watch == 2:
                yield ("is woken",), lambda: told(None, watch=_put(state.watch, caller, 1))
            if "cut" in can and luck:
                yield ("is cancelled as it waits",), lambda: told(("cut",), luck=unlucky())
        else:
            last = type(step) is Last
            op: Any = step.op if type(step) is Last else step
            if self._two_steps and type(op) is Claim:
                yield from self._claim_in_two(state, caller, op, told)
                return

            def sent() -> State:
                after, reply = self._apply(state, op)
                return told(reply, after)

            yield (op,), sent
            if "crash" in can:
                yield (op, "and dies"), lambda: dead(self._apply(state, op)[0])
                if self._late:
                    yield (op, "and dies before it arrives"), lambda: dead(state._replace(late=(*state.late, op)))
            events: list[Any] = []
            if luck and "cut" in can and not last:
                events.append(("cut",))
            if luck and "store" in can:
                yield (op, "fails"), lambda: told(("error", False), luck=unlucky())
                events.append(("error", True))

            def faulty(event: Any, done: bool, late: bool) -> State:
                after = self._apply(state, op)[0] if done else state
                return told(event, after, late=(*state.late, op) if late else state.late, luck=unlucky())

            for event in events:
                yield (op, event[0], "done"), partial(faulty, event, True, False)
                yield (op, event[0], "not done"), partial(faulty, event, False, False)
                if self._late and not state.late:
                    yield (op, event[0], "done late"), partial(faulty, event, False, True)

    def _claim_in_two(
        self, state: State, caller: int, op: Claim, told: Callable[..., State]
    ) -> Iterator[tuple[tuple[Any, ...], Callable[[], State]]]:
        """The mutant that reads, and then writes what it made of it."""
        pending = state.pending[caller]
        if pending is None:

            def read() -> State:
                self._load(state)
                reply = self.store.execute(op)
                row = self.store._rows.get(KEY)
                after = None if row is None else astuple(row)
                return state._replace(pending=_put(state.pending, caller, (reply, after, after != state.row)))

            yield ("claim: reads",), read
            return
        reply, after, changed = pending

        def write() -> State:
            self._bells.rung = False
            done = self._written(state, op, reply, after if changed else state.row)
            return told(reply, done, pending=_put(state.pending, caller, None))

        yield ("claim: writes",), write

    # -- what must hold ----------------------------------------------------------------------------------------------

    def _check(self, state: State) -> None:
        row = state.row
        if len(state.effects) > 1 and (
            self.in_doubt == "raise" or (self.in_doubt == "reconcile" and not any("pause" in can for can in self.kinds))
        ):
            raise _Fault("two completed effects")
        for caller, node in enumerate(state.nodes):
            can = self.kinds[caller]
            if node.end is None:
                # Whoever waits has been rung if there is nothing left to wait for.
                parked = state.alive[caller] and type(node.step) is Wait and state.watch[caller] == 1
                if parked and (row is None or (row[_RESULT] is not None)):
                    raise _Fault(f"{caller} waits, and nobody rings")
                continue
            what, detail = node.end[0], node.end[1]
            if what == "value" and not state.forgotten and state.kept != self._form.keep(detail):
                raise _Fault(f"{caller} got {detail!r}, which is not the result that is stored")
            if (what, detail) == ("error", "Declined") and not state.forgotten and state.kept != self.declined:
                raise _Fault(f"{caller} got an error that is to be remembered, and is not stored")
            if detail == "InDoubt" and node.end[3] is not ... and node.lost != 1:
                raise _Fault(f"{caller} lost its lease, and it was counted {node.lost} times")
            if detail == "Cancel" and "cut" not in can:
                raise _Fault(f"{caller} was never cancelled")
            if detail == "StoreError" and "store" not in can:
                raise _Fault(f"{caller} got the error of another's store")
            if detail == "InFlight" and self.duplicates != "raise":
                raise _Fault(f"{caller} was to wait")
            if what == "error" and detail not in _ENDS:
                raise _Fault(f"{caller} ended by {node.end}")
            if detail == "InDoubt" and not _doubtful(self.kinds, self.in_doubt):
                raise _Fault(f"{caller} got InDoubt, and there is nothing to doubt")

    def _ended(self, state: State) -> bool:
        """Whether every caller has ended, and the key too: done, free, or in doubt."""
        over = all(node.end is not None or not alive for node, alive in zip(state.nodes, state.alive, strict=True))
        row = state.row
        if not over:
            return False
        if row is None:
            return True
        if row[_RESULT] is None and not _doubtful(self.kinds, "raise"):
            raise _Fault("everybody ended well, and the key is not free")
        return row[_RESULT] is not None or row[_MARK] <= state.now

    def run(self) -> int:
        """Visit all states; how many there are. `Broken` at the first that breaks a promise."""
        collects = gc.isenabled()
        gc.disable()  # States are many, and hold no cycles.
        try:
            return self._run()
        finally:
            if collects:
                gc.enable()

    def _run(self) -> int:
        n = len(self.kinds)
        no = (False,) * n
        luck = tuple(self._luck if "store" in can else int("cut" in can) for can in self.kinds)
        nodes = tuple(self._node(caller, ()) for caller in range(n))
        start = State(None, 1.0, nodes, (True,) * n, no, no, (0,) * n, luck, (None,) * n, (), (), None, 0, False)
        numbers = {_canonical(start): 0}
        self._way = [(None, ())]
        todo = deque([(0, start)])
        before: list[list[int]] = [[]]
        ended: list[int] = []
        while todo:
            number, state = todo.popleft()
            label: tuple[Any, ...] = ()
            try:
                over = self._ended(state)
                if over:
                    ended.append(number)
                for label, make in self._next(state):
                    over = True
                    after = make()
                    known = numbers.setdefault(_canonical(after), len(before))
                    if known == len(before):
                        before.append([])
                        self._way.append((number, label))
                        self._check(after)
                        todo.append((known, after))
                    before[known].append(number)
                label = ()
                if not over:
                    raise _Fault("nothing can happen any more, and not all have ended")
            except _Fault as fault:
                raise Broken(str(fault), [*self._path(number), _text(label)]) from None
        reached = set(ended)
        while ended:
            for number in before[ended.pop()]:
                if number not in reached:
                    reached.add(number)
                    ended.append(number)
        for number in range(len(before)):
            if number not in reached:
                raise Broken("from here there is no way to an end", self._path(number))
        return len(before)

    def _path(self, number: int | None) -> list[str]:
        way: list[str] = []
        while number is not None:
            number, label = self._way[number]
            way.append(_text(label))
        return way[-2::-1]


class _Fault(Exception):
    pass


_ENDS = {"Boom", "Cancel", "Declined", "InDoubt", "InFlight", "StoreError"}


def _doubtful(kinds: list[frozenset[str]], in_doubt: str) -> bool:
    """Whether any of these callers can leave a key in doubt."""
    return any(can & {"crash", "pause", "cut", "store"} for can in kinds)


def _text(label: tuple[Any, ...]) -> str:
    return " ".join(map(str, label))


def _reconcile() -> Any:
    raise AssertionError("the explorer answers for it")


def _put(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def _steady(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A record without the note that somebody waits for it, which everybody may make."""
    return (*row[:_AWAITED], *row[_AWAITED + 1 :])


def _answer(event: Any) -> tuple[Any, bool]:
    """What to send for `event`, made anew as programs change it; and whether a heartbeat is under way."""
    if type(event) is not tuple:
        return event, False
    match event:
        case ("value", caller, beating):
            return Outcome(f"value of {caller}", None), beating
        case ("rerun", beating):
            return Outcome(RERUN, None), beating
        case ("fails", beating):
            return Outcome(None, Boom("boom")), beating
        case ("declines", beating):
            return Outcome(None, Declined("no")), beating
        case ("cancelled", beating):
            return Outcome(None, Cancel()), beating
        case ("cut",):
            return Cut(Cancel()), False
        case ("error", maybe):
            return StoreError("the store fails", maybe_written=maybe), False
        case _:
            raise AssertionError(event)


def _shape(value: Any, fences: list[int]) -> Any:
    """A local variable of a program as plain data, its fence apart."""
    if value is None or value is ... or isinstance(value, (bool, int, str, bytes)):
        return value
    if isinstance(value, float):
        return "an instant"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Outcome):
        return "outcome", _shape(value.value, fences), _shape(value.error, fences)
    if isinstance(value, StoreError):
        return "StoreError", value.maybe_written
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, Cut):
        return "cut"
    if value is RERUN:
        return "RERUN"
    if isinstance(value, (Acquired, Completed, Busy, Doubtful, Claim, Finish, Release, Abandon)):
        fences.append(getattr(value, "fence", 0))
        names = [name for name in value.__struct_fields__ if name not in _TIMES and name != "fence"]
        return type(value).__name__, *(getattr(value, name) for name in names)
    raise AssertionError(f"a local variable of the program that the explorer does not know: {value!r}")


def _canonical(state: State) -> Any:
    """What matters of `state`. Fences count by their order only, instants by whether they are over."""
    row, now = state.row, state.now
    fences = {0, state.top}
    for node in state.nodes:
        fences.update(node.fences)
    late: list[Any] = []
    for op in state.late:
        fences.add(getattr(op, "fence", 0))
    pending: Any = state.pending
    if row is not None:
        fences.add(row[_FENCE])
    for one in pending:
        if one is not None and one[1] is not None:
            fences.add(one[1][_FENCE])
    rank = {fence: number for number, fence in enumerate(sorted(fences))}
    late = [(type(op).__name__, op.owner, rank[getattr(op, "fence", 0)]) for op in cast(Any, state.late)]

    def flat(row: tuple[Any, ...] | None) -> Any:
        if row is None:
            return None
        over = row[_MARK] <= now, row[_EXPIRES] is not None and row[_EXPIRES] <= now
        return row[_OWNER], row[_ATTEMPT], rank[row[_FENCE]], row[_AWAITED], row[_RESULT], over

    return (
        flat(row),
        tuple([node.number if alive else -1 for node, alive in zip(state.nodes, state.alive, strict=True)]),
        tuple([rank[fence] for node in state.nodes for fence in node.fences]),
        state.begun,
        state.beating,
        state.watch,
        state.luck,
        tuple([None if one is None else (type(one[0]).__name__, flat(one[1]), one[2]) for one in pending])
        if any(pending)
        else None,
        tuple(sorted(late)),
        state.effects,
        state.kept,
        rank[state.top],
        state.forgotten,
    )
