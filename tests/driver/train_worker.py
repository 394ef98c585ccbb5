"""Run in a subprocess by the tests that kill or interrupt it: python train_worker.py PTE JOURNAL STEPS OUT."""

from __future__ import annotations

import json
import sys
import time

from runtime_driver import Callback, Session
from tests.driver import tiny


class Slow(Callback):
    """Says that training runs, and makes a run last long enough to be interrupted."""

    def on_start(self, start) -> None:
        print("started", flush=True)

    def on_step(self, record) -> None:
        time.sleep(0.003)


def main(pte: str, journal: str, steps: str, out: str) -> None:
    session = Session(pte)
    result = session.fit(
        tiny.make_batches(3),
        int(steps),
        lr=0.5,
        eps=1e-2 if session.perturbs else None,
        seed=7,
        journal=journal,
        callbacks=[Slow()],
        snapshot_every=20,
    )
    session.save_adapter(out)
    print(json.dumps({"steps": result.steps, "interrupted": result.interrupted}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
