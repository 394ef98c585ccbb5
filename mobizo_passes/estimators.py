"""Zeroth-order gradient estimators: how groups of perturbed losses become projected gradients.

A group is one copy of the batch with one perturbation of the adapter. Groups lie side by side in the batch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .errors import InputError


@dataclass(frozen=True)
class _Estimator:
    queries: int = 4

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if isinstance(self.queries, bool) or not isinstance(self.queries, int) or self.queries < 1:
            raise InputError(f"queries must be a positive int, found {self.queries!r}")

    @property
    def signs(self) -> tuple[tuple[int, int], ...]:
        """One ``(query, sign)`` per group, in group order; sign 0 is the unperturbed group."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        """Number of groups P: how many copies of the batch one step evaluates."""
        return len(self.signs)

    def manifest(self) -> Mapping[str, object]:
        """Return the estimator's fields as the manifest stores them."""
        return {"kind": self.kind, "queries": self.queries, "groups": self.groups, "normalize": None}


@dataclass(frozen=True)
class TwoSided(_Estimator):
    """Central differences: ``g_i = (L(θ+εz_i) − L(θ−εz_i)) / 2ε``; P = 2q groups, all plus groups first (paper, eq. 1).

    Raises `InputError` if `queries` is not a positive int.
    """

    kind: ClassVar[str] = "two_sided"

    @property
    def signs(self) -> tuple[tuple[int, int], ...]:
        return tuple((i, 1) for i in range(self.queries)) + tuple((i, -1) for i in range(self.queries))


@dataclass(frozen=True)
class OneSided(_Estimator):
    """Forward differences: ``g_i = (L(θ+εz_i) − L(θ)) / ε``; P = q+1 groups, the unperturbed one first.

    Raises `InputError` if `queries` is not a positive int.
    """

    kind: ClassVar[str] = "one_sided"

    @property
    def signs(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0), *((i, 1) for i in range(self.queries)))


Estimator = TwoSided | OneSided

BY_KIND: dict[str, type[TwoSided] | type[OneSided]] = {"two_sided": TwoSided, "one_sided": OneSided}
