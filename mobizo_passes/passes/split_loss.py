"""Give the loss out in parts that can be added up over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.batching import Batch, Layout, find_batch, track_batch
from mobizo_passes.errors import UnsupportedOp, describe
from mobizo_passes.graph.facts import facts, role
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.passes import Pass, Property, Violation, has_output
from mobizo_passes.passes.regroup_loss import unreduced
from mobizo_passes.sites.factors import literal
from mobizo_passes.zo.combination import Arg, Combination, Step, Term

aten = torch.ops.aten
mobizo = torch.ops.mobizo

# Operators on numbers, by torch's name for them; the manifest knows the same names.
_NUMBERS: dict[Any, str] = {
    getattr(getattr(aten, op), overload): op
    for op, overloads in {
        **dict.fromkeys(("add", "sub", "mul", "div"), ("Tensor", "Scalar")),
        **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), ("Tensor", "Scalar")),
        **dict.fromkeys(("maximum", "minimum"), ("default",)),
        **dict.fromkeys(("neg", "abs", "sqrt", "rsqrt", "square", "exp", "expm1", "log", "log1p"), ("default",)),
        **dict.fromkeys(("reciprocal", "sigmoid", "tanh", "relu"), ("default",)),
        "pow": ("Tensor_Scalar", "Tensor_Tensor", "Scalar"),
        "where": ("self",),
    }.items()
    for overload in overloads
}
_SAME = (aten._to_copy.default, aten.reshape.default, aten.view.default, aten.squeeze.default, aten.clone.default)


class _Whole(Exception):
    """The loss can't be given out in parts; the message says why."""


def _missing(ir: Ir) -> Iterator[Violation]:
    if ir.combination is None:
        yield None, "none"


@dataclass(frozen=True)
class SplitLoss(Pass):
    """Return, beside the loss, the sum (and the weight) of every example in each reduction that the loss is made of.

    The driver drops the rows that fill up an incomplete batch, adds the rest up over all batches, and puts the loss of
    the whole data set together as `Ir.combination` says. Where the loss can't be taken apart, that says why.

    BEFORE  %l: f32[] = aten.cross_entropy_loss(%logits, %labels)
    AFTER   %n: f32[8] = aten.cross_entropy_loss(%logits, %labels, None, 0, -100, 0.0);  %v: f32[8] = %labels != -100
            %s: f32[4] = mobizo.row_sums(%n, 0, 1, 4);  %w: f32[4] = mobizo.row_sums(%v, 0, 1, 4)
            %l: f32[] = aten.div(aten.sum(%s, [0]), aten.sum(%w, [0]))
            return (%l, %s, %w)
    """

    name: ClassVar[str] = "split-loss"
    requires = (has_output("loss"),)
    ensures = (Property("a way to combine the losses of parts", _missing),)

    batch: Batch

    def rewrite(self, ir: Ir) -> int:
        if ir.combination is not None:
            return 0
        trial = ir.clone()
        trial.pass_name = self.name
        try:
            opened = open_reductions(trial)
            track_batch(trial, self.batch)
            ir.combination = _Split(trial, self.batch, opened).run()
        except _Whole as reason:
            ir.combination = Combination(refusal=str(reason))
            return 0
        ir.graph, ir.outputs, ir.state = trial.graph, trial.outputs, trial.state
        return len(ir.combination.terms)


Opened = dict[fx.Node, tuple[fx.Node, fx.Node | None, str]]


def batch_of(ir: Ir, batch_dim: int = 0) -> Batch:
    """Find the batch with every reduction written out: a class weight or a label that is misread shows only there."""
    opened_up = ir.clone()
    return find_batch(opened_up, batch_dim, ends_of_batch(opened_up, open_reductions(opened_up)))


def open_reductions(ir: Ir) -> Opened:
    """Write every reduction that the loss is made of out beside it: its values, their weights, "mean" or "sum"."""
    opened: Opened = {}
    batched = _depends(ir, "batch")
    stack, seen = [ir.output_node("loss")], set()
    while stack:
        node = stack.pop()
        if node in seen or node not in batched or node.op != "call_function":
            continue
        seen.add(node)
        if _is_number(node) and any(not _is_number(a) for a in node.all_input_nodes):
            with ir.graph.inserting_before(node):
                try:
                    opened[node] = unreduced(ir, node)
                except UnsupportedOp:
                    continue  # told of when the loss is taken apart
        elif _is_number(node):
            stack += node.all_input_nodes
    return opened


def ends_of_batch(ir: Ir, opened: Opened) -> set[fx.Node]:
    """Return the values that must hold the batch: what meets a trained weight, and what the trained loss comes from."""
    batched, trained = _depends(ir, "batch"), _depends(ir, "adapter")
    ends = {values for values, _, _ in opened.values() if values in trained}
    for node in ir.graph.nodes:
        if any(a in trained and a not in batched for a in node.all_input_nodes):
            ends.update(a for a in node.all_input_nodes if a in batched)
    return ends


@dataclass
class _Split:
    ir: Ir
    batch: Batch
    opened: Opened
    terms: list[Term] = field(default_factory=list)
    scalars: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[tuple[Output, fx.Node]] = field(default_factory=list)
    args: dict[fx.Node, Arg] = field(default_factory=dict)
    guessed: bool = False

    def run(self) -> Combination:
        self.batched = _depends(self.ir, "batch")
        self.trained = _depends(self.ir, "adapter", "parameter", "buffer")
        self.holds = _depends(self.ir, "batch", names=set(self.batch.places))
        loss = self.ir.output_node("loss")
        if not _is_number(loss):
            raise _Whole(f"it is no single number: {describe(loss)}")
        result = self._arg(loss)
        if not self.terms:
            raise _Whole("nothing in it reduces over the examples of the batch")
        self.ir.set_outputs([(Output("loss", "loss"), self.ir.output_node("loss")), *self.outputs])
        return Combination(tuple(self.terms), tuple(self.scalars), tuple(self.steps), result, guessed=self.guessed)

    def _arg(self, node: Any) -> Arg:
        if not isinstance(node, fx.Node):
            if isinstance(node, bool) or not isinstance(node, int | float) or not math.isfinite(node):
                raise _Whole(f"it is computed with {node!r}")
            return float(node)
        if node not in self.args:
            self.args[node] = self._number(node)
        return self.args[node]

    def _number(self, node: fx.Node) -> Arg:
        if node not in self.holds:
            value = literal(node, self.ir.state) if node.op == "placeholder" else None
            return self._scalar(node, "same") if value is None else value
        if not _is_number(node):
            raise _Whole(f"its examples are put together by {describe(node)}")
        if node in self.opened:
            return self._term(node, *self.opened[node])
        target: Any = node.target
        operands: list[Any] = list(node.args)
        if target in _SAME:
            return self._arg(operands[0])
        if target is aten.rsub.Scalar and not node.kwargs and len(operands) == 2:
            return self._step("sub", operands[1], operands[0])
        if target is aten.clamp.default:
            low, high = arguments(node).min, arguments(node).max
            value = self._arg(operands[0])
            value = value if low is None else self._add("maximum", value, self._arg(low))
            return value if high is None else self._add("minimum", value, self._arg(high))
        if target is aten.clamp_min.default:
            return self._step("maximum", *operands)
        if target not in _NUMBERS or set(node.kwargs) - {"alpha"}:
            raise _Whole(f"its examples are put together by {describe(node)}")
        if _NUMBERS[target] in ("add", "sub"):
            alpha, operands = arguments(node).get("alpha", 1), operands[:2]
            if alpha != 1:
                scaled = self._add("mul", self._arg(operands[1]), float(alpha))
                return self._add(_NUMBERS[target], self._arg(operands[0]), scaled)
        if _NUMBERS[target] == "div" and self._counts(operands[1]):
            total = self._arg(operands[0])
            if isinstance(total, str) and total.startswith("t") and not self.terms[int(total[1:])].mean:
                # A sum divided by a number that comes with the batch: how many items the batch has.
                self.args[operands[1]] = self._scalar(operands[1], "count")
        return self._step(_NUMBERS[target], *operands)

    def _counts(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self.batched and node not in self.trained | self.holds

    def _step(self, op: str, *operands: Any) -> str:
        return self._add(op, *(self._arg(a) for a in operands))

    def _add(self, op: str, *args: Arg) -> str:
        self.steps.append(Step(op, args))
        return f"n{len(self.steps) - 1}"

    def _scalar(self, node: fx.Node, kind: str) -> str:
        if not _is_number(node):
            raise _Whole(f"a tensor that holds no batch is part of it: {describe(node)}")
        self._output("loss_scalar", len(self.scalars), node)
        self.scalars.append(kind)
        return f"s{len(self.scalars) - 1}"

    def _term(self, node: fx.Node, values: fx.Node, weights: fx.Node | None, kind: str) -> str:
        size, number = self.batch.size, len(self.terms)
        place = facts(values).layout or self._guess(values)
        count = values.meta["val"].numel()
        mean, weighted = kind == "mean", kind == "mean" and weights is not None
        with self.ir.graph.inserting_before(node):
            sums = self._rows(values, place, node)
            total = self.ir.call(aten.sum.dim_IntList, sums, [0], like=node)
            self._output("loss_sum", number, sums)
            if weighted and weights is not None:
                if weights.meta["val"].numel() != count:
                    raise _Whole(f"its weights are not one per value: {describe(weights)}")
                weight = self._rows(weights, place, node)
                self._output("loss_weight", number, weight)
                below: fx.Node | int = self.ir.call(aten.sum.dim_IntList, weight, [0], like=node)
                total = self.ir.call(aten.div.Tensor, total, below, like=node)
            elif mean:
                total = self.ir.call(aten.div.Tensor, total, count, like=node)
            total = self._cast(total, node.meta["val"].dtype, node)
        node.replace_all_uses_with(total)
        self.terms.append(Term(mean, weighted, count / size))
        return f"t{number}"

    def _guess(self, values: fx.Node) -> Layout:
        """Where tracking lost the batch, the first dimension that has room for it; a run on more rows must confirm."""
        self.guessed = True
        for dim, extent in enumerate(values.meta["val"].shape):
            if extent and extent % self.batch.size == 0:
                return Layout(dim)
        raise _Whole(f"its examples are mixed before they are added up: {describe(values)}")

    def _rows(self, values: fx.Node, place: Layout, like: fx.Node) -> fx.Node:
        value = values.meta["val"]
        before = math.prod(value.shape[: place.dim]) * place.outer
        if value.shape[place.dim] // place.outer % self.batch.size or value.numel() % (before * self.batch.size):
            raise _Whole(f"the batch is cut apart in {describe(values)}")
        if value.dtype not in (torch.float32, torch.float64):
            values = self._cast(values, torch.float32, like)
        return self.ir.call(mobizo.row_sums.default, values, place.dim, place.outer, self.batch.size, like=like)

    def _cast(self, node: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        if node.meta["val"].dtype == dtype:
            return node
        return self.ir.call(aten._to_copy.default, node, like=like, dtype=dtype)

    def _output(self, kind: str, number: int, node: fx.Node) -> None:
        self.outputs.append((Output(kind, f"{kind}_{number}"), node))


def _is_number(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _depends(ir: Ir, *kinds: str, names: set[str] | None = None) -> set[fx.Node]:
    """Return what depends on inputs of these kinds, and of these names if given."""
    is_source: Callable[[fx.Node], bool] = lambda n: names is None or role(n).name in names  # noqa: E731
    return ir.reached(n for n in ir.placeholders(*kinds) if is_source(n))
