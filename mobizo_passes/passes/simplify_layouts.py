"""Say each change of layout in as few nodes as it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import FUNCTIONAL, Pass, Property, Violation
from mobizo_passes.sites.factors import TRANSPOSES

aten = torch.ops.aten

_RESHAPES = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
LAYOUTS = (*_RESHAPES, *TRANSPOSES)


def _too_long(ir: Ir) -> Iterator[Violation]:
    return ((chain[-1], "a longer one") for chain, _ in _longer(ir))


@dataclass(frozen=True)
class SimplifyLayouts(Pass):
    """Replace a chain of reshapes and permutations by the shortest equal one: at most reshape, permute, reshape.

    BEFORE  %u: f32[3, 6, 1, 1] = aten.unsqueeze(...);  %p: f32[1, 1, 3, 6] = aten.permute(%u, [2, 3, 0, 1])
            %q: f32[6, 1, 3, 1] = aten.permute(%p, [3, 0, 2, 1]);  %v: f32[1, 6, 3] = aten.reshape(%q, [1, 6, 3])
    AFTER   %p: f32[6, 3] = aten.permute(%a, [1, 0]);  %v: f32[1, 6, 3] = aten.reshape(%p, [1, 6, 3])
    """

    name: ClassVar[str] = "simplify-layouts"
    requires = (FUNCTIONAL,)
    ensures = (Property("the shortest chains of layouts", _too_long),)

    def rewrite(self, ir: Ir) -> int:
        count = 0
        for chain, steps in _longer(ir):
            new = chain[0].all_input_nodes[0]
            with ir.before(chain[-1]):
                for target, argument in steps:
                    new = ir.call(target, new, argument)
            ir.replace(chain.pop(), new)
            for old in reversed(chain):
                ir.graph.erase_node(old)
            count += 1
        return count


def _longer(ir: Ir) -> Iterator[tuple[list[fx.Node], list[tuple[Any, list[int]]]]]:
    """Chains of layouts, each with the shorter one that is equal to it."""
    for node in list(ir.graph.nodes):
        users = list(node.users)
        inside = len(users) == 1 and users[0].target in LAYOUTS
        if node.target not in LAYOUTS or inside or not users:
            continue
        chain = [node]
        while (before := chain[0].all_input_nodes[0]).target in LAYOUTS and len(before.users) == 1:
            chain.insert(0, before)
        steps = _shortest(chain[0].all_input_nodes[0], chain)
        if steps is not None and len(steps) < len(chain):
            yield chain, steps


@dataclass
class _Atom:
    """A piece of a dimension; a reshape may split it."""

    size: int
    parts: tuple[_Atom, _Atom] | None = None

    def leaves(self) -> list[_Atom]:
        if self.parts is not None:
            return [leaf for part in self.parts for leaf in part.leaves()]
        return [self] if self.size > 1 else []


def _leaves(dims: Sequence[Sequence[_Atom]]) -> list[list[_Atom]]:
    return [[leaf for atom in dim for leaf in atom.leaves()] for dim in dims]


def _shortest(source: fx.Node, chain: Sequence[fx.Node]) -> list[tuple[Any, list[int]]] | None:
    """Return the (operator, argument) steps from `source` to the chain's end; None if a reshape cuts across pieces."""
    shape = list(source.meta["val"].shape)
    origin = [[_Atom(size)] for size in shape]
    dims = origin
    for node in chain:
        if node.target in _RESHAPES:
            regrouped = _regroup([leaf for dim in _leaves(dims) for leaf in dim], list(node.meta["val"].shape))
            if regrouped is None:
                return None
            dims = regrouped
        else:
            order: Any = node.args[1] if node.target is aten.permute.default else None
            if order is None:
                order = list(range(len(dims)))
                a, b = node.args[1:] if node.target is aten.transpose.int else (0, -1)
                order[a], order[b] = order[b], order[a]
            dims = [dims[d] for d in order]
    final = list(chain[-1].meta["val"].shape)
    start, end = _leaves(origin), _leaves(dims)
    flat = [id(leaf) for dim in start for leaf in dim]
    wanted = [id(leaf) for dim in end for leaf in dim]
    if flat == wanted:
        return [] if shape == final else [(aten.reshape.default, final)]
    whole = {tuple(map(id, dim)): i for i, dim in enumerate(start) if dim}
    ones = [i for i, dim in enumerate(start) if not dim]
    keys = [tuple(map(id, dim)) for dim in end]
    if len(final) == len(shape) and all(not k or k in whole for k in keys):
        return [(aten.permute.default, [whole[k] if k else ones.pop(0) for k in keys])]
    # Runs of pieces that stay together become one dimension each.
    position = {leaf: i for i, leaf in enumerate(wanted)}
    runs: list[list[int]] = []
    for leaf in flat:
        if runs and position[leaf] == position[runs[-1][-1]] + 1:
            runs[-1].append(leaf)
        else:
            runs.append([leaf])
    sizes = {id(leaf): leaf.size for dim in start for leaf in dim}
    folded = [math.prod(sizes[leaf] for leaf in run) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: position[runs[i][0]])
    permuted = [folded[i] for i in order]
    steps: list[tuple[Any, list[int]]] = [] if folded == shape else [(aten.reshape.default, folded)]
    steps.append((aten.permute.default, order))
    return steps if permuted == final else [*steps, (aten.reshape.default, final)]


def _regroup(leaves: list[_Atom], shape: Sequence[int]) -> list[list[_Atom]] | None:
    queue, dims = list(leaves), []
    for size in shape:
        dim: list[_Atom] = []
        while size > 1:
            if not queue:
                return None
            atom = queue.pop(0)
            if size % atom.size and atom.size % size:
                return None
            if atom.size > size:
                atom.parts = _Atom(size), _Atom(atom.size // size)
                atom, rest = atom.parts
                queue.insert(0, rest)
            dim.append(atom)
            size //= atom.size
        dims.append(dim)
    return dims
