"""Values of all nodes of a graph, and which of two is the first that differs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mobizo_passes.autograd import LOSS_TOLERANCE
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir

# Relative errors above which a value differs. What is wrong seldom shows as little as rounding does, so the first node
# above the largest bound that any node is above is the one.
_BOUNDS = (1e-2, 1e-3, 1e-4, LOSS_TOLERANCE)


def node_values(ir: Ir, inputs: Mapping[str, Tensor]) -> tuple[dict[fx.Node, Any], fx.Node | None]:
    """Values of all nodes, in order, up to the one that does not run, which comes second, if there is one."""
    given = [inputs.get(role(node).name, ir.state.get(role(node).name)) for node in ir.placeholders()]
    interpreter = fx.Interpreter(nn.Module(), garbage_collect_values=False, graph=ir.graph)
    # What failed has been told already, with the text of PyTorch.
    with contextlib.suppress(RuntimeError, IndexError, ValueError):
        interpreter.run(*given)
    nodes = [node for node in ir.graph.nodes if node.op != "output"]
    failed = next((node for node in nodes if node not in interpreter.env), None)
    return {node: interpreter.env[node] for node in nodes if node in interpreter.env}, failed


def first_that_differs(pairs: Iterable[tuple[fx.Node, Any, Any]]) -> tuple[fx.Node, float] | None:
    """The first node whose value differs, given found and expected values in the order of the graph."""
    errors = [
        (node, relative_error(found, expected))
        for node, found, expected in pairs
        if isinstance(found, Tensor) and isinstance(expected, Tensor) and found.numel() == expected.numel()
    ]
    for bound in _BOUNDS:
        for node, error in errors:
            if error > bound:
                return node, error
    return None


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest entry; infinite where one side alone is finite."""
    found, expected = found.reshape(expected.shape).double(), expected.double()
    if not expected.numel() or torch.equal(found, expected):
        return 0.0
    known = found.isfinite() & expected.isfinite()
    if not torch.equal(found[~known].nan_to_num(), expected[~known].nan_to_num()):
        return math.inf
    if not known.any():
        return 0.0
    largest = max(floor, float(expected[known].abs().max()))
    difference = float((found - expected)[known].abs().max())
    return difference / largest if largest else math.inf if difference else 0.0
