"""Rows: whole models with hand-written LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.coverage import whole_models as own
from tests.coverage.row import Row
from tests.models import integers, random, seeded

BOTH = {"trainable": "lora_A+lora_B"}
ONE_SIDED = {"estimator": mz.OneSided(queries=2)}
CLASSES = {"loss": F.cross_entropy}


def _row(
    architecture: str, variant: str, kind: Callable[[], nn.Module], inputs: tuple[Tensor, ...], **options: Any
) -> Row:
    return Row(architecture, variant, lambda: seeded(kind(), scale=0.3), lambda: inputs, options)


_MASK = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
_EDGES = (random(3, 5, 5) > 0).float()

ROWS: tuple[Row, ...] = (
    _row("convnet", "torch.nn.utils.parametrize", own.ParametrizedNet,
         (random(3, 2, 5, 5), integers(4, 3)), **CLASSES),
    _row("encoder", "fused qkv, relative position bias, lengths", own.RelativeBiasBlock,
         (integers(20, 3, 6), torch.tensor([6, 2, 4]), integers(5, 3)), **CLASSES),
    _row("decoder", "rotary, grouped queries, returns only a loss", own.RotaryLM, (integers(16, 3, 7),), **BOTH),
    _row("sequence-first attention", "ALiBi, einsum", own.AlibiSeqFirst,
         (random(5, 3, 5), random(3)), loss=F.mse_loss, batch_dim=1),
    _row("graph network", "masked pooling", own.GraphNet,
         (random(3, 5, 7), _EDGES, _MASK, integers(3, 3)), **CLASSES, noise="rademacher"),
    _row("point cloud", "neighbours in perturbed space", own.DynamicEdgeConv,
         (random(3, 6, 3), integers(4, 3)), **CLASSES),
    _row("mixture of experts", "dense routing, entropy loss", own.SoftMoE,
         (random(3, 4, 8), integers(4, 3)), **BOTH),
    _row("mixture of experts", "top-2 by mask", own.TopKMoE, (random(3, 4, 8), integers(4, 3))),
    _row("selective scan", "loop over time", own.SelectiveScan, (random(3, 4, 6), integers(4, 3)), **CLASSES, **BOTH),
    _row("perceiver", "latents expanded over the batch", own.Perceiver,
         (random(3, 6, 5), random(3, 2)), loss=F.mse_loss, **ONE_SIDED),
    _row("tabular", "embedding LoRA, two losses", own.Tabular,
         (integers(5, 3, 2), random(3, 3), random(3), integers(2, 3))),
    _row("AdaLoRA", "diagonal in the weight", own.AdaLoRA, (random(3, 8), integers(3, 3)), **CLASSES),
    _row("merged on the fly", "W + s * B @ A", own.MergedOnTheFly, (random(3, 7), integers(2, 3)), **CLASSES, **BOTH),
    _row("merged on the fly", "DoRA", lambda: own.MergedOnTheFly(True), (random(3, 7), integers(2, 3)), **CLASSES),
    _row("recurrent layer", "nn.LSTM, both directions", own.Sequence, (random(3, 5, 6), integers(4, 3)), **CLASSES),
    _row("images", "reflected borders, patches, uneven windows, instance norm", own.Picture,
         (random(3, 6), integers(4, 3)), **CLASSES, **BOTH),
    _row("refinement", "first rounds under no_grad", own.Cycles, (random(3, 6), integers(4, 3)), **CLASSES),
    _row("windowed attention", "rolled image", own.Windows, (random(2, 1, 8, 8), integers(3, 2)), **CLASSES),
)  # fmt: skip
