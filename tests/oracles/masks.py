"""Masks by plain stable sorts, in NumPy. Nothing of samkern.

``scores`` and ``g`` are flat float64 arrays, ``mask`` a flat bool array: the concatenation of all tensors.
"""

from __future__ import annotations

import numpy as np


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The k largest scores; ties to the lowest index; NaN below everything."""
    return first_of(np.arange(len(scores)), descending(scores), k, len(scores))


def drop_grow(mask: np.ndarray, g: np.ndarray, n: int, seed: int, t: int, regrow: bool) -> np.ndarray:
    """SSAM-D's move: drops the n active entries with the smallest gradient, then grows as many by random keys."""
    n = min(n, int(mask.sum()), len(mask) if regrow else int((~mask).sum()))
    dropped = first_of(np.flatnonzero(mask), descending(-abs(g)), n, len(mask))
    kept = mask & ~dropped
    return kept | grown(~kept if regrow else ~mask, n, seed, t)


def grown(allowed: np.ndarray, n: int, seed: int, t: int) -> np.ndarray:
    """The n allowed entries with the largest random keys."""
    keys = growth_keys(len(allowed), seed, t).astype(np.float64)
    return first_of(np.flatnonzero(allowed), descending(keys), n, len(allowed))


def descending(x: np.ndarray) -> np.ndarray:
    """All indices, by stable sorts: NaN to the end, numbers from the largest down."""
    return np.lexsort((np.where(np.isnan(x), 0, -x), np.isnan(x)))  # stable; the last key counts most


def first_of(indices: np.ndarray, order: np.ndarray, n: int, length: int) -> np.ndarray:
    """Whether an index is among the n of ``indices`` that come first in ``order``."""
    candidate, chosen = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
    candidate[indices] = True
    chosen[order[candidate[order]][:n]] = True
    return chosen


def bits(mask: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Bytes of a mask: lowest bit first, every tensor from a multiple of 4 bytes on."""
    parts = [np.zeros(0, dtype=np.uint8)]
    for part in np.split(mask, np.cumsum(sizes)[:-1]) if sizes else []:
        packed = np.packbits(part, bitorder="little")
        parts += [packed, np.zeros(-len(packed) % 4, dtype=np.uint8)]
    return np.concatenate(parts)


def growth_keys(n: int, seed: int, t: int) -> np.ndarray:
    """32-bit keys of entries 0 to n - 1: word ``i % 4`` of the block with counter (i // 4, t, 2)."""
    q = np.arange((n + 3) // 4, dtype=np.uint64)
    counter = [q & np.uint64(0xFFFFFFFF), q >> np.uint64(32), np.full_like(q, t), np.full_like(q, 2)]
    return philox(counter, [seed % 2**32, seed // 2**32 % 2**32]).T.flatten()[:n]


def philox(counter, key) -> np.ndarray:
    """Philox4x32-10, after the paper: ten rounds of two wide products and a swap, and a key that moves on."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x = np.array(counter, dtype=np.uint64).reshape(4, -1)
    for i in range(10):
        k0, k1 = (np.uint64((k + i * step) % 2**32) for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        wide0, wide1 = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = np.array([(wide1 >> half) ^ x[1] ^ k0, wide1 & mask, (wide0 >> half) ^ x[3] ^ k1, wide0 & mask])
    return x
