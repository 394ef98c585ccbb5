"""Where every value holds the batch."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, fx

from ..errors import UnsupportedOp
from ..ir import Ir
from .lifter import Layout, Lifter


def track_batch(ir: Ir, batch_dim: int) -> None:
    """Note in ``meta["batch"]`` of every node that holds the batch where it holds it, as a `Layout`.

    The lifting rules are run on a copy with two groups in the batch inputs, so that a transposition, a fold into
    ``[B * T, D]`` or a flattening is followed as it will be followed later. None means that an operator mixes
    examples, or has no rule, so that the batch was lost there: allowed as long as nothing perturbed comes by.
    """
    copy = ir.clone()
    twins = dict(zip(copy.graph.nodes, ir.graph.nodes, strict=True))
    lift = _Tracker(copy, groups=2)
    inputs = copy.placeholders("batch")
    sizes = [s for n in inputs if (s := _extent(n, batch_dim)) is not None]
    size = Counter(sizes).most_common(1)[0][0] if sizes else None
    seeds: dict[fx.Node, Layout] = {}
    for node in inputs:
        if size is None or _extent(node, batch_dim) != size:
            continue
        value = node.meta["val"]
        shape = list(value.shape)
        dim = min(batch_dim, len(shape) - 1)
        shape[dim] *= lift.groups
        lift.plain[node] = value
        with copy.fake:
            node.meta["val"] = value.new_empty(shape)
        seeds[node] = Layout(dim)
    lift.run(seeds)
    for node in copy.graph.nodes:
        twin = twins.get(node)
        if twin is None:
            continue
        if node in lift.lost:
            twin.meta["batch"] = None
        elif node in lift.layouts:
            twin.meta["batch"] = lift.layout(node)


def _extent(node: fx.Node, batch_dim: int) -> int | None:
    """The size of an input's batch dimension; None for a scalar."""
    value: Tensor = node.meta["val"]
    return value.shape[min(batch_dim, value.dim() - 1)] if value.dim() else None


class _Tracker(Lifter):
    """A lifter that goes on where a rule refuses."""

    def __init__(self, ir: Ir, groups: int) -> None:
        super().__init__(ir, groups)
        self.lost: set[fx.Node] = set()

    def lift_node(self, node: fx.Node) -> int:
        """As `Lifter.lift_node`; a refused node, and what reads it, is lost."""
        before = node.target, node.args, node.kwargs, node.meta["val"]
        try:
            if not any(arg in self.lost for arg in node.all_input_nodes):
                return super().lift_node(node)
        except UnsupportedOp:
            node.target, node.args, node.kwargs, node.meta["val"] = before
            self.layouts.pop(node, None)
        self.lost.add(node)
        return 0
