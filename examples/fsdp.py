"""Sharded weights (FSDP2), saved on some processes and resumed on any number: ``torchrun --nproc-per-node 2 examples/fsdp.py``.

On GPUs say "cuda" and "nccl".
"""

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import samkern
from samkern.integrations.dcp import load

dist.init_process_group("gloo")  # outside of torchrun, set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
rank, n_ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (n_ranks,))


def build(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 3))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    # After fully_shard, which replaces the parameters.
    return net, samkern.LookSAM(net.parameters(), torch.optim.AdamW, lr=1e-2, rho=0.05, k=5, model=net)


def train(net, opt, steps):
    for t in steps:
        generator = torch.Generator().manual_seed(t * n_ranks + rank)  # every rank has a batch of its own
        x = torch.randn(32, 10, generator=generator)
        y = x[:, :3].argmax(1)

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        loss = opt.step(closure)
    return loss.detach()


net, opt = build(seed=0)
train(net, opt, range(20))

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)  # all ranks write to that of rank 0
dcp.save({"model": net.state_dict(), "optimizer": opt.state_dict()}, checkpoint_id=folder[0])
loss = train(net, opt, range(20, 40))

again, resumed = build(seed=1)
weights = {"model": again.state_dict()}
dcp.load(weights, checkpoint_id=folder[0])
again.load_state_dict(weights["model"])
load(resumed, folder[0])
train(again, resumed, range(20, 40))

same = all(torch.equal(p.to_local(), q.to_local()) for p, q in zip(net.parameters(), again.parameters(), strict=True))
if rank == 0:
    print(f"{n_ranks} processes, rank 0 has {sum(p.to_local().numel() for p in net.parameters())} weights")
    print(f"loss {float(loss):.3f} after {resumed.steps} steps, resumed bit-exact: {same}")
dist.destroy_process_group()
