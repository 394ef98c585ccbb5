"""Programs of exact gradients, and optimizers with a state, in the driver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowering
import mobizo_passes as mz
import runtime_driver as driver
from runtime_driver import Session
from runtime_driver.resume import snapshot_path
from tests.models import seeded
from tests.passes.contract import Tiny, rows

STEPS = 7


def lowered(directory: Path, **options: Any) -> Path:
    program = mz.transform(seeded(Tiny()), rows(), loss=F.cross_entropy, **options)
    return lowering.lower(program, target="portable").save(directory / "step.pte")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered(tmp_path_factory.mktemp("exact"), estimator=mz.Exact(), optimizer=mz.AdamW(clip_norm=1.0))


@pytest.fixture(scope="module")
def estimated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered(tmp_path_factory.mktemp("estimated"), estimator=mz.OneSided(queries=2), optimizer=mz.Momentum(0.7))


def batches(session: Session) -> list[dict[str, Tensor]]:
    """Three batches that differ."""
    x, labels = rows()
    names = session.manifest.batch.inputs
    return [dict(zip(names, (x * (1 + 0.1 * i), labels.roll(i)), strict=True)) for i in range(3)]


def fit(path: Path, steps: int = STEPS, **options: Any) -> tuple[Session, driver.FitResult]:
    session = Session(path)
    result = session.fit(batches(session), steps, lr=0.05, progress=False, **options)
    return session, result


def same(left: Session, right: Session) -> bool:
    pairs = (*zip(left.adapter.values(), right.adapter.values(), strict=True),)
    pairs += (*zip(left.optimizer.values(), right.optimizer.values(), strict=True),)
    return all(torch.equal(a, b) for a, b in pairs)


def states(journal: Path) -> list[str]:
    """The hash in each record of a journal."""
    return [json.loads(line)["state"] for line in journal.read_text().splitlines()[1:]]


def test_it_trains_as_torch_does(exact: Path) -> None:
    session, result = fit(exact, seed=3)
    model = seeded(Tiny())
    parameters = dict(model.named_parameters())
    chosen = [parameters[fqn] for fqn in session.initial_adapter]
    optimizer = torch.optim.AdamW(chosen, lr=0.05)
    given = [tuple(each.values()) for each in batches(session)]
    for step in range(STEPS):
        x, labels = given[step % 3]
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
    for fqn, value in session.adapter.items():
        # Seven steps of float32 in another order.
        torch.testing.assert_close(value, parameters[fqn].detach(), rtol=1e-5, atol=1e-5)
    assert len(result.losses) == STEPS
    assert int(session.optimizer["optimizer.step"]) == STEPS


def test_a_step_has_neither_seed_nor_epsilon(exact: Path, estimated: Path) -> None:
    session = Session(exact)
    batch = batches(session)[0]
    output = session.step(batch, lr=0.05)
    assert output.projected_gradients == ()
    assert int(output.optimizer["optimizer.step"]) == 1
    with pytest.raises(driver.HyperparameterError, match="`eps` must be no value for a program of exact"):
        session.step(batch, lr=0.05, eps=1e-2)
    with pytest.raises(driver.HyperparameterError, match="`seed` must be no value"):
        session.step(batch, seed=1, lr=0.05)
    with pytest.raises(driver.HyperparameterError, match="`eps` must be no value"):
        session.fit([batch], 1, lr=0.05, eps=1e-2)
    other = Session(estimated)
    with pytest.raises(driver.HyperparameterError, match="`eps` must be a number > 0"):
        other.fit(batches(other), 1, lr=0.05)


def test_the_journal_has_losses_and_hashes(exact: Path, tmp_path: Path) -> None:
    _, result = fit(exact, journal=tmp_path / "run.jsonl")
    header, *records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert (header["queries"], header["eps"]) == (0, "none")
    assert [each["loss"] for each in records] == list(result.losses)
    assert all(each["projected_gradients"] == [] and len(each["state"]) == 64 for each in records)
    assert len({each["state"] for each in records}) == STEPS


@pytest.mark.parametrize("snapshot_every", [None, 1, 2, 3, STEPS])
@pytest.mark.parametrize("cut", [0, 1, 4, STEPS])
def test_a_resumed_run_ends_in_the_same_bits(exact: Path, tmp_path: Path, snapshot_every: int | None, cut: int) -> None:
    whole, expected = fit(exact, journal=tmp_path / "whole.jsonl")
    path = tmp_path / "run.jsonl"
    fit(exact, max(cut, 1), journal=path, snapshot_every=snapshot_every)
    if cut == 0:
        # Killed after the header: nothing but the header is there.
        path.write_text(path.read_text().splitlines(keepends=True)[0])
        snapshot_path(path).unlink(missing_ok=True)
    session, result = fit(exact, journal=path, snapshot_every=snapshot_every)
    assert same(session, whole)
    assert (result.first_step, result.steps) == (cut, STEPS)
    assert result.losses == expected.losses
    assert states(path) == states(tmp_path / "whole.jsonl")


def test_a_damaged_snapshot_is_not_used(exact: Path, tmp_path: Path) -> None:
    whole, _ = fit(exact)
    path = tmp_path / "run.jsonl"
    fit(exact, 4, journal=path, snapshot_every=2)
    data = bytearray(snapshot_path(path).read_bytes())
    data[-3] ^= 1
    snapshot_path(path).write_bytes(data)
    with pytest.warns(driver.SnapshotWarning):
        session, _ = fit(exact, journal=path)
    assert same(session, whole)


def test_other_batches_are_noticed(exact: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    fit(exact, 4, journal=path, snapshot_every=None)
    session = Session(exact)
    with pytest.raises(driver.RecomputedError, match=r"step 0, computed again, gives the loss .*batches of the run"):
        session.fit(batches(session)[1:], STEPS, lr=0.05, journal=path)


def test_replay_says_what_to_do_instead(exact: Path, tmp_path: Path) -> None:
    fit(exact, 2, journal=tmp_path / "run.jsonl")
    with pytest.raises(driver.NotReplayableError, match=r"Run fit \(mobizo train\) with this journal"):
        Session(exact).replay(tmp_path / "run.jsonl")


def test_estimates_with_momentum_resume_and_replay(estimated: Path, tmp_path: Path) -> None:
    whole, _ = fit(estimated, eps=1e-2)
    path = tmp_path / "run.jsonl"
    fit(estimated, 4, eps=1e-2, journal=path, snapshot_every=3)
    session, result = fit(estimated, eps=1e-2, journal=path, snapshot_every=3)
    assert same(session, whole)
    assert result.first_step == 4
    for keep in (True, False):
        if not keep:
            snapshot_path(path).unlink()
        replayed = Session(estimated)
        assert replayed.replay(path) == STEPS
        assert same(replayed, whole)
    assert any(float(each.abs().max()) > 0 for each in replayed.optimizer.values())


def test_another_adapter_has_a_state_of_its_own(exact: Path) -> None:
    session, _ = fit(exact)
    session.adapter = session.initial_adapter
    assert not any(bool(each.any()) for each in session.optimizer.values())
    again, _ = fit(exact)
    session.fit(batches(session), STEPS, lr=0.05)
    assert same(session, again)
