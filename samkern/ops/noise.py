"""The pass that perturbs weights by Gaussian noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bitmask import BitMask
from ..reference_noise import SCALES
from .dispatch import Tensors, bits_like, check_counts, check_same_dtypes, implementation, signed


@torch.no_grad()
def gaussian_perturb(
    w: Tensors,
    saved: Tensors,
    std: float,
    *,
    seed: int = 0,
    t: int = 0,
    draw: int = 0,
    first: int = 0,
    scale: str = "filter",
    norms: Tensor | None = None,
    mask: BitMask | None = None,
    from_saved: bool = False,
    backend: str | None = None,
) -> None:
    """``saved = w; w += std n z``, z standard normal, n a norm of the weights: one launch, norms included.

    z is of Philox words of ``seed``, ``t``, ``draw`` and the place of an entry: the same on every backend, and never stored.

    Args:
        w: written.
        saved: written, of the dtypes of ``w``; with ``from_saved`` read, of any dtype.
        std: >= 0.
        seed: 64 bits.
        t, draw: of the noise; in [0, 2^32) and [0, 2^24).
        first: place of the first entry in the list that the noise is of, >= 0. Entries of a tensor count in row-major order.
        scale: n is the norm of each dim-0 slice, of a tensor of fewer than two dimensions as a whole ("filter"), or of each
            tensor ("tensor"), or in ``norms`` ("given").
        norms: float64 on their device: one for each dim-0 slice of all tensors, in order; a tensor of no dimension has one.
        mask: entries that are perturbed; None: all.
        from_saved: ``w = saved + std n z``, norms are those of ``saved``: for another draw, or for noise beside the weights.
        backend: as for the optimizers.

    A norm that is not finite leaves all weights as they are.

    Raises:
        ValueError: lengths, shapes or layouts do not fit, or a number is out of range.
        TypeError: a tensor is not dense float32, float64, bfloat16 or float16.

    Bisla et al. 2022 (arXiv 2201.08025), eq. 6.

    >>> w, saved = [torch.tensor([3.0, 4.0])], [torch.empty(2)]
    >>> samkern.ops.gaussian_perturb(w, saved, std=0.1)
    >>> w, saved
    ([tensor([3.8256, 4.4228])], [tensor([3., 4.])])
    """
    check_counts(t=t, first=first)
    if isinstance(draw, bool) or not isinstance(draw, int) or not 0 <= draw < 1 << 24:
        raise ValueError(f"draw must be an integer >= 0 and < 2^24, got {draw!r}")
    if not isinstance(std, (int, float)) or not 0 <= std < math.inf:
        raise ValueError(f"std must be a finite number >= 0, got {std!r}")
    if scale not in SCALES or (scale == "given") != (norms is not None):
        got = f"{scale!r} with norms {'missing' if norms is None else 'given'}"
        raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))}, and norms go with 'given', got {got}")
    if norms is not None:
        n = sum(x.shape[0] if x.dim() > 0 else 1 for x in w)
        if norms.dtype != torch.float64 or norms.shape != (n,) or (len(w) > 0 and norms.device != w[0].device):
            raise ValueError(
                f"norms must be float64 of shape ({n},), one for each dim-0 slice, on the device of w, got {norms.dtype} "
                f"{tuple(norms.shape)} on {norms.device}"
            )
    if from_saved:
        run = implementation("gaussian_perturb", backend, reads={"saved": saved}, writes={"w": w})
    else:
        run = implementation("gaussian_perturb", backend, reads={}, writes={"w": w, "saved": saved})
        check_same_dtypes(saved, w)
    options = {"seed": signed(seed), "t": t, "draw": draw, "first": first, "scale": scale, "from_saved": from_saved}
    run(list(w), list(saved), std=float(std), norms=norms, mask=bits_like(mask, w), **options)
