"""What may stand in a graph: a dialect is a table of rules that can be checked after every pass and stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mobizo_passes.errors import ContractError, describe
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.infer import infer
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.operators import writes
from mobizo_passes.graph.text import type_text


def _itself(ir: Ir, node: Node) -> str:
    return str(node.target)


@dataclass(frozen=True)
class Rule:
    """What must hold of every call of some operators (None: of all).

    `broken` returns what was found instead, or "". By default the operator itself breaks the rule: it is not there.
    """

    name: str
    operators: tuple[Any, ...] | None
    broken: Callable[[Ir, Node], str] = _itself


@dataclass(frozen=True)
class Dialect:
    """The inputs that a graph may have, by kind, and the rules that its calls keep."""

    name: str
    inputs: frozenset[str]
    rules: tuple[Rule, ...]

    def violations(self, ir: Ir) -> Iterator[tuple[Node, str, str]]:
        """Yield every node that breaks a rule, with the rule's name and what was found."""
        for node in ir.placeholders():
            if role(node).kind not in self.inputs:
                yield node, f"inputs that are {', '.join(sorted(self.inputs))}", role(node).kind
        for node in ir.graph.nodes:
            if node.op == "call_function":
                for rule in (*_EVERYWHERE, *self._of_all, *self._by_operator.get(node.target, ())):
                    if found := rule.broken(ir, node):
                        yield node, rule.name, found

    def check(self, ir: Ir, where: str, values: bool = False) -> None:
        """Raise `ContractError` for the first node that breaks a rule: it names the place, the node and the rule.

        With `values`, the value noted for each node must also be what its operator gives for its arguments.
        """
        for node, rule, found in (*self.violations(ir), *(_stale(ir) if values else ())):
            raise ContractError(
                f"{where}: expected {rule} (dialect '{self.name}'), found {found}\n  at {describe(node)}",
                where,
                rule,
                node,
            )

    @property
    def _of_all(self) -> list[Rule]:
        return [rule for rule in self.rules if rule.operators is None]

    @functools.cached_property
    def _by_operator(self) -> Mapping[Any, list[Rule]]:
        found: dict[Any, list[Rule]] = {}
        for rule in self.rules:
            for target in rule.operators or ():
                found.setdefault(target, []).append(rule)
        return found


def draws(node: Node) -> bool:
    """Whether a call draws random numbers: dropout that is off does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    chances = (given.get(name) for name in ("dropout_p", "dropout", "p"))
    return next((chance for chance in chances if chance is not None), 1) != 0 and given.get("train") is not False


# Of every dialect.
_EVERYWHERE = (
    Rule("operators that write to no argument", None, lambda ir, n: str(n.target) if writes(n.target) else ""),
    Rule("no random numbers but those of the seed", None, lambda ir, n: str(n.target) if draws(n) else ""),
)


def _stale(ir: Ir) -> Iterator[tuple[Node, str, str]]:
    for node in ir.graph.nodes:
        if node.op == "call_function":
            noted, given = type_text(node.meta["val"]), type_text(infer(ir.fake, node.target, node.args, node.kwargs))
            if noted != given:
                yield node, f"the value that its operator gives, {given}", noted
