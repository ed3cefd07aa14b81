"""torch.optim's SGD, Adam and AdamW as their formulas, and any other by running it.

An option is one value, or a list with one for each weight. ``step`` takes one gradient per weight; None leaves it alone.
"""

from __future__ import annotations

import torch


def per_weight(value, w):
    return list(value) if isinstance(value, list) else [value] * len(w)


class Base:
    """``options`` and ``state`` of each weight, by torch's names."""

    def __init__(self, w, lr, **options):
        self.w, self.options, self.state = [], [], []
        self.add(w, lr=lr, **options)

    def add(self, w, **options):
        """Further weights."""
        columns = {name: per_weight(value, w) for name, value in options.items()}
        self.w = [*self.w, *w]
        self.options += [{name: column[i] for name, column in columns.items()} for i in range(len(w))]
        self.state += [{} for _ in w]

    def step(self, u):
        for w, grad, state, options in zip(self.w, u, self.state, self.options, strict=True):
            if grad is not None:
                self.update(w, grad, state, **options)


class Sgd(Base):
    def update(self, w, grad, state, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        d = grad + weight_decay * w.data
        if momentum != 0:
            v = state.get("momentum_buffer")
            v = d.clone() if v is None else momentum * v + (1 - dampening) * d
            state["momentum_buffer"] = v
            d = d + momentum * v if nesterov else v
        w.data = w.data - lr * d


class Adam(Base):
    def update(self, w, grad, state, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        m, v = (state.get(key, torch.zeros_like(grad)) for key in ("exp_avg", "exp_avg_sq"))
        t = state.get("step", 0)
        b1, b2 = betas
        grad = grad + weight_decay * w.data
        m, v, t = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2, t + 1
        state.update(exp_avg=m, exp_avg_sq=v, step=t)
        w.data = w.data - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


class AdamW(Adam):
    def update(self, w, grad, state, lr, weight_decay=1e-2, **options):
        w.data = w.data * (1 - lr * weight_decay)
        super().update(w, grad, state, lr, **options)


class Foreign(Base):
    """``cls`` of torch.optim itself, with gradients, weights and state in the ``dtype`` that each weight has elsewhere."""

    def __init__(self, cls, w, dtype, **options):
        self.cls, self.own = cls, None
        super().__init__(w, dtype=dtype, **options)

    def add(self, w, dtype, **options):
        own = [x.detach().to(d) for x, d in zip(w, per_weight(dtype, w), strict=True)]
        super().add(w, **options)
        groups = [{"params": [p], **o} for p, o in zip(own, self.options[-len(w) :], strict=True)]
        if self.own is None:
            self.own = self.cls(groups)
        else:
            for group in groups:
                self.own.add_param_group(group)
        self.params = [p for group in self.own.param_groups for p in group["params"]]
        self.state = [self.own.state[p] for p in self.params]

    def step(self, u):
        for group, options, p, w, grad in zip(self.own.param_groups, self.options, self.params, self.w, u, strict=True):
            group.update(options)
            p.data.copy_(w.data)
            p.grad = None if grad is None else grad.to(p.dtype)
        self.own.step()
        for p, w, grad in zip(self.params, self.w, u, strict=True):
            if grad is not None:
                w.data = p.data.to(w.dtype)
