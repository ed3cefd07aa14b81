"""SWAD's window on hand-made and random loss curves, against the rule on the whole curve; and the exact mean over its steps."""

from __future__ import annotations

import math
import random

import pytest
import torch

import samkern

from .lists import BF16, FP32, same_bits, same_tree
from .oracles import averaging
from .problems import closure_for, make_net, through_a_file, train, weights

# Losses at validations; the segments in the result, whether a valley started, the validation that ends it.
CURVES = {
    "late_start": ([9, 8, 7, 6, 5, 4, 4.5, 5, 4.2, 4.1], [5, 6, 7, 8, 9], True, None),
    "at_once": ([1, 2, 2, 1.5], [0, 1, 2, 3], True, None),
    "early_stop": ([5, 1, 1, 1, 9, 9, 9, 9, 9, 9, 1, 1], [1, 2, 3], True, 9),
    "a_bump_is_tolerated": ([5, 1, 1, 1, 9, 9, 9, 9, 9, 1, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9], True, None),
    "never_converged": ([9, 8, 7, 6, 5, 4, 3], [6], False, None),
    "too_few": ([1, 2], [1], False, None),
    "end_inside_the_tolerance_window": ([5, 1, 1, 1, 9, 9, 9], [1, 2, 3], True, None),
    "ties": ([3, 2, 2, 2, 2], [1, 2, 3, 4], True, None),
    "on_the_threshold": ([1, 1, 1, 1.3, 1.3], [0, 1, 2, 3, 4], True, None),
    "just_above_it": ([1, 1, 1, 1.31, 1.31], [0, 1, 2], True, None),
    "nan_is_infinite": ([2, math.nan, 2, 2, 2, math.nan, 2], [2, 3, 4, 5, 6], True, None),
    "diverged": ([5, 1, math.inf, math.nan, math.inf], [4], False, None),
    "zero": ([0, 0, 0, 0, 1e-30], [0, 1, 2, 3], True, None),
}


class Walk:
    """A few weights that an optimizer moves at random, and all that they have been."""

    def __init__(self, dtype=FP32, **options):
        self.params = [torch.randn(4, dtype=dtype).requires_grad_(), torch.randn(2, 3, dtype=dtype).requires_grad_()]
        self.opt = torch.optim.SGD(self.params, lr=0.1)
        self.swad = samkern.SWAD(self.opt, **options)
        self.snapshots, self.segments = [], []

    def segment(self, n_steps):
        first = len(self.snapshots)
        for _ in range(n_steps):
            for p in self.params:
                p.grad = torch.randn_like(p)
            self.opt.step()
            self.snapshots.append([p.detach().clone() for p in self.params])
        self.segments.append(range(first, len(self.snapshots)))

    def run(self, losses, lengths):
        """Returns the validation that ended it."""
        for i, (loss, n_steps) in enumerate(zip(losses, lengths, strict=True)):
            self.segment(n_steps)
            if self.swad.validate(loss):
                return i
        return None

    def assert_averages(self, chosen):
        """The result is the mean over all steps of ``chosen`` segments."""
        steps = [t for e in chosen for t in self.segments[e]]
        assert (self.swad.first_step, self.swad.last_step, self.swad.n_averaged) == (steps[0], steps[-1], len(steps))
        expected = averaging.mean([self.snapshots[t] for t in steps])
        for ours, theirs in zip(self.swad.averages, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("curve", CURVES)
def test_the_window_on_hand_made_curves(curve, on_host):
    """Segments of different lengths, which are their weights."""
    losses, chosen, converged, ended = CURVES[curve]
    assert averaging.swad(losses, 3, 6, 0.3) == (chosen, converged, ended)
    walk = Walk(on_host=on_host)
    swad = walk.swad
    assert walk.run(losses, [1 + i % 4 for i in range(len(losses))]) == ended
    assert swad.ended == (ended is not None)
    if not swad.ended:  # what follows the last validation does not count
        walk.segment(2)
    swad.finish()
    assert swad.ended
    assert swad.converged == converged
    walk.assert_averages(chosen)
    before = [x.clone() for x in swad.averages]
    assert swad.due() is None  # nothing is taken in any more
    walk.segment(1)
    assert swad.validate(0.0)
    swad.finish()
    assert same_bits(swad.averages, before)
    swad.copy_to_weights()
    assert same_bits([p.detach() for p in walk.params], before)


def test_random_curves():
    draw = random.Random(3)
    n_converged = n_ended = 0
    for _ in range(150):
        options = {
            "n_converge": draw.randint(1, 4),
            "n_tolerance": draw.randint(1, 5),
            "tolerance_ratio": draw.choice([0, 0.2, 1]),
        }
        losses = [draw.choice([1, 1, 1.5, 2, 3, math.nan, draw.random()]) for _ in range(draw.randint(1, 14))]
        chosen, converged, ended = averaging.swad(losses, *options.values())
        walk = Walk(**options)
        assert walk.run(losses, [draw.randint(1, 3) for _ in losses]) == ended, (losses, options)
        held = [len(walk.swad._waiting), walk.swad.extra_bytes(walk.params)]
        assert held[0] <= max(options["n_converge"], options["n_tolerance"])
        assert held[1] >= 0
        walk.swad.finish()
        assert walk.swad.converged == converged
        walk.assert_averages(chosen)
        n_converged, n_ended = n_converged + converged, n_ended + (ended is not None)
    assert 20 < n_ended < n_converged < 150


def test_memory():
    """While segments wait there are most: n_tolerance and the running one; two of them on the device."""
    for on_host in (False, True):
        walk = Walk(n_converge=2, n_tolerance=4, on_host=on_host)
        most = samkern.optim.averaging.bytes_of_average(walk.params[0]) + 24
        foretold = walk.swad.extra_bytes(walk.params)
        assert foretold == 5 * most
        counts = []
        for loss in (1, 1, 5, 5, 5):
            walk.segment(2)
            assert not walk.swad.validate(loss)
            counts.append(1 + len(walk.swad._waiting) + (walk.swad.first_step is not None))
        assert counts == [2, 2, 3, 4, 5]
        walk.segment(1)
        assert walk.swad.validate(5)
        assert not walk.swad._waiting


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "losses", [CURVES[name][0] for name in ("late_start", "early_stop", "never_converged")], ids=str
)
def test_resume_is_bit_exact_at_every_validation(dtype, losses):
    reference, resumed = Walk(dtype), None
    torch.manual_seed(1)
    for i, loss in enumerate(losses):
        walk = Walk(dtype, on_host=i % 2 == 1)
        if resumed is not None:
            with torch.no_grad():
                for p, w in zip(walk.params, resumed[0], strict=True):
                    p.copy_(w)
            walk.swad.load_state_dict(through_a_file(resumed[1]))
        else:
            with torch.no_grad():
                for p, w in zip(walk.params, reference.params, strict=True):
                    p.copy_(w)
        for w in (reference, walk):
            torch.manual_seed(i)
            w.segment(3)
            w.swad.validate(loss)
        resumed = [p.detach().clone() for p in walk.params], walk.swad.state_dict()
    assert same_tree(reference.swad.state_dict(), through_a_file(resumed[1]))
    reference.swad.finish()
    walk.swad.finish()
    assert same_bits(reference.swad.averages, walk.swad.averages)
    with pytest.raises(ValueError, match="the state is of 'SWAD', this is SWA"):
        samkern.SWA(walk.opt).load_state_dict(resumed[1])
    bad = walk.swad.state_dict()
    bad["valley"] = {**bad["valley"], "averages": {0: torch.zeros(3)}}
    with pytest.raises(ValueError, match="belongs to other parameters"):
        walk.swad.load_state_dict(bad)


def test_of_a_sharpness_aware_optimizer(backend):
    """Folded into its updates; a skipped step is not in the mean, and a segment of such is none."""
    net = make_net(FP32)
    opt = samkern.SAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, backend=backend)
    swad = samkern.SWAD(opt, n_converge=2, n_tolerance=2)
    snapshots = []
    for t in range(8):
        train(net, opt, range(t, t + 1), FP32)
        snapshots.append(weights(net))
        if t == 4:
            opt.step(_nan(net, opt))
        if t % 2 == 1:
            swad.validate(1.0)
    opt.step(_nan(net, opt))
    swad.validate(99.0)
    swad.finish()
    assert (swad.converged, swad.n_averaged, swad.first_step, swad.last_step) == (True, 8, 0, 8)
    for ours, theirs in zip(swad.averages, averaging.mean(snapshots), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def _nan(net, opt):
    closure = closure_for(net, 0, opt.zero_grad, FP32)

    def poisoned():
        loss = closure()
        net.head.weight.grad[0, 0] = torch.nan
        return loss

    return poisoned


def test_swapping_in_before_there_is_a_result():
    """The latest segment; before that, the steps so far."""
    walk = Walk()
    walk.segment(2)
    so_far = averaging.mean(walk.snapshots)
    torch.testing.assert_close([x.double() for x in walk.swad.averages], so_far, rtol=1e-6, atol=1e-6)
    walk.swad.validate(3.0)
    walk.segment(3)
    before = [p.detach().clone() for p in walk.params]
    with walk.swad.swapped():
        torch.testing.assert_close([p.detach().double() for p in walk.params], so_far, rtol=1e-6, atol=1e-6)
        with pytest.raises(RuntimeError, match=r"validate\(\) while the averages"):
            walk.swad.validate(1.0)
    assert same_bits([p.detach() for p in walk.params], before)


@pytest.mark.parametrize("on_host", [False, True])
def test_weights_by_name_are_those_of_the_result(on_host):
    net = torch.nn.Linear(3, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    swad = samkern.SWAD(opt, n_converge=2, n_tolerance=2, on_host=on_host)
    for loss in (0.9, 0.5, 0.5, 0.6, 0.8, 0.9):
        for _ in range(2):
            net(torch.ones(1, 3)).square().sum().backward()
            opt.step()
        ended = swad.validate(loss)
        assert same_bits(list(swad.weights_of(net).values()), swad.averages)
    assert ended


def test_a_group_that_is_added_within_the_valley():
    walk = Walk(n_converge=1)
    for loss in (1.0, 1.0):
        walk.segment(2)
        walk.swad.validate(loss)
    new = torch.randn(3, requires_grad=True)
    walk.opt.add_param_group({"params": [new]})
    walk.params.append(new)
    walk.segment(1)
    first = new.detach().clone()
    walk.swad.validate(1.0)
    torch.testing.assert_close(walk.swad.averages[2], first)
    assert walk.swad.n_averaged == 5
    walk.segment(5)
    walk.swad.validate(1.0)
    expected = (5 * first + sum(x[2] for x in walk.snapshots[-5:])) / 10
    torch.testing.assert_close(walk.swad.averages[2], expected)


def test_losses_and_options_are_checked():
    walk = Walk()
    with pytest.raises(RuntimeError, match=r"finish\(\) before any segment"):
        walk.swad.finish()
    assert not walk.swad.validate(1.0)  # before any step
    walk.segment(1)
    with pytest.raises(ValueError, match=r"loss must be >= 0, got -0.5: .* add a constant"):
        walk.swad.validate(-0.5)
    assert not walk.swad.validate(torch.tensor(0.5))
    for options in ({"n_converge": 0}, {"n_tolerance": 0}, {"tolerance_ratio": -0.1}, {"tolerance_ratio": math.nan}):
        with pytest.raises(ValueError, match="must be"):
            samkern.SWAD(walk.opt, **options)
    assert (
        repr(walk.swad)
        == "SWAD(n_converge=3, n_tolerance=6, tolerance_ratio=0.3, steps=1, converged=False, ended=False)"
    )
