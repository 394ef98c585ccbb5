"""Modules of libraries that can't be captured as they are, and what to change in a model that has one."""

from __future__ import annotations

from typing import Any

from torch import nn

from mobizo_passes.errors import CaptureError

_INSTEAD = "other methods that train few parameters can be captured: LoRA of rank 1, VeRA, WaveFT with use_idwt=False"
# Module and class -> what it does that can't be captured; what to do.
_REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    ("peft.tuners.lora.layer", "MultiheadAttention"): (
        "PEFT writes the adapter of nn.MultiheadAttention into its weights inside forward (PEFT 0.21 adds that of "
        "out_proj twice)",
        "before get_peft_model, put linear layers for queries, keys, values and outputs in its place and name these in "
        "target_modules; docs/capture.md has the module",
    ),
    ("bitsandbytes.nn.modules", "Linear8bitLt"): (
        "LLM.int8() quantizes the inputs of a layer by their values, in operators that torch.export can't trace",
        "load the base model with load_in_4bit=True, or unquantized, and lower with a precision of 8-bit weights where "
        "the target has one (QNN: '16a8w')",
    ),
    ("peft.tuners.shira.layer", "Linear"): (
        "SHiRA adds a sparse matrix to the weight, and torch.export knows no sparse tensors",
        _INSTEAD,
    ),
    ("peft.tuners.c3a.layer", "C3ALinear"): (
        "C3A multiplies by its kernel in the frequency domain, and no target has an operator for Fourier transforms",
        _INSTEAD,
    ),
}
_DENSE = "gathers as many tokens as its mask marks as global, and no setting fixes their number; use an "
# Where an export failed -> what to do. The line decides; a file may have other reasons to fail.
_CHANGES: tuple[tuple[str, str, str], ...] = (
    (
        "modeling_deberta_v2.py",
        "label_index",
        "set model.config.problem_type = 'single_label_classification' (or 'regression'): without it, the model counts "
        "its labels in Python",
    ),
    (
        "modeling_longformer.py",
        "is_global_attn",
        f"Longformer {_DENSE}encoder with dense attention (RoBERTa, DeBERTa v2), or one whose window is a mask",
    ),
    (
        "modeling_led.py",
        "is_global_attn",
        f"LED {_DENSE}encoder-decoder with dense attention (BART, T5)",
    ),
    (
        "modeling_jetmoe.py",
        "expert_size",
        "JetMoE sorts tokens by expert and counts them in Python, and no setting changes that; use a mixture of "
        "experts that transformers can compute token by token (Mixtral, OLMoE, Qwen 3 MoE)",
    ),
    (
        "",
        "expert_hit",
        "a loop over the experts that were hit has as many rounds as there are; run every expert on every token and "
        "multiply by its gate, which is zero where it was not chosen",
    ),
    (
        "",
        "pack_padded_sequence",
        "packed sequences have sizes that depend on the lengths: run the layer on the padded input, and take each "
        "example's last step by gather at length - 1",
    ),
    (
        "waveft/layer.py",
        "get_delta_weight",
        "set use_idwt=False in WaveFTConfig: the inverse wavelet transform leaves out coefficients by a mask",
    ),
)


def check_modules(model: nn.Module) -> None:
    """Raise `CaptureError` for an active module of a library that is known to fail in `torch.export`."""
    for name, module in model.named_modules():
        known = _REFUSED.get((type(module).__module__, type(module).__name__))
        if known is not None and _active(module):
            raise CaptureError(f"{known[0]}: '{name}'\n  {known[1]}")


def change_for(file: str, line: str) -> str:
    """Return what to change where a line of a library's file fails, or ""."""
    return next((advice for name, part, advice in _CHANGES if file.endswith(name) and part in line), "")


def _active(module: Any) -> bool:
    return not getattr(module, "merged", False) and not getattr(module, "disable_adapters", False)
