"""Running statistics of BatchNorm for weights that no training has left: averages, or those of noisy passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .optim.ranks import n_ranks, sum_of_all_ranks


@torch.no_grad()
def update_bn(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Estimates the running statistics of all BatchNorm modules anew: equal means over the batches of ``loader``.

    In these passes BatchNorm modules, those too that were in evaluation mode, are in training mode, all others (dropout) in
    evaluation mode. Modes and momenta are put back. A model without BatchNorm is left alone, and the loader is not read.

    Under ``torch.distributed`` each process reads its own loader, all must call it, and the statistics are those of all
    batches. ``DistributedDataParallel``, which would overwrite them by the first process's, is looked through.

    Args:
        model: its BatchNorm modules must keep running statistics to be updated.
        loader: yields tensors, tuples or lists whose first entry is the model's input, or dicts of keyword arguments.
        device: to which each batch is moved; None: batches stay where they are.
        progress: called after each batch with the number of batches so far and ``len(loader)``, None if it has no length.

    Costs a forward per batch. If it raises, the statistics are what they were.

    Raises:
        ValueError: the loader has no batch, in any process.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    >>> loader = torch.utils.data.DataLoader(torch.randn(20, 2), batch_size=8)
    >>> samkern.update_bn(model, loader, progress=lambda done, total: print(f"{done} of {total}"))
    1 of 3
    2 of 3
    3 of 3
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    forward = model.module if isinstance(model, DistributedDataParallel) else model
    total = _length(loader)
    try:
        for module, _ in modes:
            module.training = isinstance(module, _BatchNorm)  # not eval(), which modules may have changed to do more
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        n_batches = 0
        for n_batches, batch in enumerate(loader, 1):
            _run(forward, batch, device)
            if progress is not None:
                progress(n_batches, total)
        _put_together(norms, n_batches, model)
    except BaseException:
        for buffer, copy in before:
            buffer.copy_(copy)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in momenta:
            norm.momentum = momentum


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # of an iterable data set too, whose loader has a method for it
        return None


def _run(model: nn.Module, batch: Any, device: torch.device | str | None) -> None:
    if isinstance(batch, Mapping):
        model(**{name: _moved(value, device) for name, value in batch.items()})
    else:
        model(_moved(batch[0] if isinstance(batch, (list, tuple)) else batch, device))


def _moved(value: Any, device: torch.device | str | None) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) and device is not None else value


def _put_together(norms: list[_BatchNorm], n_batches: int, model: nn.Module) -> None:
    """Makes the means over the batches of each process those over all batches."""
    place = norms[0].running_mean.device  # type: ignore[union-attr]
    n_all = torch.tensor(n_batches, dtype=torch.float64, device=place)
    if n_ranks(model) > 1:
        sum_of_all_ranks(n_all, model)
    if n_all == 0:
        raise ValueError("the loader has no batch to estimate the statistics of BatchNorm from")
    if n_ranks(model) == 1:
        return
    for norm in norms:
        # A module may run several times in a pass, or not at all.
        count = norm.num_batches_tracked
        weight = torch.ones((), device=place) if count is None else count
        total = weight.double()
        sum_of_all_ranks(total, model)
        for mean in (norm.running_mean, norm.running_var):
            if mean is not None:
                part = mean.double() * weight
                sum_of_all_ranks(part, model)
                mean.copy_(part / total.clamp(min=1))
        if count is not None:
            count.copy_(total)
