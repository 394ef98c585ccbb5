"""Put the adapter inside the step program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from mobizo_passes.errors import InputError
from mobizo_passes.graph.facts import note, role
from mobizo_passes.graph.ir import Input, Ir, Output
from mobizo_passes.graph.passes import Pass, Property, Violation
from mobizo_passes.graph.text import type_text


def _outside(ir: Ir) -> Iterator[Violation]:
    yield from ((node, "an input") for node in ir.placeholders("adapter"))
    yield from ((None, f"the output {spec.name}") for spec in ir.outputs if spec.kind == "adapter")


@dataclass(frozen=True)
class InternalizeAdapter(Pass):
    """Turn adapter inputs and outputs into state that every run writes anew (the paper's own form).

    BEFORE  %b: f32[576, 16] = adapter 'q_proj.lora_B.weight'
            return %n: f32[576, 16] = adapter 'q_proj.lora_B.weight'
    AFTER   %b: f32[576, 16] = state 'q_proj.lora_B.weight'      (a buffer, at first `initial`)
            return %n: f32[576, 16] = state 'q_proj.lora_B.weight'      (a mutation of that buffer)

    Raises `InputError` for a program that reads an adapter tensor and returns no new value for it: inside, it would be
    a constant. Likewise where an initial value is missing or does not fit.
    """

    name: ClassVar[str] = "internalize-adapter"
    ensures = (Property("an adapter that is state", _outside),)

    initial: Mapping[str, Tensor] = field(repr=False)

    def rewrite(self, ir: Ir) -> int:
        adapters = {role(node).name: node for node in ir.placeholders("adapter")}
        nodes: Any = ir.graph.output_node().args[0]
        returned = {spec.name: node for spec, node in zip(ir.outputs, nodes, strict=True) if spec.kind == "adapter"}
        for fqn, node in adapters.items():
            wanted = type_text(node.meta["val"])
            if fqn not in returned:
                raise InputError(
                    f"adapter tensor '{fqn}' is read, but the program returns no new value for it; only a training "
                    "step can hold its adapter inside"
                )
            if returned[fqn].op == "placeholder":
                raise InputError(
                    f"the new value of adapter tensor '{fqn}' is the input '{returned[fqn].name}' itself; inside, it "
                    "would never be written"
                )
            for what, value in (("new", returned[fqn].meta["val"]), ("initial", self.initial.get(fqn))):
                found = type_text(value) if isinstance(value, Tensor) else "none"
                if found != wanted:
                    raise InputError(f"adapter tensor '{fqn}' is {wanted}, its {what} value {found}")
        for fqn, node in adapters.items():
            note(node, role=Input("state", fqn))
            note(node, made_by=self.name)
            ir.state[fqn] = self.initial[fqn].detach().clone()
        ir.set_outputs(
            [
                (Output("state", spec.name) if spec.kind == "adapter" else spec, node)
                for spec, node in zip(ir.outputs, nodes, strict=True)
            ]
        )
        return len(adapters)
