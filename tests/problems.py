"""Small learning problems: a net with BatchNorm, biases, a frozen and an unused tensor, and batches by step number."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .lists import seeded


class Net(nn.Module):
    """A convolution without bias in front of BatchNorm (its gradient would be rounding noise), and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6 * 36, 5)
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        return self.head(torch.tanh(self.conv2(x)).flatten(1))


def make_net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(1000 + t)
    x = torch.randn(12, 1, 8, 8, generator=generator).to(dtype)
    return x, torch.randint(0, 5, (12,), generator=generator)


def closure_for(net: nn.Module, t: int, zero_grad, dtype: torch.dtype = torch.float64):
    """Zeroes gradients, computes the loss of batch ``t``, and calls backward."""
    x, y = batch(t, dtype)

    def closure() -> torch.Tensor:
        zero_grad()
        loss = F.cross_entropy(net(x).double(), y)
        loss.backward()
        return loss.detach()

    return closure


def scaled(closure, net: nn.Module, scale: float):
    """``closure``, and gradients times ``scale``."""

    def scaled_closure():
        loss = closure()
        for p in net.parameters():
            if p.grad is not None:
                p.grad.mul_(scale)
        return loss

    return scaled_closure


def train(net: nn.Module, opt, steps, dtype: torch.dtype = torch.float64) -> list[float]:
    return [float(opt.step(closure_for(net, t, opt.zero_grad, dtype))) for t in steps]


def flat(net: nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copied(how: str, net: nn.Module, opt, make: Callable[[Any], Any]) -> tuple[nn.Module, Any]:
    """Net and optimizer again: by "deepcopy", by "pickle", or from a "file" into others, which ``make`` makes."""
    if how == "deepcopy":
        return copy.deepcopy((net, opt))
    if how == "pickle":
        return pickle.loads(pickle.dumps((net, opt)))
    dtype = next(net.parameters()).dtype
    twin = make_net(dtype, seed=9)
    other = make(twin.parameters())
    train(twin, other, range(3), dtype)  # what is loaded replaces what is there
    twin.load_state_dict(through_a_file(net.state_dict()))
    other.load_state_dict(through_a_file(opt.state_dict()))
    return twin, other


class Quadratic(nn.Module):
    """The output is w' H w / 2 times x, with the eigenvalues given, in a random basis."""

    def __init__(self, spectrum: list[float], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        n = len(spectrum)
        basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
        self.h = (basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T).to(dtype)
        self.w = nn.Parameter(torch.randn(n, dtype=torch.float64).to(dtype))

    def forward(self, x):
        return self.w @ self.h @ self.w / 2 * x
