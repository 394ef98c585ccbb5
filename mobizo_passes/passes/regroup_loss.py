"""Turn the loss into one loss per group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.batching import Batch, track_batch
from mobizo_passes.errors import BatchCoupled, UnsupportedOp, describe
from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.nodes import named
from mobizo_passes.graph.passes import Pass, Property, Violation, has_output

aten = torch.ops.aten
# As torch numbers the reductions of losses; 0 is none.
_REDUCTIONS = {1: "mean", 2: "sum"}
_ELEMENTWISE = (
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.binary_cross_entropy.default,
    aten.soft_margin_loss.default,
    aten.kl_div.default,
)
_TOKEN = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default)
_WHOLE = {aten.mean.default: "mean", aten.sum.default: "sum", aten.mean.dim: "mean", aten.sum.dim_IntList: "sum"}


def _scalar(ir: Ir) -> Iterator[Violation]:
    losses = ir.output_node("losses")
    if _dims(losses) != 1:
        yield losses, f"{_dims(losses)} dimensions"


@dataclass(frozen=True)
class RegroupLoss(Pass):
    """Replace the reduction over the batch by `mobizo::reduce_loss`, one loss per group (one group for now).

    BEFORE  %l: f32[] = aten.cross_entropy_loss(%logits, %labels)
    AFTER   %n: f32[8] = aten.cross_entropy_loss(%logits, %labels, None, 0, -100, 0.0)
            %v: f32[8] = aten._to_copy(%labels != -100)
            %l: f32[1] = mobizo.reduce_loss(%n, %v, groups=1, dim=0, outer=1, 'mean')
    """

    name: ClassVar[str] = "regroup-loss"
    requires = (has_output("loss", "losses"),)
    ensures = (
        has_output("losses"),
        Property("a loss for each group", _scalar),
    )

    # Where the inputs hold the batch; None: an earlier pass has tracked it.
    batch: Batch | None = None

    def rewrite(self, ir: Ir) -> int:
        if ir.outputs[0].kind == "losses":
            return 0
        if self.batch is not None:
            track_batch(ir, self.batch)
        loss = ir.output_node("loss")
        reached = perturbed(ir)
        if loss not in reached:
            raise UnsupportedOp(f"the loss does not depend on the adapter: {describe(loss)}")
        count = 0
        widened: set[fx.Node] = set()
        for node in [n for n in ir.graph.nodes if n in reached and n.op == "call_function"]:
            # A scalar that holds no batch, such as a penalty on the weights, is one value per group already.
            if _dims(node) != 0 or not facts(node).batched:
                continue
            if all(_dims(a) == 0 or a in widened for a in node.all_input_nodes if a in reached):
                continue
            with ir.graph.inserting_before(node):
                new = self._regroup(ir, node)
            ir.replace(node, new)
            loss = new if node is loss else loss
            self._widen(ir, new, widened)
            count += 1
        loss = ir.output_node("loss")
        if _dims(loss) == 1 and count == 0:
            with ir.graph.inserting_after(loss):
                loss = ir.call(torch.ops.mobizo.reduce_loss.default, loss, None, 1, 0, 1, "mean", like=loss)
            count = 1
        ir.set_outputs([(Output("losses", "losses"), loss)])
        return count

    def _regroup(self, ir: Ir, node: fx.Node) -> fx.Node:
        values, weights, kind = unreduced(ir, node)
        return ir.call(torch.ops.mobizo.reduce_loss.default, values, weights, 1, 0, 1, kind, like=node)

    def _widen(self, ir: Ir, scalar: fx.Node, widened: set[fx.Node]) -> None:
        """Re-infer what follows a regrouped scalar; it may only be combined with scalars on its way to the loss."""
        widened.add(scalar)
        for node in ir.graph.nodes:
            if node.op != "call_function" or node is scalar or not widened.intersection(node.all_input_nodes):
                continue
            scalar_op = torch.Tag.pointwise in getattr(node.target, "tags", ())
            if not scalar_op or (_dims(node) != 0 and node not in widened):
                raise BatchCoupled(
                    f"a value reduced over the whole batch feeds {describe(node)}\n"
                    "  examples would see one another; normalize each example on its own\n"
                    "  if it is one of several losses, add them up"
                )
            ir.refresh(node)
            widened.add(node)


def unreduced(ir: Ir, node: fx.Node) -> tuple[fx.Node, fx.Node | None, str]:
    """Write a reduction out at the insertion point: its values, their weights in a mean (None: equal), "mean" or "sum".

    Raises `UnsupportedOp` for an operator that is no reduction of a known kind.
    """
    target_op: Any = node.target
    given = named(node.target, node.args, node.kwargs)
    weights: fx.Node | None = None
    if node.target in _TOKEN:
        scores, target, class_weight, kind, ignore, *rest = given.values()
        if kind not in _REDUCTIONS:
            raise UnsupportedOp(f"this loss has no reduction: {describe(node)}")
        scores, target = _rows_first(ir, node, scores, target)
        values = ir.call(target_op, scores, target, class_weight, 0, ignore, *rest, like=node)
        if not target.meta["val"].is_floating_point():
            weights = _valid(ir, node, target, class_weight, ignore)
        return values, weights, _REDUCTIONS[kind]
    if target_op in _ELEMENTWISE:
        kind = given["reduction"]
        placed = max(len(node.args), list(given).index("reduction") + 1)
        args = list({**given, "reduction": 0}.values())[:placed]
        kwargs = {name: given[name] for name in list(given)[placed:] if name in node.kwargs}
        return ir.call(target_op, *args, like=node, **kwargs), None, _REDUCTIONS[kind]
    if target_op in _WHOLE:
        return given["self"], None, _WHOLE[target_op]
    raise BatchCoupled(
        f"the loss puts all examples of the batch together: {describe(node)}\n"
        "  use a mean, a sum, a cross-entropy, or return one loss per example"
    )


def perturbed(ir: Ir) -> set[fx.Node]:
    """Return the nodes that the adapter reaches, adapter inputs included."""
    return ir.reached(ir.placeholders("adapter"))


def _dims(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _rows_first(ir: Ir, node: fx.Node, scores: fx.Node, target: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Bring [N, C, d...] scores to [N*d, C] rows."""
    shape = list(scores.meta["val"].shape)
    if len(shape) <= 2:
        return scores, target
    order = [0, *range(2, len(shape)), 1]
    scores = ir.call(aten.permute.default, scores, order, like=node)
    scores = ir.call(aten.reshape.default, scores, [-1, shape[1]], like=node)
    if target.meta["val"].is_floating_point():
        target = ir.call(aten.permute.default, target, order, like=node)
        return scores, ir.call(aten.reshape.default, target, [-1, shape[1]], like=node)
    return scores, ir.call(aten.reshape.default, target, [-1], like=node)


def _valid(ir: Ir, node: fx.Node, target: fx.Node, class_weight: fx.Node | None, ignore: int) -> fx.Node:
    """Weight of each row in the mean: 0 where ignored, else its class weight or 1."""
    counted = ir.call(aten.ne.Scalar, target, ignore, like=node)
    weights = ir.call(aten._to_copy.default, counted, like=node, dtype=torch.float32)
    if class_weight is None:
        return weights
    zero = ir.call(aten.mul.Tensor, target, ir.call(aten._to_copy.default, counted, like=node, dtype=torch.int64))
    per_row = ir.call(aten.index_select.default, class_weight, 0, ir.call(aten.reshape.default, zero, [-1]), like=node)
    return ir.call(aten.mul.Tensor, weights, per_row, like=node)
