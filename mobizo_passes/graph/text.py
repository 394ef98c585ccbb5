"""Graphs as stable, readable text: one line per node, with shapes, origin module and creating pass.

`mobizo_passes.graph.parse` reads it back.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_passes.graph.facts import facts, module_of, role, source_of
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.overloads import resolve

DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
# Stands above nodes that no line of the model is known of, below others.
NO_SOURCE = "# no line of the model"
# torch writes an open-ended slice as the largest int64.
END = 2**63 - 1

# Comments start here or, behind a longer line, just after it: aligning them to the longest line would let one
# changed line move all others in a diff.
_COMMENT = 88


def type_text(value: Any) -> str:
    """Return ``f32[4, 32]`` for a tensor, a tuple of such for several."""
    if isinstance(value, Tensor):
        return f"{DTYPES.get(value.dtype, str(value.dtype))}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_text(v) for v in value)})"
    return type(value).__name__


def op_name(node: fx.Node) -> str:
    """Return ``aten.linear`` or ``mobizo.expand``: namespace and name, without the overload."""
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "_schema", None)
    return name.name.replace("::", ".") if name is not None else str(node.target)


def _operator(node: fx.Node, kwargs: Mapping[str, Any]) -> str:
    """The operator's name, with its overload if the arguments alone would mean another."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or resolve(target.overloadpacket, node.args, kwargs) is target:
        return op_name(node)
    return f"{op_name(node)}.{target._overloadname}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if isinstance(value, torch.dtype):
        return DTYPES.get(value, str(value))
    return "end" if value == END else repr(value)


def _facts(node: fx.Node) -> str:
    """What passes have noted about a node: computed per group, where it holds the batch, whose noise it is."""
    noted = facts(node)
    found = ["expanded"] if noted.expanded else []
    if noted.batched:
        place = noted.layout
        outer = f" outer {place.outer}" if place is not None and place.outer != 1 else ""
        found.append("batch lost" if place is None else f"batch {place.dim}{outer}")
    return ", ".join([*found, *([f"noise of {noted.noise_of}"] if noted.noise_of else [])])


def _commented(text: str, node: fx.Node, with_facts: bool) -> str:
    made_by = facts(node).made_by
    places = [module_of(node), "" if made_by == "capture" else made_by, _facts(node) if with_facts else ""]
    while places and not places[-1]:
        places.pop()
    shown = " | ".join(places).strip().replace("|  |", "| |")
    return f"{text:<{_COMMENT}}  # {shown}" if places else text


def _role(spec: Any) -> str:
    # What is named after its role needs no second name.
    return spec.kind if spec.name == spec.kind else f"{spec.kind} {spec.name!r}"


def node_text(node: fx.Node, with_facts: bool = False) -> str:
    """Return the line of an input or a call: name, type, operator and arguments, origin module and creating pass."""
    if node.op == "placeholder":
        text = f"%{node.name}: {type_text(node.meta['val'])} = {_role(role(node))}"
        return _commented(text, node, with_facts) if with_facts else text
    # The device is the machine of the export, not a property of the program.
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
    args = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in kwargs.items()]
    text = f"%{node.name}: {type_text(node.meta.get('val'))} = {_operator(node, kwargs)}({', '.join(args)})"
    return _commented(text, node, with_facts)


def to_text(ir: Ir, facts: bool = False, sources: bool = False) -> str:
    """Return the graph as text: inputs, calls, outputs, one a line. The same program gives the same text everywhere.

    A comment says where a node comes from: ``# module | pass``. With `facts`, it also says what passes have noted about
    the node, ``| expanded, batch 0``, and which pass made an input. With `sources`, the line of the user's model stands
    above the nodes that come from it: ``# model.py:12 in forward: x = self.fc(x)``.
    """
    nodes: Any = ir.graph.output_node().args[0]
    outputs = [
        f"return %{node.name}: {type_text(node.meta.get('val'))} = {_role(spec)}"
        for spec, node in zip(ir.outputs, nodes, strict=True)
    ]
    parts = ([node_text(n, facts) for n in ir.placeholders()], [*_calls(ir, facts, sources)], outputs)
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _calls(ir: Ir, with_facts: bool, sources: bool) -> Iterator[str]:
    above = ""
    for node in ir.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        source = source_of(node) if sources else ""
        if source != above:
            yield f"# {source}" if source else NO_SOURCE
        above = source
        yield node_text(node, with_facts)
