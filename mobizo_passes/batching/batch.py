"""Where every value holds the batch, and which inputs do."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from mobizo_passes.batching.batcher import Layout
from mobizo_passes.batching.walk import Walk
from mobizo_passes.errors import UnsupportedOp
from mobizo_passes.graph.facts import note, role
from mobizo_passes.graph.ir import Ir

# A misread input is found by trying its other readings one by one; a graph asks for no more rounds than this.
_ROUNDS = 4

# Conflicts, and how much of the graph comes after them: fewer of the first, then less of the second.
_Score = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """The batch that a graph was captured for: its size, and the dimension of each input that holds it.

    Inputs that hold no batch (a mask of positions, class weights, a count) are not in `places`.
    """

    size: int
    places: Mapping[str, int]


def track_batch(ir: Ir, batch: Batch) -> None:
    """Note of every node that holds the batch that it is batched, and in which `Layout`.

    The batching rules are run on a copy with two groups in the batch inputs, so that a transposition, a fold into
    ``[B * T, D]`` or a flattening is followed as it will be followed later. No layout means that an operator mixes
    examples, or has no rule, so that the batch was lost there: allowed as long as nothing perturbed comes by.
    """
    _track(ir, batch.places)


def find_batch(ir: Ir, batch_dim: int, ends: Collection[fx.Node] = ()) -> Batch:
    """Find which inputs hold the batch, and where: `batch_dim` is where to look first, the graph decides.

    `ends` are values that must hold it: what meets a trained weight, and what the loss is reduced from.

    The first reading is that every input whose size there is the most common one holds the batch. It is wrong where a
    value would hold the batch in two dimensions at once, or where an input that is left out meets the batch along a
    dimension of the batch's size, or where the batch does not reach an end: then other readings of the inputs that
    come together there are tried.
    """
    inputs = {role(n).name: tuple(n.meta["val"].shape) for n in ir.placeholders("batch")}
    first = {name: min(batch_dim, len(shape) - 1) for name, shape in inputs.items() if shape}
    sizes = [size for size, _ in Counter(inputs[name][dim] for name, dim in first.items()).most_common()]
    best: tuple[_Score, Batch] | None = None
    for size in sizes:
        places = {name: dim for name, dim in first.items() if inputs[name][dim] == size}
        found = _fewest_conflicts(ir, Batch(size, places), inputs, ends)
        if best is None or found[0] < best[0]:
            best = found
        if best[0][0] == 0:
            break
    return best[1] if best is not None else Batch(1, {})


def _fewest_conflicts(
    ir: Ir, batch: Batch, inputs: Mapping[str, tuple[int, ...]], ends: Collection[fx.Node]
) -> tuple[_Score, Batch]:
    """Change the reading of one input at a time while that leaves fewer conflicts; returns how many are left."""
    conflicts, suspects = _conflicts(ir, batch.places, ends)
    for _ in range(_ROUNDS):
        if conflicts[0] == 0:
            break
        better: tuple[_Score, Batch, set[str]] | None = None
        for name in (n for n in inputs if n in suspects):
            dims: list[int | None] = [d for d, extent in enumerate(inputs[name]) if extent == batch.size]
            for dim in (d for d in (None, *dims) if d != batch.places.get(name)):
                places = {k: v for k, v in batch.places.items() if k != name}
                if dim is not None:
                    places[name] = dim
                if not places:
                    continue
                count, suspected = _conflicts(ir, places, ends)
                if count < (conflicts if better is None else better[0]):
                    better = count, Batch(batch.size, places), suspected
        if better is None:
            break
        conflicts, batch, suspects = better
    return conflicts, batch


def _conflicts(ir: Ir, places: Mapping[str, int], ends: Collection[fx.Node]) -> tuple[_Score, set[str]]:
    """How many places contradict a reading of the inputs, and the inputs that come together there."""
    batcher, twins = _track(ir, places, keep=False)
    sources: dict[fx.Node, frozenset[str]] = {}
    for node in batcher.ir.graph.nodes:
        own = {role(node).name} if node.op == "placeholder" and role(node).kind == "batch" else set()
        sources[node] = frozenset(own).union(*(sources[a] for a in node.all_input_nodes))
    wrong = [
        n for n in batcher.lost if n in twins and not any(a in batcher.lost for a in n.all_input_nodes) and _many(n)
    ]
    suspects = set().union(*(sources[n] for n in wrong))
    missed = sum(twins[n] in ends and n not in batcher.lost and batcher.layout(n) is None for n in twins)
    left_out = [n for n in batcher.met if sources[n] and not sources[n].intersection(places)]
    if left_out:
        suspects |= set(places).union(*(sources[n] for n in left_out))
    # What is lost may be lost in any reading; an input that meets the batch unseen, or an end without it, may not.
    return (len(wrong) + len(twins) * (len(left_out) + missed), len(batcher.lost)), suspects


def _many(node: fx.Node) -> bool:
    """A single number is the end of the batch, not a contradiction."""
    value = node.meta["val"]
    return not isinstance(value, Tensor) or value.numel() > 1


def _track(ir: Ir, places: Mapping[str, int], keep: bool = True) -> tuple[_Tracker, dict[fx.Node, fx.Node]]:
    copy = ir.clone()
    twins = dict(zip(copy.graph.nodes, ir.graph.nodes, strict=True))
    batcher = _Tracker(copy, groups=2)
    seeds: dict[fx.Node, Layout] = {}
    for node in copy.placeholders("batch"):
        dim = places.get(role(node).name)
        if dim is None:
            continue
        value = node.meta["val"]
        shape = list(value.shape)
        shape[dim] *= batcher.groups
        batcher.plain[node] = value
        with copy.fake:
            node.meta["val"] = value.new_empty(shape)
        seeds[node] = Layout(dim)
    with _quiet():
        batcher.run(seeds)
    if keep:
        for node in copy.graph.nodes:
            twin = twins.get(node)
            if twin is None:
                continue
            note(twin, batched=False, layout=None)
            if node in batcher.lost:
                note(twin, batched=True)
            elif node in batcher.layouts:
                note(twin, batched=True, layout=batcher.layout(node))
    return batcher, twins


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A reading that does not fit makes torch log the traceback of a shape error; it is an answer here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


class _Tracker(Walk):
    """A batcher that continues where a rule refuses, and remembers which shared values met the batch."""

    def __init__(self, ir: Ir, groups: int) -> None:
        super().__init__(ir, groups)
        self.lost: set[fx.Node] = set()
        self.met: set[fx.Node] = set()

    def fuse(self, arg: fx.Node, layout: Layout) -> fx.Node:
        """As `Walk.fuse`; notes a value without groups."""
        if arg not in self.layouts:
            self.met.add(arg)
        return super().fuse(arg, layout)

    def batch_node(self, node: fx.Node) -> int:
        """As `Walk.batch_node`; a refused node, and what reads it, is lost."""
        before = node.target, node.args, node.kwargs, node.meta["val"]
        try:
            if not any(arg in self.lost for arg in node.all_input_nodes):
                return super().batch_node(node)
        except UnsupportedOp:
            node.target, node.args, node.kwargs, node.meta["val"] = before
            self.layouts.pop(node, None)
        self.lost.add(node)
        return 0
