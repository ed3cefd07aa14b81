"""Launches that stop before the GPU: kernels are called as a step calls them, and compiled for a GPU that is not there.

Run by ``test_triton.py`` in a process without TRITON_INTERPRET: ``python -m tests.triton_launched`` prints a line for each
half-step and list op: its name, its launches, and how many kernels had to be compiled. Ahead-of-time compilation and the
interpreter do not show what is wrong with the arguments of a launch.
"""

from __future__ import annotations

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from samkern.options import AverageOptions, Base, BaseGroup, Climb, ClimbGroup, Mix, MixOptions, Noise, Report
from samkern.plan import Kept
from samkern.triton_kernels import TritonPlan, arguments, launch, masks, ops, plan, tables

from .lists import FP64, scalar


class NoGpu:
    """A driver that compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


launches, compiled = [], set()


def run(kernel, device, arguments, work, registers, **constants):
    binary = kernel.warmup(*arguments, grid=(1,), maxnreg=registers, **launch.COMPILER_OPTIONS, **constants)
    launches.append(kernel.fn.__name__)
    compiled.add(binary.hash)


def show(name, function, *args, **options):
    launches.clear()
    before = len(compiled)
    function(*args, **options)
    print(name, len(launches), len(compiled) - before)


def half_steps():
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, 4))]
    kept, report = Kept(params), torch.zeros(len(Report), dtype=FP64)
    made = TritonPlan(params, [0, 0], kept.cache_norm, kept.fresh, kept.skips)
    made.bind_state({}, ("momentum_buffer",))
    for t, on_device in enumerate((None, None, torch.ones(()))):
        for half in ("perturb", "restore", "perturb", "update"):
            for p in params:
                p.grad = torch.ones_like(p)
            arguments = {
                "perturb": ([ClimbGroup(Climb.EUCLIDEAN, 0.1 * t + 0.1, rho_on_device=on_device)], False, report),
                "restore": (),
                "update": (
                    *(Base.SGD, [BaseGroup(0.1 * t + 0.1, lr_on_device=on_device)], MixOptions()),
                    *(True, True, 0.0, report),
                ),
            }
            show(half, getattr(made, half), *arguments[half])


def along_the_momentum():
    """Reduces once: later climbs take sums that the update leaves. Then a step that adds a cache."""
    p, report = nn.Parameter(torch.ones(5)), torch.zeros(len(Report), dtype=FP64)
    p.grad, kept = torch.ones(5), Kept([p])
    made = TritonPlan([p], [0], kept.cache_norm, kept.fresh, kept.skips)
    made.bind_state({p: {"v": torch.ones(5)}}, ("v",))
    made.bind_cache(0, torch.ones(5))
    climb, base = [ClimbGroup(Climb.EUCLIDEAN, 0.1)], (Base.SGD, [BaseGroup(0.1, momentum=0.9)])
    for _ in range(3):
        show("climb_along_momentum", made.perturb_along_momentum, climb, report)
        show("tracked_update", made.update, *base, MixOptions(), True, True, 0.0, report)
    added = MixOptions(Mix.ADD, alpha=[1.0], weights=torch.ones(1, dtype=FP64))
    show("weighted_update", made.update, *base, added, False, True, 0.0, report)


def list_ops():
    w, g, saved, c, m, v = ([torch.ones(n) for n in (3, 2)] for _ in range(6))
    steps, parts = [torch.zeros(()) for _ in w], {"clip": scalar(1), "skip": torch.tensor(False), "saved": saved}
    mixed = {"cache": c, "coeff_a": scalar(1), "coeff_b": scalar(1)}
    show("norms", ops.norms, g, w, w, weighting="filter", eta=0.1)
    show("difference_dot", ops.difference_dot, g, w, c, saved)
    show("list_perturb", ops.perturb, w, g, saved, torch.ones(2, dtype=FP64), direction="filter")
    show("list_restore", ops.restore, w, saved)
    show("decompose", ops.decompose, c, g, w, scalar(1))
    show("combine", ops.combine, c, g, w, scalar(1), scalar(1))
    first = torch.tensor([True, False])
    show("update_sgd", ops.update_sgd, w, g, m, lr=0.1, momentum=0.9, first=first, **parts, **mixed)
    adam = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    show("update_adamw", ops.update_adamw, w, g, m, v, steps, lr=0.1, **adam, **parts)


def masks_and_climbs():
    """A selection is a launch per digit and two more."""
    w, g, saved = ([torch.ones(n) for n in (3, 2)] for _ in range(3))
    bits, skip = torch.zeros(8, dtype=torch.uint8), torch.tensor(False)
    show("topk_mask", masks.topk_mask, g, 2, bits, torch.zeros((), dtype=torch.int64))
    for n in (2, 2**40):
        show("drop_grow_mask", masks.drop_grow_mask, bits, g, n, -n, 3, regrow=False, skip=skip)
    show("fisher_accumulate", masks.fisher_accumulate, w, g, 0.9, 0.1, scalar(1), skip)
    show("masked_norms", ops.norms, g, (), w, mask=bits)
    show("masked_perturb", ops.perturb, w, g, saved, scalar(1), mask=bits)
    params = [nn.Parameter(torch.ones(5))]
    params[0].grad, kept = torch.ones(5), Kept(params)
    made = TritonPlan(params, [0], kept.cache_norm, kept.fresh, kept.skips)
    made.bind_mask(0, bits[:4])
    show("masked_half_step", made.perturb, [ClimbGroup(Climb.TRUST, 0.1)], False, torch.zeros(len(Report), dtype=FP64))


def noise_and_averages():
    """Neither a seed, a step, a radius nor what is taken in compiles anything; one that starts from what is saved does."""
    p, report = nn.Parameter(torch.ones(4, 5).t()), torch.zeros(len(Report), dtype=FP64)
    p.grad, kept, taken = torch.ones(4, 5).t(), Kept([p]), torch.zeros(1, dtype=torch.int64)
    made = TritonPlan([p], [0], kept.cache_norm, kept.fresh, kept.skips)
    made.bind_state({}, ("momentum_buffer",))
    made.bind_average(0, torch.ones(4, 5).t())
    for t in range(2):
        show(
            "perturb_by_noise",
            made.perturb_by_noise,
            [ClimbGroup(Climb.NOISE_FILTER, 0.1 * t + 0.1)],
            report,
            Noise(-t, t),
        )
        made.restore()
    made.perturbed = True
    show("another_draw", made.perturb_by_noise, [ClimbGroup(Climb.NOISE_FILTER, 0.1)], report, Noise(2**63 - 1, 0, 1))
    for rule in ((None,), (0.9, True)):
        step = (Base.SGD, [BaseGroup(0.1)], MixOptions(), False, True, 0.0, report)
        made.perturbed = False
        show("averaged_update", made.update, *step, average=AverageOptions(taken, *rule))
    w, saved = ([torch.ones(n) for n in (3, 2)] for _ in range(2))
    for t in range(2):
        norms = torch.ones(5, dtype=FP64)
        show(
            "gaussian_perturb",
            ops.gaussian_perturb,
            w,
            saved,
            0.1,
            seed=t,
            t=t,
            first=2**40 * t,
            scale="given",
            norms=norms,
        )


if __name__ == "__main__":
    driver.set_active(NoGpu())
    plan.check_device = arguments.check_device = lambda device: None
    plan.run = ops.run = masks.run = run
    tables.is_capturing = lambda device: False
    half_steps()
    list_ops()
    masks_and_climbs()
    along_the_momentum()
    noise_and_averages()
