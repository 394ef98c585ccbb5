"""What is trained: factors of sites, what the model marks, or parameters that are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.models import Mlp, integers, random, seeded


class Plain(nn.Module):
    """Nothing low-rank: a layer, a norm, a parameter that nothing reads, one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)
        self.unread = nn.Parameter(torch.ones(3))
        self.again = nn.Linear(6, 8)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x) + self.again(x.flip(1)))))


INPUTS = (random(3, 6), integers(4, 3))


def trained(trainable: Any, model: nn.Module | None = None, **options: Any) -> mz.TrainingProgram:
    model = seeded(Plain()) if model is None else model
    program = mz.transform(
        model, INPUTS, loss=F.cross_entropy, estimator=mz.TwoSided(1), trainable=trainable, **options
    )
    mz.verify(program, model, INPUTS)
    return program


def test_a_predicate_chooses_any_parameters() -> None:
    program = trained(lambda fqn, p: p.dim() == 1)
    # In the model's order, without what nothing reads.
    assert list(program.initial_adapter()) == ["first.bias", "norm.weight", "norm.bias", "again.bias"]
    assert (program.trainable, len(program.sites)) == ("parameters", 0)
    assert [t.fqn for file in program.adapter_files for t in file.tensors] == list(program.initial_adapter())


@pytest.mark.parametrize("name", ["first.weight", "again.weight"])
def test_a_tied_weight_is_trained_under_any_of_its_names(name: str) -> None:
    (fqn,) = trained([name]).initial_adapter()
    assert fqn in ("first.weight", "again.weight")


def test_what_requires_gradients() -> None:
    model = seeded(Plain())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("norm.weight", "unread"))
    program = trained("requires_grad", model)
    assert (list(program.initial_adapter()), program.trainable) == (["norm.weight"], "requires_grad")
    model.norm.requires_grad_(False)
    with pytest.raises(mz.InputError, match="no parameter that the graph reads requires gradients"):
        trained("requires_grad", model)


def test_the_sites_of_what_is_chosen() -> None:
    """A low-rank update of which nothing is trained is part of the base."""
    program = trained(["first.squeeze"], seeded(Mlp()))
    assert [site.lora_A for site in program.sites] == ["first.squeeze"]
    assert list(program.initial_adapter()) == ["first.squeeze"]


@pytest.mark.parametrize(
    ("trainable", "options", "message"),
    [
        (["norm.wieght"], {}, "names no parameter of the model: norm.wieght"),
        (["weight"], {}, "no parameter of the model: weight; the nearest names: first.weight, norm.weight"),
        (["unread"], {}, "the loss does not depend on: unread"),
        ([], {}, "trainable must be one of"),
        (7, {}, "trainable must be one of 'lora_B', .*, a predicate .* or a list of FQNs; found 7"),
        (lambda fqn, p: fqn == "unread", {}, "selects 1 parameters, none of which the graph reads"),
        (["norm.weight"], {"sites": ["first"]}, "sites= chooses among LoRA sites"),
    ],
)
def test_what_can_not_be_trained(trainable: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(mz.InputError, match=message):
        trained(trainable, **options)


def test_without_a_choice_and_without_peft_there_must_be_a_site() -> None:
    with pytest.raises(mz.NoLoRASites, match=r"or say trainable="):
        trained(None)


def test_the_reference_leaves_a_module_with_two_names_as_it_was() -> None:
    """`functional_call` with `tie_weights` does not."""

    class Aliased(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.first

    model = seeded(Aliased())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(["first.weight"], model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
