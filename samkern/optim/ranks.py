"""What all processes of a training must agree on."""

from __future__ import annotations

import torch
from torch import Tensor


def n_ranks() -> int:
    """How many processes the default process group has; 1 without one."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if known else 1


def same_on_all_ranks(x: Tensor) -> None:
    """Writes rank 0's ``x`` on all ranks: passes need not be bitwise equal across them."""
    if n_ranks() > 1:
        torch.distributed.broadcast(x, src=0)
