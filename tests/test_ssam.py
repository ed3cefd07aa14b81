"""SSAM-F and SSAM-D in an optimizer: which entries move, when the mask changes, and what a mask must survive."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import samkern
from samkern.optim import DynamicMask, EveryK, Filterwise, FisherMask, OrthogonalPart, SharpnessAware

from .lists import FP32, affordable, same_bits
from .methods import MOMENTUM, OwnStepSGD, method_named
from .oracles import looksam, sam, ssam
from .oracles.bases import Sgd
from .oracles.masks import top_k
from .problems import closure_for, copied, flat, make_net, scaled, through_a_file, train, weights

SGD = {"lr": 0.1, "momentum": 0.9}
OPTIONS = {"rho": 0.1, "refresh_interval": 3, **SGD}


def dynamic(params, base=torch.optim.SGD, **options):
    return samkern.SSAMD(params, base, **{"total_steps": 20, **OPTIONS, **options})


def by_batches(params, base=torch.optim.SGD, **options):
    return samkern.SSAMF(params, base, **{"fisher": "batch", "fisher_every": 1, **OPTIONS, **options})


BOTH = pytest.mark.parametrize("make", [dynamic, by_batches], ids=["dynamic", "fisher"])


def ones(opt):
    return [None if mask is None else mask.clone() for mask in opt.masks()]


def same_masks(a, b):
    return [x is None for x in a] == [x is None for x in b] and all(
        x is None or torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def count(opt):
    return sum(int(mask.sum()) for mask in opt.masks() if mask is not None)


# ---- the number of entries


@pytest.mark.parametrize(
    ("n", "sparsity", "expected"), [(10, 0.9, 1), (1000, 0.9, 100), (7, 0.0, 7), (7, 1.0, 0), (3, 0.5, 2), (1, 0.4, 1)]
)
def test_the_number_of_entries_is_rounded_not_truncated(n, sparsity, expected):
    w = nn.Parameter(torch.randn(n))
    w.grad = torch.randn(n)
    opt = dynamic([w], sparsity=sparsity)
    opt.first_step()
    assert count(opt) == expected
    opt.restore()


def test_equal_scores_take_the_first_places(backend):
    w = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    losses = [sum(p.sum() for p in w)]
    opt = samkern.SSAMF(w, torch.optim.SGD, lr=0.1, sparsity=0.3, backend=backend)
    opt.refresh_mask(losses)
    assert torch.cat([mask.flatten() for mask in opt.masks()]).tolist() == [True] * 7 + [False] * 3


# ---- what is perturbed


def perturbed_by(opt, net, t=0):
    """eps of a step and the masks in it, per parameter."""
    before = weights(net)
    closure_for(net, t, opt.zero_grad)()
    assert opt.first_step()
    eps = [a - b for a, b in zip(weights(net), before, strict=True)]
    masks = ones(opt)
    opt.restore()
    assert same_bits(weights(net), before)
    return eps, masks


@pytest.mark.parametrize("renormalise", [False, True])
def test_only_entries_of_the_mask_move(renormalise, backend):
    net = make_net()
    opt = dynamic(net.parameters(), renormalise=renormalise, backend=backend)
    eps, masks = perturbed_by(opt, net)
    length = torch.stack([x.norm() for x in eps]).norm().item()
    for x, mask, p in zip(eps, masks, net.parameters(), strict=True):
        if mask is None or p.grad is None:
            assert not x.any()
        else:
            assert not x[~mask].any()
            assert torch.equal(x != 0, mask & (p.grad != 0))
    assert math.isclose(length, 0.1, rel_tol=1e-9) if renormalise else length < 0.0999


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_mask_of_ones_is_sam_and_one_of_zeros_the_base(renormalise, backend):
    """Bitwise, with a mask that is there."""
    ends = {}
    for name, make in {
        "ones": lambda p: dynamic(p, sparsity=0.0, renormalise=renormalise, backend=backend),
        "sam": lambda p: samkern.SAM(p, torch.optim.SGD, rho=0.1, **SGD, backend=backend),
        "zeros": lambda p: dynamic(p, sparsity=1.0, renormalise=renormalise, backend=backend),
        "base": lambda p: samkern.SAM(p, torch.optim.SGD, rho=0.0, **SGD, backend=backend),
    }.items():
        net = make_net(FP32)
        opt = make(net.parameters())
        train(net, opt, range(5), FP32)
        ends[name] = weights(net)
        assert opt.evaluations == 10
    assert same_bits(ends["ones"], ends["sam"])
    assert same_bits(ends["zeros"], ends["base"])
    assert not same_bits(ends["sam"], ends["base"])


def test_before_the_first_refresh_a_fisher_mask_lets_everything_through(backend):
    net, twin = make_net(), make_net()
    opt = by_batches(net.parameters(), backend=backend)
    plain = samkern.SAM(twin.parameters(), torch.optim.SGD, rho=0.1, **SGD, backend=backend)
    train(net, opt, range(3))
    train(twin, plain, range(3))
    assert same_bits(weights(net), weights(twin))
    assert opt.masks() == [None] * len(opt.masks())
    train(net, opt, [3])
    assert count(opt) == round(sum(p.numel() for p in net.parameters() if p.requires_grad) / 2)


def test_groups_always_never_and_by_score(backend):
    """The excluded ones do not count for the sparsity; frozen parameters neither."""
    net = make_net()
    p = list(net.parameters())
    chosen, always, never = p[:3], p[3:5], p[5:]
    groups = [{"params": chosen}, {"params": always, "masked": False}, {"params": never, "rho": 0.0}]
    opt = dynamic(groups, sparsity=0.25, backend=backend)
    eps, masks = perturbed_by(opt, net)
    eps = dict(zip(net.parameters(), eps, strict=True))
    n = sum(x.numel() for x in chosen if x.requires_grad)
    assert sum(int(mask.sum()) for mask in masks if mask is not None) == round(0.75 * n)
    assert [mask is None for mask in masks] == [not (x.requires_grad and i < 3) for i, x in enumerate(p)]
    assert all(bool((eps[x] != 0).all()) for x in always if x.grad is not None)
    assert not any(eps[x].any() for x in never)


def test_a_group_can_leave_the_mask_during_training(backend):
    net = make_net()
    p = [x for x in net.parameters() if x.requires_grad]
    opt = dynamic([{"params": p[:2]}, {"params": p[2:]}], backend=backend)
    train(net, opt, range(2))
    opt.param_groups[1]["masked"] = False
    train(net, opt, [2])
    assert [mask is None for mask in opt.masks()] == [False, False] + [True] * (len(p) - 2)


def test_a_group_that_is_added_is_masked_at_once_or_by_the_next_refresh(backend):
    """A dynamic mask keeps its ones and takes random ones for the rest; a Fisher mask knows nothing of the new group yet."""
    net = make_net()
    p = [x for x in net.parameters() if x.requires_grad]
    for make in (dynamic, by_batches):
        opt = make(p[:3], sparsity=0.5, backend=backend)
        train(net, opt, range(4))
        before = ones(opt)
        opt.add_param_group({"params": p[3:]})
        train(net, opt, [4])
        if make is dynamic:
            assert count(opt) == round(sum(x.numel() for x in p) / 2)
            assert all((new | ~old).all() for new, old in zip(opt.masks(), before, strict=False))
        else:
            assert [mask is None for mask in opt.masks()] == [False] * 3 + [True] * (len(p) - 3)
        train(net, opt, [5, 6])
        assert count(opt) == round(sum(x.numel() for x in p) / 2)


@pytest.mark.parametrize("poisoned", [False, True])
def test_the_size_stays_exact_when_coverage_changes(poisoned, backend):
    """Out of the mask, back into it, frozen, and in the step of a refresh, also if that is skipped."""
    w = [nn.Parameter(torch.randn(100)), nn.Parameter(torch.randn(7, 10)), nn.Parameter(torch.randn(33))]
    opt = dynamic([{"params": [p]} for p in w], sparsity=0.4, refresh_interval=2, backend=backend)

    def step(fail=False):
        for p in w:
            p.grad = torch.randn(p.shape)
        if fail:
            w[0].grad[0] = math.nan
        opt.first_step()
        for p in w:
            p.grad = torch.randn(p.shape)
        opt.second_step()

    def expected(*chosen):
        return round(0.6 * sum(w[i].numel() for i in chosen))

    step()
    assert count(opt) == expected(0, 1, 2)
    opt.param_groups[1]["masked"] = False
    for _ in range(3):
        step()
        assert opt.masks()[1] is None
        assert count(opt) == expected(0, 2)
    opt.param_groups[1]["masked"] = True
    step(poisoned)  # step 4 refreshes
    assert count(opt) == expected(0, 1, 2)
    opt.param_groups[2]["rho"] = 0.0
    step()
    assert count(opt) == expected(0, 1)
    w[0].requires_grad_(False)
    step(poisoned)
    assert count(opt) == expected(1)


def test_weights_with_gaps(backend):
    """They are served by plain PyTorch; a mask is over the entries that there are."""
    for base in (torch.randn(40, 8)[:, :4], torch.randn(6, 6)[::2]):
        w = nn.Parameter(base)
        opt = dynamic([w], sparsity=0.5, refresh_interval=1, backend=backend)
        for _ in range(3):
            before = w.detach().clone()
            w.grad = torch.randn(w.shape)
            opt.first_step()
            assert torch.equal(w != before, opt.masks()[0])
            assert count(opt) == round(w.numel() / 2)
            w.grad = torch.randn(w.shape)
            opt.second_step()


def test_channels_last_takes_the_same_entries(backend):
    """Places are counted in row-major order, whatever the memory looks like."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = make_net().to(memory_format=layout)
        for make in (dynamic, by_batches):
            opt = make(net.parameters(), backend=backend)
            train(net, opt, range(5))
            ends.append((ones(opt), flat(net)))
    for i in (0, 1):
        assert same_masks(ends[i][0], ends[i + 2][0])
        assert (ends[i][1] - ends[i + 2][1]).norm() < 1e-12 * ends[i][1].norm()


# ---- when the mask changes


@BOTH
def test_refreshes_come_at_multiples_of_the_interval(make, backend):
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    seen = []
    for t in range(8):
        train(net, opt, [t])
        seen.append(ones(opt))
    changed = [t for t in range(1, 8) if not same_masks(seen[t], seen[t - 1])]
    assert changed == [3, 6]


def test_the_share_that_moves_falls_by_a_cosine():
    mask = DynamicMask(100, drop=0.5)
    assert [mask.share(t) for t in (0, 50, 100, 1000)] == pytest.approx([0.5, 0.25, 0.0, 0.0])


@pytest.mark.parametrize("regrow", [True, False])
def test_the_size_is_kept_for_a_thousand_refreshes(regrow):
    w = [nn.Parameter(torch.randn(30, 7)), nn.Parameter(torch.randn(11))]
    opt = dynamic(w, sparsity=0.7, total_steps=2000, refresh_interval=1, regrow=regrow)
    for _ in range(1000):
        for p in w:
            p.grad = torch.randn(p.shape)
        opt.first_step()
        opt.restore()  # undone each time ...
        opt.refresh_mask()  # ... and done by hand
        assert count(opt) == round(221 * 0.3)


def test_refresh_by_hand(backend):
    net = make_net()
    opt = dynamic(net.parameters(), refresh_interval=None, backend=backend)
    train(net, opt, range(4))
    before = ones(opt)
    opt.refresh_mask()
    assert not same_masks(before, opt.masks())
    assert count(opt) == sum(int(mask.sum()) for mask in before if mask is not None)
    opt.zero_grad()
    before = ones(opt)
    opt.refresh_mask()  # nothing to judge by
    assert same_masks(before, opt.masks())


def test_a_fisher_mask_of_samples_takes_the_largest_entries(backend):
    """Linear regression: the gradient of a sample is 2 r x."""
    torch.manual_seed(3)
    x, y = torch.randn(5, 8), torch.randn(5, 1)
    model = nn.Linear(8, 1, bias=False)
    residual = x @ model.weight.detach().t() - y
    fisher = (2 * residual * x).square().mean(0)
    losses = samkern.SampleLosses(model, F.mse_loss, (x, y))
    opt = samkern.SSAMF(
        model.parameters(), torch.optim.SGD, lr=0.1, sparsity=0.6, sample_losses=losses, backend=backend
    )
    opt.refresh_mask()
    assert torch.equal(opt.masks()[0].flatten(), torch.tensor(top_k(fisher.numpy(), 3)))
    squared_batch = (2 * residual * x).mean(0).square()
    assert top_k(squared_batch.numpy(), 3).tolist() != top_k(fisher.numpy(), 3).tolist()
    by_generator = (F.mse_loss(model(a), b) for a, b in zip(x.split(1), y.split(1), strict=True))
    before = ones(opt)
    opt.refresh_mask(by_generator)
    assert same_masks(before, opt.masks())


def test_a_sweep_without_a_finite_sample_keeps_the_mask(backend):
    model = nn.Linear(10, 10)
    opt = samkern.SSAMF(model.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    x = torch.randn(4, 10)
    opt.refresh_mask(model(row).square().sum() for row in x)
    before = ones(opt)
    opt.refresh_mask(model(row).square().sum() * math.nan for row in x)
    assert same_masks(before, opt.masks())
    assert (int(opt.mask.n_used), int(opt.mask.n_left_out)) == (0, 4)
    fresh = samkern.SSAMF(model.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    fresh.refresh_mask(model(row).square().sum() * math.nan for row in x)
    assert all(mask.all() for mask in fresh.masks())


def test_sample_losses_have_a_number_of_their_own():
    model = nn.Linear(3, 2)
    losses = samkern.SampleLosses(model, F.mse_loss, (torch.randn(30, 3), torch.randn(30, 2)))
    opt = samkern.SSAMF(model.parameters(), torch.optim.SGD, lr=0.1, num_samples=7)
    opt.refresh_mask(losses)
    assert int(opt.mask.n_used) == 30
    opt.refresh_mask(iter(losses))
    assert int(opt.mask.n_used) == 7


def test_the_engine_sweeps_on_refresh_steps_only_and_leaves_the_model_alone(backend):
    net = make_net(FP32)
    calls = []
    data = torch.randn(6, 1, 8, 8), torch.randint(0, 5, (6,))
    losses = samkern.SampleLosses(net, F.cross_entropy, data)

    def sample_losses():
        calls.append(opt._t)
        return losses

    opt = samkern.SSAMF(
        net.parameters(), MOMENTUM.cls, **OPTIONS, sample_losses=sample_losses, model=net, backend=backend
    )
    twin = make_net(FP32)
    plain = samkern.SAM(twin.parameters(), MOMENTUM.cls, rho=0.1, **SGD, model=twin, backend=backend)
    train(net, opt, range(4), FP32)
    train(twin, plain, range(4), FP32)
    assert calls == [3]
    assert same_bits(list(net.buffers())[:2], list(twin.buffers())[:2])  # the statistics that SAM leaves
    assert all(module.training for module in net.modules())


# ---- with every other choice


class MaskedLookASAM(looksam.LookSAM):
    """LookSAM's reuse on ASAM's operator on a dynamic mask."""

    mode = "filter"
    operator = sam.ASAM.operator

    def __init__(self, w, base, mask, **options):
        super().__init__(w, base, **options)
        self.adaptive, self.eta, self.mask = [True] * len(w), [0.01] * len(w), mask

    def eps(self, g):
        return self.mask.let_through(sam.ASAM.eps(self, g))


def test_looksam_with_asams_operator_on_a_mask(backend):
    net = make_net()
    twin = copy.deepcopy(net)
    opt = SharpnessAware(
        net.parameters(),
        torch.optim.SGD,
        **SGD,
        perturbation=Filterwise(0.5),
        schedule=EveryK(3),
        reuse=OrthogonalPart(0.7),
        mask=DynamicMask(20, refresh_interval=None),
        backend=backend,
    )
    w = list(twin.parameters())
    chooser = ssam.SSAMD(w, None, rho=1.0)
    chooser.follow()
    oracle = MaskedLookASAM(w, Sgd(w, **SGD), chooser, rho=0.5, k=3, alpha=0.7)
    for t in range(affordable(backend, 8, 4)):
        opt.step(closure_for(net, t, opt.zero_grad))
        oracle.step(closure_for(twin, t, lambda: None))
    assert (flat(net) - flat(twin)).norm() < 1e-12 * flat(net).norm()


@pytest.mark.parametrize(
    "name",
    ["SAM_inf", "ASAM_element", "ASAM_filter", "ASAM_layer", *(f"LookLayerSAM_{m}" for m in ("lars", "sign", "trust"))],
)
@pytest.mark.parametrize("renormalise", [False, True])
def test_every_climb_takes_a_mask(name, renormalise, fast):
    """Against the reference backend; with a mask of ones, bitwise the method itself."""
    method = method_named(name)
    perturbation = method.make([nn.Parameter(torch.ones(1))], MOMENTUM).perturbation
    ends = {}
    for key, backend, sparsity in (
        ("masked", fast, 0.5),
        ("reference", "reference", 0.5),
        ("ones", fast, 0.0),
        ("plain", fast, None),
    ):
        mask = None if sparsity is None else DynamicMask(9, sparsity, renormalise=renormalise, refresh_interval=2)
        net = make_net(FP32)
        opt = SharpnessAware(
            net.parameters(), torch.optim.SGD, **SGD, perturbation=perturbation, mask=mask, backend=backend
        )
        train(net, opt, range(3), FP32)
        ends[key] = weights(net)
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ends["masked"], ends["reference"], strict=True)
    )
    assert same_bits(ends["ones"], ends["plain"])
    assert not same_bits(ends["masked"], ends["plain"])


def test_clipping_and_a_base_with_a_step_of_its_own(backend):
    """F is of the gradients at w, even where the update writes over them."""
    net = make_net()
    clipped = by_batches(net.parameters(), OwnStepSGD, max_grad_norm=1e-3, backend=backend)
    closure_for(net, 0, clipped.zero_grad)()
    g = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    clipped.first_step()
    closure_for(net, 0, lambda: None)()
    clipped.second_step()
    squares = clipped.state_dict()["samkern"]["squares"]
    assert all(torch.allclose(squares[i], 0.1 * x.square()) for i, x in enumerate(g) if x is not None)


def test_under_a_loss_scale_the_same_numbers_are_accumulated(backend):
    ends = []
    for scale in (1.0, 1024.0):
        net = make_net(FP32)
        opt = by_batches(net.parameters(), backend=backend)
        for t in range(5):
            opt.grad_scale = torch.tensor(scale)
            opt.zero_grad()
            opt.step(scaled(closure_for(net, t, opt.zero_grad, FP32), net, scale))
        ends.append((weights(net), ones(opt), list(opt.state_dict()["samkern"]["squares"].values())))
    assert same_bits(ends[0][0], ends[1][0])
    assert same_masks(ends[0][1], ends[1][1])
    assert same_bits(ends[0][2], ends[1][2])


# ---- what a mask survives


@BOTH
@pytest.mark.parametrize("in_pass", [1, 2])
def test_a_step_that_is_skipped_keeps_the_mask(make, in_pass, backend):
    """Step 3 would refresh. Nothing that is kept between steps changes."""
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(3))
    before, kept = weights(net), copy.deepcopy(opt.state_dict()["samkern"])
    closure, calls = closure_for(net, 3, opt.zero_grad), []

    def poisoned():
        loss = closure()
        calls.append(loss)
        if len(calls) == in_pass:
            net.head.weight.grad[0, 0] = math.nan
        return loss

    opt.step(poisoned)
    after = opt.state_dict()["samkern"]
    assert opt.last_step.skipped
    assert same_bits(weights(net), before)
    for i, mask in enumerate(opt.masks()):
        was = kept["masks"].get(i)
        if was is None:
            assert mask is None or mask.all()  # before its first refresh a Fisher mask lets everything through
        else:
            assert torch.equal(after["masks"][i], was)
    assert kept["squares"].keys() == after["squares"].keys()
    assert all(torch.equal(after["squares"][i], x) for i, x in kept["squares"].items())


@BOTH
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_an_exception_in_the_second_pass_puts_the_mask_back(make, error, backend):
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(6))
    before, squares = ones(opt), copy.deepcopy(opt.state_dict()["samkern"]["squares"])
    closure, calls = closure_for(net, 6, opt.zero_grad), []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            assert not same_masks(before, opt.masks())  # it has been refreshed
            raise error
        return closure()

    with pytest.raises(type(error)):
        opt.step(failing)
    assert same_masks(before, opt.masks())
    assert all(torch.equal(x, squares[i]) for i, x in opt.state_dict()["samkern"]["squares"].items())
    twin = make_net()
    undisturbed = make(twin.parameters(), backend=backend)
    train(twin, undisturbed, range(7))
    train(net, opt, [6])
    assert same_masks(opt.masks(), undisturbed.masks())
    assert same_bits(weights(net), weights(twin))


def test_an_exception_in_the_first_step_leaves_no_mask(backend):
    net = make_net()
    opt = dynamic(net.parameters(), backend=backend)
    closure_for(net, 0, opt.zero_grad)()
    opt.first_step()
    assert count(opt) > 0
    opt.restore()
    assert opt.masks() == [None] * len(opt.masks())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_mask_keeps_its_place(layout, backend):
    """A recorded graph reads it where it was."""
    net = make_net().to(memory_format=layout)
    opt = dynamic(net.parameters(), backend=backend)
    places = []
    for t in range(7):
        train(net, opt, [t])
        masks = opt._keeper.kept.masks
        places.append([opt._keeper._laid_out(p, bits).data_ptr() for p, bits in masks.items()])
    assert places[0] == places[3] == places[6]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resume_is_bit_exact(make, dtype, how, backend):
    """Between two refreshes, and over the next one."""
    net = make_net(dtype)
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(5), dtype)
    twin, resumed = copied(how, net, opt, lambda params: make(params, backend=backend))
    assert same_masks(opt.masks(), resumed.masks())
    train(net, opt, range(5, 8), dtype)
    train(twin, resumed, range(5, 8), dtype)
    assert same_masks(opt.masks(), resumed.masks())
    assert same_bits(weights(net), weights(twin))
    ours = resumed.state_dict()["samkern"]
    assert all(bits.dtype == torch.uint8 for bits in ours["masks"].values())
    assert all(x.dtype == torch.float32 for x in ours["squares"].values())


def test_a_checkpoint_of_another_mask_is_refused(backend):
    net = make_net()
    opt = dynamic(net.parameters(), backend=backend)
    train(net, opt, range(2))
    bad = copy.deepcopy(opt.state_dict())
    bad["samkern"]["masks"][1] = bad["samkern"]["masks"][1][:-1]
    with pytest.raises(ValueError, match="masks 1"):
        opt.load_state_dict(bad)


@BOTH
def test_a_refresh_by_hand_that_fails_changes_nothing(make, monkeypatch, backend):
    net = make_net()
    opt = make(net.parameters(), backend=backend)
    train(net, opt, range(4))
    before = ones(opt)
    write, calls = torch.Tensor.copy_, []

    def interrupted(self, *args, **options):
        if self.dtype == torch.uint8:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
        return write(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.refresh_mask()
    assert len(calls) > 3
    assert same_masks(before, opt.masks())
    train(net, opt, range(4, 6))
    assert same_masks(before, opt.masks())


def test_a_failure_after_the_update_leaves_a_whole_step(monkeypatch, backend):
    """The weights have moved: so have the counters."""
    net, twin = make_net(), make_net()
    opt, sound = by_batches(net.parameters(), backend=backend), by_batches(twin.parameters(), backend=backend)
    train(twin, sound, [0])
    with monkeypatch.context() as patch:
        patch.setattr(samkern.ops, "fisher_accumulate", lambda *a, **b: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            train(net, opt, [0])
    assert same_bits(weights(net), weights(twin))
    assert (opt.evaluations, opt._t) == (2, 1)
    train(net, opt, [1])


def test_a_batch_mask_without_squares_waits_for_them(backend):
    """After a checkpoint of plain SAM at the step of a refresh."""
    net, twin = make_net(), make_net()
    plain = samkern.SAM(net.parameters(), torch.optim.SGD, rho=0.1, **SGD, backend=backend)
    train(net, plain, range(3))
    opt = by_batches(twin.parameters(), backend=backend)
    opt.load_state_dict(through_a_file(plain.state_dict()))
    train(twin, opt, range(3, 6))
    assert opt.masks() == [None] * len(opt.masks())
    train(twin, opt, [6])
    assert count(opt) > 0


def test_an_optimizer_that_was_pickled_before_there_were_masks():
    net = make_net()
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, rho=0.1, **SGD)
    train(net, opt, [0])
    old = pickle.loads(pickle.dumps((net, opt)))
    for owner, names in ((old[1], ("mask", "_masking")), (old[1]._keeper.kept, ("masks", "squares"))):
        for name in names:
            owner.__dict__.pop(name)
    old[1]._keeper.__dict__.pop("_bound_masks")
    again = pickle.loads(pickle.dumps(old))
    train(net, opt, [1])
    train(*again, [1])
    assert same_bits(weights(net), weights(again[0]))


def test_a_checkpoint_brings_its_seed(backend):
    net, twin = make_net(), make_net()
    opt = dynamic(net.parameters(), seed=5, backend=backend)
    train(net, opt, range(2))
    other = dynamic(twin.parameters(), seed=6, backend=backend)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(through_a_file(opt.state_dict()))
    train(net, opt, range(2, 5))
    train(twin, other, range(2, 5))
    assert same_masks(opt.masks(), other.masks())


def test_global_random_numbers_are_left_alone(backend):
    net = make_net()
    opt = dynamic(net.parameters(), backend=backend)
    state = torch.get_rng_state()
    train(net, opt, range(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_two_ranks_have_one_mask_and_one_radius(tmp_path):
    """Rank 1 sees other gradients here, as backward passes need not be bitwise equal; rank 0's mask and radius are taken."""
    script = textwrap.dedent("""
        import sys, torch, samkern
        rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        w = torch.nn.Parameter(torch.zeros(100))
        opt = samkern.SSAMD([w], torch.optim.SGD, lr=0.1, total_steps=10, refresh_interval=1)
        for t in range(3):
            w.grad = torch.randn(100, generator=torch.Generator().manual_seed(10 * t + rank))
            opt.first_step()
            w.grad = torch.ones(100)
            opt.second_step()
        lets = samkern.LETSSAM([w], torch.optim.SGD, lr=0.1, period=1)

        def closure_of(value):
            def closure():
                w.grad = value * (1 + w.detach())
                return torch.tensor(value)

            return closure

        lets.step(closure_of(1.0), val_closure=closure_of(1.1 + rank))
        torch.save([*opt.masks(), lets.radius], out)
        torch.distributed.barrier()  # who leaves early takes the connection along
        torch.distributed.destroy_process_group()
    """)
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(file)], env=environment)
        for rank, file in enumerate(files)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0]
    (mask, radius), (other_mask, other_radius) = map(torch.load, files)
    assert torch.equal(mask, other_mask)
    assert radius == other_radius


# ---- what is refused, and what is said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicMask(10, sparsity=1.5), "sparsity must be a number from 0 to 1, got 1.5"),
        (lambda: FisherMask(sparsity=True), "sparsity"),
        (lambda: FisherMask(fisher="exact"), "fisher must be one of 'sample', 'batch', got 'exact'"),
        (lambda: FisherMask(num_samples=0), "num_samples must be an integer >= 1, got 0"),
        (lambda: FisherMask(fisher_ema=2.0), "fisher_ema"),
        (lambda: FisherMask(fisher_every=0), "fisher_every"),
        (lambda: FisherMask(refresh_interval=0), "refresh_interval must be an integer >= 1, got 0"),
        (lambda: FisherMask(fisher="batch", sample_losses=list), "sample_losses goes with fisher='sample'"),
        (lambda: DynamicMask(0), "total_steps"),
        (lambda: DynamicMask(10, drop=-0.1), "drop"),
        (lambda: DynamicMask(10, seed=-1), "seed"),
        (lambda: dynamic([{"params": [nn.Parameter(torch.ones(1))], "masked": 3}]), "group 0: masked must be one of"),
        (lambda: dynamic([{"params": [nn.Parameter(torch.ones(1))], "sparsity": 0.3}]), "sets sparsity"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_what_refresh_mask_refuses():
    net = make_net()
    with pytest.raises(RuntimeError, match="without a mask"):
        samkern.SAM(net.parameters(), torch.optim.SGD, lr=0.1).refresh_mask()
    with pytest.raises(ValueError, match="needs losses of single samples"):
        samkern.SSAMF(net.parameters(), torch.optim.SGD, lr=0.1).refresh_mask()
    with pytest.raises(TypeError, match="sample_losses must be callable"):
        samkern.SSAMF(net.parameters(), torch.optim.SGD, lr=0.1, sample_losses=[torch.ones(())])
    batch = by_batches(net.parameters())
    with pytest.raises(RuntimeError, match="take a step before"):
        batch.refresh_mask()
    with pytest.raises(ValueError, match="takes no losses"):
        batch.refresh_mask([torch.ones(())])
    opt = dynamic(net.parameters())
    with pytest.raises(ValueError, match="takes no losses"):
        opt.refresh_mask([torch.ones(())])
    with pytest.raises(TypeError, match=r"mask must be a samkern\.optim\.Mask, got BitMask"):
        SharpnessAware(net.parameters(), torch.optim.SGD, lr=0.1, mask=samkern.BitMask.zeros([torch.ones(1)]))
    with pytest.raises(ValueError, match="does not go with fisher='batch'"):
        by_batches(net.parameters(), capturable=True)
    closure_for(net, 0, opt.zero_grad)()
    opt.first_step()
    with pytest.raises(RuntimeError, match="between first_step"):
        opt.refresh_mask()


def test_a_fisher_mask_that_is_never_made_is_mentioned_once():
    net = make_net()
    opt = samkern.SSAMF(net.parameters(), torch.optim.SGD, lr=0.1, refresh_interval=2)
    with pytest.warns(UserWarning, match="no mask after 2 steps.*sample_losses") as caught:
        train(net, opt, range(3))
    assert Path(caught[-1].filename).name == "problems.py"  # where step() is called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, opt, range(3, 6))


def test_explain_tells_what_the_mask_covers():
    p = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))]
    text = dynamic([{"params": p[:1]}, {"params": p[1:], "masked": False}]).explain()
    assert "mask DynamicMask" in text
    assert "on the entries that the mask chooses" in text
    assert "on all entries (masked=False)" in text
