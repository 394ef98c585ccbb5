"""SimplifyLayouts: each change of layout in as few nodes as it needs."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mobizo_passes.graph.text import to_text
from mobizo_passes.passes import SimplifyLayouts
from mobizo_passes.passes.simplify_layouts import LAYOUTS
from tests.passes.contract import PassContract, left_alone, parsed, rewritten, targets, values_of


class TestSimplifyLayouts(PassContract):
    one = SimplifyLayouts()
    # What einsum("bto,op->btp") consists of.
    before = """
        %y: f32[2, 5, 4] = batch 'y'
        %w: f32[1, 4, 4] = constant 'w'

        %unsqueeze: f32[2, 5, 4, 1] = aten.unsqueeze(%y, 3)
        %permute: f32[2, 5, 1, 4] = aten.permute(%unsqueeze, [0, 1, 3, 2])
        %permute_1: f32[2, 5, 4, 1] = aten.permute(%permute, [0, 1, 3, 2])
        %reshape: f32[1, 10, 4] = aten.reshape(%permute_1, [1, 10, 4])
        %bmm: f32[1, 10, 4] = aten.bmm(%reshape, %w)
        %reshape_1: f32[2, 5, 1, 4] = aten.reshape(%bmm, [2, 5, 1, 4])
        %permute_2: f32[2, 5, 4, 1] = aten.permute(%reshape_1, [0, 1, 3, 2])
        %reshape_2: f32[2, 5, 4] = aten.reshape(%permute_2, [2, 5, 4])

        return %reshape_2: f32[2, 5, 4] = logits
    """
    after = """
        %y: f32[2, 5, 4] = batch 'y'
        %w: f32[1, 4, 4] = constant 'w'

        %reshape_3: f32[1, 10, 4] = aten.reshape(%y, [1, 10, 4])  # | simplify-layouts
        %bmm: f32[1, 10, 4] = aten.bmm(%reshape_3, %w)
        %reshape_4: f32[2, 5, 4] = aten.reshape(%bmm, [2, 5, 4])  # | simplify-layouts

        return %reshape_4: f32[2, 5, 4] = logits
    """

    def test_permutations_that_cancel_vanish(self) -> None:
        text = """
            %y: f32[2, 4] = batch 'y'
            %t: f32[4, 2] = aten.transpose(%y, 0, 1)
            %unsqueeze: f32[4, 1, 2] = aten.unsqueeze(%t, 1)
            %permute: f32[2, 4, 1] = aten.permute(%unsqueeze, [2, 0, 1])
            %squeeze: f32[2, 4] = aten.squeeze(%permute, 2)
            %relu: f32[2, 4] = aten.relu(%squeeze)
            return %relu: f32[2, 4] = logits
        """
        assert rewritten(text, self.one)[1:-1] == ["%relu: f32[2, 4] = aten.relu(%y)"]

    def test_a_chain_as_short_as_can_be_is_left_alone(self) -> None:
        """Heads are split off and swapped: reshape and permute are both needed."""
        text = """
            %y: f32[2, 4] = batch 'y'
            %reshape: f32[2, 2, 2] = aten.reshape(%y, [2, 2, 2])
            %permute: f32[2, 2, 2] = aten.permute(%reshape, [1, 0, 2])
            return %permute: f32[2, 2, 2] = logits
        """
        left_alone(text, self.one)

    def test_a_node_inside_the_chain_that_others_read_is_kept(self) -> None:
        text = """
            %y: f32[2, 4] = batch 'y'
            %t: f32[4, 2] = aten.transpose(%y, 0, 1)
            %t_1: f32[2, 4] = aten.transpose(%t, 0, 1)
            %sum_1: f32[] = aten.sum(%t)
            %add: f32[2, 4] = aten.add(%t_1, %sum_1)
            return %add: f32[2, 4] = logits
        """
        left_alone(text, self.one)


@given(data=st.data())
def test_random_chains_keep_their_values(data: st.DataObject) -> None:
    """Any chain of reshapes and permutations, on sizes that divide in many ways, ones included."""
    shape = [2, 5, 4]
    calls: list[str] = []
    last = "y"
    for place in range(data.draw(st.integers(2, 5))):
        kind = data.draw(st.sampled_from(["permute", "split", "merge", "unsqueeze", "squeeze"]))
        argument = shape
        if kind == "permute":
            argument = list(data.draw(st.permutations(range(len(shape)))))
            shape = [shape[d] for d in argument]
        elif kind == "split" and 4 in shape:
            at = shape.index(4)
            argument = shape = [*shape[:at], 2, 2, *shape[at + 1 :]]
        elif kind == "merge" and len(shape) > 1:
            at = data.draw(st.integers(0, len(shape) - 2))
            argument = shape = [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]
        elif kind == "unsqueeze" and len(shape) < 6:
            at = data.draw(st.integers(0, len(shape)))
            argument = shape = [*shape[:at], 1, *shape[at:]]
        elif kind == "squeeze" and 1 in shape:
            at = shape.index(1)
            argument = shape = [*shape[:at], *shape[at + 1 :]]
        calls.append(
            f"%z{place}: f32{shape} = aten.{'permute' if kind == 'permute' else 'reshape'}(%{last}, {argument})"
        )
        last = f"z{place}"
    assert math.prod(shape) == 40
    # Other nodes read both ends of the chain.
    text = "\n".join(
        [
            "%y: f32[2, 5, 4] = batch 'y'",
            *calls,
            f"%end: f32{shape} = aten.relu(%{last})",
            f"return %end: f32{shape} = logits",
        ]
    )
    ir = parsed(text)
    after = ir.clone()
    SimplifyLayouts()(after)
    values = values_of(ir)
    assert torch.equal(after.run(values)["logits"], ir.run(values)["logits"])
    # At most reshape, permute, reshape.
    assert sum(t in {str(op) for op in LAYOUTS} for t in targets(after)) <= 3
    assert SimplifyLayouts()(after) == 0, to_text(after)
