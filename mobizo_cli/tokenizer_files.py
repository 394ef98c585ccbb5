"""The tokenizer's files beside a program: whether they are the program's, and how they get there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mobizo_cli.errors import ModelError, OptionError
from mobizo_cli.text import TOKENIZER_FILE

#: What transformers writes for a tokenizer.
_OURS = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|vocab)\.json|merges\.txt|vocab\.txt|"
    r"(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates(/[^/]+\.jinja)?"
)


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of each file, by its path in the directory. Raises OSError."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_place(directory: Path) -> None:
    """Check that a tokenizer may be written there, in the place of another one.

    Raises:
        OptionError: the name is taken by something else, or by a directory with other files in it.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise OptionError(f"{directory} is not a directory; it will not be replaced. Move it away or use another name.")
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        if path.is_symlink() or not _OURS.fullmatch(name) or path.is_dir() != (name == "additional_chat_templates"):
            raise OptionError(
                f"{path} is not a file of a tokenizer, so {directory} will not be replaced. "
                "Move it away or use another name."
            )


@contextmanager
def placed(staged: Path, directory: Path, aside: Path) -> Iterator[None]:
    """Have the tokenizer of ``staged`` beside the program while the block puts the program into place.

    Where another tokenizer has the name, the new one gets a name made from its hash until the program is there; readers
    find it by that, so that the old program or the new one is whole at every moment. If the block fails, what was there
    is as it was. ``aside`` is a directory of the same file system, for what is replaced.
    """
    from runtime_driver.format import content_name

    check_place(directory)
    files = hashes(staged)
    place = directory
    if directory.exists() and hashes(directory) != files:
        place = directory.with_name(content_name(directory.name, _digest(files)))
        if place.exists() and hashes(place) != files:
            raise OptionError(f"{place} is in the way. Move it away or use another name.")
    is_new = not place.exists()
    if is_new:
        staged.replace(place)
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(place)
        raise
    if place != directory:
        directory.replace(aside / "old tokenizer")
        place.replace(directory)
    _remove_left_behind(directory)


def _remove_left_behind(directory: Path) -> None:
    """Tokenizers that a killed writer had named by their hash, which proves that they are ours."""
    pattern = re.compile(rf"{re.escape(directory.stem)}\.([0-9a-f]{{16}}){re.escape(directory.suffix)}")
    for path in list(directory.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if found and path.is_dir() and not path.is_symlink() and _digest(hashes(path)).startswith(found[1]):
            shutil.rmtree(path)


def find(program: Path, name: str, expected: Mapping[str, str]) -> Path:
    """The tokenizer's directory beside a program.

    Raises:
        ModelError: it is a link that leads out of the program's directory.
    """
    from runtime_driver.format import content_name

    own = program.parent / name
    named = own.with_name(content_name(name, _digest(expected)))
    directory = named if expected and named.is_dir() else own
    if not directory.resolve().is_relative_to(program.parent.resolve()):
        raise ModelError(f"{directory}: leads out of the program's directory. Put the tokenizer's files there.")
    return directory


def check(directory: Path, expected: Mapping[str, str]) -> None:
    """Check the files that are there against the manifest's hashes, before the library reads them.

    Only tokenizer.json is used, and whoever loads it says that it is absent.

    Raises:
        ModelError: a file is another one than the one that was written with the program.
    """
    for name, sha256 in expected.items():
        path = directory / name
        if not path.is_file():
            continue
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            if name == TOKENIZER_FILE and b'"model"' not in data:
                raise ModelError(f"{path}: not a tokenizer. Copy the directory that `lower` wrote.")
            raise ModelError(
                f"{directory}: not the tokenizer that the program was lowered with: {name} is another one. "
                "Copy the directory that `lower` wrote."
            )


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
