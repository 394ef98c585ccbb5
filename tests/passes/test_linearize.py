"""Linearize and ExpandTangents: the loss and its derivative along all directions, side by side."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.batching import Batch
from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import ExpandTangents, Linearize
from tests.models import Lora, Mlp, integers, random, seeded
from tests.passes.contract import PassContract, parsed

BATCH = Batch(2, {"x": 0})
Z = "mobizo.noise(%seed, 1908338681, 3, [4, 1], 'gaussian')"
LOSS = """
        %linear: f32[2, 4] = aten.linear(%x, %w)  # base
        %linear_1: f32[2, 1] = aten.linear(%x, %a)  # lora_A
        %linear_2: f32[2, 4] = aten.linear(%linear_1, %b)  # lora_B
"""
INPUTS = """
        %w: f32[4, 3] = parameter 'w'
        %a: f32[1, 3] = parameter 'a'
        %b: f32[4, 1] = adapter 'b'
        %x: f32[2, 3] = batch 'x'
"""
# What depends on no direction, the activation's slope above all, is made of primal values.
ACTIVATION = """
        %add: f32[2, 4] = aten.add(%linear, %linear_2)
        %sigmoid: f32[2, 4] = aten.sigmoid(%add)
        %mul: f32[2, 4] = aten.mul(%sigmoid, %sigmoid)  # | linearize
        %sub: f32[2, 4] = aten.sub(%sigmoid, %mul)  # | linearize
"""
LOSSES = """
        %reduce_loss: f32[1] = mobizo.reduce_loss(%sigmoid, None, 1, 0, 1, 'mean')
"""


class TestLinearize(PassContract):
    one = Linearize(BATCH)
    before = f"""{INPUTS}
        {LOSS}
        %add: f32[2, 4] = aten.add(%linear, %linear_2)
        %sigmoid: f32[2, 4] = aten.sigmoid(%add)
        {LOSSES}
        return %reduce_loss: f32[1] = losses
    """
    after = f"""{INPUTS}
        %b_tangent: f32[4, 1] = tangent 'b.tangent'
        {LOSS}
        %linear_3: f32[2, 4] = aten.linear(%linear_1, %b_tangent)  # lora_B | linearize
        {ACTIVATION}
        {LOSSES}
        %mul_1: f32[2, 4] = aten.mul(%linear_3, %sub)  # | linearize
        %reduce_loss_1: f32[1] = mobizo.reduce_loss(%mul_1, None, 1, 0, 1, 'mean')  # | linearize
        return %reduce_loss: f32[1] = losses
        return %reduce_loss_1: f32[1] = projected_gradients
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        """The derivative is a central difference of the loss, up to ε² and rounding."""
        tangent = torch.full((4, 1), 0.5)
        found = new.run({**values, "b.tangent": tangent})
        assert torch.equal(found["losses"], old.run(values)["losses"])
        up, down = (old.run({**values, "b": values["b"] + s * 1e-2 * tangent})["losses"] for s in (1, -1))
        torch.testing.assert_close(found["projected_gradients"], (up - down) / 2e-2, rtol=1e-3, atol=1e-5)

    def test_a_loss_that_no_tangent_reaches_is_refused(self) -> None:
        text = self.before.replace("aten.sigmoid(%add)", "aten.sign(%add)")
        with pytest.raises(mz.UnsupportedOp, match="no derivative in any adapter tensor: %reduce_loss"):
            self.one(parsed(text))


class TestExpandTangents(PassContract):
    one = ExpandTangents(3)
    before = f"""{INPUTS}
        %b_tangent: f32[4, 1] = tangent 'b.tangent'
        %seed: i64[1] = seed
        %noise: f32[3, 4, 1] = {Z}  # | insert-noise | noise of b
        %linear: f32[2, 4] = aten.linear(%x, %w)  # base | | batch 0
        %linear_1: f32[2, 1] = aten.linear(%x, %a)  # lora_A | | batch 0
        %linear_2: f32[2, 4] = aten.linear(%linear_1, %b)  # lora_B | | batch 0
        %linear_3: f32[2, 4] = aten.linear(%linear_1, %b_tangent)  # lora_B | linearize | batch 0
        %add: f32[2, 4] = aten.add(%linear, %linear_2)  # | | batch 0
        %sigmoid: f32[2, 4] = aten.sigmoid(%add)  # | | batch 0
        %mul: f32[2, 4] = aten.mul(%sigmoid, %sigmoid)  # | linearize | batch 0
        %sub: f32[2, 4] = aten.sub(%sigmoid, %mul)  # | linearize | batch 0
        {LOSSES}
        %mul_1: f32[2, 4] = aten.mul(%linear_3, %sub)  # | linearize | batch 0
        %reduce_loss_1: f32[1] = mobizo.reduce_loss(%mul_1, None, 1, 0, 1, 'mean')  # | linearize
        return %reduce_loss: f32[1] = losses
        return %reduce_loss_1: f32[1] = projected_gradients
    """
    after = f"""{INPUTS}
        %seed: i64[1] = seed
        %noise: f32[3, 4, 1] = {Z}  # | insert-noise
        %linear: f32[2, 4] = aten.linear(%x, %w)  # base
        %linear_1: f32[2, 1] = aten.linear(%x, %a)  # lora_A
        %expand: f32[6, 1] = mobizo.expand(%linear_1, 3, 0, 1)  # lora_A | expand-tangents
        %linear_2: f32[2, 4] = aten.linear(%linear_1, %b)  # lora_B
        %mp_lora: f32[6, 4] = mobizo.mp_lora(%expand, %noise, 0, 1, False)  # lora_B | expand-tangents
        {ACTIVATION}
        %expand_1: f32[6, 4] = mobizo.expand(%sub, 3, 0, 1)  # | expand-tangents
        {LOSSES}
        %mul_1: f32[6, 4] = aten.mul(%mp_lora, %expand_1)  # | linearize
        %reduce_loss_1: f32[3] = mobizo.reduce_loss(%mul_1, None, 3, 0, 1, 'mean')  # | linearize
        return %reduce_loss: f32[1] = losses
        return %reduce_loss_1: f32[3] = projected_gradients
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        """Each group is the derivative along its own direction."""
        z = mz.reference.draw({"b": values["b"]}, 1, 3, "gaussian")["b"]
        found = new.run(values)["projected_gradients"]
        for query in range(3):
            alone = old.run({**values, "b.tangent": z[query]})["projected_gradients"]
            torch.testing.assert_close(found[query : query + 1], alone)

    def test_what_is_computed_per_group(self) -> None:
        """Never a primal value."""
        _, new = self.run_pass()
        assert {n.name for n in new.graph.nodes if facts(n).expanded} == {"mp_lora", "mul_1", "reduce_loss_1"}


def programmed(model: nn.Module, **options: object) -> mz.TrainingProgram:
    inputs = (random(3, 6), integers(4, 3))
    return mz.transform(
        seeded(model), inputs, **{"estimator": mz.ForwardGradient(2), "loss": F.cross_entropy, **options}
    )


def test_a_step_takes_no_epsilon() -> None:
    program = programmed(Mlp())
    step = program.manifest()["methods"]["step"]
    assert [each["name"] for each in step["inputs"]] == ["first.widen", "second.widen", "x", "target", "seed", "lr"]
    assert [each["shape"] for each in step["outputs"]][:3] == [[], [1], [2]]
    adapter, inputs = program.initial_adapter(), (random(3, 6), integers(4, 3))
    with pytest.raises(mz.InputError, match="takes no eps: the gradient is computed"):
        program.step(adapter, inputs, seed=0, lr=0.1, eps=1e-2)
    with pytest.raises(mz.InputError, match="takes seed="):
        program.step(adapter, inputs, lr=0.1)
    with pytest.raises(mz.InputError, match="ForwardGradient perturbs nothing"):
        mz.ForwardGradient(normalize="std")


def test_a_site_that_only_a_comparison_reads_has_a_derivative_of_zero() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora, self.gate, self.head = Lora(6, 8), Lora(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lora(x).masked_fill(self.gate(x) > 0.5, 0.0))

    model = seeded(Masked())
    mz.verify(programmed(Masked()), model, (random(3, 6), integers(4, 3)))


@pytest.mark.parametrize("norm", [nn.RMSNorm(8), nn.LayerNorm(8)], ids=["rms", "layer"])
def test_a_norm_has_no_cubed_root_in_its_tangent(norm: nn.Module) -> None:
    """It would be far out of the range of halves where a row is small."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora, self.norm, self.head = Lora(6, 8), norm, nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.lora(x)))

    model, program = seeded(Normed()), programmed(Normed())
    mz.verify(program, model, (random(3, 6), integers(4, 3)))
    made = [line for line in program.text().splitlines() if "| linearize" in line]
    assert not [line for line in made if "%rsqrt, %rsqrt" in line]
    assert sum("aten.mean" in line for line in made) == (1 if isinstance(norm, nn.RMSNorm) else 2)
