"""What a batching rule is, and what it asks: where groups lie, how shared values are expanded on the frontier."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

# It registers our operators, which some of the rules are about.
import mobizo_passes.graph.ops  # noqa: F401
from mobizo_passes.errors import BatchCoupled, UnsupportedOp, describe
from mobizo_passes.graph.facts import facts, note
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.layout import Layout


class PerGroup(Enum):
    """Layout of a value that holds no batch: its groups are stacked in a leading dimension, ``[P, *shape]``."""

    LEADING = "leading"


PER_GROUP = PerGroup.LEADING

Layouts = Layout | PerGroup | None | tuple[Layout | PerGroup | None, ...]
Rule = Callable[["Batcher", fx.Node], Layouts]

RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operator overloads."""

    def register(fn: Rule) -> Rule:
        for target in targets:
            RULES[target] = fn
        return fn

    return register


@dataclass
class Batcher:
    """State of one run: layouts of fused nodes, plain values as they were before, and expansions made so far."""

    ir: Ir
    groups: int
    layouts: dict[fx.Node, Layouts] = field(default_factory=dict)
    plain: dict[fx.Node, Any] = field(default_factory=dict)
    expansions: dict[tuple[fx.Node, Layout], fx.Node] = field(default_factory=dict)
    # Names of the nodes, erased since, that others stand for.
    replaced: dict[fx.Node, str] = field(default_factory=dict)

    # What rules ask ----------------------------------------------------------------------------------------------

    def layout(self, arg: Any) -> Layout | None:
        """Return where the groups lie in an argument; None for shared values, per-group values and non-nodes."""
        found = self.layouts.get(arg) if isinstance(arg, fx.Node) else None
        return found if isinstance(found, Layout) else None

    def per_group(self, arg: Any) -> bool:
        """Return whether an argument holds no batch and is stacked per group."""
        return isinstance(arg, fx.Node) and self.layouts.get(arg) is PER_GROUP

    def batched(self, arg: Any) -> bool:
        """Return whether an argument holds the batch, fused with groups or not."""
        return isinstance(arg, fx.Node) and (self.layout(arg) is not None or facts(arg).batched)

    def place(self, arg: fx.Node) -> Layout:
        """Return where the groups lie in a value that holds the batch, or where they go when it is expanded.

        Where tracking lost the batch, dimension 0 serves: groups may lie in any dimension that nothing mixes.
        """
        return self.layout(arg) or facts(arg).layout or Layout(0)

    def shape(self, arg: fx.Node) -> tuple[int, ...]:
        """Return a value's shape in the unexpanded program."""
        value = self.plain.get(arg, arg.meta["val"])
        return tuple(value.shape)

    def refuse(self, node: fx.Node, reason: str) -> UnsupportedOp:
        """Return the error for an operator that mixes examples; rules raise it."""
        return BatchCoupled(
            f"can't run perturbed copies side by side: {reason}\n  at {describe(node)}\n"
            "  a step evaluates all perturbations in one batch, so no operator may mix examples of the batch"
        )

    def unsupported(self, node: fx.Node, reason: str) -> UnsupportedOp:
        """Return the error for an operator, or a use of it, that no rule covers; rules raise it."""
        return UnsupportedOp(f"no rule for this perturbed operator: {reason}\n  at {describe(node)}")

    def fuse(self, arg: fx.Node, layout: Layout) -> fx.Node:
        """Return `arg` with its groups at `layout`, expanding a shared value (once per value and layout)."""
        if arg in self.layouts:
            return arg
        key = (arg, layout)
        if key not in self.expansions:
            with self.ir.graph.inserting_after(arg if arg.op != "placeholder" else self.ir.placeholders()[-1]):
                self.expansions[key] = self.ir.call(
                    torch.ops.mobizo.expand.default, arg, self.groups, layout.dim, layout.outer, like=arg
                )
        return self.expansions[key]

    def align(self, node: fx.Node, args: Sequence[Any], ndim: int) -> tuple[Layout, list[Any]]:
        """Align operands that broadcast to `ndim` dimensions: returns the result's layout and the fused operands."""
        tensors = [a for a in args if isinstance(a, fx.Node) and isinstance(a.meta["val"], Tensor)]
        fused = [(a, self.layout(a)) for a in tensors]
        places = {(lay.dim - len(self.shape(a)), lay.outer, self.shape(a)[lay.dim]) for a, lay in fused if lay}
        if len(places) != 1:
            raise self.refuse(node, "its operands hold the batch in different dimensions")
        back, outer, size = places.pop()
        result: list[Any] = []
        for arg in args:
            if not isinstance(arg, fx.Node) or arg not in tensors or arg in self.layouts:
                result.append(arg)
                continue
            shape = self.shape(arg)
            extent = shape[back] if len(shape) >= -back else 1
            if extent == 1:
                result.append(arg)
            elif extent == size:
                result.append(self.fuse(arg, Layout(len(shape) + back, outer)))
            else:
                raise self.refuse(node, f"a batch of {size} broadcasts against {extent} along one dimension")
        return Layout(ndim + back, outer), result

    def reshaped(self, node: fx.Node, shape: Sequence[int], layout: Layout, new: Sequence[int]) -> Layout:
        """Return where the groups lie after reshaping plain `shape` to plain `new`."""
        before = math.prod(shape[: layout.dim]) * layout.outer
        inner = shape[layout.dim] // layout.outer
        prefix = 1
        for dim, size in enumerate(new):
            # The groups stand just outside the batch: take the dimension in which the batch begins.
            begins = prefix <= before < prefix * size if inner > 1 else prefix == before
            if begins:
                if before % prefix or size % (before // prefix):
                    break
                return Layout(dim, before // prefix)
            prefix *= size
        raise self.unsupported(node, f"reshape {list(shape)} -> {list(new)} cuts through the batch")

    # What the walk asks ---------------------------------------------------------------------------------------------

    def ordinary(self, node: fx.Node) -> Layouts:
        """Apply the rule for a node none of whose arguments is per group."""
        if node.target in RULES:
            return RULES[node.target](self, node)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise self.unsupported(node, "it draws random numbers; call model.eval() before transform")
        if torch.Tag.pointwise in tags:
            return pointwise(self, node)
        raise self.unsupported(
            node,
            f"{node.target} is not in the rule table. That is a limit of this compiler, not of the model: tell it the "
            "rule with mz.register_batching_rule, write it with other operators, or keep perturbed values away from it",
        )

    def replace(self, node: fx.Node, new: Sequence[fx.Node], layouts: Sequence[Layout | PerGroup]) -> None:
        """Let `new` nodes, one per result, stand for a node, which is erased."""
        plain = self.plain.pop(node)
        several = isinstance(plain, tuple | list)
        users = [u for u in node.users if u.target is operator.getitem] if several else [node]
        for user in users:
            at: Any = user.args[1] if several else 0
            result = new[at]
            user.replace_all_uses_with(result)
            self.plain[result] = plain[at] if several else plain
            self.layouts[result] = layouts[at]
            self.replaced[result] = user.name
            note(result, expanded=True)
            self.check(result, layouts[at])
            if several:
                self.ir.graph.erase_node(user)
        self.ir.graph.erase_node(node)

    def check(self, node: fx.Node, layouts: Layouts) -> None:
        """Each result must be its plain shape with exactly `groups` times the size at the layout's dimension."""
        pairs: list[tuple[Any, Any, Any]] = [(node.meta["val"], self.plain[node], layouts)]
        if isinstance(layouts, tuple):
            pairs = list(zip(node.meta["val"], self.plain[node], layouts, strict=True))
        for value, plain, layout in pairs:
            expected = list(plain.shape)
            if isinstance(layout, Layout):
                expected[layout.dim] *= self.groups
            elif layout is PER_GROUP:
                expected = [self.groups, *expected]
            if list(value.shape) != expected:
                raise self.unsupported(node, f"its rule gave shape {list(value.shape)} where {expected} was due")


def pointwise(batcher: Batcher, node: fx.Node) -> Layout:
    """Element-wise operators with broadcasting: groups stay where they are."""
    ndim = batcher.plain[node].dim()
    layout, args = batcher.align(node, [*node.args, *node.kwargs.values()], ndim)
    node.args = tuple(args[: len(node.args)])
    node.kwargs = dict(zip(node.kwargs, args[len(node.args) :], strict=True))
    return layout
