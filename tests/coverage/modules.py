"""Hand-written models of the coverage table that `tests/models.py` does not already have."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Attention, Lora, Mlp


class Spelled(nn.Module):
    """One LoRA layer whose product is spelled by `spell(module, x)`, between a base layer and a head."""

    scale: Tensor

    def __init__(self, spell: Callable[[Spelled, Tensor], Tensor], down: tuple[int, ...], up: tuple[int, ...]) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(6, 9), nn.Linear(9, 4)
        self.squeeze, self.widen = nn.Parameter(torch.empty(down)), nn.Parameter(torch.empty(up))
        self.bias_low, self.bias_high = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(9))
        self.register_buffer("scale", torch.tensor(0.7))
        self.gain = nn.Parameter(torch.empty(1))
        self.spell = spell

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + self.spell(self, x)))


def einsum(m: Spelled, x: Tensor) -> Tensor:
    return torch.einsum("...r,or->...o", torch.einsum("...i,ri->...r", x, m.squeeze), m.widen) * 0.5


def einsum_three(m: Spelled, x: Tensor) -> Tensor:
    return torch.einsum("bti,ri,or->bto", x, m.squeeze, m.widen)


def products(m: Spelled, x: Tensor) -> Tensor:
    return x @ m.squeeze @ m.widen * 2


def transposes(m: Spelled, x: Tensor) -> Tensor:
    return (x @ m.squeeze.T) @ m.widen.mT


def conv1d_style(m: Spelled, x: Tensor) -> Tensor:
    """GPT-2's Conv1D: `addmm` over flattened rows."""
    low = torch.addmm(m.bias_low, x.reshape(-1, 6), m.squeeze)
    return torch.addmm(m.bias_high, low, m.widen).reshape(*x.shape[:-1], 9)


def buffer_scale(m: Spelled, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.squeeze), m.widen) * m.scale


def learned_scale(m: Spelled, x: Tensor) -> Tensor:
    return m.gain * F.linear(F.linear(x, m.squeeze), m.widen)


def scale_before(m: Spelled, x: Tensor) -> Tensor:
    return F.linear(F.linear(x * 0.5, m.squeeze) / 3, m.widen)


def biases(m: Spelled, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.squeeze, m.bias_low), m.widen, m.bias_high)


def folded_weight(m: Spelled, x: Tensor) -> Tensor:
    """The product of the factors first: a weight of full size per perturbation."""
    return F.linear(x, m.widen @ m.squeeze)


def rowwise(m: Spelled, x: Tensor) -> Tensor:
    """Element-wise product and sum instead of a matrix product."""
    return F.linear((x.unsqueeze(-2) * m.squeeze).sum(-1), m.widen)


class Torchtune(nn.Module):
    """torchtune's names: `lora_a.weight`, `lora_b.weight`, frozen weight beside them."""

    class LoRALinear(nn.Module):
        def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
            self.lora_a = nn.Linear(in_dim, rank, bias=False)
            self.lora_b = nn.Linear(rank, out_dim, bias=False)
            self.dropout = nn.Dropout(0.05)
            self.scaling = alpha / rank

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + self.scaling * self.lora_b(self.lora_a(self.dropout(x)))

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.output_proj = self.LoRALinear(6, 8, 2, 4.0), self.LoRALinear(8, 4, 3, 16.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_proj(F.silu(self.q_proj(x)))


class Diffusers(nn.Module):
    """diffusers' names: `to_q.lora.down.weight`, `to_q.lora.up.weight`, rank equal to the width of the output."""

    class LoRALinearLayer(nn.Module):
        def __init__(self, fan_in: int, fan_out: int, rank: int) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(fan_in, rank, bias=False), nn.Linear(rank, fan_out, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    class LoRACompatibleLinear(nn.Linear):
        def __init__(self, fan_in: int, fan_out: int, rank: int) -> None:
            super().__init__(fan_in, fan_out)
            self.lora = Diffusers.LoRALinearLayer(fan_in, fan_out, rank)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  nn.Linear's own name
            return super().forward(input) + 0.8 * self.lora(input)

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = self.LoRACompatibleLinear(6, 4, 4), self.LoRACompatibleLinear(7, 4, 2)
        self.to_out = nn.ModuleList([nn.Linear(4, 5), nn.Dropout(0.1)])

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        scores = (self.to_q(hidden) @ self.to_k(context).transpose(-1, -2)).softmax(-1)
        return self.to_out[1](self.to_out[0](scores @ self.to_k(context)))


class Encoder(nn.Module):
    """`nn.TransformerEncoderLayer` between LoRA layers; `batch_first=False` puts the batch in dimension 1."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner = Lora(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.time = 1 if batch_first else 0
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.inner(x)).mean(self.time))


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` with LoRA on queries only: keys and values are shared."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.query, self.key = Lora(6, 8), nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head, self.time = nn.Linear(8, 4), 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        memory = self.key(x)
        mixed, _ = self.attention(self.query(x), memory, memory, need_weights=False)
        return self.head(mixed.mean(self.time))


class Recurrent(nn.Module):
    """An Elman cell unrolled over time, one LoRA layer called at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.feed, self.back, self.head = nn.Linear(6, 8), Lora(8, 8, rank=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            state = torch.tanh(self.feed(step) + self.back(state))
        return self.head(state)


class Convolved(nn.Module):
    """LoRA before frozen convolutions over time and over images of features."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = Lora(6, 8)
        self.conv = nn.Conv1d(8, 5, 2, padding=1)
        self.wide = nn.Conv2d(1, 3, 2)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        over_time = torch.relu(self.conv(self.lift(x).transpose(1, 2)))
        return self.head(F.adaptive_avg_pool2d(self.wide(over_time.unsqueeze(1)), 1).flatten(1))


class Regularized(nn.Module):
    """The loss also reads the adapter itself: weight decay on LoRA-B."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        decay = self.body.first.widen.square().sum() + self.body.second.widen.square().sum()
        return F.cross_entropy(self.body(x), label) + 0.1 * decay


class Towers(nn.Module):
    """Two towers and a contrastive loss: every example is compared with every other one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Lora(6, 8), Lora(5, 8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(self.left(a), dim=-1), F.normalize(self.right(b), dim=-1)
        return F.cross_entropy(a @ b.T / 0.1, torch.arange(a.shape[0]))


class Normed(nn.Module):
    """BatchNorm after a LoRA layer; with `tracked=False` it has no running statistics, even in eval mode."""

    def __init__(self, tracked: bool = True) -> None:
        super().__init__()
        self.layer, self.norm = Lora(6, 8), nn.BatchNorm1d(8, track_running_stats=tracked)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.layer(x))))


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x - x.mean(0, keepdim=True)


class Capacity(nn.Module):
    """An expert takes the `capacity` tokens of the whole batch that score highest: tokens compete for places."""

    def __init__(self, capacity: int = 4) -> None:
        super().__init__()
        self.inner, self.router, self.expert = Lora(6, 8), nn.Linear(8, 1), nn.Linear(8, 8)
        self.head, self.capacity = nn.Linear(8, 4), capacity

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inner(x).flatten(0, 1)
        score, chosen = self.router(tokens).squeeze(-1).topk(self.capacity)
        update = self.expert(tokens[chosen]) * score.sigmoid().unsqueeze(-1)
        return self.head(tokens.index_add(0, chosen, update).view(*x.shape[:2], 8).mean(1))


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Lora(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.layer(x), 0.5, self.training))


class FusedQkv(nn.Module):
    """loralib's MergedLinear: LoRA on query and value by a grouped convolution, zeros where the key is."""

    keep: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 12), nn.Linear(4, 4)
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(4, 6)), nn.Parameter(torch.empty(8, 2))
        self.register_buffer("keep", torch.arange(12).div(4, rounding_mode="floor") != 1)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A).transpose(-2, -1)
        update = F.conv1d(low, self.lora_B.unsqueeze(-1), groups=2).transpose(-2, -1)
        padded = x.new_zeros(*x.shape[:-1], 12)
        padded[..., self.keep] = update
        q, k, v = (self.qkv(x) + 0.5 * padded).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Branching(nn.Module):
    """Takes one path or the other depending on a perturbed value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if y.sum() > 0 else 2 * y


class Neighbours(nn.Module):
    """Mixes each example with the next one of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + y.roll(1, 0)


class TimeMajorInside(nn.Module):
    """Batch first outside, time first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.second, self.head = Lora(6, 8), Lora(8, 8, rank=3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).transpose(0, 1)
        x = torch.cumsum(x, 0) / math.sqrt(x.shape[0])
        return self.head(self.second(x)[-1])


class HeadsFolded(nn.Module):
    """Attention whose batch and heads are one dimension, as `bmm` wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Attention(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.inner.q(x).view(batch, length, 2, 4).transpose(1, 2).reshape(batch * 2, length, 4)
        k = self.inner.k(x).view(batch, length, 2, 4).permute(0, 2, 3, 1).reshape(batch * 2, 4, length)
        v = self.inner.v(x).view(batch, length, 2, 4).transpose(1, 2).reshape(batch * 2, length, 4)
        mixed = torch.bmm(torch.softmax(torch.baddbmm(q.new_zeros(()), q, k, beta=0, alpha=0.5), -1), v)
        return self.head(mixed.view(batch, 2, length, 4).transpose(1, 2).reshape(batch, length, width).mean(1))


class TwoOrders(nn.Module):
    """Two sequences, of which the second comes with its steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = Lora(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x) + 0.5 * self.mix(steps).transpose(0, 1)).mean(1))


class Upsampled(nn.Module):
    """A transposed convolution, and one of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.ConvTranspose2d(4, 6, 2, stride=2), nn.Linear(6, 4)
        self.reduce = nn.Conv2d(4, 2, 1, bias=False)
        self.restore = nn.ConvTranspose2d(2, 6, 2, stride=2, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.base(image) + 0.7 * self.restore(self.reduce(image))
        return self.head(torch.tanh(x).mean((2, 3)))
