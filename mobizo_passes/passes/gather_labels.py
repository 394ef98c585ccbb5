"""Compute logits only at positions that carry a label."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mobizo_passes.errors import InputError
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, set_arguments
from mobizo_passes.graph.passes import Pass, Violation

aten = torch.ops.aten

# Losses of class indices; their fifth argument is the index that they leave out.
_CLASS_LOSSES = (aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default)


@dataclass(frozen=True)
class GatherLabels(Pass):
    """Pick the at most K labelled positions of each example out of the logits; hoisting then moves it above `lm_head`.

    The positions are found in the graph from the labels of each batch. A batch with more than K labelled positions in
    one example does not fit the program; `TrainingProgram` and the driver refuse it.

    BEFORE  %l: f32[4, 64, V] = aten.linear(%h, %w);  %r: f32[256, V] = aten.view(%l, [256, V])
            aten.cross_entropy_loss(%r, aten.view(%labels, [256]))
    AFTER   %i: i64[4, K] = topk(positions where %labels != ignore_index)
            %p: f32[4, K, V] = mobizo.gather_rows(%l, %i);  %t: i64[4, K] = aten.gather(%labels, 1, %i)
            aten.cross_entropy_loss(view(%p), view(%t))
    """

    name: ClassVar[str] = "gather-labels"

    max_labels: int

    def unmet(self, ir: Ir) -> Iterator[Violation]:
        """No more rows than labels are asked for."""
        match = find_token_loss(ir)
        if match is not None and match.labels.meta["val"].shape[1] > self.max_labels:
            yield match.loss, f"{match.labels.meta['val'].shape[1]} rows of each example"

    def rewrite(self, ir: Ir) -> int:
        match = find_token_loss(ir)
        if match is None or match.labels.meta["val"].shape[1] <= self.max_labels:
            return 0
        loss, logits, labels, ignore = match.loss, match.logits, match.labels, match.ignore_index
        batch, length = labels.meta["val"].shape
        vocabulary = logits.meta["val"].shape[-1]
        _move_up(ir, labels)
        with ir.graph.inserting_after(labels if labels.op != "placeholder" else ir.placeholders()[-1]):
            anchor = ir.call(aten.ne.Scalar, labels, ignore, like=loss)
        # A weight that falls with the position: the K largest are the first K labelled positions, in order.
        ramp = ir.add_constant("label_order", torch.arange(length, 0, -1, dtype=torch.float32))
        with ir.graph.inserting_after(anchor):
            valid = ir.call(aten._to_copy.default, anchor, like=loss, dtype=torch.float32)
        with ir.graph.inserting_after(valid):
            order = ir.call(aten.mul.Tensor, valid, ramp, like=loss)
        with ir.graph.inserting_after(order):
            top = ir.call(aten.topk.default, order, self.max_labels, -1, True, True, like=loss)
        with ir.graph.inserting_after(top):
            index = ir.call(operator.getitem, top, 1, like=loss)
        with ir.graph.inserting_before(loss):
            selected = ir.call(torch.ops.mobizo.gather_rows.default, logits, index, like=loss)
            rows = ir.call(aten.reshape.default, selected, [batch * self.max_labels, vocabulary], like=loss)
            target = ir.call(aten.gather.default, labels, 1, index, like=loss)
            flat = ir.call(aten.reshape.default, target, [batch * self.max_labels], like=loss)
        set_arguments(loss, self=rows, target=flat)
        return 1


@dataclass(frozen=True)
class TokenLoss:
    """A matched loss: cross-entropy of logits [B, T, V] against integer labels [B, T]."""

    loss: fx.Node
    logits: fx.Node
    labels: fx.Node
    ignore_index: int


def find_token_loss(ir: Ir) -> TokenLoss | None:
    """Return the token-level cross-entropy behind the loss output, if it is one."""
    nodes = [n for n in ir.graph.nodes if n.target is aten.cross_entropy_loss.default]
    if len(nodes) != 1:
        return None
    given = arguments(nodes[0])
    if given.reduction == 0 or given.self.meta["val"].dim() != 2:
        return None
    logits, labels = _before_reshape(given.self, 3), _before_reshape(given.target, 2)
    if logits is None or labels is None or logits.meta["val"].shape[:2] != labels.meta["val"].shape:
        return None
    return TokenLoss(nodes[0], logits, labels, given.ignore_index)


def ignored_label(ir: Ir) -> int | None:
    """Return the label value that the loss leaves out, or None for a loss that knows none."""
    losses = [arguments(n) for n in ir.graph.nodes if n.target in _CLASS_LOSSES]
    ignored = {loss.ignore_index for loss in losses if not loss.target.meta["val"].is_floating_point()}
    return ignored.pop() if len(ignored) == 1 else None


def class_inputs(ir: Ir) -> list[str]:
    """Return the batch inputs that name classes: those that a class loss reads its targets from, as integers."""
    stack: list[fx.Node] = []
    for node in ir.graph.nodes:
        if node.target in _CLASS_LOSSES and not arguments(node).target.meta["val"].is_floating_point():
            stack.append(arguments(node).target)
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        value = node.meta["val"]
        if node in seen or not isinstance(value, Tensor) or value.is_floating_point() or value.dtype is torch.bool:
            continue
        seen.add(node)
        stack += node.all_input_nodes
    return [role(n).name for n in ir.placeholders("batch") if n in seen]


def label_counts(ir: Ir, inputs: dict[str, Tensor]) -> Tensor | None:
    """Return how many labelled positions each example has, int64 [B]; None without a token-level loss."""
    match = find_token_loss(ir)
    if match is None or match.labels.meta["val"].is_floating_point():
        return None
    values: dict[fx.Node, Tensor] = {}
    needed = _ancestors(match.labels)
    for node in ir.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            spec = role(node)
            values[node] = inputs[spec.name] if spec.kind == "batch" else ir.state[spec.name]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return (values[match.labels] != match.ignore_index).sum(1)


def check_label_counts(ir: Ir, inputs: dict[str, Tensor], limit: int | None) -> None:
    """Raise `InputError` if an example has more labelled positions than a program with that limit reads."""
    counts = None if limit is None else label_counts(ir, inputs)
    if counts is not None and limit is not None and int(counts.max()) > limit:
        worst = int(counts.argmax())
        raise InputError(
            f"example {worst} carries {int(counts[worst])} labelled positions, the program reads at most {limit}; "
            "transform with example inputs that carry as many labels, or with max_labels="
        )


def _before_reshape(node: Any, rank: int) -> fx.Node | None:
    while isinstance(node, fx.Node) and node.target in (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
    ):
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.meta["val"].dim() == rank else None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return seen


def _move_up(ir: Ir, node: fx.Node) -> None:
    """Move what computes the labels to the start of the body, so that any node may read it."""
    needed = _ancestors(node)
    body = next(n for n in ir.graph.nodes if n.op != "placeholder")
    for other in [n for n in ir.graph.nodes if n in needed and n.op != "placeholder"]:
        if other is not body:
            body.prepend(other)
