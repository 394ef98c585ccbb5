"""The operators that the Vulkan runtime is known to compute right, and the forms in which it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lowering.report import Refusal
from mobizo_passes.graph.operators import overload_name

MAX_RANK = 4
# Rows of a table that is looked up: the extent of a 3-D image that every Vulkan driver has.
MAX_ROWS = 2048
# Above this rank the shader's work groups take their batch from the third axis from the end: the rest is not written.
MAX_LINEAR_RANK = 3

_FLOAT = (torch.float32, torch.float16)
# Operators whose integer operand holds positions; it is passed through, never computed with.
LOOK_UPS = frozenset({"aten.gather.default", "aten.index_select.default"})
_OPERATORS = LOOK_UPS | {
    f"aten.{name}"
    for name in (
        "linear.default",
        "bmm.default",
        "mm.default",
        "addmm.default",
        "_softmax.default",
        "_log_softmax.default",
        "mean.dim",
        "sum.dim_IntList",
        "add.Tensor",
        "sub.Tensor",
        "mul.Tensor",
        "div.Tensor",
        "neg.default",
        "abs.default",
        "relu.default",
        "exp.default",
        "sqrt.default",
        "rsqrt.default",
        "sin.default",
        "cos.default",
        "tanh.default",
        "sigmoid.default",
        "clamp.default",
        "permute_copy.default",
        "view_copy.default",
        "slice_copy.Tensor",
        "unsqueeze_copy.default",
        "squeeze_copy.dims",
        "cat.default",
        "repeat.default",
    )
}
# What ExecuTorch's Vulkan stage makes of them.
SERIALIZED = _OPERATORS | {
    "et_vk.prepack.default",
    "et_vk.rms_norm.default",
    "aten.clone.default",
}
_KNOWN_WRONG = {
    "aten.embedding.default": Refusal("no-embedding", "Vulkan reads tables beyond its image limits wrongly"),
    "aten.logical_not.default": Refusal("no-logical-not", "the Vulkan runtime aborts the process on it"),
    "aten.gelu.default": Refusal("no-exact-gelu", "Vulkan's shader computes the tanh form whatever the model asks for"),
    "aten.pow.Tensor_Scalar": Refusal("known-operators", "the power of a negative number is undefined in a shader"),
    "aten.convolution.default": Refusal("known-operators", "Vulkan's convolution takes a batch of one alone"),
}


def why_not(node: Node) -> Refusal | None:
    """Why a call of the edge program should not be delegated to Vulkan; None if it may.

    Rules have the names that `targets.vulkan.rules` has for them.
    """
    name = overload_name(node)
    if name == "getitem":
        return None
    if name not in _OPERATORS:
        unknown = Refusal("known-operators", f"{name} is not among the operators tried on Vulkan")
        return _KNOWN_WRONG.get(name, unknown)
    values = [_tensor(node), *(_tensor(source) for source in node.all_input_nodes)]
    tensors = [value for value in values if value is not None]
    if any(value.dim() > MAX_RANK for value in tensors):
        return Refusal("rank", f"Vulkan crashes on tensors of more than {MAX_RANK} dimensions")
    if any(value.dim() == 0 for value in tensors):
        scalars = [s for s in node.all_input_nodes if s.op != "placeholder" and _rank(s) == 0]
        if scalars or _rank(node) == 0:
            return Refusal("no-0-dim", "Vulkan has no computed tensors of 0 dimensions")
    if name in LOOK_UPS:
        return _look_up(node)
    if any(value.dtype not in _FLOAT for value in tensors):
        return Refusal(
            "no-integer-arithmetic",
            "integers and booleans stay outside: Vulkan has no 64-bit integers and compares no integers",
        )
    if name == "aten.linear.default" and _rank(node) > MAX_LINEAR_RANK:
        return Refusal(
            "linear-rank", f"Vulkan's linear writes the first slice alone of more than {MAX_LINEAR_RANK} dimensions"
        )
    if name in ("aten.mean.dim", "aten.sum.dim_IntList"):
        return _reduction(node)
    return None


def _look_up(node: Node) -> Refusal | None:
    source: Any = node.args[0]
    dim: Any = node.args[1]
    if dim < 0:
        return Refusal("positive-axis", "Vulkan reads a negative axis wrongly")
    if source.meta["val"].dtype not in _FLOAT:
        return Refusal("no-64-bit", "Vulkan has no 64-bit integers")
    if source.meta["val"].shape[dim] > MAX_ROWS:
        return Refusal("short-tables", f"Vulkan reads tables of more than {MAX_ROWS} rows wrongly")
    return None


def _reduction(node: Node) -> Refusal | None:
    source: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else None
    rank = source.meta["val"].dim()
    if dims is None or len(dims) != 1 or dims[0] not in (-1, rank - 1):
        return Refusal("last-axis", "only reductions over the last axis are tried on Vulkan")
    return None


def _tensor(node: Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _rank(node: Node) -> int:
    value = _tensor(node)
    return -1 if value is None else value.dim()
