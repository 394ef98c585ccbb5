"""The journal of a run: one line per step, appended, enough to replay the run without the model.

Durability: a record is written with one ``write`` call and, by default, followed by ``fsync``, before the session takes
the new adapter. Whatever kills the process, the file is a sequence of whole lines plus at most one torn line at its
end, which the next writer cuts off. Any other damage is an error with its line number, and so is a line of another
journal: each line's checksum goes on from the one before. Journals of version 1 have a checksum for each line alone.
Those of version 3 hold what each of several workers contributed.
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from runtime_driver.errors import (
    HyperparameterError,
    JournalCorruptError,
    JournalError,
    JournalLockedError,
    UnprovenWarning,
)
from runtime_driver.format.contributions import Contribution
from runtime_driver.format.files import open_regular, read_regular
from runtime_driver.format.records import (
    JOURNAL_FORMAT,
    Header,
    Record,
    RecordError,
    checksum,
    decode_header,
    decode_record,
    encode_header,
    encode_record,
)
from runtime_driver.format.seeds import step_seed, worker_seed

T = TypeVar("T")
#: "step": after every record; "none": leave it to the system; N: after every N-th record.
FsyncPolicy = Literal["step", "none"] | int
_HEADER_START = f'{{"format":"{JOURNAL_FORMAT}"'.encode()


@dataclass(frozen=True)
class JournalContents:
    """What a journal holds.

    Attributes:
        header: what the run is.
        records: its whole records.
        size: the offset at which they end.
        version: the journal's format.
        checksums: of each record's line; chained, unless the version is 1.
    """

    header: Header
    records: tuple[Record, ...]
    size: int
    version: int
    checksums: tuple[int, ...]
    #: The checksum from which the next line goes on.
    end: int


def read_journal(path: str | Path) -> JournalContents:
    """Read a journal without locking or changing it; a torn last line is left out.

    Raises:
        JournalError: no such file, or unreadable.
        JournalCorruptError: a line that is not what the driver wrote, or steps out of order.
    """
    path = Path(path)
    try:
        data = read_regular(path)
    except OSError as error:
        raise JournalError(f"{path}: cannot read the journal ({error.strerror}). Check the path.") from error
    contents = parse_journal(path, data)
    if contents is None:
        raise JournalCorruptError(path, 1, "the journal is empty")
    _say_what_is_unproven(path, contents)
    return contents


def _say_what_is_unproven(path: Path, contents: JournalContents) -> None:
    if contents.version == 1:
        warnings.warn(
            f"{path}: a journal of format 1, whose lines are not chained: a line of another run with the same seed "
            "would not be noticed.",
            UnprovenWarning,
            stacklevel=4,
        )


def parse_journal(path: Path, data: bytes) -> JournalContents | None:
    """The contents; ``None`` for an empty file and for one whose header was torn while it was written."""
    end = data.rfind(b"\n") + 1
    if end == 0:
        # Only bytes that a torn header can have may be discarded later: never somebody's one-line file.
        if _HEADER_START.startswith(data[: len(_HEADER_START)]):
            return None
        raise JournalCorruptError(path, 1, f"expected the header of a {JOURNAL_FORMAT}")
    first, *lines = data[: end - 1].split(b"\n")
    header, version = _numbered(path, 1, lambda: decode_header(first))
    before = 0 if version == 1 else checksum(first)
    records: list[Record] = []
    checksums: list[int] = []
    for number, line in enumerate(lines, start=2):
        parse = partial(decode_record, line, header.queries, before, header.combine)
        record = _numbered(path, number, parse)
        if record.step != len(records):
            raise JournalCorruptError(path, number, f"expected step {len(records)}, found step {record.step}")
        if record.seed != step_seed(header.seed, record.step):
            raise JournalCorruptError(path, number, f"seed {record.seed} is not that of step {record.step}")
        for each in record.contributions:
            if each.seed not in (record.seed, _own_seed(header, record, each)):
                raise JournalCorruptError(path, number, f"seed {each.seed} is not that of worker {each.worker}")
        records.append(record)
        checksums.append(checksum(line))
        before = 0 if version == 1 else checksums[-1]
    return JournalContents(header, tuple(records), end, version, tuple(checksums), before)


def _own_seed(header: Header, record: Record, contribution: Contribution) -> int:
    """The seed of a worker with queries of its own; the step's for a worker that can't have any."""
    try:
        return worker_seed(header.seed, record.step, contribution.worker)
    except HyperparameterError:
        return record.seed


def _numbered(path: Path, number: int, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except RecordError as error:
        raise JournalCorruptError(path, number, str(error)) from error


class JournalWriter:
    """An open, locked journal. Use as a context manager.

    ``contents`` is what the file held when it was opened, ``None`` for a new one; then :meth:`begin` must come first.
    """

    def __init__(self, path: str | Path, fsync: FsyncPolicy = "step") -> None:
        """Open or create the file, lock it, read it, and cut off a torn last line.

        Raises:
            JournalLockedError: another process writes it.
            JournalCorruptError: the file holds something else than whole journal lines.
            JournalError: it cannot be opened.
            HyperparameterError: ``fsync`` is none of ``"step"``, ``"none"`` and a positive number.
        """
        if fsync not in ("step", "none") and not (isinstance(fsync, int) and fsync > 0):
            raise HyperparameterError("fsync", '"step", "none" or a number of steps', fsync)
        self.path = Path(path)
        self._every = 1 if fsync == "step" else 0 if fsync == "none" else int(fsync)
        try:
            self._fd, self._created = _open(self.path)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot open the journal ({error.strerror}). Check the path.") from error
        try:
            self._take_lock()
            self.contents = parse_journal(self.path, _read(self._fd))
            self._size = 0 if self.contents is None else self.contents.size
            # A new journal is of the version that is written now; one that goes on stays what it is.
            self._chained = self.contents is None or self.contents.version > 1
            #: The checksum of the last line, from which the next one goes on.
            self.end = 0 if self.contents is None else self.contents.end
            os.ftruncate(self._fd, self._size)
        except BaseException:
            os.close(self._fd)
            raise
        if self.contents is not None:
            _say_what_is_unproven(self.path, self.contents)
        self._unsynced = 0

    def begin(self, header: Header) -> None:
        """Write the header of a new journal, and make the file's name durable.

        Raises:
            JournalError: the disk is full or fails.
        """
        self._write(encode_header(header), sync=self._every > 0)
        if self._every:
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def append(self, record: Record) -> None:
        """Write one step's record.

        Raises:
            JournalError: the disk is full or fails; the journal then still ends at the previous record.
        """
        self._unsynced += 1
        sync = 0 < self._every <= self._unsynced
        self._write(encode_record(record, self.end if self._chained else 0), sync=sync)
        if sync:
            self._unsynced = 0

    def close(self) -> None:
        """Sync what is left, unlock and close. A file that was created and never begun is removed."""
        if self._fd < 0:
            return
        if self._created and self._size == 0:
            self.path.unlink(missing_ok=True)
        elif self._every and self._unsynced:
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalLockedError(self.path) from error

    def _write(self, line: bytes, *, sync: bool) -> None:
        try:
            written = os.pwrite(self._fd, line, self._size)
            if written == len(line) and sync:
                os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise JournalError(f"{self.path}: cannot write the journal ({error.strerror}).") from error
        if written != len(line):
            # A short write means a full disk: say so rather than leave half a line for the next reader.
            os.ftruncate(self._fd, self._size)
            raise JournalError(f"{self.path}: the disk is full. Free some space and run again to resume.")
        self._size += len(line)
        self.end = checksum(line)


def _open(path: Path) -> tuple[int, bool]:
    """The journal's descriptor, and whether it was created."""
    try:
        return open_regular(path, os.O_RDWR), False
    except FileNotFoundError:
        return open_regular(path, os.O_RDWR | os.O_CREAT), True


def _read(descriptor: int) -> bytes:
    """All that stands in the file that is locked, whatever stands under its name by now."""
    data, size = b"", os.fstat(descriptor).st_size
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), len(data))
        if not more:
            break
        data += more
    return data
