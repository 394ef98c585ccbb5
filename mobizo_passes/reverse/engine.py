"""Reverse mode on a graph: the gradient of its loss, written as further nodes of the same graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import mobizo_passes.reverse.rules as _rules  # noqa: F401  (fills the table)
from mobizo_passes.errors import UnsupportedOp, describe
from mobizo_passes.graph.ir import Ir
from mobizo_passes.reverse.table import ELEMENTWISE, RULES, WHOLE, Call, NoRule, Piece
from mobizo_passes.reverse.values import Tape, Value

aten = torch.ops.aten


def active_nodes(loss: fx.Node, wrt: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes on a path from `wrt` to the loss whose values are real numbers: those that have a cotangent.

    Raises `UnsupportedOp` where such a path passes through complex numbers.
    """
    needed, stack = {loss}, [loss]
    while stack:
        for each in stack.pop().all_input_nodes:
            # What passes through an integer (a selection's) has no derivative.
            if each not in needed and _is_continuous(each):
                needed.add(each)
                stack.append(each)
    active = needed.intersection(wrt)
    for node in loss.graph.nodes:
        reached = node.op == "call_function" and any(each in active for each in node.all_input_nodes)
        if reached and node in needed and _is_continuous(node):
            active.add(node)
            if any(each.is_complex() for each in _tensors(node)):
                raise refusal("the loss depends on the adapter through complex numbers", node)
    return active


def gradients(ir: Ir, loss: fx.Node, wrt: Sequence[fx.Node]) -> list[fx.Node]:
    """Append the gradient of `loss`, [], in each of `wrt` at the insertion point; a zero where there is no path.

    `wrt` are inputs, or values on the way to the loss, of one tensor each.

    Nothing is written for values that no path from `wrt` to the loss passes. Raises `UnsupportedOp` for an operator on
    such a path that has no rule.
    """
    return _Reverse(ir, active_nodes(loss, wrt)).run(loss, wrt)


@dataclass
class _Reverse:
    ir: Ir
    active: set[fx.Node]
    parts: dict[fx.Node, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tape = Tape(self.ir)

    def run(self, loss: fx.Node, wrt: Sequence[fx.Node]) -> list[fx.Node]:
        self.parts[loss] = [1.0]
        totals: dict[fx.Node, Any] = {}
        order = [node for node in self.ir.graph.nodes if node in self.active]
        for node in reversed(order):
            if node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
                continue
            self.tape.like = node
            g = totals[node] = self._total(node)
            if g is not None:
                self._pull_back(node, g)
        self.tape.like = None
        return [self._gradient(node, totals[node] if node in totals else self._total(node)).node for node in wrt]

    def _gradient(self, node: fx.Node, g: Any) -> Value:
        value: Tensor = node.meta["val"]
        return self._whole(0.0 if g is None else g, tuple(value.shape), value.dtype)

    def _pull_back(self, node: fx.Node, g: Any) -> None:
        """Hand the cotangent of a node to its arguments."""
        source: Any = node.args[0] if node.target is operator.getitem else node
        place: Any = 0 if source is node else node.args[1]
        call = Call(self.tape, source, node, place)
        row = RULES.get(call.node.target)
        if row is None:
            raise refusal("the loss depends on the adapter through an operator without a derivative", call.node)
        shape = tuple(node.meta["val"].shape)
        if row.kind == WHOLE:
            g = self._whole(g, shape, node.meta["val"].dtype)
        for name, arg in call.arguments.items():
            several = arg if isinstance(arg, list | tuple) else [arg]
            if not any(isinstance(each, fx.Node) and each in self.active for each in several):
                continue
            if name not in row.rules:
                raise refusal(f"no derivative in the argument '{name}' of an operator", call.node)
            try:
                given = row.rules[name](call, g)
            except NoRule as reason:
                raise refusal(f"no derivative {reason}", call.node) from None
            for each, part in zip(several, given if isinstance(arg, list | tuple) else [given], strict=True):
                if part is not None and isinstance(each, fx.Node) and each in self.active:
                    stands_for = shape if row.kind == ELEMENTWISE else tuple(each.meta["val"].shape)
                    self.parts.setdefault(each, []).append(self._fit(part, stands_for, each))

    def _fit(self, part: Any, stands_for: tuple[int, ...], arg: fx.Node) -> Any:
        """Sum what stands for a broadcast shape down to the argument's own; it may stay smaller than that."""
        shape, dtype = tuple(arg.meta["val"].shape), arg.meta["val"].dtype
        if isinstance(part, Piece):
            return Piece(part.dim, part.start, part.value.to(dtype))
        wanted = (*[1] * (len(stands_for) - len(shape)), *shape)
        if not isinstance(part, Value):
            return part * (math.prod(stands_for) // max(1, math.prod(shape)))
        part = part.reshape([*[1] * (len(stands_for) - len(part.shape)), *part.shape])
        sizes = list(zip(part.shape, stands_for, wanted, strict=True))
        copies = math.prod(full for size, full, want in sizes if want == 1 and size == 1)
        part = part.sum([i for i, (size, _, want) in enumerate(sizes) if want == 1 and size > 1], keepdim=True)
        return (part * copies).reshape(part.shape[len(stands_for) - len(shape) :]).to(dtype)

    def _total(self, node: fx.Node) -> Any:
        """The sum of a value's cotangents; None if it has none."""
        parts = self.parts.pop(node, [])
        pieces = [part for part in parts if isinstance(part, Piece)]
        total: Any = None
        for part in [*self._joined(node, pieces), *(part for part in parts if not isinstance(part, Piece))]:
            total = part if total is None else total + part
        return total

    def _joined(self, node: fx.Node, pieces: list[Piece]) -> list[Value]:
        """Put pieces beside each other, as few sums as that leaves; what no piece covers is zero."""
        shape, dtype = tuple(node.meta["val"].shape), node.meta["val"].dtype
        layers: list[list[Piece]] = []
        for piece in sorted(pieces, key=lambda each: (each.dim, each.start)):
            for layer in layers:
                last = layer[-1]
                if last.dim == piece.dim and last.start + last.value.shape[last.dim] <= piece.start:
                    layer.append(piece)
                    break
            else:
                layers.append([piece])
        found = []
        for layer in layers:
            dim, at, row = layer[0].dim, 0, []
            for start, value in [*((each.start, each.value) for each in layer), (shape[dim], None)]:
                if start > at:
                    row.append(self.tape.full([*shape[:dim], start - at, *shape[dim + 1 :]], 0.0, dtype))
                if value is not None:
                    row.append(value)
                    at = start + value.shape[dim]
            found.append(row[0] if len(row) == 1 else self.tape.call(aten.cat.default, row, dim))
        return found

    def _whole(self, g: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        if not isinstance(g, Value):
            g = self.tape.full([], g, dtype)
        return g.to(dtype).expand(shape)


def refusal(problem: str, node: fx.Node) -> UnsupportedOp:
    """The error for an operator that can't be differentiated."""
    return UnsupportedOp(
        f"{problem}: {describe(node)}\n"
        "  write it with other operators, or train with an estimator that needs no derivative, as mz.TwoSided()"
    )


def _is_continuous(node: fx.Node) -> bool:
    return any(each.is_floating_point() or each.is_complex() for each in _tensors(node))


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Tensor)]
