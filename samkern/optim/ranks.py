"""What all processes of a training must agree on, and what each of them has for itself."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def has_ranks() -> bool:
    """Whether there is a default process group, if only of one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def n_ranks() -> int:
    """How many processes the default process group has; 1 without one."""
    return torch.distributed.get_world_size() if has_ranks() else 1


def same_on_all_ranks(x: Tensor) -> Tensor:
    """Writes rank 0's ``x`` on all ranks: passes need not be bitwise equal across them. Returns ``x``."""
    if n_ranks() > 1:
        torch.distributed.broadcast(x, src=0)
    return x


def mean_of_all_ranks(x: Tensor) -> Tensor:
    """Writes the mean of ``x`` over all ranks, as gradients are reduced. Returns ``x``."""
    if n_ranks() > 1:
        torch.distributed.all_reduce(x)
        x /= n_ranks()
    return x


def largest_of_all_ranks(x: Tensor, model: nn.Module | None) -> None:
    """Writes the largest ``x`` among the processes that share ``model``."""
    if n_ranks() > 1:
        group = getattr(model, "process_group", None)
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=group)


def can_skip_reduction(model: nn.Module | None) -> bool:
    """Whether gradients of ``model`` can stay with their process: ``DistributedDataParallel`` and its like."""
    return callable(getattr(model, "no_sync", None))


def no_reduction(model: nn.Module | None) -> AbstractContextManager[None]:
    """In the block, gradients of ``model`` stay with their process."""
    reduced: AbstractContextManager[None] = model.no_sync()  # type: ignore[union-attr, operator]
    return reduced
