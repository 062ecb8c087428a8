"""`python -m resilient`: the command `resilient`, where that is not on the path."""

from __future__ import annotations

import sys

from resilient.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
