"""Weights and inputs that torch can't export."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mobizo_passes.errors import InputError


def check_tensors(model: nn.Module) -> None:
    """Raise `InputError` for weights that can't be exported: inference tensors, without values, or quantized ones."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_inference():
            raise InputError(
                f"'{name}' is an inference tensor: the model was built or loaded under torch.inference_mode(), and "
                "torch.export can't take it\n  build and load the model outside of it; torch.no_grad() is fine"
            )
        if is_traceable_wrapper_subclass(value):
            raise InputError(
                f"'{name}' is a {type(value).__name__}, which stands for several tensors, as torchao's quantized do\n"
                "  take it apart before transform: torchao.utils.unwrap_tensor_subclass(model)"
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
