"""Kills `mobizo train` before its N-th write to disk, runs it again, and says what is there then.

python -m tests.robustness.kill_points WORLD N...    one line of JSON for each N; 0 is a run that is not killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Loaded before the forks, so that each has them; the runtime itself is first used in the children.
import executorch.runtime  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch  # noqa: F401

import mobizo_cli.main  # noqa: F401
import runtime_driver  # noqa: F401
from tests.robustness.world import run

COMMAND = ("train", "model.pte", "--data", "train.jsonl", "--steps", "8", "--lr", "0.05", "--adapter", "adapter")
OUTPUT = ("--journal", "new.jsonl", "--adapter-out", "out")
#: What makes something durable or visible.
WRITES = ("pwrite", "fsync", "replace", "rename", "mkdir")


def killed_before(count: int) -> None:
    """From here on the `count`-th of these calls never returns."""
    made = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in WRITES:
        setattr(os, name, counting(getattr(os, name)))


def in_a_child(work: Callable[[], None]) -> int:
    """Run in a forked process, in which ExecuTorch's runtime is still unused; the wait status."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def train(root: Path, kill_before: int | None) -> None:
    if kill_before is not None:
        killed_before(kill_before)
    ended = run(root, (*COMMAND, *OUTPUT), fresh=False)
    (root / "ended.json").write_text(json.dumps({"code": ended.code, "said": ended.said, "fault": ended.fault}))


def main(world: Path, points: list[int]) -> None:
    for point in points:
        with tempfile.TemporaryDirectory(prefix="kill-") as name:
            root = Path(shutil.copytree(world, Path(name) / "world"))
            status = in_a_child(lambda: train(root, point or None))  # noqa: B023 - run within the iteration
            killed = os.WIFSIGNALED(status)
            if killed:
                in_a_child(lambda: train(root, None))  # noqa: B023
            ended = json.loads((root / "ended.json").read_text())
            (root / "ended.json").unlink()
            adapter = root / "out" / "adapter_model.safetensors"
            sha256 = hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else None
            files = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
            print(
                json.dumps({"point": point, "killed": killed, "adapter": sha256, "files": files, **ended}), flush=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(point) for point in sys.argv[2:]])
