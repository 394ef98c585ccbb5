"""Training on several devices that exchange nothing but seeds, projected gradients and hashes.

    with fleet.Workers(mode="data") as workers:  # under torchrun
        session.fit(batches, steps=500, lr=1e-3, eps=1e-2, journal="run.jsonl", workers=workers)

:mod:`runtime_driver.fleet.flower` has the same for federated clients, and needs the extra ``fleet``.
"""

from runtime_driver.fleet.gate import Gate, Refusal
from runtime_driver.fleet.privacy import Privacy
from runtime_driver.fleet.workers import Mode, Shard, Workers

__all__ = ["Gate", "Mode", "Privacy", "Refusal", "Shard", "Workers"]
