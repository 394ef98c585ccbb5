"""Finds the file with a program's weights, and makes sure that it is the right one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from runtime_driver.container import Identity
from runtime_driver.errors import WeightsFileError
from runtime_driver.format import WeightsFileSpec, content_name
from runtime_driver.format.files import open_regular

_COPY = "Copy the .ptd that the program was lowered with here, or name it (weights_file=, --weights-file)."


@dataclass(frozen=True)
class Weights:
    """A weights file that was found and checked."""

    path: Path
    identity: Identity

    def require_unchanged(self) -> None:
        """Raise :class:`WeightsFileError` if the path leads to another file by now, or to other bytes."""
        if not self.identity.is_that_of(self.path):
            raise WeightsFileError(
                self.path, "replaced or changed since it was checked", "Open the program again in a new session."
            )


def find_weights(program: Path, spec: WeightsFileSpec, given: Path | None, *, verify: bool = True) -> Weights:
    """The weights file of ``program``: the one given, else the one beside it; read once to check its hash.

    The runtime maps the file: one that is too short would end the process at the first touch of a missing page, and
    one with other weights would train on them. Without ``verify`` only the size is checked.

    Raises:
        WeightsFileError: missing, unreadable, or not the file that the program was lowered with.
    """
    path = given or (program.with_name(spec.file) if spec.file else _own(program, spec))
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            identity = Identity.of(os.fstat(file.fileno()))
            if identity.size != spec.bytes:
                raise WeightsFileError(path, f"expected {spec.bytes} bytes, found {identity.size}", _COPY)
            found = hashlib.file_digest(file, "sha256").hexdigest() if verify else spec.sha256
    except FileNotFoundError as error:
        raise WeightsFileError(path, f"no such file, and {program} keeps its weights in it", _COPY) from error
    except OSError as error:
        raise WeightsFileError(path, f"cannot be read ({error.strerror})", _COPY) from error
    if found != spec.sha256:
        raise WeightsFileError(path, f"expected SHA-256 {spec.sha256}, found {found}", _COPY)
    return Weights(path, identity)


def _own(program: Path, spec: WeightsFileSpec) -> Path:
    """A save that was killed may have left the program's own file under the name made from its hash."""
    path = program.with_suffix(".ptd")
    named = path.with_name(content_name(path.name, spec.sha256))
    return named if named.is_file() else path
