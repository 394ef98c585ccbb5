"""Loads a model and its tokenizer from transformers, and puts a LoRA on it with PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobizo_cli.adapter import adapter_directory, base_of, load_adapter, read_config, some
from mobizo_cli.errors import CliError, MissingPackageError, ModelError, OptionError
from mobizo_cli.task import check_text, parse_layers

if TYPE_CHECKING:
    from torch import nn

    from mobizo_cli.options import BuildOptions

DEFAULT_RANK = 16
DEFAULT_MODULES = "q_proj,v_proj"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with an adapter of PEFT's ``kind``, and its ``PreTrainedTokenizerFast``."""

    model: nn.Module
    tokenizer: Any
    kind: str


def load(options: BuildOptions) -> Loaded:
    """Load the model in float32, with a new LoRA, or with the one of a PEFT directory.

    Raises:
        MissingPackageError: transformers or peft is not installed.
        ModelError: no such model, one that cannot be loaded, or one without the target modules.
        OptionError: LoRA options given along with a PEFT directory.
    """
    try:
        import peft  # noqa: F401
        import transformers
    except ImportError as error:
        raise MissingPackageError(error.name or "transformers", "hub") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_text("MODEL", options.model)
    if not options.model.strip():
        raise OptionError("MODEL is empty: give a model's hub name or directory.")
    if Path(options.model).is_file():
        raise OptionError(f"{options.model} is a file: give a model's hub name or directory.")
    directory = adapter_directory(options.model)
    if directory is None:
        model = _base_model(options.model, options)
        return _loaded(_new_lora(model, options), _tokenizer(options.model))
    config = read_config(directory)
    _refuse_lora_options(options)
    base = base_of(directory, config)
    model = _base_model(base, options)
    adapted = _foreign(f"the adapter {directory}", lambda: load_adapter(model, directory))
    return _loaded(adapted, _tokenizer(base), str(config["peft_type"]))


def _loaded(adapted: nn.Module, tokenizer: Any, kind: str = "LORA") -> Loaded:
    # What PEFT marks as trainable stays marked: it is what --trainable requires_grad names.
    return Loaded(adapted.eval(), tokenizer, kind)


def _base_model(name: str, options: BuildOptions) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # transformers fills what a checkpoint lacks with random values.
    torch.manual_seed(options.init_seed)
    # Mismatches too are judged here: transformers' own error refers to a report on a log that is switched off.
    how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _foreign(f"the model {name}", lambda: AutoModelForCausalLM.from_pretrained(name, **how))
    _check_weights(name, type(model).__name__, info, options)
    # A cache of keys and values would be one more output of every forward, and training has no use for it.
    model.config.use_cache = False
    return model


def _check_weights(name: str, kind: str, info: Mapping[str, Any], options: BuildOptions) -> None:
    """Every weight of the model is in its files, and every weight of the files in the model, but for those named.

    Tied weights that are in the files once are complete: transformers doesn't count them.
    """
    shapes = {key: f"{list(stored)} instead of {list(own)}" for key, stored, own in info["mismatched_keys"]}
    new, unused = _names(options.new_weights), _names(options.unused_weights)
    random = sorted({*info["missing_keys"], *shapes})
    extra = sorted(info["unexpected_keys"])
    problems: list[str] = []
    if unnamed := [key for key in random if not _covers(new, key)]:
        listed = some(f"{key} ({shapes[key]})" if key in shapes else key for key in unnamed)
        problems.append(f"weights of {kind} are absent or of another shape ({len(unnamed)}): {listed}")
    if unnamed := [key for key in extra if not _covers(unused, key)]:
        problems.append(f"there are weights that {kind} has no place for ({len(unnamed)}): {some(unnamed)}")
    if info["error_msgs"]:
        problems.append("; ".join(info["error_msgs"]))
    if problems:
        raise ModelError(
            f"cannot load the model {name}: in its files {'; '.join(problems)}. Give a whole checkpoint of this "
            "architecture, or name what is meant to be so: --new-weights for random ones, --unused-weights."
        )
    for option, names, keys in (("new", new, random), ("unused", unused, extra)):
        for each in names:
            if not any(_covers([each], key) for key in keys):
                raise OptionError(f"--{option}-weights {each}: no such weight; there are {some(keys) or 'none'}.")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _covers(names: list[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


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
    widest = max((size for parameter in model.parameters() for size in parameter.shape), default=0)
    if rank > widest:
        raise OptionError(f"--rank {rank}: no layer of the model has more than {widest} features.")
    modules = _names(DEFAULT_MODULES if options.target_modules is None else options.target_modules)
    layers = None if options.layers is None else parse_layers(options.layers)
    _check_layers(model, layers or [])
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if options.alpha is None else options.alpha,  # type: ignore[arg-type]
        target_modules=modules,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.init_seed)
    adapted = _foreign(f"a LoRA on {', '.join(modules)}", lambda: get_peft_model(model, config))
    _check_taken(adapted, modules, layers or [])
    return adapted


def _check_layers(model: Any, layers: list[int]) -> None:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if count is not None and (beyond := [str(layer) for layer in layers if layer >= count]):
        raise OptionError(f"--layers: the model has layers 0 to {count - 1}; there can be no LoRA in {some(beyond)}.")


def _check_taken(adapted: Any, modules: list[str], layers: list[int]) -> None:
    """PEFT is content with one match; the user named each."""
    taken = set(adapted.targeted_module_names)
    for module in modules:
        if not any(name == module or name.endswith(f".{module}") for name in taken):
            raise OptionError(f"--target-modules: no LoRA on {module!r}; taken are {some(taken)}.")
    found = {int(part) for name in taken for part in name.split(".") if part.isdecimal()}
    if beyond := [str(layer) for layer in layers if layer not in found]:
        raise OptionError(
            f"--layers: no LoRA in {some(beyond)}; of the layers named, {some(map(str, found))} have one."
        )


def _refuse_lora_options(options: BuildOptions) -> None:
    for name in ("rank", "alpha", "target_modules", "layers"):
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise OptionError(f"--{option}: {options.model} is a PEFT adapter and has its own. Leave the option out.")


def _foreign(what: str, action: Any) -> Any:
    """Call into transformers or PEFT, which raise many kinds of errors over a file or name that is not right."""
    try:
        return action()
    except CliError:
        raise
    except BaseException as error:
        # A panic in Rust code, of the tokenizers or safetensors, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"cannot load {what}: {str(error) or type(error).__name__}") from error
