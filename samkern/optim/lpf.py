"""LPF-SGD: gradients of a loss that is smoothed with Gaussian noise on the weights."""

from __future__ import annotations

from typing import Any

from .engine import SharpnessAware
from .perturbation import Gaussian


class LPFSGD(SharpnessAware):
    """Low-pass filter SGD: the base receives the mean gradient at ``w + tau_j``, tau_j normal, j = 1 .. M.

    ``opt.step([closure_1, ..., closure_M])``, a closure for each part of the batch, costs as much as one step of the base. A
    single closure is called ``draws`` times, on the whole batch. Without closures: M times ``with opt.perturbed():`` around
    forward and backward, as for gradient accumulation (each loss divided by M), then ``opt.step()``.

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow, or a ready instance.
        std: standard deviation of the noise on an entry, in units of the norm of its filter (dim-0 slice), >= 0. For small
            networks 2e-3 with ``inc=1``, ``draws=1``.
        inc: the noise grows from ``std`` to ``inc std`` over the training, along half a cosine.
        draws: M, of a single closure.
        total_steps: of the training; needed unless ``inc=1``.
        scale: "filter", or "tensor" for the norms of whole tensors.
        seed: of the noise, see ``samkern.optim.Gaussian``.
        options: further options of ``SharpnessAware`` and of ``base``.

    Memory: a saved copy of the weights while they are perturbed, and with several draws one gradient more. Running statistics
    of BatchNorm come from the perturbed passes, the only ones: estimate them anew before evaluating, by ``samkern.update_bn``.

    Raises:
        ValueError: an option is out of range, or ``total_steps`` is missing; the message names it and its value.

    Bisla, Wang and Choromanska, AISTATS 2022, https://arxiv.org/abs/2201.08025.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.LPFSGD(model.parameters(), torch.optim.SGD, lr=0.1, draws=2, total_steps=100)
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = model(torch.ones(4, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> _ = opt.step(closure)
    >>> opt.evaluations
    2
    """

    def __init__(
        self,
        params: Any,
        base: Any,
        std: float = 5e-4,
        *,
        inc: float = 15.0,
        draws: int = 8,
        total_steps: int | None = None,
        scale: str = "filter",
        seed: int = 0,
        **options: Any,
    ) -> None:
        noise = Gaussian(std, inc, draws, total_steps, scale, seed)
        super().__init__(params, base, perturbation=noise, **options)
