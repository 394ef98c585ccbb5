"""The checker of serialized Vulkan programs: each rule catches a program that breaks it, and names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
from executorch.backends.vulkan.serialization import vulkan_graph_schema as vk
from executorch.backends.vulkan.serialization.vulkan_graph_serialize import serialize_vulkan_graph
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch.export import ExportedProgram

from lowering.errors import RuleBroken
from lowering.targets.vulkan.checker import check_delegates, check_graph, check_signature, read
from lowering.targets.vulkan.partitioner import tried_fusions_only
from lowering.targets.vulkan.rules import RULES
from tests.lowering.passkit import Fn, export

IDS = torch.tensor([[1, 2, 0]])
X = torch.rand(2, 3, 4)


def unguarded(module: torch.nn.Module, *inputs: torch.Tensor, **options: Any) -> ExportedProgram:
    """Lowered with ExecuTorch's partitioner as it comes."""
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    partitioner = VulkanPartitioner(options)
    with tried_fusions_only():  # for speed: the rest is as it comes
        edge = to_edge_transform_and_lower(export(module, inputs), partitioner=[partitioner], compile_config=config)
    return edge.exported_program()


class Embedded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


# What the stock partitioner delegates, and the rule that forbids it.
BROKEN: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "positive-axis": (lambda _, x, i: torch.gather(x, -1, i), (X[0], IDS.repeat(3, 1))),
    "no-logical-not": (lambda _, x: torch.where((x > 0.5).logical_not(), x, -x), (X,)),
    "no-integer-comparison": (lambda _, a, b, x: torch.where(a == b, x, -x), (IDS, IDS + 0, X[0, :1, :3])),
    "short-tables": (lambda m, i: torch.index_select(m.table, 0, i), (IDS[0],)),
    "no-0-dim": (lambda _, x, s: x * s + 1.0, (X, torch.tensor(2.0))),
    "rank": (lambda _, x: x.reshape(1, 2, 3, 2, 2) * 2.0, (X,)),
    "no-exact-gelu": (lambda _, x: torch.nn.functional.gelu(x), (X,)),
    "last-axis": (lambda _, x: x.mean(1, keepdim=True), (X,)),
    "no-integer-arithmetic": (lambda _, i: i * 3 + 1, (IDS,)),
    "known-operators": (lambda _, x: torch.flip(x, [0]), (X,)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_program_that_breaks_a_rule_is_caught(name: str):
    function, inputs = BROKEN[name]
    buffers = {"table": torch.rand(3000, 4)} if name == "short-tables" else {}
    program = unguarded(Fn(function, **buffers), *inputs)
    with pytest.raises(RuleBroken, match=rf"method 'loss': executorch_call_delegate\w*, operator \d+ .*{name}: "):
        check_delegates("loss", program)


def test_an_embedding_is_caught():
    with pytest.raises(RuleBroken, match=r"operator \d+ aten.embedding.default.*no-embedding: "):
        check_delegates("loss", unguarded(Embedded(), IDS))


def graph(*calls: tuple[str, list[Any]]) -> vk.VkGraph:
    """A graph written by hand, through its bytes: for what the stock compiler does not make today."""
    values: list[vk.VkValue] = []
    chain = []
    for index, (name, arguments) in enumerate(calls):
        places = list(range(len(values), len(values) + len(arguments)))
        values += [vk.VkValue(each) for each in arguments]
        chain.append(vk.OperatorCall(index, name, places))
    return read(serialize_vulkan_graph(vk.VkGraph("0", chain, values, [], [], [], []), [], []))


def tensor(*shape: int, dtype: vk.VkDataType = vk.VkDataType.FLOAT32, image: bool = True) -> vk.VkTensor:
    storage = vk.VkStorageType.TEXTURE_3D if image else vk.VkStorageType.BUFFER
    return vk.VkTensor(dtype, list(shape), -1, -1, storage, vk.VkMemoryLayout.TENSOR_WIDTH_PACKED, dtype)


HALF = vk.VkDataType.FLOAT16


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("no-64-bit", ("aten.neg.default", [tensor(4, dtype=vk.VkDataType.FLOAT64), tensor(4)])),
        ("image-size", ("aten.neg.default", [tensor(2, 2049, 4), tensor(4)])),
        ("image-size", ("aten.neg.default", [tensor(3, 700, 4, 4), tensor(4)])),
        ("half-range", ("aten.clamp.default", [tensor(4, dtype=HALF), vk.Double(-1e9), vk.Null(), tensor(4)])),
        ("linear-rank", ("aten.linear.default", [tensor(2, 3, 6, 4), tensor(5, 4), vk.Null(), tensor(2, 3, 6, 5)])),
        ("last-axis", ("aten.sum.dim_IntList", [tensor(4, 4), vk.IntList([0, 1]), vk.Bool(True), tensor(1, 1)])),
        ("positive-axis", ("aten.index_select.default", [tensor(4, 4), vk.Int(-2), tensor(2), tensor(2, 4)])),
        ("rank", ("aten.cat.default", [tensor(1, 1, 1, 1, 4), vk.Int(0), tensor(1, 1, 1, 1, 4)])),
    ],
)
def test_a_graph_that_breaks_a_rule_is_caught(name: str, call: tuple[str, list[Any]]):
    with pytest.raises(RuleBroken, match=f"{name}: "):
        check_graph("step", "delegate_0", graph(call))


def test_what_keeps_the_rules_passes():
    big = tensor(2, 2049, 4, image=False)
    clamp = ("aten.clamp.default", [tensor(4, dtype=HALF), vk.Double(-3e4), vk.Null(), tensor(4, dtype=HALF)])
    look_up = ("aten.gather.default", [tensor(4, 9), vk.Int(1), tensor(4, 1, dtype=vk.VkDataType.INT32), tensor(4, 1)])
    linear = ("aten.linear.default", [tensor(2, 3, 4), tensor(5, 4), vk.Null(), tensor(2, 3, 5)])
    assert check_graph("step", "delegate_0", graph(("aten.neg.default", [big, big]), clamp, look_up, linear)) is None


def test_every_rule_has_a_program_that_breaks_it():
    # ExecuTorch's own lowering flattens linears before its partitioner sees them.
    by_hand = {"linear-rank", "no-embedding", "no-64-bit", "image-size", "half-range"}
    assert {rule.name for rule in RULES} == set(BROKEN) | by_hand


class Counter(torch.nn.Module):
    """Adds up what it is given."""

    state: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x + self.state
        self.state.copy_(result)
        return result * 2.0


def test_state_inside_a_delegate_is_caught():
    with pytest.raises(RuleBroken, match=r"buffer state.*state-outside"):
        check_delegates("step", unguarded(Counter(), torch.ones(4)))


def test_an_input_with_the_name_of_a_written_buffer_is_caught():
    program = export(Counter(), (torch.ones(4),))
    check_signature("step", program)
    for spec in program.graph_signature.input_specs:
        if spec.arg.name == "x":
            spec.arg.name = "state"
    with pytest.raises(RuleBroken, match=r"input state.*input-names"):
        check_signature("step", program)
