"""Hypothesis strategies for property tests of a compiled model: what a step is given, and whole models.

    from mobizo_passes.testing import strategies

Importing this raises `LibraryMissing` where hypothesis is not installed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from mobizo_passes.errors import InputError
from mobizo_passes.testing.drawing import st
from mobizo_passes.testing.models import random
from mobizo_passes.testing.random_models.cases import RandomModel, random_models
from mobizo_passes.zo.estimators import Estimator, ForwardGradient, OneSided, TwoSided

__all__ = [
    "RandomModel",
    "adapters",
    "batches",
    "epsilons",
    "estimators",
    "noise_kinds",
    "random_models",
    "seeds",
    "trainables",
]


@st.composite
def estimators(draw: st.DrawFn, differentiating: bool = False, most: int = 4) -> Estimator:
    """Every estimator of 1 to `most` queries, normalized or not; a standard deviation needs two perturbed losses.

    Those that take no differences are among them if `differentiating`.
    """
    kinds = [TwoSided, OneSided, *([ForwardGradient] if differentiating else [])]
    kind, queries = draw(st.sampled_from(kinds)), draw(st.integers(1, most))
    alone = not kind.uses_epsilon or (kind is OneSided and queries == 1)
    return kind(queries=queries, normalize=None if alone else draw(st.sampled_from([None, "std"])))


def noise_kinds() -> st.SearchStrategy[str]:
    """What `transform` takes as ``noise=``."""
    return st.sampled_from(["gaussian", "rademacher"])


def trainables() -> st.SearchStrategy[str]:
    """Which factors of LoRA are trained: what `transform` takes as ``trainable=``."""
    return st.sampled_from(["lora_B", "lora_A+lora_B"])


def seeds() -> st.SearchStrategy[int]:
    """Every seed of a step: 64-bit integers."""
    return st.integers(-(2**63), 2**63 - 1)


def epsilons() -> st.SearchStrategy[float]:
    """Radii of a perturbation at which float32 still tells two losses apart."""
    return st.sampled_from([1e-3, 1e-2, 5e-2])


@st.composite
def adapters(draw: st.DrawFn, adapter: Mapping[str, Tensor], scale: float = 0.3) -> dict[str, Tensor]:
    """Adapters of the names and shapes of this one, FQN -> float32 tensor, normal with deviation `scale`."""
    seed = draw(st.integers(0, 2**31))
    return {name: scale * random(*value.shape, seed=seed + i) for i, (name, value) in enumerate(adapter.items())}


@st.composite
def batches(draw: st.DrawFn, example_inputs: Any, keep: Collection[str | int] = ()) -> Any:
    """Batches of the structure, shapes and dtypes of `example_inputs`, a tuple or a dict of tensors.

    Floating-point values are normal, about the example's mean and with its deviation. Integers lie between the
    example's smallest and largest that are not negative; negative ones, such as the label -100 for what does not count,
    stay where they are. Booleans, what is no tensor, and the inputs whose names or positions are in `keep` (an
    attention mask) are the example's own. Raises `InputError` for other structures.
    """
    if not isinstance(example_inputs, Mapping | tuple):
        raise InputError(f"example inputs are a tuple or a dict, found {type(example_inputs).__name__}")
    seed = draw(st.integers(0, 2**31))
    pairs = example_inputs.items() if isinstance(example_inputs, Mapping) else enumerate(example_inputs)
    made = {key: value if key in keep else _like(value, seed + i) for i, (key, value) in enumerate(pairs)}
    return made if isinstance(example_inputs, Mapping) else tuple(made.values())


def _like(value: Any, seed: int) -> Any:
    if not isinstance(value, Tensor) or value.dtype == torch.bool or not value.numel():
        return value
    if value.is_floating_point():
        spread = value.float().std(correction=0)
        return (value.float().mean() + spread * random(*value.shape, seed=seed)).to(value.dtype)
    counted = value >= 0
    if not counted.any():
        return value
    low, high = int(value[counted].min()), int(value[counted].max())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(low, high + 1, value.shape, generator=generator, dtype=value.dtype)
    return torch.where(counted, drawn, value)
