"""Bad inputs and options: a typed error that says what was expected and what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.models import BATCH, Mlp, OwnLoss, integers, own_labels, random, seeded


def mlp_inputs() -> tuple[Tensor, Tensor]:
    return random(BATCH, 6), integers(4, BATCH)


def refuse(match: str, *args: Any, error: type[mz.MobizoError] = mz.InputError, **options: Any) -> None:
    given: Any = args or (seeded(Mlp()), mlp_inputs())
    with pytest.raises(error, match=match):
        mz.transform(*given, **{"loss": F.cross_entropy, **options})


class TestTransform:
    def test_model_of_the_wrong_type(self) -> None:
        refuse(r"must be a torch.nn.Module, found function", lambda x: x, mlp_inputs())

    @pytest.mark.parametrize("inputs", [3, "text", random(2, 6)])
    def test_inputs_of_the_wrong_type(self, inputs: Any) -> None:
        refuse("must be a tuple of args or a dict of kwargs, found", seeded(Mlp()), inputs)

    @pytest.mark.parametrize("nested", [[random(3, 6)], {"x": random(3, 6)}, (random(3, 6),)])
    def test_nested_containers(self, nested: Any) -> None:
        refuse("example input 'x' is a .*; pass its tensors as separate inputs", seeded(Mlp()), {"x": nested})

    def test_no_tensor(self) -> None:
        refuse("holds no tensor", seeded(Mlp()), {"x": 1.0})

    def test_too_many_inputs(self) -> None:
        refuse("the model takes 1 inputs, example_inputs holds 2", loss=None)

    def test_no_loss(self) -> None:
        message = r"one floating-point scalar.*found torch.float32 \[3, 4\]\n  pass labels"
        refuse(message, seeded(Mlp()), (random(BATCH, 6),), loss=None, error=mz.CaptureError)

    def test_predictions_without_a_loss(self) -> None:
        class Predicts(Mlp):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).mean(1)

        message = r"one number per example, \[3\], and no loss= says what to make of it"
        refuse(message, seeded(Predicts()), (random(BATCH, 6),), loss=None, error=mz.CaptureError)
        mz.transform(seeded(Predicts()), (random(BATCH, 6),), loss=lambda losses: losses)

    def test_a_loss_of_another_type(self) -> None:
        refuse("found torch.int64", loss=lambda o, y: o.argmax(), error=mz.CaptureError)
        refuse("found NoneType", loss=lambda o, y: None, error=mz.CaptureError)

    def test_a_loss_that_does_not_read_the_adapter(self) -> None:
        class Constant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = Mlp()

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.body(x), x

        model = seeded(Constant())
        message = "the loss does not depend on the adapter: %mean"
        refuse(message, model, mlp_inputs(), loss=lambda o, y: o[1].mean(), error=mz.UnsupportedOp)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_an_adapter_that_is_not_float32(self, dtype: torch.dtype) -> None:
        x, y = mlp_inputs()
        refuse(
            r"trainable tensor 'first.widen' must be float32, found torch.\w+; call .float\(\)",
            seeded(Mlp()).to(dtype), (x.to(dtype), y),
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"noise": "uniform"}, "noise must be one of gaussian, rademacher; found 'uniform'"),
            (
                {"trainable": "lora_A"},
                "trainable must be one of 'lora_B', 'lora_A.lora_B', 'requires_grad', .*found 'lora_A'",
            ),
            (
                {"estimator": "two_sided"},
                "estimator must be TwoSided or OneSided or ForwardGradient or Exact, found 'two_sided'",
            ),
            ({"batch_dim": -1}, "batch_dim must be a non-negative int, found -1"),
            ({"batch_dim": True}, "batch_dim must be a non-negative int, found True"),
            ({"max_labels": 2}, "max_labels= needs a token-level cross-entropy"),
        ],
    )
    def test_unknown_options(self, options: dict[str, Any], match: str) -> None:
        refuse(match, **options)

    @pytest.mark.parametrize("queries", [0, -1, 1.5, True, "4"])
    @pytest.mark.parametrize("kind", [mz.TwoSided, mz.OneSided])
    def test_queries(self, kind: Any, queries: Any) -> None:
        with pytest.raises(mz.InputError, match="queries must be a positive int"):
            kind(queries=queries)

    @pytest.mark.parametrize("kind", [mz.TwoSided, mz.OneSided])
    def test_normalize(self, kind: Any) -> None:
        with pytest.raises(mz.InputError, match="normalize must be None or 'std', found 'var'"):
            kind(normalize="var")

    def test_a_deviation_of_one_loss(self) -> None:
        with pytest.raises(mz.InputError, match=r"at least 2 perturbed losses, OneSided\(queries=1\) has 1; take more"):
            mz.OneSided(queries=1, normalize="std")

    def test_fewer_labels_than_the_examples_carry(self) -> None:
        inputs = {"tokens": integers(11, BATCH, 5), "labels": own_labels()}
        refuse("max_labels is 1, but an example input carries 2", seeded(OwnLoss()), inputs, loss=None, max_labels=1)

    def test_an_input_without_a_batch(self) -> None:
        refuse(
            "needs an input with a batch dimension", seeded(Mlp()), (random(6), torch.tensor(1)),
            error=mz.UnsupportedOp,
        )  # fmt: skip


class TestRun:
    """A compiled program against arguments that do not fit it."""

    @pytest.fixture
    def mlp(self, compiled) -> tuple[mz.TrainingProgram, dict[str, Tensor], Any]:
        program, _, inputs = compiled("mlp")
        return program, program.initial_adapter(), inputs

    def refuse(self, mlp: Any, match: str, adapter: Any = None, inputs: Any = None, **scalars: Any) -> None:
        program, good, batch = mlp
        with pytest.raises(mz.InputError, match=match):
            program.step(
                good if adapter is None else adapter, batch if inputs is None else inputs,
                **{"seed": 0, "lr": 0.1, "eps": 0.1, **scalars},
            )  # fmt: skip

    @pytest.mark.parametrize("eps", [0, 0.0, -1e-3, float("nan")])
    def test_eps(self, mlp, eps: float) -> None:
        self.refuse(mlp, "eps must be positive", eps=eps)

    @pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.0, "0", True, None])
    def test_seed(self, mlp, seed: Any) -> None:
        self.refuse(mlp, "takes seed= and eps=" if seed is None else "seed must be a 64-bit integer", seed=seed)
        program, adapter, _ = mlp
        with pytest.raises(mz.InputError, match="seed must be a 64-bit integer"):
            program.apply(adapter, seed=seed, lr=0.1, projected_gradients=torch.zeros(4))

    def test_adapter_keys(self, mlp) -> None:
        adapter = mlp[1]
        renamed = {fqn.replace("first", "other"): value for fqn, value in adapter.items()}
        self.refuse(mlp, "does not fit the program: missing first.widen; unknown other.widen", adapter=renamed)
        self.refuse(mlp, "missing first.widen, second.widen", adapter={})

    def test_adapter_shape_and_dtype(self, mlp) -> None:
        adapter = mlp[1]
        wrong = {**adapter, "first.widen": adapter["first.widen"].T}
        self.refuse(mlp, r"'first.widen' must be torch.float32 \[8, 2\], found torch.float32 \[2, 8\]", adapter=wrong)
        self.refuse(mlp, r"found torch.float64", adapter={k: v.double() for k, v in adapter.items()})
        self.refuse(mlp, "must be a tensor, found list", adapter={k: v.tolist() for k, v in adapter.items()})

    def test_batch(self, mlp) -> None:
        x, y = mlp[2]
        self.refuse(mlp, r"'x' must be torch.float32 \[3, 6\], found torch.float32 \[2, 6\]", inputs=(x[:2], y[:2]))
        self.refuse(mlp, r"'target' must be torch.int64|'label' must be torch.int64", inputs=(x, y.int()))
        self.refuse(mlp, r"expected 2 inputs \(x, label\), found 1", inputs=(x,))
        self.refuse(mlp, "must be a tuple or a dict of tensors, found Tensor", inputs=x)
        self.refuse(mlp, "must be a tuple or a dict of tensors, found int", inputs=3)
        self.refuse(mlp, "unknown inputs y; the program takes x, label", inputs={"x": x, "y": y})
        self.refuse(mlp, "input 'label' is missing", inputs={"x": x})

    def test_projected_gradients(self, mlp) -> None:
        program, adapter, _ = mlp
        with pytest.raises(mz.InputError, match=r"'projected_gradients' must be torch.float32 \[4\]"):
            program.apply(adapter, seed=0, lr=0.1, projected_gradients=torch.zeros(3))

    @pytest.mark.parametrize("method", ["step", "loss"])
    def test_more_labels_than_the_program_reads(self, compiled, method: str) -> None:
        program, _, inputs = compiled("own-loss")
        labels = inputs["labels"].clone()
        labels[2] = 1
        scalars = {"seed": 0, "lr": 0.1, "eps": 0.1} if method == "step" else {}
        with pytest.raises(mz.InputError, match="example 2 carries 5 labelled positions, the program reads at most 2"):
            getattr(program, method)(program.initial_adapter(), {**inputs, "labels": labels}, **scalars)

    def test_logits_of_a_model_that_returns_only_a_loss(self) -> None:
        class OnlyLoss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = Mlp()

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return F.cross_entropy(self.body(x), y)

        program = mz.transform(seeded(OnlyLoss()), mlp_inputs())
        assert program.methods == ("step", "apply", "loss")
        with pytest.raises(mz.InputError, match="no method 'logits'; this program has step, apply, loss"):
            program.logits(program.initial_adapter(), mlp_inputs())

    def test_unknown_method_and_pass(self, mlp) -> None:
        program = mlp[0]
        for call in (program.text, program.core, program.core_ir):
            with pytest.raises(mz.InputError, match="no method 'train'; this program has step, apply, loss, logits"):
                call("train")
        with pytest.raises(
            mz.InputError, match="no pass 'inline' ran; these did: canonicalize, unstack-numbers, split-complex"
        ):
            program.diff("inline")

    def test_a_constant_of_the_program_may_not_change(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = Mlp()

            def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
                return self.body(x) * factor

        model, (x, y) = seeded(Scaled()), mlp_inputs()
        program = mz.transform(model, (x, 2.0, y), loss=F.cross_entropy)
        mz.verify(program, model, (x, 2.0, y))
        with pytest.raises(mz.InputError, match=r"'factor' was 2.0 when the program was compiled, found 3.0"):
            program.loss(program.initial_adapter(), (x, 3.0, y))


def test_labels_reach_the_loss_by_name() -> None:
    """A dict has no order that means anything: the loss's own parameter names decide."""

    def loss(outputs: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return (outputs.sum(1) * first - 3 * second).square().mean()

    x, a, b = random(BATCH, 6), random(BATCH, seed=1), random(BATCH, seed=2)
    adapter: dict[str, Tensor] = {}
    values = []
    for inputs in ({"x": x, "first": a, "second": b}, {"second": b, "x": x, "first": a}, (x, a, b)):
        program = mz.transform(seeded(Mlp()), inputs, loss=loss)
        adapter = program.initial_adapter()
        values.append(float(program.loss(adapter, inputs)))
    assert values[0] == values[1] == values[2]


def test_every_error_is_a_mobizo_error() -> None:
    kinds = [mz.InputError, mz.CaptureError, mz.NoLoRASites, mz.UnsupportedOp, mz.BatchCoupled, mz.VerificationFailed]
    assert all(issubclass(kind, mz.MobizoError) for kind in kinds)
