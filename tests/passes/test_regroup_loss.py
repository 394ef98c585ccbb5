"""RegroupLoss: one loss per group."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import RegroupLoss
from tests.passes.contract import PassContract, Tiny, parsed, rows, values_of

HEAD = """
    %weight: f32[4] = constant 'weight'
    %b: f32[4] = adapter 'b'
    %x: f32[2, 4] = batch 'x'
    %target: i64[2] = batch 'target'
    %y: f32[2, 4] = aten.add(%x, %b)  # | | batch 0
"""


def losses_are(old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
    """Assert that there is one group now, whose loss is the mean of what the loss was."""
    losses = new.run(values)["losses"]
    assert list(losses.shape) == [1]
    torch.testing.assert_close(losses[0], old.run(values)["loss"].mean(), rtol=1e-6, atol=1e-6)


class TestRegroupLoss(PassContract):
    one = RegroupLoss()
    before = f"""{HEAD}
        %loss: f32[] = aten.cross_entropy_loss(%y, %target)  # top | | batch lost

        return %loss: f32[] = loss
    """
    after = """
        %b: f32[4] = adapter 'b'
        %x: f32[2, 4] = batch 'x'
        %target: i64[2] = batch 'target'

        %y: f32[2, 4] = aten.add(%x, %b)
        %cross_entropy_loss: f32[2] = aten.cross_entropy_loss(%y, %target, None, 0, -100, 0.0)  # top | regroup-loss
        %ne: b8[2] = aten.ne(%target, -100)  # top | regroup-loss
        %_to_copy: f32[2] = aten._to_copy(%ne, dtype=f32)  # top | regroup-loss
        %reduce_loss: f32[1] = mobizo.reduce_loss(%cross_entropy_loss, %_to_copy, 1, 0, 1, 'mean')  # top | regroup-loss

        return %reduce_loss: f32[1] = losses
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        losses_are(old, new, values)

    @pytest.mark.parametrize(
        ("calls", "count"),
        [
            (["%loss: f32[] = aten.cross_entropy_loss(%y, %target, None, 2)"], 1),
            (["%loss: f32[] = aten.cross_entropy_loss(%y, %target, %weight)"], 1),
            (["%loss: f32[] = aten.cross_entropy_loss(%y, %target, None, 1, 1, 0.2)"], 1),
            (["%loss: f32[2] = aten.cross_entropy_loss(%y, %target, None, 0)  # | | batch 0"], 1),
            (
                [
                    "%log: f32[2, 4] = aten.log_softmax(%y, 1)  # | | batch 0",
                    "%loss: f32[] = aten.nll_loss_nd(%log, %target)",
                ],
                1,
            ),
            (
                [
                    "%square: f32[2, 4] = aten.square(%y)  # | | batch 0",
                    "%mean: f32[] = aten.mean(%square)",
                    "%sqrt: f32[] = aten.sqrt(%mean)",
                    "%loss: f32[] = aten.exp(%sqrt)",
                ],
                1,
            ),
            (
                [
                    "%ce: f32[] = aten.cross_entropy_loss(%y, %target)",
                    "%square: f32[2, 4] = aten.square(%y)  # | | batch 0",
                    "%mean: f32[] = aten.mean(%square)",
                    "%add: f32[] = aten.add(%ce, %mean)",
                    "%sum_1: f32[] = aten.sum(%y)",
                    "%loss: f32[] = aten.sub(%add, %sum_1)",
                ],
                3,
            ),
            (
                [
                    "%top: f32[] = aten.max(%x)",
                    "%div: f32[2, 4] = aten.div(%y, %top)  # | | batch 0",
                    "%loss: f32[] = aten.mean(%div)",
                ],
                1,
            ),
        ],
        ids=["sum", "weights", "smoothed", "per example", "nll", "of a mean", "three terms", "a shared scalar"],
    )
    def test_reductions(self, calls: list[str], count: int) -> None:
        marked = [call if "#" in call else f"{call}  # | | batch lost" for call in calls]
        kind = calls[-1].split()[1]
        old = parsed("\n".join([HEAD, *marked, f"return %loss: {kind} = loss"]))
        new = old.clone()
        assert self.one(new) == count
        losses_are(old, new, values_of(old))

    def test_an_unknown_reduction_is_refused(self) -> None:
        text = f"{HEAD}\n%loss: f32[] = aten.max(%y)  # head | | batch lost\nreturn %loss: f32[] = loss"
        message = r"puts all examples of the batch together: %loss = aten.max.default in module 'head'\n  use a mean"
        with pytest.raises(mz.BatchCoupled, match=message):
            self.one(parsed(text))

    def test_a_scalar_that_feeds_examples_again_is_refused(self) -> None:
        text = f"""{HEAD}
            %mean: f32[] = aten.mean(%y)  # | | batch lost
            %div: f32[2, 4] = aten.div(%y, %mean)  # | | batch lost
            %loss: f32[] = aten.cross_entropy_loss(%div, %target)  # | | batch lost
            return %loss: f32[] = loss
        """
        with pytest.raises(mz.BatchCoupled, match=r"reduced over the whole batch feeds %div = aten.div.Tensor"):
            self.one(parsed(text))

    def test_a_loss_without_the_adapter_is_refused(self) -> None:
        text = f"{HEAD}\n%loss: f32[] = aten.mean(%x)\nreturn %loss: f32[] = loss"
        with pytest.raises(mz.UnsupportedOp, match="the loss does not depend on the adapter: %loss"):
            self.one(parsed(text))


def test_a_float64_loss_leaves_the_adapter_float32() -> None:
    model, batch = Tiny(), rows()
    compiled = mz.transform(model, batch, loss=lambda o, y: F.cross_entropy(o.double(), y))
    step = mz.verify(compiled, model, batch)
    assert {value.dtype for value in (step.losses, step.projected_gradients, *step.adapter.values())} == {torch.float32}
