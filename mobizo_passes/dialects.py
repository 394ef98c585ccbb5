"""The dialects of the compiler's stages: captured, readable (with operators of our own), core."""

from __future__ import annotations

import torch
from torch.fx import Node

from mobizo_passes.graph.dialect import Dialect, Rule
from mobizo_passes.graph.identities import ASSERTIONS, COPIES
from mobizo_passes.graph.ir import CONSTANT_KINDS, Ir
from mobizo_passes.graph.nodes import arguments, shape_of, val
from mobizo_passes.graph.ops import DECOMPOSITIONS

aten = torch.ops.aten
mobizo = torch.ops.mobizo

_HELD = frozenset(CONSTANT_KINDS)
_STEP = _HELD | {"adapter", "tangent", "optimizer", "batch", "seed", "lr", "eps", "projected_gradients"}


def _layout(ir: Ir, node: Node) -> str:
    given = arguments(node)
    fused = given.values if node.target is mobizo.reduce_loss.default else given.x
    groups = shape_of(given.weight)[0] if node.target is mobizo.mp_lora.default else given.get("groups", 1)
    size, parts = shape_of(fused)[given.dim], given.outer * (1 if node.target is mobizo.expand.default else groups)
    return f"{size} in dimension {given.dim} for {parts}" if size % parts else ""


def _factor(ir: Ir, node: Node) -> str:
    given = arguments(node)
    weight, features = shape_of(given.weight), shape_of(given.x)[-1]
    fits = len(weight) == 3 and weight[1 if given.transposed else 2] == features
    return "" if fits and given.dim < len(shape_of(given.x)) - 1 else f"{list(weight)} for {features} features"


def _noise(ir: Ir, node: Node) -> str:
    given = arguments(node)
    value, z = shape_of(given.value), shape_of(given.z)
    return "" if z[1:] == value else f"noise {list(z)} for a tensor {list(value)}"


def _seed(ir: Ir, node: Node) -> str:
    seed = val(arguments(node).seed)
    return "" if seed.dtype is torch.int64 and tuple(seed.shape) == (1,) else f"a seed {seed.dtype}{list(seed.shape)}"


def _rows(ir: Ir, node: Node) -> str:
    x, index = val(arguments(node).x), val(arguments(node).index)
    fits = x.dim() == 3 and index.dim() == 2 and x.shape[0] == index.shape[0] and index.dtype is torch.int64
    return "" if fits else f"x {list(x.shape)} and {index.dtype} index {list(index.shape)}"


_FUSED = tuple(getattr(mobizo, name).default for name in ("expand", "mp_lora", "ungroup", "reduce_loss"))

CAPTURED = Dialect(
    "captured", _HELD | {"batch"}, (Rule("no operator of our own", tuple(DECOMPOSITIONS)),),
)  # fmt: skip

READABLE = Dialect(
    "readable",
    _STEP,
    (
        Rule("groups and parts that divide the fused dimension", _FUSED, _layout),
        Rule("one factor [out, in] for each group, and a batch elsewhere", (mobizo.mp_lora.default,), _factor),
        Rule("noise of the tensor's own shape", (mobizo.perturb.default, mobizo.update.default), _noise),
        Rule("a seed i64[1]", (mobizo.noise.default, mobizo.noise_stack.default), _seed),
        Rule("x [B, T, D] and index i64[B, K]", (mobizo.gather_rows.default,), _rows),
    ),
)

CORE = Dialect(
    "core",
    _STEP | {"state"},
    (
        Rule("no operator of our own", tuple(DECOMPOSITIONS)),
        Rule("log-softmax and gather for a cross-entropy of classes", (aten.cross_entropy_loss.default,)),
        Rule("no copies, assertions and dropout", (*ASSERTIONS, *COPIES, aten.dropout.default)),
        Rule("reshapes instead of views", (aten.view.default, aten._unsafe_view.default)),
    ),
)
