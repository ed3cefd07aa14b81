"""SAM with Accelerate: passes(batch) stands for forward and accelerator.backward; the rest of the loop stays."""

import torch
from accelerate import Accelerator
from torch import nn

import samkern
from samkern.integrations.accelerate import Passes

torch.manual_seed(0)
x = torch.randn(512, 20)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
sam = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model, max_grad_norm=1.0)
rates = torch.optim.lr_scheduler.CosineAnnealingLR(sam, T_max=40)
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model, optimizer, rates, loader = accelerator.prepare(model, sam, rates, loader)
passes = Passes(accelerator, model, optimizer, lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))

for _ in range(5):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = passes(batch)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
print(f"{sam.steps} steps, {sam.evaluations} pairs, loss {loss.item():.4f}")
