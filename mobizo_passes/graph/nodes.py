"""What a node computes, and its arguments by name."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from mobizo_passes.graph.operators import schema_of

_REQUIRED = object()


class Arguments:
    """The arguments of one call, by the names of its operator's schema and with the schema's defaults."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise AttributeError(f"the call has no argument '{name}', only {', '.join(self._values)}")
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or `default` if the operator has none of this name."""
        return self._values.get(name, default)


def arguments(node: Node) -> Arguments:
    """Read a call's arguments by name: ``arguments(node).dim``, be it given by place, by keyword, or left out.

    For operators of ATen, of our own and of ExecuTorch's dialects; an item of a tuple has `source` and `index`.
    """
    return Arguments(named(node.target, node.args, node.kwargs))


def named(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `target` by the names of its schema, defaults included; a missing one is left out."""
    signature = _signature(target)
    given = {**dict(zip(signature, args, strict=False)), **kwargs}
    values = {name: given.get(name, default) for name, default in signature.items()}
    return {name: value for name, value in values.items() if value is not _REQUIRED}


def set_arguments(node: Node, /, **values: Any) -> None:
    """Change arguments by name; one that was left out becomes a keyword, unless it is set to its default."""
    node.args, node.kwargs = with_arguments(node, values)


def with_arguments(node: Node, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with some of them changed, as `set_arguments` would; the call stays as it is."""
    args, kwargs, signature = list(node.args), dict(node.kwargs), _signature(node.target)
    for name, value in values.items():
        place = list(signature).index(name)
        if place < len(args):
            args[place] = value
        elif name in kwargs or value != signature[name]:
            kwargs[name] = value
    return tuple(args), kwargs


@functools.cache
def _signature(target: Any) -> dict[str, Any]:
    """Argument names in order, with their defaults."""
    if target is operator.getitem:
        return {"source": _REQUIRED, "index": _REQUIRED}
    schema = schema_of(target)
    if schema is None:
        raise TypeError(f"{target} has no schema: its arguments have no names")
    return {a.name: a.default_value if a.has_default_value() else _REQUIRED for a in schema.arguments}


def val(node: Any) -> torch.Tensor:
    """The fake tensor that `node` computes."""
    return node.meta["val"]


def shape_of(node: Any) -> tuple[int, ...]:
    """Static shape of the tensor that `node` computes."""
    return tuple(int(s) for s in node.meta["val"].shape)


def is_float(node: Any) -> bool:
    """Whether `node` computes a float32/float16/bfloat16/float64 tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def positive_dim(dim: int, rank: int) -> int:
    """`dim` counted from the front; 0 for a tensor without dimensions."""
    return dim % rank if rank else 0


def identifier(name: str) -> str:
    """Return a name as a legal node name, in lower case as torch.export itself writes input names.

    PEFT's wrapper stands in front of every name of its models and tells nothing: it is left out.
    """
    text = "".join(c if c.isalnum() else "_" for c in name.removeprefix("base_model.model.")).lower()
    return text if text[:1].isalpha() else f"x_{text}"
