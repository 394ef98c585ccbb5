"""Random graphs: each agrees with the sequential reference, or is refused with a reason that names a node."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import event, given, seed, settings
from hypothesis import strategies as st

import mobizo_passes as mz
from mobizo_passes.testing.random_models.cases import TRAINED, RandomModel, random_models
from mobizo_passes.testing.strategies import noise_kinds
from tests.graphs.judge import judge

# Hypothesis varies what it has already drawn once it has ten examples: many short runs try more kinds of graph.
PER_CHUNK = 10
CHUNKS = max(32, (settings.default.max_examples if settings.default else 0) // PER_CHUNK)
# Each part stays in one process of a run; what is refused is counted part by part.
PARTS = 2
# Without coupling across the batch, what is refused is an operator nobody wrote a rule for yet.
REFUSED_SHARE = 0.1
seen: dict[int, Counter[str]] = {number: Counter() for number in range(PARTS)}
estimators = st.builds(lambda kind, q: kind(queries=q), st.sampled_from([mz.TwoSided, mz.OneSided]), st.integers(1, 2))


def part(number: int, value: int) -> Any:
    return pytest.param(value, id=f"part{number}-{value}")


@pytest.mark.parametrize("chunk", [part(chunk * PARTS // CHUNKS, chunk) for chunk in range(CHUNKS)])
def test_random_graphs(chunk: int) -> None:
    @seed(chunk)
    @settings(max_examples=PER_CHUNK)
    @given(case=random_models(), estimator=estimators, noise=noise_kinds(), trained=st.sampled_from(TRAINED))
    def agrees_or_is_refused(case: RandomModel, estimator: Any, noise: str, trained: str) -> None:
        options = {"estimator": estimator, "noise": noise, "trainable": case.trained(trained)}
        refusal = judge(case, options)
        mixes = "coupled" if case.mixes(trained) else "free"
        event(f"{mixes}: {'agrees' if refusal is None else type(refusal).__name__}")
        kind = f"{mixes}, {'agrees' if refusal is None else 'refused'}"
        seen[chunk * PARTS // CHUNKS][kind] += 1

    agrees_or_is_refused()


@pytest.mark.parametrize("number", [part(number, number) for number in range(PARTS)])
def test_few_models_without_coupling_are_refused(number: int) -> None:
    counts = seen[number]
    total = counts["free, agrees"] + counts["free, refused"]
    if total < 100:
        pytest.skip(f"only {total} random models were tried in this process")
    assert counts["free, refused"] <= REFUSED_SHARE * total, counts
