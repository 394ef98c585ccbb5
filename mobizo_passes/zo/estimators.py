"""Zeroth-order gradient estimators: how groups of perturbed losses become projected gradients.

A group is one copy of the batch with one perturbation of the adapter. Groups lie side by side in the batch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from mobizo_passes.errors import InputError

Normalize = Literal["std"] | None


@dataclass(frozen=True, repr=False)
class _Estimator:
    queries: int = 4
    normalize: Normalize = None

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if isinstance(self.queries, bool) or not isinstance(self.queries, int) or self.queries < 1:
            raise InputError(f"queries must be a positive int, found {self.queries!r}")
        if self.normalize not in (None, "std"):
            raise InputError(f"normalize must be None or 'std', found {self.normalize!r}")
        perturbed = sum(sign != 0 for _, sign in self.signs)
        if self.normalize == "std" and perturbed < 2:
            raise InputError(
                f"normalize='std' needs at least 2 perturbed losses, {type(self).__name__}(queries={self.queries}) has "
                f"{perturbed}; take more queries"
            )

    def __repr__(self) -> str:
        normalize = "" if self.normalize is None else f", normalize={self.normalize!r}"
        return f"{type(self).__name__}(queries={self.queries}{normalize})"

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
        return {"kind": self.kind, "queries": self.queries, "groups": self.groups, "normalize": self.normalize}


@dataclass(frozen=True, repr=False)
class TwoSided(_Estimator):
    """Central differences: ``g_i = (L(θ+εz_i) − L(θ−εz_i)) / 2ε``; P = 2q groups, all plus groups first (paper, eq. 1).

    ``normalize="std"`` divides every g_i by the unbiased standard deviation of the 2q losses (FZOO); where they are all
    equal, every g_i is 0. Raises `InputError` if `queries` is not a positive int, or `normalize` unknown.
    """

    kind: ClassVar[str] = "two_sided"

    @property
    def signs(self) -> tuple[tuple[int, int], ...]:
        return tuple((i, 1) for i in range(self.queries)) + tuple((i, -1) for i in range(self.queries))


@dataclass(frozen=True, repr=False)
class OneSided(_Estimator):
    """Forward differences: ``g_i = (L(θ+εz_i) − L(θ)) / ε``; P = q+1 groups, the unperturbed one first.

    ``normalize="std"`` divides every g_i by the unbiased standard deviation of the q perturbed losses, L(θ) left out
    (FZOO); where they are all equal, every g_i is 0. Raises `InputError` if `queries` is not a positive int, or 1 with
    ``normalize="std"``, or `normalize` unknown.
    """

    kind: ClassVar[str] = "one_sided"

    @property
    def signs(self) -> tuple[tuple[int, int], ...]:
        return ((0, 0), *((i, 1) for i in range(self.queries)))


Estimator = TwoSided | OneSided

BY_KIND: dict[str, type[TwoSided] | type[OneSided]] = {"two_sided": TwoSided, "one_sided": OneSided}
