"""Canonicalize: nodes that change nothing go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mobizo_passes import passes
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, targets


class TestCanonicalize(PassContract):
    kind = passes.Canonicalize

    def example(self) -> Stage:
        def body(y: Tensor) -> Tensor:
            return F.dropout(y.clone().float(), 0.5, training=False).view(2, 4).view(4, 2).view(2, 4)

        return before(self.kind, Tiny(body), rows())

    def test_it_fires(self) -> None:
        stage = self.example()
        assert {"aten.clone.default", "aten.view.default"} <= set(targets(stage.ir))
        left = targets(stage.apply())
        assert not {"aten.clone.default", "aten.dropout.default", "aten.view.default"} & set(left)
        assert left.count("aten.reshape.default") == 2

    @pytest.mark.parametrize(
        "body",
        [
            lambda y: y.double().float(),
            lambda y: y.reshape(4, 2).reshape(2, 4),
            lambda y: y.unsqueeze(1).expand(2, 3, 4).sum(1),
            lambda y: torch.dropout(y, 0.0, False) + 0,
        ],
    )
    def test_near_misses_are_left_alone(self, body: Any) -> None:
        stage = before(self.kind, Tiny(body), rows())
        wanted = {"aten._to_copy.default", "aten.reshape.default", "aten.expand.default", "aten.add.Tensor"}
        old, new = targets(stage.ir), targets(stage.apply())
        kept = [t.replace("view", "reshape") for t in old if t.replace("view", "reshape") in wanted]
        assert kept
        assert [t for t in new if t in wanted] == kept

    def test_broadcast_tensors_becomes_an_expand(self) -> None:
        def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
            a, b = torch.broadcast_tensors(outputs, wanted)
            return (a - b).square().mean()

        stage = before(self.kind, Tiny(), (rows()[0], torch.ones(1, 4)), loss)
        after = targets(stage.apply())
        assert "aten.broadcast_tensors.default" not in after
        assert after.count("aten.expand.default") == 1
        self.compare(stage.run(), stage.run(stage.apply()), stage)
