"""restore: ``w = saved``, as a pass of its own and as a part of ``update``."""

import triton
import triton.language as tl

from .common import SAVED, Tables, W, elements, entry, locate, share


@triton.jit
def copy_range(to, source, lo, n, ALIGNED: tl.constexpr, TYPES: tl.constexpr):
    """Bits, not numbers: those of a NaN too."""
    to, source = elements(to, lo, TYPES.bits, ALIGNED), elements(source, lo, TYPES.bits, ALIGNED)
    BLOCK: tl.constexpr = TYPES.block
    o = tl.arange(0, BLOCK)
    for i in range(n // BLOCK):
        tl.store(to + (i * BLOCK + o), tl.load(source + (i * BLOCK + o)))
    j = n // BLOCK * BLOCK + o
    tl.store(to + j, tl.load(source + j, mask=j < n), mask=j < n)


@triton.jit
def restore_chunk(tables, chunk, TYPES: tl.constexpr):
    w, saved = entry(tables, W, chunk.t), entry(tables, SAVED, chunk.t)
    if saved != 0:
        if ((w | saved) & 15) == 0:
            copy_range(w, saved, chunk.lo, chunk.n, True, TYPES)
        else:
            copy_range(w, saved, chunk.lo, chunk.n, False, TYPES)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def restore_kernel(rows, places, chunks, n_tensors, n_chunks, TYPES: tl.constexpr):
    """``w = saved``, bitwise, where ``saved`` is there."""
    tables = Tables(rows, places, rows, rows, rows, rows, n_tensors, n_chunks)  # it has no numbers and no sums
    begin, end = share(n_chunks)
    for c in range(begin, end):
        restore_chunk(tables, locate(chunks, tables, n_chunks, c), TYPES)
