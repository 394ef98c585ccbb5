"""InsertMpLora: products with trainable factors become grouped products."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

import mobizo_passes as mz
from mobizo_passes.batching import Batch
from mobizo_passes.passes import InsertMpLora
from tests.passes.contract import PassContract, Tiny, lines, parsed, rewritten, rows, to_text


class TestInsertMpLora(PassContract):
    one = InsertMpLora(Batch(2, {"x": 0}))
    before = """
        %a: f32[1, 3] = parameter 'a'
        %b: f32[4, 1] = adapter 'b'
        %bias: f32[4] = parameter 'bias'
        %x: f32[2, 3] = batch 'x'

        %down: f32[2, 1] = aten.linear(%x, %a)
        %up: f32[2, 4] = aten.linear(%down, %b, %bias)  # layer.lora_B
        %relu: f32[2, 4] = aten.relu(%up)

        return %relu: f32[2, 4] = logits
    """
    # What holds no trainable factor stays as it is.
    after = """
        %a: f32[1, 3] = parameter 'a'
        %b: f32[4, 1] = adapter 'b'
        %bias: f32[4] = parameter 'bias'
        %x: f32[2, 3] = batch 'x'

        %unsqueeze: f32[1, 4, 1] = aten.unsqueeze(%b, 0)  # layer.lora_B | insert-mp-lora
        %down: f32[2, 1] = aten.linear(%x, %a)
        %mp_lora: f32[2, 4] = mobizo.mp_lora(%down, %unsqueeze, 0, 1, False)  # layer.lora_B | insert-mp-lora
        %add: f32[2, 4] = aten.add(%mp_lora, %bias)  # layer.lora_B | insert-mp-lora
        %relu: f32[2, 4] = aten.relu(%add)

        return %relu: f32[2, 4] = logits
    """

    def test_where_the_batch_lies(self) -> None:
        """It is followed from the inputs, through a transposition; a fold has an outer part."""
        text = """
            %b: f32[4, 3] = adapter 'b'
            %x: f32[2, 5, 3] = batch 'x'
            %t: f32[5, 2, 3] = aten.transpose(%x, 0, 1)
            %rows: f32[10, 3] = aten.reshape(%t, [10, 3])
            %y: f32[5, 2, 4] = aten.linear(%t, %b)
            %z: f32[10, 4] = aten.linear(%rows, %b)
            return %y: f32[5, 2, 4] = logits
            return %z: f32[10, 4] = loss
        """
        ir = parsed(text)
        assert self.one(ir) == 2
        shown = lines(to_text(ir, facts=True))
        assert "%t: f32[5, 2, 3] = aten.transpose(%x, 0, 1)  # | | batch 1" in shown
        assert "%rows: f32[10, 3] = aten.reshape(%t, [10, 3])  # | | batch 0 outer 5" in shown
        assert [line.partition(" = ")[2].partition("  #")[0] for line in shown if "mp_lora(" in line] == [
            "mobizo.mp_lora(%t, %unsqueeze, 1, 1, False)",
            "mobizo.mp_lora(%rows, %unsqueeze, 0, 5, False)",
        ]

    @pytest.mark.parametrize("transposed", [True, False])
    def test_a_factor_stored_the_other_way_round(self, transposed: bool) -> None:
        shape, call = ("[3, 4]", "matmul") if transposed else ("[4, 3]", "linear")
        text = f"""
            %b: f32{shape} = adapter 'b'
            %x: f32[2, 3] = batch 'x'
            %y: f32[2, 4] = aten.{call}(%x, %b)
            return %y: f32[2, 4] = logits
        """
        (line,) = [line for line in rewritten(text, self.one) if "mp_lora(" in line]
        assert f"mobizo.mp_lora(%x, %unsqueeze, 0, 1, {transposed})" in line

    def test_a_product_without_the_batch_is_left_alone(self) -> None:
        """It differs per group only: the walk stacks it, no batch is fused."""
        text = """
            %b: f32[4, 3] = adapter 'b'
            %c: f32[2, 4] = constant 'c'
            %x: f32[2, 3] = batch 'x'
            %norm: f32[2, 3] = aten.matmul(%c, %b)
            %y: f32[2, 3] = aten.mul(%x, %norm)
            return %y: f32[2, 3] = logits
        """
        ir = parsed(text)
        assert self.one(ir) == 0
        assert lines(to_text(ir)) == lines(text)


def test_both_factors_of_a_site() -> None:
    """The second product reads the first, which has just been replaced."""
    model = Tiny()
    compiled = mz.transform(model, rows(), loss=F.cross_entropy, trainable="lora_A+lora_B")
    assert str(compiled).count("mobizo.mp_lora(") == 2
    mz.verify(compiled, model, rows())
