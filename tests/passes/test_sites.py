"""Discovery of LoRA sites: conventions of names, structure, choices, and near misses with their reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.sites.select import discover
from tests.models import BATCH, CalledTwice, Lora, Mlp, Transposed, integers, random, seeded


def transform(model: nn.Module, **options: Any) -> mz.TrainingProgram:
    inputs = (random(BATCH, 6), integers(4, BATCH))
    return mz.transform(seeded(model), inputs, **{"loss": F.cross_entropy, "estimator": mz.TwoSided(1), **options})


class Named(nn.Module):
    """A LoRA layer whose factors have given names, dots included; rank may exceed what counts as narrow."""

    def __init__(self, down: str, up: str, rank: int = 2, width: int = 8, add: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(6, width)
        self.down, self.up, self.add = down, up, add
        for name, fan_in, fan_out in ((down, 6, rank), (up, rank, width)):
            module: nn.Module = self
            *path, last = name.removesuffix(".weight").split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            if name.endswith(".weight"):
                module.add_module(last, nn.Linear(fan_in, fan_out, bias=False))
            else:
                module.register_parameter(last, nn.Parameter(torch.empty(fan_out, fan_in)))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.get_parameter(self.down), self.get_parameter(self.up)
        low = F.linear(F.linear(x, down), up) * 0.5
        return self.head(self.linear(x) + low if self.add else torch.relu(low))


@pytest.mark.parametrize(
    ("down", "up", "name"),
    [
        ("q.lora_A.default.weight", "q.lora_B.default.weight", "q"),  # PEFT
        ("q.lora_A.weight", "q.lora_B.weight", "q"),
        ("q.lora_A", "q.lora_B", "q"),  # loralib
        ("q.lora_a.weight", "q.lora_b.weight", "q"),  # torchtune
        ("q.lora.down.weight", "q.lora.up.weight", "q"),  # diffusers
    ],
)
def test_conventions_of_names(down: str, up: str, name: str) -> None:
    # As wide as the layer: only the names tell that these are LoRA factors.
    program = transform(Named(down, up, rank=8))
    assert program.sites == (mz.LoRASite(name, down, up, 8, 0.5, 6, 8),)
    assert list(program.initial_adapter()) == [up]
    assert list(program.frozen_adapter()) == [down]


def test_own_names_are_found_by_structure() -> None:
    program = transform(Mlp())
    assert [(s.lora_A, s.lora_B, s.rank, s.scaling, s.in_features, s.out_features) for s in program.sites] == [
        ("first.squeeze", "first.widen", 2, 2.0, 6, 8),
        ("second.squeeze", "second.widen", 1, 2.0, 8, 7),
    ]


def test_transposed_storage_is_found() -> None:
    (site,) = transform(Transposed()).sites
    assert (site.lora_A, site.lora_B, site.rank, site.scaling) == ("A", "B", 3, 0.5)
    assert (site.in_features, site.out_features) == (6, 9)


def test_a_module_called_twice_is_one_site() -> None:
    (site,) = transform(CalledTwice()).sites
    assert site.name == "layer"


def test_peft_sites(compiled) -> None:
    program, model, _ = compiled("llama-qv")
    assert [s.name.rsplit(".", 1)[-1] for s in program.sites] == ["q_proj", "v_proj"] * 2
    assert {s.rank for s in program.sites} == {3}
    assert {s.scaling for s in program.sites} == {2.0}
    assert {s.lora_B for s in program.sites} <= {name for name, _ in model.named_parameters()}
    assert [s.out_features for s in program.sites] == [8, 4, 8, 4]


def test_rslora_scaling(compiled) -> None:
    program, _, _ = compiled("llama-rslora-words")
    assert {s.scaling for s in program.sites} == {6 / 3**0.5}


def test_manifest_keys_are_those_peft_writes(compiled) -> None:
    import peft

    program, model, _ = compiled("llama-qv")
    written = set(peft.get_peft_model_state_dict(model))
    (file,) = program.manifest()["adapter_files"]
    assert {entry["key"] for entry in file["tensors"]} == written
    assert file["config"]["r"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["o_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_all_that_peft_stores_is_in_the_manifest(options: dict[str, Any]) -> None:
    import peft
    import transformers

    from tests.models import llama_inputs

    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attention_bias=True,
    )  # fmt: skip
    lora = peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj"], **options})
    model: Any = seeded(peft.get_peft_model(transformers.LlamaForCausalLM(config), lora), scale=0.3)
    program = mz.transform(model, llama_inputs(), estimator=mz.TwoSided(1))
    written = set(peft.get_peft_model_state_dict(model))
    (file,) = program.manifest()["adapter_files"]
    assert {entry["key"] for entry in file["tensors"]} == written


def test_two_active_adapters_have_a_directory_each() -> None:
    import peft

    from tests.models import llama, llama_inputs

    model: Any = llama(("q_proj",))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    program = mz.transform(seeded(model), llama_inputs(), estimator=mz.TwoSided(1))
    files = program.manifest()["adapter_files"]
    assert [(file["directory"], len(file["tensors"])) for file in files] == [("", 4), ("second", 4)]
    assert {entry["fqn"].split(".")[-2] for entry in files[1]["tensors"]} == {"second"}


def test_training_both_factors() -> None:
    program = transform(Mlp(), trainable="lora_A+lora_B")
    assert list(program.initial_adapter()) == ["first.squeeze", "first.widen", "second.squeeze", "second.widen"]
    assert program.frozen_adapter() == {}


class TestChoice:
    def test_predicate(self) -> None:
        program = transform(Mlp(), sites=lambda site: site.rank == 1)
        assert [s.lora_B for s in program.sites] == ["second.widen"]
        assert list(program.initial_adapter()) == ["second.widen"]
        assert [(r.name, r.reason) for r in program.sites.rejected] == [("first.widen", "not selected by sites=")]

    @pytest.mark.parametrize("name", ["second.widen", "second.squeeze", "second"])
    def test_list_of_parameter_or_module(self, name: str) -> None:
        assert [s.lora_B for s in transform(Mlp(), sites=[name]).sites] == ["second.widen"]

    def test_unknown_name(self) -> None:
        with pytest.raises(mz.InputError, match="names no LoRA site: third; known: first, second"):
            transform(Mlp(), sites=["first", "third"])

    def test_nothing_chosen(self) -> None:
        with pytest.raises(mz.NoLoRASites, match="not selected by sites="):
            transform(Mlp(), sites=lambda site: False)

    def test_what_is_not_chosen_stays_as_it_is(self) -> None:
        model, inputs = seeded(Mlp()), (random(BATCH, 6), integers(4, BATCH))
        program = mz.transform(model, inputs, loss=F.cross_entropy, sites=["first"])
        assert "second.widen" in program.frozen_state()
        mz.verify(program, model, inputs)


class TestNearMisses:
    """Candidates that are not taken, and the reason given for each."""

    @staticmethod
    def rejected(model: nn.Module) -> dict[str, str]:
        class Beside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model, self.good = model, Lora(4, 4, rank=1)

            def forward(self, x: Tensor) -> Tensor:
                return self.good(self.model(x))

        return {r.name: r.reason for r in transform(Beside()).sites.rejected}

    def test_a_bottleneck_that_is_not_added(self) -> None:
        found = self.rejected(Named("a", "b", add=False))
        assert found == {"model.b": "a bottleneck of rank 2, but its output is not added to another path"}

    def test_two_wide_layers(self) -> None:
        found = self.rejected(Named("a", "b", rank=8))
        assert found == {"model.b": "its rank 8 is no less than its 6 inputs or 8 outputs"}
        assert self.rejected(Named("a", "b", rank=8, add=False)) == {}, "two layers in sequence are no candidate"

    def test_a_bottleneck_with_an_activation(self) -> None:
        class Adapter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.down, self.up, self.head = nn.Linear(6, 2, False), nn.Linear(2, 6, False), nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(x + self.up(torch.relu(self.down(x))))

        reason = "%relu = aten.relu.default stands between its two linear maps"
        assert self.rejected(Adapter()) == {"model.up.weight": reason}

    def test_an_adapter_that_nothing_reads(self) -> None:
        class Unused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.head = Lora(6, 8), nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(x)

        found = self.rejected(Unused())
        assert found["model.layer.lora_B.weight"].startswith("the adapter is not active")

    def test_factors_that_are_not_in_sequence(self) -> None:
        class Apart(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear, self.lora_A, self.lora_B = nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x) + self.lora_B(x) + self.lora_A(x).sum(1, keepdim=True)

        reason = self.rejected(Apart())["model.lora_B.weight"]
        assert reason.startswith("read by %linear_1 = aten.linear.default in module 'model.lora_B', ")
        assert reason.endswith("which is not one of two linear maps in sequence with stored weights")


def test_no_lora_at_all() -> None:
    with pytest.raises(mz.NoLoRASites, match=r"found no LoRA site.*Attach an adapter"):
        transform(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))


def test_the_nearest_miss_is_named_when_nothing_is_found() -> None:
    with pytest.raises(mz.NoLoRASites, match=r"nearest misses:\n  b: a bottleneck of rank 2"):
        transform(Named("a", "b", add=False))


def test_an_inactive_second_adapter_is_left_alone() -> None:
    import peft

    from tests.models import llama, llama_inputs

    model: Any = llama()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    inputs = llama_inputs()
    program = mz.transform(model, inputs, estimator=mz.TwoSided(1))
    assert all("default" in fqn for fqn in program.initial_adapter())
    assert len(program.sites) == 4
    mz.verify(program, model, inputs)


def test_discovery_does_not_change_the_graph(compiled) -> None:
    program, _, _ = compiled("mlp")
    ir = program._captured.clone()
    before = [(n.name, str(n.target), len(n.users)) for n in ir.graph.nodes]
    discover(ir)
    assert [(n.name, str(n.target), len(n.users)) for n in ir.graph.nodes] == before
