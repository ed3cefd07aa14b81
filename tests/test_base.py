"""The fused base updates against torch.optim, with plain gradients: what a base optimizer user would notice.

torch's fused and foreach kernels use FMA and other orders, so float32 agrees to a few units in the last place per step, not
bitwise; 100 steps stay within 1e-5 of the weights. In float64 the same comparison holds to 1e-13.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import samkern

from .lists import affordable, dtype_name
from .test_step import Never

SHAPES = [(5, 4), (7,), (), (3, 2, 2, 2)]
CASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd_decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam_decay": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}),
    "adam_decoupled": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "tensor_lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "partial": (functools.partial(torch.optim.SGD, momentum=0.9), {"lr": 0.1}),
}
UNFUSED = {"amsgrad", "rmsprop", "adagrad"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("name", CASES)
def test_a_hundred_steps(name, dtype, backend):
    base, options = CASES[name]
    start = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    ours = [nn.Parameter(x.clone()) for x in start]
    theirs = [nn.Parameter(x.clone()) for x in start]
    opt = samkern.SharpnessAware(ours, base, **options, schedule=Never(), backend=backend)
    plain = base(theirs, **options)
    assert ("in the pass that restores" in opt.explain()) == (name not in UNFUSED)
    for _ in range(affordable(backend, 100, 8)):
        grads = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
        for p, q, g in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        opt.first_step()
        opt.second_step()
        plain.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() <= tolerance * q.norm()
        for key, value in plain.state[q].items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(opt.state[p][key].double(), value.double(), rtol=1e-4, atol=1e-7)
                assert opt.state[p][key].dtype == value.dtype


def test_what_a_base_must_not_be():
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"maximize=True \(group 0\) would flip"):
        samkern.SAM(p, torch.optim.SGD, lr=0.1, maximize=True)
    with pytest.raises(ValueError, match="LBFGS evaluates the closure itself"):
        samkern.SAM(p, torch.optim.LBFGS)
    with pytest.raises(TypeError, match=r"base must be a torch\.optim class or instance, got 'SGD'"):
        samkern.SAM(p, "SGD", lr=0.1)
    with pytest.raises(TypeError, match=r"base must make a torch\.optim\.Optimizer, got list"):
        samkern.SAM(p, list)
    with pytest.raises(ValueError, match="empty parameter list"):
        samkern.SAM([], torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be a finite number >= 0, got -0.1"),
        ({"rho": float("inf")}, ValueError, "rho must be a finite number >= 0, got inf"),
        ({"rho": "big"}, ValueError, "rho must be a finite number >= 0, got 'big'"),
        ({"p": 1}, ValueError, "p must be one of 2, inf, got 1"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be a finite number > 0, got 0"),
        (
            {"cache_dtype": torch.int8},
            ValueError,
            "cache_dtype must be one of torch.float32, torch.bfloat16, got torch.int8",
        ),
        ({"nonfinite": "raise"}, ValueError, "nonfinite must be one of 'skip', 'ignore', got 'raise'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, reference"),
        ({"radius": -1.0}, ValueError, "rho must be a finite number >= 0, got -1.0"),
        ({"momemtum": 0.9}, TypeError, "momemtum"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        samkern.SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, **{"lr": 0.1, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: samkern.SAMk(p, torch.optim.SGD, lr=0.1, k=0), "k must be an integer >= 1, got 0"),
        (lambda p: samkern.LookSAM(p, torch.optim.SGD, lr=0.1, k=2.5), "k must be an integer >= 1, got 2.5"),
        (lambda p: samkern.LookSAM(p, torch.optim.SGD, lr=0.1, alpha=-1), "alpha must be a finite number >= 0, got -1"),
        (
            lambda p: samkern.LookSAM(p, torch.optim.SGD, lr=0.1, scope="layer"),
            "scope must be one of 'global', 'tensor'",
        ),
        (lambda p: samkern.LookSAM(p, torch.optim.SGD, lr=0.1, min_sine=-1), "min_sine must be"),
        (
            lambda p: samkern.ASAM(p, torch.optim.SGD, lr=0.1, mode="row"),
            "mode must be one of 'element', 'filter', 'layer'",
        ),
        (lambda p: samkern.ASAM(p, torch.optim.SGD, lr=0.1, eta=-1), "eta must be a finite number >= 0"),
        (
            lambda p: samkern.LookLayerSAM(p, torch.optim.SGD, lr=0.1, layer_mode="lamb"),
            "layer_mode must be one of 'lars'",
        ),
        (
            lambda p: samkern.LookLayerSAM(p, torch.optim.SGD, lr=0.1, trust_clip=0),
            "trust_clip must be a finite number > 0",
        ),
    ],
)
def test_bad_options_of_methods_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2))])


def test_names_of_parameters_are_in_messages():
    model = nn.Linear(2, 3)
    model.weight.data = torch.ones(3, 1).expand(3, 2)
    with pytest.raises(ValueError, match=r"parameter 0 \('weight'\), shape \(3, 2\): entries share memory"):
        samkern.SAM(model.named_parameters(), torch.optim.SGD, lr=0.1)


def test_a_base_that_raises_leaves_the_weights_restored(backend):
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("disk full")

    p = nn.Parameter(torch.ones(3))
    opt = samkern.SAM([p], Broken, lr=0.1, rho=1.0, backend=backend)
    with pytest.raises(RuntimeError, match="disk full"):
        opt.step(lambda: setattr(p, "grad", torch.ones(3)))
    assert p.tolist() == [1, 1, 1]
    opt.require_idle("the next step")
