"""What of a block tree is shown, and in which words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import networkx
import torch
from torch import fx

from mobizo_passes.graph.facts import facts, role
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.text import op_name
from mobizo_passes.views.blocks import Block, fold_runs, pattern

mobizo = torch.ops.mobizo

# How often one kind of layer is shown with its inside.
_UNFOLDED = 3
_SHORT = {"scaled_dot_product_attention": "attention", "cross_entropy_loss": "cross entropy"}


@dataclass
class Chip:
    """A product inside a LoRA site.

    `expanded` if it is computed per group, `repeated` if its value is repeated after it, `low_rank` on the way to, or
    at, a perturbed factor.
    """

    label: str
    expanded: bool
    repeated: bool
    low_rank: bool


@dataclass
class View:
    """A box to draw: a block, or a run of equal blocks of which the first is shown.

    `shape` is box | site | frame | expand | glue; `edges` connect `children` by index.
    """

    run: tuple[Block, ...]
    shape: str
    label: str
    children: list[View] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    chips: list[Chip] = field(default_factory=list)
    detail: str = ""

    @property
    def block(self) -> Block:
        return self.run[0]

    @property
    def flops(self) -> int:
        return sum(block.flops for block in self.run)

    def rows(self) -> list[list[Chip]]:
        """The chips of the frozen map, then those of the low-rank one."""
        rows = [[c for c in self.chips if c.low_rank is low] for low in (False, True)]
        return [row for row in rows if row]

    def walk(self) -> list[View]:
        return [self, *(each for child in self.children for each in child.walk())]


def view_of(root: Block) -> View:
    """Choose what is shown of a step program's blocks."""
    shown: Counter[str] = Counter()
    view = View((root,), "frame", "")
    view.children, view.edges = _children(root, root.name, shown)
    while (big := _dissolvable(view)) is not None:
        _dissolve(view, big)
    return view


def _children(block: Block, above: str, shown: Counter[str]) -> tuple[list[View], list[tuple[int, int]]]:
    runs = fold_runs(block)
    place = {id(child): number for number, run in enumerate(runs) for child in run}
    pairs = {(place[id(block.children[a])], place[id(block.children[b])]) for a, b in block.edges}
    return [_view(run, above, shown) for run in runs], sorted((a, b) for a, b in pairs if a != b)


def _view(run: tuple[Block, ...], above: str, shown: Counter[str]) -> View:
    block = run[0]
    label = _label(run, above)
    if block.kind == "expand":
        return View(run, "expand", "expand", detail=" · ".join(f"{a} → {b}" for a, b in dict.fromkeys(block.frontier)))
    if block.kind == "operations":
        return View(run, "box" if block.flops else "glue", label)
    if _is_site(block):
        return View(run, "site", label, chips=_chips(block))
    if block.children and (block.perturbed or block.computed == "both"):
        kind = pattern(block.name)
        if kind == block.name or shown[kind] < _UNFOLDED:
            shown[kind] += kind != block.name
            view = View(run, "frame", label)
            view.children, view.edges = _children(block, block.name, shown)
            return view
    if block.kind == "batch":
        return View(run, "box", "batch", detail=", ".join(role(n).name for n in block.nodes))
    if block.kind == "loss":
        return View(run, "box", "loss", detail=operations(block))
    if block.children:
        names = dict.fromkeys(_label((c,), block.name) for c in block.children if c.kind == "module")
        return View(run, "box", label, detail=" · ".join(names))
    return View(run, "box", label)


def _is_site(block: Block) -> bool:
    """Whether this is one LoRA: nothing inside but its factors, each perturbed one on the way to the last."""
    inner = [grandchild for child in block.children for grandchild in child.children]
    if any(each.kind not in ("operations", "expand") for each in inner):
        return False
    products = block.perturbed
    return bool(products) and set(products) <= _leading_to(block, {products[-1]})


def _leading_to(block: Block, ends: set[fx.Node]) -> set[fx.Node]:
    """The block's calls from which one of `ends` is reached, and these."""
    found = set(ends)
    for node in reversed(block.calls):
        if found & set(node.users):
            found.add(node)
    return found


def _label(run: tuple[Block, ...], above: str) -> str:
    block = run[0]
    if block.kind == "operations":
        return operations(block)
    name = block.name.removeprefix(above).removeprefix(".") if block.kind == "module" else block.kind
    if len(run) > 1:
        name += f"–{run[-1].name.rpartition('.')[2]}"
    return name


def operations(block: Block) -> str:
    """The names of a block's operations, what costs FLOPs first, without those that only rename."""
    calls = sorted(block.calls, key=lambda n: node_flops(n) == 0)
    names = [op_name(n).rpartition(".")[2].strip("_") for n in calls]
    moved = {"reshape", "transpose", "view", "getitem", "unsqueeze", "squeeze", "to_copy", "permute", "slice", "expand"}
    names = list(dict.fromkeys(_SHORT.get(n, n) for n in names if n not in moved)) or list(dict.fromkeys(names))
    return ", ".join(names[:2]) + ("" if len(names) <= 2 else f" +{len(names) - 2}")


def _chips(block: Block) -> list[Chip]:
    chips = []
    low = _leading_to(block, set(block.perturbed))
    for node in block.calls:
        if not node_flops(node):
            continue
        repeated = any(user.target is mobizo.expand.default for user in node.users)
        label = _factor(node, block.name) or op_name(node).rpartition(".")[2]
        chips.append(Chip(label, facts(node).expanded, repeated, node in low))
    return chips


def _factor(node: fx.Node, site: str) -> str:
    """The part of a weight's FQN that tells it from the site's other weights."""
    for operand in node.all_input_nodes[1:2]:
        source = operand
        while source.op != "placeholder" and source.all_input_nodes and source.target is not mobizo.expand.default:
            if facts(source).noise_of:
                break
            source = source.all_input_nodes[0]
        drawn = facts(source).noise_of
        if drawn:
            return f"z_{_short(drawn, site)}"
        if source.op == "placeholder" and role(source).kind != "batch":
            return _short(role(source).name, site)
    return ""


def _short(fqn: str, site: str) -> str:
    parts = [p for p in fqn.removeprefix(site).strip(".").split(".") if p not in ("weight", "default")] or ["weight"]
    return parts[-1].removeprefix("lora_").removesuffix("_layer")


def _dissolvable(view: View) -> int | None:
    """A frame around a list of layers that holds nearly all of the model tells nothing."""
    total = sum(len(c.block.calls) for c in view.children if c.block.kind in ("module", "operations", "expand"))
    for number, child in enumerate(view.children):
        listed = sum(len(c.run) for c in child.children if pattern(c.block.name) != c.block.name)
        if child.shape == "frame" and listed > 1 and 4 * len(child.block.calls) > 3 * total:
            return number
    return None


def _dissolve(view: View, number: int) -> None:
    inner = view.children[number]
    base = len(view.children)
    place = {node: base + i for i, c in enumerate(inner.children) for block in c.run for node in block.nodes}
    edges = [(a, b) for a, b in view.edges if number not in (a, b)]
    edges += [(base + a, base + b) for a, b in inner.edges]
    outer = {node: i for i, c in enumerate(view.children) if i != number for block in c.run for node in block.nodes}
    every = {**outer, **place}
    for node, target in every.items():
        for source in node.all_input_nodes:
            if source in every and (source in outer) != (node in outer) and not _weight(source):
                edges.append((every[source], target))
    views = [*view.children, *inner.children]
    kept = [i for i in range(len(views)) if i != number]
    graph = networkx.DiGraph(edges)
    graph.add_nodes_from(kept)
    order = list(networkx.lexicographical_topological_sort(graph))
    new = {old: place for place, old in enumerate(order)}
    view.children = [views[i] for i in order]
    view.edges = sorted({(new[a], new[b]) for a, b in edges})


def _weight(node: fx.Node) -> bool:
    return node.op == "placeholder" and role(node).kind in ("parameter", "buffer", "constant")
