"""Run by torchrun: python -m tests.driver.torchrun_worker PTE DIRECTORY STEPS KILLS.

Trains together with the other workers, and writes the hash of the adapter to DIRECTORY. In each of the first KILLS
starts a worker gets SIGKILL after a step, both drawn at random.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from runtime_driver import Callback, Session
from runtime_driver.adapter_io import adapter_sha256
from runtime_driver.fleet import Shard, Workers
from tests.driver import tiny


class Killer(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, record) -> None:
        if record.step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(pte: str, directory: str, steps: str, kills: str) -> None:
    session, out = Session(pte), Path(directory)
    with Workers(hash_every=20) as workers:
        restarts, parts = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(kills) + 1
        chance = random.Random(restarts)
        victim = chance.randrange(workers.size) if restarts < int(kills) else -1
        last = chance.randrange(int(steps) * restarts // parts, int(steps) * (restarts + 1) // parts)
        result = session.fit(
            Shard(tiny.make_batches(12), workers.rank, workers.size),
            int(steps),
            lr=0.5,
            eps=1e-2 if session.perturbs else None,
            seed=7,
            journal=out / "run.jsonl",
            callbacks=[Killer(last)] if victim == workers.rank else [],
            fsync="none",
            snapshot_every=20,
            workers=workers,
        )
        text = f"{adapter_sha256(session.adapter)} {result.first_step} {workers.step_bytes} {restarts}"
        (out / f"{workers.rank}.txt").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
