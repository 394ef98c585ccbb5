"""Bytes of a round, beside FedAvg of the same adapter: python benchmarks/fleet_traffic.py MODEL.

MODEL is a .pte or the .json beside it. Nothing is run: every size follows from the manifest. Sizes are those of the
contents, without the framing of the transport, which both have.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from runtime_driver.fleet.messages import Message
from runtime_driver.format import Manifest

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
#: Program, run seed, first step and hash of a task; learning rate and epsilon for each local step.
_TASK, _TASK_STEP = 32, 16
_KNOWN = 8


def table(manifest: Manifest) -> str:
    """Bytes in a round of one client, for some numbers of local steps."""
    queries = manifest.estimator.queries
    message = len(Message(bytes(8), 0, 0, 1.0, 0.0, (0.0,) * queries).pack())
    adapter = sum(math.prod(each.shape) * _BYTES[each.dtype] for each in manifest.trainable_adapter)
    rows = [
        f"{queries} queries; the adapter has {adapter:,} bytes.",
        "",
        "| local steps | up | down | FedAvg, up and down | FedAvg / ours |",
        "|--:|--:|--:|--:|--:|",
    ]
    for steps in (1, 10, 100):
        up = steps * message + _KNOWN
        down = _TASK + steps * (_TASK_STEP + 8 + 4 * queries)
        rows.append(f"| {steps} | {up:,} | {down:,} | {2 * adapter:,} | {2 * adapter / (up + down):,.0f} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    path = parser.parse_args().model
    if path.suffix == ".json":
        manifest = Manifest.load(path)
    else:
        from runtime_driver.program import LoadedProgram

        manifest = LoadedProgram(path).manifest
    if manifest.estimator.queries == 0:
        sys.exit(f"{path}: a program of exact gradients has no projected gradients to send")
    print(table(manifest))


if __name__ == "__main__":
    main()
