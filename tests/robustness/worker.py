"""Mutates files and runs commands on them, until a mutation kills it: python -m tests.robustness.worker WORLD.

Reads `KIND SEED` a line; writes `begin KIND SEED` and then one line of JSON for each.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.robustness.world import KINDS, Ended, Kind, judge, run


def one(world: Path, kind: Kind, seed: int, expected: Ended | None) -> tuple[str, Ended]:
    """Damage the file (unless `expected` is None), run the command, put everything back."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        root = Path(shutil.copytree(world, Path(name) / "world"))
        path, text = root / kind.file, "nothing"
        if expected is not None:
            text, damaged = kind.damage(path.read_bytes(), random.Random(f"{kind.name}/{seed}"))
            path.write_bytes(damaged)
        return text, run(root, kind.command)


def main(world: Path) -> None:
    kinds = {kind.name: kind for kind in KINDS}
    expected: dict[str, Ended] = {}
    # The command's own output is captured; ours goes where the parent reads.
    answers = sys.stdout
    for line in sys.stdin:
        name, seed = json.loads(line)
        kind = kinds[name]
        if name not in expected:
            expected[name] = one(world, kind, 0, None)[1]
            assert expected[name].code == 0, expected[name]
        print(json.dumps({"begin": [name, seed]}), file=answers, flush=True)
        text, found = one(world, kind, seed, expected[name])
        answer = {"damage": text, "fault": judge(expected[name], found), "code": found.code, "said": found.said}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
