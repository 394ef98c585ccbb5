"""All passes in a row: what they make of the smallest model, as it is read and in core ATen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F

import mobizo_passes as mz
from mobizo_passes.graph.text import to_text
from tests.passes.contract import Tiny, rows, sequences, token_loss


@pytest.fixture(scope="module")
def classifier() -> mz.TrainingProgram:
    return mz.transform(Tiny(layers=2), rows(), loss=F.cross_entropy, estimator=mz.TwoSided(1))


@pytest.mark.parametrize("method", ["step", "apply", "loss", "logits"])
def test_methods(classifier: mz.TrainingProgram, golden: Callable[[str, str], None], method: str) -> None:
    golden(method, classifier.text(method))
    golden(f"{method}_core", to_text(classifier.core_ir(method)))


def test_a_step_over_tokens(golden: Callable[[str, str], None]) -> None:
    program = mz.transform(Tiny(), sequences(), loss=token_loss, estimator=mz.OneSided(2, normalize="std"))
    golden("step_tokens", program.text("step"))


def test_the_passes_and_their_rewrites(classifier: mz.TrainingProgram) -> None:
    rewrites = {record.name: record.rewrites for record in classifier.history}
    assert list(rewrites.items()) == [
        ("canonicalize", 0),
        ("unstack-numbers", 0),
        ("split-complex", 0),
        ("drop-shifts", 0),
        ("fold-constants", 0),
        ("simplify-layouts", 0),
        ("canonicalize-products", 0),
        ("lift-adapter", 2),
        ("decompose-for-batching", 0),
        ("hoist-selections", 0),
        ("insert-mp-lora", 2),
        ("regroup-loss", 1),
        ("insert-noise", 2),
        ("expand-perturbations", 10),
        ("append-update", 2),
    ]
