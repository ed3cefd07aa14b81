"""ASAM with groups: biases and norms without weight decay and with T = 1, a frozen backbone, a head with a larger radius."""

import torch
from torch import nn

import samkern

torch.manual_seed(0)
backbone = nn.Sequential(nn.Linear(10, 32), nn.LayerNorm(32), nn.GELU())
head = nn.Linear(32, 2)
model = nn.Sequential(backbone, head)
backbone[0].requires_grad_(False)

plain = [p for name, p in backbone.named_parameters() if p.requires_grad]
opt = samkern.ASAM(
    [
        {"params": [head.weight], "rho": 1.0},
        {"params": [head.bias, *plain], "adaptive": False, "weight_decay": 0.0},
    ],
    torch.optim.AdamW,
    lr=1e-2,
    rho=0.5,
    weight_decay=0.05,
    max_grad_norm=1.0,
)
print(opt.explain())
x, y = torch.randn(64, 10), torch.randint(0, 2, (64,))


def closure():
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


for _ in range(20):
    loss = opt.step(closure)
print(f"loss {loss.item():.4f}")
