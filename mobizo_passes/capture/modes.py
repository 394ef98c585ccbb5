"""Settings of the whole process that must not change what is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mobizo_passes.errors import InputError


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Compute as in a fresh process: float32, on the CPU, without autocast, gradients or inference mode.

    The caller's default dtype and device, autocast, gradient, inference and deterministic modes and RNG state are set
    aside, and are back afterwards.
    """
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])


def check_tensors(model: nn.Module) -> None:
    """Raise `InputError` for weights that torch can't export: inference tensors, or weights without values."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_inference():
            raise InputError(
                f"'{name}' is an inference tensor: the model was built or loaded under torch.inference_mode(), and "
                "torch.export can't take it\n  build and load the model outside of it; torch.no_grad() is fine"
            )
        if value.is_meta:
            raise InputError(
                f"'{name}' is on the meta device and has no values: the model was built under torch.device('meta') or "
                "set_default_device('meta')\n  build it on the CPU, or load its weights before transform"
            )


def ordinary(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs with copies in place of inference tensors; raises `InputError` for one without values."""
    for name, value in tensors.items():
        if value.is_meta:
            raise InputError(f"example input '{name}' is on the meta device and has no values; make it on the CPU")
    return {name: value.clone() if value.is_inference() else value for name, value in tensors.items()}
