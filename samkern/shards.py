"""Parameters of which every process has a part: ``DTensor``, as ``fully_shard`` and tensor parallelism make them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")  # where nobody has imported it there are none
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """What this process has of ``x``: shares its memory. Itself if it is not sharded."""
    if not is_sharded(x):
        return x
    with torch.no_grad():
        return x.to_local()


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process has of each."""
    return [local(x) for x in tensors]


def like(part: Tensor, whole: Tensor) -> Tensor:
    """A tensor spread as ``whole`` is, of which this process has ``part``. ``part`` itself if ``whole`` is not sharded."""
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def spread_as(x: Tensor, p: Tensor) -> Tensor:
    """``x``, of the shape of ``p``, spread as ``p`` is; all of it, if ``p`` is not sharded.

    Every process has to ask for it. What is whole has to be the same on all of them.
    """
    if not is_sharded(p):
        return x.full_tensor() if is_sharded(x) else x
    if is_sharded(x):
        if x.device_mesh != p.device_mesh:
            return spread_as(x.full_tensor(), p)
        return x if x.placements == p.placements else x.redistribute(placements=p.placements)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def row_major_zeros(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape of ``p``, spread as it is."""
    part = local(p)
    return like(torch.zeros(part.shape, dtype=dtype, device=part.device), p)


def is_cut_along(x: Tensor, dims: Sequence[int]) -> bool:
    """Whether several processes have parts of ``x`` that are cut along one of its dimensions ``dims``."""
    if not is_sharded(x):
        return False
    return any(getattr(placement, "dim", None) in dims for placement in x.placements)


def in_place_of(gradient: Tensor, p: Tensor) -> Tensor:
    """``gradient`` spread as its parameter is: with sequence parallelism each process may have a summand of it."""
    if not is_sharded(p) or not is_sharded(gradient) or gradient.placements == p.placements:
        return gradient
    return gradient.redistribute(placements=p.placements)


class Shards:
    """Adds up what several processes have computed of parts of the same tensors.

    One all-reduce for each dimension of a mesh along which tensors are cut: with ``fully_shard`` one in all. What is
    replicated along a dimension counts once. All processes come to the same bits.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._places: dict[str, list[int]] = {}  # of the tensors that are cut along a dimension, by its process group
        self._groups: dict[str, torch.distributed.ProcessGroup] = {}
        for i, x in enumerate(tensors):
            if not is_sharded(x):
                continue
            mesh = x.device_mesh
            for dim, placement in enumerate(x.placements):
                if placement.is_partial():
                    raise ValueError(
                        f"tensor {i}, shape {tuple(x.shape)}, is a sum over processes ({placement}); redistribute() it first"
                    )
                if not placement.is_replicate():
                    group = mesh.get_group(dim)
                    self._groups[group.group_name] = group
                    self._places.setdefault(group.group_name, []).append(i)

    def add_up(self, sums: Tensor) -> None:
        """``sums``: [..., n], of each tensor. Written."""
        for name, places in self._places.items():
            whole = len(places) == sums.shape[-1]
            part = (sums if whole else sums[..., places]).contiguous()
            torch.distributed.all_reduce(part, group=self._groups[name])
            if whole:
                sums.copy_(part)
            else:
                sums[..., places] = part

    def before(self, place: int, x: Tensor, count: Tensor) -> Tensor:
        """What the processes that come before this one have counted of tensor ``x``, the one at ``place``: 0-d."""
        if not is_sharded(x):
            return torch.zeros_like(count)
        mesh = x.device_mesh
        cut = [dim for dim, placement in enumerate(x.placements) if not placement.is_replicate()]
        here = tuple(mesh.get_local_rank(dim) for dim in cut)
        table = torch.zeros([mesh.size(dim) for dim in cut], dtype=count.dtype, device=count.device)
        table[here] = count
        for dim in cut:
            torch.distributed.all_reduce(table, group=mesh.get_group(dim))
        place_here = sum(at * math.prod(table.shape[j + 1 :]) for j, at in enumerate(here))
        return table.flatten()[:place_here].sum()

    def add_up_with_total(self, sums: Tensor) -> None:
        """The same of [..., n + 1], whose last column is over all tensors."""
        if self._places:
            of_each = sums[..., :-1].contiguous()
            self.add_up(of_each)
            sums[..., :-1] = of_each
            sums[..., -1] = of_each.sum(-1)
