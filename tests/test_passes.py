"""Every pass on every other backend against the reference.

Bitwise, given the same scalars: the apply phases do the same operations in the same order. Norms agree to 1e-12 where
products are exact in double and only the order of additions differs; the CUDA kernels add up to 32 products in float32.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samkern import ops, reference
from samkern.backends import in_interpreter

from .lists import (
    BF16,
    CHUNK,
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

each_shapes = pytest.mark.parametrize("shapes", shapes_for("cpu"), indirect=True)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
MODES = reference.CLIMBS


@pytest.fixture
def shapes(request, fast):
    return shapes_for(fast)[request.param]


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


@each_shapes
@each_dtype
def test_norms(fast, shapes, dtype):
    a, b, w = random_list(shapes, dtype), random_list(shapes, dtype), random_list(shapes, dtype)
    for weighting in reference.WEIGHTINGS:
        sums = ops.norms(a, b, w, weighting=weighting, eta=0.01, backend=fast)
        expected = reference.norms(a, b, w, weighting=weighting, eta=0.01)
        for row, expected_row in zip(sums, expected, strict=True):
            scale = expected[0, -1].sqrt() * expected[2, -1].sqrt()  # ab may cancel
            error = (row - expected_row).abs().max()
            assert error <= sums_error(fast, dtype) * max(scale, expected_row.abs().max())


def test_norms_of_part_of_the_lists(fast):
    a, b = random_list([(5,), (chunk(fast) + 4464,)]), random_list([(5,), (chunk(fast) + 4464,)])
    only_a, with_b, with_w = (
        ops.norms(a, backend=fast),
        ops.norms(a, b, backend=fast),
        ops.norms(a, (), b, backend=fast),
    )
    assert torch.equal(only_a[0], with_b[0])
    assert only_a[1:4].count_nonzero() == with_w[1:3].count_nonzero() == 0
    assert torch.equal(with_w[3], with_b[2])


def difference_formula(*lists):
    """Sums, and the largest that they could be by their norms."""
    sums, bounds = [], []
    for a, b, c, d in zip(*lists, strict=True):
        dtype = FP64 if a.dtype == FP64 else FP32
        x, y = (a.to(dtype) - b.to(dtype)).double(), (c.to(dtype) - d.to(dtype)).double()
        sums.append((x * y).sum())
        bounds.append(x.norm() * y.norm())
    return torch.stack([*sums, sum(sums)]), torch.stack([*bounds, sum(bounds)])


def differences_agree(backend, *lists):
    sums, (expected, bounds) = ops.difference_dot(*lists, backend=backend), difference_formula(*lists)
    error = max(sums_error(backend, x.dtype) for x in lists[0])
    return sums.shape == expected.shape and bool(((sums - expected).abs() <= error * bounds).all())


@each_shapes
@each_dtype
def test_difference_dot(fast, shapes, dtype):
    a, b, c, d = (random_list(shapes, dtype) for _ in range(4))
    for backend in (fast, "reference"):
        assert differences_agree(backend, a, b, c, d)
        assert differences_agree(backend, a, b, a, b)


def test_differences_of_every_dtype(fast):
    """Each list beginning with another one; two lists alike and two of another dtype; and all views off alignment."""
    shapes = [(70,), (33, 5), (), (chunk(fast) + 3,)] * 2
    lists = [[torch.randn(shape).to(DTYPES[(i + k) % 4]) for i, shape in enumerate(shapes)] for k in range(4)]
    assert differences_agree(fast, *lists)
    for which in range(4):
        assert differences_agree(fast, *(random_list(shapes, BF16 if k == which else FP32) for k in range(4)))
    assert differences_agree(fast, *(guarded_list(x, k)[0] for k, x in enumerate(lists)))


def test_differences_of_any_layout(fast):
    """Also lists with gaps, and expanded ones."""
    a = [torch.randn(6, 5)[:, ::2], torch.randn(4, 1).expand(4, 7), torch.randn(5, 6).t()]
    b, c = ([torch.randn(x.shape) for x in a] for _ in range(2))
    for lists in ((a, b, c, b), (b, a, b, c), (b, c, a, a), (c, b, b, a)):
        assert differences_agree(fast, *lists)


def test_a_nan_stays_in_its_sum(fast):
    a, b = random_list([(5,), (300,), (7,)]), random_list([(5,), (300,), (7,)])
    a[1][299] = math.nan
    for lists in ((a, b, b, a), (b, b, a, b), (b, b, b, a)):
        assert ops.difference_dot(*lists, backend=fast).isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize("mode", MODES)
@each_shapes
@each_dtype
def test_perturb(fast, mode, shapes, dtype):
    w, g = random_list(shapes, dtype, 0.1), random_list(shapes, dtype)
    w_ref, saved, saved_ref = clones(w), poisoned_like(w), poisoned_like(w)
    before = clones(w)
    options = {"rho": 0.3, "mode": mode, "eta": 0.01, "trust_clip": 0.5}
    expected = ops.perturb(w_ref, g, saved_ref, backend="reference", **options)
    sums = ops.perturb(w, g, saved, backend=fast, **options)
    assert relative_error(sums, expected) < sums_error(fast, dtype)
    ops.restore(w, before, backend=fast)
    ops.perturb(w, g, saved, backend=fast, sums=expected, **options)  # from equal sums, equal bits
    assert same_bits(saved, before)
    assert same_bits(saved_ref, before)
    assert same_bits(w, w_ref) if dtype != FP64 else all(map(partial(torch.allclose, rtol=1e-13, atol=1e-15), w, w_ref))
    assert not same_bits(w, before)


@each_shapes
@each_dtype
def test_restore(fast, shapes, dtype):
    """Bits, also of NaN and of -0."""
    saved = [
        x.flatten().index_fill(0, torch.arange(0, x.numel(), 3), -0.0).view_as(x) for x in random_list(shapes, dtype)
    ]
    w = poisoned_like(saved)
    ops.restore(w, saved, backend=fast)
    assert same_bits(w, saved)


@each_shapes
@each_dtype
@pytest.mark.parametrize("cache_dtype", [FP32, BF16, FP64], ids=dtype_name)
def test_decompose(fast, shapes, dtype, cache_dtype):
    g, g_s = random_list(shapes, dtype), random_list(shapes, dtype)
    c, c_ref = poisoned_like(g, cache_dtype), poisoned_like(g, cache_dtype)
    k = torch.randn(len(g), dtype=FP64)
    cc, cc_ref = ops.decompose(c, g, g_s, k, backend=fast), ops.decompose(c_ref, g, g_s, k, backend="reference")
    assert same_bits(c, c_ref)
    assert relative_error(cc, cc_ref) < sums_error(fast, dtype)


@each_shapes
@each_dtype
def test_combine(fast, shapes, dtype):
    a, b = random_list(shapes, dtype), random_list(shapes, FP32)
    u, u_ref = poisoned_like(a), poisoned_like(a)
    coeffs = torch.randn(len(a), dtype=FP64), torch.randn(len(a), dtype=FP64)
    ops.combine(u, a, b, *coeffs, backend=fast)
    ops.combine(u_ref, a, b, *coeffs, backend="reference")
    assert same_bits(u, u_ref)
    ops.combine(a, a, b, *coeffs, backend=fast)  # in place
    assert same_bits(a, u)


def moments_like(w):
    return [torch.rand(x.shape).to(FP64 if x.dtype == FP64 else FP32) for x in w]


def update_cases():
    """Every base update with every part: name of the op, number of moments, options."""
    sgd = {"lr": 0.1, "weight_decay": 0.01}
    momentum = {**sgd, "momentum": 0.9, "dampening": 0.3}
    yield "sgd", "update_sgd", 0, sgd
    yield "momentum", "update_sgd", 1, momentum
    yield "first", "update_sgd", 1, {**momentum, "first": torch.tensor(True)}
    yield "nesterov", "update_sgd", 1, {**sgd, "momentum": 0.9, "nesterov": True}
    yield "adam", "update_adam", 2, {"lr": 0.1, "weight_decay": 0.01, "betas": (0.8, 0.9), "eps": 1e-3}
    yield "adamw", "update_adamw", 2, {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}


@each_shapes
@each_dtype
@pytest.mark.parametrize(
    ("name", "n_moments", "options"), [case[1:] for case in update_cases()], ids=[c[0] for c in update_cases()]
)
@pytest.mark.parametrize("parts", ["plain", "all", "skip"])
def test_update(fast, shapes, dtype, name, n_moments, options, parts):
    w, u, saved, cache = (random_list(shapes, dtype) for _ in range(4))
    moments = [moments_like(w) for _ in range(n_moments)]
    steps = [[torch.tensor(float(i)) for i in range(len(w))]] if n_moments == 2 else []
    given = {"saved": saved, "cache": cache, "coeff_a": scalar(0.7), "coeff_b": scalar(-0.4), "clip": scalar(0.9)}
    extra = {"plain": {}, "all": {**given, "skip": torch.tensor(False)}, "skip": {**given, "skip": torch.tensor(True)}}[
        parts
    ]
    options = {key: x.to(w[0].device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    results = []
    for backend in (fast, "reference"):
        own = [clones(x) for x in (w, *moments, *steps)]
        getattr(ops, name)(own[0], u, *own[1:], backend=backend, **options, **extra)
        results.append([x for tensors in own for x in tensors])
    if dtype == FP64:
        assert all(torch.allclose(x, y, rtol=1e-13, atol=1e-15) for x, y in zip(*results, strict=True))
    else:
        assert same_bits(*results)
    if parts == "skip":
        assert same_bits(results[0][: len(w)], saved)


@pytest.mark.parametrize("mode", MODES)
def test_every_dtype_in_one_call(fast, mode):
    """Parameters and gradients of all dtypes, in different orders, so that every pair occurs."""
    shapes = [(70,), (33, 5)] * 8
    w, g = mixed_list(shapes), [torch.randn(shape).to(DTYPES[i // 4]) for i, shape in enumerate(shapes)]
    w_ref, saved = clones(w), poisoned_like(w)
    sums = ops.perturb(w_ref, g, poisoned_like(w), 0.3, mode=mode, eta=0.1, backend="reference")
    ops.perturb(w, g, saved, 0.3, mode=mode, eta=0.1, sums=sums, backend=fast)
    assert all(torch.allclose(a, b, rtol=1e-13, atol=0) for a, b in zip(w, w_ref, strict=True))
    ops.update_sgd(w, g, moments_like(w), lr=0.1, momentum=0.5, saved=saved, backend=fast)
    assert all(torch.isfinite(x).all() for x in w)


LAYOUTS = {
    "channels_last": lambda: torch.randn(6, 4, 5, 3).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(40, 60).t(),
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "single_row": lambda: torch.randn(1, 300)[:, ::1],
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("mode", MODES)
def test_dense_layouts(fast, make, mode):
    """Filters are dim-0 slices in every layout; a gradient may have another layout than the weights, an output may not."""
    w = [make()]
    g = [torch.randn(w[0].shape)]
    saved, w_ref = poisoned_like(w), clones(w)
    assert saved[0].stride() == w[0].stride()
    sums = ops.perturb(w_ref, g, poisoned_like(w), 0.3, mode=mode, eta=0.01, backend="reference")
    ops.perturb(w, g, saved, 0.3, mode=mode, eta=0.01, sums=sums, backend=fast)
    assert same_bits(w, w_ref)
    if w[0].stride() != g[0].stride():
        with pytest.raises(ValueError, match=r"saved\[0\] is written: it must be dense with strides"):
            ops.perturb(w, g, [torch.empty(w[0].shape)], backend=fast)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_misaligned_views_and_their_borders(fast, offset):
    """Nothing outside of a view is written, wherever it begins."""
    shapes = shapes_for(fast)["chunk_borders"] + shapes_for(fast)["conv_net"]
    lists = [guarded_list(random_list(shapes), offset) for _ in range(5)]
    w, g, saved, momentum, cache = (views for views, _ in lists)
    expected = clones(w)
    sums = ops.perturb(expected, g, poisoned_like(w), 0.3, backend="reference")
    ops.perturb(w, g, saved, 0.3, sums=sums, backend=fast)
    assert same_bits(w, expected)
    ops.decompose(cache, g, saved, scalar(0.5), backend=fast)
    ops.update_sgd(w, g, momentum, lr=0.1, momentum=0.9, saved=saved, backend=fast)
    assert all(borders_intact(*pair) for pair in lists)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_name)
def test_bits_do_not_depend_on_threads(fast, dtype):
    if fast == "triton" and in_interpreter():
        pytest.skip("Triton's interpreter has one thread")
    shapes = [(chunk(fast) * 3 + 17,), (64, affordable(fast, 300, 30)), (7,), *shapes_for(fast)["tiny"]]
    w, g, c = random_list(shapes, dtype), random_list(shapes, dtype), random_list(shapes, FP32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            own, saved, momentum, cache = clones(w), poisoned_like(w), moments_like_zero(w), clones(c)
            sums = [ops.perturb(own, g, saved, 0.3, mode=mode, eta=0.01, backend=fast) for mode in MODES]
            cc = ops.decompose(cache, g, own, backend=fast)
            dot = ops.difference_dot(own, saved, g, cache, backend=fast)
            ops.update_sgd(own, g, momentum, lr=0.1, momentum=0.9, saved=saved, backend=fast)
            results.append([*own, *saved, *momentum, *cache, *sums, cc, dot])
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


def moments_like_zero(w):
    return [torch.zeros(x.shape) for x in w]


def test_rounding_of_halves_is_torchs(fast):
    """Every bf16 and fp16 value, and float32 values around every rounding border, subnormals and overflow included."""
    for dtype in (BF16, FP16):
        halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        values = halves[halves.isfinite()]
        if fast == "triton" and in_interpreter():  # it takes subnormal bf16 for 0, which no GPU does
            values = values[(values == 0) | (values.abs() >= torch.finfo(dtype).tiny)]
        w = torch.zeros(values.numel())
        ops.update_sgd([w], [values], lr=1.0, backend=fast)
        assert same_bits([w], [0.0 - values.float()])
        spread = torch.cat([values.float() * (1 + k * 2.0**-13) for k in range(-3, 4)])
        spread = torch.cat([spread, torch.randn(10_000) * 2.0 ** torch.randint(-30, 20, (10_000,))])
        out = torch.empty(spread.numel(), dtype=dtype)
        ops.combine([out], [spread], [-torch.zeros_like(spread)], scalar(1), scalar(1), backend=fast)  # -0 + -0 = -0
        assert same_bits([out], [spread.to(dtype)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e19])
def test_a_bad_gradient_leaves_weights_alone(fast, value):
    """2e19: its square overflows float32, which counts as infinite on every backend."""
    w, g = random_list(shapes_for(fast)["conv_net"]), random_list(shapes_for(fast)["conv_net"])
    g[2].view(-1)[5] = value
    before, saved = clones(w), poisoned_like(w)
    for backend in (fast, "reference"):
        ops.perturb(w, g, saved, 0.3, backend=backend)
        assert same_bits(w, before)
        assert same_bits(saved, before)


def test_versions_are_bumped(fast):
    """Autograd must notice that a tensor it saved has been written."""
    w = [torch.ones(3, requires_grad=True)]
    y = (w[0] * w[0]).sum()
    with torch.no_grad():
        ops.perturb(w, [torch.ones(3)], [torch.empty(3)], backend=fast)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    u, state = [torch.zeros(3)], [torch.zeros(3)]
    versions = [x._version for x in (*u, *state)]
    ops.update_sgd(u, [torch.ones(3)], state, lr=0.1, momentum=0.9, backend=fast)
    assert all(x._version > before for x, before in zip((*u, *state), versions, strict=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 40)),
            st.tuples(st.integers(1, 9), st.integers(0, 200)),
            st.sampled_from([(CHUNK - 1,), (CHUNK + 1,), (1,), (), (3, 1, 2, 2), (2, 40_000)]),
        ),
        min_size=1,
        max_size=6,
    ),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    mode=st.sampled_from(MODES),
    rho=st.floats(0, 2),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_any_lists(fast, shapes, dtypes, mode, rho, offset, seed):
    torch.manual_seed(seed)
    sizes = {CHUNK - 1: chunk(fast) - 1, CHUNK + 1: chunk(fast) + 1, 40_000: affordable(fast, 40_000, 4_000)}
    shapes = [tuple(sizes.get(n, n) for n in shape) for shape in shapes]
    plain = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    w, buffers = guarded_list(plain, offset)
    g, saved, expected = [torch.randn_like(x) for x in w], poisoned_like(w), clones(w)
    sums = ops.perturb(expected, g, poisoned_like(w), rho, mode=mode, eta=0.01, backend="reference")
    ops.perturb(w, g, saved, rho, mode=mode, eta=0.01, sums=sums, backend=fast)
    assert same_bits(saved, plain)
    assert all(torch.allclose(a, b, rtol=1e-13, atol=1e-15) for a, b in zip(w, expected, strict=True))
    assert borders_intact(w, buffers)
    ops.restore(w, saved, backend=fast)
    assert same_bits(w, plain)


def test_empty_lists(backend):
    assert ops.norms([], backend=backend).shape == (5, 1)
    assert ops.difference_dot([], [], [], [], backend=backend).tolist() == [0]
    ops.perturb([], [], [], backend=backend)
    ops.restore([], [], backend=backend)
    ops.combine([], [], [], scalar(1), scalar(1), backend=backend)
    ops.update_sgd([], [], lr=0.1, backend=backend)
    assert ops.decompose([], [], [], backend=backend).tolist() == [0]


BAD_CALLS = {
    "length": (ValueError, r"g has 2 tensors, w has 1", lambda w: ops.perturb([w], [w, w], [w])),
    "shape": (
        ValueError,
        r"g\[0\] is \(2,\) on cpu, expected \(3,\)",
        lambda w: ops.perturb([w], [torch.ones(2)], [w]),
    ),
    "dtype": (TypeError, r"g\[0\] must be a dense float32", lambda w: ops.perturb([w], [torch.ones(3).int()], [w])),
    "sparse": (TypeError, r"a\[0\] must be a dense", lambda w: ops.norms([w.to_sparse()])),
    "sparse difference": (TypeError, r"a\[0\] must be", lambda w: ops.difference_dot([w.to_sparse()], [w], [w], [w])),
    "integer difference": (TypeError, r"d\[0\] must be", lambda w: ops.difference_dot([w], [w], [w], [w.int()])),
    "differences of unequal lists": (ValueError, r"c has 0", lambda w: ops.difference_dot([w], [w], [], [w])),
    "differences of unequal shapes": (ValueError, r"b\[0\] is", lambda w: ops.difference_dot([w], [w[:1]], [w], [w])),
    "sparse scores": (TypeError, r"scores\[0\] must be a dense", lambda w: ops.topk_mask([w.to_sparse()], 1)),
    "integer scores": (TypeError, r"scores\[0\] must be a dense", lambda w: ops.topk_mask([w.int()], 1)),
    "sparse like": (TypeError, r"like\[0\] must be a dense", lambda w: ops.random_mask([w.to_sparse()], 1)),
    "saved dtype": (TypeError, r"saved\[0\] must be torch.float32", lambda w: ops.perturb([w], [w], [w.double()])),
    "restore dtype": (TypeError, r"saved\[0\] must be torch.float32", lambda w: ops.restore([w], [w.double()])),
    "update saved dtype": (TypeError, r"saved\[0\]", lambda w: ops.update_sgd([w], [w], lr=1.0, saved=[w.double()])),
    "expanded": (ValueError, r"w\[0\] is written", lambda w: ops.restore([torch.ones(1).expand(3)], [w])),
    "gaps": (ValueError, r"w\[0\] is written", lambda w: ops.restore([torch.ones(6)[::2]], [w])),
    "mode": (ValueError, r"mode must be one of euclidean", lambda w: ops.perturb([w], [w], [w], mode="up")),
    "weighting": (ValueError, r"weighting must be one of", lambda w: ops.norms([w], weighting="up")),
    "weighting without w": (ValueError, r"weighting='filter' needs w", lambda w: ops.norms([w], weighting="filter")),
    "cache without coefficients": (ValueError, r"needs coeff_a", lambda w: ops.update_sgd([w], [w], lr=1.0, cache=[w])),
    "no buffer": (ValueError, r"momentum_buffer has 0", lambda w: ops.update_sgd([w], [w], lr=1.0, momentum=0.9)),
    "no step": (ValueError, r"step must have one", lambda w: ops.update_adam([w], [w], [w], [w], [], lr=1.0)),
    "backend": (ValueError, r"backend must be one of", lambda w: ops.norms([w], backend="gpu")),
}


@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_say_what_is_wrong_and_write_nothing(error, message, call):
    w = torch.ones(3)
    with pytest.raises(error, match=message):
        call(w)
    assert w.tolist() == [1, 1, 1]
