"""One adapter and the methods of its program, run with their inputs bound by role and name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from runtime_driver import finite, optimizer_state
from runtime_driver.batches import BatchBinder
from runtime_driver.errors import BatchError, InternalStateError, MissingMethodError
from runtime_driver.results import StepOutput

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.batches import Batch
    from runtime_driver.format import Manifest
    from runtime_driver.format.records import Record
    from runtime_driver.program import LoadedProgram


class Executor:
    """What a session and a training run both stand on.

    `adapter` is the current adapter, trainable tensors by FQN in the manifest's order; whoever assigns it has checked
    it. `optimizer` is the optimizer's state beside it. `initial` and `frozen` are the tensors stored in the program.
    """

    def __init__(self, program: LoadedProgram) -> None:
        """Take the initial adapter. Raises :class:`AdapterError` if what is stored is not what the manifest says."""
        self.program = program
        self.manifest: Manifest = program.manifest
        self.binder = BatchBinder(self.manifest)
        stored = program.initial_adapter()
        self.initial = {spec.fqn: stored[spec.fqn] for spec in self.manifest.trainable_adapter}
        self.frozen = {spec.fqn: stored[spec.fqn] for spec in self.manifest.frozen_adapter}
        self.adapter = dict(self.initial)
        self.optimizer = self.fresh_optimizer()
        # The adapter that a loaded `step` holds, if it holds one; None while it is not known.
        self._inside: dict[str, Tensor] | None = self.initial

    @property
    def exact(self) -> bool:
        """Whether a step follows the exact gradient: without seed and epsilon, and not known from few numbers."""
        return self.manifest.estimator.queries == 0

    @property
    def perturbs(self) -> bool:
        """Whether a step takes differences of losses, and so an epsilon."""
        return any(item.role == "eps" for item in self.manifest.methods["step"].inputs)

    def fresh_optimizer(self) -> dict[str, Tensor]:
        """The optimizer's state before the first step."""
        return optimizer_state.fresh(self.manifest)

    @property
    def state(self) -> dict[str, Tensor]:
        """Adapter and optimizer's state together: all that the next step goes on from."""
        return {**self.adapter, **self.optimizer}

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Make this the current state."""
        self.adapter, self.optimizer = self._apart(state)

    def _apart(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {fqn: state[fqn] for fqn in self.initial}, {name: state[name] for name in self.optimizer}

    def step(
        self, inputs: Mapping[str, Tensor], seed: int, lr: float, eps: float, number: int | None = None
    ) -> StepOutput:
        """Run ``step`` on bound inputs; the current state stays. ``number`` is the step's, for messages.

        What the program does not take counts for nothing: an exact step neither ``seed`` nor ``eps``, one of
        directional derivatives no ``eps``.

        Raises:
            NonFiniteLossError, NonFiniteAdapterError, InternalStateError.
        """
        self.check_state()
        self._inside = None
        out = self._run("step", self.state, inputs, {"seed": seed, "lr": lr, "eps": eps})
        loss = float(out["loss"][0])
        given = out.get("projected_gradients", ())
        gradients = tuple(float(value) for tensor in given for value in tensor.tolist())
        losses = tuple(float(value) for tensor in out.get("losses", ()) for value in tensor.tolist())
        first = number == 0 or _equal(self.adapter, self.initial)
        finite.check_step(number, loss, losses, gradients, inputs, before_any_update=first)
        if self.manifest.adapter_state == "external":
            adapter = self._named(out["adapter"])
            finite.check_adapter(adapter, number)
        else:
            # The same update on the same bits as inside the step.
            adapter = self._inside = self.apply(self.adapter, seed, lr, gradients, number)
        optimizer = dict(zip(self.optimizer, out.get("optimizer", ()), strict=True))
        return StepOutput(loss, losses, gradients, adapter, optimizer)

    def apply(
        self,
        state: Mapping[str, Tensor],
        seed: int,
        lr: float,
        projected_gradients: Sequence[float],
        number: int | None = None,
    ) -> dict[str, Tensor]:
        """The state after a step with these scalars. Raises :class:`NonFiniteAdapterError`."""
        scalars = {"seed": seed, "lr": lr, "projected_gradients": list(projected_gradients)}
        out = self._run("apply", state, {}, scalars)
        result = self._named(out["adapter"])
        finite.check_adapter(result, number)
        return {**result, **dict(zip(self.optimizer, out.get("optimizer", ()), strict=True))}

    def apply_record(self, state: dict[str, Tensor], record: Record) -> dict[str, Tensor]:
        """The state after a journal record's step. Raises :class:`NonFiniteAdapterError`."""
        for seed, lr, gradients in record.updates:
            state = self.apply(state, seed, lr, gradients, record.step)
        return state

    def loss_outputs(self, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """Every output of the ``loss`` method for a batch, by name, and how many of its rows are real.

        Raises:
            BatchError, LabelError: the batch does not fit.
        """
        inputs, rows = self.binder.bind("loss", batch, partial=True)
        roles = {role: iter(tensors) for role, tensors in self._run("loss", self.adapter, inputs).items()}
        return {item.name: next(roles[item.role]) for item in self.manifest.methods["loss"].outputs}, rows

    def predict(self, batch: Batch) -> Tensor:
        """The logits of a batch, as many rows as it has. Raises :class:`BatchError`."""
        inputs, rows = self.binder.bind("logits", batch, partial=True)
        logits = self._run("logits", self.adapter, inputs)["logits"][0]
        dim = self.manifest.batch.logits_dim
        if rows == self.manifest.batch.size:
            return logits
        if dim is None:
            raise BatchError(
                "(all)",
                f"the batch has {rows} rows, the program takes {self.manifest.batch.size}, and its logits hold the "
                "batch together with something else",
                "Fill the batch up, and leave out what belongs to the rows that you added.",
            )
        return logits.narrow(dim, 0, rows)

    def check_state(self) -> None:
        """Check that a step would train the current adapter, which a program may hold inside.

        The initial adapter can always be had again, by loading ``step`` anew.

        Raises:
            InternalStateError: the program holds another adapter.
        """
        if self.manifest.adapter_state == "external":
            return
        inside = self._inside if "step" in self.program.resident_methods() else self.initial
        if _equal(inside, self.adapter):
            return
        if not _equal(self.initial, self.adapter):
            raise InternalStateError
        self.program.release("step")

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.initial, tensors, strict=True))

    def _run(
        self,
        method: str,
        state: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        scalars: Mapping[str, int | float | list[float]] | None = None,
    ) -> dict[str, list[Tensor]]:
        """Run a method with its inputs bound by role and name; outputs by role."""
        import torch

        spec = self.manifest.methods.get(method)
        if spec is None:
            raise MissingMethodError(method, sorted(self.manifest.methods))
        tensors: list[Tensor] = []
        for item in spec.inputs:
            if item.role in ("adapter", "optimizer"):
                tensors.append(state[item.name])
            elif item.role == "batch":
                tensors.append(inputs[item.name])
            else:
                value = torch.tensor((scalars or {})[item.role], dtype=getattr(torch, item.dtype))
                tensors.append(value.reshape(item.shape))
        outputs: dict[str, list[Tensor]] = {}
        for item, tensor in zip(spec.outputs, self.program.execute(method, tensors), strict=True):
            outputs.setdefault(item.role, []).append(tensor)
        return outputs


def clones(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of an adapter's tensors."""
    return {fqn: tensor.clone() for fqn, tensor in adapter.items()}


def _equal(left: Mapping[str, Tensor] | None, right: Mapping[str, Tensor]) -> bool:
    import torch

    return left is right or (left is not None and all(torch.equal(left[fqn], right[fqn]) for fqn in right))
