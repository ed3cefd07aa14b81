"""One optimizer step without forward and backward, as two halves and as a whole, against every peer.

Bytes per parameter by formula, fp32, SGD with momentum: SAM's minimum is 40 (norms 4, perturb 16, update 20); the check of
the second gradient, which none of the peers does, reads 4 more.
"""

from __future__ import annotations

import copy
from operator import attrgetter

import pytest
import torch

import samkern

from . import peers, shapes
from .harness import Candidate, stopwatch

each_set = pytest.mark.parametrize("shape_set", shapes.ALL, ids=attrgetter("name"))
with_stopwatch = pytest.mark.benchmark(timer=stopwatch)
COMPILES_UP_TO = 200  # tensors; the graph of 2,000 takes inductor more than an hour


class Rig:
    """A stepper and the gradients that it is fed: the same ones for all of a comparison."""

    def __init__(self, stepper, g, g_s):
        self.stepper, self.g, self.g_s = stepper, g, g_s

    def feed(self, grads):
        for p, grad in zip(self.stepper.params, grads, strict=True):
            p.grad = grad

    def step(self, first=True, second=True):
        """One step; the stopwatch runs in the halves that count."""
        looks = self.stepper.looks()
        self.feed(self.g)
        self.timed(self.stepper.first, first)
        if looks:
            self.feed(self.g_s)
        self.timed(self.stepper.second, second)

    def timed(self, half, counts):
        if counts:
            with stopwatch.running():
                half()
        else:
            half()


def rigs(shape_set, steppers):
    """Steppers over equal weights; gradients are shared, since none of them may write to those of a SAM step."""
    w, g, g_s = shape_set.tensors(), shape_set.tensors(), shape_set.tensors()
    made = []
    for make in steppers:
        own = shape_set.tensors(torch.empty)
        torch._foreach_copy_(own, w)
        made.append(Rig(make(own), g, g_s))
    return made


def checked(made, n_steps, tolerance=1e-5):
    """Every stepper takes the same steps; then all must be where the reference backend is. Only then are they timed."""
    expected = None
    errors = []
    for rig in made:
        for _ in range(n_steps):
            rig.step(False, False)
        if rig is made[0]:
            expected = rig.stepper.params
        errors.append(
            max(
                float((p.detach() - q.detach()).abs().max() / q.detach().abs().max().clamp(min=1e-30))
                if p.numel()
                else 0.0
                for p, q in zip(rig.stepper.params, expected, strict=True)
            )
        )
        assert errors[-1] <= tolerance, f"{rig.stepper.name} is off by {errors[-1]}"
    return errors


def sam_steppers(shape_set, harness):
    makers = [
        lambda w: peers.Ours(w, backend="reference"),
        peers.Ours,
        peers.EagerLoop,
        peers.ForeachChain,
        lambda w: peers.PytorchOptimizer(w, "SAM", foreach=True),
        lambda w: peers.PytorchOptimizer(w, "SAM", foreach=False),
    ]
    if shape_set.n_tensors <= COMPILES_UP_TO:
        makers.append(peers.Compiled)
    else:
        harness.skipped.append(
            f"torch.compile was not measured on {shape_set.name}: more than {COMPILES_UP_TO} tensors"
        )
    return makers


@each_set
@with_stopwatch
@pytest.mark.parametrize(
    ("measured", "first", "second", "n_bytes"),
    [("perturb", True, False, 20), ("update", False, True, 20), ("step", True, True, 40)],
)
def test_sam(benchmark, harness, shape_set, measured, first, second, n_bytes):
    made = rigs(
        shape_set, sam_steppers(shape_set, harness) if measured == "step" else sam_steppers(shape_set, harness)[:4]
    )
    errors = checked(made, 2)[1:]
    made = made[1:]  # the reference has judged; it is not timed
    candidates = [
        Candidate(rig.stepper.name, lambda rig=rig: rig.step(first, second), error)
        for rig, error in zip(made, errors, strict=True)
    ]
    harness.compare(benchmark, shape_set, measured, "SAM", candidates, n_bytes)


@each_set
@with_stopwatch
def test_averaged(benchmark, harness, shape_set):
    """An update that takes the weights into their mean: 8 bytes more, where a pass of its own has 12."""
    steppers = [lambda w: peers.Averaged(w, backend="reference"), peers.Averaged, peers.ThenLerp]
    made = rigs(shape_set, [*steppers, peers.ThenAveragedModel])
    errors = checked(made, 3)
    for rig in made:
        for x, y in zip(rig.stepper.averages, made[0].stepper.averages, strict=True):
            assert x.numel() == 0 or (x - y).abs().max() <= 1e-5 * y.abs().max(), rig.stepper.name
    candidates = [
        Candidate(rig.stepper.name, lambda rig=rig: rig.step(False, True), error)
        for rig, error in zip(made[1:], errors[1:], strict=True)
    ]
    harness.compare(benchmark, shape_set, "update", "SAM averaged", candidates, 28)


@each_set
@with_stopwatch
def test_looksam_cycle(benchmark, harness, shape_set):
    """Five steps with k = 5: one look of 56 B and four reuse steps of 28 B. Global scope; pytorch_optimizer has per-tensor
    scope only, so it is compared in time with ours of that scope, which moves the same bytes."""
    steppers = [
        lambda w: peers.Ours(w, samkern.LookSAM, k=peers.K, alpha=peers.ALPHA, backend="reference"),
        lambda w: peers.Ours(w, samkern.LookSAM, k=peers.K, alpha=peers.ALPHA),
        peers.ForeachLookSAM,
    ]
    made = rigs(shape_set, steppers)
    for rig in made:  # reuse writes into p.grad of the peers: everyone gets gradients of its own
        rig.g, rig.g_s = copy.deepcopy(rig.g), copy.deepcopy(rig.g_s)
    kept = copy.deepcopy(made[0].g)
    errors = checked_cycles(made, kept)[1:]
    others = rigs(shape_set, [lambda w, f=f: peers.PytorchOptimizer(w, "LookSAM", foreach=f) for f in (True, False)])
    for rig in others:
        rig.g, rig.g_s = copy.deepcopy(rig.g), copy.deepcopy(rig.g_s)

    def cycle(rig):
        for _ in range(peers.K):
            torch._foreach_copy_(rig.g, kept)
            rig.step()

    timed = [*made[1:], *others]
    errors += [float("nan")] * len(others)
    candidates = [
        Candidate(rig.stepper.name, lambda rig=rig: cycle(rig), e) for rig, e in zip(timed, errors, strict=True)
    ]
    harness.compare(benchmark, shape_set, "5 steps", "LookSAM k=5", candidates, 56 + 4 * 28)


def checked_cycles(made, kept):
    errors = []
    for rig in made:
        for _ in range(2 * peers.K):
            torch._foreach_copy_(rig.g, kept)
            rig.step(False, False)
        pairs = [(p.detach(), q.detach()) for p, q in zip(rig.stepper.params, made[0].stepper.params, strict=True)]
        worst = max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs if p.numel())
        assert worst < 1e-4, f"{rig.stepper.name} is off by {worst}"
        errors.append(worst)
    return errors


OTHERS = {
    "ASAM element": (samkern.ASAM, {"mode": "element"}, 44),
    "ASAM filter": (samkern.ASAM, {"mode": "filter"}, 44),
    "ASAM layer": (samkern.ASAM, {"mode": "layer"}, 44),
    "LookLayerSAM look": (samkern.LookLayerSAM, {"k": 1}, 60),
    "SAM unchecked": (samkern.SAM, {"nonfinite": "ignore"}, 40),
    "SAM with AdamW": (samkern.SAM, {}, 48),
    "SAM clipped": (samkern.SAM, {"max_grad_norm": 1.0}, 44),
}


@each_set
@with_stopwatch
@pytest.mark.parametrize("name", OTHERS)
def test_other_methods(benchmark, harness, shape_set, name):
    """Without peers: what a step of each method costs, against its bytes."""
    make, options, n_bytes = OTHERS[name]

    def stepper(w):
        made = peers.Ours(w, make, **options)
        if name == "SAM with AdamW":
            made.opt = samkern.SAM(made.params, torch.optim.AdamW, lr=1e-4)
            made.first, made.second = made.opt.first_step, made.opt.second_step
        return made

    (rig,) = rigs(shape_set, [stepper])
    harness.compare(benchmark, shape_set, "step", name, [Candidate("cpu", rig.step)], n_bytes)
