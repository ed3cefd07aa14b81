"""The triton backend on a machine without a GPU: interpreted on CPU tensors, and compiled for GPUs that are not there.

Both run in processes of their own: Triton decides when it is imported whether it interprets. What needs a GPU is at the end.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from samkern.backends import backends

from . import barrier_stress, once
from .conftest import in_worker
from .lists import CHUNK, FP32, FP64, same_bits
from .methods import BASES, METHODS, method_named

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not backends()["triton"].available, reason="Triton found no GPU"
)


def python(*arguments, **environment):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**env, **environment}, check=False)


INTERPRETED = {
    "test_interpreted": ("-x", *(f"tests/triton_{name}interpreted.py" for name in ("", "lists_", "masks_", "noise_"))),
    "test_as_a_backend_of_all_tests": (
        *("--durations=20", "-k", "triton"),
        *(f"--ignore-glob=*_{name}.py" for name in ("triton", "gpu", "docs")),
        "tests",
    ),
}


@pytest.fixture(scope="module")
def interpreted(request):
    """Runs tests in Triton's interpreter, which takes one core.

    All that were asked for run side by side, unless other processes have taken the other cores.
    """
    wanted = [item.name for item in request.session.items if item.name in INTERPRETED]
    with ThreadPoolExecutor() as pool:

        @functools.cache
        def start(name):
            return pool.submit(python, "pytest", "-q", "--no-cov", *INTERPRETED[name], TRITON_INTERPRET="1")

        def run(name):
            for each in [name] if in_worker(request.config) else wanted:
                start(each)
            return start(name).result()

        yield run


@pytest.mark.takes(140)
def test_interpreted(interpreted):
    """Whole optimizers, half-steps and list ops against the reference, bit by bit."""
    result = interpreted("test_interpreted")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1]


@pytest.mark.takes(400)
def test_as_a_backend_of_all_tests(interpreted, record_property):
    """Whatever other files test of every backend."""
    result = interpreted("test_as_a_backend_of_all_tests")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    n_passed = int(re.search(r"(\d+) passed", result.stdout.splitlines()[-1])[1])
    assert n_passed > 100
    record_property("triton", n_passed)


# What most training runs; SAMKERN_ALL_KERNELS=1 compiles every variant (9 minutes on 2 cores).
USUAL = [
    "perturb-EUCLIDEAN-float32",
    "perturb-EUCLIDEAN-bfloat16",
    "perturb-ELEMENT-float32",
    "perturb-FILTER-float32",
    "perturb-TRUST-float16",
    "update-SGD-GRADIENT-float32",
    "update-SGD-GRADIENT-bfloat16",
    "update-ADAMW-GRADIENT-float32",
    "update-ADAMW-DECOMPOSE-float32",
    "update-SGD-REUSE-float32",
    "update-ADAMW-DECOMPOSE-bfloat16",
    "update-ADAM-DECOMPOSE-float64",
    "restore-float32",
    "perturb-EUCLIDEAN-float32-scaled",
    "update-SGD-GRADIENT-float32-scaled",
    "update-ADAMW-DECOMPOSE-float32-scaled",
    "list_norms-float32",
    "list_difference-float32",
    "list_perturb-gradient-float32",
    "list_perturb-filter-float32",
    "list_decompose-float32",
    "list_combine-float32",
    "list_update-SGD-float32",
    "list_update-ADAMW-bfloat16",
    "perturb-EUCLIDEAN-float32-masked",
    "perturb-ELEMENT-float32-masked-renormalised",
    "perturb-EUCLIDEAN-bfloat16-masked",
    "list_norms-float32-masked",
    "list_perturb-gradient-float32-masked",
    "histogram-TOP-float32-first",
    "histogram-DROP-bfloat16",
    "histogram-GROW",
    "mark-TOP-float32",
    "settle-DROP-float32",
    "settle-GROW",
    "fisher-float32",
    "update-SGD-BLEND-float32-clipped",
    "update-SGD-GRADIENT-float32-tracked",
    "perturb-EUCLIDEAN-float32-momentum-known",
    "noise-filter-float32-strided",
    "noise-tensor-bfloat16",
    "list_noise-float32-given",
    "update-SGD-GRADIENT-float32-averaged",
]


# Four programs of them fit on a multiprocessor.
LEAN = (
    "perturb-EUCLIDEAN-float32",
    "perturb-ELEMENT-float32",
    "update-SGD-GRADIENT-float32",
    "restore-float32",
    "list_perturb-gradient-float32",
    "list_combine-float32",
)


@pytest.fixture(scope="module")
def compiled():
    def compile_to(path):
        names = [] if os.environ.get("SAMKERN_ALL_KERNELS") == "1" else USUAL
        result = python("tests.triton_variants", *names)
        assert result.returncode == 0, result.stderr[-5000:]
        path.write_text(result.stdout)

    facts = [json.loads(line) for line in once.made("triton_variants.jsonl", compile_to).read_text().splitlines()]
    assert {fact["architecture"] for fact in facts} == {80, 90}
    assert {fact["name"] for fact in facts} >= set(USUAL)
    return facts


@pytest.mark.takes(60)
def test_nothing_spills(compiled):
    """By the cubin's own account. As many registers as the launch counts on, or its programs are not all resident.

    8 bytes are one number that Triton 3.6 parks for sm_90 while a launch reduces or a chunk begins, outside of its loops.
    Beside a histogram, for which it takes a register for every 32 bins, and in masked climbs by filter it parks 16; in noise
    by filter on half types that are not row-major 32.
    """
    parked = {"histogram": 16, "perturb-FILTER": 16, "noise-filter-bfloat16-strided": 32}

    def allowed(name):
        return next((n for start, n in parked.items() if name.startswith(start)), 8)

    assert [fact for fact in compiled if fact["stack"] > allowed(fact["name"])] == []
    assert [fact for fact in compiled if fact["registers"] > fact["limit"]] == []
    lean = [fact for fact in compiled if fact["name"] in LEAN]
    assert len(lean) == 2 * len(LEAN)
    assert all(fact["limit"] == 64 for fact in lean)


def test_arithmetic_is_ieee(compiled):
    """No approximate division or root, and no product fused with a sum."""
    assert [fact for fact in compiled if fact["approximate"] or fact["fused"]] == []


# Read and written in the widest form by every variant of a kernel.
OPERANDS = {
    "perturb": (2, 2),
    "update": (2, 1),
    "restore": (1, 1),
    "noise": (3, 1),
    "list_noise": (1, 1),
    "list_norms": (3, 0),
    "list_difference": (4, 0),
    "list_perturb": (2, 2),
    "list_decompose": (2, 1),
    "list_combine": (2, 1),
    "list_update": (1, 1),
    "fisher": (2, 1),
    # The histogram of the digit before takes 4. Scores of half types are read by 8 bytes where they are counted.
    "histogram": (4, 0),
    "mark": (4, 0),
    "settle": (4, 0),
}
ONE_PHASE = (
    *("restore", "list_combine", "list_perturb", "list_update-SGD"),
    *("histogram", "mark", "settle", "fisher"),
)


def test_accesses_are_wide(compiled):
    """16 bytes at a time: at least once per operand that the apply phase reads and writes."""
    for fact in compiled:
        operands = OPERANDS[fact["name"].split("-")[0]]
        if fact["name"].startswith("update-ADAMW") and fact["name"].endswith("float32"):
            operands = (5, 3)
        if fact["name"].startswith(("histogram", "mark", "settle")) and "float32" in fact["name"]:
            operands = (1 if fact["name"].endswith("first") else 5, 0)
        if "noise" in fact["name"] and "bfloat16" in fact["name"]:
            operands = (0, 0)  # by 8 bytes: for more there are too few entries under way
        assert (fact["wide_loads"], fact["wide_stores"]) >= operands, fact
        assert fact["wide_stores"] >= operands[1], fact


def test_barriers_release_and_acquire(compiled):
    for fact in compiled:
        barriers = 0 if fact["name"].startswith(ONE_PHASE) else 2
        barriers += fact["name"].startswith("list_perturb-filter")
        barriers -= fact["name"].endswith("float32-momentum-known")
        assert fact["releases"] >= barriers, fact
        assert fact["acquires"] >= barriers, fact


@pytest.mark.takes(20)
def test_the_barrier_stress_compiles_and_computes_what_it_should():
    """For GPUs, where ``test_gpu.py`` runs it with all programs; in the interpreter there can only be one."""
    result = python("tests.triton_barrier")
    assert result.returncode == 0, result.stderr[-5000:]
    facts = [json.loads(line) for line in result.stdout.splitlines()]
    assert {fact["architecture"] for fact in facts} == {80, 90}
    for fact in facts:
        assert fact["releases"] >= 1, fact
        assert fact["acquires"] >= 1, fact
        assert fact["stack"] == 0, fact
        assert fact["registers"] <= fact["limit"], fact
    result = python("tests.triton_barrier", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-5000:]
    assert json.loads(result.stdout) == [barrier_stress.expected(1, 6)]


@pytest.mark.takes(10)
def test_launches():
    """One for each half-step and list op, and what changes from step to step compiles nothing."""
    result = python("tests.triton_launched")
    assert result.returncode == 0, result.stderr[-5000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    steps = ["perturb", "restore", "perturb", "update"]
    lists = ["norms", "difference_dot", "list_perturb", "list_restore", "decompose", "combine"]
    updates = ["update_sgd", "update_adamw"]
    masks = ["topk_mask", "drop_grow_mask", "drop_grow_mask"]
    masked = ["fisher_accumulate", "masked_norms", "masked_perturb", "masked_half_step"]
    momentum = [*(3 * ["climb_along_momentum", "tracked_update"]), "weighted_update"]
    noise = [*(2 * ["perturb_by_noise"]), "another_draw", *(2 * ["averaged_update"]), *(2 * ["gaussian_perturb"])]
    assert [name for name, _, _ in lines] == 3 * steps + lists + updates + masks + masked + momentum + noise
    selections = {"topk_mask": "5", "drop_grow_mask": "10"}
    assert all(n_launches == selections.get(name, "1") for name, n_launches, _ in lines)
    assert [int(n) for name, _, n in lines if name == "drop_grow_mask"][1] == 0
    n_compiled = [int(n) for _, _, n in lines]
    assert n_compiled[:12] == [1, 1, 0, 1] + [0] * 8
    assert n_compiled[-14:-7] == [1, 1, 1, 0, 0, 0, 1]
    assert n_compiled[-7:] == [1, 0, 1, 1, 0, 1, 0]


def test_importing_samkern_does_not_import_triton():
    code = "import sys, samkern; samkern.info(); assert 'triton' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_without_a_gpu_it_says_so():
    if backends()["triton"].available:
        pytest.skip("there is a GPU")
    assert "TRITON_INTERPRET=1" in backends()["triton"].why


def train_on_gpu(method, base, backend, dtype=FP32, n_steps=7):
    torch.manual_seed(0)
    shapes = [(0,), (), (5,), (64, 3, 3, 3), (CHUNK + 5,), (1000, 513), *[(64,)] * 40]
    params = [nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in shapes]
    opt = method.make(params, base, backend=backend)
    for t in range(n_steps):
        generator = torch.Generator("cuda").manual_seed(t)

        def closure(generator=generator):
            for p in params:
                p.grad = torch.randn(p.shape, device="cuda", generator=generator).to(dtype)
            return torch.tensor(0.0)

        opt.step(closure)
    return [p.detach() for p in params]


@on_a_gpu
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16, FP64], ids=str)
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_on_a_gpu(method, base, dtype):
    """Against the reference, which differs in the order of additions only."""
    w, expected = (train_on_gpu(method, base, backend, dtype) for backend in ("triton", "reference"))
    rtol = 1e-11 if dtype == FP64 else 1e-6 if dtype == FP32 else 2e-2
    for a, b in zip(w, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@on_a_gpu
@pytest.mark.parametrize("name", ["SAM", "ASAM_filter", "LookSAM_tensor"])
def test_one_launch_or_several(name, monkeypatch):
    """The same bits, again and again."""
    results = [train_on_gpu(method_named(name), BASES[4], "triton") for _ in range(3)]
    monkeypatch.setenv("SAMKERN_ONE_LAUNCH", "0")
    results.append(train_on_gpu(method_named(name), BASES[4], "triton"))
    assert all(same_bits(results[0], other) for other in results[1:])


@on_a_gpu
def test_no_synchronization():
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_on_gpu(method_named("SAM"), BASES[1], "triton", n_steps=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
