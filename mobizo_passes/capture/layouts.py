"""Memory layouts end at capture: what a program holds, takes and computes is contiguous, however the model stores it.

Compiled programs are told shapes and dtypes, not strides, and runtimes refuse operands in different layouts or read
them in the wrong order. Layout changes no value, so none of it needs to go in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch._prims_common import make_contiguous_strides_for

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir

aten = torch.ops.aten


def plain(value: Tensor) -> Tensor:
    """Return the tensor itself if it is contiguous and fills its storage, else a copy that is and does.

    `is_contiguous` also holds for channels_last tensors of one channel, whose strides a runtime reads as another order.
    """
    if value.layout is not torch.strided:
        return value
    strides = make_contiguous_strides_for(value.shape)
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    if value.stride() == tuple(strides) and whole:
        return value
    return copied(value)


@contextlib.contextmanager
def plain_state(model: nn.Module) -> Iterator[None]:
    """Within, every parameter and buffer of the model is contiguous; afterwards each has its own memory back."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for value in chain(model.parameters(), model.buffers()):
            copy = plain(value)
            if copy is not value:
                kept.append((value, value.data))
                value.data = copy
        yield
    finally:
        for value, data in kept:
            value.data = data


def copied(value: Tensor) -> Tensor:
    """Return a contiguous copy that fills its storage."""
    return value.detach().new_empty(value.shape).copy_(value.detach())


def forget_layouts(ir: Ir) -> bool:
    """Drop every request for a memory format, and make the constants plain; returns whether there was any.

    BEFORE  %a: f32[2, 3, 8, 8] = aten._to_copy(%x, dtype=f32, memory_format=channels_last)
    AFTER   %a: f32[2, 3, 8, 8] = aten._to_copy(%x, dtype=f32)
    """
    found = False
    for name, value in ir.state.items():
        copy = plain(value)
        if copy is not value:
            ir.state[name], found = copy, True
            node = next(n for n in ir.placeholders() if role(n).name == name)
            with ir.fake:
                node.meta["val"] = torch.empty(tuple(value.shape), dtype=value.dtype)
    for node in ir.graph.nodes:
        if node.op == "call_function" and "memory_format" in node.kwargs:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
            found = True
    if not found:
        return False
    for node in ir.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # What was a view in the former layout need not be one now.
            node.target, node.args = aten.reshape.default, (node.args[0], list(node.meta["val"].shape))
        ir.refresh(node)
    return True
