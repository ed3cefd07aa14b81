"""What all processes of a training must agree on, and what each of them has for itself.

They are those that share ``model``: the process group of a ``DistributedDataParallel``, else all there are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def has_ranks() -> bool:
    """Whether there is a default process group, if only of one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def n_ranks(model: nn.Module | None) -> int:
    """How many processes there are; 1 without a process group."""
    return torch.distributed.get_world_size(_group(model)) if has_ranks() else 1


def same_on_all_ranks(x: Tensor, model: nn.Module | None) -> Tensor:
    """Writes rank 0's ``x`` on all ranks: passes need not be bitwise equal across them. Returns ``x``."""
    if n_ranks(model) > 1:
        torch.distributed.broadcast(x, group=_group(model), group_src=0)
    return x


def sum_of_all_ranks(x: Tensor, model: nn.Module | None) -> None:
    """Writes the sum of ``x`` over all ranks."""
    if n_ranks(model) > 1:
        torch.distributed.all_reduce(x, group=_group(model))


def mean_of_all_ranks(x: Tensor, model: nn.Module | None) -> Tensor:
    """Writes the mean of ``x`` over all ranks, as gradients are reduced. Returns ``x``."""
    if n_ranks(model) > 1:
        torch.distributed.all_reduce(x, group=_group(model))
        x /= n_ranks(model)
    return x


def largest_of_all_ranks(x: Tensor, model: nn.Module | None) -> None:
    """Writes the largest ``x`` of all ranks."""
    if n_ranks(model) > 1:
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=_group(model))


def _group(model: nn.Module | None) -> torch.distributed.ProcessGroup | None:
    return getattr(model, "process_group", None)


def can_skip_reduction(model: nn.Module | None) -> bool:
    """Whether gradients of ``model`` can stay with their process: ``DistributedDataParallel`` and its like."""
    return callable(getattr(model, "no_sync", None))


def no_reduction(model: nn.Module | None) -> AbstractContextManager[None]:
    """In the block, gradients of ``model`` stay with their process."""
    reduced: AbstractContextManager[None] = model.no_sync()  # type: ignore[union-attr, operator]
    return reduced
