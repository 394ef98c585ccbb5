"""Compare every program of the coverage table with the recorded ones: the net under a refactoring.

    python -m tests.replay             compare; exit code 1 and a list of names where something differs
    python -m tests.replay --record    record what is now, after a change that is meant to change programs

The texts are written to `out/replay`. To see a difference, run this in a checkout of the commit before too, with
another `--out`, and compare the two directories.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.progress import track

from tests.coverage.catalogue import ROWS
from tests.replay.programs import LOWERED, digest, replay

RECORDED = Path(__file__).with_name("recorded.json")


def main() -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="record instead of comparing")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name contains these words")
    parser.add_argument("--out", type=Path, default=Path("out/replay"), help="where the texts are written")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes side by side")
    options = parser.parse_args()
    if options.record and options.only:
        parser.error("--record records all rows; leave --only out")
    options.out.mkdir(parents=True, exist_ok=True)
    names = [str(row) for row in ROWS if options.only in str(row)]
    # What takes longest first, so that no process waits at the end.
    names.sort(key=lambda name: name not in LOWERED)
    found: dict[str, str] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        results = as_completed([pool.submit(replay, name) for name in names])
        for each in track(results, description="replay", total=len(names)):
            for name, text in each.result().items():
                found[name] = digest(text)
                (options.out / f"{name}.txt".replace(" ", "_")).write_text(text, encoding="utf-8")
    if options.record:
        RECORDED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{len(found)} programs recorded in {RECORDED.name}")
        return 0
    if not RECORDED.exists():
        print(f"{len(found)} programs written to {options.out}; nothing is recorded to compare them with, see --record")
        return 2
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    expected = {name: value for name, value in recorded.items() if name.split()[0] in set(names)}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    for name in differing:
        state = "new" if name not in expected else "gone" if name not in found else "differs"
        print(f"{state}: {name}")
    print(f"{len(found)} programs, {len(differing)} differ from the recorded ones")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
