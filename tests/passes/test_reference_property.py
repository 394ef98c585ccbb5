"""The compiled step against the sequential reference on the untransformed model, and against two independent oracles.

Tolerances. A fused forward sums in another order than a single one, so float32 losses agree to `mz.verify`'s relative
2e-5. A projected gradient inherits that error over ε (`tests.tolerance`); but for rounding it is what the reference
makes of the program's own losses. The adapter follows from the gradients by exact formulas: |z| < 4.5 times lr times
that.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import mobizo_passes as mz
from mobizo_passes.capture.export import forward_with_loss
from mobizo_passes.capture.inputs import bind_inputs, name_inputs
from mobizo_passes.testing import strategies
from tests.models import BATCH, CASES, Case, case, seeded
from tests.strategies import models
from tests.tolerance import gradient_bound

LOSS = 2e-5
LR = 1e-2
# Half the profile's examples: each compiles a model.
FEW = settings(max_examples=max(settings.default.max_examples // 2, 10) if settings.default else 10)


def close(program: mz.TrainingProgram, model: nn.Module, inputs: Any, seed: int, eps: float) -> mz.StepResult:
    """Assert that a step agrees with the reference in every output; returns the step."""
    if not program.estimator.uses_epsilon:
        return mz.verify(program, model, inputs, seed=seed, lr=LR)
    adapter = program.initial_adapter()
    got = program.step(adapter, inputs, seed=seed, lr=LR, eps=eps)
    want = mz.reference.step(
        model, inputs, adapter, seed=seed, lr=LR, eps=eps,
        estimator=program.estimator, noise_kind=program.noise, loss=program.loss_fn,
    )  # fmt: skip
    scale = LOSS * max(1.0, float(want.losses.abs().max()))
    torch.testing.assert_close(got.losses, want.losses, rtol=0, atol=scale)
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=scale)
    bound = gradient_bound(program.estimator, want.losses, want.projected_gradients, eps, scale)
    torch.testing.assert_close(got.projected_gradients, want.projected_gradients, rtol=0, atol=bound)
    own = mz.reference.projected_gradients(got.losses, eps, program.estimator)
    torch.testing.assert_close(got.projected_gradients, own, rtol=0, atol=1e-5 * float(own.abs().max()))
    assert list(got.adapter) == list(adapter)
    for fqn, value in want.adapter.items():
        torch.testing.assert_close(got.adapter[fqn], value, rtol=1e-6, atol=4.5 * LR * bound)
    return got


@pytest.mark.parametrize("one", CASES, ids=str)
def test_step_agrees_with_the_reference(compiled, one: Case) -> None:
    program, model, inputs = compiled(one.name)
    close(program, model, inputs, seed=3, eps=1e-2)


@pytest.mark.parametrize("trainable", ["lora_B", "lora_A+lora_B"])
@pytest.mark.parametrize("one", CASES, ids=str)
def test_directional_derivatives_are_autograds(compiled, one: Case, trainable: str) -> None:
    """In float64, to rounding: no difference of losses could be."""
    close(*compiled(one.name, estimator=mz.ForwardGradient(3), trainable=trainable), seed=3, eps=0.0)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_verify_accepts(compiled, one: Case) -> None:
    result = mz.verify(*compiled(one.name), seed=11)
    assert result.losses.shape == (8,)
    # A program that ignored its perturbations would agree with nothing but be equal across groups.
    assert len(set(result.losses.tolist())) > 1


@pytest.mark.parametrize("one", CASES, ids=str)
def test_loss_and_logits_agree_with_the_reference(compiled, one: Case) -> None:
    program, model, inputs = compiled(one.name)
    adapter = {k: v + 0.1 for k, v in program.initial_adapter().items()}
    want = mz.reference.loss_of(model, inputs, adapter, program.loss_fn)
    torch.testing.assert_close(program.loss(adapter, inputs), want, rtol=LOSS, atol=LOSS)
    logits = mz.reference.logits_of(model, inputs, adapter, program.loss_fn)
    torch.testing.assert_close(program.logits(adapter, inputs), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_core_graph_computes_what_the_readable_one_does(compiled, one: Case) -> None:
    """The decomposed program runs other kernels for row losses only: 1e-6, relative."""
    program, _, inputs = compiled(one.name)
    adapter = program.initial_adapter()
    batch = bind_inputs(program.inputs, inputs)
    scalars = {"seed": torch.tensor([5]), "lr": torch.tensor([LR]), "eps": torch.tensor([1e-2])}
    core = program.core_ir("step").run({**adapter, **batch, **scalars})
    want = program.step(adapter, inputs, seed=5, lr=LR, eps=1e-2)
    scale = 1e-6 * max(1.0, float(want.losses.abs().max()))
    torch.testing.assert_close(core["losses"], want.losses, rtol=0, atol=scale)
    torch.testing.assert_close(core["projected_gradients"], want.projected_gradients, rtol=0, atol=2 * scale / 1e-2)
    for fqn, value in want.adapter.items():
        torch.testing.assert_close(core[fqn], value, rtol=1e-6, atol=4.5 * LR * 2 * scale / 1e-2)


@given(data=st.data())
@FEW
def test_random_models(data: st.DataObject) -> None:
    spec = data.draw(models())
    model, inputs = spec.model(), spec.inputs()
    program = mz.transform(
        model, inputs, loss=spec.loss_fn(), estimator=data.draw(strategies.estimators(True)),
        noise=data.draw(strategies.noise_kinds()), trainable=data.draw(strategies.trainables()),
    )  # fmt: skip
    seed, eps = data.draw(strategies.seeds()), data.draw(strategies.epsilons())
    got = close(program, model, inputs, seed, eps)
    adapter = program.initial_adapter()
    again = program.apply(adapter, seed=seed, lr=LR, projected_gradients=got.projected_gradients)
    assert all(torch.equal(again[fqn], value) for fqn, value in got.adapter.items())
    # The same program fits any other adapter and any other seed.
    moved = {fqn: value + 0.05 for fqn, value in adapter.items()}
    want = mz.reference.loss_of(model, inputs, moved, spec.loss_fn())
    torch.testing.assert_close(program.loss(moved, inputs), want, rtol=LOSS, atol=LOSS)


@given(seed=strategies.seeds(), eps=strategies.epsilons(), shift=st.floats(-1, 1, width=32))
@FEW
@pytest.mark.parametrize("name", ["own-loss", "sequence-first"])
def test_apply_is_the_step_without_the_model(compiled, name: str, seed: int, eps: float, shift: float) -> None:
    program, _, inputs = compiled(name)
    adapter = {fqn: value + shift for fqn, value in program.initial_adapter().items()}
    got = program.step(adapter, inputs, seed=seed, lr=LR, eps=eps)
    again = program.apply(adapter, seed=seed, lr=LR, projected_gradients=got.projected_gradients)
    assert all(torch.equal(again[fqn], value) for fqn, value in got.adapter.items())


@given(data=st.data())
@FEW
def test_other_batches_and_label_masks(compiled, data: st.DataObject) -> None:
    """A program holds for every batch of its shapes, whatever positions carry labels (two at most, as compiled)."""
    program, model, _ = compiled("own-loss")
    tokens = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 10), min_size=5, max_size=5), min_size=3, max_size=3))
    )
    labels = torch.full_like(tokens, -100)
    for row in range(BATCH):
        for column in data.draw(st.sets(st.integers(0, 4), min_size=int(row == 0), max_size=2)):
            labels[row, column] = data.draw(st.integers(0, 10))
    close(program, model, {"tokens": tokens, "labels": labels}, seed=1, eps=1e-2)


@pytest.mark.parametrize("name", ["block", "attention", "mlp", "regression", "block-tokens"])
def test_vmap_gives_the_same_losses(compiled, name: str) -> None:
    """An oracle that shares no code with the reference's loop: one vmap over stacked, perturbed adapters."""
    program, model, inputs = compiled(name)
    adapter = program.initial_adapter()
    z = mz.reference.draw(adapter, 9, 4, "gaussian")
    eps = 1e-2
    stacked = {k: torch.cat([v + eps * z[k], v - eps * z[k]]) for k, v in adapter.items()}
    named = name_inputs(model, inputs, program.loss_fn)
    batch = bind_inputs(named, inputs)

    def loss(one: dict[str, Tensor]) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, one, args, kwargs)

        return forward_with_loss(call, named, program.loss_fn, batch)[0].mean()

    with torch.no_grad():
        want = vmap(loss)(stacked)
    got = program.step(adapter, inputs, seed=9, lr=LR, eps=eps)
    torch.testing.assert_close(got.losses, want, rtol=LOSS, atol=LOSS)


@pytest.mark.parametrize("name", [c.name for c in CASES if c.smooth])
def test_projected_gradients_are_directional_derivatives(compiled, name: str) -> None:
    """Autograd's ∇L·z against a central difference with ε = 5e-3.

    The difference carries a truncation error of order ε² and a rounding error of about 1e-7·|L|/ε = 1e-4; both stay
    far below 2 % of the largest derivative plus 5e-3.
    """
    program, model, inputs = compiled(name)
    adapter = program.initial_adapter()
    leaves = {k: v.clone().requires_grad_() for k, v in adapter.items()}
    named = name_inputs(model, inputs, program.loss_fn)

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, leaves, args, kwargs, tie_weights=True)

    forward_with_loss(call, named, program.loss_fn, bind_inputs(named, inputs))[0].mean().backward()
    z = mz.reference.draw(adapter, 2, 4, "gaussian")
    total = torch.zeros(4)
    for k, leaf in leaves.items():
        assert leaf.grad is not None
        total += (z[k] * leaf.grad).flatten(1).sum(1)
    got = program.step(adapter, inputs, seed=2, lr=LR, eps=5e-3).projected_gradients
    assert float(total.abs().max()) > 1e-3, "this model tests nothing"
    torch.testing.assert_close(got, total, rtol=0, atol=0.02 * float(total.abs().max()) + 5e-3)


ESTIMATORS = [
    mz.TwoSided(1),
    mz.TwoSided(3),
    mz.OneSided(1),
    mz.OneSided(4),
    mz.TwoSided(1, normalize="std"),
    mz.TwoSided(3, normalize="std"),
    mz.OneSided(2, normalize="std"),
    mz.ForwardGradient(1),
    mz.ForwardGradient(4),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("trainable", ["lora_B", "lora_A+lora_B"])
def test_estimators_noises_and_trainables(compiled, estimator: Any, noise: str, trainable: str) -> None:
    program, model, inputs = compiled("block", estimator=estimator, noise=noise, trainable=trainable)
    got = close(program, model, inputs, seed=-4, eps=1e-2)
    assert got.losses.shape == (estimator.groups if estimator.uses_epsilon else 1,)
    assert got.projected_gradients.shape == (estimator.queries,)
    again = program.apply(program.initial_adapter(), seed=-4, lr=LR, projected_gradients=got.projected_gradients)
    assert all(torch.equal(again[fqn], value) for fqn, value in got.adapter.items())


@pytest.mark.parametrize("name", ["mlp", "block", "llama-qv"])
def test_the_reference_of_directional_derivatives_is_forward_mode(compiled, name: str) -> None:
    """`torch.func.jvp` on the untransformed model, to a few roundings."""
    program, model, inputs = compiled(name)
    adapter = program.initial_adapter()
    estimator = mz.ForwardGradient(2)
    want = mz.reference.step(model, inputs, adapter, seed=4, lr=LR, estimator=estimator, loss=program.loss_fn)
    z = mz.reference.draw(adapter, 4, 2, "gaussian")
    # Without the modes that it sets: no gradients, in either direction.
    loss_of = inspect.unwrap(mz.reference.loss_of)

    def of(one: dict[str, Tensor]) -> Tensor:
        return loss_of(model, inputs, one, program.loss_fn)

    for query in range(2):
        with sdpa_kernel(SDPBackend.MATH):
            loss, along, *_ = jvp(of, (adapter,), ({fqn: each[query] for fqn, each in z.items()},))
        torch.testing.assert_close(loss, want.loss)
        torch.testing.assert_close(along, want.projected_gradients[query], rtol=1e-4, atol=1e-5)


@given(data=st.data(), estimator=strategies.estimators())
def test_the_bound_on_gradients_holds(data: st.DataObject, estimator: Any) -> None:
    """Whatever the losses, moving each by at most d moves no projected gradient by more than the bound that we use."""
    numbers = st.lists(st.floats(-1, 1), min_size=estimator.groups, max_size=estimator.groups)
    losses, moves = (torch.tensor(data.draw(numbers), dtype=torch.float64) for _ in range(2))
    error, eps = data.draw(st.sampled_from([1e-6, 1e-3, 0.1])), data.draw(strategies.epsilons())
    before, after = (mz.reference.projected_gradients(x, eps, estimator) for x in (losses, losses + error * moves))
    bound = gradient_bound(estimator, losses, before, eps, error)
    assert float((after - before).abs().max()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("name", ["mlp", "block", "transposed", "regression"])
def test_a_batch_of_one(name: str) -> None:
    one = case(name)
    inputs = tuple(x[:1] for x in one.inputs())
    model = one.build()
    close(mz.transform(model, inputs, **one.options), model, inputs, seed=0, eps=1e-2)


def test_a_batch_of_one_folded_away_is_refused() -> None:
    """[1, T, D] -> [T, D] -> [1, T, D] loses track of which dimension held the batch: refused, never guessed."""
    one = case("folded")
    with pytest.raises(mz.BatchCoupled, match="mean"):
        mz.transform(one.build(), tuple(x[:1] for x in one.inputs()), **one.options)


class TestVerifyCatches:
    """`mz.verify` on programs that were damaged after the transform."""

    @staticmethod
    def program() -> tuple[mz.TrainingProgram, nn.Module, Any]:
        one = case("mlp")
        model, inputs = one.build(), one.inputs()
        return mz.transform(model, inputs, **one.options), model, inputs

    @staticmethod
    def damage(program: mz.TrainingProgram, op: str, at: int, value: Any, method: str = "step") -> None:
        ir = program._methods[method]
        node = next(n for n in ir.graph.nodes if op in str(n.target))
        node.args = (*node.args[:at], value, *node.args[at + 1 :])
        ir.lint()

    def test_a_changed_scaling(self) -> None:
        program, model, inputs = self.program()
        self.damage(program, "mul.Tensor", 1, 2.1)
        with pytest.raises(mz.VerificationFailed, match=r"loss of group 0: the program gives .*the reference"):
            mz.verify(program, model, inputs)

    def test_the_noise_of_another_site(self) -> None:
        program, model, inputs = self.program()
        self.damage(program, "mobizo.noise", 1, 12345)
        with pytest.raises(mz.VerificationFailed, match="group"):
            mz.verify(program, model, inputs)

    def test_one_sided_gradients_in_a_two_sided_program(self) -> None:
        program, model, inputs = self.program()
        ir = program._methods["step"]
        losses, eps = ir.output_node("losses"), ir.input("eps", "eps")
        end = ir.graph.output_node()
        with ir.graph.inserting_before(end):
            halves = ir.call(torch.ops.aten.slice.Tensor, losses, 0, 0, 4)
            wrong = ir.call(torch.ops.aten.div.Tensor, halves, eps)
        nodes: Any = end.args[0]
        ir.set_outputs(
            [(s, wrong if s.kind == "projected_gradients" else n) for s, n in zip(ir.outputs, nodes, strict=True)]
        )
        ir.lint()
        with pytest.raises(mz.VerificationFailed, match="projected gradient of query 0"):
            mz.verify(program, model, inputs)

    def test_an_update_of_one_site_left_out(self) -> None:
        program, model, inputs = self.program()
        ir = program._methods["step"]
        nodes: Any = ir.graph.output_node().args[0]
        outputs = list(zip(ir.outputs, nodes, strict=True))
        spec, _ = outputs[-1]
        outputs[-1] = (spec, ir.input("adapter", spec.name))
        ir.set_outputs(outputs)
        ir.lint()
        with pytest.raises(mz.VerificationFailed, match=f"site '{spec.name}'"):
            mz.verify(program, model, inputs, lr=1.0)

    def test_apply_that_differs_from_step(self) -> None:
        program, model, inputs = self.program()
        self.damage(program, "mobizo.noise", 1, 777, method="apply")
        with pytest.raises(mz.VerificationFailed, match=r"apply and step"):
            mz.verify(program, model, inputs)

    def test_a_derivative_along_another_direction(self) -> None:
        one = case("mlp")
        model, inputs = one.build(), one.inputs()
        program = mz.transform(model, inputs, **{**one.options, "estimator": mz.ForwardGradient(2)})
        self.damage(program, "mobizo.noise", 1, 12345)
        with pytest.raises(mz.VerificationFailed, match="projected gradient of query 0: the program gives"):
            mz.verify(program, model, inputs)

    def test_another_model(self) -> None:
        program, model, inputs = self.program()
        # Not an in-place change: the program holds the very tensors of its model.
        other = seeded(type(model)(), seed=99)
        with pytest.raises(mz.VerificationFailed, match="loss of group 0"):
            mz.verify(program, other, inputs)
