"""Averages of weights that an update takes along: means and exponential ones, of what is stored, whatever the step is made of.

Plans are held against the formula on the weights that they leave, bit by bit, and against stored snapshots in float64;
optimizers against a twin that averages nothing and snapshots of that.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

import samkern
from samkern import reference
from samkern.backends import native
from samkern.optim.companion import RunningAverage
from samkern.options import AverageOptions, Base, Mix, MixOptions, Report, Scope
from samkern.plan import Kept, make_plan

from . import emulator, sharded
from .lists import BF16, DTYPES, FP16, FP32, FP64, affordable, clones, dtype_name, same_bits
from .methods import BASES, base_named, method_named
from .problems import closure_for, make_net, train, weights
from .test_mixes import BLEND, DIFFERENCE, SGD, Run

KINDS = {"mean": (None, False), "exponential": (0.7, False), "warmed_up": (0.999, True), "copy": (0.0, False)}
LOOK, REUSE = MixOptions(Mix.DECOMPOSE, Scope.TENSOR), MixOptions(Mix.REUSE, Scope.TENSOR, alpha=[0.7, 0.5])
PLAIN = MixOptions()
# Steps of all kinds: tensor 1 never has a gradient, 4 no second one, 5 no first one, 6 once none at all.
STEPS = (
    {"mix": LOOK, "looks": True, "missing": ((1, 5), (1, 4))},
    {"mix": REUSE, "looks": False, "missing": ((1, 6), ()), "clip": 0.5},
    {"mix": PLAIN, "looks": True, "missing": ((1,), (1,)), "clip": 0.5, "scale": 2.0**10},
    {"mix": PLAIN, "looks": True, "missing": ((1,), (1,)), "bad": True},
    {"mix": BLEND, "looks": True, "missing": ((1,), (1, 4)), "check": False},
    {"mix": PLAIN, "looks": False, "missing": ((1,), ()), "bad": True},
    {"mix": PLAIN, "looks": True, "missing": ((1,), (1,)), "inf": 1.0, "check": False},
    {"mix": DIFFERENCE, "looks": True, "missing": ((1,), (1,)), "inf": 0.0},
    {"mix": PLAIN, "looks": False, "missing": ((1,), ()), "check": False},
)
N_TAKEN = sum(not step.get("bad") and not step.get("inf") for step in STEPS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def expected_average(snapshots, decay, warmup):
    """By float64, from the definition: of the snapshots of one tensor."""
    snapshots = [x.double() for x in snapshots]
    if decay is None:
        return torch.stack(snapshots).mean(0)
    average = snapshots[0]
    for m, x in enumerate(snapshots[1:], 1):
        bound = min(decay, (1 + m) / (10 + m)) if warmup else decay
        average = bound * average + (1 - bound) * x
    return average


class Averaging(Run):
    """A plan whose updates take the weights into averages that lie amid canaries, and hold NaN before."""

    def __init__(self, backend, base, dtypes, kind, largest=0, **options):
        super().__init__(backend, base, dtypes, largest or affordable(backend, 70_000, 4_500), **options)
        dtype = {FP64: FP64}
        self.averages = self.guard(torch.full(p.shape, math.nan, dtype=dtype.get(p.dtype, FP32)) for p in self.params)
        for i, average in enumerate(self.averages):
            self.plan.bind_average(i, average)
        self.taken = torch.zeros(1, dtype=torch.int64)
        self.average = AverageOptions(self.taken, *KINDS[kind])
        self.snapshots = []

    def take(self, step):
        """A step; the averages have to be what the formula makes of the weights that it leaves."""
        before, weights_before, m = clones(self.averages), clones(self.params), int(self.taken)
        gain = reference.average_gain(*self.average)
        self.step(**step, average=self.average)
        skipped = bool((self.reports[-1][Report.SKIPPED_FIRST :] != 0).any())
        assert skipped == bool(step.get("bad") or step.get("inf"))
        if skipped:
            assert same_bits(clones(self.params), weights_before)
        else:
            reference.average(before, clones(self.params), gain)
            self.snapshots.append(clones(self.params))
        assert same_bits(self.averages, before)
        assert int(self.taken) == m + (not skipped)


# ---- plans

DTYPE_LISTS = [(FP32,), (BF16,), (FP16,), (FP64,), DTYPES]
# Every kind with every dtype, and every base with either.
CELLS = [
    (kind, dtypes, ("SGD", "AdamW")[(i + j) % 2])
    for i, kind in enumerate(KINDS)
    for j, dtypes in enumerate(DTYPE_LISTS)
]


@pytest.mark.parametrize(
    ("kind", "dtypes", "base"), CELLS, ids=lambda x: x if isinstance(x, str) else "_".join(map(dtype_name, x))
)
def test_of_every_kind_of_step(kind, dtypes, base, backend):
    run = Averaging(backend, base, dtypes, kind, offset=1 if kind == "copy" else 0)
    for step in STEPS:
        run.take(step)
    assert int(run.taken) == N_TAKEN
    assert int(run.kept.skips) == len(STEPS) - N_TAKEN
    for i, average in enumerate(run.averages):
        wanted = expected_average([taken[i] for taken in run.snapshots], *KINDS[kind])
        error = 1e-14 if run.params[i].dtype == FP64 else 1e-6
        assert (average.double() - wanted).norm() <= error * wanted.norm()
    assert run.borders_intact()


def test_averages_change_nothing_else(fast):
    """And those that are bound stay where a step does not ask for them; a tensor without one has none."""
    for base in ("SGD", "AdamW"):
        runs = [Averaging(fast, base, DTYPES, "mean", 4_500) for _ in range(2)]
        runs[1].plan.bind_average(3, None)
        for t, step in enumerate(STEPS):
            runs[0].step(**step)
            runs[1].step(**step, average=runs[1].average if t % 2 == 0 else None)
        assert same_bits(clones(runs[0].params), clones(runs[1].params))
        assert same_bits(runs[0].tensors(), runs[1].tensors())
        assert same_bits(runs[0].reports, runs[1].reports)
        assert all(bool(x.isnan().all()) for x in [*runs[0].averages, runs[1].averages[3]])
        assert int(runs[0].taken) == 0
        assert int(runs[1].taken) == sum(not s.get("bad") and not s.get("inf") for s in STEPS[::2])


def test_the_same_bits_by_any_number_of_threads():
    """And as the reference has them, SGD from the same gradients without sums between; large enough for all threads."""
    if native is None:
        pytest.skip("samkern._C is not built")
    results, before = [], torch.get_num_threads()
    for n_threads in (1, 2, 3, "reference"):
        torch.set_num_threads(before if n_threads == "reference" else n_threads)
        try:
            run = Averaging("reference" if n_threads == "reference" else "cpu", "SGD", DTYPES[1:], "mean", 150_000)
            for step in (STEPS[-1], {"mix": PLAIN, "looks": False, "clip": 0.0}):
                run.take(step)
        finally:
            torch.set_num_threads(before)
        results.append(run.averages)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=dtype_name)
def test_gains_that_are_hard_to_hold(dtype, backend):
    """Counts beyond the whole numbers of float32 and float64; a gain that is 1 in float32 only, and so is no copy."""
    w = nn.Parameter(torch.randn(3, 5).to(dtype))
    plan, average = make_plan(backend, [w], [0], Kept([w])), torch.randn(3, 5).to(reference.math_dtype(dtype))
    plan.bind_state({}, ("momentum_buffer",))
    plan.bind_average(0, average)
    for m, decay, warmup in [(2**53 + 1, None, False), (2**30, 1 - 1e-9, True), (3, 1e-12, False), (7, 1.0, True)]:
        taken, expected = torch.tensor([m]), average.clone()
        options, w.grad = AverageOptions(taken, decay, warmup), torch.randn(3, 5).to(dtype)
        gain, report = reference.average_gain(*options), torch.zeros(len(Report), dtype=FP64)
        plan.update(Base.SGD, [SGD._replace(momentum=0.0)], PLAIN, False, True, 0.0, report, average=options)
        reference.average([expected], [w.detach()], gain)
        assert same_bits([average], [expected])
        assert int(taken) == m + 1


@pytest.mark.parametrize(
    ("average", "said"),
    [
        (torch.zeros(2, 3, dtype=FP64), r"torch.float32 of shape|Float|float"),
        (torch.zeros(3, 2), r"shape [\(\[]2, 3[\)\]]"),
        (torch.zeros(3, 2).t(), r"strides [\(\[]3, 1[\)\]]"),
    ],
    ids=["dtype", "shape", "strides"],
)
def test_what_is_no_average_of_a_parameter(average, said, backend):
    for dtype in (FP32, BF16):
        p = nn.Parameter(torch.ones(2, 3, dtype=dtype))
        plan = make_plan(backend, [p], [0], Kept([p]))
        with pytest.raises(ValueError, match=rf"the average of parameter 0 must be .*{said}"):
            plan.bind_average(0, average.to(p.device))


def test_only_with_a_fused_base(backend):
    p = nn.Parameter(torch.ones(2))
    p.grad, report = torch.ones(2), torch.zeros(len(Report), dtype=FP64)
    plan = make_plan(backend, [p], [0], Kept([p]))
    with pytest.raises(ValueError, match="only with a fused base"):
        plan.update(Base.NONE, [], PLAIN, False, True, 0.0, report, average=AverageOptions(torch.zeros(1).long()))
    assert p.tolist() == [1, 1]
    if backend != "reference":
        with pytest.raises(ValueError, match="taken must be an int64 tensor of one entry"):
            plan.update(Base.SGD, [SGD], PLAIN, False, True, 0.0, report, average=AverageOptions(torch.zeros(1)))


@pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
def test_one_launch_and_any_interleaving():
    """On any number of blocks, in one launch or several: the same bits, and the count goes up once."""
    results = []
    with emulator.running() as device:
        for seed, n_blocks, one_launch in [(1, 1, True), (2, 5, True), (3, 3, False)]:
            device.configure(seed=seed, n_blocks=n_blocks, one_launch=one_launch)
            for base, dtypes in (("SGD", (FP32,)), ("AdamW", (FP32, BF16)), ("SGD", (BF16,))):
                run = Averaging("cuda", base, dtypes, "warmed_up", 20_000)
                for step in STEPS[:4]:
                    device.take_launches()
                    run.take(step)
                    reduces = 2 if step["looks"] else 1
                    assert not one_launch or device.take_launches() == reduces
                results.append(run.averages)
    for cell in range(3):
        assert all(same_bits(results[cell], other) for other in results[cell::3])


# ---- optimizers


class Average(RunningAverage):
    """On every ``every``-th step."""

    def __init__(self, decay=None, warmup=False, every=1):
        self.decay, self.warmup, self.every = decay, warmup, every
        self.taken, self.t, self.averages = torch.zeros(1, dtype=torch.int64), 0, {}

    def due(self):
        return AverageOptions(self.taken, self.decay, self.warmup) if (self.t + 1) % self.every == 0 else None

    def tensors(self, params):
        for p in params:
            if p not in self.averages:
                self.averages[p] = torch.full_like(
                    p, math.nan, dtype=reference.math_dtype(p.dtype), requires_grad=False
                )
        return [self.averages[p] for p in params]

    def add(self, params, skip=None):
        skip = torch.tensor(False) if skip is None else skip
        reference.average(
            self.tensors(params), [p.detach() for p in params], reference.average_gain(*self.due()), skip=skip
        )
        self.taken += ~skip

    def settle(self):
        self.t += 1


def beside_a_twin(make, average, steps, dtype=FP32, make_closure=closure_for, form=torch.contiguous_format):
    """Trains with an average and without; the same weights. Returns the snapshots that were due, and the optimizer."""
    net, twin = (make_net(dtype).to(memory_format=form) for _ in range(2))
    opt, plain = make(net.parameters()), make(twin.parameters())
    opt.attach(average)
    snapshots = []
    for t in range(steps):
        due, skips = average.due() is not None, plain.skips
        opt.step(make_closure(net, t, opt.zero_grad, dtype))
        plain.step(make_closure(twin, t, plain.zero_grad, dtype))
        assert same_bits(weights(net), weights(twin))
        if due and plain.skips == skips:
            snapshots.append(weights(twin))
    assert int(average.taken) == len(snapshots)
    error = 1e-13 if dtype == FP64 else 1e-6
    for i, x in enumerate(average.tensors(list(net.parameters()))):
        wanted = expected_average([taken[i] for taken in snapshots], average.decay, average.warmup)
        assert x.stride() == list(net.parameters())[i].stride()
        assert (x.double() - wanted).norm() <= error * wanted.norm()
    return snapshots, opt


def sometimes_nan(net, t, zero_grad, dtype):
    closure = closure_for(net, t, zero_grad, dtype)

    def run():
        loss = closure()
        if t % 3 == 1:
            net.head.bias.grad[0] = math.nan
        if t % 3 == 2:
            net.conv2.weight.grad = None
        return loss

    return run


@torch.enable_grad()
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
@pytest.mark.parametrize("name", ["SAM", "LookSAM", "ARSAM"])
def test_of_an_optimizer(name, base, backend):
    """Of every base, one without a fused update too; a frozen parameter and one without gradients take part."""
    make = partial(method_named(name).make, base=base, backend=backend)
    dtype = {"SAM": FP32, "LookSAM": FP64, "ARSAM": BF16}[name]
    beside_a_twin(make, Average(), affordable(backend, 8, 4), dtype)


@torch.enable_grad()
@pytest.mark.parametrize("base", ["momentum", "AdamW", "own_step"])
def test_skipped_and_missing_gradients(base, backend):
    make = partial(method_named("SAM").make, base=base_named(base), backend=backend, max_grad_norm=0.5)
    _, opt = beside_a_twin(make, Average(0.9, True, every=2), 8, make_closure=sometimes_nan)
    assert opt.skips == 3


@torch.enable_grad()
def test_channels_last(backend):
    make = partial(method_named("SAM").make, base=base_named("momentum"), backend=backend)
    beside_a_twin(make, Average(0.5), 3, form=torch.channels_last)


@torch.enable_grad()
def test_one_pass(backend):
    """MSAM's, whose update keeps sums of the momentum."""
    beside_a_twin(
        lambda p: samkern.MSAM(p, torch.optim.SGD, lr=0.02, momentum=0.9, rho=0.3, backend=backend), Average(), 4
    )


@torch.enable_grad()
def test_two_averages_and_another_plan(backend):
    """One of them in the pass, the other after it; a group that comes later makes another plan, which is told of them."""
    net, mean, other, snapshots = make_net(FP32), Average(), Average(0.9), []
    params = list(net.parameters())
    opt = method_named("SAM").make(params[:4], base_named("momentum"), backend=backend)
    opt.attach(mean)
    opt.attach(other)
    for t in range(4):
        if t == 2:
            opt.detach(other)
            opt.add_param_group({"params": params[4:]})
        train(net, opt, [t], FP32)
        snapshots.append(weights(net)[0])
    for average, n in ((mean, 4), (other, 2)):
        wanted = expected_average(snapshots[:n], average.decay, False)
        assert (average.averages[params[0]] - wanted).norm() <= 1e-6 * wanted.norm()
        assert int(average.taken) == n
    assert set(mean.averages) == set(params)


@torch.enable_grad()
@pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
def test_a_step_with_an_average_can_be_recorded():
    """Once it has been taken; the count is on the device, so that a replay counts on."""
    with emulator.running() as device, samkern.use_backend("cuda"):
        net, average, alive = nn.Linear(20, 1), Average(), []
        opt = method_named("SAM").make(net.parameters(), base_named("momentum"), capturable=True)
        opt.attach(average)
        x, y = torch.randn(64, 20), torch.randn(64, 1)

        def closure():
            opt.zero_grad(set_to_none=False)
            (net(x) - y).square().mean().backward()
            alive.append([p.grad for p in net.parameters()])

        for _ in range(3):
            opt.step(closure)
        device.configure(capturing=True)
        opt.step(closure)
        opt.step(closure)
    assert int(average.taken) == 5


def averages_of_parts(backend, on_ranks):
    """Of each tensor whole, after five steps, one of them skipped; each rank has some rows, or none."""
    case = sharded.Case(samkern.SAM, {"rho": 0.1}, poisoned=(2, 1), missing=(3, 0), dtypes=(FP64, FP32))
    values, average = sharded.initial(case), Average()
    if on_ranks:
        mesh, placements = sharded.rows(2)
        values = [sharded.spread(x, mesh, placements(i, x)) for i, x in enumerate(values)]
    params = [nn.Parameter(x) for x in values]
    opt = case.make(params, backend=backend)
    opt.attach(average)
    sharded.take_steps(case, params, range(case.n_steps), opt)
    return int(average.taken), [sharded.whole(x) for x in average.tensors(params)]


@torch.enable_grad()
@pytest.mark.takes(5)
@pytest.mark.parametrize("backend", ["reference", *(["cpu"] if native is not None else [])])
def test_of_parts(ranks, backend):
    taken, expected = averages_of_parts(backend, on_ranks=False)
    assert taken == 4
    for n, averages in ranks.run(2, averages_of_parts, backend, True, timeout=100):
        assert n == taken
        for x, y in zip(averages, expected, strict=True):
            error = 1e-12 if x.dtype == FP64 else 1e-6
            torch.testing.assert_close(x, y, rtol=error, atol=error)
