"""The Hessian of a mean loss as a matrix, entry by entry, in float64. Nothing of samkern."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense(net: nn.Module, loss_fn, data) -> torch.Tensor:
    """Of the mean over all samples of the batches, in the parameters that require a gradient, in evaluation mode."""
    net = copy.deepcopy(net).double().eval()
    params = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    start = torch.cat([p.flatten() for p in params.values()])
    data = [(x.double(), y.double() if y.is_floating_point() else y) for x, y in data]
    n_samples = sum(len(x) for x, _ in data)

    def loss(vector):
        parts, first = {}, 0
        for name, p in params.items():
            parts[name] = vector[first : first + p.numel()].view(p.shape)
            first += p.numel()
        return sum(loss_fn(torch.func.functional_call(net, parts, (x,)), y) * len(x) / n_samples for x, y in data)

    with sdpa_kernel(SDPBackend.MATH):  # the kind of attention that can be differentiated twice
        return torch.autograd.functional.hessian(loss, start)


def spectrum(net: nn.Module, loss_fn, data) -> list[float]:
    """Its eigenvalues, from the largest on."""
    return torch.linalg.eigvalsh(dense(net, loss_fn, data)).flip(0).tolist()


def effective_dimension_by_share(eigenvalues: list[float], q: float) -> int:
    positive = sorted((value for value in eigenvalues if value > 0), reverse=True)
    for j in range(len(positive) + 1):
        if sum(positive[:j]) >= q * sum(positive):
            return j
    raise AssertionError
