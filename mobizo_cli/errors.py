"""Errors of the command line, and the one place where errors of ours become one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Where each package's base error is. Looked up, never imported: a module that is not loaded has raised nothing.
_BASES = (
    ("mobizo_cli.errors", "CliError"),
    ("runtime_driver.format.errors", "ManifestError"),
    ("runtime_driver.errors", "DriverError"),
    ("mobizo_passes.errors", "MobizoError"),
    ("lowering.errors", "LoweringError"),
)


#: A message with a graph in it would fill the screen.
_LONGEST = 800


class CliError(Exception):
    """Base of the command line's own errors."""


class OptionError(CliError):
    """An option's value that cannot be used."""


class DataError(CliError):
    """A data file that cannot be used; names the file, and the row where one is to blame."""


class ModelError(CliError):
    """A model or tokenizer that cannot be loaded or does not fit the task."""


class MissingPackageError(CliError):
    """A library that this command needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This command needs the package `{package}`: install it with `pip install 'mobizo[{extra}]'`."
        )


@contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Within, a module that can't be found is a `MissingPackageError`; `package` where the error does not name it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or package, extra) from error


class TrainingStopped(CliError):
    """A run that gave NaN or infinity; what was kept of it comes first, then the reason."""

    def __init__(self, reason: Exception, kept: str) -> None:
        super().__init__(f"{kept} {reason}")


def is_expected(error: BaseException) -> bool:
    """Whether an error is one of ours or the system's, to be shown as a line rather than as a traceback."""
    kinds = [getattr(sys.modules[name], base) for name, base in _BASES if name in sys.modules]
    return isinstance(error, (*kinds, OSError, MemoryError)) or _is_out_of_memory(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's allocator raises a plain RuntimeError."""
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def one_line(error: BaseException | str) -> str:
    """The message without line breaks and control characters, which may come from a file's name or content."""
    if isinstance(error, BaseException) and (isinstance(error, MemoryError) or _is_out_of_memory(error)):
        return "not enough memory; make --batch, --max-length, --queries or --rank smaller"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}"
    else:
        text = str(error)
    text = printable(text) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... (all of it with `mobizo --debug`)"


def printable(text: str) -> str:
    """Text in one line, with what a terminal would obey written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def note(text: str) -> None:
    """Tell the user, on stderr, what is no error."""
    print(f"mobizo: note: {printable(text)}", file=sys.stderr)
