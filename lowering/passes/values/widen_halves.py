"""Half-precision models in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from lowering.editor import ProgramEditor
from lowering.passes.base import run_passes
from mobizo_passes.graph.nodes import val

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)

# One float32 copy of each weight for all methods: that is how the file holds it once.
_copies: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class WidenHalves:
    """Weights stored in float16 or bfloat16 become float32, and so does what is computed from them.

    BEFORE  y: f16[B,T,o] = linear(_to_copy(x: f32[B,T,d], dtype=f16), w: f16[o,d]);  z = _to_copy(y, dtype=f32)
    AFTER   y: f32[B,T,o] = linear(_to_copy(x, dtype=f32), w: f32[o,d]);              z = _to_copy(y, dtype=f32)

    Delegates take float32 beside their own precisions; XNNPACK's half-precision kernels overflow where PyTorch's, which
    accumulate in float32, do not. Inputs and outputs keep their dtypes: a copy stands behind or before each.
    """

    name: str = "widen-halves"

    def __call__(self, editor: ProgramEditor) -> int:
        halves = [node for node in editor.graph.nodes if _is_half(node)]
        if not halves or all(node.op != "call_function" and not _to_widen(editor, node) for node in halves):
            return 0
        output = next(node for node in reversed(editor.graph.nodes) if node.op == "output")
        returned = [val(node).dtype if isinstance(node, Node) else None for node in output.args[0]]
        first = next(node for node in editor.graph.nodes if node.op != "placeholder")
        count = 0
        for node in halves:
            if _to_widen(editor, node):
                editor.store(node, _widened(editor.constant_value(node)))
            elif node.op == "placeholder":
                with editor.before(first):
                    wide = editor.call(aten._to_copy.default, node, dtype=torch.float32)
                node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
            count += 1
        for node in editor.graph.nodes:
            if node.op == "call_function":
                args, kwargs = pytree.tree_map_only(torch.dtype, _wide_dtype, (node.args, node.kwargs))
                node.args, node.kwargs = args, kwargs
                editor.revalue(node)
        results: list[Any] = list(output.args[0])
        for index, (node, dtype) in enumerate(zip(results, returned, strict=True)):
            if isinstance(node, Node) and dtype in HALVES:
                with editor.before(output):
                    results[index] = editor.call(aten._to_copy.default, node, dtype=dtype)
        output.args = (tuple(results),)
        return count


def halves_in(program: ExportedProgram) -> tuple[str, ...]:
    """The half-precision dtypes among the weights of a program and what it computes, as torch writes them."""
    found = {val(node).dtype for node in program.graph.nodes if _is_half(node)}
    return tuple(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def widened(program: ExportedProgram) -> ExportedProgram:
    """The program without halves inside; itself if it has none."""
    return run_passes(program, (WidenHalves(),))[0] if halves_in(program) else program


def _is_half(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in HALVES


def _to_widen(editor: ProgramEditor, node: Node) -> bool:
    return node.op == "placeholder" and editor.is_constant(node)


def _widened(value: Tensor) -> Tensor:
    if value not in _copies:
        _copies[value] = value.detach().float()
    return _copies[value]


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype
