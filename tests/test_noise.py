"""Gaussian noise on every backend: the numbers bit by bit, and the pass and the half-step that add them.

Weights are whole numbers where bits are compared: their squares have one sum in every order of addition, so that norms are
equal, too.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import samkern
from samkern import BitMask, ops, reference_noise
from samkern.backends import in_interpreter
from samkern.options import Climb, ClimbGroup, Noise, Report
from samkern.plan import Kept, make_plan

from . import emulator
from .lists import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    affordable,
    borders_intact,
    chunk,
    clones,
    dtype_name,
    guarded_list,
    poisoned_like,
    same_bits,
    shapes_for,
)
from .oracles import lpf as oracle
from .test_passes import LAYOUTS

NAN, INF = math.nan, math.inf
STREAMS = {  # seed, t, draw, first
    "zero": (0, 0, 0, 0),
    "large": (2**64 - 1, 2**32 - 1, 2**24 - 1, 2**40 + 3),
    "negative seed": (-3, 5, 1, 2),
    "block 2^32": (7, 1, 2, 2**34 - 2),
}
each_stream = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
each_scale = pytest.mark.parametrize("scale", ["filter", "tensor", "given"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def whole(x):
    """Of the dtype and layout of x."""
    return torch.empty_like(x).copy_(torch.randint(-3, 4, x.shape))


def whole_list(shapes, dtype=FP32):
    return [torch.randint(-3, 4, shape).to(dtype) for shape in shapes]


def mixed(shapes):
    return [x.to(DTYPES[i % len(DTYPES)]) for i, x in enumerate(whole_list(shapes))]


def slice_norms(w):
    return torch.rand(sum(x.shape[0] if x.dim() > 0 else 1 for x in w), dtype=FP64)


def known_nans(tensors):
    return [x.nan_to_num(nan=64.0, posinf=INF, neginf=-INF) for x in tensors]


def normals(n, seed, t, draw, first, backend):
    """The numbers that a backend adds to zeros."""
    w, norms = [torch.zeros(1, n)], torch.ones(1, dtype=FP64)
    options = {"seed": seed, "t": t, "draw": draw, "first": first}
    ops.gaussian_perturb(w, poisoned_like(w), 1.0, scale="given", norms=norms, backend=backend, **options)
    return w[0][0]


def both(fast, w, std=0.3, saved=None, **options):
    """Weights and saved ones after the pass on a backend, and on the reference."""
    results = []
    for backend in (fast, "reference"):
        own, kept = clones(w), poisoned_like(w) if saved is None else clones(saved)
        ops.gaussian_perturb(own, kept, std, backend=backend, from_saved=saved is not None, **options)
        results.append([*own, *kept])
    return results


def alike(a, b):
    """Equal bits. Where norms go in, float64 but for a last place: torch does not round every square root correctly."""

    def equal(x, y):
        return torch.allclose(x, y, rtol=1e-14, atol=1e-15) if x.dtype == FP64 else same_bits([x], [y])

    return len(a) == len(b) and all(map(equal, a, b))


# ---- numbers


def test_check_values(backend):
    assert normals(4, 0, 0, 0, 0, backend).tolist() == pytest.approx([1.65118, 0.84565, -0.10210, -0.11564], abs=5e-6)
    assert [hex(x) for x in oracle.words(np.zeros(1), 0, 0, 0)[0]] == [
        hex(x) for x in samkern.philox.noise_words(torch.zeros(1, dtype=torch.int64), 0, 0, 0)[0].tolist()
    ]


@each_stream
def test_words_are_those_of_the_formula(stream):
    seed, t, draw, first = stream
    q = first // 4 + np.arange(100)
    found = samkern.philox.noise_words(torch.from_numpy(q), t, draw, seed)
    assert (found.numpy() == oracle.words(q, seed % 2**64, t, draw).astype(np.int64)).all()


@each_stream
def test_numbers_are_those_of_the_formula(backend, stream):
    seed, t, draw, first = stream
    n = affordable(backend, 50_000, 500)
    expected = torch.from_numpy(oracle.normals(n, seed % 2**64, t, draw, first))
    assert (normals(n, *stream, backend).double().cpu() - expected).abs().max() < 1e-6


def test_the_ends_of_the_line():
    """Words near 0, near 2^32 and beside every quarter of a turn, against double precision."""
    edges = torch.tensor([0, 1, 2, 2**31, 2**32 - 2**8, 2**32 - 2, 2**32 - 1, *(k << 29 for k in range(8))])
    word = torch.cat([edges, (edges - 1) % 2**32, (edges + 1) % 2**32])
    u = (word.double() + 0.5) / 2**32
    length = reference_noise._length(word).double()
    assert torch.allclose(length, (-2 * torch.where(u < 0.5, u.log(), torch.log1p(u - 1))).sqrt(), rtol=3e-7, atol=0)
    for found, exact in zip(reference_noise._turn(word), (torch.cos, torch.sin), strict=True):
        assert (found.double() - exact(2 * math.pi * u)).abs().max() < 2e-7


@each_stream
@pytest.mark.parametrize("first", range(4))
def test_numbers_have_the_bits_of_the_reference(fast, stream, first):
    """And so have the words that they are made of."""
    n = affordable(fast, 300_000, 3_000)
    place = stream[3] + first
    found = normals(n, *stream[:3], place, fast)
    seed, t, draw, _ = stream
    assert same_bits([found], [reference_noise.normals(n, t, draw, seed, place, found.device)])


def test_numbers_are_normal():
    """Mean, variance, products of neighbours and fourth moment of 10^7, within 4 standard errors."""
    backend = "cpu" if samkern.backends()["cpu"].available else "reference"
    n = 10_000_000
    z = normals(n, 1, 2, 3, 0, backend).double()
    for values, expected, variance in (
        (z, 0, 1),
        (z.square(), 1, 2),
        (z[0::2] * z[1::2], 0, 1),
        (z[:-2] * z[2:], 0, 1),
        (z.pow(4), 3, 96),
    ):
        assert abs(float(values.mean()) - expected) < 4 * math.sqrt(variance / len(values))


def test_torchs_generators_are_left_alone(backend):
    before = torch.get_rng_state()
    normals(5, 0, 0, 0, 0, backend)
    assert torch.equal(torch.get_rng_state(), before)


# ---- the pass


@pytest.mark.parametrize("scale", ["filter", "tensor"])
def test_weights_are_those_of_the_formula(backend, scale):
    w = [torch.randn(shape, dtype=FP64) for shape in [(5,), (4, 3, 2), (), (3, 0), (2, 7)]]
    before = [x.cpu().numpy().copy() for x in w]
    ops.gaussian_perturb(w, poisoned_like(w), 0.3, seed=3, t=4, draw=5, first=6, scale=scale, backend=backend)
    expected = oracle.perturbed(before, 0.3, 3, 4, 5, scale, first=6)
    assert all(np.allclose(x.cpu().numpy(), y, rtol=1e-6, atol=1e-6) for x, y in zip(w, expected, strict=True))


@each_scale
@each_dtype
@pytest.mark.parametrize("shapes", shapes_for("cpu"))
def test_equals_the_reference(fast, shapes, dtype, scale):
    w = whole_list(shapes_for(fast)[shapes], dtype)
    norms = slice_norms(w) if scale == "given" else None
    found, expected = both(fast, w, scale=scale, norms=norms, seed=1, t=2, draw=3, first=5)
    assert alike(found, expected)
    assert same_bits(found[len(w) :], w)
    assert not same_bits(found[: len(w)], w)


@each_scale
@pytest.mark.parametrize("first", [0, 3])
def test_entries_count_in_row_major_order(fast, scale, first):
    """In every layout: the same numbers for the same entries."""
    w = [whole(make()) for make in LAYOUTS.values() for _ in range(2)]
    w += [whole(torch.randn(9, 3, 2, 2, 2).permute(4, 1, 3, 0, 2)), whole(torch.randn(chunk(fast) // 32, 40).t())]
    w = [y.to(dtype) for x, dtype in zip(w, [*DTYPES, FP32] * 2, strict=True) for y in (x,)]
    assert sum(not x.is_contiguous() for x in w) == 8
    norms = slice_norms(w) if scale == "given" else None
    found, expected = both(fast, w, scale=scale, norms=norms, first=first)
    assert all(x.stride() == y.stride() for x, y in zip(found, w, strict=False))
    assert alike(found, expected)
    plain, _ = both(fast, [x.contiguous() for x in w], scale=scale, norms=norms, first=first)
    assert alike(found, plain)


def masked_options(w):
    return {"mask": BitMask.pack([torch.rand(x.shape) < 0.5 for x in w])}


OPTIONS = {
    "masked": masked_options,
    "from_saved": lambda w: {"saved": [whole(x) for x in w]},
    "from_saved of other dtypes": lambda w: {"saved": [whole(x).to(DTYPES[i % 4]) for i, x in enumerate(w)]},
    "masked from_saved": lambda w: {"saved": [whole(x) for x in w], **masked_options(w)},
    "from_saved of another layout": lambda w: {"saved": [whole(x).contiguous() for x in w]},
    "std=0": lambda w: {"std": 0.0},
}


@each_scale
@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_options(fast, make, scale):
    n = chunk(fast) + 3
    shapes = [(5,), (7, 11), (), (0,), (affordable(fast, n, 777),), (3, 3, 3), (1, 40), (70,)]
    w = [*mixed(shapes), *(whole(make()) for make in LAYOUTS.values())]
    options = make(w)
    norms = slice_norms(w) if scale == "given" else None
    found, expected = both(fast, w, scale=scale, norms=norms, t=3, **options)
    assert alike(found, expected)
    if "mask" in options:
        kept = options.get("saved", w)
        masks = options["mask"].unpack()
        assert all(torch.equal(x[~m], y[~m].to(x.dtype)) for x, y, m in zip(found, kept, masks, strict=False))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=dtype_name)
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_views_and_their_borders(fast, offset, dtype):
    shapes = [(5,), (affordable(fast, 3_000, 300),), (4, 31), (8, 8)]
    plain = whole_list(shapes, dtype)
    w, buffers = guarded_list(plain, offset)
    saved, saved_buffers = guarded_list(poisoned_like(plain), offset)
    expected = clones(plain)
    ops.gaussian_perturb(expected, poisoned_like(plain), 0.1, backend="reference")
    ops.gaussian_perturb(w, saved, 0.1, backend=fast)
    assert alike(w, expected)
    assert same_bits(saved, plain)
    assert borders_intact(w, buffers)
    assert borders_intact(saved, saved_buffers)
    ops.restore(w, saved, backend=fast)
    assert same_bits(w, plain)


@each_scale
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_name)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_bad_norm_leaves_all_weights(backend, scale, value, dtype):
    w = whole_list([(5, 3), (300,), (), (2, 9)], dtype)
    norms = slice_norms(w) if scale == "given" else None
    if norms is None:
        w[3][1, 4] = value
    else:
        norms[-2] = value
    before, saved = clones(w), poisoned_like(w)
    ops.gaussian_perturb(w, saved, 0.3, scale=scale, norms=norms, backend=backend)
    before = known_nans(before)  # the reference writes what it has read, with a NaN of its own
    assert same_bits(known_nans(w), before)
    assert same_bits(known_nans(saved), before)
    elsewhere = poisoned_like(w)  # another draw: what was moved comes back
    ops.gaussian_perturb(elsewhere, saved, 0.3, scale=scale, norms=norms, from_saved=True, backend=backend)
    assert same_bits(known_nans(elsewhere), before)
    wide = [torch.full_like(x, 7, dtype=FP64) for x in w]
    ops.gaussian_perturb(wide, saved, 0.0, scale=scale, norms=norms, from_saved=True, backend=backend)
    assert same_bits(known_nans(wide), [x.double() for x in before])


def test_bits_do_not_depend_on_threads(fast):
    if fast == "triton" and in_interpreter():
        pytest.skip("Triton's interpreter has one thread")
    w = [torch.randn(shape) for shape in [(chunk(fast) * 3 + 17,), (64, affordable(fast, 3_000, 30)), (7,)]]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            own, saved = clones(w), poisoned_like(w)
            ops.gaussian_perturb(own, saved, 0.3, backend=fast)
            results.append([*own, *saved])
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


def test_empty_lists(backend):
    ops.gaussian_perturb([], [], 0.1, backend=backend)
    ops.gaussian_perturb([], [], 0.1, scale="given", norms=torch.zeros(0, dtype=FP64), backend=backend)


def test_versions_are_bumped(fast):
    w, saved = [torch.ones(3)], [torch.ones(3)]
    before = [x._version for x in (*w, *saved)]
    ops.gaussian_perturb(w, saved, 0.1, backend=fast)
    assert all(x._version > version for x, version in zip((*w, *saved), before, strict=True))


ONE = torch.ones(1, dtype=FP64)
WRONG = {
    "negative std": (ValueError, r"std must be a finite number >= 0, got -1", {"std": -1}),
    "infinite std": (ValueError, r"std must be a finite number >= 0, got inf", {"std": INF}),
    "t": (ValueError, r"t must be an integer >= 0 and < 2\^32, got 4294967296", {"t": 2**32}),
    "draw": (ValueError, r"draw must be an integer >= 0 and < 2\^24, got 16777216", {"draw": 2**24}),
    "first": (ValueError, r"first must be an integer >= 0, got -1", {"first": -1}),
    "scale": (ValueError, r"scale must be one of 'filter'.* got 'layer' with norms missing", {"scale": "layer"}),
    "no norms": (ValueError, r"got 'given' with norms missing", {"scale": "given"}),
    "norms for nobody": (ValueError, r"got 'filter' with norms given", {"norms": ONE}),
    "few norms": (ValueError, r"norms must be float64 of shape \(3,\), .* got torch.float64 \(1,\)",
                  {"scale": "given", "norms": ONE}),
    "float32 norms": (ValueError, r"norms must be float64", {"scale": "given", "norms": torch.ones(3)}),
    "mask": (ValueError, r"mask is over other tensors", {"mask": BitMask.pack([torch.ones(2) > 0])}),
    "lengths": (ValueError, r"saved has 2 tensors, w has 1", {"saved": [torch.ones(3)] * 2}),
    "shapes": (ValueError, r"saved\[0\] is \(2,\)", {"saved": [torch.ones(2)]}),
    "dtypes": (TypeError, r"saved\[0\] must be torch.float32 like w\[0\]", {"saved": [torch.ones(3).double()]}),
    "integers": (TypeError, r"w\[0\] must be a dense float32", {"w": [torch.ones(3).int()]}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(error, message, options):
    arguments = {"w": [torch.ones(3)], "saved": [torch.zeros(3)], "std": 0.1, **options}
    with pytest.raises(error, match=message):
        ops.gaussian_perturb(**arguments)
    assert same_bits([x.float() for x in arguments["w"]], [torch.ones(3)])
    assert len(arguments["saved"]) == 2 or "saved" in options or same_bits(arguments["saved"], [torch.zeros(3)])


# ---- the half-step


SHAPES = [(5, 3), (), (0,), (1_203,), (7, 4, 3), (300,), (17,), (2, 9)]
CLIMBS = [ClimbGroup(Climb.NOISE_FILTER, 0.3), ClimbGroup(Climb.NOISE_TENSOR, 0.2), ClimbGroup(Climb.NOISE_FILTER, 0.0)]
GROUPS = [0, 0, 0, 1, 0, 1, 2, 1]


class Rig:
    """A plan over whole numbers amid canaries; parameter 5 does not require a gradient, and masks are over 0, 3 and 8."""

    def __init__(self, backend, dtypes, offset=0, shapes=SHAPES, groups=GROUPS, masks=(0, 3, 8)):
        torch.manual_seed(0)
        values = [x.to(dtypes[i % len(dtypes)]) for i, x in enumerate(whole_list(shapes))]
        views, self.buffers = guarded_list(values, offset)
        channels_last = whole(torch.empty(6, 4, 5, 3, dtype=dtypes[0]).contiguous(memory_format=torch.channels_last))
        self.params = [nn.Parameter(x) for x in [*views, channels_last]]
        self.params[5].requires_grad_(False)
        self.plan = make_plan(backend, self.params, [*groups, 0], Kept(self.params))
        for i in masks:
            p = self.params[i]
            self.plan.bind_mask(i, BitMask.pack([torch.rand(p.shape) < 0.5]).in_layout_of([p])[0])
        self.before, self.reports = self.weights(), []

    def weights(self):
        return clones([p.detach() for p in self.params])

    def draw(self, t, draw=0, climbs=CLIMBS, seed=11):
        self.reports.append(torch.full((len(Report),), NAN, dtype=FP64))
        self.plan.perturb_by_noise(climbs, self.reports[-1], Noise(seed, t, draw))
        return self.weights()


def same_reports(a, b, backend):
    """Sums over halves are added in different orders."""
    return all(torch.allclose(x, y, rtol=1e-5 if backend == "cuda" else 1e-9, equal_nan=True)
               for x, y in zip(a, b, strict=True))  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("dtypes", [[FP32], [BF16], [FP16], [FP64], DTYPES], ids=lambda x: "-".join(map(dtype_name, x)))
@pytest.mark.parametrize("offset", [0, 1])
def test_half_steps_agree_with_the_reference(fast, dtypes, offset):
    ours, reference = Rig(fast, dtypes, offset), Rig("reference", dtypes, offset)
    for t in (0, 1):
        for draw in (0, 1, 2):
            found, expected = ours.draw(t, draw), reference.draw(t, draw)
            assert alike(found, expected)
            assert same_bits([found[i] for i in (2, 5, 6)], [ours.before[i] for i in (2, 5, 6)])
            assert not any(same_bits([found[i]], [ours.before[i]]) for i in (0, 1, 3, 4, 7, 8))
        assert ours.plan.perturbed
        ours.plan.restore()
        reference.plan.restore()
        assert not ours.plan.perturbed
        assert same_bits(ours.weights(), ours.before)
    assert borders_intact([p.detach() for p in ours.params[:-1]], ours.buffers)
    assert same_reports(ours.reports, reference.reports, fast)
    halves = any(dtype in (BF16, FP16) for dtype in dtypes)
    assert all(bool(report[Report.REALISED_SHARE].isnan()) != halves for report in ours.reports)


@torch.no_grad()
def test_a_draw_knows_nothing_of_the_one_before(backend):
    """It begins at the saved weights, with their norms, also where groups go by other norms from now on, or stand still."""
    rig, fresh = Rig(backend, DTYPES), Rig(backend, DTYPES)
    others = [CLIMBS[1], CLIMBS[0], CLIMBS[2]]
    rig.draw(0)
    for climbs in (CLIMBS, others, others, CLIMBS):
        found = rig.draw(7, 3, climbs)
        fresh.plan.restore()
        assert same_bits(found, fresh.draw(7, 3, climbs))
    still = [climb._replace(rho=0.0) for climb in CLIMBS]
    assert same_bits([x + 0 for x in rig.draw(8, 0, still)], [x + 0 for x in rig.before])  # -0 + 0 is 0


@torch.no_grad()
def test_other_weights_have_other_norms(backend):
    """Of what a step before has left nothing stays."""
    rig, fresh = Rig(backend, DTYPES), Rig(backend, DTYPES)
    rig.draw(0)
    rig.plan.restore()
    for p, q in zip(rig.params, fresh.params, strict=True):
        p.mul_(2)
        q.mul_(2)
    assert same_bits(rig.draw(1), fresh.draw(1))


@torch.no_grad()
@pytest.mark.parametrize(("value", "index"), [(NAN, 7), (INF, 0), (NAN, 1), (2e19, 3)])
def test_a_bad_weight_leaves_all(backend, value, index):
    """2e19: its square overflows float32, which counts as infinite on every backend."""
    rig = Rig(backend, [FP32])
    rig.params[index].view(-1)[-1:] = value
    before = rig.weights()
    for draw in (0, 1):
        assert same_bits(known_nans(rig.draw(0, draw)), known_nans(before))
        assert rig.reports[-1][Report.SKIPPED_FIRST] == 1
    rig.plan.restore()
    assert same_bits(rig.weights(), before)


@torch.no_grad()
def test_a_bad_weight_that_does_not_move_is_nobodys_business(backend):
    rig = Rig(backend, [FP32])
    rig.params[5][0] = rig.params[6][0] = NAN
    assert not same_bits(rig.draw(0)[:1], rig.before[:1])
    assert rig.reports[-1][Report.SKIPPED_FIRST] == 0


@torch.no_grad()
def test_gradients_stay(backend):
    rig = Rig(backend, [FP32])
    grads = [torch.randn_like(p) if i % 2 else None for i, p in enumerate(rig.params)]
    for p, grad in zip(rig.params, grads, strict=True):
        p.grad = grad
    rig.draw(0)
    assert all(p.grad is grad for p, grad in zip(rig.params, grads, strict=True))
    rig.plan.restore()
    assert all(p.grad is grad for p, grad in zip(rig.params, grads, strict=True))


@torch.no_grad()
def test_more_groups_than_a_launch_carries(fast):
    n = 70
    shapes, climbs = [(4, 3)] * n, [ClimbGroup(Climb.NOISE_FILTER, 0.01 * i) for i in range(n)]
    rigs = [Rig(backend, [FP32], shapes=shapes, groups=list(range(n))) for backend in (fast, "reference")]
    assert alike(*(rig.draw(0, climbs=climbs) for rig in rigs))


# ---- launches


@pytest.fixture
def emulated():
    if emulator.why_not():
        pytest.skip(emulator.why_not())
    with emulator.running() as device, samkern.use_backend("cuda"):
        yield device


@torch.no_grad()
@pytest.mark.parametrize("dtypes", [[FP32], [BF16], DTYPES], ids=lambda x: "-".join(map(dtype_name, x)))
def test_every_interleaving_and_grid_gives_the_same_bits(emulated, dtypes):
    def run():
        rig = Rig("cuda", dtypes, offset=1)
        for p in rig.params:
            p.copy_(torch.randn(p.shape))
        return [*rig.draw(0), *rig.draw(0, 1), *(report.nan_to_num(-1) for report in rig.reports)]

    expected = run()
    for seed, n_blocks, one_launch in [(1, 1, True), (2, 5, True), (3, 3, False)]:
        emulated.configure(seed=seed, n_blocks=n_blocks, one_launch=one_launch)
        assert same_bits(run(), expected), (seed, n_blocks, one_launch)


@torch.no_grad()
def test_one_launch(emulated):
    """With the norms; and where they are known, nobody waits for anybody."""
    emulated.take_launches()
    rig = Rig("cuda", DTYPES)
    rig.draw(0)
    assert emulated.take_launches() == 1
    rig.plan.restore()
    emulated.configure(one_launch=False)
    emulated.take_launches()
    for draw, launches in ((0, 3), (1, 1), (2, 1)):
        rig.draw(0, draw)
        assert emulated.take_launches() == launches


@torch.no_grad()
@pytest.mark.parametrize("without", ["block_sync", "grid_sync", "shuffle"])
def test_a_missing_synchronisation_shows(emulated, without):
    w = [torch.randn(300, 3), torch.randn(40_000)]
    expected = clones(w)
    ops.gaussian_perturb(expected, poisoned_like(w), 0.3, backend="cuda")
    differs = False
    for seed in range(3):
        emulated.configure(seed=seed, without=without)
        own = clones(w)
        ops.gaussian_perturb(own, poisoned_like(w), 0.3, backend="cuda")
        differs = differs or not same_bits(own, expected)
    assert differs
