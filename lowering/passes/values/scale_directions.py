"""Tangents that half precision can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from lowering.targets.partitions import made_of_alone, upstream
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import is_float
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten

# A power of two: nothing is rounded.
FACTOR = 64.0


@dataclass(frozen=True)
class ScaleDirections(Pass):
    """Directions enter the tangents 64 times shorter, and projected gradients leave them 64 times larger.

    BEFORE  z = draw(seed);  t = bmm(x, z);                g = sum(t * dy);         w' = w - lr * g * z
    AFTER   z = draw(seed);  t = bmm(x, z * 0.015625);     g = sum(t * dy) * 64;    w' = w - lr * g * z

    The same numbers: tangents are linear in the direction, and the update reads the direction itself. Halves end at
    65504. SmolLM2 has activations of 20,000, and with LoRA in all of its layers tangents of 640,000.

    Attributes:
        seed, gradients: names of the nodes of the seed and of the projected gradients.
    """

    seed: str = "seed"
    gradients: str = "gradients"
    name: ClassVar[str] = "scale-directions"

    def rewrite(self, ir: Ir) -> int:
        nodes = {node.name: node for node in ir.graph.nodes}
        seed, gradients = nodes[self.seed], nodes[self.gradients]
        if any(_scaled(user) for user in gradients.users):
            return 0
        calls = [node for node in ir.graph.nodes if node.op == "call_function"]
        held = ("buffer", "constant", "parameter")
        others = {node for node in ir.placeholders() if role(node).kind not in held and node is not seed}
        directions = made_of_alone(calls, seed, others)
        tangents = upstream(calls, {gradients}) | {gradients}
        rewrites = 0
        for node in sorted(each for each in directions if is_float(each)):
            readers = [user for user in node.users if user in tangents and user not in directions]
            if readers:
                with ir.before(node.next):
                    short = ir.call(aten.mul.Tensor, node, 1 / FACTOR)
                for reader in readers:
                    reader.replace_input_with(node, short)
                rewrites += 1
        if rewrites:
            with ir.before(gradients.next):
                whole = ir.call(aten.mul.Tensor, gradients, FACTOR)
            gradients.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
        return rewrites


def _scaled(node: Node) -> bool:
    return node.target is aten.mul.Tensor and isinstance(node.args[1], float) and node.args[1] == FACTOR
