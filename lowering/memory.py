"""What a method holds in memory while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.operators import operation_name

_TURNS = ("permute_copy", "permute", "transpose", "t")


@dataclass(frozen=True)
class DelegateMemory:
    """What one method and its delegates hold, in bytes.

    `mapped`: constants outside of delegates, and those that a delegate reads where they are: the mapped file has them.
    `held`: weights inside of delegates, once for each product that reads them: what XNNPACK packs when it is loaded.
    `sources`: the same weights, once: what it packs them from, in memory until it has.
    `live`: the most that their values take at one moment, by the order of the calls, with the copy that a product packs
    of a factor that is not held; a delegate that works in place needs less. `saved`: the values that a gradient reads
    again, at the moment in which it begins; 0 without a gradient.
    """

    mapped: int = 0
    held: int = 0
    sources: int = 0
    live: int = 0
    saved: int = 0


def delegate_memory(edge: ExportedProgram) -> DelegateMemory:
    """Read it off one partitioned edge program."""
    held = sources = live = saved = 0
    for node in edge.graph.nodes:
        if node.op != "call_function" or operation_name(node) != "executorch_call_delegate":
            continue
        module: Any = node.args[0]
        inner: ExportedProgram = getattr(edge.graph_module, module.target).original_module
        constants = _constants(inner)
        held += sum(_bytes(each) * max(1, _products(each)) for each in constants)
        sources += sum(map(_bytes, constants))
        most, before = _alive(list(inner.graph.nodes), constants)
        live, saved = max(live, most), saved + before
    return DelegateMemory(sum(map(_bytes, _constants(edge))), held, sources, live, saved)


def _constants(program: ExportedProgram) -> set[Node]:
    user = set(program.graph_signature.user_inputs)
    return {node for node in program.graph.nodes if node.op == "placeholder" and node.name not in user and node.users}


def _alive(nodes: list[Node], constants: set[Node]) -> tuple[int, int]:
    """The most bytes alive at one moment, and those alive from before the first node of a gradient to after it."""
    place = {node: number for number, node in enumerate(nodes)}
    calls = [node for node in nodes if node.op == "call_function"]
    results = set(nodes[-1].all_input_nodes)
    first = next((place[node] for node in calls if facts(node).made_by == "append-gradients"), len(nodes))
    ends: dict[int, list[Node]] = {}
    now = most = saved = 0
    for node in calls:
        now += _bytes(node)
        most = max(most, now + _packed_anew(node, constants))
        last = max((place[user] for user in node.users), default=place[node])
        # A result is written to the caller's memory.
        if node in results:
            now -= _bytes(node)
        else:
            ends.setdefault(last, []).append(node)
            saved += _bytes(node) if place[node] < first <= last else 0
        now -= sum(_bytes(each) for each in ends.pop(place[node], ()))
    return most, saved


def _products(constant: Node) -> int:
    """How many products read the constant as their second factor, as it is or turned."""
    return sum(_products(user) if _turns(user) else int(_second_factor(user) is constant) for user in constant.users)


def _packed_anew(node: Node, constants: set[Node]) -> int:
    """Bytes of the second factor, if it is no constant: XNNPACK brings it into its own layout at each call."""
    factor = _second_factor(node)
    source = factor
    while source is not None and _turns(source):
        source = source.all_input_nodes[0]
    return 0 if factor is None or source in constants else _bytes(factor)


def _turns(node: Node) -> bool:
    # A constant that was folded may have the name of what it was.
    return node.op == "call_function" and operation_name(node) in _TURNS


def _second_factor(node: Node) -> Node | None:
    factor: Any = node.args[1] if node_flops(node) and len(node.args) > 1 else None
    return factor if isinstance(factor, Node) else None


def _bytes(node: Node) -> int:
    value: Any = node.meta.get("val")
    several: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return sum(each.numel() * each.element_size() for each in several if isinstance(each, torch.Tensor))
