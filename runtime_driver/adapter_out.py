"""Proves, before hours of training, that an adapter can be written where it is to go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_driver.adapter_io import CONFIG_FILE, WEIGHTS_FILE, remove_adapter_leftovers
from runtime_driver.errors import AdapterError
from runtime_driver.format.files import check_path
from runtime_driver.format.temporary import remove_leftovers, replace_with, temporary

if TYPE_CHECKING:
    from torch import Tensor


def check_writable(directory: Path, adapter: Mapping[str, Tensor]) -> None:
    """Write as much as ``adapter`` takes where it would go, and remove it again; parents that are absent stay so.

    Removes what killed processes left of earlier writes to ``directory``.

    Raises:
        AdapterError: ``directory`` is a file, its files are directories, or the file system refuses.
    """
    try:
        check_path(directory)
        if directory.exists() and not directory.is_dir():
            raise AdapterError(f"{directory}: is a file. Give the name of a directory.")
        remove_adapter_leftovers(directory)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            if (directory / name).is_dir():
                raise AdapterError(f"{directory / name}: is a directory, where a file is to be. Give another name.")
        size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())
        place = next(each for each in (directory, *directory.absolute().parents) if each.exists() or each.is_symlink())
        target = place / (directory.name or "adapter")
        remove_leftovers(target)
        # In a directory of our own: nothing else is there that could be replaced.
        with temporary(target, directory=True) as proof:
            replace_with(proof / WEIGHTS_FILE, bytes(size))
    except OSError as error:
        raise AdapterError(f"{directory}: cannot be written ({error.strerror}). Check the path.") from error
