"""ARSAM: sample what SAM adds to the gradient at a rate that adapts, and reuse it in between."""

from __future__ import annotations

from typing import Any

from .budget import Budget
from .components import Spec
from .engine import SharpnessAware
from .perturbation import Euclidean
from .reuse import Difference


class ARSAM(SharpnessAware):
    """SAM that looks as often as looking brings something new, and adds the last look's ``d = g_s - g`` to later gradients.

    Of the paper's abstract: SAM's gradient is the gradient plus d, which is sampled adaptively and reused in between. How is
    our reading: the controller of the rate is that of the same authors' vSAM, and components are optional. No more is claimed.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        window, blocks, max_rate, a1, a2, warmup_steps, stat_tensors, change, seed: when to look, see
            ``samkern.optim.Budget``: ``int(S)`` of ``window`` steps, S following how much the looks vary.
        beta, max_age: ``u = g + beta^age d`` up to this age, ``g`` beyond; see ``samkern.optim.Difference``.
        components, max_component_age, change_tol: parts of the model with ages of their own; the second backward computes
            weight gradients of those only that are due. See ``samkern.optim.Difference``.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs ``1 + rate`` forward-backward pairs, rate in ``[1 / window, max_rate]``, ``opt.schedule.rate``. Keeps a copy of
    the weights' size; reads the device once a window.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    ARSAM, https://arxiv.org/abs/2510.03763; vSAM, https://arxiv.org/abs/2403.08821.

    >>> opt = samkern.ARSAM(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, window=10)
    >>> opt.schedule.rate
    0.1
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        window: int = 50,
        blocks: int = 5,
        max_rate: float = 0.8,
        a1: float = 0.13,
        a2: float = 0.13,
        warmup_steps: int = 50,
        stat_tensors: int | None = None,
        change: str = "relative",
        seed: int = 0,
        beta: float = 0.7,
        max_age: int | None = 6,
        components: Spec = None,
        max_component_age: int = 6,
        change_tol: float | None = 0.5,
        **options: Any,
    ) -> None:
        when = Budget(window, blocks, max_rate, a1, a2, warmup_steps, stat_tensors, change, seed)
        reuse = Difference(beta, max_age, components, max_component_age, change_tol, warmup_steps)
        super().__init__(params, base, perturbation=Euclidean(rho), schedule=when, reuse=reuse, **options)
