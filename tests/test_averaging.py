"""EMA, SWA and WASAM against stored snapshots, on any optimizer; swapped in and out without a trace; saved and resumed."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR

import samkern

from .lists import BF16, FP16, FP32, FP64, same_bits, same_tree
from .methods import OwnStepSGD, base_named
from .oracles import averaging
from .problems import batch, closure_for, copied, make_net, through_a_file, train, weights

SGD = {"lr": 0.1, "momentum": 0.9}
MAKERS = {
    "SAM": lambda params, **o: samkern.SAM(params, torch.optim.SGD, rho=0.1, **SGD, **o),
    "SAM_Adam": lambda params, **o: samkern.SAM(params, torch.optim.Adam, rho=0.1, lr=1e-2, **o),
    "SAM_foreign": lambda params, **o: samkern.SAM(params, OwnStepSGD, rho=0.1, **SGD, **o),
    "LookSAM": lambda params, **o: samkern.LookSAM(params, torch.optim.SGD, rho=0.1, k=3, **SGD, **o),
    "MSAM": lambda params, **o: samkern.MSAM(params, torch.optim.SGD, rho=0.3, **SGD, **o),
}
PLAIN = {
    "SGD": partial(torch.optim.SGD, **SGD),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "Adam_fused": partial(torch.optim.Adam, lr=1e-2, fused=True),
}
AVERAGES = {
    "SWA": (lambda opt: samkern.SWA(opt, start=2, every=2), lambda t: t >= 2 and t % 2 == 0, averaging.mean),
    "EMA": (lambda opt: samkern.EMA(opt, 0.8), lambda t: True, partial(averaging.ema, decay=0.8)),
    "EMA_warmed_up": (
        lambda opt: samkern.EMA(opt, 0.99, warmup=True, every=3),
        lambda t: t % 3 == 0,
        partial(averaging.ema, decay=0.99, warmup=True),
    ),
}
each_average = pytest.mark.parametrize("name", AVERAGES)


def assert_close(averages, expected, rtol=1e-6):
    for ours, theirs in zip(averages, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


def poison(closure, net):
    """The same, but for a NaN in a gradient."""

    def poisoned():
        loss = closure()
        net.head.bias.grad[0] = torch.nan
        return loss

    return poisoned


def train_watched(net, opt, due, n_steps, dtype=FP32, bad=()):
    """Snapshots after the steps that are ``due``, but those that are ``bad``."""
    snapshots = []
    for t in range(n_steps):
        closure = closure_for(net, t, opt.zero_grad, dtype)
        opt.step(poison(closure, net) if t in bad else closure)
        if due(t) and t not in bad:
            snapshots.append(weights(net))
    return snapshots


@pytest.mark.parametrize("maker", MAKERS)
@each_average
def test_of_a_sharpness_aware_optimizer(maker, name, backend):
    """Steps with a NaN in a gradient are not taken in, the first that is due neither."""
    make, due, oracle = AVERAGES[name]
    net = make_net(FP32)
    opt = MAKERS[maker](net.parameters(), backend=backend)
    average = make(opt)
    snapshots = train_watched(net, opt, due, 9, bad=(2, 5, 6))
    assert average.n_averaged == len(snapshots) >= 2
    assert average.steps == 9
    assert_close(average.averages, oracle(snapshots))
    assert opt.skips == 3


@pytest.mark.parametrize("optimizer", PLAIN)
@each_average
def test_of_a_torch_optimizer(optimizer, name):
    make, due, oracle = AVERAGES[name]
    net = make_net(FP32)
    opt = PLAIN[optimizer](net.parameters())
    average = make(opt)
    snapshots = train_watched(net, opt, due, 8)
    assert average.n_averaged == len(snapshots)
    assert_close(average.averages, oracle(snapshots))


@pytest.mark.parametrize("optimizer", PLAIN)
def test_steps_that_a_grad_scaler_skips_are_not_taken_in(optimizer):
    """A fused step is called in any case."""
    net = make_net(FP32)
    opt = PLAIN[optimizer](net.parameters())
    swa, scaler = samkern.SWA(opt), torch.amp.GradScaler("cpu", init_scale=2.0)
    snapshots = []
    for t in range(5):
        opt.zero_grad()
        x, y = batch(t, FP32)
        scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
        if t in (0, 3):
            net.head.bias.grad[0] = torch.inf
        scaler.step(opt)
        scaler.update()
        if t not in (0, 3):
            snapshots.append(weights(net))
    assert swa.n_averaged == 3
    assert_close(swa.averages, averaging.mean(snapshots))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("ours", [True, False])
def test_averages_are_float32_or_float64(dtype, ours):
    """A bf16 average of 0.99 would not move."""
    params = [
        torch.full((3,), 1.0, dtype=dtype, requires_grad=True),
        torch.randn(5, 4, dtype=dtype, requires_grad=True),
    ]
    opt = samkern.SAM(params, torch.optim.SGD, lr=0.01) if ours else torch.optim.SGD(params, lr=0.01)
    ema = samkern.EMA(opt, 0.99)
    snapshots = []
    for _ in range(50):
        opt.zero_grad()
        opt.step(lambda: sum((p * 2).sum() for p in params).backward())
        snapshots.append([p.detach().clone() for p in params])
    assert {x.dtype for x in ema.averages} == {FP64 if dtype == FP64 else FP32}
    assert_close(ema.averages, averaging.ema(snapshots, 0.99), rtol=1e-12 if dtype == FP64 else 1e-6)
    before = [p.detach().clone() for p in params]
    with ema.swapped():
        assert same_bits([p.detach() for p in params], [x.to(dtype) for x in ema.averages])
    assert same_bits([p.detach() for p in params], before)


def test_a_long_mean_is_the_two_pass_mean():
    """2,000 steps in float32."""
    w = torch.randn(50, requires_grad=True)
    opt = torch.optim.SGD([w], lr=0.1)
    swa, snapshots = samkern.SWA(opt), []
    for _ in range(2_000):
        w.grad = torch.randn(50)
        opt.step()
        snapshots.append([w.detach().clone()])
    assert_close(swa.averages, averaging.mean(snapshots))


def test_decays_at_the_ends():
    w = torch.zeros(2, requires_grad=True)
    opt = torch.optim.SGD([w], lr=1.0)
    last, first = samkern.EMA(opt, 0), samkern.EMA(opt, 1)
    for _ in range(3):
        w.grad = -torch.ones(2)
        opt.step()
    assert last.averages[0].tolist() == [3, 3]
    assert first.averages[0].tolist() == [1, 1]


def two(backend="reference"):
    net = make_net(FP32)
    opt = MAKERS["SAM"](net.parameters(), backend=backend, model=net)
    return net, opt, samkern.EMA(opt, 0.8)


def state_of(net):
    return [x.clone() for x in (*net.parameters(), *net.buffers())], [x.data_ptr() for x in net.parameters()]


def test_swapping_leaves_no_trace(backend):
    net, opt, ema = two(backend)
    train(net, opt, range(3), FP32)
    (before, places), averages = state_of(net), [x.clone() for x in ema.averages]
    with ema.swapped(net):
        assert same_bits([p.detach() for p in net.parameters()], averages)
        net(batch(50, FP32)[0])  # in training mode
        assert not same_bits([x.double() for x in net.buffers()], [x.double() for x in before[-3:]])
        assert [p.data_ptr() for p in net.parameters()] == places
    assert same_tree(state_of(net), (before, places))
    assert same_bits(ema.averages, averages)
    train(net, opt, range(3, 5), FP32)
    twin, other, _ = two(backend)
    train(twin, other, range(5), FP32)
    assert same_bits(weights(net), weights(twin))


def test_an_exception_swaps_out():
    net, opt, ema = two()
    train(net, opt, range(2), FP32)
    before = state_of(net)
    with pytest.raises(KeyboardInterrupt), ema.swapped(net):
        net.norm.running_mean.fill_(3)
        net.norm.running_var = torch.ones(4)  # another tensor
        raise KeyboardInterrupt
    assert same_tree(state_of(net), before)


def test_swapping_by_hand():
    net, opt, ema = two()
    train(net, opt, range(2), FP32)
    before = state_of(net)
    with pytest.raises(RuntimeError, match="not swapped in"):
        ema.swap_out()
    ema.swap_in()
    with pytest.raises(RuntimeError, match=r"swap_in\(\) while the averages of EMA are swapped in"):
        ema.swap_in()
    with pytest.raises(RuntimeError, match="swapped"), ema.swapped():
        pass
    assert not same_tree(state_of(net), before)  # the failed attempts have not swapped out
    for attempt in (ema.copy_to_weights, lambda: copy.deepcopy(ema), lambda: ema.load_state_dict(ema.state_dict())):
        with pytest.raises(RuntimeError, match="swapped in"):
            attempt()
    ema.swap_out()
    assert same_tree(state_of(net), before)


def test_averages_of_one_optimizer_may_be_nested():
    net, opt, ema = two()
    swa = samkern.SWA(opt)
    train(net, opt, range(3), FP32)
    before = state_of(net)
    with ema.swapped(), swa.swapped():
        assert same_bits([p.detach() for p in net.parameters()], swa.averages)
    assert same_tree(state_of(net), before)


@pytest.mark.parametrize("ours", [True, False])
def test_no_step_while_averages_are_swapped_in(ours):
    net = make_net(FP32)
    opt = MAKERS["SAM"](net.parameters()) if ours else PLAIN["SGD"](net.parameters())
    ema = samkern.EMA(opt)
    train(net, opt, range(2), FP32)
    before = weights(net)
    with ema.swapped():
        within, calls = weights(net), []
        with pytest.raises(RuntimeError, match="a step of the optimizer while the averages of EMA are swapped in"):
            opt.step(lambda: calls.append(1))
        if ours:
            with pytest.raises(RuntimeError, match="swapped in"):
                opt.first_step()
        assert not calls
        assert same_bits(weights(net), within)
    assert same_bits(weights(net), before)
    train(net, opt, range(2, 3), FP32)
    assert ema.n_averaged == 3


def test_no_step_of_one_pass_either():
    net = make_net(FP32)
    opt = MAKERS["MSAM"](net.parameters())
    ema = samkern.EMA(opt)
    with ema.swapped(), pytest.raises(RuntimeError, match="swapped in"), opt.perturbed():
        pass


def test_no_swapping_within_a_step():
    net, opt, ema = two()
    train(net, opt, range(1), FP32)
    closure_for(net, 1, opt.zero_grad, FP32)()
    assert opt.first_step()
    for attempt in (ema.swap_in, ema.copy_to_weights, ema.swapped().__enter__):
        with pytest.raises(RuntimeError, match="between first_step"):
            attempt()
    opt.restore()


def test_autocast_does_not_keep_the_weights_from_before():
    """It would: its block keeps half-precision copies of weights."""
    net, x = nn.Linear(8, 8), torch.randn(4, 8)
    opt = MAKERS["SAM"](net.parameters())
    ema = samkern.EMA(opt, 0.9)
    for _ in range(3):
        opt.step(lambda: (opt.zero_grad(), net(x).square().sum().backward()))

    def output(swapped):
        with ema.swapped() if swapped else contextlib.nullcontext():
            return net(x)

    with torch.autocast("cpu", torch.bfloat16):
        inside = output(swapped=True)
    with torch.autocast("cpu", torch.bfloat16):
        outside = output(swapped=False)
    assert not torch.equal(inside, outside)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output(swapped=False), outside)
        assert torch.equal(output(swapped=True), inside)
        assert torch.equal(output(swapped=False), outside)


def test_before_anything_is_averaged():
    """The averages are the weights; but they do not become them for good."""
    net = make_net(FP32)
    opt = MAKERS["SAM"](net.parameters())
    swa = samkern.SWA(opt, start=5)
    for t in range(2):
        before = weights(net)
        assert same_bits(swa.averages, before)
        with swa.swapped():
            assert same_bits(weights(net), before)
        train(net, opt, range(t, t + 1), FP32)
    with pytest.raises(RuntimeError, match=r"no weights have been averaged in 2 steps \(start=5\)"):
        swa.copy_to_weights()
    train(net, opt, range(2, 7), FP32)
    assert swa.n_averaged == 2


def test_weights_by_name_before_the_first_average_are_those_of_now():
    net = make_net(FP32)
    opt = MAKERS["SAM"](net.parameters())
    swa = samkern.SWA(opt, start=4)

    def of_net():
        return weights(net), list(swa.weights_of(net).values())

    for t in range(6):
        train(net, opt, range(t, t + 1), FP32)
        if t == 0:
            swa.swap_in()  # makes averages, which are not those of later steps
            swa.swap_out()
        assert same_bits(*of_net()) == (t < 5)
    swa.restart()
    train(net, opt, range(6, 7), FP32)
    assert same_bits(*of_net())


def test_for_good():
    net, opt, ema = two()
    train(net, opt, range(3), FP32)
    averages, places = [x.clone() for x in ema.averages], state_of(net)[1]
    ema.copy_to_weights()
    assert same_bits(weights(net), averages)
    assert state_of(net)[1] == places
    ema.detach()
    train(net, opt, range(3, 4), FP32)
    assert ema.n_averaged == 3
    assert same_bits(ema.averages, averages)


@pytest.mark.parametrize("make", [MAKERS["SAM"], PLAIN["SGD"]], ids=["SAM", "SGD"])
def test_detaching(make):
    net = make_net(FP32)
    opt = make(net.parameters())
    ema = samkern.EMA(opt)
    train(net, opt, range(2), FP32)
    ema.detach()
    ema.detach()
    ema.swap_in()
    train(net, opt, range(2, 3), FP32)  # it has no say any more
    assert ema.n_averaged == 2
    ema.swap_out()
    net, opt, copied_ema = copy.deepcopy((net, opt, ema))  # nor has a copy
    train(net, opt, range(3, 4), FP32)
    assert copied_ema.n_averaged == 2


def test_detaching_frees_the_averages(backend):
    net = make_net(FP32)
    opt = MAKERS["SAM"](net.parameters(), backend=backend)
    ema = samkern.EMA(opt)
    train(net, opt, range(2), FP32)
    average = weakref.ref(ema.averages[0])
    ema.detach()
    del ema
    assert average() is None
    train(net, opt, range(2, 3), FP32)


def test_what_an_average_needs_outlives_the_optimizer():
    net, opt, ema = two()
    train(net, opt, range(2), FP32)
    averages = [x.clone() for x in ema.averages]
    del opt
    ema.copy_to_weights()
    assert same_bits(weights(net), averages)


def test_several_averages_at_once(backend):
    """One is folded into the update, the others are not; which one may change from step to step."""
    net = make_net(FP32)
    opt = MAKERS["SAM"](net.parameters(), backend=backend)
    averages = [make(opt) for make, _, _ in AVERAGES.values()]
    snapshots = train_watched(net, opt, lambda t: True, 8, bad=(4,))
    taken = [t for t in range(8) if t != 4]
    for average, (_, due, oracle) in zip(averages, AVERAGES.values(), strict=True):
        assert_close(average.averages, oracle([x for t, x in zip(taken, snapshots, strict=True) if due(t)]))


# ---- parameters of all kinds


@pytest.mark.parametrize("ours", [True, False])
def test_layouts_and_kinds_of_parameters(ours, backend):
    """Empty, 0-d, frozen, permuted, with gaps, without a gradient."""
    params = [
        torch.randn(0, 3),
        torch.randn(()),
        torch.randn(4),
        torch.randn(3, 5).t(),
        torch.randn(4, 6)[:, ::2],
        torch.randn(2, 3),
    ]
    params = [p.requires_grad_(i != 2) for i, p in enumerate(params)]
    opt = samkern.SAM(params, torch.optim.SGD, lr=0.1, backend=backend) if ours else torch.optim.SGD(params, lr=0.1)
    swa, snapshots = samkern.SWA(opt), []
    for _ in range(4):
        opt.zero_grad()
        opt.step(lambda: sum((p * p).sum() for p in params[:5]).backward())
        snapshots.append([p.detach().clone() for p in params])
    assert_close([x for x in swa.averages if x.numel()], [x for x in averaging.mean(snapshots) if x.numel()])
    assert torch.equal(swa.averages[2], params[2])
    swa.copy_to_weights()
    assert all(torch.equal(p.detach(), x) for p, x in zip(params, swa.averages, strict=True))


def test_two_thousand_small_ones(backend):
    params = [torch.randn(3, requires_grad=True) for _ in range(2_000 if backend == "cpu" else 100)]
    opt = samkern.SAM(params, torch.optim.SGD, lr=0.1, backend=backend)
    swa, folded = samkern.SWA(opt), samkern.EMA(opt, 0.5)
    snapshots = []
    for t in range(3):
        for p in params:
            p.grad = torch.full((3,), 1.0 + t)
        assert opt.first_step()
        for p in params:
            p.grad = torch.full((3,), 1.0 + t)
        opt.second_step()
        snapshots.append([p.detach().clone() for p in params])
    assert_close(swa.averages, averaging.mean(snapshots))
    assert_close(folded.averages, averaging.ema(snapshots, 0.5))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def test_shared_parameters_are_averaged_once():
    net = Tied()
    opt = MAKERS["SAM"](net.parameters())
    ema = samkern.EMA(opt)
    opt.step(lambda: net.b(net.a(torch.ones(2, 4))).sum().backward())
    assert len(ema.averages) == 3
    with ema.swapped(net):
        assert net.a.weight is net.b.weight


@pytest.mark.parametrize("make", [MAKERS["SAM"], MAKERS["SAM_foreign"], PLAIN["SGD"]], ids=["SAM", "foreign", "SGD"])
def test_a_group_that_is_added_later(make):
    """It counts, for the steps before, with its weights after its first step; and not with those of a climb."""
    a, b = torch.randn(4, requires_grad=True), torch.randn(3, requires_grad=True)
    opt = make([a])
    swa = samkern.SWA(opt)
    snapshots = []

    def step(params):
        opt.zero_grad()
        opt.step(lambda: sum((p * p).sum() for p in params).backward())
        return [p.detach().clone() for p in params]

    snapshots = [step([a]) for _ in range(2)]
    place = swa.averages[0].data_ptr()
    opt.add_param_group({"params": [b]})
    later = [step([a, b]) for _ in range(2)]
    assert_close(swa.averages[:1], averaging.mean([x[:1] for x in (*snapshots, *later)]))
    b_first, b_last = (x[1:] for x in later)
    assert_close(swa.averages[1:], averaging.mean([b_first, b_first, b_first, b_last]))
    assert swa.averages[0].data_ptr() == place


def test_a_model_that_changes_dtype():
    net = make_net(FP32)
    opt = PLAIN["SGD"](net.parameters())
    ema = samkern.EMA(opt, 0.5)
    train(net, opt, range(2), FP32)
    averages = [x.double() for x in ema.averages]
    net.double()
    opt.state.clear()
    assert same_bits(ema.averages, averages)
    train(net, opt, range(2, 3), FP64)
    assert ema.n_averaged == 3


# ---- learning rates, wrappers, memory


def test_with_swalr(backend):
    """The schedule that goes with it: anneals to a rate that stays, from where averaging starts."""
    net = make_net(FP32)
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    swa = samkern.SWA(opt, start=4)
    schedule = SWALR(opt, swa_lr=0.03, anneal_epochs=2, anneal_strategy="linear")
    rates = []
    for t in range(8):
        train(net, opt, range(t, t + 1), FP32)
        rates.append(opt.param_groups[0]["lr"])
        if t >= 4:
            schedule.step()
    assert rates[:5] == [0.1] * 5
    assert rates[5] == pytest.approx(0.065)
    assert rates[6:] == pytest.approx([0.03, 0.03])
    assert swa.n_averaged == 4


def test_within_the_wrappers_of_a_framework():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    net = make_net(FP32)
    opt = MAKERS["SAM"](net.parameters())
    ema = samkern.EMA(Wrapper(opt))
    train(net, opt, range(2), FP32)
    assert ema.n_averaged == 2


def test_memory():
    net, opt, ema = two()
    n_bytes = 4 * sum(p.numel() for p in net.parameters())
    assert opt.memory().averages == 8  # the counter
    assert opt.memory(peak=True).averages == n_bytes + 8
    train(net, opt, range(1), FP32)
    assert opt.memory().averages == opt.memory(peak=True).averages == n_bytes + 8
    with ema.swapped():
        assert opt.memory().averages == 2 * n_bytes + 8


# ---- errors


def test_options_are_checked():
    opt = PLAIN["SGD"]([torch.zeros(2, requires_grad=True)])
    for make, message in [
        (lambda: samkern.EMA(opt, 1.5), "decay must be a number from 0 to 1, got 1.5"),
        (lambda: samkern.EMA(opt, every=0), "every must be an integer >= 1, got 0"),
        (lambda: samkern.SWA(opt, start=-1), "start must be an integer >= 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="optimizer must be"):
        samkern.SWA([torch.zeros(2)])
    complex_one = torch.optim.SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], lr=0.1)
    with pytest.raises(TypeError, match=r"parameter 0, shape \(2,\): .* cannot be averaged"):
        samkern.SWA(complex_one)
    assert not opt._optimizer_step_post_hooks  # nothing is left of what failed


def test_they_tell_what_they_are():
    opt = PLAIN["SGD"]([torch.zeros(2, requires_grad=True)])
    assert repr(samkern.EMA(opt, 0.5)) == "EMA(decay=0.5, warmup=False, every=1, steps=0)"
    assert repr(samkern.SWA(opt, start=3)) == "SWA(start=3, every=1, steps=0)"


# ---- checkpoints and copies


@pytest.mark.parametrize("maker", ["SAM", "SAM_foreign", "AdamW"])
@each_average
def test_resume_is_bit_exact(maker, name):
    """10 and 10 steps equal 20, for weights and averages; these keep their places."""
    make_opt, make = {**MAKERS, **PLAIN}[maker], AVERAGES[name][0]
    net = make_net(FP32)
    opt = make_opt(net.parameters())
    average = make(opt)
    train(net, opt, range(10), FP32)
    files = [through_a_file(x.state_dict()) for x in (net, opt, average)]
    train(net, opt, range(10, 20), FP32)
    twin = make_net(FP32, seed=5)
    other = make_opt(twin.parameters())
    again = make(other)
    train(twin, other, range(5), FP32)
    places = [x.data_ptr() for x in again.averages]
    for target, file in zip((twin, other, again), files, strict=True):
        target.load_state_dict(file)
    assert [x.data_ptr() for x in again.averages] == places
    train(twin, other, range(10, 20), FP32)
    assert same_bits(weights(net), weights(twin))
    assert same_tree(average.state_dict(), again.state_dict())


def test_states_of_others_are_refused():
    net, opt, ema = two()
    train(net, opt, range(2), FP32)
    good, before = through_a_file(ema.state_dict()), [x.clone() for x in ema.averages]
    others = PLAIN["SGD"]([torch.zeros(p.shape, requires_grad=True) for p in net.parameters()][:-1])
    bad = {**good, "averages": {**good["averages"], 0: torch.zeros(2)}}
    for state, message in [
        (samkern.SWA(opt).state_dict(), "the state is of 'SWA', this is EMA"),
        (samkern.EMA(others).state_dict(), "the state is of 8 parameters, the optimizer has 9"),
        (bad, r"average 0 of the state, of shape \(2,\), belongs to other parameters"),
    ]:
        with pytest.raises(ValueError, match=message):
            ema.load_state_dict(state)
    assert same_bits(ema.averages, before)
    assert ema.n_averaged == 2


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [MAKERS["SAM"], PLAIN["SGD"]], ids=["SAM", "SGD"])
def test_copies_with_their_optimizer_go_on(how, make):
    net = make_net(FP32)
    opt = make(net.parameters())
    ema = samkern.EMA(opt, 0.8)
    train(net, opt, range(3), FP32)
    twin, other, again = how((net, opt, ema))
    for a, b in ((net, opt), (twin, other)):
        train(a, b, range(3, 6), FP32)
    assert again.n_averaged == 6
    assert same_bits(weights(net), weights(twin))
    assert same_bits(ema.averages, again.averages)
    assert not same_tree([x.data_ptr() for x in ema.averages], [x.data_ptr() for x in again.averages])


# ---- WASAM


def make_wasam(params, **options):
    options = {"rho": 0.1, "total_steps": 20, "start": 0.3, "every": 2, "lr": 0.1, "momentum": 0.9, **options}
    return samkern.WASAM(params, torch.optim.SGD, **options)


def test_wasam_is_sam_and_the_mean_of_its_last_phase(backend):
    net, twin = make_net(FP32), make_net(FP32)
    opt, sam = make_wasam(net.parameters(), backend=backend), MAKERS["SAM"](twin.parameters(), backend=backend)
    snapshots = train_watched(twin, sam, lambda t: t >= 6 and t % 2 == 0, 20, bad=(8,))
    train_watched(net, opt, lambda t: True, 20, bad=(8,))
    assert same_bits(weights(net), weights(twin))
    assert opt.average.n_averaged == len(snapshots) == 6
    assert_close(opt.average.averages, averaging.mean(snapshots))


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_wasam_resumes_bit_exactly(how, dtype):
    net = make_net(dtype)
    opt = make_wasam(net.parameters())
    train(net, opt, range(10), dtype)
    twin, other = copied(how, net, opt, make_wasam)
    for a, b in ((net, opt), (twin, other)):
        train(a, b, range(10, 20), dtype)
    assert same_bits(weights(net), weights(twin))
    assert same_bits(opt.average.averages, other.average.averages)
    assert opt.average.n_averaged == other.average.n_averaged == 7
    with other.average.swapped(twin):
        assert not same_bits(weights(net), weights(twin))
    assert other.companions == (other.average,)


def test_wasam_goes_on_from_sam():
    """Whose steps count; of the average there is nothing yet."""
    net = make_net(FP32)
    sam = MAKERS["SAM"](net.parameters())
    train(net, sam, range(5), FP32)
    opt = make_wasam(net.parameters(), start=0.5)
    train(net, opt, range(12), FP32)
    opt.load_state_dict(sam.state_dict())
    assert (opt.average.steps, opt.average.n_averaged) == (5, 0)
    train(net, opt, range(5, 12), FP32)
    assert opt.average.n_averaged == 1
    sam.load_state_dict(opt.state_dict())  # and back
    state, other = opt.state_dict(), make_wasam(make_net(FP32).parameters())
    state["samkern"]["average"][0] = torch.zeros(2)
    with pytest.raises(ValueError, match="average 0 of the state"):
        other.load_state_dict(state)
    assert other.steps == 0


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"total_steps": 1}, (0, 1)),
        ({"total_steps": 1_000, "start": 0.75}, (750, 10)),
        ({"total_steps": 100, "start": 0.29}, (29, 1)),
        ({"total_steps": 50, "start": 1.0}, (49, 1)),
        ({"total_steps": 400, "start": 0, "every": 3}, (0, 3)),
    ],
)
def test_when_wasam_averages(options, sampling):
    opt = samkern.WASAM([torch.zeros(2, requires_grad=True)], torch.optim.SGD, lr=0.1, **options)
    assert repr(opt.average) == f"SWA(start={sampling[0]}, every={sampling[1]}, steps=0)"


def test_wasam_is_not_copied_and_loads_nothing_while_its_average_is_swapped_in():
    net = make_net(FP32)
    opt = samkern.WASAM(net.parameters(), torch.optim.SGD, total_steps=4, start=0.0, **SGD)
    train(net, opt, range(1), FP32)
    saved = copy.deepcopy(opt.state_dict())
    train(net, opt, range(1, 3), FP32)
    before = copy.deepcopy(opt.state_dict())
    with opt.average.swapped():
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\) while the averages of SWA are swapped in"):
            opt.load_state_dict(saved)
        with pytest.raises(RuntimeError, match="copying or pickling while the averages of SWA are swapped in"):
            copy.deepcopy(opt)
    assert same_tree(opt.state_dict(), before)


def test_wasam_composes_and_checks():
    params = [torch.randn(3, requires_grad=True)]
    opt = samkern.WASAM(params, torch.optim.AdamW, total_steps=4, start=0.0, p=math.inf, lr=1e-3, adaptive=False)
    opt.step(lambda: params[0].square().sum().backward())
    assert opt.average.n_averaged == 1
    for options in ({"total_steps": 0}, {"total_steps": 9, "start": 1.5}, {"total_steps": 9, "every": 0}):
        with pytest.raises(ValueError, match="must be"):
            samkern.WASAM(params, torch.optim.SGD, lr=0.1, **options)


def test_wasam_in_a_distributed_checkpoint(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint", reason="this torch has no torch.distributed.checkpoint")
    import samkern.integrations.dcp

    net = make_net(FP32)
    opt, again = make_wasam(net.parameters()), make_wasam(make_net(FP32).parameters())
    train(net, opt, range(9), FP32)
    dcp.save({"optimizer": opt.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    samkern.integrations.dcp.load(again, tmp_path)
    assert again.average.n_averaged == opt.average.n_averaged == 2
    assert same_bits(again.average.averages, opt.average.averages)


def test_each_base_of_the_list_averages():
    """Those of the fused ones and their like that have no test of their own here."""
    for name in ("Nesterov", "AdamW", "own_step"):
        base = base_named(name)
        net = make_net(FP64)
        opt = samkern.SAM(net.parameters(), base.cls, rho=0.1, **base.options)
        swa = samkern.SWA(opt)
        snapshots = train_watched(net, opt, lambda t: True, 4, FP64)
        assert_close(swa.averages, averaging.mean(snapshots), rtol=1e-12)


def test_a_graph_repeats_its_decision():
    """So an average of some steps only is refused; one of all is not."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = samkern.SAM([p], torch.optim.SGD, lr=0.1, capturable=True)
    for average in (lambda: samkern.SWA(opt, start=2), lambda: samkern.EMA(opt, every=2)):
        with pytest.raises(ValueError, match="capturable=True does not go with"):
            average()
    assert opt.companions == ()
    samkern.EMA(opt)
    assert len(opt.companions) == 1
