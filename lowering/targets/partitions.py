"""What the partitioners share: where a node stands among the matrix products, and which partitions are worth a call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.passes.infra.partitioner import Partition

from lowering.report import Refusal
from mobizo_passes.graph.flops import node_flops

#: A partition costs a second of lowering and two tensor copies per call; below this it is not worth them.
MIN_FLOPS = 100_000

TIED = Refusal(
    "tied-table", "its weight is also an embedding table, which ExecuTorch's own kernels read: one copy serves both"
)


def would_split(delegate: str) -> Refusal:
    """That of a node of `splitting_nodes`."""
    why = f"{delegate} could take it, but it feeds a node outside that feeds the body: it would split the partition"
    return Refusal("one-partition", why)


def alone(delegate: str) -> Refusal:
    """That of a node in a partition that is not `worthwhile`."""
    why = f"{delegate} could take it, but only as a partition of its own without a matrix product: not worth one"
    return Refusal("matrix-product", why)


def worthwhile(partitions: Iterable[Partition], min_flops: int = MIN_FLOPS) -> tuple[list[Partition], list[Partition]]:
    """Partitions with matrix products or convolutions of at least `min_flops`, or the largest one; and the others."""
    weighed = [(sum(node_flops(node) for node in each.nodes), each) for each in partitions]
    # In a model so small that nothing reaches the limit, its largest partition is its body.
    limit = min(min_flops, max((flops for flops, _ in weighed), default=0) or min_flops)
    kept = [each for flops, each in weighed if flops >= limit]
    return kept, [each for flops, each in weighed if flops < limit]


def downstream(nodes: Iterable[Node], sources: Collection[Node]) -> set[Node]:
    """Those of `nodes`, which are in order, that one of `sources` leads to; of the sources only such too."""
    found: set[Node] = set()
    for node in nodes:
        if any(each in sources or each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def upstream(nodes: Sequence[Node], sinks: Collection[Node]) -> set[Node]:
    """Those of `nodes`, which are in order, that lead to one of `sinks`; of the sinks only such too."""
    found: set[Node] = set()
    for node in reversed(nodes):
        if any(user in sinks or user in found for user in node.users):
            found.add(node)
    return found


def made_of_alone(nodes: Sequence[Node], source: Node, others: Collection[Node]) -> set[Node]:
    """Those of `nodes`, which are in order, that `source` leads to, and none of `others`."""
    return downstream(nodes, {source}) - downstream(nodes, others)


def splitting_nodes(graph: Graph, supported: set[Node]) -> set[Node]:
    """Supported nodes before the first product that lead, through an unsupported node, to a product.

    Delegated, such a node (a float operation in the search for label positions, say) would be upstream of a node
    outside that is upstream of the body, so it could not share the body's partition: it would cut a piece off it.
    """
    nodes = list(graph.nodes)
    products = {node for node in supported if node_flops(node)}
    before = upstream(nodes, products)
    blocks = {node for node in before if node not in supported and node.op == "call_function"}
    after = products | downstream(nodes, products)
    return {node for node in supported & upstream(nodes, blocks) if node.op == "call_function" and node not in after}


def trailing_nodes(graph: Graph, supported: set[Node]) -> set[Node]:
    """Supported nodes that follow, through an unsupported node, a product, and that no product follows.

    Delegated in the partition of a later product, such a node (the division at the end of a mean loss, beside a
    gradient) would be downstream of a node outside that is downstream of the body: it would cut the body in two.
    """
    nodes = list(graph.nodes)
    products = {node for node in supported if node_flops(node)}
    after = downstream(nodes, products)
    outside = {node for node in after if node not in supported}
    return (supported & downstream(nodes, outside)) - products - upstream(nodes, products)


def one_body(graph: Graph, supported: Collection[Node]) -> list[Node] | None:
    """The supported nodes that products hang together by, with their constants, if they can be one partition.

    None if they fall apart, or if a node outside leads from one of them to another: then which partitions there are has
    to be found by trying, in a time that grows with the square of the nodes.
    """
    nodes = list(graph.nodes)
    calls = {node for node in supported if node.op == "call_function"}
    waiting = [node for node in nodes if node in calls and node_flops(node)][:1]
    body: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in calls and node not in body:
            body.add(node)
            waiting += [*node.all_input_nodes, *node.users]
    if not body or any(node_flops(node) for node in calls - body):
        return None
    beyond: set[Node] = set()
    for node in nodes:
        if node.op != "call_function":
            continue
        if any(each in beyond or (each in body and node not in body) for each in node.all_input_nodes):
            if node in body:
                return None
            beyond.add(node)
    held = {node for node in supported if node.op != "call_function" and body.issuperset(node.users)}
    return [node for node in nodes if node in body or node in held]


def tensors_of(node: Node) -> list[torch.Tensor]:
    """What a node gives: one tensor, several, or none."""
    value: Any = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def wrong_dtype(node: Node, allowed: Collection[torch.dtype]) -> str | None:
    """The name of the first dtype that a node gives or reads and that is not `allowed`; None if all are."""
    for each in (node, *node.all_input_nodes):
        for value in tensors_of(each):
            if value.dtype not in allowed:
                return str(value.dtype).removeprefix("torch.")
    return None
