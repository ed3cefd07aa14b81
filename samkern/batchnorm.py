"""Running statistics that a second pass must not touch.

The second pass runs on perturbed weights; its batch statistics would pull the running ones away from the model that is
kept. In training mode BatchNorm normalises with batch statistics either way, so freezing changes nothing in the pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_FORWARDS = {
    cls.forward for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d)
}


def has_running_stats(module: nn.Module) -> bool:
    """Whether ``module`` itself owns a running mean or variance."""
    return any(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile(module)`` has returned, or ``module.compile()`` has been called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


@contextlib.contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Within the block, forwards through ``model`` leave all running statistics as they are.

    BatchNorm modules (SyncBatchNorm too, whose batch statistics are still reduced across ranks) are told not to track;
    not by ``momentum=0``, which would still advance ``num_batches_tracked`` and with it every cumulative average. Whatever
    else owns a ``running_mean`` or ``running_var`` (instance norms, subclasses with a ``forward`` of their own, modules of
    other packages) has its buffers copied before and written back after. Both are undone when an exception leaves the block.

    If ``torch.compile`` has wrapped the model or compiled any of its modules in place, all buffers are copied: a module that
    is told not to track is a new one to the compiler, which would compile the model once more.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    >>> with samkern.frozen_running_stats(model):
    ...     _ = model(torch.randn(8, 2))
    >>> model[1].num_batches_tracked.item()
    0
    """
    told: list[_BatchNorm] = []
    copies: list[tuple[Tensor, Tensor]] = []
    compiled = any(map(_is_compiled, model.modules()))
    for module in model.modules():
        if isinstance(module, _BatchNorm) and type(module).forward in _FORWARDS and not compiled:
            if module.track_running_stats:
                told.append(module)
        elif has_running_stats(module):
            copies += [(buffer, buffer.clone()) for buffer in module.buffers(recurse=False)]
    try:
        for module in told:
            module.track_running_stats = False
        yield
    finally:
        for module in told:
            module.track_running_stats = True
        with torch.no_grad():
            for buffer, copy in copies:
                buffer.copy_(copy)
