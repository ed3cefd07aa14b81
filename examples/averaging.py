"""The mean of SAM's weights in the last third: a rate that stays high, BatchNorm estimated anew, evaluated on the way too."""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR

import samkern

torch.manual_seed(0)
x = torch.randn(512, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
wrong = torch.rand(512) < 0.1
y[wrong] = 1 - y[wrong]
x_test = torch.randn(2048, 8)
y_test = (x_test[:, 0] * x_test[:, 1] > 0).long()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
n_epochs, first = 18, 12
swa = samkern.SWA(opt, start=first * len(loader))
cosine, constant = CosineAnnealingLR(opt, n_epochs), SWALR(opt, swa_lr=0.2, anneal_epochs=2)


def accuracy():
    model.eval()
    with torch.no_grad():
        share = (model(x_test).argmax(1) == y_test).float().mean().item()
    model.train()
    return share


for epoch in range(n_epochs):
    for inputs, labels in loader:

        def closure(inputs=inputs, labels=labels):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        opt.step(closure)
    (cosine if epoch < first else constant).step()
    if epoch == 14:
        last = accuracy()
        with swa.swapped(model):
            samkern.update_bn(model, loader)
            print(f"epoch {epoch}: weights {last:.3f}, their mean so far {accuracy():.3f}")

print(f"at the end: weights {accuracy():.3f}", end=", ")
swa.copy_to_weights()
samkern.update_bn(model, loader)
print(f"the mean of {swa.n_averaged} steps {accuracy():.3f}")
