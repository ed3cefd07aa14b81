"""One run of the GPU benchmarks: device, backends, deadline, and the rows so far."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import samkern
from samkern.backends import backends, resolve

from .gpu_clock import Clock, Run, quantiles
from .gpu_rows import Row
from .machine import folder
from .shapes import ShapeSet
from .train_log import commit

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class OutOfTimeError(BaseException):
    """The deadline has come; what was measured until then counts. Not an Exception: compilers wrap those into their own."""


@dataclass(frozen=True)
class Case:
    """A shape set in a dtype."""

    shape_set: ShapeSet
    dtype: torch.dtype = torch.float32

    def tensors(self, device: torch.device, make: Callable[..., Tensor] = torch.randn) -> list[Tensor]:
        return self.shape_set.tensors(partial(make, device=device, dtype=self.dtype))

    def bytes(self, of_weights: int, of_fp32: int) -> int:
        """Moved by a pass over so many operands in the dtype of the weights, and so many in fp32."""
        return (of_weights * self.dtype.itemsize + of_fp32 * 4) * self.shape_set.n_params

    @property
    def name(self) -> str:
        return f"{self.shape_set.name} {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Session:
    """``smoke``: tiny inputs and few repeats, to see that it runs."""

    device: torch.device
    deadline: float
    smoke: bool = False
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        self.backends = [name for name in ("cuda", "triton", "cpu") if self._serves(name)]

    def _serves(self, name: str) -> bool:
        try:
            return backends()[name].available and resolve(self.device, name) == name
        except (ValueError, samkern.NotBuiltError):
            return False

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    def require(self, seconds: float) -> None:
        """Raises ``OutOfTimeError`` if less is left."""
        if self.left < seconds:
            raise OutOfTimeError

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def section(self, name: str, seconds: float, run: Callable[[], None]) -> None:
        """A part that needs ``seconds`` at least. What goes wrong in it is told, and hides nothing that comes after it."""
        start = time.perf_counter()
        try:
            self.require(seconds)
            run()
        except OutOfTimeError:
            self.note(f"not measured for want of time: {name}")
        except Exception:
            self.failed = True
            self.note(f"failed: {name}\n{traceback.format_exc()}")
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
        if self.clock.on_gpu:
            torch.cuda.empty_cache()

    def add(
        self, case: Case, seconds: Sequence[float] = (), n_bytes: int = 0, copy_gbps: float = 0, **fields: Any
    ) -> Row:
        """A row for ``case``. ``n_bytes``: moved by formula; ``copy_gbps``: in the same rounds."""
        dtype = str(case.dtype).removeprefix("torch.")
        shape_set = case.shape_set
        facts = {"n_tensors": shape_set.n_tensors, "n_params": shape_set.n_params, "dtype": dtype, "grad_dtype": dtype}
        row = Row(**{"shape_set": shape_set.name, "cache": "warm", **facts, **self.facts(), **fields})
        if seconds:
            row.p20_us, row.p50_us, row.p80_us = quantiles(seconds)
        if n_bytes:
            row.bytes, row.gbps, row.copy_gbps = n_bytes, n_bytes / row.p50_us / 1e3, copy_gbps
            row.pct_copy = 100 * row.gbps / copy_gbps
        self.rows.append(row)
        print(row.line(), flush=True)
        return row

    def facts(self) -> dict[str, str]:
        """Where a row is from."""
        try:
            import triton

            triton_version = triton.__version__
        except ImportError:
            triton_version = "none"
        return {
            "device": folder(self.device).name,
            "torch": str(torch.__version__),
            "triton": triton_version,
            "cuda": str(torch.version.cuda),
            "samkern": samkern.__version__,
            "commit": commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }

    def copies(self, n_bytes: int) -> tuple[list[Run], int]:
        """Copies between tensors that take turns, of about ``n_bytes`` moved but no less than cannot be cached; the bytes."""
        n = max(n_bytes // 2, 1 << 29) // 4 if self.clock.on_gpu else max(n_bytes // 8, 1)
        sources = [torch.randn(n, device=self.device) for _ in range(2)]
        targets = [torch.empty_like(x) for x in sources]
        runs = [partial(target.copy_, source) for target, source in zip(targets, sources, strict=True)]
        return runs, 8 * n

    def sets_beyond_cache(self, n_bytes: int) -> int:
        """How many input sets of ``n_bytes`` have to take turns, so that none finds itself in the second-level cache."""
        if not self.clock.on_gpu:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, -(-4 * cache // max(n_bytes, 1)))


def error_of(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest entry of the same tensor."""
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(found, expected, strict=True) if a.numel()]
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs]
    worst = float(torch.stack(errors).max())
    return worst if worst == worst else float("inf")


def check(name: str, case: Case, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Raises ``AssertionError`` unless a result is right: what is wrong is not timed. Returns the error."""
    error = error_of(found, expected)
    assert error <= TOLERANCE[case.dtype], f"{name} on {case.name} is off by {error}: not timed"
    return error
