"""Adapters as values: checking, hashing, and PEFT directories on disk, written so that no reader sees half of one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_driver.adapter_config import CONFIG_FILE, check_config
from runtime_driver.errors import AdapterError
from runtime_driver.format.files import check_path, open_regular
from runtime_driver.format.temporary import remove_leftovers, replace_with, temporary

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.format import AdapterFile, AdapterTensor, FileTensor, Manifest

WEIGHTS_FILE = "adapter_model.safetensors"
#: Metadata of an adapter file that we wrote; PEFT does not read it, and its own files have none.
_HASH = "mobizo_sha256"


def checked_adapter(specs: Sequence[AdapterTensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies of the tensors, in the order of ``specs``.

    Raises:
        AdapterError: a tensor is missing, unknown, of another dtype or shape, or not finite.
    """
    import torch

    known = {spec.fqn for spec in specs}
    for fqn in adapter:
        if fqn not in known:
            raise AdapterError(f"Adapter tensor `{fqn}` is not one of the program's {len(known)}. Remove it.")
    result: dict[str, Tensor] = {}
    for spec in specs:
        tensor = adapter.get(spec.fqn)
        if not isinstance(tensor, torch.Tensor):
            raise AdapterError(f"Adapter tensor `{spec.fqn}` is missing. Give all {len(known)} tensors.")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise AdapterError(
                f"Adapter tensor `{spec.fqn}`: expected {spec.dtype}{list(spec.shape)}, "
                f"found {dtype}{list(tensor.shape)}. Use an adapter of this program's model, rank and target modules."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"Adapter tensor `{spec.fqn}` holds NaN or infinity. Use an earlier adapter.")
        result[spec.fqn] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return result


def adapter_sha256(adapter: Mapping[str, Tensor]) -> str:
    """A hash over names, dtypes, shapes and bytes, sorted by name."""
    import torch

    digest = hashlib.sha256()
    for fqn in sorted(adapter):
        tensor = adapter[fqn].detach().contiguous()
        digest.update(f"{fqn}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        # As bytes first: numpy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name and move it into place.

    Raises:
        AdapterError: the file system refuses.
    """
    from safetensors.torch import save

    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # The format has no two names for one memory.
        shared = tensor.untyped_storage().data_ptr() in seen
        separate[name] = tensor.clone() if shared else tensor.contiguous()
        seen.add(separate[name].untyped_storage().data_ptr())
    replace_file(path, _in_order(save(separate, metadata=dict(metadata))))


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted, which `save` writes in another order each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = dict(sorted(header.pop("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def replace_file(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``: at every moment it is the old file or the new one. Raises :class:`AdapterError`."""
    try:
        replace_with(path, data)
    except OSError as error:
        raise AdapterError(
            f"{path}: cannot be written ({error.strerror}). Check the directory and the disk."
        ) from error


def save_adapter(directory: Path, files: Sequence[AdapterFile], adapter: Mapping[str, Tensor]) -> None:
    """Write trainable and frozen tensors, by FQN, as PEFT would: the directories, keys and configurations it would.

    A new directory appears whole, by one rename. In an existing one each file is replaced whole, the configuration
    first. A model without PEFT gets the weights alone, under its own FQNs.

    Raises:
        AdapterError: ``directory`` is a file, or the file system refuses.
    """
    _require_name(directory)
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory}: is a file. Give the name of a directory.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        remove_adapter_leftovers(directory)
        if directory.is_dir():
            _write_files(directory, files, adapter)
            return
        with temporary(directory, directory=True) as staging:
            _write_files(staging, files, adapter)
            for path in (staging, *(p for p in staging.rglob("*") if p.is_dir())):
                path.chmod(0o755)
            staging.rename(directory)
    except OSError as error:
        raise AdapterError(f"{directory}: cannot be written ({error.strerror}). Check the path.") from error


def _require_name(path: Path) -> None:
    try:
        check_path(path)
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror}. Give another name.") from error


def remove_adapter_leftovers(directory: Path) -> None:
    """Remove what killed processes left of their writes to an adapter directory."""
    remove_leftovers(directory)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        remove_leftovers(directory / name)


def _write_files(directory: Path, files: Sequence[AdapterFile], adapter: Mapping[str, Tensor]) -> None:
    for file in files:
        path = directory / file.directory
        path.mkdir(parents=True, exist_ok=True)
        remove_adapter_leftovers(path)
        if file.config is not None:
            replace_file(path / CONFIG_FILE, json.dumps(file.config, indent=2, sort_keys=True).encode())
        tensors = {tensor.key: _stored(tensor, adapter) for tensor in file.tensors}
        write_tensors(path / WEIGHTS_FILE, tensors, {"format": "pt", _HASH: adapter_sha256(tensors)})


def _stored(tensor: FileTensor, adapter: Mapping[str, Tensor]) -> Tensor:
    """What is stored under a key: a tensor of the adapter, or some entries of one of its dimensions."""
    import torch

    value = adapter[tensor.fqn]
    return value if tensor.dim is None else value.index_select(tensor.dim, torch.tensor(tensor.index, dtype=torch.long))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        AdapterError: missing, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # A pipe or a device would be waited for.
        os.close(open_regular(path))
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read as safetensors ({error}). Check the path.") from error


def load_adapter(
    directory: Path, manifest: Manifest, initial: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The trainable tensors of a directory that :func:`save_adapter` wrote, or PEFT for the same model, by FQN.

    The frozen tensors are part of the compiled program, so those in the directory must equal them bit for bit.
    Directories of adapters that are not trained may be absent. ``initial``: the trainable tensors of the program.

    Raises:
        AdapterError: unreadable; another rank or scaling than the program's; missing, unknown or unfit tensors; other
            frozen tensors than the program's.
    """
    import torch

    _require_name(directory)
    if not directory.is_dir():
        raise AdapterError(f"{directory}: no such directory. Give a PEFT adapter directory.")
    trainable = {spec.fqn for spec in manifest.trainable_adapter}
    wanted = [file for file in manifest.files if any(tensor.fqn in trainable for tensor in file.tensors)]
    found: dict[str, Tensor] = {}
    for file in manifest.files:
        path = directory / file.directory
        if not (path / WEIGHTS_FILE).exists():
            if file not in wanted:
                continue
            if wanted == [file] and (directory / WEIGHTS_FILE).exists():
                # The directory of the one named adapter itself, as PEFT takes it.
                path = directory
        tensors = _file_tensors(path, file)
        for tensor in file.tensors:
            spec = next(each for each in manifest.adapter if each.fqn == tensor.fqn)
            value = tensors[tensor.key]
            expected = _stored(tensor, {**initial, **frozen})
            if value.dtype != expected.dtype or value.shape != expected.shape:
                raise AdapterError(
                    f"{path}: `{tensor.key}`: expected {_kind(expected)}, found {_kind(value)}. "
                    "Use an adapter of this program's model, rank and target modules."
                )
            if not spec.trainable:
                if not _same_bits(value, expected):
                    raise AdapterError(
                        f"{path}: `{tensor.key}` differs from the frozen tensor that the program was compiled with. "
                        "Lower the model with this adapter loaded, then train that program."
                    )
            elif tensor.dim is not None:
                index = torch.tensor(tensor.index, dtype=torch.long)
                found[tensor.fqn] = found.get(tensor.fqn, initial[tensor.fqn]).index_copy(tensor.dim, index, value)
            elif not _same_bits(found.setdefault(tensor.fqn, value), value):
                raise AdapterError(
                    f"{path}: `{tensor.key}` and another key hold different values of `{tensor.fqn}`, which is one "
                    "tensor in the program. Use an adapter in which they are equal."
                )
    return checked_adapter(manifest.trainable_adapter, found)


def _file_tensors(path: Path, file: AdapterFile) -> dict[str, Tensor]:
    """The tensors of one file, which has the expected keys and no others."""
    tensors, metadata = read_tensors(path / WEIGHTS_FILE)
    stated = metadata.get(_HASH)
    if stated is not None and stated != adapter_sha256(tensors):
        raise AdapterError(
            f"{path / WEIGHTS_FILE}: damaged: its tensors are not those that it has the hash of. Copy it again."
        )
    keys = {tensor.key for tensor in file.tensors}
    for key in tensors:
        if key not in keys:
            raise AdapterError(f"{path}: tensor `{key}` is not part of the program. Use an adapter of this model.")
    for tensor in file.tensors:
        if tensor.key not in tensors:
            raise AdapterError(f"{path}: tensor `{tensor.key}` is missing. Use an adapter of this model.")
    check_config(path, file.config)
    return tensors


def _same_bits(left: Tensor, right: Tensor) -> bool:
    import torch

    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)))


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
