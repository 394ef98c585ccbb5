"""Between which numbers activations lie."""

from __future__ import annotations

from typing import Any

from torchao.quantization.pt2e import MinMaxObserver


class WideRange(MinMaxObserver):
    """The least and the largest value seen, with room beyond both.

    Ranges are measured in float32. What is computed with rounded weights lies elsewhere, and what is outside is cut
    off: in a model of two layers a norm's reciprocal was 6 % beyond, which cost more than all rounding. Integers of 16
    bits have the room.
    """

    ROOM = 0.25

    def calculate_qparams(self) -> Any:
        """Scale and zero point of the range, widened by `ROOM` of its size, half at each end."""
        room = (self.max_val - self.min_val) * (self.ROOM / 2)
        return self._calculate_qparams(self.min_val - room, self.max_val + room)
