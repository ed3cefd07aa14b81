"""Which parameters samkern takes, and what it says about the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .shards import local, locals_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(params: Sequence[Tensor], index: int, names: Sequence[str] = ()) -> str:
    """ "parameter 3 ('layer.weight'), shape (4, 5)", for error messages."""
    name = f" ({names[index]!r})" if names else ""
    return f"parameter {index}{name}, shape {tuple(params[index].shape)}"


def check_parameters(params: Sequence[Tensor], names: Sequence[str] = ()) -> None:
    """Refuses parameters whose arithmetic would be wrong, not merely slow.

    Raises:
        TypeError: sparse, complex, or not floating-point.
        ValueError: on several devices, given twice, or overlapping itself (``expand``) or another parameter.
    """
    seen: dict[int, int] = {}
    for i, p in enumerate(params):
        what = describe(params, i, names)
        if p.layout != torch.strided:
            raise TypeError(f"{what}: layout {p.layout} is not supported; use a dense parameter")
        if p.dtype not in DTYPES:
            raise TypeError(
                f"{what}: dtype {p.dtype} is not supported; use float32, float64, bfloat16 or float16 "
                "(for a complex parameter, optimize the real one under torch.view_as_complex)"
            )
        if p.device != params[0].device:
            raise ValueError(
                f"{what} is on {p.device}, parameter 0 on {params[0].device}; use one optimizer per device"
            )
        if id(p) in seen:
            raise ValueError(f"{what} was given before, as parameter {seen[id(p)]}; give a shared parameter once")
        seen[id(p)] = i
        if overlaps_itself(local(p)):
            raise ValueError(f"{what}: entries share memory (strides {p.stride()}); use a .contiguous() copy")
    _check_disjoint(locals_of(params), names)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts (of which keys do not count), lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` records a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def is_dense(p: Tensor) -> bool:
    """Whether the entries fill one stretch of memory without gaps, in any order of dimensions."""
    return p.numel() == 0 or _extent(p) == p.numel()


def overlaps_itself(p: Tensor) -> bool:
    """Whether two entries share memory, as after ``expand``."""
    reach = 0
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride <= reach:
            return p.numel() > 0
        reach += (size - 1) * stride
    return False


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether entry i in memory is the same entry for both (strides of dimensions of size 1 mean nothing)."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.shape == b.shape and all(size <= 1 or x == y for size, x, y in strides)


def _extent(p: Tensor) -> int:
    """Entries from the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def _check_disjoint(params: Sequence[Tensor], names: Sequence[str]) -> None:
    # Spans of strided views may interleave without sharing an entry (the columns of a matrix): only dense ones are sure.
    dense = [
        (p.data_ptr(), i) for i, p in enumerate(params) if p.numel() > 0 and p.device.type != "meta" and is_dense(p)
    ]
    end, last = 0, 0
    for start, i in sorted(dense):
        if start < end:
            raise ValueError(
                f"{describe(params, i, names)} shares memory with {describe(params, last, names)}: each would be perturbed "
                "and restored over the other; tie weights by using one nn.Parameter in both places"
            )
        end, last = start + params[i].numel() * params[i].element_size(), i
