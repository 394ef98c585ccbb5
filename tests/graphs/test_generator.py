"""The generator of random graphs: what it draws, that it is deterministic, and that it finds a broken rule."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import fx

import mobizo_passes as mz
from mobizo_passes.batching import RULES, Batcher, Layout
from mobizo_passes.testing.random_models.builder import Choice
from mobizo_passes.testing.random_models.cases import ALL, RandomModel, assemble, random_models
from tests.graphs.judge import judge

UNCHECKED = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def drawn(count: int, number: int, **options: int) -> list[RandomModel]:
    """Draw cases without compiling anything; `options` are those of `random_models`."""
    found: list[RandomModel] = []

    @seed(number)
    @settings(max_examples=count, phases=[Phase.generate], database=None, suppress_health_check=UNCHECKED)
    @given(case=random_models(**options))
    def collect(case: RandomModel) -> None:
        found.append(case)

    collect()
    return found


def test_every_kind_of_block_is_drawn() -> None:
    samples = [case for number in range(40) for case in drawn(10, number)]
    counts = Counter(kind for case in samples for kind in case.kinds)
    assert set(counts) == set(ALL), set(ALL) - set(counts)
    assert min(counts.values()) >= 3, counts
    assert any(case.coupled for case in samples)
    assert len({case.source for case in samples}) > len(samples) // 2


def test_drawing_and_rendering_are_deterministic() -> None:
    once, again = drawn(30, 5), drawn(30, 5)
    assert [repr(case) for case in once] == [repr(case) for case in again]
    for case in once[:5]:
        first, second = case.build(), case.build()
        for (name, a), (other, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(a, b)


def test_every_drawn_model_runs() -> None:
    for case in (case for number in range(10) for case in drawn(10, number)):
        *inputs, labels = case.inputs()
        loss = case.loss_fn()(case.build()(*inputs), labels)
        assert torch.isfinite(loss).all(), case


def test_a_failing_case_prints_as_a_module() -> None:
    case = drawn(10, 3)[-1]
    text = repr(case)
    assert text.startswith("\nclass Model(nn.Module):\n")
    assert f"return self.head({case.source.rsplit('(', 1)[1]}" in text
    assert "# inputs and labels [" in text


# Hypothesis draws other models in another environment, so nothing is drawn here. The last two ways need one vector per
# example. Fixed rows of the batch, way 8 over time steps, are selected in each group: not refused.
@pytest.mark.parametrize(("way", "pooled"), [*((way, False) for way in range(8)), (7, True), (8, True)])
def test_every_way_of_mixing_the_batch_is_refused(way: int, pooled: bool) -> None:
    blocks = [Choice("lora"), *([Choice("pool")] if pooled else []), Choice("couple", flavour=way)]
    case = assemble((3, 4, 5), blocks, Choice("head"))
    assert case.coupled, case
    assert judge(case, {"estimator": mz.TwoSided(queries=1)}) is not None, case


def test_a_broken_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that lets `flip` run over the batch gives programs that are silently wrong."""
    flip = 4  # which way of mixing the batch

    def accepts(batcher: Batcher, node: fx.Node) -> Layout | None:
        return batcher.layout(node.args[0])

    def is_wrong(case: RandomModel) -> bool:
        try:
            judge(case, {"estimator": mz.TwoSided(queries=1)})
        except mz.VerificationFailed:
            return True
        return False

    with monkeypatch.context() as patched:
        patched.setitem(RULES, torch.ops.aten.flip.default, accepts)
        wrong = next((case for case in drawn(30, 4, coupling=flip, most=3) if case.coupled and is_wrong(case)), None)
    assert wrong is not None
    assert ".flip(" in wrong.source
    assert isinstance(judge(wrong, {}), mz.BatchCoupled)
