"""torch.optim's SGD, Adam and AdamW as their formulas. ``step`` takes one gradient per weight; None leaves it alone."""

from __future__ import annotations

import torch


class Sgd:
    def __init__(self, w, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        self.w, self.lr, self.mu, self.dampening, self.wd, self.nesterov = (
            w,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
        )
        self.v = [None] * len(w)

    def step(self, u):
        for i, (w, grad) in enumerate(zip(self.w, u, strict=True)):
            if grad is None:
                continue
            d = grad + self.wd * w.data
            if self.mu != 0:
                self.v[i] = d.clone() if self.v[i] is None else self.mu * self.v[i] + (1 - self.dampening) * d
                d = d + self.mu * self.v[i] if self.nesterov else self.v[i]
            w.data = w.data - self.lr * d


class Adam:
    decoupled = False

    def __init__(self, w, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.w, self.lr, self.betas, self.eps, self.wd = w, lr, betas, eps, weight_decay
        self.m = [torch.zeros_like(x) for x in w]
        self.v = [torch.zeros_like(x) for x in w]
        self.t = [0] * len(w)

    def step(self, u):
        b1, b2 = self.betas
        for i, (w, grad) in enumerate(zip(self.w, u, strict=True)):
            if grad is None:
                continue
            if self.decoupled:
                w.data = w.data * (1 - self.lr * self.wd)
            else:
                grad = grad + self.wd * w.data
            self.t[i] += 1
            self.m[i] = b1 * self.m[i] + (1 - b1) * grad
            self.v[i] = b2 * self.v[i] + (1 - b2) * grad**2
            m_hat = self.m[i] / (1 - b1 ** self.t[i])
            v_hat = self.v[i] / (1 - b2 ** self.t[i])
            w.data = w.data - self.lr * m_hat / (v_hat.sqrt() + self.eps)


class AdamW(Adam):
    decoupled = True

    def __init__(self, w, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(w, lr, betas, eps, weight_decay)
