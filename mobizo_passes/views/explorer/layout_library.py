"""The layout library of the explorer, dagre: pinned, taken from the npm registry when the package is built.

It is not in the repository; a wheel has it, with its license. In a source checkout `make install` fetches it; later,
``python -m mobizo_passes.views.explorer.layout_library`` does. This file imports nothing but the standard library: the
build runs it before there is a torch.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@dagrejs/dagre@3.1.3"
# What the registry's entry of this version says under dist.integrity.
INTEGRITY = "sha512-X4aUTwOReZvthaZWOVHqlJ52/ZdhZFEM4+Lh/uR4XooUSLE6p71bcy7MPGzYnNUcNh+nj+i/qJQpCMIdQnSmrg=="
FOLDER = Path(__file__).parent / "vendor"
# Where the files stand in the package, and their names here.
FILES = {"package/dist/dagre.min.js": "dagre.min.js", "package/LICENSE": "dagre.LICENSE"}
_STAMP = "dagre.version"


class LibraryUnavailable(Exception):
    """The layout library is missing, could not be fetched, or is not the one that is expected."""


def library() -> Path:
    """Return the library's file; raises `LibraryUnavailable`, which says how to get it, if it is not here."""
    path = FOLDER / "dagre.min.js"
    if not _present():
        raise LibraryUnavailable(
            f"an .html drawing needs the layout library {PACKAGE}, which was not fetched when this package was built; "
            "run `python -m mobizo_passes.views.explorer.layout_library` (it needs npm), or draw an .svg"
        )
    return path


def fetch() -> bool:
    """Fetch the library if it is not here; returns whether it was fetched. Raises `LibraryUnavailable`."""
    if _present():
        return False
    npm = shutil.which("npm")
    if npm is None:
        raise LibraryUnavailable(f"{PACKAGE} is fetched with npm, which is not on the PATH; install Node.js")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--pack-destination", folder, PACKAGE]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("*.tgz"))
        if done.returncode or not found:
            raise LibraryUnavailable(f"`npm pack {PACKAGE}` failed: {done.stderr.strip() or done.stdout.strip()}")
        _unpack(found[0])
    return True


def _unpack(archive: Path) -> None:
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != INTEGRITY:
        raise LibraryUnavailable(f"{PACKAGE} from the registry has the hash {digest}, expected {INTEGRITY}")
    FOLDER.mkdir(exist_ok=True)
    with tarfile.open(archive) as package:
        for name, here in FILES.items():
            member = package.extractfile(name)
            if member is None:
                raise LibraryUnavailable(f"{PACKAGE} has no file {name}")
            (FOLDER / here).write_bytes(member.read())
    (FOLDER / _STAMP).write_text(PACKAGE)


def _present() -> bool:
    stamp = FOLDER / _STAMP
    return (
        stamp.is_file() and stamp.read_text() == PACKAGE and all((FOLDER / name).is_file() for name in FILES.values())
    )


if __name__ == "__main__":
    print(f"{PACKAGE} {'fetched' if fetch() else 'is there already'}")
