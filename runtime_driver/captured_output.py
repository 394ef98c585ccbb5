"""Keeps what native code and imported libraries write to stderr, so that an error can quote it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Waits for a line on stdin. The end of the file instead means that this process has died: then what it wrote must not
#: be lost. No handler inside of the dying process could promise that; a process of its own can.
_GUARD = 'exec 3<&1; read -r line || { printf "%s\\n" "$1"; cat <&3; } >&2'


class CapturedLog:
    """What was written; filled in when the block ends."""

    def __init__(self) -> None:
        self.text = ""

    def reason(self) -> str:
        """The lines that the runtime marks with their source file, joined; empty when there are none."""
        lines = [line.strip() for line in self.text.splitlines()]
        return "; ".join(line for line in lines if ".cpp:" in line and "cpuinfo" not in line)


@contextmanager
def captured_stderr(doing: str) -> Iterator[CapturedLog]:
    """Redirect file descriptor 2 to a temporary file while the block runs.

    The runtime logs from C++, past ``sys.stderr``, and says the true reason of a failed load only there. Used around
    loading alone; while steps run, stderr is left as it is. If the process dies inside the block (the runtime aborts on
    some damaged files), a guarding process writes the text to the real stderr.

    Args:
        doing: what the block does, for the line above that text.
    """
    log = CapturedLog()
    sys.stderr.flush()
    handle, name = tempfile.mkstemp(prefix="mobizo-stderr-")
    # A second description of the same file, with a reading position of its own.
    reader = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    Path(name).unlink()
    with os.fdopen(handle, "wb") as sink, os.fdopen(reader, "rb") as text:
        guard = _start_guard(doing, text.fileno())
        if guard is None:
            # Nobody could save the text from an abort: better on the screen twice over than lost.
            yield log
            return
        saved = os.dup(2)
        try:
            os.dup2(sink.fileno(), 2)
            try:
                yield log
            finally:
                sys.stderr.flush()
                os.dup2(saved, 2)
                log.text = text.read().decode("utf-8", errors="replace")
        finally:
            os.close(saved)
            guard.communicate(b"done\n")


def _start_guard(doing: str, text: int) -> subprocess.Popen[bytes] | None:
    """A shell that outlives this process, in a session of its own so that Ctrl-C does not end it."""
    message = f"mobizo: the process died while {doing}; the last words of ExecuTorch's runtime:"
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "mobizo-guard", message],
            stdin=subprocess.PIPE,
            stdout=text,  # to read from: a shell knows no other descriptors above 9
            start_new_session=True,
        )
    except OSError:
        return None
