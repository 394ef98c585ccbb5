"""AppendUpdate: losses to projected gradients and a new adapter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes import passes
from mobizo_passes.errors import ContractError
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.text import to_text
from tests.passes.contract import PassContract, Stage, Tiny, before, rows


class TestFinishStep(PassContract):
    kind = passes.AppendUpdate

    def example(self) -> Stage:
        return before(self.kind, Tiny(), rows())

    def compare(self, old: dict[str, Tensor], new: dict[str, Tensor], stage: Stage) -> None:
        fqn = "layer.lora_B.weight"
        value = stage.values[fqn]
        z = mz.reference.draw({fqn: value}, 1, 1, "gaussian")[fqn][0]
        losses = old["losses"]
        gradient = (losses[0] - losses[1]) / 0.02
        assert list(new) == ["loss", "losses", "projected_gradients", fqn]
        assert torch.equal(new["losses"], losses)
        torch.testing.assert_close(new["loss"], losses.mean())
        torch.testing.assert_close(new["projected_gradients"], gradient.reshape(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(new[fqn], value - 0.1 * gradient * z, rtol=1e-5, atol=1e-5)

    def test_it_fires(self) -> None:
        stage = self.example()
        assert stage.count() == 1
        after = stage.apply()
        assert [o.kind for o in after.outputs] == ["loss", "losses", "projected_gradients", "adapter"]
        assert [role(n).kind for n in after.placeholders()][-3:] == ["seed", "lr", "eps"]

    def test_one_sided_reports_the_unperturbed_loss(self) -> None:
        inputs = rows()
        model = Tiny()
        program = mz.transform(model, inputs, loss=F.cross_entropy, estimator=mz.OneSided(2))
        got = program.step(program.initial_adapter(), inputs, seed=0, lr=0.1, eps=0.01)
        assert torch.equal(got.loss, got.losses[0])
        torch.testing.assert_close(got.loss, program.loss(program.initial_adapter(), inputs))

    def test_normalisation_stands_in_the_graph(self, golden: Callable[[str, str], None]) -> None:
        stage = self.example()
        one = passes.AppendUpdate(mz.TwoSided(1, normalize="std"))
        ir = stage.ir.clone()
        assert one(ir) == 1
        assert one(ir) == 0
        golden("append_update_std", to_text(ir))

    def test_given_gradients_are_used_as_they_are(self) -> None:
        program = mz.transform(Tiny(), rows(), loss=F.cross_entropy, estimator=mz.TwoSided(1))
        text = program.text("apply")
        assert "%projected_gradients: f32[1] = projected_gradients\n" in text
        assert "mobizo.projected_gradients" not in text
        adapter = program.initial_adapter()
        same = program.apply(adapter, seed=0, lr=0.5, projected_gradients=torch.zeros(1))
        assert all(torch.equal(same[fqn], value) for fqn, value in adapter.items())

    @pytest.mark.parametrize("estimator", [mz.TwoSided(2, normalize="std"), mz.OneSided(3, normalize="std")], ids=str)
    def test_equal_losses_give_no_step_and_no_nan(self, estimator: mz.TwoSided | mz.OneSided) -> None:
        # 0.1 + 0.1 + 0.1 is not 3 · 0.1 in float32: a mean that rounds must not make a deviation of nothing.
        losses = torch.full((4,), 0.1)
        if isinstance(estimator, mz.OneSided):
            losses[0] = 0.3
        got = torch.ops.mobizo.projected_gradients(losses, torch.tensor([0.01]), estimator.kind, "std")
        assert torch.equal(got, torch.zeros(estimator.queries))
        assert torch.equal(mz.reference.projected_gradients(losses, 0.01, estimator), got)

    def test_nan_stays_nan(self) -> None:
        losses = torch.tensor([0.1, float("nan"), 0.2, 0.3])
        got = torch.ops.mobizo.projected_gradients(losses, torch.tensor([0.01]), "two_sided", "std")
        assert bool(got.isnan().all())

    def test_one_sided_leaves_the_unperturbed_loss_out_of_the_deviation(self) -> None:
        losses, eps = torch.tensor([5.0, 0.25, 0.75]), torch.tensor([0.5])
        got = torch.ops.mobizo.projected_gradients(losses, eps, "one_sided", "std")
        # (0.25 - 5) / 0.5 = -9.5 and (0.75 - 5) / 0.5 = -8.5; the deviation of 0.25 and 0.75 is 0.5 / sqrt(2).
        torch.testing.assert_close(got, torch.tensor([-9.5, -8.5]) / (0.5 / 2**0.5))

    def test_missing_noise_is_an_error(self) -> None:
        stage = before(passes.InsertNoise, Tiny(), rows())
        with pytest.raises(
            ContractError, match="before append-update: expected noise for every adapter tensor, found none"
        ):
            passes.AppendUpdate(mz.TwoSided(1))(stage.ir)
