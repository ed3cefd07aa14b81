"""LookSAM and Look-LayerSAM: look every k-th step, reuse the orthogonal part of what was seen in between."""

from __future__ import annotations

from typing import Any

from .engine import SharpnessAware
from .perturbation import Euclidean, Layerwise
from .reuse import OrthogonalPart
from .schedule import EveryK


class LookSAM(SharpnessAware):
    """SAM that looks every ``k``-th step and in between reuses the part of ``g_s`` orthogonal to ``g``.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        k: looks on steps 0, k, 2k, ...; >= 1; 1 is SAM. A step costs ``1 + 1/k`` forward-backward pairs on average.
        alpha: weight of the reused direction, >= 0; 0 is SAM-k.
        scope: what the projection and its norms run over: all tensors ("global", as in the paper) or each ("tensor").
        min_sine: a direction no longer than this share of ``norm(g_s)`` is rounding residue and is not reused, >= 0.
        options: further options of ``SharpnessAware`` (``cache_dtype`` among them) and of ``base``.

    Memory: one cache of the size of the weights for good; on looks also a saved copy and the first gradients.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714, algorithm 1.

    >>> opt = samkern.LookSAM(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, rho=0.1, k=5, alpha=0.7)
    >>> opt.param_groups[0]["alpha"]
    0.7
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        k: int = 5,
        alpha: float = 0.7,
        scope: str = "global",
        min_sine: float = 1e-6,
        **options: Any,
    ) -> None:
        reuse = OrthogonalPart(alpha, scope, min_sine)
        super().__init__(params, base, perturbation=Euclidean(rho), schedule=EveryK(k), reuse=reuse, **options)


class LookLayerSAM(SharpnessAware):
    """LookSAM whose perturbation is scaled for each tensor by the norms of its weights and gradient, for large batches.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius, in units of the norm of a tensor's weights, >= 0.
        k: looks on steps 0, k, 2k, ...; >= 1; 1 is LayerSAM. A step costs ``1 + 1/k`` forward-backward pairs on average.
        alpha: weight of the reused direction, >= 0.
        layer_mode: "lars" (whatever the scale of the loss), "sign" (the printed formula read literally) or "trust".
        trust_clip: upper bound of ``norm(w_i) / norm(g_i)`` in "trust", > 0.
        min_sine: a direction no longer than this share of ``norm(g_s)`` is rounding residue and is not reused, >= 0.
        options: further options of ``SharpnessAware`` and of ``base``.

    Memory as LookSAM's. The formulas are in ``samkern.optim.Layerwise``.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714, algorithm 2.

    >>> opt = samkern.LookLayerSAM(torch.nn.Linear(2, 1).parameters(), torch.optim.AdamW, lr=1e-3, k=5)
    >>> opt.param_groups[0]["layer_mode"]
    'lars'
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        k: int = 5,
        alpha: float = 0.7,
        layer_mode: str = "lars",
        trust_clip: float = 20.0,
        min_sine: float = 1e-6,
        **options: Any,
    ) -> None:
        perturbation = Layerwise(rho, layer_mode, trust_clip)
        reuse = OrthogonalPart(alpha, min_sine=min_sine)
        super().__init__(params, base, perturbation=perturbation, schedule=EveryK(k), reuse=reuse, **options)
