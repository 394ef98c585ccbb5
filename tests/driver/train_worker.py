"""Trains in a process of its own, for the tests that kill or interrupt it.

python -m tests.driver.train_worker PTE JOURNAL STEPS OUT            one run, which the test may interrupt
python -m tests.driver.train_worker PTE JOURNAL STEPS OUT KILLS      runs that are killed, each after the one before

The second form prints, as JSON, how many steps the journal had after each kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Loaded before the forks, so that each child has them; the runtime itself is first used in the children.
import executorch.runtime  # noqa: F401
import torch
from torch import Tensor

from runtime_driver import Callback, Session, read_journal


class Slow(Callback):
    """Makes a run last long enough to be interrupted."""

    def on_step(self, record) -> None:
        time.sleep(0.003)


def batches_for(session: Session) -> list[dict[str, Tensor]]:
    """Three batches that differ: noise, and labels of three classes."""
    generator = torch.Generator().manual_seed(0)
    specs = [each for each in session.manifest.methods["step"].inputs if each.role == "batch"]

    def value(dtype: str, shape: list[int]) -> Tensor:
        if dtype == "float32":
            return torch.randn(shape, generator=generator)
        return torch.randint(3, shape, generator=generator)

    return [{each.name: value(each.dtype, list(each.shape)) for each in specs} for _ in range(3)]


def run_options(session: Session) -> dict[str, Any]:
    """How a program of any estimator is trained here."""
    return {"lr": 0.05, "seed": 7, **({"eps": 1e-2} if session.perturbs else {})}


def train(pte: str, journal: str, steps: int, out: str) -> None:
    session = Session(pte)
    options = run_options(session)
    result = session.fit(batches_for(session), steps, **options, journal=journal, callbacks=[Slow()], snapshot_every=20)
    session.save_adapter(out)
    print(json.dumps({"steps": result.steps, "interrupted": result.interrupted}), flush=True)


def kill_while_it_trains(pte: str, journal: Path, steps: int, out: str, chance: random.Random) -> int:
    """How many steps the journal has after a run that was killed at a random moment after its first record."""
    before = _lines(journal)
    child = os.fork()
    if child == 0:
        train(pte, str(journal), steps, out)
        os._exit(0)
    # So that a slow machine does not make the test easier.
    while _lines(journal) <= max(before, 1):
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError("the run ended before it could be killed")
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return len(read_journal(journal).records)


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def main(pte: str, journal: str, steps: str, out: str, kills: str = "0") -> None:
    if kills == "0":
        train(pte, journal, int(steps), out)
        return
    chance = random.Random(0)
    done = [kill_while_it_trains(pte, Path(journal), int(steps), out, chance) for _ in range(int(kills))]
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
