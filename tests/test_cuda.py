"""The CUDA kernels on a machine without a GPU: executed by fibers on the CPU, and compiled for GPUs that are not there.

The kernels of ``csrc/cuda`` are compiled by g++ and run through the very same plan, tables and uploads. Chance decides which
thread runs next, so every run is another interleaving: all must give the same bits. What this cannot show is weak memory
ordering, limits of the hardware, and speed.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

import samkern
from bench import kernels
from samkern import ops, reference
from samkern.backends import native
from samkern.options import Base, BaseGroup, Climb, ClimbGroup, Mix, MixOptions, Report
from samkern.plan import Kept

from . import barrier_stress, emulator
from .lists import BF16, DTYPES, FP16, FP32, FP64, borders_intact, guarded_list, random_list, same_bits, scalar
from .methods import BASES, METHODS, MOMENTUM, SAM, base_named, method_named
from .test_mixes import ADD, BLEND, DIFFERENCE, Run

ROOT = Path(__file__).parent.parent
CHUNK = 1 << 14  # of the GPU's kernels
SHAPES = [(5, 3), (), (0,), (CHUNK + 1,), (1,), (7, 4, 3), (CHUNK // 2, 3), (70,)]

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
needs_nvcc = pytest.mark.skipif(kernels.nvcc() is None, reason="nvcc is not on the PATH")


@pytest.fixture
def emulated():
    """Plans of CPU tensors run on the device's kernels; returns how to set up the device."""
    with emulator.running() as device, samkern.use_backend("cuda"):
        yield device.configure


def parameters(shapes=SHAPES, dtype=FP32, offset=0):
    torch.manual_seed(0)
    if dtype == "mixed":
        values = [torch.randn(shape).to((FP32, BF16, FP16, FP64)[i % 4]) for i, shape in enumerate(shapes)]
    else:
        values = [torch.randn(shape).to(dtype) for shape in shapes]
    views, buffers = guarded_list(values, offset)
    return [nn.Parameter(view) for view in views], buffers


def gradients(params, whole=False):
    """``whole``: small integers, whose squares every order of addition sums up exactly."""
    g = torch.Generator().manual_seed(1)
    while True:
        if whole:
            yield [torch.randint(-2, 3, p.shape, generator=g).to(p.dtype) for p in params]
        else:
            yield [torch.randn(p.shape, generator=g).to(p.dtype) for p in params]


def train(opt, params, steps=4, whole=False, missing=()):
    """Steps on random gradients; parameter i has none in evaluation j for (i, j) in ``missing``."""
    source, n = gradients(params, whole), [0]

    def closure():
        for i, (p, grad) in enumerate(zip(params, next(source), strict=True)):
            p.grad = None if (i, n[0]) in missing else grad
        n[0] += 1

    for _ in range(steps):
        opt.step(closure)
    return [p.detach().clone() for p in params], opt.state_dict()


def on_reference(make, **options):
    with samkern.use_backend("reference"):
        return make(**options)


def close(a, b, dtype):
    tolerance = {FP64: 1e-12, FP32: 2e-6, BF16: 2e-2, FP16: 4e-3, "mixed": 2e-2}[dtype]
    return all(
        torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64, "mixed"], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_agree_with_the_reference(method, dtype, emulated):
    def run():
        params, buffers = parameters(dtype=dtype)
        opt = method.make(params, MOMENTUM)
        result = train(opt, params, missing={(0, 1), (5, 0), (5, 1), (7, 2)})
        assert borders_intact([p.detach() for p in params], buffers)
        return result

    (weights, state), (expected, expected_state) = run(), on_reference(run)
    assert close(weights, expected, dtype)
    norms, expected_norms = state["samkern"]["cache_norm"], expected_state["samkern"]["cache_norm"]
    assert torch.allclose(norms, expected_norms, rtol=1e-2 if dtype in (BF16, FP16, "mixed") else 1e-5)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize("name", ["SAM", "LookSAM", "LookSAM_tensor"])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["plain", "clipped"])
def test_bases_agree_with_the_reference(name, base, clip, emulated):
    def run():
        params, _ = parameters(dtype=FP64, shapes=[(5, 3), (0,), (300,), ()])
        return train(method_named(name).make(params, base, max_grad_norm=clip), params, steps=5)

    (weights, state), (expected, expected_state) = run(), on_reference(run)
    assert close(weights, expected, FP64)
    for i, entries in expected_state["state"].items():
        for key, value in entries.items():
            assert torch.allclose(state["state"][i][key], value, rtol=1e-12), (i, key)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_applying_is_bitwise_the_reference(method, dtype, offset, emulated):
    """Gradients of whole numbers have the same norm in every order of addition, so that all scalars are equal."""

    def run():
        params, _ = parameters(dtype=dtype, offset=offset)
        opt = method.make(params, base_named("SGD"))
        grads = gradients(params, whole=True)
        for p, grad in zip(params, next(grads), strict=True):
            p.grad = grad
        opt.first_step()
        return [p.detach().clone() for p in params]

    if method.name.startswith(("ASAM", "LookLayerSAM")):  # norms of the weights go in: not whole numbers
        assert close(run(), on_reference(run), dtype)
    else:
        assert same_bits(run(), on_reference(run))


def run_once(name="LookSAM", base=MOMENTUM, dtype=FP32):
    params, _ = parameters(dtype=dtype)
    weights, state = train(method_named(name).make(params, base), params, steps=4)
    return [*weights, state["samkern"]["cache_norm"]]


def test_every_interleaving_and_grid_gives_the_same_bits(emulated):
    expected = run_once()
    for seed, n_blocks, one_launch in [(1, 3, True), (2, 1, True), (3, 5, True), (4, 3, False), (5, 64, False)]:
        emulated(seed=seed, n_blocks=n_blocks, one_launch=one_launch)
        assert same_bits(run_once(), expected), (seed, n_blocks, one_launch)


def mix_once(base, dtypes, offset):
    """Every mix, and climbs along the momentum without and with its norm. Caches and the sums of the step before are NaN."""
    with torch.no_grad():
        run = Run("cuda", base, dtypes, CHUNK + 1, offset=offset)
        weights = torch.linspace(0, 1.4, len(run.params), dtype=FP64)
        for cache in run.caches:
            cache.fill_(math.nan)
        run.step(MixOptions(Mix.DECOMPOSE), looks=True, bad=True)
        run.step(DIFFERENCE, looks=True, missing=({1, 6}, {4}), check=False)
        run.step(ADD._replace(weights=weights), looks=False, scale=4.0, clip=0.5)
        run.step(BLEND, looks=True, missing=({1}, {4}), scale=4.0, clip=0.5)
        climbed = [x for _ in range(2) if base != "none" for x in run.step_along_momentum()]
    assert run.borders_intact()
    reports = [report.nan_to_num(-1) for report in run.reports]
    results = [*climbed, *(p.detach() for p in run.params), *run.tensors(), run.kept.cache_norm, *reports]
    assert all(x.isfinite().all() for x in results)
    assert run.kept.cache_norm[-1] > 0
    return results


@pytest.mark.parametrize(
    ("base", "dtypes", "offset"),
    [("SGD", [BF16], 0), ("SGD", [FP32], 1), ("AdamW", DTYPES, 0), ("none", [FP32], 0)],
    ids=["SGD-bfloat16", "SGD-misaligned", "AdamW-mixed", "none"],
)
def test_mixes_have_the_same_bits_on_every_grid(base, dtypes, offset, emulated):
    expected = mix_once(base, dtypes, offset)
    for seed, n_blocks, one_launch in [(1, 1, True), (2, 5, True), (3, 3, False)]:
        emulated(seed=seed, n_blocks=n_blocks, one_launch=one_launch)
        assert same_bits(mix_once(base, dtypes, offset), expected), (seed, n_blocks, one_launch)


def test_a_climb_along_a_momentum_whose_norm_is_known_waits_for_nobody(emulated):
    """Every phase is a launch here, and that climb has one."""
    emulated(one_launch=False)
    run, take = Run("cuda", "SGD", [FP32], 70), emulator.load().take_launches
    for of_climb in (3, 1):
        take()
        with torch.no_grad():
            run.step_along_momentum()
        assert take() == of_climb + 3


@pytest.mark.parametrize("without", ["grid_sync", "block_sync", "shuffle"])
def test_a_missing_synchronisation_is_caught(without, emulated):
    """The proof that the other tests can fail."""
    expected = run_once()
    caught = 0
    for seed in range(3):
        emulated(seed=seed, without=without)
        try:
            caught += not same_bits(run_once(), expected)
        except RuntimeError as error:
            caught += "wait for ever" in str(error)
    assert caught == 3


def test_nan_skips_the_step_and_is_counted(emulated):
    for nth in (0, 1):
        params, _ = parameters(shapes=[(40,), (3, 3)])
        before = [p.detach().clone() for p in params]
        opt = method_named("LookSAM").make(params, base_named("AdamW"))
        calls = []

        def closure(params=params, calls=calls, nth=nth):
            for p in params:
                p.grad = torch.ones_like(p)
            if len(calls) == nth:
                params[0].grad[7] = torch.nan
            calls.append(1)

        opt.step(closure)
        assert same_bits([p.detach() for p in params], before)
        assert opt.skips == 1
        assert opt.last_step.reason == ("a gradient at w was not finite", "a gradient at w + eps was not finite")[nth]
        assert all(float(opt.state[p]["step"]) == 0 for p in params)
        calls.append(1)
        opt.step(closure)
        assert opt.skips == 1


def test_an_exception_restores_bitwise(emulated):
    params, _ = parameters()
    before = [p.detach().clone() for p in params]
    opt = SAM.make(params, MOMENTUM)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    assert not same_bits([p.detach() for p in params], before)
    opt.restore()
    assert same_bits([p.detach() for p in params], before)


def test_more_groups_than_a_launch_carries(emulated):
    params = [nn.Parameter(torch.ones(3, dtype=FP64)) for _ in range(100)]
    opt = samkern.SAM(
        [{"params": [p], "rho": 0.01 * i, "lr": 0.001 * i} for i, p in enumerate(params)], torch.optim.SGD
    )
    opt.step(lambda: [setattr(p, "grad", torch.ones(3, dtype=FP64)) for p in params])
    for i, p in enumerate(params):
        assert torch.allclose(p.detach(), torch.full((3,), 1 - 0.001 * i, dtype=FP64))


def test_scalars_on_the_device_win(emulated):
    """What a captured graph reads: rho and lr from memory, not from the launch."""

    def run(rho, lr):
        kept = Kept([nn.Parameter(torch.linspace(-1, 1, 50)), nn.Parameter(torch.ones(3, 3))])
        plan = native.Plan(kept.params, [0, 0], kept.cache_norm, kept.fresh, kept.skips, on_device=True)
        report = torch.empty(8, dtype=FP64)
        for p in kept.params:
            p.grad = torch.full_like(p, 0.5)
        plan.perturb([ClimbGroup(Climb.EUCLIDEAN, *rho)], True, report)
        seen = [p.detach().clone() for p in kept.params]
        for p in kept.params:
            p.grad = torch.full_like(p, 2.0)
        plan.update(Base.SGD, [BaseGroup(*lr)], MixOptions(), True, True, 0.0, report)
        return seen + [p.detach().clone() for p in kept.params]

    tensor = torch.tensor(0.25)
    on_device = run((math.nan, 0.0, 0.0, tensor), (math.nan, *[0.0] * 7, tensor))
    assert same_bits(on_device, run((0.25,), (0.25,)))
    with pytest.raises(ValueError, match="rho must be a float32 tensor of one entry on cpu, got Double"):
        run((math.nan, 0.0, 0.0, tensor.double()), (0.25,))


@pytest.mark.parametrize("name", ["SAM", "ASAM_filter", "LookSAM_tensor", "LookLayerSAM_trust"])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_a_half_step_is_one_launch(name, base, emulated):
    params, _ = parameters(dtype="mixed")
    opt, take = method_named(name).make(params, base_named(base)), emulator.load().take_launches
    for looks in (True, name != "LookSAM_tensor" and not name.startswith("LookLayer")):
        for half in (opt.first_step, opt.second_step):
            for p in params:
                p.grad = torch.ones_like(p)
            take()
            half()
            assert take() == (0 if half == opt.first_step and not looks else 1)


def test_a_pass_is_one_launch(emulated):
    w, g, out = (random_list([(40, 3), (), (0,), (CHUNK + 1,)]) for _ in range(3))
    one, take = scalar(1), emulator.load().take_launches
    passes = {
        "norms": lambda: ops.norms(w, g, out, weighting="filter", eta=0.1),
        "difference_dot": lambda: ops.difference_dot(w, g, out, w),
        "restore": lambda: ops.restore(w, g),
        "decompose": lambda: ops.decompose(out, g, w, one),
        "combine": lambda: ops.combine(out, g, w, one, one),
        "update_sgd": lambda: ops.update_sgd(w, g, out, lr=0.1, momentum=0.9),
        "update_adam": lambda: ops.update_adam(w, g, out, [x.abs() for x in g], [torch.zeros(()) for _ in w], lr=0.1),
    }
    for name, run in passes.items():
        take()
        run()
        assert take() == 1, name
    sums = ops.norms(g, (), w)
    take()
    ops.perturb(w, g, out, sums=sums)
    assert take() == 1


def test_many_groups_are_not_recorded(emulated):
    params = [nn.Parameter(torch.ones(3)) for _ in range(65)]
    opt = samkern.SAM([{"params": [p]} for p in params], torch.optim.SGD, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    opt.restore()
    emulated(capturing=True)
    with pytest.raises(RuntimeError, match="a graph cannot be recorded with more than 64 param groups, got 65"):
        opt.first_step()
    assert all(p.eq(1).all() for p in params)


def test_new_tables_are_not_recorded(emulated):
    """Their upload would be replayed, from memory that is no longer theirs."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = samkern.SAM([p], torch.optim.SGD, lr=0.1)
    emulated(capturing=True)
    for action in (opt.first_step, lambda: ops.norms([p.grad]), lambda: ops.restore([p.detach()], [torch.zeros(3)])):
        with pytest.raises(RuntimeError, match="a graph is being recorded, and tables of a new list of tensors"):
            action()
    assert p.eq(1).all()
    emulated()
    opt.first_step()
    assert p.ne(1).all()


def halves_on(opt, params, first, second):
    """A step on gradients that stay where they are, as a recorded one needs them."""
    for grads, half in ((first, opt.first_step), (second, opt.second_step)):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        half()


@pytest.mark.parametrize("moved", ["first", "second"])
def test_recording_is_refused_after_a_gradient_has_moved(moved, emulated):
    params, _ = parameters(shapes=[(40,), (3, 3)])
    opt = SAM.make(params, base_named("momentum"))
    grads = {"first": [torch.randn_like(p) for p in params], "second": [torch.randn_like(p) for p in params]}
    for _ in range(2):
        halves_on(opt, params, **grads)
    emulated(capturing=True)
    halves_on(opt, params, **grads)
    before = [p.detach().clone() for p in params]
    elsewhere = {**grads, moved: [grad.clone() for grad in grads[moved]]}
    with pytest.raises(RuntimeError, match="has moved since the last step, and a graph is being recorded"):
        halves_on(opt, params, **elsewhere)
    emulated()
    assert same_bits([p.detach() for p in params], before)
    halves_on(opt, params, **elsewhere)
    assert not same_bits([p.detach() for p in params], before)


@pytest.mark.parametrize("name", ["SAM", "LookSAM_tensor"])
def test_a_closure_can_be_recorded(name, emulated):
    """As SharpnessAware describes it: some steps before, and zero_grad(set_to_none=False)."""
    net, x, y = nn.Linear(20, 1), torch.randn(64, 20), torch.randn(64, 1)
    opt = method_named(name).make(net.parameters(), MOMENTUM, capturable=True)
    alive = []  # backward never finds the place free that it took before, as in a graph's own pool

    def closure():
        opt.zero_grad(set_to_none=False)
        (net(x) - y).square().mean().backward()
        alive.append([p.grad for p in net.parameters()])

    for _ in range(4):
        opt.step(closure)
    emulated(capturing=True)
    opt.step(closure)
    opt.step(closure)


def test_afterwards_lists_run_on_the_cpu_again():
    take, w = emulator.load().take_launches, random_list([(5,)])
    take()
    with emulator.running():
        ops.norms(w, backend="cuda")
        assert take() == 1
    ops.norms(w, backend="cpu")
    assert take() == 0
    assert not samkern.backends()["cuda"].available or torch.cuda.is_available()


def test_a_large_tensor_is_folded_by_a_whole_block(emulated):
    """More than 32 chunks, in front of a small one."""

    def run():
        params, _ = parameters(shapes=[(33 * CHUNK + 3,), (5,)])
        return train(method_named("LookSAM").make(params, base_named("SGD")), params, steps=2)[0]

    assert close(run(), on_reference(run), FP32)


def test_difference_dot(emulated):
    """The same bits in every interleaving, on any number of blocks, in one launch or two; 33 chunks take a whole block."""
    lists = [random_list([(33 * CHUNK + 3,), (5,), (0,), ()]) for _ in range(4)]
    results = []
    for options in ({"seed": 1}, {"seed": 2, "n_blocks": 1}, {"seed": 3, "n_blocks": 2, "one_launch": False}):
        emulated(**options)
        results.append(ops.difference_dot(*lists))
    assert same_bits(results[:1] * 2, results[1:])
    torch.testing.assert_close(results[0], reference.difference_dot(*lists), rtol=1e-5, atol=1e-4)
    emulated(without="grid_sync")
    assert not same_bits(results[:1], [ops.difference_dot(*lists)])


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_a_large_tensor_are_folded_by_a_whole_block(seed, emulated):
    """Those that an update leaves: of the difference, and of the momentum, whose norm the second climb divides by."""
    emulated(seed=seed)

    def run(backend):
        run = Run(backend, "SGD", [FP32], 33 * CHUNK + 3)
        run.step(DIFFERENCE, looks=True)
        run.step_along_momentum()
        run.step_along_momentum()
        return run

    with torch.no_grad():
        result, expected = run("cuda"), run("reference")
    assert torch.allclose(result.kept.cache_norm, expected.kept.cache_norm, rtol=1e-6)
    norm, expected_norm = (float(each.reports[-1][Report.PERTURB_NORM]) for each in (result, expected))
    assert norm == pytest.approx(expected_norm, rel=1e-6)


def test_a_deadlock_is_reported():
    """A grid that was launched in phases must not wait for itself, and the device says so."""
    with pytest.raises(RuntimeError, match="threads wait for ever, the first in block 0, thread 0, at block_sync"):
        emulator.load().run_into_a_deadlock()


@pytest.fixture
def device():
    module = emulator.load()
    yield module
    module.configure()


@pytest.fixture
def stress(device):
    return barrier_stress.BarrierStress(device.__file__)


@pytest.mark.parametrize(
    ("seed", "n_blocks", "n_rounds"), [(0, 3, 8), (1, 3, 8), (2, 1, 3), (3, 5, 6), (4, 300, 2)], ids=str
)
def test_the_barrier_orders_a_product_that_does_not_commute(seed, n_blocks, n_rounds, stress, device):
    """Every block arrives at the same product, and it is the one in the order of the blocks."""
    device.configure(seed=seed)
    assert stress(n_blocks, n_rounds) == [barrier_stress.expected(n_blocks, n_rounds)] * n_blocks


@pytest.mark.parametrize("without", ["grid_sync", "block_sync"])
@pytest.mark.parametrize("seed", range(3))
def test_the_product_shows_a_barrier_that_does_nothing(without, seed, stress, device):
    device.configure(seed=seed, without=without)
    assert stress(3, 8) != [barrier_stress.expected(3, 8)] * 3


def test_the_expected_product():
    """Against the formulas, one matrix after another."""
    product = [1, 0, 0, 1]
    for r in range(4):
        so_far, result = product, [1, 0, 0, 1]
        for b in range(5):
            x = (so_far[1] + r) * 2654435761 + b * 2246822519
            y = (so_far[2] + b) * 3266489917 + r * 668265263
            (p, q, s, t), (i, j, k, m) = result, (1 + x * y, x, y, 1)
            result = [z % 2**32 for z in (p * i + q * k, p * j + q * m, s * i + t * k, s * j + t * m)]
        product = result
    assert barrier_stress.expected(5, 4) == product


# ---- compiled for GPUs: for all of them by `make kernels`, which takes three times as long

ARCHITECTURES = kernels.ARCHITECTURES if os.environ.get("SAMKERN_ALL_KERNELS") == "1" else ("90",)


@pytest.mark.takes(25)
@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", kernels.SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source, architecture):
    """128 registers: two blocks of 256 threads on a processor."""
    found = kernels.measure(source, architecture)
    assert len(found) == {"fisher": 4, "noise": 4, "perturb": 4, "reduce": 8, "select": 10, "update": 17}[source.stem]
    for kernel in found:
        assert kernel.spills == 0, kernel
        assert kernel.registers <= 128, kernel


@needs_nvcc
@pytest.mark.parametrize("source", kernels.SOURCES, ids=lambda path: path.stem)
def test_kernels_use_wide_accesses_and_no_contraction(source, tmp_path):
    kernels.compile_to("ptx", source, "90", tmp_path / "kernels.ptx")
    entries = (tmp_path / "kernels.ptx").read_text().split(".entry ")[1:]
    for text in entries:
        name = kernels.readable(text.split("(")[0])
        assert re.search(r"ld\.global\.v4\.[uf]32", text), name
        writes_elements = source.stem not in ("reduce", "select")
        assert bool(re.search(r"st\.global(\.cs)?\.v4\.[uf]32", text)) == writes_elements, name
        assert not re.search(r"(ld|st)\.v4", text), name  # generic addresses
        assert "fma.rn.f32" not in text, name
        assert not re.search(r"\.approx[.a-z]*\.f32", text), name


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_barrier_stress_compiles(architecture, tmp_path):
    said = kernels.compile_to("cubin", barrier_stress.SOURCE, architecture, tmp_path / "stress.cubin")
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert "barrier_stress_kernel" in said


@needs_nvcc
def test_the_barrier_stress_builds_and_loads(tmp_path):
    """As a GPU machine does it; without a GPU there is no room for a single block."""
    stress = barrier_stress.BarrierStress(barrier_stress.build(tmp_path, "90"))
    assert (stress.n_blocks() > 0) == torch.cuda.is_available()


@needs_nvcc
def test_the_binding_compiles():
    """Against torch's headers; a torch for the CPU lacks one of them, which the macro replaces."""
    from torch.utils.cpp_extension import include_paths

    said = subprocess.run(
        [kernels.nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    toolkit = Path(re.search(r"TOP=(\S+)", said.stderr)[1])
    found = [path for path in (toolkit / "include", *toolkit.glob("targets/*/include")) if (path / "cuda.h").exists()]
    assert found, f"no headers below {toolkit}"
    flags = ["-std=c++20", "-fsyntax-only", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DTORCH_EXTENSION_NAME=_cuda"]
    paths = [*include_paths(), sysconfig.get_path("include"), *map(str, found)]
    command = [os.environ.get("CXX", "g++"), *flags, *(f"-I{path}" for path in paths), str(ROOT / "csrc/cuda_ops.cpp")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]
