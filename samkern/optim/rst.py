"""RST and G-RST: SAM on randomly selected steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .engine import SharpnessAware
from .perturbation import Euclidean
from .reuse import Blend
from .schedule import Bernoulli


class RST(SharpnessAware):
    """SAM on steps that are drawn at random, the base optimizer on the others. With a constant p: SS-SAM.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        schedule: how p follows the training: "constant", "piecewise-1", "piecewise-2", "linear-up", "linear-down",
            "cosine-up", "cosine-down", or a function from the progress s in [0, 1] to p. Looking late is reported to help more.
        p: probability of "constant", in [0, 1].
        total_steps: steps of the whole training, for all but "constant".
        seed: of the draws, which are the same on every rank and after a resume.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs ``1 + p`` forward-backward pairs on average, and memory as SAM's on those that look.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Zhao et al. 2022, https://arxiv.org/abs/2203.09962.

    >>> opt = samkern.RST(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, schedule="cosine-up", total_steps=100)
    >>> round(opt.schedule.probability(50), 6)
    0.5
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        schedule: str | Callable[[float], float] = "constant",
        p: float = 0.5,
        total_steps: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        when = Bernoulli(schedule, p, total_steps, seed)
        super().__init__(params, base, perturbation=Euclidean(rho), schedule=when, **options)


class GRST(SharpnessAware):
    """RST with looks of adjustable strength: ``u = gamma g_s + (1 - gamma) g``.

    Args:
        params, base, rho, schedule, p, total_steps, seed: as for ``RST``.
        gamma: >= 0; 1 is RST, more extrapolates. With looks of probability p, ``gamma = 1/p`` has SAM's strength on average:
            "match" follows p so, up to ``gamma_max``.
        gamma_max: >= 1.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs ``1 + p`` forward-backward pairs on average, and memory as SAM's on those that look.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Zhao et al. 2022, https://arxiv.org/abs/2203.09962, says that the strength is adjustable; the formula is ours.

    >>> opt = samkern.GRST(torch.nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, p=0.25, gamma="match")
    >>> opt.reuse.gamma_max
    4.0
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        schedule: str | Callable[[float], float] = "constant",
        p: float = 0.5,
        total_steps: int | None = None,
        seed: int = 0,
        gamma: float | str = 2.0,
        gamma_max: float = 4.0,
        **options: Any,
    ) -> None:
        when = Bernoulli(schedule, p, total_steps, seed)
        reuse = Blend(gamma, gamma_max, when)
        super().__init__(params, base, perturbation=Euclidean(rho), schedule=when, reuse=reuse, **options)
