"""What operators and passes know of an estimator: the groups of a step, and what their losses say about the gradient.

A group is one copy of the batch with one perturbation of the adapter. Groups lie side by side in the batch dimension.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from mobizo_passes.errors import InputError

Normalize = Literal["std"] | None

# The subtraction of two losses, and the quotient, round too.
_LEAST_ERROR_FACTOR = 2.0


@dataclass(frozen=True, repr=False)
class Scheme:
    """A finite difference of losses. What varies between estimators is `offsets` and `differences`.

    `queries` is q, the number of directions z_i. `normalize` "std" divides the projected gradients by the unbiased
    standard deviation of the perturbed losses (FZOO).

    Raises `InputError` if `queries` is not a positive int, `normalize` is unknown, or "std" has fewer than two
    perturbed losses.
    """

    queries: int = 4
    normalize: Normalize = None

    #: The name in programs and manifests, in lower_case; the command line writes it with dashes.
    kind: ClassVar[str] = ""
    #: For readers of a picture: the copies of an adapter θ, and one projected gradient.
    copies: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    #: Whether the gradient is known by its projections on the z_i; if not, a step has neither seed nor ε.
    projected: ClassVar[bool] = True
    #: Whether it takes differences of losses; if not, it differentiates, and a step has no ε.
    uses_epsilon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.queries, bool) or not isinstance(self.queries, int) or self.queries < 1:
            raise InputError(f"queries must be a positive int, found {self.queries!r}")
        if self.normalize not in (None, "std"):
            raise InputError(f"normalize must be None or 'std', found {self.normalize!r}")
        if self.normalize == "std" and len(self.perturbed_groups) < 2:
            raise InputError(
                f"normalize='std' needs at least 2 perturbed losses, {type(self).__name__}(queries={self.queries}) has "
                f"{len(self.perturbed_groups)}; take more queries"
            )

    def __repr__(self) -> str:
        normalize = "" if self.normalize is None else f", normalize={self.normalize!r}"
        return f"{type(self).__name__}(queries={self.queries}{normalize})"

    # What an estimator defines -----------------------------------------------------------------------------------

    @property
    def offsets(self) -> tuple[tuple[int, float], ...]:
        """One ``(query, factor)`` per group, in group order: the group evaluates θ + factor·ε·z of that query.

        A factor of 0 is the unperturbed group. The number of groups P grows with q.
        """
        raise NotImplementedError

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        """Return ∇L(θ)·z_i for every query, [q], as estimated from the losses [P] and ε, [1] or a number.

        It is linear in the losses, and written in torch operators: it becomes a part of the program's graph.
        """
        raise NotImplementedError

    def perturb(self, value: Tensor, z: Tensor, eps: Tensor) -> Tensor:
        """Return the copies of an adapter tensor, [P, *shape], from value [*shape], z [q, *shape] and eps [1].

        It becomes a part of the program's graph. Override it where fewer operators give the same copies.
        """
        step = z * eps
        return torch.stack([value + factor * step[query] for query, factor in self.offsets])

    def loss(self, losses: Tensor) -> Tensor:
        """Return the loss that a step reports, [], from the losses [P]: the unperturbed one, or the mean of all."""
        plain = [group for group, (_, factor) in enumerate(self.offsets) if factor == 0]
        return losses[plain[0]] if plain else losses.mean()

    def perturbed(self, losses: Tensor) -> Tensor:
        """Return the losses of the perturbed groups, whose standard deviation normalizes."""
        groups = self.perturbed_groups
        return losses if len(groups) == self.groups else torch.cat([losses[i : i + 1] for i in groups])

    # What follows from it ----------------------------------------------------------------------------------------

    @property
    def groups(self) -> int:
        """Number of groups P: how many copies of the batch one step evaluates."""
        return len(self.offsets)

    @property
    def perturbed_groups(self) -> tuple[int, ...]:
        """The groups, by number, whose adapter is not θ itself."""
        return tuple(group for group, (_, factor) in enumerate(self.offsets) if factor != 0)

    @property
    def error_factor(self) -> float:
        """c such that no unnormalized projected gradient is off by more than c·error/ε when no loss is by more."""
        columns = [self.differences(unit, 1.0).abs() for unit in torch.eye(self.groups)]
        return max(_LEAST_ERROR_FACTOR, float(torch.stack(columns).sum(0).max()))

    def projected_gradients(self, losses: Tensor, eps: Tensor) -> Tensor:
        """Return the projected gradients [q] from losses [P] and eps [1], normalized if the estimator says so.

        Normalized ones are 0 where the deviation is 0: equal losses tell nothing of a direction. A NaN stays a NaN.
        """
        gradients = self.differences(losses, eps)
        if self.normalize is None:
            return gradients
        perturbed = self.perturbed(losses)
        count = perturbed.shape[0]
        # From the first loss, not from zero: losses differ in their last digits only; equal ones must give exactly 0.
        shifted = perturbed - perturbed[:1]
        deviations = shifted - shifted.sum(0, keepdim=True) / count
        std = torch.sqrt((deviations * deviations).sum(0, keepdim=True) / (count - 1))
        return torch.where(std == 0, torch.zeros_like(gradients), gradients / std)

    def manifest(self) -> Mapping[str, object]:
        """Return what the manifest says of the estimator, as plain JSON values."""
        return {
            "kind": self.kind,
            "queries": self.queries,
            "groups": self.groups,
            "normalize": self.normalize,
            "perturbed_groups": list(self.perturbed_groups),
            "error_factor": self.error_factor,
        }

    @classmethod
    def of_groups(cls, groups: int, normalize: Normalize = None) -> Self:
        """Return the estimator that has P groups; raises `InputError` if no number of queries gives that many."""
        for queries in range(1, groups + 1):
            if cls(queries).groups == groups:
                return cls(queries, normalize)
        raise InputError(f"{cls.__name__} has {groups} groups for no number of queries")


# The registered classes by kind: operators find an estimator here, by the kind that stands in the graph.
_REGISTERED: dict[str, type[Scheme]] = {}


def register(cls: type[Scheme]) -> None:
    """Add a class to the list; raises `InputError` if it contradicts itself or its kind is taken."""
    problem = _fault(cls)
    if problem:
        raise InputError(f"can't register the estimator {cls.__name__}: {problem}")
    _REGISTERED[cls.kind] = cls


def unregister(kind: str) -> None:
    """Take a kind off the list; raises `InputError` if it is not on it."""
    del _REGISTERED[registered(kind).kind]


def registered(kind: str) -> type[Scheme]:
    """Return the class of this kind; raises `InputError` that lists the known ones."""
    if kind not in _REGISTERED:
        raise InputError(f"no estimator of the kind {kind!r}; known are {', '.join(sorted(_REGISTERED))}")
    return _REGISTERED[kind]


def registered_kinds() -> tuple[str, ...]:
    """Return the kinds in the order in which they were registered."""
    return tuple(_REGISTERED)


def _fault(cls: type[Scheme]) -> str:
    """What is wrong with a class that is to be registered; "" if nothing is."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", cls.kind):
        return f"kind must be a name in lower_case, found {cls.kind!r}"
    if cls.kind in _REGISTERED:
        return f"the kind {cls.kind!r} is taken by {_REGISTERED[cls.kind].__name__}; give another, or unregister that"
    if not cls.uses_epsilon:
        return ""
    own = [field.name for field in fields(cls) if field.name not in ("queries", "normalize")]
    if own:
        return f"a program keeps queries and normalize only; make {', '.join(own)} a class variable"
    value, eps = torch.tensor([1.0, -2.0]), torch.tensor([0.25])
    for queries in (3, 1):
        scheme = cls(queries)
        for query, factor in scheme.offsets:
            if not 0 <= query < queries or not math.isfinite(factor):
                return f"with {queries} queries, offsets has {(query, factor)}: expected a query below {queries}"
        z = torch.linspace(-1.0, 1.0, 2 * queries).reshape(queries, 2)
        expected = torch.stack([value + factor * eps * z[query] for query, factor in scheme.offsets])
        copies = scheme.perturb(value, z, eps)
        if copies.shape != expected.shape or not torch.allclose(copies, expected):
            return f"with {queries} queries, perturb gives other copies than offsets: {copies.tolist()}"
        # On a linear loss every difference is exact.
        slopes = z @ torch.tensor([0.5, 0.25])
        losses = torch.stack([factor * eps[0] * slopes[query] for query, factor in scheme.offsets])
        found = scheme.differences(losses, eps)
        if found.shape != (queries,):
            return f"with {queries} queries, differences has shape {list(found.shape)}, expected [{queries}]"
        if not torch.allclose(found, slopes, atol=1e-5):
            return f"with {queries} queries, differences of a linear loss are {found.tolist()}, not {slopes.tolist()}"
    if len({cls(queries).groups for queries in range(1, 4)}) < 3:
        return "the number of groups must grow with the queries"
    return ""
