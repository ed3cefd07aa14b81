"""AE-SAM and AE-LookSAM: look when the gradient is large against what it has been."""

from __future__ import annotations

from typing import Any

from .engine import SharpnessAware
from .perturbation import Euclidean
from .reuse import OrthogonalPart
from .schedule import GradientNorm


class AESAM(SharpnessAware):
    """SAM on steps whose gradient norm is large against its running mean, the base optimizer on the others.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        total_steps: steps of the whole training, >= 1.
        delta: weight of the past in mean and variance of ``norm(g)^2``, in [0, 1).
        lambda1, lambda2: a look takes ``norm(g)^2 >= mean + c std``, c falling from ``lambda2`` to ``lambda1``; at most
            ``1 / sqrt(1 - delta)``, which is never exceeded.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs ``1 + share`` forward-backward pairs, the share of looks rising during the training (about 0.2 in the first
    quarter and 0.8 in the last with independent gradients), and one host read.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Jiang et al., ICLR 2023, AE-SAM.

    >>> opt = samkern.AESAM(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, total_steps=1000)
    >>> opt.schedule.threshold(1000)
    -1.0
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        total_steps: int,
        delta: float = 0.9,
        lambda1: float = -1.0,
        lambda2: float = 1.0,
        **options: Any,
    ) -> None:
        when = GradientNorm(total_steps, delta, lambda1, lambda2)
        super().__init__(params, base, perturbation=Euclidean(rho), schedule=when, **options)


class AELookSAM(SharpnessAware):
    """AE-SAM's test and LookSAM's reuse.

    Args:
        params, base, rho, total_steps, delta, lambda1, lambda2: as for ``AESAM``.
        k, alpha, scope: as for ``LookSAM``.
        rule: "R1": where the test fires, look every k-th step at most and reuse else; where it is silent, a plain step.
            "R2": on steps 0, k, 2k, ... look if it fires, a plain step if not; reuse on all others. "R3": look if it fires,
            else reuse.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs at most ``1 + 1/k`` forward-backward pairs with "R1", ``1 + share/k`` with "R2", ``1 + share`` with "R3", and
    one host read. Keeps a copy of the weights' size.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Jiang et al., ICLR 2023, AE-LookSAM.

    >>> opt = samkern.AELookSAM(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, total_steps=1000, rule="R3")
    >>> opt.schedule.rule
    'R3'
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        total_steps: int,
        k: int = 5,
        rule: str = "R1",
        alpha: float = 0.7,
        scope: str = "global",
        delta: float = 0.9,
        lambda1: float = -1.0,
        lambda2: float = 1.0,
        **options: Any,
    ) -> None:
        when = GradientNorm(total_steps, delta, lambda1, lambda2, rule, k)
        reuse = OrthogonalPart(alpha, scope)
        super().__init__(params, base, perturbation=Euclidean(rho), schedule=when, reuse=reuse, **options)
