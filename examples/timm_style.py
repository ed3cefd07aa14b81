"""A loop in the style of timm's train.py: loss scale, clipping, accumulation, rates by update, and a moving average of weights.

What SAM changes is marked. In bfloat16 or float32 the scaler is not enabled, and the same lines hold.
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import samkern

EPOCHS, ACCUMULATE, CLIP = 5, 2, 1.0
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(512, 20, device=device)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3)).to(device)
loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)

matrices = [p for p in model.parameters() if p.dim() > 1]
vectors = [p for p in model.parameters() if p.dim() <= 1]
groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
optimizer = samkern.SAM(groups, torch.optim.AdamW, lr=3e-3, rho=0.05, max_grad_norm=CLIP, model=model)  # clips itself
n_updates = EPOCHS * len(loader) // ACCUMULATE
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates - 5)
rates = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[5])
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def backward(batch):
    with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
        loss = loss_fn(model(batch[0]), batch[1]) / ACCUMULATE
    scaler.scale(loss).backward()
    return loss.item() * ACCUMULATE


for epoch in range(EPOCHS):
    losses, micro_batches = [], []
    for batch in loader:
        losses.append(backward(batch))
        micro_batches.append(batch)
        if len(micro_batches) < ACCUMULATE:
            continue
        if optimizer.first_step(scaler=scaler):  # weights are perturbed now
            for again in micro_batches:  # and the step needs its gradients there
                backward(again)
        optimizer.second_step(zero_grad=True)  # in place of scaler.step(optimizer)
        scaler.update()
        rates.step()
        average.update_parameters(model)
        micro_batches.clear()
    print(
        f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}  lr {rates.get_last_lr()[0]:.2e}  skipped {optimizer.skips}"
    )

average.eval()
accuracy = (average(x).argmax(1) == x[:, :3].argmax(1)).float().mean().item()
print(f"accuracy of the averaged weights: {100 * accuracy:.1f} %")
