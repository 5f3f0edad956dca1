"""Philox4x32-10: random numbers as a pure function of a key and a counter.

Every random choice of the input pipeline is `philox(counter, seed)` with

    counter = (sample, epoch, view, stream << 24 | block)

so a draw depends on what it is for and on nothing else: not on the number of processes, the size of a
micro-batch, the order of calls or where a run was resumed. The functions take numpy arrays on the host
and torch tensors on any device, and `triton.language.philox` computes the same function, so that a kernel
can draw the same numbers.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Streams keep the uses of one (sample, epoch, view) apart. A number, once released, keeps its meaning.
ORDER = 0
CROP = 1
FLIP = 2
ERASE = 3
NOISE = 4
MIX = 5
DROP_PATH = 6
RANDAUGMENT = 7
THREE_AUGMENT = 8
JITTER = 9
REPLACEMENT = 10


def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, key: int) -> tuple[Any, Any, Any, Any]:
    """Four independent 32-bit words for each counter.

    c0..c3: int64 arrays or tensors, broadcastable, at least one-dimensional where they are arrays; values are
    taken modulo 2**32. key: up to 64 bits, low word first. Returns four int64 arrays with values in [0, 2**32).
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1, c2, c3 = (c & _MASK for c in (c0, c1, c2, c3))
    for _ in range(10):
        # The products need 64 bits; a signed overflow wraps, which leaves the bits of both halves right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def counter(stream: int, block: Any = 0) -> Any:
    """The fourth counter word: `block` (below 2**24) numbers the draws inside one stream."""
    return block | stream << 24


def unit(word: Any) -> Any:
    """A 32-bit word as a multiple of 2**-24 in [0, 1): exact in float32 too. float64 for numpy arrays."""
    return (word >> 8) * 2.0**-24


def normal_pair(u_a: Any, u_b: Any, maths: Any = np) -> tuple[Any, Any]:
    """Two independent N(0, 1) values from two uniforms in [0, 1) (Box-Muller); `maths` is numpy or torch."""
    radius = maths.sqrt(-2.0 * maths.log(1.0 - u_a))
    angle = 2.0 * math.pi * u_b
    return radius * maths.cos(angle), radius * maths.sin(angle)


def uniforms(stream: int, sample: Any, epoch: Any, view: Any, seed: int, blocks: int = 1) -> np.ndarray:
    """`blocks` times four uniforms in [0, 1) for every sample: float64 (blocks, 4, samples), on the host."""
    sample, epoch, view = (np.atleast_1d(np.asarray(x, np.int64)) for x in (sample, epoch, view))
    block = np.arange(blocks, dtype=np.int64)[:, None]
    return unit(np.stack(np.broadcast_arrays(*philox4x32(sample, epoch, view, counter(stream, block), seed)), axis=1))
