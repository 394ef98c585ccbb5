"""Every spelling of LoRA is found, with its scaling; a near miss of each is not taken, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.captures import captured_once
from tests.models import BATCH, LENGTH, integers, random, seeded

Forward = Callable[[Any, Tensor], Tensor]
FAN_IN, RANK, FAN_OUT = 6, 3, 9


class Spelled(nn.Module):
    """Weights of a base layer and of two low-rank factors under neutral names, used as `forward` says."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.spelled = forward
        self.base, self.bias = nn.Linear(FAN_IN, FAN_OUT), nn.Parameter(torch.empty(FAN_OUT))
        self.down, self.up = nn.Parameter(torch.empty(RANK, FAN_IN)), nn.Parameter(torch.empty(FAN_OUT, RANK))
        self.down_t, self.up_t = nn.Parameter(torch.empty(FAN_IN, RANK)), nn.Parameter(torch.empty(RANK, FAN_OUT))
        self.gain = nn.Parameter(torch.empty(RANK))
        self.core = nn.Parameter(torch.empty(RANK, RANK))
        self.wide_down, self.wide_up = nn.Parameter(torch.empty(7, FAN_IN)), nn.Parameter(torch.empty(FAN_OUT, 7))
        self.square = nn.Parameter(torch.empty(FAN_IN, FAN_IN))
        self.register_buffer("scale", torch.tensor(1.5))
        self.dropout = nn.Dropout(0.3)
        self.table = nn.Embedding(11, FAN_OUT)
        self.table_down = nn.Parameter(torch.empty(RANK, 11))
        self.conv = nn.Conv2d(2, 5, 3)
        self.conv_down, self.conv_up = nn.Conv2d(2, 1, 3, bias=False), nn.Conv2d(1, 5, 1, bias=False)
        self.head = nn.Linear(FAN_OUT, 4)
        self.row, self.column = nn.Parameter(torch.empty(1, FAN_IN)), nn.Parameter(torch.empty(FAN_OUT, 1))
        self.row_t, self.column_t = nn.Parameter(torch.empty(FAN_IN, 1)), nn.Parameter(torch.empty(1, FAN_OUT))

    def forward(self, x: Tensor) -> Tensor:
        y = self.spelled(self, x)
        if y.dim() == 4:
            return y.mean((2, 3))[:, :4]
        return self.head(y.mean(1) if y.dim() == 3 else y)

    def low(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# name: (forward, lora_A, lora_B, scaling, kind)
FOUND: dict[str, tuple[Forward, str, str, float | None, str]] = {
    "F.linear": (lambda m, x: m.base(x) + m.low(x) * 2, "down", "up", 2.0, "linear"),
    "scale first": (lambda m, x: m.base(x) + 2 * m.low(x), "down", "up", 2.0, "linear"),
    "scale between": (
        lambda m, x: m.base(x) + F.linear(F.linear(x, m.down) * 2, m.up), "down", "up", 2.0, "linear",
    ),
    "scale before": (lambda m, x: m.base(x) + m.low(x * 0.5), "down", "up", 0.5, "linear"),
    "scale of both inputs": (lambda m, x: m.base(x * 0.5) + m.low(x * 0.5), "down", "up", 1.0, "linear"),
    "scale by division": (lambda m, x: m.base(x) + m.low(x) / 4, "down", "up", 0.25, "linear"),
    "scale as a buffer": (lambda m, x: m.base(x) + m.low(x) * m.scale, "down", "up", 1.5, "linear"),
    "scale as a tensor": (lambda m, x: m.base(x) + torch.tensor(3.0) * m.low(x), "down", "up", 3.0, "linear"),
    "scale per rank": (
        lambda m, x: m.base(x) + F.linear(F.linear(x, m.down) * m.gain, m.up), "down", "up", None, "linear",
    ),
    "difference": (lambda m, x: m.base(x) - m.low(x), "down", "up", -1.0, "linear"),
    "alpha of a sum": (lambda m, x: torch.add(m.base(x), m.low(x), alpha=3), "down", "up", 3.0, "linear"),
    "dropout between": (
        lambda m, x: m.base(x) + F.linear(m.dropout(F.linear(m.dropout(x), m.down)), m.up), "down", "up", 1.0, "linear",
    ),
    "bias on both": (
        lambda m, x: m.base(x) + F.linear(F.linear(x, m.down, m.gain), m.up, m.bias), "down", "up", 1.0, "linear",
    ),
    "x @ A @ B": (lambda m, x: m.base(x) + x @ m.down_t @ m.up_t, "down_t", "up_t", 1.0, "linear"),
    "x @ A.T @ B.T": (lambda m, x: m.base(x) + x @ m.down.T @ m.up.mT, "down", "up", 1.0, "linear"),
    "einsum in two": (
        lambda m, x: m.base(x) + torch.einsum("btr,or->bto", torch.einsum("bti,ri->btr", x, m.down), m.up),
        "down", "up", 1.0, "linear",
    ),
    "einsum in one": (
        lambda m, x: m.base(x) + torch.einsum("bti,ir,ro->bto", x, m.down_t, m.up_t), "down_t", "up_t", 1.0, "linear",
    ),
    "einsum of rank one": (
        lambda m, x: m.base(x) + torch.einsum("btr,or->bto", torch.einsum("bti,ri->btr", x, m.row), m.column),
        "row", "column", 1.0, "linear",
    ),
    "einsum of rank one, turned": (
        lambda m, x: m.base(x) + torch.einsum("bti,ir,ro->bto", x, m.row_t, m.column_t) * 2,
        "row_t", "column_t", 2.0, "linear",
    ),
    "tensordot": (
        lambda m, x: m.base(x) + torch.tensordot(torch.tensordot(x, m.down_t, 1), m.up_t, 1),
        "down_t", "up_t", 1.0, "linear",
    ),
    "Conv1D of GPT-2": (
        lambda m, x: m.base(x) + torch.addmm(m.bias, torch.addmm(m.gain, rows(x), m.down_t), m.up_t).view(
            *x.shape[:-1], FAN_OUT
        ),
        "down_t", "up_t", 1.0, "linear",
    ),
    "sum inside addmm": (
        lambda m, x: torch.addmm(rows(m.base(x)), rows(x) @ m.down_t, m.up_t, alpha=2).view(*x.shape[:-1], FAN_OUT),
        "down_t", "up_t", 2.0, "linear",
    ),
    "from the left": (
        lambda m, x: m.base(x) + (m.up @ (m.down @ x.transpose(1, 2))).transpose(1, 2), "down", "up", 1.0, "linear",
    ),
    "base in parts": (
        lambda m, x: torch.cat([m.base(x)[..., :4], m.base(x)[..., 4:] + m.low(x)[..., 4:]], -1) + m.low(x),
        "down", "up", 1.0, "linear",
    ),
    "convolution with kernels of one": (
        lambda m, x: m.base(x)
        + F.conv1d(F.conv1d(x.transpose(1, 2), m.down[:, :, None]), m.up[:, :, None]).transpose(1, 2),
        "down", "up", 1.0, "conv1d",
    ),
    "merged, then transposed": (
        lambda m, x: x @ (m.base.weight + m.up @ m.down * 0.5).T, "down", "up", 0.5, "merged",
    ),
    "merged as stored": (
        lambda m, x: F.linear(x, m.base.weight + (m.down_t @ m.up_t).T), "down_t", "up_t", 1.0, "merged",
    ),
    "merged, scaled first": (
        lambda m, x: F.linear(x, m.base.weight + 1.5 * m.up @ m.down), "down", "up", 1.5, "merged",
    ),
    "merged, scaled by a parameter": (
        lambda m, x: F.linear(x, m.base.weight + (m.up @ m.down) * m.gain[:1]), "down", "up", None, "merged",
    ),
    "merged, with a core": (
        lambda m, x: F.linear(x, m.base.weight + m.up @ m.core @ m.down), "down", "up", None, "merged",
    ),
    "merged, then normalized": (
        lambda m, x: F.linear(x, F.normalize(m.base.weight + m.up @ m.down, dim=1)), "down", "up", None, "merged",
    ),
    "merged, with magnitudes": (
        lambda m, x: F.linear(x, (w := m.base.weight + m.up @ m.down) / w.norm(dim=1, keepdim=True)),
        "down", "up", None, "merged",
    ),
    "scale per rank in the weight": (
        lambda m, x: m.base(x) + x @ (m.down * m.gain[:, None]).T @ m.up.T, "down", "up", None, "linear",
    ),
    "core between the factors": (
        lambda m, x: m.base(x) + x @ m.down.T @ m.core @ m.up.T, "down", "up", None, "linear",
    ),
    "weight built first": (
        lambda m, x: m.base(x) + F.linear(x, m.up @ m.down * 0.5), "down", "up", 0.5, "merged",
    ),
    "sum of element-wise products": (
        lambda m, x: m.base(x) + F.linear((x.unsqueeze(-2) * m.down).sum(-1), m.up), "down", "up", 1.0, "linear",
    ),
}  # fmt: skip

# name: (forward, lora_B of the candidate, reason)
MISSED: dict[str, tuple[Forward, str, str]] = {
    "not added": (
        lambda m, x: torch.tanh(m.low(x)), "up", "a bottleneck of rank 3, but its output is not added to another path",
    ),
    "added to its own input": (
        lambda m, x: m.base(x + F.linear(F.linear(x, m.down), m.square[:, :RANK].contiguous()))
        + F.linear(F.linear(x, m.down), m.up).tanh(),
        "up", "its output is not added to another path",
    ),
    "residual adapter": (
        lambda m, x: m.base(x) + (x @ m.square) @ m.down_t @ m.up_t, "up_t",
        r"its output is added to %linear, which is no linear map of the same input %matmul",
    ),
    "of another input": (
        lambda m, x: m.base(torch.tanh(x)) + m.low(x), "up",
        r"its output is added to %linear, which is no linear map of the same input %x",
    ),
    "gating": (lambda m, x: m.base(x) * m.low(x), "up", "its output is not added to another path"),
    "scaled by the batch": (
        lambda m, x: m.base(x) + m.low(x) * x.mean(-1, keepdim=True), "up", "its output is not added to another path",
    ),
    "activation": (
        lambda m, x: m.base(x) + F.linear(F.silu(F.linear(x, m.down)), m.up), "up",
        r"%silu = aten.silu.default stands between its two linear maps",
    ),
    "wide": (
        lambda m, x: m.base(x) + x @ m.square @ m.base.weight.T, "base.weight",
        "its rank 6 is no less than its 6 inputs or 9 outputs",
    ),
    "weight built first, not added": (
        lambda m, x: torch.tanh(F.linear(x, m.up @ m.down)), "up", "its output is not added to another path",
    ),
    "merged and wide": (
        lambda m, x: F.linear(x, m.base.weight + m.wide_up @ m.wide_down), "wide_up",
        "its rank 7 is no less than its 6 inputs or 9 outputs",
    ),
}  # fmt: skip


def compiled(forward: Forward, x: Tensor, **options: Any) -> mz.TrainingProgram:
    model, labels = seeded(Spelled(forward)), integers(4, BATCH)
    with captured_once(forward):
        program = mz.transform(model, (x, labels), loss=F.cross_entropy, estimator=mz.TwoSided(2), **options)
    result = mz.verify(program, model, (x, labels))
    assert float(result.losses.std()) > 1e-4, "the perturbations change nothing"
    return program


@pytest.mark.parametrize("trainable", ["lora_B", "lora_A+lora_B"])
@pytest.mark.parametrize("name", FOUND)
def test_spellings_are_found(name: str, trainable: str) -> None:
    forward, lora_a, lora_b, scaling, kind = FOUND[name]
    (site,) = compiled(forward, random(BATCH, LENGTH, FAN_IN), trainable=trainable).sites
    assert (site.lora_A, site.lora_B, site.kind) == (lora_a, lora_b, kind)
    rank = 1 if "rank one" in name else RANK
    assert (site.rank, site.in_features, site.out_features) == (rank, FAN_IN, FAN_OUT)
    assert site.scaling == (None if scaling is None else pytest.approx(scaling))


@pytest.mark.parametrize("trainable", ["lora_B", "lora_A+lora_B"])
def test_embedding(trainable: str) -> None:
    def forward(m: Any, ids: Tensor) -> Tensor:
        return m.table(ids) + F.embedding(ids, m.table_down.T) @ m.up.T * 2

    (site,) = compiled(forward, integers(11, BATCH, LENGTH), trainable=trainable).sites
    assert (site.lora_A, site.lora_B, site.scaling, site.kind) == ("table_down", "up", 2.0, "embedding")
    assert (site.rank, site.in_features, site.out_features) == (RANK, 11, FAN_OUT)


@pytest.mark.parametrize("trainable", ["lora_B", "lora_A+lora_B"])
def test_merged_convolution(trainable: str) -> None:
    """As loralib and parametrizations write it: the product of the factors, shaped like the kernel."""

    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(5, 2, 3, 3))
            self.down, self.up = nn.Parameter(torch.empty(2, 18)), nn.Parameter(torch.empty(5, 2))

        def forward(self, image: Tensor) -> Tensor:
            kernel = self.weight + (self.up @ self.down).view_as(self.weight)
            return F.conv2d(image, kernel).tanh().mean((2, 3))

    model, inputs = seeded(Merged()), (random(BATCH, 2, 6, 6), integers(5, BATCH))
    program = mz.transform(model, inputs, loss=F.cross_entropy, trainable=trainable)
    mz.verify(program, model, inputs)
    assert [(s.lora_A, s.lora_B, s.kind) for s in program.sites] == [("down", "up", "merged")]


def test_two_pairs_in_one_weight() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.base.weight + m.up @ m.down + (m.down_t @ m.up_t).T)

    sites = compiled(forward, random(BATCH, LENGTH, FAN_IN)).sites
    assert [(s.lora_A, s.lora_B, s.kind) for s in sites] == [
        ("down", "up", "merged"), ("down_t", "up_t", "merged"),
    ]  # fmt: skip


def test_names_decide_in_a_tied_table() -> None:
    """A table is looked up by rows and multiplied by its transpose: which factor stands above, only names tell."""

    class TiedTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.empty(11, 6))
            self.lora_A, self.lora_B = nn.Parameter(torch.empty(2, 6)), nn.Parameter(torch.empty(11, 2))

        def forward(self, ids: Tensor) -> Tensor:
            table = self.table + self.lora_B @ self.lora_A
            return torch.tanh(F.embedding(ids, table).mean(1)) @ table.T

    model, inputs = seeded(TiedTable()), (integers(11, BATCH, LENGTH), integers(11, BATCH))
    program = mz.transform(model, inputs, loss=F.cross_entropy)
    mz.verify(program, model, inputs)
    assert [(s.lora_A, s.lora_B, s.kind) for s in program.sites] == [("lora_A", "lora_B", "merged")]


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("first", "second")], ids=" ".join)
def test_one_pair_for_all_experts(names: tuple[str, str]) -> None:
    """PEFT's `target_parameters`: two matrices, cut into a block for each expert. Only names tell what they are."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, FAN_OUT, FAN_IN))
            self.register_parameter(names[0], nn.Parameter(torch.empty(4 * RANK, FAN_IN)))
            self.register_parameter(names[1], nn.Parameter(torch.empty(FAN_OUT, RANK * 4)))
            self.router = nn.Linear(FAN_IN, 4)

        def forward(self, x: Tensor) -> Tensor:
            down = getattr(self, names[0]).reshape(4, RANK, FAN_IN)
            up = getattr(self, names[1]).reshape(FAN_OUT, RANK, 4)
            weights = self.weight + torch.einsum("ore,eri->eoi", up, down) * 0.5
            return torch.einsum("bi,boi->bo", x, weights[self.router(x).argmax(1)])

    model, inputs = seeded(Experts()), (random(BATCH, FAN_IN), integers(FAN_OUT, BATCH))
    if names == ("first", "second"):
        with pytest.raises(mz.NoLoRASites):
            mz.transform(model, inputs, loss=F.cross_entropy)
        return
    program = mz.transform(model, inputs, loss=F.cross_entropy, trainable="lora_A+lora_B")
    mz.verify(program, model, inputs)
    (site,) = program.sites
    assert (site.rank, site.scaling, site.kind) == (RANK, 0.5, "merged")
    assert (site.in_features, site.out_features) == (FAN_IN, FAN_OUT)


def test_a_buffer_is_not_trained() -> None:
    """VeRA's shared random matrices are buffers; what it trains are vectors, which are no LoRA site."""
    model: Any = Spelled(lambda m, x: m.base(x) + m.low(x))
    up = model.up.data
    del model.up
    model.register_buffer("up", up)
    inputs = (random(BATCH, LENGTH, FAN_IN), integers(4, BATCH))
    with pytest.raises(mz.NoLoRASites, match=r"  up: its lora_B is a buffer, not a parameter"):
        mz.transform(seeded(model), inputs, loss=F.cross_entropy)


def test_frozen_factors_beside_trainable_ones_are_left_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.base(x) + m.low(x) + x @ m.down_t @ m.up_t

    model, inputs = seeded(Spelled(forward)), (random(BATCH, LENGTH, FAN_IN), integers(4, BATCH))
    assert len(mz.transform(model, inputs, loss=F.cross_entropy).sites) == 2
    model.get_parameter("up").requires_grad_(False)
    program = mz.transform(model, inputs, loss=F.cross_entropy)
    assert [s.lora_B for s in program.sites] == ["up_t"]
    assert [(r.name, r.reason) for r in program.sites.rejected] == [
        ("up", "its lora_B is frozen (requires_grad is False), while those of other sites are not")
    ]
    # All frozen, as PEFT loads adapters for inference: all are taken.
    model.requires_grad_(False)
    assert len(mz.transform(model, inputs, loss=F.cross_entropy).sites) == 2


@pytest.mark.parametrize("trainable", ["lora_B", "lora_A+lora_B"])
def test_convolution(trainable: str) -> None:
    def forward(m: Any, image: Tensor) -> Tensor:
        return torch.relu(m.conv(image) + m.conv_up(m.conv_down(image)) * 0.5)

    (site,) = compiled(forward, random(BATCH, 2, 6, 6), trainable=trainable).sites
    assert (site.lora_A, site.lora_B, site.scaling, site.kind) == ("conv_down.weight", "conv_up.weight", 0.5, "conv2d")
    assert (site.rank, site.in_features, site.out_features) == (1, 2, 5)


@pytest.mark.parametrize("name", [n for n, found in FOUND.items() if found[4] != "merged" or "built" in n])
def test_no_spelling_is_taken_beside_a_map_of_another_input(name: str) -> None:
    """The near miss of every spelling: the same two factors, but the base layer reads tanh(x)."""
    forward, _, lora_b, _, _ = FOUND[name]
    model: Any = seeded(Spelled(forward))
    model.base.register_forward_pre_hook(lambda _, x: torch.tanh(x[0]))
    inputs = (random(BATCH, LENGTH, FAN_IN), integers(4, BATCH))
    with pytest.raises(
        mz.NoLoRASites, match=rf"  {lora_b}: a bottleneck of rank [13].* is no linear map of the same input"
    ):
        mz.transform(model, inputs, loss=F.cross_entropy)


def test_embeddings_and_convolutions_beside_another_input() -> None:
    model: Any = seeded(Spelled(lambda m, ids: m.table(ids) + F.embedding(ids, m.table_down.T) @ m.up.T))
    model.table.register_forward_pre_hook(lambda _, ids: ids[0] // 2)
    with pytest.raises(mz.NoLoRASites, match=r"  up: .* is no linear map of the same input %x"):
        mz.transform(model, (integers(11, BATCH, LENGTH), integers(4, BATCH)), loss=F.cross_entropy)
    model = seeded(Spelled(lambda m, image: torch.relu(m.conv(image) + m.conv_up(m.conv_down(image)))))
    model.conv.register_forward_pre_hook(lambda _, image: torch.tanh(image[0]))
    with pytest.raises(mz.NoLoRASites, match=r"  conv_up.weight: .* is no linear map of the same input %x"):
        mz.transform(model, (random(BATCH, 2, 6, 6), integers(4, BATCH)), loss=F.cross_entropy)


@pytest.mark.parametrize("name", MISSED)
def test_near_misses_are_not_taken(name: str) -> None:
    forward, lora_b, reason = MISSED[name]
    model, inputs = seeded(Spelled(forward)), (random(BATCH, LENGTH, FAN_IN), integers(4, BATCH))
    message = rf"nearest misses:(.*\n)*  {lora_b}: .*{reason}"
    with pytest.raises(mz.NoLoRASites, match=message), captured_once(forward):
        mz.transform(model, inputs, loss=F.cross_entropy)


@pytest.mark.parametrize("name", [n for n in MISSED if n != "added to its own input"])
def test_a_near_miss_is_taken_where_the_user_lists_it(name: str) -> None:
    forward, lora_b, _ = MISSED[name]
    program = compiled(forward, random(BATCH, LENGTH, FAN_IN), sites=[lora_b])
    assert [s.lora_B for s in program.sites] == [lora_b]
    assert lora_b not in {r.name for r in program.sites.rejected}
