"""How far: a radius that is learned from a validation batch while the weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..options import Scaling
from ..reference import math_dtype
from .checks import at_least, at_least_int, one_of
from .gradients import inverse_sq
from .ranks import mean_of_all_ranks, same_on_all_ranks

Gradients = Sequence[Tensor | None]


class LearnedRadius:
    """LETS: the radius descends on ``(L_val(w+) - L_train(w+))^2 / 2``, ``w+`` the weights after a step.

    Every ``period`` steps: ``rho = clip(rho - beta dJ, rho_min, rho_max)`` with
    ``dJ = (L_val - L_train) <g_val - g_train, dw>``, gradients at ``w+``, and ``dw`` how ``w+`` moves with ``rho``. Needs
    ``opt.step(closure, val_closure=...)``, with closures that return the loss, and two more forward-backward pairs for an
    update. One radius for all groups with ``rho > 0``: a tensor in ``param_groups``, which no step reads back from a GPU.

    Args:
        rho: at first, > 0.
        beta: learning rate of the radius, >= 0.
        period: in steps, >= 1. Where a step does not look, the update waits for the next that does.
        rho_min, rho_max: ``0 < rho_min <= rho <= rho_max``.
        hyper: dw is ``-lr (g_s - g) / rho`` ("secant", exact on quadratics for SGD without momentum; other bases take the
            same), or ``-lr g_s^2 eps / rho`` ("diag", with squared gradients for the Hessian).

    Raises:
        ValueError: an option is out of range.

    LETS: learning to sharpness, with the secant in place of the paper's approximation.

    >>> samkern.optim.LearnedRadius(rho=0.1).rho
    tensor(0.1000, dtype=torch.float64)
    """

    def __init__(
        self,
        rho: float = 0.05,
        beta: float = 0.1,
        period: int = 10,
        rho_min: float = 0.01,
        rho_max: float = 0.5,
        hyper: str = "secant",
    ) -> None:
        at_least("beta", beta, 0)
        at_least_int("period", period, 1)
        at_least("rho_min", rho_min, 0, strictly=True)
        at_least("rho_max", rho_max, rho_min)
        at_least("rho", rho, rho_min)
        if rho > rho_max:
            raise ValueError(f"rho must be at most rho_max = {rho_max}, got {rho!r}")
        one_of("hyper", hyper, ("secant", "diag"))
        self.beta, self.period, self.rho_min, self.rho_max, self.hyper = beta, period, rho_min, rho_max, hyper
        self.initial = rho
        self.rho = torch.tensor(rho, dtype=torch.float64)
        self._waits = self.is_ready = False
        self.forget()

    def forget(self) -> None:
        """Ends what has begun for a step."""
        self.is_ready = False
        self._first: Gradients = []
        self._old: dict[int, Tensor] = {}
        self._moves: list[tuple[int, Tensor, Tensor]] = []
        self._aside: list[Gradients] = []

    def attach(self, groups: Sequence[dict[str, Any]], key: str, device: torch.device) -> None:
        """Puts the radius into the groups that are perturbed, as their option ``key``."""
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # which kernels read on a GPU
        self.rho = self.rho.to(device, dtype)
        for group in groups:
            if isinstance(group[key], Tensor) or group[key] > 0:
                group[key] = self.rho

    def is_due(self, t: int) -> bool:
        """Whether the radius is updated after step ``t``, if that looks."""
        return self._waits or (t + 1) % self.period == 0

    def before_climb(self, params: Sequence[Tensor]) -> None:
        """The first gradients are in place."""
        self.forget()  # what an interrupt may have left
        self._first = [p.grad for p in params]
        if self.hyper == "diag":
            moving = [i for i, p in enumerate(params) if p.requires_grad or p.grad is not None]
            self._old = {i: params[i].detach().clone() for i in moving}

    def before_update(self, params: Sequence[Tensor], overwrites: bool) -> None:
        """The second gradients are in place, and weights perturbed. ``overwrites``: the update may write to gradients."""
        for i, (p, g) in enumerate(zip(params, self._first, strict=True)):
            g_s = p.grad
            if g_s is None:
                continue
            if self.hyper == "diag":
                # A square of a half type, or of a gradient with a loss scale, would overflow there.
                move = g_s.to(math_dtype(p.dtype)).square() * (p.detach() - self._old[i])
                self._moves.append((i, move, torch.zeros_like(move)))
            else:
                first = torch.zeros_like(g_s) if g is None else g
                self._moves.append((i, g_s.clone() if overwrites else g_s, first))

    def set_aside(self, gradients: Gradients) -> Gradients:
        """Counts them as held until ``forget()``. Returns them."""
        self._aside.append(gradients)
        return gradients

    def extra_bytes(self, p: Tensor, of_gradient: int, overwrites: bool) -> int:
        """What ``p`` takes until the radius is updated, beside gradients, whose bytes are ``of_gradient``."""
        if self.hyper == "diag":
            return p.numel() * (p.element_size() + 2 * math_dtype(p.dtype).itemsize)
        return of_gradient if overwrites else 0

    def learn(
        self,
        train: tuple[Any, Gradients],
        val: tuple[Any, Gradients],
        lrs: Sequence[float | Tensor],
        skipped: Tensor,
        scaling: Scaling,
        backend: str,
        model: nn.Module | None = None,
    ) -> None:
        """Updates the radius from losses and gradients at ``w+``, unless the step was skipped or something is not finite.

        ``lrs``: of each parameter. ``model``: whose ranks each have a loss of their own.
        """
        (train_loss, gt), (val_loss, gv) = train, val
        moves = [(i, a, b) for i, a, b in self._moves if gt[i] is not None or gv[i] is not None]
        lists = [
            [_or_zero(gv[i], a) for i, a, _ in moves],
            [_or_zero(gt[i], a) for i, a, _ in moves],
            [a for _, a, _ in moves],
            [b for _, _, b in moves],
        ]
        device = self.rho.device
        rates = [lrs[i] for i, _, _ in moves]
        if any(isinstance(lr, Tensor) for lr in rates):
            rates_there = torch.stack(
                [torch.as_tensor(lr, dtype=torch.float64, device=device).squeeze() for lr in rates]
            )
        else:
            rates_there = torch.tensor(rates, dtype=torch.float64).to(device, non_blocking=True)
        dots = ops.difference_dot(*lists, backend=backend)[:-1] if moves else rates_there
        scale = inverse_sq(scaling)
        if self.hyper == "diag":  # three gradients in a product
            scale = scale * (inverse_sq(scaling) ** 0.5)
        rho = self.rho.double()
        losses = [torch.as_tensor(loss, device=device).double().squeeze() for loss in (val_loss, train_loss)]
        gap = mean_of_all_ranks(losses[0] - losses[1], model)
        slope = gap * -(rates_there * dots).sum() * scale / rho
        new = (rho - self.beta * slope).clamp(self.rho_min, self.rho_max)
        self.rho.copy_(torch.where(skipped | ~slope.isfinite(), rho, new))
        same_on_all_ranks(self.rho, model)

    def settle(self, t: int, looked: bool) -> None:
        """Step ``t`` is done. ``is_ready`` is now whether ``learn`` is due."""
        is_due = self.is_due(t)
        self._waits, self.is_ready = is_due and not looked, is_due and looked

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        return {"rho": self.rho.clone(), "waits": self._waits}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes ``state`` back; an empty mapping (the base's own checkpoint) leaves the radius as it is."""
        if "rho" in state:
            self.rho.copy_(state["rho"])
        self._waits = state.get("waits", False)
        self.forget()


def _or_zero(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x
