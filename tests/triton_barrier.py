"""The barrier of the Triton kernels under a product that does not commute: ``barrier_stress.cu`` in Triton.

Several programs need a GPU, where they run at once. Elsewhere ``python -m tests.triton_barrier`` compiles the kernel for GPUs
that are not there and prints what the compiler made of it; in Triton's interpreter it runs one program.
"""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl

from samkern.triton_kernels.common import INTERPRETED, grid_barrier

REGISTERS = 32  # of a thread, so that eight programs of 256 threads fill a multiprocessor
THREADS_OF_A_PROCESSOR = 2048


@triton.jit
def barrier_stress_kernel(matrices, products, sem, n_rounds):
    """``matrices``: [2][programs][4] by turns. ``products``: [programs][4], what each program arrived at."""
    program, n_programs = tl.program_id(0).to(tl.uint32), tl.num_programs(0)
    one = tl.full((), 1, tl.uint32)
    zero = tl.full((), 0, tl.uint32)
    a, b, c, d = one, zero, zero, one
    turn = zero
    r = 0
    while r < n_rounds:  # range() of such a number trips the interpreter of Triton 3.6
        x = (b + turn) * tl.full((), 2654435761, tl.uint32) + program * tl.full((), 2246822519, tl.uint32)
        y = (c + program) * tl.full((), 3266489917, tl.uint32) + turn * tl.full((), 668265263, tl.uint32)
        base = matrices + (r % 2) * n_programs * 4
        own = base + tl.program_id(0) * 4
        tl.store(own, (one + x * y).to(tl.int32, bitcast=True))
        tl.store(own + 1, x.to(tl.int32, bitcast=True))
        tl.store(own + 2, y.to(tl.int32, bitcast=True))
        tl.store(own + 3, one.to(tl.int32, bitcast=True))
        grid_barrier(sem)
        a, b, c, d = one, zero, zero, one
        i = 0
        while i < n_programs:
            p = tl.load(base + i * 4, cache_modifier=".cg").to(tl.uint32, bitcast=True)
            q = tl.load(base + i * 4 + 1, cache_modifier=".cg").to(tl.uint32, bitcast=True)
            s = tl.load(base + i * 4 + 2, cache_modifier=".cg").to(tl.uint32, bitcast=True)
            t = tl.load(base + i * 4 + 3, cache_modifier=".cg").to(tl.uint32, bitcast=True)
            a, b, c, d = a * p + b * s, a * q + b * t, c * p + d * s, c * q + d * t
            i += 1
        turn += one
        r += 1
    out = products + tl.program_id(0) * 4
    tl.store(out, a.to(tl.int32, bitcast=True))
    tl.store(out + 1, b.to(tl.int32, bitcast=True))
    tl.store(out + 2, c.to(tl.int32, bitcast=True))
    tl.store(out + 3, d.to(tl.int32, bitcast=True))


def n_programs() -> int:
    """Programs that are resident at the same time."""
    per_processor = THREADS_OF_A_PROCESSOR // 256
    return per_processor * torch.cuda.get_device_properties("cuda").multi_processor_count


def run(n_programs: int, n_rounds: int, device: str = "cuda") -> list[list[int]]:
    """What every program arrived at."""
    matrices = torch.full((2, n_programs, 4), -1, dtype=torch.int32, device=device)
    products = torch.full((n_programs, 4), -1, dtype=torch.int32, device=device)
    sem = torch.zeros(1, dtype=torch.int32, device=device)
    options = {} if INTERPRETED else {"num_warps": 8, "maxnreg": REGISTERS, "launch_cooperative_grid": True}
    barrier_stress_kernel[(n_programs,)](matrices, products, sem, n_rounds, **options)
    return [[entry % 2**32 for entry in row] for row in products.tolist()]


if __name__ == "__main__":
    if INTERPRETED:
        print(json.dumps(run(1, 6, "cpu")))
    else:
        from .triton_variants import ARCHITECTURES, compile_variant

        for architecture in ARCHITECTURES:
            facts = compile_variant(barrier_stress_kernel, REGISTERS, {}, architecture)
            print(json.dumps({"architecture": architecture, **facts}), flush=True)
