"""Four-bit layers of bitsandbytes: linear layers with the weights that they stand for while a model is captured."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@contextlib.contextmanager
def dequantized(model: nn.Module) -> Iterator[list[str]]:
    """Let bitsandbytes' `Linear4bit` multiply by its dequantized weight; yields the FQNs of the layers.

    The program holds these weights, one float32 for each four bits, and is held against the model with them:
    bitsandbytes' own CPU kernels may round to bfloat16. The layers are as before afterwards.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if _four_bits(module)}
    before = [(layer, layer._parameters["weight"]) for layer in layers.values()]
    try:
        for layer in layers.values():
            weight = _weight(layer)
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            layer.__dict__["forward"] = functools.partial(_forward, layer)
        yield list(layers)
    finally:
        for layer, weight in before:
            layer._parameters["weight"] = weight
            layer.__dict__.pop("forward", None)


def _four_bits(module: nn.Module) -> bool:
    kinds = type(module).__mro__
    return any(kind.__module__.startswith("bitsandbytes.") and kind.__name__ == "Linear4bit" for kind in kinds)


def _weight(layer: Any) -> Tensor:
    """The weight that four bits and their scales stand for, float32 [out, in]."""
    functional: Any = sys.modules["bitsandbytes.functional"]
    data, state = layer.weight.data, layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # A forward packs the bits anew for the CPU's own instructions; to unpack them changes the state in place.
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return functional.dequantize_4bit(data, state).float()


def _forward(layer: Any, x: Tensor) -> Tensor:
    dtype = getattr(layer, "compute_dtype", None) or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), layer.weight.to(dtype), bias).to(x.dtype)
