"""ExpandPerturbations: all perturbed copies in one forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes import passes
from mobizo_passes.graph.facts import facts
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, targets


class TestExpandPerturbations(PassContract):
    kind = passes.ExpandPerturbations

    def example(self) -> Stage:
        return before(self.kind, Tiny(), rows())

    def compare(self, old: dict[str, Tensor], new: dict[str, Tensor], stage: Stage) -> None:
        """Group 0 is the loss at θ+εz, group 1 that at θ−εz."""
        fqn = "layer.lora_B.weight"
        value = stage.values[fqn]
        z = mz.reference.draw({fqn: value}, 1, 1, "gaussian")[fqn][0]
        for group, sign in enumerate((1, -1)):
            stage.values[fqn] = value + sign * 0.01 * z
            torch.testing.assert_close(new["losses"][group], stage.run()["losses"][0], rtol=1e-6, atol=1e-6)

    def test_it_fires(self) -> None:
        after = self.example().apply()
        assert list(after.output_node("losses").meta["val"].shape) == [2]
        assert targets(after).count("mobizo.expand.default") == 3  # x·lora_A, the base layer's output, the labels
        assert not [n for n in after.graph.nodes if facts(n).expanded and n.target is torch.ops.aten.linear.default]

    def test_shared_values_are_expanded_as_late_as_possible(self) -> None:
        after = self.example().apply()
        for node in after.graph.nodes:
            if node.target is torch.ops.mobizo.expand.default:
                assert all(facts(user).expanded for user in node.users)
                assert not facts(node).expanded

    def test_a_value_is_expanded_once(self) -> None:
        stage = before(self.kind, Tiny(lambda y: y * (c := torch.arange(2.0)[:, None]) + c), rows())
        expanded = [n.args for n in stage.apply().graph.nodes if n.target is torch.ops.mobizo.expand.default]
        assert len({(args[0], *args[1:]) for args in expanded}) == len(expanded)

    def test_mixing_examples_is_refused(self) -> None:
        with pytest.raises(mz.BatchCoupled, match=r"%flip = aten.flip.default in module '<top level>'"):
            before(self.kind, Tiny(lambda y: y.flip(0)), rows()).apply()
