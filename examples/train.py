"""SAM in an ordinary training loop: change the optimizer, put the backward into a closure."""

import torch
from torch import nn

import samkern

torch.manual_seed(0)
x, y = torch.randn(512, 20), torch.randint(0, 3, (512,))
model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))

opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=40)

for _ in range(5):
    for xb, yb in zip(x.split(64), y.split(64), strict=True):

        def closure(xb=xb, yb=yb):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(xb), yb)
            loss.backward()
            return loss

        loss = opt.step(closure)
        schedule.step()
    print(f"loss {loss.item():.3f}  norm of the gradient {opt.last_step.grad_norm.item():.3f}  pairs {opt.evaluations}")
