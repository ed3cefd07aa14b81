"""Mixed precision: bfloat16 needs nothing but autocast; with float16, the step takes the loss scale."""

import torch
from torch import nn

import samkern

torch.manual_seed(0)
x, y = torch.randn(256, 20), torch.randint(0, 3, (256,))


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))  # weights stay in float32
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.05, "max_grad_norm": 1.0}
    return model, samkern.SAM(model.parameters(), torch.optim.SGD, model=model, **options)


def loss_of(model, dtype):
    with torch.autocast(x.device.type, dtype):
        return nn.functional.cross_entropy(model(x), y)


model, opt = make()
for _ in range(10):

    def closure(model=model, opt=opt):
        opt.zero_grad()
        loss = loss_of(model, torch.bfloat16)
        loss.backward()
        return loss

    loss = opt.step(closure)
print(f"bfloat16: loss {loss.item():.3f}")

model, opt = make()
scaler = torch.amp.GradScaler(x.device.type, init_scale=2.0**22)  # too large: the first steps overflow
for _ in range(20):

    def closure(model=model, opt=opt):
        opt.zero_grad()
        loss = loss_of(model, torch.float16)
        scaler.scale(loss).backward()
        return loss

    loss = opt.step(closure, scaler=scaler)
    scaler.update()
print(f"float16: loss {loss.item():.3f}  scale {scaler.get_scale():.0f}  steps skipped {opt.skips}")

model, opt = make()
for _ in range(10):
    loss = loss_of(model, torch.float16)
    scaler.scale(loss).backward()
    if opt.first_step(scaler=scaler):
        scaler.scale(loss_of(model, torch.float16)).backward()
    scaler.unscale_(opt)  # only if somebody wants to see or to change the gradients that the base receives
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
print(f"without a closure: loss {loss.item():.3f}  norm before clipping {norm.item():.3f}")
