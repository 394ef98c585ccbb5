"""LiftAdapter: trainable parameters become inputs."""

from __future__ import annotations

from torch import Tensor

from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import LiftAdapter
from tests.passes.contract import PassContract, left_alone, same_numbers


class TestLiftAdapter(PassContract):
    one = LiftAdapter(("b", "c"))
    before = """
        %c: f32[1, 4] = parameter 'c'
        %a: f32[1, 4] = parameter 'a'
        %b: f32[4, 1] = parameter 'b'
        %x: f32[2, 4] = batch 'x'

        %down: f32[2, 1] = aten.linear(%x, %a)
        %up: f32[2, 4] = aten.linear(%down, %b)
        %out: f32[2, 1] = aten.linear(%up, %c)

        return %out: f32[2, 1] = logits
    """
    after = """
        %a: f32[1, 4] = parameter 'a'
        %b: f32[4, 1] = adapter 'b'
        %c: f32[1, 4] = adapter 'c'
        %x: f32[2, 4] = batch 'x'

        %down: f32[2, 1] = aten.linear(%x, %a)
        %up: f32[2, 4] = aten.linear(%down, %b)
        %out: f32[2, 1] = aten.linear(%up, %c)

        return %out: f32[2, 1] = logits
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        """The adapter is given from now on, and no longer held."""
        same_numbers(old.run(values), new.run(values))
        assert list(new.state) == ["a"]
        assert not new.run({**values, "b": values["b"] + 1})["logits"].equal(new.run(values)["logits"])

    def test_other_names_are_left_alone(self) -> None:
        left_alone(self.before, LiftAdapter(("x", "lora_X")))
