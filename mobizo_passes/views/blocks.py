"""A step program at module level: nodes grouped into blocks along the module hierarchy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx
import torch
from torch import fx

from mobizo_passes.graph.facts import facts, module_of, role
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.text import op_name, type_text
from mobizo_passes.passes.hoist_selections import selected_dim

mobizo = torch.ops.mobizo

# What is no part of the model's forward stands beside the modules, under a name of its own.
_TARGETS = {
    mobizo.noise.default: "noise",
    mobizo.noise_stack.default: "noise",
    mobizo.perturb.default: "perturb",
    mobizo.update.default: "update",
}
_CREATORS = {
    "regroup-loss": "loss",
    "append-update": "estimate",
    "append-gradients": "estimate",
    "append-optimizer": "update",
}
# What differs from query to query at first, and what reads it beside the model.
_PER_QUERY = (mobizo.perturb.default, mobizo.noise.default)
_AROUND = (mobizo.perturb.default, mobizo.update.default, mobizo.estimate.default)
STATE = ("parameter", "buffer", "constant")


@dataclass(frozen=True)
class Block:
    """Part of a graph: a module, or a part of one, or a role in the step.

    `kind` is module | operations | expand | batch | adapter | scalars | noise | perturb | loss | estimate | update.
    Blocks of kind operations are those of a module's own nodes that are computed alike, all once or all per group;
    blocks of kind expand hold the nodes that repeat a value for every group. `name` is the module's FQN, or the kind.
    `edges` are the data flow between `children`, by their indices; it has no cycle. Every input and call of the graph
    is in `nodes` of exactly one child on each level; weights stand with their first reader. `computed` is "once",
    "per group" or "both"; repeating a value is no computation, nor is what weights alone decide (``1 + weight``).
    """

    name: str
    kind: str
    nodes: tuple[fx.Node, ...] = field(repr=False)
    computed: str
    children: tuple[Block, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()

    @property
    def calls(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in self.nodes if n.op == "call_function")

    @property
    def flops(self) -> int:
        """FLOPs in one step."""
        return sum(node_flops(n) for n in self.nodes)

    @property
    def expanded_flops(self) -> int:
        """FLOPs in one step of what is computed for every group."""
        return sum(node_flops(n) for n in self.nodes if facts(n).expanded)

    @property
    def frontier(self) -> tuple[tuple[str, str], ...]:
        """Type before and after of every value that is repeated for all groups here."""
        found = (n for n in self.nodes if n.target is mobizo.expand.default and n.meta["val"].numel())
        return tuple((type_text(n.all_input_nodes[0].meta["val"]), type_text(n.meta["val"])) for n in found)

    @property
    def perturbed(self) -> tuple[fx.Node, ...]:
        """The calls that read a perturbed tensor, or a tangent: at a LoRA site, the products with its factors."""
        calls = (n for n in self.calls if n.target not in _AROUND)
        return tuple(n for n in calls if any(s.target in _PER_QUERY for s in n.all_input_nodes))

    def walk(self) -> Iterator[Block]:
        """This block and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def block_tree(ir: Ir) -> Block:
    """Group a graph's inputs and calls along the module hierarchy.

    A module whose nodes can't be one block without a cycle between blocks (one that is called twice, say) is several.
    """
    owners = _owners(ir)
    order = {node: place for place, node in enumerate(ir.graph.nodes)}
    nodes = sorted(owners, key=order.__getitem__)
    modules = [owner.path for owner in owners.values() if owner.role == "module"]
    wrapper = _common(modules)
    children, edges = _split(nodes, owners, wrapper, top=True)
    return Block(".".join(wrapper), "step", tuple(nodes), _computed(nodes, owners), children, edges)


def block_graph(root: Block, depth: int | None = None) -> networkx.DiGraph:
    """Return the blocks `depth` levels below the root (None: the lowest) as an acyclic graph.

    Node attributes: `name`, `kind`, `computed`, `flops` and `expanded_flops` (int), `expanded_share` (0 to 1, of its
    FLOPs), `nodes` (how many), `members` (list of node names), `frontier` (list of type pairs), `perturbed` (how many
    of them read a perturbed tensor).
    """
    cut = list(_cut(root, depth))
    graph = networkx.DiGraph()
    place: dict[fx.Node, int] = {}
    for number, block in enumerate(cut):
        flops, expanded = block.flops, block.expanded_flops
        graph.add_node(
            number, name=block.name, kind=block.kind, computed=block.computed, flops=flops, expanded_flops=expanded,
            expanded_share=expanded / flops if flops else 0.0, nodes=len(block.nodes),
            members=[n.name for n in block.nodes], frontier=list(block.frontier), perturbed=len(block.perturbed),
        )  # fmt: skip
        place.update(dict.fromkeys(block.nodes, number))
    for node, number in place.items():
        graph.add_edges_from((place[s], number) for s in _sources(node) if place[s] != number)
    return graph


def signature(block: Block) -> tuple[Any, ...]:
    """What two blocks must share to be called repetitions of each other: all but names and values of weights."""
    depth = len(_parts(block.name))

    def row(node: fx.Node) -> tuple[Any, ...]:
        origin = _parts(module_of(node))[depth:]
        return op_name(node), type_text(node.meta.get("val")), facts(node).expanded, origin

    return pattern(block.name), block.kind, tuple(row(n) for n in block.calls)


def pattern(name: str) -> str:
    """A module's FQN without its own position in a list."""
    return re.sub(r"\.\d+$", ".*", name)


def fold_runs(block: Block) -> list[tuple[Block, ...]]:
    """Group a block's children: repetitions that follow each other directly are one group, all others are alone."""
    graph = networkx.DiGraph(block.edges)
    graph.add_nodes_from(range(len(block.children)))
    runs: list[list[int]] = []
    last: dict[str, tuple[list[int], tuple[Any, ...]]] = {}
    for number, child in enumerate(block.children):
        key, mark = pattern(child.name), signature(child)
        run, previous = last.get(key, (None, None))
        if (
            child.kind == "module"
            and key != child.name
            and run is not None
            and mark == previous
            # Nothing may stand between them: folding would then bend the flow into a circle.
            and not networkx.descendants(graph, run[-1]) & networkx.ancestors(graph, number)
        ):
            run.append(number)
        else:
            run = [number]
            runs.append(run)
        last[key] = (run, mark)
    return [tuple(block.children[i] for i in run) for run in runs]


_Groups = list[tuple[tuple[str, str], list[fx.Node]]]


@dataclass(frozen=True)
class _Owner:
    role: str
    path: tuple[str, ...]
    # Whether weights alone decide the value.
    fixed: bool = False


def _parts(name: str) -> tuple[str, ...]:
    # `layers.3` is one step down: a list of modules is no module that computes anything.
    return tuple(re.findall(r"[^.]+(?:\.\d+)*", name))


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    if not paths:
        return ()
    low, high = min(paths), max(paths)
    same = 0
    while same < min(len(low), len(high)) and low[same] == high[same]:
        same += 1
    return low[:same]


def _owners(ir: Ir) -> dict[fx.Node, _Owner]:
    """Role and module path of every input and call."""
    owners: dict[fx.Node, _Owner] = {}
    # Backwards: a repeated or hoisted value belongs to its readers, whose owners must be known.
    for node in reversed(list(ir.graph.nodes)):
        if node.op == "output":
            continue
        readers = [owners[user] for user in node.users if user in owners]
        if node.op == "placeholder":
            kind = role(node).kind
            if kind not in STATE:
                owners[node] = _Owner(kind if kind in ("batch", "adapter") else "scalars", ())
            elif node.users:
                owners[node] = owners[min(node.users)]
        elif readers and (node.target is mobizo.expand.default or _hoisted(node)):
            roles = {owner.role for owner in readers}
            part = roles.pop() if len(roles) == 1 else "module"
            owners[node] = _Owner(part, _common([owner.path for owner in readers]))
        else:
            part = _TARGETS.get(node.target) or _CREATORS.get(facts(node).made_by, "module")
            owners[node] = _Owner(part, _parts(module_of(node)) if part == "module" else ())
    for node in ir.graph.nodes:
        sources = _sources(node)
        if node.op == "call_function" and all(owners[s].fixed for s in sources):
            owners[node] = replace(owners[node], fixed=True)
    return owners


def _hoisted(node: fx.Node) -> bool:
    # Its own origin is where it was written, below all that it has moved above.
    return facts(node).made_by == "hoist-selections" and selected_dim(node) is not None


def _sources(node: fx.Node) -> list[fx.Node]:
    """Where a node's data comes from: weights are no data flow."""
    return [n for n in node.all_input_nodes if n.op != "placeholder" or role(n).kind not in STATE]


def _split(
    nodes: Sequence[fx.Node], owners: dict[fx.Node, _Owner], path: tuple[str, ...], top: bool = False
) -> tuple[tuple[Block, ...], tuple[tuple[int, int], ...]]:
    """Cut the nodes of one module into children without a cycle between them."""
    depth = len(path)

    def key(node: fx.Node) -> tuple[str, str]:
        owner = owners[node]
        if owner.role != "module":
            return owner.role, owner.role
        if len(owner.path) > depth:
            return "module", owner.path[depth]
        if node.target is mobizo.expand.default:
            return "expand", ""
        if owner.fixed:
            # With what it is for, so that no block looks shared on its account.
            expanded = any(facts(user).expanded for user in node.users)
        else:
            expanded = facts(node).expanded
        return "operations", "expanded" if expanded else ""

    calls = [n for n in nodes if not _is_state(n)]
    groups, edges = _in_order(*_acyclic(calls, key))
    place = {node: number for number, (_, members) in enumerate(groups) for node in members}
    for node in nodes:
        if _is_state(node):
            number = place[min(user for user in node.users if user in place)]
            groups[number][1].append(node)
    children = []
    for (kind, name), members in groups:
        fqn = (
            ".".join((*path, name))
            if kind == "module"
            else ".".join(path)
            if kind in ("operations", "expand")
            else kind
        )
        children.append(_block(fqn, kind, members, owners, (*path, name)))
    return tuple(children), tuple(sorted(edges))


def _block(fqn: str, kind: str, members: list[fx.Node], owners: dict[fx.Node, _Owner], path: tuple[str, ...]) -> Block:
    if kind != "module":
        return Block(fqn, kind, tuple(members), _computed(members, owners))
    children, edges = _split(members, owners, path)
    if len(children) == 1:
        # A chain of modules with one child each is one block, under the outermost name.
        (only,) = children
        kind = "expand" if only.kind == "expand" else kind
        children, edges = only.children, only.edges
    return Block(fqn, kind, tuple(members), _computed(members, owners), children, edges)


def _computed(nodes: Sequence[fx.Node], owners: dict[fx.Node, _Owner]) -> str:
    calls = [n for n in nodes if n.op == "call_function" and n.target is not mobizo.expand.default]
    marks = {facts(n).expanded for n in calls if not owners[n].fixed}
    return "both" if len(marks) == 2 else "per group" if True in marks else "once"


def _is_state(node: fx.Node) -> bool:
    return node.op == "placeholder" and role(node).kind in STATE


def _acyclic(
    nodes: Sequence[fx.Node], key: Callable[[fx.Node], tuple[str, str]]
) -> tuple[_Groups, set[tuple[int, int]]]:
    """Group nodes, given in execution order, by key; a key gets a further group where one would close a cycle."""
    groups: _Groups = []
    quotient = networkx.DiGraph()
    by_key: dict[tuple[str, str], list[int]] = {}
    place: dict[fx.Node, int] = {}
    for node in nodes:
        before = {place[s] for s in _sources(node) if s in place}
        own = by_key.setdefault(key(node), [])
        for number in reversed(own):
            if not any(p != number and networkx.has_path(quotient, number, p) for p in before):
                break
        else:
            number = len(groups)
            groups.append((key(node), []))
            own.append(number)
            quotient.add_node(number)
        groups[number][1].append(node)
        place[node] = number
        quotient.add_edges_from((p, number) for p in before if p != number)
    return groups, set(quotient.edges)


def _in_order(groups: _Groups, edges: set[tuple[int, int]]) -> tuple[_Groups, set[tuple[int, int]]]:
    """Number groups so that every edge goes up; where nothing decides, in the order of their first nodes."""
    graph = networkx.DiGraph(edges)
    graph.add_nodes_from(range(len(groups)))
    order = list(networkx.lexicographical_topological_sort(graph))
    new = {old: place for place, old in enumerate(order)}
    return [groups[old] for old in order], {(new[a], new[b]) for a, b in edges}


def _cut(block: Block, depth: int | None) -> Iterator[Block]:
    if not block.children or depth == 0:
        yield block
        return
    for child in block.children:
        yield from _cut(child, None if depth is None else depth - 1)
