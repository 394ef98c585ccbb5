"""StackNoise: the noise of equal sites in one draw."""

from __future__ import annotations

import torch
from torch import Tensor

from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import StackNoise
from tests.passes.contract import PassContract, left_alone, parsed


class TestStackNoise(PassContract):
    one = StackNoise()
    before = """
        %seed: i64[1] = seed

        %noise: f32[2, 4, 1] = mobizo.noise(%seed, 11, 2, [4, 1], 'gaussian')  # | insert-noise | noise of a
        %noise_1: f32[2, 3] = mobizo.noise(%seed, 33, 2, [3], 'gaussian')  # | insert-noise | noise of c
        %noise_2: f32[2, 4, 1] = mobizo.noise(%seed, 22, 2, [4, 1], 'gaussian')  # | insert-noise | noise of b

        return %noise: f32[2, 4, 1] = logits
        return %noise_1: f32[2, 3] = loss
        return %noise_2: f32[2, 4, 1] = losses
    """
    # A shape of its own is left alone; sites keep their marks.
    after = """
        %seed: i64[1] = seed

        %noise_stack: f32[2, 2, 4, 1] = mobizo.noise_stack(%seed, [11, 22], 2, [4, 1], 'gaussian')  # | stack-noise
        %select: f32[2, 4, 1] = aten.select(%noise_stack, 0, 0)  # | stack-noise | noise of a
        %noise_1: f32[2, 3] = mobizo.noise(%seed, 33, 2, [3], 'gaussian')  # | insert-noise | noise of c
        %select_1: f32[2, 4, 1] = aten.select(%noise_stack, 0, 1)  # | stack-noise | noise of b

        return %select: f32[2, 4, 1] = logits
        return %noise_1: f32[2, 3] = loss
        return %select_1: f32[2, 4, 1] = losses
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        want, got = old.run(values), new.run(values)
        assert all(torch.equal(got[name], value) for name, value in want.items()), "the same bits"

    def test_another_kind_or_another_number_is_left_alone(self) -> None:
        text = """
            %seed: i64[1] = seed
            %a: f32[2, 4] = mobizo.noise(%seed, 11, 2, [4], 'gaussian')  # | | noise of a
            %b: f32[2, 4] = mobizo.noise(%seed, 22, 2, [4], 'rademacher')  # | | noise of b
            %c: f32[3, 4] = mobizo.noise(%seed, 33, 3, [4], 'gaussian')  # | | noise of c
            return %a: f32[2, 4] = logits
            return %b: f32[2, 4] = loss
            return %c: f32[3, 4] = losses
        """
        left_alone(text, self.one)
        assert "noise of" not in str(parsed(text).outputs)
