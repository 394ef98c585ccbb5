"""Tiny models with LoRA, of many shapes, with fixed random weights and non-zero LoRA-B: what the compiler is for.

`CASES` lists them with example inputs and loss; each call of `Case.build` gives a fresh, equal model in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobizo_passes.testing.models import Lora, integers, random, seeded

BATCH, LENGTH = 3, 5


class Mlp(nn.Module):
    """Two LoRA layers with names of their own, a ReLU between them, a frozen head."""

    class Layer(nn.Module):
        def __init__(self, fan_in: int, fan_out: int, rank: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
            self.bias = nn.Parameter(torch.empty(fan_out))
            self.squeeze = nn.Parameter(torch.empty(rank, fan_in))
            self.widen = nn.Parameter(torch.empty(fan_out, rank))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias) + 2.0 * F.linear(F.linear(x, self.squeeze), self.widen)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Layer(6, 8, 2), self.Layer(8, 7, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


class Transposed(nn.Module):
    """`x @ A @ B` with A [in, r] and B [r, out]: the storage of loralib's and of many hand-written layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 9))
        self.A = nn.Parameter(torch.empty(6, 3))
        self.B = nn.Parameter(torch.empty(3, 9))
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.weight + (x @ self.A @ self.B) * 0.5))


class CalledTwice(nn.Module):
    """One LoRA layer applied twice: one adapter, two products."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Lora(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu(self.layer(x))))


class OneBranch(nn.Module):
    """LoRA in one of two branches: the other branch is the same for all perturbations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.plain, self.tuned = nn.Linear(8, 5), Lora(8, 5, rank=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.cat([self.plain(x), self.tuned(x)], dim=-1))


class Folded(nn.Module):
    """Works on [B*T, D] rows and goes back to [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Lora(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        rows = F.gelu(self.layer(x.reshape(batch * length, width)))
        return self.head(rows.reshape(batch, length, -1).mean(1))


class SequenceFirst(nn.Module):
    """[T, B, D] activations: the batch is dimension 1. A running sum mixes time steps, never examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.second = Lora(6, 8), Lora(8, 8, rank=3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(self.layer(x), 0)
        x = x + self.second(self.norm(x))
        return self.head(x[-1])


class Attention(nn.Module):
    """Multi-head attention written out, with LoRA on query and value and an additive mask."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.v = Lora(width, width), Lora(width, width, rank=1)
        self.k, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -1e9)
        mixed = torch.softmax(scores, -1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """GPT-2-like decoder over tokens: embeddings, pre-norm block, tied output embedding."""

    def __init__(self, vocabulary: int = 11, width: int = 8, blocks: int = 1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(16, width)
        self.attention = nn.ModuleList(Attention(width) for _ in range(blocks))
        self.up = nn.ModuleList(Lora(width, 12) for _ in range(blocks))
        self.down = nn.ModuleList(Lora(12, width, rank=3) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks + 1))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for i, (attention, up, down) in enumerate(zip(self.attention, self.up, self.down, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + down(F.gelu(up(self.norms[2 * i + 1](x))))
        return self.lm_head(self.norms[-1](x))


class LastRow(nn.Module):
    """Reads the row of the last real token: `logits[torch.arange(B), last]`, the trap of a naive expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Block()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self.body(tokens)
        last = mask.sum(1) - 1
        return logits[torch.arange(tokens.shape[0]), last]


class ConvHead(nn.Module):
    """Frozen convolutions with eval-mode BatchNorm, LoRA on the linear layers after them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.fc, self.head = Lora(12, 6), Lora(6, 4, rank=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.conv(image))), 2)
        return self.head(torch.relu(self.fc(x.flatten(1))))


class Regression(nn.Module):
    """One number per example: `last_hidden @ vector`, matrix times vector on perturbed values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Lora(6, 5)
        self.vector = nn.Parameter(torch.empty(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.vector


class Tied(nn.Module):
    """Two layers that hold one LoRA-B parameter between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Lora(6, 6), Lora(6, 6)
        self.second.lora_B.weight = self.first.lora_B.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


class OwnLoss(nn.Module):
    """Returns {"loss", "logits"}, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Block()

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(tokens)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def llama(targets: tuple[str, ...] | str = ("q_proj", "v_proj"), rslora: bool = False, layers: int = 2) -> nn.Module:
    """A tiny random Llama with grouped-query attention under PEFT."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    wanted = targets if isinstance(targets, str) else list(targets)
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=wanted, use_rslora=rslora, lora_dropout=0.1)
    return seeded(peft.get_peft_model(model, lora), scale=0.3)


def llama_inputs() -> dict[str, Tensor]:
    tokens = integers(19, BATCH, LENGTH)
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    labels[0, 2] = tokens[0, 2]
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def cross_entropy(outputs: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs, label)


def two_words(outputs: Any, label: Tensor) -> Tensor:
    """Classification as in the paper: the scores of two words at the last position."""
    logits = outputs.logits if hasattr(outputs, "logits") else outputs
    return F.cross_entropy(logits[:, -1][:, torch.tensor([3, 7])], label)


def mse(outputs: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(outputs, wanted)


def summed(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs - wanted).square().sum()


def tokens_mean(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1), ignore_index=-1)


def per_example(outputs: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs, label, reduction="none")


def smoothed(outputs: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs, label, weight=torch.tensor([0.5, 1.0, 2.0, 1.5]), label_smoothing=0.1)


def own_labels() -> Tensor:
    labels = integers(11, BATCH, LENGTH, seed=3)
    labels[:, :3] = -100
    labels[1, 3] = -100
    return labels


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the options of `transform` that it needs."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    # Perturbed losses change their curvature at kinks (relu, max): finite differences only hold on smooth models.
    smooth: bool = True

    def __str__(self) -> str:
        return self.name


def _x(*shape: int) -> Tensor:
    return random(*shape)


def _classes() -> Tensor:
    return integers(4, BATCH)


CASES: tuple[Case, ...] = (
    Case("mlp", lambda: seeded(Mlp()), lambda: (_x(BATCH, 6), _classes()), {"loss": cross_entropy}, smooth=False),
    Case("transposed", lambda: seeded(Transposed()), lambda: (_x(BATCH, 6), _classes()), {"loss": cross_entropy}),
    Case("called-twice", lambda: seeded(CalledTwice()), lambda: (_x(BATCH, 6), _x(BATCH, 4)), {"loss": mse}, False),
    Case("one-branch", lambda: seeded(OneBranch()), lambda: (_x(BATCH, 6), _x(BATCH, 4)), {"loss": summed}, False),
    Case("folded", lambda: seeded(Folded()), lambda: (_x(BATCH, LENGTH, 6), _classes()), {"loss": per_example}),
    Case(
        "sequence-first",
        lambda: seeded(SequenceFirst()),
        lambda: (_x(LENGTH, BATCH, 6), _classes()),
        {"loss": cross_entropy, "batch_dim": 1},
    ),
    Case("attention", lambda: seeded(Attention()), lambda: (_x(BATCH, LENGTH, 8), _x(BATCH, LENGTH, 8)), {"loss": mse}),
    Case("block", lambda: seeded(Block()), lambda: (integers(11, BATCH, LENGTH), _words()), {"loss": two_words}),
    Case(
        "block-tokens",
        lambda: seeded(Block(blocks=2)),
        lambda: (integers(11, BATCH, LENGTH), own_labels().clamp(min=-1)),
        {"loss": tokens_mean},
    ),
    Case(
        "own-loss",
        lambda: seeded(OwnLoss()),
        lambda: {"tokens": integers(11, BATCH, LENGTH), "labels": own_labels()},
    ),
    Case(
        "last-row",
        lambda: seeded(LastRow()),
        lambda: (integers(11, BATCH, LENGTH), _padding(), integers(11, BATCH)),
        {"loss": cross_entropy},
    ),
    Case("conv-head", lambda: seeded(ConvHead()), lambda: (_x(BATCH, 2, 6, 6), _classes()), {"loss": smoothed}, False),
    Case("regression", lambda: seeded(Regression()), lambda: (_x(BATCH, 6), _x(BATCH)), {"loss": mse}),
    Case("tied", lambda: seeded(Tied()), lambda: (_x(BATCH, 6), _classes()), {"loss": cross_entropy}, False),
    Case("llama-qv", lambda: llama(), llama_inputs),
    Case("llama-all-linear", lambda: llama("all-linear"), llama_inputs, {"trainable": "lora_A+lora_B"}),
    Case("llama-rslora-words", lambda: llama(rslora=True), lambda: _llama_words(), {"loss": two_words}),
)


def _words() -> Tensor:
    return integers(2, BATCH)


def _padding() -> Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, 3:] = 0
    mask[1, 4:] = 0
    return mask


def _llama_words() -> dict[str, Tensor]:
    inputs = llama_inputs()
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "label": _words()}


def case(name: str) -> Case:
    """Return one case by name."""
    return next(c for c in CASES if c.name == name)
