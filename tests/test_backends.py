"""Choice of backend, and what is said when one is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import samkern
from samkern import backends, ops
from samkern.backends import _version_of, resolve

from .conftest import AVAILABLE
from .problems import make_net, train, weights

SGD = torch.optim.SGD


def which(opt) -> str:
    return next(line for line in opt.explain().splitlines() if line.startswith("backend")).split()[1]


def make_optimizer(**options):
    return samkern.SAM([nn.Parameter(torch.ones(3))], SGD, lr=0.1, **options)


def test_the_fastest_one_is_the_default():
    assert which(make_optimizer()) == ("cpu" if "cpu" in AVAILABLE else "reference")


def test_a_block_overrides_everything(backend, monkeypatch):
    monkeypatch.setenv("SAMKERN_BACKEND", "reference")
    assert which(make_optimizer()) == "reference"
    monkeypatch.setenv("SAMKERN_BACKEND", "auto")
    opt = make_optimizer(backend=backend)
    assert which(opt) == backend
    with samkern.use_backend("reference"):
        assert which(opt) == "reference"
        with samkern.use_backend(backend):
            assert which(opt) == backend
        assert which(opt) == "reference"
    assert which(opt) == backend
    with pytest.raises(ZeroDivisionError), samkern.use_backend("reference"):
        raise ZeroDivisionError
    assert which(opt) == backend


def test_training_may_change_backends_on_the_way():
    """State and caches are those of the optimizer, not of a backend."""
    net, twin = make_net(), make_net()
    opt = samkern.LookSAM(net.parameters(), SGD, lr=0.1, momentum=0.9, k=3)
    other = samkern.LookSAM(twin.parameters(), SGD, lr=0.1, momentum=0.9, k=3, backend="reference")
    train(net, opt, range(4))
    with samkern.use_backend("reference"):
        train(net, opt, range(4, 8))
    train(net, opt, range(8, 10))
    train(twin, other, range(10))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(weights(net), weights(twin), strict=True))


def test_unknown_and_missing_ones(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, cuda, triton, got 'gpu'"):
        make_optimizer(backend="gpu")
    for name, why in (("cuda", "samkern._cuda"), ("triton", "Triton")):
        if not samkern.backends()[name].available:
            with pytest.raises(samkern.NotBuiltError, match=f"backend '{name}' cannot run here: {why}"):
                make_optimizer(backend=name)
    monkeypatch.setenv("SAMKERN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="got 'nonsense'"):
        ops.norms([torch.ones(1)])


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="samkern._C is not built")
def test_a_named_backend_must_serve_the_device():
    with pytest.raises(ValueError, match="backend 'cpu' serves CPU tensors, got tensors on meta"):
        resolve(torch.device("meta"), "cpu")
    assert resolve(torch.device("meta")) == "reference"


def test_every_backend_says_why():
    for name, backend in backends().items():
        assert backend.name == name
        assert backend.why
    text = samkern.info()
    assert all(name in text for name in backends())
    assert f"samkern {samkern.__version__}, torch {torch.__version__}" in text


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="samkern._C is not built")
def test_numbers_that_python_and_cpp_share():
    """The report is written by one and read by the other."""
    from samkern import _C, options

    assert tuple(field.name.lower() for field in options.Report) == _C.report_fields
    header = (Path(__file__).parent.parent / "csrc" / "plan.h").read_text()
    for enum, cpp in ((options.Climb, "Climb"), (options.Mix, "Mix"), (options.Scope, "Scope"), (options.Base, "Base")):
        body = header.split(f"enum class {cpp} : int32_t {{")[1].split("}")[0]
        names = [
            line.strip().split(",")[0] for line in body.replace(", k", ",\nk").splitlines() if line.strip()[:1] == "k"
        ]
        assert [name.lower() for name in names] == ["k" + member.name.lower().replace("_", "") for member in enum]


def test_triton_under_another_name(monkeypatch):
    """Nightly builds of torch bring a package of another name; without any, only the version is unknown."""
    from importlib.metadata import PackageNotFoundError

    def version(name):
        if name != "pytorch-triton":
            raise PackageNotFoundError(name)
        return "3.7"

    monkeypatch.setattr("importlib.metadata.version", version)
    assert _version_of("triton", "pytorch-triton") == "3.7"
    assert _version_of("triton") == "of unknown version"
