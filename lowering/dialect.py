"""What may stand in a legalized program of any target; each target's `dialect` adds its own rules."""

from __future__ import annotations

import torch
from torch.fx import Node

from lowering.passes.forms.canonicalize_reshapes import RESHAPES
from lowering.passes.forms.convert_splits_to_slices import SPLITS
from lowering.passes.forms.copy_views import COPIES
from lowering.passes.forms.lower_to_core_aten import FILLS, SOFTMAXES, TWINS
from lowering.passes.values.convert_scalars_to_float import ARITHMETIC
from mobizo_passes.dialects import CORE
from mobizo_passes.graph.dialect import Dialect, Rule
from mobizo_passes.graph.identities import ASSERTIONS
from mobizo_passes.graph.identities import COPIES as IDENTITIES
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, shape_of
from mobizo_passes.graph.ops import DECOMPOSITIONS

aten = torch.ops.aten

_VIEWS = tuple(each for each in RESHAPES if each not in COPIES.values())
_ALONG = (
    aten.cat.default,
    aten.slice_copy.Tensor,
    aten._softmax.default,
    aten._log_softmax.default,
    aten.gather.default,
    aten.index_select.default,
)


def _negative(ir: Ir, node: Node) -> str:
    return str(arguments(node).dim) if arguments(node).dim < 0 else ""


def _beyond(ir: Ir, node: Node) -> str:
    given = arguments(node)
    size = shape_of(given.self)[given.dim]
    inside = None not in (given.start, given.end) and min(given.start, given.end) >= 0 and given.end <= size
    return "" if inside else f"{given.start} to {given.end} of {size}"


def _int(ir: Ir, node: Node) -> str:
    other = node.args[1]
    whole = isinstance(other, int) and not isinstance(other, bool) and is_float(node.args[0]) and is_float(node)
    return str(other) if whole else ""


#: Rules for all targets.
RULES = (
    Rule("no operator of the compiler's own", tuple(DECOMPOSITIONS)),
    Rule("no copies and assertions", (*ASSERTIONS, *IDENTITIES)),
    Rule("reshapes, slices and permutations", (*_VIEWS, aten.select.int, aten.transpose.int, aten.t.default)),
    Rule("axes counted from the front", _ALONG, _negative),
    Rule("slices that end within their axis", (aten.slice_copy.Tensor,), _beyond),
    Rule("floats in float arithmetic", ARITHMETIC, _int),
    Rule("core operators", (*TWINS, *FILLS, *SOFTMAXES, aten.sum.default)),
)
#: What remains a view, unless a later stage knows only these.
COPIED = Rule("copies instead of views", tuple(COPIES))


def _over_one_axis(ir: Ir, node: Node) -> str:
    return "one over the last axis" if len(arguments(node).normalized_shape) == 1 else ""


#: Of delegates that have neither splits nor SiLU.
NO_SPLITS = Rule("slices instead of splits", SPLITS)
NO_SILU = Rule("x * sigmoid(x)", (aten.silu.default,))
NO_NORMS = Rule("norms taken apart", (aten.layer_norm.default, aten.rms_norm.default), _over_one_axis)


def legal(target: str, *rules: Rule) -> Dialect:
    """The dialect of a target's legalized programs: the rules for all targets, and its own."""
    return Dialect(f"{target}, legalized", CORE.inputs | {"input"}, (*RULES, *rules))


def longer_than(most: int, *operators: object) -> Rule:
    """No operand or result of these operators has more axes than `most`."""

    def broken(ir: Ir, node: Node) -> str:
        ranks = [len(shape_of(each)) for each in (node, *node.all_input_nodes)]
        return f"{max(ranks)} axes" if max(ranks) > most else ""

    return Rule(f"at most {most} axes", operators, broken)
