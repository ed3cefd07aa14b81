"""Layers that compute with ``W + noise`` for the time of a pass, and never hold more of it than one layer's.

The frozen weight is not written. Right before a layer runs, its noisy weight is made in a scratch that all layers share, and
the layer finds it in place of its own. Where autograd would keep that scratch for the backward, it is given a recipe, by
which the same noise is made once more when the backward gets there: noise depends on a seed and places only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..lora import AdaptedWeight
from ..options import Noise
from .eager import eager


class Scratch:
    """Memory for a noisy weight at a time: for each device and dtype, as much as the largest needs."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"buffers": {}}

    def of(self, device: torch.device, dtype: torch.dtype, numel: int) -> Tensor:
        """A flat buffer of at least ``numel`` entries."""
        there = self.buffers.get((device, dtype))
        if there is None or there.numel() < numel:
            there = self.buffers[device, dtype] = torch.empty(numel, dtype=dtype, device=device)
        return there

    def dtype_of(self, x: Tensor) -> torch.dtype | None:
        """The dtype of the buffer that ``x`` is a view of; None: of none, or as another dtype."""
        address = x.untyped_storage().data_ptr() if x.layout == torch.strided and x.numel() > 0 else 0
        for (_, dtype), buffer in self.buffers.items():
            if address == buffer.untyped_storage().data_ptr() and x.dtype == dtype:
                return dtype
        return None


@dataclass(frozen=True, eq=False)
class NoisyWeight:
    """One weight with its noise of a pass. ``norms``: of rows, over ``sqrt(d_in)``, as they were when the pass began."""

    weight: AdaptedWeight
    std: float
    norms: Tensor
    noise: Noise
    first: int
    scratch: Scratch
    largest: int  # entries of the largest weight that shares the scratch
    backend: str | None = None

    @torch.no_grad()
    def make(self, dtype: torch.dtype) -> Tensor:
        """Fills the scratch; returns the weight in it, in the shape in which it is stored."""
        stored = self.weight.weight
        buffer = self.scratch.of(stored.device, dtype, self.largest)
        # Noise is made fastest in the order in which it is counted, and a layer takes either order.
        rows = buffer[: stored.numel()].view(self.weight.rows.shape)
        options = {
            **self.noise._asdict(),
            "first": self.first,
            "scale": "given",
            "norms": self.norms,
            "backend": self.backend,
        }
        ops.gaussian_perturb([rows], [self.weight.rows], self.std, **options, from_saved=True)
        # A graph that has kept the buffer itself, as one of a second derivative would, must not take it for what it was.
        torch.autograd.graph.increment_version(buffer)
        return rows.t() if self.weight.transposed else rows

    def dtype_now(self) -> torch.dtype:
        """That in which the layer computes: autocast would keep a copy of a scratch that it has to convert."""
        stored = self.weight.weight
        kind = stored.device.type
        if stored.dtype != torch.float64 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return stored.dtype


@eager
def _forward(
    noisy: NoisyWeight, module: nn.Module, name: str, forward: Callable[..., Any], *args: Any, **kw: Any
) -> Any:
    """``forward`` of ``module``, which finds the noisy weight under ``name``."""
    scratch, dtype = noisy.scratch, noisy.dtype_now()
    # Hooks do not add up: what is not ours goes to those that were there, of a checkpointed block for one. There is no
    # public way to ask for them.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(x: Tensor) -> Any:
        kept = scratch.dtype_of(x)
        if kept is None:
            return outer[0](x) if outer else x
        return _Recipe(noisy, kept, x.size(), x.stride(), x.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Recipe):
            return packed.follow()
        found: Tensor = outer[1](packed) if outer else packed
        return found

    try:
        # An entry of its dict hides a module's parameter, which stays where it is.
        module.__dict__[name] = noisy.make(dtype)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **kw)
    finally:
        module.__dict__.pop(name, None)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """A view of the scratch, to be made again."""

    noisy: NoisyWeight
    dtype: torch.dtype
    size: Sequence[int]
    stride: Sequence[int]
    offset: Any

    def follow(self) -> Tensor:
        return self.noisy.make(self.dtype).as_strided(self.size, self.stride, self.offset)


def enter(noisy: Sequence[NoisyWeight], until_done: ExitStack) -> None:
    """From now on until ``until_done`` is closed, the modules compute with noise."""
    before: list[tuple[nn.Module, Any]] = []

    def leave() -> None:
        for module, forward in before:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward

    until_done.callback(leave)
    for x in noisy:
        for module, name in x.weight.owners:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = functools.partial(_forward, x, module, name, module.forward)
