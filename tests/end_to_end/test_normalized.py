"""FZOO's normalization inside a .pte, and a training run with it that its journal repeats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lowering
import mobizo_passes as mz
import runtime_driver
from runtime_driver.format import Manifest
from tests.models import Mlp, seeded
from tests.passes.test_errors import mlp_inputs

CHOICES = [
    ("portable", mz.TwoSided(queries=3, normalize="std"), "gaussian", "lora_A+lora_B"),
    ("xnnpack", mz.OneSided(queries=4, normalize="std"), "rademacher", "lora_B"),
]


@pytest.mark.parametrize(("target", "estimator", "noise", "trainable"), CHOICES)
def test_training_with_normalized_gradients(
    target: str, estimator: mz.TwoSided | mz.OneSided, noise: str, trainable: str, tmp_path: Path
) -> None:
    model, inputs = seeded(Mlp()), mlp_inputs()
    program = mz.transform(model, inputs, loss=F.cross_entropy, estimator=estimator, noise=noise, trainable=trainable)
    path = lowering.lower(program, target=target).save(tmp_path / "model.pte")
    assert Manifest.load(path.with_suffix(".json")).estimator.normalize == "std"
    batch = dict(zip(program.inputs.tensors, inputs, strict=True))

    session = runtime_driver.Session(path)
    eps, lr = float(torch.tensor(1e-2)), float(torch.tensor(2e-3))
    want = mz.reference.step(
        model,
        inputs,
        session.adapter,
        seed=5,
        lr=lr,
        eps=eps,
        estimator=estimator,
        noise_kind=noise,
        loss=F.cross_entropy,
    )
    got = session.step(batch, seed=5, lr=lr, eps=eps, update=False)
    torch.testing.assert_close(torch.tensor(got.losses), want.losses, rtol=0, atol=2e-5)
    gradients = torch.tensor(got.projected_gradients)
    own = mz.reference.projected_gradients(torch.tensor(got.losses), eps, estimator)
    torch.testing.assert_close(gradients, own, rtol=0, atol=1e-5 * float(own.abs().max()))
    # What makes it another step than the plain one: differences of losses over their own deviation.
    plain = mz.reference.projected_gradients(torch.tensor(got.losses), eps, type(estimator)(estimator.queries))
    assert float((gradients / plain).std()) < 1e-3 * float((gradients / plain).mean())
    assert float((gradients / plain).mean()) > 2

    journal = tmp_path / "run.jsonl"
    result = session.fit([batch], steps=40, lr=lr, eps=eps, seed=1, journal=journal, snapshot_every=None)
    assert sum(result.losses[-5:]) < 0.9 * sum(result.losses[:5])
    again = runtime_driver.Session(path)
    assert again.replay(journal) == 40
    assert all(torch.equal(again.adapter[fqn], value) for fqn, value in session.adapter.items())
    # Eager PyTorch repeats the run from the journal too.
    adapter = program.initial_adapter()
    for record in runtime_driver.read_journal(journal).records:
        scalars = torch.tensor(record.projected_gradients)
        adapter = program.apply(adapter, seed=record.seed, lr=record.lr, projected_gradients=scalars)
    for fqn, value in session.adapter.items():
        torch.testing.assert_close(adapter[fqn], value, rtol=0, atol=1e-5)
