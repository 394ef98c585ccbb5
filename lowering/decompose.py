"""Decompose single nodes of a program, and leave all others as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from lowering.editor import ProgramEditor
from mobizo_passes.graph.inline import trace


def decompose(program: ExportedProgram, nodes: Collection[Node], table: Mapping[Any, Any]) -> ExportedProgram:
    """The program with each of `nodes` replaced by its decomposition under `table`; every other node stays.

    BEFORE  loss = mse_loss(y: f32[4, 3], target: f32[4, 3])
    AFTER   d = sub(y, target);  s = pow(d, 2);  loss = mean(s)

    `ExportedProgram.run_decompositions` retraces the whole graph for the same result: seconds, where one node takes
    milliseconds. A node must be functional: none of its inputs is written.
    """
    editor = ProgramEditor(program)
    chosen = {node.name for node in nodes}
    for node in [each for each in editor.graph.nodes if each.name in chosen]:
        _replace(editor, node, table)
    return editor.finish()


def _replace(editor: ProgramEditor, node: Node, table: Mapping[Any, Any]) -> None:
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    operands = [each for each in flat if isinstance(each, Node)]
    target: Any = node.target

    def call(*given: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(given, spec)
        return target(*args, **kwargs)

    with torch.no_grad():
        traced = trace(call, flat, table, mode="fake")
    new: dict[Node, Any] = {}
    given = iter(operands)
    with editor.before(node):
        for each in traced.graph.nodes:
            if each.op == "placeholder":
                new[each] = next(given)
            elif each.op == "get_attr":
                value = getattr(traced, each.target)
                new[each] = editor.constant(value, "decomposed")
            elif each.op == "call_function":
                args, kwargs = pytree.tree_map_only(Node, new.__getitem__, (each.args, each.kwargs))
                new[each] = editor.call(each.target, *args, **kwargs)
    result: Any = traced.graph.output_node().args[0]
    if isinstance(result, Node):
        editor.replace(node, new[result])
        return
    for user in list(node.users):
        # A node with several outputs is read by `getitem` alone.
        editor.replace(user, new[result[user.args[1]]])
    editor.graph.erase_node(node)
