"""What an optimizer is: a step from a gradient, written in tensor operators, with named tensors as its state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mobizo_passes.errors import InputError
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.reverse.values import Tape, Value

#: The state's tensor that counts the steps, int64 [1], if there is one.
COUNT = "optimizer.step"

# torch.nn.utils.clip_grad_norm_ adds it to the norm.
_LEAST_NORM = 1e-6


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Base of all optimizers; an own one defines `kind`, `slots`, `counts` and `step`.

    `weight_decay` is the factor of a tensor's own value in its step; `clip_norm` bounds the Euclidean norm of the
    gradient over all tensors together, as `torch.nn.utils.clip_grad_norm_` does; None: no bound.

    All state starts at zero: for each slot and adapter tensor ``optimizer.SLOT.FQN``, of the tensor's shape, and
    ``optimizer.step``. Raises `InputError` for a number that is out of range.
    """

    weight_decay: float = 0.0
    clip_norm: float | None = None

    #: The name in manifests, in lower_case; the command line writes it with dashes.
    kind: ClassVar[str] = ""
    #: For readers of a picture: the update of an adapter θ.
    formula: ClassVar[str] = ""
    #: What is kept of each tensor.
    slots: ClassVar[tuple[str, ...]] = ()
    #: Whether the steps are counted.
    counts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay, 0.0, math.inf)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, 0.0, math.inf)
            if self.clip_norm == 0:
                raise InputError("clip_norm must be positive, or None for no bound; found 0")

    # What an optimizer defines: its numbers are tensors, or values of a graph, which have the same arithmetic ---------

    def shared(self, lr: Any, count: Any) -> Mapping[str, Any]:
        """Return what is the same for all tensors, from lr [1] and the number of this step, float32 [1] (or None)."""
        return {}

    def step(
        self, value: Any, gradient: Any, state: Mapping[str, Any], lr: Any, shared: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return a tensor's new value, and its new state by slot."""
        raise NotImplementedError

    # What follows from it ----------------------------------------------------------------------------------------

    def state(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state before the first step, name -> tensor."""
        found = {
            f"optimizer.{slot}.{fqn}": torch.zeros(value.shape, dtype=value.dtype)
            for slot in self.slots
            for fqn, value in adapter.items()
        }
        return found | ({COUNT: torch.zeros(1, dtype=torch.int64)} if self.counts else {})

    def stepped(
        self, adapter: Mapping[str, Any], gradients: Mapping[str, Any], state: Mapping[str, Any], lr: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the adapter and the state after a step, from tensors or from values of a graph; lr is float32 [1]."""
        given = self._clipped(gradients)
        count = state[COUNT] + 1 if self.counts else None
        shared = self.shared(lr, None if count is None else count.to(torch.float32))
        new_state: dict[str, Any] = {}
        new: dict[str, Any] = {}
        for fqn, value in adapter.items():
            slots = {slot: state[f"optimizer.{slot}.{fqn}"] for slot in self.slots}
            new[fqn], slots = self.step(value, given[fqn], slots, lr, shared)
            new_state |= {f"optimizer.{slot}.{fqn}": each for slot, each in slots.items()}
        ordered = {name: new_state[name] for name in state if name != COUNT}
        return new, ordered | ({} if count is None else {COUNT: count})

    def _clipped(self, gradients: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.clip_norm is None:
            return gradients
        total: Any = sum((each * each).sum() for each in gradients.values())
        factor = (self.clip_norm * (total.sqrt() + _LEAST_NORM).reciprocal()).clamp_max(1.0)
        return {fqn: each * factor for fqn, each in gradients.items()}

    def manifest(self) -> dict[str, Any]:
        """Return what the manifest says of the optimizer, as plain JSON values."""
        options = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"kind": self.kind, "options": options}

    @property
    def plain(self) -> bool:
        """Whether a step is ``value − lr · gradient``, and nothing else."""
        return False


@dataclass(frozen=True)
class Stepped:
    """What `append_optimizer` added: the outputs of the new adapter and of the new state, in order."""

    adapter: list[tuple[Output, fx.Node]]
    state: list[tuple[Output, fx.Node]]


def append_optimizer(ir: Ir, optimizer: Optimizer, gradients: Sequence[fx.Node], lr: fx.Node) -> Stepped:
    """Append a step of the whole adapter at the insertion point, from one gradient for each adapter input.

    The state becomes inputs, between adapter and batch.
    """
    tape = Tape(ir)
    inputs = {role(node).name: node for node in ir.placeholders("adapter")}
    examples = {fqn: torch.empty(tuple(n.meta["val"].shape), dtype=n.meta["val"].dtype) for fqn, n in inputs.items()}
    after = list(inputs.values())[-1]
    state = {}
    for name, example in optimizer.state(examples).items():
        state[name] = ir.add_input("optimizer", name, example)
        after.append(state[name])
        after = state[name]
    values = [{name: Value(tape, node) for name, node in each.items()} for each in (inputs, state)]
    given = {fqn: Value(tape, node) for fqn, node in zip(inputs, gradients, strict=True)}
    new, new_state = optimizer.stepped(values[0], given, values[1], Value(tape, lr))
    return Stepped(
        [(Output("adapter", fqn), each.node) for fqn, each in new.items()],
        [(Output("optimizer", name), each.node) for name, each in new_state.items()],
    )


def check_optimizer(optimizer: object) -> None:
    """Raise `InputError` unless this is an optimizer."""
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"optimizer must be one of mz.SGD(), mz.Momentum(), mz.AdamW(); found {optimizer!r}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise `InputError` unless low <= value < high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        raise InputError(f"{name} must be a number from {low:g} to below {high:g}, found {value!r}")
