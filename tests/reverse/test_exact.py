"""`mz.Exact()`: programs whose step follows the exact gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.graph.text import to_text
from tests.models import CASES, Case, Lora, Mlp, integers, random, seeded


def label_loss(out: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out, labels)


def mlp(**options: object) -> tuple[nn.Module, tuple[Tensor, Tensor], mz.TrainingProgram]:
    model, inputs = seeded(Mlp()), (random(3, 6), integers(4, 3))
    program = mz.transform(model, inputs, loss=label_loss, **{"estimator": mz.Exact(), **options})
    return model, inputs, program


@pytest.mark.parametrize("trainable", ["lora_B", "lora_A+lora_B"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_autograds(case: Case, trainable: str) -> None:
    model, inputs = case.build(), case.inputs()
    program = mz.transform(
        model, inputs, **{**case.options, "estimator": mz.Exact(), "optimizer": mz.AdamW(), "trainable": trainable}
    )
    mz.verify(program, model, inputs)


def test_a_step_takes_no_seed_and_no_epsilon() -> None:
    _, inputs, program = mlp()
    names = [each["name"] for each in program.manifest()["methods"]["step"]["inputs"]]
    assert names == ["first.widen", "second.widen", "x", "labels", "lr"]
    for wrong in ({"seed": 0}, {"eps": 1e-2}):
        with pytest.raises(mz.InputError, match=f"takes no {next(iter(wrong))}: the gradient is computed"):
            program.step(program.initial_adapter(), inputs, lr=0.1, **wrong)  # pyright: ignore[reportArgumentType]


def test_state_stands_between_adapter_and_batch() -> None:
    _, _, program = mlp(optimizer=mz.AdamW())
    step = program.manifest()["methods"]["step"]
    assert [each["role"] for each in step["inputs"]] == ["adapter"] * 2 + ["optimizer"] * 5 + ["batch"] * 2 + ["lr"]
    assert [each["role"] for each in step["outputs"]] == ["loss"] + ["adapter"] * 2 + ["optimizer"] * 5
    assert [each["name"] for each in step["outputs"]][-1] == "optimizer.step"


def test_there_is_no_apply() -> None:
    _, _, program = mlp()
    assert program.methods == ("step", "loss", "logits")
    with pytest.raises(mz.InputError, match="has no apply"):
        program.apply(program.initial_adapter(), seed=0, lr=0.1, projected_gradients=torch.zeros(1))


def test_gradients_are_a_method_on_request() -> None:
    model, inputs, program = mlp(estimator=mz.Exact(gradients=True))
    assert "gradients" in program.methods
    outputs = program.manifest()["methods"]["gradients"]["outputs"]
    assert [each["role"] for each in outputs] == ["loss", "gradient", "gradient"]
    adapter = program.initial_adapter()
    found = program.run("gradients", {**adapter, **program.example_batch()})
    _, expected = mz.reference.gradients_of(model, inputs, adapter, label_loss)
    for fqn, value in expected.items():
        torch.testing.assert_close(found[fqn], value)
        assert torch.equal(found[fqn], program.gradients(adapter, inputs)[fqn])
    _, _, other = mlp(estimator=mz.TwoSided())
    with pytest.raises(mz.InputError, match=r"estimator=mz\.Exact"):
        other.gradients(adapter, inputs)


def test_only_the_path_to_the_lowest_adapter_tensor_is_differentiated() -> None:
    """What lies below LoRA has no cotangent; neither have frozen weights."""

    class Upper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lora, self.head = nn.Linear(6, 8), Lora(8, 7), nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.lora(torch.tanh(self.stem(x)))))

    model, inputs = seeded(Upper()), (random(3, 6), integers(4, 3))
    program = mz.transform(model, inputs, estimator=mz.Exact(), loss=label_loss)
    lines = [line for line in program.text().splitlines() if "append-gradients" in line]
    assert not [line for line in lines if "[8, 6]" in line or "tanh" in line]
    # Of three products only those between the loss and lora_B have one: the head's, and lora_B's own.
    assert sum("aten.matmul" in line for line in lines) == 2


DERIVATIVES = pytest.mark.parametrize("estimator", [mz.Exact(), mz.ForwardGradient(2)], ids=str)


class Between(nn.Module):
    """A LoRA layer, a function, a head."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lora, self.head, self.function = Lora(6, 8), nn.Linear(8, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.lora(x)))


@torch.no_grad()
def without_gradient(y: Tensor) -> Tensor:
    with torch.enable_grad():
        first, second = y.tanh().split(4, -1)
    return torch.cat([second, first], -1)


def in_inference_mode(y: Tensor) -> Tensor:
    with torch.inference_mode():
        z = y.tanh()
    return y * z.clone()


def outside_of_autocast(y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return y * without_gradient(y)


@DERIVATIVES
@pytest.mark.parametrize(
    "function",
    [
        lambda y: y * y.detach(),
        lambda y: y * y.data,
        lambda y: y * without_gradient(y),
        in_inference_mode,
        outside_of_autocast,
    ],
    ids=["detach", "data", "no_grad", "inference_mode", "autocast"],
)
def test_what_ends_a_derivative(function: Callable[[Tensor], Tensor], estimator: mz.Estimator) -> None:
    model, inputs = seeded(Between(function)), (random(3, 6), integers(4, 3))
    program = mz.transform(model, inputs, estimator=estimator, loss=label_loss)
    mz.verify(program, model, inputs)


class Doubled(torch.autograd.Function):
    """A square with its own backward, right or ten times too large."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x

    @staticmethod
    def backward(ctx, *grad_outputs):
        (g,) = grad_outputs
        return g * 2 * ctx.saved_tensors[0] * ctx.factor, None


@DERIVATIVES
def test_a_backward_of_the_models_own_is_held_against_the_forward(estimator: mz.Estimator) -> None:
    inputs = (random(3, 6), integers(4, 3))
    mz.transform(seeded(Between(lambda y: Doubled.apply(y, 1))), inputs, estimator=estimator, loss=label_loss)
    wrong = seeded(Between(lambda y: Doubled.apply(y, 10)))
    with pytest.raises(mz.UnsupportedOp, match=r"a backward of the model's own: .*Doubled(.|\n)*straight-through"):
        mz.transform(wrong, inputs, estimator=estimator, loss=label_loss)
    mz.verify(mz.transform(wrong, inputs, loss=label_loss), wrong, inputs)


def test_the_root_of_a_mean_square_has_a_tangent() -> None:
    model, inputs = seeded(Between(torch.tanh)), (random(3, 6), random(3, 4, seed=5))
    program = mz.transform(model, inputs, estimator=mz.ForwardGradient(2), loss=lambda o, t: F.mse_loss(o, t).sqrt())
    mz.verify(program, model, inputs)


@DERIVATIVES
def test_scores_with_classes_in_dimension_1(estimator: mz.Estimator) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora = Lora(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.lora(x).transpose(1, 2)

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(scores, labels, reduction="none", weight=torch.arange(1.0, 6.0))
        return (each.sum(1) / (labels != 0).sum(1).clamp(min=1)).mean() + F.cross_entropy(
            scores, labels, ignore_index=2
        )

    model, inputs = seeded(Tokens()), (random(3, 4, 6), integers(5, 3, 4))
    mz.verify(mz.transform(model, inputs, estimator=estimator, loss=loss), model, inputs)


def spectrum(y: Tensor) -> Tensor:
    """Its gradient through complex numbers would be zero, if they counted as no real numbers."""
    return torch.fft.ifft(torch.fft.fft(y, dim=1) * 2, dim=1).real


@DERIVATIVES
@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda y: torch.cummax(y, 1).values, r"without a derivative: %cummax\w* = .*test_exact"),
        (spectrum, r"through complex numbers: %_fft_r2c = .*test_exact"),
    ],
    ids=["cummax", "fft"],
)
def test_what_has_no_derivative_is_refused_by_name(
    between: Callable[[Tensor], Tensor], reason: str, estimator: mz.Estimator
) -> None:
    with pytest.raises(mz.UnsupportedOp, match=reason):
        mz.transform(seeded(Between(between)), (random(3, 6), integers(4, 3)), estimator=estimator, loss=label_loss)


@pytest.mark.parametrize(
    ("estimator", "differentiates", "drawn"),
    [
        (mz.Exact(), "append-gradients", "gradient, by reverse mode"),
        (mz.ForwardGradient(2), "linearize", "loss f32[] and its tangents f32[2]"),
    ],
    ids=str,
)
def test_views_of_a_program(tmp_path: Path, estimator: mz.Estimator, differentiates: str, drawn: str) -> None:
    model, inputs, program = mlp(optimizer=mz.AdamW(), estimator=estimator)
    mz.verify(program, model, inputs)
    assert differentiates in {record.name for record in program.history}
    assert "softmax" in program.diff(differentiates)
    assert program.to_networkx().number_of_nodes() > 30
    assert program.blocks(1).number_of_nodes() > 2
    assert f">{drawn}<" in program.draw(tmp_path / "step.svg").read_text()
    assert f"{estimator}" in repr(program)


def test_other_estimators_keep_their_programs() -> None:
    """An optimizer that only moves by lr · gradient is the update that has always been."""
    _, _, default = mlp(estimator=mz.TwoSided(queries=2))
    _, _, stated = mlp(estimator=mz.TwoSided(queries=2), optimizer=mz.SGD())
    assert str(default) == str(stated)
    assert "mobizo.update" in str(default)


@pytest.mark.parametrize("estimator", [mz.Exact(gradients=True), mz.ForwardGradient(3)], ids=str)
def test_the_printed_program_reads_back(estimator: mz.Estimator) -> None:
    _, _, program = mlp(optimizer=mz.AdamW(clip_norm=1.0), estimator=estimator)
    for method in program.methods:
        assert program.text(method) == to_text(mz.parse(program.text(method)))
