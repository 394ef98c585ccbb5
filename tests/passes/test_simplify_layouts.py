"""Pass simplify-layouts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mobizo_passes import passes
from mobizo_passes.passes.simplify_layouts import LAYOUTS
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, sequences, targets, token_loss


def layouts(stage: Stage) -> list[str]:
    return [t for t in targets(stage.apply()) if t in {str(op) for op in LAYOUTS}]


class TestSimplifyLayouts(PassContract):
    kind = passes.SimplifyLayouts

    def example(self) -> Stage:
        return before(self.kind, Tiny(lambda y: torch.einsum("bto,op->btp", y, torch.eye(4))), sequences(), token_loss)

    def test_it_fires(self) -> None:
        stage = self.example()
        assert stage.count() >= 2
        assert len(layouts(stage)) < sum(t in {str(op) for op in LAYOUTS} for t in targets(stage.ir))

    def test_permutations_that_cancel_vanish(self) -> None:
        stage = before(self.kind, Tiny(lambda y: y.T.unsqueeze(1).permute(2, 0, 1).squeeze(2)), rows())
        assert stage.count() == 1
        assert layouts(stage) == []

    def test_a_chain_as_short_as_can_be_is_left_alone(self) -> None:
        """Heads are split off and swapped: reshape and permute are both needed."""
        stage = before(self.kind, Tiny(lambda y: y.reshape(2, 2, 2).transpose(0, 1) * 2), rows(), lambda o, y: o.sum())
        assert stage.count() == 0

    def test_a_node_inside_the_chain_that_others_read_is_kept(self) -> None:
        def body(y: Tensor) -> Tensor:
            z = y.T
            return z.T + z.sum()

        stage = before(self.kind, Tiny(body), rows())
        assert stage.count() == 0


@given(data=st.data())
def test_random_chains_keep_their_values(data: st.DataObject) -> None:
    """Any chain of reshapes and permutations, on sizes that divide in many ways, ones included."""
    plan: list[tuple[str, list[int]]] = []
    shape = [2, 5, 4]
    for _ in range(data.draw(st.integers(2, 5))):
        kind = data.draw(st.sampled_from(["permute", "split", "merge", "unsqueeze", "squeeze"]))
        if kind == "permute":
            order = data.draw(st.permutations(range(len(shape))))
            shape = [shape[d] for d in order]
            plan.append(("permute", list(order)))
            continue
        if kind == "split" and 4 in shape:
            at = shape.index(4)
            shape = [*shape[:at], 2, 2, *shape[at + 1 :]]
        elif kind == "merge" and len(shape) > 1:
            at = data.draw(st.integers(0, len(shape) - 2))
            shape = [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]
        elif kind == "unsqueeze" and len(shape) < 6:
            shape.insert(data.draw(st.integers(0, len(shape))), 1)
        elif kind == "squeeze" and 1 in shape:
            shape.remove(1)
        plan.append(("reshape", list(shape)))

    def body(y: Tensor) -> Tensor:
        z = y
        for name, argument in plan:
            z = z.permute(argument) if name == "permute" else z.reshape(argument)
        weights = torch.arange(z.numel(), dtype=torch.float32).reshape(z.shape)
        return (y.sum((0, 1)) + (z * weights).sum()).expand(2, 5, 4)

    stage = before(passes.SimplifyLayouts, Tiny(body), sequences(), token_loss)
    after = stage.apply()
    torch.testing.assert_close(stage.run(after)["loss"], stage.run()["loss"], rtol=1e-5, atol=1e-5)
    # At most reshape, permute, reshape for the chain itself.
    assert sum(t in {str(op) for op in LAYOUTS} for t in targets(after)) <= 3 + 2
