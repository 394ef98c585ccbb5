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
from tests.models import llama_inputs, seeded


def base() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return seeded(transformers.LlamaForCausalLM(config), scale=0.3)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}],
    ids=["dora", "embedding-and-saved-head"],
)
def test_a_trained_adapter_loads_in_peft(options: dict[str, Any], tmp_path: Path) -> None:
    import peft

    lora = peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj"], **options})
    model = seeded(peft.get_peft_model(base(), lora), scale=0.3)
    # Filling every parameter changed the base model too: PEFT gets it back as it was compiled.
    frozen = base()
    frozen.load_state_dict(
        {k.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): v
         for k, v in model.state_dict().items() if "lora_" not in k and "modules_to_save" not in k}
    )  # fmt: skip
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
        loaded = peft.PeftModel.from_pretrained(frozen, tmp_path / "adapter").eval()
    with torch.no_grad():
        want = loaded(**inputs).logits
    # Two kernels' sums of eight products each.
    torch.testing.assert_close(program.logits(session.adapter, inputs), want, rtol=1e-5, atol=1e-5)
