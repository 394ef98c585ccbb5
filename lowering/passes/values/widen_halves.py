"""Half-precision models in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from lowering.executorch_compat.programs import rewritten
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import val
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)

# One float32 copy of each weight for all methods: that is how the file holds it once.
_copies: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class WidenHalves(Pass):
    """Weights stored in float16 or bfloat16 become float32, and so does what is computed from them.

    BEFORE  y: f16[B,T,o] = linear(_to_copy(x: f32[B,T,d], dtype=f16), w: f16[o,d]);  z = _to_copy(y, dtype=f32)
    AFTER   y: f32[B,T,o] = linear(_to_copy(x, dtype=f32), w: f32[o,d]);              z = _to_copy(y, dtype=f32)

    Delegates take float32 beside their own precisions; XNNPACK's half-precision kernels overflow where PyTorch's, which
    accumulate in float32, do not. Inputs and outputs keep their dtypes: a copy stands behind or before each.
    """

    name: ClassVar[str] = "widen-halves"

    def rewrite(self, ir: Ir) -> int:
        halves = [node for node in ir.graph.nodes if _is_half(node)]
        if not halves or all(node.op != "call_function" and not _to_widen(ir, node) for node in halves):
            return 0
        output = next(node for node in reversed(ir.graph.nodes) if node.op == "output")
        returned = [val(node).dtype if isinstance(node, Node) else None for node in output.args[0]]
        first = next(node for node in ir.graph.nodes if node.op != "placeholder")
        count = 0
        for node in halves:
            if _to_widen(ir, node):
                ir.store(node, _widened(ir.constant_value(node)))
            elif node.op == "placeholder":
                with ir.before(first):
                    wide = ir.call(aten._to_copy.default, node, dtype=torch.float32)
                node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
            count += 1
        for node in ir.graph.nodes:
            if node.op == "call_function":
                args, kwargs = pytree.tree_map_only(torch.dtype, _wide_dtype, (node.args, node.kwargs))
                node.args, node.kwargs = args, kwargs
                ir.refresh(node)
        results: list[Any] = list(output.args[0])
        for index, (node, dtype) in enumerate(zip(results, returned, strict=True)):
            if isinstance(node, Node) and dtype in HALVES:
                with ir.before(output):
                    results[index] = ir.call(aten._to_copy.default, node, dtype=dtype)
        output.args = (tuple(results),)
        return count


def halves_in(program: ExportedProgram) -> tuple[str, ...]:
    """The half-precision dtypes among the weights of a program and what it computes, as torch writes them."""
    found = {val(node).dtype for node in program.graph.nodes if _is_half(node)}
    return tuple(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def widened(program: ExportedProgram) -> ExportedProgram:
    """The program without halves inside; itself if it has none."""
    return rewritten(program, (WidenHalves(),))[0] if halves_in(program) else program


def all_widened(programs: Mapping[str, ExportedProgram]) -> tuple[dict[str, ExportedProgram], tuple[str, ...]]:
    """Every method without halves inside, and the dtypes of those that were there."""
    halves = {each for program in programs.values() for each in halves_in(program)}
    return {name: widened(program) for name, program in programs.items()}, tuple(sorted(halves))


def _is_half(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in HALVES


def _to_widen(ir: Ir, node: Node) -> bool:
    return node.op == "placeholder" and ir.is_constant(node)


def _widened(value: Tensor) -> Tensor:
    if value not in _copies:
        _copies[value] = value.detach().float()
    return _copies[value]


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype
