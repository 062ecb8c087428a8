"""What the commands that look into stores share: how they end, and how they show what others have written.

Whatever comes from a store is escaped and cut before a terminal sees it, and written in what its encoding knows.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

__all__ = [
    "VARIABLE",
    "Gone",
    "Refusal",
    "absent",
    "age",
    "aligned",
    "encodable",
    "hidden",
    "instant",
    "missing",
    "reason",
    "safe",
    "say",
    "text",
    "when",
]

VARIABLE = "RESILIENT_STORE"
"""The environment variable with the URL of the store."""


class Refusal(Exception):
    """An end with a line on stderr and an exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Gone(Exception):
    """Nobody reads stdout any more (`… | head -1`): the end of a command that only shows something."""


def text(given: str) -> str:
    """An argument that is text."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be text, not bytes like {given!r}") from None
    return given


def reason(text: str) -> str:
    """An argument that says something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must say something")
    return text


def absent(url: str, store: Any) -> str:
    """The path of the SQLite file that `url` names and that is not there; else nothing.

    Whoever opens a store makes the file: of a wrong path a look would make an empty store, in which nothing is found.
    """
    if url.partition(":")[0].lower() != "sqlite" or os.path.exists(store.path):
        return ""
    return str(store.path)


def missing(path: str) -> Refusal:
    """The refusal of a command that needs the file at `path`."""
    return Refusal(f"there is no file {path}: is it the store's path, seen from {os.getcwd()}?", 2)


def hidden(url: str) -> str:
    """The URL without user and password."""
    return re.sub(r"//[^/]*@", "//***@", url)


def when(at: float, now: float) -> str:
    """An instant, and how far away it is."""
    return f"{instant(at)} ({age(now - at)})"


def instant(at: float) -> str:
    """ISO 8601, in UTC."""
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"the instant {at!r}"


def age(seconds: float) -> str:
    """How far away, in one unit."""
    size = abs(seconds)
    for below, unit, name in (
        (120.0, 1.0, "s"),
        (7200.0, 60.0, "min"),
        (172_800.0, 3600.0, "h"),
        (1e12, 86_400.0, "d"),
    ):
        if size < below:
            length = f"{size / unit:.0f} {name}"
            return f"{length} ago" if seconds >= 0 else f"in {length}"
    return "?"


def safe(text: str, most: int) -> str:
    """`text` with nothing that a terminal would obey, and not too long."""
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text[:most]
    )
    return shown if len(text) <= most else f"{shown}… ({len(text)} characters)"


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def encodable(text: str, stream: Any) -> str:
    """`text` in the signs that a stream can write."""
    encoding: str = stream.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    """Print, whatever the terminal's encoding. `Gone` if nobody reads it; what is said after that goes nowhere."""
    try:
        print(encodable(text, sys.stdout), flush=True)
    except BrokenPipeError:
        # What is left in the buffer is written at exit, and must not fail there once more.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise Gone from None
