"""What the user sees while a run goes on: a board on a terminal, plain lines elsewhere.

A view is told when a run begins and ends, and is asked to `tick` every so often in between; it reads the numbers then.
It prints nothing else's state, changes nothing, and never waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from resilient.demo.numbers import Progress
from resilient.demo.schedule import SERVICES

__all__ = ["Board", "Lines", "Scene", "View", "view_for"]

_COLOURS = {"closed": "green", "open": "bold red", "half-open": "yellow"}
_NEWS = 6


@dataclass(frozen=True, slots=True)
class Scene:
    """A run as views see it: its numbers, the trouble that each service is in, and the state of each breaker."""

    progress: Progress
    trouble: Callable[[str], str]
    breaker: Callable[[str], str]


class View(Protocol):
    """Shows runs. `every` is the number of seconds between ticks."""

    every: float

    def begin(self, scene: Scene) -> None: ...
    def tick(self) -> None: ...
    def end(self) -> None: ...


def view_for(console: Console, plain: bool) -> View:
    """The board, if somebody looks at a terminal; else lines."""
    return Lines(console) if plain or not console.is_terminal or console.is_dumb_terminal else Board(console)


class Lines:
    """A line every two seconds, and one for each piece of news."""

    every = 0.2

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, scene: Scene) -> None:
        """Say which run this is."""
        self._scene, self._shown, self._next = scene, 0, 2.0
        self._say(f"-- {scene.progress.title}: {scene.progress.total} orders")

    def tick(self) -> None:
        """Say what is new."""
        progress = self._scene.progress
        for second, text in progress.news[self._shown :]:
            self._say(f"{second:6.1f} s  {text}")
        self._shown = len(progress.news)
        if progress.elapsed >= self._next:
            self._next += 2.0
            self._say(self._summary())

    def end(self) -> None:
        """Say how far it came."""
        self.tick()
        self._say(self._summary())

    def _summary(self) -> str:
        progress = self._scene.progress
        ended, tallies = len(progress.outcomes), progress.tallies.values()
        return (
            f"{progress.elapsed:6.1f} s  {ended}/{progress.total} orders: {progress.done} done, "
            f"{ended - progress.done} {progress.failed}, {progress.in_flight} in flight; "
            f"{sum(t.sent for t in tallies)} calls, {sum(t.retries for t in tallies)} retries, "
            f"{sum(t.refused for t in tallies)} refused"
        )

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Board:
    """A table of the services that is drawn anew ten times a second, and the latest news under it."""

    every = 0.1

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, scene: Scene) -> None:
        """Take the lower part of the terminal."""
        self._scene = scene
        self._live = Live(self.draw(), console=self._console, auto_refresh=False, transient=True)
        self._live.start(refresh=True)

    def tick(self) -> None:
        """Draw the numbers as they are now."""
        self._live.update(self.draw(), refresh=True)

    def end(self) -> None:
        """Give the terminal back as it was."""
        self._live.stop()

    def draw(self) -> RenderableType:
        """The board as it stands."""
        progress = self._scene.progress
        ended = len(progress.outcomes)
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(progress.title, style="bold"), f"{progress.elapsed:.1f} s")
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=progress.total, completed=ended, width=24, complete_style="cyan", finished_style="green"),
            f"{ended}/{progress.total} orders",
            Text(f"{progress.done} done", style="green"),
            Text(f"{ended - progress.done} {progress.failed}", style="red" if ended > progress.done else ""),
            f"{progress.in_flight} in flight",
        )
        news = [Text(f"{second:6.1f} s  {text}", style="dim") for second, text in progress.news[-_NEWS:]]
        for line in news:
            line.truncate(self._console.width, overflow="ellipsis")
        return Group(head, bar, Text(), self._table(), Text(), *news, *[Text()] * (_NEWS - len(news)))

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("service", width=12)
        table.add_column("trouble", width=7)
        table.add_column("breaker", width=9)
        for heading in ("sent", "failed", "retried", "refused", "timeouts", "hedged"):
            table.add_column(heading, justify="right", no_wrap=True)
        for service in SERVICES:
            tally, trouble, state = (
                self._scene.progress.tallies[service],
                self._scene.trouble(service),
                self._scene.breaker(service),
            )
            table.add_row(
                Text(service, style="bold"),
                Text(trouble or "·", style="magenta" if trouble else "dim"),
                Text(state or "none", style=_COLOURS.get(state, "dim")),
                *map(_number, (tally.sent, tally.failed, tally.retries, tally.refused, tally.timeouts, tally.hedges)),
            )
        return table


def _number(number: int) -> Text:
    return Text(str(number) if number else "·", style="" if number else "dim")
