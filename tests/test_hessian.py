"""Measures of the Hessian: on quadratics of known spectrum, against dense matrices in float64 and against curvlinops."""

from __future__ import annotations

import functools
import gc
import math
import random
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from samkern.sharpness import (
    Measurement,
    SpectralDensity,
    TopEigenvalues,
    effective_dimension,
    hessian_frobenius,
    hessian_moments,
    hessian_trace,
    log_det,
    spectral_density,
    top_eigenvalue,
    top_eigenvalues,
)

from .lists import BF16, FP32, FP64, dtype_name, same_bits, same_tree, seeded
from .oracles import hessian as oracle
from .problems import Quadratic, batch, make_net

ONCE = [(1.0, None)]  # of a model that has its data within


def itself(out, _):
    """The loss of a model whose output is the loss."""
    return out


MEASURES = {
    "top_eigenvalue": top_eigenvalue,
    "top_eigenvalues": functools.partial(top_eigenvalues, k=3, vectors=True),
    "log_det": functools.partial(log_det, cut=1e-3, k=3),
    "effective_dimension": functools.partial(effective_dimension, kind="share", k=3),
    "hessian_moments": functools.partial(hessian_moments, probes=3),
    "hessian_trace": functools.partial(hessian_trace, probes=3),
    "hessian_frobenius": functools.partial(hessian_frobenius, probes=3),
    "spectral_density": functools.partial(spectral_density, probes=2, steps=6),
}
every_measure = pytest.mark.parametrize("name", MEASURES)
every_product = pytest.mark.parametrize("product", ["exact", "difference"])


def numbers(result) -> list[float]:
    """What a measure found, as a list."""
    match result:
        case Measurement():
            return [result.value, *result.parts]
        case TopEigenvalues():
            return list(result.values)
        case SpectralDensity():
            return [result.moment(power).value for power in (1, 2, 3)]
    return [*numbers(result.trace), *numbers(result.frobenius)]


# ---- quadratics


@every_product
@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [
        ([9.0, 3.0, 1.0, 0.0], 9),
        ([-5.0, 3.0, 1.0], 3),
        ([-5.0, -3.0, -1.0], -1),
        ([0.0, 0.0], 0),
        ([7.0], 7),
        ([-7.0], -7),
        ([-100.0, 3.0, 1.0], 3),
    ],
    ids=str,
)
def test_the_top_eigenvalue_of_known_spectra(spectrum, expected, product):
    """{-5, 3, 1}: the dominant eigenvalue is negative, the largest is 3."""
    options = {"tol": 1e-9, "max_products": 3000 if spectrum[0] == -100.0 else 500}
    found = top_eigenvalue(Quadratic(spectrum), itself, ONCE, product=product, **options)
    assert found.value == pytest.approx(expected, abs=1e-3)
    assert found.parts == (found.value,)


@pytest.mark.parametrize("seed", range(4))
def test_two_eigenvalues_of_one_size(seed):
    """Power iteration rests between them, where v'Hv is anything from -4 to 4."""
    found = top_eigenvalue(Quadratic([4.0, -4.0, 1.0, -1.0]), itself, ONCE, seed=seed)
    assert found.value == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=dtype_name)
@pytest.mark.parametrize("seed", range(4))
def test_a_small_eigenvalue_beside_a_large_negative_one(seed, dtype):
    """A shifted power iteration would need thousands of products, and end below without a sign."""
    spectrum = [1.0, 0.3, -50.0, -49.0, *[0.0] * 297]
    found = top_eigenvalue(Quadratic(spectrum, dtype), itself, ONCE, seed=seed)
    assert found.value == pytest.approx(1, rel=1e-4)


def test_the_median_over_batches():
    model = Quadratic([2.0, 1.0])
    found = top_eigenvalue(model, itself, [(x, None) for x in (1.0, 100.0, 3.0)], tol=1e-9)
    assert found.parts == pytest.approx((2.0, 200.0, 6.0), rel=1e-4)
    assert found.value == pytest.approx(6.0, rel=1e-4)
    assert found.standard_error > 0


def test_products_are_limited():
    calls = []
    model = Quadratic([2.0, 1.9, 1.8])
    top_eigenvalue(model, lambda out, _: calls.append(1) or out, ONCE, product="difference", max_products=3, tol=1e-12)
    assert len(calls) == 2 * 3


@every_product
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=dtype_name)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_eigenvalues_of_a_known_spectrum(k, dtype, product):
    spectrum = [9.0, 6.0, 2.5, 1.0, 0.0, -11.0]
    model = Quadratic(spectrum, dtype)
    top = top_eigenvalues(model, itself, ONCE, k=k, vectors=True, product=product)
    accuracy = {("exact", FP32): 1e-5, ("exact", FP64): 1e-12, ("difference", FP32): 1e-3, ("difference", FP64): 1e-8}
    assert top.values == pytest.approx(spectrum[:k], abs=accuracy[product, dtype] * 11)
    for value, vector in zip(spectrum, top.vectors, strict=False):
        assert [x.shape for x in vector] == [model.w.shape]
        assert vector[0].dtype == dtype
        residual = (model.h @ vector[0] - value * vector[0]).norm() / vector[0].norm()
        assert vector[0].norm().item() == pytest.approx(1, abs=1e-3)
        assert residual.item() <= accuracy[product, dtype] * 50


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=dtype_name)
@pytest.mark.parametrize(
    "spectrum", [[5.0, 5.0, 1.0], [2.0] * 4, [0.0] * 3, [3.0, 3.0, 0.0, 0.0, -1.0, -1.0], [7.0]], ids=str
)
def test_multiple_eigenvalues_are_found_as_often_as_they_occur(spectrum, dtype):
    top = top_eigenvalues(Quadratic(spectrum, dtype), itself, ONCE, k=len(spectrum), vectors=True)
    assert top.values == pytest.approx(spectrum, abs=1e-4 if dtype == FP32 else 1e-10)
    basis = torch.stack([vector[0] for vector in top.vectors])
    assert torch.allclose(basis @ basis.T, torch.eye(len(spectrum), dtype=dtype), atol=1e-5)


def test_errors_bound_what_has_not_converged():
    spectrum = [float(i) for i in range(200)]
    top = top_eigenvalues(Quadratic(spectrum), itself, ONCE, k=5, max_products=12)
    distances = [min(abs(value - exact) for exact in spectrum) for value in top.values]
    assert all(d <= e for d, e in zip(distances, top.errors, strict=True))
    assert top.errors[-1] > 1e-3
    better = top_eigenvalues(Quadratic(spectrum), itself, ONCE, k=5, max_products=120)
    assert max(better.errors) < 1e-6
    assert better.values == pytest.approx([199, 198, 197, 196, 195], abs=1e-6)


@every_product
def test_trace_and_frobenius_norm_within_their_errors(product):
    """Over seeds, deviations are of the size of the errors."""
    spectrum = [9.0, 4.0, 1.0, 0.5, 0.0, -3.0]
    model = Quadratic(spectrum)
    runs = [hessian_moments(model, itself, ONCE, probes=20, seed=seed, product=product) for seed in range(20)]
    square = sum(value**2 for value in spectrum)
    for exact, found in (
        (sum(spectrum), [run.trace for run in runs]),
        (math.sqrt(square), [run.frobenius for run in runs]),
    ):
        deviations = [(m.value - exact) / m.standard_error for m in found]
        assert 0.75 < math.sqrt(sum(d**2 for d in deviations) / len(deviations)) < 1.4
    # The variance of v'Hv for random signs: twice the squares beside the diagonal.
    variance = 2 * (square - model.h.diag().square().sum().item())
    assert sum(run.trace.standard_error**2 for run in runs) / 20 == pytest.approx(variance / 20, rel=0.2)
    assert hessian_trace(model, itself, ONCE, probes=20, product=product) == runs[0].trace
    assert hessian_frobenius(model, itself, ONCE, probes=20, product=product) == runs[0].frobenius


def test_a_diagonal_hessian_needs_one_probe():
    class Diagonal(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return (torch.tensor([3.0, 2.0, 1.0, -1.0]) * self.w**2).sum() / 2 * x

    found = hessian_moments(Diagonal(), itself, ONCE, probes=1)
    assert found.trace.value == 5
    assert found.frobenius.value == pytest.approx(math.sqrt(15))
    assert math.isnan(found.trace.standard_error)
    assert math.isnan(found.frobenius.standard_error)
    assert hessian_moments(Diagonal(), itself, ONCE, probes=2).trace.standard_error == 0


def test_log_det_and_both_dimensions_of_a_known_spectrum():
    spectrum = [8.0, 4.0, 2.0, 1.0, 0.25, 0.0, -6.0]
    arguments = (Quadratic(spectrum), itself, ONCE)
    found = log_det(*arguments, cut=0.5, k=7)
    assert found.value == pytest.approx(math.log(64))
    assert len(found.parts) == 4
    assert log_det(*arguments, cut=0.5, k=2).value == pytest.approx(math.log(32))
    assert log_det(*arguments, cut=10.0, k=7) == Measurement(0.0)
    for threshold, expected in ((0.5, 4), (3.0, 2), (100.0, 0), (-1.0, 6), (-7.0, 7)):
        found = effective_dimension(*arguments, kind="count", threshold=threshold, k=7)
        assert (found.value, found.standard_error) == (expected, 0)
    for q in (0.0, 0.1, 0.5, 0.6, 0.9, 0.99, 1.0):
        found = effective_dimension(*arguments, kind="share", q=q, k=7)
        assert found.value == oracle.effective_dimension_by_share(spectrum, q)
        assert found.standard_error == 0


def test_a_dimension_that_may_be_larger_says_so():
    arguments = (Quadratic([8.0, 4.0, 2.0, 1.0]), itself, ONCE)
    assert effective_dimension(*arguments, kind="count", threshold=0.5, k=3).standard_error == math.inf
    assert effective_dimension(*arguments, kind="count", threshold=3.0, k=3).standard_error == 0
    assert effective_dimension(*arguments, kind="share", k=3).standard_error == math.inf
    assert effective_dimension(*arguments, kind="share", k=4).standard_error == 0
    uncertain = TopEigenvalues((3.0, 1.0, 0.1), (0.1, 0.2, 0.01), n_entries=9)
    assert uncertain.count_above(0.9) == Measurement(2.0, 1.0)
    assert uncertain.log_det(0.5).standard_error == pytest.approx(0.1 / 3 + 0.2)


# ---- density


def test_the_density_has_the_moments_of_the_products():
    """Quadrature is exact for its own probe: its moments are v'Hv and norm(Hv)^2 of the same signs."""
    spectrum = [9.0, 4.0, 1.0, 0.5, 0.0, -3.0]
    model = Quadratic(spectrum)
    density = spectral_density(model, itself, ONCE, probes=4, steps=3)
    moments = hessian_moments(model, itself, ONCE, probes=4)
    assert density.nodes.shape == density.weights.shape == (4, 3)
    assert density.moment(0).parts == pytest.approx([1.0] * 4)
    assert [6 * part for part in density.moment(1).parts] == pytest.approx(moments.trace.parts)
    assert [6 * part for part in density.moment(2).parts] == pytest.approx(
        [part**2 for part in moments.frobenius.parts]
    )


def test_the_density_of_what_is_not_finite():
    nodes = torch.full((2, 3), math.nan, dtype=torch.float64)
    density = SpectralDensity(nodes, torch.full_like(nodes, 1 / 3), n_entries=3)
    assert math.isnan(density.share_above(0.0).value)


def test_the_density_of_no_entries():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(0))

        def forward(self, x):
            return self.w.square().sum()

    density = spectral_density(Empty(), itself, ONCE)
    assert (density.n_entries, density.moment(1).value) == (0, 0)


def test_with_all_steps_nodes_are_the_eigenvalues():
    spectrum = [9.0, 4.0, 1.0, 0.5, -3.0]
    density = spectral_density(Quadratic(spectrum), itself, ONCE, probes=3, steps=50)
    assert density.nodes.shape == (3, 5)
    for nodes in density.nodes.tolist():
        assert nodes == pytest.approx(sorted(spectrum))
    few = spectral_density(Quadratic([2.0] * 4 + [1.0] * 4), itself, ONCE, probes=3, steps=8)
    assert few.weights[:, 2:].count_nonzero() == 0  # two different eigenvalues: two nodes
    assert few.moment(0).value == pytest.approx(1)
    assert few.share_above(1.5).value == pytest.approx(0.5, abs=0.3)


def test_the_density_is_that_of_the_eigenvalues():
    spectrum = torch.cat([torch.zeros(150), torch.linspace(1, 2, 50)]).tolist()
    found = spectral_density(Quadratic(spectrum), itself, ONCE, probes=10, steps=40)
    grid = found.grid(400, sigma=0.1)
    density = found(grid, sigma=0.1)
    exact = sum(torch.exp(-((grid - value) ** 2) / 0.02) for value in spectrum) / (200 * 0.1 * math.sqrt(2 * math.pi))
    assert torch.trapezoid((density - exact).abs(), grid) < 0.08
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)
    assert found(grid).shape == grid.shape
    share = found.share_above(0.5)
    assert abs(share.value - 0.25) < 4 * share.standard_error < 0.2


# ---- nets


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.project(x.view(-1, 1, 3, 4)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1, 2).mean(1))


def half_frozen():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net[2].requires_grad_(False)
    return net


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Dropout(),
        nn.Conv2d(3, 4, 2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "conv": (conv_net, (2, 6, 6)),
    "tied": (Tied, (4,)),
    "half_frozen": (half_frozen, (4,)),
    "attention": (Attention, (12,)),
}
SIZES = (7, 20, 4)


def learning(name, dtype=FP64):
    """A net with running statistics of its own, a loss, and batches of different sizes."""
    make, shape = NETS[name]
    net = make().to(dtype)
    data = [(torch.randn(n, *shape, dtype=dtype), torch.randint(0, 3, (n,))) for n in SIZES]
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net, F.cross_entropy, data


@pytest.mark.takes(3)
@pytest.mark.parametrize("name", NETS)
def test_against_a_dense_hessian(name):
    """Batches of unequal sizes are weighted by samples: the oracle's is the mean over all."""
    net, loss_fn, data = learning(name)
    exact = oracle.spectrum(net, loss_fn, data)
    top = top_eigenvalues(net, loss_fn, data, k=3, max_products=60)
    assert top.values == pytest.approx(exact[:3], rel=1e-5)
    assert top.n_entries == len(exact)
    per_batch = [oracle.spectrum(net, loss_fn, [pair])[0] for pair in data]
    found = top_eigenvalue(net, loss_fn, data, tol=1e-8, max_products=1000)
    assert found.parts == pytest.approx(per_batch, rel=1e-4)
    assert found.value == sorted(found.parts)[1]
    matrix = oracle.dense(net, loss_fn, data)
    moments = hessian_moments(net, loss_fn, data, probes=200)
    assert abs(moments.trace.value - matrix.trace().item()) < 4 * moments.trace.standard_error
    assert abs(moments.frobenius.value - matrix.norm().item()) < 4 * moments.frobenius.standard_error


@every_product
def test_batches_are_one_large_batch(product):
    net, loss_fn, data = learning("mlp")
    whole = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    for name, measure in MEASURES.items():
        if name != "top_eigenvalue":  # the median over batches
            options = {"product": product}
            parts, at_once = (numbers(measure(net, loss_fn, d, **options)) for d in (data, whole))
            assert parts == pytest.approx(at_once, rel=1e-5 if product == "difference" else 1e-9), name


def test_differences_agree_with_exact_products():
    net, loss_fn, data = learning("conv")
    for name, measure in MEASURES.items():
        exact, differences = (numbers(measure(net, loss_fn, data, product=p)) for p in ("exact", "difference"))
        assert differences == pytest.approx(exact, rel=1e-4), name


def test_memory_formats_do_not_matter():
    net, loss_fn, data = learning("conv")
    last = net.to(memory_format=torch.channels_last)
    channels_last = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
    for name, measure in MEASURES.items():
        ours = measure(last, loss_fn, channels_last)
        contiguous = net.to(memory_format=torch.contiguous_format)
        assert numbers(ours) == pytest.approx(numbers(measure(contiguous, loss_fn, data)), rel=1e-9), name
        net.to(memory_format=torch.channels_last)


@every_product
@every_measure
def test_bfloat16(name, product):
    """Products with an error of a few per mille; vectors are float32."""
    net, loss_fn, data = learning("mlp", FP32)
    rounded = net.to(BF16)
    half = [(x.to(BF16), y) for x, y in data]
    found = MEASURES[name](rounded, lambda out, y: loss_fn(out.float(), y), half, product=product)
    full = net.to(FP32)
    exact = MEASURES[name](full, loss_fn, [(x.float(), y) for x, y in half])
    if isinstance(found, TopEigenvalues):
        assert {x.dtype for vector in found.vectors for x in vector} == {FP32}
    if name != "effective_dimension":
        assert numbers(found)[0] == pytest.approx(
            numbers(exact)[0], rel=0.3 if product == "difference" else 0.1, abs=0.1
        )


# ---- the model and the world around it


@pytest.mark.parametrize("raising", [False, True], ids=["returns", "raises"])
@every_product
@every_measure
def test_everything_is_left_as_it_was(name, product, raising):
    np = pytest.importorskip("numpy")
    net = make_net()
    net.conv2.eval()
    for i, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, i) if i % 2 else None
    state = {key: value.clone() for key, value in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    grads = [None if p.grad is None else (p.grad, p.grad.clone()) for p in net.parameters()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()
    calls = []

    def loss_fn(out, y):
        calls.append(1)
        if raising and len(calls) == 2:
            raise KeyboardInterrupt
        return F.cross_entropy(out, y) + 0 * torch.rand(())

    def data():
        random.random(), np.random.rand()
        yield from (batch(0), batch(1))

    if raising:
        with pytest.raises(KeyboardInterrupt):
            MEASURES[name](net, loss_fn, data(), product=product)
    else:
        assert all(map(math.isfinite, numbers(MEASURES[name](net, loss_fn, data(), product=product))))
    assert same_tree(dict(net.state_dict()), state)
    assert [p.data_ptr() for p in net.parameters()] == pointers
    for p, before in zip(net.parameters(), grads, strict=True):
        assert (p.grad is None) if before is None else (p.grad is before[0] and same_bits([p.grad], [before[1]]))
    assert (net.training, net.norm.training, net.conv2.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert same_tree(list(map(str, np.random.get_state())), list(map(str, generators[2])))


@every_measure
def test_sparse_gradients(name):
    def embedding(sparse):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Embedding(5, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))

    x = torch.randint(0, 5, (12, 2), generator=seeded(0))
    data = [(part, part[:, 0] % 3) for part in x.split(6)]
    found, expected = (numbers(MEASURES[name](embedding(sparse), F.cross_entropy, data)) for sparse in (True, False))
    assert found == pytest.approx(expected, rel=1e-4)


class Counted(torch.autograd.Function):
    """The identity; each call leaves a mark that lives as long as the graph."""

    alive: weakref.WeakSet[type] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        ctx.mark = type("Mark", (), {})
        Counted.alive.add(ctx.mark)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return Counted.apply(g)


def test_one_graph_at_a_time():
    """Memory is that of one batch."""
    model, most = nn.Linear(2, 1), []

    def loss_fn(out, y):
        gc.collect()
        most.append(len(Counted.alive))
        return (Counted.apply(out) - y).square().mean()

    data = [(torch.ones(2, 2), torch.ones(2, 1)) for _ in range(3)]
    hessian_trace(model, loss_fn, data, probes=2)
    assert most == [0, 0, 0]
    gc.collect()
    assert not Counted.alive


@every_measure
def test_seeds(name):
    net, loss_fn, data = learning("mlp", FP32)
    once, again, other = (numbers(MEASURES[name](net, loss_fn, data, seed=seed)) for seed in (1, 1, 2))
    assert once == again
    if name not in ("effective_dimension", "log_det", "top_eigenvalues"):
        assert once != other


@every_measure
def test_without_gradients_around(name):
    net, loss_fn, data = learning("mlp")
    expected = numbers(MEASURES[name](net, loss_fn, data))
    with torch.no_grad():
        assert numbers(MEASURES[name](net, loss_fn, data)) == expected


@every_product
@every_measure
def test_of_a_loss_that_is_not_finite_is_nan(name, product):
    measure = MEASURES[name]
    for bad in (math.nan, math.inf):
        assert math.isnan(numbers(measure(Quadratic([2.0, 1.0, 1.0]), itself, [(bad, None)], product=product))[0])
    for scales in ((math.nan, 1.0, 2.0), (1.0, math.nan, 2.0), (2.0, 1.0, math.nan)):
        found = measure(Quadratic([2.0, 1.0, 1.0]), itself, [(x, None) for x in scales], product=product)
        assert math.isnan(numbers(found)[0])
    if isinstance(found, SpectralDensity):
        assert found(found.grid()).isnan().all()


@every_product
@every_measure
def test_a_loss_that_is_linear_in_the_weights(name, product):
    net = nn.Linear(3, 1).double()
    found = MEASURES[name](net, lambda out, _: out.sum(), [(torch.randn(5, 3, dtype=FP64), None)], product=product)
    assert numbers(found)[0] == pytest.approx(0, abs=1e-6)


class Once(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_a_model_that_cannot_be_differentiated_twice():
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data.fill_(1)
    data = [(torch.tensor([[2.0, 0.0]], dtype=FP64), None)]  # loss = (2 w)^4
    for loss_fn in (lambda out, _: Once.apply(out).square().mean(), lambda out, _: Once.apply(out).mean()):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated.*product='difference'"):
            top_eigenvalue(model, loss_fn, data)
    found = top_eigenvalue(model, lambda out, _: Once.apply(out).square().mean(), data, product="difference")
    assert found.value == pytest.approx(192, rel=1e-6)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):  # an error of the model's own stays as it is
        top_eigenvalue(
            model, lambda out, _: (out @ torch.zeros(3, 7).double()).mean(), [(torch.zeros(3, 2).double(), None)]
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(top_eigenvalue, tol=0.0), "tol must be a finite number > 0, got 0.0"),
        (functools.partial(top_eigenvalue, max_products=0), "max_products must be an integer >= 1, got 0"),
        (functools.partial(top_eigenvalues, k=0), "k must be an integer >= 1, got 0"),
        (functools.partial(top_eigenvalues, k=4), "k must be at most the number of entries of the weights, 3, got 4"),
        (functools.partial(top_eigenvalues, k=3, max_products=2), "max_products must be an integer >= 3, got 2"),
        (functools.partial(log_det, cut=0.0), "cut must be a finite number > 0, got 0.0"),
        (functools.partial(effective_dimension, kind="rank"), "kind must be one of 'count', 'share', got 'rank'"),
        (functools.partial(effective_dimension, kind="count"), "threshold must be a finite number .*, got None"),
        (functools.partial(effective_dimension, kind="share", q=1.5), "q must be a number from 0 to 1, got 1.5"),
        (functools.partial(hessian_moments, probes=0), "probes must be an integer >= 1, got 0"),
        (functools.partial(spectral_density, probes=0), "probes must be an integer >= 1, got 0"),
        (functools.partial(spectral_density, steps=0), "steps must be an integer >= 1, got 0"),
    ],
    ids=range(12),
)
def test_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(Quadratic([3.0, 2.0, 1.0]), itself, ONCE)


@every_measure
def test_a_product_that_there_is_not(name):
    with pytest.raises(ValueError, match="product must be one of 'exact', 'difference', got 'fast'"):
        MEASURES[name](Quadratic([3.0, 2.0, 1.0]), itself, ONCE, product="fast")


@every_measure
def test_nothing_to_measure(name):
    with pytest.raises(ValueError, match="data is empty"):
        MEASURES[name](Quadratic([1.0, 1.0, 1.0]), itself, [])
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        MEASURES[name](nn.Linear(2, 2).requires_grad_(False), F.mse_loss, ONCE)


# ---- a library


@pytest.mark.takes(5)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_against_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    net, _, data = learning("conv")
    loss_fn = nn.CrossEntropyLoss()
    params = list(net.parameters())
    net.eval()
    operator = curvlinops.HessianLinearOperator(net, loss_fn, params, data)
    matrix = operator @ torch.eye(operator.shape[0], dtype=FP64)
    exact = torch.linalg.eigvalsh(matrix).flip(0).tolist()
    assert top_eigenvalues(net, loss_fn, data, k=4, max_products=60).values == pytest.approx(exact[:4], rel=1e-6)
    moments = hessian_moments(net, loss_fn, data, probes=200)
    torch.manual_seed(0)
    trace = curvlinops.hutchinson_trace(operator, num_matvecs=200, distribution="rademacher").item()
    frobenius = curvlinops.hutchinson_squared_fro(operator, num_matvecs=200, distribution="rademacher").sqrt().item()
    # Two estimates that err alike.
    assert abs(moments.trace.value - trace) < 5 * moments.trace.standard_error
    assert abs(moments.frobenius.value - frobenius) < 5 * moments.frobenius.standard_error


def a_million():
    """A net of 987,678 parameters after a few steps of training, and a batch."""
    net = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 700), nn.Tanh(), nn.Linear(700, 10))
    x = torch.randn(64, 256)
    y = (x @ torch.randn(256, 10)).argmax(1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    return net, x, y


@pytest.mark.takes(8)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_million_parameters_against_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    net, x, y = a_million()
    operator = curvlinops.HessianLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)], check_deterministic=False
    )
    torch.manual_seed(0)
    exact = linalg.eigsh(operator.to_scipy(), k=3, which="LA", tol=1e-3, return_eigenvectors=False)[::-1]
    found = top_eigenvalue(net, F.cross_entropy, [(x, y)])
    assert found.value == pytest.approx(exact[0], rel=0.01)
    top = top_eigenvalues(net, F.cross_entropy, [(x, y)], k=3, max_products=30)
    assert top.values == pytest.approx(exact, rel=0.01)
