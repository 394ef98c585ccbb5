"""What several workers contribute to one step, and how their projected gradients become one update.

Everything here is float64 arithmetic in a fixed order, rounded once to float32: whoever holds the same contributions
gets the same bits, whatever machine it is and however the contributions arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime_driver.format.numbers import as_float32

#: (seed, learning rate, projected gradients): what one call of ``apply`` takes.
Update = tuple[int, float, tuple[float, ...]]


@dataclass(frozen=True)
class Contribution:
    """One worker's part of a step. Floats are float32 values.

    Attributes:
        worker: a rank, or a client's id; contributions are ordered by it.
        seed: of the noise that the gradients are projected on.
        weight: what the worker's part counts, such as its number of examples.
        projected_gradients: q values, one a query.
        loss: of the worker's batch.
    """

    worker: int
    seed: int
    weight: float
    projected_gradients: tuple[float, ...]
    loss: float


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    # The product of two float32 values is exact in float64.
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _median(values: Sequence[float], weights: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _trimmed_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    cut = max(1, len(values) // 10) if len(values) > 2 else 0
    kept = sorted(zip(values, weights, strict=True))[cut : len(values) - cut]
    return _mean(*zip(*kept, strict=True))


#: How the values of several workers become one, for each query alone. ``mean``: weighted; ``median``: each worker
#: counts the same; ``trimmed_mean``: the weighted mean without the highest and the lowest tenth, at least one of each.
RULES: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "mean": _mean,
    "median": _median,
    "trimmed_mean": _trimmed_mean,
}


def by_seed(contributions: Sequence[Contribution]) -> dict[int, list[Contribution]]:
    """The contributions along each noise, in the order in which the seeds first occur."""
    groups: dict[int, list[Contribution]] = {}
    for each in contributions:
        groups.setdefault(each.seed, []).append(each)
    return groups


def combined(contributions: Sequence[Contribution], rule: str) -> tuple[tuple[float, ...], float]:
    """The projected gradients that are applied, q values for each seed, and the loss, the mean of all."""
    gradients: list[float] = []
    for group in by_seed(contributions).values():
        weights = [each.weight for each in group]
        columns = zip(*(each.projected_gradients for each in group), strict=True)
        gradients += [as_float32(RULES[rule](column, weights)) for column in columns]
    loss = _mean([each.loss for each in contributions], [each.weight for each in contributions])
    return tuple(gradients), as_float32(loss)


def updates(contributions: Sequence[Contribution], gradients: tuple[float, ...], lr: float) -> tuple[Update, ...]:
    """The calls of ``apply`` that make a step of ``gradients``, as :func:`combined` gave them.

    One seed: one call. Several: one each, with its share of the learning rate, which is the mean over all queries where
    an update is linear in its gradients.
    """
    groups = by_seed(contributions)
    if len(groups) == 1:
        return ((contributions[0].seed, lr, gradients),)
    total = sum(each.weight for each in contributions)
    width = len(gradients) // len(groups)
    return tuple(
        (seed, as_float32(lr * (sum(each.weight for each in group) / total)), gradients[start : start + width])
        for start, (seed, group) in zip(range(0, len(gradients), width), groups.items(), strict=True)
    )
