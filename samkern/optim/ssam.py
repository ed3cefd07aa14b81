"""SSAM-F and SSAM-D: SAM that perturbs a part of the entries only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .engine import SharpnessAware
from .mask import DynamicMask, FisherMask, Losses
from .perturbation import Euclidean


class SSAMF(SharpnessAware):
    """Sparse SAM with a Fisher mask: perturbs the entries with the largest Fisher information.

    ``eps = rho m g / norm(g)``. Until the first refresh every entry is perturbed, as in SAM.

    Args:
        params: parameters or param groups, as for ``torch.optim``. A group with ``masked=False`` (biases and norms, say) is
            perturbed entirely, one with ``rho=0`` never; neither counts for ``sparsity``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        sparsity: share of the entries that is not perturbed, in [0, 1], exact and over all tensors together. Above 0.75
            accuracy may suffer.
        fisher: "sample": the empirical Fisher from gradients of single samples, one sweep a refresh. "batch": a running mean
            of squared mini-batch gradients. That costs no pass, and is an approximation.
        sample_losses: gives the losses of single samples on refresh steps, see ``samkern.SampleLosses``; without it call
            ``refresh_mask(losses)`` yourself, once an epoch or less.
        num_samples: of "sample": at most so many are taken, >= 1.
        fisher_ema, fisher_every: of "batch": every so many steps ``F = ema F + (1 - ema) g^2``.
        renormalise: divide by the norm of the masked gradient, so that ``norm(eps) = rho``.
        refresh_interval: steps between two refreshes, >= 1; None: only ``refresh_mask()``.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs 2 forward-backward pairs: the mask removes no work. It keeps a bit an entry, "batch" also a float32. A
    refresh of "sample" costs ``num_samples`` pairs of single samples, and a float32 an entry while it runs.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Mi et al., NeurIPS 2022, https://arxiv.org/abs/2210.05177, algorithm 1, SSAM-F.

    >>> model = torch.nn.Linear(4, 2)
    >>> data = torch.randn(32, 4), torch.randint(0, 2, (32,))
    >>> losses = samkern.SampleLosses(model, torch.nn.functional.cross_entropy, data)
    >>> opt = samkern.SSAMF(model.parameters(), torch.optim.SGD, lr=0.1, sparsity=0.8, sample_losses=losses)
    >>> opt.refresh_mask()
    >>> sum(int(mask.sum()) for mask in opt.masks())  # of 10 entries
    2
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.1,
        *,
        sparsity: float = 0.5,
        fisher: str = "sample",
        sample_losses: Callable[[], Losses] | None = None,
        num_samples: int = 1024,
        fisher_ema: float = 0.9,
        fisher_every: int = 10,
        renormalise: bool = False,
        refresh_interval: int | None = 400,
        **options: Any,
    ) -> None:
        mask = FisherMask(
            sparsity,
            fisher=fisher,
            sample_losses=sample_losses,
            num_samples=num_samples,
            fisher_ema=fisher_ema,
            fisher_every=fisher_every,
            renormalise=renormalise,
            refresh_interval=refresh_interval,
        )
        super().__init__(params, base, perturbation=Euclidean(rho), mask=mask, **options)


class SSAMD(SharpnessAware):
    """Sparse SAM with a dynamic mask, which drops entries with small gradients and grows random ones.

    ``eps = rho m g / norm(g)``. Needs no samples: a refresh costs one selection.

    Args:
        params: parameters or param groups, as for ``torch.optim``. A group with ``masked=False`` (biases and norms, say) is
            perturbed entirely, one with ``rho=0`` never; neither counts for ``sparsity``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        total_steps: steps of the whole training, >= 1: the share that a refresh replaces falls to 0 by then.
        sparsity: share of the entries that is not perturbed, in [0, 1], exact and over all tensors together.
        drop: share of the mask that the first refresh would replace, in [0, 1].
        regrow: whether an entry that has just been dropped may be grown again.
        renormalise: divide by the norm of the masked gradient, so that ``norm(eps) = rho``.
        refresh_interval: steps between two refreshes, >= 1; None: only ``refresh_mask()``, after a backward.
        seed: of the random mask. The global generators of torch are left alone.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs 2 forward-backward pairs: the mask removes no work. It keeps a bit an entry.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Mi et al., NeurIPS 2022, https://arxiv.org/abs/2210.05177, algorithm 1, SSAM-D.

    >>> model = torch.nn.Linear(4, 2)
    >>> opt = samkern.SSAMD(model.parameters(), torch.optim.SGD, lr=0.1, total_steps=1000, sparsity=0.8)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> opt.first_step()
    True
    >>> sum(int(mask.sum()) for mask in opt.masks())  # of 10 entries
    2
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.1,
        *,
        total_steps: int,
        sparsity: float = 0.5,
        drop: float = 0.5,
        regrow: bool = True,
        renormalise: bool = False,
        refresh_interval: int | None = 400,
        seed: int = 0,
        **options: Any,
    ) -> None:
        mask = DynamicMask(
            total_steps,
            sparsity,
            drop=drop,
            regrow=regrow,
            renormalise=renormalise,
            refresh_interval=refresh_interval,
            seed=seed,
        )
        super().__init__(params, base, perturbation=Euclidean(rho), mask=mask, **options)
