"""Whole models as users have them, each with a LoRA of its own making; written without a look at the compiler."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tests.models import Lora


def rand(*shape, scale=0.3):
    return nn.Parameter(torch.randn(*shape) * scale)


class LowRank(nn.Module):
    """W -> W + (alpha / r) B A, as in the minLoRA package."""

    def __init__(self, rows, cols, rank=3, alpha=6.0):
        super().__init__()
        self.A, self.B = rand(rank, cols), rand(rows, rank)
        self.scale = alpha / rank

    def forward(self, weight):
        return weight + self.scale * torch.matmul(self.B, self.A).view(weight.shape)


class ParametrizedNet(nn.Module):
    """Per-pixel net: conv stem, then linears, all through torch.nn.utils.parametrize."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.hidden, self.head = nn.Linear(6, 10), nn.Linear(10, 4)
        for layer in (self.stem, self.hidden):
            rows = layer.weight.shape[0]
            parametrize.register_parametrization(layer, "weight", LowRank(rows, layer.weight[0].numel()))

    def forward(self, image):
        x = F.gelu(self.stem(image)).mean(dim=(-2, -1))
        return self.head(torch.tanh(self.hidden(x)))


class LoRALinear(nn.Module):
    """A frozen layer and its update, under the names of the paper."""

    def __init__(self, fan_in, fan_out, rank=2, alpha=4, bias=True):
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out, bias=bias).requires_grad_(False)
        self.lora_A, self.lora_B = rand(rank, fan_in), rand(fan_out, rank)
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


class RelativeBiasBlock(nn.Module):
    """T5-like bucketed bias, einops-free reshapes, padding mask from lengths."""

    def __init__(self, vocab=20, dim=12, heads=3, classes=5):
        super().__init__()
        self.heads, self.table = heads, nn.Embedding(9, heads)
        self.tokens = nn.Embedding(vocab, dim)
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = LoRALinear(dim, 3 * dim), LoRALinear(dim, dim, bias=False)
        self.classify = nn.Linear(dim, classes)

    def forward(self, ids, lengths):
        b, t = ids.shape
        x = self.tokens(ids)
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        place = torch.arange(t)
        bias = self.table((place[None] - place[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)
        mask = place[None, :] < lengths[:, None]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias[None]
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, t, -1)
        x = x + self.out(y)
        m = mask.unsqueeze(-1).to(x.dtype)
        return self.classify((x * m).sum(1) / m.sum(1))


def rotate(x):
    t, d = x.shape[-2:]
    freq = 1.0 / 100 ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = torch.outer(torch.arange(t, dtype=torch.float32), freq)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), dim=-1)
    return turned.flatten(-2)


class RotaryLM(nn.Module):
    """Returns only a loss: next-token, shift by slicing."""

    def __init__(self, vocab=16, dim=12, heads=4, kv=2):
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, 6
        self.embed = nn.Embedding(vocab, dim)
        self.q, self.k = LoRALinear(dim, heads * 6), LoRALinear(dim, kv * 6)
        self.v, self.o = nn.Linear(dim, kv * 6), LoRALinear(heads * 6, dim)
        self.gate, self.up, self.down = nn.Linear(dim, 20), LoRALinear(dim, 20), nn.Linear(20, dim)

    def forward(self, tokens):
        x = self.embed(tokens[:, :-1])
        b, t, _ = x.shape
        q = rotate(self.q(x).view(b, t, self.heads, self.size).transpose(1, 2))
        k = rotate(self.k(x).view(b, t, self.kv, self.size).transpose(1, 2))
        v = self.v(x).view(b, t, self.kv, self.size).transpose(1, 2)
        k, v = (z.repeat_interleave(self.heads // self.kv, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        logits = F.linear(F.rms_norm(x, (x.shape[-1],)), self.embed.weight)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), tokens[:, 1:].reshape(-1))


class AlibiSeqFirst(nn.Module):
    """ALiBi attention by einsum over (T, B, D)."""

    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.heads = heads
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1))
        self.inp = nn.Linear(5, dim)
        self.q, self.k, self.v = LoRALinear(dim, dim), LoRALinear(dim, dim), LoRALinear(dim, dim + 4)
        self.out = nn.Linear(dim + 4, 1)

    def forward(self, x):  # (T, B, 5)
        t, b, _ = x.shape
        x = self.inp(x)
        q, k, v = (f(x).view(t, b, self.heads, -1) for f in (self.q, self.k, self.v))
        distance = (torch.arange(t)[None, :] - torch.arange(t)[:, None]).abs()
        scores = torch.einsum("ibhd,jbhd->bhij", q, k) * q.shape[-1] ** -0.5
        scores = scores - self.get_buffer("slopes").view(1, -1, 1, 1) * distance
        y = torch.einsum("bhij,jbhd->ibhd", F.softmax(scores, dim=-1), v).reshape(t, b, -1)
        return self.out(y)[-1, :, 0]  # (B,)


class GraphNet(nn.Module):
    """GCN-like: adjacency normalized by degree, masked max pooling."""

    def __init__(self, dim=7, hidden=10):
        super().__init__()
        self.message, self.update = LoRALinear(dim, hidden), LoRALinear(hidden + dim, dim)
        self.readout = LoRALinear(2 * dim, 3)

    def forward(self, nodes, adjacency, mask):
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1.0)
        for _ in range(2):
            m = torch.bmm(adjacency, F.relu(self.message(nodes))) / degree
            nodes = nodes + self.update(torch.cat([m, nodes], dim=-1))
            nodes = torch.where(mask[..., None], nodes, torch.zeros_like(nodes))
        top = nodes.masked_fill(~mask[..., None], -1e9).amax(dim=1)
        mean = nodes.sum(1) / mask.sum(1, keepdim=True)
        return self.readout(torch.cat((top, mean), -1))


class DynamicEdgeConv(nn.Module):
    """Neighbours in perturbed feature space, picked with one flat index over the batch."""

    def __init__(self, k=3):
        super().__init__()
        self.k, self.lift = k, LoRALinear(3, 6)
        self.edge, self.head = LoRALinear(12, 8), nn.Linear(8, 4)

    def forward(self, points):  # (B, N, 3)
        x = self.lift(points)
        b, n, d = x.shape
        index = torch.cdist(x, x).topk(self.k, largest=False)[1]
        index = (index + torch.arange(b).view(-1, 1, 1) * n).view(-1)
        near = x.reshape(b * n, d)[index].view(b, n, self.k, d)
        x = torch.cat((near - x[:, :, None], x[:, :, None].expand(-1, -1, self.k, -1)), -1)
        return self.head(self.edge(x).relu().max(2).values.mean(1))


class SoftMoE(nn.Module):
    """A ModuleList of LoRA experts, dense soft routing through stack, LoRA on the router too."""

    def __init__(self, dim=8, experts=3):
        super().__init__()
        self.router = LoRALinear(dim, experts)
        layers = (nn.Sequential(LoRALinear(dim, 12), nn.ReLU(), LoRALinear(12, dim)) for _ in range(experts))
        self.experts = nn.ModuleList(layers)
        self.head = nn.Linear(dim, 4)

    def forward(self, x, target):
        weights = F.softmax(self.router(x), dim=-1)
        stacked = torch.stack([expert(x) for expert in self.experts], dim=-2)
        y = x + (weights[..., None] * stacked).sum(-2)
        main = F.cross_entropy(self.head(y[:, 0]), target)
        entropy = -(weights * weights.clamp_min(1e-6).log()).sum(-1).mean()
        return {"loss": main + 0.01 * entropy}


class TopKMoE(SoftMoE):
    """Top-2 of the experts for each token by a dense mask: examples don't meet."""

    def forward(self, x, target):
        scores = self.router(x)
        best, index = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, index, best.softmax(-1))
        y = x
        for i, expert in enumerate(self.experts):
            y = y + weights[..., i : i + 1] * expert(x)
        return {"loss": F.cross_entropy(self.head(y.mean(1)), target)}


class SelectiveScan(nn.Module):
    """Mamba-like: states in a python list, state created by new_zeros; log A; softplus delta."""

    def __init__(self, dim=6, state=3, classes=4):
        super().__init__()
        self.log_a = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(dim, 1))
        self.project = LoRALinear(dim, 1 + 2 * state)
        self.out, self.state = LoRALinear(dim, classes), state

    def forward(self, x):
        delta, b, c = self.project(x).split([1, self.state, self.state], dim=-1)
        delta = F.softplus(delta)
        decay = torch.exp(-delta[..., None] * self.log_a.exp())
        h, outputs = x.new_zeros(x.size(0), x.size(2), self.state), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None, :]
            outputs.append(torch.einsum("bds,bs->bd", h, c[:, t]))
        return self.out(torch.stack(outputs, dim=1)).mean(1)


class Perceiver(nn.Module):
    """Learned latents expanded over the batch; nn.MultiheadAttention-free cross attention; queries for the output."""

    def __init__(self, dim=8, latents=3):
        super().__init__()
        self.latents, self.query = nn.Parameter(torch.randn(latents, dim)), nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 6, 5))
        self.q, self.kv = LoRALinear(dim, dim), LoRALinear(5, 2 * dim)
        self.ff = nn.Sequential(nn.LayerNorm(dim), LoRALinear(dim, 14), nn.GELU(), LoRALinear(14, dim))
        self.q2, self.kv2, self.out = LoRALinear(dim, dim), LoRALinear(dim, 2 * dim), nn.Linear(dim, 2)

    def forward(self, x):
        z = self.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        k, v = self.kv(x + self.position).chunk(2, -1)
        z = z + F.scaled_dot_product_attention(self.q(z)[:, None], k[:, None], v[:, None]).squeeze(1)
        z = z + self.ff(z)
        k, v = self.kv2(z).chunk(2, -1)
        query = self.q2(self.query.expand(x.size(0), 1, -1))
        weight = torch.baddbmm(torch.zeros(1, 1, 1), query, k.mT).softmax(-1)
        return self.out(torch.bmm(weight, v)[:, 0])


class Tabular(nn.Module):
    """FT-Transformer: per-column embeddings, per-column affine for numbers, CLS token, LoRA on one embedding."""

    def __init__(self, sizes=(5, 7), numbers=3, dim=6):
        super().__init__()
        self.columns = nn.ModuleList(nn.Embedding(n, dim) for n in sizes)
        self.lora_embedding_A, self.lora_embedding_B = rand(2, sizes[1]), rand(dim, 2)
        self.weight, self.bias = rand(numbers, dim), rand(numbers, dim)
        self.cls = nn.Parameter(torch.randn(dim))
        self.mix, self.up = LoRALinear(6, 9), LoRALinear(9, 6)
        self.price, self.churn = LoRALinear(dim, 1), nn.Linear(dim, 2)

    def forward(self, categories, numbers, price, churn):
        first = self.columns[0](categories[:, 0])
        second = self.columns[1](categories[:, 1])
        second = second + F.embedding(categories[:, 1], self.lora_embedding_A.T) @ self.lora_embedding_B.T * 0.5
        x = torch.stack([first, second], 1)
        y = numbers[..., None] * self.weight + self.bias
        x = torch.cat([self.cls.expand(len(x), 1, -1), x, y], dim=1)
        x = x + self.up(F.mish(self.mix(x.transpose(1, 2)))).transpose(1, 2)
        h = x[:, 0]
        regression = F.huber_loss(self.price(h).squeeze(-1), price)
        classification = F.cross_entropy(self.churn(h), churn)
        return regression + 0.5 * classification, {"regression": regression.detach(), "churn": classification.detach()}


class AdaLoRA(nn.Module):
    """W x + P diag(e) Q x, with a rank mask, and AdaLoRA's own scaling / ranknum."""

    def __init__(self, dim=8, hidden=12, rank=4):
        super().__init__()
        self.base = nn.Linear(dim, hidden)
        self.lora_A, self.lora_E, self.lora_B = rand(rank, dim), rand(rank, 1), rand(hidden, rank)
        self.ranknum = nn.Parameter(torch.tensor(float(rank)), requires_grad=False)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x):
        y = self.base(x) + x @ (self.lora_A * self.lora_E).T @ self.lora_B.T * 16 / (self.ranknum + 1e-5)
        return self.head(F.relu(y))


class MergedOnTheFly(nn.Module):
    """F.linear(x, W + s * B @ A), and DoRA's column norm on a second layer."""

    def __init__(self, dora=False):
        super().__init__()
        self.dora = dora
        self.first, self.second, self.head = nn.Linear(7, 10), nn.Linear(10, 6, bias=False), nn.Linear(6, 2)
        self.lora_down1, self.lora_up1 = rand(2, 7), rand(10, 2)
        self.lora_down2, self.lora_up2 = rand(2, 10), rand(6, 2)
        self.magnitude = nn.Parameter(self.second.weight.detach().norm(dim=1, keepdim=True) + 0.1)

    def forward(self, x):
        x = F.selu(F.linear(x, self.first.weight + 1.5 * self.lora_up1 @ self.lora_down1, self.first.bias))
        weight = self.second.weight + self.lora_up2 @ self.lora_down2
        if self.dora:
            weight = self.magnitude * weight / weight.norm(p=2, dim=1, keepdim=True)
        return self.head(x @ weight.t())


class Windows(nn.Module):
    """Attention within shifted windows of an image."""

    def __init__(self, dim=6, window=2):
        super().__init__()
        self.w = window
        self.patch, self.qkv = nn.Conv2d(1, dim, 2, 2), LoRALinear(dim, 3 * dim)
        self.norm, self.out = nn.LayerNorm(dim), LoRALinear(dim, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, image):
        x = self.norm(self.out(self.patch(image).permute(0, 2, 3, 1)))  # B H W C
        b, h, w, c = x.shape
        x = torch.roll(x, (-1, -1), dims=(1, 2))
        win = x.view(b, h // self.w, self.w, w // self.w, self.w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, self.w**2, c)
        q, k, v = self.qkv(win).chunk(3, -1)
        win = win + torch.softmax(q @ k.transpose(1, 2) / c**0.5, -1) @ v
        x = win.view(b, h // self.w, w // self.w, self.w, self.w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head(torch.roll(x, (1, 1), (1, 2)).flatten(1, 2).mean(1))


class Sequence(nn.Module):
    """A whole LSTM behind a LoRA layer: a loop over time in one operator."""

    def __init__(self):
        super().__init__()
        self.layer, self.loop, self.head = Lora(6, 5), nn.LSTM(5, 4, batch_first=True, bidirectional=True), Lora(8, 4)

    def forward(self, x):
        return self.head(self.loop(self.layer(x))[0][:, -1])


class Picture(nn.Module):
    """Reflected borders, patches, windows of different sizes, norms of single channels."""

    def __init__(self):
        super().__init__()
        self.layer, self.conv = Lora(6, 32), nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.norm, self.head = nn.InstanceNorm2d(4, affine=True), Lora(16, 4)

    def forward(self, x):
        y = self.norm(self.conv(self.layer(x).view(-1, 2, 4, 4)))
        patches = F.fold(F.unfold(y, 2).tanh(), (4, 4), 2)
        return self.head(F.avg_pool2d(patches, 3, 2, ceil_mode=True).flatten(1))


class Cycles(nn.Module):
    """Refines a state by the same layer; all rounds but the last run under `no_grad`."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = Lora(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        state = x
        with torch.no_grad():
            for _ in range(2):
                state = torch.tanh(self.layer(state) + x)
        return self.head(torch.tanh(self.layer(state) + x))
