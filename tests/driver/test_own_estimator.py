"""An estimator of a user's own: one class and its registration, from the transform to a step of the driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowering
import mobizo_passes as mz
from mobizo_passes.zo.scheme import Normalize
from runtime_driver import Session
from runtime_driver.format import Manifest
from tests.driver import text_model
from tests.driver.command import Cli, fails
from tests.models import seeded
from tests.passes.contract import Tiny, rows


class ThreePoint(mz.Estimator):
    """Second-order forward differences: ``g_i = (4·L(θ+εz_i) − L(θ+2εz_i) − 3·L(θ)) / 2ε``; P = 2q+1 groups."""

    kind = "three_point"
    copies = "θ, θ + ε·z and θ + 2ε·z"
    formula = "g = (4·L(θ+εz) − L(θ+2εz) − 3·L(θ)) / 2ε"

    @property
    def offsets(self) -> tuple[tuple[int, float], ...]:
        return ((0, 0), *((i, 1) for i in range(self.queries)), *((i, 2) for i in range(self.queries)))

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        near, far = losses[1 : self.queries + 1], losses[self.queries + 1 :]
        return (4 * near - far - 3 * losses[:1]) / (eps * 2.0)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    mz.register_estimator(ThreePoint)
    yield
    mz.unregister_estimator(ThreePoint)


def transformed(estimator: mz.Estimator, noise: str = "gaussian") -> mz.TrainingProgram:
    return mz.transform(seeded(Tiny()), rows(), loss=F.cross_entropy, estimator=estimator, noise=noise)


@settings(max_examples=3)
@given(
    queries=st.integers(1, 3),
    normalize=st.sampled_from([None, "std"]),
    noise=st.sampled_from(["gaussian", "rademacher"]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_a_step_agrees_with_the_reference(queries: int, normalize: Normalize, noise: str, seed: int):
    program = transformed(ThreePoint(queries, normalize), noise)
    got = mz.verify(program, seeded(Tiny()), rows(), seed=seed)
    assert got.losses.shape == (2 * queries + 1,)
    assert torch.equal(got.loss, got.losses[0])


def test_it_runs_on_the_runtime(tmp_path: Path):
    program = transformed(ThreePoint(2, normalize="std"))
    assert "'three_point'" in str(program)
    program.draw(tmp_path / "step.svg")
    assert ThreePoint.formula in (tmp_path / "step.svg").read_text(encoding="utf-8")
    lowered = lowering.lower(program, target="portable", check=True)
    lowered.save(tmp_path / "model.pte")
    told = Manifest.load(tmp_path / "model.json").estimator
    assert (told.kind, told.queries, told.groups, told.normalize) == ("three_point", 2, 5, "std")
    assert (told.perturbed_groups, told.error_factor) == ((1, 2, 3, 4), 4.0)
    expected = program.step(program.initial_adapter(), rows(), seed=5, lr=0.1, eps=0.01)
    session = Session(tmp_path / "model.pte")
    found = session.step(dict(zip(program.example_batch(), rows(), strict=True)), seed=5, lr=0.1, eps=0.01)
    bound = 1e-3 * float(expected.projected_gradients.abs().max())
    torch.testing.assert_close(
        torch.tensor(found.projected_gradients), expected.projected_gradients, rtol=0, atol=bound
    )
    for fqn, value in session.adapter.items():
        torch.testing.assert_close(value, expected.adapter[fqn], rtol=1e-4, atol=1e-4)


def test_it_trains_and_its_journal_replays(tmp_path: Path):
    lowering.lower(transformed(ThreePoint(2)), target="portable", check=False).save(tmp_path / "model.pte")
    session = Session(tmp_path / "model.pte")
    batch = dict(zip(session.manifest.batch.inputs, rows(), strict=True))
    before = session.batch_loss(batch)
    run: dict[str, Any] = {"lr": 0.05, "eps": 0.01, "journal": tmp_path / "run.jsonl"}
    session.fit([batch], 6, **run)
    assert session.batch_loss(batch) < before
    replayed, resumed, whole = (Session(tmp_path / "model.pte") for _ in range(3))
    assert replayed.replay(tmp_path / "run.jsonl") == 6
    resumed.fit([batch], 8, **run)
    whole.fit([batch], 8, lr=0.05, eps=0.01)
    for fqn, value in session.adapter.items():
        assert torch.equal(value, replayed.adapter[fqn])
        assert torch.equal(resumed.adapter[fqn], whole.adapter[fqn])
        assert not torch.equal(value, whole.adapter[fqn])


def test_the_command_line_offers_it(cli: Cli, tmp_path: Path):
    model = text_model.save_model(tmp_path / "model")
    task = ["--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", 8, "--batch", 2]
    arguments = ["lower", model, "-o", "x.pte", "--target", "portable", *task, "--queries", 1, "--no-check"]
    fails(
        cli(*arguments, "--estimator", "four-point"),
        "expected one of two-sided, one-sided, forward-gradient, exact, three-point.",
    )
    done = cli(*arguments, "--estimator", "three-point")
    assert done.code == 0, done.err
    assert Manifest.load(tmp_path / "x.json").estimator.kind == "three_point"


class Reversed(ThreePoint):
    kind = "reversed"

    def perturb(self, value: Tensor, z: Tensor, eps: Tensor) -> Tensor:
        return super().perturb(value, z, eps).flip(0)


class Halved(mz.OneSided):
    kind = "halved"

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        return super().differences(losses, eps) / 2


class Short(mz.OneSided):
    kind = "short"

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        return losses[:1]


class Beyond(mz.OneSided):
    kind = "beyond"

    @property
    def offsets(self) -> tuple[tuple[int, float], ...]:
        return ((0, 0), (self.queries, 1))


class Misnamed(mz.OneSided):
    kind = "Mis-named"


class Taken(mz.OneSided):
    kind = "three_point"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Reversed, "perturb gives other copies than offsets"),
        (Halved, "differences of a linear loss are"),
        (Short, r"differences has shape \[1\], expected \[3\]"),
        (Beyond, "offsets has .*: expected a query below 3"),
        (Misnamed, "kind must be a name in lower_case, found 'Mis-named'"),
        (Taken, "the kind 'three_point' is taken by ThreePoint"),
        (ThreePoint, "the kind 'three_point' is taken by ThreePoint"),
        (int, "expected a subclass of Estimator"),
    ],
)
def test_what_cannot_be_registered(cls: type[mz.Estimator], message: str):
    with pytest.raises(mz.InputError, match=message):
        mz.register_estimator(cls)


def test_what_is_not_registered_is_refused():
    with pytest.raises(mz.InputError, match=r"Taken is not registered: call mz.register_estimator\(Taken\)"):
        transformed(Taken(1))
    with pytest.raises(mz.InputError, match="Taken is not registered"):
        mz.unregister_estimator(Taken)
    known = "no estimator of the kind 'unknown'; known are exact, forward_gradient, one_sided, three_point"
    with pytest.raises(mz.InputError, match=known):
        torch.ops.mobizo.projected_gradients(torch.zeros(3), torch.ones(1), "unknown")
