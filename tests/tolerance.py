"""How far a step may be from another that computes the same losses in another order."""

from __future__ import annotations

import math

from torch import Tensor

import mobizo_passes as mz


def gradient_bound(estimator: mz.Estimator, losses: Tensor, gradients: Tensor, eps: float, error: float) -> float:
    """Largest difference of a projected gradient when every loss moves by at most `error`.

    Without normalization c·error/ε bounds it; c is 2 for a difference of two losses over 2ε or ε. With it, g = h/s
    and s, the standard deviation of n losses, moves by at most r = error·√(n/(n−1)), because subtracting the mean
    lengthens nothing. From h'/s' − h/s = (h' − h + (s − s')·h/s) / s' follows (c·error/ε + r·|g|) / (s − r).
    Infinite where s is not above r: only the formula on a step's own losses can be checked there.
    """
    plain = estimator.error_factor * error / eps
    if estimator.normalize is None:
        return plain
    perturbed = losses[list(estimator.perturbed_groups)]
    count = len(perturbed)
    std, moved = float(perturbed.double().std()), error * math.sqrt(count / (count - 1))
    return (plain + moved * float(gradients.abs().max())) / (std - moved) if std > moved else math.inf
