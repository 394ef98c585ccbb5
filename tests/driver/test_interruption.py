"""What is left of a run that is killed, or interrupted with Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lowering
import mobizo_passes as mz
from runtime_driver import Session, read_journal
from tests.driver import tiny
from tests.driver.train_worker import batches_for, run_options
from tests.models import seeded
from tests.passes.contract import Tiny, rows

STEPS = 200
KILLS = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 4
ROOT = Path(__file__).parents[2]


def worker(*arguments: object) -> subprocess.Popen[str]:
    """A process that trains; see `train_worker`."""
    command = [sys.executable, "-m", "tests.driver.train_worker", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def wait_for_records(journal: Path, count: int) -> None:
    """Until the journal has so many steps, so that a slow machine does not make the test easier."""
    while not journal.exists() or journal.read_bytes().count(b"\n") < count + 1:
        time.sleep(0.005)


EXACT = "exact gradients with AdamW"


@pytest.fixture(scope="module", params=["differences", "derivatives", EXACT])
def trained(
    request: pytest.FixtureRequest, built_pte: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Session]:
    """A program, and a session with it that was not interrupted."""
    path = tmp_path_factory.mktemp("trained") / "tiny.pte"
    if request.param == "differences":
        path = built_pte
    elif request.param == "derivatives":
        tiny.build_derivatives(path)
    else:
        program = mz.transform(
            seeded(Tiny()), rows(), loss=F.cross_entropy, estimator=mz.Exact(), optimizer=mz.AdamW(clip_norm=1.0)
        )
        lowering.lower(program, target="portable").save(path)
    session = Session(path)
    session.fit(batches_for(session), STEPS, **run_options(session))
    return path, session


def assert_same_adapter(left: Session, right: Session) -> None:
    for fqn, value in left.adapter.items():
        assert torch.equal(value, right.adapter[fqn]), fqn


def test_sigkills_and_a_resume_give_the_same_bits(trained: tuple[Path, Session], tmp_path: Path):
    (path, whole), journal, out = trained, tmp_path / "run.jsonl", tmp_path / "adapter"
    text, _ = worker(path, journal, STEPS, out, KILLS).communicate()
    done = json.loads(text.splitlines()[-1])
    assert len(done) == KILLS
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] < STEPS
    assert not out.exists()
    session = Session(path)
    result = session.fit(batches_for(session), STEPS, **run_options(session), journal=journal)
    assert result.first_step == done[-1]
    assert_same_adapter(session, whole)


@pytest.mark.parametrize("trained", ["differences", EXACT], indirect=True)
def test_ctrl_c_ends_between_two_steps(trained: tuple[Path, Session], tmp_path: Path):
    (path, whole), journal, out = trained, tmp_path / "run.jsonl", tmp_path / "adapter"
    process = worker(path, journal, STEPS, out)
    wait_for_records(journal, 5)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 0
    result = json.loads(text.splitlines()[-1])
    assert result["interrupted"]
    assert 0 < result["steps"] < STEPS
    assert len(read_journal(journal).records) == result["steps"]
    session, saved = Session(path), Session(path)
    saved.load_adapter(out)
    # An exact run has nothing to replay: its journal has no projected gradients.
    if session.manifest.estimator.queries:
        session.replay(journal)
        assert_same_adapter(saved, session)
    session.fit(batches_for(session), STEPS, **run_options(session), journal=journal)
    assert_same_adapter(session, whole)


def test_ctrl_c_handler_is_put_back(session: Session):
    before = signal.getsignal(signal.SIGINT)
    session.fit(tiny.make_batches(1), 1, lr=0.5, eps=1e-2)
    assert signal.getsignal(signal.SIGINT) is before
