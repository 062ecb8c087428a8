"""How a saga looks: as plain data, as a Mermaid diagram, and as a timeline for the terminal.

Pure, from what its journal says; of a body that has not run, from what its source shows. Names come from data, and are
escaped for where they go. Nothing here runs or decides anything.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from datetime import UTC, datetime
from typing import Any, NamedTuple

from msgspec import UNSET, Struct

from resilient._journal import Entry, Step
from resilient._recovery import SagaRecord
from resilient._takeover import Ended
from resilient.durable import DurableBody

__all__ = ["Story", "describe", "mermaid", "timeline"]


class Story(NamedTuple):
    """A saga: its record, its journal, and its end if it has one."""

    record: SagaRecord
    entries: tuple[Entry, ...]
    end: Ended | None


class _Seen(Struct):
    """A step of a journal, and what came of it."""

    step: Step
    state: str


def _steps(story: Story) -> list[_Seen]:
    steps: dict[int, Step] = {}
    done: set[int] = set() if story.end is None else set(story.end.done)
    undone: set[int] = set()
    for entry in story.entries:
        steps |= {step.number: step for step in entry.steps}
        done |= set(entry.done)
        undone |= set(entry.undone)
    return [
        _Seen(step, "undone" if number in undone else "done" if number in done else "begun")
        for number, step in sorted(steps.items())
    ]


def _failed(story: Story) -> str:
    return next((entry.failed for entry in story.entries if entry.failed is not None), "")


def _stuck(story: Story) -> list[str]:
    stuck: list[str] = []
    for entry in story.entries:
        stuck = entry.stuck if entry.stuck or entry.again else stuck
    return stuck


def describe(what: Story | DurableBody) -> dict[str, Any]:
    """A saga as plain data: steps in their order, what undoes them, the pivot, and what came of each.

    Of a body that has not run (a durable saga), as far as its source shows: a loop is one step.
    """
    if not isinstance(what, Story):
        return _described(what)
    record = what.record
    steps = [
        {
            "number": seen.step.number,
            "step": seen.step.name,
            "compensation": None if seen.step.undo is None else seen.step.undo.function,
            "group": seen.step.group or None,
            "after_pivot": seen.step.forward,
            "state": seen.state,
        }
        for seen in _steps(what)
    ]
    return {
        "saga": record.name,
        "id": record.id,
        "version": record.version,
        "state": record.state,
        "durable": any(entry.head is not UNSET and entry.head.input is not UNSET for entry in what.entries),
        "pivot": next((step["number"] for step in steps if step["after_pivot"]), None),
        "steps": steps,
        "failed": _failed(what) or None,
        "stuck": _stuck(what),
        "end": None if what.end is None else {"state": what.end.saga, "error": what.end.error or None},
    }


def _described(body: DurableBody) -> dict[str, Any]:
    said: dict[str, Any] = {"saga": body.name, "version": body.durable.version, "durable": True, "pivot": None}
    steps: list[dict[str, Any]] = []
    for call, way in _calls(body.__wrapped__):
        if way == "pivot" and said["pivot"] is None:
            said["pivot"] = len(steps) + 1
        group = len(steps) + 1 if way == "parallel" else None
        for one in call.args if way == "parallel" else [call] if way == "step" else []:
            if way == "parallel" and isinstance(one, ast.Tuple) and one.elts:
                steps.append(_step(len(steps) + 1, ast.unparse(one.elts[0]), None, group, said))
            elif isinstance(one, ast.Call) and one.args:
                undo = next((word.value for word in one.keywords if word.arg == "compensate"), None)
                if isinstance(undo, ast.Call) and ast.unparse(undo.func).rpartition(".")[2] == "call" and undo.args:
                    undo = undo.args[0]
                told = None if undo is None or (isinstance(undo, ast.Constant) and undo.value is None) else undo
                name = None if told is None else ast.unparse(told)
                steps.append(_step(len(steps) + 1, ast.unparse(one.args[0]), name, group, said))
            else:
                steps.append(_step(len(steps) + 1, ast.unparse(one), None, group, said))
    return {**said, "steps": steps}


def _step(number: int, name: str, undo: str | None, group: int | None, said: dict[str, Any]) -> dict[str, Any]:
    after = said["pivot"] is not None
    return {"number": number, "step": name, "compensation": undo, "group": group, "after_pivot": after}


def _calls(body: Any) -> list[tuple[ast.Call, str]]:
    """The calls of `step`, `parallel` and `pivot`, as they stand in the source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(body))))
    except (OSError, TypeError, SyntaxError):
        return []
    found = [
        (node, node.func.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("step", "parallel", "pivot")
    ]
    return sorted(found, key=lambda one: (one[0].lineno, one[0].col_offset))


# -- a diagram -------------------------------------------------------------------------------------------------------

_CLASSES = {"done": "done", "undone": "undone", "begun": "begun"}


def mermaid(story: Story) -> str:
    """A flowchart of a saga for Mermaid: its steps, what was undone, the pivot, and its end."""
    lines = ["flowchart TD", f"    begin([{_quoted(story.record.name + ' ' + story.record.id)}])"]
    before = ["begin"]
    pivot = False
    steps = _steps(story)
    groups: dict[int, list[_Seen]] = {}
    for seen in steps:
        groups.setdefault(seen.step.group or -seen.step.number, []).append(seen)
    for group in groups.values():
        if group[0].step.forward and not pivot:
            pivot = True
            lines.append(f"    pivot{{{{{_quoted('pivot')}}}}}")
            lines += [f"    {one} --> pivot" for one in before]
            before = ["pivot"]
        now: list[str] = []
        for seen in group:
            node = f"s{seen.step.number}"
            now.append(node)
            lines.append(f"    {node}[{_quoted(f'{seen.step.number}. {_short(seen.step.name)}')}]:::{seen.state}")
            lines += [f"    {one} --> {node}" for one in before]
        before = now
    failed = _failed(story)
    if failed:
        lines.append(f"    failed{{{{{_quoted(failed)}}}}}:::failed")
        lines += [f"    {one} --> failed" for one in before]
        before = ["failed"]
        for seen in reversed(steps):
            if seen.step.undo is not None and seen.state == "undone":
                node = f"u{seen.step.number}"
                lines.append(f"    {node}[{_quoted(_short(seen.step.undo.function))}]:::undone")
                lines += [f"    {before[0]} --> {node}", f"    {node} -.-> s{seen.step.number}"]
                before = [node]
    lines.append(f"    end_([{_quoted(_state(story))}])")
    lines += [f"    {one} --> end_" for one in before]
    lines += [
        "    classDef done fill:#d5f5d5,stroke:#2a7a2a",
        "    classDef undone fill:#f5f0d5,stroke:#8a7a2a,stroke-dasharray:4",
        "    classDef begun fill:#f5d5d5,stroke:#a22",
        "    classDef failed fill:#f5d5d5,stroke:#a22",
    ]
    return "\n".join(lines)


def _state(story: Story) -> str:
    texts = [story.record.state, *_stuck(story)] if story.end is None else [story.end.saga, story.end.error]
    return ": ".join(text for text in texts if text)


def _short(name: str) -> str:
    return name.rpartition(":")[2]


def _quoted(text: str) -> str:
    """Text as a label: only letters, digits and harmless signs as they are, the rest as entities."""
    cut = text if len(text) <= 120 else f"{text[:119]}…"
    return '"' + "".join(char if char.isalnum() or char in " .,:/_-()" else f"#{ord(char)};" for char in cut) + '"'


# -- a timeline ------------------------------------------------------------------------------------------------------


def timeline(story: Story) -> str:
    """What happened when, a line for each thing, for the terminal."""
    record = story.record
    began = next((entry.at for entry in story.entries if entry.at), record.began_at)
    rows: list[tuple[float, str]] = []
    names = {seen.step.number: seen.step.name for seen in _steps(story)}
    undos = {seen.step.number: seen.step.undo.function for seen in _steps(story) if seen.step.undo is not None}
    pivot = False
    for entry in story.entries:
        rows += [(entry.at, f"  done   {number}. {names.get(number, '?')}") for number in sorted(entry.done)]
        rows += [(entry.at, f"undone   {number}. {undos.get(number, '?')}") for number in entry.undone]
        if entry.pivot and not pivot:
            pivot = True
            rows.append((entry.at, " pivot   from here only forward"))
        if entry.again:
            rows.append((entry.at, f" again   somebody said so, after {entry.again - 1} attempts"))
        if entry.failed is not None:
            rows.append((entry.at, f"failed   {entry.failed}"))
        for step in entry.steps:
            beside = f" (beside others, group {step.group})" if step.group else ""
            rows.append((entry.at, f" begin   {step.number}. {step.name}{beside}"))
        rows += [(entry.at, f" stuck   {text}") for text in entry.stuck]
    if story.end is not None:
        at = story.end.at or record.mark
        rows += [(at, f"  done   {number}. {names.get(number, '?')}") for number in sorted(story.end.done)]
        rows.append((at, f"   end   {story.end.saga}{f': {story.end.error}' if story.end.error else ''}"))
    else:
        rows.append((record.mark, f"   now   {record.state}, attempt {record.attempt}"))
    head = f"{record.name} {record.id}  version {record.version}  {record.state}  since {_instant(began)}"
    lines = [head, *(f"{_after(at - began):>10}  {text}" for at, text in rows)]
    return "\n".join(_safe(line) for line in lines)


def _after(seconds: float) -> str:
    for below, unit, name in ((1.0, 0.001, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172_800.0, 3600.0, "h")):
        if abs(seconds) < below:
            return f"+{max(0.0, seconds) / unit:.{0 if name == 'ms' else 1}f} {name}"
    return f"+{seconds / 86_400:.1f} d"


def _instant(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"the instant {at!r}"


def _safe(line: str) -> str:
    """Nothing that a terminal would obey, and not too long."""
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in line[:300]
    )
    return shown if len(line) <= 300 else f"{shown}…"
