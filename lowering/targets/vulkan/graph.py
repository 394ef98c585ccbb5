"""A serialized Vulkan graph, its indices looked up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from executorch.backends.vulkan.serialization.vulkan_graph_schema import (
    OperatorCall,
    ValueList,
    VkGraph,
    VkTensor,
)


@dataclass(frozen=True)
class Call:
    """One operator: where it stands, its name and its arguments, results last; lists of tensors are lists."""

    where: str
    name: str
    arguments: list[Any]


class Graph:
    """Operators with their arguments, tensors with the operator that first has them."""

    def __init__(self, graph: VkGraph) -> None:
        self._graph = graph
        self.calls = [
            Call(_where(index, call), call.name, [self._value(each) for each in call.args])
            for index, call in enumerate(graph.chain)
        ]

    def named(self, *names: str) -> Iterator[Call]:
        """The operators of these names, in order."""
        return (call for call in self.calls if call.name in names)

    def tensors(self) -> Iterator[tuple[str, VkTensor]]:
        """Every tensor, and where it is first an argument or result."""
        first: dict[int, str] = {}
        for index, call in enumerate(self._graph.chain):
            for each in self._leaves(call.args):
                first.setdefault(each, _where(index, call))
        for index, value in enumerate(self._graph.values):
            if isinstance(value.value, VkTensor):
                yield first.get(index, f"value {index}"), value.value

    def computed(self) -> Iterator[tuple[str, VkTensor]]:
        """The tensors that are neither constants nor what merely unpacks one, and where they are first used."""
        constants = {
            index
            for index, value in enumerate(self._graph.values)
            if isinstance(value.value, VkTensor) and value.value.constant_id >= 0
        }
        for index, call in enumerate(self._graph.chain):
            if call.name == "et_vk.prepack.default" and call.args[0] in constants:
                constants.add(call.args[-1])
                continue
            for each in self._leaves(call.args):
                value = self._graph.values[each].value
                if isinstance(value, VkTensor) and each not in constants:
                    yield _where(index, call), value

    def _value(self, index: int) -> Any:
        value: Any = self._graph.values[index].value
        return [self._value(each) for each in value.items] if isinstance(value, ValueList) else value

    def _leaves(self, indices: list[int]) -> Iterator[int]:
        for each in indices:
            value: Any = self._graph.values[each].value
            yield from self._leaves(value.items) if isinstance(value, ValueList) else [each]


def _where(index: int, call: OperatorCall) -> str:
    return f"operator {index} {call.name}"
