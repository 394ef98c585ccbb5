"""Memory layouts end at capture: every way to store a tensor gives the same program, of plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import make_contiguous_strides_for

import mobizo_passes as mz


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


class Lora(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.lora_B.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.lora_B(self.lora_A(x))


Inside = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Convolutions, depthwise and of one channel too, then a site; `inside` is applied between them."""

    def __init__(self, inside: Inside = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = inside
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = Lora(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(F.relu(self.first(x)))
        return self.head(F.avg_pool2d(F.relu(self.depthwise(x)), 2).flatten(1))


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


IMAGE, LABELS = numbers(3, 3, 8, 8), torch.tensor([0, 3, 1])
TURNED = numbers(8, 8, seed=4).t()
LAST: Any = torch.channels_last


def odd_factors(net: Net) -> Net:
    net.head.lora_A.weight = nn.Parameter(numbers(128, 2, seed=5).t())
    net.head.lora_B.weight = nn.Parameter(numbers(4, 5, seed=6)[:, 1:3])
    return net


def odd_base(net: Net) -> Net:
    net.head.base.weight = nn.Parameter(numbers(128, 4, seed=7).t())
    net.head.base.bias = nn.Parameter(numbers(9, seed=8)[1::2])
    net.first.bias = nn.Parameter(numbers(1, seed=9).expand(8))
    net.depthwise.register_buffer("unused", numbers(8, 2)[:, 1])
    return net


def channels_last(net: Net) -> Net:
    convert: Any = net.to
    return convert(memory_format=LAST)


def viewed(x: Tensor) -> Tensor:
    """A view that only channels_last allows."""
    return x.contiguous(memory_format=LAST).permute(0, 2, 3, 1).view(3, 64, 8).mT.reshape(3, 8, 8, 8)


def cast(x: Tensor) -> Tensor:
    return x.to(torch.float64, memory_format=LAST).float()


def in_last(value: Any) -> Any:
    return value.to(memory_format=LAST)


CASES: dict[str, tuple[Callable[[], Net], Tensor]] = {
    "an NHWC image, x.to(channels_last)": (lambda: Net(lambda x: x.to(memory_format=LAST)), nhwc(IMAGE)),
    "a channels_last model and image": (lambda: channels_last(Net()), IMAGE.to(memory_format=LAST)),
    "a slice with steps and an offset, a cast to channels_last": (
        lambda: Net(cast),
        numbers(5, 3, 8, 16)[1:4, :, :, ::2],
    ),
    "factors that are views, x.contiguous(channels_last).view": (lambda: odd_factors(Net(viewed)), IMAGE),
    "base weights and a constant that are views, one image expanded": (
        lambda: odd_base(Net(lambda x: (x * TURNED).clone(memory_format=LAST))),
        IMAGE[:1].expand(3, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_program_is_plain_and_right(name: str) -> None:
    build, image = CASES[name]
    net = build().eval()
    before = {key: value.stride() for key, value in net.state_dict().items()}
    program = mz.transform(net, (image, LABELS), loss=F.cross_entropy, estimator=mz.TwoSided(queries=2))
    mz.verify(program, net, (image, LABELS))
    # The user's model keeps its own memory.
    assert {key: value.stride() for key, value in net.state_dict().items()} == before
    for method in program.methods:
        core = program.core(method)
        for value in [*core.state_dict.values(), *core.constants.values()]:
            assert_plain(value)
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
        for node in core.graph.nodes:
            assert "memory_format" not in node.kwargs, node.format_node()
            if node.op == "placeholder":
                assert_plain(node.meta["val"])
    for value in [*program.example_batch().values(), *program.initial_adapter().values()]:
        assert_plain(value)


def assert_plain(value: Tensor) -> None:
    assert value.stride() == tuple(make_contiguous_strides_for(value.shape)), (value.shape, value.stride())


def test_the_example_inputs_are_the_program_s_own() -> None:
    image = IMAGE.clone()
    program = mz.transform(Net().eval(), (image, LABELS), loss=F.cross_entropy)
    image.zero_()
    assert torch.equal(program.example_batch()["x"], IMAGE)
