"""How ExecuTorch's weights files (.ptd) are written and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir._serialize.data_serializer import DataPayload
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.serialize import (
    FlatTensorConfig,
    FlatTensorHeader,
    FlatTensorSerializer,
)

# That of ExecuTorch's own segments.
_SERIALIZER = FlatTensorSerializer(FlatTensorConfig(segment_alignment=128))
# A file starts with a flatbuffer's offset and this identifier; the header with the sizes follows.
_IDENTIFIER, _HEADER = slice(4, 6), 8


@dataclass(frozen=True)
class Weight:
    """An entry of a weights file. Those that ExecuTorch's kernels read have a layout; delegates keep their own."""

    data: bytes
    alignment: int = 1
    layout: TensorLayout | None = None


class DelegatedWeights:
    """The weights that delegates keep in a weights file of one name, in ExecuTorch's edge manager."""

    def __init__(self, edge: Any, file: str) -> None:
        self._store = edge._named_data_store
        self._outside = self._store.external_data.setdefault(file, {})

    def found(self) -> dict[str, Weight]:
        """Every weight, by its name in the file."""
        entries = self._outside.items()
        return {key: Weight(self._store.buffers[each.buffer_index], each.alignment) for key, each in entries}

    def move_inside(self, keys: Iterable[str]) -> None:
        """Put some of them into the program."""
        for key in keys:
            self._store.pte_data[key] = self._outside.pop(key)


def serialized(weights: Mapping[str, Weight], file: str) -> Cord:
    """The bytes of a weights file with these entries, in the order of their names."""
    store = NamedDataStore()
    for key in sorted(weights):
        weight = weights[key]
        store.add_named_data(key, weight.data, weight.alignment, file, weight.layout)
    return _SERIALIZER.serialize(DataPayload(store.buffers, store.external_data.get(file, {})))


def promised_bytes(data: bytes) -> int | None:
    """How long a weights file is by its own header; None if it is none."""
    header = FlatTensorHeader.from_bytes(data[_HEADER:]) if len(data) > _HEADER + 40 else None
    if header is None or data[_IDENTIFIER] != b"FT" or not header.is_valid():
        return None
    return header.segment_base_offset + header.segment_data_size


def entries(data: bytes) -> dict[str, bytes]:
    """The bytes of every entry of a weights file, by name."""
    payload: Any = _SERIALIZER.deserialize(Cord(data))
    return {key: payload.buffers[entry.buffer_index] for key, entry in payload.named_data.items()}
