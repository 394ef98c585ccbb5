"""What a worker sends for a step: 28 bytes and 4 for each query, whatever the model's size."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime_driver.format.contributions import Contribution

if TYPE_CHECKING:
    from runtime_driver.format import Manifest

#: Program, step, seed, number of queries, flags, weight, loss; then the projected gradients, all little-endian.
_HEAD = struct.Struct("<8sIIHHff")
_STOP = 1


@dataclass(frozen=True)
class Message:
    """A worker's contribution as it travels.

    Attributes:
        program: 8 bytes that tell programs apart, see :func:`program_tag`.
        step: which step it is for.
        stop: the worker was asked to end the run after this step.
    """

    program: bytes
    step: int
    seed: int
    weight: float
    loss: float
    projected_gradients: tuple[float, ...]
    stop: bool = False

    @classmethod
    def of(cls, program: bytes, step: int, contribution: Contribution, *, stop: bool = False) -> Message:
        """The message that carries a contribution."""
        given = contribution
        return cls(program, step, given.seed, given.weight, given.loss, given.projected_gradients, stop)

    def contribution(self, worker: int) -> Contribution:
        """What it carries, from the worker that sent it."""
        return Contribution(worker, self.seed, self.weight, self.projected_gradients, self.loss)

    def pack(self) -> bytes:
        """The bytes on the wire."""
        gradients = self.projected_gradients
        head = _HEAD.pack(self.program, self.step, self.seed, len(gradients), _STOP * self.stop, self.weight, self.loss)
        return head + struct.pack(f"<{len(gradients)}f", *gradients)

    @classmethod
    def unpack(cls, data: bytes) -> Message:
        """Raises :class:`ValueError` for bytes that are no message."""
        if len(data) < _HEAD.size:
            raise ValueError(f"{len(data)} bytes, expected at least {_HEAD.size}")
        program, step, seed, queries, flags, weight, loss = _HEAD.unpack_from(data)
        if len(data) != _HEAD.size + 4 * queries or flags & ~_STOP:
            raise ValueError(f"{len(data)} bytes with {queries} projected gradients and flags {flags}")
        gradients = struct.unpack_from(f"<{queries}f", data, _HEAD.size)
        return cls(program, step, seed, weight, loss, gradients, bool(flags & _STOP))

    @classmethod
    def asks_to_stop(cls, data: bytes) -> bool:
        """Whether these bytes are a message whose sender was asked to end the run."""
        try:
            return cls.unpack(data).stop
        except ValueError:
            return False


def program_tag(manifest: Manifest) -> bytes:
    """8 bytes that workers of different programs, noises or numbers of queries do not share."""
    text = f"{manifest.program_id}/{manifest.noise.kind}/{manifest.noise.version}/{manifest.estimator.queries}"
    return hashlib.sha256(text.encode()).digest()[:8]


def pack_update(seed: int, lr: float, gradients: Sequence[float]) -> bytes:
    """The bytes of a step that a federated client has missed: 8, and 4 for each query."""
    return struct.pack(f"<If{len(gradients)}f", seed, lr, *gradients)


def unpack_update(data: bytes) -> tuple[int, float, tuple[float, ...]]:
    """What :func:`pack_update` packed."""
    seed, lr, *gradients = struct.unpack(f"<If{(len(data) - 8) // 4}f", data)
    return seed, lr, tuple(gradients)
