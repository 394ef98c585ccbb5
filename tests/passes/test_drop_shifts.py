"""DropShifts: a softmax does not see what is subtracted from a whole row."""

from __future__ import annotations

import pytest

from mobizo_passes.passes import DropShifts
from tests.passes.contract import PassContract, left_alone

HEAD = """
    %x: f32[2, 4] = batch 'x'
    %m: f32[2, 1] = aten.amax(%x, [-1], True)
"""


class TestDropShifts(PassContract):
    one = DropShifts()
    before = f"""{HEAD}
        %s: f32[2, 4] = aten.sub(%x, %m)
        %p: f32[2, 4] = aten.softmax(%s, -1)

        return %p: f32[2, 4] = loss
    """
    after = """
        %x: f32[2, 4] = batch 'x'

        %p: f32[2, 4] = aten.softmax(%x, -1)

        return %p: f32[2, 4] = loss
    """

    @pytest.mark.parametrize(
        "calls",
        [
            "%s: f32[2, 4] = aten.sub(%x, %m)\n%p: f32[2, 4] = aten.softmax(%s, 0)",
            "%s: f32[2, 4] = aten.sub(%m, %x)\n%p: f32[2, 4] = aten.softmax(%s, -1)",
            "%s: f32[2, 4] = aten.mul(%x, %m)\n%p: f32[2, 4] = aten.softmax(%s, -1)",
        ],
    )
    def test_near_misses_are_left_alone(self, calls: str) -> None:
        left_alone(f"{HEAD}\n{calls}\nreturn %p: f32[2, 4] = loss", self.one)
