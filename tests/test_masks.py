"""Masks: exact selection against plain sorts, the bits themselves, climbs and norms through them, and F."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import samkern
from samkern import BitMask, ops, reference
from samkern.backends import in_interpreter
from samkern.options import Climb, ClimbGroup, Report, Scaling
from samkern.plan import Kept, make_plan
from samkern.reference_masks import fisher_accumulate

from .lists import (
    BF16,
    CLIMBS,
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
    mixed_list,
    poisoned_like,
    random_list,
    same_bits,
    scalar,
    shapes_for,
    sums_error,
)
from .oracles import masks as oracle

MODES = reference.CLIMBS
NAN, INF = math.nan, math.inf
ODD = [0.0, -0.0, 1.0, -1.0, 2.0, INF, -INF, NAN, -NAN, 1e-45, -1e-45, 1e-40, 1e-38, -1e-38, 6e-8, 6e4, 3e38, -3e38]
KINDS = {  # what the entries of one tensor are
    "odd": lambda n: torch.tensor(ODD, dtype=FP64)[torch.randint(len(ODD), (n,))],
    "random": lambda n: torch.randn(n, dtype=FP64),
    "ties": lambda n: torch.randn(n, dtype=FP64).round(),
    "equal": lambda n: torch.ones(n, dtype=FP64),
    "zeros": lambda n: torch.zeros(n, dtype=FP64) * torch.randn(n, dtype=FP64).sign(),
    "near": lambda n: 1 + torch.randint(4, (n,)) * torch.finfo(FP32).eps,
    "nan": lambda n: torch.full((n,), NAN, dtype=FP64),
}


def made(parts) -> list[torch.Tensor]:
    """Tensors from (size, dtype, kind)."""
    return [KINDS[kind](n).to(dtype) for n, dtype, kind in parts]


def flat(tensors) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(x.detach().cpu().double().flatten().numpy() for x in tensors)])


def flat_mask(mask) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=bool), *(x.cpu().flatten().numpy() for x in mask.unpack())])


def expected_bits(chosen, tensors) -> list[int]:
    return oracle.bits(chosen, [x.numel() for x in tensors]).tolist()


def random_bits(shapes, share=0.5) -> BitMask:
    return BitMask.pack([torch.rand(shape) < share for shape in shapes])


any_kind, any_dtype = st.sampled_from(list(KINDS)), st.sampled_from(DTYPES)
any_parts = st.lists(st.tuples(st.integers(0, 70), any_dtype, any_kind), min_size=1, max_size=4)
of_one_dtype = st.builds(
    lambda dtype, parts: [(n, dtype, kind) for n, kind in parts],
    any_dtype,
    st.lists(st.tuples(st.integers(0, 70), any_kind), min_size=1, max_size=4),
)
share = st.sampled_from([0.0, 1.0, 0.5]) | st.floats(0, 1)


def searched(max_examples):
    """Settings of a search: in Triton's interpreter an example takes a quarter of a second."""
    n = max_examples // 10 if in_interpreter() else max_examples
    return settings(max_examples=n, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def usual_only(backend, parts) -> list:
    """Triton's interpreter takes subnormal bf16 for 0, which no GPU does."""
    odd = backend == "triton" and in_interpreter()
    return [(n, dtype, "ties" if odd and dtype == BF16 and kind == "odd" else kind) for n, dtype, kind in parts]


# ---- selection ------------------------------------------------------------------------------------------------------


@searched(max_examples=100)
@given(parts=any_parts | of_one_dtype, share=share, seed=st.integers(0, 2**16))
def test_topk_of_anything(backend, parts, share, seed):
    torch.manual_seed(seed)
    scores = made(usual_only(backend, parts))
    k = round(share * sum(x.numel() for x in scores))
    mask = ops.topk_mask(scores, k, nan="last", backend=backend)
    assert mask.bits.tolist() == expected_bits(oracle.top_k(flat(scores), k), scores)


def bordering(backend) -> list[int]:
    n = 1 << 9 if backend == "reference" else affordable(backend, chunk(backend), 1 << 9)
    return [0, 1, n - 1, n, n + 1, 0, 33]


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "odd"])
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=dtype_name)
def test_topk_around_chunk_borders(backend, dtype, kind):
    sizes = bordering(backend)
    scores = made([(n, dtype or DTYPES[i % 4], kind) for i, n in enumerate(sizes)])
    n = sum(sizes)
    for k in (0, 1, n // 3, n - 1, n)[:: affordable(backend, 1, 4)]:
        mask = ops.topk_mask(scores, k, nan="last", backend=backend)
        assert mask.bits.tolist() == expected_bits(oracle.top_k(flat(scores), k), scores)
        assert mask.count() == k


def test_every_half_has_its_place(fast):
    """All 65,536 bit patterns in a random order: neighbours differ in one bit only."""
    for dtype in (BF16, FP16):
        values = torch.arange(-(2**15), 2**15)[torch.randperm(2**16)][: affordable(fast, 2**16, 2**10)]
        scores = [values.to(torch.int16).view(dtype)]
        if fast == "triton" and in_interpreter():
            scores = [scores[0][scores[0].abs() >= torch.finfo(dtype).tiny]]
        for k in (1, 10, scores[0].numel() // 3, scores[0].numel() // 2):
            mask = ops.topk_mask(scores, k, nan="last", backend=fast)
            assert mask.bits.tolist() == expected_bits(oracle.top_k(flat(scores), k), scores)


def test_topk_where_floats_differ_in_the_last_bit_only(fast):
    """All of the bits of float32 and float64 are looked at, and one float64 makes a list wide."""
    for dtype, integer in ((FP32, torch.int32), (FP64, torch.int64)):
        one = torch.ones(300, dtype=dtype).view(integer)
        scores = [(one + torch.randint(5, (300,), dtype=integer)).view(dtype), torch.ones(5)]
        mask = ops.topk_mask(scores, 137, backend=fast)
        assert mask.bits.tolist() == expected_bits(oracle.top_k(flat(scores), 137), scores)


def test_topk_in_row_major_order(backend):
    """Whatever the layout of the scores, and wherever they begin."""
    scores = [
        torch.randn(2, 3, 4, 5).round().contiguous(memory_format=torch.channels_last),
        torch.randn(7, 5).round().t(),
    ]
    mask = ops.topk_mask(scores, 70, backend=backend)
    assert mask.bits.tolist() == expected_bits(oracle.top_k(flat(scores), 70), scores)
    assert [x.shape for x in mask.unpack()] == [x.shape for x in scores]
    views, _ = guarded_list(random_list([(37,), (100,), (3,)]), 3)
    assert ops.topk_mask(views, 70, backend=backend).bits.tolist() == expected_bits(
        oracle.top_k(flat(views), 70), views
    )


def test_nan(backend):
    scores = [torch.tensor([1.0, -INF, 3.0]), torch.tensor([NAN, INF, NAN, -NAN])]
    for k in (0, 2, 7):
        with pytest.raises(ValueError, match=r"3 scores are NaN, the first in scores\[1\]; nan='last' ranks them"):
            ops.topk_mask(scores, k, backend=backend)
    assert [x.tolist() for x in ops.topk_mask(scores, 5, nan="last", backend=backend).unpack()] == [
        [True, True, True],
        [True, True, False, False],
    ]
    largest = torch.finfo(FP64).max
    many = [torch.tensor([-largest, -INF, 0.0, NAN], dtype=FP64)]  # their keys begin alike
    with pytest.raises(ValueError, match="1 scores are NaN"):
        ops.topk_mask(many, 1, backend=backend)


def test_scaling_scores_changes_nothing(backend):
    scores = random_list([(50,), (7, 3)])
    mask = ops.topk_mask(scores, 30, backend=backend)
    assert torch.equal(ops.topk_mask([x * 4 for x in scores], 30, backend=backend).bits, mask.bits)


def test_the_oracles_random_words():
    """Check values of the Random123 library."""
    ones = 0xFFFFFFFF
    cases = {
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8": ([0, 0, 0, 0], [0, 0]),
        "408f276d 41c83b0e a20bc7c6 6d5451fd": ([ones] * 4, [ones] * 2),
        "d16cfe09 94fdcceb 5001e420 24126ea1": (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
        ),
    }
    for expected, (counter, key) in cases.items():
        assert " ".join(f"{word:08x}" for word in oracle.philox(counter, key).flatten().tolist()) == expected
    zero = torch.zeros(3, dtype=torch.int64)
    words = samkern.philox.words(zero + 5, zero + 1, 7, 2, seed=2**63 + 11)
    assert (words.numpy() == oracle.philox([5, 1, 7, 2], [11, 2**31]).T.astype(np.int64)).all()


SEEDS = st.sampled_from([0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, 12345])
STEPS = st.sampled_from([0, 1, 400, 2**31, 2**32 - 1])


@searched(max_examples=60)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4), share=share, seed=SEEDS, t=STEPS)
def test_random_mask(backend, sizes, share, seed, t):
    like = [torch.empty(n) for n in sizes]
    k = round(share * sum(sizes))
    mask = ops.random_mask(like, k, seed=seed, t=t, backend=backend)
    chosen = oracle.grown(np.ones(sum(sizes), dtype=bool), k, seed % 2**64, t)
    assert mask.bits.tolist() == expected_bits(chosen, like)
    assert mask.count() == k


def test_random_mask_over_tensors_of_any_layout_and_many_chunks(backend):
    like = [torch.empty(5, 3), torch.empty(3, 3).t(), torch.empty(bordering(backend)[4]), torch.empty(6)]
    n = sum(x.numel() for x in like)
    mask = ops.random_mask(like, n // 2, seed=3, t=9, backend=backend)
    assert mask.bits.tolist() == expected_bits(oracle.grown(np.ones(n, dtype=bool), n // 2, 3, 9), like)


@searched(max_examples=100)
@given(
    parts=any_parts | of_one_dtype,
    density=share,
    n=st.integers(0, 300),
    regrow=st.booleans(),
    seed=SEEDS,
    t=STEPS,
    drawn=st.integers(0, 2**16),
)
def test_drop_grow_of_anything(backend, parts, density, n, regrow, seed, t, drawn):
    torch.manual_seed(drawn)
    g = made(usual_only(backend, parts))
    mask = random_bits([x.shape for x in g], density)
    before = flat_mask(mask)
    ops.drop_grow_mask(mask, g, n, seed=seed, t=t, regrow=regrow, backend=backend)
    chosen = oracle.drop_grow(before, flat(g), n, seed % 2**64, t, regrow)
    assert mask.bits.tolist() == expected_bits(chosen, g)
    assert mask.count() == before.sum()


@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=dtype_name)
@pytest.mark.parametrize("regrow", [True, False])
def test_drop_grow_around_chunk_borders(backend, dtype, kind, regrow):
    """Equal gradients drop in the order of the list, across tensors."""
    sizes = bordering(backend)
    g = made([(n, dtype or DTYPES[i % 4], kind) for i, n in enumerate(sizes)])
    mask = random_bits([x.shape for x in g], 0.6)
    before, n = flat_mask(mask), sum(sizes) // 3
    ops.drop_grow_mask(mask, g, n, seed=4, t=2, regrow=regrow, backend=backend)
    assert mask.bits.tolist() == expected_bits(oracle.drop_grow(before, flat(g), n, 4, 2, regrow), g)


def test_what_drops_is_what_has_the_smallest_gradient(backend):
    """Without regrowth: the definition itself, and what was out before is what may come in."""
    g = random_list([(200,), (9, 11)])
    mask = random_bits([x.shape for x in g], 0.7)
    before, size = flat_mask(mask), mask.count()
    ops.drop_grow_mask(mask, g, 40, seed=1, t=1, regrow=False, backend=backend)
    after, size_of_g = flat_mask(mask), abs(flat(g))
    dropped, kept, grown = before & ~after, before & after, after & ~before
    assert dropped.sum() == grown.sum() == 40
    assert after.sum() == size
    assert size_of_g[dropped].max() <= size_of_g[kept].min()


def test_regrowth_may_take_back_what_was_dropped(backend):
    """With all entries active nothing else can grow; and no more is dropped than may grow if it may not."""
    g = random_list([(64,), (5,)])
    mask = BitMask.pack([torch.ones(x.shape, dtype=torch.bool) for x in g])
    for regrow in (True, False):
        ops.drop_grow_mask(mask, g, 30, regrow=regrow, backend=backend)
        assert mask.count() == 69
    mask = ops.random_mask(g, 60, backend=backend)
    before = flat_mask(mask)
    ops.drop_grow_mask(mask, g, 1000, seed=5, regrow=False, backend=backend)
    assert (flat_mask(mask) & ~before).sum() == 9
    assert mask.count() == 60


def test_size_is_conserved(backend):
    g = random_list([(40,), (0,), (7, 9), ()])
    mask = ops.random_mask(g, 41, seed=2, backend=backend)
    seen = set()
    for t in range(1000 if backend == "cpu" else affordable(backend, 100, 5)):
        ops.drop_grow_mask(mask, g, (7 * t) % 50, seed=2, t=t, regrow=t % 2 == 0, backend=backend)
        assert mask.count() == 41
        seen.add(bytes(mask.bits.tolist()))
    assert len(seen) > 3


def test_skip(backend):
    g = random_list([(40,), (7, 9)])
    mask = ops.random_mask(g, 41, seed=2, backend=backend)
    before, moved = mask.clone(), mask.clone()
    ops.drop_grow_mask(mask, g, 9, skip=torch.tensor(True), backend=backend)
    assert torch.equal(mask.bits, before.bits)
    ops.drop_grow_mask(mask, g, 9, skip=torch.tensor(False), backend=backend)
    ops.drop_grow_mask(moved, g, 9, backend=backend)
    assert torch.equal(mask.bits, moved.bits)
    assert not torch.equal(mask.bits, before.bits)


def test_what_is_left_of_a_last_word_is_neither_read_nor_kept(backend):
    """Bits that somebody else has set there are no entries."""
    g = random_list([(40,), (33,)])
    clean = random_bits([x.shape for x in g])
    dirty = clean.clone()
    dirty.bits[5], dirty.bits[-1] = dirty.bits[5] | 0xE0, 0xFF
    for mask in (clean, dirty):
        ops.drop_grow_mask(mask, g, 12, backend=backend)
    assert dirty.bits.tolist() == clean.bits.tolist()


def test_selection_does_not_depend_on_threads(fast):
    if fast == "triton" and in_interpreter():
        pytest.skip("Triton's interpreter has one thread")
    size = affordable(fast, 5 * chunk(fast) + 17, chunk(fast) + 17)
    scores = [torch.randn(size).mul(50).round(), torch.randn(300), torch.randn(size)]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            top = ops.topk_mask(scores, size, backend=fast)
            moved = top.clone()
            ops.drop_grow_mask(moved, scores, size // 2, seed=1, backend=fast)
            results.append([top.bits, moved.bits])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    chosen = np.split(flat_mask(top), [size, size + 300])
    assert chosen[0].any()
    assert chosen[2].any()


def test_nothing_but_the_mask_is_written(fast):
    shapes = [(37,), (5, 9), (0,), (64,)]
    views, buffers = guarded_list(random_list(shapes), 1)
    before, versions = clones(views), [x._version for x in views]
    mask = ops.topk_mask(views, 50, backend=fast)
    version = mask.bits._version
    ops.drop_grow_mask(mask, views, 20, backend=fast)
    assert mask.bits._version > version
    assert same_bits(views, before)
    assert [x._version for x in views] == versions
    assert borders_intact(views, buffers)


def test_empty_lists(backend):
    assert ops.topk_mask([], 0, backend=backend).count() == 0
    mask = ops.topk_mask([torch.zeros(0), torch.zeros(2, 0)], 0, backend=backend)
    ops.drop_grow_mask(mask, [torch.zeros(0), torch.zeros(2, 0)], 5, backend=backend)
    assert ops.random_mask([], 0, backend=backend).bits.tolist() == mask.bits.tolist() == []
    ops.fisher_accumulate([], [], backend=backend)


BAD_CALLS = {
    "k too large": (r"k must be an integer from 0 to the number of scores, 3, got 4", lambda x: ops.topk_mask([x], 4)),
    "k negative": (r"k must be .* got -1", lambda x: ops.topk_mask([x], -1)),
    "k not an integer": (r"k must be .* got 1.0", lambda x: ops.topk_mask([x], 1.0)),
    "k a bool": (r"k must be .* got True", lambda x: ops.random_mask([x], True)),
    "random k": (r"k must be at most the number of entries, 3, got 4", lambda x: ops.random_mask([x], 4)),
    "t": (r"t must be an integer >= 0 and < 2\^32, got 4294967296", lambda x: ops.random_mask([x], 1, t=2**32)),
    "nan": (r"nan must be 'raise' or 'last', got 'first'", lambda x: ops.topk_mask([x], 1, nan="first")),
    "n": (r"n must be an integer >= 0, got -1", lambda x: ops.drop_grow_mask(BitMask.zeros([x]), [x], -1)),
    "other shapes": (
        r"mask is over other tensors: it has shape \(3,\) at 0, expected \(4,\)",
        lambda x: ops.drop_grow_mask(BitMask.zeros([x]), [torch.zeros(4)], 1),
    ),
    "other length": (
        r"mask is over other tensors: it has 1 tensors, expected 2",
        lambda x: ops.norms([x, x], mask=BitMask.zeros([x])),
    ),
    "perturb": (
        r"mask is over other tensors",
        lambda x: ops.perturb([x], [x.clone()], [x.clone()], mask=BitMask.zeros([x[:2]])),
    ),
    "bits": (r"bits must be uint8 of shape \(4,\)", lambda x: BitMask(torch.zeros(5).byte(), (x.shape,))),
    "f and g": (r"g\[0\] is \(2,\)", lambda x: ops.fisher_accumulate([x], [x[:2]])),
}


@pytest.mark.parametrize(("message", "call"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_say_what_is_wrong(message, call):
    x = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        call(x)
    assert x.tolist() == [1, 1, 1]


def test_dtypes_without_kernels_are_refused():
    for call in (lambda x: ops.topk_mask([x], 1), lambda x: ops.fisher_accumulate([x], [x])):
        with pytest.raises(TypeError, match="must be a dense float32"):
            call(torch.ones(3).int())


# ---- bits -----------------------------------------------------------------------------------------------------------


@searched(max_examples=50)
@given(sizes=st.lists(st.integers(0, 100), max_size=4), seed=st.integers(0, 2**16))
def test_bits_there_and_back(sizes, seed):
    torch.manual_seed(seed)
    values = [torch.rand(n) < 0.5 for n in sizes]
    mask = BitMask.pack(values)
    flat_values = np.concatenate([np.zeros(0, dtype=bool), *(x.cpu().numpy() for x in values)])
    assert mask.bits.tolist() == oracle.bits(flat_values, sizes).tolist()
    assert all(map(torch.equal, mask.unpack(), values))
    assert mask.count() == flat_values.sum()
    assert mask.numel == sum(sizes)
    assert BitMask.zeros(values).count() == 0
    assert torch.equal(torch.cat([torch.zeros(0, dtype=torch.uint8), *mask.parts()]), mask.bits)


def test_bits_in_the_order_of_memory():
    values = [torch.rand(shape) < 0.5 for shape in ((2, 3, 4, 5), (6, 7), (5,))]
    mask = BitMask.pack(values)
    like = [torch.empty(2, 3, 4, 5, memory_format=torch.channels_last) if x.dim() == 4 else x for x in values]
    like[1] = torch.empty(7, 6).t()
    laid_out = mask.in_layout_of(like)
    assert reference.unpack_bits(laid_out[0], 120).tolist() == values[0].permute(0, 2, 3, 1).flatten().tolist()
    assert reference.unpack_bits(laid_out[1], 42).tolist() == values[1].t().flatten().tolist()
    assert laid_out[2].data_ptr() == mask.parts()[2].data_ptr()  # not a copy


def test_a_copy_of_a_mask_is_its_own():
    mask = BitMask.pack([torch.tensor([True, False])])
    other, moved = mask.clone(), mask.to(torch.device("cpu"))
    other.bits.zero_()
    assert mask.count() == moved.count() == 1


# ---- masked norms and climbs ----------------------------------------------------------------------------------------

each_shapes = pytest.mark.parametrize("shapes", shapes_for("cpu"), indirect=True)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture
def shapes(request, fast):
    return shapes_for(fast)[request.param]


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def close(a, b, dtype):
    return same_bits(a, b) if dtype != FP64 else all(map(partial(torch.allclose, rtol=1e-13, atol=1e-15), a, b))


@each_shapes
@each_dtype
def test_masked_norms(fast, shapes, dtype):
    """Only the last row is masked."""
    a, b, w = random_list(shapes, dtype), random_list(shapes, dtype), random_list(shapes, dtype)
    mask = random_bits(shapes, 0.3)
    for weighting in reference.WEIGHTINGS:
        options = {"weighting": weighting, "eta": 0.01}
        sums = ops.norms(a, b, w, mask=mask, backend=fast, **options)
        expected = ops.norms(a, b, w, mask=mask, backend="reference", **options)
        dense = ops.norms(a, b, w, backend=fast, **options)
        for row in (0, 2, 3, 4):
            assert relative_error(sums[row], expected[row]) < sums_error(fast, dtype)
            assert row == 4 or relative_error(sums[row], dense[row]) < sums_error(fast, dtype)
        assert len(shapes) == 1 or sums[4, -1] < 0.9 * dense[4, -1]
        assert (sums[1] - expected[1]).abs().max() < sums_error(fast, dtype) * (expected[0] + expected[2]).max()
    alone = ops.norms(a, mask=mask, backend=fast)
    assert relative_error(alone[4], ops.norms(a, mask=mask, backend="reference")[4]) < sums_error(fast, dtype)


@pytest.mark.parametrize("renormalise", [False, True], ids=["dense norm", "masked norm"])
@pytest.mark.parametrize("mode", MODES)
@each_shapes
@each_dtype
def test_masked_perturb(fast, mode, shapes, dtype, renormalise):
    w, g = random_list(shapes, dtype, 0.1), random_list(shapes, dtype)
    w_ref, saved, before = clones(w), poisoned_like(w), clones(w)
    mask = random_bits(shapes)
    options = {"rho": 0.3, "mode": mode, "eta": 0.01, "trust_clip": 0.5, "mask": mask, "renormalise": renormalise}
    expected = ops.perturb(w_ref, g, poisoned_like(w), backend="reference", **options)
    sums = ops.perturb(w, g, saved, backend=fast, **options)
    assert relative_error(sums, expected) < sums_error(fast, dtype)
    ops.restore(w, before, backend=fast)
    ops.perturb(w, g, saved, backend=fast, sums=expected, **options)  # from equal sums, equal bits
    assert same_bits(saved, before)
    assert close(w, w_ref, dtype)
    for x, old, kept in zip(w, before, mask.unpack(), strict=True):
        assert same_bits([x[~kept]], [old[~kept]])


@pytest.mark.parametrize("mode", MODES)
@each_dtype
def test_a_mask_of_ones_changes_no_bit(fast, mode, dtype):
    shapes = [(5,), (0,), (), (17, 9), (4, 3, 3, 3), (affordable(fast, chunk(fast) + 5, 600),)]
    w, g = random_list(shapes, dtype, 0.1), random_list(shapes, dtype)
    ones = BitMask.pack([torch.ones(x.shape, dtype=torch.bool) for x in w])
    dense, saved, old = clones(w), poisoned_like(w), poisoned_like(w)
    ops.perturb(dense, g, old, 0.3, mode=mode, eta=0.01, backend=fast)
    for renormalise in (False, True):
        own = clones(w)
        ops.perturb(own, g, saved, 0.3, mode=mode, eta=0.01, mask=ones, renormalise=renormalise, backend=fast)
        assert same_bits(own, dense)
        assert same_bits(saved, old)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_a_mask_of_zeros_perturbs_nothing(backend, mode, renormalise):
    w = mixed_list([(5,), (), (17, 9), (40, 3)])
    g = mixed_list([(5,), (), (17, 9), (40, 3)])
    w[0][1] = -0.0
    before, saved = clones(w), poisoned_like(w)
    options = {"mode": mode, "eta": 0.01, "mask": BitMask.zeros(w), "renormalise": renormalise}
    ops.perturb(w, g, saved, 0.3, backend=backend, **options)
    assert same_bits(w, before)
    assert same_bits(saved, before)


def test_renormalised_eps_is_as_long_as_rho(backend):
    shapes = [(50,), (7, 9), (300,)]
    w, g, mask = random_list(shapes, FP64), random_list(shapes, FP64), random_bits(shapes, 0.2)
    for renormalise in (True, False):
        own, saved = clones(w), poisoned_like(w)
        ops.perturb(own, g, saved, 0.3, mask=mask, renormalise=renormalise, backend=backend)
        length = math.sqrt(sum(float((x - old).square().sum()) for x, old in zip(own, saved, strict=True)))
        masked = sum(float(x[kept].square().sum()) for x, kept in zip(g, mask.unpack(), strict=True))
        dense = sum(float(x.square().sum()) for x in g)
        assert length == pytest.approx(0.3 if renormalise else 0.3 * math.sqrt(masked / dense), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_weights_in_any_layout(fast, mode):
    """A mask is in row-major order; the weights need not be."""
    w = [torch.randn(6, 4, 5, 3).contiguous(memory_format=torch.channels_last), torch.randn(40, 60).t(), torch.randn(9)]
    g, mask = [torch.randn(x.shape) for x in w], random_bits([x.shape for x in w])
    options = {"mode": mode, "eta": 0.01, "mask": mask, "renormalise": True}
    w_ref, before = clones(w), clones(w)
    sums = ops.perturb(w_ref, g, poisoned_like(w), 0.3, backend="reference", **options)
    ops.perturb(w, g, poisoned_like(w), 0.3, sums=sums, backend=fast, **options)
    assert same_bits(w, w_ref)
    assert all(torch.equal(x[~kept], old[~kept]) for x, old, kept in zip(w, before, mask.unpack(), strict=True))
    assert all((x != old)[kept].any() for x, old, kept in zip(w, before, mask.unpack(), strict=True))
    found = ops.norms(g, (), w, weighting="filter", mask=mask, backend=fast)
    expected = ops.norms(g, (), w, weighting="filter", mask=mask, backend="reference")
    assert relative_error(found, expected) < sums_error(fast, FP32)


# ---- fisher_accumulate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f_dtype", [*DTYPES, None], ids=dtype_name)
@pytest.mark.parametrize("g_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("scaled", [False, True])
def test_fisher(fast, f_dtype, g_dtype, scaled):
    shapes = [(5,), (0,), (), (17, 9), (affordable(fast, chunk(fast) + 5, 300),)]
    f = [x.abs() for x in (mixed_list(shapes) if f_dtype is None else random_list(shapes, f_dtype))]
    g = random_list(shapes, g_dtype)
    options = {"keep": 0.9, "gain": 1 / 3, "scale": scalar(1 / 7) if scaled else None}
    f_ref, before, g_before = clones(f), clones(f), clones(g)
    for skip in (None, torch.tensor(False)):
        ops.fisher_accumulate(f, g, **options, skip=skip, backend=fast)
        fisher_accumulate(f_ref, g, **options, skip=skip)
        assert same_bits(f, f_ref)
    ops.fisher_accumulate(f, g, **options, skip=torch.tensor(True), backend=fast)
    assert same_bits(f, f_ref)
    assert same_bits(g, g_before)
    assert not same_bits(f, before)


def test_fisher_of_other_layouts(fast):
    f = [torch.rand(6, 4, 5, 3).contiguous(memory_format=torch.channels_last)]
    g, f_ref, version = [torch.randn(6, 4, 5, 3)], clones(f), f[0]._version
    ops.fisher_accumulate(f, g, backend=fast)
    fisher_accumulate(f_ref, g, 1.0, 1.0)
    assert same_bits(f, f_ref)
    assert f[0]._version > version


def test_fisher_is_the_mean_of_squares(backend):
    g = [torch.randn(50, dtype=FP64) for _ in range(3)]
    f = [torch.zeros(50, dtype=FP64)]
    for x in g:
        ops.fisher_accumulate(f, [x], gain=1 / 3, backend=backend)
    assert torch.allclose(f[0], torch.stack(g).square().mean(0), rtol=1e-14)


# ---- plans ----------------------------------------------------------------------------------------------------------


def parameters():
    torch.manual_seed(1)
    shapes = [(8, 3, 3, 3), (8,), (16, 20), (300,), (0,)]
    params = [torch.nn.Parameter(x) for x in random_list(shapes)]
    params[2] = torch.nn.Parameter(torch.randn(20, 16).t())
    params[3] = torch.nn.Parameter(torch.randn(300).bfloat16())
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@torch.no_grad()
def perturbed_by(backend, climb, masks, renormalise, scaling=()):
    params = parameters()
    plan = make_plan(backend, params, [0] * len(params), Kept(params))
    for i, bits in masks.items():
        plan.bind_mask(i, bits)
    report = torch.full((len(Report),), NAN, dtype=FP64)
    group = ClimbGroup(climb, rho=0.3, eta=0.01, trust_clip=0.5)
    plan.perturb([group], False, report, Scaling(*scaling), renormalise=renormalise)
    return plan, params, report


def masks_of(params):
    values = {i: torch.rand(p.shape) < 0.4 for i, p in enumerate(params) if i != 1}  # one tensor has none
    bits = {i: BitMask.pack([x]).in_layout_of([params[i]])[0] for i, x in values.items()}
    return values, bits


@pytest.mark.parametrize("climb", CLIMBS, ids=lambda climb: climb.name.lower())
@pytest.mark.parametrize("renormalise", [False, True])
def test_plans_with_masks(fast, climb, renormalise):
    """As the reference's plan; what is masked stays; a half-precision tensor's report counts the rest only."""
    before = parameters()
    values, bits = masks_of(before)
    plan, params, report = perturbed_by(fast, climb, bits, renormalise)
    _, params_ref, report_ref = perturbed_by("reference", climb, bits, renormalise)
    for i, (p, p_ref, old) in enumerate(zip(params, params_ref, before, strict=True)):
        tolerance = 1e-2 if p.dtype == BF16 else 1e-5
        assert torch.allclose(p, p_ref, rtol=tolerance, atol=1e-6)
        if i in values:
            assert same_bits([p[~values[i]].detach()], [old[~values[i]].detach()])
            assert p.numel() == 0 or not torch.equal(p, old)
    assert torch.allclose(report, report_ref, rtol=1e-5, equal_nan=True)
    plan.restore()
    assert same_bits([p.detach() for p in params], [p.detach() for p in before])


@torch.no_grad()
def test_a_loss_scale_changes_no_masked_climb(backend):
    _, bits = masks_of(parameters())
    for climb in (Climb.EUCLIDEAN, Climb.LARS, Climb.TRUST, Climb.FILTER):
        results = []
        for scale in (1.0, 0.25):
            scaling = (torch.tensor([1 / scale]), torch.zeros(1))
            params = parameters()
            for p in params:
                p.grad = p.grad / scale
            plan = make_plan(backend, params, [0] * len(params), Kept(params))
            for i, part in bits.items():
                plan.bind_mask(i, part)
            report = torch.zeros(len(Report), dtype=FP64)
            plan.perturb([ClimbGroup(climb, 0.3, 0.01, 0.5)], False, report, Scaling(*scaling), renormalise=True)
            results.append([p.detach() for p in params])
        assert all(map(partial(torch.allclose, rtol=1e-6, atol=1e-7), *results))


@torch.no_grad()
def test_a_plan_reads_its_masks_anew_and_can_lose_them(backend):
    params = parameters()
    _, bits = masks_of(params)
    plan, perturbed, _ = perturbed_by(backend, Climb.EUCLIDEAN, bits, False)
    plan.restore()
    group, report = ClimbGroup(Climb.EUCLIDEAN, 0.3), torch.zeros(len(Report), dtype=FP64)

    def climbed():
        for p, like in zip(perturbed, params, strict=True):
            p.grad = like.grad.clone()
        plan.perturb([group], False, report)
        result = [p.detach().clone() for p in perturbed]
        plan.restore()
        return result

    for part in bits.values():
        part.fill_(0)
    nothing = climbed()
    assert all(torch.equal(x, p) for i, (x, p) in enumerate(zip(nothing, params, strict=True)) if i != 1)
    for i in bits:
        plan.bind_mask(i, None)
    _, dense, _ = perturbed_by(backend, Climb.EUCLIDEAN, {}, True)
    assert same_bits(climbed(), [p.detach() for p in dense])


def test_masks_that_do_not_fit_a_plan(backend):
    params = parameters()
    plan = make_plan(backend, params, [0] * len(params), Kept(params))
    for bad in (torch.zeros(3, dtype=torch.uint8), torch.zeros(4), torch.zeros(8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="the mask of parameter 1 must be"):
            plan.bind_mask(1, bad)


def test_bits_that_begin_within_a_word_are_refused(fast):
    """Kernels read words of 4 bytes."""
    if fast == "triton":
        pytest.skip("it reads bytes")
    w, bits = [torch.ones(40)], torch.zeros(12, dtype=torch.uint8)
    mask = BitMask(bits[1:9], (w[0].shape,))
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        ops.perturb(w, [torch.ones(40)], [torch.ones(40)], 0.1, mask=mask, backend=fast)
    assert torch.equal(w[0], torch.ones(40))
