"""Canonicalize: nodes that change nothing go."""

from __future__ import annotations

import pytest

from mobizo_passes.passes import Canonicalize
from tests.passes.contract import PassContract, left_alone, rewritten


class TestCanonicalize(PassContract):
    one = Canonicalize()
    before = """
        %x: f32[2, 4] = batch 'x'

        %clone: f32[2, 4] = aten.clone(%x)
        %check: NoneType = aten._assert_tensor_metadata(%clone, dtype=f32)
        %_to_copy: f32[2, 4] = aten._to_copy(%clone, dtype=f32)
        %dropout: f32[2, 4] = aten.dropout(%_to_copy, 0.5, False)
        %view: f32[2, 4] = aten.view(%dropout, [2, 4])
        %view_1: f32[4, 2] = aten.view(%view, [4, 2])
        %relu: f32[4, 2] = aten.relu(%view_1)

        return %relu: f32[4, 2] = logits
    """
    after = """
        %x: f32[2, 4] = batch 'x'

        %view_1: f32[4, 2] = aten.reshape(%x, [4, 2])
        %relu: f32[4, 2] = aten.relu(%view_1)

        return %relu: f32[4, 2] = logits
    """

    @pytest.mark.parametrize(
        ("kind", "call"),
        [
            ("f64[2, 4]", "aten._to_copy(%x, dtype=f64)"),
            ("f32[4, 2]", "aten.reshape(%x, [4, 2])"),
            ("f32[3, 2, 4]", "aten.expand(%x, [3, 2, 4])"),
            ("f32[2, 4]", "aten.dropout(%x, 0.5, True)"),
            ("f32[2, 4]", "aten.add(%x, 0)"),
        ],
    )
    def test_near_misses_are_left_alone(self, kind: str, call: str) -> None:
        left_alone(f"%x: f32[2, 4] = batch 'x'\n%y: {kind} = {call}\nreturn %y: {kind} = logits", self.one)

    @pytest.mark.parametrize(
        ("parts", "size", "after"), [("%x", 4, "aten.relu(%x)"), ("%x, %x", 8, "aten.cat([%x, %x], 1)")]
    )
    def test_empty_parts_of_a_cat_go(self, parts: str, size: int, after: str) -> None:
        text = f"""
            %x: f32[2, 4] = batch 'x'
            %no: f32[0] = batch 'no'

            %cat: f32[2, {size}] = aten.cat([%no, {parts}, %no], 1)
            %relu: f32[2, {size}] = aten.relu(%cat)

            return %relu: f32[2, {size}] = logits
        """
        got = "\n".join(rewritten(text, self.one))
        assert after in got
        assert got.count("%no") == 1

    def test_a_copy_into_a_tensor_of_its_own_type_is_what_was_copied(self) -> None:
        text = """
            %x: f32[2, 4] = batch 'x'

            %zeros: f32[2, 4] = aten.zeros_like(%x)
            %copy: f32[2, 4] = aten.copy(%zeros, %x)
            %relu: f32[2, 4] = aten.relu(%copy)

            return %relu: f32[2, 4] = logits
        """
        assert "%relu: f32[2, 4] = aten.relu(%x)" in rewritten(text, self.one)

    def test_broadcast_tensors_becomes_an_expand(self) -> None:
        text = """
            %x: f32[2, 4] = batch 'x'
            %w: f32[1, 4] = batch 'w'
            %both: (f32[2, 4], f32[2, 4]) = aten.broadcast_tensors([%x, %w])
            %a: f32[2, 4] = getitem(%both, 0)
            %b: f32[2, 4] = getitem(%both, 1)
            %y: f32[2, 4] = aten.sub(%a, %b)
            return %y: f32[2, 4] = logits
        """
        assert rewritten(text, self.one)[2:-1] == [
            "%expand: f32[2, 4] = aten.expand(%w, [2, 4])  # | canonicalize",
            "%y: f32[2, 4] = aten.sub(%x, %expand)",
        ]

    @pytest.mark.parametrize(
        ("order", "dim", "size", "after"),
        [
            ("%a, %b", 0, "4, 3", "aten.reshape(%x, [4, 3])"),
            ("%b, %a", 0, "4, 3", "aten.cat([%b, %a]"),
            ("%a, %b", 1, "2, 6", "aten.cat([%a, %b], 1)"),
        ],
    )
    def test_rows_that_are_put_together_again(self, order: str, dim: int, size: str, after: str) -> None:
        text = f"""
            %x: f32[2, 2, 3] = batch 'x'

            %rows: (f32[2, 3], f32[2, 3]) = aten.unbind(%x)
            %a: f32[2, 3] = getitem(%rows, 0)
            %b: f32[2, 3] = getitem(%rows, 1)
            %clone: f32[2, 3] = aten.clone(%a)
            %cat: f32[{size}] = aten.cat([{order}], {dim})
            %total: f32[] = aten.sum(%cat)
            %add: f32[2, 3] = aten.add(%clone, %total)

            return %add: f32[2, 3] = logits
        """
        assert any(after in line for line in rewritten(text, self.one))
