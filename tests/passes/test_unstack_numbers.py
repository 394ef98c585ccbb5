"""UnstackNumbers: a list of losses is added up one by one."""

from __future__ import annotations

import pytest

from mobizo_passes.passes import UnstackNumbers
from tests.passes.contract import PassContract, left_alone, rewritten

W = "    %w: f32[2] = constant 'w'\n"
HEAD = f"""
    %x: f32[2, 4] = batch 'x'
{W}    %a: f32[] = aten.sum(%x)
    %b: f32[] = aten.mean(%x)
    %stack: f32[2] = aten.stack([%a, %b])
"""


class TestUnstackNumbers(PassContract):
    one = UnstackNumbers()
    before = f"""{HEAD}
        %mul: f32[2] = aten.mul(%stack, %w)
        %loss: f32[] = aten.mean(%mul)

        return %loss: f32[] = loss
    """
    after = """
        %x: f32[2, 4] = batch 'x'
        %w: f32[2] = constant 'w'

        %a: f32[] = aten.sum(%x)
        %b: f32[] = aten.mean(%x)
        %select: f32[] = aten.select(%w, 0, 0)  # | unstack-numbers
        %select_1: f32[] = aten.select(%w, 0, 1)  # | unstack-numbers
        %mul_1: f32[] = aten.mul(%a, %select)  # | unstack-numbers
        %mul_2: f32[] = aten.mul(%b, %select_1)  # | unstack-numbers
        %add: f32[] = aten.add(%mul_1, %mul_2)  # | unstack-numbers
        %div: f32[] = aten.div(%add, 2)  # | unstack-numbers

        return %div: f32[] = loss
    """

    @pytest.mark.parametrize(
        ("call", "line"),
        [
            ("aten.sum(%stack)", "aten.add(%a, %b)"),
            ("aten.sum(%stack, [0])", "aten.add(%a, %b)"),
            ("aten.select(%stack, 0, -1)", "return %b: f32[] = loss"),
            ("aten.matmul(%stack, %w)", "aten.mul(%b, %select_1)"),
            ("aten.dot(%w, %stack)", "aten.mul(%select_1, %b)"),
        ],
    )
    def test_ends_of_a_stack(self, call: str, line: str) -> None:
        got = "\n".join(rewritten(f"{HEAD}\n%loss: f32[] = {call}\nreturn %loss: f32[] = loss", self.one))
        assert line in got
        assert "aten.stack" not in got

    @pytest.mark.parametrize(
        ("calls", "kind"),
        [
            ("%loss: f32[] = aten.max(%stack)", "f32[]"),
            ("%s: f32[2] = aten.softmax(%stack, 0)\n%loss: f32[] = aten.sum(%s)", "f32[]"),
            ("%loss: f32[1] = aten.sum(%stack, [0], True)", "f32[1]"),
            ("%loss: f32[2] = aten.mul(%stack, 2)", "f32[2]"),
        ],
    )
    def test_near_misses_are_left_alone(self, calls: str, kind: str) -> None:
        left_alone(f"{HEAD.replace(W, '')}\n{calls}\nreturn %loss: {kind} = loss", self.one)
