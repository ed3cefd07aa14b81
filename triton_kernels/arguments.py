"""What the list ops make of their arguments before they launch: tables, and coefficients where kernels read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import mask_bytes
from . import common
from .launch import check_device
from .tables import DeviceTables, laid_out_like

Tensors = Sequence[Tensor]


def tables_of(like: Tensors, roles: Mapping[Any, Tensors], mask: Tensor | None = None) -> DeviceTables:
    """Tables of equal lists, those that are only read laid out like the first. ``mask``: bits over ``like``, as it lies."""
    check_device(like[0].device)
    bound = {
        row: {i: laid_out_like(x, first) for i, (x, first) in enumerate(zip(tensors, like, strict=True))}
        for row, tensors in roles.items()
        if tensors
    }
    if mask is not None:
        bound[common.MASK] = dict(enumerate(torch.split(mask, [mask_bytes(x.numel()) for x in like])))
    return DeviceTables(like, [0] * len(like), like[0].device, bound)


def combinations(*lists: Tensors) -> list[tuple[torch.dtype, ...]]:
    return [tuple(x.dtype for x in tensors) for tensors in zip(*lists, strict=True)]


def on_device(coefficient: Tensor, device: torch.device) -> Tensor:
    return coefficient.to(device, torch.float64).contiguous()


def flag_bytes(flag: Tensor, device: torch.device) -> Tensor:
    return flag.to(device, torch.bool).contiguous().view(torch.uint8)


def step_of(coefficient: Tensor) -> int:
    """From the coefficient of a tensor to the next one's: 0 if there is one for all."""
    return int(coefficient.numel() > 1)


def mark_written(*lists: Tensors) -> None:
    """Autograd must notice: kernels write through addresses."""
    torch.autograd.graph.increment_version([x for tensors in lists for x in tensors if not x.is_inference()])
