"""SSAM-F: perturbs half of the weights of a convolutional net, those with the most Fisher information; all biases and norms."""

import torch
from torch import nn

import samkern

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
images, labels = torch.randn(512, 1, 8, 8), torch.randint(0, 4, (512,))
data = torch.utils.data.TensorDataset(images, labels)

matrices = [p for p in model.parameters() if p.dim() > 1]
vectors = [p for p in model.parameters() if p.dim() == 1]
losses = samkern.SampleLosses(model, nn.functional.cross_entropy, data, num_samples=128)
opt = samkern.SSAMF(
    [{"params": matrices}, {"params": vectors, "masked": False, "weight_decay": 0.0}],
    torch.optim.SGD,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    rho=0.1,
    sparsity=0.5,
    sample_losses=losses,
    refresh_interval=16,  # steps: two epochs here
    model=model,
)
print(opt.explain())


def closure_over(x, y):
    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


for epoch in range(4):
    for x, y in torch.utils.data.DataLoader(data, batch_size=64, shuffle=True):
        loss = opt.step(closure_over(x, y))
    masks = [mask for mask in opt.masks() if mask is not None]
    chosen = sum(int(mask.sum()) for mask in masks)
    print(
        f"epoch {epoch}: loss {loss.item():.4f}, {chosen or 'all'} of {sum(p.numel() for p in matrices)} entries perturbed"
    )
