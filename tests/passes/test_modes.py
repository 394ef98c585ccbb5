"""What transform computes does not depend on settings of the process, and leaves them as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mobizo_passes as mz
from tests.models import Mlp, integers, random, seeded


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic algorithms": deterministic,
    "meta device by default": lambda: default_device("meta"),
    "a device context": lambda: torch.device("meta"),
    "gradients off": torch.no_grad,
}


def compiled_on(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    program = mz.transform(MODEL, inputs, loss=F.cross_entropy, estimator=mz.TwoSided(2))
    out = mz.verify(program, MODEL, inputs)
    adapter = program.initial_adapter()
    applied = program.apply(adapter, seed=0, lr=1e-3, projected_gradients=out.projected_gradients)
    loss = mz.reference.loss_of(MODEL, inputs, adapter, F.cross_entropy)
    return (out.losses, *out.adapter.values(), *applied.values(), loss, program.logits(adapter, inputs))


MODEL, INPUTS = seeded(Mlp()), (random(3, 6), integers(4, 3))


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, ...]:
    return compiled_on(INPUTS)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_of_the_process_changes_nothing(name: str, expected: tuple[Tensor, ...]) -> None:
    with MODES[name]():
        before = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        flags = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.get_default_device()
        state = torch.get_rng_state()
        got = compiled_on(INPUTS)
        assert torch.equal(torch.get_rng_state(), state)
        assert before == (
            torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        )  # fmt: skip
        assert flags == (
            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.get_default_device()
        )  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_weights_made_in_inference_mode_are_refused_by_name() -> None:
    with torch.inference_mode():
        model = seeded(Mlp())
    with pytest.raises(mz.InputError, match=r"'first.weight' is an inference tensor: .*torch.inference_mode"):
        mz.transform(model, INPUTS, loss=F.cross_entropy)


def test_inputs_made_in_inference_mode_are_fine(expected: tuple[Tensor, ...]) -> None:
    with torch.inference_mode():
        inputs = random(3, 6), integers(4, 3)
    assert torch.equal(compiled_on(inputs)[0], expected[0])


def test_weights_without_values_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = Mlp().eval()
    with pytest.raises(mz.InputError, match=r"'first.weight' is on the meta device"):
        mz.transform(model, INPUTS, loss=F.cross_entropy)
    with pytest.raises(mz.InputError, match="example input 'x' is on the meta device"):
        mz.transform(MODEL, (INPUTS[0].to("meta"), INPUTS[1]), loss=F.cross_entropy)
