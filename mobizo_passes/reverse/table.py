"""The one table of reverse mode: for each operator, the cotangent of each argument from that of the result.

A row is an operator (or several) and a rule for each argument, named as in the operator's schema. A rule is called with
the `Call` and with g, the cotangent of the result, and returns that of the argument; None: the derivative is zero.
Forward mode takes the rows of element-wise operators too, with g = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from mobizo_passes.graph.nodes import named
from mobizo_passes.reverse.values import Tape, Value

Rule = Callable[["Call", Any], Any]

# How the result's shape and the arguments' belong together, and so what g may be.
#   elementwise: by broadcasting. g may be a number, have a 1 where the result has more, or fewer dimensions; it stands
#     for what broadcasting makes of it. What the rule returns stands for the result's shape, and is summed to the
#     argument's.
#   reduction: g may be as above; what the rule returns stands for the argument's shape, and may be as above too.
#   whole: g has the result's shape, what the rule returns has the argument's.
Kind = Literal["elementwise", "reduction", "whole"]
ELEMENTWISE: Kind = "elementwise"
REDUCTION: Kind = "reduction"
WHOLE: Kind = "whole"


class NoRule(Exception):
    """A rule does not take this use of its operator; the message ends a sentence: "no derivative …"."""


@dataclass(frozen=True)
class Row:
    """The rules of one operator, by argument."""

    kind: Kind
    rules: Mapping[str, Rule]


RULES: dict[Any, Row] = {}


@dataclass(frozen=True)
class Piece:
    """A cotangent of a part: `value` belongs to the entries from `start` of dimension `dim`; all others are 0."""

    dim: int
    start: int
    value: Value


class Call:
    """A node as a rule sees it: its arguments by the names of the schema, defaults included.

    `out` is the result; of an operator with several, the one in `place`. Values stand for nodes, also in lists.
    """

    def __init__(self, tape: Tape, node: fx.Node, out: fx.Node, place: int = 0) -> None:
        self.tape = tape
        self.node = node
        self.out = Value(tape, out)
        self.place = place
        self.arguments = named(node.target, node.args, node.kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._value(self.arguments[name])
        except KeyError:
            raise AttributeError(name) from None

    def result(self, place: int) -> Value:
        """Another result of an operator with several."""
        for user in self.node.users:
            if user.args[1] == place:
                return Value(self.tape, user)
        return self.tape.item(Value(self.tape, self.node), place)

    def _value(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return Value(self.tape, arg)
        return [self._value(each) for each in arg] if isinstance(arg, list | tuple) else arg


def rows(kind: Kind, targets: Any, /, **rules: Rule) -> None:
    """Add a row for an operator, or for each of several."""
    for target in targets if isinstance(targets, tuple) else (targets,):
        RULES[target] = Row(kind, rules)
