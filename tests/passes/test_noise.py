"""Noise: a pure function with pinned bits and the statistics of N(0, 1) and of ±1.

Statistical bounds are five standard errors of the estimate: at fixed seeds they either hold for ever or never.
"""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes import noise as noise_module
from mobizo_passes.noise import noise, noise_stack, quantile_table, site_ids
from mobizo_passes.testing import strategies

SITE = 123456789
MANY = 1 << 16
FIVE = 5 / math.sqrt(MANY)


def at(seed: int) -> Tensor:
    return torch.tensor([seed], dtype=torch.int64)


def sample(kind: str, seed: int = 0, site: int = SITE, queries: int = 1, size: int = MANY) -> Tensor:
    return noise(at(seed), site, queries, [size], kind)


def correlation(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).mean())


# Pinned bits: any change here breaks every journal ever written, and needs a new noise version. --------------------


def test_pinned_gaussian_values() -> None:
    assert noise_module.VERSION == 1
    assert noise(at(42), SITE, 2, [4], "gaussian").tolist() == [
        [-0.46941184997558594, -0.1715988665819168, -0.13745687901973724, -0.46646735072135925],
        [-1.1102608442306519, 1.4390827417373657, 0.01956535503268242, 0.3152441084384918],
    ]
    assert noise(at(-7), 1, 1, [3]).tolist() == [[0.21626727283000946, -1.3357807397842407, -0.06792415678501129]]
    assert noise(at(2**40 + 3), 1, 1, [3]).tolist() == [[0.24375973641872406, 0.8308163285255432, -1.271294355392456]]


def test_pinned_rademacher_values() -> None:
    assert noise(at(42), SITE, 2, [8], "rademacher").tolist() == [
        [1, 1, 1, 1, -1, -1, -1, 1],
        [-1, -1, -1, 1, -1, -1, 1, 1],
    ]


def test_pinned_table_and_stream() -> None:
    table = hashlib.sha256(quantile_table().numpy().tobytes()).hexdigest()
    assert table == "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
    stream = hashlib.sha256(noise(at(0), 5, 4, [1 << 15]).numpy().tobytes()).hexdigest()
    assert stream == "6227398b73a7b08b881551d812f520baa7f01210a44128635eac4dc5b2c6f436"


def test_the_table_is_standard() -> None:
    table = quantile_table().double()
    assert table.shape == (65536,)
    assert float(table.mean()) == 0.0
    assert float(table.square().mean()) == pytest.approx(1.0, abs=1e-7)
    assert torch.equal(table, -table.flip(0))
    assert bool((table.diff() > 0).all())


# Purity ------------------------------------------------------------------------------------------------------------


@given(seed=strategies.seeds(), site=st.integers(0, 2**32 - 1), kind=strategies.noise_kinds(), size=st.integers(1, 70))
def test_the_same_bits_twice_and_for_any_number_of_queries(seed: int, site: int, kind: str, size: int) -> None:
    few, many = noise(at(seed), site, 2, [size], kind), noise(at(seed), site, 8, [size], kind)
    assert torch.equal(noise(at(seed), site, 2, [size], kind), few)
    assert torch.equal(few, many[:2])


@given(seed=strategies.seeds(), kind=strategies.noise_kinds(), size=st.integers(1, 70), more=st.integers(1, 70))
def test_an_element_does_not_depend_on_the_size_of_its_site(seed: int, kind: str, size: int, more: int) -> None:
    assert torch.equal(sample(kind, seed, size=size), sample(kind, seed, size=size + more)[:, :size])


@given(
    seed=strategies.seeds(),
    kind=strategies.noise_kinds(),
    sites=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
)
def test_a_site_does_not_depend_on_the_others(seed: int, kind: str, sites: list[int]) -> None:
    stacked = noise_stack(at(seed), sites, 2, 12, kind)
    for one, site in zip(stacked, sites, strict=True):
        assert torch.equal(one, noise(at(seed), site, 2, [3, 4], kind).reshape(2, 12))


def test_the_shape_orders_elements_row_major() -> None:
    assert torch.equal(noise(at(1), SITE, 2, [3, 5]).reshape(2, 15), noise(at(1), SITE, 2, [15]))


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample("gaussian", size=10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(sample("gaussian", size=10), first)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 1, -(2**63), 2**63 - 1])
def test_all_64_bits_of_a_seed_count(seed: int) -> None:
    others = [0, 1, 2**31, -2, seed ^ 1, seed ^ (1 << 40)]
    one = sample("gaussian", seed, size=64)
    assert all(not torch.equal(one, sample("gaussian", other, size=64)) for other in others)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(mz.InputError, match="gaussian, rademacher; found 'uniform'"):
        noise(at(0), 1, 1, [2], "uniform")


# Statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 987654321])
def test_gaussian_moments(seed: int) -> None:
    z = sample("gaussian", seed).double().flatten()
    # Standard errors for N(0,1): mean 1, square sqrt(2), cube sqrt(15), fourth power sqrt(96), each over sqrt(n).
    assert abs(float(z.mean())) < FIVE
    assert abs(float(z.square().mean()) - 1) < math.sqrt(2) * FIVE
    assert abs(float(z.pow(3).mean())) < math.sqrt(15) * FIVE
    assert abs(float(z.pow(4).mean()) - 3) < math.sqrt(96) * FIVE


@pytest.mark.parametrize("seed", [0, 5, 2**50])
def test_gaussian_distribution(seed: int) -> None:
    """Kolmogorov-Smirnov against the exact CDF: sqrt(n)·D above 2.0 has a probability below 1e-3."""
    z = sample("gaussian", seed).double().flatten().sort().values
    exact = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    n = z.numel()
    above = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum((above - exact).abs(), (above - 1 / n - exact).abs()).max())
    assert distance * math.sqrt(n) < 2.0


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 987654321])
def test_rademacher_is_fair_in_every_lane(seed: int) -> None:
    z = sample("rademacher", seed).flatten()
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(z.mean())) < FIVE
    lanes = z.reshape(-1, 16).mean(0)
    assert float(lanes.abs().max()) < 5 / math.sqrt(MANY / 16)


@pytest.mark.parametrize("kind", noise_module.KINDS)
def test_queries_are_independent(kind: str) -> None:
    z = sample(kind, queries=6)
    for i in range(6):
        for j in range(i):
            assert abs(correlation(z[i], z[j])) < FIVE


@pytest.mark.parametrize("kind", noise_module.KINDS)
def test_neighbouring_seeds_are_independent(kind: str) -> None:
    streams = [sample(kind, seed) for seed in (-2, -1, 0, 1, 2, 3, 2**32, 2**33, -(2**32))]
    assert all(abs(correlation(a, b)) < FIVE for a, b in pairwise(streams))
    assert all(abs(correlation(streams[2], other)) < FIVE for other in streams[3:])


@pytest.mark.parametrize("kind", noise_module.KINDS)
def test_neighbouring_sites_are_independent(kind: str) -> None:
    streams = [sample(kind, site=site) for site in (0, 1, 2, 3, 2**31, 2**32 - 1)]
    assert all(abs(correlation(a, b)) < FIVE for a, b in pairwise(streams))


@pytest.mark.parametrize("kind", noise_module.KINDS)
@pytest.mark.parametrize("lag", [1, 2, 3, 8, 15, 16, 17, 32, 256])
def test_elements_are_independent(kind: str, lag: int) -> None:
    z = sample(kind).flatten()
    assert abs(correlation(z[lag:], z[:-lag])) < FIVE * 1.01


def test_a_seed_and_a_query_do_not_trade_places() -> None:
    """Query i of seed s must not be query j of another seed: a step would repeat an earlier direction."""
    rows = torch.cat([sample("gaussian", seed, queries=4, size=16) for seed in range(64)])
    assert len({tuple(row) for row in rows.tolist()}) == 64 * 4


# Site ids ----------------------------------------------------------------------------------------------------------


def test_site_ids_are_stable_and_do_not_depend_on_the_others() -> None:
    assert site_ids(["b", "a"]) == {"a": 3904355907, "b": 1908338681}
    assert site_ids(["a", "other", "b"])["b"] == 1908338681


def test_colliding_site_ids_are_bumped() -> None:
    # A well-known pair with one CRC-32.
    ids = site_ids(["plumless", "buckeroo"])
    assert ids == {"buckeroo": 1306201125, "plumless": 1306201126}
    assert site_ids(["buckeroo", "plumless"]) == ids


@given(st.lists(st.text(max_size=8), unique=True, max_size=30))
def test_site_ids_are_unique_32_bit_numbers(names: list[str]) -> None:
    ids = site_ids(names)
    assert set(ids) == set(names)
    assert len(set(ids.values())) == len(names)
    assert all(0 <= i < 2**32 for i in ids.values())
