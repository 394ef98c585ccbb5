"""What autograd says of a loss, and how close to it a program's derivatives have to be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobizo_passes import reference
from mobizo_passes.capture.inputs import LossFn
from mobizo_passes.errors import VerificationFailed

# Fused and sequential forwards sum in different orders; float32 keeps the losses this close, relative to their size.
LOSS_TOLERANCE = 2e-5
# Derivatives: float32 keeps a chain of products and sums this close to float64, relative to the largest entry and
# with a floor for gradients that cancel to nothing; or no further from it than a few times autograd's own float32 is.
GRADIENT_TOLERANCE = 1e-5
GRADIENT_FLOOR = 1e-7
# Where the model itself overflows in float64, float32's gradient has to do, and both sides round.
ROUNDED_TOLERANCE = 1e-4
AUTOGRADS_ERROR = 8.0


@dataclass(frozen=True)
class Autograd:
    """The loss of the untransformed model and its gradients, in the `precision` that they were computed in.

    `rounded` are the gradients as float32 gives them.
    """

    loss: Tensor
    gradients: Mapping[str, Tensor]
    rounded: Mapping[str, Tensor]
    tolerance: float = GRADIENT_TOLERANCE
    precision: str = "float64"

    @classmethod
    def of(
        cls, model: nn.Module, example_inputs: Any, adapter: Mapping[str, Tensor], loss_fn: LossFn | None = None
    ) -> Autograd:
        """Differentiate in float64.

        A model that is finite in float32 alone (masks of the dtype's smallest number, to which scores are added,
        overflow where they are wide), or that asks for float32 itself, is differentiated in float32.
        """
        narrow, rounded = reference.gradients_of(model, example_inputs, adapter, loss_fn)
        try:
            loss, exact = reference.gradients_of(model, example_inputs, adapter, loss_fn, torch.float64)
        except RuntimeError:  # dtypes meet that differ
            loss, exact = narrow.new_tensor(float("nan")), rounded
        if narrow.isfinite() and not loss.isfinite():
            return cls(narrow, rounded, rounded, ROUNDED_TOLERANCE, "float32")
        return cls(loss, exact, rounded)

    def check_gradients(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Raise `VerificationFailed` unless a program's loss and gradient, FQN -> tensor, are these."""
        self._check_loss(loss)
        for fqn, want in self.gradients.items():
            limit = self.tolerance * float(want.abs().max()) + GRADIENT_FLOOR
            limit = max(limit, AUTOGRADS_ERROR * float((self.rounded[fqn] - want).abs().max()))
            difference = float((gradients[fqn] - want).abs().max())
            if not difference <= limit:
                raise VerificationFailed(
                    f"site '{fqn}': its gradient is off by {difference:.3g} from autograd's in {self.precision}, of at "
                    f"most {float(want.abs().max()):.3g} (tolerance {limit:.2g})"
                )

    def check_directional(self, loss: Tensor, derivatives: Tensor, z: Mapping[str, Tensor]) -> None:
        """Raise `VerificationFailed` unless a program's loss and its derivatives along z are these.

        derivatives: [q]; z: FQN -> [q, *shape].

        A derivative along z ~ N(0, I) is about as large as the gradient's norm: the tolerance is relative to that.
        """
        self._check_loss(loss)
        want, rounded = reference.along(self.gradients, z), reference.along(self.rounded, z)
        norm = math.sqrt(sum(float(each.double().square().sum()) for each in self.gradients.values()))
        floor = GRADIENT_FLOOR * math.sqrt(sum(each.numel() for each in self.gradients.values()))
        limit = max(self.tolerance * norm + floor, AUTOGRADS_ERROR * float((rounded - want).abs().max()))
        for i, (a, b) in enumerate(zip(derivatives.tolist(), want.tolist(), strict=True)):
            if not abs(a - b) <= limit:
                raise VerificationFailed(
                    f"projected gradient of query {i}: the program gives {a}, autograd in {self.precision} {b} "
                    f"(tolerance {limit:.2g})"
                )

    def _check_loss(self, found: Tensor) -> None:
        loss = float(self.loss)
        scale = LOSS_TOLERANCE * max(1.0, abs(loss))
        if not abs(float(found) - loss) <= scale:
            raise VerificationFailed(
                f"the loss: the program gives {float(found)}, the reference {loss} (tolerance {scale:.2g})"
            )
