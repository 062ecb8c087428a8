"""Print the mutation score that `mutmut` left behind: `python -m tests.mutants`."""

from __future__ import annotations

import json
from pathlib import Path

if __name__ == "__main__":
    stats: dict[str, int] = json.loads(Path("mutants/mutmut-cicd-stats.json").read_text())
    caught = stats["killed"] + stats.get("timeout", 0) + stats.get("segfault", 0)
    judged = caught + stats["survived"] + stats.get("suspicious", 0) + stats.get("no_tests", 0)
    print(f"mutation score: {caught} of {judged} mutants caught, {100 * caught / max(judged, 1):.1f} %")
