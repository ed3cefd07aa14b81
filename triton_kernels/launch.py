"""From a kernel and its arguments to a launch: registers, grid, and what a kernel is compiled for by its dtypes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton.language as tl

from ..reference import math_dtype
from . import common
from .common import INTERPRETED, Types
from .tables import Slice

# Contraction is off, so that the bits are those of every other backend.
COMPILER_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_THREADS, _REGISTERS_PER_SM = 256, 65_536  # of every multiprocessor since sm_70

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


def types_of(w: torch.dtype, g: torch.dtype | None = None, **others: torch.dtype) -> Types:
    """Triton's names for a combination of dtypes. fp64 needs more registers, so fewer elements at once."""
    block = 512 if math_dtype(w) == torch.float64 else 2048
    rest = {name: _TYPES[dtype] for name, dtype in others.items()}
    return Types(
        _TYPES[w],
        _TYPES[math_dtype(w)],
        _BITS[w.itemsize],
        block,
        soft_bf16=INTERPRETED,
        g=_TYPES[g] if g is not None else None,
        **rest,
    )


def registers_for(
    dtypes: Iterable[torch.dtype], crowded: bool = False, scaled: bool = False, masked: bool = False
) -> int:
    """Registers a thread may use, so that nothing spills on sm_80 and sm_90.

    A cooperative launch must know how many programs are resident, and this says it: 4, 3 or 2 on a multiprocessor.
    ``crowded``: scales by filter, a mix, sums over moments, or a base update other than SGD's. Those have more operands, and
    keep as many bytes under way with fewer threads. ``scaled``: there may be a loss scale. ``masked``: there are masks, each
    entry's byte an address of its own: too many beside those of half types.
    """
    if crowded or (masked and any(dtype.itemsize == 2 for dtype in dtypes)):
        return 128
    if torch.float64 in dtypes:
        return 96
    return 64 if set(dtypes) == {torch.float32} and not scaled and not masked else 80


def run(
    kernel: Any, device: torch.device, arguments: Sequence[Any], work: int, registers: int, **constants: Any
) -> None:
    """Launches ``kernel`` on the current stream. ``work``: how many programs could have something to do."""
    if INTERPRETED:  # a few programs, one after another
        kernel[(min(max(work, 1), 3),)](*arguments, **constants)
        return
    with torch.cuda.device(device):
        per_sm = _REGISTERS_PER_SM // (registers * _THREADS)
        resident = per_sm * torch.cuda.get_device_properties(device).multi_processor_count
        options = {
            **COMPILER_OPTIONS,
            "maxnreg": registers,
            "launch_cooperative_grid": constants.get("PHASES", 1) not in common.ALL_PHASES,
        }
        kernel[(min(max(work, 1), resident),)](*arguments, **constants, **options)


def one_launch() -> bool:
    """Whether several phases may share a launch. SAMKERN_ONE_LAUNCH=0: never, for profilers that serialise programs."""
    return not INTERPRETED and os.environ.get("SAMKERN_ONE_LAUNCH", "1") != "0"


def run_phases(
    launch: Callable[[Slice, int], None],
    slices: list[Slice],
    phases: int,
    after_sums: Callable[[], None] | None = None,
) -> None:
    """All phases in one launch if one combination of dtypes is all there is, else one by one.

    ``launch`` is called with a part of the list and the phases that it is to run, ``after_sums`` when sums have been folded,
    before anybody reads them.
    """
    if one_launch() and len(slices) == 1 and after_sums is None:
        launch(slices[0], phases)
        return
    for phase in common.ALL_PHASES:
        if phases & phase:
            over_elements = phase in (int(common.REDUCE), int(common.APPLY))
            for part in slices if over_elements else slices[:1]:
                launch(part, phase)
            if phase == int(common.FOLD) and after_sums is not None:
                after_sums()


def check_device(device: torch.device) -> None:
    """Raises ``RuntimeError`` for tensors that neither the GPU nor the interpreter could read."""
    if INTERPRETED and device.type != "cpu":
        raise RuntimeError(
            f"parameters on {device} in Triton's interpreter, which cannot read their memory: unset TRITON_INTERPRET, or "
            "move them to the CPU"
        )
    if not INTERPRETED and device.type != "cuda":
        raise RuntimeError(
            f"backend 'triton' serves CUDA tensors, got parameters on {device}; for tests on the CPU set TRITON_INTERPRET=1 "
            "before Triton is imported"
        )
