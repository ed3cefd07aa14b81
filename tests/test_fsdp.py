"""Sharded parameters: runs on 2 and 4 ranks equal those of one process on whole tensors."""

from __future__ import annotations

import functools
import gc
import math
import weakref

import pytest
import torch

import samkern
from samkern.sharded_select import largest_of_shards
from samkern.shards import like

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


@pytest.mark.takes(10)
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
    """Weights, norms, decisions, caches and masks: in float64, what remains is the order of additions.

    Of the layouts that are not that of ``fully_shard`` each has every third method.
    """
    cases = dict(CASES)
    if layout != "rows":
        names = list(CASES)[["partly", "replicated_rows", "grid"].index(layout) :: 3]
        cases = {name: CASES[name] for name in names if layout != "grid" or name not in NOT_ALONG_COLUMNS}
    ours = ranks.run(n, sharded.among_ranks, cases, layout, backend, timeout=240)
    skipped = 0
    for name, case in cases.items():
        whole = sharded.alone(case)
        assert_equal([results[name] for results in ours], whole, case.dtypes, name)
        assert (whole.skips > 0) == (case.poisoned is not None), name
        skipped += whole.skips
        assert ours[0][name].plan == {"reference": "ReferencePlan", "cpu": "Plan"}[backend]
    assert skipped > 5 or layout != "rows"


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


@pytest.mark.takes(12)
@pytest.mark.parametrize(("n", "backend"), [(2, "reference"), (4, FAST)])
def test_trainings_of_50_steps_are_those_of_one_process(ranks, n, backend):
    cases = LONG if n == 2 else {name: LONG[name] for name in ("SAM", "LookSAM", "ARSAM", "SSAMF_batch")}
    results = ranks.run(n, train_all, "rows", cases, 50, backend, timeout=400)
    for name, case in cases.items():
        whole = sharded.train("whole", case, 50, "reference")
        assert_same_training([of_rank[name] for of_rank in results], whole, 2e-6, name)
        moved = [(x - y).abs().max() for x, y in zip(whole.weights, sharded.make_net().parameters(), strict=True)]
        assert max(moved) > 0.1
        assert len({r[0] for r in whole.reports}) == (1 if "SSAM" in name or name == "SAM" else 2)


SAM32 = LONG["SAM"]
SCALED = Case(samkern.LookSAM, {"rho": 0.1, "k": 2}, dtypes=(FP32,), scale=2.0**125)
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
    results = ranks.run(n, train_all, how, cases, 8, FAST, feature, timeout=200)
    for name, method in cases.items():
        whole = sharded.train("whole", method, 8, "reference", feature)
        assert_same_training([r[name] for r in results], whole, 3e-2 if case == "bfloat16" else 2e-6, name)
        assert (whole.skips > 0) == (method.scale is not None)


def test_a_training_in_mixed_precision(ranks):
    """Computed in bfloat16, and summed up in float32: ranks differ from one rank by the sums that a matmul has rounded."""
    (alone,) = ranks.run(1, train_all, "mixed", {"SAM": SAM32}, 8, FAST, timeout=200)
    ours = ranks.run(2, train_all, "mixed", {"SAM": SAM32}, 8, FAST, timeout=200)
    assert_same_training([of_rank["SAM"] for of_rank in ours], alone["SAM"], 1e-2, "mixed")
    exact = sharded.train("whole", SAM32, 8, "reference")
    assert not all(map(torch.equal, exact.weights, alone["SAM"].weights))


# ---- what a step asks of other ranks


def n_collectives(how, backend):
    counts = {}
    for name in ("SAM", "LookSAM", "SSAMF_batch"):
        counts[name] = sharded.train(how, LONG[name], 4, backend).collectives
    return counts


@pytest.mark.parametrize(("n", "how", "n_dims"), [(2, "rows", 1), (4, "replicated", 1), (4, "tensor_parallel", 2)])
def test_sums_are_one_collective_in_a_half_step(ranks, n, how, n_dims):
    """One for each dimension of a mesh along which something is cut; two where a look fills caches."""
    (counts, *_) = ranks.run(n, n_collectives, how, FAST, timeout=120)
    assert counts["SAM"] == [2 * n_dims] * 4
    assert counts["LookSAM"] == [3 * n_dims, n_dims, n_dims, 3 * n_dims]
    assert counts["SSAMF_batch"] == [2 * n_dims] * 4  # no refresh among them


def one_rank_goes_wrong(what, rank_of_nan, pass_of_nan):
    """A NaN in a batch or in one entry of a part, on one rank, in one pass of step 1."""
    net = sharded.sharded(sharded.make_net(), "rows")
    opt = samkern.LookSAM(net.parameters(), torch.optim.SGD, rho=0.1, k=2, model=net, **sharded.MOMENTUM)
    opt.step(sharded.closure_for(net, 0, opt))
    opt.step(sharded.closure_for(net, 1, opt))
    before, state = [sharded.whole(p) for p in net.parameters()], opt.state_dict()["samkern"]["cache"]
    caches = [x.full_tensor() for x in state.values()]
    passes = iter(range(2))
    mine = torch.distributed.get_rank() == rank_of_nan

    def closure():
        now = next(passes) == pass_of_nan and mine
        opt.zero_grad()
        x, y = (sharded.my_rows(net, part) for part in sharded.batch(2))
        loss = (net(x * math.nan if now and what == "batch" else x) - y).square().mean()
        loss.backward()
        if now and what == "part":
            net.first.weight.grad.to_local().view(-1)[0] = math.nan
        return loss

    opt.step(closure)
    same = all(map(torch.equal, before, [sharded.whole(p) for p in net.parameters()]))
    same = same and all(map(torch.equal, caches, [x.full_tensor() for x in state.values()]))
    return same, opt.skips, opt.last_step.skipped, opt.last_step.reason


@pytest.mark.parametrize(("what", "rank", "in_pass"), [("batch", 1, 0), ("part", 0, 0), ("part", 1, 1)])
def test_a_nan_on_one_rank_skips_the_step_on_all(ranks, what, rank, in_pass):
    results = ranks.run(2, one_rank_goes_wrong, what, rank, in_pass, timeout=60)
    assert results[0] == results[1]
    same, skips, skipped, reason = results[0]
    assert (same, skips, skipped) == (True, 1, True)
    assert reason


class FailingError(RuntimeError):
    pass


def fails_in_second_pass(name):
    net = sharded.sharded(sharded.make_net(), "rows")
    opt = LONG[name].make(net.parameters(), model=net, backend=FAST)
    for t in range(2):
        opt.step(sharded.closure_for(net, t, opt))
    before = [p.detach().to_local().clone() for p in net.parameters()]
    calls, first = [], []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            away = any(not torch.equal(p.to_local(), x) for p, x in zip(net.parameters(), before, strict=True))
            raise FailingError(f"away: {away}")
        loss = sharded.closure_for(net, 3, opt)()
        first.extend(None if p.grad is None else p.grad.to_local().clone() for p in net.parameters())
        return loss

    with pytest.raises(FailingError, match="away: True"):
        opt.step(closure)
    same_weights = all(torch.equal(p.to_local(), x) for p, x in zip(net.parameters(), before, strict=True))
    same_gradients = all(
        (g is None and p.grad is None) or torch.equal(p.grad.to_local(), g)
        for p, g in zip(net.parameters(), first, strict=True)
    )
    steps = opt.steps
    opt.step(sharded.closure_for(net, 3, opt))
    return same_weights, same_gradients, steps, opt.steps


@pytest.mark.parametrize("name", ["SAM", "SSAMF_batch"])
def test_an_exception_in_the_second_pass_restores_weights_and_gradients(ranks, name):
    assert ranks.run(2, fails_in_second_pass, name, timeout=60) == [(True, True, 2, 3)] * 2


def norms_of_a_step():
    net = sharded.sharded(sharded.make_net(), "rows")
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.0, model=net)
    norms = []

    def closure():
        loss = sharded.closure_for(net, 0, opt)()
        norms.append(sum(p.grad.full_tensor().double().square().sum() for p in net.parameters() if p.grad is not None))
        return loss

    opt.step(closure)
    last = opt.last_step
    return [math.sqrt(x) for x in norms], [float(last.grad_norm), float(last.second_norm)]


def test_a_step_tells_the_norms_of_whole_gradients(ranks):
    for expected, told in ranks.run(2, norms_of_a_step, timeout=60):
        assert told == pytest.approx(expected, rel=1e-6)
        assert told[0] != told[1]


def goes(backend):
    mesh, placements = sharded.rows(1)
    w = torch.nn.Parameter(sharded.spread(torch.ones(4, 3), mesh, placements(0, None)))
    opt = samkern.SAM([w], torch.optim.SGD, lr=0.1, rho=0.1, backend=backend)
    opt.step(lambda: w.square().sum().backward())
    watched = [weakref.ref(x) for x in (opt, opt._keeper.plan())]
    gc.disable()
    try:
        del opt
        return [ref() is None for ref in watched]
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", dict.fromkeys(["reference", FAST]))
def test_an_optimizer_and_its_plan_go_when_the_last_reference_goes(ranks, backend):
    """A plan has a copy of the weights."""
    assert ranks.run(1, goes, backend) == [[True, True]]


def take_parts(shard):
    """m-SAM of two parts, whose gradients are sums over processes if ``shard``, as with sequence parallelism."""
    w, n = torch.nn.Parameter(torch.arange(1.0, 13.0, dtype=FP64).view(4, 3)), 1
    if shard:
        n = torch.distributed.get_world_size()
        mesh, placements = sharded.rows(n)
        w = torch.nn.Parameter(sharded.spread(w.detach(), mesh, placements(0, w)))
    opt = samkern.GRST([w], torch.optim.SGD, lr=0.1, rho=0.1, p=1.0, gamma=2.0)

    def closure(k):
        gradient = k * sharded.whole(w).square() / n
        sums = [torch.distributed.tensor.Partial()]
        w.grad = torch.distributed.tensor.DTensor.from_local(gradient, mesh, sums) if shard else gradient

    for _ in range(3):
        opt.step([functools.partial(closure, k) for k in (1.0, -2.0)])
    return sharded.whole(w)


def test_parts_whose_gradients_are_sums_over_processes(ranks):
    alone = take_parts(False)
    for w in ranks.run(2, take_parts, True):
        assert torch.allclose(w, alone, rtol=1e-12)


# ---- what does not go together


def refused():
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    net = sharded.sharded(sharded.make_net(), "rows")
    columns = torch.nn.Parameter(sharded.spread(torch.randn(4, 6), mesh, [torch.distributed.tensor.Shard(1)]))
    before, said, options = sharded.whole(columns), {}, {"lr": 0.1, "rho": 0.1}

    def note(what, run):
        try:
            run()
        except Exception as error:
            said[what] = (type(error).__name__, str(error))

    older = torch.distributed.fsdp.FullyShardedDataParallel
    for keeps in (False, True):
        flat = older(torch.nn.Linear(4, 4), use_orig_params=keeps, device_id=torch.device("cpu"))
        for model in (flat, None):
            optimizer = functools.partial(samkern.SAM, flat.parameters(), torch.optim.SGD, model=model, **options)
            note(f"older {keeps} {model is None}", optimizer)
    note("dynamic", lambda: samkern.SSAMD(net.parameters(), torch.optim.SGD, total_steps=9, **options))
    note("local", lambda: samkern.SAM(net.parameters(), torch.optim.SGD, perturb_sync="local", model=net, **options))
    note("capturable", lambda: samkern.SAM(net.parameters(), torch.optim.SGD, capturable=True, **options))
    by_filters = samkern.ASAM([columns], torch.optim.SGD, mode="filter", **options)
    columns.grad = columns.detach().clone()
    note("filters", by_filters.first_step)
    has_gradient = columns.grad is not None
    mask = samkern.optim.FisherMask(0.5, fisher="batch", fisher_every=1, renormalise=True, refresh_interval=1)
    layers = samkern.ASAM([columns], torch.optim.SGD, mode="layer", mask=mask, **options)
    note("layers", lambda: [(layers.first_step(), layers.second_step()) for _ in range(2)])
    layers.restore()
    return said, by_filters.steps, has_gradient, torch.equal(sharded.whole(columns), before)


def test_what_does_not_go_together_is_an_error_that_says_so(ranks):
    for said, steps, has_gradient, same in ranks.run(2, refused, timeout=60):
        older = [said.pop(what) for what in list(said) if what.startswith("older")]
        assert len(older) == 4
        assert all(kind == "ValueError" and "use torch.distributed.fsdp.fully_shard" in text for kind, text in older)
        kinds = {what: kind for what, (kind, _) in said.items()}
        assert kinds == dict.fromkeys(("dynamic", "local", "capturable", "filters", "layers"), "ValueError")
        assert "FisherMask" in said["dynamic"][1]
        assert "perturb_sync='local'" in said["local"][1]
        assert "capturable=True" in said["capturable"][1]
        assert "parameter 0, shape (4, 6)" in said["filters"][1]
        assert "renormalise=False" in said["layers"][1]
        assert steps == 0
        assert has_gradient
        assert same


# ---- masks


def some_scores(dtype, kind):
    generator = torch.Generator().manual_seed(5)
    lists = [torch.randn(s, generator=generator, dtype=FP64).abs() for s in sharded.SHAPES]
    if kind == "ties":
        lists = [(x * 2).round() / 2 for x in lists]
    if kind == "tiny":
        lists = [x * torch.finfo(dtype).tiny for x in lists]
    if kind == "nan":
        lists = [torch.where(x > 0.3, math.nan, (x * 8).round()) for x in lists]
    if kind == "zeros":
        lists = [torch.zeros_like(x) for x in lists]
    if kind == "infinite":
        lists = [torch.where(x > 1, math.inf, x) for x in lists]
    if kind == "mixed":  # with numbers that only some of the tensors can hold
        return [(x * 2).round() / 2 + 1e-9 if i % 2 else ((x * 2).round() / 2).float() for i, x in enumerate(lists)]
    return [x.to(dtype) for x in lists]


SCORES = [
    *((FP32, kind) for kind in ("random", "ties", "tiny", "nan", "zeros", "infinite")),
    *((FP64, kind) for kind in ("ties", "tiny", "nan", "mixed")),
]
N_ENTRIES = sum(math.prod(shape) for shape in sharded.SHAPES)


def select(layout, ks):
    mesh, placements = sharded.LAYOUTS[layout](torch.distributed.get_world_size())
    chosen = {}
    for dtype, kind in SCORES:
        scores = some_scores(dtype, kind)
        scores = [
            x if (how := placements(i, x)) is None else sharded.spread(x, mesh, how) for i, x in enumerate(scores)
        ]
        for k in ks:
            parts = largest_of_shards(scores, k).unpack()
            chosen[dtype, kind, k] = [sharded.whole(like(part, x)) for part, x in zip(parts, scores, strict=True)]
    return chosen


@pytest.mark.parametrize(("n", "layout"), [(2, "rows"), (2, "partly"), (4, "rows"), (4, "replicated_rows")])
def test_the_largest_of_parts_are_those_of_the_whole(ranks, n, layout):
    """Ties go to those that come first, NaN comes last."""
    ks = [0, 1, N_ENTRIES // 2, N_ENTRIES - 3, N_ENTRIES] if n == 2 else [N_ENTRIES // 3]
    results = ranks.run(n, select, layout, ks, timeout=120)
    for dtype, kind in SCORES:
        for k in ks:
            expected = samkern.ops.topk_mask(some_scores(dtype, kind), k, nan="last").unpack()
            assert sum(int(x.sum()) for x in expected) == k
            for chosen in results:
                assert all(map(torch.equal, chosen[dtype, kind, k], expected)), (dtype, kind, k)


@pytest.mark.parametrize("how", ["fully", "kept", "partly"])
def test_averages_of_sharded_weights(ranks, how):
    """Swapped in and out although ``fully_shard`` may keep what it has gathered; as those of whole weights."""
    whole = sharded.averaged("whole")
    assert not torch.allclose(whole["outputs"][0], whole["outputs"][1])
    for left in ranks.run(2, sharded.averaged, how):
        assert torch.equal(left["outputs"][0], left["outputs"][2])
        assert left["again"]
        assert left["n"] == whole["n"] == 4
        for ours, theirs in zip(left["outputs"] + left["averages"], whole["outputs"] + whole["averages"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
