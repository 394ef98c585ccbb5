"""PEFT directories as models to start from: found, of a kind that can be trained, loaded without a tensor left over.

PEFT itself loads what fits and keeps initial values for the rest.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobizo_cli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_FILE = "adapter_config.json"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
#: What trainers, torch.compile and parallel wrappers put before a key, and PEFT or another trainer leaves out.
_PREFIXES = ("base_model.model.", "base_model.", "_orig_mod.", "_fsdp_wrapped_module.", "module.", "model.")
#: What they put between names: the wrapper of torch.compile, and the adapter's name after a factor's.
_INSIDE = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module)\.")
_SHOWN = 4


def adapter_directory(name: str) -> Path | None:
    """The directory of a PEFT adapter: ``name`` itself, or the only one in it that PEFT made for a named adapter.

    Raises:
        ModelError: there are several in it.
    """
    directory = Path(name)
    if (directory / CONFIG_FILE).is_file():
        return directory
    if not directory.is_dir() or (directory / "config.json").is_file():
        return None
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise ModelError(f"{name}: holds {len(inside)} adapters ({names}). Name one of these directories.")
    return inside[0] if inside else None


def read_config(directory: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter.

    Raises:
        ModelError: unreadable, not a JSON object, or without the adapter's kind.
    """
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise ModelError(f"{path}: not usable JSON (nested too deeply). Give another directory.") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}). Give another directory.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}. Give another directory.")
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise ModelError(f"{path}: has no `peft_type`. Give the directory of a LoRA adapter.")
    return config


def base_of(directory: Path, config: Mapping[str, Any]) -> str:
    """The base model of an adapter. Raises :class:`ModelError` where the configuration names none that can be it."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise ModelError(f"{directory}: {CONFIG_FILE} has no `base_model_name_or_path`. Write the base model there.")
    if (Path(base) / CONFIG_FILE).is_file():
        raise ModelError(
            f"{directory}: its base model {base} is an adapter itself. Merge that one into its own base model first."
        )
    return base


def load_adapter(model: nn.Module, directory: Path) -> Any:
    """The model with the adapter of a PEFT directory on it, every tensor of the one in the other.

    Keys that differ from PEFT's by a known prefix are recognized.

    Raises:
        ModelError: no tensors; some that find no place; places that get none; another shape; or NaN.
        Exception: PEFT cannot put an adapter of this configuration on the model.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from peft.utils import set_peft_model_state_dict

    stored = _read(directory)
    # PEFT would ask the hub for the base model's configuration, to see whether the vocabulary has grown.
    options: dict[str, Any] = {"save_embedding_layers": False}
    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = False  # it marks what it trains
    before = model.state_dict().keys()
    adapted = get_peft_model(model, config)
    wanted = get_peft_model_state_dict(adapted, **options)
    # Embeddings that grew, or that have a LoRA, are saved whole beside it.
    after = adapted.get_base_model().state_dict()
    own = {
        f"base_model.model.{name}": value
        for name, value in after.items()
        if name.replace(".base_layer.", ".") in before
    }
    placed = _placed(directory, stored, wanted, own)
    for key, tensor in placed.items():
        place = wanted[key] if key in wanted else own[key]
        if place.shape != tensor.shape:
            raise ModelError(
                f"{directory}: `{key}` is {list(tensor.shape)}, but the adapter of its own configuration on this model "
                f"has {list(place.shape)}. Give the base model and the configuration that it was trained with."
            )
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{directory}: `{key}` holds NaN or infinity. Give an earlier adapter.")
    result = set_peft_model_state_dict(adapted, placed)
    # Virtual tokens are loaded by PEFT itself; it reports them all the same.
    unexpected = [
        key for key in result.unexpected_keys if not (config.is_prompt_learning and key == "prompt_embeddings")
    ]
    if unexpected:
        raise ModelError(f"{directory}: PEFT finds no place for {some(unexpected)}.")
    return adapted


def _read(directory: Path) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    paths = [directory / name for name in _WEIGHT_FILES if (directory / name).is_file()]
    if not paths:
        raise ModelError(f"{directory}: has no {' or '.join(_WEIGHT_FILES)}. Give a whole adapter directory.")
    path = paths[0]
    try:
        stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{path}: cannot be read ({error}). Give a whole adapter directory.") from error
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ModelError(f"{path}: expected tensors by name. Give a whole adapter directory.")
    return stored


def _placed(
    directory: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The stored tensors under PEFT's keys."""
    by_core: defaultdict[str, list[str]] = defaultdict(list)
    for key in wanted:
        by_core[_core(key)].append(key)
    placed: dict[str, Tensor] = {}
    lost: list[str] = []
    for key, tensor in stored.items():
        matches = [key] if key in wanted or key in own else by_core.get(_core(key), [])
        if len(matches) != 1 or matches[0] in placed:
            lost.append(key)
        else:
            placed[matches[0]] = tensor
    missing = [key for key in wanted if key not in placed]
    if lost or missing:
        parts = [f"{len(lost)} tensors find no place in the model: {some(lost)}"] if lost else []
        parts += [f"{len(missing)} of the adapter's tensors are not in it: {some(missing)}"] if missing else []
        raise ModelError(f"{directory}: {'; '.join(parts)}. Give the base model and configuration of this adapter.")
    return placed


def _core(key: str) -> str:
    """A key without what wrappers add to it."""
    key = _INSIDE.sub("", key)
    while found := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(found)
    return key.replace(".default.", ".").removesuffix(".default")


def some(names: Iterable[str]) -> str:
    """The first few of the names, sorted, and how many more there are."""
    listed = sorted(names, key=lambda name: (len(name), name) if name.isdecimal() else (0, name))
    rest = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(f"`{name}`" for name in listed[:_SHOWN]) + rest
