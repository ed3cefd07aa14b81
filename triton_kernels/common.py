"""What every kernel needs: the tables it reads, how it walks chunks, loads, rounds, and waits for the other programs.

A kernel runs the phases that its ``PHASES`` names, in one cooperative launch with a grid barrier between them or in a
launch each, with the same bits: a chunk's sums have their own place, and are added in an order that depends on nothing
but the list.

Tables (``n`` tensors; a row of ``rows`` and ``sums`` is ``n`` entries, one of ``places`` is ``n + 1``):

``rows``     int64    addresses by role, 0: this tensor plays no such role in this call; then sizes, filters, places
``places``   int32    param group, kind of number, first chunk and first run of filters, of each tensor
``chunks``   int32    tensor, then index within it, of each chunk of this launch
``runs``     int32    tensor, then first filter, then number of filters, of each run of this launch
``numbers``  float64  options: a row per param group, then one for the step
``scalars``  int64    addresses of float32 on the device, 0: none. Of the loss scale, then of one option per param group
``partials`` float64  a row per sum, one entry per chunk of the whole list
``sums``     float64  the same per tensor, and what is computed from them once

No argument of a kernel may be called ``options``: Triton's launcher has an argument of that name, and does not compile then.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def _nothing() -> None:
    """A function to look at what Triton makes of it."""


INTERPRETED = isinstance(triton.jit(_nothing), InterpretedFunction)


def constant(value: Any) -> Any:
    """A global that kernels read: the compiler takes ``constexpr`` only, which the interpreter does not mix with numbers."""
    return value if INTERPRETED else tl.constexpr(value)


# Elements of one tensor that are summed together: as csrc/plan.h, fixed, so that a sum never depends on the device.
CHUNK = constant(65_536)

# Phases, in their order.
REDUCE = constant(1)  # partial sums of every chunk
FOLD = constant(2)  # sums per tensor
APPLY = constant(4)  # what the pass is for
SETTLE = constant(8)  # what may change only after every program has read the old value
CLOSE = constant(16)  # what sums over what SETTLE or APPLY left: one program
ALL_PHASES = (int(REDUCE), int(FOLD), int(APPLY), int(SETTLE), int(CLOSE))

# Rows of `rows`. FIRST is the gradient at w, set aside while GRAD is the one at w + eps. MASK are bits, one an entry in the
# order of w's memory: where 0, the entry is not perturbed. FIRST_ENTRY and FIRST_BYTE: entries, and bytes of bits, before.
W, GRAD, FIRST, SAVED, CACHE, STATE1, STATE2, STEP, MASK, AVERAGE = (constant(i) for i in range(10))
NUMEL, FILTER_COUNT, FILTER_STRIDE, FILTER_FIRST, FIRST_ENTRY, FIRST_BYTE = (constant(i) for i in range(10, 16))
N_ADDRESSES, N_ROWS = 10, 16

# Rows of `places`. The filters of a tensor are summed in runs of neighbours.
GROUP, KIND, STEP_KIND, FIRST_CHUNK, FIRST_RUN = (constant(i) for i in range(5))
N_PLACES = 5
FP32, FP64 = constant(0), constant(1)  # kinds of numbers, by their math dtype

# Rows of `partials` and `sums`, as csrc/plan.h. After the norms are folded, what a climb realised takes the first three,
# and the squares of the first moments that an update writes take the first.
AA, AB, BB, WW, TT, CC = (constant(i) for i in range(6))
STEP_SIZE, BIAS2 = constant(6), constant(7)  # of `sums` only
N_PARTIALS, N_SUMS = 6, 8
MOVED_SQ, MOVED_EPS, EPS_SQ = AA, AB, BB
MOMENTUM_SQ = AA

# Entries of the report, as samkern/options.py.
GRAD_NORM, SECOND_NORM, UPDATE_NORM, PERTURB_NORM = (constant(i) for i in range(4))
REALISED_NORM, REALISED_SHARE, SKIPPED_FIRST, SKIPPED_SECOND = (constant(i) for i in range(4, 8))

# Entries of `scalars`. FOUND_INF is not 0 where gradients under a loss scale were not finite.
GRAD_SCALE, FOUND_INF, FIRST_GROUP = (constant(i) for i in range(3))

LARGEST_FP32 = constant(3.4028234663852886e38)
LARGEST_FP64 = constant(1.7976931348623157e308)

# A fold sums this many tensors at a time, this many chunks each.
FOLD_TENSORS, FOLD_CHUNKS, LANES = constant(4), constant(64), constant(256)


class Tables(NamedTuple):
    """The tables that parts of a kernel share, and their sizes."""

    rows: Any
    places: Any
    numbers: Any
    scalars: Any
    partials: Any
    sums: Any
    n_tensors: Any
    n_all_chunks: Any


class Chunk(NamedTuple):
    """A chunk of this launch: tensor, first element, number of elements, place among the partial sums."""

    t: Any
    lo: Any
    n: Any
    place: Any


class Types(NamedTuple):
    """What a kernel is compiled for by the dtypes of its operands. None: has no such operand.

    ``other``: what a mix projects on, subtracts or adds. ``state1``, ``state2``: moments, None: in ``math``. ``bits``: the
    integer type as wide as ``w``. ``block``: elements that a program has under way. ``soft_bf16``: see ``round_to``.
    """

    w: Any
    math: Any
    bits: Any
    block: int
    soft_bf16: bool
    g: Any = None
    other: Any = None
    cache: Any = None
    state1: Any = None
    state2: Any = None


@triton.jit
def grid_barrier(sem):
    """Every global write before it, by any program, is seen by every read after it.

    All programs of the launch must call it, and all must be resident: the launch is cooperative. ``sem`` is an int32 that
    is only ever used here. Program 0 adds 0x80000000 - (programs - 1) and the others 1: a round flips bit 31, and
    nothing is ever reset.
    """
    tl.debug_barrier()
    one = tl.full((), 1, tl.uint32)
    if tl.program_id(0) == 0:
        add = 0x80000000 - (tl.num_programs(0).to(tl.uint32) - one)
    else:
        add = one
    sem = sem.to(tl.pointer_type(tl.uint32))
    old = tl.atomic_add(sem, add, sem="release")
    flipped = False
    while not flipped:
        now = tl.atomic_add(sem, 0, sem="acquire")
        flipped = ((old ^ now) & 0x80000000) != 0
    tl.debug_barrier()


@triton.jit
def barrier_before(phase: tl.constexpr, PHASES: tl.constexpr, sem):
    """Waits for the phase before, if this launch runs both."""
    if (PHASES & phase) != 0 and (PHASES & (phase - 1)) != 0:
        grid_barrier(sem)


@triton.jit
def share(n_chunks):
    """The run of chunks that is this program's: the same in every phase, so that APPLY finds in L2 what REDUCE read."""
    per = tl.cdiv(n_chunks, tl.num_programs(0))
    begin = tl.minimum(tl.program_id(0) * per, n_chunks)
    return begin, tl.minimum(begin + per, n_chunks)


@triton.jit
def locate(chunks, tables, n_chunks, c):
    """Chunk ``c`` of this launch."""
    t = tl.load(chunks + c)
    index = tl.load(chunks + n_chunks + c)
    lo = index.to(tl.int64) * CHUNK
    n = tl.minimum(entry(tables, NUMEL, t) - lo, CHUNK).to(tl.int32)
    return Chunk(t, lo, n, tl.load(tables.places + FIRST_CHUNK * (tables.n_tensors + 1) + t) + index)


@triton.jit
def entry(tables, ROW: tl.constexpr, t):
    """Row ``ROW`` of ``rows`` for tensor ``t``: an address, or a size."""
    return tl.load(tables.rows + ROW * tables.n_tensors + t)


@triton.jit
def entries(tables, ROW: tl.constexpr, t):
    """The same for a block of tensors, zero beyond the end."""
    return tl.load(tables.rows + ROW * tables.n_tensors + t, mask=t < tables.n_tensors, other=0)


@triton.jit
def place(tables, ROW: tl.constexpr, t):
    """Row ``ROW`` of ``places`` for a block of tensors, zero beyond the end."""
    return tl.load(tables.places + ROW * (tables.n_tensors + 1) + t, mask=t < tables.n_tensors, other=0)


@triton.jit
def group_of(tables, t):
    return tl.load(tables.places + GROUP * (tables.n_tensors + 1) + t)


@triton.jit
def scalar(tables, i, number):
    """Entry ``i`` of ``scalars``, in fp64, or ``number`` if it has no address."""
    address = tl.load(tables.scalars + i)
    value = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return tl.where(address != 0, value.to(tl.float64), number)


@triton.jit
def inverse_scale(tables, SCALED: tl.constexpr):
    """By which gradients are to be multiplied: 1 without a loss scale."""
    one = tl.full((), 1, tl.float64)
    if SCALED:
        return one / scalar(tables, GRAD_SCALE, one)
    else:
        return one


@triton.jit
def found_inf(tables, SCALED: tl.constexpr):
    """Whether gradients were found not to be finite when the loss scale was checked."""
    if SCALED:
        return scalar(tables, FOUND_INF, tl.full((), 0, tl.float64)) != 0
    else:
        return tl.full((), 0, tl.int1)


@triton.jit
def elements(address, lo, DT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element ``lo`` of a tensor. ``ALIGNED``: it lies on 16 bytes, so that accesses may be that wide.

    To be called by the function that holds the loop: the hint does not survive being passed on (Triton 3.6).
    """
    p = (address + lo * (DT.primitive_bitwidth // 8)).to(tl.pointer_type(DT))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def round_to(x, DT: tl.constexpr, TYPES: tl.constexpr):
    """``x`` in dtype ``DT``, to nearest even. fp64 goes to the half types through fp32, as in torch."""
    if DT.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    if TYPES.soft_bf16 and tl.bfloat16 == DT:
        # The interpreter truncates where hardware rounds.
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, bits | 0x00400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DT)


@triton.jit
def widened(x):
    """In the math dtype of its own, since halves do not go to fp64 in one step everywhere."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def sqrt_rn(x):
    """Correctly rounded: ``tl.sqrt`` is so in fp64, where ``tl.sqrt_rn`` refuses, and is approximate in fp32."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def div_rn(x, y):
    """Correctly rounded, see ``sqrt_rn``."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def lane_sums(x, y, LANE: tl.constexpr):
    """Products of two blocks, exact in fp64 for fp32 factors, ``LANE`` neighbours added.

    With as many as a 16-byte access loads they are in one thread already, and few numbers are carried from block to block.
    """
    product = x.to(tl.float64) * y.to(tl.float64)
    return tl.sum(tl.reshape(product, (product.shape[0] // LANE, LANE)), 1)


@triton.jit
def is_finite(x, wide):
    """Whether a sum of squares is finite: beyond the largest fp32 counts as overflow, but for fp64 (``wide``)."""
    return tl.abs(x) <= tl.where(wide, LARGEST_FP64, LARGEST_FP32)


@triton.jit
def only_if(condition, mask):
    """``mask`` if the scalar ``condition`` holds, else nothing. By ``where``: the interpreter cannot broadcast a comparison."""
    return tl.where(condition, mask, tl.zeros_like(mask))


@triton.jit
def read(p, mask):
    """Elements, or zeros where ``mask`` is false. None: all, as one wide access a thread."""
    if mask is None:
        return tl.load(p)
    else:
        return tl.load(p, mask=mask, other=0.0)


@triton.jit
def bits_of_chunk(tables, chunk):
    """Address of a chunk's bits, 0 where its tensor has no mask. Chunks begin at a multiple of 8 entries."""
    address = entry(tables, MASK, chunk.t)
    return tl.where(address != 0, address + (chunk.lo >> 3), 0)


@triton.jit
def unmasked(bits, j, mask):
    """Whether entries ``j`` have a one in the bits that begin at address ``bits``; all have if it is 0."""
    if mask is None:
        there = only_if(bits != 0, tl.full(j.shape, 1, tl.int1))
    else:
        there = only_if(bits != 0, mask)
    eight = tl.load(bits.to(tl.pointer_type(tl.uint8)) + (j >> 3), mask=there, other=255)
    return ((eight.to(tl.int32) >> (j & 7).to(tl.int32)) & 1) != 0


@triton.jit
def read_sum(tables, ROW: tl.constexpr, t):
    """Row ``ROW`` of ``sums`` for tensor ``t``. ``.cg``: other programs wrote it in this launch, and L1 is not coherent."""
    return tl.load(tables.sums + ROW * tables.n_tensors + t, cache_modifier=".cg")


@triton.jit
def read_sums(tables, ROW: tl.constexpr, t):
    """The same for a block of tensors, zero beyond the end."""
    there = t < tables.n_tensors
    return tl.load(tables.sums + ROW * tables.n_tensors + t, mask=there, other=0.0, cache_modifier=".cg")


@triton.jit
def write_sums(tables, ROW: tl.constexpr, t, values):
    tl.store(tables.sums + ROW * tables.n_tensors + t, values, mask=t < tables.n_tensors)


@triton.jit
def write_partial(tables, ROW: tl.constexpr, chunk, value):
    tl.store(tables.partials + ROW * tables.n_all_chunks + chunk.place, value)


@triton.jit
def read_partials(tables, ROW: tl.constexpr, c):
    """Row ``ROW`` of ``partials`` for a block of chunks, zero beyond the end."""
    there = c < tables.n_all_chunks
    return tl.load(tables.partials + ROW * tables.n_all_chunks + c, mask=there, other=0.0, cache_modifier=".cg")
