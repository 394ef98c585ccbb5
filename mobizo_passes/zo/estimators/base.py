"""What an estimator is, and the list of those that programs may be made with."""

from __future__ import annotations

from typing import TypeVar

from mobizo_passes.batching import Batch
from mobizo_passes.errors import InputError
from mobizo_passes.passes import (
    AppendOptimizer,
    AppendUpdate,
    ExpandPerturbations,
    InsertMpLora,
    InsertNoise,
    Pass,
    RegroupLoss,
)
from mobizo_passes.zo.optimizers import Optimizer
from mobizo_passes.zo.scheme import Scheme, register, registered, registered_kinds, unregister


class Estimator(Scheme):
    """Base of all estimators; a class of your own defines `kind`, `offsets` and `differences`, and is registered.

        @mz.register_estimator
        class Backward(mz.Estimator):
            kind = "backward"

            @property
            def offsets(self):
                return ((0, 0), *((i, -1) for i in range(self.queries)))

            def differences(self, losses, eps):
                return (losses[:1] - losses[1:]) / eps

    `copies` and `formula` say the same to the readers of a picture.
    """

    def loss_passes(self, batch: Batch, batch_dim: int) -> tuple[Pass, ...]:
        """Return the passes that turn the loss into what `step_passes` start from: one loss per group, of one group.

        `batch` says where the inputs hold the batch; `batch_dim` where a value is taken to that tracking lost.
        """
        return (InsertMpLora(batch, batch_dim), RegroupLoss())

    def step_passes(self, noise: str, optimizer: Optimizer) -> tuple[Pass, ...]:
        """Return the passes that turn one loss per group, of one group yet, into the readable training step.

        Of an estimator that is not `projected` they start from the loss and its gradient.
        """
        return (InsertNoise(self.queries, noise), ExpandPerturbations(self), *self._closing(optimizer))

    def apply_passes(self, noise: str, optimizer: Optimizer) -> tuple[Pass, ...]:
        """Return the passes that turn adapter and projected gradients into the new adapter."""
        return (InsertNoise(self.queries, noise), *self._closing(optimizer))

    def _closing(self, optimizer: Optimizer) -> tuple[Pass, ...]:
        if optimizer.plain:
            return (AppendUpdate(self),)
        return (AppendUpdate(self, update=False), AppendOptimizer(optimizer))


E = TypeVar("E", bound=type[Estimator])


def register_estimator(cls: E) -> E:
    """Let programs be made with an estimator class, in Python and on the command line; returns it: a decorator.

    The class is tried on small tensors: its copies must be those that `offsets` says, its differences exact where the
    loss is linear. Raises `InputError` if they are not, or its kind is no name in lower_case or is taken.
    """
    if not (isinstance(cls, type) and issubclass(cls, Estimator)):
        raise InputError(f"expected a subclass of Estimator, found {cls!r}")
    register(cls)
    return cls


def unregister_estimator(cls: type[Estimator]) -> None:
    """Take an estimator class off the list again; raises `InputError` if it is not on it."""
    check_registered(cls)
    unregister(cls.kind)


def estimator_kinds() -> dict[str, type[Estimator]]:
    """Return the registered classes by kind, in the order in which they were registered."""
    found = {kind: registered(kind) for kind in registered_kinds()}
    return {kind: cls for kind, cls in found.items() if issubclass(cls, Estimator)}


def check_estimator(estimator: object) -> None:
    """Raise `InputError` unless this is an estimator of a registered class."""
    if not isinstance(estimator, Estimator):
        names = " or ".join(cls.__name__ for cls in estimator_kinds().values())
        raise InputError(f"estimator must be {names}, found {estimator!r}")
    check_registered(type(estimator))


def check_registered(cls: type[Estimator]) -> None:
    """Raise `InputError` unless this class is on the list."""
    if estimator_kinds().get(cls.kind) is not cls:
        raise InputError(f"{cls.__name__} is not registered: call mz.register_estimator({cls.__name__}) first")
