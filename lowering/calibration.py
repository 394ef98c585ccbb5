"""Running a method on real batches, to see between which numbers its values lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from lowering.errors import InvalidCalibration
from lowering.identity import raw_bytes
from lowering.targets.partitions import made_of_alone
from mobizo_passes.graph.nodes import is_float
from runtime_driver.format import Manifest

#: Standard deviation by which trainable tensors are moved away from where they start, in half of the runs.
SPREAD = 0.05
_EPS = 1e-2
#: Seeds in each run of a step that differentiates along noise, and by how much its directions are lengthened.
SEEDS, MARGIN = 4, 2.0


@dataclass(frozen=True)
class Calibration:
    """Batches, as `program.step` takes them, on which a quantized program's ranges are measured.

    Each batch runs twice: with the initial adapter, and with one whose trainable tensors are moved by Gaussian noise of
    standard deviation `SPREAD`, so that the adapter and what it adds can grow while it is trained.

    Where derivatives are taken along noise (`seed`, but no `eps`), each run has `SEEDS` seeds, and directions are
    `MARGIN` times as long: a tangent is linear in its direction, and with another seed it may be larger than all seen.
    """

    manifest: Manifest
    batches: tuple[dict[str, Tensor], ...]
    adapter: Mapping[str, Tensor]

    @classmethod
    def of(cls, manifest: Manifest, batches: Sequence[Any], adapter: Mapping[str, Tensor]) -> Calibration:
        """Check the batches against the manifest.

        Raises:
            InvalidCalibration: there are none, or one lacks an input, has one too many, or of another dtype or shape.
        """
        if not batches:
            raise InvalidCalibration("there is no batch in it")
        named = tuple(named_batch(manifest, number, batch) for number, batch in enumerate(batches))
        return cls(manifest, named, adapter)

    def values(self, method: str, program: ExportedProgram, wanted: Sequence[Node]) -> Iterator[list[Tensor]]:
        """What the nodes `wanted` of a legalized method compute, run by run."""
        specs = self.manifest.methods[method].inputs
        written = set(program.graph_signature.buffers_to_mutate.values())
        stored: dict[str | None, Any] = {**program.constants, **program.state_dict}
        generator = torch.Generator().manual_seed(0)
        trainable = {each.fqn for each in self.manifest.trainable_adapter}
        along = directions([spec.role for spec in specs], program)
        seeds = SEEDS if along else 1
        for number, batch in enumerate(self.batches):
            for spread, seed in product((0.0, SPREAD), range(number * seeds, (number + 1) * seeds)):

                def moved(value: Tensor, by: float = spread) -> Tensor:
                    return value + by * torch.randn(value.shape, generator=generator).to(value.dtype)

                given: dict[str, Any] = {
                    **{k: moved(v) if k in trainable else v for k, v in self.adapter.items()},
                    **batch,
                    **_scalars(specs, seed),
                }
                places = iter([given[spec.name] for spec in specs])
                values: list[Tensor] = []
                for place in program.graph_signature.input_specs:
                    value = stored[place.target] if place.target in stored else next(places)
                    values.append(moved(value) if place.target in written else value)
                runner = _Recorder(program.graph_module, {node.name for node in wanted})
                with torch.no_grad():
                    runner.run(*values)
                yield [runner.seen[node.name] * (MARGIN if node.name in along else 1) for node in wanted]


def directions(roles: Sequence[str], program: ExportedProgram) -> set[str]:
    """Names of the floating-point values that are made of the seed alone, if the method takes no epsilon; else none."""
    if "seed" not in roles or "eps" in roles:
        return set()
    placed = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    inputs = {placed[str(name)]: role for name, role in zip(program.graph_signature.user_inputs, roles, strict=True)}
    (seed,) = (node for node, role in inputs.items() if role == "seed")
    alone = made_of_alone(list(program.graph.nodes), seed, inputs.keys() - {seed})
    return {node.name for node in alone if is_float(node)}


class _Recorder(Interpreter):
    """Keeps what some nodes compute."""

    def __init__(self, module: torch.fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names
        self.seen: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = value
        return value


def digest_of(batches: Sequence[Any]) -> str:
    """SHA-256 over the batches' tensors: bytes, dtypes and shapes, in order."""
    digest = hashlib.sha256()
    for value in pytree.tree_leaves(list(batches)):
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(raw_bytes(value))
    return digest.hexdigest()


def _scalars(specs: Sequence[Any], seed: int) -> dict[str, Tensor]:
    numbers = {"seed": seed, "lr": 0.0, "eps": _EPS}
    return {
        spec.name: torch.full(spec.shape, numbers[spec.role], dtype=getattr(torch, spec.dtype))
        for spec in specs
        if spec.role in numbers
    }


def named_batch(manifest: Manifest, number: int, batch: Any, argument: str = "calibration") -> dict[str, Tensor]:
    """Batch `number` of those given as `argument`, by the names of the batch's inputs.

    Raises:
        InvalidCalibration: it lacks an input, has one too many, or of another dtype or shape.
    """
    names = manifest.batch.inputs
    if not isinstance(batch, Mapping):
        if not isinstance(batch, Sequence) or len(batch) != len(names):
            raise InvalidCalibration(f"batch {number} should be a tuple or mapping of {', '.join(names)}", argument)
        batch = dict(zip(names, batch, strict=True))
    if set(batch) != set(names):
        found = ", ".join(batch) or "nothing"
        raise InvalidCalibration(f"batch {number} has {found}; expected {', '.join(names)}", argument)
    specs = {spec.name: spec for method in manifest.methods.values() for spec in method.inputs if spec.role == "batch"}
    for name, spec in specs.items():
        value = batch[name]
        found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else value
        if found != (expected := f"{spec.dtype}{list(spec.shape)}"):
            raise InvalidCalibration(f"`{name}` of batch {number}: expected {expected}, found {found}", argument)
    return {name: batch[name] for name in names}
