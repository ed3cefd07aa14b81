"""The passes over masks: which entries are perturbed, and the scores that decide it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bitmask import BitMask
from ..shards import locals_of
from .dispatch import Tensors, check_counts, check_mask, implementation, row_major, signed


@torch.no_grad()
def topk_mask(scores: Tensors, k: int, *, nan: str = "raise", backend: str | None = None) -> BitMask:
    """Ones for the ``k`` largest scores of a whole list, exactly ``k`` of them; ties go to the lowest flat index.

    The flat index of an entry is its place in the concatenation of all tensors, each in row-major order; nothing is
    concatenated. Selection is by the bits of the numbers, which takes three passes of 11 bits (two for half types, six for
    float64) and one that writes the mask; -0 equals 0, and -inf, inf and denormals have their places.

    Args:
        scores: of any size and sign, float32, float64, bfloat16 or float16; those that are not row-major are copied.
        k: from 0 to the number of entries.
        nan: "raise", which reads one number back from the device (and breaks a compiled graph), or "last": a NaN ranks
            below -inf.
        backend: as for the optimizers.

    Raises:
        ValueError: ``k`` is out of range; a score is NaN and ``nan="raise"``.

    >>> mask = samkern.ops.topk_mask([torch.tensor([3.0, 1.0]), torch.tensor([[2.0], [3.0]])], k=2)
    >>> mask.unpack()[0], mask.count()
    (tensor([ True, False]), 2)
    """
    if nan not in ("raise", "last"):
        raise ValueError(f"nan must be 'raise' or 'last', got {nan!r}")
    if nan == "raise" and torch.compiler.is_compiling():
        raise ValueError("nan='raise' reads the device, which a compiled region cannot: pass nan='last'")
    scores = row_major(scores)
    n = sum(x.numel() for x in scores)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= n:
        raise ValueError(f"k must be an integer from 0 to the number of scores, {n}, got {k!r}")
    mask = BitMask.zeros(scores)
    if not scores:
        return mask
    n_nan = torch.zeros((), dtype=torch.int64, device=mask.bits.device)
    implementation("topk_mask", backend, reads={"scores": scores}, writes={})(scores, bits=mask.bits, n_nan=n_nan, k=k)
    if nan == "raise" and (count := int(n_nan)):
        i = next(i for i, x in enumerate(scores) if x.isnan().any())
        raise ValueError(f"{count} scores are NaN, the first in scores[{i}]; nan='last' ranks them below all others")
    return mask


@torch.no_grad()
def drop_grow_mask(
    mask: BitMask,
    g: Tensors,
    n: int,
    *,
    seed: int = 0,
    t: int = 0,
    regrow: bool = True,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Moves a mask: ``n`` ones with the smallest ``|g|`` become zeros, then as many zeros, chosen at random, ones.

    ``mask.bits`` is written; the number of ones stays as it is. The random keys are Philox4x32-10 words of ``seed``, ``t``
    and the flat index: the same on every backend and rank. Ties go to the lowest flat index.

    Args:
        mask: over tensors of the shapes of ``g``.
        g: gradients.
        n: >= 0; no more are moved than there are ones, and with ``regrow=False`` zeros.
        seed, t: of the random keys; ``t`` in [0, 2^32).
        regrow: whether what has just been dropped may be grown again.
        skip: 0-d bool on the device of the lists; if true, nothing changes.
        backend: as for the optimizers.

    Raises:
        ValueError: an argument is out of range, or the mask is over other tensors.

    Mi et al., NeurIPS 2022, https://arxiv.org/abs/2210.05177, SSAM-D.

    >>> mask = samkern.BitMask.pack([torch.tensor([True, True, False])])
    >>> samkern.ops.drop_grow_mask(mask, [torch.tensor([0.1, 2.0, 3.0])], n=1, regrow=False)
    >>> mask.unpack()
    [tensor([False,  True,  True])]
    """
    check_mask(mask, g)
    check_counts(n=n, t=t)
    rows = row_major(g)
    if rows:
        run = implementation("drop_grow_mask", backend, reads={"g": rows}, writes={})
        run(mask.bits, rows, n=n, seed=signed(seed), t=t, drops=True, regrow=regrow, skip=skip)


@torch.no_grad()
def grow_mask(mask: BitMask, like: Tensors, n: int, *, seed: int = 0, t: int = 0, backend: str | None = None) -> None:
    """``n`` zeros, chosen at random, become ones: those with the largest keys, as in ``drop_grow_mask``.

    ``mask.bits`` is written. Of ``like``, the tensors that it is over, only shapes and devices matter.

    Raises:
        ValueError: an argument is out of range, or the mask is over other tensors.

    >>> mask = samkern.BitMask.pack([torch.tensor([True, False, False])])
    >>> samkern.ops.grow_mask(mask, [torch.zeros(3)], n=2)
    >>> mask.count()
    3
    """
    check_mask(mask, like)
    check_counts(n=n, t=t)
    # What is not row-major need not be copied for its shape.
    rows = [x.new_empty(x.shape) if x.layout == torch.strided and not x.is_contiguous() else x for x in like]
    if rows:
        run = implementation("drop_grow_mask", backend, reads={"like": rows}, writes={})
        run(mask.bits, rows, n=n, seed=signed(seed), t=t, drops=False)


def random_mask(like: Tensors, k: int, *, seed: int = 0, t: int = 0, backend: str | None = None) -> BitMask:
    """``k`` ones at random over tensors of the shapes of ``like``: the largest keys, as in ``drop_grow_mask``.

    Args:
        like: only shapes and devices matter.
        k: from 0 to the number of entries.
        seed, t: of the random keys; ``t`` in [0, 2^32).
        backend: as for the optimizers.

    Raises:
        ValueError: an argument is out of range.

    >>> samkern.ops.random_mask([torch.zeros(100), torch.zeros(3, 4)], k=56).count()
    56
    """
    n = sum(x.numel() for x in like)
    check_counts(k=k)
    if k > n:
        raise ValueError(f"k must be at most the number of entries, {n}, got {k}")
    mask = BitMask.zeros(like)
    grow_mask(mask, like, k, seed=seed, t=t, backend=backend)
    return mask


@torch.no_grad()
def fisher_accumulate(
    f: Tensors,
    g: Tensors,
    *,
    keep: float = 1.0,
    gain: float = 1.0,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Adds squared gradients to a diagonal of the Fisher matrix: ``f = keep f + gain (scale g)^2``, in one pass.

    Args:
        f: written, in any supported dtype; arithmetic is in float32 (float64 for float64).
        g: gradients.
        keep, gain: 1 and 1/N for a mean over N samples, b and 1 - b for a running mean.
        scale: 0-d float64 on the device of the lists, undoes a loss scale.
        skip: 0-d bool on the device of the lists; if true, nothing changes.
        backend: as for the optimizers.

    >>> f = [torch.zeros(2)]
    >>> samkern.ops.fisher_accumulate(f, [torch.tensor([1.0, 2.0])], gain=0.5)
    >>> f
    [tensor([0.5000, 2.0000])]
    """
    f, g = locals_of(f), locals_of(g)
    run = implementation("fisher_accumulate", backend, reads={"g": g}, writes={"f": f})
    run(list(f), list(g), keep=keep, gain=gain, scale=scale, skip=skip)
