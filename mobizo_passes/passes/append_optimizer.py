"""Close a step that has gradients: the optimizer's update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, has_output
from mobizo_passes.zo.optimizers import Optimizer, append_optimizer


@dataclass(frozen=True)
class AppendOptimizer(Pass):
    """Turn gradients into a new adapter, and the optimizer's state into its new state.

    BEFORE  return (%loss: f32[], %g: f32[576, 16], ...)
    AFTER   %m: f32[576, 16] = optimizer 'optimizer.momentum.q_proj.lora_B.default.weight';  %lr: f32[1] = lr 'lr'
            return (%loss: f32[], %n: f32[576, 16], ..., %k: f32[576, 16], ...)
    """

    name: ClassVar[str] = "append-optimizer"
    requires = (has_output("gradient", "adapter"),)
    ensures = (has_output("adapter"),)

    optimizer: Optimizer

    def rewrite(self, ir: Ir) -> int:
        if any(spec.kind == "adapter" for spec in ir.outputs):
            return 0
        nodes: Any = ir.graph.output_node().args[0]
        outputs = list(zip(ir.outputs, nodes, strict=True))
        gradients = [node for spec, node in outputs if spec.kind == "gradient"]
        lr = (ir.placeholders("lr") or [None])[0] or ir.add_input("lr", "lr", torch.zeros(1))
        with ir.graph.inserting_before(ir.graph.output_node()):
            stepped = append_optimizer(ir, self.optimizer, gradients, lr)
        kept = [(spec, node) for spec, node in outputs if spec.kind != "gradient"]
        ir.set_outputs([*kept, *stepped.adapter, *stepped.state])
        return len(gradients)
