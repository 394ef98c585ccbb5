"""Random graphs: each agrees with the sequential reference, or is refused with a reason that names a node."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import event, given, seed, settings
from hypothesis import strategies as st

import mobizo_passes as mz
from tests.graphs.cases import Case, cases
from tests.graphs.judge import judge
from tests.strategies import kinds, trainables

# Hypothesis varies what it has already drawn once it has ten examples: many short runs try more kinds of graph.
CHUNKS = 32
PER_CHUNK = -(-max(settings.default.max_examples if settings.default else 0, 10 * CHUNKS) // CHUNKS)
# Without coupling across the batch, what is refused is an operator nobody wrote a rule for yet.
REFUSED_SHARE = 0.1
seen: Counter[str] = Counter()
estimators = st.builds(lambda kind, q: kind(queries=q), st.sampled_from([mz.TwoSided, mz.OneSided]), st.integers(1, 2))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_graphs(chunk: int) -> None:
    @seed(chunk)
    @settings(max_examples=PER_CHUNK)
    @given(case=cases(), estimator=estimators, noise=kinds(), trainable=trainables())
    def agrees_or_is_refused(case: Case, estimator: Any, noise: str, trainable: str) -> None:
        refusal = judge(case, {"estimator": estimator, "noise": noise, "trainable": trainable})
        what = "agrees" if refusal is None else type(refusal).__name__
        event(f"{'coupled' if case.coupled else 'free'}: {what}")
        seen[f"{'coupled' if case.coupled else 'free'}, {'agrees' if refusal is None else 'refused'}"] += 1

    agrees_or_is_refused()


def test_few_models_without_coupling_are_refused() -> None:
    total = seen["free, agrees"] + seen["free, refused"]
    if total < 100:
        pytest.skip(f"only {total} random models were tried in this process")
    assert seen["free, refused"] <= REFUSED_SHARE * total, seen
    # The strategy does draw models that must be refused.
    assert seen["coupled, refused"] >= 5, seen
