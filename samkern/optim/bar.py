"""BAR: what SAM does to the balance of two factors, at no further pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..lora import Adapter, factor_pairs
from ..options import Scaling
from ..reference import finite
from ..shards import locals_of
from .attached import Attached
from .checks import at_least, at_least_int, one_of
from .companion import within_wrappers
from .gradients import inverse_sq

if TYPE_CHECKING:
    from .loop import StepLoop

_LARGEST = 0.5  # of what a factor changes in a step, relative to itself


class BAR(Attached):
    """Balancedness-aware regularisation of factors x, y that enter a model by their product, as A and B of an adapter do.

    SAM's second pass changes how a norm is shared between x and y. This does the same by a term
    ``sg alpha (norm(x)^2 - norm(y)^2)`` for each pair, right before the update of ``optimizer``::

        x = x (1 - 2 lr sg alpha)        y = y (1 + 2 lr sg alpha)        |2 lr alpha| <= 0.5

    which leaves their product as it is, to first order. Gradients are not changed. Nothing is read from a GPU.

    Args:
        optimizer: any ``torch.optim`` optimizer, whose ``step()`` then takes no closure; or one of samkern that takes one
            gradient a step, such as ``FlatLoRA``. lr is that of the group of a factor.
        pairs_or_model: a list of ``(x, y)`` or of ``samkern.Adapter``, or a model, whose adapters are taken.
        kind: "nbar": ``sg = sign(norm(g_y)^2 - norm(g_x)^2)``, as SAM does. "obar":
            ``sg = sign(norm(x) - norm(y))``, which makes both norms equal.
        a: alpha is ``kappa(t) a`` for a number ``a`` >= 0; "matched": with N = ``norm(x)^2 + norm(y)^2`` and G the norm of
            both gradients, ``rho |norm(g_x)^2 - norm(g_y)^2| / (2 G N)`` for "nbar", which to first order is what SAM
            with this ``rho`` does to the balance of a single pair, and ``rho G / N`` for "obar".
        rho: of "matched", >= 0.
        decay: kappa falls from 1 to 0 along half a cosine ("cosine") or a line ("linear"), or stays 1 ("constant").
        total_steps: of the training, unless ``decay="constant"``. Later steps have kappa as in the end.

    A pair of which a gradient is missing stays as it is; so do all in a step that is skipped. ``state_dict()`` is to be saved
    beside the optimizer's, which knows nothing of this; ``copy.deepcopy`` and pickle take the optimizer along: copy the two
    together, with the model. ``detach()`` ends it. In half-precision factors, changes below half
    a unit in the last place vanish.

    Raises:
        ValueError: an option is out of range, a factor is no parameter of ``optimizer``, or that takes two passes.
        TypeError: pairs are no pairs; a step of a ``torch.optim`` optimizer is called with a closure.

    Li, Zhang and He, NeurIPS 2024, https://arxiv.org/abs/2410.14802.

    >>> x, y = torch.nn.Parameter(torch.ones(2, 4)), torch.nn.Parameter(2 * torch.ones(3, 2))
    >>> opt = torch.optim.SGD([x, y], lr=0.1)
    >>> bar = samkern.BAR(opt, [(x, y)], kind="obar", a=0.5, decay="constant")
    >>> x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
    >>> opt.step()
    >>> x[0, 0].detach(), y[0, 0].detach()
    (tensor(1.1000), tensor(1.8000))
    """

    writes_weights = True
    _made_anew = ("_lrs",)

    def __init__(
        self,
        optimizer: Optimizer,
        pairs_or_model: nn.Module | Iterable[Adapter | tuple[Tensor, Tensor]],
        *,
        kind: str = "nbar",
        a: str | float = "matched",
        rho: float = 0.05,
        decay: str = "cosine",
        total_steps: int | None = None,
    ) -> None:
        one_of("kind", kind, ("nbar", "obar"))
        if a != "matched":
            at_least("a", a, 0)  # type: ignore[arg-type]
        at_least("rho", rho, 0)
        one_of("decay", decay, ("cosine", "linear", "constant"))
        if decay != "constant" or total_steps is not None:
            at_least_int("total_steps", total_steps, 1)  # type: ignore[arg-type]
        optimizer = within_wrappers(optimizer)
        self.kind, self.a, self.rho, self.decay, self.total_steps = kind, a, rho, decay, total_steps
        self.t = 0
        self._pairs = _pairs(pairs_or_model)
        self._lrs: tuple[list[float], Tensor] | None = None
        self._learning_rates(optimizer)
        self.attach_to(optimizer)

    def _hooks_into(self, optimizer: Optimizer) -> list[RemovableHandle]:
        return [optimizer.register_step_pre_hook(self._before_step)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_lrs": None})

    def state_dict(self) -> dict[str, Any]:
        """How many steps there have been."""
        return {"t": self.t}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from there."""
        at_least_int("t", state_dict["t"], 0)
        self.t = state_dict["t"]

    @property
    def kappa(self) -> float:
        """Of the next step."""
        if self.decay == "constant":
            return 1.0
        s = min(self.t / self.total_steps, 1.0)  # type: ignore[operator]
        return (1 + math.cos(math.pi * s)) / 2 if self.decay == "cosine" else 1 - s

    # ---- as a companion, and as a hook

    def check(self, opt: StepLoop) -> None:
        if not opt.perturbation.before_pass:
            name = type(opt.perturbation).__name__
            raise ValueError(
                f"BAR stands for the second pass that {name} takes: use it in place of that, with an optimizer of torch.optim, "
                "FlatLoRA, LPFSGD or MSAM"
            )
        if opt.capturable:
            raise ValueError("BAR does not go with capturable=True: a graph would repeat one kappa")

    def before_update(self, params: Sequence[Tensor], scaling: Scaling, check: bool) -> None:
        self._balance([p for p in params if p.grad is not None] if check else [], scaling)

    def settle(self) -> None:
        self.t += 1

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = [*args[1:], kwargs.get("closure")][0]  # args begins with the optimizer itself
        if closure is not None:
            raise TypeError(
                "BAR needs the gradients before the step: call the closure, which leaves them in place, and then step() "
                f"without one, got closure={closure!r}"
            )
        # What a scaler leaves to an optimizer that unscales by itself.
        self._balance([], Scaling(*(getattr(optimizer, name, None) for name in Scaling._fields)))
        self.settle()

    @torch.no_grad()
    def _balance(self, checked: Sequence[Tensor], scaling: Scaling) -> None:
        """``checked``: parameters of which no gradient may be infinite or NaN, or nothing is changed."""
        optimizer = self._optimizer()
        pairs = [i for i, (x, y) in enumerate(self._pairs) if x.grad is not None and y.grad is not None]
        if optimizer is None or not pairs or self.kappa == 0:
            return
        factors = [self._pairs[i][j] for j in (0, 1) for i in pairs]
        among = set(factors)
        listed = [*factors, *(p for p in checked if p not in among)]
        gradients: list[Tensor] = [p.grad for p in listed]  # type: ignore[misc]
        squares, sizes = ops.norms(gradients)[0, :-1], ops.norms(factors)[0, :-1]
        (xx, yy), (gx, gy) = sizes.view(2, -1), squares[: len(factors)].view(2, -1) * inverse_sq(scaling)
        half = self._signed_alpha(xx, yy, gx, gy)
        lr = self._learning_rates(optimizer)[:, pairs].to(half.device)
        change = (2 * lr * half).clamp(-_LARGEST, _LARGEST)
        change = torch.cat([-change[0], change[1]])
        sound = change.isfinite()
        if checked:
            sound = sound & finite(squares, gradients)
        if scaling.found_inf is not None:
            sound = sound & (scaling.found_inf.squeeze() == 0)
        multipliers = 1 + torch.where(sound, change, 0.0)
        torch._foreach_mul_(locals_of(factors), list(multipliers.unbind()))

    def _signed_alpha(self, xx: Tensor, yy: Tensor, gx: Tensor, gy: Tensor) -> Tensor:
        """``sg alpha`` of each pair, from squared norms."""
        sign = torch.sign(gy - gx) if self.kind == "nbar" else torch.sign(xx - yy)
        if self.a != "matched":
            return sign * (self.kappa * self.a)  # type: ignore[operator]
        norm, n = (gx + gy).sqrt(), xx + yy
        matched = (gx - gy).abs() / (2 * norm * n) if self.kind == "nbar" else norm / n
        return sign * torch.where((norm > 0) & (n > 0), matched, 0.0) * (self.kappa * self.rho)

    def _learning_rates(self, optimizer: Optimizer) -> Tensor:
        """float64 [2, n]: of the first and of the second factors."""
        of = {p: group.get("lr") for group in optimizer.param_groups for p in group["params"]}
        for i, pair in enumerate(self._pairs):
            for p in pair:
                if not isinstance(of.get(p), (int, float, Tensor)):
                    why = "its group has no lr" if p in of else "it is no parameter of the optimizer"
                    raise ValueError(f"pair {i} has a factor of shape {tuple(p.shape)} that cannot be balanced: {why}")
        lrs = [of[pair[j]] for j in (0, 1) for pair in self._pairs]
        device = self._pairs[0][0].device
        if any(isinstance(lr, Tensor) for lr in lrs):
            return torch.stack([torch.as_tensor(lr, dtype=torch.float64, device=device) for lr in lrs]).view(2, -1)
        if self._lrs is None or self._lrs[0] != lrs or self._lrs[1].device != device:
            self._lrs = lrs, torch.tensor(lrs, dtype=torch.float64, device=device).view(2, -1)  # type: ignore[assignment]
        return self._lrs[1]  # type: ignore[index]


def _pairs(given: nn.Module | Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    pairs = factor_pairs("pairs_or_model", given)
    of_all = [p for pair in pairs for p in pair]
    if len(set(of_all)) < len(of_all):
        raise ValueError("a factor is in several pairs, whose balances would go against each other: give it once")
    return pairs
