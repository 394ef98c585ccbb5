"""Noise as a pure function ``z = noise(seed, query, site, element)``, written in integer tensor operations.

A 32-bit avalanche hash runs in int64 (its constants stay below 2^31, so no product overflows); a Gaussian value is a
16-bit lane of the hash looked up in a table of normal quantiles, a Rademacher value is one bit of it. There is no
floating-point transcendental, so eager PyTorch and every runtime give the same bits. See docs/adr/0002.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mobizo_passes.errors import InputError

VERSION = 1
KINDS = ("gaussian", "rademacher")

_MASK = 0xFFFFFFFF
_M1, _M2 = 0x21F0AAAD, 0x735A2D97
_GOLDEN = 0x9E3779B9
_TABLE_BITS = 16
# Lanes that one 32-bit hash yields: two 16-bit table indices, or sixteen single bits.
_LANES = {"gaussian": 2, "rademacher": 16}


@functools.cache
def quantile_table() -> Tensor:
    """Return the 2^16 mid-point quantiles of N(0, 1), float32 [65536], rescaled to variance exactly 1."""
    size = 1 << _TABLE_BITS
    # Evaluate the lower half and mirror it: the mean is then zero by construction, not by rounding.
    lower = torch.special.ndtri((torch.arange(size // 2, dtype=torch.float64) + 0.5) / size)
    table = torch.cat([lower, -lower.flip(0)])
    return (table / table.square().mean().sqrt()).to(torch.float32)


def _shift(x: Tensor, bits: int) -> Tensor:
    # `x >> bits` would export as __rshift__, which ExecuTorch's runtime does not have.
    return torch.bitwise_right_shift(x, bits)


def _avalanche(x: Tensor, add: Tensor | int) -> Tensor:
    """Mix int64 values in [0, 2^32) to int64 values in [0, 2^32); `add` enters between the two rounds."""
    x = torch.bitwise_xor(x, _shift(x, 16))
    x = torch.bitwise_and(x * _M1 + add, _MASK)
    x = torch.bitwise_xor(x, _shift(x, 15))
    x = torch.bitwise_and(x * _M2, _MASK)
    return torch.bitwise_xor(x, _shift(x, 15))


def _keys(seed: Tensor, sites: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return two 32-bit keys, int64 [sites, queries], from seed int64 [1]: 64 key bits keep streams apart."""
    low = torch.bitwise_and(seed, _MASK)
    high = torch.bitwise_and(_shift(seed, 32), _MASK)
    base = _avalanche(torch.bitwise_xor(low, _avalanche(high, _GOLDEN)), 1)
    site = _avalanche(torch.bitwise_xor(sites.unsqueeze(1), base), base)
    first = _avalanche(torch.bitwise_xor(queries.unsqueeze(0), site), base)
    second = _avalanche(torch.bitwise_xor(first, site), _GOLDEN)
    return first, second


def draw(seed: Tensor, sites: Tensor, table: Tensor | None, queries: int, numel: int, kind: str) -> Tensor:
    """Return z, float32 [sites, queries, numel], from seed int64 [1], ids int64 [sites] and the quantile table.

    The table is an operand, so that a compiled program holds it once. It is read for Gaussian noise only.
    """
    lanes = _LANES[kind]
    device = seed.device
    first, second = _keys(seed, sites, torch.arange(queries, device=device))
    counter = torch.arange(math.ceil(numel / lanes), device=device)
    bits = _avalanche(torch.bitwise_xor(first.unsqueeze(2), counter), second.unsqueeze(2)).unsqueeze(3)
    if kind == "gaussian" and table is not None:
        # Element e takes lane e mod 2 of hash e div 2, so its value does not depend on the site's size.
        index = torch.cat([torch.bitwise_and(bits, 0xFFFF), _shift(bits, 16)], dim=3)
        z = torch.index_select(table, 0, index.reshape(-1))
    else:
        lane = torch.arange(16, 16 + lanes, device=device)
        z = torch.bitwise_and(torch.bitwise_right_shift(bits, lane), 1).to(torch.float32) * 2.0 - 1.0
    return z.reshape(sites.shape[0], queries, -1)[:, :, :numel]


def noise_stack(seed: Tensor, sites: Sequence[int], queries: int, numel: int, kind: str) -> Tensor:
    """Return z for several sites of `numel` elements each, float32 [len(sites), queries, numel].

    `seed` is int64 [1]; `sites` are 32-bit ids (see `site_ids`). Raises `InputError` for an unknown `kind`.
    """
    if kind not in KINDS:
        raise InputError(f"noise must be one of {', '.join(KINDS)}; found {kind!r}")
    ids = torch.tensor(list(sites), dtype=torch.int64, device=seed.device)
    return draw(seed, ids, quantile_table().to(seed.device), queries, numel, kind)


def noise(seed: Tensor, site: int, queries: int, shape: Sequence[int], kind: str = "gaussian") -> Tensor:
    """Return z for one site, float32 [queries, *shape]; a pure function of its arguments.

    `seed` is int64 [1]. Raises `InputError` for an unknown `kind`.
    """
    return noise_stack(seed, [site], queries, math.prod(shape), kind).reshape(queries, *shape)


def site_ids(fqns: Iterable[str]) -> dict[str, int]:
    """Return a stable 32-bit id per trainable tensor: CRC-32 of its FQN, bumped on collision in sorted order.

    A site keeps its noise when other sites come or go, so devices that train different subsets still agree.
    """
    taken: set[int] = set()
    ids: dict[str, int] = {}
    for fqn in sorted(fqns):
        candidate = zlib.crc32(fqn.encode())
        while candidate in taken:
            candidate = (candidate + 1) & _MASK
        taken.add(candidate)
        ids[fqn] = candidate
    return ids
