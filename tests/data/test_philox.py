"""Philox against Random123's published vectors, on numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from deitfast.data import philox

# Random123's known answers for philox4x32-10: counter, key (low word first), result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
@pytest.mark.parametrize(
    "make", [lambda x: np.array([x], np.int64), lambda x: torch.tensor([x])], ids=["numpy", "torch"]
)
def test_known_answers(counter, key, expected, make):
    words = philox.philox4x32(*map(make, counter), key[0] | key[1] << 32)
    assert tuple(int(w[0]) for w in words) == expected


def test_uniforms_and_normals_have_their_distribution():
    u = philox.uniforms(philox.CROP, np.arange(4000), 3, 1, seed=5, blocks=2)
    assert u.shape == (2, 4, 4000)
    assert 0 <= u.min() <= u.max() < 1
    assert stats.kstest(u.reshape(-1), "uniform").pvalue > 0.01
    a, b = philox.normal_pair(u[0, 0], u[0, 1])
    assert stats.kstest(np.concatenate([a, b]), "norm").pvalue > 0.01
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_every_part_of_the_counter_and_the_seed_matters():
    base = philox.uniforms(philox.CROP, 7, 2, 1, seed=3)
    others = [
        philox.uniforms(philox.FLIP, 7, 2, 1, seed=3),
        philox.uniforms(philox.CROP, 8, 2, 1, seed=3),
        philox.uniforms(philox.CROP, 7, 3, 1, seed=3),
        philox.uniforms(philox.CROP, 7, 2, 2, seed=3),
        philox.uniforms(philox.CROP, 7, 2, 1, seed=4),
        philox.uniforms(philox.CROP, 7, 2, 1, seed=3 + (1 << 40)),
    ]
    assert all(not np.array_equal(base, other) for other in others)
