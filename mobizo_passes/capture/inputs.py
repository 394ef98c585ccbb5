"""Example inputs: which tensors the model takes, which only the loss takes, and what everything is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mobizo_passes.capture.layouts import copied
from mobizo_passes.capture.wrapped import unwrap
from mobizo_passes.errors import InputError

LossFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Inputs:
    """Named example inputs: `tensors` in program order, `constants` baked in, `loss_only` the names given to `loss`."""

    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    loss_only: tuple[str, ...]
    positional: tuple[str, ...]


def _forward_parameters(model: nn.Module) -> tuple[list[str], bool, bool]:
    """Return the names that the model's forward takes, and whether it takes any more args, and any more kwargs."""
    # PEFT's wrapper forwards *args, **kwargs to the model it wraps; so does torch.compile's and that of DataParallel.
    base, _ = unwrap(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base  # type: ignore[operator]
    base, _ = unwrap(base)
    parameters = inspect.signature(base.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    more_args = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    more_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    inner = list(base.children())
    if more_kwargs and len(inner) == 1:
        # A wrapper that passes on what it is given: the names are those of the model inside.
        names, inner_args, more_kwargs = _forward_parameters(inner[0])
        more_args = more_args and (inner_args or bool(named))
        named = list(dict.fromkeys([*named, *names]))
    return named, more_args, more_kwargs


def _loss_parameters(loss: LossFn) -> list[str]:
    try:
        names = list(inspect.signature(loss).parameters)
    except (TypeError, ValueError):
        return []
    return names[1:]


def name_inputs(model: nn.Module, example_inputs: Any, loss: LossFn | None) -> Inputs:
    """Name the example inputs (dict: kwargs; tuple: args) and split off those that only `loss` reads.

    Raises `InputError` if they are neither, hold nested containers, or are more than the model takes.
    """
    named, variadic, open_ended = _forward_parameters(model)
    if isinstance(example_inputs, Mapping):
        items = dict(example_inputs)
        unknown = [k for k in items if k not in named]
        if open_ended and not named and loss is not None:
            # The forward says nothing: the loss says which of them are its own.
            unknown = [k for k in unknown if k in _loss_parameters(loss)]
        loss_only = _loss_order(unknown, loss) if loss is not None else ()
        positional: tuple[str, ...] = ()
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        count = len(example_inputs) if variadic and loss is None else min(len(named), len(example_inputs))
        names = [*named[:count], *(f"input_{i}" for i in range(len(named), count))]
        extra = len(example_inputs) - count
        if extra and loss is None:
            raise InputError(f"the model takes {len(named)} inputs, example_inputs holds {len(example_inputs)}")
        labels = _loss_parameters(loss)[:extra] if loss is not None else []
        labels += [f"label_{i}" for i in range(len(labels), extra)]
        labels = [f"{name}_label" if name in names else name for name in labels]
        positional = tuple(names)
        loss_only = tuple(labels)
        items = dict(zip([*names, *labels], example_inputs, strict=True))
    else:
        raise InputError(
            f"example_inputs must be a tuple of args or a dict of kwargs, found {type(example_inputs).__name__}"
        )
    # Copies: the program keeps them, and their memory layout is not part of it.
    plain = {k: copied(v) for k, v in items.items() if isinstance(v, Tensor)}
    constants = {k: v for k, v in items.items() if not isinstance(v, Tensor)}
    for name, value in constants.items():
        if isinstance(value, Mapping | list | tuple | set):
            raise InputError(f"example input '{name}' is a {type(value).__name__}; pass its tensors as separate inputs")
    if not plain:
        raise InputError("example_inputs holds no tensor")
    return Inputs(plain, constants, tuple(n for n in loss_only if n in plain), positional)


def _loss_order(names: list[str], loss: LossFn) -> tuple[str, ...]:
    """Order labels as the loss names them; a loss that names them otherwise takes them in the order given."""
    wanted = _loss_parameters(loss)
    return tuple(sorted(names, key=wanted.index)) if set(names) <= set(wanted) else tuple(names)


def bind_inputs(inputs: Inputs, example_inputs: Any) -> dict[str, Tensor]:
    """Name new inputs of the same structure as the example inputs; raises `InputError` if they don't fit."""
    if isinstance(example_inputs, Mapping):
        unknown = set(example_inputs) - set(inputs.tensors) - set(inputs.constants)
        if unknown:
            raise InputError(
                f"unknown inputs {', '.join(sorted(unknown))}; the program takes {', '.join(inputs.tensors)}"
            )
        return _tensors(inputs, example_inputs)
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str):
        raise InputError(f"inputs must be a tuple or a dict of tensors, found {type(example_inputs).__name__}")
    order = [*inputs.positional, *inputs.loss_only]
    if len(example_inputs) != len(order):
        raise InputError(f"expected {len(order)} inputs ({', '.join(order)}), found {len(example_inputs)}")
    return _tensors(inputs, dict(zip(order, example_inputs, strict=True)))


def _tensors(inputs: Inputs, items: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keep the tensors; what was not a tensor at transform is part of the program and must not change."""
    for name, fixed in inputs.constants.items():
        if name in items and (isinstance(items[name], Tensor) or items[name] != fixed):
            raise InputError(f"input '{name}' was {fixed!r} when the program was compiled, found {items[name]!r}")
    return {k: v for k, v in items.items() if k in inputs.tensors}
