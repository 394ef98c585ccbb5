"""Quantize what a delegate computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from mobizo_passes.graph.facts import come_from
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass

# Nodes of the method -> what they compute, run by run.
Observe = Callable[[Sequence[Node]], Iterable[list[Tensor]]]


@dataclass(frozen=True)
class QuantizeBody(Pass):
    """Values between the first product and the last are rounded to integers and back, weights stored as integers.

    BEFORE  y: f32[N, out] = linear(x, w: f32[out, in])
    AFTER   y = linear(dequantize(quantize(x, s, z)), dequantize(w: i8[out, in], s: f32[out]));  dequantize(quantize(y))

    `body` tells the nodes, `observe` runs the method on calibration batches, `quantizer` is one of the delegate's for
    torchao's PT2E, which inserts observers, and the integers after it. Only the body is given to it: noise, losses and
    the update stay as they are, bit for bit.
    """

    body: Callable[[list[Node]], list[Node]]
    observe: Observe
    quantizer: Callable[[], Any]
    name: ClassVar[str] = "quantize-body"

    def rewrite(self, ir: Ir) -> int:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        body = self.body([node for node in ir.graph.nodes if node.op == "call_function"])
        # A body that was quantized reads integers that are made floating-point again.
        if not body or any("quantize" in str(each.target) for node in body for each in node.all_input_nodes):
            return 0
        inputs, results, module = _extract(ir, body)
        observed = prepare_pt2e(module, self.quantizer())
        with torch.no_grad():
            for values in self.observe(inputs):
                observed(*values)
        quantized = convert_pt2e(observed)
        _inline(ir, quantized, inputs, results, {node.name: node for node in body})
        return len(body)


def _extract(ir: Ir, body: list[Node]) -> tuple[list[Node], list[Node], GraphModule]:
    """The body as a module of its own, with its constants in it: (inputs, nodes that others read, module)."""
    inside = set(body)
    outside = list(dict.fromkeys(a for node in body for a in node.all_input_nodes if a not in inside))
    inputs = [node for node in outside if not ir.is_constant(node)]
    graph, root = Graph(), torch.nn.Module()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in outside:
        if node not in copies:
            root.register_buffer(f"constant_{node.name}", ir.constant_value(node))
            copies[node] = graph.get_attr(f"constant_{node.name}")
    for node in body:
        copies[node] = graph.node_copy(node, lambda each: copies[each])
    for node in outside:
        copies[node].meta["val"] = node.meta["val"]
    results = [node for node in body if any(user not in inside for user in node.users)]
    graph.output(tuple(copies[node] for node in results))
    return inputs, results, GraphModule(root, graph)


def _inline(ir: Ir, module: GraphModule, inputs: list[Node], results: list[Node], origins: dict[str, Node]) -> None:
    """Put the quantized module where the body was; each new node comes from where the body's node came from."""
    copies: dict[Node, Node] = {}
    given, found = iter(inputs), ()
    last = max(results, key=list(ir.graph.nodes).index)
    with ir.before(last):
        for node in module.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "get_attr":
                copies[node] = ir.add_constant("quantized", _attribute(module, str(node.target)))
            elif node.op == "call_function":
                args = torch.fx.map_arg(node.args, lambda each: copies[each])
                kwargs = torch.fx.map_arg(node.kwargs, lambda each: copies[each])
                copies[node] = ir.call(node.target, *args, **kwargs)
                origin = origins.get(node.name) or next((origins.get(a.name) for a in node.all_input_nodes), None)
                if origin is not None:
                    come_from(copies[node], origin)
            else:
                found = node.args[0]  # of the output
    body = set(origins.values())
    _move_behind(last, ir, body)
    for old, new in zip(results, found, strict=True):
        old.replace_all_uses_with(copies[new], delete_user_cb=lambda user: user not in body)


def _move_behind(last: Node, ir: Ir, body: set[Node]) -> None:
    """What reads a result stands behind all results: they are computed at one place now."""
    behind: set[Node] = set()
    for node in list(ir.graph.nodes):
        if node not in body and any(each in body or each in behind for each in node.all_input_nodes):
            behind.add(node)
    place, seen = last, False
    for node in list(ir.graph.nodes):
        seen = seen or node is last
        if not seen and node in behind:
            place.append(node)
            place = node


def _attribute(module: GraphModule, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
