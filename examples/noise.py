"""LPF-SGD: every part of the batch sees its own Gaussian noise on the weights, for the price of SGD."""

import torch
from torch import nn

import samkern

torch.manual_seed(0)
x, y = torch.randn(512, 20), torch.randint(0, 3, (512,))
model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
n_epochs, batch_size, parts = 5, 64, 4

opt = samkern.LPFSGD(
    model.parameters(),
    torch.optim.SGD,
    lr=0.1,
    momentum=0.9,
    std=2e-3,
    inc=10,  # the noise grows to ten times that
    total_steps=n_epochs * len(x) // batch_size,
)


def closure_over(xb, yb):
    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(xb), yb)
        loss.backward()
        return loss

    return closure


for _ in range(n_epochs):
    for xb, yb in zip(x.split(batch_size), y.split(batch_size), strict=True):
        loss = opt.step([closure_over(*part) for part in zip(xb.chunk(parts), yb.chunk(parts), strict=True)])
    print(f"loss {loss.item():.3f}  pairs {opt.evaluations}")

# Statistics of BatchNorm are those of noisy passes: estimate them at the weights that are kept.
samkern.update_bn(model, x.split(batch_size))
model.eval()
print(f"loss in the end {nn.functional.cross_entropy(model(x), y).item():.3f}")
