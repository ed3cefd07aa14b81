"""SAF and MESA: the loss holds answers close to earlier ones, from an archive or from an average of the weights."""

import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import samkern

torch.manual_seed(0)
data = TensorDataset(torch.randn(512, 20), torch.randint(0, 3, (512,)))


def make_model():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))


# SAF: logits of three epochs ago, in a file that survives a restart. The loader tells which samples a batch has.
model = make_model()
opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
with tempfile.TemporaryDirectory() as folder:
    saf = samkern.SAFLoss(len(data), 3, start_epoch=2, dtype=torch.float16, path=f"{folder}/logits", max_bytes=100_000)
    loader = DataLoader(samkern.Indexed(data), batch_size=64, shuffle=True, drop_last=True)
    for saf.epoch in range(6):
        for (x, y), index in loader:
            opt.zero_grad()
            loss = saf(model(x), y, index)
            loss.backward()
            opt.step()
        print(f"SAF, epoch {saf.epoch}: loss {loss.item():.3f}")

# MESA: answers of an exponential average. Within SAM both passes are told the same ones.
model = make_model()
opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
ema = samkern.EMA(opt, decay=0.99)
mesa = samkern.MESALoss(model, ema, start_epoch=2)
for mesa.epoch in range(6):
    for x, y in DataLoader(data, batch_size=64, shuffle=True):
        earlier = mesa.teacher(x) if mesa.is_active else None

        def closure(x=x, y=y, earlier=earlier):
            opt.zero_grad()
            loss = mesa(model(x), y, teacher=earlier)
            loss.backward()
            return loss

        loss = opt.step(closure)
    print(f"MESA, epoch {mesa.epoch}: loss {loss.item():.3f}")
with ema.swapped():
    print(f"of the average: loss {nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).item():.3f}")
