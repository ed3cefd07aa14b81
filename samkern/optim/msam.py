"""MSAM: SAM along the momentum, at the price of the base optimizer."""

from __future__ import annotations

from typing import Any

from .engine import SharpnessAware
from .perturbation import Euclidean, Momentum


class MSAM(SharpnessAware):
    """Momentum SAM: the only gradient of a step is taken at ``w - rho v / norm(v)``, v the momentum of the base.

    ``step(closure)`` calls the closure once. Without one: ``with opt.perturbed():`` around forward and backward, then
    ``opt.step()``. Outside of that the weights are never perturbed, so evaluating and saving need no care.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: ``torch.optim.SGD`` with momentum, ``Adam`` or ``AdamW``, whose options follow, or a ready instance of one.
        rho: radius, in units of the weights, >= 0: about 15 times SAM's.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs 1 forward-backward pair, and a saved copy of the weights while they are perturbed. Running statistics of
    BatchNorm come from the perturbed passes, the only ones.

    Raises:
        ValueError: an option is out of range, or the base has no momentum; the message names it and its value.

    Becker et al. 2024, https://arxiv.org/abs/2401.12033.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.MSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    >>> with opt.perturbed():
    ...     model(torch.ones(4, 2)).square().mean().backward()
    >>> opt.step()
    >>> opt.evaluations
    1
    """

    def __init__(self, params: Any, base: Any, rho: float = 1.0, **options: Any) -> None:
        super().__init__(params, base, perturbation=Momentum(Euclidean(rho)), **options)
