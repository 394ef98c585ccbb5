"""The named high-level operators of a readable step program, registered with `torch.library`.

Each operator's eager implementation is plain torch and is also its decomposition: the last pass traces it.
A *fused* tensor carries P groups inside one dimension: its size along `dim` is ``outer * P * inner``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mobizo_passes import noise as _noise
from mobizo_passes.zo.scheme import Normalize, registered


def noise(seed: Tensor, site: int, queries: int, shape: Sequence[int], kind: str) -> Tensor:
    """z of one site, float32 [queries, *shape], from seed int64 [1]."""
    return _noise.noise(seed, site, queries, shape, kind)


def noise_stack(seed: Tensor, sites: Sequence[int], queries: int, shape: Sequence[int], kind: str) -> Tensor:
    """z of several sites of one shape, float32 [len(sites), queries, *shape], from seed int64 [1]."""
    z = _noise.noise_stack(seed, sites, queries, math.prod(shape), kind)
    return z.reshape(len(sites), queries, *shape)


def perturb(value: Tensor, z: Tensor, eps: Tensor, estimator: str) -> Tensor:
    """Perturbed copies of an adapter tensor, [P, *shape], from value [*shape], z [q, *shape] and eps [1]."""
    return registered(estimator)(z.shape[0]).perturb(value, z, eps)


def expand(x: Tensor, groups: int, dim: int, outer: int) -> Tensor:
    """Repeat a shared value for every group: size ``outer * inner`` along `dim` becomes ``outer * groups * inner``."""
    if outer == 1:
        return torch.cat([x] * groups, dim)
    shape = list(x.shape)
    split = x.reshape(*shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :])
    shape[dim] *= groups
    return torch.cat([split] * groups, dim + 1).reshape(shape)


def _ungroup(x: Tensor, groups: int, dim: int, outer: int) -> Tensor:
    """View a fused tensor [..., n, features] as [groups, rows, features]."""
    features = x.shape[-1]
    before = math.prod(x.shape[:dim]) * outer
    if before == 1:
        return x.reshape(groups, -1, features)
    return x.reshape(before, groups, -1, features).transpose(0, 1).reshape(groups, -1, features)


def mp_lora(x: Tensor, weight: Tensor, dim: int, outer: int, transposed: bool) -> Tensor:
    """Apply one low-rank factor per group (MP-LoRA, paper section 3.2) as one `bmm`.

    x is fused [..., in] with P groups in `dim`; weight is [P, out, in], or [P, in, out] if `transposed`;
    returns [..., out].
    """
    groups = weight.shape[0]
    y = torch.bmm(_ungroup(x, groups, dim, outer), weight if transposed else weight.transpose(1, 2))
    before = math.prod(x.shape[:dim]) * outer
    if before != 1:
        y = y.reshape(groups, before, -1, y.shape[-1]).transpose(0, 1)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def mp_conv(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channel_groups: int,
) -> Tensor:
    """Apply one convolution per group as one grouped convolution.

    x is fused [P * B, in, *spatial]; weight is [P, out, in / channel_groups, *kernel]; returns [P * B, out, *spatial'].
    """
    groups, out = weight.shape[:2]
    batch = x.shape[0] // groups
    # [P * B, C, ...] -> [B, P * C, ...]: the groups become channels.
    side = x.reshape(groups, batch, -1).transpose(0, 1).reshape(batch, groups * x.shape[1], *x.shape[2:])
    kernels = weight.reshape(groups * out, *weight.shape[2:])
    spatial = x.dim() - 2
    y = torch.ops.aten.convolution.default(
        side, kernels, None, stride, padding, dilation, False, [0] * spatial, groups * channel_groups
    )
    shape = y.shape[2:]
    return y.reshape(batch, groups, -1).transpose(0, 1).reshape(groups * batch, out, *shape)


def ungroup(x: Tensor, groups: int, dim: int, outer: int) -> Tensor:
    """Take the groups of a fused tensor out of dimension `dim`: returns [P, *shape]."""
    shape = list(x.shape)
    shape[dim] //= groups
    if outer == 1 and math.prod(shape[:dim]) == 1:
        return x.reshape(groups, *shape)
    before, inner = math.prod(shape[:dim]) * outer, shape[dim] // outer
    split = x.reshape(before, groups, inner * math.prod(shape[dim + 1 :]))
    return split.transpose(0, 1).reshape(groups, *shape)


def regroup(x: Tensor, dim: int, outer: int, size: int) -> Tensor:
    """Fuse the groups of x [P, *shape] into dimension `dim`, `size` for each group; a 1 there broadcasts."""
    groups, *shape = x.shape
    if shape[dim] != size:
        shape[dim] = size
        at = dim + 1
        x = x.expand(*x.shape[:at], size, *x.shape[at + 1 :])
    fused = [*shape[:dim], groups * size, *shape[dim + 1 :]]
    before = math.prod(shape[:dim]) * outer
    if before == 1:
        return x.reshape(fused)
    return x.reshape(groups, before, -1).transpose(0, 1).reshape(fused)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Pick positions of each example: x [B, T, D] and index int64 [B, K] give [B, K, D]."""
    return torch.gather(x, 1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def one_hot_gather(x: Tensor, index: Tensor) -> Tensor:
    """`gather_rows` as a product with a one-hot matrix, which every delegate takes; a gather is taken by few.

    Exact where x is finite. A single NaN spreads over all gathered rows, even where its factor is 0.
    """
    positions = torch.arange(x.shape[1], device=x.device)
    onehot = (index.unsqueeze(2) == positions).to(x.dtype)
    return torch.bmm(onehot, x)


def reduce_loss(values: Tensor, weights: Tensor | None, groups: int, dim: int, outer: int, reduction: str) -> Tensor:
    """Reduce fused per-element losses to one loss per group, float32 [groups].

    `reduction` is "sum" or "mean"; a mean divides by the sum of `weights` (shared by all groups, not fused)
    if given, by the number of elements otherwise.
    """
    if values.dtype is torch.float64:
        # The adapter is float32, and what is updated by a float64 gradient would not be.
        values = values.float()
    before = math.prod(values.shape[:dim]) * outer
    if before == 1:
        total = values.reshape(groups, -1).sum(1)
    else:
        total = values.reshape(before, groups, -1).sum((0, 2))
    if reduction == "sum":
        return total
    if weights is None:
        return total / (values.numel() // groups)
    return total / weights.sum()


def row_sums(values: Tensor, dim: int, outer: int, size: int) -> Tensor:
    """Sum what belongs to each of the `size` examples of the batch, which lies in `dim`: returns [size]."""
    before = math.prod(values.shape[:dim]) * outer
    if before == 1:
        return values.reshape(size, -1).sum(1)
    return values.reshape(before, size, -1).sum((0, 2))


def projected_gradients(losses: Tensor, eps: Tensor, estimator: str, normalize: Normalize = None) -> Tensor:
    """Projected gradients [q] from losses [P] and eps [1] (paper, eq. 1), as the estimator of this kind makes them."""
    return registered(estimator).of_groups(losses.shape[0], normalize).projected_gradients(losses, eps)


def update(value: Tensor, z: Tensor, projected_gradients: Tensor, lr: Tensor) -> Tensor:
    """New adapter tensor ``value − lr/q · Σ_i g_i z_i``, from value [*shape], z [q, *shape], g [q] and lr [1]."""
    queries = z.shape[0]
    scale = (projected_gradients * (lr / queries)).reshape(queries, *[1] * value.dim())
    return value - (z * scale).sum(0)


def estimate(z: Tensor, projected_gradients: Tensor) -> Tensor:
    """Estimate of a tensor's gradient ``1/q · Σ_i g_i z_i``, [*shape], from z [q, *shape] and g [q]."""
    queries = z.shape[0]
    scale = (projected_gradients / queries).reshape(queries, *[1] * (z.dim() - 1))
    return (z * scale).sum(0)


def _owned(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A custom operator must not return a view of an input."""

    def run(*args: object, **kwargs: object) -> Tensor:
        out = fn(*args, **kwargs)
        tensors = [a for a in args if isinstance(a, Tensor)]
        return out.clone() if any(out._base is a or out is a for a in tensors) or out._is_view() else out

    return run


_SCHEMAS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "noise": ("(Tensor seed, int site, int queries, int[] shape, str kind) -> Tensor", noise),
    "noise_stack": ("(Tensor seed, int[] sites, int queries, int[] shape, str kind) -> Tensor", noise_stack),
    "perturb": ("(Tensor value, Tensor z, Tensor eps, str estimator) -> Tensor", perturb),
    "expand": ("(Tensor x, int groups, int dim, int outer) -> Tensor", expand),
    "mp_lora": ("(Tensor x, Tensor weight, int dim, int outer, bool transposed) -> Tensor", mp_lora),
    "mp_conv": (
        "(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, int channel_groups) -> Tensor",
        mp_conv,
    ),
    "ungroup": ("(Tensor x, int groups, int dim, int outer) -> Tensor", ungroup),
    "regroup": ("(Tensor x, int dim, int outer, int size) -> Tensor", regroup),
    "gather_rows": ("(Tensor x, Tensor index) -> Tensor", gather_rows),
    "reduce_loss": (
        "(Tensor values, Tensor? weights, int groups, int dim, int outer, str reduction) -> Tensor",
        reduce_loss,
    ),
    "row_sums": ("(Tensor values, int dim, int outer, int size) -> Tensor", row_sums),
    "projected_gradients": (
        "(Tensor losses, Tensor eps, str estimator, str? normalize=None) -> Tensor",
        projected_gradients,
    ),
    "estimate": ("(Tensor z, Tensor projected_gradients) -> Tensor", estimate),
    "update": ("(Tensor value, Tensor z, Tensor projected_gradients, Tensor lr) -> Tensor", update),
}


def _noise_shape(seed: Tensor, site: int, queries: int, shape: Sequence[int], kind: str) -> Tensor:
    return seed.new_empty((queries, *shape), dtype=torch.float32)


def _noise_stack_shape(seed: Tensor, sites: Sequence[int], queries: int, shape: Sequence[int], kind: str) -> Tensor:
    return seed.new_empty((len(sites), queries, *shape), dtype=torch.float32)


# Noise reads a table that must not be built from fake tensors; the other definitions run on fakes as they are.
_FAKES: dict[str, Callable[..., Tensor]] = {"noise": _noise_shape, "noise_stack": _noise_stack_shape}

# Decomposition of each operator: the plain-torch function itself.
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {}

for _name, (_schema, _fn) in _SCHEMAS.items():
    torch.library.define(f"mobizo::{_name}", _schema)
    torch.library.impl(f"mobizo::{_name}", "CPU", _owned(_fn))
    torch.library.register_fake(f"mobizo::{_name}", _FAKES.get(_name, _owned(_fn)))
    DECOMPOSITIONS[getattr(torch.ops.mobizo, _name).default] = _fn
