"""Rotary embeddings whose frequencies change with the length: at the length of a program they are fixed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

_CHANGING = ("dynamic", "longrope")


@contextlib.contextmanager
def frozen_rope(model: nn.Module, run: Callable[[], object]) -> Iterator[list[str]]:
    """Hold the frequencies of dynamic and longrope embeddings at those of one run, for the time of an export.

    Such a module has a `rope_type`, and a forward around which a decorator recomputes `inv_freq` from the positions.
    `run` runs the model once on its example inputs, which lets every module choose; then the decorator is passed over.
    Yields the modules' FQNs; they are as before afterwards.
    """
    with kept_rope(model) as changing:
        if changing:
            run()
        for module in changing.values():
            inner: Any = type(module).forward
            while hasattr(inner, "__wrapped__"):
                inner = inner.__wrapped__
            module.__dict__["forward"] = inner.__get__(module)
            # The program keeps what it captures; the model's own buffer goes back to what it was.
            module._buffers.update({k: b.clone() for k, b in module._buffers.items() if b is not None})
        yield list(changing)


@contextlib.contextmanager
def kept_rope(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Put rotary embeddings that change themselves back as they were afterwards; yields them by FQN."""
    changing = {name: module for name, module in model.named_modules() if _changes(module)}
    before = [(m, dict(m.__dict__), dict(m._buffers), set(m._non_persistent_buffers_set)) for m in changing.values()]
    # The update may write into the buffer itself.
    held = [(b, b.clone()) for m in changing.values() for b in m._buffers.values() if b is not None]
    try:
        yield changing
    finally:
        for module, attributes, buffers, transient in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(transient)
        for buffer, value in held:
            buffer.copy_(value)


def _changes(module: nn.Module) -> bool:
    kinds: Any = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    updates = hasattr(type(module).forward, "__wrapped__") and any(
        isinstance(v, Tensor) for v in module._buffers.values()
    )
    return updates and any(isinstance(n, str) and any(word in n for word in _CHANGING) for n in names)
