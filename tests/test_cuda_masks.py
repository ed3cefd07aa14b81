"""The CUDA kernels of masks on the CPU, by fibers as in ``test_cuda.py``: what is selected, perturbed and accumulated is
bitwise the reference's, in every interleaving, on any number of blocks, in one launch or many.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import samkern
from samkern import BitMask, ops, reference, reference_masks
from samkern.backends import native
from samkern.options import Climb, ClimbGroup
from samkern.plan import Kept
from samkern.reference_plan import ReferencePlan

from . import emulator
from .lists import (
    BF16,
    CLIMBS,
    DTYPES,
    FP16,
    FP32,
    FP64,
    borders_intact,
    clones,
    guarded_list,
    poisoned_like,
    random_list,
    same_bits,
    scalar,
    seeded,
)

CHUNK = 1 << 14  # of the GPU's kernels
# Flat indices of all remainders by 4; last bytes and words of every fill.
SHAPES = [(0,), (5,), (), (CHUNK + 1,), (7, 4, 3), (0, 2), (9,), (40,)]
DEVICES = [
    {"seed": 0, "n_blocks": 2},
    {"seed": 1, "n_blocks": 1},
    {"seed": 2, "n_blocks": 3, "one_launch": False},
]
NAMES = ["float32", "bfloat16", "float16", "float64", "mixed"]

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())


@pytest.fixture
def emulated():
    """List ops run on the device's kernels; returns how to set up the device."""
    with emulator.running() as device, samkern.use_backend("cuda"):
        yield device.configure


def typed(values, name):
    dtypes = DTYPES if name == "mixed" else (getattr(torch, name),)
    return [x.to(dtypes[i % len(dtypes)]) for i, x in enumerate(values)]


def scores_of(style, shapes=SHAPES):
    x = random_list(shapes)
    if style == "equal":
        return [torch.full_like(a, -0.5) for a in x]
    if style == "few":  # zeros of both signs among them
        return [(2 * a).round() for a in x]
    if style == "special":
        return [torch.where(a > 1, torch.nan, torch.where(a < -1, -torch.inf, 1e-40 * a)) for a in x]
    return x


def topk_everywhere(scores, k, emulated, devices=DEVICES):
    """Whether every device leaves the reference's bits, and nothing beside them."""
    expected, n_expected = BitMask.zeros(scores).bits, torch.zeros((), dtype=torch.int64)
    reference_masks.topk_mask(scores, k, expected, n_expected)
    for device in devices:
        emulated(**device)
        (bits,), buffers = guarded_list([torch.full_like(expected, 0xA5)])
        n_nan = torch.tensor(-1)
        torch.ops.samkern.topk_mask_(scores, k, bits, n_nan)
        if not (torch.equal(bits, expected) and n_nan == n_expected and borders_intact([bits], buffers)):
            return False
    return True


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("name", NAMES)
def test_topk_is_the_references(name, offset, emulated):
    scores = guarded_list(typed(scores_of("random"), name), offset)[0]
    n = sum(x.numel() for x in scores)
    assert topk_everywhere(scores, n // 3, emulated)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", ["equal", "few", "special"])
def test_topk_takes_the_first_of_what_is_equal(style, name, emulated):
    """The last that belongs lies within a byte, a chunk, a tensor; or all of them belong."""
    scores = typed(scores_of(style), name)
    n = sum(x.numel() for x in scores)
    for k, device in zip((n // 2 + 3, 9, CHUNK + 8), DEVICES, strict=True):
        assert topk_everywhere(scores, k, emulated, [device])


@pytest.mark.parametrize("k", [0, 1, -1, -2], ids=str)
def test_topk_of_none_and_of_all(k, emulated):
    scores = [x.to(FP32) for x in scores_of("few")]
    n = sum(x.numel() for x in scores)
    assert topk_everywhere(scores, k if k >= 0 else n + 1 + k, emulated)


def test_topk_of_ties_across_blocks(emulated):
    """The one that is largest comes last, and the ties that belong end in a chunk of the second of three blocks."""
    scores = [torch.zeros(3 * CHUNK), torch.ones(1)]
    assert topk_everywhere(scores, CHUNK + 778, emulated, [{"seed": 3, "n_blocks": 3}])


def test_topk_of_nothing_and_of_many_tiny_tensors(emulated):
    assert topk_everywhere([torch.zeros(0), torch.zeros(2, 0)], 0, emulated)
    tiny = [(4 * x).round() for x in random_list([(3,)] * 2000)]
    assert topk_everywhere(tiny, 2345, emulated, [{"seed": 4, "n_blocks": 3}])


def moved_everywhere(mask, g, n, emulated, devices=DEVICES, **options):
    """Whether every device moves the mask as the reference does. Returns it as well."""
    expected = mask.bits.clone()
    reference_masks.drop_grow_mask(expected, g, n, 5, 7, **options)
    for device in devices:
        emulated(**device)
        (bits,), buffers = guarded_list([mask.bits])
        torch.ops.samkern.drop_grow_mask_(bits, g, n, 5, 7, **options)
        if not (torch.equal(bits, expected) and borders_intact([bits], buffers)):
            return False, expected
    return True, expected


def random_bits(like, share=0.4):
    return BitMask.pack([torch.rand(x.shape) < share for x in like])


@pytest.mark.parametrize("regrow", [True, False], ids=["regrow", "no_regrow"])
@pytest.mark.parametrize("name", NAMES)
def test_drop_and_grow_are_the_references(name, regrow, emulated):
    for style, device in zip(("random", "few", "special"), DEVICES, strict=True):
        g = guarded_list(typed(scores_of(style), name), offset=style == "few")[0]
        mask = random_bits(g)
        same, expected = moved_everywhere(mask, g, mask.count() // 3, emulated, [device], regrow=regrow)
        assert same, style
        assert BitMask(expected, mask.shapes).count() == mask.count()
        assert not torch.equal(expected, mask.bits)


@pytest.mark.parametrize("regrow", [True, False], ids=["regrow", "no_regrow"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0], ids=str)
def test_no_more_move_than_there_are(share, regrow, emulated):
    g = random_list([(70,), (0,), (33, 5)])
    assert moved_everywhere(random_bits(g, share), g, 1 << 40, emulated, regrow=regrow)[0]


def test_random_masks_are_the_references(emulated):
    for k, device in zip((0, 7000, 2), DEVICES, strict=True):
        assert moved_everywhere(
            BitMask.zeros(random_list(SHAPES)), random_list(SHAPES), k, emulated, [device], drops=False
        )[0]
    like = [torch.zeros(shape, dtype=FP64) for shape in SHAPES]
    expected = BitMask.zeros(like).bits
    reference_masks.drop_grow_mask(expected, like, 99, 0, 0, drops=False)
    assert torch.equal(ops.random_mask(like, 99).bits, expected)


@pytest.mark.parametrize("skip", [True, False])
def test_a_skipped_mask_stays(skip, emulated):
    g = random_list([(300,), (5,)])
    mask = random_bits(g)
    for device in DEVICES:
        same, expected = moved_everywhere(mask, g, 9, emulated, [device], skip=torch.tensor(skip))
        assert same
        assert torch.equal(expected, mask.bits) == skip


@pytest.mark.parametrize("without", ["grid_sync", "block_sync", "shuffle"])
def test_a_missing_synchronisation_is_caught(without, emulated):
    """The proof that the other tests can fail."""
    scores = [x.to(FP32) for x in scores_of("few", [(CHUNK,), (CHUNK,), (100,)])]
    mask = random_bits(scores)
    caught = 0
    for seed in range(2):
        device = {"seed": seed, "n_blocks": 3, "without": without}
        for run in (
            lambda device=device: topk_everywhere(scores, CHUNK, emulated, [device]),
            lambda device=device: moved_everywhere(mask, scores, CHUNK // 2, emulated, [device])[0],
        ):
            try:
                caught += not run()
            except RuntimeError as error:
                caught += "wait for ever" in str(error)
    assert caught == 4


def test_launches(emulated):
    g = random_list([(40, 3), (), (0,), (CHUNK + 1,)])
    mask, f, take = random_bits(g), random_list([(40, 3), (), (0,), (CHUNK + 1,)]), emulator.load().take_launches
    passes = {
        "topk_mask": (lambda: ops.topk_mask(g, 9), 5),
        "drop_grow_mask": (lambda: ops.drop_grow_mask(mask, g, 9), 10),
        "random_mask": (lambda: ops.random_mask(g, 9), 5),
        "fisher_accumulate": (lambda: ops.fisher_accumulate(f, g), 1),
    }
    for name, (run, n_phases) in passes.items():
        for one_launch in (True, False):
            emulated(one_launch=one_launch)
            take()
            run()
            assert take() == (1 if one_launch else n_phases), name


# ---- masked climbs


def parameters(shapes, name, offset=0):
    torch.manual_seed(0)
    views, buffers = guarded_list(typed([torch.randn(shape) for shape in shapes], name), offset)
    return [nn.Parameter(view) for view in views], buffers


@torch.no_grad()
def masked_look(make, climb, name, masks, renormalise, offset=0, weights=None):
    """Weights, and the report, after a first half-step on gradients of whole numbers: their squares add up exactly."""
    params, buffers = parameters([mask.shape for mask in masks], name, offset)
    generator = seeded(1)
    for i, p in enumerate(params):
        if weights is not None:
            p.data.copy_(weights[i])
        p.grad = torch.randint(-2, 3, p.shape, generator=generator).to(p.dtype)
    kept = Kept(params)
    plan = make(params, [0] * len(params), kept.cache_norm, kept.fresh, kept.skips)
    for i, mask in enumerate(masks):
        if mask is not None and i != 2:  # one tensor has none
            plan.bind_mask(i, reference.pack_bits(mask.flatten()))
    report = torch.empty(8, dtype=FP64)
    plan.perturb([ClimbGroup(climb, 0.25, 0.01, 10.0)], True, report, renormalise=renormalise)
    assert borders_intact([p.detach() for p in params], buffers)
    return [p.detach().clone() for p in params], report


def on_device(*arguments):
    return native.Plan(*arguments, on_device=True)


LOOKS = [(5, 3), (CHUNK + 1,), (33,), (6, 4, 3), (0,), ()]


@pytest.mark.parametrize("renormalise", [False, True], ids=["dense_norm", "masked_norm"])
@pytest.mark.parametrize("climb", CLIMBS, ids=lambda climb: climb.name.lower())
def test_masked_climbs(climb, renormalise, emulated):
    """Those that weigh by nothing are bitwise the reference's; norms of the weights are not whole numbers."""
    exact = climb in (Climb.EUCLIDEAN, Climb.SIGN)
    for name, offset in (("float32", 0), ("bfloat16", 1), ("float16", 0), ("mixed", 0)):
        masks = [torch.rand(shape) < 0.5 for shape in LOOKS]
        arguments = (climb, name, masks, renormalise, offset)
        (weights, report), (expected, expected_report) = (
            masked_look(make, *arguments) for make in (on_device, ReferencePlan)
        )
        tolerance = 1e-6 if name == "float32" else 1e-2
        assert torch.allclose(report[[0, 3]], expected_report[[0, 3]], rtol=1e-6)
        assert (
            same_bits(weights, expected)
            if exact
            else all(
                torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
                for a, b in zip(weights, expected, strict=True)
            )
        )
        before = [p.detach() for p in parameters(LOOKS, name)[0]]
        for i, mask in enumerate(masks):
            assert i == 2 or same_bits([weights[i][~mask]], [before[i][~mask]])
            assert weights[i].ne(before[i]).any() or weights[i].numel() < 2 or name != "float32"


@pytest.mark.parametrize("renormalise", [False, True], ids=["dense_norm", "masked_norm"])
@pytest.mark.parametrize("climb", CLIMBS, ids=lambda climb: climb.name.lower())
def test_a_mask_of_ones_is_none(climb, renormalise, emulated):
    """Bitwise, on gradients whose squares do not add up exactly either."""

    def run(name, masked):
        params, _ = parameters(LOOKS, name)
        kept = Kept(params)
        plan = on_device(params, [0] * len(params), kept.cache_norm, kept.fresh, kept.skips)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=seeded(i)).to(p.dtype)
            if masked:
                plan.bind_mask(i, reference.pack_bits(torch.ones(p.numel(), dtype=torch.bool)))
        plan.perturb(
            [ClimbGroup(climb, 0.25, 0.01, 10.0)], False, torch.empty(8, dtype=FP64), renormalise=renormalise and masked
        )
        return [p.detach().clone() for p in params]

    for name in ("float32", "bfloat16", "mixed"):
        assert same_bits(run(name, masked=True), run(name, masked=False)), name


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_masked_nan_keeps_its_bits(dtype, emulated):
    """Rounding would make the usual NaN of it."""
    integer = torch.int32 if dtype == FP32 else torch.int16
    w = [torch.full((40,), -3, dtype=integer).view(dtype)]
    before = clones(w)
    mask = BitMask.pack([torch.arange(40) % 3 == 0])
    ops.perturb(
        w,
        [torch.ones(40, dtype=dtype)],
        poisoned_like(w),
        0.1,
        mode="sign",
        sums=torch.ones(5, 2, dtype=FP64),
        mask=mask,
    )
    kept = ~mask.unpack()[0]
    assert torch.equal(w[0].view(integer)[kept], before[0].view(integer)[kept])


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
@pytest.mark.parametrize("name", ["float32", "mixed"])
def test_masked_norms(name, weighting, emulated):
    w, g, b = (typed(random_list(LOOKS), name) for _ in range(3))
    mask = random_bits(w)
    options = {"weighting": weighting, "eta": 0.01}
    expected = reference.norms(g, b, w, mask=mask.bits, **options)
    magnitude = expected.clone()
    magnitude[1] = (expected[0] * expected[2]).sqrt()  # products cancel
    results = []
    for device in DEVICES:
        emulated(**device)
        results.append(ops.norms(g, b, w, mask=mask, **options))
        assert ((results[-1] - expected).abs() <= 3e-7 * magnitude).all()
    assert same_bits(results[:1] * 2, results[1:])


# ---- squares


@pytest.mark.parametrize("scale", [None, 0.3], ids=["plain", "scaled"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("name", NAMES)
def test_squares_are_the_references(name, offset, scale, emulated):
    for of_g in (name, "mixed"):
        f, buffers = guarded_list(typed(random_list(SHAPES), name), offset)
        g = guarded_list(typed(random_list(SHAPES), of_g), offset)[0]
        expected, factor = clones(f), None if scale is None else scalar(scale)
        ops.fisher_accumulate(f, g, keep=0.9, gain=0.1, scale=factor)
        reference_masks.fisher_accumulate(expected, g, 0.9, 0.1, factor)
        assert same_bits(f, expected)
        assert borders_intact(f, buffers)
        ops.fisher_accumulate(f, g, scale=scalar(math.nan), skip=torch.tensor(True))
        assert same_bits(f, expected)
