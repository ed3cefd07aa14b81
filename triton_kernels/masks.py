"""The functions of ``samkern.reference_masks`` over the kernels of ``select``: same arguments, same bits.

A selection is a launch for each digit of its keys (three; two for half types, six if some score is fp64), one that writes
bits, and one that settles ties, each once for each dtype in the list. Nothing is concatenated, and nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import common
from .arguments import Tensors, combinations, flag_bytes, mark_written, on_device, tables_of
from .launch import registers_for, run, run_phases, types_of
from .select import BINS, DROP, GROW, TOP, Select, fisher_kernel, histogram_kernel, mark_kernel, settle_kernel
from .tables import Slice

REGISTERS = 128  # of the kernels that select


def topk_mask(scores: Tensors, k: int, bits: Tensor, n_nan: Tensor) -> None:
    """As ``reference_masks.topk_mask``."""
    selection = _Selection(scores, [k, 0, 0], n_nan=n_nan.zero_())
    selection.select(selection.form(TOP), bits, bits, bits)


def drop_grow_mask(
    bits: Tensor,
    g: Tensors,
    n: int,
    seed: int,
    t: int,
    drops: bool = True,
    regrow: bool = True,
    skip: Tensor | None = None,
) -> None:
    """As ``reference_masks.drop_grow_mask``."""
    selection = _Selection(g, [n, seed, t], skip)
    before = kept = bits.clone()
    if drops:
        kept = torch.empty_like(bits)
        selection.select(selection.form(DROP, limited=not regrow, regrow=regrow), before, before, kept)
    growth = selection.form(GROW, limited=drops, regrow=regrow or not drops)
    selection.select(growth, kept if regrow else before, kept, bits)


class _Selection:
    """A list, how many of its entries are wanted, and the launches that select them."""

    def __init__(
        self, tensors: Tensors, wanted: list[int], skip: Tensor | None = None, n_nan: Tensor | None = None
    ) -> None:
        self._tables = tables_of(tensors, {common.W: tensors})
        self._dtypes = combinations(tensors)
        self._device = device = tensors[0].device
        self._wanted = self._tables.integers("wanted", [*wanted, sum(x.numel() for x in tensors)])
        self._skips = skip is not None
        self._skip = flag_bytes(skip, device) if skip is not None else self._wanted
        # Of what is dropped, then of what is grown: which must know how many were dropped.
        self._histograms = torch.zeros(2, 6, int(BINS), dtype=torch.int64, device=device)
        self._ties = torch.empty(self._tables.n_chunks, dtype=torch.int64, device=device)
        self._n_nan = self._wanted if n_nan is None else n_nan

    def form(self, what: Any, **limits: bool) -> Select:
        """Keys are as wide as the widest numbers."""
        wide = what != GROW and any(dtype == torch.float64 for (dtype,) in self._dtypes)
        return Select(int(what), tl.uint64 if wide else tl.uint32, skips=self._skips, **limits)

    def select(self, form: Select, candidates: Tensor, base: Tensor, out: Tensor) -> None:
        """Writes ``out``: ``base``, but for the candidates that are selected. Only ``TOP`` reads no bits."""
        grows = form.what == GROW
        dtypes = [(torch.float32,)] * len(self._dtypes) if grows else self._dtypes  # random keys read no scores
        slices = self._tables.slices("growth" if grows else "selection", dtypes)
        histograms, dropped = self._histograms[int(grows)], self._histograms[0]
        n_digits = self._n_digits(form)
        counts = (self._wanted, histograms, dropped, candidates)
        for digit in range(n_digits):
            for part in slices:
                self._launch(histogram_kernel, part, form, [*counts, self._skip, self._n_nan], DIGIT_INDEX=digit)
        for kernel in (mark_kernel, settle_kernel):
            for part in slices:
                self._launch(kernel, part, form, [*counts, base, out, self._ties, self._skip], n_digits)
        mark_written([out])

    def _n_digits(self, form: Select) -> int:
        """Digits of 11 bits. The lower bits of a half type say nothing: they are those of its widened numbers."""
        if form.key == tl.uint64:
            return 6
        return 2 if form.what != GROW and all(dtype.itemsize == 2 for (dtype,) in self._dtypes) else 3

    def _launch(
        self, kernel: Any, part: Slice, form: Select, arguments: list[Any], *counts: int, **constants: int
    ) -> None:
        tables, n_chunks = self._tables, part.chunks.shape[1]
        run(
            kernel,
            self._device,
            [tables.rows, tables.places, part.chunks, *arguments, len(self._dtypes), n_chunks, *counts],
            n_chunks,
            REGISTERS,
            FORM=form,
            TYPES=types_of(*part.dtypes)._replace(block=block_for(kernel, form)),
            **constants,
        )


def block_for(kernel: Any, form: Select) -> int:
    """Elements under way at once: of wide keys fewer, and in Triton 3.6 a histogram takes a register for every 32 bins."""
    return 2048 if kernel is not histogram_kernel and form.key == tl.uint32 and form.what != GROW else 1024


def fisher_accumulate(
    f: Tensors,
    g: Tensors,
    keep: float,
    gain: float,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """As ``reference_masks.fisher_accumulate``."""
    tables = tables_of(f, {common.W: f, common.FIRST: g})
    device, numbers = f[0].device, tables.numbers("fisher", [keep, gain])
    factor = numbers if scale is None else on_device(scale, device)
    flag = numbers if skip is None else flag_bytes(skip, device)

    def launch(part: Slice, _: int) -> None:
        n_chunks = part.chunks.shape[1]
        run(
            fisher_kernel,
            device,
            (tables.rows, tables.places, part.chunks, numbers, factor, flag, len(f), n_chunks),
            n_chunks,
            registers_for(part.dtypes),
            SCALED=scale is not None,
            SKIPS=skip is not None,
            TYPES=types_of(*part.dtypes),
        )

    run_phases(launch, tables.slices("fisher", combinations(f, g)), int(common.APPLY))
    mark_written(f)
