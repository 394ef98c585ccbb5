"""Base models and adapters whose weights are not those that are expected: named, and nothing is guessed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobizo_cli import model as models
from mobizo_cli.errors import ModelError
from tests.robustness.options import options


def base(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """A PEFT directory with non-zero B."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(str(model.with_name("adapter")))
    return model.with_name("adapter")


# Base models with other weights than theirs


def rewritten(
    model: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    shutil.copytree(model, directory)
    weights = directory / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return directory


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("lm_head"), r"weights of LlamaForCausalLM are absent.* \(1\): `lm_head.weight`"),
        (without("model.layers.1.mlp"), r"\(3\): `model.layers.1.mlp.down_proj.weight`"),
        (
            lambda t: {**t, "score.weight": torch.ones(2, 32)},
            r"weights that LlamaForCausalLM has no place for \(1\): `score.weight`",
        ),
        (lambda t: {**t, "lm_head.weight": torch.ones(7, 32)}, r"`lm_head.weight \(\[7, 32\] instead of \[13, 32\]\)`"),
    ],
)
def test_weights_that_do_not_match_are_named(model: Path, tmp_path: Path, change: Callable, words: str):
    with pytest.raises(ModelError, match=words):
        models.load(options(rewritten(model, tmp_path / "m", change)))


def test_new_and_unused_weights_are_allowed_by_name(model: Path, tmp_path: Path):
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**without("lm_head")(tensors), "score.weight": torch.ones(2, 32)}

    path = rewritten(model, tmp_path / "m", change)
    allowed = {"new_weights": "lm_head", "unused_weights": "score.weight"}
    heads = [
        models.load(options(path, **allowed, init_seed=seed)).model.get_base_model().lm_head.weight  # pyright: ignore
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_tied_weights_are_complete(model: Path, tmp_path: Path):
    path = rewritten(model, tmp_path / "m", without("lm_head"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    models.load(options(path))


# Adapters from elsewhere


def changed(adapter: Path, directory: Path, rename: Callable[[str], str]) -> Path:
    shutil.copytree(adapter, directory)
    weights = directory / "adapter_model.safetensors"
    tensors = {rename(key): tensor for key, tensor in load_file(weights).items()}
    save_file({key: tensor for key, tensor in tensors.items() if key}, weights)
    return directory


def factors(loaded: models.Loaded) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in loaded.model.state_dict().items() if "lora_" in name}
    assert len(state) == 8
    return state


PREFIX = "base_model.model."
KNOWN = {
    "as PEFT writes": lambda key: key,
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "doubled": lambda key: PREFIX + key,
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "parallel": lambda key: f"module.{key}",
    "bare layers": lambda key: key.removeprefix(f"{PREFIX}model."),
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("form", KNOWN)
def test_known_prefixes_are_recognized(model: Path, adapter: Path, tmp_path: Path, form: str):
    stored = load_file(adapter / "adapter_model.safetensors")
    found = factors(models.load(options(changed(adapter, tmp_path / "a", KNOWN[form]))))
    for key, tensor in stored.items():
        assert torch.equal(found[key.replace(".weight", ".default.weight")], tensor)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "use_dora": True, "rank_pattern": {"layers.1.self_attn.v_proj": 3}},
        {"target_modules": ["v_proj"], "trainable_token_indices": [1, 3], "lora_bias": True},
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_everything_that_peft_saves_is_loaded(model: Path, tmp_path: Path, lora: dict[str, Any]):
    import peft

    adapted = peft.get_peft_model(base(model), peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **lora))
    adapted = adapted.eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "a"))
    loaded = models.load(options(tmp_path / "a")).model
    tokens = torch.tensor([[2, 3, 4, 1]])
    assert torch.equal(loaded(input_ids=tokens).logits, adapted(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda key: key.replace("layers.", "blocks."), "8 tensors find no place.*8 of the adapter's tensors are not"),
        (lambda key: key.replace("layers.1", "layers.2"), "4 tensors find no place.*layers.2"),
        (lambda key: "" if "layers.1" in key else key, "4 of the adapter's tensors are not in it.*layers.1"),
        (lambda key: key.replace("layers.1.self_attn.q_proj.lora_B", "x"), "1 tensors find no place"),
        (lambda key: "", "8 of the adapter's tensors"),
    ],
)
def test_tensors_without_a_place_and_places_without_a_tensor(
    adapter: Path, tmp_path: Path, rename: Callable, words: str
):
    with pytest.raises(ModelError, match=words):
        models.load(options(changed(adapter, tmp_path / "a", rename)))


def test_adapters_of_named_directories(adapter: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(adapter, out / "mine")
    assert factors(models.load(options(out)))
    shutil.copytree(adapter, out / "other")
    with pytest.raises(ModelError, match=r"2 adapters \(mine, other\)"):
        models.load(options(out))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "8 tensors find no place.*4 of the adapter's tensors are not in it.*ia3_l"),
        ({"peft_type": "PROMPT_TUNING"}, "cannot load the adapter"),
        ({"peft_type": "NO_SUCH_KIND"}, "cannot load the adapter"),
        ({"peft_type": None}, "no `peft_type`"),
        ({"base_model_name_or_path": ""}, "no `base_model_name_or_path`"),
        ({"base_model_name_or_path": "."}, "base model . is an adapter itself"),
        ({"r": 3}, "the adapter of its own configuration"),
        ({"target_modules": ["q_proj"]}, "4 tensors find no place"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("[]", "expected a JSON object"),
        (b"\xff", "not JSON"),
    ],
)
def test_other_kinds_and_configurations(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict | str | bytes, words: str
):
    shutil.copytree(adapter, tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    if isinstance(config, dict):
        config = json.dumps({**json.loads(path.read_text()), **config})
    path.write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(ModelError, match=words):
        models.load(options(tmp_path / "a"))
