"""The same under torchrun: processes, gloo, restarts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runtime_driver import Session, read_journal
from runtime_driver.adapter_io import adapter_sha256

ROOT = Path(__file__).parents[2]
STEPS = 200


def torchrun(directory: Path, *options: str, module: list[object]) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--local-addr",
        "127.0.0.1",
        *options,
        "-m",
        *map(str, module),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_a_killed_worker_costs_nothing_but_time(built_pte: Path, tmp_path: Path):
    """One of four is killed with SIGKILL; all start again, replay the journal and end in the same bits."""
    worker = ["tests.driver.torchrun_worker", built_pte, tmp_path, STEPS, 1]
    done = torchrun(tmp_path, "--nproc-per-node", "4", "--max-restarts", "1", module=worker)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(4)]
    replayed = Session(built_pte)
    assert replayed.replay(tmp_path / "run.jsonl") == STEPS
    assert {each[0] for each in found} == {adapter_sha256(replayed.adapter)}
    assert all(0 < int(each[1]) < STEPS for each in found)
    assert {(each[2], each[3]) for each in found} == {("108", "1")}
    assert all(len(record.contributions) == 4 for record in read_journal(tmp_path / "run.jsonl").records)
