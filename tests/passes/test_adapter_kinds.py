"""An adapter with names of its own: one registration, from discovery to the file that the driver writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lowering
import mobizo_passes as mz
from mobizo_passes.sites.adapter_kinds import adapter_kinds
from runtime_driver import Session
from tests.models import random, seeded

KIND = mz.AdapterKind("wide", lora_A=r"reduce(\.weight)?", lora_B=r"restore(\.weight)?")


class Wide(nn.Module):
    """An adapter of rank 4 on a layer [6 -> 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 4)
        self.reduce, self.restore = nn.Linear(6, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.restore(self.reduce(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare = Wide(), Wide()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


INPUTS = (random(2, 6), random(2, 4))


@pytest.fixture
def registered() -> Iterator[None]:
    mz.register_adapter_kind(KIND)
    yield
    mz.unregister_adapter_kind(KIND)


def test_without_the_registration_it_is_no_adapter() -> None:
    with pytest.raises(mz.NoLoRASites, match="found no LoRA site"):
        mz.transform(seeded(Net()), INPUTS, loss=F.mse_loss)


@pytest.mark.usefixtures("registered")
def test_it_is_found_by_its_names() -> None:
    model = seeded(Net())
    program = mz.transform(model, INPUTS, loss=F.mse_loss)
    (site,) = program.sites
    assert (site.name, site.rank, site.kind) == ("first", 4, "linear")
    assert site.factors == {"lora_A": "first.reduce.weight", "lora_B": "first.restore.weight"}
    mz.verify(program, model, INPUTS)
    # The factors of a module that nothing calls are named among those that are not taken.
    reasons = {each.name: each.reason for each in program.sites.rejected}
    assert "not active" in reasons["spare.restore.weight"]


@pytest.mark.usefixtures("registered")
def test_both_factors_train_and_are_written(tmp_path: Path) -> None:
    program = mz.transform(seeded(Net()), INPUTS, loss=F.mse_loss, trainable="lora_A+lora_B")
    assert list(program.initial_adapter()) == ["first.reduce.weight", "first.restore.weight"]
    lowering.lower(program, target="portable").save(tmp_path / "net.pte")
    session = Session(tmp_path / "net.pte")
    batch = dict(zip(program.inputs.tensors, INPUTS, strict=True))
    session.fit([batch] * 2, 2, lr=1e-2, eps=1e-2, seed=0)
    session.save_adapter(tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for fqn, before in program.initial_adapter().items():
        assert written[fqn].shape == before.shape
        assert not torch.equal(written[fqn], before)


def test_what_a_kind_can_not_be() -> None:
    with pytest.raises(mz.InputError, match=r"lora_B of adapter kind 'bad' is no regular expression: .*position"):
        mz.AdapterKind("bad", lora_A="a", lora_B="*")
    with pytest.raises(mz.InputError, match="there is an adapter kind 'torchtune' already"):
        mz.register_adapter_kind(mz.AdapterKind("torchtune", "a", "b"))
    with pytest.raises(mz.InputError, match="adapter kind 'wide' is not registered"):
        mz.unregister_adapter_kind(KIND)


def test_no_name_belongs_to_both_factors() -> None:
    names = ["q.lora_A.weight", "q.lora_B.default.weight", "q.lora_embedding_A.default", "q.lora_b.weight", "q.lora.up"]
    for kind in adapter_kinds():
        assert not [name for name in names if kind.is_down(name) and kind.is_up(name)]
