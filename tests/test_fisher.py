"""The Fisher diagonal is the mean of squared gradients of single samples, however it is computed, and nothing else moves."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

import samkern
from samkern.fisher import SampleLosses, fisher_diagonal
from samkern.samples import DrawnSamples

from .lists import BF16, FP16, FP32, FP64, dtype_name, same_bits

EVERYTHING = 2**40  # a memory budget


class ConvNet(nn.Module):
    """Norms of every kind that keeps statistics, a frozen layer, and a parameter that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False))
        self.frozen_scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5, requires_grad=False)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(4, 3)
        for m in (self.body[1], self.instance):
            nn.init.uniform_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)

    def forward(self, x):
        return self.head(self.instance(self.body(x) * self.frozen_scale).tanh().mean((2, 3)))


class OwnNorm(nn.Module):
    """A norm of another package, which writes its buffer in place in training mode. Its child drops out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        if self.training:
            self.running_var.mul_(0.9).add_(x.detach().var(0), alpha=0.1)
        return self.dropout(x / self.running_var.clone().sqrt())


class Counting(nn.Module):
    """Writes a buffer in place in any mode, and its loss depends on the count. vmap does not take it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.n += 1
        return self.linear(x) * self.n


class Assigning(nn.Module):
    """Replaces a buffer in its forward: what vmap leaves there is of no use outside of it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean)


class Branching(nn.Module):
    """Control flow that depends on the data. Half the samples take the other branch, which uses other weights."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.left(x) if x.sum() > 0 else self.right(x)


class HiddenWeight(nn.Module):
    """Reads a weight where torch.func.functional_call cannot replace it: vmap would see a constant, without any error."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.aside = [self.linear.weight]

    def forward(self, x):
        return F.linear(x, self.aside[0], self.linear.bias)


class Square(torch.autograd.Function):
    """A custom function without a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Custom(nn.Linear):
    def forward(self, x):
        return Square.apply(super().forward(x))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


def images(n=12, dtype=FP32):
    return torch.randn(n, 1, 7, 7, dtype=dtype), torch.randint(0, 3, (n,))


def vectors(n=12, dtype=FP32):
    return torch.randn(n, 4, dtype=dtype), torch.randint(0, 3, (n,))


def one_by_one(model, data, params):
    """The definition, for a data set that is used whole: backward by backward, squares in float64, order of the data set."""
    norms = [m for m in model.modules() if hasattr(m, "running_var")]
    modes = [m.training for m in norms]
    for m in norms:
        m.training = False
    squares = [torch.zeros(p.shape, dtype=FP64) for p in params]
    for x, y in zip(*data, strict=True):
        buffers = [b.clone() for b in model.buffers()]
        loss = F.cross_entropy(model(x[None]), y[None])
        wanted = [p for p in params if p.requires_grad]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        for p, g in zip(wanted, grads, strict=True):
            if g is not None:
                squares[next(i for i, q in enumerate(params) if q is p)] += g.double().square() / len(data[0])
        for b, copy in zip(model.buffers(), buffers, strict=True):
            b.detach().copy_(copy)
    for m, mode in zip(norms, modes, strict=True):
        m.training = mode
    return squares


def close(a, b, rtol=1e-5):
    """Relative to the largest entry of a tensor: single entries may be differences of larger numbers."""
    return len(a) == len(b) and all(
        x.shape == y.shape and (x.double() - y.double()).abs().max() <= rtol * y.double().abs().max()
        for x, y in zip(a, b, strict=True)
    )


def cross_entropies(model, data, **options):
    return SampleLosses(model, F.cross_entropy, data, **options)


def everything(model):
    """What must not change: weights, buffers, gradients; modes; random numbers."""
    tensors = [x.detach().clone().double() for x in (*model.parameters(), *model.buffers())]
    tensors += [p.grad.clone().double() for p in model.parameters() if p.grad is not None]
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    identities = [id(x) for x in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return tensors, (modes, identities), generators


def assert_untouched(model, before):
    tensors, other, generators = everything(model)
    assert same_bits(tensors, before[0])
    assert other == before[1]
    assert all(torch.equal(a, b) for a, b in zip(generators, before[2], strict=True))


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_linear_regression_by_hand(backend):
    """loss = (w x + b - y)^2, so the gradient is 2 (w x + b - y) (x, 1)."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(3.0)
    xs, ys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]]), torch.tensor([[0.0], [6.0], [1.0]])
    # residuals 4, -1, 2; gradients (8, 0, 8), (0, -2, -2), (8, -4, 4)
    f = fisher_diagonal(list(model.parameters()), SampleLosses(model, F.mse_loss, (xs, ys)), backend=backend)
    assert torch.equal(f.squares[0], torch.tensor([[128 / 3, 20 / 3]]))
    assert torch.equal(f.squares[1], torch.tensor([28.0]))
    assert (f.n_used.item(), f.n_left_out.item(), f.n_used.dtype, f.n_used.shape) == (3, 0, torch.int64, ())
    by_hand = (F.mse_loss(model(x), y) for x, y in zip(xs, ys, strict=True))
    assert same_bits(fisher_diagonal(list(model.parameters()), by_hand, backend=backend).squares, f.squares)


@pytest.mark.parametrize("budget", [1, 10_000, 20_000, EVERYTHING], ids=["one", "few", "several", "all"])
def test_conv_net_agrees_with_a_loop(budget):
    """12 samples; budgets of a few leave a last chunk that is smaller. Parameters are not in the model's order."""
    model, data = ConvNet(), images()
    params = [*model.parameters()][::-1]
    expected = one_by_one(model, data, params)
    losses = cross_entropies(model, data, memory_budget=budget)
    sizes = [next(len(g) for g in chunk if g is not None) for chunk in losses.gradients(params)]
    assert {1: max(sizes) == 1, EVERYTHING: sizes == [12]}.get(budget, 1 < max(sizes) < 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = fisher_diagonal(params, losses)
    assert close(f.squares, expected)
    zero = [i for i, x in enumerate(f.squares) if not x.any()]
    assert [params[i] for i in zero] == [model.unused, model.frozen_scale]
    assert all(x.is_contiguous() and x.dtype == FP32 for x in f.squares)


def test_the_square_of_a_batch_is_something_else():
    model, (x, y) = nn.Linear(4, 3), vectors()
    f = fisher_diagonal([model.weight], cross_entropies(model, (x, y))).squares
    batch = torch.autograd.grad(F.cross_entropy(model(x), y), [model.weight])[0].square()
    assert close(f, one_by_one(model, (x, y), [model.weight]))
    assert (f[0] > 1.5 * batch).all()


def test_chunks_have_a_row_for_each_sample_and_none_for_what_takes_no_part():
    model, data = ConvNet(), images()
    alien = nn.Parameter(torch.ones(2))
    params = [model.unused, model.head.bias, alien, model.frozen_scale, model.body[3].weight]
    for budget in (1, EVERYTHING):
        for chunk in cross_entropies(model, data, memory_budget=budget).gradients(params):
            assert [g is None for g in chunk] == [True, False, True, True, False]
            assert not any(g.requires_grad for g in chunk if g is not None)
            assert [g.shape[1:] for g in chunk if g is not None] == [params[1].shape, params[4].shape]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=dtype_name)
def test_other_dtypes(dtype):
    model, data = ConvNet().to(dtype), images(dtype=dtype)
    params = list(model.parameters())
    f = fisher_diagonal(params, cross_entropies(model, data))
    assert {x.dtype for x in f.squares} == {FP64 if dtype == FP64 else FP32}
    assert close(f.squares, one_by_one(model, data, params), rtol={BF16: 0.1, FP16: 0.02, FP64: 1e-12}[dtype])


def test_row_major_whatever_the_layout_of_the_parameter():
    model, data = ConvNet().to(memory_format=torch.channels_last), images()
    params = list(model.parameters())
    assert not model.body[3].weight.is_contiguous()
    f = fisher_diagonal(params, cross_entropies(model, data))
    assert all(x.is_contiguous() for x in f.squares)
    assert close(f.squares, one_by_one(model, data, params))


def test_tied_weights():
    model, data = Tied(), vectors()
    params = list(model.parameters())
    assert len(params) == 5
    assert close(fisher_diagonal(params, cross_entropies(model, data)).squares, one_by_one(model, data, params))


def test_parameters_of_the_loss_and_a_loss_that_reads_weights():
    """Both are differentiated with the model: the same by vmap and one by one."""

    class Judge(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(2.0))

        def forward(self, out, y):
            return F.cross_entropy(out / self.temperature, y) + 0.5 * model.weight.square().sum()

    model, judge = nn.Linear(4, 3), Judge()
    params = [judge.temperature, model.weight]
    at_once = SampleLosses(model, judge, vectors(), memory_budget=EVERYTHING)
    f = fisher_diagonal(params, at_once)
    assert all(x.any() for x in f.squares)
    assert close(f.squares, fisher_diagonal(params, list(at_once)).squares)


@pytest.mark.parametrize("budget", [1, EVERYTHING], ids=["one", "all"])
def test_an_iterable_gives_the_same(budget):
    model, data = ConvNet(), images()
    params = list(model.parameters())
    losses = cross_entropies(model, data, memory_budget=budget)
    f, g = fisher_diagonal(params, losses()), fisher_diagonal(params, iter(losses))
    assert close(f.squares, g.squares)
    assert budget > 1 or same_bits(f.squares, g.squares)
    assert torch.equal(f.n_used, g.n_used)


def test_without_gradients_enabled():
    """An optimizer's step runs without."""
    model = nn.Linear(4, 3)
    losses = cross_entropies(model, vectors())
    expected = fisher_diagonal([model.weight], losses).squares
    with torch.no_grad():
        assert same_bits(fisher_diagonal([model.weight], losses).squares, expected)
        assert close(fisher_diagonal([model.weight], (loss for loss in losses)).squares, expected)
        assert all(loss.requires_grad for loss in losses)
        assert not torch.is_grad_enabled()


# ---- which samples --------------------------------------------------------------------------------------------------


class Recording(Dataset):
    """Pairs with a number for a target; notes which were asked for. Augments by torch's random numbers."""

    def __init__(self, n):
        self.n, self.asked = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.asked.append(index)
        return torch.full((4,), float(index)) + torch.rand(4), index % 3


def test_samples_are_drawn_once_without_replacement():
    data, model = Recording(50), nn.Linear(4, 3)
    state = torch.get_rng_state()
    losses = cross_entropies(model, data, num_samples=20, seed=3, memory_budget=1)
    first = fisher_diagonal([model.weight], losses)
    drawn, data.asked = data.asked, []
    assert len(losses) == len(set(drawn)) == 20
    second = fisher_diagonal([model.weight], losses)
    assert data.asked == drawn
    assert same_bits(first.squares, second.squares)  # augmentation too
    assert torch.equal(torch.get_rng_state(), state)
    same, other = (cross_entropies(model, Recording(50), num_samples=20, seed=seed) for seed in (3, 4))
    assert close(fisher_diagonal([model.weight], same).squares, first.squares)
    assert not close(fisher_diagonal([model.weight], other).squares, first.squares)


def test_fewer_samples_than_asked_for():
    model = nn.Linear(4, 3)
    losses = cross_entropies(model, vectors(3))
    assert len(losses) == len(list(losses)) == 3
    assert fisher_diagonal([model.weight], losses).n_used.item() == 3
    assert fisher_diagonal([model.weight], losses, num_samples=2).n_used.item() == 2
    assert fisher_diagonal([model.weight], iter(losses), num_samples=2).n_used.item() == 2
    assert fisher_diagonal([model.weight], iter(losses), num_samples=200).n_used.item() == 3


@pytest.mark.parametrize("budget", [1, EVERYTHING], ids=["one", "all"])
def test_a_sample_that_is_not_finite_is_left_out_and_counted(budget):
    model, (xs, ys) = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), vectors(6)
    params = list(model.parameters())
    rest = [0, 2, 3, 5]
    expected = one_by_one(model, (xs[rest], ys[rest]), params)
    xs[1, 2], xs[4] = torch.inf, torch.nan
    f = fisher_diagonal(params, cross_entropies(model, (xs, ys), memory_budget=budget))
    assert close(f.squares, expected)
    assert (f.n_used.item(), f.n_left_out.item()) == (4, 2)
    g = fisher_diagonal(params, cross_entropies(model, (xs[[1, 4]], ys[[1, 4]]), memory_budget=budget))
    assert not any(x.any() for x in g.squares)
    assert (g.n_used.item(), g.n_left_out.item()) == (0, 2)


def test_one_bad_entry_keeps_the_sample_out_of_all_parameters():
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    scale = torch.tensor(
        [[1.0, torch.inf], [1.0, 1.0], [1e30, 1.0]]
    )  # the last: a finite gradient whose square overflows
    f = fisher_diagonal([a, b], ((a * s).sum() + b.sum() for s in scale))
    assert [x.tolist() for x in f.squares] == [[1, 1], [1, 1, 1]]
    assert (f.n_used.item(), f.n_left_out.item()) == (1, 2)


# ---- everything else stays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, EVERYTHING], ids=["one", "all"])
@pytest.mark.parametrize("model", [ConvNet, OwnNorm, Counting, Assigning], ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore:gradients of single samples")
def test_everything_is_left_as_it_was(model, budget):
    model = model() if model is not OwnNorm else nn.Sequential(nn.Linear(4, 3), OwnNorm(), nn.BatchNorm1d(3).eval())
    data = images() if isinstance(model, ConvNet) else vectors()
    F.cross_entropy(model(data[0]), data[1]).backward()
    params = list(model.parameters())
    losses = cross_entropies(model, data, memory_budget=budget)
    before = everything(model)
    fisher_diagonal(params, losses)
    assert_untouched(model, before)
    if isinstance(model, Counting):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            fisher_diagonal(params, iter(losses))
    else:
        fisher_diagonal(params, iter(losses))
    assert_untouched(model, before)
    for chunk in losses.gradients(params):  # between chunks as well
        assert_untouched(model, before)
        assert len(chunk) == len(params)
        torch.rand(1)
        before = everything(model)
    for loss in losses:
        assert_untouched(model, before)
        assert loss.shape == ()


def test_a_graph_from_before_the_sweep_still_has_its_backward():
    """Its buffers were saved for the backward: writing them, even with what they hold, would make it fail."""
    model, data = ConvNet(), images()
    model.body[1].eval()
    loss = F.cross_entropy(model(data[0]), data[1])
    fisher_diagonal(list(model.parameters()), cross_entropies(model, data))
    loss.backward()


@pytest.mark.parametrize("budget", [1, EVERYTHING], ids=["one", "all"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_everything_as_it_was(error, budget):
    model, data = ConvNet(), images()
    before = everything(model)
    calls = 0

    def interrupted(out, y):
        nonlocal calls
        calls += 1
        assert not model.body[1].training
        assert not model.instance.training
        assert model.body.training
        if calls > 1:
            model.body[1].running_mean.zero_()
            raise error("enough")
        return F.cross_entropy(out, y)

    losses = SampleLosses(model, interrupted, data, memory_budget=budget)
    with pytest.raises(error, match="enough"):
        fisher_diagonal(list(model.parameters()), losses)
    assert_untouched(model, before)


def test_an_iterable_is_consumed_in_evaluation_mode_if_the_model_is_given():
    model, (xs, ys) = ConvNet(), images()
    before = everything(model)
    params = list(model.parameters())

    def losses(fail=False):
        for x, y in zip(xs, ys, strict=True):
            assert (model.body[1].training, model.training) == (False, True)
            yield F.cross_entropy(model(x[None]), y[None])
            if fail:
                raise KeyboardInterrupt

    f = fisher_diagonal(params, losses(), model=model)
    assert_untouched(model, before)
    assert close(f.squares, one_by_one(model, (xs, ys), params))
    with pytest.raises(KeyboardInterrupt):
        fisher_diagonal(params, losses(fail=True), model=model)
    assert_untouched(model, before)


@pytest.mark.parametrize("budget", [1, EVERYTHING], ids=["one", "all"])
def test_dropout_stays_on_with_random_numbers_of_its_own(budget):
    model, data = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3)), vectors()
    data[0][:] = data[0][0]  # equal samples: gradients differ by dropout alone
    data[1][:] = 1
    losses = cross_entropies(model, data, memory_budget=budget)
    chunks = [g for (g,) in losses.gradients([model[0].bias])]
    rows = torch.cat(chunks)
    assert len({tuple(row.tolist()) for row in rows}) == 12
    torch.rand(7)
    assert same_bits([torch.cat([g for (g,) in losses.gradients([model[0].bias])])], [rows])
    other = cross_entropies(model, data, memory_budget=budget, seed=1)
    assert not torch.equal(torch.cat([g for (g,) in other.gradients([model[0].bias])]), rows)
    model.eval()
    assert len({tuple(row.tolist()) for row in torch.cat([g for (g,) in losses.gradients([model[0].bias])])}) == 1


# ---- where vmap does not go -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Branching, Counting, HiddenWeight, Custom], ids=lambda cls: cls.__name__)
def test_a_model_that_vmap_does_not_take_warns_once_and_agrees(cls):
    model, data = cls(4, 3) if cls is Custom else cls(), vectors()
    params = list(model.parameters())
    expected = one_by_one(model, data, params)
    losses = cross_entropies(model, data)
    with pytest.warns(UserWarning, match=r"one by one.*\(RuntimeError: .+\)") as caught:
        f = fisher_diagonal(params, losses)
    assert len(caught) == 1
    assert close(f.squares, expected)
    assert all(x.any() for x in f.squares)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(fisher_diagonal(params, losses).squares, f.squares)


def test_a_loss_of_one_entry_in_any_shape():
    model, data = nn.Linear(4, 3), vectors()
    losses = SampleLosses(model, nn.CrossEntropyLoss(reduction="none"), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = fisher_diagonal([model.weight], losses)
    assert close(f.squares, one_by_one(model, data, [model.weight]))


def test_samples_of_different_shapes():
    model = nn.Linear(4, 3)
    data = [(torch.randn(i, 4), torch.randint(0, 3, (i,))) for i in (1, 2, 3)]

    def loss_fn(out, y):
        return F.cross_entropy(out[0], y[0])

    with pytest.warns(UserWarning, match="equal size"):
        f = fisher_diagonal([model.weight], SampleLosses(model, loss_fn, data))
    expected = [torch.autograd.grad(F.cross_entropy(model(x), y), model.weight)[0].square() / 3 for x, y in data]
    assert close(f.squares, [sum(expected)])


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True))
    data = torch.arange(4), torch.tensor([0, 1, 2, 0])
    losses = cross_entropies(model, data, memory_budget=1)
    assert fisher_diagonal(list(model.parameters()), losses).squares[0].any(1).tolist() == [True] * 4 + [False] * 6


def test_errors_of_the_user_are_not_about_vmap():
    """They come as they are, without a warning, and do not turn vmap off for good."""
    model = nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            fisher_diagonal([model.weight], cross_entropies(model, (torch.randn(5, 2), torch.zeros(5))))
        failing = True

        def loss_fn(out, y):
            if failing:
                raise ZeroDivisionError("mine")
            return F.cross_entropy(out, y)

        losses = SampleLosses(model, loss_fn, vectors())
        with pytest.raises(ZeroDivisionError, match="mine"):
            fisher_diagonal([model.weight], losses)
        failing = False
        assert len(next(losses.gradients([model.weight]))[0]) == 12


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate")])
def test_out_of_memory_halves_the_chunk(monkeypatch, error):
    model, data = nn.Linear(4, 3), vectors()
    sizes = []

    batch = DrawnSamples.batch

    def hungry(self, positions, device):
        sizes.append(len(positions))
        if len(positions) > 4:
            raise error
        return batch(self, positions, device)

    monkeypatch.setattr(DrawnSamples, "batch", hungry)
    losses = cross_entropies(model, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = fisher_diagonal([model.weight], losses)
    assert sizes == [1, 12, 6, 3, 3, 3, 3]
    assert close(f.squares, one_by_one(model, data, [model.weight]))


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_losses_that_depend_on_nothing():
    model = nn.Linear(4, 3)
    alien, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    for losses in (cross_entropies(model, vectors()), [model(torch.ones(4)).sum()]):
        for params in ([alien], [frozen], [alien, frozen]):
            with pytest.raises(ValueError, match="do not depend on any of the parameters"):
                fisher_diagonal(params, losses)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="do not depend on any of the parameters"):
        fisher_diagonal([alien], cross_entropies(model, vectors()))


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (0.5, TypeError, r"loss 1 must be a tensor, got float; give the loss, not its \.item"),
        (torch.ones(3, requires_grad=True), ValueError, r"loss 1 must have one entry, got shape \(3,\)"),
        (torch.ones(()), ValueError, "loss 1 does not require a gradient.*without no_grad or detach"),
    ],
)
def test_wrong_losses(second, error, message):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        fisher_diagonal([w], [w.sum(), second])


class Stream(IterableDataset):
    """Has no length."""

    def __iter__(self):
        yield from ()


def test_wrong_arguments():
    w, model = torch.ones(2, requires_grad=True), nn.Linear(4, 3)
    with pytest.raises(ValueError, match="losses is empty"):
        fisher_diagonal([w], [])
    with pytest.raises(ValueError, match="params is empty"):
        fisher_diagonal([], [w.sum()])
    with pytest.raises(ValueError, match="given before, as parameter 0"):
        fisher_diagonal([w, w], [w.sum()])
    with pytest.raises(TypeError, match="share one graph"):
        fisher_diagonal([w], w * 2)
    with pytest.raises(ValueError, match="num_samples must be >= 1, got 0"):
        fisher_diagonal([w], [w.sum()], num_samples=0)
    for options in ({"num_samples": 0}, {"memory_budget": 0}):
        with pytest.raises(ValueError, match="must be >= 1, got 0"):
            cross_entropies(model, vectors(), **options)
    with pytest.raises(ValueError, match="dataset is empty"):
        cross_entropies(model, [])
    with pytest.raises(ValueError, match="3 inputs and 2 targets"):
        cross_entropies(model, (torch.ones(3, 4), torch.ones(2)))
    with pytest.raises(TypeError, match="must have a length and items, got Stream"):
        cross_entropies(model, Stream())
    with pytest.raises(ValueError, match=r"must be a pair \(x, y\), got Tensor"):
        fisher_diagonal([model.weight], cross_entropies(model, torch.ones(3, 4)))
    with pytest.raises(ValueError, match=r"mean loss of a batch, one entry, got shape \(1, 3\)"):
        fisher_diagonal([model.weight], SampleLosses(model, lambda out, y: out, vectors()))
    with pytest.raises(TypeError, match="loss_fn must return a tensor, got float"):
        fisher_diagonal([model.weight], SampleLosses(model, lambda out, y: 1.0, vectors()))


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_are_looked_through(process_group):
    """A reducer that looks for unused parameters waits for the others, and refuses the next forward."""
    model, data = ConvNet(), images()
    expected = one_by_one(model, data, [model.head.weight])
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for wrapped in (nn.DataParallel(model), parallel, torch.compile(parallel)):
        for budget in (1, EVERYTHING):
            losses = cross_entropies(wrapped, data, memory_budget=budget)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert close(fisher_diagonal([model.head.weight], losses).squares, expected)
    for _ in range(2):
        F.cross_entropy(parallel(data[0]), data[1]).backward()


# ---- the bar --------------------------------------------------------------------------------------------------------


class Bar:
    """tqdm, as far as it is used."""

    made = []

    def __init__(self, total, delay, leave, **_):
        self.total, self.delay, self.leave, self.n, self.closed = total, delay, leave, 0, False
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def update(self, n):
        self.n += n


@pytest.mark.parametrize(("progress", "delays"), [(None, [2.0]), (True, [0]), (False, [])])
def test_progress(monkeypatch, progress, delays):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    model = nn.Linear(4, 3)
    fisher_diagonal([model.weight], cross_entropies(model, vectors(5), progress=progress))
    assert [bar.delay for bar in Bar.made] == delays
    assert all((bar.total, bar.n, bar.leave, bar.closed) == (5, 5, False, True) for bar in Bar.made)


def test_an_exception_takes_the_bar_away(monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="nonsense"):
        fisher_diagonal([model.weight], cross_entropies(model, vectors()), backend="nonsense")
    assert [bar.closed for bar in Bar.made] == [True]


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = nn.Linear(4, 3)
    assert fisher_diagonal([model.weight], cross_entropies(model, vectors(), progress=True)).n_used.item() == 12


def test_a_hidden_bar_prints_nothing(capsys):
    model = nn.Linear(4, 3)
    fisher_diagonal([model.weight], cross_entropies(model, vectors()))
    assert capsys.readouterr() == ("", "")
    fisher_diagonal([model.weight], cross_entropies(model, vectors(), progress=True))
    assert "Fisher" in capsys.readouterr().err


def test_public_names():
    for public in (SampleLosses, samkern.fisher.FisherDiagonal, fisher_diagonal):
        assert ">>>" in public.__doc__
