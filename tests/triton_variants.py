"""Compiles Triton kernels for GPUs that are not there, and tells what the compiler made of them.

Run by ``test_triton.py`` in a process without TRITON_INTERPRET: ``python -m tests.triton_variants [NAME ...]`` prints a
line of JSON for each kernel variant and architecture.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from samkern.options import UNSCALED, Base, Climb, ClimbGroup, Mix, MixOptions, Scaling
from samkern.reference import DIRECTIONS
from samkern.triton_kernels import common, lists, masks, select
from samkern.triton_kernels.launch import COMPILER_OPTIONS, registers_for, types_of
from samkern.triton_kernels.lists import Given, Norms
from samkern.triton_kernels.noise import noise_kernel
from samkern.triton_kernels.perturb import ALONG, PER_ENTRY, PER_FILTER, SIGNS, perturb_kernel
from samkern.triton_kernels.plan import form_of_climbs, form_of_noise, form_of_update, registers_of_noise
from samkern.triton_kernels.restore import restore_kernel
from samkern.triton_kernels.update import update_kernel

from .lists import CLIMBS

ARCHITECTURES = (80, 90)
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
POINTERS = {
    **dict.fromkeys(
        ("rows", "scalars", "skips", "taken", "wanted", "counts", "axes", "histograms", "dropped", "ties", "n_nan"),
        "*i64",
    ),
    **dict.fromkeys(("places", "chunks", "runs", "sem", "matrices", "products"), "*i32"),
    **dict.fromkeys(("numbers", "partials", "run_partials", "filter_squares", "sums", "report", "cache_norm"), "*fp64"),
    **dict.fromkeys(("out", "scale", "k", "coeff_a", "coeff_b", "clip", "weights", "momentum_sq", "norms"), "*fp64"),
    **dict.fromkeys(("fresh", "skip", "first", "candidates", "base"), "*u8"),
}


SCALING = Scaling(torch.ones(()), torch.zeros(()))


def perturb(climb, w, scaled=False, masked=False, renormalises=False):
    half = w.itemsize == 2
    together = common.REDUCE | common.FOLD | common.APPLY | (common.CLOSE if half else 0)
    constants = {
        "PHASES": int(together),
        "FORM": form_of_climbs([ClimbGroup(climb, 0.1)], half, scaled, masked, renormalises),
        "TYPES": types_of(w, w),
    }
    return perturb_kernel, registers_for([w], climb == Climb.FILTER or renormalises, scaled, masked), constants


def perturb_along_momentum(climb, w, known):
    half = w.itemsize == 2
    together = common.FOLD | common.APPLY | (0 if known else common.REDUCE) | (common.CLOSE if half else 0)
    moments = FP32 if half else w
    constants = {
        "PHASES": int(together),
        "FORM": form_of_climbs([ClimbGroup(climb, 0.1)], half, along_momentum=True, known=known),
        "TYPES": types_of(w, moments),
    }
    return perturb_kernel, registers_for([w, moments], climb == Climb.FILTER), constants


def noise(climb, w, source=None, given=False, again=False, strided=False, reports=True, masked=False):
    half, source = w.itemsize == 2, source or w
    together = common.REDUCE | common.FOLD | common.APPLY | (common.CLOSE if half and reports else 0)
    constants = {
        "PHASES": int(together),
        "FORM": form_of_noise([ClimbGroup(climb, 0.1)], again, strided, given, reports, half, masked),
        "SOURCE": types_of(source, source),
        "TYPES": types_of(w),
    }
    return noise_kernel, registers_of_noise(constants["FORM"]), constants


def update(base, mix, w, cache=FP32, clips=False, scaling=UNSCALED, tracks=False, averages=False):
    together = common.REDUCE | common.FOLD | common.APPLY | common.SETTLE | (common.CLOSE if mix.fills_cache else 0)
    cache, looked = FP64 if w == FP64 else cache, not mix.adds_cache
    options = MixOptions(mix, weights=torch.ones(()) if mix == Mix.ADD else None)
    constants = {
        "PHASES": int(together),
        "FORM": form_of_update(base, options, looked, True, clips, scaling, looked, tracks, averages),
        "TYPES": types_of(w, w, other=cache if mix.adds_cache else w, cache=cache),
    }
    crowded = mix != Mix.GRADIENT or base != Base.SGD or tracks or averages
    return update_kernel, registers_for([w], crowded, constants["FORM"].scaled), constants


def restore(w):
    return restore_kernel, registers_for([w]), {"TYPES": types_of(w)}


def list_norms(w, masked=False):
    constants = {
        "PHASES": int(common.REDUCE | common.FOLD | common.CLOSE),
        "FORM": Norms(True, True, int(lists.BY_ENTRY), masked),
        "TYPES": types_of(w, w, other=w),
    }
    return lists.norms_kernel, registers_for([w], crowded=True), constants


def list_difference(w):
    constants = {
        "PHASES": int(common.REDUCE | common.FOLD | common.CLOSE),
        "TYPES": types_of(w, w, other=w, cache=w, state1=w),
    }
    return lists.difference_kernel, registers_for([w], crowded=True), constants


def list_perturb(direction, w, masked=False):
    crowded = direction == PER_FILTER
    constants = {
        "PHASES": int(common.REDUCE | common.APPLY if crowded else common.APPLY),
        "DIRECTION": int(direction),
        "MASKED": masked,
        "TYPES": types_of(w, w),
    }
    return lists.climb_kernel, registers_for([w], crowded, masked=masked), constants


def list_decompose(w):
    constants = {
        "PHASES": int(common.REDUCE | common.FOLD | common.CLOSE),
        "TYPES": types_of(w, w, other=w, cache=w if w == FP64 else FP32),
    }
    return lists.decompose_kernel, registers_for([w], crowded=True), constants


def list_combine(w):
    return lists.combine_kernel, registers_for([w]), {"TYPES": types_of(w, w, other=w)}


def list_update(base, w):
    mixed = MixOptions(Mix.REUSE)
    form = form_of_update(base, mixed, False, False, True, SCALING, True)._replace(summed=False)
    adam = common.FOLD | common.SETTLE if base != Base.SGD else 0
    state = FP64 if w == FP64 else FP32
    constants = {
        "PHASES": int(common.APPLY | adam),
        "FORM": form,
        "GIVEN": Given(True, True, True, True),
        "TYPES": types_of(w, w, other=w, state1=state, state2=state),
    }
    return lists.update_list_kernel, registers_for([w], True), constants


def selection(kernel, what, w, wide=False, digit=None):
    """``wide``: beside scores of float64."""
    key = masks.tl.uint64 if wide or w == FP64 else masks.tl.uint32
    form = select.Select(int(what), key, limited=what == select.GROW, skips=what != select.TOP)
    constants = {"FORM": form, "TYPES": types_of(w)._replace(block=masks.block_for(kernel, form))}
    return kernel, masks.REGISTERS, constants if digit is None else {**constants, "DIGIT_INDEX": digit}


def fisher(w):
    constants = {"SCALED": True, "SKIPS": True, "TYPES": types_of(w, w)}
    return select.fisher_kernel, registers_for([w]), constants


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


VARIANTS = {
    **{f"perturb-{c.name}-{name_of(w)}": perturb(c, w) for c in CLIMBS for w in (FP32, BF16, FP16, FP64)},
    **{
        f"update-{base.name}-{mix.name}-{name_of(w)}": update(base, mix, w)
        for base in Base
        for mix in Mix
        for w in (FP32, BF16, FP16, FP64)
    },
    "update-SGD-REUSE-float32-clipped-bf16-cache": update(Base.SGD, Mix.REUSE, FP32, BF16, clips=True),
    "update-ADAM-DECOMPOSE-float32-bf16-cache": update(Base.ADAM, Mix.DECOMPOSE, FP32, BF16),
    **{
        f"update-SGD-{mix.name}-float32-clipped": update(Base.SGD, mix, FP32, clips=True)
        for mix in (Mix.ADD, Mix.BLEND)
    },
    **{
        f"update-{base.name}-GRADIENT-{name_of(w)}-tracked": update(base, Mix.GRADIENT, w, tracks=True)
        for base in (Base.SGD, Base.ADAMW)
        for w in (FP32, BF16, FP64)
    },
    **{f"perturb-{c.name}-bfloat16-momentum": perturb_along_momentum(c, BF16, False) for c in CLIMBS},
    **{
        f"perturb-EUCLIDEAN-{name_of(w)}-momentum-known": perturb_along_momentum(Climb.EUCLIDEAN, w, True)
        for w in (FP32, BF16)
    },
    **{f"perturb-{c.name}-float32-scaled": perturb(c, FP32, True) for c in CLIMBS},
    **{
        f"perturb-{c.name}-{name_of(w)}-masked{how}": perturb(c, w, False, True, bool(how))
        for c in CLIMBS
        for w in (FP32, BF16, FP16, FP64)
        for how in ("", "-renormalised")
    },
    **{f"perturb-{c.name}-float32-scaled-masked": perturb(c, FP32, True, True) for c in CLIMBS},
    **{
        f"update-{base.name}-{mix.name}-float32-scaled": update(base, mix, FP32, scaling=SCALING)
        for base in Base
        for mix in Mix
    },
    **{
        f"update-{base.name}-{mix.name}-{name_of(w)}-averaged": update(base, mix, w, averages=True)
        for base in (Base.SGD, Base.ADAMW)
        for mix in (Mix.GRADIENT, Mix.DECOMPOSE, Mix.REUSE)
        for w in (FP32, BF16, FP64)
    },
    **{
        f"noise-{scale}-{name_of(w)}{how}": noise(
            *(climb, w, None, False, "again" in how, "strided" in how, True, "masked" in how)
        )
        for scale, climb in (("filter", Climb.NOISE_FILTER), ("tensor", Climb.NOISE_TENSOR))
        for w in (FP32, BF16, FP64)
        for how in ("", "-again", "-strided", "-strided-masked")
    },
    **{
        f"list_noise-{name_of(w)}{how}": noise(
            *(Climb.NOISE_FILTER, w, FP32 if "float32" in how else None, "given" in how),
            *("again" in how, "strided" in how, False, "masked" in how),
        )
        for w in (FP32, BF16, FP64)
        for how in ("", "-given", "-given-strided-masked", "-again-from-float32")
    },
    **{f"restore-{name_of(w)}": restore(w) for w in (FP32, BF16, FP64)},
    **{f"list_norms-{name_of(w)}": list_norms(w) for w in (FP32, BF16, FP16, FP64)},
    **{f"list_difference-{name_of(w)}": list_difference(w) for w in (FP32, BF16, FP16, FP64)},
    **{
        f"list_perturb-{name}-{name_of(w)}": list_perturb(direction, w)
        for name, direction in zip(DIRECTIONS, (ALONG, SIGNS, PER_ENTRY, PER_FILTER), strict=True)
        for w in (FP32, BF16, FP16, FP64)
    },
    **{f"list_norms-{name_of(w)}-masked": list_norms(w, True) for w in (FP32, BF16, FP16, FP64)},
    **{
        f"list_perturb-{name}-{name_of(w)}-masked": list_perturb(direction, w, True)
        for name, direction in zip(DIRECTIONS, (ALONG, SIGNS, PER_ENTRY, PER_FILTER), strict=True)
        for w in (FP32, BF16, FP16, FP64)
    },
    **{f"list_decompose-{name_of(w)}": list_decompose(w) for w in (FP32, BF16, FP16, FP64)},
    **{f"list_combine-{name_of(w)}": list_combine(w) for w in (FP32, BF16, FP16, FP64)},
    **{
        f"list_update-{base.name}-{name_of(w)}": list_update(base, w)
        for base in (Base.SGD, Base.ADAM, Base.ADAMW)
        for w in (FP32, BF16, FP16, FP64)
    },
    **{f"fisher-{name_of(w)}": fisher(w) for w in (FP32, BF16, FP16, FP64)},
    **{
        f"{kernel}-{name}-{name_of(w)}{'-wide' if wide else ''}": selection(
            getattr(select, f"{kernel}_kernel"), what, w, wide, 1 if kernel == "histogram" else None
        )
        for kernel in ("histogram", "mark", "settle")
        for name, what in (("TOP", select.TOP), ("DROP", select.DROP))
        for w, wide in ((FP32, False), (BF16, False), (FP16, False), (FP64, False), (FP32, True), (BF16, True))
    },
    **{
        f"{kernel}-GROW": selection(
            getattr(select, f"{kernel}_kernel"), select.GROW, FP32, digit=1 if kernel == "histogram" else None
        )
        for kernel in ("histogram", "mark", "settle")
    },
    "histogram-TOP-float32-first": selection(select.histogram_kernel, select.TOP, FP32, digit=0),
}


def resources(cubin):
    """Registers and bytes of stack of a thread, by the cubin's own account."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def pointer_of(kernel, name):
    """``out`` are sums, but of a selection."""
    return "*u8" if name == "out" and "candidates" in kernel.arg_names else POINTERS.get(name)


def compile_variant(kernel, limit, constants, architecture):
    """What PTX and cubin say. Tables are aligned as an allocation is, and counts are not specialised, as in a launch."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointer_of(kernel, name) or "i32"
        if signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={**COMPILER_OPTIONS, "maxnreg": limit}
    )
    ptx = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    wide = r"{}\.global\S*\.(?:v4\.[bfus]32|v2\.[bfus]64)"
    return {
        "wide_loads": len(re.findall(wide.format("ld"), ptx)),
        "wide_stores": len(re.findall(wide.format("st"), ptx)),
        "approximate": len(re.findall(r"\.approx", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "releases": len(re.findall(r"atom\.\S*release", ptx)),
        "acquires": len(re.findall(r"(?:atom|ld)\.\S*acquire", ptx)),
        "registers": registers,
        "limit": limit,
        "stack": stack,
    }


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS:
        for architecture in ARCHITECTURES:
            facts = compile_variant(*VARIANTS[name], architecture)
            print(json.dumps({"name": name, "architecture": architecture, **facts}), flush=True)
