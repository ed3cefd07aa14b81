"""Layers that compute with ``W + noise`` for the time of a pass, and never hold more of it than one layer's.

The frozen weight is not written. Right before a layer runs, its noisy weight is made in a scratch that all layers share, and
the layer finds it in place of its own. Where autograd would keep that scratch for the backward, it is given a recipe, by
which the same noise is made once more when the backward gets there: noise depends on a seed and places only.
"""

from __future__ import annotations

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


class NoisyForward:
    """The ``forward`` of a module for the time of a pass. The same object in every pass: a compiled model has one graph for it.

    Its layers run as they are written: to a compiler each is a graph break.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name  # of the weight in the module
        self._noisy: NoisyWeight | None = None
        self._forward: Callable[..., Any] | None = None
        self._before: Callable[..., Any] | None = None

    def begin(self, noisy: NoisyWeight) -> None:
        """From now on the module computes with ``noisy``."""
        self._before, self._forward = self._module.__dict__.get("forward"), self._module.forward
        self._noisy = noisy
        self._module.__dict__["forward"] = self

    def end(self) -> None:
        """The module is as it was. Does nothing if it is."""
        if self._noisy is None:
            return
        self._module.__dict__.pop("forward", None)
        if self._before is not None:
            self._module.__dict__["forward"] = self._before
        self._noisy = self._forward = self._before = None

    @eager
    def __call__(self, *args: Any, **kw: Any) -> Any:
        noisy, forward = self._noisy, self._forward
        if noisy is None or forward is None:
            raise RuntimeError("a layer was called by the forward that it had within a pass, which is over")
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
            self._module.__dict__[self._name] = noisy.make(dtype)
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(*args, **kw)
        finally:
            self._module.__dict__.pop(self._name, None)


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


def enter(noisy: Sequence[tuple[NoisyWeight, Sequence[NoisyForward]]], until_done: ExitStack) -> None:
    """From now on until ``until_done`` is closed, the modules of each weight compute with its noise."""
    for weight, forwards in noisy:
        for forward in forwards:
            until_done.callback(forward.end)
            forward.begin(weight)
