"""The passes over masks in plain PyTorch: what the kernels must select, and what F must be.

A mask is bits, as ``reference.masks_like`` has them, over a list of row-major tensors. Ties go to the lowest place in the
list. Nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import growth_keys
from .reference import mask_bytes, math_dtype, pack_bits, unpack_bits


def topk_mask(scores: Sequence[Tensor], k: int, bits: Tensor, n_nan: Tensor) -> None:
    """``bits``: ones for the ``k`` largest scores of all tensors; NaN ranks last. ``n_nan``: how many there are."""
    flat = _flat(scores)
    _write(bits, _largest(torch.ones_like(flat, dtype=torch.bool), flat, k), scores)
    n_nan.copy_(flat.isnan().sum())


def drop_grow_mask(
    bits: Tensor,
    g: Sequence[Tensor],
    n: int,
    seed: int,
    t: int,
    drops: bool = True,
    regrow: bool = True,
    skip: Tensor | None = None,
) -> None:
    """The ``n`` ones with the smallest ``|g|`` become zeros, then as many zeros with the largest random keys ones.

    ``drops=False``: only the latter. ``regrow=False``: what has just been dropped stays out, so that no more is dropped
    than there were zeros. ``skip``: if true, nothing changes.
    """
    before = torch.cat([unpack_bits(part, x.numel()) for part, x in zip(_parts(bits, g), g, strict=True)])
    active, count = before, torch.full((), n, device=bits.device)
    if drops:
        count = count.minimum(before.sum())
        if not regrow:
            count = count.minimum((~before).sum())
        active = before & ~_largest(before, -_flat(g).abs(), count)
    allowed = ~active if regrow or not drops else ~before
    keys = growth_keys(before.numel(), t, seed, bits.device).double()
    grown = active | _largest(allowed, keys, count)
    _write(bits, grown if skip is None else torch.where(skip, before, grown), g)


def fisher_accumulate(
    f: Sequence[Tensor],
    g: Sequence[Tensor],
    keep: float,
    gain: float,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """``F = keep F + gain (scale g)^2``. ``skip``: if true, nothing changes."""
    for x, dx in zip(f, g, strict=True):
        dtype = math_dtype(x.dtype)
        value = dx.to(dtype) if scale is None else scale.to(dtype) * dx.to(dtype)
        new = keep * x.to(dtype) + gain * (value * value)
        x.copy_(new if skip is None else torch.where(skip, x.to(dtype), new))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in their order; float64 holds every score exactly."""
    return torch.cat([x.double().flatten() for x in tensors])


def _largest(candidates: Tensor, values: Tensor, n: Tensor | int) -> Tensor:
    """Whether an entry is among the ``n`` candidates with the largest values. NaN ranks last."""
    numbers = ~values.isnan()
    order = torch.sort(torch.where(numbers, values, -torch.inf), descending=True, stable=True).indices
    for first in (numbers, candidates):
        order = order[torch.sort(first[order].byte(), descending=True, stable=True).indices]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return candidates & (rank < n)


def _parts(bits: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.split(bits, [mask_bytes(x.numel()) for x in tensors])


def _write(bits: Tensor, flat: Tensor, like: Sequence[Tensor]) -> None:
    bits.copy_(torch.cat([pack_bits(part) for part in torch.split(flat, [x.numel() for x in like])]))
