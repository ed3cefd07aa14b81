"""Save, load, go on: bit-exactly, in the middle of LookSAM's window; and hand the run over to plain SGD."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import samkern


def make():
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    return model, samkern.LookSAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, k=5)


def train(model, opt, steps):
    for step in steps:
        x = torch.randn(32, 10, generator=torch.Generator().manual_seed(step))

        def closure(x=x):
            opt.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        opt.step(closure)


model, opt = make()
train(model, opt, range(7))
path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, path)
train(model, opt, range(7, 12))

resumed, resumed_opt = make()
checkpoint = torch.load(path, weights_only=True)
resumed.load_state_dict(checkpoint["model"])
resumed_opt.load_state_dict(checkpoint["opt"])
train(resumed, resumed_opt, range(7, 12))
print("bit-exact:", torch.equal(model.weight, resumed.weight))

plain = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
plain.load_state_dict(resumed_opt.state_dict())
print(
    "momentum handed over:",
    torch.equal(plain.state[resumed.weight]["momentum_buffer"], opt.state[model.weight]["momentum_buffer"]),
)
