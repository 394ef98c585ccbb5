"""Loads a model and its tokenizer from transformers, and puts a LoRA on it with PEFT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobizo_cli.errors import MissingPackageError, ModelError, OptionError
from mobizo_cli.task import parse_layers

if TYPE_CHECKING:
    from torch import nn

    from mobizo_cli.options import BuildOptions

DEFAULT_RANK = 16
DEFAULT_MODULES = "q_proj,v_proj"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode that bears LoRA, and its fast tokenizer (a ``PreTrainedTokenizerFast``)."""

    model: nn.Module
    tokenizer: Any


def load(options: BuildOptions) -> Loaded:
    """Load the model in float32, with a new LoRA, or with the one of a PEFT directory.

    Raises:
        MissingPackageError: transformers or peft is not installed.
        ModelError: no such model, one that cannot be loaded, or one without the target modules.
        OptionError: LoRA options given along with a PEFT directory.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        raise MissingPackageError(error.name or "transformers", "hub") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = _adapter_config(Path(options.model))
    if config is None:
        base = options.model
    else:
        _refuse_lora_options(options)
        base = _base_of(options.model, config)
    model, tokenizer = _base_model(base), _tokenizer(options.model if config is None else base)
    if config is not None:
        bearing = _foreign(f"the adapter {options.model}", lambda: peft.PeftModel.from_pretrained(model, options.model))
    else:
        bearing = _new_lora(model, options)
    bearing = bearing.eval()
    for parameter in bearing.parameters():
        parameter.requires_grad_(False)
    return Loaded(bearing, tokenizer)


def _base_model(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = _foreign(f"the model {name}", lambda: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
    # A cache of keys and values would be one more output of every forward, and training has no use for it.
    model.config.use_cache = False
    return model


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _foreign(f"the tokenizer of {name}", lambda: AutoTokenizer.from_pretrained(name))
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name}: its tokenizer has no tokenizer.json form, which the driver needs. Use another model."
        )
    return tokenizer


def _new_lora(model: nn.Module, options: BuildOptions) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    rank = options.rank or DEFAULT_RANK
    modules = [name.strip() for name in (options.target_modules or DEFAULT_MODULES).split(",") if name.strip()]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if options.alpha is None else options.alpha,  # type: ignore[arg-type]
        target_modules=modules,
        layers_to_transform=None if options.layers is None else parse_layers(options.layers),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.init_seed)
    return _foreign(f"a LoRA on {', '.join(modules)}", lambda: get_peft_model(model, config))


def _adapter_config(directory: Path) -> dict[str, Any] | None:
    path = directory / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}). Give another directory.") from error
    return config if isinstance(config, dict) else {}


def _base_of(name: str, config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{name}: adapter_config.json has no `base_model_name_or_path`. Write the base model there.")
    return base


def _refuse_lora_options(options: BuildOptions) -> None:
    for name in ("rank", "alpha", "target_modules", "layers"):
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise OptionError(f"--{option}: {options.model} is a PEFT adapter and has its own. Leave the option out.")


def _foreign(what: str, action: Any) -> Any:
    """Call into transformers or PEFT, which raise many kinds of errors over a file or name that is not right."""
    try:
        return action()
    except Exception as error:
        raise ModelError(f"cannot load {what}: {error}") from error
