"""What samkern is compared with, each in the form in which its users run it.

A stepper holds parameters of its own, and has ``first()`` and ``second()``: the two halves of a step, with gradients in
``p.grad``. ``looks()`` tells whether the step that comes next takes a second pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

import samkern
from samkern import reference
from samkern.optim.companion import RunningAverage
from samkern.options import AverageOptions

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


class Mean(RunningAverage):
    """Of the weights after every step."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.taken = torch.zeros(1, dtype=torch.int64, device=params[0].device)
        self.averages = [torch.zeros_like(p, dtype=reference.math_dtype(p.dtype), requires_grad=False) for p in params]

    def due(self) -> AverageOptions:
        return AverageOptions(self.taken)

    def tensors(self, params: Sequence[Tensor]) -> list[Tensor]:
        return self.averages

    def add(self, params: Sequence[Tensor], skip: Tensor | None = None) -> None:
        raise NotImplementedError("bases are fused here")


class Averaged(Ours):
    """The mean of weights is taken in the update."""

    def __init__(self, w: list[Tensor], **options) -> None:
        super().__init__(w, **options)
        mean = Mean(self.params)
        self.opt.attach(mean)
        self.averages = mean.averages


class ThenLerp(Ours):
    """Our update, and then the mean by one of torch's list kernels."""

    name = "cpu, then foreach lerp"

    def __init__(self, w: list[Tensor]) -> None:
        super().__init__(w)
        self.averages, self.taken = [torch.zeros_like(x) for x in w], 0
        self.second = self.step_and_lerp

    @torch.no_grad()
    def step_and_lerp(self) -> None:
        self.opt.second_step()
        self.taken += 1
        torch._foreach_lerp_(self.averages, self.params, 1 / self.taken)


class ThenAveragedModel(Ours):
    """Our update, and then torch's class."""

    name = "cpu, then AveragedModel"

    def __init__(self, w: list[Tensor]) -> None:
        super().__init__(w)
        model = torch.nn.ParameterList(self.params)
        averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
        self.averages = [p.detach() for p in averaged.parameters()]

        def step_and_average() -> None:
            self.opt.second_step()
            averaged.update_parameters(model)

        self.second = step_and_average


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
