"""Adapters are saved as PEFT saves them: every PEFT row of the coverage table, PEFT's options, and random ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import mobizo_passes as mz
from mobizo_passes.sites import peft as peft_files
from tests.adapter_files import assert_same_files, loaded, logits_of, save_both
from tests.coverage import adapter_rows, hf_rows, peft_rows
from tests.coverage.peft_rows import attach, llama, tiny_llama, two_adapters
from tests.coverage.row import Row, filled
from tests.models import llama_inputs

TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}


@pytest.mark.parametrize("row", [row for row in peft_rows.ROWS if row.refused is None], ids=str)
def test_peft_rows(row: Row, tmp_path: Path) -> None:
    model: Any = row.build()
    save_both(model, model, tmp_path)
    assert assert_same_files(tmp_path)
    want, active = logits_of(model, row.inputs()), list(model.base_model.active_adapters)
    base = model.unload()
    got = logits_of(loaded(base, tmp_path / "ours", active), row.inputs())
    # The same tensors in the same operators.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [row for row in hf_rows.ROWS if row.refused is None], ids=str)
def test_architectures(row: Row, tmp_path: Path) -> None:
    model: Any = row.build()
    save_both(model, model, tmp_path)
    assert assert_same_files(tmp_path)


# What PEFT does not store, or does not take off again: AdaLoRA's count of ranks, random here; OSF's way of cutting the
# base weights in two; LLaMA-Adapter's attention around the model's.
NOT_RESTORED = ("AdaLoRA", "OSF", "LLaMA-Adapter")


@pytest.mark.parametrize("row", [row for row in adapter_rows.PEFT if row.refused is None], ids=str)
def test_other_methods(row: Row, tmp_path: Path) -> None:
    """What PEFT marks is trained, saved as PEFT saves it, and loaded by PEFT."""
    model: Any = row.build()
    save_both(model, model, tmp_path, [name for name, p in model.named_parameters() if p.requires_grad])
    assert assert_same_files(tmp_path)
    if row.architecture in NOT_RESTORED:
        return
    want, active = logits_of(model, row.inputs()), [model.active_adapter]
    prompt = model.active_peft_config.is_prompt_learning
    got = logits_of(loaded(model.base_model if prompt else model.unload(), tmp_path / "ours", active), row.inputs())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def tokens(**lora: Any) -> Callable[[], nn.Module]:
    return llama(config=TIED, trainable_token_indices=[2, 5], **lora)


def mixture(*parameters: str) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {**hf_rows.LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    return filled(attach(model, ["q_proj"], target_parameters=list(parameters)))


def classifier(task: str) -> nn.Module:
    import transformers

    head = {"SEQ_CLS": "LlamaForSequenceClassification", "TOKEN_CLS": "LlamaForTokenClassification"}[task]
    sizes: dict[str, Any] = dict(hf_rows.LLAMA)
    return attach(getattr(transformers, head)(transformers.LlamaConfig(**sizes)), task_type=task)


def other(kind: str, **options: Any) -> nn.Module:
    import peft

    config = getattr(peft, f"{kind}Config")(target_modules=["q_proj", "o_proj"], **options)
    return peft.get_peft_model(tiny_llama(), config)


def pruned() -> nn.Module:
    """AdaLoRA, after it has chosen ranks: what it gave up is not stored."""
    model: Any = other("AdaLora", init_r=3, total_step=10)
    names = [n.removeprefix("base_model.model.") for n, _ in model.named_parameters() if "lora_E" in n]
    model.peft_config["default"].rank_pattern = {n: [True, False, True] for n in names}
    return model


def half() -> nn.Module:
    import peft

    lora = peft.LoraConfig(r=3, target_modules=["q_proj"])
    return peft.get_peft_model(tiny_llama().bfloat16(), lora, autocast_adapter_dtype=False)


def second_with_a_head() -> nn.Module:
    import peft

    model = attach(tiny_llama(), name="first")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"]))
    return model


OPTIONS: dict[str, Callable[[], nn.Module]] = {
    "bias=all": llama(config=BIASED, bias="all"),
    "bias=lora_only": llama(config=BIASED, bias="lora_only"),
    "two heads saved": llama(config=TIED, modules_to_save=["embed_tokens", "lm_head"]),
    "tied heads saved": llama(config=TIED, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tokens": llama(trainable_token_indices=[2, 5]),
    "tokens of two": llama(trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3]}),
    "tokens, tied": tokens(),
    "tokens, tied, DoRA": tokens(use_dora=True),
    "experts": lambda: mixture("mlp.experts.down_proj"),
    "experts, two parameters": lambda: mixture("mlp.experts.down_proj", "mlp.experts.gate_up_proj"),
    "embedding by expression": lambda: attach(tiny_llama(), r".*\.(q_proj|embed_tokens)"),
    "exclude_modules": llama("all-linear", exclude_modules=["down_proj"]),
    "PiSSA": lambda: attach(tiny_llama(), init_lora_weights="pissa"),
    "OLoRA": lambda: attach(tiny_llama(), init_lora_weights="olora"),
    "layer_replication": lambda: attach(tiny_llama(), layer_replication=[[0, 2], [1, 2]]),
    "sequence classification": lambda: classifier("SEQ_CLS"),
    "token classification": lambda: classifier("TOKEN_CLS"),
    "named": llama(name="mine"),
    "named after a factor": llama(name="lora_B"),
    "half precision around": lambda: attach(tiny_llama().half()),
    "half precision throughout": half,
    "two, both active": lambda: two_adapters("first", "second"),
    "two, one with a head": second_with_a_head,
    "AdaLoRA": lambda: other("AdaLora", total_step=10),
    "AdaLoRA, pruned": pruned,
    "DeLoRA": lambda: other("Delora", r=3),
    "VeRA": lambda: other("Vera", r=3),
    "VeRA without its projection": lambda: other("Vera", r=3, save_projection=False),
    "RandLoRA": lambda: other("RandLora", r=3),
    "LoHa": lambda: other("LoHa", r=3),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, tmp_path: Path) -> None:
    model: Any = OPTIONS[name]()
    save_both(model, model, tmp_path)
    assert assert_same_files(tmp_path)


@settings(max_examples=12)
@given(
    st.fixed_dictionaries(
        {"rank": st.integers(1, 3), "use_dora": st.booleans(), "use_rslora": st.booleans()},
        optional={
            "bias": st.sampled_from(["all", "lora_only"]),
            "modules_to_save": st.sampled_from([["lm_head"], ["lm_head", "norm"]]),
            "layers_to_transform": st.just([1]),
            "rank_pattern": st.just({"q_proj": 2}),
            "name": st.sampled_from(["default", "other"]),
            "trainable_token_indices": st.just([3]),
        },
    ),
    st.sampled_from([["q_proj"], ["o_proj", "up_proj"], ["v_proj", "lm_head"]]),
    st.booleans(),
)
def test_random_options(tmp_path_factory: Any, options: dict[str, Any], targets: Any, tied: bool) -> None:
    model = filled(attach(tiny_llama(**BIASED, tie_word_embeddings=tied), targets, **options))
    path = tmp_path_factory.mktemp("random")
    save_both(model, model, path)
    assert assert_same_files(path)


class Around(nn.Module):
    """A user's own module around a PEFT model, with something of its own."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, **batch: Any) -> Any:
        return self.inside(**batch)


def test_a_model_inside_another(tmp_path: Path) -> None:
    inside = llama(name="mine")()
    save_both(Around(inside), inside, tmp_path)
    assert assert_same_files(tmp_path) == 8


@pytest.mark.parametrize("kind", ["base model", "tuner"])
def test_without_pefts_wrapper(kind: str, tmp_path: Path) -> None:
    """What PEFT's wrapper holds has PEFT's keys too."""
    model: Any = llama()()
    save_both(model.base_model if kind == "tuner" else model.get_base_model(), model, tmp_path)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert logits_of(loaded(model.unload(), tmp_path / "ours", ["default"]), llama_inputs()).shape[-1] == 19


def test_two_models_inside_one(tmp_path: Path) -> None:
    both = nn.ModuleDict({"left": llama()(), "right": llama(["k_proj"])()})
    trained = [name for name, _ in both.named_parameters() if "lora_B" in name]
    files = peft_files.adapter_files(both, trained, [])
    assert [file.directory for file in files] == ["left", "right"]
    assert {t.fqn for file in files for t in file.tensors} >= set(trained)


def test_transformers_own_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft
    import transformers.integrations.peft as integration

    # The installed transformers asks for a later PEFT than it needs here.
    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)
    model: Any = tiny_llama()
    model.add_adapter(peft.LoraConfig(r=3, target_modules=["q_proj"]), adapter_name="mine")
    save_both(model, model, tmp_path)
    assert assert_same_files(tmp_path) == 4


def test_what_is_trained_beside_peft_is_kept() -> None:
    model = llama()()
    model.register_parameter("own", nn.Parameter(torch.ones(2, 3)))
    *_, beside = peft_files.adapter_files(model, ["own"], [])
    assert (beside.directory, [t.key for t in beside.tensors], beside.config) == ("beside_peft", ["own"], None)


def test_a_model_that_peft_cannot_save(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = llama()()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("unsupported here")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(mz.InputError, match="unsupported here"):
        peft_files.adapter_files(model, [], [])


def test_tied_factors_are_refused() -> None:
    """PEFT ties the output layer's factors to the embedding's, transposed: training one would leave the other."""
    model = llama(["embed_tokens", "q_proj"], TIED, ensure_weight_tying=True)()
    with pytest.raises(mz.InputError, match=r"shares its memory with .*lm_head|shares its memory with .*embed_tokens"):
        mz.transform(model, llama_inputs(), estimator=mz.TwoSided(1))
