"""What all processes of a training must agree on."""

from __future__ import annotations

import torch
from torch import Tensor


def same_on_all_ranks(x: Tensor) -> Tensor:
    """Writes rank 0's ``x``, of the default process group: passes need not be bitwise equal across ranks. Else nothing."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(x, src=0)
    return x
