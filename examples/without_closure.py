"""LookSAM without a closure: four of five steps need no second pass, and first_step() says which."""

import torch
from torch import nn

import samkern

torch.manual_seed(0)
x, y = torch.randn(256, 10), torch.randn(256, 1)
model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
opt = samkern.LookSAM(model.parameters(), torch.optim.AdamW, lr=1e-2, rho=0.05, k=5)
print(opt.explain())

for step in range(10):
    opt.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    if opt.first_step():  # weights are perturbed now
        nn.functional.mse_loss(model(x), y).backward()
    opt.second_step()
    print(f"step {step}: loss {loss.item():.4f}{', looked' if opt.last_step.looked else ''}")
