"""Which contributions count: what a worker sends is checked before it reaches an adapter."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median_low

from runtime_driver.errors import HyperparameterError
from runtime_driver.fleet.messages import Message
from runtime_driver.format.contributions import Contribution

#: Steps whose sizes are remembered.
_MEMORY = 32
#: Fewer workers, or fewer steps, say nothing about what is absurd.
_FEW = 3


@dataclass(frozen=True)
class Refusal:
    """A contribution that does not count, and why."""

    worker: int
    step: int
    reason: str

    def __str__(self) -> str:
        return f"worker {self.worker}, step {self.step}: {self.reason}"


class Gate:
    """Refuses what is malformed, of another program or step, not finite, or absurdly large.

    Which contributions count is a function of them and of the accepted ones before: every worker that checks the same
    ones, also after a resume from the journal, decides alike.
    """

    def __init__(self, program: bytes, queries: int, limit: float | None = 20.0) -> None:
        """A gate for one run.

        Args:
            program: its tag, see :func:`runtime_driver.fleet.messages.program_tag`.
            queries: how many projected gradients a contribution has.
            limit: how many times larger than usual a projected gradient or a weight may be. Usual is the second largest
                of a step's workers, which no single one can raise; for gradients, the median of it over the last 32
                steps. Where more than half exceed it, it is the run that changed, and all count. None: anything finite
                counts.

        Raises:
            HyperparameterError: ``limit`` is not above 1.
        """
        if limit is not None and not limit > 1:
            raise HyperparameterError("limit", "a number > 1, or None", limit)
        self._program, self._queries, self._limit = program, queries, limit
        self._sizes: deque[float] = deque(maxlen=_MEMORY)
        #: How many contributions of each worker were refused.
        self.refused: Counter[int] = Counter()

    def check(
        self, step: int, messages: Mapping[int, bytes], seed_of: Callable[[int], int]
    ) -> tuple[tuple[Contribution, ...], list[Refusal]]:
        """The contributions that count, in the order of their workers, and the others' refusals.

        Args:
            messages: as they arrived, by worker.
            seed_of: the seed that a worker has to have used.
        """
        found: dict[int, Contribution] = {}
        reasons: dict[int, str] = {}
        for worker in sorted(messages):
            try:
                message = Message.unpack(messages[worker])
            except ValueError as error:
                reasons[worker] = f"not a contribution: {error}"
                continue
            reason = self._fault(step, message, seed_of(worker))
            if reason:
                reasons[worker] = reason
            else:
                found[worker] = message.contribution(worker)
        for what, value, before in (("a projected gradient", _size, self._sizes), ("a weight", _weight, ())):
            usual = _usual([value(each) for each in found.values()], before)
            over = [worker for worker, each in found.items() if usual and value(each) > (self._limit or inf) * usual]
            if usual and 2 * len(over) <= len(found):
                for worker in over:
                    large = value(found.pop(worker))
                    reasons[worker] = f"{what} of {large:.3g}, {large / usual:.0f} times the usual"
        self.refused.update(reasons.keys())
        return tuple(found.values()), [Refusal(worker, step, reasons[worker]) for worker in sorted(reasons)]

    def learn(self, contributions: Sequence[Contribution]) -> None:
        """Remember the size of what a step of the journal accepted; in the order of the steps."""
        self._sizes.append(_second([_size(each) for each in contributions]))

    def _fault(self, step: int, message: Message, seed: int) -> str:
        """What is wrong with a message taken alone."""
        if message.program != self._program:
            return "of another program"
        if message.step != step:
            return f"for step {message.step}"
        if len(message.projected_gradients) != self._queries:
            return f"{len(message.projected_gradients)} projected gradients, expected {self._queries}"
        if message.seed != seed:
            return f"with the seed {message.seed}, expected {seed}"
        if not all(map(math.isfinite, (*message.projected_gradients, message.loss))):
            return f"a loss of {message.loss:.3g} and projected gradients, not all finite"
        if not (math.isfinite(message.weight) and message.weight > 0):
            return f"a weight of {message.weight:.3g}"
        return ""


def _second(values: Sequence[float]) -> float:
    """The second largest: what one alone can't raise, and few fall far below."""
    return sorted(values)[-2:][0]


def _usual(now: Sequence[float], before: Iterable[float]) -> float | None:
    known = [*before, *([_second(now)] if len(now) >= _FEW else ())]
    return median_low(known) if len(now) >= _FEW or len(known) >= _FEW else None


def _size(contribution: Contribution) -> float:
    return max(map(abs, contribution.projected_gradients))


def _weight(contribution: Contribution) -> float:
    return contribution.weight
