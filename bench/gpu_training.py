"""Training steps with forward and backward: SGD, SAM and LookSAM on a ResNet-18, bfloat16 autocast, channels last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import samkern

from . import nets
from .gpu_session import Case, Session
from .shapes import ShapeSet

K = 5


def trainer(
    session: Session, make: Callable[[nn.Module], Any], width: int, batch: int
) -> tuple[nn.Module, Callable[[], Any]]:
    """A network, and its training step on one batch that stays."""
    torch.manual_seed(0)
    net = nets.resnet18(width).to(session.device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 32, 32, device=session.device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=session.device)
    opt = make(net)

    def closure() -> Any:
        opt.zero_grad()
        with torch.autocast(session.device.type, torch.bfloat16):
            loss = functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return net, lambda: opt.step(closure)


def training(session: Session, rounds: int = 12) -> None:
    """Rows of a training step on average over a cycle of LookSAM. All take turns."""
    width, batch = (2, 4) if session.smoke else (64, 128)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    entries: dict[tuple[str, str], Callable[[nn.Module], Any]] = {
        ("SGD", "torch"): lambda net: torch.optim.SGD(net.parameters(), fused=True, **options)
    }
    for name in session.backends:
        entries["SAM", name] = lambda net, name=name: samkern.SAM(
            net.parameters(), torch.optim.SGD, model=net, backend=name, **options
        )
        entries["LookSAM k=5", name] = lambda net, name=name: samkern.LookSAM(
            net.parameters(), torch.optim.SGD, k=K, model=net, backend=name, **options
        )
    steps = {}
    for key, make in entries.items():
        net, step = trainer(session, make, width, batch)
        for _ in range(1 if session.smoke else 2 * K):
            step()
        steps[key] = step
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    order = list(steps)
    for turn in range(2 if session.smoke else rounds):
        for k in range(len(order)):
            key = order[(k + turn) % len(order)]
            session.require(1)
            # The device is not kept waiting for the host, nor the host for the device: as in a training loop.
            spent[key].append(session.clock.per_call([steps[key]] * K))
    shapes = [tuple(p.shape) for p in net.parameters()]
    case = Case(ShapeSet("ResNet-18", shapes, rounds))
    for (method, backend), seconds in spent.items():
        session.add(case, seconds, measured="training step", method=method, backend=backend, mode="plain")
