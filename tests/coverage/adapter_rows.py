"""Trained parameters other than LoRA's: PEFT's other methods on a tiny Llama, and parameters chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests import models as known
from tests.coverage.peft_rows import QV, VOCABULARY, Pixels, Words, attach, labelled, tiny_llama, tokens
from tests.coverage.row import ONE_SIDED, SIGNS, Refusal, Row, filled
from tests.models import LENGTH, llama_inputs

CLASSES: dict[str, Any] = {"loss": F.cross_entropy}
MARKED: dict[str, Any] = {"trainable": "requires_grad"}
LAYERS = {"target_modules": QV}
CAUSAL = {"task_type": "CAUSAL_LM"}


def one_layer(**config: Any) -> nn.Module:
    return tiny_llama(**{"num_hidden_layers": 1, **config})


def method(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A tiny Llama of one layer under another of PEFT's methods."""

    def build() -> nn.Module:
        import peft

        return filled(peft.get_peft_model(one_layer(), getattr(peft, f"{kind}Config")(**options)))

    return build


def _peft(
    title: str, kind: str, config: dict[str, Any], options: dict[str, Any] | None = None, variant: str = "q, v",
    **more: Any,
) -> Row:  # fmt: skip
    return Row(title, variant, method(kind, **config), llama_inputs, options or {}, **more)


def bias_only() -> nn.Module:
    """PEFT's BitFit: LoRA with all biases, of which the biases alone are marked."""
    model = attach(one_layer(attention_bias=True), QV, bias="all")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return filled(model)


class Patches(nn.Module):
    """A class token and positions, learned, before attention: parameters that are no weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(6, 8)
        self.token, self.positions = nn.Parameter(torch.empty(1, 1, 8)), nn.Parameter(torch.empty(1, LENGTH + 1, 8))
        self.norm, self.gain = nn.LayerNorm(8), nn.Parameter(torch.empty(()))
        self.mix, self.head = nn.Linear(LENGTH + 1, LENGTH + 1, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.patch(x)], 1) + self.positions
        x = self.norm(x + self.gain * self.mix(x.transpose(1, 2)).transpose(1, 2))
        return self.head(torch.tanh(x[:, 0]))


class Tied(nn.Module):
    """A table that embeds tokens and scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.score = nn.Linear(8, VOCABULARY, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.score(torch.tanh(self.body(self.embed(words)).mean(1)))


def _own(
    architecture: str, variant: str, make: Callable[[], nn.Module], inputs: Callable[[], Any], trainable: Any,
    options: dict[str, Any] | None = None, **more: Any,
) -> Row:  # fmt: skip
    options = {**CLASSES, "trainable": trainable, **(options or {})}
    return Row(architecture, variant, lambda: filled(make(), 0.4), inputs, options, **more)


def named(*ends: str) -> Callable[[str, nn.Parameter], bool]:
    return lambda fqn, _: fqn.endswith(ends)


FEATURES = labelled(LENGTH, 6)
IMAGE = labelled(3, 7, 6)
STATE = Refusal(mz.CaptureError, "keeps it on the model")

PEFT: tuple[Row, ...] = (
    _peft("VeRA", "Vera", {"r": 3, **LAYERS}),
    _peft("LoKr", "LoKr", {"r": 3, **LAYERS}, SIGNS),
    _peft("LoHa", "LoHa", {"r": 3, **LAYERS}, MARKED),
    _peft("HiRA", "Hira", {"r": 3, **LAYERS}),
    _peft("AdaLoRA", "AdaLora", {"init_r": 3, "total_step": 10, **LAYERS}, MARKED),
    _peft("IA³", "IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
          variant="keys, values, feed-forward"),
    _peft("LayerNorm tuning", "LNTuning", {"target_modules": ["input_layernorm", "norm"]}, ONE_SIDED, "RMSNorm"),
    Row("BitFit", "PEFT's bias='all', biases only", bias_only, llama_inputs, MARKED, left_out=r"read by|not active"),
    _peft("prompt tuning", "PromptTuning", {"num_virtual_tokens": 3, **CAUSAL}, variant="three virtual tokens"),
    _peft("prefix tuning", "PrefixTuning", {"num_virtual_tokens": 3, **CAUSAL}, SIGNS, "three virtual tokens"),
    _peft("LLaMA-Adapter", "AdaptionPrompt", {"adapter_len": 3, "adapter_layers": 1, **CAUSAL}, variant="one layer"),
    _peft("trainable tokens", "TrainableTokens", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
          variant="two rows of the table"),
    _peft("OFT", "OFT", {"oft_block_size": 4, **LAYERS}),
    _peft("VB-LoRA", "VBLoRA", {"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 2, **LAYERS}),
    _peft("MiSS", "Miss", {"r": 2, **LAYERS}, ONE_SIDED),
    _peft("RandLoRA", "RandLora", {"r": 3, **LAYERS}),
    _peft("GraLoRA", "Gralora", {"r": 4, **LAYERS}),
    _peft("OSF", "OSF", LAYERS),
    _peft("Uni-LoRA", "UniLora", {"r": 3, **LAYERS}),
    _peft("HRA", "HRA", {"r": 2, **LAYERS}),
    _peft("WaveFT", "WaveFT", {"n_frequency": 8, "use_idwt": False, **LAYERS}, SIGNS, "q, v; use_idwt=False"),
    _peft("WaveFT", "WaveFT", {"n_frequency": 8, **LAYERS}, variant="inverse wavelet transform",
          refused=Refusal(mz.CaptureError, "set use_idwt=False in WaveFTConfig")),
    _peft("SHiRA", "Shira", {"r": 2, **LAYERS}, variant="sparse update",
          refused=Refusal(mz.CaptureError, "sparse matrix.*LoRA of rank 1")),
    _peft("C3A", "C3A", {"block_size": 4, **LAYERS}, variant="circular convolution by Fourier transforms",
          refused=Refusal(mz.CaptureError, "frequency domain.*LoRA of rank 1")),
    _peft("P-tuning", "PromptEncoder", {"num_virtual_tokens": 3, "encoder_hidden_size": 8, **CAUSAL},
          variant="virtual tokens through an MLP",
          refused=Refusal(mz.InputError, "stores what a network makes of the virtual tokens")),
    _peft("Lily", "Lily", {"r": 3, **LAYERS}, variant="routed by the mean over the batch",
          refused=Refusal(mz.BatchCoupled, "reduces or normalizes over the batch.*aten.mean")),
    _peft("CPT", "CPT",
          {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2], **CAUSAL},
          variant="projects only if a norm is positive",
          refused=Refusal(mz.CaptureError, "Python decides by the value of a tensor")),
)  # fmt: skip

CHOSEN: tuple[Row, ...] = (
    _own("class token, positions, gain", "predicate", Patches, FEATURES, named("token", "positions", "gain")),
    _own("LayerNorm and biases", "predicate", Patches, FEATURES, named("norm.weight", "bias"), SIGNS),
    _own("mixing over positions", "list of FQNs", Patches, FEATURES, ["mix.weight"]),
    _own("whole layers", "predicate", known.Mlp, labelled(6), lambda fqn, _: "lora" not in fqn, ONE_SIDED,
         left_out="."),
    _own("tied table", "list of FQNs", Tied, tokens, ["score.weight"]),
    _own("table of words", "list of FQNs", Words, tokens, ["embed.weight"]),
    _own("convnet", "kernels and biases", Pixels, IMAGE, named("stem.weight", "grouped.weight", "stem.bias")),
    _own("convnet", "GroupNorm, bias of the head", Pixels, IMAGE, named("norm.weight", "norm.bias", "head.bias")),
)  # fmt: skip

ROWS = (*PEFT, *CHOSEN)
