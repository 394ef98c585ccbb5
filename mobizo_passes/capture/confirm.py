"""Confirm on the model itself that the parts of its loss combine as the graph says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mobizo_passes.batching import Batch
from mobizo_passes.capture.export import forward_with_loss
from mobizo_passes.capture.inputs import Inputs, LossFn
from mobizo_passes.capture.quantized import dequantized
from mobizo_passes.capture.rope import kept_rope
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.zo.combination import Combination, ambiguous, readings

# Rows are computed in another batch, so float32 kernels may add up in another order; half precision rounds more.
_CLOSE, _CLOSE_IN_HALVES = 1e-4, 2e-2


def confirm(
    ir: Ir, model: nn.Module, inputs: Inputs, loss: LossFn | None, batch: Batch, adapter: Mapping[str, Tensor]
) -> None:
    """Run the model on its example batch and one row more; keep the reading of the loss that gives its value.

    A loss that no reading explains gets a refusal: something in it depends on the size of the batch in a way that the
    graph of one batch does not show. A model that runs on no other batch size tells nothing; the graph's reading is
    kept then, unless it was a guess. RNG state and model are left as they are.
    """
    combination = ir.combination
    if combination is None or combination.refusal:
        return
    expected = _one_row_more(model, inputs, loss, batch)
    if expected is None:
        if combination.guessed or ambiguous(combination, batch.size):
            reason = f"the model runs on {batch.size} rows only, so what its loss divides by is not known"
            _keep_whole(ir, reason)
        return
    out = ir.run({**adapter, **inputs.tensors})
    terms = range(len(combination.terms))
    sums, weights = ([_sum(out.get(f"loss_{kind}_{i}")) for i in terms] for kind in ("sum", "weight"))
    scalars = [float(out[f"loss_scalar_{i}"]) for i in range(len(combination.scalars))]
    rows = batch.size + 1
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    # Terms of a sum may cancel: what they were is what their rounding is relative to.
    sizes = [abs(combination.part(i, sums, weights, rows)) for i in terms]
    bound = (_CLOSE_IN_HALVES if halves else _CLOSE) * max(abs(expected), *sizes)
    for reading in readings(combination, batch.size):
        found = reading.value(sums, weights, scalars, rows)
        unknown = not math.isfinite(expected) and not combination.guessed
        if abs(found - expected) <= bound or unknown:
            ir.combination = replace(reading, guessed=False)
            return
    found = combination.value(sums, weights, scalars, rows)
    _keep_whole(
        ir,
        f"on {rows} rows the model's own loss is {expected:.6g}, but its parts, row by row, give {found:.6g}: "
        "something in it depends on the size of the batch, or examples see one another",
    )


def _keep_whole(ir: Ir, reason: str) -> None:
    """Take the parts back: the loss is given out for whole batches only."""
    ir.combination = Combination(refusal=reason)
    ir.set_outputs([(Output("loss", "loss"), ir.output_node("loss"))])
    ir.eliminate_dead_code()
    ir.lint()


def _one_row_more(model: nn.Module, inputs: Inputs, loss: LossFn | None, batch: Batch) -> float | None:
    longer = {
        name: torch.cat([value, value.narrow(batch.places[name], 0, 1)], batch.places[name])
        if name in batch.places
        else value.clone()
        for name, value in inputs.tensors.items()
    }
    try:
        with kept_rope(model), dequantized(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return float(forward_with_loss(model, inputs, loss, longer)[0].mean())
    except Exception:  # noqa: BLE001  a model written for one batch size fails in its own way on another
        return None


def _sum(per_row: Tensor | None) -> float:
    """The sum over all rows, and the first once more."""
    return 1.0 if per_row is None else float(per_row.double().sum() + per_row[0].double())
