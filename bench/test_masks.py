"""Masks: exact selection against what torch has for it, in time and in peak memory, and what a mask costs a step.

Bytes per score by formula, fp32: topk_mask reads 16 and writes a bit, drop_grow_mask 17, fisher_accumulate 12; a masked
perturb reads a bit more than the 20 of a dense one. Peers concatenate the list first, which is part of their time and memory.
"""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch

import samkern
from samkern import ops

from . import memory, peers, shapes
from .harness import Candidate, stopwatch
from .test_half_steps import rigs

with_stopwatch = pytest.mark.benchmark(timer=stopwatch)
each_list = pytest.mark.parametrize("shape_set", [shapes.RESNET18, shapes.TINY, shapes.RAGGED], ids=attrgetter("name"))


def by_topk(scores, k):
    flat = torch.cat([x.flatten() for x in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.topk(flat, k, sorted=False).indices] = True
    return mask


def by_kthvalue(scores, k):
    """Not exact where scores are equal."""
    flat = torch.cat([x.flatten() for x in scores])
    return flat >= torch.kthvalue(flat, len(flat) - k + 1).values


def by_sort(scores, k):
    flat = torch.cat([x.flatten() for x in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return mask


def timed(run):
    def once():
        with torch.no_grad(), stopwatch.running():
            run()

    return once


@each_list
@with_stopwatch
def test_topk_mask(benchmark, harness, shape_set):
    scores = shape_set.tensors(torch.rand)
    k = shape_set.n_params // 2
    runs = {"cpu": lambda: ops.topk_mask(scores, k), "torch.topk": lambda: by_topk(scores, k)}
    runs |= {"torch.kthvalue": lambda: by_kthvalue(scores, k), "torch.sort": lambda: by_sort(scores, k)}
    expected = by_sort(scores, k)
    got = torch.cat([x.flatten() for x in ops.topk_mask(scores, k).unpack()])
    assert torch.equal(got, expected), "another mask: not timed"
    candidates = [Candidate(name, timed(run), 0.0, extra_bytes=memory.peak_of(run)) for name, run in runs.items()]
    harness.compare(benchmark, shape_set, "pass", "topk_mask", candidates, 16.125)


@each_list
@with_stopwatch
def test_drop_grow_mask(benchmark, harness, shape_set):
    g = shape_set.tensors()
    mask = ops.random_mask(g, shape_set.n_params // 2)

    def by_torch():
        flat = torch.cat([x.flatten() for x in g])
        active = torch.cat([x.flatten() for x in mask.unpack()])
        n = shape_set.n_params // 8
        active[torch.topk(flat.abs().masked_fill(~active, torch.inf), n, largest=False).indices] = False
        active[torch.topk(torch.rand_like(flat).masked_fill(active, -1), n).indices] = True
        return samkern.BitMask.pack([active])

    runs = {"cpu": lambda: ops.drop_grow_mask(mask, g, shape_set.n_params // 8), "torch.topk": by_torch}
    candidates = [Candidate(name, timed(run), 0.0, extra_bytes=memory.peak_of(run)) for name, run in runs.items()]
    harness.compare(benchmark, shape_set, "pass", "drop_grow_mask", candidates, 17.0)


@each_list
@with_stopwatch
def test_fisher_accumulate(benchmark, harness, shape_set):
    f, g = shape_set.tensors(torch.zeros), shape_set.tensors()

    def eager():
        for x, dx in zip(f, g, strict=True):
            x.mul_(0.9).addcmul_(dx, dx, value=0.1)

    def foreach():
        torch._foreach_mul_(f, 0.9)
        torch._foreach_addcmul_(f, g, g, value=0.1)

    runs = {"cpu": lambda: ops.fisher_accumulate(f, g, keep=0.9, gain=0.1), "eager loop": eager, "foreach": foreach}
    candidates = [Candidate(name, timed(run)) for name, run in runs.items()]
    harness.compare(benchmark, shape_set, "pass", "fisher_accumulate", candidates, 12)


@each_list
@with_stopwatch
@pytest.mark.parametrize("name", ["half", "renormalised"])
def test_masked_perturb(benchmark, harness, shape_set, name):
    """The first half-step of SSAM against that of SAM."""
    mask = samkern.optim.DynamicMask(10**6, 0.5, refresh_interval=None, renormalise=name == "renormalised")
    steppers = [
        lambda w: peers.Ours(w, samkern.SharpnessAware, perturbation=samkern.optim.Euclidean(0.05), mask=mask),
        lambda w: peers.Ours(w, samkern.SAM),
    ]
    masked, dense = rigs(shape_set, steppers)
    names = {f"cpu, masked ({name})": masked, "cpu, dense": dense}
    candidates = [Candidate(name, lambda rig=rig: rig.step(True, False)) for name, rig in names.items()]
    harness.compare(benchmark, shape_set, "perturb", f"SSAM {name}", candidates, 20.125)
