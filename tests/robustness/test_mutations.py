"""Damaged files of every kind: refused in one line, or without consequence, or said; never a crash."""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.mutations import ANY, TEXT, mutate, mutate_text
from tests.robustness.world import KINDS

ROOT = Path(__file__).parents[2]
#: Of each kind of file.
SHORT, LONG = 6, 250
#: No command takes a hundredth of it; a file that is waited for forever does.
SECONDS = 300


@dataclass
class Worker:
    """A process that runs mutations; a mutation that ends it is known by the line that began it."""

    world: Path
    process: subprocess.Popen[str] | None = None

    def run(self, kind: str, seed: int) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, "-m", "tests.robustness.worker", str(self.world)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, seed]) + "\n")
        self.process.stdin.flush()
        if self._answer() is None:
            raise AssertionError(f"the worker cannot run {kind} on undamaged files")
        answer = self._answer()
        if answer is None:
            self.stop()
            return {"damage": f"seed {seed}", "fault": "the process died or hung"}
        return answer

    def _answer(self) -> dict[str, Any] | None:
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def worker(world: Path) -> Iterator[Worker]:
    made = Worker(world)
    yield made
    made.stop()


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damaged_files(worker: Worker, kind, request: pytest.FixtureRequest):
    count = LONG if request.config.getoption("--long", default=False) else SHORT
    faults, refused = [], 0
    for seed in range(count):
        answer = worker.run(kind.name, seed)
        refused += answer.get("code") == 1
        if answer["fault"] is not None:
            faults.append(f"seed {seed}, {answer['damage']}: {answer['fault']}")
    assert not faults, "\n".join(faults)
    print(f"{kind.name}: {refused} of {count} refused")


@pytest.mark.parametrize(("drawn", "kinds"), [(mutate, ANY), (mutate_text, TEXT)])
def test_mutations_change_what_they_are_given_and_repeat(drawn, kinds):
    seen = set()
    for seed in range(300):
        data = b'{"a":1,"b":"x"}\n{"a":2,"b":[3.5]}\n' * (1 + seed % 9)
        text, changed = drawn(data, random.Random(seed))
        assert changed != data
        assert drawn(data, random.Random(seed)) == (text, changed)
        seen.add(text.split(" ")[-1])
    assert drawn(b"", random.Random(0))[1]
    assert len(seen) > len(kinds)
