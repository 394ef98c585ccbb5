"""Several programs of one model on one weights file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowering
import mobizo_passes as mz
from mobizo_passes.zo.estimators import Estimator
from runtime_driver import Session, WeightsFileError, step_seed
from tests.models import Lora, integers, seeded


class Model(nn.Module):
    """An embedding, a norm, LoRA layers and a head: read by kernels, as constants of a delegate, and folded."""

    def __init__(self, adapter: int = 0, head: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.norm = nn.LayerNorm(12)
        self.layers = nn.ModuleList(Lora(12, 12) for _ in range(2))
        self.turned = nn.Parameter(torch.empty(12, 8))
        self.head = nn.Linear(8, 4)
        seeded(self)
        for layer in self.loras:
            seeded(layer.lora_A, adapter + 1)
        seeded(self.head, head + 1)

    @property
    def loras(self) -> list[Lora]:
        return [layer for layer in self.layers if isinstance(layer, Lora)]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        for layer in self.loras:
            x = torch.tanh(layer(x))
        return self.head(x @ self.turned)


RUN: dict[str, Any] = {"lr": 0.05, "eps": 0.01}


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, i64[size] each."""
    return integers(11, size), integers(4, size, seed=9)


def transformed(model: Model, estimator: Estimator | None = None, size: int = 4) -> mz.TrainingProgram:
    return mz.transform(model.eval(), batch(size), loss=F.cross_entropy, estimator=estimator or mz.TwoSided(2))


@dataclass(frozen=True)
class Base:
    """The first program: its target, its weights file, and the model's large weights as bytes, the head aside."""

    target: str
    path: Path
    weights: tuple[bytes, ...]

    @property
    def file(self) -> Path:
        return self.path.with_suffix(".ptd")


@pytest.fixture(scope="module", params=["portable", "xnnpack"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    model = Model()
    lowered = lowering.lower(transformed(model), target=request.param, external_weights=True)
    assert lowered.report.methods["step"].partitions == (request.param == "xnnpack")
    path = lowered.save(tmp_path_factory.mktemp("shared") / "base.pte")
    layers = [layer.base.weight for layer in model.loras]
    return Base(request.param, path, tuple(each.detach().numpy().tobytes() for each in (model.table.weight, *layers)))


def steps(
    program: Path, weights_file: Path | None = None
) -> tuple[tuple[float, ...], dict[str, Tensor], Tensor, float]:
    session = Session(program, weights_file)
    spec = session.manifest.batch
    inputs = dict(zip(spec.inputs, batch(spec.size), strict=True))
    losses = session.fit([inputs], 3, **RUN).losses
    return losses, session.adapter, session.predict(inputs), session.batch_loss(inputs)


def agree(program: mz.TrainingProgram, path: Path, weights_file: Path | None, target: str) -> None:
    """Bit for bit what the same program does with its weights inside."""
    inside = lowering.lower(program, target=target).save(path.with_name("inside.pte"))
    (losses, adapter, logits, loss), (losses_, adapter_, logits_, loss_) = steps(path, weights_file), steps(inside)
    assert (losses, loss) == (losses_, loss_)
    assert torch.equal(logits, logits_)
    assert all(torch.equal(adapter[fqn], adapter_[fqn]) for fqn in adapter_)


@pytest.mark.parametrize("change", ["adapter", "queries", "estimator and batch"])
def test_programs_of_one_model_write_the_same_file_and_run_on_either(base: Base, tmp_path: Path, change: str) -> None:
    program = {
        "adapter": lambda: transformed(Model(adapter=5)),
        "queries": lambda: transformed(Model(), mz.TwoSided(3)),
        "estimator and batch": lambda: transformed(Model(), mz.OneSided(3), size=6),
    }[change]()
    path = lowering.lower(program, target=base.target, external_weights=True).save(tmp_path / "other.pte")
    assert path.with_suffix(".ptd").read_bytes() == base.file.read_bytes()
    assert path.read_bytes() != base.path.read_bytes()
    path.with_suffix(".ptd").unlink()
    (first, *_), adapter, logits, loss = steps(path, base.file)
    inputs = batch(6 if "batch" in change else 4)
    eager = program.step(program.initial_adapter(), inputs, seed=step_seed(0, 0), **RUN)
    assert first == pytest.approx(float(eager.loss), rel=1e-5)
    assert loss == pytest.approx(float(program.loss(adapter, inputs)), rel=1e-5)
    torch.testing.assert_close(logits, program.logits(adapter, inputs), rtol=1e-5, atol=1e-6)


def test_a_program_with_another_head_keeps_the_head_and_shares_the_rest(base: Base, tmp_path: Path) -> None:
    model = Model(head=3)
    program = transformed(model)
    own = lowering.lower(program, target=base.target, external_weights=True).save(tmp_path / "own.pte")
    with pytest.raises(WeightsFileError, match="expected SHA-256"):
        steps(own, base.file)
    before = base.file.read_bytes()
    path = lowering.lower(program, target=base.target, weights_file=base.file).save(tmp_path / "other.pte")
    assert base.file.read_bytes() == before
    assert not path.with_suffix(".ptd").exists()
    data, head = path.read_bytes(), model.head.weight.detach().numpy().tobytes()
    assert data.count(head) == 1
    assert head not in before
    assert [(weight in data, weight in before) for weight in base.weights] == [(False, True)] * 3
    agree(program, path, base.file, base.target)
    # Beside the program it is found by the name that it had.
    (tmp_path / "base.ptd").write_bytes(before)
    assert steps(path)[0] == steps(path, base.file)[0]


def test_the_adapter_and_the_folded_weight(base: Base) -> None:
    """The adapter is in the program, where each program has its own; a weight that is stored transposed is shared."""
    model = Model()
    inside, outside = base.path.read_bytes(), base.file.read_bytes()
    factor = model.loras[0].lora_A.weight.detach().numpy().tobytes()
    assert factor in inside
    assert factor not in outside
    turned = {each.contiguous().numpy().tobytes() for each in (model.turned.detach(), model.turned.detach().t())}
    assert any(each in outside for each in turned)
    assert not any(each in inside for each in turned)
