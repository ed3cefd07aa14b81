"""Tensor lists as tables on the device: see ``common`` for what is in them.

Nothing is uploaded that is there already. Addresses are compared in every call, since gradients move with ``zero_grad()``;
what has changed is copied without waiting. While a CUDA graph is recorded nothing may change: the graph would replay the
copy of today.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import mask_bytes
from ..tensors import is_capturing, same_layout
from . import common

_EMPTY = 16  # address of a tensor without memory, which is there all the same


class Slice(NamedTuple):
    """The chunks and the runs of filters of all tensors with one combination of dtypes, weights first."""

    dtypes: tuple[torch.dtype, ...]
    chunks: Tensor
    runs: Tensor


class DeviceTables:
    """Tables of the list ``tensors``, of param group ``group[i]`` each, and room for its sums.

    ``roles``: what to bind at once, see ``bind``.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        group: Sequence[int],
        device: torch.device,
        roles: Mapping[Any, Mapping[int, Tensor]] = MappingProxyType({}),
    ) -> None:
        self._device, self._roles = device, roles  # copies in `roles` must outlive the launches that read them
        n = self.n_tensors = len(tensors)
        numels = [x.numel() for x in tensors]
        filters = [_filters(x) for x in tensors]
        self._chunk_counts = [-(-numel // int(common.CHUNK)) for numel in numels]
        self._runs = [_runs(x, count) for x, (count, _) in zip(tensors, filters, strict=True)]
        first_chunk, self._first_run = _offsets(self._chunk_counts), _offsets(map(len, self._runs))
        self._axes = [_axes(x) for x in tensors]
        first_filter = _offsets(count for count, _ in filters)
        self.n_chunks, self.n_runs, self._n_filters = first_chunk[-1], self._first_run[-1], first_filter[-1]
        kinds = [kind_of(x.dtype) for x in tensors]
        places = [[*group, 0], [*kinds, 0], [0] * (n + 1), first_chunk, self._first_run]
        sizes = [numels, [count for count, _ in filters], [stride for _, stride in filters], first_filter[:-1]]
        sizes += [_offsets(numels)[:-1], _offsets(map(mask_bytes, numels))[:-1]]
        self._addresses = [[0] * n for _ in range(common.N_ADDRESSES)]
        for row, bound in roles.items():
            self._addresses[int(row)] = self._row_of(bound)
        self._step_kinds = [0] * n
        what = "the list of parameters is new"
        self.places = self._send(places, torch.int32, what)
        self.rows = self._send([*self._addresses, *sizes], torch.int64, what)
        self._uploaded: dict[str, tuple[list[Any], Tensor]] = {}
        self._slices: dict[str, tuple[list[Any], list[Slice]]] = {}
        self.partials = self._zeros(common.N_PARTIALS, self.n_chunks)
        self.run_partials = self._zeros(2, self.n_runs)
        self._filter_squares = self._zeros(0)  # room is made when a climb asks for it
        self.sums = self._zeros(common.N_SUMS, n)
        self.sem = torch.zeros(1, dtype=torch.int32, device=device)

    def bind(self, row: Any, tensors: Mapping[int, Tensor]) -> None:
        """Gives tensors their role ``row``; the others of the list have none."""
        addresses = self._row_of(tensors)
        old = self._addresses[int(row)]
        if addresses != old:
            moved = next(i for i, address in enumerate(addresses) if address != old[i])
            what = f"parameter {moved}, its gradient or its state has moved"
            self.rows[int(row)].copy_(self._send(addresses, torch.int64, what))
            self._addresses[int(row)] = addresses

    def _row_of(self, tensors: Mapping[int, Tensor]) -> list[int]:
        addresses = [0] * self.n_tensors
        for i, x in tensors.items():
            addresses[i] = x.data_ptr() or _EMPTY
        return addresses

    def bind_steps(self, steps: Mapping[int, Tensor]) -> None:
        """Adam's step counts, float32 or float64.

        Raises:
            TypeError: one has another dtype.
        """
        for step in steps.values():
            if step.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"Adam's step must be float32 or float64, got {step.dtype}")
        self.bind(common.STEP, steps)
        kinds = [kind_of(steps[i].dtype) if i in steps else 0 for i in range(self.n_tensors)]
        if kinds != self._step_kinds:
            table = self._send(kinds, torch.int32, "the dtype of Adam's steps has changed")
            self.places[int(common.STEP_KIND), :-1].copy_(table)
            self._step_kinds = kinds

    def numbers(self, name: str, values: list[float]) -> Tensor:
        """A float64 table that is ``name``'s own, and changes with its values only."""
        return self._upload(f"options of {name}", values, torch.float64, f"options of {name} have changed")

    def integers(self, name: str, values: list[int]) -> Tensor:
        """The same in int64."""
        return self._upload(f"counts of {name}", values, torch.int64, f"counts of {name} have changed")

    def scalars(self, name: str, tensors: Mapping[str, Sequence[Tensor | None]]) -> Tensor:
        """Addresses of the scalars in ``tensors``, one after another; their keys are for messages.

        Raises:
            ValueError: one is not a float32 tensor of one entry on the device of the list.
        """
        addresses = [self._address(key, x) for key, given in tensors.items() for x in given]
        what = f"a tensor of {', '.join(tensors)} has moved"
        return self._upload(f"scalars of {name}", addresses, torch.int64, what)

    def _address(self, name: str, x: Tensor | None) -> int:
        if x is None:
            return 0
        if x.dtype != torch.float32 or x.numel() != 1 or x.device != self._device:
            raise ValueError(
                f"{name} must be a float32 tensor of one entry on {self._device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        return x.data_ptr()

    def slices(self, name: str, combinations: list[Any]) -> list[Slice]:
        """The list, cut by combination of dtypes. ``name``: who asks, usually for the same as the last time."""
        if name not in self._slices or self._slices[name][0] != combinations:
            cut = [self._slice(dtypes, combinations) for dtypes in dict.fromkeys(combinations)]
            self._slices[name] = combinations, [part for part in cut if part.chunks.shape[1] > 0] or cut[:1]
        return self._slices[name][1]

    def filter_squares(self, wanted: bool) -> Tensor:
        """A number per filter of all tensors, or none."""
        if wanted and self._filter_squares.numel() < self._n_filters:
            refuse_while_recording(self._device, "the perturbation has changed")
            self._filter_squares = self._zeros(self._n_filters)
        return self._filter_squares

    def axes(self) -> Tensor | None:
        """Where the entries of tensors lie that are not in row-major order. None: there are no such.

        int64: for each tensor the place of its first axis, and that after the last one's; sizes of all axes, from the one
        along which memory runs; and the distances of neighbours in row-major order.
        """
        if all(axes == [] for axes in self._axes):
            return None
        flat = [axis for axes in self._axes for axis in axes]
        sizes, distances = ([axis[k] for axis in flat] for k in range(2))
        return self.integers("axes", [*_offsets(map(len, self._axes)), *sizes, *distances])

    def _slice(self, dtypes: tuple[torch.dtype, ...], combinations: list[Any]) -> Slice:
        members = [i for i, combination in enumerate(combinations) if combination == dtypes]
        chunks = [(i, k) for i in members for k in range(self._chunk_counts[i])]
        runs = [(i, *run, self._first_run[i] + k) for i in members for k, run in enumerate(self._runs[i])]
        return Slice(dtypes, self._columns(chunks, 2), self._columns(runs, 4))

    def _columns(self, entries: list[Any], width: int) -> Tensor:
        columns = [list(column) for column in zip(*entries, strict=True)] or [[]] * width
        return self._send(columns, torch.int32, "dtypes of gradients or state have changed")

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)

    def _upload(self, name: str, values: list[Any], dtype: torch.dtype, what: str) -> Tensor:
        known, table = self._uploaded.get(name, ([], None))
        if table is None or known != values:
            sent = self._send(values, dtype, what)
            # In place: a graph that was recorded reads it where it was.
            table = table.copy_(sent) if table is not None and len(known) == len(values) else sent
            self._uploaded[name] = values, table
        return table

    def _send(self, values: Any, dtype: torch.dtype, what: str) -> Tensor:
        """A tensor of ``values``, copied without waiting: the pinned copy lives until the stream has passed it."""
        refuse_while_recording(self._device, what)
        # On the CPU by name: a program may have made the GPU its default device.
        staged = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=self._device.type == "cuda")
        return staged.to(self._device, non_blocking=True)


def refuse_while_recording(device: torch.device, what: str) -> None:
    """Raises ``RuntimeError`` while a graph is recorded. ``what`` has changed, and would be part of the graph."""
    if is_capturing(device):
        raise RuntimeError(
            f"{what} since the last step, and a graph is being recorded, which would not follow: take some steps before "
            "recording, and use zero_grad(set_to_none=False)"
        )


def laid_out_like(x: Tensor, like: Tensor) -> Tensor:
    """``x``, or a copy of it in the layout of ``like``."""
    if same_layout(x, like):
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def kind_of(dtype: torch.dtype) -> int:
    """The kind of numbers that a tensor's arithmetic is in, as kernels call it."""
    return int(common.FP64 if dtype == torch.float64 else common.FP32)


def _filters(x: Tensor) -> tuple[int, int]:
    """How many dim-0 slices a dense tensor has, and the distance of neighbours; 0: every entry is its own."""
    if x.dim() < 2 or x.numel() == 0:
        return 0, 0
    return x.shape[0], x.stride(0) if x.shape[0] > 1 else x.numel()


def _axes(x: Tensor) -> list[tuple[int, int]]:
    """Sizes of the axes of a dense tensor in the order of its memory, and distances of neighbours in row-major order.

    None if that is the order of its memory. Axes that are one stretch in either order count as one.
    """
    distances = [math.prod(x.shape[d + 1 :]) for d in range(x.dim())]
    axes = sorted(zip(x.stride(), x.shape, distances, strict=True))
    merged: list[tuple[int, int]] = []
    for _, size, distance in (axis for axis in axes if axis[1] > 1):
        if merged and distance == math.prod(merged[-1]):
            merged[-1] = merged[-1][0] * size, merged[-1][1]
        else:
            merged.append((size, distance))
    return merged if len(merged) > 1 and x.numel() > 0 else []


def _runs(x: Tensor, count: int) -> list[tuple[int, int]]:
    """First filter and number of filters of each run that a program sums at once: 8 short ones, or a long one."""
    if count == 0:
        return []
    together = 8 if x.numel() // count < 1024 else 1
    return [(first, min(together, count - first)) for first in range(0, count, together)]


def _offsets(counts: Iterable[int]) -> list[int]:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets
