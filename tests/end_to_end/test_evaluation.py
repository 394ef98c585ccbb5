"""A lowered program's evaluation is the eager loss of the whole data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowering
import mobizo_passes as mz
from runtime_driver import BatchError, Session
from tests.models import Mlp, SequenceFirst, integers, random, seeded


def opened(path: Path, model: nn.Module, inputs: tuple[Tensor, ...], **options: object) -> Session:
    program = mz.transform(model, inputs, estimator=mz.TwoSided(1), **options)  # type: ignore[arg-type]
    lowering.lower(program, target="portable").save(path / "model.pte")
    return Session(path / "model.pte")


def focal(outputs: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(outputs, labels, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def class_weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, torch.tensor([1.0, 5.0, 0.5, 2.0]))


def summed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


@pytest.mark.parametrize("loss", [focal, class_weighted, summed])
def test_the_loss_of_all_batches(tmp_path: Path, loss: Callable[..., Tensor]) -> None:
    model, x, y = seeded(Mlp()), random(7, 6), integers(4, 7)
    session = opened(tmp_path, model, (x[:3], y[:3]), loss=loss)
    names = session.manifest.batch.inputs
    parts = [dict(zip(names, (x[i : i + 3], y[i : i + 3]), strict=True)) for i in (0, 3, 6)]
    with torch.no_grad():
        whole, last = float(loss(model(x), y)), float(loss(model(x[6:]), y[6:]))
    assert session.evaluate(parts).loss == pytest.approx(whole, rel=1e-6)
    assert session.evaluate(parts).examples == 7
    assert session.batch_loss(parts[2]) == pytest.approx(last, rel=1e-6)
    torch.testing.assert_close(session.predict(parts[2]), model(x[6:]).detach())


def test_a_batch_in_the_second_dimension(tmp_path: Path) -> None:
    model, x, y = seeded(SequenceFirst()), random(5, 7, 6), integers(4, 7)
    session = opened(tmp_path, model, (x[:, :3], y[:3]), loss=F.cross_entropy, batch_dim=1)
    names = session.manifest.batch.inputs
    parts = [dict(zip(names, (x[:, i : i + 3], y[i : i + 3]), strict=True)) for i in (0, 3, 6)]
    result = session.evaluate(parts)
    assert result.loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-6)
    assert result.examples == 7


def test_a_number_first(tmp_path: Path) -> None:
    class Scaled(Mlp):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x * scale)

    model, x, y = seeded(Scaled()), random(4, 6), integers(4, 4)
    session = opened(tmp_path, model, (torch.tensor(0.5), x[:3], y[:3]), loss=F.cross_entropy)
    part = dict(zip(session.manifest.batch.inputs, (torch.tensor(0.5), x[3:], y[3:]), strict=True))
    assert (session.manifest.batch.size, session.evaluate([part]).examples) == (3, 1)
    wanted = F.cross_entropy(model(torch.tensor(0.5), x[3:]), y[3:])
    assert session.batch_loss(part) == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_a_loss_that_does_not_come_apart_is_refused_by_name(tmp_path: Path) -> None:
    def against_the_batch(outputs: Tensor, wanted: Tensor) -> Tensor:
        return ((outputs - wanted) / wanted.std()).square().mean()

    x, y = random(4, 6), random(4, 4, seed=3)
    session = opened(tmp_path, seeded(Mlp()), (x[:3], y[:3]), loss=against_the_batch)
    names = session.manifest.batch.inputs
    whole, part = (dict(zip(names, (x[:n], y[:n]), strict=True)) for n in (3, 2))
    assert session.evaluate([whole]).loss == session.batch_loss(whole)
    with pytest.raises(BatchError, match=r"2 rows, the program takes 3, and the loss .* examples see one another"):
        session.evaluate([part])
    with pytest.raises(BatchError, match="more than one batch"):
        session.evaluate([whole, whole])
