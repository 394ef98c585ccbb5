"""What a delegate could take ahead of the body, at the price of a second partition."""

from __future__ import annotations

from torch.fx import Graph, Node

from lowering.flops import flops_of


def prologue_of(graph: Graph, supported: set[Node]) -> set[Node]:
    """Supported nodes before the first product that lead, through an unsupported node, to a product.

    Delegated, such a node (a float operation in the search for label positions, say) would be upstream of a node
    outside that is upstream of the body, so it could not share the body's partition: it would cut a piece off it.
    """
    products = {node for node in supported if flops_of(node)}
    after_product: set[Node] = set()
    for node in graph.nodes:
        if node in products or any(source in after_product for source in node.all_input_nodes):
            after_product.add(node)
    before_product: set[Node] = set()
    before_unsupported: set[Node] = set()
    for node in reversed(graph.nodes):
        users = node.users
        if any(user in before_product or user in products for user in users):
            before_product.add(node)
        blocks = (user in before_product and user not in supported and user.op == "call_function" for user in users)
        if any(user in before_unsupported for user in users) or any(blocks):
            before_unsupported.add(node)
    return {node for node in supported & before_unsupported if node.op == "call_function" and node not in after_product}
