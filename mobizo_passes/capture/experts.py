"""Experts of transformers' models: computed token by token while a model is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

#: Gathers the weights that each token's router chose: no token sees another, and every size is fixed.
_BY_TOKEN = "batched_mm"


@contextlib.contextmanager
def experts_by_token(model: nn.Module) -> Iterator[list[str]]:
    """Let transformers' experts choose an implementation that treats each token alone; yields the FQNs that changed.

    Their default sorts the tokens of all examples by expert, or loops over the experts that were hit; what comes out
    for a token is the same. The choice is a field of each module's configuration, and is put back afterwards.
    """
    changed = [name for name, module in model.named_modules() if _chooses(module)]
    configs = {id(config): config for name in changed if (config := _config(model.get_submodule(name)))}
    before = [(config, config._experts_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation_internal = _BY_TOKEN
        yield changed
    finally:
        for config, chosen in before:
            config._experts_implementation_internal = chosen


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _chooses(module: nn.Module) -> bool:
    # Set by the decorator through which transformers dispatches the forward of an experts module.
    dispatched = hasattr(type(module).forward, "__wrapped__") and hasattr(module, "_apply_gate")
    return dispatched and getattr(_config(module), "_experts_implementation_internal", _BY_TOKEN) != _BY_TOKEN
