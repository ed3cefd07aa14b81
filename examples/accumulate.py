"""Gradient accumulation: both sweeps go over the same micro-batches, and the weights are those of the whole batch."""

import copy

import torch
from torch import nn

import samkern

torch.manual_seed(0)
x, y = torch.randn(256, 10), torch.randn(256, 1)
start = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
MICRO_BATCH = 24  # the last one may be smaller


def sweep(model, xb, yb, size):
    """Adds up the gradients of the mean loss of a batch; returns that loss."""
    total = 0.0
    for xs, ys in zip(xb.split(size), yb.split(size), strict=True):
        loss = nn.functional.mse_loss(model(xs), ys, reduction="sum") / len(xb)
        loss.backward()
        total += loss.detach()
    return total


def train(size, with_closure):
    model = copy.deepcopy(start)
    opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
    for _ in range(10):
        for xb, yb in zip(x.split(128), y.split(128), strict=True):
            if with_closure:

                def closure(xb=xb, yb=yb):
                    opt.zero_grad()
                    return sweep(model, xb, yb, size)

                loss = opt.step(closure)
            else:
                loss = sweep(model, xb, yb, size)
                if opt.first_step():  # the weights climb once, along the gradient of the whole batch
                    sweep(model, xb, yb, size)
                opt.second_step(zero_grad=True)
    return loss.item(), model[0].weight.detach()


whole_loss, whole = train(128, with_closure=True)
for with_closure in (True, False):
    loss, weight = train(MICRO_BATCH, with_closure)
    print(f"loss {loss:.6f}, of whole batches {whole_loss:.6f}, {'with a' if with_closure else 'without'} closure")
    print("weights equal up to rounding:", torch.allclose(weight, whole, atol=1e-6))
