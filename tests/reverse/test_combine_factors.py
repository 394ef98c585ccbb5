"""CombineFactors: two factors of a cotangent are multiplied in the forward if that leaves less to hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.passes import CombineFactors
from tests.models import Lora, random, seeded
from tests.passes.contract import PassContract, left_alone

INPUTS = """
        %b: f32[3] = adapter 'b'
        %x: f32[2, 3] = batch 'x'
"""
# A gate, %w, of %v. What is written of its gradient is the part that goes through the gate.
FORWARD = """
        %u: f32[2, 3] = aten.mul(%x, %b)
        %v: f32[2, 3] = aten.exp(%u)
        %w: f32[2, 3] = aten.sigmoid(%u)
        %y: f32[2, 3] = aten.mul(%v, %w)
        %z: f32[2, 3] = aten.exp(%y)
        %l: f32[] = aten.sum(%z)
"""
LATE = """
        %s: f32[2, 3] = aten.mul(%q, %x)  # | append-gradients
        %g: f32[3] = aten.sum(%s, [0])  # | append-gradients

        return %l: f32[] = loss
        return %g: f32[3] = gradient 'b'
"""


class TestCombineFactors(PassContract):
    one = CombineFactors()
    # The slope of %w is made of %w alone: with %v it makes one value, for which two need no longer be held.
    before = f"""{INPUTS}{FORWARD}
        %p: f32[2, 3] = aten.mul(%z, %v)  # | append-gradients
        %square: f32[2, 3] = aten.mul(%w, %w)  # | append-gradients
        %slope: f32[2, 3] = aten.sub(%w, %square)  # | append-gradients
        %q: f32[2, 3] = aten.mul(%p, %slope)  # | append-gradients
{LATE}"""
    after = f"""{INPUTS}
        %u: f32[2, 3] = aten.mul(%x, %b)
        %v: f32[2, 3] = aten.exp(%u)
        %w: f32[2, 3] = aten.sigmoid(%u)
        %mul: f32[2, 3] = aten.mul(%w, %w)  # | combine-factors
        %sub: f32[2, 3] = aten.sub(%w, %mul)  # | combine-factors
        %mul_1: f32[2, 3] = aten.mul(%v, %sub)  # | combine-factors
        %y: f32[2, 3] = aten.mul(%v, %w)
        %z: f32[2, 3] = aten.exp(%y)
        %l: f32[] = aten.sum(%z)
        %q: f32[2, 3] = aten.mul(%z, %mul_1)  # | append-gradients
{LATE}"""

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            # The gradient reads %v again, so that one value more would be held.
            ("aten.sum(%s, [0])", "aten.mul(%s, %v)"),
            # The slope has another reader, which would hold it.
            ("aten.sum(%s, [0])", "aten.mul(%s, %slope)"),
            # So has the product with the first factor.
            ("aten.sum(%s, [0])", "aten.mul(%s, %p)"),
            # The second factor is not known before the cotangent.
            ("aten.mul(%w, %w)", "aten.mul(%z, %w)"),
            # The first factor is a row for all.
            ("aten.mul(%z, %v)", "aten.mul(%z, %b)"),
        ],
    )
    def test_near_misses(self, old: str, new: str) -> None:
        text = self.before.replace(old, new)
        assert text != self.before
        if "[0]" in old:
            text = text.replace("%g: f32[3]", "%g: f32[2, 3]")
        left_alone(text, self.one)


class Gated(nn.Module):
    """A gated layer between two of LoRA; float32[B, 5] to float32[B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.up, self.last = Lora(5, 4), nn.Linear(4, 7), nn.Linear(4, 7), Lora(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.nn.functional.silu(self.gate(h)) * self.up(h))


def test_the_gradient_of_a_gated_layer_is_autograds() -> None:
    model, x, target = seeded(Gated()), random(2, 5), random(2, 3)
    program = mz.transform(model, (x, target), estimator=mz.Exact(), loss=torch.nn.functional.mse_loss)
    assert {each.name: each.rewrites for each in program.history}["combine-factors"] == 1
    mz.verify(program, model, (x, target))
