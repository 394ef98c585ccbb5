"""The seed of each step, as a pure function of the run's seed and the step number."""

from __future__ import annotations

from runtime_driver.format.errors import HyperparameterError

_MASK31 = (1 << 31) - 1
_MASK64 = (1 << 64) - 1


def _splitmix64(state: int) -> int:
    """Steele, Lea and Flood's finalizer: a bijection of 64-bit integers that scatters neighbours."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def step_seed(run_seed: int, step: int) -> int:
    """The seed handed to the program at ``step``: ``0 <= seed < 2**31``.

    Two keys are drawn from ``run_seed`` by splitmix64. For fixed keys the map from step to seed is a bijection of
    31-bit integers (xor, odd multiplication and xor-shift are each invertible), so no two steps of a run ever share
    their noise, which a plain 31-bit hash would not guarantee.

    Raises:
        HyperparameterError: ``run_seed`` is not in ``[0, 2**63)`` or ``step`` not in ``[0, 2**31)``.
    """
    if not 0 <= run_seed < 1 << 63:
        raise HyperparameterError("seed", "an integer in [0, 2**63)", run_seed)
    if not 0 <= step <= _MASK31:
        raise HyperparameterError("step", "an integer in [0, 2**31)", step)
    first = _splitmix64(run_seed)
    second = _splitmix64(first)
    value = step ^ (first & _MASK31)
    value = (value * ((first >> 32) | 1)) & _MASK31
    value ^= value >> 15
    value = (value * ((second >> 32) | 1)) & _MASK31
    value ^= value >> 13
    value = (value * (second | 1)) & _MASK31
    return value ^ (value >> 16)


def worker_seed(run_seed: int, step: int, worker: int) -> int:
    """The seed of one of several workers that share a batch and draw queries of their own; worker 0 has the step's.

    No two steps or workers of a run share their noise.

    Raises:
        HyperparameterError: ``step`` is not in ``[0, 2**24)`` or ``worker`` not in ``[0, 128)``.
    """
    if not 0 <= step < 1 << 24:
        raise HyperparameterError("step", "an integer in [0, 2**24) where workers have queries of their own", step)
    if not 0 <= worker < 128:
        raise HyperparameterError("worker", "an integer in [0, 128)", worker)
    return step_seed(run_seed, worker << 24 | step)
