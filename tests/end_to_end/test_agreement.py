"""Random models: the eager program, the portable .pte and the XNNPACK .pte run the same step."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lowering
import mobizo_passes as mz
import runtime_driver
from mobizo_passes.testing import strategies
from tests.strategies import ModelSpec, models
from tests.tolerance import gradient_bound

# Kernels of other runtimes sum in another order and approximate exp and tanh within a few units in the last place.
LOSS_TOLERANCE = 1e-5
# Lowering is seconds where a transform is tenths of a second: an eighth of the usual number of examples.
FEW = settings(
    max_examples=max((settings.default.max_examples if settings.default else 25) // 8, 3),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    # Shrinking would lower hundreds of programs; the eager property test shrinks for the same models.
    phases=[Phase.explicit, Phase.generate],
)


@pytest.mark.timeout(1200)
@FEW
@given(
    spec=models(),
    estimator=strategies.estimators(True),
    noise=strategies.noise_kinds(),
    trainable=strategies.trainables(),
    seed=st.integers(0, 2**31 - 1),
    eps=strategies.epsilons(),
)
def test_eager_portable_and_xnnpack_agree(
    spec: ModelSpec, estimator: mz.Estimator, noise: str, trainable: str, seed: int, eps: float
) -> None:
    model, inputs = spec.model(), spec.inputs()
    program = mz.transform(model, inputs, loss=spec.loss_fn(), estimator=estimator, noise=noise, trainable=trainable)
    batch = dict(zip(program.inputs.tensors, inputs, strict=True))
    # The scalars that the device gets are float32.
    lr, eps = float(torch.tensor(1e-3)), float(torch.tensor(eps))
    radius: dict[str, Any] = {"eps": eps} if estimator.uses_epsilon else {}
    want = program.step(program.initial_adapter(), inputs, seed=seed, lr=lr, **radius)
    loss_bound = LOSS_TOLERANCE * max(1.0, float(want.losses.abs().max()))
    # A derivative is a longer chain than a loss, and may cancel: no tighter than the self-check of `lower`.
    bound = 1e-3 * float(want.projected_gradients.abs().max()) + loss_bound
    if estimator.uses_epsilon:
        bound = gradient_bound(estimator, want.losses, want.projected_gradients, eps, loss_bound)
    for target in ("portable", "xnnpack"):
        lowered = lowering.lower(program, target=target)
        assert target == "portable" or lowered.report.methods["step"].partitions >= 1
        with TemporaryDirectory() as folder:
            session = runtime_driver.Session(lowered.save(Path(folder) / "model.pte"))
            got = session.step(batch, seed=seed, lr=lr, update=False, **radius)
            assert torch.tensor(got.losses) == pytest.approx(want.losses, abs=loss_bound)
            gradients = torch.tensor(got.projected_gradients)
            torch.testing.assert_close(gradients, want.projected_gradients, rtol=0, atol=bound)
            if estimator.uses_epsilon:
                own = mz.reference.projected_gradients(torch.tensor(got.losses), eps, estimator)
                torch.testing.assert_close(gradients, own, rtol=0, atol=1e-5 * float(own.abs().max()))
            for fqn, value in want.adapter.items():
                # |z| stays below 4.5, so a gradient's error reaches the adapter at most 4.5 lr times.
                torch.testing.assert_close(got.adapter[fqn], value, rtol=0, atol=4.5 * lr * bound + 1e-6)
            # The update is bit for bit that of `apply`: this is what a replayed journal rests on.
            session.apply(seed, lr, got.projected_gradients)
            assert all(torch.equal(session.adapter[fqn], value) for fqn, value in got.adapter.items())
