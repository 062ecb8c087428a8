"""Nothing is written twice unproved: coroutine shells are their plain twins with `async` and `await` struck out.

For every class, `coro` is compared with `sync`, and each method `aname` with its twin `name`, as syntax trees.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import resilient

ROOT = Path(resilient.__file__).parent

# What is called differently in the two worlds. Everything else must be equal.
RENAMED = {
    "asleep": "sleep",
    "task_waiter": "ThreadWaiter",
    "aresume": "resume",
    "aexecute": "execute",
    "apark": "park",
    "asettle": "settle",
    "task_watch": "thread_watch",
    "_last_shielded": "_last",
    "_awaited": "_answered",
    "adrive": "drive",
    "AsyncCursor": "Cursor",
    "_alane": "_lane",
    "aon": "on",
    "aprepare": "prepare",
    "_ablock": "_block",
    "_AON": "_ON",
    "_aacquire": "_acquire",
    "aclose": "close",
    "asend": "send",
    "athrow": "throw",
    "anext": "next",
    "StopAsyncIteration": "StopIteration",
    "AsyncGenerator": "Generator",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
}
# Two ways of waiting that differ in kind, not only in words; their own tests run one table through both.
APART = {
    ("timeout.py", "Timeout"),
    ("hedge.py", "Hedge"),
    ("fallback.py", "module"),
    ("_keeper.py", "Beat"),
    ("idempotency.py", "Idempotent"),
    ("_watch.py", "_Armed"),
    ("sqlite.py", "SQLiteStore"),
}
# The same of single functions: they shelter from cancellation, begin loops, or say which world they are of.
APART_ALONE = {
    ("_barrier.py", "barrier"),
    ("_barrier.py", "barrier_schema"),
    ("_body.py", "settled"),
    ("_parallel.py", "__enter__"),
    ("_parallel.py", "__exit__"),
    ("_recovery.py", "_beside"),
    ("_recovery.py", "one"),
    ("_run.py", "_rest"),
    ("_run.py", "_through"),
    ("durable.py", "_run"),
    ("durable.py", "recover"),
    ("saga.py", "__enter__"),
    ("saga.py", "__exit__"),
    ("sagas.py", "_decided"),
    ("sagas.py", "recover"),
}


class Strike(ast.NodeTransformer):
    """Turn asynchronous syntax into its plain twin."""

    def __init__(self, twins: set[str]) -> None:
        self.names = dict(RENAMED)
        for twin in twins:
            self.names[_async_name(twin)] = twin

    def _name(self, name: str) -> str:
        return self.names.get(name, name)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        plain = ast.FunctionDef(**{field: getattr(node, field) for field in node._fields})
        return self.visit_FunctionDef(plain)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        body = node.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:] or [ast.Pass()]
        made = ast.FunctionDef(
            name=self._name(node.name), args=node.args, body=body, decorator_list=[], returns=None, type_comment=None
        )
        return self.generic_visit(made)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> ast.AST:
        return self.generic_visit(ast.For(**{field: getattr(node, field) for field in node._fields}))

    def visit_AsyncWith(self, node: ast.AsyncWith) -> ast.AST:
        return self.generic_visit(ast.With(**{field: getattr(node, field) for field in node._fields}))

    def visit_Await(self, node: ast.Await) -> ast.AST:
        inner: ast.AST = self.visit(node.value)
        return inner

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._name(node.id), node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Attribute(self.visit(node.value), self._name(node.attr), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        return self.generic_visit(ast.Assign([node.target], node.value))


def _async_name(name: str) -> str:
    return re.sub(r"^(_*)", r"\1a", name)


def pairs() -> list[tuple[str, str, str, ast.AST, ast.AST, frozenset[str]]]:
    found: list[tuple[str, str, str, ast.AST, ast.AST, frozenset[str]]] = []
    for path in sorted(ROOT.rglob("*.py")):
        if "demo" in path.parts or path.name in ("clock.py", "testing.py"):
            continue
        tree = ast.parse(path.read_text())
        # A call may go to a twin in another class of the same file.
        plains = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        coroutines = {node.name for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}
        names = frozenset(name for name in plains if _async_name(name) in coroutines)
        for home in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
            body: list[ast.stmt] = getattr(home, "body")  # noqa: B009
            functions = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
            asyncs = {name for name, node in functions.items() if isinstance(node, ast.AsyncFunctionDef)}
            owner = home.name if isinstance(home, ast.ClassDef) else "module"
            twins = {name for name in functions if _async_name(name) in asyncs or RENAMED.get(f"a{name}") == name}
            couples = [(_async_name(name), name) for name in twins if _async_name(name) in asyncs]
            couples = [(a, b) for a, b in couples if f"self.{b}(" not in ast.unparse(functions[a])]
            if "sync" in functions and "coro" in functions:
                couples.append(("coro", "sync"))
            if (path.name, owner) in APART:
                couples = []
            couples = [(a, b) for a, b in couples if (path.name, b) not in APART_ALONE]
            found += [(path.name, owner, b, functions[a], functions[b], names) for a, b in couples]
    return found


PAIRS = pairs()


def struck(strike: Strike, node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(strike.visit(node)))


def shells(node: ast.AST) -> list[ast.AST]:
    """What runs at a call: the functions inside `sync` and `coro`. What they prepare at decoration may differ."""
    inner: list[ast.AST] = [one for one in ast.walk(node) if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return inner[1:] if getattr(node, "name", None) in ("sync", "coro") else inner[:1]


@pytest.mark.parametrize(("file", "owner", "name", "asynchronous", "plain", "twins"), PAIRS)
def test_the_twins_are_equal(
    file: str, owner: str, name: str, asynchronous: ast.AST, plain: ast.AST, twins: frozenset[str]
) -> None:
    """Read the difference: what is in one world and not in the other is a bug in one of them."""
    strike = Strike(set(twins) | {name})
    strike.names["coro"] = "sync"
    left, right = ([struck(strike, one) for one in shells(node)] for node in (asynchronous, plain))
    assert left
    assert left == right, f"{file}: {owner}.{name}"


def test_the_comparison_sees_a_difference() -> None:
    """A proof that cannot fail proves nothing."""
    strike = Strike({"f"})
    source = "async def af():\n    return await x.asleep(1)\ndef f():\n    return x.sleep({})\n"
    for text, same in (("1", True), ("2", False)):
        one, two = ast.parse(source.format(text)).body
        assert (struck(strike, one) == struck(strike, two)) is same


def test_there_is_something_to_compare() -> None:
    compared = {owner for _, owner, name, *_ in PAIRS if name == "sync"}
    assert {"Bulkhead", "CircuitBreaker", "Fallback", "RateLimiter", "Retry", "Watch"} <= compared
