"""What holds for every measure: all is put back, seeds decide, batches are shares of one data set, NaN stays NaN."""

from __future__ import annotations

import functools
import gc
import math
import random
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from samkern import sharpness
from samkern.sharpness.problem import problem
from samkern.sharpness.suite import MEASURES

from .lists import BF16, FP16, FP32, FP64, dtype_name, seeded
from .measured import CALLS, WITHOUT_LOSS, loss_fn, odd, odd_data
from .oracles import measures as oracle

measures = pytest.mark.parametrize("name", CALLS)


def bits(x):
    return (x.data_ptr(), x.stride(), x.detach().flatten().view(torch.uint8).tolist())


def everything(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        **{name: bits(x) for name, x in tensors.items()},
        **{f"{name}.grad": bits(p.grad) for name, p in model.named_parameters() if p.grad is not None},
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
    }


def with_gradients():
    model = odd()
    (x, y), *_ = odd_data()
    loss_fn(model(x), y).backward()
    return model


class Drawing:
    """Batches of a loader that shuffles, in every way there is."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        torch.rand(1), random.random(), np.random.rand()
        yield from self.data


@measures
def test_everything_is_left_as_it_was(name):
    model = with_gradients()
    before = everything(model)
    found = CALLS[name](model, loss_fn, Drawing(odd_data(sizes=(3, 3, 2))), progress=False)
    assert math.isfinite(found.value)
    assert everything(model) == before


@measures
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_leaves_everything_as_it_was(name, error):
    model = with_gradients()
    before = everything(model)
    calls = 0

    def interrupt(module, args):
        nonlocal calls
        calls += 1
        module.norm.running_mean.add_(0 if calls < 2 else 1)
        if calls > 1:
            raise error("enough")

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(error, match="enough"):
        CALLS[name](model, loss_fn, odd_data())
    handle.remove()
    assert calls > 1
    assert everything(model) == before


@measures
def test_seeds(name):
    """A measure is the same for the same seed, whatever was drawn before; another for another, if it draws."""
    found = []
    for seed in (3, 3, 2**63 + 5):
        torch.rand(7)
        found.append(CALLS[name](odd(), loss_fn, odd_data(sizes=(3, 3, 2)), seed=seed))
    assert found[0] == found[1]
    draws = name in ("epsilon", "lpf", "pac_bayes", "local_entropy", "trace", "drift")  # drift: dropout
    assert (found[0] != found[2]) == draws


@pytest.mark.parametrize("name", [name for name in CALLS if name != "drift"])  # of which a batch is a step
def test_batches_are_shares_of_one_data_set(name):
    """For m-sharpness, if groups are the same. An empty one is none."""
    sizes = {"m": (4, 0, 2, 2), "gap": (3, 5)}.get(name, (1, 5, 0, 2))
    whole, parts = (CALLS[name](odd(), loss_fn, odd_data(sizes=n)) for n in ((8,), sizes))
    if name == "gap":  # its test batches are the first of the training batches
        x, y = odd_data(sizes=(8,))[0]
        right = odd().eval()(x).argmax(1) == y
        assert (whole.value, parts.value) == (0, 100 * (right.double().mean() - right[:3].double().mean()).item())
    else:
        assert parts.value == pytest.approx(whole.value, rel=1e-9)


@measures
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=dtype_name)
def test_dtypes(name, dtype):
    """Of the same weights and data, up to the rounding of what is computed in half precision."""
    half = odd(dtype)
    exact = odd().double()
    exact.load_state_dict(half.state_dict())
    found, expected = (
        CALLS[name](model, loss_fn, [({k: v.to(to) for k, v in x.items()}, y) for x, y in odd_data(dtype)]).value
        for model, to in ((half, dtype), (exact, FP64))
    )
    # Rounded weights move by steps of 2^-9 or 2^-11 of themselves; a rise of a tenth is a difference of two losses.
    assert found == pytest.approx(expected, rel={FP32: 1e-3, FP16: 0.05, BF16: 0.25}[dtype], abs=1e-9)


@measures
def test_a_loss_of_nan_is_a_measure_of_nan(name):
    if name in WITHOUT_LOSS:
        model = odd()
        model.left.data.fill_(math.nan)
        assert math.isnan(CALLS[name](model, None, odd_data()).value)
    else:
        assert math.isnan(CALLS[name](odd(), lambda out, y: loss_fn(out, y) * math.nan, odd_data()).value)


@measures
def test_nothing_to_measure(name):
    if name == "gap":
        return
    with pytest.raises(ValueError, match="data is empty"):
        CALLS[name](odd(), loss_fn, [])
    with pytest.raises(ValueError, match="data is empty"):
        CALLS[name](odd(), loss_fn, odd_data(sizes=(0,)))
    if name != "trace":
        with pytest.raises(ValueError, match="no parameter that requires a gradient"):
            CALLS[name](odd().requires_grad_(False), loss_fn, odd_data())
    if name not in (*WITHOUT_LOSS, "lpf", "pac_bayes"):
        with pytest.raises(ValueError, match="does not depend on the model's parameters"):
            CALLS[name](odd(), lambda out, y: loss_fn(out.detach(), y), odd_data())


RANGES = {
    "epsilon_sharpness": [{"rho": -1}, {"rho": math.nan}, {"steps": 0}, {"steps": 1.0}, {"step_size": 0}],
    "adaptive_sharpness": [{"mode": "euclidean"}, {"eta": -1}, {"rho": -0.1}, {"steps": 0}],
    "m_sharpness": [{"m": 0}, {"m": 2, "rho": -1}],
    "lpf": [{"sigma": -1}, {"draws": 0}],
    "pac_bayes": [{"threshold": 0}, {"draws": 0}],
    "local_entropy_gradient": [{"rho": -1}, {"draws": 0}],
    "scaled_trace": [{"probes": 0}],
    "gradient_drift": [{"rho": -1, "make_optimizer": None}, {"k": 0, "make_optimizer": None}],
    "standardized_epochs": [{"pairs": -1, "steps_per_epoch": 1}, {"pairs": 1, "steps_per_epoch": 0}],
}


@pytest.mark.parametrize("name", RANGES)
def test_options_out_of_range(name):
    for options in RANGES[name]:
        given = () if name == "standardized_epochs" else (odd(), loss_fn, odd_data())
        wrong = [
            key for key, value in options.items() if value is not None and (key, value) not in [("m", 2), ("pairs", 1)]
        ]
        with pytest.raises(ValueError, match=rf"{'|'.join(wrong)}.* must be "):
            getattr(sharpness, name)(*given, **options)


@pytest.mark.parametrize(
    "name", [name for name in CALLS if name != "trace"]
)  # which is given parameters of the inner one
def test_wrappers_are_looked_through(name):
    wrapped = nn.DataParallel(odd())
    assert CALLS[name](wrapped, loss_fn, odd_data()) == CALLS[name](odd(), loss_fn, odd_data())


class Bar:
    """tqdm, as far as it is used."""

    made = []

    def __init__(self, total, **_):
        self.total, self.n = total, 0
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, n):
        self.n += n


@measures
def test_bars_end_where_they_should(name, monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    CALLS[name](odd(), loss_fn, odd_data(), progress=True)
    assert len(Bar.made) == (2 if name == "gap" else 1)
    assert all(bar.n > 0 and bar.total in (bar.n, None) for bar in Bar.made)
    CALLS[name](odd(), loss_fn, odd_data(), progress=False)
    assert len(Bar.made) == (2 if name == "gap" else 1)


# ---- what they share


def test_draws_are_those_of_philox():
    """Of every entry by its place, in chunks and runs of any size."""
    model = nn.Sequential(
        nn.Linear(3, 5), nn.Linear(600, 500), nn.Linear(2, 2).to(memory_format=torch.contiguous_format)
    )
    n, seed = sum(p.numel() for p in model.parameters()), 2**40 + 3
    with problem(model, loss_fn, [(torch.ones(1), None)], seed) as p:
        for draw in (0, 7):
            z = torch.cat([x.flatten() for x in p.normals(draw)])
            assert torch.allclose(z.double(), oracle.normals(n, seed, draw), atol=3e-6)
            signs = torch.cat([x.flatten() for x in p.signs(draw)])
            expected = torch.from_numpy(oracle.words(n, seed, draw).flatten()[:n].astype(np.int64) >> 31)
            assert torch.equal(signs, 1 - 2 * expected.float())
            assert p.uniform(draw) == pytest.approx(oracle.uniform(n, seed, draw), rel=1e-12)


def test_parts_of_a_batch():
    """Rows are cut of what has one for each sample; the rest is given whole."""
    data = [
        ({"x": torch.arange(5), "shared": torch.ones(3), "name": "n", "scalar": torch.tensor(2.0)}, [torch.arange(5)])
    ]
    with problem(nn.Linear(1, 1), loss_fn, data) as p:
        part = p.batches[0].part(3, 8)
    assert part.n == 2
    assert (part.x["x"].tolist(), part.y[0].tolist()) == ([3, 4], [3, 4])
    assert (part.x["shared"].shape, part.x["name"], part.x["scalar"].item()) == ((3,), "n", 2.0)


def test_the_error_of_a_weighted_mean():
    """Equal weights: that of the mean. A sample that weighs nothing changes nothing but the count."""
    mean, weighted = (
        sharpness.Measurement.mean([1.0, 2.0, 6.0]),
        sharpness.Measurement.weighted_mean([1.0, 2.0, 6.0], [4, 4, 4]),
    )
    assert weighted.value == pytest.approx(mean.value)
    assert weighted.standard_error == pytest.approx(mean.standard_error)
    assert sharpness.Measurement.weighted_mean([1.0, 4.0], [3, 1]).value == pytest.approx(1.75)
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 2, 3, 10]
    found = [
        sharpness.Measurement.weighted_mean(
            [sum(torch.randn(n, generator=generator).tolist()) / n for n in sizes], sizes
        )
        for _ in range(2000)
    ]
    spread = torch.tensor([m.value for m in found]).square().mean().item()
    assert spread == pytest.approx(1 / 16, rel=0.1)
    # Parts are fewer than samples, and one of them has most of the weight: the estimate is of the right size, not exact.
    assert sum(m.standard_error**2 for m in found) / 2000 == pytest.approx(spread, rel=0.4)


def test_many_at_once():
    model, before = odd(), everything(odd())["torch"]
    found = sharpness.flatness(
        model,
        loss_fn,
        iter(odd_data()),
        {"lpf": {"draws": 2}, "fisher_rao": {}, "shannon_entropy": {"seed": 4}},
        seed=5,
    )
    assert list(found) == ["lpf", "fisher_rao", "shannon_entropy"]
    assert found["lpf"] == sharpness.lpf(model, loss_fn, odd_data(), draws=2, seed=5)
    assert torch.get_rng_state().tolist() == before
    found = sharpness.flatness(model, loss_fn, odd_data(), progress=False)
    assert set(found) == set(MEASURES)
    assert all(isinstance(m, sharpness.Measurement) and math.isfinite(m.value) for m in found.values())
    with pytest.raises(ValueError, match=r"measures must be of .*lpf.*, got 'sharpness'"):
        sharpness.flatness(model, loss_fn, odd_data(), ["lpf", "sharpness"])


# ---- what is around a measure, and in a model and its loss


class Checkpointed(nn.Module):
    """Its first layers are computed again in the backward pass, or not."""

    def __init__(self, again):
        super().__init__()
        self.first, self.head, self.again = (
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)),
            nn.Linear(5, 3),
            again,
        )

    def forward(self, x):
        return self.head((checkpoint(self.first, x, use_reentrant=False) if self.again else self.first(x)).tanh())


def plain_data(n=6):
    return [(torch.randn(n, 4, generator=seeded(0)), torch.randint(0, 3, (n,), generator=seeded(1)))]


@pytest.mark.parametrize(
    "measure",
    [
        functools.partial(sharpness.epsilon_sharpness, rho=0.5, steps=3),
        functools.partial(sharpness.local_entropy_gradient, rho=2.0, draws=2),
        functools.partial(sharpness.top_eigenvalue, product="difference", max_products=3),
        functools.partial(sharpness.top_eigenvalue, max_products=3),
    ],
    ids=["epsilon", "local_entropy", "difference", "exact"],
)
def test_what_is_computed_again_has_the_same_weights(measure):
    """Activation checkpointing calls layers in the backward pass."""
    kept, again = Checkpointed(False), Checkpointed(True)
    again.load_state_dict(kept.state_dict())
    expected = measure(kept, loss_fn, plain_data()).value
    assert measure(again, loss_fn, plain_data()).value == pytest.approx(expected, rel=1e-6)


class Padded(nn.Module):
    """Outputs of padded positions count, which fused Transformer layers set to 0."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(4, 3)

    def forward(self, x):
        padded = torch.arange(5).expand(len(x), 5) > 2
        return self.head(self.layers(x[:, None] * torch.arange(1, 6)[:, None], src_key_padding_mask=padded).mean(1))


def test_a_loss_is_the_same_with_a_graph_and_without():
    fused = torch.backends.mha.get_fastpath_enabled()
    assert sharpness.epsilon_sharpness(Padded(), loss_fn, plain_data(), rho=0.0).value == pytest.approx(0, abs=1e-6)
    assert torch.backends.mha.get_fastpath_enabled() == fused


@measures
def test_without_gradients_around(name):
    expected = CALLS[name](odd(), loss_fn, odd_data())
    model = odd()
    with torch.no_grad():
        assert CALLS[name](model, loss_fn, odd_data()) == expected
    with torch.inference_mode():
        assert CALLS[name](model, loss_fn, odd_data()) == expected
        assert torch.is_inference_mode_enabled()
        data = odd_data()
    assert CALLS[name](model, loss_fn, data) == expected


def test_autocast_around_keeps_no_weights():
    """Its cache would hold those of every evaluation until it ends."""
    model, seen = nn.Linear(4, 3), []
    model.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(module.weight)))
    with torch.autocast("cpu", dtype=BF16):
        sharpness.epsilon_sharpness(model, loss_fn, plain_data(), steps=3)
        gc.collect()
        assert len(seen) == 4
        assert not any(weight() is not None for weight in seen)
        assert torch.is_autocast_cache_enabled()


def test_a_loss_that_draws_draws_the_same():
    def drawing(out, y):
        return loss_fn(torch.nn.functional.dropout(out, 0.5), y)

    assert sharpness.epsilon_sharpness(nn.Linear(4, 3), drawing, plain_data(), rho=0.0).value == 0


def test_a_penalty_on_the_weights_in_the_loss_counts():
    model = nn.Linear(4, 3)

    def penalised(out, y):
        return loss_fn(out, y) + sum(p.square().sum() for p in model.parameters())

    without, found = (
        sharpness.top_eigenvalues(model, loss, plain_data(), k=1).values[0] for loss in (loss_fn, penalised)
    )
    assert found == pytest.approx(without + 2, rel=1e-4)


def test_inputs_that_the_model_writes_to():
    class Scaling(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    data = plain_data()
    assert sharpness.epsilon_sharpness(Scaling(4, 3), loss_fn, data, rho=0.0).value == 0
    assert torch.equal(data[0][0], plain_data()[0][0])


def test_a_loaders_own_generator_is_put_back():
    (x, y), *_ = plain_data()
    generator = seeded(3)
    before = generator.get_state()
    loader = torch.utils.data.DataLoader([*zip(x, y, strict=True)], batch_size=2, shuffle=True, generator=generator)
    model = nn.Linear(4, 3)
    first, second = (sharpness.epsilon_sharpness(model, loss_fn, loader) for _ in range(2))
    assert torch.equal(generator.get_state(), before)
    assert first == second
    assert len(first.parts) == 3


def test_recurrent_layers_do_without_cudnn():
    """Which cannot differentiate them in evaluation mode."""
    used = []

    def watched(out, y):
        used.append(torch.backends.cudnn.enabled)
        return out[0].square().mean()

    before = torch.backends.cudnn.enabled
    for model in (nn.GRU(4, 3), nn.Sequential(nn.Linear(4, 3))):
        sharpness.lpf(model, watched, plain_data(), draws=1)
    assert used == [False, before]
    assert torch.backends.cudnn.enabled == before


@pytest.mark.parametrize(
    ("model", "seed", "error", "message"),
    [
        (nn.Linear(4, 3, dtype=torch.complex64), 0, TypeError, "complex parameters"),
        (nn.LazyLinear(3), 0, ValueError, "parameters without a shape: call it once"),
        (nn.Linear(4, 3), 2**64, ValueError, "seed must have 64 bits, got 18446744073709551616"),
        (nn.Linear(4, 3), 0.5, TypeError, "seed must be an integer, got 0.5"),
    ],
    ids=["complex", "lazy", "large seed", "broken seed"],
)
def test_models_and_seeds_that_cannot_be(model, seed, error, message):
    with pytest.raises(error, match=message):
        sharpness.lpf(model, loss_fn, plain_data(), draws=1, seed=seed)


def test_seeds_of_numpy():
    model = nn.Linear(4, 3)
    found, expected = (sharpness.lpf(model, loss_fn, plain_data(), draws=2, seed=seed) for seed in (np.int64(3), 3))
    assert found == expected


def test_means_of_what_is_not_finite():
    assert math.isnan(sharpness.Measurement.mean([math.inf, -math.inf]).value)
    assert sharpness.Measurement.mean([math.inf, 1.0]).value == math.inf
    assert sharpness.Measurement.mean([1e308] * 3).value == pytest.approx(1e308)
