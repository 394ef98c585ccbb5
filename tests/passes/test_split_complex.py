"""SplitComplex: rotations by complex numbers are written with real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from mobizo_passes.passes import SplitComplex
from tests.passes.contract import PassContract, left_alone, rewritten

HEAD = """
    %x: f32[3, 4, 2] = batch 'x'
    %f: c64[4] = buffer 'f'
    %z: c64[3, 4] = aten.view_as_complex(%x)
"""


class TestSplitComplex(PassContract):
    one = SplitComplex()
    state: ClassVar[Mapping[str, Tensor]] = {"f": torch.polar(torch.arange(1.0, 5.0), torch.arange(4.0))}
    before = f"""{HEAD}
        %r: c64[3, 4] = aten.mul(%z, %f)
        %y: f32[3, 4, 2] = aten.view_as_real(%r)

        return %y: f32[3, 4, 2] = loss
    """
    after = """
        %x: f32[3, 4, 2] = batch 'x'
        %f_real: f32[4] = constant 'f_real'
        %f_imag: f32[4] = constant 'f_imag'

        %select: f32[3, 4] = aten.select(%x, -1, 0)  # | split-complex
        %select_1: f32[3, 4] = aten.select(%x, -1, 1)  # | split-complex
        %mul: f32[3, 4] = aten.mul(%select, %f_real)  # | split-complex
        %mul_1: f32[3, 4] = aten.mul(%select_1, %f_imag)  # | split-complex
        %sub: f32[3, 4] = aten.sub(%mul, %mul_1)  # | split-complex
        %mul_2: f32[3, 4] = aten.mul(%select, %f_imag)  # | split-complex
        %mul_3: f32[3, 4] = aten.mul(%select_1, %f_real)  # | split-complex
        %add: f32[3, 4] = aten.add(%mul_2, %mul_3)  # | split-complex
        %stack: f32[3, 4, 2] = aten.stack([%sub, %add], -1)  # | split-complex

        return %stack: f32[3, 4, 2] = loss
    """

    @pytest.mark.parametrize(
        "calls",
        [
            "%a: f32[3, 4] = aten.cos(%i)\n%p: c64[3, 4] = aten.polar(%a, %i)\n%s: c64[3, 4] = aten.mul(%z, %p)",
            "%p: c64[3, 4] = aten.complex(%i, %i)\n%s: c64[3, 4] = aten.sub(%p, %z)",
            "%s: c64[3, 4] = aten.mul(%z, %i)",
            "%n: c64[3, 4] = aten.neg(%z)\n%s: c64[3, 4] = aten.mul(%n, 0.5)",
            "%t: c64[4, 3] = aten.permute(%z, [1, 0])\n%s: c64[3, 4] = aten.reshape(%t, [3, 4])",
        ],
    )
    def test_what_is_written_with_parts(self, calls: str) -> None:
        head = HEAD.replace("    %f: c64[4] = buffer 'f'\n", "    %i: f32[3, 4] = batch 'i'\n")
        got = rewritten(f"{head}\n{calls}\n%y: f32[3, 4] = aten.imag(%s)\nreturn %y: f32[3, 4] = loss", self.one)
        assert "c64" not in "\n".join(got)

    @pytest.mark.parametrize(
        "calls",
        [
            "%s: c64[3, 4] = aten.exp(%z)\n%r: c64[3, 4] = aten.mul(%s, %f)",
            "%s: c64[3, 4] = aten.mul(%z, %f)\n%r: c64[3, 4] = aten.cumsum(%s, 0)",
        ],
    )
    def test_complex_numbers_in_other_operators_are_left_alone(self, calls: str) -> None:
        end = "%y: f32[3, 4, 2] = aten.view_as_real(%r)\nreturn %y: f32[3, 4, 2] = loss"
        left_alone(f"{HEAD}\n{calls}\n{end}", self.one)
