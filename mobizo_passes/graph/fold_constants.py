"""Compute at compile time what depends on no input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.operators import is_functional
from mobizo_passes.graph.passes import Pass, Violation

_RANDOM = torch.Tag.nondeterministic_seeded


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate nodes that read only constants and buffers: position ids, rotary tables, causal masks.

    BEFORE  %r: i64[32] = aten.arange(32);  %m: b8[32, 32] = aten.le(%r, %c)
    AFTER   %m: b8[32, 32]  (constant input)

    Only the last value of a constant chain becomes a constant, and equal ones are one. A value larger than `max_bytes`,
    and than what it is computed from, stays a computation. Only what is of one of the `kinds` is folded: parameters are
    not, which would copy weights.
    """

    name: ClassVar[str] = "fold-constants"

    max_bytes: int = 1 << 26
    kinds: tuple[str, ...] = ("buffer", "constant")

    def rewrite(self, ir: Ir) -> int:
        sources = self._foldable(ir)
        values: dict[fx.Node, Any] = {}
        count = 0
        for node in _ends(sources):
            value = _evaluate(ir, node, values).contiguous()
            # A dimension of one may have kept the stride 0 of an `expand`, for which ExecuTorch has no room.
            value = value.clone(memory_format=torch.contiguous_format) if 0 in value.stride() else value
            # Each layer computes the same rotary table: one copy of it is enough.
            constant = ir.add_constant(node.name, value, ("folded", *_content(value)))
            self.folded(constant, sources[node])
            node.replace_all_uses_with(constant)
            count += 1
        return count

    def folded(self, constant: fx.Node, sources: Iterable[fx.Node]) -> None:
        """Called for every constant made, with the placeholders that it was computed from."""

    def unmet(self, ir: Ir) -> Iterator[Violation]:
        """A node whose arguments are all constants."""
        return ((node, "only constants among its arguments") for node in _ends(self._foldable(ir)))

    def _foldable(self, ir: Ir) -> dict[fx.Node, set[fx.Node]]:
        """Nodes that can be folded, with the placeholders that they are computed from."""
        sources: dict[fx.Node, set[fx.Node]] = {node: {node} for node in ir.placeholders(*self.kinds)}
        found: dict[fx.Node, set[fx.Node]] = {}
        for node in ir.graph.nodes:
            if not _is_pure(node) or any(each not in sources for each in node.all_input_nodes):
                continue
            given = set[fx.Node]().union(*(sources[each] for each in node.all_input_nodes))
            if node.meta["val"].nbytes <= max(self.max_bytes, sum(each.meta["val"].nbytes for each in given)):
                sources[node] = found[node] = given
        return found


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or not is_functional(node.target) or not isinstance(node.meta.get("val"), Tensor):
        return False
    target: Any = node.target
    return _RANDOM not in target.tags


def _ends(foldable: dict[fx.Node, set[fx.Node]]) -> list[fx.Node]:
    """The last nodes of constant chains; those before them die with them."""
    return [node for node in foldable if any(user not in foldable for user in node.users)]


def _evaluate(ir: Ir, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if ir.is_constant(node):
        return ir.constant_value(node)
    if node not in values:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: _evaluate(ir, each, values))
        target: Any = node.target
        with torch.no_grad():
            values[node] = target(*args, **kwargs)
    return values[node]


def _content(value: Tensor) -> tuple[Any, ...]:
    raw = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value.dtype, tuple(value.shape), hashlib.sha256(raw).hexdigest()
