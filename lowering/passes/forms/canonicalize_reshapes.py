"""One form for everything that only renames the axes' extents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, positive_dim, shape_of

aten = torch.ops.aten

_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.view_copy.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


@dataclass(frozen=True)
class CanonicalizeReshapes:
    """Views, unsqueezes, squeezes and flattens become `reshape`; `select` becomes `slice` + `reshape`.

    BEFORE  u = unsqueeze(x: f32[B,T,d], 1); v = view(u, [B, T, -1])
    AFTER   v = reshape(x, [B, T, d])

    BEFORE  h = select(x: f32[B,T,d], 1, -1)
    AFTER   h = reshape(slice(x, 1, T-1, T), [B, d])

    XNNPACK takes reshapes of any kind, but unsqueeze on the last axis only and no select. Chains of reshapes
    collapse. `reshape` (unlike `view`) asks nothing of strides, so later passes may change the producer.
    """

    name: str = "canonicalize-reshapes"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(*_RESHAPES, aten.select.int, aten.reshape.default):
            if node.target is aten.select.int:
                _rewrite_select(editor, node)
            elif node.target is aten.reshape.default:
                source = _source(node)
                if source is node.args[0] and list(node.args[1]) == list(shape_of(node)):  # pyright: ignore[reportArgumentType]
                    continue
                _rewrite(editor, node)
            else:
                _rewrite(editor, node)
            rewrites += 1
        return rewrites


def _source(node: Node) -> Node:
    source = node.args[0]
    while (
        isinstance(source, Node)
        and source.op == "call_function"
        and source.target in (*_RESHAPES, aten.reshape.default)
    ):
        source = source.args[0]
    assert isinstance(source, Node)
    return source


def _rewrite(editor: ProgramEditor, node: Node) -> None:
    with editor.before(node):
        editor.replace(node, editor.reshape(_source(node), list(shape_of(node))))


def _rewrite_select(editor: ProgramEditor, node: Node) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    shape = shape_of(source)
    dim = positive_dim(arguments(node).dim, len(shape))
    index = arguments(node).index
    start = index + shape[dim] if index < 0 else index
    with editor.before(node):
        piece = editor.call(aten.slice.Tensor, source, dim, start, start + 1)
        editor.replace(node, editor.reshape(piece, list(shape_of(node))))
