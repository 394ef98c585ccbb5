"""bitsandbytes' layers, by stand-ins: four bits are captured as what they stand for, LLM.int8() is refused."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.models import Lora, integers, random

LEVELS = torch.linspace(-1, 1, 16)


def stand_in(name: str) -> type[nn.Linear]:
    """A layer under a name of bitsandbytes', which keeps a uint8 for two weights, and computes with none of torch's."""

    class Layer(nn.Linear):
        compute_dtype = None

        def __init__(self, fan_in: int, fan_out: int) -> None:
            super().__init__(fan_in, fan_out)
            bits = integers(256, fan_out, fan_in // 2).to(torch.uint8)
            self._parameters["weight"] = nn.Parameter(bits, requires_grad=False)
            self.weight.quant_state = SimpleNamespace(scale=0.5)  # type: ignore[attr-defined]

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's own name
            weight = unpacked(self.weight.data, self.weight.quant_state)  # type: ignore[attr-defined]
            return torch.from_numpy(F.linear(input, weight, self.bias).numpy())

    Layer.__name__, Layer.__module__ = name, "bitsandbytes.nn.modules"
    return Layer


def unpacked(data: Tensor, state: Any) -> Tensor:
    return LEVELS[torch.stack([data & 15, data >> 4], -1).flatten(-2).long()] * state.scale


class Quantized(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = Lora(6, 8)
        self.layer.base = stand_in(name)(6, 8)
        self.head = nn.Linear(8, 4)
        for parameter in (*self.layer.lora_A.parameters(), *self.layer.lora_B.parameters(), *self.head.parameters()):
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("estimator", [mz.TwoSided(2), mz.Exact()], ids=str)
def test_four_bits(estimator: mz.Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    functional: Any = ModuleType("bitsandbytes.functional")
    functional.dequantize_4bit = unpacked
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    model, inputs = Quantized("Linear4bit").eval(), (random(3, 6), integers(4, 3))
    bits = model.layer.base.weight
    program = mz.transform(model, inputs, estimator=estimator, loss=F.cross_entropy)
    assert [(record.name, record.rewrites) for record in program.history[:1]] == [("dequantize-weights", 1)]
    assert program.exported_program.state_dict["layer.base.weight"].dtype == torch.float32
    mz.verify(program, model, inputs)
    assert model.layer.base.weight is bits
    assert "forward" not in vars(model.layer.base)


def test_eight_bits_are_refused() -> None:
    with pytest.raises(mz.CaptureError, match=r"LLM.int8\(\) .*: 'layer.base'\n  load .* load_in_4bit"):
        mz.transform(Quantized("Linear8bitLt").eval(), (random(3, 6), integers(4, 3)), loss=F.cross_entropy)
