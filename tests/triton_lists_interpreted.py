"""The list ops on Triton's kernels, in its interpreter, against ``samkern.reference``: see ``triton_interpreted.py``."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from samkern import ops, reference
from samkern.ops import dispatch

from .lists import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    borders_intact,
    clones,
    dtype_name,
    guarded_list,
    mixed_list,
    poisoned_like,
    random_list,
    same_bits,
    scalar,
)

each_dtype = pytest.mark.parametrize(
    "dtype", [*DTYPES, None], ids=lambda dtype: dtype_name(dtype) if dtype else "mixed"
)

# Empty, 0-d, with and without filters, beyond a block, and long filters; no two neighbours of one size.
SHAPES = [(0,), (), (5,), (2, 0, 3), (7, 3, 2), (2100,), (3, 1100), (40, 2)]
BORDERS = [(65_536,), (3,), (65_537,), (65_535,)]


def lists_of(dtype, n, shapes=SHAPES, scale=1.0):
    """``n`` lists of ``dtype``, or of all dtypes, each list beginning with another one."""
    if dtype is not None:
        return [random_list(shapes, dtype, scale) for _ in range(n)]
    return [[(scale * torch.randn(shape)).to(DTYPES[(i + k) % 4]) for i, shape in enumerate(shapes)] for k in range(n)]


def close(a, b, tolerance=1e-12):
    """Up to the order of additions."""
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) if b.numel() else 0)


def same(a, b):
    """Bitwise, and for float64, where a coefficient is not rounded, to its last places."""
    return all(
        torch.allclose(x, y, rtol=1e-13, atol=1e-15, equal_nan=True) if x.dtype == FP64 else same_bits([x], [y])
        for x, y in zip(a, b, strict=True)
    )


@each_dtype
@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
def test_norms(weighting, dtype):
    a, b, w = lists_of(dtype, 3)
    sums = ops.norms(a, b, w, weighting=weighting, eta=0.1, backend="triton")
    expected = reference.norms(a, b, w, weighting=weighting, eta=0.1)
    assert sums.shape == (5, len(a) + 1)
    for row, expected_row in zip(sums, expected, strict=True):
        assert close(row, expected_row, 1e-12 if expected_row.min() >= 0 else 1e-10)


@each_dtype
def test_difference_dot(dtype):
    """A NaN stays where it is, and is not read beyond an end."""
    lists = lists_of(dtype, 4, [*SHAPES, (2049,)])
    for given in (lists, lists[:2] * 2, [*lists[:3], lists[0]]):
        assert close(ops.difference_dot(*given, backend="triton"), reference.difference_dot(*given), 1e-10)
    lists[3][4][:] = torch.nan
    sums = ops.difference_dot(*lists, backend="triton")
    assert sums.isnan().nonzero().flatten().tolist() == [4, len(lists[0])]


def test_norms_of_part_of_the_lists():
    a, b = lists_of(FP32, 2, BORDERS)
    only_a, with_b = ops.norms(a, backend="triton"), ops.norms(a, b, backend="triton")
    with_w = ops.norms(a, (), b, backend="triton")
    assert close(with_b, reference.norms(a, b))
    assert torch.equal(only_a[0], with_b[0])
    assert torch.equal(only_a[4], only_a[0])
    assert only_a[1:4].count_nonzero() == with_w[1:3].count_nonzero() == 0
    assert torch.equal(with_w[3], with_b[2])


def test_norms_read_any_layout():
    """Also lists with gaps, and expanded ones."""
    a = [torch.randn(6, 5)[:, ::2], torch.randn(4, 1).expand(4, 7), torch.randn(5, 6).t()]
    w = [torch.randn(x.shape) for x in a]
    assert close(ops.difference_dot(a, w, w, a, backend="triton"), reference.difference_dot(a, w, w, a))
    for weighting in ("element", "filter"):
        sums = ops.norms(a, w, w, weighting=weighting, eta=0.1, backend="triton")
        assert close(sums, reference.norms(a, w, w, weighting=weighting, eta=0.1))


@each_dtype
@pytest.mark.parametrize("mode", reference.CLIMBS)
def test_perturb(mode, dtype):
    w, g = lists_of(dtype, 2)
    before, saved, expected = clones(w), poisoned_like(w), clones(w)
    options = {"rho": 0.3, "mode": mode, "eta": 0.01, "trust_clip": 0.5}
    sums = ops.perturb(w, g, saved, backend="triton", **options)
    assert close(sums, ops.perturb(expected, g, poisoned_like(w), backend="reference", **options))
    assert same(w, expected)
    assert same_bits(saved, before)
    assert not same_bits(w, before)
    ops.restore(w, saved, backend="triton")
    assert same_bits(w, before)


@pytest.mark.parametrize("direction", reference.DIRECTIONS)
def test_a_scale_per_tensor(direction):
    """One that is not finite leaves its tensor alone."""
    from samkern.triton_kernels import ops as kernels

    w, g = lists_of(FP32, 2)
    scale = torch.randn(len(w), dtype=FP64)
    scale[4], scale[6] = math.nan, math.inf
    for given in (scale, scale[2], scale[4]):
        results = []
        for backend in (kernels, reference):
            own, saved = clones(w), poisoned_like(w)
            backend.perturb(own, g, saved, given, direction=direction, eta=0.01)
            results.append([*own, *saved])
        assert same_bits(*results)


@each_dtype
def test_restore_copies_bits(dtype):
    """Also of NaN with a payload, and of -0."""
    (saved,) = lists_of(dtype, 1)
    for x in saved:
        x.view(-1)[::3] = -0.0
    saved.append(torch.tensor([0x7FC12345, 0x7F812345, -(2**31), 1], dtype=torch.int32).view(FP32))
    w = [torch.ones_like(x) for x in saved]
    ops.restore(w, saved, backend="triton")
    assert same_bits(w, saved)


@each_dtype
@pytest.mark.parametrize("cache_dtype", [FP32, BF16, FP64], ids=dtype_name)
def test_decompose(dtype, cache_dtype):
    g, g_s = lists_of(dtype, 2)
    for k in (torch.randn(len(g), dtype=FP64), scalar(0.3), None):
        c, expected = poisoned_like(g, cache_dtype), poisoned_like(g, cache_dtype)
        cc = ops.decompose(c, g, g_s, k, backend="triton")
        expected_cc = ops.decompose(expected, g, g_s, k, backend="reference")
        assert same(c, expected)
        assert close(cc, expected_cc)


@each_dtype
def test_combine(dtype):
    u, a, b = lists_of(dtype, 3)
    for coeffs in ((scalar(0.3), scalar(-0.7)), (torch.randn(len(a), dtype=FP64), scalar(0.7))):
        own, expected = poisoned_like(u), poisoned_like(u)
        ops.combine(own, a, b, *coeffs, backend="triton")
        ops.combine(expected, a, b, *coeffs, backend="reference")
        assert same(own, expected)
        expected, own = clones(a), clones(a)
        ops.combine(own, own, b, *coeffs, backend="triton")  # in place
        ops.combine(expected, expected, b, *coeffs, backend="reference")
        assert same(own, expected)


SGD = {"lr": 0.1, "weight_decay": 0.01}
ADAM = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}
UPDATES = {
    "sgd": ("update_sgd", 0, SGD),
    "momentum": ("update_sgd", 1, {**SGD, "momentum": 0.9, "dampening": 0.3}),
    "first": ("update_sgd", 1, {**SGD, "momentum": 0.9, "dampening": 0.3, "first": torch.tensor(True)}),
    "some_first": (
        "update_sgd",
        1,
        {**SGD, "momentum": 0.9, "dampening": 0.3, "first": torch.arange(len(SHAPES)) % 2 == 0},
    ),
    "nesterov": ("update_sgd", 1, {**SGD, "momentum": 0.9, "nesterov": True}),
    "adam": ("update_adam", 2, ADAM),
    "adamw": ("update_adamw", 2, ADAM),
}
PER_TENSOR = torch.linspace(-1, 1, len(SHAPES), dtype=FP64)
PARTS = {
    "plain": (),
    "saved": ("saved",),
    "mixed": ("cache", "coeff_a", "coeff_b"),
    "clipped": ("clip",),
    "all": ("saved", "cache", "coeff_a", "coeff_b", "clip", "skip"),
}


def run_update(backend, name, w, u, moments, steps, options):
    own, own_moments, own_steps = clones(w), [clones(m) for m in moments], [t.clone() for t in steps]
    lists = [*own_moments, own_steps] if steps else own_moments
    getattr(ops, name)(own, u, *lists, backend=backend, **options)
    return [*own, *(x for m in own_moments for x in m), *own_steps]


@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize(
    ("parts", "dtype"),
    [*((parts, FP32) for parts in PARTS), *(("all", dtype) for dtype in (FP64, BF16, FP16, None)), ("mixed", None)],
)
def test_updates(parts, dtype, case):
    """Bit by bit: weights, moments and steps."""
    name, n_moments, options = UPDATES[case]
    w, u, saved, cache = lists_of(dtype, 4)
    moments = [[x.to(reference.math_dtype(y.dtype)).abs() for x, y in zip(u, w, strict=True)] for _ in range(n_moments)]
    steps = [torch.tensor(float(i), dtype=(FP32, FP64)[i % 2]) for i in range(len(w))] if n_moments == 2 else []
    given = {"saved": [x.to(y.dtype) for x, y in zip(saved, w, strict=True)], "cache": cache, "coeff_a": scalar(0.7)}
    given |= {"coeff_b": PER_TENSOR, "clip": scalar(0.9), "skip": torch.tensor(False)}
    options = {**options, **{key: given[key] for key in PARTS[parts]}}
    results = [run_update(backend, name, w, u, moments, steps, options) for backend in ("triton", "reference")]
    assert same(*results)
    assert not same_bits(results[0][: len(w)], w)


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("case", UPDATES)
def test_a_skipped_update(case, saves):
    """Weights are restored; nothing else changes."""
    name, n_moments, options = UPDATES[case]
    w, u, saved = lists_of(FP32, 3)
    moments = [[x.abs() for x in u] for _ in range(n_moments)]
    steps = [torch.tensor(3.0) for _ in w] if n_moments == 2 else []
    options = {**options, "skip": torch.tensor(True), **({"saved": saved} if saves else {})}
    results = run_update("triton", name, w, u, moments, steps, options)
    assert same_bits(results, [*(saved if saves else w), *(x for m in moments for x in m), *steps])


@pytest.mark.parametrize("name", ["update_sgd", "update_adam"])
def test_half_moments_and_foreign_steps(name):
    """Moments of any dtype are rounded once; a step that is no float is advanced as well."""
    w, u, first, second = lists_of(FP32, 4)
    moments = [[x.to(BF16).abs() for x in first], [x.to(FP16).abs() for x in second]]
    steps = [torch.tensor(2) for _ in w]
    if name == "update_sgd":
        moments, steps, options = moments[:1], [], {**SGD, "momentum": 0.9}
    else:
        options = ADAM
    results = [run_update(backend, name, w, u, moments, steps, options) for backend in ("triton", "reference")]
    assert same(*results)


@pytest.mark.parametrize("offset", [1, 2])
def test_misaligned_views_and_their_borders(offset):
    """Nothing outside of a view is written, wherever it begins."""
    shapes = [*SHAPES, *BORDERS[1:]]
    lists = [guarded_list(mixed_list(shapes), offset if i != 2 else 0) for i in range(5)]
    w, g, saved, momentum, cache = (views for views, _ in lists)
    momentum = [x.to(reference.math_dtype(x.dtype)) for x in momentum]
    expected = clones(w)
    ops.perturb(w, g, saved, 0.3, mode="filter", eta=0.1, backend="triton")
    ops.perturb(expected, g, poisoned_like(w), 0.3, mode="filter", eta=0.1, backend="reference")
    assert same(w, expected)
    ops.decompose(cache, g, saved, scalar(0.5), backend="triton")
    ops.combine(g, g, cache, scalar(0.5), scalar(2.0), backend="triton")
    ops.update_sgd(w, g, momentum, lr=0.1, momentum=0.9, saved=saved, backend="triton")
    ops.restore(w, saved, backend="triton")
    assert same_bits(w, saved)
    assert all(borders_intact(*pair) for pair in lists)


@pytest.mark.parametrize("mode", ["element", "filter", "layer"])
def test_layouts(mode):
    """What is only read may have another layout than the weights."""
    w = [torch.randn(6, 4, 5, 3).contiguous(memory_format=torch.channels_last), torch.randn(40, 60).t()]
    g, cache = ([torch.randn(x.shape) for x in w] for _ in range(2))
    saved, expected = poisoned_like(w), clones(w)
    ops.perturb(w, g, saved, 0.3, mode=mode, eta=0.01, backend="triton")
    ops.perturb(expected, g, poisoned_like(w), 0.3, mode=mode, eta=0.01, backend="reference")
    assert same_bits(w, expected)
    parts = {"cache": cache, "coeff_a": scalar(0.5), "coeff_b": scalar(2.0)}
    ops.update_sgd(w, g, lr=0.1, saved=[x.contiguous() for x in saved], backend="triton", **parts)
    ops.update_sgd(expected, g, lr=0.1, saved=saved, backend="reference", **parts)
    assert same_bits(w, expected)


def test_versions_are_bumped():
    w = [torch.ones(3, requires_grad=True)]
    y = (w[0] * w[0]).sum()
    ops.perturb(w, [torch.ones(3)], [torch.empty(3)], backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_nothing_is_read_back(monkeypatch):
    """No scalar of a tensor reaches Python, so that no op waits for the device."""
    w, g, saved, cache, m, v = lists_of(FP32, 6)
    steps, parts = [torch.tensor(1.0) for _ in w], {"coeff_a": scalar(0.5), "coeff_b": PER_TENSOR, "clip": scalar(0.5)}

    def refuse(*args, **options):
        raise AssertionError("read back")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        ops.perturb(w, g, saved, 0.3, mode="filter", eta=0.1, backend="triton")
        ops.decompose(cache, g, saved, backend="triton")
        ops.difference_dot(w, saved, g, cache, backend="triton")
        skip = torch.tensor(False)
        ops.update_adam(w, g, m, v, steps, lr=0.1, saved=saved, cache=cache, skip=skip, backend="triton", **parts)
        ops.combine(g, g, cache, parts["coeff_a"], parts["coeff_b"], backend="triton")
        ops.restore(w, saved, backend="triton")
    assert same_bits(w, saved)


def test_the_compiler_takes_the_reference(monkeypatch):
    """Which inductor fuses."""
    taken = functools.partial(dispatch.implementation, "restore", "triton", reads={}, writes={"w": [torch.ones(2)]})
    assert taken().__module__ == "samkern.triton_kernels.ops"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert taken() is reference.restore
