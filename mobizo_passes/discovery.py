"""Candidates for LoRA sites on the captured graph, by structure and by parameter name.

By structure, a site is two linear maps in sequence through a narrower middle whose output, scaled or not, is added to
another map of the same input; or the product of two stored matrices that is added to a stored weight.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .factors import MAPS, TRANSPOSES, Factor, as_factor, literal, stored
from .ir import Ir

aten = torch.ops.aten

# (down, up) parameter names of PEFT, torchtune, diffusers and the original loralib.
_CONVENTIONS = (
    (re.compile(r"(^|\.)lora_A(\.[^.]+)?(\.weight)?$"), re.compile(r"(^|\.)lora_B(\.[^.]+)?(\.weight)?$")),
    (re.compile(r"(^|\.)lora_embedding_A(\.[^.]+)?$"), re.compile(r"(^|\.)lora_embedding_B(\.[^.]+)?$")),
    (re.compile(r"(^|\.)lora_a(\.weight)?$"), re.compile(r"(^|\.)lora_b(\.weight)?$")),
    (re.compile(r"(^|\.)lora\.down(\.weight)?$"), re.compile(r"(^|\.)lora\.up(\.weight)?$")),
)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
_SAME = (aten.dropout.default, aten._to_copy.default, aten.clone.default, aten.neg.default)
_LAYOUTS = (
    *TRANSPOSES, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int, aten._unsafe_view.default,
)  # fmt: skip
_PARTS = (
    aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, operator.getitem,
)  # fmt: skip
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
# A sum reaches further back than any real layer; the search stops here.
_REACH = 64


@dataclass(frozen=True)
class LoRASite:
    """One low-rank update ``y += scaling · (x Aᵀ) Bᵀ``.

    `name` is the module's FQN, `lora_A` and `lora_B` are the FQNs of the factors. `scaling` is None if it is no number
    known at compile time. `in_features` and `out_features` count features, channels, or rows of an embedding. `kind` is
    linear, embedding, conv1d, conv2d, conv3d, or merged: B A is added to a stored weight before the product.
    """

    name: str
    lora_A: str  # noqa: N815  the field's own names
    lora_B: str  # noqa: N815
    rank: int
    scaling: float | None
    in_features: int
    out_features: int
    kind: str = "linear"


@dataclass(frozen=True)
class Candidate:
    """A possible site; `reason` says why it is not taken, empty if it is."""

    site: LoRASite
    reason: str


@dataclass(frozen=True)
class _Walk:
    """Nodes passed on the way from one linear map to another: their factors, and the first that is not linear."""

    end: fx.Node
    scalings: tuple[float | None, ...] = ()
    bent: fx.Node | None = None


def is_up(fqn: str) -> bool:
    """Return whether a parameter carries a conventional name of lora_B."""
    return any(up.search(fqn) for _, up in _CONVENTIONS)


class Candidates:
    """The search, over one graph."""

    def __init__(self, ir: Ir) -> None:
        self._ir = ir
        self._factors: dict[fx.Node, Factor] = {f.node: f for n in ir.graph.nodes if (f := as_factor(n)) is not None}
        self._batched: set[fx.Node] = set(ir.placeholders("batch"))
        for node in ir.graph.nodes:
            if any(a in self._batched for a in node.all_input_nodes):
                self._batched.add(node)

    def all(self) -> list[Candidate]:
        """Return one candidate per pair of weights, in graph order; where uses differ, the one that is taken."""
        best: dict[tuple[str, str], Candidate] = {}
        for found in self._search():
            key = found.site.lora_A, found.site.lora_B
            if key not in best or (best[key].reason and not found.reason):
                best[key] = found
        return list(best.values())

    def _search(self) -> Iterator[Candidate]:
        for up in self._factors.values():
            if up.kind == "embedding":
                continue
            if stored(up.x) is not None:
                merged = self._merged(up)
                if merged is not None:
                    yield merged
                continue
            walk = self._back(up.x)
            down = self._factors.get(walk.end)
            if down is not None and down.fqn != up.fqn:
                candidate = self._judge(down, up, walk)
                if candidate is not None:
                    yield candidate

    def _back(self, node: fx.Node) -> _Walk:
        """Walk up from an operand through scalings, layouts and inactive dropout, and at most one bent node."""
        scalings: list[float | None] = []
        bent: fx.Node | None = None
        while node.op == "call_function" and node not in self._factors:
            step = self._scaled(node)
            if step is not None:
                node, factors = step
                scalings += factors
            elif node.target in _LAYOUTS:
                node = node.all_input_nodes[0]
            elif bent is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                batched = [a for a in node.all_input_nodes if a in self._batched]
                if len(batched) != 1:
                    break
                bent, node = node, batched[0]
            else:
                break
        return _Walk(node, tuple(scalings), bent)

    def _scaled(self, node: fx.Node) -> tuple[fx.Node, list[float | None]] | None:
        """Read a node as its operand times something that does not depend on the batch."""
        if node.target in _SAME:
            return node.all_input_nodes[0], [-1.0] if node.target is aten.neg.default else []
        if node.target not in (*_PRODUCTS, *_QUOTIENTS) or not node.all_input_nodes:
            return None
        left, right = node.args[:2]
        if (
            node.target in _PRODUCTS
            and isinstance(right, fx.Node)
            and (not isinstance(left, fx.Node) or (right in self._batched and left not in self._batched))
        ):
            left, right = right, left
        if not isinstance(left, fx.Node) or right in self._batched:
            return None
        value = literal(right, self._ir.state) if isinstance(right, fx.Node) else float(right)  # type: ignore[arg-type]
        if value is not None and node.target in _QUOTIENTS:
            value = 1 / value if value else None
        return left, [value]

    def _judge(self, down: Factor, up: Factor, walk: _Walk) -> Candidate | None:
        (fan_in, rank), (_, fan_out) = down.sizes, up.sizes
        named = any(low.search(down.fqn) and high.search(up.fqn) for low, high in _CONVENTIONS)
        narrow = rank < min(fan_in, fan_out)
        scalings, miss = self._added(up.node, down.x, up.bias)
        kind = down.kind if down.kind != "linear" else up.kind
        site = LoRASite(
            _module_name(down.fqn, up.fqn), down.fqn, up.fqn, rank,
            _product([*walk.scalings, *scalings]), fan_in, fan_out, kind,
        )  # fmt: skip
        if walk.bent is not None:
            if not narrow and not named:
                return None
            return Candidate(site, f"%{walk.bent.name} = {walk.bent.target} stands between its two linear maps")
        if named:
            return Candidate(site, "")
        if miss:
            return Candidate(site, f"a bottleneck of rank {rank}, but {miss}") if narrow else None
        if not narrow:
            return Candidate(site, f"its rank {rank} is no less than its {fan_in} inputs or {fan_out} outputs")
        return Candidate(site, "")

    def _added(self, output: fx.Node, x: fx.Node, bias: fx.Node | None) -> tuple[list[float | None], str]:
        """Follow the output to a sum with another map of the same input: the scalings passed, and what is missing."""
        source, before = self._source(x)
        miss = "its output is not added to another path"
        if bias is not None and bias in self._batched:
            if self._maps(bias, source) is not None:
                return [*before], ""
            miss = _not_beside(bias, source)
        queue: list[tuple[fx.Node, list[float | None]]] = [(output, [])]
        seen: set[fx.Node] = set()
        while queue and len(seen) < _REACH:
            node, scalings = queue.pop(0)
            seen.add(node)
            for user in node.users:
                if user in seen:
                    continue
                passed = self._scaled(user)
                if user.target in _SUMS and isinstance(user.args[1], fx.Node):
                    first = user.args[0] is node
                    other: Any = user.args[1] if first else user.args[0]
                    factor = _weight_in_sum(user, first)
                    base = self._maps(other, source)
                    if base is not None:
                        return [*scalings, factor, *(before if base != before else [])], ""
                    miss = (
                        f"its output is added to %{other.name}, which is no linear map of the same input %{source.name}"
                    )
                    if other is source:
                        miss = f"its output is added to its own input %{source.name}, not to another map of it"
                    queue.append((user, [*scalings, factor]))
                elif passed is not None and passed[0] is node:
                    queue.append((user, [*scalings, *passed[1]]))
                elif user.target in (*_LAYOUTS, *_PARTS):
                    queue.append((user, scalings))
                elif user.target is aten.addmm.default and user.args[0] is node:
                    base_x: Any = user.args[1]
                    if self._source(base_x)[0] is source:
                        return [*scalings, *before], ""
        # Without a sum, the scalings up to the next operator that is none are still the site's own.
        return self._trailing(output), miss

    def _trailing(self, node: fx.Node) -> list[float | None]:
        scalings: list[float | None] = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            passed = self._scaled(user)
            if passed is None or passed[0] is not node:
                break
            scalings += passed[1]
            node = user
        return scalings

    def _source(self, node: fx.Node) -> tuple[fx.Node, list[float | None]]:
        """Return the value that a map reads, without scalings and layouts, and those scalings."""
        scalings: list[float | None] = []
        while node.op == "call_function":
            step = self._scaled(node)
            if step is not None:
                node = step[0]
                scalings += step[1]
            elif node.target in _LAYOUTS:
                node = node.all_input_nodes[0]
            else:
                break
        return node, scalings

    def _maps(self, node: fx.Node, source: fx.Node) -> list[float | None] | None:
        """Search a sum's other operand for a linear map of `source`; returns the scalings of that map's input."""
        queue, seen = [node], set()
        while queue and len(seen) < _REACH:
            current = queue.pop(0)
            if current in seen or current.op != "call_function":
                continue
            seen.add(current)
            if current.target in MAPS:
                x: Any = current.args[MAPS[current.target]]
                found, scalings = self._source(x)
                if found is source:
                    return scalings
                if current.target is aten.addmm.default:
                    queue.append(current.args[0])  # type: ignore[arg-type]
            elif current.target in (*_LAYOUTS, *_PARTS, *_SUMS, *_SAME, *_PRODUCTS, *_QUOTIENTS):
                queue += current.all_input_nodes
        return None

    def _merged(self, product: Factor) -> Candidate | None:
        """Read the product of two stored matrices as a weight: the delta of a stored one, or one beside it."""
        left = stored(product.x)
        if left is None or left[0] is product.weight:
            return None
        inner = left[0].meta["val"].shape[0 if left[1] else 1]
        rows, columns = product.node.meta["val"].shape
        node, scalings, swapped, weight, miss = product.node, [], False, None, ""
        while node not in self._batched:
            if len(node.users) != 1:
                return None
            user = next(iter(node.users))
            passed = self._scaled(user)
            if user.target in _SUMS and weight is None and isinstance(user.args[1], fx.Node):
                first = user.args[0] is node
                other: Any = user.args[1] if first else user.args[0]
                weight = stored(other)
                if weight is None:
                    return None
                scalings.append(_weight_in_sum(user, first))
            elif passed is not None and passed[0] is node:
                scalings += passed[1]
            elif user.target in TRANSPOSES:
                swapped = not swapped
            elif user.target in MAPS and user in self._batched:
                swapped ^= user.target is not aten.linear.default
                if weight is None:
                    x: Any = user.args[MAPS[user.target]]
                    more, miss = self._added(user, x, None)
                    scalings += more
            else:
                return None
            node = user
        # What a linear node multiplies by is [out, in]: B stands on the left, unless the delta was transposed.
        down, up = (left[0], product.weight) if swapped else (product.weight, left[0])
        fan_out, fan_in = (columns, rows) if swapped else (rows, columns)
        a, b = down.meta["input"].name, up.meta["input"].name
        site = LoRASite(_module_name(a, b), a, b, inner, _product(scalings), fan_in, fan_out, "merged")
        if inner >= min(rows, columns):
            return Candidate(site, f"its rank {inner} is no less than its {fan_in} inputs or {fan_out} outputs")
        return Candidate(site, f"a bottleneck of rank {inner}, but {miss}" if miss else "")


def _not_beside(other: fx.Node, source: fx.Node) -> str:
    if other is source:
        return f"its output is added to its own input %{source.name}, not to another map of it"
    return f"its output is added to %{other.name}, which is no linear map of the same input %{source.name}"


def _weight_in_sum(node: fx.Node, first: bool) -> float:
    """The factor that a sum, or difference, gives one of its operands."""
    alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if first:
        return 1.0
    return -float(alpha) if node.target is aten.sub.Tensor else float(alpha)


def _product(factors: list[float | None]) -> float | None:
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result


def _module_name(a: str, b: str) -> str:
    for low, high in _CONVENTIONS:
        if low.search(a) and high.search(b):
            return high.sub("", b) or b
    shared = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared) or b
