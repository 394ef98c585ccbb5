"""A .pte that holds its adapter inside: right initial values, the numbers of the other form, and an honest driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowering
import mobizo_passes as mz
import runtime_driver
from tests.models import Lora, integers, random, seeded

STEPS = 4


class Deep(nn.Module):
    """Three LoRA layers of one shape, of which two start with lora_B = 0, as PEFT's do: equal initial contents."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Lora(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@dataclass(frozen=True)
class Both:
    """One program, lowered in both forms."""

    program: mz.TrainingProgram
    inputs: tuple[Tensor, ...]
    external: Path
    internal: Path

    @property
    def once(self) -> dict[str, Any]:
        """How a step is made, but for its seed."""
        return {"lr": 0.02, **({"eps": 1e-2} if self.program.estimator.uses_epsilon else {})}

    @property
    def run(self) -> dict[str, Any]:
        return {**self.once, "seed": 3}

    @property
    def batch(self) -> dict[str, Tensor]:
        return dict(zip(self.program.inputs.tensors, self.inputs, strict=True))


CHOICES = [
    ("portable", mz.TwoSided(2), "lora_B"),
    ("xnnpack", mz.TwoSided(2), "lora_B"),
    ("xnnpack", mz.OneSided(3, normalize="std"), "lora_A+lora_B"),
    ("xnnpack", mz.ForwardGradient(2), "lora_A+lora_B"),
]


@pytest.fixture(scope="module", params=CHOICES, ids=str)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    target, estimator, trainable = request.param
    model, inputs = seeded(Deep()), (random(4, 6), integers(4, 4))
    with torch.no_grad():
        for layer in list(model.layers)[:2]:  # type: ignore[arg-type]
            layer.lora_B.weight.zero_()
    program = mz.transform(model, inputs, loss=F.cross_entropy, estimator=estimator, trainable=trainable)
    folder = tmp_path_factory.mktemp("internal")
    paths, outside = [], set()
    for form in ("external", "internal"):
        lowered = lowering.lower(program, target=target, adapter=form)
        assert lowered.manifest.adapter_state == form
        assert lowered.report.methods["step"].partitions == (target == "xnnpack")
        outside.add(len(lowered.report.methods["step"].portable))
        paths.append(lowered.save(folder / f"{form}.pte"))
    assert len(outside) == 1
    return Both(program, inputs, *paths)


def test_steps_in_a_row_agree_with_the_other_form(both: Both) -> None:
    """The methods alone, without the driver's care: only the runtime's own state goes from one call to the next."""
    stateless = loaded_step(both.external)
    for _ in range(2):
        # A program that is loaded again starts from the initial adapter again.
        holding = loaded_step(both.internal)
        adapter = both.program.initial_adapter()
        losses = []
        for number in range(STEPS):
            scalars = [torch.tensor([number]), *(torch.tensor([each]) for each in both.once.values())]
            want = [x.clone() for x in stateless.execute([*adapter.values(), *both.inputs, *scalars])]
            got = holding.execute([*both.inputs, *scalars])
            assert len(got) == 3
            assert all(torch.equal(a, b) for a, b in zip(got, want[:3], strict=True)), number
            if number == 0:
                eager = both.program.step(adapter, both.inputs, seed=0, **both.once)
                # The kernels differ from eager's in the last places: 1e-5, relative to losses of about 1.
                torch.testing.assert_close(got[1], eager.losses, rtol=0, atol=1e-5 * float(eager.losses.max()))
            adapter = dict(zip(adapter, want[3:], strict=True))
            losses.append(float(got[0]))
        assert len(set(losses)) == STEPS


def loaded_step(path: Path) -> Any:
    """`step` of a program that is opened for it alone."""
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path).load_method("step")


def test_fit_keeps_the_adapter_and_its_journal(both: Both, tmp_path: Path) -> None:
    outside, inside, again = (runtime_driver.Session(p) for p in (both.external, both.internal, both.internal))
    want = outside.fit([both.batch], steps=6, **both.run)
    got = inside.fit([both.batch], steps=6, journal=tmp_path / "run.jsonl", **both.run)
    assert got.losses == want.losses
    assert _same(inside.adapter, outside.adapter)
    assert inside.evaluate([both.batch]).loss == outside.evaluate([both.batch]).loss
    assert again.replay(tmp_path / "run.jsonl") == 6
    assert _same(again.adapter, outside.adapter)


def test_the_session_that_trained_goes_on(both: Both, tmp_path: Path) -> None:
    outside, inside = runtime_driver.Session(both.external), runtime_driver.Session(both.internal)
    outside.fit([both.batch], steps=5, **both.run)
    for steps in (2, 5):
        inside.fit([both.batch], steps=steps, journal=tmp_path / "run.jsonl", **both.run)
    assert _same(inside.adapter, outside.adapter)


def test_resuming_elsewhere_is_refused(both: Both, tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    runtime_driver.Session(both.internal).fit([both.batch], steps=2, journal=journal, **both.run)
    written = journal.read_bytes()
    other = runtime_driver.Session(both.internal)
    with pytest.raises(runtime_driver.InternalStateError, match=r"lower the model with adapter='external'"):
        other.fit([both.batch], steps=4, journal=journal, **both.run)
    assert journal.read_bytes() == written
    # Nothing to run is nothing to refuse: the adapter is that of the journal.
    assert other.fit([both.batch], steps=2, journal=journal, **both.run).first_step == 2


def test_another_adapter_is_evaluated_but_not_trained(both: Both) -> None:
    session, outside = runtime_driver.Session(both.internal), runtime_driver.Session(both.external)
    moved = {fqn: value + 0.25 for fqn, value in session.adapter.items()}
    session.adapter = outside.adapter = moved
    assert session.evaluate([both.batch]).loss == outside.evaluate([both.batch]).loss
    with pytest.raises(runtime_driver.InternalStateError):
        session.step(both.batch, seed=0, **both.once)
    with pytest.raises(runtime_driver.InternalStateError):
        session.fit([both.batch], steps=1, **both.run)
    # The initial adapter can be had again.
    session.adapter = session.initial_adapter
    outside.adapter = outside.initial_adapter
    assert (
        session.fit([both.batch], steps=3, **both.run).losses == outside.fit([both.batch], steps=3, **both.run).losses
    )


def test_a_step_that_is_not_taken_does_not_go_unnoticed(both: Both) -> None:
    session, outside = runtime_driver.Session(both.internal), runtime_driver.Session(both.external)
    for each in (session, outside):
        each.step(both.batch, seed=9, **both.once, update=False)
    # From the initial adapter the step is loaded anew.
    first = [each.step(both.batch, seed=0, **both.once) for each in (session, outside)]
    assert first[0].losses == first[1].losses
    session.step(both.batch, seed=9, **both.once, update=False)
    with pytest.raises(runtime_driver.InternalStateError):
        session.step(both.batch, seed=1, **both.once)


def test_releasing_the_step_does_not_go_unnoticed(both: Both) -> None:
    session = runtime_driver.Session(both.internal)
    session.fit([both.batch], steps=1, **both.run)
    session.release("apply", "loss")
    session.fit([both.batch], steps=1, **both.run)
    session.release()
    with pytest.raises(runtime_driver.InternalStateError):
        session.step(both.batch, seed=1, **both.once)


def test_a_step_that_diverged_is_not_trained_on(both: Both) -> None:
    session = runtime_driver.Session(both.internal)
    session.step(both.batch, seed=0, **both.once)
    kept = session.adapter
    x, label = both.inputs
    broken = dict(zip(both.batch, (torch.full_like(x, float("nan")), label), strict=True))
    with pytest.raises(runtime_driver.NonFiniteLossError):
        session.step(broken, seed=1, **both.once)
    assert _same(session.adapter, kept)
    with pytest.raises(runtime_driver.InternalStateError):
        session.step(both.batch, seed=1, **both.once)


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[fqn], right[fqn]) for fqn in left)
