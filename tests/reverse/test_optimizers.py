"""Optimizers give torch.optim's numbers, in eager mode and in a program's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mobizo_passes as mz
from tests.models import Mlp, integers, random, seeded

# Both round in float32, in another order; some units in the last place each step, of numbers up to 1.
TOLERANCE = 1e-6
STEPS = 4

Make = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
CASES: dict[str, tuple[mz.Optimizer, Make]] = {
    "sgd": (mz.SGD(), lambda p, lr: torch.optim.SGD(p, lr)),
    "sgd-decay": (mz.SGD(weight_decay=0.1), lambda p, lr: torch.optim.SGD(p, lr, weight_decay=0.1)),
    "sgd-clipped": (mz.SGD(clip_norm=0.3), lambda p, lr: torch.optim.SGD(p, lr)),
    "momentum": (mz.Momentum(0.8), lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8)),
    "momentum-decay": (
        mz.Momentum(0.8, weight_decay=0.1), lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, weight_decay=0.1)
    ),
    "adamw": (mz.AdamW(), lambda p, lr: torch.optim.AdamW(p, lr)),
    "adamw-own": (
        mz.AdamW(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2),
        lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2),
    ),
    "adam-clipped": (mz.AdamW(weight_decay=0.0, clip_norm=0.3), lambda p, lr: torch.optim.Adam(p, lr)),
}  # fmt: skip


def model_and_inputs() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return seeded(Mlp()), (random(3, 6), integers(4, 3))


def label_loss(out: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out, labels)


def trained(make: Make, clip: float | None, lr: float, names: list[str]) -> tuple[dict[str, Tensor], list[float]]:
    """Some steps of torch.optim on the untransformed model."""
    model, (x, labels) = model_and_inputs()
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    optimizer = make(chosen, lr)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = label_loss(model(x), labels)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(chosen, clip)
        optimizer.step()
        losses.append(float(loss))
    return {name: parameters[name].detach() for name in names}, losses


@pytest.mark.parametrize("name", CASES)
def test_a_program_takes_torchs_steps(name: str) -> None:
    optimizer, make = CASES[name]
    model, inputs = model_and_inputs()
    program = mz.transform(
        model, inputs, estimator=mz.Exact(), optimizer=optimizer, trainable="lora_A+lora_B", loss=label_loss
    )
    adapter, state, losses = program.initial_adapter(), program.initial_optimizer(), []
    for _ in range(STEPS):
        out = program.step(adapter, inputs, lr=0.05, optimizer=state)
        adapter, state = out.adapter, out.optimizer
        losses.append(float(out.loss))
    expected, torchs = trained(make, optimizer.clip_norm, 0.05, list(adapter))
    assert losses == pytest.approx(torchs, rel=1e-5)
    for fqn, value in expected.items():
        torch.testing.assert_close(adapter[fqn], value, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["momentum-decay", "adamw"])
def test_estimated_gradients_step_the_same_way(name: str) -> None:
    optimizer, make = CASES[name]
    model, inputs = model_and_inputs()
    program = mz.transform(model, inputs, estimator=mz.OneSided(queries=2), optimizer=optimizer, loss=label_loss)
    adapter, state = program.initial_adapter(), program.initial_optimizer()
    leaves = {fqn: nn.Parameter(value.clone()) for fqn, value in adapter.items()}
    torchs = make(list(leaves.values()), 0.05)
    for seed in range(STEPS):
        out = program.step(adapter, inputs, seed=seed, lr=0.05, eps=1e-2, optimizer=state)
        given = mz.reference.estimated(adapter, seed=seed, projected_gradients=out.projected_gradients)
        for fqn, leaf in leaves.items():
            leaf.grad = given[fqn]
        torchs.step()
        again = program.apply(adapter, seed=seed, lr=0.05, projected_gradients=out.projected_gradients, optimizer=state)
        assert all(torch.equal(again[each], value) for each, value in {**out.adapter, **out.optimizer}.items())
        adapter, state = out.adapter, out.optimizer
    for fqn, leaf in leaves.items():
        torch.testing.assert_close(adapter[fqn], leaf.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    mz.verify(program, model, inputs)


def test_the_bias_of_early_steps_keeps_its_digits() -> None:
    """1 − βᵗ of β near 1, where float32's own difference would lose four digits."""
    optimizer = mz.AdamW(betas=(0.9, 0.99999), weight_decay=0.0)
    value, gradient = {"a": torch.zeros(1)}, {"a": torch.full((1,), 0.5)}
    new, _ = optimizer.stepped(value, gradient, optimizer.state(value), torch.tensor([0.1]))
    assert float(new["a"]) == pytest.approx(-0.1, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mz.SGD(weight_decay=-1), "weight_decay"),
        (lambda: mz.SGD(clip_norm=0), "clip_norm must be positive"),
        (lambda: mz.Momentum(1.0), "beta"),
        (lambda: mz.AdamW(betas=(0.9, 1.0)), "betas"),
        (lambda: mz.AdamW(betas=(0.9,)), "two numbers"),  # pyright: ignore[reportArgumentType]
        (lambda: mz.AdamW(eps=float("nan")), "eps"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(mz.InputError, match=message):
        make()


def test_the_state_must_be_given_and_fit() -> None:
    model, inputs = model_and_inputs()
    program = mz.transform(model, inputs, estimator=mz.Exact(), optimizer=mz.Momentum(), loss=label_loss)
    with pytest.raises(mz.InputError, match="initial_optimizer"):
        program.step(program.initial_adapter(), inputs, lr=0.1)
    state = {**program.initial_optimizer(), "optimizer.step": torch.zeros(1)}
    with pytest.raises(mz.InputError, match=r"missing or unknown optimizer\.step"):
        program.step(program.initial_adapter(), inputs, lr=0.1, optimizer=state)


def test_something_else_is_no_optimizer() -> None:
    model, inputs = model_and_inputs()
    with pytest.raises(mz.InputError, match="optimizer must be one of"):
        mz.transform(model, inputs, optimizer=torch.optim.SGD, loss=label_loss)  # pyright: ignore[reportArgumentType]
