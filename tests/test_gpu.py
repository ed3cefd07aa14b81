"""What only a GPU can show. On other machines these tests are skipped, and say so; ``make gpu`` runs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import samkern

from .lists import BF16, FP16, FP32, FP64, same_bits
from .methods import METHODS, MOMENTUM, base_named, method_named

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
GPU = [name for name in ("cuda", "triton") if samkern.backends()[name].available] or ["no backend for GPUs"]
each_backend = pytest.mark.parametrize("backend", GPU)
SHAPES = [(64, 3, 7, 7), (), (0,), (20_001,), (1,), (500, 130), (64,)]


def parameters(dtype=FP32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in shapes]


def train(opt, params, steps=4):
    generator = torch.Generator().manual_seed(1)

    def closure():
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)

    for _ in range(steps):
        opt.step(closure)
    return [p.detach().clone() for p in params]


@each_backend
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_agree_with_the_reference(method, dtype, backend):
    results = []
    for name in (backend, "reference"):
        params = parameters(dtype)
        results.append(train(method.make(params, MOMENTUM, backend=name), params))
    tolerance = {FP64: 1e-10, FP32: 1e-5, BF16: 2e-2, FP16: 4e-3}[dtype]
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*results, strict=True))


@each_backend
@pytest.mark.parametrize("name", ["SAM", "ASAM_filter", "LookSAM", "LookLayerSAM_lars"])
def test_small_case(name, backend):
    """Every phase of every kernel on a few thousand entries: what the sanitizers run."""
    for base in ("momentum", "AdamW"):
        params = parameters(shapes=[(33, 65), (7,), (0,), (3000,)])
        train(method_named(name).make(params, base_named(base), backend=backend), params)
        assert all(p.isfinite().all() for p in params)


@each_backend
def test_a_hundred_runs_give_the_same_bits(backend):
    expected = None
    for _ in range(100):
        params = parameters()
        weights = train(method_named("LookSAM").make(params, base_named("AdamW"), backend=backend), params, 3)
        expected = expected or weights
        assert same_bits([w.cpu() for w in weights], [w.cpu() for w in expected])


@each_backend
def test_one_launch_and_several_give_the_same_bits(backend, monkeypatch):
    results = []
    for setting in ("1", "0"):
        monkeypatch.setenv("SAMKERN_ONE_LAUNCH", setting)
        params = parameters()
        results.append(train(method_named("LookSAM").make(params, MOMENTUM, backend=backend), params))
    assert same_bits(*[[w.cpu() for w in weights] for weights in results])


@pytest.mark.skipif("cuda" not in GPU, reason="samkern._cuda is not built")
def test_a_half_step_is_one_launch_and_reads_nothing_back():
    params = parameters()
    opt = samkern.SAM(params, torch.optim.AdamW, lr=1e-3, backend="cuda")
    grads = [torch.randn_like(p) for p in params]

    def step():
        for half in (opt.first_step, opt.second_step):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            half()

    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, [event.name for event in kernels]


@pytest.mark.skipif("cuda" not in GPU, reason="samkern._cuda is not built")
def test_a_recorded_step_follows_lr_and_rho():
    """Replays read both anew; they equal steps that were not recorded."""
    x, y = torch.randn(64, 20, device="cuda"), torch.randn(64, 1, device="cuda")

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1)).cuda()
        opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, capturable=True)

        def closure():
            opt.zero_grad(set_to_none=False)
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        return model, opt, closure

    model, opt, closure = make()
    twin, twin_opt, twin_closure = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            opt.step(closure)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step(closure)
    for _ in range(3):
        twin_opt.step(twin_closure)
    for lr, rho in [(0.1, 0.1), (0.05, 0.2), (0.0, 0.2)]:
        for o in (opt, twin_opt):
            o.param_groups[0]["lr"].fill_(lr)
            o.param_groups[0]["rho"].fill_(rho)
        graph.replay()
        twin_opt.step(twin_closure)
        assert torch.allclose(model[0].weight, twin[0].weight, rtol=1e-6)
