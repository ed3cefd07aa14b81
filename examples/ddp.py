"""SAM on several processes, each of which climbs by the gradient of its own part of the batch.

torchrun --nproc-per-node 2 examples/ddp.py    # on GPUs, if there are as many
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import samkern

device = torch.device("cpu")
if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group("gloo" if device.type == "cpu" else "nccl")

torch.manual_seed(0)
x = torch.randn(512, 20)
data = TensorDataset(x, x[:, :3].argmax(1))
net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3)).to(device)
model = DistributedDataParallel(net)
opt = samkern.SAM(
    model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model, perturb_sync="local"
)

sampler = DistributedSampler(data)
for epoch in range(5):
    sampler.set_epoch(epoch)
    for xb, yb in DataLoader(data, batch_size=64 // dist.get_world_size(), sampler=sampler):
        xb, yb = xb.to(device), yb.to(device)

        def closure(xb=xb, yb=yb):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(xb), yb)
            loss.backward()
            return loss

        loss = opt.step(closure)
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}  pairs {opt.evaluations}  skipped {opt.skips}")

dist.destroy_process_group()
