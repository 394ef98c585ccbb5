"""Adapter files: what PEFT would write for a model, key by key, asked of PEFT itself.

PEFT is handed a state dict whose tensors are numbers instead of weights, and saves it. What it writes then says which
key of which directory is which tensor of the model, under PEFT's own naming, whatever the kind of adapter.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobizo_passes.errors import InputError

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: The prefix of PEFT's own wrapper, without which its loader does not know a key.
_PREFIX = "base_model.model."
#: How PEFT names the factors of a layer, and of an embedding, as (lora_A, lora_B); an adapter's name may follow.
FACTOR_NAMES = (
    (r"lora_A(\.[^.]+)?(\.weight)?", r"lora_B(\.[^.]+)?(\.weight)?"),
    (r"lora_embedding_A(\.[^.]+)?", r"lora_embedding_B(\.[^.]+)?"),
)
#: Where tensors go that are trained beside a PEFT adapter, but are no part of it.
BESIDE = "beside_peft"


@dataclass(frozen=True)
class FileTensor:
    """A stored tensor: its key, and the FQN of the model's tensor whose values it has.

    With `dim` it has only the entries `index` of that dimension, as AdaLoRA stores the ranks that it kept.
    """

    key: str
    fqn: str
    dim: int | None = None
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterFile:
    """One directory: its path below the adapter's own ("" for itself), its configuration if it has one, its tensors."""

    directory: str
    config: Mapping[str, Any] | None
    tensors: tuple[FileTensor, ...]


def describe(file: AdapterFile) -> dict[str, Any]:
    """Return a file as plain JSON values, for the manifest."""
    tensors: list[dict[str, Any]] = []
    for each in file.tensors:
        part = {} if each.dim is None else {"dim": each.dim, "index": list(each.index)}
        tensors.append({"key": each.key, "fqn": each.fqn, **part})
    return {"directory": file.directory, "config": file.config, "tensors": tensors}


def adapter_files(model: nn.Module, trained: Sequence[str], factors: Iterable[str]) -> tuple[AdapterFile, ...]:
    """Return the files of a model's adapter, in which every trained tensor has a place.

    Args:
        model: with PEFT's adapter, around it or anywhere inside; or without.
        trained: FQNs of the tensors that training changes.
        factors: FQNs of all LoRA factors; what a model without PEFT stores, under these names.

    A tensor with several FQNs goes by that of `trained`. Raises `InputError` if PEFT can't save the model, or stores a
    trained tensor in a form that is neither it nor a selection of its rows or columns.
    """
    found = [(name, module) for name, module in peft_models(model)]
    names = _names(model, trained)
    files: list[AdapterFile] = []
    for prefix, module in found:
        directory = prefix.replace(".", "/") if len(found) > 1 else ""
        for one in _asked(module):
            tensors = tuple(_renamed(t, f"{prefix}.{t.fqn}" if prefix else t.fqn, names) for t in one.tensors)
            path = "/".join(filter(None, (directory, one.directory)))
            files.append(AdapterFile(path, one.config, tensors))
    stored = {t.fqn for f in files for t in f.tensors}
    rest = [fqn for fqn in dict.fromkeys([*trained, *factors]) if fqn not in stored]
    if not files:
        # A tensor that has two names is stored once: the model ties them itself.
        rest = list(dict.fromkeys(names.get(fqn, fqn) for fqn in rest))
        return (AdapterFile("", None, tuple(FileTensor(fqn, fqn) for fqn in rest)),)
    lost = [fqn for fqn in rest if fqn in trained]
    if lost:
        files.append(AdapterFile(BESIDE, None, tuple(FileTensor(fqn, fqn) for fqn in lost)))
    return tuple(files)


def tensors_of(model: nn.Module, files: Iterable[AdapterFile]) -> dict[str, Tensor]:
    """Return the tensors that the files store, by FQN (not copied)."""
    state = _state(model)
    return {t.fqn: state[t.fqn].detach() for f in files for t in f.tensors}


def peft_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the outermost modules that hold PEFT's adapters, with their FQNs ("" for the model itself)."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not any(not outer or name.startswith(f"{outer}.") for outer, _ in found) and _adapters(module):
            found.append((name, module))
    return found


def _adapters(module: Any) -> Mapping[str, Any]:
    """The configurations by adapter name; empty for a module that only holds another one that has them."""
    # PEFT's wrapper has a property, what is in it an attribute; other wrappers answer for what they hold.
    wrapper = isinstance(inspect.getattr_static(type(module), "peft_config", None), property)
    configs = module.peft_config if wrapper or "peft_config" in vars(module) else None
    return configs if isinstance(configs, dict) else {}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers themselves, by each of their names."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _names(model: nn.Module, trained: Sequence[str]) -> dict[str, str]:
    """The name that each FQN's tensor goes by: the trained one's, or else the first."""
    state = _state(model)
    first: dict[int, str] = {}
    for name in [*(n for n in trained if n in state), *state]:
        first.setdefault(id(state[name]), name)
    return {name: first[id(value)] for name, value in state.items()}


def _renamed(tensor: FileTensor, fqn: str, names: Mapping[str, str]) -> FileTensor:
    return FileTensor(tensor.key, names.get(fqn, fqn), tensor.dim, tensor.index)


# Asking PEFT ---------------------------------------------------------------------------------------------------------


def _asked(model: nn.Module) -> list[AdapterFile]:
    held: Any = model
    state, save = _state(model), _saver(model)
    failure: Exception | None = None
    # PEFT may compute with the values as it saves; then it gets tensors of their own shapes.
    for kind in (_Numbers, _Elements):
        try:
            numbers = kind(state, held.peft_config)
            with _unchanged(model), _quietly(), _prompts(model, numbers.tensors):
                return _read(save, numbers)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  whatever PEFT says is about this model
            failure = error
    if isinstance(failure, _OtherForm):
        raise InputError(
            f"PEFT stores '{failure}' in a form that is no selection of one stored tensor, so a trained value could "
            "not be written there; merge or remove that adapter first"
        ) from failure
    raise InputError(
        f"PEFT can't save this model's adapter, so a trained one could not be saved either "
        f"({type(failure).__name__}: {failure})"
    ) from failure


Saver = Callable[[Path, dict[str, Tensor]], None]


def _saver(model: nn.Module) -> Saver:
    """How this model is saved: by its own `save_pretrained`, if that writes adapters; else as PEFT's wrapper would."""
    kind: Any = model
    own = inspect.getattr_static(type(model), "save_pretrained", None) is not None
    if own and (hasattr(type(model), "create_or_update_model_card") or getattr(model, "_hf_peft_config_loaded", False)):
        # state_dict() may hold the same tensor twice; numbers do not share memory, so each key stays.
        return lambda path, numbers: kind.save_pretrained(path, state_dict=numbers)

    # Below PEFT's own wrapper are the tuner and, in it, the model.
    tuner = hasattr(type(model), "_get_adapter_state_dict")
    wrapper = isinstance(inspect.getattr_static(type(model), "peft_config", None), property)
    prefix = "" if wrapper else "base_model." if tuner else _PREFIX

    def injected(path: Path, numbers: dict[str, Tensor]) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        for name, config in kind.peft_config.items():
            tensors = get_peft_model_state_dict(kind, state_dict=dict(numbers), adapter_name=name)
            directory = path / name if name != "default" else path
            directory.mkdir(exist_ok=True)
            save_file({f"{prefix}{key}": value.contiguous() for key, value in tensors.items()}, directory / _WEIGHTS)
            config.inference_mode = True
            config.save_pretrained(str(directory))

    return injected


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what saving changes in the model's configurations."""
    held: Any = model
    base = getattr(held, "config", None)
    configs = [*held.peft_config.values(), *([base] if hasattr(base, "__dict__") else [])]
    before = [copy.copy(vars(config)) for config in configs]
    try:
        yield
    finally:
        for config, values in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(values)


@contextlib.contextmanager
def _prompts(model: nn.Module, numbers: Mapping[str, Tensor]) -> Iterator[None]:
    """Put numbers into the tables of virtual tokens: PEFT saves what it looks up in them, not what is handed to it."""
    encoder = getattr(model, "prompt_encoder", None)
    modules = [] if encoder is None else list(encoder.named_modules())
    tables = [(name, module) for name, module in modules if isinstance(module, nn.Embedding)]
    if any(list(module.parameters(False)) for _, module in modules if not isinstance(module, nn.Embedding)):
        raise InputError(
            "PEFT stores what a network makes of the virtual tokens, not the tokens, so trained ones could not be "
            "written; train the tokens themselves: PromptTuningConfig, or PrefixTuningConfig(prefix_projection=False)"
        )
    before = {name: table._parameters["weight"] for name, table in tables}
    try:
        for name, table in tables:
            table._parameters["weight"] = numbers[f"prompt_encoder.{name}.weight"]  # type: ignore[assignment]
        yield
    finally:
        for name, table in tables:
            table._parameters["weight"] = before[name]


# What is saved beside the factors, and why: it is in the files either way.
_KNOWN = ("`save_embedding_layers`", "Could not find a config file in")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar, and of PEFT's warnings those alone that are not about what is saved."""
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        yield
    for each in said:
        if not any(known in str(each.message) for known in _KNOWN):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


class _OtherForm(Exception):
    """PEFT wrote something for this key that is no tensor of the model."""


class _Numbers:
    """Every tensor is its number, int64 [1]: PEFT writes a few bytes a tensor, however large the model is."""

    def __init__(self, state: Mapping[str, Tensor], adapters: Iterable[str]) -> None:
        del adapters
        self._fqns = list(state)
        self.tensors = {fqn: torch.tensor([i]) for i, fqn in enumerate(self._fqns)}

    def source(self, key: str, value: Tensor) -> FileTensor:
        if value.dtype is not torch.int64 or value.shape != (1,):
            raise _OtherForm(key)
        return FileTensor(key, self._fqns[int(value)])


class _Elements:
    """Every element is its number, in tensors of the model's own shapes; for what PEFT cuts to size as it saves."""

    def __init__(self, state: Mapping[str, Tensor], adapters: Iterable[str]) -> None:
        names = set(adapters)
        self._starts: list[tuple[int, str]] = []
        self.tensors: dict[str, Tensor] = {}
        start = 0
        for fqn, value in state.items():
            self._starts.append((start, fqn))
            # What belongs to no adapter is stored whole, if at all; it may be large.
            single = torch.tensor(start).expand(value.shape)
            named = not names.isdisjoint(fqn.split("."))
            self.tensors[fqn] = torch.arange(start, start + value.numel()).view(value.shape) if named else single
            start += max(value.numel(), 1)

    def source(self, key: str, value: Tensor) -> FileTensor:
        if value.dtype is not torch.int64 or not value.numel():
            raise _OtherForm(key)
        first = int(value.flatten()[0])
        start, fqn = max(each for each in self._starts if each[0] <= first)
        whole = self.tensors[fqn]
        if torch.equal(value, whole):
            return FileTensor(key, fqn)
        if value.dim() == whole.dim():
            for dim in range(whole.dim()):
                # Along this dimension, at the start of the others.
                line = (value - start).movedim(dim, 0).reshape(value.shape[dim], -1)[:, 0] // whole.stride(dim)
                index = line % whole.shape[dim]
                if torch.equal(whole.index_select(dim, index), value):
                    return FileTensor(key, fqn, dim, tuple(index.tolist()))
        raise _OtherForm(key)


def _read(save: Saver, numbers: _Numbers | _Elements) -> list[AdapterFile]:
    """Let PEFT save the numbers, and read what it wrote."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="mobizo-adapter-") as temporary:
        root = Path(temporary)
        save(root, numbers.tensors)
        files = []
        for path in sorted(root.rglob(_WEIGHTS)):
            config = json.loads((path.parent / _CONFIG).read_text(encoding="utf-8"))
            relative = path.parent.relative_to(root).as_posix()
            tensors = [numbers.source(key, value) for key, value in sorted(load_file(path).items())]
            files.append(AdapterFile("" if relative == "." else relative, config, tuple(tensors)))
        if not files:
            raise InputError("PEFT wrote no adapter for this model")
        return files
