"""Philox4x32-10: random words that depend on a seed and a counter only.

So decisions, masks and noise are the same on every backend, device and rank, and after a resume, and torch's global
generators are left alone. In torch's int64 arithmetic, for any device; imports nothing of this package.

Salmon et al., SC 2011, https://doi.org/10.1145/2063384.2063405.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
T = TypeVar("T", int, Tensor)


def words(c0: Tensor, c1: Tensor, c2: int, c3: int, seed: int) -> Tensor:
    """Four 32-bit words for each counter ``(c0, c1, c2, c3)`` under the key ``seed`` (64 bits).

    ``c0``, ``c1``: int64 tensors of 32-bit numbers, of one shape. Returns int64 of that shape and one more dimension of 4.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(word) for word in samkern.philox.words(zero, zero, 0, 0, seed=0).tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    return torch.stack(_rounds((c0, c1, torch.full_like(c0, c2), torch.full_like(c0, c3)), seed), -1)


def uniform(t: int, seed: int) -> float:
    """The random number of step ``t`` by which schedules decide, in [0, 1).

    >>> [round(samkern.philox.uniform(t, seed=0), 5) for t in range(4)]
    [0.39905, 0.51668, 0.02493, 0.94008]
    """
    return _rounds((0, 0, t, 0), seed)[0] * 2.0**-32


def _rounds(x: tuple[T, T, T, T], seed: int) -> tuple[T, T, T, T]:
    """Ten rounds on counters that are tensors or plain numbers."""
    x0, x1, x2, x3 = x
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, x0)
        high1, low1 = _product(0xCD9E8D57, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return x0, x1, x2, x3


def noise_words(q: Tensor, t: int, draw: int, seed: int) -> Tensor:
    """Four words for each block ``q`` (int64) of four entries of a list: those of its noise at step ``t``, draw ``draw``.

    >>> samkern.philox.noise_words(torch.arange(2), t=0, draw=0, seed=0).shape
    torch.Size([2, 4])
    """
    return words(q & _LOW, q >> 32, t, draw * 256 + 1, seed)


def measure_words(q: Tensor, draw: int, seed: int) -> Tensor:
    """The same for what measures and landscapes draw, which is independent of all training."""
    return words(q & _LOW, q >> 32, draw, 3, seed)


def growth_keys(n: int, t: int, seed: int, device: torch.device | None = None) -> Tensor:
    """The random keys of ``n`` entries of a list by which step ``t`` grows a mask: int64, 32 bits each."""
    q = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    return words(q & _LOW, q >> 32, t, 2, seed).flatten()[:n]


def _product(a: int, b: T) -> tuple[T, T]:
    """High and low 32 bits of a product of 32-bit numbers, in halves that int64 can hold."""
    low = a * (b & 0xFFFF)
    rest = a * (b >> 16) + (low >> 16)  # the product without its lowest 16 bits
    return rest >> 16, ((rest & 0xFFFF) << 16) | (low & 0xFFFF)
