"""How much memory this process uses, from the operating system, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """The largest resident set this process has had so far, in bytes."""
    # Not ru_maxrss where it can be helped: on Linux it keeps the peak of a larger parent across exec.
    peak = _field("VmHWM:")
    if peak is not None:
        return peak
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux counts kibibytes.
    return usage if sys.platform == "darwin" else usage * 1024


def rss_bytes() -> int:
    """The resident set now, in bytes; the peak where the system has no ``/proc``."""
    now = _field("VmRSS:")
    return peak_rss_bytes() if now is None else now


def _field(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None
