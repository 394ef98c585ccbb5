"""What must not be in a Vulkan delegate, as rules over its serialized graph: each was seen to break or to be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from executorch.backends.vulkan.serialization.vulkan_graph_schema import (
    Double,
    IntList,
    VkDataType,
    VkMemoryLayout,
    VkStorageType,
    VkTensor,
)

from lowering.targets.vulkan.graph import Graph
from lowering.targets.vulkan.operators import LOOK_UPS, MAX_LINEAR_RANK, MAX_RANK, MAX_ROWS, SERIALIZED

_INTEGERS = (VkDataType.INT8, VkDataType.UINT8, VkDataType.INT32, VkDataType.INT64)
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_LARGEST_HALF = 65504.0
_IMAGES = (VkStorageType.TEXTURE_3D, VkStorageType.TEXTURE_2D)
# Which axis, counted from the last, holds four values in one texel.
_PACKED = {
    VkMemoryLayout.TENSOR_WIDTH_PACKED: 0,
    VkMemoryLayout.TENSOR_HEIGHT_PACKED: 1,
    VkMemoryLayout.TENSOR_CHANNELS_PACKED: 2,
}


@dataclass(frozen=True)
class Rule:
    """`broken` yields, for each place that breaks the rule, where it is and what it has."""

    name: str
    why: str
    broken: Callable[[Graph], Iterator[str]]


def _known(graph: Graph) -> Iterator[str]:
    return (call.where for call in graph.calls if call.name not in SERIALIZED)


def _absent(name: str) -> Callable[[Graph], Iterator[str]]:
    return lambda graph: (call.where for call in graph.named(name))


def _negative_axes(graph: Graph) -> Iterator[str]:
    for call in graph.named(*LOOK_UPS):
        if call.arguments[1].int_val < 0:
            yield f"{call.where}: axis {call.arguments[1].int_val}"


def _long_tables(graph: Graph) -> Iterator[str]:
    for call in graph.named(*LOOK_UPS):
        rows = call.arguments[0].dims[call.arguments[1].int_val]
        if rows > MAX_ROWS:
            yield f"{call.where}: {rows} rows"


def _integer_comparisons(graph: Graph) -> Iterator[str]:
    for call in graph.calls:
        if call.name.split(".")[1] in _COMPARISONS and _is_integer(call.arguments[0]):
            yield call.where


def _rank(graph: Graph) -> Iterator[str]:
    return (f"{where}: shape {tensor.dims}" for where, tensor in graph.tensors() if len(tensor.dims) > MAX_RANK)


def _linear_rank(graph: Graph) -> Iterator[str]:
    for call in graph.calls:
        if call.name.split(".")[1].startswith("linear") and len(call.arguments[0].dims) > MAX_LINEAR_RANK:
            yield f"{call.where}: shape {call.arguments[0].dims}"


def _no_dims(graph: Graph) -> Iterator[str]:
    return (where for where, tensor in graph.computed() if not tensor.dims)


def _wide(graph: Graph) -> Iterator[str]:
    wide = (VkDataType.INT64, VkDataType.FLOAT64)
    return (f"{where}: {tensor.datatype.name}" for where, tensor in graph.tensors() if tensor.datatype in wide)


def _integer_arithmetic(graph: Graph) -> Iterator[str]:
    for call in graph.calls:
        if call.name == "et_vk.prepack.default":
            continue
        # A look-up passes its positions through; it computes with its table alone.
        operands = [call.arguments[0], call.arguments[-1]] if call.name in LOOK_UPS else call.arguments
        if any(_is_integer(each) for each in operands):
            yield call.where


def _images(graph: Graph) -> Iterator[str]:
    for where, tensor in graph.tensors():
        if tensor.storage_type not in _IMAGES or len(tensor.dims) > MAX_RANK:
            continue
        extents = _extents(tensor)
        if max(extents) > MAX_ROWS:
            yield f"{where}: shape {tensor.dims} as an image of {' x '.join(map(str, extents))} texels"


def _half_range(graph: Graph) -> Iterator[str]:
    if not any(tensor.datatype == VkDataType.FLOAT16 for _, tensor in graph.tensors()):
        return
    for call in graph.calls:
        for each in call.arguments:
            if isinstance(each, Double) and math.isfinite(each.double_val) and abs(each.double_val) > _LARGEST_HALF:
                yield f"{call.where}: {each.double_val}"


def _middle_reductions(graph: Graph) -> Iterator[str]:
    for call in graph.named("aten.mean.dim", "aten.sum.dim_IntList"):
        rank, dims = len(call.arguments[0].dims), call.arguments[1]
        if not isinstance(dims, IntList) or dims.items not in ([-1], [rank - 1]):
            yield f"{call.where}: axes {getattr(dims, 'items', 'all')}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, VkTensor) and value.datatype in _INTEGERS


def _extents(tensor: VkTensor) -> tuple[int, int, int]:
    n, c, h, w = ([1] * MAX_RANK + list(tensor.dims))[-MAX_RANK:]
    packed = _PACKED.get(tensor.memory_layout)
    sizes = [math.ceil(size / 4) if axis == packed else size for axis, size in enumerate((w, h, c))]
    return sizes[0], sizes[1], sizes[2] * n


RULES = (
    Rule("positive-axis", "a look-up along a negative axis is silently wrong", _negative_axes),
    Rule("no-logical-not", "the runtime aborts the process when it loads one", _absent("aten.logical_not.default")),
    Rule("no-integer-comparison", "there is no shader that compares integers", _integer_comparisons),
    Rule("no-embedding", "an embedding is silently wrong beyond the image limits", _absent("aten.embedding.default")),
    Rule("short-tables", f"a look-up in more than {MAX_ROWS} rows is silently wrong", _long_tables),
    Rule("no-0-dim", "a computed tensor of 0 dimensions is an error", _no_dims),
    Rule("rank", f"more than {MAX_RANK} dimensions crash the runtime", _rank),
    Rule("linear-rank", "a linear writes the first slice alone of a tensor of four dimensions", _linear_rank),
    Rule("no-64-bit", "there are no 64-bit numbers in shaders", _wide),
    Rule("no-exact-gelu", "the shader computes the tanh form", _absent("aten.gelu.default")),
    Rule("last-axis", "reductions over other axes than the last are not tried", _middle_reductions),
    Rule("image-size", f"drivers need not have images of more than {MAX_ROWS} texels a side", _images),
    Rule("half-range", "the number is infinite in float16", _half_range),
    Rule("no-integer-arithmetic", "64-bit integers become 32-bit ones", _integer_arithmetic),
    Rule("known-operators", "the operator is not among those tried on the runtime", _known),
)
