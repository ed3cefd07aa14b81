"""What only a GPU can show. On other machines these tests are skipped, and say so; ``make gpu`` runs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import samkern
from bench import kernels
from bench.gpu_clock import Clock
from samkern import ops

from . import barrier_stress
from .lists import BF16, FP16, FP32, FP64, same_bits
from .methods import METHODS, MOMENTUM, base_named, method_named

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
GPU = [name for name in ("cuda", "triton") if samkern.backends()[name].available] or ["no backend for GPUs"]
each_backend = pytest.mark.parametrize("backend", GPU)
SHAPES = [(64, 3, 7, 7), (), (0,), (20_001,), (1,), (500, 130), (64,)]
SMALL = [(33, 65), (7,), (0,), (3000,)]
ROUNDS = 10_000


def parameters(dtype=FP32, shapes=SHAPES):
    """``dtype``: of all, or "mixed"."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (FP32, BF16, FP16, FP64) if dtype == "mixed" else (dtype,)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(x.to("cuda", dtypes[i % len(dtypes)])) for i, x in enumerate(values)]


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in params]


def train(opt, params, steps=4):
    seeds = iter(range(1, 1 + 2 * steps))

    def closure():
        for p, grad in zip(params, gradients(params, next(seeds)), strict=True):
            p.grad = grad

    for _ in range(steps):
        opt.step(closure)
    return values(params)


def values(params):
    """On the host: what the device was still doing is waited for."""
    return [p.detach().to("cpu", copy=True) for p in params]


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
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, "mixed"], ids=str)
@pytest.mark.parametrize("name", ["SAM", "ASAM_filter", "LookSAM", "LookLayerSAM_lars"])
def test_small_case(name, dtype, backend):
    """Every phase of every kernel on a few thousand entries: what the sanitizers run."""
    for base in ("momentum", "AdamW"):
        params = parameters(dtype, SMALL)
        opt = method_named(name).make(params, base_named(base), backend=backend)
        before = train(opt, params)
        for p, grad in zip(params, gradients(params, 99), strict=True):
            p.grad = grad
        opt.first_step()
        opt.restore()
        assert same_bits(values(params), before)
        assert all(x.isfinite().all() for x in before)


@each_backend
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_small_case_of_list_ops(dtype, backend):
    def run(name):
        w, m, v = ([p.detach() for p in parameters(dtype, SMALL)] for _ in range(3))
        g, g_s = gradients(w, 1), gradients(w, 2)
        saved, c, u = ([torch.full_like(x, torch.nan) for x in w] for _ in range(3))
        v = [x.float().abs() for x in v]
        m = [x.float() for x in m]
        one = torch.ones((), dtype=FP64, device="cuda")
        step = [torch.ones((), device="cuda") for _ in w]
        sums = [ops.norms(g, g_s, w, weighting="filter", eta=0.01, backend=name)]
        for mode in ("euclidean", "element", "filter", "lars"):
            ops.perturb(w, g, saved, 0.05, mode=mode, eta=0.01, backend=name)
            ops.restore(w, saved, backend=name)
        sums.append(ops.decompose(c, g, g_s, backend=name))
        sums.append(ops.difference_dot(g, w, g_s, w, backend=name))
        ops.combine(u, g, c, one, 0.5 * one, backend=name)
        ops.update_sgd(w, u, m, lr=0.1, momentum=0.9, backend=name)
        ops.update_adamw(w, u, m, v, step, lr=0.1, backend=name)
        return [x.float().cpu() for x in (*w, *saved, *c, *u, *m, *v, *step, *sums)]

    tolerance = 1e-5 if dtype == FP32 else 2e-2
    for x, y in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---- masks


needs_cuda = pytest.mark.skipif("cuda" not in GPU, reason=samkern.backends()["cuda"].why)


@needs_cuda
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, "mixed"], ids=str)
def test_small_case_of_masks_on_cuda(dtype):
    """Bitwise the reference's; every phase of every kernel, ties among them: what the sanitizers run."""
    g = [(4 * x).round() for x in gradients(parameters(dtype, SMALL), 1)]
    n = sum(x.numel() for x in g)

    def run(name):
        mask = ops.topk_mask(g, n // 3, nan="last", backend=name)
        moved = [mask.clone(), mask.clone(), ops.random_mask(g, n // 2, seed=3, backend=name)]
        for regrow, one in zip((True, False), moved, strict=False):
            ops.drop_grow_mask(one, g, n // 5, seed=5, t=7, regrow=regrow, backend=name)
        w = [p.detach() for p in parameters(dtype, SMALL)]
        f, saved, sums = (
            [x.float().abs() for x in w],
            [torch.full_like(x, torch.nan) for x in w],
            torch.ones(5, len(w) + 1),
        )
        ops.perturb(w, g, saved, 0.05, sums=sums.to("cuda", FP64), mask=mask, backend=name)
        ops.fisher_accumulate(f, g, keep=0.9, gain=0.1, backend=name)
        norms = ops.norms(g, (), w, weighting="filter", eta=0.01, mask=mask, backend=name)
        return [x.bits.cpu() for x in (mask, *moved)], [x.cpu() for x in (*w, *saved, *f)], norms.cpu()

    (bits, lists, norms), (expected_bits, expected, expected_norms) = run("cuda"), run("reference")
    assert all(map(torch.equal, bits, expected_bits))
    assert same_bits(lists, expected)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5 if dtype == FP32 else 2e-2, atol=0)


@needs_cuda
@pytest.mark.parametrize("style", ["squares", "few", "equal"])
def test_selection_of_many_scores(style, monkeypatch):
    """Against torch.topk's threshold; the same bits 100 times and phase by phase, and nothing is waited for."""
    n = 100_000_000
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of GPU memory are free")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(n, device="cuda", generator=generator).square_()
    x = {"squares": x, "few": (4 * x).round_(), "equal": torch.ones_like(x)}[style]
    scores, k = [x[: n // 3], x[n // 3 :]], n // 2 + 77
    least = torch.topk(x, k, sorted=False).values.min()
    n_ties = k - int((x > least).sum())
    expected = (x > least) | ((x == least) & ((x == least).cumsum(0) <= n_ties))
    mask = ops.topk_mask(scores, k, nan="last", backend="cuda")
    assert torch.equal(torch.cat([part.flatten() for part in mask.unpack()]), expected)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [ops.topk_mask(scores, k, nan="last", backend="cuda") for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one.bits, mask.bits) for one in again)
    monkeypatch.setenv("SAMKERN_ONE_LAUNCH", "0")
    assert torch.equal(ops.topk_mask(scores, k, nan="last", backend="cuda").bits, mask.bits)


@needs_cuda
def test_launches_of_a_selection():
    """One, beside what clears its counters and lays out its lists."""
    scores, clock = gradients(parameters(), 1), Clock(torch.device("cuda"))
    mask = ops.topk_mask(scores, 9, nan="last", backend="cuda")
    for run in (
        lambda: ops.topk_mask(scores, 9, nan="last", backend="cuda"),
        lambda: ops.drop_grow_mask(mask, scores, 9, backend="cuda"),
    ):
        names = clock.launches(run)
        assert sum("topk_kernel" in name or "drop_grow_kernel" in name for name in names) == 1, names


@needs_cuda
def test_selection_of_more_scores_than_an_int32_counts():
    n = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("less than 20 GiB of GPU memory are free")
    x = torch.zeros(n, dtype=BF16, device="cuda")
    places = torch.tensor([0, 5, 2**31 - 1, 2**31, n - 1], device="cuda")
    x[places] = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0], dtype=BF16, device="cuda")
    mask = ops.topk_mask([x], 5, nan="last", backend="cuda")
    assert mask.count() == 5
    assert ((mask.bits[places // 8] >> (places % 8).byte()) & 1).all()
    ties = ops.topk_mask([x], 2**31 + 3, nan="last", backend="cuda")  # all but the last 74 zeros
    assert torch.equal(ties.bits[: 2**28 - 1], torch.full_like(ties.bits[: 2**28 - 1], 255))
    assert ties.count() == 2**31 + 3


# ---- the same bits, whatever else goes on


@each_backend
@pytest.mark.parametrize("where", ["alone", "beside_another_stream", "on_a_side_stream"])
def test_a_hundred_runs_give_the_same_bits(where, backend):
    def run():
        params = parameters()
        return train(method_named("LookSAM").make(params, base_named("AdamW"), backend=backend), params, 4)

    expected = run()
    side, big = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(100):
        if where == "on_a_side_stream":
            with torch.cuda.stream(side):
                weights = run()
        else:
            if where == "beside_another_stream":
                with torch.cuda.stream(side):
                    for _ in range(8):
                        torch.mm(big, big)
            weights = run()
        assert same_bits(weights, expected)


@each_backend
def test_one_launch_and_several_give_the_same_bits(backend, monkeypatch):
    results = []
    for setting in ("1", "0"):
        monkeypatch.setenv("SAMKERN_ONE_LAUNCH", setting)
        params = parameters()
        results.append(train(method_named("LookSAM").make(params, MOMENTUM, backend=backend), params))
    assert same_bits(*results)


@each_backend
def test_two_optimizers_on_two_streams(backend):
    """Grids that wait for all of their blocks, started from two streams: neither starves or disturbs the other."""
    names, shapes = ("SAM", "LookSAM"), [*SHAPES, (3000, 1000)]

    def make():
        params = [parameters(shapes=shapes) for _ in names]
        return [
            (method_named(name).make(p, MOMENTUM, backend=backend), p) for name, p in zip(names, params, strict=True)
        ]

    def run(pairs, streams):
        grads = [[gradients(params, seed) for seed in range(2)] for _, params in pairs]
        torch.cuda.synchronize()
        for _ in range(30):
            for i, (opt, params) in enumerate(pairs):
                with torch.cuda.stream(streams[i]):
                    halves(opt, params, *grads[i])
        torch.cuda.synchronize()
        return [x for _, params in pairs for x in values(params)]

    one = torch.cuda.Stream()
    assert same_bits(run(make(), [one, one]), run(make(), [torch.cuda.Stream(), torch.cuda.Stream()]))


def halves(opt, params, first, second):
    """A step on gradients that stay where they are."""
    for p, grad in zip(params, first, strict=True):
        p.grad = grad
    if opt.first_step():
        for p, grad in zip(params, second, strict=True):
            p.grad = grad
    opt.second_step()


# ---- barriers


@pytest.mark.skipif(kernels.nvcc() is None, reason="nvcc is not on the PATH")
def test_the_barrier_of_cuda_at_the_occupancy_limit(tmp_path):
    major, minor = torch.cuda.get_device_capability()
    stress = barrier_stress.BarrierStress(barrier_stress.build(tmp_path, f"{major}{minor}"))
    n_blocks = stress.n_blocks()
    assert n_blocks >= 2 * torch.cuda.get_device_properties("cuda").multi_processor_count
    assert stress(n_blocks, ROUNDS, "cuda") == [barrier_stress.expected(n_blocks, ROUNDS)] * n_blocks
    with pytest.raises(RuntimeError, match="too many blocks"):
        stress(n_blocks + 1, 1, "cuda")


@pytest.mark.skipif("triton" not in GPU, reason=samkern.backends()["triton"].why)
def test_the_barrier_of_triton_at_the_occupancy_limit():
    from . import triton_barrier

    n_programs = triton_barrier.n_programs()
    assert triton_barrier.run(n_programs, ROUNDS) == [barrier_stress.expected(n_programs, ROUNDS)] * n_programs


# ---- launches


@each_backend
@pytest.mark.parametrize("base", ["momentum", "AdamW"])
@pytest.mark.parametrize("name", ["SAM", "ASAM_filter", "LookSAM"])
def test_launches_of_a_half_step(name, base, backend):
    """One each, and nothing is read back."""
    params, clock = parameters(), Clock(torch.device("cuda"))
    method = method_named(name)
    opt = method.make(params, base_named(base), backend=backend)
    first, second = gradients(params, 1), gradients(params, 2)
    k = method.looks_every
    for _ in range(2 * k):
        halves(opt, params, first, second)

    def quietly(half):
        torch.cuda.set_sync_debug_mode("error")
        try:
            half()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for looks in [True, False] if k > 1 else [True]:
        for _ in range(2):  # the second in a row counts: what moves when looks and reuses take turns is uploaded
            opt._t = 0 if looks else 1
            for p, grad in zip(params, first, strict=True):
                p.grad = grad
            in_first = clock.launches(lambda: quietly(opt.first_step))
            for p, grad in zip(params, second, strict=True):
                p.grad = grad
            in_second = clock.launches(lambda: quietly(opt.second_step))
        assert len(in_first) == (1 if looks else 0), in_first
        assert len(in_second) == 1, in_second


# ---- graphs


class Recorder:
    """An optimizer on gradients that stay where they are: those of first passes, reuses among them, and of second ones."""

    def __init__(self, name, base, backend, **options):
        self.params = parameters()
        method = method_named(name)
        self.opt = method.make(self.params, base_named(base), backend=backend, capturable=True, **options)
        self.first, self.second = gradients(self.params, 1), gradients(self.params, 2)

    def looks(self):
        return self.opt.schedule.look(self.opt._t)

    def feed(self, grads):
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad

    def climb(self):
        self.feed(self.first)
        if self.opt.first_step():
            self.feed(self.second)

    def update(self):
        self.opt.second_step()

    def warm_up(self, n_steps):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(n_steps):
                self.climb()
                self.update()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def record(self, half):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            half()
        return graph

    def set(self, seed, **options):
        for name, value in options.items():
            self.opt.param_groups[0][name].fill_(value)
        for place, new in ((self.first, seed), (self.second, seed + 1)):
            for old, x in zip(place, gradients(self.params, new), strict=True):
                old.copy_(x)


@each_backend
@pytest.mark.parametrize("base", ["momentum", "AdamW"])
@pytest.mark.parametrize(("name", "k"), [("SAM", 1), ("ASAM_element", 1), ("LookSAM", 2)])
def test_recorded_steps_are_bitwise_those_that_are_not(name, k, base, backend):
    """With lr, rho and gradients that change between replays. LookSAM: graphs for a look, and for what comes in between."""
    options = {"k": k} if k > 1 else {}
    recorded, eager = (Recorder(name, base, backend, **options) for _ in range(2))
    for one in (recorded, eager):
        one.warm_up(2 * k)
    graphs = []
    for _ in range(k):
        if recorded.looks():
            graphs.append((recorded.record(recorded.climb), eager.climb))
            graphs.append((recorded.record(recorded.update), eager.update))
        else:

            def reuse(one):
                one.climb()
                one.update()

            graphs.append((recorded.record(lambda: reuse(recorded)), lambda: reuse(eager)))
    last = values(eager.params)
    assert same_bits(values(recorded.params), last)  # recording runs nothing
    for seed, (lr, rho) in enumerate([(0.1, 0.1), (0.05, 0.2), (0.1, 0.5)]):
        for one in (recorded, eager):
            one.set(10 * seed + 3, lr=lr, rho=rho)
        for graph, half in graphs:
            graph.replay()
            half()
            weights = values(recorded.params)
            assert same_bits(weights, values(eager.params))
            assert not same_bits(weights, last)
            last = weights


@each_backend
@pytest.mark.parametrize("moved", ["first", "second"])
def test_recording_is_refused_after_a_gradient_has_moved(moved, backend):
    recorded, eager = (Recorder("SAM", "momentum", backend) for _ in range(2))
    for one in (recorded, eager):
        one.warm_up(3)
    grads = getattr(recorded, moved)
    setattr(recorded, moved, [grad.clone() for grad in grads])

    def step():
        recorded.climb()
        recorded.update()

    with pytest.raises(RuntimeError, match="moved"):
        recorded.record(step)
    torch.cuda.synchronize()
    assert same_bits(values(recorded.params), values(eager.params))
    for one in (recorded, eager):
        one.climb()
        one.update()
    assert same_bits(values(recorded.params), values(eager.params))


@each_backend
def test_a_recorded_closure_follows_lr_and_rho(backend):
    """Forward and backward in the graph too, as SharpnessAware describes it."""
    x, y = torch.randn(64, 20, device="cuda"), torch.randn(64, 1, device="cuda")

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1)).cuda()
        opt = samkern.SAM(
            model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, capturable=True, backend=backend
        )

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
        assert torch.allclose(model[0].weight, twin[0].weight, rtol=1e-5, atol=1e-6)


# ---- size


@each_backend
def test_more_elements_than_an_int32_counts(backend):
    """Of the first and of the last entries alike: w, climbed w, and w restored and updated."""
    n, lr, piece = 2**31 + 77, 0.5, 2**28
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("less than 40 GiB of GPU memory are free")
    p = nn.Parameter(torch.empty(n, dtype=BF16, device="cuda").normal_())
    before = p.detach().clone()
    opt = samkern.SAM([p], torch.optim.SGD, lr=lr, rho=1000.0, backend=backend)
    g = torch.empty_like(before).normal_()
    norm_sq = sum(float(x.double().square().sum()) for x in g.split(piece))
    p.grad = g
    opt.first_step()
    scale = 1000.0 / norm_sq**0.5
    for w, climbed, grad in zip(before.split(piece), p.detach().split(piece), g.split(piece), strict=True):
        torch.testing.assert_close(climbed.float(), w.float() + scale * grad.float(), rtol=8e-3, atol=1e-6)
        assert not torch.equal(climbed, w)
    p.grad = g.neg_()  # another gradient
    opt.second_step()
    for w, updated, grad in zip(before.split(piece), p.detach().split(piece), g.split(piece), strict=True):
        assert torch.equal(updated, (w.float() - lr * grad.float()).to(BF16))
    torch.cuda.empty_cache()


@each_backend
@pytest.mark.parametrize("layout", ["rows", "channels_last", "transposed"])
def test_noise_is_that_of_the_reference(layout, backend):
    """Its bits: at w = 0 and given norms of 1 the weights are the normal numbers."""
    shapes = [(33, 6, 5, 7), (3, 2, 8, 3), (64, 40, 1, 1)]
    ends = {}
    for name in (backend, "reference"):
        w = [torch.zeros(shape, device="cuda") for shape in shapes]
        if layout == "channels_last":
            w = [x.contiguous(memory_format=torch.channels_last) for x in w]
        if layout == "transposed":
            w = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in w]
        norms = torch.ones(sum(x.shape[0] for x in w), dtype=FP64, device="cuda")
        saved = [x.clone() for x in w]
        options = {"seed": 5, "t": 3, "draw": 2, "first": 2**36 + 1, "scale": "given", "norms": norms}
        ops.gaussian_perturb(w, saved, 1.0, **options, backend=name)
        ends[name] = values(w)
    assert same_bits(ends[backend], ends["reference"])


@each_backend
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64, "mixed"], ids=str)
def test_noise_and_averages_agree_with_the_reference(dtype, backend):
    """LPF-SGD with two draws, whose update takes the weights into an average; some gradients are NaN in one step."""
    results = []
    for name in (backend, "reference"):
        params = parameters(dtype, SMALL)
        opt = samkern.LPFSGD(params, torch.optim.SGD, 0.02, inc=1.0, draws=2, lr=0.1, momentum=0.9, backend=name)
        ema = samkern.EMA(opt, decay=0.5)
        ends = train(opt, params)
        for p, grad in zip(params, gradients(params, 77), strict=True):
            p.grad = grad.fill_(torch.nan)
        opt.step(lambda: None)
        assert ema.n_averaged == 4
        results.append([*ends, *values(params), *values(ema.averages)])
    tolerance = {FP64: 1e-6, FP32: 1e-5}.get(dtype, 2e-2)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@each_backend
def test_flat_lora(backend):
    """The frozen weights keep their bits, and noise of the pass is that of the reference."""
    ends = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        layer = nn.Linear(48, 40).cuda().requires_grad_(False)
        layer.lora_A, layer.lora_B = (nn.Parameter(torch.randn(s, device="cuda") * 0.1) for s in ((4, 48), (40, 4)))
        layer.scaling = 2.0
        forward = layer.forward
        layer.forward = lambda x, f=forward, m=layer: f(x) + m.scaling * (x @ m.lora_A.T @ m.lora_B.T)
        before = layer.weight.clone()
        opt = samkern.FlatLoRA(layer, torch.optim.SGD, 0.3, total_steps=4, lr=0.1, backend=name)
        x = torch.randn(16, 48, device="cuda")
        for _ in range(4):
            with opt.perturbed():
                layer(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        assert torch.equal(layer.weight, before)
        ends.append(values([layer.lora_A, layer.lora_B]))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_an_archive_of_logits_from_the_gpu(kind, tmp_path):
    """Copies are under way when the next step begins; none is lost, and the first of an epoch counts."""
    path = tmp_path / "logits" if kind == "file" else None
    archive = samkern.LogitArchive(512, 10, lag=2, dtype=FP16, path=path)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(4):
        order = torch.randperm(512, generator=generator)
        expected = torch.empty(512, 10)
        for index in order.split(64):
            logits = torch.randn(64, 10, device="cuda")
            archive.write(epoch, index, logits)
            expected[index] = logits.half().float().cpu()
            archive.write(epoch, index, logits * 0)  # as the second pass of a SAM step
            logits.zero_()  # the memory is used again
        kept, there = archive.read(epoch, torch.arange(512))
        assert there.all()
        assert torch.equal(kept, expected)
        assert archive.filled(max(epoch - 2, 0)) == 512


def test_measures_and_landscapes_agree_with_the_cpu():
    """Draws are the same numbers on every device; the arithmetic differs in rounding alone."""
    loss_fn, found = nn.functional.cross_entropy, {}
    x, y = torch.randn(60, 20), torch.randint(0, 5, (60,))
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 5)).to(device)
        before = [p.clone() for p in net.parameters()]
        data = [(x[:40].to(device), y[:40].to(device)), (x[40:], y[40:])]  # the second is moved
        measures = samkern.sharpness.flatness(net, loss_fn, data, progress=False)
        surface = samkern.landscape.surface(net, loss_fn, data, points=5, progress=False)
        found[device] = [*map(float, measures.values()), *surface.loss.flatten(), *surface.accuracy.flatten()]
        assert same_bits(list(net.parameters()), before)
    assert found["cuda"] == pytest.approx(found["cpu"], rel=2e-2)
