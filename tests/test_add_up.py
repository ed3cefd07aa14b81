"""Half-steps on parts of tensors, on every backend: what another process has is added to the sums, and nothing else differs.

The other process is a thread. One of the two runs at a time, and gives way to the other where it waits for its sums.
"""

from __future__ import annotations

import math
import queue
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import samkern
from samkern.shards import Shards

from . import emulator, sharded
from .lists import BF16, FP32, FP64, affordable, same_bits
from .sharded import Case
from .test_fsdp import ADAM, ADAMW, two_radii


class Pair:
    """Two functions that are run in turns."""

    def __init__(self):
        self._me = threading.local()
        self._turn = threading.Condition()
        self.n_sums = 0

    def add_up(self, sums):
        """Adds what the other one has here."""
        me = self._me.index
        self.n_sums += 1
        self._received[1 - me].put(sums.clone())
        with self._turn:
            self._give_way(me)
            assert self._turn.wait_for(lambda: self._whose == me, timeout=30)
        sums += self._received[me].get_nowait()

    def run(self, functions):
        self._whose, self._done = 0, [False, False]
        self._received = [queue.Queue(), queue.Queue()]
        results, errors = [None, None], []

        def run_one(me):
            self._me.index = me
            with self._turn:
                self._turn.wait_for(lambda: self._whose == me)
            try:
                results[me] = functions[me]()
            except BaseException as error:
                errors.append(error)
            with self._turn:
                self._done[me] = True
                self._give_way(me)

        threads = [threading.Thread(target=run_one, args=(me,)) for me in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def _give_way(self, me):
        if not self._done[1 - me]:
            self._whose = 1 - me
        self._turn.notify_all()


@pytest.fixture
def pair(monkeypatch):
    """While functions run in turns, every tensor is a part of one that both have."""
    pair = Pair()
    run = pair.run

    def init(self, tensors):
        self._places, self._groups = {"both": list(range(len(tensors)))}, {}

    def run_on_parts(functions):
        with monkeypatch.context() as patch:
            patch.setattr("samkern.plan.is_sharded", lambda x: True)
            patch.setattr(Shards, "__init__", init)
            patch.setattr(Shards, "add_up", lambda self, sums: pair.add_up(sums))
            return run(functions)

    pair.run = run_on_parts
    return pair


def with_a_mask(cls):
    """``cls`` with a mask that stays as it is."""

    def make(params, base, **options):
        mask = samkern.optim.FisherMask(0.5, fisher="batch", refresh_interval=None)
        opt = cls(params, base, mask=mask, **options)
        state = opt.state_dict()
        state["samkern"]["masks"] = {
            i: sharded.noise_like(p, 50 + i) > 0 for i, p in enumerate(opt.param_groups[0]["params"])
        }
        opt.load_state_dict(state)
        return opt

    return make


CASES = {
    "SAM": Case(samkern.SAM, {"rho": 0.1}, groups=two_radii),
    "inf": Case(samkern.SAM, {"rho": 0.01, "p": math.inf}, poisoned=(1, 0)),
    "clipped": Case(samkern.SAM, {"rho": 0.1, "max_grad_norm": 0.5}, poisoned=(1, 1), **ADAM),
    "scaled": Case(samkern.LookSAM, {"rho": 0.1, "k": 2, "max_grad_norm": 2.0}, scale=512.0),
    "element": Case(samkern.ASAM, {"rho": 0.5, "mode": "element"}, dtypes=(FP32,), **ADAMW),
    "filter": Case(samkern.ASAM, {"rho": 0.5, "mode": "filter"}),
    "layer": Case(samkern.ASAM, {"rho": 0.5, "mode": "layer", "eta": 0.1}, groups=two_radii),
    "LookSAM": Case(samkern.LookSAM, {"rho": 0.1, "k": 2}, missing=(2, 1), **ADAMW),
    "LookSAM_tensor": Case(samkern.LookSAM, {"rho": 0.1, "k": 2, "scope": "tensor", "min_sine": 0.04}),
    "lars": Case(samkern.LookLayerSAM, {"rho": 0.01, "k": 2, "layer_mode": "lars"}),
    "trust": Case(samkern.LookLayerSAM, {"rho": 0.01, "k": 2, "layer_mode": "trust", "trust_clip": 5.0}),
    "blend": Case(samkern.GRST, {"rho": 0.1, "p": 1.0, "gamma": 2.0}),
    "difference": Case(
        samkern.ARSAM, {"rho": 0.1, "window": 3, "warmup_steps": 0, "max_rate": 0.7}, dtypes=(FP32, BF16)
    ),
    "momentum": Case(samkern.MSAM, {"rho": 0.3}),
    "mask": Case(with_a_mask(samkern.SAM), {"rho": 0.1}, poisoned=(1, 1)),
    "mask_renormalised": Case(with_a_mask(samkern.ASAM), {"rho": 0.5, "mode": "element"}),
}


def halves(x):
    """The first has more, or all, of the rows."""
    middle = (len(x) + 1) // 2
    return slice(0, middle), slice(middle, None)


def test_two_processes_have_what_one_has(backend, pair):
    """Every climb and every mix, clipping, loss scales, masks, missing and bad gradients."""
    n_steps = affordable(backend, 6, 3)
    for name, case in CASES.items():
        case = replace(case, n_steps=n_steps)
        values = sharded.initial(case)
        lists = [[sharded.rows_of(x, halves(x)[me]) for x in values] for me in range(2)]
        whole = sharded.left_by(case, [nn.Parameter(x.clone()) for x in values], backend)
        ours = pair.run([lambda parts=parts, case=case: sharded.left_by(case, parts, backend) for parts in lists])
        exact = case.dtypes == (FP64,) and backend != "cuda"
        tolerance = {FP64: 1e-12 if exact else 1e-7, FP32: 1e-6, BF16: 1e-2}
        for left in ours:
            assert [r[0] for r in left.reports] == [r[0] for r in whole.reports], name
            assert [r[3] for r in left.reports] == [r[3] for r in whole.reports], name
            for row, expected in zip(left.reports, whole.reports, strict=True):
                assert row[1:3] == pytest.approx(expected[1:3], rel=1e-12 if exact else 1e-5, nan_ok=True), name
            assert torch.allclose(left.cache_norm, whole.cache_norm, rtol=1e-12 if exact else 1e-5), name
        for first, second, x, before in zip(*(left.weights for left in ours), whole.weights, values, strict=True):
            eps = tolerance[x.dtype]
            assert torch.allclose(torch.cat([first, second]), x, rtol=eps, atol=eps), name
            assert not torch.equal(x, before), name
        assert whole.skips == (case.poisoned is not None), name
    assert pair.n_sums > 2 * len(CASES)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_nothing_to_add_changes_nothing(backend, dtype):
    """Bitwise, though what is one launch without it is several then."""
    case = replace(CASES["LookSAM"], dtypes=(dtype,), n_steps=3, missing=None)
    results, calls = [], []
    for add_up in (None, calls.append):
        params = [nn.Parameter(x) for x in sharded.initial(case)]
        opt = case.make(params, backend=backend)
        opt._keeper.plan().add_up_with(add_up)
        take = emulator.load().take_launches if backend == "cuda" and not torch.cuda.is_available() else lambda: 0
        take()
        sharded.take_steps(case, params, range(case.n_steps), opt)
        results.append(([p.detach() for p in params], take()))
    (alone, launches), (among_others, more_launches) = results
    assert same_bits(alone, among_others)
    assert len(calls) == 5  # two looks, one reuse
    assert all(sums.dtype == FP64 and sums.shape[-1] == len(sharded.SHAPES) + 1 for sums in calls)
    if launches:
        assert (launches, more_launches) == (5, 15)
