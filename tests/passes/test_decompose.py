"""Decompose: our operators become core ATen."""

from __future__ import annotations

import pytest

from mobizo_passes.graph.facts import facts
from mobizo_passes.passes import Decompose
from tests.passes.contract import PassContract, left_alone, parsed, rewritten, targets


class TestDecompose(PassContract):
    one = Decompose()
    before = """
        %w: f32[2, 4, 3] = constant 'w'
        %x: f32[2, 3] = batch 'x'

        %expand: f32[4, 3] = mobizo.expand(%x, 2, 0, 1)  # lora_A | expand-perturbations
        %mp_lora: f32[4, 4] = mobizo.mp_lora(%expand, %w, 0, 1, False)  # lora_B | insert-mp-lora
        %relu: f32[4, 4] = aten.relu(%mp_lora)
        %reduce_loss: f32[2] = mobizo.reduce_loss(%relu, None, 2, 0, 1, 'mean')

        return %reduce_loss: f32[2] = losses
    """
    after = """
        %w: f32[2, 4, 3] = constant 'w'
        %x: f32[2, 3] = batch 'x'

        %cat: f32[4, 3] = aten.cat([%x, %x])  # lora_A | decompose
        %view: f32[2, 2, 3] = aten.view(%cat, [2, -1, 3])  # lora_B | decompose
        %transpose: f32[2, 3, 4] = aten.transpose(%w, 1, 2)  # lora_B | decompose
        %bmm: f32[2, 2, 4] = aten.bmm(%view, %transpose)  # lora_B | decompose
        %view_1: f32[4, 4] = aten.view(%bmm, [4, 4])  # lora_B | decompose
        %relu: f32[4, 4] = aten.relu(%view_1)
        %view_2: f32[2, 8] = aten.view(%relu, [2, -1])  # | decompose
        %sum_1: f32[2] = aten.sum(%view_2, [1])  # | decompose
        %div: f32[2] = aten.div(%sum_1, 8)  # | decompose

        return %div: f32[2] = losses
    """

    @pytest.mark.parametrize(
        "call",
        [
            "f32[2] = mobizo.projected_gradients(%losses, %eps, 'two_sided')",
            "f32[3] = mobizo.projected_gradients(%losses, %eps, 'one_sided', 'std')",
            "f32[2, 4, 3] = mobizo.noise(%seed, 7, 2, [4, 3], 'gaussian')",
            "f32[2, 4, 3] = mobizo.noise(%seed, 7, 2, [4, 3], 'rademacher')",
            "f32[2, 1, 6] = mobizo.noise_stack(%seed, [7, 8], 1, [6], 'gaussian')",
            "f32[4, 4, 3] = mobizo.perturb(%b, %z, %eps, 'two_sided')",
            "f32[3, 4, 3] = mobizo.perturb(%b, %z, %eps, 'one_sided')",
            "f32[4, 3] = mobizo.update(%b, %z, %g, %eps)",
            "f32[4, 6] = mobizo.expand(%losses_2, 2, 1, 3)",
            "f32[4, 1, 3] = mobizo.gather_rows(%rows, %at)",
            "f32[4] = mobizo.row_sums(%b, 0, 1, 4)",
            "f32[4] = aten.cross_entropy_loss(%b, %classes, None, 0, 1, 0.0)",
            "f32[] = aten.cross_entropy_loss(%b, %classes, %weight, 1, 2)",
            "f32[] = aten.cross_entropy_loss(%b, %classes, None, 2)",
            "f32[] = aten.cross_entropy_loss(%b, %classes, None, 1, -100, 0.3)",
            "f32[] = aten.cross_entropy_loss(%b, %b)",
        ],
    )
    def test_each_operator_computes_what_its_definition_does(self, call: str) -> None:
        text = f"""
            %weight: f32[3] = constant 'weight'
            %b: f32[4, 3] = adapter 'b'
            %z: f32[2, 4, 3] = batch 'z'
            %g: f32[2] = batch 'g'
            %losses: f32[4] = batch 'losses'
            %losses_2: f32[4, 3] = batch 'losses_2'
            %rows: f32[4, 2, 3] = batch 'rows'
            %at: i64[4, 1] = batch 'at'
            %classes: i64[4] = batch 'classes'
            %seed: i64[1] = seed
            %eps: f32[1] = eps
            %y: {call}
            return %y: {call.partition(" = ")[0]} = logits
        """
        ir = parsed(text)
        assert not [line for line in rewritten(text, self.one) if "mobizo." in line or "cross_entropy" in line]
        # The runtime lacks them.
        self.one(ir)
        assert not [t for t in targets(ir) if "__rshift__" in t or "__and__" in t or "rand" in t]

    def test_aten_nodes_are_left_alone(self) -> None:
        left_alone("%x: f32[2, 3] = batch 'x'\n%y: f32[2, 3] = aten.relu(%x)\nreturn %y: f32[2, 3] = logits", self.one)

    def test_facts_survive(self) -> None:
        text = """
            %w: f32[2, 4, 3] = constant 'w'
            %x: f32[4, 3] = batch 'x'
            %seed: i64[1] = seed
            %z: f32[2, 4] = mobizo.noise(%seed, 7, 2, [4], 'gaussian')  # | | noise of b
            %y: f32[4, 4] = mobizo.mp_lora(%x, %w, 0, 1, False)  # lora_B | | expanded
            return %z: f32[2, 4] = loss
            return %y: f32[4, 4] = logits
        """
        ir = parsed(text)
        self.one(ir)
        (noise,) = [n for n in ir.graph.nodes if facts(n).noise_of]
        assert noise is ir.output_node("loss")
        product = [n for n in ir.graph.nodes if n.meta.get("nn_module_stack")]
        assert len(product) > 1
        assert all(facts(n).expanded for n in product)

    def test_one_table_for_all_sites(self) -> None:
        text = """
            %seed: i64[1] = seed
            %z: f32[2, 4] = mobizo.noise(%seed, 7, 2, [4], 'gaussian')
            %y: f32[2, 3] = mobizo.noise(%seed, 8, 2, [3], 'gaussian')
            return %z: f32[2, 4] = loss
            return %y: f32[2, 3] = logits
        """
        ir = parsed(text)
        assert self.one(ir) == 2
        assert [k for k in ir.state if "normal_quantiles" in k] == ["normal_quantiles"]

    def test_rows_that_may_hold_nan_are_gathered_beside_rows_that_may_not(self) -> None:
        text = """
            %table: f32[4, 2, 3] = constant 'table'
            %rows: f32[4, 2, 3] = batch 'rows'
            %at: i64[4, 1] = batch 'at'
            %x: f32[4, 1, 3] = mobizo.gather_rows(%table, %at)
            %y: f32[4, 1, 3] = mobizo.gather_rows(%rows, %at)
            return %x: f32[4, 1, 3] = loss
            return %y: f32[4, 1, 3] = logits
        """
        ir = parsed(text)
        self.one(ir)
        assert targets(ir).count("aten.bmm.default") == 1
