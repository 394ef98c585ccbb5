"""Graphs as stable, readable text: one line per node, with shapes, origin module and creating pass."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_passes.graph.facts import facts, module_of, role
from mobizo_passes.graph.ir import Ir

_DTYPES = {
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
}

# Comments start here or, behind a longer line, just after it: aligning them to the longest line would let one
# changed line move all others in a diff.
_COMMENT = 88


def type_text(value: Any) -> str:
    """Return ``f32[4, 32]`` for a tensor, a tuple of such for several."""
    if isinstance(value, Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_text(v) for v in value)})"
    return type(value).__name__


def op_name(node: fx.Node) -> str:
    """Return ``aten.linear`` or ``mobizo.expand``: namespace and name, without the overload."""
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "_schema", None)
    return name.name.replace("::", ".") if name is not None else str(node.target)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    # torch writes an open-ended slice as the largest int64.
    return "end" if value == 2**63 - 1 else repr(value)


def _call_text(node: fx.Node) -> str:
    # The device is the machine of the export, not a property of the program.
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
    args = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in kwargs.items()]
    text = f"%{node.name}: {type_text(node.meta.get('val'))} = {op_name(node)}({', '.join(args)})"
    places = [p for p in (module_of(node), facts(node).made_by) if p and p != "capture"]
    return f"{text:<{_COMMENT}}  # {' | '.join(places)}" if places else text


def node_text(node: fx.Node) -> str:
    """Return the line of an input or a call: name, type, operator and arguments, origin module and creating pass."""
    if node.op != "placeholder":
        return _call_text(node)
    spec = role(node)
    # Inputs that are named after their role need no second name.
    name = "" if spec.name == spec.kind else f" '{spec.name}'"
    return f"%{node.name}: {type_text(node.meta['val'])} = {spec.kind}{name}"


def to_text(ir: Ir) -> str:
    """Return the graph as text: inputs, calls, outputs, one a line. The same program gives the same text everywhere."""
    calls = [node_text(n) for n in ir.graph.nodes if n.op not in ("placeholder", "output")]
    nodes: Any = ir.graph.output_node().args[0]
    outputs = []
    for spec, node in zip(ir.outputs, nodes, strict=True):
        name = "" if spec.name == spec.kind else f" '{spec.name}'"
        outputs.append(f"return %{node.name}: {type_text(node.meta.get('val'))} = {spec.kind}{name}")
    parts = ([node_text(n) for n in ir.placeholders()], calls, outputs)
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"
