"""RecomputeLayers: what a gradient reads of a layer is computed again."""

from __future__ import annotations

import pytest

import mobizo_passes as mz
from mobizo_passes.passes import RecomputeLayers
from tests.passes.contract import PassContract, left_alone, parsed

INPUTS = """
        %b: f32[3] = adapter 'b'
        %x: f32[2, 3] = batch 'x'
"""


class TestRecomputeLayers(PassContract):
    one = RecomputeLayers()
    # %h and %y are inside of the first layer; %z is the second one's input, and what follows it is needed at once.
    before = f"""{INPUTS}
        %h: f32[2, 3] = aten.mul(%x, %b)  # layers.0.up
        %y: f32[2, 3] = aten.sigmoid(%h)  # layers.0
        %z: f32[2, 3] = aten.exp(%y)  # layers.0
        %u: f32[2, 3] = aten.sigmoid(%z)  # layers.1
        %v: f32[2, 3] = aten.exp(%u)  # layers.1
        %l: f32[] = aten.sum(%v)
        %p: f32[2, 3] = aten.mul(%u, %v)  # layers.1 | append-gradients
        %q: f32[2, 3] = aten.mul(%p, %z)  # layers.0 | append-gradients
        %r: f32[2, 3] = aten.mul(%q, %y)  # layers.0 | append-gradients
        %s: f32[2, 3] = aten.mul(%r, %h)  # layers.0 | append-gradients
        %g: f32[3] = aten.sum(%s, [0])  # | append-gradients

        return %l: f32[] = loss
        return %g: f32[3] = gradient 'b'
    """
    after = f"""{INPUTS}
        %h: f32[2, 3] = aten.mul(%x, %b)  # layers.0.up
        %y: f32[2, 3] = aten.sigmoid(%h)  # layers.0
        %z: f32[2, 3] = aten.exp(%y)  # layers.0
        %u: f32[2, 3] = aten.sigmoid(%z)  # layers.1
        %v: f32[2, 3] = aten.exp(%u)  # layers.1
        %l: f32[] = aten.sum(%v)
        %p: f32[2, 3] = aten.mul(%u, %v)  # layers.1 | append-gradients
        %q: f32[2, 3] = aten.mul(%p, %z)  # layers.0 | append-gradients
        %mul: f32[2, 3] = aten.mul(%x, %b)  # layers.0.up | recompute-layers
        %sigmoid: f32[2, 3] = aten.sigmoid(%mul)  # layers.0 | recompute-layers
        %r: f32[2, 3] = aten.mul(%q, %sigmoid)  # layers.0 | append-gradients
        %s: f32[2, 3] = aten.mul(%r, %mul)  # layers.0 | append-gradients
        %g: f32[3] = aten.sum(%s, [0])  # | append-gradients

        return %l: f32[] = loss
        return %g: f32[3] = gradient 'b'
    """

    def test_one_layer_is_the_last(self) -> None:
        left_alone(self.before.replace("layers.1", "layers.0"), self.one)

    def test_a_model_without_layers_is_refused(self) -> None:
        with pytest.raises(mz.InputError, match="modules that their parent holds under a number"):
            self.one(parsed(self.before.replace("layers.0", "lower").replace("layers.1", "upper")))
