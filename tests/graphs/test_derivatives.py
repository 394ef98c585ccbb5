"""Random graphs, differentiated: gradients and directional derivatives equal autograd's in float64, or are refused.

A refusal names a node.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import event, given, seed, settings
from hypothesis import strategies as st

import mobizo_passes as mz
from mobizo_passes.testing.random_models.cases import TRAINED, RandomModel, random_models
from tests.graphs.judge import NODE

# As for estimates: many short runs try more kinds of graph. A fifth as many: the graphs are the same, and each model is
# captured anew, which is what takes the time.
PER_CHUNK = 8
CHUNKS = max(12, (settings.default.max_examples if settings.default else 0) // PER_CHUNK)
seen: Counter[str] = Counter()
estimators = st.sampled_from([mz.Exact(), mz.ForwardGradient(2)])


def judge(case: RandomModel, estimator: mz.Estimator, trained: str) -> mz.UnsupportedOp | None:
    """Return the refusal, or None if what the estimator gives is autograd's; anything else raises."""
    model, inputs = case.build(), case.inputs()
    try:
        program = mz.transform(model, inputs, loss=case.loss_fn(), estimator=estimator, trainable=case.trained(trained))
    except mz.UnsupportedOp as refusal:
        if not NODE.search(str(refusal)):
            raise AssertionError("the refusal names no node") from refusal
        return refusal.with_traceback(None)
    mz.verify(program, model, inputs)
    return None


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_graphs(chunk: int) -> None:
    @seed(1000 + chunk)
    @settings(max_examples=PER_CHUNK)
    @given(case=random_models(), estimator=estimators, trained=st.sampled_from(TRAINED))
    def agrees_or_is_refused(case: RandomModel, estimator: mz.Estimator, trained: str) -> None:
        refusal = judge(case, estimator, trained)
        coupled = case.mixes(trained) and isinstance(estimator, mz.ForwardGradient)
        kind = f"{'coupled' if coupled else 'free'}, {'agrees' if refusal is None else 'refused'}"
        event(kind)
        seen[kind] += 1

    agrees_or_is_refused()


def test_few_models_without_coupling_are_refused() -> None:
    total = seen["free, agrees"] + seen["free, refused"]
    if total < 30:
        pytest.skip(f"only {total} random models were tried in this process")
    assert seen["free, refused"] <= 0.1 * total, seen
