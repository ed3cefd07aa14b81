"""Computing with a model on the side: afterwards it is as it was, and so are torch's random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .batchnorm import has_running_stats
from .tensors import overlaps_itself


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """In the block, layers with running statistics are in evaluation mode. Afterwards modes and buffers are as before."""
    normalising = [m for m in module.modules() if m.training and _keeps_statistics(m)]
    with unchanged_buffers(module):
        try:
            for m in normalising:
                m.training = False  # not eval(), which would change the modules within it
            yield
        finally:
            for m in normalising:
                m.training = True


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """After the block, all buffers are as before it: the same tensors, bit by bit."""
    buffers = [
        # What overlaps itself cannot be written in place, by nobody.
        (owner, name, x, None if x.layout != torch.strided or overlaps_itself(x) else x.detach().clone(), x._version)
        for owner in module.modules()
        for name, x in owner.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for owner, name, x, copy, version in buffers:
            if getattr(owner, name, None) is not x:
                setattr(owner, name, x)
            if copy is not None:
                # Graphs that saved a buffer stay valid if it was not written: .data does not count as a write.
                with torch.no_grad():
                    (x.data if x._version == version else x).copy_(copy)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In the block, all of ``module`` is in evaluation mode. Afterwards modes are as before."""
    training = [m for m in module.modules() if m.training]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that computes, within those of ``torch.compile`` and data parallel training.

    On the side, a reducer must not wait for gradients that never come, nor a compiler meet ``torch.func``.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _keeps_statistics(module: nn.Module) -> bool:
    return (isinstance(module, _NormBase) and module.track_running_stats) or has_running_stats(module)


@contextmanager
def random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """In the block, torch draws on from ``seed``. Afterwards from where it was before."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every device, not only ours
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
