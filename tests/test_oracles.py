"""The oracles of schedules, learned radii and momentum climbs, by hand: closed forms on quadratics, scripted samples."""

from __future__ import annotations

import math

import pytest
import torch

from .oracles import arsam, lets, msam, schedules
from .oracles.bases import Adam, Sgd
from .oracles.sam import ASAM, SAM

NAN = math.nan


def vec(*values):
    return torch.tensor(values, dtype=torch.float64)


class Quadratic:
    """Closures of w'Hw / 2 - b'w over one weight, with a dense symmetric H."""

    def __init__(self, seed, n=4):
        generator = torch.Generator().manual_seed(seed)
        a, self.b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, n), (n,)))
        self.h = a @ a.T

    def loss(self, w):
        return w @ self.h @ w / 2 - self.b @ w

    def grad(self, w):
        return self.h @ w - self.b

    def climbed(self, w, rho):
        g = self.grad(w)
        return g + rho * self.h @ g / g.norm()

    def closure(self, w):
        def closure():
            w.grad = self.grad(w.data)
            return self.loss(w.data)

        return closure


def start(n=4):
    return torch.linspace(-1, 2, n, dtype=torch.float64)


def scripted(w, *passes):
    """A closure that leaves the given gradients, pass by pass: one row of tensors, numbers or None for each."""
    rows = iter(passes)

    def closure():
        for x, value in zip(w, next(rows), strict=True):
            x.grad = None if value is None else torch.full_like(x, value) if isinstance(value, float) else value
        return torch.zeros(())

    return closure


# ---- RST and G-RST


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", (0.3, 0.3, 0.3, 0.3)),
        ("piecewise-1", (0, 0, 1, 1)),
        ("piecewise-2", (1, 1, 0, 0)),
        ("linear-up", (0, 0.25, 0.5, 1)),
        ("linear-down", (1, 0.75, 0.5, 0)),
        ("cosine-up", (0, 0.5 - math.sqrt(2) / 4, 0.5, 1)),
        ("cosine-down", (1, 0.5 + math.sqrt(2) / 4, 0.5, 0)),
        (lambda s: s**2, (0, 0.0625, 0.25, 1)),
    ],
)
def test_probabilities(schedule, expected):
    w = [start()]
    oracle = schedules.RST(w, Sgd(w, 0.1), schedule=schedule, p=0.3, total_steps=8)
    for oracle.t, p in zip((0, 2, 4, 9), expected, strict=True):
        assert oracle.probability() == pytest.approx(p, abs=1e-15)


def test_random_numbers_of_steps():
    assert [round(schedules.uniform(0, t), 5) for t in range(4)] == [0.39905, 0.51668, 0.02493, 0.94008]


@pytest.mark.parametrize(
    ("gamma", "p", "expected"),
    [(0, 0.9, 0), (1, 0.9, 1), (2.0, 0.9, 2), ("match", 0.5, 2), ("match", 1, 1), ("match", 0.0001, 4)],
)
def test_grst_mixes(gamma, p, expected):
    problem, w = Quadratic(1), [start()]
    oracle = schedules.GRST(w, Sgd(w, 0.1), 0.2, gamma=gamma, p=p)
    oracle.looks = lambda: True
    oracle.step(problem.closure(w[0]))
    g, g_s = problem.grad(start()), problem.climbed(start(), 0.2)
    assert torch.allclose(w[0], start() - 0.1 * (g + expected * (g_s - g)), rtol=1e-12, atol=0)


def test_grst_without_one_of_the_gradients():
    w = [start(), start()]
    oracle = schedules.GRST(w, Sgd(w, 1.0), p=1.0, gamma=3.0)
    oracle.step(scripted(w, (None, 1.0), (2.0, None)))
    assert torch.equal(w[0], start() - 6)
    assert torch.equal(w[1], start())


# ---- ARSAM's controller


def controller(samples=(), **options):
    made = arsam.RateController(**{"window": 12, "blocks": 2, "max_rate": 0.5, "warmup_steps": 0, **options})
    for sample in samples:
        made.record(*sample) if isinstance(sample, tuple) else made.record(sample, sample)
    return made


def after_a_window(samples, s=2.0, **options):
    made = controller(samples, **options)
    made.S = s
    made.end_window()
    return made.S


@pytest.mark.parametrize("change", ["relative", "log"])
@pytest.mark.parametrize(
    "samples",
    [[0.1] * 11, [0.0] * 9, [0.7], [], [None, None], [NAN, (1.0, NAN), (math.inf, 1.0), None]],
    ids=["constant", "zeros", "one", "none", "skipped", "not finite"],
)
def test_what_leaves_the_rate(samples, change):
    assert after_a_window(samples, change=change) == 2.0


@pytest.mark.parametrize("change", ["relative", "log"])
def test_doubling_is_clipped(change):
    """q doubles: r is 1, or log 2. Sorted doubling x of two runs: the variance grows at least as fast, so v is 1."""
    r = 1 if change == "relative" else math.log(2)
    assert after_a_window([(1.0, 2.0**j) for j in range(6)], change=change) == pytest.approx(2 * (1 + 0.13 * r))
    assert after_a_window([4.0**j for j in range(6)], change=change) == pytest.approx(2 * 1.26)
    assert after_a_window([(1.0, 0.5**j) for j in range(6)], s=1.0) == 1.0
    assert after_a_window([2.0**j for j in range(6)], s=5.9) == 6.0
    made = controller([1.0, 100.0, 10.0], a1=0.25)  # (99 - 0.9) / 2 is clipped as a whole
    made.end_window()
    assert pytest.approx(1.25) == made.S


def test_the_changes_that_count():
    """A term whose denominator is zero is left out; a change to zero is -1 as a ratio and nothing as a logarithm."""
    assert controller().mean_change([0.0, 3.0, 6.0, 0.0]) == (1 - 1) / 2
    assert controller(change="log").mean_change([0.0, 3.0, 6.0, 0.0]) == pytest.approx(math.log(2))
    telescoped = controller(change="log").mean_change([1.0, 5.0, 0.3, 2.0, 1.5])
    assert telescoped == pytest.approx(math.log(1.5) / 4)


def test_spread_within_runs():
    made = controller([8.0, 1.0, 4.0])
    assert made.V == []
    made.record(2.0, 0.0)  # 1 2 | 4 8
    made.record(6.0, 0.0)  # 1 2 4 | 6 8
    assert pytest.approx([(0.25 + 4) / 2, (14 / 9 + 1) / 2]) == made.V


def test_histories_hold_the_last_window():
    made = controller([float(j) for j in range(1, 30)], window=5, max_rate=1.0)
    assert made.x == made.q == [25.0, 26.0, 27.0, 28.0, 29.0]
    assert len(made.V) == 5


@pytest.mark.parametrize(("s", "n"), [(1.0, 1), (7.9, 7), (40.0, 40), (50.0, 50)])
def test_looks_in_a_window(s, n):
    made = arsam.RateController(max_rate=1.0, warmup_steps=3, seed=5)
    made.S = s
    looks = [made.decide(t) for t in range(3 + 4 * 50)]
    assert looks[:3] == [True] * 3
    assert [sum(looks[i : i + 50]) for i in range(3, 203, 50)] == [n] * 4


def test_looks_fall_everywhere():
    """One of four: each place is taken a quarter of the time, within four standard deviations."""
    made = controller(window=4, seed=1)
    looks = torch.tensor([made.decide(t) for t in range(4 * 800)]).reshape(800, 4)
    assert (looks.sum(0) - 200).abs().max() < 4 * math.sqrt(800 * 0.25 * 0.75)


def test_when_the_rate_moves():
    """Not in the warm-up; after each window, by all samples so far, those of the warm-up included."""
    made = controller(window=4, max_rate=1.0, warmup_steps=6)
    rates = []
    for t in range(6 + 3 * 4):
        made.decide(t)
        rates.append(made.S)
        made.record(1.0, 2.0**t)
    assert rates == pytest.approx([1.0] * 10 + [1.13] * 4 + [1.13**2] * 4)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"blocks": 0}, {"window": 10, "max_rate": 0.09}])
def test_rates_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        arsam.RateController(**wrong)


def test_noise_drifts_by_ratios_only():
    """Independent samples of 30 % spread: their mean relative change is positive, their mean log ratio about zero."""
    ends = {"relative": 0.0, "log": 0.0}
    for change in ends:
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            made = arsam.RateController(change=change, blocks=30)  # more than the samples have runs: no V
            for _ in range(200):
                for q in (0.3 * torch.randn(10, generator=generator, dtype=torch.float64)).exp().tolist():
                    made.record(1.0, q)
                made.end_window()
            ends[change] += made.S / 4
    assert ends["relative"] > 5 > 2 > ends["log"]


# ---- reuse of differences


def weights(n=1):
    return [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(n)]


def moves(oracle, w, *batches):
    """How far each step moves each weight, against its gradient at rate 1. A batch: rows of its passes."""
    moved = []
    for batch in batches:
        before = [x.data.clone() for x in w]
        oracle.step(scripted(w, *batch))
        moved.append([(b - x.data).item() for b, x in zip(before, w, strict=True)])
    return moved


def test_coefficients_by_age():
    w = weights()
    oracle = arsam.EveryKDifference(w, Sgd(w, 1.0), k=9)
    got = [x for (x,) in moves(oracle, w, [(2.0,), (3.0,)], *[[(2.0,)]] * 8, [(2.0,), (7.0,)], [(2.0,)])]
    assert got == pytest.approx([3, *(2 + 0.7**age for age in range(1, 7)), 2, 2, 7, 2 + 0.7 * 5])
    assert oracle.evaluations == 13


def test_differences_of_missing_gradients():
    """In the second pass only: the whole gradient is reused. In the first only: nothing. In none: the old difference."""
    w = weights(3)
    oracle = arsam.EveryKDifference(w, Sgd(w, 1.0), k=2, beta=1.0)
    looks = [(1.0, 1.0, 1.0), (5.0, 5.0, 5.0)], [(None, 1.0, None), (3.0, None, None)]
    got = moves(oracle, w, looks[0], [(1.0, 1.0, None)], looks[1], [(1.0, 1.0, 1.0)])
    assert got == [[5, 5, 5], [5, 5, 0], [3, 0, 0], [4, 1, 5]]


def test_a_skipped_look_keeps_the_difference():
    w = weights()
    oracle = arsam.EveryKDifference(w, Sgd(w, 1.0), k=3, max_age=2)
    got = moves(oracle, w, [(1.0,), (2.0,)], [(1.0,)], [(1.0,)], [(1.0,), (NAN,)], [(1.0,)])
    assert [x for (x,) in got] == pytest.approx([2, 1.7, 1.49, 0, 1.7])  # ages go on from the skipped look
    assert (oracle.skips, oracle.evaluations, oracle.t) == (1, 7, 5)


def test_no_look_no_difference():
    w = weights()
    oracle = arsam.EveryKDifference(w, Sgd(w, 1.0), k=2)
    assert moves(oracle, w, [(NAN,), (1.0,)], [(4.0,)]) == [[0], [4]]


# ---- ARSAM


def test_all_looks_are_sam():
    problem, w, v = Quadratic(1), [start()], [start()]
    oracle = arsam.ARSAM(w, Sgd(w, 0.01), window=5, max_rate=1.0, warmup_steps=3, a1=0.0, a2=0.0)
    oracle.controller.S = 5.0
    other = SAM(v, Sgd(v, 0.01))
    for _ in range(20):
        oracle.step(problem.closure(w[0]))
        other.step(problem.closure(v[0]))
    assert torch.equal(w[0], v[0])
    assert oracle.evaluations == 40


def test_a_linear_loss_is_sgd():
    w = weights()
    oracle = arsam.ARSAM(w, Sgd(w, 1.0), window=6, warmup_steps=2, beta=1.0, max_age=math.inf)
    for _ in range(30):
        oracle.step(lambda: setattr(w[0], "grad", vec(0.5)))
    assert w[0].item() == -15
    assert oracle.evaluations == 30 + 2 + 5  # one look in every window


def test_difference_and_sample_on_a_quadratic():
    problem, w = Quadratic(2), [start()]
    oracle = arsam.ARSAM(w, Sgd(w, 0.1), rho=0.3)
    oracle.step(problem.closure(w[0]))
    g = problem.grad(start())
    d = 0.3 * problem.h @ g / g.norm()
    assert torch.allclose(oracle.d[0], d, rtol=1e-9)
    assert oracle.controller.x == pytest.approx([d.norm().item()])
    assert oracle.controller.q == pytest.approx([(d.norm() / g.norm()).item()])


def test_samples_of_the_last_tensors():
    w = weights(4)
    oracle = arsam.ARSAM(w, Sgd(w, 1.0), stat_tensors=3)
    look = [(1.0, 2.0, 4.0, None), (9.0, 5.0, 8.0, None)]
    moves(oracle, w, look, [(1.0, 0.0, 0.0, 0.0), (3.0, 1.0, 1.0, 1.0)], [(1.0, 1.0, 1.0, 1.0), (NAN, 1.0, 1.0, 1.0)])
    assert oracle.controller.x == pytest.approx([5])  # neither a zero gradient nor a skipped step is a sample
    assert oracle.controller.q == pytest.approx([5 / math.sqrt(20)])
    assert oracle.evaluations == 6


def always_looks(oracle):
    oracle.controller.decide = lambda t: True
    return oracle


def test_components_sample_apart():
    """Two weights and their rest; after the warm-up each is sampled as its own age or gradient demands."""
    w = weights(3)
    options = {"warmup_steps": 1, "components": [[1]], "max_component_age": 3, "change_tol": 0.5, "beta": 0.5}
    oracle = always_looks(arsam.ARSAM(w, Sgd(w, 1.0), **options))
    assert oracle.components == [[1], [0, 2]]
    flat = (1.0, 1.0, 1.0)
    got = moves(
        oracle,
        w,
        [flat, (3.0, 5.0, 7.0)],  # the warm-up samples all
        [flat],  # nothing to sample: reuse
        [(1.0, 2.0, 1.0), (0.0, 9.0, 0.0)],  # weight 1 has changed
        [flat, (2.0, 0.0, 2.0)],  # age 3 for the rest; weight 1 has changed back, exactly by the tolerance
        [flat],
        [(1.0, 2.0, 1.0), (0.0, 4.0, 0.0)],  # age 3 for weight 1
    )
    assert got == [[3, 5, 7], [2, 3, 4], [1.5, 9, 2.5], [2, 1 + 3.5, 2], [1.5, 1 + 1.75, 1.5], [1.25, 4, 1.25]]
    assert oracle.evaluations == 6 + 4
    assert oracle.controller.x == pytest.approx([math.sqrt(4 + 16 + 36), 7, math.sqrt(2), 2])


def test_components_by_age_alone():
    w = weights(2)
    w[1].requires_grad_(False)
    options = {"warmup_steps": 0, "components": "tensor", "max_component_age": 2, "change_tol": None}
    oracle = always_looks(arsam.ARSAM(w, Sgd(w, 1.0), **options))
    assert oracle.components == [[0]]  # a frozen weight would only ask for passes
    for t in range(4):
        oracle.step(scripted(w, (10.0**t, None), (1.0, None)))
    assert oracle.evaluations == 6


def test_samples_of_components_outside_the_statistics():
    w = weights(2)
    options = {"warmup_steps": 1, "components": "tensor", "stat_tensors": 1}
    oracle = always_looks(arsam.ARSAM(w, Sgd(w, 1.0), **options))
    moves(oracle, w, [(1.0, 1.0), (2.0, 3.0)], [(9.0, 1.0), (4.0, NAN)], [(9.0, 9.0), (4.0, 5.0)])
    assert oracle.controller.x == pytest.approx([2, 4])
    assert oracle.skips == 0  # what is not sampled is not looked at


def test_a_skipped_look_of_components():
    """Ages go on, norms and differences stay: a change is still measured from the last good sample."""
    w = weights(2)
    oracle = always_looks(arsam.ARSAM(w, Sgd(w, 1.0), warmup_steps=1, components="tensor", beta=0.5))
    batches = [(1.0, 1.0), (3.0, 5.0)], [(8.0, 1.0), (NAN, 0.0)], [(1.0, 1.0)], [(NAN, 8.0)]
    got = moves(oracle, w, *batches)
    assert got == [[3, 5], [0, 0], [1 + 1, 1 + 1], [0, 0]]
    assert (oracle.evaluations, oracle.skips) == (6, 2)  # the norms are read, so the last step does not look


def test_components_are_named_once():
    w = weights(3)
    with pytest.raises(ValueError, match="twice"):
        arsam.ARSAM(w, Sgd(w, 1.0), components=[[0, 1], [1]])
    assert arsam.ARSAM(w, Sgd(w, 1.0), components=[[2, 0], [1]]).components == [[2, 0], [1]]


# ---- LETS


def loss_gap(oracle_of, rho, train, val):
    """J as a function of the radius, through a whole step."""
    w = [start()]
    oracle_of(w, Sgd(w, 0.05), rho).step(train.closure(w[0]))
    return (val.loss(w[0]) - train.loss(w[0])).item() ** 2 / 2


@pytest.mark.parametrize(("method", "plain"), [(lets.LETSSAM, SAM), (lets.LETSASAM, ASAM)])
def test_hypergradient(method, plain):
    train, val, h = Quadratic(1), Quadratic(2), 1e-4
    w = [start()]
    oracle = method(w, Sgd(w, 0.05), 0.2, beta=1e-3, period=1, rho_max=1e9)
    oracle.step(train.closure(w[0]), val.closure(w[0]))
    expected = (loss_gap(plain, 0.2 + h, train, val) - loss_gap(plain, 0.2 - h, train, val)) / (2 * h)
    assert oracle.dJ == pytest.approx(expected, rel=1e-6)
    assert oracle.radius == pytest.approx(0.2 - 1e-3 * expected, rel=1e-9)
    assert oracle.evaluations == 4


def test_diagonal_hypergradient():
    """w = (1, 2), g = (3, 4), |g| = 5, rho = 1: eps = (0.6, 0.8); g_s = (2, 1): dw = -0.1 (4 * 0.6, 1 * 0.8)."""
    w = [vec(1, 2)]
    train = scripted(w, [vec(3, 4)], [vec(2, 1)], [vec(1, 1)])
    oracle = lets.LETSSAM(w, Sgd(w, 0.1), 1.0, beta=0.5, period=1, rho_max=2.0, hyper="diag")

    def val():
        w[0].grad = vec(3, 6)
        return vec(2.0).sum()

    oracle.step(train, val)
    assert oracle.dJ == pytest.approx(2 * (2 * -0.24 + 5 * -0.08))
    assert oracle.radius == pytest.approx(1 + 0.88)


def radii(oracle, w, n, train=(1.0, 2.0), val=3.0):
    """The radius after each of n steps of constant gradients: the second is not the first, so every look moves it."""
    got = []
    for _ in range(n):
        passes = train if oracle.looks() else train[:1]

        def val_closure():
            w[0].grad = vec(val)
            return vec(val).sum()

        oracle.step(scripted(w, *[(x,) for x in (*passes, 1.0)]), val_closure)
        got.append(oracle.radius)
    return got


def test_period_and_clamp():
    """dw = -(2 - 1) / 0.1 * 0.01, so dJ = 3 * 2 * -0.1, and the radius rises by 0.06 at first."""
    w = weights()
    oracle = lets.LETSSAM(w, Sgd(w, 0.01), 0.1, period=3, rho_max=0.18)
    assert radii(oracle, w, 9) == pytest.approx([0.1] * 2 + [0.16] * 3 + [0.18] * 4)
    assert oracle.evaluations == 9 * 2 + 3 * 2
    oracle = lets.LETSSAM(w, Sgd(w, 0.01), 0.1, period=2, rho_min=0.05)
    assert radii(oracle, w, 2, train=(2.0, 1.0))[1] == 0.05
    assert oracle.rho == [0.05]


@pytest.mark.parametrize("bad", [{"train": (NAN, 1.0)}, {"train": (1.0, NAN)}, {"val": NAN}, {"val": math.inf}])
def test_a_radius_survives_what_is_not_finite(bad):
    w = weights()
    oracle = lets.LETSSAM(w, Sgd(w, 0.01), 0.1, period=1)
    assert radii(oracle, w, 1, **bad) == [0.1]
    assert oracle.evaluations == 4
    assert radii(oracle, w, 1) == pytest.approx([0.16])


def test_a_radius_waits_for_a_look():
    """Looks at 0, 3, 6; due after 1, 3, 5, 7: moved after 3, once, and after 6."""
    w = weights()
    oracle = lets.LETSLookSAM(w, Sgd(w, 0.01), 0.1, period=2, k=3, rho_max=9.0)
    got = radii(oracle, w, 9)
    assert got[:3] == [0.1] * 3
    assert got[3] == got[4] == got[5] == pytest.approx(0.16)
    assert got[6] == got[7] == got[8] > 0.17
    assert oracle.evaluations == 9 + 3 + 2 * 2


def test_a_radius_is_shared():
    w = weights(3)
    oracle = lets.LETSSAM(w, Sgd(w, 0.01), [0.1, 0.0, 0.1], period=1)

    def val():
        for x in w:
            x.grad = vec(3)
        return 3.0

    oracle.step(scripted(w, (1.0,) * 3, (2.0,) * 3, (1.0,) * 3), val)
    assert oracle.rho == pytest.approx([0.28, 0.0, 0.28])  # the unperturbed weight moves too, and counts


def test_beta_zero_is_sam():
    problem, val, w, v = Quadratic(1), Quadratic(2), [start()], [start()]
    oracle, other = lets.LETSSAM(w, Sgd(w, 0.01), beta=0.0, period=2), SAM(v, Sgd(v, 0.01))
    for _ in range(6):
        oracle.step(problem.closure(w[0]), val.closure(w[0]))
        other.step(problem.closure(v[0]))
    assert torch.equal(w[0], v[0])


# ---- MSAM


@pytest.mark.parametrize(
    "base", [lambda w: Sgd(w, 0.01, momentum=0.9, nesterov=True), lambda w: Adam(w, 0.01)], ids=["SGD", "Adam"]
)
def test_msam_climbs_against_the_momentum(base):
    problem, w, v = Quadratic(1), [start()], [start()]
    plain = base(v)
    oracle = msam.MSAM(w, base(w), 0.3)
    oracle.step(problem.closure(w[0]))
    plain.step([problem.grad(v[0])])
    assert torch.equal(w[0], v[0])  # no momentum yet
    for _ in range(3):
        momentum = next(iter(plain.state[0].values()))
        plain.step([problem.grad(v[0] - 0.3 * momentum / momentum.norm())])
        oracle.step(problem.closure(w[0]))
        assert torch.allclose(w[0], v[0], rtol=1e-9)
    assert (oracle.evaluations, oracle.t) == (4, 4)


def test_msam_skips_and_leaves_out():
    """A weight without a gradient is perturbed and comes back; one with rho = 0 has no part in the norm."""
    w = weights(3)
    oracle = msam.MSAM(w, Sgd(w, 1.0, momentum=0.5), [1.0, 0.0, 1.0])
    moves(oracle, w, [(3.0, 7.0, 4.0)])
    assert [None if x is None else round(x.item(), 9) for x in oracle.eps(oracle.momentum())] == [-0.6, None, -0.8]
    assert moves(oracle, w, [(1.0, 1.0, NAN)], [(1.0, 1.0, None)]) == [[0, 0, 0], [2.5, 4.5, 0]]
    assert (oracle.skips, oracle.evaluations) == (1, 3)


def test_msam_needs_momentum():
    with pytest.raises(ValueError, match="no momentum"):
        msam.MSAM([start()], Sgd([start()], 0.1))


# ---- m-SAM


def test_micro_batches_climb_apart():
    problems, w = [Quadratic(seed) for seed in (1, 2, 3)], [start()]
    oracle = msam.MicroSAM(w, Sgd(w, 0.1), 0.2)
    oracle.step([p.closure(w[0]) for p in problems])
    u = sum(p.climbed(start(), 0.2) for p in problems) / 3
    assert torch.allclose(w[0], start() - 0.1 * u, rtol=1e-12)
    assert oracle.evaluations == 2


@pytest.mark.parametrize("n", [1, 2, 4])
def test_equal_micro_batches_are_sam(n):
    problem, w, v = Quadratic(1), [start()], [start()]
    oracle, other = msam.MicroASAM(w, Sgd(w, 0.1)), ASAM(v, Sgd(v, 0.1))
    for _ in range(3):
        oracle.step([problem.closure(w[0])] * n)
        other.step(problem.closure(v[0]))
    assert torch.equal(w[0], v[0])


def test_micro_batches_with_holes():
    w = weights(3)
    oracle = msam.MicroSAMk(w, Sgd(w, 1.0), k=2)
    batches = [
        ([(1.0, 1.0, None), (4.0, None, None)], [(1.0, 1.0, None), (6.0, 8.0, None)]),
        ([(3.0, None, 1.0)], [(5.0, None, None)]),
        ([(1.0, 1.0, 1.0), (1.0, 1.0, 1.0)], [(1.0, NAN, 1.0), (1.0, 1.0, 1.0)]),
    ]
    got = []
    for batch in batches:
        before = [x.data.clone() for x in w]
        oracle.step([scripted(w, *rows) for rows in batch])
        got.append([(b - x.data).item() for b, x in zip(before, w, strict=True)])
    assert got == [[5, 4, 0], [4, 0, 0.5], [0, 0, 0]]
    assert (oracle.evaluations, oracle.skips) == (5, 1)
