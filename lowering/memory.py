"""What a method holds in memory while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.operators import operation_name


@dataclass(frozen=True)
class DelegateMemory:
    """What the delegates of one method hold, in bytes.

    `held`: weights inside of them, once for each product that reads them: what XNNPACK packs when it is loaded. `live`:
    the most that their values take at one moment, by the order of the calls; a delegate that works in place needs less.
    `saved`: the values that a gradient reads again, at the moment in which it begins; 0 without a gradient.
    """

    held: int = 0
    live: int = 0
    saved: int = 0


def delegate_memory(edge: ExportedProgram) -> DelegateMemory:
    """Read it off one partitioned edge program."""
    held = live = saved = 0
    for node in edge.graph.nodes:
        if node.op != "call_function" or operation_name(node) != "executorch_call_delegate":
            continue
        module: Any = node.args[0]
        inner: ExportedProgram = getattr(edge.graph_module, module.target).original_module
        user = set(inner.graph_signature.user_inputs)
        held += sum(_bytes(each) for each in inner.graph.nodes if each.op == "placeholder" and each.name not in user)
        most, before = _alive(list(inner.graph.nodes))
        live, saved = max(live, most), saved + before
    return DelegateMemory(held, live, saved)


def _alive(nodes: list[Node]) -> tuple[int, int]:
    """The most bytes alive at one moment, and those alive from before the first node of a gradient to after it."""
    place = {node: number for number, node in enumerate(nodes)}
    calls = [node for node in nodes if node.op == "call_function"]
    results = set(nodes[-1].all_input_nodes)
    first = next((place[node] for node in calls if facts(node).made_by == "append-gradients"), len(nodes))
    ends: dict[int, list[Node]] = {}
    now = most = saved = 0
    for node in calls:
        now += _bytes(node)
        most = max(most, now)
        last = max((place[user] for user in node.users), default=place[node])
        # A result is written to the caller's memory.
        if node in results:
            now -= _bytes(node)
        else:
            ends.setdefault(last, []).append(node)
            saved += _bytes(node) if place[node] < first <= last else 0
        now -= sum(_bytes(each) for each in ends.pop(place[node], ()))
    return most, saved


def _bytes(node: Node) -> int:
    value: Any = node.meta.get("val")
    several: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return sum(each.numel() * each.element_size() for each in several if isinstance(each, torch.Tensor))
