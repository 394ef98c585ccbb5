"""Reading nodes as linear maps with a stored weight: products, embeddings, convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.nodes import arguments

aten = torch.ops.aten

TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
CONVOLUTIONS = {
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.padding: "conv3d",
    aten.conv_transpose1d.default: "conv1d",
    aten.conv_transpose2d.input: "conv2d",
    aten.conv_transpose3d.input: "conv3d",
}
# Kernels that are stored [in, out, ...].
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
# Operators whose operand `at` is the input of a linear map, whatever the weight is: (operator: operand).
MAPS: Mapping[Any, int] = {
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.embedding.default: 1,
    **dict.fromkeys(CONVOLUTIONS, 0),
}


@dataclass(frozen=True)
class Factor:
    """One use of a stored weight: `node` maps `x` (its operand number `at`) linearly.

    `transposed` says that the weight is stored [in, out]; `kind` is linear, embedding, conv1d, conv2d or conv3d.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None = None
    at: int = 0
    kind: str = "linear"

    @property
    def fqn(self) -> str:
        """FQN of the weight."""
        return role(self.weight).name

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out) features, or channels; an embedding takes one feature per row of its table."""
        shape = self.weight.meta["val"].shape
        return (shape[0], shape[1]) if self.transposed else (shape[1], shape[0])


def stored(node: Any, rank: int | None = 2) -> tuple[fx.Node, bool] | None:
    """Look through transposes at a stored tensor: (placeholder, whether it is transposed). `rank` None: any rank."""
    transposed = False
    while isinstance(node, fx.Node) and node.target in TRANSPOSES and rank == 2:
        order = arguments(node).get("dims")
        swaps = order is None or [d % 2 for d in order] == [1, 0]
        node, transposed = node.args[0], transposed ^ swaps
    while isinstance(node, fx.Node) and rank is None and node.target in (aten.unsqueeze.default, aten.reshape.default):
        # A kernel of one may be a matrix with dimensions of one appended.
        inner: Any = node.args[0]
        given, made = list(inner.meta["val"].shape), list(node.meta["val"].shape)
        if made[: len(given)] != given:
            break
        node = inner
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    kinds = ("parameter", "buffer", "adapter")
    value = node.meta["val"]
    if role(node).kind not in kinds or (rank is not None and value.dim() != rank):
        return None
    return node, transposed


def as_product(node: fx.Node) -> Factor | None:
    """Read a node as a product with a stored matrix (and a bias), through any transposes of it; None if it is none."""
    if node.op != "call_function" or node.kwargs:
        return None
    args: list[Any] = list(node.args)
    bias: Any = None
    if node.target is aten.linear.default:
        at, weight, transposed = 0, args[1], False
        bias = arguments(node).bias
    elif node.target in (aten.matmul.default, aten.mm.default):
        at, weight, transposed = 0, args[1], True
    elif node.target is aten.addmm.default:
        at, weight, transposed, bias = 1, args[2], True, args[0]
    else:
        return None
    found = stored(weight)
    if found is None or not isinstance(args[at], fx.Node):
        return None
    return Factor(node, args[at], found[0], transposed ^ found[1], bias, at)


def as_factor(node: fx.Node) -> Factor | None:
    """Read a node as a product, an embedding or a convolution with a stored weight; None if it is none."""
    args: list[Any] = list(node.args)
    target: Any = node.target
    if target is aten.embedding.default:
        found = stored(args[0])
        # A table is [rows, features], that is [in, out].
        return Factor(node, args[1], found[0], not found[1], at=1, kind="embedding") if found else None
    if target in CONVOLUTIONS:
        found = stored(args[1], None)
        if found is None or not isinstance(args[0], fx.Node):
            return None
        transposed = target in _TRANSPOSED
        return Factor(node, args[0], found[0], transposed, arguments(node).bias, kind=CONVOLUTIONS[target])
    return as_product(node)


def literal(node: fx.Node, state: Mapping[str, Tensor]) -> float | None:
    """Return the number behind a stored tensor of one element; None for anything else."""
    if node.op != "placeholder" or role(node).name not in state:
        return None
    value = state[role(node).name]
    return float(value) if value.numel() == 1 and value.dtype is not torch.bool else None
