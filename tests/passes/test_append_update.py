"""AppendUpdate: losses to projected gradients and a new adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes.errors import ContractError
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import AppendUpdate
from tests.passes.contract import PassContract, Tiny, parsed, rows, to_text

NOISE = "mobizo.noise(%seed, 1908338681, 1, [4, 3], 'gaussian')"


class TestAppendUpdate(PassContract):
    one = AppendUpdate(mz.TwoSided(1))
    before = f"""
        %b: f32[4, 3] = adapter 'b'
        %losses: f32[2] = batch 'losses'
        %seed: i64[1] = seed
        %eps: f32[1] = eps

        %noise: f32[1, 4, 3] = {NOISE}  # | insert-noise | noise of b

        return %losses: f32[2] = losses
    """
    after = f"""
        %b: f32[4, 3] = adapter 'b'
        %losses: f32[2] = batch 'losses'
        %seed: i64[1] = seed
        %lr: f32[1] = lr
        %eps: f32[1] = eps

        %noise: f32[1, 4, 3] = {NOISE}  # | insert-noise
        %mean: f32[] = aten.mean(%losses)  # | append-update
        %projected_gradients: f32[1] = mobizo.projected_gradients(%losses, %eps, 'two_sided')  # | append-update
        %update: f32[4, 3] = mobizo.update(%b, %noise, %projected_gradients, %lr)  # | append-update

        return %mean: f32[] = loss
        return %losses: f32[2] = losses
        return %projected_gradients: f32[1] = projected_gradients
        return %update: f32[4, 3] = adapter 'b'
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        z = mz.reference.draw({"b": values["b"]}, 1, 1, "gaussian")["b"][0]
        losses, got = values["losses"], new.run(values)
        gradient = (losses[0] - losses[1]) / 0.02
        assert torch.equal(got["losses"], old.run(values)["losses"])
        torch.testing.assert_close(got["loss"], losses.mean())
        torch.testing.assert_close(got["projected_gradients"], gradient.reshape(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["b"], values["b"] - 0.1 * gradient * z, rtol=1e-5, atol=1e-5)

    def test_normalization_stands_in_the_graph(self) -> None:
        ir = parsed(self.before)
        one = AppendUpdate(mz.TwoSided(1, normalize="std"))
        assert (one(ir), one(ir)) == (1, 0)
        assert "mobizo.projected_gradients(%losses, %eps, 'two_sided', 'std')" in to_text(ir)

    def test_one_sided_reports_the_unperturbed_loss(self) -> None:
        ir = parsed(self.before)
        assert AppendUpdate(mz.OneSided(1))(ir) == 1
        assert "%select: f32[] = aten.select(%losses, 0, 0)" in to_text(ir)
        assert "mobizo.projected_gradients(%losses, %eps, 'one_sided')" in to_text(ir)

    def test_given_gradients_are_used_as_they_are(self) -> None:
        text = f"""
            %b: f32[4, 3] = adapter 'b'
            %seed: i64[1] = seed
            %lr: f32[1] = lr
            %g: f32[1] = projected_gradients
            %noise: f32[1, 4, 3] = {NOISE}  # | insert-noise | noise of b
            return %noise: f32[1, 4, 3] = logits
        """
        ir = parsed(text)
        assert self.one(ir) == 1
        assert to_text(ir).splitlines()[-1] == "return %update: f32[4, 3] = adapter 'b'"
        assert "= mobizo.update(%b, %noise, %g, %lr)" in to_text(ir)

    def test_missing_noise_is_an_error(self) -> None:
        with pytest.raises(ContractError, match="before append-update: expected noise for every adapter tensor"):
            self.one(parsed(self.before.replace("  # | insert-noise | noise of b", "")))

    def test_a_missing_radius_is_an_error(self) -> None:
        text = "%b: f32[4, 3] = batch 'b'\nreturn %b: f32[4, 3] = losses"
        with pytest.raises(KeyError, match="eps"):
            self.one(parsed(text))


def test_programs_one_sided_and_given_gradients() -> None:
    model, inputs = Tiny(), rows()
    compiled = mz.transform(model, inputs, loss=F.cross_entropy, estimator=mz.OneSided(2))
    adapter = compiled.initial_adapter()
    got = compiled.step(adapter, inputs, seed=0, lr=0.1, eps=0.01)
    assert torch.equal(got.loss, got.losses[0])
    torch.testing.assert_close(got.loss, compiled.loss(adapter, inputs))
    same = compiled.apply(adapter, seed=0, lr=0.5, projected_gradients=torch.zeros(2))
    assert all(torch.equal(same[fqn], value) for fqn, value in adapter.items())


@pytest.mark.parametrize("estimator", [mz.TwoSided(2, normalize="std"), mz.OneSided(3, normalize="std")], ids=str)
def test_equal_losses_give_no_step_and_no_nan(estimator: mz.TwoSided | mz.OneSided) -> None:
    # 0.1 + 0.1 + 0.1 is not 3 · 0.1 in float32: a mean that rounds must not make a deviation of nothing.
    losses = torch.full((4,), 0.1)
    if isinstance(estimator, mz.OneSided):
        losses[0] = 0.3
    got = torch.ops.mobizo.projected_gradients(losses, torch.tensor([0.01]), estimator.kind, "std")
    assert torch.equal(got, torch.zeros(estimator.queries))
    assert torch.equal(mz.reference.projected_gradients(losses, 0.01, estimator), got)


def test_nan_stays_nan() -> None:
    losses = torch.tensor([0.1, float("nan"), 0.2, 0.3])
    got = torch.ops.mobizo.projected_gradients(losses, torch.tensor([0.01]), "two_sided", "std")
    assert bool(got.isnan().all())


def test_one_sided_leaves_the_unperturbed_loss_out_of_the_deviation() -> None:
    losses, eps = torch.tensor([5.0, 0.25, 0.75]), torch.tensor([0.5])
    got = torch.ops.mobizo.projected_gradients(losses, eps, "one_sided", "std")
    # (0.25 - 5) / 0.5 = -9.5 and (0.75 - 5) / 0.5 = -8.5; the deviation of 0.25 and 0.75 is 0.5 / sqrt(2).
    torch.testing.assert_close(got, torch.tensor([-9.5, -8.5]) / (0.5 / 2**0.5))
