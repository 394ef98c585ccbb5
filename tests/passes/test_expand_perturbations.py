"""ExpandPerturbations: all perturbed copies in one forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import ExpandPerturbations
from tests.passes.contract import PassContract, parsed, to_text


class TestExpandPerturbations(PassContract):
    one = ExpandPerturbations(mz.TwoSided(1))
    before = """
        %w: f32[4, 3] = parameter 'w'
        %a: f32[1, 3] = parameter 'a'
        %b: f32[4, 1] = adapter 'b'
        %x: f32[2, 3] = batch 'x'
        %seed: i64[1] = seed

        %noise: f32[1, 4, 1] = mobizo.noise(%seed, 1908338681, 1, [4, 1], 'gaussian')  # | insert-noise | noise of b
        %unsqueeze: f32[1, 4, 1] = aten.unsqueeze(%b, 0)
        %linear: f32[2, 4] = aten.linear(%x, %w)  # base | | batch 0
        %linear_1: f32[2, 1] = aten.linear(%x, %a)  # lora_A | | batch 0
        %mp_lora: f32[2, 4] = mobizo.mp_lora(%linear_1, %unsqueeze, 0, 1, False)  # lora_B | | batch 0
        %add: f32[2, 4] = aten.add(%linear, %mp_lora)  # | | batch 0
        %mul: f32[2, 4] = aten.mul(%add, %linear)  # | | batch 0
        %reduce_loss: f32[1] = mobizo.reduce_loss(%mul, None, 1, 0, 1, 'mean')

        return %reduce_loss: f32[1] = losses
    """
    # What is shared is expanded as late as possible, and once.
    after = """
        %w: f32[4, 3] = parameter 'w'
        %a: f32[1, 3] = parameter 'a'
        %b: f32[4, 1] = adapter 'b'
        %x: f32[2, 3] = batch 'x'
        %seed: i64[1] = seed
        %eps: f32[1] = eps

        %noise: f32[1, 4, 1] = mobizo.noise(%seed, 1908338681, 1, [4, 1], 'gaussian')  # | insert-noise
        %perturb: f32[2, 4, 1] = mobizo.perturb(%b, %noise, %eps, 'two_sided')  # | expand-perturbations
        %linear: f32[2, 4] = aten.linear(%x, %w)  # base
        %expand_1: f32[4, 4] = mobizo.expand(%linear, 2, 0, 1)  # base | expand-perturbations
        %linear_1: f32[2, 1] = aten.linear(%x, %a)  # lora_A
        %expand: f32[4, 1] = mobizo.expand(%linear_1, 2, 0, 1)  # lora_A | expand-perturbations
        %mp_lora: f32[4, 4] = mobizo.mp_lora(%expand, %perturb, 0, 1, False)  # lora_B
        %add: f32[4, 4] = aten.add(%expand_1, %mp_lora)
        %mul: f32[4, 4] = aten.mul(%add, %expand_1)
        %reduce_loss: f32[2] = mobizo.reduce_loss(%mul, None, 2, 0, 1, 'mean')

        return %reduce_loss: f32[2] = losses
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        """Group 0 is the loss at θ+εz, group 1 that at θ−εz."""
        losses = new.run(values)["losses"]
        z = mz.reference.draw({"b": values["b"]}, 1, 1, "gaussian")["b"][0]
        for group, sign in enumerate((1, -1)):
            moved = {**values, "b": values["b"] + sign * 0.01 * z}
            torch.testing.assert_close(losses[group], old.run(moved)["losses"][0], rtol=1e-6, atol=1e-6)

    def test_what_is_computed_per_group(self) -> None:
        _, new = self.run_pass()
        expanded = {n.name for n in new.graph.nodes if facts(n).expanded}
        assert expanded == {"perturb", "mp_lora", "add", "mul", "reduce_loss"}
        for node in new.graph.find_nodes(op="call_function", target=torch.ops.mobizo.expand.default):
            assert {user.name for user in node.users} <= expanded

    @pytest.mark.parametrize(
        ("call", "error", "reason"),
        [
            ("aten.flip(%add, [0])", mz.BatchCoupled, "aten.flip.default in module 'head'"),
            ("aten.softmax(%add, 0)", mz.BatchCoupled, "aten.softmax.int in module 'head'"),
            ("aten.bernoulli(%add)", mz.UnsupportedOp, "aten.bernoulli.default in module 'head'"),
        ],
    )
    def test_what_mixes_examples_or_has_no_rule_is_refused(
        self, call: str, error: type[mz.MobizoError], reason: str
    ) -> None:
        text = self.before.replace("%mul: f32[2, 4] = aten.mul(%add, %linear)  #", f"%mul: f32[2, 4] = {call}  # head")
        with pytest.raises(error, match=f"%mul = {reason}"):
            self.one(parsed(text))

    def test_an_adapter_that_nothing_reads_stays_as_it_is(self) -> None:
        text = """
            %b: f32[4] = adapter 'b'
            %x: f32[2, 4] = batch 'x'
            %seed: i64[1] = seed
            %noise: f32[1, 4] = mobizo.noise(%seed, 1908338681, 1, [4], 'gaussian')  # | insert-noise | noise of b
            %loss: f32[1] = mobizo.reduce_loss(%x, None, 1, 0, 1, 'mean')
            return %loss: f32[1] = losses
        """
        ir = parsed(text)
        assert self.one(ir) == 0
        assert "perturb" not in to_text(ir).replace("expand-perturbations", "")
