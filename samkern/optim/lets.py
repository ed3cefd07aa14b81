"""LETS: SAM and ASAM whose radius is learned."""

from __future__ import annotations

from typing import Any

from .engine import SharpnessAware
from .perturbation import Adaptive, Euclidean
from .radius import LearnedRadius


class LETSSAM(SharpnessAware):
    """SAM with a radius that descends on the squared gap between validation and training loss.

    ``opt.step(closure, val_closure=...)``: the second closure does the same on a validation batch, never test data.

    Args:
        params: parameters or param groups, as for ``torch.optim``; one radius for all groups with ``rho > 0``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: the radius at first, > 0; ``opt.radius`` is what it is now, a tensor.
        beta, period, rho_min, rho_max, hyper: how it is learned, see ``samkern.optim.LearnedRadius``.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs ``2 + 2 / period`` forward-backward pairs, and memory as SAM's; in a step that updates the radius, both
    gradients stay until that is done.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    LETS: learning to sharpness. The formulas are in ``samkern.optim.LearnedRadius``.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.LETSSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, period=1)
    >>> def closure_of(x):
    ...     def closure():
    ...         opt.zero_grad()
    ...         loss = model(x).square().mean()
    ...         loss.backward()
    ...         return loss
    ...     return closure
    >>> first = opt.step(closure_of(torch.ones(4, 2)), val_closure=closure_of(torch.zeros(4, 2)))
    >>> opt.evaluations
    4
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        beta: float = 0.1,
        period: int = 10,
        rho_min: float = 0.01,
        rho_max: float = 0.5,
        hyper: str = "secant",
        **options: Any,
    ) -> None:
        radius = LearnedRadius(rho, beta, period, rho_min, rho_max, hyper)
        super().__init__(params, base, perturbation=Euclidean(rho), radius=radius, **options)


class LETSASAM(SharpnessAware):
    """ASAM with a learned radius: as ``LETSSAM``, with ASAM's perturbation.

    Args:
        params, base, beta, period, rho_min, rho_max, hyper: as for ``LETSSAM``.
        rho: the radius at first, in units of T; ``rho_max`` must allow it.
        mode, eta: as for ``ASAM``.
        options: further options of ``SharpnessAware`` and of ``base``.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    LETS with Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600.

    >>> opt = samkern.LETSASAM(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    >>> float(opt.radius)
    0.5
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        mode: str = "element",
        eta: float = 0.01,
        beta: float = 0.1,
        period: int = 10,
        rho_min: float = 0.01,
        rho_max: float = 0.5,
        hyper: str = "secant",
        **options: Any,
    ) -> None:
        radius = LearnedRadius(rho, beta, period, rho_min, rho_max, hyper)
        super().__init__(params, base, perturbation=Adaptive(rho, mode, eta), radius=radius, **options)
