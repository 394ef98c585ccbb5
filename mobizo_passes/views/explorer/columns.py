"""Data about the nodes of a program, by which drawings are colored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from mobizo_passes.errors import InputError
from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.flops import node_flops

Value = float | int | str | None


@dataclass(frozen=True)
class NodeData:
    """Data about nodes to color a drawing with: node name -> number or word.

    A folded module shows the sum or the maximum of the numbers in it, by `combine` ("sum" or "max"). Raises
    `InputError` for another `combine`, or for numbers and words in one.
    """

    values: Mapping[str, float | int | str]
    unit: str = ""
    combine: str = "max"

    def __post_init__(self) -> None:
        if self.combine not in ("sum", "max"):
            raise InputError(f"combine must be 'sum' or 'max', found {self.combine!r}")
        if len({isinstance(each, str) for each in self.values.values()}) > 1:
            raise InputError("the values of one NodeData are numbers or words, found both")


def columns_of(nodes: Sequence[fx.Node], data: Mapping[str, NodeData]) -> list[dict[str, Any]]:
    """Return what is known of a program's nodes, and what is given, by column, in their order; empty columns left out.

    A column has a name, a unit, values, one for each node or None, and how those of a module combine.
    """
    calls = [n.op == "call_function" for n in nodes]
    computed = [
        ("per group" if facts(n).expanded else "once") if c else None for n, c in zip(nodes, calls, strict=True)
    ]
    made_by = [facts(n).made_by or "capture" if c else None for n, c in zip(nodes, calls, strict=True)]
    held = [_saved(n) for n in nodes]
    found = [
        _column("computed", computed),
        _column("FLOPs", [node_flops(n) or None for n in nodes], "FLOP", "sum"),
        _column("bytes of values", [_bytes(n) if c else None for n, c in zip(nodes, calls, strict=True)], "B", "sum"),
        _column("bytes saved for the gradient", held, "B", "sum"),
        _column("made by", made_by),
    ]
    return _not_empty([*found, *_given(data, [n.name for n in nodes])])


def columns_of_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the same of nodes with the attributes of `to_networkx`, of a lowered program."""
    columns = [_column("FLOPs", [row.get("flops") or None for row in rows], "FLOP", "sum")]
    if any(row.get("delegate") is not None or row.get("reason") for row in rows):
        delegates = _column("delegate", [_delegate(row) for row in rows])
        columns = [delegates, _column("reason against", [_reason(row) for row in rows]), *columns]
    return _not_empty(columns)


def _not_empty(columns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in columns if any(value is not None for value in each["values"])]


def _column(name: str, values: Sequence[Value], unit: str = "", combine: str = "max") -> dict[str, Any]:
    return {"name": name, "unit": unit, "combine": combine, "values": list(values)}


def _bytes(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else None


def _saved(node: fx.Node) -> int | None:
    """The bytes of a forward value that the gradient reads again."""
    if node.op != "call_function" or facts(node).made_by == "append-gradients":
        return None
    return _bytes(node) if any(facts(user).made_by == "append-gradients" for user in node.users) else None


def _given(data: Mapping[str, NodeData], names: Sequence[str]) -> list[dict[str, Any]]:
    columns = []
    for title, one in data.items():
        unknown = sorted(set(one.values) - set(names))
        if unknown:
            raise InputError(
                f"data {title!r} names {len(unknown)} nodes that the program has not, such as '{unknown[0]}'; take the "
                "names of to_networkx()"
            )
        columns.append(_column(title, [one.values.get(name) for name in names], one.unit, one.combine))
    return columns


def _delegate(row: Mapping[str, Any]) -> str | None:
    if row.get("op") == "placeholder":
        return None
    return "not delegated" if row.get("delegate") is None else f"delegate call {row['delegate']}"


def _reason(row: Mapping[str, Any]) -> str | None:
    return f"{row['rule']}: {row['reason']}" if row.get("reason") else None
