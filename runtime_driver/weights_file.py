"""Finds the file with a program's weights, and makes sure that it is the right one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mobizo_manifest import WeightsFileSpec
from runtime_driver.errors import WeightsFileError

_COPY = "Copy the .ptd that the program was lowered with here, or name it (weights_file=, --weights-file)."


def find_weights(program: Path, spec: WeightsFileSpec, given: Path | None) -> Path:
    """The weights file of ``program``: the one given, else the one beside it; read once to check its hash.

    The runtime maps the file: one that is too short would end the process at the first touch of a missing page, and
    one with other weights would train on them.

    Raises:
        WeightsFileError: missing, unreadable, or not the file that the program was lowered with.
    """
    path = given or (program.with_name(spec.file) if spec.file else program.with_suffix(".ptd"))
    try:
        size = path.stat().st_size
        if path.is_file() and size != spec.bytes:
            raise WeightsFileError(path, f"expected {spec.bytes} bytes, found {size}", _COPY)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise WeightsFileError(path, f"no such file, and {program} keeps its weights in it", _COPY) from error
    except OSError as error:
        raise WeightsFileError(path, f"cannot be read ({error.strerror})", _COPY) from error
    if found != spec.sha256:
        raise WeightsFileError(path, f"expected SHA-256 {spec.sha256}, found {found}", _COPY)
    return path
