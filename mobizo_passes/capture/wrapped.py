"""Models inside wrappers that only change how they run: taken out, and named."""

from __future__ import annotations

from typing import Any

from torch import nn

from mobizo_passes.errors import InputError

# Class name -> the attribute with the model inside. By name: the classes live in modules that cost seconds to import.
_WRAPPERS = {
    "OptimizedModule": ("_orig_mod", "torch.compile"),
    "DataParallel": ("module", "nn.DataParallel"),
    "DistributedDataParallel": ("module", "DistributedDataParallel"),
    "AveragedModel": ("module", "AveragedModel"),
}
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine", "PipelineStage")


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model inside `torch.compile`, `DataParallel` or `DistributedDataParallel`, and what was taken off.

    Raises `InputError` for a model whose parameters are sharded, or compiled to TorchScript.
    """
    notes: list[str] = []
    while True:
        names = {kind.__name__ for kind in type(model).__mro__}
        if not names.isdisjoint(_SHARDED):
            raise InputError(
                f"{type(model).__name__} holds parts of the parameters only; give the model as it is before sharding"
            )
        if "ScriptModule" in names:
            raise InputError("a TorchScript model can't be exported; give the module that it was made of")
        wrapper = next((w for n, w in _WRAPPERS.items() if n in names), None)
        inner = getattr(model, wrapper[0], None) if wrapper else None
        if wrapper is None or not isinstance(inner, nn.Module):
            return model, tuple(notes)
        notes.append(f"the model is inside {wrapper[1]}, which was taken off: names are those of the model inside")
        model = inner


def class_name(model: nn.Module) -> str:
    """Return the model's class name, looking through PEFT's wrapper."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    base, _ = unwrap(base)
    return type(base).__name__
