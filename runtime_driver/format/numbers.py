"""Numbers as a program sees them: float32."""

from __future__ import annotations

import math
import struct


def as_float32(value: float) -> float:
    """The nearest float32, as a Python float: the value that the program will really see."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
