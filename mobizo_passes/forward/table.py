"""The table of forward mode: the tangent of an operator's result, from those of its arguments.

An operator that works element by element has no row: reverse mode's rules are its derivatives, and so are forward
mode's. The others are of four kinds:

- *linear* in some arguments together: the operator itself, on their tangents;
- a *product* of some arguments: the sum of the products in which one of them is its tangent;
- *scaled* by a value that does not depend on the tangent, which reverse mode's rule gives for a cotangent of 1;
- any other: a rule of its own.

`FLAT` has no tangent: what it gives does not change with its arguments, or not along a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mobizo_passes.reverse.table import Call
from mobizo_passes.reverse.values import Value

#: The tangents of the arguments that have one, whole, by the arguments' names.
Tangents = Mapping[str, Any]


@dataclass(frozen=True)
class Linear:
    """Linear in these arguments together; `fixed` are others that the linear part has another value of."""

    arguments: tuple[str, ...]
    fixed: Mapping[str, Any]


@dataclass(frozen=True)
class Product:
    """Linear in each of the `factors` alone; what is `added` to the product is left out of it."""

    factors: tuple[str, ...]
    added: str | None


@dataclass(frozen=True)
class Scaled:
    """The result is a value times one argument, and something that does not depend on it."""

    argument: str


@dataclass(frozen=True)
class Own:
    """A rule of its own: from the call and the tangents to the tangent of the result."""

    rule: Callable[[Call, Tangents], Value | None]


TABLE: dict[Any, Linear | Product | Scaled | Own] = {}
FLAT: set[Any] = set()


def linear(targets: Any, *arguments: str, **fixed: Any) -> None:
    """Add rows for operators that are linear in these arguments together."""
    _add(targets, Linear(arguments, fixed))


def product(targets: Any, *factors: str, added: str | None = None) -> None:
    """Add rows for products."""
    _add(targets, Product(factors, added))


def scaled(targets: Any, argument: str) -> None:
    """Add rows for operators whose derivative in an argument reverse mode's rule gives."""
    _add(targets, Scaled(argument))


def own(targets: Any, rule: Callable[[Call, Tangents], Value | None]) -> None:
    """Add rows with a rule of their own."""
    _add(targets, Own(rule))


def flat(*targets: Any) -> None:
    """Say that operators have no tangent."""
    FLAT.update(targets)


def _add(targets: Any, row: Any) -> None:
    for target in targets if isinstance(targets, tuple) else (targets,):
        TABLE[target] = row
