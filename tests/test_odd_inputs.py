"""Tensors that users really have: empty, tiny, shared, strided, thousands of them, one of half a billion entries."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import samkern

from . import once
from .lists import BF16, CHUNK, FP16, FP32, FP64, affordable, agree, chunk, seeded
from .methods import METHODS, MOMENTUM, each_method, method_named

SGD = torch.optim.SGD


def step_with_random_gradients(opt, params, n=3):
    for _ in range(n):
        opt.step(lambda: [setattr(p, "grad", torch.randn_like(p)) for p in params])


@each_method
def test_shapes(method, backend):
    """Empty, 0-d, one entry, around chunk borders, 60 tiny ones, in one list: equal to the reference."""
    shapes = [
        (0,),
        (),
        (1,),
        (chunk(backend) - 1,),
        (chunk(backend) + 1,),
        (3, 0),
        (2, 3),
        *[(64,)] * affordable(backend, 60, 10),
    ]
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        step_with_random_gradients(method.make(params, MOMENTUM, backend=name), params, 4)
        results.append([p.detach() for p in params])
    assert agree(*results, backend)
    assert results[0][0].shape == (0,)


@each_method
def test_mixed_dtypes(method, backend):
    dtypes = [FP32, FP64, BF16, FP16] * 2
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 5).to(dtype)) for dtype in dtypes]
        opt = method.make(params, MOMENTUM, backend=name)
        step_with_random_gradients(opt, params, 4)
        results.append([p.detach() for p in params])
        state = {p.dtype: opt.state[p]["momentum_buffer"].dtype for p in params}
        assert state == {FP32: FP32, FP64: FP64, BF16: FP32, FP16: FP32}
    assert agree(*results, backend)


@each_method
def test_channels_last_is_the_same_training(method, backend):
    """The layout changes where an entry is in memory, not what happens to it."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        w = torch.randn(6, 4, 5, 3)
        p = nn.Parameter(w.contiguous(memory_format=memory_format))
        opt = method.make([p], MOMENTUM, backend=backend)
        for t in range(4):
            g = seeded(t)
            opt.step(lambda p=p, g=g: setattr(p, "grad", torch.randn(6, 4, 5, 3, generator=g)))  # contiguous gradients
        assert p.is_contiguous(memory_format=memory_format)
        assert opt.state[p]["momentum_buffer"].stride() == p.stride()
        results.append(p.detach())
    assert torch.allclose(*results, rtol=1e-6, atol=1e-7)


def test_strided_views_with_gaps_take_the_reference_and_say_so():
    """Columns of a matrix, one parameter each: supported, slower, and explain() tells."""
    big = torch.randn(10, 4)
    columns = [nn.Parameter(big[:, i]) for i in range(4)]
    assert not columns[0].is_contiguous()
    dense = [nn.Parameter(big[:, i].clone()) for i in range(4)]
    opt, twin = (samkern.LookSAM(p, SGD, lr=0.1, momentum=0.9, k=2) for p in (columns, dense))
    assert "reference, because parameter 0 is a strided view with gaps" in opt.explain()
    for t in range(4):
        for o, params in ((opt, columns), (twin, dense)):
            g = seeded(t)
            o.step(lambda ps=params, g=g: [setattr(p, "grad", torch.randn(10, generator=g)) for p in ps])
    assert all(torch.equal(a, b) for a, b in zip(columns, dense, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: [torch.ones(3, dtype=torch.complex64)],
            TypeError,
            r"parameter 0, shape \(3,\): dtype torch.complex64",
        ),
        (
            lambda: [torch.ones(2), torch.ones(3, 2).to_sparse()],
            TypeError,
            r"parameter 1, shape \(3, 2\): layout torch.sparse",
        ),
        (lambda: [torch.ones(1).expand(4)], ValueError, r"parameter 0, shape \(4,\): entries share memory"),
        (lambda: [torch.ones(4).as_strided((3, 2), (1, 1))], ValueError, r"entries share memory \(strides \(1, 1\)\)"),
        (
            lambda: (lambda x: [x, x[:2]])(torch.ones(4)),
            ValueError,
            r"shape \(2,\) shares memory with parameter|shape \(4,\) shares",
        ),
        (
            lambda: (lambda x: [x, x])(torch.ones(4)),
            ValueError,
            r"parameter 1, shape \(4,\) was given before, as parameter 0",
        ),
        (
            lambda: [torch.ones(2), torch.ones(2, device="meta")],
            ValueError,
            r"parameter 1, shape \(2,\) is on meta, parameter 0 on cpu",
        ),
    ],
    ids=["complex", "sparse", "expanded", "overlapping", "shared", "twice", "devices"],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_what_is_refused_names_index_and_shape(make, error, message):
    with pytest.raises(error, match=message):
        samkern.SAM(make(), SGD, lr=0.1)


def test_a_shared_module_is_given_once(backend):
    """model.parameters() lists tied weights once; both uses add to one gradient."""
    a = nn.Linear(4, 4, bias=False)
    b = nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, nn.Tanh(), b)
    opt = samkern.SAM(model.parameters(), SGD, lr=0.1, backend=backend)
    assert len(opt.param_groups[0]["params"]) == 1
    before = a.weight.detach().clone()
    opt.step(lambda: model(torch.ones(1, 4)).sum().backward())
    assert b.weight is a.weight
    assert not torch.equal(before, a.weight)


def test_thousands_of_small_tensors(backend):
    params = [nn.Parameter(torch.randn(64)) for _ in range(affordable(backend, 2000, 50))]
    opt = samkern.LookSAM(params, torch.optim.AdamW, lr=1e-3, k=2, backend=backend)
    before = [p.detach().clone() for p in params]
    step_with_random_gradients(opt, params, 2)
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_many_groups(backend):
    """One group a tensor, each with a radius and a learning rate of its own."""
    params = [nn.Parameter(torch.ones(3, dtype=FP64)) for _ in range(affordable(backend, 200, 30))]
    groups = [{"params": [p], "rho": 0.01 * i, "lr": 0.001 * i} for i, p in enumerate(params)]
    opt = samkern.SAM(groups, SGD, lr=1.0, backend=backend)
    opt.step(lambda: [setattr(p, "grad", torch.ones(3, dtype=FP64)) for p in params])
    for i, p in enumerate(params):
        assert torch.allclose(p.detach(), torch.full((3,), 1 - 0.001 * i, dtype=FP64))


def available_gigabytes() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.takes(25)
@pytest.mark.parametrize(
    ("numel", "dtype", "gigabytes"), [(500_000_000, FP32, 9), (2**31 + 70_000, BF16, 18)], ids=["500M", "beyond_int32"]
)
def test_one_huge_tensor(numel, dtype, gigabytes):
    """Ends and middle are right, past 2^31 entries too: no index is 32 bits wide."""
    with once.alone("memory"):  # what is free for one is not for two
        if available_gigabytes() < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of free memory, {available_gigabytes():.0f} GB are available")
        p = nn.Parameter(torch.zeros(numel, dtype=dtype), requires_grad=False)
        where = torch.tensor([0, CHUNK - 1, numel // 2, numel - 70_000, numel - 1])
        grad = torch.zeros(numel, dtype=dtype)
        grad[where] = 1.0
        seen = []

        def closure():
            seen.append(p[where].clone())
            p.grad = grad

        opt = samkern.SAM([p], SGD, lr=0.5, rho=5**0.5)
        opt.step(closure)
        assert torch.allclose(seen[1].float(), torch.ones(5), rtol=1e-2)
        assert torch.equal(p[where].float(), torch.full((5,), -0.5))
        assert int(p.count_nonzero()) == 5


def test_gradients_kept_by_the_user_are_not_written(backend):
    """Whoever holds on to p.grad from before the step finds it unchanged."""
    for base in (SGD, torch.optim.RMSprop):
        p = nn.Parameter(torch.ones(5))
        opt = samkern.SAM([p], base, lr=0.1, backend=backend)
        held = []

        def closure(p=p, held=held):
            p.grad = torch.full((5,), float(len(held) + 1))
            held.append(p.grad)

        opt.step(closure)
        assert [x.tolist() for x in held] == [[1.0] * 5, [2.0] * 5]


def test_autograd_notices_that_weights_changed(backend):
    """A graph built before the step cannot be run through afterwards: the versions say so."""
    p = nn.Parameter(torch.ones(3))
    opt = samkern.SAM([p], SGD, lr=0.1, backend=backend)
    stale = (p * p).sum()
    opt.step(lambda: setattr(p, "grad", torch.ones(3)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_methods_are_all_in_the_public_namespace():
    assert {type(m.make([nn.Parameter(torch.ones(1))], MOMENTUM)).__name__ for m in METHODS} <= set(samkern.__all__)
    assert method_named("SAM").cls is samkern.SAM


@pytest.mark.parametrize("layout", ["dense", "with gaps"])
def test_expanded_gradients_for_a_base_with_a_step_of_its_own(layout, backend):
    """The backward of a sum leaves one number for all entries. What the base receives needs memory for each."""
    x = torch.ones(4, 6)[:, ::2] if layout == "with gaps" else torch.ones(4, 3)
    p = nn.Parameter(x.detach())
    opt = samkern.LookSAM([p], torch.optim.RMSprop, lr=0.1, k=2, max_grad_norm=0.5, backend=backend)
    held = torch.ones(()).expand(4, 3)
    for _ in range(2):
        opt.step(lambda: setattr(p, "grad", held))
    assert torch.equal(held, torch.ones(4, 3))
    assert torch.equal(p.detach(), p.detach()[0, 0].expand(4, 3))
    assert p.detach()[0, 0] < 0.8


def test_groups_without_parameters(backend):
    """As a filter over names leaves them, at the beginning too."""
    for name in ("ARSAM", "LookSAM", "SSAMD", "SAM"):
        p = nn.Parameter(torch.ones(3))
        options = {"components": "tensor"} if name == "ARSAM" else {}
        groups = [{"params": []}, {"params": [p], "lr": 0.2}, {"params": []}]
        opt = method_named(name).make(groups, MOMENTUM, backend=backend, **options)
        step_with_random_gradients(opt, [p], 4)
        assert not torch.equal(p.detach(), torch.ones(3))
