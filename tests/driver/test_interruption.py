"""What is left of a run that is killed, or interrupted with Ctrl-C."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime_driver import Session, read_journal
from tests.driver import tiny
from tests.driver.conftest import Either

STEPS = 300
ROOT = Path(__file__).parents[2]


def start(pte: Path, journal: Path, out: Path) -> subprocess.Popen[str]:
    """A training process, returned as soon as its first step is about to run."""
    command = [sys.executable, "-m", "tests.driver.train_worker", str(pte), str(journal), str(STEPS), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def wait_for_records(journal: Path, count: int) -> None:
    """Until the journal has so many steps, so that a slow machine does not make the test easier."""
    while not journal.exists() or journal.read_bytes().count(b"\n") < count + 1:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(either: Either) -> Session:
    session = either.session()
    session.fit(tiny.make_batches(3), STEPS, **either.run)
    return session


def test_sigkill_again_and_again_then_resume(either: Either, tmp_path: Path, uninterrupted: Session):
    journal, out = tmp_path / "run.jsonl", tmp_path / "adapter"
    chance = random.Random(0)
    done = [0]
    for _ in range(3):
        process = start(either.path, journal, out)
        wait_for_records(journal, done[-1] + 1)
        time.sleep(chance.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done.append(len(read_journal(journal).records))
        assert not out.exists()
    assert done == sorted(set(done))
    assert 0 < done[-1] < STEPS
    session = either.session()
    result = session.fit(tiny.make_batches(3), STEPS, **either.run, journal=journal)
    assert result.first_step == done[-1]
    assert torch.equal(session.adapter[tiny.FQN_B], uninterrupted.adapter[tiny.FQN_B])


def test_ctrl_c_ends_between_two_steps(either: Either, tmp_path: Path, uninterrupted: Session):
    journal, out = tmp_path / "run.jsonl", tmp_path / "adapter"
    process = start(either.path, journal, out)
    wait_for_records(journal, 5)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 0
    result = json.loads(text.splitlines()[-1])
    assert result["interrupted"]
    assert 0 < result["steps"] < STEPS
    assert len(read_journal(journal).records) == result["steps"]
    session = either.session()
    session.replay(journal)
    replayed = session.adapter
    session.load_adapter(out)
    assert torch.equal(session.adapter[tiny.FQN_B], replayed[tiny.FQN_B])
    session.fit(tiny.make_batches(3), STEPS, **either.run, journal=journal)
    assert torch.equal(session.adapter[tiny.FQN_B], uninterrupted.adapter[tiny.FQN_B])


def test_ctrl_c_handler_is_put_back(session: Session):
    before = signal.getsignal(signal.SIGINT)
    session.fit(tiny.make_batches(1), 1, lr=0.5, eps=1e-2)
    assert signal.getsignal(signal.SIGINT) is before
