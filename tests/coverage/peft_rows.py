"""PEFT: what `LoraConfig` can say, on a tiny Llama unless the row is about another kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.coverage.row import BOTH, ONE_SIDED, SIGNS, Refusal, Row, filled
from tests.models import BATCH, integers, llama_inputs, random

VOCABULARY = 19
QV = ["q_proj", "v_proj"]


def tiny_llama(**config: Any) -> nn.Module:
    """Two layers, grouped-query attention, no dimension equal to another."""
    import transformers

    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **heads, **config}))


def attach(model: nn.Module, targets: Any = QV, *, rank: int = 3, name: str = "default", **lora: Any) -> Any:
    """Put PEFT around a model; parameters are not filled yet."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=targets, **lora)
    return peft.get_peft_model(model, config, adapter_name=name)


def llama(targets: Any = QV, config: dict[str, Any] | None = None, **lora: Any) -> Callable[[], nn.Module]:
    return lambda: filled(attach(tiny_llama(**(config or {})), targets, **lora))


def two_adapters(*active: str) -> nn.Module:
    import peft

    model = attach(tiny_llama(), name="first")
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(list(active))
    return filled(model)


def one_merged() -> nn.Module:
    """Two adapters, one folded into the base weights and dropped, the other live."""
    model: Any = two_adapters("second")
    model.base_model.merge_and_unload(adapter_names=["second"])
    return filled(attach(model.get_base_model(), ["q_proj"]))


def merged() -> nn.Module:
    model: Any = llama()()
    model.merge_adapter()
    return model


def disabled() -> nn.Module:
    model: Any = llama()()
    model.base_model.disable_adapter_layers()
    return model


def quantized(apart: bool) -> nn.Module:
    """torchao's int8 weights under PEFT; `apart`: as the plain tensors that they consist of."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.utils import unwrap_tensor_subclass

    model = filled(tiny_llama(num_hidden_layers=1))
    quantize_(model, Int8WeightOnlyConfig())
    model = attach(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return unwrap_tensor_subclass(model.eval()) if apart else model.eval()


def training() -> nn.Module:
    return llama(lora_dropout=0.1)().train()


class Pixels(nn.Module):
    """A convnet: strided, grouped and 1x1 convolutions, GroupNorm, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(3, 12)
        self.point = nn.Conv2d(12, 10, 1, bias=False)
        self.head = nn.Linear(10, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.gelu(self.stem(image))
        x = self.point(torch.tanh(self.norm(self.grouped(x))))
        return self.head(x.mean((2, 3)))


class Signal(nn.Module):
    """One-dimensional convolution over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, signal: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(signal)).amax(2))


class Words(nn.Module):
    """Bag of words: an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)).mean(1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def gpt2(targets: list[str]) -> Callable[[], nn.Module]:
    import transformers

    def build() -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2
        )
        return filled(attach(transformers.GPT2LMHeadModel(config), targets, fan_in_fan_out=True))

    return build


def labelled(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (random(BATCH, *shape), integers(4, BATCH))


def tokens() -> tuple[Tensor, Tensor]:
    return integers(VOCABULARY, BATCH, 5), integers(4, BATCH)


CLASSES: dict[str, Any] = {"loss": F.cross_entropy}
INACTIVE = "the adapter is not active"


def _llama(variant: str, build: Callable[[], nn.Module], options: dict[str, Any] | None = None, **more: Any) -> Row:
    return Row("Llama + PEFT", variant, build, llama_inputs, options or {}, **more)


def _tied(targets: list[str]) -> Callable[[], nn.Module]:
    return llama(targets, {"tie_word_embeddings": True})


ROWS: tuple[Row, ...] = (
    _llama("q, v", llama()),
    _llama("q, v, both factors", llama(), BOTH),
    _llama("rsLoRA", llama(use_rslora=True), SIGNS),
    _llama("rank_pattern, alpha_pattern", llama(
        rank_pattern={"layers.1.self_attn.q_proj": 1}, alpha_pattern={"v_proj": 9}), ONE_SIDED),
    _llama("all-linear", llama("all-linear"), {**BOTH, **SIGNS}),
    _llama("lm_head", llama([*QV, "lm_head"])),
    _llama("embed_tokens", llama([*QV, "embed_tokens"])),
    _llama("embed_tokens, both factors", llama(["embed_tokens"]), BOTH),
    _llama("tied embeddings, q, v", _tied(QV), ONE_SIDED),
    _llama("tied embeddings, lm_head", _tied(["v_proj", "lm_head"])),
    _llama("tied embeddings, embed_tokens", _tied(["v_proj", "embed_tokens"])),
    _llama("modules_to_save=lm_head", llama(modules_to_save=["lm_head"]), BOTH),
    _llama("DoRA", llama(use_dora=True)),
    _llama("DoRA, all-linear, both factors", llama("all-linear", use_dora=True), BOTH),
    _llama("lora_bias", llama(lora_bias=True)),
    _llama("lora_dropout, eval", llama(lora_dropout=0.3), SIGNS),
    _llama("lora_dropout, train", training, refused=Refusal(mz.CaptureError, "draws random numbers.*dropout")),
    _llama("two adapters, one active", lambda: two_adapters("second"), BOTH, left_out=INACTIVE),
    _llama("two adapters, both active", lambda: two_adapters("first", "second"), SIGNS),
    _llama("two adapters, one merged", one_merged),
    _llama("merged", merged, refused=Refusal(mz.NoLoRASites, INACTIVE)),
    _llama("disabled", disabled, refused=Refusal(mz.NoLoRASites, INACTIVE)),
    _llama("layers_to_transform, upper half", llama(layers_to_transform=[1]), ONE_SIDED),
    _llama("torchao int8 weights, taken apart", lambda: quantized(True)),
    _llama("torchao int8 weights", lambda: quantized(False),
           refused=Refusal(mz.InputError, "torchao.utils.unwrap_tensor_subclass")),
    Row("GPT-2 + PEFT", "Conv1D: c_attn", lambda: gpt2(["c_attn"])(), llama_inputs),
    Row("GPT-2 + PEFT", "Conv1D: all", lambda: gpt2(["c_attn", "c_fc", "c_proj"])(), llama_inputs, {**BOTH, **SIGNS}),
    Row("convnet + PEFT", "Conv2d", lambda: filled(attach(Pixels(), ["stem", "point"])), labelled(3, 7, 6), CLASSES),
    Row("convnet + PEFT", "Conv2d, both factors", lambda: filled(attach(Pixels(), ["stem"])), labelled(3, 7, 6),
        {**CLASSES, **BOTH}),
    Row("convnet + PEFT", "grouped Conv2d", lambda: filled(attach(Pixels(), ["grouped"], rank=4)), labelled(3, 7, 6),
        CLASSES),
    Row("convnet + PEFT", "DoRA on Conv2d", lambda: filled(attach(Pixels(), ["stem"], use_dora=True)),
        labelled(3, 7, 6), CLASSES),
    Row("convnet + PEFT", "Conv1d over time", lambda: filled(attach(Signal(), ["conv"])), labelled(5, 6), CLASSES),
    Row("convnet + PEFT", "linear head only", lambda: filled(attach(Pixels(), ["head"], rank=2)), labelled(3, 7, 6),
        {**CLASSES, **ONE_SIDED}),
    Row("bag of words + PEFT", "Embedding", lambda: filled(attach(Words(), ["embed"])), tokens, CLASSES),
    Row("bag of words + PEFT", "DoRA on Embedding", lambda: filled(attach(Words(), ["embed"], use_dora=True)), tokens,
        CLASSES),
    Row("nn.MultiheadAttention + PEFT", "attention", lambda: filled(attach(SelfAttention(), ["attention"])),
        labelled(5, 8), CLASSES,
        refused=Refusal(mz.CaptureError, "writes the adapter of nn.MultiheadAttention.*put linear layers")),
)  # fmt: skip
