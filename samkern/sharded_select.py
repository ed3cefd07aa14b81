"""The largest entries of a list of which every process has a part, without bringing it together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bitmask import BitMask
from .shards import Shards, locals_of


def largest_of_shards(scores: Sequence[Tensor], k: int) -> BitMask:
    """The ``k`` largest of ``scores``, which are >= 0 or NaN; of equal ones those that come first; NaN ranks last.

    A list's order is that of its tensors; within one, of the processes along the mesh, and of the entries that each of them
    has. With ``fully_shard`` that is the order of the whole tensors.

    Their bits as integers have the same order as numbers that are not negative, and are found from the highest to the
    lowest, with one number of each tensor added up over the processes for each bit.

    Returns:
        A mask over the parts of this process.
    """
    shards, parts = Shards(scores), locals_of(scores)
    wide = any(x.dtype == torch.float64 for x in parts)  # numbers of one list are compared: one width for all
    keys = [_keys(x, torch.float64 if wide else torch.float32) for x in parts]
    threshold = torch.zeros((), dtype=torch.int64, device=keys[0].device)

    def counts(chosen: list[Tensor]) -> Tensor:
        of_each = torch.stack([x.sum() for x in chosen])
        shards.add_up(of_each)
        return of_each

    for bit in reversed(range(63 if wide else 31)):
        candidate = threshold + (1 << bit)
        enough = counts([key >= candidate for key in keys]).sum() >= k
        threshold = torch.where(enough, candidate, threshold)
    # If fewer than k are numbers at all, the threshold is the lowest of them, and NaN fills up.
    ones = [key > threshold for key in keys]
    left = k - counts(ones).sum()
    for level in (threshold, torch.full_like(threshold, -1)):
        ties = [(key == level) & ~one for key, one in zip(keys, ones, strict=True)]
        of_each = counts(ties)
        for i, (tie, one) in enumerate(zip(ties, ones, strict=True)):
            before = of_each[:i].sum() + shards.before(i, scores[i], tie.sum())
            one |= tie & (tie.flatten().cumsum(0).view(tie.shape) + before <= left)
        left = (left - of_each.sum()).clamp(min=0)
    return BitMask.pack(ones) if k > 0 else BitMask.zeros(parts)


def _keys(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers in the order of numbers that are >= 0, from their bits in ``dtype``; -1 for NaN."""
    bits = (x.to(dtype) + 0.0).contiguous().view(torch.int64 if dtype == torch.float64 else torch.int32).long()
    return torch.where(x.isnan(), -1, bits)
