"""Select before computing: what the loss does not read is not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, positive_dim
from mobizo_passes.graph.passes import FUNCTIONAL, Pass

aten = torch.ops.aten
mobizo = torch.ops.mobizo

_LAST_DIM = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class HoistSelections(Pass):
    """Move selections of positions (and of vocabulary rows) above the linear and element-wise nodes they read from.

    BEFORE  %l: f32[4, 64, 49152] = aten.linear(%h, %w);  %s: f32[4, 49152] = aten.select(%l, 1, -1)
            %t: f32[4, 2] = aten.index(%s, [None, %words])
    AFTER   %s: f32[4, 576] = aten.select(%h, 1, -1)
            %t: f32[4, 2] = aten.linear(%s, %w_rows)            %w_rows: f32[2, 576] = constant
    """

    name: ClassVar[str] = "hoist-selections"
    requires = (FUNCTIONAL,)

    def rewrite(self, ir: Ir) -> int:
        count = 0
        progress = True
        while progress:
            progress = False
            for node in reversed(list(ir.graph.nodes)):
                dim = selected_dim(node)
                if dim is None or not node.users:
                    continue
                source: Any = node.args[0]
                if source.op == "call_function" and len(source.users) == 1 and self._push(ir, node, source, dim):
                    count += 1
                    progress = True
        return count

    def _push(self, ir: Ir, sel: fx.Node, source: fx.Node, dim: int) -> bool:
        back = dim - source.meta["val"].dim()
        operands: list[Any] = list(source.args)
        if source.target is aten.linear.default:
            if back == -1:
                return self._gather_weight_rows(ir, sel, source)
            operands[0] = self._select(ir, sel, operands[0], back)
        elif source.target in _LAST_DIM and len(arguments(source).normalized_shape) < -back:
            operands[0] = self._select(ir, sel, operands[0], back)
        elif source.target is aten.mean.dim and back != -1 and _over_last(source):
            operands[:2] = [self._select(ir, sel, operands[0], back), [-1]]
        elif torch.Tag.pointwise in getattr(source.target, "tags", ()) or source.target is aten._to_copy.default:
            if any(isinstance(v, fx.Node) for v in source.kwargs.values()):
                return False
            if not all(_selectable(sel, a, source, back) for a in operands if isinstance(a, fx.Node)):
                return False
            operands = [self._operand(ir, sel, a, back) if isinstance(a, fx.Node) else a for a in operands]
        else:
            return False
        with ir.graph.inserting_before(sel):
            new = ir.call(source.target, *operands, like=source, **source.kwargs)
        ir.replace(sel, new)
        ir.graph.erase_node(source)
        return True

    def _operand(self, ir: Ir, sel: fx.Node, arg: fx.Node, back: int) -> fx.Node:
        shape = arg.meta["val"].shape
        if len(shape) < -back:
            return arg
        if shape[back] == 1:
            if sel.target is not aten.select.int:
                return arg
            with ir.graph.inserting_before(sel):
                return ir.call(aten.squeeze.dim, arg, back, like=sel)
        return self._select(ir, sel, arg, back)

    def _select(self, ir: Ir, sel: fx.Node, arg: fx.Node, back: int) -> fx.Node:
        """Apply the selection to another tensor, counting the dimension from the right; equal selections are shared."""
        dim = arg.meta["val"].dim() + back
        args = _retarget(sel, arg, dim)
        for user in arg.users:
            if user.target is sel.target and selected_dim(user) == dim and user.args[1:] == sel.args[1:] and user < sel:
                return user
        # As early as its operands allow, so that a later equal selection finds it standing before itself.
        operands = [n for n in sel.all_input_nodes if n is not sel.args[0]]
        latest = max([arg, *operands])
        after = latest if latest.op != "placeholder" else ir.placeholders()[-1]
        with ir.graph.inserting_after(after):
            return ir.call(sel.target, *args, like=sel)

    def _gather_weight_rows(self, ir: Ir, sel: fx.Node, linear: fx.Node) -> bool:
        """A selection of outputs is a smaller weight, if weight and selection are known now."""
        stored = [w for w in (arguments(linear).weight, arguments(linear).bias) if w is not None]
        if sel.target is not aten.index.Tensor or any(
            w.op != "placeholder" or role(w).kind not in ("parameter", "constant") for w in stored
        ):
            return False
        rows: fx.Node = arguments(sel).indices[-1]
        if rows.op != "placeholder" or role(rows).kind != "constant":
            return False
        index = ir.state[role(rows).name]
        selected = []
        for w in stored:
            fqn = role(w).name
            selected.append(ir.add_constant(f"{fqn}_selected_rows", ir.state[fqn][index].contiguous()))
        with ir.graph.inserting_before(sel):
            new = ir.call(aten.linear.default, linear.all_input_nodes[0], *selected, like=linear)
        ir.replace(sel, new)
        ir.graph.erase_node(linear)
        return True


def selected_dim(node: fx.Node) -> int | None:
    """Return the one dimension along which a node selects; None if it is no such selection."""
    if node.target is mobizo.gather_rows.default:
        return 1
    if node.target in (aten.select.int, aten.slice.Tensor):
        before = arguments(node).self.meta["val"].shape
        whole = node.target is aten.slice.Tensor and node.meta["val"].shape == before
        return None if whole else positive_dim(arguments(node).dim, len(before))
    if node.target is aten.index.Tensor:
        indices = arguments(node).indices
        used = [d for d, i in enumerate(indices) if i is not None]
        # An index that is itself computed might be computed after the node that the selection would move above.
        if len(used) == 1 and used[0] == len(indices) - 1 and indices[-1].op == "placeholder":
            return used[0] if indices[-1].meta["val"].dim() == 1 else None
    return None


def _retarget(sel: fx.Node, arg: fx.Node, dim: int) -> list[Any]:
    if sel.target is mobizo.gather_rows.default:
        return [arg, arguments(sel).index]
    if sel.target is aten.index.Tensor:
        return [arg, [*[None] * dim, arguments(sel).indices[-1]]]
    return [arg, dim, *sel.args[2:]]


def _selectable(sel: fx.Node, arg: fx.Node, source: fx.Node, back: int) -> bool:
    """Whether the selection may move to this operand of an element-wise node."""
    shape, whole = arg.meta["val"].shape, source.meta["val"].shape
    if len(shape) < -back or shape[back] == 1:
        return sel.target is not mobizo.gather_rows.default or len(shape) < 2 or len(shape) == 3
    if shape[back] != whole[back]:
        return False
    if sel.target is mobizo.gather_rows.default and not arg.meta["val"].is_floating_point():
        return False
    # gather_rows reads one index per example: the operand must hold every example.
    return sel.target is not mobizo.gather_rows.default or (len(shape) == 3 and shape[:2] == whole[:2])


def _over_last(node: fx.Node) -> bool:
    given = arguments(node)
    ndim = given.self.meta["val"].dim()
    return len(given.dim) == 1 and given.dim[0] % ndim == ndim - 1 and given.keepdim
