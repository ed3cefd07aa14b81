"""SAM, SAM-k and ASAM: no cache, only a choice of where and how often to look."""

from __future__ import annotations

from typing import Any

from .engine import SharpnessAware
from .perturbation import Adaptive, Euclidean, Perturbation
from .schedule import EveryK


class SAM(SharpnessAware):
    """Sharpness-aware minimization: every step takes its gradient at ``w + rho g / norm(g)``.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        adaptive: element-wise ASAM with ``eta=0``, as in other SAM classes; then take a larger ``rho`` (0.5 to 2).
        p: norm that bounds the perturbation, 2 or ``math.inf`` (``eps = rho sign(g)``).
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs 2 forward-backward pairs, a saved copy of the weights, and the first gradients while the second pass
    runs (not those with ``first_step(zero_grad=True)``).

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, algorithm 1.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = model(torch.ones(4, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> first = opt.step(closure)
    >>> opt.evaluations
    2
    """

    def __init__(
        self, params: Any, base: Any, rho: float = 0.05, adaptive: bool = False, *, p: float = 2, **options: Any
    ) -> None:
        perturbation: Perturbation = Adaptive(rho, "element", eta=0.0) if adaptive else Euclidean(rho, p)
        super().__init__(params, base, perturbation=perturbation, **options)


class SAMk(SharpnessAware):
    """SAM on every ``k``-th step, the base optimizer on the others.

    A cheap control for ``LookSAM``: it loses much of SAM's gain.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        k: looks on steps 0, k, 2k, ...; >= 1. A step costs ``1 + 1/k`` forward-backward pairs on average.
        p: norm that bounds the perturbation, 2 or ``math.inf``.
        options: further options of ``SharpnessAware`` and of ``base``.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412.

    >>> opt = samkern.SAMk(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, k=5)
    >>> opt.schedule.k
    5
    """

    def __init__(self, params: Any, base: Any, rho: float = 0.05, *, k: int = 5, p: float = 2, **options: Any) -> None:
        super().__init__(params, base, perturbation=Euclidean(rho, p), schedule=EveryK(k), **options)


class ASAM(SharpnessAware):
    """Adaptive SAM: the radius is measured in units of the weights themselves, so that rescaling them changes nothing.

    ``eps = rho T^2 g / norm(T g)``.

    Args:
        params: parameters or param groups, as for ``torch.optim``. A group with ``adaptive=False`` has T = 1; the authors'
            code does that with biases and norms.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius, in units of T, >= 0. Not comparable with SAM's.
        mode: T is ``|w| + eta`` ("element"), ``norm(w_f) + eta`` of each dim-0 slice ("filter"), or ``norm(w_i) + eta`` of
            each tensor ("layer").
        eta: added to T, >= 0; with 0, a zero weight is never perturbed, and 2.0 is a good ``rho``.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs 2 forward-backward pairs, and memory as SAM's.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600, algorithm 1.

    >>> opt = samkern.ASAM(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, mode="filter")
    >>> opt.param_groups[0]["rho"]
    0.5
    """

    def __init__(
        self, params: Any, base: Any, rho: float = 0.5, *, mode: str = "element", eta: float = 0.01, **options: Any
    ) -> None:
        super().__init__(params, base, perturbation=Adaptive(rho, mode, eta), **options)
