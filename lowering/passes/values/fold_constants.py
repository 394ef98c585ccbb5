"""Compute at lowering time what depends on no input."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from lowering.editor import ProgramEditor
from lowering.executorch_compat.tags import tag_like
from mobizo_passes.graph.nodes import val
from mobizo_passes.graph.operators import is_functional

_RANDOM = torch.Tag.nondeterministic_seeded


@dataclass(frozen=True)
class FoldConstants:
    """Position ids, rotary tables, causal masks, label-word rows: computed once, here, instead of at every call.

    BEFORE  a = arange(T); f = mul(reshape(a, [1,T,1]), inv_freq); c = cos(cat([f, f], -1)); use(c: f32[1,T,d])
    AFTER   use(constant: f32[1,T,d])

    Only the last value of a constant chain becomes a constant. A value larger than `max_bytes` (and than what it is
    computed from) stays a computation: the noise generator's counters are cheaper to count than to store.
    """

    max_bytes: int = 1 << 20
    name: str = "fold-constants"

    def __call__(self, editor: ProgramEditor) -> int:
        foldable = self._foldable(editor)
        cache: dict[Node, Any] = {}
        rewrites = 0
        for node in list(editor.graph.nodes):
            if node not in foldable or all(user in foldable for user in node.users):
                continue
            value = _evaluate(editor, node, cache).contiguous()
            constant = editor.constant(value, "folded", ("folded", *_content_key(value)))
            for key, kept in node.meta.items():
                if key != "val":
                    constant.meta.setdefault(key, kept)
            tag_like(constant, _sources(editor, node))
            node.replace_all_uses_with(constant)
            rewrites += 1
        return rewrites

    def _foldable(self, editor: ProgramEditor) -> set[Node]:
        foldable: set[Node] = set()
        size_of_sources: dict[Node, int] = {}
        for node in editor.graph.nodes:
            if node.op != "call_function" or not _is_pure(node):
                continue
            sources = node.all_input_nodes
            if not all(s in foldable or editor.is_constant(s) for s in sources):
                continue
            available = sum(size_of_sources.get(s, _bytes(s)) for s in sources)
            if _bytes(node) > max(self.max_bytes, available):
                continue
            size_of_sources[node] = available
            foldable.add(node)
        return foldable


def _content_key(value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for equal tensors: each layer computes the same rotary table, one copy of it is enough."""
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (value.dtype, tuple(value.shape), hashlib.sha256(raw).hexdigest())


def _is_pure(node: Node) -> bool:
    if not is_functional(node.target) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    target: Any = node.target
    return _RANDOM not in target.tags


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return val(node).numel() * val(node).element_size() if isinstance(value, torch.Tensor) else 0


def _sources(editor: ProgramEditor, node: Node) -> set[Node]:
    """The constants that a foldable node is computed from."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting.extend(each.all_input_nodes)
    return {each for each in seen if editor.is_constant(each)}


def _evaluate(editor: ProgramEditor, node: Node, cache: dict[Node, Any]) -> Any:
    if node in cache:
        return cache[node]
    if editor.is_constant(node):
        return editor.constant_value(node)
    args, kwargs = pytree.tree_map_only(Node, lambda n: _evaluate(editor, n, cache), (node.args, node.kwargs))
    target: Any = node.target
    with torch.no_grad():
        cache[node] = target(*args, **kwargs)
    return cache[node]
