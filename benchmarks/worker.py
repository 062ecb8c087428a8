"""One job in a process of its own: `python -m benchmarks.worker '{"suite": "calls", ...}'` prints its rows as JSON."""

from __future__ import annotations

import json
import sys
import warnings

from benchmarks.measures import Job, run


def main() -> None:
    """Do the job that the first argument describes."""
    # What old libraries say about themselves is not ours to fix, and must not mix with the figures.
    warnings.simplefilter("ignore")
    rows = run(Job(**json.loads(sys.argv[1])))
    sys.stdout.write("\n" + json.dumps(rows))


if __name__ == "__main__":
    main()
