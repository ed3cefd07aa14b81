"""Sharded parameters: runs on 2 and 4 ranks equal those of one process on whole tensors."""

from __future__ import annotations

import math

import pytest
import torch

import samkern
from samkern.optim import SharpnessAware

from . import sharded
from .lists import BF16, FP32, FP64
from .sharded import Case

torch_distributed = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no fully_shard")


def two_radii(params):
    """Groups with a radius and a rate of their own, and one that is never perturbed."""
    return [{"params": params[:3], "rho": 0.2}, {"params": params[3:4], "rho": 0}, {"params": params[4:], "lr": 0.02}]


ADAM = {"base": torch.optim.Adam, "base_options": {"lr": 1e-2, "weight_decay": 1e-2}}
ADAMW = {"base": torch.optim.AdamW, "base_options": {"lr": 1e-2, "weight_decay": 0.1}}
FOREIGN = {"base": torch.optim.RMSprop, "base_options": {"lr": 1e-3}}
MASKED = {"rho": 0.1, "sparsity": 0.4, "refresh_interval": 2}
CASES = {
    "SAM": Case(samkern.SAM, {"rho": 0.1}),
    "SAM_inf": Case(samkern.SAM, {"rho": 0.01, "p": math.inf}, **ADAM),
    "SAM_clipped": Case(samkern.SAM, {"rho": 0.1, "max_grad_norm": 0.5}, groups=two_radii, **ADAMW),
    "SAM_foreign": Case(samkern.SAM, {"rho": 0.1, "max_grad_norm": 0.5}, poisoned=(2, 1), **FOREIGN),
    "SAM_None": Case(samkern.SAM, {"rho": 0.1}, missing=(3, 0), poisoned=(4, 0)),
    "SAM_ignoring": Case(samkern.SAM, {"rho": 0.1, "nonfinite": "ignore"}),
    "SAM_scaled": Case(samkern.SAM, {"rho": 0.1, "max_grad_norm": 2.0}, poisoned=(4, 1), scale=2.0**9),
    "SAM_mixed": Case(samkern.SAM, {"rho": 0.1}, dtypes=(FP32, BF16, FP64), **ADAMW),
    "SAMk": Case(samkern.SAMk, {"rho": 0.1, "k": 3}),
    "ASAM_element": Case(samkern.ASAM, {"rho": 0.5, "mode": "element"}),
    "ASAM_filter": Case(samkern.ASAM, {"rho": 0.5, "mode": "filter"}, **ADAM),
    "ASAM_layer": Case(samkern.ASAM, {"rho": 0.5, "mode": "layer", "eta": 0.1}, groups=two_radii),
    "LookSAM": Case(samkern.LookSAM, {"rho": 0.1, "k": 3}, poisoned=(4, 0)),
    "LookSAM_tensor": Case(samkern.LookSAM, {"rho": 0.1, "k": 2, "scope": "tensor", "max_grad_norm": 1.0}, **ADAMW),
    "LookSAM_min_sine": Case(samkern.LookSAM, {"rho": 0.1, "k": 2, "min_sine": 0.02}, missing=(2, 1)),
    "LookSAM_min_sine_tensor": Case(samkern.LookSAM, {"rho": 0.1, "k": 2, "min_sine": 0.04, "scope": "tensor"}),
    "LookSAM_scaled": Case(samkern.LookSAM, {"rho": 0.1, "k": 2}, poisoned=(2, 1), scale=2.0**9, **FOREIGN),
    **{
        f"LookLayerSAM_{mode}": Case(
            samkern.LookLayerSAM, {"rho": 0.01, "k": 3, "layer_mode": mode, "trust_clip": 5.0}, missing=(4, 0)
        )
        for mode in ("lars", "sign", "trust")
    },
    "AESAM": Case(samkern.AESAM, {"rho": 0.1, "total_steps": 7}),
    "AELookSAM": Case(samkern.AELookSAM, {"rho": 0.1, "total_steps": 7, "k": 3}),
    "RST": Case(samkern.RST, {"rho": 0.1, "p": 0.5}),
    "GRST": Case(samkern.GRST, {"rho": 0.1, "p": 0.5, "gamma": 2.0}),
    "ARSAM": Case(samkern.ARSAM, {"rho": 0.1, "window": 3, "warmup_steps": 0, "max_rate": 0.7}, poisoned=(3, 0)),
    "MSAM": Case(samkern.MSAM, {"rho": 0.3}, groups=two_radii),
    "LETSSAM": Case(samkern.LETSSAM, {"rho": 0.1, "period": 2}, options_of_step={"val_closure": True}),
    "LETSASAM": Case(
        samkern.LETSASAM, {"rho": 0.1, "period": 2, "hyper": "diag"}, options_of_step={"val_closure": True}, **FOREIGN
    ),
    "SSAMF_batch": Case(samkern.SSAMF, {"fisher": "batch", "fisher_every": 2, **MASKED}, poisoned=(4, 1)),
    "SSAMF_sample": Case(samkern.SSAMF, {"fisher": "sample", "samples": 4, "renormalise": True, **MASKED}),
}
NOT_ALONG_COLUMNS = {"ASAM_filter"}
# Their masks are of other entries where those of a tensor come in another order; there are no ties here.
FAST = "cpu" if samkern.backends()["cpu"].available else "reference"


def assert_equal(ours, whole, dtypes, what):
    """``ours``: of every rank."""
    for rank, left in enumerate(ours):
        where = f"{what}, rank {rank}"
        assert [r[0] for r in left.reports] == [r[0] for r in whole.reports], where
        assert left.skips == whole.skips, where
        for row, expected in zip(left.reports, whole.reports, strict=True):
            assert row[1:] == pytest.approx(expected[1:], rel=1e-12 if dtypes == (FP64,) else 1e-5, nan_ok=True), where
        assert torch.allclose(left.cache_norm, whole.cache_norm, rtol=1e-12, atol=1e-14), where
        for x, y in zip(left.weights, whole.weights, strict=True):
            tolerance = {FP64: 1e-12, FP32: 1e-6, BF16: 1e-2}[x.dtype]
            assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), where
        for x, y in zip(left.masks, whole.masks, strict=True):
            assert (x is None and y is None) or torch.equal(x, y), where


@pytest.mark.parametrize(
    ("layout", "n", "backend"),
    [
        ("rows", 2, "reference"),
        ("rows", 4, FAST),
        ("partly", 2, FAST),
        ("replicated_rows", 4, FAST),
        ("grid", 4, "reference"),
    ],
)
def test_every_method_on_parts_of_a_list(ranks, layout, n, backend):
    """Weights, norms, decisions, caches and masks: in float64, what remains is the order of additions."""
    cases = {name: case for name, case in CASES.items() if layout != "grid" or name not in NOT_ALONG_COLUMNS}
    ours = ranks.run(n, sharded.among_ranks, cases, layout, backend, timeout=240)
    skipped = 0
    for name, case in cases.items():
        whole = sharded.alone(case)
        assert_equal([results[name] for results in ours], whole, case.dtypes, name)
        assert (whole.skips > 0) == (case.poisoned is not None), name
        skipped += whole.skips
        assert ours[0][name].plan == {"reference": "ReferencePlan", "cpu": "Plan"}[backend]
    assert skipped > 5


# ---- trainings


LONG = {
    "SAM": Case(samkern.SAM, {"rho": 0.1}, dtypes=(FP32,)),
    "LookSAM": Case(samkern.LookSAM, {"rho": 0.1, "k": 3}, dtypes=(FP32,)),
    "LookSAM_tensor": Case(samkern.LookSAM, {"rho": 0.1, "k": 3, "scope": "tensor", "min_sine": 0.01}, dtypes=(FP32,)),
    "ARSAM": Case(samkern.ARSAM, {"rho": 0.1, "window": 5, "warmup_steps": 5}, dtypes=(FP32,)),
    "SSAMF_batch": Case(
        samkern.SSAMF, {"rho": 0.1, "fisher": "batch", "refresh_interval": 9, "fisher_every": 2}, dtypes=(FP32,)
    ),
    "SSAMF_sample": Case(samkern.SSAMF, {"rho": 0.1, "refresh_interval": 16, "samples": 4}, dtypes=(FP32,)),
}


def train_all(how, cases, steps, backend, feature=""):
    return {name: sharded.train(how, case, steps, backend, feature) for name, case in cases.items()}


def assert_same_training(ours, whole, tolerance, what):
    for rank, left in enumerate(ours):
        where = f"{what}, rank {rank}"
        assert [r[0] for r in left.reports] == [r[0] for r in whole.reports], where
        assert left.skips == whole.skips, where
        for x, y in zip(left.weights, whole.weights, strict=True):
            assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), f"{where}: {(x - y).abs().max()}"


@pytest.mark.parametrize(("n", "backend"), [(2, "reference"), (4, FAST)])
def test_trainings_of_50_steps_are_those_of_one_process(ranks, n, backend):
    results = ranks.run(n, train_all, "rows", LONG, 50, backend, timeout=400)
    for name, case in LONG.items():
        whole = sharded.train("whole", case, 50, "reference")
        assert_same_training([of_rank[name] for of_rank in results], whole, 2e-6, name)
        moved = [(x - y).abs().max() for x, y in zip(whole.weights, sharded.make_net().parameters(), strict=True)]
        assert max(moved) > 0.1
        assert len({r[0] for r in whole.reports}) == (1 if "SSAM" in name or name == "SAM" else 2)


SAM32 = LONG["SAM"]
SCALED = Case(samkern.LookSAM, {"rho": 0.1, "k": 2}, dtypes=(FP32,), scale=2.0**127)
HOW = {
    "replicated": (4, "replicated", LONG, ""),
    "tensor_parallel": (4, "tensor_parallel", LONG, ""),
    "kept": (2, "kept", {"LookSAM": LONG["LookSAM"]}, ""),
    "partly": (2, "partly", {"LookSAM": LONG["LookSAM"], "SSAMF": LONG["SSAMF_batch"]}, ""),
    "accumulated": (2, "rows", {"LookSAM": LONG["LookSAM"]}, "accumulated"),
    "halves": (2, "rows", {"LookSAM": LONG["LookSAM"]}, "halves"),
    "scaled": (2, "rows", {"LookSAM": SCALED}, ""),
    "scaled_halves": (2, "rows", {"LookSAM": SCALED}, "halves"),
    "bfloat16": (2, "rows", {"SAM": Case(samkern.SAM, {"rho": 0.1}, dtypes=(BF16,))}, ""),
}


@pytest.mark.parametrize("case", HOW)
def test_ways_to_train(ranks, case):
    n, how, cases, feature = HOW[case]
    results = ranks.run(n, train_all, how, cases, 12, FAST, feature, timeout=200)
    for name, method in cases.items():
        whole = sharded.train("whole", method, 12, "reference", feature)
        assert_same_training([r[name] for r in results], whole, 3e-2 if case == "bfloat16" else 2e-6, name)
        assert (whole.skips > 0) == (method.scale is not None)


def test_a_training_in_mixed_precision(ranks):
    """Computed in bfloat16, and summed up in float32: ranks differ from one rank by the sums that a matmul has rounded."""
    (alone,) = ranks.run(1, train_all, "mixed", {"SAM": SAM32}, 8, FAST, timeout=200)
    ours = ranks.run(2, train_all, "mixed", {"SAM": SAM32}, 8, FAST, timeout=200)
    assert_same_training([of_rank["SAM"] for of_rank in ours], alone["SAM"], 1e-2, "mixed")
    exact = sharded.train("whole", SAM32, 8, "reference")
    assert not all(map(torch.equal, exact.weights, alone["SAM"].weights))
