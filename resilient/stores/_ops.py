"""What a store can be asked, and what it answers: operations and replies as data.

Every operation is judged by the store's own clock, in one atomic step. Only the owner that holds the fence may renew,
finish, release or abandon. Repeating an operation with the same owner is harmless, so that a write of which nobody
knows whether it happened can simply be sent again. Frozen `msgspec` structs: immutable, and made in a tenth of a
microsecond.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeAlias, TypeVar

from msgspec import Struct

__all__ = [
    "Abandon",
    "Acquired",
    "Append",
    "Begin",
    "Busy",
    "Claim",
    "Claimed",
    "Completed",
    "Doubtful",
    "Finish",
    "Forget",
    "History",
    "Op",
    "Page",
    "Purge",
    "Read",
    "Record",
    "Release",
    "Renew",
    "Scan",
    "State",
]

R_co = TypeVar("R_co", covariant=True)

State: TypeAlias = Literal["running", "in doubt", "done"]
"""Of a record: its owner works on it; its owner's lease has ended without a word; it has its result."""


class Acquired(Struct, frozen=True, gc=False):
    """The key is the caller's until its lease ends. `attempt` above 1: an earlier one never said how it ended.

    `fence` is larger than each number that this key had before.
    """

    fence: int
    attempt: int


class Completed(Struct, frozen=True, gc=False):
    """The key has its result."""

    fence: int
    attempt: int
    fingerprint: str
    result: bytes


class Busy(Struct, frozen=True, gc=False):
    """Another owner holds the key, for at least `lease_left` more seconds."""

    fence: int
    attempt: int
    fingerprint: str
    lease_left: float


class Doubtful(Struct, frozen=True, gc=False):
    """The lease of attempt number `attempt` ended `since` seconds ago, and nobody knows how far the attempt came."""

    fence: int
    attempt: int
    fingerprint: str
    since: float


Claimed: TypeAlias = Acquired | Completed | Busy | Doubtful
"""What may come of a `Claim`."""


class Record(Struct, frozen=True, kw_only=True):
    """One key, as it is now. Instants are wall time of the store's clock, in seconds since the epoch.

    `label` is the text that `Claim` gave. `mark` is the end of the lease or, once done, the instant of that.
    `expires_at` is when a result is forgotten; None while there is none.
    """

    key: str
    state: State
    owner: str
    fence: int
    attempt: int
    fingerprint: str
    label: str
    began_at: float
    mark: float
    expires_at: float | None
    result: bytes | None


class Page(Struct, frozen=True):
    """Some records, in no order that means anything. `after` goes into the next `Scan`; empty at the end."""

    records: tuple[Record, ...]
    after: str


class Op(Struct, Generic[R_co], frozen=True, gc=False):
    """The base of all operations. `Op[R]` answers with an `R`."""


class Claim(Op[Claimed], frozen=True, gc=False):
    """Take the key, if nobody has it: one atomic step, whatever else happens.

    - No record, or a result whose time is over: `Acquired`, attempt 1.
    - A result: `Completed`.
    - The owner itself, again: `Acquired` with the fence and attempt that it has; its lease starts anew.
    - Another owner with a lease that runs: `Busy`. With `awaited` the record remembers that somebody waits, so that its
      end wakes those who `watch` (where waking costs something at the server).
    - Another owner whose lease is over: `Doubtful`; or with `take_over`, `Acquired` with the next attempt's number and
      a larger fence.

    `lease` is in seconds. `fingerprint` and `label` are kept as they are.
    """

    key: str
    owner: str
    lease: float
    fingerprint: str = ""
    label: str = ""
    take_over: bool = False
    awaited: bool = False


class Renew(Op[bool], frozen=True, gc=False):
    """Start the lease anew, `lease` seconds from now. False: the key is somebody else's, or done, or gone."""

    key: str
    owner: str
    fence: int
    lease: float


class Finish(Op[bool], frozen=True, gc=False):
    """Keep the result for `ttl` seconds. False: the key is somebody else's, or gone; nothing has changed.

    True as well where this owner has finished already: the first result stays. A lease that is over does not matter
    while nobody has taken the key over.
    """

    key: str
    owner: str
    fence: int
    result: bytes
    ttl: float


class Release(Op[bool], frozen=True, gc=False):
    """Forget the key: the attempt failed, and the next may begin. False: it is not this owner's any more.

    `fence` 0 stands for whichever this owner has (where a claim was cut off before its answer came).
    """

    key: str
    owner: str
    fence: int


class Abandon(Op[bool], frozen=True, gc=False):
    """End the lease now, and keep the record: in doubt from here on. False: it is not this owner's any more.

    `fence` 0 stands for whichever this owner has.
    """

    key: str
    owner: str
    fence: int


class Begin(Op[Claimed], frozen=True, gc=False):
    """`Claim` with the first entry of a journal, in one commit: `entry` is number 0 where the key is new.

    Every other answer of `Claim` leaves the journal as it is; a claim that the owner itself repeats adds nothing. Where
    a key is taken over, an empty `label` keeps the one that is there.
    """

    key: str
    owner: str
    lease: float
    entry: bytes
    label: str = ""
    take_over: bool = False


class Append(Op[bool], frozen=True, gc=False):
    """Add `entry` to the journal as number `at`, and start the lease anew, in one commit.

    False: the key is somebody else's, or done, or gone. True as well where this owner has added number `at` already
    (the first one stays). A `label` that is not empty takes the place of the one that the record has. Raises
    `StoreError` where `at` is not the next number: entries have no gaps.
    """

    key: str
    owner: str
    fence: int
    at: int
    entry: bytes
    lease: float
    label: str = ""


class History(Op["tuple[Record, tuple[bytes, ...]] | None"], frozen=True, gc=False):
    """The record of a key and all entries of its journal, as they are at one instant; None where there is none."""

    key: str


class Read(Op[Record | None], frozen=True, gc=False):
    """The record of a key, or None. A result whose time is over counts as none."""

    key: str


class Scan(Op[Page], frozen=True, gc=False):
    """Up to `limit` records (a store may give some more or fewer) whose label contains `text`, from `after` on.

    A `state` that is not empty is the only one wanted. Those "in doubt" are found without a look at finished ones.

    Begin with an empty `after`, and go on with the one of each page until it is empty. Every record that is there all
    the while is seen at least once.
    """

    after: str = ""
    limit: int = 100
    text: str = ""
    state: str = ""

    def __post_init__(self) -> None:
        # A page of nothing has no end from which the next one could begin.
        if self.limit < 1:
            raise ValueError(f"limit must be 1 or more, not {self.limit!r}")


class Purge(Op[int], frozen=True, gc=False):
    """Remove up to `batch` records that ended, by result or by doubt, at least `older_than` seconds ago.

    Never one whose lease runs. The number removed: fewer than `batch` means that none is left.
    """

    older_than: float
    batch: int = 1000


class Forget(Op[bool], frozen=True, gc=False):
    """Remove one record, finished or in doubt, because a person says so. False: there is none, or its lease runs."""

    key: str


AnyOp: TypeAlias = Op[Any]
