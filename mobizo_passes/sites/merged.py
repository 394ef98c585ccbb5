"""LoRA in the weight: the product of two stored matrices becomes, or is added to, what the batch is multiplied by."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.sites.factors import MAPS, TRANSPOSES
from mobizo_passes.sites.lora_site import (
    Candidate,
    LoRASite,
    is_named,
    module_name,
    product,
)
from mobizo_passes.sites.tracing import (
    LAYOUTS,
    REACH,
    SUMS,
    Scalings,
    Tracer,
    weight_in_sum,
)

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.linear.default)
# The same for one matrix per expert.
_STACKED = (aten.bmm.default, aten.baddbmm.default)
# Operators that multiply by [in, out]; the others by [out, in, ...].
_COLUMNS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.embedding.default)


def merged_candidates(search: Tracer) -> Iterator[Candidate]:
    """Yield a candidate for every product of two stored matrices, scaled or not, that reaches the batch as a weight."""
    for node in search.ir.graph.nodes:
        if node.op != "call_function" or node in search.batched:
            continue
        candidate = None
        if node.target in _PRODUCTS:
            candidate = _read(search, node)
        elif node.target in _STACKED:
            candidate = _per_expert(search, node)
        if candidate is not None:
            yield candidate


def _read(search: Tracer, node: fx.Node) -> Candidate | None:
    left, right = search.weight(node.args[0]), search.weight(node.args[1])
    if left is None or right is None or left[0] is right[0]:
        return None
    (a, _, before), (b, _, behind) = left, right
    shapes = [x.meta["val"].shape for x in node.all_input_nodes[:2]]
    inner = int(shapes[0][-1])
    rows, columns = node.meta["val"].shape
    if inner in (rows, columns) and (rows == inner == shapes[0][0] or columns == inner):
        # A square matrix times another scales it; it is no factor of its own.
        return None
    use = _follow(search, node)
    if use is None:
        return None
    # What a linear node multiplies by is [out, in]: B stands on the left, unless the delta was transposed.
    down, up = (a, b) if use.swapped else (b, a)
    fan_out, fan_in = (columns, rows) if use.swapped else (rows, columns)
    names = role(down).name, role(up).name
    if is_named(names[1], names[0]):
        # A table's rows are inputs to a look-up and outputs to a tied head: there the names decide.
        names, fan_in, fan_out = (names[1], names[0]), fan_out, fan_in
    scalings = [*before, *behind, *use.scalings]
    site = LoRASite(module_name(*names), *names, inner, product(scalings), fan_in, fan_out, "merged")
    if inner >= min(rows, columns) and not is_named(*names):
        reason = f"its rank {inner} is no less than its {fan_in} inputs or {fan_out} outputs"
        return Candidate(site, reason, node)
    missed = use.miss and not is_named(*names)
    return Candidate(site, f"a bottleneck of rank {inner}, but {use.miss}" if missed else "", node)


def _per_expert(search: Tracer, node: fx.Node) -> Candidate | None:
    """Read a product of two stored matrices that are cut into one block per expert, as PEFT's `target_parameters` does.

    Only names tell it from other products of weights.
    """
    found = [search.source(a)[0] for a in node.all_input_nodes[-2:]]
    if len(found) < 2 or any(x.op != "placeholder" or x.meta["val"].dim() != 2 for x in found):
        return None
    pairs = [(a, b) for a, b in (found, found[::-1]) if is_named(role(a).name, role(b).name)]
    if not pairs:
        return None
    ((down, up),) = pairs
    names = role(down).name, role(up).name
    given = arguments(node)
    alpha = given.get("alpha")
    use = _follow(search, node)
    scalings = [1.0 if alpha is None else float(alpha), *(use.scalings if use else [None])]
    rank = node.all_input_nodes[-1].meta["val"].shape[1]
    fan_in, fan_out = down.meta["val"].shape[1], up.meta["val"].shape[0]
    return Candidate(
        LoRASite(module_name(*names), *names, rank, product(scalings), fan_in, fan_out, "merged"), "", node
    )


@dataclass
class _Use:
    """How a delta gets to the batch: whether transposed, scaled by what, and what is missing for a site."""

    swapped: bool
    scalings: Scalings
    miss: str


def _follow(search: Tracer, start: fx.Node) -> _Use | None:
    """Follow a delta forward to the first operator that multiplies the batch by it."""
    queue: deque[tuple[fx.Node, bool, Scalings, bool]] = deque([(start, False, [], False)])
    seen: set[fx.Node] = set()
    other_use: _Use | None = None
    while queue and len(seen) < REACH:
        node, swapped, scalings, added = queue.popleft()
        seen.add(node)
        for user in node.users:
            if user in seen or user.op != "call_function":
                continue
            at = MAPS.get(user.target)
            if user in search.batched and at is not None and user.args[at] is not node:
                swapped ^= user.target in _COLUMNS
                if added:
                    return _Use(swapped, scalings, "")
                x: Any = user.args[at]
                more, miss = search.added(user, x, None)
                return _Use(swapped, [*scalings, *more], miss)
            if user in search.batched:
                other_use = _Use(swapped, scalings, f"its product is used by %{user.name} = {user.target}")
                continue
            passed = search.scaled(user)
            if user.target in SUMS and isinstance(user.args[1], fx.Node):
                factor = weight_in_sum(user, user.args[0] is node)
                queue.append((user, swapped, [*scalings, factor], True))
            elif passed is not None and passed[0] is node:
                queue.append((user, swapped, [*scalings, *passed[1]], added))
            elif user.target in TRANSPOSES:
                queue.append((user, not swapped, scalings, added))
            elif user.target in LAYOUTS:
                queue.append((user, swapped, scalings, added))
            else:
                # DoRA's normalization and the like: still a weight, scaled by no one number.
                queue.append((user, swapped, [*scalings, None], added))
    return other_use
