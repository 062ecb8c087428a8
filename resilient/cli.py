"""The command `resilient`.

    resilient demo [--quick] [--seed N] [--plain] [--orders FILE] [--json FILE]
    resilient idempotency show KEY | list | purge --older-than TIME | forget KEY --why TEXT [--store URL]
    resilient saga list | show ID | resume ID | compensate ID | abandon ID --why TEXT | recover | worker URL MODULE...
    resilient --version

What a command needs beyond the core comes with an extra; without it the command says which one and exits with 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from resilient import __version__, _cli_idempotency, _cli_saga
from resilient._cli_text import Gone

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process) and return its exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 2
    try:
        return {"idempotency": _cli_idempotency.run, "saga": _cli_saga.run, "demo": _demo}[chosen.command](chosen)
    except KeyboardInterrupt:
        return 130
    except Gone:
        return 141  # As a shell tells of one that ended by SIGPIPE.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resilient", description="Guards for functions in a world that fails.")
    parser.add_argument("--version", action="version", version=f"resilient-kit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="order processing against services that misbehave, with guards and without",
        description="Pushes orders through four local services that misbehave on a seeded schedule, first without "
        "guards, then with them, and compares. The client is killed and the payment service crashes on the way. Exit "
        "code 0: the guards completed more orders (or all) and charged none twice; 1: they did not; 2: it could not "
        "run.",
    )
    demo.add_argument("--quick", action="store_true", help="ten seconds in place of a minute")
    demo.add_argument("--seed", type=int, default=8, metavar="N", help="the seed of the schedule (default: 8)")
    demo.add_argument("--plain", action="store_true", help="lines in place of the live board, without colours")
    demo.add_argument(
        "--orders",
        type=Path,
        metavar="FILE",
        help="a CSV file of orders; the first 400 are taken (default: those that come along)",
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the numbers of the report to FILE as well")
    _cli_idempotency.add(commands)
    _cli_saga.add(commands)
    return parser


def _demo(chosen: argparse.Namespace) -> int:
    try:
        from resilient.demo.orders import BUNDLED
        from resilient.demo.run import main as run_demo
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("httpx", "rich", "starlette", "uvicorn"):
            raise
        print(
            f"resilient demo: it needs {package}, which is not installed. Get it with the extra `demo`:\n"
            "    pip install 'resilient-kit[demo]'",
            file=sys.stderr,
        )
        return 2
    return run_demo(
        quick=chosen.quick,
        seed=chosen.seed,
        plain=chosen.plain,
        path=chosen.orders or BUNDLED,
        json_path=chosen.json,
    )
