"""What samkern is compared with, each in the form in which its users run it.

A stepper holds parameters of its own, and has ``first()`` and ``second()``: the two halves of a step, with gradients in
``p.grad``. ``looks()`` tells whether the step that comes next takes a second pass.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.optim import SGD

import samkern
from samkern import reference

OPTIONS = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
RHO, K, ALPHA = 0.05, 5, 0.7


class Ours:
    name = "cpu"

    def __init__(self, w: list[Tensor], make=samkern.SAM, **options) -> None:
        self.params = [torch.nn.Parameter(x) for x in w]
        self.opt = make(self.params, SGD, **options, **OPTIONS)
        self.first, self.second = self.opt.first_step, self.opt.second_step

    def looks(self) -> bool:
        return self.opt.schedule.look(self.opt._t)


class EagerLoop:
    """One operation per tensor and line of the formula, as most SAM classes are written; SGD per tensor too."""

    name = "eager loop"

    def __init__(self, w: list[Tensor]) -> None:
        self.params = [torch.nn.Parameter(x) for x in w]
        self.base = SGD(self.params, foreach=False, fused=False, **OPTIONS)

    def looks(self) -> bool:
        return True

    @torch.no_grad()
    def first(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.params]), p=2)
        scale = RHO / (norm + 1e-12)
        self.old = [p.data.clone() for p in self.params]
        for p in self.params:
            p.add_(p.grad * scale)

    @torch.no_grad()
    def second(self) -> None:
        for p, old in zip(self.params, self.old, strict=True):
            p.copy_(old)
        self.base.step()


class ForeachChain:
    """The best that torch's list kernels give: norms, save, climb and restore as _foreach ops, then its fused SGD."""

    name = "foreach + fused SGD"

    def __init__(self, w: list[Tensor]) -> None:
        self.params = [torch.nn.Parameter(x) for x in w]
        self.saved = [torch.empty_like(x) for x in w]
        self.base = SGD(self.params, fused=True, **OPTIONS)

    def looks(self) -> bool:
        return True

    @torch.no_grad()
    def first(self) -> None:
        grads = [p.grad for p in self.params]
        scale = RHO / (torch.stack(torch._foreach_norm(grads)).norm() + 1e-12)
        torch._foreach_copy_(self.saved, self.params)
        torch._foreach_add_(self.params, torch._foreach_mul(grads, scale))

    @torch.no_grad()
    def second(self) -> None:
        torch._foreach_copy_(self.params, self.saved)
        self.base.step()


class Compiled:
    """samkern's reference passes, fused by torch.compile."""

    name = "torch.compile"

    def __init__(self, w: list[Tensor]) -> None:
        self.params = [torch.nn.Parameter(x) for x in w]
        self.saved = [torch.empty_like(x) for x in w]
        self.momentum = [torch.zeros_like(x) for x in w]
        options = dict(OPTIONS)

        def first(w: list[Tensor], g: list[Tensor], saved: list[Tensor]) -> None:
            norm = reference.norms(g)[0, -1].sqrt()
            reference.perturb(w, g, saved, RHO / (norm + reference.TINY))

        def second(w: list[Tensor], g: list[Tensor], saved: list[Tensor], momentum: list[Tensor]) -> None:
            skip = ~reference.norms(g)[0, -1].isfinite()
            reference.update_sgd(w, g, momentum, saved=saved, skip=skip, **options)

        self._first, self._second = torch.compile(first, dynamic=False), torch.compile(second, dynamic=False)

    def looks(self) -> bool:
        return True

    @torch.no_grad()
    def first(self) -> None:
        self._first(self.params, [p.grad for p in self.params], self.saved)

    @torch.no_grad()
    def second(self) -> None:
        self._second(self.params, [p.grad for p in self.params], self.saved, self.momentum)


class PytorchOptimizer:
    """pytorch_optimizer 4.1.0, through its own first_step and second_step."""

    def __init__(self, w: list[Tensor], cls: str, foreach: bool, **more) -> None:
        import pytorch_optimizer

        self.name = f"pytorch_optimizer {'foreach' if foreach else 'default'}"
        self.params = [torch.nn.Parameter(x) for x in w]
        options = {"k": K, "alpha": ALPHA} if cls == "LookSAM" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            extra = {"foreach": True} if foreach else {}
            self.opt = getattr(pytorch_optimizer, cls)(self.params, SGD, rho=RHO, **options, **extra, **more, **OPTIONS)
        self.first, self.second = self.opt.first_step, self.opt.second_step

    def looks(self) -> bool:
        return not hasattr(self.opt, "k") or self.opt.get_step() % self.opt.k == 0


class ForeachLookSAM(ForeachChain):
    """LookSAM of global scope from _foreach ops."""

    def __init__(self, w: list[Tensor]) -> None:
        super().__init__(w)
        self.t, self.cache = 0, None

    def looks(self) -> bool:
        return self.t % K == 0

    @torch.no_grad()
    def first(self) -> None:
        if self.looks():
            super().first()
            self.g = [p.grad for p in self.params]

    @torch.no_grad()
    def second(self) -> None:
        grads = [p.grad for p in self.params]
        if self.looks():
            torch._foreach_copy_(self.params, self.saved)
            products = torch._foreach_mul(grads, self.g)
            dot = torch.stack([x.sum() for x in products]).sum()
            k = dot / torch.stack(torch._foreach_norm(self.g)).norm() ** 2
            self.cache = torch._foreach_sub(grads, torch._foreach_mul(self.g, k))
            self.cache_norm = torch.stack(torch._foreach_norm(self.cache)).norm()
        else:
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            torch._foreach_add_(grads, torch._foreach_mul(self.cache, ALPHA * norm / self.cache_norm))
        self.base.step()
        self.t += 1
