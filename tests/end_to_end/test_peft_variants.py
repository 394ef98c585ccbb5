"""Adapters of PEFT's other kinds, trained in a .pte, load in PEFT and compute the same there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lowering
import mobizo_passes as mz
import runtime_driver
from tests.adapter_files import loaded, logits_of
from tests.models import BATCH, Mlp, cross_entropy, integers, llama_inputs, random, seeded


def base() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return seeded(transformers.LlamaForCausalLM(config), scale=0.3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Lora", {"r": 3, "target_modules": ["q_proj"], "use_dora": True, "trainable_token_indices": [2, 5]}),
        ("Lora", {"r": 3, "target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
        ("Vera", {"r": 3, "target_modules": ["q_proj", "v_proj"]}),
        ("IA3", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("PromptTuning", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    ],
    ids=["dora-and-token-rows", "embedding-and-saved-head", "vera", "ia3", "prompt-tuning"],
)
def test_a_trained_adapter_loads_in_peft(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    import peft

    config = getattr(peft, f"{kind}Config")(**options)
    model: Any = seeded(peft.get_peft_model(base(), config), scale=0.3)
    inputs = llama_inputs()
    program = mz.transform(model, inputs, estimator=mz.TwoSided(2))
    mz.verify(program, model, inputs)
    lowering.lower(program, target="portable").save(tmp_path / "step.pte")
    session = runtime_driver.Session(tmp_path / "step.pte")
    before = {k: v.clone() for k, v in session.adapter.items()}
    session.fit([inputs], steps=2, lr=0.1, eps=1e-2)
    assert any(not torch.equal(before[k], v) for k, v in session.adapter.items())
    session.save_adapter(tmp_path / "adapter")
    with warnings.catch_warnings():
        # PEFT warns of keys that are missing from the file or that it does not know.
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        under = model.base_model if config.is_prompt_learning else model.unload()
        loaded = peft.PeftModel.from_pretrained(under, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = loaded(**inputs).logits
    # Two kernels' sums of eight products each.
    torch.testing.assert_close(program.logits(session.adapter, inputs), want, rtol=1e-5, atol=1e-5)


def two_adapters() -> Any:
    import peft

    first = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    model: Any = peft.get_peft_model(base(), first, adapter_name="first")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["first", "second"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def test_two_adapters_and_a_site_left_out(tmp_path: Path) -> None:
    """What is not trained is in the files all the same, each adapter in its own directory."""
    model, inputs = two_adapters(), llama_inputs()
    program = mz.transform(model, inputs, estimator=mz.TwoSided(1), sites=lambda site: "q_proj" in site.name)
    lowering.lower(program, target="portable").save(tmp_path / "step.pte")
    session = runtime_driver.Session(tmp_path / "step.pte")
    session.fit([inputs], steps=2, lr=0.1, eps=1e-2)
    assert {fqn.split(".")[-2] for fqn in session.adapter} == {"first", "second"}
    session.save_adapter(tmp_path / "ours")
    assert {p.parent.name for p in (tmp_path / "ours").rglob("adapter_config.json")} == {"first", "second"}
    got = logits_of(loaded(base(), tmp_path / "ours", ["first", "second"]), inputs)
    # Two kernels' sums of eight products each.
    torch.testing.assert_close(program.logits(session.adapter, inputs), got, rtol=1e-5, atol=1e-5)

    trained = session.adapter
    session.adapter = session.initial_adapter
    session.load_adapter(tmp_path / "ours")
    assert all(torch.equal(value, trained[fqn]) for fqn, value in session.adapter.items())
    model.save_pretrained(str(tmp_path / "peft"))
    session.load_adapter(tmp_path / "peft")
    assert all(torch.equal(value, session.initial_adapter[fqn]) for fqn, value in session.adapter.items())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_proj.lora_B" in name:
                parameter.add_(1)
    model.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(runtime_driver.AdapterError, match="differs from the frozen tensor"):
        session.load_adapter(tmp_path / "other")


def test_without_peft_three_lines_load_an_adapter(tmp_path: Path) -> None:
    """As the README has it."""
    model, inputs = seeded(Mlp()), (random(BATCH, 6), integers(4, BATCH))
    program = mz.transform(model, inputs, estimator=mz.TwoSided(1), loss=cross_entropy, sites=["second.widen"])
    lowering.lower(program, target="portable").save(tmp_path / "step.pte")
    session = runtime_driver.Session(tmp_path / "step.pte")
    session.fit([dict(zip(session.manifest.batch.inputs, inputs, strict=True))], steps=2, lr=0.1, eps=1e-2)
    session.save_adapter(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter_model.safetensors"]
    from safetensors.torch import load_file

    fresh = seeded(Mlp())
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if name.endswith(("squeeze", "widen")):
                parameter.zero_()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    missing, unknown = fresh.load_state_dict(tensors, strict=False)
    assert not unknown
    assert set(tensors) == {f"{layer}.{factor}" for layer in ("first", "second") for factor in ("squeeze", "widen")}
    assert not set(missing) & set(tensors)
    with torch.no_grad():
        torch.testing.assert_close(fresh(inputs[0]), program.logits(session.adapter, inputs), rtol=1e-5, atol=1e-5)
